"""A config becomes the objects it names, or one message with all that is wrong."""

import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from memsep_jax import data, defaults, parallel, process, sampling, score, train
from memsep_jax.checkpoint import ConflictError
from memsep_jax.experiments import record, training
from memsep_jax.experiments.config import build, grid, schema
from memsep_jax.experiments.runtime import points
from memsep_jax.experiments.runtime.session import Session
from memsep_jax.experiments.studies import networks
from memsep_jax.models import MLP


def small(**changes):
    """An MLP on a mixture: compiles in a second."""
    config = defaults.smoke(defaults.train())
    config.data.update(name="mixture", d=3, size=200)
    config.model.update(name="mlp")
    config.update_from_flattened_dict(changes)
    schema.leave_over(config, changes)
    return config


@pytest.fixture(scope="module")
def parts():
    return build.build(small())


@pytest.fixture(scope="module")
def params(parts):
    return training.init_params(parts, jax.random.key(0))


def lines(config):
    with pytest.raises(build.ConfigError) as caught:
        build.build(config)
    assert caught.value.exit_code == 2
    return str(caught.value).splitlines()


# What is built.


def test_the_objects_are_those_that_the_config_names(parts):
    made = process.variance_exploding()
    t, key = jnp.float32(0.3), jax.random.key(1)
    assert parts.process.sigma(t) == made.sigma(t)
    assert parts.law(key) == process.log_normal()(key)
    assert parts.prediction.out(t) == score.edm(made).out(t)
    assert parts.model == MLP(width=16, depth=1, num_classes=0)
    np.testing.assert_array_equal(parts.times, sampling.edm_times(0.002, 80.0, 2))
    expected = data.splits("mixture", num_examples=16, num_held_out=16, d=3, size=200)
    np.testing.assert_array_equal(parts.splits.train.x, expected.train.x)
    assert parts.splits.fingerprint == expected.fingerprint


def test_fields_are_arguments_and_none_is_the_default(parts):
    group = ConfigDict({"name": "beta", "a": 0.8, "b": 2.0, "t_max": None})
    law = build.call(process.TIMES, group, "times")
    key = jax.random.key(3)
    assert law(key) == process.beta(0.8, 2.0)(key)
    group = ConfigDict({"name": "edm", "sigma_data": 2.0})
    made = build.call(score.PREDICTIONS, group, "prediction", process=parts.process)
    t = jnp.float32(1.0)
    assert made.skip(t) == score.edm(parts.process, 2.0).skip(t)


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("model.patch", 8, "mlp; it takes depth, dropout, dtype, width"),
        ("times.t_min", 1e-3, "log_normal; it takes clock, mean, std"),
        (
            "times.maen",
            0.0,
            "log_normal, did you mean 'mean'?; it takes clock, me",
        ),
        ("process.beta_min", 0.1, "variance_exploding; it takes none"),
        ("data.path", "x.npz", "mixture; it takes balanced, classes,"),
    ],
)
def test_a_field_that_a_constructor_does_not_take_is_refused(field, value, words):
    (_, line) = lines(small(**{field: value}))
    assert line.strip().startswith(f"{field} is not an argument of {words}")


def test_another_name_leaves_the_fields_of_the_file_over():
    """But not those that are given with it, on a command line or in a sweep."""
    config = defaults.smoke(defaults.digits())
    grid.override(config, {"model.name": "mlp", "data.name": "mixture", "data.d": 3})
    assert build.build(config).model == MLP(width=16, depth=1, num_classes=0)
    assert build.to_json(config)["model"]["patch"] == 4  # kept, as older runs kept it
    grid.override(config, {"model.num_heads": 2})
    (_, line) = lines(config)
    assert "model.num_heads is not an argument of mlp" in line


def test_a_switch_clears_what_the_other_constructor_does_not_take():
    config = defaults.switch(defaults.cifar(), model="mlp", data="digits")
    assert (config.model.patch, config.model.num_heads) == (None, None)
    assert (config.model.width, config.model.dtype) == (384, "bfloat16")
    assert config.data.num_examples == 5_000
    own = defaults.switch(config, model="my_nets:Net").model
    assert own.name == "my_nets:Net" and "width" not in own


