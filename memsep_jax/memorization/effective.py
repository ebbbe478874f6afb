"""How many points a model can memorize: the estimate, its interval and its search."""

import numpy as np

from memsep_jax.fidelity import UndefinedError
from memsep_jax.memorization.ratio import BEGUN
from memsep_jax.shapes import Arr, Num

# Rounding must not decide whether a level is reached: a mean of ratios that equals .9
# may come out just below it.
ROUNDING = 1e-12


def effective_memorization(sizes, ratios, level: float = 0.9, weights=None) -> float:
    """Effective model memorization: EMM = max{n : R(n) >= level}.

    More points are never easier to memorize, so isotonic regression makes R
    non-increasing in n; between the sizes it is linear in log n.

    Args:
      sizes: [s], in any order.   ratios: [s], memorization ratios of networks trained
        on each of these sizes.   level: 1 - eps.   weights: [s], such as numbers of
        samples; equal by default.
    Least: s = 2, the smaller size at the level and the larger below it.
    Odd: equal ratios do not bracket any level; a step falls between its two sizes; a
      ratio that rises with n is averaged with those below it.
    Raises:
      UndefinedError: the sizes do not bracket the level.
      ValueError: fewer than two sizes, or one that is repeated or not positive; ratios
        that are not finite; a level outside (0, 1).
    Source: Gu 2023, definition 1.
    """
    order, sizes = _check_sizes(sizes, ratios, level)
    # Both ends are refused rather than extrapolated: beyond the sizes nothing is known.
    weights = np.ones(len(sizes)) if weights is None else np.asarray(weights, float)
    fit = decreasing(np.asarray(ratios, float)[order], weights[order])
    curve = ", ".join(f"{n:g}: {r:.3g}" for n, r in zip(sizes, fit, strict=True))
    if fit[-1] >= level - ROUNDING:
        raise UndefinedError(
            f"R(n) is at least level={level} at all sizes ({curve}): the largest n "
            "that reaches it lies above them; add larger sizes"
        )
    if fit[0] < level - ROUNDING:
        raise UndefinedError(
            f"R(n) is below level={level} at all sizes ({curve}): the largest n that "
            "reaches it lies below them; add smaller sizes, or train longer"
        )
    return float(_last(sizes, fit, level))


def effective_interval(
    sizes, memorized, samples: int, level: float = 0.9, seed: int = 0, draws: int = 2000
) -> tuple[float, float]:
    """A 95 % interval of `effective_memorization`, by a bootstrap over two levels.

    Seeds are drawn with replacement within each size, then samples from the binomial
    law of each seed. The differences between seeds are first stretched about their
    mean, so that the mean over drawn seeds varies as the mean over seeds does (Davison
    and Hinkley 1997, section 3.8). With one seed only samples are drawn, and the
    interval does not cover other networks. A replicate that does not bracket the level
    is put at the smallest or largest size: an end there means "at most" or "at least"
    that size.

    With fewer than five seeds the interval is too narrow if networks differ by more
    than their samples do. It also ignores that sizes were chosen by earlier
    measurements and that R may bend between them: with a factor of 2 between sizes, the
    EMM of 1 / (1 + (n / m)^2) at .9 comes out 8 % too low.

    Args:
      sizes: [s].   memorized: [s, seeds], the number of copies among `samples` samples
        of each network.
    Least: s = 2, one seed, samples = 1.
    Odd: if all sizes reach the level, both ends are the largest size; if none does,
      the smallest.
    Raises: ValueError, as `effective_memorization`, and for counts outside 0..samples.
    """
    counts = np.asarray(memorized, float)
    order, sizes = _check_sizes(sizes, counts, level)
    if (
        counts.ndim != 2
        or samples < 1
        or not ((counts >= 0) & (counts <= samples)).all()
    ):
        raise ValueError(
            f"memorized={counts.tolist()} must be [sizes, seeds], each count in "
            f"0 .. samples={samples}, of at least one sample"
        )
    # A seed, so that a report made again has the same interval.
    rng, shares = np.random.default_rng(seed), counts[order] / samples
    seeds = shares.shape[1]
    if seeds > 1:
        mean = shares.mean(axis=1, keepdims=True)
        spread = shares.var(axis=1, ddof=1, keepdims=True)
        within = (shares * (1 - shares)).mean(axis=1, keepdims=True) / samples
        # What samples contribute to the spread of the seeds is drawn again below, so it
        # is taken out here; and the mean over drawn seeds varies less than the mean
        # over seeds by the factor (seeds - 1) / seeds.
        between = np.maximum(spread - within, 0) * seeds / (seeds - 1)
        stretch = np.sqrt(
            np.divide(between, spread, out=np.zeros_like(spread), where=spread > 0)
        )
        shares = np.clip(mean + stretch * (shares - mean), 0, 1)
    chosen = rng.integers(0, seeds, (draws, *shares.shape))
    drawn = np.take_along_axis(shares[None], chosen, axis=2)
    ratios = rng.binomial(samples, drawn).mean(axis=2) / samples
    ends = _last(sizes, decreasing(ratios, np.ones(len(sizes))), level)
    low, high = np.quantile(ends, [0.025, 0.975])
    return float(low), float(high)


