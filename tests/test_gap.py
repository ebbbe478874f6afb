"""The denoising loss of the truth, of the empirical score, and what lies between."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from oracles import (
    FEW,
    FORMULAS,
    OU,
    OU_FORMULA,
    PROCESSES,
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
    known,
    mean_and_error,
    moved_law,
    normals,
    posterior,
    sampled,
    separated,
)

from memsep_jax import empirical, gap, mixture, process, score

WIDE = 6  # dimensions of most of the laws below


def normal(d=WIDE):
    """N(0, I)."""
    return mixture.Mixture(
        *map(jnp.asarray, (np.zeros(1), np.zeros((1, d)), np.ones((1, d))))
    )


def within(result, truth, errors=4):
    """A mean within its standard errors of the truth."""
    return abs(result.value - truth) < errors * result.error


# Losses.


def test_an_estimate_is_a_mean_and_its_standard_error(x64):
    result = gap.estimate(jnp.array([1.0, 2.0, 6.0]))
    np.testing.assert_allclose(result, (3, np.sqrt(7 / 3)), rtol=1e-12)
    assert np.isnan(gap.estimate(jnp.ones(1)).error)


@pytest.mark.parametrize("name", PROCESSES)
def test_the_floor_of_a_standard_normal(name, x64):
    """1 - v I(P_t) / d with I / d = 1 / (alpha^2 + v), and it is the eps-loss."""
    made, formula, (x0, eps) = PROCESSES[name], FORMULAS[name], drawn(0, 2, 4_000, WIDE)
    score_fn = mixture.score(normal(), made)

    @jax.jit
    def both(x0, eps, t):
        losses = jax.vmap(lambda x, e: gap.eps_loss(score_fn, made, x, t, e))(x0, eps)
        x = process.perturb(made, x0, t, eps)
        scores = jax.vmap(lambda x: score_fn(x, t))(x)
        floors = gap.floor(score_fn, made, x, t), gap.floor_of(scores, made, t)
        return gap.estimate(losses), *floors

    for t in 0.05, 0.9:
        a2, v = formula.alpha(t) ** 2, formula.sigma(t) ** 2
        losses, floor, same = both(x0, eps, t)
        assert within(losses, a2 / (a2 + v))
        assert within(floor, a2 / (a2 + v))
        chex.assert_trees_all_close(same, floor, rtol=1e-12)


def test_the_floors_of_a_mixture_and_of_its_data_set():
    """d = 32, n = 1,000, K = 8: .908 and .000 at t = .1, .296 and .097 at t = 1.2.

    Single draws of the mixture: their spread over mixtures is about .01.
    """
    truth, key = separated(4, 8, 32), jax.random.key(4)
    data, held_out = sampled(5, truth, 1_000), sampled(6, truth, 2_000)

    @jax.jit
    def floors(t):
        x, _ = gap.noised(key, held_out, OU, t, 2_000)
        x_hat, _ = gap.noised(key, data, OU, t, 1_000)
        true, fitted = mixture.score(truth, OU), empirical.score(data, OU)
        return gap.floor(true, OU, x, t), gap.floor(fitted, OU, x_hat, t)

    for t, expected in (0.1, (0.908, 0.000)), (1.2, (0.296, 0.097)):
        for result, value in zip(floors(jnp.float32(t)), expected, strict=True):
            assert abs(result.value - value) < 0.015 + 4 * result.error


@pytest.mark.parametrize("weights", [None, (0.5, 0.25, 0.25, 0.0)])
def test_noised_points_are_training_points_and_their_noise(weights, key, x64):
    data, t, m = drawn(0, 4, 2, 3, 1), 0.4, 4_000
    with np.errstate(divide="ignore"):
        log_weights = None if weights is None else np.log(7 * np.array(weights))

    @jax.jit
    def noised(key, data):
        return gap.noised(key, data, OU, t, m, log_weights=log_weights)

    x, eps = map(np.asarray, noised(key, data))
    x0 = (x - OU_FORMULA.sigma(t) * eps) / OU_FORMULA.alpha(t)
    errors = abs(x0[:, None] - data[None]).max(axis=(2, 3, 4))
    assert errors.min(axis=1).max() < 1e-12
    shares = np.bincount(errors.argmin(axis=1), minlength=4) / m
    expected = np.full(4, 1 / 4) if weights is None else np.array(weights)
    assert np.all(abs(shares - expected) <= 4 * np.sqrt(expected * (1 - expected) / m))
    assert abs(eps.mean()) < 4 / np.sqrt(eps.size)
    assert abs(np.mean(eps**2) - 1) < 4 * np.sqrt(2 / eps.size)


def test_one_training_point_leaves_the_empirical_score_no_loss(x64):
    """n = 1: X_t tells its noise exactly."""
    data, t, eps = drawn(0, 1, WIDE), 0.5, drawn(1, 20, WIDE)
    x = OU_FORMULA.alpha(t) * data + OU_FORMULA.sigma(t) * eps

    @jax.jit
    def loss(data, x, eps):
        return gap.denoising_loss(empirical.score(data, OU), x, eps, OU, t)

    assert loss(data, x, eps) < 1e-25


# The loss gap, measured.


def test_both_sides_of_proposition_4_1_agree_on_the_same_draws(x64):
    """Loss-Gap_t = Fisher(Phat_t, P_t) for one data set, within 4 standard errors."""
    truth = separated(0, 3, WIDE)
    data = sampled(1, truth, 40)
    both = jax.jit(lambda t: gap.sides(truth, data, OU, t, jax.random.key(2), 4_000))
    for t in 0.02, 0.3, 1.0, 2.0:
        assert within(both(t).difference, 0)


@pytest.mark.parametrize("name", ["ornstein_uhlenbeck", "rectified_flow"])
def test_one_training_point_has_a_closed_form(name, x64):
    """tr[(I/sqrt v - sqrt v A^-1)^2] + a^2 (x1 - mu)' A^-2 (x1 - mu)."""
    made, variances = PROCESSES[name], np.linspace(0.2, 3.0, WIDE)
    x1 = jnp.asarray(np.linspace(-1.0, 2.0, WIDE))
    truth = mixture.Mixture(np.zeros(1), np.full((1, WIDE), 0.5), variances[None])

    @jax.jit
    def both(t):
        measured = gap.sides(truth, x1[None], made, t, jax.random.key(3), 8_000)
        return measured.fisher, gap.one_point(variances, x1 - 0.5, made, t)

    for t in 0.05, 0.7:
        assert within(*both(t))


