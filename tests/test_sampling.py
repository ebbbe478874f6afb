"""Flows are exact where the answer is known, and copy or generalize as they must."""

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
    PROCESSES,
    SCALES,
    SEEDS,
    SLOW_32,
    VE,
    D,
    alike,
    check_slopes,
    close,
    drawn,
    sampled,
    separated,
)

from memsep_jax import (
    data,
    defaults,
    empirical,
    memorization,
    mixture,
    process,
    sampling,
    score,
)
from memsep_jax.experiments import training
from memsep_jax.experiments.config import build

RANGES = {  # where each process is a process
    "ornstein_uhlenbeck": (0.05, 4.0),
    "variance_preserving": (0.01, 0.8),
    "variance_exploding": (0.05, 10.0),
    "rectified_flow": (0.05, 0.9),
}


MEAN, VARIANCE = np.array([1.0, -0.5]), np.array([0.3, 2.0])


def gaussian():
    parts = np.zeros(1), MEAN[None], VARIANCE[None]
    return mixture.Mixture(*map(jnp.asarray, parts))


def noised(name, t):
    """Mean and variance of X_t of that Gaussian."""
    a, v = FORMULAS[name].alpha(t), FORMULAS[name].sigma(t) ** 2
    return a * MEAN, a**2 * VARIANCE + v


def exact_flow(name, x, t, t_next):
    """One Gaussian: x - alpha mu scales with the standard deviation of X_t."""
    (mean, variance), (later, less) = noised(name, t), noised(name, t_next)
    return later + np.sqrt(less / variance) * (x - mean)


# Grids.


@pytest.mark.parametrize("name", sampling.TIME_GRIDS)
def test_grids_fall_from_t_max_to_t_min_exactly(name):
    times = np.asarray(sampling.TIME_GRIDS[name](0.002, 80.0, 17))
    assert times.shape == (18,)
    assert np.all(np.diff(times) < 0)
    np.testing.assert_allclose(times[[0, -1]], [80.0, 0.002], rtol=1e-6)


def test_the_edm_grid_is_its_formula(x64):
    times = sampling.edm_times(0.002, 80.0, 17)
    i = np.arange(18)
    root = 80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))
    np.testing.assert_allclose(times, root**7, rtol=1e-12)


def test_the_log_grid_has_equal_ratios(x64):
    times = np.asarray(sampling.log_times(1e-3, 8.0, 30))
    np.testing.assert_allclose(times[1:] / times[:-1], (1e-3 / 8) ** (1 / 30))


@pytest.mark.parametrize("name", sampling.TIME_GRIDS)
@pytest.mark.parametrize(
    "grid, words",
    [
        ((1.0, 1.0, 5), "t_min=1.0, t_max=1.0"),
        ((0.0, 1.0, 5), "0 < t_min"),
        ((2.0, 1.0, 5), "t_min=2.0"),
        ((0.1, 1.0, 0), "steps=0"),
    ],
)
def test_a_grid_that_does_not_fall_is_refused(name, grid, words):
    with pytest.raises(ValueError, match=words):
        sampling.TIME_GRIDS[name](*grid)


def test_an_unknown_method_names_the_known_ones():
    for flow in (sampling.ode, sampling.path):
        with pytest.raises(ValueError, match="'rk4' is not one of .*ddim.*euler.*heun"):
            flow(lambda x, t: x, OU, jnp.ones(2), method="rk4")


# The probability flow of one Gaussian.


@pytest.mark.parametrize("name", PROCESSES)
def test_solvers_converge_to_the_exact_flow_at_their_order(name, x64):
    made, (low, high) = PROCESSES[name], RANGES[name]
    score_fn = mixture.score(gaussian(), made)
    orders = {"euler": 1, "heun": 2, "ddim": 1}

    @jax.jit
    def ends(x, times):
        return [
            sampling.ode(score_fn, made, times, method, denoise=False)(x)
            for method in orders
        ]

    x = np.array([0.4, 1.5])
    truth = exact_flow(name, x, high, low)
    coarse, fine = (
        np.linalg.norm(ends(x, np.geomspace(high, low, steps + 1)) - truth, axis=1)
        for steps in (100, 200)
    )
    for order, one, other in zip(orders.values(), coarse, fine, strict=True):
        assert other < 0.5 * 10.0**-order
        assert np.log2(one / other) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("name", PROCESSES)
