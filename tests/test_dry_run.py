"""The estimate before a run against counts by hand."""

import jax
import pytest

from configs import digits, gmm_size
from memsep_jax import defaults
from memsep_jax.experiments import dry_run, setup, sweep, train


@pytest.fixture
def config():
    return digits.get_config("smoke")


def cells(table):
    names, values = (list(column.cells) for column in table.columns)
    return dict(zip(names, values, strict=True))


def test_it_counts_what_a_run_would_hold(config, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    found = cells(dry_run.dry_run(config, lambda line: None))
    params = setup.init_params(setup.build(config), jax.random.key(0))
    count = setup.count(params)
    assert found["parameters"] == f"{count:,}"
    # params, EMA and Adam's two moments in float32, and a few scalars.
    assert found["state (params, EMA, optimizer)"] == f"{4 * 4 * count / 2**20:.1f} MiB"
    assert list(tmp_path.iterdir()) == []


def test_flops_grow_with_the_batch_and_are_those_of_the_products(config):
    small = float(cells(dry_run.dry_run(config, print))["FLOPs per step"])
    config.train.batch_size *= 4
    large = float(cells(dry_run.dry_run(config, print))["FLOPs per step"])
    assert 3 < large / small < 5


def test_it_compiles_nothing(config, monkeypatch):
    def refuse(*args):
        raise AssertionError("compiled")

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    monkeypatch.setattr(train, "learn", refuse)
    dry_run.dry_run(config, lambda line: None)


def test_of_a_sweep_it_counts_the_points_and_the_last_network():
    sweeping = gmm_size.get_config("smoke")
    found = cells(dry_run.dry_run(sweeping, lambda line: None))
    assert found["points of the sweep"] == "8"  # two n, two widths, two seeds
    assert found["the last one"] == "num_examples=16,width=8,seed=1"
    widest = setup.build(sweep.points(sweeping)[-1].config)
    params = setup.init_params(widest, jax.random.key(0))
    assert found["parameters"] == f"{setup.count(params):,}"


def test_what_trains_nothing_takes_nothing():
    with pytest.raises(setup.ConfigError, match="experiment=audit trains nothing"):
        dry_run.dry_run(defaults.audit(), print)
