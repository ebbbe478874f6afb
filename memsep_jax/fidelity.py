"""Quality of samples, from feature arrays.

a [n, d] are always the features of the samples, b [m, d] those of the reference. Each
metric states the least input that it takes and its value for odd points; if it has no
value it raises UndefinedError.
"""

from itertools import product
from typing import NamedTuple

import numpy as np
from absl import logging

from memsep_jax.checks import check_on_host
from memsep_jax.shapes import Arr, Float

# With fewer samples a Frechet distance has a visible bias; the authors of the FID, too,
# ask for this many.
SMALL = 10_000
TILE = 1_024  # points on each side of a tile: 8 MB of distances


class UndefinedError(ValueError):
    """A metric has no value for these points: they are too few or too odd.

    Arguments that are wrong for all points, and points that are not numbers, raise a
    plain ValueError.
    """


class Kid(NamedTuple):
    """The kernel distance: its mean and its standard deviation over the subsets."""

    value: float
    std: float


class Moments(NamedTuple):
    """All that `frechet` takes from features [n, d], in float64."""

    mean: np.ndarray  # [d]
    factor: np.ndarray  # [r, d], r = min(n, d); factor' factor is the covariance
    n: int


def moments(a) -> Moments:
    """The mean and the covariance of a set that `frechet` compares with several others.

    Args: a [n, d] features.
    Least: n = 2, d = 1.
    Raises: as `frechet`.
    """
    a, _ = _features("moments", a, a, 2, "a covariance needs two")
    return _moments(a)


def frechet(a, b, warn: bool = True) -> float:
    """|m_a - m_b|^2 + Tr(S_a + S_b - 2 (S_a S_b)^(1/2)), in float64.

    It is an FID only on Inception features. Name it after its features, its reference
    and both numbers of samples.

    Args: a [n, d], b [m, d] features, or the `moments` of them.   warn: if they are
      few.
    Least: n = m = 2, d = 1.
    Odd: if all points of one set are equal, the squared distance of the means plus the
      trace of the other covariance; a constant feature adds its squared difference
      alone; n <= d, repeats and rows of zeros are treated like any points.
    Raises: UndefinedError: fewer than two samples. ValueError: other shapes, values not
      finite.
    Source: Heusel 2017.
    """
    stand_ins = [
        np.broadcast_to(x.mean, (x.n, len(x.mean))) if isinstance(x, Moments) else x
        for x in (a, b)
    ]
    points = _features(
        "frechet", stand_ins[0], stand_ins[1], 2, "a covariance needs two"
    )
    if warn and min(map(len, points)) < SMALL:
        logging.warning(
            "frechet distance of %d against %d samples: below %d it is biased upwards",
            *map(len, points),
            SMALL,
        )
    (mean_a, x, _), (mean_b, y, _) = (
        given if isinstance(given, Moments) else _moments(checked)
        for given, checked in zip((a, b), points, strict=True)
    )
    gap = mean_a - mean_b
    # Tr (S_a S_b)^(1/2) is the nuclear norm of X Y', X'X = S_a and Y'Y = S_b. This
    # needs no square root of a matrix that rounding may make complex, and it never
    # exceeds the other terms.
    cross = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    # Not below 0: for equal sets the terms cancel, up to rounding.
    return float(max(0.0, gap @ gap + np.sum(x**2) + np.sum(y**2) - 2 * cross))


def influence(a, b):
    """How frechet(a, b) changes, to first order, with the weight of each point of b.

    It is the influence function of the distance: |z - m_b|^2 - (z - m_b)' A (z - m_b)
    - 2 (m_a - m_b)'(z - m_b) at a point z of b, less its mean over b, where
    A S_b A = S_a: the optimal map from b's Gaussian to a's. If b is made up of two sets
    of equal numbers, the distance of the first to a less that of the second is the mean
    of its values less that of the second's, but for terms of third order in how the two
    differ, and of order 1 / m, as a covariance is divided by m - 1.

    Args: a [n, d], b [m, d] features.
    Returns: [m] in float64, of mean 0.
    Least, Raises: as `frechet`.
    Odd: 0 if all points of b are equal; n, m <= d, constant features, repeats and rows
      of zeros are treated like any points.
    Source: Hampel 1974 (influence functions); Knott and Smith 1984 (A).
    """
    a, b = _features("influence", a, b, 2, "a covariance needs two")
    mean, of_b = a.mean(axis=0, dtype=np.float64), _moments(b)
    y, fewer = of_b.factor, len(b) <= b.shape[1]
    if not fewer:  # the rows are orthogonal, and some may be rounding alone
        norms = _norms(y)
        y = y[norms > norms.max() * len(norms) * np.finfo(np.float64).eps]
    # y A y' is the root of y S_a y'.
    square = np.zeros((len(y), len(y)))
    for i in _slices(a):
        at = (a[i] - mean) @ y.T
        square += at.T @ at
    eigenvalues, vectors = np.linalg.eigh(square / (len(a) - 1))
    roots = np.sqrt(np.maximum(eigenvalues, 0))
    # Of each z - m_b, the coordinates in the rows of y, turned by the eigenvectors.
    bases = np.sqrt(len(b) - 1) * vectors if fewer else y.T / _norms(y) @ vectors
    values = np.empty(len(b))
    for i in _slices(b):
        z = b[i] - of_b.mean
        at = bases[i] if fewer else z @ bases
        values[i] = _norms(z) - at**2 @ roots - 2 * z @ (mean - of_b.mean)
    return values - values.mean()


