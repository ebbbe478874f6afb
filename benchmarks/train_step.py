"""A training step and a sampler of U-Net and DiT: ours against PyTorch.

python benchmarks/train_step.py [--nets unet dit] [--size=16] [--batch=32]
    [--unet_width=32] [--unet_depth=2] [--dit_width=128] [--dit_depth=4]
    [--dit_heads=4] [--patch=2] [--samples=16] [--rounds=5] [--dtype=float32]
    [--json=FILE.json]

Both have the same weights and see the same images, times and noise. A step is EDM's
loss with its gradient, Adam and the EMA; the sampler is Heun's with 18 steps (35
calls), one compiled program here and a loop in Python there. With --dtype=bfloat16, our
blocks and PyTorch's autocast compute in bfloat16. On a CPU, PyTorch is eager with as
many threads as cores, and jax splits the batch over as many devices. On a GPU, PyTorch
goes through torch.compile, also for the network of the sampler, and the default DiT is
DiT-S/2 on 256 images of 32 x 32 x 3. They take turns; the ratio is theirs / ours, of
the fastest times and of the medians, so above 1 ours is faster. "run ms" is a step of
`python -m memsep_jax.main` with the same network and batch, where its log is fastest:
the batch and the noise are drawn in it, and the program is that of a run. GFLOP/s count
the FLOPs of the program before XLA optimizes it. The last column is the largest
difference over the largest value: of the losses of all steps, and of the samples.
"""

import argparse
import copy
import importlib.util
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
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

from memsep_jax import parallel, process, sampling, score, train
from memsep_jax.experiments import record, training
from memsep_jax.models import DiT, UNet

ALLOWED = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
CORES = len(ALLOWED(0))
if __name__ == "__main__":  # before jax looks for devices
    # A batch is split over the cores as over any devices: one alone leaves some idle.
    jax.config.update("jax_num_cpu_devices", CORES)
MESH = parallel.make_mesh()

ROOT = Path(__file__).resolve().parents[1]
SPEC = importlib.util.spec_from_file_location(
    "torch_nets", Path(__file__).with_name("torch_nets.py")
)
torch_nets = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(torch_nets)

VE = process.variance_exploding()
EDM = score.edm(VE)
SIGMA_DATA, LR, EMA_DECAY = 0.5, 2e-4, 0.999
TIMES = sampling.edm_times(0.002, 80.0, 17)  # and a last step to 0
CALLS = 2 * len(TIMES) - 1  # of the network, for one sample
SIZES = {
    "cpu": {"size": 16, "batch": 32, "unet_width": 32, "unet_depth": 2,
            "dit_width": 128, "dit_depth": 4, "dit_heads": 4, "patch": 2,
            "samples": 16, "rounds": 5},
    "gpu": {"size": 32, "batch": 256, "unet_width": 64, "unet_depth": 2,
            "dit_width": 384, "dit_depth": 12, "dit_heads": 6, "patch": 2,
            "samples": 256, "rounds": 5},
}  # fmt: skip
NAMES = {"unet": "U-Net", "dit": "DiT"}
PRODUCTS = {"float32": "default", "bfloat16": "bfloat16"}  # as limits.py names them


