"""A sweep file becomes points, each the config of a run of its own.

It has a CONFIG, as --config takes it, FIELDS that all points share, where there are
any, and a function points() that yields dicts of what differs: a value for a field, a
list or range for a grid over it, and "seeds" for their number.
"""

import itertools
import json
import runpy
from collections.abc import Iterator

from memsep_jax.checkpoint import ConflictError
from memsep_jax.experiments.config import build, grid
from memsep_jax.experiments.config.command import UsageError, load
from memsep_jax.experiments.config.grid import Point


def read(file) -> list[Point]:
    """All points of a sweep file.   Raises: UsageError with what is wrong in it."""
    names = _names(file)
    try:
        base = load(names["CONFIG"])
        grid.override(base, names.get("FIELDS", {}))
        every = [one for given in names["points"]() for one in _grid(given)]
    except (UsageError, AttributeError, TypeError, ValueError) as error:
        raise UsageError(f"{file}: {error}") from error
    made: list[Point] = []
    known: dict[str, str] = {}
    for values in every:
        point = _point(file, base, values)
        text = json.dumps(build.to_json(point.config), sort_keys=True)
        name = grid.listed(values)
        if text in known:
            raise UsageError(
                f"{file}: the points {known[text]} and {name} are one: they give the "
                "same config. Leave one out"
            )
        known[text] = name
        made.append(point)
    if not made:
        raise UsageError(f"{file}: points() yields nothing: give at least one dict")
    return made


def _names(file):
    """The names that the file defines."""
    try:
        names = runpy.run_path(str(file))
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}") from error
    except Exception as error:  # whatever a person's file raises
        raise UsageError(f"{file}: {type(error).__name__}: {error}") from error
    if missing := {"CONFIG", "points"} - names.keys():
        raise UsageError(
            f"{file} defines no {' and no '.join(sorted(missing))}: give CONFIG = "
            '"configs/digits.py" and a points() that yields dicts of fields'
        )
    return names


def _point(file, base, values) -> Point:
    name = grid.listed(values)
    try:
        config = grid.seeded(base, values.get("seed", 0))
        grid.override(config, {k: v for k, v in values.items() if k != "seed"})
        build.check(config)
    except build.ConfigError as error:
        raise UsageError(f"{file}: point {name}: {error}") from error
    # With "=" in a value, one field could read as two: the name then ends in a hash.
    unsure = "=" in "".join(map(str, values.values()))
    known_by = grid.file_name(name or "all", repr(values) if unsure else None)
    return Point(known_by, values, config)


def _grid(given: dict) -> Iterator[dict]:
    """{"a": [1, 2], "b": 3, "seeds": 2} -> {"a": 1, "b": 3, "seed": 0}, ..."""
    if not isinstance(given, dict):
        raise TypeError(f"points() yields {given!r}: each must be a dict of fields")
    given = dict(given)
    seeds = given.pop("seeds", None)
    if seeds is not None:
        if not isinstance(seeds, int) or seeds < 1 or "seed" in given:
            raise ValueError(
                f"seeds={seeds!r} must be a number of seeds, at least 1, instead of "
                'a "seed"'
            )
        given["seed"] = range(seeds)
    # A tuple is one value, such as that of data.classes.
    axes = [v if isinstance(v, (list, range)) else [v] for v in given.values()]
    for choice in itertools.product(*axes):
        yield dict(zip(given, choice, strict=True))


def check(file, points: list[Point], studies) -> None:
    """Builds each config, once for all its seeds, as its run will.

    Args: studies, the experiments that have a sweep of their own.
    Raises: UsageError, before anything is written.
    """
    built = set()
    for point in points:
        key = tuple((k, str(v)) for k, v in point.values.items() if k != "seed")
        if key in built:
            continue
        built.add(key)
        try:
            if point.config.experiment == "train":
                build.build(point.config)
            elif point.config.experiment in studies and "model" in point.config:
                grid.check(point.config)
        except (ConflictError, ValueError) as error:
            raise UsageError(f"{file}: point {point.name}: {error}") from error
