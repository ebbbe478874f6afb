"""The empirical score against its dense forms: speed, memory, rounding.

python benchmarks/empirical_score.py [--parts speed memory rounding] [--n=5000]
    [--batch=256] [--rounds=6] [--data=FILE.npz] [--json=FILE.json]

Needs the extra `dev` (torch). Everything is float32, on images of 32 x 32 x 3 from an
npz (`train_images`), or on uniform noise where none is given. Queries are noised points
at t = 0.1, where a few points have all of the weight and ours leaves out the second of
two products, and at t = 8, where all points have weight; also of an eighth of the
batch. All forms of a table take turns in one run, each of them
called twice in its turn, and the ratios compare their fastest times. On a GPU the
default sizes differ, PyTorch goes through torch.compile, and no product is TF32. Memory
is resident memory, so it is measured only on a CPU.
"""

import argparse
import json
import math
import multiprocessing
import os
import platform
import threading
import time

# The device's memory is for two.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

from memsep_jax import memory

if __name__ == "__main__":  # as the command line does, before jax is imported
    memory.keep()

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import torch

from memsep_jax import data, empirical, process

OU = process.ornstein_uhlenbeck()
D = 32 * 32 * 3
TIMES = (1e-4, 1e-3, 1e-2, 0.1, 1.0)
SHARP, DIFFUSE = 0.1, 8.0  # one point has all the weight; all have some
SIZES = {
    "cpu": {"n": 5_000, "batch": 256, "rounds": 6},
    "gpu": {"n": 50_000, "batch": 1_024, "rounds": 6},
}


def images(path, n):
    """n points [n, 3072] float32 in [-1, 1]; repeated with noise where too few."""
    rng = np.random.default_rng(0)
    if path is None:
        return rng.uniform(-1, 1, (n, D)).astype(np.float32)
    with np.load(path, allow_pickle=False) as file:
        x = data.from_uint8(file["train_images"]).reshape(-1, D)
    if len(x) < n:
        more = x[rng.integers(0, len(x), n - len(x))]
        x = np.concatenate([x, more + rng.normal(0, 0.3, more.shape)])
    return x[:n].astype(np.float32)


def noised(points, count, t):
    rng = np.random.default_rng(1)
    x0 = points[rng.integers(0, len(points), count)].astype(np.float64)
    alpha, sigma = np.exp(-t / 2), np.sqrt(-np.expm1(-t))
    return (alpha * x0 + sigma * rng.normal(size=x0.shape)).astype(np.float32)


def ours(points, x, t):
    return jax.vmap(empirical.score(points, OU), (0, None))(x, t)


def dense_jax(points, x, t):
    alpha, v = OU.alpha(t), OU.sigma(t) ** 2
    squares = jnp.sum(x**2, 1)[:, None] - 2 * alpha * x @ points.T
    squares = squares + alpha**2 * jnp.sum(points**2, 1)[None]
    weights = jax.nn.softmax(-squares / (2 * v), axis=1)
    return (alpha * weights @ points - x) / v


@torch.no_grad()
def dense_torch(points, x, t):
    alpha, v = math.exp(-t / 2), -math.expm1(-t)
    weights = torch.softmax(-(torch.cdist(x, alpha * points) ** 2) / (2 * v), 1)
    return (alpha * weights @ points - x) / v


def speed(path, n, batch, t, rounds):
    """Milliseconds of one batch of scores, and ratios."""
    points = images(path, n)
    x = noised(points, batch, t)
    on_device = jnp.asarray(points), jnp.asarray(x), jnp.float32(t)
    gpu = torch.cuda.is_available() and jax.default_backend() == "gpu"
    there = "cuda" if gpu else "cpu"
    in_torch = torch.from_numpy(points).to(there), torch.from_numpy(x).to(there), t
    in_one = torch.compile(dense_torch) if gpu else dense_torch
    first = jax.jit(lambda x, points: x @ points.T)
    second = jax.jit(lambda w, points: w @ points)
    w = first(on_device[1], on_device[0])

    def products():
        return first(on_device[1], on_device[0]), second(w, on_device[0])

    def in_pytorch():
        answer = in_one(*in_torch)
        return (torch.cuda.synchronize(), answer)[1] if gpu else answer

    our_form, their_form = jax.jit(ours), jax.jit(dense_jax)
    forms = {
        "memsep_jax": (lambda: our_form(*on_device)),
        "dense JAX": (lambda: their_form(*on_device)),
        "dense PyTorch": in_pytorch,
        "the two matrix products alone": products,
    }
    seconds = {name: [] for name in forms}
    for turn in range(rounds + 1):
        for name, form in forms.items():
            # PyTorch's threads go on spinning for a while after its call.
            jax.block_until_ready(form())
            start = time.perf_counter()
            jax.block_until_ready(form())
            if turn:  # the first one compiles
                seconds[name].append(time.perf_counter() - start)
    best = {name: min(values) for name, values in seconds.items()}
    own = best["memsep_jax"]
    print(f"\nn = {n:,}, batch {batch}, d = {D}, t = {t:g}, fastest of {rounds} turns")
    rows = {}
    for name, value in best.items():
        rate = 4 * n * batch * D / value / 1e9
        rows[name] = {"ms": 1e3 * value, "gflops": rate, "ours_is_faster": value / own}
        print(
            f"  {name:32}{1e3 * value:8.1f} ms {rate:7.0f} GFLOP/s {value / own:6.2f}x"
        )
    return rows


