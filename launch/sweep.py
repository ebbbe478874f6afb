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
import importlib
import itertools
import json
import math
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
from typing import Any, NamedTuple

import numpy as np

STATES = ("done", "failed", "running", "stopped", "waiting")
OPEN = ("stopped", "waiting")
MEASURE = "memorization.ratio"  # what the picture shows, where runs have it
LOOK_EVERY = 1.0  # seconds between looks at the points, where a sweep is waited for
GRACE = 120.0  # seconds that a worker has for its last save
LONG = 150  # characters of a name: file systems take 255


class UsageError(Exception):
    """What a person must change before anything can begin."""


class Point(NamedTuple):
    """One run of a sweep."""

    name: str  # "data.num_examples=50,seed=0"
    values: dict[str, Any]  # what differs from the sweep's config, the seed last
    config: Any  # the ConfigDict of the run


# What a sweep is.


def read(file) -> list[Point]:
    """All points of a sweep file.   Raises: UsageError with what is wrong in it."""
    from memsep_jax import command
    from memsep_jax.experiments import setup, sweep

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
        base = command.load(names["CONFIG"])
        sweep.override(base, names.get("FIELDS", {}))
        found = [one for given in names["points"]() for one in _grid(given)]
    except (command.UsageError, AttributeError, TypeError, ValueError) as error:
        raise UsageError(f"{file}: {error}") from error
    points: list[Point] = []
    known: dict[str, str] = {}
    for values in found:
        name = ",".join(f"{field}={value}" for field, value in values.items())
        try:
            config = sweep.seeded(base, values.get("seed", 0))
            fields = {k: v for k, v in values.items() if k != "seed"}
            sweep.override(config, fields)
            setup.check(config)
        except setup.ConfigError as error:
            raise UsageError(f"{file}: point {name}: {error}") from error
        text = json.dumps(setup.to_json(config), sort_keys=True)
        if text in known:
            raise UsageError(
                f"{file}: the points {known[text]} and {name} are one: they give the "
                "same config. Leave one out"
            )
        known[text] = name
        points.append(Point(_file_name(name), values, config))
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
    from memsep_jax import checkpoint, sources
    from memsep_jax.experiments import DRAWINGS, setup, sweep

    built = set()
    for point in points:
        key = tuple((k, str(v)) for k, v in point.values.items() if k != "seed")
        if key in built:
            continue
        built.add(key)
        try:
            if point.config.experiment == "train":
                setup.build(point.config)
            elif point.config.experiment in DRAWINGS and "model" in point.config:
                sweep.check(point.config)
        except (
            setup.ConfigError, sources.DataError, checkpoint.ConflictError, ValueError
        ) as error:  # fmt: skip
            raise UsageError(f"{file}: point {point.name}: {error}") from error


def _file_name(name):
    name = name.replace("/", "_").replace("\0", "_") or "all"
    if len(name) > LONG:
        import hashlib

        name = f"{name[:LONG]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name


# What is known of a point: its run, a claim while a worker has it, why it failed.


def place(workdir, point: Point) -> Path:
    """The workdir of a point's run."""
    return Path(workdir) / "points" / point.name


def _claim(workdir, point):
    return Path(workdir) / "points" / f"{point.name}.claim"


def _why(workdir, point):
    return Path(workdir) / "points" / f"{point.name}.failed.json"


def state(workdir, point: Point) -> str:
    """One of STATES."""
    from memsep_jax.experiments import session

    claim, outcome = _claim(workdir, point), _outcome(workdir, point)
    if not claim.exists():
        return outcome
    if session.gone(claim) is None:
        return "running"
    return "stopped" if outcome in OPEN else outcome


def _outcome(workdir, point):
    from memsep_jax.experiments import session

    run = place(workdir, point)
    if _why(workdir, point).exists():
        return "failed"
    if session.Session(run, point.config).is_complete():
        return "done"
    return "stopped" if (run / "run.json").exists() else "waiting"


def work(workdir, points: list[Point]) -> None:
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
    import jax

    from memsep_jax import checkpoint, experiments
    from memsep_jax.experiments import record, session, sweep

    claim = _claim(workdir, point)
    try:
        held = session.lock(claim)
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
            print(f"failed: {sweep.short(error)}", flush=True)
            record.write_json(_why(workdir, point), sweep.explained(error))
        jax.clear_caches()
    finally:
        claim.unlink()
        os.close(held)


