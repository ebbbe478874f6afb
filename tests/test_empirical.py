"""The empirical score is exact: closed forms, its limit, and no trace of chunks."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memsep_jax import data, empirical, mixture, parallel, process

OU = process.ornstein_uhlenbeck()
PROCESSES = {name: make() for name, make in process.PROCESSES.items()}
N = 61  # more than the contenders of a chunk: most are known by the product only
DATA = np.random.default_rng(0).normal(size=(N, 4))
X = np.random.default_rng(1).normal(size=4)

POINTS = np.zeros((3, 2), np.float32)
DENOISE = jax.jit(empirical.denoiser(jnp.float32(DATA), OU, 5))
SCORE = jax.jit(empirical.score(jnp.float32(DATA), OU, 25))
CHUNKED = {  # compiled once, for every order of the data
    chunk: jax.jit(lambda data, x, t, c=chunk: empirical.score(data, OU, c)(x, t))
    for chunk in (7, 40)
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
        jax.jit(empirical.denoiser(data, made, 25))(x, at), mean, rtol=1e-9
    )
    np.testing.assert_allclose(
        jax.jit(empirical.score(data, made, 25))(x, at), score, rtol=1e-9
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


@pytest.mark.parametrize("chunk", [1, 7, 20, 60, 61, 62, 10_000])
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
@given(seed=st.integers(0, 10**6), chunk=st.sampled_from([7, 40]))
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
    data = jnp.float32(DATA).reshape(N, 2, 2, 1)
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


@pytest.mark.parametrize("t", [1e-3, 0.1, 2.0])
def test_entropy_and_largest_weight_are_those_of_the_weights(t, x64):
    found = jax.jit(empirical.posterior(jnp.asarray(DATA), OU, 25))(X, t)
    weights, mean, _ = oracle(DATA, OU, X, t)
    kept = weights[weights > 0]
    np.testing.assert_allclose(found.entropy, -kept @ np.log(kept), atol=1e-9)
    np.testing.assert_allclose(found.largest, weights.max(), rtol=1e-9)
    np.testing.assert_allclose(found.mean, mean, rtol=1e-9)


@pytest.mark.parametrize("t", [1e-2, 0.4, 2.0])
def test_the_density_is_that_of_a_mixture_whose_variances_are_zero(t, x64):
    points, counts = jnp.asarray(DATA), 1.0 + np.arange(N) % 3
    for log_weights in (None, np.log(counts)):
        shares = np.full(N, 1 / N) if log_weights is None else counts / counts.sum()
        truth = mixture.Mixture(jnp.log(shares), points, jnp.zeros(points.shape))
        closed = mixture.log_prob(mixture.diffuse(truth, OU, t), jnp.asarray(X))
        found = jax.jit(empirical.log_prob(points, OU, 25, log_weights))(X, t)
        np.testing.assert_allclose(found, closed, rtol=1e-10)


def test_log_weights_count_a_point_as_often_as_they_say(x64):
    """Twice in the data is log 2 once; any common factor leaves no trace."""
    twice = np.concatenate([DATA, DATA[:20]])
    log_weights = 5 + np.log(1.0 + (np.arange(N) < 20))
    for t in (0.05, 1.0):
        found = jax.jit(empirical.score(DATA, OU, 25, log_weights=log_weights))(X, t)
        np.testing.assert_allclose(found, oracle(twice, OU, X, t)[2], rtol=1e-9)
        weights = empirical.posterior_weights(DATA, OU, X, t, log_weights)
        np.testing.assert_allclose(weights @ DATA, oracle(twice, OU, X, t)[1])


def test_the_label_conditional_form_sees_its_class_only(x64):
    labels = np.arange(N) % 3
    conditional = jax.jit(
        lambda x, t, label: empirical.score(
            DATA, OU, 10, log_weights=empirical.labelled(labels, label)
        )(x, t)
    )
    for label in range(3):
        truth = oracle(DATA[labels == label], OU, X, 0.3)[2]
        np.testing.assert_allclose(conditional(X, 0.3, label), truth, rtol=1e-9)
    assert np.isnan(conditional(X, 0.3, 7)).all()  # traced: not a wrong number
    with pytest.raises(ValueError, match=r"label=7 .* such as \[0, 1, 2\]"):
        empirical.labelled(labels, 7)


@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_the_temperature_divides_the_logits(temperature, x64):
    t = 0.2
    found = jax.jit(empirical.denoiser(DATA, OU, 25, temperature=temperature))(X, t)
    weights = oracle(DATA, OU, X, t)[0] ** (1 / temperature)
    np.testing.assert_allclose(found, weights @ DATA / weights.sum(), rtol=1e-9)
    closed = empirical.jacobian(DATA, OU, jnp.asarray(X), t, temperature=temperature)
    score_fn = empirical.score(DATA, OU, 25, temperature=temperature)
    np.testing.assert_allclose(closed, jax.jit(jax.jacfwd(score_fn))(X, t), rtol=1e-7)


def test_pixels_are_read_as_the_data_room_reads_them():
    pixels = np.random.default_rng(3).integers(0, 256, (40, 3, 3, 1), np.uint8)
    x = np.float32(np.random.default_rng(4).normal(size=(3, 3, 1)))
    for t in (1e-3, 0.5):
        stored = jax.jit(empirical.score(pixels, OU, 30))(x, t)
        floats = jax.jit(empirical.score(data.from_uint8(pixels), OU, 30))(x, t)
        np.testing.assert_allclose(stored, floats, rtol=1e-6)


@pytest.mark.parametrize("n", [61, 64, 3])
def test_four_devices_give_the_sums_of_one(n, x64):
    """Also where the points do not divide evenly, or are fewer than the devices."""
    points, mesh = jnp.asarray(np.resize(DATA, (n, 4))), parallel.make_mesh()
    queries = jnp.asarray(np.random.default_rng(5).normal(size=(6, 4)))
    for t in (1e-2, 1.0):
        split = jax.jit(
            jax.vmap(empirical.posterior(points, OU, 7, mesh=mesh), (0, None))
        )
        found = split(queries, t)
        whole = jax.vmap(empirical.posterior(points, OU), (0, None))(queries, t)
        chex.assert_trees_all_close(found, whole, rtol=1e-9, atol=1e-12)


def test_a_jacobian_vector_product_streams(x64):
    """Forward mode through the scan is the closed form, chunk by chunk."""
    x, u, t = jnp.asarray(X), jnp.arange(4.0), 0.1
    score_fn = empirical.score(DATA, OU, 20)
    pushed = jax.jit(lambda x, u: jax.jvp(lambda x: score_fn(x, t), (x,), (u,))[1])
    closed = empirical.jacobian(DATA, OU, x, t) @ u
    np.testing.assert_allclose(pushed(x, u), closed, rtol=1e-8)


def test_midway_between_images_the_product_is_as_right_as_differences():
    """Against float64 with alpha as float32 has it: its rounding is everyone's."""
    rng = np.random.default_rng(6)
    points = rng.uniform(-1, 1, (200, 3_072)).astype(np.float32)
    pairs = rng.permutation(200)[:40].reshape(20, 2)
    ours = jax.jit(jax.vmap(empirical.denoiser(points, OU), (0, None)))
    direct = jax.jit(
        jax.vmap(
            lambda x, t: empirical.posterior_weights(points, OU, x, t) @ points,
            (0, None),
        )
    )
    for t in np.float32([1e-4, 1e-2]):
        a = float(OU.alpha(t))
        x = np.float32(a * points[pairs].astype(np.float64).mean(axis=1))
        truth = np.stack([oracle(points, OU, one, t)[1] for one in x])
        errors = [
            np.linalg.norm(form(x, t) - truth, axis=1).mean() for form in (ours, direct)
        ]
        assert errors[0] < errors[1]
        near = x + np.float32(OU.sigma(t)) * rng.normal(size=x.shape).astype(np.float32)
        near = near + a * (points[pairs[:, 0]] - x / np.float32(a))
        truth = np.stack([oracle(points, OU, one, t)[1] for one in near])
        np.testing.assert_allclose(ours(near, t), truth, rtol=1e-4, atol=1e-6)


