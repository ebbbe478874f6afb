"""Commands, configs and data that are wrong: one message, nothing written (D)."""

import gzip
import hashlib
import inspect
import io
import json
import os
import pickle
import re
import runpy
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict
from PIL import Image

from faults import harness
from memsep_jax import checkpoint, defaults, experiments, features, weights
from memsep_jax.data import archives, sources
from memsep_jax.experiments import record
from memsep_jax.experiments.config import build, command, schema
from memsep_jax.experiments.reporting import figures
from memsep_jax.experiments.studies import audit, dry_run
from memsep_jax.models import inception

CONFIGS = sorted((harness.ROOT / "configs").glob("*.py"))
SMOKE = "--config=configs/digits.py:smoke"
OFFLINE = """
import requests
def send(*args, **kwargs):
    raise requests.exceptions.ConnectionError("no network")
requests.Session.send = send
"""

# Of any kind, also of what does not go through requests.
NO_NETWORK = """
import socket
def connect(*args, **kwargs):
    raise AssertionError("a network was asked for")
socket.socket.connect = socket.getaddrinfo = connect
"""


def refused(*arguments, tmp_path, code=2, **kwargs) -> str:
    """The one message of a command that is refused, and leaves nothing behind."""
    workdir = tmp_path / "not" / "yet"
    result = harness.run(*arguments, workdir=workdir, **kwargs)
    assert result.code == code, result.output
    assert not result.stdout and "Traceback" not in result.stderr, result.output
    assert result.stderr.startswith("error: "), result.output
    assert result.stderr.count("error: ") == 1, result.output
    assert not workdir.parent.exists()
    return result.stderr


def smoke(*arguments):
    return harness.config(SMOKE, *arguments)


def violations(config) -> list[str]:
    """The lines of a ConfigError."""
    with pytest.raises(build.ConfigError) as caught:
        build.build(config)
    assert caught.value.exit_code == 2
    head, *lines = str(caught.value).splitlines()
    assert re.match(rf"{len(lines)} things? in the config must change:", head)
    return [line.strip() for line in lines]


# 45, 46: fields on the command line.


MEANT = {
    "stesp": "--config.prune.steps or --config.sampler.steps or --config.train.steps?",
    "train.stesp": "--config.train.steps?",
    "trian.steps": "--config.train.steps?",
    "model.pach": "--config.model.patch?",
    "sede": "--config.data.seed or --config.seed?",
}


def test_d45_an_unknown_field_says_what_may_be_meant(tmp_path):
    told = refused(SMOKE, *written(dict.fromkeys(MEANT, 5)), tmp_path=tmp_path)
    for field, meant in MEANT.items():
        hint = f"is not a field of the config, did you mean {meant}\n"
        assert f"--config.{field} {hint}" in told


def test_d45_all_unknown_fields_are_named_at_once(tmp_path):
    told = refused(
        SMOKE, "--config.xyzzy=1", "--config.run.chnk=1", "--noconfig.train.flop",
        tmp_path=tmp_path,
    )  # fmt: skip
    assert len(told.splitlines()) == 3
    assert "--config.xyzzy is not a field of the config\n" in told
    assert "--config.run.chunk?" in told and "--config.train.flip?" in told


def test_d45_a_field_of_the_file_that_nothing_reads_is_refused():
    config = smoke()
    with config.unlocked():
        config.train.stesp = 5
        config.sampler.update(nmae="heun")
        config.model.update(pach=2)
    found = violations(config)
    assert "train.stesp is not a field of train, did you mean 'steps'?" in found
    assert "sampler.nmae is not a field of sampler, did you mean 'name'?" in found
    assert any("model.pach is not an argument of dit, did you mean" in f for f in found)


def parsed(*arguments) -> dict:
    """The config that a command line gives."""
    code = (
        "import sys; from absl import flags; from memsep_jax import main; "
        "main.parse_flags(sys.argv); print(flags.FLAGS.config.to_json_best_effort())"
    )
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=harness.ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_d46_numbers_are_taken_as_people_write_them():
    got = parsed(
        SMOKE,
        "--config.train.steps=1e3",
        "--config.train.batch_size=6.4e1",
        "--config.seed=1E2",
        "--config.optimizer.lr=2",
        "--config.data.num_examples=5",  # None by default
        "--config.data.classes=3,4",
        "--config.optimizer.clip=None",
        "--config.data.path=1e3",  # a name, whatever it looks like
        "--config.train.flip",
        "--config.data.skip_bad=true",  # None by default
        "--config.sampler.t_max",
        "70",
    )
    expected = {
        ("train", "steps"): 1_000,
        ("train", "batch_size"): 64,
        ("optimizer", "lr"): 2.0,
        ("data", "num_examples"): 5,
        ("data", "classes"): [3, 4],
        ("optimizer", "clip"): None,
        ("data", "path"): "1e3",
        ("train", "flip"): True,
        ("data", "skip_bad"): True,
        ("sampler", "t_max"): 70.0,
    }
    for (group, field), value in expected.items():
        assert got[group][field] == value, (group, field)
        assert type(got[group][field]) is type(value), (group, field)
    assert got["seed"] == 100


def test_d46_one_class_and_a_bracket_are_tuples_too():
    for written, value in [("3", [3]), ("(3, 4)", [3, 4]), ("(3,)", [3])]:
        assert parsed(SMOKE, f"--config.data.classes={written}")["data"]["classes"] == (
            value
        )


@pytest.mark.parametrize(
    "argument",
    ["train.steps=abc", "train.steps=1.5", "train.steps=1e-3", "train.steps=None"],
)
def test_d46_a_value_of_another_kind_is_refused(argument, tmp_path):
    told = refused(SMOKE, f"--config.{argument}", tmp_path=tmp_path)
    assert f"flag --config.{argument}: invalid" in told


# 47: numbers that are out of range, names that are not known.

