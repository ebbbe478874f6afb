"""The denoising loss of the truth, of the empirical score, and what lies between."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memsep_jax import empirical, gap, mixture, process, score

OU = process.ornstein_uhlenbeck()
PROCESSES = {name: make() for name, make in process.PROCESSES.items()}
D = 6


def normal(d=D):
    """N(0, I)."""
    return mixture.Mixture(jnp.zeros(1), jnp.zeros((1, d)), jnp.ones((1, d)))


def within(found, truth, errors=4):
    """A mean within its standard errors of the truth."""
    return abs(found.value - truth) < errors * found.error


# Losses.


def test_an_estimate_is_a_mean_and_its_standard_error(x64):
    found = gap.estimate(jnp.array([1.0, 2.0, 6.0]))
    np.testing.assert_allclose(found, (3, np.sqrt(7 / 3)), rtol=1e-12)
    assert np.isnan(gap.estimate(jnp.ones(1)).error)


@pytest.mark.parametrize("t", [0.05, 0.9])
@pytest.mark.parametrize("name", PROCESSES)
def test_the_floor_of_a_standard_normal(name, t, key, x64):
    """1 - v I(P_t) / d with I / d = 1 / (alpha^2 + v), and it is the eps-loss."""
    made, m = PROCESSES[name], 4_000
    x0, eps = jax.random.normal(key, (2, m, D))
    score_fn = mixture.score(normal(), made)

    @jax.jit
    def both(x0, eps):
        losses = jax.vmap(lambda x, e: gap.eps_loss(score_fn, made, x, t, e))(x0, eps)
        x = process.perturb(made, x0, t, eps)
        return gap.estimate(losses), gap.floor(score_fn, made, x, t)

    a2, v = made.alpha(t) ** 2, made.sigma(t) ** 2
    losses, floor = both(x0, eps)
    assert within(losses, a2 / (a2 + v))
    assert within(floor, a2 / (a2 + v))


def test_the_floors_of_a_mixture_and_of_its_data_set():
    """d = 32, n = 1,000, K = 8: .908 and .000 at t = .1, .296 and .097 at t = 1.2.

    Single draws of the mixture: their spread over mixtures is about .01.
    """
    truth_key, data_key, held_out_key, key = jax.random.split(jax.random.key(4), 4)
    truth = mixture.separated(truth_key, 8, 32)
    data = mixture.sample(data_key, truth, 1_000)
    held_out = mixture.sample(held_out_key, truth, 2_000)

    @jax.jit
    def floors(t):
        x, _ = gap.noised(key, held_out, OU, t, 2_000)
        x_hat, _ = gap.noised(key, data, OU, t, 1_000)
        true, fitted = mixture.score(truth, OU), empirical.score(data, OU)
        return gap.floor(true, OU, x, t), gap.floor(fitted, OU, x_hat, t)

    for t, expected in (0.1, (0.908, 0.000)), (1.2, (0.296, 0.097)):
        for found, value in zip(floors(jnp.float32(t)), expected, strict=True):
            assert abs(found.value - value) < 0.015 + 4 * found.error


def test_a_score_of_zero_has_eps_loss_one(key):
    x0, eps = jax.random.normal(key, (2, 5_000, D))

    def nothing(x, t):
        return jnp.zeros_like(x)

    loss = jax.vmap(lambda x0, eps: gap.eps_loss(nothing, OU, x0, 0.3, eps))
    losses = jax.jit(loss)(x0, eps)
    assert abs(losses.mean() - 1) < 4 * np.sqrt(2 / (5_000 * D))


def test_the_denoising_loss_is_the_eps_loss_over_sigma_squared(key, x64):
    """sigma^2 E|-eps/sigma - s|^2 = d E eps-loss, on the same draws."""
    data, t = jax.random.normal(key, (7, D)), jnp.asarray(0.2)
    x, eps = gap.noised(key, data, OU, t, 50)
    score_fn = mixture.score(normal(), OU)

    @jax.jit
    def both(x, eps):
        x0 = (x - OU.sigma(t) * eps) / OU.alpha(t)
        each = jax.vmap(lambda x, e: gap.eps_loss(score_fn, OU, x, t, e))(x0, eps)
        return gap.denoising_loss(score_fn, x, eps, OU, t), jnp.mean(each)

    found, mean = both(x, eps)
    np.testing.assert_allclose(found, D * mean / OU.sigma(t) ** 2, rtol=1e-10)


@pytest.mark.parametrize("weights", [None, (0.5, 0.25, 0.25, 0.0)])
def test_noised_points_are_training_points_and_their_noise(weights, key, x64):
    data, t, m = jax.random.normal(key, (4, 2, 3, 1)), jnp.asarray(0.4), 4_000
    log_weights = None if weights is None else jnp.log(7 * jnp.array(weights))
    noise_key = jax.random.fold_in(key, 1)
    x, eps = gap.noised(noise_key, data, OU, t, m, log_weights=log_weights)
    x0 = np.asarray((x - OU.sigma(t) * eps) / OU.alpha(t))
    errors = abs(x0[:, None] - np.asarray(data)[None]).max(axis=(2, 3, 4))
    assert errors.min(axis=1).max() < 1e-12
    shares = np.bincount(errors.argmin(axis=1), minlength=4) / m
    expected = np.full(4, 1 / 4) if weights is None else np.array(weights)
    assert np.all(abs(shares - expected) <= 4 * np.sqrt(expected * (1 - expected) / m))
    assert abs(eps.mean()) < 4 / np.sqrt(eps.size)
    assert abs(jnp.mean(eps**2) - 1) < 4 * np.sqrt(2 / eps.size)


def test_one_training_point_leaves_the_empirical_score_no_loss(key, x64):
    """n = 1: X_t tells its noise exactly."""
    data, t = jax.random.normal(key, (1, D)), jnp.asarray(0.5)
    x, eps = gap.noised(key, data, OU, t, 20)
    score_fn = empirical.score(data, OU)
    loss = jax.jit(lambda x, eps: gap.denoising_loss(score_fn, x, eps, OU, t))
    assert loss(x, eps) < 1e-25


def test_the_noise_prediction_of_the_truth_has_its_eps_loss(key, x64):
    """eps_loss of a score = mean square of the noise it stands for."""
    x0, eps = jax.random.normal(key, (2, D))
    t, made = jnp.asarray(0.3), process.variance_preserving()
    score_fn = score.from_noise(lambda x, t: jnp.sin(x), made)
    x = process.perturb(made, x0, t, eps)
    np.testing.assert_allclose(
        gap.eps_loss(score_fn, made, x0, t, eps),
        jnp.mean((jnp.sin(x) - eps) ** 2),
        rtol=1e-12,
    )


# The loss gap, measured.


def test_both_sides_of_proposition_4_1_agree_on_the_same_draws(x64):
    """Loss-Gap_t = Fisher(Phat_t, P_t) for one data set, within 4 standard errors."""
    truth = mixture.separated(jax.random.key(0), 3, D)
    data, key, m = (
        mixture.sample(jax.random.key(1), truth, 40),
        jax.random.key(2),
        4_000,
    )
    true, fitted = mixture.score(truth, OU), empirical.score(data, OU)

    @jax.jit
    def both(t):
        x, eps = gap.noised(key, data, OU, t, m)
        losses = [gap.denoising_loss(s, x, eps, OU, t) for s in (true, fitted)]
        found = gap.sides(truth, data, OU, t, key, m)
        loss_gap = gap.loss_gap(truth, data, OU, t, key, m)
        return found, losses[0] - losses[1], gap.fisher(true, fitted, x, t), loss_gap

    for t in 0.02, 0.3, 1.0, 2.0:
        found, losses, divergence, loss_gap = both(t)
        assert loss_gap == found.fisher.value
        assert within(found.difference, 0)
        np.testing.assert_allclose(found.losses.value, losses, rtol=1e-9)
        np.testing.assert_allclose(found.fisher.value, divergence, rtol=1e-9)
        rest = losses - divergence
        np.testing.assert_allclose(found.difference.value, rest, atol=1e-9 * losses)


def test_weights_are_copies(x64):
    """A point of twice the weight is a point that occurs twice."""
    truth = mixture.separated(jax.random.key(0), 2, D)
    data = mixture.sample(jax.random.key(1), truth, 8)
    copies = jnp.array([1, 1, 5, 1, 2, 1, 1, 1])
    repeated = jnp.repeat(data, copies, axis=0, total_repeat_length=13)

    @jax.jit
    def both(key, other):
        weights = jnp.log(copies.astype(float))
        ours = gap.sides(truth, data, OU, 0.8, key, 4_000, log_weights=weights)
        return ours.fisher, gap.sides(truth, repeated, OU, 0.8, other, 4_000).fisher

    ours, theirs = both(jax.random.key(2), jax.random.key(3))
    error = jnp.hypot(ours.error, theirs.error)
    assert abs(ours.value - theirs.value) < 4 * error


@pytest.mark.parametrize("name", ["ornstein_uhlenbeck", "rectified_flow"])
def test_one_training_point_has_a_closed_form(name, x64):
    """tr[(I/sqrt v - sqrt v A^-1)^2] + a^2 (x1 - mu)' A^-2 (x1 - mu)."""
    made, variances = PROCESSES[name], jnp.linspace(0.2, 3.0, D)
    truth = mixture.Mixture(jnp.zeros(1), jnp.full((1, D), 0.5), variances[None])
    x1 = jnp.linspace(-1.0, 2.0, D)[None]
    estimate = jax.jit(
        lambda t: gap.sides(truth, x1, made, t, jax.random.key(3), 8_000)
    )
    for t in 0.05, 0.7:
        closed = gap.one_point(variances, x1[0] - 0.5, made, t)
        assert within(estimate(t).fisher, closed)


