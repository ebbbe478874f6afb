"""Neighbours are exact, intervals cover, and honest samples have the null level."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracles import FEW, SEEDS, alike, close, lattice, moved_exactly, two_nearest

from memsep_jax import memorization, neighbours

RNG = np.random.default_rng(0)


def test_nearest_two_by_hand():
    data = jnp.array([[0.0, 0.0], [3.0, 4.0], [10.0, 0.0]])
    nearest = jax.jit(lambda x: memorization.nearest_two(x, np.asarray(data)))
    for two in (
        memorization.nearest_two(jnp.array([0.0, 1.0]), data),
        nearest(jnp.array([0.0, 1.0])),
    ):
        np.testing.assert_allclose(two, [1, np.sqrt(18)], rtol=1e-6)
    assert memorization.memorized(jnp.array([0.0, 1.0]), data)  # 1 < 4.24 / 3
    assert not memorization.memorized(jnp.array([0.0, 2.0]), data)  # 2 > 3.6 / 3


def test_a_duplicate_is_not_a_second_neighbour():
    data = jnp.array([[1.0, 1.0], [5.0, 1.0], [1.0, 1.0]])
    two = memorization.nearest_two(jnp.array([1.0, 1.0]), data)
    np.testing.assert_array_equal(two, [0, 4])
    assert memorization.memorized(jnp.array([1.0, 1.0]), data)
    result = memorization.ratio(np.ones((1, 2)), np.asarray(data))
    assert (result.value, result.duplicates) == (1.0, 1)
    np.testing.assert_array_equal(result.neighbours.distances, [[0, 4]])
    np.testing.assert_array_equal(result.neighbours.indices, [[0, 1]])


def test_a_third_exactly_is_not_memorized():
    data = np.array([[0.0], [4.0]], np.float32)
    samples = np.array([[1.0 - 1e-6], [1.0 + 1e-6], [2.0]])  # the last: d1 = d2
    flags = memorization.ratio(samples, data).memorized
    np.testing.assert_array_equal(flags, [True, False, False])
    assert memorization.ratio(np.array([[1.5]]), data, threshold=0.7).value == 1


@pytest.mark.parametrize("scale, offset", [(1.0, 0.0), (1e-4, 1.0), (255.0, 1e4)])
def test_exact_copies_have_distance_zero_and_the_right_index(scale, offset):
    """|x|^2 - 2 x.y + |y|^2 in float32 is off by the distances themselves here."""
    data = (RNG.uniform(-1, 1, (300, 8, 8, 3)) * scale + offset).astype(np.float32)
    picked = RNG.permutation(300)[:40]
    result = memorization.ratio(data[picked], data, chunk=16)
    assert result.value == 1.0
    np.testing.assert_array_equal(result.neighbours.distances[:, 0], 0)
    np.testing.assert_array_equal(result.neighbours.indices[:, 0], picked)


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
    interval = memorization.wilson(count, total)
    np.testing.assert_allclose(interval, [low, high], atol=5e-5)
    mirrored = memorization.wilson(total - count, total)
    np.testing.assert_allclose(mirrored, [1 - high, 1 - low], atol=5e-5)


@settings(deadline=None, max_examples=25)
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


@pytest.mark.parametrize(
    "counts, low, high",
    [  # Newcombe 1998 (Statistics in Medicine 17, 873), table II, method 10
        ((56, 70, 48, 80), 0.0524, 0.3339),
        ((9, 10, 3, 10), 0.1705, 0.8090),
        ((6, 7, 2, 7), 0.0582, 0.8062),
        ((5, 56, 0, 29), -0.0381, 0.1926),
        ((0, 10, 0, 20), -0.1611, 0.2775),
        ((0, 10, 0, 10), -0.2775, 0.2775),
        ((10, 10, 0, 20), 0.6791, 1.0),
    ],
)
def test_the_excess_is_the_published_table(counts, low, high):
    value, interval = memorization.excess(*counts)
    assert value == counts[0] / counts[1] - counts[2] / counts[3]
    np.testing.assert_allclose(interval, [low, high], atol=5.1e-5)
    less, mirrored = memorization.excess(*counts[2:], *counts[:2])
    np.testing.assert_allclose([less, *mirrored], [-value, -high, -low], atol=5.1e-5)


@pytest.mark.parametrize(
    "counts, p",
    [
        ((4, 4, 0, 4), 1 / 70),  # the lady who tells all cups of tea (Fisher 1935)
        ((3, 4, 1, 4), 17 / 70),
        ((0, 9, 5, 7), 1.0),
        ((1, 1_000, 0, 10_000), 1 / 11),
        ((3, 50, 0, 100), 50 * 49 * 48 / (150 * 149 * 148)),
    ],
)
def test_the_chance_of_as_many_copies_is_fishers(counts, p):
    np.testing.assert_allclose(memorization.by_chance(*counts), p, rtol=1e-9)


def test_the_ratio_is_a_loop_over_samples(bits, real):
    """Copies of points that occur twice, near copies, and other points."""
    data = real(9, 2, 2)
    data[7] = data[2]
    near = np.float64(np.float32(data[4] + 0.125 * real(2, 2)))
    samples = np.concatenate([data[[2, 5]], near[None], real(40, 2, 2)])
    held_out = real(43, 2, 2)
    truth = np.array([two_nearest(x, data) for x in samples])
    flags = truth[:, 0] < 0.4 * truth[:, 1]
    assert 3 < flags.sum() < 40

    @jax.jit
    def each(samples, data):
        return jax.vmap(
            lambda x: (
                memorization.nearest_two(x, data),
                memorization.memorized(x, data, 0.4),
            )
        )(samples)

    distances, same = each(samples, data)
    close(distances, truth[:, :2], bits)
    np.testing.assert_array_equal(same, flags)
    result = memorization.ratio(samples, data, held_out, threshold=0.4, chunk=16)
    close(result.neighbours.distances.astype(np.float32), truth[:, :2], 32)
    np.testing.assert_array_equal(result.neighbours.indices[:, 0], truth[:, 2])
    nulls = [two_nearest(x, data) for x in held_out]
    null = np.mean([d1 < 0.4 * d2 for d1, d2, _ in nulls])
    for one in (result, memorization.ratio_of(result.neighbours, None, 1, 0.4)):
        np.testing.assert_array_equal(one.memorized, flags)
        assert (one.value, one.duplicates) == (flags.mean(), 1)
        assert one.interval == memorization.wilson(int(flags.sum()), 43)
    assert (result.null, one.null) == (null, None)
    np.testing.assert_array_equal(memorization.copied(result.neighbours, 0.4), flags)
    d1, d2 = np.append(truth[:, 0], 0), np.append(truth[:, 1], 0)
    wanted = [a / b if b else 1 for a, b in zip(d1, d2, strict=True)]
    np.testing.assert_allclose(memorization.quotient(d1, d2), wanted, rtol=1e-15)


@FEW
@given(SEEDS)
def test_the_ratio_sees_no_move_and_no_order(seed):
    """Distances scale; the ratio and AuthPct stay what they are."""
    rng, data = np.random.default_rng(seed), lattice(seed, 16)
    near = data[:8] + rng.integers(-1, 2, data[:8].shape) / 8
    samples, held_out = np.concatenate([near, data[8:]]), lattice(seed + 1, 16)
    (far, at, new), s = moved_exactly((data, samples, held_out), seed)

    one = memorization.ratio(samples, data, held_out)
    other = memorization.ratio(at, far, new)
    np.testing.assert_array_equal(
        other.neighbours.distances, np.float32(s) * one.neighbours.distances
    )
    np.testing.assert_array_equal(other.neighbours.indices, one.neighbours.indices)
    np.testing.assert_array_equal(other.memorized, one.memorized)
    assert other[:4] == one[:4] and one.memorized.sum() >= 8

    own, far_own = (neighbours.nearest(a, a).distances[:, 1] for a in (data, far))
    authentic = memorization.authentic(one.neighbours, own)
    again = memorization.authentic(other.neighbours, far_own)
    np.testing.assert_array_equal(again, authentic)
    for unitless in (memorization.calibrated_l2, lambda d: memorization.quotient(*d.T)):
        alike(unitless(other.neighbours.distances), unitless(one.neighbours.distances))

    rows, points = rng.permutation(16), rng.permutation(16)
    mixed = memorization.ratio(samples[rows], data[points], held_out[::-1])
    np.testing.assert_array_equal(mixed.memorized, one.memorized[rows])
    assert mixed[:4] == one[:4]


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda x: memorization.ratio(x, x[:1]), "two distinct training points"),
        (lambda x: memorization.ratio(x, np.ones((5, 2))), "two distinct .* got 1"),
        (lambda x: memorization.ratio(x[:0], x), "no samples"),
        (lambda x: memorization.ratio(x, x, threshold=1.0), "threshold=1.0"),
        (lambda x: memorization.ratio(x, x, threshold=0), "threshold=0"),
        (lambda x: memorization.wilson(3, 2), "count=3 of total=2"),
        (lambda x: memorization.wilson(0, 0), "total=0"),
        (lambda x: memorization.excess(1, 4, 0, 0), "total=0"),
    ],
)
def test_a_ratio_without_an_answer_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call(np.arange(8, dtype=np.float32).reshape(4, 2))
