"""What a run says, to whom, and how little it needs for that (G, and the secrets)."""

import os
import re
import signal
import sys

import pytest
from test_report import Page, drawn

from faults import harness
from memsep_jax.experiments import record
from memsep_jax.experiments.runtime import trackers

NAME = "é \u202egnp <script>alert(1)<b> \"'"  # of a workdir
SECRETS = {"WANDB_API_KEY": "sekret" * 7, "AWS_SECRET_ACCESS_KEY": "hidden" * 7}
NO_SCREEN = """
for name in ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND"):
    os.environ.pop(name, None)
import atexit
atexit.register(lambda: print("pyplot:", "matplotlib.pyplot" in sys.modules))
"""
BLOCKED = """
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("tensorboardX", "wandb"):
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, Blocked())
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with as little around it as there can be: (result, workdir, its HOME)."""
    place = tmp_path_factory.mktemp("output")
    home, workdir = place / "home-of-alice", place / "runs" / NAME
    home.mkdir()
    result = harness.run(
        *harness.TINY,
        "--config.run.tracker=tensorboard",
        workdir=workdir,
        patch=NO_SCREEN + BLOCKED,
        env=SECRETS | {"HOME": str(home), "NO_COLOR": "1", "COLUMNS": "20"},
    )
    return result, workdir, home


def test_g67_without_a_tracker_there_are_rows_and_one_warning(finished):
    result, workdir, _ = finished
    assert result.code == 0 and result.stderr == "", result.output
    assert [row["step"] for row in harness.rows(workdir)] == list(range(1, 31))
    (line,) = [line for line in result.stdout.splitlines() if "warning" in line]
    assert line.startswith("warning: tensorboard is not written (No module named ")
    assert line.endswith("metrics.jsonl is; it needs pip install 'memsep_jax[tb]'")


def test_g67_pictures_need_no_screen(finished):
    result, workdir, _ = finished
    assert "pyplot: False" in result.stdout  # what would look for a screen
    assert drawn(workdir, "png") == drawn(workdir, "pdf") >= {"distances", "loss"}
    for path in (workdir / "figures").iterdir():
        start = {".png": b"\x89PNG\r\n", ".pdf": b"%PDF-"}[path.suffix]
        assert path.read_bytes().startswith(start), path


def test_g68_a_log_has_no_control_codes(finished):
    result, _, _ = finished
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\x9b]", result.stdout + result.stderr)


def test_g68_a_table_is_as_narrow_as_it_must_be(finished):
    result, workdir, _ = finished
    table = [line for line in result.stdout.splitlines() if line[:1] in "│┌└├"]
    assert len(table) > 20 and max(map(len, table)) <= 20, result.stdout
    # What a person may copy is whole, however long it is.
    assert f"report: {workdir / 'report.html'}" in result.stdout


def test_g68_a_name_with_html_in_it_is_text(finished):
    _, workdir, _ = finished
    html = (workdir / "report.html").read_text()
    page = Page(html)
    assert not page.tags & {"script", "iframe", "object"} and "<script" not in html
    assert page.text.count(" ".join(workdir.name.split())) >= 2  # its title, its head
    assert all(source.startswith("data:image/png;") for source in page.fetched)
    # What turns the direction of text around ends where the name does.
    assert "unicode-bidi: isolate" in html


def test_security_no_secret_and_no_home_is_written_or_said(finished):
    result, workdir, home = finished
    said = [result.stdout.encode(), result.stderr.encode()]
    written = [path for path in workdir.rglob("*") if path.is_file()]
    names = {path.name for path in written}
    assert {"run.json", "config.json", "report.html", "metrics.json"} <= names
    for word in (*SECRETS.values(), home.name, *(k for k in SECRETS)):
        for path in written:
            assert word.encode() not in path.read_bytes(), f"{word} in {path}"
        assert not any(word.encode() in text for text in said), word
    # The search itself sees what is there.
    assert any(b"mlp_mixture" in path.read_bytes() for path in written)


def test_security_a_run_tells_of_the_machine_what_it_must_and_no_more(finished):
    _, workdir, _ = finished
    known = record.read_json(workdir / "run.json")
    assert set(known) <= {
        "command", "device", "fingerprint", "python", "rounding", "seconds", "seed",
        "started", "status", "streams", "updated", "versions",
    }  # fmt: skip
    assert known["command"].startswith("python -m memsep_jax.main --config=configs/")


