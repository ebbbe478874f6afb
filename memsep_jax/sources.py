"""Where data come from: the pools of a source, decoded once and checked.

A source is a function of its own arguments that reads files, or none, and returns
arrays. Nothing is unpickled, no archive is extracted, and TensorFlow is never needed.
"""

import hashlib
import inspect
import mmap
import os
import re
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from absl import logging
from PIL import Image

from memsep_jax import readers
from memsep_jax.mixture import LAWS, Law, sample
from memsep_jax.readers import DataError, Preparation, listed

BRANCH = 2**32 - 1  # fold_in with it: no split, step or epoch of a key comes so far
MAX_HELD_OUT = 10_000
MOST_NUMBERS = 2**31  # of a mixture: 8 gigabytes
KEYS = ("train_images", "train_labels", "test_images", "test_labels")
ROLES = {  # names of arrays, of ours and of other programs, by what they are taken for
    "samples": ("samples", "images"),
    "train": ("train_images", "images"),
    "held_out": ("test_images", "images"),
}
LABELS = {"samples": "labels", "train": "train_labels", "held_out": "test_labels"}
PART = re.compile(r"(?<=.)\[(\d*):(\d*)\]$")  # [a:b] behind an origin of images
NUMBERED = re.compile(r"arr_\d+")  # what np.savez calls arrays without a name

DECODED = "memsep_jax.npz"  # beside a prepared set: its images and labels
CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR_BYTES = 170_052_171
CIFAR_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
CIFAR_UNPACKED_BYTES = 256 * 2**20  # the true archive holds 184 million
CIFAR_RECORD = 1 + 32 * 32 * 3  # a label, then the red, green and blue planes
CIFAR_TRAIN = tuple(f"cifar-10-batches-bin/data_batch_{i}.bin" for i in range(1, 6))
CIFAR_TEST = ("cifar-10-batches-bin/test_batch.bin",)
CIFAR_NAMES = ["airplane", "automobile", "bird", "cat", "deer"]
CIFAR_NAMES += ["dog", "frog", "horse", "ship", "truck"]


class Rows:
    """Rows of an array that stays on disk, in an order: read where they are asked for.

    rows[i], of a slice or of integers [k], are Rows too; np.asarray(rows) reads them.
    """

    def __init__(self, array, rows=None):
        self.array, self.dtype, self.ndim = array, array.dtype, array.ndim
        self.rows = np.arange(len(array)) if rows is None else rows
        self.shape = len(self.rows), *array.shape[1:]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return Rows(self.array, self.rows[index])

    def __iter__(self):
        return (self.array[row] for row in self.rows)

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.array[self.rows], dtype)


class Source(NamedTuple):
    """The pools of a source as read, before any choice."""

    images: np.ndarray | Rows  # uint8 or float32 [n, h, w, c], or float32 [n, d]
    labels: np.ndarray | None = None  # [n] integer
    test_images: np.ndarray | Rows | None = None
    test_labels: np.ndarray | None = None
    pixels: bool = True  # [n, h, w, c] are images; else latents, of any values
    files: np.ndarray | None = None  # [n] paths, of a folder or an archive
    classes: tuple[str, ...] | None = None  # the folder of each label
    notes: tuple[str, ...] = ()  # what a person should know, a sentence each
    # By field of readers.Preparation: files that another choice would change.
    altered: dict[str, np.ndarray] | None = None


