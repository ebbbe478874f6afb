"""How much of a set of samples is copied from the training data.

A sample is memorized when its nearest training point is closer than a third of the
distance to the second nearest *distinct* one. The rate of held-out points is the null
level: what honest samples would score.

In this order: the ratio and its excess over the null level, mirror images; calibrated
and tiled distances; AuthPct, C_T and FLD, three tests of copying; what was emitted; how
many points a model can memorize; two models, one noise. Each says what it takes at
least, and what it gives for the oddest points.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from memsep_jax.fidelity import UndefinedError, squared_distances
from memsep_jax.neighbours import Neighbours, distinct, searcher

RATIO = 1 / 3
BEGUN = 0.05  # the share of copies from which a run copies at all
ROUNDING = 1e-12  # of means: it must not decide whether a level is reached
FLOOR, CEILING = -40.0, 20.0  # of log-variances, as in the program of FLD's authors
NEARER = 0.9  # of its distance: how far the base term of FLD moves a point to the mean
PAIRS = 2**20  # looked at together: 8 MB an array


class Ratio(NamedTuple):
    """The share of memorized samples, with all that it takes to believe it."""

    value: float
    interval: tuple[float, float]  # Wilson, 95 %
    null: float | None  # the same share of held-out points
    null_interval: tuple[float, float] | None
    neighbours: Neighbours
    memorized: np.ndarray  # [m] bool
    duplicates: int  # training points that repeat an earlier one


def nearest_two(x, data):
    """Distances to the nearest and to the second nearest *distinct* training point.

    Args: x [*e], data [n, *e].   Returns: [2].
    Least: n = 1, d = 1.
    Odd: one point, or all equal ones: the second distance is infinite. Repeats are one
      point. Of points equally near the first is the nearest.
    """
    data = jnp.asarray(data)
    axes = tuple(range(1, data.ndim))
    squares = jnp.sum((x[None] - data) ** 2, axis=axes)
    nearest = data[jnp.argmin(squares)]
    # A copy of a point that occurs twice has d1 = d2: only another point is second.
    same = jnp.all(data == nearest[None], axis=axes)
    return jnp.sqrt(
        jnp.stack([jnp.min(squares), jnp.min(squares, where=~same, initial=jnp.inf)])
    )


def memorized(x, data, ratio: float = RATIO):
    """Whether d1 < ratio d2.

    Args: x [*e], data [n, *e].   Returns: bool [].
    Least, Odd: as `nearest_two`; of one distinct point all are copies, and where
      d1 = d2 none is: `ratio` refuses the former.
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
    Odd: repeats in the data are one point; constant features and zeros change nothing;
      samples that are all equal count once each; no held-out point is as None.
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


def ratio_of(
    found: Neighbours, held_out: Neighbours | None, duplicates: int, threshold=RATIO
) -> Ratio:
    """`ratio`, from neighbours that were already searched."""
    flags = copied(found, threshold)
    null = None if held_out is None else copied(held_out, threshold)
    return Ratio(
        value=float(flags.mean()),
        interval=wilson(int(flags.sum()), len(flags)),
        null=None if null is None else float(null.mean()),
        null_interval=None if null is None else wilson(int(null.sum()), len(null)),
        neighbours=found,
        memorized=flags,
        duplicates=duplicates,
    )


