"""The main job: train, sample, measure memorization, report.

In a workdir: config.json, run.json, metrics.jsonl (along training), checkpoints/,
best/ (lowest held-out loss), snapshots/ (raw and EMA weights), samples/ (grids along
training), evaluation/ (chunks), samples.npz, per_sample.csv, pairs.npz, metrics.json,
figures/ and report.html. Given again, the same command goes on where it stopped.
"""

import contextlib
import functools
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from memsep_jax import (
    checkpoint,
    data,
    gap,
    memorization,
    mixture,
    neighbours,
    parallel,
    process,
    sources,
    train,
)
from memsep_jax.experiments import training
from memsep_jax.experiments.config import build
from memsep_jax.experiments.reporting import figures
from memsep_jax.experiments.runtime import record, trackers
from memsep_jax.experiments.runtime.session import Interrupted
from memsep_jax.experiments.studies import prune
from memsep_jax.experiments.studies.evaluate import (
    evaluate,
    finish,
    make_generate,
)

CALL = 0.1  # seconds of steps that are taken in one call, ...
MOST = 256  # and so many at most
LEVELS = 12  # noise levels of the held-out loss
GRID = 64  # images in a grid of samples
RATIOS = ("ratio", "raw_ratio")  # of a snapshot, by EMA and by raw weights


def run(config, session):
    """Trains and evaluates; returns when report.html is written."""
    with session.phase("data"):
        parts = build.build(config)
    session.expect(parts.splits.fingerprint)
    for note in parts.notes:
        session.say(f"note: {note}")
    session.say(_describe(parts, config))
    # Compiled once for all of the run.
    generate = network_samples(config, parts, session)
    state = parallel.local(learn(config, parts, session, session.resume_step, generate))
    session.part()
    if not parallel.is_first():
        return
    weights = state.ema if config.sampler.weights == "ema" else state.params
    about = {
        "model": model(config, parts, weights, int(state.step)),
        "levels": last_losses(config, parts, session.workdir),
    }
    with session.phase("train"):
        about["levels"] |= detector(config, parts, weights)
    if config.prune.ratio:
        about["pruning"] = prune.of_run(config, parts, session, weights, generate)
    evaluate(config, parts, session, generate, weights, about)
    finish(session)


def model(config, parts, weights, step) -> dict:
    """What metrics.json says of a network after a step."""
    return {
        "name": config.model.name,
        "parameters": training.count(weights),
        "steps": step,
        "planned": parts.steps,
        "weights": config.sampler.weights,
    }


def initial_state(config, parts):
    """The state of step 0: a function of the config alone."""
    params = training.init_params(parts, build.keys(config.seed).init)
    # Compiled: else each leaf of each part of the state is a program of its own.
    return jax.jit(train.init, static_argnums=1)(params, parts.tx)


def network_samples(config, parts, session=None):
    """(params, start, stop) -> samples of the network, as `make_generate`."""
    score_of = functools.partial(training.score_fn, parts)
    mesh = parallel.make_mesh(jax.local_devices())
    return make_generate(config, parts, mesh, score_of, session)


