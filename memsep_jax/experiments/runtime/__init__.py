"""Workdirs, processes and signals: nothing of diffusion."""

from memsep_jax.experiments import record

__all__ = ["record"]  # which reporting reads by too, and which stands beside both
