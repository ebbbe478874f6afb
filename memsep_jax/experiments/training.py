"""Config -> loss, step, sampler and score of one training.

A train step is read in three functions: `make_step` and `loss` here, and
`train.make_train_step`.
"""

import jax
import jax.numpy as jnp

from memsep_jax import data, empirical, parallel, sampling, score, train
from memsep_jax.experiments.config import build
from memsep_jax.experiments.config.build import Parts
from memsep_jax.keys import BRANCH


def network(parts: Parts, params, label=None, key=None, gates=None):
    """F(x, level) with its parameters bound; key switches dropout on."""
    options = {} if key is None else {"train": True, "rngs": {"dropout": key}}

    def call_network(x, level):
        return parts.model.apply({"params": params}, x, level, label, gates, **options)

    return call_network


def score_fn(parts: Parts, params, label=None) -> score.ScoreFn:
    """The trained network as score_fn(x, t)."""
    bound = network(parts, params, label)
    return score.from_network(bound, parts.prediction, parts.process)


def sampled_score(config, parts: Parts, params, label=None) -> score.ScoreFn:
    """The score that is sampled: `score_fn`, guided by config.sampler.guidance."""
    conditional = score_fn(parts, params, label)
    if config.sampler.guidance is None:
        return conditional
    free = score_fn(parts, params, jnp.int32(parts.num_classes))  # `loss` drops to it
    return score.guided(conditional, free, config.sampler.guidance)


def sampled_weights(state, config):
    """The weights of a TrainState that are sampled: by sampler.weights, EMA or raw."""
    return state.ema if config.sampler.weights == "ema" else state.params


def learning_rate(config, n: int):
    """(steps taken) -> the learning rate of the next; None of a user's own optimizer.

    Args: n, training points, which give an epoch its steps.
    """
    settings = config.optimizer
    if settings.name not in train.OPTIMIZERS:
        return None
    schedule = train.SCHEDULES[settings.schedule]
    return jax.jit(schedule(settings.lr, *build.lengths(config, n)))


def sampler(config, made_process, times, shape, score_fn: score.ScoreFn):
    """(key) -> one sample [*shape] of a score, by the settings of config.sampler.

    Raises: ValueError: an option of another sampler, or one that breaks its rule.
    """
    options = build.sampling_options(config)
    return sampling.sampler(score_fn, made_process, times, shape, **options)


def stages(config, parts: Parts, score_fn: score.ScoreFn):
    """The steps of `sampler`, for points of the data, as `sampling.stages`."""
    shape, options = parts.splits.train.x.shape[1:], build.sampling_options(config)
    return sampling.stages(score_fn, parts.process, parts.times, shape, **options)


def loss(parts: Parts, config):
    """(params, example: a Dataset of one, key) -> [], the loss of one example."""

    def example_loss(params, example, key):
        t, eps, drop_key, label_key = noise_of(parts, example.x, key)
        label = example.label
        if parts.num_classes and config.train.label_drop:
            dropped = jax.random.bernoulli(label_key, config.train.label_drop)
            label = jnp.where(dropped, parts.num_classes, label)
        dropout_key = drop_key if getattr(parts.model, "dropout", 0.0) > 0 else None
        bound = network(parts, params, label, dropout_key)
        points = (example.x, t, eps)
        predicts = objective(parts, config, label)
        return train.prediction_loss(
            bound, parts.prediction, parts.process, *points, predicts
        )

    return example_loss


def make_step(config, parts, mesh):
    """(state, batch: Dataset [b, ...], dataset) -> (state, metrics).

    Args: dataset, all of it, where the objective needs it (`train.temperature`).
    """
    key = build.keys(config.seed)

    def step(state, batch, dataset):
        # An argument: as a constant, the data would be part of the program.
        own = parts._replace(splits=parts.splits._replace(train=dataset))
        train_step = train.make_train_step(
            loss(own, config),
            parts.tx,
            build.ema_decay(config),
            config.train.accumulate,
        )
        batch = data.augment(batch, key.data, state.step, config.train.flip)
        batch = jax.lax.with_sharding_constraint(batch, parallel.by_batch(mesh))
        return train_step(state, batch, key.train)

    return step


