"""Inception is the network that defines FID, and its converter runs nothing."""

import hashlib
import importlib
import importlib.util
import os
import sys
import types
from collections import OrderedDict
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memsep_jax import features, weights
from memsep_jax.models import inception

COUNT = 21_785_568 + 1008 * (2048 + 1) + 2 * 17_216
TOOL = Path(__file__).parent.parent / "tools" / "convert_inception.py"
RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (32, 24, 3), np.uint8)


@pytest.fixture(scope="module")
def tensors():
    """Random weights that neither kill what passes nor let it explode."""
    rng, result = np.random.default_rng(1), {}
    for name, shape in inception.shapes().items():
        if name.endswith(("bn.weight", "running_var")):
            a = rng.uniform(0.5, 1.5, shape)
        elif len(shape) == 1:
            a = rng.normal(0, 0.2, shape)
        else:
            a = rng.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape)
        result[name] = a.astype(np.float32)
    return result


def answer(tensors, like):
    """features, logits of the image."""
    call = jax.jit(inception.Inception(like).apply)
    result = call({"params": inception.params_of(tensors)}, IMAGE)
    return [np.asarray(a) for a in result]


# Against the two packages. Neither is a dependency, and torchvision is not needed.


def state_dict(torch, tensors):
    return OrderedDict((n, torch.from_numpy(a)) for n, a in tensors.items())


@pytest.fixture
def fidelity(tensors, monkeypatch):
    """torch-fidelity's module, without what its package imports besides."""
    torch = pytest.importorskip("torch", reason="of the extra dev")
    result = importlib.util.find_spec("torch_fidelity")
    if result is None:
        pytest.skip("torch-fidelity is not here")
    package = types.ModuleType("torch_fidelity")
    package.__path__ = result.submodule_search_locations
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    state = state_dict(torch, tensors)
    monkeypatch.setattr(module, "load_state_dict_from_url", lambda *_, **__: state)
    yield module
    made = ("torch_fidelity.", "pytorch_fid")
    for name in [name for name in sys.modules if name.startswith(made)]:
        del sys.modules[name]


def of_fidelity(module):
    return module.FeatureExtractorInceptionV3("inception", ["2048", "logits"])


def batch(image):
    import torch

    return torch.from_numpy(image.transpose(2, 0, 1)[None].copy())


def close(result, truth):
    assert truth.std() > 0.01 * np.abs(truth).max()  # or any network would do
    np.testing.assert_allclose(
        result, truth, rtol=1e-4, atol=1e-5 * np.abs(truth).max()
    )


@pytest.mark.slow
def test_it_has_the_leaves_of_torch_fidelity_and_its_answers(fidelity, tensors):
    module = of_fidelity(fidelity)  # strict: each leaf by name and shape
    state = module.state_dict().items()
    count = sum(a.numel() for name, a in state if "num_batches" not in name)
    assert count == sum(a.size for a in tensors.values()) == COUNT
    truths = module(batch(IMAGE))
    for result, truth in zip(answer(tensors, "torch-fidelity"), truths, strict=True):
        close(result, truth[0].numpy())


@pytest.mark.slow
def test_it_has_the_answers_of_pytorch_fid(fidelity, tensors, monkeypatch):
    """Its blocks inherit from torchvision's, whose place torch-fidelity's take."""
    if importlib.util.find_spec("pytorch_fid") is None:
        pytest.skip("pytorch-fid is not here")
    vision = types.ModuleType("torchvision")
    vision.__version__ = "0.20.0"
    vision.models = types.SimpleNamespace(
        inception=types.SimpleNamespace(
            InceptionA=fidelity.InceptionA,
            InceptionC=fidelity.InceptionC,
            InceptionE=fidelity.InceptionE_1,
        ),
        inception_v3=lambda **_: of_fidelity(fidelity),
    )
    monkeypatch.setitem(sys.modules, "torchvision", vision)
    module = importlib.import_module("pytorch_fid.inception")
    state = fidelity.load_state_dict_from_url()
    monkeypatch.setattr(module, "load_state_dict_from_url", lambda *_, **__: state)
    network = module.InceptionV3().eval()
    (truth,) = network(batch(IMAGE) / 255)  # as its ToTensor
    close(answer(tensors, "pytorch-fid")[0], truth[0, :, 0, 0].numpy())


def test_it_is_of_the_published_size():
    """21,785,568 of Inception-v3 below its logits, 1008 of these, and statistics."""
    convolutions = 94
    assert len(inception.shapes()) == 5 * convolutions + 2
    assert sum(np.prod(shape) for shape in inception.shapes().values()) == COUNT


