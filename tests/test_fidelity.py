"""Quality of samples: closed forms, definitions in loops, scipy, prdc."""

import tracemalloc

import numpy as np
import pytest
import scipy.linalg
import scipy.special
from absl import logging
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import FEW, SCALES, SEEDS, D, alike, drawn, lattice, moved_exactly, turned

from memsep_jax import fidelity


@pytest.fixture(autouse=True)
def quiet():
    logging.set_verbosity(logging.ERROR)
    yield
    logging.set_verbosity(logging.WARNING)


def test_a_shift_is_at_its_square_and_a_scaling_at_its_trace():
    x = np.random.default_rng(0).normal(size=(300, 5))
    shift = np.arange(5.0)
    assert fidelity.frechet(x, x) < 1e-10
    np.testing.assert_allclose(
        fidelity.frechet(x, x + shift), shift @ shift, rtol=1e-10
    )
    # Tr(S + 4 S - 2 (4 S^2)^(1/2)) = Tr S, with the mean moved too.
    scaled = np.trace(np.cov(x.T)) + x.mean(axis=0) @ x.mean(axis=0)
    np.testing.assert_allclose(fidelity.frechet(x, 2 * x), scaled, rtol=1e-10)


@pytest.mark.parametrize("n", [4, 12, 200])
def test_it_is_the_matrix_square_root_of_the_definition(n):
    rng = np.random.default_rng(n)
    a, b = (
        rng.normal(size=(n, 10)),
        0.3 + rng.normal(size=(150, 10)) @ np.diag(np.linspace(0.5, 2, 10)),
    )
    s_a, s_b = np.cov(a.T), np.cov(b.T)
    # The eigenvalues of S_a S_b are real and not negative: the trace of its root.
    cross = np.sqrt(np.maximum(scipy.linalg.eigvals(s_a @ s_b).real, 0)).sum()
    gap = a.mean(axis=0) - b.mean(axis=0)
    truth = gap @ gap + np.trace(s_a + s_b) - 2 * cross
    np.testing.assert_allclose(fidelity.frechet(a, b), truth, rtol=1e-6)
    np.testing.assert_allclose(fidelity.frechet(b, a), truth, rtol=1e-6)
    of_a, of_b = fidelity.moments(a), fidelity.moments(b)
    np.testing.assert_allclose(of_a.factor.T @ of_a.factor, s_a, atol=1e-12)
    assert of_a.n == n and np.array_equal(of_a.mean, a.mean(axis=0))
    for pair in ((of_a, b), (a, of_b), (of_a, of_b)):
        assert fidelity.frechet(*pair) == fidelity.frechet(a, b)


def test_moments_are_refused_as_features_are():
    x = np.random.default_rng(0).normal(size=(9, 4))
    with pytest.raises(fidelity.UndefinedError, match="a covariance needs two"):
        fidelity.moments(x[:1])
    with pytest.raises(ValueError, match="NaN or infinite"):
        fidelity.moments(np.where(x > 1, np.nan, x))
    with pytest.raises(ValueError, match=r"not \(9, 4\) and \(9, 3\)"):
        fidelity.frechet(fidelity.moments(x), x[:, :3])


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("n, d", [(30, 100), (300, 20)])
def test_a_set_is_at_distance_zero_from_itself(n, d, offset):
    """Fewer points than features, constant features, one point many times."""
    x = np.random.default_rng(0).normal(size=(n, d)) + offset
    x[:, :5] = offset
    for a in (x, x.astype(np.float32), np.tile(x[:1], (9, 1))):
        for b in (a, a[::-1]):
            assert 0 <= fidelity.frechet(a, b) < 1e-9 * (1 + offset)


# The influence of a point on the Frechet distance.


@pytest.mark.parametrize("m", [2, 9])
def test_influence_on_a_line_is_the_derivative(m):
    """(m_a - m_b)^2 + (s_a - s_b)^2 by the weight of a point, which moves m_b, s_b."""
    rng = np.random.default_rng(m)
    a, b = rng.normal(size=(7, 1)), 1 + 2 * rng.normal(size=(m, 1))
    z, ratio = b[:, 0] - b.mean(), a.std(ddof=1) / b.std(ddof=1)
    truth = (1 - ratio) * (z**2 - (z**2).mean()) - 2 * (a.mean() - b.mean()) * z
    np.testing.assert_allclose(fidelity.influence(a, b), truth, rtol=1e-12, atol=1e-14)


