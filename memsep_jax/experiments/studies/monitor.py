"""The calendar, the log and the measurements of a training, and when it ends early."""

import contextlib
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memsep_jax import (
    analytic,
    checkpoint,
    data,
    gap,
    memorization,
    mixture,
    neighbours,
    parallel,
    process,
)
from memsep_jax.experiments import record, training
from memsep_jax.experiments.config import build
from memsep_jax.experiments.reporting import figures
from memsep_jax.experiments.runtime.session import Interrupted
from memsep_jax.memorization import membership

LEVELS = 12  # noise levels of the held-out loss
MEMBERS = 128  # points whose membership is asked for, and as many held-out ones
DRAWS = 4  # of the noise of each of them, at each noise level
GRID = 64  # images in a grid of samples
RATIOS = ("ratio", "raw_ratio")  # of a snapshot, by EMA and by raw weights


class Calendar(NamedTuple):
    """The steps at which a training is logged, saved, evaluated or kept."""

    steps: int  # of the whole training
    log_every: int
    save_every: int
    evaluate_every: int
    snapshots: set[int]

    @classmethod
    def of(cls, config, parts):
        """The calendar of a config."""
        group = config.run
        every = group.log_every, group.save_every, group.evaluate_every
        snapshots = snapshot_steps(config, len(parts.splits.train.x))
        return cls(parts.steps, *every, snapshots)

    def next(self, step: int) -> int:
        """The first step after this one at which anything is due."""
        every = (self.log_every, self.save_every, self.evaluate_every)
        due = [step - step % k + k for k in every]
        return min(self.steps, *due, *(s for s in self.snapshots if s > step))

    def logs(self, step: int) -> bool:
        """Whether a row is written."""
        return step == self.steps or step % self.log_every == 0

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is saved."""
        return step == self.steps or step % self.save_every == 0

    def evaluates(self, step: int) -> bool:
        """Whether the losses are measured."""
        return step == self.steps or step % self.evaluate_every == 0

    def measures(self, step: int) -> bool:
        """Whether anything of the network is measured, by itself or its samples."""
        return self.evaluates(step) or step in self.snapshots


def snapshot_steps(config, n: int) -> set[int]:
    """The steps of snapshots: some on a log grid, one every snapshot_epochs."""
    (last, _), steps = build.lengths(config, n), set()
    if config.run.snapshots:
        # Each one at twice the steps of the one before, up to the last step: times of
        # onset are read off on a log scale of steps.
        first = max(1, last / 2 ** (config.run.snapshots - 1))
        steps |= set(np.geomspace(first, last, config.run.snapshots).round().tolist())
    if config.run.snapshot_epochs:
        epoch = n / config.train.batch_size
        stride = max(1.0, config.run.snapshot_epochs * epoch)
        steps |= set(np.arange(stride, last + 1, stride).round().tolist())
    return {int(step) for step in steps}


class Log:
    """metrics.jsonl and the tracker of a training, which process 0 alone writes.

    Attributes: unfinished, the known part of the row of the step that a run goes on
      from, where it was stopped before that row was whole.
    """

    def __init__(self, config, session, workdir, start: int, steps: int):
        self.config, self.session, self.workdir = config, session, workdir
        self._steps, self._written, self._metrics = steps, -1, None
        self.unfinished: dict = {}
        if parallel.is_first():
            self._metrics = record.Metrics(workdir / "metrics.jsonl", start)
            self.unfinished = self._metrics.unfinished
        # All processes must take the same branch, and only process 0 has the rows.
        whole = self._metrics is not None and start in self._metrics.steps
        self.has_start = bool(session.share(whole))

    def write(self, row: dict, picture=None):
        """Writes a whole row; nothing where it is empty.

        Args: picture, the path of a grid of samples that the tracker gets beside it.
        """
        if row and self._metrics is not None:
            self._metrics.write(**row)
            self._written = row["step"]
            shown = {} if picture is None else {"samples": picture}
            self.session.track(row | shown, self.config, self.workdir)

    def write_unfinished(self, row: dict):
        """Writes the known part of a row before the rest is measured.

        Nothing is written where the row is whole already.
        """
        if row and self._metrics is not None and row["step"] != self._written:
            self._metrics.write_unfinished(**row)

    def ends(self, step: int) -> bool:
        """Whether training ends at this step, before the last: `early_stop`."""
        why = None
        if self._metrics is not None:
            why = early_stop(self.config, self.workdir, step, self._steps)
        if why:
            self.session.say(why)
        return bool(self.session.share(why is not None))


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
        return None  # nothing was measured here
    why = gap_stop(gap, rows) or plateau_stop(patience, rows)
    return why and f"stopped early at step {step}: {why}"


def gap_stop(share, rows) -> str | None:
    """Why the held-out eps-loss is too far above that of training points, or None.

    Both are means over the noise levels.

    Args: share, train.stop_gap, of the held-out loss.   rows, up to now.
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
    """Why the ratio is on its plateau, by `memorization.plateaued`, or None.

    The ratio at a snapshot is the higher of those by EMA and by raw weights.

    Args: patience, train.plateau, in snapshots.   rows, up to now.
    """
    rows, last = [row for row in rows if RATIOS[0] in row], rows[-1]
    # Only at a snapshot: at other steps nothing new is known.
    if patience is None or not rows or rows[-1] is not last:
        return None
    best = [max(RATIOS, key=lambda name: row.get(name, 0.0)) for row in rows]
    ratios = [row[name] for row, name in zip(rows, best, strict=True)]
    intervals = [row[f"{name}_interval"] for row, name in zip(rows, best, strict=True)]
    if not memorization.plateaued(ratios, intervals, patience):
        return None
    return (
        f"the memorization ratio, {ratios[-1]:.4g}, has not risen for "
        f"train.plateau={patience} snapshots"
    )


