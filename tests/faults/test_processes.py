"""Row F: two processes on this machine train one network, and none is left alone."""

import contextlib
import json
import re
import signal
import socket

import jax
import numpy as np
import pytest

from faults import harness
from memsep_jax import checkpoint, empirical, neighbours, process
from memsep_jax.experiments import record

pytestmark = pytest.mark.slow
STEPS = 30
JSON = re.compile(r"\[[\[\d-]")  # and not a line of the library that connects them
# Steps take a while on the process that writes: signals land where they are meant to.
SLOWLY = harness.SLOW_STEPS + harness.TRAIN_ONLY


# Even a small network is split.
SPLIT = """
from memsep_jax import parallel
parallel.sharded.__defaults__ = (16,)
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def together(*args, workdirs, patch="", count=2, base=harness.TINY):
    """The same command in some processes that find each other on a free port."""
    port = free_port()
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                harness.spawn(
                    *base,
                    *args,
                    f"--distributed=127.0.0.1:{port},{count},{index}",
                    workdir=workdir,
                    patch=patch,
                )
            )
            for index, workdir in enumerate(workdirs)
        ]


def ends(children):
    """How they ended, all of them."""
    return [harness.finish(child) for child in children]


def by_two(program):
    """What each of two processes prints of a program, a line of JSON at a time."""
    leave = "sys.stdout.flush()\njax.distributed.shutdown()\nos._exit(0)"
    port = free_port()
    with contextlib.ExitStack() as stack:
        children = [
            stack.enter_context(
                harness.spawn(f"127.0.0.1:{port},2,{i}", patch=program + leave)
            )
            for i in range(2)
        ]
        results = ends(children)
    assert [r.code for r in results] == [0, 0], results
    return [
        [json.loads(line) for line in r.stdout.splitlines() if JSON.match(line)]
        for r in results
    ]


def weights(workdir):
    """All leaves of the last checkpoint."""
    directory = workdir / "checkpoints"
    step = checkpoint.steps(directory)[-1]
    return checkpoint.restore(directory, step, harness.like(workdir, step))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of two processes that nothing disturbs."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    with together(workdirs=[workdir] * 2) as children:
        results = ends(children)
    assert [result.code for result in results] == [0, 0], results
    return workdir, results


def test_f62_two_processes_train_what_one_does(whole, tmp_path):
    workdir, _ = whole
    alone = tmp_path / "alone"
    result = harness.run(*harness.TINY, workdir=alone)
    assert result.code == 0, result.output
    expected, found = weights(alone), weights(workdir)
    assert found.keys() == expected.keys()
    for name, leaf in found.items():
        # Adam divides by a gradient: where that is rounding, so is the step.
        np.testing.assert_allclose(leaf, expected[name], 1e-5, 1e-5, err_msg=name)
    losses = [[row["loss"] for row in harness.rows(w)] for w in (workdir, alone)]
    np.testing.assert_allclose(*losses, rtol=1e-5)


HALVES = """
import json
from memsep_jax import empirical, neighbours, parallel, process
parallel.join(sys.argv[-1])
import jax, jax.numpy as jnp, numpy as np
rng = np.random.default_rng(0)
data = rng.normal(size=(501, 3)).astype(np.float32)
x = rng.normal(size=(7, 3)).astype(np.float32)
near = neighbours.searcher(data, devices=jax.devices())(x)
mesh = parallel.make_mesh()
spread = jax.make_array_from_callback(
    (500, 3), parallel.by_batch(mesh), lambda i: data[:500][i]
)
assert [s.data.shape for s in spread.addressable_shards] == [(250, 3)]
ou = process.ornstein_uhlenbeck()
def scores(data, x):
    return jax.vmap(empirical.score(data, ou, chunk=64, mesh=mesh), (0, None))(x, 0.1)
