"""The main job: train, sample, measure memorization, report.

In a workdir: config.json, run.json, metrics.jsonl (along training), checkpoints/,
best/ (lowest held-out loss), snapshots/ (raw and EMA weights), samples/ (grids along
training), evaluation/ (chunks), samples.npz, per_sample.csv, pairs.npz, metrics.json,
figures/ and report.html. Given again, the same command goes on where it stopped.
"""

import functools
import hashlib
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from memsep_jax import (
    checkpoint,
    data,
    gap,
    memorization,
    parallel,
    process,
    train,
)
from memsep_jax.experiments import figures, record, report, setup
from memsep_jax.experiments.session import Interrupted

LEVELS = 12  # noise levels of the held-out loss
GRID = 64  # images in a grid of samples
PAIRS = 12  # samples in each group of the report's pairs


def run(config, session, resume_step=None):
    """Trains and evaluates; returns when report.html is written."""
    with session.phase("data"):
        parts = setup.build(config)
    session.begin(parts.splits.fingerprint)
    for note in parts.notes:
        session.say(f"note: {note}")
    session.say(_describe(parts, config))
    state = learn(config, parts, session, resume_step)
    evaluate(config, parts, state, session)
    with session.phase("report"):
        report.write(session.workdir, session.say)
    session.write_status()  # the seconds of this table
    session.console.print(summary(session.workdir))
    session.say(f"report: {session.workdir / 'report.html'}")


def initial_state(config, parts):
    """The state of step 0: a function of the config alone."""
    return train.init(setup.init_params(parts, setup.keys(config.seed).init), parts.tx)


def make_step(config, parts, mesh):
    """(state, data: Dataset) -> (state, metrics): draws its own batch, by step."""
    keys = setup.keys(config.seed)
    step = train.make_train_step(
        setup.loss(parts, config),
        parts.tx,
        config.train.ema_decay,
        config.train.accumulate,
    )

    def train_step(state, dataset):
        batch = data.draw(
            dataset, keys.data, state.step, config.train.batch_size, config.train.flip
        )
        batch = jax.lax.with_sharding_constraint(batch, parallel.by_batch(mesh))
        return step(state, batch, keys.train)

    return train_step


def learn(config, parts, session, resume_step=None):
    """Trains to the last step, from the newest valid checkpoint where there is one."""
    mesh = parallel.make_mesh()
    workdir, steps = session.workdir, config.train.steps
    checkpoints = workdir / "checkpoints"
    checkpoint.clean(checkpoints)
    if resume_step is not None:
        _roll_back(checkpoints, resume_step, session)
    state = initial_state(config, parts)
    found = checkpoint.restore_newest(checkpoints, state)
    start = 0
    if found:
        state, start = found
        session.say(f"resumed from step {start}")
        _warn_of_circumstances(session)
    metrics = record.Metrics(workdir / "metrics.jsonl", start)
    if start >= steps and start in metrics.steps:
        return state
    state = jax.device_put(state, parallel.replicated(mesh))
    dataset = jax.device_put(parts.splits.train, parallel.replicated(mesh))

    with session.phase("compile"):
        session.say("compiling the train step")
        step_fn = jax.jit(make_step(config, parts, mesh), donate_argnums=0)
        step_fn = step_fn.lower(state, dataset).compile()
        watch = _Watcher(config, parts, session, mesh)

    best = min(
        (np.mean(r["held_out_losses"]) for r in record.read_metrics(metrics.path)
         if r.get("held_out_losses")),
        default=np.inf,
    )  # fmt: skip
    snapshots = snapshot_steps(config, len(parts.splits.train.x))
    previous, since = None, (time.monotonic(), start)

    def settle(step, fetched):
        """Waits for a step; the row to log, or {} where it is not logged."""
        nonlocal since
        if int(fetched["step"]) != step:
            _not_finite(config, parts, state, session, step, fetched)
        if step % config.run.log_every and step != steps:
            return {}
        now = time.monotonic()
        rate = (step - since[1]) / max(now - since[0], 1e-9)
        since = (now, step)
        names = ("loss", "grad_norm", "update_norm")
        row = {"step": step, **{k: float(fetched[k]) for k in names}}
        return row | {"steps_per_second": round(rate, 3)}

    def evaluating(step):
        return step == steps or step % config.run.evaluate_every == 0

    def look(step, row):
        """Adds to the row what is measured at this step."""
        nonlocal best
        if evaluating(step):
            row = {"step": step} | row | watch.losses(state.ema)
            held_out = row.get("held_out_losses")
            if held_out is not None and np.mean(held_out) < best:
                best = np.mean(held_out)
                kept = {"params": state.params, "ema": state.ema}
                checkpoint.save(workdir / "best", step, kept, keep=1)
        if step in snapshots:
            kept = {"params": state.params, "ema": state.ema}
            checkpoint.save(workdir / "snapshots", step, kept)
            row = {"step": step} | row | watch.snapshot(step, state)
        return row

    def log(row):
        if row:
            metrics.write(**row)

    with (
        session.phase("train"),
        session.deferred(),
        session.progress("training", steps, start) as update,
    ):
        if start and start not in metrics.steps:  # stopped before it could look
            log(look(start, {}))
        for step in range(start + 1, steps + 1):
            state, fetched = step_fn(state, dataset)
            # One step late, so the device always has the next one waiting.
            if previous is not None:
                row = settle(*previous)
                log(row)
                if row:
                    update(row["step"], _status(row))
            previous = (step, fetched)
            due = evaluating(step) or step in snapshots
            saving = step == steps or step % config.run.save_every == 0
            if not (due or saving or session.stop is not None):
                continue

            row, previous = settle(*previous), None
            if due and session.stop is None:
                row = look(step, row)
            stopping = session.stop is not None
            if not (due and stopping):  # else the look, and its row, come on resuming
                log(row)
                update(step, _status(row) if "loss" in row else "")
            if saving or stopping:
                checkpoint.save(checkpoints, step, state, config.run.keep)
            since = (time.monotonic(), step)  # steps/s counts steps, not evaluations
            if stopping:
                session.say(f"preempted at step {step}: saved")
                raise Interrupted(session.stop)
    return state


