"""A user's own network is called with what it takes, and answers as one of ours."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from memsep_jax.models import MLP, own

X, T = jnp.array([0.5, -1.0, 2.0]), jnp.array(0.3)


def linear(key, x, t):
    return {"w": jax.random.normal(key, (x.size, x.size))}


def product(params, x, t):
    return t * params["w"] @ x


class Bridged(nnx.Module):
    """A layer and dropout, with a stream of its own."""

    def __init__(self, shape, rngs):
        self.layer = nnx.Linear(*shape, *shape, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x, t, train=False):
        return self.layer(self.drop(t * x, deterministic=not train))


class Stateful(nn.Module):
    @nn.compact
    def __call__(self, x, t):
        return nn.BatchNorm(use_running_average=False)(x)


class Half(nn.Module):
    @nn.compact
    def __call__(self, x, t):
        return nn.Dense(x.size)(x).astype("bfloat16")


class Constant(nn.Module):
    def __call__(self, x, t):
        return x


def test_a_module_of_linen_answers_as_by_itself(key):
    module = MLP(width=8, depth=1, num_classes=2, dropout=0.5)
    mine, label = own.network(module), jnp.array(1)
    params = jax.jit(module.init)(key, X, T, label)
    made = jax.jit(mine.init)(key, X, T, label)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, made, params))
    options = {"train": True, "rngs": {"dropout": key}}
    ours = jax.jit(functools.partial(module.apply, **options))(params, X, T, label)
    its = jax.jit(functools.partial(mine.apply, **options))(params, X, T, label)
    assert jnp.array_equal(ours, its)


def test_a_pair_of_functions_is_a_network(key):
    network = own.network((linear, product))
    own.check(network, X.shape)
    params = network.init(key, X, T)
    assert jnp.array_equal(params["params"]["w"], linear(key, X, T)["w"])
    # A label and a key that it does not name are not for it.
    answer = network.apply(
        params, X, T, jnp.array(1), train=True, rngs={"dropout": key}
    )
    assert jnp.array_equal(answer, product(params["params"], X, T))
    assert not network.takes and not network.dropout


def test_a_pair_is_given_the_options_that_it_names(key):
    def apply(params, x, t, label, key=None):
        return label * x if key is None else x

    network = own.network((linear, apply))
    assert network.takes == {"label", "key"} and network.dropout
    call = functools.partial(network.apply, {"params": {}}, X, T, 2.0)
    assert jnp.array_equal(call(), 2 * X)
    assert jnp.array_equal(call(train=True, rngs={"dropout": key}), X)


def test_a_class_of_nnx_has_its_parameters_from_the_key(key):
    network = own.network(own.constructor(Bridged)(shape=X.shape))
    own.check(network, X.shape)
    one, other = (jax.jit(network.init)(k, X, T) for k in jax.random.split(key))
    assert not jnp.array_equal(*(p["params"]["layer"]["kernel"] for p in (one, other)))
    layer, apply = (
        one["params"]["layer"],
        jax.jit(network.apply, static_argnames="train"),
    )
    still = apply(one, X, T)
    assert jnp.allclose(still, T * X @ layer["kernel"] + layer["bias"], rtol=1e-5)
    a, b = (
        apply(one, X, T, train=True, rngs={"dropout": jax.random.key(seed)})
        for seed in (0, 1)
    )
    assert not jnp.array_equal(a, b)  # another key, another dropout


@pytest.mark.parametrize(
    "made, words",
    [
        ({}, "makes dict: a network is"),
        ((linear,), "makes tuple: a network is"),
        ((lambda key: {}, product), r"has init\(key\): it must take \(key, x, t\)"),
        (
            (linear, lambda params, x: x),
            r"it must take \(params, x, t\) of one example",
        ),
        ((linear, lambda p, x, t, c: x), r"has apply\(p, x, t, c\): it must take"),
        ((linear, lambda p, x, t: (x, t)), "makes tuple of x float32"),
        (
            (lambda *_: {"w": jnp.ones((3, 3), int)}, product),
            r"parameter \['w'\] of type int32",
        ),
        (Half(), r"makes bfloat16\[3\] of x float32\[3\]: the answer must have"),
        (Constant(), "has no parameters: there is nothing to train"),
        (Stateful(), "keeps batch_stats beside its parameters"),
    ],
)
def test_what_is_no_network_is_refused(made, words):
    with pytest.raises(own.NetworkError, match=words):
        own.check(own.network(made), X.shape)