@pytest.mark.parametrize("name", ["ornstein_uhlenbeck", "variance_exploding"])
def test_under_a_standard_normal_the_gap_is_the_information(name, x64):
    """OU: Loss-Gap_t = I(Phat_t) - 2 d + d v + a^2 mean ||x_i||^2."""
    made, data = PROCESSES[name], sampled(1, normal(), 25)
    true, fitted = mixture.score(normal(), made), empirical.score(data, made)

    @jax.jit
    def difference(t):
        x, _ = gap.noised(jax.random.key(2), data, made, t, 4_000)

        def one(x):
            closed = gap.standard_normal(jnp.sum(fitted(x, t) ** 2), data, made, t)
            return gap.fisher(true, fitted, x[None], t) - closed

        return gap.estimate(jax.vmap(one)(x))

    for t in 0.1, 0.8:
        assert within(difference(t), 0)
    if name == "ornstein_uhlenbeck":
        a2, v = OU_FORMULA.alpha(t) ** 2, OU_FORMULA.sigma(t) ** 2
        squares = np.mean(np.sum(np.asarray(data) ** 2, axis=1))
        closed = 7.0 - 2 * WIDE + WIDE * v + a2 * squares
        result = jax.jit(lambda data: gap.standard_normal(7.0, data, OU, t))(data)
        np.testing.assert_allclose(result, closed, rtol=1e-12)


def test_a_curve_has_a_time_and_a_key_at_each_point(key):
    times = jnp.array([0.1, 0.5])
    normals = gap.curve(lambda t, key: (t, jax.random.normal(key)), times, key)
    keys = [jax.random.fold_in(key, i) for i in range(2)]
    np.testing.assert_array_equal(normals[0], times)
    np.testing.assert_allclose(normals[1], [jax.random.normal(k) for k in keys], 1e-6)


def test_the_kl_of_one_point_under_a_normal_is_its_closed_form(x64):
    """n = 1, OU: KL(N(a x1, v I) || N(0, I)) = (d (v - 1 - log v) + a^2 |x1|^2) / 2."""
    t, x1 = 0.4, np.linspace(-1.0, 2.0, WIDE)[None]
    kl = jax.jit(lambda x1: gap.kl(normal(), x1, OU, t, jax.random.key(1), 8_000))
    a2, v = OU_FORMULA.alpha(t) ** 2, OU_FORMULA.sigma(t) ** 2
    assert within(kl(x1), (WIDE * (v - 1 - np.log(v)) + a2 * np.sum(x1**2)) / 2)


