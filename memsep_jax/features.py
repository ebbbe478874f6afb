"""Images as points: the features in which samples and training images are compared."""

import functools
import hashlib
import io
import math
import zipfile
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memsep_jax import checkpoint, train
from memsep_jax.data.arrays import from_uint8
from memsep_jax.models import alexnet as alex
from memsep_jax.models import inception as incept
from memsep_jax.weights import WeightsError, read

# pytorch-fid's pt_inception-2015-12-05-6726825d.pth; torch-fidelity has the same file.
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
ALEXNET_SHA256 = "6faf059eae0b7101c34eef0b4866518550ae74bc1d9743d4f75653d04f262716"
# The true file holds 10 million; more is not read, so that a wrong one cannot fill the
# memory.
ALEXNET_BYTES = 64 * 2**20
RANDOM_WIDTHS = (64, 192, 256)  # channels of the layers; 512 together
CLASSIFIER_FEATURES, CLASSIFIER_STEPS, CLASSIFIER_BATCH = 128, 1_000, 64
# Floats beyond this are no images in [-1, 1], but perhaps pixels of 0 .. 255; samples
# that overshoot [-1, 1] a little stay far below it.
FAR = 10.0


class Extractor(NamedTuple):
    """Features of images, and how to speak of them."""

    name: str  # "inception", and whether its weights are the known ones
    title: str  # of a Frechet distance on them: "FID" where it is one
    # ([m, h, w, c] uint8, or floats in [-1, 1]; memory=inf) -> [m, dim] float32.
    # It takes as many images at a time as the memory, in bytes, allows beside images
    # and features, and never more than its `chunk`.
    apply: Callable
    dim: int
    least: Callable[[], int]  # bytes that one image takes in the network
    note: str = ""  # how it was trained, if it was trained here
    # The digest of its weights, by which features are known again; None: made anew.
    digest: Callable[[], str] | None = None


def pixels(shape) -> Extractor:
    """The image itself.   Args: shape, (h, w, c)."""

    size = math.prod(shape)

    def least():  # two copies as floats, while bytes are converted
        return 8 * size

    def apply(images, memory=math.inf):
        step = _together(memory, least, max(1, len(images)))
        points = np.empty((len(images), size), np.float32)
        for i in range(0, len(images), step):
            x = _floats(images[i : i + step], shape, np.inf)
            points[i : i + step] = x.reshape(len(x), size)
        return points

    return Extractor("pixels", "FD (pixels)", apply, size, least)


def inception(
    shape, path=None, chunk: int = 64, like: str = "pytorch-fid"
) -> Extractor:
    """The 2048 pool features of Inception-v3. FID is defined on these, and no others.

    Floats are rounded to the 256 levels of an image file first.

    Args:
      shape: (h, w, c), c being 1 or 3.
      path: a .safetensors file made by tools/convert_inception.py.
      chunk: images at a time, at most.
      like: see `models.inception.prepared`.
    Raises:
      WeightsError: none there, damaged, or of another network. Weights that are not
        known to be the standard ones are taken, and their distance is no FID.
    Source: Heusel 2017 (arXiv 1706.08500).
    """
    _check_images("inception", shape, (1, 3))
    if path is None:
        raise WeightsError(
            "inception has no weights here: fetch pytorch-fid's file "
            "pt_inception-2015-12-05-6726825d.pth, make a .safetensors file of it by "
            "tools/convert_inception.py, and give its path"
        )
    tensors, about = read(path)
    params = _fitted(incept.params_of, tensors, path)
    # The converter wrote the digest of all tensors: a flipped bit would pass every
    # check of shapes and change the FID.
    if "digest" in about and about["digest"] != checkpoint.digest(tensors):
        raise WeightsError(
            f"{path}: damaged (other tensors than in its digest); convert it again"
        )
    standard = "digest" in about and about.get("standard") == "true"
    network = incept.Inception(like)

    def one(params, x):
        # Reference features come from image files, which hold 256 levels.
        levels = jnp.round((_colours(x) + 1) * 127.5)
        return network.apply({"params": params}, levels)[0]

    name = "inception" if standard else "inception, unverified weights"
    extractor = _extractor(name, one, params, shape, chunk)
    return extractor._replace(title="FID") if standard else extractor


