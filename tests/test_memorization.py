"""Neighbours are exact, intervals cover, and tests of copying see copies alone."""

from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from hypothesis import example, given, settings
from hypothesis import strategies as st

from memsep_jax import memorization
from memsep_jax.neighbours import Neighbours, searcher

RNG = np.random.default_rng(0)
FEW = settings(deadline=None, max_examples=8)


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


def test_training_points_may_be_of_numpy_inside_of_jit():
    data = np.array([[0.0], [1.0], [4.0]], np.float32)
    found = jax.jit(lambda x: memorization.nearest_two(x, data))(jnp.array([0.25]))
    np.testing.assert_allclose(found, [0.25, 0.75])


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
@given(seed=st.integers(0, 10**6), copies=st.integers(1, 3))
def test_duplicates_leave_no_trace(seed, copies):
    rng = np.random.default_rng(seed)
    data, samples = rng.normal(size=(20, 3)), rng.normal(size=(6, 3))
    more = np.concatenate([data, data[rng.integers(0, 20, 20 * copies)]])
    one, other = memorization.ratio(samples, data), memorization.ratio(samples, more)
    np.testing.assert_array_equal(one.neighbours.indices, other.neighbours.indices)
    np.testing.assert_array_equal(one.memorized, other.memorized)
    assert other.duplicates == 20 * copies


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
def test_so_many_copies_by_chance_are_as_probable_as_fisher_says(counts, p):
    np.testing.assert_allclose(memorization.by_chance(*counts), p, rtol=1e-9)


# Mirror images.


def test_a_mirrored_copy_is_found_and_a_symmetric_one_is_not_flipped():
    data = RNG.normal(size=(30, 4, 6, 2)).astype(np.float32)
    data[7] = data[7] + data[7, :, ::-1]  # its own mirror image
    search = searcher(data)
    samples = np.concatenate([data[3:8], data[3:8, :, ::-1]])
    found = memorization.with_flips(search)(samples)
    np.testing.assert_array_equal(found.indices[:, 0], 2 * [3, 4, 5, 6, 7])
    np.testing.assert_array_equal(found.distances[:, 0], 0)
    np.testing.assert_array_equal(found.flipped, 5 * [False] + 4 * [True] + [False])
    # What is nearer unflipped has the answer of the search, both of its neighbours.
    for kept, of in zip(found[:2], search(samples[:5]), strict=True):
        np.testing.assert_array_equal(kept[:5], of)
    for kept, of in zip(found[:2], search(samples[:4]), strict=True):
        np.testing.assert_array_equal(kept[5:9], of)
    assert memorization.ratio_of(found, None, 0).value == 1
    # It is the plain one that misses four of them.
    assert memorization.ratio(samples, data).value == 0.6
    with pytest.raises(ValueError, match=r"\(5, 3\) have no mirror images"):
        memorization.with_flips(search)(np.zeros((5, 3)))


# Calibrated l2.


def test_calibrated_l2_by_hand():
    """d1 / (alpha mean d)."""
    found = memorization.calibrated_l2([[1.0, 2.0, 3.0], [0.0, 1.0, 5.0]])
    np.testing.assert_allclose(found, [1 / (0.5 * 2), 0])
    found = memorization.calibrated_l2([[1.0, 3.0]], alpha=0.25)
    np.testing.assert_allclose(found, [2.0])
    np.testing.assert_array_equal(memorization.calibrated_l2([[0.0, 0.0]]), [0])


# Tiled l2.


def test_the_tiled_distance_is_that_of_the_worst_tile():
    a = np.zeros((2, 8, 12, 3))
    b = a.copy()
    b[0, 2:4, 3:6] = 0.5  # all in one of 4 x 4 tiles
    b[1] = 0.5  # as far in every tile
    one = 0.5 * np.sqrt(2 * 3 * 3)
    np.testing.assert_allclose(memorization.tiled_l2(a, b), [one, one])
    np.testing.assert_allclose(
        memorization.tiled_l2(a, b, 1), [one, 0.5 * np.sqrt(8 * 12 * 3)]
    )
    a, b = RNG.normal(size=(2, 5, 4, 6, 1))
    truth = [
        max(
            np.linalg.norm((x - y)[i : i + 2, j : j + 3])
            for i in (0, 2)
            for j in (0, 3)
        )
        for x, y in zip(a, b, strict=True)
    ]
    np.testing.assert_allclose(memorization.tiled_l2(a, b, 2), truth, rtol=1e-12)


def test_tiles_of_pixels_have_the_units_of_their_numbers():
    a, b = RNG.integers(0, 256, (2, 7, 4, 4, 3)).astype(np.uint8)
    numbers = memorization.tiled_l2(a / 127.5 - 1, b / 127.5 - 1, 2)
    np.testing.assert_allclose(memorization.tiled_l2(a, b, 2), numbers, rtol=1e-12)