def precision_recall(a, b, k: int = 3) -> tuple[float, float]:
    """The share of a that resembles b, and the share of b that a covers.

    Precision: the share of a inside some ball around a point of b, whose radius is the
    distance to the k-th nearest *other* point of b. Recall: the same with a and b
    exchanged. Both depend on n and m, so compare equal numbers of samples.

    Args: a [n, d] generated, b [m, d] reference features.
    Returns: precision, recall, both in [0, 1].
    Least: n = m = k + 1, d = 1.
    Odd: a point that occurs more than k times has a ball of radius 0, which contains
      its copies; so a set of equal points resembles the other set if a point or a ball
      of that set is at their place. n <= d, constant features and rows of zeros are
      treated like any points.
    Raises: UndefinedError: at most k samples. ValueError: k < 1, other shapes, values
      not finite.
    Source: Kynkaanniemi 2019, section 2.
    """
    a, b = _features("precision_recall", a, b, k + 1, _others(k))
    return _balls(a, b, k, None)[:2]


def density_coverage(a, b, k: int = 5) -> tuple[float, float]:
    """Density, the mean number of balls of b around a point of a, over k; coverage.

    Coverage is the share of the balls that hold a point of a.
    The balls are those of `precision_recall`, around b only: an outlier of a has none.
    They are closed, whereas the authors' program excludes the rim, and with it a copy
    of a point that occurs more than k times.

    Args: a [n, d] generated, b [m, d] reference features.
    Returns: density, about 1 (not at most 1) if the laws agree; coverage in [0, 1].
    Least, Odd, Raises: as `precision_recall`. If all points of both sets are in one
      place, the density is m / k: each of the m balls contains them.
    Source: Naeem 2020, section 3.
    """
    a, b = _features("density_coverage", a, b, k + 1, _others(k))
    return _balls(a, b, None, k)[2:]


def balls(a, b, near: int = 3, around: int = 5) -> tuple[float, float, float, float]:
    """`precision_recall` and `density_coverage`, in one pass over all distances.

    Args: a [n, d], b [m, d] features.   near, around: k of the one and of the other.
    Returns: precision, recall, density, coverage.
    Least, Odd, Raises: as those.
    """
    _others(min(near, around))  # both are at least 1
    most = max(near, around)
    a, b = _features("balls", a, b, most + 1, _others(most))
    return _balls(a, b, near, around)


def _balls(a, b, near, around):
    """Precision and recall for k = `near`, density and coverage for k = `around`."""
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

    It is computed on `subsets` draws, without replacement, of min(size, n, m) points of
    each set. The draws overlap, so their spread is not a standard error.

    Args: a [n, d], b [m, d] features.
    Least: n = m = 2, d = 1.
    Odd: equal points x against equal points y give k(x, x) + k(y, y) - 2 k(x, y); a set
      against itself gives at most 0, as no point is compared with itself; n <= d,
      constant features, repeats and rows of zeros are treated like any points.
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

    values = [mmd2() for _ in range(subsets)]
    return Kid(float(np.mean(values)), float(np.std(values)))