def snapshot_steps(config, n: int) -> set[int]:
    """Steps of the snapshots: some on a log grid, one every snapshot_epochs."""
    steps, found = config.train.steps, set()
    if config.run.snapshots:
        first = max(1, steps / 2 ** (config.run.snapshots - 1))
        found |= set(np.geomspace(first, steps, config.run.snapshots).round().tolist())
    if config.run.snapshot_epochs:
        epoch = n / config.train.batch_size
        stride = max(1.0, config.run.snapshot_epochs * epoch)
        found |= set(np.arange(stride, steps + 1, stride).round().tolist())
    return {int(step) for step in found}


def levels(config):
    """The times at which the held-out loss is taken, over the sampler's range. [l]."""
    return jnp.geomspace(config.sampler.t_min, config.sampler.t_max, LEVELS)


def make_losses(config, parts):
    """(params, points: Dataset) -> [LEVELS], the eps-loss at each noise level.

    The same noise for every call, so that differences are differences of networks.
    """
    times, key = levels(config), setup.keys(config.seed).evaluate

    def losses(params, points):
        eps = jax.random.normal(key, points.x.shape, points.x.dtype)

        def one(x0, label, eps, t):
            fn = setup.score_fn(parts, params, label)
            return gap.eps_loss(fn, parts.process, x0, t, eps)

        def at(t):
            return jnp.mean(
                jax.vmap(one, (0, 0, 0, None))(points.x, points.label, eps, t)
            )

        return jax.lax.map(at, times)

    return losses


