"""The known truth: Gaussian mixtures, their diffused law, density and score."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp

from memsep_jax.process import Process


class Mixture(NamedTuple):
    """sum_k w_k N(means[k], diag(variances[k])) on vectors."""

    log_weights: jax.Array  # [k], logsumexp = 0
    means: jax.Array  # [k, d]
    variances: jax.Array  # [k, d]


def separated(key, k: int, d: int, scale: float = 2.0) -> Mixture:
    """Equal weights, means ~ N(0, scale^2 I), unit variances (Ye 2025, section 6)."""
    if k < 1 or d < 1:
        raise ValueError(f"mixture: k={k} components in d={d} dimensions: both >= 1")
    return Mixture(
        jnp.full((k,), -jnp.log(k)),
        scale * jax.random.normal(key, (k, d)),
        jnp.ones((k, d)),
    )


def diffuse(mixture: Mixture, process: Process, t) -> Mixture:
    """The law P_t of X_t when X_0 follows the mixture.   t []."""
    alpha, sigma = process.alpha(t), process.sigma(t)
    return Mixture(
        mixture.log_weights,
        alpha * mixture.means,
        alpha**2 * mixture.variances + sigma**2,
    )


def log_prob(mixture: Mixture, x):
    """log p(x).   x [d] -> []."""
    chex.assert_equal_shape([mixture.means[0], x])
    gaps = x[None] - mixture.means
    exponents = gaps**2 / mixture.variances + jnp.log(2 * jnp.pi * mixture.variances)
    return logsumexp(mixture.log_weights - jnp.sum(exponents, axis=1) / 2)


def score(mixture: Mixture, process: Process):
    """grad log p_t, the score of the truth, as score_fn(x [d], t []) -> [d]."""
    return lambda x, t: jax.grad(log_prob, argnums=1)(diffuse(mixture, process, t), x)


def sample(key, mixture: Mixture, n: int):
    """n independent draws.   Returns: [n, d]."""
    choice_key, noise_key = jax.random.split(key)
    k = jax.random.categorical(choice_key, mixture.log_weights, shape=(n,))
    eps = jax.random.normal(noise_key, (n, mixture.means.shape[1]))
    return mixture.means[k] + jnp.sqrt(mixture.variances[k]) * eps
