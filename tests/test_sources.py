"""Sources: real readers on small files, and everything they refuse."""

import gzip
import hashlib
import http.server
import io
import struct
import tarfile
import threading
import time
import tracemalloc

import jax
import numpy as np
import pytest
from PIL import Image

from memsep_jax import data, mixture
from memsep_jax.data import archives, readers, sources


def pool(n=60):
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (n + 5, 4, 4, 1), np.uint8)
    labels = np.arange(n + 5, dtype=np.int32) % 3
    return data.Source(images[:n], labels[:n], images[n:], labels[n:])


def test_digits():
    got = data.splits("digits", 100, labels="true")
    assert got.train.x.shape == (100, 8, 8, 1) and got.train.x.dtype == np.float32
    assert got.train.x.min() == -1 and got.train.x.max() == 1
    assert len(got.held_out.x) == 297
    assert got.num_distinct == 100


def test_the_mixture_is_fixed_by_its_truth():
    few = data.splits("mixture", 50, 1, k=2, d=3, size=400)
    more = data.splits("mixture", 60, 1, k=2, d=3, size=400)
    np.testing.assert_array_equal(few.train.x, more.train.x[:50])
    assert few.held_out.x.shape == (10_000, 3)
    truth = sources.mixture_truth(k=2, d=3)
    error = np.mean(np.asarray(few.held_out.x), 0) - np.mean(truth.means, 0)
    spread = np.sqrt(1 + np.var(truth.means, axis=0)) / 100
    assert np.all(np.abs(error) < 4 * spread)
    with pytest.raises(ValueError, match="size=0"):
        sources.mixture(size=0)


@pytest.mark.parametrize(
    "law, shape",
    [("low_rank", {"rank": 1}), ("student_t", {"dof": 8.0}), ("boxes", {})],
)
def test_the_mixture_draws_from_the_law_that_is_named(law, shape):
    """Train and test draws have the mean of |x| that fresh draws of the truth have."""
    drawn = sources.mixture(2, 3, size=10_000, law=law, width=None, **shape)
    truth = sources.mixture_truth(2, 3, law=law, **shape)
    fresh = np.abs(mixture.sample(jax.random.key(7), truth, 10_000))
    for x in map(np.abs, (drawn.images, drawn.test_images)):
        error = np.sqrt((x.var(axis=0) + fresh.var(axis=0)) / 10_000)
        assert np.all(abs(x.mean(axis=0) - fresh.mean(axis=0)) < 4 * error)


def test_what_a_law_does_not_take_is_refused():
    with pytest.raises(ValueError, match="known: separated, low_rank"):
        sources.mixture(law="cauchy")
    with pytest.raises(ValueError, match="rank; beside k, d and scale it takes width"):
        sources.mixture(law="boxes", rank=2)
    with pytest.raises(ValueError, match="rank=0"):
        sources.mixture(law="low_rank", rank=0)


def test_npz_reads_images_vectors_and_labels(tmp_path):
    source, path = pool(), tmp_path / "set.npz"
    np.savez(path, **dict(zip(archives.KEYS, source[:4], strict=True)))
    for got, stored in zip(sources.npz(path), source, strict=True):
        np.testing.assert_array_equal(got, stored)
    np.savez(path, train_images=np.full((4, 3), 7, np.float32))
    np.testing.assert_array_equal(
        data.load("npz", 4, path=path, num_held_out=0).x, np.full((4, 3), 7)
    )


