"""Numbers that are not finite, too few, doubled, or at the edge of float32 (C)."""

import json
import logging
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from faults import harness
from memsep_jax import (
    checkpoint,
    data,
    empirical,
    experiments,
    fidelity,
    memorization,
    neighbours,
    process,
    prune,
    score,
    train,
)
from memsep_jax.experiments import record, training
from memsep_jax.experiments.config import build
from memsep_jax.experiments.reporting import report
from memsep_jax.experiments.runtime import session
from memsep_jax.experiments.studies import capacity, dry_run, evaluate
from memsep_jax.experiments.studies import training_run as job
from memsep_jax.models import DiT, exact

PROCESSES = {name: make() for name, make in process.PROCESSES.items()}
FEW = settings(deadline=None, max_examples=4)
# An MLP 2 x 32 on digits, 12 samples in 3 chunks.
TINY = (
    "--config=configs/digits.py:smoke",
    "--config.model.name=mlp",
    *harness.TINY[3:],
)


def tiny(*arguments):
    return harness.config(*TINY, *arguments)


# 31, 32: values that are not finite.


@pytest.mark.slow
def test_c31_a_loss_that_explodes_stops_the_run_and_is_explained(tmp_path):
    workdir = tmp_path / "run"
    arguments = (*TINY, "--config.optimizer.lr=1e20")
    first = harness.run(*arguments, workdir=workdir)
    assert first.code == 4, first.output
    assert "Traceback" not in first.stderr
    (path,) = workdir.glob("nonfinite_step_*.json")
    told = json.loads(path.read_text())
    step = told["step"]
    assert f"step {step} gave loss" in first.stderr and str(path) in first.stderr
    assert "Lower optimizer.lr" in first.stderr
    assert path.name == f"nonfinite_step_{step}.json"
    assert len(told["indices"]) == 8 and len(told["sigma"]) == 2
    norms = [float(told[name]) for name in ("loss", "grad_norm", "update_norm")]
    assert not np.isfinite(norms).all()
    # The metrics before it are on disk, and end where the numbers do.
    assert [row["step"] for row in harness.rows(workdir)] == list(range(1, step))
    for saved in checkpoint.steps(workdir / "checkpoints"):
        assert saved < step
        like = harness.like(workdir, saved)
        state = checkpoint.restore(workdir / "checkpoints", saved, like)
        assert all(np.isfinite(a).all() for a in state.values() if a.dtype.kind == "f")
    assert record.read_json(workdir / "run.json")["status"] == "failed"

    again = harness.run(*arguments, workdir=workdir)
    assert again.code == 4 and f"step {step} gave loss" in again.stderr, again.output


def poisoned(monkeypatch, config, step, value=jnp.nan):
    """Puts a value in one training point that batch `step`, and none before, holds."""
    parts = build.build(config)
    n, size = len(parts.splits.train.x), config.train.batch_size
    key = build.keys(config.seed).data
    batches = [np.asarray(data.indices(n, key, i, size)) for i in range(step)]
    (point, *_) = set(batches[-1]) - set(np.concatenate([[-1], *batches[:-1]]))
    x = parts.splits.train.x.at[point].set(value)
    splits = parts.splits._replace(train=parts.splits.train._replace(x=x))
    monkeypatch.setattr(data, "splits", lambda *args, **kwargs: splits)
    return int(point)


@pytest.mark.parametrize("log_every", harness.some([1, 50]))
def test_c32_one_bad_batch_is_caught_at_its_step_logged_or_not(
    log_every, tmp_path, monkeypatch
):
    config = tiny(
        "--config.data.num_examples=64",
        f"--config.run.log_every={log_every}",
        "--config.run.save_every=6",
        "--config.run.evaluate_every=6",
        "--config.train.steps=6",
    )
    point = poisoned(monkeypatch, config, step=3)
    with pytest.raises(train.NonFiniteError, match="step 3 gave loss nan") as caught:
        experiments.run(config, tmp_path)
    assert caught.value.exit_code == 4
    told = json.loads((tmp_path / "nonfinite_step_3.json").read_text())
    assert told["step"] == 3 and point in told["indices"]
    assert told["loss"] == "nan" and told["nonfinite_gradients"]
    assert 0 < told["sigma"][0] <= told["sigma"][1]
    assert checkpoint.steps(tmp_path / "checkpoints") == []
    steps = [row["step"] for row in record.read_metrics(tmp_path / "metrics.jsonl")]
    assert steps == ([1, 2] if log_every == 1 else [])


