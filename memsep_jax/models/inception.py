"""Inception-v3 as FID knows it, the TensorFlow graph of 2015-12-05, for one image."""

from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from memsep_jax.checks import check_leaves

SIDE = 299  # pixels
WAYS = {"pytorch-fid": (0.5, 127.5), "torch-fidelity": (0.0, 128.0)}  # of `prepared`

# A block is its branches, their ends concatenated; a branch, its name and its steps: a
# pool, or a convolution as channels@size, /2 where it has that stride and no padding.
A = "1x1 64@1, 5x5 48@1 64@5, 3x3dbl 64@1 96@3 96@3, _pool average {}@1"
B = "3x3 384@3/2, 3x3dbl 64@1 96@3 96@3/2, _pool halved"
C = "1x1 192@1, 7x7 {0}@1 {0}@1x7 192@7x1, "
C += "7x7dbl {0}@1 {0}@7x1 {0}@1x7 {0}@7x1 192@1x7, _pool average 192@1"
D = "3x3 192@1 320@3/2, 7x7x3 192@1 192@1x7 192@7x1 192@3/2, _pool halved"
E = "1x1 320@1, 3x3 384@1 fork, 3x3dbl 448@1 384@3 fork, _pool {} 192@1"
BLOCKS = [A.format(32), A.format(64), A.format(64), B]
BLOCKS += [*map(C.format, (128, 160, 160, 192)), D]
BLOCKS += [E.format("average"), E.format("largest")]  # a slip that is a part of FID
NAMES = "5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"
FORK = {"a": "384@1x3", "b": "384@3x1"}  # side by side
POOLS = {
    "average": partial(nn.avg_pool, padding="SAME", count_include_pad=False),
    "largest": partial(nn.max_pool, padding="SAME"),
    "halved": partial(nn.max_pool, strides=(2, 2)),
}
STATISTICS = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}


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
        x = self._conv(prepared(x, self.like), "Conv2d_1a_3x3", "32@3/2")
        x = self._conv(x, "Conv2d_2a_3x3", "32@3", "VALID")
        x = POOLS["halved"](self._conv(x, "Conv2d_2b_3x3", "64@3"), (3, 3))
        x = self._conv(x, "Conv2d_3b_1x1", "80@1")
        x = POOLS["halved"](self._conv(x, "Conv2d_4a_3x3", "192@3", "VALID"), (3, 3))
        for name, block in zip(NAMES, BLOCKS, strict=True):
            branches = [f"Mixed_{name}.branch{branch}" for branch in block.split(", ")]
            x = jnp.concatenate([self._branch(x, branch) for branch in branches], -1)
        features, init = jnp.mean(x, (0, 1)), nn.initializers.lecun_normal(1, 0)
        weight = self.param("fc.weight", init, (1008, 2048))
        bias = self.param("fc.bias", nn.initializers.zeros, (1008,))
        return features, jnp.matmul(weight, features, precision="highest") + bias

    def _branch(self, x, branch):
        name, *steps = branch.split()
        numbered = len(steps) > 1 and steps[0] not in POOLS
        for number, step in enumerate(steps, 1):
            if step in POOLS:
                x = POOLS[step](x, (3, 3))
                continue
            end = f"{name}_{number}" if numbered else name
            sides = FORK if step == "fork" else {"": step}
            ends = [self._conv(x, end + suffix, one) for suffix, one in sides.items()]
            x = jnp.concatenate(ends, axis=-1)
        return x

    def _conv(self, x, name, step, padding="SAME"):
        """Convolution, batch normalisation with stored statistics, ReLU."""
        halved, (channels, size) = "/" in step, step.removesuffix("/2").split("@")
        sides = np.broadcast_to([int(n) for n in size.split("x")], 2)
        shape, init = (
            (int(channels), x.shape[-1], *sides),
            nn.initializers.he_normal(1, 0),
        )
        kernel = self.param(f"{name}.conv.weight", init, shape)
        scale, bias, mean, variance = (
            self.param(f"{name}.bn.{leaf}", nn.initializers.constant(value), shape[:1])
            for leaf, value in STATISTICS.items()
        )
        scale = scale * jax.lax.rsqrt(variance + 1e-3)
        x = jax.lax.conv_general_dilated(
            x[None],
            kernel * scale[:, None, None, None],
            (2, 2) if halved else (1, 1),
            "VALID" if halved else padding,
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
    tensors = {n: a for n, a in tensors.items() if not n.endswith("batches_tracked")}
    check_leaves(tensors, shapes())
    return {name: np.asarray(tensors[name], np.float32) for name in shapes()}