def test_tiles_tell_a_shared_background_from_a_copy():
    """One candidate is nearer as a whole, but another object is on its ground."""
    data = np.zeros((2, 8, 8, 1))
    data[0, :2, :2] = 1  # norm 2, in one tile
    data[1] = 0.26  # norm 2.08, and .52 in each tile
    sample = np.zeros((1, 8, 8, 1))
    plain = searcher(data)(sample)
    np.testing.assert_array_equal(plain.indices, [[0, 1]])
    found = memorization.nearest_tiled(sample, data, plain.indices)
    assert found.indices == [1]
    np.testing.assert_allclose(found.distances, [0.52])


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_the_nearest_tiled_one_is_so_for_every_chunk(chunk):
    samples, data = RNG.normal(size=(7, 4, 4, 2)), RNG.normal(size=(9, 4, 4, 2))
    indices = np.array([RNG.permutation(9)[:5] for _ in samples])
    found = memorization.nearest_tiled(samples, data, indices, 2, chunk)
    each = np.array(
        [
            memorization.tiled_l2(np.broadcast_to(x, (5, 4, 4, 2)), data[i], 2)
            for x, i in zip(samples, indices, strict=True)
        ]
    )
    np.testing.assert_array_equal(found.distances, each.min(axis=1))
    np.testing.assert_array_equal(found.indices, indices[range(7), each.argmin(axis=1)])


# AuthPct.


def test_authentic_samples_by_hand():
    """Points 0, 1 and 10, where 1 occurs twice: their nearest others are at 1, 1, 9."""
    data = np.array([[0.0], [1.0], [10.0], [1.0]])
    own = searcher(data, 2)(data).distances[:, 1]
    np.testing.assert_array_equal(own, [1, 1, 9, 1])
    samples = np.array([[0.4], [-2.0], [5.0], [18.0], [20.0], [-1.0], [1.0]])
    found = memorization.authentic(searcher(data, 1)(samples), own)
    #            .4 < 1, 2 > 1, 4 > 1, 8 < 9, 10 > 9, a tie, a copy
    np.testing.assert_array_equal(found, [False, True, True, False, True, False, False])


@pytest.mark.parametrize("n", [2, 3, 12])
def test_a_third_of_honest_samples_on_a_circle_are_authentic(n):
    """With its nearest point, its gap must not be the less of that and the next one."""
    runs = 4_000
    x, samples = RNG.uniform(size=(runs, n)), RNG.uniform(size=(runs, 1))
    between = np.abs(x[:, :, None] - x[:, None]) + 2 * np.eye(n)
    own = np.minimum(between, np.abs(1 - between)).min(axis=2)
    gaps = np.abs(samples - x)
    gaps = np.minimum(gaps, 1 - gaps)
    nearest = gaps.argmin(axis=1)[:, None]
    found = Neighbours(
        np.take_along_axis(gaps, nearest, 1), nearest + n * np.arange(runs)[:, None]
    )
    share = memorization.authentic(found, own.ravel()).mean()
    assert abs(share - 1 / 3) < 4 * np.sqrt(2 / 9 / runs)


# C_T.


def test_c_t_by_hand():
    """U of 0 pairs of 4: (0 - 2) / sqrt(4 * 5 / 12); and so in the other direction."""
    z = 2 / np.sqrt(5 / 3)
    low = memorization.copying_test([1, 2], [0, 0], [3, 4], [0, 0], least=2)
    assert (low.value, low.error) == (pytest.approx(-z), 1)
    high = memorization.copying_test([3, 4], [0, 0], [1, 2], [0, 0], least=2)
    assert high.value == pytest.approx(z)
    same = memorization.copying_test([3, 3], [0, 0], [3, 3], [0, 0], least=2)
    assert same.value == 0  # nothing but ties
    # Of cells 5 and 7, weighted by their 2 and 6 held-out points; 6 has one sample, 8
    # no held-out point and 9 no sample.
    found = memorization.copying_test(
        [1, 2, 3, 4, 0, 5, 5],
        [5, 5, 7, 7, 6, 8, 8],
        [3, 4, 1, 1, 1, 2, 2, 2, 1, 0],
        [5, 5, 7, 7, 7, 7, 7, 7, 6, 9],
        least=2,
    )
    np.testing.assert_array_equal(found.cells, [5, 7])
    np.testing.assert_array_equal(found.left_out, [6, 8, 9])
    np.testing.assert_allclose(found.weights, [1 / 4, 3 / 4])
    # U = 12 of 12 pairs; two ties of 3: 12 / 12 (9 - 48 / 56).
    scores = [-z, 6 / np.sqrt(9 - 48 / 56)]
    np.testing.assert_allclose(found.scores, scores)
    assert found.value == pytest.approx(scores[0] / 4 + scores[1] * 3 / 4)
    assert found.error == pytest.approx(np.sqrt(10) / 4)


