"""Damaged, full, read-only and foreign storage: nothing wrong is ever loaded."""

import contextlib
import errno
import functools
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from faults import harness
from memsep_jax import checkpoint
from memsep_jax.checkpoint import ConflictError, CorruptError, StorageError
from memsep_jax.experiments import record
from memsep_jax.experiments.config import build
from memsep_jax.experiments.reporting import figures
from memsep_jax.experiments.runtime.session import Session
from memsep_jax.experiments.studies import monitor
from memsep_jax.experiments.studies import training_run as job

# Orbax's own threads complain when a step they read is damaged.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)

# Ten steps of an MLP on digits, saved at 2, 4, ... and evaluated at the last.
ARGS = (
    "--config=configs/digits.py:smoke",
    "--config.model.name=mlp",
    "--config.train.steps=10",
    "--config.run.save_every=2",
    "--config.run.keep=3",
    "--config.run.evaluate_every=10",
    "--config.run.snapshots=0",
)


def learn(config, workdir, resume_step=None, allow_config_change=False):
    """Trains to the end in this process."""
    with Session(workdir, config, allow_config_change) as session:
        parts = build.build(config)
        return job.learn(config, parts, session, resume_step)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished training with checkpoints 6, 8 and 10."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    learn(harness.config(*ARGS), workdir)
    assert checkpoint.steps(workdir / "checkpoints") == [6, 8, 10]
    return workdir