def test_the_closed_form_of_one_point_for_any_covariance(key, x64):
    """The same matrices, in another basis."""
    t, eigenvalues = 0.3, np.linspace(0.2, 3.0, D)
    basis, _ = np.linalg.qr(jax.random.normal(key, (D, D)))
    offset = np.linspace(-1, 2, D)
    a2, v = float(OU.alpha(t)) ** 2, float(OU.sigma(t)) ** 2
    inverse = np.linalg.inv(a2 * basis @ np.diag(eigenvalues) @ basis.T + v * np.eye(D))
    root = np.eye(D) / np.sqrt(v) - np.sqrt(v) * inverse
    closed = np.trace(root @ root) + a2 * offset @ inverse @ inverse @ offset
    found = gap.one_point(eigenvalues, offset @ basis, OU, t)
    np.testing.assert_allclose(found, closed, rtol=1e-12)
    found = gap.one_point(np.ones(D), offset, OU, t)
    np.testing.assert_allclose(found, D * a2**2 / v + a2 * offset @ offset, rtol=1e-12)


@pytest.mark.parametrize("name", ["ornstein_uhlenbeck", "variance_exploding"])
def test_under_a_standard_normal_the_gap_is_the_information(name, x64):
    """OU: Loss-Gap_t = I(Phat_t) - 2 d + d v + a^2 mean ||x_i||^2."""
    made = PROCESSES[name]
    data = mixture.sample(jax.random.key(1), normal(), 25)
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
        a2, v = OU.alpha(t) ** 2, OU.sigma(t) ** 2
        closed = 7.0 - 2 * D + D * v + a2 * jnp.mean(jnp.sum(data**2, axis=1))
        found = gap.standard_normal(7.0, data, OU, t)
        np.testing.assert_allclose(found, closed, rtol=1e-12)