@pytest.mark.parametrize(
    "name, ends",
    [("ornstein_uhlenbeck", (0.02, 3.0)), ("variance_preserving", (0.02, 0.8))],
)
def test_the_time_integral_of_the_gap_is_twice_the_drop_in_kl(name, ends, x64):
    """int g^2 Loss-Gap_t dt = 2 [KL(Phat || P) at t0 - at t1], for one data set."""
    made, times = PROCESSES[name], jnp.asarray(np.geomspace(*ends, 80))
    truth = separated(0, 2, 3)
    data = sampled(1, truth, 20)

    def divergence(t, key):
        return gap.sides(truth, data, made, t, key, 250).fisher

    def entropy(t, key):
        return gap.kl(truth, data, made, t, key, 4_000)

    @jax.jit
    def both(key, other):
        gaps = gap.curve(divergence, times, key)
        return gap.kl_integral(times, gaps, made), gap.curve(
            entropy, jnp.array(ends), other
        )

    result, kls = jax.tree.map(np.asarray, both(jax.random.key(2), jax.random.key(3)))
    error = np.sqrt(result.error**2 + 4 * np.sum(kls.error**2))
    assert abs(result.value - 2 * (kls.value[0] - kls.value[1])) < 4 * error
    assert error < 0.03 * result.value


def test_an_integral_is_exact_for_one_over_t_in_either_direction(x64):
    times, integral = np.geomspace(0.01, 5.0, 7), jax.jit(gap.integral)
    for grid in times, times[::-1]:
        result = integral(grid, 3 / grid)
        np.testing.assert_allclose(result, 3 * np.log(500), rtol=1e-12)


# The loss gap, in closed form.


@pytest.mark.parametrize("name", PROCESSES)
def test_the_closed_integral_of_the_saturated_gap(name, x64):
    """int g^2 = sum_j log(u / (u + lam_j)) between the ends, for every process."""
    made, eigenvalues = PROCESSES[name], np.array([0.0, 0.3, 1.0, 5.0])

    @jax.jit
    def integrals(times):
        values = jax.vmap(lambda t: gap.saturated(eigenvalues, made, t))(times)
        measured = gap.Estimate(values, jnp.zeros_like(values))
        plain = gap.integral(times, values)
        ends = gap.saturated_integral(eigenvalues, made, times[0], times[-1])
        return gap.kl_integral(times, measured, made), plain, ends

    result, plain, ends = integrals(np.geomspace(0.01, 0.9, 800))
    u = FORMULAS[name].noise(np.array([0.01, 0.9])) ** 2
    closed = sum(np.log(u / (u + lam)) for lam in eigenvalues)
    np.testing.assert_allclose(ends, closed[1] - closed[0], rtol=1e-12)
    np.testing.assert_allclose(result, (ends, 0), rtol=1e-4)
    if name == "ornstein_uhlenbeck":  # g = 1: the plain time integral
        np.testing.assert_allclose(plain, ends, rtol=1e-4)


@pytest.mark.parametrize("d, n", [(32, 1_000), (64, 500)])
def test_the_gap_saturates_below_the_collapse_time(d, n):
    """K = 8: the ratio to the sharp form is 1 up to 0.3 t_c (d = 32: t_c = 1.345)."""
    truth = separated(4, 8, d)
    data = sampled(5, truth, n)

    @jax.jit
    def ratio(share):
        t, key = share * gap.collapse_time(n, 8, d, OU), jax.random.key(6)
        result = gap.loss_gap(truth, data, OU, t, key, 1_000)
        return result / gap.saturated(jnp.ones(d), OU, t)

    for share in (0.03, 0.15, 0.3):
        assert 0.95 < ratio(share) < 1.05
    assert ratio(1.0) < 0.9  # and no longer


