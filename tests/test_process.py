"""alpha and sigma are the papers' formulas; drift and diffusion follow from them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import FORMULAS, OU, OU_FORMULA, PROCESSES, T, close

from memsep_jax import defaults, process
from memsep_jax.experiments.config import build

VP = PROCESSES["variance_preserving"]
N = 10_000


def test_alpha_sigma_drift_and_diffusion_are_the_formulas(x64):
    times = np.array([1e-4, 0.1, 0.5, 0.9])

    @jax.jit
    @jax.vmap
    def values(t):
        return {
            name: (
                made.alpha(t),
                made.sigma(t),
                process.drift(made, t),
                process.diffusion2(made, t),
            )
            for name, made in PROCESSES.items()
        }

    for name, columns in values(times).items():
        for column, formula in zip(columns, FORMULAS[name], strict=False):
            truth = [formula(t) for t in times]
            np.testing.assert_allclose(column, truth, rtol=1e-9, atol=1e-12)


def test_sigma_keeps_its_digits_in_float32_at_small_t():
    """sqrt(1 - exp(-t)) would lose them all: sigma -> sqrt(t)."""
    t = jnp.float32(1e-8)
    np.testing.assert_allclose(OU.sigma(t), 1e-4, rtol=1e-6)


def test_vp_runs_through_edms_range_of_noise(x64):
    """s = sqrt(exp(9.95 t^2 + .1 t) - 1), from .0010005 to 152.167 on [1e-5, 1]."""
    t = jnp.array([1e-5, 0.3, 1.0])
    s = process.noise_to_signal(VP, t)
    truth = np.sqrt(np.expm1(9.95 * np.asarray(t) ** 2 + 0.1 * np.asarray(t)))
    np.testing.assert_allclose(s, truth, rtol=1e-12)
    low, _, high = np.asarray(s)
    assert f"{low:.7f}" == "0.0010005" and f"{high:.3f}" == "152.167"


# Laws of t. The empirical CDF has standard error at most 1 / (2 sqrt(n)) anywhere.

CDFS = {
    "beta": (process.beta(0.8, 2.0), lambda u: 1.8 * u**0.8 - 0.8 * u**1.8),
    "beta to 3": (
        process.beta(0.8, 2.0, 3.0),
        lambda u: 1.8 * (u / 3) ** 0.8 - 0.8 * (u / 3) ** 1.8,
    ),
    "uniform": (process.uniform(0.5, 2.0), lambda u: (u - 0.5) / 1.5),
    "log_uniform": (
        process.log_uniform(0.02, 100.0),
        lambda u: np.log(u / 0.02) / np.log(5_000),
    ),
}


@pytest.mark.parametrize("name", CDFS)
def test_laws_of_t_have_their_cdf(name, key):
    law, cdf = CDFS[name]
    draws = np.sort(jax.jit(jax.vmap(law))(jax.random.split(key, N)))
    distance = np.abs(cdf(draws.astype(np.float64)) - (np.arange(N) + 0.5) / N).max()
    assert distance < 4 * 0.5 / np.sqrt(N)


def test_half_of_the_beta_law_is_where_the_paper_says():
    assert CDFS["beta"][1](0.5) == pytest.approx(0.80409, abs=1e-5)


def test_the_beta_law_has_mean_two_sevenths(key):
    draws = jax.jit(jax.vmap(process.beta(0.8, 2.0)))(jax.random.split(key, N))
    error = np.sqrt(0.8 * 2 / (2.8**2 * 3.8) / N)
    assert abs(draws.mean() - 2 / 7) < 4 * error


def test_log_normal_has_edms_moments(key):
    logs = jnp.log(jax.jit(jax.vmap(process.log_normal()))(jax.random.split(key, N)))
    assert abs(logs.mean() + 1.2) < 4 * 1.2 / np.sqrt(N)
    assert abs(logs.std() - 1.2) < 4 * 1.2 / np.sqrt(2 * N)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: process.variance_preserving(20.0, 0.1), "beta_max=0.1"),
        (lambda: process.variance_preserving(-1.0, 1.0), "beta_min=-1.0"),
        (lambda: process.uniform(1.0, 1.0), "t_min=1.0, t_max=1.0"),
        (lambda: process.uniform(-0.1, 1.0), "0 <= t_min < t_max"),
        (lambda: process.log_uniform(0.0, 1.0), "0 < t_min < t_max"),
        (lambda: process.beta(0.0, 2.0), "a=0.0"),
        (lambda: process.beta(1.0, 2.0, -1.0), "t_max=-1.0"),
        (lambda: process.log_normal(std=0.0), "std=0.0"),
    ],
)
def test_a_law_that_does_not_exist_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("made", [OU, process.rectified_flow()])
def test_the_time_of_a_noise_has_the_slope_of_the_inverse(made, x64):
    """d t / d noise = 1 / (d noise / d t), at t = 0.3."""
    noise, slope = jax.value_and_grad(lambda t: process.noise_to_signal(made, t))(0.3)
    inverse = jax.jit(jax.grad(lambda s: process.time_of(made, s)))(noise)
    np.testing.assert_allclose(inverse, 1 / slope, rtol=1e-10)


def test_a_law_on_another_clock_keeps_its_noise(x64):
    """u ~ Beta(.8, 2) on the VP clock is below .5 with 1.8 u^.8 - .8 u^1.8, u = .5."""
    vp, ou = process.variance_preserving(), process.ornstein_uhlenbeck()
    law = process.on_clock(process.beta(0.8, 2.0), vp, ou)
    keys = jax.random.split(jax.random.key(0), 20_000)
    t = jax.jit(jax.vmap(law))(keys)
    middle = process.time_of(ou, process.noise_to_signal(vp, 0.5))
    truth = 1.8 * 0.5**0.8 - 0.8 * 0.5**1.8
    share = np.mean(t < middle)
    assert abs(share - truth) < 4 * np.sqrt(truth * (1 - truth) / len(t))


def on_the_vp_clock(**changes):
    """The training of Gu 2023: VP's times and preconditioning, in EDM's frame."""
    config = defaults.smoke(defaults.train())
    config.data.update(name="mixture", d=3)
    config.model.name, config.prediction.name = "mlp", "vp"
    config.times.update(name="uniform", t_min=1e-5, t_max=1.0)
    config.times.clock = "variance_preserving"
    config.update_from_flattened_dict(changes)
    return config


def test_a_config_trains_on_the_clock_that_it_names():
    """t ~ U(1e-5, 1) of VP: what the network of the VP prediction sees is uniform."""
    parts = build.build(on_the_vp_clock())
    level = jax.jit(jax.vmap(lambda key: parts.prediction.level(parts.law(key))))
    level = np.sort(level(jax.random.split(jax.random.key(0), N))).astype(np.float64)
    distance = np.abs(level - (np.arange(N) + 0.5) / N).max()
    assert distance < 4 * 0.5 / np.sqrt(N)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"times.clock": "variance_preservin"}, "times.clock='variance_preservin' is"),
        (
            {"times.clock": "rectified_flow", "times.t_max": 2.0},
            "is outside of process rectified_flow",
        ),
    ],
)
def test_a_clock_that_cannot_tell_the_time_is_refused(changes, words):
    with pytest.raises(build.ConfigError, match=words):
        build.build(on_the_vp_clock(**changes))


def test_a_process_is_its_formulas_and_their_inverse(bits, real):
    (x0, eps), noises = real(2, 3), np.array([0.0078125, 0.75, 5.0])

    @jax.jit
    def ours(x0, eps, t, noises):
        return {
            name: (
                process.perturb(made, x0, t, eps),
                process.noise_to_signal(made, t),
                jax.vmap(lambda noise, made=made: process.time_of(made, noise))(noises),
                process.on_clock(lambda key: t, made, OU)(None),
            )
            for name, made in PROCESSES.items()
        }

    results = ours(x0, eps, T, noises)
    for name, made in FORMULAS.items():
        perturbed, ratio, time, moved = results[name]
        close(perturbed, made.alpha(T) * x0 + made.sigma(T) * eps, bits)
        close(ratio, made.noise(T), bits)
        close(time, made.time(noises), bits)
        close(moved, OU_FORMULA.time(made.noise(T)), bits)


def test_a_time_is_known_and_positive_or_refused():
    for t in (1e-30, 3, np.float32(0.1), np.ones(()), jnp.ones(())):
        assert process.is_known(t)
        process.check_time(t)
    for t in (0, -1.0, np.inf, -np.inf, np.nan, jnp.zeros(())):
        with pytest.raises(ValueError, match=f"t={t} must be positive and finite"):
            process.check_time(t)

    @jax.jit
    def traced(t):
        assert not process.is_known(t) and not process.is_known(1.0, t)
        process.check_time(t)
        return t

    assert traced(-1.0) == -1
