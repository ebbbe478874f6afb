"""The nearest training points: ours against faiss and PyTorch.

python benchmarks/neighbours.py [--data=FILE.npz] [--n=50000] [--m=4096] [--k=2]
    [--size=32] [--rounds=5] [--json=FILE.json]

Needs the extra `dev` (faiss-cpu, torch). The images come from an npz (`train_images`,
with queries from `test_images`), or are smooth and random with a spectrum like that of
CIFAR. All search the same images, float32 in [-1, 1], and ours also the uint8 ones, on
a CPU with as many threads as cores. faiss is its exact IndexFlatL2; PyTorch is cdist
and topk, 512 queries at a time. They take turns; the ratio is the time of faiss over
that of the row, of the fastest times and of the medians, so above 1 the row is faster
than faiss. On a GPU, ours and PyTorch run there, and faiss-cpu stays on the CPU.

The first 64 queries are copies of training images, at distance 0, and the next 64
differ from copies by one level of one pixel. The table shows the largest errors of
their distances, and how many get another image. Memory is the peak of a separate
process that searches the uint8 images, above its peak before it has any.
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import statistics
import time

# The device's memory is for two.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import faiss
import jax
import numpy as np
import torch

from memsep_jax import data, neighbours

ALLOWED = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
CORES = len(ALLOWED(0))
COPIES = 64  # and as many that are off by one
BATCH = 512  # queries of PyTorch, which makes all distances of them
PEERS = {"faiss": "faiss IndexFlatL2 (CPU)", "torch": "PyTorch cdist + topk"}


def smooth(n, size, seed):
    """Random images [n, size, size, 3] uint8 whose amplitudes fall as 1 / frequency."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    amplitude = 1 / np.maximum(size * frequency, 1)[None, :, :, None]
    x = np.empty((n, size, size, 3), np.uint8)
    for start in range(0, n, 1_000):
        some = x[start : start + 1_000]
        noise = rng.normal(size=some.shape)
        noise += 2 * rng.normal(size=(*some.shape[:3], 1))  # channels are much alike
        waves = amplitude * np.fft.rfft2(noise, axes=(1, 2))
        field = np.fft.irfft2(waves, (size, size), axes=(1, 2))
        some[:] = data.to_uint8(0.5 * field / field.std())
    return x


def images(args):
    """Training images and queries, uint8; of the latter, the first are copies."""
    if args.data is None:
        points = smooth(args.n, args.size, seed=0)
        queries = smooth(args.m, args.size, seed=1)
    else:
        with np.load(args.data, allow_pickle=False) as file:
            points = file["train_images"][: args.n]
            queries = file["test_images"][: args.m]
    if min(len(points), len(queries)) < 2 * COPIES:
        raise SystemExit(f"of points and queries, at least {2 * COPIES} are needed")
    picked = np.linspace(0, len(points) - 1, 2 * COPIES).astype(int)
    queries[: 2 * COPIES] = points[picked]
    last = queries[COPIES : 2 * COPIES].reshape(COPIES, -1)[:, -1]
    queries[COPIES : 2 * COPIES, -1, -1, -1] = np.where(last < 255, last + 1, 254)
    return points, queries


