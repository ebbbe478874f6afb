"""Many runs as one sweep: on this machine, on a SLURM cluster, or on Ray.

    python launch/sweep.py run SWEEP.py --workdir=DIR [--engine=slurm] [--workers=8]
    python launch/sweep.py status SWEEP.py --workdir=DIR
    python launch/sweep.py aggregate SWEEP.py --workdir=DIR

SWEEP.py has a CONFIG, as --config takes it, FIELDS that all points have besides, where
there are any, and a function points() that yields dicts of what differs: a value for a
field, a list or range for a grid over it, and "seeds" for how many. Each point is a run
of its own, in DIR/points/<point>:

    CONFIG = "configs/digits.py"
    FIELDS = {"train.steps": 3_000}
    def points():
        yield {"data.num_examples": [50, 100], "model.width": [32, 64], "seeds": 4}

An engine does no more than start workers, all with the same command; each takes the
next point that nobody has, until none is left. So finished points are skipped, a killed
worker costs what its point had not saved, and more workers may come at any time. A
point that fails ends no other: it is listed, and done again by --retry.

Exit codes: 0 all done; 2 usage; 1 where points failed, or are left; 130 and 143 after a
signal, with everything saved.
"""

import argparse
import contextlib
import importlib
import itertools
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.markup import escape
from rich.table import Table

from memsep_jax import checkpoint, experiments
from memsep_jax.experiments import DRAWINGS
from memsep_jax.experiments.config import build, grid
from memsep_jax.experiments.config.command import UsageError, load
from memsep_jax.experiments.config.grid import Point
from memsep_jax.experiments.reporting import figures
from memsep_jax.experiments.runtime import (
    locks,
    points,
    record,
    session,
    signals,
    terminal,
)
from memsep_jax.experiments.studies import results

STATES = ("done", "failed", "running", "stopped", "waiting")
OPEN = ("stopped", "waiting")
MEASURE = "memorization.ratio"  # what the picture shows, where runs have it
LOOK_EVERY = 1.0  # seconds between looks at the points, where a sweep is waited for
GRACE = 120.0  # seconds that a worker has for its last save
LONG = 150  # characters of why a point failed, in a table


# What a sweep is.


def read(file) -> list[Point]:
    """All points of a sweep file.   Raises: UsageError with what is wrong in it."""
    try:
        names = runpy.run_path(str(file))
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}") from error
    except Exception as error:  # whatever a file of a person raises
        raise UsageError(f"{file}: {type(error).__name__}: {error}") from error
    if missing := {"CONFIG", "points"} - names.keys():
        raise UsageError(
            f"{file} defines no {' and no '.join(sorted(missing))}: give CONFIG = "
            '"configs/digits.py" and a points() that yields dicts of fields'
        )
    try:
        base = load(names["CONFIG"])
        grid.override(base, names.get("FIELDS", {}))
        found = [one for given in names["points"]() for one in _grid(given)]
    except (UsageError, AttributeError, TypeError, ValueError) as error:
        raise UsageError(f"{file}: {error}") from error
    points: list[Point] = []
    known: dict[str, str] = {}
    for values in found:
        name = grid.listed(values)
        try:
            config = grid.seeded(base, values.get("seed", 0))
            grid.override(config, {k: v for k, v in values.items() if k != "seed"})
            build.check(config)
        except build.ConfigError as error:
            raise UsageError(f"{file}: point {name}: {error}") from error
        text = json.dumps(build.to_json(config), sort_keys=True)
        if text in known:
            raise UsageError(
                f"{file}: the points {known[text]} and {name} are one: they give the "
                "same config. Leave one out"
            )
        known[text] = name
        # With "=" in a value, one field could read as two.
        unsure = "=" in "".join(map(str, values.values()))
        known_by = grid.file_name(name or "all", repr(values) if unsure else None)
        points.append(Point(known_by, values, config))
    if not points:
        raise UsageError(f"{file}: points() yields nothing: give at least one dict")
    return points


def _grid(given: dict):
    """{"a": [1, 2], "b": 3, "seeds": 2} -> {"a": 1, "b": 3, "seed": 0}, ..."""
    if not isinstance(given, dict):
        raise TypeError(f"points() yields {given!r}: each must be a dict of fields")
    given = dict(given)
    seeds = given.pop("seeds", None)
    if seeds is not None:
        if not isinstance(seeds, int) or seeds < 1 or "seed" in given:
            raise ValueError(
                f"seeds={seeds!r} must be a number of seeds, at least 1, instead of "
                'a "seed"'
            )
        given["seed"] = range(seeds)
    axes = [v if isinstance(v, (list, range)) else [v] for v in given.values()]
    for choice in itertools.product(*axes):
        yield dict(zip(given, choice, strict=True))


