"""launch/sweep.py: one description, run by any engine, stopped and gone on with."""

import contextlib
import csv
import inspect
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import yaml
from faults import harness

from launch import sweep
from memsep_jax.experiments import record
from memsep_jax.experiments.config import build, sweep_file
from memsep_jax.experiments.runtime import runs
from memsep_jax.experiments.studies import overview

ROOT = Path(__file__).parents[1]
HEAD = f'CONFIG = "{ROOT}/configs/mlp_mixture.py:smoke"\n'
TINY = {"data.num_examples": [8, 16], "seeds": 2}


def describe(folder, *points, head=HEAD):
    """A sweep file of some dicts."""
    path = folder / "sweep.py"
    yields = "".join(f"    yield {point!r}\n" for point in points)
    path.write_text(f"{head}def points():\n{yields or '    yield from ()'}\n")
    return path


def command(action, file, workdir, *args):
    place = [str(file), f"--workdir={workdir}"]
    return [sys.executable, str(ROOT / "launch/sweep.py"), action, *place, *args]


def environment(**changes):
    """That of other children of tests, which share what they compile."""
    env = harness._environment(1) | changes
    return {name: value for name, value in env.items() if value is not None}


def launched(action, file, workdir, *args, **changes):
    """The launcher as a person starts it: (exit code, what it said)."""
    words = command(action, file, workdir, *args)
    env = environment(**changes)
    done = subprocess.run(words, capture_output=True, text=True, env=env, timeout=300)
    return done.returncode, done.stdout + done.stderr


@contextlib.contextmanager
def launching(file, workdir, *args):
    """A launcher at work; nothing of it is left behind."""
    child = subprocess.Popen(
        command("run", file, workdir, *args),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
    )
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def wait_for(true, seconds=120):
    limit = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < limit
        time.sleep(0.05)


def states(workdir, points):
    return [runs.state(workdir, point) for point in points]


def digests(workdir, points):
    """What all finished runs found."""
    found = [(runs.place(workdir, p) / "samples.npz").read_bytes() for p in points]
    return [*found, (workdir / "points.csv").read_bytes()]


SLOW = "import time\n" + harness.SLOW_STEPS.replace("0.05", "0.5")


def fake(config, place):
    """A run that takes no time."""
    known = {"experiment": "train", "memorization": {"ratio": 0.5}}
    record.write_json(place / "metrics.json", known)
    record.write_json(place / "config.json", build.to_json(config))
    record.write_json(place / "run.json", {"status": "complete"})


FAKE = f"""
from memsep_jax import experiments
from memsep_jax.experiments import record
from memsep_jax.experiments.config import build
{inspect.getsource(fake)}
experiments.run = fake
"""


