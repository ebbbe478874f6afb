"""A grid of points, each with its own config and seed: what sweeps share.

`config.sweep` names the axes; a point is one value of each, and a seed. A finished
point is kept as points/<tag>/<name>.npz, where the tag stands for the rest of the
config, and is read instead of done again. One that fails ends no other: why it failed
is kept as <name>.failed.json beside them, and the same command tries it again.
"""

import ast
import hashlib
import itertools
import json
import re
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.markup import escape
from rich.table import Table
from scipy import stats

from memsep_jax import defaults
from memsep_jax.experiments.config import setup
from memsep_jax.experiments.reporting import report
from memsep_jax.experiments.runtime import record

AXES = {  # axis of config.sweep -> the field of the config that it varies
    "num_examples": ("data", "num_examples"),
    "d": ("data", "d"),
    "width": ("model", "width"),
    "depth": ("model", "depth"),
    "weight_decay": ("optimizer", "weight_decay"),
    "setting": None,  # any fields: "optimizer.weight_decay=1.0; model.dropout=0.1"
}
LABELS = {axis: axis.replace("_", " ") for axis in AXES} | {"num_examples": "n"}
# Axes that change the shape of a network; a setting may change anything.
SHAPE = ("d", "width", "depth", "setting")
WORD = 16  # characters of a setting that a terminal shows in a line
WIDE = 5  # columns of the table that a terminal shows, where an experiment ranks them
# Of a point, but nothing to be averaged over seeds.
OWN = ("memorized", "ratio_low", "ratio_high", "seconds")
# Exit codes of errors that are of no single point: what a person must change, a disk
# that is full.
ENDS_ALL = (2, 5)
LISTED, LONG = 10, 400  # failed points in a message, characters of each
LONG_NAME = 150  # characters of a point's name: file systems take 255


