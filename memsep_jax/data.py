"""A data set is an array: read a source, choose a subset, label it, draw batches.

`source` reads decoded pools, `select` is pure in the arrays, `splits` is both. A
batch is a function of (key, step) alone, so a resumed run sees the same batches.
"""

import hashlib
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from PIL import Image

from memsep_jax.sources import (
    BRANCH,
    MAX_HELD_OUT,
    DataError,
    Source,
    check_resolution,
    check_source,
    source,
)

LABELS = ("none", "true", "random", "unique")
HELD_OUT_SHARE = 0.165  # of a source without a test split: 297 of the 1,797 digits


class Dataset(NamedTuple):
    """Training points and, for a conditional model, their labels."""

    x: jax.Array  # [n, *event] float32; images in [-1, 1]
    label: jax.Array | None = None  # [n] int32


class Splits(NamedTuple):
    """What a run trains on, what it never sees, and how to recognize both."""

    train: Dataset
    held_out: Dataset | None
    fingerprint: str  # SHA-256 of both
    num_distinct: int  # different points in train


# From pools to what a run trains on.


def splits(
    name: str, num_examples: int | None = None, seed: int = 0, **arguments
) -> Splits:
    """Read a source, then `select` from it: keywords of both, and the same errors."""
    choice = {key: arguments.pop(key) for key in set(CHOICE) & set(arguments)}
    _check_choice(num_examples, seed, **(CHOICE | choice))
    if name == "folder":  # its images stack only once they are of one size
        arguments["resolution"] = choice.get("resolution")
    return select(source(name, **arguments), num_examples, seed, **choice)


def load(
    name: str, num_examples: int | None = None, seed: int = 0, **arguments
) -> Dataset:
    """The training set of `splits`, with the same keywords."""
    return splits(name, num_examples, seed, **arguments).train


def select(
    source: Source,
    num_examples: int | None = None,
    seed: int = 0,
    *,
    num_held_out: int | None = None,
    classes=None,
    balanced: bool = False,
    resolution: int | None = None,
    labels: str = "none",
    num_labels: int | None = None,
    duplicates: float = 0.0,
    copies: int = 1,
    deduplicate: bool = False,
) -> Splits:
    """Choose a training subset and a held-out set that never overlaps it.

    Subsets of one seed are nested: the first m of n are the subset of size m. The
    held-out set is the start of the test split, or a fixed cut of the pool; it is the
    same for every seed and size.

    Args:
      source: pools.   num_examples: of the training set, before copies; None: all.
      num_held_out: None: at most 10,000 of a test split, else 16.5 % of the pool.
      classes: class numbers to keep; true labels then count them from 0.
      balanced: the same number of each class.   resolution: resize images to it.
      labels: "none", "true", "random" (`num_labels` classes), "unique" (0..n-1).
      duplicates: share of the training images that appear `copies` more times.
      deduplicate: at the end, keep each distinct point once, with its first label.
    Raises:
      ValueError: an argument breaks its rule.   DataError: the data cannot serve.
    """
    _check_choice(
        num_examples,
        seed,
        num_held_out,
        classes,
        balanced,
        resolution,
        labels,
        num_labels,
        duplicates,
        copies,
        deduplicate,
    )
    check_source(source, "source", warn=False)
    tested = source.test_images is not None
    labelled = source.labels is not None
    if tested and (classes is not None or labels == "true"):
        labelled &= source.test_labels is not None
    if not labelled and labels == "true":
        raise DataError("labels='true': the source lacks labels; take 'none' or others")
    if not labelled and (classes is not None or balanced):
        raise ValueError("classes and balanced need labels, which the source lacks")
    if resolution is not None and source.images.dtype != np.uint8:
        raise ValueError(f"resolution={resolution} resizes uint8 images only")

    if classes is not None and source.labels is not None:
        absent = np.setdiff1d(classes, source.labels).tolist()
        if absent:
            known = np.unique(source.labels)[:20].tolist()
            raise ValueError(f"classes={classes}: {absent} not among labels {known}")

    pool, pool_labels = _keep_classes(*source[:2], classes)
    if tested:
        held, held_labels = _keep_classes(*source[2:], classes)
        count = min(len(held), MAX_HELD_OUT) if num_held_out is None else num_held_out
        if count > len(held):
            raise ValueError(
                f"num_held_out={count}, but the test split has {len(held)}; lower it"
            )
        held, held_labels = _take(held, held_labels, slice(count))
    else:
        default = round(HELD_OUT_SHARE * len(pool))
        count = default if num_held_out is None else num_held_out
        if count >= len(pool):
            raise ValueError(
                f"num_held_out={count} of {len(pool)} leaves nothing to train on; "
                "lower it"
            )
        cut = np.random.default_rng(0).permutation(len(pool))
        held, held_labels = _take(pool, pool_labels, np.sort(cut[:count]))
        pool, pool_labels = _take(pool, pool_labels, np.sort(cut[count:]))

    pool, held = _resize(pool, resolution), _resize(held, resolution)
    # Against the whole pool, not the subset: the same set for every seed and size.
    seen = set(_digests(pool))
    fresh = np.array([digest not in seen for digest in _digests(held)], bool)
    if not fresh.all():
        logging.info("%d held-out equal a training one: removed", (~fresh).sum())
        held, held_labels = _take(held, held_labels, fresh)

    order = np.random.default_rng(seed).permutation(len(pool))
    n = len(pool) if num_examples is None else num_examples
    if balanced:
        order, counts = _interleave(order, pool_labels)
        n = min(counts) * len(counts) if num_examples is None else num_examples
        if n % len(counts) or n > min(counts) * len(counts):
            raise ValueError(
                f"num_examples={n} must be a multiple of the {len(counts)} classes, "
                f"at most {min(counts)} of each, to be balanced"
            )
    if n > len(pool):
        raise ValueError(
            f"num_examples={n}, but the pool has {len(pool)} (after held-out images "
            "and classes); lower num_examples or num_held_out"
        )
    x, true_labels = _take(pool, pool_labels, order[:n])
    label, held_label = None, None
    if labels == "true":
        label, held_label = true_labels, held_labels
    elif labels == "unique":
        label = np.arange(n)
    elif num_labels is not None:
        # Not the key itself: a run of the same seed splits that for its weights.
        key = jax.random.fold_in(jax.random.key(seed), BRANCH)
        key, held_key = jax.random.split(key)
        label = np.asarray(random_labels(key, n, num_labels))
        if len(held):
            held_label = np.asarray(random_labels(held_key, len(held), num_labels))
    # round: 0.29 * 100 is 28.999999999999996
    repeated = np.arange(math.floor(round(duplicates * n, 6)))
    rows = np.concatenate([np.arange(n), np.tile(repeated, copies)])
    x, label = _take(x, label, rows)
    if deduplicate:
        x, label = _take(x, label, _first_rows(x))
    return Splits(
        _dataset(x, label),
        _dataset(held, held_label) if len(held) else None,
        _fingerprint(x, label, held, held_label),
        len(set(_digests(x))),
    )


