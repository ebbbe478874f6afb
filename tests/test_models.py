"""Networks start as zero, heads hang on their gates, labels and tokens count."""

import importlib.util
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import VE, check_slopes, drawn

from memsep_jax import train
from memsep_jax.models import MLP, MODELS, DiT, UNet, dit
from memsep_jax.models.layers import Conv, Dense, time_features

SMALL = dict(patch=2, width=16, depth=2, num_heads=2)
X = np.random.default_rng(5).normal(size=(4, 6, 3)).astype(np.float32)
T = np.float32(0.3)


def init(model, x=X, **call):
    return jax.jit(model.init)(jax.random.key(0), x, T, **call)["params"]


def filled(params, scale=0.2):
    """Every leaf away from zero, so that nothing hides behind adaLN-zero."""
    draw = np.random.default_rng(1)
    return jax.tree.map(
        lambda p: np.float32(p + scale * draw.normal(size=p.shape)),
        jax.device_get(params),
    )


def blank(shapes):
    """Parameters as `filled` has them, of a network that was not initialized."""
    return filled(jax.tree.map(lambda p: np.zeros(p.shape, p.dtype), shapes))


def bind(model, params):
    """(x, t, label, gates) -> the answer, compiled."""
    params = jax.tree.map(jnp.asarray, params)
    return jax.jit(lambda *args: model.apply({"params": params}, *args))


@pytest.fixture(scope="module")
def small():
    model = DiT(**SMALL)
    params = filled(init(model))
    return model, params, bind(model, params)


@pytest.fixture(scope="module")
def conditional():
    model = DiT(**SMALL, num_classes=3)
    return bind(model, filled(init(model, label=0)))


def size(params):
    return sum(p.size for p in jax.tree.leaves(params))


# At the start.


@pytest.mark.parametrize("model", [DiT(**SMALL), MLP(width=16, depth=2)])
def test_a_new_network_answers_zero(model):
    start = jax.jit(model.init_with_output)
    answer, tree = start(jax.random.key(0), X, T)
    assert np.all(np.asarray(answer) == 0)
    assert all(p.dtype == np.float32 for p in jax.tree.leaves(tree))


def test_adaln_zero_makes_every_block_the_identity():
    """With only the output filled in, neither t nor attention nor MLP shows."""
    model = DiT(**SMALL)
    params = init(model)
    params["output"] = filled(params["output"])
    others = {
        f"block_{i}": params[f"block_{i}"]
        | {
            name: filled(params[f"block_{i}"][name])
            for name in ("attention", "mlp_in", "mlp_out")
        }
        for i in range(2)
    }
    apply = jax.jit(lambda params, t: model.apply({"params": params}, X, t))
    answer = np.asarray(apply(params, T))
    assert np.any(answer != 0)
    np.testing.assert_array_equal(apply(params | others, T), answer)
    np.testing.assert_array_equal(apply(params, 10 * T), answer)
    # Open one block, and all of it shows.
    params["block_0"]["modulation"] = filled(params["block_0"]["modulation"])
    assert np.all(np.asarray(apply(params, 10 * T)) != apply(params, T))


# Counts.


def dit_count(patch, width, depth, channels, classes=0, ratio=4):
    def dense(a, b):
        return a * b + b

    hidden = int(ratio * width)
    embedding = dense(256, width) + dense(width, width)
    embedding += (classes + 1) * width if classes else 0
    block = (
        dense(width, 6 * width)
        + 4 * dense(width, width)
        + dense(width, hidden)
        + dense(hidden, width)
    )
    pixels = patch**2 * channels
    ends = dense(pixels, width) + dense(width, 2 * width) + dense(width, pixels)
    return ends + embedding + depth * block


@pytest.mark.parametrize("fields, classes", [({}, 0), ({}, 3)])
def test_the_parameters_of_a_dit_are_counted_by_hand(fields, classes):
    fields = SMALL | fields
    model = DiT(**fields, num_classes=classes)
    shapes = jax.eval_shape(model.init, jax.random.key(0), X, T)["params"]
    count = dit_count(fields["patch"], fields["width"], fields["depth"], 3, classes)
    assert size(shapes) == count


def test_dit_s_2_on_cifar_has_about_33_million():
    model = DiT(patch=2, width=384, depth=12, num_heads=6)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((32, 32, 3)), T)
    assert size(shapes) == dit_count(2, 384, 12, 3)
    assert 32e6 < size(shapes) < 34e6


def test_the_parameters_of_an_mlp_are_counted_by_hand():
    width, depth, d = 16, 3, X.size
    ends = d * width + width + width * d + d
    embedding = 256 * width + width + width**2 + width
    shapes = jax.eval_shape(MLP(width, depth).init, jax.random.key(0), X, T)
    assert size(shapes) == ends + embedding + depth * 3 * (width**2 + width)


