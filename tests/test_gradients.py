"""Derivatives of every public pure function: finite, also at edge inputs, or refused.

A row is differentiated by all of its floats at once. Times are above 0, where sigma and
most scores have no derivative, and below 1, where a rectified flow has alpha 0.
"""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memsep_jax import (
    analytic,
    empirical,
    fidelity,
    gap,
    lipschitz,
    memorization,
    mixture,
    neighbours,
    process,
    prune,
    roots,
    sampling,
    score,
    train,
)
from memsep_jax.gap import Estimate
from memsep_jax.memorization import detectors, membership
from memsep_jax.mixture import Boxes, Mixture
from memsep_jax.models import alexnet, mlp
from memsep_jax.train import objectives

ROOMS = (
    process, mixture, empirical, analytic, score, gap, lipschitz, sampling, prune,
    objectives, roots, membership, detectors,
)  # fmt: skip

OU = process.ornstein_uhlenbeck()
PROCESSES = [make() for make in process.PROCESSES.values()]
PREDICTIONS = score.PREDICTIONS.values()

T, EARLY, LATE = 0.5, 1e-3, 0.999
TIMES = np.float32([0.9, 0.5, 0.1])
X, ZERO, FAR = np.float32([0.3, -0.2]), np.zeros(2, np.float32), np.full(2, 9.0)
DATA = np.float32([[1, 0], [0, 1], [-1, 0.5], [0.5, 0.5]])
TWINS, SAME = DATA[[0, 1, 1, 2]], np.ones((4, 2), np.float32)
EVEN, SOME = np.zeros(4, np.float32), np.float32([0, -1, -np.inf, 0.5])  # log-weights
ALONE = np.float32([0, -np.inf, -np.inf, -np.inf])

GAUSSIAN = Mixture(np.zeros(1), ZERO[None], np.ones((1, 2)))
PLANES = Mixture(np.log([0.5, 0.5]), DATA[:2], np.full((2, 2), 0.1), np.ones((2, 2, 1)))
PLANE = PLANES._replace(variances=np.zeros((2, 2)))  # without a density
BOX = Boxes(np.zeros(1), ZERO[None], SAME[:1], 0.0)
SOFT = BOX._replace(sigma=0.1)
LAWS = GAUSSIAN, PLANES, BOX


def key():
    return jax.random.key(0)


def linear(x, t):
    return -x / (1 + t)


def nothing(x, t):
    """A score whose Jacobian is 0, and that is 0 itself."""
    return 0 * x


SCORES = linear, nothing


def near_twins(x, t):
    return empirical.score(TWINS, OU)(x, t)


def each(function, things):
    """The function of every thing, and of the arguments of a row."""
    return lambda *row: [function(thing, *row) for thing in things]


AT = (X, T), (ZERO, EARLY)
NOISED = (X, T, X), (ZERO, EARLY, ZERO), (DATA[0], LATE, ZERO)
MANY = (DATA, T), (SAME, EARLY), (0 * SAME, T)
ALONG = (X, TIMES), (ZERO, TIMES)
NOW = (T,), (EARLY,), (LATE,)
POINTS = [
    (data, x, t, log_weights)
    for data, log_weights in ((DATA, EVEN), (TWINS, SOME), (SAME, EVEN), (DATA, ALONE))
    for x in (X, DATA[1], FAR)
    for t in (T, EARLY)
]
# One law, as the others are compiled for long; they have rows of their own.
DRAWN = [
    (GAUSSIAN, data, t, log_weights)
    for data, t in ((DATA, T), (TWINS, EARLY), (SAME, T))
    for log_weights in (EVEN, SOME)
]
IMAGES = np.float32(np.cos(np.arange(36))).reshape(4, 3, 3, 1)
PICTURES = [
    (images, x, t, log_weights)
    for images, log_weights in ((IMAGES, SOME), (0 * IMAGES, EVEN), (IMAGES, ALONE))
    for x in (IMAGES[0] + 0.1, IMAGES[1], IMAGES[2] + 9)
    for t in (T, EARLY)
]


