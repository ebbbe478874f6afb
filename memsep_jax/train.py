"""TrainState, the loss of one example, the train step, optimizers and schedules."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct

from memsep_jax.process import Process, is_known, noise_to_signal, perturb
from memsep_jax.prune import apply_mask, check_mask, full_mask
from memsep_jax.score import Prediction, target

Params = Any
WINDOW = 64  # steps, whose gradients are the usual ones


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
    params = apply_mask(params, mask)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(jnp.copy, params),
        opt_state=tx.init(params),
        mask=mask,
    )


def noise_loss(apply, params: Params, process: Process, x0, t, eps):
    """|| apply(params, X_t, t) - eps ||^2 / d, the eps-loss of one example.

    Args: x0 [*e], t [], eps [*e].   Returns: [].   Source: Ho 2020, eq. 14.
    """
    error = apply(params, perturb(process, x0, t, eps), t) - eps
    return jnp.mean(error**2)


class Question(NamedTuple):
    """What a network is shown at a time t, and the answer that it is asked for."""

    x: jax.Array  # [*e] noisy point: alpha(t) x0 + sigma(t) eps
    x0: jax.Array  # [*e] the point to find in it
    eps: jax.Array  # [*e] and the noise
    weight: jax.Array | float = 1.0  # [] of the squared error


# Makers of questions: (x0 [*e], t [], eps [*e]) -> Question.


def clean(process: Process):
    """The training point behind X_t: answered best by the copying E[X_0 | X_t]."""
    return lambda x0, t, eps: Question(perturb(process, x0, t, eps), x0, eps)


def smoothed(process: Process, denoise):
    """A mean of training points in place of the one behind X_t.

    With the empirical denoiser at temperature T, the loss is least at the score of a
    smoothed law instead of the empirical score (Chen 2025, Zhou 2026). At T = 1 it is
    least where that of `clean` is, and only its noise is less.

    Args: denoise, (x [*e], t []) -> [*e], such as `empirical.denoiser`.
    """

    def ask(x0, t, eps):
        x = perturb(process, x0, t, eps)
        mean = denoise(x, t)
        # Not (x - alpha mean) / sigma: exact where the mean is x0, at every sigma.
        noise = eps + (x0 - mean) / noise_to_signal(process, t)
        return Question(x, mean, noise)

    return ask


def ambient(process: Process, t_n: float, key):
    """Beyond the time t_n, one noisy copy of each training point, never the point.

    With s = sigma / alpha and r = s(t_n)^2 / s(t)^2, the network is shown noise upon
    y = x0 + s(t_n) z, and D is trained by || (1 - r) D + r X_t / alpha - y ||^2. Over
    fresh z that is least at E[X_0 | X_t]; but a point always has the same z, a function
    of its bits: the same where it is twice in the data, another where it is mirrored.

    Source: Daras 2024 (arXiv 2404.10177), ambient denoising score matching; Shah 2025.
    """
    s_n = noise_to_signal(process, jnp.asarray(float(t_n)))

    def ask(x0, t, eps):
        root = s_n / noise_to_signal(process, t)  # of r
        # Up to t_n: `clean`. It is the quotient that is below 1, not t_n below t, so
        # that what is kept is never 0.
        root = jnp.where(root < 1, root, 0.0)
        s_y, kept = jnp.where(root > 0, s_n, 0.0), (1 - root) * (1 + root)
        y = x0 + s_y * jax.random.normal(_key_of(key, x0), x0.shape, x0.dtype)
        # || ... || = (1 - r) || D - (y - r X_t / alpha) / (1 - r) ||, as x0 + s eps.
        noise = eps / jnp.sqrt(kept)
        x = perturb(process, y, t, jnp.sqrt(kept) * eps)
        return Question(x, y - s_y * root * noise, noise, kept**2)

    return ask


def _key_of(key, x):
    """A key that is a function of the bits of x [*e]."""
    words = jax.lax.bitcast_convert_type(x, jnp.uint32).reshape(-1)
    words ^= jnp.arange(words.size, dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # MurmurHash3's fmix32
        words = (words ^ (words >> shift)) * jnp.uint32(factor)
    return jax.random.fold_in(key, jnp.sum(words ^ (words >> 16), dtype=jnp.uint32))


def prediction_loss(
    network,
    prediction: Prediction,
    process: Process,
    x0,
    t,
    eps,
    ask: Callable[..., Question] | None = None,
):
    """Weighted mean square of F(scale X_t, level) - target, for one example.

    Args:
      network: (x [*e], level []) -> [*e].   x0 [*e], t [], eps [*e].
      ask: (x0, t, eps) -> Question; None: `clean`.
    Returns: [].
    """
    asked = (ask or clean(process))(x0, t, eps)
    answer = network(prediction.scale(t) * asked.x, prediction.level(t))
    error = answer - target(prediction, process, asked.x0, t, asked.eps)
    return asked.weight * prediction.weight(t) * jnp.mean(error**2)


def example_keys(key, step, size: int):
    """The keys of the examples of a step.   Returns: [size]."""
    return jax.random.split(jax.random.fold_in(key, step), size)


def ema_decay(half_life: float, batch_size: int, ramp: float | None = None):
    """What a step keeps of the EMA, so that half of it is left after half_life.

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
    return lambda step: jnp.exp2(-1 / jnp.minimum(steps, ramp * step))


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
      accumulate: the batch is split in so many parts, one after the other, for the
        memory of one; the gradient is that of the whole batch.
    Returns:
      A step that leaves a state as it is, step count included, where loss, gradient
      or update is not finite, so that the caller sees the count stand still.
    """

    def batch_loss(params, batch, keys):
        return jnp.mean(jax.vmap(loss, (None, 0, 0))(params, batch, keys))

    def value_and_grad(params, batch, keys):
        if accumulate == 1:
            return jax.value_and_grad(batch_loss)(params, batch, keys)
        parts = jax.tree.map(
            lambda a: a.reshape(accumulate, -1, *a.shape[1:]), (batch, keys)
        )

        def body(total, part):
            found = jax.value_and_grad(batch_loss)(params, *part)
            return jax.tree.map(jnp.add, total, found), None

        zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        total, _ = jax.lax.scan(body, zeros, parts)
        return jax.tree.map(lambda a: a / accumulate, total)

    def train_step(state: TrainState, batch, key):
        size = len(jax.tree.leaves(batch)[0])
        keys = example_keys(key, state.step, size)
        value, grads = value_and_grad(state.params, batch, keys)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = apply_mask(optax.apply_updates(state.params, updates), state.mask)
        decay = ema_decay(state.step) if callable(ema_decay) else ema_decay
        ema = optax.incremental_update(params, state.ema, 1 - decay)
        grad_norm, update_norm = optax.tree.norm(grads), optax.tree.norm(updates)
        finite = (
            jnp.isfinite(value) & jnp.isfinite(grad_norm) & jnp.isfinite(update_norm)
        )
        new = state.replace(
            step=state.step + 1, params=params, ema=ema, opt_state=opt_state
        )
        state = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
        metrics = {
            "step": state.step,
            "loss": value,
            "grad_norm": grad_norm,
            "update_norm": update_norm,
        }
        spikes = skipped(state)
        return state, metrics if spikes is None else metrics | {"skipped": spikes}

    return train_step


# Schedules: (lr, steps, warmup) -> (step) -> lr.


def constant(lr: float, steps: int | None = None, warmup: int = 0):
    """Linear warm-up from 0, then constant."""
    if not warmup:
        return optax.constant_schedule(lr)
    return optax.join_schedules(
        [optax.linear_schedule(0.0, lr, warmup), optax.constant_schedule(lr)], [warmup]
    )


def cosine(lr: float, steps: int | None = None, warmup: int = 0):
    """Linear warm-up from 0, then a cosine to 0 at the last of `steps`."""
    if steps is None or warmup >= steps:
        raise ValueError(
            f"warmup={warmup} must be below the number of steps, {steps}, of "
            "a cosine schedule"
        )
    return optax.warmup_cosine_decay_schedule(0.0 if warmup else lr, lr, warmup, steps)


SCHEDULES = {"constant": constant, "cosine": cosine}


class Skipping(NamedTuple):
    """The state of `skipping`."""

    norms: jax.Array  # [WINDOW] of the gradients of the last steps taken; 0: no step
    skipped: jax.Array  # [] number of steps
    inner: optax.OptState


def skipping(tx: optax.GradientTransformation, factor: float):
    """tx, but for steps whose gradient is far larger than usual: they change nothing.

    Such a gradient's norm is more than `factor` times the median of those of the last
    WINDOW steps taken; before there are so many, none is skipped. A norm that stays so
    large never becomes usual: watch the count.

    Source: Chowdhery 2022 (arXiv 2204.02311), section 5.1, which skips by hand.
    """

    def init(params):
        return Skipping(jnp.zeros(WINDOW), jnp.zeros((), jnp.int32), tx.init(params))

    def update(grads, state, params=None):
        norm, (norms, skipped, _) = optax.tree.norm(grads), state
        spike = (norms[0] > 0) & (norm > factor * jnp.median(norms))
        updates, inner = tx.update(grads, state.inner, params)
        taken = jnp.append(norms[1:], norm), skipped, inner
        left = norms, skipped + 1, state.inner
        # Not a branch: networks of an ensemble are trained as one.
        new = jax.tree.map(lambda a, b: jnp.where(spike, a, b), left, taken)
        updates = jax.tree.map(lambda u: jnp.where(spike, 0, u), updates)
        return updates, Skipping(*new)

    return optax.GradientTransformation(init, update)


def skipped(state: TrainState):
    """The number of steps that `skipping` has skipped, []; None without it."""
    return optax.tree.get(state.opt_state, "skipped")


# Optimizers: the first argument is the peak learning rate.


def adamw(
    lr: float,
    weight_decay: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
    clip: float | None = None,
    schedule: str = "constant",
    warmup: int = 0,
    steps: int | None = None,
    skip_spikes: float | None = None,
) -> optax.GradientTransformation:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019).

    Args: clip, the largest global norm of a gradient; steps, for schedules that end;
      skip_spikes, the factor of `skipping`.
    """
    guard = clip, skip_spikes
    rate = _rate(lr, weight_decay, guard, schedule, warmup, steps, b1=b1, b2=b2)
    return _guarded(guard, optax.adamw(rate, b1, b2, weight_decay=weight_decay))


