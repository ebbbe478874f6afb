"""Compiled programs on disk, so that the next process starts in seconds."""

import hashlib
import os
import platform
from pathlib import Path

import jax

from memsep_jax.experiments.runtime import cache

_CPUINFO = Path("/proc/cpuinfo")  # of Linux
_SAYS = ("model name", "flags", "CPU implementer", "CPU part", "Features")
_EVERY = {  # how slow to compile and how large a program must be: jax's default, ours
    "jax_persistent_cache_min_compile_time_secs": (1.0, 0.0),
    "jax_persistent_cache_min_entry_size_bytes": (0, -1),
}


def keep(folder: Path | None = None) -> None:
    """Uses jax's persistent compilation cache in a folder; what a person set stays.

    Every program is kept, however small. A processor has a folder of its own in it:
    programs for one may not run on another, and a home or a workdir is often that of
    many machines. Where nothing can be written, nothing is kept. Not for processes
    that train together, where each must compile what the others do.

    Args: folder; None is memsep_jax in the user's cache directory.
    """
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    try:
        place = (folder or cache.folder()) / _processor()
        place.mkdir(parents=True, exist_ok=True)
        if not os.access(place, os.W_OK):
            return
    except (OSError, RuntimeError):  # RuntimeError: a user without a home
        return
    cache.forget(place)
    jax.config.update("jax_compilation_cache_dir", str(place))
    for name, (default, value) in _EVERY.items():
        if jax.config.values[name] == default:
            jax.config.update(name, value)


def _processor():
    lines = _CPUINFO.read_text().splitlines() if _CPUINFO.exists() else []
    said = sorted({line for line in lines if line.startswith(_SAYS)})
    text = "\n".join([platform.machine(), platform.processor(), *said])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