def wilson(count: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of a share, 95 % by default (Wilson 1927).

    Least: total = 1.
    Odd: 0 of total begins at 0 and ends at z^2 / (total + z^2); all of it, the mirror.
    Raises: ValueError: no total, or a count outside 0 .. total.
    """
    if not 0 <= count <= total or total < 1:
        raise ValueError(f"count={count} of total={total} is not a share")
    share, z2 = count / total, z * z
    centre = share + z2 / (2 * total)
    half = z * np.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    low, high = (centre - half) / (1 + z2 / total), (centre + half) / (1 + z2 / total)
    # Rounding must not put the share itself outside.
    return float(min(max(low, 0.0), share)), float(max(min(high, 1.0), share))


def excess(count: int, total: int, null_count: int, null_total: int):
    """How far the ratio is above its null level, and a 95 % interval of that.

    Args: copies among the samples, and among held-out points.
    Returns: the difference, (low, high).
    Least: total = null_total = 1.
    Odd: two equal shares differ by 0, in an interval that holds it.
    Raises: ValueError: as `wilson`.
    Source: Newcombe 1998 (Statistics in Medicine 17, 873), method 10: the hybrid of
      two Wilson intervals.
    """
    low, high = wilson(count, total)
    null_low, null_high = wilson(null_count, null_total)
    share, null = count / total, null_count / null_total
    value = share - null
    down = np.hypot(share - low, null_high - null)
    up = np.hypot(high - share, null - null_low)
    return value, (float(value - down), float(value + up))


def by_chance(count: int, total: int, null_count: int, null_total: int) -> float:
    """How probable so many copies among the samples are, if they copy like held-out.

    Exact where `excess` is not: of 1 copy of 1,000 its interval lies above 0 of 10,000,
    which one set in eleven of the same law gives.

    Least: one sample and one held-out point.   Odd: 1 where nothing is a copy, and
    where everything is.

    Args: as `excess`.   Returns: the one-sided p-value of Fisher's exact test.
    Source: Fisher 1935, section 21.1: hypergeometric, given all copies together.
    """
    copies = count + null_count
    terms = [
        _log_choose(total, k) + _log_choose(null_total, copies - k)
        for k in range(count, min(copies, total) + 1)
        if copies - k <= null_total
    ]
    whole = _log_choose(total + null_total, copies)
    return min(1.0, float(np.sum(np.exp(np.array(terms) - whole))))


def _log_choose(n, k):
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def copied(found: Neighbours, threshold: float = RATIO):
    """Which samples are memorized: d1 < threshold d2.   Returns: bool [..., m].

    Least: m = 0, k = 2 neighbours.
    Odd: d1 = d2 = 0 is no copy of one point; an infinite d2 makes any finite d1 one.
    """
    return found.distances[..., 0] < threshold * found.distances[..., 1]


def quotient(d1, d2):
    """d1 / d2 [m]: small where a sample is a copy, 1 where both are 0.

    Least: m = 0.   Odd: 0 / 0 is 1; over an infinite d2, 0.
    """
    d1, d2 = np.asarray(d1), np.asarray(d2)
    return np.divide(d1, d2, out=np.ones_like(d1), where=d2 > 0)


# A copy in a mirror is a copy.


class Mirrored(NamedTuple):
    """Neighbours, of each image or of its mirror image."""

    distances: np.ndarray  # [m, k]
    indices: np.ndarray  # [m, k]
    flipped: np.ndarray  # bool [m]: the mirror image is the nearer one


def with_flips(search):
    """A search that looks at each image and at its mirror image, left for right.

    It keeps the answer with the smaller d1, that of the image itself on ties. Held-out
    points are to be searched so too: two looks find more than one.

    Args: search: samples -> Neighbours, as `neighbours.searcher` makes it.
    Returns: samples [m, h, w, c] -> Mirrored.
    """

    def found(samples) -> Mirrored:
        samples = np.asarray(samples)
        if samples.ndim != 4:
            raise ValueError(
                f"samples of shape {samples.shape} have no mirror images: flips are "
                "for images [m, h, w, c]"
            )
        plain, mirrored = search(samples), search(samples[:, :, ::-1])
        flipped = mirrored.distances[:, 0] < plain.distances[:, 0]
        distances, indices = (
            np.where(flipped[:, None], *of) for of in zip(mirrored, plain, strict=True)
        )
        return Mirrored(distances, indices, flipped)

    return found


# Distances that see what the plain one does not.


def calibrated_l2(distances, alpha: float = 0.5):
    """d_1 / (alpha mean_{y in S} ||g - y||): small where a sample is a copy.

    Args: distances [m, k] to the k nearest training points, sorted (the paper's S has
      k = 50).   Returns: [m].
    Least: m = 0, k = 1.
    Odd: equal distances are 1 / alpha, and with k = 1 all are; all of them 0, 0.
    Source: Carlini 2023, section 5.1.
    """
    distances = np.asarray(distances)
    mean = alpha * distances.mean(axis=1)
    return np.divide(distances[:, 0], mean, out=np.zeros_like(mean), where=mean > 0)


def tiled_l2(a, b, tiles: int = 4):
    """The largest distance of two tiles in one place, of tiles x tiles.

    Images that share a background are near by the plain distance; here they must be
    alike in all places. In the units of `neighbours`; the paper's are these over the
    root of the numbers in a tile.

    Args: a, b [m, h, w, c], pair by pair: numbers, or uint8 pixels both.
    Returns: [m].
    Least: m = 0, h = w = tiles, c = 1.
    Odd: equal images 0; one tile, the plain distance; tiles of one pixel, the largest
      gap of a pixel; images that differ in one tile alone, their plain distance.
    Raises: ValueError: shapes or units that differ, or sides that `tiles` does not
      divide.
    Source: Carlini 2023, section 4.2.
    """
    a, b = np.asarray(a), np.asarray(b)
    pixels = a.dtype == np.uint8
    if a.ndim != 4 or a.shape != b.shape or pixels != (b.dtype == np.uint8):
        raise ValueError(
            f"tiles of pairs of images [m, h, w, c], not of {a.shape} {a.dtype} and "
            f"{b.shape} {b.dtype}: both of one shape, and uint8 pixels with none else"
        )
    m, h, w, c = a.shape
    if tiles < 1 or h % tiles or w % tiles:
        raise ValueError(
            f"tiles={tiles} must divide both sides of {h} x {w} images: "
            f"{np.gcd(h, w)} does, and what divides that"
        )
    gaps = np.subtract(a, b, dtype=np.float64) / (127.5 if pixels else 1)
    squares = (gaps**2).reshape(m, tiles, h // tiles, tiles, w // tiles, c)
    return np.sqrt(squares.sum(axis=(2, 4, 5)).max(axis=(1, 2)))


class Tiled(NamedTuple):
    """The candidate that is nearest by `tiled_l2`."""

    distances: np.ndarray  # [m]
    indices: np.ndarray  # [m] into the training data


def nearest_tiled(samples, data, indices, tiles: int = 4, chunk: int = 256) -> Tiled:
    """Of the neighbours by the plain distance, the nearest by the tiled one.

    Others are not looked at: what is alike in all places is near as a whole. Memory
    grows with chunk x h w c.

    Args: samples [m, h, w, c], data [n, h, w, c], indices [m, k] of the candidates,
      the first of which wins a tie.
    Least: m = 0, n = 1, k = 1; images as `tiled_l2`.
    Odd: candidates that are equal, or repeated, are a tie.
    Raises: as `tiled_l2`.
    """
    samples, data, indices = (np.asarray(a) for a in (samples, data, indices))
    distances = np.empty(indices.shape)
    for i in range(0, len(samples), chunk):
        some = slice(i, i + chunk)
        for j, of in enumerate(indices[some].T):
            distances[some, j] = tiled_l2(samples[some], data[of], tiles)
    first = distances.argmin(axis=1)[:, None]
    return Tiled(*(np.take_along_axis(a, first, 1)[:, 0] for a in (distances, indices)))


# Tests of copying.


def authentic(found: Neighbours, own):
    """Whether a sample is farther from its nearest point than that is from the others.

    g is authentic iff d(g, x*) > d(x*, nearest other training point); a tie is not.
    AuthPct is 100 times the mean; its null level is that of held-out points. Others are
    *distinct* ones: to a point that occurs twice its own copy says nothing.

    Args:
      found: of the samples [m, k].
      own: [n] from each training point to its nearest distinct other: with k = 2, the
        second distance of the training set searched in itself.
    Returns: bool [m].
    Least: m = 0, k = 1, two distinct training points.
    Odd: an exact copy is never authentic; all equal samples are of one answer.
    Source: Alaa 2022 (arXiv 2102.08921).
    """
    return found.distances[:, 0] > np.asarray(own)[found.indices[:, 0]]


class Copying(NamedTuple):
    """C_T: far below 0 where samples copy, far above where they do not reach."""

    value: float
    error: float  # its standard deviation where both are of one law
    cells: np.ndarray  # [c] that counted
    scores: np.ndarray  # [c] z of each
    weights: np.ndarray  # [c] summing to 1
    left_out: np.ndarray  # cells with too few samples, or with no held-out point


def copying_test(
    generated, generated_cells, held_out, held_out_cells, least: int = 20
) -> Copying:
    """C_T: are samples nearer to the training set than held-out points are?

    In each cell, the Mann-Whitney U of distances to the training set, as the z-score
    of one law with ties corrected for; their mean, weighted by the held-out points.

    Args:
      generated [m], held_out [l]: distances to the nearest training point.
      generated_cells [m], held_out_cells [l]: whole numbers, the region of space that
        each is in; the paper's are of k-means on the training set.
      least: samples that a cell must have to count.
    Least: in some cell, `least` samples (one at the very least) and a held-out point.
    Odd: all equal distances of both are a tie, 0; all samples at 0 and no held-out
      point there, the lowest U that there is; where samples have all collapsed to a
      cell without held-out points, no value.
    Raises: UndefinedError: no cell counts. ValueError: lengths that differ.
    Source: Meehan 2020 (arXiv 2004.05675).
    """
    generated, held_out = np.asarray(generated, float), np.asarray(held_out, float)
    generated_cells, held_out_cells = (
        np.asarray(a) for a in (generated_cells, held_out_cells)
    )
    shapes = [len(a) for a in (generated, generated_cells, held_out, held_out_cells)]
    if shapes[::2] != shapes[1::2]:
        raise ValueError(
            f"{shapes[0]} and {shapes[2]} distances with {shapes[1]} and {shapes[3]} "
            "cells: each distance needs the cell of its point"
        )
    cells, scores, weights, left_out = [], [], [], []
    for cell in np.union1d(generated_cells, held_out_cells):
        x, y = generated[generated_cells == cell], held_out[held_out_cells == cell]
        if len(x) < max(least, 1) or not len(y):
            left_out.append(cell)
            continue
        cells.append(cell)
        scores.append(_mann_whitney(x, y))
        weights.append(len(y))
    if not cells:
        raise UndefinedError(
            f"none of {len(left_out)} cells holds {least} of {len(generated)} samples "
            f"and one of {len(held_out)} held-out points: use fewer cells, or more "
            "samples"
        )
    shares = np.array(weights) / np.sum(weights)
    return Copying(
        float(shares @ scores),
        float(np.sqrt(np.sum(shares**2))),
        np.array(cells),
        np.array(scores),
        shares,
        np.array(left_out, generated_cells.dtype),
    )


def _mann_whitney(x, y):
    """The z-score of U, the number of pairs with x_i > y_j; ties count a half."""
    m, both = len(x), len(x) + len(y)
    _, place, times = np.unique(
        np.concatenate([x, y]), return_inverse=True, return_counts=True
    )
    ranks = np.cumsum(times) - (times - 1) / 2
    u = ranks[place[:m]].sum() - m * (m + 1) / 2
    pairs, ties = m * (both - m), np.sum(times.astype(float) ** 3 - times)
    variance = pairs / 12 * (both + 1 - ties / (both * (both - 1)))
    return (u - pairs / 2) / np.sqrt(variance) if variance > 0 else 0.0


class FeatureLikelihood(NamedTuple):
    """FLD, in hundredths of a nat per dimension; 0 is as good as training points."""

    fld: float  # of held-out points
    fld_train: float
    gap: float  # fld_train - fld: far below 0 where samples copy
    offset: float  # NLL per dimension of held-out points, of the mixture at fld = 0
    log_variances: np.ndarray  # [m] fitted: the smallest are those of copies


def feature_likelihood(train, held_out, generated, seed: int = 0) -> FeatureLikelihood:
    """FLD: how likely held-out features are, of Gaussians at the generated ones.

    The variance of each Gaussian is fitted to the training set, by EM. One at a copy
    becomes narrow: good for the training set and not for held-out points. While they
    are fitted there is a base term beside them, so that training points that no sample
    is near to need not be explained; what is measured is without it. A perfect model
    has a gap a little below 0, for the fit is to one of the two sets. FLD is 0 where
    half of the training set, fitted to the other half, would be as good. It depends on
    m: compare at equal numbers. A gap below -1,000 has no size: it says "copies".

    As the authors' program has it (normalised by the held-out set; variances started at
    the nearest training point; the base term), but for its 50 steps of Adam.

    Args:
      train [n, d], held_out [l, d], generated [m, d]: features.
      seed: of the halves of the training set.
    Least: n = l = m = 2, d = 1.
    Odd: a constant feature is not divided by its spread of 0; all equal points of all
      sets, 0; generated points that are all equal are one Gaussian; d >= n, repeats and
      rows of zeros are as any points.
    Raises: UndefinedError: fewer than two points. ValueError: shapes that differ,
      values not finite.
    Source: Jiralerspong 2023 (arXiv 2302.04440).
    """
    sets = [np.asarray(a) for a in (train, held_out, generated)]
    if {a.shape[1:] for a in sets} != {(sets[0].shape[-1],)} or not sets[0].shape[-1]:
        raise ValueError(f"features [n, d], not of shapes {[a.shape for a in sets]}")
    if min(len(a) for a in sets) < 2:
        raise UndefinedError(
            f"FLD of {' and '.join(str(len(a)) for a in sets)} features: it takes two "
            "training, held-out and generated points, and means little below hundreds"
        )
    if not all(np.isfinite(a).all() for a in sets):
        raise ValueError("features hold NaN or infinite values: find where they arose")
    mean = sets[1].mean(axis=0, dtype=np.float64)
    scale = sets[1].std(axis=0, ddof=1, dtype=np.float64)
    scale = np.where(scale > 0, scale, 1)
    train, held_out, generated = ((a - mean) / scale for a in sets)
    log_variances = _fit(generated, train)
    order = np.random.default_rng(seed).permutation(len(train))
    half = min(len(generated), len(train) // 2)
    one, other = train[order[:half]], train[order[half:]]
    offset = _nll(one, _fit(one, other), held_out)
    fld, fld_train = (
        100 * (_nll(generated, log_variances, a) - offset) for a in (held_out, train)
    )
    return FeatureLikelihood(fld, fld_train, fld_train - fld, offset, log_variances)


def _fit(centres, points, steps: int = 1_000, tolerance: float = 1e-9):
    """Log-variances [m] of Gaussians at the centres: most likely, for these points.

    EM with weights 1 / m, and 1 for the base term: about the mean of the points, with
    a variance of its own. It ends where a step gains less than the tolerance, in nats
    per dimension and point.
    """
    d, m = points.shape[1], len(centres)
    base = NEARER**2 * np.sum((points - points.mean(axis=0)) ** 2, axis=1)
    nearest = np.min([s.min(axis=0) for _, s in _rows(points, centres)], axis=0)
    logs = np.append(np.log((nearest + 1e-3) / d), 0.0)
    log_weights = np.append(np.full(m, -np.log(m)), 0.0)
    before = -np.inf
    for _ in range(steps):
        logs, total = np.clip(logs, FLOOR, CEILING), 0.0
        weights, sums = np.zeros((2, m + 1))
        for i, squares in _rows(points, centres):
            squares = np.concatenate([squares, base[i, None]], axis=1)
            shares, likelihood = _softmax(_log_normal(squares, logs, d) + log_weights)
            total += likelihood.sum() / (d * len(points))
            weights += shares.sum(axis=0)
            sums += np.einsum("ij,ij->j", shares, squares)
        # Where no point has a share the likelihood is flat: the variance stays.
        seen = weights > 1e-290
        with np.errstate(divide="ignore"):
            logs[seen] = np.log(sums[seen] / (d * weights[seen]))
        if total - before < tolerance:
            break
        before = total
    return np.clip(logs, FLOOR, CEILING)[:-1]


def _nll(centres, logs, points):
    """-log p per dimension, the mean over points."""
    d, total = points.shape[1], 0.0
    for _, squares in _rows(points, centres):
        total += _softmax(_log_normal(squares, logs, d))[1].sum()
    return float((np.log(len(centres)) - total / len(points)) / d)


def _rows(points, centres):
    """Slices of the points, with their squared distances to all centres."""
    step = max(1, PAIRS // len(centres))
    for start in range(0, len(points), step):
        i = slice(start, start + step)
        yield i, squared_distances(points[i], centres)


def _log_normal(squares, logs, d):
    """Log-densities [n, m] at squared distances [n, m], of log-variances [m]."""
    return -(squares * np.exp(-logs) + d * (logs + np.log(2 * np.pi))) / 2


def _softmax(logits):
    """Along rows: shares [n, m], and the logarithms of their sums [n]."""
    top = logits.max(axis=1, keepdims=True)
    shares = np.exp(logits - top)
    sums = shares.sum(axis=1, keepdims=True)
    return shares / sums, (top + np.log(sums))[:, 0]


# What was emitted.


class Emission(NamedTuple):
    """Which training points came out, and how often."""

    points: np.ndarray  # [e] indices of those emitted
    counts: np.ndarray  # [e] copies of each
    distinct: int  # e
    coverage: float  # of the distinct training set


def emitted(nearest, memorized, n: int) -> Emission:
    """The distinct training points that samples are copies of.

    Args:
      nearest: [m] index of the nearest training point.   memorized: bool [m].
      n: distinct training points.
    Least: m = 0, n = 1.
    Odd: no copy emits nothing; one point that comes out m times is one.
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


