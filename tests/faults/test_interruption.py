"""Kills, signals and resumption: a run that is stopped ends as one that is not.

Bitwise: the digest over params, ema, opt_state, step and mask of the last checkpoint.
"""

import contextlib
import shutil
import signal
import subprocess
import threading
import time

import jax
import numpy as np
import pytest

from faults import harness
from memsep_jax import checkpoint, experiments
from memsep_jax.checkpoint import ConflictError
from memsep_jax.data import sources
from memsep_jax.experiments import record, training
from memsep_jax.experiments.config import build
from memsep_jax.experiments.runtime.session import Interrupted, Session
from memsep_jax.experiments.studies import mitigate, monitor, networks
from memsep_jax.experiments.studies import training_run as job

# The chunk of a phase that never ends; {what} is the phase.
ASLEEP = """
from memsep_jax.experiments import record
in_chunks = record.in_chunks
def asleep(*args, **kwargs):
    print("asleep", flush=True)
    time.sleep(60)
def slow(directory, work, total, chunk, session, what):
    def work_or_sleep(start, stop):
        return asleep() if what == "{what}" and start else work(start, stop)
    return in_chunks(directory, work_or_sleep, total, chunk, session, what)
record.in_chunks = slow
"""


# As many as this process has: a run that stopped in a child goes on here, bitwise.
DEVICES = 4


def assert_same_training(workdir, whole):
    assert harness.digest(workdir) == harness.digest(whole)
    assert harness.rows(workdir) == harness.rows(whole)


def spawn(*args, **kwargs):
    return harness.spawn(*args, **{"devices": DEVICES} | kwargs)


def stopped_at(row, workdir, args, **kwargs):
    """A training that SIGTERM finds after a row of metrics.   Returns: its result."""
    patch = harness.TRAIN_ONLY + harness.pause_at(row, seconds=2)
    with spawn(*args, workdir=workdir, patch=patch, **kwargs) as child:
        harness.wait_for_rows(child, row)
        harness.kill(child, signal.SIGTERM)
        return harness.finish(child)


class Stopping(Session):
    """A session that is told to stop while step `stop_after` is on its way."""

    stop_after = None

    @contextlib.contextmanager
    def progress(self, what, total, done=0):
        def update(done, text=""):
            # The row of a step is settled while the next one is computed.
            if self.stop_after is not None and done >= self.stop_after - 1:
                self.stop = signal.SIGTERM

        update(done)
        yield update


def learn(config, workdir, stop_after=None):
    """Trains in this process, to the end or until a step."""
    with contextlib.suppress(Interrupted), Stopping(workdir, config) as session:
        session.stop_after = stop_after
        parts = build.build(config)
        job.learn(config, parts, session)
    return harness.digest(workdir)


def killed_in_saves(workdir, delays, steps):
    """Kills one run after the other, some seconds after a save began, then ends it."""
    args = (*harness.TINY, f"--config.train.steps={steps}")
    for delay in delays:
        patch = harness.TRAIN_ONLY + harness.SLOW_STEPS + harness.ANNOUNCE_SAVES
        with spawn(*args, workdir=workdir, patch=patch) as child:
            harness.wait_for_line(child, r"^saving \d+")
            time.sleep(delay)
            harness.kill(child)
            result = harness.finish(child)
        if result.code == 0:  # that was the last save
            break
        assert result.code == -signal.SIGKILL, result.output
        for step in checkpoint.steps(workdir / "checkpoints"):
            harness.digest(workdir, step)  # read back and verified
    learn(harness.config(*args), workdir)
    assert not list((workdir / "checkpoints").glob(f"*{checkpoint.TMP}*"))


def test_a1_a_kill_during_a_save_costs_no_bit(whole, tmp_path):
    killed_in_saves(tmp_path / "run", [0.05], steps=30)
    assert_same_training(tmp_path / "run", whole)


@pytest.mark.slow
def test_a1_fifteen_kills_during_saves_cost_no_bit(tmp_path):
    """One after the other in the same run, at 0 to 600 ms into a save."""
    killed_in_saves(tmp_path / "killed", np.linspace(0, 0.6, 15), steps=300)
    args = (*harness.TINY, "--config.train.steps=300")
    learn(harness.config(*args), tmp_path / "whole")
    assert_same_training(tmp_path / "killed", tmp_path / "whole")


