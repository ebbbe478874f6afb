"""Sums over chunks are sums over all points, whatever the chunks are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import alike, drawn, posterior

from memsep_jax import data, streaming

N, A, V = 40, 0.8, 0.5
POINTS, X, SHARES = drawn(0, N, 3), drawn(1, 3), 1.0 + np.arange(N) % 4


def sums(points, log_weights, values):
    return streaming.chunk_sums(points, log_weights, X, A, V, values)


@pytest.mark.parametrize("size", [1, 7, 39, 40, 64])
def test_every_point_counts_once_in_chunks_of_any_size(size, x64):
    """The last chunk overlaps the one before it."""

    @jax.jit
    def total(points, log_weights):
        return streaming.over_chunks(
            points,
            streaming.floored(log_weights, N, points.dtype),
            size,
            lambda rows, prior: jnp.exp(prior) @ rows,
            jnp.add,
        )

    alike(total(POINTS, np.log(SHARES)), SHARES @ POINTS)
    alike(jax.jit(lambda points: total(points, None))(POINTS), POINTS.sum(0))


def test_merged_sums_are_those_of_all_points(x64):
    """With the likeliest point in either of them; of the points, or of other values."""
    log_weights = np.log(SHARES)

    @jax.jit
    def both(points, log_weights, values):
        halves = [
            sums(points[i], log_weights[i], values[i]) for i in (slice(9), slice(9, N))
        ]
        joined = streaming.merged(*halves, X, A, V)
        return streaming.mean(joined), streaming.mean(sums(points, log_weights, None))

    for order in (np.arange(N), np.arange(N)[::-1]):
        points, values = POINTS[order], np.cos(POINTS[order][:, :2])
        weights, truth, *_ = posterior(points, SHARES[order], A, V, X)
        mean, of_points = both(points, log_weights[order], values)
        alike(of_points, truth)
        alike(mean, weights @ values)


def test_a_mean_over_no_points_is_not_a_number(x64):
    never = streaming.floored(jnp.full(N, -jnp.inf), N, float)
    assert np.isnan(
        jax.jit(lambda w: streaming.mean(sums(jnp.asarray(POINTS), w, None)))(never)
    ).all()


def test_pixels_are_floats_as_the_data_room_has_them():
    pixels = np.arange(256, dtype=np.uint8)
    floats = streaming.floats(pixels, jnp.float32)
    np.testing.assert_allclose(floats, data.from_uint8(pixels), atol=2**-23)


@pytest.mark.parametrize(
    "check, message",
    [
        (lambda: streaming.check_data(POINTS[:0], 1), "n=0"),
        (lambda: streaming.check_data(POINTS, 0), "chunks of 0"),
        (lambda: streaming.check_data(POINTS, 1, SHARES[:2]), r"\(2,\) for n=40"),
        (lambda: streaming.check_data(POINTS, 1, temperature=0.0), "temperature=0.0"),
        (lambda: streaming.check_query(POINTS, POINTS, 1.0), "jax.vmap"),
        (lambda: streaming.check_query(POINTS, X, 0.0), "t=0.0 must be positive"),
    ],
)
def test_what_has_no_sums_is_refused(check, message):
    with pytest.raises(ValueError, match=message):
        check()


@pytest.mark.parametrize("m", [1, 40, 1_023, 1_024, 1_279, 2_000])
@pytest.mark.parametrize("law", ["normal", "ties", "left out"])
def test_the_likeliest_are_those_of_a_sort(m, law):
    """Also with ties, and where the last row of lanes is not full."""
    rng = np.random.default_rng(m)
    logits = rng.normal(size=(5, m)).astype(np.float32)
    if law == "ties":
        logits = np.round(2 * logits)
    if law == "left out":
        logits[:, rng.random(m) < 0.99] = streaming.NEVER
    count = min(16, m)
    places = jax.jit(jax.vmap(lambda row: streaming._likeliest(row, count)))(logits)
    found = np.take_along_axis(logits, np.asarray(places), axis=1)
    np.testing.assert_array_equal(found, -np.sort(-logits, axis=1)[:, :count])
    assert all(len(set(row)) == count for row in np.asarray(places).tolist())
