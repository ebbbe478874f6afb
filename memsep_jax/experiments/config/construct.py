"""The name of a group and its other fields become one object, a constructor's.

The signature of the constructor says what the group takes; MODULE:FUNCTION is a user's.
"""

import contextlib
import importlib
import importlib.util
import inspect
import os
import re
import site
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

from memsep_jax.data import Source
from memsep_jax.experiments.config import schema
from memsep_jax.experiments.config.schema import did_you_mean
from memsep_jax.models import own


class ConfigError(ValueError):
    """Says what a person must change in the config, all of it at once."""

    exit_code = 2


# Arguments that are no fields: flax's own two, and what the run itself knows.
NOT_CONFIGURED = {"parent", "name", "process", "num_classes"}

LAW = callable, "a function key -> t, as those of process.TIMES do"
# By group: whether an object is one of it, AttributeErrors aside; and in words. What
# networks are is in models.own.
MADE: dict[str, tuple[Callable, str]] = {
    "process": (
        lambda made: callable(made.alpha) and callable(made.sigma),
        "a process.Process(alpha, sigma) of two functions of t",
    ),
    "times": LAW,
    "prune_times": LAW,
    "prediction": (
        lambda made: all(
            map(callable, (made.skip, made.out, made.scale, made.level, made.weight))
        ),
        "a score.Prediction of five functions of t",
    ),
    "optimizer": (
        lambda made: callable(made.init) and callable(made.update),
        "an optax.GradientTransformation(init, update)",
    ),
    "data": (
        lambda made: (
            isinstance(made, Source)
            and made.images is not None
            and all(map(_is_array, made[:4]))
        ),
        "a sources.Source of numpy arrays: images, labels or None, and so on",
    ),
}


def call(table: dict, group, what: str, **given):
    """table[group.name](the other fields of the group that are not None, **given).

    A field that the constructor does not take is left out: `untaken` refuses those
    that a person gave. A user's own function also gets only what it takes of `given`,
    and a field of that name comes first.

    Raises: ValueError: an unknown name, a missing argument, and whatever the
      constructor has to say.
    """
    constructor = look_up(table, group["name"], f"{what}.name")
    fields = given_to(group, arguments(constructor))
    if is_own(group["name"]):
        given = given_to(given, parameters(constructor))
        given = {name: given[name] for name in given.keys() - fields.keys()}
    check_given(constructor, {*fields, *given}, what, group["name"])
    with naming(what, group):
        made = constructor(**fields, **given)
    if is_own(group["name"]) and what in MADE:
        check_made(made, what, group["name"])
    return made


def _is_array(x):
    return x is None or (hasattr(x, "dtype") and hasattr(x, "shape"))


def check_made(made, what: str, name: str):
    """Refuses what a user's own function returns in place of an object of its group.

    Raises: ConfigError.
    """
    fits, words = MADE[what]
    try:
        right = fits(made)
    except AttributeError:
        right = False
    if not right:
        kind = "None" if made is None else type(made).__name__
        raise ConfigError(f"{what}.name={name!r} makes {kind}: it must return {words}")


def look_up(table, name, what: str):
    """table[name], or the user's own MODULE:FUNCTION.

    Raises: ConfigError with the known names.
    """
    if is_own(name):
        found = _own(name, what)
        if what == "experiment":
            _check_study(found, name)
        return found
    if name not in table:
        raise ConfigError(
            f"{what}={name!r} is not known{did_you_mean(str(name), table)}; "
            f"choose one of {', '.join(sorted(table))}"
        )
    return table[name]


def is_own(name) -> bool:
    """Whether a name is a user's own MODULE:FUNCTION."""
    return isinstance(name, str) and ":" in name


