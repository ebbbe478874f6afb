"""A subset is nested, the held-out set is disjoint, an epoch is a permutation."""

import hashlib
import io
import tarfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from memsep_jax import data

KEY = jax.random.key(0)


def pool(n=60, classes=3, test=0, shape=(4, 4, 1)):
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (n + test, *shape), np.uint8)
    labels = np.arange(n + test, dtype=np.int32) % classes
    if not test:
        return data.Source(images, labels)
    return data.Source(images[:n], labels[:n], images[n:], labels[n:])


def rows(x):
    return {row.tobytes() for row in np.asarray(x)}


# Choosing.


def test_subsets_of_one_seed_are_nested_and_seeds_differ():
    source = pool()
    small, large = data.select(source, 8, 3), data.select(source, 20, 3)
    np.testing.assert_array_equal(small.train.x, large.train.x[:8])
    assert rows(data.select(source, 8, 4).train.x) != rows(small.train.x)


def test_balanced_subsets_have_equal_counts_and_stay_nested():
    source = pool(n=70)
    small = data.select(source, 9, balanced=True, labels="true")
    large = data.select(source, 30, balanced=True, labels="true")
    assert np.bincount(small.train.label).tolist() == [3, 3, 3]
    assert np.bincount(large.train.label).tolist() == [10, 10, 10]
    np.testing.assert_array_equal(small.train.x, large.train.x[:9])
    whole = np.bincount(data.select(source, balanced=True, labels="true").train.label)
    assert len(set(whole.tolist())) == 1


@pytest.mark.parametrize("test", [0, 20])
def test_the_held_out_set_is_fixed_and_disjoint(test):
    source = pool(test=test)
    few, all_ = data.select(source, 5, 1), data.select(source, None, 2)
    np.testing.assert_array_equal(few.held_out.x, all_.held_out.x)
    assert not rows(all_.held_out.x) & rows(all_.train.x)
    assert len(all_.held_out.x) == (test or 10)  # round(0.165 * 60)
    assert len(all_.train.x) == (60 if test else 50)


def test_a_held_out_copy_of_a_training_image_is_removed():
    source = pool(test=6)
    source.test_images[2] = source.images[7]
    assert len(data.select(source, 4).held_out.x) == 5
    copies = source._replace(test_images=source.images[:3], test_labels=None)
    assert data.select(copies).held_out is None
    assert data.select(source, num_held_out=0).held_out is None


def test_kept_classes_are_counted_from_zero():
    got = data.select(pool(test=12), classes=(2, 0), labels="true")
    assert set(np.asarray(got.train.label)) == set(np.asarray(got.held_out.label))
    assert np.bincount(got.train.label).tolist() == [20, 20]
    assert len(got.held_out.x) == 8


def test_a_class_may_be_absent_from_the_test_split():
    source = pool(test=6)._replace(test_labels=np.zeros(6, np.int32))
    assert len(data.select(source, classes=(0, 1)).held_out.x) == 6
    assert data.select(source, classes=(1, 2)).held_out is None


def test_labels_can_be_absent_random_or_unique():
    source = pool()
    assert data.select(source).train.label is None
    unique = data.select(source, 9, labels="unique")
    np.testing.assert_array_equal(unique.train.label, np.arange(9))
    assert unique.held_out.label is None
    choose = dict(labels="random", num_labels=4)
    drawn = data.select(source, 40, 1, **choose)
    again, fewer = (
        data.select(source, 40, 1, **choose),
        data.select(source, 9, 1, **choose),
    )
    np.testing.assert_array_equal(drawn.train.label, again.train.label)
    np.testing.assert_array_equal(drawn.train.label[:9], fewer.train.label)
    assert set(np.asarray(drawn.train.label)) == {0, 1, 2, 3}
    assert drawn.train.label.dtype == jnp.int32
    assert len(drawn.held_out.label) == len(drawn.held_out.x)


def test_random_labels_are_uniform():
    counts = np.bincount(data.random_labels(KEY, 40_000, 4))
    assert np.abs(counts - 10_000).max() < 500  # 5.8 standard deviations


def test_duplicates_are_appended_with_their_labels_and_counted():
    got = data.select(pool(), 10, duplicates=0.3, copies=2, labels="unique")
    assert len(got.train.x) == 10 + 3 * 2 and got.num_distinct == 10
    np.testing.assert_array_equal(got.train.x[10:13], got.train.x[:3])
    np.testing.assert_array_equal(got.train.label[10:], [0, 1, 2, 0, 1, 2])
    once = data.deduplicate(got.train)
    np.testing.assert_array_equal(once.x, got.train.x[:10])
    np.testing.assert_array_equal(once.label, np.arange(10))


