"""The search finds the nearest distinct points, however it is cut."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memsep_jax import data as images
from memsep_jax import neighbours
from memsep_jax.data import Rows

RNG = np.random.default_rng(0)
FEW = settings(deadline=None, max_examples=8)


def brute(samples, data, k=2):
    """The k nearest distinct points in float64 NumPy, lowest index on ties."""
    samples, data = np.asarray(samples, np.float64), np.asarray(data, np.float64)
    first = np.sort(
        np.unique(data.reshape(len(data), -1), axis=0, return_index=True)[1]
    )
    points = data[first]
    axes = tuple(range(2, data.ndim + 1))
    distances = np.sqrt(((samples[:, None] - points[None]) ** 2).sum(axes))
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distances, order, 1), first[order]


def grid_points(seed, n, d=2, side=4):
    """Small integers: many duplicates and ties, and no rounding at all."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, side, (n, d)).astype(np.float32)


@FEW
@given(
    seed=st.integers(0, 10**6),
    part=st.sampled_from([1, 24, 100, 10**6]),
    chunk=st.sampled_from([4, 100]),
    dtype=st.sampled_from([np.float32, np.uint8]),
)
def test_points_on_disk_are_searched_part_by_part(seed, part, chunk, dtype):
    """One part, some, or a part for every k points: always the same answer."""
    data, samples = grid_points(seed, 60, 3), grid_points(seed + 1, 9, 3)
    data, samples = data.astype(dtype), samples.astype(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "PART", part)
        search = neighbours.searcher(Rows(data), 3, chunk)
    result, whole = search(samples), neighbours.nearest(samples, data, 3)
    np.testing.assert_array_equal(result.indices, whole.indices)
    np.testing.assert_array_equal(result.distances, whole.distances)


def test_minus_zero_is_zero():
    data = np.array([[0.0, 1.0], [-0.0, 1.0], [1.0, 1.0]], np.float32)
    np.testing.assert_array_equal(neighbours.distinct(data), [0, 2])


@FEW
@given(
    seed=st.integers(0, 10**6),
    chunk=st.sampled_from([1, 4, 9, 100]),
    block=st.sampled_from([1, 21, 40, 1_000]),
)
def test_chunks_and_blocks_leave_no_trace(seed, chunk, block):
    """On small integers float32 is exact, so every tie and duplicate is seen."""
    data, samples = grid_points(seed, 60, 3), grid_points(seed + 1, 9, 3)
    result = neighbours.searcher(data, 3, chunk, block)(samples)
    distances, indices = brute(samples, data, 3)
    np.testing.assert_array_equal(result.indices, indices)
    np.testing.assert_allclose(result.distances, distances, rtol=1e-6)


@pytest.mark.parametrize("n, k", [(2, 2), (17, 1), (17, 17), (3_000, 50)])
def test_the_search_agrees_with_brute_force(n, k):
    rng = np.random.default_rng(n)
    data, samples = rng.normal(size=(n, 4, 4, 1)), rng.normal(size=(30, 4, 4, 1))
    result = neighbours.searcher(data.astype(np.float32), k, 16, 512)(samples)
    distances, indices = brute(samples, data.astype(np.float32), k)
    np.testing.assert_allclose(result.distances, distances, rtol=1e-5)
    assert (result.indices == indices).mean() > 0.999  # float32 may swap near-ties


@pytest.mark.parametrize("k", [3, 60])
def test_more_ties_than_contenders_go_to_the_lowest_indices(k):
    """All unit vectors are as far from 0; where they lie must not matter."""
    zero, data = np.zeros((3, 70)), np.eye(70, dtype=np.float32)
    result = neighbours.searcher(data, k, block=16)(zero)
    np.testing.assert_array_equal(result.indices, np.tile(np.arange(k), (3, 1)))
    np.testing.assert_array_equal(result.distances, 1)


@pytest.mark.parametrize("offset", [0, 1e3])
def test_a_crowd_of_near_duplicates_is_told_apart(offset):
    """Far from the centre, where the product's rounding is larger than their gaps."""
    rng = np.random.default_rng(2)
    crowd = 300 + 1e-3 * rng.normal(size=(200, 8))
    data = np.concatenate([crowd, rng.normal(size=(100, 8))]) + offset
    data = data[rng.permutation(300)].astype(np.float32)
    rows = np.flatnonzero(data[:, 0] > offset + 200)[::5]
    result = neighbours.nearest(data[rows], data)
    distances, indices = brute(data[rows], data)
    np.testing.assert_array_equal(result.indices, indices)
    np.testing.assert_array_equal(result.distances[:, 0], 0)
    np.testing.assert_allclose(result.distances, distances, rtol=1e-5)


