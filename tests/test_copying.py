"""Distances and tests of copying see copies, and nothing else."""

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from hypothesis import given
from oracles import FEW, SCALES, SEEDS, alike, drawn

from memsep_jax import memorization
from memsep_jax.memorization import copying
from memsep_jax.neighbours import Neighbours, searcher

RNG = np.random.default_rng(0)


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


def test_calibrated_l2_by_hand():
    """d1 / (alpha mean d)."""
    found = memorization.calibrated_l2([[1.0, 2.0, 3.0], [0.0, 1.0, 5.0]])
    np.testing.assert_allclose(found, [1 / (0.5 * 2), 0])
    found = memorization.calibrated_l2([[1.0, 3.0]], alpha=0.25)
    np.testing.assert_allclose(found, [2.0])
    np.testing.assert_array_equal(memorization.calibrated_l2([[0.0, 0.0]]), [0])


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
    half = copying._fit(train[order[:5]], train[order[5:]])
    offset = -direct(held_out, train[order[:5]], half, np.full(5, 1 / 5)).mean() / 2
    assert found.offset == pytest.approx(offset, rel=1e-9)
    monkeypatch.setattr(copying, "PAIRS", 15)  # three points at a time
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


@FEW
@given(SEEDS, SCALES)
def test_the_worst_tile_moves_with_its_images(seed, s):
    a, b = drawn(seed, 2, 6, 4, 8, 3)
    truth = memorization.tiled_l2(a, b)
    alike(memorization.tiled_l2(s * a + 2, s * b + 2), s * truth)
    for turn in (
        lambda x: x.swapaxes(1, 2),
        lambda x: x[:, ::-1],
        lambda x: x[:, :, ::-1],
    ):
        np.testing.assert_allclose(memorization.tiled_l2(turn(a), turn(b)), truth)
    # A larger tile is no nearer than the worst of the small ones in it.
    assert np.all(memorization.tiled_l2(a, b, 2) >= truth)


@FEW
@given(SEEDS)
def test_c_t_sees_ranks_alone(seed):
    """Increasing functions change nothing; exchanging the samples flips the sign."""
    x, y = np.abs(drawn(seed, 30)).round(1), np.abs(drawn(seed, 25)).round(1)
    cells = np.arange(30) % 2, np.arange(25) % 2
    value = memorization.copying_test(x, cells[0], y, cells[1], least=5)
    for rise in (np.log1p, lambda d: 7 * d**3 + 1):
        again = memorization.copying_test(rise(x), cells[0], rise(y), cells[1], least=5)
        np.testing.assert_array_equal(again.scores, value.scores)
    rows = np.random.default_rng(seed).permutation(30)
    again = memorization.copying_test(x[rows], cells[0][rows], y, cells[1], least=5)
    assert again.value == pytest.approx(value.value)
    one = memorization.copying_test(x, 0 * cells[0], y, 0 * cells[1])
    other = memorization.copying_test(y, 0 * cells[1], x, 0 * cells[0])
    assert other.value == pytest.approx(-one.value)


@FEW
@given(SEEDS)
def test_fld_sees_no_order(seed):
    """Generated and held-out points; the order of the training set makes its halves."""
    sets = drawn(seed, 12, 2), drawn(seed, 9, 2), drawn(seed, 5, 2)
    rng = np.random.default_rng(seed)
    rows = rng.permutation(5)
    one = memorization.feature_likelihood(*sets)
    other = memorization.feature_likelihood(
        sets[0], rng.permutation(sets[1]), sets[2][rows]
    )
    np.testing.assert_allclose(other[:4], one[:4], rtol=1e-6)
    np.testing.assert_allclose(other.log_variances, one.log_variances[rows], atol=1e-5)


@pytest.mark.parametrize(
    "call, words",
    [
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
    ],
)
def test_a_test_of_copying_without_an_answer_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call(np.arange(8, dtype=np.float32).reshape(4, 2))
