"""How much of a set of samples is copied from the training data.

A sample is memorized when its nearest training point is closer than a third of the
distance to the second nearest *distinct* one. The rate of held-out points is the null
level: what honest samples would score.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from memsep_jax.neighbours import Neighbours, distinct, searcher

RATIO = 1 / 3
BEGUN = 0.05  # the share of copies from which a run copies at all
ROUNDING = 1e-12  # of means: it must not decide whether a level is reached


class Ratio(NamedTuple):
    """The share of memorized samples, with all that it takes to believe it."""

    value: float
    interval: tuple[float, float]  # Wilson, 95 %
    null: float | None  # the same share of held-out points
    null_interval: tuple[float, float] | None
    neighbours: Neighbours
    memorized: np.ndarray  # [m] bool
    duplicates: int  # training points that repeat an earlier one


def nearest_two(x, data):
    """Distances to the nearest and to the second nearest *distinct* training point.

    Args: x [*e], data [n, *e].   Returns: [2].
    """
    axes = tuple(range(1, data.ndim))
    squares = jnp.sum((x[None] - data) ** 2, axis=axes)
    nearest = data[jnp.argmin(squares)]
    # A copy of a point that occurs twice has d1 = d2: only another point is second.
    same = jnp.all(data == nearest[None], axis=axes)
    return jnp.sqrt(
        jnp.stack([jnp.min(squares), jnp.min(squares, where=~same, initial=jnp.inf)])
    )


def memorized(x, data, ratio: float = RATIO):
    """Whether d1 < ratio d2.   Args: x [*e], data [n, *e].   Returns: bool []."""
    nearest, second = nearest_two(x, data)
    return nearest < ratio * second


def ratio(
    samples, data, held_out=None, threshold: float = RATIO, chunk: int = 256
) -> Ratio:
    """The memorization ratio, its interval, and the null level of held-out points.

    Args:
      samples: [m, *e] generated points.   data: [n, *e] the training set.
      held_out: [l, *e] points that were not trained on, or None.
    Raises:
      ValueError: no samples, a threshold outside (0, 1), or fewer than two distinct
        training points, for which a second neighbour does not exist.
    Source: Gu 2023, section 2; Ye 2025, section 6.
    """
    if not 0 < threshold < 1:
        raise ValueError(f"threshold={threshold} must be in (0, 1); the papers use 1/3")
    if len(samples) < 1:
        raise ValueError("no samples: the memorization ratio needs at least one")
    count = len(distinct(data))
    if count < 2:
        raise ValueError(
            f"the memorization ratio needs two distinct training points and got {count}"
            ": use more data, or the distance to the nearest one (neighbours.nearest, "
            "k=1)"
        )
    search = searcher(data, 2, chunk)
    null = held_out is not None and len(held_out) > 0
    held = search(held_out) if null else None
    return ratio_of(search(samples), held, len(data) - count, threshold)


def ratio_of(
    found: Neighbours, held_out: Neighbours | None, duplicates: int, threshold=RATIO
) -> Ratio:
    """`ratio`, from neighbours that were already searched."""
    copied = _below(found, threshold)
    null = None if held_out is None else _below(held_out, threshold)
    return Ratio(
        value=float(copied.mean()),
        interval=wilson(int(copied.sum()), len(copied)),
        null=None if null is None else float(null.mean()),
        null_interval=None if null is None else wilson(int(null.sum()), len(null)),
        neighbours=found,
        memorized=copied,
        duplicates=duplicates,
    )


def wilson(count: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of a share, 95 % by default (Wilson 1927)."""
    if not 0 <= count <= total or total < 1:
        raise ValueError(f"count={count} of total={total} is not a share")
    share, z2 = count / total, z * z
    centre = share + z2 / (2 * total)
    half = z * np.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    low, high = (centre - half) / (1 + z2 / total), (centre + half) / (1 + z2 / total)
    # Rounding must not put the share itself outside.
    return float(min(max(low, 0.0), share)), float(max(min(high, 1.0), share))


def calibrated_l2(distances, alpha: float = 0.5):
    """d_1 / (alpha mean_{y in S} ||g - y||): small where a sample is a copy.

    Args: distances [m, k] to the k nearest training points, sorted (the paper's S has
      k = 50).   Returns: [m].   Source: Carlini 2023, section 5.1.
    """
    distances = np.asarray(distances)
    mean = alpha * distances.mean(axis=1)
    return np.divide(distances[:, 0], mean, out=np.zeros_like(mean), where=mean > 0)


