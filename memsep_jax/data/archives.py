"""Sets that come packed: .npz and idx files, Fashion-MNIST, CIFAR-10, TFDS.

Nothing is unpickled, no archive is extracted, and TensorFlow is never needed.
"""

import gzip
import hashlib
import math
import mmap
import os
import re
import struct
import tarfile
import tempfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
from absl import logging

from memsep_jax.data.arrays import (
    DataError,
    Rows,
    Source,
    check_source,
    fingerprint,
    listed,
    native,
    refuse,
)

KEYS = ("train_images", "train_labels", "test_images", "test_labels")
DECODED = "memsep_jax.npz"  # beside a prepared set: its images and labels
CIFAR_VERSION = "3.0.2"  # of TensorFlow Datasets, which gives its examples this order
CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
# Checked before anything of the archive is read, wherever it came from.
CIFAR_BYTES = 170_052_171
CIFAR_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
# A small archive may unpack to any size; the true one holds 184 million.
CIFAR_UNPACKED_BYTES = 256 * 2**20
CIFAR_RECORD = 1 + 32 * 32 * 3  # a label, then the red, green and blue planes
CIFAR_TRAIN = tuple(f"cifar-10-batches-bin/data_batch_{i}.bin" for i in range(1, 6))
CIFAR_TEST = ("cifar-10-batches-bin/test_batch.bin",)
# Usual names of idx files, in the order of KEYS.
IDX = (
    "train-images-idx3-ubyte", "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte",
)  # fmt: skip
# What they begin with: two zeros, the type (8: unsigned bytes), the dimensions.
IDX_IMAGES, IDX_LABELS = bytes((0, 0, 8, 3)), bytes((0, 0, 8, 1))
IDX_TYPES = {
    0x08: "unsigned bytes", 0x09: "signed bytes", 0x0B: "int16", 0x0C: "int32",
    0x0D: "float32", 0x0E: "float64",
}  # fmt: skip
# A small gzip may unpack to any size; EMNIST, the largest such set, holds 547 million.
IDX_UNPACKED_BYTES = 2**31
IDX_PIECE = 2**20  # bytes that are unpacked at a time
FASHION_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
FASHION_FILES = {  # bytes and SHA-256 as they are fetched, in the order of KEYS
    "train-images-idx3-ubyte.gz": (
        26_421_880, "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    ),
    "train-labels-idx1-ubyte.gz": (
        29_515, "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    ),
    "t10k-images-idx3-ubyte.gz": (
        4_422_102, "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    ),
    "t10k-labels-idx1-ubyte.gz": (
        5_148, "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    ),
}  # fmt: skip
# `fingerprint` of what they hold, however it was packed.
FASHION_SHA256 = "42064eeb88f7d869514a77721b09659bbbf94e2b0333f243dfb1ec9b0bce3bd0"
FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt",
    "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
FASHION_PACKAGE = "/usr/share/datasets/fashion-mnist"  # of Debian
FASHION_WAY = (
    "install Debian's package dataset-fashion-mnist, or put the four files of "
    "https://github.com/zalandoresearch/fashion-mnist (data/fashion) into a folder and "
    "give path=FOLDER"
)
KNOWN = {  # images to train on and to test, their shape and their classes
    "cifar10": (50_000, 10_000, (32, 32, 3), 10),
    "fashion_mnist": (60_000, 10_000, (28, 28, 1), 10),
}


# .npz files.


def npz(path, stream: bool = False) -> Source:
    """The .npz layout: train_images and, optionally, train_labels, test_images, ...

    Images are uint8 or float32 in [-1, 1], [n, h, w, c]; vectors float32 [n, d].

    Args:
      path: an .npz file, or a folder with an .npy file of each of these names.
      stream: images stay on disk, as Rows of what np.save or np.savez wrote.
    Raises:
      DataError: the file is missing, damaged, or holds anything else.
    """
    return _pools(path, stream, pixels=True)


def latents(path, stream: bool = False) -> Source:
    """Latents of images in an .npz as in `npz`: float32 [n, h, w, c].

    They may have any finite values; a spread near the prediction's sigma_data is best.
    """
    return _pools(path, stream, pixels=False)


def _pools(path, stream, pixels):
    path = os.path.expanduser(path)

    # Labels are read at once even if images stay on disk: KEYS alternates between them.
    def chosen(names):
        return [key for key in KEYS[stream :: 2 if stream else 1] if key in names]

    arrays, names = read_arrays(path, chosen)
    if stream:
        arrays |= {key: Rows(_mapped(path, key)) for key in KEYS[::2] if key in names}
    if "train_images" not in arrays:
        raise DataError(
            f"{path}: not a readable .npz (no 'train_images' among {listed(names)}); "
            "write it again by np.savez(path, train_images=...)"
        )
    pools = Source(*(arrays.get(key) for key in KEYS), pixels)
    if not pixels and (pools.images.dtype, pools.images.ndim) != (np.float32, 4):
        raise DataError(
            f"{path}: train_images {pools.images.dtype}{pools.images.shape} are no "
            "latents: float32 [n, h, w, c]; name=npz reads images and vectors"
        )
    return pools._replace(notes=check_source(pools, str(path)))


def _mapped(path, name):
    """An array that is mapped from its file, so that none of it is read.

    Raises: DataError: it is compressed, or does not hold plain numbers.
    """
    try:
        if os.path.isdir(path):
            file = os.path.join(path, f"{name}.npy")
            x = np.load(file, mmap_mode="r", allow_pickle=False)
        else:
            x = _mapped_member(path, f"{name}.npy")
        # Otherwise each batch would gather its rows from all over the file, or swap the
        # bytes of every number.
        if not (x.flags.c_contiguous and x.dtype.isnative):
            raise ValueError(
                "it is stored by columns, or in the byte order of another machine"
            )
        return x
    except (OSError, TypeError, ValueError, OverflowError, struct.error) as error:
        raise DataError(
            f"{path}: {name} cannot be read in place, as stream=True does "
            f"({error}); write it again by np.savez, not np.savez_compressed"
        ) from error


def _mapped_member(path, name):
    """A map of one .npy file inside an .npz, which numpy itself always reads whole."""
    with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
        member = archive.getinfo(name)
        if member.compress_type != zipfile.ZIP_STORED:
            raise ValueError("it is compressed")
        # A member that is not compressed is the file itself, behind a header of 30
        # bytes and two texts, whose lengths are the last four of these bytes.
        file.seek(member.header_offset + 26)
        texts = sum(struct.unpack("<HH", file.read(4)))
        file.seek(member.header_offset + 30 + texts)
        # Later versions of the header are for structured types, which are no points.
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("it is of no plain numbers")
        shape, by_columns, dtype = np.lib.format.read_array_header_1_0(file)
        if dtype.hasobject:  # a map would take bytes of the file for pointers
            raise ValueError("it is of objects")
        whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        order = "F" if by_columns else "C"
        return np.ndarray(shape, dtype, whole, file.tell(), order=order)


def read_arrays(path, choose):
    """(arrays by name, all names) of an .npz, or of a folder of .npy files.

    A single .npy is one array called "array".   Args: choose, names -> those to read.
    """
    try:
        if os.path.isdir(path):
            files = {file.stem: file for file in Path(path).glob("*.npy")}
            arrays = {
                name: np.load(files[name], allow_pickle=False) for name in choose(files)
            }
            return {name: native(x) for name, x in arrays.items()}, sorted(files)
        # Opened here: np.load leaves the file of a damaged .npz open.
        with open(path, "rb") as file:
            read = np.load(file, allow_pickle=False)
            read = {"array": read} if isinstance(read, np.ndarray) else read
            names = sorted(read)
            return {name: native(read[name]) for name in choose(names)}, names
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; give the path of an .npz") from None
    except Exception as error:  # numpy, zipfile and zlib each fail in their own way
        way_out = "write it again by np.savez(path, train_images=...)"
        # NumPy has no type of its own for this refusal.
        if "pickle" in str(error) or "Object arrays" in str(error):
            way_out = "allow_pickle is never used: save plain uint8 or float32 arrays"
        raise DataError(f"{path}: not a readable .npz ({error}); {way_out}") from error


# Idx files, the format of MNIST.


def idx(path) -> Source:
    """Images and labels in the format of MNIST: uint8 [n, h, w, 1], labels 0..255.

    Files may be gzipped, and have a dot before "idx" in place of a dash.

    Args:
      path: a folder with the four files that IDX names, of which the two of t10k are
        the test split; or a file of images, beside which lies that of its labels.
    Raises:
      DataError: a file is missing, damaged, or not what its name says.
    """
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        files = [_idx_file(path, name) for name in IDX]
        missing = [name for name, file in zip(IDX, files, strict=True) if file is None]
        if missing:
            raise DataError(
                f"{path} has no {listed(missing)}, gzipped or not; a folder needs all "
                "four files; of files with other names, give path=FILE, the images"
            )
    else:
        files = [path, _labels_beside(path)]
    pools = Source(*_idx_pools(files))
    notes = () if files[1] else (f"{path}: no file of labels beside it",)
    return pools._replace(notes=notes + check_source(pools, path))


def is_idx(path: str) -> bool:
    """Whether `idx` reads it: a folder with images of a usual name, or such a file."""
    if os.path.isdir(path):
        return any(_idx_file(path, name) for name in IDX[::2])
    if not os.path.isfile(path):
        return False
    # By the name, as another file may begin with the same bytes.
    name = os.path.basename(path).removesuffix(".gz").replace(".idx", "-idx")
    return name.endswith("-idx3-ubyte")


def _idx_file(folder, name):
    """The path of the idx file of a usual name, or None."""
    names = (name, name.replace("-idx", ".idx"))
    paths = (
        os.path.join(folder, f"{each}{end}") for end in ("", ".gz") for each in names
    )
    return next(filter(os.path.exists, paths), None)


def _labels_beside(path):
    """The path of the labels of a file of images, or None."""
    folder, name = os.path.split(path)
    name = name.removesuffix(".gz").replace(".idx", "-idx")
    other = name.replace("images", "labels").replace("-idx3", "-idx1")
    return None if other == name else _idx_file(folder, other)


def _idx_pools(files):
    """Images, labels, and those of the test split, from files in the same order."""
    pools = []
    for image_file, label_file in zip(files[::2], files[1::2], strict=True):
        images, labels = _read_idx(image_file, IDX_IMAGES), None
        if label_file is not None:
            labels = _read_idx(label_file, IDX_LABELS).astype(np.int32)
            if len(images) != len(labels):
                raise DataError(
                    f"{label_file} has {len(labels):,} labels of the {len(images):,} "
                    f"images in {image_file}; take both from the same set"
                )
        pools += [images[..., None], labels]
    return pools


def _read_idx(path, magic):
    """The numbers of an idx file, uint8 [n, h, w] or [n].

    No more memory is taken than the file is large, or its header says.

    Args: magic, IDX_IMAGES or IDX_LABELS: what the file must begin with.
    """
    if not os.path.isfile(path):  # opening a pipe would wait for its other end
        raise DataError(
            f"{path}: no such file; give a folder of idx files, or one file"
        )
    try:
        with open(path, "rb") as file:
            # By content: some browsers unpack what they fetch, and keep the name.
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            stream = gzip.GzipFile(fileobj=file) if packed else file
            shape = _idx_shape(stream.read(4 + 4 * magic[3]), magic, path)
            size = math.prod(shape)
            if packed and size > IDX_UNPACKED_BYTES:
                raise DataError(
                    f"{path}: its header says {size:,} bytes, and at most "
                    f"{IDX_UNPACKED_BYTES:,} are unpacked; unpack it by gunzip first"
                )
            held = os.fstat(file.fileno()).st_size - file.tell()
            content = bytearray()
            if packed or held == size:
                # One byte more than there should be shows that there are more.
                content = _at_most(stream, size + 1)
                held = len(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged ({error}); fetch it again") from error
    if held != size:
        told = f"only {held:,}" if held < size else "more"
        raise DataError(
            f"{path}: its header says {' x '.join(map(str, shape))} = {size:,} bytes, "
            f"but {told} follow; fetch it again"
        )
    return np.frombuffer(content, np.uint8).reshape(shape)


def _at_most(stream, most):
    """What a stream holds, or its first `most` bytes."""
    content = bytearray()
    while piece := stream.read(min(IDX_PIECE, most - len(content))):
        content += piece
    return content


def _idx_shape(header, magic, path):
    """The shape that the header of an idx file says.   Raises: DataError."""
    if len(header) < 4 + 4 * magic[3]:
        raise DataError(
            f"{path} ends within its header, after {len(header)} bytes; fetch it again"
        )
    first = header[:4]
    if first == magic:
        return struct.unpack(f">{magic[3]}I", header[4:])
    what = {IDX_IMAGES: "images", IDX_LABELS: "labels"}
    if first in what:
        reason = f"it holds {what[first]}, not {what[magic]}"
    elif first[:2] != bytes(2):
        page = header.lstrip().lower().startswith((b"<!doctype", b"<html"))
        reason = f"it is {'an HTML page' if page else 'of another format'}"
    elif first[2] != magic[2]:
        kind = IDX_TYPES.get(first[2], "of an unknown type")
        reason = f"its numbers are {kind}, and only unsigned bytes are read"
    else:
        reason = f"it has {first[3]} dimensions, not {magic[3]}"
    raise DataError(
        f"{path} begins with 0x{first.hex()}, where {what[magic]} of the MNIST format "
        f"begin with 0x{magic.hex()}: {reason}; fetch it again, or write an .npz by "
        "np.savez(path, train_images=...) for name=npz"
    )


def fashion_mnist(path=None, data_dir=None) -> Source:
    """Fashion-MNIST's 60,000 + 10,000 grey images of clothes, as in its files.

    Args:
      path: a folder with its files. If not given, that of Debian's package; where it is
        not installed, the files are fetched once, and what they hold is kept in
        `<data_dir>/fashion_mnist`.
    Raises:
      DataError: no files and no network, or files of another set.
    """
    where = fashion_folder(path)
    if where is not None:
        pools = idx(where)
    else:
        root = _data_dir(data_dir)
        where = root / "fashion_mnist" / "memsep_jax" / DECODED
        pools = _kept(where, lambda part: _decode_fashion(root, part), stream=False)
    if (digest := fingerprint(*pools[:4])) != FASHION_SHA256:
        raise DataError(
            f"{where}: not the images and labels of Fashion-MNIST (SHA-256 of their "
            f"arrays {digest}, not {FASHION_SHA256}); {FASHION_WAY}; name=idx reads "
            "any set of the MNIST format"
        )
    return pools._replace(classes=FASHION_CLASSES)


def fashion_folder(path=None):
    """The folder of Fashion-MNIST's files: `path`, or Debian's; None: neither."""
    return path or (FASHION_PACKAGE if os.path.isdir(FASHION_PACKAGE) else None)


def _decode_fashion(root, path):
    """Fetches the four files, and writes what they hold as an .npz."""
    known = {FASHION_URL + name: info for name, info in FASHION_FILES.items()}
    pools = _idx_pools(_fetched("fashion_mnist", known, root, FASHION_WAY))
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        np.savez(file, **dict(zip(KEYS, pools, strict=True)))


# CIFAR-10.


def cifar10(data_dir=None, stream: bool = False) -> Source:
    """CIFAR-10's 50,000 + 10,000 images, in the order of TensorFlow Datasets.

    A local archive `<data_dir>/downloads/manual/cifar-10-binary.tar.gz` is taken
    first; else it is fetched once. What it holds is kept in `<data_dir>/cifar10`. A
    set that TensorFlow Datasets prepared there is read as `tfds` reads it.

    Args: stream: the images stay on disk.
    Raises:
      DataError: no archive and no network, or an archive that is not the true one.
    """
    root = _data_dir(data_dir)
    prepared = root / "cifar10" / CIFAR_VERSION
    if (prepared / "dataset_info.json").exists():
        builder = _builder(f"cifar10:{CIFAR_VERSION}", root)
        return _prepared(builder, _cifar_way(root), stream)
    cache = prepared / DECODED  # where an earlier version of ours put it
    if not cache.exists():
        # Not in `prepared`: TensorFlow Datasets would take that for its own files.
        cache = root / "cifar10" / "memsep_jax" / CIFAR_VERSION / DECODED
    return _kept(cache, lambda path: _decode_cifar(_cifar_archive(root), path), stream)


def _cifar_manual(root):
    return root / "downloads" / "manual" / "cifar-10-binary.tar.gz"


def _cifar_way(root):
    return (
        f"put {CIFAR_URL} ({CIFAR_BYTES} bytes, SHA-256 {CIFAR_SHA256}) at "
        f"{_cifar_manual(root)}"
    )


def _cifar_archive(root):
    """The path of the archive: the local one, or the one fetched to downloads."""
    if (manual := _cifar_manual(root)).exists():
        return manual
    known = {CIFAR_URL: (CIFAR_BYTES, CIFAR_SHA256)}
    (path,) = _fetched("cifar10", known, root, _cifar_way(root))
    return path


def _fetched(name, known, root, way_out):
    """The paths of files that TensorFlow Datasets fetches to `<root>/downloads`, once.

    Args: known, {url: (bytes, SHA-256)}.
    Raises: DataError.
    """
    try:
        import tensorflow_datasets
        from tensorflow_datasets.core.download import checksums

        logging.info("fetching %s to %s", listed(known), root / "downloads")
        _fail_soon()
        # The digests are ours, not those that the package brings along or takes on
        # trust.
        infos = {
            url: checksums.UrlInfo(size, digest, url.rpartition("/")[2])
            for url, (size, digest) in known.items()
        }
        manager = tensorflow_datasets.download.DownloadManager(
            download_dir=root / "downloads",
            dataset_name=name,
            url_infos=infos,
            force_checksums_validation=True,
        )
        return [Path(path) for path in manager.download(list(known))]
    except Exception as error:  # no network, no space, another file, ...
        raise DataError(
            f"{name}: cannot be fetched ({type(error).__name__}: "
            f"{str(error)[:300]}); {way_out}"
        ) from error


def _decode_cifar(archive, path):
    """Writes the images and labels of the archive as an .npz."""
    *train, test = _cifar_batches(archive)
    arrays = {}
    for split, records in (("train", np.concatenate(train)), ("test", test)):
        order = _tfds_order(split, len(records))
        planes = records[order, 1:].reshape(-1, 3, 32, 32)
        arrays[f"{split}_images"] = planes.transpose(0, 2, 3, 1)
        arrays[f"{split}_labels"] = records[order, 0].astype(np.int32)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        np.savez(file, **{k: np.ascontiguousarray(a) for k, a in arrays.items()})


def _tfds_order(split, n):
    """The order of TensorFlow Datasets: by the MD5 of split and number.

    Subsets are the same whichever way the set came here.
    """

    def key(i):
        return hashlib.md5(f"{split}{i}".encode(), usedforsecurity=False).digest()

    return sorted(range(n), key=key)


def _cifar_batches(path):
    """The records [n, 3073] of the five training batches and the test batch.

    Nothing is extracted: the six members are read from the stream of the archive,
    once its size and digest are those of the true one.
    """
    members, total = {}, 0
    try:
        _check_cifar(path)
        # "r|gz": one pass over the stream, with nothing of it kept but the batches.
        with tarfile.open(path, "r|gz") as archive:
            for member in archive:
                total += member.size
                parts = Path(member.name).parts
                # Links, devices and paths that lead out are refused although nothing
                # is extracted: no true archive has them.
                if not (member.isfile() or member.isdir()) or (
                    member.name.startswith("/") or ".." in parts
                ):
                    raise DataError(f"{path}: refused member {member.name!r}")
                if total > CIFAR_UNPACKED_BYTES:
                    raise DataError(f"{path}: refused, too large at {member.name!r}")
                content = archive.extractfile(member)
                if content is not None and member.name in CIFAR_TRAIN + CIFAR_TEST:
                    members[member.name] = np.frombuffer(content.read(), np.uint8)
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged archive ({error}); fetch it again") from error
    batches = []
    for name in CIFAR_TRAIN + CIFAR_TEST:
        raw = members.get(name, np.empty(0, np.uint8))
        if not raw.size or raw.size % CIFAR_RECORD:
            raise DataError(f"{path}: {name} is missing or damaged; fetch it again")
        batches.append(raw.reshape(-1, CIFAR_RECORD))
        refuse(batches[-1][:, 0] > 9, f"{path}: {name}", "a label above 9")
    return batches


def _check_cifar(path):
    """Refuses any file but the true archive, by size and digest."""
    with path.open("rb") as file:
        # What a browser or a proxy saves in place of a file that it could not fetch.
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


# TensorFlow Datasets.


def tfds(dataset: str, data_dir=None, stream: bool = False) -> Source:
    """An image set of TensorFlow Datasets that is, or can be, prepared without TF.

    Its array_record is decoded once, to a file beside it. Its test split, or else its
    validation split, is held out.

    Args: stream: the images stay on disk.
    Raises:
      DataError: not prepared as array_record, and cannot be prepared here.
    """
    # TensorFlow Datasets would fetch and run code from elsewhere for "namespace:name".
    if not re.fullmatch(r"\w+(/[\w.\-]+)*(:\d+\.\d+\.\d+)?", dataset):
        raise ValueError(f"tfds: dataset={dataset!r} must be name[/config][:version]")
    root = _data_dir(data_dir)
    if dataset in ("cifar10", f"cifar10:{CIFAR_VERSION}"):
        return cifar10(root, stream)
    way_out = (
        "prepare it where TensorFlow and a network are at hand "
        f"(tfds build {dataset} --file_format=array_record) and copy it below {root}"
    )
    return _prepared(_builder(dataset, root), way_out, stream)


def decoded(dataset: str, data_dir=None, stream: bool = False) -> Source:
    """A set that an earlier run decoded; nothing is fetched, prepared or written.

    For a set in KNOWN that is not there, the images are noise of the same shapes.

    Raises: DataError: any other set that is not there.
    """
    root = _data_dir(data_dir)
    place, _, version = dataset.partition(":")
    files = sorted(
        (root / place).glob(f"**/{version or '*'}/{DECODED}"),
        key=lambda path: [int(n) for n in re.findall(r"\d+", path.parent.name)],
    )
    if files:
        return npz(files[-1], bool(stream))
    if dataset not in KNOWN:
        raise DataError(
            f"{dataset} is not below {root}, or was not decoded there by a run yet, "
            "and a dry run fetches and writes nothing. Start the run, which prepares "
            "it, or give data_dir=DIR, where it is, or points of the same size by "
            "name=npz and path=FILE.npz"
        )
    train, test, shape, classes = KNOWN[dataset]
    # Noise, not zeros: equal images would count as one, and held-out ones as seen.
    rng = np.random.default_rng(0)

    def noise(count):
        images = rng.integers(0, 256, (count, *shape), np.uint8)
        return Rows(images) if stream else images, np.arange(count) % classes

    note = f"{dataset} is not below {root}: noise of the same sizes stands for it"
    return Source(*noise(train), *noise(test))._replace(notes=(note,))


def _data_dir(data_dir):
    default = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return Path(data_dir or default).expanduser()


def _builder(dataset, root):
    import tensorflow_datasets

    try:
        return tensorflow_datasets.builder(
            dataset, data_dir=root, file_format="array_record"
        )
    except tensorflow_datasets.core.DatasetNotFoundError:
        raise ValueError(
            f"tfds: dataset={dataset!r} is neither known to TensorFlow Datasets nor "
            f"prepared below {root}; tensorflow_datasets.list_builders() lists them"
        ) from None


def _fail_soon():
    """No progress bar, and no retries, with which an offline machine takes 205 s."""
    import tensorflow_datasets
    from tensorflow_datasets.core.download import downloader

    tensorflow_datasets.disable_progress_bar()
    downloader.MAX_RETRIES = 0


def _prepared(builder, way_out, stream=False):
    """Prepares a TFDS builder if need be, and decodes it once."""
    import tensorflow_datasets

    def decode(path):
        _fail_soon()
        try:
            builder.download_and_prepare(
                download_config=tensorflow_datasets.download.DownloadConfig(
                    try_download_gcs=False,
                    force_checksums_validation=True,  # no digest known: no fetching
                ),
            )
            read = builder.as_data_source()
        except Exception as error:  # no network, no TensorFlow, another format, ...
            raise DataError(
                f"{builder.name}: cannot be prepared or read below "
                f"{builder.data_path} ({type(error).__name__}: {str(error)[:300]}); "
                f"{way_out}"
            ) from error
        _decode(read, builder.name, path)

    return _kept(Path(builder.data_path) / DECODED, decode, stream)


def _kept(cache, decode, stream):
    """The .npz that decode(path) writes, kept for later runs where it can be."""
    if cache.exists():
        try:
            return npz(cache, stream)
        except DataError as error:
            logging.warning("%s; decoding again", error)
    # The process id, because runs of a sweep may decode at the same time; the rename
    # makes the file appear whole.
    part = cache.with_name(f"{cache.name}.{os.getpid()}.part")
    try:
        decode(part)
        os.replace(part, cache)
        return npz(cache, stream)
    except OSError as error:
        logging.warning("%s: not cached (%s)", cache, error)
    finally:
        part.unlink(missing_ok=True)
    if stream:
        raise DataError(f"{cache}: stream=True needs it: free some space for it")
    # A folder that is read-only, or full, costs the time of decoding at every run, but
    # not the run.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / cache.name
        decode(path)
        return npz(path)


def _decode(read, name, path):
    """Writes the splits of a prepared TFDS set as an .npz, image by image."""
    if "train" not in read:
        raise DataError(f"{name}: no split 'train' among {sorted(read)}")
    held_out = "test" if "test" in read else "validation"
    with zipfile.ZipFile(path, "w") as archive:
        for split, role in (("train", "train"), (held_out, "test")):
            if split not in read:
                continue
            examples = read[split]
            if not len(examples) or "image" not in examples[0]:
                raise DataError(
                    f"{name}: no images in split {split!r}; take another set"
                )
            first = examples[0]["image"]
            # The header by hand, so that one image at a time is in memory.
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
