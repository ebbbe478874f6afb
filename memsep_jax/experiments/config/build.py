"""A config becomes objects: every violation found at once, before anything is compiled.

A group of a config is a `name` and the arguments of the constructor behind that name,
so the constructors are the schema.
"""

import contextlib
import difflib
import inspect
import json
import math
import numbers
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from memsep_jax import data, defaults, process, prune, sampling, score, train
from memsep_jax.data import sources
from memsep_jax.models import MODELS


class ConfigError(ValueError):
    """What a person must change in the config, all of it at once."""

    exit_code = 2


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
    """The seed, split once by name."""

    init: jax.Array
    data: jax.Array
    train: jax.Array
    sample: jax.Array
    evaluate: jax.Array
    prune: jax.Array


ORDERS = {"reshuffled": True, "fixed": False}  # of the points, in every epoch
EPOCHS = ("epochs", "warmup_epochs")
ENDLESS = 2**31 - 1  # steps
MOST_TIMES = 2**20  # steps of a sampler: float32 hardly tells more times apart
STOPPING = ("stop_gap", "plateau")  # rules of `train` that end it early
LOOKS = {  # the fields that such a rule depends on
    "run": (
        "evaluate_every", "evaluate_points", "snapshots", "snapshot_epochs",
        "snapshot_samples",
    ),
    "sampler": (
        "name", "grid", "t_min", "t_max", "steps",
        "churn", "churn_min", "churn_max", "churn_noise",
    ),
    "memorization": ("threshold",),
}  # fmt: skip
# Experiments that train networks together, with one loss and one number of steps.
TOGETHER = ("band_swap", "capacity", "ensemble", "lipschitz")

MOST_COPIES = 10_000  # of a training point
TRACKERS = ("none", "tensorboard", "wandb")  # the functions of runtime/trackers
DTYPES = ("float32", "bfloat16", "float16", "float64")  # that a network computes in
KINDS: dict[type, tuple[tuple, str]] = {  # of a field: what it takes, in words
    bool: ((bool,), "True or False"),
    int: ((numbers.Integral,), "an integer"),
    float: ((numbers.Real,), "a number"),
    str: ((str,), "a word"),
    tuple: ((tuple, list), "several values, in brackets"),
}


def _all_integers(values, low=1):
    return all(type(value) is int and low <= value < 2**31 for value in values)


def _is_text(value):
    return isinstance(value, str)