score = jax.jit(scores, out_shardings=parallel.replicated(mesh))(spread, x)
print(json.dumps([a.tolist() for a in (*near, np.asarray(score))]))
"""


def test_f62_the_training_set_may_lie_on_several_hosts():
    """Of the neighbours and of the empirical score, each process has one half."""
    (found,), others = by_two(HALVES)
    assert others == [found]
    rng = np.random.default_rng(0)
    data, x = (rng.normal(size=(n, 3)).astype(np.float32) for n in (501, 7))
    expected = neighbours.nearest(x, data)
    np.testing.assert_array_equal(found[1], expected.indices)
    np.testing.assert_allclose(found[0], expected.distances, rtol=1e-6)
    score = empirical.score(data[:500], process.ornstein_uhlenbeck())
    one = jax.jit(jax.vmap(score, (0, None)))(x, 0.1)
    np.testing.assert_allclose(found[2], one, rtol=1e-4, atol=1e-5)


def test_f62_a_state_split_over_processes_is_saved_and_goes_on(whole, tmp_path):
    """FSDP: no process holds it all, and the first one writes it all."""
    workdir, apart = tmp_path / "run", "--config.run.shard=True"
    with together(apart, workdirs=[workdir] * 2, patch=SPLIT + SLOWLY) as children:
        harness.wait_for_rows(children[0], 12)
        harness.kill(children[1], signal.SIGTERM)
        results = ends(children)
    assert [r.code for r in results] == [143, 143], results
    with together(apart, workdirs=[workdir] * 2, patch=SPLIT) as children:
        results = ends(children)
    assert [r.code for r in results] == [0, 0], results
    assert "resumed from step" in results[0].stdout
    expected, found = weights(whole[0]), weights(workdir)
    for name, leaf in found.items():
        np.testing.assert_allclose(leaf, expected[name], 1e-5, 1e-5, err_msg=name)


def test_f65_processes_with_other_numbers_of_devices_do_not_begin(tmp_path):
    workdir = tmp_path / "run"
    more = (
        "if sys.argv[-2].endswith('2,1'):\n"
        "    os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=2'\n"
    )
    with together(workdirs=[workdir] * 2, patch=more) as children:
        results = ends(children)
    assert [r.code for r in results] == [2, 2], results
    assert all("1 in process 0, 2 in process 1" in r.stderr for r in results)
    assert not workdir.exists()


def test_f62_only_the_first_process_writes_and_speaks(whole):
    workdir, (first, second) = whole
    assert "report:" in first.stdout and (workdir / "report.html").is_file()
    # What is left of the second is a line of the library that connects them.
    said = [line for line in second.stdout.splitlines() if "Gloo" not in line]
    assert not said and "memorized" in first.stdout
    assert [row["step"] for row in harness.rows(workdir)] == list(range(1, STEPS + 1))
    assert record.read_json(workdir / "run.json")["device"].startswith("2 x")


DRAW = """
import json
from memsep_jax import data, parallel
parallel.join(sys.argv[-1])
import jax, jax.numpy as jnp
mesh = parallel.make_mesh()
points = data.Dataset(jnp.arange(15.0)[:, None], None)
def batch(step):
    x = data.draw(points, jax.random.key(0), step, 6, False).x
    return jax.lax.with_sharding_constraint(x, parallel.by_batch(mesh))
for step in range(5):
    shards = jax.jit(batch)(step).addressable_shards
    print(json.dumps([float(v) for s in shards for v in s.data[:, 0]]))
"""


def test_f62_each_example_is_seen_once_in_an_epoch_whoever_sees_it():
    """15 points in batches of 6, 3 on each of two processes: 2 epochs in 5 steps."""
    values = [sum(batches, []) for batches in by_two(DRAW)]
    assert [len(v) for v in values] == [15, 15]
    steps = np.concatenate([np.reshape(v, (5, 3)) for v in values], axis=1).ravel()
    for epoch in np.split(steps, 2):
        assert sorted(epoch) == list(range(15))


STREAM = """
import json
from memsep_jax import data, parallel
parallel.join(sys.argv[-1])
import jax, numpy as np
class Watched(np.ndarray):
    def __getitem__(self, rows):
        seen.extend(np.atleast_1d(rows).tolist())
        return np.asarray(self).__getitem__(rows)