SPARSELY = (*harness.TINY, "--config.run.save_every=10")


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A run that is killed at row 17: (workdir, its process, who else came before)."""
    workdir = tmp_path_factory.mktemp("killed") / "run"
    patch = harness.TRAIN_ONLY + harness.pause_at(17, seconds=60)
    with spawn(*SPARSELY, workdir=workdir, patch=patch) as child:
        harness.wait_for_rows(child, 17)
        with pytest.raises(ConflictError) as second:
            experiments.run(harness.config(*SPARSELY), workdir)
        assert not child.ended, "the second was to come while the first runs"
        harness.kill(child)
        result = harness.finish(child)
    assert result.code == -signal.SIGKILL, result.output
    return workdir, child.process.pid, second.value


def test_a2_a_kill_between_saves_costs_the_steps_since_the_last(
    killed, whole, tmp_path, capsys
):
    workdir = shutil.copytree(killed[0], tmp_path / "run")
    assert checkpoint.steps(workdir / "checkpoints") == [10]
    learn(harness.config(*SPARSELY), workdir)
    assert "resumed from step 10" in capsys.readouterr().out
    assert [row["step"] for row in harness.rows(workdir)] == list(range(1, 31))
    assert_same_training(workdir, whole)


def test_a3_a_signal_while_training_saves_the_step_it_is_at(whole, tmp_path, capsys):
    workdir = tmp_path / "run"
    args = (*harness.TINY, "--config.run.save_every=1000")
    result = stopped_at(20, workdir, args)
    assert result.code == 143, result.output
    (step,) = checkpoint.steps(workdir / "checkpoints")
    assert step == 21  # row 20 is written while step 21 is computed
    assert f"preempted at step {step}: saved" in result.stdout
    assert record.read_json(workdir / "run.json")["status"] == "interrupted"
    learn(harness.config(*args), workdir)
    assert f"resumed from step {step}" in capsys.readouterr().out
    assert_same_training(workdir, whole)


def finished(*args, workdir):
    """A run that a child starts, or goes on with, and that comes to its end."""
    result = harness.run(*args, workdir=workdir, patch=harness.UNDRAWN)
    assert result.code == 0, result.output
    return workdir


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """As `whole`, by a child: samples are compared to the last bit with its own."""
    workdir = tmp_path_factory.mktemp("evaluated") / "run"
    return finished(*harness.TINY, workdir=workdir)


def stopped_in(phases, args, workdir, chunks):
    """Stops one run in one phase after the other; what it has done is not done again.

    Args: phases, name -> patch that makes it stand still there; chunks, the directory
      of finished work.
    Yields: the phase, and whether it finished a chunk.
    """
    kept = {}
    for phase, patch in phases.items():
        with harness.spawn(*args, workdir=workdir, patch=patch) as child:
            harness.wait_for_line(child, "^asleep")
            harness.kill(child, signal.SIGTERM)
            result = harness.finish(child, timeout=10)
        assert result.code == 143 and "Traceback" not in result.stderr, result.output
        assert result.seconds < 4  # 2 on a machine that does nothing else
        done = harness.files(chunks)
        assert kept.items() <= done.items(), "a finished chunk was done again"
        yield phase, done != kept
        kept = done
    finished(*args, workdir=workdir)
    assert kept.items() <= harness.files(chunks).items()


def asleep_in(name):
    """A patch: a function of the package, by its dotted name, never returns."""
    module, _, function = name.rpartition(".")
    return ASLEEP.format(what="none") + f"import {module}\n{name} = asleep\n"


@pytest.mark.slow
def test_a4_a_signal_is_noticed_in_every_phase_and_chunks_kept(evaluated, tmp_path):
    """In the first two phases, before any step, nothing is saved (row 6)."""
    workdir = tmp_path / "run"
    # The tracing, which is python: the compiler itself ends before it is seen.
    tracing = ASLEEP.format(what="none") + (
        "from memsep_jax.experiments import training\n"
        "training.make_steps = lambda *args: asleep"
    )
    phases = {
        "data": asleep_in("memsep_jax.experiments.config.build.build"),
        "compile": tracing,
        "sampling": ASLEEP.format(what="sampling"),
        "neighbours": ASLEEP.format(what="neighbours"),
        "report": asleep_in("memsep_jax.experiments.reporting.report.write"),
    }
    for phase, more in stopped_in(
        phases, harness.TINY, workdir, workdir / "evaluation"
    ):
        early = phase in ("data", "compile")
        saved = checkpoint.steps(workdir / "checkpoints")
        assert saved == ([] if early else [25, 30]) and more != early
        if phase != "report":  # a partial pass has no number
            assert not (workdir / "metrics.json").exists()
    assert_same_training(workdir, evaluated)
    for name in ("metrics.json", "per_sample.csv"):
        assert (workdir / name).read_bytes() == (evaluated / name).read_bytes()


@pytest.mark.slow
def test_a4_an_audit_is_stopped_in_every_phase_and_keeps_its_chunks(tmp_path):
    # Without the cache: the first audit would leave nothing of the training set to do.
    args = (
        "--config=configs/audit.py:smoke",
        "--config.run.chunk=30",
        "--config.run.cache=False",
    )
    finished(*args, workdir=tmp_path / "whole")
    workdir = tmp_path / "run"
    phases = {
        "pixels samples": ASLEEP.format(what="pixels samples"),
        "features": ASLEEP.format(what="features random_conv train"),
        "in random_conv": ASLEEP.format(what="in random_conv samples"),
        "quality": asleep_in("memsep_jax.fidelity.frechet"),
        "report": asleep_in("memsep_jax.experiments.reporting.report.write_audit"),
    }
    for phase, _ in stopped_in(phases, args, workdir, workdir / "compared"):
        assert (workdir / "metrics.json").exists() == (phase == "report")
    for name in ("metrics.json", "per_sample.csv", "duplicates.csv"):
        same = (tmp_path / "whole" / name).read_bytes()
        assert (workdir / name).read_bytes() == same


def test_a5_the_first_ctrl_c_saves_as_sigterm_does(tmp_path, capsys):
    workdir = tmp_path / "run"
    error = harness.stopped(workdir, *harness.TINY, row=7, number=signal.SIGINT)
    assert error.exit_code == 130
    assert checkpoint.steps(workdir / "checkpoints") == [5, 8]
    assert "preempted at step 8: saved" in capsys.readouterr().out


@pytest.mark.slow
def test_a5_a_second_signal_ends_at_once_and_tears_no_checkpoint(whole, tmp_path):
    workdir = tmp_path / "run"
    stuck = """
