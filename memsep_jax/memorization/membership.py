"""Who was in the training set: membership inference at each noise level.

A statistic of a point is small where the point was trained on: the loss, PIA, SecMI,
and the loss calibrated by that of another score. Each takes any score_fn. How well a
statistic tells members from other points is its AUC and its TPR at 1 % FPR.

The articles on PIA and SecMI number the steps of DDPM; here they are times. Both run
on x0 itself at step 0, where alpha is 1 to 5e-5: here on alpha x0 at the time `start`.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import betainc

from memsep_jax import analytic
from memsep_jax.checks import check_on_host, is_known
from memsep_jax.gap import eps_loss
from memsep_jax.memorization.ratio import wilson
from memsep_jax.process import Process, check_time, perturb
from memsep_jax.score import ScoreFn
from memsep_jax.shapes import Arr, Float, Keys, Num, Point, Points, Scalar

FPR = 0.01  # at which the TPR is read off
Z = 1.959963984540054  # of a 95 % interval
# Points from which the ranges of two sets are compared: those of fewer may differ by
# chance as much as by their preprocessing.
COMPARED = 10
BATCH = 64  # points at a time


class Statistics(NamedTuple):
    """Statistics of one point at k times, small where it was trained on."""

    loss: jax.Array  # [k] the eps-loss, a mean over draws of the noise
    pia: jax.Array  # [k]
    secmi: jax.Array  # [k]
    by_complexity: jax.Array  # [k] the loss, less that of `analytic.gaussian`
    by_model: jax.Array | None  # [k] the loss, less that of a second model


class Separation(NamedTuple):
    """How well a statistic tells members from other points."""

    auc: float  # P(a member's is below a non-member's), ties one half
    interval: tuple[float, float]  # DeLong, 95 %
    tpr: float  # members found at a false positive rate of at most 1 %
    tpr_interval: tuple[float, float]  # Wilson, 95 %, at this threshold


UNKNOWN = Separation(np.nan, (np.nan, np.nan), np.nan, (np.nan, np.nan))


class Curve(NamedTuple):
    """The `Separation` of each statistic against time, its arrays [k] or [k, 2]."""

    times: np.ndarray  # [k]
    loss: Separation
    pia: Separation
    secmi: Separation
    by_complexity: Separation
    by_model: Separation | None
    counts: tuple[int, int]  # of members and of non-members
    note: str | None  # where there are too few non-members for an FPR of 1 %


# Statistics of one point. The loss is `gap.eps_loss`.


def pia(
    score_fn: ScoreFn,
    process: Process,
    x0: Point,
    t: Scalar,
    start: Scalar,
    p: float = 4.0,
) -> Scalar:
    """The proximal initialization attack: |eps(X_t, t) - eps_0|^p, a mean per value.

    eps_0 = eps(x0, start) is the noise of X_t, so that nothing is drawn.

    Args: start [] > 0, the earliest time, such as the smallest of those measured.
    Source: Kong 2024 (arXiv 2305.18355), as copies of the authors' program have it:
      p = 4, and no root of the sum.
    """
    eps_0 = _eps(score_fn, process, process.alpha(start) * x0, start)
    eps_t = _eps(score_fn, process, perturb(process, x0, t, eps_0), t)
    return jnp.mean(jnp.abs(eps_t - eps_0) ** p)


def secmi(
    score_fn: ScoreFn, process: Process, x0: Point, times: Num[Arr, " k"]
) -> Float[Arr, " k"]:
    """SecMI's t-error: how far a deterministic step and the step back lead away.

    From x0 at the first time, deterministic steps (DDIM) lead to each time in turn.
    There a step to the next time and back gives |x' - x|^2, a mean per value. The last
    time has no next one: there it is the step to the time before and back.

    Args: times [k] > 0, increasing, k >= 2.
    Source: Duan 2023 (arXiv 2302.01316), SecMI_stat, by the authors' program, which
      sums over the values.
    """

    def step(x, t, to):
        eps = _eps(score_fn, process, x, t)
        clean = (x - process.sigma(t) * eps) / process.alpha(t)
        return perturb(process, clean, to, eps)

    def at(x, pair):
        t, to = pair
        further = step(x, t, to)
        return further, jnp.mean((step(further, to, t) - x) ** 2)

    times = jnp.asarray(times)
    # The step from the last time leads to the one before, so no score is asked for
    # beyond the times that a network has been trained on.
    pairs = times, jnp.append(times[1:], times[-2])
    return jax.lax.scan(at, process.alpha(times[0]) * x0, pairs)[1]


def statistics(
    score_fn: ScoreFn,
    process: Process,
    x0: Point,
    times: Num[Arr, " k"],
    key: Keys,
    draws: int = 4,
    *,
    simple: ScoreFn,
    reference: ScoreFn | None = None,
) -> Statistics:
    """All statistics of one point.

    The losses of all scores are of the same noise, so that calibration removes much of
    the chance too.

    Args: times [k] > 0, increasing, k >= 2; simple, `analytic.gaussian` of members and
      non-members together, which does not know who is which: its loss says how much of
      the point a linear denoiser does not foresee. With fewer points than dimensions
      all of them are equally far from their mean by this covariance, and the loss at
      small times is a constant. reference, the score of a second model, which was not
      trained on the point.
    Source: Carlini 2023 for the loss; Watson 2022 (arXiv 2111.08440) for the difference
      from a second model; Serra 2020 (arXiv 1909.11480) for the difference from what a
      simple code makes of the point, there a PNG. Of the last two only the abstracts
      were at hand.
    """
    times = jnp.asarray(times)
    scores = [score_fn, simple] + ([] if reference is None else [reference])

    def at(t, key):
        eps = jax.random.normal(key, (draws, *jnp.shape(x0)), jnp.result_type(x0))

        def losses(eps):
            return jnp.stack([eps_loss(s, process, x0, t, eps) for s in scores])

        return jnp.mean(jax.vmap(losses)(eps), axis=0)

    loss, *others = jax.vmap(at)(times, jax.random.split(key, len(times))).T
    attacked = jax.vmap(lambda t: pia(score_fn, process, x0, t, times[0]))(times)
    calibrated = [loss - other for other in others]
    steps = secmi(score_fn, process, x0, times)
    return Statistics(loss, attacked, steps, calibrated[0], (*calibrated, None)[1])


# Of two sets.


def curve(
    score_fn: ScoreFn,
    process: Process,
    members: Points,
    non_members,
    times,
    key: Keys,
    draws: int = 4,
    *,
    reference: ScoreFn | None = None,
) -> Curve:
    """How well each statistic tells members from non-members, at each noise level.

    Every point has noise of its own, as the intervals assume.

    Args:
      members: [n, *e] points that the score was fitted to.   non_members: [n2, *e]
        others of the same law, prepared in the same way.   times: [k] > 0, increasing.
      draws: of the noise, per point and time.   reference: the score of a second
        model, which was trained on none of these points.
    Raises: ValueError: as `check_sets`; times that do not increase, fewer than two of
      them or one that is not positive; draws below 1.
    """
    check_on_host("membership.curve", members, non_members, times)
    check_sets(members, non_members)
    check_times(times)
    if draws < 1:
        raise ValueError(f"draws={draws} of the noise: at least 1")
    times = jnp.asarray(times)
    points = jnp.concatenate([jnp.asarray(members), jnp.asarray(non_members)])
    simple = analytic.gaussian(points, process)

    def one(a):
        return statistics(
            score_fn, process, a[0], times, a[1], draws,
            simple=simple, reference=reference,
        )  # fmt: skip

    @jax.jit
    def every(points, keys):
        return jax.lax.map(one, (points, keys), batch_size=BATCH)

    values = every(points, jax.random.split(key, len(points)))
    return curve_of(times, values, len(members))


def curve_of(times, values: Statistics, n: int) -> Curve:
    """The curve from the statistics of all points; NaN where one is not finite.

    Args: values, arrays [n + n2, k], of which the first n are the members'.
    """

    def of(values):
        if values is None:
            return None
        check_on_host("membership.curve_of", values)
        return separations(values, np.arange(len(values)) < n)

    others, note = len(values.loss) - n, None
    if others * FPR < 1:
        note = (
            f"with {others} non-members no FPR lies between 0 and {1 / others:.2g}: "
            f"the TPR at {FPR:.0%} FPR is that at 0"
        )
    each = Statistics(*map(of, values))
    return Curve(np.asarray(times), **each._asdict(), counts=(n, others), note=note)


def separation(members, non_members) -> Separation:
    """AUC and TPR at 1 % FPR of a statistic that is smaller for members.

    The TPR is the largest at an FPR of at most 1 %; its interval takes the threshold as
    given. Where the sets are wholly apart DeLong's interval has no width: there it is
    Wilson's of the min(n, n2) disjoint pairs, all of which are in one order.

    Args: members [n], non_members [n2], n, n2 >= 2.
    Odd: equal values everywhere give an AUC of 1/2 without width, and a TPR of 0.
    Raises: ValueError: fewer than two of either, or values that are not finite.
    Source: DeLong 1988 (Biometrics 44, 837); Wilson 1927.
    """
    check_on_host("membership.separation", members, non_members)
    from scipy import stats
    from sklearn import metrics  # both take over a second, and few runs need them

    members, non_members = (np.asarray(a, np.float64) for a in (members, non_members))
    n, n2 = len(members), len(non_members)
    if min(n, n2) < 2:
        raise ValueError(f"{n} members and {n2} non-members: at least 2 of each")
    values = np.concatenate([members, non_members])
    if not np.isfinite(values).all():
        raise ValueError(
            f"{np.sum(~np.isfinite(values))} of {len(values)} statistics are not "
            "finite: look at the score at this time"
        )
    # Small values are the members': the score of a point is minus its statistic.
    labels = np.arange(n + n2) < n
    auc = float(metrics.roc_auc_score(labels, -values))
    fpr, tpr, _ = metrics.roc_curve(labels, -values, drop_intermediate=False)
    found = float(tpr[fpr <= FPR].max())
    # Each point's share of pairs in the right order, from ranks (Sun & Xu 2014).
    ranks = stats.rankdata(-values)
    mine = (ranks[:n] - stats.rankdata(-members)) / n2
    theirs = 1 - (ranks[n:] - stats.rankdata(-non_members)) / n
    error = math.sqrt(np.var(mine, ddof=1) / n + np.var(theirs, ddof=1) / n2)
    interval = max(0.0, auc - Z * error), min(1.0, auc + Z * error)
    if auc in (0.0, 1.0):
        pairs = min(n, n2)
        interval = wilson(round(auc * pairs), pairs)
    return Separation(auc, interval, found, wilson(round(found * n), n))


def separations(values, members):
    """The `separation` of members in each column, UNKNOWN where one is not finite.

    Args: values [m, k], smaller for members; members, bool [m].
    Returns: Separation of arrays [k] or [k, 2].
    """
    check_on_host("membership.separations", values, members)
    each = [
        separation(c[members], c[~members]) if np.isfinite(c).all() else UNKNOWN
        for c in np.asarray(values, np.float64).T
    ]
    return Separation(*map(np.array, zip(*each, strict=True)))


def gaussian_auc(
    n: Scalar, d: Scalar, process: Process, t: Scalar, averaged: bool = False
) -> Scalar:
    """The mean AUC of the loss of N(mean of n points, I), fitted to N(mu, I), exactly.

    With one draw of the noise sigma s + eps is normal, of variance
    w = (sigma alpha / c)^2 (1 -+ 1/n) + (alpha^2 / c)^2, c = alpha^2 + sigma^2, for
    members (-) and non-members (+): the mean lies nearer to its own points. A member
    and a non-member are independent about it, so the AUC is P(F_{d,d} < w_+ / w_-). A
    mean over many draws is a multiple of |x - mean|^2, with w_+- = 1 +- 1/n at all t.

    Args: n >= 2 points in d dimensions; t > 0; averaged, over infinitely many draws.
    """
    if is_known(t):
        check_time(t)
    if is_known(n) and np.min(n) < 2:
        raise ValueError(f"gaussian_auc: n={n} points: at least 2")
    alpha2, v = process.alpha(t) ** 2, process.sigma(t) ** 2
    # Both in units of (alpha / c)^2, which the quotient does not know.
    noise = 0.0 if averaged else alpha2 / v
    more, less = 1 + 1 / n + noise, 1 - 1 / n + noise
    return betainc(d / 2, d / 2, more / (more + less))


# Bad input.


def check_sets(members, non_members):
    """Refuses sets that tell nothing of membership.

    Raises: ValueError: shapes or kinds of numbers that differ, fewer than two points,
      ranges of values that differ as after another preprocessing, or common points.
    """
    check_on_host("membership.check_sets", members, non_members)
    members, non_members = (np.asarray(a) for a in (members, non_members))
    sets = {"members": members, "non-members": non_members}
    if members.shape[1:] != non_members.shape[1:]:
        raise ValueError(
            f"members of shape {members.shape[1:]} and non-members of shape "
            f"{non_members.shape[1:]}: prepare both in the same way"
        )
    if members.dtype.kind != non_members.dtype.kind:
        raise ValueError(
            f"members are {members.dtype} and non-members {non_members.dtype}: prepare "
            "both in the same way"
        )
    if members.dtype.kind in "bui":
        raise ValueError(
            f"members and non-members are {members.dtype}: give floats, scaled as the "
            "score takes them"
        )
    if min(len(members), len(non_members)) < 2:
        raise ValueError(
            f"{len(members)} members and {len(non_members)} non-members: at least 2 of "
            "each, to have an interval"
        )
    flat = [a.reshape(len(a), -1) for a in sets.values()]
    if min(map(len, flat)) >= COMPARED:
        signed = sorted(np.mean(a.min(axis=1) < 0) for a in flat)
        sizes = sorted(np.median(np.abs(a).max(axis=1)) for a in flat)
        # [0, 1] against [-1, 1], and 0 .. 255 against either.
        if (signed[0] == 0 and signed[1] > 0.9) or sizes[1] > 10 * sizes[0]:
            ranges = [f"{k} in [{a.min():.3g}, {a.max():.3g}]" for k, a in sets.items()]
            raise ValueError(
                f"{' and '.join(ranges)}: not of one preprocessing, which any "
                "statistic would see; prepare both in the same way"
            )
    # By their bytes: no n x n2 distances, and what is equal is found, however many.
    rows = {a.tobytes(): i for i, a in reversed(list(enumerate(members)))}
    others = non_members.astype(members.dtype)
    common = [(rows.get(a.tobytes()), j) for j, a in enumerate(others)]
    common = [pair for pair in common if pair[0] is not None]
    if common:
        named = ", ".join(f"{i} = {j}" for i, j in common[:10])
        more = f" and {len(common) - 10} more" if len(common) > 10 else ""
        raise ValueError(
            f"{len(common)} non-members are members (member = non-member): {named}"
            f"{more}; leave them out of one set"
        )


def check_times(times):
    """Raises ValueError unless times are positive and increasing, at least two."""
    if is_known(times):
        for t in np.ravel(times):
            check_time(t)
        if len(times) < 2 or np.any(np.diff(times) <= 0):
            raise ValueError(
                f"times={np.ravel(times)[:10].tolist()}: at least two, increasing"
            )


def _eps(score_fn, process, x, t):
    """The noise in x as the score sees it: -sigma s(x, t)."""
    return -process.sigma(t) * score_fn(x, t)
