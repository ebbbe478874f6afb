"""Sums over a training set, chunk by chunk, for one query x and one time t.

A matrix product gives the logits of a chunk, and those that matter, of the few nearest
points, are recomputed by differences, relative to the nearest point so far. This is as
accurate as differences at every sigma, as fast as the product, and exact for every
chunk size. `empirical` and `analytic` are made of it.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from memsep_jax.checks import is_known
from memsep_jax.process import check_time

# Points of each chunk that are recomputed by differences. The rounding of a product
# can only misplace points that are almost equally near, and those are few.
CONTENDERS = 16
LANES = 256  # of `_likeliest`: a top_k of so few takes less time than their maxima
# The log-weight of a point that is left out: finite, as inf - inf is NaN, and far
# enough from the end of float32, 3.4e38, for sums of a few of them.
NEVER = -1e37


class Sums(NamedTuple):
    """Sums over training points, with logits relative to the likeliest, the anchor."""

    anchor: jax.Array  # [d]
    log_weight: jax.Array  # [] of the anchor
    total: jax.Array  # [] sum of exp(logit), at least 1
    first: jax.Array  # [k] sum of exp(logit) value_i; the value is x_i as a rule
    moment: jax.Array  # [] sum of exp(logit) logit


def over_chunks(points, log_weights, size: int, of_chunk, merge):
    """The sums over all points [n, ...], `size` of them at a time.

    Args:
      log_weights: [n], finite: `floored`.
      of_chunk: (points [size, ...], log_weights [size]) -> sums, any arrays.
      merge: (sums, sums) -> sums.
    """
    n, size = len(points), min(size, len(points))

    def at(start):
        # Chunks have one size, as jit needs it, so the last one overlaps the one before
        # it; the points in both count once.
        begin = jnp.minimum(start, n - size)
        rows = jax.lax.dynamic_slice_in_dim(points, begin, size)
        prior = jax.lax.dynamic_slice_in_dim(log_weights, begin, size)
        prior = jnp.where(begin + jnp.arange(size) >= start, prior, NEVER)
        return of_chunk(rows, prior)

    starts = np.arange(0, n, size)
    first = at(0)
    if len(starts) == 1:  # without a loop it compiles in half the time
        return first

    def rest(sums):
        return jax.lax.scan(
            lambda sums, start: (merge(sums, at(start)), None), sums, starts[1:]
        )[0]

    # A derivative streams again, or it would keep batch x n weights of the score.
    return jax.checkpoint(rest, prevent_cse=False)(first)


def floored(log_weights, n: int, dtype):
    """Log-weights [n] that sums can take: finite, and 0 where none are given."""
    if log_weights is None:
        return jnp.zeros(n, dtype)
    return jnp.maximum(jnp.asarray(log_weights).astype(dtype), NEVER)


def chunk_sums(points, prior, x, alpha, v, values=None, contenders=CONTENDERS) -> Sums:
    """Sums of points [m, d] with log-weights prior [m], for x [d].

    The means are those of values [m, k], far fewer numbers than d, or of the points.
    """
    values = points if values is None else values
    # Logits up to a constant, |x|^2 / (2 v), that no weight depends on. A point of the
    # data is the centre, because rounding grows with the norms.
    squares = jnp.sum((points - points[:1]) ** 2, axis=1)
    # Against the moved query the product may take the points as they are: another
    # constant, and no centred copy of the chunk.
    moved = x - alpha * points[0]
    product = _product(points, moved)
    logits = alpha * (product - alpha * squares / 2) / v + prior
    nearest = jax.lax.optimization_barrier(
        _likeliest(jax.lax.stop_gradient(logits), min(contenders, len(points)))
    )
    best = nearest[0]
    anchor, at_best = points[best], prior[best]
    # One contender after another is faster on a CPU than gathering [batch, 16, d].
    exact = jax.lax.map(
        lambda i: _relative(points[i], anchor, x, alpha, v) + (prior[i] - at_best),
        nearest,
    )
    # No other point is likelier than the last contender, whatever rounding says.
    others = jnp.minimum(logits - logits[best], jnp.min(exact))
    # The likeliest by differences, which need not be the first by the product, becomes
    # the anchor: all logits are then at most 0, and exp cannot overflow.
    place, shift = nearest[jnp.argmax(exact)], jnp.max(exact)
    near, far = exact - shift, (others - shift).at[nearest].set(NEVER)
    of_near, of_far = jnp.exp(near), jnp.exp(far)
    first, _ = jax.lax.scan(
        lambda total, one: (total + one[0] * values[one[1]], None),
        (_weighted if values is points else _product)(of_far, values),
        (of_near, nearest),
    )
    return Sums(
        points[place],
        prior[place],
        jnp.sum(of_near) + jnp.sum(of_far),
        first,
        jnp.sum(of_near * near) + jnp.sum(of_far * far),
    )


def _likeliest(logits, count: int):
    """The places [count] of the largest of logits [m], the first one at their head.

    They are in the lanes (every LANES-th logit) with the largest maxima: on a CPU,
    maxima of whole rows take a third of the time of a top_k of all logits.
    """
    m = len(logits)
    if m < 4 * LANES:
        return jax.lax.top_k(logits, count)[1]
    rows, rest = divmod(m, LANES)
    best = jnp.max(logits[: m - rest].reshape(rows, LANES), axis=0)
    lanes = jax.lax.top_k(best.at[:rest].max(logits[m - rest :]), count)[1]
    places = (jnp.arange(rows + 1)[:, None] * LANES + lanes[None]).reshape(-1)
    some = logits.at[places].get(mode="fill", fill_value=-jnp.inf)
    return places[jax.lax.top_k(some, count)[1]]


@jax.custom_jvp
def _weighted(weights, points):
    """weights @ points; nothing is multiplied where all weights of a batch are 0.

    So it is for images and all but large sigma, as exp(-104) is 0 in float32. Under
    vmap, a loop goes on for as long as any point of the batch needs it, which no cond
    does. The weights change in it, or XLA would move the product out of the loop.
    """
    return jax.lax.while_loop(
        lambda left: jnp.any(left[0] > 0),
        lambda left: (jnp.zeros_like(weights), _product(left[0], points)),
        (weights, jnp.zeros_like(points[0])),
    )[1]


@partial(_weighted.defjvp, symbolic_zeros=True)
def _slope(at, moves):
    """By plain products, as reverse mode cannot follow a loop without a known end."""
    (weights, points), (by_weights, by_points) = at, moves
    slope = jnp.zeros_like(points[0])
    if not isinstance(by_weights, SymbolicZero):
        slope += _product(by_weights, points)
    if not isinstance(by_points, SymbolicZero):
        slope += _product(weights, by_points)
    return _weighted(weights, points), slope


def _product(a, b):
    # The barrier keeps XLA from fusing what follows into a slower product on CPUs.
    return jax.lax.optimization_barrier(jnp.matmul(a, b, precision="highest"))


def _relative(point, anchor, x, alpha, v):
    """log N(x; alpha point, v) - log N(x; alpha anchor, v), without cancellation."""
    return alpha * jnp.sum((point - anchor) * (x - alpha * (point + anchor) / 2)) / v


def merged(a: Sums, b: Sums, x, alpha, v) -> Sums:
    """The sums of both sets of points."""
    # By the anchors' difference, not that of two logits: each of these is about
    # |x|^2 / v, and a difference of them would be rounding only.
    ahead = _relative(b.anchor, a.anchor, x, alpha, v) + (b.log_weight - a.log_weight)
    shift_a, shift_b = jnp.minimum(-ahead, 0), jnp.minimum(ahead, 0)
    keep_a, keep_b = jnp.exp(shift_a), jnp.exp(shift_b)
    return Sums(
        jnp.where(ahead > 0, b.anchor, a.anchor),
        jnp.where(ahead > 0, b.log_weight, a.log_weight),
        keep_a * a.total + keep_b * b.total,
        keep_a * a.first + keep_b * b.first,
        # exp(s) s is 0 at s = NEVER, and in this order no product is infinite.
        keep_a * a.moment
        + (keep_a * shift_a) * a.total
        + keep_b * b.moment
        + (keep_b * shift_b) * b.total,
    )


def mean(sums: Sums):
    """The mean of the values by their weights; NaN where every point was left out.

    Any axes may stand before those of `Sums`.
    """
    some = sums.log_weight > NEVER / 2
    return jnp.where(some[..., None], sums.first / sums.total[..., None], jnp.nan)


def floats(points, dtype):
    """Points in the units of the model; uint8 pixels as `data.from_uint8` does."""
    points = jnp.asarray(points)
    return points.astype(dtype) / 127.5 - 1 if points.dtype == np.uint8 else points


def check_data(data, chunk, log_weights=None, temperature=1.0):
    """Refuses data, chunks and weights of which there are no sums: ValueError."""
    n = len(data)
    if n < 1 or chunk < 1:
        raise ValueError(f"n={n} points in chunks of {chunk}: both must be at least 1")
    if not (data.dtype == np.uint8 or jnp.issubdtype(data.dtype, jnp.floating)):
        raise ValueError(f"data of dtype {data.dtype}: give floats, or uint8 pixels")
    if log_weights is not None and jnp.shape(log_weights) != (n,):
        raise ValueError(
            f"log_weights of shape {jnp.shape(log_weights)} for n={n} "
            "points: give one number per point"
        )
    if is_known(temperature) and not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive")
    if is_known(data):
        seen = np.asarray(data)
        # min and max pass NaN on, and neither makes another array of this size.
        if not (np.isfinite(seen.min()) and np.isfinite(seen.max())):
            raise ValueError(
                "the data hold NaN or infinity: drop those points, for "
                "example data[numpy.isfinite(data).reshape(len(data), -1).all(1)]"
            )


def check_query(data, x, t):
    """Refuses a query that does not fit the data, and t <= 0: ValueError."""
    check_time(t)
    if jnp.shape(x) != data.shape[1:]:
        raise ValueError(
            f"a query of shape {jnp.shape(x)} and data of {data.shape[1:]}: "
            "it takes one point at a time, and jax.vmap makes the batch"
        )
    # One type on both sides, or promotion would decide the precision of the result.
    query, known = jnp.result_type(x), data.dtype
    if not jnp.issubdtype(query, jnp.floating) or known not in (np.uint8, query):
        raise ValueError(
            f"a query of dtype {query} and data of {known}: cast one of them"
        )