class Monitor:
    """Measures the network of a training: losses per noise level, samples, their ratio.

    It keeps weights too: snapshots/, and best/, those of the lowest held-out loss.
    """

    def __init__(self, config, parts, session, log, generate):
        """Args: generate, (weights, start, stop) -> samples."""
        self.config, self.parts, self.session, self.log = config, parts, session, log
        self.generate, self.calendar = generate, Calendar.of(config, parts)
        self._losses = make_losses(config, parts, session.pause)
        self._draw = figures.quietly(session.say)
        # Earlier starts of the run count too: best/ holds the lowest loss of all.
        rows = record.read_metrics(log.workdir / "metrics.jsonl")
        losses = [r["held_out_losses"] for r in rows if r.get("held_out_losses")]
        self._best = min(map(np.mean, losses), default=np.inf)

    @functools.cached_property
    def points(self):
        """`evaluated_points`, read when they are first needed."""
        return evaluated_points(self.config, self.parts)

    @functools.cached_property
    def search(self):
        """The search for nearest training points, made for the first snapshot."""
        return neighbours.searcher(self.parts.splits.train.x)

    def visit(self, state, step: int, row: dict) -> bool:
        """Measures and logs what is due at a step.   Returns: whether training ends.

        Where a signal comes, nothing is logged: the row is made when the run goes on.
        Where several processes train, all call it, and the first one measures.

        Args: row, the numbers of the step that are known so far.
        """
        # By all processes: each may hold but a part of the state.
        weights = parallel.local({"params": state.params, "ema": state.ema})
        if parallel.is_first():
            # The vote below turns the signal into the stop of all processes.
            with contextlib.suppress(Interrupted):
                row = self._measured(step, row, weights)
        self.session.poll(now=True)
        if self.session.stop is not None:
            return False
        self.log.write(row, self._picture(step))
        return self.log.ends(step)

    def _measured(self, step, row, weights):
        if self.calendar.evaluates(step):
            row = {"step": step} | row | self.losses(weights["ema"])
            held_out = row.get("held_out_losses")
            if held_out is not None and np.mean(held_out) < self._best:
                self._best = np.mean(held_out)
                checkpoint.save(self.log.workdir / "best", step, weights, keep=1)
        if step in self.calendar.snapshots:
            self.session.pause()  # a signal that came in the losses ends this here
            checkpoint.save(self.log.workdir / "snapshots", step, weights)
            row = {"step": step} | row | self.snapshot(step, weights)
        return row

    def losses(self, params):
        """The eps-loss per noise level, of training and of held-out points."""
        seen, held_out = self.points
        losses = {"train_losses": self._losses(params, seen)}
        if held_out is not None:
            losses["held_out_losses"] = self._losses(params, held_out)
        return losses

    def snapshot(self, step, weights):
        """A grid of samples, and the ratio of a few, with EMA and with raw weights."""
        numbers = {}
        for name, which in zip(RATIOS, ("ema", "params"), strict=True):
            samples = self._samples(weights[which])
            if name == RATIOS[0]:
                self._draw(figures.save_samples, self._grid(step), samples[:GRID])
            # Without the null level: it is the same at all steps, and measured once.
            ratio = memorization.ratio_of(
                self.search(data.like(self.parts.splits.train.x, samples)),
                None,
                0,
                self.config.memorization.threshold,
            )
            numbers |= {name: ratio.value, f"{name}_interval": ratio.interval}
        return numbers

    def _grid(self, step):
        return self.session.workdir / "samples" / f"step_{step:08d}.png"

    def _picture(self, step):
        """The grid of samples of a step; None where there is none, or none may leave.

        Samples may be copies of training images, which run.images hides.
        """
        path = self._grid(step)
        return path if self.config.run.images and path.exists() else None

    def _samples(self, weights):
        """A few samples, from the same noise for all weights."""
        count, chunk = self.config.run.snapshot_samples, self.config.run.chunk
        parts = []
        for start in range(0, count, chunk):
            stop = min(start + chunk, count)
            parts.append(self.generate(weights, start, stop))
        return np.concatenate(parts)


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
    if not _comparable(parts):
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
    losses = losses.reshape(*draws.key.shape, -1)
    spectrum = gap.spectrum_of(times, losses, draws.pairs)
    return {
        "gap": spectrum.gap.value,
        "gap_error": spectrum.gap.error,
        "memorizes": spectrum.memorizes,
        "against": "held-out points" if truth_score is None else "the true score",
    }


