"""Where a run speaks: lines, tables, and a bar of progress."""

import contextlib
import html
import os
import sys
import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

PLAIN_EVERY = 5.0  # seconds between progress lines where there is no terminal
NOTEBOOK_EVERY = 0.2  # and between the updates of a bar in a notebook


class Terminal(Console):
    """A console that goes on when nobody listens any more (`| head`)."""

    def on_broken_pipe(self):
        """Stays silent from here on, where rich would end the process."""
        self.quiet = True
        # The interpreter flushes stdout when it exits, and would fail once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def progress(console, say, what: str, total: int, done: int = 0):
    """A live bar, also in a notebook, or plain lines where there is neither.

    Yields: update(done, text), which may be called at any rate.
    """
    if console.is_jupyter:
        yield _in_a_notebook(what, total, done)
        return
    if not console.is_terminal:
        yield _plain(say, what, total, done)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(what, total=total, completed=done, text="")
        yield lambda done, text="": bar.update(task, completed=done, text=text)


def _plain(say, what, total, first):
    def show(done, line):
        say(line)

    return _updates(show, what, total, first, PLAIN_EVERY)


def _in_a_notebook(what, total, first):
    # rich would need ipywidgets, and without them print a new bar at each update.
    from IPython.display import display

    def content(done, line):
        bar = f'<progress value="{done}" max="{total}"></progress>'
        return {
            "text/plain": line,
            "text/html": f"<div>{bar} {html.escape(line)}</div>",
        }

    shown = display(content(first, what), raw=True, display_id=True)

    def show(done, line):
        shown.update(content(done, line), raw=True)

    return _updates(show, what, total, first, NOTEBOOK_EVERY)


def _updates(show, what, total, first, every):
    """update(done, text), which calls show(done, line) once in `every` seconds."""
    started, last = time.monotonic(), -every

    def update(done, text=""):
        nonlocal last
        now = time.monotonic()
        # Not the last line, which says that the work is done.
        if now - last < every and done < total:
            return
        last = now
        rate = (done - first) / max(now - started, 1e-9)
        eta = f"{(total - done) / rate:.0f} s" if rate else "?"
        show(done, f"{what} {done}/{total}  {text}  ETA {eta}")

    return update