def _below(found, threshold):
    return found.distances[:, 0] < threshold * found.distances[:, 1]


# How many points a model can memorize.


def effective_memorization(sizes, ratios, level: float = 0.9, weights=None) -> float:
    """Effective model memorization: EMM = max{n : R(n) >= level}.

    More points are never easier to memorize: R is made non-increasing in n by isotonic
    regression, and is linear in log n between the sizes.

    Args:
      sizes: [s], in any order.   ratios: [s], memorization ratios of networks trained
        on so many points.   level: 1 - eps.   weights: [s], samples; equal by default.
    Raises:
      ValueError: the sizes do not bracket the level, fewer than two of them, or one
        that is repeated or not positive; a level outside (0, 1).
    Source: Gu 2023, definition 1.
    """
    order, sizes = _check_sizes(sizes, ratios, level)
    weights = np.ones(len(sizes)) if weights is None else np.asarray(weights, float)
    fit = decreasing(np.asarray(ratios, float)[order], weights[order])
    found = ", ".join(f"{n:g}: {r:.3g}" for n, r in zip(sizes, fit, strict=True))
    if fit[-1] >= level - ROUNDING:
        raise ValueError(
            f"R(n) is at least level={level} at all sizes ({found}): the largest n "
            "that has it is not below them; add larger sizes"
        )
    if fit[0] < level - ROUNDING:
        raise ValueError(
            f"R(n) is below level={level} at all sizes ({found}): the largest n that "
            "has it is not above them; add smaller sizes, or train longer"
        )
    return float(_last(sizes, fit, level))


def effective_interval(
    sizes, memorized, samples: int, level: float = 0.9, seed: int = 0, draws: int = 2000
) -> tuple[float, float]:
    """A 95 % interval of `effective_memorization`, by a bootstrap over two levels.

    Seeds are drawn with replacement within each size, then samples from the binomial
    law of each seed. What the seeds differ by is first stretched about their mean, so
    that the mean over drawn seeds varies as the mean over seeds does (Davison and
    Hinkley 1997, section 3.8); with one seed only samples are drawn, and the interval
    knows of no other network. A replicate that does not bracket the level is put at
    the smallest or largest size: an end there says "at most" or "at least" that size.

    With few seeds (under five) the interval is too narrow where networks differ by
    more than their samples do, for it knows no more than those seeds. Nor does it know
    that sizes were chosen by what was measured, or that R may bend between them: with a
    factor of 2 between sizes, EMM of 1 / (1 + (n / m)^2) at .9 comes out 8 % too low.

    Args:
      sizes: [s].   memorized: [s, seeds], how many of `samples` samples of each network
        are copies.
    Raises: ValueError, as `effective_memorization`, and for counts outside 0..samples.
    """
    counts = np.asarray(memorized, float)
    order, sizes = _check_sizes(sizes, counts, level)
    if (
        counts.ndim != 2
        or samples < 1
        or not ((counts >= 0) & (counts <= samples)).all()
    ):
        raise ValueError(
            f"memorized={counts.tolist()} must be [sizes, seeds], each count in "
            f"0 .. samples={samples}, of at least one sample"
        )
    rng, shares = np.random.default_rng(seed), counts[order] / samples
    seeds = shares.shape[1]
    if seeds > 1:
        mean = shares.mean(axis=1, keepdims=True)
        spread = shares.var(axis=1, ddof=1, keepdims=True)
        within = (shares * (1 - shares)).mean(axis=1, keepdims=True) / samples
        between = np.maximum(spread - within, 0) * seeds / (seeds - 1)
        stretch = np.sqrt(
            np.divide(between, spread, out=np.zeros_like(spread), where=spread > 0)
        )
        shares = np.clip(mean + stretch * (shares - mean), 0, 1)
    chosen = rng.integers(0, seeds, (draws, *shares.shape))
    drawn = np.take_along_axis(shares[None], chosen, axis=2)
    ratios = rng.binomial(samples, drawn).mean(axis=2) / samples
    found = _last(sizes, decreasing(ratios, np.ones(len(sizes))), level)
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def decreasing(values, weights):
    """The nearest non-increasing values, by weighted squares: isotonic regression.

    Args: values [..., s], weights [s].   Returns: [..., s].
    Source: the min-max formula, Robertson 1988, theorem 1.4.4.
    """

    def sums(a):
        return np.concatenate([np.zeros_like(a[..., :1]), np.cumsum(a, -1)], -1)

    # means[..., a, b]: of the values a .. b.
    total, weight = sums(values * weights), sums(weights)
    rises = total[..., None, 1:] - total[..., :-1, None]
    width = weight[None, 1:] - weight[:-1, None]
    upper = np.triu(np.ones(width.shape, bool))
    means = np.where(upper, rises / np.where(upper, width, 1), -np.inf)
    # The least over a <= i of the largest over b >= i.
    largest = np.maximum.accumulate(means[..., ::-1], axis=-1)[..., ::-1]
    return np.min(np.where(upper, largest, np.inf), axis=-2)


