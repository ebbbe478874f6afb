"""When along training do samples become good, and when do they become copies?

Experiment `onset`: networks of every n are evaluated where run.snapshots kept them,
which gives two times, in steps (Bonnaire 2025, arXiv 2505.17638): tau_gen, at which the
Frechet distance of samples from held-out points has come down almost to its best, and
tau_mem, at which copies begin. Between them a network generalizes. In the paper tau_gen
does not depend on n, and tau_mem grows like n.

Copies are the last sign of memorization. Before them samples may be nearer to their own
training set than to that of a twin (tau_near), the loss may tell the training set from
the twin's (tau_member), the held-out loss may have passed its least value
(tau_held_out), and `train.stop_gap` would have ended the training (tau_stop).
Garnier-Brun 2026 (arXiv 2603.03469, by its abstract) find a bias towards the training
set before the least held-out loss: then stopping there is too late.

All numbers are means of two twins, which start from the same weights and have disjoint
training sets (`twins`). Which set is the nearer one, or has the smaller losses, depends
on the sets too; in the mean of twins this cancels, and before training both signs are
at chance.
"""

import itertools
import time
from typing import NamedTuple

import numpy as np

from memsep_jax import checkpoint
from memsep_jax.experiments.config import build
from memsep_jax.experiments.reporting import figures
from memsep_jax.experiments.studies import (
    monitor,
    networks,
    pruning,
    results,
    training_run,
    twins,
)
from memsep_jax.experiments.studies.results import AXES
from memsep_jax.experiments.studies.study import Study

WEIGHTS = {"ema": "EMA weights", "raw": "raw weights"}
TIMES = {
    "tau_gen": "tau_gen: good samples",
    "tau_near": "tau_near: nearer to their own training set",
    "tau_member": "tau_member: members are told by their loss",
    "tau_held_out": "tau_held_out: the least held-out loss",
    "tau_stop": "tau_stop: a held-out loss above that of training",
    "tau_mem": "tau_mem: copies",
}
# Curves that the times are read off.
USED = ("ratio", "nearer", "member", "frechet", "train_loss", "held_out_loss")
ALONG = (*USED, "precision", "recall")
# Signs of memorization along training: 0 by chance, 1 for certain.
SIGNS = {
    "ratio": "copies",
    "nearer": "nearer to their own training set",
    "member": "members told by their loss",
}
COLUMNS = (
    *AXES,
    *(f"{weights}_{which}" for weights in WEIGHTS for which in TIMES),
    *(f"{weights}_stopped_{sign}" for weights in WEIGHTS for sign in SIGNS),
    "ratio", "null", "frechet", "seeds",
)  # fmt: skip


class Fit(NamedTuple):
    """tau = factor n^slope."""

    slope: float
    low: float  # Student's 95 % interval of the slope, over the seeds
    high: float
    factor: float
    sizes: list[int]  # those of which all seeds have a tau


def check(config) -> build.Parts:
    """Checks what can be wrong, before anything is compiled or written.

    Returns: the parts of the first point.   Raises: build.ConfigError.
    """
    return twins.check(config, _check)


def _check(config, parts):
    wrong = []
    if config.run.snapshots < 2:
        wrong.append(
            f"run.snapshots={config.run.snapshots} must be at least 2: a time is found "
            "between two snapshots"
        )
    wrong += [
        f"train.{field}={config.train[field]}: a run that ends early lacks some "
        "snapshots; leave it out"
        for field in ("stop_gap", "plateau")
        if config.train[field] is not None
    ]
    held_out = parts.splits.held_out
    # As many as `pruning.watcher` takes to measure quality.
    if held_out is None or len(held_out.x) < 4:
        wrong.append(
            f"data.num_held_out={config.data.num_held_out}: quality is a distance from "
            "held-out points, at least 4; raise it"
        )
    elif parts.num_classes and held_out.label is None:
        wrong.append(
            f"data.labels={config.data.labels}: held-out points have no labels, and "
            "their loss is compared with that of training points; give true or random "
            "labels, or none"
        )
    if wrong:
        raise build.ConfigError("\n".join(wrong))


# Times from measurements along training.


def smoothed(values):
    """The running median of three: it removes one outlier and keeps monotone values.

    Args: values [k].   Returns: [k]; both ends as they are.
    """
    values = np.asarray(values, float)
    ends = np.concatenate([values[:1], values, values[-1:]])
    return np.median(np.stack([ends[:-2], ends[1:-1], ends[2:]]), axis=0)


