"""A name becomes a constructor: one of the tables, or a user's own function."""

import re

import pytest

from memsep_jax import defaults, experiments, sources
from memsep_jax.experiments import record, training
from memsep_jax.experiments.config import build, construct
from memsep_jax.experiments.studies import audit

MINE = """
import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from memsep_jax import process, sources


class Net(nn.Module):
    size: int = 4

    @nn.compact
    def __call__(self, x, level, label=None, train=False):
        h = jnp.append(x.ravel(), level)
        return nn.Dense(x.size)(nn.relu(nn.Dense(self.size)(h))).reshape(x.shape)


class Deaf(nn.Module):
    def __call__(self, x):
        return x


class Broken(nn.Module):
    def __call__(self, *args):
        return nobody


class Flat(nn.Module):
    @nn.compact
    def __call__(self, x, *args):
        return nn.Dense(1)(x)


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x, t):
        return nn.Dense(x.size)(x)


class NoModule:
    pass


def absent():
    raise KeyError("weights")


def apply(params, x, t):
    return x


def gated():
    def init(key, x, t):
        layer = jnp.zeros((2, 4, 2))
        return {"block_0": {"attention": {"query": {"kernel": layer}}}}

    def apply(params, x, t, gates=None):
        return x

    return init, apply


def slow(rate=1.0):
    def sigma(t):
        return jnp.sqrt(-jnp.expm1(-2 * rate * t))

    return process.Process(lambda t: jnp.exp(-rate * t), sigma)


def ring(count):
    angle = np.linspace(0, 2 * np.pi, count, endpoint=False)
    x = np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32)
    return sources.Source(x)


def study(config, session, resume_step=None):
    session.begin("")
    (session.workdir / "mine.txt").write_text(config.model.name)


def three(**_):
    return 3


def nothing(**_):
    return None


def pair(**_):
    return np.zeros((5, 2), np.float32), None


def lists(**_):
    return sources.Source([[1.0, 2.0], [3.0, 4.0]])


def flat(**_):
    return process.Process(1.0, 0.5)


def alone():
    return None


number = 3
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A file of a user's own, in the current directory; its name."""
    name = f"mine_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def own(mine):
    config = defaults.switch(defaults.train(), model=f"{mine}:Net", data=f"{mine}:ring")
    config.model.size = 8
    config.data.count = 40
    return defaults.smoke(config)


def test_the_fields_are_the_arguments_of_the_users_function(mine, key):
    config = own(mine)
    config.process.name, config.process.rate = f"{mine}:slow", 2.0
    config.sampler.update(t_min=1e-3, t_max=3.0)
    config.times.update(name="uniform", t_min=1e-3, t_max=3.0)
    parts = build.build(config)
    assert parts.model.takes == {"label", "train"}
    assert training.init_params(parts, key)["Dense_1"]["bias"].shape == (8,)
    assert parts.splits.train.x.shape == (16, 2)
    assert parts.process.alpha(0.5) == pytest.approx(0.3679, rel=1e-3)
    config.model.sise = 8
    with pytest.raises(build.ConfigError, match="sise is not .* did you mean 'size'?"):
        build.build(config)


def test_a_network_and_points_of_ones_own_are_trained(mine, tmp_path):
    experiments.run(own(mine), tmp_path / "run")
    assert record.read_json(tmp_path / "run" / "run.json")["status"] == "complete"
    known = record.read_json(tmp_path / "run" / "config.json")
    assert defaults.restored(known).model.to_dict() == own(mine).model.to_dict()
    build.build(defaults.restored(known))


def test_a_study_of_ones_own_is_run(mine, tmp_path):
    config = defaults.smoke(defaults.train())
    config.experiment = f"{mine}:study"
    experiments.run(config, tmp_path / "run")
    assert (tmp_path / "run" / "mine.txt").read_text() == "dit"


def left(run, config):
    """A workdir that holds the config of a run."""
    for name in ("config.json", "run.json"):
        record.write_json(run / name, build.to_json(config))
    return str(run)


def test_an_audit_does_not_run_the_code_of_a_run(mine, tmp_path):
    run = left(tmp_path / "run", own(mine))
    with pytest.raises(sources.DataError, match=f"code of its own .*{mine}:ring"):
        audit.images_of(run, "train")


def test_an_audit_needs_the_data_of_a_run_and_not_its_network(tmp_path):
    config = defaults.switch(defaults.train(), model="nobodys:Net")
    config.data.num_examples = 10
    images = audit.images_of(left(tmp_path / "run", config), "train").images
    assert images.shape == (10, 8, 8, 1)


