"""Emitted points are counted, and foreseen as far as samples tell."""

from itertools import combinations

import numpy as np
import pytest

from memsep_jax import memorization


def test_emission_by_hand():
    nearest = np.array([4, 2, 4, 9, 4, 2, 1])
    copied = np.array([1, 1, 1, 0, 1, 1, 1], bool)
    result = memorization.emitted(nearest, copied, 10)
    np.testing.assert_array_equal(result.points, [1, 2, 4])
    np.testing.assert_array_equal(result.counts, [1, 2, 3])
    assert (result.distinct, result.coverage) == (3, 0.3)
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
    result = memorization.rarefaction(counts, 8, range(9), 50)
    np.testing.assert_allclose(result, truth, rtol=1e-12)
    assert result[8] == len(counts)


def test_rarefaction_is_unbiased_below_and_close_above():
    """A uniform law on 100 points, copied by 60 % of 200 samples."""
    n, total, share, runs = 100, 200, 0.6, 400
    sizes, rng = np.array([1, 20, 100, 200, 300, 400]), np.random.default_rng(0)
    result = []
    for _ in range(runs):
        nearest, copied = rng.integers(0, n, total), rng.random(total) < share
        seen = memorization.emitted(nearest, copied, n)
        result.append(memorization.rarefaction(seen.counts, total, sizes, n))
    truth = n * (1 - (1 - share / n) ** sizes)
    error = np.std(result, axis=0) / np.sqrt(runs)
    gap = np.mean(result, axis=0) - truth
    assert np.all(np.abs(gap[:4]) <= 4 * error[:4] + 1e-12)
    assert np.all(np.abs(gap[4:]) < 0.02 * truth[4:])
    assert np.all(np.diff(result, axis=1) >= 0)


def test_the_extrapolated_number_is_a_lower_bound_for_uneven_laws():
    """Chao's: on average not above the truth, and above what was seen."""
    n, total, runs = 200, 300, 300
    law, rng = np.arange(1, n + 1) ** -1.0, np.random.default_rng(0)
    law /= law.sum()
    result = []
    for _ in range(runs):
        counts = rng.multinomial(total, law)
        result.append(memorization.rarefaction(counts, total, [total, 600, 10**9], n))
    mean = np.mean(result, axis=0)
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


@pytest.mark.parametrize(
    "call, words",
    [
        ((memorization.emitted, [0, 1], [True, True], 1), "2 .* points emitted of n=1"),
        ((memorization.rarefaction, [3, 2], 4, [1], 9), "5 copies of 2 .* total=4"),
        ((memorization.rarefaction, [3, 2], 6, [1], 1), "of n=1 points"),
        ((memorization.rarefaction, [3], 6, [-1], 9), r"sizes=\[-1.0\]"),
    ],
)
def test_counts_that_contradict_each_other_are_refused(call, words):
    function, *arguments = call
    with pytest.raises(ValueError, match=words):
        function(*arguments)