IMAGES = np.zeros((3, 2, 2, 1), np.float32)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (dict(images=IMAGES), "no 'train_images'"),
        (dict(train_images=IMAGES.astype(np.float64)), "float64"),
        (dict(train_images=IMAGES[..., 0].astype(np.uint8)), r"n, h, w, c"),
        (dict(train_images=IMAGES[:0]), "empty"),
        (dict(train_images=np.float32([[1], [2], [np.inf]])), r"\[2\] has NaN"),
        (dict(train_images=np.float32([[1], [np.nan], [1]])), r"\[1\] has NaN"),
        (dict(train_images=IMAGES + np.float32(1.5)), r"\[0\] has values outside"),
        (dict(train_images=IMAGES, train_labels=np.zeros(2, int)), r"integers \[3\]"),
        (dict(train_images=IMAGES, train_labels=np.zeros(3)), "integers"),
        (dict(train_images=IMAGES, test_images=IMAGES[:, :1]), "do not fit"),
        (dict(train_images=IMAGES, test_labels=np.arange(3)), "without test_images"),
    ],
)
def test_npz_names_what_is_wrong(arrays, message, tmp_path):
    path = tmp_path / "bad.npz"
    np.savez(path, **arrays)
    with pytest.raises(data.DataError, match=message) as caught:
        sources.npz(path)
    assert "bad.npz" in str(caught.value) and caught.value.exit_code == 3


def test_damaged_npz_files_are_refused(tmp_path):
    whole, cut, text = (tmp_path / name for name in ("a.npz", "cut.npz", "text.npz"))
    np.savez(whole, train_images=pool().images)
    cut.write_bytes(whole.read_bytes()[:-100])
    text.write_text("<html>not found</html>")
    bare = tmp_path / "bare.npy"
    np.save(bare, IMAGES)
    for path in (cut, text, bare, tmp_path):
        with pytest.raises(data.DataError, match="not a readable"):
            sources.npz(path)
    with pytest.raises(data.DataError, match="no such file"):
        sources.npz(tmp_path / "absent.npz")


# What stays on disk.


@pytest.mark.parametrize("kind", ["npz", "folder of npy"])
def test_rows_on_disk_are_those_in_memory(kind, tmp_path):
    path, source = tmp_path / "x.npz", pool()._replace(test_labels=None)
    arrays = dict(zip(archives.KEYS[:3], source[:3], strict=True))
    if kind == "npz":
        np.savez(path, **arrays)
    else:
        path = tmp_path
        for name, array in arrays.items():
            np.save(tmp_path / f"{name}.npy", array)
    read, got = sources.npz(path), sources.npz(path, stream=True)
    assert isinstance(got.images, data.Rows) and len(got.images) == len(source.images)
    assert not got.images.array.flags.owndata  # a map of the file
    for one, two, three in zip(read[:4], got[:4], source[:4], strict=True):
        np.testing.assert_array_equal(one, three)
        np.testing.assert_array_equal(two, three)
    some = got.images[np.array([7, 3, 3])][1:]
    assert (some.shape, some.dtype) == ((2, *source.images.shape[1:]), np.uint8)
    np.testing.assert_array_equal(some, source.images[[3, 3]])
    np.testing.assert_array_equal(list(some), source.images[[3, 3]])


@pytest.mark.parametrize("bad", ["compressed", "columns", "cut", "labels only"])
def test_what_cannot_be_read_in_place_says_so(bad, tmp_path):
    path, x = tmp_path / "x.npz", pool().images
    save_it = np.savez_compressed if bad == "compressed" else np.savez
    name = "train_labels" if bad == "labels only" else "train_images"
    save_it(path, **{name: np.asfortranarray(x) if bad == "columns" else x})
    if bad == "cut":  # inside of the array, with the end of the archive as it was
        whole = path.read_bytes()
        path.write_bytes(whole[:200] + whole[-200:])
    message = {"compressed": "it is compressed.*np.savez, not", "columns": "by columns"}
    with pytest.raises(data.DataError, match=message.get(bad, "x.npz: ")):
        sources.npz(path, stream=True)


def test_latents_have_any_values_and_images_have_not(tmp_path):
    path = tmp_path / "x.npz"
    x = np.linspace(-9, 9, 5 * 4 * 4 * 4, dtype=np.float32).reshape(5, 4, 4, 4)
    np.savez(path, train_images=x)
    for stream in (False, True):
        got = sources.latents(path, stream)
        assert not got.pixels and not data.select(got).pixels
        np.testing.assert_array_equal(got.images, x)
        with pytest.raises(data.DataError, match="outside"):
            sources.npz(path, stream)
    np.savez(path, train_images=pool().images)
    with pytest.raises(data.DataError, match="no latents.*name=npz"):
        sources.latents(path)


