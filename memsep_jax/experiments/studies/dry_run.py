"""Parameters, memory, FLOPs and hours of a run, before it is one."""

import time

import jax
import jax.numpy as jnp
from rich.table import Table

from memsep_jax import data, parallel
from memsep_jax.data import sources
from memsep_jax.experiments import training
from memsep_jax.experiments.config import build, grid
from memsep_jax.experiments.runtime import record
from memsep_jax.experiments.studies import emm, train

MEASURED = 2.0  # seconds of steps, from which hours are told
TRAIN_NOTHING = ("loss_gap", "optimum")


def dry_run(config, say) -> Table:
    """Parameters, memory, FLOPs and hours of a training; fetches and writes nothing.

    Of a sweep, those of the network of its last point, which is the largest where axes
    are written in increasing order; of a search for the EMM, those at emm.high. Hours
    are told from steps that are compiled and taken here.

    Raises: data.DataError where points are missing whose sizes are not known.
    """
    if "model" not in config:
        raise build.ConfigError(
            "--dry_run tells what a training takes, and "
            f"experiment={config.experiment} trains nothing: leave it out"
        )
    points = []
    if config.experiment == "emm":
        config = emm.at(config, config.emm.high)
    if any(config.sweep[axis] for axis in grid.AXES):
        points = grid.points(config)
        config = points[-1].config
    parts = build.build(config, sources.at_hand)
    mesh = parallel.make_mesh()
    for note in (*parts.notes, *parts.splits.notes):
        say(f"note: {note}")
    state = jax.eval_shape(lambda: train.initial_state(config, parts))
    # Points that stay on disk come as batches.
    streamed = isinstance(parts.splits.train.x, data.Rows)
    dataset = None if streamed else jax.eval_shape(lambda: parts.splits.train)
    size = config.train.batch_size
    batch = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct((size, *a.shape[1:]), a.dtype),
        parts.splits.train,
    )
    step = jax.jit(training.make_step(config, parts, mesh))
    with jax.disable_jit(False):  # or the program is another one, and so its FLOPs
        flops = training.flops(step.lower(state, batch, dataset))
    activations = _activations(config, parts, state, batch)
    model_bytes = _bytes(state)
    data_bytes = _bytes(batch if streamed else dataset)
    if config.run.shard:
        places = parallel.sharded(state, mesh)
        model_bytes = _bytes(jax.tree.map(_share, state, places))
    gradients = _bytes(state.params)
    steps = parts.steps
    table = Table(title="dry run: nothing is fetched or written", show_header=False)
    if points:
        each = " at each size" if config.experiment == "emm" else ""
        table.add_row(f"points of the sweep{each}", f"{len(points):,}")
        table.add_row("the last one", points[-1].name)
    n, *shape = parts.splits.train.x.shape
    table.add_row("data", f"{config.data.name}, n = {n:,} of {tuple(shape)}")
    table.add_row("parameters", f"{training.count(state.params):,}")
    each = f" on each of {mesh.size}" if config.run.shard else ""
    table.add_row(f"state (params, EMA, optimizer){each}", _mib(model_bytes))
    table.add_row("gradients", _mib(gradients))
    table.add_row("activations, at most", _mib(activations))
    table.add_row("training set on the device", _mib(data_bytes))
    total = model_bytes + gradients + activations + data_bytes
    table.add_row("memory, at most", _mib(total))
    table.add_row("FLOPs per step", f"{flops:.3g}")
    table.add_row("FLOPs of the training", f"{flops * steps:.3g} ({steps:,} steps)")
    if config.experiment in TRAIN_NOTHING or jax.process_count() > 1:
        return table  # several processes would have to take equally many steps
    # A step makes a new state beside the old one.
    needed, free = 2 * (model_bytes + gradients), record.available()[0]
    if jax.default_backend() == "cpu" and needed > free:
        text = f"not measured: a step takes {_mib(needed)} of memory, more than is free"
    else:
        seconds, size = _measured(config, parts, mesh, state, flops)
        hours = seconds * config.train.batch_size / size * steps / 3_600
        text = f"{hours:.3g}, at {seconds:.3g} s for a step"
        if size < config.train.batch_size:
            text += f" of {size:,} instead of {config.train.batch_size:,} examples"
        if points:
            text += "; for each point of the sweep"
    device = f"{mesh.size} x {mesh.devices.flat[0].device_kind}"
    table.add_row(f"hours of the training on {device}", text)
    return table


def _measured(config, parts, mesh, state, flops):
    """Seconds of a step that is taken here, and of how many examples its batch was.

    Fewer than config.train.batch_size where a step of so many would take minutes on a
    slow device: the time of a large network grows with the examples.

    Args: state, its shapes: how long a step takes does not depend on the numbers.
    """
    parted = mesh.size * config.train.accumulate
    shares = config.train.batch_size // parted
    size = parted * record.at_once(flops / shares / mesh.size, shares)
    config = config.copy_and_resolve_references()
    config.train.batch_size = size
    state = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), state)
    state, take, most = train.compiled(config, parts, mesh, state)
    taken, passed, count, first = 0, 0.0, 1, True
    while passed < MEASURED:
        began = time.monotonic()
        # By its own count: a step that is refused takes as long as any other.
        state, _ = jax.block_until_ready(take(state, int(state.step), count))
        seconds = time.monotonic() - began
        # The first step is slower, and counts only where it is long.
        if not first or seconds > MEASURED:
            taken, passed = taken + count, passed + seconds
            count = max(1, min(int(train.CALL * taken / passed), most))
        first = False
    return passed / taken, size


def _activations(config, parts, state, batch):
    """Bytes kept from the forward pass for the backward pass, before fusion."""
    size = config.train.batch_size // config.train.accumulate
    loss = training.loss(parts, config)

    def residuals(params, batch):
        batch = jax.tree.map(lambda a: a[:size], batch)
        batch = data.augment(batch, jax.random.key(0), 0)
        keys = jax.random.split(jax.random.key(0), size)
        return jax.vjp(
            lambda p: jnp.mean(jax.vmap(loss, (None, 0, 0))(p, batch, keys)), params
        )[1]

    return max(
        0,
        _bytes(jax.eval_shape(residuals, state.params, batch)) - _bytes(state.params),
    )


def _share(leaf, sharding):
    return jax.ShapeDtypeStruct(sharding.shard_shape(leaf.shape), leaf.dtype)


def _bytes(tree):
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))


def _mib(size):
    return f"{size / 2**20:,.1f} MiB"
