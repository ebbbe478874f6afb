"""Many runs as one sweep: on this machine, on a SLURM cluster, or on Ray.

    python launch/sweep.py run SWEEP.py --workdir=DIR [--engine=slurm] [--workers=8]
    python launch/sweep.py status SWEEP.py --workdir=DIR
    python launch/sweep.py aggregate SWEEP.py --workdir=DIR

SWEEP.py has a CONFIG, as --config takes it, FIELDS that all points share, where there
are any, and a function points() that yields dicts of what differs: a value for a field,
a list or range for a grid over it, and "seeds" for their number. Each point is a run of
its own, in DIR/points/<point>:

    CONFIG = "configs/digits.py"
    FIELDS = {"train.steps": 3_000}
    def points():
        yield {"data.num_examples": [50, 100], "model.width": [32, 64], "seeds": 4}

An engine does no more than start workers, all with the same command (`work`); each
takes the next point that nobody has, until none is left. So finished points are
skipped, a killed worker costs what its point had not saved, and more workers may come
at any time. A point that fails ends no other: it is listed, and done again by --retry.

Exit codes: 0 all done; 2 usage; 1 where points failed, or are left; 130 and 143 after a
signal, with everything saved.
"""

import argparse
import contextlib
import importlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from memsep_jax import memory

if __name__ == "__main__":  # before jax is imported
    memory.keep()

import jax

from memsep_jax import checkpoint, experiments
from memsep_jax.experiments.config import sweep_file
from memsep_jax.experiments.config.command import UsageError
from memsep_jax.experiments.runtime import compiled, runs, signals, terminal
from memsep_jax.experiments.studies import overview

LOOK_EVERY = 1.0  # seconds between looks at the points, where a sweep is waited for
GRACE = 120.0  # seconds that a worker has for its last save
ATTACHED = "MEMSEP_SWEEP_ATTACHED"  # in the environment of a worker: see `Worker`


# The engines. Each refuses what it cannot do, and returns start(workers), which yields
# for as long as they are at work, and how many workers there are by default.


