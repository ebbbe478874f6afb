"""Train, be stopped at random, go on, for half an hour; then compare every bit.

    PYTHONPATH=tests python -m faults.soak --minutes=30 --out=docs/results/soak

Each round is one run of a small network in a new workdir. It is killed at random times
(SIGKILL, SIGTERM, Ctrl-C), sometimes a bit of its newest checkpoint is flipped, and the
same command is given again, until it has ended by itself. Its last checkpoint, its rows
of metrics, its samples and its neighbours must be those of the run that nothing
disturbed. Leaves OUT.json and OUT.md; exits with 1 where one was not.
"""

import argparse
import collections
import contextlib
import datetime
import json
import logging
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import jax

from faults import harness
from memsep_jax import checkpoint
from memsep_jax.experiments import record

LONGER = (
    "--config.train.steps=1500",
    "--config.run.log_every=10",
    "--config.run.save_every=50",
    "--config.run.evaluate_every=500",
    "--config.sampler.num_samples=64",
)
RUNS = {
    "MLP": (*harness.TINY, *LONGER),
    "DiT": (*harness.TINY_DIT, *LONGER, "--config.train.steps=600"),
}
SIGNALS = {signal.SIGKILL: 6, signal.SIGTERM: 3, signal.SIGINT: 1}  # how often each
FLIPS = 0.15  # of the kills are followed by a flipped bit
LONGEST = 12.0  # seconds until a kill, of a run that takes some 10 to 20
TRAINING = 0.7  # of the kills come while it trains,
TRAINS = 4.0  # at most so many seconds after its first new row
AT_MOST = 8  # kills of a run: then it is left to end


def outcome(workdir):
    """All that a run leaves and that must not depend on what happened to it."""
    arrays = record.read_npz(workdir / "samples.npz")["samples"]
    return {
        "weights": harness.digest(workdir),
        "rows": harness.rows(workdir),
        "samples": checkpoint.digest(arrays),
        "per_sample": (workdir / "per_sample.csv").read_text(),
    }


def verified(workdir, flipped) -> int:
    """How many checkpoints are whole; each is read back and checked.

    Args: flipped, the steps that were damaged here and may not have been noticed yet.
    """
    directory, count = workdir / "checkpoints", 0
    for step in checkpoint.steps(directory):
        try:
            checkpoint.restore(directory, step, harness.like(workdir, step))
            count += 1
            flipped.discard(step)  # it was set aside, and is trained again
        except checkpoint.CorruptError:
            if step not in flipped:
                raise
    return count


def lost(workdir) -> int:
    """Steps that were logged and must be done again."""
    rows = record.read_metrics(workdir / "metrics.jsonl")
    kept = checkpoint.steps(workdir / "checkpoints")
    return max(0, (rows[-1]["step"] if rows else 0) - (kept[-1] if kept else 0))


def patience(child, chance):
    """Waits for a random moment: of the whole run, or of its training."""
    path, wait = child.workdir / "metrics.jsonl", chance.uniform(0.5, LONGEST)
    if chance.random() < TRAINING:
        before = len(record.read_metrics(path))
        wait *= TRAINS / LONGEST
        while not child.ended and len(record.read_metrics(path)) <= before:
            time.sleep(0.02)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.process.wait(wait)


def disturbed(name, workdir, chance, counts):
    """One run that is killed again and again, to its end."""
    kills, flipped = 0, set()
    while True:
        with harness.spawn(*RUNS[name], workdir=workdir) as child:
            if kills < AT_MOST:
                patience(child, chance)
            ended = child.ended
            if not ended and kills < AT_MOST:
                number = chance.choices([*SIGNALS], [*SIGNALS.values()])[0]
                harness.kill(child, number)
                kills += 1
                counts[f"stopped by {signal.Signals(number).name}"] += 1
            result = harness.finish(child)
        counts["processes"] += 1
        if result.code == 0:
            return
        # A signal may also come before there is anything to be saved: then it kills.
        stopped = {-9, 130, 143, -signal.SIGTERM, -signal.SIGINT}
        if ended or result.code not in stopped:
            raise AssertionError(f"{name} failed: {result.output}")
        counts["checkpoints verified"] += verified(workdir, flipped)
        counts["steps lost"] += lost(workdir)
        counts["largest loss"] = max(counts["largest loss"], lost(workdir))
        steps = checkpoint.steps(workdir / "checkpoints")
        # With one step alone there would be nothing to go back to, as it must be.
        # A bit that is flipped twice is as it was.
        fresh = len(steps) > 1 and not flipped & {*steps}
        if fresh and chance.random() < FLIPS:
            harness.corrupt(harness.largest(workdir / "checkpoints" / str(steps[-1])))
            counts["bits flipped"] += 1
            flipped.add(steps[-1])


