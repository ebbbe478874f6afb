"""What is on disk is whole, verified, and the newest: orbax, and only here.

A step is a directory that orbax writes under a temporary name and renames when it is
complete. Orbax notices neither flipped bits nor damaged steps, so a manifest with a
SHA-256 per leaf is written in the same atomic step and checked on every restore.
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

SCHEMA = 1
TMP = ".orbax-checkpoint-tmp"


class CorruptError(RuntimeError):
    """Nothing on disk can be trusted."""

    exit_code = 3


class ConflictError(RuntimeError):
    """What is on disk is whole, but not what this run expects."""

    exit_code = 2


class StorageError(OSError):
    """A save failed; what was saved before is untouched."""

    exit_code = 5


class _DamagedError(Exception):
    pass


def leaves(tree) -> dict[str, np.ndarray]:
    """The leaves of a pytree on the host, by path ("params/block_0/mlp_in/kernel")."""
    paths = jax.tree_util.tree_flatten_with_path(jax.device_get(tree))[0]
    return {_name(path): np.asarray(leaf) for path, leaf in paths}


def digest(tree) -> str:
    """SHA-256 over all leaves: equal exactly when two states are bitwise equal."""
    found = {name: _sha256(leaf) for name, leaf in leaves(tree).items()}
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def steps(directory) -> list[int]:
    """The committed steps under a directory, in increasing order."""
    directory = Path(directory)
    if not directory.is_dir():
        return []
    # An empty directory is no step, though orbax would take it for the latest one.
    found = [
        int(p.name)
        for p in directory.iterdir()
        if p.name.isascii() and p.name.isdigit() and p.is_dir() and any(p.iterdir())
    ]
    return sorted(found)


def save(directory, step: int, tree, keep: int | None = None) -> None:
    """Writes one step, whole or not at all, then drops all but the newest `keep`.

    Raises: StorageError with path, bytes needed and bytes free; earlier steps stay.
    """
    directory = Path(directory)
    path = directory / str(step)
    arrays = leaves(tree)
    needed = sum(a.nbytes for a in arrays.values())
    floating = [a for a in arrays.values() if jnp.issubdtype(a.dtype, jnp.floating)]
    if not all(np.isfinite(a).all() for a in floating):
        raise ArithmeticError(
            f"step {step} holds values that are not finite: not saved"
        )
    table = {
        name: [list(a.shape), str(a.dtype), _sha256(a)] for name, a in arrays.items()
    }
    manifest = {"schema": SCHEMA, "step": step, "leaves": table, "sha256": _seal(table)}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(directory).free < needed:
            raise OSError("the disk is full")
        if path.exists():
            shutil.rmtree(path)
        with (
            _without_tracebacks(),
            ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer,
        ):
            checkpointer.save(
                path.absolute(),
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(arrays),
                    manifest=ocp.args.JsonSave(manifest),
                ),
            )
    except Exception as error:  # a full disk is a ValueError or worse down there
        for _ in range(20):  # its other threads may still write for a moment
            clean(directory)
            time.sleep(0.05)
            if not any(directory.glob(f"*{TMP}*")):
                break
        free = shutil.disk_usage(_existing(directory)).free
        raise StorageError(
            f"could not save {path} ({_short(error)}): needed {needed:,} "
            f"bytes, {free:,} are free. Earlier steps are untouched: free some space "
            "and give the same command again"
        ) from error
    if keep is not None:
        for old in steps(directory)[:-keep]:
            shutil.rmtree(directory / str(old))


def restore(directory, step: int, like):
    """One step, verified leaf by leaf.

    Args: like, a pytree of arrays or ShapeDtypeStructs, with shardings or without.
    Raises: CorruptError (damaged), ConflictError (whole, but another model's).
    """
    try:
        return _restore(Path(directory) / str(step), like)
    except _DamagedError as error:
        raise CorruptError(f"{Path(directory) / str(step)}: {error}") from error


def restore_newest(directory, like, at_most: int | None = None):
    """The newest valid step as (tree, step), or None where nothing was ever saved.

    A damaged step is moved to corrupt-<step> and the one before it is tried.

    Raises: CorruptError naming all that was tried, when every step is damaged: a run
      never starts afresh beside the ruins of another. ConflictError as `restore`.
    """
    directory = Path(directory)
    tried = []
    for step in reversed(steps(directory)):
        if at_most is not None and step > at_most:
            continue
        try:
            return _restore(directory / str(step), like), step
        except _DamagedError as error:
            tried.append(f"step {step}: {error}")
            moved = set_aside(directory, step, "corrupt")
            logging.warning(
                "checkpoint %s is damaged (%s): moved to %s", step, error, moved
            )
    older = sorted(p.name for p in directory.glob("corrupt-*"))
    if tried or older:
        raise CorruptError(
            f"no valid checkpoint is left in {directory}. Tried: "
            + ("; ".join(tried) or ", ".join(older))
            + ". Restore a backup there, or start in another workdir"
        )
    return None


def set_aside(directory, step: int, why: str) -> Path:
    """Moves a step to <why>-<step>, never over what is there.   Returns: where to."""
    target = Path(directory) / f"{why}-{step}"
    number = 1
    while target.exists():
        target = Path(directory) / f"{why}-{step}.{number}"
        number += 1
    os.rename(Path(directory) / str(step), target)
    return target


def clean(directory) -> None:
    """Removes what interrupted saves left behind, and nothing else."""
    for path in Path(directory).glob(f"*{TMP}*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


def _restore(path, like):
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        try:
            args = ocp.args.Composite(manifest=ocp.args.JsonRestore())
            manifest = checkpointer.restore(path.absolute(), args=args).manifest
            schema, table = manifest["schema"], manifest["leaves"]
            sealed = manifest["sha256"] == _seal(table)
        except Exception as error:
            raise _DamagedError(f"manifest unreadable ({_short(error)})") from error
        if not sealed:
            raise _DamagedError("manifest digest mismatch")
        if schema != SCHEMA:
            raise ConflictError(
                f"{path} has checkpoint schema {schema}, this version of memsep_jax "
                f"reads {SCHEMA}: use the version that wrote it"
            )
        paths, treedef = jax.tree_util.tree_flatten_with_path(like)
        wanted = {_name(p): leaf for p, leaf in paths}
        _check_same(path, wanted, table)
        # Targets bound by the config's tree: a lying file cannot ask for more memory.
        targets = {n: np.empty(a.shape, a.dtype) for n, a in wanted.items()}
        try:
            args = ocp.args.Composite(state=ocp.args.StandardRestore(targets))
            arrays = checkpointer.restore(path.absolute(), args=args).state
        except Exception as error:
            raise _DamagedError(f"arrays unreadable ({_short(error)})") from error
    restored = []
    for name, target in wanted.items():
        array = np.asarray(arrays[name], target.dtype)
        if _sha256(array) != table[name][2]:
            raise _DamagedError(f"digest mismatch in {name}")
        sharding = getattr(target, "sharding", None)
        restored.append(jax.device_put(array, sharding))
    return jax.tree.unflatten(treedef, restored)


def _check_same(path, wanted, table):
    found = {n: (tuple(shape), dtype) for n, (shape, dtype, _) in table.items()}
    expected = {n: (tuple(a.shape), str(a.dtype)) for n, a in wanted.items()}
    wrong = [
        f"  {n}: saved {found.get(n, 'absent')}, expected {expected.get(n, 'absent')}"
        for n in sorted(found.keys() | expected.keys())
        if found.get(n) != expected.get(n)
    ]
    if wrong:
        more = [f"  and {len(wrong) - 10} more"] if len(wrong) > 10 else []
        raise ConflictError(
            f"{path} holds another model ({len(wrong)} leaves differ; look at "
            "model.width, model.depth, model.name and optimizer.name):\n"
            + "\n".join(wrong[:10] + more)
        )


def _name(path):
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _sha256(array):
    array = np.ascontiguousarray(array)
    head = f"{array.dtype}{array.shape}".encode()
    return hashlib.sha256(head + array.tobytes()).hexdigest()


def _seal(table):
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def _without_tracebacks():
    # Orbax logs the traceback of what it raises; the person gets one message.
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _short(error):
    return f"{type(error).__name__}: {error}".splitlines()[0][:120]


def _existing(path):
    while not path.exists():
        path = path.parent
    return path
