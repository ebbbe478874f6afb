"""The score that copies in some noise bands, the truth in the others."""

import jax
import numpy as np
import pytest

from configs import band_swap as configs
from memsep_jax import defaults, experiments, sampling, score
from memsep_jax.experiments import record
from memsep_jax.experiments.config import build
from memsep_jax.experiments.studies import band_swap


def tiny(variant="smoke"):
    """In d = 2 the null level is about 3^-2, far from 0."""
    config = configs.get_config(variant)
    config.data.update(num_examples=60, num_held_out=4_000, k=4, d=2)
    config.sampler.update(name="ddim", t_min=1e-6, steps=42, num_samples=400)
    config.sweep.update(num_examples=(60,), seeds=1)
    config.measure.update(bands=3)
    return config


def test_everywhere_is_the_optimum_and_nowhere_the_null_level(tmp_path, undrawn):
    config = tiny()
    experiments.run(config, tmp_path)
    metrics = record.read_json(tmp_path / "metrics.json")
    (row,) = metrics["table"]
    curve = {k: np.array(v["mean"]) for k, v in row.items() if isinstance(v, dict)}

    # The empirical score at all times, by two of the curves.
    assert curve["below_ratio"][-1] == curve["above_ratio"][0] == 1
    assert curve["below_overlap"][-1] == curve["above_overlap"][0] == 1
    # And at none: fresh draws of the truth.
    null = curve["null"]
    error = np.sqrt(null * (1 - null) * (1 / 400 + 1 / 4_000))
    assert 0.05 < null < 0.25
    assert abs(curve["truth_ratio"] - null) < 4 * error
    assert curve["below_ratio"][0] == curve["above_ratio"][-1] == curve["truth_ratio"]
    # At the smallest times alone it carries every point to a training point.
    assert curve["inside_ratio"][0] == curve["below_ratio"][1] == 1
    # Bands at large times alone change where a sample goes, and copy nothing.
    assert curve["above_ratio"][-2] < 0.5 and curve["above_overlap"][-2] < 1
    assert len(curve["t"]) == 3 and len(curve["edges"]) == 4
    for name in ("ratio", "overlap", "distance"):
        assert (tmp_path / "figures" / f"{name}.png").exists()


def test_the_bands_are_all_times_once():
    times = sampling.log_times(1e-3, 8.0, 10)
    bands = band_swap.cut(times, 5)
    np.testing.assert_allclose(bands.edges, np.asarray(times)[::-2])
    pairs = bands.pairs

    @jax.jit
    def rules(pair, t):
        made = score.banded(lambda x, t: x + 1, lambda x, t: x, *pair)
        return made(jax.numpy.zeros(()), t)

    rules = jax.vmap(jax.vmap(rules, (None, 0)), (0, None))
    inside, outside = rules(pairs["inside"], times), rules(pairs["outside"], times)
    np.testing.assert_array_equal(inside.sum(axis=0), 1)
    np.testing.assert_array_equal(inside + outside, 1)
    below, above = rules(pairs["below"], times), rules(pairs["above"], times)
    np.testing.assert_array_equal(below + above, 1)
    np.testing.assert_array_equal(below.sum(axis=1), [0, 2, 4, 6, 8, 11])


def test_half_of_the_copies_is_found_between_the_edges():
    """In log t; a curve with no copies has no half."""
    edges = np.array([0.01, 0.1, 1.0])
    found = band_swap._half(edges, np.array([0.0, 0.0, 1.0]))
    np.testing.assert_allclose(found, 10**-0.5)
    found = band_swap._half(edges[::-1], np.array([0.0, 0.3, 0.4]))
    np.testing.assert_allclose(found, 10 ** (-2 / 3))
    assert np.isnan(band_swap._half(edges, np.zeros(3)))


def test_a_network_can_stand_for_the_empirical_score(tmp_path, undrawn):
    """One that was hardly trained gives no copies, where the empirical score does."""
    config = tiny()
    config.measure.swap = "trained"
    config.sampler.update(steps=6, num_samples=50)
    experiments.run(config, tmp_path)
    metrics = record.read_json(tmp_path / "metrics.json")
    (row,) = metrics["table"]
    assert metrics["swap"] == "trained"
    assert row["copying_ratio"]["mean"] < 0.5
    assert row["below_overlap"]["mean"][-1] == 1


def test_what_cannot_be_swapped_is_refused_and_leaves_nothing(tmp_path):
    cases = (
        (
            lambda c: defaults.switch(c, data="digits").data.update(num_held_out=9),
            "data.name=mixture has one",
        ),
        (lambda c: c.measure.update(swap="nothing"), "measure.swap='nothing' is not"),
        (lambda c: c.measure.update(bands=43), "measure.bands=43 must be at most"),
        (lambda c: c.measure.update(bands=0), "measure.bands=0 must be at least 1"),
    )
    for change, message in cases:
        config = tiny()
        change(config)
        with pytest.raises(build.ConfigError, match=message):
            experiments.run(config, tmp_path / "run")
        assert not (tmp_path / "run").exists()
