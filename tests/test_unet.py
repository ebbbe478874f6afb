"""U-Nets have the published sizes, their switches do what they say, PyTorch agrees."""

import functools
import importlib.util
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memsep_jax.models import UNet, unet

SMALL = dict(width=8, depth=1, multipliers=(1, 1), attention=(4,))
TINY = SMALL | {"multipliers": (1,), "attention": ()}
X = np.random.default_rng(5).normal(size=(8, 8, 1)).astype(np.float32)
T = np.float32(0.3)


resample = jax.jit(unet.resample, static_argnums=(1, 2))


def size(params):
    return sum(p.size for p in jax.tree.leaves(params))


def shapes(model, shape, label=None):
    x = jnp.zeros(shape)
    init = functools.partial(model.init, label=label)  # not traced
    return jax.eval_shape(init, jax.random.key(0), x, T)["params"]


def filled(shapes, scale=0.2):
    """Parameters away from zero and from each other."""
    draw = np.random.default_rng(0)
    return jax.tree.map(
        lambda p: np.asarray(scale * draw.normal(size=p.shape), p.dtype), shapes
    )


def apply(model, params, *args, **call):
    return model.apply({"params": params}, *args, **call)


def answered(model, params, *args):
    """The same, compiled."""
    return np.asarray(jax.jit(functools.partial(apply, model))(params, *args))


@pytest.fixture(scope="module")
def small():
    """A network with all filled in, and its answer at X, T."""
    params = filled(shapes(UNet(**SMALL), X.shape))
    return params, answered(UNet(**SMALL), params, X, T)


@pytest.fixture(scope="module")
def tiny():
    """The same of one resolution."""
    params = filled(shapes(UNet(**TINY), X.shape))
    return params, answered(UNet(**TINY), params, X, T)


# Counts.


@pytest.mark.parametrize(
    "fields, count",
    [
        ({}, 35_125_251),
        ({"depth": 4}, 55_732_739),
        ({"width": 192}, 78_984_195),
        ({"width": 320}, 219_294_723),
        ({"depth": 4, "num_classes": 50_000}, 62_132_867),
        # The network of smaller images, and without skips.
        ({"attention": (4,), "side": 8, "skips": (False,) * 9}, 35_125_251),
    ],
)
def test_the_counts_are_those_of_gu_2023(fields, count):
    fields = {"width": 128, "depth": 2, "side": 32} | fields
    side = fields.pop("side")
    assert size(shapes(UNet(**fields), (side, side, 3))) == count


def test_ncsn_adds_the_image_at_each_level_and_doubles_features():
    result = size(shapes(UNet(width=128, depth=2, variant="ncsn"), (32, 32, 3)))
    images = 9 * 3 * 256 + 256 + 9 * 256 * 256 + 256
    assert result == 35_125_251 + images + 128 * 512


def test_any_number_of_resolutions_any_sides_and_channels():
    for multipliers, shape in [((1,), (3, 5, 1)), ((1, 2, 1), (4, 8, 4))]:
        model = UNet(8, 1, multipliers, attention=(shape[0],), variant="ncsn")
        x = jnp.zeros(shape)
        result, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), x, T)
        assert (result.shape, result.dtype) == (shape, jnp.float32)


def test_a_new_network_answers_almost_zero():
    model = UNet(**TINY)
    result, tree = jax.jit(model.init_with_output)(jax.random.key(0), X, T)
    assert 0 < jnp.max(jnp.abs(result)) < 1e-4
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(tree))


# Skips.


def test_a_removed_skip_is_zeros(small):
    """Encoder order: the last of the flags is the first that the decoder takes."""
    takes = ["decoder_0_1", "decoder_0_0", "decoder_1_1", "decoder_1_0"]
    params, full = small

    def look(seen, call, args, kwargs, context):
        if isinstance(context.module, unet.Block) and context.method_name == "__call__":
            seen[context.module.name] = args[0]
        return call(*args, **kwargs)

    def without(removed):
        model, seen = UNet(**SMALL, skips=tuple(i != removed for i in range(4))), {}
        with nn.intercept_methods(functools.partial(look, seen)):
            return apply(model, params, X, T), [seen[name] for name in takes]

    answers = jax.jit(lambda: [without(removed) for removed in range(4)])()
    for removed, (result, seen) in enumerate(jax.device_get(answers)):
        for i in range(4):
            skip = seen[i][..., 8:]
            assert np.all(skip == 0) if i == removed else np.all(skip != 0)
            assert np.all(seen[i][..., :8] != 0)
        assert np.max(np.abs(result - full)) > 1e-3


# Labels and time.


