"""Nothing reassures about garbage, and a run that stopped early gets its report (H)."""

import json
import os
import shutil

import numpy as np
import pytest
from test_report import read

from configs import audit as configs
from faults import harness
from memsep_jax import experiments
from memsep_jax.checkpoint import ConflictError
from memsep_jax.data import sources
from memsep_jax.experiments import record
from memsep_jax.experiments.runtime import locks

pytestmark = pytest.mark.usefixtures("undrawn")
IMAGES = ("--config.run.snapshots=2", "--config.run.snapshot_samples=4")


def drawn_again(workdir, **changes):
    """`experiment=report` of a workdir, by its own config."""
    config = harness.config(*harness.TINY)
    config.unlock().update({"experiment": "report", **changes})
    experiments.run(config, workdir)
    return read(workdir).text


@pytest.fixture
def undrawn():
    with harness.undrawn():
        yield


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("stopped") / "run"
    harness.stopped(workdir, *harness.TINY)
    return workdir


@pytest.fixture
def stopped(stopped_once, tmp_path):
    """A run that a signal stopped after row 12 of 30."""
    return shutil.copytree(stopped_once, tmp_path / "run")


def kept(workdir):
    """All that a run goes on from, and what says how it stands."""
    found = harness.files(workdir)
    drawn = ("report.html", "figures", "evaluation", ".lock")
    return {k: v for k, v in found.items() if not k.startswith(drawn)}


@pytest.mark.slow
def test_h82_few_steps_on_images_reassure_nobody(tmp_path, capsys):
    """30 steps: no sample is a copy, and the report does not say that all is well."""
    config = harness.config(*harness.TINY_DIT, "--config.run.evaluate_every=30")
    experiments.run(config, tmp_path)
    metrics = record.read_json(tmp_path / "metrics.json")
    found, out = metrics["memorization"], capsys.readouterr().out
    assert (found["ratio"], metrics["verdict"]["name"]) == (0.0, "undertrained")
    assert found["median_d1"] > found["held_out_median_d1"]
    text = read(tmp_path).text
    for said in (text, " ".join(out.split())):
        assert "Undertrained: 100.0 %" in said and "No sign of copying" not in said
        assert "only 16 held-out points" in said
        assert "median d1" in said
    # Too few for a law, which is said instead of a number.
    assert "12 points of each set are fewer than 50" in text
    assert "not measured" in out


@pytest.mark.slow
def test_h82_quality_stands_beside_that_of_training_points(tmp_path):
    config = harness.config(
        *harness.TINY_DIT,
        "--config.data.num_examples=60",
        "--config.data.num_held_out=60",
        "--config.sampler.num_samples=60",
        "--config.run.chunk=20",
    )
    experiments.run(config, tmp_path)
    metrics = record.read_json(tmp_path / "metrics.json")
    rows = {row["title"]: row for row in metrics["frechet"]}
    assert set(rows) == {"FD (pixels)", "FD (random_conv)"}
    text = read(tmp_path).text
    for title, row in rows.items():
        assert row["n"] == 60 and 0 < row["train"] < row["page"] < row["samples"]
        assert f"{title} to held-out, n = 60" in text
        assert f"{row['samples']:.3g}" in text and f"{row['train']:.3g}" in text
    # Its features are kept in chunks, as all that takes long is.
    assert len([*tmp_path.glob("evaluation/*/random_conv-samples/*.npz")]) == 3


@pytest.mark.parametrize("kind", harness.some(["noise", "blocks", "one page"]))
def test_h82_an_audit_of_garbage_reassures_nobody(kind, tmp_path):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (80, 8, 8, 1), np.uint8)
    if kind == "blocks":
        x = x[:, ::4, ::4].repeat(4, 1).repeat(4, 2)
    if kind == "one page":
        mean = sources.digits().images[:60].mean(axis=0).astype(np.uint8)
        x = mean + x % 2
    np.save(tmp_path / "samples.npy", x)
    config = configs.get_config("smoke")
    config.samples = str(tmp_path / "samples.npy")
    experiments.run(config, tmp_path / "run")
    metrics = record.read_json(tmp_path / "run" / "metrics.json")
    assert metrics["memorization"]["count"] == 0
    assert metrics["verdict"]["name"] == "undertrained"
    assert [row["title"] for row in metrics["frechet"]] == [
        "FD (pixels)", "FD (random_conv)",
    ]  # fmt: skip
    assert "train longer" in metrics["advice"][0]["text"]
    text = read(tmp_path / "run").text
    assert "Undertrained" in text and "No sign of copying" not in text
    assert "Nothing here asks for a change" not in text


