"""Memory and compilation: bounded, halved where it ends, and nothing is done twice (E).

What ends is the memory of a chunk of work: of samples, of a search, of features.
"""

import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from faults import harness
from memsep_jax import data, empirical, experiments, neighbours, parallel, process
from memsep_jax.experiments import record, training
from memsep_jax.experiments.config import build
from memsep_jax.experiments.runtime.session import Session
from memsep_jax.experiments.studies import evaluate
from memsep_jax.experiments.studies import training_run as job

QUERIES, POINTS, DIM = 10_000, 50_000, 3_072  # samples of CIFAR-10 against all of it
BUDGET = 512 * 2**20  # bytes beside the data
TOLD = "RESOURCE_EXHAUSTED: Out of memory allocating 4398046511104 bytes"
VE = process.variance_exploding()


# 58: nearest neighbours and the empirical score at the size of CIFAR-10.


def search(every, k=50):
    """The search of `neighbours.searcher` as one program, and what it is called with.

    Args: every, whether of all points by differences.
    """
    mesh = parallel.make_mesh(jax.devices()[:1])
    chunk = neighbours.DOUBTED if every else 1_024  # the default: others are done later

    def run(points, centre, samples):
        return neighbours._search(
            points, centre, samples, POINTS, k, 2_048, mesh, every
        )

    return run, abstract(np.uint8, (POINTS, DIM), (chunk, DIM))


def scores(dtype=np.uint8):
    """The empirical score of all queries, some at a time, as one program."""

    def run(points, _, samples):
        score = empirical.score(points, VE)
        return jax.lax.map(lambda x: score(x, 0.5), samples, batch_size=250)

    return run, abstract(dtype, (POINTS, DIM), (QUERIES, DIM))


def abstract(dtype, points, samples):
    """Nothing is allocated: shapes alone."""
    return [
        jax.ShapeDtypeStruct(shape, kind)
        for shape, kind in ((points, dtype), (points[1:], np.float32), (samples, "f4"))
    ]


def arrays(jaxpr):
    """Shapes and dtypes of all that a program, with those inside it, makes."""
    for equation in jaxpr.eqns:
        yield from (variable.aval for variable in equation.outvars)
        inside = jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")
        )
        for leaf in inside:
            leaf = getattr(leaf, "jaxpr", leaf)  # of a closed one
            if hasattr(leaf, "eqns"):
                yield from arrays(leaf)


def largest(run, arguments) -> int:
    """Bytes of the largest array of a program, before XLA makes fewer of them."""
    found = arrays(jax.make_jaxpr(run)(*arguments).jaxpr)
    return max(a.size * np.dtype(a.dtype).itemsize for a in found if a.ndim)


def test_e58_the_largest_array_is_found_where_it_is_made():
    """The sum of differences, inside a scan inside a jit."""

    def run(points, _, samples):
        def body(carry, _):
            gaps = points[None].astype(jnp.float32) - samples[:, None]
            return carry + jnp.sum(gaps**2, axis=2).min(), None

        return jax.lax.scan(jax.jit(body), 0.0, None, 3)[0]

    found = largest(run, abstract(np.uint8, (POINTS, DIM), (QUERIES, DIM)))
    assert found == 4 * QUERIES * POINTS * DIM


@pytest.mark.parametrize(
    "program", [search(False), search(True), scores(), scores(np.float32)]
)
def test_e58_no_array_grows_with_points_times_queries(program):
    run, arguments = program
    # The scores themselves, and a chunk of the points as floats.
    assert largest(run, arguments) <= 4 * DIM * max(QUERIES, empirical.CHUNK)
    assert 4 * DIM * QUERIES < BUDGET / 4 < 4 * QUERIES * POINTS / 8


@pytest.mark.parametrize("program", [search(False), search(True), scores()])
def test_e58_what_xla_reserves_is_below_the_budget(program):
    run, arguments = program
    known = jax.jit(run).lower(*arguments).compile().memory_analysis()
    assert 0 < known.temp_size_in_bytes + known.output_size_in_bytes < BUDGET