def crossing(steps, values, level: float) -> float:
    """The first step at which values have risen to a level, linear in log step.

    Args: steps [k] positive and increasing, values [k].
    Returns: the first of the steps where the level is there from the start (an upper
      bound), nan where the level is not reached.
    """
    steps, values = np.asarray(steps, float), np.asarray(values, float)
    (above,) = np.nonzero(values >= level)
    if not len(above):
        return np.nan
    i = above[0]
    if i == 0:
        return float(steps[0])
    part = (level - values[i - 1]) / (values[i] - values[i - 1])
    return float(steps[i - 1] * (steps[i] / steps[i - 1]) ** part)


def times(steps, along: dict, level: float, tolerance: float) -> dict:
    """The times of one network, in the order of TIMES.

    tau_gen: no more than the share `tolerance` is left of the way of the Frechet
    distance from the first snapshot to its best. The tolerance is a share of the way,
    because a share of the best itself would be within the noise of the distance.
    tau_mem: the ratio of memorized samples reaches `level`. tau_near, tau_member: the
    sign is at `level` from then on; before a network has learned anything, its samples
    may all be nearest to one point. tau_held_out: the snapshot of the least held-out
    loss, nan where that is the last one. tau_stop: the held-out loss first is above
    that of training points by `level` of itself, as train.stop_gap has it.

    All use running medians of three, so that no single lucky or unlucky snapshot
    decides a time or the best. These make a tie of the least losses, of which the least
    by itself counts.

    Args: steps [k]; along, "ratio", "nearer", "member", "frechet", "train_loss" and
      "held_out_loss" [k], along training.
    """
    its = {name: smoothed(values) for name, values in along.items()}
    quality = -its["frechet"]
    way = quality.max() - quality[0]

    def stays(values):
        # The least value from a step on is at the level where all later ones are.
        return crossing(steps, np.minimum.accumulate(values[::-1])[::-1], level)

    losses = np.asarray(along["held_out_loss"], float)
    ties = np.flatnonzero(its["held_out_loss"] == its["held_out_loss"].min())
    # No snapshot is the least where one is nan.
    least = ties[losses[ties].argmin()] if len(ties) else len(steps) - 1
    ended = least == len(steps) - 1
    return {
        "tau_gen": crossing(steps, quality, quality.max() - tolerance * way),
        "tau_near": stays(its["nearer"]),
        "tau_member": stays(its["member"]),
        "tau_held_out": np.nan if ended else float(steps[least]),
        "tau_stop": crossing(
            steps, 1 - its["train_loss"] / its["held_out_loss"], level
        ),
        "tau_mem": crossing(steps, its["ratio"], level),
    }


def at(steps, values, tau: float) -> float:
    """A value [k] along training at a time, linear in log step; nan where tau is."""
    return float(np.interp(np.log(tau), np.log(steps), values))


def fit(sizes, taus) -> Fit:
    """The line through log tau against log n, for each seed; its mean over the seeds.

    A size of which some seed has no tau is left out for all seeds: only its fast seeds
    get there within the run, and would bend the line.

    Args: sizes [s], taus [s, seeds], nan where not reached.
    Returns: Fit; nan with fewer than two sizes, and no interval with one seed.
    """
    taus = np.asarray(taus, float)
    known = np.isfinite(taus).all(axis=1)
    kept = [int(n) for n, use in zip(sizes, known, strict=True) if use]
    if len(kept) < 2:
        return Fit(np.nan, np.nan, np.nan, np.nan, kept)
    # log tau = log factor + slope log n, one line for each seed (a column of taus).
    slopes, starts = np.polyfit(np.log(kept), np.log(taus[known]), 1)
    slope, _, low, high = map(float, results.mean_interval(slopes))
    return Fit(slope, low, high, float(np.exp(starts.mean())), kept)


def onsets(rows) -> list[dict]:
    """Times against n and their fits, for every setting, weights and time.

    Args: rows, those of `points.run`.
    Returns: for each, geometric means of tau and their intervals over the seeds [s],
      the number of seeds that reached it [s], and "fit".
    """
    seeds = sorted({int(row.get("seed", 0)) for row in rows})
    laws = []
    for setting, some in results.grouped(rows, results.setting).items():
        known = {(r["num_examples"].item(), int(r.get("seed", 0))): r for r in some}
        sizes = sorted({n for n, _ in known})
        for weights, which in itertools.product(WEIGHTS, TIMES):
            name = f"{weights}_{which}"
            # A point that failed is nan, as is a time that was not reached.
            by_size = [[known.get((n, s), {}).get(name) for s in seeds] for n in sizes]
            taus = np.array(by_size, float)
            mean, _, low, high = map(np.exp, results.mean_interval(np.log(taus).T))
            laws.append(
                {
                    "setting": setting,
                    "weights": weights,
                    "time": which,
                    "sizes": sizes,
                    "mean": mean,
                    "low": low,
                    "high": high,
                    "reached": np.isfinite(taus).sum(axis=1),
                    "fit": fit(sizes, taus)._asdict(),
                }
            )
    return laws


