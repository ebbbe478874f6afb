"""Who was in the training set, and at which noise levels does a network tell?

Experiment `membership`: for networks of every n, how well the loss, PIA, SecMI and two
calibrated losses tell training points from held-out ones (`memorization.membership`),
at each noise level. The second model that calibrates the loss is a twin, trained in the
same way on n other points.

The AUC at the best level is chosen on one half of the points and read off on the other:
the highest of several AUCs is above 1/2 even where nobody can be told.
"""

import time

import jax
import numpy as np

from memsep_jax import data, memorization, process
from memsep_jax.experiments import training
from memsep_jax.experiments.config import build
from memsep_jax.experiments.reporting import figures
from memsep_jax.experiments.reporting.report import STATISTICS
from memsep_jax.experiments.studies import (
    monitor,
    networks,
    results,
    training_run,
    twins,
)
from memsep_jax.experiments.studies.results import AXES
from memsep_jax.experiments.studies.study import Study
from memsep_jax.memorization import membership

COLUMNS = (
    *AXES, "ratio", *(f"best_{name}" for name in STATISTICS),
    *(f"tpr_{name}" for name in STATISTICS), "noise_loss", "seeds",
)  # fmt: skip
FEW = 4  # points of each set: two in each half


def check(config) -> build.Parts:
    """Checks what can be wrong, before anything is compiled or written.

    Returns: the parts of the first point.   Raises: build.ConfigError.
    """
    return twins.check(config, _check)


def _check(config, parts):
    if parts.num_classes:
        raise build.ConfigError(
            f"data.labels={config.data.labels}: a held-out point has a label that the "
            "network never saw with it, which gives it away as well; give "
            "data.labels=none"
        )
    train = np.asarray(parts.splits.train.x)
    held_out = parts.splits.held_out
    others = train[:0] if held_out is None else np.asarray(held_out.x)
    if min(len(train), len(others), config.run.evaluate_points) < FEW:
        raise build.ConfigError(
            f"{len(train)} training and {len(others)} held-out points, of which "
            f"run.evaluate_points={config.run.evaluate_points} are asked for: each "
            f"must be at least {FEW}; raise data.num_examples, data.num_held_out or "
            "run.evaluate_points"
        )
    try:
        membership.check_sets(train, others)
    except ValueError as error:
        raise build.ConfigError(f"membership cannot be told: {error}") from error


def measure(points, session):
    """Trains the twins of some points, and asks the first who was in its training set.

    Yields: for each point its numbers, and curves over the noise levels, [k].
    """
    for point in points:
        started, states = time.monotonic(), []
        for config in twins.halves(point.config):
            with session.phase("data"):
                parts = build.build(config)
            # Both have the same shapes, so the program is that of the first.
            if not states:
                first = parts
                generate = training_run.network_samples(config, parts, session)
            states.append(networks.trained(config, parts, session, generate))
        with session.phase("sample"):
            own, twin = (training.sampled_weights(s, config) for s in states)
            drawn = generate(own, 0, point.config.sampler.num_samples)
            x = np.asarray(first.splits.train.x)
            threshold = point.config.memorization.threshold
            found = memorization.ratio(data.like(x, drawn), x, None, threshold)
        with session.phase("membership"):
            row = {"ratio": found.value, "ratio_of": len(drawn)}
            row |= told(point.config, first, own, twin)
        yield row | {"seconds": time.monotonic() - started}


def told(config, parts, weights, reference) -> dict:
    """How well each statistic tells members from held-out points.

    Args: reference, the weights of a network that was trained on none of them.
    Returns: `noise` [k], sigma / alpha; for each of STATISTICS `auc_NAME` and
      `at_1_NAME` [k], the AUC and the TPR at 1 % FPR; `best_NAME`, `tpr_NAME` and
      `noise_NAME` at the level that is best for the other half of the points.
    """
    told_of, count = monitor.make_statistics(
        config, parts, most=config.run.evaluate_points
    )
    values, times = told_of(weights, reference), monitor.levels(config)
    halves = []
    for first in (0, 1):  # every second member, and every second of the others
        rows = np.r_[first:count:2, count + first : len(values.loss) : 2]
        some = jax.tree.map(lambda x, rows=rows: np.asarray(x)[rows], values)
        halves.append(membership.curve_of(times, some, len(range(first, count, 2))))
    noise = np.asarray(process.noise_to_signal(parts.process, times))
    row: dict = {"noise": noise}
    for name in STATISTICS:
        found = [half._asdict()[name] for half in halves]
        auc, tpr = np.stack([f.auc for f in found]), np.stack([f.tpr for f in found])
        row |= {f"auc_{name}": auc.mean(axis=0), f"at_1_{name}": tpr.mean(axis=0)}
        best = dict.fromkeys(("best", "tpr", "noise"), np.nan)
        if not np.isnan(auc).any():
            level = auc.argmax(axis=1)[::-1]  # of one half, for the other
            best = {
                "best": auc[[0, 1], level].mean(),
                "tpr": tpr[[0, 1], level].mean(),
                "noise": np.exp(np.log(noise[level]).mean()),
            }
        row |= {f"{of}_{name}": value for of, value in best.items()}
    return row


def draw(metrics, points):
    """(name, caption, figure) of each picture: see `study.Study`."""
    panels, over = [], []
    for title, rows in results.grouped(metrics["table"], results.setting).items():
        for row in rows:
            noise = np.array(row["noise"]["mean"], float)
            lines = [
                figures.line(noise, row[f"auc_{name}"], label)
                for name, label in STATISTICS.items()
            ]
            chance = np.full(len(noise), 0.5)
            lines.append(
                figures.Line(noise, chance, "chance", style=":", color="black")
            )
            words = f"n = {row['num_examples']:,}"
            panels.append(
                figures.Panel(
                    f"{title}\n{words}" if title else words, lines,
                    "noise level, sigma / alpha", "AUC", yscale="linear", unit=True,
                )
            )  # fmt: skip
        lines = [
            results.line(rows, f"best_{name}", label)
            for name, label in STATISTICS.items()
        ]
        lines.append(results.line(rows, "ratio", "memorized samples", "--", "black"))
        over.append(
            figures.Panel(
                title or "", lines, "training points n", "AUC, share of samples",
                yscale="linear", unit=True,
            )
        )  # fmt: skip
    yield (
        "membership",
        "How well a statistic tells training points from held-out ones, at each noise "
        "level, with 95 % intervals over the seeds. Each AUC is the mean of those of "
        "two halves of the points.",
        figures.curves(panels),
    )
    yield (
        "best",
        "The AUC at the best noise level, which the other half of the points decides, "
        "beside the share of samples that are copies, with 95 % intervals over the "
        "seeds. 1/2 is chance.",
        figures.curves(over),
    )


STUDY = Study(measure, draw, check, columns=COLUMNS, what="pairs of twins")