def test_a_share_is_not_lost_to_rounding():
    got = data.select(pool(n=200), 100, duplicates=0.29)
    assert len(got.train.x) == 129


def test_the_fingerprint_tells_sets_apart():
    source = pool()
    base = data.select(source, 9)
    assert base.fingerprint == data.select(source, 9).fingerprint
    pixel = source.images.copy()
    pixel += 1
    others = [
        data.select(source, 10),
        data.select(source, 9, 1),
        data.select(source, 9, labels="unique"),
        data.select(source, 9, num_held_out=3),
        data.select(source._replace(images=pixel), 9),
    ]
    assert len({base.fingerprint} | {other.fingerprint for other in others}) == 6
    assert len(base.fingerprint) == 64


def test_resolution_resizes_and_keeps_constants():
    images = (
        np.full((9, 8, 8, 3), 77, np.uint8)
        + np.arange(9, dtype=np.uint8)[:, None, None, None]
    )
    got = data.select(data.Source(images), resolution=4, num_held_out=0).train
    assert got.x.shape == (9, 4, 4, 3)
    assert set(np.asarray(data.to_uint8(got.x)).ravel()) == set(range(77, 86))


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_uint8_round_trips(array):
    u = np.arange(256, dtype=np.uint8)
    x = data.from_uint8(array(u))
    assert x.dtype == np.float32 and x[0] == -1 and x[255] == 1
    assert isinstance(x, type(array(u)))
    np.testing.assert_array_equal(data.to_uint8(x), u)
    assert data.to_uint8(array([-9.0, 9.0])).tolist() == [0, 255]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(num_examples=99), "num_examples=99, but the pool has 50"),
        (dict(num_examples=0), "num_examples=0 must be"),
        (dict(num_examples=2.5), "num_examples=2.5 must be"),
        (dict(seed=-1), "seed=-1"),
        (dict(num_held_out=60), "leaves nothing"),
        (dict(num_examples=10, balanced=True), "multiple of the 3 classes"),
        (dict(num_examples=60, balanced=True), "at most"),
        (dict(classes=()), "keeps nothing"),
        (dict(classes=(1, 7)), r"\[7\] not among"),
        (dict(labels="wrong"), "one of none, true"),
        (dict(labels="random"), "give num_labels"),
        (dict(num_labels=3), "only there"),
        (dict(duplicates=1.0), r"in \[0, 1\)"),
        (dict(duplicates=0.5, copies=0), "copies=0"),
        (dict(resolution=0), "resolution=0"),
    ],
)
def test_a_wrong_argument_says_its_rule(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        data.select(pool(), **arguments)
    assert not isinstance(caught.value, data.DataError)


def test_what_needs_labels_says_so():
    source = pool(test=9)._replace(labels=None, test_labels=None)
    with pytest.raises(data.DataError, match="labels='true'"):
        data.select(source, labels="true")
    with pytest.raises(ValueError, match="need labels"):
        data.select(source, balanced=True)
    with pytest.raises(ValueError, match="need labels"):
        data.select(source, classes=(1,))
    with pytest.raises(ValueError, match="num_held_out=10, but the test split has 9"):
        data.select(source, num_held_out=10)


def test_arguments_are_checked_before_the_source_is_read():
    with pytest.raises(ValueError, match="duplicates=2"):
        data.splits("npz", path="/absent.npz", duplicates=2)
    with pytest.raises(ValueError, match="known: digits, mixture, npz"):
        data.source("digit")
    with pytest.raises(TypeError, match="num_exmaples"):
        data.load("digits", num_exmaples=3)


# Batches.


@settings(max_examples=15, deadline=None)
@given(n=st.integers(1, 12), size=st.integers(1, 30), seed=st.integers(0, 9))
def test_every_epoch_holds_every_example_once(n, size, seed):
    batch = jax.jit(lambda step: data.indices(n, jax.random.key(seed), step, size))
    steps = -(-3 * n // size)
    seen = np.concatenate([batch(step) for step in range(steps)])
    for epoch in seen[: 3 * n].reshape(3, n):
        assert sorted(epoch.tolist()) == list(range(n))


@pytest.mark.parametrize(("n", "size"), [(50_000, 128), (7, 20), (1_281, 4_096)])
def test_a_late_step_is_exact(n, size):
    """step * size far beyond 32 bits: the epoch and the place are still right."""
    step = 2**32 - 5
    epoch, place = divmod(step * size, n)
    order = jax.random.permutation(jax.random.fold_in(KEY, epoch % 2**32), n)
    got = data.indices(n, KEY, np.uint32(step), size)
    np.testing.assert_array_equal(got[: n - place], order[place : place + size])


def test_a_batch_depends_on_its_step_alone():
    train = data.select(pool(), 10, labels="unique").train
    batch = jax.jit(lambda step: data.draw(train, KEY, step, 4, flip=True))
    forward = [batch(step) for step in range(6)]
    resumed = [batch(step) for step in range(3, 6)]
    for one, other in zip(forward[3:], resumed, strict=True):
        np.testing.assert_array_equal(one.x, other.x)
        np.testing.assert_array_equal(one.label, other.label)
    assert batch._cache_size() == 1
    assert forward[0].x.shape == (4, 4, 4, 1)


def test_flips_mirror_half_of_the_images_and_nothing_else():
    train = data.select(pool(), 40, labels="unique").train
    plain = data.draw(train, KEY, 0, 400)
    got = data.draw(train, KEY, 0, 400, flip=True)
    np.testing.assert_array_equal(plain.label, got.label)
    same = np.all(plain.x == got.x, axis=(1, 2, 3))
    mirrored = np.all(plain.x[:, :, ::-1] == got.x, axis=(1, 2, 3))
    assert np.all(same | mirrored) and 150 < mirrored.sum() < 250


def test_batches_refuse_what_has_no_meaning():
    vectors = data.Dataset(jnp.zeros((3, 2)))
    assert data.draw(vectors, KEY, 0, 5).label is None
    with pytest.raises(ValueError, match="flip"):
        data.draw(vectors, KEY, 0, 2, flip=True)
    with pytest.raises(ValueError, match="batch size=0"):
        data.indices(3, KEY, 0, 0)


# Sources.


def test_digits():
    got = data.splits("digits", 100, labels="true")
    assert got.train.x.shape == (100, 8, 8, 1) and got.train.x.dtype == jnp.float32
    assert got.train.x.min() == -1 and got.train.x.max() == 1
    assert len(got.held_out.x) == 297
    assert got.num_distinct == 100


def test_the_mixture_is_fixed_by_its_truth():
    few = data.splits("mixture", 50, 1, k=2, d=3, size=400)
    more = data.splits("mixture", 60, 1, k=2, d=3, size=400)
    np.testing.assert_array_equal(few.train.x, more.train.x[:50])
    assert few.held_out.x.shape == (10_000, 3)
    truth = data.mixture_truth(k=2, d=3)
    error = np.mean(np.asarray(few.held_out.x), 0) - np.mean(truth.means, 0)
    spread = np.sqrt(1 + np.var(truth.means, axis=0)) / 100
    assert np.all(np.abs(error) < 5 * spread)
    with pytest.raises(ValueError, match="size=0"):
        data.mixture(size=0)


def test_npz_reads_images_vectors_and_labels(tmp_path):
    source, path = pool(test=5), tmp_path / "set.npz"
    np.savez(path, **dict(zip(data.KEYS, source, strict=True)))
    for got, stored in zip(data.npz(path), source, strict=True):
        np.testing.assert_array_equal(got, stored)
    np.savez(path, train_images=np.full((4, 3), 7, np.float32))
    np.testing.assert_array_equal(
        data.load("npz", 4, path=path, num_held_out=0).x, np.full((4, 3), 7)
    )


class Trap:
    """Writes a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_npz_never_unpickles(tmp_path):
    path, sign = tmp_path / "set.npz", tmp_path / "executed"
    np.savez(path, train_images=np.array([Trap(sign)], object))
    with pytest.raises(data.DataError, match="allow_pickle is never used"):
        data.npz(path)
    assert not sign.exists()


IMAGES = np.zeros((3, 2, 2, 1), np.float32)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (dict(images=IMAGES), "no 'train_images'"),
        (dict(train_images=IMAGES.astype(np.float64)), "float64"),
        (dict(train_images=IMAGES[..., 0].astype(np.uint8)), r"n, h, w, c"),
        (dict(train_images=IMAGES[:0]), "empty"),
        (dict(train_images=IMAGES + [[[[0]]], [[[np.nan]]], [[[0]]]]), "float64"),
        (dict(train_images=IMAGES + np.float32(1.5)), r"\[0\] has values outside"),
        (dict(train_images=IMAGES, train_labels=np.zeros(2, int)), r"integers \[3\]"),
        (dict(train_images=IMAGES, train_labels=np.zeros(3)), "integers"),
        (
            dict(train_images=IMAGES, train_labels=np.arange(3) - 1),
            r"\[0\] has a label",
        ),
        (dict(train_images=IMAGES, test_images=IMAGES[:, :1]), "do not fit"),
        (dict(train_images=IMAGES, test_labels=np.arange(3)), "without test_images"),
    ],
)
def test_npz_names_what_is_wrong(arrays, message, tmp_path):
    path = tmp_path / "bad.npz"
    np.savez(path, **arrays)
    with pytest.raises(data.DataError, match=message) as caught:
        data.npz(path)
    assert "bad.npz" in str(caught.value) and caught.value.exit_code == 3


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_found(bad, tmp_path):
    x = np.zeros((5, 3), np.float32)
    x[3, 1] = bad
    np.savez(tmp_path / "bad.npz", train_images=x)
    with pytest.raises(data.DataError, match=r"bad.npz: train_images\[3\] has NaN"):
        data.npz(tmp_path / "bad.npz")
    with pytest.raises(data.DataError, match=r"train_images\[3\] has NaN"):
        data.select(data.Source(x))


def test_damaged_npz_files_are_refused(tmp_path):
    whole, cut, text = (tmp_path / name for name in ("a.npz", "cut.npz", "text.npz"))
    np.savez(whole, train_images=pool().images)
    cut.write_bytes(whole.read_bytes()[:-100])
    text.write_text("<html>not found</html>")
    bare = tmp_path / "bare.npy"
    np.save(bare, IMAGES)
    for path in (cut, text, bare, tmp_path):
        with pytest.raises(data.DataError, match="not a readable"):
            data.npz(path)
    with pytest.raises(data.DataError, match="no such file"):
        data.npz(tmp_path / "absent.npz")


def test_constant_images_are_allowed_with_a_warning(tmp_path, caplog):
    np.savez(tmp_path / "flat.npz", train_images=IMAGES)
    with caplog.at_level("WARNING", logger="absl"):
        assert len(data.npz(tmp_path / "flat.npz").images) == 3
    assert "3 constant images, the first at 0" in caplog.text


def save(path, mode="RGB", size=(6, 6), colour=None, **keywords):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour if colour is not None else 0).save(path, **keywords)


def test_a_folder_is_sorted_labelled_and_converted(tmp_path):
    save(tmp_path / "b" / "grey.png", "L", colour=100)
    save(tmp_path / "b" / "deep" / "wide.png", "I;16", colour=257 * 9)
    save(tmp_path / "a" / "ünï.PNG", "RGBA", colour=(255, 0, 0, 0))
    save(tmp_path / "a" / "palette.gif", "P")
    save(tmp_path / "a" / "zz.bmp", colour=(1, 2, 3))
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    (tmp_path / "a" / "._zz.png").write_text("left by another system")
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    got = data.folder(tmp_path)
    assert got.images.shape == (5, 6, 6, 3) and got.labels.tolist() == [0, 0, 0, 1, 1]
    assert got.images[1:, 0, 0].tolist() == [[1, 2, 3], [255] * 3, [9] * 3, [100] * 3]
    assert data.folder(tmp_path / "b" / "deep").labels is None


def test_a_folder_of_mixed_sizes_needs_a_resolution(tmp_path):
    for i, size in enumerate([(6, 6), (9, 5), (6, 6)]):
        save(tmp_path / f"{i}.png", size=size, colour=(i, i, i))
    with pytest.raises(ValueError, match=r"1.png \(5, 9, 3\).*set resolution"):
        data.folder(tmp_path)
    got = data.load("folder", path=tmp_path, resolution=4, num_held_out=0)
    assert got.x.shape == (3, 4, 4, 3)


def test_a_folder_lists_damaged_images(tmp_path):
    with pytest.raises(data.DataError, match="no image"):
        data.folder(tmp_path)
    with pytest.raises(data.DataError, match="no such folder"):
        data.folder(tmp_path / "absent")
    save(tmp_path / "good.jpg", size=(64, 64))
    whole = (tmp_path / "good.jpg").read_bytes()
    for i in range(12):
        (tmp_path / f"bad{i:02}.jpg").write_bytes(whole[: 300 if i % 2 else 10])
    with pytest.raises(data.DataError, match="12 of 13 .*bad00.jpg.*bad09.jpg; "):
        data.folder(tmp_path)


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    save(tmp_path / "bomb.png", size=(40, 40))
    for limit in (1_000, 100):  # pillow warns above the limit, raises above twice
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(data.DataError, match="bomb.png.*decompression bomb"):
            data.folder(tmp_path)


# CIFAR-10 and TensorFlow Datasets: the true route on a small archive.

BATCHES = data.CIFAR_TRAIN + data.CIFAR_TEST


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
    monkeypatch.setattr(data, "CIFAR_BYTES", len(content))
    monkeypatch.setattr(data, "CIFAR_SHA256", hashlib.sha256(content).hexdigest())
    return path


def test_cifar10_is_prepared_read_and_cached(tmp_path, monkeypatch):
    pack(monkeypatch, tmp_path)
    first = data.cifar10(tmp_path)
    assert first.images.shape == (20, 32, 32, 3) and first.images.dtype == np.uint8
    assert first.test_images.shape == (4, 32, 32, 3)
    value, label = first.images[:, 0, 0, 0].astype(int), first.labels
    np.testing.assert_array_equal((value // 10 + value % 10) % 10, label)
    assert sorted(value) == sorted(10 * b + i for b in range(5) for i in range(4))
    for c in range(3):
        expected = np.broadcast_to(value[:, None, None] + 60 * c, (20, 32, 32))
        np.testing.assert_array_equal(first.images[..., c], expected)
    (cache,) = tmp_path.rglob("memsep_jax.npz")
    assert cache.parent == tmp_path / "cifar10" / "3.0.2"
    assert not list(tmp_path.rglob("*.part"))

    again = data.cifar10(tmp_path)
    cache.write_bytes(cache.read_bytes()[:-50])
    repaired = data.cifar10(tmp_path)
    pack(monkeypatch, tmp_path / "other")
    elsewhere = data.cifar10(tmp_path / "other")
    for other in (again, repaired, elsewhere):
        for one, two in zip(first, other, strict=True):
            np.testing.assert_array_equal(one, two)

    import tensorflow_datasets

    builder = tensorflow_datasets.builder("cifar10", data_dir=tmp_path)
    stock = builder.as_data_source(split="train")
    np.testing.assert_array_equal(stock[0]["image"], first.images[0])
    assert builder.info.features["label"].names == data.CIFAR_NAMES


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
    monkeypatch.setattr(data, "CIFAR_UNPACKED_BYTES", 1_000_000)
    pack(monkeypatch, tmp_path, members=[bad])
    with pytest.raises(data.DataError, match=message):
        data.cifar10(tmp_path)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == [
        "cifar-10-binary.tar.gz"
    ]


def test_a_damaged_archive_is_refused(tmp_path, monkeypatch):
    path = pack(monkeypatch, tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-9] + b"different")
    with pytest.raises(data.DataError, match="wrong archive: expected .* got "):
        data.cifar10(tmp_path)
    path.write_text("<!DOCTYPE html><html>try later</html>")
    with pytest.raises(data.DataError, match="an HTML page, not an archive"):
        data.cifar10(tmp_path)
    path.write_bytes(whole[: len(whole) // 2])
    expect(monkeypatch, path)
    with pytest.raises(data.DataError, match="damaged"):
        data.cifar10(tmp_path)
    pack(monkeypatch, tmp_path, without=[data.CIFAR_TEST[0]])
    with pytest.raises(data.DataError, match="test_batch.bin is missing"):
        data.cifar10(tmp_path)


def test_without_archive_and_network_it_says_what_to_do(tmp_path, monkeypatch):
    import requests

    def offline(*_, **__):
        raise requests.exceptions.ConnectionError("no network in tests")

    monkeypatch.setattr(requests.Session, "send", offline)
    start = time.monotonic()
    with pytest.raises(data.DataError, match="put https.*SHA-256.*manual/cifar-10-bin"):
        data.cifar10(tmp_path)
    with pytest.raises(data.DataError, match="tfds build mnist"):
        data.tfds("mnist", tmp_path)
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
                    "ragged": self._generate_examples(grow=1),
                }

            def _generate_examples(self, grow=0):
                for i in range(5):
                    image = Image.new("L", (4 + i * grow, 4), 10 * i)
                    yield i, {"image": image, "label": i}

    TinySet(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    got = data.tfds("tiny_set", tmp_path)
    np.testing.assert_array_equal(got.images[:, 0, 0, 0], 10 * got.labels)
    assert got.images.shape == (5, 4, 4, 1) and got.test_images is None
    with pytest.raises(ValueError, match="neither known"):
        data.tfds("no_such_set", tmp_path)
    with pytest.raises(ValueError, match="must be name"):
        data.tfds("huggingface:mnist", tmp_path)
