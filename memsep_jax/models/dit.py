"""Diffusion transformer with adaLN-zero (Peebles & Xie 2023), for one image."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from memsep_jax.models.layers import Dense, Embedding, attend


class Attention(nn.Module):
    """Self-attention with a gate per head: head h adds gate_h W_O^h (A_h V_h).

    With given parameters it has as many heads as they do: see `prune.compact`.
    """

    num_heads: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, h, gates=None):
        """h [tokens, width], gates [heads] or None -> [tokens, width]."""
        width = h.shape[-1]
        num_heads = _given(self, "query", 1, self.num_heads)
        if num_heads == 0:  # an initial scale of no heads would divide by their number
            bias = self.get_variable("params", "out")["bias"]
            return jnp.broadcast_to(bias.astype(self.dtype), h.shape)
        # The size of a head is that of the whole network, though some may be gone.
        shape = (num_heads, width // self.num_heads)
        init = nn.initializers.xavier_uniform()

        def project(name):
            layer = Dense(shape, kernel_init=init, dtype=self.dtype, name=name)
            return jnp.swapaxes(layer(h), 0, 1)  # heads first

        heads = attend(project("query"), project("key"), project("value"))
        heads = jnp.swapaxes(heads, 0, 1)
        _sow(self, "heads", heads, lambda a: jnp.mean(jnp.linalg.norm(a, axis=2), 0))
        # Before the product with W_O: there a gate is one number for each head, and its
        # gradient is <dL/dW_O^h, W_O^h>.
        if gates is not None:
            heads = heads * gates[None, :, None].astype(heads.dtype)
        out = Dense(
            width, axis=(-2, -1), kernel_init=init, dtype=self.dtype, name="out"
        )
        return out(heads)


class Block(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the embedding.

    It has three kinds of gates: "heads" [heads], "neurons" [hidden] of the MLP, and
    "blocks" [], which multiplies everything that the block adds.
    """

    num_heads: int
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    dtype: str = "float32"

    @nn.compact
    def __call__(self, h, embedding, gates=None, train=False):
        """h [tokens, width], embedding [width] (after silu) -> [tokens, width]."""
        gates, before = gates or {}, h
        width = h.shape[-1]
        init = nn.initializers.xavier_uniform()
        drop = nn.Dropout(self.dropout, deterministic=not train)
        modulation = _zero_dense(6 * width, self.dtype, "modulation")(embedding)
        # [6, 1, width]: one for all tokens.
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.reshape(
            6, 1, width
        )

        inner = _norm(self.dtype)(h) * (1 + scale_a) + shift_a
        attention = Attention(self.num_heads, self.dtype, name="attention")
        inner = attention(inner, gates.get("heads"))
        h = h + gate_a * drop(inner)

        inner = _norm(self.dtype)(h) * (1 + scale_m) + shift_m
        hidden = _given(self, "mlp_in", 1, int(self.mlp_ratio * width))
        inner = Dense(hidden, kernel_init=init, dtype=self.dtype, name="mlp_in")(inner)
        inner = nn.gelu(inner, approximate=True)  # by tanh, as in the release of DiT
        _sow(self, "neurons", inner, lambda a: jnp.mean(jnp.abs(a), axis=0))
        if "neurons" in gates:
            inner = inner * gates["neurons"][None].astype(inner.dtype)
        inner = Dense(width, kernel_init=init, dtype=self.dtype, name="mlp_out")(inner)
        h = h + gate_m * drop(inner)
        _sow(self, "blocks", h - before, lambda a: jnp.mean(jnp.linalg.norm(a, axis=1)))
        if "blocks" in gates:
            h = before + gates["blocks"].astype(h.dtype) * (h - before)
        return h


