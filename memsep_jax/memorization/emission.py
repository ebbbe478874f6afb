"""Which training points a model emits, and how many it would with more samples."""

from typing import NamedTuple

import numpy as np

from memsep_jax.shapes import Arr, Float


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
