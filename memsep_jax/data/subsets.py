"""From the pools of a source to what a run trains on: choose, label, repeat, split.

`select` is pure in the arrays; `splits` reads a source first.
"""

import inspect
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from PIL import Image

from memsep_jax.data.arrays import (
    DataError,
    Rows,
    Source,
    check_source,
    digests,
    fingerprint,
    from_uint8,
    listed,
)
from memsep_jax.data.batches import Dataset
from memsep_jax.data.readers import Preparation, check_preparation
from memsep_jax.data.sources import MAX_HELD_OUT, second, source
from memsep_jax.keys import BRANCH

LABELS = ("none", "true", "random", "unique")
# Of a source without a test split: 297 of the 1,797 digits, which leaves 1,500.
HELD_OUT_SHARE = 0.165


class Splits(NamedTuple):
    """What a run trains on, what it never sees, and how to recognize both."""

    train: Dataset
    held_out: Dataset | None
    fingerprint: str  # SHA-256 of both
    num_distinct: int  # different points in train
    pixels: bool = True  # whether points [h, w, c] are images
    files: np.ndarray | None = None  # [n] the file of each training image
    classes: tuple[str, ...] | None = None  # the folder of each true label
    notes: tuple[str, ...] = ()  # what a person should know of the files


def splits(
    name: str,
    num_examples: int | None = None,
    seed: int = 0,
    *,
    read=source,
    **arguments,
) -> Splits:
    """Reads a source, then selects from it; it takes the keywords of both.

    Args:
      mix_from: the name of a source that needs no argument, or the path of an .npz.
      read: `sources.source`, or `sources.at_hand`.
    """
    choice = {key: arguments.pop(key) for key in set(CHOICE) & set(arguments)}
    # Checked before anything is read or fetched, which may take minutes.
    given = dict(num_examples=num_examples, seed=seed) | CHOICE | choice
    for check in (_check_counts, _check_choice):
        check(*(given[name] for name in inspect.signature(check).parameters))
    if choice.get("mix"):
        choice["mix_from"] = second(choice["mix_from"], read)
    if name == "folder":  # its images stack only once they are of one size
        arguments["resolution"] = choice.get("resolution")
    return select(read(name, **arguments), num_examples, seed, **choice)


