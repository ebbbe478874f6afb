"""Power iteration on the Jacobian of a score: ours against PyTorch.

python benchmarks/lipschitz.py [--n=5000] [--d=3072] [--probes=16] [--iters=10]
    [--size=16] [--dit_width=128] [--dit_depth=4] [--dit_heads=4] [--patch=2]
    [--rounds=3] [--json=FILE.json]

Needs the extra `dev` (torch). Both find the spectral norm at each probe with equally
many products with J and J', from the same directions, in float32. The probes of the
empirical score of n points of uniform noise lie midway between random pairs; both use
J' = J. Ours streams over the points and goes forward, so it computes the weights of the
points for each product; theirs is dense and goes backward, so it keeps them. The other
score is that of a DiT with the same weights. In PyTorch a batch of probes is one input
of torch.func.jvp and vjp, which is faster than vmap, and nothing is compiled. They take
turns; the ratio is theirs / ours, of the fastest times and of the medians. The last
column is the largest relative difference.
"""

import argparse
import importlib.util
import json
import os
import platform
from functools import partial
from pathlib import Path

# The device's memory is for two.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

from memsep_jax import memory

if __name__ == "__main__":  # as the command line does, before jax is imported
    memory.keep()

import jax
import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from memsep_jax import empirical, lipschitz, process, score
from memsep_jax.experiments import training

SPEC = importlib.util.spec_from_file_location(
    "train_step", Path(__file__).with_name("train_step.py")
)
train_step = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(train_step)

OU = process.ornstein_uhlenbeck()
T, SIGMA = 0.1, 0.5  # the times of the empirical score and of the network's
SIZES = {
    "cpu": {"n": 5_000, "d": 3_072, "probes": 16, "iters": 10, "size": 16,
            "dit_width": 128, "dit_depth": 4, "dit_heads": 4, "patch": 2,
            "rounds": 3},
    "gpu": {"n": 50_000, "d": 3_072, "probes": 64, "iters": 20, "size": 32,
            "dit_width": 384, "dit_depth": 12, "dit_heads": 6, "patch": 2,
            "rounds": 3},
}  # fmt: skip


def ours(make_score, t, iters, symmetric):
    """(points or weights, xs [m, *e], keys [m]) -> [m] norms."""

    @jax.jit
    def norms(of, xs, keys):
        score_fn = make_score(of)

        def norm(x, key):
            return lipschitz.jacobian_norm(score_fn, x, t, key, iters, symmetric)

        return jax.vmap(norm)(xs, keys)

    return lambda given: jax.block_until_ready(norms(*given))


def theirs(score_fn, iters, symmetric):
    """(xs [m, *e], directions [m, *e]) -> [m] norms; score_fn takes a batch."""

    def unit(v):
        length = v.flatten(1).norm(dim=1)
        return v / length.view(-1, *[1] * (v.ndim - 1)), length

    def call(given):
        x, v = given
        pull = torch.func.vjp(score_fn, x)[1]

        def forward(v):
            # Its forward mode multiplies by zeros of the size of the points, too.
            return pull(v)[0] if symmetric else torch.func.jvp(score_fn, (x,), (v,))[1]

        v, _ = unit(v)
        for _ in range(iters):
            u, value = unit(forward(v))
            v, _ = unit(pull(u)[0])
        return value.detach().cpu()

    return call


def dense(points):
    """The empirical score at T of a batch x [m, d]."""
    alpha, v = float(OU.alpha(T)), float(OU.sigma(T)) ** 2
    squares = (points**2).sum(1)

    def score_fn(x):
        # Not cdist: it has no forward mode. |x|^2 is the same for all points.
        logits = alpha * (x @ points.T - alpha * squares / 2) / v
        return (alpha * torch.softmax(logits, 1) @ points - x) / v

    return score_fn


def of_network(net, x):
    """The score at SIGMA of a batch x [m, c, h, w], from the denoiser (Tweedie)."""
    return (train_step.denoise(net, x, x.new_full((len(x),), SIGMA)) - x) / SIGMA**2


def to_torch(a):
    return torch.tensor(np.asarray(a))


def of_empirical(args, key):
    """A problem: its name, both calls with their inputs, FLOPs, bytes, product."""
    data_key, pair_key, key = jax.random.split(key, 3)
    points = jax.random.uniform(data_key, (args.n, args.d), minval=-1, maxval=1)
    xs = OU.alpha(T) * lipschitz.segments(pair_key, points, args.probes)
    keys = jax.random.split(key, len(xs))
    starts = jax.vmap(lambda k: jax.random.normal(k, (args.d,)))(keys)
    products = 1 + 2 * args.iters  # the weights, then J and J' of each iteration
    return {
        "score": f"empirical, n = {args.n:,}, d = {args.d:,}",
        "ours": ours(
            partial(empirical.score, process=OU), T, args.iters, symmetric=True
        ),
        "given": (points, xs, keys),
        "theirs": lambda device: theirs(
            dense(to_torch(points).to(device)), args.iters, symmetric=True
        ),
        "their_given": (to_torch(xs), to_torch(starts)),
        "flops": products * args.probes * 4 * args.n * args.d,
        "bytes": products * points.nbytes,
        "product": "float32",
    }


