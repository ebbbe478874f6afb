"""Many small networks of one shape, trained and sampled in one compiled program.

Experiment `ensemble`: a network for each point of config.sweep. Networks that differ
only in seed, number of points or weight decay are one vmapped ensemble.
"""

import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memsep_jax import data, memorization, mixture, sampling, train
from memsep_jax.experiments import record, training
from memsep_jax.experiments.config import build, grid
from memsep_jax.experiments.reporting import figures
from memsep_jax.experiments.studies import results
from memsep_jax.experiments.studies.study import Study

NATS = 1.0  # a log-likelihood that half of the steps move farther than this is none
LEAST = 0.1  # share of points with one, below which their median says nothing


class Members(NamedTuple):
    """What differs between the networks of an ensemble, stacked."""

    x: jax.Array  # [m, n_max, *e] training points, padded
    n: jax.Array  # [m] the number of real ones
    weight_decay: jax.Array  # [m]
    keys: Any  # build.Keys of [m] keys


def check(config) -> build.Parts:
    """The parts of the first point.   Raises: ConfigError."""
    if config.measure.likelihood:
        build.truth(config)
    return grid.check(config)


def measure(points, session):
    """Trains the networks of some points of one shape.

    Yields: for each point its numbers, or the error that it alone failed with.
    """
    configs = [point.config for point in points]
    with session.phase("data"):
        built = [build.build(config) for config in configs]
    parts, config = built[0], configs[0]
    started = time.monotonic()
    with session.phase("train"):
        state, losses = learn(configs, built)
    seconds = (time.monotonic() - started) / len(points)
    weights = training.sampled_weights(state, config)
    with session.phase("sample"):
        drawn = np.asarray(_samples(config, parts, weights, configs))
    likelihoods = [{}] * len(points)
    if config.measure.likelihood:
        with session.phase("likelihood"):
            likelihoods = _likelihoods(config, parts, weights, built, configs)
    failed = failures(state.step, parts.steps)
    for i, (own, samples) in enumerate(zip(built, drawn, strict=True)):
        if failed[i] is None and not np.isfinite(samples).all():
            failed[i] = train.NonFiniteError("samples are not finite")
        if failed[i] is not None:
            yield failed[i]
            continue
        row = {
            "parameters": training.count(weights) // len(points),
            "steps": int(state.step[i]),
            "loss": losses[i],
            "seconds": seconds,
            **likelihoods[i],
        }
        with session.phase("neighbours"):
            held_out = None if own.splits.held_out is None else own.splits.held_out.x
            train_x = np.asarray(own.splits.train.x)
            threshold = config.memorization.threshold
            result = memorization.ratio(samples, train_x, held_out, threshold)
        low, high = result.interval
        row |= {
            "ratio": result.value,
            "ratio_low": low,
            "ratio_high": high,
            "ratio_of": len(samples),
            "null": np.nan if result.null is None else result.null,
            "null_of": 0 if held_out is None else len(held_out),
            "samples": samples,
            "memorized": result.memorized,
            "train": train_x[: len(samples)],
        }
        yield row


def draw(metrics, points):
    """(name, caption, figure) of each picture: see `study.Study`."""
    rows = metrics["table"]
    varied = [a for a in grid.AXES if len({row.get(a) for row in rows}) > 1]
    varied = varied or [next(a for a in grid.AXES if a in rows[0])]
    *others, axis = sorted(varied, key=lambda a: a != "setting")
    label = grid.LABELS[axis]
    if axis == "setting":  # not a number: its place in the table stands for it
        label += ", by its place in the table"
        places = {row[axis]: i for i, row in enumerate(rows, 1)}
        rows, points = (
            [row | {axis: np.asarray(places[str(row[axis])])} for row in some]
            for some in (rows, points)
        )
    yield _curves(rows, points, others, axis, label)
    if len(varied) == 2:
        yield _heatmap(rows, varied)
    first = [point for point in points if int(point["seed"]) == 0]
    if first and {point["samples"].shape[1:] for point in first} == {(2,)}:
        panels = []
        for point in first[:6]:
            title = grid.label(point, varied)
            ratio = f"{100 * point['memorized'].mean():.0f} % memorized"
            arrays = (point[k] for k in ("samples", "memorized", "train"))
            panels.append((f"{title}\n{ratio}", *arrays))
        caption = "Samples of the networks of the first seed."
        yield "clouds", caption, figures.clouds(panels)


