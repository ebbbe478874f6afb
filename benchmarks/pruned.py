"""Compact against masked and dense networks: the savings of pruning.

python benchmarks/pruned.py [--width=256] [--depth=5] [--num_heads=8] [--patch=4]
    [--size=32] [--batch=16] [--dtype=float32] [--ratios 0.2 0.5] [--rounds=3]
    [--json=FILE.json]

A DiT on images of size x size x 3; random units of a random network, because speed does
not depend on values. The parameters of a masked network are 0 from the start, and its
train step ends with the mask. All networks take turns in one run, and the ratios
compare their fastest times. The last column is the largest difference of the outputs
over the largest output: of masked from dense, and of compact from masked. On a GPU the
network is DiT-S/2 by default, on 64 images.
"""

import argparse
import json
import multiprocessing
import platform
import time

from memsep_jax import memory

if __name__ == "__main__":  # as the command line does, before jax is imported
    memory.keep()

import jax
import jax.numpy as jnp

from memsep_jax import process, prune, train
from memsep_jax.experiments import training
from memsep_jax.models import DiT

OU = process.ornstein_uhlenbeck()
CASES = {  # what is pruned together
    "heads": ("heads",),
    "neurons": ("neurons",),
    "blocks": ("blocks",),
    "heads + neurons": ("heads", "neurons"),
}
SIZES = {
    "cpu": {"width": 256, "depth": 5, "num_heads": 8, "patch": 4, "size": 32,
            "batch": 16, "rounds": 3},
    "gpu": {"width": 384, "depth": 12, "num_heads": 6, "patch": 2, "size": 32,
            "batch": 64, "rounds": 3},
}  # fmt: skip
COLUMNS = {  # number: (title, unit, digits); temporary bytes of the compiled programs
    "parameters": ("params/M", 1e6, 2),
    "bytes": ("MB", 2**20, 1),
    "flops": ("GFLOP", 1e9, 3),
    "forward_temporary": ("pass MB", 2**20, 1),
    "forward_ms": ("pass ms", 1, 2),
    "step_temporary": ("step MB", 2**20, 1),
    "step_ms": ("step ms", 1, 2),
}


def random_params(model, size):
    """Moves all parameters off zero: adaLN-zero starts every block as the identity."""
    key, x = jax.random.key(0), jnp.zeros((size, size, 3))
    params = jax.jit(model.init)(key, x, jnp.zeros(()))["params"]
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [
        p + 0.02 * jax.random.normal(k, p.shape)
        for p, k in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, moved)


def networks(params, ratios):
    """{(case, ratio, form): (params, mask)}; the dense one has no case."""
    found = {("", 0.0, "dense"): (params, prune.full_mask(params))}
    for case, groups in CASES.items():
        for ratio in ratios:
            small, mask = params, prune.full_mask(params)
            for i, group in enumerate(groups):
                key = jax.random.fold_in(jax.random.key(2), i)
                keep = prune.keep_random(key, prune.gates(params, group).shape, ratio)
                small = prune.compact(small, keep, group)
                mask = prune.apply_mask(mask, prune.group_mask(params, keep, group))
            masked = prune.apply_mask(params, mask)
            found[case, ratio, "masked"] = masked, mask
            found[case, ratio, "compact"] = small, prune.full_mask(small)
    return found


def programs(model, tx):
    """One pass (params, x [*e], t) -> [*e], a batch of them, and a train step."""

    def apply(params, x, t):
        return model.apply({"params": params}, x, t)

    def loss(params, example, key):
        return train.noise_loss(apply, params, OU, *example)

    step = train.make_train_step(loss, tx, 0.999)
    batch = jax.vmap(apply, (None, 0, None))
    return jax.jit(apply), jax.jit(batch), jax.jit(step, donate_argnums=0)