seen = []
points = data.Rows(np.arange(45, dtype=np.uint8).reshape(15, 3, 1, 1).view(Watched))
rows_of = data.order(15, jax.random.key(0), 6)
split = parallel.by_batch(parallel.make_mesh())
batch = data.stream(data.Dataset(points), rows_of, split)(4)
(own,) = batch.x.addressable_shards
half = rows_of(4).reshape(2, 3)[jax.process_index()]
assert (np.asarray(own.data) == np.asarray(points[half])).all()
print(json.dumps([seen[:3], half.tolist()]))
"""


def test_f62_of_points_on_disk_each_process_reads_its_own():
    first, second = (values[0] for values in by_two(STREAM))
    for seen, half in (first, second):
        assert seen == half
    assert not set(first[1]) & set(second[1])


def test_f62_points_on_disk_give_two_processes_the_same_network(tmp_path):
    path = tmp_path / "points.npz"
    x = np.random.default_rng(0).normal(size=(40, 2)).astype(np.float32)
    np.savez(path, train_images=x)
    read = "--config.data.name=npz", f"--config.data.path={path}"
    # Without the arguments of a mixture, which npz does not take.
    base = [flag for flag in harness.TINY if not flag.startswith("--config.data.")]
    found = []
    for stream in ("False", "True"):
        workdir = tmp_path / stream
        flag = f"--config.data.stream={stream}"
        with together(*read, flag, workdirs=[workdir] * 2, base=base) as children:
            results = ends(children)
        assert [r.code for r in results] == [0, 0], results
        found.append((harness.digest(workdir), harness.rows(workdir)))
    assert found[0] == found[1]


# A step fails before the look at the other that says why, and with either error.
FAILS_FIRST = """
from memsep_jax.experiments.runtime import processes, session
processes.WATCH_EVERY = 3.0
_poll = session.Session.poll
def poll(self):
    try:
        _poll(self)
    except Exception as error:
        raise ValueError(str(error))
session.Session.poll = poll
"""


@pytest.mark.parametrize("killed, patch", [(0, ""), (1, ""), (1, FAILS_FIRST)])
def test_f63_where_one_is_killed_the_other_names_it_and_ends(
    killed, patch, whole, tmp_path
):
    workdir = tmp_path / "run"
    with together(workdirs=[workdir] * 2, patch=SLOWLY + patch) as children:
        harness.wait_for_rows(children[0], 12)
        harness.kill(children[killed])
        left = harness.finish(children[1 - killed], timeout=30)
    if killed:
        assert left.code == 6, left.output
        assert "process 1 of 2 (process " in left.stderr
        assert "Traceback" not in left.stderr
    else:  # jax's service lives in process 0: jax may end the others before we do
        assert left.code in (6, -signal.SIGABRT), left.output
        assert "process 0 of 2" in left.stderr or "another task died" in left.stderr
    with together(workdirs=[workdir] * 2) as children:
        results = ends(children)
    assert [r.code for r in results] == [0, 0], results
    assert "resumed from step" in results[0].stdout
    assert harness.digest(workdir) == harness.digest(whole[0])
    assert harness.rows(workdir) == harness.rows(whole[0])


@pytest.mark.parametrize("to", [0, 1])
def test_f64_a_signal_to_one_stops_both_at_the_same_saved_step(to, whole, tmp_path):
    workdir = tmp_path / "run"
    with together(workdirs=[workdir] * 2, patch=SLOWLY) as children:
        harness.wait_for_rows(children[0], 12)
        harness.kill(children[to], signal.SIGTERM)
        results = ends(children)
    assert [r.code for r in results] == [143, 143], results
    step = checkpoint.steps(workdir / "checkpoints")[-1]
    assert 12 <= step < STEPS
    assert f"preempted at step {step}: saved" in results[0].stdout
    with together(workdirs=[workdir] * 2) as children:
        results = ends(children)
    assert [r.code for r in results] == [0, 0], results
    assert f"resumed from step {step}" in results[0].stdout
    assert harness.digest(workdir) == harness.digest(whole[0])


def test_f65_a_workdir_that_is_not_shared_is_refused_at_the_start(tmp_path):
    places = [tmp_path / name for name in ("here", "there")]
    patch = (
        "from memsep_jax.experiments.runtime import processes\n"
        "processes.SHARED_IN = 1.0"
    )
    with together(workdirs=places, patch=patch) as children:
        results = ends(children)
    assert [r.code for r in results] == [2, 2], results
    for result in results:
        assert "process 1 does not see in" in result.stderr, result.output
    assert not any(place.exists() for place in places)


def test_f65_processes_of_different_configs_do_not_begin(tmp_path):
    # The last word counts, so the second process has another config.
    workdir = tmp_path / "run"
    field = "--config.optimizer.lr=0.5"
    other = f"if sys.argv[-2].endswith('2,1'): sys.argv.append('{field}')"
    with together(workdirs=[workdir] * 2, patch=other) as children:
        results = ends(children)
    assert [r.code for r in results] == [2, 2], results
    assert all("process 1 was given another config" in r.stderr for r in results)
    assert not workdir.exists()


def test_h78_processes_of_other_random_numbers_do_not_begin(tmp_path):
    workdir = tmp_path / "run"
    other = """
