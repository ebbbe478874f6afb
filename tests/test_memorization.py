"""Neighbours are exact, the null level is 3^-d, and an interval covers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from memsep_jax import memorization

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


def test_nearest_two_by_hand():
    data = jnp.array([[0.0, 0.0], [3.0, 4.0], [10.0, 0.0]])
    found = memorization.nearest_two(jnp.array([0.0, 1.0]), data)
    np.testing.assert_allclose(found, [1, np.sqrt(18)], rtol=1e-6)
    assert memorization.memorized(jnp.array([0.0, 1.0]), data)  # 1 < 4.24 / 3
    assert not memorization.memorized(jnp.array([0.0, 2.0]), data)  # 2 > 3.6 / 3


def test_a_duplicate_is_not_a_second_neighbour():
    data = jnp.array([[1.0, 1.0], [5.0, 1.0], [1.0, 1.0]])
    found = memorization.nearest_two(jnp.array([1.0, 1.0]), data)
    np.testing.assert_array_equal(found, [0, 4])
    assert memorization.memorized(jnp.array([1.0, 1.0]), data)
    result = memorization.ratio(np.ones((1, 2)), np.asarray(data))
    assert (result.value, result.duplicates) == (1.0, 1)
    np.testing.assert_array_equal(result.neighbours.distances, [[0, 4]])
    np.testing.assert_array_equal(result.neighbours.indices, [[0, 1]])


def test_a_third_exactly_is_not_memorized():
    data = np.array([[0.0], [4.0]], np.float32)
    assert memorization.ratio([[1.0 - 1e-6]], data).value == 1  # d1 / d2 just below
    assert memorization.ratio([[1.0 + 1e-6]], data).value == 0
    assert memorization.ratio([[2.0]], data).value == 0  # d1 = d2
    assert memorization.ratio([[1.5]], data, threshold=0.7).value == 1


@pytest.mark.parametrize("scale, offset", [(1.0, 0.0), (1e-4, 1.0), (255.0, 1e4)])
def test_exact_copies_have_distance_zero_and_the_right_index(scale, offset):
    """Where |x|^2 - 2 x.y + |y|^2 in float32 is off by the distances themselves."""
    data = (RNG.uniform(-1, 1, (300, 8, 8, 3)) * scale + offset).astype(np.float32)
    picked = RNG.permutation(300)[:40]
    result = memorization.ratio(data[picked], data, chunk=16)
    assert result.value == 1.0
    np.testing.assert_array_equal(result.neighbours.distances[:, 0], 0)
    np.testing.assert_array_equal(result.neighbours.indices[:, 0], picked)


def test_ties_go_to_the_lowest_index():
    data = np.array([[2.0], [0.0], [1.0], [0.0], [2.0]], np.float32)
    found = memorization.neighbours(np.array([[1.0], [0.5], [0.0]]), data, k=3)
    np.testing.assert_array_equal(found.indices, [[2, 0, 1], [1, 2, 0], [1, 2, 0]])


def test_minus_zero_is_zero():
    data = np.array([[0.0, 1.0], [-0.0, 1.0], [1.0, 1.0]], np.float32)
    np.testing.assert_array_equal(memorization.distinct(data), [0, 2])


@pytest.mark.parametrize("d", [1, 2, 3, 4])
def test_the_null_level_is_three_to_the_minus_d(d, key):
    """Exactly so: of points uniform in a ball, (d1 / d2)^d is uniform at its centre."""
    m, n = 40_000, 6
    direction_key, radius_key = jax.random.split(key)
    points = jax.random.normal(direction_key, (m, n, d))
    points = points / jnp.linalg.norm(points, axis=-1, keepdims=True)
    radius = jax.random.uniform(radius_key, (m, n, 1)) ** (1 / d)
    flagged = jax.jit(
        jax.vmap(lambda data: memorization.memorized(jnp.zeros(d), data))
    )(points * radius)
    level = 3.0**-d
    assert abs(flagged.mean() - level) < 4 * np.sqrt(level * (1 - level) / m)


def test_the_null_level_of_held_out_points_is_reported(key):
    """Samples of the truth and held-out points score alike, near 1/9 in the plane."""
    data, samples, held_out = jax.random.uniform(key, (3, 2_000, 2))
    result = memorization.ratio(samples, data, held_out)
    error = np.sqrt(2 * (1 / 9) * (8 / 9) / 2_000)
    assert abs(result.value - result.null) < 4 * error
    low, high = result.null_interval
    assert low < result.null < high
    assert abs(result.null - 1 / 9) < 4 * error
    assert memorization.ratio(samples[:5], data).null is None
    assert memorization.ratio(samples[:5], data, held_out[:0]).null is None


# One answer, however it is searched.


@FEW
@given(
    seed=st.integers(0, 10**6),
    chunk=st.sampled_from([1, 4, 9, 100]),
    block=st.sampled_from([1, 21, 40, 1_000]),
)
def test_chunks_and_blocks_leave_no_trace(seed, chunk, block):
    """On small integers float32 is exact, so every tie and duplicate is seen."""
    data, samples = grid_points(seed, 60, 3), grid_points(seed + 1, 9, 3)
    found = memorization.searcher(data, 3, chunk, block)(samples)
    distances, indices = brute(samples, data, 3)
    np.testing.assert_array_equal(found.indices[:, 0], indices[:, 0])
    np.testing.assert_allclose(found.distances, distances, rtol=1e-6)


@FEW
@given(seed=st.integers(0, 10**6))
def test_the_order_of_the_data_leaves_no_trace(seed):
    data, samples = RNG.normal(size=(50, 5)), RNG.normal(size=(8, 5))
    order = np.random.default_rng(seed).permutation(50)
    one = memorization.neighbours(samples, data)
    other = memorization.neighbours(samples, data[order])
    np.testing.assert_array_equal(one.indices, order[other.indices])
    np.testing.assert_allclose(one.distances, other.distances, rtol=1e-6)


@FEW
@given(seed=st.integers(0, 10**6), copies=st.integers(1, 3))
def test_duplicates_leave_no_trace(seed, copies):
    rng = np.random.default_rng(seed)
    data, samples = rng.normal(size=(20, 3)), rng.normal(size=(6, 3))
    more = np.concatenate([data, data[rng.integers(0, 20, 20 * copies)]])
    one, other = memorization.ratio(samples, data), memorization.ratio(samples, more)
    np.testing.assert_array_equal(one.neighbours.indices, other.neighbours.indices)
    np.testing.assert_array_equal(one.memorized, other.memorized)
    assert other.duplicates == 20 * copies


@pytest.mark.parametrize("n, k", [(2, 2), (17, 1), (17, 17), (3_000, 50)])
def test_the_search_agrees_with_brute_force(n, k):
    rng = np.random.default_rng(n)
    data, samples = rng.normal(size=(n, 4, 4, 1)), rng.normal(size=(30, 4, 4, 1))
    found = memorization.searcher(data.astype(np.float32), k, 16, 512)(samples)
    distances, indices = brute(samples, data.astype(np.float32), k)
    np.testing.assert_allclose(found.distances, distances, rtol=1e-5)
    assert (found.indices == indices).mean() > 0.999  # float32 may swap near-ties


def test_ratio_is_the_mean_of_memorized():
    data = RNG.normal(size=(200, 2)).astype(np.float32)
    samples = RNG.normal(size=(300, 2)).astype(np.float32)
    result = memorization.ratio(samples, data, chunk=64)
    each = jax.jit(jax.vmap(memorization.memorized, (0, None)))(samples, data)
    pairs = jax.jit(jax.vmap(memorization.nearest_two, (0, None)))(samples, data)
    np.testing.assert_array_equal(result.memorized, each)
    np.testing.assert_allclose(result.neighbours.distances, pairs, rtol=1e-5)
    assert result.value == np.asarray(each).mean()
    assert result.interval == memorization.wilson(int(each.sum()), 300)


# Intervals.


@pytest.mark.parametrize(
    "count, total, low, high",
    [  # Newcombe 1998, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_is_the_published_table(count, total, low, high):
    found = memorization.wilson(count, total)
    np.testing.assert_allclose(found, [low, high], atol=5e-5)
    mirrored = memorization.wilson(total - count, total)
    np.testing.assert_allclose(mirrored, [1 - high, 1 - low], atol=5e-5)


@settings(deadline=None)
@example((0, 1))
@example((1, 1))
@example((10_000, 10_000))
@given(
    st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
)
def test_wilson_ends_are_where_the_score_test_rejects(pair):
    """(share - p)^2 = z^2 p (1 - p) / n at both ends, which hold the share between."""
    count, total = pair
    share, z = count / total, 1.959964
    low, high = memorization.wilson(count, total)
    assert 0 <= low <= share <= high <= 1
    assert low < high
    for p in (low, high):
        np.testing.assert_allclose(
            (share - p) ** 2, z**2 * p * (1 - p) / total, rtol=1e-6, atol=1e-12
        )


@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_wilson_covers_as_often_as_it_says(share):
    """Binomial(100, p): the exact coverage of a 95 % interval is near 95 %."""
    n, weight, coverage = 100, (1 - share) ** 100, 0.0
    for count in range(n + 1):
        low, high = memorization.wilson(count, n)
        coverage += weight * (low <= share <= high)
        weight *= (n - count) / (count + 1) * share / (1 - share)
    assert 0.92 < coverage < 0.985


# Calibrated l2.


def test_calibrated_l2_by_hand():
    """d1 / (alpha mean d)."""
    found = memorization.calibrated_l2([[1.0, 2.0, 3.0], [0.0, 1.0, 5.0]])
    np.testing.assert_allclose(found, [1 / (0.5 * 2), 0])
    found = memorization.calibrated_l2([[1.0, 3.0]], alpha=0.25)
    np.testing.assert_allclose(found, [2.0])
    np.testing.assert_array_equal(memorization.calibrated_l2([[0.0, 0.0]]), [0])


# Refusals.


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda x: memorization.ratio(x, x[:1]), "two distinct training points"),
        (lambda x: memorization.ratio(x, np.ones((5, 2))), "two distinct .* got 1"),
        (lambda x: memorization.ratio(x[:0], x), "no samples"),
        (lambda x: memorization.ratio(x, x, threshold=1.0), "threshold=1.0"),
        (lambda x: memorization.ratio(x, x, threshold=0), "threshold=0"),
        (lambda x: memorization.neighbours(x, x, k=5), "k=5 .* 4 distinct"),
        (lambda x: memorization.neighbours(x, x, k=0), "k=0"),
        (lambda x: memorization.neighbours(x, x, chunk=0), "chunk=0"),
        (lambda x: memorization.neighbours(x[:, :1], x), r"\(1,\) against .* \(2,\)"),
        (lambda x: memorization.wilson(3, 2), "count=3 of total=2"),
        (lambda x: memorization.wilson(0, 0), "total=0"),
    ],
)
def test_what_has_no_answer_is_refused_with_its_numbers(call, words):
    with pytest.raises(ValueError, match=words):
        call(np.arange(8, dtype=np.float32).reshape(4, 2))


def test_no_samples_have_no_neighbours():
    found = memorization.neighbours(np.zeros((0, 2)), np.eye(2))
    assert found.distances.shape == found.indices.shape == (0, 2)
