"""SIGTERM and Ctrl-C: the first one saves and ends, the second one ends at once."""

import contextlib
import os
import signal
import sys
import threading
from typing import NoReturn

ENDING = (signal.SIGTERM, signal.SIGINT)  # a run ends on these, and saves first


class Interrupted(BaseException):
    """SIGTERM or Ctrl-C, after all that must be saved was saved."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


def leave(code: int) -> NoReturn:
    """Ends this process with an exit code, without the teardown of the interpreter.

    Threads of XLA may still compile after a signal, and they crash once the memory of
    the interpreter is torn down under them. Everything is saved and flushed by then.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody listens any more
            stream.flush()
    os._exit(code)


class Signals:
    """The signals that a run has heard, and whether it ends at once or saves first.

    The first signal raises Interrupted as soon as a call into XLA lets Python run;
    inside `deferred` it sets `stop` instead. Where processes train `together`, it sets
    `heard` alone there, until all of them have agreed on `stop`.
    """

    def __init__(self, together: bool):
        self.together = together
        self.stop: int | None = None
        self.own: int | None = None  # a signal that the others may not know of yet
        self._deferred = 0
        self._handlers: dict = {}
        self._counter: _SignalCounter | None = None

    @property
    def heard(self) -> int | None:
        """The signal that came to this process."""
        return self.stop or self.own

    def listen(self):
        """Takes the signals over, until `close`."""
        # Python delivers signals to the main thread alone, and refuses a handler that
        # another thread sets.
        if threading.current_thread() is threading.main_thread():
            self._counter = _SignalCounter()
            for number in ENDING:
                self._handlers[number] = signal.signal(number, self._on_signal)

    def close(self):
        """Hands the signals back."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._counter:
            self._counter.close()

    @contextlib.contextmanager
    def deferred(self):
        """Makes a signal inside the block only set `stop`: the caller polls and saves.

        Raises: Interrupted at the end, where the caller did not.
        """
        self._deferred += 1
        try:
            yield
        finally:
            self._deferred -= 1
        self.check()

    def check(self):
        """Raises Interrupted where a signal came and nobody defers it."""
        if self.stop is not None and not self._deferred:
            raise Interrupted(self.stop)

    def _on_signal(self, number, frame):
        # First of all: from here on the system ends the process at the next signal,
        # whichever it is. `_SignalCounter` counts one that comes before this is run.
        for other in ENDING:
            signal.signal(other, signal.SIG_DFL)
        if self.together and self._deferred:
            # Not `stop`: a process that left the step alone would hang the others.
            self.own = number
            return
        self.stop = number
        if not self._deferred:
            raise Interrupted(number)


class _SignalCounter:
    """Ends the process at the second signal that Python has not come to handle.

    Python runs its handlers in the main thread and between two instructions, and a call
    into XLA is one: it may compile or compute for minutes. The interpreter itself
    writes the number of each signal that has a handler into a pipe at once, and a
    separate thread reads it here.
    """

    def __init__(self):
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)  # signal.set_wakeup_fd refuses it otherwise
        self._before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._count, daemon=True)
        self._thread.start()

    def _count(self):
        heard = 0
        while number := os.read(self._read, 1):
            heard += number[0] in ENDING  # any signal with a handler is written here
            if heard > 1:
                os._exit(128 + number[0])

    def close(self):
        """Hands the signals back, and ends the thread."""
        # In this order: nothing may write to a closed pipe, the thread ends when it
        # reads the end of the pipe, and it must not read from a closed one.
        signal.set_wakeup_fd(self._before)
        os.close(self._write)
        self._thread.join()
        os.close(self._read)
