"""What the benchmarks time side by side is the same function."""

import argparse
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memsep_jax import lipschitz, parallel

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


@pytest.mark.slow
def test_the_analytic_scores_of_pytorch_are_ours():
    """Where a mask is thresholded, rounding may decide about a number."""
    pytest.importorskip("torch", reason="of the extra dev")
    pytest.importorskip("faiss", reason="of the extra dev")
    cases = load("analytic").measure(n=60, batch=2, size=8, patch=3, rounds=1)
    check(load("run").rows({"analytic": {"cases": cases}}, LIMITS))
    assert [case["case"].split(",")[0] for case in cases] == [
        "gaussian", "local", "equivariant_local", "covariance_local",
    ]  # fmt: skip
    assert max(case["difference"] for case in cases) < 1e-4, cases


def quick(benchmark, tmp_path, monkeypatch):
    """The rows of a benchmark as run.py --quick starts it, and those run.py makes."""
    name, path = benchmark.__name__, tmp_path / "rows.json"
    words = [*" ".join(load("run").RUNS[name]).split(), f"--json={path}"]
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
    benchmark.main()
    found = json.loads(path.read_text())
    for row in found["rows"]:
        numbers = [row[c] for c in benchmark.COLUMNS if row[c] is not None]
        assert all(0 < number < math.inf for number in numbers), row
    return found["rows"], load("run").rows({name: found}, LIMITS)


LIMITS = {"float32": 1e12, "default": 4e12, "bfloat16": 8e12, "memory": 1e10}


def check(rows, limits=LIMITS):
    """Rows of run.py, made of `limits`, are of numbers that fit together."""
    assert rows
    for row in rows:
        least = row["flops"] / limits[row["product"]], row["bytes"] / limits["memory"]
        assert row["share"] == pytest.approx(max(least) / row["ours_s"])
        assert row["limit"] == (row["product"] if least[0] > least[1] else "memory")
        numbers = [row["ours_s"], row["items"], row["flops"], row["bytes"]]
        if row["peer"]:
            numbers.append(row["ratio"])
            assert row["ratio"] == pytest.approx(row["peer_s"] / row["ours_s"])
        assert all(0 < n < math.inf for n in numbers), row


HEADS = 4 * (4 * 16 * 4 + 3 * 4)  # 4 of 8, of size 4, of width 16
NEURONS = 64 * (2 * 16 + 1)  # 64 of 128
BLOCKS = 18 * 16**2 + 15 * 16  # 1 of 2
REMOVED = {
    "heads": HEADS,
    "neurons": NEURONS,
    "blocks": BLOCKS,
    "heads + neurons": HEADS + NEURONS,
}


@pytest.mark.slow
def test_compact_is_masked_with_fewer_parameters_and_flops(tmp_path, monkeypatch):
    """Half of the units: the parameters that they have are gone, the outputs stay."""
    (dense, *rows), made = quick(load("pruned"), tmp_path, monkeypatch)
    check(made)
    assert [row["peer"] for row in made] == [None] * 2 + ["masked"] * 2 * len(REMOVED)
    assert len(rows) == 2 * len(REMOVED)
    for masked, compact in zip(rows[::2], rows[1::2], strict=True):
        assert masked["case"] == compact["case"]
        assert (masked["form"], compact["form"]) == ("masked", "compact")
        assert masked["parameters"] == dense["parameters"]
        assert masked["parameters"] - compact["parameters"] == REMOVED[masked["case"]]
        assert masked["flops"] == dense["flops"] > compact["flops"] > 0
        assert masked["difference"] > 1e-3  # from dense
        assert compact["difference"] < 1e-5  # from masked


@pytest.mark.slow
def test_a_step_and_a_sampler_of_pytorch_are_ours(tmp_path, monkeypatch):
    """From the same weights and noise: the losses of two steps, and the samples."""
    pytest.importorskip("torch", reason="of the extra dev")
    # The run that it starts compiles as fast as this process does.
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    rows, made = quick(load("train_step"), tmp_path, monkeypatch)
    check(made)
    assert [(row["network"], row["what"]) for row in rows] == [
        (network, what) for network in ("unet", "dit") for what in ("step", "sampler")
    ]
    assert all(row["difference"] < 1e-4 for row in rows), rows
    # In a run noise is drawn as well, but the program is the same: in a loop, gradients
    # of convolutions took 10 times as long.
    assert all(row["run_ms"] < 5 * row["ours_ms"] for row in rows[::2]), rows


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