def test_constant_images_are_allowed_with_a_note(tmp_path, caplog):
    path = tmp_path / "flat.npz"
    np.savez(path, train_images=IMAGES)
    (note,) = sources.npz(path).notes
    assert "train_images: 3 constant images, the first at 0" in note
    with caplog.at_level("WARNING", logger="absl"):  # at the prompt nobody sees notes
        data.load("npz", path=path, num_held_out=0)
    assert note in caplog.text


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    Image.new("RGB", (40, 40)).save(tmp_path / "bomb.png")
    for limit in (1_000, 100):  # pillow warns above the limit, raises above twice
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(data.DataError, match="bomb.png.*decompression bomb"):
            sources.folder(tmp_path)


# Idx files.


def idx_bytes(x):
    """An idx file of unsigned bytes, as its description says."""
    head = bytes((0, 0, 8, x.ndim)) + struct.pack(f">{x.ndim}I", *x.shape)
    return head + np.ascontiguousarray(x, np.uint8).tobytes()


def write_idx(folder, source, end="", dot="-"):
    """The four files of a Source, with the usual names.   -> their paths."""
    folder.mkdir(exist_ok=True)
    arrays = [x[..., 0] if x.ndim == 4 else x for x in source[:4]]
    paths = [
        folder / f"{name.replace('-idx', f'{dot}idx')}{end}" for name in archives.IDX
    ]
    for path, x in zip(paths, arrays, strict=True):
        content = idx_bytes(x)
        path.write_bytes(gzip.compress(content) if end == ".gz" else content)
    return paths


def same(one, two):
    for x, y in zip(one[:4], two[:4], strict=True):
        np.testing.assert_array_equal(x, y)


def test_idx_reads_the_bytes_of_its_description(tmp_path):
    """Sizes are big-endian, and rows come before columns."""
    images = "00000803 00000002 00000003 00000002 000102030405 0a0b0c0d0eff"
    (tmp_path / "some-images-idx3-ubyte").write_bytes(bytes.fromhex(images))
    labels = "00000801 00000002 09ff"
    (tmp_path / "some-labels-idx1-ubyte").write_bytes(bytes.fromhex(labels))
    got = sources.idx(tmp_path / "some-images-idx3-ubyte")
    assert got.images.dtype == np.uint8 and got.images.shape == (2, 3, 2, 1)
    assert got.images[0, ..., 0].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert got.images[1, ..., 0].tolist() == [[10, 11], [12, 13], [14, 255]]
    assert got.labels.tolist() == [9, 255]
    assert got.test_images is None and got.notes == ()


@pytest.mark.parametrize("dot, end", [("-", ""), (".", ".gz")])
def test_idx_is_an_origin_of_images(dot, end, tmp_path):
    """A folder gives its test split as held-out images, and a file its own to all."""
    images, _, test_images, _ = write_idx(tmp_path / "set", pool(), end, dot)
    for where, role, x, labels in [
        (tmp_path / "set", "train", pool().images, pool().labels),
        (tmp_path / "set", "held_out", pool().test_images, pool().test_labels),
        (images, "train", pool().images, pool().labels),
        (test_images, "samples", pool().test_images, pool().test_labels),
        (test_images, "held_out", pool().test_images, pool().test_labels),
    ]:
        assert not sources.is_files(str(where))
        got = sources.origin(str(where), role)
        np.testing.assert_array_equal(got.images, x)
        np.testing.assert_array_equal(got.labels, labels)
    first = sources.origin(f"{images}[0:1]").images
    np.testing.assert_array_equal(first, pool().images[:1])
    images.unlink()
    with pytest.raises(data.DataError, match="a folder needs all four files"):
        sources.origin(str(tmp_path / "set"))


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize("dot", ["-", "."])
def test_idx_finds_the_four_usual_names(end, dot, tmp_path):
    write_idx(tmp_path, pool(), end, dot)
    same(sources.idx(tmp_path), pool())
    same(sources.idx(str(tmp_path)), pool())


