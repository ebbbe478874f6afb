"""U-Net and DiT as batches of images in PyTorch, written from the papers.

`benchmarks/train_step.py` and the tests compare ours with these. Modules have the names
of the leaves of our parameters, so that `load` can copy them.
"""

# ruff: noqa: D101, D102

import math

import numpy
import torch
from torch import nn
from torch.nn import functional as F


def load(module, params):
    """Copies a tree of our parameters into a module with the same names."""
    for name, value in params.items():
        if isinstance(value, dict):
            load(module[name] if isinstance(module, nn.ModuleDict) else
                 getattr(module, name), value)  # fmt: skip
            continue
        value = torch.tensor(value)
        if name == "kernel":
            weight = module.weight
            if weight.ndim == 4 and value.ndim == 4:  # [h, w, in, out]
                value = value.permute(3, 2, 0, 1)
            elif value.ndim == 3:  # of heads: in or out is two axes
                split_in = value.shape[-1] == weight.shape[0]
                value = value.flatten(0, 1) if split_in else value.flatten(1, 2)
            if value.ndim == 2:  # [in, out]
                value = value.T.reshape(weight.shape)
            target = weight
        else:
            target = getattr(module, "weight" if name == "scale" else name)
            value = value.reshape(target.shape)
        with torch.no_grad():
            target.copy_(value)
    return module


def images(x):
    """[b, h, w, c] of ours -> [b, c, h, w] here."""
    return torch.tensor(numpy.asarray(x)).permute(0, 3, 1, 2).contiguous()