# Heads and gates.


def test_gates_of_one_are_no_gates(small):
    _, _, apply = small
    result = apply(X, T, None, np.ones((2, 2), np.float32))
    np.testing.assert_allclose(result, apply(X, T), atol=1e-5)


def test_a_closed_gate_is_a_head_whose_output_weights_are_zero(small):
    model, params, apply = small
    whole = jax.jit(lambda params: model.apply({"params": params}, X, T))
    for layer, head in [(0, 0), (0, 1), (1, 0)]:
        gates = np.ones((2, 2), np.float32)
        gates[layer, head] = 0
        without = jax.tree.map(np.copy, params)
        kernel = without[f"block_{layer}"]["attention"]["out"]["kernel"]
        assert kernel.shape == (2, 8, 16)  # [heads, width of a head, width]
        kernel[head] = 0
        result = np.asarray(apply(X, T, None, gates))
        np.testing.assert_allclose(result, whole(without), rtol=1e-4, atol=1e-5)
        assert np.max(np.abs(result - apply(X, T))) > 1e-2


# Tokens.


def test_with_every_head_closed_a_patch_sees_only_itself(small):
    """So patches go back where they came from, in rows and in columns."""
    _, _, apply = small

    slopes = jax.jit(
        jax.jacrev(lambda x, gates: apply(x, T, None, jnp.full((2, 2), gates)))
    )

    def influence(gates):
        """Which input patch changes which output patch: [2, 3, 2, 3] bool."""
        split = np.asarray(slopes(X, gates)).reshape(2, 2, 3, 2, 3, 2, 2, 3, 2, 3)
        return np.any(split != 0, axis=(1, 3, 4, 6, 8, 9))

    closed = influence(0.0).reshape(6, 6)
    np.testing.assert_array_equal(closed, np.eye(6, dtype=bool))
    assert influence(1.0).all()


def test_without_positions_patches_can_change_places(monkeypatch, small):
    """A transformer is equivariant: only position_features tells places apart."""
    model, params, apply = small

    def swap(x):  # the first and the last column of patches
        return np.concatenate([x[:, 4:], x[:, 2:4], x[:, :2]], axis=1)

    assert np.max(np.abs(apply(swap(X), T) - swap(apply(X, T)))) > 1e-2
    monkeypatch.setattr(dit, "position_features", lambda r, c, w: jnp.zeros((r * c, w)))
    blind = bind(model, params)
    np.testing.assert_allclose(
        blind(swap(X), T), swap(blind(X, T)), rtol=1e-3, atol=1e-4
    )


def test_every_place_has_its_own_position():
    features = np.asarray(dit.position_features(5, 3, 16))
    assert features.shape == (15, 16)
    assert len(np.unique(features.round(5), axis=0)) == 15
    np.testing.assert_allclose((features**2).sum(1), 8, rtol=1e-5)  # sin^2 + cos^2


def test_attention_is_softmax_of_scaled_products(key):
    """softmax(Q K^T / sqrt(d_h)) V per head, by hand."""
    layer, h = dit.Attention(num_heads=2), np.float32(drawn(0, 5, 8))
    params = filled(jax.jit(layer.init)(key, h)["params"], 0.5)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    total = p["out"]["bias"].copy()
    for head in range(2):
        q, k, v = (
            np.asarray(h) @ p[name]["kernel"][:, head] + p[name]["bias"][head]
            for name in ("query", "key", "value")
        )
        weights = np.exp(q @ k.T / 2)  # sqrt(4) = 2
        weights /= weights.sum(axis=1, keepdims=True)
        total = total + weights @ v @ p["out"]["kernel"][head]
    result = jax.jit(layer.apply)({"params": params}, h)
    np.testing.assert_allclose(result, total, rtol=1e-4, atol=1e-4)


# Labels and time.


def test_labels_tell_networks_apart(conditional):
    answers = [np.asarray(conditional(X, T, np.int32(c))) for c in range(4)]
    for i in range(4):
        for j in range(i):
            assert np.max(np.abs(answers[i] - answers[j])) > 1e-3


def test_no_label_is_the_label_after_the_last(conditional):
    none = conditional(X, T)
    np.testing.assert_allclose(none, conditional(X, T, np.int32(3)), atol=1e-5)


@pytest.mark.parametrize("model", [DiT(**SMALL), MLP(width=16, depth=1)])
def test_an_unconditional_network_refuses_a_label(model):
    with pytest.raises(ValueError, match="set num_classes"):
        jax.eval_shape(model.init, jax.random.key(0), X, T, 0)