def test_halves_differ_by_their_influence_to_third_order():
    rng = np.random.default_rng(0)
    a, b, move = rng.normal(size=(30, 3)), *rng.normal(size=(2, 30, 3))
    errors = []
    for size in (0.1, 0.05, 0.025):
        # Each point 1,000 times, as the divisor n - 1 of a covariance knows n.
        halves = [np.tile(b + s * move, (1_000, 1)) for s in (size, -size)]
        far = [fidelity.frechet(a, half) for half in halves]
        values = fidelity.influence(a, np.concatenate(halves))
        linear = np.subtract(*values.reshape(2, -1).mean(axis=1))
        errors.append(far[0] - far[1] - linear)
    # An eighth, but for terms of fifth order and 1 / 30,000.
    np.testing.assert_allclose(np.divide(errors[1:], errors[:-1]), 1 / 8, rtol=0.1)


@pytest.mark.parametrize("n", [9, 40])
def test_influence_sees_no_rotation_into_more_dimensions(n):
    """There the points are the factor of their covariance, and not its eigenvectors."""
    rng = np.random.default_rng(n)
    a, b = rng.normal(size=(n, 8)), 1 + rng.standard_t(4, size=(20, 8))
    basis = np.linalg.qr(rng.normal(size=(60, 8)))[0]
    few, many = fidelity.influence(a, b), fidelity.influence(a @ basis.T, b @ basis.T)
    np.testing.assert_allclose(few, many, atol=1e-6 * np.abs(few).max())
    assert abs(few.mean()) < 1e-12


# Precision and recall, density and coverage.


def dense(a, b, k):
    """[n, m] whether a_i is in the ball of b_j, pair by pair as defined."""
    inside = np.zeros((len(a), len(b)), bool)
    for j, centre in enumerate(b):
        others = [np.sum((centre - y) ** 2) for i, y in enumerate(b) if i != j]
        inside[:, j] = [np.sum((x - centre) ** 2) <= sorted(others)[k - 1] for x in a]
    return inside


def check_against_dense(a, b, k):
    forward, backward = dense(a, b, k), dense(b, a, k)
    shares = forward.any(axis=1).mean(), backward.any(axis=1).mean()
    assert fidelity.precision_recall(a, b, k) == pytest.approx(shares, rel=1e-12)
    held = forward.sum() / (k * len(a)), forward.any(axis=0).mean()
    assert fidelity.density_coverage(a, b, k) == pytest.approx(held, rel=1e-12)
    assert fidelity.balls(a, b, k, k) == pytest.approx((*shares, *held), rel=1e-12)


@pytest.mark.parametrize("tile", [3, 1_024])
@pytest.mark.parametrize("k, d, offset", [(1, 1, 0.0), (3, 4, 1e5), (7, 30, 0.0)])
def test_balls_are_those_of_the_definition(k, d, offset, tile, monkeypatch):
    """However the points are tiled, tiles with fewer than k points among them."""
    monkeypatch.setattr(fidelity, "TILE", tile)
    rng = np.random.default_rng(d)
    a, b = 0.8 * rng.normal(size=(23, d)), rng.normal(size=(32, d)) + 0.3
    a[:3], b[:4] = b[5:8], b[4]  # copies and duplicates
    check_against_dense(a + offset, b + offset, k)


coordinates = st.integers(-2, 2) | st.sampled_from([0.1, 0.3, 1e-9, 1e6])
features = st.integers(1, 3).flatmap(
    lambda d: st.tuples(
        *[st.lists(st.tuples(*[coordinates] * d), min_size=5, max_size=9)] * 2
    )
)


@settings(deadline=None, max_examples=60)
@given(sets=features, k=st.integers(1, 4), tile=st.integers(1, 6), seed=st.integers(0))
def test_ties_fall_as_defined_and_no_order_matters(sets, k, tile, seed):
    """Points of a lattice tie all the time; permuted sets have the same numbers."""
    a, b = (np.array(points, float) for points in sets)
    rng = np.random.default_rng(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fidelity, "TILE", tile)
        check_against_dense(a, b, k)
        for score in (fidelity.precision_recall, fidelity.density_coverage):
            assert score(rng.permutation(a), rng.permutation(b), k) == score(a, b, k)
    a, b = a[:5], b[:5]  # whole sets: a subset would depend on the order
    moved = fidelity.kid(rng.permutation(a), rng.permutation(b), subsets=1)
    here = fidelity.kid(a, b, subsets=1)
    scale = max(1, np.abs(a).max(), np.abs(b).max()) ** 6 * 27
    assert moved.value == pytest.approx(here.value, rel=1e-9, abs=1e-12 * scale)