GROWTH = """
import jax, jax.numpy as jnp, numpy as np
from memsep_jax import empirical, neighbours, process
rng = np.random.default_rng(0)
points = rng.integers(0, 256, ({points}, 32, 32, 3), np.uint8)
def score(points, xs):
    at = empirical.score(points, process.variance_exploding())
    return jax.lax.map(lambda x: at(x, 0.5), xs, batch_size=250)
some = jnp.asarray(points[:500], jnp.float32) / 127.5 - 1
jax.block_until_ready(some)
def status(name):
    # Not ru_maxrss, which begins with what the process that started this one had.
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name))
before = status("VmRSS")
{work}
print(status("VmHWM") - before)
"""
WORKS = {
    "neighbours": """
found = neighbours.nearest(points[:2_000], points, k=50, chunk=1_000)
assert (found.distances[:, 0] == 0).all()
assert (found.indices[:, 0] == np.arange(2_000)).all()
""",
    "score": """
found = jax.block_until_ready(jax.jit(score)(points, some))
assert np.isfinite(found).all()
""",
}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc/self/status")
@pytest.mark.parametrize("work", WORKS)
def test_e58_the_process_grows_by_less_than_the_budget(work):
    """Its copy of the points and the compilation are within the budget.

    Of 10,000 queries, some: they come chunk by chunk, and no chunk waits for another.
    """
    done = subprocess.run(
        [sys.executable, "-c", GROWTH.format(points=POINTS, work=WORKS[work])],
        env=harness._environment(1) | harness.AS_A_USER,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert 0 < 1_024 * int(done.stdout) < BUDGET


# 59: memory that ends.


def tiny(*arguments):
    return harness.config(*harness.TINY, *arguments)


@pytest.fixture
def session(tmp_path):
    with Session(tmp_path / "run", tiny()) as session:
        yield session


def squares(most, done, error=None):
    """i -> i^2 of a range, where memory suffices for `most` at once."""

    def work(start, stop):
        done.append((start, stop))
        if stop - start > most:
            raise error or jax.errors.JaxRuntimeError(f"{TOLD}.\nBuffers: many")
        i = np.arange(start, stop)
        return {"square": i**2, "i": i}

    return work


@pytest.mark.parametrize(
    "error",
    [
        None,
        jax.errors.JaxRuntimeError("INTERNAL: dispatching: Out of memory allocating 8"),
        MemoryError("Unable to allocate 4.00 TiB for an array with shape (7,)"),
        MemoryError(),
    ],
)
def test_e59_a_chunk_is_halved_and_so_are_all_after_it(
    error, session, tmp_path, capsys
):
    done, where = [], tmp_path / "chunks"
    work = squares(5, done, error)
    found = record.in_chunks(where, work, 40, 16, session, "squares")
    pieces = [(i, i + 4) for i in range(0, 40, 4)]
    assert done == [(0, 16), (0, 8), *pieces]
    np.testing.assert_array_equal(found["square"], np.arange(40) ** 2)
    # On disk as if there had been memory: the same files, read again.
    names = ["00000000-00000016.npz", "00000016-00000032.npz", "00000032-00000040.npz"]
    assert sorted(path.name for path in where.iterdir()) == names
    kept = record.read_npz(where / names[1])
    np.testing.assert_array_equal(kept["i"], np.arange(16, 32))
    again = record.in_chunks(where, work, 40, 16, session, "squares")
    assert len(done) == 12 and again["square"].tolist() == found["square"].tolist()
    said = [line for line in capsys.readouterr().out.splitlines() if "at once" in line]
    assert [re.findall(r"for (\d+) at once.*chunk=(\d+)", line) for line in said] == [
        [("16", "8")],
        [("8", "4")],
    ]
    assert all((str(error) if error else TOLD) in line for line in said)


def test_e59_a_chunk_of_one_that_does_not_fit_ends_the_run(session, tmp_path):
    done = []
    with pytest.raises(record.OutOfMemoryError) as caught:
        record.in_chunks(tmp_path / "a", squares(0, done), 5, 4, session, "squares")
    assert done == [(0, 4), (0, 2), (0, 1)] and not (tmp_path / "a").exists()
    assert caught.value.exit_code == 1
    assert f"{TOLD}, for 1 at once" in str(caught.value)
    assert "run.chunk=1" in str(caught.value) and "Buffers" not in str(caught.value)


def test_e59_no_other_error_is_taken_for_it(session, tmp_path):
    done, error = [], jax.errors.JaxRuntimeError("INVALID_ARGUMENT: a shape")
    with pytest.raises(jax.errors.JaxRuntimeError, match="a shape"):
        record.in_chunks(
            tmp_path / "a", squares(0, done, error), 5, 4, session, "squares"
        )
    assert done == [(0, 4)]


def test_e59_memory_that_truly_ends_is_noticed(session, tmp_path):
    """140 TB are more than a process can address; they are asked for in the dark."""
    sort = jax.jit(lambda n: jnp.sort(jnp.arange(1 << 47, dtype=jnp.int8) * n)[:1])

    def work(start, stop):
        short = stop - start == 1
        return {"x": jnp.zeros(1, jnp.int8) if short else sort(jnp.int8(2))}

    found = record.in_chunks(tmp_path / "a", work, 2, 2, session, "sorting")
    assert found["x"].tolist() == [0, 0]
    found = record.kept(tmp_path / "b.npz", lambda: work(0, 1))
    assert found["x"].tolist() == [0]
    with pytest.raises(jax.errors.JaxRuntimeError, match="140737488355328 bytes"):
        record.kept(tmp_path / "c.npz", lambda: work(0, 2))


@pytest.fixture
def drawn():
    """(config, parts, generate, weights) of a network that learned nothing."""
    config = tiny()
    parts = build.build(config)
    weights = training.init_params(parts, jax.random.key(0))
    return config, parts, job.network_samples(config, parts), weights


def evaluated(where, drawn, generate):
    """The numbers of an evaluation of `drawn`, and its chunks."""
    config, parts, _, weights = drawn
    with Session(where, config) as session:
        model = {"name": "mlp", "parameters": 1}
        evaluate.evaluate(config, parts, session, generate, weights, {"model": model})
    samples = record.read_npz(where / "samples.npz")["samples"]
    rows = np.genfromtxt(where / "per_sample.csv", delimiter=",", names=True)
    return samples, rows, sorted(p.name for p in where.glob("evaluation/*/*/*.npz"))


def test_e59_an_evaluation_in_halves_gives_the_same(drawn, tmp_path, capsys):
    *_, generate, _ = drawn
    whole = evaluated(tmp_path / "whole", drawn, generate)
    assert "at once" not in capsys.readouterr().out

    def narrow(weights, start, stop):
        if stop - start > 3:  # of run.chunk=4
            raise jax.errors.JaxRuntimeError(TOLD)
        return generate(weights, start, stop)

    halved = evaluated(tmp_path / "halved", drawn, narrow)
    assert f"{TOLD}, for 4 at once" in capsys.readouterr().out
    np.testing.assert_allclose(halved[0], whole[0], atol=1e-5)
    for name in ("d1", "d2"):
        np.testing.assert_allclose(halved[1][name], whole[1][name], atol=1e-5)
    for name in ("index", "nearest", "second", "memorized"):
        np.testing.assert_array_equal(halved[1][name], whole[1][name])
    assert halved[2] == whole[2]


def test_e59_a_run_finds_out_once_how_many_samples_fit(tmp_path, capsys, monkeypatch):
    """The grids along training, then the evaluation: of a chunk of 8, halves of 4."""
    stored = data.to_uint8

    def narrow(x):
        if len(x) > 4:
            raise jax.errors.JaxRuntimeError(TOLD)
        return stored(x)

    monkeypatch.setattr(data, "to_uint8", narrow)
    monkeypatch.setattr(evaluate, "_write", lambda *args: None)  # stores all at once
    monkeypatch.setattr(job, "finish", lambda session: None)
    config = harness.config(
        "--config=configs/digits.py:smoke",
        "--config.model.name=mlp",
        "--config.run.snapshots=1",
        "--config.run.snapshot_samples=8",
    )
    experiments.run(config, tmp_path)
    assert capsys.readouterr().out.count("at once") == 1
    assert "ratio" in record.read_metrics(tmp_path / "metrics.jsonl")[-1]
    (path,) = tmp_path.glob("evaluation/*/samples/*.npz")
    assert len(record.read_npz(path)["x"]) == 8


class Compiled:
    """Counts the compilations of a program while its block runs."""

    def __init__(self, name):
        self.name, self.count = f"jit({name})", 0

    def _hear(self, event, seconds, **about):
        if event.endswith("backend_compile_duration"):
            self.count += about.get("fun_name") == self.name

    def __enter__(self):
        jax.monitoring.register_event_duration_secs_listener(self._hear)
        return self

    def __exit__(self, *_):
        jax.monitoring.unregister_event_duration_listener(self._hear)


def test_e59_fewer_samples_are_less_work_and_chunks_one_program(drawn):
    config, parts, _, weights = drawn
    mesh = parallel.make_mesh(jax.devices()[:2])
    config.run.chunk = 12

    def score_of(params, label):
        return training.score_fn(parts, params, label)

    generate = evaluate.make_generate(config, parts, mesh, score_of)
    with Compiled("advance") as compiled:
        whole = generate(weights, 0, 30)  # 12, 12, 6
        assert compiled.count == 2
        for start, stop, count in [(24, 29, 2), (3, 10, 2), (5, 8, 3), (29, 30, 4)]:
            part = generate(weights, start, stop)
            np.testing.assert_allclose(part, whole[start:stop], atol=1e-5)
            assert compiled.count == count  # for 12, 6; for 4, that hold 3; for 2


# 60: compilations.


def learn(config, workdir):
    with Session(workdir, config) as session:
        return job.learn(config, build.build(config), session)


def test_e60_the_step_is_compiled_once_a_run_whatever_divides(tmp_path):
    """13 points in batches of 8: every batch is a whole one, across epochs."""
    arguments = (
        "--config.data.num_examples=13",
        "--config.run.log_every=3",
        "--config.run.save_every=2",
    )
    for epochs, steps in ((2.5, 4), (5.0, 8)):  # the second goes on with the first
        with Compiled("steps") as compiled:
            config = tiny(*arguments, f"--config.train.epochs={epochs}")
            state = learn(config, tmp_path)
        assert int(state.step) == steps and compiled.count == 1


# 61: nothing grows.


def status(name) -> int:
    with open("/proc/self/status") as file:
        return next(int(x.split()[1]) for x in file if x.startswith(f"{name}:"))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc/self/status")
def test_e61_two_thousand_steps_leave_no_memory_and_no_thread(tmp_path, monkeypatch):
    """With rows, evaluations and checkpoints, from the first of each on."""
    seen = {}
    write = record.Metrics.write

    def look(self, **row):
        write(self, **row)
        seen[row["step"]] = status("VmRSS"), status("Threads")

    monkeypatch.setattr(record.Metrics, "write", look)
    arguments = (
        "--config.train.steps=2500",
        "--config.run.log_every=10",
        "--config.run.save_every=100",
        "--config.run.evaluate_every=100",
    )
    learn(tiny(*arguments), tmp_path)
    later = [of for step, of in seen.items() if step > 500]
    assert len(later) == 200
    memory, threads = zip(*later, strict=True)
    assert max(memory) - seen[500][0] < 50 * 1_024
    # The pools of orbax fill up, and end some of theirs: 20 saves, not 20 threads.
    assert max(threads) - min(threads) < 10
