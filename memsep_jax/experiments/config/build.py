"""A config becomes objects: every violation is reported at once, before compilation.

The rules of single fields are in schema, those of several in checks, and a group with a
name becomes an object in construct.
"""

import contextlib
import inspect
import json
import math
import sys
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from memsep_jax import data, features, process, sampling, score, train
from memsep_jax.data import sources
from memsep_jax.experiments.config import checks, schema
from memsep_jax.experiments.config.checks import EPOCHS, sampling_options
from memsep_jax.experiments.config.construct import (
    ConfigError,
    arguments,
    call,
    check_given,
    check_made,
    given_to,
    is_own,
    look_up,
    naming,
    untaken,
)
from memsep_jax.experiments.config.schema import ORDERS, did_you_mean
from memsep_jax.models import MODELS, own

__all__ = [
    "MODELS", "ORDERS", "ConfigError", "Keys", "Parts", "build", "call", "check",
    "check_kinds", "did_you_mean", "differences", "ema_decay", "extractor", "has_truth",
    "is_own", "keys", "lengths", "look_up", "optimizer", "sampling_options", "splits",
    "to_json", "truth", "watched",
]  # fmt: skip


class Parts(NamedTuple):
    """All that a config describes, ready to be composed."""

    process: process.Process
    law: Callable  # (key) -> t []
    prediction: score.Prediction
    model: Any
    tx: Any  # optax.GradientTransformation
    times: jax.Array  # the sampler's grid
    splits: data.Splits
    num_classes: int
    steps: int  # of training
    notes: list[str]  # what a person should know before the run


class Keys(NamedTuple):
    """The keys of a run: its seed, split once by name."""

    init: jax.Array
    data: jax.Array
    train: jax.Array
    sample: jax.Array
    evaluate: jax.Array
    prune: jax.Array


SAMPLERS = (*sampling.ODE_METHODS, "sde", "edm")


def keys(seed: int) -> Keys:
    """The keys of a run."""
    return Keys(*jax.random.split(jax.random.key(seed), len(Keys._fields)))


def check(config):
    """Checks what must be right before a sweep is laid out, or anything is built.

    Raises: ConfigError.
    """
    if "model" in config and (missing := schema.missing(config)):
        raise ConfigError("\n".join(missing))
    check_kinds(config)
    # For a single training, `build` says this with all the rest.
    if "model" in config and config.get("experiment") != "train":
        # Now, as points are made of these values before any of them is built.
        _refuse(schema.broken_rules(config, "sweep"))


def check_kinds(config):
    """Refuses values of another type than their fields.   Raises: ConfigError."""
    _refuse(schema.wrong_kinds(config))


def _refuse(lines):
    if lines:
        raise ConfigError("\n".join(lines))


def build(config, read=sources.source) -> Parts:
    """All objects of a config.

    Args: read, the reader of the data, or `sources.at_hand`.
    Raises:
      ConfigError: with every violation, a line each.
      data.DataError: data that cannot be read, where the config itself is right.
    """
    _refuse(schema.missing(config))  # first, as all checks read these fields
    check_kinds(config)
    attempt = _Attempts()
    attempt(_refuse, [*schema.unknown(config), *schema.broken_rules(config)])
    attempt(_refuse, _untaken(config))
    made_process = attempt(call, process.PROCESSES, config.process, "process")
    law = attempt(_law, config.times, made_process)
    attempt(call, process.TIMES, config.prune_times, "prune_times")
    prediction = made_process and attempt(
        call, score.PREDICTIONS, config.prediction, "prediction", process=made_process
    )
    attempt(checks.lengths, config.train, config.optimizer)
    in_epochs = any(config.train[field] is not None for field in EPOCHS)
    # Epochs become steps once n is known: until then, no end and no warm-up.
    steps, warmup = (schema.MOST_STEPS, 0) if in_epochs else lengths(config)
    # Its arguments are checked now; it is made once the shape of an example is known.
    tx = attempt(optimizer, config, (), steps, warmup=warmup)
    times = _sampler(attempt, config, made_process, law)
    attempt(checks.batch, config, jax.device_count())

    splits = None
    # Nothing is downloaded for a config that is refused, and no absurd size is read.
    remote = {config.data.name, config.data.get("mix_from")} & {*sources.REMOTE}
    if not (attempt.wrong and remote) and not schema.broken_rules(config, "data"):
        try:
            splits = attempt(_splits, config.data, read)
        except data.DataError:
            # What is wrong in the config comes first: it may be why reading failed.
            if not attempt.wrong:
                raise
    num_classes = _num_classes(splits)
    # Without points, their shape alone: the network is still checked against it.
    shape = splits.train.x.shape[1:] if splits else _shape(config.data)
    if splits is not None and not attempt.wrong:
        steps, warmup = lengths(config, len(splits.train.x))
        tx = attempt(optimizer, config, shape, steps, warmup=warmup)
    model = attempt(_model, config.model, num_classes, shape)
    if model is not None and shape is not None:
        attempt(_check_shape, config.model, model, shape, num_classes)
    if shape is not None and not attempt.wrong:
        attempt(extractor, config, shape)
    attempt(checks.mitigations, config, splits, num_classes)
    if splits is not None:
        attempt(checks.guidance, config, num_classes)
    if splits is not None and isinstance(splits.train.x, data.Rows):
        attempt(checks.stream, config)
    if model is not None and shape is not None and not attempt.wrong:
        attempt(checks.pruning, config.prune, model, shape, num_classes)
    attempt(checks.two_points, splits)
    if wrong := attempt.wrong:
        raise ConfigError(
            f"{len(wrong)} thing{'s' * (len(wrong) > 1)} in the config must change:\n"
            + "\n".join(f"  {line}" for line in wrong)
        )
    assert prediction and times is not None and splits  # nothing is wrong
    return Parts(
        made_process, law, prediction, model, tx, times, splits, num_classes, steps,
        _notes(config, splits, steps),
    )  # fmt: skip


