"""Sets that come in one archive: .npz files, CIFAR-10, TensorFlow Datasets.

Nothing is unpickled, no archive is extracted, and TensorFlow is never needed.
"""

import hashlib
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
from PIL import Image

from memsep_jax.data.arrays import (
    DataError,
    Rows,
    Source,
    check_source,
    listed,
    native,
    refuse,
)

KEYS = ("train_images", "train_labels", "test_images", "test_labels")
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
KNOWN = {  # images to train on and to test, their shape and their classes
    "cifar10": (50_000, 10_000, (32, 32, 3), 10),
}


# .npz files.


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

    found, names = read_arrays(path, chosen)
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
            "latents: float32 [n, h, w, c]; data.name=npz reads images and vectors"
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
            f"{path}: {name} cannot be read in place, as data.stream=True does "
            f"({error}); write it again by np.savez, not np.savez_compressed"
        ) from error


def read_arrays(path, choose):
    """(arrays of an .npz by name, all its names); an .npy is one called "array".

    Args: choose, names -> those to read.
    """
    try:
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
        if "pickle" in str(error) or "Object arrays" in str(error):
            way_out = "allow_pickle is never used: save plain uint8 or float32 arrays"
        raise DataError(f"{path}: not a readable .npz ({error}); {way_out}") from error


# Sets that are fetched and decoded once.


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
        refuse(batches[-1][:, 0] > 9, f"{path}: {name}", "a label above 9")
    return batches


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
        raise DataError(f"{cache}: data.stream=True needs it: free some space for it")
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


def decoded(dataset: str, data_dir=None, stream: bool = False) -> Source:
    """A set that an earlier run decoded; nothing is fetched, prepared or written.

    Noise of the same sizes stands for a set in KNOWN that is not there.

    Raises: DataError: any other set that is not there.
    """
    root = _data_dir(data_dir)
    place, _, version = dataset.partition(":")
    found = sorted(
        (root / place).glob(f"**/{version or '*'}/{DECODED}"),
        key=lambda path: [int(n) for n in re.findall(r"\d+", path.parent.name)],
    )
    if found:
        return npz(found[-1], bool(stream))
    if dataset not in KNOWN:
        raise DataError(
            f"{dataset} is not below {root}, or was not decoded there by a run yet, "
            "and a dry run fetches and writes nothing. Start the run, which prepares "
            "it, or give data.data_dir, where it is, or points of the same size: "
            "--config.data.name=npz --config.data.path=FILE.npz"
        )
    train, test, shape, classes = KNOWN[dataset]
    rng = np.random.default_rng(0)

    def noise(count):
        images = rng.integers(0, 256, (count, *shape), np.uint8)
        return Rows(images) if stream else images, np.arange(count) % classes

    note = f"{dataset} is not below {root}: noise of the same sizes stands for it"
    return Source(*noise(train), *noise(test))._replace(notes=(note,))
