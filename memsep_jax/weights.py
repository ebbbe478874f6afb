"""Weights by name in a safetensors file, and networks of other projects as ours.

Nothing is unpickled: tools/convert_checkpoint.py, which is not part of this package,
turns pickled checkpoints into safetensors.
"""

import contextlib
import math
import os
import re
import textwrap
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from safetensors.numpy import save_file

from memsep_jax.checkpoint import StorageError
from memsep_jax.checks import check_leaves
from memsep_jax.models import DiT, UNet
from memsep_jax.models.dit import position_features
from memsep_jax.models.unet import VARIANTS

MAX_HEADER = 1 << 26  # bytes, for about 400,000 tensors: more is not believed
PICKLED = (".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".bin")
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # by width: DiT-S, B, L, XL
# Names of leaves: ours and PyTorch's.
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "label": "weight"}
DIT = {  # our layers: theirs
    "patches": "x_embedder.proj",
    "embedding.time_in": "t_embedder.mlp.0",
    "embedding.time_out": "t_embedder.mlp.2",
    "embedding": "y_embedder.embedding_table",
    "attention.query": "attn.qkv",  # with key and value
    "attention.out": "attn.proj",
    "mlp_in": "mlp.fc1",
    "mlp_out": "mlp.fc2",
    "modulation": "adaLN_modulation.1",
    "output": "final_layer.linear",
}
EDM = {  # our layers, in a block or outside: theirs
    "embedding_in": "map_layer0",
    "embedding_out": "map_layer1",
    "norm_in": "norm0",
    "conv_in": "conv0",
    "embedding": "affine",
    "norm_out": "norm1",
    "conv_out": "conv1",
    "shortcut": "skip",
    "attention.norm": "norm2",
    "attention.qkv": "qkv",
    "attention.out": "proj",
}
# Layers that are products here and filters of 1 x 1 in EDM, with two axes more.
POINTWISE = ("shortcut", "attention.qkv", "attention.out")


class WeightsError(ValueError):
    """Weights that are missing, damaged, or of another network."""

    exit_code = 3


