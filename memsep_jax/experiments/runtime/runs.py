"""Points that are runs of their own, each in a workdir, by any number of workers.

The mechanism is that of `points`: a worker takes the next point that nobody has. The
claim of a worker that was killed stays, until the command is given again: what ended
one worker might end all of them.
"""

import contextlib
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import jax
from rich.table import Table

from memsep_jax.checkpoint import StorageError
from memsep_jax.experiments import record
from memsep_jax.experiments.config import build, grid
from memsep_jax.experiments.config.command import UsageError, load
from memsep_jax.experiments.config.grid import Point
from memsep_jax.experiments.runtime import locks, points
from memsep_jax.experiments.runtime.session import Session

LONG = 150  # characters of why a point failed, in a table


def place(workdir: Path, point: Point) -> Path:
    """The workdir of a point's run."""
    folder = _path(workdir, point)
    # An earlier version gave this name, which two points could share: the config tells.
    plain = re.sub(r"[/\0]", "_", grid.listed(point.values)) or "all"
    former = folder.with_name(grid.file_name(plain))
    if former != folder and not folder.exists():
        with contextlib.suppress(UsageError):
            known = load(f"{former}/config.json")
            if build.to_json(known) == build.to_json(point.config):
                return former
    return folder


def _path(workdir, point):
    return workdir / "points" / point.name


def state(workdir: Path, point: Point) -> str:
    """One of points.STATES."""
    folder = place(workdir, point)
    done = Session(folder, point.config).is_complete()
    return points.state(_path(workdir, point), done, (folder / "run.json").exists())


def counted(states) -> str:
    """ "3 done, 1 running"."""
    counts = Counter(states)
    return ", ".join(f"{counts[name]} {name}" for name in points.STATES if counts[name])


def work(workdir: Path, every: list[Point], run: Callable, say: Callable) -> None:
    """Runs the points that nobody has, one after the other, until none is left.

    Args: run, (config, workdir) of a point; say, a line to whoever reads the log.
    Raises: Interrupted, where a signal came and what was begun is saved; StorageError.
    """

    def path(point):
        return _path(workdir, point)

    def is_open(point):  # neither failed nor done
        if points.why(path(point)).exists():
            return False
        return not Session(place(workdir, point), point.config).is_complete()

    # Each once: a point that never comes to count as complete would be run for ever.
    mine: set[str] = set()
    while left := [
        point
        for point in every
        if point.name not in mine and not points.claim(path(point)).exists()
    ]:
        before = len(mine)
        with contextlib.closing(points.taken(left, path, is_open)) as batches:
            for (point,) in batches:
                mine.add(point.name)
                _try(workdir, point, run, say)
        if len(mine) == before:  # what is left is done, failed or another worker's
            return


def _try(workdir, point, run, say):
    say(f"== {point.name}")
    try:
        run(point.config, place(workdir, point))
    except StorageError:  # no single point causes it
        raise
    except Exception as error:
        say(f"failed: {points.short(error)}")
        known = points.explained(error)
        record.write_json(points.why(_path(workdir, point)), known)
    # A worker does many runs, and the programs of each would stay in memory.
    jax.clear_caches()


def clear(workdir: Path, every: list[Point], retry: bool) -> None:
    """Frees points whose worker was killed, and with `retry` those that failed."""
    for point in every:
        path = _path(workdir, point)
        if locks.gone(points.claim(path)) is not None:
            points.claim(path).unlink(missing_ok=True)
        if retry:
            points.why(path).unlink(missing_ok=True)


def status(workdir: Path, every: list[Point]) -> Table:
    """A table of all points for a person: their states, seconds and errors."""
    states = [state(workdir, point) for point in every]
    rows, spent = [], 0.0
    for point, what in zip(every, states, strict=True):
        known = record.read_json(place(workdir, point) / "run.json") or {}
        seconds = sum(known.get("seconds", {}).values())
        spent += seconds if what == "done" else 0
        reason = record.read_json(points.why(_path(workdir, point))) or {}
        about = reason.get("error", "").partition("\n")[0][:LONG]
        rows.append((point.name, what, f"{seconds:.0f}" if seconds else "", about))
    counts = Counter(states)
    done = counts["done"]
    title = counted(states) + points.left(
        spent, done, len(every) - done, counts["running"]
    )
    return points.table(title, ("point", "", "seconds", "why"), rows)
