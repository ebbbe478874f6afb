"""Where data come from: one function per source, which returns its pools as read.

A source is a function of its own arguments that reads files, or none. `origin` reads
images from any place that a person names.
"""

import inspect
import os
import re
from collections.abc import Callable

import jax
import numpy as np

from memsep_jax.data import archives, readers
from memsep_jax.data.archives import (
    cifar10,
    fashion_folder,
    fashion_mnist,
    idx,
    is_idx,
    latents,
    npz,
    read_arrays,
    tfds,
)
from memsep_jax.data.arrays import (
    DataError,
    Source,
    check_labels,
    check_source,
    joined,
    listed,
    of_numpy,
    pixels,
)
from memsep_jax.keys import BRANCH
from memsep_jax.mixture import LAWS, Law, sample

MAX_HELD_OUT = 10_000  # as many as the test split of CIFAR-10 has
MOST_NUMBERS = 2**31  # of a mixture: 8 gigabytes as float32
ROLES = {  # names of arrays, of ours and of other programs, by what they are taken for
    "samples": ("samples", "images"),
    "train": ("train_images", "images"),
    "held_out": ("test_images", "images"),
}
LABELS = {"samples": "labels", "train": "train_labels", "held_out": "test_labels"}
PART = re.compile(r"(?<=.)\[(\d*):(\d*)\]$")  # [a:b] behind an origin of images
NUMBERED = re.compile(r"arr_\d+")  # what np.savez calls arrays without a name


def digits() -> Source:
    """scikit-learn's 1,797 handwritten digits: uint8 [n, 8, 8, 1], labels 0..9."""
    from sklearn.datasets import load_digits

    read = load_digits()
    # Their 17 levels, 0 .. 16, as the pixels 0 .. 255 of all other images.
    images = np.round(read.images[..., None] * (255 / 16)).astype(np.uint8)
    return Source(images, read.target.astype(np.int32))


def mixture_truth(
    k: int = 8,
    d: int = 32,
    scale: float = 2.0,
    truth_seed: int = 0,
    law: str = "separated",
    **shape,
) -> Law:
    """The law that the source `mixture` draws from: mixture.LAWS[law].

    Args: shape: the law's other arguments (rank, noise, dof, width); None: its own.
    """
    if law not in LAWS:
        raise ValueError(f"law={law!r} is unknown; known: {', '.join(LAWS)}")
    _check_numbers(k, d)
    given = {name: value for name, value in shape.items() if value is not None}
    # After key, k, d and scale, which all laws take.
    taken = list(inspect.signature(LAWS[law]).parameters)[4:]
    if not given.keys() <= set(taken):
        raise ValueError(
            f"law={law!r} does not take {', '.join(sorted(given.keys() - set(taken)))}"
            f"; beside k, d and scale it takes {', '.join(taken) or 'nothing'}"
        )
    return LAWS[law](jax.random.key(truth_seed), k, d, scale, **given)


def mixture(
    k: int = 8,
    d: int = 32,
    scale: float = 2.0,
    truth_seed: int = 0,
    size: int = 100_000,
    law: str = "separated",
    rank: int | None = None,
    noise: float | None = None,
    dof: float | None = None,
    width: float | None = None,
) -> Source:
    """`size` draws of a known law (mixture.LAWS), and 10,000 more as its test split."""
    if size < 1:
        raise ValueError(f"mixture: size={size} draws: at least 1")
    _check_numbers(k, d, size)
    shape = dict(rank=rank, noise=noise, dof=dof, width=width)
    truth = mixture_truth(k, d, scale, truth_seed, law, **shape)
    # Not the key of the law itself, from which its means were drawn.
    key = jax.random.fold_in(jax.random.key(truth_seed), BRANCH)
    train_key, test_key = jax.random.split(key)
    draw = jax.jit(sample, static_argnums=2)
    draws = np.asarray(draw(train_key, truth, size), np.float32)
    fresh = np.asarray(draw(test_key, truth, MAX_HELD_OUT), np.float32)
    return Source(draws, None, fresh, None)


def _check_numbers(k, d, size=0):
    if max(k, size) * d > MOST_NUMBERS:
        draws = f" and {size:,} draws" if size else ""
        raise ValueError(
            f"mixture: k={k} components{draws} of d={d} are more than "
            f"{MOST_NUMBERS:,} numbers: lower k or d"
        )


