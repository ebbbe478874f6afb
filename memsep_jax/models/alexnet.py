"""AlexNet's convolutions for one image: pooled features, and the distance LPIPS.

Functions of parameters with flat names: AlexNet_0/Conv_{0..4}/{kernel,bias} (HWIO),
and NetLinLayer_{0..4}/Conv_0/kernel for the weights of LPIPS.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from memsep_jax.checks import check_leaves
from memsep_jax.roots import root

SIDE = 64  # pixels of an image whose features are pooled
# Pixels: 31 leave maps of 7, 3 and 1 pixels a side; with fewer the last are empty.
SMALLEST = 31
# Mean and deviation of red, green and blue in ImageNet, for images in [-1, 1], as the
# weights of LPIPS expect them.
SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
SCALE = np.array([0.458, 0.448, 0.450], np.float32)
# Channels, size of the kernel, stride, padding.
LAYERS = (
    (64, 11, 4, 2),
    (192, 5, 1, 2),
    (384, 3, 1, 1),
    (256, 3, 1, 1),
    (256, 3, 1, 1),
)


def maps(params, x):
    """The five feature maps after ReLU: of 64, 192, 384, 256 and 256 channels.

    Args: x [h, w, 3] in [-1, 1], of 31 pixels a side or more.
    Returns: a list of [h_l, w_l, c_l].
    Raises: ValueError: another shape.
    Source: Krizhevsky 2014 (arXiv 1404.5997); the scaling is that of Zhang 2018.
    """
    if x.ndim != 3 or x.shape[2] != 3 or min(x.shape[:2]) < SMALLEST:
        raise ValueError(
            f"alexnet takes an image [h, w, 3] of {SMALLEST} pixels a side or more, "
            f"not {x.shape}: resize it"
        )
    h, result = (x - SHIFT[None, None]) / SCALE[None, None], []
    for i, (_, _, stride, pad) in enumerate(LAYERS):
        name = f"AlexNet_0/Conv_{i}"
        if i in (1, 2):
            h = nn.max_pool(h, (3, 3), (2, 2))
        h = jax.lax.conv_general_dilated(
            h[None],
            params[f"{name}/kernel"],
            (stride, stride),
            [(pad, pad), (pad, pad)],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision="highest",  # else a GPU (TF32) and a CPU give other features
        )[0]
        h = nn.relu(h + params[f"{name}/bias"][None, None])
        result.append(h)
    return result


def resized(x):
    """x [h, w, c] -> [64, 64, c], bilinear, filtered if it shrinks."""
    return jax.image.resize(x, (SIDE, SIDE, x.shape[2]), "linear", precision="highest")


def pooled(params, x):
    """The mean over its pixels of the last feature map, of the image at 64 x 64.

    Args: x [h, w, 3] in [-1, 1].   Returns: [256].
    """
    return jnp.mean(maps(params, resized(x))[-1], (0, 1))


def embedding(params, x):
    """The point whose squared Euclidean distance to another image's is LPIPS v0.1.

    The feature maps, of unit norm over the channels in each pixel, times
    sqrt(w_l / (h_l w_l)), end to end: the nearest point is the image most alike.

    Args: x [h, w, 3] in [-1, 1], as in `maps`.   Returns: [d].
    Source: Zhang 2018 (arXiv 1801.03924), eq. 1.
    """
    parts = []
    for i, h in enumerate(maps(params, x)):
        # 1e-10 as in the authors' program: a pixel without any activation has norm 0.
        unit = h / (root(jnp.sum(h**2, axis=-1, keepdims=True)) + 1e-10)
        weights = params[f"NetLinLayer_{i}/Conv_0/kernel"].reshape(-1)
        unit = unit * jnp.sqrt(weights / (h.shape[0] * h.shape[1]))[None, None]
        parts.append(unit.reshape(-1))
    return jnp.concatenate(parts)


def distance(params, x, y):
    """LPIPS v0.1 of two images of one shape: x, y [h, w, 3] in [-1, 1] -> []."""
    return jnp.sum((embedding(params, x) - embedding(params, y)) ** 2)


def shapes():
    """The shape of each parameter, by name."""
    result, inputs = {}, 3
    for i, (channels, size, _, _) in enumerate(LAYERS):
        result[f"AlexNet_0/Conv_{i}/kernel"] = (size, size, inputs, channels)
        result[f"AlexNet_0/Conv_{i}/bias"] = (channels,)
        result[f"NetLinLayer_{i}/Conv_0/kernel"] = (1, 1, channels, 1)
        inputs = channels
    return result


def params_of(tensors):
    """The parameters, from arrays by name.

    Raises: ValueError: a line for each array that is missing, unexpected or misshaped;
      or weights of LPIPS below 0, with which it would not be a distance.
    """
    check_leaves({name: a.shape for name, a in tensors.items()}, shapes())
    heads = [f"NetLinLayer_{i}/Conv_0/kernel" for i in range(len(LAYERS))]
    below = [name for name in heads if np.min(tensors[name]) < 0]
    if below:
        raise ValueError(f"weights of LPIPS must not be below 0: {', '.join(below)}")
    return {name: np.asarray(a, np.float32) for name, a in tensors.items()}