def _clear(workdir, points, retry):
    """What was killed may be done again, and what failed where that is asked for."""
    for point in points:
        if state(workdir, point) != "running":
            _claim(workdir, point).unlink(missing_ok=True)
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
        only = [f"--cores={','.join(map(str, cores))}"] if cores else []
        with open(self.log, "ab") as log:
            self.child = subprocess.Popen(
                self.command + only,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.cwd,
                env={**os.environ, **(env or {})},
                start_new_session=True,  # a Ctrl-C is for this process, once
            )

    def stop(self):
        """Asks it to save and end."""
        if self.child:
            self.child.stdin.close()

    def wait(self, seconds=GRACE):
        """Its exit code, or None where it has not ended by then."""
        limit = time.monotonic() + seconds
        while self.child and self.child.poll() is None and time.monotonic() < limit:
            time.sleep(0.1)
        return self.child and self.child.poll()

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
    _nothing_left("local", resources, "devices=0+1")
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


def _nothing_left(engine, resources, known):
    if resources:
        raise UsageError(
            f"--resources={','.join(resources)}: --engine={engine} knows {known} only"
        )


def _devices(given) -> list[str]:
    """The GPUs of this machine, as CUDA_VISIBLE_DEVICES names them."""
    if given is None:
        given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name for name in re.split("[+,]", str(given)) if name]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return [str(i) for i, _ in enumerate(listed.stdout.splitlines())]


# What comes out.


def numbers(workdir, point: Point) -> dict:
    """The scalars of a finished run: {"memorization.ratio": 0.5, ...}."""
    from memsep_jax.experiments import record

    def scalars(value, name):
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from scalars(inner, f"{name}.{key}" if name else key)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield name, value

    if state(workdir, point) != "done":
        return {}
    return dict(scalars(record.read_json(place(workdir, point) / "metrics.json"), ""))


def aggregate(workdir, points: list[Point], measure=None) -> Any:
    """All points as one table and picture, with gaps where one is not done.

    Writes points.csv (a row a point), metrics.json (means over the seeds with 95 %
    intervals) and sweep.png, of `measure` against the first axis.
    Returns: the table for a person.   Raises: UsageError where nothing is done.
    """
    from memsep_jax.experiments import figures, record, sweep

    known = {point.name: numbers(workdir, point) for point in points}
    names = list(dict.fromkeys(name for row in known.values() for name in row))
    if not names:
        raise UsageError(f"{workdir}: no point is done yet: there is nothing to show")
    measure = measure or ("memorization.ratio" if MEASURE in names else names[0])
    if measure not in names:
        raise UsageError(
            f"--measure={measure}: no run has it; they have {', '.join(names)}"
        )
    fields = dict.fromkeys(k for p in points for k in p.values if k != "seed")
    axes = [k for k in fields if len({str(p.values.get(k)) for p in points}) > 1]
    columns = {
        name: [point.values.get(name, "") for point in points]
        for name in [*fields, "seed"]
    }
    columns["state"] = [state(workdir, point) for point in points]
    columns |= {n: [known[p.name].get(n, "") for p in points] for n in names}
    record.write_csv(Path(workdir) / "points.csv", columns)
    own = (*axes, "seed")
    rows = [
        {k: v for k, v in point.values.items() if k in own} | known[point.name]
        for point in points
        if known[point.name]
    ]
    table = sweep.over_seeds(rows, points, axes)
    metrics = {
        "experiment": Path(workdir).resolve().name,
        "columns": [*axes, measure, "seeds"],
        "states": Counter(columns["state"]),
        "table": table,
    }
    record.write_json(Path(workdir) / "metrics.json", metrics)
    picture = figures.encode(draw(table, axes, measure), "png")
    with record.replacing(Path(workdir) / "sweep.png") as path:
        path.write_bytes(picture)
    return sweep.summary(Path(workdir))


def draw(table, axes, measure):
    """The measure against the first axis, a line for each value of the others."""
    from memsep_jax.experiments import figures

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
        nothing = {"mean": math.nan, "low": math.nan, "high": math.nan}
        mean, low, high = (
            np.array([row.get(measure, nothing)[name] for row in rows])
            for name in ("mean", "low", "high")
        )
        return figures.Line([at(row) for row in rows], mean, label, low, high)

    lines = [line(label or None, rows) for label, rows in groups.items()]
    ends = [row[measure] for row in table if measure in row]
    share = all(0 <= value["mean"] <= 1 for value in ends)
    gaps = [row for row in table if measure not in row]
    if gaps:
        low = -0.02 if share else min(value["mean"] for value in ends)
        lines.append(
            figures.Line(
                [at(row) for row in gaps],
                [low] * len(gaps),
                "no result",
                style="x",
                color="0.5",
            )
        )
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