# What a plain number must satisfy; the rest is checked by the constructors.
RULES = {
    "train.steps": (lambda v: 1 <= v <= ENDLESS, "at least 1, and below 2**31"),
    "train.epochs": (lambda v: v > 0, "positive: passes over the training points"),
    "train.warmup_epochs": (lambda v: v >= 0, "at least 0"),
    "train.batch_size": (lambda v: v >= 1, "at least 1"),
    "data.classes": (lambda v: _all_integers(v, 0), "numbers of classes, from 0 on"),
    "train.order": (lambda v: v in ORDERS, f"one of {', '.join(ORDERS)}"),
    "train.accumulate": (lambda v: v >= 1, "at least 1"),
    "train.ema_decay": (lambda v: 0 <= v < 1, "in [0, 1)"),
    "train.ema_half_life": (lambda v: v > 0, "positive: a number of examples"),
    "train.ema_ramp": (lambda v: v > 0, "positive: a share of the examples seen"),
    "train.label_drop": (lambda v: 0 <= v < 1, "in [0, 1)"),
    "train.temperature": (lambda v: v > 0, "positive: above 1 it smooths"),
    "train.ambient": (lambda v: v > 0, "positive: a time of the process"),
    "train.stop_gap": (lambda v: 0 <= v < 1, "in [0, 1): a share of the held-out loss"),
    "train.plateau": (lambda v: v >= 1, "at least 1 snapshot"),
    "prune.ratio": (lambda v: 0 <= v < 1, "in [0, 1): the share of units to remove"),
    "prune.criterion": (
        lambda v: v in prune.CRITERIA,
        f"one of {', '.join(prune.CRITERIA)}",
    ),
    "prune.group": (lambda v: v in prune.GROUPS, f"one of {', '.join(prune.GROUPS)}"),
    "prune.draws": (lambda v: v >= 1, "at least 1"),
    "prune.clock": (
        lambda v: not v or v in process.PROCESSES,
        f"empty, or one of {', '.join(process.PROCESSES)}",
    ),
    "prune.steps": (lambda v: v >= 0, "at least 0"),
    "prune.lr": (lambda v: v > 0, "positive"),
    "prune.looks": (lambda v: v >= 1, "at least 1"),
    "prune_times.t_max": (lambda v: v > 0, "positive"),
    "model.dropout": (lambda v: 0 <= v < 1, "in [0, 1)"),
    "model.width": (lambda v: 1 <= v <= 2**16, f"in 1 .. {2**16:,}"),
    "model.depth": (lambda v: 1 <= v <= 1_000, "in 1 .. 1,000"),
    "model.dtype": (lambda v: v in DTYPES, f"one of {', '.join(DTYPES)}"),
    "model.multipliers": (_all_integers, "integers, at least 1"),
    "model.attention": (_all_integers, "integers: sides of feature maps"),
    "model.skips": (lambda v: all(kept in (0, 1) for kept in v), "of 0 and 1"),
    "model.mlp_ratio": (lambda v: 0 < v <= 64, "in (0, 64]; usually 4"),
    "sampler.steps": (lambda v: 1 <= v <= MOST_TIMES, f"in 1 .. {MOST_TIMES:,}"),
    "sampler.num_samples": (lambda v: v >= 1, "at least 1"),
    "sampler.weights": (lambda v: v in ("ema", "raw"), "'ema' or 'raw'"),
    "memorization.threshold": (lambda v: 0 < v < 1, "in (0, 1); the papers use 1/3"),
    "memorization.near": (lambda v: v >= 2, "at least 2 neighbours"),
    "sweep.seeds": (lambda v: 1 <= v <= 10_000, "in 1 .. 10,000"),
    "sweep.num_examples": (_all_integers, "integers, at least 1"),
    "sweep.d": (_all_integers, "integers, at least 1"),
    "sweep.width": (_all_integers, "integers, at least 1"),
    "sweep.depth": (_all_integers, "integers, at least 1"),
    "sweep.weight_decay": (lambda v: all(decay >= 0 for decay in v), "at least 0"),
    "sweep.points": (
        lambda v: all(type(p) is dict and all(map(_is_text, p)) for p in v),
        'of the form ({}, {"group.field": value}, ...)',
    ),
    "sweep.setting": (
        lambda v: all(isinstance(text, str) for text in v),
        'of the form ("group.field=value; group.field=value", ...)',
    ),
    "sweep.together": (lambda v: v >= 1, "at least 1 point"),
    "measure.times": (
        lambda v: all(t > 0 for t in v) and list(v) == sorted(v),
        "positive and increasing",
    ),
    "measure.draws": (lambda v: v >= 1, "at least 1"),
    "measure.iters": (lambda v: v >= 1, "at least 1"),
    "measure.likelihood": (lambda v: v >= 0, "at least 0"),
    "measure.probes": (lambda v: v >= 0, "at least 0"),
    "measure.eps": (lambda v: v > 0, "positive"),
    "measure.targets": (lambda v: v >= 0, "at least 0"),
    "measure.search": (lambda v: v >= 1, "at least 1"),
    "measure.bands": (lambda v: v >= 1, "at least 1 band"),
    "measure.onset_level": (lambda v: 0 < v < 1, "in (0, 1): a share of samples"),
    "measure.onset_tolerance": (lambda v: 0 < v < 1, "in (0, 1): a share of the way"),
    "emm.eps": (lambda v: 0 < v < 1, "in (0, 1); the paper uses 0.1"),
    "emm.low": (lambda v: v >= 2, "at least 2 training points"),
    "emm.tolerance": (lambda v: v > 0, "positive: 0.1 ends within 10 %"),
    "emm.budget": (lambda v: v >= 1, "at least 1 network"),
    "run.log_every": (lambda v: v >= 1, "at least 1 step"),
    "run.save_every": (lambda v: v >= 1, "at least 1 step"),
    "run.evaluate_every": (lambda v: v >= 1, "at least 1 step"),
    "run.evaluate_points": (lambda v: v >= 1, "at least 1"),
    "run.keep": (lambda v: v >= 1, "at least 1 checkpoint"),
    "run.snapshots": (lambda v: v >= 0, "at least 0"),
    "run.snapshot_epochs": (lambda v: v >= 0, "at least 0"),
    "run.snapshot_samples": (lambda v: v >= 1, "at least 1"),
    "run.chunk": (lambda v: v >= 1, "at least 1 sample"),
    "run.wait": (lambda v: v >= 0, "at least 0 seconds"),
    "run.tracker": (lambda v: v in TRACKERS, f"one of {', '.join(TRACKERS)}"),
}