def check(file, points: list[Point]) -> None:
    """Builds each config, once for all its seeds, as its run will.

    Raises: UsageError, before anything is written.
    """
    built = set()
    for point in points:
        key = tuple((k, str(v)) for k, v in point.values.items() if k != "seed")
        if key in built:
            continue
        built.add(key)
        try:
            if point.config.experiment == "train":
                build.build(point.config)
            elif point.config.experiment in DRAWINGS and "model" in point.config:
                grid.check(point.config)
        except (checkpoint.ConflictError, ValueError) as error:
            raise UsageError(f"{file}: point {point.name}: {error}") from error


# What is known of a point: its run, a claim while a worker has it, why it failed.


def place(workdir: Path, point: Point) -> Path:
    """The workdir of a point's run."""
    folder = workdir / "points" / point.name
    # As it was named before the names of two points could not be one.
    plain = re.sub(r"[/\0]", "_", grid.listed(point.values)) or "all"
    former = folder.with_name(grid.file_name(plain))
    if former != folder and not folder.exists():
        with contextlib.suppress(UsageError):
            known = load(f"{former}/config.json")
            if build.to_json(known) == build.to_json(point.config):
                return former
    return folder


def _claim(workdir, point):
    return workdir / "points" / f"{point.name}.claim"


def _why(workdir, point):
    return workdir / "points" / f"{point.name}.failed.json"


def state(workdir: Path, point: Point) -> str:
    """One of STATES."""
    claim = _claim(workdir, point)
    if locks.gone(claim) is None:
        return "running"
    outcome = _outcome(workdir, point)
    return "stopped" if outcome in OPEN and claim.exists() else outcome


def _outcome(workdir, point):
    folder = place(workdir, point)
    if _why(workdir, point).exists():
        return "failed"
    if session.Session(folder, point.config).is_complete():
        return "done"
    return "stopped" if (folder / "run.json").exists() else "waiting"


def _counted(states) -> str:
    """ "3 done, 1 running"."""
    counts = Counter(states)
    return ", ".join(f"{counts[name]} {name}" for name in STATES if counts[name])


def work(workdir: Path, points: list[Point]) -> None:
    """Runs what nobody has, point by point, until nothing is left.

    Raises: Interrupted, where a signal came and what was begun is saved; StorageError.
    """
    while left := [
        point
        for point in points
        # A claim that nobody holds is of a worker that this point ended.
        if not _claim(workdir, point).exists() and _outcome(workdir, point) in OPEN
    ]:
        for point in left:
            _try(workdir, point)


def _try(workdir, point):
    """Runs a point, or leaves it to who was faster."""
    claim = _claim(workdir, point)
    try:
        held = locks.take(claim)
    except checkpoint.ConflictError:
        return
    try:
        if _outcome(workdir, point) not in OPEN:
            return
        print(f"== {point.name}", flush=True)
        try:
            experiments.run(point.config, place(workdir, point))
        except checkpoint.StorageError:  # of no single point
            raise
        except Exception as error:
            print(f"failed: {points.short(error)}", flush=True)
            record.write_json(_why(workdir, point), points.explained(error))
        jax.clear_caches()
    finally:
        claim.unlink()
        os.close(held)


def _clear(workdir, points, retry):
    """What was killed may be done again, and what failed where that is asked for."""
    for point in points:
        if locks.gone(claim := _claim(workdir, point)) is not None:
            claim.unlink(missing_ok=True)
        if retry:
            _why(workdir, point).unlink(missing_ok=True)


# The engines. Each refuses what it cannot do, and gives start(workers), which yields
# for as long as they are at work, and how many there are where nobody says.


