"""A grid of points, each with its own config and seed: what sweeps share.

`config.sweep` names the axes; a point is one value of each, and a seed. A finished
point is kept as points/<tag>/<name>.npz, where the tag stands for the rest of the
config, and is read instead of done again.
"""

import ast
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table
from scipy import stats

from memsep_jax.experiments import record, report, setup

AXES = {  # axis of config.sweep -> the field of the config that it varies
    "num_examples": ("data", "num_examples"),
    "d": ("data", "d"),
    "width": ("model", "width"),
    "depth": ("model", "depth"),
    "weight_decay": ("optimizer", "weight_decay"),
    "setting": None,  # any fields: "optimizer.weight_decay=1.0; model.dropout=0.1"
}
LABELS = {axis: axis.replace("_", " ") for axis in AXES} | {"num_examples": "n"}
SHAPE = ("d", "width", "depth")  # axes that change the shape of a network
WIDE = 5  # columns of the table that a terminal shows, where an experiment ranks them
# Of a point, but nothing to be averaged over seeds.
OWN = ("memorized", "ratio_low", "ratio_high", "seconds")


class Point(NamedTuple):
    """One value of every axis, and a seed."""

    name: str  # "num_examples=100,width=64,seed=0"
    values: dict[str, Any]  # axis -> value, the seed last
    config: Any  # the ConfigDict of a run of this point alone


def shape(point: Point) -> tuple:
    """Equal for points whose networks have one shape: `alike` of an ensemble."""
    return tuple(point.values.get(axis) for axis in SHAPE)


def label(row: dict, axes=tuple(AXES)) -> str | None:
    """ "n = 100, width = 64", of the axes that a row or point has."""
    values = {axis: np.asarray(row[axis]).item() for axis in axes if axis in row}
    setting = values.pop("setting", "")  # says itself what it sets
    named = [f"{LABELS[axis]} = {value:,}" for axis, value in values.items()]
    return ", ".join([*named, *([setting] if setting else [])]) or None


def points(config) -> list[Point]:
    """All points of config.sweep, the seeds of each side by side.

    A seed moves the truth, the draws, the initial weights and the batches alike.
    """
    axes = {axis: tuple(config.sweep[axis]) for axis in AXES if config.sweep[axis]}
    found = []
    for choice in itertools.product(*axes.values(), range(config.sweep.seeds)):
        values = dict(zip([*axes, "seed"], choice, strict=True))
        name = ",".join(f"{axis}={value}" for axis, value in values.items())
        one = seeded(config, values["seed"])
        for axis in axes:
            if place := AXES[axis]:
                one[place[0]][place[1]] = values[axis]
            else:
                _apply(one, values[axis])
        found.append(Point(name.replace("/", "_"), values, one))
    return found


def seeded(config, seed: int):
    """The config of a seed of the sweep, before any axis is set."""
    one = config.copy_and_resolve_references()
    one.seed = config.seed + seed
    if not config.prune.source:  # a network from elsewhere has its data
        one.data.seed = config.data.seed + seed
        one.data.truth_seed = (config.data.truth_seed or 0) + seed
    return one


def parse(setting: str) -> dict[str, str]:
    """ "a.b=1; c.d=2" -> {"a.b": "1", "c.d": "2"}."""
    parts = (part.partition("=") for part in setting.split(";") if part.strip())
    return {name.strip(): value.strip() for name, _, value in parts}


def _apply(config, setting):
    """Sets the fields of a setting.   Raises: setup.ConfigError."""
    for name, text in parse(setting).items():
        group, _, field = name.partition(".")
        if field not in config.get(group, {}):
            raise setup.ConfigError(
                f"sweep.setting={setting!r}: {name} is not a field of the config"
                f"{setup.did_you_mean(field, config.get(group, {}))}; write it as "
                '"group.field=value; group.field=value"'
            )
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text  # a name
        try:
            config[group][field] = value
        except TypeError as error:
            raise setup.ConfigError(f"sweep.setting={setting!r}: {error}") from error


def check(config) -> setup.Parts:
    """Builds the points of the first seed, before anything is compiled or written.

    Returns: the parts of the first point.   Raises: setup.ConfigError.
    """
    if not any(config.sweep[axis] for axis in AXES):
        raise setup.ConfigError(
            "sweep: no axis has a value: give one, such as "
            f"--config.sweep.num_examples='(100,)', of {', '.join(AXES)}"
        )
    first, *others = (p for p in points(config) if p.values["seed"] == 0)
    parts = setup.build(first.config)
    for point in others:
        setup.build(point.config)
    return parts


