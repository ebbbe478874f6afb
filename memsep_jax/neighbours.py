"""Which training points are nearest to a sample, exactly, at the speed of a product."""

import functools
import hashlib
import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from memsep_jax.checks import check_on_host
from memsep_jax.shapes import Arr, Int

# Points beyond k that are recomputed by differences. Their number decides only how many
# samples are left in doubt, never what the answer is.
CONTENDERS = 16
PART = 2**28  # bytes of points on disk that are read at a time
# Samples compared with every point by differences, at a time: few are in doubt, and
# they are padded to this number, so that one compiled program serves them all.
DOUBTED = 8
# The least numbers in a piece of a sum: an image of 32 x 32 x 3 is one piece, which
# costs nothing. And the most pieces of a longer image: each is a step of a loop.
PIECE, PIECES = 4_096, 64
TOGETHER = 16  # samples whose contenders are gathered at a time


class Neighbours(NamedTuple):
    """The k nearest distinct training points of each sample, nearest first."""

    distances: np.ndarray  # [m, k] Euclidean, in the units of the data
    indices: np.ndarray  # [m, k] into the training data; of duplicates, the first


def distinct(data) -> Int[Arr, " k"]:
    """Sorted indices of the rows of data [n, *e] that are the first of their kind."""
    check_on_host("a search of neighbours", data)
    first: dict[bytes, int] = {}
    # Digests, not the rows: 16 bytes for each, whatever the rows are, and 128 bits
    # leave no chance of a collision.
    for i, row in enumerate(data):
        row = row + np.zeros((), row.dtype)  # -0.0 is 0.0
        first.setdefault(hashlib.blake2b(row.tobytes(), digest_size=16).digest(), i)
    return np.array([*first.values()], int)


def nearest(samples, data, k: int = 2, chunk: int = 1_024) -> Neighbours:
    """The k nearest distinct training points of every sample: see `searcher`."""
    return searcher(data, k, chunk)(samples)


