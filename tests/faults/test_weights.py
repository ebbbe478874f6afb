"""Weights from elsewhere are data: they never run, and are refused where they lie."""

import argparse
import importlib.util
import json
import os
import pickle
import subprocess
import sys
import tracemalloc
import types
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memsep_jax import weights
from memsep_jax.checkpoint import StorageError
from memsep_jax.models import DiT
from memsep_jax.models.dit import position_features
from memsep_jax.weights import WeightsError

pytestmark = pytest.mark.dev  # most of it needs torch

TOOL = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"
INCEPTION = TOOL.with_name("convert_inception.py")
MKDIR = f"{os.mkdir.__module__}.mkdir"  # as a pickle names it


class Bait:
    """Unpickled, it makes a directory."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


class Called:
    """Pickled, it is a call of a function by name."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.fixture
def bait(tmp_path):
    made = tmp_path / "made"
    pickle.loads(pickle.dumps(Bait(made)))
    made.rmdir()  # it bites
    yield Bait(made)
    assert not made.exists()


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="of the extra dev")


@pytest.fixture(scope="module")
def tool(torch):
    spec = importlib.util.spec_from_file_location("convert_checkpoint", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def convert(tool, tmp_path, capsys):
    """(path, *flags) -> its tensors and metadata, or the code and the words."""
    out = tmp_path / "out.safetensors"

    def run(path, *flags):
        try:
            code = tool.main([str(path), str(out), *flags])
        except SystemExit as error:
            code = error.code
        said = capsys.readouterr()
        if code:
            assert not list(tmp_path.glob("*out.safetensors*")) and not said.out
            assert str(path) in said.err
            return code, said.err
        return weights.read(out)

    return run


# D53: pickles.


@pytest.mark.parametrize("suffix", [".pkl", ".pt", ".safetensors"])
@pytest.mark.parametrize("zipped", [False, True])
def test_d53_the_package_opens_no_pickle(suffix, zipped, bait, torch, tmp_path):
    path = tmp_path / f"weights{suffix}"
    if zipped:
        torch.save(bait, path)
    else:
        path.write_bytes(pickle.dumps(bait))
    with pytest.raises(WeightsError, match=r"pickled.*tools/convert_checkp") as error:
        weights.read(path)
    assert str(path) in str(error.value) and error.value.exit_code == 3


@pytest.mark.parametrize("suffix", [".pkl", ".pt", ".pth"])
def test_d53_the_converter_names_what_would_run(suffix, bait, torch, tmp_path, convert):
    path = tmp_path / f"evil{suffix}"
    held = {"ema": {"weight": torch.ones(2)}, "extra": bait}
    if suffix == ".pkl":
        path.write_bytes(pickle.dumps(held))
    else:
        torch.save(held, path)
    code, said = convert(path, "--i_trust_this_file")
    assert code == 3 and f"refused: it names {MKDIR}," in said


@pytest.fixture
def edm(torch, tmp_path, monkeypatch):
    """(weight) -> path of a snapshot as EDM pickles one, source of classes included.

    What it names to make them of it would run that source, as EDM's does.
    """
    fake, made = types.ModuleType("torch_utils.persistence"), tmp_path / "ran"
    exec("def _reconstruct_persistent_obj(meta): exec(meta['module_src'])", vars(fake))
    fake._reconstruct_persistent_obj.__module__ = fake.__name__
    source = f"import os; os.mkdir({str(made)!r})"

    class Layer(torch.nn.Module):
        def __reduce__(self):
            meta = dict(type="class", version=6, class_name="Layer", module_src=source)
            state = dict(vars(self))
            return fake._reconstruct_persistent_obj, (meta | {"state": state},), None

    def snapshot(weight):
        conv, net = Layer(), Layer()
        conv._parameters["weight"] = weight
        conv.register_parameter("bias", None)
        conv.register_buffer("resample_filter", torch.ones(1, 1, 2, 2).half())
        conv.skip_scale, conv._init_kwargs = np.sqrt(0.5), {"kernel": 3}
        net.model = Layer()
        net.model.enc = torch.nn.ModuleDict({"8x8_conv": conv})
        net.sigma_data = 0.5
        path = tmp_path / "network-snapshot-000000.pkl"
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "torch_utils", types.ModuleType("torch_utils"))
            patch.setitem(sys.modules, fake.__name__, fake)
            path.write_bytes(
                pickle.dumps({"ema": net, "dataset_kwargs": {"path": "."}})
            )
            if isinstance(weight, torch.nn.Parameter):
                with pytest.raises(FileExistsError):  # it bites, in each layer
                    pickle.loads(path.read_bytes())
                made.rmdir()
        return path

    yield snapshot
    assert not made.exists()


