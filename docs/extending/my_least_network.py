"""The least networks: one of flax.linen, and one of flax.nnx."""

import math

import flax.linen as nn
import jax.numpy as jnp
from flax import nnx


class Linen(nn.Module):
    """Two layers, whose sizes follow from x."""

    @nn.compact
    def __call__(self, x, t):
        """x [*e], t [] -> [*e]."""
        h = nn.silu(nn.Dense(64)(jnp.append(x, t)))
        return nn.Dense(x.size)(h).reshape(x.shape)


class Nnx(nnx.Module):
    """The same; the data give the shape of x, and the seed of the run gives rngs."""

    def __init__(self, shape, rngs, width: int = 64):
        self.first = nnx.Linear(math.prod(shape) + 1, width, rngs=rngs)
        self.last = nnx.Linear(width, math.prod(shape), rngs=rngs)

    def __call__(self, x, t):
        """x [*e], t [] -> [*e]."""
        return self.last(nnx.silu(self.first(jnp.append(x, t)))).reshape(x.shape)
