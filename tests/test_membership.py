"""Who was in the training set: statistics, their curves in closed form, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from oracles import FORMULAS, OU, OU_FORMULA, PROCESSES, drawn

from configs import membership_digits
from memsep_jax import analytic, data, empirical, experiments, memorization, mixture
from memsep_jax.experiments import training
from memsep_jax.experiments.config import build
from memsep_jax.experiments.studies import membership as study
from memsep_jax.experiments.studies import monitor
from memsep_jax.memorization import membership

TIMES = np.array([0.05, 0.3, 0.9])
SHARE = 0.7  # of the score in `bent`


def bent(x, t):
    """A score that is linear in nothing."""
    return -SHARE * jnp.tanh(x) / (0.2 + t) + 0.1 * jnp.sum(x**2)


def bent_in_numpy(x, t):
    return -SHARE * np.tanh(x) / (0.2 + t) + 0.1 * np.sum(x**2)


def fitted_to(mean):
    """The score of N(mean, I), of one point x [d]."""

    def score_fn(x, t):
        alpha, v = OU.alpha(t), OU.sigma(t) ** 2
        return -(x - alpha * mean) / (alpha**2 + v)

    return score_fn


def copying(data):
    """The empirical score, in the least of programs."""

    def score_fn(x, t):
        mean = empirical.posterior_weights(data, OU, x, t) @ data
        return (OU.alpha(t) * mean - x) / OU.sigma(t) ** 2

    return score_fn


# Statistics, against their formulas.


@pytest.mark.parametrize("name", PROCESSES)
def test_pia_is_its_formula(name, x64):
    own, its, x0 = PROCESSES[name], FORMULAS[name], drawn(0, 3, 2)
    for t in TIMES:
        clean = its.alpha(0.01) * x0
        eps_0 = -its.sigma(0.01) * bent_in_numpy(clean, 0.01)
        x = its.alpha(t) * x0 + its.sigma(t) * eps_0
        eps_t = -its.sigma(t) * bent_in_numpy(x, t)
        for p in (4.0, 2.0):
            truth = sum(abs(float(g)) ** p for g in (eps_t - eps_0).flat) / 6
            found = membership.pia(bent, own, jnp.asarray(x0), t, 0.01, p)
            np.testing.assert_allclose(found, truth, rtol=1e-12)


@pytest.mark.parametrize("name", PROCESSES)
def test_secmi_is_a_loop_over_steps(name, x64):
    own, its, x0 = PROCESSES[name], FORMULAS[name], drawn(1, 3, 2)

    def step(x, t, to):
        eps = -its.sigma(t) * bent_in_numpy(x, t)
        clean = (x - its.sigma(t) * eps) / its.alpha(t)
        return its.alpha(to) * clean + its.sigma(to) * eps

    x, truth = its.alpha(TIMES[0]) * x0, []
    for t, to in ((0.05, 0.3), (0.3, 0.9), (0.9, 0.3)):
        back = step(step(x, t, to), to, t)
        truth.append(np.mean((back - x) ** 2))
        x = step(x, t, to)
    found = membership.secmi(bent, own, jnp.asarray(x0), TIMES)
    np.testing.assert_allclose(found, truth, rtol=1e-10)


def test_secmi_is_0_where_a_step_and_the_step_back_cancel(x64):
    """A score whose noise is the same everywhere: straight lines, there and back."""

    def constant(x, t):
        return -jnp.ones_like(x) / OU.sigma(t)

    found = membership.secmi(constant, OU, jnp.asarray(drawn(2, 4)), TIMES)
    np.testing.assert_allclose(found, 0, atol=1e-28)


def test_losses_of_all_scores_are_of_the_same_noise(x64, key):
    """The mean over draws of each loss, and differences from it."""
    x0, draws = jnp.asarray(drawn(3, 5)), 3
    simple, second = fitted_to(0.5), fitted_to(-1.0)
    found = membership.statistics(
        bent, OU, x0, TIMES, key, draws, simple=simple, reference=second
    )
    keys = jax.random.split(key, 3)
    for i, t in enumerate(TIMES):
        eps = np.asarray(jax.random.normal(keys[i], (draws, 5)))
        a, s = OU_FORMULA.alpha(t), OU_FORMULA.sigma(t)

        def loss(score_fn, a=a, s=s, eps=eps, t=t):
            each = [s * score_fn(a * np.asarray(x0) + s * e, t) + e for e in eps]
            return np.mean([np.mean(e**2) for e in each])

        own = loss(bent_in_numpy)
        for got, mean in ((found.by_complexity, 0.5), (found.by_model, -1.0)):
            other = loss(lambda x, t, m=mean, a=a, s=s: -(x - a * m) / (a**2 + s**2))
            np.testing.assert_allclose(got[i], own - other, rtol=1e-10)
        np.testing.assert_allclose(found.loss[i], own, rtol=1e-12)
        pia = membership.pia(bent, OU, x0, t, TIMES[0])
        np.testing.assert_allclose(found.pia[i], pia, rtol=1e-12)
    secmi = membership.secmi(bent, OU, x0, TIMES)
    np.testing.assert_allclose(found.secmi, secmi, rtol=1e-12)
    alone = membership.statistics(bent, OU, x0, TIMES, key, draws, simple=simple)
    assert alone.by_model is None
    np.testing.assert_array_equal(alone.by_complexity, found.by_complexity)


# How well two sets are told apart.


def test_a_separation_by_counts_of_pairs(x64):
    """AUC, its error and the TPR, with ties, as their definitions count."""
    rng = np.random.default_rng(6)
    members = rng.integers(0, 9, 30).astype(float)
    others = rng.integers(2, 12, 250).astype(float)
    below = (members[:, None] < others) + 0.5 * (members[:, None] == others)
    rows, columns = below.mean(axis=1), below.mean(axis=0)
    error = np.sqrt(rows.var(ddof=1) / 30 + columns.var(ddof=1) / 250)
    found = membership.separation(members, others)
    assert found.auc == pytest.approx(below.mean(), rel=1e-12)
    width = scipy.stats.norm.ppf(0.975) * error
    assert found.interval == pytest.approx((found.auc - width, found.auc + width))
    allowed = [c for c in np.arange(-1.0, 12) if np.mean(others <= c) <= 0.01]
    count = max(int(np.sum(members <= c)) for c in allowed)
    assert found.tpr == pytest.approx(count / 30)
    assert found.tpr_interval == memorization.wilson(count, 30)


def test_separations_are_those_of_the_columns():
    values, members = drawn(5, 30, 3), np.arange(30) % 3 == 0
    values[4, 2] = np.nan
    found = membership.separations(values, members)
    for i in range(2):
        sought = membership.separation(values[members, i], values[~members, i])
        assert (
            found.auc[i] == sought.auc and tuple(found.interval[i]) == sought.interval
        )
        assert found.tpr[i] == sought.tpr
    assert np.isnan(found.auc[2]) and np.isnan(found.tpr_interval[2]).all()


def test_sets_that_are_wholly_apart_or_equal():
    apart = membership.separation(np.arange(5.0), 9 + np.arange(8.0))
    assert (apart.auc, apart.tpr) == (1, 1)
    assert apart.interval == memorization.wilson(5, 5)
    back = membership.separation(9 + np.arange(8.0), np.arange(5.0))
    assert (back.auc, back.tpr) == (0, 0)
    assert back.interval == memorization.wilson(0, 5)
    equal = membership.separation(np.ones(5), np.ones(8))
    assert (equal.auc, equal.interval, equal.tpr) == (0.5, (0.5, 0.5), 0)


def test_95_of_100_intervals_hold_the_auc_of_two_normals():
    """N(0, 1) against N(1, 1): Phi(1 / sqrt 2)."""
    truth, runs = scipy.stats.norm.cdf(1 / np.sqrt(2)), 400
    rng, held = np.random.default_rng(7), 0
    for _ in range(runs):
        found = membership.separation(rng.normal(0, 1, 60), rng.normal(1, 1, 60))
        held += found.interval[0] <= truth <= found.interval[1]
    # The interval is that of many points: with 60 it holds 94 % to 95 %.
    assert abs(held / runs - 0.945) < 4 * np.sqrt(0.95 * 0.05 / runs)


# Curves in closed form.


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("name", PROCESSES)
def test_the_auc_of_a_gaussian_is_that_of_two_chi_squares(name, averaged, x64):
    """P(w_- chi^2 < w_+ chi'^2), by scipy's F law."""
    n, d, its = 7, 5, FORMULAS[name]
    for t in TIMES:
        a, v = its.alpha(t), its.sigma(t) ** 2
        slope, rest = np.sqrt(v) * a / (a**2 + v), a**2 / (a**2 + v)
        rest = 0 if averaged else rest
        less, more = (slope**2 * (1 + sign / n) + rest**2 for sign in (-1, 1))
        truth = scipy.stats.f.cdf(more / less, d, d)
        found = membership.gaussian_auc(n, d, PROCESSES[name], t, averaged)
        np.testing.assert_allclose(found, truth, rtol=1e-10)


def test_the_curve_of_a_fitted_gaussian_is_its_closed_form(x64):
    """N(mean of the members, I), over many data sets; the noise hides it early."""
    n, d, runs, times = 4, 6, 400, np.array([0.05, 0.5, 3.0])

    def one(key):
        data_key, key = jax.random.split(key)
        points = 0.3 + jax.random.normal(data_key, (2 * n, d))
        score_fn = fitted_to(jnp.mean(points[:n], axis=0))

        def of(x0, key):
            return membership.statistics(
                score_fn, OU, x0, times, key, 1, simple=fitted_to(0.3)
            ).loss

        return jax.vmap(of)(points, jax.random.split(key, 2 * n))

    losses = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(8), runs))
    losses = np.asarray(losses)  # [runs, 2 n, k]
    below = losses[:, :n, None] < losses[:, None, n:]
    each = below.mean(axis=(1, 2))
    truth = [membership.gaussian_auc(n, d, OU, t) for t in times]
    error = each.std(axis=0, ddof=1) / np.sqrt(runs)
    assert np.all(np.abs(each.mean(axis=0) - truth) < 4 * error)
    assert truth[0] < 0.53 and truth[2] > 0.63  # a curve, and not a line


def test_many_draws_come_to_the_closed_form_of_their_mean(x64):
    """Of |x - mean|^2 alone, at a time at which one draw tells next to nothing."""
    n, d, t = 3, 4, 0.3
    points = drawn(9, 2 * n, d)
    mean = points[:n].mean(axis=0)
    found = membership.curve(
        fitted_to(mean), OU, points[:n], points[n:], [t, 0.5], jax.random.key(0), 20_000
    )
    squares = np.sum((points - mean) ** 2, axis=1)
    truth = np.mean(squares[:n, None] < squares[None, n:])
    np.testing.assert_allclose(found.loss.auc, truth)
    # Over data sets: the F law of two independent |x - mean|^2.
    rng, runs = np.random.default_rng(10), 2_000
    many = rng.normal(size=(runs, 2 * n, d))
    squares = np.sum((many - many[:, :n].mean(axis=1, keepdims=True)) ** 2, axis=2)
    each = np.mean(squares[:, :n, None] < squares[:, None, n:], axis=(1, 2))
    error = each.std(ddof=1) / np.sqrt(runs)
    limit = membership.gaussian_auc(n, d, OU, t, averaged=True)
    assert abs(each.mean() - limit) < 4 * error


def test_the_curve_is_the_separation_of_the_statistics(x64, key):
    members, others = drawn(11, 7, 3), drawn(12, 5, 3)
    second = fitted_to(1.0)
    found = membership.curve(bent, OU, members, others, TIMES, key, 2, reference=second)
    points = np.concatenate([members, others])
    simple, keys = analytic.gaussian(points, OU), jax.random.split(key, 12)

    @jax.jit
    def one(x, key):
        return membership.statistics(
            bent, OU, x, TIMES, key, 2, simple=simple, reference=second
        )

    values = [one(x, key) for x, key in zip(points, keys, strict=True)]
    for name in membership.Statistics._fields:
        columns = np.stack([getattr(value, name) for value in values])
        for i in range(3):
            sought = membership.separation(columns[:7, i], columns[7:, i])
            got = [a[i] for a in getattr(found, name)]
            for a, b in zip(got, sought, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-12)
    assert "5 non-members no FPR lies between 0 and 0.2" in found.note
    none = membership.curve(bent, OU, members, others, TIMES, key, 2)
    assert none.by_model is None
    many = membership.Statistics(*[np.ones((104, 1))] * 4, None)
    assert membership.curve_of([0.1], many, 4).note is None


def test_the_empirical_score_gives_its_points_away(x64):
    """By every statistic at small times; the truth by none, at any."""
    n, times, key = 24, np.array([0.02, 0.1, 6.0]), jax.random.key(1)
    law = mixture.Mixture(jnp.zeros(1), jnp.zeros((1, 8)), jnp.ones((1, 8)))
    data, others = drawn(13, n, 8), drawn(14, n, 8)
    found, honest = (
        membership.curve(score_fn, OU, data, others, times, key, 1)
        for score_fn in (copying(data), mixture.score(law, OU))
    )
    for name in ("loss", "pia", "secmi", "by_complexity"):
        assert getattr(found, name).auc[0] > 0.95, name
        error = np.sqrt((2 * n + 1) / (12 * n**2))  # of the AUC of one law
        assert np.all(np.abs(getattr(honest, name).auc - 0.5) < 4 * error), name


def test_calibration_by_a_second_model_removes_how_hard_a_point_is(x64):
    """Points of very different size: the loss sees mostly their size."""
    n, d, share = 24, 6, 0.05
    points = np.exp(drawn(15, 2 * n, 1)) * drawn(16, 2 * n, d)
    members, others, second = points[:n], points[n:], fitted_to(0.0)

    def leaning(x, t):
        return (1 - share) * second(x, t) + share * copying(members)(x, t)

    found = membership.curve(
        leaning, OU, members, others, [0.05, 0.2], jax.random.key(2), 4,
        reference=second,
    )  # fmt: skip
    assert np.all(found.loss.auc < 0.75) and np.all(found.by_model.auc > 0.9)


# Bad input.


def test_what_tells_nothing_of_membership_is_refused(key):
    x, y = np.tanh(drawn(17, 12, 4, 4, 1)), np.tanh(drawn(18, 12, 4, 4, 1))

    def score_fn(x, t):
        raise AssertionError("what is wrong is said before anything is traced")

    def refused(words, members=x, others=y, times=TIMES, draws=1):
        with pytest.raises(ValueError, match=words):
            membership.curve(score_fn, OU, members, others, times, key, draws)

    refused(r"shape \(4, 4, 1\) and non-members of shape \(4, 4\)", others=y[..., 0])
    refused("members are float64 and non-members uint8", others=y.astype(np.uint8))
    pixels = np.uint8(127.5 * (x + 1)), np.uint8(127.5 * (y + 1))
    refused("are uint8: give floats", *pixels)
    refused("1 members and 12 non-members", x[:1])
    refused("12 members and 0 non-members", others=y[:0])
    refused(r"in \[-0\.98.*non-members in \[0\.01.*one prep", others=(y + 1) / 2)
    refused("not of one preprocessing", others=127.5 * (y + 1))
    both = np.concatenate([y[:2], x[[3, 1]], y[2:]])
    refused(r"2 non-members are members .*: 3 = 2, 1 = 3; leave", others=both)
    refused(r"11 = 11|9 = 9 and 2 more", others=x)
    refused("at least two, increasing", times=[0.5, 0.5])
    refused("at least two, increasing", times=[0.5])
    refused("t=0.0 must be positive", times=[0.0, 0.5])
    refused("draws=0", draws=0)


def test_equal_laws_are_not_refused_for_their_ranges():
    for seed in range(200):
        x, y = drawn(seed, 10, 1), drawn(seed + 1_000, 10, 1)
        membership.check_sets(x, y)
    heavy = np.random.default_rng(0).standard_t(2, (60, 5))
    membership.check_sets(heavy[:20], heavy[20:])


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: membership.separation([1.0], [1.0, 2.0]), "1 members and 2 non"),
        (lambda: membership.separation([1, np.nan], [1, 2]), "1 of 4 .* not finite"),
        (lambda: membership.gaussian_auc(1, 2, OU, 0.5), "n=1 points"),
        (lambda: membership.gaussian_auc(3, 2, OU, 0.0), "t=0.0 must be"),
        (lambda: membership.check_times([1.0, -1.0]), "t=-1.0 must be"),
    ],
)
def test_numbers_without_meaning_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# The study.


def smoke(**changes):
    config = membership_digits.get_config("smoke")
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture
def of_score_fns(monkeypatch):
    """A set of points -> the numbers of the network that is its empirical score."""
    config = smoke(**{"data.num_examples": 40, "data.num_held_out": 80})
    config.run.evaluate_points = 200
    parts = build.build(config)

    def score(config, parts, weights, label):
        return empirical.score(weights, parts.process)

    monkeypatch.setattr(training, "sampled_score", score)

    def told(name):
        x = jnp.asarray(getattr(parts.splits, name).x)
        return study.told(config, parts, x, x)

    return told


def test_the_copy_gives_every_member_away(of_score_fns):
    found = of_score_fns("train")
    assert found["best_loss"] == found["best_secmi"] == 1 == found["tpr_loss"]
    assert found["auc_loss"][0] == 1 > found["auc_loss"][-1]
    assert found["noise"].shape == found["auc_loss"].shape == (monitor.LEVELS,)
    np.testing.assert_array_equal(found["auc_by_model"], 0.5)  # ties alone


def test_a_score_of_the_other_set_gives_the_others_away(of_score_fns):
    """The held-out points are its members: the training points have the larger loss."""
    found = of_score_fns("held_out")
    assert found["auc_loss"][0] == 0 and found["best_loss"] < 0.6


def test_a_statistic_that_is_not_finite_has_no_best(of_score_fns, monkeypatch):
    curve_of = membership.curve_of

    def broken(times, values, n):
        return curve_of(times, values._replace(pia=np.nan * values.pia), n)

    monkeypatch.setattr(membership, "curve_of", broken)
    found = of_score_fns("train")
    assert np.isnan(found["best_pia"]) and np.isnan(found["noise_pia"])
    assert found["best_loss"] == 1


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sweep.num_examples": ()}, r"sweep.num_examples=\(\) has no value"),
        ({"data.skip": 3}, "data.skip=3: membership skips the points"),
        ({"data.labels": "true"}, "data.labels=true: a held-out point has a label"),
        ({"sweep.points": ({}, {"data.labels": "true"})}, "data.labels=true"),
        ({"data.num_held_out": 0}, "16 training and 0 held-out points"),
        ({"sweep.num_examples": (16, 3)}, "3 training and 16 held-out points"),
        ({"run.evaluate_points": 3}, "run.evaluate_points=3 are asked for: each must"),
    ],
)
def test_a_study_without_members_or_others_is_refused(changes, message, tmp_path):
    with pytest.raises(build.ConfigError, match=message):
        experiments.run(smoke(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_held_out_points_that_are_members_are_named_before_training(
    tmp_path, monkeypatch
):
    of_config, config = build.build, smoke()

    def common(config):
        parts = of_config(config)
        held_out = np.asarray(parts.splits.held_out.x).copy()
        held_out[3] = np.asarray(parts.splits.train.x)[5]
        splits = parts.splits._replace(held_out=data.Dataset(held_out))
        return parts._replace(splits=splits)

    monkeypatch.setattr(build, "build", common)
    with pytest.raises(build.ConfigError, match=r"1 non-members are members .*: 5 = 3"):
        experiments.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_study_of_membership(tmp_path, undrawn):
    config = smoke(**{"sweep.num_examples": (8, 16)})
    numbers = experiments.run(config, tmp_path)
    for row in numbers["table"]:
        assert len(row["auc_by_model"]["mean"]) == monitor.LEVELS
        # A twin is another network, so calibrating by it changes the order.
        assert row["auc_by_model"] != row["auc_loss"]
    assert {"membership.png", "best.png"} <= {p.name for p in tmp_path.rglob("*.png")}