def make_generate(config, parts, mesh):
    """(params, start) -> samples start .. start + chunk, one compiled program."""
    key = setup.keys(config.seed).sample
    chunk = -(-config.run.chunk // mesh.size) * mesh.size

    @jax.jit
    def generate(params, start):
        indices = start + jnp.arange(chunk)
        indices = jax.lax.with_sharding_constraint(indices, parallel.by_batch(mesh))
        one = functools.partial(setup.sample_one, parts, config, params, key)
        return jax.vmap(one)(indices)

    def samples(params, start, stop):
        drawn = np.asarray(generate(params, start))[: stop - start]
        # Images as they would be saved: what is measured is what a person can see.
        return data.to_uint8(drawn) if drawn.ndim == 4 else drawn

    return samples


def evaluate(config, parts, state, session):
    """Samples, neighbours, ratio: numbers on disk, chunk by chunk."""
    workdir = session.workdir
    weights = state.ema if config.sampler.weights == "ema" else state.params
    # Chunks belong to these weights and this sampler, and to no others.
    about = [checkpoint.digest(weights), config.seed, setup.to_json(config)["sampler"]]
    tag = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]
    folder = workdir / "evaluation" / tag
    mesh = parallel.make_mesh()
    weights = jax.device_put(weights, parallel.replicated(mesh))
    total, chunk = config.sampler.num_samples, config.run.chunk

    with session.phase("sample"):
        generate = make_generate(config, parts, mesh)
        samples = record.in_chunks(
            folder / "samples",
            lambda start, stop: {"x": generate(weights, start, stop)},
            total,
            chunk,
            session,
            "sampling",
        )["x"]

    with session.phase("neighbours"):
        splits = parts.splits
        train_x = np.asarray(splits.train.x)
        first = memorization.distinct(train_x)
        near = min(config.memorization.near, len(first))
        if len(first) < 2:
            raise setup.ConfigError(
                "the memorization ratio needs two distinct training points and got "
                f"{len(first)}: raise data.num_examples"
            )

        search = memorization.searcher(train_x, near, chunk)

        def found_in(name, x):
            def work(start, stop):
                return search(as_float(x[start:stop]))._asdict()

            pieces = record.in_chunks(
                folder / f"{name}-{near}", work, len(x), chunk, session, name
            )
            return memorization.Neighbours(**pieces)

        found = found_in("neighbours", samples)
        held_out = None
        if splits.held_out is not None and len(splits.held_out.x):
            held_out = found_in("held-out", np.asarray(splits.held_out.x))
        result = memorization.ratio_of(
            found, held_out, len(train_x) - len(first), config.memorization.threshold
        )
        write_numbers(config, parts, state, session, samples, result)


def as_float(x):
    """Stored samples in the units of the data."""
    return data.from_uint8(x) if x.dtype == np.uint8 else x


def write_numbers(config, parts, state, session, samples, result):
    """samples.npz, per_sample.csv, pairs.npz and metrics.json of an evaluation."""
    workdir, splits = session.workdir, parts.splits
    near = result.neighbours
    d1, d2 = near.distances[:, 0], near.distances[:, 1]
    calibrated = memorization.calibrated_l2(near.distances)
    record.write_npz(workdir / "samples.npz", samples=samples)
    record.write_csv(
        workdir / "per_sample.csv",
        {
            "index": range(len(samples)),
            "d1": d1.tolist(),
            "d2": d2.tolist(),
            "nearest": near.indices[:, 0].tolist(),
            "second": near.indices[:, 1].tolist(),
            "memorized": result.memorized.astype(int).tolist(),
            "calibrated_l2": calibrated.tolist(),
        },
    )
    share = np.divide(d1, d2, out=np.ones_like(d1), where=d2 > 0)
    order = np.argsort(share, kind="stable")
    picked = {"first": np.arange(len(samples)), "most": order, "least": order[::-1]}
    train_x = np.asarray(splits.train.x)
    stored = data.to_uint8 if samples.dtype == np.uint8 else np.asarray
    pairs = {}
    for name, index in picked.items():
        index = index[:PAIRS]
        pairs[f"{name}_index"] = index
        pairs[f"{name}_sample"] = samples[index]
        pairs[f"{name}_neighbours"] = stored(train_x[near.indices[index, :2]])
        pairs[f"{name}_distances"] = near.distances[index, :2]
        pairs[f"{name}_nearest"] = near.indices[index, :2]
    record.write_npz(workdir / "pairs.npz", **pairs)
    shape = splits.train.x.shape
    t = levels(config)
    rows = [
        r
        for r in record.read_metrics(workdir / "metrics.jsonl")
        if r.get("train_losses")
    ]
    record.write_json(
        workdir / "metrics.json",
        {
            "memorization": {
                "ratio": result.value,
                "interval": result.interval,
                "memorized": int(result.memorized.sum()),
                "samples": len(samples),
                "null": result.null,
                "null_interval": result.null_interval,
                "held_out": 0 if splits.held_out is None else len(splits.held_out.x),
                "threshold": config.memorization.threshold,
                "distinct_emitted": len(
                    set(near.indices[result.memorized, 0].tolist())
                ),
                "exact_copies": int((d1 == 0).sum()),
                "median_d1": float(np.median(d1)),
                "median_calibrated_l2": float(np.median(calibrated)),
                "weights": config.sampler.weights,
            },
            "data": {
                "name": config.data.name,
                "n": shape[0],
                "shape": shape[1:],
                "duplicates": result.duplicates,
                "fingerprint": splits.fingerprint,
            },
            "model": {
                "name": config.model.name,
                "parameters": _count(state.params),
                "steps": int(state.step),
            },
            "levels": {
                "t": t,
                "noise": jax.vmap(
                    functools.partial(process.noise_to_signal, parts.process)
                )(t),
                "train": rows[-1]["train_losses"] if rows else [],
                "held_out": (rows[-1].get("held_out_losses") or []) if rows else [],
            },
        },
    )


