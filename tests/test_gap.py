"""The denoising loss of the truth, of the empirical score, and what lies between."""

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


@pytest.mark.parametrize("t", [0.05, 0.9])
@pytest.mark.parametrize("name", PROCESSES)
def test_the_floor_of_the_eps_loss_is_one_minus_v_times_information(name, t, key):
    """Truth N(0, I): 1 - v I(P_t) / d with I / d = 1 / (alpha^2 + v)."""
    made, t, m = PROCESSES[name], jnp.float32(t), 4_000
    x0, eps = jax.random.normal(key, (2, m, D))
    score_fn = mixture.score(normal(), made)
    losses = jax.jit(
        jax.vmap(lambda x0, eps: gap.eps_loss(score_fn, made, x0, t, eps))
    )(x0, eps)
    losses = np.asarray(losses, np.float64)
    v, a = float(made.sigma(t)) ** 2, float(made.alpha(t))
    floor = 1 - v / (a**2 + v)
    assert abs(losses.mean() - floor) < 4 * losses.std() / np.sqrt(m)


def test_a_score_of_zero_has_eps_loss_one(key):
    x0, eps = jax.random.normal(key, (2, 5_000, D))
    losses = jax.vmap(
        lambda x0, eps: gap.eps_loss(
            lambda x, t: jnp.zeros_like(x), OU, x0, jnp.float32(0.3), eps
        )
    )(x0, eps)
    assert abs(losses.mean() - 1) < 4 * np.sqrt(2 / (5_000 * D))


def test_the_denoising_loss_is_the_eps_loss_over_sigma_squared(key, x64):
    """sigma^2 E|-eps/sigma - s|^2 = d E eps-loss, on the same draws."""
    data, t = jax.random.normal(key, (7, D)), jnp.asarray(0.2)
    x, eps = gap.noised(key, data, OU, t, 50)
    score_fn = mixture.score(normal(), OU)
    x0 = (x - OU.sigma(t) * eps) / OU.alpha(t)
    each = jax.vmap(lambda x0, eps: gap.eps_loss(score_fn, OU, x0, t, eps))(x0, eps)
    found = gap.denoising_loss(score_fn, x, eps, OU, t)
    np.testing.assert_allclose(found, D * jnp.mean(each) / OU.sigma(t) ** 2, rtol=1e-10)


def test_noised_points_are_training_points_and_their_noise(key, x64):
    data, t, m = jax.random.normal(key, (4, 2, 3, 1)), jnp.asarray(0.4), 4_000
    x, eps = gap.noised(jax.random.fold_in(key, 1), data, OU, t, m)
    x0 = np.asarray((x - OU.sigma(t) * eps) / OU.alpha(t))
    errors = abs(x0[:, None] - np.asarray(data)[None]).max(axis=(2, 3, 4))
    assert errors.min(axis=1).max() < 1e-12
    counts = np.bincount(errors.argmin(axis=1), minlength=4)
    assert np.all(abs(counts / m - 1 / 4) < 4 * np.sqrt(3 / 16 / m))
    assert abs(eps.mean()) < 4 / np.sqrt(eps.size)
    assert abs(jnp.mean(eps**2) - 1) < 4 * np.sqrt(2 / eps.size)


def test_one_training_point_leaves_the_empirical_score_no_loss(key, x64):
    """n = 1: X_t tells its noise exactly."""
    data, t = jax.random.normal(key, (1, D)), jnp.asarray(0.5)
    x, eps = gap.noised(key, data, OU, t, 20)
    found = gap.denoising_loss(empirical.score(data, OU), x, eps, OU, t)
    assert found < 1e-25


@pytest.mark.parametrize("t", [0.1, 1.0])
def test_the_loss_gap_of_one_point_is_its_closed_form(t, key):
    """n = 1, truth N(0, I): d a^4 / v + a^2 |x_1|^2 (OU)."""
    data, t, m = jnp.linspace(-1, 2, D)[None], jnp.float32(t), 20_000
    x, eps = gap.noised(key, data, OU, t, m)
    score_fn = mixture.score(normal(), OU)
    # The empirical score has no loss at all here: the truth's is the gap.
    each = jax.jit(
        jax.vmap(lambda x, e: gap.denoising_loss(score_fn, x[None], e[None], OU, t))
    )(x, eps)
    each = np.asarray(each, np.float64)
    a2, v = float(OU.alpha(t)) ** 2, float(OU.sigma(t)) ** 2
    closed = D * a2**2 / v + a2 * float(jnp.sum(data**2))
    assert abs(each.mean() - closed) < 4 * each.std() / np.sqrt(m)


@pytest.mark.parametrize("t", [0.05, 0.5, 2.0])
def test_both_sides_of_proposition_4_1(t, key):
    """Loss of the truth - loss of the empirical score = their Fisher divergence."""
    truth_key, data_key, noise_key = jax.random.split(key, 3)
    truth = mixture.separated(truth_key, 3, D)
    data, t, m = mixture.sample(data_key, truth, 40), jnp.float32(t), 8_000
    x, eps = gap.noised(noise_key, data, OU, t, m)
    true, empirical_score = mixture.score(truth, OU), empirical.score(data, OU)

    def sides(x, eps):
        u = -eps / OU.sigma(t)
        s, s_hat = true(x, t), empirical_score(x, t)
        losses = jnp.sum((u - s) ** 2) - jnp.sum((u - s_hat) ** 2)
        return losses - jnp.sum((s_hat - s) ** 2)

    difference = np.asarray(jax.jit(jax.vmap(sides))(x, eps), np.float64)
    assert abs(difference.mean()) < 4 * difference.std() / np.sqrt(m)
    loss = jax.jit(gap.denoising_loss, static_argnums=(0, 3))
    assert loss(true, x, eps, OU, t) > loss(empirical_score, x, eps, OU, t)


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