@pytest.mark.parametrize("make", [lambda c: DiT(**SMALL, num_classes=c),
                                  lambda c: MLP(16, 1, num_classes=c)])  # fmt: skip
@pytest.mark.parametrize("label", [-1, 4, np.int32(5), jnp.int32(50_000)])
def test_a_label_beyond_the_table_is_refused(make, label):
    """A gather would take the last row, and say nothing."""
    with pytest.raises(ValueError, match=f"label={label} is beyond .* num_classes=3"):
        jax.eval_shape(lambda: make(3).init(jax.random.key(0), X, T, label))


def test_time_features_are_cosines_and_sines():
    result = np.asarray(time_features(jnp.float32(0.25), 8))
    angles = 250 * 10_000.0 ** -(np.arange(4) / 4)
    truth = np.concatenate([np.cos(angles), np.sin(angles)])
    np.testing.assert_allclose(result, truth, atol=2e-4)


# One point, one function.


def test_vmap_is_a_loop(small):
    _, _, apply = small
    xs, ts = np.stack([X, -X, 2 * X]), np.float32([0.1, 0.5, 2.0])
    batch = np.asarray(jax.vmap(lambda x, t: apply(x, t))(xs, ts))
    for x, t, together in zip(xs, ts, batch, strict=True):
        np.testing.assert_allclose(together, apply(x, t), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("model", [DiT(**SMALL), MLP(width=16, depth=2)])
def test_bfloat16_is_close_to_float32(model):
    half = model.clone(dtype="bfloat16")
    shapes = jax.eval_shape(half.init, jax.random.key(0), X, T)
    assert all(p.dtype == np.float32 for p in jax.tree.leaves(shapes))
    params = blank(shapes["params"])
    both = jax.jit(lambda x: [bind(net, params)(x, T) for net in (model, half)])
    truth, answer = map(np.asarray, both(X))
    assert answer.dtype == np.float32  # the loss is not computed in bfloat16
    error = np.linalg.norm(answer - truth) / np.linalg.norm(truth)
    assert 0 < error < 0.05


@pytest.mark.parametrize("layer, shape", [(Dense(2, dtype="bfloat16"), (1_001, 3)),
                                          (Conv(2, (3, 3), dtype="bfloat16"),
                                           (77, 13, 3))])  # fmt: skip
def test_the_gradient_of_a_bias_is_summed_in_float32(layer, shape):
    """1,001 ones: as bfloat16, whose steps are 4 there, they make no 1,001."""
    ones = np.ones(shape, np.float32)
    params = jax.jit(layer.init)(jax.random.key(0), ones)["params"]

    @jax.jit
    @jax.grad
    def slopes(params):
        out = layer.apply({"params": params}, ones)
        assert out.dtype == jnp.bfloat16
        return jnp.sum(out.astype(jnp.float32))

    np.testing.assert_array_equal(slopes(params)["bias"], [1_001, 1_001])


@pytest.mark.parametrize("make", [lambda p: DiT(**SMALL, dropout=p),
                                  lambda p: MLP(16, 2, dropout=p)])  # fmt: skip
def test_dropout_is_noise_in_training_only(make):
    model = make(0.5)
    shapes = jax.eval_shape(model.init, jax.random.key(0), X, T)["params"]
    params = blank(shapes)

    @jax.jit
    def train(key):
        rngs = {"dropout": key}
        return model.apply({"params": params}, X, T, train=True, rngs=rngs)

    still = bind(make(0.0), params)(X, T)
    np.testing.assert_array_equal(bind(model, params)(X, T), still)
    one, other = (np.asarray(train(jax.random.key(seed))) for seed in (0, 1))
    assert np.any(one != other)


def test_an_mlp_is_its_formula():
    """h + W_2 silu(W_1 silu(h) + W_t e) / sqrt(depth), depth times, by hand."""
    model = MLP(width=8, depth=2)
    x = np.float32([0.5, -1.0, 2.0])
    params = filled(init(model, x))
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)

    def silu(a):
        return a / (1 + np.exp(-a))

    def dense(name, a, at=p):
        return a @ at[name]["kernel"] + at[name]["bias"]

    inner = p["Embedding_0"]
    e = dense("time_in", np.asarray(time_features(T), np.float64), inner)
    e = silu(dense("time_out", silu(e), inner))
    h = dense("input", np.asarray(x))
    for i in range(2):
        a = dense(f"block_{i}_in", silu(h)) + dense(f"block_{i}_time", e)
        h = h + dense(f"block_{i}_out", silu(a)) / np.sqrt(2)
    result = bind(model, params)(x, T)
    np.testing.assert_allclose(result, dense("output", silu(h)), rtol=1e-3, atol=1e-4)


# Refusals.