def patched(file, patch):
    """The same sweep, whose workers run a patch before."""
    indented = patch.strip().replace("\n", "\n    ")
    path = file.with_name("patched.py")
    path.write_text(
        f"import sys\nif 'work' in sys.argv:\n    {indented}\n{file.read_text()}"
    )
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A sweep that nothing disturbs, by two workers: (file, points, workdir, said)."""
    folder = tmp_path_factory.mktemp("whole")
    file, workdir = describe(folder, TINY), folder / "out"
    # Without the cache of other children: the workers have one of their own.
    code, said = launched(
        "run",
        patched(file, harness.UNDRAWN),
        workdir,
        "--workers=2",
        JAX_COMPILATION_CACHE_DIR=None,
    )
    assert code == 0, said
    return file, sweep_file.read(file), workdir, said


def test_a_description_becomes_points_with_grids_and_seeds(tmp_path):
    grid = {"data.num_examples": [8, 16], "model.width": range(4, 6), "seeds": 2}
    points = sweep_file.read(describe(tmp_path, grid, {"optimizer.weight_decay": 0.5}))
    assert len(points) == 2 * 2 * 2 + 1
    assert points[0].name == "data.num_examples=8,model.width=4,seed=0"
    assert points[-1].name == "optimizer.weight_decay=0.5"
    n, width, seed = points[7].values.values()
    config = points[7].config
    assert (config.data.num_examples, config.model.width) == (n, width) == (16, 5)
    # A seed moves the truth, the draws and the weights alike.
    first = points[6].config
    assert config.seed - first.seed == seed == config.data.seed - first.data.seed == 1


BAD = {
    "duplicates": (({"seed": 0}, {"model.width": 4, "seed": 0}), "are one"),
    "field": (({"model.widht": 4},), "model.widht is not a field"),
    "group": (({"modle.width": 4},), "modle.width is not a field"),
    "kind": (({"model.width": "wide"},), "model.width"),
    "value": (({"train.batch_size": 0},), "train.batch_size=0"),
    "later": (({"seed": 0}, {"data.num_examples": 10**9}), "num_examples"),
    "seeds": (({"seeds": 0},), "seeds=0 must be"),
    "both": (({"seeds": 2, "seed": 1},), "seeds=2 must be"),
    "no dict": ((("model.width", 4),), "each must be a dict"),
    "nothing": ((), "yields nothing"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_sweep_is_refused_before_anything_is_written(case, tmp_path, capsys):
    points, said = BAD[case]
    if case == "duplicates":  # the second says what is so already
        width = sweep_file.read(describe(tmp_path, {}))[0].config.model.width
        points = ({"seed": 0}, {"model.width": width, "seed": 0})
    file = describe(tmp_path, *points)
    assert sweep.main(["run", str(file), f"--workdir={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {file}: ") and said in error, error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "head, said",
    [
        ("", "defines no CONFIG"),
        ("CONFIG = 'nowhere.py'\n", "no such file"),
        ("CONFIG = (\n", "SyntaxError"),
        ("1 / 0\n", "ZeroDivisionError"),
        (HEAD + "FIELDS = {'model.widht': 4}\n", "model.widht is not a field"),
    ],
)
def test_a_file_that_is_no_sweep_is_refused(head, said, tmp_path, capsys):
    file = describe(tmp_path, {"seed": 0}, head=head)
    assert sweep.main(["run", str(file), f"--workdir={tmp_path / 'out'}"]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "args, said",
    [
        (["--engine=slurm"], "no sbatch here"),
        (["--engine=slurm", "--resources=cluster=local"], "pip install -e '.[slurm]'"),
        (["--engine=ray"], "pip install -e '.[ray]'"),
        (["--resources=num_gpus=1"], "--engine=local knows devices=0+1 only"),
        (["--resources=devices"], "must be name=value"),
        (["--workers=0"], "--workers=0 must be at least 1"),
    ],
)
def test_an_engine_that_is_not_there_starts_nothing(
    args, said, tmp_path, capsys, monkeypatch
):
    for name in ("submitit", "ray"):
        monkeypatch.setitem(sys.modules, name, None)
    if said == "no sbatch here":
        monkeypatch.setitem(sys.modules, "submitit", types.SimpleNamespace())
    monkeypatch.setattr(sweep.shutil, "which", lambda name: None)
    file = describe(tmp_path, {"seed": 0})
    assert sweep.main(["run", str(file), f"--workdir={tmp_path / 'out'}", *args]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_every_point_becomes_a_run_and_all_a_table_and_a_picture(whole):
    _, points, workdir, said = whole
    assert states(workdir, points) == ["done"] * 4
    assert "4 points, 2 workers (local)" in said and "4 done" in said
    with open(workdir / "points.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["data.num_examples"]) for row in rows] == [8, 8, 16, 16]
    for row, point in zip(rows, points, strict=True):
        own = record.read_json(runs.place(workdir, point) / "metrics.json")
        ratio = own["memorization"]["ratio"]
        assert float(row["memorization.ratio"]) == ratio and row["state"] == "done"
    table = record.read_json(workdir / "metrics.json")["table"]
    assert [row["seeds"] for row in table] == [2, 2]
    assert (workdir / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert not list((workdir / "points").glob("*.claim"))
    # What a worker recorded of itself can be given again.
    known = record.read_json(runs.place(workdir, points[0]) / "run.json")["command"]
    words = shlex.split(known)
    assert words[0] == "python" and words[2] == "work", known
    assert not any(Path(word.partition("=")[2] or word).is_absolute() for word in words)
    again = subprocess.run([sys.executable, *words[1:]], env=environment(), timeout=100)
    assert again.returncode == 0
    assert list((workdir / "compiled").iterdir()), "what all workers share"


@pytest.mark.slow
def test_finished_points_are_not_done_again(whole):
    file, points, workdir, _ = whole
    paths = [runs.place(workdir, point) / "run.json" for point in points]
    before = [path.stat().st_mtime_ns for path in paths]
    code, said = launched("run", file, workdir)
    assert code == 0, said
    assert [path.stat().st_mtime_ns for path in paths] == before


@pytest.mark.slow
def test_status_says_what_is_known_of_each_point(whole, capsys):
    file, points, workdir, _ = whole
    assert sweep.main(["status", str(file), f"--workdir={workdir}"]) == 0
    said = capsys.readouterr().out
    assert "4 done" in said and all(point.name in said for point in points)
    assert sweep.main(["status", str(file), f"--workdir={workdir.parent / 'no'}"]) == 0
    assert "4 waiting" in capsys.readouterr().out
    assert not (workdir.parent / "no").exists()


def test_what_fails_ends_no_other_and_is_done_again_on_request(tmp_path, capsys):
    """Here in this process: the second of three points fails once."""
    fields = 'FIELDS = {"optimizer.schedule": "constant"}\n'
    more = {"model.width": [4, 5, 6], "train.order": "fixed"}
    file = describe(tmp_path, more, head=HEAD + fields)
    points, workdir = sweep_file.read(file), tmp_path / "out"
    args = [str(file), f"--workdir={workdir}"]
    begun = []

    def run(config, place):
        begun.append(config.model.width)
        if config.model.width == 5 and len(begun) < 4:
            raise RuntimeError("no luck\nat all")
        fake(config, place)

    (workdir / "points").mkdir(parents=True)
    runs.work(workdir, points, run, print)
    assert begun == [4, 5, 6] and states(workdir, points) == ["done", "failed", "done"]
    runs.work(workdir, points, run, print)
    assert begun == [4, 5, 6], "what failed is not done again unasked"
    assert sweep.main(["status", *args]) == 0
    assert "RuntimeError: no luck" in capsys.readouterr().out
    assert sweep.main(["aggregate", *args]) == 0
    with open(workdir / "points.csv", newline="") as rows:
        ratios = [row["memorization.ratio"] for row in csv.DictReader(rows)]
    assert ratios == ["0.5", "", "0.5"], "a gap is a gap"
    assert "n/a" in capsys.readouterr().out
    runs.clear(workdir, points, retry=True)
    runs.work(workdir, points, run, print)
    assert begun[3:] == [5] and states(workdir, points) == ["done"] * 3


def test_the_picture_marks_what_has_no_result():
    axes = ["data.num_examples", "model.width"]
    share = {"mean": 0.5, "low": 0.4, "high": 0.6}
    table = [
        {axes[0]: n, axes[1]: width, "seeds": 2, "r": share}
        for n in (10, 100)
        for width in (4, 8)
    ]
    del table[2]["r"]
    (panel,) = overview.draw(table, axes, "r").axes
    labels = [line.get_label() for line in panel.lines]
    assert labels == ["width = 4", "width = 8", "no result"]
    assert list(panel.lines[2].get_xdata()) == [100]
    assert panel.get_xscale() == "log" and panel.get_xlabel() == "num examples"
    named = [{"data.name": name, "seeds": 1, "r": share} for name in ("a", "b")]
    (panel,) = overview.draw(named, ["data.name"], "r").axes
    assert [text.get_text() for text in panel.get_xticklabels()] == ["a", "b"]


def test_fields_of_several_values_have_rows_of_their_own(tmp_path, monkeypatch):
    """As the classes of a subset have: their text is what a row is known by."""
    head = HEAD.replace("mlp_mixture", "digits")
    grid = {"data.classes": [(0, 1), (2, 3)], "seeds": 2}
    points = sweep_file.read(describe(tmp_path, grid, head=head))
    for point in points:
        (tmp_path / "out" / "points" / point.name).mkdir(parents=True)
        found = {"memorization": {"ratio": 0.5}}
        record.write_json(runs.place(tmp_path / "out", point) / "metrics.json", found)
    monkeypatch.setattr(runs, "state", lambda workdir, point: "done")
    shown = overview.aggregate(tmp_path / "out", points)
    # Equal numbers are no reason to leave out what the table is about.
    headers = [column.header for column in shown.columns]
    assert headers == ["data.classes", "memorization.ratio"]
    table = record.read_json(tmp_path / "out" / "metrics.json")["table"]
    assert [row["data.classes"] for row in table] == ["(0, 1)", "(2, 3)"]
    assert [row["seeds"] for row in table] == [2, 2]


def test_nothing_is_shown_of_a_sweep_without_a_result(tmp_path, capsys):
    file = describe(tmp_path, {"seed": 0})
    with pytest.raises(sweep.UsageError, match="no point is done yet"):
        overview.aggregate(tmp_path / "out", sweep_file.read(file))


@pytest.mark.slow
def test_a_sweep_that_is_killed_goes_on_and_ends_as_if_it_was_not(whole, tmp_path):
    """First the launcher is killed, then asked to end, and then a worker is killed."""
    file, points, undisturbed, _ = whole
    workdir = tmp_path / "out"
    slowed = patched(file, SLOW + harness.UNDRAWN)

    def steps():
        places = [runs.place(workdir, point) / "metrics.jsonl" for point in points]
        return sum(path.stat().st_size for path in places if path.exists())

    @contextlib.contextmanager
    def at_work():
        before = steps()
        with launching(slowed, workdir, "--workers=2") as child:
            wait_for(lambda: steps() > before)
            yield child

    with at_work() as child:
        child.kill()  # the workers see it, save, and end
        wait_for(lambda: "running" not in states(workdir, points))
        assert "stopped" in states(workdir, points)
    with at_work() as child:
        child.send_signal(signal.SIGTERM)
        said, _ = child.communicate(timeout=100)
        assert child.returncode == 143 and "the same command goes on" in said
        assert "stopped" in states(workdir, points)
    with at_work() as child:
        claims = list((workdir / "points").glob("*.claim"))
        pid = int(re.search(r"process (\d+)", claims[0].read_text())[1])
        os.kill(pid, signal.SIGKILL)
        said, _ = child.communicate(timeout=200)
        # What it was at is left to the next command; the others are done.
        assert child.returncode == 1 and "1 of 4 points are not done" in said
        assert sorted(states(workdir, points)) == ["done"] * 3 + ["stopped"]
    code, said = launched("run", file, workdir, "--workers=2")
    assert code == 0, said
    assert digests(workdir, points) == digests(undisturbed, points)


@pytest.mark.slow
def test_two_launchers_share_the_points(whole, tmp_path):
    file, points, undisturbed, _ = whole
    workdir = tmp_path / "out"
    quick = patched(file, harness.UNDRAWN)
    with launching(quick, workdir, "--workers=1") as other:
        code, said = launched("run", quick, workdir, "--workers=1")
        assert other.wait(timeout=200) in (0, 1) and code in (0, 1), said
    begun = [
        name
        for log in (workdir / "workers").glob("*.log")
        for name in re.findall("^== (.*)$", log.read_text(), re.MULTILINE)
    ]
    assert sorted(begun) == sorted(point.name for point in points)
    assert launched("aggregate", file, workdir)[0] == 0
    assert digests(workdir, points) == digests(undisturbed, points)


def test_workers_take_turns_on_the_devices_or_have_their_own_cores(monkeypatch):
    given = []

    class Ended:
        def start(self, env, cores):
            given.append((env, cores))

        def wait(self, seconds=0):
            return 0

        def stop(self):
            pass

    start, count = sweep.local({"devices": "0+3"})
    assert count == 2 and list(start([Ended() for _ in range(4)])) == []
    assert [env["CUDA_VISIBLE_DEVICES"] for env, _ in given] == ["0", "3", "0", "3"]
    assert {env["XLA_PYTHON_CLIENT_MEM_FRACTION"] for env, _ in given} == {"0.450"}
    assert not any(cores for _, cores in given)
    del given[:]
    monkeypatch.setattr(
        os, "sched_getaffinity", lambda pid: {4, 5, 6, 7}, raising=False
    )
    start, count = sweep.local({"devices": ""})
    assert count == 2 and list(start([Ended(), Ended()])) == []
    assert given == [({}, [4, 6]), ({}, [5, 7])]


@pytest.mark.slow
@pytest.mark.dev
def test_a_job_whose_time_ends_is_saved_and_queued_again(whole, tmp_path):
    """As submitit asks for it, after the signal that SLURM sends to the whole job."""
    pytest.importorskip("submitit")
    file, points, *_ = whole
    workdir = tmp_path / "out"
    (workdir / "points").mkdir(parents=True)
    words = command("work", patched(file, SLOW), workdir)
    worker = sweep.Worker(words, workdir / "log")
    worker.start(environment())
    place = runs.place(workdir, points[0])
    wait_for((place / "metrics.jsonl").exists)
    os.kill(worker.child.pid, signal.SIGUSR2)
    again = worker.checkpoint()
    assert worker.child.returncode == 143, (workdir / "log").read_text()
    assert states(workdir, points)[0] == "stopped"
    assert again.function.command == words and again.function.child is None


@pytest.fixture(params=["slurm", "ray"])
def engine(request):
    pytest.importorskip({"slurm": "submitit"}.get(request.param, request.param))
    return request.param


OPTIONS = {"slurm": ["--resources=cluster=local"], "ray": []}


@pytest.mark.dev
def test_other_engines_start_workers_that_take_all_points(engine, tmp_path):
    file, workdir = describe(tmp_path, {"seeds": 3}), tmp_path / "out"
    args = f"--engine={engine}", "--workers=2", *OPTIONS[engine]
    code, said = launched("run", patched(file, FAKE), workdir, *args)
    assert code == 0 and f"3 points, 2 workers ({engine})" in said, said
    assert states(workdir, sweep_file.read(file)) == ["done"] * 3
    assert len(list((workdir / "workers").glob("?.log"))) == 2
    assert (workdir / "points.csv").exists()


@pytest.mark.slow
@pytest.mark.dev
def test_other_engines_do_the_same(engine, whole, tmp_path):
    file, points, undisturbed, _ = whole
    workdir = tmp_path / "out"
    args = f"--engine={engine}", "--workers=2", *OPTIONS[engine]
    code, said = launched("run", patched(file, harness.UNDRAWN), workdir, *args)
    assert code == 0, said
    assert digests(workdir, points) == digests(undisturbed, points)


@pytest.mark.dev
@pytest.mark.filterwarnings("ignore")  # of these packages, when they are imported
def test_resources_that_an_engine_does_not_know_are_named(engine, tmp_path, capsys):
    known = "cluster=local," if engine == "slurm" else ""
    args = f"--engine={engine}", f"--resources={known}nonsense=1"
    file = describe(tmp_path, {"seed": 0})
    assert sweep.main(["run", str(file), f"--workdir={tmp_path / 'out'}", *args]) == 2
    assert "nonsense" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_there_to_start_elsewhere_can_be_read():
    for script in ("slurm.sbatch", "tpu_vm.sh"):
        subprocess.run(["bash", "-n", ROOT / "launch" / script], check=True)
    job = yaml.safe_load((ROOT / "launch/kubernetes.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    task = yaml.safe_load((ROOT / "launch/skypilot.yaml").read_text())
    for words in container["command"], task["run"].split():
        assert words[1:4] == ["launch/sweep.py", "run", "launch/digits_64.py"]


def test_the_sweep_of_64_points_can_be_run(monkeypatch):
    monkeypatch.chdir(ROOT)
    points = sweep_file.read("launch/digits_64.py")
    assert points[0].name == "data.num_examples=25,model.width=16,seed=0"
    assert {point.config.model.depth for point in points} == {2}
    assert len(points) == 64 == len({point.name for point in points})