class Worker:
    """A worker as a process of its own, wherever an engine calls this.

    It is attached to this process: when this one ends, its input is closed, and it
    saves and ends too.
    """

    def __init__(self, command: list[str], log: Path):
        self.command, self.log, self.cwd = command, log, Path.cwd()
        self.child: Any = None

    def start(self, env=None, cores=()):
        """Begins.   Args: env, more variables of its environment; cores, if not all."""
        with open(self.log, "ab") as log:
            self.child = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.cwd,
                env=os.environ | {ATTACHED: "1"} | (env or {}),
                start_new_session=True,  # a Ctrl-C is for this process, once
            )
        if cores:  # at once, as threads that it has already would keep all cores
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
    # macOS lets nobody choose the cores.
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []

    def start(workers):
        each = -(-len(workers) // max(len(devices), 1))
        try:
            for i, worker in enumerate(workers):
                env, own = {}, []
                if devices:
                    env["CUDA_VISIBLE_DEVICES"] = devices[i % len(devices)]
                    # JAX takes 75 % of a device when it starts: workers that have one
                    # device together divide nine tenths of it.
                    env["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.9 / each:.3f}"
                elif len(workers) > 1:
                    own = cores[i :: len(workers)] or cores
                worker.start(env, own)
            # A list: every worker is asked, so that one that ended leaves no zombie.
            while any([worker.wait(0) is None for worker in workers]):
                yield
        finally:
            # All are told before one is waited for: they save at the same time.
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
        # Parameters are checked before the workdir is touched: submitit makes a folder.
        with tempfile.TemporaryDirectory() as probe:
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
        # Without a value Ray warns about its default, which nobody here can act on.
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


# The command.


def run(args, points) -> int:
    """Starts workers and waits for them.   Returns: the exit code."""
    workdir = args.workdir
    if args.workers is not None and args.workers < 1:
        raise UsageError(f"--workers={args.workers} must be at least 1")
    sweep_file.check(args.sweep, points, experiments.DRAWINGS)
    start, count = ENGINES[args.engine](_resources(args.resources))
    count = min(args.workers or count, len(points))
    logs = workdir / "workers"
    for folder in (logs, workdir / "points"):
        folder.mkdir(parents=True, exist_ok=True)
    runs.clear(workdir, points, args.retry)
    # Relative to this folder, where all workers run: runs record the command, and it
    # holds where the project is moved.
    script, sweep, place = map(os.path.relpath, (__file__, args.sweep, workdir))
    command = [sys.executable, script, "work", sweep, f"--workdir={place}"]
    workers = [Worker(command, logs / f"{i}.log") for i in range(count)]

    def stop(number, frame):
        # The second signal does not wait for the workers.
        for other in signals.ENDING:
            signal.signal(other, signal.SIG_DFL)
        raise signals.Interrupted(number)

    for number in signals.ENDING:
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
    """Says how far the points are, whenever that changes, and how they have ended."""
    said, states = None, dict.fromkeys((point.name for point in points), "waiting")
    for pause in itertools.chain((LOOK_EVERY for _ in at_work), [0.0]):
        for point in points:
            if states[point.name] not in ("done", "failed"):
                states[point.name] = runs.state(workdir, point)
        if said != (text := runs.counted(states.values())):
            print(text, flush=True)
        said = text
        time.sleep(pause)


def finish(args, points) -> int:
    """Shows and writes what there is.   Returns: the exit code."""
    left = [point for point in points if runs.state(args.workdir, point) != "done"]
    if len(left) < len(points) or args.action == "aggregate":
        _show(overview.aggregate(args.workdir, points, args.measure))
        print(f"{args.workdir}/points.csv, metrics.json, sweep.png")
    if args.action == "aggregate" or not left:
        return 0
    _show(runs.status(args.workdir, left))
    print(
        f"{len(left)} of {len(points)} points are not done: the same command goes on, "
        "--retry does failed ones again; what workers said is in "
        f"{args.workdir}/workers"
    )
    return 1


def attend(args) -> int:
    """Does the points that nobody has, as a worker.   Returns: the exit code."""
    # SLURM sends this signal to a whole job before its end: submitit listens, and
    # closes the input of this process.
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    compiled.keep(args.workdir / "compiled")  # all workers compile the same ones
    if os.environ.get(ATTACHED):

        def end_with_it():
            os.read(0, 1)  # returns when whoever started this is no more
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=end_with_it, daemon=True).start()
    try:
        points = sweep_file.read(args.sweep)
        runs.work(args.workdir, points, experiments.run, _say)
    except (signals.Interrupted, checkpoint.StorageError) as error:
        print(f"ended: {error}", flush=True)
        return error.exit_code
    return 0


def _resources(text) -> dict[str, Any]:
    """ "num_gpus=1,slurm_partition=a" -> {"num_gpus": 1, "slurm_partition": "a"}."""
    known: dict[str, Any] = {}
    for part in filter(None, (text or "").split(",")):
        name, equals, value = part.partition("=")
        if not (name and equals):
            raise UsageError(f"--resources={text} must be name=value,name=value")
        known[name] = int(value) if value.isdigit() else value
    return known


def _say(text):
    print(text, flush=True)


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
    parser.add_argument(
        "--measure", help=f"what sweep.png shows, such as {overview.MEASURE}"
    )
    args = parser.parse_args(argv)
    args.sweep = args.sweep.resolve()
    args.workdir = (args.workdir or Path("runs") / args.sweep.stem).resolve()
    try:
        if args.action == "work":
            signals.leave(attend(args))
        # Whoever waits takes no device from those who work.
        jax.config.update("jax_platforms", "cpu")
        points = sweep_file.read(args.sweep)
        if args.action == "run":
            return run(args, points)
        if args.action == "status":
            _show(runs.status(args.workdir, points))
            return 0
        return finish(args, points)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
