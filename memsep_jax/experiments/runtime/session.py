"""One run in one workdir: its lock, its signals, its status, its progress, its time."""

import contextlib
import datetime
import fcntl
import hashlib
import json
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

import jax
import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from memsep_jax import parallel
from memsep_jax.checkpoint import ConflictError, StorageError
from memsep_jax.experiments.config import fields, schema
from memsep_jax.experiments.config.build import differences, looks, to_json
from memsep_jax.experiments.runtime import record

WAY_OUT = "Give another --workdir, or --allow_config_change to go on all the same"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
ENDING = (signal.SIGTERM, signal.SIGINT)  # what a run ends for, saving first
PLAIN_EVERY = 5.0  # seconds between progress lines where there is no terminal
WATCH_EVERY = 0.5  # seconds between looks at the other processes of a run
LINGER = 5.0  # seconds that a failed process leaves the others to fail in their own way
SHARED_IN = 20.0  # seconds that a shared directory may take to show a file elsewhere


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
    as soon as a call into XLA lets python run; inside `deferred`, where a step must be
    finished and saved, it sets `stop` instead. The second one ends the process on the
    spot, wherever it is.

    Of several processes that train together, the first one alone writes and speaks.
    They meet in `__enter__` and `part` when training is over; in between, `poll` sets
    `stop` on all of them at the same step, and none goes on without another: each holds
    a lock in the workdir, and watches those of the others.
    """

    def __init__(self, workdir, config, allow_config_change=False):
        self.workdir = Path(workdir)
        self.config = config
        self.allow_config_change = allow_config_change
        self.before: dict = {}  # run.json as it was found
        self.status: dict = {"seconds": {}}
        self.stop: int | None = None
        # No emoji: "my_file:ring:" would show one.
        self.console = Terminal(highlight=False, emoji=False, soft_wrap=True)
        self._begun = False
        self._made: list[Path] = []  # directories that were not there
        self._deferred = 0
        self._handlers: dict = {}
        self._counter: _SignalCounter | None = None
        self._heard: int | None = None  # a signal that the others may not know of yet
        self._votes = None
        self._together = jax.process_count() > 1
        self._watch: threading.Thread | None = None
        self._over = threading.Event()
        self.console.quiet = not parallel.is_first()

    def __enter__(self):
        try:
            self._enter()
        except ConflictError as error:
            if self._together:
                self._meet(error)
            raise
        if self._together:
            try:
                self._meet(None)
            except BaseException as error:
                self.__exit__(type(error), error, None)
                raise
            self._watch = threading.Thread(target=self._watch_others, daemon=True)
            self._watch.start()
        return self

    def _enter(self):
        try:
            places = (self.workdir, *self.workdir.parents)
            self._made = [place for place in places if not place.exists()]
            self.workdir.mkdir(parents=True, exist_ok=True)
            self._held = lock(_lock_path(self.workdir, jax.process_index()))
        except OSError as error:
            raise ConflictError(f"{self.workdir} cannot be written: {error}") from error
        self.before = record.read_json(self.workdir / "run.json") or {}
        self.status["seconds"] = dict(self.before.get("seconds", {}))
        # Only the main thread receives signals; at a prompt in another one, none do.
        if threading.current_thread() is threading.main_thread():
            self._counter = _SignalCounter()
            for number in ENDING:
                self._handlers[number] = signal.signal(number, self._on_signal)
        try:
            self._check_config()
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise

    def __exit__(self, kind, error, trace):
        if self._watch and error is not None and not hasattr(error, "exit_code"):
            # What needs another process fails, as a JaxRuntimeError or a ValueError;
            # the watch knows which one is gone, and ends this one.
            self._watch.join(LINGER)
        if self._watch and error is not None:
            # Others may have the same to say; the first leaves last, as all hang on it.
            self._over.set()
            limit = time.monotonic() + LINGER * (1 + 2 * parallel.is_first())
            while time.monotonic() < limit and not (
                parallel.is_first() and all(map(self._gone, self._others()))
            ):
                time.sleep(WATCH_EVERY)
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
                _lock_path(self.workdir, jax.process_index()).unlink()
                if jax.process_count() > 1:  # the others take away theirs
                    time.sleep(WATCH_EVERY)
                for place in self._made:
                    place.rmdir()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._counter:
            self._counter.close()
        os.close(self._held)

    def expect(self, fingerprint: str):
        """Checks that the data are those that the run began with.

        Raises: ConflictError.
        """
        if self._together:
            mine = _words(fingerprint)
            self._agree(mine, "read other training data than process 0")
        old = self.before.get("fingerprint")
        if old not in (None, fingerprint) and not self.allow_config_change:
            raise ConflictError(
                f"the training data of {self.workdir} changed: their fingerprint was "
                f"{old[:12]} and is {fingerprint[:12]}. {WAY_OUT}"
            )

    def begin(self, fingerprint: str, read=None):
        """From here on, the run is on disk.

        Args: read, the data.Splits or sources.Source of its data: its notes are said,
          and the folder of each class is kept in run.json.
        Raises: ConflictError, as `expect`.
        """
        self.expect(fingerprint)
        if read is not None:
            for note in read.notes:
                self.say(f"note: {note}")
            if read.classes is not None:
                self.status["classes"] = dict(enumerate(read.classes))
        self.status |= _circumstances()
        self._warn_of_circumstances()
        self.status |= {
            "seed": self.config.seed,
            "started": self.before.get("started", _now()),
            "fingerprint": fingerprint,
            "status": "running",
        }
        self._begun = parallel.is_first()
        if self._begun:
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
        return schema.role(name) == fields.RUN and name not in looks(self.config)

    def _changes(self):
        old = record.read_json(self.workdir / "config.json")
        if not old:
            return []
        # A field that came later was what it is by default.
        later = [
            change
            for change in differences(old, to_json(schema.defaults(schema.of(old))))
            if change[1] is None
        ]
        changes = differences(schema.settled(old), schema.settled(to_json(self.config)))
        return [change for change in changes if change not in later]

    def _check_config(self):
        """Another config may not go on with this one's weights."""
        conflicts = []
        for name, old, new in self._changes():
            role = schema.role(name)
            longer = role == fields.GROWS and None not in (old, new) and old < new
            if longer:
                self.say(f"{name}: {old} -> {new}, the run goes on")
                if self.config.optimizer.get("schedule") == "cosine":
                    self.say(
                        f"warning: optimizer.schedule=cosine depends on {name}: "
                        "the learning rate jumps here, unlike in one long run"
                    )
            elif (
                self._harmless(name)
                or role in (fields.AFTER, fields.POINTS)
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
        self._check_streams()

    def _check_streams(self):
        """Other random numbers are as another seed: what is kept would not fit them."""
        before = self.before.get("streams", {})  # a run that is older recorded none
        changed = [
            f"  {name.upper()}: {before[name]} -> {value}"
            for name, value in _streams().items()
            if name in before and before[name] != value
        ]
        if changed and not self.allow_config_change:
            raise ConflictError(
                f"{self.workdir} holds a run with other random numbers:\n"
                + "\n".join(changed)
                + "\nSet them in the environment as they were. "
                + WAY_OUT
            )
        for line in changed:
            self.say(f"warning:{line[1:]}: other random numbers from here on")

    def _warn_of_circumstances(self):
        """Where what is computed on differs from what the run went on with before."""
        for what in ("device", "versions", "rounding"):
            before, now = self.before.get(what), self.status[what]
            if isinstance(before, dict):  # of an older release, without some of them
                now = {name: value for name, value in now.items() if name in before}
            if before not in (None, now):
                self.say(
                    f"warning: {what} was {before} and is {now}: the bitwise guarantee "
                    "does not hold, results agree to rounding"
                )

    def write_status(self):
        """Writes run.json as it stands."""
        if not parallel.is_first():
            return
        self.status["updated"] = _now()
        record.write_json(self.workdir / "run.json", self.status)

    def say(self, text):
        """One line, or a table, to the person; a closed pipe is not an error."""
        with contextlib.suppress(OSError):
            self.console.print(text, markup=not isinstance(text, str))

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
        """Inside, a signal only sets `stop`: the caller polls it and saves.

        Raises: Interrupted at the end, where nobody heard of it inside.
        """
        self._deferred += 1
        try:
            yield
        finally:
            self._deferred -= 1
        self._check()

    def pause(self):
        """Between two calls of long work.   Raises: Interrupted, in `deferred` too."""
        if self.heard is not None:
            raise Interrupted(self.heard)

    def _check(self):
        if self.stop is not None and not self._deferred:
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

    @property
    def heard(self) -> int | None:
        """The signal that came to this process; `poll` makes it the `stop` of all."""
        return self.stop or self._heard

    def poll(self, now=False):
        """Agrees on `stop` with the other processes: all call it, once in a step.

        Args: now, to wait for what they say; else it is what they said one step ago, so
          that no device waits for a vote.
        """
        if self._together:
            votes, self._votes = self._votes, parallel.gather([self._heard or 0])
            votes = self._votes if now else votes
            if votes is not None:
                self.stop = int(np.asarray(votes).max()) or None

    def share(self, value: int) -> int:
        """The value, not negative, that process 0 has; all call it."""
        if self._together:
            value = int(np.asarray(parallel.gather([value]))[0, 0])
        return value

    def part(self):
        """Ends the time of several processes: from here on the first one is alone.

        Raises: Interrupted where one of them heard a signal.
        """
        if self._together:
            heard = np.asarray(parallel.gather([self._heard or 0])).max()
            self._over.set()
            if self._watch:
                self._watch.join()
                self._watch = None
            np.asarray(parallel.gather([0]))  # all have ceased to watch the others
            jax.distributed.shutdown()
            self._together = False
            self.stop = self.stop or int(heard) or None
            self._check()

    def _meet(self, error):
        """All processes begin as one, or none does.   Raises: ConflictError."""
        mine = _lock_path(self.workdir, 0)
        token = _words(mine.read_text() if mine.exists() else "")
        rows = np.asarray(parallel.gather([error is not None, *token]))
        if rows[:, 0].any():
            self.part()
            wrong = int(np.flatnonzero(rows[:, 0])[0])
            raise error or ConflictError(
                f"process {wrong} could not begin: see what it says"
            )
        config = json.dumps([to_json(self.config), _streams()], sort_keys=True)
        self._agree(
            _words(config),
            "was given another config than process 0, or another "
            + " or ".join(map(str.upper, _streams())),
        )
        limit = time.monotonic() + SHARED_IN
        # A file system may show a file of another host late.
        while token != rows[0, 1:].tolist() and time.monotonic() < limit:
            time.sleep(0.2)
            token = _words(mine.read_text() if mine.exists() else "")
        self._agree(
            token,
            f"does not see in {self.workdir} what process 0 wrote there, and all need "
            "one directory",
        )

    def _agree(self, words, what):
        """Raises ConflictError on all processes where one has other words."""
        rows = np.asarray(parallel.gather(words))
        wrong = np.flatnonzero((rows != rows[:1]).any(axis=1))
        if wrong.size:
            self.part()
            raise ConflictError(
                f"process {', '.join(map(str, wrong))} {what}: give all processes the "
                "same command, data and --workdir"
            )

    def _others(self):
        return [i for i in range(jax.process_count()) if i != jax.process_index()]

    def _gone(self, index):
        return gone(_lock_path(self.workdir, index))

    def _watch_others(self):
        """Ends this process when another one is gone: it would wait for ever."""
        while not self._over.wait(WATCH_EVERY):
            for index in self._others():
                owner = self._gone(index)
                if owner is None or self._over.is_set():
                    continue
                text = (
                    f"process {index} of {jax.process_count()} ({owner}) is gone, and "
                    "this one cannot go on without it. Give all of them the same "
                    "command again: it goes on from the last checkpoint"
                )
                self.status |= {"status": "failed", "error": text}
                with contextlib.suppress(OSError):
                    if self._begun:
                        self.write_status()
                    sys.stderr.write(f"error: {text}\n")
                    sys.stderr.flush()
                # The main thread may stand in a call that never comes back.
                os._exit(parallel.MISSING)

    def _on_signal(self, number, frame):
        # The second signal, whichever it is, gets the system's own way: at once. Where
        # it comes before this is run, `_SignalCounter` has it.
        for other in ENDING:
            signal.signal(other, signal.SIG_DFL)
        if self._together and self._deferred:
            self._heard = number
            return
        self.stop = number
        if not self._deferred:
            raise Interrupted(number)


class _SignalCounter:
    """Ends the process at the second signal that python has not come to handle.

    Python runs its handlers in the main thread and between two instructions, and a call
    into XLA is one: it may compile or compute for minutes. The interpreter itself
    writes the number of each signal that has a handler into a pipe, which is read here
    by a thread of its own.
    """

    def __init__(self):
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)  # as python asks for
        self._before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._count, daemon=True)
        self._thread.start()

    def _count(self):
        heard = 0
        while number := os.read(self._read, 1):
            heard += number[0] in ENDING
            if heard > 1:
                os._exit(128 + number[0])

    def close(self):
        """Hands the signals back, and ends the thread."""
        signal.set_wakeup_fd(self._before)
        os.close(self._write)  # the thread reads the end of the pipe
        self._thread.join()
        os.close(self._read)


