"""LPIPS is that of its authors, and a plain squared distance of embeddings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memsep_jax.models import alexnet


@pytest.fixture(scope="module")
def params():
    rng, result = np.random.default_rng(0), {}
    for name, shape in alexnet.shapes().items():
        scale = 1 if len(shape) == 1 else np.sqrt(2 / np.prod(shape[:-1]))
        a = scale * rng.normal(size=shape)
        result[name] = np.abs(a) if "NetLin" in name else a
    return alexnet.params_of(result)


def images(h, w, count=2):
    return np.random.default_rng(1).uniform(-1, 1, (count, h, w, 3))


def lpips(torch, params, x, y):
    """As Zhang 2018 compute it, layer by layer."""
    function = torch.nn.functional

    def maps(x):
        shift, scale = torch.tensor(alexnet.SHIFT), torch.tensor(alexnet.SCALE)
        h = ((torch.tensor(x) - shift) / scale).permute(2, 0, 1)[None]
        for i, (stride, pad) in enumerate([(4, 2), (1, 2), (1, 1), (1, 1), (1, 1)]):
            if i in (1, 2):
                h = function.max_pool2d(h, 3, 2)
            kernel, bias = (
                torch.tensor(np.float64(params[f"AlexNet_0/Conv_{i}/{leaf}"]))
                for leaf in ("kernel", "bias")
            )
            kernel = kernel.permute(3, 2, 0, 1)
            h = function.relu(function.conv2d(h, kernel, bias, stride, pad))
            yield h

    total = 0
    for i, (a, b) in enumerate(zip(maps(x), maps(y), strict=True)):
        a, b = (h / (torch.linalg.norm(h, dim=1, keepdim=True) + 1e-10) for h in (a, b))
        head = torch.tensor(np.float64(params[f"NetLinLayer_{i}/Conv_0/kernel"]))
        head = head.permute(3, 2, 0, 1)
        total += function.conv2d((a - b) ** 2, head).mean()
    return total.item()


@pytest.mark.parametrize(
    "shape", [(31, 31), pytest.param((64, 40), marks=pytest.mark.slow)]
)
@pytest.mark.dev
def test_the_distance_is_lpips(shape, params, x64):
    torch = pytest.importorskip("torch", reason="of the extra dev")
    x, y = images(*shape)
    truth = lpips(torch, params, x, y)
    assert truth > 0.1
    wide = {name: np.float64(a) for name, a in params.items()}
    result = jax.jit(alexnet.distance)(wide, x, y)
    np.testing.assert_allclose(result, truth, rtol=1e-9)
    points = [jax.jit(alexnet.embedding)(wide, image) for image in (x, y)]
    np.testing.assert_allclose(jnp.sum((points[0] - points[1]) ** 2), truth, rtol=1e-9)


def test_points_are_as_far_apart_as_images_look(
    params,
):
    x, y = images(32, 32).astype(np.float32)
    near = np.clip(x + np.float32(0.05), -1, 1)
    embed = jax.jit(alexnet.embedding)
    points = np.stack([embed(params, image) for image in (x, near, y)])
    assert points.shape == (3, 7 * 7 * 64 + 3 * 3 * 192 + 384 + 256 + 256)
    squares = np.sum((points - points[0]) ** 2, axis=1)
    assert 0 == squares[0] < squares[1] < squares[2]


def test_every_map_is_there_and_pooling_takes_any_size(params):
    result = jax.eval_shape(alexnet.maps, params, jnp.zeros((64, 64, 3)))
    assert [a.shape for a in result] == [
        (15, 15, 64),
        (7, 7, 192),
        (3, 3, 384),
        (3, 3, 256),
        (3, 3, 256),
    ]
    for side in (8, 64, 200):
        x = jnp.zeros((side, side + 1, 3))
        assert jax.eval_shape(alexnet.pooled, params, x).shape == (256,)


@pytest.mark.parametrize("shape", [(30, 64, 3), (64, 30, 3), (64, 64, 1), (64, 64)])
def test_images_that_leave_nothing_to_the_last_map_are_refused(shape, params):
    with pytest.raises(ValueError, match="31 pixels a side"):
        alexnet.maps(params, jnp.zeros(shape))


def test_all_that_does_not_fit_is_listed(params):
    odd = dict(params) | {"more": np.zeros(2)}
    del odd["AlexNet_0/Conv_3/bias"]
    odd["AlexNet_0/Conv_0/bias"] = np.zeros(63)
    with pytest.raises(ValueError) as caught:
        alexnet.params_of(odd)
    assert str(caught.value).splitlines() == [
        "mismatched: AlexNet_0/Conv_0/bias (63,), not (64,)",
        "missing: AlexNet_0/Conv_3/bias (256,)",
        "unexpected: more (2,)",
    ]
    head = "NetLinLayer_2/Conv_0/kernel"
    with pytest.raises(ValueError, match=head):
        alexnet.params_of(dict(params) | {head: -params[head]})