def decreasing(
    values: Num[Arr, "*curves s"], weights: Num[Arr, " s"]
) -> Num[Arr, "*curves s"]:
    """The nearest non-increasing values, by weighted squares: isotonic regression.

    All curves of a bootstrap at once, where `scipy.optimize.isotonic_regression` takes
    one.

    Least: s = 1.   Odd: falling values stay; rising ones become their mean.
    Source: the min-max formula, Robertson 1988, theorem 1.4.4.
    """

    def sums(a):
        return np.concatenate([np.zeros_like(a[..., :1]), np.cumsum(a, -1)], -1)

    # means[..., a, b] is the mean of the values a .. b.
    total, weight = sums(values * weights), sums(weights)
    rises = total[..., None, 1:] - total[..., :-1, None]
    width = weight[None, 1:] - weight[:-1, None]
    upper = np.triu(np.ones(width.shape, bool))
    means = np.where(upper, rises / np.where(upper, width, 1), -np.inf)
    # The least over a <= i of the largest over b >= i.
    largest = np.maximum.accumulate(means[..., ::-1], axis=-1)[..., ::-1]
    return np.min(np.where(upper, largest, np.inf), axis=-2)


def _last(sizes, fit, level):
    """The largest n that reaches the level on curves [..., s], within the sizes."""
    # Curves do not increase, so those above the level are the first.
    above = np.sum(fit >= level - ROUNDING, axis=-1)[..., None]
    i = np.clip(above - 1, 0, len(sizes) - 2)
    high, low = (np.take_along_axis(fit, j, -1)[..., 0] for j in (i, i + 1))
    drop = np.where(high > low, high - low, 1)
    part = np.where(high > low, (high - level) / drop, above[..., 0] > 1)
    start, end = (sizes[j[..., 0]] for j in (i, i + 1))
    return start * (end / start) ** np.clip(part, 0, 1)


def _check_sizes(sizes, ratios, level):
    """The order that sorts the sizes, and the sorted sizes.   Raises: ValueError."""
    sizes, ratios = np.asarray(sizes, float), np.asarray(ratios, float)
    if not 0 < level < 1:
        raise ValueError(
            f"level={level} must be in (0, 1): it is 1 - eps, and eps={1 - level:.3g}; "
            "the paper uses eps=0.1"
        )
    if len(sizes) < 2 or len(sizes) != len(ratios):
        raise ValueError(
            f"{len(sizes)} sizes and {len(ratios)} ratios: give one ratio for each of "
            "at least two sizes"
        )
    if len(np.unique(sizes)) < len(sizes) or not sizes.min() > 0:
        raise ValueError(f"sizes={sizes.tolist()} must be positive, each given once")
    if not np.isfinite(ratios).all():
        raise ValueError(f"ratios={ratios.tolist()} must be finite")
    order = np.argsort(sizes)
    return order, sizes[order]


