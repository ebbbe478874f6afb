"""Real processes for the tests of faults: start, watch, kill, digest, corrupt.

    with harness.spawn(*harness.TINY, workdir=tmp_path / "run") as child:
        harness.wait_for_rows(child, 20)
        harness.kill(child, signal.SIGTERM)
        result = harness.finish(child)
    assert result.code == 143

`patch` is python that runs in the child before the command line does: it may slow or
break a function, so that no hook is needed in the package.
"""

import ast
import contextlib
import importlib.util
import json
import os
import pty
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from memsep_jax import checkpoint, experiments
from memsep_jax.experiments import record
from memsep_jax.experiments.config import command, schema
from memsep_jax.experiments.runtime.signals import Interrupted

ROOT = Path(__file__).parents[2]
CACHE: Path | None = None  # compiled programs, shared by the children of a session
# How children compile: as a user's run does, or, for a test, faster.
XLA_FLAGS: tuple[str, ...] = ()
OPTIMIZED = True
# For the environment of a child of a test that is about what XLA makes.
AS_A_USER = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_FLAGS": ""}
TIMEOUT = 120.0  # seconds; a child that hangs fails its test, and no other

# An MLP 2 x 32 on points in the plane: 30 steps, 12 samples in 3 chunks.
TINY = (
    "--config=configs/mlp_mixture.py:smoke",
    "--config.data.d=2",
    "--config.data.k=2",
    "--config.model.width=32",
    "--config.model.depth=2",
    "--config.train.steps=30",
    "--config.sampler.num_samples=12",
    "--config.run.chunk=4",
    "--config.run.log_every=1",
    "--config.run.save_every=5",
    "--config.run.evaluate_every=30",
    "--config.run.snapshots=0",
)
# A DiT of width 16 on digits.
TINY_DIT = (
    "--config=configs/digits.py:smoke",
    "--config.model.num_heads=2",
    *TINY[5:],
)

# Every row of metrics takes so long: kills land where they are meant to.
SLOW_STEPS = """
from memsep_jax.experiments import record
_write = record.Metrics.write
def write(self, **row):
    _write(self, **row)
    time.sleep(0.05)
record.Metrics.write = write
"""


def pause_at(row: int, seconds: float) -> str:
    """A patch: training stands still after a row, for a signal to come there."""
    return f"""
from memsep_jax.experiments import record
_write_row = record.Metrics.write
def write(self, **row):
    _write_row(self, **row)
    if row["step"] == {row}:
        time.sleep({seconds})
record.Metrics.write = write
"""


# Training alone, where nothing else is looked at.
TRAIN_ONLY = """
from memsep_jax.experiments.studies import training_run
training_run.detector = training_run.members_found = lambda *args: {}
training_run.evaluate = lambda *args: None
training_run.finish = lambda session: None
"""
# Figures are made but not rendered, which takes half the time of a small run.
UNDRAWN = """
from memsep_jax.experiments.reporting import figures
figures.encode = lambda figure, kind: kind.encode()
"""
# A line when the save of a checkpoint begins, and one when it has ended.
ANNOUNCE_SAVES = """
from memsep_jax import checkpoint
_save = checkpoint.save
def save(directory, step, *args, **kwargs):
    print("saving", step, flush=True)
    _save(directory, step, *args, **kwargs)
    print("saved", step, flush=True)
checkpoint.save = save
"""


def some(cases, count: int = 1) -> list:
    """All cases of a test; those after the first run among the slow tests only."""
    params = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [
        pytest.param(*case, marks=[pytest.mark.slow] * (i >= count))
        for i, case in enumerate(params)
    ]


@contextlib.contextmanager
def undrawn():
    """UNDRAWN, in this process."""
    encode = "memsep_jax.experiments.reporting.figures.encode"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, lambda figure, kind: kind.encode())
        yield