def adam(
    lr: float,
    weight_decay: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
    clip: float | None = None,
    schedule: str = "constant",
    warmup: int = 0,
    steps: int | None = None,
    skip_spikes: float | None = None,
) -> optax.GradientTransformation:
    """Adam with coupled L2: the decay is part of the gradient (as in Gu 2023)."""
    guard = clip, skip_spikes
    rate = _rate(lr, weight_decay, guard, schedule, warmup, steps, b1=b1, b2=b2)
    coupled = optax.add_decayed_weights(weight_decay)
    return _guarded(guard, optax.chain(coupled, optax.adam(rate, b1, b2)))


def sgd(
    lr: float,
    weight_decay: float = 0.0,
    momentum: float = 0.9,
    clip: float | None = None,
    schedule: str = "constant",
    warmup: int = 0,
    steps: int | None = None,
    skip_spikes: float | None = None,
) -> optax.GradientTransformation:
    """Stochastic gradient descent with momentum and coupled L2."""
    guard = clip, skip_spikes
    rate = _rate(lr, weight_decay, guard, schedule, warmup, steps, momentum=momentum)
    coupled = optax.add_decayed_weights(weight_decay)
    return _guarded(guard, optax.chain(coupled, optax.sgd(rate, momentum)))


OPTIMIZERS = {"adamw": adamw, "adam": adam, "sgd": sgd}