class _Attempts:
    """Calls functions, and collects the lines of what they refuse."""

    def __init__(self):
        self.wrong: list[str] = []

    def __call__(self, make, *args, **kwargs):
        """make(*args, **kwargs), or None where it was refused."""
        try:
            return make(*args, **kwargs)
        except data.DataError:  # the files are wrong, and not the config
            raise
        except (ValueError, TypeError) as error:
            self.wrong.extend(str(error).splitlines())
            return None


def splits(config, read=sources.source) -> data.Splits:
    """The points of a config alone; runs no code but that of a user's own data.

    Raises: ConfigError, data.DataError: as `build`.
    """
    check_kinds(config)
    _refuse(schema.broken_rules(config, "data"))
    try:
        return _splits(config.data, read)
    except data.DataError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error)) from error


def lengths(config, n: int = 0) -> tuple[int, int]:
    """Steps of training and of its warm-up on n points, with copies.

    An epoch is n / train.batch_size steps: the points of every n are seen as often.
    """
    steps, warmup = config.train.steps, config.optimizer.get("warmup", 0)
    if not n:
        return steps, warmup
    epoch = n / config.train.batch_size
    if config.train.epochs is not None:
        steps = max(1, round(config.train.epochs * epoch))
        if steps > schema.MOST_STEPS:
            raise ConfigError(
                f"train.epochs={config.train.epochs} are {steps:,} steps: at most "
                f"{schema.MOST_STEPS:,}"
            )
    if config.train.warmup_epochs is not None:
        warmup = round(config.train.warmup_epochs * epoch)
    return steps, warmup


def optimizer(config, shape, steps: int, **changed):
    """The optimizer of a config, of the mean loss over the values of an example.

    Coupled decay in a config is that of Gu 2023, whose loss is the sum over the values:
    beside the mean, the same L2 is smaller by their number.

    Args: shape, of an example; changed, fields of config.optimizer with other values.
    Raises: ValueError.
    """
    group = dict(config.optimizer.items()) | changed
    if group["name"] in train.COUPLED:
        group["weight_decay"] = group.get("weight_decay", 0.0) / math.prod(shape)
    return call(train.OPTIMIZERS, group, "optimizer", steps=steps)


def extractor(config, shape) -> features.Extractor | None:
    """Features of images [h, w, c], as measure.features says; None: pixels alone.

    Raises: ValueError: points that are no images, or no such weights.
    """
    name, path = config.measure.features, config.measure.weights
    make = features.FEATURES[name or "pixels"]
    takes = {"path": path} if "path" in inspect.signature(make).parameters else {}
    if path is not None and not takes:
        raise ConfigError(
            f"measure.weights={path} are of alexnet or inception, and measure.features="
            f"{name} takes none: leave it out, or choose one of them"
        )
    if name is None:
        return None
    try:
        return make(shape, **takes)
    except ValueError as error:
        by = f", measure.weights={path}" if takes else ""
        raise ConfigError(f"measure.features={name}{by}: {error}") from error


