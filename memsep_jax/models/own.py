"""A user's own network, called as those of the package are.

The least contract is (x, t) of one example. Parameters come by flax.linen, by flax.nnx
through its bridge, or by two functions, init(key, x, t) and apply(params, x, t).
"""

import inspect
import sys
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from memsep_jax.keys import BRANCH

# What a call is given beside x and t, each only where the signature names it.
OPTIONS = ("label", "gates", "train", "key")


class NetworkError(TypeError):
    """What a user gave is no network, or answers otherwise than one must."""


class Network(NamedTuple):
    """A network with the `init` and `apply` that the modules of flax.linen have.

    `init`: (key, x, t, label=None) -> {"params": params}.
    `apply`: ({"params": params}, x, t, label, gates, train, rngs) -> [*e].
    """

    init: Callable
    apply: Callable
    takes: frozenset[str]  # those of OPTIONS that its call has
    dropout: bool  # whether it is called otherwise in training: with train or a key


def constructor(found):
    """What a user's file has under a name, as a function that makes a network.

    A class of flax.nnx makes its parameters with the object: its bridge to flax.linen
    makes them from a key instead, and hands them out.
    """
    nnx = sys.modules.get("flax.nnx")  # a class of it has imported it
    if not (nnx and inspect.isclass(found) and issubclass(found, nnx.Module)):
        return found
    # Of __init__: that of the class itself is (*args, **kwargs).
    _, *known = inspect.signature(found.__init__).parameters.values()
    fields = [one for one in known if one.name != "rngs"]

    def bridged(**given):
        without_keys = len(fields) == len(known)
        return nnx.bridge.ToLinen(found, kwargs=given, skip_rng=without_keys)

    bridged.__signature__ = inspect.Signature(fields)  # what a config reads
    return bridged


def check_constructor(found):
    """Refuses a function that is the network itself.   Raises: NetworkError."""
    known = inspect.signature(found).parameters.values()
    needed = [one.name for one in known if one.default is one.empty]
    if {"x", "t"} <= {*needed}:
        raise NetworkError(
            f"is called as ({', '.join(needed)}), as a network is: name a function "
            "that returns the network, such as the pair (init, apply), or a class"
        )


def network(made) -> Network:
    """The network that a user's constructor has returned.

    Raises: NetworkError: it is none of the three, or its call does not take (x, t).
    """
    is_pair = isinstance(made, tuple) and len(made) == 2 and all(map(callable, made))
    if not is_pair and not isinstance(made, nn.Module):
        raise NetworkError(
            f"makes {type(made).__name__}: a network is a module of flax.linen, a "
            "class of flax.nnx (named itself, not made by a function), or a pair of "
            "functions (init, apply)"
        )
    if is_pair:
        _taken(made[0], "init", "(key, x, t)", ())
        takes = _taken(made[1], "apply", "(params, x, t)")
    else:
        # A bridge takes anything, and hands it on to the class behind it.
        of = getattr(made, "nnx_class", type(made))
        takes = _taken(of.__call__, "__call__", "(x, t)")
    pair = made if is_pair else _pair(made)

    def init(key, x, t, label=None):
        # The pair of a module needs the label, which may have parameters of its own.
        given = {} if is_pair else _given(takes, label=label)
        return {"params": pair[0](key, x, t, **given)}

    def apply(variables, x, t, label=None, gates=None, train=False, rngs=None, **flax):
        key = (rngs or {}).get("dropout")
        given = _given(takes, label=label, gates=gates, train=train, key=key)
        if not is_pair:
            given |= flax | {"rngs": rngs}
        answer = pair[1](variables["params"], x, t, **given)
        # Functions keep no intermediates, and answer as a module that keeps none.
        return (answer, {}) if is_pair and flax.get("mutable") else answer

    return Network(init, apply, takes, not takes.isdisjoint({"train", "key"}))


def check(model: Network, shape, num_classes: int = 0):
    """Traces a network once, as sampling and training call it; computes nothing.

    Raises: NetworkError: parameters that cannot be trained, an answer unlike x; and
      whatever the network itself raises.
    """

    def call(key, x, t, label):
        variables = model.init(key, x, t, label)
        answers = [model.apply(variables, x, t, label)]
        if model.dropout:
            rngs = {"dropout": key}
            answers += [model.apply(variables, x, t, label, train=True, rngs=rngs)]
        return variables["params"], answers

    x, label = jnp.zeros(shape), jnp.zeros((), jnp.int32) if num_classes else None
    params, answers = jax.eval_shape(call, jax.random.key(0), x, jnp.zeros(()), label)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not leaves:
        raise NetworkError("has no parameters: there is nothing to train")
    for path, leaf in leaves:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise NetworkError(
                f"has the parameter {jax.tree_util.keystr(path)} of type {leaf.dtype}: "
                "parameters are floats; make other arrays in the call"
            )
    for answer in answers:
        if not isinstance(answer, jax.ShapeDtypeStruct):
            made = type(answer).__name__
        elif (answer.shape, answer.dtype) != (x.shape, x.dtype):
            made = _described(answer)
        else:
            continue
        raise NetworkError(
            f"makes {made} of x {_described(x)}: the answer must have the shape and "
            "the type of x, as a loss would broadcast another one"
        )


def _described(array):
    return f"{array.dtype}{list(array.shape)}"


def _pair(module):
    """A module of flax.linen as init(key, x, t) -> params and apply(params, x, t)."""

    def init(key, x, t, **given):
        if hasattr(module, "nnx_class"):  # a dropout wants a stream when it is made
            key = {"params": key, "default": jax.random.fold_in(key, BRANCH)}
        variables = module.init(key, x, t, **given)
        state = sorted(variables.keys() - {"params", "intermediates"})
        if state:
            raise NetworkError(
                f"keeps {', '.join(state)} beside its parameters, which nothing would "
                "update: take a layer without state, such as a group norm"
            )
        return nn.unbox(variables.get("params", {}))

    def apply(params, x, t, **given):
        return module.apply({"params": params}, x, t, **given)

    return init, apply


def _taken(call, what, least, options=OPTIONS):
    """Those of the options that a call names.

    Raises: NetworkError: it does not take what every network is given.
    """
    signature = inspect.signature(call)
    takes = frozenset(options) & signature.parameters.keys()
    try:  # key, params or self, and x and t
        signature.bind(None, None, None, **dict.fromkeys(takes))
    except TypeError as error:
        raise NetworkError(
            f"has {what}{signature}: it must take {least} of one example"
            + (f", and may take {', '.join(options)} by name" if options else "")
        ) from error
    return takes


def _given(takes, **options):
    return {name: value for name, value in options.items() if name in takes}