def _rate(lr, weight_decay, guard, schedule, warmup, steps, **averages):
    """The schedule; or one ValueError with a line for each number that is wrong."""
    (clip, skip_spikes), wrong = guard, []
    if not lr > 0:
        wrong.append(f"lr={lr} must be positive")
    # A traced one, of an ensemble of networks, was looked at before.
    if is_known(weight_decay) and weight_decay < 0:
        wrong.append(f"weight_decay={weight_decay} must not be negative")
    if clip is not None and not clip > 0:
        wrong.append(f"clip={clip} must be positive, or None for no clipping")
    if skip_spikes is not None and not skip_spikes > 1:
        wrong.append(
            f"skip_spikes={skip_spikes} must be above 1, the median norm, or "
            "None to skip no step"
        )
    if warmup < 0:
        wrong.append(f"warmup={warmup} must not be negative")
    for name, value in averages.items():
        if not 0 <= value < 1:
            wrong.append(f"{name}={value} must be in [0, 1)")
    if schedule not in SCHEDULES:
        wrong.append(f"schedule={schedule!r} is not one of {', '.join(SCHEDULES)}")
    if wrong:
        raise ValueError("\n".join(wrong))
    return SCHEDULES[schedule](lr, steps, warmup)


def _guarded(guard, tx):
    clip, skip_spikes = guard
    tx = tx if clip is None else optax.chain(optax.clip_by_global_norm(clip), tx)
    return tx if skip_spikes is None else skipping(tx, skip_spikes)
