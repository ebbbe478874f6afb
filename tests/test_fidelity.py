"""The Frechet distance against closed forms and scipy's matrix square root."""

import numpy as np
import pytest
import scipy.linalg
from absl import logging

from memsep_jax import fidelity


@pytest.fixture(autouse=True)
def quiet():
    logging.set_verbosity(logging.ERROR)
    yield
    logging.set_verbosity(logging.WARNING)


def test_a_set_is_at_distance_zero_from_itself_and_a_shift_is_its_square():
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
