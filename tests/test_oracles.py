"""Every public function of floor 0 against float64 NumPy, written from its definition.

`ORACLES` says where the oracle of each is: in this file, or in the tests of its room.
Here nothing of jax is in the truth, and sums are loops. What users run in float32 is
also compared in float32, of the very numbers that went in.
"""

import ast
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from memsep_jax import (
    empirical,
    gap,
    lipschitz,
    memorization,
    mixture,
    process,
    sampling,
    score,
)

ORACLES = {  # room: {test: the functions that it is the oracle of}
    "process": {
        "test_process.py::test_alpha_sigma_drift_and_diffusion_are_the_formulas": """
            ornstein_uhlenbeck variance_preserving variance_exploding rectified_flow
            drift diffusion2""",
        "test_process.py::test_laws_of_t_have_their_cdf": "uniform log_uniform beta",
        "test_process.py::test_log_normal_has_edms_moments": "log_normal",
        "test_a_process_is_its_formulas_and_their_inverse": """
            perturb noise_to_signal time_of on_clock""",
        "test_a_time_is_known_and_positive_or_refused": "is_known check_time",
    },
    "mixture": {
        "test_mixture.py::test_separated_means_have_the_papers_scale": "separated",
        "test_mixture.py::test_planes_add_variance_one_on_average": "low_rank",
        "test_mixture.py::test_the_gaussians_of_student_t_are_a_student_t": "student_t",
        "test_boxes_are_cubes_about_the_means_of_separated": "boxes",
        "test_a_diffused_mixture_is_a_sum_of_dense_normals": "diffuse log_prob score",
        "test_mixture.py::"
        "test_draws_have_the_characteristic_function_of_the_density": "sample",
    },
    "empirical": {
        "test_the_empirical_law_is_a_loop_over_its_points": """
            labelled posterior_weights posterior denoiser score log_prob jacobian""",
    },
    "score": {
        "test_all_units_of_a_score_are_those_of_the_table": """
            noise denoiser velocity score edm vp ddpm ve target from_network
            from_noise from_denoiser from_velocity to_denoiser""",
        "test_score.py::"
        "test_a_banded_score_is_one_inside_the_band_and_the_other_outside": "banded",
    },
    "gap": {
        "test_gap.py::test_an_estimate_is_a_mean_and_its_standard_error": "estimate",
        "test_gap.py::test_noised_points_are_training_points_and_their_noise": "noised",
        "test_losses_and_gaps_are_loops_over_draws": """
            eps_loss denoising_loss fisher sides loss_gap kl entropy_bound floor""",
        "test_gap.py::test_a_curve_has_a_time_and_a_key_at_each_point": "curve",
        "test_the_closed_forms_of_the_gap_are_their_sums": """
            integral kl_integral saturated saturated_integral one_point
            standard_normal information_bound effective_size collapse_time""",
        "test_the_spectrum_of_a_linear_score_is_its_closed_form": "spectrum",
        "test_gap.py::test_the_spectrum_in_pieces_is_the_spectrum": """
            spectrum_draws spectrum_losses spectrum_of""",
    },
    "lipschitz": {
        "test_norms_of_a_jacobian_are_its_singular_values": """
            spectral_norm exact_norm local""",
        "test_lipschitz.py::test_midway_between_two_points_the_norm_is_two_point": """
            jacobian_norm""",
        "test_lipschitz.py::"
        "test_the_frobenius_norm_of_random_signs_is_within_its_error": "frobenius",
        "test_lipschitz.py::"
        "test_along_a_flow_of_one_gaussian_each_time_has_its_own_norm": "along",
        "test_lipschitz.py::test_streamed_midpoints_are_those_of_all_sorted_pairs": """
            midpoints""",
        "test_lipschitz.py::test_segments_join_different_points": "segments",
        "test_bounds_are_loops_over_pairs": "two_point empirical_bounds",
        "test_lipschitz.py::"
        "test_the_bound_of_a_score_is_attained_by_a_linear_network": "network_bound",
    },
    "sampling": {
        "test_sampling.py::test_the_log_grid_has_equal_ratios": "log_times",
        "test_sampling.py::test_the_edm_grid_is_its_formula": "edm_times",
        "test_sampling.py::test_sampling_starts_from_the_noise_of_its_process": "prior",
        "test_flows_are_loops_over_their_steps": "ode path log_likelihood",
        "test_sampling.py::test_the_reverse_sde_ends_in_the_law_of_the_data": "sde",
        "test_sampling.py::test_churn_keeps_the_variance_of_the_data": "edm sampler",
        "test_sampling.py::test_the_search_finds_the_noise_that_leads_to_a_sample": """
            search_noise""",
        "test_sampling.py::test_the_stages_of_a_sampler_are_the_sampler": "stages",
        "test_sampling.py::test_the_search_in_steps_is_the_search": """
            search_stages best_noise""",
    },
    "memorization": {
        "test_the_ratio_is_a_loop_over_samples": """
            nearest_two memorized ratio ratio_of copied quotient""",
        "test_memorization.py::test_wilson_is_the_published_table": "wilson",
        "test_memorization.py::test_the_excess_is_the_published_table": "excess",
        "test_memorization.py::"
        "test_so_many_copies_by_chance_are_as_probable_as_fisher_says": "by_chance",
        "test_memorization.py::"
        "test_a_mirrored_copy_is_found_and_a_symmetric_one_is_not_flipped": """
            with_flips""",
        "test_memorization.py::test_calibrated_l2_by_hand": "calibrated_l2",
        "test_memorization.py::test_the_nearest_tiled_one_is_so_for_every_chunk": """
            nearest_tiled""",
        "test_memorization.py::test_authentic_samples_by_hand": "authentic",
        "test_memorization.py::test_the_tiled_distance_is_that_of_the_worst_tile": """
            tiled_l2""",
        "test_memorization.py::test_the_score_of_a_cell_is_that_of_scipy": """
            copying_test""",
        "test_memorization.py::test_fld_is_the_density_of_its_mixture": """
            feature_likelihood""",
        "test_memorization.py::test_emission_by_hand": "emitted",
        "test_memorization.py::test_fewer_samples_emit_the_mean_over_all_subsets": """
            rarefaction""",
        "test_memorization.py::test_emm_is_linear_in_log_n_between_the_sizes": """
            effective_memorization""",
        "test_memorization.py::test_the_interval_of_emm_covers_as_often_as_it_says": """
            effective_interval""",
        "test_memorization.py::"
        "test_the_nearest_non_increasing_curve_pools_what_rises": "decreasing",
        "test_memorization.py::"
        "test_the_search_finds_the_crossing_of_any_decreasing_curve": "next_size",
        "test_memorization.py::"
        "test_a_plateau_is_where_nothing_beats_the_best_before": "plateaued",
        "test_twins_are_loops_over_pairs": "reproducibility cosine",
    },
    "fidelity": {
        "test_fidelity.py::test_it_is_the_matrix_square_root_of_the_definition": """
            frechet""",
        "test_fidelity.py::test_balls_are_those_of_the_definition": """
            precision_recall density_coverage""",
        "test_fidelity.py::test_balls_are_both_of_their_metrics": "balls",
        "test_fidelity.py::test_kid_is_the_double_sum_of_its_definition": "kid",
        "test_fidelity.py::"
        "test_vendi_is_the_entropy_of_the_kernel_of_its_definition": "vendi",
        "test_fidelity.py::"
        "test_squared_distances_are_exact_for_copies_and_right_near_them": """
            squared_distances""",
    },
    "neighbours": {
        "test_neighbours.py::test_minus_zero_is_zero": "distinct",
        "test_neighbours.py::test_a_crowd_of_near_duplicates_is_told_apart": "nearest",
        "test_neighbours.py::test_the_search_agrees_with_brute_force": "searcher",
    },
}

