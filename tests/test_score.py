"""Noise, denoiser, velocity and score say the same thing in different units."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import FORMULAS, PROCESSES, SLOW_32, T, close

from memsep_jax import empirical, mixture, process, score, train

EACH = pytest.mark.parametrize("name", PROCESSES)
DATA = np.random.default_rng(0).normal(size=(5, 3))
X = np.array([0.3, -0.8, 1.1])
STEPS = np.sqrt(1 / np.cumprod(1 - np.linspace(1e-4, 0.02, 1_000)) - 1)  # of DDPM
LEVELS = {  # c_noise of Karras 2022, table 1, of s; VP's divided by 999
    "vp": lambda s: (np.sqrt(0.1**2 + 2 * 19.9 * np.log1p(s**2)) - 0.1) / 19.9,
    "ve": lambda s: np.log(s / 2),
    "ddpm": lambda s: np.interp(np.log(s), np.log(STEPS), np.arange(1_000)) / 1_000,
}


@pytest.mark.parametrize("weight", [0.0, 1.0, 3.0])
def test_guidance_between_two_gaussians_is_a_tanh(weight, x64):
    """Classes N(m, 1) and N(-m, 1): in the OU process the variance stays 1, the mean is
    a m, and s(x | label) - s(x) = a m - a m tanh(a m x)."""
    made, m, t, x = process.ornstein_uhlenbeck(), 1.5, 0.4, jnp.array([0.3])
    classes = [
        mixture.Mixture(*map(jnp.asarray, ([0.0], [[sign * m]], [[1.0]])))
        for sign in (1, -1)
    ]
    both = mixture.Mixture(
        jnp.log(jnp.full(2, 0.5)), jnp.array([[m], [-m]]), jnp.ones((2, 1))
    )
    scores = [mixture.score(law, made) for law in (classes[0], both)]
    guided = jax.jit(score.guided(*scores, weight))(x, t)
    am, x = np.exp(-t / 2) * m, np.asarray(x)
    free = am * np.tanh(am * x) - x
    close(guided, free + weight * (am - am * np.tanh(am * x)), 64)


def truth(made):
    """The empirical score of five points, as good a score as any."""
    return empirical.score(jnp.asarray(DATA), made)


@EACH
def test_velocity_is_the_slope_of_the_flow(name, x64):
    """dx/dt = f x - g^2 score / 2 = E[alpha' x0 + sigma' eps | x]."""
    made, t = PROCESSES[name], 0.3

    @jax.jit
    def both(x):
        of, g2 = truth(made)(x, t), process.diffusion2(made, t)
        slope = process.drift(made, t) * x - g2 * of / 2
        return score.from_velocity(lambda x, t: slope, made)(x, t), of

    np.testing.assert_allclose(*both(X), rtol=1e-10)


@EACH
def test_a_network_that_answers_the_target_has_the_score(name, x64):
    """score = -eps / sigma, in all units; targets are what their names say."""
    made, (x0, eps) = PROCESSES[name], jnp.asarray([DATA[0], X])

    @jax.jit
    @jax.vmap
    def at(t):
        predictions = {}
        for kind, make in score.PREDICTIONS.items():
            of, shown = make(made), []
            target = score.target(of, made, x0, t, eps)

            def network(x, level, target=target, shown=shown):
                shown.extend([x, level])
                return target

            x = process.perturb(made, x0, t, eps)
            slope = score.from_network(network, of, made)(x, t)
            predictions[kind] = target, slope, *shown, of.scale(t) * x
        rates = jax.grad(made.alpha)(t), jax.grad(made.sigma)(t)
        sigma, s = made.sigma(t), process.noise_to_signal(made, t)
        return predictions, rates[0] * x0 + rates[1] * eps, -eps / sigma, s

    predictions, velocity, truth, s = at(jnp.array([1e-4, 0.1, 0.9]))
    named = {
        "noise": jnp.broadcast_to(eps, truth.shape),
        "denoiser": jnp.broadcast_to(x0, truth.shape),
        "velocity": velocity,
        "score": truth,
        "vp": jnp.broadcast_to(eps, truth.shape),
        "ve": jnp.broadcast_to(-eps, truth.shape),
    }
    for kind, (target, slope, x, level, scaled) in predictions.items():
        np.testing.assert_allclose(slope, truth, rtol=1e-6, err_msg=kind)
        level_of = LEVELS.get(kind, lambda s: np.log(s) / 4)
        np.testing.assert_allclose(level, level_of(np.asarray(s)), rtol=1e-9)
        np.testing.assert_allclose(x, scaled, rtol=1e-12)
        if kind in named:
            np.testing.assert_allclose(target, named[kind], rtol=1e-6, err_msg=kind)


@EACH
def test_edm_gives_inputs_and_targets_unit_variance(name, x64):
    """For data of variance sigma_data^2: both are linear in x0 and eps."""
    made = PROCESSES[name]

    def variances(t, sigma_data):
        edm = score.edm(made, sigma_data)

        def variance(of):
            x0, eps = jax.grad(of, (0, 1))(0.3, -1.2)
            return (x0 * sigma_data) ** 2 + eps**2

        return (
            variance(lambda x0, eps: score.target(edm, made, x0, t, eps)),
            variance(lambda x0, eps: edm.scale(t) * process.perturb(made, x0, t, eps)),
        )

    times = np.array([1e-3, 0.3, 0.95])
    found = jax.jit(
        lambda t: [jax.vmap(variances, (0, None))(t, s) for s in (0.5, 2.2)]
    )
    np.testing.assert_allclose(found(times), 1, rtol=1e-9)


@EACH
def test_the_error_of_the_denoiser_has_the_weight_of_the_paper(name, x64):
    """F's is lambda c_out^2, with lambda = 1/s^2, or EDM's (s^2 + d^2)/(s d)^2."""
    made, d = PROCESSES[name], 0.5

    @jax.jit
    def both(t):
        s = made.sigma(t) / made.alpha(t)
        laws = {"vp": 1 / s**2, "ve": 1 / s**2, "edm": (s**2 + d**2) / (s * d) ** 2}
        of = {kind: score.PREDICTIONS[kind](made) for kind in laws}
        weights = [of[kind].weight(t) for kind in laws]
        return weights, [law * of[kind].out(t) ** 2 for kind, law in laws.items()]

    np.testing.assert_allclose(*both(np.array([1e-4, 0.1, 0.9])), rtol=1e-12)


@EACH
def test_the_level_of_vp_is_the_time_of_the_vp_process(name):
    """In float32 too, on the whole of (0, 1], whatever the process."""
    made, clock = PROCESSES[name], process.variance_preserving()
    time = np.float32(np.geomspace(1e-5, 1, 9) if name != "rectified_flow" else [0.01])

    @jax.jit
    @jax.vmap
    def level(u):
        t = process.time_of(made, process.noise_to_signal(clock, u))
        return score.vp(made).level(t)

    np.testing.assert_allclose(level(time), time, rtol=2e-5)


def test_the_level_of_ddpm_is_a_thousandth_of_its_step(x64):
    """x_k = sqrt(alpha_bar_k) x_0 + sqrt(1 - alpha_bar_k) eps, Ho 2020, eq. 4."""
    steps = np.array([0, 1, 250, 998, 999])
    for made in (process.variance_exploding(), process.variance_preserving()):
        of = score.ddpm(made)

        @jax.jit
        @jax.vmap
        def at(s, made=made, of=of):
            t = process.time_of(made, s)
            return 1_000 * of.level(t), of.scale(t) * made.alpha(t)

        result, scale = at(STEPS[steps])
        np.testing.assert_allclose(result, steps, rtol=1e-6, atol=1e-4)
        np.testing.assert_allclose(scale, 1 / np.hypot(1, STEPS[steps]), rtol=1e-6)


@pytest.mark.parametrize(
    "name, kind", [*zip(2 * [*PROCESSES], score.PREDICTIONS, strict=True)]
)
def test_the_posterior_mean_minimises_every_loss(name, kind, x64):
    """Data {-b, b}: at F of the true denoiser the loss is stationary, to 1e-9.

    The expectation over eps is a Gauss-Hermite sum, exact to rounding.
    """
    made, t, b = PROCESSES[name], jnp.asarray(0.6), 0.7
    prediction = score.PREDICTIONS[kind](made)
    denoise = empirical.denoiser(jnp.array([[-b], [b]]), made)
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    eps, weights = jnp.asarray(nodes), jnp.asarray(weights / weights.sum())

    def loss(change):
        def network(scaled, level):
            x = scaled / prediction.scale(t)
            best = (denoise(x, t) - prediction.skip(t) * x) / prediction.out(t)
            return best + change[0] + change[1] * x + change[2] * jnp.sin(x)

        def one(x0, eps):
            return train.prediction_loss(
                network, prediction, made, x0[None], t, eps[None]
            )

        both = jax.vmap(jax.vmap(one, (None, 0)), (0, None))(jnp.array([-b, b]), eps)
        return jnp.mean(both @ weights)

    value, slope = jax.jit(jax.value_and_grad(loss))(jnp.zeros(3))
    assert value > 1e-3
    np.testing.assert_allclose(slope / value, 0, atol=1e-8)
    curvature = jax.jit(jax.hessian(loss))(jnp.zeros(3))
    assert np.linalg.eigvalsh(curvature).min() > 0


@EACH
def test_the_noise_loss_and_the_score_loss_are_one(name, x64):
    """sigma^2 |s - target|^2 = |F - eps|^2."""
    made, t, (x0, eps) = PROCESSES[name], jnp.asarray(0.3), jnp.asarray(DATA[:2])

    def answer(x, level):
        return jnp.cos(x) + level

    def as_score(x, level):
        return -answer(x, level) / made.sigma(t)

    kinds = score.noise(made), score.score(made)
    one = train.prediction_loss(answer, kinds[0], made, x0, t, eps)
    other = train.prediction_loss(as_score, kinds[1], made, x0, t, eps)
    np.testing.assert_allclose(one, other, rtol=1e-10)


def test_the_score_of_noise_keeps_its_digits_in_float32():
    """At sigma = 1e-3, where (alpha D - x) / sigma^2 has lost four of them."""
    made, t = process.variance_exploding(), jnp.float32(1e-3)
    x0, eps = jnp.float32(DATA[0]), jnp.float32(X)
    x = process.perturb(made, x0, t, eps)
    for kind in ("noise", "score", "vp", "ve"):
        prediction = score.PREDICTIONS[kind](made)
        answer = score.target(prediction, made, x0, t, eps)
        result = score.from_network(lambda x, level, f=answer: f, prediction, made)(
            x, t
        )
        np.testing.assert_allclose(result, -X / 1e-3, rtol=1e-5, err_msg=kind)


def test_data_without_spread_are_refused():
    with pytest.raises(ValueError, match="sigma_data=0"):
        score.edm(process.variance_exploding(), 0)


def test_a_banded_score_is_one_inside_the_band_and_the_other_outside():
    """Half open; a band that wraps around is the rest of another band."""

    def one(x, t):
        return x + t

    def other(x, t):
        return -x

    @jax.jit
    def is_inside(low, high, t):
        x = jnp.ones(2)
        result = score.banded(one, other, low, high)(x, t)
        return jnp.all(result == one(x, t))

    times = jnp.array([0.1, 0.2, 0.3, 0.4, 8.0])
    for low, high, want in (
        (0.2, 0.4, [False, True, True, False, False]),
        (0.4, 0.2, [True, False, False, True, True]),
        (0.0, jnp.inf, [True] * 5),
        (jnp.inf, 0.0, [False] * 5),
        (0.3, 0.3, [False] * 5),
    ):
        assert [bool(is_inside(low, high, t)) for t in times] == want


BETAS = np.linspace(1e-4, 0.02, 1_000)  # of DDPM's 1,000 steps


def ddpm_step(s):
    """Ho 2020: 1 / alpha_bar - 1 = s^2 at the step; linear in log s in between."""
    noise = [np.sqrt(1 / kept - 1) for kept in np.cumprod(1 - BETAS)]
    return np.interp(np.log(s), np.log(noise), np.arange(1_000))


def table(made, t, spread=0.5):
    """skip, out, scale, level, weight of each prediction."""
    a, sigma, s = made.alpha(t), made.sigma(t), made.noise(t)
    rise, root = made.drift(t) * a, np.sqrt(s**2 + spread**2)
    grow = (made.rate(t) / 2 + made.drift(t) * sigma**2) / sigma  # sigma'
    det, level = a * grow - rise * sigma, np.log(s) / 4
    unit = 1 / np.hypot(a, sigma)
    time = FORMULAS["variance_preserving"].time(s)
    return {
        score.noise: (1 / a, -s, 1, level, 1),
        score.denoiser: (0, 1, 1, level, 1),
        score.velocity: (grow / det, -sigma / det, 1, level, 1),
        score.score: (1 / a, sigma**2 / a, 1, level, sigma**2),
        score.edm: (
            spread**2 / root**2 / a, s * spread / root, 1 / root / a, level, 1,
        ),
        score.vp: (1 / a, -s, unit, time, 1),
        score.ddpm: (1 / a, -s, unit, ddpm_step(s) / 1_000, 1),
        score.ve: (1 / a, s, 1 / a, np.log(s / 2), 1),
    }  # fmt: skip


def network(x, level):
    return 3 * x + level  # the same in NumPy and jax


@SLOW_32
def test_all_units_of_a_score_are_those_of_the_table(bits, real):
    made, formula = PROCESSES["variance_preserving"], FORMULAS["variance_preserving"]
    truth, (x, x0, eps) = table(formula, T), real(3, 4)
    assert set(truth) == set(score.PREDICTIONS.values())

    @jax.jit
    def ours(x, x0, eps, t):
        predictions = [
            (
                jnp.stack([value(t) for value in of]),
                score.target(of, made, x0, t, eps),
                score.from_network(network, of, made)(x, t),
            )
            for of in (make(made) for make in truth)
        ]
        return predictions, (
            score.from_noise(network, made)(x, t),
            score.from_denoiser(network, made)(x, t),
            score.from_velocity(network, made)(x, t),
            score.to_denoiser(network, made)(x, t),
        )

    result, units = ours(x, x0, eps, T)
    a, sigma = formula.alpha(T), formula.sigma(T)
    for (values, target, slope), column in zip(result, truth.values(), strict=True):
        skip, out, scale, level, _ = column
        close(values, np.float64(column), bits)
        close(target, (x0 - skip * (a * x0 + sigma * eps)) / out, bits)
        answer = skip * x + out * network(scale * x, level)
        close(slope, (a * answer - x) / sigma**2, bits)
    (skip, out, *_), f = truth[score.velocity], network(x, T)
    formulas = (
        -f / sigma,
        (a * f - x) / sigma**2,
        (a * (skip * x + out * f) - x) / sigma**2,
        (x + sigma**2 * f) / a,
    )
    for got, want in zip(units, formulas, strict=True):
        close(got, want, bits)