def test_ddim_is_exact_when_the_denoiser_does_not_move(name, x64):
    """n = 1: in one step, x = alpha x_1 + sigma (x_T - alpha_T x_1) / sigma_T."""
    made, formula, (low, high) = PROCESSES[name], FORMULAS[name], RANGES[name]
    point, x = np.array([0.5, -2.0]), np.array([1.0, 3.0])

    @jax.jit
    def ends(times):
        score_fn = empirical.score(jnp.asarray(point)[None], made)
        flow = sampling.ode(score_fn, made, times, "ddim", denoise=False)
        return flow(x), sampling.ode(score_fn, made, times, "ddim")(x)

    eps = (x - formula.alpha(high) * point) / formula.sigma(high)
    truth = formula.alpha(low) * point + formula.sigma(low) * eps
    result, done = ends(np.array([high, low]))
    np.testing.assert_allclose(result, truth, rtol=1e-10)
    np.testing.assert_allclose(done, point, rtol=1e-10)


# The reverse SDE.


@pytest.mark.parametrize("name", ["ornstein_uhlenbeck", "variance_exploding"])
def test_the_reverse_sde_ends_in_the_law_of_the_data(name, key):
    """One Gaussian: Euler-Maruyama's own moments, and these near the truth's."""
    made, formula, (low, high) = PROCESSES[name], FORMULAS[name], RANGES[name]
    n, times = 4_000, np.geomspace(high, low, 151)
    mean, variance = noised(name, high)
    start = mean + np.sqrt(variance) * drawn(0, n, 2)

    @jax.jit
    def flow(start, key):
        score_fn = mixture.score(gaussian(), made)
        draw = sampling.sde(score_fn, made, jnp.asarray(times), denoise=False)
        return jax.vmap(draw)(start, jax.random.split(key, n))

    result = np.float64(flow(start, key))
    for t, step in zip(times[:-1], times[:-1] - times[1:], strict=True):
        (centre, spread), rate = noised(name, t), formula.rate(t)
        factor = 1 - step * (formula.drift(t) + rate / spread)
        mean = factor * mean + step * rate / spread * centre
        variance = factor**2 * variance + step * rate

    assert np.all(abs(result.mean(0) - mean) < 4 * np.sqrt(variance / n))
    assert np.all(abs(result.var(0) - variance) < 4 * variance * np.sqrt(2 / n))
    centre, spread = noised(name, low)
    np.testing.assert_allclose(variance, spread, rtol=0.1)
    np.testing.assert_allclose(mean, centre, atol=0.05)


def test_the_reverse_sde_uses_its_key():
    times = jnp.array([1.0, 0.5, 0.1])
    flow = jax.jit(sampling.sde(lambda x, t: -x, OU, times))
    one, two = (flow(np.ones(4, np.float32), jax.random.key(seed)) for seed in (0, 1))
    assert not np.any(np.asarray(one) == two)


# EDM's sampler.


@pytest.mark.parametrize("grid", sampling.TIME_GRIDS)
def test_edm_without_churn_is_heun_on_its_own_process(grid, x64):
    times, x = sampling.TIME_GRIDS[grid](0.05, 10.0, 8), jnp.array([4.0, -7.0])
    score_fn = mixture.score(gaussian(), VE)

    @jax.jit
    def both(x):
        heun = sampling.ode(score_fn, VE, times, "heun")
        return sampling.edm(score_fn, VE, times)(x, None), heun(x)

    np.testing.assert_allclose(*both(x), rtol=1e-12)


@pytest.mark.parametrize("name", ["variance_preserving", "rectified_flow"])
def test_edm_is_one_sampler_on_every_process(name, key, x64):
    """In x / alpha against sigma / alpha they are all the variance exploding one."""
    made, (low, high) = PROCESSES[name], RANGES[name]
    times, x = sampling.log_times(low, high, 6), jnp.array([0.4, 1.5])

    @jax.jit
    def both(x, key):
        noise = process.noise_to_signal(made, times)
        one = sampling.edm(mixture.score(gaussian(), made), made, times, 3.0)
        other = sampling.edm(mixture.score(gaussian(), VE), VE, noise, 3.0)
        return one(x, key), other(x / made.alpha(times[0]), key)

    result, truth = both(x, key)
    np.testing.assert_allclose(result, truth, rtol=1e-7)


