"""Emitted points are counted, and foreseen as far as samples tell."""

from itertools import combinations

import numpy as np
import pytest

from memsep_jax import memorization, neighbours


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


def test_traits_by_hand():
    """Points on a line, one of them twice; the nearest others are counted by hand."""
    x = np.array([[0.0], [1.0], [3.0], [7.0], [1.0]], np.float32)
    near = neighbours.nearest(x, x, 3)
    labels = np.array([0, 0, 0, 1, 0])
    found = memorization.traits(x, near, labels, k=2)
    # Of 1, both times: 0 and 3 are the nearest other points.
    np.testing.assert_allclose(found.sparsity, [2, 1.5, 2.5, 5, 1.5])
    np.testing.assert_allclose(found.atypicality, [1.25, 0.25, 1.75, 0, 0.25])
    np.testing.assert_array_equal(found.repeats, [0, 1, 0, 0, 1])
    alone = memorization.traits(x, near, k=1)
    np.testing.assert_allclose(alone.sparsity, [1, 1, 2, 4, 1])
    np.testing.assert_allclose(alone.atypicality, np.abs(x[:, 0] - 2.4), rtol=1e-6)
    with pytest.raises(ValueError, match="give two columns at least"):
        memorization.traits(x, near._replace(distances=near.distances[:, :1]))


def test_rank_correlation_is_that_of_the_ranks():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=60), rng.integers(0, 5, 60)  # with ties

    def ranks(x):  # a tie has the mean of its ranks
        return np.array([np.sum(x < v) + (np.sum(x == v) + 1) / 2 for v in x])

    b = b + (a > 0)
    found = memorization.rank_correlation(a, b)
    r = np.corrcoef(ranks(a), ranks(b))[0, 1]
    z = 1.959964 * np.sqrt((1 + r**2 / 2) / 57)
    np.testing.assert_allclose(
        found, [r, *np.tanh(np.arctanh(r) + np.array([-z, z]))], rtol=1e-6
    )
    # Ranks alone count.
    np.testing.assert_allclose(memorization.rank_correlation(np.exp(a), b), found)


def test_the_interval_of_a_rank_correlation_holds_the_truth():
    """Spearman's of a normal law is 6 / pi arcsin(rho / 2); 400 draws of 50 pairs."""
    rng, rho = np.random.default_rng(1), 0.5
    truth = 6 / np.pi * np.arcsin(rho / 2)
    inside = []
    for _ in range(400):
        a, noise = rng.normal(size=(2, 50))
        b = rho * a + np.sqrt(1 - rho**2) * noise
        _, low, high = memorization.rank_correlation(a, b)
        inside.append(low < truth < high)
    # 4 standard errors of a share of 95 %.
    assert abs(np.mean(inside) - 0.95) < 4 * np.sqrt(0.95 * 0.05 / 400)


def test_rank_correlation_at_its_edges():
    line = np.arange(6.0)
    assert memorization.rank_correlation(line, 2 * line) == pytest.approx((1, 1, 1))
    assert memorization.rank_correlation(line, -line).value == pytest.approx(-1)
    assert np.isnan(memorization.rank_correlation(line, np.ones(6))).all()
    for a, b in ((line[:3], line[:3]), (line, line[:5])):
        with pytest.raises(ValueError, match="two of one length, at least 4"):
            memorization.rank_correlation(a, b)


def test_points_are_ranked_by_how_often_they_are_emitted():
    """Five distinct points, one of them twice, emitted 0, 1, 2, 3, 4 times."""
    x = np.array([[0.0], [1.0], [3.0], [1.0], [7.0], [20.0]], np.float32)
    own = neighbours.nearest(x, x, 2)
    emitted = np.repeat([1, 2, 4, 5], [1, 2, 3, 4])
    columns = {"place": x[:, 0], "against": -x[:, 0], "same": np.ones(6)}
    found = memorization.which(emitted, own, columns)
    assert found["place"] == pytest.approx((1, 1, 1))
    assert found["against"].value == pytest.approx(-1)
    assert np.isnan(found["same"].value)
    nothing = memorization.which([], own, columns)
    assert all(np.isnan(one.value) for one in nothing.values())
    with pytest.raises(ValueError, match="at least 4"):
        few = neighbours.nearest(x[:2], x[:2], 2)
        memorization.which([0], few, {"place": x[:2, 0]})
