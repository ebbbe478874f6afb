"""Distances that reveal copies, and tests of whether a set of samples copies.

In this order: mirror images, calibrated and tiled distances, then three tests: AuthPct,
C_T and FLD.
"""

from typing import NamedTuple

import numpy as np

from memsep_jax.fidelity import UndefinedError, squared_distances
from memsep_jax.shapes import Arr, Bool, Float

# Bounds of the log-variances, as in the program of the authors of FLD.
FLOOR, CEILING = -40.0, 20.0
# The base term of FLD moves each point towards the mean, to this share of its distance.
NEARER = 0.9
PAIRS = 2**20  # pairs of points held at a time: 8 MB per array of float64


# Mirror images: a mirrored copy is a copy.


class Mirrored(NamedTuple):
    """The neighbours of each image or of its mirror image, whichever is nearer."""

    distances: np.ndarray  # [m, k]
    indices: np.ndarray  # [m, k]
    flipped: np.ndarray  # bool [m]: the mirror image is nearer


def with_flips(search):
    """A search with each image and with its mirror image, left for right.

    It keeps the answer with the smaller d1, or that of the image itself on ties. Search
    held-out points in the same way: two searches find more than one does.

    Args: search: samples -> Neighbours, as `neighbours.searcher` makes it.
    Returns: samples [m, h, w, c] -> Mirrored.
    """

    def nearer(samples) -> Mirrored:
        samples = np.asarray(samples)
        if samples.ndim != 4:
            raise ValueError(
                f"samples of shape {samples.shape} have no mirror images: flips are "
                "for images [m, h, w, c]"
            )
        plain, mirrored = search(samples), search(samples[:, :, ::-1])
        flipped = mirrored.distances[:, 0] < plain.distances[:, 0]
        distances, indices = (
            np.where(flipped[:, None], *pair)
            for pair in zip(mirrored, plain, strict=True)
        )
        return Mirrored(distances, indices, flipped)

    return nearer


# Distances that see what the plain one does not.


def calibrated_l2(distances, alpha: float = 0.5) -> Float[Arr, " m"]:
    """d_1 / (alpha mean_{y in S} ||g - y||): small where a sample is a copy.

    Args: distances [m, k] to the k nearest training points, sorted (the paper's S has
      k = 50).
    Least: m = 0, k = 1.
    Odd: equal distances give 1 / alpha, which k = 1 always does; if all are 0, 0.
    Source: Carlini 2023, section 5.1.
    """
    distances = np.asarray(distances)
    mean = alpha * distances.mean(axis=1)
    return np.divide(distances[:, 0], mean, out=np.zeros_like(mean), where=mean > 0)


def tiled_l2(a, b, tiles: int = 4) -> Float[Arr, " m"]:
    """The largest distance between tiles in the same place, in a grid tiles x tiles.

    Images that share a background are close by the plain distance; here they must be
    alike everywhere. The units are those of `neighbours`; the paper divides them by the
    square root of the number of values in a tile.

    Args: a, b [m, h, w, c], pair by pair: both numbers, or both uint8 pixels.
    Least: m = 0, h = w = tiles, c = 1.
    Odd: equal images give 0; one tile, the plain distance; tiles of one pixel, the
      largest difference of a pixel; images that differ in one tile, their plain
      distance.
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
    # In float64: differences of uint8 would wrap around.
    gaps = np.subtract(a, b, dtype=np.float64) / (127.5 if pixels else 1)
    squares = (gaps**2).reshape(m, tiles, h // tiles, tiles, w // tiles, c)
    return np.sqrt(squares.sum(axis=(2, 4, 5)).max(axis=(1, 2)))


class Tiled(NamedTuple):
    """For each sample, the candidate that is nearest by `tiled_l2`."""

    distances: np.ndarray  # [m]
    indices: np.ndarray  # [m] into the training data


def nearest_tiled(samples, data, indices, tiles: int = 4, chunk: int = 256) -> Tiled:
    """The nearest by the tiled distance among the neighbours by the plain one.

    Other points are not considered: images that are alike everywhere are also close as
    a whole. Memory grows with chunk x h w c.

    Args: samples [m, h, w, c], data [n, h, w, c], indices [m, k] of the candidates,
      the first of which wins a tie.
    Least: m = 0, n = 1, k = 1; images as `tiled_l2`.
    Odd: equal or repeated candidates tie.
    Raises: as `tiled_l2`.
    """
    samples, data, indices = (np.asarray(a) for a in (samples, data, indices))
    distances = np.empty(indices.shape)
    for i in range(0, len(samples), chunk):
        rows = slice(i, i + chunk)
        for j, candidates in enumerate(indices[rows].T):
            distances[rows, j] = tiled_l2(samples[rows], data[candidates], tiles)
    first = distances.argmin(axis=1)[:, None]
    return Tiled(*(np.take_along_axis(a, first, 1)[:, 0] for a in (distances, indices)))


# Tests of copying.


def authentic(neighbours, own) -> Bool[Arr, " m"]:
    """Whether a sample is farther from its nearest point than that is from the others.

    g is authentic iff d(g, x*) > d(x*, nearest other training point); with a tie it is
    not. AuthPct is 100 times the mean; its null level is that of held-out points. The
    other points are *distinct* ones: a repeat of x* says nothing about its place.

    Args:
      neighbours: of the samples [m, k], `Neighbours` or `Mirrored`.
      own: [n] distance from each training point to its nearest distinct other: with
        k = 2, the second distance of the training set searched in itself.
    Least: m = 0, k = 1, two distinct training points.
    Odd: an exact copy is never authentic; equal samples have equal answers.
    Source: Alaa 2022 (arXiv 2102.08921).
    """
    return neighbours.distances[:, 0] > np.asarray(own)[neighbours.indices[:, 0]]


class Copying(NamedTuple):
    """C_T: far below 0 if samples copy, far above 0 if they miss the data."""

    value: float
    error: float  # its standard deviation if both sets follow one law
    cells: np.ndarray  # [c] the cells that count
    scores: np.ndarray  # [c] z-score of each
    weights: np.ndarray  # [c] summing to 1
    left_out: np.ndarray  # cells with too few samples, or without a held-out point


def copying_test(
    generated, generated_cells, held_out, held_out_cells, least: int = 20
) -> Copying:
    """C_T: are samples nearer to the training set than held-out points are?

    In each cell, the Mann-Whitney U of distances to the training set is turned into its
    z-score under one law, corrected for ties. C_T is their mean, weighted by the number
    of held-out points.

    Args:
      generated [m], held_out [l]: distances to the nearest training point.
      generated_cells [m], held_out_cells [l]: whole numbers, the region of space that
        each point is in; the paper takes cells of k-means on the training set.
      least: samples that a cell must have to count.
    Least: in some cell, `least` samples (one at the very least) and a held-out point.
    Odd: if all distances are equal, 0; if all samples are at 0 and no held-out point
      is, the lowest U that exists; if all samples have collapsed into a cell without
      held-out points, no value.
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
        # The z-score is normal only of enough samples; without held-out points there is
        # nothing to compare with.
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
    """The z-score of U, the number of pairs with x_i > y_j; ties count one half."""
    from scipy import stats  # takes over a second, and few runs need it

    # Not `stats.mannwhitneyu`: it gives a p-value, which is 0 from z = 38 on.
    m, n = len(x), len(y)
    ranks = stats.rankdata(np.concatenate([x, y]))
    u = ranks[:m].sum() - m * (m + 1) / 2
    variance = m * n / 12 * (m + n + 1) * stats.tiecorrect(ranks)
    return (u - m * n / 2) / np.sqrt(variance) if variance > 0 else 0.0


