"""Batches of a data set: a batch is a function of (key, step) alone.

So a resumed run sees the same batches, in memory or streamed from disk.
"""

import functools
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memsep_jax.data.arrays import Rows, from_uint8
from memsep_jax.keys import BRANCH

AHEAD = 2  # batches that are read while the device works on another
# Entries of permutations that are made at once: of a small set, many epochs in one call
# of the device; of a large one, a single epoch.
KEPT = 2**17


class Dataset(NamedTuple):
    """Training points and, for a conditional model, their labels."""

    # [n, *event] float32; images in [-1, 1]. On disk: Rows, uint8 pixels or float32.
    x: jax.Array | Rows
    label: jax.Array | None = None  # [n] int32


def indices(n: int, key, step, size: int, reshuffle: bool = True):
    """Which examples batch `step` holds: each epoch is a permutation of all n.

    Example j = step * size + i is number j % n of epoch j // n, so batches straddle
    epochs and a batch larger than n runs through several. Exact for step < 2**32.

    Args:
      n, size: Python integers, n < 2**27.   step []: may be traced.
      reshuffle: False: every epoch has the permutation of the first.
    Returns: [size] int32 in 0..n-1.
    """
    _check_batch(n, size)
    # step * size overflows 32 bits, and jax has no wider integers by default. So it is
    # summed over the bits of step from exact quotients and remainders; an epoch wraps,
    # a remainder never does.
    powers = [divmod(size << bit, n) for bit in range(32)]
    quotients = jnp.array([q % 2**32 for q, _ in powers], jnp.uint32)
    remainders = jnp.array([r for _, r in powers], jnp.uint32)
    bits = (jnp.asarray(step, jnp.uint32) >> jnp.arange(32, dtype=jnp.uint32)) & 1
    total = jnp.sum(bits * remainders, dtype=jnp.uint32)
    epoch = jnp.sum(bits * quotients, dtype=jnp.uint32) + total // n
    place = total % n + jnp.arange(size, dtype=jnp.uint32)
    # A batch starts at a multiple of gcd(n, size): if size divides n, one epoch.
    touched = (n - math.gcd(n, size) + size - 1) // n + 1
    epochs = epoch + jnp.arange(touched, dtype=jnp.uint32)
    if not reshuffle:
        epochs = jnp.zeros_like(epochs)
    return _permutations(key, epochs, n)[place // n, place % n].astype(jnp.int32)


def order(n: int, key, size: int, reshuffle: bool = True):
    """(step) -> the rows [size] int32 of `indices`, on the host.

    `indices` sorts n random numbers at every step, for each epoch that it touches; here
    they are sorted once per epoch.
    """
    _check_batch(n, size)
    together = max(1, KEPT // n)
    permutations = jax.jit(_permutations, static_argnums=2)

    @functools.lru_cache(maxsize=2)  # a batch may begin in one and end in the next
    def block(number):
        epochs = np.arange(number * together, (number + 1) * together) % 2**32
        return np.asarray(permutations(key, epochs.astype(np.uint32), n))

    def rows(step):
        epoch, place = divmod(np.arange(step * size, (step + 1) * size), n)
        if not reshuffle:
            epoch = np.zeros_like(epoch)
        number, epoch = divmod(epoch, together)
        result = np.empty(size, np.int32)
        for i in np.unique(number):
            here = number == i
            result[here] = block(int(i))[epoch[here], place[here]]
        return result

    return rows


def _check_batch(n, size):
    # 2**27: `indices` adds up 32 remainders below n, in 32 bits.
    if not (0 < n < 2**27 and 0 < size < 2**27):
        raise ValueError(f"n={n} and batch size={size} must be in 1 .. 2**27 - 1")


def _permutations(key, epochs, n):
    """The permutation of each epoch.   epochs [k] uint32 -> [k, n]."""
    return jax.vmap(lambda e: jax.random.permutation(jax.random.fold_in(key, e), n))(
        epochs
    )


def draw(
    data: Dataset, key, step, size: int, flip: bool = False, reshuffle: bool = True
) -> Dataset:
    """Batch `step`: a function of (key, step) alone, each epoch without replacement.

    Args:
      key, step []: may be traced.   flip: mirror images left-right half the time.
      reshuffle: as in `indices`.
    Returns: Dataset of [size, *event] and [size] labels.
    """
    # By gathering rows on the device, where the whole set lies: under jit, a batch
    # never passes through the host.
    rows = indices(len(data.x), key, step, size, reshuffle)
    batch = jax.tree.map(lambda a: jnp.asarray(a)[rows], data)
    return augment(batch, key, step, flip)


def stream(data: Dataset, rows_of, sharding):
    """(step) -> batch `step` of points that stay on disk, placed by a sharding.

    The next AHEAD batches are read meanwhile; each process reads its own part of them.
    Pixels stay uint8: `augment` turns them into floats.

    Args: rows_of, (step) -> rows, as `order` gives it.
    """
    # One thread, which reads batches in the order in which they are taken.
    pool, ahead = ThreadPoolExecutor(1), {}

    def read_batch(step):
        rows = rows_of(step)
        return jax.tree.map(
            lambda a: jax.make_array_from_callback(
                (len(rows), *a.shape[1:]),
                sharding,
                lambda at: np.asarray(a[rows[at[0]]]),
            ),
            data,
        )

    def batch(step):
        for k in range(step, step + AHEAD + 1):
            if k not in ahead:
                ahead[k] = pool.submit(read_batch, k)
        return ahead.pop(step).result()

    return batch


def augment(batch: Dataset, key, step, flip: bool = False) -> Dataset:
    """A batch as `draw` returns it: pixels become floats, images may be mirrored."""
    x: Any = batch.x
    if flip and x.ndim != 4:
        raise ValueError(f"flip=True mirrors images; x has shape {x.shape}")
    if x.dtype == np.uint8:
        # A table, made by NumPy: a compiled division may be rounded differently, and
        # streamed batches are to equal those in memory bit by bit.
        x = jnp.asarray(from_uint8(np.arange(256)))[x]
    if flip:
        branch = jax.random.fold_in(key, BRANCH)  # fold_in(key, step) is an epoch's
        flips = jax.random.bernoulli(
            jax.random.fold_in(branch, step), shape=x.shape[:1]
        )
        x = jnp.where(flips[:, None, None, None], x[:, :, ::-1], x)
    return batch._replace(x=x)