def test_draws_from_nothing_are_refused(key):
    with pytest.raises(ValueError, match="n=0"):
        gap.noised(key, jnp.zeros((0, 2)), OU, jnp.float32(1), 3)
    with pytest.raises(ValueError, match="m=0"):
        gap.noised(key, jnp.zeros((2, 2)), OU, jnp.float32(1), 0)


# The loss gap.


def draws(truth, n, t, m=4_000):
    """A data set, and m draws of X_t with their noise, in the OU process."""
    data = mixture.sample(jax.random.key(1), truth, n)
    return data, *gap.noised(jax.random.key(2), data, OU, t, m)


@pytest.mark.parametrize("t", [0.02, 0.3, 1.0])
def test_both_sides_of_proposition_4_1_agree_on_the_same_draws(t, x64):
    """Loss-Gap_t = Fisher(Phat_t, P_t) for one data set, within 4 standard errors."""
    truth = mixture.separated(jax.random.key(0), 3, D)
    data, x, eps = draws(truth, 40, t)
    true, fitted = mixture.score(truth, OU), empirical.score(data, OU)

    def sides(x, eps):
        noise, s, shat = -eps / OU.sigma(t), true(x, t), fitted(x, t)
        losses = jnp.sum((noise - s) ** 2) - jnp.sum((noise - shat) ** 2)
        return losses, jnp.sum((s - shat) ** 2)

    losses, divergence = (np.asarray(a) for a in jax.jit(jax.vmap(sides))(x, eps))
    error = (losses - divergence).std() / np.sqrt(len(x))
    assert abs((losses - divergence).mean()) < 4 * error
    np.testing.assert_allclose(gap.fisher(true, fitted, x, t), divergence.mean())
    difference = gap.denoising_loss(true, x, eps, OU, t) - gap.denoising_loss(
        fitted, x, eps, OU, t
    )
    np.testing.assert_allclose(difference, losses.mean(), rtol=1e-9)


@pytest.mark.parametrize("t", [0.05, 0.7])
def test_one_training_point_has_a_closed_form(t, x64):
    """tr[(I/sqrt v - sqrt v A^-1)^2] + a^2 (x1 - mu)' A^-2 (x1 - mu)."""
    variances = jnp.linspace(0.2, 3.0, D)
    truth = mixture.Mixture(jnp.zeros(1), jnp.full((1, D), 0.5), variances[None])
    x1 = jnp.linspace(-1.0, 2.0, D)[None]
    a, v = OU.alpha(t), OU.sigma(t) ** 2
    spread = a**2 * variances + v
    closed = jnp.sum((1 / jnp.sqrt(v) - jnp.sqrt(v) / spread) ** 2)
    closed += jnp.sum(a**2 * (x1[0] - 0.5) ** 2 / spread**2)
    x, _ = gap.noised(jax.random.key(3), x1, OU, t, 20_000)
    true, fitted = mixture.score(truth, OU), empirical.score(x1, OU)
    each = jax.vmap(lambda x: gap.fisher(true, fitted, x[None], t))(x)
    error = np.asarray(each).std() / np.sqrt(len(x))
    assert abs(each.mean() - closed) < 4 * error
    got = gap.loss_gap(truth, x1, OU, t, jax.random.key(3), 20_000)
    np.testing.assert_allclose(got, each.mean(), rtol=1e-9)


@pytest.mark.parametrize("t", [0.1, 0.8])
def test_under_a_standard_normal_the_gap_is_the_information(t, x64):
    """Loss-Gap_t = I(Phat_t) - 2 d + d v + a^2 mean ||x_i||^2."""
    data, x, _ = draws(normal(), 25, t, m=20_000)
    true, fitted = mixture.score(normal(), OU), empirical.score(data, OU)
    a, v = OU.alpha(t), OU.sigma(t) ** 2
    rest = -2 * D + D * v + a**2 * jnp.mean(jnp.sum(data**2, axis=1))
    information = jax.vmap(lambda x: jnp.sum(fitted(x, t) ** 2))(x)
    divergence = jax.vmap(lambda x: gap.fisher(true, fitted, x[None], t))(x)
    difference = np.asarray(divergence - information - rest)
    assert abs(difference.mean()) < 4 * difference.std() / np.sqrt(len(x))


def test_saturated_is_d_over_e_to_the_t_minus_one_for_unit_covariance(x64):
    t = jnp.array([0.01, 0.5, 2.0])
    got = jax.vmap(lambda t: gap.saturated(jnp.ones(D), OU, t))(t)
    np.testing.assert_allclose(got, D / jnp.expm1(t), rtol=1e-12)
    assert gap.saturated(jnp.zeros(D), OU, 0.5) == 0


@pytest.mark.parametrize("t", [0.05, 0.1, 0.3])
def test_the_gap_saturates_below_the_collapse_time(t):
    """d = 32, n = 1,000, K = 8: t_c = 1.345, and the ratio is 1 up to 0.3 t_c."""
    truth = mixture.separated(jax.random.key(4), 8, 32)
    data = mixture.sample(jax.random.key(5), truth, 1_000)
    t = jnp.float32(t)
    estimate = jax.jit(lambda key: gap.loss_gap(truth, data, OU, t, key, 1_000))
    ratio = estimate(jax.random.key(6)) / gap.saturated(jnp.ones(32), OU, t)
    assert 0.95 < ratio < 1.05
