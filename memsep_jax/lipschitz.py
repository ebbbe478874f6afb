"""Lipschitz constants of scores: spectral norms of Jacobians, probes, bounds."""

import jax
import jax.numpy as jnp

from memsep_jax.process import Process
from memsep_jax.score import ScoreFn


def jacobian_norm(score_fn: ScoreFn, x, t, key, iters: int = 50):
    """|| d score / d x ||_2 at one point, by power iteration on J'J.

    A lower bound that grows with iters; 50 separate the top of a gap of 10 % to 1e-4.

    Args: x [*e], t [], iters at least 1.   Returns: [].
    """
    if iters < 1:
        raise ValueError(f"iters={iters} must be at least 1")

    def at(x):
        return score_fn(x, t)

    _, transposed = jax.vjp(at, x)

    def forward(v):
        return jax.jvp(at, (x,), (v,))[1]

    def body(v, _):
        (pulled,) = transposed(forward(v))
        norm = jnp.linalg.norm(pulled)
        return pulled / jnp.where(norm > 0, norm, 1), None

    start = jax.random.normal(key, x.shape, x.dtype)
    v, _ = jax.lax.scan(body, start / jnp.linalg.norm(start), length=iters)
    return jnp.linalg.norm(forward(v))


def exact_norm(score_fn: ScoreFn, x, t):
    """|| d score / d x ||_2 at one point, from the whole Jacobian: for small d.

    Args: x [*e], t [].   Returns: [].
    """
    jacobian = jax.jacfwd(lambda x: score_fn(x, t))(x).reshape(x.size, x.size)
    return jnp.linalg.norm(jacobian, ord=2)


def local(score_fn: ScoreFn, xs, t, key, iters: int = 50):
    """The largest `jacobian_norm` over probes.   Args: xs [m, *e], t [].   [] out."""
    keys = jax.random.split(key, len(xs))
    norms = jax.vmap(lambda x, key: jacobian_norm(score_fn, x, t, key, iters))
    return jnp.max(norms(xs, keys))


def midpoints(data, m: int):
    """Midpoints of the m closest pairs of training points.

    There the empirical score explodes like sigma^-4, and not at the points
    themselves, where its norm is 1/v in the median. Scaled by alpha, they are the
    probes at time t.

    Args: data [n, *e].   Returns: [min(m, n (n - 1) / 2), *e], closest pair first.
    """
    n = len(data)
    if n < 2 or m < 1:
        raise ValueError(f"midpoints: m={m} of n={n} points: m >= 1 and n >= 2")
    squares = _squares(data)
    first, second = jnp.triu_indices(n, k=1)
    nearest = jnp.argsort(squares[first, second])[:m]
    return (data[first[nearest]] + data[second[nearest]]) / 2


def two_point(distance, process: Process, t):
    """The norm at the midpoint of two points: alpha^2 D^2 / (4 v^2) - 1/v, or 1/v.

    Args: distance [] between the points, t [].   Returns: [].
    """
    alpha2, v = process.alpha(t) ** 2, process.sigma(t) ** 2
    return jnp.maximum(alpha2 * distance**2 / (4 * v**2) - 1 / v, 1 / v)


def empirical_bounds(data, process: Process, t):
    """The bounds of Ye 2025, section 5, on the Lipschitz constant of the score.

    low = -1/v + alpha^2 D_min^2 / (16 v^2) holds where the two weights at the midpoint
    of the closest pair are at least 1/4: (n - 2) exp(-alpha^2 D_min^2 / (4 v)) <= 2;
    elsewhere, and always, 1/v does. high = max(1/v, alpha^2 D_max^2 / (4 v^2) - 1/v).

    Args: data [n, *e] distinct points, n >= 2; t [].   Returns: (low [], high []).
    """
    n = len(data)
    if n < 2:
        raise ValueError(f"empirical_bounds: n={n} points: at least 2")
    squares = _squares(data)
    smallest = jnp.min(squares + jnp.where(jnp.eye(n, dtype=bool), jnp.inf, 0))
    alpha2, v = process.alpha(t) ** 2, process.sigma(t) ** 2
    separated = (n - 2) * jnp.exp(-alpha2 * smallest / (4 * v)) <= 2
    low = jnp.where(separated, alpha2 * smallest / (16 * v**2) - 1 / v, 1 / v)
    high = alpha2 * jnp.max(squares) / (4 * v**2) - 1 / v
    return jnp.maximum(low, 1 / v), jnp.maximum(high, 1 / v)


def _squares(data):
    """|| x_i - x_j ||^2 [n, n], a row at a time: never [n, n, d]."""
    flat = data.reshape(len(data), -1)
    return jax.lax.map(lambda x: jnp.sum((flat - x[None]) ** 2, axis=1), flat)