def test_a_curve_has_a_time_and_a_key_at_each_point(key):
    times = jnp.array([0.1, 0.5])
    normals = gap.curve(lambda t, key: (t, jax.random.normal(key)), times, key)
    keys = [jax.random.fold_in(key, i) for i in range(2)]
    np.testing.assert_array_equal(normals[0], times)
    np.testing.assert_allclose(normals[1], [jax.random.normal(k) for k in keys], 1e-6)


def test_the_kl_of_one_point_under_a_normal_is_its_closed_form(x64):
    """n = 1, OU: KL(N(a x1, v I) || N(0, I)) = (d (v - 1 - log v) + a^2 |x1|^2) / 2."""
    t, x1 = 0.4, jnp.linspace(-1.0, 2.0, D)[None]
    found = jax.jit(lambda t: gap.kl(normal(), x1, OU, t, jax.random.key(1), 8_000))(t)
    a2, v = OU.alpha(t) ** 2, OU.sigma(t) ** 2
    assert within(found, (D * (v - 1 - jnp.log(v)) + a2 * jnp.sum(x1**2)) / 2)


@pytest.mark.parametrize(
    "name, ends",
    [("ornstein_uhlenbeck", (0.02, 3.0)), ("variance_preserving", (0.02, 0.8))],
)
def test_the_time_integral_of_the_gap_is_twice_the_drop_in_kl(name, ends, x64):
    """int g^2 Loss-Gap_t dt = 2 [KL(Phat || P) at t0 - at t1], for one data set."""
    made, times = PROCESSES[name], jnp.geomspace(*ends, 80)
    truth = mixture.separated(jax.random.key(0), 2, 3)
    data = mixture.sample(jax.random.key(1), truth, 20)

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

    found, kls = both(jax.random.key(2), jax.random.key(3))
    error = jnp.sqrt(found.error**2 + 4 * jnp.sum(kls.error**2))
    assert abs(found.value - 2 * (kls.value[0] - kls.value[1])) < 4 * error
    assert error < 0.03 * found.value