def learn(config, parts, session, resume_step=None, generate=None, workdir=None):
    """Trains to the last step, from the newest valid checkpoint where there is one.

    The last step is that of train.steps or train.epochs, or that of `early_stop`. Of
    several processes all take the steps, and the first one does everything else.

    Args: workdir, of one of several networks; by default that of the session.
    """
    mesh, first = parallel.make_mesh(), parallel.is_first()
    own, steps = workdir is None, parts.steps
    workdir = session.workdir if own else workdir
    packed = _packed(config, None if own else workdir)
    checkpoints = workdir / "checkpoints"
    state, found = initial_state(config, parts), None
    if first:
        checkpoint.clean(checkpoints)
        if resume_step is not None:
            _check_resume_step(checkpoints, resume_step)
        found = checkpoint.restore_newest(checkpoints, state, at_most=resume_step)
        if found is None and packed and packed.is_file():
            found = unpack(packed, state, parts)
    step = session.share(found[1] + 1 if found else 0) - 1
    if step >= 0 and not first:
        if step in checkpoint.steps(checkpoints):
            found = checkpoint.restore(checkpoints, step, state), step
        else:
            found = unpack(packed, state, parts)
    # A checkpoint that does not fit must leave config.json as it was.
    if own:
        session.begin(parts.splits.fingerprint, parts.splits)
    start = 0
    if resume_step is not None and first:
        _roll_back(workdir, resume_step, session)
    if found:
        state, start = found
        session.say(f"resumed from step {start}")
    metrics = record.Metrics(workdir / "metrics.jsonl", start) if first else None
    looked = session.share(first and start in metrics.steps)

    def stops(step):
        """Whether training ends here, before the last step."""
        why = early_stop(config, workdir, step, steps) if first else None
        if why:
            session.say(why)
        return session.share(why is not None)

    if (start >= steps and looked) or stops(start):
        return state
    with session.phase("compile"):
        session.say("compiling the train step")
        state, take, most = compiled(config, parts, mesh, state, start)
        if first:
            generate = generate or network_samples(config, parts, session)
            watch = _Watcher(config, parts, session, generate)

    rows = record.read_metrics(workdir / "metrics.jsonl")
    best = min(
        (np.mean(r["held_out_losses"]) for r in rows
         if r.get("held_out_losses")),
        default=np.inf,
    )  # fmt: skip
    snapshots = snapshot_steps(config, len(parts.splits.train.x))
    previous, since, rate = None, (time.monotonic(), start), 0.0

    def advance(state, step):
        """Takes the steps of one call, up to the next that is logged, looked at, saved.

        Returns: the state, what there is to fetch of its last step, and that step.
        """
        group = config.run
        every = (group.log_every, group.save_every, group.evaluate_every)
        events = [steps, *(step - step % k + k for k in every)]
        events += [s for s in snapshots if s > step]
        count = max(1, min(int(rate * CALL), most, min(events) - step))
        state, fetched = take(state, step, count)
        return state, fetched, step + count

    def settle(step, fetched):
        """Waits for a step; the row to log, or {} where it is not logged."""
        nonlocal since, rate
        if (stands := int(fetched["step"])) != step:
            _not_finite(config, parts, state, session, workdir, stands, fetched)
        if step % config.run.log_every and step != steps:
            return {}
        now = time.monotonic()
        rate = (step - since[1]) / max(now - since[0], 1e-9)
        since = (now, step)
        names = ("loss", "grad_norm", "update_norm")
        row = {"step": step, **{k: float(fetched[k]) for k in names}}
        if "skipped" in fetched:
            row["skipped"] = int(fetched["skipped"])
        return row | {"steps_per_second": round(rate, 3)}

    def evaluating(step):
        return step == steps or step % config.run.evaluate_every == 0

    def look(step, row):
        """Adds to the row what is measured at this step, until a signal comes."""
        weights = parallel.local({"params": state.params, "ema": state.ema})
        if not first:
            return row
        with contextlib.suppress(Interrupted):
            if evaluating(step):
                row = {"step": step} | row | evaluated(step, weights)
            if step in snapshots:
                session.pause()
                checkpoint.save(workdir / "snapshots", step, weights)
                row = {"step": step} | row | watch.snapshot(step, weights)
        return row

    def evaluated(step, weights):
        nonlocal best
        found = watch.losses(weights["ema"])
        held_out = found.get("held_out_losses")
        if held_out is not None and np.mean(held_out) < best:
            best = np.mean(held_out)
            checkpoint.save(workdir / "best", step, weights, keep=1)
        return found

    def save(step, known):
        """Saves the step; what is known of its row too, where a look is to end it."""
        if known and first:
            metrics.write_unfinished(**known)
        whole = parallel.local(state)
        if first:
            checkpoint.save(checkpoints, step, whole, config.run.keep)
        if first and packed:
            pack(packed, step, whole, parts)

    def preempted(step):
        session.say(f"preempted at step {step}: saved")
        session.part()
        raise Interrupted(session.stop)

    track = first and trackers.tracker(config.run.tracker, workdir, config, session.say)

    def log(row):
        if row and first:
            metrics.write(**row)
            track(row)

    with (
        session.phase("train"),
        session.deferred(),
        session.progress("training", steps, start) as update,
    ):
        if start and not looked:  # stopped before it could look
            row = look(start, metrics.unfinished if first else {})
            session.poll(now=True)
            if session.stop is not None:  # once more
                preempted(start)
            log(row)
            if stops(start):
                return state
        step = start
        while step < steps:
            state, fetched, step = advance(state, step)
            session.poll()
            # One call late, so the device always has the next one waiting.
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
            status = _status(row) if row else ""
            if not due:
                log(row)
            # Before the look: it takes long, and a kill there must lose no step.
            if saved := saving or session.stop is not None:
                save(step, row if due else {})
            ends = False
            if due and session.stop is None:
                found = look(step, row)
                session.poll(now=True)
                if session.stop is None:  # else it comes on resuming
                    log(found)
                    row, ends = {}, stops(step)
            stopping = session.stop is not None
            if (stopping or ends) and not saved:
                save(step, row if due else {})
            update(step, status)
            since = (time.monotonic(), step)  # steps/s counts steps, not evaluations
            if stopping:
                preempted(step)
            if ends:
                break
    if (spikes := train.skipped(state)) is not None:
        session.say(
            f"{int(spikes)} of {int(state.step)} steps were skipped, by "
            f"optimizer.skip_spikes={config.optimizer.skip_spikes:g}"
        )
    return state