def test_c31_the_bad_update_is_not_applied():
    tx = optax.adam(1e-3)
    step = jax.jit(train.make_train_step(lambda p, x, key: jnp.sum(p * x), tx, 0.9))
    state, _ = step(train.init(jnp.ones(3), tx), jnp.ones((4, 3)), jax.random.key(0))
    for bad in (jnp.nan, jnp.inf):
        after, found = step(state, jnp.full((4, 3), bad), jax.random.key(0))
        assert checkpoint.digest(after) == checkpoint.digest(state)
        assert int(found["step"]) == 1 and not np.isfinite(found["loss"])


def test_c31_a_state_that_is_not_finite_is_never_saved(tmp_path):
    with pytest.raises(ArithmeticError, match="not finite: not saved"):
        checkpoint.save(tmp_path, 1, {"a": np.array([1.0, np.nan], np.float32)})
    assert checkpoint.steps(tmp_path) == []


# 33: a gradient far above the usual.


def learn(config, workdir):
    """Trains in this process.   Returns: the rows of metrics, the last state."""
    with session.Session(workdir, config) as running:
        state = job.learn(config, build.build(config), running)
    return {row["step"]: row for row in harness.rows(workdir)}, state


def test_c33_an_outlier_is_skipped_and_counted_also_after_a_resume(
    tmp_path, monkeypatch, capsys
):
    """A point of 1,000 in batch 70, where all others are in [-1, 1]."""

    def config():
        return tiny(
            "--config.data.num_examples=1000",
            "--config.data.num_held_out=8",
            "--config.model.depth=1",
            "--config.optimizer.schedule=constant",
            "--config.optimizer.skip_spikes=20",
            "--config.train.steps=72",
            "--config.run.save_every=68",
            "--config.run.evaluate_every=1000",
        )

    poisoned(monkeypatch, config(), step=70, value=1e3)
    rows, state = learn(config(), tmp_path)
    assert [rows[step]["skipped"] for step in (1, 69, 70, 71)] == [0, 0, 1, 1]
    usual = np.median([rows[step]["grad_norm"] for step in range(6, 70)])
    assert rows[70]["grad_norm"] > 20 * usual
    assert rows[70]["update_norm"] == 0 < min(rows[69]["update_norm"], 1)
    assert "1 of 72 steps were skipped" in capsys.readouterr().out

    # The window comes back with the state: the first steps after it see all of it.
    assert checkpoint.steps(tmp_path / "checkpoints") == [68, 72]
    for path in (tmp_path / "checkpoints").glob("*72*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    again, resumed = learn(config(), tmp_path)
    assert checkpoint.digest(resumed) == checkpoint.digest(state)
    assert [again[step]["skipped"] for step in (69, 70, 71)] == [0, 1, 1]


def test_c33_a_factor_that_ordinary_steps_exceed_is_refused():
    with pytest.raises(build.ConfigError, match="optimizer.skip_spikes=0.5 must be ab"):
        build.build(tiny("--config.optimizer.skip_spikes=0.5"))


# 34: data that are not finite, out of range, or constant.


def npz(path, at=None, value=None, dtype=np.float32):
    images = np.random.default_rng(0).uniform(-1, 1, (40, 8, 8, 1)).astype(dtype)
    if at is not None:
        images[at, 3, 3] = value
    np.savez(path, train_images=images)
    return path


def from_npz(path, *arguments):
    return harness.config(
        "--config=configs/digits.py:smoke",
        "--config.data.name=npz",
        f"--config.data.path={path}",
        *arguments,
    )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.nan, r"train_images\[7\] has NaN or Inf"),
        (-np.inf, r"train_images\[7\] has NaN or Inf"),
        (1.5, r"train_images\[7\] has values outside \[-1, 1\]"),
    ],
)
def test_c34_bad_pixels_are_refused_with_file_and_index(value, message, tmp_path):
    path = npz(tmp_path / "bad.npz", 7, value)
    with pytest.raises(data.DataError, match=f"bad.npz: {message}") as caught:
        build.build(from_npz(path))
    assert caught.value.exit_code == 3


@pytest.mark.slow
def test_c34_at_the_command_line(tmp_path):
    path = npz(tmp_path / "bad.npz", 7, np.nan)
    result = harness.run(
        "--config=configs/digits.py:smoke",
        "--config.data.name=npz",
        f"--config.data.path={path}",
        workdir=tmp_path / "run",
    )
    assert result.code == 3 and "Traceback" not in result.stderr, result.output
    assert f"error: {path}: train_images[7] has NaN or Inf" in result.stderr
    assert not (tmp_path / "run").exists()