def test_the_information_bound_is_met_where_points_keep_apart(x64):
    """2 E KL(Phat_t0 || P_t0) >= sum_j log(1 + lam_j / u) - 2 log n, = as t0 -> 0."""
    n, variances = 30, np.linspace(0.5, 2.0, 4)
    truth = jax.tree.map(
        jnp.asarray, mixture.Mixture(np.zeros(1), np.ones((1, 4)), variances[None])
    )

    @jax.jit
    def excess(t0):
        def one(key):
            data = mixture.sample(key, truth, n)
            result = gap.kl(truth, data, OU, t0, jax.random.fold_in(key, 1), 500)
            return 2 * result.value

        values = jax.vmap(one)(jax.random.split(jax.random.key(0), 40))
        return gap.estimate(values - gap.information_bound(variances, OU, t0, n))

    apart, merged = excess(1e-4), excess(0.3)
    assert within(apart, 0)
    assert merged.value > 4 * merged.error


def test_the_entropy_bound_is_met_where_points_keep_apart(x64):
    """2 KL(Phat_t0 || P_t0) >= -d log(2 pi e v0) - 2 H(w) - 2 E log p_t0."""
    truth, key = separated(0, 2, WIDE), jax.random.key(2)
    data, counts = np.asarray(sampled(1, truth, 6)), np.array([5, 1, 1, 3, 1, 1])
    repeated = np.repeat(data, counts, axis=0)

    @jax.jit
    def all_of(data, repeated, t0):
        weighted = {"log_weights": jnp.log(counts / 1.0)}
        result = gap.kl(truth, data, OU, t0, key, 4_000, **weighted)
        bound = gap.entropy_bound(truth, data, OU, t0, key, 4_000, **weighted)
        rows = gap.entropy_bound(truth, repeated, OU, t0, key, 4_000)
        return result, bound, rows

    result, bound, rows = jax.tree.map(np.asarray, all_of(data, repeated, 1e-4))
    error = 2 * result.error + bound.error  # on the same draws
    assert abs(2 * result.value - bound.value) < 4 * error
    entropy = scipy.stats.entropy(counts)
    missed = bound.value - rows.value - 2 * (np.log(12) - entropy)
    assert abs(missed) < 4 * (bound.error + rows.error)
    result, bound, _ = jax.tree.map(np.asarray, all_of(data, repeated, 1.0))
    assert 2 * result.value - bound.value > 4 * (2 * result.error + bound.error)


def test_the_collapse_time_is_minus_log_one_minus_v_c(bits):
    times = jax.jit(
        lambda n: [
            [gap.collapse_time(m, k, d, made) for made in PROCESSES.values()]
            for m, k, d in ((n, 8, 8), (10_000, 8, 64), (5_000, 1, 3_072))
        ]
    )(1_000)
    for (n, k, d), found in zip(
        [(1_000, 8, 8), (10_000, 8, 64), (5_000, 1, 3_072)], times, strict=True
    ):
        found = dict(zip(PROCESSES, np.float64(found), strict=True))
        closed = -np.log1p(-((n / k) ** (-2 / d)))
        rtol = 1e-10 if bits == 64 else 3e-6
        np.testing.assert_allclose(found["ornstein_uhlenbeck"], closed, rtol=rtol)
        if bits == 64:
            noises = [FORMULAS[name].noise(t) for name, t in found.items()]
            signal = np.array(noises) ** -2.0
            np.testing.assert_allclose(signal, (n / k) ** (2 / d) - 1, rtol=1e-8)


@pytest.mark.parametrize("d, n", [(8, 500), (32, 1_000)])
def test_at_the_collapse_time_the_largest_weight_is_two_thirds(d, n):
    """psi^2 = n^(2/d) - 1, one Gaussian of unit variance: .67-.70, in the mean."""

    def one(key):
        t, data = gap.collapse_time(n, 1, d, OU), jax.random.normal(key, (n, d))
        x, _ = gap.noised(jax.random.fold_in(key, 1), data, OU, t, 250)
        at = empirical.posterior(data, OU)
        return jnp.mean(jax.vmap(lambda x: at(x, t).largest)(x))

    @jax.jit
    def mean(key):
        return gap.estimate(jax.lax.map(one, jax.random.split(key, 12)))

    result = mean(jax.random.key(0))
    assert result.error < 0.01
    assert 0.67 - 2 * result.error < result.value < 0.70 + 2 * result.error


# The detector.