def folder(
    path,
    resolution: int | None = None,
    skip_bad: bool = False,
    crop: str = "squeeze",
    exif: bool = True,
    alpha: str = "white",
    stream: bool = False,
) -> Source:
    """All images below a folder, or in a zip of one: uint8 [n, h, w, 3].

    `readers.read` reads all formats of Pillow, as RGB, in the order of torchvision's
    ImageFolder, with the labels of the folders or of dataset.json.

    Args:
      resolution: of a square that each image is resized to (Lanczos).
      skip_bad: leave out what cannot be read, with a note.
      crop: "squeeze", or "center": the largest square in the middle first.
      exif: turn images as the camera was held.   alpha: "white" is laid below
        transparent pixels, or "drop": they are taken as opaque.
      stream: the images lie on disk, see `readers.read`.
    Raises:
      DataError: no image, or damaged ones.   ValueError: sizes differ.
    """
    path = os.path.expanduser(path)
    how = readers.Preparation(resolution, crop, exif, alpha)
    pools = readers.read(path, how, skip_bad, stream=stream)
    return pools._replace(notes=pools.notes + check_source(pools, str(path)))


SOURCES: dict[str, Callable[..., Source]] = {
    "digits": digits,
    "mixture": mixture,
    "npz": npz,
    "latents": latents,
    "folder": folder,
    "idx": idx,
    "fashion_mnist": fashion_mnist,
    "cifar10": cifar10,
    "tfds": tfds,
}
REMOTE = ("fashion_mnist", "cifar10", "tfds")  # those that may have to be fetched


def source(name: str, **source_args) -> Source:
    """The pools of the source called `name`."""
    if name not in SOURCES:
        raise ValueError(f"name={name!r} is unknown; known: {', '.join(SOURCES)}")
    return SOURCES[name](**source_args)


def at_hand(name: str, **source_args) -> Source:
    """As `source`, but fetches, prepares and writes nothing, for a dry run.

    Raises: DataError, also where a set of TensorFlow Datasets is not here yet.
    """
    here = name == "fashion_mnist" and fashion_folder(source_args.get("path"))
    if name in REMOTE and not here:
        return archives.decoded(**{"dataset": name} | source_args)
    return source(name, **source_args)


def second(mix_from: str, read=source) -> Source:
    """The pools of a source to mix in: an .npz file, or one that needs no argument.

    Args: read, `source` or `at_hand`.
    """
    if mix_from.endswith(".npz"):
        return npz(mix_from)
    if mix_from not in _bare():
        raise ValueError(
            f"mix_from={mix_from!r} must be the path of an .npz file or one of "
            f"{', '.join(_bare())}"
        )
    return read(mix_from)


def _bare():
    """The sources that need no argument."""
    return [
        name
        for name, read in SOURCES.items()
        if all(
            p.default is not p.empty
            for p in inspect.signature(read).parameters.values()
        )
    ]


# Images of any origin.


def images(where: str, role: str = "train", **arguments):
    """The images of `origin`, uint8 [n, h, w, c], and their labels [n] or None."""
    return origin(where, role, **arguments)[:2]


def origin(
    where: str,
    role: str = "train",
    resolution: int | None = None,
    skip_bad: bool = False,
    **preparation,
) -> Source:
    """Images of any origin, with their labels, files and notes where they have some.

    Args:
      where: a folder of images, or a zip of one; an .npz or .npy of uint8, or of floats
        in [-1, 1], [n, h, w, c], [n, h, w] or one [h, w, 3]; what `idx` reads, a file
        by the end idx3-ubyte of its name; the name of a source, or of a set of
        TensorFlow Datasets. [a:b] at its end selects those images.
      role: "samples", "train" or "held_out": chooses the array of an .npz (ROLES, its
        only one, or all that np.savez numbered) and the split of a set.
      resolution, skip_bad, crop, exif, alpha: of a folder or a zip, as in `folder`.
    Returns:
      uint8 [n, h, w, c] images, labels where they have some, and no test split.
    Raises:
      DataError: missing, damaged, or no images.   ValueError: sizes that differ.
    """
    # A folder may itself be called images[0:10].
    part = None if os.path.exists(os.path.expanduser(where)) else PART.search(where)
    whole = PART.sub("", where) if part else where
    result = _whole(whole, role, part is not None, resolution, skip_bad, **preparation)
    if part is None:
        return result
    rows = slice(*(int(end) if end else None for end in part.groups()))
    if not len(result.images[rows]):
        raise ValueError(f"{where} selects none of {len(result.images)} images")
    labels, files = (
        None if each is None else each[rows] for each in (result.labels, result.files)
    )
    return result._replace(images=result.images[rows], labels=labels, files=files)


