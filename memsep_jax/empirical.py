"""The noised training set Phat_t: weights, denoiser, score, Jacobian, density.

The empirical score is the global minimiser of the training loss; a network that
reaches it copies the training set.

At scale, the sums over the training set stream over chunks, at the speed of a matrix
product and as accurate as differences: see `streaming`. Data may be float, or uint8
pixels, which mean u / 127.5 - 1.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from memsep_jax.checks import is_known
from memsep_jax.process import Process
from memsep_jax.score import ScoreFn, from_denoiser
from memsep_jax.shapes import Arr, Float, Int, Num, Point, Points, Scalar
from memsep_jax.streaming import (
    NEVER,
    check_data,
    check_query,
    chunk_sums,
    floats,
    floored,
    mean,
    merged,
    over_chunks,
)

CHUNK = 8_192  # points in a step: 100 MB as float32 if they are 32 x 32 x 3


class Posterior(NamedTuple):
    """The law of X_0 given X_t = x under the empirical law."""

    mean: jax.Array  # [*e] the denoiser
    entropy: jax.Array  # [] in nats; its exp is how many points x could come from
    largest: jax.Array  # [] the largest weight


def labelled(labels: Int[Arr, " n"] | None, label: Int[Arr, ""]) -> Float[Arr, " n"]:
    """Log-weights of the label-conditional law: 0 for the points of a class, else -inf.

    Raises: ValueError: no point has the label, or the data have none (labels=None).
    """
    if labels is None:
        raise ValueError(
            f"label={label} was asked of data without labels: leave log_weights out "
            "for the law of all points, or load data with labels"
        )
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
    check_data(data, 1, log_weights, temperature)
    check_query(data, x, t)
    # Differences, not |x|^2 - 2 x.y + |y|^2: that form is wrong in float32 as t -> 0.
    gaps = x[None] - process.alpha(t) * floats(data, x.dtype)
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
        return Posterior(
            mean(all_points).reshape(x.shape),
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
    points = floats(data, x.dtype).reshape(len(data), -1)
    # "highest": float32 products are TF32 on GPUs and bfloat16 on TPUs by default.
    centre = jnp.tensordot(weights, points, 1, precision="highest")
    centred = points - centre[None]
    covariance = jnp.matmul(
        (weights[:, None] * centred).T, centred, precision="highest"
    )
    v = process.sigma(t) ** 2
    # The slope of the mean is Cov alpha / (v temperature), that of the score alpha / v
    # times it.
    steep = (process.alpha(t) / v) ** 2 / temperature
    return -jnp.eye(x.size) / v + steep * covariance


def _streaming(data, process, chunk, log_weights, temperature, mesh):
    """(x, t) -> Sums over all of the data."""
    check_data(data, chunk, log_weights, temperature)
    n, d = len(data), int(np.prod(data.shape[1:]))

    def gather(points, extra, x, t):
        scale = process.alpha(t), process.sigma(t) ** 2 * temperature
        return over_chunks(
            points,
            extra,
            chunk,
            lambda rows, prior: chunk_sums(floats(rows, x.dtype), prior, x, *scale),
            lambda a, b: merged(a, b, x, *scale),
        )

    def sums(x, t):
        check_query(data, x, t)
        x, t = jnp.asarray(x).reshape(-1), jnp.asarray(t)
        points = jnp.asarray(data).reshape(n, d)
        extra = floored(log_weights, n, x.dtype)
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
                    lambda a, b: (merged(a, b, x, *scale), None),
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
                sums = merged(low, high, x, *scale)
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