WRONG = {
    "train.batch_size": 0,
    "train.steps": 0,
    "train.accumulate": 0,
    "train.ema_decay": 1.0,
    "train.label_drop": -0.5,
    "optimizer.lr": -1.0,
    "optimizer.weight_decay": -1.0,
    "optimizer.clip": 0.0,
    "optimizer.b1": 1.5,
    "data.num_examples": 5_000,
    "model.patch": 3,
    "model.width": 18,
    "model.num_heads": 4,
    "model.dropout": 1.0,
    "sampler.t_min": 5.0,
    "sampler.t_max": 5.0,
    "sampler.num_samples": 0,
    "sampler.weights": "best",
    "memorization.threshold": 2.0,
    "memorization.near": 1,
    "run.chunk": 0,
    "run.evaluate_every": 0,
    "run.log_every": 0,
    "run.save_every": -1,
    "run.keep": 0,
    "run.pack": "",
    "times.name": "uniform",
    "times.t_min": 2.0,
    "times.t_max": 1.0,
}
TOLD = [  # of each, what the line must say
    "train.batch_size=0 must be at least 1",
    "train.steps=0 must be at least 1",
    "train.accumulate=0 must be at least 1",
    "train.ema_decay=1.0 must be in [0, 1)",
    "train.label_drop=-0.5 must be in [0, 1)",
    "optimizer.lr=-1.0 must be positive",
    "optimizer.weight_decay=-1.0 must not be negative",
    "optimizer.clip=0.0 must be positive, or None",
    "optimizer.b1=1.5 must be in [0, 1)",
    "num_examples=5000, but the pool has",
    "model.patch=3 must divide the image, 8x8",
    "model.num_heads=4 must divide model.width=18",
    "model.dropout=1.0 must be in [0, 1)",
    "sampler.t_min=5.0, sampler.t_max=5.0 must satisfy 0 < t_min < t_max",
    "sampler.num_samples=0 must be at least 1",
    "sampler.weights=best must be 'ema' or 'raw'",
    "memorization.threshold=2.0 must be in (0, 1)",
    "memorization.near=1 must be at least 2",
    "run.chunk=0 must be at least 1",
    "run.evaluate_every=0 must be at least 1",
    "run.log_every=0 must be at least 1",
    "run.save_every=-1 must be at least 1",
    "run.keep=0 must be at least 1",
    "run.pack='' must be the name of a file, or None",
    "times.t_min=2.0, times.t_max=1.0 must satisfy 0 <= t_min < t_max",
]


def written(fields: dict) -> list[str]:
    """A dict of fields as arguments."""
    return [f"--config.{field}={value}" for field, value in fields.items()]


def test_d47_all_violations_come_in_one_list_and_nothing_is_compiled(tmp_path):
    no_compiling = """
from memsep_jax.experiments import training
def refuse(*args, **kwargs):
    raise AssertionError("compiled")
training.make_steps = training.init_params = refuse
"""
    told = refused(SMOKE, *written(WRONG), tmp_path=tmp_path, patch=no_compiling)
    for line in TOLD:
        assert line in told, line
    assert f"error: {len(told.splitlines()) - 1} things in the config must" in told


NAMES = {
    "data.name": (sources.SOURCES, "digist", "digits"),
    "process.name": (build.process.PROCESSES, "variance_exploiting", None),
    "times.name": (build.process.TIMES, "log_norml", "log_normal"),
    "prediction.name": (build.score.PREDICTIONS, "nose", "noise"),
    "model.name": (build.MODELS, "dti", "dit"),
    "optimizer.name": (build.train.OPTIMIZERS, "adamax", "adam"),
    "sampler.name": (build.SAMPLERS, "hune", None),
    "sampler.grid": (build.sampling.TIME_GRIDS, "lgo", "log"),
}


def test_d47_unknown_names_list_the_known_ones():
    fields = {field: wrong for field, (_, wrong, _) in NAMES.items()}
    found = violations(smoke(*written(fields)))
    # A prediction is made for a process: without one it is not looked up.
    for field, (known, wrong, meant) in NAMES.items():
        if field == "prediction.name":
            continue
        (line,) = [f for f in found if f.startswith(f"{field}={wrong!r} is not known")]
        assert all(name in line for name in known), line
        assert meant is None or f"did you mean {meant!r}?" in line
    (line,) = violations(smoke("--config.prediction.name=nose"))
    assert "did you mean 'noise'?" in line and "velocity" in line


def test_d47_an_unknown_experiment_lists_the_known_ones(tmp_path):
    told = refused(SMOKE, "--config.experiment=trian", tmp_path=tmp_path)
    assert "experiment='trian' is not known, did you mean 'train'?" in told
    assert "report, train" in told


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data.name": "npz"}, "data.path must be given for npz"),
        ({"model.patch": None}, "model.patch must be given for dit"),
        ({"optimizer.lr": float("nan")}, "optimizer.lr=nan must be a finite number"),
        ({"sampler.t_max": float("inf")}, "sampler.t_max=inf must be a finite number"),
        ({"seed": 2**32}, "seed=4294967296 must be in [0, 2**32)"),
        ({"process.name": "rectified_flow"}, "sampler.t_max=80 is outside of process"),
        ({"process.name": "variance_preserving"}, "draws of times, t="),
        ({"train.batch_size": 6}, "train.batch_size=6 must be a multiple of 4 devices"),
        ({"data.labels": "rand"}, "labels='rand' must be one of none, true, random"),
        ({"data.num_held_out": 1_797}, "leaves nothing to train on"),
        ({"optimizer.warmup": 4}, "optimizer.warmup=4 must be below the number of"),
        ({"optimizer.schedule": "cosin"}, "'cosin' is not one of constant, cosine"),
    ],
)
def test_d47_what_does_not_fit_together_says_so(fields, message):
    config = smoke()
    with config.unlocked():
        config.update_from_flattened_dict(fields)
    assert any(message in line for line in violations(config))