SAMPLERS = (*sampling.ODE_METHODS, "sde", "edm")
CHURN = ("churn", "churn_min", "churn_max", "churn_noise")  # sampling.edm
NAMED = (
    "data", "process", "times", "prediction", "model", "optimizer", "prune_times",
)  # fmt: skip
# Groups that are no constructor's arguments: their fields are those of the defaults.
PLAIN = (
    "train", "sampler", "memorization", "prune", "sweep", "measure", "emm", "run",
)  # fmt: skip
NOT_CONFIGURED = {"parent", "name", "process", "num_classes"}
REMOTE = ("cifar10", "tfds")


def keys(seed: int) -> Keys:
    """The keys of a run."""
    return Keys(*jax.random.split(jax.random.key(seed), len(Keys._fields)))


def call(table: dict, group, what: str, **given):
    """table[group.name](the other fields of the group that are not None, **given).

    Raises: ValueError: an unknown name or field, with the known ones; and whatever
      the constructor has to say.
    """
    constructor = look_up(table, group["name"], f"{what}.name")
    fields = arguments(table, group, what, _arguments(constructor))
    _check_given(constructor, {*fields, *given}, what, group["name"])
    with naming(what, group):
        return constructor(**fields, **given)


@contextlib.contextmanager
def naming(what: str, fields):
    """Errors inside speak of arguments, patch=3, and here of fields, model.patch=3.

    Args: what, the group; fields, the names of its fields.
    """
    try:
        yield
    except (ValueError, TypeError) as error:
        names = "|".join(map(re.escape, fields))
        pattern = rf"(?<![\w.=/-])(?=({names})=)"
        error.args = (re.sub(pattern, f"{what}.", str(error)),)
        raise


def arguments(table: dict, group, what: str, taken: set) -> dict:
    """The fields of a group that are given and taken.

    A field of a sibling in the table is left over from another choice of name, and is
    dropped; one that is nobody's is a mistake.

    Raises: ValueError.
    """
    fields = {}
    for field, value in group.items():
        if field == "name" or value is None:
            continue
        if field in taken:
            fields[field] = value
        elif not any(field in _arguments(other) for other in table.values()):
            raise ValueError(
                f"{what}.{field} is not an argument of {group['name']}"
                f"{did_you_mean(field, taken)}; it takes {', '.join(sorted(taken))}"
            )
    return fields


def look_up(table, name, what: str):
    """table[name], or a ConfigError with the known names."""
    if name not in table:
        raise ConfigError(
            f"{what}={name!r} is not known{did_you_mean(str(name), table)}; "
            f"choose one of {', '.join(sorted(table))}"
        )
    return table[name]


def did_you_mean(word: str, known) -> str:
    """ ", did you mean X?" where a known word is close."""
    close = difflib.get_close_matches(word, [str(k) for k in known], 1)
    return f", did you mean {close[0]!r}?" if close else ""


def check(config):
    """What must be right before a sweep is laid out, or anything is built.

    Raises: ConfigError.
    """
    if "model" not in config:  # nothing is trained
        check_kinds(config, defaults.audit())
        return
    _check_fields(config)
    check_kinds(config, defaults.train())
    # Of one training, `build` says this with all the rest.
    if config.get("experiment") != "train" and (wrong := _broken(config, ("sweep",))):
        raise ConfigError("\n".join(wrong))


