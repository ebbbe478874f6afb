"""Parameters, memory and FLOPs of a run, before it is one."""

import jax
import jax.numpy as jnp
from rich.table import Table

from memsep_jax import data, parallel, sources
from memsep_jax.experiments import setup, sweep, train


def dry_run(config, say) -> Table:
    """Parameters, memory and FLOPs of a run; compiles and writes nothing.

    Of a sweep, those of the network of its last point, which is the largest where axes
    are written in increasing order.
    """
    if "model" not in config:
        raise setup.ConfigError(
            "--dry_run tells what a training takes, and "
            f"experiment={config.experiment} trains nothing: leave it out"
        )
    points = []
    if any(config.sweep[axis] for axis in sweep.AXES):
        points = sweep.points(config)
        config = points[-1].config
    parts = setup.build(config)
    mesh = parallel.make_mesh()
    for note in (*parts.notes, *parts.splits.notes):
        say(f"note: {note}")
    state = jax.eval_shape(lambda: train.initial_state(config, parts))
    # Points that stay on disk come as batches.
    streamed = isinstance(parts.splits.train.x, sources.Rows)
    dataset = None if streamed else jax.eval_shape(lambda: parts.splits.train)
    size = config.train.batch_size
    batch = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct((size, *a.shape[1:]), a.dtype),
        parts.splits.train,
    )
    step = jax.jit(setup.make_step(config, parts, mesh))
    with jax.disable_jit(False):  # or the program is another one, and so its FLOPs
        flops = setup.flops(step.lower(state, batch, dataset))
    activations = _activations(config, parts, state, batch)
    model_bytes = _bytes(state)
    data_bytes = _bytes(batch if streamed else dataset)
    if config.run.shard:
        places = parallel.sharded(state, mesh)
        model_bytes = _bytes(jax.tree.map(_share, state, places))
    gradients = _bytes(state.params)
    steps = parts.steps
    table = Table(title="dry run: nothing is compiled or written", show_header=False)
    if points:
        table.add_row("points of the sweep", f"{len(points):,}")
        table.add_row("the last one", points[-1].name)
    n, *shape = parts.splits.train.x.shape
    table.add_row("data", f"{config.data.name}, n = {n:,} of {tuple(shape)}")
    table.add_row("parameters", f"{setup.count(state.params):,}")
    each = f" on each of {mesh.size}" if config.run.shard else ""
    table.add_row(f"state (params, EMA, optimizer){each}", _mib(model_bytes))
    table.add_row("gradients", _mib(gradients))
    table.add_row("activations, at most", _mib(activations))
    table.add_row("training set on the device", _mib(data_bytes))
    total = model_bytes + gradients + activations + data_bytes
    table.add_row("memory, at most", _mib(total))
    table.add_row("FLOPs per step", f"{flops:.3g}")
    table.add_row("FLOPs of the training", f"{flops * steps:.3g} ({steps:,} steps)")
    return table


def _activations(config, parts, state, batch):
    """Bytes kept from the forward pass for the backward pass, before fusion."""
    size = config.train.batch_size // config.train.accumulate
    loss = setup.loss(parts, config)

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