# Networks.


def measure(points, session):
    """Trains twins, and measures the raw and EMA weights of every snapshot.

    Yields: for each point its numbers, and curves over the steps, [k].
    """
    for point in points:
        started, config = time.monotonic(), point.config
        pair = twins.halves(config)
        with session.phase("data"):
            built = [build.build(half) for half in pair]
        # One program for both; its noises depend on the seed alone, so they are equal.
        generate = training_run.network_samples(config, built[0], session)
        steps = sorted(monitor.snapshot_steps(config, len(built[0].splits.train.x)))
        both = [
            _along(half, own, other, steps, generate, session)
            for half, own, other in zip(pair, built, built[::-1], strict=True)
        ]
        mean = {
            weights: {
                name: np.mean([of[weights][name] for of in both], axis=0)
                for name in both[0][weights]
            }
            for weights in WEIGHTS
        }
        last = mean[config.sampler.weights]
        names = ("ratio", "ratio_of", "null", "null_of", "frechet")
        row = {name: last[name][-1] for name in names}
        row |= {name: 2 * row[name] for name in ("ratio_of", "null_of")}  # both twins
        row |= {"steps": np.array(steps), "seconds": time.monotonic() - started}
        for weights, curves in mean.items():
            # At the level that tells most at the end: the highest of all levels at each
            # step would be above chance from the first step on.
            auc = curves["auc"]
            best = 0 if np.isnan(auc[-1]).all() else np.nanargmax(auc[-1])
            curves["member"] = 2 * auc[:, best] - 1
            curves["nearer"] = 2 * curves["nearer"] - 1
            row |= {f"{weights}_{name}": curves[name] for name in ALONG}
            taus = times(
                steps, {name: curves[name] for name in USED},
                config.measure.onset_level, config.measure.onset_tolerance,
            )  # fmt: skip
            row |= {f"{weights}_{which}": tau for which, tau in taus.items()}
            row |= {
                f"{weights}_stopped_{sign}": at(steps, curves[sign], taus["tau_stop"])
                for sign in SIGNS
            }
        yield row


def _along(config, parts, twin, steps, generate, session) -> dict:
    """Trains a network: weights -> its numbers at every snapshot, [k, ...].

    Those of `pruning.watcher`, losses, means over the noise levels, and AUCs
    [k, levels] of the loss as a sign of membership.

    Args: twin, the parts of its twin.
    """
    state = networks.trained(config, parts, session, generate)
    folder = networks.folder(config, session.workdir) / "snapshots"
    _check_kept(folder, steps)
    like = {"params": state.params, "ema": state.ema}
    others, (seen, held_out) = (
        twin.splits.train, monitor.evaluated_points(config, parts)
    )  # fmt: skip
    watch = pruning.watcher(config, parts, generate, others.x)
    members = monitor.make_membership(
        config, parts, session.say, others, swapped=config.data.skip > 0
    )
    losses = monitor.make_losses(config, parts, session.pause)

    def look(weights):
        curve = members(weights)
        unknown = np.full(monitor.LEVELS, np.nan)
        return watch(weights) | {
            "auc": unknown if curve is None else curve.loss.auc,
            "train_loss": float(losses(weights, seen).mean()),
            "held_out_loss": float(losses(weights, held_out).mean()),
        }

    looks: dict[str, list] = {weights: [] for weights in WEIGHTS}
    with session.phase("sample"):
        for step in steps:
            kept = checkpoint.restore(folder, step, like)
            looks["raw"].append(look(kept["params"]))
            looks["ema"].append(look(kept["ema"]))
    return {
        weights: {name: np.array([one[name] for one in its]) for name in its[0]}
        for weights, its in looks.items()
    }


def _check_kept(folder, steps):
    """Refuses a network that lacks snapshots.   Raises: ConflictError."""
    missing = sorted(set(steps) - set(checkpoint.steps(folder)))
    if missing:
        raise checkpoint.ConflictError(
            f"{folder} has no snapshots of steps {', '.join(map(str, missing))}: the "
            "network was trained with another run.snapshots or run.snapshot_epochs; "
            "give those, or another --workdir"
        )


# Pictures.