def test_a_label_is_its_row_of_the_table_times_root_c_plus_a_bias(tiny):
    """Added to the features: the map of the one-hot vector, in the first layer's bias.

    None, and the label after the last, are the bias alone.
    """
    params, without = tiny
    model = UNet(**TINY, num_classes=3)
    assert shapes(model, X.shape)["label"].shape == (3, 8)
    table, bias = np.random.default_rng(1).normal(size=(4, 8)).astype(np.float32), 0.5
    table[3] = 0  # "no label"
    full = params | {"label": table[:3], "label_bias": np.full(8, bias, np.float32)}
    first = params["embedding_in"]
    traced = jax.jit(lambda label: apply(model, full, X, T, label))
    plain = jax.jit(functools.partial(apply, UNet(**TINY)))
    answers = [without]
    for label, row in [(None, 3), (3, 3), (0, 0), (2, 2)]:
        added = np.float32(np.sqrt(3) * table[row] + bias)
        moved = first | {"bias": first["bias"] + added @ first["kernel"]}
        truth = np.asarray(plain(params | {"embedding_in": moved}, X, T))
        np.testing.assert_allclose(traced(label), truth, rtol=1e-4, atol=1e-4)
        if label is not None:
            assert all(np.max(np.abs(truth - other)) > 1e-3 for other in answers)
            answers.append(truth)
    # A label that is known is taken as one that is traced.
    result = jax.jit(lambda: apply(model, full, X, T, 2))()
    np.testing.assert_allclose(result, truth, rtol=1e-4, atol=1e-4)


def test_positional_frequencies_go_from_1_to_1e_4_with_both_ends():
    result = unet.positional_features(jnp.float32(2.5), 5)
    angles = 2.5 * np.array([1, 0.1, 0.01, 1e-3, 1e-4])
    truth = np.concatenate([np.sin(angles), np.cos(angles)])
    np.testing.assert_allclose(result, truth, rtol=1e-5)


def test_fourier_frequencies_are_normal_of_scale_16(x64):
    """sin(2 pi t f) / (2 pi t) is f for small t."""
    n, t = 4_000, 1e-6
    features = jax.jit(unet.fourier_features, static_argnums=1)(t, n)
    sines, cosines = np.split(np.asarray(features), 2)
    np.testing.assert_allclose(sines**2 + cosines**2, 1, rtol=1e-12)
    f = np.arcsin(sines) / (2 * np.pi * t)
    assert abs(f.mean()) < 4 * 16 / np.sqrt(n)
    assert abs(f.std() - 16) < 4 * 16 / np.sqrt(2 * n)


def test_time_scale_multiplies_the_time(small):
    params, answer = small
    scaled = jax.jit(functools.partial(apply, UNet(**SMALL, time_scale=999.0)))
    np.testing.assert_allclose(scaled(params, X, T / 999), answer, rtol=1e-3, atol=1e-4)
    assert np.max(np.abs(scaled(params, X, T) - answer)) > 1e-3


@pytest.mark.parametrize("variant, own", [("ddpm", "positional"), ("ncsn", "fourier")])
def test_the_time_embedding_is_that_of_the_variant_or_a_switch(variant, own):
    fields = dict(width=8, depth=1, multipliers=(1,), attention=(), variant=variant)
    params = filled(shapes(UNet(**fields), X.shape))
    answers = {
        kind: answered(UNet(**fields, time_embedding=kind), params, X, T)
        for kind in (None, "positional", "fourier")
    }
    np.testing.assert_array_equal(answers.pop(own), answers[None])
    for kind in answers.keys() - {None}:
        assert np.max(np.abs(answers[kind] - answers[None])) > 1e-3


# Parts.


def test_the_short_filter_is_a_mean_and_a_copy():
    x = np.random.default_rng(0).normal(size=(4, 6, 2)).astype(np.float32)
    blocks = x.reshape(2, 2, 3, 2, 2)
    down = resample(x, (1, 1), "down")
    np.testing.assert_allclose(down, blocks.mean((1, 3)), rtol=1e-5, atol=1e-6)
    copies = np.repeat(np.repeat(x, 2, 0), 2, 1)
    np.testing.assert_array_equal(resample(x, (1, 1), "up"), copies)
    assert unet.resample(x, (1, 1), "") is x


