"""The analytic scores against dense forms of them in PyTorch.

python benchmarks/analytic.py [--n=4000] [--batch=8] [--size=32] [--patch=5]
    [--rounds=3] [--json=FILE.json]

Needs the extra `dev` (torch). Everything is float32, on smooth random images [size,
size, 3] with a spectrum like that of photographs, at t = 0.1. The forms of PyTorch are
those of the published codes, without what they waste: all squared distances at once, a
softmax, a product. `equivariant_local` takes 50 of the n images, as each of them has so
many patches. What is computed once, such as eigenvectors, is not timed, in both. Both
take turns, each called twice in its turn, and the fastest counts.
"""

import argparse
import importlib.util
import json
import math
import multiprocessing
import os
import platform
import time
from functools import partial
from pathlib import Path

# The device's memory is for two.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

from memsep_jax import memory

if __name__ == "__main__":  # as the command line does, before jax is imported
    memory.keep()

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F

from memsep_jax import analytic, data, process

# By its path: a script's folder is not on the path of what imports it.
SPEC = importlib.util.spec_from_file_location(
    "neighbours", Path(__file__).with_name("neighbours.py")
)
neighbours = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(neighbours)

OU = process.ornstein_uhlenbeck()
T = 0.1
ALPHA, V = math.exp(-T / 2), -math.expm1(-T)
CHANNELS = 3
THRESHOLD = 0.05
FEW = 50  # images for equivariant_local


def queries(images, count):
    rng = np.random.default_rng(1)
    x0 = images[rng.integers(0, len(images), count)]
    return np.float32(ALPHA * x0 + math.sqrt(V) * rng.normal(size=x0.shape))


def dense_gaussian(images):
    """The solution of a linear system with the covariance [d, d]."""
    flat = images.flatten(1)
    mean, covariance = flat.mean(0), torch.cov(flat.T, correction=0)

    def score(x):
        system = ALPHA**2 * covariance + V * torch.eye(len(mean))
        gap = x.flatten(1) - ALPHA * mean
        return -torch.linalg.solve(system, gap.T).T.reshape(x.shape)

    return score


