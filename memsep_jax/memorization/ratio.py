"""The share of copied samples, what honest samples would score, and intervals."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from memsep_jax.fidelity import UndefinedError
from memsep_jax.neighbours import Neighbours, distinct, searcher
from memsep_jax.roots import root
from memsep_jax.shapes import Arr, Bool, Float, Num, Point, Points

RATIO = 1 / 3  # the criterion of the papers: d1 < d2 / 3
# A run whose share of copies is above this copies at all: the null level, about 3^-d in
# d dimensions, is far below it except in very few.
BEGUN = 0.05


class Ratio(NamedTuple):
    """The share of memorized samples, with the evidence for it."""

    value: float
    interval: tuple[float, float]  # Wilson, 95 %
    null: float | None  # the same share among held-out points
    null_interval: tuple[float, float] | None
    neighbours: Neighbours
    memorized: np.ndarray  # [m] bool
    duplicates: int  # training points that repeat an earlier one


def nearest_two(x: Point, data: Points) -> Float[Arr, " 2"]:
    """Distances to the nearest and to the second nearest *distinct* training point.

    Least: n = 1, d = 1.
    Odd: with one distinct point the second distance is infinite. Repeats count as one
      point. Among points equally near, the first is the nearest.
    """
    data = jnp.asarray(data)
    axes = tuple(range(1, data.ndim))
    squares = jnp.sum((x[None] - data) ** 2, axis=axes)
    nearest = data[jnp.argmin(squares)]
    # A copy of a point that occurs twice has d1 = d2: only another point is second.
    same = jnp.all(data == nearest[None], axis=axes)
    return root(
        jnp.stack([jnp.min(squares), jnp.min(squares, where=~same, initial=jnp.inf)])
    )


def memorized(x: Point, data: Points, ratio: float = RATIO) -> Bool[Arr, ""]:
    """Whether d1 < ratio d2.

    Least, Odd: as `nearest_two`; with one distinct point every sample is a copy, so
      `ratio` refuses such data; where d1 = d2 none is.
    """
    nearest, second = nearest_two(x, data)
    return nearest < ratio * second


def ratio(
    samples, data, held_out=None, threshold: float = RATIO, chunk: int = 1_024
) -> Ratio:
    """The memorization ratio, its interval, and the null level of held-out points.

    Args:
      samples: [m, *e] generated points.   data: [n, *e] the training set.
      held_out: [l, *e] points that were not trained on, or None.
    Least: m = 1, two distinct of n, l = 0, d = 1.
    Odd: repeats in the data count as one point; constant features and zeros change
      nothing; equal samples count once each; an empty held-out set is the same as None.
    Raises:
      UndefinedError: no samples, or fewer than two distinct training points, for which
        a second neighbour does not exist.
      ValueError: a threshold outside (0, 1).
    Source: Gu 2023, section 2; Ye 2025, section 6.
    """
    if not 0 < threshold < 1:
        raise ValueError(f"threshold={threshold} must be in (0, 1); the papers use 1/3")
    if len(samples) < 1:
        raise UndefinedError("no samples: the memorization ratio needs at least one")
    count = len(distinct(data))
    if count < 2:
        raise UndefinedError(
            f"the memorization ratio needs two distinct training points and got {count}"
            ": use more data, or the distance to the nearest one (neighbours.nearest, "
            "k=1)"
        )
    search = searcher(data, 2, chunk)
    null = held_out is not None and len(held_out) > 0
    held = search(held_out) if null else None
    return ratio_of(search(samples), held, len(data) - count, threshold)


def ratio_of(neighbours, held_out, duplicates: int, threshold: float = RATIO) -> Ratio:
    """`ratio`, from neighbours that have already been searched.

    Args: neighbours and held_out, `Neighbours` or `Mirrored`; held_out may be None.
    """
    flags = copied(neighbours, threshold)
    null = None if held_out is None else copied(held_out, threshold)
    return Ratio(
        value=float(flags.mean()),
        interval=wilson(int(flags.sum()), len(flags)),
        null=None if null is None else float(null.mean()),
        null_interval=None if null is None else wilson(int(null.sum()), len(null)),
        neighbours=neighbours,
        memorized=flags,
        duplicates=duplicates,
    )


def copied(neighbours, threshold: float = RATIO) -> Bool[Arr, "*batch m"]:
    """Which samples are memorized: d1 < threshold d2.

    Args: neighbours, `Neighbours` or `Mirrored`.
    Least: m = 0, k = 2 neighbours.
    Odd: d1 = d2 = 0 is not a copy; with an infinite d2 any finite d1 is one.
    """
    return neighbours.distances[..., 0] < threshold * neighbours.distances[..., 1]


def quotient(d1, d2) -> Num[Arr, " m"]:
    """d1 / d2: small if a sample is a copy, 1 if both are 0.

    Least: m = 0.   Odd: 0 / 0 is 1; over an infinite d2, 0.
    """
    d1, d2 = np.asarray(d1), np.asarray(d2)
    return np.divide(d1, d2, out=np.ones_like(d1), where=d2 > 0)


def wilson(count: int, total: int, level: float = 0.95) -> tuple[float, float]:
    """The Wilson score interval of a share (Wilson 1927).

    Least: total = 1.
    Odd: a count of 0 gives 0 to z^2 / (total + z^2); a count of total, the mirror.
    Raises: ValueError: a total below 1, or a count outside 0 .. total.
    """
    if not 0 <= count <= total or total < 1:
        raise ValueError(f"count={count} of total={total} is not a share")
    from scipy import stats  # takes over a second to import

    # Wilson's, since copies are often none or all, where the interval of a normal law
    # has no width.
    low, high = stats.binomtest(count, total).proportion_ci(level, "wilson")
    return float(low), float(high)


def excess(count: int, total: int, null_count: int, null_total: int):
    """How far the ratio is above its null level, with a 95 % interval.

    Args: copies among the samples, and among held-out points.
    Returns: the difference, (low, high).
    Least: total = null_total = 1.
    Odd: two equal shares differ by 0, in an interval that contains it.
    Raises: ValueError: as `wilson`.
    Source: Newcombe 1998 (Statistics in Medicine 17, 873), method 10: the hybrid of
      two Wilson intervals.
    """
    low, high = wilson(count, total)
    null_low, null_high = wilson(null_count, null_total)
    share, null = count / total, null_count / null_total
    value = share - null
    # The lower end is that of a share as low, and a null level as high, as their own
    # intervals allow; independent deviations add as squares.
    down = np.hypot(share - low, null_high - null)
    up = np.hypot(high - share, null - null_low)
    return value, (float(value - down), float(value + up))


def by_chance(count: int, total: int, null_count: int, null_total: int) -> float:
    """The probability of as many copies, if samples copy as held-out points do.

    This test is exact where `excess` is not: for 1 copy in 1,000 against 0 in 10,000
    the interval of `excess` lies above 0, though one pair of sets in eleven from the
    same law gives such counts.

    Least: one sample and one held-out point.
    Odd: 1 where nothing is a copy, and where everything is.

    Args: as `excess`.   Returns: the one-sided p-value of Fisher's exact test.
    Source: Fisher 1935, section 21.1: hypergeometric, given all copies together.
    """
    from scipy import stats  # takes over a second to import

    table = [[count, total - count], [null_count, null_total - null_count]]
    return float(stats.fisher_exact(table, alternative="greater").pvalue)
