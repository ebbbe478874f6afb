"""Points of a grid: each once, each kept, and their seeds as one."""

import hashlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
from ml_collections.config_flags import tuple_parser

from memsep_jax import defaults, memorization
from memsep_jax.checkpoint import ConflictError
from memsep_jax.experiments import record
from memsep_jax.experiments.config import build, grid
from memsep_jax.experiments.runtime import locks, points, signals
from memsep_jax.experiments.runtime.session import Session
from memsep_jax.experiments.studies import results


def small_grid(**axes):
    config = defaults.train()
    config.data.update(name="mixture", k=2, d=3, size=200)
    config.sweep.update(seeds=2, **axes)
    return config


def square(points):
    return [
        {"y": point.values["width"] ** 2, "curve": np.arange(3.0)} for point in points
    ]


def run(config, workdir, work, **options):
    with Session(workdir, config) as session:
        session.begin("0" * 64)
        return points.run(config, session, work, **options)


def test_a_point_is_a_value_of_every_axis_and_a_seed_that_moves_all():
    config = small_grid(num_examples=(10, 20), width=(4, 8), weight_decay=(0.0, 0.1))
    config.update(seed=5)
    config.data.update(seed=7, truth_seed=9)
    points = grid.points(config)
    assert len({point.name for point in points}) == len(points) == 2 * 2 * 2 * 2
    last = points[-1]
    assert last.name == "num_examples=20,width=8,weight_decay=0.1,seed=1"
    assert last.config.data.num_examples == 20 and last.config.model.width == 8
    assert last.config.optimizer.weight_decay == 0.1
    assert (last.config.seed, last.config.data.seed) == (6, 8)
    assert last.config.data.truth_seed == 10
    assert config.seed == 5 and config.data.num_examples is None  # its own is untouched


def test_finished_points_are_read_and_not_done_again(tmp_path):
    config, done = small_grid(width=(4, 8)), []

    def work(points):
        for point in points:
            done.append(point.name)
            if len(done) == 3:
                raise KeyboardInterrupt
            yield from square([point])

    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path, work)
    rows = run(config, tmp_path, work)
    assert done == [
        "width=4,seed=0", "width=4,seed=1", "width=8,seed=0",
        "width=8,seed=0", "width=8,seed=1",
    ]  # fmt: skip
    assert [row["y"].item() for row in rows] == [16, 16, 64, 64]
    assert [row["seed"].item() for row in rows] == [0, 1, 0, 1]
    config.sweep.width = (2, 4, 8)  # a longer axis asks for the new points only
    assert [r["y"].item() for r in run(config, tmp_path, work)] == [
        4,
        4,
        16,
        16,
        64,
        64,
    ]
    assert done[5:] == ["width=2,seed=0", "width=2,seed=1"]


def test_points_of_another_config_are_not_taken_for_these(tmp_path):
    config, calls = small_grid(width=(4,)), []

    def work(points):
        calls.append(len(points))
        return square(points)

    run(config, tmp_path, work)
    config.sampler.steps += 1  # what is measured changed
    run(config, tmp_path, work)
    config.run.log_every += 1  # what is logged changed
    run(config, tmp_path, work)
    assert calls == [1, 1, 1, 1]


def test_points_that_are_alike_are_worked_on_together(tmp_path):
    config, sizes = small_grid(width=(4, 8), weight_decay=(0.0, 0.1, 0.2)), []
    config.sweep.together = 4

    def work(points):
        assert len({point.values["width"] for point in points}) == 1
        sizes.append(len(points))
        return square(points)

    run(config, tmp_path, work, alike=lambda point: point.values["width"])
    assert sizes == [4, 2, 4, 2]


def test_networks_of_two_settings_are_not_trained_as_one():
    """A setting may change anything, and an ensemble has the config of its first."""
    config = small_grid(weight_decay=(0.0, 0.1), points=({}, {"optimizer.lr": 0.5}))
    shapes = {p.values["setting"]: set() for p in grid.points(config)}
    for point in grid.points(config):
        shapes[point.values["setting"]].add(grid.shape(point))
    (plain,), (changed,) = shapes.values()
    assert plain != changed


DICTS = (
    {},
    {"model.dropout": 0.2},
    {"train.steps": 7, "data.classes": (0, 1)},
    {"data.labels": "true", "data.deduplicate": True},
)
TEXTS = (
    "",
    "model.dropout=0.2",
    "train.steps=7; data.classes=(0, 1)",
    "data.labels=true; data.deduplicate=True",
)