def searcher(
    data,
    k: int = 2,
    chunk: int = 1_024,
    block: int = 2_048,
    devices=None,
    memory: float = math.inf,
):
    """A search for the k nearest distinct training points, compiled once for its data.

    A matrix product selects contenders, block by block, and differences recompute them:
    an exact copy has distance 0 and the right index, at the speed of the product. If
    the product's rounding leaves doubt about a sample, it is compared with every point
    by differences, so the answer is always theirs, with the lowest index on ties.

    Each device holds its share of the data, in uint8 if they are uint8; memory beyond
    that grows with chunk x (block + d) and block x d, never with m x n. If the data are
    searched in themselves, distances[:, 1] is the distance to the nearest other point.

    Args:
      data: [n, *e] numbers, or uint8 pixels, which mean u / 127.5 - 1; or rows that
        stay on disk (data.Rows), read PART bytes at a time for all samples.
      chunk, block: the most samples and training points in one step.
      memory: bytes that a search may take beyond the data. With little memory, chunks
        and blocks are smaller, and the answer is the same.
      devices: the data are split over these; by default, all of this process. Several
        processes give jax.devices() and then search the same samples together.
    Returns:
      samples [m, *e] -> Neighbours; uint8 pixels where the data are.
    Raises:
      ValueError: k larger than the number of distinct points, or shapes or units that
        differ.
    """
    check_on_host("a search of neighbours", data)
    on_disk = not isinstance(data, (np.ndarray, jax.Array, list, tuple))
    data = data if on_disk else np.asarray(data)
    if chunk < 1 or block < 1:
        raise ValueError(f"chunk={chunk} and block={block} must be at least 1")
    first = distinct(data)
    n, pixels = len(first), data.dtype == np.uint8
    if not 1 <= k <= n:
        raise ValueError(
            f"k={k} neighbours were requested of {n} distinct training points: "
            "use more data, or the distance to the nearest one only (k=1)"
        )
    event, dtype = data.shape[1:], data.dtype
    d = math.prod(event)
    devices = np.array(jax.local_devices() if devices is None else devices)
    chunk, block, together = _sizes(memory, d, k, (chunk, block, TOGETHER))
    part = max(k, PART // (dtype.itemsize * d)) if on_disk else n

    # Data that fit in one part are read, and put on the devices, once; of larger data
    # only the part in use is held.
    @functools.lru_cache(maxsize=1)
    def part_of(start):
        rows = first[start : start + part]
        points = data if len(rows) == len(data) else data[rows]
        return _searcher(
            _flat(np.asarray(points)), min(k, len(rows)), block, devices, together
        )

    def search(samples) -> Neighbours:
        check_on_host("a search of neighbours", samples)
        samples = np.asarray(samples)
        if samples.shape[1:] != event:
            raise ValueError(
                f"samples of shape {samples.shape[1:]} against data of shape {event}: "
                "resize one of them"
            )
        if (samples.dtype == np.uint8) != pixels:
            raise ValueError(
                f"samples of dtype {samples.dtype} against data of dtype {dtype}: "
                "uint8 pixels have other units; data.from_uint8 takes them to [-1, 1]"
            )
        samples = _flat(samples)
        squares = np.empty((len(samples), 0), np.float32)
        numbers = np.empty((len(samples), 0), int)
        for start in range(0, n, part):
            more_squares, more_numbers = part_of(start)(samples, chunk)
            squares, numbers = _nearest(
                np.concatenate([squares, more_squares], axis=1),
                np.concatenate([numbers, more_numbers + start], axis=1),
                k,
            )
        unit = np.float32(127.5 if pixels else 1)
        return Neighbours(np.sqrt(squares) / unit, first[numbers])

    if not on_disk:
        part_of(0)  # data that do not fit fail now
    return search


def _sizes(memory, d, k, most):
    """chunk, block and together, with a third of the memory each, from 1 to `most`.

    A sample is held as it came, as floats and centred: 12 bytes a number. A point of a
    block is held as it is and as floats (8), and so are all contenders of a sample (5
    if they are pixels).
    """
    bytes_of_each = 12 * d, 8 * d, 5 * d * (k + CONTENDERS)
    return (
        max(1, int(min(size, memory / 3 / each)))
        for size, each in zip(most, bytes_of_each, strict=True)
    )


def _searcher(points, k, block, devices, together):
    """points [n, d], all different -> (samples [m, d], chunk) -> squares and numbers.

    Returns: both [m, k], as the answer of `_search` for each of them.
    """
    n = len(points)
    # Centring leaves distances unchanged, and rounding shrinks with the norms.
    centre = points.mean(axis=0, dtype=np.float64).astype(np.float32)
    mesh = Mesh(devices, ("data",), axis_types=(AxisType.Auto,))
    shares = _shares(points, mesh)

    def answer(x, size, every):
        """Squares and numbers [m, k] of padded samples, and which are in doubt."""
        m, x = len(x), np.pad(x, [(0, size - len(x)), (0, 0)])
        # Where there are no other points, their bound is infinite, and meant to be.
        with jax.debug_infs(False):
            parts = _search(shares, centre, x, n, k, block, mesh, every, together)
        # Wait first: np.asarray of a result that found no memory ends the process.
        squares, numbers, others = (
            np.asarray(part)[:m] for part in jax.block_until_ready(parts)
        )
        squares, numbers = _nearest(squares, numbers, k)
        # The k-th neighbour is sure if its own rounding, added, leaves it nearer than
        # the least that rounding allows of any point that was not recomputed.
        largest = squares[:, -1] / _shrink(x.shape[1])
        return squares, numbers, ~(largest < others.min(axis=1))  # NaN is in doubt

    def search(samples, chunk):
        m = len(samples)
        squares, numbers = np.empty((m, k), np.float32), np.empty((m, k), int)
        doubted = np.zeros(m, bool)
        # Chunks as equal as possible: one compilation, and little padding.
        size = -(-m // max(1, -(-m // chunk)))
        for rows in _cut(np.arange(m), size):
            squares[rows], numbers[rows], doubted[rows] = answer(
                samples[rows], size, every=False
            )
        for rows in _cut(np.flatnonzero(doubted), DOUBTED):
            squares[rows], numbers[rows], _ = answer(samples[rows], DOUBTED, every=True)
        return squares, numbers

    return search


def _nearest(squares, numbers, k):
    """The k nearest of candidates [m, j], and on ties the first in the data."""
    order = np.argsort(squares, axis=1, kind="stable")[:, :k]
    return tuple(np.take_along_axis(a, order, axis=1) for a in (squares, numbers))


def _flat(x):
    x = x.reshape(len(x), int(np.prod(x.shape[1:])))
    return x if x.dtype == np.uint8 else x.astype(np.float32, copy=False)


def _cut(rows, size):
    return [rows[i : i + size] for i in range(0, len(rows), max(1, size))]


def _shares(points, mesh):
    """points [n, d] -> [devices * share, d], split; the last shares may overlap."""
    # A sharded array needs equal shares. The last ones overlap instead of being padded:
    # a made-up point could win a search.
    share = -(-len(points) // mesh.size)

    def of(index):
        start = min(index[0].start or 0, len(points) - share)
        return points[start : start + share]

    split = NamedSharding(mesh, PartitionSpec("data"))
    return jax.make_array_from_callback((share * mesh.size, points.shape[1]), split, of)


def _piece(d):
    """The length of the pieces in which d numbers are summed."""
    return max(PIECE, -(-d // PIECES))


def _summed(total, *arrays):
    """total(*arrays), which sums over their last axis, added up piece by piece.

    The bound on the rounding of a sum grows with its terms: for 256 x 256 x 3 pixels at
    once it is 2.6 % of the norms, and no neighbour is sure; for 48 pieces it is 0.06 %.
    """
    d = arrays[0].shape[-1]
    size = _piece(d)

    def piece(start, size):
        cut = partial(jax.lax.dynamic_slice_in_dim, axis=-1)
        return total(*(cut(a, start, size) for a in arrays))

    if d <= size:
        return total(*arrays)
    # A loop, since 48 pieces one by one take the compiler 0.2 GB.
    whole, rest = divmod(d, size)
    result = jax.lax.fori_loop(
        1, whole, lambda i, result: result + piece(size * i, size), piece(0, size)
    )
    return result + piece(size * whole, rest) if rest else result


def _shrink(d):
    """A factor s with s |x|^2 + s |y|^2 - 2 x.y <= |x - y|^2 whatever float32 rounds.

    In whatever order n terms and then p pieces are summed, |x|^2, |y|^2 and 2 x.y are
    off by at most (n + p) u of |x|^2, |y|^2 and |x|^2 + |y|^2, u = eps / 2; centring
    and the rest add a few u.   Source: Higham 2002, section 3.1.
    """
    size = _piece(d)
    terms = min(d, size) + -(-d // size)
    return np.float32(1 - 1.1 * (terms + 8) * np.finfo(np.float32).eps)


@partial(jax.jit, static_argnames=("n", "k", "block", "mesh", "every", "together"))
def _search(shares, centre, samples, n, k, block, mesh, every, together=TOGETHER):
    """The k nearest of each share of n points, by differences to contenders or to all.

    Args: shares of `_shares`; samples [m, d].
    Returns: squares and numbers [m, devices * k], and [m, devices] lower bounds of the
      squares of all other points.
    """
    share = len(shares) // mesh.size
    k, block = min(k, share), min(block, share)
    count = k if every else min(k + CONTENDERS, share)

    def on_one_device(points, centre, samples):
        m, d = samples.shape
        number = share * jax.lax.axis_index("data")
        begin = jnp.minimum(number, n - share)
        samples = samples.astype(jnp.float32)
        moved = samples - centre[None]

        def norms(x):
            return _shrink(d) * _summed(lambda x: jnp.sum(x**2, axis=1), x)

        own = norms(moved)

        def differences(x, rows):
            def square(x, rows):
                return jnp.sum((rows.astype(jnp.float32) - x[None]) ** 2, axis=1)

            return _summed(square, x, rows)

        def bounds(rows):
            rows = rows.astype(jnp.float32) - centre[None]
            products = _summed(
                lambda x, rows: jnp.matmul(x, rows.T, precision="highest"), moved, rows
            )
            return own[:, None] + norms(rows)[None] - 2 * products

        def merge(best, start):
            offset = jnp.minimum(start, share - block)
            rows = jax.lax.dynamic_slice_in_dim(points, offset, block)
            if every:
                squares = jax.lax.map(lambda x: differences(x, rows), samples)
            else:
                squares = bounds(rows)
            # Points that overlap the previous block or share have counted there.
            place = offset + jnp.arange(block, dtype=jnp.int32)
            fresh = place >= jnp.maximum(start, number - begin)
            squares = jnp.where(fresh[None], squares, jnp.inf)
            squares = jnp.concatenate([best[0], squares], axis=1)
            # Of equal ones top_k takes the first, so ties go to the lowest index.
            top, i = jax.lax.top_k(-squares, count)
            old = jnp.take_along_axis(best[1], jnp.minimum(i, count - 1), axis=1)
            return (-top, jnp.where(i < count, old, offset + i - count)), None

        none = jnp.full((m, count), jnp.inf), jnp.zeros((m, count), jnp.int32)
        starts = jnp.arange(0, share, block, dtype=jnp.int32)
        (squares, places), _ = jax.lax.scan(merge, none, starts)
        others = jnp.full((m, 1), jnp.inf)
        if not every:
            others = squares[:, -1:] if count < share else others
            exact = jax.lax.map(
                lambda pair: differences(pair[0], points[pair[1]]),
                (samples, places),
                batch_size=together,  # [16, count, d] at once, not [m, count, d]
            )
            # Places that nothing has filled hold index 0, which is no answer.
            exact = jnp.where(squares < jnp.inf, exact, jnp.inf)
            squares, places = jax.lax.sort((exact, places), num_keys=2)
        answer = squares[:, :k], begin + places[:, :k], others
        if several:
            answer = [jax.lax.all_gather(a, "data", axis=1, tiled=True) for a in answer]
        return tuple(answer)

    # With several processes, each needs the answers of all.
    several = len({device.process_index for device in mesh.devices.flat}) > 1
    split, whole = PartitionSpec("data"), PartitionSpec()
    return jax.shard_map(
        on_one_device,
        mesh=mesh,
        in_specs=(split, whole, whole),
        out_specs=whole if several else PartitionSpec(None, "data"),
        check_vma=False,  # the check cannot see that all have gathered the same
    )(shares, centre, samples)