@pytest.mark.parametrize("shape", [(32, 24), (299, 1), (400, 350)])
@pytest.mark.dev
def test_images_are_resized_and_scaled_as_each_package_does(shape):
    torch = pytest.importorskip("torch", reason="of the extra dev")
    image = RNG.integers(0, 256, (*shape, 3), np.uint8)
    planes = batch(image).double()
    truth = torch.nn.functional.interpolate(
        planes / 255, (299, 299), mode="bilinear", align_corners=False
    )
    result = inception.prepared(jnp.asarray(image))
    truth = (2 * truth - 1)[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(result, truth, atol=2e-6)
    # TensorFlow 1: pixel i of 299 is at i n / 299 of n, and no pixel is after the last.
    truth = (image - 128.0) / 128
    for axis, n in enumerate(shape):
        places = np.arange(299) * n / 299
        low = places.astype(int)
        left = np.take(truth, low, axis)
        right = np.take(truth, np.minimum(low + 1, n - 1), axis)
        share = np.expand_dims(places - low, [i for i in range(3) if i != axis])
        truth = left + (right - left) * share
    result = inception.prepared(jnp.asarray(image), "torch-fidelity")
    np.testing.assert_allclose(result, truth, atol=2e-6)


def test_another_package_is_not_known():
    with pytest.raises(ValueError, match="like='keras' .* pytorch-fid"):
        inception.prepared(jnp.zeros((8, 8, 3)), "keras")


def test_leaves_that_do_not_fit_are_listed_and_no_more_than_ten(tensors):
    odd = dict(tensors) | {"fc.bias": np.zeros(1000), "AuxLogits.fc.bias": np.zeros(3)}
    del odd["Mixed_7c.branch_pool.bn.bias"]
    with pytest.raises(ValueError) as caught:
        inception.params_of(odd)
    assert str(caught.value).splitlines() == [
        "mismatched: fc.bias (1000,), not (1008,)",
        "missing: Mixed_7c.branch_pool.bn.bias (192,)",
        "unexpected: AuxLogits.fc.bias (3,)",
    ]
    with pytest.raises(ValueError, match="and 462 more"):
        inception.params_of({})


# The converter.


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("convert_inception", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_weights_survive_and_only_the_standard_file_makes_fid(
    tool, tensors, tmp_path, monkeypatch, capsys
):
    torch = pytest.importorskip("torch", reason="of the extra dev")
    source, target = tmp_path / "in.pth", tmp_path / "out.safetensors"
    state = state_dict(torch, tensors)
    state["Conv2d_1a_3x3.bn.num_batches_tracked"] = torch.tensor(0)
    torch.save(state, source)
    sha256 = hashlib.sha256(source.read_bytes()).hexdigest()

    assert tool.main([str(source), str(target)]) == 0
    assert "is no FID" in capsys.readouterr().out
    result, about = weights.read(target)
    assert about["source_sha256"] == sha256 and about["standard"] == "false"
    assert result.keys() == tensors.keys()
    assert all(np.array_equal(result[name], tensors[name]) for name in tensors)
    made = features.inception(IMAGE.shape, target, chunk=2)
    assert made.title == "FD (inception, unverified weights)"
    # Floats are rounded to levels, and what is beyond an image file's is clipped.
    levels = np.stack([IMAGE, np.where(IMAGE > 250, 255, IMAGE)])
    floats = levels / 127.5 - 1 + np.where(levels == 255, 0.3, 0.003)
    ours = made.apply(floats)
    close(ours[0], answer(tensors, "pytorch-fid")[0])
    np.testing.assert_array_equal(ours, made.apply(levels))

    monkeypatch.setattr(tool, "INCEPTION_SHA256", sha256)
    assert tool.main([str(source), str(target)]) == 0
    assert "is an FID" in capsys.readouterr().out
    assert features.inception(IMAGE.shape, target).title == "FID"


class Evil:
    """Unpickled, it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.dev
def test_a_pickle_runs_nothing(zipped, tool, tmp_path, capsys):
    torch = pytest.importorskip("torch", reason="of the extra dev")
    trap, source = tmp_path / "sprung", tmp_path / "evil.pth"
    torch.save(
        {"fc.bias": torch.zeros(1008), "evil": Evil(trap)},
        source,
        _use_new_zipfile_serialization=zipped,
    )
    assert tool.main([str(source), str(tmp_path / "out.safetensors")]) == 3
    assert "not a state dict of tensors" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["evil.pth"]
    # The trap works where it is let.
    torch.load(source, weights_only=False)
    assert trap.exists()


@pytest.mark.dev
def test_what_goes_wrong_is_one_message(tool, tmp_path, monkeypatch, capsys):
    torch = pytest.importorskip("torch", reason="of the extra dev")
    target = str(tmp_path / "out.safetensors")

    def told(source):
        assert tool.main([str(source), target]) == 3
        return capsys.readouterr().err

    assert "No such file" in told(tmp_path / "none.pth")
    for name, saved, words in [
        ("list", [1, 2], "not a state dict"),
        ("bytes", None, "not a state dict"),
        ("other", {"fc.bias": torch.zeros(1000)}, "not the Inception of FID"),
    ]:
        path = tmp_path / name
        path.write_bytes(b"<html>") if saved is None else torch.save(saved, path)
        assert words in told(path)
    assert "missing: Conv2d_1a_3x3.conv.weight (32, 3, 3, 3)" in told(
        tmp_path / "other"
    )
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    assert "torch>=2.6" in told(tmp_path / "other")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "torch is needed" in told(tmp_path / "other")
    assert not Path(target).exists()
    assert tool.main([]) == 2
