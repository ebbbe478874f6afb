"""What drives memorization: a grid over any fields, with a picture for each factor.

Each of sweep.points changes some fields of the config; {} is the base. Points that
give other values to the same field are one factor (Gu 2023, sections 4 to 6).
"""

import ast
from typing import NamedTuple

from memsep_jax.experiments.config import grid
from memsep_jax.experiments.reporting import figures
from memsep_jax.experiments.studies import emm, networks, results
from memsep_jax.experiments.studies.study import Study

COLUMNS = (*emm.COLUMNS[:-1], "membership", *emm.COLUMNS[-1:])


class Value(NamedTuple):
    """One value of a factor."""

    factor: str  # the fields, such as "model.width"
    number: float | None  # None where the value is not a number
    text: str


def value_of(setting: str) -> Value:
    """The value that a setting gives to its first field, the factor.

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
    """The config's own value of each factor; None where it is not set."""
    settings = map(grid.fields_of, grid.axes(config).get("setting", ()))
    factors = {next(iter(fields)) for fields in settings if fields}
    places = {factor: factor.partition(".") for factor in factors}
    return {factor: config[group][name] for factor, (group, _, name) in places.items()}


def groups(table) -> dict[str, list[int]]:
    """The indices of the table's rows of each factor; the base belongs to all."""
    base = [i for i, row in enumerate(table) if not row.get("setting")]
    members: dict[str, list[int]] = {}
    for i, row in enumerate(table):
        if row.get("setting"):
            members.setdefault(value_of(row["setting"]).factor, list(base)).append(i)
    for axis in grid.AXES:
        values = {row[axis] for row in table if axis in row}
        if axis not in ("setting", "num_examples") and len(values) > 1:
            members[axis] = list(base)
    return members or {"num_examples": base}


def draw(metrics, points):
    """(name, caption, figure) of each picture: see `study.Study`."""
    table = metrics["table"]
    # Grouped again: the table has no rows of points that failed.
    for i, (factor, members) in enumerate(groups(table).items()):
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
    placed.sort(key=lambda pair: pair[0])
    others = [axis for axis in grid.AXES if axis not in ("setting", factor)]
    by_label = results.grouped(placed, lambda pair: grid.label(pair[1], others))
    lines = []
    for i, (label, some) in enumerate(by_label.items()):
        color = figures.COLORS[i % len(figures.COLORS)]
        x = [place for place, _ in some]
        ratio, null = ([row[name] for _, row in some] for name in ("ratio", "null"))
        style = "o-" if ticks is None else "o"
        lines.append(figures.line(x, ratio, label or "samples", style, color))
        lines.append(
            figures.line(x, null, "null level", "--", color)._replace(low=None)
        )
    return figures.Panel(
        "", lines, grid.LABELS.get(factor, factor), "memorized samples",
        xscale=_scale([place for place, _ in placed]) if ticks is None else "linear",
        yscale="linear", percent=True, ticks=ticks,
    )  # fmt: skip


def _place(factor, row, base):
    """The place of a row on the axis of a factor: a number, or a text."""
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


def _conclude(config, rows, parts, session):
    table = results.over_seeds(rows, grid.points(config))
    return {"base": base_values(config), "groups": groups(table)}


def measure(points, session):
    """Yields the numbers of `networks.measured`, with `membership`, for each point."""
    for point in points:
        yield networks.measured(point.config, session, members=True)


STUDY = Study(measure, draw, conclude=_conclude, columns=COLUMNS, what="networks")