class DiT(nn.Module):
    """Patches -> tokens -> depth blocks -> patches.

    Its layers are those of the release of DiT, but some start wider. Queries, keys and
    values are drawn as three matrices, sqrt(2) wider than the release's one of all
    three (Xavier: by the sides of the matrix). The two layers of the time start with a
    deviation of 1 / sqrt(inputs), 1/16 and 1 / sqrt(width), where the release has 0.02.

    Args:
      patch: side of a patch; divides height and width of the image.
      num_heads: divides width.
      num_classes: 0 for an unconditional network.
      dtype: of the computation inside the blocks ("bfloat16" on GPU and TPU);
        parameters stay float32.
    Raises:
      ValueError: a side that patch, or a width that num_heads, does not divide.
    """

    patch: int
    width: int
    depth: int
    num_heads: int
    num_classes: int = 0
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x, t, label=None, gates=None, train=False):
        """x [h, w, c], t [], label [], gates [depth, heads] (or None) -> [h, w, c].

        Other gates are given by the name of their group: {"neurons": [depth, hidden]}
        or {"blocks": [1, depth]}; see `prune.GROUPS`.
        """
        self.check(x.shape)
        if gates is not None and not isinstance(gates, dict):
            gates = {"heads": gates}
        rows, columns = (side // self.patch for side in x.shape[:2])
        channels = x.shape[2]
        # A patch is flattened as (row, column, channel); `weights.dit` relies on it.
        tokens = x.reshape(rows, self.patch, columns, self.patch, channels)
        tokens = tokens.transpose(0, 2, 1, 3, 4).reshape(rows * columns, -1)
        init = nn.initializers.xavier_uniform()
        h = Dense(self.width, kernel_init=init, dtype=self.dtype, name="patches")(
            tokens
        )
        h = h + position_features(rows, columns, self.width).astype(h.dtype)

        embedding = Embedding(self.width, self.num_classes, name="embedding")(t, label)
        embedding = nn.silu(embedding).astype(h.dtype)
        for i in range(self.depth):
            name = f"block_{i}"
            # {}, not None: at init no block has parameters yet, and all are made.
            if self.get_variable("params", name) == {}:
                continue  # a compact network has lost this block
            block = Block(
                self.num_heads,
                self.mlp_ratio,
                self.dropout,
                self.dtype,
                name=name,
            )
            h = block(h, embedding, _of_block(gates, i), train)

        modulation = _zero_dense(2 * self.width, self.dtype, "modulation")(embedding)
        shift, scale = modulation.reshape(2, 1, self.width)
        h = _norm(self.dtype)(h) * (1 + scale) + shift
        # Back in float32: the loss and the score are not computed in bfloat16.
        out = _zero_dense(self.patch**2 * channels, x.dtype, "output")(h)
        out = out.reshape(rows, columns, self.patch, self.patch, channels)
        return out.transpose(0, 2, 1, 3, 4).reshape(x.shape)

    def check(self, shape):
        """Raises ValueError if an image of this shape does not fit."""
        wrong = []
        if len(shape) != 3:
            wrong.append(f"dit takes images [h, w, c], not data of shape {shape}")
        elif self.patch < 1 or shape[0] % self.patch or shape[1] % self.patch:
            wrong.append(
                f"patch={self.patch} must divide the image, {shape[0]}x{shape[1]}"
            )
        if self.num_heads < 1 or self.width % self.num_heads:
            wrong.append(f"num_heads={self.num_heads} must divide width={self.width}")
        elif self.width % 4:
            wrong.append(
                f"width={self.width} must be a multiple of 4 (two axes, sin, cos)"
            )
        if wrong:
            raise ValueError("\n".join(wrong))


def position_features(rows: int, columns: int, width: int):
    """Fixed sin-cos positions, half for each axis.   [rows * columns, width]."""
    # By NumPy, in float64: constants of the program, equal on all devices.
    frequencies = 10_000.0 ** -(np.arange(width // 4) / (width // 4))
    row, column = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    features = []
    for place in (column, row):  # in this order in the release of DiT
        angles = place.reshape(-1, 1) * frequencies
        features += [np.sin(angles), np.cos(angles)]
    return jnp.asarray(np.concatenate(features, axis=1), jnp.float32)


def _of_block(gates, i):
    """The gates of block i; those of whole blocks are in one row, [1, depth]."""
    if gates is None:
        return None
    return {k: v[0, i] if k == "blocks" else v[i] for k, v in gates.items()}


def _given(module, name, axis, default):
    """The size of an axis of a layer's kernel, if parameters are given."""
    if module.has_variable("params", name):
        return module.get_variable("params", name)["kernel"].shape[axis]
    return default


def _sow(module, name, value, size):
    """Records the size of a group's output, for callers that collect intermediates."""
    # Asked first, so that training does not compute what nobody collects.
    if module.is_mutable_collection("intermediates"):
        module.sow("intermediates", name, size(value))


def _norm(dtype):
    # Without parameters: the embedding shifts and scales after it. Epsilon as in the
    # release of DiT.
    return nn.LayerNorm(epsilon=1e-6, use_bias=False, use_scale=False, dtype=dtype)


def _zero_dense(width, dtype, name):
    # adaLN-zero: every block starts as the identity, the network as zero.
    zeros = nn.initializers.zeros
    return Dense(width, kernel_init=zeros, dtype=dtype, name=name)
