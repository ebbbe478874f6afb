"""One factor at a time: settings, their values, tables and pictures."""

import numpy as np
import pytest

from memsep_jax import defaults, experiments
from memsep_jax.experiments import record
from memsep_jax.experiments.studies import factors, networks

SETTINGS = (
    "",
    "model.width=8",
    "model.width=32",
    "train.batch_size=16; optimizer.lr=0.002",
    "optimizer.name=sgd; optimizer.lr=0.1",
    "data.num_labels=2; data.labels=random",
)


def config():
    config = defaults.smoke(defaults.copying())
    config.experiment = "factors"
    config.train.steps = 2
    config.sweep.update(seeds=2, num_examples=(16, 24), setting=SETTINGS)
    return config


@pytest.mark.parametrize(
    "setting, value",
    [
        ("model.width=64", ("model.width", 64.0, "64")),
        (
            "train.batch_size=128; optimizer.lr=8e-4",
            ("train.batch_size", 128.0, "128"),
        ),
        ("data.num_labels=5; data.labels=random", ("data.num_labels", 5.0, "5")),
        ("data.labels=true", ("data.labels", None, "true")),
        ("data.classes=(0, 1)", ("data.classes", None, "(0, 1)")),
        ("data.deduplicate=True", ("data.deduplicate", None, "True")),
        ("model.skips=(1, 0, 0, 1)", ("model.skips", None, "1001")),
    ],
)
def test_the_first_field_of_a_setting_is_its_factor(setting, value):
    assert factors.value_of(setting) == value


def test_the_base_stands_in_every_factor_at_its_own_value():
    found = factors.base_values(config())
    assert found == {
        "model.width": 16, "train.batch_size": 8, "optimizer.name": "adamw",
        "data.num_labels": None,
    }  # fmt: skip
    table = [{"setting": setting, "num_examples": 16} for setting in SETTINGS]
    assert factors.groups(table) == {
        "model.width": [0, 1, 2], "train.batch_size": [0, 3],
        "optimizer.name": [0, 4], "data.num_labels": [0, 5],
    }  # fmt: skip
    grid = [{"num_examples": n, "width": w} for n in (8, 16) for w in (4, 8)]
    assert factors.groups(grid) == {"width": [0, 1, 2, 3]}
    assert factors.groups(grid[::2]) == {"num_examples": [0, 1]}


def test_each_factor_has_a_table_and_a_picture(tmp_path, monkeypatch, undrawn):
    def measured(config, session, members):
        ratio = 1 / (1 + config.data.num_examples / config.model.width)
        ratio += 0.01 * config.seed
        names = ("raw", "ema", "highest", "emitted", "frechet")
        return dict.fromkeys(names, 0.5) | {"ratio": ratio, "null": 0.0}

    monkeypatch.setattr(networks, "measured", measured)
    experiments.run(config(), tmp_path)
    metrics = record.read_json(tmp_path / "metrics.json")
    assert len(metrics["table"]) == 2 * len(SETTINGS)
    for row in metrics["table"]:
        width = {"model.width=8": 8, "model.width=32": 32}.get(row["setting"], 16)
        expected = 1 / (1 + row["num_examples"] / width) + 0.005
        np.testing.assert_allclose(row["ratio"]["mean"], expected)
    assert len(list((tmp_path / "figures").glob("factor_*.png"))) == 4
    report = (tmp_path / "report.html").read_text()
    for factor, members in metrics["groups"].items():
        assert f"Numbers: {factor}" in report
        assert len(members) == (6 if factor == "model.width" else 4)


def test_values_stand_where_they_are_and_lines_are_joined_by_n():
    rows = [
        {"setting": setting, "num_examples": n, "null": one, "ratio": one}
        for setting in SETTINGS[:3]
        for n in (16, 24)
        for one in [{"mean": n / 100, "low": 0.1, "high": 0.3}]
    ]
    panel = factors._panel("model.width", rows, 16)
    assert panel.xscale == "log" and panel.ticks is None
    labels = [line.label for line in panel.lines]
    assert labels == ["n = 16", "null level", "n = 24", "null level"]
    assert panel.lines[0].x == [8.0, 16, 32.0]
    np.testing.assert_array_equal(panel.lines[2].mean, 0.24)
    rows = [row | {"setting": row["setting"] and "model.name=dit"} for row in rows]
    panel = factors._panel("model.name", rows, "mlp")
    assert panel.ticks == ["mlp", "dit"] and panel.lines[0].style == "o"
    rows = [row | {"setting": row["setting"] and "data.resolution=4"} for row in rows]
    panel = factors._panel("data.resolution", rows, None)  # whatever the data have
    assert panel.ticks == ["default", "4"]