def test_c34_constant_images_are_allowed_with_a_note(tmp_path):
    path = npz(tmp_path / "constant.npz", 7, 0.5)
    images = dict(np.load(path))["train_images"]
    images[7] = 0.5
    np.savez(path, train_images=images)
    (note,) = build.build(from_npz(path)).splits.notes
    assert "1 constant images, the first at 7" in note


# 35, 36: the empirical score.


def points(n, d, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (n, d)).astype(np.float32)


def time_of(name, sigma):
    """The t at which a process has this sigma, in float64."""
    decay = -np.log1p(-(sigma**2))
    return {
        "variance_exploding": sigma,
        "rectified_flow": sigma,
        "ornstein_uhlenbeck": decay,
        "variance_preserving": (np.sqrt(0.01 + 39.8 * decay) - 0.1) / 19.9,
    }[name]


def exact_score(x, alpha, sigma, train_x):
    """Weights and score in float64, of the very float32 numbers that went in."""
    train_x, x = train_x.astype(np.float64), np.asarray(x, np.float64)
    alpha, sigma = float(alpha), float(sigma)
    gaps = x - alpha * train_x
    logits = -np.sum(gaps**2, axis=1) / (2 * sigma**2)
    weights = np.exp(logits - logits.max())
    weights /= weights.sum()
    return weights, -weights @ gaps / sigma**2


# As a run compiles it, not as tests do: below sigma = 1e-4 the last digits of
# alpha D - x need the fused multiply-add.
FAST = {"xla_backend_optimization_level": 3}
SCORES = {
    name: jax.jit(empirical.score(points(37, 64), p, 10), compiler_options=FAST)
    for name, p in PROCESSES.items()
}
WEIGHTS = {
    name: jax.jit(
        lambda x, t, p=p: empirical.posterior_weights(
            jnp.asarray(points(37, 64)), p, x, t
        )
    )
    for name, p in PROCESSES.items()
}


@pytest.mark.parametrize("sigma", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("name", PROCESSES)
def test_c35_the_empirical_score_is_that_of_float64(name, sigma):
    train_x, p = points(37, 64), PROCESSES[name]
    t = jnp.float32(time_of(name, sigma))
    alpha, sigma = p.alpha(t), p.sigma(t)
    noise = np.random.default_rng(1).standard_normal(64)
    for shift in (0, 1):  # at a training point; where X_t is found
        x = float(alpha) * train_x[3] + shift * float(sigma) * noise
        x = jnp.asarray(x, jnp.float32)
        weights, expected = exact_score(x, alpha, sigma, train_x)
        got = np.asarray(SCORES[name](x, t))
        found = np.asarray(WEIGHTS[name](x, t))
        assert np.isfinite(got).all() and np.isfinite(found).all()
        np.testing.assert_allclose(found.sum(), 1, atol=1e-6)
        np.testing.assert_allclose(found, weights, atol=1e-5)
        # At the point itself all is rounding: that of alpha x_i, half an ulp.
        atol = 1e-4 * np.linalg.norm(expected) if shift else 2**-24 / float(sigma) ** 2
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=atol)
        gaps = np.asarray(x)[None] - np.float32(alpha) * train_x
        naive = np.exp(-np.sum(gaps**2, axis=1) / np.float32(2 * sigma**2))
        if shift and sigma < 1e-4:
            assert naive.sum() < 1e-6  # exp() alone would divide by nothing


@pytest.mark.parametrize(
    ("name", "t"),
    [
        ("ornstein_uhlenbeck", 60.0),  # alpha 1e-13
        ("variance_preserving", 1.0),
        ("variance_preserving", 1e-6),
        ("rectified_flow", 1 - 1e-6),
        ("variance_exploding", 80.0),
        ("variance_exploding", 2e-3),
    ],
)
def test_c35_the_ends_of_time(name, t):
    train_x, p = points(37, 64), PROCESSES[name]
    t = jnp.float32(t)
    x = np.random.default_rng(2).standard_normal(64).astype(np.float32)
    x = np.asarray(p.alpha(t)) * train_x[5] + np.asarray(p.sigma(t)) * x
    weights, expected = exact_score(x, p.alpha(t), p.sigma(t), train_x)
    got = np.asarray(SCORES[name](x, t))
    found = np.asarray(WEIGHTS[name](x, t))
    atol = 1e-4 * np.abs(expected).max()
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=atol)
    np.testing.assert_allclose(found.sum(), 1, atol=1e-6)
    np.testing.assert_allclose(found, weights, atol=1e-5)