def cases(found, n, batch, t):
    """Rows for the table of run.py, with the FLOPs of two products and least bytes."""
    own, *peers = found
    return [
        {
            "case": f"n = {n:,}, d = {D:,}, batch {batch:,}"
            + (", all points weigh" if t == DIFFUSE else ""),
            "ours_s": found[own]["ms"] / 1e3,
            "items": batch,
            "unit": "scores",
            "peer": peer,
            "peer_s": found[peer]["ms"] / 1e3,
            "flops": 4 * n * batch * D,
            "bytes": 4 * (n + 2 * batch) * D,
            "product": "float32",
        }
        for peer in peers
    ]


def memory(path, n=50_000, batch=1_024):
    """Peak memory beyond data and queries, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        found = pool.apply(_memory, (path, n, batch))
    print(f"\nn = {n:,}, batch {batch:,}: {found['extra_mb']:.0f} MB beyond the data")
    return found


def _memory(path, n, batch):
    points = images(path, n)
    x = jnp.asarray(noised(points, batch, 0.1))
    points = jax.block_until_ready(jnp.asarray(points))
    compiled = jax.jit(ours).lower(points, x, 0.1).compile()
    resident, seen, done = psutil.Process().memory_info, [], threading.Event()

    def watch():
        while not done.is_set():
            seen.append(resident().rss)
            done.wait(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    jax.block_until_ready(compiled(points, x, 0.1))
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    return {"extra_mb": (max(seen) - seen[0]) / 2**20, "seconds": seconds}


def rounding(path, n=1_000, count=256):
    """Relative error of the denoiser against float64, at noised points and midway.

    Midway between two points the rounding of alpha to float32 moves the weights, in
    every float32 form; so there also against float64 that takes alpha as rounded.
    """
    points = images(path, n)
    forms = {
        "ours": jax.jit(jax.vmap(_denoiser, (None, 0, None))),
        "differences": jax.jit(jax.vmap(_differences, (None, 0, None))),
    }
    rng = np.random.default_rng(2)
    pairs = np.stack([rng.permutation(n)[:2] for _ in range(count)])
    middles = points[pairs].astype(np.float64).mean(axis=1)
    rows = []
    print(
        "\nrelative error of the denoiser against float64: ours (float32 differences)"
    )
    for t in TIMES:
        alpha, v = np.exp(-t / 2), -np.expm1(-t)
        rounded = [float(f(jnp.float32(t))) for f in OU]
        near = noised(points, count, t)
        middle = (alpha * middles).astype(np.float32)
        truths = {
            "noised, largest": (near, _float64(points, near, alpha, v)),
            "midway, mean": (middle, _float64(points, middle, alpha, v)),
            "midway, mean, alpha as rounded": (
                middle,
                _float64(points, middle, rounded[0], rounded[1] ** 2),
            ),
        }
        row = {"t": t}
        for what, (x, truth) in truths.items():
            row[what] = {}
            for name, form in forms.items():
                error = np.asarray(form(points, x, np.float32(t)), np.float64) - truth
                error = np.linalg.norm(error, axis=1) / np.linalg.norm(truth, axis=1)
                pick = error.max() if "largest" in what else error.mean()
                row[what][name] = float(pick)
        rows.append(row)
        cells = (f"{k} {r['ours']:.1e} ({r['differences']:.1e})"
                 for k, r in row.items() if k != "t")  # fmt: skip
        print(f"  t = {t:<7g}" + "   ".join(cells))
    return rows


def _denoiser(points, x, t):
    return empirical.denoiser(points, OU)(x, t)


def _differences(points, x, t):
    weights = empirical.posterior_weights(points, OU, x, t)
    return jnp.matmul(weights, points, precision="highest")


def _float64(points, x, alpha, v):
    points, x = points.astype(np.float64), x.astype(np.float64)
    means = []
    for one in x:
        logits = -((one - alpha * points) ** 2).sum(1) / (2 * v)
        weights = np.exp(logits - logits.max())
        means.append(weights @ points / weights.sum())
    return np.stack(means)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="npz with train_images; uniform noise without")
    cpu = jax.default_backend() == "cpu"
    parts = ("speed", "memory", "rounding")
    chosen = parts if cpu else ("speed", "rounding")
    parser.add_argument("--parts", nargs="+", choices=parts, default=chosen)
    sizes = SIZES["cpu" if cpu else "gpu"]
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", help="write the numbers here too")
    args = parser.parse_args()
    # What PyTorch does: products of less than float32 are not the same function.
    jax.config.update("jax_default_matmul_precision", "highest")
    device = jax.devices()[0]
    about = {
        "device": f"{device.device_kind}, {multiprocessing.cpu_count()} cores",
        "versions": {"python": platform.python_version(), "jax": jax.__version__,
                     "torch": torch.__version__},
        "data": "uniform noise" if args.data is None else "images of an npz",
        "sizes": {name: getattr(args, name) for name in sizes},
    }  # fmt: skip
    print(about)
    found = {"about": about}
    if "speed" in args.parts:
        found |= {"speed": [], "cases": []}
        for batch, t in (
            (args.batch, SHARP),
            (args.batch, DIFFUSE),
            (max(1, args.batch // 8), SHARP),
        ):
            rows = speed(args.data, args.n, batch, t, args.rounds)
            found["speed"].append({"batch": batch, "t": t, "forms": rows})
            found["cases"] += cases(rows, args.n, batch, t)
    if "memory" in args.parts:
        found["memory"] = memory(args.data)
    if "rounding" in args.parts:
        found["rounding"] = rounding(args.data)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(found, file, indent=2, default=float)


if __name__ == "__main__":
    main()