def test_h82_a_stopped_run_gets_its_report_and_resumes_unchanged(
    whole, stopped, capsys
):
    before = kept(stopped)
    text = drawn_again(stopped)
    assert kept(stopped) == before  # neither a checkpoint nor its status
    assert not (stopped / "metrics.json").exists()
    assert "Not finished. The run stands at step 13 of 30." in text
    assert (
        "13 of 30: not finished" in text and "To continue it, give its command" in text
    )
    assert (stopped / "figures" / "loss.png").exists()
    assert "13 of 30: not finished" in " ".join(capsys.readouterr().out.split())
    chunks = harness.files(stopped / "evaluation")
    drawn_again(stopped)  # from the chunks that it has kept
    numbers = {k: v for k, v in chunks.items() if "/" in k.partition("/")[2]}
    assert numbers and numbers.items() <= harness.files(stopped / "evaluation").items()
    experiments.run(harness.config(*harness.TINY), stopped)
    assert harness.digest(stopped) == harness.digest(whole)
    assert harness.rows(stopped) == harness.rows(whole)
    for name in ("metrics.json", "samples.npz", "per_sample.csv", "pairs.npz"):
        assert (stopped / name).read_bytes() == (whole / name).read_bytes()
    assert "Not finished" not in read(stopped).text


@pytest.mark.slow
def test_h82_a_run_without_a_checkpoint_is_shown_by_a_snapshot(tmp_path):
    args = (*harness.TINY, *IMAGES, "--config.run.save_every=1000")
    harness.stopped(tmp_path, *args, row=20)
    (step,) = harness.checkpoint.steps(tmp_path / "checkpoints")
    saved = tmp_path / "checkpoints" / str(step)
    saved.rename(tmp_path / "away")  # a signal saves, and a kill does not
    status = record.read_json(tmp_path / "run.json") | {"status": "running"}
    record.write_json(tmp_path / "run.json", status)
    assert harness.checkpoint.steps(tmp_path / "snapshots") == [15]
    text = drawn_again(tmp_path)
    assert "The run stands at step 15 of 30." in text
    assert "Samples along the training" in text
    assert (tmp_path / "figures" / "ratio.png").exists()
    hidden = drawn_again(tmp_path, run={"images": False})
    assert "Samples along the training" not in hidden


@pytest.mark.slow
def test_h82_a_longer_stopped_run_is_not_shown_by_old_numbers(whole, tmp_path):
    workdir = shutil.copytree(whole, tmp_path / "run")
    old = (workdir / "metrics.json").read_bytes()
    harness.stopped(workdir, *harness.TINY, "--config.train.steps=60", row=40)
    step = harness.checkpoint.steps(workdir / "checkpoints")[-1]
    assert step > 30  # where the shorter run had ended
    assert f"The run stands at step {step} of 60." in drawn_again(workdir)
    assert (workdir / "metrics.json").read_bytes() == old


def test_h82_a_run_at_work_is_left_alone(stopped):
    before = harness.files(stopped)
    handle = locks.take(stopped / ".lock")
    with pytest.raises(ConflictError, match="is in use by process"):
        drawn_again(stopped)
    os.close(handle)
    assert harness.files(stopped) == before


def test_h82_a_run_without_weights_says_by_what_it_goes_on(stopped):
    (stopped / "checkpoints").rename(stopped / "away")
    command = json.loads((stopped / "run.json").read_text())["command"]
    with pytest.raises(ConflictError, match="no readable metrics.json") as error:
        drawn_again(stopped)
    assert command in str(error.value)


@pytest.mark.slow
def test_h82_a_run_that_stop_gap_ended_says_where(tmp_path):
    """It is finished, and has its report at once."""
    args = (*harness.TINY, "--config.run.evaluate_every=5", "--config.run.save_every=5")
    config = harness.config(*args, "--config.train.steps=3000")
    config.unlock().update({"train": {"stop_gap": 0.0}})
    config.data.update(num_examples=4, num_held_out=60)
    config.train.batch_size = 4
    experiments.run(config, tmp_path)
    metrics = record.read_json(tmp_path / "metrics.json")
    step = metrics["model"]["steps"]
    assert step < 3000 and "unfinished" not in metrics
    assert f"{step:,} of 3,000: ended early" in read(tmp_path).text
    assert record.read_json(tmp_path / "run.json")["status"] == "complete"
