"""Score networks, each for one example: x [*e], t [] -> [*e].

`exact.Attention` is no entry of the table: it is built from a data set or a mixture,
and answers with the score itself.
"""

from memsep_jax.models.dit import DiT
from memsep_jax.models.exact import Attention
from memsep_jax.models.mlp import MLP
from memsep_jax.models.unet import UNet

MODELS = {"dit": DiT, "mlp": MLP, "unet": UNet}

__all__ = ["MLP", "MODELS", "Attention", "DiT", "UNet"]
