"""The noised training set Phat_t: weights, denoiser, score, Jacobian.

The empirical score is the global minimiser of the training loss; a network that
reaches it copies the training set. All sums stream over the data in chunks with a
running maximum, so they are exact for every chunk size and finite at every sigma.
"""

import chex
import jax
import jax.numpy as jnp

from memsep_jax.process import Process
from memsep_jax.score import ScoreFn


def posterior_weights(data, process: Process, x, t):
    """p(X_0 = data[i] | X_t = x): how much each training point explains x.

    Args: data [n, *e], x [*e], t [].   Returns: [n] weights, summing to 1.
    """
    chex.assert_equal_shape([data[0], x])
    return jax.nn.softmax(_logits(data, process, x, t))


def denoiser(data, process: Process, chunk: int = 4_096):
    """E[X_0 | X_t = x] under the empirical law, the theoretical optimum (Gu 2023, 2).

    Args:
      data: [n, *e] training points.
      chunk: points looked at together; the value does not depend on it.
    Returns:
      (x [*e], t []) -> [*e], a convex combination of training points.
    """
    if len(data) < 1 or chunk < 1:
        raise ValueError(
            f"empirical: n={len(data)} points in chunks of {chunk}: both >= 1"
        )
    blocks, filled = _blocks(data, chunk)

    def denoise(x, t):
        chex.assert_equal_shape([data[0], x])

        def body(carry, block):
            top, total, mean = carry
            points, real = block
            logits = jnp.where(real, _logits(points, process, x, t), -jnp.inf)
            new_top = jnp.maximum(top, jnp.max(logits))
            weights, kept = jnp.exp(logits - new_top), jnp.exp(top - new_top)
            moved = jnp.tensordot(weights, points, 1, precision="highest")
            return (new_top, kept * total + jnp.sum(weights), kept * mean + moved), None

        # Not -inf: inf - inf is nan where the first block's weights underflow.
        lowest = jnp.finfo(x.dtype).min
        start = (
            jnp.asarray(lowest, x.dtype),
            jnp.zeros((), x.dtype),
            jnp.zeros_like(x),
        )
        (_, total, mean), _ = jax.lax.scan(body, start, (blocks, filled))
        return mean / total

    return denoise


def score(data, process: Process, chunk: int = 4_096) -> ScoreFn:
    """The empirical score -(1/sigma^2) sum_i w_i (x - alpha x_i) (Ye 2025, section 3).

    Args: as `denoiser`.   Returns: score_fn(x [*e], t []) -> [*e].
    """
    denoise = denoiser(data, process, chunk)

    def score_fn(x, t):
        return (process.alpha(t) * denoise(x, t) - x) / process.sigma(t) ** 2

    return score_fn


def jacobian(data, process: Process, x, t):
    """d score / d x = -I/v + (alpha/v)^2 Cov_w(x_i), v = sigma^2 (Ye 2025, section 5).

    Args: data [n, *e], x [*e], t [].   Returns: [d, d], d the size of x.
    """
    weights = posterior_weights(data, process, x, t)
    points = data.reshape(len(data), -1)
    mean = jnp.tensordot(weights, points, 1, precision="highest")
    centred = points - mean[None]
    covariance = jnp.matmul(
        (weights[:, None] * centred).T, centred, precision="highest"
    )
    v = process.sigma(t) ** 2
    return -jnp.eye(x.size) / v + (process.alpha(t) / v) ** 2 * covariance


def _logits(points, process, x, t):
    # Differences, not |x|^2 - 2 x.y + |y|^2: that form is wrong in float32 as t -> 0.
    gaps = x[None] - process.alpha(t) * points
    squares = jnp.sum(gaps**2, axis=tuple(range(1, points.ndim)))
    return -squares / (2 * process.sigma(t) ** 2)


def _blocks(data, chunk):
    """data [n, *e] -> blocks [b, chunk, *e] and which rows are real [b, chunk]."""
    n = len(data)
    chunk = min(chunk, n)
    short = -n % chunk
    padding = [(0, short)] + [(0, 0)] * (data.ndim - 1)
    blocks = jnp.pad(jnp.asarray(data), padding).reshape(-1, chunk, *data.shape[1:])
    return blocks, (jnp.arange(n + short) < n).reshape(-1, chunk)
