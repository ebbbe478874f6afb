"""Networks of other projects answer here as they do in PyTorch; files keep all bits."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memsep_jax import process, score, weights
from memsep_jax.models import DiT, UNet
from memsep_jax.weights import WeightsError

pytestmark = pytest.mark.dev  # most of it needs torch


class Drawn(dict):
    """Tensors of PyTorch by name, drawn when first asked for, of these shapes."""

    def __init__(self, scale=0.2):
        super().__init__()
        self.draw, self.scale = np.random.default_rng(0), scale

    def __call__(self, name, *shape, scale=None):
        torch = pytest.importorskip("torch", reason="of the extra dev")
        if name not in self:
            drawn = (scale or self.scale) * self.draw.normal(size=shape)
            self[name] = torch.tensor(drawn.astype(np.float32)).double()
        return self[name]

    def linear(self, name, x, n, bias=True):
        y = x @ self(f"{name}.weight", n, x.shape[-1]).T
        return y + self(f"{name}.bias", n) if bias else y

    def arrays(self):
        return {name: a.float().numpy() for name, a in self.items()}


def torch_dit(w, x, k, label, width=16, heads=2, depth=2, patch=2, classes=3, twice=2):
    """The DiT of the release: x [b, c, h, w], k [b], label [b] -> [b, c, h, w]."""
    torch = pytest.importorskip("torch", reason="of the extra dev")
    F = torch.nn.functional
    (b, c), rows = x.shape[:2], x.shape[2] // patch

    def modulated(h, shift, scale):
        h = F.layer_norm(h, (width,), eps=1e-6)
        return h * (1 + scale[:, None]) + shift[:, None]

    kernel = w("x_embedder.proj.weight", width, c, patch, patch)
    h = F.conv2d(x, kernel, w("x_embedder.proj.bias", width), stride=patch)
    h = h.flatten(2).transpose(1, 2)  # tokens row by row
    angles = np.arange(rows)[:, None] / 10_000 ** (np.arange(width // 4) / (width / 4))
    sides = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    # The column goes first. They are made in float64 and kept in float32.
    tokens = [[[*sides[j], *sides[i]] for j in range(rows)] for i in range(rows)]
    w["pos_embed"] = torch.tensor(tokens).float().double().reshape(1, -1, width)
    h = h + w["pos_embed"]
    angles = k[:, None] * torch.exp(-np.log(10_000) * torch.arange(128).double() / 128)
    e = torch.cat([angles.cos(), angles.sin()], dim=1)
    e = w.linear(
        "t_embedder.mlp.2", F.silu(w.linear("t_embedder.mlp.0", e, width)), width
    )
    e = F.silu(e + w("y_embedder.embedding_table.weight", classes + 1, width)[label])
    for i in range(depth):
        name = f"blocks.{i}"
        parts = w.linear(f"{name}.adaLN_modulation.1", e, 6 * width).chunk(6, dim=1)
        inner = modulated(h, *parts[:2])
        qkv = w.linear(f"{name}.attn.qkv", inner, 3 * width)
        q, key, v = qkv.reshape(b, -1, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        inner = F.scaled_dot_product_attention(q, key, v).transpose(1, 2).flatten(2)
        h = h + parts[2][:, None] * w.linear(f"{name}.attn.proj", inner, width)
        inner = w.linear(f"{name}.mlp.fc1", modulated(h, *parts[3:5]), 24)
        inner = F.gelu(inner, approximate="tanh")
        h = h + parts[5][:, None] * w.linear(f"{name}.mlp.fc2", inner, width)
    parts = w.linear("final_layer.adaLN_modulation.1", e, 2 * width).chunk(2, dim=1)
    h = w.linear("final_layer.linear", modulated(h, *parts), patch**2 * twice * c)
    h = h.reshape(b, rows, rows, patch, patch, twice * c).permute(0, 5, 1, 3, 2, 4)
    return h.reshape(b, twice * c, *x.shape[2:])[:, :c]  # the noise, not the variance


def torch_edm(
    w,
    x,
    noise,
    one_hot=None,
    ncsn=False,
    width=8,
    depth=1,
    multipliers=(1,),
    attention=(4,),
):
    """The SongUNet of EDM: x [b, c, h, w], noise [b], one_hot [b, classes] -> as x."""
    torch = pytest.importorskip("torch", reason="of the extra dev")
    F = torch.nn.functional
    taps = torch.tensor([1.0, 3, 3, 1] if ncsn else [1.0, 1]).double()

    def filtered(name, x, change, pad):
        kernel = torch.outer(taps, taps)[None, None] / taps.sum() ** 2
        w[f"{name}.resample_filter"] = kernel
        kernel = kernel.expand(x.shape[1], 1, -1, -1)
        if change == "up":
            return 4 * F.conv_transpose2d(
                x, kernel, stride=2, groups=x.shape[1], padding=pad
            )
        return F.conv2d(x, kernel, stride=2, groups=x.shape[1], padding=pad)

    def conv(name, x, n, size=3, change=""):
        if change:
            x = filtered(name, x, change, (len(taps) - 1) // 2)
        kernel = w(f"{name}.weight", n, x.shape[1], size, size)
        return F.conv2d(x, kernel, w(f"{name}.bias", n), padding=size // 2)

    def norm(name, x):
        n = x.shape[1]
        scale, bias = w(f"{name}.weight", n), w(f"{name}.bias", n)
        return F.group_norm(x, min(32, n // 4), scale, bias, eps=1e-6)

    def block(name, x, n, change="", attend=False):
        h = conv(f"{name}.conv0", F.silu(norm(f"{name}.norm0", x)), n, 3, change)
        h = h + w.linear(f"{name}.affine", e, n)[:, :, None, None]
        h = conv(f"{name}.conv1", F.silu(norm(f"{name}.norm1", h)), n)
        if change or x.shape[1] != n:
            x = conv(f"{name}.skip", x, n, 1, change)
        x = (h + x) * np.sqrt(0.5)
        if attend:
            qkv = conv(f"{name}.qkv", norm(f"{name}.norm2", x), 3 * n, 1)
            q, k, v = qkv.reshape(len(x), n, 3, -1).unbind(2)  # [b, c, pixels]
            mix = torch.softmax(torch.einsum("bcq,bck->bqk", q, k) / np.sqrt(n), dim=2)
            mixed = torch.einsum("bqk,bck->bcq", mix, v).reshape(x.shape)
            x = (x + conv(f"{name}.proj", mixed, n, 1)) * np.sqrt(0.5)
        return x

    features = 2 * width if ncsn else width
    if ncsn:
        angles = 2 * np.pi * w("model.map_noise.freqs", features // 2, scale=16)
    else:
        steps = torch.arange(features // 2).double() / (features // 2 - 1)
        angles = 1e-4**steps
    angles = noise[:, None] * angles
    e = torch.cat([angles.sin(), angles.cos()], dim=1)  # cos, sin, then swapped
    if one_hot is not None:
        root = np.sqrt(one_hot.shape[1])
        e = e + w.linear("model.map_label", root * one_hot, features)
        w("model.map_augment.weight", features, 9)  # of labels that are absent here
    e = F.silu(w.linear("model.map_layer0", e, 4 * width))
    e = F.silu(w.linear("model.map_layer1", e, 4 * width))

    levels = [(x.shape[2] >> i, m * width) for i, m in enumerate(multipliers)]
    h, image, skips = x, x, []
    for i, (side, n) in enumerate(levels):
        name = f"model.enc.{side}x{side}"
        h = block(f"{name}_down", h, h.shape[1], "down") if i else conv(
            f"{name}_conv", h, width
        )  # fmt: skip
        if i and ncsn:
            wide = f"{name}_aux_residual"
            kernel = w(f"{wide}.weight", h.shape[1], image.shape[1], 3, 3)
            image = filtered(wide, F.conv2d(image, kernel, padding=2), "down", 0)
            image = image + w(f"{wide}.bias", h.shape[1])[:, None, None]
            h = image = (h + image) / np.sqrt(2)
        skips.append(h)
        for j in range(depth):
            h = block(f"{name}_block{j}", h, n, "", side in attention)
            skips.append(h)
    for i, (side, n) in reversed(list(enumerate(levels))):
        name = f"model.dec.{side}x{side}"
        if i == len(levels) - 1:
            h = block(f"{name}_in0", h, n, attend=True)
            h = block(f"{name}_in1", h, n)
        else:
            h = block(f"{name}_up", h, h.shape[1], "up")
        for j in range(depth + 1):
            h = torch.cat([h, skips.pop()], dim=1)
            h = block(f"{name}_block{j}", h, n, "", j == depth and side in attention)
    return conv(f"{name}_aux_conv", F.silu(norm(f"{name}_aux_norm", h)), x.shape[1])


def in_float64(model, params):
    wide = jax.tree.map(lambda p: p.astype(jnp.float64), params)
    return partial(model.clone(dtype="float64").apply, {"params": wide})


def count(tree):
    return sum(a.size for a in jax.tree.leaves(tree))


def close(found, truth, tolerance=1e-9):
    """[b, h, w, c] of ours, [b, c, h, w] of theirs: to rounding in float64."""
    found, truth = np.moveaxis(np.asarray(found), 3, 1), truth.numpy()
    assert found.shape == truth.shape
    assert np.max(np.abs(found - truth)) < tolerance * np.max(np.abs(truth))


X = np.random.default_rng(1).normal(size=(3, 8, 8, 2))


def test_a_dit_of_the_release_answers_as_in_pytorch(x64):
    """At steps 0 .. 999 of it, which are times k / 1000 here, for labels and none."""
    torch = pytest.importorskip("torch", reason="of the extra dev")
    w, steps, labels = Drawn(), np.array([0.0, 500, 999]), np.array([0, 3, 2])
    images, k = torch.tensor(X).permute(0, 3, 1, 2), torch.tensor(steps)
    truth = torch_dit(w, images, k, torch.tensor(labels))
    model, params = weights.dit(w.arrays(), num_heads=2)
    assert model == DiT(2, 16, 2, 2, num_classes=3, mlp_ratio=1.5)
    variance = 2**2 * 2 * (16 + 1)
    theirs = sum(a.numel() for a in w.values())
    assert count(params) == theirs - variance - w["pos_embed"].numel()
    network = jax.jit(jax.vmap(in_float64(model, params)))
    # `jax.nn.dot_product_attention` has a softmax in float32.
    close(network(X, steps / 1_000, labels), truth, 1e-6)


EDM = dict(width=8, attention=(8,))


@pytest.mark.parametrize(
    "name, model",
    [
        ("edm", UNet(**EDM, depth=1, multipliers=(1,), num_classes=3)),
        pytest.param(
            "vp",
            UNet(**EDM, depth=2, multipliers=(1, 2), num_classes=3, time_scale=999),
            marks=pytest.mark.slow,
        ),
        ("ve", UNet(**EDM, depth=1, multipliers=(1, 2), variant="ncsn")),
    ],
)
def test_a_network_of_edm_denoises_as_in_pytorch(name, model, x64):
    """By each of its preconditionings; with labels, and zeros where there is none."""
    torch = pytest.importorskip("torch", reason="of the extra dev")
    s, labels = torch.tensor([0.02, 1.5, 40.0]).double(), np.array([0, 3, 2])
    root = (s**2 + (0.25 if name == "edm" else 1)).sqrt()
    skip, out, scale, noise = {  # Karras 2022, table 1
        "edm": (0.25 / root**2, 0.5 * s / root, 1 / root, s.log() / 4),
        "vp": (
            s**0,
            -s,
            1 / root,
            999 * ((0.01 + 79.6 * root.log()) ** 0.5 - 0.1) / 19.9,
        ),
        "ve": (s**0, s, s**0, (s / 2).log()),
    }[name]
    skip, out, scale = (a[:, None, None, None] for a in (skip, out, scale))
    w, images = Drawn(), torch.tensor(X).permute(0, 3, 1, 2)
    ncsn, classes = model.variant == "ncsn", model.num_classes
    answer = torch_edm(
        w,
        scale * images,
        noise,
        torch.tensor(np.eye(4)[labels, :3]) if classes else None,
        ncsn,
        model.width,
        model.depth,
        model.multipliers,
        model.attention,
    )

    found, params = weights.edm(w.arrays(), time_scale=model.time_scale)
    fields = dict(time_embedding="positional")
    if ncsn:
        frequencies = tuple(w["model.map_noise.freqs"].tolist())
        fields = dict(time_embedding="fourier", frequencies=frequencies)
    assert found == model.clone(**fields)
    dropped = ("resample_filter", "map_noise.freqs", "map_augment.weight")
    kept = [a.numel() for name, a in w.items() if not name.endswith(dropped)]
    assert count(params) == sum(kept)

    levels, network = process.variance_exploding(), in_float64(found, params)

    def denoised(x, t, label):
        score_fn = score.from_network(
            partial(network, label=label) if classes else network,
            score.PREDICTIONS[name](levels),
            levels,
        )
        return score.to_denoiser(score_fn, levels)(x, t)

    close(
        jax.jit(jax.vmap(denoised))(X, s.numpy(), labels), skip * images + out * answer
    )


def drawn(model):
    init = partial(model.init, x=jnp.zeros((4, 4, 1)), t=jnp.float32(1))
    like, draw = jax.eval_shape(init, jax.random.key(0)), np.random.default_rng(0)
    return model, jax.tree.map(
        lambda p: draw.normal(size=p.shape).astype(p.dtype), like["params"]
    )


@pytest.fixture(scope="module")
def dit():
    return drawn(DiT(2, 16, 1, 2, num_classes=3))


def assert_same(found, params):
    assert jax.tree.structure(found) == jax.tree.structure(params)
    for one, other in zip(*map(jax.tree.leaves, (found, params)), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def test_a_file_keeps_all_bits_of_a_network(dit, tmp_path):
    _, params = dit
    weights.write(tmp_path / "w", weights.from_params(params), {"step": "3"})
    tensors, metadata = weights.read(tmp_path / "w")
    assert metadata == {"step": "3"}
    assert_same(weights.to_params(tensors, params), params)


def test_a_dit_goes_to_the_names_of_the_release_and_back(dit):
    model, params = dit
    tensors = weights.to_dit(model, params, side=4)
    for prefix in ("", "module."):  # as PyTorch names what it trains in parallel
        named = {f"{prefix}{name}": a for name, a in tensors.items()}
        again, found = weights.dit(named, num_heads=2)
        assert again == model
        assert_same(found, params)


def test_the_names_in_a_file_are_the_paths_of_the_leaves():
    params = {"block_0": {"attention": {"query": {"kernel": jnp.ones((2, 1, 2))}}}}
    assert list(weights.from_params(params)) == ["block_0.attention.query.kernel"]


def test_views_numbers_and_bfloat16_are_written_as_they_are(tmp_path):
    a = np.arange(6.0).reshape(2, 3)
    given = {"t": a.T, "s": np.float32(3), "b": jnp.bfloat16(1 / 3), "e": a[:0]}
    weights.write(tmp_path / "new" / "w", given)
    found, metadata = weights.read(tmp_path / "new" / "w")
    assert metadata == {}
    np.testing.assert_array_equal(found["t"], a.T)
    assert found["e"].shape == (0, 3) and found["s"].shape == ()
    assert found["b"] == np.float32(0.333984375) and found["b"].dtype == np.float32


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda w: w.pop("blocks.0.attn.proj.bias"), r"missing: blocks.0.attn.proj.b"),
        (lambda w: w.pop("x_embedder.proj.weight"), "0 of 21 tensors are named x_emb"),
        (lambda w: w.pop("blocks.0.mlp.fc1.weight"), "no blocks.0.mlp.fc1.weight of 2"),
        (lambda w: w.update(extra=np.ones(2)), r"unexpected: extra \[2\]"),
        (
            lambda w: w.update({"blocks.0.mlp.fc2.bias": np.ones(7)}),
            r"mismatched: blocks.0.mlp.fc2.bias \[7\], not \[16\]",
        ),
        (
            lambda w: w.update({"blocks.0.mlp.fc2.bias": np.ones(16, np.int8)}),
            r"mismatched: blocks.0.mlp.fc2.bias int8\[16\], not \[16\]",
        ),
        (lambda w: w.update(pos_embed=w["pos_embed"] + 0.1), "not the fixed sin-cos"),
        (lambda w: w.update(pos_embed=w["pos_embed"][:, 1:]), "of a square image"),
    ],
)
def test_what_is_not_a_dit_of_the_release_says_why(change, words, dit):
    w = weights.to_dit(*dit, side=4)
    change(w)
    with pytest.raises(WeightsError, match=words):
        weights.dit(w, num_heads=2)


def test_the_number_of_heads_is_that_of_the_release_or_given(dit):
    small = drawn(DiT(2, 384, 1, 6, mlp_ratio=0.1))
    assert weights.dit(weights.to_dit(*small, side=4))[0].num_heads == 6
    w = weights.to_dit(*dit, side=4)
    with pytest.raises(WeightsError, match="width 16: give num_heads"):
        weights.dit(w)
    with pytest.raises(WeightsError, match="num_heads=3 must divide"):
        weights.dit(w, num_heads=3)


def test_a_compact_dit_has_no_place_in_the_release(dit):
    model, params = dit
    block = params["block_0"]
    block = block | {"mlp_in": block["mlp_in"] | {"bias": np.ones(5, np.float32)}}
    params = params | {"block_0": block}
    with pytest.raises(WeightsError, match=r"mlp_in.bias \[5\], not \[64\]"):
        weights.to_dit(model, params, side=4)


def test_what_is_not_a_network_of_edm_says_why():
    w = {"model.map_layer0.weight": np.ones((4, 4))}
    with pytest.raises(WeightsError, match="no tensor is named enc.32x32_"):
        weights.edm(w)


@pytest.fixture(scope="module")
def edm_weights():
    torch = pytest.importorskip("torch", reason="of the extra dev")
    w, x = Drawn(), torch.ones(1, 1, 4, 4).double()
    torch_edm(w, x, x[0, 0, 0, :1])
    return w.arrays()


@pytest.mark.parametrize(
    "name, change, words",
    [
        ("dec.4x4_aux_norm.bias", None, "missing: dec.4x4_aux_norm.bias"),
        ("out_norm.bias", np.ones(8), r"unexpected: out_norm.bias \[8\]"),
        ("enc.4x4_block0.qkv.bias", np.ones(8), r"\[8\], not \[24\]"),
        ("enc.4x4_conv.weight", np.ones((6, 1, 3, 3)), "width=6 must be a multiple"),
        ("dec.4x4_up.conv0.resample_filter", np.ones((1, 1, 2, 2)), "variant ddpm"),
    ],
)
def test_what_an_edm_network_lacks_or_has_too_much_is_named(
    name, change, words, edm_weights
):
    w = edm_weights | {f"model.{name}": change}
    if change is None:
        del w[f"model.{name}"]
    with pytest.raises(WeightsError, match=words):
        weights.edm(w)