class FailedError(RuntimeError):
    """Some points failed; all others are finished and kept."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


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
        one = seeded(config, values["seed"])
        for axis in axes:
            if place := AXES[axis]:
                one[place[0]][place[1]] = values[axis]
            else:
                _apply(one, values[axis])
        found.append(Point(file_name(listed(values)), values, one))
    return found


def listed(values: dict) -> str:
    """ "num_examples=100,width=64,seed=0"."""
    return ",".join(f"{name}={value}" for name, value in values.items())


def file_name(name: str, whole: str | None = None) -> str:
    """The name of a point as that of a file, which no other point has.

    Where it is cut, or a character is replaced, it ends in a hash of itself. Args:
    whole, to be hashed in any case, where another point could have the same name.
    """
    safe = re.sub(r"[/\0]", "_", name)
    if whole is None and safe == name and len(name) <= LONG_NAME:
        return name
    digest = hashlib.sha256((whole or name).encode()).hexdigest()[:8]
    return f"{safe[:LONG_NAME]}-{digest}"


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
    values: dict[str, Any] = {}
    for name, text in parse(setting).items():
        try:
            values[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            values[name] = text  # a name
    try:
        override(config, values)
    except setup.ConfigError as error:
        raise setup.ConfigError(
            f'sweep.setting={setting!r}: {error}; write it as "group.field=value; '
            'group.field=value"'
        ) from error


def override(config, values: dict[str, Any]) -> None:
    """Sets {"group.field": value}.   Raises: setup.ConfigError."""
    for name, value in values.items():
        *groups, field = name.split(".")
        place = config
        for group in groups:
            place = place.get(group, {}) if hasattr(place, "get") else {}
        if field not in place:
            raise setup.ConfigError(
                f"{name} is not a field of the config{setup.did_you_mean(field, place)}"
            )
        try:
            place[field] = value
        except TypeError as error:
            raise setup.ConfigError(f"{name}: {error}") from error


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
    work: Callable[[list[Point]], Iterable[dict | Exception]],
    alike: Callable[[Point], Any] = lambda point: point.name,
    what: str = "points",
) -> list[dict]:
    """The results of all points, in their order; finished ones are not done again.

    Args:
      work: some points -> for each a dict of numbers and arrays, or the error that it
        alone failed with.
      alike: points of equal value are worked on together, up to sweep.together.
    Returns:
      For each point that did not fail its values together with its results, as arrays.
    Raises:
      FailedError where all failed; else `finish` does, when the others are shown.
    """
    todo: dict[Any, list[Point]] = {}
    found: dict[str, dict] = {}
    every = points(config)
    with session.progress(what, len(every)) as update:
        for point in every:
            known = record.read_npz(_path(session.workdir, config, point))
            if known is None:
                todo.setdefault(alike(point), []).append(point)
            else:
                found[point.name] = known
        count = len(found)
        update(count)
        for group in todo.values():
            for start in range(0, len(group), config.sweep.together):
                some = group[start : start + config.sweep.together]
                for point, result in _results(work, some, session):
                    path = _path(session.workdir, config, point)
                    if isinstance(result, Exception):
                        _note(path, result, session)
                    else:
                        found[point.name] = _arrays(point.values) | result
                        record.write_npz(path, **found[point.name])
                        _why(path).unlink(missing_ok=True)
                    count += 1
                    update(count, point.name)
    if not found:
        raise _failure(
            [_path(session.workdir, config, point) for point in every], len(every)
        )
    return [found[point.name] for point in every if point.name in found]


def attempt(work, *args):
    """What work(*args) returns, or the error with which it failed: for this point."""
    try:
        return work(*args)
    except Exception as error:
        if getattr(error, "exit_code", None) in ENDS_ALL:
            raise
        return error


def _results(work, some, session) -> Iterator[tuple[Point, dict | Exception]]:
    """Each of some points with its arrays, or with the error that it failed with.

    Where an error ends the work on several, which one it belongs to is not known: those
    that are left are done alone.
    """
    left = list(some)
    try:
        for _, result in zip(some, work(some), strict=True):
            if not isinstance(result, Exception):
                # What a device could not do is said here, and not when it is fetched.
                result = _arrays(jax.block_until_ready(result))
            yield left.pop(0), result
    except Exception as error:
        # The latter: there are more results than points.
        if getattr(error, "exit_code", None) in ENDS_ALL or not left:
            raise
        if len(some) == 1:
            yield left.pop(), error
        else:
            session.say(
                f"warning: {short(error)}: {len(left)} points that were worked on "
                "together are now done one by one"
            )
    for point in left:
        yield from _results(work, [point], session)


def _arrays(values):
    return {k: np.asarray(v) for k, v in values.items()}


def _note(path, error, session):
    """Keeps why a point failed, and says it."""
    record.write_json(_why(path), explained(error))
    session.say(f"warning: {path.stem} failed: {short(error)}")


def explained(error) -> dict:
    """What is kept of an error that a point failed with."""
    return {
        "error": f"{type(error).__name__}: {error}",
        "exit_code": getattr(error, "exit_code", 1),
        "traceback": "".join(traceback.format_exception(error)),
    }


def _failure(failed: list[Path], total: int) -> FailedError:
    """What is raised at the end.   Args: failed, where these points would be kept."""
    known = [record.read_json(_why(path)) or {} for path in failed]
    lines = [
        f"  {path.stem}: {about.get('error', 'unknown')}".splitlines()[0][:LONG]
        for path, about in zip(failed, known, strict=True)
    ][:LISTED]
    if len(failed) > LISTED:
        lines.append(f"  and {len(failed) - LISTED} more")
    codes = {about.get("exit_code", 1) for about in known}
    others = ", the others are finished" if len(failed) < total else ""
    text = (
        f"{len(failed)} of {total} points failed{others}:\n"
        + "\n".join(lines)
        + f"\nMore in {failed[0].parent}/*.failed.json. Give the same command again to "
        "try these only"
    )
    return FailedError(text, codes.pop() if len(codes) == 1 else 1)


def whole(config, rows: list[dict], key: Callable[[dict], Any]) -> list[dict]:
    """The rows of those groups of points, equal in key(values), of which none failed.

    What is concluded from several points is not concluded from what is left of them.
    """
    known = {_values(row) for row in rows}
    gaps = {
        key(point.values)
        for point in points(config)
        if _values(point.values) not in known
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
    every = points(config) if every is None else every
    known = {_values(row): row for row in rows}
    done: list[Path] = []
    failed: list[Path] = []
    for point in every:
        path = _path(session.workdir, config, point)
        (done if _values(point.values) in known else failed).append(path)
    if not rows:
        raise _failure(failed, len(every))
    names = [name for name, value in rows[0].items() if value.ndim == 0]
    listed = [known.get(_values(point.values), point.values) for point in every]
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
            path.stem: (record.read_json(_why(path)) or {}).get("error")
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
        raise _failure(failed, len(every))


def summary(workdir) -> Table:
    """The means over the seeds as a table, without what is the same everywhere.

    Of more columns than a terminal is wide, the first, as metrics["columns"] has them.
    """
    metrics = record.read_json(workdir / "metrics.json")
    columns, rows = report.table(metrics, intervals=False)
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


def status(workdir) -> Table | None:
    """Which points of the sweep in a workdir are done, failed or missing, at any time.

    Returns: None where no sweep has a point yet.
    """
    values = record.read_json(Path(workdir) / "config.json") or {}
    if "sweep" not in values or not (Path(workdir) / "points").is_dir():
        return None
    config = defaults.restored(values)
    paths = [_path(workdir, config, point) for point in points(config)]
    if config.experiment == "emm":  # that chooses its sizes as it goes
        folder = _folder(workdir, config)
        files = [path.name for path in folder.glob("[!.]*")]
        names = [f.removesuffix(".npz").removesuffix(".failed.json") for f in files]
        paths = [folder / f"{name}.npz" for name in sorted(set(names))]
    rows = []
    for path in paths:
        why = record.read_json(_why(path))
        if path.is_file():
            rows.append((path.stem, "done", ""))
        elif why is not None:
            rows.append((path.stem, "failed", why["error"].splitlines()[0][:100]))
        else:
            rows.append((path.stem, "missing", ""))
    states = [state for _, state, _ in rows]
    counts = [f"{states.count(s)} {s}" for s in ("done", "failed", "missing")]
    shown = Table(title=f"{config.experiment}: {', '.join(counts)}")
    columns = ("point", "", "why") if "failed" in states else ("point", "")
    for name in columns:
        shown.add_column(name, overflow="fold")
    for row in rows:
        shown.add_row(*map(escape, row[: len(columns)]))
    return shown


def over_seeds(rows: list[dict], every: Iterable[Any] = (), axes=AXES) -> list[dict]:
    """The seeds of each point as one: for every number its mean and 95 % interval.

    Args: every, the points that should have a row: where all seeds of one failed,
      there are its values, and 0 seeds; axes, what a point has besides its seed.
    """
    groups: dict[tuple, list[dict]] = {_values(p.values, axes): [] for p in every}
    for row in rows:
        groups.setdefault(_values(row, axes), []).append(row)
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


def _values(row, axes=(*AXES, "seed")) -> tuple:
    """The values of a row or point: what tells it from the others."""
    known = {axis: np.asarray(row[axis]) for axis in axes if axis in row}
    # Of several values, such as classes, their text.
    return tuple((k, str(row[k]) if a.ndim else a.item()) for k, a in known.items())


def _path(workdir, config, point) -> Path:
    """Where a point is kept."""
    path = _folder(workdir, config) / f"{point.name}.npz"
    # As it was named before the names of two points could not be one.
    former = path.with_name(f"{listed(point.values).replace('/', '_')}.npz")
    if former != path and not path.exists():
        known = record.read_npz(former)
        if known is not None and _values(known) == _values(point.values):
            return former
    return path


def _folder(workdir, config) -> Path:
    """Of the points; its name stands for all that is no axis."""
    rest = setup.to_json(config)
    for group in ("sweep", "emm", "run"):
        rest.pop(group, None)
    rest |= setup.looks(config)
    text = json.dumps(rest, sort_keys=True)
    tag = hashlib.sha256(text.encode()).hexdigest()[:12]
    return Path(workdir) / "points" / tag


def _why(path) -> Path:
    return path.with_suffix(".failed.json")


def short(error) -> str:
    """The first line of what an error says."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:LONG]
