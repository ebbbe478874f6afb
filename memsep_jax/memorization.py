"""How much of a set of samples is copied from the training data.

A sample is memorized when its nearest training point is closer than a third of the
distance to the second nearest *distinct* one. The rate of held-out points is the null
level: what honest samples would score.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

RATIO = 1 / 3
CONTENDERS = 16  # beyond k, recomputed exactly; float32 ranks far more than these right


class Neighbours(NamedTuple):
    """The k nearest distinct training points of each sample, nearest first."""

    distances: np.ndarray  # [m, k] Euclidean, in the units of the data
    indices: np.ndarray  # [m, k] into the training data; of duplicates, the first


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
    """
    axes = tuple(range(1, data.ndim))
    squares = jnp.sum((x[None] - data) ** 2, axis=axes)
    nearest = data[jnp.argmin(squares)]
    # A copy of a point that occurs twice has d1 = d2: only another point is second.
    same = jnp.all(data == nearest[None], axis=axes)
    return jnp.sqrt(
        jnp.stack([jnp.min(squares), jnp.min(squares, where=~same, initial=jnp.inf)])
    )


def memorized(x, data, ratio: float = RATIO):
    """Whether d1 < ratio d2.   Args: x [*e], data [n, *e].   Returns: bool []."""
    nearest, second = nearest_two(x, data)
    return nearest < ratio * second


def distinct(data):
    """Which rows are the first of their kind.   data [n, *e] -> sorted indices [k]."""
    rows = np.ascontiguousarray(np.asarray(data)).reshape(len(data), -1)
    rows = rows + np.zeros((), rows.dtype)  # -0.0 is 0.0
    keys = rows.view(np.dtype((np.void, rows.dtype.itemsize * rows.shape[1])))
    return np.sort(np.unique(keys.ravel(), return_index=True)[1])


def neighbours(samples, data, k: int = 2, chunk: int = 256) -> Neighbours:
    """The k nearest distinct training points of every sample: see `searcher`."""
    return searcher(data, k, chunk)(samples)


def searcher(data, k: int = 2, chunk: int = 256, block: int = 8_192):
    """Searches the k nearest distinct training points, compiled once for its data.

    Contenders are found by a matrix product, block by block, and then recomputed by
    differences: an exact copy has distance 0 and the right index, at the speed of the
    product. Memory grows with chunk x (block + k + 16) and d, never with m x n.

    Args:
      data: [n, *e].   chunk, block: samples and training points looked at together.
    Returns:
      samples [m, *e] -> Neighbours.
    Raises:
      ValueError: k larger than the number of distinct points, or shapes that differ.
    """
    data = np.asarray(data)
    if chunk < 1 or block < 1:
        raise ValueError(f"chunk={chunk} and block={block} must be at least 1")
    first = distinct(data)
    if not 1 <= k <= len(first):
        raise ValueError(
            f"k={k} neighbours were asked of {len(first)} distinct training points: "
            "use more data, or the distance to the nearest one only (k=1)"
        )
    points = data[first].reshape(len(first), -1).astype(np.float32)
    search = jax.jit(_search(points, k, block))

    def found(samples) -> Neighbours:
        samples = np.asarray(samples)
        if samples.shape[1:] != data.shape[1:]:
            raise ValueError(
                f"samples of shape {samples.shape[1:]} against data of shape "
                f"{data.shape[1:]}: resize one of them"
            )
        m = len(samples)
        size = max(1, min(chunk, m))
        # Padded to whole chunks: one shape, one compilation.
        flat = samples.reshape(m, points.shape[1]).astype(np.float32)
        flat = np.pad(flat, [(0, -m % size), (0, 0)])
        pieces = [search(flat[i : i + size]) for i in range(0, len(flat), size)]
        if not pieces:
            return Neighbours(np.zeros((0, k), np.float32), np.zeros((0, k), int))
        distances, indices = (np.concatenate(p)[:m] for p in zip(*pieces, strict=True))
        return Neighbours(distances, first[indices])

    return found