def vendi(a) -> float:
    """The number of unrelated samples that are as diverse as these: 1 .. n.

    The exponential of the entropy of the eigenvalues of K / n, where K holds the
    cosines of all pairs. It ignores the reference: noise is diverse.

    Args: a [n, d] features.
    Least: n = 1, d = 1.
    Odd: one point, or equal points, give 1; so does d = 1 if all have one sign; the
      value is at most min(n, d); repeats count by their share; a constant feature
      brings all points closer.
    Raises: UndefinedError: no sample, or a row of zeros, which has no direction.
      ValueError: values not finite.
    Source: Friedman and Dieng 2023, definition 3.1.
    """
    a, _ = _features("vendi", a, a, 1, "it needs one")
    n, d = a.shape
    # X X' and X'X have the same eigenvalues except for zeros: take the smaller one.
    if n <= d:
        x = _unit(a)
        gram = x @ x.T
    else:
        gram = np.zeros((d, d))
        for i in _slices(a):
            x = _unit(a[i])
            gram += x.T @ x
    values = np.linalg.eigvalsh(gram / n)
    values = values[values > 0]  # 0 log 0 is 0, and rounding may pass below 0
    return float(np.exp(-np.sum(values * np.log(values))))


def _features(name, a, b, least, why):
    """a and b as arrays, after a check that they can be compared.

    They keep their type, since 50,000 x 2,048 features in float64 take 0.8 GB; tiles of
    them are converted when they are used.
    """
    check_on_host(name, a, b)
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


def _moments(a):
    mean, scale = a.mean(axis=0, dtype=np.float64), np.sqrt(len(a) - 1)
    if len(a) <= a.shape[1]:  # then the points themselves are the smaller factor
        return Moments(mean, (a - mean) / scale, len(a))
    covariance = np.zeros((a.shape[1], a.shape[1]))
    for i in _slices(a):
        centred = (a[i] - mean) / scale
        covariance += centred.T @ centred
    values, vectors = np.linalg.eigh(covariance)
    factor = np.sqrt(np.maximum(values, 0))[:, None] * vectors.T
    return Moments(mean, factor, len(a))


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
    # At first nothing is known: the k-th of the upper bounds is a limit that is safe.
    if np.isinf(limit).any():
        at_most = np.concatenate([best, squares + slack], axis=1)
        limit = np.partition(at_most, k - 1, axis=1)[:, k - 1 : k]
    near = squares - slack < limit
    # They are few, so their rows are packed to the left before they are sorted.
    i, j = np.nonzero(near)
    counts = np.bincount(i, minlength=len(x))
    packed = np.full((len(x), counts.max()), np.inf)
    packed[i, np.arange(len(i)) - (np.cumsum(counts) - counts)[i]] = _direct(x, y, i, j)
    merged = np.concatenate([best, packed], axis=1)
    return np.partition(merged, k - 1, axis=1)[:, :k]


# A copy on the rim of a ball is inside, so rounding must not decide. Distances come
# from a matrix product, at its speed; the few that its rounding leaves open are taken
# again by differences: 0 for equal points, and equal for equal pairs in any order.


def squared_distances(x: Float[Arr, "n d"], y: Float[Arr, "m d"]) -> Float[Arr, "n m"]:
    """|x_i - y_j|^2 in float64 by a matrix product, with relative errors below 1e-6.

    Copies have distance 0.
    """
    squares, slack = _squares(x, y)
    # The error is at most `slack`, so all others are right to 1e-6 of themselves.
    i, j = np.nonzero(squares < 1e6 * slack)
    squares[i, j] = _direct(x, y, i, j)
    return squares


def _decided(x, y, *limits):
    """|x_i - y_j|^2 [n, m], each on the right side of every limit."""
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
    # Centring leaves distances unchanged and reduces rounding.
    centre = y.mean(axis=0, dtype=np.float64)
    x, y = x - centre, y - centre
    norms = _norms(x)[:, None] + _norms(y)
    # The worst case of d + 4 roundings, in the product and in the differences.
    limits = np.finfo(np.float64)
    slack = 4 * (x.shape[1] + 4) * limits.eps * norms + limits.tiny
    norms -= 2 * (x @ y.T)
    return norms, slack


def _norms(x):
    return np.einsum("ij,ij->i", x, x)


def _direct(x, y, i, j):
    """|x_i - y_j|^2 by differences, for each pair of i [p] and j [p]."""
    squares = np.empty(len(i))
    # As many pairs at a time as take the memory of a tile.
    step = max(1, TILE**2 // x.shape[1])
    for s in range(0, len(i), step):
        gaps = x[i[s : s + step]].astype(np.float64) - y[j[s : s + step]]
        squares[s : s + step] = np.sum(gaps**2, axis=1)
    return squares
