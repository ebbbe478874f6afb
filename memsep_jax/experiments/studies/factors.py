"""What drives memorization: a grid over any fields, one picture and table a factor.

Each of sweep.points changes some fields of the config; {} is the base. What
differs in the value of the same fields is one factor (Gu 2023, sections 4 to 6).
"""

import ast
import functools
from typing import NamedTuple

import numpy as np

from memsep_jax.experiments.config import grid
from memsep_jax.experiments.reporting import figures
from memsep_jax.experiments.runtime import points
from memsep_jax.experiments.studies import networks, results
from memsep_jax.experiments.studies.emm import COLUMNS


class Value(NamedTuple):
    """One value of a factor."""

    factor: str  # the fields, such as "model.width"
    number: float | None  # where it is one
    text: str


def run(config, session, resume_step=None):
    """Trains and measures every point; returns when the figures are drawn."""
    with session.phase("data"):
        parts = grid.check(config)
    session.begin(parts.splits.fingerprint, parts.splits)
    work = functools.partial(networks.measure, session=session)
    rows = points.run(config, session, work, what="networks")
    table = results.over_seeds(rows, grid.points(config))
    results.finish(
        config, session, rows, draw, columns=COLUMNS, base=base_values(config),
        groups=groups(table),
    )  # fmt: skip


def value_of(setting: str) -> Value:
    """What a setting says: its first field is the factor, the others go with it.

    "train.batch_size=128; optimizer.lr=1e-3" is the value 128 of train.batch_size.
    """
    factor, text = next(iter(grid.parse(setting).items()))
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = None  # a name
    if factor == "model.skips":  # (1, 0, 0) is 100
        text = "".join(str(int(flag)) for flag in value)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return Value(factor, float(value) if is_number else None, text)


def base_values(config) -> dict:
    """What the config itself has for each factor; None where it is not set."""
    settings = map(grid.fields_of, grid.axes(config).get("setting", ()))
    factors = {next(iter(fields)) for fields in settings if fields}
    places = {factor: factor.partition(".") for factor in factors}
    return {factor: config[group][name] for factor, (group, _, name) in places.items()}


def groups(table) -> dict[str, list[int]]:
    """Which rows of the table belong to a factor; the base to all of them."""
    base = [i for i, row in enumerate(table) if not row.get("setting")]
    found: dict[str, list[int]] = {}
    for i, row in enumerate(table):
        if row.get("setting"):
            found.setdefault(value_of(row["setting"]).factor, list(base)).append(i)
    for axis in grid.AXES:
        values = {row[axis] for row in table if axis in row}
        if axis not in ("setting", "num_examples") and len(values) > 1:
            found[axis] = list(base)
    return found or {"num_examples": base}


def draw(metrics, points):
    """(name, caption, figure) of every factor: see `report.write_sweep`."""
    table = metrics["table"]
    for i, (factor, members) in enumerate(groups(table).items()):  # without gaps
        rows = [table[k] for k in members]
        yield (
            f"factor_{i}",
            f"Memorized samples against {grid.LABELS.get(factor, factor)}. "
            "Bands and bars: 95 % intervals over the seeds. Dashed: the null level.",
            figures.curves([_panel(factor, rows, metrics["base"].get(factor))]),
        )


def _panel(factor, rows, base):
    placed = [(_place(factor, row, base), row) for row in rows]
    ticks = None
    if any(place is None or isinstance(place, str) for place, _ in placed):
        named = [_named(place) for place, _ in placed]
        ticks = list(dict.fromkeys(named))
        rows = [row for _, row in placed]
        placed = [(ticks.index(k), row) for k, row in zip(named, rows, strict=True)]
    lines: dict[str | None, list] = {}
    for place, row in sorted(placed, key=lambda pair: pair[0]):
        others = [a for a in grid.AXES if a not in ("setting", factor)]
        lines.setdefault(grid.label(row, others), []).append((place, row))
    drawn = []
    for i, (label, some) in enumerate(lines.items()):
        color = figures.COLORS[i % len(figures.COLORS)]
        x = [place for place, _ in some]
        style = "o-" if ticks is None else "o"
        for kind, kind_style, text in (("ratio", style, label), ("null", "--", None)):
            mean, low, high = (
                np.array([row[kind][k] for _, row in some], float)
                for k in ("mean", "low", "high")
            )
            ends = (low, high) if kind == "ratio" else (None, None)
            drawn.append(figures.Line(x, mean, text, *ends, kind_style, color))
    return figures.Panel(
        "", drawn, grid.LABELS.get(factor, factor), "memorized samples",
        xscale=_scale([place for place, _ in placed]) if ticks is None else "linear",
        yscale="linear", percent=True, ticks=ticks,
    )  # fmt: skip


def _place(factor, row, base):
    """Where a row stands on the axis of a factor: a number, or a text."""
    if factor in row:
        return row[factor]
    if not row.get("setting"):
        return base
    value = value_of(row["setting"])
    return value.text if value.number is None else value.number


def _named(place):
    if place is None:
        return "default"
    return f"{place:g}" if isinstance(place, float) else str(place)


def _scale(places):
    if min(places) > 0:
        return "log" if max(places) >= 4 * min(places) else "linear"
    return "symlog" if max(places) > 0 else "linear"