def test_d53_a_snapshot_of_edm_is_converted_and_its_source_is_not_run(
    edm, torch, convert
):
    draw = torch.nn.Parameter(torch.randn(3, 2, 3, 3))
    path = edm(draw)
    tensors, metadata = convert(path, "--i_trust_this_file")
    assert metadata == {"class_name": "Layer"}
    conv = "model.enc.8x8_conv"
    assert tensors.keys() == {f"{conv}.weight", f"{conv}.resample_filter"}
    np.testing.assert_array_equal(tensors[f"{conv}.weight"], draw.detach().numpy())
    assert tensors[f"{conv}.resample_filter"].dtype == np.float16


def test_d53_a_pickle_is_converted_only_where_it_is_trusted(edm, torch, convert):
    code, said = convert(edm(torch.nn.Parameter(torch.ones(2))))
    assert code == 2 and "--i_trust_this_file" in said


def test_d53_views_are_what_they_show(edm, torch, convert):
    whole = torch.arange(12.0).reshape(3, 4)
    found, _ = convert(edm(torch.nn.Parameter(whole[1:].T)), "--i_trust_this_file")
    np.testing.assert_array_equal(
        found["model.enc.8x8_conv.weight"], whole[1:].T.numpy()
    )


@pytest.mark.parametrize(
    "size, stride, words",
    [
        ((1 << 40,), (0,), "its tensors take 4,398,046,"),  # one number, repeated
        ((3,), (1,), "out of bounds"),
        ((-3,), (1,), "sizes=[-3]"),
    ],
)
def test_d53_a_tensor_cannot_lie_about_its_size(
    size, stride, words, edm, torch, convert
):
    rebuild, (storage, *_) = torch.ones(2).__reduce_ex__(4)
    lie = Called(rebuild, storage, 0, size, stride, False, {})
    code, said = convert(edm(lie), "--i_trust_this_file")
    assert code == 3 and words in said


def test_d53_pickles_inside_of_the_pickle_are_refused_too(bait, edm, torch, convert):
    """The storage of each tensor is one."""
    storage = Called(torch.storage._load_from_bytes, pickle.dumps(bait, protocol=2))
    with pytest.raises(RuntimeError, match="magic"):
        pickle.loads(pickle.dumps(storage))
    os.rmdir(bait.path)  # it bites
    rebuild = torch._utils._rebuild_tensor_v2
    tensor = Called(rebuild, storage, 0, (2,), (1,), False, {})
    code, said = convert(edm(tensor), "--i_trust_this_file")
    assert code == 3 and f"it names {MKDIR}," in said


@pytest.mark.parametrize("held", [[], {}, {"ema": 3}, {"ema": {"weight": 3}}, None])
def test_d53_a_pickle_of_anything_else_is_refused(held, tmp_path, convert):
    path = tmp_path / "a.pkl"
    path.write_bytes(b"" if held is None else pickle.dumps(held))
    code, said = convert(path, "--i_trust_this_file")
    assert code == 3 and "damaged, or not weights" in said


def test_d53_a_checkpoint_of_pytorch_is_converted(torch, tmp_path, convert):
    """A state dict, or that of the training script of DiT, which keeps its options."""
    path, now, ema = tmp_path / "a.pt", torch.ones(2), torch.zeros(2).bfloat16()
    torch.save({"a": now}, path)
    np.testing.assert_array_equal(convert(path)[0]["a"], now)
    args = argparse.Namespace(model="DiT-S/2")
    torch.save({"model": {"a": now}, "ema": {"a": ema}, "args": args}, path)
    np.testing.assert_array_equal(convert(path)[0]["a"], now)
    np.testing.assert_array_equal(convert(path, "--ema")[0]["a"], ema.float())


@pytest.mark.parametrize(
    "held, flags, words",
    [
        ({"step": 3}, (), "'step' is a int, not a tensor"),
        ({"model": 3}, (), "it holds a int, not a state dict"),
        ([], (), "it holds a list, not a state dict"),
        ({"a": None}, ("--ema",), 'it has no "ema": leave --ema out'),
        (None, (), "damaged, or not weights (EOFError"),
        (pickle.dumps("a" * 99), (), "damaged, or not weights (UnpicklingError: Unsu"),
    ],
)
def test_d53_what_is_no_state_dict_is_refused(
    held, flags, words, torch, tmp_path, convert
):
    path = tmp_path / "a.pth"
    path.write_bytes(held if isinstance(held, bytes) else b"")
    if not isinstance(held, bytes | None):
        torch.save(held, path)
    code, said = convert(path, *flags)
    assert code == 3 and words in said