def test_equal_sets_have_all_and_far_sets_nothing():
    """In equal sets a ball holds its centre and k others: density (k + 1) / k."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 8)).astype(np.float32)
    for shift in (0, 1e4):
        near = x.astype(np.float64) + shift
        assert fidelity.precision_recall(near, near[::-1]) == (1, 1)
        assert fidelity.density_coverage(near, near) == pytest.approx((6 / 5, 1))
    assert fidelity.precision_recall(x, x + 100) == (0, 0)
    assert fidelity.density_coverage(x, x + 100) == (0, 0)


def test_a_dropped_mode_costs_recall_and_an_invented_precision():
    rng = np.random.default_rng(1)
    one, two = rng.normal(size=(60, 3)), 50 + rng.normal(size=(20, 3))
    both = np.concatenate([one, two])
    assert fidelity.precision_recall(one, both) == (1, 60 / 80)
    assert fidelity.precision_recall(both, one) == (60 / 80, 1)
    density, coverage = fidelity.density_coverage(one, both)
    assert density == pytest.approx(6 / 5) and coverage == 60 / 80
    density, coverage = fidelity.density_coverage(both, one)
    assert density == pytest.approx(6 / 5 * 60 / 80) and coverage == 1


def test_a_copy_of_a_frequent_point_is_in_its_ball_of_radius_0():
    rng = np.random.default_rng(2)
    point = rng.normal(size=64)
    b = np.concatenate([np.tile(point, (6, 1)), 10 + rng.normal(size=(20, 64))])
    a = np.concatenate(
        [np.tile(point, (3, 1)), np.tile(np.nextafter(point, 9), (3, 1))]
    )
    assert fidelity.precision_recall(a, b, k=5)[0] == 3 / 6
    assert fidelity.density_coverage(a, b, k=5) == pytest.approx((6 / 5 / 2, 6 / 26))


def test_coverage_of_one_law_is_that_of_its_lemma():
    """1 - (n-1)...(n-k) / ((2n-1)...(2n-k)) for n fresh draws each (Naeem 2020)."""
    n, k, runs = 40, 3, 200
    rng = np.random.default_rng(3)
    result = [
        fidelity.density_coverage(rng.normal(size=(n, 2)), rng.normal(size=(n, 2)), k)
        for _ in range(runs)
    ]
    i = np.arange(1, k + 1)
    truth = 1, 1 - np.prod((n - i) / (2 * n - i))
    error = np.std(result, axis=0) / np.sqrt(runs)
    assert np.all(np.abs(np.mean(result, axis=0) - truth) < 4 * error)


@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.dev
def test_balls_are_those_of_the_program_of_their_authors(k, capsys):
    prdc = pytest.importorskip("prdc", reason="a program to compare with")
    rng = np.random.default_rng(k)
    a, b = rng.normal(size=(200, 32)), 0.1 + 1.1 * rng.normal(size=(250, 32))
    theirs = prdc.compute_prdc(b, a, nearest_k=k)
    capsys.readouterr()  # it prints
    ours = fidelity.precision_recall(a, b, k) + fidelity.density_coverage(a, b, k)
    names = ("precision", "recall", "density", "coverage")
    assert ours == pytest.approx([theirs[name] for name in names], rel=1e-12)


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_squared_distances_are_exact_for_copies_and_right_near_them(offset):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 30)) + offset
    y = x[::-1].copy()
    y[:20] += 1e-3 * rng.normal(size=(20, 30))
    truth = np.sum((x[:, None] - y[None]) ** 2, axis=2)
    result = fidelity.squared_distances(x, y)
    np.testing.assert_allclose(result, truth, rtol=1e-6)
    np.testing.assert_array_equal(result == 0, truth == 0)
    assert np.sum(result == 0) == 20


# The kernel distance.


def test_kid_is_the_double_sum_of_its_definition(monkeypatch):
    monkeypatch.setattr(fidelity, "TILE", 2)
    rng = np.random.default_rng(4)
    a, b = rng.normal(size=(5, 3)), 0.7 + rng.normal(size=(5, 3))

    def kernel(x, y):
        return (sum(u * v for u, v in zip(x, y, strict=True)) / 3 + 1) ** 3

    own = sum(
        kernel(c[i], c[j]) / 20
        for c in (a, b)
        for i in range(5)
        for j in range(5)
        if i != j
    )
    truth = own - 2 * sum(kernel(x, y) for x in a for y in b) / 25
    result = fidelity.kid(a, b, subsets=3)
    assert result.value == pytest.approx(truth, rel=1e-12)
    assert result.std < 1e-12  # each subset is the whole set
    assert fidelity.kid(b, a, subsets=1).value == pytest.approx(truth, rel=1e-12)


def test_kid_of_one_law_is_0_on_average_and_of_a_shift_is_its_mean():
    """d = 1: E k(x, y) from the moments of N(mu, 1); V-statistics would miss 0."""
    rng, runs = np.random.default_rng(5), 400

    def mean(mu):
        result = [
            fidelity.kid(rng.normal(size=(20, 1)), mu + rng.normal(size=(30, 1)), 2, 15)
            for _ in range(runs)
        ]
        values = np.array([kid.value for kid in result])
        return values.mean(), values.std() / np.sqrt(runs)

    def moments(mu):
        return np.array([1, mu, mu**2 + 1, mu**3 + 3 * mu])

    for mu in (0.0, 0.5):
        gap = moments(mu) - moments(0.0)
        truth = np.array([1, 3, 3, 1]) @ gap**2  # (xy + 1)^3, term by term
        result, error = mean(mu)
        assert abs(result - truth) < 4 * error


def test_kid_over_subsets_is_unbiased_and_follows_its_seed():
    rng = np.random.default_rng(6)
    a, b = rng.normal(size=(60, 4)), 0.5 + rng.normal(size=(80, 4))
    result = fidelity.kid(a, b, subsets=400, size=10)
    assert result == fidelity.kid(a, b, subsets=400, size=10)
    assert result != fidelity.kid(a, b, subsets=400, size=10, seed=1)
    assert result.std > 0
    # A subset of each is drawn uniformly: unbiased for the statistic of all pairs.
    z = [(c @ e.T / 4 + 1) ** 3 for c, e in ((a, a), (b, b), (a, b))]
    n, m = len(a), len(b)
    whole = (z[0].sum() - np.trace(z[0])) / (n * (n - 1)) - 2 * z[2].mean()
    whole += (z[1].sum() - np.trace(z[1])) / (m * (m - 1))
    assert abs(result.value - whole) < 4 * result.std / np.sqrt(400)


# Diversity.


def test_vendi_counts_what_has_nothing_in_common():
    """Equal points are one, orthogonal ones n; groups, exp of their shares' entropy."""
    rng = np.random.default_rng(0)
    point = rng.normal(size=7)
    assert fidelity.vendi(np.tile(point, (20, 1))) == pytest.approx(1)
    assert fidelity.vendi(point[None]) == pytest.approx(1)
    for n, d in ((5, 9), (9, 9)):
        directions = np.linalg.qr(rng.normal(size=(d, d)))[0][:n]
        assert fidelity.vendi(directions) == pytest.approx(n)
    shares = np.array([0.5, 0.3, 0.2])
    truth = np.exp(-shares @ np.log(shares))
    for d in (3, 40):  # more samples than features, and fewer
        groups = np.repeat(np.eye(d)[:3], [10, 6, 4], axis=0)
        lengths = rng.uniform(1e-3, 1e3, (20, 1))  # cosines do not see them
        assert fidelity.vendi(groups * lengths) == pytest.approx(truth)


