"""Experiment lipschitz: its numbers are those of `lipschitz`, and a run goes on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import gmm_lipschitz
from memsep_jax import defaults, empirical, experiments, lipschitz, mixture
from memsep_jax.experiments import record, training
from memsep_jax.experiments.config import build, grid
from memsep_jax.experiments.studies import steepness
from memsep_jax.models import mlp


def tiny():
    config = gmm_lipschitz.get_config("smoke")
    config.data.update(num_examples=8, k=2, d=2, size=100)
    config.model.update(width=8)
    config.measure.update(draws=4, times=(1e-3, 4e-3, 1.0), iters=30)
    return config


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, all_undrawn):
    path = tmp_path_factory.mktemp("lipschitz")
    experiments.run(tiny(), path)
    return path


def read(workdir, name):
    (path,) = (workdir / "points").rglob(f"{name}.npz")
    return record.read_npz(path)


def exact(score_fn, xs, t):
    return jax.jit(jax.vmap(lambda x: lipschitz.exact_norm(score_fn, x, t)))(xs)


def test_a_run_leaves_numbers_and_pictures(workdir):
    assert record.read_json(workdir / "run.json")["status"] == "complete"
    table = record.read_json(workdir / "metrics.json")["table"]
    assert [(row["weight_decay"], row["seeds"]) for row in table] == [(0, 2), (1, 2)]
    for name in ("norms", "bounds"):
        assert (workdir / "figures" / f"{name}.png").exists()
    rows = [read(workdir, p.name) for p in grid.points(tiny())]
    assert all(np.isfinite(v).all() for row in rows for v in row.values())


def test_the_exact_scores_are_those_of_the_data_and_of_the_functions(workdir):
    points = {point.name: point for point in grid.points(tiny())}
    name, other = "weight_decay=0.0,seed=1", "weight_decay=1.0,seed=1"
    row, same = read(workdir, name), read(workdir, other)
    parts, truth = build.build(points[name].config), build.truth(points[name].config)
    data, process, t = jnp.asarray(parts.splits.train.x), parts.process, 4e-3
    probes = process.alpha(t) * lipschitz.midpoints(data, 4)
    scores = {
        "empirical": empirical.score(data, process),
        "truth": mixture.score(truth, process),
    }
    for label, score_fn in scores.items():
        for place in ("noised", "midpoints", "segments", "path"):
            ours = f"{label}_{place}"
            np.testing.assert_array_equal(row[ours], same[ours])  # decay or not
        norms = exact(score_fn, probes, t)
        np.testing.assert_allclose(row[f"{label}_midpoints"][1], norms.max(), 2e-3)
        found = row[f"{label}_midpoints_median"][1]
        np.testing.assert_allclose(found, np.median(norms), 2e-3)
    bounds = jax.jit(lambda data: lipschitz.empirical_bounds(data, process, t))(data)
    np.testing.assert_allclose([row["low"][1], row["high"][1]], bounds, 1e-5)
    assert (row["empirical_largest"] <= 1.001 * row["high"]).all()
    # The closest pair is one of the probes, and here no third point is near it.
    assert row["empirical_midpoints"][1] >= 0.99 * row["two_point"][1]


def test_slopes_are_minus_four_between_points_and_minus_two_at_them(
    workdir,
):
    for point in grid.points(tiny()):
        row = read(workdir, point.name)
        assert row["empirical_midpoints_slope"] == pytest.approx(-4, abs=0.1)
        assert row["empirical_noised_slope"] == pytest.approx(-2, abs=0.01)
        assert row["truth_midpoints_slope"] == pytest.approx(0, abs=0.05)
        v = row["sigma"] ** 2
        np.testing.assert_allclose(row["empirical_noised_median"][:2], 1 / v[:2], 0.01)


def test_the_norms_of_a_network_are_below_the_product_of_layers(off_zero):
    point = grid.points(tiny())[0]
    parts, truth = build.build(point.config), build.truth(point.config)
    params = off_zero(training.init_params(parts, jax.random.key(1)))
    data, times = jnp.asarray(parts.splits.train.x), jnp.array([1e-3, 0.5])
    look = jax.jit(functools.partial(steepness.norms, parts=parts, m=4, iters=200))
    found = look(params, truth, data, times, jax.random.key(2))
    score_fn = training.score_fn(parts, params)
    bound = mlp.lipschitz_bound(params)
    np.testing.assert_allclose(found["layer_bound"], bound, rtol=1e-5)
    for i, t in enumerate(times):
        probes = parts.process.alpha(t) * lipschitz.midpoints(data, 4)
        largest = exact(score_fn, probes, t).max()
        np.testing.assert_allclose(found["network_midpoints"][i], largest, rtol=2e-3)
        above = lipschitz.network_bound(bound, parts.prediction, parts.process, t)
        np.testing.assert_allclose(found["network_bound"][i], above, rtol=1e-5)
        assert largest <= found["network_largest"][i] * 1.002
        assert found["network_largest"][i] <= above
    steps = len(parts.times)
    assert (
        found["network_path"].shape == found["empirical_path_median"].shape == (steps,)
    )


def test_a_truth_that_is_not_known_is_refused_and_leaves_nothing(tmp_path):
    config = gmm_lipschitz.get_config("smoke")
    defaults.switch(config, data="digits")
    with pytest.raises(build.ConfigError, match="data.name=mixture has one"):
        experiments.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_network_without_a_bound_is_refused(tmp_path, monkeypatch):
    (tmp_path / "linear_net.py").write_text(
        "def net():\n"
        "    return lambda key, x, t: x + 1, lambda params, x, t: params * x\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = defaults.switch(tiny(), model="linear_net:net")
    config.sweep.width = ()
    with pytest.raises(build.ConfigError, match="linear_net:net.* model.name=mlp"):
        experiments.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