class FeatureLikelihood(NamedTuple):
    """FLD, in hundredths of a nat per dimension; 0 is as good as training points."""

    fld: float  # of held-out points
    fld_train: float
    gap: float  # fld_train - fld: far below 0 if samples copy
    offset: float  # NLL per dimension of held-out points where fld = 0
    log_variances: np.ndarray  # [m] fitted: the smallest belong to copies


def feature_likelihood(train, held_out, generated, seed: int = 0) -> FeatureLikelihood:
    """FLD: how likely held-out features are under Gaussians at the generated ones.

    The variance of each Gaussian is fitted to the training set, by EM. A Gaussian at a
    copy becomes narrow: that suits the training set and not the held-out points. During
    the fit there is also a base term, so that training points far from every sample
    need not be explained; the measured likelihood leaves it out. A perfect model has a
    gap slightly below 0, because the fit is to one of the two sets. FLD is 0 if half of
    the training set, fitted to the other half, would be as good. It depends on m, so
    compare equal numbers of samples. A gap below -1,000 has no meaningful size: it says
    "copies".

    This follows the authors' program (normalised by the held-out set; variances start
    from the nearest training point; the base term) except for its 50 steps of Adam.

    Args:
      train [n, d], held_out [l, d], generated [m, d]: features.
      seed: of the halves of the training set.
    Least: n = l = m = 2, d = 1.
    Odd: a constant feature is not divided by its spread of 0; if all points of all sets
      are equal, 0; equal generated points act as one Gaussian; d >= n, repeats and rows
      of zeros are treated like any points.
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
    # As many Gaussians as there are samples, where half of the set suffices: the
    # likelihood depends on their number.
    half = min(len(generated), len(train) // 2)
    one, other = train[order[:half]], train[order[half:]]
    offset = _nll(one, _fit(one, other), held_out)
    fld, fld_train = (
        100 * (_nll(generated, log_variances, a) - offset) for a in (held_out, train)
    )
    return FeatureLikelihood(fld, fld_train, fld_train - fld, offset, log_variances)


def _fit(centres, points, steps: int = 1_000, tolerance: float = 1e-9):
    """The most likely log-variances [m] of Gaussians at the centres, given the points.

    EM with weights 1 / m, and weight 1 for the base term, which is about the mean of
    the points and has a variance of its own. It ends when a step gains less than the
    tolerance, in nats per dimension and point.
    """
    d, m = points.shape[1], len(centres)
    base = NEARER**2 * np.sum((points - points.mean(axis=0)) ** 2, axis=1)
    nearest = np.min([s.min(axis=0) for _, s in _rows(points, centres)], axis=0)
    # 1e-3 as in the authors' program: a copy starts narrow, but not at variance 0.
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
        # Where no point has a share the likelihood is flat, so the variance stays.
        # Near 1e-308, the end of float64, the quotient would lose its digits.
        seen = weights > 1e-290
        with np.errstate(divide="ignore"):
            logs[seen] = np.log(sums[seen] / (d * weights[seen]))
        if total - before < tolerance:
            break
        before = total
    return np.clip(logs, FLOOR, CEILING)[:-1]


def _nll(centres, logs, points):
    """The mean of -log p over points, per dimension."""
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
    """Log-densities [n, m] at squared distances [n, m], for log-variances [m]."""
    return -(squares * np.exp(-logs) + d * (logs + np.log(2 * np.pi))) / 2


def _softmax(logits):
    """Shares [n, m] along rows, and the logarithms of their sums [n]."""
    # The largest of each row: with one for all, whole rows would become 0.
    top = logits.max(axis=1, keepdims=True)
    shares = np.exp(logits - top)
    sums = shares.sum(axis=1, keepdims=True)
    return shares / sums, (top + np.log(sums))[:, 0]