def peak():
    """The largest resident memory so far, in MB."""
    unit = 1 if platform.system() == "Darwin" else 1_024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def memory(args):
    """MB of a search of uint8 images, above the interpreter, jax, faiss and PyTorch."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_memory, (args,))


def _memory(args):
    neighbours.nearest(np.eye(4), np.eye(4))
    before = peak()
    points, queries = images(args)
    made = peak() - before
    neighbours.nearest(queries, points, args.k)
    return {"images_mb": made, "peak_mb": peak() - before}


def searches(points, queries, k):
    """{name: (seconds to build, (queries) -> distances and indices, its queries)}."""
    floats = data.from_uint8(points)
    asked = data.from_uint8(queries)
    flat = asked.reshape(len(asked), -1)

    def build_faiss():
        index = faiss.IndexFlatL2(flat.shape[1])
        index.add(floats.reshape(len(floats), -1))

        def search(x):
            squares, indices = index.search(x, k)
            return np.sqrt(np.maximum(squares, 0)), indices

        return search

    def build_torch():
        gpu = torch.cuda.is_available() and jax.default_backend() == "gpu"
        device = "cuda" if gpu else "cpu"
        there = torch.from_numpy(floats.reshape(len(floats), -1)).to(device)

        def search(x):
            found = [
                torch.topk(torch.cdist(some.to(device), there), k, largest=False)
                for some in torch.from_numpy(x).split(BATCH)
            ]
            return tuple(
                torch.cat(part).cpu().numpy() for part in zip(*found, strict=True)
            )

        return search

    made = {}
    for name, build, x in (
        ("ours", lambda: neighbours.searcher(floats, k), asked),
        ("ours, uint8", lambda: neighbours.searcher(points, k), queries),
        ("faiss", build_faiss, flat),
        ("torch", build_torch, flat),
    ):
        start = time.perf_counter()
        search = build()
        made[name] = time.perf_counter() - start, search, x
    return made


def errors(distances, indices, points, queries):
    """Largest error and number of wrong images, for copies and those off by one."""
    row = {}
    for name, start, truth in (("copy", 0, 0), ("near", COPIES, 1 / 127.5)):
        of = slice(start, start + COPIES)
        row[f"{name}_error"] = float(np.max(np.abs(distances[of, 0] - truth)))
        steps = np.abs(points[indices[of, 0]].astype(int) - queries[of])
        wrong = steps.sum(axis=(1, 2, 3)) != (name == "near")
        row[f"{name}_wrong"] = int(wrong.sum())
    return row


def measure(args):
    points, queries = images(args)
    made = searches(points, queries, args.k)
    seconds, answers = {name: [] for name in made}, {}
    for turn in range(args.rounds + 1):
        for name, (_, search, x) in made.items():
            start = time.perf_counter()
            answers[name] = search(x)
            if turn:  # the first one compiles
                seconds[name].append(time.perf_counter() - start)
    fastest = {name: min(s) for name, s in seconds.items()}
    median = {name: statistics.median(s) for name, s in seconds.items()}
    return [
        {
            "search": name,
            "n": len(points),
            "m": len(queries),
            "d": points[0].size,
            "build_s": made[name][0],
            "s": fastest[name],
            "median_s": median[name],
            "per_second": len(queries) / fastest[name],
            "ratio": fastest["faiss"] / fastest[name],
            "median_ratio": median["faiss"] / median[name],
            **errors(*answers[name], points, queries),
        }
        for name in made
    ]


def cases(rows, k):
    """Rows for the table of run.py; the minimum is one product and the images once."""
    n, m, d = (rows[0][name] for name in ("n", "m", "d"))
    found = {row["search"]: row for row in rows}
    return [
        {
            "case": f"{kind}, n = {n:,}, d = {d:,}, {m:,} queries, k = {k}",
            "ours_s": found[own]["s"],
            "items": m,
            "unit": "queries",
            "peer": PEERS[peer],
            "peer_s": found[peer]["s"],
            "flops": 2 * n * m * d,
            "bytes": (n + m) * d * itemsize,
            "product": "float32",
        }
        for own, kind, itemsize in (
            ("ours", "float32", 4),
            ("ours, uint8", "uint8", 1),
        )
        for peer in PEERS
    ]


COLUMNS = {  # number: (title, format)
    "build_s": ("build s", ".2f"),
    "s": ("s", ".2f"),
    "per_second": ("queries/s", ".0f"),
    "ratio": ("ratio", ".2f"),
    "median_ratio": ("medians", ".2f"),
    "copy_error": ("copies", ".1e"),
    "copy_wrong": ("wrong", "d"),
    "near_error": ("off by 1", ".1e"),
    "near_wrong": ("wrong", "d"),
}


def show(rows):
    print(f"{'':12}" + "".join(f"{title:>10}" for title, _ in COLUMNS.values()))
    for row in rows:
        cells = (f"{row[name]:10{form}}" for name, (_, form) in COLUMNS.items())
        print(f"{row['search']:12}", *cells, sep="")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="npz with train_images and test_images, uint8")
    sizes = {"n": 50_000, "m": 4_096, "k": 2, "size": 32, "rounds": 5}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", help="write the numbers here too")
    args = parser.parse_args()
    faiss.omp_set_num_threads(CORES)
    torch.set_num_threads(CORES)
    about = {
        "device": f"{jax.devices()[0].device_kind}, {CORES} cores",
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "faiss": faiss.__version__,
            "torch": torch.__version__,
        },
        "images": "smooth random" if args.data is None else "those of an npz",
        "sizes": {name: getattr(args, name) for name in sizes},
    }
    print(about)
    used = memory(args)  # first: a child's peak begins with that of its parent
    print("memory of the search and its images: {peak_mb:.0f} MB".format(**used))
    rows = measure(args)
    show(rows)
    if args.json:
        with open(args.json, "w") as file:
            found = {"about": about, "memory": used, "rows": rows}
            json.dump(found | {"cases": cases(rows, args.k)}, file, indent=2)


if __name__ == "__main__":
    main()
