"""Inception-v3 as FID knows it, the TensorFlow graph of 2015-12-05, for one image."""

from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from memsep_jax.checks import check_leaves

SIDE = 299  # pixels that the network takes
# Of `prepared`: the part of a pixel by which coordinates are moved, and the value that
# becomes 0.
WAYS = {"pytorch-fid": (0.5, 127.5), "torch-fidelity": (0.0, 128.0)}
# The leaves of a batch normalisation and their first values: at init it does nothing.
STATISTICS = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}

halved = partial(nn.max_pool, window_shape=(3, 3), strides=(2, 2))
largest = partial(nn.max_pool, window_shape=(3, 3), padding="SAME")
# A mean over the pixels inside the image: TensorFlow does not count its padding.
average = partial(
    nn.avg_pool, window_shape=(3, 3), padding="SAME", count_include_pad=False
)


class Inception(nn.Module):
    """An image's 2048 pool features, and its 1008 logits.

    Parameters have the names and the layout of the PyTorch state dict.

    Args: like, the package that images are resized and scaled as: see `prepared`.
    Source: Szegedy 2015; Heusel 2017, by pytorch-fid 0.3.0 and torch-fidelity 0.4.0.
    """

    like: str = "pytorch-fid"

    @nn.compact
    def __call__(self, x):
        """x [h, w, 3] of 0 .. 255 -> features [2048], logits [1008]."""
        conv = self._conv
        x = conv(prepared(x, self.like), "Conv2d_1a_3x3", 32, 3, halve=True)
        x = conv(x, "Conv2d_2a_3x3", 32, 3, padding="VALID")
        x = halved(conv(x, "Conv2d_2b_3x3", 64, 3))
        x = conv(x, "Conv2d_3b_1x1", 80, 1)
        x = halved(conv(x, "Conv2d_4a_3x3", 192, 3, padding="VALID"))
        x = self._block_a(x, "Mixed_5b", 32)
        x = self._block_a(x, "Mixed_5c", 64)
        x = self._block_a(x, "Mixed_5d", 64)
        x = self._block_b(x, "Mixed_6a")
        x = self._block_c(x, "Mixed_6b", 128)
        x = self._block_c(x, "Mixed_6c", 160)
        x = self._block_c(x, "Mixed_6d", 160)
        x = self._block_c(x, "Mixed_6e", 192)
        x = self._block_d(x, "Mixed_7a")
        x = self._block_e(x, "Mixed_7b", average)
        # A maximum, by a slip in the graph of 2015, on which every FID depends.
        x = self._block_e(x, "Mixed_7c", largest)
        features, init = jnp.mean(x, (0, 1)), nn.initializers.lecun_normal(1, 0)
        weight = self.param("fc.weight", init, (1008, 2048))
        bias = self.param("fc.bias", nn.initializers.zeros, (1008,))
        return features, jnp.matmul(weight, features, precision="highest") + bias

    # The blocks of Szegedy 2015, figures 5 to 7, under their names in torchvision: each
    # concatenates the ends of its branches.

    def _block_a(self, x, name, pooled):
        conv = partial(self._conv, block=name)
        one = conv(x, "branch1x1", 64, 1)
        five = conv(conv(x, "branch5x5_1", 48, 1), "branch5x5_2", 64, 5)
        three = conv(x, "branch3x3dbl_1", 64, 1)
        three = conv(three, "branch3x3dbl_2", 96, 3)
        three = conv(three, "branch3x3dbl_3", 96, 3)
        pool = conv(average(x), "branch_pool", pooled, 1)
        return jnp.concatenate([one, five, three, pool], axis=-1)

    def _block_b(self, x, name):
        conv = partial(self._conv, block=name)
        three = conv(x, "branch3x3", 384, 3, halve=True)
        double = conv(x, "branch3x3dbl_1", 64, 1)
        double = conv(double, "branch3x3dbl_2", 96, 3)
        double = conv(double, "branch3x3dbl_3", 96, 3, halve=True)
        return jnp.concatenate([three, double, halved(x)], axis=-1)

    def _block_c(self, x, name, inner):
        conv = partial(self._conv, block=name)
        one = conv(x, "branch1x1", 192, 1)
        seven = conv(x, "branch7x7_1", inner, 1)
        seven = conv(seven, "branch7x7_2", inner, (1, 7))
        seven = conv(seven, "branch7x7_3", 192, (7, 1))
        double = conv(x, "branch7x7dbl_1", inner, 1)
        double = conv(double, "branch7x7dbl_2", inner, (7, 1))
        double = conv(double, "branch7x7dbl_3", inner, (1, 7))
        double = conv(double, "branch7x7dbl_4", inner, (7, 1))
        double = conv(double, "branch7x7dbl_5", 192, (1, 7))
        pool = conv(average(x), "branch_pool", 192, 1)
        return jnp.concatenate([one, seven, double, pool], axis=-1)

    def _block_d(self, x, name):
        conv = partial(self._conv, block=name)
        three = conv(x, "branch3x3_1", 192, 1)
        three = conv(three, "branch3x3_2", 320, 3, halve=True)
        seven = conv(x, "branch7x7x3_1", 192, 1)
        seven = conv(seven, "branch7x7x3_2", 192, (1, 7))
        seven = conv(seven, "branch7x7x3_3", 192, (7, 1))
        seven = conv(seven, "branch7x7x3_4", 192, 3, halve=True)
        return jnp.concatenate([three, seven, halved(x)], axis=-1)

    def _block_e(self, x, name, pool):
        conv = partial(self._conv, block=name)

        def fork(x, branch):  # two convolutions side by side
            wide = conv(x, f"{branch}a", 384, (1, 3))
            return [wide, conv(x, f"{branch}b", 384, (3, 1))]

        one = conv(x, "branch1x1", 320, 1)
        three = fork(conv(x, "branch3x3_1", 384, 1), "branch3x3_2")
        double = conv(conv(x, "branch3x3dbl_1", 448, 1), "branch3x3dbl_2", 384, 3)
        double = fork(double, "branch3x3dbl_3")
        pooled = conv(pool(x), "branch_pool", 192, 1)
        return jnp.concatenate([one, *three, *double, pooled], axis=-1)

    def _conv(self, x, name, channels, size, halve=False, padding="SAME", block=""):
        """Convolution, batch normalisation with stored statistics, ReLU.

        A convolution that halves the resolution has stride 2 and no padding.
        """
        name = f"{block}.{name}" if block else name
        shape = channels, x.shape[-1], *np.broadcast_to(size, 2).tolist()
        kernel = self.param(
            f"{name}.conv.weight", nn.initializers.he_normal(1, 0), shape
        )
        scale, bias, mean, variance = (
            self.param(f"{name}.bn.{leaf}", nn.initializers.constant(value), shape[:1])
            for leaf, value in STATISTICS.items()
        )
        # Folded into the kernel: one product fewer for each pixel. The epsilon is that
        # of TensorFlow's graph, not PyTorch's default of 1e-5.
        scale = scale * jax.lax.rsqrt(variance + 1e-3)
        x = jax.lax.conv_general_dilated(
            x[None],
            kernel * scale[:, None, None, None],
            (2, 2) if halve else (1, 1),
            "VALID" if halve else padding,
            dimension_numbers=("NHWC", "OIHW", "NHWC"),
            precision="highest",
        )[0]
        return nn.relu(x + (bias - mean * scale)[None, None])


