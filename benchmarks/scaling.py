"""The cost of more points, pixels, width and devices: measured, modelled, planned.

python benchmarks/scaling.py [--quick] [--json=FILE.json] [--markdown=FILE.md]

Cost: the seconds of the empirical score, of the neighbour search, of a DiT's training
step and of the power iteration, with one size varied at a time. An exponent is the
slope of log seconds against log size, by least squares, with its standard error.

Model: seconds = FLOPs of the matrix products / rate of a product + bytes / bandwidth,
with both limits measured in the same run, and each array that must pass through memory
counted by hand. All products are float32 (precision "highest" on any device).

Devices: the same on 1, 2 and 4 devices. Those of a CPU are fake and share its cores, so
the interesting numbers are not their seconds, but that the results equal those of one
device, and what each device computes, holds and sends according to the compiled
program.

Plan: memory, seconds and communication of 10^8 images on 256 assumed devices, the work
of a host by its measured rate, and the n at which each part breaks.

With --markdown, these tables replace those between the marks in FILE.md.
"""

import argparse
import importlib.util
import json
import math
import os
import platform
import re
import textwrap
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
import optax

from memsep_jax import (
    checkpoint,
    data,
    empirical,
    lipschitz,
    neighbours,
    parallel,
    process,
    streaming,
    train,
)
from memsep_jax.data import batches
from memsep_jax.models import DiT

SPEC = importlib.util.spec_from_file_location(
    "limits", Path(__file__).with_name("limits.py")
)
limits = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(limits)

OU = process.ornstein_uhlenbeck()
T, LAW = np.float32(0.1), process.uniform(0.01, 1.0)
LATE = np.float32(3.0)  # where many points explain one
FLOAT = 4  # bytes
PATCH, SIDE, HEAD = 2, 16, 32  # of the DiT that is timed: 64 tokens, heads of size 32


def machine_limits(quick=False):
    """FLOP/s of a float32 product, and bytes/s read and written."""
    sizes = limits.SIZES["cpu" if jax.default_backend() == "cpu" else "gpu"]
    side, megabytes = (512, 16) if quick else (sizes["side"], sizes["megabytes"])
    turns = {"calls": sizes["calls"], "seconds": 0.1 if quick else 0.5}
    return {
        "float32": limits.product("float32", side, **turns),
        "bandwidth": limits.memory(megabytes, **turns),
    }


def best(calls, turns):
    """The fastest seconds of each call; the calls take turns."""
    seconds = [math.inf] * len(calls)
    for turn in range(turns + 1):
        for i, call in enumerate(calls):
            start = time.perf_counter()
            jax.block_until_ready(call())
            if turn:  # the first one compiles
                seconds[i] = min(seconds[i], time.perf_counter() - start)
    return seconds


# Cost against each size.


class Work(NamedTuple):
    """One call, with its counted FLOPs and bytes."""

    call: Callable[[], Any]
    flops: float  # of matrix products
    bytes: float  # read and written