def build(config, read=sources.source) -> Parts:
    """All objects of a config.

    Args: read, the reader of the data, or `sources.at_hand`.
    Raises:
      ConfigError: with every violation, a line each.
      data.DataError: data that cannot be read, where the config itself is right.
    """
    wrong: list[str] = []

    def attempt(make, *args, **kwargs):
        try:
            return make(*args, **kwargs)
        except data.DataError:
            raise
        except (ValueError, TypeError) as error:
            wrong.extend(str(error).splitlines())
            return None

    _check_fields(config)  # alone: all the rest reads them
    check_kinds(config, defaults.train())
    attempt(_check_values, config)
    made_process = attempt(call, process.PROCESSES, config.process, "process")
    law = attempt(_law, config.times, made_process)
    attempt(call, process.TIMES, config.prune_times, "prune_times")
    prediction = None
    if made_process:
        prediction = attempt(
            call,
            score.PREDICTIONS,
            config.prediction,
            "prediction",
            process=made_process,
        )
    attempt(_check_lengths, config.train, config.optimizer)
    in_epochs = any(config.train[field] is not None for field in EPOCHS)
    # Epochs are so many steps once the points are there: for now, no end, no warm-up.
    tx = attempt(_optimizer, config, *((ENDLESS, 0) if in_epochs else lengths(config)))
    method = attempt(
        look_up, {name: name for name in SAMPLERS}, config.sampler.name, "sampler.name"
    )
    grid = attempt(look_up, sampling.TIME_GRIDS, config.sampler.grid, "sampler.grid")
    times = None
    if grid:
        group = config.sampler
        times = attempt(_times, group, grid)
    if made_process and times is not None:
        attempt(_check_times, made_process, times, law, config)
        if method:
            attempt(_check_sampler, config, made_process, times)
    attempt(_check_batch, config, jax.device_count())

    splits = None
    # Nothing is fetched for a bad config.
    named = {config.data.name, config.data.get("mix_from")}
    if not (wrong and named & set(REMOTE)):
        try:
            splits = attempt(_splits, config.data, read)
        except data.DataError:
            if not wrong:
                raise
    steps, num_classes = config.train.steps, 0
    if splits is not None and in_epochs and not wrong:
        steps, warmup = lengths(config, len(splits.train.x))
        tx = attempt(_optimizer, config, steps, warmup)
    if splits is not None and splits.train.label is not None:
        # A class may be among the held-out points only.
        num_classes = 1 + max(
            int(some.label.max())
            for some in splits[:2]
            if some is not None and some.label is not None
        )
    takes_classes = {"num_classes": num_classes}
    model = attempt(call, MODELS, config.model, "model", **takes_classes)
    shape = splits.train.x.shape[1:] if splits else _shape(config.data)
    if model is not None and shape is not None and hasattr(model, "check"):
        attempt(_check_shape, config.model, model, shape)
    attempt(_check_mitigations, config, splits, num_classes)
    if splits is not None and isinstance(splits.train.x, data.Rows):
        attempt(_check_stream, config)
    if model is not None and shape is not None and not wrong:
        attempt(_check_prune, config.prune, model, shape, num_classes)
    if splits is not None and splits.num_distinct < 2:
        wrong.append(
            "the memorization ratio needs two distinct training points and got "
            f"{splits.num_distinct}: raise data.num_examples, or measure the distance "
            "to the nearest one at the prompt (neighbours.nearest with k=1)"
        )
    if wrong:
        raise ConfigError(
            f"{len(wrong)} thing{'s' * (len(wrong) > 1)} in the config must change:\n"
            + "\n".join(f"  {line}" for line in wrong)
        )
    assert prediction and times is not None and splits  # nothing is wrong
    notes = _notes(config, splits, steps)
    return Parts(
        made_process,
        law,
        prediction,
        model,
        tx,
        times,
        splits,
        num_classes,
        steps,
        notes,
    )


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
        if steps > ENDLESS:
            raise ConfigError(
                f"train.epochs={config.train.epochs} are {steps:,} steps: at most "
                f"{ENDLESS:,}"
            )
    if config.train.warmup_epochs is not None:
        warmup = round(config.train.warmup_epochs * epoch)
    return steps, warmup


