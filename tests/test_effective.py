"""EMM is where R(n) crosses the level, within its interval, and the search finds it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import FEW, SEEDS

from memsep_jax import memorization


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
    result = memorization.decreasing(values, weights)
    np.testing.assert_allclose(result, pooled(values, weights), atol=1e-12)
    several = memorization.decreasing(np.stack([values, values[::-1]]), weights)
    np.testing.assert_allclose(several[0], result, atol=1e-14)


def test_emm_is_linear_in_log_n_between_the_sizes():
    """From .95 at 100 to .85 at 400, .9 is in the middle of log n: 200."""
    result = memorization.effective_memorization([100, 400, 800], [0.95, 0.85, 0.1])
    assert result == pytest.approx(200)
    shuffled = memorization.effective_memorization([800, 100, 400], [0.1, 0.95, 0.85])
    assert shuffled == result
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


CURVES = {  # R(n), and its n of a level
    "logistic": (lambda n: 1 / (1 + (n / 1_000) ** 2), 0.5, 1_000.0),
    "linear in log n": (lambda n: 1 - np.log(n / 100) / 5, 0.8, 100 * np.e),
}


@pytest.mark.parametrize("law", CURVES)
@pytest.mark.parametrize("seeds", [1, 4])
def test_the_interval_of_emm_covers_as_often_as_it_says(law, seeds):
    """400 repeated experiments, within 4 standard errors of 95 %."""
    curve, level, truth = CURVES[law]
    sizes, samples, rng = np.geomspace(100, 10_000, 7), 300, np.random.default_rng(0)
    counts = rng.binomial(samples, curve(sizes)[:, None], (400, 7, seeds))
    result = np.array(
        [
            memorization.effective_interval(sizes, c, samples, level, i, draws=300)
            for i, c in enumerate(counts)
        ]
    )
    covered = np.mean((result[:, 0] <= truth) & (truth <= result[:, 1]))
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
        result = memorization.effective_memorization(n, ratios)
        errors.append(abs(np.log(result * 3 / 1_000)))
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
    "rise, result",
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
def test_a_plateau_is_where_nothing_beats_the_best_before(rise, result):
    intervals = [memorization.wilson(round(250 * r), 250) for r in rise]
    intervals = np.reshape(intervals, (-1, 2))
    assert memorization.plateaued(rise, intervals, patience=3) == result


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


@FEW
@given(SEEDS, st.sampled_from([0.5, 3.0, 1_000.0]))
def test_how_many_points_are_memorized_has_the_unit_of_a_size(seed, s):
    sizes, rng = np.array([100.0, 200.0, 400.0, 800.0]), np.random.default_rng(seed)
    ratios = np.sort(rng.random(4))[::-1] * [1, 1, 1, 0] + [1, 0, 0, 0]
    result = memorization.effective_memorization(sizes, np.minimum(ratios, 1))
    again = memorization.effective_memorization(s * sizes, np.minimum(ratios, 1))
    assert again == pytest.approx(s * result)
    counts = rng.binomial(50, [[1.0] * 2, [0.95] * 2, [0.6] * 2, [0.1] * 2])
    ends = memorization.effective_interval(sizes, counts, 50, draws=50)
    again = memorization.effective_interval(s * sizes, counts, 50, draws=50)
    assert again == pytest.approx(tuple(s * end for end in ends))

    values, weights = rng.normal(size=6), rng.random(6) + 0.1
    once = memorization.decreasing(values, weights)
    np.testing.assert_allclose(memorization.decreasing(once, weights), once)
    np.testing.assert_allclose(once @ weights, values @ weights)
    moved = memorization.decreasing(s * values + 1, 7 * weights)
    np.testing.assert_allclose(moved, s * once + 1)


def test_counts_and_plateaus_without_meaning_are_refused():
    for counts in ([[5], [-1]], [[11], [5]], [5, 4]):
        with pytest.raises(ValueError, match="samples=10"):
            memorization.effective_interval([10, 20], counts, 10)
    with pytest.raises(ValueError, match="patience=0"):
        memorization.plateaued([0.5], [[0.4, 0.6]], 0)
    with pytest.raises(ValueError, match=r"\(1, 2\) one pair for each of 2"):
        memorization.plateaued([0.5, 0.5], [[0.4, 0.6]], 1)
