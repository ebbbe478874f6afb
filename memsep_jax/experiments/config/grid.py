"""A config and its sweep become points, each with a config and a seed of its own.

`config.sweep` names the axes; a point is one value of each, and a seed. The axis of
`sweep.points` has dicts of any fields, {"model.dropout": 0.2}; {} changes none. Names,
tables and files show such a dict as its text, "model.dropout=0.2".
"""

import ast
import hashlib
import itertools
import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from memsep_jax.experiments.config import build, schema
from memsep_jax.experiments.config.fields import KINDS

AXES = {  # axis of config.sweep -> the field of the config that it varies
    "num_examples": ("data", "num_examples"),
    "d": ("data", "d"),
    "width": ("model", "width"),
    "depth": ("model", "depth"),
    "weight_decay": ("optimizer", "weight_decay"),
    "setting": None,  # the text of one of sweep.points
}
LABELS = {axis: axis.replace("_", " ") for axis in AXES} | {"num_examples": "n"}
# Axes that change the shape of a network; a setting may change anything.
SHAPE = ("d", "width", "depth", "setting")
LONG_NAME = 150  # characters of a point's name: file systems take 255


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


def axes(config) -> dict[str, tuple]:
    """The axes that have values; those of the axis `setting` are sweep.points.

    Strings in sweep.setting, the form of an earlier version, take their place, and stay
    as they are.
    """
    sweep = config.sweep
    plain = {axis: tuple(sweep[axis]) for axis in AXES if AXES[axis] and sweep[axis]}
    given = tuple(sweep.get("setting") or sweep.get("points", ()))
    return plain | ({"setting": given} if given else {})


def narrowed(config, values: dict[str, Any]):
    """The config with one value on each of its axes; an axis without a value has none.

    Args: values, some of `axes`.
    """
    one = config.copy_and_resolve_references()
    one.sweep.update({axis: () for axis in AXES if axis in one.sweep}, points=())
    for axis, value in values.items():
        name = "points" if isinstance(value, dict) else axis
        one.sweep[name] = (value,)
    return one


def points(config) -> list[Point]:
    """All points of config.sweep, the seeds of each side by side.

    A seed moves the truth, the draws, the initial weights and the batches alike.
    """
    known = axes(config)
    made = []
    for choice in itertools.product(*known.values(), range(config.sweep.seeds)):
        values = dict(zip([*known, "seed"], choice, strict=True))
        one = seeded(config, values["seed"])
        for axis, value in values.items():
            if place := AXES.get(axis):
                one[place[0]][place[1]] = value
        if "setting" in values:
            _apply(one, values["setting"])
            values["setting"] = text_of(values["setting"])
        made.append(Point(file_name(listed(values)), values, one))
    return made


def listed(values: dict) -> str:
    """ "num_examples=100,width=64,seed=0"."""
    return ",".join(f"{name}={value}" for name, value in values.items())


def file_name(name: str, whole: str | None = None) -> str:
    """The name of a point's file, which no other point has.

    Where it is cut, or a character is replaced, it ends in a hash of itself.

    Args: whole, to be hashed in any case, where another point could have the same name.
    """
    safe = re.sub(r"[/\0]", "_", name)
    if whole is None and safe == name and len(name) <= LONG_NAME:
        return name
    digest = hashlib.sha256((whole or name).encode()).hexdigest()[:8]
    return f"{safe[:LONG_NAME]}-{digest}"


def former_paths(path, values: dict) -> Iterator:
    """Where else a point may be kept: under names that it had in earlier versions.

    Args: path, its place today; values, those of the point.
    Yields: candidates, of which `same` says whether they hold the point.
    """
    # An earlier version gave this name, which two points could share.
    former = path.with_name(f"{listed(values).replace('/', '_')}.npz")
    if former != path:
        yield former
    if not values.get("setting"):
        return
    # Settings were once texts, written by hand: 1e-5 and 0.00001 are one value.
    before, _, _ = listed(values).partition("setting=")
    for other in path.parent.glob(f"{before}setting=?*=*.npz"):
        whole = re.fullmatch(r".*?setting=(.*),seed=(\d+)", other.stem)
        if other != path and (
            re.search(r"-[0-9a-f]{8}$", other.stem)  # cut: its name does not say it
            or (whole and same({"setting": whole[1], "seed": int(whole[2])}, {
                name: values[name] for name in ("setting", "seed")
            }))
        ):  # fmt: skip
            yield other


def same(row: dict, values: dict) -> bool:
    """Whether a row is of the point that has these values, however they are written."""
    a, b = dict(values_of(row)), dict(values_of(values))
    for known in (a, b):
        if "setting" in known:
            known["setting"] = fields_of(known["setting"])
    return a == b


