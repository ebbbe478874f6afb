"""The empirical score is exact: closed forms, its limit, and no trace of chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memsep_jax import empirical, mixture, process

OU = process.ornstein_uhlenbeck()
PROCESSES = {name: make() for name, make in process.PROCESSES.items()}
DATA = np.random.default_rng(0).normal(size=(13, 4))
X = np.random.default_rng(1).normal(size=4)

DENOISE = jax.jit(empirical.denoiser(jnp.float32(DATA), OU, 5))
CHUNKED = {  # compiled once, for every order of the data
    chunk: jax.jit(lambda data, x, t, c=chunk: empirical.score(data, OU, c)(x, t))
    for chunk in (2, 7)
}


def oracle(data, made, x, t):
    """Weights, denoiser and score in float64 NumPy."""
    data, x = np.asarray(data, np.float64), np.asarray(x, np.float64)
    a, v = float(made.alpha(jnp.asarray(t))), float(made.sigma(jnp.asarray(t))) ** 2
    flat = (x - a * data).reshape(len(data), -1)
    logits = -np.sum(flat**2, axis=1) / (2 * v)
    weights = np.exp(logits - logits.max())
    weights /= weights.sum()
    mean = np.tensordot(weights, data, 1)
    return weights, mean, (a * mean - x) / v


@pytest.mark.parametrize("t", [1e-3, 0.1, 2.0])
def test_two_points_give_a_tanh(t, x64):
    """Data {-b, b}: score(x) = (a b tanh(a b x / v) - x) / v."""
    b, x = 1.5, jnp.array([0.3])
    a, v = OU.alpha(t), OU.sigma(t) ** 2
    truth = (a * b * jnp.tanh(a * b * x / v) - x) / v
    found = jax.jit(empirical.score(jnp.array([[-b], [b]]), OU))(x, t)
    np.testing.assert_allclose(found, truth, rtol=1e-12)


@pytest.mark.parametrize("t", [1e-3, 0.2, 0.95])
@pytest.mark.parametrize("name", PROCESSES)
def test_weights_denoiser_and_score_are_those_of_numpy(name, t, x64):
    made, data, x = PROCESSES[name], jnp.asarray(DATA), jnp.asarray(X)
    weights, mean, score = oracle(DATA, made, X, t)
    at = jnp.asarray(t)
    found = empirical.posterior_weights(data, made, x, at)
    np.testing.assert_allclose(found, weights, rtol=1e-8, atol=1e-300)
    np.testing.assert_allclose(found.sum(), 1, rtol=1e-14)
    np.testing.assert_allclose(
        jax.jit(empirical.denoiser(data, made, 5))(x, at), mean, rtol=1e-9
    )
    np.testing.assert_allclose(
        jax.jit(empirical.score(data, made, 5))(x, at), score, rtol=1e-9
    )


def test_float32_keeps_its_digits_where_the_noise_is_small():
    """Two images 2e-4 apart per pixel: |x|^2 - 2 x.y + |y|^2 would not see it."""
    rng = np.random.default_rng(2)
    first = rng.uniform(-1, 1, (32, 32, 3)).astype(np.float32)
    data = np.stack([first, first + np.float32(2e-4)])
    x = first + np.float32(8e-5)
    t = np.float32(1e-4)
    truth, mean, _ = oracle(data, process.variance_exploding(), x, t * 40)
    made, at = process.variance_exploding(), jnp.float32(t * 40)
    found = empirical.posterior_weights(jnp.asarray(data), made, jnp.asarray(x), at)
    assert 0.55 < truth[0] < 0.9  # the case is not degenerate
    np.testing.assert_allclose(found, truth, rtol=1e-3)
    denoised = empirical.denoiser(jnp.asarray(data), made)(jnp.asarray(x), at)
    np.testing.assert_allclose(denoised, mean, rtol=1e-5, atol=1e-6)


def test_the_score_is_that_of_a_mixture_whose_variances_are_zero(x64):
    points = jnp.asarray(DATA)
    n, d = points.shape
    truth = mixture.Mixture(jnp.full(n, -jnp.log(n)), points, jnp.zeros((n, d)))
    x, t = jnp.asarray(X), jnp.asarray(0.4)
    np.testing.assert_allclose(
        jax.jit(empirical.score(points, OU))(x, t),
        jax.jit(mixture.score(truth, OU))(x, t),
        rtol=1e-10,
    )


@pytest.mark.parametrize("chunk", [1, 2, 5, 12, 13, 14, 10_000])
def test_the_chunk_size_leaves_no_trace(chunk, x64):
    data, x, t = jnp.asarray(DATA), jnp.asarray(X), jnp.asarray(0.05)
    found = jax.jit(empirical.score(data, OU, chunk))(x, t)
    np.testing.assert_allclose(found, oracle(DATA, OU, X, 0.05)[2], rtol=1e-11)


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_chunks_whose_weights_underflow_do_no_harm(chunk):
    """The first chunk is hopeless, or the last, and sigma is tiny."""
    data = jnp.array([[100.0], [0.0], [-100.0], [1.0]])
    made, t = process.variance_exploding(), jnp.float32(1e-3)
    for nearest in range(4):
        order = jnp.roll(jnp.arange(4), nearest)
        denoise = jax.jit(empirical.denoiser(data[order], made, chunk))
        np.testing.assert_array_equal(denoise(jnp.array([0.001]), t), [0.0])


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**6), chunk=st.sampled_from([2, 7]))
def test_the_order_of_the_data_leaves_no_trace(seed, chunk):
    order = np.random.default_rng(seed).permutation(len(DATA))
    data, x, t = jnp.float32(DATA), jnp.float32(X), jnp.float32(0.3)
    one, other = CHUNKED[chunk](data, x, t), CHUNKED[chunk](data[order], x, t)
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**6), log_t=st.floats(-8, 4))
def test_the_denoiser_stays_inside_the_hull_of_the_data(seed, log_t):
    """A convex combination: no coordinate leaves the range of the data, at any t."""
    x = jnp.float32(10 * np.random.default_rng(seed).normal(size=4))
    found = DENOISE(x, jnp.float32(10.0**log_t))
    assert jnp.all(found <= DATA.max(0) + 1e-5)
    assert jnp.all(found >= DATA.min(0) - 1e-5)


def test_one_point_is_the_denoiser_everywhere(x64):
    """n = 1: D = x_1 and score = (alpha x_1 - x) / sigma^2."""
    point, x, t = jnp.asarray(DATA[:1]), jnp.asarray(X), jnp.asarray(0.7)
    np.testing.assert_array_equal(empirical.denoiser(point, OU)(x, t), point[0])
    closed = (OU.alpha(t) * point[0] - x) / OU.sigma(t) ** 2
    np.testing.assert_allclose(empirical.score(point, OU)(x, t), closed, rtol=1e-14)


def test_at_large_t_the_denoiser_is_the_mean(x64):
    denoise = empirical.denoiser(jnp.asarray(DATA), OU)
    np.testing.assert_allclose(
        denoise(jnp.asarray(X), jnp.asarray(60.0)), DATA.mean(0), atol=1e-10
    )


def test_duplicates_count_as_often_as_they_occur(x64):
    twice = jnp.array([[0.0], [1.0], [1.0]])
    t = jnp.asarray(60.0)
    np.testing.assert_allclose(
        empirical.denoiser(twice, OU)(jnp.array([0.2]), t), [2 / 3], rtol=1e-10
    )


def test_images_are_vectors_in_another_shape():
    data = jnp.float32(DATA).reshape(13, 2, 2, 1)
    t = jnp.float32(0.2)
    flat = empirical.score(jnp.float32(DATA), OU, 4)(jnp.float32(X), t)
    shaped = empirical.score(data, OU, 4)(jnp.float32(X).reshape(2, 2, 1), t)
    np.testing.assert_allclose(shaped.ravel(), flat, rtol=1e-5)


@pytest.mark.parametrize("t", [0.05, 0.5, 3.0])
def test_the_jacobian_is_the_derivative_of_the_score(t, x64):
    data, x, t = jnp.asarray(DATA), jnp.asarray(X), jnp.asarray(t)
    by_autodiff = jax.jit(jax.jacfwd(empirical.score(data, OU, 5)))(x, t)
    closed = empirical.jacobian(data, OU, x, t)
    np.testing.assert_allclose(closed, by_autodiff, rtol=1e-8, atol=1e-9)


def test_midway_between_two_points_the_jacobian_explodes(x64):
    """Eigenvalues a^2 D^2 / (4 v^2) - 1/v along the segment, -1/v across it."""
    points = jnp.array([[1.0, 0.0, 2.0], [-1.0, 2.0, 1.0]])
    t = jnp.asarray(0.01)
    a, v = float(OU.alpha(t)), float(OU.sigma(t)) ** 2
    found = empirical.jacobian(points, OU, a * points.mean(0), t)
    top = a**2 * 9 / (4 * v**2) - 1 / v  # D^2 = 4 + 4 + 1
    np.testing.assert_allclose(
        np.linalg.eigvalsh(found), [-1 / v, -1 / v, top], rtol=1e-10
    )


def test_nothing_to_learn_from_is_refused():
    with pytest.raises(ValueError, match="n=0"):
        empirical.score(jnp.zeros((0, 2)), OU)
    with pytest.raises(ValueError, match="chunks of 0"):
        empirical.score(jnp.zeros((3, 2)), OU, chunk=0)
    with pytest.raises(AssertionError):
        empirical.score(jnp.zeros((3, 2)), OU)(jnp.zeros(3), jnp.float32(1))
