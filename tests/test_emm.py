"""The search for effective model memorization, on networks that are known numbers."""

import csv

import numpy as np
import pytest

from memsep_jax import defaults, experiments
from memsep_jax.experiments import record
from memsep_jax.experiments.config import build, grid
from memsep_jax.experiments.studies import emm, networks

SAMPLES = 400


def config(**changes):
    config = defaults.smoke(defaults.copying())
    config.experiment = "emm"
    config.train.steps = 2
    config.sampler.num_samples = SAMPLES
    config.emm.update(low=16, high=32, tolerance=0.05, budget=None)
    config.sweep.update(seeds=3, points=())
    config.update_from_flattened_dict(changes)
    return config


def share(n, half=200, slope=3.0):
    """R(n) of a network that copies half of what it draws at n = half."""
    return 1 / (1 + (n / half) ** slope)


@pytest.fixture
def trained(monkeypatch):
    """Networks with R(n) = share(n), up to noise; the list of what was asked."""
    asked = []

    def measured(config, session):
        n = config.data.num_examples
        asked.append((n, config.seed))
        rng = np.random.default_rng([n, config.seed])
        ratio = rng.binomial(SAMPLES, share(n)) / SAMPLES
        return {
            "ratio": ratio, "raw": ratio, "ema": ratio / 2, "highest": 1.0,
            "null": 0.0, "emitted": ratio, "frechet": 1.0,
        }  # fmt: skip

    monkeypatch.setattr(networks, "measured", measured)
    return asked


def test_the_emm_of_a_known_curve_is_found_in_its_interval(trained, tmp_path):
    experiments.run(config(), tmp_path)
    metrics = record.read_json(tmp_path / "metrics.json")
    (found,) = metrics["emm"]
    truth = 200 * (1 / 0.9 - 1) ** (1 / 3)  # share(n) = .9: n = 96.2
    assert found["ratio"]["low"] <= truth <= found["ratio"]["high"]
    assert abs(np.log(found["ratio"]["value"] / truth)) < 0.1
    assert found["raw"] == found["ratio"]
    # Half of everything is never .9, and 1 always is.
    assert found["ema"]["beyond"] == f"below {min(found['sizes'])}"
    assert found["highest"]["beyond"] == f"at least {max(found['sizes']):,}"
    assert [row["num_examples"] for row in metrics["table"]] == sorted(found["sizes"])
    with open(tmp_path / "points.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 3 * len(found["sizes"])
    assert len(trained) == len(set(trained)) == 3 * len(found["sizes"])
    assert (tmp_path / "figures" / "emm.png").is_file()
    assert "EMM: " in (tmp_path / "report.html").read_text()


def test_an_emm_is_of_the_falling_curve_through_what_was_measured():
    """.8, .92 and .5 fall from .86 on, and never were at .9; .9, .92 and .5 were."""

    def found(*ratios):
        names = ("ratio", "raw", "ema", "highest")
        rows = {8 << i: [dict.fromkeys(names, r)] * 3 for i, r in enumerate(ratios)}
        return emm.result(emm.choices(config())[0], rows)["ratio"]

    assert found(0.8, 0.92, 0.5)["beyond"] == "below 8"
    assert found(0.5, 0.92, 0.95)["beyond"] == "below 8"  # .79, .79, .79
    assert found(0.93, 0.95, 0.92)["beyond"] == "at least 32"
    assert 16 <= found(0.9, 0.92, 0.5)["value"] < 18
    assert emm.shown(found(0.9, 0.92, 0.5)).startswith("16 [")


def test_another_eps_asks_finished_networks_nothing(trained, tmp_path, undrawn):
    experiments.run(config(), tmp_path)
    before = len(trained)
    experiments.run(config(**{"emm.budget": 60}), tmp_path)
    assert len(trained) == before
    experiments.run(config(**{"emm.eps": 0.5}), tmp_path)
    assert len(set(trained)) == len(trained) > before
    (found,) = record.read_json(tmp_path / "metrics.json")["emm"]
    assert found["ratio"]["low"] <= 200 <= found["ratio"]["high"]


def test_a_budget_ends_the_search(trained, tmp_path, undrawn):
    experiments.run(config(**{"emm.budget": 8}), tmp_path)
    (found,) = record.read_json(tmp_path / "metrics.json")["emm"]
    assert len(trained) == 6 and found["sizes"] == [16, 32]
    assert found["ended"] == "emm.budget=8 networks"
    assert found["ratio"]["beyond"] == "at least 32"
    assert "at least 32" in (tmp_path / "report.html").read_text()


def test_every_setting_has_its_own_emm(trained, tmp_path, undrawn):
    some = config(**{"emm.budget": 12, "sweep.seeds": 1})
    some.sweep.setting = ("", "model.dropout=0.1")
    experiments.run(some, tmp_path)
    metrics = record.read_json(tmp_path / "metrics.json")
    assert [found["setting"] for found in metrics["emm"]] == [
        None, "model.dropout=0.1",
    ]  # fmt: skip
    assert {row["setting"] for row in metrics["table"]} == set(some.sweep.setting)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"emm.low": 64, "emm.high": 64}, "emm.low=64, emm.high=64: a bracket needs"),
        ({"emm.eps": 1.0}, r"emm.eps=1.0 must be in \(0, 1\)"),
        ({"emm.high": 5_000}, "emm.high=5000, but there are 1781 training points"),
        ({"sweep.num_examples": (8,)}, "experiment=emm chooses the sizes itself"),
        ({"emm.low": 15, "data.balanced": True}, "num_examples=15 must be a multi"),
    ],
)
def test_a_bracket_that_cannot_be_is_refused_before_training(
    changes, message, trained, tmp_path
):
    with pytest.raises(build.ConfigError, match=message):
        experiments.run(config(**changes), tmp_path / "run")
    assert not trained and not (tmp_path / "run").exists()


def test_choices_are_the_product_of_all_axes_but_n():
    some = config()
    some.sweep.update(setting=("", "model.depth=2"), width=(8, 16))
    found = emm.choices(some)
    assert len(found) == 4
    assert [len(grid.points(one)) for one in found] == [3] * 4