def test_idx_knows_a_gzip_by_its_content(tmp_path):
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    for path in write_idx(plain, pool(), ".gz"):
        path.write_bytes(gzip.decompress(path.read_bytes()))
    for path in write_idx(packed, pool()):
        path.write_bytes(gzip.compress(path.read_bytes()))
    same(sources.idx(plain), pool())
    same(sources.idx(packed), pool())


def test_idx_takes_one_file_and_the_labels_beside_it(tmp_path):
    images, labels, test_images, _ = write_idx(tmp_path, pool(), ".gz", ".")
    got = sources.idx(images)
    np.testing.assert_array_equal(got.images, pool().images)
    np.testing.assert_array_equal(got.labels, pool().labels)
    assert got.test_images is None and got.test_labels is None and got.notes == ()
    np.testing.assert_array_equal(sources.idx(test_images).labels, pool().test_labels)
    labels.unlink()
    got = sources.idx(images)
    assert got.labels is None and got.notes == (
        f"{images}: no file of labels beside it",
    )
    other = images.rename(tmp_path / "clothes")
    np.testing.assert_array_equal(sources.idx(other).images, pool().images)


@pytest.mark.parametrize(
    "choose",
    [
        {},
        {"num_examples": 20, "seed": 3, "num_held_out": 2, "labels": "true"},
        {"num_held_out": 0, "skip": 5},
        {"classes": (0, 2), "balanced": True, "num_examples": 10, "labels": "true"},
        {"resolution": 8, "duplicates": 0.5},
        {"labels": "random", "num_labels": 4},
    ],
)
def test_points_of_idx_are_chosen_as_those_of_any_other_source(choose, tmp_path):
    """The same points as from an .npz, whose t10k files are the test split."""
    write_idx(tmp_path, pool())
    images, labels, test_images, test_labels, *_ = pool()
    np.savez(
        tmp_path / "same.npz", train_images=images, train_labels=labels,
        test_images=test_images, test_labels=test_labels,
    )  # fmt: skip
    got = data.splits("idx", path=tmp_path, **choose)
    known = data.splits("npz", path=tmp_path / "same.npz", **choose)
    assert got.fingerprint == known.fingerprint
    with pytest.raises(ValueError, match="num_held_out=6, but the test split has 5"):
        data.splits("idx", path=tmp_path, num_held_out=6)


def zipped(content):
    """The same bytes whenever they are made: they are in the name of a test."""
    return gzip.compress(content, mtime=0)


TINY = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "ends within its header, after 0 bytes; fetch"),
        (idx_bytes(TINY)[:15], "ends within its header, after 15 bytes"),
        (zipped(idx_bytes(TINY)[:15]), "ends within its header, after 15 bytes"),
        (idx_bytes(TINY)[:-1], "2 x 4 x 3 = 24 bytes, but only 23 follow; fetch"),
        (idx_bytes(TINY) + b"x", "2 x 4 x 3 = 24 bytes, but more follow; fetch"),
        (zipped(idx_bytes(TINY)[:-1]), "24 bytes, but only 23 follow"),
        (zipped(idx_bytes(TINY) + b"x"), "24 bytes, but more follow"),
        (zipped(idx_bytes(TINY))[:-9], r"damaged \(.*\); fetch it again"),
        (zipped(idx_bytes(TINY))[:-8] + bytes(8), "damaged .*CRC"),
        (zipped(idx_bytes(TINY)) + b"<html>", "damaged .*Not a gzipped file"),
        (
            idx_bytes(TINY[0, 0]) + bytes(9),
            "0x00000801, where images .*holds labels, not",
        ),
        (b"\0\0\x0d\x03" + idx_bytes(TINY)[4:], "0x00000d03, .*are float32, and only"),
        (b"\0\0\x0a\x03" + idx_bytes(TINY)[4:], "numbers are of an unknown type"),
        (b"\0\0\x08\x02" + idx_bytes(TINY)[4:], "it has 2 dimensions, not 3; "),
        (b"\x03\x08\0\0" + idx_bytes(TINY)[4:], "0x03080000.*another format"),
        (b"<!DOCTYPE html><p>later</p>", "it is an HTML page; fetch it again, or"),
        (idx_bytes(TINY[:0]), "train_images is empty"),
    ],
)
def test_a_damaged_or_foreign_idx_file_is_named(content, message, tmp_path):
    path = tmp_path / "images"
    path.write_bytes(content)
    with pytest.raises(data.DataError, match=message) as caught:
        sources.idx(path)
    assert str(caught.value).startswith(str(path)) and caught.value.exit_code == 3
    assert len(str(caught.value).splitlines()) == 1