def alexnet(shape, path=None, chunk: int = 256) -> Extractor:
    """The mean of AlexNet's last map for the image at 64 x 64: 256 features.

    Args: as `inception`; path, of an .npz file with the names of `models.alexnet`.
    Raises: WeightsError: none there, damaged, or of another network.
    """
    return _alexnet("alexnet", alex.pooled, shape, path, chunk)


def lpips(shape, path=None, chunk: int = 64) -> Extractor:
    """Points whose squared distance is LPIPS, of images at 64 x 64: 31,872 features.

    They are for neighbours: few sets have enough images for their covariance.

    Args, Raises: as `alexnet`.   Source: Zhang 2018 (arXiv 1801.03924).
    """

    def one(params, x):
        return alex.embedding(params, alex.resized(x))

    return _alexnet("lpips", one, shape, path, chunk)


def random_conv(shape, seed: int = 0, chunk: int = 256) -> Extractor:
    """Means over the image of three layers of random convolutions: 512 features.

    They need no weights and no labels, and suit images that are no photographs.

    Args: shape, (h, w, c), any sides and channels.   seed: of the weights.
    Source: Naeem 2020 (arXiv 2002.09797), random embeddings.
    """
    _check_images("random_conv", shape)
    layers = _layers(jax.random.key(seed), shape[2], RANDOM_WIDTHS)

    def one(layers, x):
        return jnp.concatenate([jnp.mean(h, (0, 1)) for h in _convolved(layers, x)])

    return _extractor("random_conv", one, layers, shape, chunk)


def classifier(
    shape, images, labels, seed: int = 0, chunk: int = 256, memory: float = math.inf
) -> Extractor:
    """128 features of a small network that is trained here to tell the labels.

    Args:
      shape: (h, w, c).   images [n, h, w, c], labels [n]: what it is trained on.
      memory: bytes that its training may take. If they are few, batches are split; the
        gradient is that of the whole batch.
    Returns: an Extractor whose note has its accuracy on its training images.
    Raises: ValueError: fewer than two labels, or not one for each image.
    """
    _check_images("classifier", shape)
    images, given = np.asarray(images), np.asarray(labels)
    if given.shape != (len(images),) or len(np.unique(given)) < 2:
        raise ValueError(
            f"classifier needs a label for each of {len(images)} images, and two kinds "
            f"of them, not labels of shape {given.shape}: take random_conv"
        )
    kinds, labels = np.unique(given, return_inverse=True)
    conv_key, hidden_key, out_key, step_key = jax.random.split(jax.random.key(seed), 4)
    # Convolutions down to 8 pixels per side, two at least.
    deeper = max(1, math.ceil(math.log2(min(shape[:2]) / 8)) - 1)
    layers = _layers(conv_key, shape[2], (32,) + deeper * (64,))

    def ends(layers, x):
        return _convolved(layers, x)[-1].reshape(-1)

    def seen(params, x):
        return jax.nn.relu(ends(params["conv"], x) @ params["hidden"])

    normal = jax.nn.initializers.he_normal()
    size = jax.eval_shape(ends, layers, jnp.zeros(shape)).size
    params = {
        "conv": layers,
        "hidden": normal(hidden_key, (size, CLASSIFIER_FEATURES)),
        "out": normal(out_key, (CLASSIFIER_FEATURES, len(kinds))),
    }

    def loss(params, example, key):
        x, label = example
        return -jax.nn.log_softmax(seen(params, x) @ params["out"])[label]

    tx = train.adam(1e-3, schedule="cosine", steps=CLASSIFIER_STEPS)
    extractor = _extractor("classifier", seen, params, shape, chunk)
    # The gradient needs the maps of all layers, and their gradients, at once.
    together = _together(memory, lambda: 3 * extractor.least(), CLASSIFIER_BATCH)
    parts = CLASSIFIER_BATCH // together
    step = jax.jit(train.make_train_step(loss, tx, 0.0, parts), donate_argnums=0)
    state, rng = train.init(params, tx), np.random.default_rng(seed)
    for _ in range(CLASSIFIER_STEPS):
        batch = rng.integers(len(images), size=CLASSIFIER_BATCH)
        state, _ = step(state, (_floats(images[batch], shape), labels[batch]), step_key)
    extractor = _extractor("classifier", seen, state.params, shape, chunk)
    scores = extractor.apply(images, memory) @ np.asarray(state.params["out"])
    share = np.mean(np.argmax(scores, axis=1) == labels)
    note = (
        f"trained on {len(images)} images of {len(kinds)} labels, right on {share:.1%}"
    )
    return extractor._replace(note=note)


