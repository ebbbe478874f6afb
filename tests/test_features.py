"""Features are the same in any chunks, and a distance is called what it is."""

import hashlib
import inspect
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from memsep_jax import checkpoint, features, fidelity, weights
from memsep_jax.models import alexnet, inception

SHARED = Path(__file__).parents[2] / "shared" / "data"
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (7, 9, 13, 3), np.uint8)
SHAPE = IMAGES.shape[1:]


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    """Random weights of AlexNet."""
    rng, found = np.random.default_rng(1), {}
    for name, shape in alexnet.shapes().items():
        a = rng.normal(size=shape) * np.sqrt(2 / np.prod(shape[:-1]))
        found[name] = np.abs(a).astype(np.float32) if "NetLin" in name else a
    path = tmp_path_factory.mktemp("weights") / "alexnet.npz"
    np.savez(path, **{name: np.float32(a) for name, a in found.items()})
    return path


# Any extractor.


def test_pixels_are_the_image_in_the_units_of_the_data():
    made = features.pixels(SHAPE)
    found = made.apply(IMAGES)
    assert made.title == "FD (pixels)" and found.dtype == np.float32
    np.testing.assert_array_equal(found, IMAGES.reshape(7, -1) / np.float32(127.5) - 1)
    np.testing.assert_array_equal(found, made.apply(found.reshape(IMAGES.shape)))


def test_chunks_leave_no_trace_and_the_seed_does():
    x = np.random.default_rng(2).uniform(-1, 1, (3, 8, 8, 1))
    made = [(0, 3), (0, 2), (1, 3)]
    found = [features.random_conv((8, 8, 1), *how).apply(x) for how in made]
    assert found[0].shape == (3, 512) and found[0].dtype == np.float32
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5, atol=1e-6)
    assert np.abs(found[2] - found[0]).max() > 0.1


@pytest.mark.parametrize("shape", [(8, 8, 4), (9, 13, 3), (64, 20, 1)])
def test_random_convolutions_take_any_images(shape):
    made = features.random_conv(shape)
    assert made.apply(np.zeros((0, *shape))).shape == (0, 512)


def test_any_number_of_images_is_few_programs():
    """Of 1, 2 and 4 images, where a chunk is of 4."""
    traced = []

    def one(params, x):
        traced.append(x.shape)
        return jnp.sum(x, (0, 1)) * params

    made = features._extractor("sum", one, jnp.float32(2), SHAPE, 4)
    for m in (0, 1, 2, 3, 4, 5, 6, 7):
        truth = 2 * np.sum(IMAGES[:m] / 127.5 - 1, (1, 2))
        np.testing.assert_allclose(made.apply(IMAGES[:m]), truth, atol=1e-4)
    made.apply(np.zeros(IMAGES.shape))
    assert traced == 3 * [SHAPE]


@pytest.mark.parametrize(
    "images, words",
    [
        (IMAGES[:, :8], r"\(8, 13, 3\) where features are of \(9, 13, 3\)"),
        (IMAGES.astype(int), "int64 must be uint8"),
        (IMAGES.astype(float), "finite floats in"),
        (np.full((1, *SHAPE), np.nan), "finite floats in"),
    ],
)
def test_what_is_no_image_is_refused(images, words):
    with pytest.raises(ValueError, match=words):
        features.random_conv(SHAPE, chunk=2).apply(images)


def test_every_maker_says_what_it_cannot_see():
    for name, make in features.FEATURES.items():
        assert make.__name__ == name
        assert next(iter(inspect.signature(make).parameters)) == "shape"
    for call in [
        lambda: features.inception((8, 8, 2)),
        lambda: features.alexnet((8, 8)),
        lambda: features.random_conv((8,)),
        lambda: features.classifier((8,), np.zeros((4, 8)), [0, 1, 0, 1]),
    ]:
        with pytest.raises(ValueError, match=r"sees images \[h, w, "):
            call()
    with pytest.raises(ValueError, match="chunk=0"):
        features.random_conv(SHAPE, chunk=0)
    for labels in (None, [1, 1, 1], [0, 1]):
        with pytest.raises(ValueError, match="a label for each of 3 images"):
            features.classifier((8, 8, 1), np.zeros((3, 8, 8, 1)), labels)


# Weights of others.