def test_the_detector_flags_the_empirical_score_at_small_times_only():
    """At large ones it has become the true score, which is never flagged."""
    d, times = 16, jnp.array([0.01, 0.1, 0.4, 6.0])
    truth = separated(4, 8, d)
    data, held_out = sampled(5, truth, 300), sampled(6, truth, 400)
    true, fitted = mixture.score(truth, OU), empirical.score(data, OU)

    @jax.jit
    def spectra(key):
        def of(score_fn, floor=None):
            return gap.spectrum(
                score_fn, OU, data, held_out, times, key, 300, truth_score=floor
            )

        return of(fitted, true), of(fitted), of(true)

    spectra = spectra(jax.random.key(4))
    known, unknown, honest = jax.tree.map(np.asarray, spectra)
    np.testing.assert_array_equal(known.memorizes, [True, True, True, False])
    np.testing.assert_array_equal(unknown.memorizes, [True, True, True, False])
    np.testing.assert_array_equal(honest.memorizes, [False] * 4)
    np.testing.assert_array_equal(known.times, times)
    assert known.train.value[0] < 1e-6
    assert unknown.floor is None
    for result, least in (known, known.floor), (unknown, unknown.held_out):
        expected = least.value - result.train.value
        np.testing.assert_allclose(result.gap.value, expected, rtol=1e-4, atol=1e-5)
    # The gap is the loss gap, per dimension and in units of the noise.
    closed = OU_FORMULA.alpha(0.01) ** 2  # of unit variances
    assert abs(known.gap.value[0] - closed) < 4 * known.gap.error[0]


def test_the_errors_of_the_detector_count_the_chance_of_the_data():
    """Held-out minus train of the truth, m >> n: z has unit spread over data sets."""
    wide = np.array([[0.01], [4.0]]) * np.ones((2, WIDE))
    parts = np.log([0.5, 0.5]), np.zeros((2, WIDE)), wide
    truth = mixture.Mixture(*map(jnp.asarray, parts))
    true = mixture.score(truth, OU)

    @jax.vmap
    def z(key):
        train_key, held_out_key, key = jax.random.split(key, 3)
        data = mixture.sample(train_key, truth, 24)
        held_out = mixture.sample(held_out_key, truth, 30)
        result = gap.spectrum(true, OU, data, held_out, jnp.array([0.3]), key, 240).gap
        return result.value[0] / result.error[0]

    of_all = jax.jit(lambda key: z(jax.random.split(key, 150)))
    result = np.asarray(of_all(jax.random.key(0)))
    assert abs(result.mean()) < 4 / np.sqrt(150)
    # t of 23 degrees of freedom; as 240 draws they would have a spread of 3.
    assert 0.8 < result.std() < 1.3


def test_the_detector_flags_a_network_fitted_to_few_points(x64):
    """Random features, their last layer by least squares: 60 points, or fresh ones."""
    t, d, width = 0.1, 4, 160
    w, b = 1.5 * drawn(0, width, d), 3 * drawn(1, width)
    held_out = jnp.asarray(drawn(2, 200, d))

    def features(x):
        return jnp.tanh(w @ x + b)

    @jax.jit
    def judged(data):
        x, eps = gap.noised(jax.random.key(3), data, OU, t, 2_000)
        f = jax.vmap(features)(x)
        kernel = jnp.linalg.solve(f.T @ f + 0.1 * jnp.eye(width), f.T @ eps)
        network = score.from_noise(lambda x, t: features(x) @ kernel, OU)
        times, key = jnp.array([t]), jax.random.key(4)
        return gap.spectrum(network, OU, data, held_out, times, key, 1_000)

    few, many = (judged(drawn(5, n, d)) for n in (60, 2_000))
    assert few.memorizes and not many.memorizes
    assert few.train.value < many.train.value


# Bad input.


@pytest.mark.parametrize("t", [0.0, -0.1, float("nan")])
def test_a_time_without_noise_is_refused(t, key):
    data = jnp.zeros((3, WIDE))
    score_fn = mixture.score(normal(), OU)
    for call in (
        lambda: gap.noised(key, data, OU, t, 5),
        lambda: gap.loss_gap(normal(), data, OU, t, key, 5),
        lambda: gap.kl(normal(), data, OU, t, key, 5),
        lambda: gap.curve(lambda t, key: t, [0.1, t], key),
        lambda: gap.integral([0.1, t], jnp.ones(2)),
        lambda: gap.saturated_integral(jnp.ones(WIDE), OU, t, 1.0),
        lambda: gap.one_point(jnp.ones(WIDE), data[0], OU, t),
        lambda: gap.information_bound(jnp.ones(WIDE), OU, t, 3),
        lambda: gap.entropy_bound(normal(), data, OU, t, key, 5),
        lambda: gap.floor(score_fn, OU, data, t),
        lambda: gap.spectrum(score_fn, OU, data, data, [t], key, 5),
    ):
        with pytest.raises(ValueError, match="must be positive"):
            call()


