"""Softmax attention that is the score: n keys the empirical one, K keys the truth.

By theorem 5.1 of Ye 2025 there are ReLU networks of width O~(n) for the empirical
score, and of a width that does not grow with n for the true one. For the isotropic
mixture the same separation needs no approximation: attention over the n training points
equals the empirical score, with n d numbers, and attention over the K means equals the
true score, with K d + 1. Both are upper bounds by construction; no theorem says that a
smaller network cannot do it.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from memsep_jax.mixture import Mixture
from memsep_jax.process import Process


class Attention(nn.Module):
    """s(x, t) = (alpha softmax_i((alpha x.k_i - alpha^2 |k_i|^2 / 2) / A) K - x) / A.

    With A = sigma^2 the score of the noised keys; with A = sigma^2 + alpha^2 variance
    that of a mixture of N(k_i, variance I), which is a mixture of N(alpha k_i, A I) at
    time t, with the score sum_i w_i (alpha k_i - x) / A. The answer is the score
    itself at (x, t), so no `score.Prediction` reads it.

    Args:
      process: gives alpha and sigma.
      keys: the number of keys.
      spread: learn the variance; otherwise it is 0 unless the params have one.
      weighted: learn a log-weight per key, unnormalised; otherwise all are equal unless
        the params have them.
    """

    process: Process
    keys: int
    spread: bool = False
    weighted: bool = False

    @nn.compact
    def __call__(self, x, t, label=None, gates=None, train=False):
        """x [*e], t [] -> the score [*e]. It takes no labels and no gates."""
        if label is not None or gates is not None:
            raise ValueError("exact attention takes no label and no gates")

        def part(name, init, shape, wanted):
            # Whatever the params hold is used: without a weight it is another law.
            if wanted or self.has_variable("params", name):
                return self.param(name, init, shape)
            return jnp.zeros(shape, x.dtype)

        points = part(
            "points", nn.initializers.normal(1.0), (self.keys, *x.shape), True
        )
        variance = part("variance", nn.initializers.ones, (), self.spread)
        log_weights = part(
            "log_weights", nn.initializers.zeros, (self.keys,), self.weighted
        )
        alpha = self.process.alpha(t)
        total = self.process.sigma(t) ** 2 + alpha**2 * variance
        # Differences, because the products of the formula are wrong in float32 as
        # t -> 0. These logits are lower by |x|^2 / (2 A), which softmax ignores.
        gaps = x[None] - alpha * points
        squares = jnp.sum(gaps**2, axis=tuple(range(1, points.ndim)))
        weights = jax.nn.softmax(log_weights - squares / (2 * total))
        mean = jnp.tensordot(weights, points, 1, precision="highest")
        return (alpha * mean - x) / total


def empirical_params(data):
    """The n d params with which Attention(process, n) is the empirical score.

    Args: data [n, *e] float.   Returns: the tree.
    """
    return {"points": jnp.asarray(data)}


def mixture_params(mixture: Mixture):
    """The K d + 1 params with which Attention(process, K) is the mixture's score.

    There are K more if the weights differ.

    Args: mixture, of known numbers.   Returns: the tree.
    Raises: ValueError: components that are not isotropic with one variance.
    """
    if mixture.factors is not None:
        raise ValueError(
            "mixture: low-rank factors: attention is the score of isotropic components "
            "of one variance only, such as those of mixture.separated"
        )
    # One variance for all components and directions: only then is |x|^2 / (2 A), which
    # softmax ignores, the same in all logits.
    variances = np.asarray(mixture.variances)
    if np.any(variances != variances.flat[0]):
        raise ValueError(
            f"mixture: variances from {variances.min()} to {variances.max()}: "
            "attention is the score of isotropic components of one variance only"
        )
    params = {"points": mixture.means, "variance": mixture.variances[0, 0]}
    # Equal weights are what the network has without parameters for them.
    log_weights = np.asarray(mixture.log_weights)
    if np.any(log_weights != log_weights[0]):
        params["log_weights"] = mixture.log_weights
    return params
