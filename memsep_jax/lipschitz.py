"""Lipschitz constants of scores: spectral norms of Jacobians, probes, bounds.

A norm is measured at a point, so the largest over any probes is a lower bound of the
Lipschitz constant. The upper bounds come from the paper for the empirical score, and
from the weights for a network.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from memsep_jax.process import Process, check_time
from memsep_jax.roots import length, root
from memsep_jax.sampling import path
from memsep_jax.score import Prediction, ScoreFn
from memsep_jax.shapes import Arr, Float, Keys, Num, Point, Points, Scalar


class Norm(NamedTuple):
    """|| d score / d x ||_2 as power iteration found it."""

    value: jax.Array  # [] never above the norm
    error: jax.Array  # [] how far above `value` its singular value may lie
    converged: jax.Array  # [] bool: error <= tolerance * value


def spectral_norm(
    score_fn: ScoreFn,
    x: Point,
    t: Scalar,
    key: Keys,
    iters: int = 50,
    tolerance: float = 1e-3,
    symmetric: bool = False,
) -> Norm:
    """|| d score / d x ||_2 at one point, by power iteration on J'J.

    With v the last direction, rho = |Jv|^2 and r = |J'Jv - rho v|, some eigenvalue of
    J'J lies within r of rho: value = sqrt(rho), error = sqrt(rho + r) - value. The norm
    is therefore never below `value`, and it is at most value + error unless the
    iteration sits at a smaller singular value, which no residual can reveal. A random
    start stays there for a while if the top singular values are close, or the top
    direction is one of very many. At convergence `value` is much closer than `error`
    says: it is off to second order in the angle to the top direction, `error` to first.

    The number of iterations is fixed, so that the cost is known beforehand, equal for
    all points of a batch, and reverse mode can follow.

    Args:
      iters: products with J and J', at least 1.
      tolerance: the relative error below which the iteration has converged.
      symmetric: take J' = J, which holds for the score of any law: forward mode alone
        then suffices, and it streams where the empirical score does. Wrong for
        networks, whose Jacobian need not be symmetric.
    Raises:
      ValueError: iters below 1, tolerance not positive.
    """
    if iters < 1:
        raise ValueError(f"iters={iters} must be at least 1")
    if not tolerance > 0:
        raise ValueError(f"tolerance={tolerance} must be positive, such as 1e-3")

    # Linearised once, since nothing else depends on the direction.
    push = jax.linearize(lambda x: score_fn(x, t), x)[1]

    def body(v, _):
        # Unit vectors only: norms of 1e10 are common, and their fourth powers, as in
        # |J'Jv|^2, overflow float32.
        u, value = _unit(push(v))
        pulled = push(u) if symmetric else jax.linear_transpose(push, u)(u)[0]
        return _unit(pulled)[0], (value, length(pulled - value * v))

    # A random start has a part in the top direction, almost surely; a fixed one may be
    # orthogonal to it.
    start, _ = _unit(jax.random.normal(key, x.shape, x.dtype))
    _, (values, residuals) = jax.lax.scan(body, start, length=iters)
    value, residual = values[-1], residuals[-1]
    # sqrt(rho + r) - sqrt(rho) without cancellation; residual = r / value.
    error = residual / (1 + jnp.sqrt(1 + residual / jnp.where(value > 0, value, 1)))
    return Norm(value, error, error <= tolerance * value)


def jacobian_norm(
    score_fn: ScoreFn,
    x: Point,
    t: Scalar,
    key: Keys,
    iters: int = 50,
    symmetric: bool = False,
) -> Scalar:
    """The value of `spectral_norm`: a lower bound that grows with iters."""
    return spectral_norm(score_fn, x, t, key, iters, symmetric=symmetric).value


def exact_norm(score_fn: ScoreFn, x: Point, t: Scalar) -> Scalar:
    """|| d score / d x ||_2 at one point, from the whole Jacobian: for small d."""
    jacobian = jax.jacfwd(lambda x: score_fn(x, t))(x).reshape(x.size, x.size)
    return jnp.linalg.norm(jacobian, ord=2)


def eigenvalues(
    score_fn: ScoreFn, x: Point, t: Scalar, key: Keys, iters: int = 50
) -> Float[Arr, " k"]:
    """Eigenvalues of (J + J') / 2 of a score at one point, by Lanczos' method.

    For the score of any law that is the Hessian of log p_t; the Jacobian of a network
    need not be symmetric. The first and last values come close to the smallest and the
    largest eigenvalue within few iterations, from inside; with d of them all values are
    exact.

    Args: iters, products with J and J'; more than d make no difference.
    Returns: k = min(iters, d) Ritz values, increasing.
    Raises: ValueError: iters below 1.
    Source: Lanczos 1950, with full orthogonalization.
    """
    if iters < 1:
        raise ValueError(f"iters={iters} must be at least 1")
    k = min(iters, x.size)
    push = jax.linearize(lambda x: score_fn(x, t), x)[1]
    pull = jax.linear_transpose(push, x)
    fresh = jax.random.normal(key, (k, x.size), x.dtype)
    tiny = 100 * jnp.finfo(x.dtype).eps

    def image(v):
        v = v.reshape(x.shape)
        return (push(v) + pull(v)[0]).reshape(-1) / 2

    def outside(basis, v):
        for _ in range(2):  # once leaves a part inside that is as large as rounding
            inside = jnp.matmul(basis, v, precision="highest")
            v = v - jnp.matmul(inside, basis, precision="highest")
        return v

    def body(carry, i):
        basis, v = carry
        new = outside(basis, v)
        # A space that J maps into itself is left by a new direction: -I / v, the
        # Jacobian at a copy, has such a space from the start.
        ends = length(new) <= tiny * length(v)
        unit, _ = _unit(jnp.where(ends, outside(basis, fresh[i]), new))
        after = image(unit)
        return (basis.at[i].set(unit), after), after

    start = jnp.zeros_like(fresh), fresh[0]
    (basis, _), images = jax.lax.scan(body, start, jnp.arange(k))
    projected = jnp.matmul(basis, images.T, precision="highest")
    return jnp.linalg.eigvalsh((projected + projected.T) / 2)


def frobenius(
    score_fn: ScoreFn, x: Point, t: Scalar, key: Keys, probes: int = 64
) -> tuple[Scalar, Scalar]:
    """|| d score / d x ||_F at one point: E |Ju|^2 over random signs u (Hutchinson).

    Returns: the value and its standard error.   Raises: ValueError: probes below 2.
    """
    if probes < 2:
        raise ValueError(
            f"probes={probes} must be at least 2: the standard error comes from them"
        )

    def square(u):
        return length(jax.jvp(lambda x: score_fn(x, t), (x,), (u,))[1]) ** 2

    signs = jax.random.rademacher(key, (probes, *x.shape), x.dtype)
    squares = jax.vmap(square)(signs)
    value = root(jnp.mean(squares))
    # The error is that of the mean square, through the slope 1 / (2 value) of the root.
    error = root(jnp.var(squares, ddof=1)) / jnp.sqrt(probes)
    return value, error / (2 * jnp.where(value > 0, value, 1))


def local(
    score_fn: ScoreFn,
    xs: Num[Arr, " m *e"],
    t: Scalar,
    key: Keys,
    iters: int = 50,
    symmetric: bool = False,
) -> Scalar:
    """The largest `jacobian_norm` over the probes xs."""
    keys = jax.random.split(key, len(xs))
    norms = jax.vmap(
        lambda x, key: jacobian_norm(score_fn, x, t, key, iters, symmetric)
    )
    return jnp.max(norms(xs, keys))


def along(
    score_fn: ScoreFn,
    process: Process,
    times: Float[Arr, " k"],
    xs: Num[Arr, " m *e"],
    key: Keys,
    method="heun",
    iters: int = 50,
    symmetric: bool = False,
) -> Norm:
    """`spectral_norm` along trajectories of the probability flow.

    Args:
      times: decreasing.   xs: where the trajectories start, at times[0].
      method: of `sampling.ode`; the others as `spectral_norm`.
    Returns:
      Norm of [m, k] arrays: one row per trajectory, one column per time.
    """
    walk = path(score_fn, process, times, method)

    def one(x, key):
        keys = jax.random.split(key, len(times))
        # One time after another: the batch in memory is the m trajectories.
        return jax.lax.map(
            lambda at: spectral_norm(score_fn, *at, iters, symmetric=symmetric),
            (walk(x), times, keys),
        )

    return jax.vmap(one)(xs, jax.random.split(key, len(xs)))


# Probes: on the segments between training points.


def midpoints(data: Points, m: int) -> Num[Arr, " k *e"]:
    """Midpoints of the m closest pairs of training points, closest pair first.

    There the empirical score explodes like sigma^-4, and not at the points themselves,
    where its norm is 1/v in the median. Scaled by alpha, they are the probes at time t.
    Pairs of copies come last: nothing lies between them. Memory grows with n, not n^2.

    Returns: k = min(m, n (n - 1) / 2) points.
    Raises: ValueError: m < 1, n < 2, or data that are not floats.
    """
    n = len(data)
    if n < 2 or m < 1:
        raise ValueError(f"midpoints: m={m} of n={n} points: m >= 1 and n >= 2")
    _check_floats(data)
    flat = data.reshape(n, -1)
    m = min(m, n * (n - 1) // 2)
    others = jnp.arange(n)

    def body(kept, row):
        """The m best of those kept and the pairs (i, j > i)."""
        squares, first, second = kept
        i, x = row
        new = jnp.sum((flat - x[None]) ** 2, axis=1)
        # Copies rank behind all other pairs (max), but before those that are no pairs
        # or were seen from their other end (inf).
        new = jnp.where(new > 0, new, jnp.finfo(new.dtype).max)
        new = jnp.where(others > i, new, jnp.inf)
        nearest, at = jax.lax.top_k(-jnp.concatenate([squares, new]), m)
        first = jnp.concatenate([first, jnp.full_like(others, i)])[at]
        second = jnp.concatenate([second, others])[at]
        return (-nearest, first, second), None

    nobody = jnp.zeros(m, others.dtype)
    start = jnp.full(m, jnp.inf, flat.dtype), nobody, nobody
    (_, first, second), _ = jax.lax.scan(body, start, (others, flat))
    return (data[first] + data[second]) / 2


def segments(key: Keys, data: Points, m: int) -> Num[Arr, " {m} *e"]:
    """Midpoints of m random pairs of training points, including distant pairs.

    As t falls, the Lipschitz constant comes from the farthest pair with no third point
    between them (the longest Delaunay edge), not from the closest pair.

    Raises: ValueError: m < 1, n < 2, or data that are not floats.
    """
    n = len(data)
    if n < 2 or m < 1:
        raise ValueError(f"segments: m={m} of n={n} points: m >= 1 and n >= 2")
    _check_floats(data)
    first_key, step_key = jax.random.split(key)
    first = jax.random.randint(first_key, (m,), 0, n)
    # 1 .. n - 1 places further on, so that no point is paired with itself.
    second = (first + jax.random.randint(step_key, (m,), 1, n)) % n
    return (data[first] + data[second]) / 2


# Bounds.


def two_point(distance: Scalar, process: Process, t: Scalar) -> Scalar:
    """The norm midway between two points: alpha^2 D^2 / (4 v^2) - 1/v, or 1/v."""
    check_time(t)
    alpha2, v = process.alpha(t) ** 2, process.sigma(t) ** 2
    return jnp.maximum(alpha2 * distance**2 / (4 * v**2) - 1 / v, 1 / v)


def empirical_bounds(
    data: Points, process: Process, t: Scalar
) -> tuple[Scalar, Scalar]:
    """The bounds of Ye 2025, section 5, on the Lipschitz constant of the score.

    low = -1/v + alpha^2 D_min^2 / (16 v^2) holds if the two weights at the midpoint of
    the closest pair are at least 1/4: (n - 2) exp(-alpha^2 D_min^2 / (4 v)) <= 2; 1/v
    always holds. high = max(1/v, alpha^2 D_max^2 / (4 v^2) - 1/v).

    Args: data, distinct points (with copies, low is 1/v).
    Returns: low, high.
    Raises: ValueError: n < 2, or data that are not floats.
    """
    n = len(data)
    if n < 2:
        raise ValueError(f"empirical_bounds: n={n} points: at least 2")
    check_time(t)
    _check_floats(data)
    flat = data.reshape(n, -1)

    def row(numbered):
        i, x = numbered
        squares = jnp.sum((flat - x[None]) ** 2, axis=1)
        others = jnp.where(jnp.arange(n) == i, jnp.inf, squares)
        return jnp.min(others), jnp.max(squares)

    # Row by row: all distances at once would take n^2 numbers.
    nearest, farthest = jax.lax.map(row, (jnp.arange(n), flat))
    smallest, largest = jnp.min(nearest), jnp.max(farthest)
    alpha2, v = process.alpha(t) ** 2, process.sigma(t) ** 2
    separated = (n - 2) * jnp.exp(-alpha2 * smallest / (4 * v)) <= 2
    low = jnp.where(separated, alpha2 * smallest / (16 * v**2) - 1 / v, 1 / v)
    high = alpha2 * largest / (4 * v**2) - 1 / v
    return jnp.maximum(low, 1 / v), jnp.maximum(high, 1 / v)


def network_bound(
    bound: Scalar, prediction: Prediction, process: Process, t: Scalar
) -> Scalar:
    """A bound for the score of a network with a Lipschitz constant of at most `bound`.

    The score is ((alpha skip - 1) x + alpha out F(scale x)) / sigma^2, so its constant
    is at most (|alpha skip - 1| + alpha |out| scale bound) / sigma^2. For `bound` see
    `models.mlp.lipschitz_bound`.
    """
    check_time(t)
    alpha = process.alpha(t)
    kept = jnp.abs(alpha * prediction.skip(t) - 1)
    steep = alpha * jnp.abs(prediction.out(t) * prediction.scale(t)) * bound
    return (kept + steep) / process.sigma(t) ** 2


def _unit(v):
    """v / |v| and |v|; zero stays zero."""
    norm = length(v)
    return v / jnp.where(norm > 0, norm, 1), norm


def _check_floats(data):
    # Differences of uint8 wrap around.
    if not jnp.issubdtype(data.dtype, jnp.floating):
        raise ValueError(
            f"data of dtype {data.dtype} have no distances here: give floats, such as "
            "data.from_uint8 of pixels"
        )