HERE = Path(__file__)
PACKAGE = HERE.parent.parent / "memsep_jax"


@cache
def functions(source):
    """The functions of a file that are not private, by name."""
    nodes = ast.parse(source).body
    names = [n.name for n in nodes if isinstance(n, ast.FunctionDef)]
    return {name for name in names if not name.startswith("_")}


def complaints(room, source, oracles):
    """What is wrong between the functions of a room and the tests that answer."""
    answered = [name for names in oracles.values() for name in names.split()]
    for name in sorted(functions(source) ^ set(answered)):
        known = name in answered
        yield f"{room}.{name}: " + ("no such function" if known else "no oracle")
    for test, names in oracles.items():
        file, _, test = test.rpartition("::")
        text = (HERE.parent / (file or HERE.name)).read_text()
        if test not in functions(text):
            yield f"{file or HERE.name}: no {test}"
        for name in names.split():
            if not re.search(rf"\b{room}\.{name}\b|^from .*\b{name}\b", text, re.M):
                yield f"{file or HERE.name}: does not call {room}.{name}"


@pytest.mark.parametrize("room", ORACLES)
def test_every_public_function_has_an_oracle(room):
    source = (PACKAGE / f"{room}.py").read_text()
    assert not list(complaints(room, source, ORACLES[room]))


