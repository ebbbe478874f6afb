"""Score networks, each for one example: x [*e], t [] -> [*e]."""

from memsep_jax.models.dit import DiT
from memsep_jax.models.mlp import MLP

MODELS = {"dit": DiT, "mlp": MLP}

__all__ = ["MLP", "MODELS", "DiT"]
