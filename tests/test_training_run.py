"""The main job is one run, wherever its training points are."""

import jax
import numpy as np
import pytest
from faults import harness

from memsep_jax import checkpoint, defaults, experiments
from memsep_jax.data import sources
from memsep_jax.experiments import record
from memsep_jax.experiments.config import build
from memsep_jax.experiments.studies import monitor
from memsep_jax.experiments.studies import training_run as job


@pytest.fixture(scope="module", autouse=True)
def quickly(children):
    """Without rendering, and with each program compiled once."""
    with harness.compiled_once(), harness.undrawn():
        yield


def small(path, **changes):
    """An MLP on the images of a file, looked at and saved along the way."""
    config = defaults.smoke(defaults.train())
    config.data.update(name="npz", path=str(path), num_examples=30)
    config.model.update(name="mlp")
    config.train.flip = True
    config.update_from_flattened_dict(changes)
    return config


def test_a_calendar_says_what_is_due_at_a_step():
    """The last step is logged, saved and evaluated, whatever the intervals are."""
    calendar = monitor.Calendar(25, 4, 10, 20, snapshots={3, 25})
    steps = [0]
    while steps[-1] < 25:
        steps.append(calendar.next(steps[-1]))
    assert steps == [0, 3, 4, 8, 10, 12, 16, 20, 24, 25]
    due = {
        calendar.logs: [4, 8, 12, 16, 20, 24, 25],
        calendar.saves: [10, 20, 25],
        calendar.evaluates: [20, 25],
        calendar.measures: [3, 20, 25],
    }
    for what, when in due.items():
        assert [step for step in steps[1:] if what(step)] == when


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "digits.npz"
    read = sources.digits()
    np.savez(path, train_images=read.images[:60], train_labels=read.labels[:60])
    return path


@pytest.mark.parametrize(
    "labels", ["none", pytest.param("true", marks=pytest.mark.slow)]
)
def test_a_run_on_points_on_disk_is_the_run_in_memory(labels, digits, tmp_path):
    """To the last bit: weights, losses, samples. Distances of pixels are integers'."""
    known, tables = [], []
    for stream in (False, True):
        workdir = tmp_path / str(stream)
        config = small(digits, **{"data.labels": labels, "data.stream": stream})
        experiments.run(config, workdir)
        last = checkpoint.steps(workdir / "checkpoints")[-1]
        like = job.initial_state(config, build.build(config))
        rows = record.read_metrics(workdir / "metrics.jsonl")
        known.append(
            jax.tree.leaves(checkpoint.restore(workdir / "checkpoints", last, like))
            + [record.read_npz(workdir / "samples.npz")["samples"]]
            + [row[k] for row in rows for k in ("loss", "grad_norm")]
        )
        found = record.read_json(workdir / "metrics.json")
        known[-1] += [found["memorization"]["ratio"], found["data"]["fingerprint"]]
        tables.append(np.genfromtxt(workdir / "per_sample.csv", delimiter=","))
    for one, other in zip(*known, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_allclose(*tables, rtol=1e-6)


def test_latents_are_sampled_as_they_are(tmp_path):
    """And shown in the report; nothing is rounded to pixels."""
    path, rng = tmp_path / "latents.npz", np.random.default_rng(0)
    x = rng.normal(size=(40, 4, 4, 4)).astype(np.float32)
    np.savez(path, train_images=3 * x)
    config = small(path, **{"data.name": "latents", "data.stream": True})
    config.data.update(num_examples=20, num_held_out=10)
    experiments.run(config, tmp_path / "run")
    samples = record.read_npz(tmp_path / "run" / "samples.npz")["samples"]
    assert samples.dtype == np.float32 and samples.shape[1:] == (4, 4, 4)
    found = record.read_json(tmp_path / "run" / "metrics.json")
    assert found["memorization"]["exact_copies"] == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("image/png") > 2
    assert "in the units of the latents" in page and "pixels run" not in page


@pytest.mark.parametrize(
    "change",
    [
        {"experiment": "mitigate"},
        {"train.temperature": 2.0},
        {"prune.ratio": 0.5, "model.name": "dit", "model.num_heads": 2},
    ],
)
def test_what_needs_the_points_in_memory_says_so(change, digits):
    config = small(digits, **change, **{"data.stream": True})
    field, value = next(iter(change.items()))
    with pytest.raises(build.ConfigError, match=f"on disk, and {field}={value} needs"):
        build.build(config)