def test_classes_are_counted_from_the_labels():
    config = small(**{"data.labels": "random", "data.num_labels": 5})
    config.data.num_examples = 40
    made = build.build(config)
    assert made.num_classes == made.model.num_classes == 5
    assert made.splits.train.label.max() == 4


def test_a_class_that_only_held_out_points_have_is_counted():
    config = small(**{"data.name": "digits", "data.labels": "true"})
    config.data.update(classes=(0, 1, 2, 3), num_examples=2, num_held_out=60)
    made = build.build(config)
    assert made.splits.train.label.max() < 3 == made.splits.held_out.label.max()
    assert made.num_classes == 4


# How long.


@pytest.mark.parametrize(
    "epochs, n, duplicates, steps",
    [(3.0, 16, 0.0, 6), (3.0, 16, 0.5, 9), (0.75, 20, 0.0, 2), (0.01, 16, 0.0, 1)],
)
def test_epochs_are_passes_over_the_points_with_their_copies(
    epochs, n, duplicates, steps
):
    """round(epochs n / 8), at least 1."""
    config = small(**{"train.epochs": epochs, "data.num_examples": n})
    config.data.duplicates = duplicates
    assert build.build(config).steps == steps


def test_without_epochs_the_steps_are_those_of_the_config(parts):
    assert parts.steps == small().train.steps == 4


def test_a_warm_up_in_epochs_ends_after_them():
    """lr k / 32 at step k: 2 epochs are 32 steps of 8 of 128 points."""
    config = small(**{"train.epochs": 40.0, "train.warmup_epochs": 2.0})
    config.data.num_examples = 128
    config.optimizer.update(name="sgd", momentum=0.0, lr=0.64)
    made = build.build(config)
    assert made.steps == 640
    params = {"w": jnp.ones(2)}
    update, state = jax.jit(made.tx.update), made.tx.init(params)
    rates = []
    for _ in range(40):
        updates, state = update(params, state, params)
        rates.append(float(-updates["w"][0]))
    truth = 0.64 * np.minimum(np.arange(40) / 32, 1.0)
    np.testing.assert_allclose(rates, truth, rtol=1e-5)


def test_a_cosine_ends_with_the_last_epoch():
    config = small(**{"train.epochs": 10.0, "optimizer.schedule": "cosine"})
    config.optimizer.update(name="sgd", momentum=0.0, lr=0.5)
    made = build.build(config)
    params = {"w": jnp.ones(2)}
    update, state = jax.jit(made.tx.update), made.tx.init(params)
    rates = []
    for _ in range(made.steps + 1):
        updates, state = update(params, state, params)
        rates.append(float(-updates["w"][0]))
    truth = 0.25 * (1 + np.cos(np.pi * np.arange(21) / 20))
    np.testing.assert_allclose(rates, truth, atol=1e-6)


def decayed(x64, steps=4, **fields):
    """w0, w after some steps of a config's optimizer with decay 0.7, and its noises.

    The network is F = w, of 64 values, and its loss the mean of (w - eps)^2.
    """
    config = defaults.smoke(defaults.copying())
    config.optimizer.update(lr=0.1, weight_decay=0.7, clip=None, **fields)
    tx, made, key = build.build(config).tx, process.rectified_flow(), jax.random.key(1)
    w0, x0 = jnp.linspace(-1.0, 2.0, 64).reshape(8, 8, 1), jnp.zeros((2, 8, 8, 1))

    def loss(w, x0, key):
        eps = jax.random.normal(key, x0.shape)
        network, prediction = (lambda x, level: w), score.noise(made)
        return train.prediction_loss(network, prediction, made, x0, 0.5, eps)

    step, state = jax.jit(train.make_train_step(loss, tx, 0.9)), train.init(w0, tx)
    for _ in range(steps):
        state, _ = step(state, x0, key)
    noises = [
        [jax.random.normal(k, (8, 8, 1)) for k in train.example_keys(key, i, 2)]
        for i in range(steps)
    ]
    return np.asarray(w0), np.asarray(state.params), np.asarray(noises).mean(axis=1)