def rarefaction(counts, total: int, sizes, n: int):
    """How many distinct training points s samples would emit.

    Fewer samples than there are: the exact mean over subsets. More: extrapolated from
    the points that came out once and twice, to a lower bound of what has not come out,
    and at most n; to be believed up to about twice as many samples.

    Args:
      counts: [e] copies of each point emitted.   total: samples, copies or not.
      sizes: [s] numbers of samples.   n: distinct training points.
    Returns: [s].
    Least: e = 0, s = 0, total = n = 1.
    Odd: nothing emitted stays 0; of no sample 0 come out; one point alone is 1 at the
      size of the total, and beyond it; with all points out, n.
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
    unseen = once**2 / (2 * twice) if twice else once * (once - 1) / 2
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


# How many points a model can memorize.


def effective_memorization(sizes, ratios, level: float = 0.9, weights=None) -> float:
    """Effective model memorization: EMM = max{n : R(n) >= level}.

    More points are never easier to memorize: R is made non-increasing in n by isotonic
    regression, and is linear in log n between the sizes.

    Args:
      sizes: [s], in any order.   ratios: [s], memorization ratios of networks trained
        on so many points.   level: 1 - eps.   weights: [s], samples; equal by default.
    Least: s = 2, the smaller size at the level and the larger below it.
    Odd: equal ratios do not bracket any level; a step ends between its sizes; a ratio
      that rises with n is averaged with those it rises over.
    Raises:
      UndefinedError: the sizes do not bracket the level.
      ValueError: fewer than two sizes, or one that is repeated or not positive; ratios
        that are not finite; a level outside (0, 1).
    Source: Gu 2023, definition 1.
    """
    order, sizes = _check_sizes(sizes, ratios, level)
    weights = np.ones(len(sizes)) if weights is None else np.asarray(weights, float)
    fit = decreasing(np.asarray(ratios, float)[order], weights[order])
    found = ", ".join(f"{n:g}: {r:.3g}" for n, r in zip(sizes, fit, strict=True))
    if fit[-1] >= level - ROUNDING:
        raise UndefinedError(
            f"R(n) is at least level={level} at all sizes ({found}): the largest n "
            "that has it is not below them; add larger sizes"
        )
    if fit[0] < level - ROUNDING:
        raise UndefinedError(
            f"R(n) is below level={level} at all sizes ({found}): the largest n that "
            "has it is not above them; add smaller sizes, or train longer"
        )
    return float(_last(sizes, fit, level))


def effective_interval(
    sizes, memorized, samples: int, level: float = 0.9, seed: int = 0, draws: int = 2000
) -> tuple[float, float]:
    """A 95 % interval of `effective_memorization`, by a bootstrap over two levels.

    Seeds are drawn with replacement within each size, then samples from the binomial
    law of each seed. What the seeds differ by is first stretched about their mean, so
    that the mean over drawn seeds varies as the mean over seeds does (Davison and
    Hinkley 1997, section 3.8); with one seed only samples are drawn, and the interval
    knows of no other network. A replicate that does not bracket the level is put at
    the smallest or largest size: an end there says "at most" or "at least" that size.

    With few seeds (under five) the interval is too narrow where networks differ by
    more than their samples do, for it knows no more than those seeds. Nor does it know
    that sizes were chosen by what was measured, or that R may bend between them: with a
    factor of 2 between sizes, EMM of 1 / (1 + (n / m)^2) at .9 comes out 8 % too low.

    Args:
      sizes: [s].   memorized: [s, seeds], how many of `samples` samples of each network
        are copies.
    Least: s = 2, one seed, samples = 1.
    Odd: equal counts of all sizes that have the level, or of all that lack it, are the
      largest, or smallest, size at both ends.
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
    rng, shares = np.random.default_rng(seed), counts[order] / samples
    seeds = shares.shape[1]
    if seeds > 1:
        mean = shares.mean(axis=1, keepdims=True)
        spread = shares.var(axis=1, ddof=1, keepdims=True)
        within = (shares * (1 - shares)).mean(axis=1, keepdims=True) / samples
        between = np.maximum(spread - within, 0) * seeds / (seeds - 1)
        stretch = np.sqrt(
            np.divide(between, spread, out=np.zeros_like(spread), where=spread > 0)
        )
        shares = np.clip(mean + stretch * (shares - mean), 0, 1)
    chosen = rng.integers(0, seeds, (draws, *shares.shape))
    drawn = np.take_along_axis(shares[None], chosen, axis=2)
    ratios = rng.binomial(samples, drawn).mean(axis=2) / samples
    found = _last(sizes, decreasing(ratios, np.ones(len(sizes))), level)
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def decreasing(values, weights):
    """The nearest non-increasing values, by weighted squares: isotonic regression.

    Args: values [..., s], weights [s].   Returns: [..., s].
    Least: s = 1.   Odd: what falls stays; what only rises is its mean everywhere.
    Source: the min-max formula, Robertson 1988, theorem 1.4.4.
    """

    def sums(a):
        return np.concatenate([np.zeros_like(a[..., :1]), np.cumsum(a, -1)], -1)

    # means[..., a, b]: of the values a .. b.
    total, weight = sums(values * weights), sums(weights)
    rises = total[..., None, 1:] - total[..., :-1, None]
    width = weight[None, 1:] - weight[:-1, None]
    upper = np.triu(np.ones(width.shape, bool))
    means = np.where(upper, rises / np.where(upper, width, 1), -np.inf)
    # The least over a <= i of the largest over b >= i.
    largest = np.maximum.accumulate(means[..., ::-1], axis=-1)[..., ::-1]
    return np.min(np.where(upper, largest, np.inf), axis=-2)


