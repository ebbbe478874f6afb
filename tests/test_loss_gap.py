"""Experiment loss_gap: its numbers are those of `gap`, and a run goes on."""

import csv
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import gmm_loss_gap
from memsep_jax import defaults, empirical, experiments, gap, mixture, process
from memsep_jax.experiments import record
from memsep_jax.experiments.config import build, grid
from memsep_jax.experiments.studies import loss_gap

OU = process.ornstein_uhlenbeck()


def tiny():
    config = gmm_loss_gap.get_config("smoke")
    config.data.update(k=2, size=100)
    config.sweep.update(d=(3,), num_examples=(8,))
    config.measure.update(draws=40, times=(0.01, 0.5))
    return config


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("loss_gap")
    experiments.run(tiny(), path)
    return path


def kept(workdir):
    return sorted((workdir / "points").rglob("*.npz"))


def test_a_run_leaves_numbers_and_pictures(workdir):
    assert record.read_json(workdir / "run.json")["status"] == "complete"
    metrics = record.read_json(workdir / "metrics.json")
    assert [(row["d"], row["seeds"]) for row in metrics["table"]] == [(3, 2)]
    assert len(kept(workdir)) == 2
    for name in ("loss_gap", "collapse", "floors"):
        assert (workdir / "figures" / f"{name}.png").stat().st_size > 10_000
    with open(workdir / "ratio.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["d"], row["times"]) for row in rows] == [("3", "0.01"), ("3", "0.5")]
    points = record.read_points(workdir, metrics)
    means = np.mean([p["ratio"] for p in points], axis=0)
    np.testing.assert_allclose([float(row["ratio"]) for row in rows], means, 1e-6)


def test_the_numbers_are_those_of_the_functions_at_the_prompt(workdir):
    point = next(p for p in grid.points(tiny()) if p.name.endswith("d=3,seed=1"))
    (path,) = (workdir / "points").rglob(f"{point.name}.npz")
    row = record.read_npz(path)
    data = jnp.asarray(build.build(point.config).splits.train.x)
    truth, t, m = build.truth(point.config), 0.5, 40
    key = jax.random.split(build.keys(point.config.seed).evaluate)[0]
    key, _ = jax.random.split(jax.random.fold_in(key, 1))  # of times[1]

    @jax.jit
    def direct(key):
        x, _ = gap.noised(key, data, OU, t, m)
        weights = jax.vmap(lambda x: empirical.posterior_weights(data, OU, x, t))(x)
        both = gap.sides(truth, data, OU, t, key, m)
        return both, gap.floor(empirical.score(data, OU), OU, x, t), weights

    both, floor, weights = direct(key)
    at = {name: value[1] for name, value in row.items() if value.shape == (2,)}
    same = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    same(at["gap"], both.fisher.value)
    same(at["loss_side"], both.losses.value)
    same(at["difference_error"], both.difference.error)
    same(at["floor_empirical"], floor.value)
    same(at["largest"], jnp.mean(jnp.max(weights, axis=1)))
    same(at["ratio"], at["gap"] / (3 / np.expm1(t)))  # Sigma = I: d / (e^t - 1)
    same(row["collapse_time"], -np.log(1 - (8 / 2) ** (-2 / 3)))


def test_a_lost_point_is_done_again_and_the_others_are_not(workdir, undrawn):
    before = {path: path.stat().st_mtime_ns for path in kept(workdir)}
    lost = kept(workdir)[1]
    numbers = record.read_npz(lost)
    lost.unlink()
    status = record.read_json(workdir / "run.json")
    record.write_json(workdir / "run.json", status | {"status": "interrupted"})
    experiments.run(tiny(), workdir)
    after = {path: path.stat().st_mtime_ns for path in kept(workdir)}
    assert [path for path in before if before[path] != after[path]] == [lost]
    again = record.read_npz(lost)
    assert again.keys() == numbers.keys()
    for name, value in numbers.items():
        np.testing.assert_array_equal(again[name], value)


def test_the_gap_is_saturated_before_the_collapse_and_gone_after():
    """And its time integral is twice what the KL divergence lost."""
    d, n, times = 32, 100, jnp.geomspace(0.05, 8.0, 12)
    truth = mixture.separated(jax.random.key(0), 2, d)
    data = mixture.sample(jax.random.key(1), truth, n)
    look = jax.jit(functools.partial(loss_gap.curves, process=OU, m=400))
    found = look(truth, data, times, jax.random.key(2))
    scaled = times / gap.collapse_time(n, 2, d, OU)
    early, late = scaled < 0.3, scaled > 3
    assert early.sum() > 3 and late.sum() > 0
    np.testing.assert_allclose(found["ratio"][early], 1, atol=0.05)
    np.testing.assert_allclose(found["largest"][early], 1, atol=1e-3)
    np.testing.assert_allclose(found["ratio"][late], 0, atol=0.03)
    least, error = found["floor_empirical"], found["floor_empirical_error"]
    assert (abs(least[early]) < 4 * error[early]).all()
    both = jnp.hypot(error, found["floor_truth_error"])
    assert (abs(least - found["floor_truth"])[late] < 4 * both[late]).all()
    assert abs(found["integral"] / found["twice_kl"] - 1) < 0.02
    bound = gap.information_bound(jnp.ones(d), OU, times[0], n)
    assert bound < found["integral"] + found["remaining"] < 2 * bound


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"name": "digits"}, "data.name=mixture has one"),
        ({"law": "boxes"}, "separated"),
    ],
)
def test_a_truth_without_closed_form_is_refused_and_leaves_nothing(
    data, message, tmp_path
):
    config = gmm_loss_gap.get_config("smoke")
    if "name" in data:
        config.sweep.d = ()  # an axis that only a mixture has
        defaults.switch(config, data=data["name"])
    config.data.update(data)
    with pytest.raises(build.ConfigError, match=message):
        experiments.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