def test_d53_what_cannot_be_written_is_said(torch, tool, tmp_path, capsys):
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pt")
    out = tmp_path / "absent" / "a.safetensors"
    assert tool.main([str(tmp_path / "a.pt"), str(out)]) == 5
    assert f"could not write {out}" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["absent.pt", "a.npz"])
def test_d53_what_is_no_checkpoint_is_a_wrong_command(name, tmp_path, convert):
    (tmp_path / "a.npz").touch()
    assert convert(tmp_path / name)[0] == 2


@pytest.mark.slow
def test_d53_the_command_converts(torch, tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pt")
    command = [sys.executable, TOOL, tmp_path / "a.pt", tmp_path / "a.safetensors"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"1 tensors in {tmp_path / 'a.safetensors'}\n"
    assert list(weights.read(tmp_path / "a.safetensors")[0]) == ["a"]


# D54: safetensors.


def crafted(path, header, data=b"", length=None, size=None):
    """A file with this header, which may lie about its length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    path.write_bytes(length.to_bytes(8, "little") + text + data)
    if size:
        os.truncate(path, size)  # a hole: it takes no room
    return path


def tensor(start=0, stop=8, dtype="F32", shape=(2,)):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


LIES = {
    "length": (
        dict(header={}, length=1 << 60),
        "a header of 1,152,921,504,606,846,976",
    ),
    "longer": (
        dict(header={"a": tensor()}, length=99),
        "a header of 99 bytes, in a fi",
    ),
    "long": (dict(header={}, length=1 << 29, size=1 << 30), "at most 67,108,864 are r"),
    "overlap": (
        dict(header={"a": tensor(), "b": tensor(4, 12)}, data=bytes(12)),
        "`b`",
    ),
    "hole": (dict(header={"a": tensor(4, 12)}, data=bytes(12)), "damaged .* `a`"),
    "truncated": (dict(header={"a": tensor()}, data=bytes(7)), "not fully covered"),
    "longer data": (dict(header={"a": tensor()}, data=bytes(9)), "not fully covered"),
    "shape": (
        dict(header={"a": tensor(shape=[1 << 40])}, data=bytes(8)),
        "damaged .*sh",
    ),
    "overflow": (dict(header={"a": tensor(shape=[1 << 62] * 2)}), "damaged .*overflow"),
    "negative": (dict(header={"a": tensor(shape=[-2])}, data=bytes(8)), "damaged .*-2"),
    "dtype": (dict(header={"a": tensor(dtype="F31")}, data=bytes(8)), "variant `F31`"),
    "float8": (
        dict(header={"a": tensor(dtype="F8_E4M3", shape=[8])}, data=bytes(8)),
        "a has a type that numpy lacks",
    ),
    "depth": (dict(header=b'{"a":' * 9_999), "damaged .*recursion limit"),
    "no json": (dict(header=b"[]"), "not a safetensors file"),
    "text": (dict(header=b"{\xff}"), "damaged .*UTF-8"),
}


@pytest.mark.parametrize("lie", LIES)
def test_d54_a_file_that_lies_is_refused_before_it_takes_memory(lie, tmp_path):
    fields, words = LIES[lie]
    path = crafted(tmp_path / "a.safetensors", **fields)
    tracemalloc.start()
    try:
        with pytest.raises(WeightsError, match=words) as error:
            weights.read(path)
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()
    assert str(path) in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 9, 30, -1])
def test_d54_a_truncated_file_is_refused(cut, tmp_path):
    path = tmp_path / "a.safetensors"
    weights.write(path, {"a": np.ones(2, np.float32)})
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(WeightsError, match="damaged|not a safetensors file"):
        weights.read(path)


@pytest.mark.parametrize("name", ["absent", "."])
def test_d54_where_there_is_no_file_the_path_is_named(name, tmp_path):
    with pytest.raises(WeightsError, match="give the path of a .safetensors file"):
        weights.read(tmp_path / name)


def test_d54_all_leaves_that_differ_are_listed():
    like = {"a": jnp.ones(2), "b": {"c": jnp.ones((2, 3))}, "d": jnp.ones(1)}
    tensors = {"a": np.ones(2, np.float16), "b.c": np.ones((3, 2), np.float32)}
    with pytest.raises(WeightsError) as error:
        weights.to_params(tensors | {"e": np.ones(())}, like)
    assert str(error.value).splitlines() == [
        "not the weights of this model:",
        "  mismatched: a float16[2], not float32[2]",
        "  mismatched: b.c float32[3, 2], not float32[2, 3]",
        "  missing: d float32[1]",
        "  unexpected: e float64[]",
    ]
    many = {f"x{i}": np.ones(1) for i in range(30)}
    with pytest.raises(WeightsError, match="and 23 more$"):
        weights.to_params(many, like)


@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyboardInterrupt()])
def test_d54_a_file_is_written_whole_or_stays_as_it_was(error, tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    weights.write(path, {"a": np.ones(2)})

    def half(tensors, part, metadata):
        part.write_bytes(b"half")
        raise error

    monkeypatch.setattr(weights, "save_file", half)
    expected = StorageError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        weights.write(path, {"a": np.zeros(2)})
    assert os.listdir(tmp_path) == [path.name]
    np.testing.assert_array_equal(weights.read(path)[0]["a"], np.ones(2))


# H78: weights in half precision.


@pytest.fixture(scope="module")
def half():
    """(dtype) -> a DiT, its params rounded to it, and its tensors as the release's."""
    model, draw = DiT(2, 16, 1, 2, num_classes=3), np.random.default_rng(0)
    x, t = jnp.zeros((32, 32, 1)), jnp.float32(1)
    like = jax.eval_shape(partial(model.init, x=x, t=t), jax.random.key(0))["params"]
    params = jax.tree.map(lambda p: draw.normal(size=p.shape).astype(p.dtype), like)
    whole = weights.to_dit(model, params, side=32)

    def of(dtype):
        rounded = jax.tree.map(lambda p: p.astype(dtype).astype(np.float32), params)
        return model, rounded, {name: a.astype(dtype) for name, a in whole.items()}

    return of


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
def test_h78_a_dit_in_half_precision_is_loaded_as_float32(dtype, half, tmp_path):
    model, params, stored = half(dtype)
    weights.write(tmp_path / "w.safetensors", stored)
    read, _ = weights.read(tmp_path / "w.safetensors")
    wide = {name: a.astype(np.float32) for name, a in stored.items()}
    for tensors in (read, stored, wide):
        again, found = weights.dit(tensors, num_heads=2)
        assert again == model
        for one, other in zip(*map(jax.tree.leaves, (found, params)), strict=True):
            assert one.dtype == np.float32
            np.testing.assert_array_equal(one, other)


def other_positions():
    truth = np.asarray(position_features(16, 16, 16))[None]
    learned = np.random.default_rng(0).normal(0, 0.02, truth.shape)
    yield "learned", learned.astype(np.float32)
    yield "rows for columns", np.roll(truth, 8, axis=2)
    yield "near", truth + np.float32(0.03)
    yield "zero", np.zeros_like(truth)
    yield "none", np.full_like(truth, np.nan)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.float32, np.float64])