# The rest: what those are made of, and many steps in one program.


def init_params(parts: Parts, key):
    """Fresh parameters for one example of the data."""
    label = jnp.zeros((), jnp.int32) if parts.num_classes else None
    x = jnp.zeros(parts.splits.train.x.shape[1:], jnp.float32)
    # jit: linen's init is slow when it runs operation by operation.
    return jax.jit(parts.model.init)(key, x, jnp.zeros(()), label)["params"]


def noise_of(parts: Parts, x0, key):
    """The time and the noise of one training example, and two keys for the rest."""
    t_key, eps_key, drop_key, label_key = jax.random.split(key, 4)
    eps = jax.random.normal(eps_key, x0.shape, x0.dtype)
    return parts.law(t_key), eps, drop_key, label_key


def objective(parts, config, label):
    """What the network learns to predict: `train.clean`, or by a mitigation."""
    if config.train.ambient is not None:
        # One key for all seeds: the noisy copies belong to the data.
        key = jax.random.key(BRANCH)
        return train.ambient(parts.process, config.train.ambient, key)
    if config.train.temperature is None:
        return train.clean(parts.process)
    (points, labels), log_weights = parts.splits.train, None
    if label is not None:  # a mean of the training points of this label alone
        among = (labels == label) | (label == parts.num_classes)
        log_weights = jnp.where(among, 0.0, -jnp.inf)
    if config.train.flip:
        points = jnp.concatenate([points, jnp.flip(points, -2)])
        log_weights = log_weights if label is None else jnp.tile(log_weights, 2)
    denoiser = empirical.denoiser(
        points,
        parts.process,
        log_weights=log_weights,
        temperature=config.train.temperature,
    )
    return train.smoothed(parts.process, denoiser)


def make_steps(config, parts, mesh):
    """(state, dataset, rows [k, b], first, count) -> (state, metrics of the last step).

    Takes `count` steps, at most k, in one call, since a call costs more than a step of
    a small network. The program is the same for every count, and so is every bit. A
    refused step leaves the state as it is, and so do all steps after it, in later calls
    too.

    Args: rows of `order`, from step `first` on, which the state has come to; None where
      the dataset is the batch of one step. No more than one where steps may not loop:
      `train.may_loop`.
    """
    step = make_step(config, parts, mesh)

    def on_rows(state, dataset, rows, i):
        if rows is None:
            return step(state, dataset, None)
        batch = jax.tree.map(lambda a: a[rows[i]], dataset)
        return step(state, batch, dataset)

    def one(state, dataset, rows, first):
        new, metrics = on_rows(state, dataset, rows, 0)
        stays = state.step != first
        state = jax.tree.map(lambda a, b: jnp.where(stays, a, b), state, new)
        return state, metrics | {"step": state.step}

    def steps(state, dataset, rows, first, count):
        if not train.may_loop(state.params):
            assert rows is None or len(rows) == 1, len(rows)
            return one(state, dataset, rows, first)
        count = jnp.where(state.step == first, count, 0)

        def body(_, carry):
            state, _ = carry
            # By the state's own step, so that a refused one is not passed over.
            return on_rows(state, dataset, rows, state.step - first)

        _, shapes = jax.eval_shape(on_rows, state, dataset, rows, first)
        none = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
        return jax.lax.fori_loop(0, count, body, (state, none))

    return steps


def order(config, n: int):
    """(step) -> the rows of its batch, [b], of n training points: `data.order`."""
    group = config.train
    key = build.keys(config.seed).data
    return data.order(n, key, group.batch_size, build.ORDERS[group.order])


def flops(lowered) -> float:
    """FLOPs of a lowered program; nan where XLA does not say."""
    cost = lowered.cost_analysis() or {}
    return float(cost.get("flops", float("nan")))


def count(params) -> int:
    """The number of parameters."""
    return sum(p.size for p in jax.tree.leaves(params))
