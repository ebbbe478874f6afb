"""Any value in any field: the config is built, or one message says what must change.

Every shipped config, with fields changed at random, goes as far as a run goes before
it writes or compiles: up to `Session.begin`, or to the first state of a network.
"""

import functools
import inspect
import re
import runpy
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from faults import harness
from memsep_jax import experiments
from memsep_jax.data import sources
from memsep_jax.experiments.config import build, checks
from memsep_jax.experiments.runtime import session
from memsep_jax.experiments.studies import training_run
from memsep_jax.models import MODELS
from memsep_jax.process import PROCESSES, TIMES
from memsep_jax.sampling import TIME_GRIDS
from memsep_jax.score import PREDICTIONS
from memsep_jax.train import OPTIMIZERS

CONFIGS = {path.stem: path for path in sorted((harness.ROOT / "configs").glob("*.py"))}
CASES = 2  # of every config, by default
THOROUGH = 25  # of every config, where it may take minutes
WHOLE = 4  # that are run to their end
EVERY_VALUE = {  # in every field, or in those of the groups that are read otherwise
    "digits": ("",),
    "audit": ("",),
    "mlp_mixture": ("data.", "process.", "times.", "prediction.", "model.", "sampler."),
    "emm_digits": ("data.", "emm.", "sweep.", "train."),
    "skips_cifar": ("model.",),
}
NAN, INF = float("nan"), float("inf")
VALUES = (
    None, True, -1, 0, 1, 2, 3, 7, 100, 2**31, 2**32, 10**12, -(10**12),
    -1.0, -0.0, 0.3, 1.0, 2.5, 1e-30, 1e30, NAN, INF, -INF,
    "", "a", "a/b", "é\u202eb", "<b>", "None", "1e3", "[red]", "x" * 300,
    (), (0,), (1, 2), (-1,), (2, 1), (1.5,), (NAN,), ("a",), (None,), (1, (2,)),
    (2**31,), (10**12,), (True, False),
)  # fmt: skip
TABLES = (PROCESSES, TIMES, PREDICTIONS, MODELS, OPTIMIZERS, TIME_GRIDS)
WORDS = (
    *build.ORDERS,
    *build.SAMPLERS, "empirical", "truth", "trained", "raw", "neurons", "blocks",
    "random", "true", "unique", "none", "npz", "folder", "digits", "mixture",
    "low_rank", "boxes", "student_t", "cosine", "pixels", "given", "inception",
    *(name for table in TABLES for name in table),
)  # fmt: skip


class Reached(BaseException):
    """The door is passed: nothing but work is left."""


@pytest.fixture
def door(tmp_path, monkeypatch):
    """config -> the message that it gets, or None where it may enter."""

    def reached(*args, **kwargs):
        raise Reached

    def elsewhere(*args, **kwargs):
        raise ValueError("tfds: not asked in tests")

    monkeypatch.chdir(tmp_path)  # where no path leads anywhere
    monkeypatch.setattr(session.Session, "begin", reached)
    monkeypatch.setattr(training_run, "initial_state", reached)
    monkeypatch.setattr(sources, "tfds", elsewhere)
    known = {name: few(sources.SOURCES[name]) for name in ("digits", "mixture")}
    known |= {name: sources.SOURCES[name] for name in ("npz", "folder")}
    monkeypatch.setattr(sources, "SOURCES", known)

    def enter(config):
        with tempfile.TemporaryDirectory(dir=tmp_path) as place:
            workdir = Path(place) / "run"
            try:
                experiments.run(config, workdir)
            except Reached:
                return None
            except Exception as error:
                assert not workdir.exists(), error
                if getattr(error, "exit_code", None) not in (2, 3):
                    raise
                return str(error)
        raise AssertionError("it went through the door without passing it")

    late = checks.late

    def eagerly(law):  # 1,000 draws: to compile them takes ten times as long
        with jax.disable_jit():
            return late(law)

    monkeypatch.setattr(checks, "late", eagerly)
    return enter