def of_dit(args, key):
    """The same of the network."""
    ((model, net),) = train_step.networks(args).values()
    keys = jax.random.split(key, args.probes)
    shape = (args.size, args.size, 3)
    xs, starts = (
        jax.vmap(lambda k: jax.random.normal(k, shape))(some)
        for some in (jax.random.split(jax.random.fold_in(key, 1), args.probes), keys)
    )
    params = train_step.random_params(model, np.asarray(xs[0]))
    net = train_step.torch_nets.load(net, jax.tree.map(np.asarray, params))
    once = train_step.forward_flops(model, params, xs[0])
    count = training.count(params)

    def make_score(params):
        network = partial(model.apply, {"params": params})
        return score.from_network(network, train_step.EDM, train_step.VE)

    return {
        "score": f"DiT {count / 1e6:.1f}M, {args.size} x {args.size}",
        "ours": ours(make_score, SIGMA, args.iters, symmetric=False),
        "given": (params, xs, keys),
        "theirs": lambda device: theirs(
            partial(of_network, net.requires_grad_(False).to(device)),
            args.iters,
            symmetric=False,
        ),
        "their_given": tuple(map(train_step.torch_nets.images, (xs, starts))),
        # As above: what is linear needs no more than a call for J and one for J'.
        "flops": (1 + 2 * args.iters) * args.probes * once,
        "bytes": 4 * count + 2 * xs.nbytes,
        "product": "default",
    }


def measure(args, device):
    rows = []
    for i, make in enumerate((of_empirical, of_dit)):
        problem = make(args, jax.random.fold_in(jax.random.key(0), i))
        # On a GPU, TF32 where ours has it.
        exact = problem["product"] == "float32"
        torch.set_float32_matmul_precision("highest" if exact else "high")
        # Fused attention of PyTorch has no forward mode.
        with sdpa_kernel(SDPBackend.MATH):
            row, own, other = train_step.race(
                problem["ours"],
                problem["theirs"](device),
                problem["given"],
                tuple(a.to(device) for a in problem["their_given"]),
                args.rounds,
            )
        own, other = np.asarray(own[-1]), np.asarray(other[-1])
        row["largest"] = float(own.max())
        row["per_second"] = 1e3 * args.probes / row["ours_ms"]
        row["gflops"] = problem["flops"] / row["ours_ms"] / 1e6
        row["difference"] = float(np.max(np.abs(own / other - 1)))
        kept = {name: problem[name] for name in ("score", "flops", "bytes", "product")}
        rows.append(kept | row)
    return rows


def cases(rows, args, peer):
    """Rows for the table of run.py."""
    return [
        {
            "case": f"{row['score']}, {args.probes} probes, {args.iters} iterations",
            "ours_s": row["ours_ms"] / 1e3,
            "items": args.probes,
            "unit": "norms",
            "peer": peer,
            "peer_s": row["torch_ms"] / 1e3,
            **{name: row[name] for name in ("flops", "bytes", "product")},
        }
        for row in rows
    ]


COLUMNS = {  # number: (title, digits)
    "ours_ms": ("ours ms", 1),
    "torch_ms": ("torch ms", 1),
    "ratio": ("ratio", 2),
    "median_ratio": ("medians", 2),
    "per_second": ("norms/s", 1),
    "gflops": ("GFLOP/s", 0),
    "largest": ("largest", 1),
}


def show(rows):
    titles = [title for title, _ in COLUMNS.values()] + ["differs"]
    print(f"{'':32}" + "".join(f"{title:>10}" for title in titles))
    for row in rows:
        cells = (f"{row[name]:10.{digits}f}" for name, (_, digits) in COLUMNS.items())
        print(f"{row['score']:32}", *cells, f"{row['difference']:10.1e}", sep="")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = SIZES["cpu" if jax.default_backend() == "cpu" else "gpu"]
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    # What else networks of train_step.py are made of.
    parser.set_defaults(nets=("dit",), dtype="float32", unet_width=8, unet_depth=1)
    parser.add_argument("--json", help="write the numbers here too")
    args = parser.parse_args()
    torch.set_num_threads(train_step.CORES)
    gpu = torch.cuda.is_available() and jax.default_backend() == "gpu"
    about = {
        "device": f"{jax.devices()[0].device_kind}, {train_step.CORES} cores",
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "torch": torch.__version__,
        },
        "sizes": {name: getattr(args, name) for name in sizes},
    }
    print(about)
    rows = measure(args, "cuda" if gpu else "cpu")
    show(rows)
    if args.json:
        with open(args.json, "w") as file:
            peer = f"PyTorch (eager{'' if gpu else ', CPU'})"
            found = {"about": about, "rows": rows, "cases": cases(rows, args, peer)}
            json.dump(found, file, indent=2)


if __name__ == "__main__":
    main()