@pytest.mark.parametrize("d", [1, 30, 3_000, 50_000])
@pytest.mark.parametrize("gap", [0, 1e-3, 1])
def test_the_bound_is_below_the_square_whatever_rounds(d, gap):
    """Of equal signs, where sums round the same way, in any order of summing."""
    rng = np.random.default_rng(d)
    x = rng.uniform(1, 2, (50, d)).astype(np.float32)
    y = (x + gap * rng.normal(size=x.shape)).astype(np.float32)
    shrink = neighbours._shrink(d)
    exact = np.sum((x.astype(float) - y) ** 2, axis=1)

    def one_by_one(a):
        zero = jnp.zeros(len(a), jnp.float32)
        return jax.lax.scan(lambda total, x: (total + x, None), zero, a.T)[0]

    for order in (one_by_one, lambda a: a.sum(axis=1)):
        total = functools.partial(neighbours._summed, order)
        bound = shrink * total(x * x) + shrink * total(y * y) - 2 * total(x * y)
        assert (bound <= exact).all()
        terms = min(d, 5_000) + 8
        slack = 5 * terms * np.finfo(np.float32).eps * (total(x * x) + total(y * y))
        assert (bound >= exact - slack).all()


# Pixels, devices, memory.


def pixels(seed, n):
    return np.random.default_rng(seed).integers(0, 256, (n, 4, 4, 3), np.uint8)


def test_pixels_have_the_neighbours_of_their_floats():
    data, samples = pixels(0, 150), pixels(1, 20)
    data[100], samples[3] = data[7], data[100]
    result = neighbours.nearest(samples, data, k=5)
    floats = images.from_uint8(samples), images.from_uint8(data)
    np.testing.assert_array_equal(
        result.indices, neighbours.nearest(*floats, 5).indices
    )
    np.testing.assert_allclose(result.distances, brute(*floats, 5)[0], rtol=1e-6)
    assert result.indices[3, 0] == 7 and result.distances[3, 0] == 0


@pytest.mark.parametrize("n, k", [(3, 3), (101, 30)])
def test_devices_leave_no_trace(n, k):
    """Also where shares are smaller than k, and devices more than points."""
    data, samples = pixels(2, n), pixels(3, 9)
    result = [
        neighbours.searcher(data, k, 4, 16, jax.devices()[:count])(samples)
        for count in (1, 2, 4)
    ]
    distances, indices = brute(samples, data, k)
    for one in result:
        np.testing.assert_array_equal(one.indices, indices)
        np.testing.assert_allclose(one.distances, distances / 127.5, rtol=1e-6)


def test_memory_beyond_the_data_does_not_grow_with_them():
    mesh = jax.make_mesh((1,), ("data",))

    def temporary(n):
        data, samples = pixels(4, n).reshape(n, -1), pixels(5, 64).reshape(64, -1)
        shares = neighbours._shares(data, mesh)
        assert shares.dtype == np.uint8
        sizes = neighbours._search.lower(
            shares, np.zeros(48, np.float32), samples, n, 2, 128, mesh, every=False
        )
        return sizes.compile().memory_analysis().temp_size_in_bytes

    assert temporary(8_000) < temporary(500) + 8_000


def test_no_samples_have_no_neighbours():
    result = neighbours.nearest(np.zeros((0, 2)), np.eye(2))
    assert result.distances.shape == result.indices.shape == (0, 2)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda x: neighbours.nearest(x, x, k=5), "k=5 .* 4 distinct"),
        (lambda x: neighbours.nearest(x, x, k=0), "k=0"),
        (lambda x: neighbours.nearest(x, x, chunk=0), "chunk=0"),
        (lambda x: neighbours.nearest(x[:, :1], x), r"\(1,\) against .* \(2,\)"),
        (lambda x: neighbours.nearest(x, x.astype(np.uint8)), "float32 .* uint8"),
        (lambda x: neighbours.nearest(x.astype(np.uint8), x), "uint8 .* float32"),
    ],
)
def test_what_has_no_answer_is_refused_with_its_numbers(call, words):
    with pytest.raises(ValueError, match=words):
        call(np.arange(8, dtype=np.float32).reshape(4, 2))