@pytest.mark.parametrize("churn", [4.0, 1e9])
def test_churn_keeps_the_variance_of_the_data(churn, key):
    """One Gaussian, where each step is linear: its own variance, and near the truth's.

    With 1e9 the noise rises by sqrt(2), the most of Karras 2022, algorithm 2.
    """
    n, steps, variance = 20_000, 40, 2.0
    law = mixture.Mixture(np.zeros(1), np.zeros((1, 1)), np.full((1, 1), variance))
    times = sampling.log_times(0.05, 10.0, steps)
    draw = sampling.sampler(
        mixture.score(law, VE), VE, times, (1,), "edm", churn=churn, churn_min=0.2,
        churn_max=5.0, churn_noise=1.02,
    )  # fmt: skip
    draws = jax.jit(lambda key: jax.vmap(draw)(jax.random.split(key, n)))
    result = np.float64(draws(key))

    def slope(s):  # dz/ds = s z / (S + s^2)
        return s / (variance + s**2)

    s, rises = np.asarray(times, np.float64), 0
    want = s[0] ** 2
    for i in range(steps + 1):
        factor = 1.0
        if 0.2 <= s[i] <= 5.0:
            factor += min(churn / (steps + 1), np.sqrt(2) - 1)
            rises += 1
        hat = s[i] * factor
        want += 1.02**2 * (hat**2 - s[i] ** 2)
        if i < steps:
            step, first = s[i + 1] - hat, slope(hat)
            second = slope(s[i + 1]) * (1 + step * first)
            want *= (1 + step * (first + second) / 2) ** 2
    want *= (variance / (variance + hat**2)) ** 2
    assert 10 < rises < steps
    assert abs(result.mean()) < 4 * np.sqrt(want / n)
    assert abs(result.var() - want) < 4 * want * np.sqrt(2 / n)
    assert want == pytest.approx(variance, rel=0.1)


def test_churn_uses_its_key_where_it_is_asked_for():
    times, x = sampling.log_times(0.1, 10.0, 5), jnp.array([4.0, -7.0])

    score_fn = mixture.score(gaussian(), VE)

    def ends(*window):
        flow = jax.jit(sampling.edm(score_fn, VE, times, 9.0, *window))
        return [np.asarray(flow(x, jax.random.key(seed))) for seed in (0, 0, 1)]

    # In the last window the last time alone: noise comes before the step to 0, too.
    for window in ((), (0.0, 0.11)):
        one, same, other = ends(*window)
        np.testing.assert_array_equal(one, same)
        assert np.all(one != other)
    one, _, other = ends(11.0)
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"churn": -1.0}, "churn=-1.0 must be at least 0"),
        ({"churn": float("nan")}, "churn=nan"),
        ({"churn_min": -0.1}, "churn_min=-0.1, churn_max=inf"),
        ({"churn_min": 2.0, "churn_max": 1.0}, "churn_min <= churn_max"),
        ({"churn_noise": 0.0}, "churn_noise=0.0 must be positive"),
    ],
)
def test_churn_that_has_no_meaning_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        sampling.edm(lambda x, t: x, VE, sampling.log_times(0.1, 1.0, 3), **options)


@pytest.mark.parametrize(
    "name, words",
    [("edm", "churn=-1.0 must be at least 0"), ("sde", "an option of .*name=edm")],
)
def test_a_config_whose_churn_has_no_meaning_is_refused(name, words):
    config = defaults.smoke(defaults.train())
    config.data.update(name="mixture", d=3)
    config.model.name = "mlp"
    config.sampler.update(name=name, churn=-1.0)
    with pytest.raises(build.ConfigError, match=words):
        build.build(config)


def test_a_config_samples_with_the_churn_that_it_names(key):
    config = defaults.train()
    config.sampler.update(name="edm", churn=9.0, churn_noise=1.01)
    score_fn, times = mixture.score(gaussian(), VE), sampling.log_times(0.1, 10.0, 5)

    @jax.jit
    def both(key):
        options = {"churn": 9.0, "churn_noise": 1.01}
        truth = sampling.sampler(score_fn, VE, times, (2,), "edm", **options)
        return training.sampler(config, VE, times, (2,), score_fn)(key), truth(key)

    np.testing.assert_array_equal(*both(key))