@pytest.mark.parametrize(
    "name, words",
    [
        ("nobodys:f", "model.name='nobodys:f': there is no nobodys.py in "),
        ("{}:Nut", "has no function 'Nut', did you mean 'Net'?"),
        ("{}:number", ":number' is int, not a function or a class"),
        ("os:system", "os is an installed package"),
        ("numpy:load", "numpy is an installed package"),
        ("broken:f", "broken cannot be imported (ZeroDivisionError"),
        ("../x:f", "there is no"),
        (":f", "there is no"),
        ("no.where:f", "no.where cannot be imported"),
    ],
)
def test_a_function_that_is_not_there_is_one_message(name, words, mine, tmp_path):
    (tmp_path / "broken.py").write_text("1 / 0")
    with pytest.raises(build.ConfigError) as caught:
        construct.look_up({}, name.format(mine), "model.name")
    assert words in str(caught.value) and caught.value.exit_code == 2


@pytest.mark.parametrize(
    "name, words",
    [
        ("Deaf", r"has __call__\(self, x\): it must take \(x, t\) of one example"),
        ("Broken", r"raises NameError: .*\(.*mine_.*\.py:\d+\)$"),
        ("Flat", r"makes float32\[1\] of x float32\[2\]: the answer must have the"),
        ("NoModule", "makes NoModule: a network is a module of flax.linen, a class"),
        ("absent", r"raises KeyError: 'weights' \(.*mine_.*\.py:\d+\)$"),
        ("apply", r"is called as \(params, x, t\), as a network is: name a function"),
    ],
)
def test_a_network_of_ones_own_that_cannot_be_called(name, words, mine):
    config = own(mine)
    config.model = {"name": f"{mine}:{name}"}
    with pytest.raises(build.ConfigError, match=words):
        build.build(config)


@pytest.mark.parametrize(
    "group, name, words",
    [
        ("data", "three", "makes int: it must return a sources.Source of numpy"),
        ("data", "nothing", "makes None: it must return a sources.Source"),
        ("data", "pair", "makes tuple: it must return a sources.Source"),
        ("data", "lists", "makes Source: it must return .* of numpy arrays: images"),
        ("process", "three", r"makes int: it must return a process.Process\(alpha"),
        ("process", "flat", "makes Process: .* of two functions of t"),
        ("prediction", "nothing", "makes None: it must return a score.Prediction"),
        ("times", "three", "makes int: it must return a function key -> t"),
        ("prune_times", "pair", "makes tuple: it must return a function key -> t"),
        ("optimizer", "three", "makes int: it must return an optax.Gradient"),
    ],
)
def test_what_an_own_function_makes_must_fit_its_group(group, name, words, mine):
    config = own(mine)
    config[group].name = f"{mine}:{name}"
    with pytest.raises(build.ConfigError) as caught:
        build.build(config)
    field = rf"(?m)^  {group}\.name='{mine}:{name}' "
    (line,) = re.findall(f"{field}.*", str(caught.value))
    assert re.search(field + words, line)


@pytest.mark.parametrize("name, takes", [("alone", r"\(\)"), ("linear", r"\(a\)")])
def test_a_study_of_ones_own_takes_config_and_session(name, takes, mine, tmp_path):
    (tmp_path / f"{mine}.py").write_text(f"{MINE}\ndef linear(a): pass\n")
    config = defaults.smoke(defaults.train())
    config.experiment = f"{mine}:{name}"
    words = f"experiment='{mine}:{name}' takes {takes}: a study is a function of"
    with pytest.raises(build.ConfigError, match=words):
        experiments.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_labels_need_a_network_that_takes_them(mine):
    config = own(mine)
    config.model = {"name": f"{mine}:Plain"}
    build.build(config)
    config.data.update(labels="random", num_labels=3)
    words = "takes no label, and the data have 3 .* argument label, or .*labels=none"
    with pytest.raises(build.ConfigError, match=words):
        build.build(config)


def test_a_network_without_gates_is_not_pruned(mine):
    config = own(mine)
    config.model = {"name": f"{mine}:Plain"}
    config.prune.ratio = 0.5
    with pytest.raises(build.ConfigError, match="prune.ratio=0.5 .* takes none: give"):
        build.build(config)


def test_a_pair_that_keeps_no_outputs_is_not_pruned_by_activation(mine):
    config = own(mine)
    config.model = {"name": f"{mine}:gated"}
    config.prune.update(ratio=0.5, criterion="activation")
    words = "prune.criterion=activation needs the outputs of heads, which"
    with pytest.raises(build.ConfigError, match=words):
        build.build(config)


def test_a_message_names_the_fields_behind_the_arguments():
    group = {"name": "dit", "patch": 3, "width": 8}
    with (
        pytest.raises(ValueError) as caught,
        construct.naming("model", group),
    ):
        raise ValueError("patch=3 and width=8, in /a/patch=3, of min_width=1")
    assert str(caught.value) == (
        "model.patch=3 and model.width=8, in /a/patch=3, of min_width=1"
    )