def test_idx_files_that_do_not_belong_together_are_named(tmp_path):
    images, labels, test_images, test_labels = write_idx(tmp_path, pool())
    labels.write_bytes(idx_bytes(pool().labels[:-1]))
    with pytest.raises(
        data.DataError, match="59 labels of the 60 images in .*train-im"
    ):
        sources.idx(tmp_path)
    labels.write_bytes(idx_bytes(TINY))
    with pytest.raises(data.DataError, match="0x00000803, where labels .*holds images"):
        sources.idx(images)
    labels.write_bytes(idx_bytes(pool().labels))
    test_images.write_bytes(idx_bytes(pool().test_images[:, 1:, :, 0]))
    with pytest.raises(data.DataError, match="test_images .* do not fit train_images"):
        sources.idx(tmp_path)
    test_images.unlink()
    test_labels.unlink()
    with pytest.raises(data.DataError) as caught:
        sources.idx(tmp_path)
    for part in ("no t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte, ", "path=FILE"):
        assert part in str(caught.value)
    for nothing in ("nothing", "no\0thing", "n" * 5_000):
        with pytest.raises(data.DataError, match="no such file; give a folder"):
            sources.idx(nothing)


def test_every_bit_and_every_end_of_a_packed_idx_file_is_guarded(tmp_path):
    """A flipped bit is refused, or was one that says nothing of the images."""
    path = tmp_path / "images"
    whole = gzip.compress(idx_bytes(TINY))
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(data.DataError):
            sources.idx(path)
    refused = 0
    for place in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            np.testing.assert_array_equal(sources.idx(path).images[..., 0], TINY)
        except data.DataError:
            refused += 1
    assert refused > 7 * (len(whole) - 10)  # all but the ten bytes of the gzip's header


def test_an_idx_file_takes_no_more_memory_than_it_should(tmp_path):
    """A header, or a gzip, that claims gigabytes is refused at once."""
    path = tmp_path / "images"
    huge = bytes((0, 0, 8, 3)) + struct.pack(">3I", *[2**32 - 1] * 3)
    endless = gzip.compress(idx_bytes(TINY)) + 1_024 * gzip.compress(bytes(2**20))
    tracemalloc.start()
    for content, message in (
        (huge + bytes(9), "but only 9 follow"),
        (gzip.compress(huge + bytes(9)), "at most 2,147,483,648 are unpacked; unpack"),
        (endless, "24 bytes, but more follow"),
    ):
        path.write_bytes(content)
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        with pytest.raises(data.DataError, match=message):
            sources.idx(path)
        assert tracemalloc.get_traced_memory()[1] - before < 2**20
    tracemalloc.stop()


# Fashion-MNIST: the true routes to a small set.


@pytest.fixture
def clothes(monkeypatch, tmp_path):
    """A small set that is taken for Fashion-MNIST, and Debian's package without it."""
    digest = data.fingerprint(*pool()[:4])
    monkeypatch.setattr(archives, "FASHION_SHA256", digest)
    monkeypatch.setattr(archives, "FASHION_PACKAGE", str(tmp_path / "package"))
    return pool()