def test_an_integral_is_exact_for_one_over_t_in_either_direction(x64):
    times = jnp.geomspace(0.01, 5.0, 7)
    for grid in times, times[::-1]:
        found = gap.integral(grid, 3 / grid)
        np.testing.assert_allclose(found, 3 * np.log(500), rtol=1e-12)


# The loss gap, in closed form.


def test_saturated_is_d_over_e_to_the_t_minus_one_for_unit_covariance(x64):
    t = jnp.array([0.01, 0.5, 2.0])
    got = jax.vmap(lambda t: gap.saturated(jnp.ones(D), OU, t))(t)
    np.testing.assert_allclose(got, D / jnp.expm1(t), rtol=1e-12)
    assert gap.saturated(jnp.zeros(D), OU, 0.5) == 0


@pytest.mark.parametrize("name", PROCESSES)
def test_the_closed_integral_of_the_saturated_gap(name, x64):
    """int g^2 = sum_j log(u / (u + lam_j)) between the ends, for every process."""
    made, eigenvalues = PROCESSES[name], jnp.array([0.0, 0.3, 1.0, 5.0])
    times = jnp.geomspace(0.01, 0.9, 800)

    @jax.jit
    def integrals(times):
        values = jax.vmap(lambda t: gap.saturated(eigenvalues, made, t))(times)
        measured = gap.Estimate(values, jnp.zeros_like(values))
        plain = gap.integral(times, values)
        return gap.kl_integral(times, measured, made), plain

    found, plain = integrals(times)
    u = (made.sigma(times) / made.alpha(times)) ** 2
    closed = sum(jnp.log(u / (u + lam)) for lam in eigenvalues)
    ends = gap.saturated_integral(eigenvalues, made, times[0], times[-1])
    np.testing.assert_allclose(ends, closed[-1] - closed[0], rtol=1e-12)
    np.testing.assert_allclose(found, (ends, 0), rtol=1e-4)
    if name == "ornstein_uhlenbeck":  # g = 1: the plain time integral
        np.testing.assert_allclose(plain, ends, rtol=1e-4)


