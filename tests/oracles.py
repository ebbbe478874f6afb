"""What the tests of floor 0 share: oracles in float64 NumPy, and moves of data.

Nothing of jax is in an oracle, and its sums are loops. A law says how a result moves
with its data, x -> s Q x + c with a rotation Q. With the variance exploding process,
time moves as s t.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from memsep_jax import mixture, process

# About 30 roundings in sums and products, and exponents of size 10.
RTOL = {64: 1e-10, 32: 3e-5}

# Where compilation takes long, only CI tests the second width.
SLOW_32 = pytest.mark.parametrize(
    "bits", [64, pytest.param(32, marks=pytest.mark.slow)], indirect=True
)


def close(result, truth, bits):
    """Asserts the width, and equality to its rounding in units of the largest entry."""
    result, truth = jnp.asarray(result), np.asarray(truth)
    assert result.dtype == f"float{bits}" and truth.dtype == np.float64
    size = np.abs(truth).max()
    np.testing.assert_allclose(result, truth, RTOL[bits], RTOL[bits] * size)


class Formula(NamedTuple):
    """A process in NumPy; time is the inverse of noise = sigma / alpha."""

    alpha: Callable
    sigma: Callable
    drift: Callable
    rate: Callable  # g^2
    time: Callable

    def noise(self, t):
        return self.sigma(t) / self.alpha(t)


def integral(t):
    return 0.1 * t + 9.95 * t**2


FORMULAS = {
    "ornstein_uhlenbeck": Formula(
        lambda t: np.exp(-t / 2),
        lambda t: np.sqrt(1 - np.exp(-t)),
        lambda t: -0.5,
        lambda t: 1.0,
        lambda s: np.log(1 + s**2),
    ),
    "variance_preserving": Formula(
        lambda t: np.exp(-integral(t) / 2),
        lambda t: np.sqrt(1 - np.exp(-integral(t))),
        lambda t: -(0.1 + 19.9 * t) / 2,
        lambda t: 0.1 + 19.9 * t,
        lambda s: (np.sqrt(0.01 + 39.8 * np.log(1 + s**2)) - 0.1) / 19.9,
    ),
    "variance_exploding": Formula(
        lambda t: 1.0, lambda t: t, lambda t: 0.0, lambda t: 2 * t, lambda s: s
    ),
    "rectified_flow": Formula(
        lambda t: 1 - t,
        lambda t: t,
        lambda t: -1 / (1 - t),
        lambda t: 2 * t / (1 - t),
        lambda s: s / (1 + s),
    ),
}
PROCESSES = {name: make() for name, make in process.PROCESSES.items()}
OU, OU_FORMULA = PROCESSES["ornstein_uhlenbeck"], FORMULAS["ornstein_uhlenbeck"]
T = 0.40625  # float32 has it too


def normals(weights, means, covariances, x):
    """log p and grad log p of a mixture of dense normals."""
    p, slope = 0.0, 0.0
    for w, mean, covariance in zip(weights, means, covariances, strict=True):
        share = w * scipy.stats.multivariate_normal.pdf(x, mean, covariance)
        p += share
        slope -= share * np.linalg.inv(covariance) @ (x - mean)
    return np.log(p), slope / p


def posterior(points, shares, a, v, x, temperature=1.0):
    """Weights [n], mean and score [d], Jacobian [d, d], as their sums say."""
    kernel = [np.exp(-np.sum((x - a * p) ** 2) / (2 * v * temperature)) for p in points]
    weights = shares * np.array(kernel) / np.sum(shares * np.array(kernel))
    mean, covariance = 0.0, 0.0
    for w, p in zip(weights, points, strict=True):
        mean += w * p
    for w, p in zip(weights, points, strict=True):
        covariance += w * np.outer(p - mean, p - mean)
    slope = (a / v) ** 2 / temperature * covariance - np.eye(len(x)) / v
    return weights, mean, (a * mean - x) / v, slope


def density(points, shares, a, v, x):
    """sum_i share_i N(x; a x_i, v I)."""
    return sum(
        w * np.prod(scipy.stats.norm.pdf(x, a * p, np.sqrt(v)))
        for w, p in zip(shares, points, strict=True)
    )


def two_nearest(x, data):
    """d1, d2 and the index of the nearest: the second is another point, not a copy."""
    distances = [np.sqrt(np.sum((x - y) ** 2)) for y in data]
    first = int(np.argmin(distances))
    others = [
        distance
        for distance, y in zip(distances, data, strict=True)
        if not np.array_equal(y, data[first])
    ]
    return distances[first], min(others), first


def mean_and_error(values):
    n, mean = len(values), sum(values) / len(values)
    spread = sum((value - mean) ** 2 for value in values) / (n - 1)
    return mean, np.sqrt(spread / n)


# Laws. Few examples: each of them is a fact about all entries of an array.
FEW = settings(
    deadline=None,
    derandomize=True,
    max_examples=5,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # x64 has no state
)
SEEDS = st.integers(0, 999)
SCALES = st.sampled_from([0.05, 1.0, 30.0])
D = 3
VE = PROCESSES["variance_exploding"]


def drawn(seed, *shape):
    return np.random.default_rng([seed, *shape]).normal(size=shape)


def separated(seed, k, d, scale=2.0):
    """Unit normals about k means, as `mixture.separated` has them."""
    parts = np.full(k, -np.log(k)), scale * drawn(seed, k, d), np.ones((k, d))
    return mixture.Mixture(*map(jnp.asarray, parts))


def sampled(seed, law, n):
    """n draws of normals without factors [n, d]: nothing is compiled for them."""
    rng, (log_weights, means, variances) = np.random.default_rng(seed), law[:3]
    k = rng.choice(len(log_weights), n, p=np.exp(np.float64(log_weights)))
    spread = np.sqrt(np.asarray(variances)[k])
    return jnp.asarray(np.asarray(means)[k] + spread * rng.normal(size=spread.shape))


def turned(seed):
    """A rotation or reflection [D, D]."""
    return np.linalg.qr(drawn(seed, D, D))[0]


def alike(result, truth, rtol=1e-9):
    """Asserts equality to rounding in units of the largest entry, leaf by leaf."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a, b, rtol, rtol * np.max(np.abs(b), initial=0)
        ),
        result,
        truth,
    )