def next_size(
    ratios: dict[int, float],
    level: float,
    low: int,
    high: int,
    smallest: int,
    largest: int,
    tolerance: float = 0.1,
    multiple: int = 1,
) -> int | None:
    """Where to measure R(n) next, to find the largest n with R(n) >= level.

    The search begins at `low` and `high`. While no size reaches the level, it takes
    half of the smallest n so far; while the largest n so far reaches it, twice that;
    then it bisects log n between the largest n that reaches it and the next larger
    measured one. Whatever the measurements, no n is requested twice, and the bracket
    shrinks each time.

    Args:
      ratios: R(n) of all sizes so far, requested or not.
      smallest, largest: limits of n.   multiple: n must be a multiple of this, such as
        the number of classes; the limits are rounded inwards.
      tolerance: the search ends when the bracket's quotient is at most 1 + tolerance.
    Least: no ratio: then `low`.
    Odd: all below the level, half of the smallest; all at it, twice the largest.
    Returns:
      n, or None: the bracket is close enough, or EMM is censored because `smallest`
      misses the level or `largest` reaches it.
    Raises:
      ValueError: arguments that break these rules.
    """
    first, last = -(-smallest // multiple) * multiple, largest // multiple * multiple
    if not (0 < level < 1 and smallest >= 1 and first <= last and tolerance > 0):
        raise ValueError(
            f"level={level} must be in (0, 1), tolerance={tolerance} positive, and a "
            f"multiple of {multiple} in smallest={smallest} .. largest={largest}"
        )
    if not first <= low <= high <= last:
        raise ValueError(
            f"low={low}, high={high}: must be in {first} .. {last}, in this order"
        )
    for start in (low, high):
        if (n := start // multiple * multiple) not in ratios:
            return n
    has = [n for n, ratio in ratios.items() if ratio >= level]
    if not has:
        least = min(ratios)
        return max(first, least // 2 // multiple * multiple) if least > first else None
    most = max(has)
    if most == max(ratios):
        more = max(2 * most, most + multiple) // multiple * multiple
        return min(last, more) if most < last else None
    above = min(n for n in ratios if n > most)
    # Multiples strictly between the two.
    begin = max(most, first - 1) // multiple + 1
    end = -(-min(above, last + 1) // multiple) - 1
    if above <= (1 + tolerance) * most or begin > end:
        return None
    return min(max(round((most * above) ** 0.5 / multiple), begin), end) * multiple


def plateaued(ratios, intervals, patience: int) -> bool:
    """Whether memorization has stopped rising along training, so that it may end.

    True once copying has begun and no lower bound of the last `patience` snapshots is
    above the best ratio before them. Copying has begun if an earlier lower bound is
    above 5 %: a run without copies has not plateaued yet. A rise smaller than its
    interval within `patience` snapshots counts as a plateau; the snapshots should be
    equally many epochs apart.

    Args: ratios [k], intervals [k, 2] (`wilson`), in the order of the snapshots.
    Least: k = 0; with fewer than patience + 1 snapshots, False.
    Odd: if all ratios are 0, False; if all are equal and above 5 %, True.
    Raises: ValueError: patience below 1, or shapes that differ.
    """
    ratios, intervals = np.asarray(ratios, float), np.asarray(intervals, float)
    if patience < 1 or intervals.shape != (len(ratios), 2):
        raise ValueError(
            f"patience={patience} must be at least 1, and intervals of shape "
            f"{intervals.shape} one pair for each of {len(ratios)} ratios"
        )
    if len(ratios) <= patience:
        return False
    begun = intervals[:-patience, 0].max() > BEGUN
    return bool(begun and intervals[-patience:, 0].max() <= ratios[:-patience].max())
