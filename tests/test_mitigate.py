"""Mitigations on one frontier: settings, shared networks, matched comparisons."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import mitigate_digits
from memsep_jax import analytic, checkpoint, defaults, experiments, sampling
from memsep_jax.experiments import record, training
from memsep_jax.experiments.config import build, grid
from memsep_jax.experiments.runtime.session import Session
from memsep_jax.experiments.studies import mitigate, monitor, networks, store
from memsep_jax.experiments.studies import training_run as job
from memsep_jax.memorization import membership


def smoke(**changes):
    config = mitigate_digits.get_config("smoke")
    config.update_from_flattened_dict(changes)
    return config


# Settings.


def test_a_setting_sets_its_fields_and_the_empty_one_none():
    config = smoke()
    config.sweep.setting = ("", "model.dropout=0.5; prune.criterion=random")
    plain, changed = grid.points(config)
    assert build.to_json(plain.config)["model"] == build.to_json(config)["model"]
    assert changed.config.model.dropout == 0.5
    assert changed.config.prune.criterion == "random"


@pytest.mark.parametrize(
    "setting, message",
    [
        ("dropout=0.5", "dropout is not a field of the config"),
        ("model.drop=0.5", "model.drop is not a field"),
        ("model.width=wide", "sweep.setting='model.width=wide'"),
        ("prune.ratio=1.5", "prune.ratio=1.5 must be in"),
    ],
)
def test_a_setting_that_cannot_be_is_named(setting, message, tmp_path):
    config = smoke()
    config.sweep.setting = ("", setting)
    with pytest.raises(build.ConfigError, match=message):
        experiments.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "setting, found",
    [
        ("prune.ratio=0.2", ("pruned: small_t", "0.2")),
        ("prune.criterion=random; prune.ratio=0.4", ("pruned: random", "0.4")),
        (
            "prune.ratio=0.4; prune.group=neurons",
            ("pruned: small_t, neurons", "0.4"),
        ),
        ("model.dropout=0.2", ("model.dropout", "0.2")),
        ("times.name=beta; times.a=0.5; times.b=0.5", ("times", "beta, 0.5, 0.5")),
    ],
)
def test_a_family_is_what_is_done_and_its_value_how_much(setting, found):
    assert mitigate.family(setting) == found


@pytest.mark.parametrize(
    "setting, shared",
    [
        ("prune.ratio=0.4; prune.criterion=random", True),
        ("prune.ratio=0.2; prune_times.a=2.0", False),
        ("prune.ratio=0.2; prune.group=neurons", False),
        ("sampler.steps=3", False),
        ("model.dropout=0.2", False),
    ],
)
def test_points_share_measurements_only_where_nothing_else_differs(setting, shared):
    config = smoke()
    config.sweep.setting = ("prune.ratio=0.2", setting)
    first, second = map(mitigate._alike, grid.points(config))
    assert (first == second) == shared


# The frontier.


def test_the_frontier_is_the_fewest_copies_at_a_quality_or_better():
    least = mitigate.frontier([3.0, 1.0, 2.0, 4.0], [0.5, 0.9, 0.4, 0.6])
    np.testing.assert_array_equal(
        least(np.array([0.5, 1.0, 1.5, 2.0, 3.0, 9.0])),
        [np.inf, 0.9, 0.9, 0.4, 0.4, 0.4],
    )


def test_the_advantage_is_the_copies_saved_at_equal_quality():
    ours, theirs = (
        np.array([[1.0, 2.0], [0.5, 0.3]]),
        np.array([[1.0, 2.0], [0.7, 0.4]]),
    )
    assert mitigate.advantage(ours, theirs) == pytest.approx((0.2 + 0.1) / 2)
    assert mitigate.advantage(theirs, ours) == pytest.approx(-0.15)


clouds = st.lists(
    st.tuples(st.floats(0, 10), st.floats(0, 1)), min_size=1, max_size=8
).map(lambda rows: np.array(rows).T)


@given(clouds, clouds, st.floats(0.01, 1))
def test_fewer_copies_everywhere_is_that_advantage(cloud, other, less):
    """Antisymmetric, 0 against itself, and as large as a shift of all points."""
    assert mitigate.advantage(cloud, cloud) == 0
    assert mitigate.advantage(cloud, other) == pytest.approx(
        -mitigate.advantage(other, cloud)
    )
    shifted = cloud - np.array([[0.0], [less]])
    assert mitigate.advantage(shifted, cloud) == pytest.approx(less)


def test_every_criterion_is_matched_with_random_in_its_own_seed():
    """Small_t copies .1 less in one seed and .3 less in the other: .2 in the mean."""
    rows = []
    for seed, less in ((0, 0.1), (1, 0.3)):
        for criterion, own in (("random", 0.0), ("small_t", less)):
            rows.append(
                {
                    "setting": np.array(f"prune.criterion={criterion}; prune.ratio=.2"),
                    "seed": np.array(seed),
                    "along_frechet": np.array([1.0, 2.0]) + 5 * seed,
                    "along_ratio": np.array([0.8, 0.6]) - own,
                }
            )
    (found,) = mitigate.matched(rows)
    assert found["name"] == "pruned: small_t"
    assert found["ratio"]["mean"] == pytest.approx(0.2)
    assert found["ratio"]["low"] < 0.2 < found["ratio"]["high"]
    assert mitigate.matched(rows[:1]) == mitigate.matched(rows[1:2]) == []


def test_quality_is_compared_with_the_control_of_the_same_seed():
    rows = [
        {"setting": np.array(name), "seed": np.array(seed), "frechet": np.array(value)}
        | {"tuned_frechet": np.array(value + 1)}
        for name, seed, value in [
            ("", 0, 2.0), ("", 1, 5.0), ("model.dropout=0.1", 0, 3.0),
            ("model.dropout=0.1", 1, 4.5),
        ]
    ]  # fmt: skip
    mitigate._compare(rows)
    assert [row["frechet_rise"] for row in rows] == [0, 0, 1.0, -0.5]
    assert [row["tuned_frechet_rise"] for row in rows] == [1, 1, 2.0, 0.5]


def test_the_u_shaped_times_of_the_config_are_few_in_the_middle():
    """Beta(.5, .5) on the clock of a rectified flow: the arcsine law of u."""
    config = smoke()
    config.sweep.points = ({}, defaults.U_SHAPED)
    law = build.build(grid.points(config)[-1].config).law
    t = np.asarray(jax.vmap(law)(jax.random.split(jax.random.key(0), 4_000)))
    u = t / (1 + t) / 0.98
    for level in (0.1, 0.5, 0.9):
        share = 2 / np.pi * np.arcsin(np.sqrt(level))
        assert abs(np.mean(u < level) - share) < 4 * np.sqrt(share * (1 - share) / 4e3)


# Who was in the training set.


def test_what_is_given_away_is_the_highest_auc_of_the_loss():
    values = np.random.default_rng(0).normal(size=(60, 3))
    values[:30, 1] -= 2
    curve = membership.curve_of(
        [0.1, 0.2, 0.3], membership.Statistics(*[values] * 4, None), 30
    )
    best = membership.separation(values[:30, 1], values[30:, 1]).auc
    assert monitor.given_away(curve) == best > 0.8
    values[0, 1] = np.inf  # that level says nothing
    curve = membership.curve_of(
        [0.1, 0.2, 0.3], membership.Statistics(*[values] * 4, None), 30
    )
    assert np.isnan(curve.loss.auc[1]) and np.isnan(curve.loss.interval[1]).all()
    assert monitor.given_away(curve) == max(curve.loss.auc[[0, 2]]) < 0.6
    assert np.isnan(monitor.given_away(None))


def test_membership_is_of_the_first_points_and_the_weights(monkeypatch):
    """What `membership.curve` finds; nothing where a held-out point was trained on."""
    monkeypatch.setattr(monitor, "MEMBERS", 6)
    config = smoke(**{"model.depth": 1})
    parts, said = build.build(config), []
    weights = training.init_params(parts, jax.random.key(0))
    found = monitor.make_membership(config, parts, said.append)(weights)
    splits = parts.splits
    truth = membership.curve(
        training.score_fn(parts, weights), parts.process,
        np.asarray(splits.train.x[:6]), np.asarray(splits.held_out.x[:6]),
        monitor.levels(config), build.keys(config.seed).evaluate, monitor.DRAWS,
    )  # fmt: skip
    for name in ("loss", "pia", "secmi", "by_complexity"):
        # Rounding may turn a pair around, of 36.
        got, want = getattr(found, name).auc, getattr(truth, name).auc
        np.testing.assert_allclose(got, want, atol=2 / 36 + 1e-9)
        assert np.median(np.abs(got - want)) == 0
    twice = splits._replace(held_out=splits.train)
    given = monitor.members_found(
        config, parts._replace(splits=twice), weights, said.append
    )
    assert given == {} and "6 non-members are members" in said[0] and len(said) == 1


def test_membership_of_a_label_is_of_the_guided_score():
    config = smoke(
        **{
            "data.labels": "true", "train.label_drop": 0.1, "model.depth": 1,
            "sampler.guidance": 2.0,
        }
    )  # fmt: skip
    parts = build.build(config)
    splits, weights = parts.splits, training.init_params(parts, jax.random.key(0))
    # Untrained networks answer 0 to every label.
    keys = jax.random.split(jax.random.key(1), len(jax.tree.leaves(weights)))
    leaves, tree = jax.tree.flatten(weights)
    moved = [w + 0.1 * jax.random.normal(k, w.shape) for w, k in zip(leaves, keys)]  # noqa: B905
    weights = jax.tree.unflatten(tree, moved)
    found, count = monitor.make_statistics(config, parts, most=4)
    kept = np.isin(splits.held_out.label, splits.train.label)
    x = np.concatenate([splits.train.x[:count], splits.held_out.x[kept][:count]])
    label = np.concatenate(
        [splits.train.label[:count], splits.held_out.label[kept][:count]]
    )
    keys = jax.random.split(build.keys(config.seed).evaluate, 2 * count)
    truth = [
        membership.statistics(
            training.sampled_score(config, parts, weights, jnp.int32(label[i])),
            parts.process, x[i], monitor.levels(config), keys[i], monitor.DRAWS,
            simple=analytic.gaussian(x, parts.process),
        ).loss
        for i in range(2 * count)
    ]  # fmt: skip
    np.testing.assert_allclose(found(weights).loss, np.stack(truth), rtol=1e-4)
    # Another label, and no guidance, are other losses.
    config.sampler.guidance = None
    plain = monitor.make_statistics(config, parts, most=4)[0](weights)
    assert not np.allclose(plain.loss, np.stack(truth), rtol=2e-3)
    unlabelled = splits._replace(held_out=splits.held_out._replace(label=None))
    given = parts._replace(splits=unlabelled)
    assert monitor.make_membership(config, given)(weights) is None


# The re-test.


@pytest.mark.parametrize("reach, found, null", [("all", 1, 1), ("train", 1, 0)])
def test_what_a_search_reproduces_is_found(reach, found, null):
    """A search that gives its targets back, or only those that were trained on."""
    config = smoke(**{"measure.targets": 4})
    parts = build.build(config)

    def find(weights, targets, keys):
        targets = np.asarray(targets)
        first = np.asarray(parts.splits.train.x)[0]
        kept = np.arange(len(targets)) < (4 if reach == "train" else 8)
        return np.where(kept[:, None, None, None], targets, first[None])

    row = mitigate.search(config, parts, None, find)
    counts = {"found_of": 4, "found_null_of": 4}
    assert row == {"found": found, "found_null": null} | counts


# The whole, at a small size.


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("mitigate") / "run"
    experiments.run(smoke(), workdir)
    return workdir


def test_a_search_in_short_calls_is_the_search(monkeypatch):
    """A round a call: what `sampling.search_noise` finds at once."""
    monkeypatch.setattr(record, "CALL", 0.0)
    config = smoke(**{"measure.search": 3, "model.depth": 1})
    parts = build.build(config)
    weights = training.init_params(parts, jax.random.key(0))
    targets, keys = parts.splits.train.x[:2], jax.random.split(jax.random.key(1), 2)
    flow = sampling.ode(
        training.score_fn(parts, weights), parts.process, parts.times,
        config.sampler.name,
    )  # fmt: skip
    radius = float(parts.process.sigma(parts.times[0])) * targets[0].size ** 0.5

    @jax.jit
    def at_once(target, key):
        return flow(sampling.search_noise(flow, target, radius, 3)(key))

    found = mitigate.finder(config, parts)(weights, targets, keys)
    for one, target, key in zip(found, targets, keys, strict=True):
        np.testing.assert_allclose(one, at_once(target, key), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_what_is_only_pruned_shares_a_network(done):
    """The control and the pruned point have one; dropout trains its own."""
    assert len(list((done / "models").iterdir())) == 2
    rows = record.read_json(done / "metrics.json")["table"]
    control, dropout, pruned = rows
    assert [r["removed"]["mean"] for r in rows] == [0, 0, 1]
    assert pruned["parameters"]["mean"] < control["parameters"]["mean"]
    assert len(control["steps"]["mean"]) == len(pruned["steps"]["mean"]) > 1
    assert len(dropout["steps"]["mean"]) == 1  # as it was trained
    for row in rows:
        for name in ("ratio", "emitted", "membership", "found", "again_emitted"):
            assert 0 <= row[name]["mean"] <= 1
        assert row["emitted_more"]["mean"] >= 0


@pytest.mark.slow
def test_a_sweep_that_goes_on_trains_nothing_again(done, monkeypatch):
    monkeypatch.setattr(job, "learn", None)
    before = (done / "metrics.json").read_text()
    config = smoke(**{"run.chunk": 16})
    config.sweep.points = config.sweep.points[:2]  # points that are there
    experiments.run(config, done)
    assert len(record.read_json(done / "metrics.json")["table"]) == 2
    (done / "metrics.json").write_text(before)


@pytest.mark.slow
def test_a_network_may_come_from_another_run(done, tmp_path, monkeypatch):
    """A workdir or a packed file: the same weights, and nothing is trained."""
    (model, *_) = (
        path
        for path in (done / "models").iterdir()
        if path.name == networks.name(grid.seeded(smoke(), 0))
    )
    config = smoke(**{"measure.targets": 0})
    config.sweep.setting = ("",)
    parts = build.build(config)
    record.write_json(model / "run.json", {"fingerprint": parts.splits.fingerprint})
    state, step = checkpoint.restore_newest(
        model / "checkpoints", job.initial_state(config, parts)
    )
    store.pack(tmp_path / "state.npz", step, state, parts)
    monkeypatch.setattr(job, "learn", None)
    for source in (model, tmp_path / "state.npz"):
        config.prune.source = str(source)
        found = mitigate._source(config, parts)
        assert checkpoint.digest(found) == checkpoint.digest(state)

    other = smoke(**{"prune.source": str(model), "model.width": 32})
    with pytest.raises(checkpoint.ConflictError, match="block_0/.*expected") as error:
        experiments.run(other, tmp_path / "run")
    assert error.value.exit_code == 2 and not (tmp_path / "run").exists()
    for source in (model, tmp_path / "state.npz"):
        other = smoke(**{"prune.source": str(source), "data.seed": 5})
        with pytest.raises(checkpoint.ConflictError, match="trained on other data"):
            experiments.run(other, tmp_path / "run")
    other = smoke(**{"prune.source": str(tmp_path / "nowhere")})
    with pytest.raises(build.ConfigError, match="nowhere holds no checkpoints"):
        experiments.run(other, tmp_path / "run")


def test_a_packed_state_goes_on_on_another_machine(tmp_path):
    """Half a run here, the rest in a fresh workdir: bitwise the uninterrupted run."""
    config = defaults.smoke(defaults.mixtures())
    config.data.update(d=2, k=2, size=100)
    config.optimizer.update(schedule="constant")
    config.run.update(pack=str(tmp_path / "state.npz"), snapshots=0)
    config.run.evaluate_every = 100  # never: its program is not this test's
    digests = []
    for name, steps in (("here", 2), ("there", 4)):
        config.train.steps = steps
        with Session(tmp_path / name, config) as session:
            state = job.learn(config, build.build(config), session)
        assert int(state.step) == steps
        digests.append(checkpoint.digest(state))
    config.run.pack = None
    with Session(tmp_path / "whole", config) as session:
        whole = job.learn(config, build.build(config), session)
    assert checkpoint.digest(whole) == digests[1]