def test_h78_other_positions_are_refused_in_every_type(dtype, half):
    _, _, tensors = half(dtype)
    for name, table in other_positions():
        tensors["pos_embed"] = table.astype(dtype)
        with pytest.raises(WeightsError, match="not the fixed sin-cos positions"):
            weights.dit(tensors, num_heads=2)
            raise AssertionError(name)


def test_h78_a_table_is_held_to_the_precision_that_it_was_stored_in(half):
    """Half precision allows its own rounding, and float32 none of it."""
    _, _, tensors = half(np.float32)
    truth = tensors["pos_embed"]
    for step, known in ((2e-3, False), (2e-5, True)):
        tensors["pos_embed"] = truth + np.float32(step)
        if known:
            weights.dit(tensors, num_heads=2)
            continue
        with pytest.raises(WeightsError, match="not the fixed sin-cos positions"):
            weights.dit(tensors, num_heads=2)
    for dtype, step in ((np.float16, 4e-3), (jnp.bfloat16, 2e-2)):
        tensors["pos_embed"] = (truth + np.float32(step)).astype(dtype)
        with pytest.raises(WeightsError, match="not the fixed sin-cos positions"):
            weights.dit(tensors, num_heads=2)


def test_h78_the_weights_of_inception_may_be_bfloat16(torch, tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("convert_inception", INCEPTION)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    monkeypatch.setattr(tool.inception, "params_of", lambda tensors: tensors)
    torch.save({"fc.bias": torch.tensor([1 / 3]).bfloat16()}, tmp_path / "a.pth")
    assert not tool.convert(tmp_path / "a.pth", tmp_path / "b.safetensors")
    (bias,) = weights.read(tmp_path / "b.safetensors")[0].values()
    assert bias.dtype == np.float32 and bias == np.float32(0.333984375)