def test_points_as_dicts_have_the_files_that_strings_had(tmp_path):
    ours, former = small_grid(points=DICTS), small_grid(setting=TEXTS)
    assert grid.outdated(ours) is None
    assert "sweep.points=({}, {'model.dropout': 0.2})" in grid.outdated(former)
    for a, b in zip(grid.points(ours), grid.points(former), strict=True):
        assert a.values == b.values
        assert points.path_of(tmp_path, ours, a) == points.path_of(tmp_path, former, b)
        changes = build.differences(build.to_json(a.config), build.to_json(b.config))
        assert {name for name, _, _ in changes} == {"sweep.points", "sweep.setting"}


def test_points_come_back_from_a_command_and_from_json(tmp_path):
    config = small_grid(points=tuple_parser.TupleParser().parse(str(DICTS)))
    assert config.sweep.points == DICTS
    with Session(tmp_path, config) as session:
        session.begin("0" * 64)
    again = defaults.restored(record.read_json(tmp_path / "config.json"))
    for a, b in zip(grid.points(config), grid.points(again), strict=True):
        assert a.name == b.name and a.config.data == b.config.data


def test_strings_take_the_place_of_the_points_of_a_file():
    """A command of an earlier version gives them beside those of its config file."""
    config = small_grid(points=DICTS, setting=TEXTS[:2])
    config.sweep.seeds = 1
    assert [point.values["setting"] for point in grid.points(config)] == [*TEXTS[:2]]


@pytest.mark.parametrize("bad", [("a.b=1",), ({1: 2},), (1,)])
def test_points_that_are_no_dicts_of_fields_are_refused(bad):
    with pytest.raises(build.ConfigError, match="sweep.points=.* must be of the form"):
        build.build(small_grid(points=bad))


@pytest.mark.parametrize(
    "bad, words",
    [
        ({"optimizer.lr": "a"}, "optimizer.lr='a' must be a number"),
        ({"optimiser.lr": 1.0}, "not a field .*, did you mean 'optimizer.lr'"),
    ],
)
def test_a_point_that_no_config_can_be_says_what_can(bad, words):
    with pytest.raises(build.ConfigError, match=f"sweep.points={{.*{words}"):
        grid.points(small_grid(points=({}, bad)))


def test_a_study_that_was_done_with_strings_goes_on_with_dicts(tmp_path):
    """However the numbers were written, and in names that were cut."""
    long = "optimizer.lr=1e-5; data.path=" + "a" * 200
    texts = ("", "optimizer.lr=1e20", long)
    width = [{"y": 1.0}]
    run(small_grid(setting=texts, width=(4,)), tmp_path, lambda some: width * len(some))
    kept = set(tmp_path.rglob("*.npz"))
    dicts = {}, {"optimizer.lr": 1e20}, {"optimizer.lr": 1e-5, "data.path": "a" * 200}
    config = small_grid(points=dicts, width=(4,))
    rows = run(config, tmp_path, None)
    assert len(rows) == len(kept) == 6 and set(tmp_path.rglob("*.npz")) == kept
    assert str(rows[2]["setting"]) == "optimizer.lr=1e+20"
    assert points.status(tmp_path).title.endswith("6 done, 0 failed, 0 missing")
    other = small_grid(points=({"optimizer.lr": 1e19},), width=(4,))
    with pytest.raises(points.FailedError):  # there is work to do, and nobody to do it
        run(other, tmp_path, None)


LATER = ("measure", "features"), ("measure", "weights")  # fields of this version
EARLIER = ("data", "alpha"), ("data", "crop"), ("data", "exif")  # of the one before


@pytest.mark.parametrize("unknown", [LATER, (*LATER, *EARLIER)])
def test_points_in_the_folder_of_an_earlier_version_are_kept(unknown, tmp_path):
    config = small_grid(width=(4,))
    run(config, tmp_path, lambda some: [{"y": 1.0}] * len(some))
    (folder,) = (tmp_path / "points").iterdir()
    known = build.to_json(config)
    for group in ("sweep", "emm", "run"):
        del known[group]
    for group, field in unknown:
        del known[group][field]
    text = json.dumps(known, sort_keys=True)
    tag = hashlib.sha256(text.encode()).hexdigest()[:12]
    folder.rename(folder.with_name(tag))
    assert [row["y"] for row in run(config, tmp_path, None)] == [1.0] * 2
    assert len(list((tmp_path / "points").iterdir())) == 1


# Several processes.


