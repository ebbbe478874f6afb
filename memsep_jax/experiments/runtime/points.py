"""A grid of points, each with its own config and seed: what sweeps share.

`config.sweep` names the axes; a point is one value of each, and a seed. A finished
point is kept as points/<tag>/<name>.npz, where the tag stands for the rest of the
config, and is read instead of done again. One that fails ends no other: why it failed
is kept as <name>.failed.json beside them, and the same command tries it again.
"""

import hashlib
import json
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.markup import escape
from rich.table import Table

from memsep_jax import defaults
from memsep_jax.experiments.config import build, fields, grid, schema
from memsep_jax.experiments.runtime import record

# Exit codes of errors that are of no single point: what a person must change, a disk
# that is full.
ENDS_ALL = (2, 5)
LISTED, LONG = 10, 400  # failed points in a message, characters of each


class FailedError(RuntimeError):
    """Some points failed; all others are finished and kept."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def run(
    config,
    session,
    work: Callable[[list[grid.Point]], Iterable[dict | Exception]],
    alike: Callable[[grid.Point], Any] = lambda point: point.name,
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
    todo: dict[Any, list[grid.Point]] = {}
    found: dict[str, dict] = {}
    every = grid.points(config)
    with session.progress(what, len(every)) as update:
        for point in every:
            known = record.read_npz(path_of(session.workdir, config, point))
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
                    path = path_of(session.workdir, config, point)
                    if isinstance(result, Exception):
                        _note(path, result, session)
                    else:
                        found[point.name] = _arrays(point.values) | result
                        record.write_npz(path, **found[point.name])
                        why(path).unlink(missing_ok=True)
                    count += 1
                    update(count, point.name)
    if not found:
        raise failure(
            [path_of(session.workdir, config, point) for point in every], len(every)
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


def _results(work, some, session) -> Iterator[tuple[grid.Point, dict | Exception]]:
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
    record.write_json(why(path), explained(error))
    session.say(f"warning: {path.stem} failed: {short(error)}")


def explained(error) -> dict:
    """What is kept of an error that a point failed with."""
    return {
        "error": f"{type(error).__name__}: {error}",
        "exit_code": getattr(error, "exit_code", 1),
        "traceback": "".join(traceback.format_exception(error)),
    }


def failure(failed: list[Path], total: int) -> FailedError:
    """What is raised at the end.   Args: failed, where these points would be kept."""
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
    if config.experiment == "emm":  # that chooses its sizes as it goes
        folder = _folder(workdir, config)
        files = [path.name for path in folder.glob("[!.]*")]
        names = [f.removesuffix(".npz").removesuffix(".failed.json") for f in files]
        paths = [folder / f"{name}.npz" for name in sorted(set(names))]
    rows = []
    for path in paths:
        reason = record.read_json(why(path))
        if path.is_file():
            rows.append((path.stem, "done", ""))
        elif reason is not None:
            rows.append((path.stem, "failed", reason["error"].splitlines()[0][:100]))
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


def path_of(workdir, config, point) -> Path:
    """Where a point is kept."""
    path = _folder(workdir, config) / f"{point.name}.npz"
    # As it was named before the names of two points could not be one.
    former = path.with_name(f"{grid.listed(point.values).replace('/', '_')}.npz")
    if former != path and not path.exists():
        known = record.read_npz(former)
        if known is not None and grid.values_of(known) == grid.values_of(point.values):
            return former
    return path


def _folder(workdir, config) -> Path:
    """Of the points; its name stands for all that is no axis."""
    rest = build.to_json(config)
    for group in schema.groups(fields.POINTS, fields.RUN):
        rest.pop(group, None)
    rest |= build.looks(config)
    text = json.dumps(rest, sort_keys=True)
    tag = hashlib.sha256(text.encode()).hexdigest()[:12]
    return Path(workdir) / "points" / tag


def why(path) -> Path:
    """Where it is kept why a point failed."""
    return path.with_suffix(".failed.json")


def short(error) -> str:
    """The first line of what an error says."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:LONG]