@pytest.mark.parametrize("values", [3, 10, 10**6])
def test_the_score_of_a_cell_is_that_of_scipy(values):
    x, y = RNG.integers(0, values, 40), RNG.integers(0, values, 60) // 2
    found = memorization.copying_test(x, 0 * x, y, 0 * y).value
    p = scipy.stats.mannwhitneyu(
        x, y, use_continuity=False, alternative="greater", method="asymptotic"
    ).pvalue
    np.testing.assert_allclose(found, scipy.stats.norm.isf(p), rtol=1e-9)


@pytest.mark.parametrize("draw", ["continuous", "tied"])
def test_c_t_of_one_law_is_standard_normal_and_sees_copies(draw):
    runs, rng, found = 500, np.random.default_rng(0), []
    law = {
        "continuous": lambda size: rng.exponential(size=size),
        "tied": lambda size: rng.integers(0, 5, size).astype(float),
    }[draw]
    cells = np.repeat([0, 1, 2], 30), np.repeat([0, 1, 2], [10, 40, 20])
    for _ in range(runs):
        x, y = law(90), law(70)
        result = memorization.copying_test(x, cells[0], y, cells[1])
        found.append(result.value / result.error)
    assert abs(np.mean(found)) < 4 / np.sqrt(runs)
    assert abs(np.var(found) - 1) < 4 * np.sqrt(2 / runs)
    assert memorization.copying_test(x / 9 - 1, cells[0], y, cells[1]).value < -4
    assert memorization.copying_test(x + 4, cells[0], y, cells[1]).value > 4


# FLD.


def direct(points, centres, logs, weights):
    """log sum_j w_j N(x_i; c_j, exp(l_j) I), one density after the other."""
    d = len(centres[0])
    return np.log(
        [
            sum(
                w * scipy.stats.multivariate_normal.pdf(x, c, np.exp(v) * np.eye(d))
                for c, v, w in zip(centres, logs, weights, strict=True)
            )
            for x in points
        ]
    )


def normalised(*sets):
    mean, std = sets[1].mean(axis=0), sets[1].std(axis=0, ddof=1)
    return [(a - mean) / std for a in sets]


@pytest.fixture
def likely():
    """12 training, 9 held-out and 5 generated points in the plane."""
    rng = np.random.default_rng(3)
    return [3 + np.array([1, 5]) * rng.normal(size=(n, 2)) for n in (12, 9, 5)]


def test_fld_is_the_density_of_its_mixture(likely, monkeypatch):
    found = memorization.feature_likelihood(*likely)
    train, held_out, generated = normalised(*likely)
    truth = [
        -50 * direct(x, generated, found.log_variances, np.full(5, 1 / 5)).mean()
        - 100 * found.offset
        for x in (held_out, train)
    ]
    np.testing.assert_allclose([found.fld, found.fld_train], truth, rtol=1e-9)
    assert found.gap == found.fld_train - found.fld
    # The offset is that of one half of the training set, fitted to the other.
    order = np.random.default_rng(0).permutation(12)
    half = memorization._fit(train[order[:5]], train[order[5:]])
    offset = -direct(held_out, train[order[:5]], half, np.full(5, 1 / 5)).mean() / 2
    assert found.offset == pytest.approx(offset, rel=1e-9)
    monkeypatch.setattr(memorization, "PAIRS", 15)  # three points at a time
    again = memorization.feature_likelihood(*likely)
    np.testing.assert_allclose(again[:4], found[:4], rtol=1e-9)


def test_the_variances_of_fld_are_the_most_likely_ones(likely):
    """From the same start, with the base term: another way up ends at the same top."""
    train, _, generated = normalised(*likely)
    squares = np.sum((train[:, None] - generated[None]) ** 2, axis=2)
    start = np.append(np.log((squares.min(axis=0) + 1e-3) / 2), 0.0)
    # 0.9 of the distance to the mean, as a Gaussian at the mean of moved points.
    base = 0.9**2 * np.sum((train - train.mean(axis=0)) ** 2, axis=1)
    squares = np.concatenate([squares, base[:, None]], axis=1)
    weights = np.array(5 * [1 / 5] + [1])

    def loss(logs):
        densities = np.exp(-squares / (2 * np.exp(logs))) / (2 * np.pi * np.exp(logs))
        return -np.log(densities @ weights).mean()

    best = scipy.optimize.minimize(loss, start, method="BFGS", tol=1e-9)
    found = memorization.feature_likelihood(*likely)
    np.testing.assert_allclose(found.log_variances, best.x[:-1], atol=1e-3)