def test_d47_nothing_is_fetched_for_a_config_that_is_wrong(tmp_path, monkeypatch):
    def fetch(*args, **kwargs):
        raise AssertionError("fetched")

    fetch.__signature__ = inspect.signature(sources.cifar10)
    monkeypatch.setitem(sources.SOURCES, "cifar10", fetch)
    config = smoke("--config.data.name=cifar10", "--config.run.chunk=0")
    assert violations(config) == ["run.chunk=0 must be at least 1 sample"]


def test_d47_groups_that_are_missing_are_named():
    config = smoke()
    with config.unlocked():
        del config.sampler
        del config.model["name"]
    with pytest.raises(build.ConfigError, match="model.name is missing") as caught:
        build.build(config)
    assert "sampler.steps is missing" in str(caught.value)


# 48: config files.

FILES = {
    "returns None": ("def get_config():\n    pass\n", "bad.py returned NoneType; it"),
    "returns a dict": ("def get_config():\n    return {}\n", "bad.py returned dict"),
    "no get_config": ("x = 1\n", "bad.py defines no get_config()"),
    "raises": (
        "def get_config():\n    x = {}\n    return x['lr']\n",
        "KeyError: 'lr' ({path}:3)",
    ),
    "imports nothing": ("\nimport nosuchmodule\n", "'nosuchmodule' ({path}:2)"),
    "syntax": ("x = 1\ndef f(:\n", "SyntaxError: invalid syntax ({path}:2)"),
    "wrong type": (
        "from memsep_jax import defaults\ndef get_config():\n"
        "    config = defaults.train()\n    config.train.steps = 'many'\n",
        "({path}:4)",
    ),
    "no variants": ("def get_config():\n    return 1\n", "takes 0 positional"),
}


@pytest.mark.parametrize("kind", FILES)
def test_d48_a_config_file_that_fails_is_one_message(kind, tmp_path):
    text, message = FILES[kind]
    path = tmp_path / "bad.py"
    path.write_text(text)
    variant = ":smoke" if kind == "no variants" else ""
    told = refused(f"--config={path}{variant}", tmp_path=tmp_path)
    assert message.format(path=path) in told
    assert f"--config={path}{variant}: " in told and len(told.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs/nope.py"], "--config=configs/nope.py: no such file"),
        (["--config=configs"], "--config=configs: no such file"),
        (["--config=nope/config.json"], "--config=nope/config.json: no such file"),
        (
            ["--config=configs/digits.py:nope"],
            "variant 'nope' is not known; choose full, smoke (configs/digits.py:",
        ),
        (["--confg=configs/digits.py"], "flag 'confg'. Did you mean: config ?"),
        ([SMOKE, "--work_dir=x"], "flag 'work_dir'. Did you mean: workdir ?"),
        ([SMOKE, "extra"], "unexpected argument 'extra'"),
        ([SMOKE, "--resume_step=x"], "flag --resume_step=x: invalid literal"),
        ([SMOKE, "--config.train=5"], "flag --config.train=5: Failed to parse '5'"),
        ([], "--config=NAME is required"),
    ],
)
def test_d48_a_command_that_is_wrong_is_one_message(arguments, message, tmp_path):
    told = refused(*arguments, tmp_path=tmp_path)
    assert message in told and len(told.splitlines()) == 1


