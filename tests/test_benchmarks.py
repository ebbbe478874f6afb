"""What the benchmarks time side by side is the same function."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_forms_of_the_empirical_score_agree():
    """At t = 0.5, where float32 of the dense forms is still right."""
    torch = pytest.importorskip("torch", reason="of the extra dev")
    path = ROOT / "benchmarks" / "empirical_score.py"
    spec = importlib.util.spec_from_file_location("empirical_score", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    t = 0.5
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