def test_the_gap_sees_copies_and_not_fresh_points():
    """About 0 where the law is known; by -100 for near copies; no end for copies."""
    rng, d, n = np.random.default_rng(0), 20, 150
    train, held_out, fresh = (rng.normal(size=(n, d)) for _ in range(3))
    near = fresh.copy()
    near[: n // 2] = train[: n // 2] + 0.05 * rng.normal(size=(n // 2, d))
    copied = fresh.copy()
    copied[: n // 2] = train[: n // 2]
    gap = {
        name: memorization.feature_likelihood(train, held_out, x).gap
        for name, x in {"fresh": fresh, "near": near, "copied": copied}.items()
    }
    assert -5 < gap["fresh"] < 0
    # Half of the training points at variance .05^2: d log(1 / .05) / 2 a point less.
    assert gap["near"] == pytest.approx(-100 * np.log(1 / 0.05) / 2, rel=0.05)
    assert gap["copied"] < -500
    logs = memorization.feature_likelihood(train, held_out, copied).log_variances
    np.testing.assert_array_equal(logs[: n // 2], -40)
    assert logs[n // 2 :].min() > -3


def test_fld_is_best_for_the_law_and_sees_a_shift_and_a_dropped_mode():
    rng = np.random.default_rng(1)

    def law(n, modes):
        """Unit Gaussians at corners of a cube with sides of 6."""
        return rng.normal(size=(n, 10)) + 6 * np.eye(10)[rng.integers(0, modes, n)]

    train, held_out = law(200, 4), law(200, 4)
    found = {
        name: memorization.feature_likelihood(train, held_out, x).fld
        # As many as in the half that makes it 0.
        for name, x in {
            "law": law(100, 4), "shift": law(100, 4) + 1, "drop": law(100, 2),
        }.items()
    }  # fmt: skip
    assert abs(found["law"]) < 5
    assert min(found["shift"], found["drop"]) > found["law"] + 10


def test_fld_has_no_units_and_constant_features_do_no_harm(likely):
    found = memorization.feature_likelihood(*likely)
    scaled = [a * np.array([1e3, 1e-3]) - 7 for a in likely]
    again = memorization.feature_likelihood(*scaled)
    np.testing.assert_allclose(again[:4], found[:4], rtol=1e-6)
    flat = [np.concatenate([a, np.ones((len(a), 1))], axis=1) for a in likely]
    assert np.isfinite(memorization.feature_likelihood(*flat)[:4]).all()
    point = np.ones((4, 2))  # of which all is known
    assert np.isfinite(memorization.feature_likelihood(point, point, point)[:4]).all()


# What was emitted.


def test_emission_by_hand():
    nearest = np.array([4, 2, 4, 9, 4, 2, 1])
    copied = np.array([1, 1, 1, 0, 1, 1, 1], bool)
    found = memorization.emitted(nearest, copied, 10)
    np.testing.assert_array_equal(found.points, [1, 2, 4])
    np.testing.assert_array_equal(found.counts, [1, 2, 3])
    assert (found.distinct, found.coverage) == (3, 0.3)
    none = memorization.emitted(nearest, ~copied[::-1] & False, 10)
    assert (none.distinct, none.coverage, none.counts.size) == (0, 0, 0)
    np.testing.assert_array_equal(
        memorization.rarefaction(none.counts, 7, [0, 3, 7, 99], 10), 0
    )


@pytest.mark.parametrize("counts", [[3, 2, 1], [1, 1, 1, 1], [6], [4, 2]])
def test_fewer_samples_emit_the_mean_over_all_subsets(counts):
    """Eight samples, those beyond the counts being copies of nothing."""
    samples = np.full(8, -1)
    samples[: sum(counts)] = np.repeat(range(len(counts)), counts)
    truth = [
        np.mean([len({*some} - {-1}) for some in combinations(samples.tolist(), s)])
        for s in range(9)
    ]
    found = memorization.rarefaction(counts, 8, range(9), 50)
    np.testing.assert_allclose(found, truth, rtol=1e-12)
    assert found[8] == len(counts)


def test_rarefaction_is_unbiased_below_and_close_above():
    """A uniform law on 100 points, copied by 60 % of 200 samples."""
    n, total, share, runs = 100, 200, 0.6, 400
    sizes, rng = np.array([1, 20, 100, 200, 300, 400]), np.random.default_rng(0)
    found = []
    for _ in range(runs):
        nearest, copied = rng.integers(0, n, total), rng.random(total) < share
        seen = memorization.emitted(nearest, copied, n)
        found.append(memorization.rarefaction(seen.counts, total, sizes, n))
    truth = n * (1 - (1 - share / n) ** sizes)
    error = np.std(found, axis=0) / np.sqrt(runs)
    gap = np.mean(found, axis=0) - truth
    assert np.all(np.abs(gap[:4]) <= 4 * error[:4] + 1e-12)
    assert np.all(np.abs(gap[4:]) < 0.02 * truth[4:])
    assert np.all(np.diff(found, axis=1) >= 0)


def test_the_extrapolated_number_is_a_lower_bound_for_uneven_laws():
    """Chao's: on average not above the truth, and above what was seen."""
    n, total, runs = 200, 300, 300
    law, rng = np.arange(1, n + 1) ** -1.0, np.random.default_rng(0)
    law /= law.sum()
    found = []
    for _ in range(runs):
        counts = rng.multinomial(total, law)
        found.append(memorization.rarefaction(counts, total, [total, 600, 10**9], n))
    mean = np.mean(found, axis=0)
    assert mean[0] < mean[1] < mean[2] < n
    # Twice as many samples are foreseen well.
    assert mean[1] == pytest.approx(np.sum(1 - (1 - law) ** 600), rel=0.03)


def test_where_each_point_came_out_once_there_is_no_end_but_n():
    """f1 = 5 of 10 samples, f2 = 0: 9 / 10 * 5 * 4 / 2 = 9 more, or what is left."""
    many = memorization.rarefaction([1] * 5, 10, [10, 11, 10**9], 1_000)
    np.testing.assert_allclose(many, [5, 5 + 9 * 5 / 95, 14])
    few = memorization.rarefaction([1] * 5, 10, [10**9], 7)
    np.testing.assert_allclose(few, [7])
    # None came out once: nothing is foreseen.
    np.testing.assert_array_equal(
        memorization.rarefaction([2, 3], 5, [5, 100], 9), [2, 2]
    )


# Refusals.


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
        (lambda x: memorization.tiled_l2(x, x), r"not of \(4, 2\) float32"),
        (
            lambda x: memorization.tiled_l2(
                x.reshape(1, 4, 2, 1), x.reshape(1, 4, 2, 1).astype(np.uint8)
            ),
            "float32 and .* uint8",
        ),
        (
            lambda x: memorization.tiled_l2(*x.reshape(2, 1, 2, 2, 1), 3),
            "tiles=3 must divide both sides of 2 x 2 images: 2 does",
        ),
        (
            lambda x: memorization.copying_test(x[0], [0, 0], x[1], [0, 0]),
            "none of 1 cells holds 20 of 2 samples",
        ),
        (
            lambda x: memorization.copying_test(x[0], [0, 0], x[1], [0]),
            "2 and 2 distances with 2 and 1 cells",
        ),
        (
            lambda x: memorization.feature_likelihood(x, x, x[:, :1]),
            r"not of shapes \[\(4, 2\), \(4, 2\), \(4, 1\)\]",
        ),
        (
            lambda x: memorization.feature_likelihood(x, x[:1], x),
            "4 and 1 and 4 features",
        ),
        (
            lambda x: memorization.feature_likelihood(x, x, np.where(x, x, np.nan)),
            "features hold NaN",
        ),
        (
            lambda x: memorization.emitted([0, 1], [True, True], 1),
            "2 training points emitted of n=1",
        ),
        (
            lambda x: memorization.rarefaction([3, 2], 4, [1], 9),
            "5 copies of 2 points in total=4 samples",
        ),
        (lambda x: memorization.rarefaction([3, 2], 6, [1], 1), "of n=1 points"),
        (lambda x: memorization.rarefaction([3], 6, [-1], 9), r"sizes=\[-1.0\]"),
    ],
)
def test_what_has_no_answer_is_refused_with_its_numbers(call, words):
    with pytest.raises(ValueError, match=words):
        call(np.arange(8, dtype=np.float32).reshape(4, 2))


# Effective model memorization.


def pooled(values, weights):
    """Isotonic regression by pooling neighbours that rise, one pair at a time."""
    blocks = []
    for value, weight in zip(values, weights, strict=True):
        blocks.append([value, weight, 1])
        while len(blocks) > 1 and blocks[-1][0] > blocks[-2][0]:
            (a, u, i), (b, v, j) = blocks.pop(-2), blocks.pop()
            blocks.append([(u * a + v * b) / (u + v), u + v, i + j])
    return np.concatenate([np.full(count, value) for value, _, count in blocks])


curves = st.lists(
    st.tuples(st.floats(0, 1), st.floats(0.1, 9)), min_size=1, max_size=9
).map(lambda pairs: np.array(pairs).T)


@given(curves)
def test_the_nearest_non_increasing_curve_pools_what_rises(curve):
    values, weights = curve
    found = memorization.decreasing(values, weights)
    np.testing.assert_allclose(found, pooled(values, weights), atol=1e-12)
    several = memorization.decreasing(np.stack([values, values[::-1]]), weights)
    np.testing.assert_allclose(several[0], found, atol=1e-14)


def test_emm_is_linear_in_log_n_between_the_sizes():
    """From .95 at 100 to .85 at 400, .9 is in the middle of log n: 200."""
    found = memorization.effective_memorization([100, 400, 800], [0.95, 0.85, 0.1])
    assert found == pytest.approx(200)
    shuffled = memorization.effective_memorization([800, 100, 400], [0.1, 0.95, 0.85])
    assert shuffled == found
    quarter = memorization.effective_memorization([100, 1600], [1.0, 0.2], level=0.8)
    assert quarter == pytest.approx(200)  # 16^(1/4) times 100


def test_emm_is_the_largest_size_that_has_the_level():
    assert memorization.effective_memorization(
        [10, 20, 40, 80], [1, 0.9, 0.9, 0.5]
    ) == pytest.approx(40)
    # .9, .7 and then .95: the last two are .825 each, and pass through .9 nowhere.
    assert memorization.effective_memorization(
        [10, 20, 40, 80], [0.9, 0.7, 0.95, 0.0]
    ) == pytest.approx(10)
    # With all the weight on the .95, it pulls the others up to it.
    heavy = memorization.effective_memorization(
        [10, 20, 40, 80], [0.9, 0.7, 0.95, 0.0], weights=[1e-9, 1e-9, 1, 1]
    )
    assert heavy == pytest.approx(40 * 2 ** (0.05 / 0.95))


LAWS = {  # R(n), and its n of a level
    "logistic": (lambda n: 1 / (1 + (n / 1_000) ** 2), 0.5, 1_000.0),
    "linear in log n": (lambda n: 1 - np.log(n / 100) / 5, 0.8, 100 * np.e),
}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("seeds", [1, 4])
def test_the_interval_of_emm_covers_as_often_as_it_says(law, seeds):
    """400 repeated experiments, within 4 standard errors of 95 %."""
    curve, level, truth = LAWS[law]
    sizes, samples, rng = np.geomspace(100, 10_000, 7), 300, np.random.default_rng(0)
    counts = rng.binomial(samples, curve(sizes)[:, None], (400, 7, seeds))
    found = np.array(
        [
            memorization.effective_interval(sizes, c, samples, level, i, draws=300)
            for i, c in enumerate(counts)
        ]
    )
    covered = np.mean((found[:, 0] <= truth) & (truth <= found[:, 1]))
    assert abs(covered - 0.95) < 4 * np.sqrt(0.95 * 0.05 / 400)
    ends = [
        memorization.effective_memorization(sizes, c.mean(axis=1) / samples, level)
        for c in counts
    ]
    error = np.std(ends) / np.sqrt(len(ends))
    assert abs(np.mean(ends) - truth) < 4 * error


def test_emm_converges_to_the_law_with_more_sizes_and_samples():
    """Logistic with midpoint 1,000 and exponent 2: EMM = 1000 / 3 at .9."""
    rng, errors = np.random.default_rng(1), []
    for sizes, samples in ((5, 10**2), (17, 10**4), (65, 10**6)):
        n = np.geomspace(100, 3_200, sizes)
        ratios = rng.binomial(samples, 1 / (1 + (n / 1_000) ** 2)) / samples
        found = memorization.effective_memorization(n, ratios)
        errors.append(abs(np.log(found * 3 / 1_000)))
    assert errors[2] < 0.003 and errors[2] < errors[1] < errors[0]


def test_networks_that_differ_widen_the_interval_of_emm():
    """As many copies in all: by one seed, by equal seeds, by seeds that differ."""
    sizes, samples = [100, 400], 500
    interval = {
        name: memorization.effective_interval(sizes, counts, samples)
        for name, counts in {
            "one": [[475], [300]],
            "equal": [[475] * 4, [300] * 4],
            "differ": [[450, 500, 450, 500], [250, 350, 250, 350]],
        }.items()
    }
    width = {name: np.log(high / low) for name, (low, high) in interval.items()}
    assert width["equal"] == pytest.approx(width["one"] / 2, rel=0.1)  # 1 / sqrt(4)
    assert width["differ"] > 1.5 * width["equal"]
    # What never brackets the level says at least, or at most, that size.
    assert memorization.effective_interval(sizes, [[500], [490]], 500)[1] == 400
    assert memorization.effective_interval(sizes, [[400], [300]], 500) == (100, 100)


# The search for it.


def searched(curve, level=0.9, **options):
    """The sizes that are asked for, in order, and their ratios."""
    ratios, order = {}, []
    while (n := memorization.next_size(ratios, level, **options)) is not None:
        assert n not in ratios
        ratios[n] = curve(n)
        order.append(n)
    return order, ratios


def test_the_search_brackets_and_then_bisects_log_n():
    options = {"smallest": 10, "largest": 10_000, "tolerance": 0.5}
    order, _ = searched(lambda n: float(n <= 700), low=100, high=200, **options)
    assert order == [100, 200, 400, 800, 566]
    order, _ = searched(lambda n: float(n <= 30), low=100, high=200, **options)
    assert order == [100, 200, 50, 25, 35]


@settings(deadline=None)
@given(
    st.floats(0.5, 2_000),
    st.integers(1, 7),
    st.tuples(*[st.integers(1, 1_000)] * 4).map(sorted),
    st.sampled_from([0.03, 0.1, 0.5]),
)
def test_the_search_finds_the_crossing_of_any_decreasing_curve(
    crossing, multiple, ends, tolerance
):
    """R falls below the level at the crossing: it is bracketed, or censored."""
    smallest, low, high, largest = (n * multiple for n in ends)
    order, ratios = searched(
        lambda n: 0.9 if n <= crossing else 0.8,
        low=low, high=high, smallest=smallest, largest=largest,
        tolerance=tolerance, multiple=multiple,
    )  # fmt: skip
    assert all(n % multiple == 0 and smallest <= n <= largest for n in order)
    spread = np.log(largest / smallest)
    halvings = np.log2(max(1, spread / np.log1p(tolerance)))
    assert len(order) <= 2 + (spread / np.log(2) + 1) + (halvings + 2)
    has = [n for n in order if n <= crossing]
    lacks = [n for n in order if n > crossing]
    if not has:
        assert min(order) == smallest
    elif not lacks:
        assert max(order) == largest
    else:
        below, above = max(has), min(lacks)
        assert below <= crossing < above
        assert above <= (1 + tolerance) * below or above - below <= multiple


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=200, max_size=200), st.integers(1, 9))
def test_the_search_ends_whatever_is_measured(noise, multiple):
    order, ratios = searched(
        lambda n: noise[n - 1], 0.5, low=50, high=100, smallest=1, largest=200,
        tolerance=1e-6, multiple=multiple,
    )  # fmt: skip
    assert len(order) <= 2 + np.log2(200) + np.log2(200) + 1
    has = [n for n in order if ratios[n] >= 0.5]
    if has and max(has) != max(order):  # the largest that has it, to the next below
        assert min(n for n in order if n > max(has)) - max(has) <= multiple


def test_the_search_goes_on_from_sizes_that_were_measured_before():
    known = {100: 1.0, 200: 1.0, 333: 0.95, 400: 0.2}
    options = {"low": 100, "high": 200, "smallest": 10, "largest": 1_000}
    assert memorization.next_size(known, 0.9, **options) == 365
    assert memorization.next_size(known, 0.9, multiple=10, **options) == 360
    assert memorization.next_size(known | {5: 1.0}, 0.9, **options) == 365
    # One that is larger than all others, and no multiple, does not stop the doubling.
    known = {100: 1.0, 200: 1.0, 205: 1.0}
    assert memorization.next_size(known, 0.9, multiple=100, **options) == 400


@pytest.mark.parametrize(
    "rise, found",
    [
        ([0.0, 0.1, 0.3, 0.5, 0.7, 0.9], False),
        ([0.0] * 6, False),  # copies nothing yet
        ([0.0, 0.0, 0.02, 0.01, 0.02, 0.02], False),
        ([0.6] * 6, True),
        ([0.0, 0.3, 0.62, 0.6, 0.61, 0.6], True),
        ([0.0, 0.3, 0.6, 0.4, 0.3, 0.2], True),  # falls
        ([0.5, 0.51, 0.52, 0.53, 0.53, 0.54], True),  # within its intervals
        ([0.5, 0.5, 0.5, 0.5, 0.5, 0.8], False),  # the last one beats it
        ([0.6, 0.6, 0.6], False),  # fewer than patience and one
        ([], False),
    ],
)
def test_a_plateau_is_where_nothing_beats_the_best_before(rise, found):
    intervals = [memorization.wilson(round(250 * r), 250) for r in rise]
    intervals = np.reshape(intervals, (-1, 2))
    assert memorization.plateaued(rise, intervals, patience=3) == found


# Twins.


def test_equal_twins_have_cosine_one_and_mismatched_ones_do_not():
    a = RNG.normal(size=(200, 3, 4))
    found = memorization.reproducibility(a, a)
    np.testing.assert_allclose(found.cosine, 1)
    assert found.share == 1 and found.null == 0 and found.close.all()
    assert found.interval == memorization.wilson(200, 200)
    # Twins that have nothing in common: no pair is nearest to its own, cosines of 0.
    other = memorization.reproducibility(a, RNG.normal(size=a.shape))
    assert other.share <= 0.02 >= other.null
    error = 4 / np.sqrt(12 * 200)
    assert abs(other.cosine.mean()) < error and abs(other.cosine_null.mean()) < error


def test_a_close_pair_by_hand():
    """Points 0, 6, 100: 1.4 is close to 0 (1.4 < 4.6 / 3), and 1.6 is not."""
    b = np.array([[0.0], [6.0], [100.0]])
    found = memorization.reproducibility([[1.4], [6.0], [6.0]], b)
    np.testing.assert_array_equal(found.close, [True, True, False])
    assert found.null == pytest.approx(1 / 3)  # the third is a copy of the second
    found = memorization.reproducibility([[1.6], [6.0], [90.0]], b)
    np.testing.assert_array_equal(found.close, [False, True, True])
    # Twins of one point are close, though the other copy is as near.
    found = memorization.reproducibility([[0.1], [0.1], [9.0]], [[0.0], [0.0], [9.0]])
    assert found.close.all()


def test_the_cosine_is_about_the_mean_image_of_both():
    a, b = np.array([[4.0, 2.0], [0.0, 2.0]]), np.array([[2.0, 4.0], [2.0, 0.0]])
    np.testing.assert_allclose(memorization.reproducibility(a, b).cosine, 0, atol=1e-7)
    found = memorization.cosine(a, a[::-1], np.array([2.0, 2.0]))
    np.testing.assert_allclose(found, -1)
    assert memorization.cosine(np.ones((1, 2)), np.eye(2)[:1], np.ones(2)) == 0


@pytest.mark.parametrize(
    "call, words",
    [
        (([100, 200], [0.99, 0.95]), r"at all sizes \(100: 0.99, 200: 0.95\).* larger"),
        (([100, 200], [0.5, 0.4]), "below level=0.9 at all sizes .* smaller sizes"),
        (([100, 200], [0.99, 0.4], 1.0), r"level=1.0 must be in \(0, 1\)"),
        (([100, 200], [0.99, 0.4], 0.0), "level=0.0 .* eps=1;"),
        (([100], [0.9]), "1 sizes and 1 ratios: .* two sizes"),
        (([100, 200], [0.9]), "2 sizes and 1 ratios"),
        (([100, 100], [0.9, 0.1]), "each given once"),
        (([0, 100], [0.9, 0.1]), "must be positive"),
        (([10, 100], [0.9, np.nan]), "nan.* must be finite"),
    ],
)
def test_an_emm_that_is_not_there_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        memorization.effective_memorization(*call)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"level": 1.0}, "level=1.0"),
        ({"tolerance": 0.0}, "tolerance=0.0 positive"),
        ({"smallest": 0}, "smallest=0"),
        ({"smallest": 101, "largest": 109, "multiple": 10}, "multiple of 10"),
        ({"low": 5}, "low=5, high=200: must be in 10 .. 1000"),
        ({"low": 300}, "low=300, high=200"),
        ({"high": 2_000}, "high=2000"),
    ],
)
def test_a_search_without_meaning_is_refused(changes, words):
    options = {"level": 0.9, "low": 100, "high": 200, "smallest": 10, "largest": 1_000}
    with pytest.raises(ValueError, match=words):
        memorization.next_size({}, **(options | changes))


def test_counts_plateaus_and_twins_without_meaning_are_refused():
    for counts in ([[5], [-1]], [[11], [5]], [5, 4]):
        with pytest.raises(ValueError, match="samples=10"):
            memorization.effective_interval([10, 20], counts, 10)
    with pytest.raises(ValueError, match="patience=0"):
        memorization.plateaued([0.5], [[0.4, 0.6]], 0)
    with pytest.raises(ValueError, match=r"\(1, 2\) one pair for each of 2"):
        memorization.plateaued([0.5, 0.5], [[0.4, 0.6]], 1)
    with pytest.raises(ValueError, match="1 of the latter distinct"):
        memorization.reproducibility(np.eye(2), np.ones((2, 2)))
    with pytest.raises(ValueError, match=r"\(2, 2\) and \(1, 2\)"):
        memorization.reproducibility(np.eye(2), np.ones((1, 2)))
