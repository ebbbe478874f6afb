"""The denoising loss, and the noise it is taken over (Ye 2025, section 4)."""

import chex
import jax
import jax.numpy as jnp

from memsep_jax.process import Process, perturb
from memsep_jax.score import ScoreFn


def noised(key, data, process: Process, t, m: int):
    """m draws of X_t from the empirical law Phat_t, with the noise of each.

    Args: data [n, *e], t [].   Returns: x [m, *e], eps [m, *e].
    """
    if m < 1 or len(data) < 1:
        raise ValueError(f"noised: m={m} draws from n={len(data)} points: both >= 1")
    choice_key, eps_key = jax.random.split(key)
    x0 = data[jax.random.randint(choice_key, (m,), 0, len(data))]
    eps = jax.random.normal(eps_key, x0.shape, x0.dtype)
    return perturb(process, x0, t, eps), eps


def eps_loss(score_fn: ScoreFn, process: Process, x0, t, eps):
    """|| sigma s(X_t, t) + eps ||^2 / d of one example, the eps-loss of any score.

    Args: x0 [*e], t [], eps [*e].   Returns: [].
    """
    x = perturb(process, x0, t, eps)
    return jnp.mean((process.sigma(t) * score_fn(x, t) + eps) ** 2)


def denoising_loss(score_fn: ScoreFn, x, eps, process: Process, t):
    """E || -eps/sigma - s(X_t, t) ||^2, the DSM loss at t in units of the score.

    Args: x [m, *e], eps [m, *e] as `noised` gives them; t [].
    Returns: [].   Source: Ye 2025, section 3 (sigma^2 times this is the eps-loss).
    """
    chex.assert_equal_shape([x, eps])

    def error(x, eps):
        return jnp.sum((-eps / process.sigma(t) - score_fn(x, t)) ** 2)

    return jnp.mean(jax.vmap(error)(x, eps))
