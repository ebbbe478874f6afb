"""Optimizers, their learning rates over time, and steps that are skipped."""

import functools
import inspect
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from memsep_jax.checks import is_known

# Steps whose median gradient norm is the usual one: a median, as spikes themselves
# would raise a mean.
WINDOW = 64

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
    """tx, except that a step with a far larger gradient than usual changes nothing.

    Such a gradient has a norm of more than `factor` times the median of the last WINDOW
    steps taken; none is skipped before that many were taken. Where the norm stays so
    large, every step is skipped: watch the count.

    Source: Chowdhery 2022 (arXiv 2204.02311), section 5.1, which skips by hand.
    """

    def init(params):
        return Skipping(jnp.zeros(WINDOW), jnp.zeros((), jnp.int32), tx.init(params))

    def update(grads, state, params=None):
        norm, (norms, skipped, _) = optax.tree.norm(grads), state
        # The window fills from its end, so its first norm is above 0 once it is full.
        spike = (norms[0] > 0) & (norm > factor * jnp.median(norms))
        updates, inner = tx.update(grads, state.inner, params)
        taken = jnp.append(norms[1:], norm), skipped, inner
        left = norms, skipped + 1, state.inner
        # A spike leaves the inner state as it is, too: moments would remember it for
        # 1 / (1 - b2) steps.
        # Not lax.cond: under the vmap of an ensemble both branches would run anyway.
        new = jax.tree.map(lambda a, b: jnp.where(spike, a, b), left, taken)
        updates = jax.tree.map(lambda u: jnp.where(spike, 0, u), updates)
        return updates, Skipping(*new)

    return optax.GradientTransformation(init, update)


def skipped(state):
    """The number of steps that `skipping` has skipped, []; None without it.

    Args: state, a TrainState.
    """
    return optax.tree.get(state.opt_state, "skipped")


class Settings(NamedTuple):
    """The arguments that all optimizers share."""

    lr: float  # at the peak of the schedule
    weight_decay: float = 0.0
    clip: float | None = None  # largest global norm of a gradient
    schedule: str = "constant"  # one of SCHEDULES
    warmup: int = 0  # steps
    steps: int | None = None  # length of a schedule that ends
    skip_spikes: float | None = None  # factor of `skipping`


def _optimizer(make):
    """make(rate, weight_decay, **averages) as an optimizer that takes all Settings.

    Its arguments are lr, weight_decay, the averages, and the other Settings.

    Raises: ValueError with a line for each number that is wrong.
    """
    # What all optimizers share is stated once, in Settings, and yet each of them has a
    # true signature, which a config reads as its fields.
    lr, weight_decay, *others = inspect.signature(Settings).parameters.values()
    _, _, *averages = inspect.signature(make).parameters.values()
    signature = inspect.Signature([lr, weight_decay, *averages, *others])

    @functools.wraps(make)
    def optimizer(*args, **kwargs):
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        own = {average.name: given.arguments.pop(average.name) for average in averages}
        settings = Settings(**given.arguments)
        _check(settings, own)
        schedule = SCHEDULES[settings.schedule]
        rate = schedule(settings.lr, settings.steps, settings.warmup)
        tx = make(rate, settings.weight_decay, **own)
        # First in the chain: moments see the clipped gradient.
        if settings.clip is not None:
            tx = optax.chain(optax.clip_by_global_norm(settings.clip), tx)
        # Outside of the clipping, which would hide a spike from it.
        skips = settings.skip_spikes is not None
        return skipping(tx, settings.skip_spikes) if skips else tx

    optimizer.__signature__ = signature  # what a config, help() and editors read
    return optimizer


@_optimizer
def adamw(rate, weight_decay, b1: float = 0.9, b2: float = 0.999):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019)."""
    return optax.adamw(rate, b1, b2, weight_decay=weight_decay)


@_optimizer
def adam(rate, weight_decay, b1: float = 0.9, b2: float = 0.999):
    """Adam with coupled L2: weight_decay times the weights is added to the gradient.

    It stands beside the loss as that is passed. Gu 2023 (EDM's code) sum over the d
    values of an image, where `prediction_loss` is the mean: the same L2 beside it is
    theirs over d, adam(2e-4, weight_decay=1e-3 / 3_072) for 32 x 32 x 3 pixels. A
    config takes theirs.
    """
    coupled = optax.add_decayed_weights(weight_decay)
    return optax.chain(coupled, optax.adam(rate, b1, b2))


@_optimizer
def sgd(rate, weight_decay, momentum: float = 0.9):
    """Stochastic gradient descent with momentum and coupled L2, as that of `adam`."""
    coupled = optax.add_decayed_weights(weight_decay)
    return optax.chain(coupled, optax.sgd(rate, momentum))


OPTIMIZERS = {"adamw": adamw, "adam": adam, "sgd": sgd}
COUPLED = {"adam", "sgd"}  # their decay is part of the gradient


def _check(settings, averages):
    lr, weight_decay, clip, schedule, warmup, _, skip_spikes = settings
    wrong = []
    if not lr > 0:
        wrong.append(f"lr={lr} must be positive")
    # The weight decay of an ensemble is traced, and was checked before.
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
