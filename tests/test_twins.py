"""Twins share weights, keys and noises, and no training point."""

from types import SimpleNamespace

import numpy as np
import pytest

from configs import twins_digits
from memsep_jax import data, experiments
from memsep_jax.experiments.config import build, grid
from memsep_jax.experiments.runtime.session import Session
from memsep_jax.experiments.studies import networks, training_run, twins


def smoke(**changes):
    config = twins_digits.get_config("smoke")
    config.update_from_flattened_dict(changes)
    return config


def test_twins_have_equally_many_points_and_none_in_common():
    (point,) = grid.points(smoke(**{"sweep.num_examples": (60,)}))
    configs = twins.halves(point.config)
    a, b = (np.asarray(build.build(c).splits.train.x).reshape(60, -1) for c in configs)
    assert len(np.unique(np.concatenate([a, b]), axis=0)) == 120
    assert configs[0].seed == configs[1].seed
    changed = build.differences(*map(build.to_json, configs))
    assert changed == [("data.skip", 0, 60)]


def test_twins_are_sampled_from_the_same_noises(tmp_path, monkeypatch):
    """Weights that are the same, whatever they were trained on, draw the same."""
    config, asked = smoke(**{"sampler.num_samples": 12}), []

    def untrained(config, parts, session, generate):
        asked.append((config.data.skip, config.data.num_examples, config.seed))
        return training_run.initial_state(config, parts)

    monkeypatch.setattr(networks, "trained", untrained)
    with Session(tmp_path, config) as session:
        (row,) = twins.measure(grid.points(config), session)
    assert asked == [(0, 16, 0), (16, 16, 0)]
    assert row["share"] == 1 and row["share_null"] == 0
    assert row["cosine"] == pytest.approx(1) and row["cosine_null"] < 0.9
    assert row["share_low"] < 1


def fake(points, held_out=None):
    held_out = None if held_out is None else data.Dataset(held_out)
    return SimpleNamespace(
        splits=SimpleNamespace(train=data.Dataset(points), held_out=held_out)
    )


PIXELS = {"": lambda x: x.reshape(len(x), -1).astype(float)}


def test_twins_that_copy_are_like_their_own_points_not_each_other():
    rng = np.random.default_rng(0)
    a, b, new = rng.normal(size=(3, 40, 20)).astype(np.float32)
    held_out = rng.normal(size=(30, 20)).astype(np.float32)
    copies = twins.compare(a, b, fake(a, held_out), fake(b, held_out), 1 / 3, PIXELS)
    assert copies["ratio"] == 1 and copies["own"] == pytest.approx(1)
    assert copies["share"] == 0 and abs(copies["cosine"]) < 0.2
    assert copies["null"] == 0
    # Those that generalize: the same new samples, and no copies.
    agree = twins.compare(new, new, fake(a, new), fake(b, new), 1 / 3, PIXELS)
    assert agree["share"] == 1 and agree["cosine"] == pytest.approx(1)
    assert agree["ratio"] == 0 and agree["own"] < 0.8
    assert agree["frechet"] < 0.5 < copies["frechet"]
    # Each space has its own distance, which is a squared length.
    spaces = PIXELS | {"half_": lambda x: PIXELS[""](x) / 2}
    both = twins.compare(a, b, fake(a, held_out), fake(b, held_out), 1 / 3, spaces)
    assert both["half_frechet"] == pytest.approx(copies["frechet"] / 4)
    assert both["frechet"] == copies["frechet"]
    # The ratio is the mean of both twins; without held-out points no null level.
    half = twins.compare(a, new, fake(a), fake(b), 1 / 3, PIXELS)
    assert (half["ratio_first"], half["ratio_second"], half["ratio"]) == (1, 0, 0.5)
    assert np.isnan(half["null"]) and np.isnan(half["frechet"])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sweep.num_examples": ()}, r"sweep.num_examples=\(\) has no value"),
        ({"data.skip": 3}, "data.skip=3: twins skips"),
        # The pool has 1,781: enough for one half, and not for both.
        ({"sweep.num_examples": (16, 1_000)}, "1000.*skip"),
    ],
)
def test_halves_that_cannot_be_are_refused_before_training(changes, message, tmp_path):
    with pytest.raises(build.ConfigError, match=message):
        experiments.run(smoke(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()
