"""The known truth has the density, score, diffused law and samples of its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memsep_jax import mixture, process

OU = process.ornstein_uhlenbeck()
PROCESSES = {name: make() for name, make in process.PROCESSES.items()}


def uneven():
    """Two components of different weight, mean and variances, in the plane."""
    return mixture.Mixture(
        jnp.log(jnp.array([0.3, 0.7])),
        jnp.array([[1.0, -2.0], [0.5, 3.0]]),
        jnp.array([[0.5, 2.0], [1.5, 0.2]]),
    )


def densities(truth, x):
    """w_k N(x; mu_k, S_k) in NumPy."""
    weights, means, variances = np.exp(truth[0]), *map(np.asarray, truth[1:])
    exponents = np.sum((x - means) ** 2 / variances, axis=1) / 2
    return weights * np.exp(-exponents) / np.sqrt(np.prod(2 * np.pi * variances, 1))


def test_log_prob_is_the_log_of_the_sum_of_densities(x64):
    truth, x = uneven(), np.array([0.2, 1.1])
    np.testing.assert_allclose(
        mixture.log_prob(truth, jnp.asarray(x)),
        np.log(densities(truth, x).sum()),
        rtol=1e-13,
    )


def test_log_prob_is_finite_far_from_every_component():
    far = jnp.array([1e4, -1e4])
    assert jnp.isfinite(mixture.log_prob(uneven(), far))


def test_the_density_integrates_to_one(x64):
    truth = mixture.Mixture(
        jnp.log(jnp.array([0.2, 0.8])),
        jnp.array([[-2.0], [1.0]]),
        jnp.array([[0.3], [2.0]]),
    )
    x = jnp.linspace(-20, 20, 4_001)
    log_prob = jax.jit(jax.vmap(lambda x: mixture.log_prob(truth, x[None])))(x)
    assert float(jnp.sum(jnp.exp(log_prob)) * 0.01) == pytest.approx(1, abs=1e-10)


@pytest.mark.parametrize("t", [1e-3, 0.3, 0.9])
@pytest.mark.parametrize("name", PROCESSES)
def test_the_score_is_the_posterior_mean_of_the_component_scores(name, t, x64):
    """sum_k r_k(x) (alpha mu_k - x) / (alpha^2 s_k + sigma^2)."""
    made, truth, x = PROCESSES[name], uneven(), np.array([0.7, -0.4])
    a, v = float(made.alpha(jnp.asarray(t))), float(made.sigma(jnp.asarray(t))) ** 2
    means, variances = a * np.asarray(truth.means), a**2 * truth.variances + v
    shares = densities(mixture.Mixture(truth.log_weights, means, variances), x)
    shares /= shares.sum()
    closed = np.sum(shares[:, None] * (means - x) / np.asarray(variances), axis=0)
    found = jax.jit(mixture.score(truth, made))(jnp.asarray(x), jnp.asarray(t))
    np.testing.assert_allclose(found, closed, rtol=1e-10)


@pytest.mark.parametrize("name", PROCESSES)
def test_one_gaussian_diffuses_to_one_gaussian(name, x64):
    """N(mu, S) -> N(alpha mu, alpha^2 S + sigma^2)."""
    made, t = PROCESSES[name], jnp.asarray(0.6)
    one = mixture.Mixture(*(leaf[:1] for leaf in uneven()))
    law = mixture.diffuse(one, made, t)
    a, v = made.alpha(t), made.sigma(t) ** 2
    np.testing.assert_allclose(law.means, a * one.means, rtol=1e-14)
    np.testing.assert_allclose(law.variances, a**2 * one.variances + v, rtol=1e-14)


def test_diffusing_twice_is_diffusing_once(x64):
    """The OU process is Markov: 0.2 and then 0.5 is 0.7."""
    s, t = jnp.asarray(0.2), jnp.asarray(0.5)
    twice = mixture.diffuse(mixture.diffuse(uneven(), OU, s), OU, t)
    once = mixture.diffuse(uneven(), OU, s + t)
    np.testing.assert_allclose(twice.means, once.means, rtol=1e-13)
    np.testing.assert_allclose(twice.variances, once.variances, rtol=1e-13)


def test_samples_have_the_mean_and_covariance_of_the_mixture(key):
    truth, n = uneven(), 20_000
    x = np.asarray(mixture.sample(key, truth, n), np.float64)
    weights, means, variances = (np.asarray(a, np.float64) for a in truth)
    weights = np.exp(weights)
    mean = weights @ means
    gaps = means - mean
    covariance = np.einsum("k,ki,kj->ij", weights, gaps, gaps) + np.diag(
        weights @ variances
    )
    assert np.all(abs(x.mean(0) - mean) < 4 * np.sqrt(np.diag(covariance) / n))
    products = np.einsum("ni,nj->nij", x - mean, x - mean)
    error = products.std(axis=0) / np.sqrt(n)
    assert np.all(abs(products.mean(axis=0) - covariance) < 4 * error)


def test_samples_choose_components_by_weight(key):
    far = uneven()._replace(means=jnp.array([[-50.0, 0.0], [50.0, 0.0]]))
    n = 10_000
    share = float(jnp.mean(mixture.sample(key, far, n)[:, 0] < 0))
    assert abs(share - 0.3) < 4 * np.sqrt(0.3 * 0.7 / n)


def test_separated_means_have_the_papers_scale(key):
    truth = mixture.separated(key, 1_000, 32)
    assert abs(jnp.mean(truth.means**2) - 4) < 4 * 4 * np.sqrt(2 / 32_000)
    np.testing.assert_allclose(jnp.sum(jnp.exp(truth.log_weights)), 1, rtol=1e-5)
    assert jnp.all(truth.variances == 1)


def test_the_score_of_samples_has_mean_zero(key):
    """E grad log p = 0 (Stein)."""
    truth, t = uneven(), jnp.float32(0.2)
    x = mixture.sample(key, mixture.diffuse(truth, OU, t), 10_000)
    scores = np.asarray(jax.jit(jax.vmap(mixture.score(truth, OU), (0, None)))(x, t))
    assert np.all(abs(scores.mean(0)) < 4 * scores.std(0) / 100)


def test_a_mixture_of_nothing_is_refused(key):
    with pytest.raises(ValueError, match="k=0"):
        mixture.separated(key, 0, 2)
    with pytest.raises(AssertionError):
        mixture.log_prob(uneven(), jnp.zeros(3))