def status(workdir, points: list[Point]) -> Any:
    """Every point and what is known of it, as a table for a person."""
    from rich.markup import escape
    from rich.table import Table

    from memsep_jax.experiments import record

    states = [state(workdir, point) for point in points]
    counts = Counter(states)
    shown = Table(title=", ".join(f"{counts[s]} {s}" for s in STATES if counts[s]))
    for name in ("point", "", "seconds", "why"):
        shown.add_column(name, overflow="fold")
    for point, what in zip(points, states, strict=True):
        run = record.read_json(place(workdir, point) / "run.json") or {}
        seconds = sum(run.get("seconds", {}).values())
        why = (record.read_json(_why(workdir, point)) or {}).get("error", "")
        about = why.splitlines()[0][:LONG] if what == "failed" and why else ""
        row = (point.name, what, f"{seconds:.0f}" if seconds else "", about)
        shown.add_row(*map(escape, row))
    return shown


# The command.


class Stopped(BaseException):
    """SIGTERM or Ctrl-C."""


def run(args, points) -> int:
    """Starts workers and waits for them.   Returns: the exit code."""
    workdir = args.workdir
    check(args.sweep, points)
    start, count = ENGINES[args.engine](_resources(args.resources))
    if args.workers is not None and args.workers < 1:
        raise UsageError(f"--workers={args.workers} must be at least 1")
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
        raise Stopped(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    print(f"{len(points)} points, {count} workers ({args.engine}): {logs}", flush=True)
    at_work = start(workers)
    said = None
    states = dict.fromkeys((point.name for point in points), "waiting")
    try:
        for _ in at_work:
            for point in points:
                if states[point.name] not in ("done", "failed"):
                    states[point.name] = state(workdir, point)
            counts = Counter(states.values())
            text = ", ".join(f"{counts[s]} {s}" for s in STATES if counts[s])
            if text != said:
                print(text, flush=True)
            said = text
            time.sleep(LOOK_EVERY)
    except Stopped as error:
        at_work.close()
        print("stopped: the same command goes on", flush=True)
        return 128 + error.args[0]
    return finish(args, points)


def finish(args, points) -> int:
    """Shows and writes what there is.   Returns: the exit code."""
    left: dict[str, list[Point]] = {name: [] for name in STATES}
    for point in points:
        left[state(args.workdir, point)].append(point)
    if left["done"]:
        _show(aggregate(args.workdir, points, args.measure))
        print(f"{args.workdir}/points.csv, metrics.json, sweep.png")
    if len(left["done"]) == len(points):
        return 0
    bad = [p for p in points if p not in left["done"]]
    if args.action == "run":
        _show(status(args.workdir, bad))
        print(
            f"{len(bad)} of {len(points)} points are not done: the same command goes "
            "on, --retry does failed ones again; what workers said is in "
            f"{args.workdir}/workers"
        )
    return 1 if args.action == "run" else 0


def attend(args) -> int:
    """Is a worker.   Returns: the exit code."""
    # By this signal SLURM tells a whole job of its end: submitit listens, and closes
    # the input of this process.
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    if args.cores:
        os.sched_setaffinity(0, map(int, args.cores.split(",")))
    for name, value in {
        "JAX_COMPILATION_CACHE_DIR": str(args.workdir / "compiled"),  # of all workers
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }.items():
        os.environ.setdefault(name, value)
    if args.attached:

        def end_with_it():
            os.read(0, 1)  # returns when whoever started this is no more
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=end_with_it, daemon=True).start()
    from memsep_jax import checkpoint
    from memsep_jax.experiments import session

    try:
        work(args.workdir, read(args.sweep))
    except (session.Interrupted, checkpoint.StorageError) as error:
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
    from memsep_jax.experiments import session

    session.Terminal(highlight=False, soft_wrap=True).print(table)


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
    for hidden in ("--attached", "--cores"):  # of a worker, from its engine
        parser.add_argument(hidden, nargs="?", const=True, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.sweep = args.sweep.resolve()
    args.workdir = (args.workdir or Path("runs") / args.sweep.stem).resolve()
    try:
        if args.action == "work":
            return attend(args)
        import jax

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
