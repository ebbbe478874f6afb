"""States on disk, whole and verified: orbax, and only here.

A step is a directory that orbax writes under a temporary name and renames when it is
complete. Orbax notices neither flipped bits nor damaged steps, so a manifest with a
SHA-256 per leaf is written in the same atomic step and checked on every restore.

For a run that continues elsewhere, `pack` writes a state as one .npz with the same
manifest, and `unpack` reads it back with the same checks.
"""

import contextlib
import functools
import hashlib
import json
import math
import os
import re
import shutil
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

SCHEMA = 1  # of the manifest: a version that cannot read one says so
TMP = ".orbax-checkpoint-tmp"  # orbax's own mark of what is not committed yet
MANIFEST = "manifest.json"  # in a packed file; leaves end in .npy there
# Bytes, for some 400,000 leaves: a file that lies cannot ask for more memory.
MAX_MANIFEST = 1 << 26
MAX_HEADER = 1 << 16  # bytes of a .npy before its data; its length has 16 bits


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
    return {name: np.asarray(a) for name, a in _by_path(jax.device_get(tree)).items()}


def digest(tree) -> str:
    """SHA-256 over all leaves: equal exactly when two states are bitwise equal."""
    known = {name: _sha256(leaf) for name, leaf in leaves(tree).items()}
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def steps(directory) -> list[int]:
    """The committed steps under a directory, in increasing order."""
    directory = Path(directory)
    if not directory.is_dir():
        return []
    # An empty directory is no step, though orbax would take it for the latest one.
    # isdigit alone would accept a superscript 2, which int refuses.
    return sorted(
        int(p.name)
        for p in directory.iterdir()
        if p.name.isascii() and p.name.isdigit() and p.is_dir() and any(p.iterdir())
    )


def save(directory, step: int, tree, keep: int | None = None) -> None:
    """Writes one step, whole or not at all, then drops all but the newest `keep`.

    Leftovers of an earlier save that failed or was killed are removed first.

    Raises: StorageError with path, bytes needed and bytes free; earlier steps stay.
    """
    directory = Path(directory)
    path = directory / str(step)
    arrays = leaves(tree)
    # First, since a state that is not finite is refused there, with all steps in place.
    manifest, needed = _manifest(step, arrays), _nbytes(arrays)
    clean(directory)
    try:
        _make_room(directory, needed)
        if path.exists():  # orbax does not write over a step
            _remove(path)
        with _without_tracebacks(), _checkpointer() as checkpointer:
            checkpointer.save(
                path.absolute(),
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(arrays),
                    manifest=ocp.args.JsonSave(manifest),
                ),
            )
    except Exception as error:  # a full disk is a ValueError or worse down there
        # Threads of orbax that cannot be joined may write on for a moment, and so make
        # their directories again: these go at the next save or start, as after a kill.
        clean(directory)
        raise _not_saved(path, needed, error) from error
    if keep is not None:  # only now, when the new step is whole
        for old in steps(directory)[:-keep]:
            _remove(directory / str(old))


def restore(directory, step: int, like):
    """One step, verified leaf by leaf.

    Args: like, a pytree of arrays or ShapeDtypeStructs, with shardings or without.
    Raises: CorruptError (damaged), ConflictError (whole, but another model's).
    """
    try:
        return _restore(Path(directory) / str(step), like)
    except _DamagedError as error:
        raise CorruptError(f"{Path(directory) / str(step)}: {error}") from error


def restore_newest(directory, like, at_most: int | None = None, aside: bool = True):
    """The newest valid step as (tree, step), or None where nothing was ever saved.

    A damaged step is moved to corrupt-<step>, or with aside=False left where it is, for
    those who only read a run; then the one before it is tried.

    Raises: CorruptError naming all that was tried, when every step is damaged: a run
      never starts afresh where another one has lost its steps. ConflictError as
      `restore`.
    """
    directory = Path(directory)
    if strange := _strange(directory):
        logging.warning(
            "%s holds files that are no checkpoints: %s; they are left alone",
            directory,
            ", ".join(strange[:10]),
        )
    tried = []
    for step in reversed(steps(directory)):
        if at_most is not None and step > at_most:
            continue
        try:
            return _restore(directory / str(step), like), step
        except _DamagedError as error:
            tried.append(f"step {step}: {error}")
            moved = set_aside(directory, step, "corrupt") if aside else None
            done = f"moved to {moved}" if aside else "an older one is taken"
            logging.warning("checkpoint %s is damaged (%s): %s", step, error, done)
    # Steps that an earlier start set aside count too: with these alone, `None` would
    # let a run begin again from step 0 without a word.
    older = sorted(p.name for p in directory.glob("corrupt-*"))
    if tried or older:
        raise CorruptError(
            f"no valid checkpoint is left in {directory}. Tried: "
            + ("; ".join(tried) or ", ".join(older))
            + ". Restore a backup there, or start in another workdir"
        )
    return None