@contextlib.contextmanager
def compiled_once():
    """What is compiled again and again is compiled once, in this process too."""
    options = {
        "jax_compilation_cache_dir": str(CACHE / "here"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    reset_cache()  # jax looks at these options at the first compilation only
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    reset_cache()


def stopped(workdir, *args, row=12, number=signal.SIGTERM) -> Interrupted:
    """A run that hears a signal after a row of metrics, in this process."""
    write = record.Metrics.write

    def hear(self, **values):
        write(self, **values)
        if values["step"] == row:
            signal.raise_signal(number)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted) as error:
        patch.setattr(record.Metrics, "write", hear)
        experiments.run(config(*args), workdir)
    return error.value


class Child:
    """The command line in a process of its own; killed at the end of its block."""

    def __init__(self, process, out, err, workdir):
        self.process, self.workdir = process, workdir
        self._out, self._err = out, err

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
        self._out.close()
        self._err.close()

    @property
    def stdout(self) -> str:
        """All it has printed so far."""
        return _text(self._out)

    @property
    def stderr(self) -> str:
        """All its errors and warnings so far."""
        return _text(self._err)

    @property
    def ended(self) -> bool:
        """Whether it is over."""
        return self.process.poll() is not None


class Result(NamedTuple):
    """How a child ended; code is negative where a signal killed it."""

    code: int
    stdout: str
    stderr: str
    seconds: float = 0.0

    @property
    def output(self) -> str:
        """Both streams, for the message of an assert."""
        return f"exit {self.code}\n{self.stdout}\n{self.stderr}"


def spawn(*args, workdir=None, patch: str = "", env=None, devices: int = 1) -> Child:
    """Starts the command line; to be used in a `with`.

    Args: patch, python that runs first (os, sys, time are imported); env, variables
      to add; devices, how many the CPU is split into.
    """
    words = [*args] if workdir is None else [*args, f"--workdir={workdir}"]
    if patch:
        code = f"import os, sys, time\n{patch}\nfrom memsep_jax import main\nmain.run()"
        command = [sys.executable, "-c", code, *words]
    else:
        command = [sys.executable, "-m", "memsep_jax.main", *words]
    # Unnamed files, not pipes: nobody has to read them for the child to go on.
    out, err = (tempfile.TemporaryFile() for _ in range(2))  # noqa: SIM115
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=err,
        cwd=ROOT,
        env=_environment(devices) | (env or {}),
    )
    return Child(process, out, err, None if workdir is None else Path(workdir))


