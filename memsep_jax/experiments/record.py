"""Numbers on disk: json, metrics.jsonl, csv, npz; long work, done and kept in pieces.

Every file is written beside its name and renamed when whole, so a reader never sees
half of one. Only metrics.jsonl grows by whole lines, and its readers pass over a torn
one.
"""

import contextlib
import csv
import functools
import json
import math
import os
import re
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from memsep_jax import memory, parallel
from memsep_jax.checkpoint import StorageError

# Seconds that one call into XLA takes, by the measured rate. Python handles a signal
# only after the call has ended, and a run is to notice it within about 2 s.
CALL = 2.0
# The most FLOPs of a piece that no call divides: 10 s of a slow device. The speed of
# the device is assumed here and not measured: see `at_once`.
LEAST = {"cpu": 1e11}  # 1e10 FLOP/s, a slow core
LEAST_ELSEWHERE = 1e14  # 1e13, a slow accelerator
GIB = 2**30
# What XLA says of full memory. The text decides, as a computation that waited for
# another one reports the other's lack of memory as an INTERNAL error.
FULL = re.compile("RESOURCE_EXHAUSTED|out of memory", re.IGNORECASE)


class OutOfMemoryError(RuntimeError):
    """Memory does not suffice for the smallest piece of work."""

    exit_code = 1


@contextlib.contextmanager
def replacing(path):
    """Yields a temporary path that becomes `path` when the block ends well.

    Raises: StorageError naming the file where the disk does not take it.
    """
    path = Path(path)
    # Named for the process, as several that share a sweep may write one file at the
    # same time; hidden, as some readers list the folder.
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        # One rename on one file system: after a kill there is the old file or the new.
        os.replace(part, path)
    except OSError as error:
        raise StorageError(f"could not write {path}: {error}") from error
    finally:
        with contextlib.suppress(OSError):  # after the rename it is not there
            part.unlink()


def write_json(path, value, sort_keys=True):
    """Writes a value as JSON; NaN and infinity, which JSON lacks, become null."""
    text = json.dumps(_plain(value), indent=2, sort_keys=sort_keys) + "\n"
    with replacing(path) as part:
        part.write_text(text)


def read_json(path):
    """The value of a JSON file, or None where there is no whole one."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError):
        return None


def write_npz(path, **arrays):
    """Writes arrays without pickle."""
    # An open file, as np.savez adds .npz to a path that does not end in it.
    with replacing(path) as part, open(part, "wb") as file:
        np.savez(file, **arrays)


def read_npz(path):
    """The arrays of an npz as a dict, or None where there is no whole one."""
    try:
        # Opened here: np.load leaves the file of a damaged .npz open.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except Exception:  # numpy, zipfile and zlib each fail in their own way
        return None  # a damaged file counts as missing, so that `kept` makes it again


def write_bytes(path, content: bytes):
    """Writes a file whole."""
    with replacing(path) as part:
        part.write_bytes(content)


def write_csv(path, columns: dict):
    """Writes columns of one length."""
    # The name of a file need not be valid text: bytes that are not become escapes.
    with (
        replacing(path) as part,
        open(
            part, "w", newline="", encoding="utf-8", errors="backslashreplace"
        ) as file,
    ):
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


def read_csv(path):
    """Columns by name, as numbers or words; None where the file cannot be read."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            names, *rows = csv.reader(file)
        columns = zip(*rows, strict=True) if rows else [()] * len(names)
        return {k: _column(k, c) for k, c in zip(names, columns, strict=True)}
    except (OSError, ValueError):
        return None


def _column(name, words):
    kinds = () if name.endswith("file") else (int, float)  # a file may be called "007"
    for kind in kinds:
        with contextlib.suppress(ValueError, OverflowError):
            return np.array(words, kind)
    return np.array(words, str)


UNFINISHED = "unfinished"  # the key that marks a row whose step is not measured yet