@pytest.mark.parametrize("n, d", [(12, 30), (50, 8)])
def test_vendi_is_the_entropy_of_the_kernel_of_its_definition(n, d, monkeypatch):
    monkeypatch.setattr(fidelity, "TILE", 7)
    x = 0.5 + np.random.default_rng(n).normal(size=(n, d))
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    values = np.maximum(scipy.linalg.eigvalsh(unit @ unit.T / n), 0)
    truth = np.exp(-np.sum(scipy.special.xlogy(values, values)))
    assert fidelity.vendi(x) == pytest.approx(truth, rel=1e-10)
    with pytest.raises(ValueError, match="no direction"):
        fidelity.vendi(np.concatenate([x, np.zeros((1, d))]))


# However it is computed.

METRICS = {
    "frechet": lambda a, b: fidelity.frechet(a, b, warn=False),
    "influence": fidelity.influence,
    "precision_recall": fidelity.precision_recall,
    "density_coverage": fidelity.density_coverage,
    "kid": lambda a, b: fidelity.kid(a, b, subsets=2, size=50),
    "vendi": lambda a, b: fidelity.vendi(a),
}


@pytest.mark.parametrize("name", METRICS)
def test_metrics_are_of_float64_for_every_tile_and_type(name, monkeypatch):
    rng = np.random.default_rng(8)
    a, b = (
        (100 + rng.normal(size=(n, 6)).round(2)).astype(np.float32) for n in (70, 60)
    )
    truth = METRICS[name](a.astype(np.float64), b.astype(np.float64))
    assert METRICS[name](a, b) == pytest.approx(truth, rel=1e-12)
    for tile in (9, 64):
        monkeypatch.setattr(fidelity, "TILE", tile)
        assert METRICS[name](a, b) == pytest.approx(truth, rel=1e-9)