def streamed(make):
    return lambda data, x, t, w: make(data, OU, 3, log_weights=w)(x, t)


def of_draws(measure):
    return lambda law, data, t, w: measure(law, data, OU, t, key(), 4, log_weights=w)


def a_search(x):
    flows = [partial(flow, t=T) for flow in SCORES]  # nothing: a gradient of 0
    return [sampling.search_noise(flow, x, 2.0, 3)(key()) for flow in flows]


def a_walk(x, times):
    """All steps of all samplers, the last one too."""
    churned = {"churn": 1.0, "churn_min": 0.2, "churn_max": 1.0}  # in some steps only
    ways = [("heun", {}), ("sde", {}), ("edm", churned)]
    made = [
        sampling.stages(linear, OU, times, (2,), way, **options)
        for way, options in ways
    ]
    return [step(x, key(), i) for _, step, count in made for i in range(count)]


def an_mlp(kernel, output):
    names = ("input", "block_0_in", "block_0_out")
    dense = {name: {"kernel": kernel} for name in names}
    return mlp.lipschitz_bound(dense | {"output": {"kernel": output}})


# The function of a row of arrays, and the rows; or those of each kind of argument.
FINITE = {
    "process.PROCESSES": (each(lambda p, t: (p.alpha(t), p.sigma(t)), PROCESSES), NOW),
    "process.variance_preserving": (
        lambda low, high, t: [
            f(t) for f in process.variance_preserving(low, high)
        ],
        [(0.1, 20.0, T), (0.0, 20.0, EARLY)],
    ),
    "process.uniform": (
        lambda *row: process.uniform(*row)(key()),
        [(0.0, 1.0), (1e-3, 1.0)],
    ),
    "process.log_uniform": (
        lambda *row: process.log_uniform(*row)(key()),
        [(1e-3, 80.0)],
    ),
    "process.beta": (lambda *row: process.beta(*row)(key()), [(0.8, 2.0, 1.0)]),
    "process.log_normal": (
        lambda *row: process.log_normal(*row)(key()),
        [(-1.2, 1.2), (0.0, 1e-3)],
    ),
    "process.perturb": (each(process.perturb, PROCESSES), NOISED),
    "process.drift": (each(process.drift, PROCESSES), NOW),
    "process.diffusion2": (each(process.diffusion2, PROCESSES), NOW),
    "process.noise_to_signal": (each(process.noise_to_signal, PROCESSES), NOW),
    "process.time_of": (
        each(process.time_of, PROCESSES),
        [(1.0,), (80.0,), (0.0,), (1e9,)],  # the last two are never reached
    ),
    "process.on_clock": (
        lambda t: process.on_clock(lambda key: t, PROCESSES[1], OU)(key()),
        NOW,
    ),
    "mixture.LAWS": (
        lambda scale: [make(key(), 2, 3, scale) for make in mixture.LAWS.values()],
        [(2.0,), (0.0,)],
    ),
    "mixture.diffuse": (
        lambda *row: [mixture.diffuse(law, OU, row[-1]) for law in row[:-1]],
        [(*LAWS, T), (*LAWS, EARLY)],
    ),
    "mixture.Boxes.moved": (Boxes.moved, [(BOX, 1.0, 0.0), (SOFT, 0.0, 0.0)]),
    "mixture.log_prob": (
        mixture.log_prob,
        *[[(law, x) for x in (X + 0.5, ZERO)] for law in LAWS],
        [(SOFT, X), (SOFT, ZERO), (SOFT, FAR)],
    ),
    "mixture.score": (
        lambda law, x, t: mixture.score(law, OU)(x, t),
        *[[(law, x, t) for x in (X, ZERO, FAR) for t in (T, EARLY)] for law in LAWS],
        [(PLANE, X, T), (PLANE, DATA[0], T)],
    ),
    "mixture.sample": (
        lambda law: mixture.sample(key(), law, 3),
        *[[(law,)] for law in (*LAWS, PLANE)],
    ),
    "empirical.posterior_weights": (
        lambda data, x, t, w: empirical.posterior_weights(data, OU, x, t, w, 2.0),
        POINTS,
    ),
    "empirical.posterior": (streamed(empirical.posterior), POINTS),
    "empirical.denoiser": (streamed(empirical.denoiser), POINTS),
    "empirical.score": (streamed(empirical.score), POINTS),
    "empirical.log_prob": (streamed(empirical.log_prob), POINTS),
    "empirical.jacobian": (
        lambda data, x, t, w: empirical.jacobian(data, OU, x, t, w),
        POINTS,
    ),
    **{
        f"analytic.{name}": (
            lambda images, x, t, w, make=make: make(
                images, OU, 3, 3, log_weights=w
            )(x, t),
            PICTURES,
        )
        for name, make in {
            "local": analytic.local, "equivariant_local": analytic.equivariant_local,
        }.items()
    },
    "analytic.gaussian": (  # the data cannot be traced
        each(lambda data, x, t: analytic.gaussian(data, OU)(x, t), (DATA, SAME)), AT,
    ),
    "analytic.covariance_local": (
        each(
            lambda data, x, t: analytic.covariance_local(data, OU, 0.1)(x, t),
            (DATA, TWINS, SAME),
        ),
        AT,
    ),
    "score.PREDICTIONS": (
        each(
            lambda make, t: [[f(t) for f in make(p)] for p in PROCESSES], PREDICTIONS
        ),
        NOW,
    ),
    "score.target": (
        each(lambda make, *row: score.target(make(OU), OU, *row), PREDICTIONS),
        NOISED,
    ),
    "score.from_network": (
        each(lambda f, x, t: score.from_network(f, score.edm(OU), OU)(x, t), SCORES),
        AT,
    ),
    "score.from_noise": (lambda x, t: score.from_noise(nothing, OU)(x, t), AT),
    "score.from_denoiser": (lambda x, t: score.from_denoiser(nothing, OU)(x, t), AT),
    "score.from_velocity": (lambda x, t: score.from_velocity(nothing, OU)(x, t), AT),
    "score.to_denoiser": (lambda x, t: score.to_denoiser(nothing, OU)(x, t), AT),
    "score.guided": (lambda x, t: score.guided(nothing, nothing, 2.0)(x, t), AT),
    "score.banded": (
        lambda x, t, *band: score.banded(linear, nothing, *band)(x, t),
        [(X, T, 0.1, 0.9), (X, T, T, T), (X, T, 0.9, 0.1)],
    ),
    "gap.estimate": (gap.estimate, [(X,), (ZERO,), (ZERO + 1,)]),
    "gap.noised": (
        lambda data, t, w: gap.noised(key(), data, OU, t, 3, log_weights=w),
        [(DATA, T, SOME), (DATA, EARLY, ALONE)],
    ),
    "gap.eps_loss": (each(lambda f, *row: gap.eps_loss(f, OU, *row), SCORES), NOISED),
    "gap.denoising_loss": (
        each(lambda f, x, e, t: gap.denoising_loss(f, x, e, OU, t), SCORES),
        [(DATA, DATA, T), (SAME, 0 * SAME, EARLY)],
    ),
    "gap.fisher": (each(lambda f, *row: gap.fisher(f, nothing, *row), SCORES), MANY),
    "gap.sides": (of_draws(gap.sides), DRAWN),
    "gap.loss_gap": (of_draws(gap.loss_gap), DRAWN),
    "gap.kl": (of_draws(gap.kl), DRAWN),
    "gap.entropy_bound": (of_draws(gap.entropy_bound), DRAWN),
    "gap.curve": (
        lambda times: gap.curve(lambda t, key: linear(X, t), times, key()),
        [(TIMES,)],
    ),
    "gap.integral": (gap.integral, [(TIMES, TIMES), (TIMES, 0 * TIMES)]),
    "gap.kl_integral": (
        lambda times, *gaps: gap.kl_integral(times, Estimate(*gaps), OU),
        [(TIMES, TIMES, TIMES), (TIMES, 0 * TIMES, 0 * TIMES)],
    ),
    "gap.saturated": (lambda e, t: gap.saturated(e, OU, t), AT),
    "gap.saturated_integral": (
        lambda e, *ends: gap.saturated_integral(e, OU, *ends),
        [(X**2, EARLY, T), (ZERO, T, T)],
    ),
    "gap.one_point": (
        lambda e, o, t: gap.one_point(e, o, OU, t),
        [(X**2, X, T), (ZERO, ZERO, EARLY)],
    ),
    "gap.standard_normal": (
        lambda i, data, t: gap.standard_normal(i, data, OU, t),
        [(1.0, DATA, T), (0.0, 0 * SAME, EARLY)],
    ),
    "gap.information_bound": (
        lambda e, t, n: gap.information_bound(e, OU, t, n),
        [(X**2, T, 4.0), (ZERO, EARLY, 1.0)],
    ),
    "gap.effective_size": (
        gap.effective_size,
        [(EVEN,), (SOME,), (ALONE,), (np.float32([0, -200, -90, -400]),)],
    ),
    "gap.collapse_time": (
        lambda *row: gap.collapse_time(*row, OU),
        [(100.0, 2.0, 4.0), (3.0, 1.0, 3e3)],
    ),
    "gap.floor": (each(lambda f, x, t: gap.floor(f, OU, x, t), SCORES), MANY),
    "gap.floor_of": (lambda s, t: gap.floor_of(s, OU, t), MANY),
    "gap.spectrum": (
        each(
            lambda f, *row: gap.spectrum(f, OU, *row, key(), 4, truth_score=linear),
            SCORES,
        ),
        [(DATA, DATA + 1, TIMES), (SAME, SAME, TIMES)],
    ),
    "gap.spectrum_losses": (
        each(lambda f, *row: gap.spectrum_losses(f, OU, *row, key(), linear), SCORES),
        [(X, X, T), (ZERO, ZERO, EARLY)],
    ),
    "gap.spectrum_of": (
        lambda times, losses: gap.spectrum_of(times, losses, 2),
        [(TIMES, np.ones((3, 4, 2))), (TIMES, np.arange(24.0).reshape(3, 4, 2))],
    ),
    **{
        f"lipschitz.{name}": (
            each(
                lambda f, x, t, norm=norm: norm(f, x, t, key()),
                (*SCORES, near_twins),
            ),
            [*AT, (DATA[1], T)],
        )
        for name, norm in {
            "spectral_norm": partial(lipschitz.spectral_norm, iters=5),
            "jacobian_norm": partial(lipschitz.jacobian_norm, iters=5, symmetric=True),
            "exact_norm": lambda f, x, t, key: lipschitz.exact_norm(f, x, t),
            "frobenius": partial(lipschitz.frobenius, probes=4),
            "eigenvalues": partial(lipschitz.eigenvalues, iters=3),
        }.items()
    },
    "lipschitz.local": (
        each(lambda f, x, t: lipschitz.local(f, x, t, key(), 5), SCORES),
        MANY,
    ),
    "lipschitz.along": (
        each(lambda f, x, t: lipschitz.along(f, OU, t, x, key(), iters=3), SCORES),
        [(DATA, TIMES), (0 * SAME, TIMES)],
    ),
    "lipschitz.midpoints": (
        lambda data: lipschitz.midpoints(data, 3),
        [(DATA,), (TWINS,), (SAME,)],
    ),
    "lipschitz.segments": (
        lambda data: lipschitz.segments(key(), data, 3),
        [(DATA,), (TWINS,), (SAME,)],
    ),
    "lipschitz.two_point": (
        lambda d, t: lipschitz.two_point(d, OU, t),
        [(1.0, T), (0.0, EARLY)],
    ),
    "lipschitz.empirical_bounds": (
        lambda data, t: lipschitz.empirical_bounds(data, OU, t),
        [(DATA, T), (DATA, EARLY), (TWINS, T), (SAME, EARLY)],
        [(DATA[:2], T)],
    ),
    "lipschitz.network_bound": (
        each(
            lambda make, bound, t: lipschitz.network_bound(bound, make(OU), OU, t),
            PREDICTIONS,
        ),
        [(1.0, T), (0.0, EARLY)],
    ),
    "sampling.log_times": (
        lambda *ends: sampling.log_times(*ends, 2),
        [(1e-3, 80.0)],
    ),
    "sampling.edm_times": (
        lambda *ends: sampling.edm_times(*ends, 2),
        [(1e-3, 80.0)],
    ),
    "sampling.prior": (lambda t: sampling.prior(key(), OU, t, (2,)), NOW),
    "sampling.ode": (
        each(
            lambda way, x, times: sampling.ode(linear, OU, times, way)(x),
            sampling.ODE_METHODS,
        ),
        ALONG,
    ),
    "sampling.path": (lambda x, times: sampling.path(nothing, OU, times)(x), ALONG),
    "sampling.sde": (
        lambda x, times: sampling.sde(linear, OU, times)(x, key()),
        [*ALONG, (X, np.float32([0.9, 0.9, 0.5]))],  # a step of no length
    ),
    "sampling.edm": (
        each(
            lambda f, x, times: sampling.edm(f, OU, times)(x, key()),
            SCORES,
        ),
        ALONG,
    ),
    "sampling.log_likelihood": (
        each(
            lambda n, x, times: sampling.log_likelihood(linear, OU, times, n)(x, key()),
            (0, 2),
        ),
        ALONG,
    ),
    "sampling.divergence": (
        each(
            lambda f, x, t: sampling.divergence(
                lambda x: f(x, t), x, sampling.directions(x, 2, key())
            ),
            (*SCORES, near_twins),
        ),
        AT,
    ),
    "sampling.sampler": (
        lambda times: sampling.sampler(linear, OU, times, (2,))(key()),
        [(TIMES,)],
    ),
    "sampling.stages": (a_walk, ALONG),
    "sampling.search_noise": (a_search, [(X,), (ZERO,)]),
    "memorization.nearest_two": (
        memorization.nearest_two,
        [(X, DATA), (DATA[0], DATA), (DATA[1], TWINS), (SAME[0], SAME)],
    ),
    "membership.pia": (
        each(lambda f, *row: membership.pia(f, OU, *row), SCORES),
        [(X, T, EARLY), (ZERO, EARLY, EARLY)],
    ),
    "membership.secmi": (
        each(lambda f, x, times: membership.secmi(f, OU, x, times), SCORES),
        [(X, TIMES[::-1]), (ZERO, TIMES[::-1])],
    ),
    "membership.statistics": (
        each(
            lambda f, *row: membership.statistics(
                f, OU, *row, key(), 2, simple=linear, reference=nothing
            ),
            SCORES,
        ),
        [(X, TIMES[::-1]), (ZERO, TIMES[::-1])],
    ),
    "membership.gaussian_auc": (
        lambda t: [membership.gaussian_auc(4, 3, OU, t, way) for way in (True, False)],
        NOW,
    ),
    **{
        f"detectors.{name}": (
            each(lambda f, *row, of=of: of(f, *row), (*SCORES, near_twins)),
            [*AT, (DATA[1], T)],
        )
        for name, of in {
            "sharpness": lambda f, x, t: detectors.sharpness(f, x, t, key(), 3),
            "flattest": lambda f, x, t: detectors.flattest(f, x, t, key(), 3),
            "trace": detectors.trace,
            "flipd": lambda f, x, t: detectors.flipd(f, OU)(x, t),
            "guidance_gap": lambda f, x, t: detectors.guidance_gap(f, nothing)(x, t),
            "guidance_product": lambda f, x, t: detectors.guidance_product(f, nothing)(
                x, t
            ),
            "evidence": lambda f, x, t: detectors.evidence(
                f, OU, x, t, key(), 3, unconditional=nothing
            ),
        }.items()
    },
    "prune.importance": (
        lambda sizes: prune.importance(lambda one: one, sizes),
        [(DATA[None],), (0 * DATA[None],)],
    ),
    "prune.head_importance": (
        lambda x, t, eps: prune.head_importance(
            lambda gates, x, t, eps: jnp.sum(gates**2) * jnp.sum(x * eps) * t,
            x, t, eps, (1, 2),
        ),
        [(DATA, EVEN + 1, DATA), (0 * DATA, EVEN + 1, DATA)],
    ),
    "prune.magnitude": (
        lambda k: prune.magnitude({"block_0": {"mlp_in": {"kernel": k}}}, "neurons"),
        [(DATA,), (0 * DATA,)],
    ),
    "prune.normalised": (prune.normalised, [(DATA,), (0 * DATA,)]),
    "objectives.noise_loss": (
        partial(train.noise_loss, lambda params, x, t: nothing(x, t), None, OU),
        NOISED,
    ),
    "objectives.prediction_loss": (
        each(
            lambda make, *row: train.prediction_loss(nothing, make(OU), OU, *row),
            PREDICTIONS,
        ),
        NOISED,
    ),
    "objectives.clean": (train.clean(OU), NOISED),
    "objectives.smoothed": (
        train.smoothed(OU, empirical.denoiser(DATA, OU, temperature=2.0)),
        NOISED,
    ),
    "objectives.ambient": (
        lambda *row: train.ambient(OU, 0.5, key())(*row),
        [*NOISED, (X, 0.5001, X)],
    ),
    "roots.root": (roots.root, [(X**2,), (ZERO,)]),
    "roots.length": (roots.length, [(X,), (ZERO,)]),
    "alexnet.distance": (  # of an image in which no channel is active
        lambda *images: alexnet.distance(
            {name: jnp.zeros(shape) for name, shape in alexnet.shapes().items()},
            *images,
        ),
        [(np.zeros((31, 31, 3)), np.ones((31, 31, 3)))],
    ),
    "mlp.lipschitz_bound": (an_mlp, [(DATA, DATA), (SAME, 0 * SAME), (SAME, SAME)]),
}  # fmt: skip

