import copy
import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from faults import harness

import memsep_jax
from memsep_jax import checkpoint, experiments, train, weights
from memsep_jax.experiments import record
from memsep_jax.experiments.config.construct import ConfigError


@pytest.fixture(scope="module")
def run(tmp_path_factory, compiled_once, all_undrawn):
    """A small run with labels, of which some were dropped, and its own samples."""
    folder = tmp_path_factory.mktemp("loaded") / "run"
    config = harness.config(
        *harness.TINY_DIT,
        "--config.data.labels=true",
        "--config.train.label_drop=0.5",
        f"--config.run.pack={folder.parent / 'state.npz'}",
    )
    experiments.run(config, folder)
    return memsep_jax.load(folder)


def own(run):
    return record.read_npz(run.workdir / "samples.npz")["samples"]


def test_samples_are_those_of_the_run(run):
    samples = own(run)
    np.testing.assert_array_equal(run.sample(n=len(samples)), samples)
    assert samples.dtype == np.uint8


def test_a_sample_depends_on_its_key_and_its_number_alone(run):
    key = jax.random.key(3)
    few, more = run.sample(key, 2), run.sample(key, 3)
    # Two programs: a pixel between two levels may be rounded to either.
    np.testing.assert_allclose(np.float32(few), np.float32(more[:2]), atol=1)
    assert np.any(few != own(run)[:2])


def test_steps_and_labels_change_the_samples(run):
    key = jax.random.key(3)
    known = np.unique(run.parts.splits.train.label)
    # After so few steps the network does not yet heed its labels.
    rng = np.random.default_rng(0)
    moved = jax.tree.map(lambda p: p + 0.1 * rng.normal(size=p.shape), run.params)
    run = run._replace(params=jax.tree.map(jnp.float32, moved))
    one, other = (run.sample(key, 2, label=label) for label in known[:2])
    assert np.any(one != other)
    assert np.any(run.sample(key, 2, label=known[0], steps=5) != one)
    np.testing.assert_array_equal(run.sample(key, 2, label=known[0], guidance=1.0), one)
    assert np.any(run.sample(key, 2, label=known[0], guidance=4.0) != one)


def test_score_and_denoiser_say_the_same(run):
    x, t = jax.random.normal(jax.random.key(0), run.parts.splits.train.x.shape[1:]), 0.7
    process = run.parts.process
    alpha, sigma = process.alpha(t), process.sigma(t)
    label = jnp.int32(1)
    score = (alpha * run.denoiser(x, t, label) - x) / sigma**2
    np.testing.assert_allclose(run.score_fn(x, t, label), score, rtol=1e-4, atol=1e-4)


def test_a_packed_state_is_the_same_run(run):
    packed = run.workdir.parent / "state.npz"
    same = memsep_jax.load(packed, config=run.workdir / "config.json")
    assert same.step == run.step
    assert checkpoint.digest(same.params) == checkpoint.digest(run.params)
    with pytest.raises(checkpoint.ConflictError, match="without their config"):
        memsep_jax.load(packed)


def test_an_exported_file_is_the_same_run(run, tmp_path):
    path = tmp_path / "net.safetensors"
    run.export(path)
    for same in memsep_jax.load(path), memsep_jax.load(path, run.config):
        assert same.step == run.step and same.workdir is None
        assert checkpoint.digest(same.params) == checkpoint.digest(run.params)
    np.testing.assert_array_equal(same.sample(n=2), run.sample(n=2))
    with pytest.raises(checkpoint.ConflictError, match="which has no numbers to draw"):
        same.report()
    with pytest.raises(ConfigError, match="name that ends in .safetensors"):
        run.export(tmp_path / "net.bin")


def test_an_exported_file_is_audited_by_its_own_samples(run, tmp_path):
    run.export(tmp_path / "net.safetensors")
    settings = {"features": {"name": "none"}, "quality": {"points": 0}}
    drawn = memsep_jax.load(tmp_path / "net.safetensors").audit(**settings)
    kept = run.audit(workdir=tmp_path / "audit", **settings)
    for name in ("ratio", "null", "samples", "median_d1"):
        mine, its = (r.numbers["memorization"][name] for r in (drawn, kept))
        assert mine == pytest.approx(its, rel=0.01)  # a grey level here and there


@pytest.mark.parametrize("inside", [None, "{", "[1]", "[" * 5_000])
def test_an_exported_file_without_a_config_is_told(inside, run, tmp_path):
    path, tensors = tmp_path / "net.safetensors", weights.from_params(run.params)
    weights.write(path, tensors, {} if inside is None else {"config": inside})
    words = "no JSON of a config" if inside else "without their config"
    with pytest.raises(checkpoint.ConflictError, match=words):
        memsep_jax.load(path)


