"""Which training points a trained network emits, as a study."""

import numpy as np
import pytest

from configs import mlp_mixture, which_digits
from memsep_jax import experiments, neighbours
from memsep_jax.experiments import record
from memsep_jax.experiments.config import build
from memsep_jax.experiments.studies import compare, which


def test_one_radius_does_not_favour_sparse_points():
    """The 1/3 rule takes the third sample, as its second neighbour is far away."""
    own = neighbours.nearest(*[np.array([[0.0], [10.0], [20.0], [300.0]])] * 2, 2)
    near = neighbours.Neighbours(
        np.array([[1.0, 10.0], [4.0, 6.0], [4.0, 100.0], [1.0, 2.0]]), np.zeros((4, 2))
    )
    copies = which._copies(near, own, 1 / 3)
    assert copies["ratio"].tolist() == [True, False, True, False]
    # Nearest other points are 10, 10, 10 and 280 away: the radius is 10 / 3.
    assert copies["radius"].tolist() == [True, False, False, True]


@pytest.mark.parametrize("labels", ["none", "unique"])
def test_classes_are_those_of_the_source_whatever_the_labels(labels):
    config = which_digits.get_config("smoke")
    config.data.labels = labels
    train = build.splits(config).train
    config.data.labels = "true"
    truth = build.splits(config).train.label
    config.data.labels = labels
    np.testing.assert_array_equal(which._classes(config, train), truth)


def test_a_source_without_classes_has_one_mean():
    config = mlp_mixture.get_config("smoke")
    train = build.splits(config).train
    assert which._classes(config, train) is None


@pytest.mark.slow
def test_a_study_of_two_sizes(tmp_path, undrawn):
    config = which_digits.get_config("smoke")
    config.data.labels = "true"
    config.train.steps, config.sampler.num_samples = 300, 64
    config.sweep.update(num_examples=(8, 16), seeds=1)
    numbers = experiments.run(config, tmp_path)
    small, large = numbers["table"]
    for row in (small, large):
        for trait in ("sparsity", "atypicality", "atypicality_features"):
            value = row[f"ratio_{trait}"]["mean"]
            assert value is None or -1 <= value <= 1  # None: nothing is copied yet
    drawn = {p.name for p in tmp_path.rglob("*.png")}
    ranked = any(row["ratio_sparsity"]["mean"] is not None for row in (small, large))
    assert "points_8.png" in drawn and ("which.png" in drawn) == ranked
    point = record.read_npz(tmp_path / numbers["points"][0])
    n = point["counts"].shape[1]
    assert point["most"].shape == (min(n, compare.EMITTED), 8, 8, 1)
    assert point["counts"][0].sum() == round(point["ratio"].item() * 64)