# These compare their numbers when they are called, which jax.jit does not allow.
UNCOMPILED = (
    "process.variance_preserving", "process.uniform", "process.log_uniform",
    "process.beta", "process.log_normal", "sampling.log_times", "sampling.edm_times",
)  # fmt: skip

# Public functions whose derivatives are refused, and the words of the refusal.
HOST = "runs on the host, on NumPy arrays"
REFUSED = {
    "analytic.moments": (analytic.moments, DATA, HOST),
    "fidelity.frechet": (lambda a: fidelity.frechet(a, DATA), DATA, HOST),
    "fidelity.moments": (fidelity.moments, DATA, HOST),
    "fidelity.kid": (lambda a: fidelity.kid(a, DATA), DATA, HOST),
    "fidelity.precision_recall": (
        lambda a: fidelity.precision_recall(DATA, a), DATA, HOST,
    ),
    "fidelity.density_coverage": (
        lambda a: fidelity.density_coverage(a, DATA), DATA, HOST,
    ),
    "fidelity.balls": (lambda a: fidelity.balls(a, DATA), DATA, HOST),
    "fidelity.vendi": (fidelity.vendi, DATA, HOST),
    "neighbours.distinct": (neighbours.distinct, DATA, HOST),
    "neighbours.nearest": (lambda a: neighbours.nearest(a, DATA), DATA, HOST),
    "neighbours.searcher": (neighbours.searcher, DATA, HOST),
    "membership.curve": (
        lambda a: membership.curve(linear, OU, a, DATA, TIMES[::-1], key()), DATA, HOST,
    ),
    "membership.curve_of": (
        lambda a: membership.curve_of(TIMES, membership.Statistics(*[a] * 5), 2), DATA,
        HOST,
    ),
    "membership.separation": (
        lambda a: membership.separation(a, EVEN), EVEN, HOST,
    ),
    "membership.separations": (
        lambda a: membership.separations(a, EVEN > -1), DATA, HOST,
    ),
    "detectors.curve": (
        lambda a: detectors.curve(linear, OU, a, EVEN > -1, TIMES, key()), DATA, HOST,
    ),
    "detectors.curve_of": (
        lambda a: detectors.curve_of(detectors.Evidence(*[a] * 6), EVEN > -1), DATA,
        HOST,
    ),
    "detectors.roc": (lambda a: detectors.roc(a, EVEN > -1, EVEN), EVEN, HOST),
    "detectors.check_copies": (lambda a: detectors.check_copies(a, 4), EVEN, HOST),
    "membership.check_sets": (lambda a: membership.check_sets(a, DATA), DATA, HOST),
    "memorization.ratio": (lambda a: memorization.ratio(a, DATA), DATA, HOST),
}  # fmt: skip

