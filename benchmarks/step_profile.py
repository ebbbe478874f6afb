"""Where the time of a training step goes: a trace of its kernels, by what they do.

python benchmarks/step_profile.py [--config=configs/digits.py] [--steps=100]
    [--json=FILE.json]

A kernel belongs to the part of the step whose operations it computes, according to the
compiled program: the forward pass, the backward pass, times and noise, and the update
(clipping, optimizer, mask, EMA, norms, and the guard that keeps the state where a value
is not finite). The kinds are products, copies and selects. Kernels may run at the same
time, so the shares are of the sum of their times, not of the clock.
"""

import argparse
import collections
import glob
import json
import platform
import re
import tempfile

from memsep_jax import memory

if __name__ == "__main__":  # as the command line does, before jax is imported
    memory.keep()

import jax
import numpy as np

from memsep_jax import parallel
from memsep_jax.experiments import training
from memsep_jax.experiments.config import build, command
from memsep_jax.experiments.studies import training_run

PARTS = ("forward", "backward", "times and noise", "update", "not named")
KINDS = ("products", "copies", "selects")


def part(scope: str) -> str:
    """The part of the step that an operation belongs to, by its name in the program."""
    if "transpose(jvp(" in scope:
        return "backward"
    if "jvp(" not in scope:
        return "update" if scope else "not named"
    # The network is a module, which has a name of its own.
    return "forward" if re.search(r"\([A-Z]\w*\)", scope) else "times and noise"


def kinds(kernel: str, scope: str) -> list[str]:
    """The kind of work of a kernel; most have none."""
    found = {
        # "ynn" is the library of a CPU: a product, with what follows it.
        "products": kernel.startswith(("dot", "ynn"))
        or any(f"{name}_general" in scope for name in ("dot", "conv")),
        "copies": kernel.startswith(("copy", "transpose")),
        "selects": "select_n" in scope,
    }
    return [kind for kind, is_so in found.items() if is_so]


def shares(kernels) -> dict[str, float]:
    """{part or kind: share of the time}.   Args: (name, scope, nanoseconds) of each."""
    spent: collections.Counter = collections.Counter()
    for name, scope, time in kernels:
        for what in (part(scope), *kinds(name, scope)):
            spent[what] += time
    total = sum(spent[name] for name in PARTS)
    return {name: spent[name] / total for name in (*PARTS, *KINDS)}


def traced(config, steps):
    """(name, scope, nanoseconds) of the kernels of steps; their number per step."""
    parts, mesh = build.build(config), parallel.make_mesh()
    state = training_run.initial_state(config, parts)
    size = config.train.batch_size
    batch = jax.tree.map(lambda a: a[np.arange(size) % len(a)], parts.splits.train)
    step = jax.jit(training.make_step(config, parts, mesh), donate_argnums=0)
    step = step.lower(state, batch, None).compile()
    scopes = dict(re.findall(r'%([\w.-]+) = .*op_name="([^"]*)"', step.as_text()))
    state, _ = jax.block_until_ready(step(state, batch, None))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(steps):
                state, metrics = step(state, batch, None)
                jax.block_until_ready(metrics)
        (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        planes = jax.profiler.ProfileData.from_file(path).planes
        events = (e for plane in planes for line in plane.lines for e in line.events)
        kernels = [
            (event.name, scopes.get(event.name, ""), event.duration_ns)
            for event in events
            if "hlo_op" in dict(event.stats)
        ]
    return kernels, len(kernels) / steps


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/digits.py")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--json", help="write the numbers here too")
    args = parser.parse_args()
    kernels, each = traced(command.load(args.config), args.steps)
    found = {
        "config": args.config,
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "kernels": each,
        "kernel_ms": sum(time for *_, time in kernels) / args.steps / 1e6,
        "shares": shares(kernels),
    }
    print(f"{each:,.0f} kernels a step, {found['kernel_ms']:.3g} ms of them")
    for name in (*PARTS, *KINDS):
        print(f"  {name:18}{found['shares'][name]:8.1%}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(found, file, indent=2)


if __name__ == "__main__":
    main()