def test_draws_from_nothing_are_refused(key):
    with pytest.raises(ValueError, match="n=0"):
        gap.noised(key, jnp.zeros((0, 2)), OU, jnp.float32(1), 3)
    with pytest.raises(ValueError, match="m=0"):
        gap.noised(key, jnp.zeros((2, 2)), OU, jnp.float32(1), 0)
    with pytest.raises(ValueError, match="no samples"):
        gap.estimate(jnp.zeros(0))
    with pytest.raises(ValueError, match="n=0"):
        gap.information_bound(jnp.ones(2), OU, 0.1, 0)


@pytest.mark.parametrize("n, k, d", [(8, 8, 2), (8, 9, 2), (8, 0, 2), (8, 1, 0)])
def test_no_collapse_without_more_points_than_components(n, k, d):
    with pytest.raises(ValueError, match=f"n={n} points of k={k}"):
        gap.collapse_time(n, k, d, OU)


def test_held_out_points_must_be_like_the_data_and_two(key):
    score_fn, times = mixture.score(normal(), OU), jnp.array([0.1])
    data = jnp.zeros((5, WIDE))
    with pytest.raises(ValueError, match=r"\(7,\)"):
        gap.spectrum(score_fn, OU, data, jnp.zeros((5, 7)), times, key)
    for points, m in (data[:1], 10), (data, 1):
        with pytest.raises(ValueError, match="at least 2"):
            gap.spectrum(score_fn, OU, data, points, times, key, m)


def test_the_spectrum_in_pieces_is_the_spectrum(key):
    """Draw by draw, as a run takes it to hear signals in between; images, too."""
    rng = np.random.default_rng(0)
    data, held_out = (jnp.asarray(rng.uniform(size=(n, 2, 2, 1))) for n in (12, 10))
    times, score_fn = jnp.array([0.001, 1.0]), empirical.score(data, OU)
    draws = jax.jit(lambda key: gap.spectrum_draws(12, 10, times, key, 20))(key)

    @jax.jit
    def one(i, j, t, k):
        return gap.spectrum_losses(score_fn, OU, data[i], held_out[j], t, k)

    losses = [
        [one(*pair, t, k) for *pair, k in zip(*at, strict=True)]
        for t, *at in zip(np.asarray(times), *draws[:3], strict=True)
    ]
    losses = jnp.asarray(np.array(losses))
    pieces = jax.jit(lambda a: gap.spectrum_of(times, a, 10))(losses)
    assert draws.pairs == 10
    spectrum = jax.jit(
        lambda key: gap.spectrum(score_fn, OU, data, held_out, times, key, 20)
    )
    whole = spectrum(key)
    chex.assert_trees_all_close(pieces, whole, rtol=1e-5, atol=1e-6)
    assert whole.memorizes[0]


