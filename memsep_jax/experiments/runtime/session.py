"""One run in one workdir: its lock, its status, the time of its phases."""

import contextlib
import hashlib
import json
import time
from pathlib import Path

import jax

from memsep_jax import parallel
from memsep_jax.checkpoint import ConflictError
from memsep_jax.experiments import record
from memsep_jax.experiments.config import fields, grid, schema
from memsep_jax.experiments.config.build import differences, to_json, watched
from memsep_jax.experiments.runtime import circumstances, locks, terminal, trackers
from memsep_jax.experiments.runtime.processes import WATCH_EVERY, Processes
from memsep_jax.experiments.runtime.signals import Interrupted, Signals
from memsep_jax.experiments.runtime.terminal import Terminal

WAY_OUT = "Give another --workdir, or --allow_config_change to continue anyway"


class Session:
    """Holds a workdir while a run is in it.

    Nothing is written before `begin`. The first SIGTERM or Ctrl-C raises Interrupted
    as soon as a call into XLA lets Python run; inside `deferred`, where a step must be
    finished and saved, it sets `stop` instead. The second one ends the process on the
    spot, wherever it is.

    Of several processes that train together, the first one alone writes and speaks:
    see `processes`.

    Args: shared, whether other processes with the same config may join and take points
      of a sweep: the first one has the workdir, and `lead` waits for it.
      quiet, whether nothing is said; a terminal still shows the bars of progress.
    """

    def __init__(
        self,
        workdir,
        config,
        allow_config_change=False,
        resume_step=None,
        shared=False,
        quiet=False,
    ):
        self.workdir = Path(workdir)
        self.config = config
        self.allow_config_change = allow_config_change
        self.resume_step: int | None = resume_step  # the checkpoint to return to
        self.before: dict = {}  # run.json as the run before this one left it
        self.status: dict = {"seconds": {}}
        # Without emoji: rich would draw one for "my_file:ring:".
        self.console = Terminal(highlight=False, emoji=False, soft_wrap=True)
        self.console.quiet = not parallel.is_first()
        self._shared, self._quiet = shared, quiet
        self._held: int | None = None  # the lock; None where another process leads
        self._begun = False
        self._made: list[Path] = []  # directories that were not there
        self._trackers: dict = {}  # by the workdir of the network
        self._signals = Signals(together=jax.process_count() > 1)
        self._processes = Processes(self.workdir, self._signals, self._fail)

    def __enter__(self):
        alike = json.dumps(
            [to_json(self.config), circumstances.streams()], sort_keys=True
        )
        names = " or ".join(map(str.upper, circumstances.streams()))
        try:
            self._enter()
        except ConflictError as error:
            if self._processes.together:
                # The others wait there, and refuse too.
                self._processes.meet(error, alike, names)
            raise
        if self._processes.together:
            try:
                self._processes.meet(None, alike, names)
            except BaseException as error:
                self.__exit__(type(error), error, None)
                raise
            # Not before: a process that has yet to come has no lock to be seen.
            self._processes.watch()
        return self

    def _enter(self):
        try:
            # Before the lock makes them: `_leave_no_trace` removes these alone.
            places = (self.workdir, *self.workdir.parents)
            self._made = [place for place in places if not place.exists()]
            self._take()
        except OSError as error:
            raise ConflictError(f"{self.workdir} cannot be written: {error}") from error
        self.before = record.read_json(self.workdir / "run.json") or {}
        if self._held is not None:
            self.status["seconds"] = dict(self.before.get("seconds", {}))
        self._signals.listen()
        try:
            self._check_config()
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise

    def _take(self):
        """Takes the workdir, or joins who has it.   Raises: ConflictError."""
        known = to_json(self.config)
        known.pop("run", None)  # changes no result
        text = json.dumps([known, circumstances.streams()], sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest() if self._shared else ""
        path = self._lock_path()
        try:
            self._held = locks.take(path, digest)
        except ConflictError:
            if not self._shared or locks.about(path) != digest:
                raise
            self.say(f"another process is at work in {self.workdir}: this one joins it")

    def _lock_path(self):
        return locks.of_workdir(self.workdir, jax.process_index())

    def __exit__(self, kind, error, trace):
        # While the lock is held, by which the others see that this process lives.
        if error is not None:
            self._processes.linger(error)
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
        elif not self.before and self._held is not None:
            self._leave_no_trace()
        self._signals.close()
        # Last: from here on run.json may be that of another run.
        if self._held is not None:
            locks.release(self._held)

    def _leave_no_trace(self):
        """Removes the lock and the directories that a refused run has made."""
        # rmdir fails, and ends this, where another process has put something there.
        with contextlib.suppress(OSError):
            self._lock_path().unlink()
            if jax.process_count() > 1:  # the others remove theirs
                time.sleep(WATCH_EVERY)
            for place in self._made:
                place.rmdir()

    def lead(self):
        """Waits until this process alone has the workdir, and may write shared files.

        It has to wait where it joined another one, which may still write its report.
        """
        while self._held is None:
            try:
                self._take_over()
            except ConflictError:
                time.sleep(locks.POLL)

    def _take_over(self):
        self._held = locks.take(self._lock_path())
        # The process that led has written its seconds; this one's are added.
        known = record.read_json(self.workdir / "run.json") or {}
        for name, seconds in known.get("seconds", {}).items():
            own = self.status["seconds"].get(name, 0.0)
            self.status["seconds"][name] = round(own + seconds, 2)
        self._write_first()

    def expect(self, fingerprint: str):
        """Checks that the data are those that the run began with.

        Raises: ConflictError.
        """
        if self._processes.together:
            self._processes.agree(
                fingerprint, "read other training data than process 0"
            )
        old = self.before.get("fingerprint")
        if old not in (None, fingerprint) and not self.allow_config_change:
            raise ConflictError(
                f"the data of {self.workdir} changed: their fingerprint was "
                f"{old[:12]} and is {fingerprint[:12]}. {WAY_OUT}"
            )

    def begin(self, fingerprint: str, read=None):
        """Puts the run on disk, where it stays from here on.

        Args: read, the data.Splits or data.Source of its data: its notes are said,
          and the folder of each class is kept in run.json.
        Raises: ConflictError, as `expect`.
        """
        self.expect(fingerprint)
        if read is not None:
            for note in read.notes:
                self.say(f"note: {note}")
            if read.classes is not None:
                self.status["classes"] = dict(enumerate(read.classes))
        if note := grid.outdated(self.config):
            self.say(note)
        self.status |= circumstances.current()
        for line in circumstances.warnings(self.before, self.status):
            self.say(line)
        self.status |= {
            "seed": self.config.seed,
            "started": self.before.get("started", locks.now()),
            "fingerprint": fingerprint,
            "status": "running",
        }
        self._write_first()

    def _write_first(self):
        self._begun = parallel.is_first() and self._held is not None
        # First, so that a longer config never stands beside the "complete" of a shorter
        # run: a start after a kill in between would take it for finished.
        self.write_status()
        if self._begun:
            # Sorted but for the fields of a point, whose first one names its factor.
            known = {
                name: dict(sorted(value.items())) if isinstance(value, dict) else value
                for name, value in sorted(to_json(self.config).items())
            }
            record.write_json(self.workdir / "config.json", known, sort_keys=False)

    # What another config means for a workdir.

    def is_complete(self) -> bool:
        """Whether this very config already ran to its end here."""
        status = record.read_json(self.workdir / "run.json") or {}
        return status.get("status") == "complete" and not [
            name for name, _, _ in self._changes() if not self._harmless(name)
        ]

    def _harmless(self, name):
        """Whether a field changes no number."""
        return schema.role(name) == fields.RUN and name not in watched(self.config)

    def _changes(self):
        old = record.read_json(self.workdir / "config.json")
        if not old:
            return []
        # A field that an older config.json lacks had its default value in effect.
        later = [
            change
            for change in differences(old, to_json(schema.defaults(schema.of(old))))
            if change[1] is None
        ]
        grid.modernize(old)
        new = grid.modernize(to_json(self.config))
        changes = differences(schema.settled(old), schema.settled(new))
        return [change for change in changes if change not in later]

    def _check_config(self):
        """Refuses to go on under a config that would have given other weights."""
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
        """Refuses other random numbers, which kept results would not fit."""
        changed = circumstances.changed_streams(self.before)
        if changed and not self.allow_config_change:
            raise ConflictError(
                f"{self.workdir} holds a run with other random numbers:\n"
                + "".join(f"  {line}\n" for line in changed)
                + f"Set them in the environment as they were. {WAY_OUT}"
            )
        for line in changed:
            self.say(f"warning: {line}: other random numbers from here on")

    # What is said and counted along the run.

    def write_status(self):
        """Writes run.json as it stands, where this process has the workdir."""
        if parallel.is_first() and self._held is not None:
            self.status["updated"] = locks.now()
            record.write_json(self.workdir / "run.json", self.status)

    def _fail(self, text):
        """Records that another process is gone, and that this one ends with it."""
        self.status |= {"status": "failed", "error": text}
        if self._begun:
            self.write_status()

    def say(self, text):
        """Shows the person a line or a table; a closed pipe is not an error."""
        if self._quiet:
            return
        with contextlib.suppress(OSError):
            # The brackets of a text, such as those of a shape, are no markup.
            self.console.print(text, markup=not isinstance(text, str))

    def track(self, row, config=None, workdir=None):
        """Gives a row to run.tracker, which its first row starts.

        Args: config and workdir, of one of several networks; by default of this run.
        """
        config, workdir = config or self.config, workdir or self.workdir
        if workdir not in self._trackers:
            self._trackers[workdir] = trackers.tracker(
                config.run.tracker, workdir, config, self.say
            )
        self._trackers[workdir](row)

    def progress(self, what: str, total: int, done: int = 0):
        """As `terminal.progress`, on this run's console."""
        return terminal.progress(self.console, self.say, what, total, done)

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
    def reporting(self):
        """The phase of a report, which shows the seconds of all phases before it."""
        self.write_status()
        with self.phase("report"):
            yield
        self.write_status()

    # Signals, and the other processes of the run.

    @property
    def stop(self) -> int | None:
        """The signal that ends the run, in all processes; `poll` agrees on it."""
        return self._signals.stop

    @stop.setter
    def stop(self, number):
        self._signals.stop = number

    @property
    def heard(self) -> int | None:
        """The signal that came to this process; `poll` makes it the `stop` of all."""
        return self._signals.heard

    def deferred(self):
        """As `signals.Signals.deferred`: inside, a signal only sets `stop`."""
        return self._signals.deferred()

    def pause(self):
        """Ends work between two calls.   Raises: Interrupted, in `deferred` too."""
        if self.heard is not None:
            raise Interrupted(self.heard)

    def poll(self, now=False):
        """As `processes.Processes.poll`."""
        self._processes.poll(now)

    def share(self, value: int) -> int:
        """The value, not negative, that process 0 has; all call it."""
        return self._processes.share(value)

    def part(self):
        """Parts the processes, as `processes.Processes.part`."""
        self._processes.part()
