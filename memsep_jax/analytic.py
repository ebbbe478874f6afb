"""The ladder between the truth and the copy: scores in closed form that see less.

From the bottom: `gaussian` sees mean and covariance of the training set; `local`,
`equivariant_local` and `covariance_local` see whole training images, but each pixel
decides for itself, from its surroundings, which of them explain it. The ends are
`mixture.score`, the truth where it is known, and `empirical.score`, which copies.

All of them stream over the training set as `empirical` does: extra memory grows with
chunk and batch, never with batch x n. Data are floats or uint8 pixels; `log_weights`
are as in `empirical.posterior`, and `empirical.labelled` makes those of a class.
`score.to_denoiser` turns any of them into its denoiser.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memsep_jax.checks import check_on_host
from memsep_jax.process import Process
from memsep_jax.score import ScoreFn, from_denoiser
from memsep_jax.shapes import Arr, Num, Points
from memsep_jax.streaming import (
    NEVER,
    check_data,
    check_query,
    chunk_sums,
    floats,
    floored,
    mean,
    merged,
    over_chunks,
)

# Of one step, whatever the images are: pixels of 32 images of 32 x 32, so that what a
# query needs of them stays in the cache, and patches for a product of matrices.
PIXELS = 32_768
PATCHES = 8_192
# Contenders of a chunk of patches: fewer numbers in a sum, so less rounding than of an
# image. For patches of 3 to 9, 4 are as exact as 16.
FEW = 4
BLOCK = 96  # numbers, or a few more, that a mask leaves out together: a row of an image

Patch = int | Sequence[tuple[float, int]]


class Moments(NamedTuple):
    """Mean and covariance of a training set, the latter by its eigenvectors."""

    mean: np.ndarray  # [d]
    variances: np.ndarray  # [r] the eigenvalues that are not 0
    directions: np.ndarray  # [d, r] their eigenvectors


def moments(
    data: Points, log_weights: Num[Arr, " n"] | None = None, chunk: int = 1_024
) -> Moments:
    """Mean and covariance (divided by n) of points [n, *e], in float64 on the host.

    Takes time d^2 max(n, d) and memory d (chunk + d), or d n where n < d; the rank r is
    at most min(n - 1, d).

    Raises: ValueError: as `empirical.score`, or every point has weight 0. TypeError:
      the data are traced.
    """
    check_on_host("analytic.moments", data, log_weights)
    check_data(data, chunk, log_weights)
    n, d = len(data), math.prod(data.shape[1:])
    shares = np.ones(n) if log_weights is None else np.asarray(log_weights, float)
    if log_weights is not None:
        if not np.isfinite(shares.max()):
            raise ValueError("log_weights leave out every point: keep at least one")
        shares = np.exp(shares - shares.max())
    shares = shares / shares.sum()

    def rows(start):
        points = np.asarray(data[start : start + chunk])
        pixels = points.dtype == np.uint8
        points = points.reshape(-1, d).astype(np.float64)
        return points / 127.5 - 1 if pixels else points

    starts = range(0, n, chunk)
    centre = sum(shares[i : i + chunk] @ rows(i) for i in starts)

    def gaps(start):
        weights = np.sqrt(shares[start : start + chunk])[:, None]
        return weights * (rows(start) - centre)

    if n < d:
        _, widths, turned = np.linalg.svd(
            np.concatenate([gaps(i) for i in starts]), full_matrices=False
        )
        variances, directions = widths**2, turned.T
    else:
        variances, directions = np.linalg.eigh(sum(gaps(i).T @ gaps(i) for i in starts))
    # What is less is the rounding of a 0.
    real = variances > max(n, d) * np.finfo(float).eps * variances.max()
    return Moments(centre, variances[real], directions[:, real])


def gaussian(
    data: Points, process: Process, log_weights: Num[Arr, " n"] | None = None
) -> ScoreFn:
    """The score of a Gaussian with the data's mean and covariance, the linear score.

    -(alpha^2 S + sigma^2 I)^-1 (x - alpha mean), by the eigenvectors of S, so that a
    score costs two products with [d, r]. Of all linear denoisers, its denoiser, the
    Wiener filter, has the smallest error over the training set.

    Source: Wang & Vastola 2024 (2412.09726), after the abstract.

    Args: as `moments`, which works on the host: the data cannot be traced.
    Returns: score_fn(x [*e], t []) -> [*e]. Memory: d r numbers, and batch x d.
    Raises: as `moments`.
    """
    of_data = moments(data, log_weights)

    def score_fn(x, t):
        check_query(data, x, t)
        x = jnp.asarray(x)
        alpha, v = process.alpha(t), process.sigma(t) ** 2
        centre, variances, directions = _constants(of_data, x.dtype)
        gap = x.reshape(-1) - alpha * centre
        inside = _product(gap, directions)
        slope = _product(directions, inside / (alpha**2 * variances + v))
        if len(variances) < len(centre):  # or what is left would be rounding only
            slope += (gap - _product(directions, inside)) / v
        return -slope.reshape(x.shape)

    return score_fn


def local(
    data: Num[Arr, "n h w c"],
    process: Process,
    patch: Patch,
    chunk: int | None = None,
    log_weights: Num[Arr, " n"] | None = None,
) -> ScoreFn:
    """Each pixel from the posterior over the training patches at its own place.

    The local score machine: the weights of a pixel are those of the empirical score of
    the patch around it, and they average the training images in that pixel. A patch
    ends where the image ends: pixels beyond the border are left out of its distance,
    which is the same as images and query that are 0 there. The distance is that of
    differences, at every sigma, and its cost does not depend on the patch.

    Source: Kamb & Ganguli 2024 (2412.20292), after the published code.

    Args:
      data: images, float or uint8.
      patch: its side, odd and at most 2 side - 1, which covers the whole image from
        every pixel (and is then `empirical.score`); or pairs (t, side), in which a side
        holds up to its time, and the last one at all later times.
      chunk: images per step. The value does not depend on it; extra memory grows with
        batch x chunk x h x w. By default a step has PIXELS pixels.
      log_weights: as `empirical.posterior`.
    Returns:
      score_fn(x [h, w, c], t []) -> [h, w, c].
    Raises:
      ValueError: another patch; data that are no images; as `empirical.score`.
    """
    _check_patch(patch, data)

    return from_denoiser(
        _placed(data, process, _boxes(patch), chunk, log_weights), process
    )


def equivariant_local(
    data: Num[Arr, "n h w c"],
    process: Process,
    patch: Patch,
    chunk: int | None = None,
    log_weights: Num[Arr, " n"] | None = None,
) -> ScoreFn:
    """Each pixel from the posterior over training patches at all places.

    The equivariant local score machine with broken boundaries, that of a convolutional
    network with zero padding: a patch that sticks out of the image, which the network
    sees, is compared only with the training patches that stick out alike. Inside, those
    are the patches at all places inside; at an edge, at all places along this edge, at
    the same depth; in a corner, at the same place only, where it is `local`. With a
    patch wider and higher than the image all of it is `local`. The weights average the
    centres of the patches.

    Source: Kamb & Ganguli 2024 (2412.20292), after the published code.

    Args: as `local`; but by default a step has PATCHES patches, and extra memory grows
      with chunk x h x w x (patch^2 c + batch x w).
    Returns: score_fn(x [h, w, c], t []) -> [h, w, c].
    Raises: as `local`.
    """
    _check_patch(patch, data)
    forms = [
        _equivariant(data, process, side, chunk, log_weights) for side in _sides(patch)
    ]

    def denoise(x, t):
        check_query(data, x, t)
        if len(forms) == 1:
            return forms[0](x, t)
        place = _choice(patch, t, list(range(len(forms))))
        return jax.lax.switch(place, forms, jnp.asarray(x), jnp.asarray(t))

    return from_denoiser(denoise, process)


def covariance_local(
    data: Points,
    process: Process,
    threshold: float,
    chunk: int | None = None,
    log_weights: Num[Arr, " n"] | None = None,
) -> ScoreFn:
    """Each number from the posterior over training points masked by their covariance.

    The mask of a number is its row of the Wiener filter at t, where it is at least
    `threshold` of the largest entry of the row, by absolute value. With threshold 0 it
    is `empirical.score`.

    Source: Lukoianov 2025 (2509.09672), after the published code, which divides each
    row by its diagonal and compares with the largest entry of all rows.

    Args:
      data: points of any shape, not traced: see `moments`.
      threshold: in [0, 1]; the published code has 0.02 to 0.05.
      chunk, log_weights: as `local`.
    Returns:
      score_fn(x [*e], t []) -> [*e]. Extra memory: 2 d^2 numbers and batch x chunk x d;
      with times that differ in a batch, batch x d^2, so let a batch share its time.
    Raises:
      ValueError: another threshold; as `empirical.score`.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(
            f"threshold={threshold} must be in [0, 1]: the least share of the largest "
            "entry in a row of the Wiener filter that is seen"
        )
    of_data = moments(data, log_weights)

    def distance(t):
        dtype = jnp.result_type(t)
        _, variances, directions = _constants(of_data, dtype)
        signal = process.alpha(t) ** 2 * variances
        shrunk = directions * (signal / (signal + process.sigma(t) ** 2))[None]
        rows = jnp.abs(_product(shrunk, directions.T))
        seen = rows >= threshold * jnp.max(rows, axis=1, keepdims=True)
        return _masked(seen)

    return from_denoiser(_placed(data, process, distance, chunk, log_weights), process)