def fields(name, args):
    """The arguments of a network, ours or PyTorch's."""
    if name == "unet":
        own = dict(width=args.unet_width, depth=args.unet_depth)
        return own | {"attention": (args.size // 2,)}
    own = dict(patch=args.patch, width=args.dit_width, depth=args.dit_depth)
    return own | {"num_heads": args.dit_heads}


def networks(args):
    """{name: (ours, the same in PyTorch)}."""
    made = {"unet": (UNet, torch_nets.UNet), "dit": (DiT, torch_nets.DiT)}
    return {
        name: (
            ours(**fields(name, args), dtype=args.dtype),
            theirs(args.size, 3, **fields(name, args)),
        )
        for name, (ours, theirs) in made.items()
        if name in args.nets
    }


def random_params(model, x):
    """Moves parameters off zero, because a new network predicts zero."""
    params = jax.jit(model.init)(jax.random.key(0), x, jnp.zeros(()))["params"]
    draw = np.random.default_rng(0)
    return jax.tree.map(
        lambda p: p + 0.02 * draw.normal(size=p.shape).astype(p.dtype), params
    )


def our_step(model, params, batch):
    """(batch) -> loss, and the FLOPs of a call."""

    def loss(params, example, key):
        network = partial(model.apply, {"params": params})
        return train.prediction_loss(network, EDM, VE, *example)

    tx = train.adam(LR)
    step = jax.jit(train.make_train_step(loss, tx, EMA_DECAY), donate_argnums=0)
    state, key = train.init(jax.tree.map(jnp.copy, params), tx), jax.random.key(1)
    state = jax.device_put(state, parallel.replicated(MESH))

    def call(batch):
        nonlocal state
        state, metrics = step(state, batch, key)
        return float(metrics["loss"])

    return call, training.flops(step.lower(state, batch, key))


def run_ms(name, args):
    """Milliseconds of a step of the command line, where its log is fastest.

    The run is killed when it has logged enough: what follows training takes minutes.
    """
    shape = 2 * args.batch, args.size, args.size, 3
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    steps = 10**6
    given = {
        "data.name": "npz", "data.num_examples": args.batch,
        "data.num_held_out": args.batch,
        "process.name": "variance_exploding", "prediction.name": "edm",
        "times.name": "log_normal", "optimizer.name": "adam", "optimizer.lr": LR,
        "model.name": name, "model.dtype": args.dtype, "train.batch_size": args.batch,
        "train.steps": steps, "run.log_every": 5, "run.save_every": steps,
        "run.evaluate_every": steps, "run.snapshots": 0,
        "sampler.num_samples": 4, "sampler.steps": 2,
    }  # fmt: skip
    given |= {f"model.{field}": value for field, value in fields(name, args).items()}
    with tempfile.TemporaryDirectory() as folder:
        np.savez(f"{folder}/images.npz", train_images=images)
        given["data.path"] = f"{folder}/images.npz"
        config = ROOT / "configs" / "dit_cifar.py"
        command = [sys.executable, "-m", "memsep_jax.main", f"--config={config}"]
        command += [f"--config.{field}={value}" for field, value in given.items()]
        command.append(f"--workdir={folder}/run")
        log, rows = Path(folder) / "run" / "metrics.jsonl", []
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as run:
            while run.poll() is None and len(rows) < 2 * args.rounds:
                time.sleep(0.1)
                rows = record.read_metrics(log)
            run.kill()
    if not rows:
        raise SystemExit(f"{shlex.join(command)} ended before it had logged a step")
    return 1e3 / max(row["steps_per_second"] for row in rows)


def their_step(net, dtype):
    """(batch) -> loss."""
    averaged = [p.detach().clone() for p in net.parameters()]
    optimizer = torch.optim.Adam(net.parameters(), lr=LR)
    run = torch.compile(net) if on_gpu(net) else net

    def call(batch):
        x0, sigma, eps = batch
        s = sigma[:, None, None, None]
        x = x0 + s * eps
        denoised = denoise(run, x, sigma, dtype)
        loss = torch.mean((denoised - x0) ** 2 / out(s) ** 2)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averaged, list(net.parameters()), 1 - EMA_DECAY)
        return loss.item()

    return call


def out(s):
    return s * SIGMA_DATA / torch.sqrt(s**2 + SIGMA_DATA**2)


def denoise(net, x, sigma, dtype="float32"):
    """D(x, sigma) of a batch (Karras 2022, eq. 7)."""
    s = sigma[:, None, None, None]
    variance = s**2 + SIGMA_DATA**2
    low = dtype == "bfloat16"
    with torch.autocast(x.device.type, torch.bfloat16, enabled=low):
        answer = net(x / torch.sqrt(variance), torch.log(sigma) / 4)
    return SIGMA_DATA**2 / variance * x + out(s) * answer.float()


def our_sampler(model, params, x):
    """x [b, h, w, c] at the largest time -> samples, and the FLOPs of a call."""

    @jax.jit
    def draw(params, x):
        network = partial(model.apply, {"params": params})
        flow = sampling.ode(score.from_network(network, EDM, VE), VE, TIMES)
        return jax.vmap(flow)(x)

    params = jax.device_put(params, parallel.replicated(MESH))
    flops = CALLS * len(x) * forward_flops(model, params, x[0])
    return lambda x: jax.block_until_ready(draw(params, x)), flops


def forward_flops(model, params, x):
    """FLOPs of one call; XLA would count the body of a loop once."""
    apply = jax.jit(lambda params, x, t: model.apply({"params": params}, x, t))
    return training.flops(apply.lower(params, x, jnp.zeros(())))


def their_sampler(net, dtype):
    """x [b, c, h, w] -> samples, by Heun's method (Karras 2022, algorithm 1)."""
    times = [*map(float, TIMES), 0.0]
    run = torch.compile(net) if on_gpu(net) else net

    @torch.no_grad()
    def call(x):
        for t, t_next in zip(times[:-1], times[1:], strict=True):
            slope = (x - denoise(run, x, x.new_full((len(x),), t), dtype)) / t
            moved = x + (t_next - t) * slope
            if t_next > 0:
                sigma = x.new_full((len(x),), t_next)
                other = (moved - denoise(run, moved, sigma, dtype)) / t_next
                moved = x + (t_next - t) * (slope + other) / 2
            x = moved
        return x if x.device.type == "cpu" else (torch.cuda.synchronize(), x)[1]

    return call


def on_gpu(net):
    return next(net.parameters()).is_cuda


def race(ours, theirs, our_input, their_input, rounds):
    """The row of two calls that take turns, and the results of ours and theirs."""
    times, answers = ([], []), ([], [])
    for turn in range(rounds + 1):
        pairs = ((ours, our_input), (theirs, their_input))
        for i, (call, given) in enumerate(pairs):
            start = time.perf_counter()
            answers[i].append(call(given))
            if turn:  # the first one compiles
                times[i].append(1e3 * (time.perf_counter() - start))
    fastest, median = map(min, times), map(statistics.median, times)
    row = dict(zip(("ours_ms", "torch_ms"), fastest, strict=True))
    row |= dict(zip(("ours_median_ms", "torch_median_ms"), median, strict=True))
    row["ratio"] = row["torch_ms"] / row["ours_ms"]
    row["median_ratio"] = row["torch_median_ms"] / row["ours_median_ms"]
    return row, *answers


def difference(one, other):
    one, other = np.asarray(one), np.asarray(other)
    return float(np.max(np.abs(one - other)) / np.max(np.abs(other)))


def measure(args, device):
    """One dict for the step and one for the sampler of each network."""
    x0, eps = jax.random.normal(
        jax.random.key(2), (2, args.batch, args.size, args.size, 3)
    )
    sigma = jax.vmap(process.log_normal())(
        jax.random.split(jax.random.key(3), args.batch)
    )
    noise = 80 * jax.random.normal(
        jax.random.key(4), (args.samples, args.size, args.size, 3)
    )
    batch = SIGMA_DATA * x0, sigma, eps
    their_sigma = torch.tensor(np.asarray(sigma)).to(device)
    their_batch = (
        torch_nets.images(batch[0]).to(device),
        their_sigma,
        torch_nets.images(eps).to(device),
    )
    batch, noise = jax.device_put((batch, noise), parallel.by_batch(MESH))
    rows = []
    for name, (model, net) in networks(args).items():
        params = random_params(model, np.asarray(x0[0]))
        net = torch_nets.load(net, jax.tree.map(np.asarray, params)).to(device)
        still = copy.deepcopy(net).eval()  # training moves the other
        count = training.count(params)
        step, flops = our_step(model, params, batch)
        row, ours, theirs = race(
            step, their_step(net, args.dtype), batch, their_batch, args.rounds
        )
        row = {"network": name, "parameters": count, "what": "step", **row}
        row["run_ms"] = run_ms(name, args)
        row |= {"per_second": args.batch / row["ours_ms"] * 1e3, "flops": flops}
        # The weights, both averages of Adam and the EMA, each read and written.
        row["bytes"] = 2 * 4 * 4 * count + 2 * x0.nbytes
        rows.append(row | {"difference": difference(ours, theirs)})
        sampler, flops = our_sampler(model, params, noise)
        row, ours, theirs = race(
            sampler,
            their_sampler(still, args.dtype),
            noise,
            torch_nets.images(noise).to(device),
            max(1, args.rounds // 2),
        )
        row = {"network": name, "parameters": count, "what": "sampler", **row}
        row["run_ms"] = None
        row |= {"per_second": args.samples / row["ours_ms"] * 1e3, "flops": flops}
        row["bytes"] = 4 * count + 2 * noise.nbytes
        theirs = theirs[-1].permute(0, 2, 3, 1).cpu()
        rows.append(row | {"difference": difference(ours[-1], theirs)})
    for row in rows:
        row["gflops"] = row["flops"] / row["ours_ms"] / 1e6
    return rows


def cases(rows, args, peer):
    """Rows for the table of run.py."""
    found = []
    for row in rows:
        step = row["what"] == "step"
        batch = args.batch if step else args.samples
        timed = {row["what"]: row["ours_ms"]}
        if step:
            timed["step in a run"] = row["run_ms"]
        for what, ms in timed.items():
            case = f"{NAMES[row['network']]} {row['parameters'] / 1e6:.1f}M, {what} of "
            found.append(
                {
                    "case": f"{case}{batch}, {args.size} x {args.size}, {args.dtype}",
                    "ours_s": ms / 1e3,
                    "items": 1 if step else batch,
                    "unit": "steps" if step else "images",
                    "peer": peer,
                    "peer_s": row["torch_ms"] / 1e3,
                    "flops": row["flops"],
                    "bytes": row["bytes"],
                    "product": PRODUCTS[args.dtype],
                }
            )
    return found


COLUMNS = {  # number: (title, digits)
    "ours_ms": ("ours ms", 1),
    "torch_ms": ("torch ms", 1),
    "run_ms": ("run ms", 1),
    "ratio": ("ratio", 2),
    "median_ratio": ("medians", 2),
    "per_second": ("ours/s", 1),
    "gflops": ("GFLOP/s", 0),
}


def show(rows):
    titles = [title for title, _ in COLUMNS.values()] + ["differs"]
    print(f"{'':24}" + "".join(f"{title:>10}" for title in titles))
    for row in rows:
        label = f"{row['network']} {row['parameters'] / 1e6:.2f}M {row['what']}"
        cells = (
            f"{'':10}" if row[name] is None else f"{row[name]:10.{digits}f}"
            for name, (_, digits) in COLUMNS.items()
        )
        print(f"{label:24}", *cells, f"{row['difference']:10.1e}", sep="")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", nargs="+", default=("unet", "dit"))
    sizes = SIZES["cpu" if jax.default_backend() == "cpu" else "gpu"]
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", default="float32", choices=tuple(PRODUCTS))
    parser.add_argument("--json", help="write the numbers here too")
    args = parser.parse_args()
    torch.set_num_threads(CORES)
    # jax's default of float32 products on a GPU is TF32, so it is PyTorch's here.
    torch.set_float32_matmul_precision("high")
    gpu = torch.cuda.is_available() and jax.default_backend() == "gpu"
    about = {
        "device": f"{jax.devices()[0].device_kind}, {CORES} cores",
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "torch": torch.__version__,
        },
        "torch": "torch.compile" if gpu else "eager, CPU",
        "sizes": {k: v for k, v in vars(args).items() if k != "json"},
    }
    print(about)
    rows = measure(args, "cuda" if gpu else "cpu")
    show(rows)
    if args.json:
        with open(args.json, "w") as file:
            peer = f"PyTorch ({about['torch']})"
            found = {"about": about, "rows": rows, "cases": cases(rows, args, peer)}
            json.dump(found, file, indent=2)


if __name__ == "__main__":
    main()