def ema_decay(config):
    """The share of the EMA that a step keeps: a number, or (step []) -> []."""
    group = config.train
    if group.ema_half_life is None:
        return group.ema_decay
    return train.ema_decay(group.ema_half_life, group.batch_size, group.ema_ramp)


def watched(config) -> dict:
    """The fields that change a trained network where a rule may end training early.

    Such a rule sees measurements that depend on these fields; without a rule, they
    change no network.

    Returns: {"run.evaluate_every": 1_000, ...}.
    """
    if "model" not in config:  # nothing is trained
        return {}
    rules, known = schema.marked(schema.STOPS), to_json(config)
    sweep = config.get("sweep", {})
    # A point may set a rule that the config itself leaves unset.
    settings = str((*sweep.get("points", ()), *sweep.get("setting", ())))
    given = dict(schema.values(config))
    if not any(given.get(rule) is not None or rule in settings for rule in rules):
        return {}
    fields = (name.split(".") for name in schema.marked(schema.WATCHED))
    return {
        f"{group}.{field}": known.get(group, {}).get(field) for group, field in fields
    }


def has_truth(config) -> bool:
    """Whether the law of the data is known."""
    return config.data.name == "mixture" and not config.data.get("mix")


def truth(config):
    """The known law of the data.   Raises: ConfigError where it is not known."""
    if not has_truth(config):
        mixed = f" with data.mix={config.data.mix}" if config.data.get("mix") else ""
        raise ConfigError(
            f"the law of data.name={config.data.name}{mixed} is not known, nor its "
            "score: data.name=mixture has one"
        )
    names = arguments(sources.mixture) - {"size"}
    known = {k: config.data[k] for k in names if config.data.get(k) is not None}
    try:
        with naming("data", config.data):
            return sources.mixture_truth(**known)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def to_json(config) -> dict:
    """A config as plain values, tuples as lists, as config.json holds it."""
    plain = json.loads(config.to_json_best_effort())
    plain.pop(schema.LEFT_OVER, None)
    return plain


def differences(old: dict, new: dict, prefix="") -> list[tuple[str, Any, Any]]:
    """(field, old, new) for every leaf that differs."""
    changes = []
    for key in sorted(old.keys() | new.keys()):
        a, b, name = old.get(key), new.get(key), f"{prefix}{key}"
        if isinstance(a, dict) and isinstance(b, dict):
            changes += differences(a, b, f"{name}.")
        elif a != b:
            changes.append((name, a, b))
    return changes


# Objects.


def _untaken(config):
    """A line for each field that the constructor of its group does not take."""
    tables = {
        "process": process.PROCESSES, "times": process.TIMES, "model": MODELS,
        "prediction": score.PREDICTIONS, "optimizer": train.OPTIMIZERS,
        "prune_times": process.TIMES, "data": sources.SOURCES,
    }  # fmt: skip
    beside = {"times": {"clock"}, "data": _choice()}
    left_over = config.get(schema.LEFT_OVER, ())
    return [
        line
        for group, table in tables.items()
        for line in untaken(
            table, config[group], group, left_over, beside.get(group, frozenset())
        )
    ]


def _choice():
    """The fields of every source: which of its points are taken."""
    return arguments(data.select) - {"source"}


def _model(group, num_classes, shape):
    if not is_own(group.name):
        return call(MODELS, group, "model", num_classes=num_classes)
    if shape is None:  # what is wrong with the data is said elsewhere
        return None
    given = {"num_classes": num_classes, "shape": tuple(shape)}
    constructor = look_up(MODELS, group.name, "model.name")
    with _naming_own(group.name):
        own.check_constructor(constructor)
    with _naming_own(group.name, but=(ValueError, TypeError)):  # they name fields
        made = call(MODELS, group, "model", **given)
    with _naming_own(group.name):
        model = own.network(made)
    if num_classes and "label" not in model.takes:
        raise ConfigError(
            f"model.name={group.name!r} takes no label, and the data have "
            f"{num_classes} classes: give its call the argument label, or give "
            "data.labels=none"
        )
    return model


def _num_classes(splits):
    if splits is None or splits.train.label is None:
        return 0
    # A class may be among the held-out points only.
    return 1 + max(
        int(some.label.max())
        for some in splits[:2]
        if some is not None and some.label is not None
    )