@pytest.mark.parametrize("d, n", [(32, 1_000), (64, 500)])
def test_the_gap_saturates_below_the_collapse_time(d, n):
    """K = 8: the ratio to the sharp form is 1 up to 0.3 t_c (d = 32: t_c = 1.345)."""
    truth = mixture.separated(jax.random.key(4), 8, d)
    data = mixture.sample(jax.random.key(5), truth, n)
    end = 0.3 * gap.collapse_time(n, 8, d, OU)

    @jax.jit
    def ratio(t, key):
        found = gap.loss_gap(truth, data, OU, t, key, 1_000)
        return found / gap.saturated(jnp.ones(d), OU, t)

    for share in (0.1, 0.5, 1.0):
        assert 0.95 < ratio(share * end, jax.random.key(6)) < 1.05
    assert ratio(end / 0.3, jax.random.key(6)) < 0.9  # and no longer


def test_the_information_bound_is_met_where_points_keep_apart(x64):
    """2 E KL(Phat_t0 || P_t0) >= sum_j log(1 + lam_j / u) - 2 log n, = as t0 -> 0."""
    n, variances = 30, jnp.linspace(0.5, 2.0, 4)
    truth = mixture.Mixture(jnp.zeros(1), jnp.ones((1, 4)), variances[None])

    @jax.jit
    def excess(t0):
        def one(key):
            data = mixture.sample(key, truth, n)
            found = gap.kl(truth, data, OU, t0, jax.random.fold_in(key, 1), 500)
            return 2 * found.value

        values = jax.vmap(one)(jax.random.split(jax.random.key(0), 40))
        return gap.estimate(values - gap.information_bound(variances, OU, t0, n))

    apart, merged = excess(1e-4), excess(0.3)
    assert within(apart, 0)
    assert merged.value > 4 * merged.error


def test_the_entropy_bound_is_met_by_distant_points_and_copies(x64):
    """2 KL(Phat_t0 || P_t0) >= -d log(2 pi e v0) - 2 H(w) - 2 E log p_t0."""
    truth = mixture.separated(jax.random.key(0), 2, D)
    data, key = mixture.sample(jax.random.key(1), truth, 6), jax.random.key(2)
    log_weights = jnp.log(jnp.array([5.0, 1.0, 1.0, 3.0, 1.0, 1.0]))
    repeated = data[jnp.array([0] * 5 + [1, 2] + [3] * 3 + [4, 5])]

    @jax.jit
    def all_of(t0):
        weighted = {"log_weights": log_weights}
        found = gap.kl(truth, data, OU, t0, key, 4_000, **weighted)
        bound = gap.entropy_bound(truth, data, OU, t0, key, 4_000, **weighted)
        rows = gap.entropy_bound(truth, repeated, OU, t0, key, 4_000)
        return found, bound, rows

    found, bound, rows = all_of(1e-4)
    error = 2 * found.error + bound.error  # on the same draws
    assert abs(2 * found.value - bound.value) < 4 * error
    entropy = np.log(gap.effective_size(log_weights))
    missed = bound.value - rows.value - 2 * (np.log(12) - entropy)
    assert abs(missed) < 4 * (bound.error + rows.error)
    found, bound, _ = all_of(1.0)
    assert 2 * found.value - bound.value > 4 * (2 * found.error + bound.error)


def test_the_effective_size_counts_points(x64):
    assert abs(gap.effective_size(jnp.full(7, -3.0)) - 7) < 1e-12
    np.testing.assert_allclose(
        gap.effective_size(jnp.log(jnp.array([2.0, 2.0, 0.0]))), 2, rtol=1e-12
    )