@pytest.mark.parametrize(("n", "chunks"), [(1, [5]), (35, [1, 12, 60])])
def test_c36_the_score_does_not_depend_on_chunks_or_order(n, chunks):
    train_x, ve = points(n, 6), PROCESSES["variance_exploding"]
    rng, sigmas = np.random.default_rng(0), np.float32([1.0, 0.1, 1e-3])
    x = (train_x[0] + sigmas[:, None] * rng.standard_normal((3, 6))).astype(np.float32)
    expected = [
        exact_score(*at, train_x)[1] for at in zip(x, [1] * 3, sigmas, strict=True)
    ]

    def both(chunk):
        @jax.jit
        def of(train_x):
            denoise, score_fn = (
                jax.vmap(make(train_x, ve, chunk))
                for make in (empirical.denoiser, empirical.score)
            )
            return denoise(x, sigmas), score_fn(x, sigmas)

        return of

    whole, _ = both(n)(train_x)
    for chunk in chunks:
        of = both(chunk)
        for order in (np.arange(n), rng.permutation(n)):
            got, scores = of(train_x[order])
            np.testing.assert_allclose(got, whole, atol=1e-6)
            for found, truth in zip(scores, expected, strict=True):
                atol = 1e-4 * np.linalg.norm(truth)
                np.testing.assert_allclose(found, truth, rtol=1e-4, atol=atol)


@FEW
@given(
    n=st.sampled_from([2, 13, 60]),
    m=st.integers(1, 9),
    chunk=st.sampled_from([1, 2, 7, 64]),
    block=st.sampled_from([1, 5, 64]),
    seed=st.integers(0, 99),
)
def test_c36_neighbours_do_not_depend_on_chunks_or_order(n, m, chunk, block, seed):
    rng = np.random.default_rng(seed)
    # Far from zero, where padding lies, and samples at zero: padding would be nearest.
    train_x = (rng.standard_normal((n, 5)) + 9).astype(np.float32)
    samples = np.concatenate(
        [np.zeros((1, 5)), rng.standard_normal((m, 5)) + 9], dtype=np.float32
    )
    gaps = samples[:, None].astype(np.float64) - train_x[None]
    exact = np.sort(np.sqrt(np.sum(gaps**2, axis=2)), axis=1)[:, :2]
    nearest = np.argsort(np.sum(gaps**2, axis=2), axis=1, kind="stable")[:, :2]
    order = rng.permutation(n)
    for rows in (np.arange(n), order):
        search = neighbours.searcher(train_x[rows], 2, chunk, block)
        found = search(samples)
        np.testing.assert_allclose(found.distances, exact, rtol=1e-5)
        np.testing.assert_array_equal(rows[found.indices], nearest)


# 37, 38, 39: copies, duplicates, few points.


def test_c37_an_exact_copy_has_distance_zero_and_the_right_index():
    train_x = points(400, 3_072)
    train_x[300] = train_x[17]  # of equal ones, the first
    rows = np.array([0, 17, 300, 255, 256, 399])
    found = neighbours.nearest(train_x[rows], train_x, k=2, chunk=4)
    np.testing.assert_array_equal(found.distances[:, 0], 0)
    np.testing.assert_array_equal(found.indices[:, 0], [0, 17, 17, 255, 256, 399])
    assert (found.distances[:, 1] > 1).all() and np.isfinite(found.distances).all()


@pytest.mark.parametrize("eps", [1e-1, 1e-2, 1e-3, 1e-4])
def test_c37_a_near_copy_has_the_distance_of_float64(eps):
    train_x = points(300, 3_072)
    rows = np.arange(0, 300, 29)
    noise = np.random.default_rng(3).standard_normal((len(rows), 3_072))
    samples = (train_x[rows] + eps * noise / np.sqrt(3_072)).astype(np.float32)
    found = neighbours.nearest(samples, train_x)
    np.testing.assert_array_equal(found.indices[:, 0], rows)
    exact = np.linalg.norm(samples.astype(np.float64) - train_x[rows], axis=1)
    np.testing.assert_allclose(found.distances[:, 0], exact, rtol=1e-3)
    # The form that is fast is wrong here: a square below zero, or one far off.
    a, b = samples, train_x[rows]
    gram = np.sum(a**2, 1) - 2 * np.sum(a * b, 1) + np.sum(b**2, 1)
    if eps == 1e-4:
        assert (np.abs(np.sqrt(np.maximum(gram, 0)) - exact) > 1e-3 * exact).any()