CHOICE = select.__kwdefaults__ or {}  # keywords of select; the rest are the source's


def from_uint8(u):
    """Pixels 0..255 to [-1, 1]: u / 127.5 - 1.   u [...] -> [...] float32."""
    return u.astype(np.float32) / 127.5 - 1


def to_uint8(x):
    """The pixels nearest to x, clipped; inverts `from_uint8`.   x [...] -> [...]."""
    xp = jnp if isinstance(x, jax.Array) else np
    return xp.clip(xp.round((x + 1) * 127.5), 0, 255).astype(np.uint8)


def random_labels(key, n: int, classes: int):
    """Labels without meaning, uniform on 0..classes-1.   Returns: [n] int32."""
    if n < 1 or classes < 1:
        raise ValueError(f"random_labels: n={n}, classes={classes}: both at least 1")
    return jax.random.randint(key, (n,), 0, classes, jnp.int32)


def deduplicate(data: Dataset) -> Dataset:
    """The first occurrence of each point, in the original order."""
    return Dataset(*_take(*data, _first_rows(np.asarray(data.x))))


# Batches.


def indices(n: int, key, step, size: int):
    """Which examples batch `step` holds: each epoch is a permutation of all n.

    Example j = step * size + i is number j % n of epoch j // n, so batches straddle
    epochs and a batch larger than n runs through several. Exact for step < 2**32.

    Args: n, size: Python integers, n < 2**27.   step []: may be traced.
    Returns: [size] int32 in 0..n-1.
    """
    if not (0 < n < 2**27 and 0 < size < 2**27):
        raise ValueError(f"n={n} and batch size={size} must be in 1 .. 2**27 - 1")
    # step * size overflows 32 bits, so it is summed over the bits of step from
    # exact quotients and remainders; an epoch wraps, a remainder never does.
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
    permutations = jax.vmap(
        lambda e: jax.random.permutation(jax.random.fold_in(key, e), n)
    )(epochs)
    return permutations[place // n, place % n].astype(jnp.int32)


def draw(data: Dataset, key, step, size: int, flip: bool = False) -> Dataset:
    """Batch `step`: a function of (key, step) alone, each epoch without replacement.

    Args: key, step []: may be traced.   flip: mirror images left-right half the time.
    Returns: Dataset of [size, *event] and [size] labels.
    """
    if flip and data.x.ndim != 4:
        raise ValueError(f"flip=True mirrors images; x has shape {data.x.shape}")
    rows = indices(len(data.x), key, step, size)
    x = jnp.asarray(data.x)[rows]
    if flip:
        branch = jax.random.fold_in(key, BRANCH)  # fold_in(key, step) is an epoch's
        flips = jax.random.bernoulli(jax.random.fold_in(branch, step), shape=(size,))
        x = jnp.where(flips[:, None, None, None], x[:, :, ::-1], x)
    return Dataset(x, None if data.label is None else jnp.asarray(data.label)[rows])


# Checks.


def _check_choice(
    num_examples,
    seed,
    num_held_out,
    classes,
    balanced,
    resolution,
    labels,
    num_labels,
    duplicates,
    copies,
    deduplicate,
):
    for name, value, low in (
        ("num_examples", num_examples, 1),
        ("seed", seed, 0),
        ("num_held_out", num_held_out, 0),
        ("num_labels", num_labels, 1),
        ("copies", copies, 1),
    ):
        if value is not None and (value != int(value) or value < low):
            raise ValueError(f"{name}={value} must be an integer, at least {low}")
    check_resolution(resolution)
    if labels not in LABELS:
        raise ValueError(f"labels={labels!r} must be one of {', '.join(LABELS)}")
    if (labels == "random") != (num_labels is not None):
        raise ValueError(
            f"labels={labels!r}, num_labels={num_labels}: give num_labels, the number "
            "of classes, with labels='random' and only there"
        )
    if not 0 <= duplicates < 1:
        raise ValueError(
            f"duplicates={duplicates} must be in [0, 1): the share of training images "
            "to repeat"
        )
    if classes is not None and not np.size(classes):
        raise ValueError("classes=() keeps nothing; give class numbers, or None")


# Steps of select.


def _take(x, labels, rows):
    return x[rows], None if labels is None else labels[rows]


def _keep_classes(x, labels, classes):
    """Only these classes, counted from 0 in increasing order."""
    if classes is None:
        return x, labels
    kept = np.unique(np.asarray(classes, np.int64))
    rows = np.isin(labels, kept)
    return x[rows], np.searchsorted(kept, labels[rows])


def _interleave(order, labels):
    """`order` dealt out class by class in turn, and the size of each class."""
    ranks = np.empty(len(order), np.int64)
    counts = []
    for kind in np.unique(labels):
        places = np.flatnonzero(labels[order] == kind)
        ranks[places] = np.arange(len(places))
        counts.append(len(places))
    return order[np.argsort(ranks, kind="stable")], counts


def _dataset(x, label):
    x = from_uint8(x) if x.dtype == np.uint8 else x
    return Dataset(jnp.array(x), None if label is None else jnp.array(label, jnp.int32))


def _resize(x, resolution):
    if resolution is None or x.shape[1:3] == (resolution, resolution):
        return x
    size, channels = (resolution, resolution), range(x.shape[3])
    resized = np.empty((len(x), *size, x.shape[3]), np.uint8)
    for image, out in zip(x, resized, strict=True):
        for c in channels:  # one by one: any number of channels
            plane = Image.fromarray(np.ascontiguousarray(image[..., c]))
            out[..., c] = plane.resize(size, Image.Resampling.LANCZOS)
    return resized


def _first_rows(x):
    """Of each distinct point its first occurrence, in order."""
    return np.sort(np.unique(_digests(x), return_index=True)[1])


def _digests(x):
    return [hashlib.blake2b(row.tobytes(), digest_size=16).hexdigest() for row in x]


def _fingerprint(*arrays):
    digest = hashlib.sha256()
    for array in arrays:
        if array is None:
            digest.update(b"none;")
            continue
        array = np.asarray(array)
        array = np.ascontiguousarray(array, array.dtype if array.ndim > 1 else np.int32)
        digest.update(f"{array.dtype.str}{array.shape};".encode())
        digest.update(array.data)
    return digest.hexdigest()
