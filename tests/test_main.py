"""The command from outside: help, pipes, names of directories, a run's own config."""

import re
import shlex
import subprocess
import sys

import pytest
from faults import harness

from memsep_jax.experiments import record

COMMAND = (sys.executable, "-m", "memsep_jax.main")
# A few seconds: an MLP on digits, two steps, eight samples.
TINY = (
    "--config=configs/digits.py:smoke",
    "--config.model.name=mlp",
    "--config.train.steps=2",
    "--config.run.log_every=1",
    "--config.run.snapshots=0",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The end of a small run, and its workdir."""
    workdir = tmp_path_factory.mktemp("a run") / "é <script>"
    return harness.run(*TINY, workdir=workdir), workdir


def test_a_run_ends_with_a_table_and_a_report(finished):
    result, workdir = finished
    assert result.code == 0 and result.stderr == "", result.output
    assert "memorized samples" in result.stdout
    assert "held-out null level" in result.stdout
    assert f"report: {workdir / 'report.html'}" in result.stdout
    status = record.read_json(workdir / "run.json")
    assert status["status"] == "complete" and TINY[0] in status["command"]
    for name in ("config.json", "metrics.jsonl", "metrics.json", "samples.npz"):
        assert (workdir / name).stat().st_size, name


def test_without_a_terminal_there_are_no_control_codes(finished):
    result, _ = finished
    assert "\x1b" not in result.output and "\r" not in result.output
    assert re.search(r"^training 2/2 ", result.stdout, re.MULTILINE)


def test_a_report_of_a_workdir_with_a_strange_name_is_escaped(finished):
    _, workdir = finished
    html = (workdir / "report.html").read_text()
    assert "é <script>" not in html and "http" not in re.sub(
        r"http://www\.w3\.org[\w./]*", "", html
    ).replace("https://arxiv", "").replace("https://github", "")


def test_the_config_json_of_a_run_is_its_config(finished):
    _, workdir = finished
    before = harness.files(workdir)
    # Its own workdir is meant, wherever the command is given.
    again = harness.run(f"--config={workdir}/config.json")
    assert again.code == 0, again.output
    assert again.stdout == f"already complete: {workdir}\n"
    assert harness.files(workdir) == before
    more = f"--config={workdir}/config.json", "--config.train.steps=1"
    other = harness.run(*more, workdir=workdir)
    assert other.code == 2 and "train.steps: 2 -> 1" in other.stderr, other.output
    assert harness.files(workdir) == before


@pytest.mark.parametrize("argument", ["--help", "--helpshort"])
def test_help_prints_the_flags_and_exits_0(argument):
    done = subprocess.run((*COMMAND, argument), capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert "--config=NAME[:variant]" in done.stdout and "Exit codes: 0" in done.stdout
    for flag in ("--workdir", "dry_run", "--resume_step", "allow_config_change"):
        assert flag in done.stdout
    for more in ("memsep_jax sample", "--config.train.steps: int", "Number of steps"):
        assert more in done.stdout


def test_without_a_config_it_says_what_to_give(tmp_path):
    done = subprocess.run(COMMAND, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        "error: --config=NAME is required, for example --config=digits; --help lists "
        "all commands\n"
    )
    assert not list(tmp_path.iterdir())


def test_a_config_json_starts_the_same_run_elsewhere_whoever_reads(finished, tmp_path):
    """The reader leaves after a line, and the run goes on to the same end."""
    _, workdir = finished
    program = f"{harness.UNDRAWN}from memsep_jax import main\nmain.run()"
    done = harness.shell(
        f"{sys.executable} -c {shlex.quote(program)} '--config={workdir}/config.json' "
        f"--workdir={tmp_path}/run | head -1; exit ${{PIPESTATUS[0]}}"
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert record.read_json(tmp_path / "run" / "run.json")["status"] == "complete"
    assert (tmp_path / "run" / "report.html").exists()
    assert harness.digest(tmp_path / "run") == harness.digest(workdir)


def test_what_nobody_reads_is_no_error():
    command = f"{sys.executable} -m memsep_jax.main --help"
    done = harness.shell(f"{command} | true; exit ${{PIPESTATUS[0]}}")
    assert done.returncode == 0 and done.stderr == "", done.stderr


def test_a_terminal_shows_a_live_bar_and_no_color_no_colours(tmp_path):
    arguments = [*TINY, f"--workdir={tmp_path}/run"]
    code, text = harness.on_a_terminal(arguments, harness.TRAIN_ONLY, NO_COLOR="1")
    assert code == 0, text
    assert "\x1b[" in text and "training" in text and "ETA" in text and "━" in text
    assert not re.search(r"\x1b\[[\d;]*(3[0-7]|9[0-7]|38;)[\d;]*m", text)


def test_debug_shows_the_traceback_of_an_error(tmp_path):
    arguments = (*TINY, "--config.run.chunk=0", "--debug")
    result = harness.run(*arguments, workdir=tmp_path / "run")
    assert result.code == 2 and "Traceback" in result.stderr
    assert "run.chunk=0 must be at least 1" in result.stderr.splitlines()[-1]


def test_a_bug_shows_itself_whole_and_exits_1(tmp_path):
    patch = """
from memsep_jax.experiments.config import build
def broken(config):
    raise ZeroDivisionError("a bug")
build.build = broken
"""
    result = harness.run(*TINY, workdir=tmp_path / "run", patch=patch)
    assert result.code == 1 and "Traceback" in result.stderr
    assert result.stderr.rstrip().endswith("ZeroDivisionError: a bug")


def test_after_a_signal_the_process_leaves_without_a_teardown(tmp_path):
    """Threads of XLA that still compile would crash in it; what was said is flushed."""
    patch = """
import atexit
from memsep_jax.experiments import studies
from memsep_jax.experiments.runtime.session import Interrupted
def run(*args):
    atexit.register(print, "torn down")
    print("saved")
    raise Interrupted(15)
studies.run = run
"""
    result = harness.run(*TINY, workdir=tmp_path / "run", patch=patch)
    assert result.code == 143 and result.stderr == "error: SIGTERM\n", result.output
    assert result.stdout == "saved\n"


def test_other_numbers_go_to_another_directory():
    digits = "--config=configs/digits.py"
    names = {
        (digits,): "digits",
        ("--config=configs/digits.py:smoke",): "digits-smoke",
        ("--config", "configs/digits.py:smoke"): "digits-smoke",
        ("-config=configs/digits.py", "-config.seed=3"): "digits-seed=3",
        (digits, "--config.data.num_examples=1400"): "digits-num_examples=1400",
        (digits, "--config.data.num_examples", "9"): "digits-num_examples=9",
        (digits, "--config.train.steps=5"): "digits-train.steps=5",
        (digits, "--config.sampler.steps=5"): "digits-sampler.steps=5",
        (digits, "--config.run.chunk=5", "--dry_run"): "digits",
        (digits, "--config.experiment=report"): "digits",
        ("--config=configs/gmm_size.py:small", "--config.sweep.seeds=9"): (
            "gmm_size-small"
        ),
    }
    assert harness.workdirs(*names) == [f"runs/{name}" for name in names.values()]