@pytest.mark.parametrize("n, k, d", [(1_000, 8, 8), (10_000, 8, 64), (5_000, 1, 3_072)])
def test_the_collapse_time_is_minus_log_one_minus_v_c(n, k, d):
    closed = -np.log1p(-((n / k) ** (-2 / d)))
    found = gap.collapse_time(n, k, d, OU)
    np.testing.assert_allclose(found, closed, rtol=3e-6)
    with jax.enable_x64(True):
        found = jax.jit(lambda n: gap.collapse_time(n, k, d, OU))(n)
        np.testing.assert_allclose(found, closed, rtol=1e-10)
        for made in PROCESSES.values():
            t = gap.collapse_time(n, k, d, made)
            signal = (made.alpha(t) / made.sigma(t)) ** 2
            np.testing.assert_allclose(signal, (n / k) ** (2 / d) - 1, rtol=1e-8)


@pytest.mark.parametrize("d, n", [(8, 500), (32, 1_000)])
def test_at_the_collapse_time_the_largest_weight_is_two_thirds(d, n):
    """psi^2 = n^(2/d) - 1, one Gaussian of unit variance: .67-.70, in the mean."""
    t = gap.collapse_time(n, 1, d, OU)

    def one(key):
        data = mixture.sample(key, normal(d), n)
        x, _ = gap.noised(jax.random.fold_in(key, 1), data, OU, t, 250)
        at = empirical.posterior(data, OU)
        return jnp.mean(jax.vmap(lambda x: at(x, t).largest)(x))

    keys = jax.random.split(jax.random.key(0), 12)
    found = gap.estimate(jax.jit(lambda keys: jax.lax.map(one, keys))(keys))
    assert found.error < 0.01
    assert 0.67 - 2 * found.error < found.value < 0.70 + 2 * found.error


# The detector.


def test_the_detector_flags_the_empirical_score_at_small_times_only():
    """At large ones it has become the true score, which is never flagged."""
    keys, d = jax.random.split(jax.random.key(4), 4), 16
    truth = mixture.separated(keys[0], 8, d)
    data = mixture.sample(keys[1], truth, 300)
    held_out = mixture.sample(keys[2], truth, 400)
    times = jnp.array([0.01, 0.1, 0.4, 6.0])
    true, fitted = mixture.score(truth, OU), empirical.score(data, OU)

    @jax.jit
    def spectra(key):
        def of(score_fn, floor=None):
            return gap.spectrum(
                score_fn, OU, data, held_out, times, key, 300, truth_score=floor
            )

        return of(fitted, true), of(fitted), of(true)

    known, unknown, honest = spectra(keys[3])
    np.testing.assert_array_equal(known.memorizes, [True, True, True, False])
    np.testing.assert_array_equal(unknown.memorizes, [True, True, True, False])
    np.testing.assert_array_equal(honest.memorizes, [False] * 4)
    np.testing.assert_array_equal(known.times, times)
    assert known.train.value[0] < 1e-6
    assert unknown.floor is None
    for found, least in (known, known.floor), (unknown, unknown.held_out):
        expected = least.value - found.train.value
        np.testing.assert_allclose(found.gap.value, expected, rtol=1e-4, atol=1e-5)
    # The gap is the loss gap, per dimension and in units of the noise.
    closed = gap.saturated(jnp.ones(d), OU, times[0]) * OU.sigma(times[0]) ** 2 / d
    assert abs(known.gap.value[0] - closed) < 4 * known.gap.error[0]