@SLOW_32
def test_losses_and_gaps_are_loops_over_draws(bits, real):
    """Of the draws of `noised`, which its own test looks at."""
    shares, n, d, m = np.array([0.5, 0.5]), 6, 3, 8
    means, data, log_weights = real(2, d), real(n, d), real(n)
    truth = mixture.Mixture(jnp.log(shares), jnp.asarray(means), jnp.full((2, d), 0.5))
    made, formula = PROCESSES["rectified_flow"], FORMULAS["rectified_flow"]

    @jax.jit
    def ours(data, log_weights, t):
        key, options = jax.random.key(3), {"log_weights": jnp.asarray(log_weights)}
        x, eps = gap.noised(key, data, made, t, m, **options)
        true = mixture.score(truth, made)
        fitted = empirical.score(data, made, **options)
        asked = truth, data, made, t, key, m
        return (x, eps), (
            gap.denoising_loss(true, x, eps, made, t),
            gap.fisher(true, fitted, x, t),
            gap.loss_gap(*asked, **options),
            gap.eps_loss(true, made, data[0], t, eps[0]),
        ), (
            *gap.sides(*asked, **options),
            gap.kl(*asked, **options),
            gap.floor(true, made, x, t),
            gap.entropy_bound(*asked, **options),
        )  # fmt: skip

    draws, values, estimates = ours(data, log_weights, T)
    xs, noises = np.float64(draws)
    a, v = formula.alpha(T), formula.sigma(T) ** 2
    weights = np.exp(log_weights) / np.sum(np.exp(log_weights))
    covariances = [(0.5 * a**2 + v) * np.eye(d)] * 2

    losses, less, gaps, kls, floors, fits = [], [], [], [], [], []
    for x, eps in zip(xs, noises, strict=True):
        log_p, true = normals(shares, a * means, covariances, x)
        fitted = posterior(data, weights, a, v, x)[2]
        u = -eps / np.sqrt(v)
        losses.append(np.sum((u - true) ** 2))
        less.append(losses[-1] - np.sum((u - fitted) ** 2))
        gaps.append(np.sum((fitted - true) ** 2))
        kls.append(np.log(density(data, weights, a, v, x)) - log_p)
        floors.append(1 - v * np.mean(true**2))
        fits.append(log_p)
    x = a * data[0] + np.sqrt(v) * noises[0]
    true = normals(shares, a * means, covariances, x)[1]
    once = np.mean((np.sqrt(v) * true + noises[0]) ** 2)
    truths = np.mean(losses), np.mean(gaps), np.mean(gaps), once
    for got, want in zip(values, truths, strict=True):
        close(got, want, bits)

    rest = [one - other for one, other in zip(less, gaps, strict=True)]
    fit, error = mean_and_error(fits)
    entropies = d * (np.log(2 * np.pi * v) + 1) + 2 * scipy.stats.entropy(weights)
    means = [mean_and_error(each) for each in (less, gaps, rest, kls, floors)]
    means.append((-entropies - 2 * fit, 2 * error))
    scale = estimates[0].value, means[0][0]
    for got, want in zip(estimates, means, strict=True):
        # Beside the gap: what is near 0 has the rounding of what it is a difference of.
        close(jnp.stack([*got, scale[0]]), np.array([*want, scale[1]]), bits)


@SLOW_32
def test_the_closed_forms_of_the_gap_are_their_sums(bits, real):
    lam, offsets, data = np.array([0.0, 0.25, 1.0, 5.0]), real(4), real(5, 4)
    times, log_weights = np.array([0.03125, 0.0625, 0.25, 0.875]), real(6)
    errors, n, later = np.array([0.5, 0.25, 0.125, 0.5]), 30, 0.875

    @jax.jit
    def ours(lam, offsets, data, t, times, errors):
        return {
            name: (
                gap.saturated(lam, made, t),
                gap.saturated_integral(lam, made, t, later),
                gap.one_point(lam, offsets, made, t),
                gap.standard_normal(70.0, data, made, t),
                gap.information_bound(lam, made, t, n),
                gap.collapse_time(500, 8, 16, made),
                gap.integral(times, times**2),
                *gap.kl_integral(times, gap.Estimate(times**2, errors), made),
                gap.effective_size(jnp.asarray(log_weights)),
            )
            for name, made in PROCESSES.items()
        }

    result = ours(lam, offsets, data, T, times, errors)
    mass = np.exp(log_weights) / np.sum(np.exp(log_weights))
    for name, made in FORMULAS.items():
        a2, v = made.alpha(T) ** 2, made.sigma(T) ** 2
        u, end = made.noise(T) ** 2, made.noise(later) ** 2
        inverse = np.diag(1 / (a2 * lam + v))
        root = np.eye(4) / np.sqrt(v) - np.sqrt(v) * inverse
        squares = np.mean([x @ x for x in data])
        c = a2 + v
        plain, rates, weights = 0.0, 0.0, np.zeros(4)
        for i in range(3):  # the trapezoid in log t: int t f dlog t
            width = np.log(times[i + 1] / times[i])
            for j in (i, i + 1):
                weights[j] += width * times[j] / 2
        for j in range(4):
            plain += weights[j] * times[j] ** 2
            rates += weights[j] * times[j] ** 2 * made.rate(times[j])
        spread = [
            w * made.rate(t) * e for w, t, e in zip(weights, times, errors, strict=True)
        ]
        truth = (
            sum(1 / v - 1 / (v + a2 * one) for one in lam),
            sum(np.log(1 + one / u) - np.log(1 + one / end) for one in lam),
            np.trace(root @ root) + a2 * offsets @ inverse @ inverse @ offsets,
            70 + 2 * -4 / c + (a2 * squares + 4 * v) / c**2,
            sum(np.log(1 + one / u) for one in lam) - 2 * np.log(n),
            made.time(1 / np.sqrt((500 / 8) ** (2 / 16) - 1)),
            plain,
            rates,
            np.sqrt(sum(one**2 for one in spread)),
            np.exp(scipy.stats.entropy(mass)),
        )
        for got, want in zip(result[name], truth, strict=True):
            close(got, np.float64(want), bits)


