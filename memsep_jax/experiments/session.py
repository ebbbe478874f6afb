"""One run in one workdir: its lock, its signals, its status, its progress, its time."""

import contextlib
import datetime
import fcntl
import os
import platform
import shlex
import signal
import socket
import sys
import threading
import time
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from memsep_jax import defaults
from memsep_jax.checkpoint import ConflictError, StorageError
from memsep_jax.experiments import record
from memsep_jax.experiments.setup import differences, looks, to_json

# Groups that change no weight, and points that are kept by their values.
AFTER_TRAINING = (
    "sampler", "memorization", "prune", "prune_times", "sweep", "measure", "emm",
)  # fmt: skip
LENGTHS = ("train.steps", "train.epochs")  # a longer run goes on
WAY_OUT = "Give another --workdir, or --allow_config_change to go on all the same"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
PLAIN_EVERY = 5.0  # seconds between progress lines where there is no terminal


class Interrupted(BaseException):
    """SIGTERM or Ctrl-C, after all that must be saved was saved."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


class Terminal(Console):
    """Where a run speaks; it goes on when nobody listens any more (`| head`)."""

    def on_broken_pipe(self):
        """Rich would end the process here."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Session:
    """Holds a workdir while a run is in it.

    Nothing is written before `begin`. The first SIGTERM or Ctrl-C raises Interrupted
    at once; inside `deferred`, where a step must be finished and saved, it sets `stop`
    instead. The second one ends the process on the spot.
    """

    def __init__(self, workdir, config, allow_config_change=False):
        self.workdir = Path(workdir)
        self.config = config
        self.allow_config_change = allow_config_change
        self.before: dict = {}  # run.json as it was found
        self.status: dict = {"seconds": {}}
        self.stop: int | None = None
        self.console = Terminal(highlight=False, soft_wrap=True)
        self._begun = False
        self._made: list[Path] = []  # directories that were not there
        self._deferred = 0
        self._handlers: dict = {}

    def __enter__(self):
        try:
            places = (self.workdir, *self.workdir.parents)
            self._made = [place for place in places if not place.exists()]
            self.workdir.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self.workdir)
        except OSError as error:
            raise ConflictError(f"{self.workdir} cannot be written: {error}") from error
        self.before = record.read_json(self.workdir / "run.json") or {}
        self.status["seconds"] = dict(self.before.get("seconds", {}))
        # Only the main thread receives signals; at a prompt in another one, none do.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._handlers[number] = signal.signal(number, self._on_signal)
        try:
            self._check_config()
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(self, kind, error, trace):
        if kind is None:
            self.status["status"] = "complete"
        elif issubclass(kind, Interrupted):
            self.status["status"] = "interrupted"
        else:
            self.status["status"] = "failed"
            self.status["error"] = f"{kind.__name__}: {error}"[:1_000]
        if self._begun:
            with contextlib.suppress(OSError):  # must not hide the first error
                self.write_status()
        elif not self.before:  # a run that was refused leaves nothing behind
            with contextlib.suppress(OSError):
                (self.workdir / ".lock").unlink()
                for place in self._made:
                    place.rmdir()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        os.close(self._lock)

    def expect(self, fingerprint: str):
        """Checks that the data are those that the run began with.

        Raises: ConflictError.
        """
        old = self.before.get("fingerprint")
        if old not in (None, fingerprint) and not self.allow_config_change:
            raise ConflictError(
                f"the training data of {self.workdir} changed: their fingerprint was "
                f"{old[:12]} and is {fingerprint[:12]}. {WAY_OUT}"
            )

    def begin(self, fingerprint: str):
        """From here on, the run is on disk.   Raises: ConflictError, as `expect`."""
        self.expect(fingerprint)
        self.status |= _circumstances()
        self.status |= {
            "seed": self.config.seed,
            "started": self.before.get("started", _now()),
            "fingerprint": fingerprint,
            "status": "running",
        }
        self._begun = True
        record.write_json(self.workdir / "config.json", to_json(self.config))
        self.write_status()

    def is_complete(self) -> bool:
        """Whether this very config already ran to its end here."""
        status = record.read_json(self.workdir / "run.json") or {}
        return status.get("status") == "complete" and not [
            name for name, _, _ in self._changes() if not self._harmless(name)
        ]

    def _harmless(self, name):
        """Whether a field changes no number."""
        return name.split(".")[0] == "run" and name not in looks(self.config)

    def _changes(self):
        old = record.read_json(self.workdir / "config.json")
        if not old:
            return []
        # A field that came later was what it is by default.
        later = [
            change
            for change in differences(old, to_json(defaults.train()))
            if change[1] is None
        ]
        changes = differences(old, to_json(self.config))
        return [change for change in changes if change not in later]

    def _check_config(self):
        """Another config may not go on with this one's weights."""
        conflicts = []
        for name, old, new in self._changes():
            group = name.split(".")[0]
            longer = name in LENGTHS and None not in (old, new) and old < new
            if longer:
                self.say(f"{name}: {old} -> {new}, the run goes on")
                if self.config.optimizer.get("schedule") == "cosine":
                    self.say(
                        f"warning: optimizer.schedule=cosine depends on {name}: "
                        "the learning rate jumps here, unlike in one long run"
                    )
            elif (
                self._harmless(name)
                or group in AFTER_TRAINING
                or self.allow_config_change
            ):
                self.say(f"{name}: {old} -> {new}")
            else:
                conflicts.append(f"  {name}: {old} -> {new}")
        if conflicts:
            raise ConflictError(
                f"{self.workdir} holds a run with another config:\n"
                + "\n".join(conflicts)
                + f"\n{WAY_OUT}"
            )

    def write_status(self):
        """Writes run.json as it stands."""
        self.status["updated"] = _now()
        record.write_json(self.workdir / "run.json", self.status)

    def say(self, text: str):
        """One line to the person; a closed pipe is not an error."""
        with contextlib.suppress(OSError):
            self.console.print(text, markup=False)

    @contextlib.contextmanager
    def phase(self, name: str):
        """Counts the seconds of a part of the run, over all its restarts."""
        started = time.monotonic()
        try:
            yield
        finally:
            seconds = self.status["seconds"]
            passed = time.monotonic() - started
            seconds[name] = round(seconds.get(name, 0.0) + passed, 2)

    @contextlib.contextmanager
    def deferred(self):
        """Inside, a signal only sets `stop`: the caller polls it and saves."""
        self._deferred += 1
        try:
            yield
        finally:
            self._deferred -= 1

    def check(self):
        """Raises Interrupted where a signal came while it was deferred."""
        if self.stop is not None:
            raise Interrupted(self.stop)

    @contextlib.contextmanager
    def progress(self, what: str, total: int, done: int = 0):
        """A live bar, or plain lines where there is no terminal.

        Yields: update(done, text), to be called as often as one likes.
        """
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
                TextColumn("ETA"),
                TimeRemainingColumn(),
            )
            with Progress(*columns, console=self.console) as bar:
                task = bar.add_task(what, total=total, completed=done, text="")
                yield lambda done, text="": bar.update(task, completed=done, text=text)
            return

        started, first, last = time.monotonic(), done, [0.0]

        def update(done, text=""):
            now = time.monotonic()
            if now - last[0] < PLAIN_EVERY and done < total:
                return
            last[0] = now
            rate = (done - first) / max(now - started, 1e-9)
            eta = f"{(total - done) / rate:.0f} s" if rate else "?"
            self.say(f"{what} {done}/{total}  {text}  ETA {eta}")

        yield update

    def _on_signal(self, number, frame):
        # The second signal, whichever it is, gets the system's own way: at once.
        for other in (signal.SIGTERM, signal.SIGINT):
            signal.signal(other, signal.SIG_DFL)
        self.stop = number
        if not self._deferred:
            raise Interrupted(number)


def _lock(workdir):
    """Takes the workdir, for as long as this process lives."""
    path = workdir / ".lock"
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        # A lock of the kernel, not of a file's existence: SIGKILL frees it.
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = os.read(handle, 4_096).decode(errors="replace").strip()
        os.close(handle)
        raise ConflictError(
            f"{workdir} is in use by {owner or 'another process'}: wait for it, or "
            "give another --workdir"
        ) from error
    if not os.fstat(handle).st_nlink:  # its owner was refused and took it away
        os.close(handle)
        return _lock(workdir)
    try:
        os.ftruncate(handle, 0)
        owner = f"process {os.getpid()} on {socket.gethostname()}, started {_now()}"
        os.pwrite(handle, owner.encode(), 0)
    except OSError as error:
        os.close(handle)
        raise StorageError(f"could not write {path}: {error.strerror}") from error
    return handle


def _circumstances():
    import jax

    device = jax.devices()[0]
    return {
        # Arguments only: the environment may hold keys of other services.
        "command": shlex.join(["python", "-m", "memsep_jax.main", *sys.argv[1:]]),
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
    }


def _now():
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
