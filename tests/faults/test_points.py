"""Points of a sweep that fail: the others finish, and no number hides the gap."""

import csv
import errno
import signal
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from configs import gmm_width_decay
from faults import harness
from memsep_jax import defaults, experiments
from memsep_jax.checkpoint import ConflictError, CorruptError, StorageError
from memsep_jax.experiments import record
from memsep_jax.experiments.config import build, grid, sweep_file
from memsep_jax.experiments.reporting import figures
from memsep_jax.experiments.runtime import points, runs
from memsep_jax.experiments.runtime.session import Interrupted, Session
from memsep_jax.experiments.studies import (
    capacity,
    ensemble,
    mitigate,
    networks,
    onset,
    results,
)
from memsep_jax.train import NonFiniteError

DIVERGES = "optimizer.lr=1e+20"
NAME = f"setting={DIVERGES},seed=0"
SETTINGS = ("", "optimizer.lr=0.01", DIVERGES, "optimizer.lr=0.1")


def small_grid(**changes):
    config = defaults.smoke(defaults.copying())
    config.experiment = "factors"
    config.sweep.update(seeds=1, setting=SETTINGS)
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture
def nets(monkeypatch):
    """Networks that are numbers: which were asked for, and how they fail."""
    nets = SimpleNamespace(asked=[], fails=lambda config: None)
    monkeypatch.setattr(figures, "encode", lambda figure, kind: kind.encode())

    def measured(config, session, members=False):
        nets.asked.append((config.optimizer.lr, config.data.num_examples, config.seed))
        if (error := nets.fails(config)) is not None:
            raise error
        ratio = 1 / (1 + (config.data.num_examples / 200) ** 3)
        names = ("raw", "ema", "highest", "null", "emitted", "frechet")
        return {"ratio": ratio - 0.1 * config.seed} | dict.fromkeys(names, ratio)

    monkeypatch.setattr(networks, "measured", measured)
    return nets


def diverging(config):
    """The networks of one setting, as `train` has them end."""
    return NonFiniteError("step 2 gave inf") if config.optimizer.lr == 1e20 else None


def run(config, workdir):
    """What a sweep raises at its end, or None."""
    try:
        experiments.run(config, workdir)
    except points.FailedError as error:
        return error
    return None


def rates(nets):
    found, nets.asked = [rate for rate, _, _ in nets.asked], []
    return found


def table(workdir):
    return record.read_json(workdir / "metrics.json")["table"]


def reasons(workdir):
    return [path.name for path in workdir.glob("points/*/*.failed.json")]


