"""Importance -> keep -> mask -> apply: pruning as a mask over a Flax parameter tree.

A unit is a group of parameters behind one gate: a head of attention (Ye 2025,
Algorithm 1), a neuron of an MLP, a whole block. A gate of 0, a mask of 0 and a network
without the parameters (`compact`) are the same function.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memsep_jax.roots import root

Params = Any

# The axis that counts heads, of every parameter that belongs to one head.
HEAD_AXIS = {
    ("query", "kernel"): 1,
    ("query", "bias"): 0,
    ("key", "kernel"): 1,
    ("key", "bias"): 0,
    ("value", "kernel"): 1,
    ("value", "bias"): 0,
    ("out", "kernel"): 0,  # its bias belongs to the layer and is kept
}
NEURON_AXIS = {
    ("mlp_in", "kernel"): 1,
    ("mlp_in", "bias"): 0,
    ("mlp_out", "kernel"): 0,  # as above
}
# Gates are [layers, units]; all blocks are the units of one layer, [1, depth].
GROUPS = {"heads": HEAD_AXIS, "neurons": NEURON_AXIS, "blocks": {}}
CRITERIA = (
    "small_t",  # E |dL/dgate|, small t more often than large t: the paper's
    "uniform_t",  # E |dL/dgate|, all t alike
    "large_t",  # E |dL/dgate|, large t more often
    "magnitude",  # the norm of the parameters
    "activation",  # the size of the output of the unit
    "random",
    "random_per_layer",  # the same number in every layer as by small_t
    "highest_first",  # those that small_t would keep longest: the negative control
)
# Examples whose gate gradients are taken together: each keeps its own activations for
# the backward pass, so memory grows with this number.
CHUNK = 256


def gates(params: Params, group: str = "heads"):
    """The open gates of a group.   Returns: ones [layers, units].

    Raises: ValueError: an unknown group, a network that has no such gates.
    """
    if group not in GROUPS:
        raise ValueError(f"group={group!r} is not one of {', '.join(GROUPS)}")
    depth = sum(_block(name) is not None for name in params)
    if group == "blocks" and depth:
        return jnp.ones((1, depth))
    for path, p in jax.tree_util.tree_leaves_with_path(params):
        place = _place(path, group)
        if place is not None:
            return jnp.ones((depth, p.shape[place[1]]))
    raise ValueError(f"group={group!r}: the network has none; a dit has")


# Importance: every criterion gives [layers, units], of unit norm in every layer.


def importance(sizes, examples, chunk: int = CHUNK):
    """E of sizes(example) [layers, units], of unit norm in every layer.

    Args: examples, any pytree of arrays [b, ...]; they stream, `chunk` at a time, and
      the result does not depend on it.
    """
    each = jax.lax.map(sizes, examples, batch_size=chunk)
    return normalised(jnp.mean(each, axis=0))


def head_importance(loss, x0, t, eps, shape: tuple[int, int], chunk: int = CHUNK):
    """I(h) = E |dL/dgate_h|, of unit norm in every layer (Ye 2025, Algorithm 1).

    Args:
      loss: (gates [depth, heads], x0 [*e], t [], eps [*e]) -> [], of one example.
      x0: [b, *e].   t: [b].   eps: [b, *e].   shape: that of the gates of any group.
    Returns:
      [depth, heads]. The absolute value is taken per example: the mean of the slopes
      is 0 at a minimum of the loss, and that of a batch is noise of its size.
    """

    def slopes(example):
        return jnp.abs(jax.grad(loss)(jnp.ones(shape), *example))

    return importance(slopes, (x0, t, eps), chunk)


def magnitude(params: Params, group: str = "heads"):
    """The l2 norm of the parameters behind every gate, of unit norm in every layer."""
    squares = jnp.zeros_like(gates(params, group))
    for path, p in jax.tree_util.tree_leaves_with_path(params):
        place = _place(path, group)
        if place is None:
            continue
        layer, axis = place
        if axis is None:
            squares = squares.at[0, layer].add(jnp.sum(p**2))
        else:
            others = tuple(i for i in range(p.ndim) if i != axis)
            squares = squares.at[layer].add(jnp.sum(p**2, axis=others))
    return normalised(root(squares))


def activations(intermediates: Params, group: str = "heads"):
    """The size of the output of every unit, from the intermediates of a network.

    Args: intermediates, of model.apply(..., mutable="intermediates") for one example.
    Returns: [layers, units], means over tokens.
    Raises: ValueError: the network keeps none of this group.
    """
    sizes = {}
    for path, value in jax.tree_util.tree_leaves_with_path(intermediates):
        names = _names(path)
        if group in names:
            sizes[_block(names[0])] = value
    if not sizes:
        raise ValueError(
            f"criterion=activation needs the outputs of {group}, which this network "
            "does not keep: take another criterion, or a module of flax.linen whose "
            "layers sow them as those of models.DiT do"
        )
    rows = jnp.stack([sizes[i] for i in sorted(sizes)])
    return rows[None] if group == "blocks" else rows


# Keep: which units stay.


def count(units: int, ratio: float) -> int:
    """floor(ratio H), the number of H units to remove.   Raises: ValueError."""
    if not 0 <= ratio < 1:
        raise ValueError(
            f"ratio={ratio} must be in [0, 1): the share of heads to remove"
        )
    # 1e-9: 0.29 * 100 is 28.999999999999996 in binary, and 29 is meant.
    return int(np.floor(ratio * units + 1e-9))


def keep_top(importance, ratio: float, min_per_layer: int = 1) -> np.ndarray:
    """All but the floor(ratio H) least important heads, ranked over all layers.

    Args: importance [depth, heads], or [layers, units] of any group; at least
      min_per_layer of them stay in every layer.
    Returns: bool, the shape of importance; ties are removed in the order of index.
    Raises: ValueError: a ratio outside [0, 1), importance that is not finite.
    """
    importance = np.asarray(importance)
    if importance.ndim != 2:
        raise ValueError(f"importance of shape {importance.shape}: [depth, heads]")
    bad = np.argwhere(~np.isfinite(importance))
    if len(bad):
        raise ValueError(
            f"importance: {len(bad)} values are not finite, the first of layer "
            f"{bad[0][0]}, unit {bad[0][1]}: nothing can be ranked by it"
        )
    drop = count(importance.size, ratio)
    keep = np.ones(importance.shape, bool)
    # Stable, so that ties break by index on every machine.
    for head in np.argsort(importance, axis=None, kind="stable"):
        layer = head // importance.shape[1]
        if drop == 0:
            break
        # A layer that is down to its least is passed over, and the next head of the
        # ranking goes in its place: the number to remove stays floor(ratio H).
        if keep[layer].sum() > min_per_layer:
            keep.flat[head] = False
            drop -= 1
    return keep


def keep_random(key, shape: tuple[int, int], ratio: float, like=None) -> np.ndarray:
    """The random baseline: floor(ratio H) heads dropped without replacement.

    Args: like, bool of this shape, whose number in every layer is kept.
    Returns: bool [depth, heads] with at least one head in every layer.
    """
    # A random order is an importance without ties: no head is drawn twice.
    order = jax.random.permutation(key, np.prod(shape)).reshape(shape)
    if like is None:
        return keep_top(order, ratio)
    # Ranks within each layer, of which as many are kept as in `like`.
    place = np.argsort(np.argsort(order, axis=1), axis=1)
    return place < np.asarray(like).sum(axis=1, keepdims=True)


# Masks, and networks without their masked units.


def group_mask(params: Params, keep, group: str = "heads") -> Params:
    """The parameters behind every gate that is not kept become 0.

    Args: keep bool [layers, units], as `gates` has them.
    Returns: a tree like params of small arrays that broadcast against it.
    Raises: ValueError naming the leaf, where keep does not fit the parameters.
    """
    keep = _fitting(params, keep, group)

    def leaf(path, p):
        place = _place(path, group)
        if place is None:
            return jnp.ones((), p.dtype)
        layer, axis = place
        if axis is None:
            return jnp.asarray(keep[0, layer], p.dtype)
        kept = jnp.asarray(keep[layer], p.dtype)
        # Only the axis of the units has its length: a mask takes kilobytes, where one
        # of the size of the parameters would be a second network in each checkpoint.
        return jnp.expand_dims(kept, [i for i in range(p.ndim) if i != axis])

    return jax.tree_util.tree_map_with_path(leaf, params)


def head_mask(params: Params, keep) -> Params:
    """q, k, v and output of every head that is not kept become 0: `group_mask`.

    Args: keep bool [depth, heads].
    """
    return group_mask(params, keep, "heads")


def compact(params: Params, keep, group: str = "heads") -> Params:
    """The smaller network, without the parameters that a mask sets to 0.

    A DiT reads the number of its heads, neurons and blocks from its parameters, so the
    same model.apply computes what it did with the mask, up to rounding.

    Args: keep bool [layers, units].   Raises: ValueError, as `group_mask`.
    """
    keep = _fitting(params, keep, group)
    if group == "blocks":
        kept = {name: _block(name) is None or keep[0, _block(name)] for name in params}
        # An empty dict, not a missing name: DiT tells by it a block that was removed
        # from one that has no parameters yet.
        return {name: p if kept[name] else {} for name, p in params.items()}

    def leaf(path, p):
        place = _place(path, group)
        if place is None:
            return p
        layer, axis = place
        return jnp.take(p, np.flatnonzero(keep[layer]), axis=axis)

    return jax.tree_util.tree_map_with_path(leaf, params)


def full_mask(params: Params) -> Params:
    """The mask of the unpruned model: one scalar 1 per leaf."""
    return jax.tree.map(lambda p: jnp.ones((), p.dtype), params)


def check_mask(params: Params, mask: Params) -> None:
    """Raises ValueError naming the leaf, where a mask does not fit the parameters."""
    shapes, masks = (
        {"/".join(_names(path)): np.shape(leaf) for path, leaf in leaves}
        for leaves in map(jax.tree_util.tree_leaves_with_path, (params, mask))
    )
    for name in sorted(shapes.keys() ^ masks.keys()):
        lacks = "mask lacks" if name in shapes else "mask is for another network, with"
        raise ValueError(f"{lacks} {name}: make it by head_mask of these parameters")
    for name, shape in shapes.items():
        small = masks[name]
        # Broadcasting aligns shapes at their ends, and a mask may have fewer axes.
        sides = zip(small[::-1], shape[::-1], strict=False)
        if len(small) > len(shape) or any(m not in (1, p) for m, p in sides):
            raise ValueError(
                f"mask of shape {small} does not fit {name} of shape {shape}: make it "
                "by head_mask of these parameters"
            )


def apply_mask(params: Params, mask: Params) -> Params:
    """params * mask, leaf by leaf; mask leaves broadcast."""
    return jax.tree.map(jnp.multiply, params, mask)


def _fitting(params, keep, group):
    """keep as an array, or a ValueError naming the leaf that it does not fit."""
    keep = np.asarray(keep)
    shape = gates(params, group).shape
    # Leaf by leaf first: the name of a leaf says more than two shapes do, and units of
    # a compact network differ from layer to layer.
    for path, p in jax.tree_util.tree_leaves_with_path(params):
        place = _place(path, group)
        if place is None or place[1] is None:
            continue
        layer, axis = place
        if layer >= len(keep) or keep.shape[1:] != (p.shape[axis],):
            raise ValueError(
                f"keep of shape {keep.shape} does not fit {'/'.join(_names(path))} "
                f"with {p.shape[axis]} {group}: it must be [depth, {group}] of this "
                "network"
            )
    if keep.shape != shape:
        raise ValueError(
            f"keep of shape {keep.shape} does not fit the network: its gates of "
            f"{group} are {shape}"
        )
    return keep


def _place(path, group):
    """(block, axis) of a parameter behind gates; axis None: one gate for all of it."""
    names = _names(path)
    block = _block(names[0])
    if block is None:
        return None
    if group == "blocks":
        return block, None
    axis = GROUPS[group].get(names[-2:])
    return None if axis is None else (block, axis)


def _names(path):
    return tuple(  # ("block_0", "attention", "query", "kernel")
        str(getattr(k, "key", getattr(k, "idx", k))) for k in path
    )


def _block(name):
    """The number of a block; None where the name is that of something else."""
    match = re.fullmatch(r"block_(\d+)", name)
    return int(match[1]) if match else None


def normalised(values):
    """values [layers, units] of unit norm in every layer."""
    norm = root(jnp.sum(values**2, axis=1, keepdims=True))
    return values / jnp.where(norm > 0, norm, 1)  # a layer that does nothing: all zero