import orbax.checkpoint as ocp
_orbax_save = ocp.Checkpointer.save
def stuck(self, path, *args, **kwargs):
    _orbax_save(self, path, *args, **kwargs)
    if path.name == "10":
        print("stuck", flush=True)
        time.sleep(60)
ocp.Checkpointer.save = stuck
"""
    patch = harness.TRAIN_ONLY + stuck
    with spawn(*harness.TINY, workdir=workdir, patch=patch) as child:
        harness.wait_for_line(child, "^stuck")
        harness.kill(child, signal.SIGTERM)
        time.sleep(0.3)
        assert not child.ended, "the first signal waits for the save"
        harness.kill(child, signal.SIGTERM)
        result = harness.finish(child, timeout=5)
    assert result.code == -signal.SIGTERM and result.seconds < 3, result.output
    harness.digest(workdir, 5)
    learn(harness.config(*harness.TINY), workdir)
    assert_same_training(workdir, whole)


@pytest.mark.slow
def test_a6_a_signal_before_the_first_step_leaves_a_clean_start(
    whole, tmp_path, capsys
):
    """While XLA compiles, which ends before the signal is seen."""
    workdir = tmp_path / "run"
    compiling = """
import jax
_compile = jax.stages.Lowered.compile
def compile(self, *args, **kwargs):
    print("in the compiler", flush=True)
    compiled = _compile(self, *args, **kwargs)
    time.sleep(5)  # for a signal that is late
    return compiled