def test_g66_the_others_finish_and_only_the_failed_is_tried_again(
    nets, tmp_path, capsys
):
    config, nets.fails = small_grid(), diverging
    for tried in ([1e-3, 0.01, 1e20, 0.1], [1e20]):
        error = run(config, tmp_path)
        assert error.exit_code == 4 and rates(nets) == tried
        assert str(error).startswith("1 of 4 points failed")
        assert f"{NAME}: NonFiniteError: step 2 gave inf" in str(error)
        assert reasons(tmp_path) == [f"{NAME}.failed.json"]
        assert record.read_json(tmp_path / "run.json")["status"] == "failed"
    (path,) = tmp_path.glob("points/*/*.failed.json")
    assert "in measured" in record.read_json(path)["traceback"]

    # Where it would be there is n/a: in metrics.json, the table, the report, the csv.
    assert [row["seeds"] for row in table(tmp_path)] == [1, 1, 0, 1]
    assert table(tmp_path)[2] == {"setting": DIVERGES, "seeds": 0}
    printed = capsys.readouterr().out
    assert f"{NAME} failed: NonFiniteError: step 2 gave inf" in printed
    (*_, line) = (x for x in printed.splitlines() if "│" in x and DIVERGES in x)
    assert "n/a" in line
    html = (tmp_path / "report.html").read_text()
    assert "<td>n/a</td>" in html and f"{NAME}: NonFiniteError" in html
    with open(tmp_path / "points.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["setting"] for row in rows] == list(SETTINGS)
    assert [row["ratio"] == "" for row in rows] == [False, False, True, False]

    # When it fails no more, nothing is left of it.
    nets.fails = lambda config: None
    assert run(config, tmp_path) is None and rates(nets) == [1e20]
    assert reasons(tmp_path) == []
    assert [row["seeds"] for row in table(tmp_path)] == [1, 1, 1, 1]
    assert "n/a" not in (tmp_path / "report.html").read_text()


def test_g66_the_exit_code_is_that_of_all_failures_or_1(nets, tmp_path):
    """Whatever it is that a point raises; the codes of main.py have fixed meanings."""
    errors = {0.01: CorruptError("no weights"), 1e20: NonFiniteError("inf")}
    errors |= {0.1: ZeroDivisionError("a bug")}
    for number, (failing, code) in enumerate(
        [((0.01,), 3), ((1e20,), 4), ((0.1,), 1), ((0.01, 1e20), 1)]
    ):
        nets.fails = lambda config, failing=failing: (
            errors[config.optimizer.lr] if config.optimizer.lr in failing else None
        )
        error = run(small_grid(), tmp_path / str(number))
        assert error.exit_code == code and len(nets.asked) == 4
        nets.asked.clear()
        for rate in failing:
            assert f": {type(errors[rate]).__name__}: {errors[rate]}" in str(error)


@pytest.mark.parametrize(
    "error",
    [
        StorageError(errno.ENOSPC, "could not write x"),
        ConflictError("trained under another config"),
        build.ConfigError("what a person must change"),
        Interrupted(signal.SIGTERM),
        KeyboardInterrupt(),
    ],
)
def test_g66_what_is_not_of_a_point_ends_the_sweep_at_once(error, nets, tmp_path):
    nets.fails = lambda config: error if config.optimizer.lr == 0.01 else None
    with pytest.raises(type(error)):
        experiments.run(small_grid(), tmp_path)
    assert rates(nets) == [1e-3, 0.01]
    assert reasons(tmp_path) == [] and not (tmp_path / "metrics.json").exists()


def test_g66_a_point_that_the_config_cannot_be_is_refused_before_any(nets, tmp_path):
    config = small_grid(**{"sweep.setting": ("", "optimizer.lr=-1.0")})
    with pytest.raises(build.ConfigError, match="lr=-1.0 must be positive"):
        experiments.run(config, tmp_path / "run")
    assert nets.asked == [] and not (tmp_path / "run").exists()


def test_g66_where_all_fail_there_is_nothing_to_show(nets, tmp_path):
    nets.fails = lambda config: NonFiniteError("inf")
    error = run(small_grid(), tmp_path)
    assert str(error).startswith("4 of 4 points failed") and error.exit_code == 4
    assert len(nets.asked) == len(reasons(tmp_path)) == 4
    assert not (tmp_path / "metrics.json").exists()


def test_g66_a_mean_says_of_how_many_seeds_it_is(nets, tmp_path, capsys):
    """Ratios of seeds are apart by .1: a mean of two is no mean of three."""
    nets.fails = lambda config: diverging(config) if config.seed == 2 else None
    error = run(small_grid(**{"sweep.seeds": 3}), tmp_path)
    assert "1 of 12 points failed" in str(error)
    rows = table(tmp_path)
    assert [row["seeds"] for row in rows] == [3, 3, 2, 3]
    assert rows[0]["ratio"]["mean"] - rows[2]["ratio"]["mean"] == pytest.approx(-0.05)
    half = 12.7062 * 0.1 / np.sqrt(2) / np.sqrt(2)  # t_{.975, 1} std / sqrt(2)
    around = rows[2]["ratio"]["high"] - rows[2]["ratio"]["mean"]
    assert around == pytest.approx(half, rel=1e-5)
    printed = capsys.readouterr().out
    assert "means over 2 to 3 seeds" in printed
    (*_, line) = (x for x in printed.splitlines() if "│" in x and DIVERGES in x)
    assert line.split("│")[-2].strip() == "2"
    assert "1 point failed" in (tmp_path / "report.html").read_text()


def test_g66_what_is_there_is_shown_at_any_time(nets, tmp_path, capsys):
    """While it runs, or after a kill: before there are numbers, and with a gap."""
    report = small_grid(experiment="report")
    nets.fails = lambda config: (
        KeyboardInterrupt() if config.optimizer.lr == 0.1 else diverging(config)
    )
    with pytest.raises(KeyboardInterrupt):
        experiments.run(small_grid(), tmp_path)
    capsys.readouterr()
    for state in ("missing", "done"):
        experiments.run(report, tmp_path)
        printed = capsys.readouterr().out
        counts = "2 done, 1 failed, 1 missing", "3 done, 1 failed, 0 missing"
        assert f"factors: {counts[state == 'done']}" in printed
        (line,) = (
            x for x in printed.splitlines() if "│ setting=optimizer.lr=0.1," in x
        )
        assert line.split("│")[2].strip() == state
        assert "NonFiniteError: step 2" in printed
        assert (tmp_path / "report.html").exists() == (state == "done")
        nets.fails = diverging
        assert run(small_grid(), tmp_path) is not None
        (tmp_path / "report.html").unlink()
    # A search has no grid: what it asked for is what there is.
    config = small_grid(experiment="emm", **{"sweep.setting": ()})
    config.emm.update(low=16, high=32, budget=2)
    assert run(config, tmp_path / "emm") is None
    assert "2 done, 0 failed, 0 missing" in points.status(tmp_path / "emm").title
    assert points.status(tmp_path / "nowhere") is None


def work_of(calls, bad):
    """Work on several points; it ends on the bad ones."""

    def work(points):
        calls.append([point.values["width"] for point in points])
        for point in points:
            if point.values["width"] in bad:
                raise ZeroDivisionError(point.name)
            yield {"y": point.values["width"] ** 2}

    return work


@pytest.mark.parametrize("at_once", [False, True])
def test_g66_points_of_one_program_are_done_alone_where_one_fails(at_once, tmp_path):
    """One by one, or all before the first is known, as in one compiled program."""
    config = defaults.train()
    config.data.update(name="mixture", k=2, d=3)
    config.sweep.update(seeds=1, width=(2, 3, 4, 5, 6))
    calls: list = []
    one = work_of(calls, bad=(4, 6))
    with Session(tmp_path, config) as session:
        session.begin("0" * 64)
        work = (lambda points: list(one(points))) if at_once else one
        rows = points.run(config, session, work, alike=lambda point: None)
    assert [row["y"].item() for row in rows] == [4, 9, 25]
    alone = [[2], [3], [4], [5], [6]] if at_once else [[4], [5], [6]]
    assert calls == [[2, 3, 4, 5, 6], *alone]
    assert sorted(reasons(tmp_path)) == [
        "width=4,seed=0.failed.json", "width=6,seed=0.failed.json",
    ]  # fmt: skip


def together():
    config = gmm_width_decay.get_config("smoke")
    config.sweep.update(num_examples=(), width=(), seeds=1)
    config.sweep.weight_decay = (0.0, 1e30, 0.5)  # the second one diverges
    config.measure.likelihood = 0
    return config


@pytest.mark.slow
def test_g66_a_network_that_diverges_spoils_no_other_of_its_ensemble():
    """One compiled program: bitwise the weights that the others have without it."""
    config, states = together(), []
    for decay in (1e30, 0.1):
        config.sweep.weight_decay = (0.0, decay, 0.5)
        configs = [point.config for point in grid.points(config)]
        built = [build.build(config) for config in configs]
        states.append(ensemble.learn(configs, built)[0])
    assert [state.step.tolist() for state in states] == [[4, 1, 4], [4, 4, 4]]
    diverged, without = (jax.tree.leaves(state.params) for state in states)
    for a, b in zip(diverged, without, strict=True):
        np.testing.assert_array_equal(a[::2], b[::2])


def test_g66_of_an_ensemble_only_what_diverged_fails(tmp_path, monkeypatch):
    """By its steps, or by samples of weights that are finite and too large."""
    config, drawn = together(), np.zeros((3, 8, 4), np.float32)
    drawn[2] = np.nan
    state = SimpleNamespace(step=np.array([4, 1, 4]), params={}, ema={})
    monkeypatch.setattr(ensemble, "learn", lambda *args: (state, np.zeros(3)))
    monkeypatch.setattr(ensemble, "_samples", lambda *args: drawn)
    with Session(tmp_path, config) as session:
        first, *errors = ensemble.measure(grid.points(config), session)
    assert first["ratio"] == 0
    for error, text in zip(errors, ("3 of 4 steps", "samples are not"), strict=True):
        assert isinstance(error, NonFiniteError) and str(error).startswith(text)


# What is concluded from several points is not concluded from some of them.


def test_g66_a_smallest_width_is_that_of_all_widths():
    """The one that failed may be it."""
    config = defaults.train()
    config.sweep.update(seeds=1, num_examples=(5, 7), width=(8, 16))
    rows = [
        {k: np.asarray(v) for k, v in point.values.items()}
        | {"empirical_error": np.array([1.0]), "true_error": np.array([1.0])}
        for point in grid.points(config)
        if point.values != {"num_examples": 7, "width": 8, "seed": 0}
    ]
    left = results.whole(config, rows, lambda values: int(values["num_examples"]))
    found = capacity.smallest(left, 2.0, np.array([1.0]), [0.3])
    assert {(row["num_examples"], row["width"]) for row in found} == {(5, 8)}
    shown = capacity._widths(found, [5, 7])
    assert [list(column.cells)[1] for column in shown.columns] == ["7", "n/a", "n/a"]


def test_g66_a_frontier_that_lacks_points_is_compared_with_none():
    config = defaults.train()
    settings = defaults.prunings(("random", "small_t", "magnitude"), (0.2, 0.4))
    config.sweep.update(seeds=2, points=settings)
    lost = "prune.criterion=small_t; prune.ratio=0.4"
    rows = [
        {k: np.asarray(v) for k, v in point.values.items()}
        | {"along_frechet": np.array([1.0]), "along_ratio": np.array([0.5])}
        for point in grid.points(config)
        if (point.values["setting"], point.values["seed"]) != (lost, 1)
    ]
    left = results.whole(config, rows, lambda v: mitigate.family(str(v["setting"]))[0])
    assert [row["name"] for row in mitigate.matched(left)] == ["pruned: magnitude"]


def test_g66_a_time_is_of_all_seeds():
    names = [f"{w}_{which}" for w in onset.WEIGHTS for which in onset.TIMES]
    rows = [
        {"num_examples": np.array(n), "seed": np.array(seed)}
        | dict.fromkeys(names, float(n))
        for n, seed in [(10, 0), (10, 1), (20, 1), (40, 0), (40, 1)]
    ]
    for found in onset.onsets(rows):
        np.testing.assert_array_equal(found["reached"], [2, 1, 2])
        np.testing.assert_allclose(found["mean"], [10, np.nan, 40])
        assert found["fit"]["sizes"] == [10, 40]


def test_g66_a_search_ends_where_a_network_failed_and_others_go_on(
    nets, tmp_path, capsys
):
    """Of the settings, one has no whole size, and one has no network at all."""
    settings = ("", "optimizer.lr=0.01", DIVERGES)
    axes = {"sweep.setting": settings, "sweep.seeds": 2}
    config = small_grid(experiment="emm", **axes)
    config.emm.update(low=16, high=32, budget=4)
    nets.fails = lambda config: (
        diverging(config)
        or (NonFiniteError("inf") if (config.optimizer.lr, config.seed) == (0.01, 1)
            else None)
    )  # fmt: skip
    error = run(config, tmp_path)
    assert "3 of 8 points failed" in str(error) and error.exit_code == 4
    first, second, third = record.read_json(tmp_path / "metrics.json")["emm"]
    assert len(first["sizes"]) == 2 and first["ended"] == "emm.budget=4 networks"
    assert second["sizes"] == third["sizes"] == []
    assert second["ended"] == "1 failed networks of n = 16"
    assert third["ended"] == "2 failed networks of n = 16"
    assert third["ratio"]["beyond"] == "not known"
    assert f"EMM ({DIVERGES}): not known" in capsys.readouterr().out
    assert [row["seeds"] for row in table(tmp_path)] == [2, 2, 1, 0]


# The same with real processes.

REAL = (
    "--config=configs/mlp_mixture.py:smoke",
    "--config.experiment=factors",
    "--config.data.d=2",
    "--config.data.k=2",
    "--config.sweep.seeds=1",
    f"--config.sweep.points={tuple(map(grid.fields_of, SETTINGS))}",
)


@pytest.mark.slow
def test_g66_a_killed_sweep_goes_on_and_only_what_diverges_fails(
    tmp_path,
):
    """SIGKILL when the first two of four networks are done."""
    workdir = tmp_path / "run"

    def done():
        return list(workdir.glob("points/*/[!.]*.npz"))

    with harness.spawn(*REAL, workdir=workdir) as child:
        harness.wait_for(child, lambda: len(done()) >= 2, "two points")
        harness.kill(child)
        assert harness.finish(child).code == -signal.SIGKILL
    for left in (2, 1):
        kept = {path: path.stat().st_mtime_ns for path in done()}
        shown = harness.run(*REAL, "--config.experiment=report", workdir=workdir)
        assert shown.code == 0, shown.output
        assert f"factors: {len(kept)} done, " in shown.stdout
        result = harness.run(*REAL, workdir=workdir)
        assert result.code == 4, result.output
        assert "1 of 4 points failed, the others are finished" in result.stderr
        assert f"{NAME}: NonFiniteError: step" in result.stderr
        assert "Traceback" not in result.stderr
        assert "n/a" in result.stdout and "means over 1 seeds" in result.stdout
        assert result.stdout.count("compiling the train step") <= left
        assert len(done()) == 3 and reasons(workdir) == [f"{NAME}.failed.json"]
        assert kept.items() <= {p: p.stat().st_mtime_ns for p in done()}.items()


@pytest.mark.slow
def test_g66_two_processes_share_a_sweep_and_one_is_killed(tmp_path):
    """Each does points that the other has not; what the killed one had is taken over.

    The first one had the workdir: the second draws the report in its place.
    """
    workdir, alone = tmp_path / "run", tmp_path / "alone"

    def taken():
        return list(workdir.glob("points/*/*.claim"))

    def done():
        return list(workdir.glob("points/*/[!.]*.npz"))

    def both_at_work():
        # A claim stays where its process is killed between the point and its release.
        return len([p for p in taken() if not p.with_suffix(".npz").exists()]) == 2

    with harness.spawn(*REAL, workdir=workdir, patch=harness.SLOW_STEPS) as first:
        harness.wait_for(first, taken, "a point that the first one has")
        with harness.spawn(*REAL, workdir=workdir, patch=harness.SLOW_STEPS) as second:
            harness.wait_for(second, lambda: len(taken()) == 2, "two points at once")
            harness.wait_for(second, done, "a point")
            harness.wait_for(second, both_at_work, "two points at once again")
            harness.kill(first)
            result = harness.finish(second)
    assert "this one joins it" in result.stdout
    assert result.code == 4, result.output  # one of them diverges
    assert "1 of 4 points failed, the others are finished" in result.stderr
    assert len(done()) == 3 and not taken()
    assert harness.run(*REAL, workdir=alone).code == 4
    both = (record.read_json(place / "metrics.json") for place in (workdir, alone))
    for a, b in zip(*(metrics["table"] for metrics in both), strict=True):
        assert a == b
    assert (workdir / "report.html").exists()


# H79: two points never share a file.

ALIKE = ("data.path=a/b", "data.path=a_b", "data.path=" + "a" * 200, "model.width=8")


def widths(points):
    return [{"y": np.float64(len(point.values["setting"]))} for point in points]


def swept(config, workdir, work=widths):
    with Session(workdir, config) as session:
        session.begin("0" * 64)
        return points.run(config, session, work)


def test_h79_two_points_whose_names_were_one_are_kept_apart(tmp_path):
    config = small_grid(
        **{"sweep.setting": (*ALIKE, ALIKE[2] + "b"), "experiment": "factors"}
    )
    names = [point.name for point in grid.points(config)]
    assert len(set(names)) == 5 and max(map(len, names)) <= grid.LONG_NAME + 9
    assert names[1] == "setting=data.path=a_b,seed=0"  # as it was
    assert names[3] == "setting=model.width=8,seed=0"
    assert names[0].startswith("setting=data.path=a_b,seed=0-")
    found = swept(config, tmp_path)
    assert [float(row["y"]) for row in found] == [len(s) for s in (*ALIKE, "a" * 211)]
    again = swept(config, tmp_path, work=None)  # all of them are read
    assert [float(row["y"]) for row in again] == [float(row["y"]) for row in found]


def test_h79_a_point_that_has_a_former_name_is_not_done_again(tmp_path):
    slash, plain, long, _ = ALIKE
    former = small_grid(**{"sweep.setting": (plain,)})
    swept(former, tmp_path)
    (kept,) = tmp_path.rglob("points/*/*.npz")
    values = {name: a for name, a in record.read_npz(kept).items()}
    name = f"setting={long},seed=0.npz"
    record.write_npz(kept.with_name(name), **values | {"setting": long, "y": 7.0})
    # The file of another point, under the name that both had once, is not taken.
    found = swept(small_grid(**{"sweep.setting": (slash, plain, long)}), tmp_path)
    assert [float(row["y"]) for row in found] == [13.0, 13.0, 7.0]
    record.write_npz(kept, **values | {"setting": slash, "y": 8.0})
    done = {path.name for path in kept.parent.glob("*.npz")}
    (hashed,) = done - {kept.name, name}
    (kept.parent / hashed).unlink()
    (row,) = swept(small_grid(**{"sweep.setting": (slash,)}), tmp_path, work=None)
    assert row["y"] == 8.0
    assert "3 done" not in str(points.status(tmp_path).title)
    assert points.status(tmp_path).title == "factors: 1 done, 0 failed, 0 missing"


def test_h79_points_of_a_launched_sweep_never_share_a_workdir(tmp_path):
    file, workdir = tmp_path / "sweep.py", tmp_path / "out"
    given = [
        {"data.path": "a/b"},
        {"data.path": "a_b"},
        {"data.path": "a,seed=1"},
        {"data.path": "a", "seed": 1},
        {"data.path": "a" * 200},
        {"data.path": "a" * 201},
    ]
    file.write_text(
        f'CONFIG = "{harness.ROOT}/configs/mlp_mixture.py:smoke"\n'
        f"def points():\n    yield from {given!r}\n"
    )
    points = sweep_file.read(file)
    places = [runs.place(workdir, point) for point in points]
    assert len(set(places)) == len(given)
    assert [places[i].name for i in (1, 3)] == ["data.path=a_b", "data.path=a,seed=1"]
    # A run that has the former name goes on there, and no other point does.
    former = workdir / "points" / "data.path=a_b"
    record.write_json(former / "config.json", build.to_json(points[0].config))
    assert runs.place(workdir, points[0]) == former
    record.write_json(former / "config.json", build.to_json(points[1].config))
    assert runs.place(workdir, points[0]) == places[0]
