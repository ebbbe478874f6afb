"""Processes that train one network together: they meet, vote, and watch each other."""

import contextlib
import hashlib
import os
import sys
import threading
import time

import jax
import numpy as np

from memsep_jax import parallel
from memsep_jax.checkpoint import ConflictError
from memsep_jax.experiments.runtime import locks

WATCH_EVERY = 0.5  # seconds between looks at the other processes of a run
LINGER = 5.0  # seconds that a failed process leaves the others to fail in their own way
SHARED_IN = 20.0  # seconds that a shared directory may take to show a file elsewhere


class Processes:
    """The processes of a run that train together; a single one does nothing here.

    They `meet` at the start and `part` when training is over; in between, `poll` sets
    `stop` on all of them at the same step, and none goes on without another: each holds
    a lock in the workdir, and watches those of the others.

    Args: signals, of this process; fail, (text) -> None, is called where another
      process is gone, before this one ends.
    """

    def __init__(self, workdir, signals, fail):
        self.together = jax.process_count() > 1
        self._workdir, self._signals, self._fail = workdir, signals, fail
        self._votes = None
        self._watch: threading.Thread | None = None
        self._over = threading.Event()

    def meet(self, error, alike: str, names: str):
        """All processes begin as one, or none does.

        Args: error, of this one, or None; alike, a text that must be the same for all,
          and names, the words for it.
        Raises: ConflictError.
        """
        # The lock of process 0 names its host, pid and time: who reads the same words
        # has the same directory.
        mine = locks.of_workdir(self._workdir, 0)
        token = _digest(mine.read_text() if mine.exists() else "")
        # A process that failed comes here too: the others would wait for it.
        rows = np.asarray(parallel.gather([error is not None, *token]))
        if rows[:, 0].any():
            self.part()
            wrong = int(np.flatnonzero(rows[:, 0])[0])
            raise error or ConflictError(
                f"process {wrong} could not begin: see what it says"
            )
        self.agree(
            alike, f"was given another config than process 0, or another {names}"
        )
        limit = time.monotonic() + SHARED_IN
        # A network file system may show a file of another host late.
        while token != rows[0, 1:].tolist() and time.monotonic() < limit:
            time.sleep(0.2)
            token = _digest(mine.read_text() if mine.exists() else "")
        self._compare(
            token,
            f"does not see in {self._workdir} what process 0 wrote there, and all need "
            "one directory",
        )

    def agree(self, text: str, what: str):
        """Raises ConflictError on all processes where one has another text."""
        self._compare(_digest(text), what)

    def _compare(self, words, what):
        rows = np.asarray(parallel.gather(words))
        wrong = np.flatnonzero((rows != rows[:1]).any(axis=1))
        if wrong.size:
            self.part()  # all do, as all have the same rows
            raise ConflictError(
                f"process {', '.join(map(str, wrong))} {what}: give all processes the "
                "same command, data and --workdir"
            )

    def poll(self, now=False):
        """Agrees on `stop` with the other processes: all call it, once in a step.

        Args: now, to wait for their votes; else the votes are those of the step before,
          so that no device waits for them.
        """
        if self.together:
            own = parallel.gather([self._signals.own or 0])
            votes, self._votes = self._votes, own
            votes = self._votes if now else votes
            if votes is not None:  # 0 of all processes is no signal
                self._signals.stop = int(np.asarray(votes).max()) or None

    def share(self, value: int) -> int:
        """The value, not negative, that process 0 has; all call it."""
        if self.together:
            value = int(np.asarray(parallel.gather([value]))[0, 0])
        return value

    def part(self):
        """Parts the processes: from here on each is alone.

        Raises: Interrupted where one of them heard a signal.
        """
        if self.together:
            # The last vote, for a signal that came after the last `poll`.
            heard = np.asarray(parallel.gather([self._signals.own or 0])).max()
            # Nobody watches any more when the first process ends: its orderly end would
            # be taken for a loss.
            self._over.set()
            if self._watch:
                self._watch.join()
                self._watch = None
            np.asarray(parallel.gather([0]))  # all have ceased to watch the others
            jax.distributed.shutdown()
            self.together = self._signals.together = False
            self._signals.stop = self._signals.stop or int(heard) or None
            self._signals.check()

    def watch(self):
        """Ends this process when another one is gone, for which it would wait."""
        if self.together:
            self._watch = threading.Thread(target=self._watch_others, daemon=True)
            self._watch.start()

    def linger(self, error):
        """Gives the others time to fail in their own way, after an error here."""
        if self._watch and not hasattr(error, "exit_code"):
            # What needs another process fails, as a JaxRuntimeError or a ValueError;
            # the watch knows which one is gone, and ends this one.
            self._watch.join(LINGER)
        if self._watch:
            # Others may have the same error to report. The first process leaves last:
            # the service of jax lives in it, and jax ends the others when it is gone.
            self._over.set()
            limit = time.monotonic() + LINGER * (1 + 2 * parallel.is_first())
            while time.monotonic() < limit and not (
                parallel.is_first() and all(map(self._gone, self._others()))
            ):
                time.sleep(WATCH_EVERY)

    def _others(self):
        return [i for i in range(jax.process_count()) if i != jax.process_index()]

    def _gone(self, index):
        return locks.gone(locks.of_workdir(self._workdir, index))

    def _watch_others(self):
        while not self._over.wait(WATCH_EVERY):
            for index in self._others():
                owner = self._gone(index)
                # `_over` again: all may have parted since the loop began.
                if owner is None or self._over.is_set():
                    continue
                text = (
                    f"process {index} of {jax.process_count()} ({owner}) is gone, and "
                    "this one cannot go on without it. Give all of them the same "
                    "command again: it goes on from the last checkpoint"
                )
                with contextlib.suppress(OSError):
                    self._fail(text)
                    sys.stderr.write(f"error: {text}\n")
                    sys.stderr.flush()
                # The main thread may wait in a call that never returns, and so would
                # never see an exception.
                os._exit(parallel.MISSING)


def _digest(text) -> list[int]:
    """A digest, as numbers that processes can gather."""
    digest = hashlib.sha256(text.encode()).digest()[:16]
    return np.frombuffer(digest, np.uint32).tolist()
