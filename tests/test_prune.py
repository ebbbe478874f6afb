"""Importance, keep and masks: Algorithm 1 of Ye 2025 on a tiny DiT."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from oracles import FEW, SEEDS, drawn

from memsep_jax import process, prune, train
from memsep_jax.models import MLP, DiT

SHAPE = (2, 4)  # depth, heads
MODEL = DiT(patch=2, width=16, depth=2, num_heads=4)
EXACT = MODEL.clone(dtype="float64")
VE = process.variance_exploding()


@pytest.fixture(scope="module")
def params(off_zero):
    """Random everywhere, since adaLN-zero starts every block as the identity."""
    x = np.zeros((4, 4, 1), np.float32)
    init = jax.jit(lambda key: off_zero(MODEL.init(key, x, 0.0)["params"]))
    return init(jax.random.key(0))


def gate_loss(params, model=MODEL):
    def loss(gates, x0, t, eps):
        def apply(p, x, t):
            return model.apply({"params": p}, x, t, gates=gates)

        return train.noise_loss(apply, params, VE, x0, t, eps)

    return loss


def batch(b=6):
    x0, eps = np.float32(drawn(2, 2, b, 4, 4, 1))
    return x0, np.random.default_rng(2).uniform(0.1, 1, b).astype(np.float32), eps


def in_float64(tree):
    return jax.tree.map(lambda p: np.float64(p), tree)


def test_importance_is_the_mean_slope_with_unit_norm_per_layer(params):
    """Whatever the chunk, also one that does not divide the examples."""
    loss = gate_loss(params)

    @jax.jit
    def found(*batch):
        slope = jax.vmap(lambda *a: jnp.abs(jax.grad(loss)(jnp.ones(SHAPE), *a)))
        return slope(*batch), [
            prune.head_importance(loss, *batch, SHAPE, chunk) for chunk in (3, 256)
        ]

    slopes, importances = jax.tree.map(np.asarray, found(*batch(7)))
    mean = slopes.mean(axis=0)
    mean /= np.linalg.norm(mean, axis=1, keepdims=True)
    assert np.all(mean > 0)
    for importance in importances:
        np.testing.assert_allclose((importance**2).sum(axis=1), 1, rtol=1e-5)
        np.testing.assert_allclose(importance, mean, rtol=1e-4)


def test_the_slope_of_a_gate_is_the_slope_of_its_output_weights(params, x64):
    """dL/dgate = <dL/dW, W> for the weights that read the unit: a head or a neuron."""
    params = in_float64(params)
    x0, t, eps = (np.float64(a[0]) for a in batch())

    def loss(params, heads, neurons):
        def apply(p, x, t):
            gates = {"heads": heads, "neurons": neurons}
            return EXACT.apply({"params": p}, x, t, gates=gates)

        return train.noise_loss(apply, params, VE, x0, t, eps)

    opened = np.ones(SHAPE), np.ones((2, 64))
    grads = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(params, *opened)
    wrt, heads, neurons = jax.tree.map(np.asarray, grads)
    for layer in range(SHAPE[0]):
        block = params[f"block_{layer}"], wrt[f"block_{layer}"]
        weights, slopes = (b["attention"]["out"]["kernel"] for b in block)
        np.testing.assert_allclose(
            heads[layer], (weights * slopes).sum(axis=(1, 2)), rtol=1e-6, atol=1e-12
        )
        weights, slopes = (b["mlp_out"]["kernel"] for b in block)
        np.testing.assert_allclose(
            neurons[layer], (weights * slopes).sum(axis=1), rtol=1e-6, atol=1e-12
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


def some(group, shape):
    """A keep that leaves some units of every layer, and not as many in each."""
    keep = np.ones(shape, bool)
    keep[0, 1:2] = False
    if len(keep) > 1:
        keep[1, : shape[1] // 2] = False
    return keep


@pytest.mark.parametrize("group", prune.GROUPS)
def test_gate_mask_and_removal_are_one_function(params, group, x64):
    params = in_float64(params)
    x, t = batch()[0][0].astype(np.float64), 0.5
    keep = some(group, prune.gates(params, group).shape)
    mask = jax.device_get(prune.group_mask(params, keep, group))
    masked = jax.tree.map(np.multiply, params, mask)
    apply = jax.jit(lambda p, g=None: EXACT.apply({"params": p}, x, t, gates=g))
    truth, small = apply(masked), prune.compact(params, keep, group)
    np.testing.assert_allclose(apply(small), truth, rtol=1e-12, atol=1e-12)
    gated = apply(params, {group: np.float64(keep)})
    np.testing.assert_allclose(gated, truth, rtol=1e-12, atol=1e-12)
    assert np.abs(np.asarray(truth) - apply(params)).max() > 1e-4
    removed = sum(p.size for p in jax.tree.leaves(params)) - sum(
        p.size for p in jax.tree.leaves(small)
    )
    zeros = jax.tree.map(lambda m, p: np.broadcast_to(m, p.shape) == 0, mask, params)
    assert removed == sum(int(z.sum()) for z in jax.tree.leaves(zeros)) > 0


def test_removals_compose(params):
    """Heads, neurons and a block, one after the other, in any order."""
    x, t = np.full((4, 4, 1), 0.3, np.float32), np.float32(0.5)
    params = jax.device_get(params)
    apply = jax.jit(lambda p: MODEL.apply({"params": p}, x, t))
    keeps = {g: some(g, prune.gates(params, g).shape) for g in prune.GROUPS}
    outputs = []
    for order in (list(keeps), list(keeps)[::-1]):
        small = params
        for group in order:
            small = prune.compact(small, keeps[group], group)
        outputs.append(apply(small))
    masked = params
    for group, keep in keeps.items():
        masked = prune.apply_mask(masked, prune.group_mask(params, keep, group))
    for output in outputs:
        np.testing.assert_allclose(output, apply(masked), rtol=1e-4, atol=1e-5)


def test_a_layer_without_heads_is_its_bias(params):
    x, t = jnp.ones((4, 4, 1)) * 0.3, jnp.float32(0.5)
    apply = jax.jit(lambda p: MODEL.apply({"params": p}, x, t))
    keep = np.ones(SHAPE, bool)
    keep[0] = False
    masked = prune.apply_mask(params, prune.head_mask(params, keep))
    small = prune.compact(params, keep)
    assert small["block_0"]["attention"]["query"]["kernel"].shape[1] == 0
    np.testing.assert_allclose(apply(small), apply(masked), rtol=1e-4, atol=1e-5)


def test_the_gates_of_a_network_are_counted_by_its_parameters(params):
    assert prune.gates(params).shape == SHAPE
    assert prune.gates(params, "neurons").shape == (2, 64)
    assert prune.gates(params, "blocks").shape == (1, 2)
    mlp = MLP(width=8, depth=1)
    plain = jax.jit(mlp.init)(jax.random.key(0), jnp.zeros(2), jnp.zeros(()))["params"]
    with pytest.raises(ValueError, match="group='heads': the network has none"):
        prune.gates(plain)
    with pytest.raises(ValueError, match="'head' is not one of heads, neurons, blocks"):
        prune.gates(params, "head")


def test_magnitude_is_the_norm_of_what_a_gate_closes(params):
    """Of a head: its columns of q, k, v with their biases, and its rows of W_O."""
    params = jax.device_get(params)
    attention = params["block_1"]["attention"]
    squares = np.zeros(SHAPE[1])
    for h in range(SHAPE[1]):
        for name in ("query", "key", "value"):
            squares[h] += np.sum(attention[name]["kernel"][:, h] ** 2)
            squares[h] += np.sum(attention[name]["bias"][h] ** 2)
        squares[h] += np.sum(attention["out"]["kernel"][h] ** 2)
    expected = np.sqrt(squares) / np.sqrt(squares.sum())
    np.testing.assert_allclose(prune.magnitude(params)[1], expected, rtol=1e-5)
    blocks = prune.magnitude(params, "blocks")
    total = [
        np.sqrt(sum(np.sum(p**2) for p in jax.tree.leaves(params[f"block_{i}"])))
        for i in range(2)
    ]
    np.testing.assert_allclose(blocks[0], total / np.linalg.norm(total), rtol=1e-5)


@pytest.mark.parametrize("group", prune.GROUPS)
def test_a_unit_that_is_pruned_has_no_activation(params, group):
    x, t = batch()[0][0], jnp.float32(0.5)

    @jax.jit
    def sizes(p):
        _, seen = MODEL.apply({"params": p}, x, t, mutable="intermediates")
        return prune.activations(seen["intermediates"], group)

    whole = sizes(params)
    assert whole.shape == prune.gates(params, group).shape and np.all(whole > 0)
    keep = some(group, whole.shape)
    mask = prune.group_mask(params, keep, group)
    np.testing.assert_array_equal(sizes(prune.apply_mask(params, mask))[~keep], 0)


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


def test_random_heads_may_fall_as_in_another_mask(key):
    """As many in every layer as there, but not the same ones."""
    like = prune.keep_top(np.random.default_rng(1).random((12, 6)), 0.4)
    keep = prune.keep_random(key, (12, 6), 0.4, like)
    np.testing.assert_array_equal(keep.sum(axis=1), like.sum(axis=1))
    assert (keep != like).any()
    np.testing.assert_array_equal(keep, prune.keep_random(key, (12, 6), 0.4, like))


def test_every_random_head_falls_equally_often():
    """Each of 12 heads in a quarter of 400 draws, within 4 standard errors."""
    keys = [jax.random.key(seed) for seed in range(400)]
    like = np.array([[True, True, True, False]] * 3)
    for other in (None, like):
        share = np.mean([~prune.keep_random(k, (3, 4), 0.25, other) for k in keys], 0)
        np.testing.assert_allclose(share, 0.25, atol=4 * np.sqrt(0.25 * 0.75 / 400))


@given(
    arrays(np.float64, (3, 5), elements=st.floats(-1e6, 1e6)),
    st.floats(0, 0.99),
)
def test_what_falls_is_counted_and_the_least_in_its_reach(importance, ratio):
    keep = prune.keep_top(importance, ratio)
    assert keep.any(axis=1).all()
    assert (~keep).sum() == min(int(np.floor(ratio * 15 + 1e-9)), 12)
    for layer in np.flatnonzero(keep.sum(axis=1) > 1):
        if keep[layer].any() and (~keep).any():  # a layer that could still lose one
            assert importance[layer][keep[layer]].min() >= importance[~keep].max()


def test_what_does_not_fit_is_named(params):
    with pytest.raises(ValueError, match=r"ratio=1 must be in \[0, 1\)"):
        prune.keep_top(np.ones(SHAPE), 1)
    with pytest.raises(ValueError, match="1 values .* the first of layer 0, unit 1"):
        prune.keep_top(np.array([[0.1, np.nan]]), 0.5)
    with pytest.raises(ValueError, match=r"block_0/attention/key/bias with 4 heads"):
        prune.head_mask(params, np.ones((2, 3), bool))
    with pytest.raises(
        ValueError, match=r"\(3, 4\) does not fit .* gates of heads are \(2, 4\)"
    ):
        prune.head_mask(params, np.ones((3, 4), bool))


def test_a_mask_of_another_network_is_refused_by_the_name_of_the_leaf(params):
    tx = train.adamw(1e-3)
    mask = prune.head_mask(params, np.ones(SHAPE, bool))
    jax.jit(lambda p: train.init(p, tx, mask))(params)
    other = jax.tree.map(lambda m: m, mask)
    other["block_1"]["attention"]["value"]["bias"] = jnp.ones((3, 1))
    name = "block_1/attention/value/bias"
    with pytest.raises(
        ValueError, match=rf"\(3, 1\) does not fit {name} of shape \(4,"
    ):
        train.init(params, tx, other)
    del other["block_1"]["attention"]["value"]["bias"]
    with pytest.raises(ValueError, match=f"mask lacks {name}"):
        train.init(params, tx, other)
    with pytest.raises(ValueError, match="another network, with block_1/"):
        train.init({k: v for k, v in params.items() if k != "block_1"}, tx, mask)


def random_network(seed):
    """The parameters of a DiT, as far as they differ: some of heads, some of none."""

    def weights(*shape):
        return np.float32(drawn(seed, *shape))

    block = {
        "attention": {
            "query": {"kernel": weights(5, 4, 3)},
            "out": {"kernel": weights(4, 3, 5), "bias": weights(5)},
        }
    }
    return {"patches": {"bias": weights(5)}, "block_0": block, "block_1": block}


def equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


@FEW
@given(SEEDS)
def test_masks_compose(seed):
    """Two after another, in any order, are their product, and the mask of both."""
    rng, params = np.random.default_rng(seed), random_network(seed)
    keeps = rng.random((2, 2, 4)) < 0.6
    one, other = (prune.head_mask(params, keep) for keep in keeps)
    both = prune.head_mask(params, keeps[0] & keeps[1])
    equal(both, prune.apply_mask(one, other))
    twice = prune.apply_mask(prune.apply_mask(params, one), other)
    equal(twice, prune.apply_mask(params, both))
    equal(twice, prune.apply_mask(prune.apply_mask(params, other), one))
    equal(twice, prune.apply_mask(twice, both))  # once is enough
    equal(twice, prune.apply_mask(twice, prune.full_mask(params)))
    # The out bias and the patches belong to no head.
    for layer, keep in enumerate(keeps[0] & keeps[1]):
        left = twice[f"block_{layer}"]["attention"]
        np.testing.assert_array_equal(np.any(left["query"]["kernel"], (0, 2)), keep)
        np.testing.assert_array_equal(np.any(left["out"]["kernel"], (1, 2)), keep)
        assert np.all(left["out"]["bias"]) and np.all(twice["patches"]["bias"])


@FEW
@given(
    st.lists(st.integers(0, 5), min_size=12, max_size=12),
    st.lists(st.floats(0, 0.99), min_size=2, max_size=2).map(sorted),
    st.integers(1, 3),
)
def test_more_pruning_takes_more_of_the_same_heads(importance, ratios, least):
    """Nested in the ratio, and by ranks alone; ties too."""
    importance = np.reshape(importance, (3, 4))
    few, many = (prune.keep_top(importance, ratio, least) for ratio in ratios)
    assert not np.any(many & ~few)
    assert few.sum(axis=1).min() >= least
    ranks = prune.keep_top(np.exp(3.0 * importance) - 2, ratios[1], least)
    np.testing.assert_array_equal(ranks, many)