def _search(points, k, block):
    """Of *distinct* points [n, d]: samples [m, d] -> distances [m, k], indices."""
    n, d = points.shape
    count = min(k + CONTENDERS, n)
    block = max(min(block, n), count)
    # Distances do not change when all is centred, and rounding shrinks with the norms.
    centre = np.mean(points, axis=0)
    blocks = np.pad(points, [(0, -n % block), (0, 0)]).reshape(-1, block, d)
    numbers = np.arange(len(blocks) * block).reshape(-1, block)
    blocks, numbers = jnp.asarray(blocks), jnp.asarray(numbers)

    def search(samples):
        moved = samples - centre[None]

        def merge(best, inputs):
            points, numbers = inputs
            points = points - centre[None]
            product = jnp.matmul(moved, points.T, precision="highest")
            rank = jnp.sum(points**2, axis=1)[None] - 2 * product  # d^2 - |x|^2
            rank = jnp.where((numbers < n)[None], rank, jnp.inf)  # padding never wins
            numbers = jnp.broadcast_to(numbers[None], rank.shape)
            rank = jnp.concatenate([best[0], rank], axis=1)
            numbers = jnp.concatenate([best[1], numbers], axis=1)
            top, place = jax.lax.top_k(-rank, count)
            return (-top, jnp.take_along_axis(numbers, place, axis=1)), None

        m = len(samples)
        start = jnp.full((m, count), jnp.inf), jnp.zeros((m, count), numbers.dtype)
        (_, contenders), _ = jax.lax.scan(merge, start, (blocks, numbers))

        def exact(pair):  # one sample at a time: [count, d], not [m, count, d]
            x, contenders = pair
            rows = blocks.reshape(-1, d)[contenders]
            distances = jnp.sqrt(jnp.sum((rows - x[None]) ** 2, axis=1))
            order = jnp.lexsort((contenders, distances))[:k]  # lowest index on ties
            return distances[order], contenders[order]

        return jax.lax.map(exact, (samples, contenders))

    return search


def ratio(
    samples, data, held_out=None, threshold: float = RATIO, chunk: int = 256
) -> Ratio:
    """The memorization ratio, its interval, and the null level of held-out points.

    Args:
      samples: [m, *e] generated points.   data: [n, *e] the training set.
      held_out: [l, *e] points that were not trained on, or None.
    Raises:
      ValueError: no samples, a threshold outside (0, 1), or fewer than two distinct
        training points, for which a second neighbour does not exist.
    Source: Gu 2023, section 2; Ye 2025, section 6.
    """
    if not 0 < threshold < 1:
        raise ValueError(f"threshold={threshold} must be in (0, 1); the papers use 1/3")
    if len(samples) < 1:
        raise ValueError("no samples: the memorization ratio needs at least one")
    count = len(distinct(data))
    if count < 2:
        raise ValueError(
            f"the memorization ratio needs two distinct training points and got {count}"
            ": use more data, or the distance to the nearest one (neighbours with k=1)"
        )
    search = searcher(data, 2, chunk)
    null = held_out is not None and len(held_out) > 0
    held = search(held_out) if null else None
    return ratio_of(search(samples), held, len(data) - count, threshold)


def ratio_of(
    found: Neighbours, held_out: Neighbours | None, duplicates: int, threshold=RATIO
) -> Ratio:
    """`ratio`, from neighbours that were already searched."""
    copied = _below(found, threshold)
    null = None if held_out is None else _below(held_out, threshold)
    return Ratio(
        value=float(copied.mean()),
        interval=wilson(int(copied.sum()), len(copied)),
        null=None if null is None else float(null.mean()),
        null_interval=None if null is None else wilson(int(null.sum()), len(null)),
        neighbours=found,
        memorized=copied,
        duplicates=duplicates,
    )


def wilson(count: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of a share, 95 % by default (Wilson 1927)."""
    if not 0 <= count <= total or total < 1:
        raise ValueError(f"count={count} of total={total} is not a share")
    share, z2 = count / total, z * z
    centre = share + z2 / (2 * total)
    half = z * np.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    low, high = (centre - half) / (1 + z2 / total), (centre + half) / (1 + z2 / total)
    # Rounding must not put the share itself outside.
    return float(min(max(low, 0.0), share)), float(max(min(high, 1.0), share))


def calibrated_l2(distances, alpha: float = 0.5):
    """d_1 / (alpha mean_{y in S} ||g - y||): small where a sample is a copy.

    Args: distances [m, k] to the k nearest training points, sorted (the paper's S has
      k = 50).   Returns: [m].   Source: Carlini 2023, section 5.1.
    """
    distances = np.asarray(distances)
    mean = alpha * distances.mean(axis=1)
    return np.divide(distances[:, 0], mean, out=np.zeros_like(mean), where=mean > 0)


def _below(found, threshold):
    return found.distances[:, 0] < threshold * found.distances[:, 1]
