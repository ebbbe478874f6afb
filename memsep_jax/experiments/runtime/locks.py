"""Locks that the kernel frees when their owner ends: of a workdir, of a point."""

import contextlib
import datetime
import fcntl
import os
import socket
import time
from pathlib import Path

from memsep_jax.checkpoint import ConflictError, StorageError

POLL = 1.0  # seconds between two tries, where somebody else's lock is waited for


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def of_workdir(workdir, index: int = 0) -> Path:
    """The file that process `index` of a run locks."""
    return Path(workdir) / (f".lock-{index}" if index else ".lock")


def take(path, about: str = "", tries: int = 5) -> int:
    """Takes what a file stands for, until the returned handle is closed.

    Args: about, a line for others to read, after the one that names the owner.
    Raises: ConflictError where another process has it; StorageError.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise StorageError(f"could not write {path}: {error.strerror}") from error
    try:
        # A lock of the kernel, not the existence of a file: SIGKILL frees it.
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        words = os.read(handle, 4_096).decode(errors="replace")
        os.close(handle)
        if tries:  # `gone` shares the lock for a moment, and owns nothing
            time.sleep(0.01)
            return take(path, about, tries - 1)
        owner = words.partition("\n")[0].strip() or "another process"
        raise ConflictError(
            f"{path.parent} is in use by {owner}: wait for it, or give another "
            "--workdir"
        ) from error
    # The last owner may have removed the file after it was opened here: a lock on it
    # keeps nobody out, since others make a new file.
    if not os.fstat(handle).st_nlink:
        os.close(handle)
        return take(path, about)
    try:
        # Only now, as the words were those of an owner until the lock was free.
        os.ftruncate(handle, 0)
        owner = f"process {os.getpid()} on {socket.gethostname()}, started {now()}"
        os.pwrite(handle, "\n".join([owner, *([about] if about else [])]).encode(), 0)
        os.fsync(handle)  # other hosts wait for these words: see `Processes.meet`
    except OSError as error:
        os.close(handle)
        raise StorageError(f"could not write {path}: {error.strerror}") from error
    return handle


def release(handle: int, path=None):
    """Gives a lock back.   Args: path, of its file where that is to go too."""
    # Removed while it is held: afterwards the name may be another owner's file.
    if path is not None:
        with contextlib.suppress(OSError):
            os.unlink(path)
    os.close(handle)


def gone(path) -> str | None:
    """What the lock of an owner that ended says; None while the owner lives."""
    try:
        with open(path) as file:
            # Shared, so that several may look at once; closing the file ends it.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return file.read().partition("\n")[0]
    except BlockingIOError:
        return None
    except OSError:
        return "its lock was removed"


def about(path) -> str:
    """What the owner of a lock has written for others to read."""
    try:
        return Path(path).read_text().partition("\n")[2]
    except OSError:
        return ""


@contextlib.contextmanager
def held(path, say=lambda text: None):
    """Waits until nobody else has the lock, and has it inside the block."""
    path, said = Path(path), False
    while True:
        try:
            handle = take(path)
            break
        except ConflictError as error:
            if not said:
                say(f"waiting: {error}".partition(": wait for it")[0])
            said = True
            time.sleep(POLL)
    try:
        yield
    finally:
        release(handle, path)