def test_c37_ties_go_to_the_lowest_index():
    square = np.array([[1, 0], [0, 1], [-1, 0], [0, -1]], np.float32)
    found = neighbours.nearest(np.zeros((1, 2), np.float32), square, k=4)
    np.testing.assert_array_equal(found.indices, [[0, 1, 2, 3]])


def test_c38_a_copy_of_a_duplicated_image_is_memorized():
    train_x = points(20, 8)
    doubled = np.concatenate([train_x, np.repeat(train_x[3:4], 5, axis=0)])
    result = memorization.ratio(train_x[[3, 4]], doubled)
    np.testing.assert_array_equal(result.memorized, [True, True])
    assert result.duplicates == 5
    np.testing.assert_array_equal(result.neighbours.indices[:, 0], [3, 4])
    # The second neighbour is another point, as if there were no duplicates.
    plain = memorization.ratio(train_x[[3, 4]], train_x)
    assert plain.neighbours.distances.tolist() == result.neighbours.distances.tolist()
    assert bool(memorization.memorized(train_x[3], jnp.asarray(doubled)))


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """A run on 2 points, each of them twice.   Returns: config, numbers."""
    config = tiny(
        "--config.data.num_examples=2",
        "--config.data.num_held_out=4",
        "--config.data.duplicates=0.5",
        "--config.data.copies=2",
        "--config.train.steps=2",
    )
    workdir = tmp_path_factory.mktemp("small")
    with pytest.MonkeyPatch.context() as patch:  # numbers only: no pictures are drawn
        patch.setattr(report, "write", lambda *args: None)
        experiments.run(config, workdir)
    return config, record.read_json(workdir / "metrics.json")


def test_c38_a_run_counts_its_duplicates(small_run):
    config, numbers = small_run
    assert numbers["data"]["duplicates"] == 2 and numbers["data"]["n"] == 4
    assert any("2 training points repeat" in n for n in build.build(config).notes)


def test_c39_one_point_has_no_second_neighbour():
    with pytest.raises(build.ConfigError, match="two distinct training") as caught:
        build.build(tiny("--config.data.num_examples=1"))
    assert caught.value.exit_code == 2
    one, samples = points(1, 4), points(3, 4, seed=1)
    with pytest.raises(ValueError, match="two distinct training points and got 1"):
        memorization.ratio(samples, np.repeat(one, 3, axis=0))
    found = neighbours.nearest(samples, one, k=1)  # the plain distance works
    expected = np.linalg.norm(samples - one, axis=1, keepdims=True)
    np.testing.assert_allclose(found.distances, expected, rtol=1e-6)


def test_c39_more_neighbours_than_points_are_refused():
    with pytest.raises(ValueError, match="k=5 neighbours were requested of 4 distinct"):
        neighbours.searcher(points(4, 3), k=5)