class Metrics:
    """metrics.jsonl: one row for each logged step, once, through any restarts.

    `unfinished` is the known part of the last row, where a run was stopped before all
    of it was measured; a whole row of that step takes its place.
    """

    def __init__(self, path, step: int):
        """Keeps the rows up to `step`: later ones, and a torn last one, are redone."""
        self.path = Path(path)
        rows = [row for row in _rows(path) if row["step"] <= step]
        self.steps = {row["step"] for row in rows if UNFINISHED not in row}
        # Before any row is added, which a torn last line would swallow.
        self._keep(rows)
        last = rows[-1] if rows and UNFINISHED in rows[-1] else {}
        self.unfinished = {k: v for k, v in last.items() if k != UNFINISHED}

    def _keep(self, rows):
        with replacing(self.path) as part:
            part.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write_unfinished(self, **row):
        """Appends the known part of a row that `write` is to finish."""
        self.write(**row, **{UNFINISHED: True})
        self.unfinished = _plain(row)

    def write(self, **row):
        """Appends a row, on disk before this returns."""
        if row["step"] == self.unfinished.get("step"):
            # In one rename, so that a kill leaves the unfinished row or the whole one.
            self._keep([*read_metrics(self.path), _plain(row)])
            self.unfinished = {}
            return
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(_plain(row)) + "\n")
        except OSError as error:
            raise StorageError(f"could not write {self.path}: {error}") from error


def read_metrics(path) -> list[dict]:
    """All whole rows of metrics.jsonl."""
    return [row for row in _rows(path) if UNFINISHED not in row]


def _rows(path):
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return []
    rows = []
    for line in lines:
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
    return rows


def read_points(workdir, metrics) -> list[dict]:
    """The points of a sweep that metrics.json lists, as `points.run` kept them."""
    every = (read_npz(Path(workdir) / name) for name in metrics["points"])
    return [arrays for arrays in every if arrays is not None]


def kept(path, work) -> dict:
    """The arrays of work(), a dict: read from a file that has them, else written there.

    An interrupted run therefore goes on where it stopped.
    """
    arrays = read_npz(path)
    if arrays is None:
        memory.give_back()  # what the last piece freed makes room for this one
        # np.asarray of a computation that failed later would end the process.
        done = jax.block_until_ready(work())
        arrays = {name: np.asarray(value) for name, value in done.items()}
        write_npz(path, **arrays)
    return arrays


def in_chunks(directory, work, total: int, chunk: int, session, what: str) -> dict:
    """work(start, stop) -> dict of arrays, over range(total), each chunk `kept`.

    Where memory ends, a chunk is done in halves, and kept as one all the same.

    Returns: the dict of concatenated arrays.   Raises: OutOfMemoryError.
    """
    directory, whole = Path(directory), {}
    work = halving(work, session.say)
    with session.progress(what, total) as update:
        for start in range(0, total, chunk):
            stop = min(start + chunk, total)
            # Named by its range: no chunk of another size is taken for it.
            path = directory / f"{start:08d}-{stop:08d}.npz"
            for name, part in kept(path, functools.partial(work, start, stop)).items():
                if not start:  # in place, as joining a list takes twice the memory
                    whole[name] = np.empty((total, *part.shape[1:]), part.dtype)
                whole[name][start:stop] = part
            update(stop)
    return whole