def test_grey_is_three_equal_colours_and_excess_is_clipped(npz):
    grey = RNG.uniform(-1.5, 1.5, (2, 12, 12, 1))
    made = [features.alexnet((12, 12, c), npz, 2) for c in (1, 3)]
    assert made[0].title == "FD (alexnet, unverified weights)"
    found = made[0].apply(grey)
    assert found.shape == (2, 256)
    colours = np.repeat(np.clip(grey, -1, 1), 3, axis=3)
    np.testing.assert_array_equal(found, made[1].apply(colours))


@pytest.mark.slow
def test_plain_distance_of_lpips_features_is_lpips(npz):
    made = features.lpips((64, 64, 3), npz, 2)
    assert made.title == "FD (lpips, unverified weights)"
    x = RNG.uniform(-1, 1, (2, 64, 64, 3)).astype(np.float32)
    found = made.apply(x)
    assert found.shape == (2, 31_872)
    params = alexnet.params_of(dict(np.load(npz, allow_pickle=False)))
    truth = alexnet.distance(params, *x)
    np.testing.assert_allclose(np.sum((found[0] - found[1]) ** 2), truth, rtol=1e-5)


@pytest.fixture
def light(monkeypatch):
    """The rules of the weights of Inception, without its network."""
    monkeypatch.setattr(inception, "shapes", lambda: {"fc.bias": (1008,)})
    monkeypatch.setattr(
        features,
        "_extractor",
        lambda name, *_: features.Extractor(name, f"FD ({name})", lambda x: x, 1, int),
    )


def test_fid_is_only_what_has_the_standard_weights(light, tmp_path):
    tensors = {"fc.bias": np.ones(1008, np.float32)}
    digest = checkpoint.digest(tensors)

    def title(**about):
        weights.write(tmp_path / "w.safetensors", tensors, about)
        return features.inception(SHAPE, tmp_path / "w.safetensors").title

    other = "FD (inception, unverified weights)"
    assert title(standard="true", digest=digest) == "FID"
    assert title(standard="false", digest=digest) == other
    assert title(standard="true") == other
    assert title() == other
    tensors["fc.bias"][5] = 2
    with pytest.raises(weights.WeightsError, match="damaged"):
        title(standard="true", digest=digest)


@pytest.mark.parametrize("name", ["inception", "alexnet", "lpips"])
def test_weights_that_are_not_there_tell_the_way_out(name, tmp_path):
    with pytest.raises(weights.WeightsError, match=f"{name} has no weights here"):
        features.FEATURES[name](SHAPE)
    with pytest.raises(weights.WeightsError, match="No such file"):
        features.FEATURES[name](SHAPE, tmp_path / "none")


def test_weights_of_another_network_are_listed(light, tmp_path):
    path = tmp_path / "other"
    weights.write(path, {"fc.bias": np.zeros(1000, np.float32)})
    message = f"{path}: of another .*\nmismatched"
    with pytest.raises(weights.WeightsError, match=message):
        features.inception(SHAPE, path)
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    message = "another network\nmissing: AlexNet_0"
    with pytest.raises(weights.WeightsError, match=message):
        features.alexnet(SHAPE, tmp_path / "other.npz")


def test_damaged_weights_and_bombs_are_refused(npz, tmp_path):
    path = tmp_path / "w.npz"

    def refused(words):
        message = f"w.npz: not a readable.*{words}"
        with pytest.raises(weights.WeightsError, match=message):
            features.alexnet(SHAPE, path)

    for content in (npz.read_bytes()[:-100], b""):
        path.write_bytes(content)
        refused("zip")
    np.savez(path, **{name: np.array([{}]) for name in alexnet.shapes()})
    refused("allow_pickle=False")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", b"\0" * (features.ALEXNET_BYTES + 1))
    refused("67,108,865 bytes unpacked")


def test_the_known_weights_have_their_name():
    path = SHARED / "alexnet_imagenet.npz"
    if not path.exists():
        pytest.skip(f"{path.name} is not here")
    assert features.alexnet(SHAPE, path).title == "FD (alexnet)"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == features.ALEXNET_SHA256


