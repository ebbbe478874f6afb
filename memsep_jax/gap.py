"""Denoising loss, Fisher divergence and the gap between them (Ye 2025, section 4)."""

import chex
import jax
import jax.numpy as jnp

from memsep_jax import empirical, mixture
from memsep_jax.mixture import Mixture
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


def fisher(score_a: ScoreFn, score_b: ScoreFn, x, t):
    """E || score_a - score_b ||^2 over given points, a Fisher divergence.

    Args: x [m, *e] draws of the law that the expectation is under; t [].   Returns: [].
    """
    return jnp.mean(
        jax.vmap(lambda x: jnp.sum((score_a(x, t) - score_b(x, t)) ** 2))(x)
    )


def loss_gap(truth: Mixture, data, process: Process, t, key, m: int = 2_000):
    """Loss-Gap_t: how much less the empirical score loses than the true score.

    By Proposition 4.1 of Ye 2025 it is Fisher(Phat_t, P_t) for every data set. This is
    the Fisher form: never negative, and of far smaller variance than the difference of
    two losses at large t.

    Args: data [n, d] draws of the truth, t [], m draws of X_t.   Returns: [].
    """
    x, _ = noised(key, data, process, t, m)
    return fisher(mixture.score(truth, process), empirical.score(data, process), x, t)


def saturated(eigenvalues, process: Process, t):
    """E Loss-Gap_t while the noised training points do not overlap.

    sum_j alpha^2 lam_j / (v (v + alpha^2 lam_j)), v = sigma^2: the sharp form of
    Theorem 4.3 of Ye 2025.

    Args: eigenvalues [d] of the components' common covariance, t [].   Returns: [].
    """
    signal, v = process.alpha(t) ** 2 * eigenvalues, process.sigma(t) ** 2
    return jnp.sum(signal / (v * (v + signal)))