FEATURES: dict[str, Callable[..., Extractor]] = {
    "pixels": pixels,
    "inception": inception,
    "alexnet": alexnet,
    "lpips": lpips,
    "random_conv": random_conv,
    "classifier": classifier,
}


def from_file(path, n: int) -> np.ndarray:
    """Features of n images that another program made: [n, d] float32.

    Args: path, of an .npy file of numbers, in the order of the images.
    Raises: WeightsError: missing, damaged, not finite, or of other images.
    """
    try:
        # Mapped, so that a header with a false size is noticed before memory is taken.
        mapped = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, OverflowError) as error:
        raise WeightsError(
            f"{path}: no readable .npy of numbers ({error}); save features by "
            "np.save(path, features), [n, d] float32: nothing is ever unpickled"
        ) from error
    if mapped.dtype.kind not in "fiu" or mapped.ndim != 2 or len(mapped) != n:
        raise WeightsError(
            f"{path}: features of {n} images are numbers [{n}, d], not {mapped.dtype} "
            f"{list(mapped.shape)}"
        )
    # What float32 cannot hold becomes infinite, and is refused with the rest.
    with np.errstate(over="ignore"):
        result = np.array(mapped, np.float32)
    if not np.isfinite(result).all():
        rows = np.flatnonzero(~np.isfinite(result).all(axis=1))
        raise WeightsError(
            f"{path}: NaN or infinite in {len(rows)} rows, the first of them {rows[0]}"
        )
    return result


def _layers(key, inputs, widths):
    """Random kernels of 3 x 3, and biases: one pair for each of the widths."""
    normal, layers = jax.nn.initializers.he_normal(), []
    keys = jax.random.split(key, len(widths))
    for k, width in zip(keys, widths, strict=True):
        layers.append((normal(k, (3, 3, inputs, width)), jnp.zeros(width)))
        inputs = width
    return layers