def lattice(seed, n, d=D):
    """n different points in eighths, many of them equally far from others."""
    cells = np.random.default_rng(seed).permutation(6**d)[:n]
    return np.stack(np.unravel_index(cells, [6] * d), axis=1) / 8


def moved_exactly(points, seed):
    """Scaled, shifted, coordinates exchanged and mirrored; and the scale.

    Powers of 2 move a lattice exactly, so that no tie may be decided otherwise.
    """
    rng = np.random.default_rng(seed)
    s, c = 2.0 ** rng.integers(-3, 4), rng.integers(-4, 5, D)
    order, signs = rng.permutation(D), rng.choice([-1, 1], D)
    return [s * (a[:, order] * signs + c) for a in points], s


def check_slopes(f, *args, step=1e-5, rtol=1e-6):
    """Reverse mode against a central difference, along one direction in all of args.

    All outputs are combined into one number.   Returns: the gradient.
    """
    rng, args = np.random.default_rng(0), jax.tree.map(np.asarray, args)

    @jax.jit
    @jax.value_and_grad
    def both(args):
        leaves = jax.tree.leaves(f(*args))
        return sum(jnp.sum(jnp.cos(jnp.arange(a.size)) * a.ravel()) for a in leaves)

    def moved(h):
        return both(jax.tree.map(lambda a, u: a + h * u, args, along))[0]

    along = jax.tree.map(lambda a: rng.normal(size=a.shape), args)
    slopes = both(args)[1]
    parts = jax.tree.map(lambda g, u: np.sum(np.asarray(g) * u), slopes, along)
    difference = float(moved(step) - moved(-step)) / (2 * step)
    np.testing.assert_allclose(sum(jax.tree.leaves(parts)), difference, rtol)
    return slopes


def known(name, seed):
    """A law of two components in NumPy."""
    places, widths = drawn(seed, 2, D), drawn(seed, 2, D, 1)[:, :, 0] ** 2
    log_weights = np.log([0.4, 0.6])
    if name == "boxes":
        return mixture.Boxes(log_weights, places, places + widths + 0.1, 0.3)
    factors = drawn(seed, 2, D, 2) if name == "planes" else None
    return mixture.Mixture(log_weights, places, widths + 0.1, factors)


def moved_law(law, s, c):
    law = law.moved(s, 0.0)
    places = set(law._fields) & {"means", "low", "high"}
    return law._replace(**{place: getattr(law, place) + c for place in places})