def groups(channels):
    return min(32, channels // 4)


class Resample(nn.Module):
    """Filter and halve, or double and filter, each channel by itself."""

    def __init__(self, channels, taps, change):
        super().__init__()
        line = torch.tensor(taps, dtype=torch.float64)
        line = line / line.sum() * (2 if change == "up" else 1)
        kernel = torch.outer(line, line).float().expand(channels, 1, -1, -1)
        self.register_buffer("kernel", kernel.contiguous())
        self.change, self.plain = change, len(taps) == 2
        self.options = {"stride": 2, "padding": len(taps) // 2 - 1, "groups": channels}

    def forward(self, x):
        if self.plain and self.change == "down":
            return F.avg_pool2d(x, 2)
        if self.plain:
            return F.interpolate(x, scale_factor=2, mode="nearest")
        resize = F.conv2d if self.change == "down" else F.conv_transpose2d
        return resize(x, self.kernel, **self.options)


class Attention(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(groups(channels), channels, eps=1e-6)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=2)
        mixed = F.scaled_dot_product_attention(q, k, v)
        mixed = mixed.transpose(1, 2).reshape(x.shape)
        return (x + self.out(mixed)) * math.sqrt(0.5)


class Block(nn.Module):
    def __init__(self, c_in, c_out, width, taps, change, attention, dropout):
        super().__init__()
        self.norm_in = nn.GroupNorm(groups(c_in), c_in, eps=1e-6)
        self.conv_in = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.embedding = nn.Linear(4 * width, c_out)
        self.norm_out = nn.GroupNorm(groups(c_out), c_out, eps=1e-6)
        self.drop = nn.Dropout(dropout)
        self.conv_out = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.before = Resample(c_in, taps, change) if change else nn.Identity()
        project = change or c_in != c_out
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if project else nn.Identity()
        self.attention = Attention(c_out) if attention else nn.Identity()

    def forward(self, x, embedding):
        h = self.conv_in(self.before(F.silu(self.norm_in(x))))
        h = h + self.embedding(embedding)[:, :, None, None]
        h = self.conv_out(self.drop(F.silu(self.norm_out(h))))
        h = (h + self.shortcut(self.before(x))) * math.sqrt(0.5)
        return self.attention(h)


class UNet(nn.Module):
    """x [b, c, h, w], t [b], label [b] or None -> [b, c, h, w].

    `frequencies` of Fourier features are drawn, so they are given.
    """

    def __init__(
        self,
        side,
        channels,
        width,
        depth,
        multipliers=(2, 2, 2),
        attention=(16,),
        variant="ddpm",
        dropout=0.0,
        skips=None,
        num_classes=0,
        frequencies=None,
    ):
        super().__init__()
        self.ncsn, self.depth = variant == "ncsn", depth
        taps = (1, 3, 3, 1) if self.ncsn else (1, 1)
        self.multipliers, self.flags = multipliers, skips
        noise = width * (2 if self.ncsn else 1)
        if frequencies is None:
            steps = torch.arange(noise // 2, dtype=torch.float64) / (noise // 2 - 1)
            frequencies = 1e-4**steps
        else:
            frequencies = 2 * math.pi * torch.tensor(frequencies)
        self.register_buffer("frequencies", frequencies)
        self.num_classes = num_classes
        if num_classes:
            self.label = nn.Parameter(torch.zeros(num_classes, noise))
            self.label_bias = nn.Parameter(torch.zeros(noise))
        self.embedding_in = nn.Linear(noise, 4 * width)
        self.embedding_out = nn.Linear(4 * width, 4 * width)

        def block(c_in, c_out, change="", attention=False):
            return Block(c_in, c_out, width, taps, change, attention, dropout)

        self.input = nn.Conv2d(channels, width, 3, padding=1)
        self.blocks = nn.ModuleDict()
        c, kept, c_image = width, [width], channels
        for level, multiplier in enumerate(multipliers):
            name, attend = f"encoder_{level}", side >> level in attention
            if level:
                self.blocks[f"{name}_down"] = block(c, c, "down")
                if self.ncsn:
                    image = nn.Conv2d(c_image, c, 3, padding=len(taps) // 2)
                    self.blocks[f"{name}_image"] = image
                    self.blocks[f"{name}_shrink"] = Resample(c, taps, "down")
                    self.blocks[f"{name}_shrink"].options["padding"] = 0
                    c_image = c
                kept.append(c)
            for i in range(depth):
                self.blocks[f"{name}_{i}"] = block(c, width * multiplier, "", attend)
                c = width * multiplier
                kept.append(c)
        self.blocks["middle_0"] = block(c, c, "", True)
        self.blocks["middle_1"] = block(c, c)
        for level, multiplier in reversed(list(enumerate(multipliers))):
            name, attend = f"decoder_{level}", side >> level in attention
            if level < len(multipliers) - 1:
                self.blocks[f"{name}_up"] = block(c, c, "up")
            for i in range(depth + 1):
                self.blocks[f"{name}_{i}"] = block(
                    c + kept.pop(), width * multiplier, "", attend and i == depth
                )
                c = width * multiplier
        self.norm = nn.GroupNorm(groups(c), c, eps=1e-6)
        self.output = nn.Conv2d(c, channels, 3, padding=1)

    def __getattr__(self, name):
        blocks = self.__dict__.get("_modules", {}).get("blocks", {})
        return blocks[name] if name in blocks else super().__getattr__(name)

    def forward(self, x, t, label=None):
        angles = t[:, None] * self.frequencies.to(t.dtype)
        e = torch.cat([angles.sin(), angles.cos()], dim=1)
        if self.num_classes:
            e = e + self.label_bias
            if label is not None:
                one_hot = F.one_hot(label, self.num_classes).to(e.dtype)
                e = e + one_hot * math.sqrt(self.num_classes) @ self.label
        e = F.silu(self.embedding_out(F.silu(self.embedding_in(e))))
        h, image, kept = self.input(x), x, []
        for level in range(len(self.multipliers)):
            name = f"encoder_{level}"
            if level:
                h = self.blocks[f"{name}_down"](h, e)
                if self.ncsn:
                    image = self.blocks[f"{name}_shrink"](
                        self.blocks[f"{name}_image"](image)
                    )
                    h = image = (h + image) * math.sqrt(0.5)
            kept.append(h)
            for i in range(self.depth):
                h = self.blocks[f"{name}_{i}"](h, e)
                kept.append(h)
        if self.flags is not None:
            kept = [k * float(f) for k, f in zip(kept, self.flags, strict=True)]
        h = self.blocks["middle_1"](self.blocks["middle_0"](h, e), e)
        for level in reversed(range(len(self.multipliers))):
            name = f"decoder_{level}"
            if level < len(self.multipliers) - 1:
                h = self.blocks[f"{name}_up"](h, e)
            for i in range(self.depth + 1):
                h = self.blocks[f"{name}_{i}"](torch.cat([h, kept.pop()], dim=1), e)
        return self.output(F.silu(self.norm(h)))


class Heads(nn.Module):
    """Self-attention of several heads."""

    def __init__(self, width, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, h):
        q, k, v = (
            layer(h).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """A block of the transformer, with adaLN-zero."""

    def __init__(self, width, num_heads, ratio):
        super().__init__()
        self.modulation = nn.Linear(width, 6 * width)
        self.attention = Heads(width, num_heads)
        self.mlp_in = nn.Linear(width, int(ratio * width))
        self.mlp_out = nn.Linear(int(ratio * width), width)
        self.shape = (width,)

    def forward(self, h, embedding):
        parts = self.modulation(embedding)[:, None].chunk(6, dim=2)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = parts
        inner = F.layer_norm(h, self.shape, eps=1e-6) * (1 + scale_a) + shift_a
        h = h + gate_a * self.attention(inner)
        inner = F.layer_norm(h, self.shape, eps=1e-6) * (1 + scale_m) + shift_m
        inner = F.gelu(self.mlp_in(inner), approximate="tanh")
        return h + gate_m * self.mlp_out(inner)


class TimeAndLabel(nn.Module):
    def __init__(self, width, num_classes):
        super().__init__()
        self.time_in, self.time_out = nn.Linear(256, width), nn.Linear(width, width)
        self.num_classes = num_classes
        if num_classes:
            self.label = nn.Parameter(torch.zeros(num_classes + 1, width))

    def forward(self, t, label):
        steps = torch.arange(128, device=t.device, dtype=t.dtype) / 128
        angles = 1_000 * t[:, None] * 10_000.0**-steps
        h = self.time_in(torch.cat([angles.cos(), angles.sin()], dim=1))
        h = self.time_out(F.silu(h))
        return h if label is None else h + self.label[label]


class DiT(nn.Module):
    """x [b, c, h, w], t [b], label [b] or None -> [b, c, h, w]."""

    def __init__(
        self, side, channels, patch, width, depth, num_heads, num_classes=0, ratio=4.0
    ):
        super().__init__()
        self.patch, self.shape, self.rows = patch, (width,), side // patch
        self.embedding = TimeAndLabel(width, num_classes)
        self.patches = nn.Linear(patch**2 * channels, width)
        self.modulation = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, patch**2 * channels)
        self.depth = depth
        for i in range(depth):
            setattr(self, f"block_{i}", Layer(width, num_heads, ratio))
        frequencies = 10_000.0 ** -(
            torch.arange(width // 4, dtype=torch.float64) / (width // 4)
        )
        angles = torch.arange(self.rows)[:, None] * frequencies  # [rows, width / 4]
        by_row = angles[:, None].expand(-1, self.rows, -1)
        by_column = angles[None].expand(self.rows, -1, -1)
        features = [by_column.sin(), by_column.cos(), by_row.sin(), by_row.cos()]
        positions = torch.cat(features, dim=2).flatten(0, 1)
        self.register_buffer("positions", positions.float())

    def forward(self, x, t, label=None):
        p, rows, channels = self.patch, self.rows, x.shape[1]
        tokens = x.unflatten(3, (rows, p)).unflatten(2, (rows, p))
        tokens = tokens.permute(0, 2, 4, 3, 5, 1).reshape(len(x), rows**2, -1)
        h = self.patches(tokens) + self.positions.to(x.dtype)
        embedding = F.silu(self.embedding(t, label))
        for i in range(self.depth):
            h = getattr(self, f"block_{i}")(h, embedding)
        shift, scale = self.modulation(embedding)[:, None].chunk(2, dim=2)
        h = self.output(F.layer_norm(h, self.shape, eps=1e-6) * (1 + scale) + shift)
        h = h.reshape(len(x), rows, rows, p, p, channels)
        return h.permute(0, 5, 1, 3, 2, 4).reshape(x.shape)
