"""A study is its question: the skeleton runs it, and so may a newcomer's own."""

import dataclasses

import numpy as np
import pytest

from memsep_jax import defaults, experiments
from memsep_jax.experiments import record
from memsep_jax.experiments.config import build
from memsep_jax.experiments.reporting import figures
from memsep_jax.experiments.studies import results, study


def config(name, width=(4, 8)):
    config = defaults.smoke(defaults.mixtures())
    config.experiment = name
    config.data.update(k=2, d=3, num_examples=8)
    config.sweep.update(seeds=2, width=width)
    return config


def measure(points, session, offset=0):
    for point in points:
        yield {"y": point.values["width"] + point.values["seed"] + offset}


@pytest.fixture
def ask(monkeypatch, tmp_path):
    """Runs an experiment of one's own.   Returns: metrics.json."""

    def ask(experiment, width=(4, 8)):
        monkeypatch.setitem(experiments.EXPERIMENTS, "own", experiment)
        experiments.run(config("own", width), tmp_path)
        return record.read_json(tmp_path / "metrics.json")

    return ask


def test_a_study_is_as_little_as_its_measure(ask, tmp_path):
    done = []

    def counted(points, session):
        done.extend(point.name for point in points)
        return measure(points, session)

    metrics = ask(study.Study(counted), width=(4,))
    assert [row["y"]["mean"] for row in metrics["table"]] == [4.5]
    assert record.read_json(tmp_path / "run.json")["status"] == "complete"
    assert (tmp_path / "report.html").is_file()
    # With one more width, finished points are not measured again.
    metrics = ask(study.Study(counted), width=(4, 8))
    assert [row["y"]["mean"] for row in metrics["table"]] == [4.5, 8.5]
    assert done == [f"width={width},seed={seed}" for width in (4, 8) for seed in (0, 1)]


def test_a_study_checks_shares_concludes_and_draws(ask, tmp_path, undrawn):
    def conclude(config, rows, parts, session):
        return {"largest": max(row["y"].item() for row in rows)}

    def draw(metrics, points):
        assert metrics["largest"] == 109 and len(points) == 4
        line = figures.line([4, 8], [row["y"] for row in metrics["table"]])
        yield "own", "A caption.", figures.curves([figures.Panel("", [line], "", "")])

    def share(config, parts, session):
        return {"offset": 100}

    own = study.Study(measure, draw, share=share, conclude=conclude, columns=("y",))
    assert ask(own)["columns"] == ["y"]
    assert "A caption." in (tmp_path / "report.html").read_text()

    def refuse(config):
        raise build.ConfigError("no")

    with pytest.raises(build.ConfigError, match="no"):
        ask(dataclasses.replace(own, check=refuse), width=(4,))


def test_a_function_of_config_and_session_is_an_experiment(ask, tmp_path):
    def own(config, session):
        session.begin("0" * 64)
        record.write_json(session.workdir / "metrics.json", {"seed": config.seed})

    assert ask(own) == {"seed": 0}
    assert record.read_json(tmp_path / "run.json")["status"] == "complete"


def test_what_is_no_study_is_refused(ask, tmp_path):
    with pytest.raises(build.ConfigError, match="experiment=3 must be a Study or a f"):
        ask(3)
    with pytest.raises(TypeError, match="either `measure` or `run`"):
        study.Study()
    assert not list(tmp_path.iterdir())


def test_a_report_runs_no_code_that_a_file_names(tmp_path):
    record.write_json(tmp_path / "metrics.json", {"experiment": "evil.py:study"})
    with pytest.raises(build.ConfigError, match="experiment=evil.py:study, which this"):
        experiments.run(config("report"), tmp_path)


def test_an_interval_is_read_as_it_was_written(tmp_path):
    """Null, which nan is on disk, is nan again; also of a list, and without a std."""
    alone = results.mean_interval([1.0])._asdict()
    record.write_json(tmp_path / "file.json", [alone, {"mean": 2, "low": 1, "high": 3}])
    values = record.read_json(tmp_path / "file.json")
    one = figures.Interval.read(values[0])
    assert one.mean == 1 and np.isnan([one.std, one.low, one.high]).all()
    both = figures.Interval.read(values)
    np.testing.assert_array_equal(both.mean, [1, 2])
    np.testing.assert_array_equal(both.high, [np.nan, 3])