def _curves(rows, points, others, axis, label):
    """Memorized samples and lost likelihood against an axis."""
    groups = results.grouped(rows, lambda row: grid.label(row, others))

    def lines(name):
        for text, group in groups.items():
            x = [row[axis] for row in group]
            yield figures.line(x, [row[name] for row in group], text)

    scales = {"weight_decay": "symlog", "setting": "linear"}
    scale = {"xlabel": label, "xscale": scales.get(axis, "log")}
    (null, *_) = lines("null")
    null = null._replace(style="--", color="#666666", label="null level", low=None)
    panels = [
        figures.Panel(
            "copies", [*lines("ratio"), null], ylabel="memorized samples",
            yscale="linear", percent=True, **scale,
        )
    ]  # fmt: skip
    caption = "Share of memorized samples against " + label
    if "log_likelihood" in rows[0]:
        panels += [
            figures.Panel(
                "held-out points", list(_lost(points, others, axis)),
                ylabel="log-likelihood below the truth's, nats", **scale,
            ),
            figures.Panel(
                "held-out points", list(lines("unresolved")), yscale="linear",
                ylabel="without a likelihood", percent=True, **scale,
            ),
        ]  # fmt: skip
        caption += (
            ". In the middle, how far the log-likelihood of held-out points under the "
            "model, by its probability-flow ODE, lies below that under the truth: "
            "medians over points and seeds, with the range of the seeds as a band; "
            "less than 0.01 is shown as 0.01. Points whose flow the steps do not "
            f"resolve (half as many change the value by over {NATS:g} nat) have no "
            "likelihood and are left out; right, their share. No median is shown where "
            f"fewer than {100 * LEAST:g} % have one"
        )
    return "curves", caption + ".", figures.curves(panels)


def _heatmap(rows, varied):
    """Memorized samples as a table of the two axes that vary."""
    columns, names = (sorted({row[a] for row in rows}) for a in varied)
    shares = np.full((len(names), len(columns)), np.nan)
    for row in rows:
        place = names.index(row[varied[1]]), columns.index(row[varied[0]])
        shares[place] = figures.Interval.read(row["ratio"]).mean
    across, down = (grid.LABELS[axis] for axis in varied)
    figure = figures.heatmap(shares, names, columns, down, across, "memorized samples")
    return "heatmap", "The same as a table of means over the seeds.", figure


def _lost(points, others, axis):
    """Lines of the nats that each network loses: median and range over the seeds."""
    groups = results.grouped(points, lambda point: grid.label(point, others))
    for label, some in groups.items():
        nats: dict = {}
        for point in some:
            lost = point["truth_log_likelihood"] - point["log_likelihood"]
            # nan, of a network without likelihoods, stays nan.
            nats.setdefault(point[axis].item(), []).append(np.maximum(lost, 0.01))
        middle, low, high = (
            [f(values) for values in nats.values()] for f in (np.median, np.min, np.max)
        )
        yield figures.Line(list(nats), middle, label, low, high)


def learn(configs, built):
    """Trains the networks of some configs that differ in no field that changes a shape.

    Args: configs, and the build.Parts of each.
    Returns: train.TrainState with a leading axis [m], and the last losses [m].
    """
    config, parts = configs[0], built[0]
    loss = training.loss(parts, config)

    def tx(member):
        shape, decay = parts.splits.train.x.shape[1:], member.weight_decay
        return build.optimizer(config, shape, parts.steps, weight_decay=decay)

    def batch(member, key):
        # With replacement, so that n may differ between the networks.
        rows = jax.random.randint(key, (config.train.batch_size,), 0, member.n)
        return data.Dataset(member.x[rows])

    members = _members(configs, built)
    return fit(config, parts, members, lambda member: loss, tx, batch)


def fit(config, parts, members, loss, tx, batch):
    """Trains networks of one shape, each on its part of `members`, as one program.

    Args:
      members: a tree of arrays [m, ...] with `keys`, the build.Keys of each network.
      loss: member -> (params, example, key) -> [].
      tx: member -> optax.GradientTransformation.
      batch: (member, key) -> the examples of one step.
    Returns:
      train.TrainState with a leading axis [m], and the last losses [m].
    """
    shape, decay = parts.splits.train.x.shape[1:], build.ema_decay(config)

    def init(member):
        x, level = jnp.zeros(shape), jnp.zeros(())
        params = parts.model.init(member.keys.init, x, level)["params"]
        return train.init(params, tx(member))

    def take(carry, member, i):
        step = train.make_train_step(loss(member), tx(member), decay)
        examples = batch(member, jax.random.fold_in(member.keys.data, i))
        state, metrics = step(carry[0], examples, member.keys.train)
        return state, metrics["loss"]

    def advance(carry, member, first, last):
        return jax.lax.fori_loop(first, last, lambda i, c: take(c, member, i), carry)

    def one_by_one(carry, members, first, last):
        for i in range(first, last):
            carry = one(carry, members, i)
        return carry

    state = jax.jit(jax.vmap(init))(members)
    carry = (state, jnp.zeros(len(state.step)))
    one = jax.jit(jax.vmap(take, (0, 0, None)), donate_argnums=0)
    many = jax.jit(jax.vmap(advance, (0, 0, None, None)), donate_argnums=0)
    single = jax.tree.map(lambda a: a[0], state.params)
    steps = many if train.may_loop(single) else one_by_one
    state, losses = record.paced(steps)(carry, parts.steps, members)
    return state, np.asarray(losses)