def _own(name, what):
    """The function of a user's module, in the current directory or on the path."""
    module, _, attribute = name.partition(":")
    here = os.getcwd()
    # An installed command does not look for modules where it is called.
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        importlib.invalidate_caches()  # the file may be newer than the last look
        is_name = all(part.isidentifier() for part in module.split("."))
        spec = importlib.util.find_spec(module) if is_name else None
        if spec is None:
            raise ConfigError(
                f"{what}={name!r}: there is no {module}.py in {here} or on PYTHONPATH"
            )
        # A config.json is data, and may be anybody's: it must not reach os.system.
        if _is_installed(spec.origin):
            raise ConfigError(
                f"{what}={name!r}: {module} is an installed package; import the "
                "function in a file of your own, and name that file"
            )
        known = vars(importlib.import_module(module))
    except ConfigError:
        raise
    except Exception as error:  # whatever the user's module raises
        raise ConfigError(
            f"{what}={name!r}: {module} cannot be imported ({type(error).__name__}: "
            f"{error})"
        ) from error
    if attribute not in known:
        public = [n for n in known if not n.startswith("_")]
        raise ConfigError(
            f"{what}={name!r}: {module} has no function {attribute!r}"
            f"{did_you_mean(attribute, public)}"
        )
    if not callable(known[attribute]):
        raise ConfigError(
            f"{what}={name!r} is {type(known[attribute]).__name__}, not a function "
            "or a class"
        )
    return own.constructor(known[attribute])


def _check_study(found, name):
    """Refuses what cannot be called as a study is.   Raises: ConfigError."""
    try:
        signature = inspect.signature(found)
    except ValueError:  # some functions of C tell nothing
        return
    try:
        signature.bind("config", "session")
    except TypeError as error:
        raise ConfigError(
            f"experiment={name!r} takes {signature}: a study is a function of (config, "
            "session), and is called with these two"
        ) from error


def _is_installed(origin):
    """Whether a module belongs to python or to an installed package."""
    if origin in (None, "built-in", "frozen"):
        return True
    kept = [sysconfig.get_path(kind) for kind in ("stdlib", "purelib", "platlib")]
    kept += [*site.getsitepackages(), site.getusersitepackages()]
    return any(Path(origin).resolve().is_relative_to(Path(k).resolve()) for k in kept)


def parameters(constructor) -> set[str] | None:
    """The names of a constructor's arguments; None where it takes any."""
    known = inspect.signature(constructor).parameters
    if any(one.kind is one.VAR_KEYWORD for one in known.values()):
        return None
    return set(known)


def arguments(constructor) -> set[str] | None:
    """Those of its arguments that are fields of a config."""
    known = parameters(constructor)
    return None if known is None else known - NOT_CONFIGURED


def given_to(fields, taken: set[str] | None) -> dict:
    """The fields of a group that have a value and are taken."""
    return {
        field: value
        for field, value in fields.items()
        if field != "name" and value is not None and (taken is None or field in taken)
    }


def untaken(table: dict, group, what: str, left_over, also=frozenset()) -> list[str]:
    """A line for each field of a group that was given and that nothing reads.

    Args:
      left_over: "group.field" of the values of another choice of name.
      also: fields that are read beside the constructor's.
    """
    try:
        constructor = look_up(table, group["name"], f"{what}.name")
    except ConfigError:
        return []  # `call` says so
    taken, known, lines = arguments(constructor), schema.train_fields(), []
    if taken is None:
        return []
    for field, value in group.items():
        name = f"{what}.{field}"
        default = known[name].default if name in known else None
        # Nobody asked for a value that is the default.
        if field == "name" or field in taken | also or value in (None, default):
            continue
        if name not in left_over:
            # A field of another constructor is no slip of the keyboard.
            meant = "" if name in known else did_you_mean(field, taken | also)
            lines.append(
                f"{name} is not an argument of {group['name']}{meant}; it takes "
                f"{', '.join(sorted(taken | also)) or 'none'}"
            )
    return lines


def check_given(constructor, given, what, name):
    """Refuses missing arguments.   Raises: ValueError, which names their fields."""
    missing = [
        parameter.name
        for parameter in inspect.signature(constructor).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        and parameter.name not in given
    ]
    if missing:
        raise ValueError(
            "\n".join(f"{what}.{field} must be given for {name}" for field in missing)
        )


@contextlib.contextmanager
def naming(what: str, fields):
    """Makes errors about arguments, patch=3, errors about fields, model.patch=3.

    Args: what, the group; fields, the names of its fields.
    """
    try:
        yield
    except (ValueError, TypeError) as error:
        names = "|".join(map(re.escape, fields))
        # Not within a longer word, a path or a flag, nor where a group stands already.
        pattern = rf"(?<![\w.=/-])(?=({names})=)"
        error.args = (re.sub(pattern, f"{what}.", str(error)),)
        raise