def _last(sizes, fit, level):
    """The largest n with the level on non-increasing [..., s]; at the ends, the end."""
    above = np.sum(fit >= level - ROUNDING, axis=-1)[..., None]
    i = np.clip(above - 1, 0, len(sizes) - 2)
    high, low = (np.take_along_axis(fit, j, -1)[..., 0] for j in (i, i + 1))
    drop = np.where(high > low, high - low, 1)
    part = np.where(high > low, (high - level) / drop, above[..., 0] > 1)
    start, end = (sizes[j[..., 0]] for j in (i, i + 1))
    return start * (end / start) ** np.clip(part, 0, 1)


def _check_sizes(sizes, ratios, level):
    """The order of the sizes, and them in it.   Raises: ValueError."""
    sizes, ratios = np.asarray(sizes, float), np.asarray(ratios, float)
    if not 0 < level < 1:
        raise ValueError(
            f"level={level} must be in (0, 1): it is 1 - eps, and eps={1 - level:.3g}; "
            "the paper uses eps=0.1"
        )
    if len(sizes) < 2 or len(sizes) != len(ratios):
        raise ValueError(
            f"{len(sizes)} sizes and {len(ratios)} ratios: give one ratio for each of "
            "at least two sizes"
        )
    if len(np.unique(sizes)) < len(sizes) or not sizes.min() > 0:
        raise ValueError(f"sizes={sizes.tolist()} must be positive, each given once")
    if not np.isfinite(ratios).all():
        raise ValueError(f"ratios={ratios.tolist()} must be finite")
    order = np.argsort(sizes)
    return order, sizes[order]