def _masked(seen):
    """squares [m, *e] -> their sums where seen [d, d], row by row, as [m, *e].

    Masks are local, so most of their blocks are empty, and nothing is multiplied there.
    """
    d = len(seen)
    side = next((b for b in range(BLOCK, d) if d % b == 0), d)
    blocks = seen.reshape(d // side, side, d // side, side).swapaxes(1, 2)
    used = jnp.any(blocks, axis=(2, 3))

    def around(squares):
        parts = squares.reshape(len(squares), -1, side)

        def add(total, i, j):
            return total + _product(parts[:, j], blocks[i, j].T.astype(parts.dtype))

        def row(i):
            def step(total, j):
                total = jax.lax.cond(
                    used[i, j], add, lambda total, *_: total, total, i, j
                )
                return total, None

            none = jnp.zeros_like(parts[:, 0])
            return jax.lax.scan(step, none, jnp.arange(len(used)))[0]

        sums = jax.lax.map(row, jnp.arange(len(used)))
        return sums.swapaxes(0, 1).reshape(squares.shape)

    return around


class _Places(NamedTuple):
    """Sums over training images, at each place with logits relative to its likeliest.

    One place may stand for all channels.
    """

    best: jax.Array  # [*e] the largest logit
    total: jax.Array  # [*e] sum of exp(logit - best), at least 1
    first: jax.Array  # [*e] sum of exp(logit - best) x_i


def _placed(data, process, distance, chunk, log_weights):
    """E[X_0 | X_t = x], at each place by its own weights.

    Args:
      distance: t -> (squared differences [m, *e] -> squared distances at all places).
    """
    size = math.prod(data.shape[1:3])
    chunk = max(1, PIXELS // size) if chunk is None else chunk
    check_data(data, chunk, log_weights)

    def denoise(x, t):
        check_query(data, x, t)
        x, t = jnp.asarray(x), jnp.asarray(t, x.dtype)
        alpha, v, around = process.alpha(t), process.sigma(t) ** 2, distance(t)

        def of_chunk(rows, prior):
            rows = floats(rows, x.dtype)
            prior = prior.reshape(-1, *[1] * x.ndim)
            logits = prior - around((x[None] - alpha * rows) ** 2) / (2 * v)
            best = jax.lax.stop_gradient(jnp.max(logits, axis=0))
            weights = jnp.exp(logits - best[None])
            return _Places(best, jnp.sum(weights, 0), jnp.sum(weights * rows, 0))

        def merge(a, b):
            best = jnp.maximum(a.best, b.best)
            keep_a, keep_b = jnp.exp(a.best - best), jnp.exp(b.best - best)
            return _Places(
                best,
                keep_a * a.total + keep_b * b.total,
                keep_a * a.first + keep_b * b.first,
            )

        extra = floored(log_weights, len(data), x.dtype)
        all_points = over_chunks(jnp.asarray(data), extra, chunk, of_chunk, merge)
        some = all_points.best > NEVER / 2  # else every point was left out
        return jnp.where(some, all_points.first / all_points.total, jnp.nan)

    return denoise


def _boxes(patch):
    """The distance of `_placed` between patches, summed over channels."""

    def distance(t):
        radius = _choice(patch, t, [side // 2 for side in _sides(patch)])

        def band(size, dtype):
            places = np.arange(size)
            return (abs(places[:, None] - places[None]) <= radius).astype(dtype)

        def around(squares):
            # By two products, sums of positive numbers: running sums would be exact to
            # the rounding of the whole image only.
            total = jnp.sum(squares, axis=3)
            high, wide = (band(size, total.dtype) for size in total.shape[1:])
            total = jnp.einsum("mhw,wb->mhb", total, wide, precision="highest")
            total = jnp.einsum("mhb,ah->mab", total, high, precision="highest")
            return total[..., None]

        return around

    return distance


def _equivariant(data, process, side, chunk, log_weights):
    """The denoiser of `equivariant_local` with one side of the patch."""
    h, w = data.shape[1:3]
    radius = side // 2
    # Where the patch sticks out, in each row or column in a way of its own.
    rows, columns = (
        np.array([i for i in range(n) if min(i, n - 1 - i) < radius], int)
        for n in (h, w)
    )
    high, wide = slice(radius, h - radius), slice(radius, w - radius)  # inside
    at_own_place = _placed(data, process, _boxes(side), chunk, log_weights)

    def among(cut, x, t):
        return _among(data, process, cut, side, chunk, log_weights, x, t)

    def strip(images, i):
        """The patches of row i, also those that stick out above or below."""
        images = jnp.pad(images, ((0, 0), (radius, radius), (0, 0), (0, 0)))
        images = jax.lax.dynamic_slice_in_dim(images, i, side, axis=1)
        return _patches(images, side)

    def denoise(x, t):
        answer = at_own_place(x, t)
        if side <= w and len(rows):
            edges = jax.lax.map(
                lambda i: among(lambda images: strip(images, i), x, t)[0], rows
            )
            answer = answer.at[rows, wide].set(edges)
        if side <= h and len(columns):
            edges = jax.lax.map(
                lambda i: among(lambda a: strip(a.swapaxes(1, 2), i), x, t)[0], columns
            )
            answer = answer.at[high, columns].set(edges.swapaxes(0, 1))
        if side <= min(h, w):
            middle = among(lambda images: _patches(images, side), x, t)
            answer = answer.at[high, wide].set(middle)
        return answer

    return denoise


def _among(data, process, cut, side, chunk, log_weights, x, t):
    """The means [a, b, c] of the centres of patches, at all places of a kind.

    Args: cut: images [m, h, w, c] -> their patches of this kind [m, a, b, side^2 c].
    """
    x, t = jnp.asarray(x), jnp.asarray(t)
    scale = process.alpha(t), process.sigma(t) ** 2
    queries = cut(x[None])[0]
    a, b, d = queries.shape
    centre = slice((d - x.shape[2]) // 2, (d + x.shape[2]) // 2)

    def of_chunk(rows, prior):
        points = cut(floats(rows, x.dtype)).reshape(-1, d)
        prior = jnp.repeat(prior, a * b)

        def of_one(query):
            return chunk_sums(points, prior, query, *scale, points[:, centre], FEW)

        # Row by row: all queries at once would be [a b, m a b] logits.
        return jax.lax.map(jax.vmap(of_one), queries)

    def merge(one, other):
        return jax.vmap(jax.vmap(lambda *sums: merged(*sums, *scale)))(
            one, other, queries
        )

    chunk = max(1, PATCHES // (a * b)) if chunk is None else chunk
    extra = floored(log_weights, len(data), x.dtype)
    return mean(over_chunks(jnp.asarray(data), extra, chunk, of_chunk, merge))


def _patches(images, side):
    """All patches that lie inside.   [m, h, w, c] -> [m, h', w', side^2 c]."""
    for axis in (1, 2):
        size = images.shape[axis] - side + 1
        shifts = [
            jax.lax.slice_in_dim(images, i, i + size, axis=axis) for i in range(side)
        ]
        images = jnp.stack(shifts, axis=3)
    return images.reshape(*images.shape[:3], -1)


def _sides(patch):
    return [side for _, side in patch] if isinstance(patch, Sequence) else [patch]


def _choice(patch, t, choices):
    """The one of numbers that belongs to the side of the patch at t."""
    if len(choices) == 1:
        return choices[0]
    times = np.array([time for time, _ in patch[:-1]])
    return jnp.asarray(choices)[jnp.sum(t > times)]


def _check_patch(patch, data):
    if data.ndim != 4:
        raise ValueError(
            f"data of shape {data.shape} have no patches: give images [n, h, w, c]"
        )
    most = 2 * max(data.shape[1:3]) - 1
    for side in _sides(patch):
        if not (side % 2 == 1 and 1 <= side <= most):
            raise ValueError(
                f"patch={side} must be odd, so that it has a centre, and from 1 to "
                f"{most}, which covers the whole image from every pixel"
            )
    times = [time for time, _ in patch] if isinstance(patch, Sequence) else [0]
    if not times or times != sorted(set(times)):
        raise ValueError(
            f"patch={patch} must be one side, or pairs (t, side) with rising times"
        )


def _constants(of_data, dtype):
    # Behind a barrier: at a known time XLA would compute with them for minutes, when it
    # compiles.
    arrays = tuple(jnp.asarray(a, dtype) for a in of_data)
    return jax.lax.optimization_barrier(arrays)


def _product(a, b):
    return jnp.matmul(a, b, precision="highest")