def few(read):
    """A source of which 400 points are taken, and read once."""
    kept = {}

    @functools.wraps(read)
    def cut(**arguments):
        name = repr(arguments)
        if name not in kept:
            if "size" in inspect.signature(read).parameters:
                arguments["size"] = 400
            whole = read(**arguments)[:4]
            kept[name] = [None if x is None else x[:400] for x in whole]
        return sources.Source(*kept[name])

    cut.__signature__ = inspect.signature(read)
    return cut


few = functools.cache(few)


def smoke(name) -> ConfigDict:
    """A fresh one: a copy would forget of what kind a field is that is None."""
    return get_config(name)("smoke")


@functools.cache
def get_config(name):
    return runpy.run_path(str(CONFIGS[name]))["get_config"]


def fields(config, prefix="") -> list[str]:
    """The names of all leaves but of the experiment itself."""
    found = []
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            found += fields(value, f"{prefix}{name}.")
        elif name != "experiment":
            found.append(f"{prefix}{name}")
    return found


def changed(config, changes):
    """The config with other values, or None where a field is of another kind.

    ml_collections refuses that, and the command says so: test_config.py, row 46.
    """
    for name, value in changes.items():
        try:
            config.update_from_flattened_dict({name: value})
        except TypeError as error:
            assert name.rpartition(".")[2] in str(error)
            return None
    return config


def drawn(names, rng, values=VALUES) -> dict:
    """One to three fields, and any values."""
    chosen = rng.choice(len(names), rng.integers(1, 4), replace=False)
    found = {}
    for i in chosen:
        table = WORDS if rng.random() < 0.25 else values
        found[names[i]] = table[rng.integers(len(table))]
    return found


def cases(name, count, seed, values=VALUES):
    """`count` configs with changes that their fields can hold: (config, changes)."""
    rng, found = np.random.default_rng([seed, *name.encode()]), 0
    names = fields(smoke(name))
    while found < count:
        changes = drawn(names, rng, values)
        config = changed(smoke(name), changes)
        if config is not None:
            found += 1
            yield config, changes


def knock(door, config, changes):
    """The message at the door, which must name a field; None where it is open."""
    try:
        message = door(config)
    except Exception as error:
        raise AssertionError(f"{changes}: {type(error).__name__}: {error}") from error
    if message is not None:
        assert names_a_field(message, config, changes), f"{changes}: {message}"
    return message


def names_a_field(message, config, changes):
    """Whether it says "group.field", or a part of the name of one that was changed."""
    parts = {part for name in changes for part in name.split(".")}
    known = {name for name in fields(config) if "." in name} | parts
    return any(re.search(rf"\b{name}\b", message) for name in known)


@pytest.mark.parametrize("name", CONFIGS)
def test_fuzz_what_is_shipped_is_built(name, door):
    assert knock(door, smoke(name), {}) is None


@pytest.mark.parametrize("case", range(CASES))
@pytest.mark.parametrize("name", CONFIGS)
def test_fuzz_any_values_are_built_or_refused_in_words(name, case, door):
    (one,) = cases(name, 1, case)
    knock(door, *one)


def test_fuzz_some_are_built_and_more_are_refused(door):
    """Else it would show nothing."""
    found = [knock(door, *case) for case in cases("digits", 40, 100)]
    assert 5 < sum(message is None for message in found) < 35


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_fuzz_many_values_are_built_or_refused_in_words(name, door):
    found = [knock(door, *case) for case in cases(name, THOROUGH, 101)]
    assert len(found) == THOROUGH


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY_VALUE)
def test_fuzz_every_value_in_every_field_is_built_or_refused_in_words(name, door):
    tried = 0
    groups = EVERY_VALUE[name]
    chosen = [field for field in fields(smoke(name)) if field.startswith(groups)]
    for field in chosen:
        words = WORDS if field.rpartition(".")[2] in ("name", "grid", "clock") else ()
        for value in (*VALUES, *words):
            config = changed(smoke(name), {field: value})
            if config is not None:
                tried += 1
                knock(door, config, {field: value})
    assert tried > 10 * len(chosen)


