"""Which training points are nearest to a sample, exactly, at the speed of a product."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

CONTENDERS = 16  # beyond k, recomputed exactly; float32 ranks far more than these right


class Neighbours(NamedTuple):
    """The k nearest distinct training points of each sample, nearest first."""

    distances: np.ndarray  # [m, k] Euclidean, in the units of the data
    indices: np.ndarray  # [m, k] into the training data; of duplicates, the first


def distinct(data):
    """Which rows are the first of their kind.   data [n, *e] -> sorted indices [k]."""
    rows = np.ascontiguousarray(np.asarray(data)).reshape(len(data), -1)
    rows = rows + np.zeros((), rows.dtype)  # -0.0 is 0.0
    keys = rows.view(np.dtype((np.void, rows.dtype.itemsize * rows.shape[1])))
    return np.sort(np.unique(keys.ravel(), return_index=True)[1])


def nearest(samples, data, k: int = 2, chunk: int = 256) -> Neighbours:
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