def compiled(config, parts, mesh, state, start=0):
    """The train step, compiled, and the state of step `start` where it is taken.

    Returns: the state; take, (state, step, count) -> (state, metrics of the last step);
      how many steps one call may take.
    """
    everywhere = parallel.replicated(mesh)
    places = parallel.sharded(state, mesh) if config.run.shard else everywhere
    state = parallel.place(state, places)
    most, feed = _feeder(config, parts, mesh)
    steps = jax.jit(
        training.make_steps(config, parts, mesh),
        donate_argnums=0,
        out_shardings=(places, everywhere),
    )
    if not jax.config.jax_disable_jit:  # set to look into each step, as it is
        steps = steps.lower(state, *feed(start, 1), start, 1).compile()

    def take(state, step, count):
        return steps(state, *feed(step, count), step, count)

    return state, take, most


def _feeder(config, parts, mesh):
    """How many steps one call may take, and (step, count) -> its dataset and rows."""
    points = parts.splits.train
    rows_of = training.order(config, len(points.x))
    if isinstance(points.x, sources.Rows):
        batch = data.stream(points, rows_of, parallel.by_batch(mesh))
        return 1, lambda step, count: (batch(step), None)
    points = parallel.place(points, parallel.replicated(mesh))
    # Of several processes all must take as many, whatever time each of them sees.
    most = MOST if jax.process_count() == 1 else 1

    def feed(step, count):
        rows = np.zeros((most, config.train.batch_size), np.int32)
        rows[:count] = [rows_of(step + i) for i in range(count)]
        return points, rows

    return most, feed


def _packed(config, workdir):
    """Where the state is packed: run.pack, of one of several networks with its name."""
    if config.run.pack is None:
        return None
    path = Path(config.run.pack)
    return path if workdir is None else path.with_name(f"{workdir.name}-{path.name}")


def pack(path, step, state, parts):
    """Writes a state, and of which data it is, as one file that can be moved."""
    checkpoint.pack(path, step, {"state": state, "data": _mark(parts)})


