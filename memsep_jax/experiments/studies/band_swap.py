"""Where on the noise axis does copying happen?

Experiment `band_swap`: samples are drawn with a score that copies in some noise bands
and with the true score in the others, all from the same prior noise. The score that
copies is the empirical one or, measure.swap=trained, that of a network. Four curves:

  inside   it rules in one band only       outside  in all bands but one
  below    at all times below an edge      above    at all times from an edge on

That a sample is a copy, and of which point, is not decided at the same times. Below any
t the exact empirical score carries every point to its nearest training point, so it
makes copies even of fresh samples. To which one the trajectory goes is `overlap`, the
share of samples that end nearest to the same training point as without the truth.
"""

import functools
import math
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memsep_jax import empirical, gap, memorization, mixture, neighbours, process, score
from memsep_jax.experiments import training
from memsep_jax.experiments.config import build, grid
from memsep_jax.experiments.reporting import figures
from memsep_jax.experiments.studies import ensemble
from memsep_jax.experiments.studies.study import Study

CURVES = ("inside", "outside", "below", "above")


class Bands(NamedTuple):
    """Equal pieces of the sampler's grid, and which score rules in each."""

    edges: np.ndarray  # [b + 1] increasing, times of the grid
    pairs: dict[str, np.ndarray]  # curve -> [., 2], the low and high of score.banded


def check(config) -> build.Parts:
    """The parts of the first point.   Raises: ConfigError."""
    parts = grid.check(config)
    build.truth(config)
    build.look_up(SWAPS, config.measure.swap, "measure.swap")
    if config.measure.bands > config.sampler.steps:
        raise build.ConfigError(
            f"measure.bands={config.measure.bands} must be at most "
            f"sampler.steps={config.sampler.steps}: a band is one step or more"
        )
    return parts


def cut(times, bands: int) -> Bands:
    """Cuts the grid into bands of equally many steps: on a log grid, equal in log t.

    The first band begins at 0 and the last has no end, so that together they cover all
    times. The final Tweedie step belongs to the first band.

    Args: times [steps + 1], decreasing.
    """
    grid = np.asarray(times)[::-1]
    edges = grid[np.round(np.linspace(0, len(grid) - 1, bands + 1)).astype(int)]
    ends = np.concatenate([[0.0], edges[1:-1], [np.inf]]).astype(grid.dtype)
    low, high = ends[:-1], ends[1:]
    pairs = {
        "inside": (low, high),
        "outside": (high, low),  # wraps around: see score.banded
        "below": (np.zeros_like(ends), ends),
        "above": (ends, np.full_like(ends, np.inf)),
    }
    return Bands(edges, {k: np.stack(v, axis=1) for k, v in pairs.items()})


def sampler(config, parts, copying):
    """One program that samples all bands.

    Args: copying, the weights of the score that copies -> ScoreFn.
    Returns: (weights, truth, key, pairs [p, 2]) -> [p, m, *e], where sample i of every
      pair starts from the same noise.
    """
    shape = parts.splits.train.x.shape[1:]

    def draw(weights, truth, key, pairs):
        keys = jax.random.split(key, config.sampler.num_samples)

        def of_band(pair):
            score_fn = score.banded(
                copying(weights), mixture.score(truth, parts.process), *pair
            )
            one = training.sampler(config, parts.process, parts.times, shape, score_fn)
            return jax.vmap(one)(keys)

        return jax.lax.map(of_band, pairs)

    return draw


def measure(points, session):
    """Samples all bands of some points.

    Yields: for each point its numbers and curves, or the error that it failed with.
    """
    configs = [point.config for point in points]
    with session.phase("data"):
        built = [build.build(config) for config in configs]
    config, parts = configs[0], built[0]
    weights, copying = SWAPS[config.measure.swap](configs, built, session)
    bands = cut(parts.times, config.measure.bands)
    pairs = np.concatenate([bands.pairs[name] for name in CURVES])
    drawn = jax.jit(sampler(config, parts, copying))
    for own, one, its in zip(built, configs, weights, strict=True):
        if isinstance(its, Exception):
            yield its
            continue
        truth, started = build.truth(one), time.monotonic()
        with session.phase("sample"):
            samples = np.asarray(drawn(its, truth, build.keys(one.seed).sample, pairs))
        seconds = time.monotonic() - started
        with session.phase("neighbours"):
            row = _compared(samples, own.splits, config.memorization.threshold, bands)
        middles = np.sqrt(bands.edges[:-1] * bands.edges[1:])  # on the log axis
        yield row | {
            "t": middles,
            "edges": bands.edges,
            "collapse_time": _collapse_time(truth, own),
            "spacing_time": _spacing_time(own, config.memorization.threshold),
            "seconds": seconds,
        }


def _compared(samples, splits, threshold, bands):
    """The samples [p, m, *e] of all pairs against the training points, as curves."""
    search = neighbours.searcher(np.asarray(splits.train.x))
    # Where a sample of a pair is not finite, its numbers become nan below; the search
    # is still of all samples at once.
    finite = np.isfinite(samples).all(axis=tuple(range(1, samples.ndim)))
    flat = np.nan_to_num(samples).reshape(-1, *samples.shape[2:])
    near = neighbours.Neighbours(
        *(a.reshape(*samples.shape[:2], -1) for a in search(flat))
    )
    null = np.nan
    if splits.held_out is not None:
        null = memorization.copied(search(splits.held_out.x), threshold).mean()
    # The pairs of `below` start with nowhere and end with everywhere.
    start = len(bands.edges) * 2 - 2
    nowhere, everywhere = start, start + len(bands.edges) - 1
    nearest, place = near.distances[..., 0].mean(axis=1), near.indices[..., 0]
    numbers = {
        "ratio": memorization.copied(near, threshold).mean(axis=1),
        "overlap": (place == place[everywhere]).mean(axis=1),
        "distance": nearest / nearest[nowhere],
    }
    sizes = [len(bands.pairs[name]) for name in CURVES]
    row = {"null": null, "null_of": len(splits.held_out.x) if splits.held_out else 0}
    for what, values in numbers.items():
        values = np.where(finite, values, np.nan)
        parts = np.split(values, np.cumsum(sizes)[:-1])
        row |= {
            f"{name}_{what}": part for name, part in zip(CURVES, parts, strict=True)
        }
        row |= {f"truth_{what}": values[nowhere], f"copying_{what}": values[everywhere]}
        if what != "distance":
            ends = (*CURVES, "truth", "copying")
            row |= {f"{name}_{what}_of": samples.shape[1] for name in ends}
    del row["truth_distance"], row["copying_overlap"]  # 1, both
    return row | {
        "half_below": _half(bands.edges, row["below_ratio"]),
        "half_above": _half(bands.edges[::-1], row["above_ratio"][::-1]),
    }


