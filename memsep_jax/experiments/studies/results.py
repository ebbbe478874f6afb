"""From the points of a sweep to its results: means over seeds, tables, the report."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from memsep_jax import memorization
from memsep_jax.experiments import record
from memsep_jax.experiments.config import grid
from memsep_jax.experiments.reporting import figures, report, tables
from memsep_jax.experiments.reporting.figures import Interval
from memsep_jax.experiments.runtime import points

WORD = 16  # characters of a setting that a terminal shows on a line
WIDE = 5  # columns of the table that a terminal shows, where a study ranks them
# The columns that say which point a row is, the setting first, which says most.
AXES = tuple(sorted(grid.AXES, key=lambda axis: axis != "setting"))
OTHER = tuple(axis for axis in grid.AXES if axis != "num_examples")
# Numbers of one point alone, which no mean over seeds describes.
OWN = ("memorized", "ratio_low", "ratio_high", "seconds")
OF = "_of"  # ratio_of: of how many trials ratio is a share


def grouped(rows: list[dict], key: Callable[[dict], Any]) -> dict[Any, list[dict]]:
    """The rows by key(row), in the order in which the keys appear."""
    groups: dict[Any, list[dict]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def whole(config, rows: list[dict], key: Callable[[dict], Any]) -> list[dict]:
    """The rows of those groups of points, equal in key(values), of which none failed.

    A conclusion from several points must not be drawn from the remainder of them.
    """
    known = {grid.values_of(row) for row in rows}
    gaps = {
        key(point.values)
        for point in grid.points(config)
        if grid.values_of(point.values) not in known
    }
    return [row for row in rows if key(row) not in gaps]


def finish(config, session, rows: list[dict], draw, every=None, columns=None, **about):
    """Writes the numbers, figures and report of a sweep, and shows its table.

    points.csv has a row for every point, empty where it failed; metrics.json has the
    means over the seeds that succeeded, their number, and `about`.

    Args: draw, as `report.write_sweep` takes it; every, the points of the rows where
      they are not all points of config.sweep; columns of the table that is shown, in
      their order, those that the rows do not have left out.
    Raises: FailedError at the end, where points failed.
    """
    every = grid.points(config) if every is None else every
    # Points without a row failed: they keep their place in the table, and say so.
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
    about |= {
        "points": [str(path.relative_to(session.workdir)) for path in done],
        "failed": {
            path.stem: (record.read_json(points.why(path)) or {}).get("error")
            for path in failed
        },
        "table": table,
    }
    publish(config, session, draw, **about)
    if failed:  # only now: what the other points found is written and shown
        raise points.failure(failed, len(every))


def publish(config, session, draw, **about):
    """Writes metrics.json and the report, and shows the table.

    Args: draw, as `report.write_sweep` takes it; about, what metrics.json holds.
    """
    metrics = {"experiment": config.experiment, **about}
    record.write_json(session.workdir / "metrics.json", metrics)
    with session.reporting():
        report.write_sweep(session.workdir, draw, session.say)
    session.say(summary(session.workdir))
    session.say(f"report: {session.workdir / 'report.html'}")


def summary(workdir) -> Table:
    """The means over the seeds as a table, without columns that are constant.

    The first column of measurements stays: the table is of it, also where all are 0.
    Where there are more columns than a terminal is wide, the first ones, in the order
    of metrics["columns"].
    """
    metrics = record.read_json(workdir / "metrics.json")
    columns, rows = tables.table(metrics, intervals=False)
    seeds = [row["seeds"] for row in metrics["table"] if row["seeds"]]
    counts = " to ".join(map(str, dict.fromkeys([min(seeds), max(seeds)])))
    shown = Table(title=f"{metrics['experiment']}: means over {counts} seeds")
    every = zip(columns, zip(*rows, strict=True), strict=True)
    measured = (
        name for name in columns for row in metrics["table"]
        if isinstance(row.get(name), dict)
    )  # fmt: skip
    first = next(measured, None)
    kept = [
        (name, cells)
        for name, cells in every
        if len(set(cells)) > 1 or len(rows) == 1 or name == first
    ]
    if "columns" in metrics:  # the number of seeds is always shown where it varies
        kept = kept[:WIDE] + [column for column in kept[WIDE:] if column[0] == "seeds"]
    for name, cells in kept:
        # A setting is read and not compared, so its words are not broken.
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
    """The seeds of each point as one row: for every number its mean and 95 % interval.

    A row that holds the share `ratio` says by `ratio_of` of how many samples.

    Args: every, the points that should have a row: where all seeds of one failed, the
      row holds its values and 0 seeds; axes, what tells a point apart from others
      of its seed.
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
            if name in axes or name == "seed" or name.endswith(OF):
                continue
            shapes = {np.shape(row[name]) for row in group}
            # Curves have a mean at each place; samples and the like have none.
            if len(shapes) == 1 and len(min(shapes)) < 2 and name not in OWN:
                each = np.stack([row[name] for row in group])
                trials = sum(int(row.get(name + OF, 0)) for row in group)
                merged[name] = mean_interval(each, trials=trials)._asdict()
        table.append(merged)
    return table


def mean_interval(values, level=0.95, trials: int = 0) -> Interval:
    """Mean over the first axis, standard deviation, and Student's interval of the mean.

    A few seeds can agree by chance. The interval of a share is therefore at least
    Wilson's of all trials together, and it ends at 0 and 1.

    Args: values [s, ...]; trials, of how many in all they are shares, 0 for others.
    Returns: Interval of arrays [...]; nan but for the mean
      where s is 1.
    """
    values = np.asarray(values, np.float64)
    mean = values.mean(axis=0)
    low = high = std = np.full(values.shape[1:], np.nan)  # one seed shows no spread
    if len(values) > 1:
        std = values.std(axis=0, ddof=1)
        error = std / np.sqrt(len(values))
        from scipy import stats  # takes over a second to import

        half = stats.t.ppf((1 + level) / 2, len(values) - 1) * error
        low, high = mean - half, mean + half
        if trials:
            floor = np.vectorize(lambda share: _wilson(share, trials, level))(mean)
            low = np.clip(np.minimum(low, floor[0]), 0, None)
            high = np.clip(np.maximum(high, floor[1]), None, 1)
    return Interval(mean, std, low, high)


def _wilson(share, trials, level):
    if np.isnan(share):
        return np.nan, np.nan
    return memorization.wilson(round(share * trials), trials, level)


def line(rows: list[dict], name: str, label=None, style="o-", color=None):
    """A number of the table's rows against their num_examples, with its band."""
    rows = sorted(rows, key=lambda row: row["num_examples"])
    n = [row["num_examples"] for row in rows]
    return figures.line(n, [row[name] for row in rows], label, style, color)


def setting(row: dict) -> str | None:
    """The label of a row without its number of training points."""
    return grid.label(row, OTHER)