def ema_decay(config):
    """What a step keeps of the EMA: a number, or (step []) -> []."""
    group = config.train
    if group.ema_half_life is None:
        return group.ema_decay
    return train.ema_decay(group.ema_half_life, group.batch_size, group.ema_ramp)


def looks(config) -> dict:
    """What changes a trained network besides its own groups: else `run` changes none.

    Where a rule may end training early, by what it looks at along it: those fields,
    {"run.evaluate_every": 1_000, ...}.
    """
    if "model" not in config:  # nothing is trained
        return {}
    rules = [config.train.get(rule) for rule in STOPPING]
    sweep = config.get("sweep", {})
    settings = str((*sweep.get("points", ()), *sweep.get("setting", ())))
    if all(rule is None for rule in rules) and not any(
        f"train.{rule}" in settings for rule in STOPPING
    ):
        return {}
    known = to_json(config)
    return {
        f"{group}.{field}": known.get(group, {}).get(field)
        for group, fields in LOOKS.items()
        for field in fields
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
    names = _arguments(sources.mixture) - {"size"}
    known = {k: config.data[k] for k in names if config.data.get(k) is not None}
    try:
        with naming("data", config.data):
            return sources.mixture_truth(**known)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def sampling_options(config) -> dict:
    """config.sampler as arguments of `sampling.sampler`."""
    group = config.sampler
    options = {field: group[field] for field in CHURN if group[field] is not None}
    if options and group.name != "edm":
        field, value = next(iter(options.items()))
        raise ValueError(
            f"sampler.{field}={value} is an option of sampler.name=edm, and the "
            f"sampler is {group.name}: leave it out, or take edm"
        )
    return {"method": group.name} | options


def to_json(config) -> dict:
    """A config as plain values, tuples as lists, as config.json holds it."""
    return json.loads(config.to_json_best_effort())


def differences(old: dict, new: dict, prefix="") -> list[tuple[str, Any, Any]]:
    """(field, old, new) for every leaf that differs."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        a, b, name = old.get(key), new.get(key), f"{prefix}{key}"
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{name}.")
        elif a != b:
            found.append((name, a, b))
    return found


def _times(group, grid):
    with naming("sampler", group):
        return grid(group.t_min, group.t_max, min(group.steps, MOST_TIMES))


def _check_shape(group, model, shape):
    with naming("model", group):
        model.check(shape)


def _splits(group, read=sources.source):
    copies = group.get("copies")
    if copies is not None and copies > MOST_COPIES:
        raise ValueError(f"data.copies={copies} must be in 1 .. {MOST_COPIES:,}")
    source = look_up(sources.SOURCES, group["name"], "data.name")
    own = _arguments(source)
    select = _arguments(data.select) - {"source"}  # those of every source
    fields = arguments(sources.SOURCES, group, "data", own | select)
    _check_given(source, {*fields, *(select & own)}, "data", group["name"])
    with naming("data", group):
        return data.splits(group["name"], read=read, **fields)


def _check_given(constructor, given, what, name):
    """Python says this too, but not which field of which group."""
    missing = [
        parameter.name
        for parameter in inspect.signature(constructor).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        and parameter.name not in given
    ]
    if missing:
        raise ValueError(
            "\n".join(f"{what}.{field} must be given for {name}" for field in missing)
        )


def _check_fields(config):
    """Fields that the code reads and the config lacks."""
    known, missing = defaults.train(), []
    for group in (*NAMED, *PLAIN):
        needed = known[group] if group in PLAIN else ["name"]
        missing += [f"{group}.{f}" for f in needed if f not in config.get(group, {})]
    missing += [] if "seed" in config else ["seed"]
    if missing:
        raise ConfigError("\n".join(f"{field} is missing" for field in missing))


def check_kinds(config, known):
    """Refuses values of another kind than the defaults have, or placeholders for.

    A ConfigDict does so too, but not for what a sweep sets, or what came to be None.

    Raises: ConfigError with all of them.
    """
    like, wrong = {name: at for name, *at in _leaves(known)}, []
    for name, group, field in _leaves(config):
        if name not in like:
            continue
        value, default = group[field], like[name][0][field]
        kind = like[name][0].get_type(field)
        kinds, text = KINDS[kind]
        fits = isinstance(value, kinds) and isinstance(value, bool) == (kind is bool)
        if not (default is None if value is None else fits):
            wrong.append(f"{name}={value!r} must be {text}")
    if wrong:
        raise ConfigError("\n".join(wrong))


def _leaves(config):
    """("group.field", the group, "field") of every field."""
    for name, value in config.items():
        if hasattr(value, "items"):
            yield from ((f"{name}.{field}", value, field) for field in value)
        else:
            yield name, config, name


def _holds(rule, value):
    try:
        return rule(value)
    except TypeError:  # of a value among several
        return False


def _check_values(config):
    """Numbers against RULES, and fields that nothing reads."""
    wrong, default = [], defaults.train()
    for group in PLAIN:
        known = default[group]
        wrong += [
            f"{group}.{field} is not a field of {group}{did_you_mean(field, known)}"
            for field in config[group]
            if field not in known
        ]
    if not 0 <= config.seed < 2**32:
        wrong.append(f"seed={config.seed} must be in [0, 2**32): others repeat these")
    wrong += _broken(config, (*NAMED, *PLAIN))
    if wrong:
        raise ConfigError("\n".join(wrong))


def _broken(config, groups):
    """What breaks RULES, or is not finite."""
    wrong = []
    for group in groups:
        for field, value in config[group].items():
            rule, text = RULES.get(f"{group}.{field}", (lambda v: True, ""))
            if isinstance(value, float) and not math.isfinite(value):
                wrong.append(f"{group}.{field}={value} must be a finite number")
            elif value is not None and not _holds(rule, value):
                wrong.append(f"{group}.{field}={value} must be {text}")
    return wrong


def _check_times(made_process, times, law, config):
    """Times at which the process has no score: alpha = 0, or past its end."""
    looked_at = {"sampler.t_min": times[-1], "sampler.t_max": times[0]}
    if config.train.ambient is not None:
        looked_at["train.ambient"] = jnp.float32(config.train.ambient)
    if law is not None:
        looked_at |= _late(law)
    _check_inside(made_process, config.process.name, looked_at)


def _law(group, made_process):
    """config.times; with a clock, in the time of the process that it names."""
    own = {field: value for field, value in group.items() if field != "clock"}
    law = call(process.TIMES, own, "times")
    if not group.get("clock"):
        return law
    clock = look_up(process.PROCESSES, group.clock, "times.clock")()
    _check_inside(clock, group.clock, _late(law))
    return process.on_clock(law, clock, made_process)


def _late(law):
    drawn = jax.jit(jax.vmap(law))(jax.random.split(jax.random.key(0), 1_000))
    return {"the largest of 1,000 draws of times, t": jnp.max(drawn)}


def _check_inside(made, name, looked_at):
    wrong = [
        f"{what}={float(t):.4g} is outside of process {name}, where alpha is "
        f"{float(made.alpha(t)):.4g} and sigma {float(made.sigma(t)):.4g}: both must "
        "be positive"
        for what, t in looked_at.items()
        if not (made.alpha(t) > 0 and made.sigma(t) > 0)
    ]
    if wrong:
        raise ValueError("\n".join(wrong))


def _shape(group):
    """Of one example, where the choice of a subset is wrong; None where unknown."""
    choice = _arguments(data.select) - {"resolution"}
    rest = {field: None if field in choice else v for field, v in group.items()}
    with contextlib.suppress(ValueError, TypeError):
        return None if group.name in REMOTE else _splits(rest).train.x.shape[1:]


def _optimizer(config, steps, warmup):
    group = dict(config.optimizer.items()) | {"warmup": warmup}
    return call(train.OPTIMIZERS, group, "optimizer", steps=steps)


def _check_lengths(group, optimizer):
    wrong = []
    if group.warmup_epochs is not None and optimizer.get("warmup"):
        wrong.append(
            f"optimizer.warmup={optimizer.warmup} steps and train.warmup_epochs="
            f"{group.warmup_epochs} both give the warm-up; leave one of them out"
        )
    if group.ema_ramp is not None and group.ema_half_life is None:
        wrong.append(
            f"train.ema_ramp={group.ema_ramp} bounds train.ema_half_life, which is not "
            "given: give it, or leave out the ramp"
        )
    if wrong:
        raise ConfigError("\n".join(wrong))


def _check_mitigations(config, splits, num_classes):
    group, wrong = config.train, []
    if group.temperature is not None and group.ambient is not None:
        wrong.append(
            f"train.temperature={group.temperature}, train.ambient={group.ambient}: "
            "each asks the network for something else; give one of them"
        )
    if config.get("experiment") in TOGETHER:
        wrong += [
            f"train.{field}={group[field]}: networks that are trained together share "
            "one loss and one number of steps, and draw with replacement; "
            "experiment=train has it"
            for field in ("temperature", *STOPPING, *EPOCHS, "order")
            if group[field] not in (None, "reshuffled")
        ]
    held_out = splits and splits.held_out
    if group.stop_gap is not None and splits is not None:
        if held_out is None or not len(held_out.x):
            wrong.append(
                f"train.stop_gap={group.stop_gap} needs held-out data, and there are "
                "none: raise data.num_held_out"
            )
        elif num_classes and held_out.label is None:
            wrong.append(
                f"train.stop_gap={group.stop_gap} compares with held-out points, which "
                f"have no labels under data.labels={config.data.labels}"
            )
    if wrong:
        raise ConfigError("\n".join(wrong))


def _check_stream(config):
    """What needs all training points in memory."""
    needs = {
        f"experiment={config.experiment}": config.experiment != "train",
        f"train.temperature={config.train.temperature}": config.train.temperature,
        f"prune.ratio={config.prune.ratio}": config.prune.ratio,
    }
    if wrong := [name for name, is_so in needs.items() if is_so]:
        raise ValueError(
            f"data.stream=True leaves the training points on disk, and "
            f"{', '.join(wrong)} needs them in memory: leave out one of the two"
        )


def _check_prune(group, model, shape, num_classes):
    """Whether there is something to prune, where it is asked for."""
    if not group.ratio:
        return
    label = jnp.zeros((), jnp.int32) if num_classes else None
    like = jax.eval_shape(
        model.init, jax.random.key(0), jnp.zeros(shape), jnp.zeros(()), label
    )
    with naming("prune", group):
        units = prune.gates(like["params"], group.group).size
    if not prune.count(units, group.ratio):
        raise ValueError(
            f"prune.ratio={group.ratio} removes none of {units} {group.group}: give "
            f"at least {1 / units:.3g}"
        )


def _check_batch(config, devices):
    batch, parts = config.train.batch_size, config.train.accumulate
    if batch >= 1 and parts >= 1 and batch % (devices * parts):
        raise ValueError(
            f"train.batch_size={batch} must be a multiple of {devices} device"
            f"{'s' * (devices > 1)} times train.accumulate={parts}"
        )


def _notes(config, splits, steps):
    n, batch = len(splits.train.x), config.train.batch_size
    notes = []
    if n < batch:
        notes.append(
            f"n = {n} training points are fewer than the batch of {batch}: a batch "
            "crosses epochs, each point once an epoch"
        )
    decay = ema_decay(config)  # at the end
    decay = float(decay(jnp.float32(steps))) if callable(decay) else decay
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


def _arguments(constructor):
    return set(inspect.signature(constructor).parameters) - NOT_CONFIGURED


def _check_sampler(config, made_process, times):
    options = sampling_options(config)
    with naming("sampler", config.sampler):
        sampling.sampler(lambda x, t: x, made_process, times, (), **options)
