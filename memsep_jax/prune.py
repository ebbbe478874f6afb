"""Importance -> keep -> mask -> apply: pruning as a mask over a Flax parameter tree."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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


def head_importance(loss, x0, t, eps, shape: tuple[int, int]):
    """I(h) = E |dL/dgate_h|, of unit norm in every layer (Ye 2025, Algorithm 1).

    Args:
      loss: (gates [depth, heads], x0 [*e], t [], eps [*e]) -> [], of one example.
      x0: [b, *e].   t: [b].   eps: [b, *e].   shape: (depth, heads).
    Returns:
      [depth, heads]. The absolute value is taken per example, so it does not depend
      on how examples are batched.
    """

    def slopes(x0, t, eps):
        return jnp.abs(jax.grad(loss)(jnp.ones(shape), x0, t, eps))

    mean = jnp.mean(jax.vmap(slopes)(x0, t, eps), axis=0)
    norm = jnp.linalg.norm(mean, axis=1, keepdims=True)
    return mean / jnp.where(norm > 0, norm, 1)  # a layer that does nothing: all zero


def keep_top(importance, ratio: float, min_per_layer: int = 1) -> np.ndarray:
    """All but the floor(ratio H) least important heads, ranked over all layers.

    Args: importance [depth, heads]; at least min_per_layer heads stay in every layer.
    Returns: bool [depth, heads]; ties fall in the order of their index.
    Raises: ValueError: a ratio outside [0, 1), importance that is not finite.
    """
    importance = np.asarray(importance)
    if importance.ndim != 2 or not np.isfinite(importance).all():
        raise ValueError(
            f"importance of shape {importance.shape} must be finite [depth, heads]: "
            f"{np.count_nonzero(~np.isfinite(importance))} values are not finite"
        )
    drop = _count(importance.shape, ratio)
    keep = np.ones(importance.shape, bool)
    for head in np.argsort(importance, axis=None, kind="stable"):
        layer = head // importance.shape[1]
        if drop == 0:
            break
        if keep[layer].sum() > min_per_layer:
            keep.flat[head] = False
            drop -= 1
    return keep


def keep_random(key, shape: tuple[int, int], ratio: float) -> np.ndarray:
    """The random baseline: floor(ratio H) heads dropped without replacement.

    Returns: bool [depth, heads] with at least one head in every layer.
    """
    return keep_top(jax.random.permutation(key, np.prod(shape)).reshape(shape), ratio)


def head_mask(params: Params, keep) -> Params:
    """q, k, v and output of every head that is not kept become 0.

    Args: keep bool [depth, heads].
    Returns: a tree like params of small arrays that broadcast against it.
    Raises: ValueError naming the leaf, where keep does not fit the parameters.
    """
    keep = np.asarray(keep)

    def leaf(path, p):
        names = tuple(
            k.key for k in path
        )  # ("block_0", "attention", "query", "kernel")
        axis = HEAD_AXIS.get(names[-2:])
        if axis is None:
            return jnp.ones((), p.dtype)
        block = int(names[0].removeprefix("block_"))
        if block >= len(keep) or keep.shape[1:] != (p.shape[axis],):
            raise ValueError(
                f"keep of shape {keep.shape} does not fit {'/'.join(names)} with "
                f"{p.shape[axis]} heads: it must be [depth, heads] of this network"
            )
        kept = jnp.asarray(keep[block], p.dtype)
        return jnp.expand_dims(kept, [i for i in range(p.ndim) if i != axis])

    mask = jax.tree_util.tree_map_with_path(leaf, params)
    blocks = sum(name.startswith("block_") for name in params)
    if len(keep) != blocks:
        raise ValueError(f"keep has {len(keep)} layers, the network {blocks} blocks")
    return mask


def full_mask(params: Params) -> Params:
    """The mask of the unpruned model: one scalar 1 per leaf."""
    return jax.tree.map(lambda p: jnp.ones((), p.dtype), params)


def apply_mask(params: Params, mask: Params) -> Params:
    """params * mask, leaf by leaf; mask leaves broadcast."""
    return jax.tree.map(jnp.multiply, params, mask)


def _count(shape, ratio):
    if not 0 <= ratio < 1:
        raise ValueError(
            f"prune.ratio={ratio} must be in [0, 1): the share of heads to remove"
        )
    return int(np.floor(ratio * np.prod(shape) + 1e-9))  # 0.29 x 100 is 29