def load(
    name: str, num_examples: int | None = None, seed: int = 0, **arguments
) -> Dataset:
    """The training set of `splits`, with the same keywords."""
    result = splits(name, num_examples, seed, **arguments)
    for note in result.notes:
        logging.warning("%s", note)
    return result.train


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
    skip: int = 0,
    mix: float = 0.0,
    mix_from: Source | None = None,
) -> Splits:
    """Choose a training subset and a held-out set that never overlaps it.

    Subsets of one seed are nested: the first m of n are the subset of size m. The
    held-out set is the start of the test split, or a fixed cut of the pool; it is the
    same for every seed and size.

    The points of a second source are spread evenly: for every m, floor(mix * m) of the
    first m points come from it. Its images are resized to those of the first source,
    and grey ones get its colours; class c of either source is class c.

    Args:
      source: pools.   num_examples: of the training set, before copies; None: all.
      num_held_out: None: at most 10,000 of a test split, else 16.5 % of the pool.
      classes: class numbers to keep; true labels then count them from 0.
      balanced: the same number of each class.   resolution: resize images to it.
      labels: "none", "true", "random" (`num_labels` classes), "unique" (0..n-1).
      duplicates: share of the training images that appear `copies` more times.
      deduplicate: at the end, keep each distinct point once, with its first label.
      skip: how many points to leave out at the start of the seed's order, so that
        skip=num_examples gives a disjoint twin of skip=0.
      mix: share of the points, held-out ones too, that come from `mix_from`; if
        balanced, share of the rounds of one point per class.
    Raises:
      ValueError: an argument breaks its rule.   DataError: the data cannot serve.
    """
    _check_counts(num_examples, seed, num_held_out, num_labels, copies, skip)
    _check_choice(classes, resolution, labels, num_labels, duplicates, mix, mix_from)
    how = dict(
        num_held_out=num_held_out, classes=classes, balanced=balanced, labels=labels
    )
    cuts = [_cut(source, "the source", resolution=resolution, **how)]
    if mix and isinstance(source.images, Rows):
        raise ValueError(
            f"mix={mix} of data that stay on disk: stream=False, or write one .npz"
        )
    if mix:
        cuts.append(_cut(mix_from, "mix_from", like=cuts[0].images, **how))
    # Against the whole pool, not the subset: the same set for every seed and size.
    seen = {digest for cut in cuts for digest in digests(cut.images)}
    cuts = [_unseen(cut, seen) for cut in cuts]

    # Only the order depends on the seed, and a subset is its beginning: so subsets of
    # one seed are nested.
    orders, block = _orders(cuts, seed, balanced)
    pool, pool_labels, order = _mixed([c[:2] for c in cuts], orders, mix, block)
    n = len(order) - skip if num_examples is None else num_examples
    _check_number(n, skip, len(order), block if balanced else None, mix, num_labels)
    x, true_labels = _take(pool, pool_labels, order[skip : skip + n])
    tests = [c[2:4] for c in cuts]
    held, held_labels, rows = _mixed(tests, [np.arange(len(t[0])) for t in tests], mix)
    limit = MAX_HELD_OUT if num_held_out is None else num_held_out
    held, held_labels = _take(held, held_labels, rows[:limit] if mix else rows)
    label, held_label = None, None
    if labels == "true":
        label, held_label = true_labels, held_labels
    elif labels == "unique":
        label = np.arange(n)
    elif num_labels is not None:
        label, held_label = _drawn(seed, skip, n, len(held), num_labels)
    # round: 0.29 * 100 is 28.999999999999996
    repeated = np.arange(math.floor(round(duplicates * n, 6)))
    rows = np.concatenate([np.arange(n), np.tile(repeated, copies)])
    x, label = _take(x, label, rows)
    if deduplicate:
        x, label = _take(x, label, _first_rows(x))
    known, files, names = digests(x), None, source.classes
    if source.files is not None:  # by content: rows were chosen, mixed and repeated
        where = dict(zip(digests(source.images), source.files, strict=True))
        files = np.array([where.get(one, "") for one in known])
    if names is not None and classes is not None:
        names = tuple(names[i] for i in np.unique(np.asarray(classes, np.int64)))
    return Splits(
        _dataset(x, label),
        _dataset(np.asarray(held), held_label) if len(held) else None,
        fingerprint(x, label, held, held_label),
        len(set(known)),
        source.pixels,
        files,
        names if labels == "true" else None,
        source.notes,
    )


CHOICE = select.__kwdefaults__ or {}  # keywords of select; the rest are the source's


def random_labels(key, n: int, classes: int):
    """Labels without meaning, uniform on 0..classes-1.   Returns: [n] int32."""
    if n < 1 or classes < 1:
        raise ValueError(f"random_labels: n={n}, classes={classes}: both at least 1")
    return jax.random.randint(key, (n,), 0, classes, jnp.int32)


def read(data: Dataset) -> Dataset:
    """The data set in memory: points that stay on disk are read and converted."""
    x, label = data
    return _dataset(np.asarray(x), label) if isinstance(x, Rows) else data


def deduplicate(data: Dataset) -> Dataset:
    """The first occurrence of each point, in the original order."""
    return Dataset(*_take(*data, _first_rows(np.asarray(data.x))))


# Checks.


def _check_counts(num_examples, seed, num_held_out, num_labels, copies, skip):
    for name, value, low in (
        ("num_examples", num_examples, 1),
        ("seed", seed, 0),
        ("num_held_out", num_held_out, 0),
        ("num_labels", num_labels, 1),
        ("copies", copies, 1),
        ("skip", skip, 0),
    ):
        if value is not None and (value != int(value) or value < low):
            raise ValueError(f"{name}={value} must be an integer, at least {low}")