def prepared(x, like: str = "pytorch-fid"):
    """An image as the network takes it: bilinear to 299 x 299, about -1 to 1.

    pytorch-fid aligns the borders of the two images and maps 0 .. 255 to -1 .. 1.
    torch-fidelity, like TensorFlow 1, aligns the centres of their first pixels and maps
    0 .. 256 to -1 .. 1. Neither filters an image that it shrinks.

    Args: x [h, w, 3] of 0 .. 255.   Returns: [299, 299, 3] float32.
    """
    if like not in WAYS:
        raise ValueError(f"like={like!r} must be one of {', '.join(WAYS)}")
    centre, half = WAYS[like]
    x = (x.astype(jnp.float32) - half) / half
    for axis, n in enumerate(x.shape[:2]):
        # As a product of matrices, because jax.image.resize knows the first alignment
        # only, and an FID depends on it.
        places = (np.arange(SIDE) + centre) * n / SIDE - centre
        gaps = np.clip(places, 0, n - 1)[:, None] - np.arange(n)
        weights = np.maximum(1 - np.abs(gaps), 0).astype(np.float32)  # [299, n]
        product = jnp.tensordot(weights, x, (1, axis), precision="highest")
        x = jnp.moveaxis(product, 0, axis)
    return x


@cache
def shapes():
    """The shape of each parameter, by name."""
    image = jax.ShapeDtypeStruct((SIDE, SIDE, 3), jnp.float32)
    params = jax.eval_shape(Inception().init, jax.random.key(0), image)["params"]
    return {name: leaf.shape for name, leaf in params.items()}


def params_of(tensors):
    """The parameters, from the tensors by name of a PyTorch FID state dict.

    Raises: ValueError: a line for each that is missing, unexpected or mismatched.
    """
    # A counter of batches seen in training, which PyTorch saves and nothing here reads.
    tensors = {n: a for n, a in tensors.items() if not n.endswith("batches_tracked")}
    check_leaves({name: a.shape for name, a in tensors.items()}, shapes())
    return {name: np.asarray(tensors[name], np.float32) for name in shapes()}