jax.stages.Lowered.compile = compile
"""
    patch = harness.TRAIN_ONLY + compiling
    with spawn(*harness.TINY, workdir=workdir, patch=patch) as child:
        harness.wait_for_line(child, "^in the compiler")
        harness.kill(child, signal.SIGTERM)
        result = harness.finish(child, timeout=30)
    assert result.code == 143, result.output
    assert "Traceback" not in result.stderr
    assert checkpoint.steps(workdir / "checkpoints") == []
    assert harness.rows(workdir) == []
    assert record.read_json(workdir / "run.json")["status"] == "interrupted"
    learn(harness.config(*harness.TINY), workdir)
    assert "resumed" not in capsys.readouterr().out
    assert_same_training(workdir, whole)


DIGITS = (
    "--config=configs/digits.py:smoke",
    "--config.data.num_examples=24",  # three batches of 8 an epoch
    "--config.data.labels=true",
    "--config.train.steps=9",
    "--config.train.ema_decay=0.9",
    "--config.run.save_every=100",
    "--config.run.evaluate_every=100",
    "--config.run.snapshots=0",
)
MODELS = {
    "mlp": ("--config.model.name=mlp", "--config.model.num_heads=None"),
    "dit": ("--config.model.name=dit", "--config.model.num_heads=2"),
}
OPTIONS = (
    "--config.model.dropout=0.2",
    "--config.train.flip=True",
    "--config.train.label_drop=0.3",
    "--config.train.accumulate=2",
)


# Nine steps, said in another way, of one order and with an average that grows.
EPOCHS = (
    "--config.train.epochs=3.0",
    "--config.optimizer.warmup=0",
    "--config.train.warmup_epochs=1.5",
    "--config.train.order=fixed",
    "--config.train.ema_half_life=20.0",
    "--config.train.ema_ramp=0.5",
)


@pytest.mark.parametrize("model, options", harness.some([("mlp", EPOCHS), ("dit", ())]))
def test_a7_a_resumed_run_is_bitwise_the_uninterrupted_one(
    model, options, tmp_path, monkeypatch
):
    """With an EMA, dropout, flips, dropped labels and accumulated gradients.

    Epochs end at steps 3, 6, 9: stops in an epoch, after its last batch, and after
    the first batch of the next.
    """
    config = harness.config(*DIGITS, *MODELS[model], *OPTIONS, *options)
    whole = learn(config, tmp_path / "whole")
    for stop in (2, 6, 7):
        stopped = learn(config, tmp_path / "stopped", stop_after=stop)
        assert checkpoint.steps(tmp_path / "stopped" / "checkpoints")[-1] == stop
        if stop == 2:
            shutil.copytree(tmp_path / "stopped", tmp_path / "restarted")
    stopped = learn(config, tmp_path / "stopped")
    assert stopped == whole

    # The control: batches counted from the resumption, not from the start.
    order = training.order

    def counted_anew(*args):
        rows_of = order(*args)
        return lambda step: rows_of(max(0, step - 2))

    monkeypatch.setattr(training, "order", counted_anew)
    assert learn(config, tmp_path / "restarted") != whole


@pytest.mark.slow
def test_a7_points_on_disk_give_the_same_bits_wherever_it_was_stopped(tmp_path):
    path, read = tmp_path / "digits.npz", sources.digits()
    np.savez(path, train_images=read.images, train_labels=read.labels)
    whole = learn(harness.config(*DIGITS, *MODELS["mlp"], *OPTIONS), tmp_path / "whole")
    flags = "--config.data.name=npz", f"--config.data.path={path}"
    flags += ("--config.data.stream=True",)
    config = harness.config(*DIGITS, *MODELS["mlp"], *OPTIONS, *flags)
    for stop in (2, 6, None):
        stopped = learn(config, tmp_path / "stopped", stop_after=stop)
    assert stopped == whole


def test_a8_a_longer_run_goes_on_and_warns_of_a_schedule_that_ends(tmp_path, capsys):
    config = harness.config(*DIGITS, *MODELS["mlp"]).unlock()
    config.optimizer.schedule = "cosine"
    learn(config, tmp_path / "run")
    config.train.steps = 12
    learn(config, tmp_path / "run")
    printed = capsys.readouterr().out
    assert "train.steps: 9 -> 12" in printed
    assert "optimizer.schedule=cosine depends on train.steps" in printed
    assert "resumed from step 9" in printed
    assert checkpoint.steps(tmp_path / "run" / "checkpoints")[-1] == 12


def test_a8_a_longer_run_that_is_killed_as_it_begins_is_not_done(
    whole, tmp_path, monkeypatch
):
    """After the first of its files: "complete" was said of the shorter run."""
    workdir = shutil.copytree(whole, tmp_path / "run")
    config = harness.config(*harness.TINY, "--config.train.steps=40")
    write, written = record.write_json, []

    def killed(path, *args, **kwargs):
        written.append(path.name)
        if len(written) > 1:
            raise SystemExit("killed")
        write(path, *args, **kwargs)

    monkeypatch.setattr(record, "write_json", killed)
    fingerprint = record.read_json(workdir / "run.json")["fingerprint"]
    with pytest.raises(SystemExit, match="killed"), Session(workdir, config) as session:
        session.begin(fingerprint)
    assert set(written) == {"run.json", "config.json"}
    assert not Session(workdir, config).is_complete()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("optimizer.lr", 0.5),
        ("seed", 7),
        ("data.num_examples", 12),
        ("model.width", 64),
        ("train.steps", 20),  # shorter
    ],
)
def test_a9_another_config_is_refused_with_its_difference(field, value, whole):
    before = harness.files(whole)
    config = harness.config(*harness.TINY).unlock()
    old = config.get_ref(field) if "." not in field else config
    for name in field.split("."):
        old = old[name] if "." in field else config[name]
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ConflictError) as error, Session(whole, config):
        pass
    assert error.value.exit_code == 2
    for part in (f"{field}: {old} -> {value}", "--workdir", "--allow_config_change"):
        assert part in str(error.value)
    assert harness.files(whole) == before


def test_a9_other_data_under_the_same_config_are_refused(tmp_path):
    with Session(tmp_path / "run", harness.config(*harness.TINY)) as session:
        session.begin("fingerprint one")
    before = harness.files(tmp_path / "run")
    with (
        pytest.raises(ConflictError, match="data of .* changed"),
        Session(tmp_path / "run", harness.config(*harness.TINY)) as session,
    ):
        session.begin("fingerprint two")
    assert harness.files(tmp_path / "run") == before


def test_a10_a_harmless_change_is_accepted_and_noted(whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    config = harness.config(*harness.TINY).unlock()
    config.run.log_every = 5
    with Session(tmp_path / "run", config):
        pass
    assert "run.log_every: 1 -> 5" in capsys.readouterr().out


def begun(workdir, config, **kwargs):
    """A run that ends as soon as it has begun."""
    with Session(workdir, config, **kwargs) as session:
        session.begin("fingerprint")
    return workdir


STREAMS = {
    "JAX_DEFAULT_PRNG_IMPL": (lambda: jax.default_prng_impl("rbg"), "threefry2x32"),
    "JAX_ENABLE_X64": (lambda: jax.enable_x64(True), "False"),
    "JAX_THREEFRY_PARTITIONABLE": (lambda: jax.threefry_partitionable(False), "True"),
}


@pytest.mark.parametrize("name", STREAMS)
def test_h78_other_random_numbers_are_refused_as_another_config_is(
    name, tmp_path, capsys
):
    other, was = STREAMS[name]
    config = harness.config("--config=configs/optimum.py:smoke")
    workdir = begun(tmp_path / "run", config)
    before = harness.files(workdir)
    with other():
        with pytest.raises(ConflictError) as error:
            begun(workdir, config)
        assert error.value.exit_code == 2
        for part in (f"{name}: {was} -> ", "--workdir", "--allow_config_change"):
            assert part in str(error.value)
        assert harness.files(workdir) == before and not capsys.readouterr().out
        begun(workdir, config, allow_config_change=True)
        assert f"warning: {name}: {was} -> " in capsys.readouterr().out
        begun(workdir, config)  # it goes on as it is now
    with pytest.raises(ConflictError, match=f"{name}: .* -> {was}"):
        begun(workdir, config)


@pytest.mark.slow
def test_h78_the_command_refuses_other_random_numbers(tmp_path):
    argument = "--config=configs/optimum.py:smoke"
    workdir = begun(tmp_path / "run", harness.config(argument))
    before = harness.files(workdir)
    env = {"JAX_DEFAULT_PRNG_IMPL": "rbg", "JAX_RANDOM_SEED_OFFSET": "5"}
    # With more samples: what is complete is left as it is.
    more = argument, "--config.sampler.num_samples=9"
    result = harness.run(*more, workdir=workdir, env=env)
    assert result.code == 2 and "Traceback" not in result.stderr, result.output
    assert "JAX_DEFAULT_PRNG_IMPL: threefry2x32 -> rbg" in result.stderr
    assert "JAX_RANDOM_SEED_OFFSET: 0 -> 5" in result.stderr
    assert harness.files(workdir) == before


def test_h78_what_changes_the_rounding_is_said(tmp_path, monkeypatch, capsys):
    config = harness.config("--config=configs/optimum.py:smoke")
    silent = "--xla_dump_to=a --xla_gpu_cuda_data_dir=/home/me/cuda"
    monkeypatch.setenv("XLA_FLAGS", silent)
    workdir = begun(tmp_path / "run", config)
    monkeypatch.delenv("XLA_FLAGS")
    begun(workdir, config)
    assert not capsys.readouterr().out
    with jax.default_matmul_precision("highest"):
        begun(workdir, config)
    said = capsys.readouterr().out
    assert "warning: rounding was {'XLA_FLAGS': []" in said and "'highest'" in said
    assert "the bitwise guarantee does not hold" in said
    begun(workdir, config)
    capsys.readouterr()
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    begun(workdir, config)
    assert "XLA_FLAGS': ['--xla_cpu_enable_fast_math=true']" in capsys.readouterr().out


def test_h78_a_run_that_recorded_no_circumstances_goes_on(tmp_path, capsys):
    config = harness.config("--config=configs/optimum.py:smoke")
    workdir = begun(tmp_path / "run", config)
    known = record.read_json(workdir / "run.json")
    del known["streams"], known["rounding"]
    record.write_json(workdir / "run.json", known)
    with jax.default_prng_impl("rbg"):
        begun(workdir, config)
    assert not capsys.readouterr().out
    assert record.read_json(workdir / "run.json")["streams"] == {
        "jax_default_prng_impl": "rbg",
        "jax_enable_x64": False,
        "jax_random_seed_offset": 0,
        "jax_threefry_partitionable": True,
    }


def test_a11_a_finished_run_is_left_as_it_is(whole, capsys):
    before = harness.files(whole, ignore=())
    experiments.run(harness.config(*harness.TINY), whole)
    said = capsys.readouterr().out
    assert "already complete" in said and "compiling" not in said
    assert harness.files(whole, ignore=()) == before


@pytest.mark.slow
def test_a12_another_number_of_devices_gives_the_same_run_to_rounding(
    whole, tmp_path, capsys
):
    """1 device, then 2, then 4."""
    args = (*harness.TINY, "--config.run.save_every=1000")
    workdir = tmp_path / "run"
    for devices, rows in ((1, 10), (2, 20)):
        stopped = stopped_at(rows, workdir, args, devices=devices)
        assert stopped.code == 143, stopped.output
    learn(harness.config(*args), workdir)
    assert "the bitwise guarantee does not hold" in capsys.readouterr().out
    got, truth = harness.rows(workdir), harness.rows(whole)
    assert [r["step"] for r in got] == [r["step"] for r in truth]
    np.testing.assert_allclose(
        [r["loss"] for r in got], [r["loss"] for r in truth], rtol=1e-5
    )
    got, truth = (
        checkpoint.restore(w / "checkpoints", 30, harness.like(w, 30))
        for w in (workdir, whole)
    )
    for name in truth:
        if name.startswith(("params", "ema")):
            np.testing.assert_allclose(got[name], truth[name], atol=1e-4, err_msg=name)


def test_a13_a_workdir_belongs_to_one_process_until_it_dies(killed):
    workdir, pid, second = killed
    assert second.exit_code == 2
    assert f"in use by process {pid} on " in str(second)
    assert "started 20" in str(second)
    with Session(workdir, harness.config(*SPARSELY)):
        pass  # SIGKILL frees the lock, though its file is still there


def test_a14_a_torn_line_and_rows_of_lost_steps_are_dropped(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-7])
    assert [r["step"] for r in record.read_metrics(path)] == list(range(1, 30))
    record.Metrics(path, 25)
    assert [r["step"] for r in record.read_metrics(path)] == list(range(1, 26))
    assert path.read_bytes().endswith(b"}\n")


@pytest.mark.slow
def test_a14_a_resumed_run_has_each_step_once(whole, tmp_path, capsys):
    """The rows 26 to 29, and half of 30, are newer than the checkpoint of step 25."""
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    shutil.rmtree(workdir / "checkpoints" / "30")
    path = workdir / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-7])
    (workdir / "run.json").unlink()
    learn(harness.config(*harness.TINY), workdir)
    assert "resumed from step 25" in capsys.readouterr().out
    assert_same_training(workdir, whole)


def test_a15_a_workdir_goes_on_where_it_was_moved_to(tmp_path):
    """Copied by hand, moved, and through a tar archive."""
    config = harness.config(*DIGITS, *MODELS["mlp"])
    whole = learn(config, tmp_path / "whole")
    learn(config, tmp_path / "first", stop_after=3)
    shutil.copytree(tmp_path / "first", tmp_path / "copy")
    shutil.rmtree(tmp_path / "first")
    learn(config, tmp_path / "copy", stop_after=5)
    (tmp_path / "copy").rename(tmp_path / "moved")
    learn(config, tmp_path / "moved", stop_after=7)
    archive = tmp_path / "run.tar"
    subprocess.run(["tar", "-cf", archive, "-C", tmp_path, "moved"], check=True)
    shutil.rmtree(tmp_path / "moved")
    (tmp_path / "far").mkdir()
    subprocess.run(["tar", "-xf", archive, "-C", tmp_path / "far"], check=True)
    assert learn(config, tmp_path / "far" / "moved") == whole
    for path in (tmp_path / "far" / "moved").glob("*.json*"):
        assert str(tmp_path / "first") not in path.read_text()


@pytest.mark.slow
def test_a16_a_killed_evaluation_does_only_what_is_missing(evaluated, tmp_path):
    """SIGKILL in the third of three chunks of samples."""
    workdir = tmp_path / "run"
    shutil.copytree(evaluated, workdir)
    shutil.rmtree(workdir / "evaluation")
    (workdir / "metrics.json").unlink()
    status = record.read_json(workdir / "run.json")
    record.write_json(workdir / "run.json", status | {"status": "running"})
    asleep = ASLEEP.format(what="sampling").replace("and start", "and start == 8")
    with harness.spawn(*harness.TINY, workdir=workdir, patch=asleep) as child:
        harness.wait_for_line(child, "^asleep")
        harness.kill(child)
        harness.finish(child)
    chunks = harness.files(workdir / "evaluation")
    assert len(chunks) == 2
    assert not (workdir / "metrics.json").exists()
    finished(*harness.TINY, workdir=workdir)
    assert chunks.items() <= harness.files(workdir / "evaluation").items()
    for name in ("metrics.json", "per_sample.csv"):
        assert (workdir / name).read_bytes() == (evaluated / name).read_bytes()


# A network of another run is pruned: what is waited for.
PRUNED = (
    "--config=configs/prune_digits.py:smoke",
    "--config.model.width=8",
    "--config.model.num_heads=2",
)


def test_a17_a_checkpoint_is_waited_for_until_it_is_there_and_whole(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(networks, "POLL", 0.05)
    other, ruins, said = tmp_path / "other", tmp_path / "ruins", []
    waiting = "--config.run.wait=30.0"
    config = harness.config(*PRUNED, f"--config.prune.source={other}", waiting)
    parts = build.build(config)
    state = job.initial_state(config, parts)
    checkpoint.save(ruins / "checkpoints", 1, state)
    harness.corrupt(harness.largest(ruins / "checkpoints" / "1" / "state"))
    record.write_json(ruins / "run.json", {"fingerprint": parts.splits.fingerprint})

    def appear():
        """First a step with a flipped bit, then the next one as it should be."""
        time.sleep(0.3)
        ruins.rename(other)
        time.sleep(0.5)
        checkpoint.save(other / "checkpoints", 2, state)

    thread = threading.Thread(target=appear)
    thread.start()
    found = mitigate._source(config, parts, said.append)
    thread.join()
    assert checkpoint.digest(found) == checkpoint.digest(state)
    assert said == [f"waiting 30 s for a checkpoint in {other}"]
    # Of another's workdir nothing is set aside.
    assert checkpoint.steps(other / "checkpoints") == [1, 2]


def test_a17_a_checkpoint_that_never_comes_ends_the_wait(tmp_path):
    other, workdir = tmp_path / "other", tmp_path / "run"
    options = f"--config.prune.source={other}", "--config.run.wait=0.2"
    started = time.monotonic()
    with pytest.raises(sources.DataError, match="run.wait=0.2 s") as error:
        experiments.run(harness.config(*PRUNED, *options), workdir)
    assert error.value.exit_code == 3 and str(other) in str(error.value)
    assert 0.2 <= time.monotonic() - started < 10
    assert not workdir.exists() and not other.exists()


@pytest.mark.slow
def test_a17_a_signal_ends_the_wait_at_once(tmp_path):
    other, workdir = tmp_path / "other", tmp_path / "run"
    options = f"--config.prune.source={other}", "--config.run.wait=60"
    with harness.spawn(*PRUNED, *options, workdir=workdir) as child:
        harness.wait_for_line(child, f"^waiting 60 s for a checkpoint in {other}")
        harness.kill(child, signal.SIGTERM)
        result = harness.finish(child, timeout=10)
    assert result.code == 143 and "Traceback" not in result.stderr, result.output
    assert result.seconds < 4  # 2 on a machine that does nothing else
    assert not workdir.exists()


@pytest.mark.parametrize("at", harness.some(["losses", "snapshot"], 0))
def test_a3_a_signal_in_an_evaluation_loses_no_step_and_no_number(
    at, tmp_path, monkeypatch
):
    """It comes while the held-out loss, or the samples, of step 6 are computed."""
    args = ("--config.run.evaluate_every=6", "--config.run.snapshot_epochs=2")
    config = harness.config(*DIGITS, *MODELS["mlp"], *args)
    learn(config, tmp_path / "whole")
    look = getattr(monitor.Monitor, at)

    def interrupted(self, *args):
        self.session.stop = signal.SIGTERM
        return look(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(monitor.Monitor, at, interrupted)
        learn(config, tmp_path / "stopped")
    assert checkpoint.steps(tmp_path / "stopped" / "checkpoints") == [6]
    assert learn(config, tmp_path / "stopped") == harness.digest(tmp_path / "whole")
    got, truth = (harness.rows(tmp_path / name) for name in ("stopped", "whole"))
    assert got == truth
    for kind in ("best", "snapshots"):
        assert checkpoint.steps(tmp_path / "stopped" / kind) == checkpoint.steps(
            tmp_path / "whole" / kind
        )


# 80: a signal is heard in the middle of long work.

# A program of hours, where a run builds its parts; python sees nothing of a signal.
IN_XLA = """
import jax
from memsep_jax.experiments.config import build
def stuck(*args):
    sine = lambda i, x: jax.numpy.sin(x)
    long = jax.jit(lambda x: jax.lax.fori_loop(0, 2**31 - 1, sine, x))
    long = long.lower(jax.numpy.ones(1_000)).compile()
    print("in XLA", flush=True)
    jax.block_until_ready(long(jax.numpy.ones(1_000)))