def unpack(path, like, parts):
    """The (state, step) of `pack`.   Raises: ConflictError: the data are others."""
    found, step = checkpoint.unpack(path, {"state": like, "data": _mark(parts)})
    if not np.array_equal(found["data"], _mark(parts)):
        raise checkpoint.ConflictError(
            f"{path} was trained on other data (fingerprint "
            f"{bytes(found['data']).hex()[:12]}, here "
            f"{parts.splits.fingerprint[:12]}): give the same --config.data as there"
        )
    return found["state"], step


def _mark(parts):
    return np.frombuffer(bytes.fromhex(parts.splits.fingerprint), np.uint8)


def early_stop(config, workdir, step, steps) -> str | None:
    """Why training ends at a step before the last, or None where it goes on.

    It ends where `gap_stop` or `plateau_stop` says so, by what metrics.jsonl has: a run
    that is started again comes to the same end.

    Args: steps, the last one.
    """
    gap, patience = config.train.stop_gap, config.train.plateau
    if step >= steps or (gap is None and patience is None):
        return None
    rows = record.read_metrics(workdir / "metrics.jsonl")
    rows = [row for row in rows if row["step"] <= step]
    if not rows or rows[-1]["step"] != step:
        return None  # nothing was looked at here
    why = gap_stop(gap, rows) or plateau_stop(patience, rows)
    return why and f"stopped early at step {step}: {why}"


def gap_stop(share, rows) -> str | None:
    """Whether the held-out eps-loss is above the training points' by a share of itself.

    Both are means over the noise levels. Args: share, train.stop_gap; rows up to now.
    """
    if share is None or not rows[-1].get("held_out_losses"):
        return None
    seen, held_out = (
        np.mean(np.array(rows[-1][f"{name}_losses"], float))
        for name in ("train", "held_out")
    )
    gap = 1 - seen / held_out
    if gap <= share:
        return None
    return (
        f"the held-out loss, {held_out:.4g}, is above the training loss, {seen:.4g}, "
        f"by {gap:.4g} of itself, more than train.stop_gap={share:g}"
    )


def plateau_stop(patience, rows) -> str | None:
    """Whether the ratio, of EMA or raw weights, has risen to its plateau.

    By `memorization.plateaued`, of the higher of the two at each snapshot.
    Args: patience, train.plateau, in snapshots; rows up to now.
    """
    looks = [row for row in rows if RATIOS[0] in row]
    if patience is None or not looks or looks[-1] is not rows[-1]:
        return None
    best = [max(RATIOS, key=lambda name: row.get(name, 0.0)) for row in looks]
    ratios = [row[name] for row, name in zip(looks, best, strict=True)]
    intervals = [row[f"{name}_interval"] for row, name in zip(looks, best, strict=True)]
    if not memorization.plateaued(ratios, intervals, patience):
        return None
    return (
        f"the memorization ratio, {ratios[-1]:.4g}, has not risen for "
        f"train.plateau={patience} snapshots"
    )


def snapshot_steps(config, n: int) -> set[int]:
    """Steps of the snapshots: some on a log grid, one every snapshot_epochs."""
    (steps, _), found = build.lengths(config, n), set()
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


def last_losses(config, parts, workdir) -> dict:
    """The last losses per noise level, and their step, as metrics.jsonl has them."""
    rows = record.read_metrics(workdir / "metrics.jsonl")
    last = [row for row in rows if "train_losses" in row][-1]
    noise = functools.partial(process.noise_to_signal, parts.process)
    return {
        "step": last["step"],
        "t": levels(config),
        "noise": jax.vmap(noise)(levels(config)),
        "train": last["train_losses"],
        "held_out": last.get("held_out_losses", []),
    }