def draw(metrics, points):
    """(name, caption, figure) of each picture: see `study.Study`."""
    groups = results.grouped(metrics["table"], results.setting)
    titles = {
        (setting, weights): ", ".join(filter(None, (setting, text)))
        for setting in groups
        for weights, text in WEIGHTS.items()
    }
    for name, what, percent, caption in (
        ("ratio", "memorized samples", True, "Memorized samples"),
        (
            "frechet", "Frechet distance", False,
            "Frechet distance of samples from held-out points",
        ),
    ):  # fmt: skip
        panels = [
            figures.Panel(
                title,
                [_curve(row, f"{weights}_{name}") for row in groups[setting]],
                "training step", what, yscale="linear" if percent else "log",
                percent=percent,
            )
            for (setting, weights), title in titles.items()
        ]  # fmt: skip
        yield (
            name,
            f"{caption} along training, one line for each number n of training points. "
            "Bands: 95 % intervals over the seeds.",
            figures.curves(panels),
        )
    yield (
        "signs",
        "Signs of memorization along training, 0 % by chance and 100 % for certain: "
        "memorized samples; 2 s - 1 of the share s of samples that are nearer to their "
        "own training set than to the twin's; 2 AUC - 1 of the loss at one noise "
        "level, which tells the training set from the twin's. Dashed: the held-out "
        "loss, scaled so that its least value is 0 % and that of the first snapshot "
        "100 %, which is not exceeded. "
        f"{WEIGHTS['ema']}, means and 95 % intervals over the seeds.",
        figures.curves(
            [
                figures.Panel(
                    ", ".join(filter(None, (setting, f"n = {row['num_examples']:,}"))),
                    [*_signs(row, "ema")],
                    "training step", "sign", yscale="linear", percent=True,
                )
                for setting, rows in groups.items()
                for row in rows
            ]
        ),
    )  # fmt: skip
    laws = results.grouped(
        metrics["onset"], lambda row: (row["setting"], row["weights"])
    )
    panels, words = [], []
    for key, title in titles.items():
        lines = [line for i, row in enumerate(laws[key]) for line in _against_n(row, i)]
        words += [f"{title}, {_words(row)}." for row in laws[key]]
        panels.append(figures.Panel(title, lines, "training points n", "training step"))
    yield (
        "onset",
        "The times at which samples become good, at which the signs of memorization "
        "appear, and at which samples become copies, "
        "against the number of training points: geometric means over the seeds with "
        "95 % intervals; no mark where a seed does not get there. Dashed: the line "
        "through the logarithms. " + " ".join(words),
        figures.curves(panels),
    )


def _curve(row, name):
    label, log = f"n = {row['num_examples']:,}", name.endswith("frechet")
    return figures.line(row["steps"]["mean"], row[name], label, ".-", log=log)


def _signs(row, weights):
    """The signs of memorization of a size along training, and its held-out loss."""
    steps = row["steps"]["mean"]
    for sign, label in SIGNS.items():
        yield figures.line(steps, row[f"{weights}_{sign}"], label, ".-")
    loss = np.array(row[f"{weights}_held_out_loss"]["mean"], float)
    way = loss[0] - loss.min()
    if way > 0:
        above = np.minimum((loss - loss.min()) / way, 1)
        label = "held-out loss above its least"
        yield figures.Line(steps, above, label, style="--", color=figures.GREY)


def _against_n(row, i):
    """A time with its interval, and its line."""
    color, law = figures.COLORS[i], row["fit"]
    yield figures.line(row["sizes"], row, TIMES[row["time"]], "o", color)
    if law["slope"] is not None:
        ends = np.array([law["sizes"][0], law["sizes"][-1]], float)
        tau = law["factor"] * ends ** law["slope"]
        yield figures.Line(ends, tau, "fitted power law", style="--", color=color)


def _words(row):
    """ "tau_mem ~ n^0.9 [0.8, 1.0]", and the sizes at which it was not reached."""
    law = row["fit"]
    text = f"{row['time']}: too few sizes for a line"
    if law["slope"] is not None:
        text = f"{row['time']} ~ n^{law['slope']:.2f}"
        if law["low"] is not None:
            text += f" [{law['low']:.2f}, {law['high']:.2f}]"
    left = [n for n in row["sizes"] if n not in law["sizes"]]
    return text + (f", not reached by all seeds of n = {left}" if left else "")


STUDY = Study(
    measure,
    draw,
    check,
    conclude=lambda config, rows, parts, session: {"onset": onsets(rows)},
    columns=COLUMNS,
    what="pairs of twins",
)
