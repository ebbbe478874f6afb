"""What a network learns to predict, and the loss of one example.

An objective maps (x0 [*e], t [], eps [*e]) to a `Target`: the noisy point that the
network sees, and the clean point and noise that its prediction is compared with.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from memsep_jax.process import Process, noise_to_signal, perturb
from memsep_jax.score import Prediction, noise, target


class Target(NamedTuple):
    """What a network sees at a time t, and what its answer is compared with."""

    x: jax.Array  # [*e] noisy point: alpha(t) x0 + sigma(t) eps
    x0: jax.Array  # [*e] the clean point
    eps: jax.Array  # [*e] the noise
    weight: jax.Array | float = 1.0  # [] of the squared error


Question = Target  # its earlier name, for scripts that were written with it


def prediction_loss(
    network,
    prediction: Prediction,
    process: Process,
    x0,
    t,
    eps,
    objective: Callable[..., Target] | None = None,
):
    """Weighted mean square of F(scale X_t, level) - target, for one example.

    Args:
      network: (x [*e], level []) -> [*e].   x0 [*e], t [], eps [*e].
      objective: (x0, t, eps) -> Target; None: `clean`.
    Returns: [].
    """
    seen = (objective or clean(process))(x0, t, eps)
    # The error is that of F, not of D: out(t), which is huge or tiny at the ends of the
    # noise levels, stays out of the loss, and `weight` alone weighs them.
    answer = network(prediction.scale(t) * seen.x, prediction.level(t))
    error = answer - target(prediction, process, seen.x0, t, seen.eps)
    return seen.weight * prediction.weight(t) * jnp.mean(error**2)


def noise_loss(apply, params, process: Process, x0, t, eps):
    """|| apply(params, X_t, t) - eps ||^2 / d, the eps-loss of one example.

    It is the `prediction_loss` of the noise, for a network that is given t itself.

    Args: x0 [*e], t [], eps [*e].   Returns: [].   Source: Ho 2020, eq. 14.
    """
    # Ho 2020 gives the network t; `score.noise` gives it the logarithm of the noise.
    prediction = noise(process)._replace(level=lambda t: t)
    return prediction_loss(partial(apply, params), prediction, process, x0, t, eps)


def clean(process: Process):
    """The training point behind X_t; the empirical E[X_0 | X_t] predicts it best."""
    return lambda x0, t, eps: Target(perturb(process, x0, t, eps), x0, eps)


def smoothed(process: Process, denoise):
    """A mean of training points in place of the one behind X_t.

    With the empirical denoiser at temperature T, the loss is least at the score of a
    smoothed law instead of the empirical score (Chen 2025, Zhou 2026). At T = 1 its
    minimum is that of `clean`, reached with less noise.

    Args: denoise, (x [*e], t []) -> [*e], such as `empirical.denoiser`.
    """

    def objective(x0, t, eps):
        x = perturb(process, x0, t, eps)
        mean = denoise(x, t)
        # (x - alpha mean) / sigma, without its cancellation: exactly eps where the mean
        # is x0, at every sigma.
        noise = eps + (x0 - mean) / noise_to_signal(process, t)
        return Target(x, mean, noise)

    return objective


def ambient(process: Process, t_n: float, key):
    """Beyond the time t_n, one noisy copy of each training point, never the point.

    With s = sigma / alpha and r = s(t_n)^2 / s(t)^2, the network sees noise added to
    y = x0 + s(t_n) z, and D is trained by || (1 - r) D + r X_t / alpha - y ||^2. Over
    fresh z that is least at E[X_0 | X_t]; but a point always has the same z, a function
    of its bits: the same where it is twice in the data, another where it is mirrored.

    Source: Daras 2024 (arXiv 2404.10177), ambient denoising score matching; Shah 2025.
    """
    s_n = noise_to_signal(process, jnp.asarray(float(t_n)))

    def objective(x0, t, eps):
        root = s_n / noise_to_signal(process, t)  # of r
        # Up to t_n this is `clean`. The quotient is compared, not the times: so 1 - r
        # is never 0.
        root = jnp.where(root < 1, root, 0.0)
        s_y, kept = jnp.where(root > 0, s_n, 0.0), (1 - root) * (1 + root)
        y = x0 + s_y * jax.random.normal(_key_of(key, x0), x0.shape, x0.dtype)
        # || ... || = (1 - r) || D - (y - r X_t / alpha) / (1 - r) ||, as x0 + s eps.
        noise = eps / jnp.sqrt(kept)
        x = perturb(process, y, t, jnp.sqrt(kept) * eps)
        return Target(x, y - s_y * root * noise, noise, kept**2)

    return objective


def _key_of(key, x):
    """A key that is a function of the bits of x [*e]."""
    # A hash of the point, because a loss sees no index of it, and because copies of a
    # point must have the same noise, or their mean would reveal it.
    words = jax.lax.bitcast_convert_type(x, jnp.uint32).reshape(-1)
    # With its place (times 2^32 over the golden ratio), because the sum below does not
    # see the order of words: a mirror image has another key.
    words ^= jnp.arange(words.size, dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # MurmurHash3's fmix32
        words = (words ^ (words >> shift)) * jnp.uint32(factor)
    return jax.random.fold_in(key, jnp.sum(words ^ (words >> 16), dtype=jnp.uint32))
