"""Which training points a model emits, how many more it would, and what tells them."""

from typing import NamedTuple

import numpy as np

from memsep_jax.shapes import Arr, Float

TOGETHER = 64  # points that are in memory as float64 at a time


class Emission(NamedTuple):
    """Which training points were emitted, and how often."""

    points: np.ndarray  # [e] indices of the emitted points
    counts: np.ndarray  # [e] copies of each
    distinct: int  # e
    coverage: float  # of the distinct training set


def emitted(nearest, memorized, n: int) -> Emission:
    """The distinct training points that samples are copies of.

    Args:
      nearest: [m] index of the nearest training point.   memorized: bool [m].
      n: distinct training points.
    Least: m = 0, n = 1.
    Odd: without copies nothing is emitted; a point copied m times counts once.
    Raises: ValueError: more points emitted than there are.
    """
    points, counts = np.unique(
        np.asarray(nearest)[np.asarray(memorized, bool)], return_counts=True
    )
    if n < max(1, len(points)):
        raise ValueError(
            f"{len(points)} training points emitted of n={n} distinct ones: give the "
            "number that was searched"
        )
    return Emission(points, counts, len(points), len(points) / n)


class Traits(NamedTuple):
    """What may decide whether a training point is emitted; a value for each, [n]."""

    sparsity: np.ndarray  # mean distance to the nearest other points
    atypicality: np.ndarray  # distance to the mean of the points of its label
    repeats: np.ndarray  # further points that are equal to it


def traits(x, near, labels=None, k: int = 10) -> Traits:
    """How sparse, untypical and repeated each training point is.

    Sparse points are memorized first in Merger & Goldt 2026 (arXiv 2606.14390), and
    prototypical ones in arXiv 2605.30642, whose definition is of strings: here a
    prototype is near the mean of its class. Of the second paper only the abstract was
    at hand.

    Args:
      x: [n, *e] training points.   near: their `Neighbours` in x itself; of k + 1 or
        fewer columns, the first of which is the point.   labels: [n], or None.
    Least: n = 2.
    Odd: a class of one point has atypicality 0; equal points share their neighbours.
    Raises: ValueError: fewer than two distinct points.
    """
    distances, first = near.distances, near.indices[:, 0]
    if distances.shape[1] < 2:
        raise ValueError(
            f"neighbours [{len(distances)}, 1] of training points in themselves: give "
            "two columns at least, the point and the nearest other one"
        )
    labels = np.zeros(len(distances)) if labels is None else np.asarray(labels)
    away = np.empty(len(distances))
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        parts = [rows[i : i + TOGETHER] for i in range(0, len(rows), TOGETHER)]
        mean = sum(_flat(x, part).sum(axis=0) for part in parts) / len(rows)
        for part in parts:
            away[part] = np.linalg.norm(_flat(x, part) - mean, axis=1)
    return Traits(
        distances[:, 1 : k + 1].mean(axis=1), away, np.bincount(first)[first] - 1
    )


def _flat(x, rows):
    # In float64: the mean of many points would lose digits in their own type.
    return np.asarray(x[rows], np.float64).reshape(len(rows), -1)


class Correlation(NamedTuple):
    """Spearman's rank correlation of two columns, with its 95 % interval."""

    value: float  # nan where a column is constant
    low: float
    high: float


def rank_correlation(a, b) -> Correlation:
    """Spearman's rank correlation of a [n] and b [n].

    Least: n = 4.
    Odd: nan where a column is constant, which orders nothing.
    Raises: ValueError: fewer than 4 pairs, or columns of different lengths.
    Source: Bonett & Wright 2000, for the interval: Fisher's z with the variance
      (1 + r^2 / 2) / (n - 3).
    """
    a, b = np.asarray(a, float), np.asarray(b, float)
    if a.shape != b.shape or a.ndim != 1 or len(a) < 4:
        raise ValueError(
            f"columns of shapes {a.shape} and {b.shape}: a rank correlation takes two "
            "of one length, at least 4"
        )
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return Correlation(np.nan, np.nan, np.nan)
    from scipy import stats  # takes over a second to import

    r = float(stats.spearmanr(a, b).statistic)
    if abs(r) > 1 - 1e-12:  # the ranks agree, to rounding, and z is infinite
        return Correlation(r, r, r)
    half = stats.norm.ppf(0.975) * np.sqrt((1 + r**2 / 2) / (len(a) - 3))
    low, high = np.tanh(np.arctanh(r) + np.array([-half, half]))
    return Correlation(r, float(low), float(high))


def which(emitted, own, columns: dict) -> dict[str, Correlation]:
    """The rank correlation of how often a training point is emitted with each column.

    Args:
      emitted: [c] index of the training point that each copy is of.
      own: the `Neighbours` of the training points in themselves: of equal points, only
        the first is emitted, and so only it is ranked.
      columns: [n] each, by name, such as those of `traits`.
    Least: c = 0 and 4 distinct points.
    Odd: nan where all points are emitted equally often, as without copies.
    Raises: ValueError: fewer than 4 distinct points.
    """
    first = own.indices[:, 0] == np.arange(len(own.indices))
    counts = np.bincount(np.asarray(emitted, int), minlength=len(first))[first]
    return {
        name: rank_correlation(counts, np.asarray(column)[first])
        for name, column in columns.items()
    }


def rarefaction(counts, total: int, sizes, n: int) -> Float[Arr, " s"]:
    """How many distinct training points s samples would emit.

    For s below the number of samples: the exact mean over subsets. Above: an
    extrapolation from the points that were emitted once and twice, towards a lower
    bound of what has not been emitted yet and at most n; it is reliable up to about
    twice as many samples.

    Args:
      counts: [e] copies of each emitted point.   total: samples, copies or not.
      sizes: [s] numbers of samples.   n: distinct training points.
    Least: e = 0, s = 0, total = n = 1.
    Odd: if nothing was emitted the result is 0; 0 samples emit 0 points; a single
      emitted point gives 1 at the size of the total and beyond; if all points were
      emitted, n.
    Raises: ValueError: counts beyond the total or n, or negative sizes.
    Source: Hurlbert 1971; Chao 1984; Chao and Jost 2012.
    """
    counts, sizes = np.asarray(counts, int), np.asarray(sizes, float)
    counts = counts[counts > 0]
    if total < max(1, counts.sum()) or len(counts) > n or (sizes < 0).any():
        raise ValueError(
            f"{counts.sum()} copies of {len(counts)} points in total={total} samples, "
            f"of n={n} points, for sizes={sizes.tolist()}: copies are samples, emitted "
            "points are training points, and no size is negative"
        )
    times, points = np.unique(counts, return_counts=True)
    once, twice = (int(np.sum(counts == c)) for c in (1, 2))
    # Chao's lower bound of the unseen; the second form is his for no doubletons.
    unseen = once**2 / (2 * twice) if twice else once * (once - 1) / 2
    # No more can be unseen than there are training points left.
    unseen = min((total - 1) / total * unseen, n - len(counts))
    drawn = np.arange(times.max(initial=0))

    def expected(s):
        if s > total:
            more = 1 - once / (total * unseen + once) if unseen else 1.0
            return len(counts) + unseen * (1 - more ** (s - total))
        # All c copies of a point are missed: (total - c choose s) / (total choose s).
        missed = np.cumprod(np.maximum(total - s - drawn, 0) / (total - drawn))
        return np.sum(points * (1 - missed[times - 1]))

    return np.array([expected(s) for s in sizes])
