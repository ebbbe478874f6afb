"""Freed memory of the process: kept for the next step, or given back.

Loads no numpy and no jax: `keep` must come before both.
"""

import contextlib
import ctypes
import functools

# glibc's numbers of what mallopt sets (malloc.h).
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep() -> None:
    """Lets the C library keep what is freed, for what is asked for next.

    Call it first in a process, before numpy and jax are imported, as the command line
    does. A program of XLA on a CPU asks for its temporary memory anew in each call, and
    glibc maps pieces above 32 MB anew each time: the kernel then writes zeros to tens
    of thousands of pages in each step of a training, a quarter of its time. Threads
    share one arena, so that what one of them freed serves the others. The heap has
    gaps, so a process may hold more: 1.3 times as much was seen where a step needs
    571 MB. Nothing happens where the C library is another one.
    """
    # AttributeError: no mallopt (macOS); OSError, TypeError: no CDLL(None) (Windows).
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_ARENA_MAX, 1)


def give_back() -> None:
    """Gives all freed memory back to the system, where glibc has it.

    glibc keeps small pieces even without `keep`: 0.3 GiB after the searches of 1,000
    images of 256 x 256.
    """
    _trim()(0)


@functools.cache
def _trim():
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return lambda pad: 0
