"""The search finds the nearest distinct points, however it is cut."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memsep_jax import neighbours

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


def test_ties_go_to_the_lowest_index():
    data = np.array([[2.0], [0.0], [1.0], [0.0], [2.0]], np.float32)
    found = neighbours.nearest(np.array([[1.0], [0.5], [0.0]]), data, k=3)
    np.testing.assert_array_equal(found.indices, [[2, 0, 1], [1, 2, 0], [1, 2, 0]])


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
    found = neighbours.searcher(data, 3, chunk, block)(samples)
    distances, indices = brute(samples, data, 3)
    np.testing.assert_array_equal(found.indices[:, 0], indices[:, 0])
    np.testing.assert_allclose(found.distances, distances, rtol=1e-6)


@FEW
@given(seed=st.integers(0, 10**6))
def test_the_order_of_the_data_leaves_no_trace(seed):
    data, samples = RNG.normal(size=(50, 5)), RNG.normal(size=(8, 5))
    order = np.random.default_rng(seed).permutation(50)
    one = neighbours.nearest(samples, data)
    other = neighbours.nearest(samples, data[order])
    np.testing.assert_array_equal(one.indices, order[other.indices])
    np.testing.assert_allclose(one.distances, other.distances, rtol=1e-6)


@pytest.mark.parametrize("n, k", [(2, 2), (17, 1), (17, 17), (3_000, 50)])
def test_the_search_agrees_with_brute_force(n, k):
    rng = np.random.default_rng(n)
    data, samples = rng.normal(size=(n, 4, 4, 1)), rng.normal(size=(30, 4, 4, 1))
    found = neighbours.searcher(data.astype(np.float32), k, 16, 512)(samples)
    distances, indices = brute(samples, data.astype(np.float32), k)
    np.testing.assert_allclose(found.distances, distances, rtol=1e-5)
    assert (found.indices == indices).mean() > 0.999  # float32 may swap near-ties


def test_no_samples_have_no_neighbours():
    found = neighbours.nearest(np.zeros((0, 2)), np.eye(2))
    assert found.distances.shape == found.indices.shape == (0, 2)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda x: neighbours.nearest(x, x, k=5), "k=5 .* 4 distinct"),
        (lambda x: neighbours.nearest(x, x, k=0), "k=0"),
        (lambda x: neighbours.nearest(x, x, chunk=0), "chunk=0"),
        (lambda x: neighbours.nearest(x[:, :1], x), r"\(1,\) against .* \(2,\)"),
    ],
)
def test_what_has_no_answer_is_refused_with_its_numbers(call, words):
    with pytest.raises(ValueError, match=words):
        call(np.arange(8, dtype=np.float32).reshape(4, 2))
