"""The two extremes, through the experiment that a config starts."""

import numpy as np
import pytest

from configs import optimum as configs
from memsep_jax import data, experiments
from memsep_jax.experiments import record, setup


def test_the_empirical_score_gives_bit_exact_copies(tmp_path):
    config = configs.get_config("full")
    config.data.num_examples = 100
    config.sampler.num_samples = 40
    config.run.chunk = 20
    experiments.run(config, tmp_path)
    found = record.read_json(tmp_path / "metrics.json")["memorization"]
    assert found["ratio"] == 1.0 and found["exact_copies"] == 40
    samples = record.read_npz(tmp_path / "samples.npz")["samples"]
    train = data.to_uint8(np.asarray(data.load("digits", 100).x))
    known = {image.tobytes() for image in train}
    assert all(image.tobytes() in known for image in samples)


def test_the_truth_gives_the_null_level(tmp_path):
    """In d = 2 the null level is about 3^-2, far from 0: a test that can fail."""
    config = configs.get_config("truth")
    config.data.update(d=2, num_examples=500)
    config.sampler.update(steps=60, num_samples=1_000)
    config.run.chunk = 500
    experiments.run(config, tmp_path)
    found = record.read_json(tmp_path / "metrics.json")["memorization"]
    error = np.sqrt(found["null"] * (1 - found["null"]) / 1_000)
    assert 0.05 < found["null"] < 0.2
    assert abs(found["ratio"] - found["null"]) < 4 * error


def test_the_truth_of_images_is_not_known(tmp_path):
    config = configs.get_config("full")
    config.optimum.score = "truth"
    with pytest.raises(setup.ConfigError, match="data.name=mixture has one"):
        experiments.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