def _last(sizes, fit, level):
    """The largest n with the level on non-increasing [..., s]; at the ends, the end."""
    above = np.sum(fit >= level - ROUNDING, axis=-1)[..., None]
    i = np.clip(above - 1, 0, len(sizes) - 2)
    high, low = (np.take_along_axis(fit, j, -1)[..., 0] for j in (i, i + 1))
    drop = np.where(high > low, high - low, 1)
    part = np.where(high > low, (high - level) / drop, above[..., 0] > 1)
    start, end = (sizes[j[..., 0]] for j in (i, i + 1))
    return start * (end / start) ** np.clip(part, 0, 1)


def _check_sizes(sizes, ratios, level):
    """The order of the sizes, and them in it.   Raises: ValueError."""
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

    First at `low` and `high`. While the level is nowhere, half of the smallest n so
    far; while the largest n so far has it, twice that; then between the largest n that
    has it and the next larger one that was measured, at the middle of log n. Whatever
    is measured, each n is asked for once, and the bracket shrinks each time.

    Args:
      ratios: R(n) of all sizes so far, asked for or not.
      smallest, largest: no n outside is asked for.   multiple: of what n must be a
        multiple, such as the number of classes; the limits are rounded inwards.
      tolerance: it ends when the bracket's quotient is at most 1 + tolerance.
    Least: no ratio: then `low`.
    Odd: all below the level, half of the smallest; all at it, twice the largest.
    Returns:
      n, or None: it is bracketed so closely, or `smallest` lacks the level, or
      `largest` has it: EMM is then censored.
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

    True once copying has begun, and no lower bound of the last `patience` snapshots is
    above the best ratio before them. It has begun where a lower bound before them is
    above 5 %: a run that copies nothing yet has not plateaued. What rises by less than
    its interval within `patience` snapshots is taken for a plateau; snapshots should
    be equally many epochs apart.

    Args: ratios [k], intervals [k, 2] (`wilson`), in the order of the snapshots.
    Least: k = 0; below patience + 1 it has not.
    Odd: all 0 has not begun; all equal, and above 5 %, has plateaued.
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


