"""Trackers are guests: none of them can end a run."""

import builtins
import sys
import types

import pytest

from memsep_jax import defaults
from memsep_jax.experiments import trackers

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


def test_tensorboard_gets_every_scalar(tmp_path, monkeypatch):
    seen = []

    class SummaryWriter:
        def __init__(self, path):
            assert path == str(tmp_path / "tensorboard")

        def add_scalar(self, *args):
            seen.append(args)

        def flush(self):
            pass

    fake = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "tensorboardX", fake)
    trackers.tracker("tensorboard", tmp_path, defaults.train(), seen.append)(ROW)
    assert seen == [("loss", 0.5, 3), ("train_loss_mean", 2.0, 3)]


def test_wandb_stays_offline_without_a_key(tmp_path, monkeypatch):
    calls = []

    class Run:
        def log(self, row, step):
            calls.append((row, step))

    fake = types.SimpleNamespace(
        api=types.SimpleNamespace(api_key=None),
        init=lambda **arguments: calls.append(arguments["mode"]) or Run(),
    )
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    trackers.tracker("wandb", tmp_path, defaults.train(), calls.append)(ROW)
    assert calls == ["offline", ({"loss": 0.5, "train_loss_mean": 2.0}, 3)]


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