def others_of(config, workdir, *names):
    """The claims of some points, held as another process would."""
    held = {}
    for point in grid.points(config):
        if point.name in names:
            path = points.path_of(workdir, config, point)
            path.parent.mkdir(parents=True, exist_ok=True)
            held[point.name] = path, locks.take(points.claim(path))
    return held


@pytest.mark.parametrize("ends", ["done", "failed", "killed"])
def test_what_another_process_has_is_waited_for_or_taken_over(
    ends, tmp_path, monkeypatch
):
    monkeypatch.setattr(locks, "POLL", 0.0)
    config, worked = small_grid(width=(4, 8)), []
    ((path, handle),) = others_of(config, tmp_path, "width=4,seed=0").values()
    assert points.status(tmp_path) is None  # without a config, nobody knows the points

    def work(some):
        worked.append(some[0].name)
        if len(worked) == 3:
            if ends == "done":
                record.write_npz(path, width=4, seed=0, y=7.0)
            elif ends == "failed":
                record.write_json(points.why(path), points.explained(ValueError("no")))
            locks.release(handle)  # the kernel does so too where a process is killed
        return square(some)

    rows = run(config, tmp_path, work)
    assert worked[:3] == ["width=4,seed=1", "width=8,seed=0", "width=8,seed=1"]
    assert worked[3:] == (["width=4,seed=0"] if ends == "killed" else [])
    first = {"done": [7], "failed": [], "killed": [16]}[ends]
    assert [row["y"].item() for row in rows] == [*first, 16, 64, 64]


def test_a_point_that_somebody_has_is_said_to_be_running(tmp_path):
    config = small_grid(width=(4, 8))
    config.experiment = "factors"
    run(config, tmp_path, square)
    config.sweep.width = (4, 8, 16)
    others_of(config, tmp_path, "width=16,seed=0")
    record.write_json(tmp_path / "config.json", build.to_json(config))
    title = points.status(tmp_path).title
    assert title == "factors: 4 done, 0 failed, 1 missing, 1 running"
    # 10 minutes for 4 of 6 points.
    record.write_json(tmp_path / "run.json", {"seconds": {"data": 100, "train": 500}})
    assert points.status(tmp_path).title == f"{title}, about 5 minutes left"


@pytest.mark.parametrize(
    "seconds, done, others, workers, text",
    [
        (600.0, 4, 2, 1, ", about 5 minutes left"),
        (600.0, 4, 2, 2, ", about 2 minutes left"),
        (600.0, 4, 2, 0, ", about 5 minutes left"),
        (36_000.0, 4, 2, 1, ", about 5 hours left"),
        (6.0, 4, 2, 1, ", about 1 minute left"),
        (600.0, 4, 0, 1, ""),
        (600.0, 0, 4, 1, ""),
        (0, 4, 2, 1, ""),
    ],
)
def test_the_time_left_is_that_of_points_like_those_done(
    seconds, done, others, workers, text
):
    assert points.left(seconds, done, others, workers) == text