def test_c39_a_set_smaller_than_a_batch_is_drawn_by_a_stated_rule(small_run):
    config, numbers = small_run
    assert numbers["memorization"]["samples"] == 12
    for n, of in (4, config), (2, tiny("--config.data.num_examples=2")):
        said = " ".join(build.build(of).notes)
        assert f"n = {n} training points are fewer than the batch of 8" in said
        assert "each point once per epoch" in said
        rows = np.asarray(data.indices(n, jax.random.key(0), 0, 8))
        for epoch in range(8 // n):  # as the note says
            assert sorted(rows[epoch * n : (epoch + 1) * n]) == list(range(n))


# 40: the Frechet distance.


def test_c40_equal_sets_have_distance_zero():
    for n, k in [(50, 4), (10, 64), (2, 64)]:  # more and fewer samples than features
        a = points(n, k).astype(np.float64)
        assert 0 <= fidelity.frechet(a, a) < 1e-3
        assert 0 <= fidelity.frechet(a, a[::-1]) < 1e-3


def test_c40_constant_features_and_few_samples_stay_finite():
    flat = np.ones((20, 6))
    assert fidelity.frechet(flat, flat) == 0
    # Two constants are a shift: |1 - 3|^2 in each of six features.
    np.testing.assert_allclose(fidelity.frechet(flat, 3 * flat), 24)
    few, many = points(5, 64), points(200, 64, seed=1)
    found = fidelity.frechet(few, many)
    assert np.isfinite(found) and found > 0
    np.testing.assert_allclose(found, fidelity.frechet(many, few), rtol=1e-9)


def test_c40_it_is_that_of_the_square_root_of_the_product():
    """Tr (S_a S_b)^(1/2) = the sum of the roots of the eigenvalues of S_a S_b."""
    a, b = points(60, 5).astype(np.float64), 2 * points(90, 5, seed=1) + 0.5
    s_a, s_b = np.cov(a, rowvar=False), np.cov(b.astype(np.float64), rowvar=False)
    roots = np.sqrt(np.linalg.eigvals(s_a @ s_b).real).sum()
    gap = a.mean(0) - b.astype(np.float64).mean(0)
    expected = gap @ gap + np.trace(s_a) + np.trace(s_b) - 2 * roots
    np.testing.assert_allclose(fidelity.frechet(a, b), expected, rtol=1e-8)


def test_c40_one_image_and_values_that_are_not_finite_are_refused():
    a = points(9, 4)
    with pytest.raises(ValueError, match="1 against 9 samples: a covariance needs two"):
        fidelity.frechet(a[:1], a)
    with pytest.raises(ValueError, match="NaN or infinite"):
        fidelity.frechet(a, np.where(a > 0.9, np.nan, a))
    with pytest.raises(ValueError, match=r"takes features \[n, k\]"):
        fidelity.frechet(a, a[:, :3])


def test_c40_a_small_sample_is_warned_of(caplog):
    absl = logging.getLogger("absl")
    absl.addHandler(caplog.handler)
    try:
        fidelity.frechet(points(50, 2), points(60, 2))
        assert "50 against 60 samples: below 10000 it is biased" in caplog.text
        caplog.clear()
        fidelity.frechet(points(10_000, 2), points(10_000, 2))
        assert not caplog.text
    finally:
        absl.removeHandler(caplog.handler)


# 41: pruning masks.

NET = DiT(patch=4, width=16, depth=2, num_heads=4)
IMAGE = jax.random.normal(jax.random.key(1), (8, 8, 1))


@pytest.fixture(scope="module")
def params(off_zero):
    init = jax.jit(lambda key: off_zero(NET.init(key, IMAGE, 0.0)["params"]))
    return init(jax.random.key(0))


@jax.jit
def answer(params, gates=None):
    return NET.apply({"params": params}, IMAGE, jnp.float32(0.3), gates=gates)


def pruned_leaves(tree, keep):
    """The entries of heads that are not kept, of every leaf that has heads."""
    found = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        names = tuple(k.key for k in path)
        axis = prune.HEAD_AXIS.get(names[-2:])
        if axis is not None:
            dropped = ~keep[int(names[0].removeprefix("block_"))]
            found.append(np.compress(dropped, np.asarray(leaf), axis=axis).ravel())
    return np.concatenate(found)


def test_c41_nothing_pruned_is_the_dense_network_to_the_bit(params):
    keep = prune.keep_top(np.arange(8.0).reshape(2, 4), 0.0)
    assert keep.all()
    masked = prune.apply_mask(params, prune.head_mask(params, keep))
    assert checkpoint.digest(masked) == checkpoint.digest(params)
    assert (answer(masked) == answer(params)).all()
    full = prune.apply_mask(params, prune.full_mask(params))
    assert checkpoint.digest(full) == checkpoint.digest(params)


def test_c41_with_no_head_left_the_residual_path_works(params):
    none = np.zeros((2, 4), bool)
    masked = prune.apply_mask(params, prune.head_mask(params, none))
    got = answer(masked)
    assert np.isfinite(got).all() and (got != answer(params)).any()
    np.testing.assert_allclose(got, answer(params, jnp.zeros((2, 4))), atol=1e-5)


def test_c41_ties_fall_by_index_and_every_layer_keeps_a_head():
    keep = prune.keep_top(np.ones((2, 4)), 0.5)
    np.testing.assert_array_equal(keep, [[False] * 3 + [True], [False] + [True] * 3])
    again = prune.keep_top(jnp.ones((2, 4)), 0.5)
    np.testing.assert_array_equal(keep, again)
    most = prune.keep_top(np.arange(8.0).reshape(2, 4), 0.99)
    np.testing.assert_array_equal(most.sum(axis=1), [1, 1])
    random = prune.keep_random(jax.random.key(0), (2, 4), 0.5)
    assert random.sum() == 4
    np.testing.assert_array_equal(
        random, prune.keep_random(jax.random.key(0), (2, 4), 0.5)
    )


def test_c41_a_wrong_mask_is_refused(params):
    importance = np.ones((2, 4))
    importance[1, 2] = np.nan
    with pytest.raises(ValueError, match="1 values are not finite"):
        prune.keep_top(importance, 0.5)
    for ratio in (1.0, -0.1, np.nan):
        with pytest.raises(ValueError, match=r"must be in \[0, 1\)"):
            prune.keep_top(np.ones((2, 4)), ratio)
    for shape in [(3, 4), (1, 4), (2, 3), (8,)]:
        with pytest.raises(ValueError, match="keep"):
            prune.head_mask(params, np.ones(shape, bool))


def test_c41_a_pruned_head_stays_zero_through_training_ema_and_resume(params, tmp_path):
    keep = np.array([[True, False, True, True], [False, False, True, True]])
    tx = optax.adamw(1e-2, weight_decay=0.1)
    ve = PROCESSES["variance_exploding"]

    def loss(params, x0, key):
        def apply(params, x, t):
            return NET.apply({"params": params}, x, t)

        eps = jax.random.normal(key, x0.shape)
        return train.noise_loss(apply, params, ve, x0, jnp.float32(0.5), eps)

    state = train.init(params, tx, prune.head_mask(params, keep))
    assert (pruned_leaves(state.params, keep) == 0).all()
    grads = jax.jit(jax.grad(loss))(state.params, IMAGE, jax.random.key(3))
    assert (pruned_leaves(grads, keep) == 0).all()
    assert (pruned_leaves(grads, ~keep) != 0).any()

    step = jax.jit(train.make_train_step(loss, tx, 0.9))
    batch = jnp.stack([IMAGE, -IMAGE])
    state, _ = step(state, batch, jax.random.key(4))
    checkpoint.save(tmp_path, 1, state)
    fresh = jax.eval_shape(lambda: train.init(params, tx, state.mask))
    restored, _ = checkpoint.restore_newest(tmp_path, fresh)
    assert checkpoint.digest(restored.mask) == checkpoint.digest(state.mask)
    for _ in range(2):
        state, _ = step(state, batch, jax.random.key(4))
        restored, _ = step(restored, batch, jax.random.key(4))
    assert checkpoint.digest(restored) == checkpoint.digest(state)
    for tree in (restored.params, restored.ema):
        assert (pruned_leaves(tree, keep) == 0).all()
        assert (pruned_leaves(tree, ~keep) != 0).all()


# 42, 43: the same numbers however the work is split.


@pytest.mark.parametrize("devices", harness.some([4, 1]))
def test_c42_samples_are_the_same_for_every_chunk_and_device_count(
    devices, monkeypatch
):
    # The numbers before they are rounded to pixels, where 1e-7 may be one grey level.
    monkeypatch.setattr(data, "to_uint8", lambda x: x)
    # Noise of the size of the data: rounding grows with t_max.
    parts = build.build(tiny("--config.sampler.t_max=1.0"))
    params = training.init_params(parts, jax.random.key(0))

    def score_of(params, label):
        return training.score_fn(parts, params, label)

    def drawn(chunk, devices):
        config = tiny(f"--config.run.chunk={chunk}")
        axis = (jax.sharding.AxisType.Auto,)
        mesh = jax.make_mesh(
            (devices,), ("data",), axis_types=axis, devices=jax.devices()[:devices]
        )
        generate = evaluate.make_generate(config, parts, mesh, score_of)
        pieces = [
            generate(params, start, min(start + chunk, 20))
            for start in range(0, 20, chunk)
        ]
        return np.concatenate(pieces)

    whole = drawn(20, 1)
    for chunk in (1, 7, 64):
        np.testing.assert_allclose(drawn(chunk, devices), whole, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("taskset") is None, reason="needs taskset")
def test_c43_one_core_or_all_give_the_same_bits(tmp_path):
    assert harness.run(*TINY, workdir=tmp_path / "all", env=harness.AS_A_USER).code == 0
    cores = os.sched_getaffinity(0)
    pin = f"os.sched_setaffinity(0, {{{min(cores)}}})"
    one = harness.run(*TINY, workdir=tmp_path / "one", patch=pin, env=harness.AS_A_USER)
    assert one.code == 0, one.output
    assert harness.digest(tmp_path / "one") == harness.digest(tmp_path / "all")


# H78: the debugging switches of jax.


@pytest.mark.parametrize("n", [3, 40, 2_000])
def test_h78_a_search_has_no_infinity_that_nobody_meant(n):
    """Of few points, the bound for all others is infinite: no error of a debugger."""
    draw = np.random.default_rng(0)
    points, samples = draw.normal(size=(n, 5)), draw.normal(size=(7, 5))
    points, samples = points.astype(np.float32), samples.astype(np.float32)
    search = neighbours.searcher(points, k=2)
    truth = search(samples)
    with jax.debug_infs(True), jax.debug_nans(True):
        found = neighbours.searcher(points, k=2)(samples)
    for one, other in zip(found, truth, strict=True):
        np.testing.assert_array_equal(one, other)
    gaps = np.linalg.norm(samples[:, None] - points[None], axis=2)
    np.testing.assert_allclose(found[0], np.sort(gaps, axis=1)[:, :2], rtol=1e-5)


def test_h78_a_key_without_weight_is_no_infinity():
    params = {"points": jnp.ones((2, 3))}
    with jax.debug_infs(True):
        padded = capacity._padded(params, 4)
    network = exact.Attention(PROCESSES["ornstein_uhlenbeck"], 4)
    short = exact.Attention(PROCESSES["ornstein_uhlenbeck"], 2)
    x, t = jnp.arange(3.0), jnp.float32(0.1)
    np.testing.assert_array_equal(
        network.apply({"params": padded}, x, t), short.apply({"params": params}, x, t)
    )


@pytest.mark.slow
def test_h78_a_dry_run_counts_the_same_without_jit(monkeypatch):
    config = harness.config(*harness.TINY_DIT)
    # Steps without jit are the next test's, and take a minute.
    monkeypatch.setattr(dry_run, "_measured", lambda config, *_: (1.0, 8))

    def cells():
        table = dry_run.dry_run(config, lambda text: None)
        rows = zip(*(column.cells for column in table.columns), strict=True)
        return [row for row in rows if not row[0].startswith("hours")]

    with jax.disable_jit():
        eager = cells()
    assert eager == cells()


@pytest.mark.slow
def test_h78_a_run_without_jit_takes_the_same_steps(tmp_path):
    """JAX_DISABLE_JIT=1, to look into a step as python takes it."""
    config = tiny("--config.train.steps=2")
    parts = build.build(config)

    def trained(name):
        with session.Session(tmp_path / name, config) as held:
            return job.learn(config, parts, held)

    with jax.disable_jit():
        eager = trained("eager")
    compiled = trained("compiled")
    assert int(eager.step) == 2
    for one, other in zip(*map(jax.tree.leaves, (eager, compiled)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_h78_a_run_under_debugging_switches_has_the_same_bits(tmp_path):
    switches = {"JAX_DEBUG_INFS": "1", "JAX_DEBUG_NANS": "1"}
    args = *TINY, "--config.run.snapshots=2"
    for name, env in (("plain", {}), ("debug", switches)):
        result = harness.run(*args, workdir=tmp_path / name, env=env)
        assert result.code == 0, result.output
    assert harness.digest(tmp_path / "debug") == harness.digest(tmp_path / "plain")
    assert harness.rows(tmp_path / "debug") == harness.rows(tmp_path / "plain")
    for file in ("samples.npz", "per_sample.csv"):
        debug, plain = (tmp_path / name / file for name in ("debug", "plain"))
        assert debug.read_bytes() == plain.read_bytes()


# 44: EMA in short runs.


def test_c44_an_ema_that_looks_back_beyond_the_run_is_warned_of():
    (note,) = [n for n in build.build(tiny()).notes if "EMA" in n]
    assert "500 steps and the run has 30" in note and "weights=raw" in note
    quick = build.build(tiny("--config.train.ema_decay=0.5")).notes
    assert not [n for n in quick if "EMA" in n]


def test_the_score_of_a_network_is_finite_at_the_ends_of_time():
    for config in (tiny(), harness.config(*harness.TINY_DIT)):
        parts = build.build(config)
        params = training.init_params(parts, jax.random.key(0))
        fn: score.ScoreFn = jax.jit(training.score_fn(parts, params))
        x = parts.splits.train.x[0]
        for t in (parts.times[0], parts.times[-1]):
            assert np.isfinite(fn(x, t)).all()