def read(path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors of a safetensors file by name, and its metadata.

    bfloat16, which numpy lacks, becomes float32, exactly.

    Raises: WeightsError: the file is missing, damaged, or anything else.
    """
    path = Path(path)
    _check_header(path)
    tensors = {}
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            names = file.keys()
            for name in names:
                tensor = file.get_tensor(name)
                wide = tensor.dtype.name == "bfloat16"
                tensors[name] = tensor.astype(np.float32) if wide else tensor
            return tensors, file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise WeightsError(f"{path}: damaged ({error}); get the file again") from error
    except (AttributeError, TypeError) as error:  # float8, and future types
        raise WeightsError(
            f"{path}: {name} has a type that numpy lacks ({error}); write it as float32"
        ) from error


def write(path, tensors: dict, metadata: dict[str, str] | None = None) -> None:
    """Writes tensors by name as a safetensors file, whole or not at all.

    Raises: StorageError naming the file; an existing file stays as it was.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    # Under another name first: a write that is interrupted leaves no half file. In C
    # order, because the file gets the memory of the arrays as it is.
    tensors = {name: np.asarray(a, order="C") for name, a in tensors.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, part, metadata)
        with open(part, "rb+") as file:
            os.fsync(file.fileno())  # else a crash may leave an empty file
        os.replace(part, path)
    except (OSError, safetensors.SafetensorError) as error:
        raise StorageError(f"could not write {path}: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def from_params(params) -> dict[str, np.ndarray]:
    """Parameters by name, as `write` takes them ("block_0.attention.query.kernel")."""
    return {name: np.asarray(a) for name, a in _by_name(jax.device_get(params)).items()}


def to_params(tensors: dict, like):
    """The inverse of `from_params`, bit by bit.

    Args: like, a pytree of arrays or ShapeDtypeStructs.
    Raises: WeightsError with everything that is missing, unexpected or mismatched.
    """
    targets = _by_name(like)
    _compare(
        {name: f"{a.dtype}{list(a.shape)}" for name, a in tensors.items()},
        {name: f"{a.dtype}{list(a.shape)}" for name, a in targets.items()},
        "this model",
    )
    leaves = [jnp.asarray(tensors[name]) for name in targets]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def dit(tensors: dict, num_heads: int | None = None):
    """A DiT of the PyTorch release (Peebles & Xie 2023) as ours.   (model, params).

    At step k of 0 .. 999 theirs is ours at t = k / 1000: both take the features of k.
    If the network learned its variance (twice the channels), only the noise is kept.
    The last row of its table of labels is "no label", as in training with dropout of
    labels.

    Args:
      num_heads: no shape shows it. None: that of DiT-S, B, L or XL, by the width.
    Raises:
      WeightsError: these are not the weights of such a network, or not all of them.
    """
    what = "a DiT"
    tensors = _unprefixed(tensors, "x_embedder.proj.weight", what)
    width, channels, patch, _ = _shape(tensors, "x_embedder.proj.weight", 4, what)
    hidden, _ = _shape(tensors, "blocks.0.mlp.fc1.weight", 2, what)
    num_heads = num_heads or HEADS.get(width)
    if num_heads is None:
        raise WeightsError(
            f"no DiT of the release has width {width}: give num_heads, which no shape "
            "shows"
        )
    table, num_classes = "y_embedder.embedding_table.weight", 0
    if table in tensors:
        num_classes = _shape(tensors, table, 2, what)[0] - 1
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        a = tensors.get(name, np.zeros(0))
        if a.shape[:1] == (2 * patch**2 * channels,):
            # Each pixel of the patch has the noise of all channels, then the variance.
            noise = a.reshape(patch**2, 2, channels, *a.shape[1:])[:, 0]
            tensors[name] = noise.reshape(len(a) // 2, *a.shape[1:])
    # Sizes come from the tensors, as a state dict holds no config.
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    model = DiT(patch, width, depth, num_heads, num_classes, hidden / width)
    like = _like(model, (patch, patch, channels))
    _check_positions(tensors.pop("pos_embed", None), width)
    return model, _ours(tensors, _dit_rows(like, patch), like, what)


def to_dit(model: DiT, params, side: int) -> dict[str, np.ndarray]:
    """The inverse of `dit`: by the names of the PyTorch release, without a variance.

    Args: side: of the images, in pixels, since their weights include the positions.
    Raises: WeightsError: params of another model, such as a compact one.
    """
    channels = params["patches"]["kernel"].shape[0] // model.patch**2
    like, ours = _like(model, (side, side, channels)), from_params(params)
    _compare(_shapes(ours), _shapes(_by_name(like)), "this model")
    tensors = {}
    for row in _dit_rows(like, model.patch):
        a = np.stack([ours[name] for name in row.ours])
        tensors[row.theirs] = a.reshape(row.mid).transpose(row.order).reshape(row.shape)
    rows = side // model.patch
    positions = position_features(rows, rows, model.width)
    return tensors | {"pos_embed": np.asarray(positions)[None]}


def edm(tensors: dict, time_scale: float = 1.0):
    """A DDPM++ or NCSN++ of EDM (Karras 2022) as ours.   (model, params).

    The weights do not say what the network predicts: it is `score.edm`, or for EDM's
    baselines `score.ve`, and `score.vp` with time_scale=999. The layer map_augment is
    left out: it takes the augmentation of a training image, and adds nothing without.

    Raises:
      WeightsError: these are not the weights of such a network, or not all of them.
    """
    what = "a DDPM++ or NCSN++"
    tensors = _unprefixed(tensors, "map_layer0.weight", what)
    matches = (re.match(r"enc\.(\d+)x\1_", name) for name in tensors)
    sides = sorted({int(match[1]) for match in matches if match}, reverse=True)
    if not sides:
        raise WeightsError(f"no tensor is named enc.32x32_...: not {what}")

    def shape(rest, ndim, side=sides[0]):
        return _shape(tensors, f"enc.{side}x{side}_{rest}", ndim, what)

    width, channels = shape("conv.weight", 4)[:2]
    label = "map_label.weight"
    frequencies = tensors.pop("map_noise.freqs", None)
    tensors.pop("map_augment.weight", None)
    block = re.compile(rf"enc\.{sides[0]}x{sides[0]}_block\d+\.conv0\.weight")
    ncsn = any("_aux_residual." in name for name in tensors)
    model = UNet(
        width,
        depth=sum(bool(block.fullmatch(name)) for name in tensors),
        multipliers=tuple(
            shape("block0.conv0.weight", 4, side)[0] // width for side in sides
        ),
        attention=tuple(
            side for side in sides if f"enc.{side}x{side}_block0.qkv.weight" in tensors
        ),
        variant="ncsn" if ncsn else "ddpm",
        time_embedding="positional" if frequencies is None else "fourier",
        time_scale=time_scale,
        frequencies=None
        if frequencies is None
        else tuple(frequencies.ravel().tolist()),
        num_classes=_shape(tensors, label, 2, what)[1] if label in tensors else 0,
    )
    like = _like(model, (sides[0], sides[0], channels))
    tensors = _without_filters(tensors, model.variant)
    return model, _ours(tensors, _edm_rows(like, sides), like, what)


class _Row(NamedTuple):
    """How one of their tensors is made of ours.

    Ours, stacked if there are several, are reshaped to `mid`, transposed by `order`,
    and reshaped to `shape`.
    """

    theirs: str
    ours: tuple[str, ...]
    mid: tuple[int, ...]
    order: tuple[int, ...]
    shape: tuple[int, ...]


def _row(theirs, ours, shape):
    """The usual rows: vectors, filters [h, w, in, out], and maps [*in, out]."""
    if len(shape) == 1:
        mid, order = shape, (0,)
    elif len(shape) == 4:
        mid, order = shape, (3, 2, 0, 1)
    else:
        mid, order = (math.prod(shape[:-1]), shape[-1]), (1, 0)
    return _Row(theirs, (ours,), mid, order, tuple(mid[i] for i in order))


def _dit_rows(like, patch):
    rows = []
    for name, leaf in _by_name(like).items():
        path = re.fullmatch(r"(?:block_(\d+)\.)?(.+)\.(\w+)", name)
        block, layer, kind = path.groups()
        if layer in ("attention.key", "attention.value"):
            continue  # stacked with the query
        place = f"blocks.{block}." if block else ""
        if layer == "modulation" and not block:
            place = "final_layer."
        theirs = f"{place}{DIT[layer]}.{LEAVES[kind]}"
        row = _row(theirs, name, leaf.shape)
        if name == "patches.kernel":
            size = patch, patch, leaf.shape[0] // patch**2, leaf.shape[1]
            row = _row(theirs, name, size)
        elif kind == "label":
            row = _Row(theirs, (name,), leaf.shape, (0, 1), leaf.shape)
        elif layer == "attention.query":
            ours = tuple(name.replace("query", a) for a in ("query", "key", "value"))
            *inputs, heads, size = leaf.shape
            mid, order = (3, *inputs, heads * size), (0, 2, 1) if inputs else (0, 1)
            row = _Row(theirs, ours, mid, order, (3 * heads * size, *inputs))
        rows.append(row)
    return rows


def _edm_rows(like, sides):
    first = f"{sides[0]}x{sides[0]}"
    ends = {
        "input": f"enc.{first}_conv",
        "norm": f"dec.{first}_aux_norm",
        "output": f"dec.{first}_aux_conv",
    }
    rows = []
    for name, leaf in _by_name(like).items():
        if name in ("label", "label_bias"):
            kind = "bias" if name == "label_bias" else "weight"
            rows.append(_row(f"map_label.{kind}", name, leaf.shape))
            continue
        *path, kind = name.split(".")
        block = re.fullmatch(r"(encoder|decoder|middle)_(\d)_?(\w*)", path[0])
        layer = ".".join(path[1:] if block else path)
        place = ends.get(layer) or EDM.get(layer, "")
        if block:
            half, number, part = block.groups()
            if half == "middle":
                where = f"dec.{sides[-1]}x{sides[-1]}_in{number}"
            else:
                side = sides[int(number)]
                part = f"block{part}" if part.isdigit() else part
                part = part.replace("image", "aux_residual")
                where = f"{half[:3]}.{side}x{side}_{part}"
            place = f"{where}.{place}" if layer else where
        row = _row(f"{place}.{LEAVES[kind]}", name, leaf.shape)
        if layer == "attention.qkv":
            # Their channels alternate between q, k and v.
            inputs, size = leaf.shape[:-1], leaf.shape[-1]
            mid, order = (*inputs, 3, size // 3), (2, 1, 0) if inputs else (1, 0)
            row = row._replace(mid=mid, order=order)
        if layer in POINTWISE and kind == "kernel":
            row = row._replace(shape=(*row.shape, 1, 1))
        rows.append(row)
    return rows


def _ours(tensors, rows, like, what):
    """Params shaped as like, from exactly the tensors of its rows."""
    _compare(_shapes(tensors), {row.theirs: str(list(row.shape)) for row in rows}, what)
    targets, params = _by_name(like), {}
    for row in rows:
        a = np.asarray(tensors[row.theirs], np.float32)
        a = a.reshape([row.mid[i] for i in row.order]).transpose(np.argsort(row.order))
        for name, part in zip(row.ours, a if len(row.ours) > 1 else [a], strict=True):
            params[name] = jnp.asarray(part.reshape(targets[name].shape))
    leaves = [params[name] for name in targets]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _compare(given, expected, what):
    """Refuses tensors whose descriptions, by name, are not as expected."""
    try:
        check_leaves(given, expected)
    except ValueError as error:
        lines = textwrap.indent(str(error), "  ")
        raise WeightsError(f"not the weights of {what}:\n{lines}") from None


def _shapes(tensors):
    """Descriptions of foreign tensors; a floating type is left out, as any will do."""
    return {
        name: ("" if jnp.issubdtype(a.dtype, jnp.floating) else str(a.dtype))
        + str(list(a.shape))
        for name, a in tensors.items()
    }


def _by_name(tree):
    # Dots, as PyTorch has them; `checkpoint` has slashes.
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="."): a for p, a in flat}


def _like(model, shape):
    """The parameters of a model of images of this shape, as ShapeDtypeStructs."""
    # Shapes only: no memory is taken for a network that the tensors may not fit.
    x, t = (jax.ShapeDtypeStruct(s, jnp.float32) for s in (shape, ()))
    try:
        return jax.eval_shape(model.init, jax.random.key(0), x, t)["params"]
    except ValueError as error:
        raise WeightsError(str(error)) from error


def _unprefixed(tensors, anchor, what):
    """The tensors without a common prefix ("model.", "module."), by the anchor."""
    anchors = [name for name in tensors if f".{name}".endswith(f".{anchor}")]
    if len(anchors) != 1:
        raise WeightsError(
            f"{len(anchors)} of {len(tensors)} tensors are named {anchor}, where "
            f"{what} has one"
        )
    prefix = anchors[0].removesuffix(anchor)
    return {name.removeprefix(prefix): a for name, a in tensors.items()}


def _shape(tensors, name, ndim, what):
    shape = tensors[name].shape if name in tensors else ()
    if len(shape) != ndim or 0 in shape:
        raise WeightsError(f"no {name} of {ndim} axes: not the weights of {what}")
    return shape


def _check_positions(table, width):
    if table is None:  # a constant, which some programs do not save
        return
    rows = math.isqrt(table.shape[1]) if table.ndim == 3 else 0
    truth = np.asarray(position_features(rows, rows, width))[None]
    # Others may compute the sines in float32, and within [-1, 1] a table that is stored
    # in fewer bits is off by less than their eps.
    near = 1e-4 + _eps(table)
    if table.shape != truth.shape or not np.allclose(table, truth, atol=near):
        raise WeightsError(
            f"pos_embed {list(table.shape)}: not the fixed sin-cos positions of a "
            "square image, and ours has no others"
        )


def _eps(table):
    """The eps of the type that a table was stored in; 0 for float32 and wider.

    That is not always the type it has, since `read` widens bfloat16, and others widen
    half precision before they save. So take the type that holds all values exactly.
    """
    for kind in (jnp.bfloat16, np.float16):
        with np.errstate(over="ignore"):
            if np.array_equal(table, table.astype(kind).astype(table.dtype)):
                return float(jnp.finfo(kind).eps)
    return 0.0


def _without_filters(tensors, variant):
    """The tensors without the filters that change the resolution, if they are ours."""
    taps, _ = VARIANTS[variant]
    truth = np.outer(taps, taps)[None, None] / sum(taps) ** 2
    kept = {}
    for name, a in tensors.items():
        if not name.endswith(".resample_filter"):
            kept[name] = a
        elif a.shape != truth.shape or not np.allclose(a, truth):
            raise WeightsError(f"{name} is not {taps}, the filter of variant {variant}")
    return kept


def _check_header(path):
    """Refuses, by its first bytes, a file that the parser should not see."""
    try:
        with open(path, "rb") as file:
            size, head = os.fstat(file.fileno()).st_size, file.read(9)
    except OSError as error:
        raise WeightsError(
            f"{path}: {error.strerror}; give the path of a .safetensors file"
        ) from error
    # safetensors: the length of a JSON header in 8 bytes, then the header.
    length = int.from_bytes(head[:8], "little")
    if head[8:] == b"{":
        # A length that lies is refused before the parser, or memory, is asked for it.
        if length > min(size - 8, MAX_HEADER):
            raise WeightsError(
                f"{path}: damaged (a header of {length:,} bytes, in a file of {size:,};"
                f" at most {MAX_HEADER:,} are read); get the file again"
            )
    # A pickle begins with the opcode of its protocol; torch.save packs one in a zip.
    elif head[:1] == b"\x80" or head[:4] == b"PK\x03\x04" or path.suffix in PICKLED:
        raise WeightsError(
            f"{path}: pickled, it seems, and unpickling can run any code: it is never "
            "done here. tools/convert_checkpoint.py makes a .safetensors file of it"
        )
    else:
        raise WeightsError(f"{path}: not a safetensors file, by its first bytes")