def test_the_errors_of_the_detector_count_the_chance_of_the_data():
    """Held-out minus train of the truth, m >> n: z has unit spread over data sets."""
    wide = jnp.array([[0.01], [4.0]]) * jnp.ones((2, D))
    truth = mixture.Mixture(jnp.log(jnp.full(2, 0.5)), jnp.zeros((2, D)), wide)
    true = mixture.score(truth, OU)

    @jax.vmap
    def z(key):
        train_key, held_out_key, key = jax.random.split(key, 3)
        data = mixture.sample(train_key, truth, 24)
        held_out = mixture.sample(held_out_key, truth, 30)
        found = gap.spectrum(true, OU, data, held_out, jnp.array([0.3]), key, 240).gap
        return found.value[0] / found.error[0]

    found = np.asarray(jax.jit(z)(jax.random.split(jax.random.key(0), 150)))
    assert abs(found.mean()) < 4 / np.sqrt(150)
    # t of 23 degrees of freedom; as 240 draws they would have a spread of 3.
    assert 0.8 < found.std() < 1.3


def test_the_detector_flags_a_network_fitted_to_few_points(x64):
    """Random features, their last layer by least squares: 60 points, or fresh ones."""
    t, d, width = 0.1, 4, 160
    w = 1.5 * jax.random.normal(jax.random.key(0), (width, d))
    b = 3 * jax.random.normal(jax.random.key(1), (width,))
    held_out = jax.random.normal(jax.random.key(2), (200, d))

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

    few, many = (
        judged(jax.random.normal(jax.random.key(5), (n, d))) for n in (60, 2_000)
    )
    assert few.memorizes and not many.memorizes
    assert few.train.value < many.train.value


def test_the_detector_takes_images(key):
    data = jax.random.uniform(key, (20, 4, 4, 3))
    held_out = jax.random.uniform(jax.random.fold_in(key, 1), (9, 4, 4, 3))
    fitted, times = empirical.score(data, OU), jnp.array([0.001, 0.01])
    found = jax.jit(
        lambda key: gap.spectrum(fitted, OU, data, held_out, times, key, 30)
    )(key)
    assert found.gap.value.shape == (2,)
    assert np.all(found.memorizes)


# Bad input.


@pytest.mark.parametrize("t", [0.0, -0.1, float("nan")])
def test_a_time_without_noise_is_refused(t, key):
    data = jnp.zeros((3, D))
    score_fn = mixture.score(normal(), OU)
    for call in (
        lambda: gap.noised(key, data, OU, t, 5),
        lambda: gap.loss_gap(normal(), data, OU, t, key, 5),
        lambda: gap.kl(normal(), data, OU, t, key, 5),
        lambda: gap.curve(lambda t, key: t, [0.1, t], key),
        lambda: gap.integral([0.1, t], jnp.ones(2)),
        lambda: gap.saturated_integral(jnp.ones(D), OU, t, 1.0),
        lambda: gap.one_point(jnp.ones(D), data[0], OU, t),
        lambda: gap.information_bound(jnp.ones(D), OU, t, 3),
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
    data = jnp.zeros((5, D))
    with pytest.raises(ValueError, match=r"\(7,\)"):
        gap.spectrum(score_fn, OU, data, jnp.zeros((5, 7)), times, key)
    for points, m in (data[:1], 10), (data, 1):
        with pytest.raises(ValueError, match="at least 2"):
            gap.spectrum(score_fn, OU, data, points, times, key, m)


def test_the_spectrum_in_pieces_is_the_spectrum(key):
    """Draw by draw, as a run takes it, that hears signals in between."""
    truth = mixture.separated(key, 3, 4)
    data, held_out = mixture.sample(key, truth, 12), mixture.sample(key, truth, 10)
    times, score_fn = jnp.array([0.1, 1.0]), empirical.score(data, OU)
    draws = gap.spectrum_draws(12, 10, times, key, 20)
    losses = [
        [
            gap.spectrum_losses(score_fn, OU, data[i], held_out[j], t, k)
            for i, j, k in zip(*at, strict=True)
        ]
        for t, *at in zip(times, *draws[:3], strict=True)
    ]
    pieces = gap.spectrum_of(times, jnp.array(losses), draws.pairs)
    whole = gap.spectrum(score_fn, OU, data, held_out, times, key, 20)
    chex.assert_trees_all_close(pieces, whole, rtol=1e-5, atol=1e-6)
