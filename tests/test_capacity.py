"""The smallest network for the empirical score and for the true one."""

import contextlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import gmm_capacity as configs
from memsep_jax import defaults, empirical, experiments, gap, mixture, process
from memsep_jax.experiments import record
from memsep_jax.experiments.config import build, grid
from memsep_jax.experiments.studies import capacity
from memsep_jax.models import exact

OU = process.ornstein_uhlenbeck()


def test_the_run_says_what_suffices_and_what_was_measured(tmp_path, undrawn):
    config = configs.get_config("smoke")
    config.sweep.update(seeds=1, width=(4,))
    config.measure.times = (0.1,)
    experiments.run(config, tmp_path)
    metrics = record.read_json(tmp_path / "metrics.json")
    # By construction: n d numbers, K d + 1, and no error but rounding.
    d, k = config.data.d, config.data.k
    for row, n in zip(metrics["exact"], config.sweep.num_examples, strict=True):
        assert row["num_examples"] == n
        assert row["empirical_numbers"] == n * d and row["true_numbers"] == k * d + 1
        assert row["empirical_error"] < 1e-5 and row["true_error"] < 1e-5
    assert len(metrics["table"]) == 2 and len(metrics["smallest"]) == 2 * 2
    for row in metrics["table"]:
        for target in capacity.TARGETS:
            assert np.all(np.array(row[f"{target}_error"]["mean"]) > 0)
    for name in ("error_0", "smallest_width"):
        assert (tmp_path / "figures" / f"{name}.png").exists()


def test_a_network_learns_the_score_of_its_own_target():
    """Errors far below those of no network: |s|^2, about d / v for either target."""
    config = configs.get_config("smoke")
    config.optimizer.update(warmup=10, lr=1e-2)
    config.train.update(steps=400, batch_size=64)
    config.model.update(width=32)
    config.sweep.update(num_examples=(4,), width=(32,), seeds=1)
    config.measure.update(times=(0.1, 1.0), draws=500)
    config.run.update(log_every=200)
    session = types.SimpleNamespace(phase=lambda name: contextlib.nullcontext())
    (row,) = capacity.measure(grid.points(config), session)
    v = -np.expm1(-np.array(config.measure.times))
    for target in capacity.TARGETS:
        error = row[f"{target}_error"]
        assert np.all(error < 0.1 * config.data.d / v), target
    # Each against the score of the other would be off by the loss gap.
    truth, parts = build.truth(config), build.build(config)
    off = gap.loss_gap(truth, parts.splits.train.x[:4], OU, 0.1, jax.random.key(0))
    assert row["empirical_error"][0] < off / 3
    assert row["true_error"][0] < off / 3


def test_both_targets_are_one_padded_network(x64):
    """Keys of no weight change nothing: the closed forms to rounding."""
    data = jax.random.normal(jax.random.key(0), (5, 3))
    truth = mixture.separated(jax.random.key(1), 4, 3)
    x, t = jnp.array([0.3, -1.0, 0.5]), jnp.asarray(0.2)
    for params, score_fn in (
        (exact.empirical_params(data), empirical.score(data, OU)),
        (exact.mixture_params(truth), mixture.score(truth, OU)),
    ):
        target = capacity._padded(params, 9)
        task = capacity.Tasks(data, jnp.asarray(5), t, target, None)
        found = jax.jit(capacity._teacher(OU, task))(x, t)
        np.testing.assert_allclose(found, jax.jit(score_fn)(x, t), rtol=1e-10)


def test_the_smallest_width_is_the_first_below_the_theorems_error():
    """eps / sigma^4 and eps / sigma^2, with sigma = 1/2: 1.6 and 0.4."""
    errors = {8: (2.0, 1.0), 16: (1.7, 1.3), 32: (0.5, 0.3)}  # of two seeds
    rows = [
        {
            "num_examples": np.asarray(7),
            "width": np.asarray(width),
            "seed": np.asarray(seed),
            "empirical_error": np.array([error]),
            "true_error": np.array([error]),
        }
        for width, of_seeds in errors.items()
        for seed, error in enumerate(of_seeds)
    ]
    found = capacity.smallest(rows, 0.1, np.array([0.5]), [0.3])
    same = {"t": 0.3, "num_examples": 7}
    assert found == [
        {"target": "empirical", "width": 8, "by_seed": [32, 8]} | same,
        {"target": "true", "width": 32, "by_seed": [None, 32]} | same,
    ]
    none = capacity.smallest(rows, 1e-3, np.array([0.5]), [0.3])
    assert [row["width"] for row in none] == [None, None]


def test_what_has_no_exact_network_is_refused_and_leaves_nothing(tmp_path):
    cases = (
        (lambda c: defaults.switch(c, data="digits"), "data.name=mixture has one"),
        (lambda c: c.data.update(law="low_rank"), "data.law=low_rank: .* low-rank"),
        (lambda c: c.sweep.update(width=()), "sweep.width=.*at least one value"),
    )
    for change, message in cases:
        config = configs.get_config("smoke")
        change(config)
        with pytest.raises(build.ConfigError, match=message):
            experiments.run(config, tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_boxes_have_no_exact_network_and_no_axis_but_two_is_swept():
    config = configs.get_config("smoke")
    config.data.law = "boxes"
    with pytest.raises(build.ConfigError, match="data.law=boxes: capacity needs"):
        capacity._true_params(config)
    config.sweep.depth = (1, 2)
    with pytest.raises(build.ConfigError, match="sweep.depth=.*no other axis"):
        capacity._check_axes(config)


def test_a_time_without_a_score_is_refused(tmp_path):
    config = configs.get_config("smoke")
    config.process.name = "rectified_flow"
    config.times.update(t_max=0.9)
    config.sampler.update(t_max=0.9)
    config.measure.update(times=(0.5, 1.0))
    with pytest.raises(build.ConfigError, match=r"measure.times\[1\]=1 is outside"):
        experiments.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