# Table 1 of Karras 2022, by the symbols of its rows: c_skip, c_out, c_in, c_noise.
TABLE = {
    "edm": lambda s: (
        0.25 / (s**2 + 0.25), s * 0.5 / (s**2 + 0.25) ** 0.5,
        1 / (s**2 + 0.25) ** 0.5, s.log() / 4,
    ),
    "vp": lambda s: (
        1, -s, 1 / (s**2 + 1) ** 0.5,
        ((0.01 + 39.8 * (1 + s**2).log()) ** 0.5 - 0.1) / 19.9,
    ),
    "ve": lambda s: (1, s, 1, (s / 2).log()),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", TABLE)
@pytest.mark.parametrize("churn", [0.0, 40.0])
@pytest.mark.parametrize("grid", ["edm", "log"])
def test_the_whole_sampler_is_algorithm_2_in_pytorch(grid, churn, kind, key, x64):
    """Network, preconditioning, grid and churn, from the same noise, to 1e-6."""
    torch = pytest.importorskip("torch")
    d, steps, rng = 12, 18, np.random.default_rng(0)
    w, out = rng.normal(size=(2, d, d)) / np.sqrt(d)
    window = {"churn_min": 0.05, "churn_max": 50.0, "churn_noise": 1.003}

    def network(x, level):
        return jnp.asarray(out) @ jnp.tanh(jnp.asarray(w) @ x + level)

    score_fn = score.from_network(network, score.PREDICTIONS[kind](VE), VE)
    times = sampling.TIME_GRIDS[grid](0.002, 80.0, steps - 1)
    draw = sampling.sampler(score_fn, VE, times, (d,), "edm", churn=churn, **window)
    result = jax.jit(draw)(key)

    # The noises, from the keys of the sampler; from here on PyTorch and Karras 2022.
    prior_key, noise_key = jax.random.split(key)
    start = torch.tensor(np.asarray(jax.random.normal(prior_key, (d,))))
    noises = [
        torch.tensor(np.asarray(jax.random.normal(jax.random.fold_in(noise_key, i), d)))
        for i in range(steps)
    ]
    i = torch.arange(steps, dtype=torch.float64)
    if grid == "edm":
        ends = 80.0 ** (1 / 7), 0.002 ** (1 / 7)
        t = (ends[0] + i / (steps - 1) * (ends[1] - ends[0])) ** 7
    else:
        t = 80.0 * (0.002 / 80.0) ** (i / (steps - 1))
    t = torch.cat([t, torch.zeros(1, dtype=torch.float64)])
    w, out = torch.tensor(w), torch.tensor(out)

    def denoise(x, s):
        c_skip, c_out, c_in, c_noise = TABLE[kind](s)
        return c_skip * x + c_out * (out @ torch.tanh(w @ (c_in * x) + c_noise))

    x = t[0] * start
    for i in range(steps):
        gamma = min(churn / steps, 2**0.5 - 1) if 0.05 <= t[i] <= 50 else 0.0
        t_hat = t[i] + gamma * t[i]
        x_hat = x + (t_hat**2 - t[i] ** 2) ** 0.5 * 1.003 * noises[i]
        slope = (x_hat - denoise(x_hat, t_hat)) / t_hat
        x = x_hat + (t[i + 1] - t_hat) * slope
        if t[i + 1] != 0:
            slope_next = (x - denoise(x, t[i + 1])) / t[i + 1]
            x = x_hat + (t[i + 1] - t_hat) * (slope + slope_next) / 2
    np.testing.assert_allclose(result, x.numpy(), rtol=1e-6, atol=1e-6)


# Extremes: the empirical score copies, the truth does not.


def test_the_empirical_score_copies_digits_bit_for_bit():
    """EDM's 18 steps: 35 calls of the optimum, ratio 1, uint8 copies (Gu 2023)."""
    images = jnp.asarray(data.splits("digits", num_examples=100).train.x)
    times = sampling.edm_times(0.002, 80.0, 17)
    draw = sampling.sampler(empirical.score(images, VE), VE, times, (8, 8, 1), "heun")
    samples = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 24))
    samples = data.to_uint8(np.asarray(samples))
    result = memorization.ratio(data.from_uint8(samples), images)
    assert result.value == 1.0
    assert np.all(result.neighbours.distances[:, 0] == 0)
    copied = result.neighbours.indices[:, 0]
    np.testing.assert_array_equal(samples, data.to_uint8(np.asarray(images))[copied])
    assert len(set(copied.tolist())) > 10  # and not always the same one


