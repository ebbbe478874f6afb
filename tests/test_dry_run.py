"""The estimate before a run against counts by hand, and a clock."""

import jax
import pytest

from configs import digits, emm_digits, gmm_size
from memsep_jax import defaults
from memsep_jax.experiments import record, training
from memsep_jax.experiments.config import build, grid
from memsep_jax.experiments.studies import dry_run, stepper


@pytest.fixture
def config():
    return digits.get_config("smoke")


def cells(table):
    names, values = (list(column.cells) for column in table.columns)
    return dict(zip(names, values, strict=True))


@pytest.fixture
def counted(monkeypatch):
    """config -> the cells of its dry run, of which no step is compiled and timed."""

    def count(config):
        with monkeypatch.context() as patch:
            patch.setattr(dry_run, "_hours", lambda *args: "not asked")
            return cells(dry_run.dry_run(config, lambda line: None))

    return count


def test_it_counts_what_a_run_would_hold(config, counted):
    found = counted(config)
    params = training.init_params(build.build(config), jax.random.key(0))
    count = training.count(params)
    assert found["parameters"] == f"{count:,}"
    # params, EMA and Adam's two moments in float32, and a few scalars.
    assert found["state (params, EMA, optimizer)"] == f"{4 * 4 * count / 2**20:.1f} MiB"


def test_flops_grow_with_the_batch_and_are_those_of_the_products(config, counted):
    small = float(counted(config)["FLOPs per step"])
    config.train.batch_size *= 4
    large = float(counted(config)["FLOPs per step"])
    assert 3 < large / small < 5


class Clock:
    """A second has passed whenever it is asked."""

    def __init__(self, seconds):
        self.now, self.seconds = 0.0, seconds

    def monotonic(self):
        self.now += self.seconds
        return self.now


@pytest.mark.parametrize("seconds", [0.5, 600.0])
def test_hours_are_those_of_the_steps_that_are_taken_here(
    seconds, config, monkeypatch, tmp_path
):
    """Every step takes so long by this clock; 600 s: one is enough."""
    taken, compiled = [], stepper.compiled

    def counted(*args):
        state, take, most = compiled(*args)

        def counting(state, step, count):
            taken.append(count)
            return take(state, step, count)

        return state, counting, most

    monkeypatch.setattr(stepper, "compiled", counted)
    monkeypatch.setattr(dry_run, "time", Clock(seconds))
    monkeypatch.chdir(tmp_path)
    found = cells(dry_run.dry_run(config, lambda line: None))
    (told,) = (text for name, text in found.items() if name.startswith("hours"))
    hours, step = float(told.split(",")[0]), float(told.split()[2])
    assert step == seconds
    assert hours == pytest.approx(seconds * config.train.steps / 3_600, rel=1e-2)
    # Two seconds of steps, besides the first one where that is short.
    assert taken == [1] * (1 if seconds > 2 else 1 + round(2 / seconds))
    assert list(tmp_path.iterdir()) == []


def test_a_step_that_would_take_minutes_is_measured_on_fewer_examples(
    config, counted, monkeypatch
):
    flops = float(counted(config)["FLOPs per step"])
    size = config.train.batch_size  # of 8, on 4 devices: by 4 at a time
    monkeypatch.setitem(record.LEAST, "cpu", 0.7 * flops / jax.device_count())
    monkeypatch.setattr(dry_run, "time", Clock(1.0))
    found = cells(dry_run.dry_run(config, lambda line: None))
    (told,) = (text for name, text in found.items() if name.startswith("hours"))
    assert f"at 1 s for a step of {size // 2} instead of {size} examples" in told
    hours = 2 * config.train.steps / 3_600  # twice the examples take twice as long
    assert float(told.split(",")[0]) == pytest.approx(hours, rel=1e-2)


def test_what_does_not_fit_is_not_tried(config, monkeypatch):
    monkeypatch.setattr(record, "available", lambda: (1_000, ""))
    monkeypatch.setattr(stepper, "compiled", None)
    found = cells(dry_run.dry_run(config, lambda line: None))
    (told,) = (text for name, text in found.items() if name.startswith("hours"))
    assert told.startswith("not measured: a step takes ")


def test_of_a_search_it_counts_the_largest_network(counted):
    searching = emm_digits.get_config("smoke")
    found = counted(searching)
    assert f"num_examples={searching.emm.high}" in found["the last one"]
    assert "points of the sweep at each size" in found


def test_of_a_sweep_it_counts_the_points_and_the_last_network(counted):
    sweeping = gmm_size.get_config("smoke")
    found = counted(sweeping)
    assert found["points of the sweep"] == "8"  # two n, two widths, two seeds
    assert found["the last one"] == "num_examples=16,width=8,seed=1"
    widest = build.build(grid.points(sweeping)[-1].config)
    params = training.init_params(widest, jax.random.key(0))
    assert found["parameters"] == f"{training.count(params):,}"


def test_what_trains_nothing_takes_nothing():
    with pytest.raises(build.ConfigError, match="experiment=audit trains nothing"):
        dry_run.dry_run(defaults.audit(), print)
