"""What a run is computed on: random streams, rounding, versions, devices, command."""

import os
import platform
import shlex
import sys
from importlib import metadata
from pathlib import Path

import jax

# The packages whose versions may change a number or the files of a state.
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def streams():
    """The settings that random numbers depend on, apart from the seed.

    Another value of one of them changes every batch, noise and initial weight. In the
    environment the names are in capitals.
    """
    # Each attribute by its own name: no text chooses what is read.
    return {
        "jax_default_prng_impl": jax.config.jax_default_prng_impl,
        "jax_enable_x64": jax.config.jax_enable_x64,
        "jax_random_seed_offset": jax.config.jax_random_seed_offset,
        "jax_threefry_partitionable": jax.config.jax_threefry_partitionable,
    }


def changed_streams(before: dict) -> list[str]:
    """A line for each stream that differs from those that run.json recorded."""
    known = before.get("streams", {})  # an older run recorded none
    return [
        f"{name.upper()}: {known[name]} -> {value}"
        for name, value in streams().items()
        if name in known and known[name] != value
    ]


def _rounding():
    """The settings of a person that change the last bits of a program."""
    # The number of devices is recorded beside it; a dump of programs, or the place of a
    # file, changes no bit, and a path may name a person.
    ignored = ("--xla_force_host_platform_device_count", "--xla_dump")
    flags = os.environ.get("XLA_FLAGS", "").split()
    flags = [f for f in flags if not f.startswith(ignored) and "/" not in f]
    less = "jax_disable_most_optimizations"  # jax.config has no attribute for it
    return {
        "jax_default_matmul_precision": jax.config.jax_default_matmul_precision,
        less: jax.config.values.get(less),
        "XLA_FLAGS": sorted(flags),
    }


def command() -> str:
    """The command of this process, to be given again in the same folder."""
    script = Path(sys.argv[0])
    words = ["python", "-m", "memsep_jax.main"]
    if script.suffix == ".py" and script.name not in ("main.py", "__main__.py"):
        words = ["python", os.path.relpath(script)]  # the launcher, or one's own
    # Arguments only: the environment may hold keys of other services.
    return shlex.join([*words, *sys.argv[1:]])


def current() -> dict:
    """The circumstances that run.json records."""
    device = jax.devices()[0]
    return {
        "streams": streams(),
        "rounding": _rounding(),
        "command": command(),
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
    }


def warnings(before: dict, now: dict) -> list[str]:
    """A line for each circumstance that differs from what the run had before.

    Args: the former and the present contents of run.json.
    """
    lines = []
    for what in ("device", "versions", "rounding"):
        old, new = before.get(what), now[what]
        if isinstance(old, dict):  # an older release recorded fewer of them
            new = {name: value for name, value in new.items() if name in old}
        if old not in (None, new):
            lines.append(
                f"warning: {what} was {old} and is {new}: the bitwise guarantee does "
                "not hold, results agree to rounding"
            )
    return lines
