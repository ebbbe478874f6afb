"""What a field of a config is: its type, default, rule, role and line of help.

A rule that needs a table of another room, such as PROCESSES, names the table and reads
it when it is used: a command line is read before jax is imported.
"""

import importlib
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

# Roles: what a change of a field means in a workdir that holds a run.
TRAINING = "training"  # another trained network: a conflict
GROWS = "may grow"  # the same, but a longer run goes on
RESULT = "result"  # another result, of the same network: a conflict
AFTER = "after training"  # a result that is made again from the same network
POINTS = "points"  # other points of a sweep, each kept by its own values
RUN = "run only"  # no number changes
ROLES = {
    TRAINING: "identifies a trained network; a workdir refuses another value",
    GROWS: "as training, but a larger value continues the run",
    RESULT: "identifies the result; a workdir refuses another value",
    AFTER: "is applied after training: the network stays, its results are made again",
    POINTS: "says which points a sweep has; each is kept by its own values",
    RUN: "changes no result",
}

# Marks, for the rules that end training early by measurements along the way.
STOPS = "stops"  # such a rule
NEWER = "newer"  # folders that an earlier version named know nothing of it: see `tags`
NEWEST = "newest"  # the same of the version after that
WATCHED = "watched"  # decides what the rule sees, and so counts as training under one

KINDS: dict[type, tuple[tuple, str]] = {  # type -> what a field of it takes, in words
    bool: ((bool,), "True or False"),
    int: ((numbers.Integral,), "an integer"),
    float: ((numbers.Real,), "a number"),
    str: ((str,), "a word"),
    tuple: ((tuple, list), "several values, in brackets"),
}


class Rule(NamedTuple):
    """A condition that values must satisfy; `words` completes "must be ..."."""

    words: str
    holds: Callable[[Any], bool] = lambda value: True
    table: str = ""  # "module:NAME" of the names that are known

    def text(self) -> str:
        """The words, with the names of the table."""
        return self.words + ", ".join(read_table(self.table) if self.table else ())

    def accepts(self, value) -> bool:
        """Whether a value satisfies the rule."""
        try:
            return self.holds(value)
        except TypeError:  # one of several values has another type
            return False


class Field(NamedTuple):
    """One field of a config."""

    kind: type
    default: Any
    help: str
    rule: Rule | None = None
    role: str = ""  # empty: that of its group
    mark: str = ""
    of: tuple[str, ...] = ()  # names of the group that take it; empty: all

    def is_kind(self, value) -> bool:
        """Whether a value has the field's type; None where that is the default."""
        if value is None:
            return self.default is None
        fits = isinstance(value, KINDS[self.kind][0])
        # True is an integer and a number for Python, and a slip in a config.
        return fits and isinstance(value, bool) == (self.kind is bool)


class Group(NamedTuple):
    """Fields that belong together.

    A named group is a `name` and the arguments of the constructor behind that name,
    which is the last word on what it takes.
    """

    help: str
    role: str
    fields: dict[str, Field]
    named: bool


def field(default, help, rule=None, **more) -> Field:
    """A field with a default."""
    return Field(type(default), default, help, rule, **more)


def unset(kind, help, rule=None, **more) -> Field:
    """A field that is None unless it is given."""
    return Field(kind, None, help, rule, **more)


def choice(default, table, help) -> Field:
    """The name of a constructor in a table, or MODULE:FUNCTION of the user's own."""
    return Field(str, default, help, Rule("one of ", table=table))


def group(help, role, /, **fields) -> Group:
    """A group whose fields are all declared here."""
    return Group(help, role, fields, named=False)


def named(help, role, /, **fields) -> Group:
    """A group with a constructor."""
    return Group(help, role, fields, named=True)


def one_of(*words: str) -> Rule:
    """One of some words."""
    return Rule(f"one of {', '.join(words)}", lambda value: value in words)


def listed(table: str) -> Rule:
    """One of the names in a table."""
    return Rule("one of ", lambda value: value in read_table(table), table)


def at_least(low, of="") -> Rule:
    """`low` or more; `of` says of what."""
    return Rule(f"at least {low}{of and f' {of}'}", lambda value: value >= low)


def within(low: int, high: int) -> Rule:
    """low .. high, both included."""
    return Rule(f"in {low} .. {high:,}", lambda value: low <= value <= high)


def positive(note="") -> Rule:
    """Above 0."""
    return Rule(f"positive{note and f': {note}'}", lambda value: value > 0)


def share(note="") -> Rule:
    """In [0, 1)."""
    return Rule(f"in [0, 1){note and f': {note}'}", lambda value: 0 <= value < 1)


def inside(note) -> Rule:
    """In (0, 1)."""
    return Rule(f"in (0, 1){note}", lambda value: 0 < value < 1)


def integers(words: str, low=1) -> Rule:
    """Several integers of 32 bits, none below `low`."""
    # `type`, as True is an instance of int too.
    return Rule(
        words,
        lambda some: all(type(one) is int and low <= one < 2**31 for one in some),
    )


def each(words: str, holds) -> Rule:
    """Several values, each of which satisfies a condition."""
    return Rule(words, lambda some: all(holds(one) for one in some))


def read_table(table: str):
    """The table at "module:NAME"."""
    module, _, attribute = table.partition(":")
    return getattr(importlib.import_module(module), attribute)