def test_the_true_score_of_a_mixture_gives_the_null_level(key):
    """Its samples are flagged as often as fresh draws, 3^-2 in the plane."""
    truth, m = separated(0, 4, 2), 2_000
    training, fresh = sampled(1, truth, 500), sampled(2, truth, 4_000)
    times = sampling.log_times(1e-3, 8.0, 60)
    draw = sampling.sampler(mixture.score(truth, OU), OU, times, (2,))
    samples = jax.jit(lambda key: jax.vmap(draw)(jax.random.split(key, m)))(key)
    result = memorization.ratio(samples, training, held_out=fresh)
    error = np.sqrt(result.null * (1 - result.null) * (1 / m + 1 / 4_000))
    assert abs(result.value - result.null) < 4 * error
    assert result.null == pytest.approx(1 / 9, abs=0.04)


# Sample i depends on (seed, i).


@pytest.mark.parametrize("method", ["heun", "ddim", "sde"])
def test_a_sample_does_not_depend_on_its_batch(method, key):
    points, times = jnp.asarray(drawn(0, 6, 4)), sampling.edm_times(0.002, 80.0, 5)
    draw = sampling.sampler(empirical.score(points, VE), VE, times, (4,), method)

    @jax.jit
    def generate(indices):
        return jax.vmap(lambda i: draw(jax.random.fold_in(key, i)))(indices)

    whole, sevens = generate(np.arange(14)), generate(np.arange(7, 14))
    whole, alone = np.asarray(whole), generate(np.array([9]))
    # To rounding: XLA may add up a matrix product of another shape in another order.
    np.testing.assert_allclose(sevens, whole[7:], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(alone, whole[9:10], rtol=1e-5, atol=1e-6)
    assert len(np.unique(whole.round(2), axis=0)) > 2


@pytest.mark.parametrize(
    ("method", "options"), [("heun", {}), ("sde", {}), ("edm", {"churn": 2.0})]
)
def test_the_stages_of_a_sampler_are_the_sampler(method, options, x64):
    points, key = jnp.asarray(np.eye(3)), jax.random.key(3)
    score_fn, times = empirical.score(points, VE), sampling.edm_times(1.0, 9.0, 4)
    whole = jax.jit(sampling.sampler(score_fn, VE, times, (3,), method, **options))(key)
    begin, step, count = sampling.stages(score_fn, VE, times, (3,), method, **options)
    x, step = jax.jit(begin)(key), jax.jit(step)
    for i in range(count):
        x = step(x, key, i)
    assert count == 5
    np.testing.assert_allclose(x, whole, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", PROCESSES)
def test_sampling_starts_from_the_noise_of_its_process(name, key):
    made, t = PROCESSES[name], np.float32(0.8)
    x = np.asarray(sampling.prior(key, made, t, (20_000,)))
    v = FORMULAS[name].sigma(0.8) ** 2
    assert abs(x.mean()) < 4 * np.sqrt(v / 20_000)
    assert abs(x.var() - v) < 4 * v * np.sqrt(2 / 20_000)


# Likelihood.


@pytest.mark.parametrize(
    ("name", "t_min", "t_max"),
    [("ornstein_uhlenbeck", 0.02, 24.0), ("variance_exploding", 0.1, 4e4)],
)
def test_the_likelihood_under_the_true_score_is_that_of_the_truth(
    name, t_min, t_max, x64
):
    """To second order in the steps; t_max is late, so that the prior is the law."""
    made = PROCESSES[name]
    truth = jax.jit(lambda key: mixture.separated(key, 3, 2, 1.5))(jax.random.key(0))
    x = 2 * np.asarray(jax.random.normal(jax.random.key(1), (10, 2)))

    @jax.jit
    @jax.vmap
    def exact(x):
        return mixture.log_prob(mixture.diffuse(truth, made, t_min), x)

    @jax.jit
    def log_prob(x, times):
        score_fn = mixture.score(truth, made)
        return jax.vmap(sampling.log_likelihood(score_fn, made, times))(x)

    errors = [
        np.abs(log_prob(x, np.geomspace(t_max, t_min, steps + 1)) - exact(x)).max()
        for steps in (200, 400)
    ]
    assert errors[1] < 8e-3  # in nats, where log_prob is about -5
    assert 3.3 < errors[0] / errors[1] < 4.7


def test_the_likelihood_from_random_probes_is_unbiased(x64):
    truth = separated(0, 2, 4, 1.5)
    score_fn, times = mixture.score(truth, OU), sampling.log_times(0.02, 8.0, 60)
    x = jnp.array([0.5, -1.0, 2.0, 0.0])
    exact = jax.jit(sampling.log_likelihood(score_fn, OU, times))(x)
    estimate = sampling.log_likelihood(score_fn, OU, times, probes=1)

    @jax.jit
    def estimates(key):
        return jax.vmap(lambda key: estimate(x, key))(jax.random.split(key, 400))

    result = np.asarray(estimates(jax.random.key(1)))
    assert result.std() > 0
    assert abs(result.mean() - exact) < 4 * result.std() / np.sqrt(400)


def test_a_divergence_is_the_trace_of_the_jacobian(x64, key):
    """Exact along unit vectors; signs square to 1 on a diagonal, so exact there too."""
    matrix, x = jax.random.normal(key, (6, 6)), jnp.ones((2, 3))

    def field(matrix):
        return lambda x: (matrix @ x.reshape(-1) ** 2 / 2).reshape(2, 3)

    unit = sampling.directions(x)
    value, trace = sampling.divergence(field(matrix), x, unit)
    np.testing.assert_allclose(value.reshape(-1), matrix.sum(axis=1) / 2)
    np.testing.assert_allclose(trace, jnp.trace(matrix))
    signs = sampling.directions(x, 3, key)
    assert signs.shape == (3, 2, 3)
    np.testing.assert_allclose(np.abs(signs), 3**-0.5)
    assert len(np.unique(np.sign(signs))) == 2
    diagonal = jnp.diag(jnp.diag(matrix))
    _, found = sampling.divergence(field(diagonal), x, signs)
    np.testing.assert_allclose(found, jnp.trace(matrix))


def test_probes_need_a_key_and_a_count():
    times = sampling.log_times(0.1, 1.0, 2)
    with pytest.raises(ValueError, match="give a key"):
        sampling.log_likelihood(lambda x, t: -x, OU, times, probes=1)(jnp.ones(2))
    with pytest.raises(ValueError, match="probes=-1"):
        sampling.log_likelihood(lambda x, t: -x, OU, times, probes=-1)


# The search for noise that leads to a target.


def keys_and_starts(radius, shape, count=8):
    """Keys, and where the search says that it starts: normal vectors, scaled."""

    @jax.jit
    def drawn(key):
        keys = jax.random.split(key, count)
        return keys, jax.vmap(lambda key: jax.random.normal(key, shape))(keys)

    keys, z = drawn(jax.random.key(7))
    z = np.asarray(z)
    flat = np.linalg.norm(z.reshape(count, -1), axis=1)
    return keys, radius * z / flat.reshape(-1, *[1] * len(shape))


def miss(flow, x):
    return jax.jit(jax.vmap(lambda z: jnp.sqrt(jnp.sum((flow(z) - x) ** 2))))


def test_the_search_finds_the_noise_that_leads_to_a_sample(x64):
    """One Gaussian: the flow is affine and one to one, so that noise is the only."""
    times = sampling.log_times(0.05, 4.0, 12)
    flow = sampling.ode(mixture.score(gaussian(), OU), OU, times)
    radius = np.sqrt(2.0) * FORMULAS["ornstein_uhlenbeck"].sigma(4.0)
    keys, starts = keys_and_starts(radius, (2,))
    z0 = radius * np.array([-0.6, 0.8])
    search = sampling.search_noise(flow, jax.jit(flow)(z0), radius, steps=150)
    result = jax.jit(jax.vmap(search))(keys)
    np.testing.assert_allclose(result, np.tile(z0, (8, 1)), atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(result, axis=1), radius, rtol=1e-12)
    # And was not begun there.
    assert np.linalg.norm(starts - z0, axis=1).max() > radius


def test_a_target_that_only_other_noise_reaches_stays_away(x64):
    """flow(z) = c z: x = 3 c z0 has noise of length 3 radius; on the sphere z0 is
    nearest, and misses by 2 c radius."""
    law = mixture.Mixture(np.zeros(1), np.zeros((1, 12)), np.full((1, 12), 0.5))
    times = sampling.log_times(0.05, 4.0, 5)
    image = (2, 2, 3)

    def flow(z):
        return sampling.ode(mixture.score(law, OU), OU, times)(z.ravel()).reshape(image)

    radius = 3.0
    keys, _ = keys_and_starts(radius, image)
    z0 = radius * np.full(image, 12**-0.5)
    end = np.asarray(jax.jit(flow)(z0))
    search = sampling.search_noise(flow, jnp.asarray(3 * end), radius)
    result = jax.jit(jax.vmap(search))(keys)
    np.testing.assert_allclose(result, np.tile(z0, (8, 1, 1, 1)), atol=1e-3)
    away = 2 * np.linalg.norm(end)
    np.testing.assert_allclose(miss(flow, 3 * end)(result), away, rtol=1e-6)


def test_the_search_never_ends_further_away_than_it_began():
    """Not even with one step of nearly a right angle, which spoils a good start."""
    truth = separated(0, 4, 3)
    times = sampling.log_times(0.05, 6.0, 6)
    flow, x = sampling.ode(mixture.score(truth, OU), OU, times), truth.means[1]
    keys, starts = keys_and_starts(2.0, (3,), 32)
    search = sampling.search_noise(flow, x, 2.0, steps=1, lr=30.0)
    result = np.asarray(jax.jit(jax.vmap(search))(keys))
    distance = miss(flow, x)
    began, ended = (np.asarray(distance(z)) for z in (starts, result))
    assert np.all(ended <= began * (1 + 1e-5))
    stayed = np.all(np.isclose(result, starts, atol=1e-5), axis=1)
    assert 0 < stayed.sum() < 16
    np.testing.assert_allclose(np.linalg.norm(result, axis=1), 2.0, rtol=1e-6)


def test_a_flow_that_fails_in_places_does_not_spoil_the_search(x64):
    """NaN where z_1 > 1.6, around the target: the rim is the best there is."""
    x, radius = jnp.array([2.0, 0.0]), 2.0
    keys, starts = keys_and_starts(radius, (2,), 16)
    outside = starts[:, 0] <= 1.6
    assert 0 < outside.sum() < 16
    search = sampling.search_noise(lambda z: z / (z[0] <= 1.6), x, radius)
    # 1 / False is infinite, its gradient NaN.
    result = np.asarray(jax.jit(jax.vmap(search))(keys))
    np.testing.assert_allclose(np.linalg.norm(result, axis=1), radius, rtol=1e-12)
    np.testing.assert_allclose(result[~outside], starts[~outside], rtol=1e-12)
    assert np.all(result[outside][:, 0] <= 1.6)
    np.testing.assert_allclose(result[outside][:, 0], 1.6, atol=0.05)


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_the_size_of_a_gradient_does_not_matter_to_the_search(size, key):
    """Its square leaves float32, its direction does not."""

    def flow(z):
        return jnp.sqrt(size) * z

    z0 = jnp.array([0.0, 2.0, 0.0])
    result = jax.jit(sampling.search_noise(flow, flow(z0), 2.0))(key)
    np.testing.assert_allclose(result, z0, atol=5e-3)


@pytest.mark.parametrize("radius, steps, lr", [(0.0, 9, 0.1), (1, 0, 0.1), (1, 9, -1)])
def test_a_search_without_length_is_refused(radius, steps, lr):
    with pytest.raises(ValueError, match=f"radius={radius}, steps={steps}, lr={lr} mu"):
        sampling.search_noise(lambda z: z, jnp.ones(2), radius, steps, lr)


def test_the_search_in_steps_is_the_search(key):
    flow = lambda z: jnp.tanh(z)  # noqa: E731 - a flow that no sphere maps onto x
    x = jnp.array([0.3, -0.8, 0.1])
    begin, step, count = sampling.search_stages(flow, x, 1.0, steps=5)
    state, step = jax.jit(begin)(key), jax.jit(step)
    for i in range(count):
        state = step(state, i)
    result = jax.jit(sampling.search_noise(flow, x, 1.0, steps=5))(key)
    np.testing.assert_allclose(sampling.best_noise(state), result, rtol=1e-6)


@SLOW_32
def test_flows_are_loops_over_their_steps(bits, real):
    """One Gaussian, -(x - alpha mu) / (alpha^2 s + v), with few and large steps."""
    made, formula = PROCESSES["variance_preserving"], FORMULAS["variance_preserving"]
    mean, variance, x = real(3), np.array([0.25, 1.0, 3.0]), real(3)
    times = np.array([0.75, 0.5, 0.25, 0.125, 0.0625])

    @jax.jit
    def ours(mean, variance, x, times):
        law = mixture.Mixture(jnp.zeros(1), mean[None], variance[None])
        score_fn = mixture.score(law, made)
        flows = [
            (
                sampling.path(score_fn, made, times, method)(x),
                sampling.ode(score_fn, made, times, method)(x),
            )
            for method in ("euler", "heun", "ddim")
        ]
        return flows, sampling.log_likelihood(score_fn, made, times)(x)

    def spread(t):
        return formula.alpha(t) ** 2 * variance + formula.sigma(t) ** 2

    def score_of(x, t):
        return -(x - formula.alpha(t) * mean) / spread(t)

    def slope(x, t):
        return formula.drift(t) * x - formula.rate(t) * score_of(x, t) / 2

    def trace(t):
        return 3 * formula.drift(t) + np.sum(formula.rate(t) / spread(t)) / 2

    def euler(x, t, later):
        return x + (later - t) * slope(x, t)

    def heun(x, t, later):
        return x + (later - t) * (slope(x, t) + slope(euler(x, t, later), later)) / 2

    def ddim(x, t, later):  # x0 and eps as they are believed to be, mixed again
        eps = -formula.sigma(t) * score_of(x, t)
        x0 = (x - formula.sigma(t) * eps) / formula.alpha(t)
        return formula.alpha(later) * x0 + formula.sigma(later) * eps

    flows, log_p = ours(mean, variance, x, times)
    assert sampling.ODE_METHODS == ("euler", "heun", "ddim")
    for step, result in zip((euler, heun, ddim), flows, strict=True):
        walk = [x]
        for t, later in zip(times[:-1], times[1:], strict=True):
            walk.append(step(walk[-1], t, later))
        v = formula.sigma(times[-1]) ** 2
        end = (walk[-1] + v * score_of(walk[-1], times[-1])) / formula.alpha(times[-1])
        for got, want in zip(result, (np.array(walk), end), strict=True):
            close(got, want, bits)

    gained, up = 0.0, times[::-1]
    for t, later in zip(up[:-1], up[1:], strict=True):
        x = heun(x, t, later)
        gained += (later - t) * (trace(t) + trace(later)) / 2
    prior = scipy.stats.norm.logpdf(x, 0, formula.sigma(times[0])).sum()
    close(log_p, prior + gained, bits)


@jax.jit
def flows(mean, variance, x, times, key):
    law = mixture.Mixture(jnp.zeros(1), mean[None], variance[None])
    score_fn = mixture.score(law, VE)
    return (
        sampling.path(score_fn, VE, times)(x),
        sampling.ode(score_fn, VE, times, "ddim")(x),
        sampling.sde(score_fn, VE, times)(x, key),
        sampling.edm(score_fn, VE, times, churn=1.0)(x, key),
    ), sampling.log_likelihood(score_fn, VE, times)(x)


@FEW
@given(SEEDS, SCALES)
def test_flows_move_with_their_start(x64, seed, s):
    """The noise that is added on the way scales with the times; the prior is at 0."""
    mean, variance, key = drawn(seed, D), drawn(seed, D) ** 2, jax.random.key(seed)
    times, x = np.array([3.0, 1.0, 0.5, 0.25]), 3 * drawn(seed + 1, D)
    ends, log_p = flows(mean, variance, x, times, key)
    for c in (0.0, 2.0):
        moved, there = flows(s * mean + c, s**2 * variance, s * x + c, s * times, key)
        alike(moved, jax.tree.map(lambda end, c=c: s * end + c, ends), 1e-8)
        if not c:
            alike(there, log_p - D * np.log(s), 1e-8)


def test_flows_have_the_gradients_of_their_differences(x64):
    """In the parameters of a score and in the start: for training through a sampler."""
    times = jnp.array([2.0, 0.9, 0.4, 0.1])

    def ends(matrix, x):
        def score_fn(x, t):
            return -jnp.tanh(matrix @ x) - x / (1 + t)

        return (
            sampling.ode(score_fn, OU, times)(x),
            sampling.log_likelihood(score_fn, OU, times)(x),
        )

    check_slopes(ends, drawn(2, D, D), drawn(0, D))
