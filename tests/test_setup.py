"""A config becomes the objects it names, or one message with all that is wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from memsep_jax import data, defaults, process, sampling, score, train
from memsep_jax.experiments import setup
from memsep_jax.models import MLP


def small(**changes):
    """An MLP on a mixture: compiles in a second."""
    config = defaults.smoke(defaults.train())
    config.data.update(name="mixture", d=3)
    config.model.update(name="mlp")
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def parts():
    return setup.build(small())


def lines(config):
    with pytest.raises(setup.ConfigError) as caught:
        setup.build(config)
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
    expected = data.splits("mixture", num_examples=16, num_held_out=16, d=3)
    np.testing.assert_array_equal(parts.splits.train.x, expected.train.x)
    assert parts.splits.fingerprint == expected.fingerprint


def test_fields_are_arguments_and_none_is_the_default(parts):
    group = ConfigDict({"name": "beta", "a": 0.8, "b": 2.0, "t_max": None})
    law = setup.call(process.TIMES, group, "times")
    key = jax.random.key(3)
    assert law(key) == process.beta(0.8, 2.0)(key)
    group = ConfigDict({"name": "edm", "sigma_data": 2.0})
    made = setup.call(score.PREDICTIONS, group, "prediction", process=parts.process)
    t = jnp.float32(1.0)
    assert made.skip(t) == score.edm(parts.process, 2.0).skip(t)


def test_a_field_of_a_sibling_is_left_over_and_a_field_of_nobody_is_wrong():
    """log_uniform's t_min may stay when the law becomes log_normal; t_mim may not."""
    left_over = ConfigDict({"name": "log_normal", "mean": 0.0, "t_min": 1e-3})
    setup.call(process.TIMES, left_over, "times")
    wrong = ConfigDict({"name": "log_normal", "maen": 0.0})
    with pytest.raises(
        ValueError, match=r"times.maen .* log_normal, did you mean 'mean"
    ):
        setup.call(process.TIMES, wrong, "times")


def test_classes_are_counted_from_the_labels():
    config = small(**{"data.labels": "random", "data.num_labels": 5})
    config.data.num_examples = 40
    made = setup.build(config)
    assert made.num_classes == made.model.num_classes == 5
    assert made.splits.train.label.max() == 4


def test_keys_differ_by_name_and_by_seed():
    found = [tuple(jax.random.key_data(k).tolist()) for k in setup.keys(0)]
    again = [tuple(jax.random.key_data(k).tolist()) for k in setup.keys(0)]
    other = [tuple(jax.random.key_data(k).tolist()) for k in setup.keys(1)]
    assert found == again
    assert len({*found, *other}) == 2 * len(setup.Keys._fields)


def test_parameters_are_a_function_of_their_key(parts):
    key = setup.keys(0).init
    one, two = setup.init_params(parts, key), setup.init_params(parts, key)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(a, b)
    assert setup.count(one) == sum(p.size for p in jax.tree.leaves(one))


# The composition.


def test_the_score_of_a_new_network_is_that_of_zero(parts):
    """F = 0, so D = skip x: EDM's Gaussian prior."""
    params = setup.init_params(parts, jax.random.key(0))
    x, t = jnp.array([1.0, -2.0, 0.5]), jnp.float32(0.7)
    found = setup.score_fn(parts, params)(x, t)
    np.testing.assert_allclose(found, -x / (0.7**2 + 0.5**2), rtol=1e-5)


def test_the_loss_is_its_pieces_put_together(parts):
    config, key = small(), jax.random.key(4)
    params = setup.init_params(parts, jax.random.key(0))
    x0 = parts.splits.train.x[0]
    found = setup.loss(parts, config)(params, data.Dataset(x0), key)
    t_key, eps_key, *_ = jax.random.split(key, 4)
    t, eps = parts.law(t_key), jax.random.normal(eps_key, x0.shape)
    target = score.target(parts.prediction, parts.process, x0, t, eps)
    np.testing.assert_allclose(found, jnp.mean(target**2), rtol=1e-5)  # F = 0


def test_labels_are_dropped_as_often_as_asked():
    """The dropped label is num_classes, "no label"; the loss tells them apart."""
    config = small(**{"data.labels": "random", "data.num_labels": 2})
    config.train.label_drop = 0.25
    made = setup.build(config)
    seen = []

    class Spy:
        dropout = 0.0

        def apply(self, variables, x, level, label, gates=None):
            seen.append(label)
            return jnp.zeros_like(x) + label

    example = data.Dataset(made.splits.train.x[0], jnp.int32(1))
    loss = setup.loss(made._replace(model=Spy()), config)

    def label_of(key):
        loss({}, example, key)
        return seen[-1]

    labels = np.asarray(jax.vmap(label_of)(jax.random.split(jax.random.key(0), 2_000)))
    assert set(labels.tolist()) == {1, 2}
    assert abs((labels == 2).mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 2_000)


def test_dropout_takes_its_own_key():
    config = small(**{"model.dropout": 0.5})
    made = setup.build(config)
    params = setup.init_params(made, jax.random.key(0))
    params["output"]["kernel"] = jnp.ones_like(params["output"]["kernel"])
    x, level = jnp.ones(3), jnp.float32(0.1)

    def answer(key):
        return setup.network(made, params, key=key)(x, level)

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
            "model.name": "unet",
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
        "t_min=100.0, t_max=80.0",
        "memorization.threshold=1.5",
        "model.name='unet' is not known; choose one of dit, mlp",
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
        ("optimizer.lr", float("nan"), "optimizer.lr=nan"),
    ],
)
def test_a_wrong_number_is_named_with_its_rule(field, value, words):
    config = small(**{field: value})
    try:
        setup.build(config)
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
    text = "\n".join(setup.build(config).notes)
    for words in (
        "looks back 1,000 steps",
        "no held-out data",
        "2 training points rep",
        "n = 6 training points are fewer",
    ):
        assert words in text, words
    assert not setup.build(small(**{"train.ema_decay": 0.5})).notes


def test_a_config_as_json_is_plain():
    config = small()
    config.data.classes = (1, 2)
    plain = setup.to_json(config)
    assert plain["data"]["classes"] == [1, 2]
    assert plain["times"]["mean"] is None
    assert (
        setup.differences(plain, setup.to_json(config.copy_and_resolve_references()))
        == []
    )


def test_differences_are_leaves_by_name():
    old = {"a": {"b": 1, "c": [1]}, "d": None}
    new = {"a": {"b": 2, "c": [1]}, "e": 0}
    assert setup.differences(old, new) == [("a.b", 1, 2), ("e", None, 0)]


def test_did_you_mean_is_silent_where_nothing_is_close():
    assert setup.did_you_mean("sdg", train.OPTIMIZERS) == ", did you mean 'sgd'?"
    assert setup.did_you_mean("zzz", train.OPTIMIZERS) == ""