@pytest.mark.parametrize(
    "name, coupled, decoupled", [("adam", 0.7, 0), ("adamw", 0, 0.7)]
)
def test_coupled_decay_stands_beside_the_summed_error(name, coupled, decoupled, x64):
    """Adam, by hand, of sum (w - eps)^2 + 0.7 / 2 |w|^2; its eps is 64 times 1e-8."""
    w, found, noises = decayed(x64, name=name)
    m = v = 0.0
    for i, eps in enumerate(noises, 1):
        full = 2 * (w - eps) + coupled * w
        m, v = 0.9 * m + 0.1 * full, 0.999 * v + 0.001 * full**2
        adam = (m / (1 - 0.9**i)) / (np.sqrt(v / (1 - 0.999**i)) + 64e-8)
        w = w - 0.1 * (adam + decoupled * w)
    np.testing.assert_allclose(found, w, rtol=1e-9)


def test_the_rate_of_sgd_is_of_the_mean_and_its_decay_of_the_sum(x64):
    w, found, noises = decayed(x64, name="sgd", momentum=0.8)
    m = 0.0
    for eps in noises:
        m = 0.8 * m + 2 * (w - eps) + 0.7 * w
        w = w - 0.1 / 64 * m
    np.testing.assert_allclose(found, w, rtol=1e-9)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"train.epochs": 0.0}, "train.epochs=0.0 must be positive"),
        ({"train.epochs": float("inf")}, "train.epochs=inf must be a finite number"),
        (
            {"train.warmup_epochs": 1.0, "optimizer.warmup": 3},
            "optimizer.warmup=3 steps and train.warmup_epochs=1.0 both",
        ),
        (
            {
                "train.epochs": 1.0,
                "optimizer.schedule": "cosine",
                "optimizer.warmup": 2,
            },
            "optimizer.warmup=2 must be below the number of steps, 2,",
        ),
        ({"train.order": "sorted"}, "train.order=sorted must be one of reshuffled, f"),
        ({"train.ema_half_life": 0.0}, "train.ema_half_life=0.0 must be positive"),
        ({"train.ema_ramp": 0.05}, "train.ema_ramp=0.05 bounds train.ema_half_life"),
        ({"data.mix": 0.5}, "mix=0.5 of what"),
        (
            {"measure.features": "alexnet"},
            "measure.features=alexnet, measure.weights=None: alexnet sees images",
        ),
        (
            {"measure.features": "random_conv", "measure.weights": "alexnet.npz"},
            "measure.weights=alexnet.npz are of alexnet or inception",
        ),
        (
            {"data.skip": 190},
            "data.num_examples=16 after data.skip=190, but",
        ),
        (
            {"experiment": "lipschitz", "train.epochs": 3.0},
            "train.epochs=3.0: networks that are trained together",
        ),
        (
            {"experiment": "ensemble", "train.order": "fixed"},
            "train.order=fixed: networks that are trained together",
        ),
    ],
)
def test_what_training_cannot_do_is_refused(changes, words):
    found = lines(small(**changes))
    assert any(words in line for line in found), found


def test_a_second_source_is_not_fetched_for_a_wrong_config(monkeypatch):
    def fetch(name, mix_from=None, **arguments):
        assert mix_from is None, "fetched"
        return splits(name, **arguments)

    splits = data.splits
    monkeypatch.setattr(data, "splits", fetch)
    config = small(**{"data.mix": 0.5, "data.mix_from": "cifar10"})
    with pytest.raises(AssertionError, match="fetched"):
        build.build(config)
    config.optimizer.lr = 0.0
    assert any("optimizer.lr=0.0" in line for line in lines(config))


def test_a_mixed_law_is_not_known():
    config = small(**{"data.mix": 0.1, "data.mix_from": "more.npz"})
    with pytest.raises(build.ConfigError, match="data.name=mixture with data.mix=0.1"):
        build.truth(config)


