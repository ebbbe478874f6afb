"""Quality of samples, from feature arrays.

Everywhere a [n, d] are features of what is judged, b [m, d] those of the reference.
"""

from itertools import product
from typing import NamedTuple

import numpy as np
from absl import logging

SMALL = 10_000  # below so many samples a Frechet distance is biased visibly
TILE = 1_024  # points a side of what is looked at together: 8 MB of distances


class Kid(NamedTuple):
    """The kernel distance: its mean and its standard deviation over the subsets."""

    value: float
    std: float


def frechet(a, b, warn: bool = True) -> float:
    """|m_a - m_b|^2 + Tr(S_a + S_b - 2 (S_a S_b)^(1/2)), in float64.

    An FID only on Inception features; name it after its features, reference and
    sample sizes.

    Args: a [n, d], b [m, d] features.   warn: where there are few of them.
    Raises: ValueError: fewer than two samples, other shapes, values not finite.
    Source: Heusel 2017.
    """
    a, b = _features("frechet", a, b, 2, "a covariance needs two")
    if warn and min(len(a), len(b)) < SMALL:
        logging.warning(
            "frechet distance of %d against %d samples: below %d it is biased upwards",
            len(a),
            len(b),
            SMALL,
        )
    gap = a.mean(axis=0) - b.mean(axis=0)
    # Tr (S_a S_b)^(1/2) is the nuclear norm of X Y', X'X = S_a and Y'Y = S_b: no
    # square root of a matrix that rounding made complex, and never more than the rest.
    x, y = _factor(a), _factor(b)
    cross = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    return float(max(0.0, gap @ gap + np.sum(x**2) + np.sum(y**2) - 2 * cross))


def precision_recall(a, b, k: int = 3) -> tuple[float, float]:
    """Shares of a that look like b, and of b that a can look like.

    Precision: the share of a inside some ball around a point of b with the radius to
    the k-th nearest *other* point of b. Recall: the same with a and b exchanged. Both
    depend on n and m: compare at equal numbers.

    Args: a [n, d] generated, b [m, d] reference features.
    Returns: precision, recall, both in [0, 1].
    Raises: ValueError: k < 1, at most k samples, other shapes, values not finite.
    Source: Kynkaanniemi 2019, section 2.
    """
    a, b = _features("precision_recall", a, b, k + 1, _others(k))
    (held, _), (held_b, _) = _balls(a, b, k), _balls(b, a, k)
    return float(np.mean(held > 0)), float(np.mean(held_b > 0))


def density_coverage(a, b, k: int = 5) -> tuple[float, float]:
    """How many balls of b hold a point of a, over k, and how many hold one at all.

    Balls as in `precision_recall`, around b only: an outlier of a has none. Closed
    balls: the authors' program leaves the rim out, and with it a copy of a point that
    occurs more than k times.

    Args: a [n, d] generated, b [m, d] reference features.
    Returns: density, about 1 (not at most 1) where the laws agree; coverage in [0, 1].
    Raises: as `precision_recall`.
    Source: Naeem 2020, section 3.
    """
    a, b = _features("density_coverage", a, b, k + 1, _others(k))
    held, holds = _balls(a, b, k)
    return float(np.mean(held) / k), float(np.mean(holds > 0))


def kid(a, b, subsets: int = 100, size: int = 1_000, seed: int = 0) -> Kid:
    """The unbiased MMD^2 with the kernel (x.y / d + 1)^3: 0 on average for one law.

    Taken over `subsets` draws, without replacement, of min(size, n, m) points of each.
    Draws overlap: their spread is no standard error.

    Args: a [n, d], b [m, d] features.
    Raises: ValueError: subsets < 1, size < 2, fewer than two samples, other shapes,
      values not finite.
    Source: Binkowski 2018, section 4.
    """
    a, b = _features("kid", a, b, 2, "an unbiased estimate needs two")
    if subsets < 1 or size < 2:
        raise ValueError(f"kid: subsets={subsets} must be 1, size={size} 2, or more")
    size, rng = min(size, len(a), len(b)), np.random.default_rng(seed)

    def mmd2():
        x, y = (c[rng.choice(len(c), size, replace=False)] for c in (a, b))
        # Unbiased: no point is compared with itself.
        own = sum(_kernel_sum(c, c) - _cube(np.sum(c**2, axis=1), c) for c in (x, y))
        return own / (size * (size - 1)) - 2 * _kernel_sum(x, y) / size**2

    found = [mmd2() for _ in range(subsets)]
    return Kid(float(np.mean(found)), float(np.std(found)))