def is_files(where: str) -> bool:
    """Whether `origin` reads image files: those of a folder, or of a zip of one."""
    path = os.path.expanduser(where)
    path = path if os.path.exists(path) else PART.sub("", path)
    # os.path.isdir, since Path.is_dir raises where a text is too long to be a path.
    return (os.path.isdir(path) and not is_idx(path)) or path.lower().endswith(".zip")


def of_array(x, where: str) -> Source:
    """Images that are in memory already, as an .npy file of them would be read.

    Args: x, whatever numpy takes for an array; where, its name in messages.
    Raises: DataError, as `origin` of such a file.
    """
    images, notes = pixels(of_numpy(x, where), where)
    return Source(images, notes=notes)


def again(where: str, files, **preparation) -> np.ndarray:
    """Some files of `origin(where)`, prepared in another way: uint8 [k, h, w, 3].

    Args: files, [k] paths, as its `files` has them.
    Raises: as `folder`.
    """
    path = os.path.expanduser(where)
    path = path if os.path.exists(path) else PART.sub("", path)
    how = readers.Preparation(**preparation)
    return np.asarray(readers.read(path, how, skip_bad=True, only=files).images)


def _whole(where, role, cut, resolution, skip_bad, **preparation):
    """`origin` without [a:b].   Args: cut, whether the caller selects [a:b] later."""
    path = os.path.expanduser(where)
    if is_files(where):
        return folder(path, resolution, skip_bad, **preparation)
    if os.path.splitext(path)[1].lower() in (".npz", ".npy"):
        return _of_role(path, role)
    if os.path.exists(path) and not is_idx(path):
        raise DataError(
            f"{where} is a file of a kind that is not read: give a folder of images, a "
            "zip of one, an .npz, an .npy or an ...-idx3-ubyte"
        )
    try:
        if os.path.exists(path):
            pools = idx(path)
        else:
            pools = SOURCES[where]() if where in _bare() else tfds(where)
    except DataError:
        raise
    except ValueError as error:
        raise DataError(
            f"{where}: no such folder of images, no .zip, .npz, .npy or idx file, no "
            f"data set of that name ({error})"
        ) from error
    x, label = pools[2:4] if role == "held_out" else pools[:2]
    # [a:b] of the training set, or one file: a person chose these to be held out.
    if x is None and (cut or os.path.isfile(path)):
        x, label = pools[:2]
    if x is None:
        raise DataError(f"{where} has no test split: give images that were held out")
    x, notes = pixels(x, where)
    return Source(x, label, notes=notes)


def _of_role(path, role):
    """The images that a role chooses from an array file, and their labels."""
    named, label_name = ROLES[role], LABELS[role]

    def chosen(names):
        known = [name for name in named if name in names][:1]
        numbered = [name for name in names if NUMBERED.fullmatch(name)]
        if known:
            return known + [name for name in (label_name,) if name in names]
        if numbered and len(numbered) == len(names):
            return numbered
        return names if len(names) == 1 else []

    arrays, names = read_arrays(path, chosen)
    if not set(arrays) - {label_name}:
        raise DataError(
            f"{path}: none of {', '.join(named)} among its {len(names):,} arrays "
            f"{listed(names)}; write it again with one of those names"
        )
    label = arrays.pop(label_name, None)
    if all(map(NUMBERED.fullmatch, arrays)):
        x, label = joined(arrays, path)
        name = listed(arrays, 3)
    else:
        name, x = next(iter(arrays.items()))
    x, notes = pixels(x, f"{path}: {name}")
    if len(arrays) > 1 and label is None:
        notes += (f"{path}: {name} were joined into {len(x):,} images",)
    check_labels(label, len(x), f"{path}: {label_name}")
    return Source(x, label, notes=notes)