# Of benchmarks/scaling.py.


def test_an_exponent_is_the_slope_of_a_power_law_with_its_error():
    fit = load("scaling").fit_exponent
    np.testing.assert_allclose(fit([2, 4, 8, 16], [3 * x**1.5 for x in (2, 4, 8, 16)]),
                               (1.5, 0), atol=1e-12)  # fmt: skip
    # Log seconds 0, 1, 1 at log sizes -1, 0, 1: rests -1/6, 1/3, -1/6 of slope 1/2.
    slope, error = fit(np.exp([-1, 0, 1]), np.exp([0, 1, 1]))
    np.testing.assert_allclose((slope, error), (1 / 2, math.sqrt(1 / 6 / 2)))
    assert np.isnan(fit([4], [1.0])).all()


def test_what_devices_are_given_is_counted_from_the_program():
    scaling, text = (
        load("scaling"),
        """
      %r = (f32[2,3]{1,0}, /*index=1*/bf16[5]{0}) all-reduce(%a, %b), to_apply=%sum
      %s = (f32[4]{0}, f32[16]{0}) all-gather-start(%c), dimensions={0}
      %d = f32[16]{0} all-gather-done(%s)
      ROOT %x = pred[3]{0} collective-permute(%all-reduce.1), metadata={op="a"}
      %y = f32[7]{0} add(%d, %all-gather.2)
    """,
    )
    found = scaling.communicated(text)
    assert found == {"all-reduce": 34, "all-gather": 64, "collective-permute": 3}
    mesh = parallel.make_mesh()
    x = jax.device_put(jnp.ones((8, 3)), parallel.by_batch(mesh))
    whole = jax.jit(lambda x: x * 2, out_shardings=parallel.replicated(mesh))
    assert scaling.communicated(whole.lower(x).compile().as_text()) == {
        "all-gather": 4 * 8 * 3
    }
    total = jax.jit(lambda x: jnp.sum(x, 0), out_shardings=parallel.replicated(mesh))
    assert scaling.communicated(total.lower(x).compile().as_text()) == {
        "all-reduce": 4 * 3
    }


def test_the_score_of_split_points_is_that_of_one_device():
    scaling, d, b = load("scaling"), 6, 5
    one, four = (scaling.shared_score(jax.devices()[:k], 32, d, b) for k in (1, 4))
    assert scaling.difference(four.call(), one.call()) < 1e-5
    found = scaling.communicated(four.compiled.as_text())
    assert found == {"collective-permute": four.sent}
    assert four.sent == 2 * 4 * b * (2 * d + 2)


def test_the_flops_of_a_transformer_are_those_of_its_products():
    """XLA counts what lies between them too: some percent."""
    scaling, tokens = load("scaling"), 64
    model, x0 = scaling.dit(128, 2), jax.ShapeDtypeStruct((16, 16, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), x0, scaling.T)["params"]
    forward = jax.jit(scaling.applied(model)).lower(params, x0, scaling.T)
    counted = scaling.flops_of(forward)
    assert 1 < counted / (scaling.dit_flops(tokens, 128, 2) / 3) < 1.15
    # And of three blocks, all is known from one and two.
    net = scaling.dit_network(patch=2, side=16, width=128, depth=3, num_heads=4)
    deep = jax.eval_shape(scaling.dit(128, 3).init, jax.random.key(0), x0, scaling.T)[
        "params"
    ]
    assert net.parameters == scaling.count(deep)
    assert net.flops == scaling.dit_flops(tokens, 128, 3)
    assert net.activations > 0


