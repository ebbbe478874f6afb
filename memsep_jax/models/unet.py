"""U-Nets DDPM++ and NCSN++ (Song 2021), as Karras 2022 trains them, for one image."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from memsep_jax.models.layers import Conv, Dense, attend, check_label

VARIANTS = {  # the filter of each change of resolution, and the features of time
    "ddpm": ((1, 1), "positional"),
    "ncsn": ((1, 3, 3, 1), "fourier"),
}
FOURIER_SCALE = 16.0  # standard deviation of the frequencies, as in NCSN++


class GroupNorm(nn.Module):
    """Zero mean and unit variance in each group of channels, then a scale and a bias.

    Each channel is summed over its pixels before its group is: on a CPU the joint sum
    of `nn.GroupNorm` over (pixels, channels of a group) takes at least twice the time.
    """

    dtype: str = "float32"

    @nn.compact
    def __call__(self, h):
        """h [h, w, c] -> [h, w, c]."""
        channels = h.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))

        def mean(a):
            """The mean of each group, repeated for its channels.   [1, 1, c]."""
            means = jnp.mean(a, (0, 1)).reshape(groups(channels), -1).mean(1)
            return jnp.repeat(means, channels // groups(channels))[None, None]

        # Statistics are float32, whatever dtype is: bfloat16 keeps 8 bits, and a mean
        # over many pixels needs more.
        h = h.astype(jnp.promote_types(h.dtype, jnp.float32))
        h = h - mean(h)
        h = h * (jax.lax.rsqrt(mean(h**2) + 1e-6) * scale[None, None])
        h = h + bias[None, None]
        return h.astype(self.dtype)


class Attention(nn.Module):
    """h <- (h + W_O softmax(Q K^T / sqrt(c)) V) / sqrt 2, one head over all pixels."""

    dtype: str = "float32"

    @nn.compact
    def __call__(self, h):
        """h [h, w, c] -> [h, w, c]."""
        channels = h.shape[-1]
        inner = GroupNorm(self.dtype, name="norm")(h).reshape(-1, channels)
        # Scales of initial weights are EDM's, here and below: sqrt(.2) times the
        # xavier-uniform for attention, 1e-5 times for the last layer of a branch, which
        # so begins at almost nothing. As variances they are .2 and 1e-10.
        inner = _dense(3 * channels, 0.2, self.dtype, "qkv")(inner)
        inner = attend(*jnp.split(inner, 3, axis=1)).reshape(h.shape)
        inner = _dense(channels, 1e-10, self.dtype, "out")(inner)
        # The sum of two terms of unit variance has variance 2.
        return (h + inner) * np.sqrt(0.5).astype(h.dtype)


class Block(nn.Module):
    """Residual block: two convolutions, the embedding added between them.

    Args:
      resample: "up" or "down" by 2, inside the first convolution; "" for neither.
    """

    channels: int
    taps: tuple
    resample: str = ""
    attention: bool = False
    dropout: float = 0.0
    dtype: str = "float32"

    @nn.compact
    def __call__(self, h, embedding, train=False):
        """h [h, w, c], embedding [4 width] -> [h', w', channels]."""
        inner = nn.silu(GroupNorm(self.dtype, name="norm_in")(h))
        # In EDM's order: the filter first, then the convolution.
        inner = _conv(self.channels, 1.0, self.dtype, "conv_in")(
            resample(inner, self.taps, self.resample)
        )
        inner = inner + _dense(self.channels, 1.0, self.dtype, "embedding")(
            embedding[None, None]
        )
        inner = nn.silu(GroupNorm(self.dtype, name="norm_out")(inner))
        inner = nn.Dropout(self.dropout, deterministic=not train)(inner)
        inner = _conv(self.channels, 1e-10, self.dtype, "conv_out")(inner)
        # EDM has this layer in every block that changes resolution, too, even where
        # the number of channels stays.
        if self.resample or h.shape[-1] != self.channels:
            h = resample(h, self.taps, self.resample)
            h = _dense(self.channels, 1.0, self.dtype, "shortcut")(h)
        h = (h + inner) * np.sqrt(0.5).astype(h.dtype)
        return Attention(self.dtype, name="attention")(h) if self.attention else h


class UNet(nn.Module):
    """Residual blocks down to the lowest resolution and up again, with skips across.

    Args:
      width: base channels, a multiple of 4.
      depth: residual blocks per resolution.
      multipliers: of the base channels, one for each resolution.
      attention: heights of the feature maps that have self-attention; the lowest
        resolution always has it once.
      variant: "ddpm" (DDPM++), or "ncsn" (NCSN++), which feeds the image in again at
        each resolution, with Fourier features and smoother changes of resolution.
      time_embedding: "positional" or "fourier"; None for that of the variant.
      time_scale: multiplies t. Features of positions 0 .. 999 need 999 if t is the time
        in (0, 1], as with VP preconditioning (Karras 2022, table 1).
      frequencies: of Fourier features, for a network whose own differ from ours (None).
      dropout: rate, before the second convolution of each block.
      skips: a flag for each skip, len(multipliers) (depth + 1), highest resolution
        first; zeros replace a removed skip (Gu 2023). None: all.
      num_classes: 0 for an unconditional network.
      dtype: of the computation inside ("bfloat16" on GPU and TPU); parameters stay
        float32.
    Raises:
      ValueError: a line for each number that does not fit.

    Source: Song 2021, appendix C; Karras 2022, appendix F; Gu 2023 (arXiv 2310.02664).
    """

    width: int
    depth: int
    multipliers: tuple = (2, 2, 2)
    attention: tuple = (16,)
    variant: str = "ddpm"
    time_embedding: str | None = None
    time_scale: float = 1.0
    frequencies: tuple | None = None
    dropout: float = 0.0
    skips: tuple | None = None
    num_classes: int = 0
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x, t, label=None, gates=None, train=False):
        """x [h, w, c], t [], label [] int or None -> [h, w, c]. It takes no gates."""
        if gates is not None:
            raise ValueError("unet has no gates: prune a dit, or leave gates at None")
        self.check(x.shape)
        taps, _ = VARIANTS[self.variant]
        embedding = self._embedding(t, label).astype(self.dtype)
        flags = self.skips or (True,) * (len(self.multipliers) * (self.depth + 1))

        def block(h, channels, name, change="", attention=False):
            layer = Block(
                channels, taps, change, attention, self.dropout, self.dtype, name=name
            )
            return layer(h, embedding, train)

        h, image, skips = x, x, []
        for level, multiplier in enumerate(self.multipliers):
            name = f"encoder_{level}"
            if level == 0:
                h = _conv(self.width, 1.0, self.dtype, "input")(h)
            else:
                h = block(h, h.shape[-1], f"{name}_down", "down")
                if self.variant == "ncsn":
                    # The filter comes after the convolution, which is therefore padded
                    # by what the filter needs.
                    side = len(taps) // 2 - 1
                    image = _conv(h.shape[-1], 1.0, self.dtype, f"{name}_image", side)(
                        image
                    )
                    h = (h + _down(image, taps, 0)) * np.sqrt(0.5).astype(h.dtype)
                    image = h
            skips.append(h)
            for i in range(self.depth):
                attention = h.shape[0] in self.attention
                h = block(h, self.width * multiplier, f"{name}_{i}", "", attention)
                skips.append(h)
        h = block(h, h.shape[-1], "middle_0", attention=True)
        h = block(h, h.shape[-1], "middle_1")
        # Zeros, not a shorter concatenation: shapes and parameters stay the same, so
        # only the information of the skip is removed.
        skips = [
            s if kept else jnp.zeros_like(s)
            for s, kept in zip(skips, flags, strict=True)
        ]
        for level, multiplier in reversed(list(enumerate(self.multipliers))):
            name = f"decoder_{level}"
            if level < len(self.multipliers) - 1:
                h = block(h, h.shape[-1], f"{name}_up", "up")
            for i in range(self.depth + 1):
                # On the way up only the last block of a resolution has attention.
                attention = h.shape[0] in self.attention and i == self.depth
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = block(h, self.width * multiplier, f"{name}_{i}", "", attention)
        h = nn.silu(GroupNorm(self.dtype, name="norm")(h))
        # Back in float32: the loss and the score are not computed in bfloat16.
        return _conv(x.shape[-1], 1e-10, x.dtype, "output")(h.astype(x.dtype))

    def _embedding(self, t, label):
        """Time and, if there is one, a label as one vector.   [4 width]."""
        _, kind = VARIANTS[self.variant]
        # A sine and a cosine for each: width features, twice as many in NCSN++.
        count = self.width // 2 * (2 if self.variant == "ncsn" else 1)
        t = jnp.multiply(self.time_scale, t)
        if self.frequencies is None:
            h = FEATURES[self.time_embedding or kind](t, count)
        else:
            h = fourier_features(t, count, self.frequencies)
        check_label(label, self.num_classes)
        if self.num_classes:
            shape = self.num_classes, len(h)
            table = self.param("label", nn.initializers.xavier_uniform(), shape)
            bias = self.param("label_bias", nn.initializers.zeros, shape[1:])
            h = h + bias
            if label is not None:
                # The one-hot vector, scaled to variance 1, times the table, as a gather
                # of one row: one-hot vectors of n unique labels take n^2 numbers.
                # "No label" is beyond the table: zero.
                row = jnp.asarray(table).at[label].get(mode="fill", fill_value=0)
                h = h + np.sqrt(self.num_classes).astype(row.dtype) * row
        h = nn.silu(_dense(4 * self.width, 1.0, h.dtype, "embedding_in")(h))
        return nn.silu(_dense(4 * self.width, 1.0, h.dtype, "embedding_out")(h))

    def check(self, shape):
        """Raises ValueError if an image of this shape does not fit."""
        wrong = []
        levels = len(self.multipliers)
        if self.variant not in VARIANTS:
            wrong.append(
                f"variant={self.variant!r} is not one of {', '.join(VARIANTS)}"
            )
        if self.time_embedding not in (None, *FEATURES):
            wrong.append(
                f"time_embedding={self.time_embedding!r} is not one of "
                f"{', '.join(FEATURES)}; None is that of the variant"
            )
        if self.width < 4 or self.width % 4:
            wrong.append(
                f"width={self.width} must be a multiple of 4: a group of the "
                "norm has at least 4 channels"
            )
        elif not levels:
            wrong.append("multipliers=() is empty: give one for each resolution")
        elif all(type(some) is int and some > 0 for some in self.multipliers):
            uneven = [c for c in self._channels() if c % groups(c)]
            if uneven:
                wrong.append(
                    f"width={self.width} with multipliers="
                    f"{self.multipliers} normalises {uneven[0]} channels in "
                    f"{groups(uneven[0])} groups, which do not divide them: take a "
                    "multiple of 32"
                )
        if self.skips is not None and len(self.skips) != levels * (self.depth + 1):
            wrong.append(
                f"skips={self.skips} has {len(self.skips)} flags and must have "
                f"{levels * (self.depth + 1)}: for each of {levels} resolutions "
                f"{self.depth + 1}, one more than depth={self.depth}, highest first"
            )
        if len(shape) != 3:
            wrong.append(f"unet takes images [h, w, c], not data of shape {shape}")
        elif levels and any(side % 2 ** (levels - 1) for side in shape[:2]):
            wrong.append(
                f"multipliers={self.multipliers} halve the image {levels - 1} "
                f"times, so {2 ** (levels - 1)} must divide its sides, "
                f"{shape[0]}x{shape[1]}"
            )
        else:
            sides = [shape[0] >> level for level in range(levels)]
            absent = [side for side in self.attention if side not in sides]
            if absent:
                wrong.append(
                    f"attention={self.attention}: no level has the side "
                    f"{absent[0]}; they have {', '.join(map(str, sides))}"
                )
        if wrong:
            raise ValueError("\n".join(wrong))

    def _channels(self):
        """The numbers of channels that group norms normalise."""
        widths = [self.width * multiplier for multiplier in self.multipliers]
        depth = min(self.depth, 2)  # further blocks of a resolution repeat the second
        skips = [self.width]
        for level, width in enumerate(widths):
            skips += skips[-1:] * (level > 0) + [width] * depth
        seen, h = set(skips), widths[-1]
        for width in reversed(widths):
            for _ in range(depth + 1):
                seen.add(h + skips.pop())
                h = width
        return sorted(seen | set(widths))


def groups(channels: int) -> int:
    """The groups of a group norm: 32, or fewer so that each has 4 channels."""
    return min(32, channels // 4)


def positional_features(t, count: int):
    """sin, cos of t at frequencies log-spaced from 1 to 1e-4.   [] -> [2 count]."""
    # Both ends are included and sines come first, as in DDPM++; DiT does neither.
    angles = t * np.geomspace(1, 1e-4, count).astype(t.dtype)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)])


def fourier_features(t, count: int, frequencies=None):
    """sin, cos of 2 pi t f, with fixed f drawn from N(0, 16^2).   [] -> [2 count]."""
    if frequencies is None:
        # A fixed seed: they are constants and no parameters, so no checkpoint has them.
        frequencies = np.random.default_rng(0).normal(0, FOURIER_SCALE, count)
    angles = t * (2 * np.pi * np.asarray(frequencies)).astype(t.dtype)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)])


FEATURES = {"positional": positional_features, "fourier": fourier_features}


def resample(h, taps, change: str):
    """h [h, w, c] at twice ("up"), half ("down") or the same ("") resolution."""
    if change == "down":
        return _down(h, taps, len(taps) // 2 - 1)
    return _up(h, taps) if change == "up" else h


def _down(h, taps, pad):
    """Every second value of h filtered by taps / sum(taps), along both axes."""
    weights = _weights(taps, h.dtype)
    for axis in (0, 1):
        h = _padded(h, pad, axis)
        size = (h.shape[axis] - len(taps)) // 2 + 1
        # A sum of strided slices, because a convolution by channel is slow on CPUs.
        # Along one axis after the other: the filter is a product of two.
        h = sum(
            weight * jax.lax.slice_in_dim(h, k, k + 2 * size - 1, 2, axis)
            for k, weight in enumerate(weights)
        )
    return h


def _up(h, taps):
    """The transpose of `_down`, times 4: y[2 i + k - pad] += 2 w[k] x[i]."""
    weights = 2 * _weights(taps, h.dtype)
    pad, margin = len(taps) // 2 - 1, len(taps) // 4
    for axis in (0, 1):
        size, wide = h.shape[axis], _padded(h, margin, axis)

        def part(offset, size=size, wide=wide, axis=axis):
            start = margin + offset
            return jax.lax.slice_in_dim(wide, start, start + size, 1, axis)

        # Even and odd places see different taps; interleaved they are the result,
        # without a map that is half zeros.
        halves = [
            sum(
                weights[k] * part((parity + pad - k) // 2)
                for k in range((parity + pad) % 2, len(taps), 2)
            )
            for parity in (0, 1)
        ]
        shape = [n * (1 + (a == axis)) for a, n in enumerate(h.shape)]
        h = jnp.stack(halves, axis + 1).reshape(shape)
    return h


def _weights(taps, dtype):
    return (np.asarray(taps) / sum(taps)).astype(dtype)


def _padded(h, pad, axis):
    widths = [(pad * (a == axis),) * 2 for a in range(3)]
    return jnp.pad(h, widths) if pad else h


def _conv(channels, scale, dtype, name, wider=0):
    """3x3; scale is of the variance of xavier-uniform."""
    init, pad = nn.initializers.variance_scaling(scale, "fan_avg", "uniform"), 1 + wider
    return Conv(channels, (3, 3), padding=pad, kernel_init=init, dtype=dtype, name=name)


def _dense(channels, scale, dtype, name):
    """1x1; scale is of the variance of xavier-uniform."""
    init = nn.initializers.variance_scaling(scale, "fan_avg", "uniform")
    return Dense(channels, kernel_init=init, dtype=dtype, name=name)