def _check_choice(classes, resolution, labels, num_labels, duplicates, mix, mix_from):
    check_preparation(Preparation(resolution))
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
    if not 0 <= mix <= 1:
        raise ValueError(
            f"mix={mix} must be in [0, 1]: the share of images from mix_from"
        )
    if mix and mix_from is None:
        raise ValueError(f"mix={mix} of what? give mix_from, the second source")
    if classes is not None and not np.size(classes):
        raise ValueError("classes=() keeps nothing; give class numbers, or None")


def _check_number(n, skip, available, block, mix, num_labels):
    """Refuses n points after skip of the available ones.   Args: block, if balanced."""
    after = f" after skip={skip}" if skip else ""
    if block and (n % block or skip % block or skip + n > available):
        raise ValueError(
            f"num_examples={n}{after} must be a multiple of the {block} classes, at "
            f"most {available // block} of each, to be balanced"
        )
    if n < 1 or skip + n > available:
        raise ValueError(
            f"num_examples={n}{after}, but the pool has {available} (after held-out "
            f"images and classes{f', at mix={mix}' if mix else ''}); lower "
            "num_examples, skip or num_held_out"
        )
    if num_labels is not None and num_labels > n:
        raise ValueError(
            f"num_labels={num_labels} classes of num_examples={n}: some would have no "
            "image; lower num_labels to at most that, or raise num_examples"
        )


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


def _cut(
    source, what, num_held_out, classes, balanced, labels, resolution=None, like=None
):
    """A source as a pool to train on and a held-out set, of the classes and the size.

    Args: what, its name in messages; like, images whose size and channels it takes.
    """
    check_source(source, what)
    tested = source.test_images is not None
    labelled = source.labels is not None
    if tested and (classes is not None or labels == "true"):
        labelled &= source.test_labels is not None
    if not labelled and labels == "true":
        raise DataError(f"labels='true': {what} lacks labels; take 'none' or others")
    if not labelled and (classes is not None or balanced):
        raise ValueError(f"classes and balanced need labels, which {what} lacks")
    if resolution is not None and source.images.dtype != np.uint8:
        raise ValueError(f"resolution={resolution} resizes uint8 images only")

    if classes is not None and source.labels is not None:
        absent = np.setdiff1d(classes, source.labels).tolist()
        if absent:
            raise ValueError(
                f"classes: {listed(absent)} not among the labels "
                f"{listed(np.unique(source.labels))}"
            )

    pool, pool_labels = _keep_classes(*source[:2], classes)
    if tested:
        held, held_labels = _keep_classes(*source[2:4], classes)
        count = min(len(held), MAX_HELD_OUT) if num_held_out is None else num_held_out
        if count > len(held):
            raise ValueError(
                f"num_held_out={count}, but the test split has {len(held)}; lower it"
            )
        held, held_labels = _take(held, held_labels, slice(count))
    else:  # cut by a fixed seed: runs of all seeds and sizes are held against one set
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
    if like is not None:
        pool, held = _alike(pool, like), _alike(held, like)
    elif resolution is not None:
        size = resolution, resolution
        pool, held = _resize(pool, size), _resize(held, size)
    return Source(pool, pool_labels, held, held_labels, source.pixels)


def _unseen(cut, seen):
    """The cut without the held-out points that equal a point of the pool."""
    fresh = [digest not in seen for digest in digests(cut.test_images)]
    if all(fresh):
        return cut
    logging.info("%d held-out equal a training one: removed", fresh.count(False))
    held = _take(cut.test_images, cut.test_labels, np.array(fresh, bool))
    return Source(*cut[:2], *held, cut.pixels)


def _orders(cuts, seed, balanced):
    """A random order of each pool, and the number of points per round if balanced."""
    rng, orders, block = np.random.default_rng(seed), [], 1
    for cut in cuts:
        orders.append(rng.permutation(len(cut.images)))
        if balanced:
            orders[-1], block = _interleave(orders[-1], cut.labels)
    if balanced:
        first, *others = [np.unique(cut.labels).tolist() for cut in cuts]
        if others and others != [first]:
            raise ValueError(
                "balanced needs the same classes in both sources: "
                f"{listed(first)} in the first, {listed(others[0])} in mix_from; "
                "give classes that both have"
            )
    return orders, block


