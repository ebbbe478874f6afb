"""Many networks in one program are the networks one by one."""

import jax
import numpy as np
import pytest

from configs import gmm_width_decay
from memsep_jax import defaults, empirical, experiments, mixture
from memsep_jax.experiments import record, training
from memsep_jax.experiments.config import build, grid
from memsep_jax.experiments.studies import ensemble


def smoke(**axes):
    config = gmm_width_decay.get_config("smoke")
    config.sweep.update(num_examples=(), width=(), seeds=1)
    config.sweep.update(**axes)
    return config


def learned(points):
    configs = [point.config for point in points]
    return ensemble.learn(configs, [build.build(config) for config in configs])


@pytest.fixture(scope="module")
def ensemble_of():
    """Points of two sizes, two decays and two seeds, and what they learn together."""
    axes = dict(num_examples=(8, 16), weight_decay=(0.0, 100.0), seeds=2)
    points = grid.points(smoke(**axes))
    return points, learned(points)


def test_a_network_does_not_know_the_others_of_its_ensemble(ensemble_of):
    """Neither their seeds, nor their decay, nor that they have more points."""
    points, (together, losses) = ensemble_of
    i = 3  # of the few points, with decay, and of the second seed
    alone, loss = learned(points[i : i + 1])
    own = jax.tree.map(lambda a: a[i], together.ema)
    for a, b in zip(jax.tree.leaves(own), jax.tree.leaves(alone.ema), strict=True):
        np.testing.assert_allclose(a, b[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(losses[i], loss[0], rtol=1e-4)
    np.testing.assert_array_equal(together.step, 4)


def test_decay_shrinks_the_weights_and_seeds_part_them(ensemble_of):
    _, (state, _) = ensemble_of
    squares = [
        np.square(leaf).reshape(len(leaf), -1).sum(axis=1)
        for leaf in map(np.asarray, jax.tree.leaves(state.params))
    ]
    light, other, heavy, _ = np.sqrt(sum(squares))[:4]
    assert heavy < 0.9 * light
    assert light != other


def test_the_members_decay_as_a_single_run_does():
    """A step of SGD with decay 8 beside one without: lr 8 / 4 of the weights less."""
    config = smoke(weight_decay=(0.0, 8.0))
    config.optimizer.update(name="sgd", momentum=0.0, lr=0.1)
    config.optimizer.update(schedule="constant", warmup=0)
    config.train.steps = 1
    state, _ = learned(grid.points(config))
    start = training.init_params(build.build(config), build.keys(0).init)
    for both, w in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(start), strict=True
    ):
        np.testing.assert_allclose(both[1], both[0] - 0.2 * w, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_experiment_leaves_a_row_for_every_network(tmp_path):
    config = smoke(width=(4, 8), weight_decay=(0.0, 0.1), seeds=2)
    experiments.run(config, tmp_path)
    metrics = record.read_json(tmp_path / "metrics.json")
    assert len(metrics["table"]) == 4 and len(metrics["points"]) == 8
    for row in metrics["table"]:
        assert row["seeds"] == 2 and row["steps"]["mean"] == 4
        assert 0 <= row["ratio"]["mean"] <= 1
        # Of few steps, that do not resolve the flow of every point.
        assert 0 <= row["unresolved"]["mean"] < 1
        assert np.isfinite(row["log_likelihood"]["mean"])
    point = record.read_npz(tmp_path / metrics["points"][0])
    assert point["samples"].shape == (8, 4) and np.isfinite(point["samples"]).all()
    assert point["ratio"] == point["memorized"].mean()
    assert {f.name for f in (tmp_path / "figures").glob("*.png")} == {
        "curves.png", "heatmap.png",
    }  # fmt: skip

    # One point lost: that one is done again, to the same numbers, and no other.
    lost = tmp_path / metrics["points"][3]
    before = record.read_npz(lost)
    kept = {name: (tmp_path / name).stat().st_mtime_ns for name in metrics["points"]}
    lost.unlink()
    config.run.log_every += 1  # else the run is complete
    (tmp_path / "run.json").write_text('{"status": "interrupted"}')
    experiments.run(config, tmp_path)
    after = record.read_npz(lost)
    np.testing.assert_allclose(
        after["samples"], before["samples"], rtol=1e-3, atol=1e-4
    )
    for name, written in kept.items():
        changed = (tmp_path / name).stat().st_mtime_ns != written
        assert changed == (tmp_path / name == lost)


def test_a_value_that_has_no_meaning_is_refused_wherever_it_stands(tmp_path):
    config = smoke(width=(8, 4), weight_decay=(0.0, -1.0))
    with pytest.raises(
        build.ConfigError, match=r"weight_decay=\(0.0, -1.0\) must be at"
    ):
        experiments.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_points_whose_flow_is_not_resolved_have_no_likelihood():
    """One moves with the steps, one is infinite, one is nan; the median is of two."""
    fine = np.array([-3.0, -1e17, -np.inf, np.nan, -5.0], np.float32)
    coarse = np.array([-3.1, -2e17, -np.inf, np.nan, -5.0], np.float32)
    found = ensemble._resolved(fine, coarse, np.arange(5.0))
    assert found == {
        "log_likelihood": -4.0, "truth_log_likelihood": 2.0,
        "unresolved": pytest.approx(3 / 5), "unresolved_of": 5,
    }  # fmt: skip
    found = ensemble._resolved(fine[1:4], coarse[1:4], np.arange(3.0))
    assert found["unresolved"] == 1 and np.isnan(found["log_likelihood"])
    few = np.where(np.arange(20) < 1, 0.0, 5.0)  # one of 20 is resolved
    assert np.isnan(ensemble._resolved(few, 0 * few, few)["log_likelihood"])


@pytest.mark.parametrize("who, unresolved", [("truth", 0.0), ("empirical", 1.0)])
def test_the_flow_of_the_truth_has_a_likelihood(who, unresolved, monkeypatch):
    """That of the empirical score, which is a sum of Dirac laws, has none."""
    config = gmm_width_decay.get_config("small")
    config.data.update(num_examples=8, num_held_out=20)
    parts = build.build(config)
    truth = mixture.score(build.truth(config), parts.process)
    copy = empirical.score(parts.splits.train.x, parts.process)
    score_fn = {"truth": truth, "empirical": copy}[who]
    monkeypatch.setattr(training, "score_fn", lambda *_: score_fn)
    weights = {"w": np.zeros((1, 1))}
    (row,) = ensemble._likelihoods(config, parts, weights, [parts], [config])
    assert row["unresolved"] == unresolved
    if who == "truth":
        gap = row["log_likelihood"] - row["truth_log_likelihood"]
        assert abs(gap) < 0.1


def test_the_likelihood_needs_a_known_truth(tmp_path):
    config = smoke()
    defaults.switch(config, data="digits")
    with pytest.raises(build.ConfigError, match="data.name=mixture has one"):
        experiments.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
