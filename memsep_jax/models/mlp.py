"""Residual MLP on flattened events."""

import flax.linen as nn
import jax.numpy as jnp

from memsep_jax.models.layers import Dense, Embedding

# The largest slope of silu, at x = 2.399357; rounded up, as a bound must be.
SILU_SLOPE = 1.0998393202


class MLP(nn.Module):
    """h <- h + W_2 silu(W_1 h + W_t embedding), depth times.

    It has no normalisation, so that its weights bound its Lipschitz constant (Ye 2025,
    section 5).

    Args:
      num_classes: 0 for an unconditional network.
      dtype: of the computation inside ("bfloat16" on GPU and TPU); None: that of x.
        Parameters stay float32.
    """

    width: int
    depth: int
    num_classes: int = 0
    dropout: float = 0.0
    dtype: str | None = None

    @nn.compact
    def __call__(self, x, t, label=None, gates=None, train=False):
        """x [*e], t [], label [] or None -> [*e]. An MLP has no heads: no gates."""
        if gates is not None:
            raise ValueError("mlp has no attention heads, so it takes no gates")
        dtype = self.dtype or x.dtype
        embedding = nn.silu(Embedding(self.width, self.num_classes)(t, label))
        embedding = embedding.astype(dtype)

        def dense(name):
            return Dense(self.width, dtype=dtype, name=name)

        h = dense("input")(x.reshape(-1))
        for i in range(self.depth):
            inner = dense(f"block_{i}_in")(nn.silu(h))
            inner = nn.silu(inner + dense(f"block_{i}_time")(embedding))
            inner = nn.Dropout(self.dropout)(inner, deterministic=not train)
            # With 1 / sqrt(depth) the sum of the blocks keeps its size at any depth.
            inner = dense(f"block_{i}_out")(inner)
            h = h + inner / jnp.sqrt(self.depth).astype(h.dtype)
        # Back in float32: the loss and the score are not computed in bfloat16. From
        # zeros, so that the first answer is that of the prediction's skip alone.
        zeros = nn.initializers.zeros
        out = Dense(x.size, kernel_init=zeros, dtype=x.dtype, name="output")
        return out(nn.silu(h)).reshape(x.shape)


def lipschitz_bound(params):
    """Product-of-layer-norms bound of the Lipschitz constant in x of an MLP (Ye 2025).

    With c the largest slope of silu: |input| c |output| times, for each block,
    1 + c^2 |in| |out| / sqrt(depth), all spectral norms. Time and label only shift.
    Dropout is assumed to be off.

    Args: params, the tree of an `MLP`.   Returns: [].
    """

    def norm(name):
        return jnp.linalg.norm(params[name]["kernel"], ord=2)

    # From the names, so that the bound needs nothing but the weights.
    depth = sum(name.endswith("_in") for name in params)
    bound = norm("input") * SILU_SLOPE * norm("output")
    for i in range(depth):
        block = norm(f"block_{i}_in") * norm(f"block_{i}_out")
        bound = bound * (1 + SILU_SLOPE**2 * block / jnp.sqrt(depth))
    return bound
