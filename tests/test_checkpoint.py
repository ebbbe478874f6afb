"""What is saved comes back bit for bit, and only to the model that saved it."""

import errno
import io
import json
import os
import pickle
import resource
import shutil
import time
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from memsep_jax import checkpoint, parallel


def tree(scale=1.0):
    return {
        "params": {
            "kernel": scale * jnp.linspace(-1, 1, 12).reshape(3, 4) / 3,
            "half": (jnp.arange(5) / 7).astype(jnp.bfloat16),
        },
        "step": jnp.int32(7),
        "counts": (jnp.arange(3, dtype=jnp.uint8), jnp.array([True, False])),
    }


def same(a, b):
    """Bit for bit, and of the same types."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_a_round_trip_is_bitwise(tmp_path):
    """float32, bfloat16, int, uint8, bool, scalars and tuples."""
    checkpoint.save(tmp_path, 7, tree())
    same(checkpoint.restore(tmp_path, 7, tree(0.0)), tree())
    shapes = jax.eval_shape(tree)
    same(checkpoint.restore(tmp_path, 7, shapes), tree())


def test_restored_leaves_take_the_sharding_of_their_target(tmp_path):
    mesh = parallel.make_mesh()
    checkpoint.save(tmp_path, 1, {"x": jnp.arange(8.0)})
    like = {"x": jax.device_put(jnp.zeros(8), parallel.by_batch(mesh))}
    found = checkpoint.restore(tmp_path, 1, like)
    assert found["x"].sharding == like["x"].sharding
    np.testing.assert_array_equal(found["x"], np.arange(8.0))


def test_the_newest_step_is_found_and_at_most_looks_back(tmp_path):
    assert checkpoint.restore_newest(tmp_path / "never", tree()) is None
    for step in (2, 10, 9):
        checkpoint.save(tmp_path, step, tree(step))
    assert checkpoint.steps(tmp_path) == [2, 9, 10]
    found, step = checkpoint.restore_newest(tmp_path, tree())
    assert step == 10
    same(found, tree(10))
    assert checkpoint.restore_newest(tmp_path, tree(), at_most=9)[1] == 9
    assert checkpoint.restore_newest(tmp_path, tree(), at_most=1) is None


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 20):
        checkpoint.save(tmp_path, step, {"x": jnp.ones(2)}, keep=2)
    assert checkpoint.steps(tmp_path) == [3, 20]


def test_a_step_that_is_saved_again_is_replaced(tmp_path):
    checkpoint.save(tmp_path, 1, tree())
    checkpoint.save(tmp_path, 1, tree(5))
    same(checkpoint.restore(tmp_path, 1, tree()), tree(5))


def test_what_is_no_step_is_no_step(tmp_path):
    checkpoint.save(tmp_path, 3, {"x": jnp.ones(2)})
    for name in ("best", "corrupt-9", "²", "-1", "4.orbax-checkpoint-tmp-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    (tmp_path / "12").mkdir()  # empty: orbax would take it for the latest
    (tmp_path / "13").touch()
    assert checkpoint.steps(tmp_path) == [3]
    checkpoint.clean(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"3", "best", "corrupt-9", "²", "-1", "12", "13"}


def test_a_step_that_is_set_aside_never_covers_another(tmp_path):
    names = []
    for value in range(3):
        checkpoint.save(tmp_path, 1, {"x": jnp.full(2, value)})
        names.append(checkpoint.set_aside(tmp_path, 1, "corrupt").name)
    assert names == ["corrupt-1", "corrupt-1.1", "corrupt-1.2"]
    assert checkpoint.steps(tmp_path) == []


def test_digests_are_equal_exactly_when_all_bits_are():
    whole = checkpoint.digest(tree())
    assert whole == checkpoint.digest(jax.tree.map(jnp.copy, tree()))
    kernel = np.asarray(tree()["params"]["kernel"])
    nudged = tree()
    nudged["params"]["kernel"] = np.nextafter(kernel, np.float32(9))
    zero, minus = {"x": jnp.zeros(2)}, {"x": -jnp.zeros(2)}
    shaped = {"x": jnp.zeros((2, 1))}, {"x": jnp.zeros(2, jnp.int32)}
    others = [nudged, zero, minus, *shaped, {"y": jnp.zeros(2)}]
    digests = {whole, *map(checkpoint.digest, others)}
    assert len(digests) == 7
    swapped = (
        {"a": jnp.ones(1), "b": jnp.zeros(1)},
        {"a": jnp.zeros(1), "b": jnp.ones(1)},
    )
    assert checkpoint.digest(swapped[0]) != checkpoint.digest(swapped[1])


def test_leaves_are_named_by_their_path():
    assert set(checkpoint.leaves(tree())) == {
        "params/kernel",
        "params/half",
        "step",
        "counts/0",
        "counts/1",
    }


def test_a_save_of_what_is_not_finite_is_refused(tmp_path):
    with pytest.raises(ArithmeticError, match="step 4 .* not finite"):
        checkpoint.save(tmp_path, 4, {"x": jnp.array([1.0, jnp.nan])})
    assert checkpoint.steps(tmp_path) == []


@pytest.mark.parametrize(
    "change, words",
    [
        ({"kernel": jnp.ones((3, 5))}, r"params/kernel: saved \(\(3, 4\), 'float32'\)"),
        ({"kernel": jnp.ones((3, 4), jnp.int32)}, r"expected \(\(3, 4\), 'int32'\)"),
        ({"extra": jnp.ones(1)}, r"params/extra: saved absent, expected \(\(1,\)"),
    ],
)
def test_another_model_is_told_which_leaves_differ(tmp_path, change, words):
    checkpoint.save(tmp_path, 1, tree())
    like = tree()
    like["params"] |= change
    with pytest.raises(checkpoint.ConflictError, match=words) as caught:
        checkpoint.restore(tmp_path, 1, like)
    assert "1 leaves differ; look at model.width" in str(caught.value)
    assert caught.value.exit_code == 2
    same(checkpoint.restore(tmp_path, 1, tree()), tree())  # and nothing was harmed


def test_a_missing_leaf_is_told_too(tmp_path):
    checkpoint.save(tmp_path, 1, tree())
    like = tree()
    del like["step"]
    with pytest.raises(
        checkpoint.ConflictError, match="step: saved .* expected absent"
    ):
        checkpoint.restore_newest(tmp_path, like)


def test_a_leaf_that_changed_on_disk_is_noticed(tmp_path, monkeypatch):
    """Orbax hands over whatever is there: the digest in the manifest decides."""
    checkpoint.save(tmp_path, 1, {"x": jnp.ones(2)})
    monkeypatch.setattr(checkpoint, "_sha256", lambda array: "0" * 64)
    with pytest.raises(checkpoint.CorruptError, match="digest mismatch in x"):
        checkpoint.restore(tmp_path, 1, {"x": jnp.ones(2)})


def test_a_damaged_step_is_set_aside_and_the_one_before_it_taken(tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, {"x": jnp.full(2, step)})
    manifest = tmp_path / "2" / "manifest" / "metadata"
    text = json.loads(manifest.read_text())
    text["leaves"]["x"][2] = "0" * 64
    manifest.write_text(json.dumps(text))
    found, step = checkpoint.restore_newest(tmp_path, {"x": jnp.ones(2, jnp.int32)})
    assert step == 1 and found["x"].tolist() == [1, 1]
    assert (tmp_path / "corrupt-2").is_dir()


def test_bfloat16_on_the_host_is_a_type_of_its_own():
    """NumPy would say void: what is saved keeps its name."""
    assert checkpoint.leaves(tree())["params/half"].dtype == ml_dtypes.bfloat16


def members(path):
    """The files in a packed file, by name."""
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def rewrite(path, kind=zipfile.ZIP_STORED, **changes):
    """Some of the files in a packed file replaced, all else and all checksums right."""
    found = members(path) | changes
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in found.items():
            archive.writestr(name, content, kind if name in changes else None)


def edit(path, change):
    """The manifest of a packed file changed, and sealed again."""
    manifest = json.loads(members(path)[checkpoint.MANIFEST])
    change(manifest)
    manifest["sha256"] = checkpoint._seal(manifest["leaves"])
    rewrite(path, **{checkpoint.MANIFEST: json.dumps(manifest).encode()})


@pytest.fixture
def packed(tmp_path):
    checkpoint.pack(tmp_path / "state.npz", 7, tree())
    return tmp_path / "state.npz"


def test_a_packed_state_goes_on_bit_for_bit_wherever_it_is_moved(tmp_path, packed):
    """float32, bfloat16, int, uint8, bool, scalars and tuples; and not the names."""
    moved = tmp_path / "elsewhere" / "größer als ½"  # and no .npz is asked for
    moved.parent.mkdir()
    packed.rename(moved)
    assert os.listdir(tmp_path) == ["elsewhere"]
    for like in (tree(0.0), jax.eval_shape(tree)):
        found, step = checkpoint.unpack(moved, like)
        assert step == 7
        same(found, tree())
    checkpoint.save(tmp_path / "steps", 7, found)
    same(checkpoint.restore(tmp_path / "steps", 7, tree()), tree())


def test_a_packed_state_is_an_npz_for_everyone(packed):
    with np.load(packed, allow_pickle=False) as arrays:
        found = {name: arrays[name] for name in arrays}
    manifest = json.loads(found.pop(checkpoint.MANIFEST))
    expected = checkpoint.leaves(tree())
    assert manifest["step"] == 7 and set(manifest["leaves"]) == set(expected)
    half = expected.pop("params/half")
    assert found.pop("params/half").tolist() == half.view(np.uint16).tolist()
    same(found, expected)


@pytest.mark.parametrize(
    "leaf",
    [
        jnp.zeros((0, 3)),
        jnp.bfloat16(0.3),
        jnp.full((1, 1, 1), 1e-45),
        jnp.ones(2, jnp.float8_e4m3fn),
        jnp.array([1 + 2j]),
        np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
    ],
)
def test_leaves_of_every_kind_are_packed(leaf, tmp_path):
    """Empty, a scalar, subnormal, of types that NumPy lacks, in another order."""
    names = dict.fromkeys(["", "file", "../x", "manifest", checkpoint.MANIFEST], leaf)
    checkpoint.pack(tmp_path / "a.npz", 0, names)
    found, _ = checkpoint.unpack(tmp_path / "a.npz", names)
    same(found, jax.tree.map(jnp.asarray, names))


def test_unpacked_leaves_take_the_sharding_of_their_target(tmp_path, monkeypatch):
    split = parallel.by_batch(parallel.make_mesh())
    like = {"x": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=split)}
    checkpoint.pack(tmp_path / "a.npz", 1, {"x": jnp.arange(8.0)})
    found, _ = checkpoint.unpack(tmp_path / "a.npz", like)
    assert found["x"].sharding == split
    # And a state that is split packs as one that is not, byte for byte, on any day.
    monkeypatch.setattr(time, "localtime", None)
    checkpoint.pack(tmp_path / "b.npz", 1, found)
    assert (tmp_path / "b.npz").read_bytes() == (tmp_path / "a.npz").read_bytes()


@pytest.mark.parametrize("bit", [0, 7])
def test_a_bit_flipped_anywhere_is_refused_or_harmless(packed, bit):
    """Every byte of the file; in what holds weights or manifest, always refused."""
    whole, like, passed = packed.read_bytes(), jax.eval_shape(tree), 0
    good, content = checkpoint.digest(tree()), members(packed)
    inside = np.zeros(len(whole), bool)
    for value in content.values():
        start = whole.index(value)
        inside[start : start + len(value)] = True
    for offset in range(0, len(whole)):
        damaged = bytearray(whole)
        damaged[offset] ^= 1 << bit
        packed.write_bytes(damaged)
        try:
            found, step = checkpoint.unpack(packed, like)
        except checkpoint.CorruptError as error:
            assert str(packed) in str(error)
        else:
            assert (step, checkpoint.digest(found)) == (7, good)
            assert not inside[offset]
            passed += 1
    assert 0 < passed < len(whole) / 2  # dates and the like


def test_a_file_cut_anywhere_is_refused(packed):
    whole, like = packed.read_bytes(), jax.eval_shape(tree)
    for length in range(0, len(whole), 7):
        packed.write_bytes(whole[:length])
        with pytest.raises(checkpoint.CorruptError, match="unreadable"):
            checkpoint.unpack(packed, like)


@pytest.mark.parametrize("what", ["absent", "directory", "text", "other npz"])
def test_what_is_no_packed_state_is_refused_by_its_name(what, tmp_path):
    path = tmp_path / "some.npz"
    if what == "directory":
        path.mkdir()
    if what == "text":
        path.write_text("<html>not found</html>")
    if what == "other npz":
        np.savez(path, step=7)
    with pytest.raises(checkpoint.CorruptError, match=r"some.npz: \w+ unreadable") as e:
        checkpoint.unpack(path, tree())
    assert e.value.exit_code == 3


def test_weights_exchanged_with_right_checksums_are_named(packed):
    """The digest of each leaf decides, not the checksum of the zip."""
    content = members(packed)["params/kernel.npy"]
    rewrite(packed, **{"params/kernel.npy": content[:-1] + b"?"})
    with pytest.raises(
        checkpoint.CorruptError, match="state.npz: digest mismatch in params/kernel"
    ):
        checkpoint.unpack(packed, tree())


@pytest.mark.parametrize(
    "value", [5, [], [[3, 4], "float32"], [[3, 4], "float32", 1], None]
)
def test_a_manifest_that_makes_no_sense_is_refused(value, packed):
    edit(packed, lambda manifest: manifest["leaves"].update({"step": value}))
    with pytest.raises((checkpoint.CorruptError, checkpoint.ConflictError)):
        checkpoint.unpack(packed, tree())


def test_a_manifest_changed_by_hand_is_refused(packed):
    content = members(packed)[checkpoint.MANIFEST]
    for old, new, words in [
        (b'"int32"', b'"int64"', "manifest digest mismatch"),
        (b'"step": 7', b'"step": "x"', "manifest unreadable"),
        (b'"schema"', b'"scheme"', "manifest unreadable"),
        (content, b"[" * 100_000, "manifest unreadable"),
    ]:
        rewrite(packed, **{checkpoint.MANIFEST: content.replace(old, new)})
        with pytest.raises(checkpoint.CorruptError, match=words):
            checkpoint.unpack(packed, tree())


def test_a_packed_state_of_another_schema_is_refused_with_both(packed):
    edit(packed, lambda manifest: manifest.update(schema=2))
    with pytest.raises(checkpoint.ConflictError, match="state.npz .*schema 2.*reads 1"):
        checkpoint.unpack(packed, tree())


def test_a_packed_state_of_another_model_names_the_leaves(packed):
    before = packed.read_bytes()
    like = tree()
    like["params"]["kernel"] = jnp.ones((3, 5))
    like["params"]["more"] = jnp.ones(1)
    like["params"]["half"] = jnp.ones(5, jnp.uint16)  # as it is stored
    del like["step"]
    with pytest.raises(checkpoint.ConflictError) as caught:
        checkpoint.unpack(packed, like)
    for words in (
        f"{packed} holds another model (4 leaves differ; look at model.width",
        "params/kernel: saved ((3, 4), 'float32'), expected ((3, 5), 'float32')",
        "params/more: saved absent, expected ((1,), 'float32')",
        "params/half: saved ((5,), 'bfloat16'), expected ((5,), 'uint16')",
        "step: saved ((), 'int32'), expected absent",
    ):
        assert words in str(caught.value)
    assert caught.value.exit_code == 2
    assert packed.read_bytes() == before


def npy(array, **save):
    file = io.BytesIO()
    np.save(file, array, **save)
    return file.getvalue()


def test_a_pickle_in_a_packed_state_is_refused_and_never_run(tmp_path, packed):
    struck = tmp_path / "struck"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(struck),)

    evil = npy(np.array([Evil()], object), allow_pickle=True)
    pickle.loads(pickle.dumps(Evil()))
    assert struck.is_dir()  # it bites
    struck.rmdir()
    for name in ("params/kernel.npy", "params/half.npy", "step.npy"):
        checkpoint.pack(packed, 7, tree())
        rewrite(packed, **{name: evil})
        with pytest.raises(checkpoint.CorruptError, match=name.removesuffix(".npy")):
            checkpoint.unpack(packed, tree())
    packed.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(checkpoint.CorruptError, match="file unreadable"):
        checkpoint.unpack(packed, tree())
    assert not struck.exists()


@pytest.fixture
def little_memory():
    """Half a gigabyte more than is taken now, and not a page beyond."""
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + (1 << 29), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def test_a_lying_header_gets_no_memory(packed, little_memory):
    """A terabyte, said by the header of an array: what `like` says is read instead."""
    content = members(packed)["params/kernel.npy"]
    header = npy(np.lib.stride_tricks.as_strided(np.float32(0), (1, 1)))[:-4]
    header = header.replace(b"(1, 1), }" + 10 * b" ", b"(1000000, 262144), }")[:128]
    assert b"262144" in header and len(header) == len(content) - 48
    with pytest.raises(MemoryError):
        np.load(io.BytesIO(header + content[-48:]))
    rewrite(packed, **{"params/kernel.npy": header + content[-48:]})
    same(checkpoint.unpack(packed, tree())[0], tree())
    rewrite(packed, **{"params/kernel.npy": header})
    with pytest.raises(checkpoint.CorruptError, match="params/kernel"):
        checkpoint.unpack(packed, tree())


@pytest.mark.parametrize("name", [checkpoint.MANIFEST, "params/kernel.npy"])
@pytest.mark.parametrize("kind", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_what_would_unfold_is_not_read(kind, name, packed):
    """The right content, but compressed: so no file is ever a bomb."""
    rewrite(packed, kind, **{name: members(packed)[name]})
    stem = name.split(".")[0]
    with pytest.raises(
        checkpoint.CorruptError, match=rf"{stem} unreadable .*not as it was packed"
    ):
        checkpoint.unpack(packed, tree())


def test_a_leaf_larger_than_its_target_is_not_read(packed):
    rewrite(packed, **{"step.npy": bytes(checkpoint.MAX_HEADER + 5)})
    with pytest.raises(checkpoint.CorruptError, match="step unreadable"):
        checkpoint.unpack(packed, tree())


def test_what_is_not_finite_is_not_packed(packed):
    before = packed.read_bytes()
    for bad in (jnp.array([1.0, jnp.nan]), jnp.bfloat16(jnp.inf)):
        with pytest.raises(ArithmeticError, match="step 4 .* not finite"):
            checkpoint.pack(packed, 4, {"x": bad})
    assert packed.read_bytes() == before
    assert os.listdir(packed.parent) == [packed.name]


def refused_for_want_of_room(path, free=r"[\d,]+"):
    """A pack of 40,000 bytes over `path` fails, and leaves all as it was."""
    before = {p: p.read_bytes() for p in path.parent.iterdir()}
    words = rf"could not save {path} .*needed 40,000 bytes, {free} are free"
    with pytest.raises(checkpoint.StorageError, match=words) as caught:
        checkpoint.pack(path, 8, {"x": jnp.ones((10, 1_000))})
    assert caught.value.exit_code == 5
    assert {p: p.read_bytes() for p in path.parent.iterdir()} == before


def test_a_disk_too_full_is_seen_before_anything_is_packed(packed, monkeypatch):
    usage = shutil.disk_usage(packed.parent)._replace(free=1_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(zipfile, "ZipFile", None)
    refused_for_want_of_room(packed, free="1,000")


@pytest.mark.parametrize("room", [0, 50, 300, 20_000, 40_300, 40_500])
def test_a_disk_that_fills_while_packing_spares_what_was_there(packed, room):
    """The system takes no more than so many bytes of a file."""
    whole = len(packed.read_bytes())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        refused_for_want_of_room(packed)
        refused_for_want_of_room(packed.with_name("new.npz"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(packed.read_bytes()) == whole
    same(checkpoint.unpack(packed, tree())[0], tree())
    checkpoint.pack(packed, 8, tree(2.0))
    found, step = checkpoint.unpack(packed, tree())
    assert step == 8
    same(found, tree(2.0))


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_disk_that_says_so_only_at_the_end_is_heard(packed, name, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, name, full)
    refused_for_want_of_room(packed)


def test_a_packed_file_that_cannot_be_there_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory" / "inside").touch()
    for path in (
        tmp_path / "file" / "a.npz",
        tmp_path / "directory",
        tmp_path / ("x" * 300),
    ):
        with pytest.raises(checkpoint.StorageError, match=path.name):
            checkpoint.pack(path, 1, {"x": jnp.ones(2)})
    assert sorted(os.listdir(tmp_path)) == ["directory", "file"]
    assert (tmp_path / "file").read_text() == "mine"
    checkpoint.pack(tmp_path / "not there" / "a.npz", 1, {"x": jnp.ones(2)})
    assert os.listdir(tmp_path / "not there") == ["a.npz"]


def test_a_step_that_is_half_removed_is_no_step(tmp_path, monkeypatch):
    """As after a kill while an old one was taken away: gone, and then cleaned up."""
    tree = {"w": jnp.arange(3.0)}

    def killed(path, *args, **kwargs):
        next(p for p in Path(path).rglob("*") if p.is_file()).unlink()
        raise KeyboardInterrupt

    checkpoint.save(tmp_path, 1, tree, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(tmp_path, 2, tree, keep=1)
    assert checkpoint.steps(tmp_path) == [2]
    checkpoint.clean(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["2"]