if sys.argv[-2].endswith("2,1"):
    os.environ["JAX_DEFAULT_PRNG_IMPL"] = "rbg"
"""
    with together(workdirs=[workdir] * 2, patch=other) as children:
        results = ends(children)
    assert [r.code for r in results] == [2, 2], results
    for result in results:
        assert "process 1 was given another config" in result.stderr, result.output
        assert "or another JAX_DEFAULT_PRNG_IMPL" in result.stderr
    assert not workdir.exists()


def test_f65_other_data_on_one_host_are_refused(tmp_path):
    workdir = tmp_path / "run"
    other = """
if sys.argv[-2].endswith("2,1"):
    from memsep_jax.experiments.config import build
    _build = build.build
    def other(config):
        parts = _build(config)
        splits = parts.splits._replace(fingerprint="0" * 64)
        return parts._replace(splits=splits)
    build.build = other
"""
    with together(workdirs=[workdir] * 2, patch=other) as children:
        results = ends(children)
    assert [r.code for r in results] == [2, 2], results
    assert all("process 1 read other training data" in r.stderr for r in results)


def test_f65_a_workdir_in_use_is_refused_to_all(tmp_path):
    workdir = tmp_path / "run"
    longer = (*harness.TINY, "--config.train.steps=2000")
    with harness.spawn(*longer, workdir=workdir, patch=SLOWLY) as owner:
        harness.wait_for_rows(owner, 3)
        with together(*longer[-1:], workdirs=[workdir] * 2) as children:
            first, second = ends(children)
        assert (first.code, second.code) == (2, 2), (first, second)
        assert "in use by process" in first.stderr
        assert "process 0 could not begin" in second.stderr
        assert not owner.ended


def test_f63_a_process_that_never_comes_is_waited_for_in_vain(tmp_path):
    soon = "from memsep_jax import parallel\nparallel.join.__defaults__ = (3,)"
    workdirs = [tmp_path / "run"]
    with together(workdirs=workdirs, patch=soon) as children:
        (result,) = ends(children)
    assert result.code == 6, result.output
    assert "did not come in 3 s" in result.stderr
    assert not workdirs[0].exists()


@pytest.mark.parametrize("where", ["here", "a:1,2", "a:1,2,2", "a:b,2,0", "a:1,x,0"])
def test_f65_a_place_that_makes_no_sense_is_a_wrong_command(where, tmp_path):
    workdir = tmp_path / "run"
    result = harness.run(*harness.TINY, f"--distributed={where}", workdir=workdir)
    assert result.code == 2, result.output
    assert f"--distributed={where} must be auto, or" in result.stderr
    assert not workdir.exists()


def test_a_value_of_each_is_gathered_in_their_order():
    """In this one process: one row, whatever its devices."""
    from memsep_jax import parallel

    assert jax.device_count() == 4
    np.testing.assert_array_equal(parallel.gather([7, 9]), [[7, 9]])


@pytest.mark.parametrize(
    "arg, said",
    [
        ("--config.train.batch_size=0", "train.batch_size=0"),
        ("--config.experiment=emm", "experiment=emm runs in one process"),
    ],
)
def test_f65_processes_that_agree_on_a_refusal_say_so_each(arg, said, tmp_path):
    workdir = tmp_path / "run"
    with together(arg, workdirs=[workdir] * 2) as children:
        results = ends(children)
    assert [r.code for r in results] == [2, 2], results
    assert all(said in r.stderr for r in results)
    assert not workdir.exists()


def test_f62_a_finished_run_is_complete_for_all(whole):
    before = harness.files(whole[0], ignore=(".lock", ".lock-1"))
    with together(workdirs=[whole[0]] * 2) as children:
        results = ends(children)
    assert [r.code for r in results] == [0, 0], results
    assert "already complete" in results[0].stdout
    assert harness.files(whole[0], ignore=(".lock", ".lock-1")) == before