def test_a_plan_is_what_one_counts_by_hand():
    scaling = load("scaling")
    machine = scaling.Machine(
        devices=4, memory=100, bfloat16=10, float32=5, bandwidth=2, link=3,
        host_memory=1_000,
    )  # fmt: skip
    net = scaling.Network(parameters=10, flops=100, activations=3)
    rows = scaling.plan(16, 2, 8, 3, machine, net)
    found = {row["what"].split(",")[0].split(" (")[0]: row for row in rows}
    assert [row["memory"] for row in rows[:5]] == [8, 32, 128, 3 * 2 * 2, 6]
    assert [row["fits"] for row in rows[:5]] == [True, True, False, True, True]
    whole, split = rows[5], rows[6]
    assert (whole["memory"], split["memory"]) == (200, 50 + 40)
    assert (whole["s"], split["s"]) == (2 * 100 / 10 + 800 / 2, 2 * 100 / 10 + 200 / 2)
    assert (whole["sent"], split["sent"]) == (60, 60)
    assert whole["link_s"] == 60 / 3
    sums = 4 * 3 * (2 * 2 + 2)
    score = found["empirical score of 3"]
    assert (score["memory"], score["sent"]) == (2 * sums, 2 * sums)
    # 4 points a device: two products, data 4 times, logits 10, contenders 4 x 16.
    numbers = 4 * 4 * 2 + 10 * 4 * 3 + 4 * 16 * 3 * 2
    assert score["s"] == 4 * 4 * 2 * 3 / 5 + 4 * numbers / 2
    assert found["2 neighbours of 3"]["sent"] == 3 * 3 * 5 * 4

    host = scaling.Host(1, 2, 3, 4, 5, 6, digest_rate=8)
    parts = scaling.host_plan(16, 2, host, net)
    assert [row["s"] for row in parts] == [0, 32, 32, 48, 64, 20]
    broken = scaling.breaks(2, 8, machine, net, host, patience=110)
    assert broken == sorted(broken, key=lambda row: row["n"])
    largest = {row["what"].split(":")[0]: row["n"] for row in broken}
    assert largest["`data.indices`"] == 2**27 - 1
    assert largest["an hour of start"] == 110 // (2 + 2 + 4)
    assert largest["host memory"] == 1_000 // (12 + 5 + 6)
    assert largest["host memory beside points that stream"] == 1_000 // (5 + 6)


def test_tables_take_their_places_and_a_text_without_them_is_refused(tmp_path):
    scaling, path = load("scaling"), tmp_path / "a.md"
    path.write_text(
        "# A\n<!-- one -->\nold\n<!-- end -->\nB\n<!-- two -->\n<!-- end -->\n"
    )
    scaling.write_markdown(path, {"one": r"\1", "two": "| 2 |"})
    assert path.read_text() == (
        "# A\n<!-- one -->\n\\1\n<!-- end -->\nB\n<!-- two -->\n| 2 |\n<!-- end -->\n"
    )
    with pytest.raises(SystemExit, match="no place for three"):
        scaling.write_markdown(path, {"three": ""})


@pytest.mark.slow
def test_costs_devices_and_plan_are_measured_and_written(tmp_path, monkeypatch):
    scaling, numbers = load("scaling"), tmp_path / "scaling.json"
    text = tmp_path / "scaling.md"
    text.write_text((ROOT / "docs" / "scaling.md").read_text())
    flags = ["--quick", f"--json={numbers}", f"--markdown={text}"]
    monkeypatch.setattr(sys, "argv", ["scaling.py", *flags])
    scaling.main()
    found = json.loads(numbers.read_text())
    for row in found["costs"]["exponents"]:
        assert math.isfinite(row["exponent"]) and min(row["ratios"]) > 0, row
    rows = found["devices"]
    assert [(row["work"], row["way"]) for row in rows] == [
        (work, way) for work in scaling.SHARED for way in ("strong", "weak")
    ]
    for row in rows:
        assert row["difference"] < 1e-5, row
        one, two = row["flops"]
        assert two == pytest.approx(one / 2 if row["way"] == "strong" else one, rel=0.1)
    sent = {row["work"]: (row["sent"], row["formula"]) for row in rows}
    given, formula = sent["empirical score"]
    assert given == {"collective-permute": formula}
    assert sent["neighbours"] == ({}, 0)
    given, formula = sent["training step"]
    assert given == {"all-reduce": formula + 4}  # and the loss
    given, formula = sent["training step, split state"]
    assert sum(given.values()) == pytest.approx(formula, rel=0.1)
    assert all(table in text.read_text() for table in scaling.tables(found).values())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # their jvp