@pytest.mark.parametrize("name", METRICS)
def test_memory_does_not_grow_by_a_copy_in_float64(name, monkeypatch):
    monkeypatch.setattr(fidelity, "TILE", 32)
    features = np.random.default_rng(9).normal(size=(2, 700, 200)).astype(np.float32)

    def peak(n):
        tracemalloc.start()
        METRICS[name](*features[:, :n])
        result = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return result

    assert peak(700) - peak(250) < 8 * 450 * 200 / 2


@pytest.mark.parametrize("score", ["precision_recall", "density_coverage", "kid"])
def test_features_that_cannot_be_compared_are_refused(score):
    x, score_of = np.zeros((9, 4)), getattr(fidelity, score)
    with pytest.raises(ValueError, match=rf"{score} takes .*\(9, 4\) and \(9, 3\)"):
        score_of(x, x[:, :3])
    with pytest.raises(ValueError, match=rf"{score} takes features"):
        score_of(x[:, :0], x[:, :0])
    with pytest.raises(ValueError, match=f"{score}: features hold NaN"):
        score_of(x, np.where(x == 0, np.nan, x))
    with pytest.raises(ValueError, match=f"{score} of 9 against 1 samples"):
        score_of(x, x[:1])


def test_vendi_of_nothing_is_refused():
    with pytest.raises(ValueError, match="vendi of 0 against 0 samples"):
        fidelity.vendi(np.zeros((0, 4)))
    with pytest.raises(ValueError, match="vendi: features hold NaN"):
        fidelity.vendi(np.full((2, 4), np.nan))


def test_counts_that_make_no_sense_are_refused():
    x = np.zeros((4, 2))
    with pytest.raises(ValueError, match="k=4 other points need at least 5; .*lower k"):
        fidelity.precision_recall(x, np.zeros((9, 2)), k=4)
    for k in (0, -1):
        with pytest.raises(ValueError, match=f"k={k} neighbours must be at least 1"):
            fidelity.density_coverage(x, x, k)
    for bad in ({"subsets": 0}, {"size": 1}):
        with pytest.raises(ValueError, match="kid: subsets="):
            fidelity.kid(x, x, **bad)


@FEW
@given(SEEDS)
def test_balls_see_no_move(seed):
    a, b = lattice(seed, 14), lattice(seed + 1, 11)
    (c, d), _ = moved_exactly((a, b), seed)
    for of in (fidelity.precision_recall, fidelity.density_coverage):
        assert of(c, d, 3) == of(a, b, 3)


@FEW
@given(SEEDS, SCALES)
def test_distances_of_features_scale_and_see_no_rotation(seed, s):
    """Frechet by s^2; the kernel distance and Vendi see angles about 0, so no shift."""
    a, b, q = drawn(seed, 9, D), 0.5 + drawn(seed, 12, D), turned(seed)
    c, d = (s * x @ q.T + 40 * s for x in (a, b))

    def frechet(a, b):
        return fidelity.frechet(a, b, warn=False)

    alike(frechet(c, d), s**2 * frechet(a, b))
    alike(frechet(b[::-1], a), frechet(a, b))
    squares = fidelity.squared_distances(a, b)
    alike(fidelity.squared_distances(c, d), s**2 * squares)
    alike(fidelity.kid(a @ q.T, b @ q.T), fidelity.kid(a, b))
    assert fidelity.vendi(s * a @ q.T) == pytest.approx(fidelity.vendi(a))
    twice = np.concatenate([a, 3 * a[::-1]])  # as diverse as once
    assert fidelity.vendi(twice) == pytest.approx(fidelity.vendi(a))
