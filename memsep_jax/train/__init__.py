"""Training: the step, what a network learns to predict, and the optimizers."""

# ruff: noqa: F401 - names for a prompt and for other rooms
from memsep_jax.train.objectives import (
    Question,
    Target,
    ambient,
    clean,
    noise_loss,
    prediction_loss,
    smoothed,
)
from memsep_jax.train.optimizers import (
    COUPLED,
    OPTIMIZERS,
    SCHEDULES,
    WINDOW,
    Skipping,
    adam,
    adamw,
    constant,
    cosine,
    sgd,
    skipped,
    skipping,
)
from memsep_jax.train.step import (
    NonFiniteError,
    Params,
    TrainState,
    ema_decay,
    example_keys,
    init,
    make_train_step,
    may_loop,
)
