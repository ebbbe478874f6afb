"""Quality of samples, from feature arrays.

Everywhere a [n, d] are features of what is judged, b [m, d] those of the reference.
Each metric says what it takes at least, and what it gives for the oddest points; where
it has no value it raises UndefinedError.
"""

from itertools import product
from typing import NamedTuple

import numpy as np
from absl import logging

SMALL = 10_000  # below so many samples a Frechet distance is biased visibly
TILE = 1_024  # points a side of what is looked at together: 8 MB of distances


class UndefinedError(ValueError):
    """A metric has no value for these points: they are fewer, or odder, than it takes.

    Arguments that are wrong for all points, or points that are no numbers, are a plain
    ValueError.
    """


class Kid(NamedTuple):
    """The kernel distance: its mean and its standard deviation over the subsets."""

    value: float
    std: float


def frechet(a, b, warn: bool = True) -> float:
    """|m_a - m_b|^2 + Tr(S_a + S_b - 2 (S_a S_b)^(1/2)), in float64.

    An FID only on Inception features; name it after its features, reference and
    sample sizes.

    Args: a [n, d], b [m, d] features.   warn: where there are few of them.
    Least: n = m = 2, d = 1.
    Odd: all equal points, the squared gap of the means and the trace of the other
      covariance; a constant feature, its squared gap alone; n <= d, repeats and rows of
      zeros are as any points.
    Raises: UndefinedError: fewer than two samples. ValueError: other shapes, values not
      finite.
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
    (mean_a, x), (mean_b, y) = _factor(a), _factor(b)
    gap = mean_a - mean_b
    # Tr (S_a S_b)^(1/2) is the nuclear norm of X Y', X'X = S_a and Y'Y = S_b: no
    # square root of a matrix that rounding made complex, and never more than the rest.
    cross = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    return float(max(0.0, gap @ gap + np.sum(x**2) + np.sum(y**2) - 2 * cross))


def precision_recall(a, b, k: int = 3) -> tuple[float, float]:
    """Shares of a that look like b, and of b that a can look like.

    Precision: the share of a inside some ball around a point of b with the radius to
    the k-th nearest *other* point of b. Recall: the same with a and b exchanged. Both
    depend on n and m: compare at equal numbers.

    Args: a [n, d] generated, b [m, d] reference features.
    Returns: precision, recall, both in [0, 1].
    Least: n = m = k + 1, d = 1.
    Odd: a point that occurs more than k times has a ball of radius 0, which holds its
      copies; so all equal points of one set look like the other set where that, or one
      of its balls, holds their place. n <= d, constant features and rows of zeros are
      as any points.
    Raises: UndefinedError: at most k samples. ValueError: k < 1, other shapes, values
      not finite.
    Source: Kynkaanniemi 2019, section 2.
    """
    a, b = _features("precision_recall", a, b, k + 1, _others(k))
    return _balls(a, b, k, None)[:2]


def density_coverage(a, b, k: int = 5) -> tuple[float, float]:
    """How many balls of b hold a point of a, over k, and how many hold one at all.

    Balls as in `precision_recall`, around b only: an outlier of a has none. Closed
    balls: the authors' program leaves the rim out, and with it a copy of a point that
    occurs more than k times.

    Args: a [n, d] generated, b [m, d] reference features.
    Returns: density, about 1 (not at most 1) where the laws agree; coverage in [0, 1].
    Least, Odd, Raises: as `precision_recall`. All equal points of both sets in one
      place have a density of m / k: each of the m balls holds them.
    Source: Naeem 2020, section 3.
    """
    a, b = _features("density_coverage", a, b, k + 1, _others(k))
    return _balls(a, b, None, k)[2:]


def balls(a, b, near: int = 3, around: int = 5) -> tuple[float, float, float, float]:
    """`precision_recall` and `density_coverage` together: one look at all distances.

    Args: a [n, d], b [m, d] features.   near, around: k of the one and of the other.
    Returns: precision, recall, density, coverage.
    Least, Odd, Raises: as those.
    """
    _others(min(near, around))  # both are at least 1
    most = max(near, around)
    a, b = _features("balls", a, b, most + 1, _others(most))
    return _balls(a, b, near, around)


def _balls(a, b, near, around):
    """Precision and recall of `near`, density and coverage of `around`; or None."""
    like_b, like_a = np.zeros(len(a), bool), np.zeros(len(b), bool)
    held, holds = 0, np.zeros(len(b), bool)
    radii_a = None if near is None else _radii(a, near)[0]
    radii_b = _radii(b, *(k for k in (near, around) if k is not None))
    for i, j in _tiles(a, b):
        limits = [radii[None, j] for radii in radii_b]
        other = [] if radii_a is None else [radii_a[i, None]]
        squares = _decided(a[i], b[j], *limits, *other)
        if near is not None:
            like_b[i] |= np.any(squares <= limits[0], axis=1)
            like_a[j] |= np.any(squares <= other[0], axis=0)
        if around is not None:
            inside = squares <= limits[-1]
            held += int(inside.sum())
            holds[j] |= inside.any(axis=0)
    density = None if around is None else held / (around * len(a))
    return float(like_b.mean()), float(like_a.mean()), density, float(holds.mean())


def kid(a, b, subsets: int = 100, size: int = 1_000, seed: int = 0) -> Kid:
    """The unbiased MMD^2 with the kernel (x.y / d + 1)^3: 0 on average for one law.

    Taken over `subsets` draws, without replacement, of min(size, n, m) points of each.
    Draws overlap: their spread is no standard error.

    Args: a [n, d], b [m, d] features.
    Least: n = m = 2, d = 1.
    Odd: all equal points x against all equal y, k(x, x) + k(y, y) - 2 k(x, y); a set
      against itself, at most 0, as no point is compared with itself; n <= d, constant
      features, repeats and rows of zeros are as any points.
    Raises: UndefinedError: fewer than two samples. ValueError: subsets < 1, size < 2,
      other shapes, values not finite.
    Source: Binkowski 2018, section 4.
    """
    a, b = _features("kid", a, b, 2, "an unbiased estimate needs two")
    if subsets < 1 or size < 2:
        raise ValueError(f"kid: subsets={subsets} must be 1, size={size} 2, or more")
    size, rng = min(size, len(a), len(b)), np.random.default_rng(seed)

    def mmd2():
        x, y = (
            c[rng.choice(len(c), size, replace=False)].astype(np.float64)
            for c in (a, b)
        )
        # Unbiased: no point is compared with itself.
        own = sum(_kernel_sum(c, c) - _cube(np.sum(c**2, axis=1), c) for c in (x, y))
        return own / (size * (size - 1)) - 2 * _kernel_sum(x, y) / size**2

    found = [mmd2() for _ in range(subsets)]
    return Kid(float(np.mean(found)), float(np.std(found)))


def vendi(a) -> float:
    """How many samples that share nothing are as diverse as these: 1 .. n.

    The exponential of the entropy of the eigenvalues of K / n, where K holds the
    cosines of all pairs. It sees no reference: noise is diverse.

    Args: a [n, d] features.
    Least: n = 1, d = 1.
    Odd: one point, or all equal ones, 1; d = 1, 1 where all have one sign; at most
      min(n, d); repeats count by their share; a constant feature brings all nearer.
    Raises: UndefinedError: no sample, or a row of zeros, which has no direction.
      ValueError: values not finite.
    Source: Friedman and Dieng 2023, definition 3.1.
    """
    a, _ = _features("vendi", a, a, 1, "it needs one")
    n, d = a.shape
    # X X' and X'X have the same eigenvalues, but for zeros: the smaller one will do.
    if n <= d:
        x = _unit(a)
        gram = x @ x.T
    else:
        gram = np.zeros((d, d))
        for i in _slices(a):
            x = _unit(a[i])
            gram += x.T @ x
    values = np.linalg.eigvalsh(gram / n)
    values = values[values > 0]
    return float(np.exp(-np.sum(values * np.log(values))))


def _features(name, a, b, least, why):
    """a and b as arrays, once it is sure that they can be compared.

    As they are given: 50,000 x 2,048 of them in float64 are 0.8 GB. What is computed
    from them is converted tile by tile.
    """
    a, b = np.asarray(a), np.asarray(b)
    if a.ndim != 2 or b.ndim != 2 or not 0 < a.shape[1] == b.shape[1]:
        raise ValueError(
            f"{name} takes features [n, k] and [m, k], not {a.shape} and {b.shape}"
        )
    if min(len(a), len(b)) < least:
        raise UndefinedError(f"{name} of {len(a)} against {len(b)} samples: {why}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError(f"{name}: features hold NaN or infinite values")
    return a, b


def _others(k):
    if k < 1:
        raise ValueError(f"k={k} neighbours must be at least 1; the papers use 3 and 5")
    return f"k={k} other points need at least {k + 1}; draw more or lower k"


def _factor(a):
    """The mean [k], and [r, k] with factor' factor = the covariance; r at most k."""
    mean, scale = a.mean(axis=0, dtype=np.float64), np.sqrt(len(a) - 1)
    if len(a) <= a.shape[1]:
        return mean, (a - mean) / scale
    covariance = np.zeros((a.shape[1], a.shape[1]))
    for i in _slices(a):
        centred = (a[i] - mean) / scale
        covariance += centred.T @ centred
    values, vectors = np.linalg.eigh(covariance)
    return mean, np.sqrt(np.maximum(values, 0))[:, None] * vectors.T