def detector(config, parts, weights) -> dict:
    """Where on the noise axis the network memorizes, by `gap.spectrum`.

    Against the truth where it is known, else against held-out points; nothing for a
    conditional network, whose loss needs the labels, or without held-out points.
    """
    splits, truth_score = parts.splits, None
    if parts.num_classes or splits.held_out is None or len(splits.held_out.x) < 2:
        return {}
    if build.has_truth(config):
        truth_score = mixture.score(build.truth(config), parts.process)
    points = config.run.evaluate_points
    seen = first_points(splits.train, points).x
    held_out, times = splits.held_out.x[:points], levels(config)
    key = build.keys(config.seed).evaluate
    draws = gap.spectrum_draws(len(seen), len(held_out), times, key, points)

    def one(i, weights, seen, held_out, draws):
        level, i = i // draws[0].shape[1], i % draws[0].shape[1]
        row, new, eps_key = (a[level, i] for a in draws)
        return gap.spectrum_losses(
            training.score_fn(parts, weights),
            parts.process,
            seen[row],
            held_out[new],
            times[level],
            eps_key,
            truth_score,
        )

    each = record.mapped(one, gap.BATCH)
    losses = each(draws.key.size, weights, seen, held_out, draws[:3])
    found = gap.spectrum_of(times, losses.reshape(*draws.key.shape, -1), draws.pairs)
    return {
        "gap": found.gap.value,
        "gap_error": found.gap.error,
        "memorizes": found.memorizes,
        "against": "held-out points" if truth_score is None else "the true score",
    }


def first_points(points, count: int):
    """The first so many, in memory."""
    return data.read(jax.tree.map(lambda a: a[:count], points))


def make_losses(config, parts, pause=lambda: None):
    """(params, points: Dataset) -> [LEVELS], the eps-loss at each noise level.

    The same noise for every call, so that differences are differences of networks.

    Args: pause, as in `record.paced`.
    """
    times, key = levels(config), build.keys(config.seed).evaluate

    def one(i, params, points, eps):
        level, row = i // len(eps), i % len(eps)
        x0, label = jax.tree.map(lambda a: a[row], points)
        fn = training.score_fn(parts, params, label)
        return gap.eps_loss(fn, parts.process, x0, times[level], eps[row])

    each = record.mapped(one, config.run.chunk, pause)

    def losses(params, points):
        eps = jax.random.normal(key, points.x.shape, points.x.dtype)
        found = each(LEVELS * len(eps), params, points, eps)
        return found.reshape(LEVELS, -1).mean(axis=1)

    return losses


class _Watcher:
    """What is looked at along training: losses per level, samples, their ratio."""

    def __init__(self, config, parts, session, generate):
        self.config, self.parts, self.session = config, parts, session
        self.generate = generate
        self._attempt = figures.quietly(session.say)
        self._losses = make_losses(config, parts, session.pause)
        points = config.run.evaluate_points
        splits = parts.splits
        self.seen = first_points(splits.train, points)
        self.held_out = None
        if splits.held_out is not None and len(splits.held_out.x):
            self.held_out = first_points(splits.held_out, points)
            if parts.num_classes and self.held_out.label is None:
                # Held-out points without a label are shown as "no label".
                none = jnp.full((len(self.held_out.x),), parts.num_classes, jnp.int32)
                self.held_out = self.held_out._replace(label=none)

    @functools.cached_property
    def search(self):
        """Of the nearest training points, where a snapshot asks for it."""
        return neighbours.searcher(self.parts.splits.train.x)

    def losses(self, params):
        """The eps-loss per noise level, of training and of held-out points."""
        found = {"train_losses": self._losses(params, self.seen)}
        if self.held_out is not None:
            found["held_out_losses"] = self._losses(params, self.held_out)
        return found

    def snapshot(self, step, weights):
        """A grid of samples, and the ratio of a few, with EMA and with raw weights."""
        found = {}
        for name, which in zip(RATIOS, ("ema", "params"), strict=True):
            samples = self._samples(weights[which])
            if name == RATIOS[0]:
                path = self.session.workdir / "samples" / f"step_{step:08d}.png"
                save = figures.save_samples
                self._attempt(save, path, samples[:GRID])
            # The null level is measured once, at the end: the held-out points stay.
            ratio = memorization.ratio_of(
                self.search(data.like(self.parts.splits.train.x, samples)),
                None,
                0,
                self.config.memorization.threshold,
            )
            found |= {name: ratio.value, f"{name}_interval": ratio.interval}
        return found

    def _samples(self, weights):
        """Some, the same noise for all weights."""
        count, chunk = self.config.run.snapshot_samples, self.config.run.chunk
        parts = []
        for start in range(0, count, chunk):
            stop = min(start + chunk, count)
            parts.append(self.generate(weights, start, stop))
        return np.concatenate(parts)


