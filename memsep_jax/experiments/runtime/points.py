"""A grid of points: each is done once, by whichever process takes it first, and kept.

`config.sweep` names the axes; a point is one value of each, and a seed. A finished
point is kept as points/<tag>/<name>.npz, where the tag stands for the rest of the
config, and is read instead of done again. One that fails ends no other: why it failed
is kept as <name>.failed.json beside them, and the same command tries it again.

While a process works on a point it holds the lock <name>.claim, so that several
processes, on several machines with one file system, share a sweep: each takes what
nobody has. The lock of a process that was killed is free.
"""

import contextlib
import time
import traceback
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.markup import escape
from rich.table import Table

from memsep_jax import defaults
from memsep_jax.checkpoint import ConflictError
from memsep_jax.experiments import record
from memsep_jax.experiments.config import build, fields, grid, schema
from memsep_jax.experiments.runtime import locks

# Exit codes of errors that no single point causes: a person must change something, or
# the disk is full. All other points would fail alike.
ENDS_ALL = (2, 5)
LISTED, LONG = 10, 400  # failed points in a message, characters of each
STATES = ("done", "failed", "running", "stopped", "waiting")


class FailedError(RuntimeError):
    """Some points failed; all others are finished and kept."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


# Points that several processes share.


def why(path) -> Path:
    """The file that says why a point failed."""
    return _beside(path, ".failed.json")


def claim(path) -> Path:
    """The lock of whoever works on a point."""
    return _beside(path, ".claim")


def _beside(path, suffix):
    return path.with_name(path.name.removesuffix(".npz") + suffix)


def state(path, done: bool, begun: bool = False) -> str:
    """One of STATES.

    Args: path, of the point; done, whether its result is there; begun, whether there is
      something to go on with.
    """
    if done:
        return "done"
    if locks.gone(claim(path)) is None:
        return "running"
    if why(path).exists():
        return "failed"
    return "stopped" if begun or claim(path).exists() else "waiting"


def taken(
    some: Iterable, path: Callable, is_open: Callable, most: int = 1
) -> Generator[list]:
    """Takes the open points that nobody else has, at most `most` together.

    Args: path, point -> Path; is_open, point -> bool, whether it is still to be done.
    Yields: lists of points, which are this process's own until the next one.
    """
    left = list(some)
    while left:
        with contextlib.ExitStack() as claims:
            own: list = []
            while left and len(own) < most:
                point = left.pop(0)
                if is_open(point):
                    mine = claims.enter_context(_claimed(path(point)))
                    # Again: another process may have done it before the claim.
                    own += [point] if mine and is_open(point) else []
            if own:
                yield own


@contextlib.contextmanager
def _claimed(path):
    """Whether this process has a point; inside the block, nobody else takes it."""
    try:
        handle = locks.take(claim(path))
    except ConflictError:
        yield False
        return
    try:
        yield True
    finally:
        locks.release(handle, claim(path))


# The points of one config, whose results are arrays.


def run(
    config,
    session,
    work: Callable[[list[grid.Point]], Iterable[dict | Exception]],
    alike: Callable[[grid.Point], Any] = lambda point: point.name,
    what: str = "points",
) -> list[dict]:
    """The results of all points, in their order; finished ones are not done again.

    It waits for points that other processes work on.

    Args:
      work: some points -> for each a dict of numbers and arrays, or the error that it
        alone failed with.
      alike: points of equal value are worked on together, up to sweep.together.
    Returns:
      For each point that did not fail its values together with its results, as arrays.
    Raises:
      FailedError where all failed; else `finish` does, when the others are shown.
    """
    every, said = grid.points(config), False
    with session.progress(what, len(every)) as update:
        sweep = _Sweep(config, session, every, update)
        while left := [point for point in every if sweep.is_open(point)]:
            groups: dict[Any, list[grid.Point]] = {}
            for point in left:
                groups.setdefault(alike(point), []).append(point)
            # A list: all groups are tried before the next look at what is left.
            if any([sweep.did(group, work) for group in groups.values()]):
                continue
            if not said:
                session.say(f"waiting: other processes are at {len(left)} {what}")
            said = True
            time.sleep(locks.POLL)
    if not sweep.results:
        raise failure([sweep.path(point) for point in every], len(every))
    return [sweep.results[p.name] for p in every if p.name in sweep.results]


class _Sweep:
    """The state of the points of a config while this process is at work."""

    def __init__(self, config, session, every, update):
        self.results: dict[str, dict] = {}
        self._failed: set[str] = set()
        self._together, self._session = config.sweep.together, session
        self._update = update
        self._paths = {p.name: path_of(session.workdir, config, p) for p in every}
        # What failed in a run before this one is tried again.
        self._before = {p.name: _written(why(self.path(p))) for p in every}

    def path(self, point) -> Path:
        return self._paths[point.name]

    def is_open(self, point) -> bool:
        """Whether a point is still to be done; reads it where it is there."""
        if point.name in self.results or point.name in self._failed:
            return False
        path = self.path(point)
        if (known := record.read_npz(path)) is not None:
            self._keep(point, known)
        elif _written(why(path)) not in (None, self._before[point.name]):
            self._fail(point)  # to another process, just now
        else:
            return True
        return False

    def did(self, group, work) -> bool:
        """Works on those of a group that nobody else has; whether there were any."""
        batches = taken(group, self.path, self.is_open, self._together)
        some = False
        # Closed when an error ends this: else the claims wait for the collector.
        with contextlib.closing(batches):
            for own in batches:
                some = True
                for point, result in _results(work, own, self._session):
                    if isinstance(result, Exception):
                        _note(self.path(point), result, self._session)
                        self._fail(point)
                    else:
                        arrays = _arrays(point.values) | result
                        # The result first: a kill after it leaves a finished point.
                        record.write_npz(self.path(point), **arrays)
                        why(self.path(point)).unlink(missing_ok=True)
                        self._keep(point, arrays)
        return some

    def _keep(self, point, arrays):
        # An older file may spell a value otherwise; this config's spelling counts.
        self.results[point.name] = arrays | _arrays(point.values)
        self._count(point)

    def _fail(self, point):
        self._failed.add(point.name)
        self._count(point)

    def _count(self, point):
        self._update(len(self.results) + len(self._failed), point.name)


def _written(path) -> int | None:
    """When a file was written; None where there is none."""
    with contextlib.suppress(OSError):
        return path.stat().st_mtime_ns
    return None


def attempt(work, *args):
    """What work(*args) returns, or the error with which it failed: for this point."""
    try:
        return work(*args)
    except Exception as error:
        if getattr(error, "exit_code", None) in ENDS_ALL:
            raise
        return error


def _results(work, some, session) -> Iterator[tuple[grid.Point, dict | Exception]]:
    """Each of some points with its arrays, or with the error that it failed with.

    Where an error ends the work on several points, nobody knows which of them caused
    it: those that are left are done one by one.
    """
    left = list(some)
    try:
        for _, result in zip(some, work(some), strict=True):
            if not isinstance(result, Exception):
                # An error of the device shows here, and not when arrays are fetched.
                result = _arrays(jax.block_until_ready(result))
            yield left.pop(0), result
    except Exception as error:
        # With none left the error is that of zip: more results than points came.
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
    """Writes and says why a point failed."""
    record.write_json(why(path), explained(error))
    session.say(f"warning: {path.stem} failed: {short(error)}")


def explained(error) -> dict:
    """What the file of a point that failed says of its error."""
    return {
        "error": f"{type(error).__name__}: {error}",
        "exit_code": getattr(error, "exit_code", 1),
        "traceback": "".join(traceback.format_exception(error)),
    }


def failure(failed: list[Path], total: int) -> FailedError:
    """The error that a sweep ends with.

    Args: failed, the paths at which the results of these points would be.
    """
    known = [record.read_json(why(path)) or {} for path in failed]
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


def status(workdir) -> Table | None:
    """Which points of the sweep in a workdir are done, failed or missing, at any time.

    Returns: None where no sweep has a point yet.
    """
    values = record.read_json(Path(workdir) / "config.json") or {}
    if "sweep" not in values or not (Path(workdir) / "points").is_dir():
        return None
    config = defaults.restored(values)
    paths = [path_of(workdir, config, point) for point in grid.points(config)]
    if config.experiment == "emm":  # which chooses its sizes as it goes
        folder = _folder(workdir, config)
        # Without hidden names: those of `record.replacing` are not whole.
        names = {_name(path) for path in folder.glob("[!.]*")}
        paths = [folder / f"{name}.npz" for name in sorted(names)]
    rows = []
    for path in paths:
        known = state(path, path.is_file())
        shown = "missing" if known in ("stopped", "waiting") else known
        reason = (record.read_json(why(path)) or {}) if known == "failed" else {}
        about = reason.get("error", "").partition("\n")[0][:100]
        rows.append((path.stem, shown, about))
    counts = Counter(known for _, known, _ in rows)
    words = ("done", "failed", "missing", *(["running"] if counts["running"] else []))
    title = ", ".join(f"{counts[word]} {word}" for word in words)
    if config.experiment != "emm":
        spent = (record.read_json(Path(workdir) / "run.json") or {}).get("seconds", {})
        title += left(sum(spent.values()), counts["done"], len(paths) - counts["done"])
    columns = ("point", "", "why")[: 3 if counts["failed"] else 2]
    return table(f"{config.experiment}: {title}", columns, rows)


def left(seconds: float, done: int, others: int, workers: int = 1) -> str:
    """When other points will be done, if they take as long as those that are.

    Args: seconds that the points took so far, without pauses; how many are done, how
      many others there are, and how many processes work on these.
    Returns: ", about 12 minutes left"; nothing where none is done, or none left.
    """
    if not (seconds and done and others):
        return ""
    minutes = max(1, round(seconds / done * others / max(1, workers) / 60))
    about = f"{minutes} minute" + "s" * (minutes > 1)
    if minutes >= 120:
        about = f"{minutes / 60:.0f} hours"
    return f", about {about} left"


def _name(path):
    name = path.name
    for suffix in (".npz", ".failed.json", ".claim"):
        name = name.removesuffix(suffix)
    return name


def table(title: str, columns, rows) -> Table:
    """Points as a table for a person; of each row as many cells as columns."""
    shown = Table(title=title)
    for name in columns:
        shown.add_column(name, overflow="fold")
    for row in rows:
        shown.add_row(*map(escape, row[: len(columns)]))
    return shown


def path_of(workdir, config, point) -> Path:
    """Where a point is kept."""
    path = _folder(workdir, config) / f"{point.name}.npz"
    if path.exists():
        return path
    for other in grid.former_paths(path, point.values):
        known = record.read_npz(other)
        if known is not None and grid.same(known, point.values):
            return other
    return path


def _folder(workdir, config) -> Path:
    """The folder of the points; its name stands for all of the config but its axes."""
    # A point is found again when an axis grows, and not when anything else changes.
    rest = build.to_json(config)
    for group in schema.groups(fields.POINTS, fields.RUN):
        rest.pop(group, None)
    rest |= build.watched(config)
    folders = [Path(workdir) / "points" / tag for tag in schema.tags(rest)]
    return next((folder for folder in folders if folder.exists()), folders[0])


def short(error) -> str:
    """The first line of what an error says."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:LONG]
