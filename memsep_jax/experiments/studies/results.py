"""What comes of the points of a sweep: means over the seeds, tables and the report."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from scipy import stats

from memsep_jax.experiments import record
from memsep_jax.experiments.config import grid
from memsep_jax.experiments.reporting import report, tables
from memsep_jax.experiments.runtime import points

WORD = 16  # characters of a setting that a terminal shows in a line


WIDE = 5  # columns of the table that a terminal shows, where an experiment ranks them


# Of a point, but nothing to be averaged over seeds.
OWN = ("memorized", "ratio_low", "ratio_high", "seconds")


def whole(config, rows: list[dict], key: Callable[[dict], Any]) -> list[dict]:
    """The rows of those groups of points, equal in key(values), of which none failed.

    What is concluded from several points is not concluded from what is left of them.
    """
    known = {grid.values_of(row) for row in rows}
    gaps = {
        key(point.values)
        for point in grid.points(config)
        if grid.values_of(point.values) not in known
    }
    return [row for row in rows if key(row) not in gaps]


def finish(config, session, rows: list[dict], draw, every=None, columns=None, **about):
    """Numbers, figures, report, and a table for the person.

    points.csv has a row for every point, empty where it failed; metrics.json means over
    the seeds that did not, their number, and what `about` adds.

    Args: draw, as `report.write_sweep` takes it; every, the points of the rows where
      they are not all points of config.sweep; columns, of the table that is shown, in
      their order: those that the rows have.
    Raises: FailedError at the end, where points failed.
    """
    session.lead()  # one process alone writes what is of all points
    every = grid.points(config) if every is None else every
    known = {grid.values_of(row): row for row in rows}
    done: list[Path] = []
    failed: list[Path] = []
    for point in every:
        path = points.path_of(session.workdir, config, point)
        (done if grid.values_of(point.values) in known else failed).append(path)
    if not rows:
        raise points.failure(failed, len(every))
    names = [name for name, value in rows[0].items() if value.ndim == 0]
    listed = [known.get(grid.values_of(point.values), point.values) for point in every]
    values = {
        name: [np.asarray(row.get(name, "")).item() for row in listed] for name in names
    }
    record.write_csv(session.workdir / "points.csv", values)
    table = over_seeds(rows, every)
    if columns is not None:
        measured = {name for row in table for name in row}
        about["columns"] = [name for name in columns if name in measured]
    metrics = {
        "experiment": config.experiment,
        "points": [str(path.relative_to(session.workdir)) for path in done],
        "failed": {
            path.stem: (record.read_json(points.why(path)) or {}).get("error")
            for path in failed
        },
        "table": table,
        **about,
    }
    record.write_json(session.workdir / "metrics.json", metrics)
    session.write_status()  # the report shows the seconds so far
    with session.phase("report"):
        report.write_sweep(session.workdir, draw, session.say)
    session.write_status()
    session.say(summary(session.workdir))
    session.say(f"report: {session.workdir / 'report.html'}")
    if failed:
        raise points.failure(failed, len(every))


def summary(workdir) -> Table:
    """The means over the seeds as a table, without what is the same everywhere.

    Of more columns than a terminal is wide, the first, as metrics["columns"] has them.
    """
    metrics = record.read_json(workdir / "metrics.json")
    columns, rows = tables.table(metrics, intervals=False)
    seeds = [row["seeds"] for row in metrics["table"] if row["seeds"]]
    counts = " to ".join(map(str, dict.fromkeys([min(seeds), max(seeds)])))
    shown = Table(title=f"{metrics['experiment']}: means over {counts} seeds")
    every = zip(columns, zip(*rows, strict=True), strict=True)
    kept = [(name, c) for name, c in every if len(set(c)) > 1 or len(rows) == 1]
    if "columns" in metrics:  # how many seeds is always said where it is not the same
        kept = kept[:WIDE] + [column for column in kept[WIDE:] if column[0] == "seeds"]
    for name, cells in kept:
        # What says a setting is read, not compared: a line of it is not cut to bits.
        words = max((len(word) for cell in cells for word in cell.split()), default=1)
        side: Any = "left" if name == "setting" else "right"
        shown.add_column(
            name.replace("_", " "), justify=side, overflow="fold",
            min_width=min(words, WORD) if name == "setting" else None,
        )  # fmt: skip
    for row in zip(*(column for _, column in kept), strict=True):
        shown.add_row(*row)
    return shown


def over_seeds(
    rows: list[dict], every: Iterable[Any] = (), axes=grid.AXES
) -> list[dict]:
    """The seeds of each point as one: for every number its mean and 95 % interval.

    Args: every, the points that should have a row: where all seeds of one failed,
      there are its values, and 0 seeds; axes, what a point has besides its seed.
    """
    groups: dict[tuple, list[dict]] = {
        grid.values_of(p.values, axes): [] for p in every
    }
    for row in rows:
        groups.setdefault(grid.values_of(row, axes), []).append(row)
    table = []
    for values, group in groups.items():
        merged = dict(values) | {"seeds": len(group)}
        for name in group[0] if group else ():
            if name in axes or name == "seed":
                continue
            shapes = {np.shape(row[name]) for row in group}
            # Of curves, all; of samples and the like, nothing.
            if len(shapes) == 1 and len(min(shapes)) < 2 and name not in OWN:
                merged[name] = mean_interval(np.stack([row[name] for row in group]))
        table.append(merged)
    return table


def mean_interval(values, level=0.95) -> dict:
    """Mean over the first axis, standard deviation, and Student's interval for it.

    Args: values [s, ...].   Returns: {"mean", "std", "low", "high"}, each [...].
    """
    values = np.asarray(values, np.float64)
    mean = values.mean(axis=0)
    half = std = np.full(values.shape[1:], np.nan)
    if len(values) > 1:
        std = values.std(axis=0, ddof=1)
        error = std / np.sqrt(len(values))
        half = stats.t.ppf((1 + level) / 2, len(values) - 1) * error
    return {"mean": mean, "std": std, "low": mean - half, "high": mean + half}