def _half(edges, ratios):
    """The time, by log t, at which a curve has half of its copies; nan without any."""
    if not ratios[-1] > 0:
        return np.nan
    rising = np.maximum.accumulate(ratios)  # np.interp needs increasing places
    return np.exp(np.interp(ratios[-1] / 2, rising, np.log(edges)))


def _spacing_time(parts, threshold):
    """The time at which noise is a third as long as the spacing of training points.

    sigma / alpha sqrt(d) = threshold times the mean distance to the next point. This is
    a heuristic: a point that the truth denoises from there on stays within a third of
    the spacing.
    """
    x = np.asarray(parts.splits.train.x)
    spacing = neighbours.nearest(x, x).distances[:, 1].mean()
    times = parts.times[::-1]
    noise = jax.vmap(functools.partial(process.noise_to_signal, parts.process))(times)
    return np.interp(threshold * spacing, noise * math.sqrt(x[0].size), times)


def _collapse_time(truth, parts):
    """`gap.collapse_time`; nan unless components have unit variance and n > k."""
    n = parts.splits.num_distinct
    if not isinstance(truth, mixture.Mixture) or truth.factors is not None:
        return np.nan
    k, d = truth.means.shape
    if n <= k or not np.all(np.asarray(truth.variances) == 1):
        return np.nan
    return float(gap.collapse_time(n, k, d, parts.process))


def _empirical(configs, built, session):
    points = [jnp.asarray(parts.splits.train.x) for parts in built]
    return points, lambda points: empirical.score(points, built[0].process)


def _trained(configs, built, session):
    with session.phase("train"):
        state, _ = ensemble.learn(configs, built)
    weights = training.sampled_weights(state, configs[0])
    failed = ensemble.failures(state.step, built[0].steps)
    each = [
        error or jax.tree.map(lambda a, i=i: a[i], weights)
        for i, error in enumerate(failed)
    ]
    return each, functools.partial(training.score_fn, built[0])


# measure.swap -> (configs, built, session) -> the weights of each point, or the error
# that it failed with; and weights -> the score that copies.
SWAPS = {"empirical": _empirical, "trained": _trained}


def draw(metrics, points):
    """(name, caption, figure) of each picture: see `study.Study`."""
    copying = {"empirical": "empirical score", "trained": "network"}[metrics["swap"]]
    yield (
        "ratio",
        f"Memorized samples when the {copying} rules some noise levels and the truth "
        "the others. Grey: held-out points. Dotted: the collapse time, until which "
        "noised training points keep apart. Dash-dotted: where noise is a third as "
        "long as the training points are apart.",
        _figure(metrics, copying, "ratio", "memorized samples", "null"),
    )
    yield (
        "overlap",
        f"Samples nearest to the same training point as with the {copying} everywhere, "
        "from the same prior noise. Grey: samples of the truth.",
        _figure(metrics, copying, "overlap", "same nearest point", "truth_overlap"),
    )
    yield (
        "distance",
        "Mean distance to the nearest training point, in units of that of the truth's "
        "samples.",
        _figure(metrics, copying, "distance", "distance to the nearest", None),
    )


def _figure(metrics, copying, what, ylabel, level):
    """One panel for each point."""
    labels = {
        "inside": (f"{copying} only around t", "t", "o-"),
        "outside": ("truth only around t", "t", "s-"),
        "below": (f"{copying} below t", "edges", ".--"),
        "above": (f"{copying} above t", "edges", ".--"),
    }
    names = {
        "null": "held-out points", "truth_overlap": "samples of the truth",
        "collapse_time": "collapse time", "spacing_time": "spacing time",
    }  # fmt: skip
    panels = []
    for row in metrics["table"]:
        lines = []
        for name, (label, x, style) in labels.items():
            times = row[x]["mean"]
            lines.append(figures.line(times, row[f"{name}_{what}"], label, style))
        ends = [row["edges"]["mean"][0], row["edges"]["mean"][-1]]
        if level and row[level]["mean"] is not None:
            height = [row[level]["mean"]] * 2
            lines.append(
                figures.Line(ends, height, names[level], style="--", color=figures.GREY)
            )
        for name, style in (("collapse_time", ":"), ("spacing_time", "-.")):
            if (t := row[name]["mean"]) is not None:
                lines.append(
                    figures.Line(
                        [t, t], [0, 1], names[name], style=style, color="#666666"
                    )
                )
        panels.append(
            figures.Panel(
                grid.label(row), lines, "time t", ylabel, yscale="linear",
                percent=level is not None,
            )
        )  # fmt: skip
    return figures.curves(panels)


STUDY = Study(
    measure,
    draw,
    check,
    conclude=lambda config, *_: {"swap": config.measure.swap},
    alike=grid.shape,
)
