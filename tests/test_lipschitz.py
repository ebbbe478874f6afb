"""Spectral norms against closed forms: two points, one Gaussian, the paper's bounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memsep_jax import empirical, lipschitz, mixture, process

OU = process.ornstein_uhlenbeck()
POINTS = jnp.array([[0.0, 0.0, 0.0], [1.0, 2.0, 2.0]])  # 3 apart


@pytest.mark.parametrize("t", [0.02, 0.3, 2.0])
def test_midway_between_two_points_the_norm_is_two_point(t, x64, key):
    points = jnp.asarray(POINTS, jnp.float64)
    score_fn = empirical.score(points, OU)
    x = OU.alpha(t) * lipschitz.midpoints(points, 5)[0]
    truth = lipschitz.two_point(3.0, OU, t)
    exact = jax.jit(lambda x: lipschitz.exact_norm(score_fn, x, t))(x)
    power = jax.jit(lambda x: lipschitz.jacobian_norm(score_fn, x, t, key))(x)
    np.testing.assert_allclose(exact, truth, rtol=1e-10)
    np.testing.assert_allclose(power, truth, rtol=1e-6)


@pytest.mark.parametrize("t", [0.01, 1.0])
def test_one_gaussian_is_as_steep_as_its_narrowest_direction(t, x64, key):
    """1 / (v + a^2 lam_min), everywhere."""
    variances = jnp.array([[0.2, 0.9, 4.0]])
    truth = mixture.Mixture(jnp.zeros(1), jnp.ones((1, 3)), variances)
    score_fn = mixture.score(truth, OU)
    closed = 1 / (OU.sigma(t) ** 2 + OU.alpha(t) ** 2 * 0.2)
    x = jnp.array([0.3, -2.0, 1.0])
    np.testing.assert_allclose(lipschitz.exact_norm(score_fn, x, t), closed, rtol=1e-10)
    got = jax.jit(lambda xs: lipschitz.local(score_fn, xs, t, key, 200))(x[None])
    np.testing.assert_allclose(got, closed, rtol=1e-6)


def test_power_iteration_is_the_exact_norm_of_any_field(x64, key):
    matrix = jax.random.normal(key, (4, 4))  # not symmetric

    def field(x, t):
        return t * (matrix @ x) + jnp.sin(x)

    x = jnp.linspace(-1.0, 1.0, 4)
    power = lipschitz.jacobian_norm(field, x, 2.0, key, iters=500)
    np.testing.assert_allclose(power, lipschitz.exact_norm(field, x, 2.0), rtol=1e-8)
    fewer = lipschitz.jacobian_norm(field, x, 2.0, key, iters=2)
    assert fewer <= power * (1 + 1e-12)  # a lower bound that grows


@pytest.mark.parametrize("t", [0.005, 0.05, 0.5])
def test_the_bounds_of_the_paper_hold_where_the_score_is_probed(t, x64, key):
    data = 3 * jax.random.normal(key, (12, 2))
    low, high = lipschitz.empirical_bounds(data, OU, t)
    score_fn = empirical.score(data, OU)
    a = OU.alpha(t)
    grid = jnp.linspace(-6.0, 6.0, 25)
    probes = jnp.stack(jnp.meshgrid(grid, grid), axis=-1).reshape(-1, 2)
    probes = jnp.concatenate([probes, a * lipschitz.midpoints(data, 66)])
    norms = jax.jit(jax.vmap(lambda x: lipschitz.exact_norm(score_fn, x, t)))(probes)
    assert low <= norms.max() * (1 + 1e-9) and norms.max() <= high * (1 + 1e-9)
    assert norms.max() >= 1 / OU.sigma(t) ** 2 * (1 - 1e-9)


def test_the_explosion_is_between_the_points_and_not_at_them(x64, key):
    """sigma^-4 at midpoints; 1/v in the median at noised training points."""
    data = 3 * jax.random.normal(key, (20, 4))
    score_fn = empirical.score(data, OU)
    scaled = []
    for t in (1e-2, 1e-3):
        v = OU.sigma(t) ** 2
        probe = OU.alpha(t) * lipschitz.midpoints(data, 1)
        scaled.append(v**2 * lipschitz.local(score_fn, probe, t, key))
        eps = jax.random.normal(key, data.shape)
        noised = process.perturb(OU, data, t, eps)
        at = jax.vmap(lambda x, t=t: lipschitz.exact_norm(score_fn, x, t))(noised)
        np.testing.assert_allclose(jnp.median(at) * v, 1, rtol=1e-6)
    np.testing.assert_allclose(scaled[1], scaled[0], rtol=0.05)


def test_midpoints_are_those_of_the_closest_pairs():
    data = jnp.array([[0.0], [1.0], [5.0], [5.5]])
    np.testing.assert_allclose(lipschitz.midpoints(data, 2), [[5.25], [0.5]])
    assert lipschitz.midpoints(data, 100).shape == (6, 1)


def test_what_has_no_meaning_is_refused(key):
    with pytest.raises(ValueError, match="iters=0"):
        lipschitz.jacobian_norm(lambda x, t: x, jnp.ones(2), 0.1, key, iters=0)
    with pytest.raises(ValueError, match="n >= 2"):
        lipschitz.midpoints(jnp.ones((1, 2)), 1)
    with pytest.raises(ValueError, match="n=1 points"):
        lipschitz.empirical_bounds(jnp.ones((1, 2)), OU, 0.1)