def failures(applied, steps: int) -> list[train.NonFiniteError | None]:
    """The error of each network, None where it succeeded: nan spreads to no other.

    Args: applied [m], the number of training steps that were finite; steps, of all.
    """
    return [
        None
        if n == steps
        else train.NonFiniteError(
            f"{steps - n:,} of {steps:,} steps gave a loss, gradient or update that is "
            "not finite. Lower optimizer.lr, set optimizer.clip, or look at the data"
        )
        for n in np.asarray(applied).tolist()
    ]


def _members(configs, built):
    sizes = [len(parts.splits.train.x) for parts in built]
    padded = [
        np.pad(
            np.asarray(parts.splits.train.x),
            [(0, max(sizes) - n)] + [(0, 0)] * (parts.splits.train.x.ndim - 1),
        )
        for parts, n in zip(built, sizes, strict=True)
    ]
    keys = [build.keys(config.seed) for config in configs]
    return Members(
        jnp.asarray(np.stack(padded)),
        jnp.asarray(sizes),
        jnp.asarray([c.optimizer.weight_decay for c in configs], jnp.float32),
        jax.tree.map(lambda *k: jnp.stack(k), *keys),
    )


def _samples(config, parts, weights, configs):
    """Samples [m, num_samples, *e], of each network from its own seed."""
    keys = jnp.stack([build.keys(c.seed).sample for c in configs])
    keys = jax.vmap(lambda key: jax.random.split(key, config.sampler.num_samples))(keys)

    def stages(params):
        return training.stages(config, parts, training.score_fn(parts, params))

    @jax.jit
    def begin(weights, keys):
        each = jax.vmap(lambda params, key: stages(params)[0](key), (None, 0))
        return jax.vmap(each)(weights, keys)

    @functools.partial(jax.jit, donate_argnums=0)
    def advance(x, weights, keys, first, last):
        def of(x, params, key, k):
            return stages(params)[1](x, key, k)

        each = jax.vmap(jax.vmap(of, (0, None, 0, None)), (0, 0, 0, None))
        return jax.lax.fori_loop(first, last, lambda k, x: each(x, weights, keys, k), x)

    x = begin(weights, keys)
    return record.paced(advance)(x, len(parts.times), weights, keys)


def _likelihoods(config, parts, weights, built, configs):
    """Log-likelihood of held-out points under each network, and under the truth.

    Returns: for each network `unresolved`, the share of points that have none: half as
      many steps of the flow give another value, by more than NATS; `log_likelihood` and
      `truth_log_likelihood`, medians over the other points, where LEAST have one.
    """
    m = config.measure.likelihood
    held_out = jnp.stack([jnp.asarray(p.splits.held_out.x[:m]) for p in built])
    probes = config.measure.probes
    grids = parts.times, jnp.append(parts.times[:-1:2], parts.times[-1])

    def under(params, x, key):
        score_fn, keys = training.score_fn(parts, params), jax.random.split(key, len(x))
        return [
            jax.vmap(sampling.log_likelihood(score_fn, parts.process, times, probes))(
                x, keys
            )
            for times in grids
        ]

    keys = jnp.stack([build.keys(c.seed).evaluate for c in configs])
    fine, coarse = jax.jit(jax.vmap(under))(weights, held_out, keys)
    return [
        _resolved(np.asarray(a), np.asarray(b), _known(own, parts, x))
        for a, b, x, own in zip(fine, coarse, held_out, configs, strict=True)
    ]


def _known(config, parts, x):
    """The log-likelihood of points [m, d] under the truth, at the last time."""
    truth = mixture.diffuse(build.truth(config), parts.process, parts.times[-1])
    return np.asarray(jax.vmap(functools.partial(mixture.log_prob, truth))(x))


def _resolved(fine, coarse, known) -> dict:
    """The numbers of `_likelihoods`, from [m] by all steps, by half, and of the truth.

    A change of variables counts only along a flow that its steps resolve. Between few
    training points the score of a network that copies is too steep for any.
    """
    good = np.isfinite(fine) & np.isclose(fine, coarse, rtol=0, atol=NATS)
    median = np.median if good.mean() >= LEAST else lambda _: np.nan
    return {
        "log_likelihood": median(fine[good].astype(np.float64)),
        "truth_log_likelihood": median(known[good].astype(np.float64)),
        "unresolved": 1 - good.mean(),
        "unresolved_of": len(good),
    }


STUDY = Study(measure, draw, check, alike=grid.shape, what="networks")