@pytest.fixture
def copy(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def tree():
    """A small state, to save and restore without training."""
    weights = jnp.arange(4_096.0).reshape(64, 64)
    return {"step": jnp.int32(0), "params": {"a": weights, "b": jnp.ones(3)}}


def saved(directory, tree, steps):
    """Saves step * tree at every step; the digests by step."""
    digests = {}
    for step in steps:
        scaled = jax.tree.map(functools.partial(jnp.multiply, step), tree)
        checkpoint.save(directory, step, scaled)
        digests[step] = checkpoint.digest(scaled)
    return digests


def assert_no_traceback_of_ours(result):
    # The native threads of orbax may still complain when its event loop is gone.
    assert "memsep_jax/" not in result.stderr, result.output


def test_b18_a_flipped_bit_is_named_set_aside_and_trained_again(trained, copy, caplog):
    checkpoints = copy / "checkpoints"
    harness.corrupt(harness.largest(checkpoints / "10" / "state"), "flip")
    learn(harness.config(*ARGS), copy)
    assert "checkpoint 10 is damaged" in caplog.text
    assert "corrupt-10" in caplog.text
    assert (checkpoints / "corrupt-10").is_dir()
    assert checkpoint.steps(checkpoints) == [6, 8, 10]
    assert harness.digest(copy) == harness.digest(trained)
    assert harness.rows(copy) == harness.rows(trained)


def test_b18_the_digest_names_the_leaf_that_orbax_lets_pass(tmp_path, tree):
    """The array rewritten with one other value: whole for orbax, wrong for us."""
    saved(tmp_path, tree, [1])
    path = tmp_path / "1" / "state"
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        arrays = checkpoint.leaves(tree)
        arrays["params/a"] = arrays["params/a"] + np.eye(64, dtype=np.float32)
        checkpointer.save(path, args=ocp.args.StandardSave(arrays), force=True)
    with pytest.raises(CorruptError, match="digest mismatch in params/a"):
        checkpoint.restore(tmp_path, 1, tree)


@pytest.mark.parametrize("how", harness.DAMAGES)
def test_b19_whatever_file_is_damaged_no_wrong_weights_are_loaded(how, tmp_path, tree):
    """Each file of a step in turn: the step is whole, or the one before it is used."""
    directory = tmp_path / "checkpoints"
    digests = saved(directory, tree, [1, 2])
    names = [p.relative_to(directory / "2") for p in (directory / "2").rglob("*")]
    names = sorted(p for p in names if (directory / "2" / p).is_file())
    used = {}
    for name in names:
        target = tmp_path / "damaged"
        shutil.copytree(directory, target)
        harness.corrupt(target / "2" / name, how)
        restored, step = checkpoint.restore_newest(target, tree)
        assert checkpoint.digest(restored) == digests[step], name
        assert (target / "corrupt-2").is_dir() == (step == 1), name
        used[str(name)] = step
        shutil.rmtree(target)
    time.sleep(0.1)  # the complaints of those threads belong to this test
    # The manifest is never done without.
    assert used["manifest/metadata"] == 1
    assert 1 in [step for name, step in used.items() if name.startswith("state")]


def test_b20_where_every_step_is_damaged_no_run_starts_afresh(copy):
    checkpoints = copy / "checkpoints"
    for step in (6, 8, 10):
        harness.corrupt(harness.largest(checkpoints / str(step) / "state"), "truncate")
    status = record.read_json(copy / "run.json")
    record.write_json(copy / "run.json", status | {"status": "interrupted"})
    result = harness.run(*ARGS, workdir=copy)
    assert result.code == 3, result.output
    for step in (6, 8, 10):
        assert f"step {step}: arrays unreadable" in result.stderr
    assert_no_traceback_of_ours(result)
    assert "compiling" not in result.stdout
    # And not at the second attempt either.
    with pytest.raises(CorruptError, match="corrupt-10, corrupt-6, corrupt-8"):
        learn(harness.config(*ARGS), copy)
    assert checkpoint.steps(checkpoints) == []


def test_b21_what_is_not_a_step_is_left_alone(copy, trained, caplog):
    """A directory that is empty, foreign, or named almost as a step; files; links."""
    checkpoints = copy / "checkpoints"
    (checkpoints / "12").mkdir()  # orbax would take it for the newest
    for name in ("notes", "10.old", "step_16", "-18", "１９"):
        (checkpoints / name).mkdir()
        (checkpoints / name / "mine.txt").write_text("keep")
    for name in ("readme.txt", "20", f"22{checkpoint.TMP}"):  # files
        (checkpoints / name).write_text("keep")
    outside = copy.parent / "outside"
    outside.mkdir()
    (outside / "mine.txt").write_text("keep")
    (checkpoints / f"24{checkpoint.TMP}").symlink_to(outside)
    foreign = harness.files(checkpoints)
    shutil.rmtree(checkpoints / "10")
    foreign = {k: v for k, v in foreign.items() if v[1] == b"keep"}
    assert len(foreign) == 8
    for step in (12, 14):  # our own leftovers
        (checkpoints / f"{step}{checkpoint.TMP}").mkdir()
        (checkpoints / f"{step}{checkpoint.TMP}" / "half").write_bytes(b"torn")
    learn(harness.config(*ARGS), copy)
    assert caplog.text.count("holds files that are no checkpoints") == 1
    assert all(name in caplog.text for name in ("12", "notes", "readme.txt"))
    assert harness.digest(copy) == harness.digest(trained)
    assert checkpoint.steps(checkpoints) == [6, 8, 10]
    assert foreign.items() <= harness.files(checkpoints).items()
    assert (outside / "mine.txt").read_text() == "keep"
    left = {path.name for path in checkpoints.glob(f"*{checkpoint.TMP}*")}
    assert left == {f"22{checkpoint.TMP}", f"24{checkpoint.TMP}"}


@contextlib.contextmanager
def small_disk(path, mib):
    """A disk of its own under a directory, or None where mounting is not allowed."""
    path.mkdir()
    mount = shutil.which("mount")
    command = [mount, "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", path]
    mounted = mount and not subprocess.run(command, capture_output=True).returncode
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", path], check=True)


# Where no disk can be made, a disk that is full is played.
FULL_UNLESS_FREED = """
import errno, shutil
import orbax.checkpoint as ocp
_orbax_save = ocp.Checkpointer.save
def save(self, path, *args, **kwargs):
    if path.name == "6" and os.path.exists({filler!r}):
        raise OSError(errno.ENOSPC, "No space left on device")
    _orbax_save(self, path, *args, **kwargs)
ocp.Checkpointer.save = save
"""


# The writes themselves meet the full disk, not the look at it before them.
BLIND = """
import collections, shutil
shutil.disk_usage = lambda path: collections.namedtuple("usage", "free")(10**12)
"""


@pytest.mark.slow
def test_b22_a_full_disk_ends_the_run_and_spares_what_was_saved(tmp_path):
    """20 MB, of which all but 1 MB are taken while the run is at step 5."""
    args = (*ARGS, "--config.model.width=128", "--config.run.keep=2")
    with small_disk(tmp_path / "disk", 20) as real:
        workdir, filler = tmp_path / "disk" / "run", tmp_path / "disk" / "filler"
        fill = f"""
from memsep_jax.experiments import record
_write = record.Metrics.write
def write(self, **row):
    _write(self, **row)
    if row["step"] == 5:
        left = os.statvfs({str(filler.parent)!r})
        left = left.f_bavail * left.f_frsize if {bool(real)} else 8
        with open({str(filler)!r}, "wb") as file:
            file.write(bytes(max(left - 1_000_000, 8)))
record.Metrics.write = write
"""
        broken = "" if real else FULL_UNLESS_FREED.format(filler=str(filler))
        patch = harness.TRAIN_ONLY + fill + broken + BLIND
        result = harness.run(*args, workdir=workdir, patch=patch)
        assert result.code == 5, result.output
        path = re.escape(str(workdir / "checkpoints" / "6"))
        message = rf"could not save {path} .*needed [\d,]+ bytes, [\d,]+ are free"
        assert re.search(message, result.stderr), result.output
        assert_no_traceback_of_ours(result)
        assert checkpoint.steps(workdir / "checkpoints") == [2, 4]
        harness.digest(workdir, 4)

        filler.unlink()
        patch = harness.TRAIN_ONLY
        result = harness.run(*args, workdir=workdir, patch=patch)
        assert result.code == 0, result.output
        assert not list(workdir.glob(f"**/*{checkpoint.TMP}*"))
        assert "resumed from step 4" in result.stdout
        assert harness.run(*args, workdir=tmp_path / "whole", patch=patch).code == 0
        assert harness.digest(workdir) == harness.digest(tmp_path / "whole")
        assert harness.rows(workdir) == harness.rows(tmp_path / "whole")


def test_b22_a_disk_too_full_is_seen_before_anything_is_written(
    tmp_path, tree, monkeypatch
):
    saved(tmp_path, tree, [1])
    before = harness.files(tmp_path)
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(StorageError, match="16,400 bytes, 1,000 are free") as error:
        checkpoint.save(tmp_path, 2, tree)
    assert str(tmp_path / "2") in str(error.value)
    assert harness.files(tmp_path) == before


def test_b23_pictures_that_cannot_be_written_are_one_warning(tmp_path):
    said = []

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    figures.quietly(said.append)(full)
    assert len(said) == 1
    assert "No space left" in said[0]


@pytest.mark.parametrize("error", [OSError(errno.EIO, "I/O error"), ValueError("bad")])
def test_b24_a_save_that_fails_ends_the_run_at_once(error, tmp_path, monkeypatch):
    """Saves are synchronous: no later step is computed, none is counted as saved."""
    orbax_save = ocp.Checkpointer.save

    def fail_at_6(self, path, *args, **kwargs):
        if path.name != "6":
            return orbax_save(self, path, *args, **kwargs)
        path.with_name(f"6{checkpoint.TMP}").mkdir()
        raise error

    monkeypatch.setattr(ocp.Checkpointer, "save", fail_at_6)
    with pytest.raises(StorageError) as raised:
        learn(harness.config(*ARGS), tmp_path / "run")
    assert raised.value.exit_code == 5
    checkpoints = tmp_path / "run" / "checkpoints"
    assert str(checkpoints / "6") in str(raised.value)
    assert checkpoint.steps(checkpoints) == [2, 4]
    assert [p.name for p in checkpoints.iterdir() if checkpoint.TMP in p.name] == []
    assert harness.rows(tmp_path / "run")[-1]["step"] == 6
    assert record.read_json(tmp_path / "run" / "run.json")["status"] == "failed"


def test_b24_a_save_that_vanishes_behind_our_back_is_not_counted(tmp_path, tree):
    """The directory is taken away while orbax writes into it."""
    saved(tmp_path, tree, [1])
    program = f"""
import sys, threading, shutil, pathlib, numpy as np
import orbax.checkpoint as ocp
from memsep_jax import checkpoint
directory = pathlib.Path({str(tmp_path)!r})
def vanish(*args, **kwargs):
    found = list(directory.glob("*{checkpoint.TMP}*"))
    for path in found:
        shutil.rmtree(path)
    return real(*args, **kwargs)
real = ocp.StandardCheckpointHandler.finalize
ocp.StandardCheckpointHandler.finalize = vanish
try:
    checkpoint.save(directory, 2, {{"a": np.ones(9)}})
except checkpoint.StorageError as error:
    sys.exit(error.exit_code)
"""
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    result = subprocess.run([sys.executable, "-c", program], env=env)
    assert result.returncode == 5
    assert checkpoint.steps(tmp_path) == [1]


def test_b25_a_workdir_that_cannot_be_written_is_told_before_jax(tmp_path):
    (tmp_path / "file").write_text("mine")
    workdirs = [
        Path("/proc/1/run"),  # not even root writes there
        tmp_path / "file",
        tmp_path / "file" / "run",
        tmp_path / ("x" * 300),
    ]
    report = "import atexit; atexit.register(lambda: print('jax' in sys.modules))"
    for workdir in workdirs:
        result = harness.run(*ARGS, workdir=workdir, patch=report)
        assert result.code == 2, result.output
        assert result.stdout.strip() == "False"
        assert str(workdir) in result.stderr
        assert "Traceback" not in result.stderr
        assert result.seconds < 4  # 2 on a machine that does nothing else
    assert (tmp_path / "file").read_text() == "mine"


def test_b25_parents_are_made_and_any_name_is_good(whole):
    assert "größer" in whole.name and whole.parent.name == "not there"
    assert (whole / "metrics.json").exists()
    assert (whole / "report.html").exists()


def test_b26_the_newest_steps_and_the_best_one_stay(tmp_path, monkeypatch):
    """The held-out loss grows from step to step, as in every run that memorizes."""
    worse = iter(range(100))
    monkeypatch.setattr(
        monitor,
        "make_losses",
        lambda *args: lambda params, points: np.full(3, next(worse), np.float32),
    )
    config = harness.config(*ARGS, "--config.run.evaluate_every=2")
    learn(config, tmp_path / "run")
    losses = [r["held_out_losses"][0] for r in harness.rows(tmp_path / "run")[1::2]]
    assert losses == sorted(losses)
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [6, 8, 10]
    assert checkpoint.steps(tmp_path / "run" / "best") == [2]


def test_b26_a_save_keeps_the_newest_and_never_less(tmp_path, tree):
    for step in range(1, 7):
        checkpoint.save(tmp_path, step, tree, keep=2)
        kept = checkpoint.steps(tmp_path)
        assert kept == list(range(max(1, step - 1), step + 1))


def test_b27_going_back_moves_newer_steps_aside_and_saves_again(trained, copy):
    learn(harness.config(*ARGS), copy, resume_step=6)
    checkpoints = copy / "checkpoints"
    aside = sorted(p.name for p in checkpoints.glob("abandoned-*"))
    assert [name.rsplit("-", 1)[1] for name in aside] == ["10", "8"]
    assert [p.name[-3:] for p in (copy / "best").glob("abandoned-*")] == ["-10"]
    assert checkpoint.steps(checkpoints) == [6, 8, 10]
    assert harness.digest(copy) == harness.digest(trained)
    assert harness.rows(copy) == harness.rows(trained)
    assert checkpoint.steps(copy / "best") == checkpoint.steps(trained / "best")


def test_b27_a_step_below_the_newest_can_be_saved(tmp_path, tree):
    """Orbax's manager would return False and save nothing."""
    digests = saved(tmp_path, tree, [5, 3])
    assert checkpoint.steps(tmp_path) == [3, 5]
    assert checkpoint.digest(checkpoint.restore(tmp_path, 3, tree)) == digests[3]


def test_b27_a_step_that_is_not_there_is_refused_with_those_that_are(copy):
    before = harness.files(copy)
    with pytest.raises(ConflictError, match="--resume_step=7") as error:
        learn(harness.config(*ARGS), copy, resume_step=7)
    assert error.value.exit_code == 2 and "[6, 8, 10]" in str(error.value)
    assert harness.files(copy) == before


SHAPES = jax.ShapeDtypeStruct
OTHERS = {
    "shape": {"params": {"a": SHAPES((64, 32), jnp.float32)}},
    "dtype": {"params": {"a": SHAPES((64, 64), jnp.bfloat16)}},
    "extra": {"params": {"c": SHAPES((1,), jnp.float32)}},
    "mask": {"mask": {"a": SHAPES((64, 1), jnp.float32)}},
}


@pytest.mark.parametrize("kind", [*OTHERS, "missing"])
def test_b28_another_model_is_refused_leaf_by_leaf(kind, tmp_path, tree):
    tree = tree | {"mask": {"a": jnp.ones(()), "b": jnp.ones(())}}
    saved(tmp_path, tree, [1])
    before = harness.files(tmp_path)
    other = jax.eval_shape(lambda: tree)
    if kind == "missing":
        del other["params"]["b"]
        lines = ["params/b: saved ((3,), 'float32'), expected absent"]
    else:
        ((group, leaves),) = OTHERS[kind].items()
        other[group] = other[group] | leaves
        ((name, leaf),) = leaves.items()
        was = tree[group].get(name)
        was = "absent" if was is None else (was.shape, str(was.dtype))
        lines = [
            f"{group}/{name}: saved {was}, expected {(leaf.shape, str(leaf.dtype))}"
        ]
    with pytest.raises(ConflictError) as error:
        checkpoint.restore_newest(tmp_path, other)
    assert error.value.exit_code == 2
    for part in (*lines, "1 leaves differ", "width"):
        assert part in str(error.value)
    assert harness.files(tmp_path) == before


def test_b28_at_most_ten_leaves_are_listed(tmp_path):
    saved(tmp_path, {f"leaf_{i:02d}": jnp.ones(2) for i in range(15)}, [1])
    with pytest.raises(ConflictError) as error:
        checkpoint.restore(
            tmp_path, 1, {f"leaf_{i:02d}": jnp.ones(3) for i in range(15)}
        )
    assert str(error.value).count("leaf_") == 10
    assert "and 5 more" in str(error.value)


def test_b28_another_width_is_refused_and_the_run_can_go_on_as_it_was(trained, copy):
    """With the config change allowed, the checkpoint still does not fit."""
    shutil.rmtree(copy / "checkpoints" / "10")
    wider = harness.config(*ARGS, "--config.model.width=32")
    config_file = (copy / "config.json").read_bytes()
    with pytest.raises(ConflictError, match=r"saved \(\(16,\).*expected \(\(32,\)"):
        learn(wider, copy, allow_config_change=True)
    assert (copy / "config.json").read_bytes() == config_file
    learn(harness.config(*ARGS), copy)
    assert harness.digest(copy) == harness.digest(trained)


def test_b29_a_newer_schema_is_refused_with_both_versions(tmp_path, tree, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "SCHEMA", 2)
        saved(tmp_path, tree, [1])
    with pytest.raises(ConflictError, match="schema 2.*reads 1"):
        checkpoint.restore(tmp_path, 1, tree)


GOLDEN = Path(__file__).parents[1] / "data" / "checkpoint-schema-1"


def golden():
    """What GOLDEN holds as step 7, and packed: every type that a state may have.

    It was made once, at schema 1, and is never made anew; a later schema gets its own.
    In tests/, moved to data/ afterwards:
    python -c "from faults.test_storage import golden, checkpoint as c;
    c.save('/tmp/golden', 7, golden()); c.pack('/tmp/golden/packed.npz', 7, golden())"
    """
    thirds = jnp.arange(-3, 3, dtype=jnp.float32).reshape(2, 3) / 3
    return {
        "step": jnp.int32(7),
        "params": {"block_0": {"kernel": thirds, "bias": jnp.zeros(3)}},
        "ema": {"block_0": {"kernel": thirds.astype(jnp.bfloat16)}},
        "opt_state": [{"count": jnp.uint32(2**31)}, {"mu": jnp.float32(1e-45)}],
        "mask": {"heads": jnp.array([True, False])},
    }


def test_b29_a_checkpoint_of_the_first_schema_is_always_read(tmp_path):
    """Bitwise; by the digest, and by the bits of what is computed here."""
    directory = shutil.copytree(GOLDEN, tmp_path / "golden")
    like = jax.eval_shape(golden)
    known = {
        "step": "07000000",
        "params/block_0/kernel": "000080bfabaa2abfabaaaabe00000000abaaaa3eabaa2a3f",
        "params/block_0/bias": "00" * 12,
        "ema/block_0/kernel": "80bf2bbfabbe0000ab3e2b3f",
        "opt_state/0/count": "00000080",
        "opt_state/1/mu": "01000000",
        "mask/heads": "0100",
    }
    for tree, step in (
        checkpoint.restore_newest(directory, like),
        checkpoint.unpack(directory / "packed.npz", like),
    ):
        assert step == 7
        found = checkpoint.leaves(tree)
        assert {name: leaf.tobytes().hex() for name, leaf in found.items()} == known
        types = (jax.tree.map(lambda a: a.dtype, some) for some in (tree, like))
        assert next(types) == next(types)


def test_b30_a_step_is_chosen_by_its_number_and_not_by_time(tmp_path, tree):
    """Clocks that go backwards, or stand still, and names that sort otherwise."""
    digests = saved(tmp_path, tree, [2, 9, 10])
    year = 365 * 86_400
    for times in ({2: 30, 9: 20, 10: 1}, {2: 1, 9: 1, 10: 1}):
        for step, since in times.items():
            for path in (tmp_path / str(step), *(tmp_path / str(step)).rglob("*")):
                os.utime(path, (since * year, since * year))
        assert checkpoint.steps(tmp_path) == [2, 9, 10]
        restored, step = checkpoint.restore_newest(tmp_path, tree)
        assert step == 10 and checkpoint.digest(restored) == digests[10]
    # What is dropped is the lowest number, though it is the youngest.
    os.utime(tmp_path / "2", (60 * year, 60 * year))
    checkpoint.save(tmp_path, 11, tree, keep=2)
    assert checkpoint.steps(tmp_path) == [10, 11]
    # And what is damaged is followed by the one below.
    harness.corrupt(harness.largest(tmp_path / "11" / "state"), "truncate")
    assert checkpoint.restore_newest(tmp_path, tree)[1] == 10
