"""Trackers are guests: none of them can end a run."""

import builtins
import sys
import types

import pytest
from PIL import Image

from memsep_jax import defaults
from memsep_jax.experiments import training
from memsep_jax.experiments.runtime import trackers
from memsep_jax.experiments.studies.monitor import Monitor

ROW = {"step": 3, "loss": 0.5, "train_losses": [1.0, 3.0], "ratio_interval": [0, 1]}


@pytest.mark.parametrize(("name", "extra"), [("tensorboard", "tb"), ("wandb", "wandb")])
def test_a_missing_package_is_one_warning(name, extra, tmp_path, monkeypatch):
    real = builtins.__import__

    def blocked(module, *args, **kwargs):
        if module in ("tensorboardX", "wandb"):
            raise ImportError(f"No module named {module!r}")
        return real(module, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", blocked)
    said = []
    track = trackers.tracker(name, tmp_path, defaults.train(), said.append)
    track(ROW)
    track(ROW)
    (line,) = said
    assert f"memsep_jax[{extra}]" in line and "metrics.jsonl" in line


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "grid.png"
    Image.new("RGB", (3, 2), "red").save(path)
    return path


def test_tensorboard_gets_scalars_words_and_pictures(tmp_path, picture, monkeypatch):
    seen = []

    class SummaryWriter:
        def __init__(self, path):
            assert path == str(tmp_path / "tensorboard")

        def add_scalar(self, *args):
            seen.append(args)

        def add_text(self, *args):
            seen.append(args)

        def add_image(self, name, pixels, step, dataformats):
            seen.append((name, pixels.shape, step, dataformats))

        def flush(self):
            pass

    fake = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "tensorboardX", fake)
    track = trackers.tracker("tensorboard", tmp_path, defaults.train(), seen.append)
    track(ROW | {"verdict": "copies", "samples": picture})
    assert seen == [
        ("loss", 0.5, 3),
        ("train_loss_mean", 2.0, 3),
        ("verdict", "copies", 3),
        ("samples", (2, 3, 3), 3, "HWC"),
    ]


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("known", [False, True])
def test_wandb_stays_offline_without_a_key(known, old, tmp_path, picture, monkeypatch):
    calls = []

    class Run:
        summary: dict = {}

        def log(self, row, step):
            calls.append((row, step))

    def login(verify, **others):
        if old and others:
            raise TypeError("login() got an unexpected keyword argument 'prompt'")
        assert others == {"prompt": False} and not verify
        return known

    def init(mode, settings, **others):
        assert settings["init_timeout"] <= 30  # no hang, where no server answers
        assert "project" not in others  # wandb reads the person's own WANDB_PROJECT
        calls.append(mode)
        return Run()

    api = types.SimpleNamespace(api_key="key" if known else None)
    fake = types.SimpleNamespace(api=api, init=init, login=login, Image=str)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    track = trackers.tracker("wandb", tmp_path, defaults.train(), calls.append)
    track(ROW | {"verdict": "copies", "samples": picture})
    mode = "online" if known else "offline"
    row = {"loss": 0.5, "train_loss_mean": 2.0, "samples": str(picture)}
    assert calls == [mode, (row, 3)] and Run.summary == {"verdict": "copies"}


def test_a_grid_leaves_only_where_images_may_be_shown(picture):
    config = defaults.train()
    monitor = types.SimpleNamespace(config=config, _grid=lambda step: picture)
    assert Monitor._picture(monitor, 3) == picture
    config.run.images = False
    assert Monitor._picture(monitor, 3) is None


def test_the_learning_rate_is_that_of_the_step():
    """At 0 warm-up starts; the peak is at its end; a cosine ends at 0."""
    config = defaults.train()
    config.optimizer.update({"lr": 0.5, "schedule": "cosine", "warmup": 2})
    config.train.steps = 10
    rate = training.learning_rate(config, 100)
    # The halves of float32 are exact, and the cosine rounds.
    assert [float(rate(step)) for step in (0, 1, 2)] == [0, 0.25, 0.5]
    assert float(rate(6)) == pytest.approx(0.25) and abs(float(rate(10))) < 1e-7
    config.optimizer.name = "my_nets:optimizer"  # nobody knows its schedule
    assert training.learning_rate(config, 100) is None


def test_a_tracker_that_fails_is_not_asked_again(tmp_path, monkeypatch):
    asked, said = [], []

    def failing(workdir, config):
        def track(row):
            asked.append(row)
            raise OSError("disk full")

        return track

    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", failing)
    track = trackers.tracker("tensorboard", tmp_path, defaults.train(), said.append)
    track(ROW)
    track(ROW)
    assert len(asked) == 1 and len(said) == 1 and "disk full" in said[0]
