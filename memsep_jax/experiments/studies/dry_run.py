"""Parameters, memory, FLOPs and hours of a run, before it is one."""

import time

import jax
import jax.numpy as jnp
from rich.table import Table

from memsep_jax import data, parallel
from memsep_jax.data import sources
from memsep_jax.experiments import record, training
from memsep_jax.experiments.config import build, grid
from memsep_jax.experiments.studies import emm, stepper, training_run

MEASURED = 2.0  # seconds of steps, at least, from which hours are estimated
TRAIN_NOTHING = ("loss_gap", "optimum")


def dry_run(config, say) -> Table:
    """Parameters, memory, FLOPs and hours of a training; fetches and writes nothing.

    For a sweep, those of the network of its last point, which is the largest where axes
    are written in increasing order; for a search for the EMM, those at emm.high. Hours
    are estimated from steps that are compiled and taken here.

    Raises: data.DataError where points are missing whose sizes are not known.
    """
    config, points = _network(config)
    parts = build.build(config, sources.at_hand)
    mesh = parallel.make_mesh()
    for note in (*parts.notes, *parts.splits.notes):
        say(f"note: {note}")
    state = jax.eval_shape(lambda: training_run.initial_state(config, parts))
    flops, memory = _cost(config, parts, mesh, state)
    table = Table(title="dry run: nothing is fetched or written", show_header=False)
    if points:
        each = " at each size" if config.experiment == "emm" else ""
        table.add_row(f"points of the sweep{each}", f"{len(points):,}")
        table.add_row("the last one", points[-1].name)
    n, *shape = parts.splits.train.x.shape
    table.add_row("data", f"{config.data.name}, n = {n:,} of {tuple(shape)}")
    table.add_row("parameters", f"{training.count(state.params):,}")
    for name, size in memory.items():
        table.add_row(name, _mib(size))
    table.add_row("memory, at most", _mib(sum(memory.values())))
    table.add_row("FLOPs per step", f"{flops:.3g}")
    total = f"{flops * parts.steps:.3g} ({parts.steps:,} steps)"
    table.add_row("FLOPs of the training", total)
    if config.experiment in TRAIN_NOTHING or jax.process_count() > 1:
        return table  # several processes would have to take equally many steps
    model_bytes, gradients, *_ = memory.values()
    # A step makes a new state beside the old one.
    needed, free = 2 * (model_bytes + gradients), record.available()[0]
    if jax.default_backend() == "cpu" and needed > free:
        text = f"not measured: a step takes {_mib(needed)} of memory, more than is free"
    else:
        text = _hours(config, parts, mesh, state, flops)
        if points:
            text += "; for each point of the sweep"
    device = f"{mesh.size} x {mesh.devices.flat[0].device_kind}"
    table.add_row(f"hours of the training on {device}", text)
    return table


def _network(config):
    """The config of the network that is trained, and the points of its sweep."""
    if "model" not in config:
        raise build.ConfigError(
            "--dry_run estimates a training, and "
            f"experiment={config.experiment} trains nothing: leave it out"
        )
    if config.experiment == "emm":
        config = emm.at(config, config.emm.high)
    if not any(config.sweep[axis] for axis in grid.AXES):
        return config, []
    points = grid.points(config)
    return points[-1].config, points


def _cost(config, parts, mesh, state):
    """The FLOPs of a step, and its bytes by content, the state and gradients first."""
    # Points that stay on disk come as batches.
    streamed = isinstance(parts.splits.train.x, data.Rows)
    dataset = None if streamed else jax.eval_shape(lambda: parts.splits.train)
    size = config.train.batch_size
    batch = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct((size, *a.shape[1:]), a.dtype),
        parts.splits.train,
    )
    step = jax.jit(training.make_step(config, parts, mesh))
    with jax.disable_jit(False):  # JAX_DISABLE_JIT would count another program
        flops = training.flops(step.lower(state, batch, dataset))
    held, each = state, ""
    if config.run.shard:
        held = jax.tree.map(_share, state, parallel.sharded(state, mesh))
        each = f" on each of {mesh.size}"
    return flops, {
        f"state (params, EMA, optimizer){each}": _bytes(held),
        "gradients": _bytes(state.params),
        "activations, at most": _activations(config, parts, state, batch),
        "training set on the device": _bytes(batch if streamed else dataset),
    }


def _hours(config, parts, mesh, state, flops) -> str:
    seconds, size = _measured(config, parts, mesh, state, flops)
    batch = config.train.batch_size
    hours = seconds * batch / size * parts.steps / 3_600
    text = f"{hours:.3g}, at {seconds:.3g} s for a step"
    return (
        text if size == batch else f"{text} of {size:,} instead of {batch:,} examples"
    )


def _measured(config, parts, mesh, state, flops):
    """Seconds of a step that is taken here, and the number of examples in its batch.

    They are fewer than config.train.batch_size where such a step would take minutes on
    a slow device: the time of a large network grows with the examples.

    Args: state, its shapes: how long a step takes does not depend on the numbers.
    """
    parted = mesh.size * config.train.accumulate
    shares = config.train.batch_size // parted
    size = parted * record.at_once(flops / shares / mesh.size, shares)
    config = config.copy_and_resolve_references()
    config.train.batch_size = size
    state = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), state)
    state, take, most = stepper.compiled(config, parts, mesh, state)
    taken, passed, count, first = 0, 0.0, 1, True
    while passed < MEASURED:
        began = time.monotonic()
        # By its own count: a step that is refused takes as long as any other.
        state, _ = jax.block_until_ready(take(state, int(state.step), count))
        seconds = time.monotonic() - began
        # The first step is slower, and counts only where it alone takes long enough.
        if not first or seconds > MEASURED:
            taken, passed = taken + count, passed + seconds
            count = max(1, min(int(stepper.CALL * taken / passed), most))
        first = False
    return passed / taken, size


def _activations(config, parts, state, batch):
    """Bytes kept from the forward pass for the backward pass, before fusion."""
    size = config.train.batch_size // config.train.accumulate
    loss = training.loss(parts, config)

    # What the backward pass keeps is in the closure that vjp returns; of it, the
    # parameters are counted elsewhere.
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