def _drawn(seed, skip, n, held_out, num_labels):
    """Random labels of n points after skip, and of the held-out ones or None."""
    # Not the key itself: a run of the same seed splits that for its weights.
    key = jax.random.fold_in(jax.random.key(seed), BRANCH)
    key, held_key = jax.random.split(key)
    label = np.asarray(random_labels(key, skip + n, num_labels))[skip:]
    if not held_out:
        return label, None
    return label, np.asarray(random_labels(held_key, held_out, num_labels))


def _interleave(order, labels):
    """`order` dealt class by class in full rounds, and the length of a round."""
    ranks = np.empty(len(order), np.int64)
    counts = []
    # The rank of each point within its class: sorted by it, the order has one point of
    # each class in turn.
    for kind in np.unique(labels):
        places = np.flatnonzero(labels[order] == kind)
        ranks[places] = np.arange(len(places))
        counts.append(len(places))
    dealt = order[np.argsort(ranks, kind="stable")]
    # Full rounds only: where a class is used up, any prefix would be out of balance.
    return dealt[: min(counts) * len(counts)], len(counts)


def _mixed(parts, orders, share, block=1):
    """Points and labels of one or two parts together, and an order of both.

    For every k, floor(share * k) of its first k blocks are of the second part. It ends
    where one of the parts is used up.
    """
    if len(parts) == 1:
        return *parts[0], orders[0]
    x = np.concatenate([part[0] for part in parts])
    labels = [part[1] for part in parts]
    label = None if any(its is None for its in labels) else np.concatenate(labels)
    first, second = orders[0], orders[1] + len(parts[0][0])
    first, second = first.reshape(-1, block), second.reshape(-1, block)
    # round: 0.29 * 100 is 28.999999999999996
    k = np.arange(len(first) + len(second) + 1)
    # For every k alike, so that nested subsets have the same share.
    taken = np.floor(np.round(share * k, 6)).astype(int)
    length = np.flatnonzero((taken <= len(second)) & (k - taken <= len(first)))[-1]
    is_second = np.diff(taken[: length + 1]) == 1
    order = np.empty((length, block), np.int64)
    order[is_second] = second[: is_second.sum()]
    order[~is_second] = first[: length - is_second.sum()]
    return x, label, order.reshape(-1)


def _dataset(x, label):
    if isinstance(x, Rows):
        return Dataset(x, None if label is None else np.asarray(label, np.int32))
    x = from_uint8(x) if x.dtype == np.uint8 else x
    return Dataset(jnp.array(x), None if label is None else jnp.array(label, jnp.int32))


def _alike(x, like):
    """Images in the size of others; grey ones take their number of channels."""
    if x.dtype == like.dtype == np.uint8:
        x = _resize(x, like.shape[1:3])
        if x.shape[3] == 1:
            x = np.repeat(x, like.shape[3], 3)
    if (x.dtype, x.shape[1:]) != (like.dtype, like.shape[1:]):
        raise ValueError(
            f"mix_from has points {x.dtype}{x.shape[1:]}, the source "
            f"{like.dtype}{like.shape[1:]}: only uint8 images are resized, and only "
            "grey ones can become colour; convert one of them"
        )
    return x


def _resize(x, size):
    if x.shape[1:3] == size:
        return x
    if isinstance(x, Rows):
        raise ValueError(
            f"resolution={size[0]} of images {x.shape[1:3]} that stay on disk: resize "
            "them where the .npz is written, or stream=False"
        )
    # By Lanczos, as the smaller sets of Gu 2023 were made.
    resized = np.empty((len(x), *size, x.shape[3]), np.uint8)
    for image, out in zip(x, resized, strict=True):
        for c in range(x.shape[3]):  # one by one: any number of channels
            plane = Image.fromarray(np.ascontiguousarray(image[..., c]))
            out[..., c] = plane.resize(size[::-1], Image.Resampling.LANCZOS)
    return resized


def _first_rows(x):
    """The row of the first occurrence of each distinct point, in order."""
    return np.sort(np.unique(digests(x), return_index=True)[1])
