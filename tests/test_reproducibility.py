"""Twin samples are close where one is a copy of the other."""

import numpy as np
import pytest
from hypothesis import given
from oracles import FEW, SEEDS, lattice, moved_exactly, two_nearest

from memsep_jax import memorization

RNG = np.random.default_rng(0)


def test_equal_twins_are_close_and_mismatched_ones_are_not():
    a = RNG.normal(size=(200, 3, 4))
    twins = memorization.reproducibility(a, a)
    np.testing.assert_allclose(twins.cosine, 1)
    assert twins.share == 1 and twins.null == 0 and twins.close.all()
    assert twins.interval == memorization.wilson(200, 200)
    # Twins that have nothing in common: no pair is nearest to its own, cosines of 0.
    other = memorization.reproducibility(a, RNG.normal(size=a.shape))
    assert other.share <= 0.02 >= other.null
    error = 4 / np.sqrt(12 * 200)
    assert abs(other.cosine.mean()) < error and abs(other.cosine_null.mean()) < error


def test_a_close_pair_by_hand():
    """Points 0, 6, 100: 1.4 is close to 0 (1.4 < 4.6 / 3), and 1.6 is not."""
    b = np.array([[0.0], [6.0], [100.0]])
    twins = memorization.reproducibility([[1.4], [6.0], [6.0]], b)
    np.testing.assert_array_equal(twins.close, [True, True, False])
    assert twins.null == pytest.approx(1 / 3)  # the third is a copy of the second
    twins = memorization.reproducibility([[1.6], [6.0], [90.0]], b)
    np.testing.assert_array_equal(twins.close, [False, True, True])
    # Twins of one point are close, though the other copy is as near.
    twins = memorization.reproducibility([[0.1], [0.1], [9.0]], [[0.0], [0.0], [9.0]])
    assert twins.close.all()


def test_the_cosine_is_about_the_mean_image_of_both():
    a, b = np.array([[4.0, 2.0], [0.0, 2.0]]), np.array([[2.0, 4.0], [2.0, 0.0]])
    np.testing.assert_allclose(memorization.reproducibility(a, b).cosine, 0, atol=1e-7)
    twins = memorization.cosine(a, a[::-1], np.array([2.0, 2.0]))
    np.testing.assert_allclose(twins, -1)
    assert memorization.cosine(np.ones((1, 2)), np.eye(2)[:1], np.ones(2)) == 0


def test_twins_are_loops_over_pairs(real):
    b = real(8, 2, 2)
    b[6] = b[1]
    a = np.float64(np.float32(b + np.linspace(0, 1, 8)[:, None, None] * real(8, 2, 2)))
    moved, centre = b[[-1, *range(7)]], (sum(a) + sum(b)) / 16

    def angle(x, y):
        x, y = (x - centre).ravel(), (y - centre).ravel()
        return x @ y / np.sqrt((x @ x) * (y @ y))

    def close_to(x, y):
        d1, d2, first = two_nearest(x, b)
        return d1 < d2 / 3 and np.array_equal(b[first], y)

    twins = memorization.reproducibility(a, b)
    flags = [close_to(x, y) for x, y in zip(a, b, strict=True)]
    null = np.mean([close_to(x, y) for x, y in zip(a, moved, strict=True)])
    np.testing.assert_array_equal(twins.close, flags)
    assert (twins.share, twins.null) == (np.mean(flags), null)
    assert 2 <= sum(flags) < 8
    for got, other in ((twins.cosine, b), (twins.cosine_null, moved)):
        want = [angle(x, y) for x, y in zip(a, other, strict=True)]
        np.testing.assert_allclose(got, want, atol=1e-5)
        np.testing.assert_allclose(memorization.cosine(a, other, centre), want)


@FEW
@given(SEEDS)
def test_twins_stay_twins_wherever_they_move(seed):
    rng, data = np.random.default_rng(seed), lattice(seed, 16)
    samples = data + rng.integers(-1, 2, data.shape) * (np.arange(16)[:, None] < 8) / 8
    (far, at), _ = moved_exactly((data, samples), seed)
    twins = memorization.reproducibility(samples, data)
    again = memorization.reproducibility(at, far)
    np.testing.assert_array_equal(again.close, twins.close)
    np.testing.assert_allclose(again.cosine, twins.cosine, atol=1e-5)


def test_twins_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="1 of the latter distinct"):
        memorization.reproducibility(np.eye(2), np.ones((2, 2)))
    with pytest.raises(ValueError, match=r"\(2, 2\) and \(1, 2\)"):
        memorization.reproducibility(np.eye(2), np.ones((1, 2)))
