"""Prune a trained network in one shot, fine-tune it, and measure its samples.

Algorithm 1 of Ye 2025, with other criteria beside the paper's: what happens to one
trained network. The sweeps over criteria, ratios and seeds are in `mitigate`.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memsep_jax import (
    checkpoint,
    data,
    fidelity,
    memorization,
    neighbours,
    parallel,
    process,
    prune,
    train,
)
from memsep_jax.experiments import record, training
from memsep_jax.experiments.config import build
from memsep_jax.experiments.studies.evaluate import place
from memsep_jax.keys import BRANCH

# Which units are removed.


def importance(config, parts, params, criterion: str):
    """The importance of every unit by a criterion.   Returns: [layers, units].

    Args: criterion, one of prune.CRITERIA that is measured.
    Raises: NonFiniteError naming layer, unit and field.
    """
    group = config.prune.group
    if criterion == "magnitude":
        units = np.asarray(prune.magnitude(params, group))
    else:
        sizes = _sizes(config, parts, criterion)

        def one(i, params, data):
            return sizes(params, data, i)

        each = record.mapped(one, config.run.chunk)
        drawn = each(config.prune.draws, params, parts.splits.train)
        # E |dL/dxi_h| over its norm in the layer: Algorithm 1 of Ye 2025.
        units = np.asarray(prune.normalised(drawn.mean(axis=0, dtype=np.float64)))
    if not np.isfinite(units).all():
        layer, unit = np.argwhere(~np.isfinite(units))[0]
        weights = [
            name
            for name, leaf in checkpoint.leaves(params).items()
            if not np.isfinite(leaf).all()
        ]
        cause = f"the weights are not finite in {', '.join(weights[:5])}"
        if not weights:
            cause = "the weights are finite: look at its times, prune_times"
        raise train.NonFiniteError(
            f"prune.criterion={criterion} is not finite at layer {layer}, unit {unit} "
            f"of {group}; nothing was pruned; {cause}"
        )
    return units


def _sizes(config, parts, criterion):
    """(params, data, i) -> [layers, units], of the i-th draw of a point and its X_t."""
    key, group = build.keys(config.seed).prune, config.prune.group
    law = times(config, parts, criterion)

    def sizes(params, data, i):
        t_key, eps_key = jax.random.split(jax.random.fold_in(key, i))
        one = jax.tree.map(lambda a: a[i % len(data.x)], data)
        t, eps = law(t_key), jax.random.normal(eps_key, one.x.shape, one.x.dtype)
        if criterion == "activation":
            x = parts.prediction.scale(t) * process.perturb(
                parts.process, one.x, t, eps
            )
            _, seen = parts.model.apply(
                {"params": params}, x, parts.prediction.level(t), one.label,
                mutable="intermediates",
            )  # fmt: skip
            return prune.activations(seen.get("intermediates", {}), group)

        def loss(gates):
            network = training.network(parts, params, one.label, gates={group: gates})
            return train.prediction_loss(
                network, parts.prediction, parts.process, one.x, t, eps
            )

        # |.| of each draw, before the mean: a trained network is near a minimum, where
        # the mean gradient is 0, and its |.| would be the noise of the draws.
        return jnp.abs(jax.grad(loss)(prune.gates(params, group)))

    return sizes


def times(config, parts, criterion: str):
    """The law of t of a criterion: (key) -> t [], within the sampler's range.

    config.prune_times draws u, small more often than large (Algorithm 1 of Ye 2025:
    Beta(0.8, 2)), as the time of the process prune.clock, whose time means what the
    paper's does; "uniform_t" and "large_t" are its controls.
    """
    end = config.prune_times.t_max or 1.0
    drawn = build.call(process.TIMES, config.prune_times, "prune_times")
    laws = {
        "uniform_t": process.uniform(0.0, end),
        "large_t": lambda key: jnp.clip(end - drawn(key), 0.0, end),
    }
    law = laws.get(criterion, drawn)
    if config.prune.clock:
        clock = process.PROCESSES[config.prune.clock]()
        law = process.on_clock(law, clock, parts.process)
    # The network was not trained, and does not sample, beyond these.
    low, high = config.sampler.t_min, config.sampler.t_max
    return lambda key: jnp.clip(law(key), low, high)


def keep(config, parts, params, measured: dict | None = None) -> np.ndarray:
    """Which units stay by config.prune.   Returns: bool [layers, units].

    Args: measured, known importances of these params by criterion; others are added.
    """
    measured = {} if measured is None else measured
    criterion, ratio = config.prune.criterion, config.prune.ratio
    shape = prune.gates(params, config.prune.group).shape
    if not ratio:
        return np.ones(shape, bool)

    def known(name):
        if name not in measured:
            measured[name] = importance(config, parts, params, name)
        return measured[name]

    # A branch of the key that no draw of an importance has: they count from 0.
    key = jax.random.fold_in(build.keys(config.seed).prune, BRANCH)
    if criterion == "random":
        return prune.keep_random(key, shape, ratio)
    if criterion == "random_per_layer":  # isolates which heads from how many per layer
        like = prune.keep_top(known("small_t"), ratio)
        return prune.keep_random(key, shape, ratio, like)
    if criterion == "highest_first":
        return prune.keep_top(-known("small_t"), ratio)
    return prune.keep_top(known(criterion), ratio)


# Cost, samples and fine-tuning of a network.


def cost(parts, params, stays=None, group: str = "heads") -> dict:
    """Parameters, and FLOPs of one call, of the network of the units that stay."""
    small = params if stays is None else prune.compact(params, stays, group)
    x = jnp.zeros(parts.splits.train.x.shape[1:])
    label = jnp.zeros((), jnp.int32) if parts.num_classes else None

    def call(params, x, t):
        return parts.model.apply({"params": params}, x, t, label)

    lowered = jax.jit(call).lower(small, x, jnp.zeros(()))
    return {"parameters": training.count(small), "flops": training.flops(lowered)}


def watcher(config, parts, generate, twin=None):
    """(weights, first=0, count=num_samples) -> numbers: copies and quality of samples.

    Quality compares samples with held-out points, which the network never saw: there,
    copies are no better than any other sample that looks real. It is measured on the
    pixels, or on measure.features, with the distance on pixels beside it.

    Args: generate, as `evaluate.make_generate` gives it; twin, the training points
      [n, *e] of another network: `nearer` is then the share of samples that are nearer
      to their own training set than to these, ties one half.
    """
    mesh = parallel.make_mesh(jax.local_devices())
    search = neighbours.searcher(np.asarray(parts.splits.train.x))
    other = None if twin is None else neighbours.searcher(np.asarray(twin), 1)
    threshold, held_out = config.memorization.threshold, parts.splits.held_out
    seen_by = spaces(config, parts.splits.train.x.shape[1:])
    null, real = None, {}
    if held_out is not None and len(held_out.x) > 3:  # precision has 3 neighbours
        points = np.asarray(held_out.x)
        null = search(points)
        real = {name: see(points) for name, see in seen_by.items()}
    laws = {name: fidelity.moments(x) for name, x in real.items()}

    def watch(weights, first=0, count=config.sampler.num_samples):
        weights = jax.device_put(weights, parallel.replicated(mesh))
        x = data.like(parts.splits.train.x, generate(weights, first, first + count))
        result = memorization.ratio_of(search(x), null, 0, threshold)
        low, high = result.interval
        emitted = np.unique(result.neighbours.indices[result.memorized, 0])
        numbers = {
            "ratio": result.value,
            "ratio_low": low,
            "ratio_high": high,
            "ratio_of": len(x),
            "emitted": len(emitted) / parts.splits.num_distinct,
            "null": np.nan if result.null is None else result.null,
            "null_of": 0 if null is None else len(points),
            "precision": np.nan,
            "recall": np.nan,
            **{f"{name}frechet": np.nan for name in seen_by},
        }
        if other is not None:
            gaps = result.neighbours.distances[:, 0] - other(x).distances[:, 0]
            numbers["nearer"] = ((gaps < 0) + 0.5 * (gaps == 0)).mean()
        x = np.asarray(x)
        if real and np.isfinite(x).all() and len(x) > 3:
            for name, see in seen_by.items():
                try:
                    seen = see(x)
                except ValueError:
                    continue  # samples of a network that diverged are no images
                distance = fidelity.frechet(seen, laws[name], warn=False)
                numbers[f"{name}frechet"] = distance
                if not name:
                    precision, recall = fidelity.precision_recall(seen, real[name])
                    numbers |= {"precision": precision, "recall": recall}
        return numbers

    return watch


def spaces(config, shape) -> dict:
    """What quality is measured on, by the prefix of its numbers: points -> [m, k].

    Args: shape, of an example.   Returns: measure.features, and the pixels; the pixels.
    """
    space = build.extractor(config, shape)
    return {"": _pixels} if space is None else {"": space.apply, "pixel_": _pixels}


def _pixels(x):
    return np.asarray(x, np.float64).reshape(len(x), -1)


def tuner(config, parts):
    """(params, mask) -> (step, TrainState) at each of `evaluations`: fine-tuning.

    The ordinary step, with the ordinary batches and EMA, at the constant rate prune.lr.
    """
    tx = build.optimizer(
        config, parts.splits.train.x.shape[1:], max(1, config.prune.steps),
        lr=config.prune.lr, schedule="constant", warmup=0,
    )  # fmt: skip
    mesh, wanted = parallel.make_mesh(jax.local_devices()), evaluations(config)
    step_fn = jax.jit(
        training.make_steps(config, parts._replace(tx=tx), mesh), donate_argnums=0
    )
    rows_of = training.order(config, len(parts.splits.train.x))

    def tune(params, mask):
        dataset = jax.device_put(parts.splits.train, parallel.replicated(mesh))
        state = train.init(params, tx, mask)
        state = jax.device_put(state, parallel.replicated(mesh))
        fetched = None
        for step in range(1, config.prune.steps + 1):
            # One step late: the device has the next one waiting, a signal no queue.
            jax.block_until_ready(fetched)
            state, fetched = step_fn(
                state, dataset, rows_of(step - 1)[None], step - 1, 1
            )
            if step not in wanted:
                continue
            # A step that is not finite leaves the state, and its count, as they were.
            if int(fetched["step"]) != step:
                raise train.NonFiniteError(
                    f"fine-tuning stood still before step {step}: a loss or gradient "
                    f"was not finite. Lower prune.lr={config.prune.lr:g}, or set "
                    "optimizer.clip"
                )
            yield step, state

    return tune


def evaluations(config) -> list[int]:
    """The steps of fine-tuning that are measured: the last, and halves of it."""
    steps = {config.prune.steps >> i for i in range(config.prune.looks)}
    return sorted(steps - {0})


# One network from end to end.


class Pruned(NamedTuple):
    """A network along one pruning: at step 0 it is pruned, at the last tuned."""

    keep: np.ndarray  # bool [layers, units]
    state: train.TrainState | None  # at the last step, with its mask
    weights: Any  # those of it that are sampled
    steps: np.ndarray  # [k], 0 first
    numbers: dict  # name -> [k], of `watcher`


def cut(config, params, stays, watch, tune) -> Pruned:
    """Masks the units that do not stay, fine-tunes, and measures on the way.

    Args: watch, `watcher`.   tune, `tuner`; None for no fine-tuning.
    """
    mask = prune.group_mask(params, stays, config.prune.group)
    weights = prune.apply_mask(params, mask)
    steps, rows, state = [0], [watch(weights)], None
    for step, state in tune(params, mask) if tune else ():
        weights = training.sampled_weights(state, config)
        steps.append(step)
        rows.append(watch(weights))
    numbers = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    return Pruned(stays, state, weights, np.array(steps), numbers)


def of_run(config, parts, session, params, generate) -> dict:
    """The pruning of the main job: its network, pruned, and unpruned as a control.

    The pruned state, mask included, is saved in pruned/.

    Returns: for both, arrays over the steps of fine-tuning, and what they cost. Kept in
      the workdir, so that a run that goes on does not do it again.
    """
    groups = ("sampler", "memorization", "prune", "prune_times", "measure")
    folder = place(config, parts, session, params, groups)
    watch, tune = watcher(config, parts, generate), tuner(config, parts)
    group = config.prune.group
    numbers = {"settings": build.to_json(config)["prune"]}

    def work(name, its):
        row = cut(config, params, its, watch, tune)
        if name == "pruned" and row.state is not None:
            kept = session.workdir / "pruned"
            checkpoint.save(kept, config.prune.steps, row.state, keep=1)
        return row.numbers | {"steps": row.steps, "keep": its}

    with session.phase("prune"):
        stays = keep(config, parts, params)
        session.say(
            f"pruning {(~stays).sum()} of {stays.size} {group} by "
            f"{config.prune.criterion}, then {config.prune.steps:,} steps"
        )
        # The control has the same extra steps: else these would count as pruning.
        for name, its in {"pruned": stays, "control": np.ones_like(stays)}.items():
            kept = record.kept(folder / f"{name}.npz", partial(work, name, its))
            numbers[name] = kept | cost(parts, params, its, group)
    return numbers
