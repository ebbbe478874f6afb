"""TrainState, and the one step that trains: accumulation, mask, EMA, refusal."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from memsep_jax.prune import apply_mask, check_mask, full_mask
from memsep_jax.train.optimizers import skipped

Params = Any


class NonFiniteError(ArithmeticError):
    """A loss, gradient or update was NaN or infinite; the step was not applied."""

    exit_code = 4


class TrainState(struct.PyTreeNode):
    """All that a step needs and all that a checkpoint holds."""

    step: jax.Array  # [] number of updates applied
    params: Params
    ema: Params  # its own buffers, since the state is donated
    opt_state: optax.OptState
    mask: Params  # broadcasts against params; all ones when nothing is pruned


def init(params: Params, tx: optax.GradientTransformation, mask=None) -> TrainState:
    """The state before the first step; mask defaults to ones.

    Raises: ValueError naming the leaf, where the mask does not fit.
    """
    if mask is None:
        mask = full_mask(params)
    check_mask(params, mask)
    params = apply_mask(params, mask)  # pruned parameters are 0 from the first step on
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(jnp.copy, params),  # a donated buffer may occur only once
        opt_state=tx.init(params),
        mask=mask,
    )


def example_keys(key, step, size: int):
    """The keys of the examples of a step.   Returns: [size].

    They are a function of (key, step): no key is part of the state, and a run that is
    resumed draws the same noise.
    """
    return jax.random.split(jax.random.fold_in(key, step), size)


def ema_decay(half_life: float, batch_size: int, ramp: float | None = None):
    """The share of the EMA that a step keeps; half of it is left after half_life.

    Args:
      half_life: in training examples.
      ramp: the half-life is at most this share of the examples seen before the step,
        so that the EMA of a short run forgets its start; at step 0 nothing is kept.
    Returns: in [0, 1]; with a ramp, (step []) -> [].
    Source: Karras 2022 (arXiv 2206.00364), appendix F.
    """
    steps = half_life / batch_size
    if ramp is None:
        return 0.5 ** (1 / steps)
    # At step 0 this is exp2(-1 / 0) = exp2(-inf) = 0, as it should be.
    return lambda step: jnp.exp2(-1 / jnp.minimum(steps, ramp * step))


def may_loop(params) -> bool:
    """Whether steps may be in a loop of one program: not with convolutions on a CPU.

    XLA's fast convolution on a CPU takes one order of dimensions. It brings others into
    that order, but not in the body of a loop, where the gradients of convolutions then
    take 10 to 40 times as long. Kernels of convolutions of images are the only
    parameters with four axes.
    """
    return jax.default_backend() != "cpu" or all(
        jnp.ndim(p) < 4 for p in jax.tree.leaves(params)
    )


def make_train_step(
    loss,
    tx: optax.GradientTransformation,
    ema_decay: float | Callable[[jax.Array], jax.Array],
    accumulate: int = 1,
):
    """(state, batch [b, ...], key) -> (state, metrics), to be jitted with donation.

    Args:
      loss: (params, example, key) -> [] for one example of the batch, which may be
        any pytree with a leading axis b.
      ema_decay: a number, or (step [], 0 at the first) -> [].
      accumulate: the number of equal parts of a batch that are computed one after the
        other, in the memory of one; the gradient is that of the whole batch.
    Returns:
      A step that leaves a state as it is, step count included, where loss, gradient
      or update is not finite, so that the caller sees the count stand still.
    """

    def train_step(state: TrainState, batch, key):
        keys = example_keys(key, state.step, len(jax.tree.leaves(batch)[0]))
        # The step ends on the mask: moments and weight decay would move parameters that
        # are 0, and a network that is not pruned takes the same path with ones.
        value, grads = _value_and_grad(loss, state.params, batch, keys, accumulate)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = apply_mask(optax.apply_updates(state.params, updates), state.mask)
        decay = ema_decay(state.step) if callable(ema_decay) else ema_decay
        new = state.replace(
            step=state.step + 1,
            params=params,
            ema=optax.incremental_update(params, state.ema, 1 - decay),
            opt_state=opt_state,
        )
        metrics = {
            "loss": value,
            "grad_norm": optax.tree.norm(grads),
            "update_norm": optax.tree.norm(updates),
        }
        # A norm tells of all leaves at once: NaN and infinity pass through its sum.
        finite = jnp.isfinite(jnp.array(list(metrics.values()))).all()
        state = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
        metrics["step"] = state.step
        if (spikes := skipped(state)) is not None:
            metrics["skipped"] = spikes
        return state, metrics

    return train_step


def _value_and_grad(loss, params, batch, keys, accumulate):
    """The mean loss of a batch and its gradient, computed in `accumulate` parts."""

    @jax.value_and_grad
    def of(params, batch, keys):
        return jnp.mean(jax.vmap(loss, (None, 0, 0))(params, batch, keys))

    if accumulate == 1:  # a scan of one part would cost compile time only
        return of(params, batch, keys)
    parts = jax.tree.map(
        lambda a: a.reshape(accumulate, -1, *a.shape[1:]), (batch, keys)
    )

    # Sums of means over equal parts: divided by their number they are the mean of the
    # whole batch.
    def add(total, part):
        return jax.tree.map(jnp.add, total, of(params, *part)), None

    total = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    if may_loop(params):
        total, _ = jax.lax.scan(add, total, parts)
    else:
        for i in range(accumulate):
            total, _ = add(total, jax.tree.map(lambda a, i=i: a[i], parts))
    return jax.tree.map(lambda a: a / accumulate, total)
