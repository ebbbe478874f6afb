"""The noised training set Phat_t: weights, denoiser, score, Jacobian, density.

The empirical score is the global minimiser of the training loss; a network that
reaches it copies the training set.

At scale, the sums over the training set stream over chunks: a matrix product gives all
logits, and those that matter, of the few nearest points in each chunk, are recomputed
by differences, relative to the nearest point so far. This is as accurate as differences
at every sigma, as fast as the product, and exact for every chunk size. Data may be
float, or uint8 pixels, which mean u / 127.5 - 1.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec

from memsep_jax.checks import is_known
from memsep_jax.process import Process, check_time
from memsep_jax.score import ScoreFn, from_denoiser
from memsep_jax.shapes import Arr, Float, Int, Num, Point, Points, Scalar

CHUNK = 8_192  # points in a step: 100 MB as float32 if they are 32 x 32 x 3
# Points of each chunk that are recomputed by differences. The rounding of a product
# can only misplace points that are almost equally near, and those are few.
CONTENDERS = 16
# The log-weight of a point that is left out: finite, as inf - inf is NaN, and far
# enough from the end of float32, 3.4e38, for sums of a few of them.
NEVER = -1e37


class Posterior(NamedTuple):
    """The law of X_0 given X_t = x under the empirical law."""

    mean: jax.Array  # [*e] the denoiser
    entropy: jax.Array  # [] in nats; its exp is how many points x could come from
    largest: jax.Array  # [] the largest weight


class _Sums(NamedTuple):
    """Sums over training points, with logits relative to the likeliest, the anchor."""

    anchor: jax.Array  # [d]
    log_weight: jax.Array  # [] of the anchor
    total: jax.Array  # [] sum of exp(logit), at least 1
    first: jax.Array  # [d] sum of exp(logit) x_i
    moment: jax.Array  # [] sum of exp(logit) logit


def labelled(labels: Int[Arr, " n"], label: Int[Arr, ""]) -> Float[Arr, " n"]:
    """Log-weights of the label-conditional law: 0 for the points of a class, else -inf.

    Raises: ValueError: no point has the label.
    """
    same = jnp.asarray(labels) == label
    if is_known(same) and not np.any(same):
        raise ValueError(
            f"label={label} belongs to no training point: choose another, such as "
            f"{np.unique(labels)[:10].tolist()}"
        )
    return jnp.where(same, 0.0, -jnp.inf)


def posterior_weights(
    data: Points,
    process: Process,
    x: Point,
    t: Scalar,
    log_weights: Num[Arr, " n"] | None = None,
    temperature: float = 1.0,
) -> Float[Arr, " n"]:
    """p(X_0 = data[i] | X_t = x): how much each training point explains x.

    All at once and by differences: the oracle of the streaming forms. The weights sum
    to 1; log_weights and temperature as `posterior`.
    """
    _check_data(data, 1, log_weights, temperature)
    _check_query(data, x, t)
    # Differences, not |x|^2 - 2 x.y + |y|^2: that form is wrong in float32 as t -> 0.
    gaps = x[None] - process.alpha(t) * _floats(data, x.dtype)
    squares = jnp.sum(gaps**2, axis=tuple(range(1, gaps.ndim)))
    logits = -squares / (2 * temperature * process.sigma(t) ** 2)
    return jax.nn.softmax(logits if log_weights is None else logits + log_weights)


def posterior(
    data: Points,
    process: Process,
    chunk: int = CHUNK,
    log_weights: Num[Arr, " n"] | None = None,
    temperature: float = 1.0,
    mesh=None,
):
    """X_0 given X_t = x under the empirical law, streaming over the training set.

    Args:
      data: training points, float or uint8. Under jit, make them an argument of the
        compiled function rather than a constant inside it.
      chunk: points per step. The value does not depend on it; extra memory grows with
        it and the batch, never with batch x n.
      log_weights: log of how often each point counts, unnormalised; -inf leaves a point
        out. `labelled` makes those of one class.
      temperature: divides the logits; above 1 the weights are smoother.
      mesh: splits the data over its first axis; their sums are combined exactly.
    Returns:
      (x [*e], t []) -> Posterior.
    Raises:
      ValueError: no data, NaN, a chunk below 1, t <= 0, other shapes or dtypes.
    """
    sums = _streaming(data, process, chunk, log_weights, temperature, mesh)

    def at(x, t):
        all_points = sums(x, t)
        mean = all_points.first / all_points.total
        some = all_points.log_weight > NEVER / 2  # else every point was left out
        return Posterior(
            jnp.where(some, mean, jnp.nan).reshape(x.shape),
            jnp.log(all_points.total) - all_points.moment / all_points.total,
            1 / all_points.total,
        )

    return at


def denoiser(data: Points, process: Process, chunk: int = CHUNK, **options):
    """E[X_0 | X_t = x] under the empirical law, the theoretical optimum (Gu 2023, 2).

    Args: as `posterior`.
    Returns: (x [*e], t []) -> [*e], a convex combination of training points.
    """
    at = posterior(data, process, chunk, **options)
    return lambda x, t: at(x, t).mean


def score(data: Points, process: Process, chunk: int = CHUNK, **options) -> ScoreFn:
    """The empirical score -(1/sigma^2) sum_i w_i (x - alpha x_i) (Ye 2025, section 3).

    `jax.jvp` and `jax.linearize` of it stream too. The Jacobian is symmetric, so there
    is no need for reverse mode, which would keep batch x n weights.

    Args: as `posterior`.   Returns: score_fn(x [*e], t []) -> [*e].
    """
    return from_denoiser(denoiser(data, process, chunk, **options), process)


def log_prob(
    data: Points,
    process: Process,
    chunk: int = CHUNK,
    log_weights: Num[Arr, " n"] | None = None,
    mesh=None,
):
    """log phat_t(x), the density of the noised training set.

    Args: as `posterior`.   Returns: (x [*e], t []) -> [] in nats.
    """
    sums = _streaming(data, process, chunk, log_weights, 1.0, mesh)

    def at(x, t):
        all_points, v = sums(x, t), process.sigma(t) ** 2
        gap = x.reshape(-1) - process.alpha(t) * all_points.anchor
        if log_weights is None:
            norm = jnp.log(len(data))
        else:
            norm = jax.nn.logsumexp(log_weights)
        return (
            all_points.log_weight
            - norm
            + jnp.log(all_points.total)
            - (jnp.sum(gap**2) / v + x.size * jnp.log(2 * jnp.pi * v)) / 2
        )

    return at


def jacobian(
    data: Points,
    process: Process,
    x: Point,
    t: Scalar,
    log_weights: Num[Arr, " n"] | None = None,
    temperature: float = 1.0,
) -> Float[Arr, "d d"]:
    """d score / d x = -I/v + (alpha/v)^2 Cov_w(x_i), v = sigma^2 (Ye 2025, section 5).

    For small d only, as the result is [d, d]; log_weights and temperature as in
    `posterior`.
    """
    weights = posterior_weights(data, process, x, t, log_weights, temperature)
    points = _floats(data, x.dtype).reshape(len(data), -1)
    # "highest": float32 products are TF32 on GPUs and bfloat16 on TPUs by default.
    mean = jnp.tensordot(weights, points, 1, precision="highest")
    centred = points - mean[None]
    covariance = jnp.matmul(
        (weights[:, None] * centred).T, centred, precision="highest"
    )
    v = process.sigma(t) ** 2
    # The slope of the mean is Cov alpha / (v temperature), that of the score alpha / v
    # times it.
    steep = (process.alpha(t) / v) ** 2 / temperature
    return -jnp.eye(x.size) / v + steep * covariance


def _streaming(data, process, chunk, log_weights, temperature, mesh):
    """(x, t) -> _Sums over all of the data."""
    _check_data(data, chunk, log_weights, temperature)
    n, d = len(data), int(np.prod(data.shape[1:]))

    def gather(points, extra, x, t):
        scale = process.alpha(t), process.sigma(t) ** 2 * temperature
        size = min(chunk, len(points))

        def of_chunk(start):
            # Chunks have one size, as jit needs it, so the last one overlaps the one
            # before it; the points in both count once.
            begin = jnp.minimum(start, len(points) - size)
            rows = jax.lax.dynamic_slice_in_dim(points, begin, size)
            prior = jax.lax.dynamic_slice_in_dim(extra, begin, size)
            prior = jnp.where(begin + jnp.arange(size) >= start, prior, NEVER)
            return _chunk_sums(_floats(rows, x.dtype), prior, x, *scale)

        def body(sums, start):
            return _merged(sums, of_chunk(start), x, *scale), None

        starts = np.arange(0, len(points), size)
        first = of_chunk(0)
        if len(starts) == 1:  # without a loop it compiles in half the time
            return first

        def rest(sums):
            return jax.lax.scan(body, sums, starts[1:])[0]

        # A derivative streams again, or it would keep batch x n weights of the score.
        return jax.checkpoint(rest, prevent_cse=False)(first)

    def sums(x, t):
        _check_query(data, x, t)
        x, t = jnp.asarray(x).reshape(-1), jnp.asarray(t)
        points = jnp.asarray(data).reshape(n, d)
        extra = jnp.zeros(n, x.dtype) if log_weights is None else log_weights
        extra = jnp.maximum(extra.astype(x.dtype), NEVER)
        if mesh is None:
            return gather(points, extra, x, t)
        axis = mesh.axis_names[0]
        # Devices get equal shares; the points that fill the last one have weight 0.
        short = -n % mesh.shape[axis]
        points = jnp.pad(points, [(0, short), (0, 0)])
        extra = jnp.pad(extra, (0, short), constant_values=NEVER)

        def on_one_device(points, extra, x, t):
            sums, count = gather(points, extra, x, t), mesh.shape[axis]
            scale = process.alpha(t), process.sigma(t) ** 2 * temperature
            if count & (count - 1):  # no power of 2
                parts = jax.lax.all_gather(sums, axis)
                return jax.lax.scan(
                    lambda a, b: (_merged(a, b, x, *scale), None),
                    jax.tree.map(lambda a: a[0], parts),
                    jax.tree.map(lambda a: a[1:], parts),
                )[0]
            # Pair by pair: a device holds log2(count) copies of the sums, not count.
            place = jax.lax.axis_index(axis)
            for step in (2**i for i in range(count.bit_length() - 1)):
                pairs = [(i, i ^ step) for i in range(count)]
                other = jax.lax.ppermute(sums, axis, pairs)
                # Merged in the order of the devices, so that all of them round alike.
                before = partial(jnp.where, place & step == 0)
                low = jax.tree.map(before, sums, other)
                high = jax.tree.map(before, other, sums)
                sums = _merged(low, high, x, *scale)
            return sums

        split, everywhere = PartitionSpec(axis), PartitionSpec()
        return jax.shard_map(
            on_one_device,
            mesh=mesh,
            in_specs=(split, split, everywhere, everywhere),
            out_specs=everywhere,
            check_vma=False,  # the check cannot see that equal gathers give equal sums
        )(points, extra, x, t)

    return sums


def _chunk_sums(points, prior, x, alpha, v):
    """_Sums of points [c, d] with log-weights prior [c]."""
    count = min(CONTENDERS, len(points))
    # Logits up to a constant, |x|^2 / (2 v), that no weight depends on. A point of the
    # data is the centre, because rounding grows with the norms.
    squares = jnp.sum((points - points[:1]) ** 2, axis=1)
    # Against the moved query the product may take the points as they are: another
    # constant, and no centred copy of the chunk.
    moved = x - alpha * points[0]
    product = _product(points, moved)
    logits = alpha * (product - alpha * squares / 2) / v + prior
    nearest = jax.lax.optimization_barrier(
        jax.lax.top_k(jax.lax.stop_gradient(logits), count)[1]
    )
    best = nearest[0]
    anchor, at_best = points[best], prior[best]
    # One contender after another is faster on a CPU than gathering [batch, 16, d].
    contenders = jax.lax.map(
        lambda i: _relative(points[i], anchor, x, alpha, v) + (prior[i] - at_best),
        nearest,
    )
    # No other point is likelier than the last contender, whatever rounding says.
    others = jnp.minimum(logits - logits[best], jnp.min(contenders))
    # The likeliest by differences, which need not be the first by the product, becomes
    # the anchor: all logits are then at most 0, and exp cannot overflow.
    place, shift = nearest[jnp.argmax(contenders)], jnp.max(contenders)
    near, far = contenders - shift, (others - shift).at[nearest].set(NEVER)
    of_near, of_far = jnp.exp(near), jnp.exp(far)
    first, _ = jax.lax.scan(
        lambda total, one: (total + one[0] * points[one[1]], None),
        _weighted(of_far, points),
        (of_near, nearest),
    )
    return _Sums(
        points[place],
        prior[place],
        jnp.sum(of_near) + jnp.sum(of_far),
        first,
        jnp.sum(of_near * near) + jnp.sum(of_far * far),
    )


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


def _merged(a: _Sums, b: _Sums, x, alpha, v) -> _Sums:
    """The _Sums of both sets of points."""
    # By the anchors' difference, not that of two logits: each of these is about
    # |x|^2 / v, and a difference of them would be rounding only.
    ahead = _relative(b.anchor, a.anchor, x, alpha, v) + (b.log_weight - a.log_weight)
    shift_a, shift_b = jnp.minimum(-ahead, 0), jnp.minimum(ahead, 0)
    keep_a, keep_b = jnp.exp(shift_a), jnp.exp(shift_b)
    return _Sums(
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


def _floats(points, dtype):
    """Points in the units of the model; uint8 pixels as `data.from_uint8` does."""
    points = jnp.asarray(points)
    return points.astype(dtype) / 127.5 - 1 if points.dtype == np.uint8 else points


def _check_data(data, chunk, log_weights, temperature):
    n = len(data)
    if n < 1 or chunk < 1:
        raise ValueError(f"empirical: n={n} points in chunks of {chunk}: both >= 1")
    if not (data.dtype == np.uint8 or jnp.issubdtype(data.dtype, jnp.floating)):
        raise ValueError(
            f"empirical: data of dtype {data.dtype}: give floats, or uint8 pixels"
        )
    if log_weights is not None and jnp.shape(log_weights) != (n,):
        raise ValueError(
            f"empirical: log_weights of shape {jnp.shape(log_weights)} for n={n} "
            "points: give one number per point"
        )
    if is_known(temperature) and not temperature > 0:
        raise ValueError(f"empirical: temperature={temperature} must be positive")
    if is_known(data):
        seen = np.asarray(data)
        # min and max pass NaN on, and neither makes another array of this size.
        if not (np.isfinite(seen.min()) and np.isfinite(seen.max())):
            raise ValueError(
                "empirical: the data hold NaN or infinity: drop those points, for "
                "example data[numpy.isfinite(data).reshape(len(data), -1).all(1)]"
            )


def _check_query(data, x, t):
    check_time(t)
    if jnp.shape(x) != data.shape[1:]:
        raise ValueError(
            f"empirical: a query of shape {jnp.shape(x)} and data of {data.shape[1:]}: "
            "it takes one point at a time, and jax.vmap makes the batch"
        )
    # One type on both sides, or promotion would decide the precision of the result.
    query, known = jnp.result_type(x), data.dtype
    if not jnp.issubdtype(query, jnp.floating) or known not in (np.uint8, query):
        raise ValueError(
            f"empirical: a query of dtype {query} and data of {known}: cast one of them"
        )