@pytest.mark.parametrize(
    "fields, shape, words",
    [
        ({"patch": 3}, (4, 6, 3), "patch=3 must divide the image, 4x6"),
        ({"patch": 0}, (4, 6, 3), "patch=0"),
        ({"num_heads": 3}, (4, 6, 3), "num_heads=3 must divide width=16"),
        ({"width": 18}, (4, 6, 3), "width=18 must be a multiple of 4"),
        ({}, (24,), r"images \[h, w, c\], not data of shape \(24,\)"),
    ],
)
def test_a_dit_that_does_not_fit_says_which_number(fields, shape, words):
    model = DiT(**SMALL | fields)
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape), T)


def test_an_mlp_has_no_gates():
    with pytest.raises(ValueError, match="no attention heads"):
        MLP(16, 1).init(jax.random.key(0), X, T, gates=jnp.ones((1, 1)))


def test_every_network_takes_the_same_call():
    for model in (DiT(**SMALL), MLP(16, 1), UNet(8, 1, (1,), attention=())):
        assert isinstance(model, nn.Module) and type(model) in MODELS.values()
        shape = jax.eval_shape(model.init_with_output, jax.random.key(0), X, T)[0]
        assert (shape.shape, shape.dtype) == (X.shape, X.dtype)


# An independent implementation.


@pytest.mark.slow
def test_forward_and_backward_of_a_dit_are_those_of_pytorch(x64):
    """float64, all weights copied over: the answer, and its gradients in all inputs.

    To 1e-6: `jax.nn.dot_product_attention` has a softmax in float32.
    """
    torch = pytest.importorskip("torch", reason="of the extra dev")
    path = Path(__file__).parent.parent / "benchmarks" / "torch_nets.py"
    spec = importlib.util.spec_from_file_location("torch_nets", path)
    nets = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nets)
    model = DiT(**SMALL, num_classes=3, dtype="float64")
    xs = jax.random.normal(jax.random.key(1), (3, 8, 8, 3))
    ts, labels = jnp.array([0.3, -0.7, 1.2]), jnp.array([0, 3, 1])
    # Moderate weights: large ones would multiply the rounding of that softmax.
    params = filled(init(model, xs[0], label=0), scale=0.1)
    params = jax.tree.map(lambda p: p.astype(jnp.float64), params)

    def loss(params, xs):
        one = lambda *at: model.apply({"params": params}, *at)  # noqa: E731
        result = jax.vmap(one)(xs, ts, labels)
        return jnp.sum(jnp.sin(result)), result

    backward = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (_, result), (slopes, x_slopes) = backward(params, xs)

    net = nets.DiT(8, 3, **SMALL, num_classes=3).double()
    nets.load(net, jax.tree.map(np.asarray, params))
    x_torch = nets.images(xs).requires_grad_()
    ts_torch, labels = (
        torch.tensor(ts.tolist(), dtype=torch.float64),
        torch.tensor(labels.tolist()),
    )
    truth = net(x_torch, ts_torch, labels)
    truth.sin().sum().backward()

    def close(one, other):
        one, other = np.asarray(one), np.asarray(other)
        assert np.max(np.abs(one - other)) < 1e-6 * np.max(np.abs(other))

    close(nets.images(result), truth.detach())
    close(nets.images(x_slopes), x_torch.grad)
    assert size(slopes) == sum(p.numel() for p in net.parameters())
    nets.load(net, jax.tree.map(np.asarray, slopes))
    largest = max(float(abs(p.grad).max()) for p in net.parameters())
    for weight in net.parameters():  # now ours, beside their own gradient
        error = float(abs(weight.detach() - weight.grad).max())
        assert error < 1e-6 * largest


@pytest.mark.parametrize(
    "model, step",
    [
        pytest.param(MLP(width=4, depth=1), 1e-5, id="mlp"),
        pytest.param(  # the softmax of its attention is of float32
            DiT(patch=2, width=8, depth=1, num_heads=2, dtype="float64"),
            1e-3,
            id="dit",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            UNet(width=4, depth=1, multipliers=(1,), attention=(), dtype="float64"),
            1e-5,
            id="unet",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_loss_has_the_gradient_of_its_differences(model, step, x64):
    x0, eps = jnp.asarray(drawn(0, 2, 4, 4, 1))
    shapes = jax.eval_shape(model.init, jax.random.key(0), x0, 0.5)["params"]
    params = jax.tree.map(lambda p: 0.3 * drawn(p.size, *p.shape), shapes)

    def loss(params):
        def apply(params, x, t):
            return model.apply({"params": params}, x, t)

        return train.noise_loss(apply, params, VE, x0, jnp.asarray(0.5), eps)

    check_slopes(loss, params, step=step, rtol=1e-6 if step < 1e-4 else 1e-3)