SMALL = tuple(v for v in VALUES if not isinstance(v, (int, float)) or abs(v) < 10)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits", "mlp_mixture", "audit"])
def test_fuzz_what_is_built_runs_to_its_end(name, tmp_path, monkeypatch):
    """Or ends with an error of its own: values that are not finite, and the like."""
    monkeypatch.chdir(tmp_path)
    ended = 0
    for i, (config, changes) in enumerate(cases(name, 100, 102, SMALL)):
        try:
            experiments.run(config, tmp_path / str(i))
        except Exception as error:
            if getattr(error, "exit_code", None) not in (2, 3, 4):
                raise AssertionError(f"{changes}: {error!r}") from error
            continue
        ended += 1
        if ended == WHOLE:
            return
    raise AssertionError(f"only {ended} of 100 ran to their end")


# What the fuzz has found, so that it stays found.

FOUND = {
    "seed": None,
    "data.seed": True,
    "data.classes": (1, (2,)),
    "data.num_examples": True,
    "measure.times": (None,),
    "optimizer.lr": None,
    "sampler.t_max": None,
    "sampler.steps": 10**12,
    "train.ema_decay": None,
    "train.steps": 2**31,
    "sweep.seeds": 2**31,
    "sweep.points": (1,),
    "sweep.setting": (1,),
    "sweep.width": (1.5,),
    "sweep.weight_decay": ("a",),
    "emm.low": None,
    "model.multipliers": ("a",),
    "model.dtype": "ornstein_uhlenbeck",
    "model.mlp_ratio": 0,
    "model.width": 2**32,
    "model.depth": 10**12,
}


@pytest.mark.parametrize("field", FOUND)
def test_fuzz_what_was_found_is_refused(field):
    config = changed(smoke("emm_digits"), {field: FOUND[field]})
    with pytest.raises(build.ConfigError, match=f"{field}=") as caught:
        build.check(config)
        build.build(config)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [("sweep.seeds", 0), ("sweep.width", (1.5,)), ("sweep.points", (1,))],
)
def test_fuzz_a_sweep_refuses_what_its_points_could_not_be(
    field, value, door, tmp_path
):
    config = changed(smoke("emm_digits"), {field: value})
    with pytest.raises(build.ConfigError, match=f"{field}="):
        experiments.run(config, tmp_path / "run")


@pytest.mark.parametrize("field", ["data.copies", "sampler.steps"])
def test_fuzz_no_memory_is_taken_for_what_is_refused(field):
    """Where all is built that can be, to find all that is wrong."""
    config = changed(smoke("digits"), {field: 10**12, "data.duplicates": 0.5})
    with pytest.raises(build.ConfigError, match=f"{field}={10**12} must be"):
        build.build(config)


def test_fuzz_more_steps_than_are_counted_are_refused():
    config = changed(smoke("digits"), {"train.epochs": 2.0**31})
    with pytest.raises(build.ConfigError, match="train.epochs=2147483648.0 are 4,29"):
        build.build(config)


def test_fuzz_what_a_setting_sets_has_the_kind_of_its_field():
    """A copy of a ConfigDict, as every point of a sweep is, no longer tells it."""
    config = smoke("digits").copy_and_resolve_references()
    config.optimizer.b1 = "tight"
    with pytest.raises(build.ConfigError, match="optimizer.b1='tight' must be a num"):
        build.build(config)


@pytest.mark.parametrize("field", ["k", "d"])
def test_fuzz_a_mixture_that_no_memory_holds_is_refused(field):
    config = smoke("mlp_mixture")
    config.data[field] = 2**31
    with pytest.raises(build.ConfigError, match=f"{field}=2147483648 .* lower k or d"):
        build.build(config)


@pytest.mark.parametrize("where", ["x" * 300, "~nobody-here/x", "a\0b", "\udcff"])
def test_fuzz_any_text_may_be_given_as_a_path(where, tmp_path, monkeypatch):
    def none(name):
        raise ValueError("no such set")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, "tfds", none)
    for read in (sources.images, sources.folder, sources.npz):
        with pytest.raises(sources.DataError):
            read(where)