def test_a_function_without_an_oracle_is_seen():
    source = "def known(): ...\ndef fresh(): ...\ndef _own(): ..."
    known = {"test_a_function_without_an_oracle_is_seen": "drift"}
    assert list(complaints("process", "def drift(): ...", known)) == []
    assert list(complaints("process", source, known)) == [
        "process.drift: no such function",
        "process.fresh: no oracle",
        "process.known: no oracle",
    ]
    wrong = {"test_gap.py::test_nothing": "drift", "test_mixture.py::densities": "beta"}
    source = "def drift(): ...\ndef beta(): ..."
    assert list(complaints("process", source, wrong)) == [
        "test_gap.py: no test_nothing",
        "test_gap.py: does not call process.drift",
        "test_mixture.py: does not call process.beta",
    ]


# The two widths of numbers, and the processes in NumPy.

# To some 30 roundings in sums and products, and exponents of size 10.
RTOL = {64: 1e-10, 32: 3e-5}


@pytest.fixture(params=[64, 32])
def bits(request):
    with jax.enable_x64(request.param == 64):
        yield request.param


# Of what takes long to compile, the second width is for CI.
SLOW_32 = pytest.mark.parametrize(
    "bits", [64, pytest.param(32, marks=pytest.mark.slow)], indirect=True
)


@pytest.fixture
def real():
    """Normal numbers that float32 has too: both widths are asked the same."""
    rng = np.random.default_rng(7)
    return lambda *shape: np.float64(np.float32(rng.normal(size=shape)))


def close(found, truth, bits):
    """Of that width, and right to its rounding in units of the largest entry."""
    found, truth = jnp.asarray(found), np.asarray(truth)
    assert found.dtype == f"float{bits}" and truth.dtype == np.float64
    size = np.abs(truth).max()
    np.testing.assert_allclose(found, truth, RTOL[bits], RTOL[bits] * size)


class Formula(NamedTuple):
    """A process in NumPy; time is the inverse of noise = sigma / alpha."""

    alpha: Callable
    sigma: Callable
    drift: Callable
    rate: Callable  # g^2
    time: Callable

    def noise(self, t):
        return self.sigma(t) / self.alpha(t)


def integral(t):
    return 0.1 * t + 9.95 * t**2