def _cube(products, x):
    """Sum of the kernel over products x.y."""
    z = products / x.shape[1] + 1
    return np.sum(z * z * z)


def _kernel_sum(x, y):
    return sum(_cube(x[i] @ y[j].T, x) for i, j in _tiles(x, y))


def _unit(a):
    """Rows of length 1."""
    norms = np.linalg.norm(a.astype(np.float64), axis=1, keepdims=True)
    if not norms.all():
        raise UndefinedError(
            "vendi: the features of a sample are all 0, so it has no direction: leave "
            "it out, or centre the features"
        )
    return a / norms


def _radii(points, *ks):
    """Squared distance of each point to its k-th nearest other: [n] for each k."""
    k = max(ks)
    best = np.full((len(points), k), np.inf)
    for i, j in _tiles(points, points):
        if i.start > j.start:
            continue  # seen from the other side
        squares, slack = _squares(points[i], points[j])
        if i == j:
            np.fill_diagonal(squares, np.inf)
        best[i] = _nearer(best[i], points[i], points[j], squares, slack)
        if i != j:
            best[j] = _nearer(best[j], points[j], points[i], squares.T, slack.T)
    best.sort(axis=1)
    return [best[:, k - 1] for k in ks]


def _nearer(best, x, y, squares, slack):
    """The k smallest of best [n, k] and of the squares [n, m] of x and y."""
    k = best.shape[1]
    limit = best.max(axis=1, keepdims=True)
    if np.isinf(limit).any():
        at_most = np.concatenate([best, squares + slack], axis=1)
        limit = np.partition(at_most, k - 1, axis=1)[:, k - 1 : k]
    near = squares - slack < limit
    # Few, and so their rows are packed to the left before they are sorted.
    i, j = np.nonzero(near)
    counts = np.bincount(i, minlength=len(x))
    found = np.full((len(x), counts.max()), np.inf)
    found[i, np.arange(len(i)) - (np.cumsum(counts) - counts)[i]] = _direct(x, y, i, j)
    merged = np.concatenate([best, found], axis=1)
    return np.partition(merged, k - 1, axis=1)[:, :k]