def summary(workdir) -> Table:
    """The end of a run as a short table, from the numbers on disk."""
    numbers = record.read_json(workdir / "metrics.json")
    status = record.read_json(workdir / "run.json") or {}
    found, about = numbers["memorization"], numbers["data"]
    table = Table(title=f"{about['name']}, n = {about['n']:,}", show_header=False)

    def share(value, interval):
        low, high = interval
        return f"{100 * value:.1f} %  [{100 * low:.1f}, {100 * high:.1f}]"

    table.add_row("memorized samples", share(found["ratio"], found["interval"]))
    table.add_row("  of", f"{found['memorized']:,} of {found['samples']:,}")
    if found["null"] is None:
        table.add_row("held-out null level", "no held-out data")
    else:
        text = share(found["null"], found["null_interval"])
        table.add_row("held-out null level", text)
    table.add_row("training points emitted", f"{found['distinct_emitted']:,}")
    table.add_row("parameters", f"{numbers['model']['parameters']:,}")
    table.add_row("steps", f"{numbers['model']['steps']:,}")
    for name, seconds in status.get("seconds", {}).items():
        table.add_row(f"  {name}", f"{seconds:.1f} s")
    return table


def dry_run(config, say):
    """Parameters, memory and FLOPs of a run; compiles and writes nothing."""
    parts = setup.build(config)
    mesh = parallel.make_mesh()
    for note in parts.notes:
        say(f"note: {note}")
    state = jax.eval_shape(lambda: initial_state(config, parts))
    dataset = jax.eval_shape(lambda: parts.splits.train)
    step = jax.jit(make_step(config, parts, mesh))
    flops = _flops(step.lower(state, dataset))
    activations = _activations(config, parts, state, dataset)
    model_bytes, data_bytes = _bytes(state), _bytes(dataset)
    gradients = _bytes(state.params)
    steps = config.train.steps
    table = Table(title="dry run: nothing is compiled or written", show_header=False)
    n, *shape = parts.splits.train.x.shape
    table.add_row("data", f"{config.data.name}, n = {n:,} of {tuple(shape)}")
    table.add_row("parameters", f"{_count(state.params):,}")
    table.add_row("state (params, EMA, optimizer)", _mib(model_bytes))
    table.add_row("gradients", _mib(gradients))
    table.add_row("activations, at most", _mib(activations))
    table.add_row("training set on the device", _mib(data_bytes))
    total = model_bytes + gradients + activations + data_bytes
    table.add_row("memory, at most", _mib(total))
    table.add_row("FLOPs per step", f"{flops:.3g}")
    table.add_row("FLOPs of the training", f"{flops * steps:.3g} ({steps:,} steps)")
    return table


class _Watcher:
    """What is looked at along training: losses per level, samples, their ratio."""

    def __init__(self, config, parts, session, mesh):
        self.config, self.parts, self.session = config, parts, session
        self.generate = make_generate(config, parts, mesh)
        self._losses = jax.jit(make_losses(config, parts))
        points = config.run.evaluate_points
        splits = parts.splits
        self.seen = jax.tree.map(lambda a: a[:points], splits.train)
        self.held_out = None
        if splits.held_out is not None and len(splits.held_out.x):
            self.held_out = jax.tree.map(lambda a: a[:points], splits.held_out)
            if parts.num_classes and self.held_out.label is None:
                # Held-out points without a label are shown as "no label".
                none = jnp.full((len(self.held_out.x),), parts.num_classes, jnp.int32)
                self.held_out = self.held_out._replace(label=none)

    def losses(self, params):
        """The eps-loss per noise level, of training and of held-out points."""
        found = {"train_losses": np.asarray(self._losses(params, self.seen))}
        if self.held_out is not None:
            found["held_out_losses"] = np.asarray(self._losses(params, self.held_out))
        return found

    def snapshot(self, step, state):
        """A grid of samples, and the ratio of a few, with EMA weights."""
        config, count = self.config, self.config.run.snapshot_samples
        chunk, parts = config.run.chunk, []
        for start in range(0, count, chunk):
            if self.session.stop is not None:
                return {}
            stop = min(start + chunk, count)
            parts.append(self.generate(state.ema, start, stop))
        samples = np.concatenate(parts)
        train_x = np.asarray(self.parts.splits.train.x)
        path = self.session.workdir / "samples" / f"step_{step:08d}.png"
        figures.quietly(self.session.say, figures.save_samples, path, samples[:GRID])
        if len(memorization.distinct(train_x)) < 2:
            return {}
        found = memorization.ratio(
            as_float(samples), train_x, threshold=config.memorization.threshold
        )
        return {"ratio": found.value, "ratio_interval": found.interval}