def set_aside(directory, step: int, why: str) -> Path:
    """Moves a step to <why>-<step>, or a free name like it.   Returns: the new path."""
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
        # Never through a link: what it leads to is not ours.
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


def pack(path, step: int, tree) -> None:
    """Writes one state as one .npz, whole or not at all, to continue from elsewhere.

    Each leaf is an array by its path, as np.load reads it (bfloat16 as uint16).

    Raises: StorageError with path, bytes needed and bytes free; a file that was there
      stays.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    arrays = leaves(tree)
    manifest, needed = json.dumps(_manifest(step, arrays)), _nbytes(arrays)
    try:
        _make_room(path.parent, needed)
        with open(part, "wb") as file:
            with zipfile.ZipFile(file, "w") as archive:
                # Without dates: equal states are equal files.
                archive.writestr(zipfile.ZipInfo(MANIFEST), manifest)
                for name, array in arrays.items():
                    array = _for_numpy(array)
                    # zip64, or a leaf of more than 2 GiB would fail when it is written.
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                        np.lib.format.write_array(member, array, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())  # or a crash may leave the new name without data
        os.replace(part, path)
    except OSError as error:
        raise _not_saved(path, needed, error) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def unpack(path, like):
    """The state in a file of `pack`, verified leaf by leaf.   Returns: (tree, step).

    Args: like, a pytree of arrays or ShapeDtypeStructs, with shardings or without.
    Raises: CorruptError (missing or damaged), ConflictError (whole, but another
      model's).
    """
    path = Path(path)
    try:
        with _reading("file"):
            archive = zipfile.ZipFile(path)
        with archive:
            with _reading("manifest"):
                manifest = json.loads(_member(archive, MANIFEST, MAX_MANIFEST))
                step = int(manifest["step"])
            digests = _check(path, manifest, like)
            return _verified(like, digests, functools.partial(_packed, archive)), step
    except _DamagedError as error:
        raise CorruptError(f"{path}: {error}") from error


def _checkpointer():
    # Where several processes train, the one that saves or restores does so alone.
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process_{me}"
    )
    options = ocp.CompositeOptions(multiprocessing_options=alone)
    handler = ocp.CompositeCheckpointHandler(
        composite_options=options,
        state=ocp.StandardCheckpointHandler(multiprocessing_options=alone),
        manifest=ocp.JsonCheckpointHandler(multiprocessing_options=alone),
    )
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _strange(directory) -> list[str]:
    """Names that are no step, no step set aside, and no leftover of a save."""
    known = {str(step) for step in steps(directory)}
    ours = re.compile(rf"(corrupt|abandoned)-|.*{re.escape(TMP)}")
    names = [] if not directory.is_dir() else [p.name for p in directory.iterdir()]
    return sorted(name for name in names if name not in known and not ours.match(name))


def _remove(path):
    # Under a name that `clean` knows: a kill on the way must not leave half a step.
    doomed = path.with_name(f"{path.name}{TMP}-removed")
    os.rename(path, doomed)
    if doomed.is_symlink():  # what it leads to is not ours
        doomed.unlink()
    else:
        shutil.rmtree(doomed)


def _restore(path, like):
    with _checkpointer() as checkpointer:
        with _reading("manifest"):
            args = ocp.args.Composite(manifest=ocp.args.JsonRestore())
            manifest = checkpointer.restore(path.absolute(), args=args).manifest
        digests = _check(path, manifest, like)
        # Targets are the config's tree: a lying file cannot ask for more memory, and
        # orbax, which would cast silently to another type, has none to cast to.
        targets = {n: np.empty(a.shape, a.dtype) for n, a in _by_path(like).items()}
        with _reading("arrays"):
            args = ocp.args.Composite(state=ocp.args.StandardRestore(targets))
            arrays = checkpointer.restore(path.absolute(), args=args).state
    return _verified(like, digests, lambda n, a: np.asarray(arrays[n], a.dtype))


def _packed(archive, name, target):
    # Type and shape are those of the target, and its digest covers them: the header of
    # a .npy is for other readers, so it can neither lie to us nor name a pickle.
    nbytes = math.prod(target.shape) * np.dtype(target.dtype).itemsize
    with _reading(name):
        raw = _member(archive, f"{name}.npy", nbytes + MAX_HEADER)
        return np.ndarray(target.shape, target.dtype, raw, len(raw) - nbytes)


def _member(archive, name, at_most):
    info = archive.getinfo(name)
    # Stored as it is, so that nothing unfolds to more than its size.
    if info.compress_type != zipfile.ZIP_STORED or info.file_size > at_most:
        raise ValueError("not as it was packed")
    with archive.open(info) as file:
        return file.read(at_most)


def _manifest(step, arrays):
    # jnp, which counts bfloat16 among the floating types; np does not.
    floating = [a for a in arrays.values() if jnp.issubdtype(a.dtype, jnp.floating)]
    if not all(np.isfinite(a).all() for a in floating):
        raise ArithmeticError(
            f"step {step} holds values that are not finite: not saved"
        )
    table = {
        name: [list(a.shape), str(a.dtype), _sha256(a)] for name, a in arrays.items()
    }
    return {"schema": SCHEMA, "step": step, "leaves": table, "sha256": _seal(table)}


def _check(path, manifest, like):
    """The digests by leaf, where the manifest is whole and fits the tree."""
    with _reading("manifest"):
        schema, table = manifest["schema"], manifest["leaves"]
        sealed = manifest["sha256"] == _seal(table)
        saved = {n: (tuple(shape), dtype) for n, (shape, dtype, _) in table.items()}
    # Before anything in it is believed: a flipped bit in the schema or in a shape must
    # not pass for another version or another model, which end the run.
    if not sealed:
        raise _DamagedError("manifest digest mismatch")
    if schema != SCHEMA:
        raise ConflictError(
            f"{path} has checkpoint schema {schema}, this version of memsep_jax "
            f"reads {SCHEMA}: use the version that wrote it"
        )
    wanted = _by_path(like)
    expected = {n: (tuple(a.shape), str(a.dtype)) for n, a in wanted.items()}
    wrong = [
        f"  {n}: saved {saved.get(n, 'absent')}, expected {expected.get(n, 'absent')}"
        for n in sorted(saved.keys() | expected.keys())
        if saved.get(n) != expected.get(n)
    ]
    if wrong:
        more = [f"  and {len(wrong) - 10} more"] if len(wrong) > 10 else []
        raise ConflictError(
            f"{path} holds another model ({len(wrong)} leaves differ; compare the "
            "name, width and depth of the network, and the name of the optimizer):\n"
            + "\n".join(wrong[:10] + more)
        )
    return {n: sha256 for n, (_, _, sha256) in table.items()}


def _verified(like, digests, read):
    """The tree of `like`: each leaf by read(name, target), checked, put in place."""
    restored = []
    for name, target in _by_path(like).items():
        array = read(name, target)
        if _sha256(array) != digests[name]:
            raise _DamagedError(f"digest mismatch in {name}")
        restored.append(jax.device_put(array, getattr(target, "sharding", None)))
    return jax.tree.unflatten(jax.tree.structure(like), restored)


@contextlib.contextmanager
def _reading(what):
    """Any failure of a reader of damaged files is damage: they fail in many ways."""
    try:
        yield
    except Exception as error:
        raise _DamagedError(f"{what} unreadable ({_short(error)})") from error


def _make_room(directory, needed):
    directory.mkdir(parents=True, exist_ok=True)
    # Asked before, so that a save that cannot succeed leaves nothing half-written.
    if shutil.disk_usage(directory).free < needed:
        raise OSError("the disk is full")


def _not_saved(path, needed, error):
    place = next(p for p in path.absolute().parents if p.exists())
    free = shutil.disk_usage(place).free
    return StorageError(
        f"could not save {path} ({_short(error)}): needed {needed:,} "
        f"bytes, {free:,} are free. Earlier steps are untouched: free some space "
        "and give the same command again"
    )


def _by_path(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _nbytes(arrays):
    return sum(a.nbytes for a in arrays.values())


def _sha256(array):
    array = np.ascontiguousarray(array)
    # With type and shape: the same bytes as another array are another leaf.
    head = f"{array.dtype}{array.shape}".encode()
    return hashlib.sha256(head + array.tobytes()).hexdigest()


def _for_numpy(array):
    # In the order of C, as it is read back; bfloat16, which NumPy lacks, as its bits.
    array = np.asarray(array, order="C")
    known = array.dtype.isbuiltin == 1
    return array if known else array.view(f"u{array.dtype.itemsize}")


def _seal(table):
    """SHA-256 of the table of leaves, so that the manifest itself is verified."""
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