def next_size(
    ratios: dict[int, float],
    level: float,
    low: int,
    high: int,
    smallest: int,
    largest: int,
    tolerance: float = 0.1,
    multiple: int = 1,
) -> int | None:
    """Where to measure R(n) next, to find the largest n with R(n) >= level.

    First at `low` and `high`. While the level is nowhere, half of the smallest n so
    far; while the largest n so far has it, twice that; then between the largest n that
    has it and the next larger one that was measured, at the middle of log n. Whatever
    is measured, each n is asked for once, and the bracket shrinks each time.

    Args:
      ratios: R(n) of all sizes so far, asked for or not.
      smallest, largest: no n outside is asked for.   multiple: of what n must be a
        multiple, such as the number of classes; the limits are rounded inwards.
      tolerance: it ends when the bracket's quotient is at most 1 + tolerance.
    Returns:
      n, or None: it is bracketed so closely, or `smallest` lacks the level, or
      `largest` has it: EMM is then censored.
    Raises:
      ValueError: arguments that break these rules.
    """
    first, last = -(-smallest // multiple) * multiple, largest // multiple * multiple
    if not (0 < level < 1 and smallest >= 1 and first <= last and tolerance > 0):
        raise ValueError(
            f"level={level} must be in (0, 1), tolerance={tolerance} positive, and a "
            f"multiple of {multiple} in smallest={smallest} .. largest={largest}"
        )
    if not first <= low <= high <= last:
        raise ValueError(
            f"low={low}, high={high}: must be in {first} .. {last}, in this order"
        )
    for start in (low, high):
        if (n := start // multiple * multiple) not in ratios:
            return n
    has = [n for n, ratio in ratios.items() if ratio >= level]
    if not has:
        least = min(ratios)
        return max(first, least // 2 // multiple * multiple) if least > first else None
    most = max(has)
    if most == max(ratios):
        more = max(2 * most, most + multiple) // multiple * multiple
        return min(last, more) if most < last else None
    above = min(n for n in ratios if n > most)
    # Multiples strictly between the two.
    begin = max(most, first - 1) // multiple + 1
    end = -(-min(above, last + 1) // multiple) - 1
    if above <= (1 + tolerance) * most or begin > end:
        return None
    return min(max(round((most * above) ** 0.5 / multiple), begin), end) * multiple


def plateaued(ratios, intervals, patience: int) -> bool:
    """Whether memorization has stopped rising along training, so that it may end.

    True once copying has begun, and no lower bound of the last `patience` snapshots is
    above the best ratio before them. It has begun where a lower bound before them is
    above 5 %: a run that copies nothing yet has not plateaued. What rises by less than
    its interval within `patience` snapshots is taken for a plateau; snapshots should
    be equally many epochs apart.

    Args: ratios [k], intervals [k, 2] (`wilson`), in the order of the snapshots.
    Raises: ValueError: patience below 1, or shapes that differ.
    """
    ratios, intervals = np.asarray(ratios, float), np.asarray(intervals, float)
    if patience < 1 or intervals.shape != (len(ratios), 2):
        raise ValueError(
            f"patience={patience} must be at least 1, and intervals of shape "
            f"{intervals.shape} one pair for each of {len(ratios)} ratios"
        )
    if len(ratios) <= patience:
        return False
    begun = intervals[:-patience, 0].max() > BEGUN
    return bool(begun and intervals[-patience:, 0].max() <= ratios[:-patience].max())


# Two models, one noise.


class Reproducibility(NamedTuple):
    """Whether samples of the same noises, from two models, are the same."""

    cosine: np.ndarray  # [m] similarity of the two of each pair
    cosine_null: np.ndarray  # [m] of mismatched pairs
    close: np.ndarray  # [m] bool
    share: float  # of close pairs
    interval: tuple[float, float]  # Wilson, 95 %
    null: float  # the share of mismatched pairs
    null_interval: tuple[float, float]


def reproducibility(a, b, threshold: float = RATIO) -> Reproducibility:
    """How alike twin samples are: by angle, and by the criterion of memorization.

    A pair is close when b_i is the nearest of all b to a_i, by a third of the distance
    to the nearest other *distinct* one: a_i is a copy of b_i. Cosines are about the
    mean of both sets. The null level is that of mismatched pairs: b moved on by one.

    Args: a, b [m, *e], where a_i and b_i are of the same noise.
    Raises: ValueError: shapes that differ, or fewer than two distinct b.
    Source: Kadkhodaie 2024 (arXiv 2310.02557), section 2, for the cosine.
    """
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    if a.shape != b.shape or len(distinct(b)) < 2:
        raise ValueError(
            f"twin samples of shapes {a.shape} and {b.shape}, {len(distinct(b))} of "
            "the latter distinct: give equally many pairs, at least two different"
        )
    found = searcher(b)(a)
    near = found.distances[:, 0] < threshold * found.distances[:, 1]
    centre, moved = (a.mean(axis=0) + b.mean(axis=0)) / 2, np.roll(b, 1, axis=0)
    nearest, axes = b[found.indices[:, 0]], tuple(range(1, b.ndim))
    close, null = (near & np.all(nearest == c, axis=axes) for c in (b, moved))
    return Reproducibility(
        cosine(a, b, centre),
        cosine(a, moved, centre),
        close,
        float(close.mean()),
        wilson(int(close.sum()), len(close)),
        float(null.mean()),
        wilson(int(null.sum()), len(null)),
    )


def cosine(a, b, centre):
    """The cosine of the angle between a_i and b_i about a centre; 0 for the centre.

    Args: a, b [m, *e], centre [*e].   Returns: [m].
    """
    a, b = (
        (np.asarray(c, np.float64) - centre[None]).reshape(len(c), -1) for c in (a, b)
    )
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    products = np.sum(a * b, axis=1)
    return np.divide(products, norms, out=np.zeros_like(norms), where=norms > 0)
