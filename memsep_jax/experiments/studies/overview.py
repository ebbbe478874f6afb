"""The results of a sweep of runs: one table and one picture, with gaps."""

import itertools
from collections import Counter
from pathlib import Path

from rich.table import Table

from memsep_jax.experiments import record
from memsep_jax.experiments.config.command import UsageError
from memsep_jax.experiments.config.grid import Point
from memsep_jax.experiments.reporting import figures
from memsep_jax.experiments.runtime import runs
from memsep_jax.experiments.studies import results

MEASURE = "memorization.ratio"  # what the picture shows, where runs have it
# Shares, and the number of points that each is a share of.
SHARES = {
    "memorization.ratio": "memorization.samples",
    "memorization.null": "memorization.held_out",
}


def numbers(workdir: Path, point: Point) -> dict:
    """The scalars of a finished run: {"memorization.ratio": 0.5, ...}."""

    def scalars(value, name):
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from scalars(inner, f"{name}.{key}" if name else key)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield name, value

    metrics = record.read_json(runs.place(workdir, point) / "metrics.json")
    return dict(scalars(metrics, ""))


def aggregate(workdir: Path, points: list[Point], measure=None) -> Table:
    """All points as one table and picture, with gaps where one is not done.

    Writes points.csv (a row for each point), metrics.json (means over the seeds with
    95 % intervals) and sweep.png, of `measure` against the first axis.
    Returns: the table for a person.   Raises: UsageError where nothing is done.
    """
    states = [runs.state(workdir, point) for point in points]
    known = [
        numbers(workdir, point) if what == "done" else {}
        for point, what in zip(points, states, strict=True)
    ]
    names = list(dict.fromkeys(itertools.chain(*known)))
    if not names:
        raise UsageError(f"{workdir}: no point is done yet: there is nothing to show")
    measure = measure or (MEASURE if MEASURE in names else names[0])
    if measure not in names:
        raise UsageError(
            f"--measure={measure}: no run has it; they have {', '.join(names)}"
        )
    fields = dict.fromkeys(k for p in points for k in p.values if k != "seed")
    # A field that all points share is no axis of a picture.
    axes = [k for k in fields if len({str(p.values.get(k)) for p in points}) > 1]
    columns = {k: [p.values.get(k, "") for p in points] for k in (*fields, "seed")}
    columns["state"] = states
    columns |= {name: [row.get(name, "") for row in known] for name in names}
    record.write_csv(workdir / "points.csv", columns)
    rows = [
        {k: v for k, v in point.values.items() if k in (*axes, "seed")}
        | row
        | {share + results.OF: row[of] for share, of in SHARES.items() if of in row}
        for point, row in zip(points, known, strict=True)
        if row
    ]
    table = results.over_seeds(rows, points, axes)
    metrics = {
        "experiment": workdir.resolve().name,
        "columns": [*axes, measure, "seeds"],
        "states": Counter(states),
        "table": table,
    }
    record.write_json(workdir / "metrics.json", metrics)
    picture = figures.encode(draw(table, axes, measure), "png")
    record.write_bytes(workdir / "sweep.png", picture)
    return results.summary(workdir)


def draw(table, axes, measure):
    """The measure against the first axis, with a line for each value of the others."""
    first, *others = axes or [None]
    ticks = list(dict.fromkeys(row.get(first, "all") for row in table))
    named = any(isinstance(x, str) or x is None for x in ticks)
    if not named:
        ticks.sort()
    groups: dict[str, list[dict]] = {}
    for row in table:
        label = ", ".join(f"{_last(a)} = {row[a]}" for a in others if a in row)
        groups.setdefault(label, []).append(row)

    def at(row):
        return ticks.index(row.get(first, "all")) if named else row[first]

    def line(label, rows):
        rows = sorted(rows, key=at)
        values = [row.get(measure, {}) for row in rows]  # {}: a gap
        return figures.line([at(row) for row in rows], values, label)

    lines = [line(label or None, rows) for label, rows in groups.items()]
    ends = [row[measure] for row in table if measure in row]
    share = all(0 <= value["mean"] <= 1 for value in ends)
    if gaps := [at(row) for row in table if measure not in row]:
        low = [-0.02 if share else min(value["mean"] for value in ends)] * len(gaps)
        lines.append(figures.Line(gaps, low, "no result", style="x", color="0.5"))
    wide = not named and ticks[0] > 0 and ticks[-1] >= 8 * ticks[0]
    panel = figures.Panel(
        "", lines, _last(first or "sweep"), measure.replace(".", " "),
        xscale="log" if wide else "linear", yscale="linear", percent=share,
        ticks=[str(tick) for tick in ticks] if named else None,
    )  # fmt: skip
    return figures.curves([panel])


def _last(field):
    """ "data.num_examples" -> "num examples"."""
    return field.rpartition(".")[2].replace("_", " ")