def test_power_iteration_of_pytorch_finds_our_norms(tmp_path, monkeypatch):
    """And between two of the points it is what two points have."""
    pytest.importorskip("torch", reason="of the extra dev")
    benchmark = load("lipschitz")
    rows, _ = quick(benchmark, tmp_path, monkeypatch)
    assert all(row["difference"] < 1e-4 for row in rows), rows
    of_points, _ = rows
    # Points of uniform noise are about sqrt(2 d / 3) apart.
    norm = lipschitz.two_point(math.sqrt(2 * 192 / 3), benchmark.OU, benchmark.T)
    assert 0.5 * norm < of_points["largest"] < 2 * norm
    assert of_points["flops"] == (1 + 2 * 5) * 4 * 4 * 500 * 192


def test_flops_of_a_transformer_are_those_of_its_products():
    """24 width^2 + 4 tokens width a token and a block, and the doors."""
    pytest.importorskip("torch", reason="of the extra dev")
    benchmark, (width, depth, tokens) = load("train_step"), (64, 2, 64)
    model = benchmark.DiT(patch=2, width=width, depth=depth, num_heads=2)
    x = np.zeros((4, 16, 16, 3), np.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), x[0], np.zeros(()))["params"]
    a_block = tokens * (24 * width**2 + 4 * tokens * width) + 12 * width**2
    doors = 4 * tokens * 12 * width
    found = benchmark.forward_flops(model, params, x[0])
    assert 1 < found / (depth * a_block + doors) < 1.15  # what is no product


CASE = {"case": "n = 5", "ours_s": 0.5, "items": 10, "unit": "scores", "peer": "dense",
        "peer_s": 1.5, "flops": 1e11, "bytes": 1e8, "product": "float32"}  # fmt: skip


def test_a_row_has_its_ratio_and_the_share_of_the_binding_limit():
    row = load("run").row
    found = row(CASE, LIMITS)
    assert (found["ratio"], found["limit"]) == (3, "float32")
    assert found["share"] == pytest.approx(0.1 / 0.5)
    found = row(CASE | {"product": "default"}, LIMITS)
    assert found["limit"] == "default" and found["share"] == pytest.approx(0.025 / 0.5)
    found = row(CASE | {"bytes": 4e9}, LIMITS)
    assert found["limit"] == "memory" and found["share"] == pytest.approx(0.4 / 0.5)
    alone = row(CASE | {"peer": None, "peer_s": None}, LIMITS)
    assert alone["ratio"] is None and alone["share"] == pytest.approx(0.1 / 0.5)
    assert row(CASE, {})["share"] is None  # limits.py failed


def test_the_page_has_a_line_for_every_case_and_every_failure():
    run = load("run")
    slow = CASE | {"case": "a | b", "peer_s": 0.25}
    written = {
        "limits": {"cases": []},
        "score": {"cases": [CASE, slow, CASE | {"peer": None, "peer_s": None}]},
        "step": {"failed": "ModuleNotFoundError: No module named 'torch'"},
    }
    rows = run.rows(written, LIMITS)
    assert [row["benchmark"] for row in rows] == ["score"] * 3 + ["step"]
    found = {"command": "run.py", "date": "2026-01-01", "device": "a device, 2 cores",
             "versions": run.versions(), "limits": LIMITS, "rows": rows}  # fmt: skip
    page = run.markdown({"speed.json": found})
    lines = [line for line in page.splitlines() if line.startswith("| s")]
    assert lines == [
        "| score | n = 5 | dense | **3.00**, 500 ms, 20 % float32 |",
        "| score | a \\| b | dense | **0.50**, 500 ms, 20 % float32 |",
        "| score | n = 5 |  | 500 ms, 20 % float32 |",
        "| step |  |  | failed: ModuleNotFoundError: No module named 'torch' |",
    ]
    for text in ("1,000 GFLOP/s", "10 GB/s", "a device, 2 cores", "(speed.json)"):
        assert text in page
    assert len(list(run.show(found))) == 2


def test_each_machine_has_a_column_and_the_worst_ratio_is_bold():
    run = load("run")
    about = {"command": "run.py", "date": "2026-01-01", "device": "a device",
             "versions": {}, "limits": LIMITS}  # fmt: skip
    slower, other = CASE | {"ours_s": 1.0}, CASE | {"case": "n = 6"}
    runs = {
        name: about | {"rows": run.rows({"score": {"cases": cases}}, LIMITS)}
        for name, cases in {"a.json": [CASE], "b.json": [slower, other]}.items()
    }
    page = run.markdown(runs)
    assert "| benchmark | case | peer | machine 1 | machine 2 |" in page
    assert [line for line in page.splitlines() if line.startswith("| s")] == [
        "| score | n = 5 | dense | 3.00, 500 ms, 20 % float32 "
        "| **1.50**, 1,000 ms, 10 % float32 |",
        "| score | n = 6 | dense |  | **3.00**, 500 ms, 20 % float32 |",
    ]
    assert "| 2 | a device |" in page and "[b.json](b.json)" in page