def test_fashion_mnist_is_found_by_path_or_where_debian_has_it(clothes, tmp_path):
    given, package = tmp_path / "given", tmp_path / "package"
    write_idx(given, clothes, ".gz")
    by_path = sources.fashion_mnist(given)
    same(by_path, clothes)
    assert len(by_path.classes) == 10 and by_path.classes[9] == "Ankle boot"
    write_idx(package, clothes)
    same(sources.fashion_mnist(), clothes)
    same(sources.at_hand("fashion_mnist"), clothes)
    kept = data.splits("fashion_mnist", 9, labels="true", classes=(0, 2))
    assert kept.classes == ("T-shirt/top", "Pullover")
    # What is given comes first, and another set is not taken for this one.
    write_idx(given, clothes._replace(labels=clothes.labels[::-1]))
    with pytest.raises(data.DataError, match="not the images .*name=idx") as caught:
        sources.fashion_mnist(given)
    assert str(caught.value).startswith(str(given))


@pytest.fixture
def server(tmp_path):
    """Serves the files in tmp_path / "served"; counts what is asked for."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=tmp_path / "served")

        def log_message(self, *_):
            asked.append(self.path)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as serving:
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{serving.server_port}/", asked
        serving.shutdown()
        thread.join()


def test_fashion_mnist_is_fetched_once_and_held_to_its_digests(
    clothes, server, tmp_path, monkeypatch
):
    url, asked = server
    paths = write_idx(tmp_path / "served", clothes, ".gz")
    content = [path.read_bytes() for path in paths]
    known = {
        path.name: (len(raw), hashlib.sha256(raw).hexdigest())
        for path, raw in zip(paths, content, strict=True)
    }
    monkeypatch.setattr(archives, "FASHION_URL", url)
    monkeypatch.setattr(archives, "FASHION_FILES", known)
    paths[3].write_bytes(gzip.compress(idx_bytes(clothes.labels[1:6])))
    with pytest.raises(data.DataError, match="cannot be fetched .*hecksum") as caught:
        sources.fashion_mnist(data_dir=tmp_path / "sets")
    assert "Debian's package dataset-fashion-mnist, or put" in str(caught.value)
    paths[3].write_bytes(content[3])
    same(sources.fashion_mnist(data_dir=tmp_path / "sets"), clothes)
    assert {path.partition("/")[2] for path in asked} == set(known)
    asked.clear()
    for read in (
        sources.fashion_mnist,
        lambda **k: sources.at_hand("fashion_mnist", **k),
    ):
        same(read(data_dir=tmp_path / "sets"), clothes)
    assert not asked


def test_without_files_and_network_fashion_mnist_says_two_ways(
    clothes, tmp_path, monkeypatch
):
    import requests

    def offline(*_, **__):
        raise requests.exceptions.ConnectionError("no network in tests")

    monkeypatch.setattr(requests.Session, "send", offline)
    with pytest.raises(data.DataError) as caught:
        sources.fashion_mnist(data_dir=tmp_path)
    for way in ("install Debian's package dataset-fashion-mnist", "give path=FOLDER"):
        assert way in str(caught.value)
    assert caught.value.exit_code == 3
    noise = sources.at_hand("fashion_mnist", data_dir=tmp_path)
    assert (
        noise.images.shape == (60_000, 28, 28, 1) and len(noise.test_images) == 10_000
    )
    assert "noise of the same sizes" in noise.notes[0]


# CIFAR-10 and TensorFlow Datasets: the true route on a small archive.

BATCHES = archives.CIFAR_TRAIN + archives.CIFAR_TEST


def records(name, n=4):
    """n images whose every pixel of channel c is 10 * batch + i + 60 * c."""
    batch = BATCHES.index(name)
    pixels = 10 * batch + np.arange(n)[:, None] + 60 * np.arange(3).repeat(1024)
    labels = (batch + np.arange(n))[:, None] % 10
    return np.concatenate([labels, pixels], axis=1).astype(np.uint8).tobytes()


def pack(monkeypatch, root, members=(), without=()):
    """Write the archive of CIFAR-10 in small, and make its digest the expected one."""
    path = root / "downloads" / "manual" / "cifar-10-binary.tar.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name in BATCHES:
            if name not in without:
                info = tarfile.TarInfo(name)
                info.size = len(records(name))
                archive.addfile(info, io.BytesIO(records(name)))
        for info in members:
            content = io.BytesIO(bytes(info.size)) if info.isfile() else None
            archive.addfile(info, content)
    return expect(monkeypatch, path)


def expect(monkeypatch, path):
    content = path.read_bytes()
    monkeypatch.setattr(archives, "CIFAR_BYTES", len(content))
    monkeypatch.setattr(archives, "CIFAR_SHA256", hashlib.sha256(content).hexdigest())
    return path


def test_cifar10_is_prepared_read_and_cached(tmp_path, monkeypatch):
    pack(monkeypatch, tmp_path)
    first = sources.cifar10(tmp_path)
    assert first.images.shape == (20, 32, 32, 3) and first.images.dtype == np.uint8
    assert first.test_images.shape == (4, 32, 32, 3)
    value, label = first.images[:, 0, 0, 0].astype(int), first.labels
    np.testing.assert_array_equal((value // 10 + value % 10) % 10, label)
    assert sorted(value) == sorted(10 * b + i for b in range(5) for i in range(4))
    for c in range(3):
        expected = np.broadcast_to(value[:, None, None] + 60 * c, (20, 32, 32))
        np.testing.assert_array_equal(first.images[..., c], expected)
    (cache,) = tmp_path.rglob("memsep_jax.npz")
    assert not list(tmp_path.rglob("*.part"))

    again = sources.cifar10(tmp_path)
    streamed = sources.tfds("cifar10", tmp_path, stream=True)
    assert isinstance(streamed.images, data.Rows)
    cache.write_bytes(cache.read_bytes()[:-50])
    repaired = sources.cifar10(tmp_path)
    older = tmp_path / "cifar10" / "3.0.2"  # where a run once left it
    older.mkdir()
    cache.rename(older / cache.name)
    (tmp_path / "downloads" / "manual" / "cifar-10-binary.tar.gz").unlink()
    kept = sources.cifar10(tmp_path)
    for other in (again, streamed, repaired, kept):
        for one, two in zip(first, other, strict=True):
            np.testing.assert_array_equal(one, two)


def test_cifar10_has_the_order_of_tensorflow_datasets(tmp_path):
    from tensorflow_datasets.core import shuffle

    for split in ("train", "test"):
        shuffler = shuffle.Shuffler(tmp_path, split)
        for i in range(3_000):
            shuffler.add(i, b"%d" % i)
        order = [int(example) for _, example in shuffler]
        assert archives._tfds_order(split, 3_000) == order


def member(name, size=0, kind=tarfile.REGTYPE):
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, "/etc/passwd"
    return info


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (member("../x", 3), "refused member '../x'"),
        (member("/tmp/x", 3), "refused member '/tmp/x'"),
        (member("link", kind=tarfile.SYMTYPE), "refused member 'link'"),
        (member("hard", kind=tarfile.LNKTYPE), "refused member 'hard'"),
        (member("device", kind=tarfile.CHRTYPE), "refused member 'device'"),
        (member("zeros", 2_000_000), "refused, too large at 'zeros'"),
    ],
)
def test_a_hostile_archive_is_refused(bad, message, tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "CIFAR_UNPACKED_BYTES", 1_000_000)
    pack(monkeypatch, tmp_path, members=[bad])
    with pytest.raises(data.DataError, match=message):
        sources.cifar10(tmp_path)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == [
        "cifar-10-binary.tar.gz"
    ]


def test_a_damaged_archive_is_refused(tmp_path, monkeypatch):
    path = pack(monkeypatch, tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-9] + b"different")
    with pytest.raises(data.DataError, match="wrong archive: expected .* got "):
        sources.cifar10(tmp_path)
    path.write_text("<!DOCTYPE html><html>try later</html>")
    with pytest.raises(data.DataError, match="an HTML page, not an archive"):
        sources.cifar10(tmp_path)
    path.write_bytes(whole[: len(whole) // 2])
    expect(monkeypatch, path)
    with pytest.raises(data.DataError, match="damaged"):
        sources.cifar10(tmp_path)
    pack(monkeypatch, tmp_path, without=[archives.CIFAR_TEST[0]])
    with pytest.raises(data.DataError, match="test_batch.bin is missing"):
        sources.cifar10(tmp_path)


def test_without_archive_and_network_it_says_what_to_do(tmp_path, monkeypatch):
    import requests

    def offline(*_, **__):
        raise requests.exceptions.ConnectionError("no network in tests")

    monkeypatch.setattr(requests.Session, "send", offline)
    start = time.monotonic()
    with pytest.raises(data.DataError, match="put https.*SHA-256.*manual/cifar-10-bin"):
        sources.cifar10(tmp_path)
    with pytest.raises(data.DataError, match="tfds build mnist"):
        sources.tfds("mnist", tmp_path)
    assert time.monotonic() - start < 15


def test_tfds_reads_what_is_prepared(tmp_path):
    import tensorflow_datasets

    features = tensorflow_datasets.features
    with tensorflow_datasets.core.registered.skip_registration():

        class TinySet(tensorflow_datasets.core.GeneratorBasedBuilder):
            VERSION = tensorflow_datasets.core.Version("1.0.0")

            def _info(self):
                return tensorflow_datasets.core.DatasetInfo(
                    builder=self,
                    features=features.FeaturesDict(
                        {
                            "image": features.Image(shape=(None, None, 1)),
                            "label": features.ClassLabel(num_classes=5),
                        }
                    ),
                )

            def _split_generators(self, _):
                return {
                    "train": self._generate_examples(),
                    "validation": self._generate_examples(first=3),
                }

            def _generate_examples(self, first=0):
                for i in range(first, 5):
                    yield i, {"image": Image.new("L", (4, 4), 10 * i), "label": i}

    TinySet(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    got = sources.tfds("tiny_set", tmp_path)
    np.testing.assert_array_equal(got.images[:, 0, 0, 0], 10 * got.labels)
    assert got.images.shape == (5, 4, 4, 1)
    assert sorted(got.test_labels) == [3, 4]  # its validation split
    streamed = sources.tfds("tiny_set", tmp_path, stream=True)
    assert isinstance(streamed.images, data.Rows)
    for one, two in zip(got[:4], streamed[:4], strict=True):
        np.testing.assert_array_equal(one, two)
    with pytest.raises(ValueError, match="neither known"):
        sources.tfds("no_such_set", tmp_path)
    with pytest.raises(ValueError, match="must be name"):
        sources.tfds("huggingface:mnist", tmp_path)


@pytest.mark.parametrize("damaged", [0, 1])
def test_a_streamed_folder_is_the_one_in_memory(damaged, tmp_path):
    rng = np.random.default_rng(2)
    for i, group in enumerate("abab"):
        (tmp_path / group).mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (9, 6, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / group / f"{i}.png")
    for i in range(damaged):
        (tmp_path / "a" / f"0{i}.png").write_bytes(b"cut short")
    how = dict(resolution=4, crop="center", skip_bad=True)
    whole = sources.folder(tmp_path, **how)
    streamed = sources.folder(tmp_path, **how, stream=True)

    assert isinstance(streamed.images, data.Rows)
    np.testing.assert_array_equal(streamed.images, whole.images)
    np.testing.assert_array_equal(streamed.labels, whole.labels)
    assert streamed.notes == whole.notes


def test_a_streamed_folder_needs_room_on_the_disk(tmp_path, monkeypatch):
    for i in range(2):
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / f"{i}.png")

    def full():
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(readers.tempfile, "TemporaryFile", full)
    with pytest.raises(data.DataError, match=r"2 images .*TMPDIR"):
        sources.folder(tmp_path, stream=True)
