"""Importance, keep and masks: Algorithm 1 of Ye 2025 on a tiny DiT."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memsep_jax import process, prune, train
from memsep_jax.models import DiT

SHAPE = (2, 4)  # depth, heads
MODEL = DiT(patch=2, width=16, depth=2, num_heads=4)
VE = process.variance_exploding()


@pytest.fixture(scope="module")
def params(off_zero):
    """Random everywhere, since adaLN-zero starts every block as the identity."""
    x = jnp.zeros((4, 4, 1))
    return off_zero(jax.jit(MODEL.init)(jax.random.key(0), x, jnp.zeros(()))["params"])


def gate_loss(params):
    def loss(gates, x0, t, eps):
        def apply(p, x, t):
            return MODEL.apply({"params": p}, x, t, gates=gates)

        return train.noise_loss(apply, params, VE, x0, t, eps)

    return loss


def batch(b=6):
    keys = jax.random.split(jax.random.key(2), 3)
    x0, eps = (jax.random.normal(k, (b, 4, 4, 1)) for k in keys[:2])
    return x0, jax.random.uniform(keys[2], (b,), minval=0.1), eps


def test_every_layer_of_the_importance_has_unit_norm(params):
    found = jax.jit(lambda *a: prune.head_importance(gate_loss(params), *a, SHAPE))
    importance = found(*batch())
    np.testing.assert_allclose((importance**2).sum(axis=1), 1, rtol=1e-5)
    assert np.all(np.asarray(importance) > 0)


def test_the_slope_of_a_gate_is_the_slope_of_its_output_weights(params, x64):
    """dL/dgate_h = <dL/dW_O^h, W_O^h>, for one example, in float64."""
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), params)
    x0, t, eps = (jnp.asarray(a[0], jnp.float64) for a in batch())
    gates = jnp.ones(SHAPE)
    slopes = jax.jit(jax.grad(gate_loss(params)))(gates, x0, t, eps)
    wrt = jax.jit(jax.grad(lambda p: gate_loss(p)(gates, x0, t, eps)))(params)
    for layer in range(SHAPE[0]):
        weights = params[f"block_{layer}"]["attention"]["out"]["kernel"]
        grads = wrt[f"block_{layer}"]["attention"]["out"]["kernel"]
        np.testing.assert_allclose(
            slopes[layer], (weights * grads).sum(axis=(1, 2)), rtol=1e-6, atol=1e-12
        )


def test_a_mask_is_a_gate_of_zero_and_changes_the_output(params):
    keep = np.ones(SHAPE, bool)
    keep[0, 1] = keep[1, 3] = False
    x, t = jnp.ones((4, 4, 1)) * 0.3, jnp.float32(0.5)
    apply = jax.jit(lambda p, g: MODEL.apply({"params": p}, x, t, gates=g))
    masked = prune.apply_mask(params, prune.head_mask(params, keep))
    ones = jnp.ones(SHAPE)
    gated = apply(params, jnp.asarray(keep, jnp.float32))
    np.testing.assert_allclose(apply(masked, ones), gated, rtol=1e-5, atol=1e-6)
    for layer, head in zip(*np.nonzero(~keep), strict=True):
        one = np.ones(SHAPE, np.float32)
        one[layer, head] = 0
        assert (
            np.abs(apply(params, jnp.asarray(one)) - apply(params, ones)).max() > 1e-4
        )


def test_keeping_all_is_a_no_op(params):
    mask = prune.head_mask(params, prune.keep_top(np.ones(SHAPE), 0.0))
    chex.assert_trees_all_equal(prune.apply_mask(params, mask), params)
    chex.assert_trees_all_equal(
        prune.apply_mask(params, prune.full_mask(params)), params
    )


@pytest.mark.parametrize(("ratio", "dropped"), [(0.2, 14), (0.29, 20), (0.5, 36)])
def test_exactly_floor_ratio_heads_fall(ratio, dropped):
    importance = np.random.default_rng(0).random((12, 6))
    keep = prune.keep_top(importance, ratio)
    assert (~keep).sum() == dropped and keep.any(axis=1).all()
    assert importance[~keep].max() < importance[keep].min()


def test_ties_fall_by_index_and_no_layer_is_emptied():
    keep = prune.keep_top(np.ones((2, 3)), 0.5)
    np.testing.assert_array_equal(keep, [[False, False, True], [False, True, True]])
    keep = prune.keep_top(np.array([[0.1, 0.2], [0.8, 0.9]]), 0.5)
    np.testing.assert_array_equal(keep, [[False, True], [False, True]])


def test_random_heads_fall_without_replacement_and_by_key(key):
    keep = prune.keep_random(key, (12, 6), 0.2)
    assert (~keep).sum() == 14 and keep.any(axis=1).all()
    np.testing.assert_array_equal(keep, prune.keep_random(key, (12, 6), 0.2))
    assert (keep != prune.keep_random(jax.random.key(1), (12, 6), 0.2)).any()


def test_the_importance_does_not_depend_on_the_batch(params):
    loss = gate_loss(params)
    x0, t, eps = batch()

    @jax.jit
    def mean_slopes(x0, t, eps):
        return jax.vmap(lambda *a: jnp.abs(jax.grad(loss)(jnp.ones(SHAPE), *a)))(
            x0, t, eps
        )

    halves = [mean_slopes(x0[i], t[i], eps[i]) for i in (slice(0, 3), slice(3, 6))]
    mean = np.concatenate(halves).mean(axis=0)
    mean /= np.linalg.norm(mean, axis=1, keepdims=True)
    whole = jax.jit(lambda *a: prune.head_importance(loss, *a, SHAPE))(x0, t, eps)
    np.testing.assert_allclose(whole, mean, rtol=1e-4)


def test_what_does_not_fit_is_named(params):
    with pytest.raises(ValueError, match=r"prune.ratio=1 must be in \[0, 1\)"):
        prune.keep_top(np.ones(SHAPE), 1)
    with pytest.raises(ValueError, match="1 values are not finite"):
        prune.keep_top(np.array([[0.1, np.nan]]), 0.5)
    with pytest.raises(ValueError, match=r"block_0/attention/key/bias with 4 heads"):
        prune.head_mask(params, np.ones((2, 3), bool))
    with pytest.raises(ValueError, match="keep has 3 layers, the network 2 blocks"):
        prune.head_mask(params, np.ones((3, 4), bool))
