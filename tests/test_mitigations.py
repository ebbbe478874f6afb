"""Every mitigation is a switch of the config: off, it is not there; on, it is it."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memsep_jax import checkpoint, data, defaults, experiments, parallel
from memsep_jax.experiments import record, training
from memsep_jax.experiments.config import build
from memsep_jax.experiments.runtime.session import Interrupted, Session
from memsep_jax.experiments.studies import monitor
from memsep_jax.experiments.studies import training_run as job

SMOOTHED = {"train.temperature": 3.0}
AMBIENT = {"train.ambient": 0.3}
STOPPING = {"train.stop_gap": 0.15}


def small(**changes):
    """An MLP that overfits 16 points in the plane, some of them twice, in 60 steps."""
    config = defaults.smoke(defaults.train())
    config.data.update(name="mixture", d=2, k=2, size=500)
    config.data.update(duplicates=0.5, num_held_out=64)
    config.model.update(name="mlp", width=64, depth=1)
    config.optimizer.update(lr=1e-2)
    config.train.update(steps=60, batch_size=16, ema_decay=0.8)
    config.run.update(
        log_every=10, save_every=10, evaluate_every=10, evaluate_points=64, snapshots=0
    )
    config.update_from_flattened_dict(changes)
    return config


def learn(config, workdir):
    """Trains in a workdir, to the end or until a signal.   Returns: the state."""
    with Session(workdir, config) as session:
        return job.learn(config, build.build(config), session)


def rows(workdir):
    """metrics.jsonl, without its speeds."""
    found = record.read_metrics(workdir / "metrics.jsonl")
    return [{k: v for k, v in r.items() if k != "steps_per_second"} for r in found]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, all_undrawn):
    """The workdir of a whole run that stopped early."""
    workdir = tmp_path_factory.mktemp("stopped") / "run"
    experiments.run(small(**STOPPING), workdir)
    return workdir


# What the network is asked for.


def losses(config, parts=None, example=None):
    """At 16 keys, of a fresh network: mean squares of the targets alone."""
    parts = parts or build.build(config)
    params = training.init_params(parts, jax.random.key(0))
    example = example or jax.tree.map(lambda a: a[3], parts.splits.train)
    loss = jax.jit(jax.vmap(training.loss(parts, config), (None, None, 0)))
    return loss(params, example, jax.random.split(jax.random.key(1), 16))


def test_targets_are_smoothed_within_a_class():
    """A point alone has its own mean; all points have the label that was dropped."""
    fields = {"data.labels": "unique", "data.duplicates": 0.0, "times.mean": 1.0}
    fields["train.label_drop"] = 0.5
    ordinary, smooth = losses(small(**fields)), losses(small(**fields, **SMOOTHED))
    same = np.isclose(smooth, ordinary, rtol=1e-4)
    assert 3 <= same.sum() <= 13  # of 16, each with probability 1/2


def test_mirrored_points_are_among_those_that_are_averaged():
    """At little noise the mean is the point itself, mirrored or not."""
    config = defaults.smoke(defaults.train())
    config.model.update(name="mlp")
    config.times.update(mean=-4.0, std=0.01)
    config.train.flip = True
    parts = build.build(config)
    mirrored = data.Dataset(parts.splits.train.x[3][:, ::-1])
    ordinary = losses(config, parts, mirrored)
    config.train.temperature = 1.0
    np.testing.assert_allclose(losses(config, parts, mirrored), ordinary, rtol=1e-4)


def test_noisy_copies_belong_to_the_data_and_not_to_the_seed():
    """A point that occurs twice, in a run of any seed, has one noisy copy."""
    config = small(**AMBIENT, **{"times.mean": 1.0})
    parts = build.build(config)
    x = parts.splits.train.x
    first = losses(config, parts, data.Dataset(x[0]))
    config.seed = 5
    twice = losses(config, parts, data.Dataset(x[16]))
    np.testing.assert_array_equal(first, twice)
    ordinary = losses(small(), parts, data.Dataset(x[0]))
    assert not np.isclose(first, ordinary, rtol=1e-4).all()


def test_a_train_step_has_the_data_as_an_argument():
    """The mean of points that are all one point is that point."""
    smooth, parts = small(**SMOOTHED), build.build(small())
    state, (x, _) = job.initial_state(smooth, parts), parts.splits.train
    one = data.Dataset(jnp.broadcast_to(x[:1], x.shape))
    steps = [
        jax.jit(training.make_step(config, parts, parallel.make_mesh()))
        for config in (smooth, small())
    ]
    batch = data.Dataset(x[:8])
    for points, same in ((one, True), (parts.splits.train, False)):
        own = one if same else batch
        values = [
            step(state, data.Dataset(own.x[:8]), points)[1]["loss"] for step in steps
        ]
        assert np.isclose(*values, rtol=1e-5) == same


def test_repeated_points_can_be_removed():
    once = build.build(small(**{"data.deduplicate": True})).splits
    plain = build.build(small(**{"data.duplicates": 0.0})).splits
    assert len(once.train.x) == 16 and once.fingerprint == plain.fingerprint


# Early stopping.


def test_training_ends_at_the_first_evaluation_beyond_the_gap(stopped):
    found = rows(stopped)
    step = found[-1]["step"]
    assert 10 < step < 60
    means = [
        (np.mean(row["train_losses"]), np.mean(row["held_out_losses"])) for row in found
    ]
    beyond = [held_out - seen > 0.15 * held_out for seen, held_out in means]
    assert beyond == [False] * (len(found) - 1) + [True]
    assert checkpoint.steps(stopped / "checkpoints")[-1] == step
    metrics = record.read_json(stopped / "metrics.json")
    assert metrics["model"]["steps"] == step
    assert metrics["levels"]["train"] == found[-1]["train_losses"]
    assert (stopped / "report.html").exists()


def test_a_run_that_stopped_does_not_train_on(stopped, tmp_path, capsys):
    workdir, config = tmp_path / "run", small(**STOPPING)
    shutil.copytree(stopped, workdir)
    before = rows(workdir)
    step = before[-1]["step"]
    experiments.run(config, workdir)
    assert "already complete" in capsys.readouterr().out
    digests = set()
    for config.train.steps in (60, 80):  # killed in its evaluation; asked for more
        digests.add(checkpoint.digest(learn(config, workdir)))
        assert f"stopped early at step {step}: the held-out" in capsys.readouterr().out
    # The last checkpoint lost: trained again, to the same end.
    shutil.rmtree(workdir / "checkpoints" / str(step))
    digests.add(checkpoint.digest(learn(config, workdir)))
    assert len(digests) == 1 and rows(workdir) == before


def test_a_signal_at_the_evaluation_that_ends_it_changes_nothing(
    stopped, tmp_path, monkeypatch
):
    config = small(**STOPPING)
    last = rows(stopped)[-1]
    look, looks = monitor.Monitor.losses, []

    def interrupted(self, params):
        looks.append(params)
        if len(looks) == last["step"] // 10:
            self.session.stop = 15
        return look(self, params)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(monitor.Monitor, "losses", interrupted)
        learn(config, tmp_path)
    assert rows(tmp_path)[-1]["step"] < last["step"]
    state = learn(config, tmp_path)
    assert int(state.step) == last["step"]
    whole = checkpoint.restore_newest(stopped / "checkpoints", state)[0]
    assert checkpoint.digest(state) == checkpoint.digest(whole)
    assert rows(tmp_path)[-1]["held_out_losses"] == last["held_out_losses"]


def test_the_gap_is_a_share_of_the_held_out_loss(tmp_path):
    """(3 + 1) / 2 is 3/5 above (0.8 + 0.8) / 2, where losses were measured."""
    metrics = record.Metrics(tmp_path / "metrics.jsonl", 0)
    both = {"train_losses": [0.8, 0.8], "held_out_losses": [3.0, 1.0]}
    metrics.write(step=20, **both)
    metrics.write(step=30, loss=1.0)
    metrics.write(step=60, **both)

    def ends(step, gap):
        changed = small(**{"train.stop_gap": gap})
        return monitor.early_stop(changed, tmp_path, step, 60)

    assert "stopped early at step 20" in ends(20, 0.59)
    assert ends(20, 0.61) is None and ends(20, None) is None
    assert ends(30, 0.0) is None
    assert ends(60, 0.0) is None  # the last step is no early one


def test_training_ends_where_the_higher_of_both_ratios_has_not_risen(tmp_path):
    """.5 by raw weights, then for two snapshots nothing whose bound is above it."""
    metrics = record.Metrics(tmp_path / "metrics.jsonl", 0)
    low = {"raw_ratio": 0.1, "raw_ratio_interval": [0.05, 0.2]}
    for step, ratio, lower in ((10, 0.5, 0.4), (20, 0.6, 0.45), (30, 0.5, 0.4)):
        row = {"ratio": ratio, "ratio_interval": [lower, 0.7]}
        metrics.write(step=step, **row, **low)
    metrics.write(step=40, loss=1.0)  # nothing was looked at

    def ends(step, patience):
        changed = small(**{"train.plateau": patience})
        return monitor.early_stop(changed, tmp_path, step, 60)

    assert "stopped early at step 30: the memorization ratio, 0.5, has" in ends(30, 2)
    assert ends(20, 2) is None and ends(40, 2) is None and ends(30, None) is None
    assert ends(20, 1) is not None  # the bound, .45, is not above .5
    both = {"ratio": 0.0, "ratio_interval": [0.0, 0.1]}
    raw = {"raw_ratio": 0.9, "raw_ratio_interval": [0.85, 0.95]}
    metrics.write(step=50, **both, **raw)
    assert ends(50, 1) is None  # raw weights still rise
    metrics.write(step=60, **both, **raw)
    assert ends(60, 1) is None  # the last step is no early one


# What is refused.


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"train.temperature": 0.0}, "train.temperature=0.0 must be positive"),
        ({"train.ambient": -1.0}, "train.ambient=-1.0 must be positive"),
        ({"train.stop_gap": 1.0}, r"train.stop_gap=1.0 must be in \[0, 1\)"),
        (
            {"train.temperature": 2.0, "train.ambient": 0.2},
            "train.temperature=2.0, train.ambient=0.2: .* give one of them",
        ),
        (
            {"process.name": "rectified_flow", "train.ambient": 1.5},
            "train.ambient=1.5 is outside of process rectified_flow",
        ),
        (
            {"train.stop_gap": 0.1, "data.num_held_out": 0},
            "train.stop_gap=0.1 needs held-out data.* raise data.num_held_out",
        ),
        (
            {"train.stop_gap": 0.1, "data.labels": "unique"},
            "train.stop_gap=0.1 .* no labels under data.labels=unique",
        ),
        (
            {"experiment": "ensemble", "train.temperature": 2.0},
            "train.temperature=2.0: networks that are trained together",
        ),
        (
            {"experiment": "ensemble", "train.stop_gap": 0.1},
            "train.stop_gap=0.1: networks that are trained together",
        ),
    ],
)
def test_what_has_no_meaning_is_refused_before_anything_is_compiled(changes, words):
    with pytest.raises(build.ConfigError, match=words):
        build.build(small(**changes))