def points(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def score_work(n, d, batch):
    run = jax.jit(lambda x0, x: jax.vmap(empirical.score(x0, OU), (0, None))(x, T))
    x0, x = jnp.asarray(points(n, d)), jnp.asarray(points(batch, d, seed=1))
    return Work(lambda: run(x0, x), *score_counts(n, d, batch))


def score_counts(n, d, batch):
    """FLOPs of both products; bytes: the data four times, each logit ten times.

    And of each chunk the contenders of each query, four times.
    """
    chunks = math.ceil(n / empirical.CHUNK)
    contenders = 4 * chunks * streaming.CONTENDERS * batch * d
    numbers = 4 * n * d + 10 * n * batch + contenders
    return 4 * n * d * batch, FLOAT * numbers


def search_work(n, d, m):
    search = neighbours.searcher(points(n, d), devices=jax.devices()[:1])
    samples = points(m, d, seed=1)
    return Work(lambda: search(samples).distances, *search_counts(n, d, m))


def search_counts(n, d, m):
    """FLOPs of the product; bytes: the data four times a chunk, distances eight times.

    And the contenders, twice.
    """
    chunks = math.ceil(m / 1_024)
    contenders = 2 * (2 + neighbours.CONTENDERS) * m * d
    numbers = 4 * n * d * chunks + 8 * n * m + contenders
    return 2 * n * d * m, FLOAT * numbers


def norm_work(probes, iters, n=1_024, d=256):
    """Power iteration on the empirical score: two products with J per iteration."""

    def run(x0, x):
        score_fn = empirical.score(x0, OU)
        return lipschitz.local(score_fn, x, T, jax.random.key(0), iters, symmetric=True)

    run, x0 = jax.jit(run), jnp.asarray(points(n, d))
    x, calls = jnp.asarray(points(probes, d, seed=1)), 2 * iters
    # A product with J: both products of the score again, and those of its tangent.
    numbers = 3 * n * d + 20 * n * probes
    return Work(lambda: run(x0, x), 8 * calls * n * d * probes, FLOAT * calls * numbers)


def step_work(batch, width, depth):
    """Forward and backward products; 20 passes over the state, 5 over activations."""
    model = dit(width, depth)
    step, state = train_step(model)
    x0, key = jnp.asarray(points(batch, SIDE, SIDE, 3)), jax.random.key(1)
    step = jax.jit(step, donate_argnums=0)

    def call():
        nonlocal state
        state, metrics = step(state, x0, key)
        return metrics

    tokens = (SIDE // PATCH) ** 2
    kept = depth * tokens * (20 * width + 2 * model.num_heads * tokens)
    numbers = 20 * count(state.params) + 5 * batch * kept
    return Work(call, batch * dit_flops(tokens, width, depth), FLOAT * numbers)


def dit(width, depth):
    return DiT(PATCH, width, depth, num_heads=max(1, width // HEAD))


def train_step(model):
    """The step (state, x0 [b, *e], key) -> (state, metrics), and a first state."""

    def loss(params, x0, key):
        t_key, eps_key = jax.random.split(key)
        t, eps = LAW(t_key), jax.random.normal(eps_key, x0.shape)
        with jax.default_matmul_precision("highest"):
            return train.noise_loss(applied(model), params, OU, x0, t, eps)

    tx = train.adam(1e-4)
    x0 = jax.ShapeDtypeStruct((SIDE, SIDE, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x0, T)["params"]
    # Off zero, where most gradients of a new DiT are.
    params = jax.tree.map(lambda a: jnp.asarray(0.1 * points(*a.shape)), shapes)
    return train.make_train_step(loss, tx, 0.999), train.init(params, tx)


def applied(model):
    return lambda params, x, t: model.apply({"params": params}, x, t)


def dit_flops(tokens, width, depth, patch=PATCH):
    """FLOPs of the products of one image: three times those of the forward pass."""
    attended = 4 * tokens * width  # scores, and the mean of values
    block = tokens * (24 * width**2 + attended) + 12 * width**2
    ends = 4 * tokens * 3 * patch**2 * width + 8 * width**2
    return 3 * (depth * block + ends)


def count(tree):
    return sum(math.prod(a.shape) for a in jax.tree.leaves(tree))


class Case(NamedTuple):
    """The sizes that are varied, and the exponent of the cost in the limit."""

    work: Callable[..., Work]
    sizes: dict
    quick: dict
    limit: dict
    factors: tuple = (0.25, 0.5, 1, 2, 4)


CASES = {
    "empirical score": Case(
        score_work,
        dict(n=8_192, d=1_024, batch=128),
        dict(n=256, d=64, batch=16),
        dict(n=1, d=1, batch=1),
    ),
    "neighbours": Case(
        search_work,
        dict(n=8_192, d=1_024, m=512),
        dict(n=256, d=64, m=32),
        dict(n=1, d=1, m=1),
    ),
    "training step, DiT": Case(
        step_work,
        dict(batch=16, width=256, depth=4),
        dict(batch=4, width=64, depth=2),
        dict(batch=1, width=2, depth=1),
        (0.25, 0.5, 1, 2),
    ),
    "power iteration": Case(
        norm_work,
        dict(probes=32, iters=8),
        dict(probes=4, iters=2),
        dict(probes=1, iters=1),
        (0.25, 0.5, 1, 2),
    ),
}


def fit_exponent(sizes, seconds):
    """The slope of log seconds against log sizes, and its standard error.

    nan of a single size, or of zeros.
    """
    if len(set(sizes)) < 2 or not min(seconds) > 0:
        return math.nan, math.nan
    x, y = np.log(np.asarray(sizes, float)), np.log(np.asarray(seconds, float))
    x, y = x - x.mean(), y - y.mean()
    slope = np.sum(x * y) / np.sum(x**2)
    rest = np.sum((y - slope * x) ** 2)
    error = np.sqrt(rest / max(1, len(x) - 2) / np.sum(x**2))
    return float(slope), float(error)


def costs(quick, turns):
    """One dict for each call, and one for each exponent."""
    # Measured again around each of what they are compared with.
    measured, rows = [machine_limits(quick)], []
    for name, case in CASES.items():
        base = case.quick if quick else case.sizes
        factors = (0.5, 1) if quick else case.factors
        asked = [
            base | {axis: max(1, round(size * factor))}
            for axis, size in base.items()
            for factor in factors
        ]
        asked = [dict(key) for key in {tuple(sizes.items()): None for sizes in asked}]
        works = [case.work(**sizes) for sizes in asked]
        seconds = best([work.call for work in works], turns)
        rows += [
            {"case": name, "sizes": s, "s": t, "flops": w.flops, "bytes": w.bytes}
            for s, t, w in zip(asked, seconds, works, strict=True)
        ]
        measured.append(machine_limits(quick))
    found = {limit: max(one[limit] for one in measured) for limit in measured[0]}
    for row in rows:
        row["product_s"] = row["flops"] / found["float32"]
        row["memory_s"] = row["bytes"] / found["bandwidth"]
        row["ratio"] = row["s"] / (row["product_s"] + row["memory_s"])
    return {"limits": found, "calls": rows, "exponents": exponents(rows, quick)}


def exponents(rows, quick):
    found = []
    for name, case in CASES.items():
        base = case.quick if quick else case.sizes
        for axis, limit in case.limit.items():
            along = [
                row
                for row in rows
                if row["case"] == name
                and all(row["sizes"][a] == base[a] for a in base if a != axis)
            ]
            along.sort(key=lambda row: row["sizes"][axis])
            sizes = [row["sizes"][axis] for row in along]
            slope, error = fit_exponent(sizes, [row["s"] for row in along])
            model, _ = fit_exponent(
                sizes, [row["product_s"] + row["memory_s"] for row in along]
            )
            ratios = [row["ratio"] for row in along]
            found.append(
                {"case": name, "axis": axis, "sizes": sizes, "exponent": slope,
                 "error": error, "model": model, "limit": limit,
                 "ms": [1e3 * row["s"] for row in along], "ratios": ratios}
            )  # fmt: skip
    return found


# Devices.

KINDS = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute",
)  # fmt: skip


def communicated(text):
    """Bytes that the collectives of a compiled program give to each device.

    Args: text, of the program; those inside of a loop count once.
    Returns: {kind: bytes}, of the kinds that there are.
    """
    found: dict[str, int] = {}
    # Of asynchronous ones the end, which gives the result alone.
    kinds = "|".join(KINDS)
    for shapes, kind in re.findall(rf"= (.*?) ({kinds})(?:-done)?\(", text):
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
            bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
            size = math.prod(int(n) for n in dims.split(",") if n)
            found[kind] = found.get(kind, 0) + size * bits // 8
    return found


class Shared(NamedTuple):
    """A call over some devices."""

    call: Callable[[], tuple]  # -> trees that are compared
    compiled: Any
    sent: float  # bytes that a device should be given, by the formula


def shared_score(devices, size, d=256, batch=32):
    """size: n. The sums go from half of the devices to the other, log2 times."""
    mesh = parallel.make_mesh(devices)

    def run(x0, x):
        return jax.vmap(empirical.score(x0, OU, mesh=mesh), (0, None))(x, LATE)

    x0 = jax.device_put(points(size, d), parallel.by_batch(mesh))
    x = jax.device_put(points(batch, d, seed=1), parallel.replicated(mesh))
    compiled = jax.jit(run).lower(x0, x).compile()
    sent = (len(devices) - 1).bit_length() * shared_sums(batch, d)
    return Shared(lambda: (compiled(x0, x),), compiled, sent)


def shared_sums(batch, d):
    """Bytes of one device's sums: two points and two numbers per query."""
    return FLOAT * batch * (2 * d + 2)


def shared_search(devices, size, d=256, m=256, k=2):
    """size: n. Nothing between devices of one process: the host picks the k nearest."""
    x0, samples = points(size, d), points(m, d, seed=1)
    search = neighbours.searcher(x0, k, block=size, devices=devices)
    mesh = parallel.make_mesh(devices)
    shares, centre = neighbours._shares(x0, mesh), np.zeros(d, np.float32)
    lowered = neighbours._search.lower(
        shares, centre, samples, size, k, size, mesh, every=False
    )
    return Shared(lambda: tuple(search(samples)), lowered.compile(), 0)


def shared_step(devices, size, split, width=128, depth=2):
    """size: the batch. Gradients are summed, and parameters gathered where split."""
    mesh = parallel.make_mesh(devices)
    step, state = train_step(dit(width, depth))
    everywhere = parallel.replicated(mesh)
    places = parallel.sharded(state, mesh) if split else everywhere
    state = parallel.place(state, places)
    x0 = jax.device_put(points(size, SIDE, SIDE, 3), parallel.by_batch(mesh))
    step = jax.jit(step, out_shardings=(places, everywhere))
    compiled = step.lower(state, x0, jax.random.key(1)).compile()

    def call():
        new, metrics = compiled(state, x0, jax.random.key(1))
        # The first moment is the gradient / 10; Adam's step would be but its sign.
        return metrics["loss"], optax.tree.get(new.opt_state, "mu")

    sent = FLOAT * count(state.params) * (2 if split else 1)
    return Shared(call, compiled, sent)


SHARED = {  # name: (makes it of devices and a size, the size in all, quick)
    "empirical score": (shared_score, 8_192, 256),
    "neighbours": (shared_search, 8_192, 256),
    "training step": (partial(shared_step, split=False), 32, 8),
    "training step, split state": (partial(shared_step, split=True), 32, 8),
}


def devices(quick, turns):
    """A dict for each kind of work, and way to scale: lists over 1, 2, 4 devices."""
    present = jax.devices()
    present = present if len(present) > 1 else jax.devices("cpu")
    counts = [k for k in ((1, 2) if quick else (1, 2, 4)) if k <= len(present)]
    with jax.default_device(present[0]):
        return [
            row
            for name, (make, full, small) in SHARED.items()
            for row in scaled(
                name, make, small if quick else full, present, counts, turns
            )
        ]


def scaled(name, make, total, present, counts, turns):
    """Strong: one size in total; weak: one size for each device."""
    ways = {
        "strong": [(k, total) for k in counts],
        "weak": [(k, total * k // counts[-1]) for k in counts],
    }
    asked = {key for way in ways.values() for key in way}
    asked |= {(1, size) for _, size in asked}  # one device has the answer
    made = {key: make(present[: key[0]], key[1]) for key in sorted(asked)}
    answers = {key: jax.device_get(one.call()) for key, one in made.items()}
    seconds = best([one.call for one in made.values()], turns)
    taken = dict(zip(made, seconds, strict=True))
    for way, keys in ways.items():
        programs = [made[key].compiled for key in keys]
        memory = [program.memory_analysis() for program in programs]
        yield {
            "work": name,
            "way": way,
            "devices": counts,
            "sizes": [size for _, size in keys],
            "s": [taken[key] for key in keys],
            "flops": [flops_of(program) for program in programs],
            "bytes": [m.argument_size_in_bytes + m.temp_size_in_bytes for m in memory],
            # Of one device there are collectives too, of itself with itself.
            "sent": communicated(programs[-1].as_text()),
            "formula": made[keys[-1]].sent,
            "difference": max(
                difference(answers[key], answers[1, key[1]]) for key in keys
            ),
        }


def flops_of(compiled):
    cost = compiled.cost_analysis() or {}
    return float(cost.get("flops", math.nan))


def difference(some, other):
    """The largest difference of trees of numbers, over the largest number of a tree."""

    def flat(tree):
        leaves = [np.ravel(leaf) for leaf in jax.tree.leaves(tree)]
        return np.concatenate(leaves).astype(np.float64)

    pairs = [(flat(a), flat(b)) for a, b in zip(some, other, strict=True)]
    return max(float(np.max(np.abs(a - b)) / np.max(np.abs(b))) for a, b in pairs)


# The plan.


class Machine(NamedTuple):
    """The assumptions about a cluster; the rates are those in practice."""

    devices: int = 256
    memory: float = 80e9  # bytes of a device
    bfloat16: float = 400e12  # FLOP/s of the products of a network
    float32: float = 50e12  # FLOP/s of products with precision "highest"
    bandwidth: float = 2.5e12  # bytes/s of a device's memory
    link: float = 50e9  # bytes/s that a device is given from other hosts
    host_memory: float = 2e12  # bytes


class Network(NamedTuple):
    """The cost of a network."""

    parameters: int
    flops: float  # of an image, forward and backward
    activations: float  # bytes of an image, at most: before anything is fused


class Host(NamedTuple):
    """The cost of a host: seconds of a point on one core, bytes beside the data."""

    digests: float
    fingerprint: float
    floats: float  # `data.from_uint8`
    distinct: float
    digests_bytes: float
    distinct_bytes: float
    digest_rate: float  # bytes/s of a checkpoint's digests


def dit_network(patch, side, width, depth, num_heads) -> Network:
    """A DiT in bfloat16, by shapes alone: all blocks are alike, so two depths suffice.

    Args: side, of its images [side, side, 3].
    """

    def shapes(depth):
        model = DiT(patch, width, depth, num_heads, dtype="bfloat16")
        x0 = jax.ShapeDtypeStruct((side, side, 3), jnp.float32)
        params = jax.eval_shape(model.init, jax.random.key(0), x0, T)["params"]

        def loss(params, x0):
            eps = jnp.ones_like(x0)
            return train.noise_loss(applied(model), params, OU, x0, T, eps)

        def kept(batch):
            def residuals(params, x0):
                losses = jax.vmap(loss, (None, 0))
                return jax.vjp(lambda p: jnp.mean(losses(p, x0)), params)[1]

            images = jax.ShapeDtypeStruct((batch, *x0.shape), x0.dtype)
            leaves = jax.tree.leaves(jax.eval_shape(residuals, params, images))
            return sum(a.size * a.dtype.itemsize for a in leaves)

        return np.array([count(params), kept(2) - kept(1)])

    one, two = shapes(1), shapes(2)
    parameters, activations = (one + (depth - 1) * (two - one)).tolist()
    flops = dit_flops((side // patch) ** 2, width, depth, patch)
    return Network(parameters, flops, activations)


def plan(n, d, batch, queries, machine: Machine, net: Network, k=2):
    """The cost of n points of size d on a machine: one dict for each part of the work.

    Args: batch, of training; queries, of the score and of the search, for k neighbours.
    Returns: rows of bytes of a device's memory ("memory"), seconds of its work ("s"),
      bytes that it is given by others ("sent") and seconds of that ("link_s").
    """
    rows, parts = [], machine.devices
    ring = 1 - 1 / parts  # of a whole, what a device is given

    def row(what, memory=0.0, flops=0.0, rate=machine.float32, moved=0.0, sent=0.0):
        seconds = flops / rate + moved / machine.bandwidth
        rows.append(
            {"what": what, "memory": memory, "s": seconds, "sent": sent,
             "link_s": sent / machine.link, "fits": memory <= machine.memory}
        )  # fmt: skip

    state, gradients = 16 * net.parameters, FLOAT * net.parameters
    images = batch / parts
    row("points, uint8, split", memory=n * d / parts)
    row("points, float32, split", memory=FLOAT * n * d / parts)
    row("points, float32, on every device: a training in memory", memory=FLOAT * n * d)
    ahead = (data.AHEAD + 1) * images
    row("batches of uint8 from disk (`data.stream`)", memory=ahead * d)
    row("activations of its part of a batch, at most", memory=images * net.activations)
    passes = 20 * FLOAT * net.parameters
    row(
        "training step, state on every device",
        memory=state + gradients,
        flops=images * net.flops,
        rate=machine.bfloat16,
        moved=passes,
        sent=2 * ring * gradients,  # an all-reduce
    )
    row(
        "training step, state split (`run.shard`)",
        memory=(state + gradients) / parts + gradients,  # all parameters are gathered
        flops=images * net.flops,
        rate=machine.bfloat16,
        moved=passes / parts,
        sent=2 * ring * gradients,  # parameters once, gradients once
    )
    # jax.random.permutation: a sort of 8 bytes a point, by digits of 8 bits, in rounds.
    rounds = math.ceil(3 * math.log(n) / math.log(2**32 - 1))
    row(
        "order of an epoch (`data.order`), once an epoch",
        memory=16 * n,
        moved=16 * n * rounds * 4,
    )
    flops, moved = score_counts(n / parts, d, queries)
    row(
        f"empirical score of {queries:,}",
        memory=2 * shared_sums(queries, d),
        flops=flops,
        moved=moved,
        sent=(parts - 1).bit_length() * shared_sums(queries, d),
    )
    flops, moved = search_counts(n / parts, d, queries)
    row(
        f"{k} neighbours of {queries:,}",
        flops=flops,
        moved=moved,
        sent=(parts - 1) * queries * (2 * k + 1) * FLOAT,
    )
    row(
        "closest pairs (`lipschitz.midpoints`), on one device",
        memory=FLOAT * n * d,
        flops=3 * n**2 * d,
    )
    return rows


def host_plan(n, d, host: Host, net: Network):
    """The cost of n points and a state on a host: seconds of one core, and bytes."""
    kept = n * d  # of the data, uint8
    parts = {
        "the pool, and the choice from it, in memory": (0, 2 * kept),
        "digests, of the pool and of the choice": (
            2 * n * host.digests,
            n * host.digests_bytes,
        ),
        "fingerprint": (n * host.fingerprint, 0),
        "float32 of them, in memory": (n * host.floats, FLOAT * kept),
        "distinct points (`neighbours.searcher`)": (
            n * host.distinct,
            n * host.distinct_bytes,
        ),
        "a checkpoint: digests of the state, on process 0": (
            16 * net.parameters / host.digest_rate,
            16 * net.parameters,
        ),
    }
    return [{"what": w, "s": s, "memory": b} for w, (s, b) in parts.items()]


def breaks(d, batch, machine: Machine, net: Network, host: Host, patience=3_600):
    """The largest possible n of each part, smallest first: the order of breaking.

    Args: patience, seconds that a start may take.
    """
    taken = (16 + FLOAT) * net.parameters + batch / machine.devices * net.activations
    hashing = 2 * host.digests + host.fingerprint + host.distinct
    beside = host.digests_bytes + host.distinct_bytes
    found = {
        "device memory: all points on every device, float32, where none stream": (
            (machine.memory - taken) / (FLOAT * d)
        ),
        f"an hour of start: digests, {1e6 * hashing:.0f} us a point on one core": (
            patience / hashing
        ),
        "host memory: the pool, the choice, float32, where none stream": (
            machine.host_memory / ((2 + FLOAT) * d + beside)
        ),
        "host memory beside points that stream: their digests": (
            machine.host_memory / beside
        ),
        "`data.indices`: n < 2^27": 2**27 - 1,
        "device memory: points split, float32": (
            machine.devices * machine.memory / (FLOAT * d)
        ),
        "places in int32": 2**31 - 1,
        "device memory: points split, uint8": machine.devices * machine.memory / d,
    }
    rows = [{"what": what, "n": int(n)} for what, n in found.items()]
    return sorted(rows, key=lambda row: row["n"])


def host_rates(d, quick):
    """The rates of a host on random pixels, and seconds of the order of an epoch."""
    n = 256 if quick else 4_096
    x = np.random.default_rng(0).integers(0, 256, (n, d), np.uint8)
    calls = [
        lambda: data.digests(x),
        lambda: data.fingerprint(x),
        lambda: data.from_uint8(x),
        lambda: neighbours.distinct(x),
        lambda: checkpoint.digest({"x": x}),
    ]
    *seconds, digest = [t / n for t in best(calls, 3)]
    few = np.arange(n, dtype=np.uint32)[:, None]
    beside = []
    for keep in (lambda: set(data.digests(few)), lambda: neighbours.distinct(few)):
        tracemalloc.start()
        kept = keep()
        beside.append(tracemalloc.get_traced_memory()[1] / n)
        tracemalloc.stop()
        del kept
    host = Host(*seconds, *beside, d / digest)
    sizes = [2**p for p in ((8, 10) if quick else (14, 16, 18, 20))]
    order, key = jax.jit(batches._permutations, static_argnums=2), jax.random.key(0)
    epoch = np.zeros(1, np.uint32)
    taken = best([partial(order, key, epoch, n) for n in sizes], 2)
    slope, error = fit_exponent(sizes, taken)
    order = {"sizes": sizes, "s": taken, "exponent": slope, "error": error}
    return host, order


# Tables.


def table(titles, rows):
    lines = [titles, *rows]
    lines = [f"| {' | '.join(map(str, line))} |" for line in lines]
    return "\n".join([lines[0], f"|{'---|' * len(titles)}", *lines[1:]])


def size(count):
    """A number of bytes in words; nothing for none."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            return f"{count:.3g} {unit}" if count else ""
        count /= 1_000


def span(seconds):
    """Seconds in words; nothing for none."""
    for unit, length in (("days", 86_400), ("h", 3_600), ("min", 60), ("s", 1)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{1e3 * seconds:.3g} ms" if seconds else ""


def several(numbers):
    return ", ".join(f"{n:,}" if isinstance(n, int) else f"{n:.3g}" for n in numbers)


def tables(found):
    """{mark: a table, or a sentence}."""
    about, caps = found["about"], found["costs"]["limits"]
    order, net = found["order"], Network(**found["assumed"]["network"])
    broken = [[f"{row['n']:,}", row["what"]] for row in found["breaks"]]
    marked = {
        "about": f"{about['date']}, {about['device']}, Python {about['python']}, jax "
        f"{about['jax']}. Limits: {caps['float32'] / 1e9:.0f} GFLOP/s of a float32 "
        f"product, {caps['bandwidth'] / 1e9:.1f} GB/s.",
        "exponents": exponent_table(found["costs"]["exponents"]),
        "devices": device_table(found["devices"]),
        "assumed": assumed(Machine(**found["assumed"]["machine"]), net),
        "plan": plan_table(found["plan"]),
        "host": table(
            ["part", "one core", "memory of a host"],
            [[r["what"], span(r["s"]), size(r["memory"])] for r in found["host"]],
        ),
        "order": f"The order of an epoch takes {span(order['s'][-1])} here at n = "
        f"{order['sizes'][-1]:,}, and grows as n^{order['exponent']:.2f}.",
        "breaks": table(["n", "what breaks there"], broken),
    }
    return {
        mark: text if text[0] == "|" else textwrap.fill(text, 90)
        for mark, text in marked.items()
    }


def exponent_table(rows):
    titles = ["work", "against", "sizes", "ms", "exponent", "of the model"]
    titles += ["in the limit", "seconds / model"]
    lines = [
        [
            row["case"],
            row["axis"],
            f"{row['sizes'][0]:,} .. {row['sizes'][-1]:,}",
            f"{row['ms'][0]:.3g} .. {row['ms'][-1]:.3g}",
            f"{row['exponent']:.2f} ± {row['error']:.2f}",
            f"{row['model']:.2f}",
            row["limit"],
            " ".join(f"{ratio:.2f}" for ratio in row["ratios"]),
        ]
        for row in rows
    ]
    return table(titles, lines)


def device_table(rows):
    titles = ["work", "scaling", "n or batch", "GFLOP a device", "exponent"]
    titles += ["MB a device", "given to each", "formula", "differs", "ms", "exponent"]

    def slope(row, name):
        return f"{round(fit_exponent(row['devices'], row[name])[0], 2) + 0:.2f}"

    lines = [
        [
            row["work"],
            row["way"],
            several(row["sizes"]),
            several([flops / 1e9 for flops in row["flops"]]),
            slope(row, "flops"),
            several([count / 1e6 for count in row["bytes"]]),
            " + ".join(f"{k} {size(sent)}" for k, sent in row["sent"].items()) or "0",
            size(row["formula"]) or "0",
            f"{row['difference']:.0e}" if row["difference"] else "0",
            several([1e3 * seconds for seconds in row["s"]]),
            slope(row, "s"),
        ]
        for row in rows
    ]
    return table(titles, lines)


def assumed(machine, net):
    return (
        f"{machine.devices} devices of {size(machine.memory)}; each reaches "
        f"{machine.bfloat16 / 1e12:.0f} TFLOP/s in bfloat16, "
        f"{machine.float32 / 1e12:.0f} TFLOP/s in float32 and "
        f"{size(machine.bandwidth)}/s of its memory, and is given "
        f"{size(machine.link)}/s by other hosts; a host has "
        f"{size(machine.host_memory)} of memory. The network has {net.parameters:,} "
        f"parameters, takes {net.flops:.3g} FLOPs an image, forward and backward, and "
        f"keeps at most {size(net.activations)} of it for the backward pass."
    )


def plan_table(rows):
    titles = ["part", "memory of a device", "its work", "it is given", "on the link"]
    lines = [
        [
            row["what"],
            size(row["memory"]) + ("" if row["fits"] else ": does not fit"),
            span(row["s"]),
            size(row["sent"]),
            span(row["link_s"]),
        ]
        for row in rows
    ]
    return table(titles, lines)


def write_markdown(path, marked):
    """Replaces the text between <!-- name --> and <!-- end --> in a file."""
    text = Path(path).read_text()
    for name, new in marked.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        text, count = re.subn(
            pattern, lambda m, new=new: f"{m[1]}{new}\n{m[2]}", text, flags=re.DOTALL
        )
        if not count:
            raise SystemExit(f"{path} has no place for {name}: <!-- {name} -->")
    Path(path).write_text(text)


N, D, BATCH, QUERIES = 10**8, 64 * 64 * 3, 2_048, 256
DIT_XL = dict(patch=2, side=64, width=1_152, depth=28, num_heads=16)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, in seconds")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="write the numbers here too")
    parser.add_argument("--markdown", help="write the tables between its marks")
    args = parser.parse_args()
    turns = 1 if args.quick else args.rounds
    machine, net = Machine(), dit_network(**DIT_XL)
    host, order = host_rates(D, args.quick)
    found = {
        "about": {
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "device": f"{jax.devices()[0].device_kind}, {limits.CORES} cores",
            "python": platform.python_version(),
            "jax": jax.__version__,
        },
        "costs": costs(args.quick, turns),
        "devices": devices(args.quick, turns),
        "assumed": {"machine": machine._asdict(), "network": net._asdict()},
        "host_rates": host._asdict(),
        "order": order,
        "plan": plan(N, D, BATCH, QUERIES, machine, net),
        "host": host_plan(N, D, host, net),
        "breaks": breaks(D, BATCH, machine, net, host),
    }
    marked = tables(found)
    print("\n\n".join(marked.values()))
    if args.json:
        with open(args.json, "w") as file:
            json.dump(found, file, indent=2)
    if args.markdown:
        write_markdown(args.markdown, marked)


if __name__ == "__main__":
    # Fake ones where there are no others; before jax looks for devices.
    jax.config.update("jax_num_cpu_devices", 4)
    main()