def _lock_path(workdir, index):
    """Where process `index` of a run has its lock."""
    return Path(workdir) / (f".lock-{index}" if index else ".lock")


def lock(path, tries: int = 5) -> int:
    """Takes a workdir, or what else a file stands for, until the handle is closed.

    Raises: ConflictError where another process has it; StorageError.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        # A lock of the kernel, not of a file's existence: SIGKILL frees it.
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = os.read(handle, 4_096).decode(errors="replace").strip()
        os.close(handle)
        if tries:  # `gone` has it for a moment
            time.sleep(0.01)
            return lock(path, tries - 1)
        raise ConflictError(
            f"{path.parent} is in use by {owner or 'another process'}: wait for it, or "
            "give another --workdir"
        ) from error
    if not os.fstat(handle).st_nlink:  # its owner was refused and took it away
        os.close(handle)
        return lock(path)
    try:
        os.ftruncate(handle, 0)
        owner = f"process {os.getpid()} on {socket.gethostname()}, started {_now()}"
        os.pwrite(handle, owner.encode(), 0)
        os.fsync(handle)  # others look for it
    except OSError as error:
        os.close(handle)
        raise StorageError(f"could not write {path}: {error.strerror}") from error
    return handle


def gone(path) -> str | None:
    """What a lock says whose owner is no more; None while it lives."""
    try:
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return file.read()
    except BlockingIOError:
        return None
    except OSError:
        return "its lock was removed"


def _words(text) -> list[int]:
    """A digest, as numbers that processes can gather."""
    found = hashlib.sha256(text.encode()).digest()[:16]
    return np.frombuffer(found, np.uint32).tolist()


def _streams():
    """What random numbers are drawn by, besides the seed.

    With another one every batch, noise and initial weight is another. In the
    environment the names are in capitals.
    """
    return {
        "jax_default_prng_impl": jax.config.jax_default_prng_impl,
        "jax_enable_x64": jax.config.jax_enable_x64,
        "jax_random_seed_offset": jax.config.jax_random_seed_offset,
        "jax_threefry_partitionable": jax.config.jax_threefry_partitionable,
    }


def _rounding():
    """What a person may set that changes the last bits of a program."""
    # The devices are told beside it; a dump of programs, or where files lie, changes no
    # bit, and a path may name a person.
    told = ("--xla_force_host_platform_device_count", "--xla_dump")
    flags = os.environ.get("XLA_FLAGS", "").split()
    flags = [flag for flag in flags if not flag.startswith(told) and "/" not in flag]
    less = "jax_disable_most_optimizations"  # which is no attribute
    return {
        "jax_default_matmul_precision": jax.config.jax_default_matmul_precision,
        less: jax.config.values.get(less),
        "XLA_FLAGS": sorted(flags),
    }


def _circumstances():
    device = jax.devices()[0]
    return {
        "streams": _streams(),
        "rounding": _rounding(),
        # Arguments only: the environment may hold keys of other services.
        "command": shlex.join(["python", "-m", "memsep_jax.main", *sys.argv[1:]]),
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
    }


def _now():
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
