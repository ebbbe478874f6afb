"""Four devices compute what one does."""

import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memsep_jax import defaults, experiments, parallel, train
from memsep_jax.experiments.runtime import record
from memsep_jax.models import MLP

MODEL = MLP(width=16, depth=1)
X = jax.random.normal(jax.random.key(2), (16, 3))


@pytest.fixture
def mesh():
    assert jax.device_count() == 4, "conftest.py asks for four CPU devices"
    return parallel.make_mesh()


def loss(params, x, key):
    eps = jax.random.normal(key, x.shape)
    return jnp.mean((MODEL.apply({"params": params}, x + eps, eps[0]) - eps) ** 2)


def test_a_mesh_holds_all_devices_along_data(mesh):
    assert mesh.axis_names == ("data",) and mesh.size == 4
    assert set(mesh.devices.flat) == set(jax.devices())


def test_a_batch_is_split_and_a_state_is_not(mesh):
    batch = jax.device_put(X, parallel.by_batch(mesh))
    assert [s.data.shape for s in batch.addressable_shards] == [(4, 3)] * 4
    np.testing.assert_array_equal(
        np.concatenate([s.data for s in batch.addressable_shards]), X
    )
    state = jax.device_put(X, parallel.replicated(mesh))
    assert [s.data.shape for s in state.addressable_shards] == [(16, 3)] * 4


@pytest.mark.parametrize("accumulate", [1, 2])
def test_four_devices_train_as_one_does(mesh, accumulate):
    tx = train.adamw(1e-2, weight_decay=0.1, clip=1.0)
    params = jax.jit(MODEL.init)(jax.random.key(0), X[0], jnp.zeros(()))["params"]
    step = jax.jit(train.make_train_step(loss, tx, 0.9, accumulate))
    one = jax.device_put(train.init(params, tx), jax.devices()[0])
    four = jax.device_put(one, parallel.replicated(mesh))
    batch = jax.device_put(X, parallel.by_batch(mesh))
    for _ in range(3):
        one, alone = step(one, X, jax.random.key(1))
        four, together = step(four, batch, jax.random.key(1))
    assert len(jax.tree.leaves(four.params)[0].sharding.device_set) == 4
    chex.assert_trees_all_close(together, alone, rtol=1e-5)
    # Adam divides by the size of a gradient: where that is rounding, so is the step.
    chex.assert_trees_all_close(four.params, one.params, rtol=1e-5, atol=1e-4)


def test_large_arrays_of_a_state_are_split_by_their_longest_axis(mesh):
    tree = {
        "wide": jnp.zeros((6, 4, 1_000)),
        "tall": jnp.zeros((4_096, 10)),
        "odd": jnp.zeros((129, 131)),
        "small": jnp.zeros((8, 8)),
        "scalar": jnp.zeros(()),
    }
    places = parallel.sharded(tree, mesh)
    shapes = {name: places[name].shard_shape(a.shape) for name, a in tree.items()}
    assert shapes == {
        "wide": (6, 4, 250),
        "tall": (1_024, 10),
        "odd": (129, 131),
        "small": (8, 8),
        "scalar": (),
    }
    assert parallel.sharded(tree, mesh, least=64)["small"].shard_shape((8, 8)) == (2, 8)


def test_a_split_state_trains_as_a_replicated_one_in_less_memory(mesh):
    tx = train.adamw(1e-2, weight_decay=0.1, clip=1.0)
    params = jax.jit(MODEL.init)(jax.random.key(0), X[0], jnp.zeros(()))["params"]
    step = train.make_train_step(loss, tx, 0.9)
    state, everywhere = train.init(params, tx), parallel.replicated(mesh)
    places = parallel.sharded(state, mesh, least=64)
    batch = jax.device_put(X, parallel.by_batch(mesh))
    found = []
    for where in everywhere, places:
        one = parallel.place(jax.tree.map(jnp.copy, state), where)
        run = jax.jit(step, donate_argnums=0, out_shardings=(where, everywhere))
        for _ in range(3):
            one, metrics = run(one, batch, jax.random.key(1))
        found.append((one, metrics))
    (whole, together), (split, apart) = found
    chex.assert_trees_all_close(apart, together, rtol=1e-5)
    chex.assert_trees_all_close(split.params, whole.params, rtol=1e-5, atol=1e-4)
    large = [a for a in jax.tree.leaves(split) if a.size >= 64]
    assert len(large) >= 8, "weights, EMA and both moments"
    for array in large:
        assert array.addressable_shards[0].data.size == array.size // 4


@pytest.mark.slow
def test_a_run_with_a_split_state_goes_on_and_ends_as_any_other(tmp_path):
    """Saved as a whole, it is resumed on as many devices as there are."""
    config = defaults.variant_of(defaults.mixtures(), "smoke")
    config.model.update(width=128)
    config.train.update(steps=4)
    config.run.update(save_every=2, shard=True)
    plain = config.copy_and_resolve_references()
    plain.run.shard = False
    for name, one in {"split": config, "plain": plain}.items():
        experiments.run(one, tmp_path / name)
    kept = [
        record.read_npz(tmp_path / name / "samples.npz")["samples"]
        for name in ("split", "plain")
    ]
    np.testing.assert_allclose(*kept, rtol=1e-3, atol=1e-4)
    shutil.copytree(tmp_path / "split", tmp_path / "other")
    losses = []
    for name, shard in {"split": True, "other": False}.items():
        longer = config.copy_and_resolve_references()
        longer.train.steps = 6
        longer.run.shard = shard
        experiments.run(longer, tmp_path / name)
        rows = record.read_metrics(tmp_path / name / "metrics.jsonl")
        losses.append([row["loss"] for row in rows])
    assert len(losses[0]) == 6
    np.testing.assert_allclose(*losses, rtol=1e-4)
