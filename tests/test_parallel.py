"""Four devices compute what one does."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memsep_jax import parallel, train
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