FORMULAS = {
    "ornstein_uhlenbeck": Formula(
        lambda t: np.exp(-t / 2),
        lambda t: np.sqrt(1 - np.exp(-t)),
        lambda t: -0.5,
        lambda t: 1.0,
        lambda s: np.log(1 + s**2),
    ),
    "variance_preserving": Formula(
        lambda t: np.exp(-integral(t) / 2),
        lambda t: np.sqrt(1 - np.exp(-integral(t))),
        lambda t: -(0.1 + 19.9 * t) / 2,
        lambda t: 0.1 + 19.9 * t,
        lambda s: (np.sqrt(0.01 + 39.8 * np.log(1 + s**2)) - 0.1) / 19.9,
    ),
    "variance_exploding": Formula(
        lambda t: 1.0, lambda t: t, lambda t: 0.0, lambda t: 2 * t, lambda s: s
    ),
    "rectified_flow": Formula(
        lambda t: 1 - t,
        lambda t: t,
        lambda t: -1 / (1 - t),
        lambda t: 2 * t / (1 - t),
        lambda s: s / (1 + s),
    ),
}
PROCESSES = {name: make() for name, make in process.PROCESSES.items()}
OU, OU_FORMULA = PROCESSES["ornstein_uhlenbeck"], FORMULAS["ornstein_uhlenbeck"]
T = 0.40625  # float32 has it too


def test_a_process_is_its_formulas_and_their_inverse(bits, real):
    x0, eps, noise = *real(2, 3), 0.75

    @jax.jit
    def ours(x0, eps, t, noise):
        return {
            name: (
                process.perturb(made, x0, t, eps),
                process.noise_to_signal(made, t),
                process.time_of(made, noise),
                process.on_clock(lambda key: t, made, OU)(None),
            )
            for name, made in PROCESSES.items()
        }

    found = ours(x0, eps, T, noise)
    for name, made in FORMULAS.items():
        perturbed, ratio, time, moved = found[name]
        close(perturbed, made.alpha(T) * x0 + made.sigma(T) * eps, bits)
        close(ratio, made.noise(T), bits)
        close(time, made.time(noise), bits)
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


# Mixtures.


def test_boxes_are_cubes_about_the_means_of_separated(key):
    @jax.jit
    def ours(key):
        laws = mixture.boxes(key, 5, 3, 1.5, 0.75), mixture.boxes(key, 5, 3)
        return laws, mixture.separated(key, 5, 3, 1.5).means

    (found, default), centres = jax.tree.map(np.asarray, ours(key))
    np.testing.assert_allclose((found.low + found.high) / 2, centres, atol=1e-6)
    np.testing.assert_allclose(found.high - found.low, 0.75, rtol=1e-5)
    np.testing.assert_allclose(np.exp(found.log_weights), np.full(5, 0.2), rtol=1e-6)
    assert found.sigma == default.sigma == 0
    width = (default.high - default.low)[0, 0]
    assert scipy.stats.uniform(0, width).var() == pytest.approx(1, rel=1e-5)


def normals(weights, means, covariances, x):
    """log p and grad log p of a mixture of dense normals."""
    p, slope = 0.0, 0.0
    for w, mean, covariance in zip(weights, means, covariances, strict=True):
        share = w * scipy.stats.multivariate_normal.pdf(x, mean, covariance)
        p += share
        slope -= share * np.linalg.inv(covariance) @ (x - mean)
    return np.log(p), slope / p


@SLOW_32
def test_a_diffused_mixture_is_a_sum_of_dense_normals(bits, real):
    """With planes, and without."""
    weights, means, factors = np.array([0.5, 0.25, 0.25]), real(3, 4), real(3, 4, 2)
    variances, x = np.array([0.25, 0.5, 1.0, 4.0]) * np.ones((3, 4)), real(4)
    made, formula = PROCESSES["variance_preserving"], FORMULAS["variance_preserving"]

    @jax.jit
    def ours(means, variances, factors, x, t):
        law = mixture.Mixture(jnp.log(weights), means, variances, factors)
        return [
            (
                mixture.log_prob(mixture.diffuse(law, made, t), x),
                mixture.score(law, made)(x, t),
            )
            for law in (law, law._replace(factors=None))
        ]

    planes, plain = ours(means, variances, factors, x, T)
    a, v = formula.alpha(T), formula.sigma(T) ** 2
    for found, low in ((planes, factors), (plain, 0 * factors)):
        covariances = [
            a**2 * (np.diag(s) + f @ f.T) + v * np.eye(4)
            for s, f in zip(variances, low, strict=True)
        ]
        log_p, slope = normals(weights, a * means, covariances, x)
        close(found[0], log_p, bits)
        close(found[1], slope, bits)