def measure(model, size, batch, ratios, rounds):
    """One dict per network: `COLUMNS`, the difference, compact's share of masked."""
    tx = train.adamw(1e-4)
    apply, forward, step = programs(model, tx)
    key, t = jax.random.key(3), jnp.float32(0.5)
    x, eps = jax.random.normal(key, (2, batch, size, size, 3))
    examples = x, jnp.full(batch, t), eps
    rows, calls, outputs = [], [], []
    for name, (params, mask) in networks(random_params(model, size), ratios).items():
        state = train.init(params, tx, mask)
        passing = forward.lower(params, x, t).compile()
        lowered = step.lower(state, examples, key)
        stepping = lowered.compile()
        row = dict(zip(("case", "ratio", "form"), name, strict=True))
        row |= {
            "parameters": training.count(params),
            "bytes": sum(p.nbytes for p in jax.tree.leaves(params)),
            "flops": training.flops(apply.lower(params, x[0], t)),
            "step_flops": training.flops(lowered),
            "forward_temporary": passing.memory_analysis().temp_size_in_bytes,
            "step_temporary": stepping.memory_analysis().temp_size_in_bytes,
            "forward_ms": float("inf"),
            "step_ms": float("inf"),
        }
        rows.append(row)
        calls.append([passing, params, stepping, state])
        outputs.append(passing(params, x, t))
    for turn in range(rounds + 1):
        for row, call in zip(rows, calls, strict=True):
            passing, params, stepping, state = call
            start = time.perf_counter()
            jax.block_until_ready(passing(params, x, t))
            middle = time.perf_counter()
            call[3], _ = jax.block_until_ready(stepping(state, examples, key))
            end = time.perf_counter()
            if turn:  # the first one warms up
                row["forward_ms"] = min(row["forward_ms"], 1e3 * (middle - start))
                row["step_ms"] = min(row["step_ms"], 1e3 * (end - middle))
    for i, row in enumerate(rows):
        other = i - 1 if row["form"] == "compact" else 0
        gap = jnp.max(jnp.abs(outputs[i] - outputs[other]))
        row["difference"] = float(gap / jnp.max(jnp.abs(outputs[other])))
        if row["form"] == "compact":
            row["of_masked"] = {name: row[name] / rows[other][name] for name in COLUMNS}
    return rows


def cases(rows, batch, dtype):
    """Rows for the table of run.py: dense alone, and compact against masked."""
    found = []
    for i, row in enumerate(rows):
        if row["form"] == "masked":
            continue
        other = rows[i - 1] if row["form"] == "compact" else None
        removed = f"without {row['ratio']:.0%} of {row['case']}" if other else "whole"
        # Once: the weights for a pass; for a step, with those of Adam and the EMA, each
        # read and written.
        for what, name, flops, moved, items, unit in (
            ("pass", "forward_ms", batch * row["flops"], 1, batch, "images"),
            ("step", "step_ms", row["step_flops"], 8, 1, "steps"),
        ):
            found.append(
                {
                    "case": f"DiT {removed}, {what} of {batch}, {dtype}",
                    "ours_s": row[name] / 1e3,
                    "items": items,
                    "unit": unit,
                    "peer": other and "masked",
                    "peer_s": other and other[name] / 1e3,
                    "flops": flops,
                    "bytes": moved * row["bytes"],
                    "product": {"float32": "default"}.get(dtype, dtype),
                }
            )
    return found


def show(rows):
    titles = [title for title, _, _ in COLUMNS.values()] + ["differs"]
    print(f"{'':28}" + "".join(f"{title:>10}" for title in titles))
    for row in rows:
        label, differs = f"{row['case']} {row['ratio'] or ''}", row["difference"]
        cells = (f"{row[name] / unit:10.{digits}f}"
                 for name, (_, unit, digits) in COLUMNS.items())  # fmt: skip
        print(f"{label:20}{row['form']:8}", *cells, f"{differs:10.1e}", sep="")
        if "of_masked" in row:
            cells = (f"{row['of_masked'][name]:9.2f}x" for name in COLUMNS)
            print(f"{'compact / masked':>28}", *cells, sep="")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = SIZES["cpu" if jax.default_backend() == "cpu" else "gpu"]
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--ratios", type=float, nargs="+", default=(0.2, 0.5))
    parser.add_argument("--json", help="write the numbers here too")
    args = parser.parse_args()
    model = DiT(args.patch, args.width, args.depth, args.num_heads, dtype=args.dtype)
    device = jax.devices()[0]
    about = {
        "device": f"{device.device_kind}, {multiprocessing.cpu_count()} cores",
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "network": {k: v for k, v in vars(args).items() if k != "json"},
    }
    print(about)
    rows = measure(model, args.size, args.batch, args.ratios, args.rounds)
    show(rows)
    if args.json:
        with open(args.json, "w") as file:
            made = cases(rows, args.batch, args.dtype)
            json.dump({"about": about, "rows": rows, "cases": made}, file, indent=2)


if __name__ == "__main__":
    main()