def test_the_spectrum_of_a_linear_score_is_its_closed_form(key, real):
    """-b x: |(1 - v b) eps - sigma alpha b x0|^2 / d, whatever is drawn with what."""
    pairs, d, repeats, times = 6, 3, 2_000, np.array([0.25, 0.75])
    data, held_out = np.arange(pairs)[:, None] * real(pairs, d), 3 * real(pairs, d)
    judge = jax.jit(
        lambda data, held_out, key: gap.spectrum(
            lambda x, t: -0.75 * x, OU, data, held_out, jnp.asarray(times, data.dtype),
            key, pairs * repeats, truth_score=lambda x, t: -0.5 * x,
        )
    )  # fmt: skip
    result = jax.tree.map(np.asarray, judge(*np.float32([data, held_out]), key))
    np.testing.assert_allclose(result.times, times)
    for i, t in enumerate(times):
        a, v = OU_FORMULA.alpha(t), OU_FORMULA.sigma(t) ** 2

        def loss(points, b, a=a, v=v):
            """The expected loss of each point, and the error of its mean."""
            kept, pull = 1 - v * b, v * a**2 * b**2
            squares = np.array([x @ x for x in points]) / d
            error = (2 * kept**4 + 4 * kept**2 * pull * squares) / d
            return kept**2 + pull * squares, np.sqrt(np.mean(error) / pairs / repeats)

        (train, error), (new, new_error) = loss(data, 0.75), loss(held_out, 0.75)
        least, least_error = loss(data, 0.5)
        assert abs(result.train.value[i] - train.mean()) < 4 * error
        assert abs(result.held_out.value[i] - new.mean()) < 4 * new_error
        assert abs(result.floor.value[i] - least.mean()) < 4 * least_error
        missed = result.gap.value[i] - (least - train).mean()
        assert abs(missed) < 4 * (error + least_error)  # of the same noises
        # Over pairs: they differ by their points, and little by their noises.
        spread = np.hypot(mean_and_error(train)[1], error)
        assert result.train.error[i] == pytest.approx(spread, rel=0.2)
        flagged = result.gap.value[i] > 4 * result.gap.error[i]
        assert result.memorizes[i] == flagged


@jax.jit
def measured(law, data, t, key):
    """What has the unit 1 / length^2, and what has none."""
    asked = law, data, VE, t, key, 40
    (less, divergence, rest), kl = gap.sides(*asked), gap.kl(*asked)
    lam, offset = law.variances[0], data[0] - law.means[0]
    squares = less, divergence, rest, gap.one_point(lam, offset, VE, t)
    grid = jnp.array([1.0, 1.5, 4.0]) * t
    rates = gap.Estimate(1 / grid**2, 0.1 / grid**2)
    pure = (
        kl,
        gap.kl_integral(grid, rates, VE),
        gap.saturated_integral(lam, VE, t, 2 * t),
        gap.information_bound(lam, VE, t, 5),
    )
    return (*squares, gap.saturated(lam, VE, t)), pure


@pytest.mark.slow
@FEW
@given(SEEDS, SCALES)
def test_gaps_have_the_unit_of_a_squared_score(x64, seed, s):
    """Under the same key: each draw has moved, so the law is exact."""
    law, data, t, c = known("normals", seed), drawn(seed, 6, D), 0.6, 2.0
    key = jax.random.key(seed)
    squares, pure = measured(law, data, t, key)
    law = moved_law(law, s, c)
    moved = measured(law, s * data + c, s * t, key)
    alike(moved, (jax.tree.map(lambda a: a / s**2, squares), pure), 1e-8)


def test_losses_have_the_gradients_of_their_differences(x64):
    """In the parameters of a score, which training follows."""
    x0, eps, matrix = jnp.asarray(drawn(0, 4, D)), drawn(1, 4, D), drawn(2, D, D)

    def losses(matrix):
        def score_fn(x, t):
            return -jnp.tanh(matrix @ x) - x / (1 + t)

        x = process.perturb(OU, x0, 0.5, eps)
        return (
            gap.denoising_loss(score_fn, x, eps, OU, 0.5),
            gap.eps_loss(score_fn, OU, x0[0], 0.5, eps[0]),
        )

    check_slopes(losses, matrix)