# The noised training set.


def posterior(points, shares, a, v, x, temperature=1.0):
    """Weights [n], mean and score [d], Jacobian [d, d], as their sums say."""
    kernel = [np.exp(-np.sum((x - a * p) ** 2) / (2 * v * temperature)) for p in points]
    weights = shares * np.array(kernel) / np.sum(shares * np.array(kernel))
    mean, covariance = 0.0, 0.0
    for w, p in zip(weights, points, strict=True):
        mean += w * p
    for w, p in zip(weights, points, strict=True):
        covariance += w * np.outer(p - mean, p - mean)
    slope = (a / v) ** 2 / temperature * covariance - np.eye(len(x)) / v
    return weights, mean, (a * mean - x) / v, slope


def density(points, shares, a, v, x):
    """sum_i share_i N(x; a x_i, v I)."""
    return sum(
        w * np.prod(scipy.stats.norm.pdf(x, a * p, np.sqrt(v)))
        for w, p in zip(shares, points, strict=True)
    )


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
        found, (log_prob, law) = ours(data, x, t)
        flat, at = data.reshape(n, -1), x.ravel()
        truth = posterior(flat, shares, a, v, at, temperature)
        for got, want in zip(found, truth, strict=True):
            close(got, want, bits)
        weights, mean = truth[:2]
        close(law.mean.ravel(), mean, bits)
        close(law.entropy, scipy.stats.entropy(weights), bits)
        close(law.largest, weights.max(), bits)
        close(log_prob, np.log(density(flat, shares, a, v, at)), bits)


# Units of a score.

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

    found, units = ours(x, x0, eps, T)
    a, sigma = formula.alpha(T), formula.sigma(T)
    for (values, target, slope), column in zip(found, truth.values(), strict=True):
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


# The loss gap.


def mean_and_error(values):
    n, mean = len(values), sum(values) / len(values)
    spread = sum((value - mean) ** 2 for value in values) / (n - 1)
    return mean, np.sqrt(spread / n)


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

    found = ours(lam, offsets, data, T, times, errors)
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
        for got, want in zip(found[name], truth, strict=True):
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
    found = jax.tree.map(np.asarray, judge(*np.float32([data, held_out]), key))
    np.testing.assert_allclose(found.times, times)
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
        assert abs(found.train.value[i] - train.mean()) < 4 * error
        assert abs(found.held_out.value[i] - new.mean()) < 4 * new_error
        assert abs(found.floor.value[i] - least.mean()) < 4 * least_error
        missed = found.gap.value[i] - (least - train).mean()
        assert abs(missed) < 4 * (error + least_error)  # of the same noises
        # Over pairs: they differ by their points, and little by their noises.
        spread = np.hypot(mean_and_error(train)[1], error)
        assert found.train.error[i] == pytest.approx(spread, rel=0.2)
        flagged = found.gap.value[i] > 4 * found.gap.error[i]
        assert found.memorizes[i] == flagged


# Lipschitz constants.