@pytest.mark.parametrize("text", ['{"a": ', "[1]", '{"train": {"steps": "x"}}'])
def test_d48_a_damaged_config_json_is_one_message(text, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(text)
    assert f"--config={path}: " in refused(f"--config={path}", tmp_path=tmp_path)


# 49: the configs that come with the package.


def variants(path) -> list[str]:
    """The names of the variants of a config file."""
    get_config = runpy.run_path(str(path))["get_config"]
    with pytest.raises(ValueError, match="choose") as caught:
        get_config("?")
    return str(caught.value).rpartition("choose ")[2].split(", ")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_d49_every_variant_of_every_config_parses(path):
    module = runpy.run_path(str(path))
    names = variants(path)
    assert {"full", "smoke"} <= set(names)
    for name in names:
        config = module["get_config"](name).lock()
        assert isinstance(config, ConfigDict)
        assert config.experiment in experiments.EXPERIMENTS
        build.check(config)
    assert f"--config=configs/{path.name}" in module["__doc__"]


# 81: what a dry run needs.

POINTS = {  # of configs whose data are elsewhere, and of no known sizes
    "folder": ("npz", 300, 64, 64, 3),
    "folder:small": ("npz", 300, 32, 32, 3),
    "imagenet": ("npz", 300, 64, 64, 3),
    "latents": ("latents", 300, 32, 32, 4),
    "optimum:cifar": ("npz", 5_010, 32, 32, 3),
}


def test_d49_a_dry_run_prints_a_table_and_writes_nothing(tmp_path):
    """Not even a cache in its home, without a network; its hours are measured."""
    home = tmp_path / "home"
    home.mkdir()
    # The cache of matplotlib's fonts is made wherever it is imported.
    env = {"HOME": str(home), "MPLCONFIGDIR": str(tmp_path / "matplotlib")}
    arguments = ("--config=configs/mlp_mixture.py", "--dry_run")
    result = harness.run(*arguments, workdir=home / "run", patch=NO_NETWORK, env=env)
    assert result.code == 0 and result.stderr == "", result.output
    assert not list(home.rglob("*"))
    for pattern in (
        r"│ parameters +│ [\d,]{3,} +│",
        r"│ memory, at most +│ [\d,.]+ [MG]iB",
        r"│ FLOPs per step +│ \d\.?\d*e\+\d+",
    ):
        assert re.search(pattern, result.stdout), (pattern, result.stdout)
    told = re.sub(r"[│\s]+", " ", result.stdout)
    hours = re.search(r"on 1 x cpu (\S+), at (\S+) s for a step(?! of)", told)
    assert float(hours[1]) > 0 and float(hours[2]) > 0, told


@pytest.fixture
def dry(tmp_path, monkeypatch):
    """A dry run of (path, variant) in an empty home without a network: its table."""

    def connect(*args, **kwargs):
        raise AssertionError("a network was asked for")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    # As many images as the configs need: a set of full size takes longer.
    fewer = {
        "cifar10": (10_000, 1_000, (32, 32, 3), 10),
        "fashion_mnist": (30_000, 2_000, (28, 28, 1), 10),
    }
    monkeypatch.setattr(archives, "KNOWN", fewer)
    monkeypatch.setattr(archives, "FASHION_PACKAGE", str(tmp_path / "package"))

    def run(path, variant):
        arguments = [f"--config={path}:{variant}"]
        known = POINTS.get(f"{path.stem}:{variant}", POINTS.get(path.stem))
        if known and variant != "smoke":
            name, *shape = known
            points = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
            points = points if name == "npz" else points.astype(np.float32)
            np.savez(tmp_path / "points.npz", train_images=points)
            fields = {"data.name": name, "data.path": tmp_path / "points.npz"}
            fields |= {"data.classes": None, "data.num_held_out": 10}
            arguments += written(fields)
        home = tmp_path / "home"
        home.mkdir(exist_ok=True)
        monkeypatch.setenv("HOME", str(home))
        monkeypatch.chdir(home)
        table = dry_run.dry_run(harness.config(*arguments), lambda line: None)
        assert not list(home.rglob("*"))
        names, values = (list(column.cells) for column in table.columns)
        return dict(zip(names, values, strict=True))

    return run


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_h81_a_dry_run_of_every_variant_needs_no_network(path, dry, monkeypatch):
    """No step is compiled: of large networks, to trace one takes long enough."""
    known, cost = {}, dry_run._cost

    def once(config, parts, mesh, state):
        """Of a network, whatever it is trained on and for how long."""
        size, leaves = config.train.batch_size, jax.tree.leaves(state)
        key = str((config.model, config.prediction, config.process, size, leaves))
        if key not in known:
            known[key] = cost(config, parts, mesh, state)
        return known[key]

    def measured(config, *args):
        return 3.6, config.train.batch_size

    monkeypatch.setattr(dry_run, "_cost", once)
    monkeypatch.setattr(dry_run, "_measured", measured)
    for variant in variants(path):
        if path.stem in ("audit", "calibrate_cifar"):
            with pytest.raises(build.ConfigError, match="trains nothing"):
                dry(path, variant)
            continue
        table = dry(path, variant)
        assert int(table["parameters"].replace(",", "")) >= 100
        assert re.fullmatch(r"[\d,.]+ MiB", table["memory, at most"])
        assert float(table["FLOPs per step"]) >= 10


@pytest.mark.slow
def test_h81_the_hours_of_a_dry_run_are_measured(dry):
    """On fewer examples than its batch has, which would take minutes."""
    (path,) = (p for p in CONFIGS if p.stem == "dit_cifar")
    table = dry(path, "full")
    (told,) = (value for name, value in table.items() if name.startswith("hours"))
    hours = re.match(r"(\S+), at (\S+) s for a step of [\d,]+ instead", told)
    assert float(hours[1]) > 0 and float(hours[2]) > 0, told


def test_h81_a_set_that_is_not_here_has_the_sizes_that_are_known(tmp_path):
    for name, more in {"cifar10": {}, "tfds": {"dataset": "cifar10"}}.items():
        found = sources.at_hand(name, data_dir=str(tmp_path), **more)
        assert found.images.shape == (50_000, 32, 32, 3)
        assert found.test_images.shape == (10_000, 32, 32, 3)
        assert np.unique(found.labels).tolist() == list(range(10))
    assert not list(tmp_path.iterdir())


def test_h81_a_set_that_is_here_is_read(tmp_path):
    place = tmp_path / "some_set" / "8x8" / "1.0.0"
    place.mkdir(parents=True)
    images = np.arange(256, dtype=np.uint8).reshape(4, 8, 8, 1)
    np.savez(place / archives.DECODED, train_images=images)
    fields = {"dataset": "some_set/8x8", "data_dir": str(tmp_path)}
    np.testing.assert_array_equal(sources.at_hand("tfds", **fields).images, images)
    fields["dataset"] = "some_set/8x8:1.0.0"
    np.testing.assert_array_equal(sources.at_hand("tfds", **fields).images, images)
    fields["dataset"] = "some_set/8x8:2.0.0"
    with pytest.raises(sources.DataError, match="some_set/8x8:2.0.0 is not below"):
        sources.at_hand("tfds", **fields)


def test_h81_what_a_dry_run_misses_is_one_message(tmp_path):
    (path,) = (p for p in CONFIGS if p.stem == "imagenet")
    arguments = [f"--config={path}", "--dry_run", f"--config.data.data_dir={tmp_path}"]
    result = harness.run(*arguments, workdir=tmp_path / "run", patch=NO_NETWORK)
    assert result.code == 3 and len(result.stderr.splitlines()) == 1, result.output
    for part in (f"imagenet_resized/64x64 is not below {tmp_path}", "data.name=npz"):
        assert part in result.stderr
    assert not list(tmp_path.iterdir())


# 50, 51: archives.


def manual(tmp_path) -> Path:
    """Where cifar10 looks for an archive."""
    path = tmp_path / "data" / "downloads" / "manual" / "cifar-10-binary.tar.gz"
    path.parent.mkdir(parents=True)
    return path


def cifar_arguments(tmp_path):
    return (
        SMOKE,
        "--config.data.name=cifar10",
        f"--config.data.data_dir={tmp_path}/data",
    )


def test_d50_without_archive_and_network_it_says_what_to_put_where(tmp_path):
    path = manual(tmp_path)
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(b"half")  # is not mistaken for the archive
    told = refused(*cifar_arguments(tmp_path), tmp_path=tmp_path, code=3, patch=OFFLINE)
    assert archives.CIFAR_URL in told and archives.CIFAR_SHA256 in told
    assert f" at {path}" in told and part.read_bytes() == b"half"


def test_d50_a_page_in_place_of_an_archive_is_refused(tmp_path):
    path = manual(tmp_path)
    path.write_text("<!DOCTYPE html><html>try later</html>")
    with pytest.raises(sources.DataError) as caught:
        build.build(harness.config(*cifar_arguments(tmp_path)))
    told = str(caught.value)
    assert caught.value.exit_code == 3
    assert f"{path}: an HTML page, not an archive: expected" in told
    assert archives.CIFAR_SHA256 in told and "got 37 bytes, " in told


@pytest.mark.parametrize("name", ["idx", "fashion_mnist"])
def test_d50_a_set_of_idx_files_that_is_not_whole_is_named(name, tmp_path):
    folder = tmp_path / "clothes"
    folder.mkdir()
    arguments = (SMOKE, f"--config.data.name={name}", f"--config.data.path={folder}")
    for file in archives.IDX:
        (folder / f"{file}.gz").write_bytes(gzip.compress(bytes(16)))
    told = refused(*arguments, tmp_path=tmp_path, code=3, patch=NO_NETWORK)
    assert f"{folder}/{archives.IDX[0]}.gz begins with 0x00000000, where images" in told
    (folder / f"{archives.IDX[2]}.gz").unlink()
    told = refused(*arguments, tmp_path=tmp_path, code=3, patch=NO_NETWORK)
    assert f"{folder} has no {archives.IDX[2]}, gzipped or not" in told


def test_d51_a_hostile_archive_leaves_nothing_outside(tmp_path):
    path = manual(tmp_path)
    with tarfile.open(path, "w:gz") as archive:
        info = tarfile.TarInfo("../../../escaped")
        info.size = 4
        archive.addfile(info, io.BytesIO(b"evil"))
    trusted = f"""
import hashlib
from memsep_jax.data import archives, sources
from pathlib import Path
raw = Path({str(path)!r}).read_bytes()
archives.CIFAR_BYTES, archives.CIFAR_SHA256 = len(raw), hashlib.sha256(raw).hexdigest()
"""
    told = refused(*cifar_arguments(tmp_path), tmp_path=tmp_path, code=3, patch=trusted)
    assert "refused member '../../../escaped'" in told
    assert not [p for p in tmp_path.rglob("escaped*")]


def test_d51_ten_gigabytes_of_zeros_are_refused_at_once(tmp_path, monkeypatch):
    path = manual(tmp_path)
    info = tarfile.TarInfo("cifar-10-batches-bin/data_batch_1.bin")
    info.size = 10 * 2**30
    path.write_bytes(gzip.compress(info.tobuf() + bytes(2**20)))
    raw = path.read_bytes()
    monkeypatch.setattr(archives, "CIFAR_BYTES", len(raw))
    digest = hashlib.sha256(raw).hexdigest()
    monkeypatch.setattr(archives, "CIFAR_SHA256", digest)
    started = time.monotonic()
    with pytest.raises(sources.DataError, match="refused, too large"):
        archives._cifar_batches(path)
    assert time.monotonic() - started < 5


# 52, 53: pickles.


class Payload:
    """Makes a directory when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_d52_arrays_of_objects_are_refused_unread(tmp_path):
    struck, path = tmp_path / "struck", tmp_path / "images.npz"
    images = np.empty(2, object)
    images[:] = [Payload(struck), Payload(struck)]
    np.savez(path, train_images=images)
    told = refused(
        SMOKE,
        "--config.data.name=npz",
        f"--config.data.path={path}",
        tmp_path=tmp_path,
        code=3,
    )
    assert f"{path}: not a readable .npz" in told and "allow_pickle is never" in told
    assert not struck.exists()


@pytest.mark.parametrize("name", ["weights.pkl", "weights.npz", "weights.npy"])
def test_d53_a_pickle_in_place_of_data_is_refused_unread(name, tmp_path):
    struck, path = tmp_path / "struck", tmp_path / name
    path.write_bytes(pickle.dumps(Payload(struck)))
    config = smoke("--config.data.name=npz", f"--config.data.path={path}")
    with pytest.raises(sources.DataError, match=f"{name}: not a readable") as caught:
        build.build(config)
    assert caught.value.exit_code == 3 and not struck.exists()


def test_d53_a_pickle_is_no_config(tmp_path):
    struck, path = tmp_path / "struck", tmp_path / "config.json"
    path.write_bytes(pickle.dumps(Payload(struck)))
    refused(f"--config={path}", tmp_path=tmp_path)
    assert not struck.exists()


# That the package has nothing to unpickle with: test_security.py.


# 55, 56, and what else a person may give.


def test_d55_a_bad_image_is_named_and_an_empty_folder_refused(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    arguments = (SMOKE, "--config.data.name=folder", f"--config.data.path={pictures}")
    with pytest.raises(sources.DataError, match="no image below it") as caught:
        build.build(harness.config(*arguments))
    assert caught.value.exit_code == 3
    for i in range(3):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(pictures / f"{i}.png")
    (pictures / "broken.jpg").write_bytes(b"not a picture")
    told = refused(*arguments, tmp_path=tmp_path, code=3)
    assert "1 of 4 images cannot be read: broken.jpg" in told
    with pytest.raises(sources.DataError, match="no such folder"):
        build.build(harness.config(*arguments[:2], "--config.data.path=/no/such"))


def pictures(folder):
    """A folder as they are: {name: colour of an image of one colour}."""
    known = {
        "b/grey.png": ("L", 100, (100, 100, 100)),
        "b/deep/sixteen bits.png": ("I;16", 257 * 200, (200, 200, 200)),
        "a/ünï ✓.PNG": ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        "a/half.png": ("RGBA", (0, 0, 0, 128), (127, 127, 127)),
        "a/palette.gif": ("P", 0, (0, 0, 0)),
        "a/black and white.png": ("1", 1, (255, 255, 255)),
        "c/print.tif": ("CMYK", (0, 0, 0, 0), (255, 255, 255)),
        "c/zz.bmp": ("RGB", (1, 2, 3), (1, 2, 3)),
    }
    for name, (mode, colour, _) in known.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, (6, 6), colour).save(path)
    (folder / "a" / "notes.txt").write_text("not an image")
    (folder / "a" / "._half.png").write_text("left by another system")
    (folder / "b" / "loop").symlink_to(folder)
    order = sorted(known, key=lambda name: (name[0], *name.rpartition("/")[::2]))
    return {name: known[name][2] for name in order}


def of_folder(folder, *arguments):
    path = f"--config.data.path={folder}"
    return harness.config(
        "--config=configs/mlp_mixture.py:smoke", "--config.data.name=folder", path,
        "--config.data.num_examples=4", "--config.data.num_held_out=2",
        "--config.data.k=None", "--config.data.d=None", "--config.data.scale=None",
        *arguments,
    )  # fmt: skip


def test_d55_every_kind_of_image_becomes_rgb(tmp_path):
    known = pictures(tmp_path)
    read = sources.folder(tmp_path)
    assert read.images.shape == (8, 6, 6, 3) and read.images.dtype == np.uint8
    for image, (name, colour) in zip(read.images, known.items(), strict=True):
        assert (image == colour).all(), name
    assert read.labels.tolist() == [0] * 4 + [1] * 2 + [2] * 2


@pytest.mark.parametrize("order", ["backwards", "shuffled"])
def test_d55_the_fingerprint_is_that_of_any_order_of_the_directory(
    order, tmp_path, monkeypatch
):
    pictures(tmp_path)
    before = build.build(of_folder(tmp_path)).splits
    walk, rng = os.walk, np.random.default_rng(0)

    def another(names):
        if order == "shuffled":
            rng.shuffle(names)
        else:
            names.sort(reverse=True)

    def listed(top, **options):
        for place, folders, files in walk(top, **options):
            another(folders)
            another(files)
            yield place, folders, files

    monkeypatch.setattr(os, "walk", listed)
    assert [f for *_, f in os.walk(tmp_path)] != [f for *_, f in walk(tmp_path)]
    after = build.build(of_folder(tmp_path)).splits
    assert after.fingerprint == before.fingerprint
    np.testing.assert_array_equal(after.train.x, before.train.x)


def test_d55_sizes_that_differ_need_one_resolution(tmp_path):
    pictures(tmp_path)
    Image.new("RGB", (9, 5)).save(tmp_path / "c" / "wide.png")
    (told,) = violations(of_folder(tmp_path))
    assert "c/wide.png (5, 9, 3)); set resolution to resize all" in told
    built = build.build(of_folder(tmp_path, "--config.data.resolution=4"))
    assert built.splits.train.x.shape == (4, 4, 4, 3)


def damaged(folder):
    """Twelve files that no decoder reads, among good ones."""
    pictures(folder)
    whole = (folder / "c" / "zz.bmp").read_bytes()
    for i in range(8):
        (folder / "b" / f"bad{i}.jpg").write_bytes(whole[: 50 if i % 2 else 0])
    (folder / "b" / "bad8.png").symlink_to("nothing")
    (folder / "b" / "bad9.png").symlink_to("bad9.png")  # to itself
    os.mkfifo(folder / "c" / "pipe.png")  # nobody ever writes to it
    (folder / "c" / "sock.png").mkdir()  # a folder is no image, and no error
    (folder / "c" / "text.webp").write_text("<html>")


def test_d55_what_cannot_be_read_is_named_ten_at_most(tmp_path):
    damaged(tmp_path)
    with pytest.raises(sources.DataError) as caught:
        build.build(of_folder(tmp_path))
    names = ", ".join(f"b/bad{i}.{'jpg' if i < 8 else 'png'}" for i in range(10))
    assert caught.value.exit_code == 3
    assert f"12 of 20 images cannot be read: {names} and 2 more; repair" in str(
        caught.value
    )
    assert "skip_bad=True continues without them" in str(caught.value)


def test_d55_what_cannot_be_read_is_skipped_where_that_is_asked_for(tmp_path):
    clean, dirty = tmp_path / "clean", tmp_path / "dirty"
    pictures(clean)
    damaged(dirty)
    found = build.build(of_folder(dirty, "--config.data.skip_bad=True")).splits
    told = "\n".join(found.notes)
    assert "12 of 20 images cannot be read: b/bad0.jpg" in told
    assert "left out" in told
    assert found.fingerprint == build.build(of_folder(clean)).splits.fingerprint


def test_d55_an_audit_skips_too_and_refuses_a_folder_of_no_other(tmp_path):
    damaged(tmp_path / "train")
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "bad.png").write_bytes(b"")
    config = harness.config("--config=configs/audit.py:smoke").unlock()
    config.update(train=str(tmp_path / "train"), held_out=None, skip_bad=True)
    config.samples = str(tmp_path / "samples")
    with pytest.raises(sources.DataError, match="1 of 1 images .*: bad.png") as caught:
        audit.read(config)
    assert str(caught.value).startswith("--config.samples: ")
    assert "continues without" not in str(caught.value)
    Image.new("RGB", (6, 6)).save(tmp_path / "samples" / "good.png")
    sets, origins, _ = audit.read(config)
    assert (len(sets.samples), len(sets.train)) == (1, 8)
    assert any("1 of 2 images" in note for note in origins["samples"].notes)
    assert any("12 of 20 images" in note for note in origins["train"].notes)
    config.skip_bad = None
    with pytest.raises(sources.DataError, match="--config.samples: .*1 of 2 images"):
        audit.read(config)


def test_d56_labels_asked_of_a_set_without_labels_are_refused(tmp_path):
    arguments = ("--config=configs/mlp_mixture.py:smoke", "--config.data.labels=true")
    config = harness.config(*arguments)
    with pytest.raises(sources.DataError, match="the source lacks labels") as caught:
        build.build(config)
    assert caught.value.exit_code == 3


def test_d56_labels_out_of_range_are_refused(tmp_path):
    path = tmp_path / "images.npz"
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), np.uint8)
    np.savez(path, train_images=images, train_labels=np.arange(40) - 1)
    config = smoke(
        "--config.data.name=npz",
        f"--config.data.path={path}",
        "--config.data.labels=true",
    )
    with pytest.raises(sources.DataError, match=r"train_labels\[0\] has a label out"):
        build.build(config)


# 57: without the weights of Inception.


@pytest.fixture
def small_inception(monkeypatch):
    """The rules of its weights, without its network: one tensor is all."""
    monkeypatch.setattr(inception, "shapes", lambda: {"fc.bias": (1008,)})
    monkeypatch.setattr(figures, "encode", lambda figure, kind: kind.encode())


def inception_weights(kind, path):
    """Writes what is not, or not all, of the weights.   Returns: what is told."""
    tensors = {"fc.bias": np.ones(1008, np.float32)}
    about = {"standard": "true", "digest": checkpoint.digest(tensors)}
    if kind == "absent":
        return f"{path}: No such file or directory"
    if kind == "digest":
        tensors["fc.bias"][5] = 2
    if kind == "another":
        tensors = {"fc.bias": np.ones(10, np.float32)}
    weights.write(path, tensors, about)
    if kind == "partial":
        path.write_bytes(path.read_bytes()[:-100])
    if kind == "page":
        path.write_text("<!DOCTYPE html><html>try later</html>")
    told = {"digest": "damaged (other tensors than", "another": "of another network"}
    told |= {"partial": "damaged (", "page": "not a safetensors file"}
    return f"{path}: {told[kind]}"


@pytest.mark.parametrize("kind", ["absent", "partial", "digest", "another", "page"])
def test_d57_without_inception_the_rest_is_measured(
    kind, small_inception, tmp_path, capsys
):
    path = tmp_path / "inception.safetensors"
    told = inception_weights(kind, path)
    config = harness.config("--config=configs/audit.py:smoke").unlock()
    config.features.update(name="inception", path=str(path))
    config.samples, config.held_out = "digits[40:80]", None
    experiments.run(config, tmp_path / "run")
    said = capsys.readouterr().out
    assert said.count("note: nothing is measured on inception features: ") == 1
    assert told.replace("\n", " ") in " ".join(said.split())
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["features"] is None and metrics["quality"] == []
    assert metrics["memorization"]["count"] == 20
    assert record.read_json(tmp_path / "run" / "run.json")["status"] == "complete"
    page = (tmp_path / "run" / "report.html").read_text()
    assert "nothing is measured on inception features" in page
    assert str(tmp_path) not in page  # of a path, the last part

    config.features.required = True
    with pytest.raises(weights.WeightsError) as caught:
        experiments.run(config, tmp_path / "required")
    assert caught.value.exit_code == 3 and told in str(caught.value)
    assert not (tmp_path / "required").exists()


def test_d57_with_its_weights_it_is_no_longer_left_out(small_inception, monkeypatch):
    """The control: the same rules let the right file pass."""
    made = features.Extractor(
        "inception", "FD (inception)", lambda x, memory=0: x, 1, lambda: 0
    )
    monkeypatch.setattr(features, "_extractor", lambda *_: made)
    tensors = {"fc.bias": np.ones(1008, np.float32)}
    about = {"standard": "true", "digest": checkpoint.digest(tensors)}
    monkeypatch.setattr(features, "read", lambda path: (tensors, about))
    assert features.inception((8, 8, 1), "w.safetensors").title == "FID"


def test_more_points_than_there_are_is_refused():
    (told,) = violations(smoke("--config.data.num_examples=100000"))
    assert "num_examples=100000, but the pool has 1" in told


def test_an_error_of_the_data_waits_for_those_of_the_config(tmp_path):
    """First what a person typed, all of it; then what lies on the disk."""
    fields = {"data.name": "npz", "data.path": tmp_path / "no.npz", "run.chunk": 0}
    assert violations(smoke(*written(fields))) == [
        "run.chunk=0 must be at least 1 sample"
    ]


def test_a_config_that_is_right_builds():
    parts = build.build(smoke())
    assert parts.splits.train.x.shape == (16, 8, 8, 1) and jax.device_count() == 4


# H79: names of workdirs.

DIGITS = "--config=configs/digits.py"
LONG_PATH = "--config.data.path=" + "x" * 200
GIVEN = command.load("configs/digits.py")


def named(fields: dict) -> tuple[str, dict]:
    """The default workdir of digits.py with some fields, and what its config holds."""
    config = command.load("configs/digits.py")
    config.update_from_flattened_dict(fields)
    name = command.default_workdir([], "configs/digits.py", GIVEN, config)
    return name, command._values(config)


@pytest.mark.parametrize("defaults_of", [defaults.train, defaults.audit])
def test_h79_two_fields_have_two_names(defaults_of):
    names = command._values(defaults_of())
    assert len({command._short(name) for name in names}) == len(names)


WORDS = st.text("ab/_-=,. (é", max_size=4) | st.text(max_size=130)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 20),
        "data.path": WORDS,
        "data.classes": st.lists(st.integers(0, 3), max_size=2).map(tuple),
        "optimizer.lr": st.sampled_from([1e-5, 1e-3, 0.5, 2.0, 1e300])
        | st.floats(0, 1),
        "times.mean": st.floats(-2, 2),
        "train.flip": st.booleans(),
        "prune.source": WORDS,
        "run.pack": WORDS,
        "sweep.seeds": st.integers(1, 3),
    },
)


@given(st.lists(FIELDS, min_size=2, max_size=2))
@example([{"data.path": "a/b"}, {"data.path": "a_b"}])
@example([{"data.path": "a-source=b"}, {"data.path": "a", "prune.source": "b"}])
@example([{"data.path": "a" * 130}, {"data.path": "a" * 131}])
@example([{"seed": 1, "data.path": "a"}, {"data.path": "a", "seed": 1}])
@example([{"seed": 0}, {"run.pack": "a", "sweep.seeds": 2}])
@settings(max_examples=100, deadline=None)
def test_h79_two_commands_never_share_a_workdir(fields):
    """And one config, however it comes about, has one name."""
    (one, first), (other, second) = map(named, fields)
    assert (one == other) == (first == second)
    for name in (one, other):
        assert len(name) <= len("runs/") + command.LONG and name.count("/") == 1


def test_h79_a_name_that_is_cut_or_replaced_ends_in_a_hash():
    plain, path, cut = harness.workdirs(
        [DIGITS, "--config.data.path=a_b"],
        [DIGITS, "--config.data.path=../a b/c;d"],
        [DIGITS, LONG_PATH, "--config.seed=3"],
    )
    assert plain == "runs/digits-path=a_b"
    assert re.fullmatch(r"runs/digits-path=\.\._a_b_c_d-[0-9a-f]{8}", path)
    assert re.fullmatch(r"runs/digits-path=x+-[0-9a-f]{8}", cut)
    assert len(cut) == len("runs/") + 120


def test_h79_a_field_that_comes_later_changes_no_hash(monkeypatch):
    """Or a run would begin anew where the package is a newer one."""
    name, _ = named({"data.path": "a/b"})
    group = schema.TRAIN["train"]
    newer = group.fields | {"later": schema.field(3, "A newer release's.")}
    monkeypatch.setitem(schema.TRAIN, "train", group._replace(fields=newer))
    config = command.load("configs/digits.py")
    assert config.train.later == 3
    config.data.path = "a/b"
    args = [], "configs/digits.py", config.copy_and_resolve_references(), config
    args[2].data.path = None
    assert command.default_workdir(*args) == name


def test_h78_a_workdir_is_named_by_what_the_config_holds():
    spelled = {
        "digits-times.mean=-1.25": (
            ["--config.times.mean=-1.25"],
            ["--config.times.mean", "-1.25"],
            ["-config.times.mean", "-125e-2"],
        ),
        "digits-flip=True": (
            ["--config.train.flip"],
            ["--config.train.flip=true"],
            ["-config.train.flip", "--noconfig.data.balanced"],
        ),
        "digits": (
            ["--noconfig.train.flip"],
            ["-noconfig.train.flip", "--config.seed=0"],
            ["--config.train.flip", "--noconfig.train.flip"],
        ),
        "digits-train.steps=1000": (
            ["--config.train.steps=1e3"],
            ["--config.train.steps", "1000"],
            ["--config.train.steps=9", "--config.train.steps=1000"],
        ),
        "digits-classes=3,4": (
            ["--config.data.classes=3,4"],
            ["--config.data.classes=(3, 4)"],
        ),
        "digits-num_examples=9-optimizer.lr=1e-5": (
            ["--config.optimizer.lr=1e-5", "--config.data.num_examples=9"],
            ["--config.data.num_examples=9", "--config.optimizer.lr=0.00001"],
        ),
    }
    commands = [[DIGITS, *words] for ways in spelled.values() for words in ways]
    expected = [f"runs/{name}" for name, ways in spelled.items() for _ in ways]
    assert harness.workdirs(*commands) == expected


def test_h79_a_run_that_has_a_former_name_goes_on_in_it(tmp_path):
    argument = f"--config={harness.ROOT}/configs/digits.py"
    words = {
        "digits-path=a_b": ["--config.data.path=a/b"],
        "digits-classes=_3,_4_": ["--config.data.classes=(3, 4)"],
        "digits-prune.lr=1e-3": ["--config.prune.lr=1e-3"],
        "digits-seed=3-num_examples=9": [
            "--config.seed=3",
            "--config.data.num_examples=9",
        ],
        ("digits-path=" + "x" * 200)[:120]: [LONG_PATH],
    }
    commands = [[argument, *ways] for ways in words.values()]
    now = harness.workdirs(*commands, cwd=tmp_path)
    for name, ways in words.items():
        config = parsed(argument, *ways)
        # Fields of groups that leave a run where it is may have been others.
        config["run"]["chunk"] = 7
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.json").write_text(json.dumps(config))
    found = harness.workdirs(*commands, cwd=tmp_path)
    assert found == [f"runs/{name}" for name in words]
    # That of another config, which had the same name, does not.
    others = [
        [argument, "--config.data.path=a_b", "--config.seed=1"],
        [argument, "--config.data.path=a b"],
        [argument, LONG_PATH + "x"],
    ]
    assert not set(harness.workdirs(*others, cwd=tmp_path)) & set(found)
    assert len(set(now)) == len(now)


def test_h79_a_config_json_means_the_workdir_of_its_run(tmp_path):
    run = tmp_path / "elsewhere" / "mine"
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(parsed(SMOKE)))
    (tmp_path / "copy.json").write_text(json.dumps(parsed(SMOKE)))
    argument = f"--config={run}/config.json"
    commands = {
        (argument,): str(run),
        (argument, "--config.run.chunk=9", "--config.experiment=report"): str(run),
        ("--config=elsewhere/mine/config.json", "--config.seed=0"): "elsewhere/mine",
        (argument, "--config.seed=3"): "runs/mine-seed=3",
        ("--config=copy.json",): "runs/copy",  # no run's
    }
    found = harness.workdirs(*commands, cwd=tmp_path)
    assert found == list(commands.values())
