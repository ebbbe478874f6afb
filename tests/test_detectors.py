"""Copies told from the score alone: closed forms, exact Jacobians, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import FORMULAS, OU, OU_FORMULA, PROCESSES, T, drawn

from memsep_jax import mixture
from memsep_jax.memorization import detectors, membership
from memsep_jax.process import noise_to_signal

MATRIX = drawn(30, 5, 5)


def bent(x, t):
    """A score whose Jacobian is not symmetric."""
    return jnp.tanh(MATRIX @ x) / (0.1 + t) - x / t


def bent_in_numpy(x, t):
    """The value of `bent` and its Jacobian."""
    inner = np.tanh(MATRIX @ x)
    slope = (1 - inner**2)[:, None] * MATRIX / (0.1 + t) - np.eye(5) / t
    return inner / (0.1 + t) - x / t, slope


def bell(mean, variances):
    """One normal, as a mixture."""
    mean, variances = jnp.asarray(mean), jnp.asarray(variances)
    return mixture.Mixture(jnp.zeros(1), mean[None], variances[None])


def asked(score_fn, process, x0, t, **more):
    """The evidence of one point, in one program."""
    key, d = jax.random.key(1), len(x0)
    ask = jax.jit(
        lambda x0: detectors.evidence(score_fn, process, x0, t, key, d, **more)
    )
    return ask(jnp.asarray(x0))


# Closed forms.


@pytest.mark.parametrize("name", PROCESSES)
def test_a_normal_has_the_inverse_of_its_noised_variances(name, x64):
    own, its, variances = PROCESSES[name], FORMULAS[name], np.array([4.0, 0.5, 0.01])
    x0, a, s2 = drawn(31, 3), its.alpha(T), its.sigma(T) ** 2
    sharp = 1 / (a**2 * variances + s2)
    found = asked(mixture.score(bell(np.zeros(3), variances), own), own, x0, T)
    np.testing.assert_allclose(found.sharpness, sharp.max(), rtol=1e-10)
    np.testing.assert_allclose(found.flattest, sharp.min(), rtol=1e-10)
    np.testing.assert_allclose(found.trace, sharp.sum(), rtol=1e-10)
    flipd = 3 - s2 * sharp.sum() + s2 * np.sum((sharp * a * x0) ** 2)
    np.testing.assert_allclose(found.flipd, flipd, rtol=1e-10)


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("k", [0, 1, 3])
def test_flipd_is_the_dimension_of_a_flat_set(name, k, x64):
    """N(0, I) on a k-dimensional subspace of R^4, as t -> 0."""
    own, variances = PROCESSES[name], np.array([1.0] * k + [0.0] * (4 - k))
    x0 = drawn(32, 4) * variances
    score_fn = mixture.score(bell(np.zeros(4), variances), own)
    found = asked(score_fn, own, x0, 1e-7)
    # Off by sigma^2, times numbers of size 1; sigma^2 <= 1e-7 for all processes.
    np.testing.assert_allclose(found.flipd, k, atol=1e-5)
    if k > 0:  # sharp across the set, and flat along it
        assert found.sharpness > 1e6 and abs(found.flattest) < 2


@pytest.mark.parametrize("name", PROCESSES)
def test_flipd_is_the_slope_of_the_density_by_the_noise(name, x64):
    """d + d log p(X_t / alpha = x0) / d log(sigma / alpha), of a law of two normals."""
    own, x0 = PROCESSES[name], jnp.asarray(drawn(33, 3))
    law = mixture.Mixture(
        jnp.log(jnp.array([0.3, 0.7])), jnp.asarray(drawn(34, 2, 3)),
        jnp.asarray(drawn(35, 2, 3) ** 2),
    )  # fmt: skip

    def log_p(t):
        at = mixture.log_prob(mixture.diffuse(law, own, t), own.alpha(t) * x0)
        return at + 3 * jnp.log(own.alpha(t))

    t = jnp.float64(T)
    rate = jax.grad(lambda t: jnp.log(noise_to_signal(own, t)))(t)
    truth = 3 + jax.jit(jax.grad(log_p))(t) / rate
    found = detectors.flipd(mixture.score(law, own), own)(x0, t)
    np.testing.assert_allclose(found, truth, rtol=1e-10)


@pytest.mark.parametrize("name", PROCESSES)
def test_a_point_that_stands_alone_is_a_peak_without_dimension(name, x64):
    """The empirical score of n = 1: -(x - alpha x0) / sigma^2."""
    own, x0 = PROCESSES[name], jnp.asarray(drawn(36, 3, 2))

    def score_fn(x, t):
        return -(x - own.alpha(t) * x0) / own.sigma(t) ** 2

    found, sharp = asked(score_fn, own, x0, T), 1 / FORMULAS[name].sigma(T) ** 2
    np.testing.assert_allclose(found.sharpness, sharp, rtol=1e-12)
    np.testing.assert_allclose(found.flattest, sharp, rtol=1e-12)
    np.testing.assert_allclose(found.trace, 6 * sharp, rtol=1e-12)
    np.testing.assert_allclose(found.flipd, 0, atol=1e-12)
    assert found.gap is None and found.gap_product is None


def test_midway_between_two_points_the_density_curves_up(x64):
    """1/v - alpha^2 D^2 / (4 v^2) along the segment, 1/v across it."""
    ends = drawn(37, 2, 3)
    a, v = OU_FORMULA.alpha(T), OU_FORMULA.sigma(T) ** 2
    law = mixture.Mixture(jnp.zeros(2), jnp.asarray(5 * ends), jnp.zeros((2, 3)))
    found = asked(mixture.score(law, OU), OU, 5 * ends.mean(axis=0), T)
    squares = 25 * np.sum((ends[0] - ends[1]) ** 2)
    up = 1 / v - a**2 * squares / (4 * v**2)
    np.testing.assert_allclose(found.flattest, up, rtol=1e-10)
    np.testing.assert_allclose(found.sharpness, 1 / v, rtol=1e-10)
    assert up < -10


@pytest.mark.parametrize("name", PROCESSES)
def test_the_gap_of_two_classes_is_the_pull_to_the_other_one(name, x64):
    """Unit normals at m_0 and m_1: (1 - w) alpha |m_0 - m_1| / v, w of the class."""
    own, its, means, x0 = PROCESSES[name], FORMULAS[name], drawn(38, 2, 3), drawn(39, 3)
    both = mixture.Mixture(jnp.zeros(2), jnp.asarray(means), jnp.ones((2, 3)))
    label = mixture.score(bell(means[0], np.ones(3)), own)
    free = mixture.score(both, own)
    found = asked(label, own, x0, T, unconditional=free)
    a = its.alpha(T)
    v, x = a**2 + its.sigma(T) ** 2, a * x0
    apart = np.linalg.norm(means[0] - means[1])
    logits = -np.sum((x - a * means) ** 2, axis=1) / (2 * v)
    other = 1 / (1 + np.exp(logits[0] - logits[1]))
    gap = other * a * apart / v
    np.testing.assert_allclose(found.gap, gap, rtol=1e-10)
    # J_c - J is -(alpha / v)^2 w (1 - w) times the square of m_0 - m_1.
    product = (a / v) ** 2 * other * (1 - other) * apart**2 * gap
    np.testing.assert_allclose(found.gap_product, product, rtol=1e-10)
    alone = detectors.guidance_gap, detectors.guidance_product
    for made, truth in zip(alone, (gap, product), strict=True):
        np.testing.assert_allclose(made(label, free)(x, T), truth, rtol=1e-10)


# Estimators against exact Jacobians.


@pytest.mark.parametrize("name", PROCESSES)
def test_detectors_are_their_formulas_by_the_whole_jacobian(name, x64):
    own, its, x0 = PROCESSES[name], FORMULAS[name], drawn(40, 5)
    x, s2, free = its.alpha(T) * x0, its.sigma(T) ** 2, drawn(41, 5, 5)
    value, slope = bent_in_numpy(x, T)
    values = np.linalg.eigvalsh((slope + slope.T) / 2)
    found = asked(bent, own, x0, T, unconditional=lambda x, t: free @ x)
    np.testing.assert_allclose(found.sharpness, -values[0], rtol=1e-9)
    np.testing.assert_allclose(found.flattest, -values[-1], rtol=1e-9)
    np.testing.assert_allclose(found.trace, -np.trace(slope), rtol=1e-10)
    flipd = 5 + s2 * (np.trace(slope) + np.sum(value**2))
    np.testing.assert_allclose(found.flipd, flipd, rtol=1e-9)
    difference = value - free @ x
    np.testing.assert_allclose(found.gap, np.linalg.norm(difference), rtol=1e-10)
    product = np.linalg.norm((slope - free) @ difference)
    np.testing.assert_allclose(found.gap_product, product, rtol=1e-10)
    each = jnp.asarray(x), T, jax.random.key(2)
    for one, truth in (
        (detectors.sharpness, -values[0]),
        (detectors.flattest, -values[-1]),
    ):
        np.testing.assert_allclose(one(bent, *each, 5), truth, rtol=1e-9)


def test_random_signs_find_the_trace_within_their_error(x64):
    x, probes, runs = jnp.asarray(drawn(42, 5)), 4, 2_000
    _, slope = bent_in_numpy(np.asarray(x), T)

    @jax.jit
    @jax.vmap
    def one(key):
        traced = detectors.trace(bent, x, T, key, probes)
        return traced, detectors.flipd(bent, OU, probes)(x / OU.alpha(T), T, key)

    traced, dimension = one(jax.random.split(jax.random.key(3), runs))
    error = np.std(traced, ddof=1) / np.sqrt(runs)
    assert abs(np.mean(traced) + np.trace(slope)) < 4 * error
    # Both have the same signs.
    value, _ = bent_in_numpy(np.asarray(x), T)
    truth = 5 + OU.sigma(T) ** 2 * (np.sum(value**2) - traced)
    np.testing.assert_allclose(dimension, truth, rtol=1e-9)


# Copies against others.


def test_peaks_are_told_from_a_broad_law(x64):
    """Samples at tight components of a law, and samples of its broad one."""
    points, others = 3 * drawn(43, 6, 4), 3 * drawn(44, 40, 4)
    means = jnp.asarray(np.concatenate([points, np.zeros((1, 4))]))
    spread = jnp.asarray([[0.01] * 4] * 6 + [[9.0] * 4])
    logs = jnp.log(jnp.array([0.05] * 6 + [0.7]))
    score_fn = mixture.score(mixture.Mixture(logs, means, spread), OU)
    samples = np.concatenate([points, others])
    found = detectors.curve(
        score_fn, OU, samples, np.arange(46) < 6, [0.05, 20.0], jax.random.key(4), 4
    )
    assert set(found) == {"sharpness", "flattest", "trace", "flipd"}
    for name in ("sharpness", "flattest", "trace", "flipd"):
        assert found[name].auc[0] > 0.95, name
    assert found["trace"].interval.shape == (2, 2)


def test_the_curve_is_the_separation_of_the_evidence(x64):
    x, key, times = drawn(45, 12, 5), jax.random.key(5), np.array([0.2, 0.7])
    copied, labels = np.arange(12) % 3 == 0, np.arange(12) % 2
    shift = jnp.asarray(drawn(46, 2, 5))

    def labelled(x, t, label):
        return bent(x, t) + shift[label]

    found = detectors.curve(
        labelled, OU, x, copied, times, key, 5, labels=labels, unconditional=bent
    )
    assert list(found) == list(detectors.SIGNS) == list(detectors.Evidence._fields)

    @jax.jit
    @jax.vmap
    def one(x0, label, key):
        return [
            detectors.evidence(
                lambda x, t: labelled(x, t, label), OU, x0, t, key, 5,
                unconditional=bent,
            )
            for t, key in zip(times, jax.random.split(key, 2), strict=True)
        ]  # fmt: skip

    each = one(jnp.asarray(x), jnp.asarray(labels), jax.random.split(key, 12))
    for i, values in enumerate(each):
        for name, sign in detectors.SIGNS.items():
            of = sign * np.asarray(getattr(values, name))
            if name == "gap":  # two values, which rounding must not part
                of = np.round(of, 9)
                np.testing.assert_allclose(
                    np.unique(of), np.sort(np.linalg.norm(shift, axis=1)), rtol=1e-6
                )
                continue
            if name == "gap_product":  # 0 but for rounding, as the shift is constant
                continue
            sought = membership.separation(-of[copied], -of[~copied])
            np.testing.assert_allclose(found[name].auc[i], sought.auc, err_msg=name)
            np.testing.assert_allclose(found[name].interval[i], sought.interval)


def test_what_is_not_finite_has_no_auc():
    values = detectors.Evidence(*[np.ones((6, 2)) for _ in range(4)], None, None)
    values.trace[3, 1] = np.inf
    found = detectors.curve_of(values, np.arange(6) < 3)
    assert found["flipd"].auc.tolist() == [0.5, 0.5]
    np.testing.assert_array_equal(found["trace"].auc, [0.5, np.nan])


def test_a_roc_curve_by_counts():
    rng = np.random.default_rng(47)
    values, copied = rng.integers(0, 9, 50).astype(float), rng.random(50) < 0.4
    fpr = np.linspace(0, 1, 7)
    truth = [
        max(
            np.mean(values[copied] >= cut)
            for cut in np.arange(11.0)
            if np.mean(values[~copied] >= cut) <= allowed + 1e-12
        )
        for allowed in fpr
    ]
    np.testing.assert_allclose(detectors.roc(values, copied, fpr), truth)


# Bad input.


def test_what_tells_nothing_of_copies_is_refused(key):
    x, some = drawn(48, 6, 5), np.arange(6) < 3

    def plain(x, t):
        raise AssertionError("what is wrong is said before anything is traced")

    def labelled(x, t, label):
        raise AssertionError("what is wrong is said before anything is traced")

    def refused(words, score_fn=plain, copied=some, times=(0.1,), **more):
        with pytest.raises(ValueError, match=words):
            detectors.curve(score_fn, OU, x, copied, times, key, **more)

    refused("0 of 6 samples are copies", copied=np.zeros(6, bool))
    refused("6 of 6 samples are copies", copied=np.ones(6, bool))
    refused("at least 2 copies and 2 others", copied=np.arange(6) < 1)
    refused("copied is int64 of shape .6,.: give bool", copied=np.arange(6))
    refused("of shape .4,.: give bool", copied=some[:4])
    refused("t=0.0 must be positive", times=(0.0,))
    two = np.arange(6) % 2
    refused("labels without unconditional", labelled, labels=two)
    refused("unconditional without labels", unconditional=plain)
    refused("labels of a score that takes none", labels=two, unconditional=plain)
    more = {"unconditional": plain}
    refused("all labels are 3: with one class", labelled, labels=[3] * 6, **more)
    refused("labels of shape .5,.: one for each of 6", labelled, labels=two[:5], **more)
    for ask in (
        lambda copied: detectors.roc(np.ones(6), copied, np.ones(1)),
        lambda copied: detectors.check_copies(copied, 6),
    ):
        with pytest.raises(ValueError, match="6 of 6 samples are copies"):
            ask(np.ones(6, bool))
