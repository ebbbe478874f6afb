"""Numbers on disk: json, metrics.jsonl, csv, npz, and work kept chunk by chunk.

Every file is written beside its name and renamed when whole, so a reader never sees
half of one.
"""

import contextlib
import csv
import json
import math
import os
import zipfile
from pathlib import Path

import numpy as np

from memsep_jax.checkpoint import StorageError


@contextlib.contextmanager
def replacing(path):
    """Yields a temporary path that becomes `path` when the block ends well.

    Raises: StorageError naming the file where the disk does not take it.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        os.replace(part, path)
    except OSError as error:
        raise StorageError(f"could not write {path}: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def write_json(path, value):
    """Writes a value as JSON; NaN and infinity, which JSON lacks, become null."""
    text = json.dumps(_plain(value), indent=2, sort_keys=True) + "\n"
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
    with replacing(path) as part, open(part, "wb") as file:
        np.savez(file, **arrays)


def read_npz(path):
    """The arrays of an npz as a dict, or None where there is no whole one."""
    try:
        # Opened here: np.load leaves the file of a damaged .npz open.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return None


def write_csv(path, columns: dict):
    """Writes equally long columns, one row each."""
    with replacing(path) as part, open(part, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


class Metrics:
    """metrics.jsonl: one row per logged step, each step once, through any restarts."""

    def __init__(self, path, step: int):
        """Keeps the rows up to `step`: later ones, and a torn last one, are redone."""
        self.path = Path(path)
        rows = [row for row in read_metrics(path) if row["step"] <= step]
        self.steps = {row["step"] for row in rows}
        with replacing(self.path) as part:
            part.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write(self, **row):
        """Appends a row, on disk before this returns."""
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(_plain(row)) + "\n")
        except OSError as error:
            raise StorageError(f"could not write {self.path}: {error}") from error


def read_metrics(path) -> list[dict]:
    """All whole rows of metrics.jsonl."""
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
    """The points of a sweep, as `sweep.run` kept them: what metrics.json lists."""
    found = []
    for name in metrics["points"]:
        arrays = read_npz(Path(workdir) / name)
        if arrays is not None:
            found.append(arrays)
    return found


def in_chunks(directory, work, total: int, chunk: int, session, what: str) -> dict:
    """work(start, stop) -> dict of arrays, over range(total), each chunk kept on disk.

    A chunk that is already there is read instead of done again, so an interrupted
    pass goes on where it stopped.

    Returns: the dict of concatenated arrays.
    """
    directory, parts = Path(directory), []
    with session.progress(what, total) as update:
        for start in range(0, total, chunk):
            session.check()
            stop = min(start + chunk, total)
            path = directory / f"{start:08d}-{stop:08d}.npz"
            part = read_npz(path)
            if part is None:
                part = {k: np.asarray(v) for k, v in work(start, stop).items()}
                write_npz(path, **part)
            parts.append(part)
            update(stop)
    return {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}


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
