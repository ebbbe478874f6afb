"""The empirical score is exact: closed forms, its limit, and no trace of chunks."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import (
    FEW,
    OU,
    OU_FORMULA,
    SCALES,
    SEEDS,
    SLOW_32,
    VE,
    D,
    T,
    alike,
    check_slopes,
    close,
    density,
    drawn,
    posterior,
    turned,
)

from memsep_jax import data, empirical, mixture, parallel, process

N = 61  # more than the contenders of a chunk: most are known by the product only
DATA = np.random.default_rng(0).normal(size=(N, 4))
X = np.random.default_rng(1).normal(size=4)

POINTS = np.zeros((3, 2), np.float32)
DENOISE = jax.jit(empirical.denoiser(jnp.float32(DATA), OU, 5))
SCORE = jax.jit(empirical.score(jnp.float32(DATA), OU, 25))


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


def test_two_points_give_a_tanh(x64):
    """Data {-b, b}: score(x) = (a b tanh(a b x / v) - x) / v."""
    b, x = 1.5, np.array([0.3])
    score_fn = jax.jit(empirical.score(np.array([[-b], [b]]), OU))
    for t in (1e-3, 0.1, 2.0):
        a, v = OU_FORMULA.alpha(t), -np.expm1(-t)
        truth = (a * b * np.tanh(a * b * x / v) - x) / v
        np.testing.assert_allclose(score_fn(x, t), truth, rtol=1e-12)


def test_float32_keeps_its_digits_where_the_noise_is_small():
    """Two images 2e-4 apart per pixel: |x|^2 - 2 x.y + |y|^2 would not see it."""
    rng = np.random.default_rng(2)
    first = rng.uniform(-1, 1, (32, 32, 3)).astype(np.float32)
    data = np.stack([first, first + np.float32(2e-4)])
    x = first + np.float32(8e-5)
    t = np.float32(1e-4)
    truth, mean, _ = oracle(data, VE, x, t * 40)

    @jax.jit
    def both(data, x, t):
        weights = empirical.posterior_weights(data, VE, x, t)
        return weights, empirical.denoiser(data, VE)(x, t)

    result, denoised = both(data, x, t * 40)
    assert 0.55 < truth[0] < 0.9  # the case is not degenerate
    np.testing.assert_allclose(result, truth, rtol=1e-3)
    np.testing.assert_allclose(denoised, mean, rtol=1e-5, atol=1e-6)


def test_it_is_a_mixture_whose_variances_are_zero(x64):
    points = jnp.asarray(DATA)
    truth = mixture.Mixture(jnp.full(N, -jnp.log(N)), points, jnp.zeros(points.shape))

    @jax.jit
    def both(x, t):
        noised = mixture.diffuse(truth, OU, t)
        return (
            (empirical.score(points, OU, 25)(x, t), mixture.score(truth, OU)(x, t)),
            (empirical.log_prob(points, OU, 25)(x, t), mixture.log_prob(noised, x)),
        )

    for ours, closed in both(jnp.asarray(X), jnp.asarray(0.4)):
        np.testing.assert_allclose(ours, closed, rtol=1e-10)


@pytest.mark.parametrize("chunk", [1, 7, 60, 62])
def test_the_chunk_size_leaves_no_trace(chunk, x64):
    data, x, t = jnp.asarray(DATA), jnp.asarray(X), jnp.asarray(0.05)
    result = jax.jit(empirical.score(data, OU, chunk))(x, t)
    np.testing.assert_allclose(result, oracle(DATA, OU, X, 0.05)[2], rtol=1e-11)


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_chunks_whose_weights_underflow_do_no_harm(chunk):
    """The first chunk is hopeless, or the last, and sigma is tiny."""
    data = np.float32([[100.0], [0.0], [-100.0], [1.0]])

    @jax.jit
    def denoise(data):
        return empirical.denoiser(data, VE, chunk)(jnp.array([0.001]), 1e-3)

    for nearest in range(4):
        np.testing.assert_array_equal(denoise(np.roll(data, nearest, axis=0)), [0.0])


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**6), log_t=st.floats(-8, 4))
def test_the_denoiser_stays_inside_the_hull_of_the_data(seed, log_t):
    """A convex combination: no coordinate leaves the range of the data, at any t."""
    x = np.float32(10 * np.random.default_rng(seed).normal(size=4))
    result = np.asarray(DENOISE(x, np.float32(10.0**log_t)))
    assert np.all(result <= DATA.max(0) + 1e-5)
    assert np.all(result >= DATA.min(0) - 1e-5)


def test_one_point_is_the_denoiser_everywhere(x64):
    """n = 1: D = x_1 and score = (alpha x_1 - x) / sigma^2."""
    point, t = DATA[:1], 0.7
    denoise, score_fn = empirical.denoiser(point, OU), empirical.score(point, OU)
    mean, slope = jax.jit(lambda x: (denoise(x, t), score_fn(x, t)))(X)
    np.testing.assert_array_equal(mean, point[0])
    closed = (OU_FORMULA.alpha(t) * point[0] - X) / OU_FORMULA.sigma(t) ** 2
    np.testing.assert_allclose(slope, closed, rtol=1e-14)


def test_at_large_t_the_denoiser_is_the_mean_with_duplicates(x64):
    denoise = jax.jit(empirical.denoiser(np.array([[0.0], [1.0], [1.0]]), OU))
    np.testing.assert_allclose(denoise(np.array([0.2]), 60.0), [2 / 3], rtol=1e-10)


def test_images_are_vectors_in_another_shape():
    t, images = np.float32(0.2), np.float32(DATA).reshape(N, 2, 2, 1)
    flat = jax.jit(empirical.score(np.float32(DATA), OU, 4))(np.float32(X), t)
    shaped = jax.jit(empirical.score(images, OU, 4))
    result = np.asarray(shaped(np.float32(X).reshape(2, 2, 1), t))
    np.testing.assert_allclose(result.ravel(), flat, rtol=1e-5)


def test_midway_between_two_points_the_jacobian_explodes(x64):
    """Eigenvalues a^2 D^2 / (4 v^2) - 1/v along the segment, -1/v across it."""
    points, t = np.array([[1.0, 0.0, 2.0], [-1.0, 2.0, 1.0]]), 0.01
    a, v = OU_FORMULA.alpha(t), -np.expm1(-t)
    jacobian = jax.jit(lambda x: empirical.jacobian(points, OU, x, t))
    result = jacobian(a * points.mean(0))
    top = a**2 * 9 / (4 * v**2) - 1 / v  # D^2 = 4 + 4 + 1
    np.testing.assert_allclose(
        np.linalg.eigvalsh(result), [-1 / v, -1 / v, top], rtol=1e-10
    )


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


def test_pixels_are_read_as_the_data_room_reads_them():
    pixels = np.random.default_rng(3).integers(0, 256, (40, 3, 3, 1), np.uint8)
    x = np.float32(np.random.default_rng(4).normal(size=(3, 3, 1)))
    for t in (1e-3, 0.5):
        stored = jax.jit(empirical.score(pixels, OU, 30))(x, t)
        floats = jax.jit(empirical.score(data.from_uint8(pixels), OU, 30))(x, t)
        # A number near 0 is the difference of two of about 1, each of them rounded.
        np.testing.assert_allclose(stored, floats, rtol=1e-6, atol=2**-23)


@pytest.mark.parametrize("n", [61, 64, 3])
def test_four_devices_give_the_sums_of_one(n, x64):
    """Also where the points do not divide evenly, or are fewer than the devices."""
    points, mesh = jnp.asarray(np.resize(DATA, (n, 4))), parallel.make_mesh()
    queries = np.random.default_rng(5).normal(size=(6, 4))
    split, whole = (
        jax.jit(jax.vmap(empirical.posterior(points, OU, **options), (0, None)))
        for options in ({"chunk": 7, "mesh": mesh}, {})
    )
    for t in (1e-2, 1.0):
        chex.assert_trees_all_close(
            split(queries, t), whole(queries, t), rtol=1e-9, atol=1e-12
        )


def test_a_jacobian_vector_product_streams(x64):
    """Forward mode through the scan is the closed form, chunk by chunk."""
    score_fn, t = empirical.score(DATA, OU, 20), 0.1

    @jax.jit
    def both(x, u):
        _, pushed = jax.jvp(lambda x: score_fn(x, t), (x,), (u,))
        return pushed, empirical.jacobian(DATA, OU, x, t) @ u

    np.testing.assert_allclose(*both(X, np.arange(4.0)), rtol=1e-8)


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
    x = np.float32(DATA[i] + far)
    assert np.isfinite(SCORE(x, np.float32(10.0**log_t))).all()


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
@pytest.mark.unchecked
def test_what_has_no_meaning_is_refused_before_it_is_compiled(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@SLOW_32
def test_the_empirical_law_is_a_loop_over_its_points(bits, real):
    """Two of three classes, points that count differently, chunks, a temperature."""
    n, event, temperature = 40, (2, 2, 1), 1.5
    data, labels, counts = real(n, *event), np.arange(n) % 3, 1.0 + np.arange(n) % 4
    shares = np.where(labels == 1, 0, counts) / np.sum(counts[labels != 1])

    @jax.jit
    def ours(data, x, t):
        chosen = jnp.logaddexp(
            empirical.labelled(labels, 0), empirical.labelled(labels, 2)
        )
        options = {"log_weights": chosen + jnp.log(counts)}
        log_prob = empirical.log_prob(data, OU, 17, **options)(x, t)
        options["temperature"] = temperature
        return (
            empirical.posterior_weights(data, OU, x, t, **options),
            empirical.denoiser(data, OU, 17, **options)(x, t).ravel(),
            empirical.score(data, OU, 17, **options)(x, t).ravel(),
            empirical.jacobian(data, OU, x, t, **options),
        ), (log_prob, empirical.posterior(data, OU, 17, **options)(x, t))

    for t in (0.03125, T):
        a, v = OU_FORMULA.alpha(t), OU_FORMULA.sigma(t) ** 2
        x = np.float64(np.float32(a * data[3] + np.sqrt(v) * real(*event)))
        result, (log_prob, law) = ours(data, x, t)
        flat, at = data.reshape(n, -1), x.ravel()
        truth = posterior(flat, shares, a, v, at, temperature)
        for got, want in zip(result, truth, strict=True):
            close(got, want, bits)
        weights, mean = truth[:2]
        close(law.mean.ravel(), mean, bits)
        close(law.entropy, scipy.stats.entropy(weights), bits)
        close(law.largest, weights.max(), bits)
        close(log_prob, np.log(density(flat, shares, a, v, at)), bits)


@jax.jit
def empirical_law(data, x, t):
    return (
        empirical.posterior(data, VE)(x, t),
        empirical.score(data, VE)(x, t),
        empirical.log_prob(data, VE)(x, t),
        empirical.jacobian(data, VE, x, t),
    )


@FEW
@given(SEEDS, SCALES)
def test_the_empirical_law_moves_with_its_data(x64, seed, s):
    # More points than contenders: some are known by the product only.
    data, x, t, q, c = drawn(seed, 24, D), drawn(seed, D), 0.7, turned(seed), 2.0
    law, slope, log_p, jacobian = empirical_law(data, x, t)
    data = np.random.default_rng(seed).permutation(data)  # their order is no matter
    moved = empirical_law(s * data @ q.T + c, s * q @ x + c, s * t)
    law = law._replace(mean=s * q @ law.mean + c)
    truth = law, q @ slope / s, log_p - D * np.log(s), q @ jacobian @ q.T / s**2
    alike(moved, truth)


def test_the_empirical_score_is_the_slope_of_its_density(x64):
    """By reverse mode, over chunks; in every point, its weight and the time, too."""

    def density(x, data, t, log_weights):
        return empirical.log_prob(data, OU, 5, log_weights)(x, t)

    x, data, t, log_weights = drawn(1, D), drawn(0, 9, D), 0.3, drawn(2, 9)
    slopes = check_slopes(density, x, data, t, log_weights)
    score_fn = empirical.score(data, OU, log_weights=log_weights)
    alike(slopes[0], jax.jit(score_fn)(x, t))


@pytest.mark.slow
def test_densities_obey_the_fokker_planck_equation(x64):
    """d log p / dt = -d f - f x.s + g^2 / 2 (tr ds/dx + |s|^2), of both laws."""
    made, step = process.variance_preserving(), 1e-6
    law, data = mixture.separated(jax.random.key(0), 2, D), jnp.asarray(drawn(0, 9, D))

    def densities(x, t):
        known = mixture.log_prob(mixture.diffuse(law, made, t), x)
        return jnp.stack([known, empirical.log_prob(data, made)(x, t)])

    @jax.jit
    @jax.vmap
    def both(x, t):
        f, g2 = process.drift(made, t), process.diffusion2(made, t)
        true = mixture.score(law, made)
        slopes = true(x, t), empirical.score(data, made)(x, t)
        known = jax.jacfwd(true)(x, t), empirical.jacobian(data, made, x, t)
        truth = [
            -D * f - f * x @ s + g2 / 2 * (jnp.trace(jacobian) + s @ s)
            for s, jacobian in zip(slopes, known, strict=True)
        ]
        rises = jax.vmap(densities, (None, 0))(x, t + step * jnp.array([-1.0, 1.0]))
        return (rises[1] - rises[0]) / (2 * step), jnp.stack(truth)

    alike(*both(drawn(1, 4, D), np.array([0.05, 0.2, 0.5, 0.9])), 1e-8)