def test_a_machine_is_named_by_its_processor(monkeypatch, tmp_path):
    limits, path = load("limits"), tmp_path / "cpuinfo"
    monkeypatch.setattr(limits, "CPUINFO", path)
    path.write_text("processor\t: 0\nmodel name\t: A  Processor 9\n" * 2)
    assert limits.device() == f"A Processor 9, {limits.CORES} cores"
    path.unlink()
    assert limits.device().endswith(f" {limits.CORES} cores")


def run_all(tmp_path, *flags, **env):
    """run.py as a person starts it: the exit code, its JSON and its page."""
    path, page = tmp_path / "speed.json", tmp_path / "speed.md"
    command = [sys.executable, str(ROOT / "benchmarks/run.py"), "--quick", *flags]
    done = subprocess.run(
        [*command, f"--json={path}", f"--markdown={page}"],
        capture_output=True,
        text=True,
        env=os.environ | env,
    )
    assert path.exists(), done.stderr
    return done.returncode, json.loads(path.read_text()), page.read_text()


@pytest.mark.slow
def test_one_table_of_several_benchmarks(tmp_path):
    for package in ("faiss", "torch"):
        pytest.importorskip(package, reason="of the extra dev")
    names = ["neighbours", "empirical_score", "lipschitz"]
    code, found, page = run_all(tmp_path, "--only", *names)
    rows = found["rows"]
    assert code == 0 and list(found["limits"]) == list(LIMITS)
    check(rows, found["limits"])
    assert list(dict.fromkeys(row["benchmark"] for row in rows)) == names
    assert list(found["about"]) == ["limits", *names]
    assert {"python", "jax", "jaxlib", "torch", "faiss-cpu"} <= set(found["versions"])
    for row in rows:
        assert f"| {row['benchmark']} | {row['case']} | {row['peer']} |" in page


@pytest.mark.slow
def test_a_peer_that_is_not_there_is_a_row_that_says_so(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    before = [p for p in sys.path if p]
    code, found, page = run_all(
        tmp_path,
        *("--only", "train_step"),
        PYTHONPATH=":".join([str(tmp_path), *before]),
    )
    assert code == 1
    assert found["rows"] == [
        {"benchmark": "train_step", "failed": "ImportError: no torch here"}
    ]
    assert "| train_step |  |  | failed: ImportError: no torch here |" in page


def test_the_shares_of_a_step_are_those_of_its_kernels():
    profile = load("step_profile")
    kernels = [
        ("dot.1", "jit(step)/jvp(vmap(DiT))/block_0/mlp_in/dot_general", 30),
        ("copy.2", "jit(step)/transpose(jvp(vmap(DiT)))/block_0/transpose", 40),
        ("fusion.3", "jit(step)/jvp(vmap(jit(_normal)))/erf_inv", 10),
        ("fusion.4", "jit(step)/select_n", 15),
        ("copy.5", "", 5),
    ]
    assert profile.shares(kernels) == {
        "forward": 0.3, "backward": 0.4, "times and noise": 0.1, "update": 0.15,
        "not named": 0.05, "products": 0.3, "copies": 0.45, "selects": 0.15,
    }  # fmt: skip


@pytest.mark.slow
def test_a_step_is_traced(monkeypatch, tmp_path):
    profile, path = load("step_profile"), tmp_path / "profile.json"
    flags = [f"--config={ROOT}/configs/digits.py:smoke", f"--json={path}", "--steps=3"]
    monkeypatch.setattr(sys, "argv", ["step_profile.py", *flags])
    profile.main()
    found = json.loads(path.read_text())
    assert sum(found["shares"][part] for part in profile.PARTS) == pytest.approx(1)
    assert all(found["shares"][part] > 0 for part in profile.PARTS[:4])
    assert found["kernels"] > 100 and found["kernel_ms"] > 0