def test_the_smoke_variant_of_epochs_has_epochs():
    config = defaults.train()
    config.train.update(epochs=40_000.0, warmup_epochs=200.0)
    config.data.name, config.model.name = "mixture", "mlp"
    made = build.build(defaults.smoke(config))
    assert made.steps == small().train.steps


def test_the_step_has_the_average_and_the_order_of_the_config():
    """The EMA of a ramp is, at the first step, the weights; two epochs are alike."""
    config = small(**{"train.ema_half_life": 100.0, "train.ema_ramp": 0.5})
    config.train.order = "fixed"
    config.optimizer.lr = 1e-9  # the weights stay, and so the loss but for its noise
    made = build.build(config)
    step = jax.jit(training.make_steps(config, made, parallel.make_mesh()))
    state = train.init(training.init_params(made, jax.random.key(0)), made.tx)
    state = state.replace(ema=jax.tree.map(jnp.ones_like, state.ema))
    rows_of = training.order(config, len(made.splits.train.x))
    after, _ = step(state, made.splits.train, rows_of(0)[None], 0, 1)
    for a, b in zip(
        jax.tree.leaves(after.ema), jax.tree.leaves(after.params), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    epoch = len(made.splits.train.x) // config.train.batch_size
    np.testing.assert_array_equal(rows_of(0), rows_of(epoch))
    config.train.order = "reshuffled"
    rows_of = training.order(config, len(made.splits.train.x))
    assert np.any(rows_of(0) != rows_of(epoch))


def refused_at(step):
    """A loss that is not finite at one step, whatever its batch is."""

    def make(parts, config):
        example_loss = loss(parts, config)

        def broken(params, example, key):
            bad = jnp.any(jnp.all(jax.random.key_data(key)[None] == keys, axis=1))
            return jnp.where(bad, jnp.nan, example_loss(params, example, key))

        return broken

    loss = training.loss
    keys = jax.random.key_data(train.example_keys(build.keys(0).train, step, 8))
    return make


@pytest.mark.parametrize("bad", [None, 3])
def test_several_steps_in_one_call_are_those_steps(bad, parts, params, monkeypatch):
    """Also where one is refused: from then on the state stands still."""
    if bad is not None:
        monkeypatch.setattr(training, "loss", refused_at(bad))
    config, mesh = small(), parallel.make_mesh()
    steps = jax.jit(training.make_steps(config, parts, mesh))
    points = parts.splits.train
    rows_of = training.order(config, len(points.x))
    rows = np.stack([rows_of(step) for step in range(6)])
    start = train.init(params, parts.tx)
    start = parallel.place(start, parallel.replicated(mesh))

    def taken(*counts):
        state, first = start, 0
        for count in counts:
            own = np.zeros_like(rows)
            own[:count] = rows[first : first + count]
            state, metrics = steps(state, points, own, first, count)
            first += count
        return state, metrics["loss"]

    one_by_one, last = taken(*6 * [1])
    assert int(one_by_one.step) == (6 if bad is None else bad)
    for counts in ((6,), (2, 3, 1), (4, 2)):
        state, loss = taken(*counts)
        for a, b in zip(
            jax.tree.leaves(state), jax.tree.leaves(one_by_one), strict=True
        ):
            np.testing.assert_array_equal(a, b)
        if bad is None:
            assert loss == last
    assert steps._cache_size() == 1


# What changes results.


STOPPED = ({"train.stop_gap": 0.1}, {"train.plateau": 2})


@pytest.mark.parametrize("rule", STOPPED)
def test_how_training_is_looked_at_counts_only_where_that_ends_it(rule, tmp_path):
    assert build.watched(small()) == {}
    found = build.watched(small(**rule))
    assert found["run.evaluate_every"] == 2 and found["sampler.steps"] == 2
    assert "run.log_every" not in found and "sampler.num_samples" not in found

    def changed(workdir, field, **rule):
        with Session(workdir, small(**rule)) as session:
            session.begin("")
        other = small(**rule, **{field: 3})
        complete = Session(workdir, other).is_complete()
        with Session(workdir, other):
            return complete

    looked, not_looked = "run.snapshot_samples", "run.log_every"
    assert changed(tmp_path / "a", looked) and changed(tmp_path / "b", not_looked)
    assert changed(tmp_path / "c", not_looked, **rule)
    with pytest.raises(ConflictError, match="run.snapshot_samples: 8 -> 3"):
        changed(tmp_path / "d", looked, **rule)


@pytest.mark.parametrize("rule", STOPPED)
def test_networks_and_points_are_shared_only_where_they_stop_alike(rule, tmp_path):
    def places(field="seed", value=0, **rule):
        config = small(**rule, **{field: value})
        (point, *_) = grid.points(config)
        return networks.folder(config, tmp_path), points.path_of(
            tmp_path, config, point
        )

    def shared(*change, **rule):
        pairs = zip(places(**rule), places(*change, **rule), strict=True)
        return [a == b for a, b in pairs]

    looked = "run.evaluate_every", 3
    assert shared(*looked) == shared("run.log_every", 3, **rule) == [True, True]
    assert shared(*looked, **rule) == [False, False]
    # What the rule looks at is sampled, but no more than a snapshot's samples.
    assert shared("sampler.steps", 9, **rule)[0] is False
    assert shared("sampler.steps", 9)[0] and shared("sampler.num_samples", 9, **rule)[0]
    (name,) = rule
    setting = {"sweep.setting": ("", f"{name}={rule[name]}")}
    assert shared(*looked, **setting) == [False, False]


def test_a_tag_without_such_a_rule_is_that_of_the_groups_alone():
    config = small()
    known = build.to_json(config)
    some = {name: known[name] for name in ("seed", *networks.TRAINING)}
    text = json.dumps(some, sort_keys=True)
    tag = hashlib.sha256(text.encode()).hexdigest()[:12]
    assert networks.tag(config, networks.TRAINING) == tag


def test_a_network_keeps_the_folder_of_an_earlier_version(tmp_path):
    """Its name was made without fields that came later, while they are not set."""
    config = small()
    known = build.to_json(config)
    some = {name: known[name] for name in ("seed", *networks.TRAINING)}
    for field in ("alpha", "crop", "exif"):
        del some["data"][field]
    text = json.dumps(some, sort_keys=True)
    tag = hashlib.sha256(text.encode()).hexdigest()[:12]
    former = tmp_path / "models" / f"seed={config.seed}-{tag}"
    today = networks.folder(config, tmp_path)
    former.mkdir(parents=True)
    assert networks.folder(config, tmp_path) == former != today
    config.data.crop = "center"
    assert networks.folder(config, tmp_path) not in (former, today)


def test_a_run_may_become_longer_in_epochs_and_not_shorter(tmp_path):
    with Session(tmp_path, small(**{"train.epochs": 3.0})) as session:
        session.begin("")
    for epochs in (2.0, None):
        with (
            pytest.raises(ConflictError, match=f"train.epochs: 3.0 -> {epochs}"),
            Session(tmp_path, small(**{"train.epochs": epochs})),
        ):
            pass
    with Session(tmp_path, small(**{"train.epochs": 4.0})):
        pass


def test_a_field_that_came_later_was_at_its_default(tmp_path):
    with Session(tmp_path, small()) as session:
        session.begin("")
    old = record.read_json(tmp_path / "config.json")
    del old["train"]["order"], old["data"]["mix"], old["prune_times"]
    record.write_json(tmp_path / "config.json", old)
    assert Session(tmp_path, small()).is_complete()
    with (
        pytest.raises(ConflictError, match="train.order: None -> fixed"),
        Session(tmp_path, small(**{"train.order": "fixed"})),
    ):
        pass


def test_keys_differ_by_name_and_by_seed():
    found = [tuple(jax.random.key_data(k).tolist()) for k in build.keys(0)]
    again = [tuple(jax.random.key_data(k).tolist()) for k in build.keys(0)]
    other = [tuple(jax.random.key_data(k).tolist()) for k in build.keys(1)]
    assert found == again
    assert len({*found, *other}) == 2 * len(build.Keys._fields)


def test_parameters_are_a_function_of_their_key(parts, params):
    again = training.init_params(parts, jax.random.key(0))
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    assert training.count(params) == sum(p.size for p in jax.tree.leaves(params))


# The composition.


def test_the_score_of_a_new_network_is_that_of_zero(parts, params):
    """F = 0, so D = skip x: EDM's Gaussian prior."""
    x, t = jnp.array([1.0, -2.0, 0.5]), jnp.float32(0.7)
    found = training.score_fn(parts, params)(x, t)
    np.testing.assert_allclose(found, -x / (0.7**2 + 0.5**2), rtol=1e-5)


def test_the_loss_is_its_pieces_put_together(parts, params):
    config, key = small(), jax.random.key(4)
    x0 = parts.splits.train.x[0]
    found = training.loss(parts, config)(params, data.Dataset(x0), key)
    t_key, eps_key, *_ = jax.random.split(key, 4)
    t, eps = parts.law(t_key), jax.random.normal(eps_key, x0.shape)
    target = score.target(parts.prediction, parts.process, x0, t, eps)
    np.testing.assert_allclose(found, jnp.mean(target**2), rtol=1e-5)  # F = 0


def test_labels_are_dropped_as_often_as_asked():
    """The dropped label is num_classes, "no label"; the loss tells them apart."""
    config = small(**{"data.labels": "random", "data.num_labels": 2})
    config.train.label_drop = 0.25
    made = build.build(config)
    seen = []

    class Spy:
        dropout = 0.0

        def apply(self, variables, x, level, label, gates=None):
            seen.append(label)
            return jnp.zeros_like(x) + label

    example = data.Dataset(made.splits.train.x[0], jnp.int32(1))
    loss = training.loss(made._replace(model=Spy()), config)

    def label_of(key):
        loss({}, example, key)
        return seen[-1]

    labels = np.asarray(jax.vmap(label_of)(jax.random.split(jax.random.key(0), 2_000)))
    assert set(labels.tolist()) == {1, 2}
    assert abs((labels == 2).mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 2_000)


def test_dropout_takes_its_own_key():
    config = small(**{"model.dropout": 0.5})
    made = build.build(config)
    params = training.init_params(made, jax.random.key(0))
    params["output"]["kernel"] = jnp.ones_like(params["output"]["kernel"])
    x, level = jnp.ones(3), jnp.float32(0.1)

    def answer(key):
        return training.network(made, params, key=key)(x, level)

    one, two = answer(jax.random.key(1)), answer(jax.random.key(2))
    assert jnp.any(one != two)
    np.testing.assert_array_equal(answer(None), answer(None))


# What is refused.


def test_every_violation_is_in_one_list():
    config = small(
        **{
            "process.name": "variance_exploring",
            "times.name": "gamma",
            "optimizer.lr": -1.0,
            "optimizer.clip": 0.0,
            "train.batch_size": 6,
            "train.ema_decay": 1.0,
            "sampler.name": "hen",
            "sampler.t_min": 100.0,
            "memorization.threshold": 1.5,
            "model.name": "cnn",
            "data.num_examples": 10**7,
        }
    )
    first, *found = lines(config)
    assert first == f"{len(found)} things in the config must change:"
    text = "\n".join(found)
    for words in (
        "process.name='variance_exploring' is not known, did you mean "
        "'variance_exploding'?",
        "times.name='gamma' is not known",
        "optimizer.lr=-1.0",
        "optimizer.clip=0.0",
        "train.batch_size=6 must be a multiple of 4 devices times train.accumulate=1",
        "train.ema_decay=1.0 must be in [0, 1)",
        "sampler.name='hen' is not known, did you mean 'heun'?",
        "sampler.t_min=100.0, sampler.t_max=80.0",
        "memorization.threshold=1.5",
        "model.name='cnn' is not known; choose one of dit, mlp, unet",
        "num_examples=10000000",
    ):
        assert words in text, words
    assert len(found) == 11


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("train.steps", 0, "train.steps=0 must be at least 1"),
        ("train.accumulate", 3, "times train.accumulate=3"),
        ("sampler.num_samples", 0, "sampler.num_samples=0"),
        ("sampler.weights", "raw_ema", "'ema' or 'raw'"),
        ("sampler.steps", 0, "steps=0"),
        ("memorization.near", 1, "memorization.near=1"),
        ("optimizer.schedule", "cosin", "optimizer.schedule='cosin'"),
        ("model.dropout", 1.0, "model.dropout=1.0"),
        ("prediction.name", "epsilon", "prediction.name='epsilon' is not known"),
        ("data.name", "digit", "data.name='digit' is not known, did you mean 'digits'"),
        ("data.labels", "true", "labels"),
        ("seed", -1, "seed=-1"),
        (
            "measure.features",
            "lpips",
            "measure.features=lpips must be one of random_conv",
        ),
        ("optimizer.lr", float("nan"), "optimizer.lr=nan"),
    ],
)
def test_a_wrong_number_is_named_with_its_rule(field, value, words):
    config = small(**{field: value})
    try:
        build.build(config)
    except ValueError as error:  # of the data: exit code 3
        assert words in str(error)
    else:
        pytest.fail("it was built")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"patch": 3, "num_heads": 4}, "model.patch=3 must divide the image, 8x8"),
        ({"patch": 4, "num_heads": 3}, "model.num_heads=3 must divide model.width=16"),
    ],
)
def test_a_network_that_does_not_fit_the_data_is_refused(changes, words):
    config = defaults.smoke(defaults.train())
    config.model.update(changes)
    assert any(words in line for line in lines(config))