@SLOW_32
def test_norms_of_a_jacobian_are_its_singular_values(bits, real):
    """Of x -> A x + t sin x, not symmetric, at three points."""
    matrix, xs = real(4, 4), real(3, 2, 2)

    @jax.jit
    def ours(matrix, xs, t, key):
        def field(x, t):
            return (matrix @ x.ravel()).reshape(2, 2) + t * jnp.sin(x)

        return (
            lipschitz.local(field, xs, t, key, 150),
            jax.vmap(lambda x: lipschitz.exact_norm(field, x, t))(xs),
            jax.vmap(lambda x: lipschitz.spectral_norm(field, x, t, key, 150))(xs),
        )

    largest, exact, norm = ours(matrix, xs, T, jax.random.key(1))
    truth = []
    for x in xs:
        singular = np.linalg.svd(matrix + T * np.diag(np.cos(x.ravel())))[1]
        assert singular[1] < 0.9 * singular[0]  # .81^150 is 2e-14
        truth.append(singular[0])
    for got in (exact, norm.value):
        close(got, np.array(truth), bits)
    close(largest, np.max(truth), bits)
    assert norm.converged.all()
    # Of first order in an angle to which rounding keeps the direction.
    assert np.all(norm.error < np.sqrt(RTOL[bits]) * np.array(truth))


def test_bounds_are_loops_over_pairs(bits, real):
    data = real(5, 2, 2)
    copies = np.concatenate([data, data[:1]])
    times = np.array([0.03125, 0.25, 0.9375])

    @jax.jit
    @jax.vmap
    def ours(t):
        bounds = [lipschitz.empirical_bounds(jnp.asarray(d), OU, t) for d in sets]
        return *bounds[0], *bounds[1], lipschitz.two_point(1.25, OU, t)

    sets = [data, copies]
    found = ours(times)
    for i, t in enumerate(times):
        a2, v = OU_FORMULA.alpha(t) ** 2, OU_FORMULA.sigma(t) ** 2
        truth = []
        for points in sets:
            n = len(points)
            squares = [
                np.sum((points[i] - points[j]) ** 2) for i in range(n) for j in range(i)
            ]
            apart = (n - 2) * np.exp(-a2 * min(squares) / (4 * v)) <= 2
            low = a2 * min(squares) / (16 * v**2) - 1 / v if apart else 1 / v
            truth.append(max(low, 1 / v))
            truth.append(max(a2 * max(squares) / (4 * v**2) - 1 / v, 1 / v))
        gap_of_two = np.array([1.25, 0.0])
        slope = a2 * np.outer(gap_of_two, gap_of_two) / (4 * v**2) - np.eye(2) / v
        truth.append(np.linalg.norm(slope, ord=2))
        for got, want in zip(found, truth, strict=True):
            close(got[i], np.float64(want), bits)


def test_the_papers_bound_waits_until_midpoints_are_those_of_two(x64):
    """Points on a line, 1 apart: (n - 2) exp(-E) <= 2, E = (alpha / 2)^2 / v."""
    n = 10_000
    data = jnp.arange(float(n))[:, None]
    times = [OU_FORMULA.time(1 / np.sqrt(4 * energy)) for energy in (8.4, 8.6)]
    bounds = jax.jit(lambda data, t: lipschitz.empirical_bounds(data, OU, t))
    for t, energy, holds in zip(times, (8.4, 8.6), (False, True), strict=True):
        v = OU_FORMULA.sigma(t) ** 2
        assert ((n - 2) * np.exp(-energy) <= 2) == holds
        low, high = bounds(data, t)
        close(low, np.float64((energy / 4 - 1 if holds else 1) / v), 64)
        close(high, np.float64((energy * (n - 1) ** 2 - 1) / v), 64)


# Flows.


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
    for step, found in zip((euler, heun, ddim), flows, strict=True):
        walk = [x]
        for t, later in zip(times[:-1], times[1:], strict=True):
            walk.append(step(walk[-1], t, later))
        v = formula.sigma(times[-1]) ** 2
        end = (walk[-1] + v * score_of(walk[-1], times[-1])) / formula.alpha(times[-1])
        for got, want in zip(found, (np.array(walk), end), strict=True):
            close(got, want, bits)

    gained, up = 0.0, times[::-1]
    for t, later in zip(up[:-1], up[1:], strict=True):
        x = heun(x, t, later)
        gained += (later - t) * (trace(t) + trace(later)) / 2
    prior = scipy.stats.norm.logpdf(x, 0, formula.sigma(times[0])).sum()
    close(log_p, prior + gained, bits)