def config(*args):
    """The ConfigDict of command line arguments, to call the package in this process."""
    name, _, variant = args[0].removeprefix("--config=").partition(":")
    spec = importlib.util.spec_from_file_location("config_of_a_test", ROOT / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.get_config(variant or "full")
    for arg in args[1:]:
        field, _, value = arg.removeprefix("--config.").partition("=")
        with contextlib.suppress(ValueError, SyntaxError):
            value = ast.literal_eval(value)
        made.update_from_flattened_dict({field: value})
    schema.leave_over(made, command.given_fields(args))
    return made.lock()


def workdirs(*commands, cwd=ROOT) -> list[str]:
    """Where each of some commands, lists of arguments, would write."""
    code = """
import json, os, sys
from memsep_jax import main
for command in json.loads(sys.argv[1]):
    sys.stdout.flush()
    child = os.fork()  # flags are parsed once in a process
    if not child:
        sys.argv[1:] = command
        main.parse_flags(sys.argv)
        print(main._workdir(), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, command
"""
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(commands)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=_environment(1) | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def finish(child: Child, timeout: float = TIMEOUT) -> Result:
    """Waits for the end."""
    started = time.monotonic()
    try:
        code = child.process.wait(timeout)
    except subprocess.TimeoutExpired:
        raise AssertionError(
            f"still running after {timeout} s:\n{child.stdout}\n{child.stderr}"
        ) from None
    return Result(code, child.stdout, child.stderr, time.monotonic() - started)


def run(*args, timeout: float = TIMEOUT, **kwargs) -> Result:
    """The command line from start to end; arguments as those of `spawn`."""
    started = time.monotonic()
    with spawn(*args, **kwargs) as child:
        result = finish(child, timeout)
    return result._replace(seconds=time.monotonic() - started)


def shell(line: str) -> subprocess.CompletedProcess:
    """A line of bash, run where the package is."""
    return subprocess.run(
        ["bash", "-c", line],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=_environment(1),
    )


def on_a_terminal(arguments, patch: str = "", **variables) -> tuple[int, str]:
    """The exit code of a command, and what it writes to a terminal.

    Args: variables, of the environment, to add.
    """
    code = f"{patch}\nfrom memsep_jax import main\nmain.run()"
    master, slave = pty.openpty()
    env = _environment(1) | {"TERM": "xterm-256color", "COLUMNS": "100"}
    process = subprocess.Popen(
        (sys.executable, "-c", code, *arguments),
        stdout=slave,
        stderr=slave,
        stdin=slave,
        cwd=ROOT,
        env=env | variables,
    )
    os.close(slave)
    written = b""
    while True:
        try:
            piece = os.read(master, 65_536)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        written += piece
    os.close(master)
    return process.wait(), written.decode()


def wait_for(child: Child, condition, what: str, timeout: float = TIMEOUT):
    """Polls condition() until it is true; fails where the child ends before."""
    limit = time.monotonic() + timeout
    while not condition():
        if child.ended and not condition():
            text = f"ended with {child.process.returncode} before {what}"
        elif time.monotonic() > limit:
            text = f"no {what} in {timeout} s"
        else:
            time.sleep(0.005)
            continue
        raise AssertionError(f"{text}:\n{child.stdout}\n{child.stderr}")


def wait_for_line(child: Child, pattern: str, timeout: float = TIMEOUT):
    """Waits until a line of stdout matches a regular expression."""
    regex = re.compile(pattern, re.MULTILINE)
    wait_for(child, lambda: regex.search(child.stdout), f"line {pattern!r}", timeout)


def wait_for_rows(child: Child, rows: int, timeout: float = TIMEOUT):
    """Waits until metrics.jsonl has so many whole rows."""
    path = child.workdir / "metrics.jsonl"
    wait_for(
        child, lambda: len(record.read_metrics(path)) >= rows, f"{rows} rows", timeout
    )


def kill(child: Child, number: int = signal.SIGKILL):
    """Sends a signal, where the child is still there."""
    child.process.send_signal(number)


def rows(workdir) -> list[dict]:
    """metrics.jsonl without the speeds, which no two runs share."""
    found = record.read_metrics(Path(workdir) / "metrics.jsonl")
    return [{k: v for k, v in r.items() if k != "steps_per_second"} for r in found]


def digest(workdir, step: int | None = None) -> str:
    """Digest over the leaves of a checkpoint (params, ema, opt_state, step, mask).

    The arrays are read back and verified, by default those of the newest step.
    """
    directory = Path(workdir) / "checkpoints"
    step = checkpoint.steps(directory)[-1] if step is None else step
    return checkpoint.digest(checkpoint.restore(directory, step, like(workdir, step)))


def like(workdir, step: int) -> dict[str, np.ndarray]:
    """Empty arrays, by leaf, as the manifest of a step describes them."""
    path = Path(workdir) / "checkpoints" / str(step) / "manifest" / "metadata"
    table = json.loads(path.read_text())["leaves"]
    return {name: np.empty(shape, dtype) for name, (shape, dtype, _) in table.items()}


def files(directory, ignore=(".lock",)) -> dict[str, tuple[int, bytes]]:
    """(mtime, contents) of every file under a directory, by relative path."""
    directory = Path(directory)
    return {
        str(p.relative_to(directory)): (p.stat().st_mtime_ns, p.read_bytes())
        for p in sorted(directory.rglob("*"))
        if p.is_file() and p.name not in ignore
    }


def largest(directory) -> Path:
    """The biggest file under a directory: of a step, the arrays."""
    found = [p for p in Path(directory).rglob("*") if p.is_file()]
    return max(found, key=lambda p: p.stat().st_size)


DAMAGES = ("flip", "truncate", "empty", "delete", "zeros")


def corrupt(path, how: str = "flip"):
    """Damages a file: a bit flipped, cut in half, emptied, deleted, 4 KiB of zeros."""
    path = Path(path)
    if how == "delete":
        path.unlink()
        return
    raw = bytearray(path.read_bytes())
    middle = len(raw) // 2
    if how == "flip" and raw:
        raw[middle] ^= 1
    elif how == "truncate":
        raw = raw[:middle]
    elif how == "empty":
        raw = bytearray()
    elif how == "zeros":
        start = max(0, middle - 2_048)
        size = len(raw[start : start + 4_096])
        raw[start : start + size] = bytes(size)
    path.write_bytes(raw)


def _environment(devices):
    count = f"--xla_force_host_platform_device_count={devices}"
    # What the tests set for themselves must not reach the child.
    kept = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("JAX_", "XLA_", "PYTEST_", "COLUMNS"))
    }
    kept |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": str(int(not OPTIMIZED)),
        "XLA_FLAGS": " ".join((*XLA_FLAGS, count)),
        "PYTHONUNBUFFERED": "1",
        "PYTHONWARNINGS": "default",
    }
    if CACHE is not None:
        kept |= {
            "JAX_COMPILATION_CACHE_DIR": str(CACHE),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
    return kept


def _text(file):
    size = os.fstat(file.fileno()).st_size
    # pread: the child writes at the offset that both share.
    return os.pread(file.fileno(), size, 0).decode(errors="replace")