def digits() -> Source:
    """scikit-learn's 1,797 handwritten digits: uint8 [n, 8, 8, 1], labels 0..9."""
    from sklearn.datasets import load_digits

    read = load_digits()
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
    taken = list(inspect.signature(LAWS[law]).parameters)[4:]
    if not given.keys() <= set(taken):
        raise ValueError(
            f"law={law!r} does not take {', '.join(sorted(given.keys() - set(taken)))}"
            f"; it takes {', '.join(taken) or 'nothing'} besides k, d and scale"
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
    """`size` draws of a known law (mixture.LAWS), and 10,000 fresh ones as its test."""
    if size < 1:
        raise ValueError(f"mixture: size={size} draws: at least 1")
    _check_numbers(k, d, size)
    shape = dict(rank=rank, noise=noise, dof=dof, width=width)
    truth = mixture_truth(k, d, scale, truth_seed, law, **shape)
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


def npz(path, stream: bool = False) -> Source:
    """The .npz layout: train_images and, optional, train_labels, test_images, ...

    Images are uint8 or float32 in [-1, 1], [n, h, w, c]; vectors float32 [n, d].

    Args: stream: they stay on disk, as Rows of a file that np.savez wrote.
    Raises:
      DataError: the file is missing, damaged, or holds anything else.
    """
    return _pools(path, stream, pixels=True)


def latents(path, stream: bool = False) -> Source:
    """An .npz as `npz`, of what an autoencoder made of images: float32 [n, h, w, c].

    They may have any finite values; a spread near `prediction.sigma_data` is best.
    """
    return _pools(path, stream, pixels=False)


def _pools(path, stream, pixels):
    path = os.path.expanduser(path)

    def chosen(names):
        return [key for key in KEYS[stream :: 2 if stream else 1] if key in names]

    found, names = _arrays(path, chosen)
    if stream:
        found |= {key: Rows(_mapped(path, key)) for key in KEYS[::2] if key in names}
    if "train_images" not in found:
        raise DataError(
            f"{path}: not a readable .npz (no 'train_images' among {listed(names)}); "
            "write it again by np.savez(path, train_images=...)"
        )
    pools = Source(*(found.get(key) for key in KEYS), pixels)
    if not pixels and (pools.images.dtype, pools.images.ndim) != (np.float32, 4):
        raise DataError(
            f"{path}: train_images {pools.images.dtype}{pools.images.shape} are no "
            "latents: float32 [n, h, w, c]; name=npz reads images and vectors"
        )
    return pools._replace(notes=check_source(pools, str(path)))


def _mapped(path, name):
    """An array of an .npz as a map of the file: nothing of it is read.

    Raises: DataError where it is compressed, or of no plain numbers.
    """
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            member = archive.getinfo(f"{name}.npy")
            if member.compress_type != zipfile.ZIP_STORED:
                raise ValueError("it is compressed")
            # A member begins with 30 bytes, the last four the lengths of two texts.
            file.seek(member.header_offset + 26)
            texts = sum(struct.unpack("<HH", file.read(4)))
            file.seek(member.header_offset + 30 + texts)
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError("it is of no plain numbers")
            shape, by_columns, dtype = np.lib.format.read_array_header_1_0(file)
            if by_columns or dtype.hasobject or not dtype.isnative:
                raise ValueError(
                    "it is of objects, stored by columns, or in the byte order of "
                    "another machine"
                )
            whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            return np.ndarray(shape, dtype, whole, file.tell())
    except (OSError, TypeError, ValueError, OverflowError, struct.error) as error:
        raise DataError(
            f"{path}: {name} cannot be read in place, as stream=True does "
            f"({error}); write it again by np.savez, not np.savez_compressed"
        ) from error


def _arrays(path, choose):
    """(arrays of an .npz by name, all its names); an .npy is one called "array".

    Args: choose, names -> those to read.
    """
    try:
        # Opened here: np.load leaves the file of a damaged .npz open.
        with open(path, "rb") as file:
            read = np.load(file, allow_pickle=False)
            read = {"array": read} if isinstance(read, np.ndarray) else read
            names = sorted(read)
            return {name: readers.native(read[name]) for name in choose(names)}, names
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; give the path of an .npz") from None
    except Exception as error:  # numpy, zipfile and zlib each fail in their own way
        way_out = "write it again by np.savez(path, train_images=...)"
        if "pickle" in str(error) or "Object arrays" in str(error):
            way_out = "allow_pickle is never used: save plain uint8 or float32 arrays"
        raise DataError(f"{path}: not a readable .npz ({error}); {way_out}") from error


def folder(
    path,
    resolution: int | None = None,
    skip_bad: bool = False,
    crop: str = "squeeze",
    exif: bool = True,
    alpha: str = "white",
) -> Source:
    """All images below a folder, or in a zip of one: uint8 [n, h, w, 3].

    As `readers.read` reads them: everything that Pillow knows, as RGB, in the order of
    torchvision's ImageFolder, with the labels of its folders or of dataset.json.

    Args:
      resolution: of a square that each image is resized to (Lanczos).
      skip_bad: leave out what cannot be read, with a note.
      crop: "squeeze", or "center": the largest square in the middle first.
      exif: turn images as the camera was held.   alpha: "white", what is below
        transparent pixels, or "drop".
    Raises:
      DataError: no image, or damaged ones.   ValueError: sizes differ.
    """
    path = os.path.expanduser(path)
    how = Preparation(resolution, crop, exif, alpha)
    found = readers.read(path, how, skip_bad)
    read = Source(
        found.images,
        found.labels,
        files=found.files,
        classes=found.classes,
        altered=found.altered,
    )
    return read._replace(notes=found.notes + check_source(read, str(path)))


def cifar10(data_dir=None) -> Source:
    """CIFAR-10 through TensorFlow Datasets (without TensorFlow): 50,000 + 10,000.

    A local archive `<data_dir>/downloads/manual/cifar-10-binary.tar.gz` is taken
    first. The directory it leaves is the stock `cifar10/3.0.2`, as array_record.

    Raises:
      DataError: no archive and no network, or an archive that is not the true one.
    """
    import tensorflow_datasets
    from tensorflow_datasets.image_classification import cifar

    root = _data_dir(data_dir)
    archive = root / "downloads" / "manual" / "cifar-10-binary.tar.gz"

    with tensorflow_datasets.core.registered.skip_registration():

        class Cifar10(cifar.Cifar10):
            """The stock builder, its archive read by Python's tarfile."""

            url_infos = cifar.Cifar10.url_infos  # the digests of what is fetched

            def _split_generators(self, dl_manager):
                path = archive if archive.exists() else dl_manager.download(CIFAR_URL)
                batches = _cifar_batches(Path(path))
                self.info.features["label"].names = CIFAR_NAMES
                return {
                    "train": self._generate_examples("train_", batches[:5]),
                    "test": self._generate_examples("test_", batches[5:]),
                }

            def _generate_examples(self, prefix, batches):
                records = np.concatenate(batches)
                planes = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
                for i, image in enumerate(planes):
                    example = {"id": f"{prefix}{i:05d}", "label": int(records[i, 0])}
                    yield i, example | {"image": Image.fromarray(image)}

    builder = Cifar10(data_dir=root, file_format="array_record")
    return _prepared(
        builder,
        f"put {CIFAR_URL} ({CIFAR_BYTES} bytes, SHA-256 {CIFAR_SHA256}) at {archive}",
    )


def tfds(dataset: str, data_dir=None, stream: bool = False) -> Source:
    """An image set of TensorFlow Datasets that is, or can be, prepared without TF.

    Its array_record is decoded once, beside it. Its test split, or else its validation
    split, is what is held out.

    Args: stream: the images stay on disk.
    Raises:
      DataError: not prepared as array_record, and cannot be prepared here.
    """
    import tensorflow_datasets

    # "namespace:name" would fetch and run code from elsewhere.
    if not re.fullmatch(r"\w+(/[\w.\-]+)*(:\d+\.\d+\.\d+)?", dataset):
        raise ValueError(f"tfds: dataset={dataset!r} must be name[/config][:version]")
    root = _data_dir(data_dir)
    try:
        builder = tensorflow_datasets.builder(
            dataset, data_dir=root, file_format="array_record"
        )
    except tensorflow_datasets.core.DatasetNotFoundError:
        raise ValueError(
            f"tfds: dataset={dataset!r} is neither known to TensorFlow Datasets nor "
            f"prepared below {root}; tensorflow_datasets.list_builders() lists them"
        ) from None
    return _prepared(
        builder,
        "prepare it where TensorFlow and a network are at hand "
        f"(tfds build {dataset} --file_format=array_record) and copy it below {root}",
        stream,
    )


SOURCES: dict[str, Callable[..., Source]] = {
    "digits": digits,
    "mixture": mixture,
    "npz": npz,
    "latents": latents,
    "folder": folder,
    "cifar10": cifar10,
    "tfds": tfds,
}


def source(name: str, **source_args) -> Source:
    """The pools of the source called `name`."""
    if name not in SOURCES:
        raise ValueError(f"name={name!r} is unknown; known: {', '.join(SOURCES)}")
    return SOURCES[name](**source_args)


KNOWN = {  # images to train on and to test, their shape and their classes
    "cifar10": (50_000, 10_000, (32, 32, 3), 10),
}


def at_hand(name: str, **source_args) -> Source:
    """As `source`, but nothing is fetched, prepared or written: what a dry run reads.

    A set that is KNOWN, and not here, is noise of the same sizes.

    Raises: DataError, also where a set of TensorFlow Datasets is not here yet.
    """
    if name not in ("cifar10", "tfds"):
        return source(name, **source_args)
    root, stream = _data_dir(source_args.get("data_dir")), source_args.get("stream")
    dataset = source_args.get("dataset", name)
    place, _, version = dataset.partition(":")
    decoded = sorted(
        (root / place).glob(f"**/{version or '*'}/{DECODED}"),
        key=lambda path: [int(n) for n in re.findall(r"\d+", path.parent.name)],
    )
    if decoded:
        return npz(decoded[-1], bool(stream))
    if dataset not in KNOWN:
        raise DataError(
            f"{dataset} is not below {root}, or was not decoded there by a run yet, "
            "and a dry run fetches and writes nothing. Start the run, which prepares "
            "it, or give data_dir=DIR, where it is, or points of the same size by "
            "name=npz and path=FILE.npz"
        )
    train, test, shape, classes = KNOWN[dataset]
    rng = np.random.default_rng(0)

    def noise(count):
        images = rng.integers(0, 256, (count, *shape), np.uint8)
        return Rows(images) if stream else images, np.arange(count) % classes

    note = f"{dataset} is not below {root}: noise of the same sizes stands for it"
    return Source(*noise(train), *noise(test))._replace(notes=(note,))


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
    """Images of any origin, as a person sees them, and what is known of them.

    Args:
      where: a folder of images, or a zip of one; an .npz or .npy of uint8, or of floats
        in [-1, 1], [n, h, w, c], [n, h, w] or one [h, w, 3]; the name of a source, or
        of a set of TensorFlow Datasets. With [a:b] at its end: those of them.
      role: "samples", "train" or "held_out": which array of an .npz (ROLES, its only
        one, or all that np.savez numbered), and which split of a set, is meant.
      resolution, skip_bad, crop, exif, alpha: of a folder or a zip, as in `folder`.
    Returns:
      uint8 [n, h, w, c] images, labels where they have some, and no test split.
    Raises:
      DataError: missing, damaged, or no images.   ValueError: sizes that differ.
    """
    # A folder may be called so.
    part = None if os.path.exists(os.path.expanduser(where)) else PART.search(where)
    whole = PART.sub("", where) if part else where
    found = _whole(whole, role, part is not None, resolution, skip_bad, **preparation)
    if part is None:
        return found
    rows = slice(*(int(end) if end else None for end in part.groups()))
    if not len(found.images[rows]):
        raise ValueError(f"{where} is none of the {len(found.images)} images")
    labels, files = (
        None if each is None else each[rows] for each in (found.labels, found.files)
    )
    return found._replace(images=found.images[rows], labels=labels, files=files)


def again(where: str, files, **preparation) -> np.ndarray:
    """Some files of `origin(where)`, prepared in another way: uint8 [k, h, w, 3].

    Args: files, [k] paths, as its `files` has them.
    Raises: as `folder`.
    """
    path = os.path.expanduser(where)
    path = path if os.path.exists(path) else PART.sub("", path)
    how = Preparation(**preparation)
    return readers.read(path, how, skip_bad=True, only=files).images


def _whole(where, role, cut, resolution, skip_bad, **preparation):
    """`origin` without [a:b]; cut: whether that follows."""
    path = os.path.expanduser(where)
    suffix = os.path.splitext(path)[1].lower()
    if os.path.isdir(path) or suffix == ".zip":  # which takes any text
        return folder(path, resolution, skip_bad, **preparation)
    if suffix in (".npz", ".npy"):
        return _of_role(path, role)
    if os.path.exists(path):
        raise DataError(
            f"{where} is a file of a kind that is not read: give a folder of images, a "
            "zip of one, an .npz or an .npy"
        )
    try:
        pools = SOURCES[where]() if where in _bare() else tfds(where)
    except DataError:
        raise
    except ValueError as error:
        raise DataError(
            f"{where}: no such folder of images, no .zip, .npz or .npy file, and no "
            f"data set of that name ({error})"
        ) from error
    x, label = pools[2:4] if role == "held_out" else pools[:2]
    if x is None and cut:  # a part that was cut off by hand
        x, label = pools[:2]
    if x is None:
        raise DataError(f"{where} has no test split: give images that were held out")
    x, notes = readers.pixels(x, where)
    return Source(x, label, notes=notes)


def _of_role(path, role):
    """The images of an array file that are meant, and their labels."""
    named, label_name = ROLES[role], LABELS[role]

    def chosen(names):
        known = [name for name in named if name in names][:1]
        numbered = [name for name in names if NUMBERED.fullmatch(name)]
        if known:
            return known + [name for name in (label_name,) if name in names]
        if numbered and len(numbered) == len(names):
            return numbered
        return names if len(names) == 1 else []

    found, names = _arrays(path, chosen)
    if not set(found) - {label_name}:
        raise DataError(
            f"{path}: none of {', '.join(named)} among its {len(names):,} arrays "
            f"{listed(names)}; write it again with one of those names"
        )
    label = found.pop(label_name, None)
    if all(map(NUMBERED.fullmatch, found)):
        x, label = readers.joined(found, path)
        name = listed(found, 3)
    else:
        name, x = next(iter(found.items()))
    x, notes = readers.pixels(x, f"{path}: {name}")
    if len(found) > 1 and label is None:
        notes += (f"{path}: {name} were joined into {len(x):,} images",)
    _check_labels(label, len(x), f"{path}: {label_name}")
    return Source(x, label, notes=notes)


def _bare():
    """The sources that need no argument."""
    return [
        name
        for name, read in SOURCES.items()
        if all(p.default is not p.empty for p in _parameters(read))
    ]


def _parameters(read):
    return inspect.signature(read).parameters.values()


def check_source(source, where) -> tuple[str, ...]:
    """Refuses what training would only fail on later; `where` names the file.

    Returns: notes, of what is allowed and may not be meant.   Raises: DataError.
    """
    notes = _check_points(source.images, f"{where}: train_images", source.pixels)
    _check_labels(source.labels, len(source.images), f"{where}: train_labels")
    test = source.test_images
    if test is None:
        if source.test_labels is not None:
            raise DataError(f"{where}: test_labels without test_images")
        return notes
    notes += _check_points(test, f"{where}: test_images", source.pixels)
    _check_labels(source.test_labels, len(test), f"{where}: test_labels")
    if (test.shape[1:], test.dtype) != (source.images.shape[1:], source.images.dtype):
        raise DataError(
            f"{where}: test_images {test.dtype}{test.shape} do not fit train_images "
            f"{source.images.dtype}{source.images.shape}"
        )
    return notes


def _check_points(x, where, pixels):
    if (x.dtype.name, x.ndim) not in {("uint8", 4), ("float32", 4), ("float32", 2)}:
        raise DataError(
            f"{where} is {x.dtype}{x.shape}; it must be uint8 or float32 [n, h, w, c], "
            "or float32 [n, d]"
        )
    if 0 in x.shape:
        raise DataError(f"{where} is empty: {x.shape}")
    if x.ndim == 4:
        readers.check_layout(x, where)
    low, high, below = readers.limits(x)
    readers.refuse(np.isnan(low), where, "NaN or Inf")
    if x.ndim != 4:
        return ()
    notes = []
    if pixels:
        notes = readers.check_range(x, where, low, high, below)
    return tuple(notes)


def _check_labels(labels, n, where):
    if labels is None:
        return
    if labels.dtype.kind not in "iu" or labels.shape != (n,):
        raise DataError(
            f"{where} is {labels.dtype}{labels.shape}; it must be integers [{n}]"
        )
    readers.refuse(
        (labels < 0) | (labels >= 2**31), where, "a label outside 0 .. 2**31 - 1"
    )


def _data_dir(data_dir):
    default = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return Path(data_dir or default).expanduser()


def _prepared(builder, way_out, stream=False):
    """Prepare a TFDS builder if need be, decode it once, keep that as an .npz."""
    import tensorflow_datasets
    from tensorflow_datasets.core.download import downloader

    cache = Path(builder.data_path) / DECODED
    if cache.exists():
        try:
            return npz(cache, stream)
        except DataError as error:
            logging.warning("%s; decoding again", error)
    tensorflow_datasets.disable_progress_bar()
    downloader.MAX_RETRIES = 0  # else 205 s before an offline machine says so
    try:
        builder.download_and_prepare(
            download_config=tensorflow_datasets.download.DownloadConfig(
                try_download_gcs=False,
                force_checksums_validation=True,  # no digest known: nothing fetched
            ),
        )
        read = builder.as_data_source()
    except DataError:
        raise
    except Exception as error:  # no network, no TensorFlow, another file format, ...
        raise DataError(
            f"{builder.name}: cannot be prepared or read below {builder.data_path} "
            f"({type(error).__name__}: {str(error)[:300]}); {way_out}"
        ) from error
    part = cache.with_name(f"{cache.name}.{os.getpid()}.part")
    try:
        _decode(read, builder.name, part)
        os.replace(part, cache)
        return npz(cache, stream)
    except OSError as error:
        logging.warning("%s: not cached (%s)", cache, error)
    finally:
        part.unlink(missing_ok=True)
    if stream:
        raise DataError(f"{cache}: stream=True needs it: free some space for it")
    with tempfile.TemporaryDirectory() as folder:
        _decode(read, builder.name, Path(folder) / cache.name)
        return npz(Path(folder) / cache.name)


def _decode(read, name, path):
    """Writes the splits of a prepared TFDS set as an .npz, image by image."""
    if "train" not in read:
        raise DataError(f"{name}: no split 'train' among {sorted(read)}")
    with zipfile.ZipFile(path, "w") as archive:
        for split, role in (("train", "train"), (_tested(read), "test")):
            if split not in read:
                continue
            examples = read[split]
            if not len(examples) or "image" not in examples[0]:
                raise DataError(
                    f"{name}: no images in split {split!r}; take another set"
                )
            first = examples[0]["image"]
            header = {
                "descr": np.lib.format.dtype_to_descr(first.dtype),
                "fortran_order": False,
                "shape": (len(examples), *first.shape),
            }
            labels = []
            with archive.open(f"{role}_images.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, header)
                for example in examples:
                    image = example["image"]
                    if image.shape != first.shape:
                        raise DataError(
                            f"{name}: images differ in size ({first.shape}, "
                            f"{image.shape} ...); save them as files and use the "
                            "source 'folder'"
                        )
                    file.write(np.ascontiguousarray(image, first.dtype).data)
                    labels.append(example.get("label"))
            if "label" in examples[0]:
                with archive.open(f"{role}_labels.npy", "w") as file:
                    labels = np.array(labels, np.int32)
                    np.lib.format.write_array(file, labels, allow_pickle=False)


def _tested(read):
    """The split that is held out."""
    return "test" if "test" in read else "validation"


def _cifar_batches(path):
    """The records [n, 3073] of the five training batches and the test batch.

    Nothing is extracted: the six members are read from the stream of the archive,
    once its size and digest are those of the true one.
    """
    with path.open("rb") as file:
        page = file.read(64).lstrip().lower().startswith((b"<!doctype", b"<html"))
        file.seek(0)
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if (size, digest) != (CIFAR_BYTES, CIFAR_SHA256):
        raise DataError(
            f"{path}: {'an HTML page, not an archive' if page else 'a wrong archive'}: "
            f"expected {CIFAR_BYTES} bytes, SHA-256 {CIFAR_SHA256}, got {size} bytes, "
            f"{digest}; delete it and fetch {CIFAR_URL} again"
        )
    found, total = {}, 0
    try:
        with tarfile.open(path, "r|gz") as archive:
            for member in archive:
                total += member.size
                parts = Path(member.name).parts
                if not (member.isfile() or member.isdir()) or (
                    member.name.startswith("/") or ".." in parts
                ):
                    raise DataError(f"{path}: refused member {member.name!r}")
                if total > CIFAR_UNPACKED_BYTES:
                    raise DataError(f"{path}: refused, too large at {member.name!r}")
                content = archive.extractfile(member)
                if content is not None and member.name in CIFAR_TRAIN + CIFAR_TEST:
                    found[member.name] = np.frombuffer(content.read(), np.uint8)
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged archive ({error}); fetch it again") from error
    batches = []
    for name in CIFAR_TRAIN + CIFAR_TEST:
        if name not in found or not found[name].size or found[name].size % CIFAR_RECORD:
            raise DataError(f"{path}: {name} is missing or damaged; fetch it again")
        batches.append(found[name].reshape(-1, CIFAR_RECORD))
        readers.refuse(batches[-1][:, 0] > 9, f"{path}: {name}", "a label above 9")
    return batches
