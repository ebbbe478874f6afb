"""What the benchmarks time side by side is the same function."""

import argparse
import importlib.util
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


def load(name):
    path = ROOT / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    return benchmark


@pytest.mark.slow
def test_the_forms_of_the_empirical_score_agree():
    """At t = 0.5, where float32 of the dense forms is still right."""
    torch = pytest.importorskip("torch", reason="of the extra dev")
    benchmark, t = load("empirical_score"), 0.5
    points = benchmark.images(None, 300)
    x = benchmark.noised(points, 8, t)
    alpha, v = np.exp(-t / 2), -np.expm1(-t)
    truth = (alpha * benchmark._float64(points, x, alpha, v) - x) / v
    found = [
        benchmark.ours(points, x, t),
        benchmark.dense_jax(points, x, t),
        benchmark.dense_torch(torch.from_numpy(points), torch.from_numpy(x), t).numpy(),
    ]
    for form in found:
        np.testing.assert_allclose(form, truth, rtol=1e-3, atol=1e-3)


HEADS = 4 * (4 * 16 * 4 + 3 * 4)  # 4 of 8, of size 4, of width 16
NEURONS = 64 * (2 * 16 + 1)  # 64 of 128
BLOCKS = 18 * 16**2 + 15 * 16  # 1 of 2


@pytest.mark.parametrize(
    "removed",
    [
        {"blocks": BLOCKS},
        pytest.param(
            {"heads": HEADS, "neurons": NEURONS, "heads + neurons": HEADS + NEURONS},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_compact_is_masked_with_fewer_parameters_and_flops(
    removed, tmp_path, monkeypatch
):
    """Half of the units: the parameters that they have are gone, the outputs stay."""
    benchmark, path = load("pruned"), tmp_path / "pruned.json"
    cases = {case: benchmark.CASES[case] for case in removed}
    monkeypatch.setattr(benchmark, "CASES", cases)
    flags = "--width=16 --depth=2 --num_heads=4 --size=8 --batch=2 --rounds=1"
    argv = ["pruned.py", *flags.split(), "--ratios", "0.5", f"--json={path}"]
    monkeypatch.setattr(sys, "argv", argv)
    benchmark.main()
    dense, *rows = json.loads(path.read_text())["rows"]
    assert len(rows) == 2 * len(removed)
    for masked, compact in zip(rows[::2], rows[1::2], strict=True):
        assert masked["case"] == compact["case"]
        assert (masked["form"], compact["form"]) == ("masked", "compact")
        assert masked["parameters"] == dense["parameters"]
        assert masked["parameters"] - compact["parameters"] == removed[masked["case"]]
        assert masked["flops"] == dense["flops"] > compact["flops"] > 0
        assert masked["difference"] > 1e-3  # from dense
        assert compact["difference"] < 1e-5  # from masked
        for row in (dense, masked, compact):
            assert all(0 < row[n] < math.inf for n in benchmark.COLUMNS), row


@pytest.mark.slow
def test_a_step_and_a_sampler_of_pytorch_are_ours(tmp_path, monkeypatch):
    """From the same weights and noise: the losses of two steps, and the samples."""
    pytest.importorskip("torch", reason="of the extra dev")
    benchmark, path = load("train_step"), tmp_path / "step.json"
    flags = "--size=8 --batch=4 --unet_width=8 --unet_depth=1 --dit_width=32"
    flags += f" --dit_depth=1 --samples=4 --rounds=1 --json={path}"
    monkeypatch.setattr(sys, "argv", ["train_step.py", *flags.split()])
    benchmark.main()
    rows = json.loads(path.read_text())["rows"]
    assert [(row["network"], row["what"]) for row in rows] == [
        (network, what) for network in ("unet", "dit") for what in ("step", "sampler")
    ]
    for row in rows:
        assert row["difference"] < 1e-4, row
        assert all(0 < row[name] < math.inf for name in benchmark.COLUMNS), row


@pytest.mark.slow
def test_all_searches_find_the_copies_and_ours_at_distance_zero():
    for package in ("faiss", "torch"):
        pytest.importorskip(package, reason="of the extra dev")
    sizes = dict(data=None, n=500, m=160, size=8, k=2, rounds=1)
    rows = load("neighbours").measure(argparse.Namespace(**sizes))
    assert [row["search"] for row in rows] == ["ours", "ours, uint8", "faiss", "torch"]
    assert all(row["copy_wrong"] == 0 and row["ratio"] > 0 for row in rows)
    for row in rows[:2]:
        assert row["copy_error"] == row["near_wrong"] == 0
        assert row["near_error"] < 1e-6
