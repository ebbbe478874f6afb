"""The machine's limits: rates of large matrix products, and of large arrays in memory.

python benchmarks/limits.py [--side=N] [--megabytes=N] [--seconds=1] [--json=FILE.json]

The upper bounds for the other benchmarks, on all cores of a CPU or one device of
another kind. A product multiplies two square matrices: "float32" at precision
"highest", "default" at that of networks (TF32 on a GPU, float32 on a CPU), and
"bfloat16". Memory is y <- a x + y, which reads two arrays and writes one. Each is
repeated for --seconds, at least three times, and the fastest counts.
"""

import argparse
import json
import os
import platform
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

CPUINFO = Path("/proc/cpuinfo")  # of Linux
ALLOWED = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
CORES = len(ALLOWED(0))
SIZES = {
    # Calls enqueued together: a GPU must not wait for Python between two of them.
    "cpu": {"side": 3_072, "megabytes": 256, "calls": 1},
    "gpu": {"side": 8_192, "megabytes": 1_024, "calls": 10},
}
PRODUCTS = {  # name: (dtype, precision)
    "float32": ("float32", "highest"),
    "default": ("float32", "default"),
    "bfloat16": ("bfloat16", "default"),
}


def device():
    """The name of the processor, or of the device, and the cores."""
    kind = jax.devices()[0].device_kind
    if kind == "cpu":  # jax knows no more of it
        lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
        names = [line.partition(":")[2] for line in lines if "model name" in line]
        kind = " ".join([*names, platform.processor() or kind][0].split())
    return f"{kind}, {CORES} cores"


def fastest(call, carry, calls, seconds):
    """Seconds of each carry -> call(carry), run one after another."""
    carry = jax.block_until_ready(call(carry))  # compiles
    best, turns, end = float("inf"), 0, time.perf_counter() + seconds
    while turns < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(calls):
            carry = call(carry)
        jax.block_until_ready(carry)
        best = min(best, (time.perf_counter() - start) / calls)
        turns += 1
    return best


def product(name, side, calls, seconds):
    """FLOP/s of successive matrix products, each of the previous result."""
    dtype, precision = PRODUCTS[name]
    a = jax.random.normal(jax.random.key(0), (side, side)) / side**0.5
    a = a.astype(dtype)  # of this scale, the answers stay as large as they are
    call = jax.jit(partial(jnp.matmul, precision=precision))
    return 2 * side**3 / fastest(lambda b: call(a, b), a, calls, seconds)


def memory(megabytes, calls, seconds):
    """Bytes/s, read and written."""
    x = jnp.ones(megabytes * 2**20 // 4, jnp.float32)
    call = jax.jit(lambda a, x, y: a * x + y, donate_argnums=2)
    in_place = partial(call, jnp.float32(1e-3), x)
    return 3 * x.nbytes / fastest(in_place, jnp.zeros_like(x), calls, seconds)


def measure(side, megabytes, calls, seconds):
    """{name of a product: FLOP/s, "memory": bytes/s}."""
    found = {}
    for name in PRODUCTS:
        if name == "default" and jax.default_backend() == "cpu":  # the same product
            found[name] = found["float32"]
        else:
            found[name] = product(name, side, calls, seconds)
    return found | {"memory": memory(megabytes, calls, seconds)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    backend = jax.default_backend()
    sizes = SIZES["cpu" if backend == "cpu" else "gpu"]
    for name in ("side", "megabytes"):
        parser.add_argument(f"--{name}", type=int, default=sizes[name])
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--json", help="write the numbers here too")
    args = parser.parse_args()
    about = {
        "backend": backend,
        "device": device(),
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "sizes": {"side": args.side, "megabytes": args.megabytes},
    }
    print(about)
    found = measure(args.side, args.megabytes, sizes["calls"], args.seconds)
    for name, rate in found.items():
        unit = "GB/s" if name == "memory" else "GFLOP/s"
        print(f"  {name:10}{rate / 1e9:10,.1f} {unit}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"about": about, "limits": found}, file, indent=2)


if __name__ == "__main__":
    main()