def dense_local(images, patch):
    """Sums of squared differences [b, n, h, w] over patches, by an average pool."""

    def score(x):
        squares = ((x[:, None] - ALPHA * images[None]) ** 2).sum(4)
        sums = F.avg_pool2d(squares, patch, 1, patch // 2, divisor_override=1)
        weights = torch.softmax(-sums / (2 * V), 1)
        return (ALPHA * torch.einsum("bnhw,nhwc->bhwc", weights, images) - x) / V

    return score


def dense_equivariant(images, patch):
    """All pairs of inner patches, at once; the border is left out."""
    inside = slice(patch // 2, -(patch // 2))

    def cut(a):
        flat = F.unfold(a.permute(0, 3, 1, 2), patch)
        return flat.permute(0, 2, 1).reshape(-1, flat.shape[1])

    def score(x):
        points, at = cut(images), cut(x)
        squares = torch.cdist(at, ALPHA * points) ** 2
        centres = images[:, inside, inside].reshape(-1, CHANNELS)
        means = torch.softmax(-squares / (2 * V), 1) @ centres
        inner = x[:, inside, inside]
        return (ALPHA * means.reshape(inner.shape) - inner) / V

    return score


def dense_covariance(images):
    """Masked sums of squared differences [b, n, d], by one product."""
    flat = images.flatten(1)
    values, vectors = torch.linalg.eigh(torch.cov(flat.T, correction=0))

    def score(x):
        shrunk = ALPHA**2 * values / (ALPHA**2 * values + V)
        rows = ((vectors * shrunk) @ vectors.T).abs()
        mask = (rows >= THRESHOLD * rows.amax(1, keepdim=True)).float()
        squares = (x.flatten(1)[:, None] - ALPHA * flat[None]) ** 2
        weights = torch.softmax(-(squares @ mask.T) / (2 * V), 1)
        mean = torch.einsum("bnd,nd->bd", weights, flat)
        return ((ALPHA * mean - x.flatten(1)) / V).reshape(x.shape)

    return score


def rungs(images, patch):
    """(name, images that it takes, ours, PyTorch's, FLOPs of a query)."""
    n, h, w, c = images.shape
    few, d = images[:FEW], h * w * c
    inside, there = (h - patch + 1) * (w - patch + 1), torch.from_numpy
    rank = min(n - 1, d)
    return [
        ("gaussian", images, lambda data: analytic.gaussian(images, OU),
         dense_gaussian(there(images)), 4 * d * rank),
        (f"local, patch {patch}", images, lambda data: analytic.local(data, OU, patch),
         dense_local(there(images), patch), n * (5 * d + 2 * h * w * (h + w))),
        (f"equivariant_local, patch {patch}", few,
         lambda data: analytic.equivariant_local(data, OU, patch),
         dense_equivariant(there(few), patch),
         2 * len(few) * inside**2 * c * (patch**2 + 1)),
        (f"covariance_local, threshold {THRESHOLD}", images,
         lambda data: analytic.covariance_local(images, OU, THRESHOLD),
         dense_covariance(there(images)), n * (2 * d * d + 5 * d)),
    ]  # fmt: skip


def measure(n, batch, size, patch, rounds):
    """Rows for the table of run.py."""
    images = data.from_uint8(neighbours.smooth(n, size, seed=0))
    x = queries(images, batch)
    cases = []
    for name, points, make, dense, flops in rungs(images, patch):
        form = jax.jit(
            lambda data, x, t, make=make: jax.vmap(make(data), (0, None))(x, t)
        )
        calls = {
            "ours": partial(form, jnp.asarray(points), jnp.asarray(x), T),
            "peer": partial(torch.no_grad()(dense), torch.from_numpy(x)),
        }
        seconds, answers = {who: [] for who in calls}, {}
        for turn in range(rounds + 1):
            for who, call in calls.items():
                # PyTorch's threads go on spinning for a while after its call.
                jax.block_until_ready(call())
                start = time.perf_counter()
                answers[who] = np.asarray(jax.block_until_ready(call()))
                if turn:  # the first one compiles
                    seconds[who].append(time.perf_counter() - start)
        best = {who: min(values) for who, values in seconds.items()}
        border = (size - answers["peer"].shape[1]) // 2
        inner = slice(border, size - border)
        gap = answers["ours"][:, inner, inner] - answers["peer"]
        row = {
            "case": f"{name}, n = {len(points):,}, {size} x {size}, batch {batch}",
            "ours_s": best["ours"],
            "items": batch,
            "unit": "scores",
            "peer": "dense PyTorch",
            "peer_s": best["peer"],
            "flops": flops * batch,
            "bytes": 4 * (points.size + 2 * x.size),
            "product": "float32",
            "difference": float(np.linalg.norm(gap) / np.linalg.norm(answers["peer"])),
        }
        print(
            f"{row['case']}: {1e3 * row['ours_s']:.1f} ms, dense PyTorch "
            f"{1e3 * row['peer_s']:.1f} ms, {row['peer_s'] / row['ours_s']:.2f}x, "
            f"difference {row['difference']:.1e}"
        )
        cases.append(row)
    return cases


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = {"n": 4_000, "batch": 8, "size": 32, "patch": 5, "rounds": 3}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", help="write the numbers here too")
    args = parser.parse_args()
    # What PyTorch does: products of less than float32 are not the same function.
    jax.config.update("jax_default_matmul_precision", "highest")
    device = jax.devices()[0]
    sizes = {name: getattr(args, name) for name in sizes}
    about = {
        "device": f"{device.device_kind}, {multiprocessing.cpu_count()} cores",
        "versions": {"python": platform.python_version(), "jax": jax.__version__,
                     "torch": torch.__version__},
        "data": "smooth random",
        "sizes": sizes,
    }  # fmt: skip
    print(about)
    found = {"about": about, "cases": measure(**sizes)}
    if args.json:
        with open(args.json, "w") as file:
            json.dump(found, file, indent=2, default=float)


if __name__ == "__main__":
    main()