# Public functions without a row, and why.
LEFT_OUT = {
    **dict.fromkeys(
        ("process.ornstein_uhlenbeck", "process.variance_exploding",
         "process.rectified_flow"),
        "in process.PROCESSES",
    ),
    **dict.fromkeys((f"score.{name}" for name in score.PREDICTIONS), "in PREDICTIONS"),
    **dict.fromkeys((f"mixture.{name}" for name in mixture.LAWS), "in mixture.LAWS"),
    "process.check_time": "returns nothing",
    "membership.check_times": "returns nothing",
    "sampling.search_stages": "in sampling.search_noise",
    "sampling.best_noise": "in sampling.search_noise",
    "sampling.directions": "draws signs",
    "empirical.labelled": "of integers",
    "gap.spectrum_draws": "draws integers",
    **dict.fromkeys(
        ("prune.gates", "prune.count", "prune.keep_top", "prune.keep_random",
         "prune.full_mask", "prune.check_mask"),
        "of shapes, or of choices",
    ),
    **dict.fromkeys(
        ("prune.activations", "prune.group_mask", "prune.head_mask", "prune.compact",
         "prune.apply_mask"),
        "takes, stacks or multiplies",
    ),
}  # fmt: skip


def is_float(leaf):
    return jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


@pytest.mark.parametrize("name", FINITE)
def test_all_derivatives_are_finite(name):
    function, *kinds = FINITE[name]

    def total(row):
        return sum(jnp.sum(a) for a in jax.tree.leaves(function(*row)) if is_float(a))

    graded = jax.grad(total)
    graded = graded if name in UNCOMPILED else jax.jit(graded)
    for rows in kinds:
        for row in rows:
            slopes = graded(jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), row))
            for path, slope in jax.tree_util.tree_leaves_with_path(slopes):
                where = f"by {jax.tree_util.keystr(path)} at {row}"
                assert np.all(np.isfinite(slope)), where


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_derivative_is_refused(name):
    function, at, words = REFUSED[name]
    with pytest.raises(TypeError, match=words):
        jax.grad(function)(jnp.asarray(at))


def test_every_public_function_has_a_row_or_a_reason():
    public = {
        f"{room.__name__.rpartition('.')[2]}.{name}"
        for room in ROOMS
        for name, made in inspect.getmembers(room, inspect.isfunction)
        if made.__module__ == room.__name__ and not name.startswith("_")
    }
    assert not public - FINITE.keys() - REFUSED.keys() - LEFT_OUT.keys()


def test_a_root_is_that_of_jax_with_a_derivative_at_0():
    x = np.float32([0, 1e-30, 0.5, 2, np.inf])
    np.testing.assert_array_equal(roots.root(x), jnp.sqrt(x))
    assert jnp.isnan(roots.root(jnp.float32(-1)))
    assert jax.grad(roots.root)(4.0) == 0.25 and jax.grad(roots.root)(0.0) == 0