# A copy on the rim of a ball is inside, so rounding may not decide. Distances come from
# a matrix product, at its speed; those that its rounding leaves open, few, are taken
# again by differences: 0 for equal points, and equal for equal pairs in any order.


def squared_distances(x, y):
    """|x_i - y_j|^2 in float64 by a matrix product, with relative errors below 1e-6.

    Args: x [n, d], y [m, d].   Returns: [n, m]; 0 for copies.
    """
    found, slack = _squares(x, y)
    i, j = np.nonzero(found < 1e6 * slack)
    found[i, j] = _direct(x, y, i, j)
    return found


def _decided(x, y, *limits):
    """|x_i - y_j|^2 [n, m], right on which side of each limit they are."""
    squares, slack = _squares(x, y)
    doubt = np.any([np.abs(squares - limit) <= slack for limit in limits], axis=0)
    i, j = np.nonzero(doubt)
    squares[i, j] = _direct(x, y, i, j)
    return squares


def _slices(x):
    return [slice(i, i + TILE) for i in range(0, len(x), TILE)]


def _tiles(x, y):
    """Pairs of slices that cover [n, m]."""
    return product(_slices(x), _slices(y))


def _squares(x, y):
    """|x_i - y_j|^2 by a matrix product, and a bound on its rounding; both [n, m]."""
    # Distances do not change when all is centred, and rounding shrinks.
    centre = y.mean(axis=0, dtype=np.float64)
    x, y = x - centre, y - centre
    norms = _norms(x)[:, None] + _norms(y)
    # Each of d + 4 roundings, of the product and of the differences, at its worst.
    limits = np.finfo(np.float64)
    slack = 4 * (x.shape[1] + 4) * limits.eps * norms + limits.tiny
    norms -= 2 * (x @ y.T)
    return norms, slack


def _norms(x):
    return np.einsum("ij,ij->i", x, x)


def _direct(x, y, i, j):
    """|x_i - y_j|^2 by differences, for each pair of i [p] and j [p]."""
    found = np.empty(len(i))
    step = max(1, TILE**2 // x.shape[1])
    for s in range(0, len(i), step):
        gaps = x[i[s : s + step]].astype(np.float64) - y[j[s : s + step]]
        found[s : s + step] = np.sum(gaps**2, axis=1)
    return found