def soak(minutes, seed, places):
    """Rounds until the time is over.   Returns: counts; unequal rounds are listed."""
    logging.disable(logging.WARNING)  # of orbax, for every checkpoint it reads
    chance, counts = random.Random(seed), collections.Counter()
    wanted = {}
    for name, arguments in RUNS.items():
        whole = places / f"whole-{name}"
        result = harness.run(*arguments, workdir=whole)
        assert result.code == 0, result.output
        wanted[name] = outcome(whole)
    unequal, started = [], time.monotonic()
    while time.monotonic() - started < 60 * minutes:
        name = [*RUNS][counts["rounds"] % len(RUNS)]
        workdir = places / f"round-{counts['rounds']}"
        disturbed(name, workdir, chance, counts)
        found = outcome(workdir)
        wrong = [k for k, value in found.items() if value != wanted[name][k]]
        unequal += [f"round {counts['rounds']} ({name}): {', '.join(wrong)}"] * bool(
            wrong
        )
        counts["rounds"] += 1
        counts[f"rounds of the {name}"] += 1
        passed = time.monotonic() - started
        sys.stdout.write(f"{passed:6.0f} s  {dict(counts)}  unequal: {unequal}\n")
        sys.stdout.flush()
    return counts, unequal, time.monotonic() - started


def main():
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="without .json or .md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as places:
        harness.CACHE = Path(places) / "jax-cache"
        counts, unequal, seconds = soak(args.minutes, args.seed, Path(places))
    about = {
        "command": "PYTHONPATH=tests python -m faults.soak "
        f"--minutes={args.minutes:g} --seed={args.seed}",
        "date": datetime.date.today().isoformat(),
        "device": f"{jax.devices()[0].device_kind} ({jax.default_backend()})",
        "python": platform.python_version(),
        "versions": {
            name: metadata.version(name)
            for name in ("jax", "flax", "optax", "orbax-checkpoint")
        },
        "seconds": round(seconds),
        "counts": dict(sorted(counts.items())),
        "rounds unequal": unequal,
    }
    if args.out:
        record.write_json(args.out.with_suffix(".json"), about)
        args.out.with_suffix(".md").write_text(table(about))
    sys.stdout.write(json.dumps(about, indent=1) + "\n")
    sys.exit(bool(unequal))


def table(about):
    """The same as markdown."""
    counts = about["counts"]
    rows = [(k, v) for k, v in counts.items() if k != "largest loss"]
    rows += [
        ("steps lost at most at once", counts.get("largest loss", 0)),
        ("rounds that differed in any bit", len(about["rounds unequal"])),
    ]
    versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items())
    return (
        "# Soak: stopped at random, again and again\n\n"
        f"`{about['command']}`, {about['date']}, {about['seconds']} seconds on "
        f"{about['device']}, Python {about['python']}, {versions}.\n\n"
        "A round is a run of a small MLP (1,500 steps) or DiT (600), saved every 50 "
        "steps, stopped at\nrandom up to 8 times and started again by the same "
        "command; sometimes a bit of its newest\ncheckpoint is flipped in between. At "
        "its end the checkpoint, the rows of metrics.jsonl,\nthe samples and their "
        "neighbours are compared with those of a run that nothing disturbed.\n\n"
        "| counted | |\n|---|---:|\n"
        + "".join(f"| {name} | {value:,} |\n" for name, value in rows)
        + "\n"
        + "".join(f"- {line}\n" for line in about["rounds unequal"])
    ).rstrip() + "\n"


if __name__ == "__main__":
    main()