# Memorization.


def two_nearest(x, data):
    """d1, d2 and the index of the nearest: the second is another point, not a copy."""
    distances = [np.sqrt(np.sum((x - y) ** 2)) for y in data]
    first = int(np.argmin(distances))
    others = [
        distance
        for distance, y in zip(distances, data, strict=True)
        if not np.array_equal(y, data[first])
    ]
    return distances[first], min(others), first


def test_the_ratio_is_a_loop_over_samples(bits, real):
    """Copies of points that occur twice, near copies, and points of their own."""
    data = real(9, 2, 2)
    data[7] = data[2]
    near = np.float64(np.float32(data[4] + 0.125 * real(2, 2)))
    samples = np.concatenate([data[[2, 5]], near[None], real(40, 2, 2)])
    held_out = real(43, 2, 2)
    truth = np.array([two_nearest(x, data) for x in samples])
    flags = truth[:, 0] < 0.4 * truth[:, 1]
    assert 3 < flags.sum() < 40

    @jax.jit
    def each(samples, data):
        return jax.vmap(
            lambda x: (
                memorization.nearest_two(x, data),
                memorization.memorized(x, data, 0.4),
            )
        )(samples)

    distances, same = each(samples, data)
    close(distances, truth[:, :2], bits)
    np.testing.assert_array_equal(same, flags)
    found = memorization.ratio(samples, data, held_out, threshold=0.4)
    close(found.neighbours.distances.astype(np.float32), truth[:, :2], 32)
    np.testing.assert_array_equal(found.neighbours.indices[:, 0], truth[:, 2])
    nulls = [two_nearest(x, data) for x in held_out]
    null = np.mean([d1 < 0.4 * d2 for d1, d2, _ in nulls])
    for one in (found, memorization.ratio_of(found.neighbours, None, 1, 0.4)):
        np.testing.assert_array_equal(one.memorized, flags)
        assert (one.value, one.duplicates) == (flags.mean(), 1)
        assert one.interval == memorization.wilson(int(flags.sum()), 43)
    assert (found.null, one.null) == (null, None)
    np.testing.assert_array_equal(memorization.copied(found.neighbours, 0.4), flags)
    d1, d2 = np.append(truth[:, 0], 0), np.append(truth[:, 1], 0)
    wanted = [a / b if b else 1 for a, b in zip(d1, d2, strict=True)]
    np.testing.assert_allclose(memorization.quotient(d1, d2), wanted, rtol=1e-15)


def test_twins_are_loops_over_pairs(real):
    b = real(8, 2, 2)
    b[6] = b[1]
    a = np.float64(np.float32(b + np.linspace(0, 1, 8)[:, None, None] * real(8, 2, 2)))
    moved, centre = b[[-1, *range(7)]], (sum(a) + sum(b)) / 16

    def angle(x, y):
        x, y = (x - centre).ravel(), (y - centre).ravel()
        return x @ y / np.sqrt((x @ x) * (y @ y))

    def close_to(x, y):
        d1, d2, first = two_nearest(x, b)
        return d1 < d2 / 3 and np.array_equal(b[first], y)

    found = memorization.reproducibility(a, b)
    flags = [close_to(x, y) for x, y in zip(a, b, strict=True)]
    null = np.mean([close_to(x, y) for x, y in zip(a, moved, strict=True)])
    np.testing.assert_array_equal(found.close, flags)
    assert (found.share, found.null) == (np.mean(flags), null)
    assert 2 <= sum(flags) < 8
    for got, other in ((found.cosine, b), (found.cosine_null, moved)):
        want = [angle(x, y) for x, y in zip(a, other, strict=True)]
        np.testing.assert_allclose(got, want, atol=1e-5)
        np.testing.assert_allclose(memorization.cosine(a, other, centre), want)