# Two models, one noise.


class Reproducibility(NamedTuple):
    """Whether samples of the same noises, from two models, are the same."""

    cosine: np.ndarray  # [m] similarity of the two of each pair
    cosine_null: np.ndarray  # [m] of mismatched pairs
    close: np.ndarray  # [m] bool
    share: float  # of close pairs
    interval: tuple[float, float]  # Wilson, 95 %
    null: float  # the share of mismatched pairs
    null_interval: tuple[float, float]


def reproducibility(a, b, threshold: float = RATIO) -> Reproducibility:
    """How alike twin samples are: by angle, and by the criterion of memorization.

    A pair is close when b_i is the nearest of all b to a_i, by a third of the distance
    to the nearest other *distinct* one: a_i is a copy of b_i. Cosines are about the
    mean of both sets. The null level is that of mismatched pairs: b moved on by one.

    Args: a, b [m, *e], where a_i and b_i are of the same noise.
    Least: two distinct b, d = 1.
    Odd: a = b is close everywhere, with a cosine of 1, or of 0 for a point at the mean;
      repeats of b count for each other's mismatched pairs; all equal a are far.
    Raises: UndefinedError: fewer than two distinct b. ValueError: shapes that differ.
    Source: Kadkhodaie 2024 (arXiv 2310.02557), section 2, for the cosine.
    """
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    if a.shape != b.shape or len(distinct(b)) < 2:
        kind = ValueError if a.shape != b.shape else UndefinedError
        raise kind(
            f"twin samples of shapes {a.shape} and {b.shape}, {len(distinct(b))} of "
            "the latter distinct: give equally many pairs, at least two different"
        )
    found = searcher(b)(a)
    near = copied(found, threshold)
    centre, moved = (a.mean(axis=0) + b.mean(axis=0)) / 2, np.roll(b, 1, axis=0)
    nearest, axes = b[found.indices[:, 0]], tuple(range(1, b.ndim))
    close, null = (near & np.all(nearest == c, axis=axes) for c in (b, moved))
    return Reproducibility(
        cosine(a, b, centre),
        cosine(a, moved, centre),
        close,
        float(close.mean()),
        wilson(int(close.sum()), len(close)),
        float(null.mean()),
        wilson(int(null.sum()), len(null)),
    )


def cosine(a, b, centre):
    """The cosine of the angle between a_i and b_i about a centre; 0 for the centre.

    Args: a, b [m, *e], centre [*e].   Returns: [m].
    Least: m = 0, d = 1.   Odd: of the centre itself, 0; in one dimension, 1 or -1.
    """
    a, b = (
        (np.asarray(c, np.float64) - centre[None]).reshape(len(c), np.size(centre))
        for c in (a, b)
    )
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    products = np.sum(a * b, axis=1)
    return np.divide(products, norms, out=np.zeros_like(norms), where=norms > 0)