@pytest.mark.slow
def test_alexnet_orders_what_is_done_to_images():
    """As the table of the data's README does at 2,500 images: 4.7 < 12.5 < 201."""
    paths = SHARED / "alexnet_imagenet.npz", SHARED / "cifar10_5k.npz"
    if not all(path.exists() for path in paths):
        pytest.skip("the weights or the images are not here")
    with np.load(paths[1], allow_pickle=False) as file:
        images = file["train_images"]
    half, other = images[:500], images[2500:3000]
    noisy = other + np.random.default_rng(0).normal(0, 20, other.shape)
    noisy = np.clip(np.round(noisy), 0, 255).astype(np.uint8)
    made = features.alexnet(half.shape[1:], paths[0])
    a, *others = (made.apply(x) for x in (half, other, other[:, ::-1], noisy))
    found = [fidelity.frechet(a, b, warn=False) for b in others]
    assert found[0] < found[1] < found[2] / 2, found


# Our own.


def stripes(n, seed):
    """8 x 8, grey: across with label 3, along with label 7."""
    rng = np.random.default_rng(seed)
    labels = rng.choice([3, 7], n)
    lines = rng.choice([-1.0, 1.0], (n, 8, 1, 1))
    across = np.broadcast_to(lines, (n, 8, 8, 1))
    kinds = labels[:, None, None, None] == 3
    images = np.where(kinds, across, across.transpose(0, 2, 1, 3))
    return np.clip(images + rng.normal(0, 0.3, images.shape), -1, 1), labels


def test_the_classifier_learns_its_labels_and_says_how_well(monkeypatch):
    monkeypatch.setattr(features, "CLASSIFIER_STEPS", 30)
    images, labels = stripes(60, 0)
    made = features.classifier((8, 8, 1), images, labels, chunk=64)
    assert made.title == "FD (classifier)"
    assert made.note == "trained on 60 images of 2 labels, right on 100.0%"
    # On what it has not seen, one label is nearer to its own kind in the mean.
    fresh, kinds = stripes(60, 1)
    found = made.apply(fresh)
    assert found.shape == (60, 128)
    means = [made.apply(images)[labels == kind].mean(0) for kind in (3, 7)]
    nearest = [np.linalg.norm(found - mean, axis=1) for mean in means]
    assert np.mean((nearest[0] < nearest[1]) == (kinds == 3)) > 0.9


# Features of other programs.


def test_given_features_are_read_as_they_are(tmp_path):
    given = RNG.normal(size=(5, 3))
    for kind in (np.float64, np.float16, np.int32):
        np.save(tmp_path / "f.npy", given.astype(kind))
        found = features.from_file(tmp_path / "f.npy", 5)
        assert found.dtype == np.float32 and found.flags.owndata
        np.testing.assert_array_equal(found, given.astype(kind).astype(np.float32))


@pytest.mark.parametrize(
    "given, words",
    [
        (
            np.zeros((4, 3)),
            r"features of 5 images are numbers \[5, d\], not .*\[4, 3\]",
        ),
        (np.zeros(5), r"not float64 \[5\]"),
        (np.zeros((5, 3), complex), "not complex128"),
        (np.full((5, 1), "a"), "not <U1"),
        (np.array([[{}]] * 5), "nothing is ever unpickled"),
        (
            np.array([[0], [1], [np.nan], [2], [np.inf]]),
            "in 2 rows, the first of them 2",
        ),
        (np.full((5, 1), 1e300), "in 5 rows"),
    ],
)
def test_given_features_that_are_none_are_refused(given, words, tmp_path):
    path = tmp_path / "f.npy"
    np.save(path, given, allow_pickle=True)
    with pytest.raises(weights.WeightsError, match=f"f.npy: .*{words}"):
        features.from_file(path, 5)


def test_files_that_lie_are_refused(tmp_path):
    path = tmp_path / "f.npy"
    with pytest.raises(weights.WeightsError, match="No such file"):
        features.from_file(path, 5)
    np.save(path, np.zeros((5, 3)))
    whole = path.read_bytes()
    lies = [whole[:-1]]
    for lie in (b"(5, 3e9)", b"(99999999999999999999, 3)"):
        shape = b"(5, 3), }" + b" " * len(lie)
        assert shape in whole
        lies.append(whole.replace(shape, (lie + b", }").ljust(len(shape))))
    for lie in lies:
        path.write_bytes(lie)
        with pytest.raises(weights.WeightsError, match="no readable .npy"):
            features.from_file(path, 5)
    np.savez(tmp_path / "f.npz", np.zeros((5, 3)))
    with pytest.raises(weights.WeightsError, match="no readable .npy"):
        features.from_file(tmp_path / "f.npz", 5)
