"""When along training do samples become good, and when do they become copies?

Experiment `onset`: networks of every n are looked at where run.snapshots kept them. Two
times, in steps (Bonnaire 2025, arXiv 2505.17638): tau_gen, at which the Frechet
distance of samples from held-out points has come down almost to its best, and tau_mem,
at which copies begin. Between them a network generalizes. The paper: tau_gen does not
depend on n, tau_mem grows like n.
"""

import functools
import time
from typing import NamedTuple

import numpy as np

from memsep_jax import checkpoint
from memsep_jax.experiments.config import build, grid
from memsep_jax.experiments.reporting import figures
from memsep_jax.experiments.runtime import points
from memsep_jax.experiments.studies import (
    emm,
    monitor,
    networks,
    pruning,
    results,
    training_run,
)

WEIGHTS = {"ema": "EMA weights", "raw": "raw weights"}
TIMES = {"tau_gen": "tau_gen: good samples", "tau_mem": "tau_mem: copies"}
ALONG = ("ratio", "ratio_low", "ratio_high", "frechet", "precision", "recall")
COLUMNS = (
    "setting", "num_examples", "d", "width", "depth", "weight_decay",
    *(f"{weights}_{which}" for weights in WEIGHTS for which in TIMES),
    "ratio", "null", "frechet", "seeds",
)  # fmt: skip


class Fit(NamedTuple):
    """tau = factor n^slope."""

    slope: float
    low: float  # Student's 95 % interval of the slope, over the seeds
    high: float
    factor: float
    sizes: list[int]  # those that count: where all seeds have a tau


def run(config, session, resume_step=None):
    """Trains the networks and looks at their snapshots; draws the curves."""
    with session.phase("data"):
        parts = check(config)
    session.begin(parts.splits.fingerprint, parts.splits)
    work = functools.partial(measure, session=session)
    rows = points.run(config, session, work, what="networks")
    results.finish(config, session, rows, draw, columns=COLUMNS, onset=onsets(rows))


def check(config) -> build.Parts:
    """What can be wrong, before anything is compiled or written.

    Returns: the parts of the first point.   Raises: build.ConfigError.
    """
    wrong = []
    if not config.sweep.num_examples:
        wrong.append(
            "sweep.num_examples=() has no value: give the sizes, such as "
            "--config.sweep.num_examples='(50, 100, 200)'"
        )
    if config.run.snapshots < 2:
        wrong.append(
            f"run.snapshots={config.run.snapshots} must be at least 2: a time is found "
            "between two snapshots"
        )
    wrong += [
        f"train.{field}={config.train[field]}: a run that ends early has not all "
        "snapshots; leave it out"
        for field in ("stop_gap", "plateau")
        if config.train[field] is not None
    ]
    if wrong:
        raise build.ConfigError("\n".join(wrong))
    parts = grid.check(config)
    held_out = parts.splits.held_out
    if held_out is None or len(held_out.x) < 4:
        raise build.ConfigError(
            f"data.num_held_out={config.data.num_held_out}: quality is a distance from "
            "held-out points, at least 4; raise it"
        )
    return parts


# Times from what was measured along training.


def smoothed(values):
    """The running median of three: one outlier is gone, what is monotone is itself.

    Args: values [k].   Returns: [k]; both ends as they are.
    """
    values = np.asarray(values, float)
    ends = np.concatenate([values[:1], values, values[-1:]])
    return np.median(np.stack([ends[:-2], ends[1:-1], ends[2:]]), axis=0)