def _convolved(layers, h):
    """The maps after ReLU, of half the last one's sides while they are above 8."""
    maps = []
    for kernel, bias in layers:
        stride = 2 if min(h.shape[:2]) > 8 else 1
        h = jax.lax.conv_general_dilated(
            h[None],
            kernel,
            (stride, stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision="highest",
        )[0]
        h = jax.nn.relu(h + bias[None, None])
        maps.append(h)
    return maps


def _extractor(name, one, params, shape, chunk):
    """The extractor of `one`: (params, x [h, w, c] float32) -> [dim].

    It is compiled for powers of two images: few images are not padded to a whole chunk,
    and there are never more programs than a chunk has bits.
    """
    if chunk < 1:
        raise ValueError(f"chunk={chunk} images must be 1 or more")
    # Parameters are arguments: as constants they would be compiled into each program.
    run, params = jax.jit(jax.vmap(one, (None, 0))), jax.device_put(params)

    def traced(size):
        return run.trace(params, jax.ShapeDtypeStruct((size, *shape), jnp.float32))

    @functools.cache
    def program(size):
        return traced(size).lower().compile()

    def least():
        known = program(1).memory_analysis()
        temporary = 0 if known is None else known.temp_size_in_bytes
        # While an image of bytes is converted, there are three copies as floats.
        return temporary + _patches(traced(1).jaxpr) + 12 * math.prod(shape) + 4 * dim

    def apply(images, memory=math.inf):
        most = _together(memory, least, chunk)
        pieces = [np.zeros((0, dim), np.float32)]
        for start in range(0, len(images), most):
            x = _floats(images[start : start + most], shape)
            # The next power of two, but no more than the memory allows.
            size = min(most, 1 << (len(x) - 1).bit_length())
            whole = np.zeros((size, *shape), np.float32)
            whole[: len(x)] = x
            # Wait: np.asarray of a result that found no memory would end the process.
            result = jax.block_until_ready(program(size)(params, whole))
            pieces.append(np.asarray(result)[: len(x)])
        return np.concatenate(pieces)

    dim = traced(1).out_info.shape[1]

    def digest():
        return checkpoint.digest(params)

    return Extractor(name, f"FD ({name})", apply, dim, least, digest=digest)


def _together(memory, each, most) -> int:
    """How many pieces of each() bytes fit: `most`, or a power of two below it."""
    if memory == math.inf:  # then nothing need be compiled to count its bytes
        return most
    fit = int(memory // each())
    return most if fit >= most else 1 << max(0, fit.bit_length() - 1)


def _patches(jaxpr) -> int:
    """Bytes of the largest map unrolled into its patches, as a CPU convolves it.

    XLA does not count them, since a convolution allocates them while it runs.
    """
    sizes = [0]
    for equation in jaxpr.eqns:
        known = equation.params
        if equation.primitive is jax.lax.conv_general_dilated_p:
            out, kernel = equation.outvars[0].aval, equation.invars[1].aval
            channels = out.shape[known["dimension_numbers"].out_spec[1]]
            patch = kernel.size // channels * out.dtype.itemsize
            sizes.append(out.size // channels * patch)
        inner = [a for a in known.values() if hasattr(a, "eqns")]
        sizes += [_patches(a) for a in inner]
    return max(sizes)


def _floats(images, shape, far=FAR):
    """Images as float32 in [-1, 1].   Raises: ValueError where they are none."""
    images = np.asarray(images)
    if images.shape[1:] != tuple(shape):
        raise ValueError(
            f"images of shape {images.shape[1:]} where features are of {tuple(shape)}: "
            "resize them"
        )
    if images.dtype == np.uint8:
        return from_uint8(images)
    if images.dtype.kind != "f" or not np.all(np.abs(images) < far):
        raise ValueError(
            f"images of {images.dtype} must be uint8 of 0 .. 255, or finite floats in "
            "[-1, 1]: x / 127.5 - 1"
        )
    return images.astype(np.float32)


def _check_images(name, shape, channels=()):
    if len(shape) != 3 or (channels and shape[2] not in channels):
        some = " or ".join(map(str, channels)) or "c"
        raise ValueError(f"{name} sees images [h, w, {some}], not {tuple(shape)}")


def _colours(x):
    """x [h, w, 1 or 3] -> [h, w, 3], clipped to the range of an image file."""
    return jnp.broadcast_to(jnp.clip(x, -1, 1), (*x.shape[:2], 3))


def _fitted(params_of, tensors, path):
    try:
        return params_of(tensors)
    except ValueError as error:
        raise WeightsError(f"{path}: of another network\n{error}") from error


def _alexnet(name, of, shape, path, chunk):
    """The extractor of (params, x [h, w, 3]) -> [dim], with the weights at path."""
    _check_images(name, shape, (1, 3))
    if path is None:
        raise WeightsError(
            f"{name} has no weights here: give the path of an .npz file with the names "
            "in memsep_jax/models/alexnet.py"
        )
    try:
        data, tensors = _npz(path)
    except Exception as error:  # numpy, zipfile and zlib each fail in their own way
        raise WeightsError(
            f"{path}: not a readable .npz of numbers ({error}); get the file again"
        ) from error
    params = _fitted(alex.params_of, tensors, path)
    if hashlib.sha256(data).hexdigest() != ALEXNET_SHA256:
        name = f"{name}, unverified weights"
    return _extractor(name, lambda p, x: of(p, _colours(x)), params, shape, chunk)


def _npz(path):
    """The bytes of an .npz file, and its arrays by name."""
    with open(path, "rb") as file:
        data = file.read(ALEXNET_BYTES)
    # From the bytes that were read and hashed: the file may change meanwhile.
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        size = sum(member.file_size for member in archive.infolist())
    if size > ALEXNET_BYTES:  # a small file may unpack to a large one
        raise ValueError(f"{size:,} bytes unpacked, of at most {ALEXNET_BYTES:,}")
    return data, dict(np.load(io.BytesIO(data), allow_pickle=False))