@settings(deadline=None, max_examples=20)
@given(
    log_t=st.floats(-10, 1),
    far=st.sampled_from([0.0, 1.0, 1e3, 1e8]),
    i=st.integers(0, 60),
)
def test_every_query_at_every_noise_level_is_finite(log_t, far, i):
    """sigma down to 1e-5; on a training point, near it, and far outside."""
    x = jnp.float32(DATA[i] + far)
    assert jnp.isfinite(SCORE(x, jnp.float32(10.0**log_t))).all()


def test_memory_does_not_grow_with_batch_times_n():
    """Temporaries of the compiled program, from XLA's own accounting."""
    points = jax.ShapeDtypeStruct((4_096, 8), jnp.float32)
    queries = jax.ShapeDtypeStruct((512, 8), jnp.float32)

    def temporaries(chunk):
        compiled = (
            jax.jit(
                lambda d, x: jax.vmap(empirical.score(d, OU, chunk), (0, None))(x, 0.1)
            )
            .lower(points, queries)
            .compile()
        )
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(64) < 4_096 * 512 * 4 / 4 < temporaries(4_096)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: empirical.score(np.zeros((0, 2), np.float32), OU), "n=0"),
        (lambda: empirical.score(POINTS, OU, chunk=0), "chunks of 0"),
        (lambda: empirical.score(POINTS, OU)(np.zeros(3, np.float32), 1.0), r"\(3,\)"),
        (lambda: empirical.score(POINTS, OU)(POINTS, 1.0), "jax.vmap"),
        (lambda: empirical.score(POINTS, OU)(POINTS[0], 0.0), "t=0.0 must be positive"),
        (
            lambda: empirical.score(POINTS, OU)(POINTS[0], -1.0),
            "t=-1.0 must be positive",
        ),
        (lambda: empirical.score(POINTS, OU)(np.arange(2), 1.0), "dtype int"),
        (lambda: empirical.score(POINTS, OU)(jnp.bfloat16([0, 1]), 1.0), "bfloat16"),
        (lambda: empirical.score(POINTS / 0, OU), "NaN or infinity"),
        (lambda: empirical.score(np.zeros((3, 2), int), OU), "dtype int"),
        (
            lambda: empirical.score(POINTS, OU, log_weights=np.zeros(2)),
            r"\(2,\) for n=3",
        ),
        (lambda: empirical.score(POINTS, OU, temperature=0.0), "temperature=0.0"),
        (lambda: empirical.posterior_weights(POINTS, OU, POINTS[0], 0.0), "t=0.0"),
    ],
)
@pytest.mark.filterwarnings("ignore:(divide|invalid)")
def test_what_has_no_meaning_is_refused_before_it_is_compiled(make, message):
    with pytest.raises(ValueError, match=message):
        make()