def crossing(steps, values, level: float) -> float:
    """The first step at which values have risen to a level, linear in log step.

    Args: steps [k] positive and increasing, values [k].
    Returns: the first of the steps where the level is there from the start (it is at
      most that), nan where it is not reached: censored.
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


def times(steps, ratios, distances, level: float, tolerance: float) -> dict:
    """Tau_gen and tau_mem of one network.

    tau_gen: of the way of the Frechet distance from the first snapshot to its best, no
    more than `tolerance` is left. tau_mem: the ratio of memorized samples reaches
    `level`. Both of running medians of three, so that no single snapshot, drawn too
    well or too badly, makes a time or the best; and the way is long, where a share of
    the best itself would be within the noise of the distance.

    Args: steps, ratios, distances [k], along training.
    """
    quality = -smoothed(distances)
    way = quality.max() - quality[0]
    return {
        "tau_gen": crossing(steps, quality, quality.max() - tolerance * way),
        "tau_mem": crossing(steps, smoothed(ratios), level),
    }


def fit(sizes, taus) -> Fit:
    """The line through log tau against log n, for each seed; its mean over the seeds.

    A size of which a seed has no tau is left out for all: only the fast seeds of a size
    reach it within the run, and would bend the line.

    Args: sizes [s], taus [s, seeds], nan where not reached.
    Returns: Fit; nan with fewer than two sizes, and no interval with one seed.
    """
    taus = np.asarray(taus, float)
    known = np.isfinite(taus).all(axis=1)
    kept = [int(n) for n, use in zip(sizes, known, strict=True) if use]
    if len(kept) < 2:
        return Fit(np.nan, np.nan, np.nan, np.nan, kept)
    slopes, starts = np.polyfit(np.log(kept), np.log(taus[known]), 1)
    found = results.mean_interval(slopes)
    slope, low, high = (float(found[name]) for name in ("mean", "low", "high"))
    return Fit(slope, low, high, float(np.exp(starts.mean())), kept)


def onsets(rows) -> list[dict]:
    """Times against n and their fits, for every setting, weights and time.

    Args: rows, those of `points.run`.
    Returns: for each, means and intervals over the seeds of log tau [s], in how many of
      the seeds it was reached [s], and "fit".
    """
    groups: dict = {}
    for row in rows:
        sizes = groups.setdefault(grid.label(row, emm.OTHER), {})
        by_seed = sizes.setdefault(row["num_examples"].item(), {})
        by_seed[int(row.get("seed", 0))] = row
    seeds = sorted({int(row.get("seed", 0)) for row in rows})
    found = []
    for setting, sizes in groups.items():
        for weights in WEIGHTS:
            for which in TIMES:
                ordered = sorted(sizes)
                taus = np.array(
                    [  # what failed is, as what was not reached, nan
                        [sizes[n].get(s, {}).get(f"{weights}_{which}") for s in seeds]
                        for n in ordered
                    ],
                    float,
                )
                logs = results.mean_interval(np.log(taus).T)
                found.append(
                    {
                        "setting": setting,
                        "weights": weights,
                        "time": which,
                        "sizes": ordered,
                        **{k: np.exp(logs[k]) for k in ("mean", "low", "high")},
                        "reached": np.isfinite(taus).sum(axis=1),
                        "fit": fit(ordered, taus)._asdict(),
                    }
                )
    return found


# Networks.


def measure(points, session):
    """Trains networks, and measures the raw and EMA weights of every snapshot.

    Yields: for each point, the numbers of a row; curves are over steps, [k].
    """
    for point in points:
        started, config = time.monotonic(), point.config
        with session.phase("data"):
            parts = build.build(config)
        generate = training_run.network_samples(config, parts, session)
        state = networks.trained(config, parts, session, generate)
        steps = sorted(monitor.snapshot_steps(config, len(parts.splits.train.x)))
        folder = session.workdir / "models" / networks.name(config) / "snapshots"
        _check_kept(folder, steps)
        like = {"params": state.params, "ema": state.ema}
        watch = pruning.watcher(config, parts, generate)
        looks: dict[str, list] = {weights: [] for weights in WEIGHTS}
        with session.phase("sample"):
            for step in steps:
                kept = checkpoint.restore(folder, step, like)
                looks["raw"].append(watch(kept["params"]))
                looks["ema"].append(watch(kept["ema"]))
        last = looks[config.sampler.weights][-1]
        row = {name: last[name] for name in ("ratio", "null", "frechet")}
        row |= {"steps": np.array(steps), "seconds": time.monotonic() - started}
        for weights, along in looks.items():
            curves = {name: np.array([a[name] for a in along]) for name in ALONG}
            row |= {f"{weights}_{name}": curve for name, curve in curves.items()}
            found = times(
                steps, curves["ratio"], curves["frechet"],
                config.measure.onset_level, config.measure.onset_tolerance,
            )  # fmt: skip
            row |= {f"{weights}_{which}": tau for which, tau in found.items()}
        yield row


def _check_kept(folder, steps):
    """Raises: ConflictError: the network was trained under other run.snapshots."""
    missing = sorted(set(steps) - set(checkpoint.steps(folder)))
    if missing:
        raise checkpoint.ConflictError(
            f"{folder} has no snapshots of steps {', '.join(map(str, missing))}: the "
            "network was trained with another run.snapshots or run.snapshot_epochs; "
            "give those, or another --workdir"
        )


# Pictures.


def draw(metrics, points):
    """(name, caption, figure) of the sweep: see `report.write_sweep`."""
    groups: dict = {}
    for row in metrics["table"]:
        groups.setdefault(grid.label(row, emm.OTHER), []).append(row)
    for name, what, percent, caption in (
        ("ratio", "memorized samples", True, "Memorized samples"),
        (
            "frechet", "Frechet distance", False,
            "Frechet distance of samples from held-out points, on pixels,",
        ),
    ):  # fmt: skip
        panels = [
            figures.Panel(
                ", ".join(filter(None, (setting, WEIGHTS[weights]))),
                [_along(row, f"{weights}_{name}") for row in rows],
                "training step", what, yscale="linear" if percent else "log",
                percent=percent,
            )
            for setting, rows in groups.items()
            for weights in WEIGHTS
        ]  # fmt: skip
        yield (
            name,
            f"{caption} along training, one line for each number n of training points. "
            "Bands: 95 % intervals over the seeds.",
            figures.curves(panels),
        )
    panels, words = [], []
    for setting in groups:
        for weights, text in WEIGHTS.items():
            found = [
                row
                for row in metrics["onset"]
                if (row["setting"], row["weights"]) == (setting, weights)
            ]
            title = ", ".join(filter(None, (setting, text)))
            lines = [line for i, row in enumerate(found) for line in _against_n(row, i)]
            words += [f"{title}, {_words(row)}." for row in found]
            panels.append(
                figures.Panel(title, lines, "training points n", "training step")
            )
    yield (
        "onset",
        "When samples become good and when they become copies, against the number of "
        "training points: geometric means over the seeds with 95 % intervals; no mark "
        "where a seed does not reach it. Dashed: the line through the logarithms. "
        + " ".join(words),
        figures.curves(panels),
    )


def _along(row, name):
    mean, low, high = (np.array(row[name][k], float) for k in ("mean", "low", "high"))
    if name.endswith("frechet"):
        low = np.maximum(low, mean / 10)  # a log axis has no 0
    label = f"n = {row['num_examples']:,}"
    return figures.Line(row["steps"]["mean"], mean, label, low, high, ".-")


def _against_n(row, i):
    """A time with its interval, and its line."""
    mean, low, high = (np.array(row[k], float) for k in ("mean", "low", "high"))
    color, found = figures.COLORS[i], row["fit"]
    yield figures.Line(row["sizes"], mean, TIMES[row["time"]], low, high, "o", color)
    if found["slope"] is not None:
        ends = np.array([found["sizes"][0], found["sizes"][-1]], float)
        tau = found["factor"] * ends ** found["slope"]
        yield figures.Line(ends, tau, style="--", color=color)


def _words(row):
    """ "tau_mem ~ n^0.9 [0.8, 1.0]", and where it was not reached."""
    found = row["fit"]
    text = f"{row['time']}: too few sizes for a line"
    if found["slope"] is not None:
        text = f"{row['time']} ~ n^{found['slope']:.2f}"
        if found["low"] is not None:
            text += f" [{found['low']:.2f}, {found['high']:.2f}]"
    left = [n for n in row["sizes"] if n not in found["sizes"]]
    return text + (f", not reached by all seeds of n = {left}" if left else "")