def halving(work, say, most: float = math.inf, least: int = 1):
    """work(..., start, stop) -> arrays of a range, for ranges of any length.

    Args: say, a line to the person where memory ends; most, the size of a piece, which
      is halved for good each time, since every later piece would fail alike; least,
      the size that is not halved any more.
    Raises: OutOfMemoryError with the size that did not fit.
    """

    def halved(*args):
        nonlocal most
        *others, start, stop = args
        parts = []
        while start < stop:
            size = min(stop - start, most)
            try:
                # Waited for here: a computation reports full memory when it is run,
                # and not when it is dispatched.
                parts.append(jax.block_until_ready(work(*others, start, start + size)))
                start += size
                continue
            except (MemoryError, jax.errors.JaxRuntimeError) as error:
                if not (isinstance(error, MemoryError) or FULL.search(str(error))):
                    raise
                why = (str(error) or "MemoryError").splitlines()[0].rstrip(".")
                if size <= least:
                    raise OutOfMemoryError(
                        f"{why}, for {size} at once: below run.chunk={size} nothing "
                        "gets smaller. Take a smaller model, fewer or smaller points, "
                        "or a machine with more memory"
                    ) from error
            # Out of the handler: the error holds on to the memory of what failed.
            most = -(-size // 2)
            say(f"{why}, for {size} at once; from here on as with run.chunk={most}")
        return _joined(parts)

    return halved


def at_once(flops: float, most: int) -> int:
    """The size of a batch of items with these FLOPs each: most, its half, its quarter.

    A batch takes 10 seconds at most on a slow device of its kind, or is a single item.
    The size does not depend on measured speed: a batch of another size may round
    otherwise, and a run that is stopped and goes on, in a busier hour, must come to the
    same bits.
    """
    limit = LEAST.get(jax.default_backend(), LEAST_ELSEWHERE)
    while most > 1 and most * flops > limit:
        most = -(-most // 2)
    return most


def paced(advance, pause=lambda: None):
    """(state, total, *args) -> the state after all of range(total).

    A call does what takes CALL seconds at the rate of the call before it.

    Args:
      advance: (state, *args, first, last) -> state, one program for every first and
        last: then no bit depends on the rate.
      pause: called between the calls; it may raise.
    """
    most = 1  # no rate is known yet, and a long first call could not be interrupted

    def run(state, total, *args):
        nonlocal most
        first = 0
        while first < total:
            pause()
            last, began = min(first + most, total), time.monotonic()
            state = jax.block_until_ready(advance(state, *args, first, last))
            # The first call compiles too, so its rate is too low: the second is short.
            seconds = max(time.monotonic() - began, 1e-6)
            most = max(1, int((last - first) * CALL / seconds))
            first = last
        return state

    return run


def mapped(one, most: int, pause=lambda: None):
    """(total, *args) -> one(i, *args) for each i of range(total), [total, ...].

    Pieces of one size, `most` by vmap or what `at_once` makes of it, are `paced`.

    Args: one, (i [], *args) -> a tree of arrays; pause, as in `paced`.
    """
    known: list = []

    def advance(results, total, args, first, last):
        size = jax.tree.leaves(results)[0].shape[1]

        def body(k, results):
            # The last piece repeats the last i, so that one program does all pieces;
            # `every` drops the repeats.
            rows = jnp.minimum(k * size + jnp.arange(size), total - 1)
            piece = jax.vmap(lambda i: one(i, *args))(rows)
            return jax.tree.map(lambda a, b: a.at[k].set(b), results, piece)

        return jax.lax.fori_loop(first, last, body, results)

    def every(total, *args):
        if not known:  # traced once, and not at every call
            cost = jax.jit(one).lower(0, *args).cost_analysis() or {}
            each = float(cost.get("flops", math.nan))  # XLA may not say
            place = _everywhere(args)  # what comes back goes in: one program
            program = jax.jit(advance, donate_argnums=0, out_shardings=place)
            known.extend([each, place, paced(program, pause)])
            known.append(jax.eval_shape(one, 0, *args))
        each, place, run, like = known
        size = at_once(each, min(most, total))
        pieces = -(-total // size)
        results = jax.tree.map(
            lambda a: jnp.zeros((pieces, size, *a.shape), a.dtype, device=place), like
        )
        results = run(results, pieces, total, args)
        return jax.tree.map(
            lambda a: np.asarray(a).reshape(-1, *a.shape[2:])[:total], results
        )

    return every


def _everywhere(args):
    """The sharding of an array that is whole on each device of the mesh of some args.

    None where no args are on a mesh.
    """
    for leaf in jax.tree.leaves(args):
        if isinstance(where := getattr(leaf, "sharding", None), NamedSharding):
            return parallel.replicated(where.mesh)
    return None


# Control groups of version 2, then 1: their kind; the files of the limit and of the
# memory in use; the line of memory.stat that counts cached files.
GROUPS = (
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def available(root=Path("/")) -> tuple[float, str]:
    """Bytes that the machine or its container has free, and the source of that number.

    Args: root, of the file system, for tests.
    """
    free = []
    with contextlib.suppress(OSError, ValueError, KeyError):
        free.append(1024 * int(_words(root / "proc/meminfo")["MemAvailable:"]))
    with contextlib.suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            for kind, *names in GROUPS:
                if kind in kinds.split(","):
                    free += _left(root / "sys/fs/cgroup" / kind, path, *names)
    if free:  # the tightest of all limits ends a process first
        return max(0, min(free)), " (free on this machine)"
    with contextlib.suppress(OSError, ValueError, AttributeError):
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return total / 2, " (half of what this machine has)"
    return GIB, " (this machine does not say what it has)"


def _left(top, path, limit, taken, cache):
    """Bytes that a control group and each one above it, where limited, have left."""
    folder = top / path.lstrip("/")
    for place in (folder, *folder.parents):
        with contextlib.suppress(OSError, ValueError, KeyError):  # "max" is no limit
            most, used = (int((place / name).read_text()) for name in (limit, taken))
            # The kernel counts cached files as in use, and gives them up on demand.
            yield most - used + int(_words(place / "memory.stat")[cache])
        if place == top:
            break


def _words(path):
    """{first word: second word} of the lines of a file."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0]: words[1] for words in lines if len(words) > 1}


def _joined(parts):
    if len(parts) == 1:
        return parts[0]
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


def _plain(value):
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