def _not_finite(config, parts, state, session, step, fetched):
    """Writes what is known of a step that was refused, and ends the run."""
    keys = setup.keys(config.seed)
    step -= 1  # the state still stands at the step before
    n, size = len(parts.splits.train.x), config.train.batch_size
    batch = data.draw(parts.splits.train, keys.data, step, size, config.train.flip)
    example_keys = jax.random.split(jax.random.fold_in(keys.train, step), size)
    loss = setup.loss(parts, config)
    grads = jax.jit(jax.vmap(jax.grad(loss), (None, 0, 0)))(
        state.params, batch, example_keys
    )
    t = jax.vmap(lambda key: parts.law(jax.random.split(key, 4)[0]))(example_keys)
    sigma = jax.vmap(parts.process.sigma)(t)
    counts = {
        name: int((~np.isfinite(leaf)).sum())
        for name, leaf in checkpoint.leaves(grads).items()
    }
    path = session.workdir / f"nonfinite_step_{step + 1}.json"
    record.write_json(
        path,
        {
            "step": step + 1,
            **{k: str(float(fetched[k])) for k in ("loss", "grad_norm", "update_norm")},
            "nonfinite_gradients": {k: v for k, v in counts.items() if v},
            "sigma": [float(sigma.min()), float(sigma.max())],
            "indices": data.indices(n, keys.data, step, size),
        },
    )
    raise train.NonFiniteError(
        f"step {step + 1} gave loss {float(fetched['loss']):.4g}, gradient norm "
        f"{float(fetched['grad_norm']):.4g}, update norm "
        f"{float(fetched['update_norm']):.4g}: not applied, nothing of it saved. "
        f"Details: {path}. Lower optimizer.lr, set optimizer.clip, or look at "
        "the data"
    )


def _roll_back(checkpoints, step, session):
    if step not in checkpoint.steps(checkpoints):
        raise checkpoint.ConflictError(
            f"--resume_step={step} is not among the checkpoints in {checkpoints}: "
            f"{checkpoint.steps(checkpoints)}"
        )
    aside = f"abandoned-{time.strftime('%Y%m%dT%H%M%S')}"
    for newer in [s for s in checkpoint.steps(checkpoints) if s > step]:
        moved = checkpoint.set_aside(checkpoints, newer, aside)
        session.say(f"step {newer} is newer than {step}: moved to {moved.name}")


def _warn_of_circumstances(session):
    before = session.before
    for what in ("device", "versions"):
        if before.get(what) not in (None, session.status[what]):
            session.say(
                f"warning: {what} was {before[what]} and is {session.status[what]}: "
                "the bitwise guarantee does not hold, results agree to rounding"
            )


def _status(row):
    return f"loss {row['loss']:.4f}  {row['steps_per_second']:.1f} steps/s"


def _describe(parts, config):
    n, *shape = parts.splits.train.x.shape
    held_out = parts.splits.held_out
    return (
        f"{config.model.name} on {config.data.name}: n = {n:,} of {tuple(shape)}, "
        f"{0 if held_out is None else len(held_out.x):,} held out, "
        f"{config.train.steps:,} steps on {jax.device_count()} x "
        f"{jax.devices()[0].device_kind}"
    )


def _activations(config, parts, state, dataset):
    """Bytes kept from the forward pass for the backward pass, before fusion."""
    size = config.train.batch_size // config.train.accumulate
    loss = setup.loss(parts, config)

    def residuals(params, dataset):
        batch = jax.tree.map(lambda a: a[jnp.zeros(size, jnp.int32)], dataset)
        keys = jax.random.split(jax.random.key(0), size)
        return jax.vjp(
            lambda p: jnp.mean(jax.vmap(loss, (None, 0, 0))(p, batch, keys)), params
        )[1]

    return max(
        0,
        _bytes(jax.eval_shape(residuals, state.params, dataset)) - _bytes(state.params),
    )


def _flops(lowered):
    cost = lowered.cost_analysis() or {}
    return float(cost.get("flops", float("nan")))


def _bytes(tree):
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))


def _count(params):
    return sum(p.size for p in jax.tree.leaves(params))


def _mib(size):
    return f"{size / 2**20:,.1f} MiB"