def test_other_weights_are_told(run, tmp_path):
    path, tensors = tmp_path / "net.safetensors", weights.from_params(run.params)
    weights.write(path, {"a": np.zeros(3)})
    with pytest.raises(weights.WeightsError, match="not the weights of this"):
        memsep_jax.load(path, run.config)
    weights.write(path, tensors, {"weights": "0" * 64, "step": "9" * 5_000})
    with pytest.raises(checkpoint.CorruptError, match="damaged; export it again"):
        memsep_jax.load(path, run.config)
    weights.write(path, tensors, {"data": "0" * 64})
    with pytest.raises(checkpoint.ConflictError, match="data of fingerprint 000000"):
        memsep_jax.load(path, run.config)
    broken = {name: np.full_like(a, np.nan) for name, a in tensors.items()}
    weights.write(path, broken)
    with pytest.raises(train.NonFiniteError, match="weights are not finite"):
        memsep_jax.load(path, run.config)


def test_a_second_call_compiles_nothing(run):
    run.sample(n=2)
    begin, advance = next(iter(run.programs.values()))
    sizes = begin._cache_size(), advance._cache_size()
    run.sample(jax.random.key(9), n=2), run.sample(4, n=2)
    assert (begin._cache_size(), advance._cache_size()) == sizes
    assert len(repr(run)) < 200 and f"step {run.step}" in repr(run)


def test_reading_a_run_moves_nothing(run, tmp_path):
    """All checkpoints are damaged: the snapshots are read, and nothing is renamed."""
    copied = tmp_path / "run"
    shutil.copytree(run.workdir, copied)
    for file in (copied / "checkpoints").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    before = {p.relative_to(copied) for p in copied.rglob("*")}
    if (copied / "snapshots").exists():
        assert memsep_jax.load(copied).step
    else:
        with pytest.raises(checkpoint.CorruptError, match="no valid checkpoint"):
            memsep_jax.load(copied)
    assert {p.relative_to(copied) for p in copied.rglob("*")} == before


def test_data_that_changed_are_told(run, tmp_path):
    copied = tmp_path / "run"
    shutil.copytree(run.workdir, copied)
    known = json.loads((copied / "config.json").read_text())
    known["data"]["num_examples"] -= 1
    (copied / "config.json").write_text(json.dumps(known))
    with pytest.raises(checkpoint.ConflictError, match="config now gives others"):
        memsep_jax.load(copied)
    (copied / "config.json").write_text("{")
    with pytest.raises(checkpoint.ConflictError, match="damaged, no JSON of a config"):
        memsep_jax.load(copied / "config.json")


def test_an_audit_and_a_report(run, tmp_path, undrawn):
    result = run.audit(workdir=tmp_path / "audit", features={"name": "none"})
    assert result.numbers["memorization"]["samples"] == len(own(run))
    assert result.numbers["features"] is None
    report = run.report()
    assert report == run.workdir / "report.html" and report.stat().st_size


def test_wrong_requests_are_told(run):
    with pytest.raises(ValueError, match=r"label=77 .*\[0, "):
        run.sample(label=77)
    for wrong in (
        {"n": 0},
        {"n": 2.5},
        {"steps": 0},
        {"steps": "3"},
        {"label": 2.0},
        {"label": [1, 2]},
        {"key": -1},
        {"key": 2**32},
        {"guidance": "a"},
        {"key": jax.random.split(jax.random.key(0), 3)},
    ):
        with pytest.raises(ConfigError, match="must be"):
            run.sample(**wrong)
    run.config.unlock()
    without = run._replace(
        parts=run.parts._replace(
            num_classes=0,
            splits=run.parts.splits._replace(
                train=run.parts.splits.train._replace(label=None)
            ),
        )
    )
    with pytest.raises(ValueError, match="without labels"):
        without.sample(label=0)
    kept = copy.deepcopy(run.config)
    kept.train.label_drop = 0.0
    with pytest.raises(ConfigError, match=r"sampler\.guidance=2\.0 needs the scores"):
        run._replace(config=kept).sample(guidance=2)
    with pytest.raises(ConfigError, match="guidance=-1.0 must be at least 0"):
        run.sample(guidance=-1)


def test_what_is_no_run_is_told(run, tmp_path):
    with pytest.raises(checkpoint.ConflictError, match="is no run"):
        memsep_jax.load(tmp_path)
    known = json.loads((run.workdir / "config.json").read_text())
    for change, message in (
        ({"experiment": "emm"}, "experiment=emm"),
        ({"model": known["model"] | {"colour": "red"}}, "colour"),
        ({}, "no weights yet"),
    ):
        folder = tmp_path / message.replace(" ", "_")
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(known | change))
        with pytest.raises((checkpoint.ConflictError, ConfigError), match=message):
            memsep_jax.load(folder)
    half = tmp_path / "half"
    shutil.copytree(run.workdir, half)
    (half / "metrics.json").unlink()  # stopped before its evaluation
    assert memsep_jax.load(half).step == run.step


def test_rooms_come_when_they_are_asked_for():
    text = """
import sys
import memsep_jax
assert "jax" not in sys.modules
assert {"load", "empirical", "process"} <= set(dir(memsep_jax))
for name in memsep_jax.__all__:
    getattr(memsep_jax, name)
"""
    subprocess.run([sys.executable, "-c", text], check=True)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = memsep_jax.nothing