@pytest.mark.parametrize("name", [n for n in trackers.TRACKERS if n != "none"])
def test_g67_a_tracker_that_fails_in_any_way_is_one_line(name, tmp_path, monkeypatch):
    """Its words may be pages, and its error of any kind."""

    def failing(workdir, config):
        raise RuntimeError("no network\nwhile asking\n  https://example.invalid")

    said = []
    monkeypatch.setitem(trackers.TRACKERS, name, failing)
    track = trackers.tracker(name, tmp_path, None, said.append)
    track({"step": 1})
    (line,) = said
    assert "\n" not in line and "(no network while asking https://exam" in line


# wandb itself, where it is installed.


def wandb(tmp_path, **env):
    pytest.importorskip("wandb")
    home = tmp_path / "home"
    home.mkdir()
    arguments = (*harness.TINY, "--config.run.tracker=wandb")
    removed = "[os.environ.pop(name) for name in list(os.environ) if 'WANDB' in name]\n"
    patch = (removed if not env else "") + harness.TRAIN_ONLY
    env = {"HOME": str(home), "NETRC": str(home / "netrc")} | env
    return arguments, patch, env


@pytest.mark.slow
@pytest.mark.parametrize("network", [True, False])
def test_g67_wandb_without_login_or_network_asks_nothing_and_ends(network, tmp_path):
    """Nobody is logged in: offline. Somebody is, and no server answers: one warning."""
    key = {"WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    arguments, patch, env = wandb(tmp_path, **({} if network else key))
    result = harness.run(
        *arguments, workdir=tmp_path / "run", patch=patch, env=env, timeout=200
    )
    assert result.code == 0 and "Traceback" not in result.stderr, result.output
    assert len(harness.rows(tmp_path / "run")) == 30
    assert "\x1b" not in result.output
    warned = result.stdout.count("warning: wandb is not written")
    assert warned == (0 if network else 1), result.output
    kept = list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(kept) == (1 if network else 0)


@pytest.mark.slow
def test_g67_wandb_asks_nothing_on_a_terminal(tmp_path):
    arguments, patch, env = wandb(tmp_path)
    # A question would be waited for, until this ends it.
    limit = f"import os, signal\nsignal.alarm(100)\n{patch}"
    arguments = [*arguments, f"--workdir={tmp_path}/run"]
    code, text = harness.on_a_terminal(arguments, limit, **env)
    assert code == 0 != -signal.SIGALRM, text
    assert "Enter your choice" not in text
    assert len(harness.rows(tmp_path / "run")) == 30


# Nobody reads.

AUDIT = "--config=configs/audit.py:smoke --config.features.name=pixels"
ENDS = {
    "a run": "--config=configs/optimum.py:smoke",
    "an audit": AUDIT,
    "a sweep": "--config=configs/gmm_width_decay.py:smoke",
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ENDS)
def test_g68_a_reader_who_leaves_ends_no_run(kind, tmp_path):
    command = f"{sys.executable} -m memsep_jax.main --workdir={tmp_path}/run"
    again = f"--config={tmp_path}/run/config.json --config.experiment=report"
    for arguments in (ENDS[kind], again):
        (tmp_path / "run" / "report.html").unlink(missing_ok=True)
        done = harness.shell(f"{command} {arguments} | true; exit ${{PIPESTATUS[0]}}")
        assert done.returncode == 0 and done.stderr == "", done.stderr
        assert (tmp_path / "run" / "report.html").exists()
    assert record.read_json(tmp_path / "run" / "run.json")["status"] == "complete"


@pytest.mark.slow
@pytest.mark.parametrize("closed", [">&-", ">&- 2>&-", "</dev/null >&- 2>&-"])
def test_g68_a_run_needs_no_stream(closed, tmp_path):
    command = f"{sys.executable} -m memsep_jax.main {AUDIT} --workdir={tmp_path}/run"
    done = harness.shell(f"{command} {closed}")
    assert done.returncode == 0, done.stderr
    assert record.read_json(tmp_path / "run" / "run.json")["status"] == "complete"


@pytest.mark.slow
def test_g68_letters_that_a_log_cannot_hold_end_no_run(tmp_path):
    env = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"}
    result = harness.run(*AUDIT.split(), workdir=tmp_path / "run", env=env)
    assert result.code == 0 and result.stderr == "", result.output
    assert os.fsencode(result.stdout).isascii()
