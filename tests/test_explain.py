"""What explains a network, as a study: a rung explains itself, others do not."""

import jax.numpy as jnp
import numpy as np
import pytest

from configs import explain_digits, explain_mixture
from memsep_jax import analytic, empirical, experiments, mixture
from memsep_jax.experiments import record
from memsep_jax.experiments.config import build
from memsep_jax.experiments.studies import explain


def tiny(config, **measured):
    config.data.num_examples = 16
    config.sampler.update(steps=12, num_samples=24)
    config.measure.update(draws=24, **measured)
    return config, build.build(config)


@pytest.fixture(scope="module")
def copier(compiled_once):
    """A network that is the empirical score: its numbers, rungs and parts."""
    config, parts = tiny(explain_digits.get_config("smoke"))
    network = empirical.score(np.asarray(parts.splits.train.x), parts.process)
    return config, parts, *explain.explained(config, parts, network)


def test_a_network_that_is_a_rung_is_explained_by_it_everywhere(copier):
    *_, row, rungs = copier
    assert list(rungs) == [name for name in explain.RUNGS if name != "truth"]
    for place in explain.PLACES:
        np.testing.assert_array_equal(row[f"empirical_{place}_r2"], 1)
        np.testing.assert_array_equal(row[f"empirical_{place}_error"], 0)
        # At these levels a Gaussian is no mixture of 16 digits.
        assert row[f"gaussian_{place}"] < 0.99
        # A patch of 15 covers 8 x 8 pixels from each of them: the empirical score.
        np.testing.assert_allclose(row[f"local_{place}_error"], 0, atol=1e-9)
    np.testing.assert_array_equal(row["local_patch"], 15)


def test_its_samples_are_those_of_the_rung_and_copies(copier):
    config, parts, _, rungs = copier
    samples = explain.sampled(config, parts, rungs["empirical"])((), 0, 24)
    drawn = {"network": samples, "empirical": samples[:20]}
    row = explain.alike(drawn, parts.splits, 1 / 3)
    assert row["ratio"] == row["empirical_copies"] == 1
    assert row["empirical_cosine"] == pytest.approx(1)
    other = {"network": samples, "gaussian": 255 - samples}
    assert explain.alike(other, parts.splits, 1 / 3)["gaussian_cosine"] < 0


def test_a_sampler_that_copies_stays_in_the_shells(copier):
    """Noise of d = 64 numbers is sqrt(64) sigma long, to about 1 part in 16."""
    *_, row, _ = copier
    np.testing.assert_allclose(row["noise"], [0.1, 1.0], rtol=1e-6)
    np.testing.assert_allclose(row["shell_radius"], 1, atol=0.1)
    assert row["held_out_radius"][0] > 3  # digits are more than 3 x 0.1 x 8 apart
    # A deterministic path towards x_i brings its noise down with sigma, and the prior
    # is a draw of it: it stays in the shell.
    assert row["path_radius"][0] == pytest.approx(1, abs=0.1)