def _comparable(parts) -> bool:
    """Whether the losses of training points can be set against held-out ones."""
    held_out = parts.splits.held_out
    # One held-out point has no standard error.
    return not parts.num_classes and held_out is not None and len(held_out.x) > 1


def make_membership(config, parts, say=lambda text: None, others=None, swapped=False):
    """weights -> `membership.Curve` of the score that is sampled, at `levels`, or None.

    Args and None: as in `make_statistics`.
    """
    statistics, count = make_statistics(config, parts, say, others, swapped=swapped)

    def measured(weights):
        values = statistics(weights)
        if values is None:
            return None
        return membership.curve_of(levels(config), values, count)

    return measured


def make_statistics(
    config, parts, say=lambda text: None, others=None, most=None, swapped=False
):
    """(weights, reference=None) -> `membership.Statistics`, [n + n2, levels], or None.

    Of the score that is sampled, at members first, each with its own label. Every call
    has the same points and noise, so that differences are those of the networks. None
    where there are fewer than two other points, or none with a label that the network
    takes, and where `membership.check_sets` refuses the points, which is said.

    Args: others, a Dataset of points that are no members; by default the held-out ones.
      most, points of each set; by default MEMBERS. swapped, for the twin of a network,
      whose members are the others here: a point then has the same noise for both.
      reference, the weights of a second network.
    Returns: the function, and the number of members.
    """
    times, train = levels(config), parts.splits.train
    others = parts.splits.held_out if others is None else others
    unknown = parts.num_classes and others is not None and others.label is None
    if others is None or unknown:
        return lambda *weights: None, 0
    most = MEMBERS if most is None else most
    train, others = first_points(train, most), first_points(others, most)
    if parts.num_classes:
        # A label without a training point is one that the network knows nothing of.
        kept = np.isin(others.label, np.asarray(parts.splits.train.label))
        others = jax.tree.map(lambda a: a[kept], others)
    count = min(len(train.x), len(others.x))
    if count < 2:
        return lambda *weights: None, count
    train, others = first_points(train, count), first_points(others, count)
    labels = None
    if parts.num_classes:
        labels = jnp.concatenate([train.label, others.label])
    points = np.concatenate([train.x, others.x])
    try:
        membership.check_sets(points[:count], points[count:])
    except ValueError as error:
        why = f"membership is not measured: {error}"
        return lambda *weights: say(why), count
    simple = analytic.gaussian(points, parts.process)
    keys = jax.random.split(build.keys(config.seed).evaluate, len(points))
    if swapped:
        keys = jnp.concatenate([keys[count:], keys[:count]])

    def one(i, weights, reference, points, labels, keys):
        label = None if labels is None else labels[i]
        score_fn, second = (
            None if w is None else training.sampled_score(config, parts, w, label)
            for w in (weights, reference)
        )
        return membership.statistics(
            score_fn, parts.process, points[i], times, keys[i], DRAWS,
            simple=simple, reference=second,
        )  # fmt: skip

    each = record.mapped(one, membership.BATCH)

    def measured(weights, reference=None):
        return each(len(points), weights, reference, points, labels, keys)

    return measured, count


def given_away(curve) -> float:
    """The highest AUC of the loss over the noise levels: who was in the training set.

    The level is the best one for an attacker. The highest of several AUCs is above 1/2
    by chance, too, by about as much in every row: compare it with that of the control.

    Args: curve, of `membership`; None where it was not measured, which gives NaN.
    """
    if curve is None or np.isnan(curve.loss.auc).all():
        return np.nan
    return float(np.nanmax(curve.loss.auc))


def members_found(config, parts, weights, say) -> dict:
    """The section of metrics.json about membership; empty where it is not measured."""
    curve = make_membership(config, parts, say)(weights)
    if curve is None:
        return {}
    numbers = {
        name: value._asdict()
        for name, value in curve._asdict().items()
        if isinstance(value, membership.Separation)
    }
    return {"membership": numbers | {"counts": curve.counts, "note": curve.note}}


def evaluated_points(config, parts):
    """The training points and the held-out points, or None, whose losses are measured.

    A network of labels sees held-out points that have none as "no label".
    """
    count, held_out = config.run.evaluate_points, parts.splits.held_out
    seen = first_points(parts.splits.train, count)
    if held_out is None or not len(held_out.x):
        return seen, None
    held_out = first_points(held_out, count)
    if parts.num_classes and held_out.label is None:
        none = jnp.full((len(held_out.x),), parts.num_classes, jnp.int32)
        held_out = held_out._replace(label=none)
    return seen, held_out


def first_points(points, count: int):
    """The first `count` points, in memory."""
    return data.read(jax.tree.map(lambda a: a[:count], points))


def make_losses(config, parts, pause):
    """(params, points: Dataset) -> [LEVELS], the eps-loss at each noise level.

    Every call has the same noise, so that differences are those of the networks.

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
        flat = each(LEVELS * len(eps), params, points, eps)
        return flat.reshape(LEVELS, -1).mean(axis=1)

    return losses