def test_a_second_process_joins_a_sweep_and_leads_after_the_first(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(locks, "POLL", 0.0)
    config = small_grid(width=(4,))
    monkeypatch.setattr(signals.Signals, "listen", lambda self: None)
    first = Session(tmp_path, config, shared=True).__enter__()
    first.begin("0" * 64)
    first.status["seconds"]["train"] = 2.0
    with Session(tmp_path, config, shared=True) as second:
        assert "this one joins it" in capsys.readouterr().out
        second.begin("0" * 64)
        second.status["seconds"]["train"] = 1.0
        before = (tmp_path / "run.json").read_bytes()
        second.write_status()  # is not its own to write
        assert (tmp_path / "run.json").read_bytes() == before
        other = config.copy_and_resolve_references()
        other.sweep.width = (8,)
        for args in ((other, False, True), (config,)):
            refused = Session(tmp_path, *args)
            with pytest.raises(ConflictError, match="in use by process"), refused:
                pass
        first.__exit__(None, None, None)
        second.lead()
        assert record.read_json(tmp_path / "run.json")["seconds"] == {"train": 3.0}


def test_the_interval_is_students():
    """1, 2, 3: mean 2, standard error 1/sqrt(3), t_{.975, 2} = 4.3027."""
    found = results.mean_interval(np.array([1.0, 2.0, 3.0]))
    assert found.mean == 2
    np.testing.assert_allclose(found.high - 2, 4.302653 / np.sqrt(3), rtol=1e-6)
    np.testing.assert_allclose(2 - found.low, 4.302653 / np.sqrt(3), rtol=1e-6)
    alone = results.mean_interval(np.array([1.0]))
    assert alone.mean == 1 and np.isnan(alone.low)  # one seed knows no error


def test_the_interval_of_a_share_is_at_least_wilsons():
    """Also where all seeds agree, and it ends at 0 and 1; a wider one stays."""
    cases = [(0.035, 0.035, 0.035), (0.0, 0.0, 0.0), (1.0, 1.0, 0.98)]
    found = results.mean_interval(np.array(cases).T, trials=3 * 200)
    for i, count in enumerate((21, 0, 596)):
        low, high = memorization.wilson(count, 600)
        assert found.low[i] <= low and found.high[i] >= high
    assert (found.low[0], found.high[0]) == memorization.wilson(21, 600)
    assert found.low[1] == 0 and found.high[2] == 1
    apart = np.array([0.2, 0.5, 0.8])
    assert results.mean_interval(apart, trials=600).low == max(
        results.mean_interval(apart).low, 0
    )


def test_a_row_says_of_how_many_samples_a_share_is():
    """null_of may be 0, where nothing is known; a share of nan stays unknown."""
    counts = {"ratio_of": np.array(200), "null_of": np.array(0)}
    rows = [
        {"seed": np.array(s), "ratio": np.array(0.0), "null": np.array(np.nan)} | counts
        for s in (0, 1)
    ]
    (row,) = results.over_seeds(rows)
    assert row["ratio"]["high"] == memorization.wilson(0, 400)[1]
    assert np.isnan(row["null"]["high"]) and set(row) == {"seeds", "ratio", "null"}


def test_a_curve_of_shares_is_of_as_many_samples_at_each_place():
    rows = [
        {"seed": np.array(s), "along_ratio": np.array([0.0, 0.5, 1.0]),
         "along_ratio_of": np.array(200)}
        for s in (0, 1, 2)
    ]  # fmt: skip
    (row,) = results.over_seeds(rows)
    for i, count in enumerate((0, 300, 600)):
        low, high = memorization.wilson(count, 600)
        assert row["along_ratio"]["low"][i] == low
        assert row["along_ratio"]["high"][i] == high


def test_seeds_become_means_of_numbers_and_of_curves():
    rows = [
        {"width": np.array(4), "seed": np.array(s), "y": np.array(1.0 + s),
         "curve": np.array([s, 2.0]), "samples": np.zeros((5, 2))}
        for s in (0, 2)
    ]  # fmt: skip
    (row,) = results.over_seeds(rows)
    assert row["width"] == 4 and row["seeds"] == 2
    assert row["y"]["mean"] == 2
    np.testing.assert_array_equal(row["curve"]["mean"], [1, 2])
    assert "samples" not in row and "seed" not in row


def test_points_without_a_seed_that_finished_are_a_row_of_their_own():
    """In its place, with its values and no number."""
    rows = [{"width": np.array(8), "seed": np.array(1), "y": np.array(3.0)}]
    gap, row = results.over_seeds(rows, grid.points(small_grid(width=(4, 8))))
    assert gap == {"width": 4, "seeds": 0}
    assert row["seeds"] == 1 and row["y"]["mean"] == 3


def test_the_end_of_a_sweep_is_numbers_and_a_report(tmp_path):
    config = small_grid(width=(4, 8))

    def draw(metrics, points):
        assert len(points) == 4 and metrics["unit"] == "nats"
        return iter(())

    with Session(tmp_path, config) as session:
        session.begin("0" * 64)
        session.console = SimpleNamespace(
            print=lambda *a, **k: None, is_terminal=False, is_jupyter=False
        )
        results.finish(
            config, session, points.run(config, session, square), draw, unit="nats"
        )
    metrics = record.read_json(tmp_path / "metrics.json")
    assert [row["width"] for row in metrics["table"]] == [4, 8]
    assert [row["y"]["mean"] for row in metrics["table"]] == [16, 64]
    lines = (tmp_path / "points.csv").read_text().splitlines()
    assert lines[0] == "width,seed,y" and len(lines) == 5
    assert "<table" in (tmp_path / "report.html").read_text()
    assert all((tmp_path / name).exists() for name in metrics["points"])
    json.dumps(metrics, allow_nan=False)


@pytest.mark.parametrize(
    "field, value, message",
    [("seeds", 0, "sweep.seeds=0"), ("together", 0, "sweep.together=0")],
)
def test_a_sweep_that_has_no_meaning_is_refused(field, value, message):
    config = small_grid()
    config.sweep[field] = value
    with pytest.raises(build.ConfigError, match=message):
        build.build(config)