def test_nothing_is_fetched_for_a_config_that_is_wrong(monkeypatch):
    def fetch(*args, **kwargs):
        raise AssertionError("fetched")

    monkeypatch.setattr(data, "splits", fetch)
    found = lines(small(**{"data.name": "cifar10", "optimizer.lr": 0.0}))
    assert any("optimizer.lr=0.0" in line for line in found)


def test_one_distinct_point_is_too_few():
    found = lines(small(**{"data.num_examples": 1}))
    assert any("two distinct training points and got 1" in line for line in found)


# What is worth saying.


def test_notes_say_what_a_person_should_know():
    config = small(**{"train.ema_decay": 0.999, "data.num_examples": 4})
    config.data.update(num_held_out=0, duplicates=0.5, copies=1)
    text = "\n".join(build.build(config).notes)
    for words in (
        "looks back 1,000 steps",
        "no held-out data",
        "2 training points rep",
        "n = 6 training points are fewer",
    ):
        assert words in text, words
    assert not build.build(small(**{"train.ema_decay": 0.5})).notes


@pytest.mark.parametrize(
    "changes, horizon",
    [
        ({"train.ema_half_life": 80.0}, 15),  # 1 / (1 - 2^(-8/80)) = 14.9
        ({"train.ema_half_life": 80.0, "train.ema_ramp": 0.5}, None),
        ({"train.ema_half_life": 8.0}, None),
        ({"train.ema_half_life": 80.0, "train.epochs": 10.0}, None),  # 20 steps
    ],
)
def test_the_note_on_the_average_is_on_the_one_in_force(changes, horizon):
    found = [n for n in build.build(small(**changes)).notes if "EMA" in n]
    assert [n.split(" steps")[0] for n in found] == (
        [f"the EMA looks back {horizon}"] if horizon else []
    )


def test_a_config_as_json_is_plain():
    config = small()
    config.data.classes = (1, 2)
    plain = build.to_json(config)
    assert plain["data"]["classes"] == [1, 2]
    assert plain["times"]["mean"] is None
    assert (
        build.differences(plain, build.to_json(config.copy_and_resolve_references()))
        == []
    )


def test_differences_are_leaves_by_name():
    old = {"a": {"b": 1, "c": [1]}, "d": None}
    new = {"a": {"b": 2, "c": [1]}, "e": 0}
    assert build.differences(old, new) == [("a.b", 1, 2), ("e", None, 0)]


def test_did_you_mean_is_silent_where_nothing_is_close():
    assert build.did_you_mean("sdg", train.OPTIMIZERS) == ", did you mean 'sgd'?"
    assert build.did_you_mean("zzz", train.OPTIMIZERS) == ""