build.build = stuck
"""


@pytest.mark.parametrize("second", harness.some([signal.SIGTERM, signal.SIGINT]))
def test_h80_a_second_signal_ends_a_process_inside_of_xla(second, tmp_path):
    workdir = tmp_path / "run"
    with harness.spawn(*harness.TINY, workdir=workdir, patch=IN_XLA) as child:
        harness.wait_for_line(child, "^in XLA")
        time.sleep(1)  # the line comes before the call
        harness.kill(child, signal.SIGTERM)
        time.sleep(1)
        assert not child.ended, "the first signal waits for the call"
        harness.kill(child, second)
        result = harness.finish(child, timeout=20)
    assert result.code == 128 + second, result.output


def test_h80_a_session_leaves_signals_and_threads_as_they_were(tmp_path):
    config = harness.config(*harness.TINY)

    def found():
        pipe = signal.set_wakeup_fd(-1)
        signal.set_wakeup_fd(pipe)
        handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
        return pipe, handlers, threading.active_count()

    before = found()
    for _ in range(3):
        with Session(tmp_path / "run", config):
            inside = found()
        assert inside[0] != before[0] and inside[2] == before[2] + 1
        assert found() == before

    def at_a_prompt():  # in another thread, where no handler can be set
        with Session(tmp_path / "run", config):
            counts.append(threading.active_count())

    counts: list[int] = []
    thread = threading.Thread(target=at_a_prompt)
    thread.start()
    thread.join()
    assert counts == [before[2] + 1] and found() == before


# Looked at and saved at steps 3, 6 and 9.
LOOKED = (
    *DIGITS,
    *MODELS["mlp"],
    "--config.run.save_every=3",
    "--config.run.evaluate_every=3",
    "--config.run.snapshots=2",
    "--config.run.log_every=2",
)


@pytest.fixture(scope="module")
def looked(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("looked")
    learn(harness.config(*LOOKED), workdir)
    return workdir


def assert_looked_alike(workdir, looked):
    """And every step once, with all its numbers."""
    assert learn(harness.config(*LOOKED), workdir) == harness.digest(looked)
    assert harness.rows(workdir) == harness.rows(looked)
    assert len((workdir / "metrics.jsonl").read_text().splitlines()) == len(
        harness.rows(looked)
    )
    for kind in ("checkpoints", "best", "snapshots"):
        kept = checkpoint.steps(looked / kind)
        assert checkpoint.steps(workdir / kind) == kept


@pytest.mark.parametrize("at", harness.some([2, 1, 3], 0))
def test_h80_a_kill_in_a_look_loses_no_step(at, looked, tmp_path, monkeypatch):
    """At step 3, 6 or the last one, where nothing is left to train."""
    looks, losses = [], monitor.Monitor.losses

    def killed(self, params):
        looks.append(params)
        if len(looks) == at:
            raise RuntimeError("killed")
        return losses(self, params)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(monitor.Monitor, "losses", killed)
        learn(harness.config(*LOOKED), tmp_path)
    assert checkpoint.steps(tmp_path / "checkpoints")[-1] == 3 * at
    assert harness.rows(tmp_path)[-1]["step"] < 3 * at  # a reader sees whole rows only
    assert_looked_alike(tmp_path, looked)


@pytest.mark.parametrize("at", harness.some([5, 1, 13]))
def test_h80_a_signal_between_the_pieces_of_a_look_changes_no_number(
    at, looked, tmp_path, monkeypatch
):
    """In calls of one piece each, of losses and of samples, heard before the at-th."""
    pauses, pause = [], Session.pause

    def heard(self):
        pauses.append(self)
        if len(pauses) == at:
            self.stop = signal.SIGTERM
        pause(self)

    with monkeypatch.context() as patch:
        patch.setattr(record, "CALL", 0.0)
        patch.setattr(Session, "pause", heard)
        learn(harness.config(*LOOKED), tmp_path)
    assert len(pauses) == at, "nothing more was computed"
    assert checkpoint.steps(tmp_path / "checkpoints")
    assert_looked_alike(tmp_path, looked)