class Worker:
    """A worker as a process of its own, wherever an engine calls this.

    It saves and ends when this process does: its input is closed then.
    """

    def __init__(self, command: list[str], log: Path):
        self.command, self.log, self.cwd = command, log, Path.cwd()
        self.child: Any = None

    def start(self, env=None, cores=()):
        """Begins.   Args: env, what its environment has besides; cores, if not all."""
        with open(self.log, "ab") as log:
            self.child = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.cwd,
                env=os.environ | (env or {}),
                start_new_session=True,  # a Ctrl-C is for this process, once
            )
        if cores:  # before it has threads of its own
            os.sched_setaffinity(self.child.pid, cores)

    def stop(self):
        """Asks it to save and end."""
        if self.child:
            self.child.stdin.close()

    def wait(self, seconds=GRACE):
        """Its exit code, or None where it has not ended by then."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.child and self.child.wait(seconds)

    def __call__(self):
        """Starts it and waits: what an engine does with it."""
        try:
            self.start()
            return self.wait(float("inf"))
        finally:
            self.stop()
            self.wait()

    def checkpoint(self):
        """What submitit asks for before the time of a job ends: queue it again."""
        from submitit.helpers import DelayedSubmission

        self.stop()
        self.wait()
        return DelayedSubmission(Worker(self.command, self.log))


def local(resources):
    """Processes on this machine, each with its device or its share of the cores."""
    devices = _devices(resources.pop("devices", None))
    if resources:
        raise UsageError(
            f"--resources={','.join(resources)}: --engine=local knows devices=0+1 only"
        )
    # Of macOS nobody may choose the cores.
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []

    def start(workers):
        each = -(-len(workers) // max(len(devices), 1))
        try:
            for i, worker in enumerate(workers):
                env, own = {}, []
                if devices:
                    env["CUDA_VISIBLE_DEVICES"] = devices[i % len(devices)]
                    env["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.9 / each:.3f}"
                elif len(workers) > 1:
                    own = cores[i :: len(workers)] or cores
                worker.start(env, own)
            while any([worker.wait(0) is None for worker in workers]):
                yield
        finally:
            for worker in workers:
                worker.stop()
            for worker in workers:
                worker.wait()

    return start, len(devices) or max(1, len(cores) // 2)


def slurm(resources):
    """Jobs of a SLURM cluster; resources are the parameters of submitit."""
    submitit = _imported("submitit", "slurm")
    cluster = resources.pop("cluster", "slurm")
    if cluster == "slurm" and shutil.which("sbatch") is None:
        raise UsageError(
            "--engine=slurm: there is no sbatch here: run this on a login node of the "
            "cluster, or give --engine=local"
        )

    def made(folder):
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
        executor.update_parameters(**{"timeout_min": 24 * 60} | resources)
        return executor

    try:
        with tempfile.TemporaryDirectory() as probe:  # a folder is made at once
            made(probe)
    except (NameError, TypeError, ValueError) as error:
        raise UsageError(f"--engine=slurm: {error}") from error

    def start(workers):
        executor = made(workers[0].log.parent / "%j")
        with executor.batch():
            jobs = [executor.submit(worker) for worker in workers]
        print("jobs", *[job.job_id for job in jobs], flush=True)
        try:
            while not all([job.done() for job in jobs]):
                yield
        except GeneratorExit:
            print("the jobs go on without this; `status` shows how far they are")
            raise

    return start, 4


def ray(resources):
    """Tasks of a Ray cluster; resources are the options of ray.remote."""
    engine = _imported("ray", "ray")
    try:
        task = engine.remote(**{"num_cpus": 1} | resources)(lambda worker: worker())
        # Ray has defaults that it warns of; nobody here can answer.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        engine.init(include_dashboard=False, log_to_driver=False)
    except (ConnectionError, TypeError, ValueError) as error:
        raise UsageError(f"--engine=ray: {error}") from error
    count = max(1, int(engine.cluster_resources().get("CPU", 1)) // 2)

    def start(workers):
        jobs = [task.remote(worker) for worker in workers]
        try:
            while len(engine.wait(jobs, num_returns=len(jobs), timeout=0)[1]):
                yield
        finally:
            for job in jobs:
                engine.cancel(job)
            engine.wait(jobs, num_returns=len(jobs), timeout=GRACE)
            engine.shutdown()

    return start, count


ENGINES = {"local": local, "slurm": slurm, "ray": ray}


def _imported(name, extra):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(
            f"--engine={extra} needs {name}, which is not installed ({error}): "
            f"pip install -e '.[{extra}]'"
        ) from error


def _devices(given) -> list[str]:
    """The GPUs of this machine, as CUDA_VISIBLE_DEVICES names them."""
    if given is None:
        given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name for name in re.split("[+,]", str(given)) if name]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return [str(i) for i in range(len(listed.stdout.splitlines()))]


# What comes out.


def numbers(workdir: Path, point: Point) -> dict:
    """The scalars of a finished run: {"memorization.ratio": 0.5, ...}."""

    def scalars(value, name):
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from scalars(inner, f"{name}.{key}" if name else key)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield name, value

    return dict(scalars(record.read_json(place(workdir, point) / "metrics.json"), ""))


def aggregate(workdir: Path, points: list[Point], measure=None) -> Table:
    """All points as one table and picture, with gaps where one is not done.

    Writes points.csv (a row a point), metrics.json (means over the seeds with 95 %
    intervals) and sweep.png, of `measure` against the first axis.
    Returns: the table for a person.   Raises: UsageError where nothing is done.
    """
    states = [state(workdir, point) for point in points]
    found = [
        numbers(workdir, point) if what == "done" else {}
        for point, what in zip(points, states, strict=True)
    ]
    names = list(dict.fromkeys(itertools.chain(*found)))
    if not names:
        raise UsageError(f"{workdir}: no point is done yet: there is nothing to show")
    measure = measure or (MEASURE if MEASURE in names else names[0])
    if measure not in names:
        raise UsageError(
            f"--measure={measure}: no run has it; they have {', '.join(names)}"
        )
    fields = dict.fromkeys(k for p in points for k in p.values if k != "seed")
    axes = [k for k in fields if len({str(p.values.get(k)) for p in points}) > 1]
    columns = {k: [p.values.get(k, "") for p in points] for k in (*fields, "seed")}
    columns["state"] = states
    columns |= {name: [row.get(name, "") for row in found] for name in names}
    record.write_csv(workdir / "points.csv", columns)
    rows = [
        {k: v for k, v in point.values.items() if k in (*axes, "seed")} | row
        for point, row in zip(points, found, strict=True)
        if row
    ]
    table = results.over_seeds(rows, points, axes)
    metrics = {
        "experiment": workdir.resolve().name,
        "columns": [*axes, measure, "seeds"],
        "states": Counter(states),
        "table": table,
    }
    record.write_json(workdir / "metrics.json", metrics)
    picture = figures.encode(draw(table, axes, measure), "png")
    with record.replacing(workdir / "sweep.png") as path:
        path.write_bytes(picture)
    return results.summary(workdir)


def draw(table, axes, measure):
    """The measure against the first axis, a line for each value of the others."""
    first, *others = axes or [None]
    ticks = list(dict.fromkeys(row.get(first, "all") for row in table))
    named = any(isinstance(x, str) or x is None for x in ticks)
    if not named:
        ticks.sort()
    groups: dict[str, list[dict]] = {}
    for row in table:
        label = ", ".join(f"{_last(a)} = {row[a]}" for a in others if a in row)
        groups.setdefault(label, []).append(row)

    def at(row):
        return ticks.index(row.get(first, "all")) if named else row[first]

    def line(label, rows):
        rows = sorted(rows, key=at)
        names = ("mean", "low", "high")
        gap = dict.fromkeys(names, np.nan)
        mean, low, high = np.array(
            [[row.get(measure, gap)[name] for row in rows] for name in names]
        )
        return figures.Line([at(row) for row in rows], mean, label, low, high)

    lines = [line(label or None, rows) for label, rows in groups.items()]
    ends = [row[measure] for row in table if measure in row]
    share = all(0 <= value["mean"] <= 1 for value in ends)
    if gaps := [at(row) for row in table if measure not in row]:
        low = [-0.02 if share else min(value["mean"] for value in ends)] * len(gaps)
        lines.append(figures.Line(gaps, low, "no result", style="x", color="0.5"))
    wide = not named and ticks[0] > 0 and ticks[-1] >= 8 * ticks[0]
    return figures.curves(
        [
            figures.Panel(
                "", lines, _last(first or "sweep"), measure.replace(".", " "),
                xscale="log" if wide else "linear", yscale="linear", percent=share,
                ticks=[str(tick) for tick in ticks] if named else None,
            )
        ]
    )  # fmt: skip


def _last(field):
    """ "data.num_examples" -> "num examples"."""
    return field.rpartition(".")[2].replace("_", " ")


def status(workdir: Path, points: list[Point]) -> Table:
    """Every point and what is known of it, as a table for a person."""
    states = [state(workdir, point) for point in points]
    shown = Table(title=_counted(states))
    for name in ("point", "", "seconds", "why"):
        shown.add_column(name, overflow="fold")
    for point, what in zip(points, states, strict=True):
        known = record.read_json(place(workdir, point) / "run.json") or {}
        seconds = sum(known.get("seconds", {}).values())
        why = (record.read_json(_why(workdir, point)) or {}).get("error", "")
        about = why.partition("\n")[0][:LONG]
        row = (point.name, what, f"{seconds:.0f}" if seconds else "", about)
        shown.add_row(*map(escape, row))
    return shown


# The command.


def run(args, points) -> int:
    """Starts workers and waits for them.   Returns: the exit code."""
    workdir = args.workdir
    if args.workers is not None and args.workers < 1:
        raise UsageError(f"--workers={args.workers} must be at least 1")
    check(args.sweep, points)
    start, count = ENGINES[args.engine](_resources(args.resources))
    count = min(args.workers or count, len(points))
    logs = workdir / "workers"
    for folder in (logs, workdir / "points"):
        folder.mkdir(parents=True, exist_ok=True)
    _clear(workdir, points, args.retry)
    command = [sys.executable, str(Path(__file__).resolve()), "work", str(args.sweep)]
    command += [f"--workdir={workdir}", "--attached"]
    workers = [Worker(command, logs / f"{i}.log") for i in range(count)]

    def stop(number, frame):
        for other in (signal.SIGTERM, signal.SIGINT):
            signal.signal(other, signal.SIG_DFL)
        raise signals.Interrupted(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    print(f"{len(points)} points, {count} workers ({args.engine}): {logs}", flush=True)
    at_work = start(workers)
    try:
        _follow(at_work, workdir, points)
    except signals.Interrupted as error:
        at_work.close()
        print("stopped: the same command goes on", flush=True)
        return error.exit_code
    return finish(args, points)


def _follow(at_work, workdir, points):
    """Says how far the points are, until no worker is at work."""
    said, states = None, dict.fromkeys((point.name for point in points), "waiting")
    for _ in at_work:
        for point in points:
            if states[point.name] not in ("done", "failed"):
                states[point.name] = state(workdir, point)
        if said != (text := _counted(states.values())):
            print(text, flush=True)
        said = text
        time.sleep(LOOK_EVERY)


def finish(args, points) -> int:
    """Shows and writes what there is.   Returns: the exit code."""
    left = [point for point in points if state(args.workdir, point) != "done"]
    if len(left) < len(points) or args.action == "aggregate":
        _show(aggregate(args.workdir, points, args.measure))
        print(f"{args.workdir}/points.csv, metrics.json, sweep.png")
    if args.action == "aggregate" or not left:
        return 0
    _show(status(args.workdir, left))
    print(
        f"{len(left)} of {len(points)} points are not done: the same command goes on, "
        "--retry does failed ones again; what workers said is in "
        f"{args.workdir}/workers"
    )
    return 1


def attend(args) -> int:
    """Is a worker.   Returns: the exit code."""
    # By this signal SLURM tells a whole job of its end: submitit listens, and closes
    # the input of this process.
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    for name, value in {
        "jax_compilation_cache_dir": str(args.workdir / "compiled"),  # of all workers
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }.items():
        if name.upper() not in os.environ:  # what a person chose stays
            jax.config.update(name, value)
    if args.attached:

        def end_with_it():
            os.read(0, 1)  # returns when whoever started this is no more
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=end_with_it, daemon=True).start()
    try:
        work(args.workdir, read(args.sweep))
    except (signals.Interrupted, checkpoint.StorageError) as error:
        print(f"ended: {error}", flush=True)
        return error.exit_code
    return 0


def _resources(text) -> dict[str, Any]:
    """ "num_gpus=1,slurm_partition=a" -> {"num_gpus": 1, "slurm_partition": "a"}."""
    found: dict[str, Any] = {}
    for part in filter(None, (text or "").split(",")):
        name, equals, value = part.partition("=")
        if not (name and equals):
            raise UsageError(f"--resources={text} must be name=value,name=value")
        found[name] = int(value) if value.isdigit() else value
    return found


def _show(table):
    terminal.Terminal(highlight=False, soft_wrap=True).print(table)


def main(argv=None) -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["run", "status", "aggregate", "work"])
    parser.add_argument("sweep", type=Path, help="the sweep, a Python file")
    parser.add_argument("--workdir", type=Path, help="by default runs/<sweep>")
    parser.add_argument("--engine", choices=list(ENGINES), default="local")
    parser.add_argument("--workers", type=int, help="by default as many as fit")
    parser.add_argument("--resources", help="of each worker, in the engine's own words")
    parser.add_argument("--retry", action="store_true", help="failed points again")
    parser.add_argument("--measure", help=f"what sweep.png shows, such as {MEASURE}")
    # Of a worker, from whoever starts it.
    parser.add_argument("--attached", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.sweep = args.sweep.resolve()
    args.workdir = (args.workdir or Path("runs") / args.sweep.stem).resolve()
    try:
        if args.action == "work":
            return attend(args)
        # Whoever waits takes no device from those who work.
        jax.config.update("jax_platforms", "cpu")
        points = read(args.sweep)
        if args.action == "run":
            return run(args, points)
        if args.action == "status":
            _show(status(args.workdir, points))
            return 0
        return finish(args, points)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
