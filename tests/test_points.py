"""Points of a grid: each once, each kept, and their seeds as one."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from memsep_jax import defaults
from memsep_jax.experiments.config import build, grid
from memsep_jax.experiments.runtime import points, record
from memsep_jax.experiments.runtime.session import Session
from memsep_jax.experiments.studies import results


def small_grid(**axes):
    config = defaults.train()
    config.data.update(name="mixture", k=2, d=3)
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


def test_a_point_is_a_value_of_every_axis_and_a_seed():
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
    config = small_grid(weight_decay=(0.0, 0.1), setting=("", "optimizer.lr=0.5"))
    shapes = {p.values["setting"]: set() for p in grid.points(config)}
    for point in grid.points(config):
        shapes[point.values["setting"]].add(grid.shape(point))
    (plain,), (changed,) = shapes.values()
    assert plain != changed


def test_the_interval_is_students():
    """1, 2, 3: mean 2, standard error 1/sqrt(3), t_{.975, 2} = 4.3027."""
    found = results.mean_interval(np.array([1.0, 2.0, 3.0]))
    assert found["mean"] == 2
    np.testing.assert_allclose(found["high"] - 2, 4.302653 / np.sqrt(3), rtol=1e-6)
    np.testing.assert_allclose(2 - found["low"], 4.302653 / np.sqrt(3), rtol=1e-6)
    alone = results.mean_interval(np.array([1.0]))
    assert alone["mean"] == 1 and np.isnan(alone["low"])  # one seed knows no error


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
        session.console = SimpleNamespace(print=lambda *a, **k: None, is_terminal=False)
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