def test_the_long_filter_smooths():
    """(1, 3, 3, 1) / 8 on 8 i, zeros around it, and its transpose on 4 i."""
    line = np.broadcast_to(8 * np.arange(6, dtype=np.float32)[:, None, None], (6, 6, 1))
    inner = np.asarray(resample(line, (1, 3, 3, 1), "down"))[:, 1, 0]
    # (3 0 + 3 8 + 16) / 8; the mean of 2 and 3 times 8; (24 + 3 32 + 3 40) / 8
    np.testing.assert_allclose(inner, [5, 20, 30])
    line = np.broadcast_to(4 * np.arange(3, dtype=np.float32)[:, None, None], (3, 3, 1))
    inner = np.asarray(resample(line, (1, 3, 3, 1), "up"))[:, 2, 0]
    np.testing.assert_allclose(inner, [0, 1, 3, 5, 7, 6])


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1), (1, 5, 10, 10, 5, 1)])
def test_up_is_the_transpose_of_down(taps, x64):
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(8, 12, 2)), draw.normal(size=(4, 6, 2))
    down, up = (np.asarray(resample(*a)) for a in ((x, taps, "down"), (y, taps, "up")))
    assert (down.shape, up.shape) == (y.shape, x.shape)
    np.testing.assert_allclose(4 * np.sum(down * y), np.sum(x * up), rtol=1e-12)


def test_attention_is_softmax_of_scaled_products(key, x64):
    """(h + W_O softmax(Q K^T / sqrt(c)) V) / sqrt 2, by hand."""
    h = np.random.default_rng(0).normal(size=(2, 3, 8))
    layer = unet.Attention(dtype="float64")
    params = filled(jax.eval_shape(layer.init, key, h)["params"], 0.5)
    p = jax.tree.map(np.asarray, params)
    grouped = np.asarray(h).reshape(6, 2, 4)
    inner = grouped - grouped.mean((0, 2), keepdims=True)
    inner /= np.sqrt(grouped.var((0, 2), keepdims=True) + 1e-6)
    inner = inner.reshape(6, 8) * p["norm"]["scale"] + p["norm"]["bias"]
    q, k, v = np.split(inner @ p["qkv"]["kernel"] + p["qkv"]["bias"], 3, axis=1)
    weights = np.exp(q @ k.T / np.sqrt(8))
    weights /= weights.sum(1, keepdims=True)
    added = weights @ v @ p["out"]["kernel"] + p["out"]["bias"]
    truth = (np.asarray(h) + added.reshape(2, 3, 8)) / np.sqrt(2)
    result = jax.jit(layer.apply)({"params": params}, h)
    np.testing.assert_allclose(result, truth, rtol=1e-5, atol=1e-5)


def test_attention_stands_where_it_is_asked_for_and_in_the_middle():
    """In each encoder block of a level, in its last decoder block, in the first middle
    one."""
    model = UNet(8, 2, (1, 1), attention=(8,))
    tree = shapes(model, X.shape)
    result = {name for name, block in tree.items() if "attention" in block}
    assert result == {"encoder_0_0", "encoder_0_1", "decoder_0_2", "middle_0"}


def test_dropout_is_noise_in_training_only(tiny):
    params, answer = tiny
    model = UNet(**TINY, dropout=0.5)
    np.testing.assert_array_equal(answered(model, params, X, T), answer)

    @jax.jit
    def noisy(key):
        return apply(model, params, X, T, train=True, rngs={"dropout": key})

    one, other = (np.asarray(noisy(jax.random.key(seed))) for seed in (0, 1))
    assert np.any(one != other) and np.any(one != answer)


def test_bfloat16_is_close_to_float32(tiny):
    params, answer = tiny
    result = answered(UNet(**TINY, dtype="bfloat16"), params, X, T)
    assert result.dtype == np.float32  # the loss is not computed in bfloat16
    error = np.linalg.norm(result - answer) / np.linalg.norm(answer)
    assert 0 < error < 0.05


@pytest.mark.slow
def test_gradients_of_examples_add_up_to_that_of_the_batch():
    model = UNet(width=4, depth=1, multipliers=(1,), attention=())
    xs, ts = jnp.asarray(np.stack([X, -2 * X])[:, :4, :4]), jnp.array([0.1, 2.0])
    params = filled(shapes(model, xs[0].shape))

    def loss(params, x, t):
        return jnp.sum(apply(model, params, x, t) ** 2)

    @jax.jit
    def both(params):
        each = jax.vmap(jax.grad(loss), (None, 0, 0))(params, xs, ts)
        batch = jax.grad(lambda p: sum(map(functools.partial(loss, p), xs, ts)))
        return each, batch(params)

    each, truth = both(params)
    for result, whole in zip(*map(jax.tree.leaves, (each, truth)), strict=True):
        np.testing.assert_allclose(
            result.sum(0), whole, rtol=1e-3, atol=1e-4 * jnp.max(jnp.abs(whole))
        )


# Refusals.