def _sampler(attempt, config, made_process, law):
    """The times of the sampler, or None."""
    group = config.sampler
    known = {name: name for name in SAMPLERS}
    method = attempt(look_up, known, group.name, "sampler.name")
    grid = attempt(look_up, sampling.TIME_GRIDS, group.grid, "sampler.grid")
    times = grid and attempt(_times, group, grid)
    if made_process and times is not None:
        attempt(checks.reach, made_process, times, law, config)
        if method:
            attempt(checks.sampler, config, made_process, times)
    return times


def _times(group, grid):
    with naming("sampler", group):
        return grid(group.t_min, group.t_max, min(group.steps, schema.MOST_TIMES))


def _check_shape(group, model, shape, num_classes):
    if hasattr(model, "check"):
        try:
            with naming("model", group):
                model.check(shape)
        except ValueError as error:
            # `naming` has named the arguments; a line about none of them names the
            # group here.
            named = (
                line if line.startswith("model.") else f"model: {line}"
                for line in str(error).splitlines()
            )
            raise ConfigError("\n".join(named)) from error
    elif isinstance(model, own.Network):
        with _naming_own(group.name):
            own.check(model, shape, num_classes)


@contextlib.contextmanager
def _naming_own(name, but=()):
    """Makes what a user's own network raises one line, with its place."""
    try:
        yield
    except but:
        raise
    except own.NetworkError as error:
        raise ConfigError(f"model.name={name!r} {error}") from error
    except Exception as error:
        # The last line of the user's own file, and not one inside of flax.
        path = sys.modules[name.partition(":")[0]].__file__
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == path]
        where = f" ({path}:{lines[-1]})" if lines else ""
        reason, *_ = str(error).strip().splitlines() or [""]
        raise ConfigError(
            f"model.name={name!r} raises {type(error).__name__}: {reason}{where}"
        ) from error


def _splits(group, read):
    source = look_up(sources.SOURCES, group["name"], "data.name")
    if is_own(group["name"]):
        read = _reader(group["name"], source, read)
    own, choice = arguments(source), _choice()
    fields = given_to(group, None if own is None else own | choice)
    check_given(source, {*fields, *(choice & (own or set()))}, "data", group["name"])
    with naming("data", group):
        return data.splits(group["name"], read=read, **fields)


def _reader(name, source, read):
    """A reader that also knows a user's own source."""

    def own_or(other, **fields):
        if other != name:
            return read(other, **fields)
        made = source(**fields)
        check_made(made, "data", name)
        return made

    return own_or


def _law(group, made_process):
    """config.times; with a clock, in the time of the process that it names."""
    own = {field: value for field, value in group.items() if field != "clock"}
    law = call(process.TIMES, own, "times")
    if not group.get("clock"):
        return law
    clock = look_up(process.PROCESSES, group.clock, "times.clock")()
    checks.inside(clock, group.clock, checks.late(law))
    return process.on_clock(law, clock, made_process)


def _shape(group):
    """The shape of an example where the choice of a subset is wrong; None: unknown."""
    # Without the choice, the source itself may be read; images keep their size.
    choice = _choice() - {"resolution"}
    rest = {field: None if field in choice else v for field, v in group.items()}
    if group.name in sources.REMOTE:
        return None
    with contextlib.suppress(ValueError, TypeError):
        return _splits(rest, sources.source).train.x.shape[1:]


def _notes(config, splits, steps):
    n, batch = len(splits.train.x), config.train.batch_size
    notes = []
    if n < batch:
        notes.append(
            f"n = {n} training points are fewer than the batch of {batch}: a batch "
            "crosses epochs, each point once per epoch"
        )
    decay = ema_decay(config)
    decay = float(decay(jnp.float32(steps))) if callable(decay) else decay
    # The sum of all weights decay^k: about as many steps are averaged.
    horizon = 1 / max(1 - decay, 1e-12)
    if horizon > steps:
        notes.append(
            f"the EMA looks back {horizon:,.0f} steps and the run has "
            f"{steps:,}: EMA weights stay near the start, "
            "--config.sampler.weights=raw shows the trained ones"
        )
    if splits.held_out is None or len(splits.held_out.x) == 0:
        notes.append("no held-out data: the null level of the ratio cannot be measured")
    if len(splits.train.x) > splits.num_distinct:
        notes.append(
            f"{len(splits.train.x) - splits.num_distinct} training points repeat others"
        )
    return notes
