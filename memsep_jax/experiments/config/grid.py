"""A config and its sweep become points, each with a config and a seed of its own.

`config.sweep` names the axes; a point is one value of each, and a seed.
"""

import ast
import hashlib
import itertools
import re
from typing import Any, NamedTuple

import numpy as np

from memsep_jax.experiments.config import build, schema

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
        schema.excuse(one, ["data.truth_seed"])  # only a mixture reads it
    return one


def parse(setting: str) -> dict[str, str]:
    """ "a.b=1; c.d=2" -> {"a.b": "1", "c.d": "2"}."""
    parts = (part.partition("=") for part in setting.split(";") if part.strip())
    return {name.strip(): value.strip() for name, _, value in parts}


def _apply(config, setting):
    """Sets the fields of a setting.   Raises: build.ConfigError."""
    values: dict[str, Any] = {}
    for name, text in parse(setting).items():
        try:
            values[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            values[name] = text  # a name
    try:
        override(config, values)
    except build.ConfigError as error:
        raise build.ConfigError(
            f'sweep.setting={setting!r}: {error}; write it as "group.field=value; '
            'group.field=value"'
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
                f"{name} is not a field of the config{build.did_you_mean(field, place)}"
            )
        try:
            place[field] = value
        except TypeError as error:
            raise build.ConfigError(f"{name}: {error}") from error
    schema.leave_over(config, values)


def check(config) -> build.Parts:
    """Builds the points of the first seed, before anything is compiled or written.

    Returns: the parts of the first point.   Raises: build.ConfigError.
    """
    if not any(config.sweep[axis] for axis in AXES):
        raise build.ConfigError(
            "sweep: no axis has a value: give one, such as "
            f"--config.sweep.num_examples='(100,)', of {', '.join(AXES)}"
        )
    first, *others = (p for p in points(config) if p.values["seed"] == 0)
    parts = build.build(first.config)
    for point in others:
        build.build(point.config)
    return parts


def values_of(row, axes=(*AXES, "seed")) -> tuple:
    """The values of a row or point: what tells it from the others."""
    known = {axis: np.asarray(row[axis]) for axis in axes if axis in row}
    # Of several values, such as classes, their text.
    return tuple((k, str(row[k]) if a.ndim else a.item()) for k, a in known.items())