def _features(name, a, b, least, why):
    """a and b in float64, once it is sure that they can be compared."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 2 or b.ndim != 2 or not 0 < a.shape[1] == b.shape[1]:
        raise ValueError(
            f"{name} takes features [n, k] and [m, k], not {a.shape} and {b.shape}"
        )
    if min(len(a), len(b)) < least:
        raise ValueError(f"{name} of {len(a)} against {len(b)} samples: {why}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError(f"{name}: features hold NaN or infinite values")
    return a, b


def _others(k):
    if k < 1:
        raise ValueError(f"k={k} neighbours must be at least 1; the papers use 3 and 5")
    return f"k={k} other points need at least {k + 1}; draw more or lower k"


def _factor(a):
    """[r, k] with factor' factor = the covariance of a; r at most k."""
    centred = (a - a.mean(axis=0)) / np.sqrt(len(a) - 1)
    if len(a) <= a.shape[1]:
        return centred
    values, vectors = np.linalg.eigh(centred.T @ centred)
    return np.sqrt(np.maximum(values, 0))[:, None] * vectors.T


def _cube(products, x):
    """Sum of the kernel over products x.y."""
    z = products / x.shape[1] + 1
    return np.sum(z * z * z)


def _kernel_sum(x, y):
    return sum(_cube(x[i] @ y[j].T, x) for i, j in _tiles(x, y))


def _balls(points, centres, k):
    """How many balls hold each point [n]; how many points each ball holds [m]."""
    radii = _radii(centres, k)
    held, holds = np.zeros(len(points), int), np.zeros(len(centres), int)
    for i, j in _tiles(points, centres):
        squares, slack = _squares(points[i], centres[j])
        doubt = np.abs(squares - radii[j]) <= slack
        squares[doubt] = _direct(points[i], centres[j], doubt)
        inside = squares <= radii[j]
        held[i] += inside.sum(axis=1)
        holds[j] += inside.sum(axis=0)
    return held, holds


def _radii(points, k):
    """Squared distance of each point to its k-th nearest other.   [n, d] -> [n]."""
    best = np.full((len(points), k), np.inf)
    for i, j in _tiles(points, points):
        squares, slack = _squares(points[i], points[j])
        if i == j:
            np.fill_diagonal(squares, np.inf)
        at_most = np.concatenate([best[i], squares + slack], axis=1)
        limit = np.partition(at_most, k - 1, axis=1)[:, k - 1 : k]
        near = squares - slack < limit
        squares = np.where(near, squares, np.inf)
        squares[near] = _direct(points[i], points[j], near)
        merged = np.concatenate([best[i], squares], axis=1)
        best[i] = np.partition(merged, k - 1, axis=1)[:, :k]
    return best[:, k - 1]


# A copy on the rim of a ball is inside, so rounding may not decide. Distances come from
# a matrix product, at its speed; those that its rounding leaves open, few, are taken
# again by differences: 0 for equal points, and equal for equal pairs in any order.


def _tiles(x, y):
    """Pairs of slices that cover [n, m]."""
    rows, columns = (
        [slice(i, i + TILE) for i in range(0, len(c), TILE)] for c in (x, y)
    )
    return product(rows, columns)


def _squares(x, y):
    """|x_i - y_j|^2 by a matrix product, and a bound on its rounding; both [n, m]."""
    centre = y.mean(axis=0)  # distances do not change, and rounding shrinks
    x, y = x - centre, y - centre
    norms = np.sum(x**2, axis=1)[:, None] + np.sum(y**2, axis=1)
    # Each of d + 4 roundings, of the product and of the differences, at its worst.
    limits = np.finfo(np.float64)
    slack = 4 * (x.shape[1] + 4) * limits.eps * norms + limits.tiny
    return norms - 2 * x @ y.T, slack


def _direct(x, y, where):
    """|x_i - y_j|^2 by differences, in the order of where [n, m] bool."""
    i, j = np.nonzero(where)
    found = np.empty(len(i))
    step = max(1, TILE**2 // x.shape[1])
    for s in range(0, len(i), step):
        gaps = x[i[s : s + step]] - y[j[s : s + step]]
        found[s : s + step] = np.sum(gaps**2, axis=1)
    return found