def _not_finite(config, parts, state, session, workdir, step, fetched):
    """Writes what is known of the step after `step`, which was refused, and ends."""
    keys = build.keys(config.seed)
    state = parallel.local(state)
    session.part()
    points, size = parts.splits.train, config.train.batch_size
    rows = training.order(config, len(points.x))(step)
    batch = data.read(jax.tree.map(lambda a: a[rows], points))
    batch = data.augment(batch, keys.data, step, config.train.flip)
    example_keys = train.example_keys(keys.train, step, size)
    loss = training.loss(parts, config)
    grads = jax.jit(jax.vmap(jax.grad(loss), (None, 0, 0)))(
        state.params, batch, example_keys
    )
    t = jax.vmap(lambda key: training.noise_of(parts, batch.x[0], key)[0])(example_keys)
    sigma = jax.vmap(parts.process.sigma)(t)
    counts = {
        name: int((~np.isfinite(leaf)).sum())
        for name, leaf in checkpoint.leaves(grads).items()
    }
    path = workdir / f"nonfinite_step_{step + 1}.json"
    details = {
        "step": step + 1,
        **{k: str(float(fetched[k])) for k in ("loss", "grad_norm", "update_norm")},
        "nonfinite_gradients": {k: v for k, v in counts.items() if v},
        "sigma": [float(sigma.min()), float(sigma.max())],
        "indices": rows,
    }
    if parallel.is_first():
        record.write_json(path, details)
    raise train.NonFiniteError(
        f"step {step + 1} gave loss {float(fetched['loss']):.4g}, gradient norm "
        f"{float(fetched['grad_norm']):.4g}, update norm "
        f"{float(fetched['update_norm']):.4g}: not applied, nothing of it saved. "
        f"Details: {path}. Lower optimizer.lr, set optimizer.clip, or look at "
        "the data"
    )


def _check_resume_step(checkpoints, step):
    if step not in checkpoint.steps(checkpoints):
        raise checkpoint.ConflictError(
            f"--resume_step={step} is not among the checkpoints in {checkpoints}: "
            f"{checkpoint.steps(checkpoints)}"
        )


def _roll_back(workdir, step, session):
    aside = f"abandoned-{time.strftime('%Y%m%dT%H%M%S')}"
    # A best one that is newer would outlive every older one that is saved after it.
    for directory in (workdir / "checkpoints", workdir / "best"):
        for newer in [s for s in checkpoint.steps(directory) if s > step]:
            moved = checkpoint.set_aside(directory, newer, aside)
            session.say(f"step {newer} is newer than {step}: moved to {moved}")


def _status(row):
    return f"loss {row['loss']:.4f}  {row['steps_per_second']:.1f} steps/s"


def _describe(parts, config):
    n, *shape = parts.splits.train.x.shape
    held_out = parts.splits.held_out
    return (
        f"{config.model.name} on {config.data.name}: n = {n:,} of {tuple(shape)}, "
        f"{0 if held_out is None else len(held_out.x):,} held out, "
        f"{parts.steps:,} steps on {jax.device_count()} x "
        f"{jax.devices()[0].device_kind}"
    )
