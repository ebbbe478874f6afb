"""A process: the cosine schedule, X_t = cos(pi t / 2) X_0 + sin(pi t / 2) eps."""

import jax.numpy as jnp

from memsep_jax.process import Process


def cosine() -> Process:
    """Noise alone at t = 1, where there is no score: choose t_max below 1."""
    return Process(lambda t: jnp.cos(jnp.pi * t / 2), lambda t: jnp.sin(jnp.pi * t / 2))