def seeded(config, seed: int):
    """The config of a seed of the sweep, before any axis is set."""
    one = config.copy_and_resolve_references()
    one.seed = config.seed + seed
    # A network from elsewhere was trained on its own data: another seed of them would
    # measure its copies against points that it never saw.
    if not config.prune.source:
        one.data.seed = config.data.seed + seed
        one.data.truth_seed = (config.data.truth_seed or 0) + seed
        # Only a mixture reads it. It moves for all data, since the names of results
        # that are kept depend on it.
        schema.excuse(one, ["data.truth_seed"])
    return one


def text_of(fields) -> str:
    """{"a.b": 1, "c.d": 2} -> "a.b=1; c.d=2", as names and tables show a point."""
    if isinstance(fields, str):  # the form of an earlier version, as it is written
        return fields
    values = fields_of(fields)
    return "; ".join(f"{name}={_word(value)}" for name, value in values.items())


def _word(value) -> str:
    plain = str(value)
    if isinstance(value, str) and (
        ";" in value or value != value.strip() or _value(value) != value
    ):
        return repr(value)  # "1" is no number
    return plain


def parse(text: str) -> dict[str, str]:
    """ "a.b=1; c.d=2" -> {"a.b": "1", "c.d": "2"}: what `text_of` says."""
    parts = (part.partition("=") for part in text.split(";") if part.strip())
    return {name.strip(): value.strip() for name, _, value in parts}


def fields_of(given) -> dict[str, Any]:
    """The fields and values of a point, given as a dict or as its text."""
    if isinstance(given, str):
        return {name: _value(word) for name, word in parse(given).items()}
    return {name: _tuples(value) for name, value in given.items()}


def _value(word):
    try:
        return ast.literal_eval(word)
    except (ValueError, SyntaxError):
        return word  # a name


def _tuples(value):
    """JSON knows no tuples, and a config no lists."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def modernize(values: dict) -> dict:
    """The values of a config.json whose points stand in sweep.setting, as of today."""
    sweep = values.get("sweep", {})
    texts = sweep.get("setting", ()) if isinstance(sweep, dict) else ()
    if texts and all(isinstance(text, str) for text in texts):
        made = json.loads(json.dumps(list(map(fields_of, texts)), default=str))
        sweep.update(points=made, setting=[])
    return values


def outdated(config) -> str | None:
    """The warning to a config that has strings for points, or None."""
    texts = config.get("sweep", {}).get("setting", ())
    if not texts:
        return None
    example = next((fields for fields in map(fields_of, texts) if fields), {})
    return (
        "warning: sweep.setting is read for one more version: give dicts, such as "
        f"sweep.points=({{}}, {example})"
    )


def _apply(config, given):
    """Sets the fields of a point.   Raises: build.ConfigError."""
    try:
        override(config, fields_of(given))
    except build.ConfigError as error:
        name = "setting" if isinstance(given, str) else "points"
        form = (
            '"group.field=value; group.field=value"'
            if isinstance(given, str)
            else '{"group.field": value}'
        )
        raise build.ConfigError(
            f"sweep.{name}={given!r}: {error}; write it as {form}"
        ) from error


def override(config, values: dict[str, Any]) -> None:
    """Sets {"group.field": value}.   Raises: build.ConfigError."""
    for name, value in values.items():
        *groups, field = name.split(".")
        place = config
        for group in groups:
            place = place.get(group, {}) if hasattr(place, "get") else {}
        if field not in place:
            raise build.ConfigError(
                f"{name} is not a field of the config"
                f"{build.did_you_mean(name, dict(schema.values(config)))}"
            )
        try:
            place[field] = value
        except TypeError as error:
            known = schema.train_fields().get(name)
            rule = f"{value!r} must be {KINDS[known.kind][1]}" if known else error
            raise build.ConfigError(f"{name}={rule}") from error
    schema.leave_over(config, values)


def check(config, also=lambda config, parts: None) -> build.Parts:
    """Builds the points of the first seed, before anything is compiled or written.

    Args: also, (config, parts) -> None, what else is checked of each of them.
    Returns: the parts of the first point.   Raises: build.ConfigError.
    """
    if not axes(config):
        raise build.ConfigError(
            "sweep: no axis has a value: give one, such as "
            "--config.sweep.num_examples='(100,)', of "
            + ", ".join([*(axis for axis in AXES if AXES[axis]), "points"])
        )
    # The seeds of a point differ in their draws alone, so one of them is checked.
    first, *others = (p for p in points(config) if p.values["seed"] == 0)
    parts = build.build(first.config)
    also(first.config, parts)
    for point in others:
        also(point.config, build.build(point.config))
    return parts


def values_of(row, axes=(*AXES, "seed")) -> tuple:
    """The values of a row or point: what tells it from the others."""
    known = {axis: np.asarray(row[axis]) for axis in axes if axis in row}
    # Several values, such as classes, are known by their text.
    return tuple((k, str(row[k]) if a.ndim else a.item()) for k, a in known.items())