@pytest.mark.parametrize("label", [-1, 4, np.int32(7), jnp.int32(9)])
def test_a_label_beyond_the_table_is_refused(label):
    """A gather would clip it; one that is traced is for the caller to check."""
    with pytest.raises(ValueError, match=f"label={label} is beyond .* num_classes=3"):
        shapes(UNet(**SMALL, num_classes=3), X.shape, label)


def test_an_unconditional_unet_refuses_a_label():
    with pytest.raises(ValueError, match="set num_classes"):
        shapes(UNet(**SMALL), X.shape, 0)


@pytest.mark.parametrize(
    "fields, shape, words",
    [
        ({"skips": (True,) * 3}, (8, 8, 1), "has 3 flags and must have 4"),
        ({"skips": ()}, (8, 8, 1), "has 0 flags and must have 4"),
        ({"attention": (16,)}, (8, 8, 1), "no level has the side 16; they have 8, 4"),
        (
            {"width": 36, "multipliers": (1, 2)},
            (8, 8, 1),
            "width=36 .* 144 channels in 32 groups",
        ),
        ({"width": 6}, (8, 8, 1), "width=6 must be a multiple of 4"),
        ({"multipliers": ()}, (8, 8, 1), r"multipliers=\(\) is empty"),
        ({"multipliers": (1, 1, 1)}, (8, 6, 1), "4 must divide its sides, 8x6"),
        ({"variant": "adm"}, (8, 8, 1), "variant='adm' is not one of ddpm, ncsn"),
        (
            {"time_embedding": "sine"},
            (8, 8, 1),
            "time_embedding='sine' is not one of positional, fourier",
        ),
        ({}, (64,), r"images \[h, w, c\], not data of shape \(64,\)"),
    ],
)
def test_a_unet_that_does_not_fit_says_which_number(fields, shape, words):
    model = UNet(**SMALL | fields)
    with pytest.raises(ValueError, match=words):
        model.check(shape)
    with pytest.raises(ValueError, match=words):
        shapes(model, shape)


def test_all_that_is_wrong_is_said_at_once():
    model = UNet(8, 1, (1, 2), attention=(5,), variant="x", skips=(True,))
    with pytest.raises(ValueError) as error:
        model.check((8, 8, 1))
    assert len(str(error.value).splitlines()) == 3


def test_a_unet_has_no_gates():
    with pytest.raises(ValueError, match="no gates"):
        UNet(**SMALL).init(jax.random.key(0), X, T, gates=jnp.ones((1, 1)))


# An independent implementation.


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["ddpm", "ncsn"])
def test_forward_and_backward_are_those_of_pytorch(variant, x64):
    """float64, all weights copied over: the answer, and its gradients in all inputs."""
    torch = pytest.importorskip("torch", reason="of the extra dev")
    path = Path(__file__).parent.parent / "benchmarks" / "torch_nets.py"
    spec = importlib.util.spec_from_file_location("torch_nets", path)
    nets = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nets)
    fields = dict(
        width=16,
        depth=2,
        multipliers=(1, 2, 2),
        attention=(4,),
        variant=variant,
        num_classes=3,
        skips=(1, 0, 1, 1, 1, 0, 1, 1, 1),
    )
    model = UNet(**fields, dtype="float64")
    xs = jax.random.normal(jax.random.key(1), (3, 8, 8, 3))
    ts, labels = jnp.array([0.3, -0.7, 1.2]), jnp.array([0, 2, 1])
    params = filled(shapes(model, xs[0].shape), 0.3)
    params = jax.tree.map(lambda p: p.astype(np.float64), params)

    def loss(params, xs):
        result = jax.vmap(lambda *one: apply(model, params, *one))(xs, ts, labels)
        return jnp.sum(jnp.sin(result)), result

    backward = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (_, result), (slopes, x_slopes) = backward(params, xs)

    frequencies = np.random.default_rng(0).normal(0, 16, 16)
    if variant == "ddpm":
        frequencies = None
    net = nets.UNet(8, 3, frequencies=frequencies, **fields).double()
    nets.load(net, jax.tree.map(np.asarray, params))
    x_torch = nets.images(xs).requires_grad_()
    ts_torch = torch.tensor(ts.tolist(), dtype=torch.float64)
    truth = net(x_torch, ts_torch, torch.tensor(labels.tolist()))
    truth.sin().sum().backward()

    def close(one, other):
        one, other = np.asarray(one), np.asarray(other)
        assert np.max(np.abs(one - other)) < 1e-9 * np.max(np.abs(other))

    close(nets.images(result), truth.detach())
    close(nets.images(x_slopes), x_torch.grad)
    assert size(slopes) == sum(p.numel() for p in net.parameters())
    nets.load(net, jax.tree.map(np.asarray, slopes))
    for weight in net.parameters():  # now ours, beside their own gradient
        close(weight.detach(), weight.grad)
