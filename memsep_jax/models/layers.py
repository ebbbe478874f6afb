"""Pieces that several networks share."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from memsep_jax.checks import is_known


def _all_but_bias(x, kernel, bias, *, dtype):
    """Flax's promotion to dtype, except for the bias, which stays float32."""
    return *nn.dtypes.promote_dtype(x, kernel, dtype=dtype), bias


class Dense(nn.DenseGeneral):
    """A product in dtype, to which the bias is added in float32.

    The gradient of the bias, a sum over batch and tokens, is then computed in float32
    too: summed in bfloat16 on a CPU, it was wrong by up to a fifth, where that of the
    kernel was wrong by 1/200.
    """

    promote_dtype: Callable = _all_but_bias

    def __call__(self, x):
        """x [..., in] -> [..., *features]."""
        return super().__call__(x).astype(self.dtype)


class Conv(nn.Conv):
    """A convolution in dtype, whose bias is added in float32, as in `Dense`."""

    promote_dtype: Callable = _all_but_bias

    def __call__(self, x):
        """x [h, w, in] -> [h', w', out]."""
        return super().__call__(x).astype(self.dtype)


def attend(query, key, value):
    """softmax(Q K^T / sqrt(c)) V.   [..., tokens, c] -> the same."""
    # By plain products, heads first: jax.nn.dot_product_attention copies logits and
    # weights into other orders on a CPU, and its cuDNN kernels had bugs of batching
    # under vmap, which were fixed only after jax 0.11.0.
    wide = jnp.promote_types(query.dtype, jnp.float32)  # of the softmax
    logits = jnp.matmul(query, jnp.swapaxes(key, -1, -2), preferred_element_type=wide)
    # No result depends on what is subtracted, so its derivative is left out.
    largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.exp((logits - largest) / np.sqrt(query.shape[-1]).astype(wide))
    # Divided by their sum after the product, which has fewer numbers than the weights.
    sums = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights.astype(value.dtype)
    answer = jnp.matmul(weights, value, preferred_element_type=wide) / sums
    return answer.astype(value.dtype)


class Embedding(nn.Module):
    """Time and, if there is one, a label as one vector (Peebles & Xie 2023).

    With num_classes = 0 the network is unconditional. Label num_classes, or None, means
    "no label".
    """

    width: int
    num_classes: int = 0

    @nn.compact
    def __call__(self, t, label=None):
        """t [], label [] int or None -> [width]."""
        h = nn.Dense(self.width, name="time_in")(time_features(t))
        h = nn.Dense(self.width, name="time_out")(nn.silu(h))
        check_label(label, self.num_classes)
        if self.num_classes:
            table = self.param(
                "label",
                nn.initializers.normal(0.02),  # as in the release of DiT
                (self.num_classes + 1, self.width),  # the last row is "no label"
            )
            h = h + table[self.num_classes if label is None else label]
        return h


def check_label(label, num_classes):
    """Refuses a label without a row in the table; a traced one passes unchecked.

    A gather would silently take the nearest row that exists.

    Raises: ValueError.
    """
    if label is None:
        return
    if not num_classes:
        raise ValueError(
            "a label was given to an unconditional network: set num_classes"
        )
    if is_known(label) and not 0 <= int(label) <= num_classes:
        raise ValueError(
            f"label={int(label)} is beyond the table of num_classes={num_classes}: "
            f"labels are 0 to {num_classes - 1}, and {num_classes} is no label; unique "
            "labels take as many classes as there are examples"
        )


def time_features(t, width=256):
    """cos, sin of 1000 t at log-spaced frequencies, 1 to 1e-4.   [] -> [width]."""
    # Those of DiT's release, cosines first, which counts steps from 0 to 999 where t
    # goes from 0 to 1.
    frequencies = jnp.exp(-jnp.log(10_000) * jnp.arange(width // 2) / (width // 2))
    angles = 1_000 * t * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)])