def run(
    config,
    session,
    work: Callable[[list[Point]], Iterable[dict]],
    alike: Callable[[Point], Any] = lambda point: point.name,
    what: str = "points",
) -> list[dict]:
    """The results of all points, in their order; finished ones are not done again.

    Args:
      work: some points -> for each a dict of numbers and arrays.
      alike: points of equal value are worked on together, up to sweep.together.
    Returns:
      For each point its values together with its results, as arrays.
    """
    todo: dict[Any, list[Point]] = {}
    found: dict[str, dict] = {}
    every = points(config)
    with session.progress(what, len(every)) as update:
        for point in every:
            known = record.read_npz(_path(session, config, point))
            if known is None:
                todo.setdefault(alike(point), []).append(point)
            else:
                found[point.name] = known
        update(len(found))
        for group in todo.values():
            for start in range(0, len(group), config.sweep.together):
                session.check()
                some = group[start : start + config.sweep.together]
                for point, result in zip(some, work(some), strict=True):
                    arrays = {k: np.asarray(v) for k, v in result.items()}
                    arrays = {
                        k: np.asarray(v) for k, v in point.values.items()
                    } | arrays
                    record.write_npz(_path(session, config, point), **arrays)
                    found[point.name] = arrays
                    update(len(found), point.name)
    return [found[point.name] for point in every]


def finish(config, session, rows: list[dict], draw, every=None, columns=None, **about):
    """Numbers, figures, report, and a table for the person.

    points.csv has a row for every point; metrics.json means over the seeds, and what
    `about` adds.

    Args: draw, as `report.write_sweep` takes it; every, the points of the rows where
      they are not all points of config.sweep; columns, of the table that is shown, in
      their order: those that the rows have.
    """
    scalars = [{k: v.item() for k, v in row.items() if v.ndim == 0} for row in rows]
    values = {name: [row[name] for row in scalars] for name in scalars[0]}
    record.write_csv(session.workdir / "points.csv", values)
    table = over_seeds(rows)
    if columns is not None:
        about["columns"] = [name for name in columns if name in table[0]]
    paths = [_path(session, config, point) for point in every or points(config)]
    metrics = {
        "experiment": config.experiment,
        "points": [str(path.relative_to(session.workdir)) for path in paths],
        "table": table,
        **about,
    }
    record.write_json(session.workdir / "metrics.json", metrics)
    session.write_status()  # the report shows the seconds so far
    with session.phase("report"):
        report.write_sweep(session.workdir, draw, session.say)
    session.write_status()
    session.console.print(summary(session.workdir))
    session.say(f"report: {session.workdir / 'report.html'}")


def summary(workdir) -> Table:
    """The means over the seeds as a table, without what is the same everywhere.

    Of more columns than a terminal is wide, the first, as metrics["columns"] has them.
    """
    metrics = record.read_json(workdir / "metrics.json")
    columns, rows = report.table(metrics, intervals=False)
    seeds = metrics["table"][0]["seeds"]
    shown = Table(title=f"{metrics['experiment']}: means over {seeds} seeds")
    every = zip(columns, zip(*rows, strict=True), strict=True)
    kept = [(name, c) for name, c in every if len(set(c)) > 1 or len(rows) == 1]
    if "columns" in metrics:
        kept = kept[:WIDE]
    for name, _ in kept:
        shown.add_column(name.replace("_", " "), justify="right", overflow="fold")
    for row in zip(*(column for _, column in kept), strict=True):
        shown.add_row(*row)
    return shown


def over_seeds(rows: list[dict]) -> list[dict]:
    """The seeds of each point as one: for every number its mean and 95 % interval."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        values = tuple((axis, row[axis].item()) for axis in AXES if axis in row)
        groups.setdefault(values, []).append(row)
    table = []
    for values, group in groups.items():
        merged = dict(values) | {"seeds": len(group)}
        for name in group[0]:
            if name in AXES or name == "seed":
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


def _path(session, config, point):
    """Where a point is kept; the folder stands for all that is no axis."""
    rest = setup.to_json(config)
    for group in ("sweep", "emm", "run"):
        rest.pop(group, None)
    rest |= setup.looks(config)
    text = json.dumps(rest, sort_keys=True)
    tag = hashlib.sha256(text.encode()).hexdigest()[:12]
    return session.workdir / "points" / tag / f"{point.name}.npz"