def test_the_best_patch_is_chosen_at_held_out_points_for_each_time(compiled_once):
    """A network of patches of 3 at low noise, and of 7 above it."""
    config, parts = tiny(explain_digits.get_config("smoke"), patches=(7, 3))
    x, process = np.asarray(parts.splits.train.x), parts.process
    network = analytic.local(x, process, [(0.5, 3), (1.0, 7)])
    row, rungs = explain.explained(config, parts, network)
    np.testing.assert_array_equal(row["local_patch"], [3, 7])
    for place in explain.PLACES:
        np.testing.assert_allclose(row[f"local_{place}_r2"], 1, atol=1e-6)
    # And it is sampled with them.
    point, place = jnp.asarray(x[0]), jnp.float32(0.1)
    np.testing.assert_allclose(
        rungs["local"](point, place), network(point, place), rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize(
    ("sides", "pairs"),
    [
        ([3, 3, 3], [(4.0, 3)]),
        ([3, 5, 7], [(2**0.5, 3), (8**0.5, 5), (4.0, 7)]),
        ([3, 3, 7], [(8**0.5, 3), (4.0, 7)]),
    ],
)
def test_a_patch_holds_half_of_the_way_to_the_next_one(sides, pairs):
    found = explain.schedule((1.0, 2.0, 4.0), sides)
    assert [side for _, side in found] == [side for _, side in pairs]
    np.testing.assert_allclose([t for t, _ in found], [t for t, _ in pairs])


def test_the_error_and_r2_are_those_of_their_formulas():
    rng = np.random.default_rng(0)
    own, other = rng.normal(size=(2, 2, 3, 5, 4, 4, 1))
    error, r2, together = explain.agreement(own, explain.squared(own, other))
    missed, spread = np.zeros((2, 3)), np.zeros((2, 3))
    for k, p in np.ndindex(2, 3):
        a, b = own[k, p].reshape(5, 16), other[k, p].reshape(5, 16)
        missed[k, p] = sum(np.sum((u - v) ** 2) for u, v in zip(a, b, strict=True))
        spread[k, p] = sum(np.sum((u - a.mean(axis=0)) ** 2) for u in a)
        assert error[k, p] == pytest.approx(missed[k, p] / np.sum(a**2))
    np.testing.assert_allclose(r2, 1 - missed / spread)
    # Each time counts by how much the network's denoiser varies there.
    weights = spread / spread.sum(axis=0)
    np.testing.assert_allclose(together, (weights * r2).sum(axis=0))


def test_a_truth_explains_itself_and_vectors_have_no_patches(compiled_once):
    config, parts = tiny(explain_mixture.get_config("smoke"))
    truth = build.truth(config)
    network = mixture.score(truth, parts.process)
    row, rungs = explain.explained(config, parts, network, truth)
    assert list(rungs) == ["gaussian", "covariance_local", "empirical", "truth"]
    for place in explain.PLACES:
        np.testing.assert_array_equal(row[f"truth_{place}_r2"], 1)
    # Where sigma is 0.03, the empirical score moves a point to one of its 16.
    assert row["empirical_held_out_error"][0] > 0.01


@pytest.mark.parametrize(
    ("group", "values", "message"),
    [
        ("measure", {"patches": (4,)}, r"measure.patches=\(4,\) must be odd integers"),
        ("measure", {"patches": (3, 17)}, "patch=17 .* from 1 to 15"),
        ("measure", {"patches": ()}, r"measure.patches=\(\) has no value"),
        ("measure", {"times": (0.1, 90.0)}, r"measure.times=\[90.0\] .*t_max=80"),
        ("data", {"labels": "true"}, "data.labels=none"),
        ("data", {"num_held_out": 0}, "raise it"),
        ("measure", {"times": (0.1, 0.1)}, "positive and increasing"),
        ("measure", {"draws": 1}, "measure.draws=1: patches are chosen"),
        ("sweep", {"points": ({}, {"data.labels": "true"})}, "data.labels=true"),
    ],
)
def test_bad_input_is_refused_and_leaves_nothing(tmp_path, group, values, message):
    config = explain_digits.get_config("smoke")
    config[group].update(values)
    with pytest.raises(build.ConfigError, match=message):
        experiments.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("file", [explain_digits, explain_mixture])
def test_a_study_of_two_sizes(file, tmp_path, undrawn):
    config = file.get_config("smoke")
    config.sweep.update(num_examples=(8, 16), seeds=1)
    numbers = experiments.run(config, tmp_path)
    images = file is explain_digits
    rungs = explain.LOCAL.keys() if images else {"truth"}
    for row in numbers["table"]:
        for rung in ("gaussian", "covariance_local", "empirical", *rungs):
            assert f"{rung}_held_out" in row and f"{rung}_cosine" in row
        assert "null" in numbers["columns"] and f"{rung}_path" in numbers["columns"]
    drawn = {p.name for p in (tmp_path / "figures").glob("*.png")}
    own = {"patches.png", "samples_8.png", "samples_16.png"} if images else set()
    assert drawn == {"explained.png", "shells.png"} | own
    point = record.read_npz(tmp_path / numbers["points"][0])
    assert ("samples_network" in point) == images
    times = len(config.measure.times)
    assert point["empirical_path_error"].shape == point["path_radius"].shape == (times,)
