"""Lipschitz constants against the noise level: truth, empirical score, networks.

Experiment `lipschitz` (Ye 2025, section 5): one network for each point of config.sweep,
with several weight decays. The exact scores of a point are those of its data.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from memsep_jax import empirical, gap, lipschitz, memorization, mixture, sampling
from memsep_jax.experiments import training
from memsep_jax.experiments.config import build, grid
from memsep_jax.experiments.reporting import figures
from memsep_jax.experiments.reporting.figures import Interval
from memsep_jax.experiments.studies import ensemble, results
from memsep_jax.experiments.studies.study import Study
from memsep_jax.models import mlp

SMALL = 0.1  # largest sigma of a fitted slope: the powers are those of sigma -> 0
SCORES = ("truth", "empirical", "network")
# Colours of the networks, by decay; the empirical score is red, the truth black.
COLORS = [c for c in figures.COLORS if c not in (figures.RED, "black")]


def check(config) -> build.Parts:
    """The parts of the first point.   Raises: ConfigError."""
    parts = grid.check(config)
    build.truth(config)
    if not isinstance(parts.model, mlp.MLP):
        raise build.ConfigError(
            f"model.name={config.model.name!r}: experiment=lipschitz bounds a network "
            "by the weights of its layers, which it knows of an mlp: give "
            "model.name=mlp"
        )
    return parts


def measure(points, session):
    """Trains the networks of some points of one shape and probes all scores.

    Yields: for each point its numbers and curves, or the error that it failed with.
    """
    configs = [point.config for point in points]
    with session.phase("data"):
        built = [build.build(config) for config in configs]
    with session.phase("train"):
        state, losses = ensemble.learn(configs, built)
    weights = training.sampled_weights(state, configs[0])
    group, parts = configs[0].measure, built[0]
    times = jnp.asarray(group.times)
    probe = jax.jit(
        functools.partial(norms, parts=parts, m=group.draws, iters=group.iters)
    )
    sigma = np.asarray(jax.vmap(parts.process.sigma)(times))
    path_sigma = jax.vmap(parts.process.sigma)(parts.times)
    failed = ensemble.failures(state.step, parts.steps)
    for i, (config, own) in enumerate(zip(configs, built, strict=True)):
        if failed[i] is not None:
            yield failed[i]
            continue
        params = jax.tree.map(lambda a, i=i: a[i], weights)
        data = jnp.asarray(own.splits.train.x)
        with session.phase("measure"):
            key = build.keys(config.seed).evaluate
            row = jax.device_get(probe(params, build.truth(config), data, times, key))
        for name in SCORES:  # -4 and -2 for the empirical score, 0 for a smooth truth
            for curve in ("midpoints", "noised_median"):
                slope = _slope(sigma, row[f"{name}_{curve}"])
                row[f"{name}_{curve.split('_')[0]}_slope"] = slope
        yield row | {"sigma": sigma, "path_sigma": path_sigma, "loss": losses[i]}


def norms(params, truth, data, times, key, parts, m, iters):
    """|| d score / d x ||_2 of truth, empirical score and network, at all probes.

    Probes: noised training points; midpoints of the m closest pairs and of m random
    pairs (`segments`), scaled by alpha; and m trajectories of each score itself,
    at the sampler's times.

    Args: truth and data [n, d] of one point, params of its network, times [k].
    Returns:
      dict of [k] (path: [steps + 1]): the largest and the median norm of every score
      and probe; the bounds of Ye 2025 low and high, two_point at the closest pair,
      network_bound from the layers; largest of every score at all probes but the
      path. And of []: layer_bound, of the network before preconditioning;
      converged, the share of probes where power iteration did.
    """
    process = parts.process
    segment_key, curve_key, start_key, norm_key = jax.random.split(key, 4)
    # The empirical score is steep at the borders between the cells of training points:
    # probes at the points themselves would miss it.
    between = {
        "midpoints": lipschitz.midpoints(data, m),
        "segments": lipschitz.segments(segment_key, data, m),
    }
    nearest = jax.lax.map(lambda x: memorization.nearest_two(x, data)[1], data)
    layers = mlp.lipschitz_bound(params)

    def at(t, key):
        probes = {name: process.alpha(t) * x for name, x in between.items()}
        probes["noised"], _ = gap.noised(key, data, process, t, m)
        low, high = lipschitz.empirical_bounds(data, process, t)
        return probes, {
            "low": low,
            "high": high,
            "two_point": lipschitz.two_point(jnp.min(nearest), process, t),
            "network_bound": lipschitz.network_bound(
                layers, parts.prediction, process, t
            ),
        }

    probes, curves = gap.curve(at, times, curve_key)
    probes = {name: (x, times) for name, x in probes.items()}
    shape = m, *data.shape[1:]
    starts = sampling.prior(start_key, process, parts.times[0], shape)
    scores = {  # with whether the Jacobian is known to be symmetric
        "truth": (mixture.score(truth, process), True),
        "empirical": (empirical.score(data, process), True),
        "network": (training.score_fn(parts, params), False),
    }
    converged = []
    for name, (score_fn, symmetric) in scores.items():
        walk = sampling.path(score_fn, process, parts.times)
        path = jnp.swapaxes(jax.vmap(walk)(starts), 0, 1), parts.times
        own = _at_all(
            functools.partial(
                lipschitz.spectral_norm, score_fn, iters=iters, symmetric=symmetric
            ),
            probes | {"path": path},
            norm_key,
        )
        for place, norm in own.items():
            curves[f"{name}_{place}"] = jnp.max(norm.value, axis=1)
            curves[f"{name}_{place}_median"] = jnp.median(norm.value, axis=1)
            converged.append(jnp.ravel(norm.converged))
        largest = [curves[f"{name}_{place}"] for place in probes]
        curves[f"{name}_largest"] = jnp.max(jnp.stack(largest), axis=0)
    return curves | {
        "layer_bound": layers,
        "converged": jnp.mean(jnp.concatenate(converged)),
    }


def _at_all(norm, probes, key):
    """norm(x, t, key) at all probes in one loop, so that it is compiled once.

    Args: probes, name -> (x [k, m, d], t [k]).   Returns: name -> Norm of [k, m].
    """
    x = jnp.concatenate([x.reshape(-1, x.shape[-1]) for x, _ in probes.values()])
    t = jnp.concatenate([jnp.repeat(t, x.shape[1]) for x, t in probes.values()])
    keys = jax.random.split(key, len(x))
    norms = jax.lax.map(lambda a: norm(*a), (x, t, keys), batch_size=gap.BATCH)
    by_name, start = {}, 0
    for name, (x, _) in probes.items():
        stop = start + x.shape[0] * x.shape[1]
        parts = (a[start:stop].reshape(x.shape[:2]) for a in norms)
        by_name[name], start = lipschitz.Norm(*parts), stop
    return by_name


def draw(metrics, points):
    """(name, caption, figure) of each picture: see `study.Study`."""
    axes = [axis for axis in grid.AXES if axis != "weight_decay"]
    groups = results.grouped(
        _over_seeds(points), lambda row: tuple((a, row[a]) for a in axes if a in row)
    )
    for values, rows in groups.items():
        ending = ",".join(f"{axis}={value}" for axis, value in values)
        ending = f"_{ending}" if len(groups) > 1 else ""
        where = grid.label(dict(values))
        where = f" ({where})" if where else ""
        yield (
            f"norms{ending}",
            f"Spectral norm of the Jacobian of the score{where}: the largest at the "
            "midpoints of the closest pairs of training points, the median at noised "
            "training points, the largest over trajectories of each score's own "
            "sampling. Dotted: slopes to compare with. Geometric means over the seeds.",
            figures.curves(_norms(rows)),
        )
        yield (
            f"bounds{ending}",
            "Left, the largest norm at midpoints of random pairs. Middle, the largest "
            "anywhere against the bounds of the empirical score. Right, the same for "
            "networks (solid) against the product of their layers' norms (dashed). "
            "Geometric means over the seeds.",
            figures.curves(_bounds(rows)),
        )


def _over_seeds(points):
    """Geometric means of all curves: norms of two seeds differ by a factor."""
    groups = results.grouped(
        points,
        lambda point: tuple((a, point[a].item()) for a in grid.AXES if a in point),
    )
    rows = []
    for values, group in groups.items():
        rows.append(dict(values))
        for name in (k for k, v in group[0].items() if v.ndim == 1):
            logs = results.mean_interval(np.log([point[name] for point in group]))
            rows[-1][name] = Interval(*map(np.exp, logs))._asdict()
    return rows


def _norms(rows):
    sigma = rows[0]["sigma"]["mean"]
    steep = _all_scores(rows, "midpoints")
    typical = _all_scores(rows, "noised_median", labelled=False)
    anchor = rows[0]["empirical_midpoints"]["mean"][0]
    # Ye 2025, section 5: between training points the norm grows like sigma^-4 as t goes
    # to 0, while at a noised training point it is 1 / sigma^2 in the median.
    falling = figures.Line(
        sigma, anchor * (sigma / sigma[0]) ** -4.0, "slope -4", style=":",
        color=figures.GREY,
    )  # fmt: skip
    inverse = figures.Line(
        sigma, sigma**-2.0, "1 / sigma²", style=":", color=figures.GREY
    )
    along = _all_scores(rows, "path", "path_sigma", "-", labelled=False)
    return [
        _panel("between the closest pairs", [*steep, falling]),
        _panel("at noised training points", [*typical, inverse]),
        _panel("along sampling trajectories", [*along, inverse]),
    ]


def _bounds(rows):
    first, black = rows[0], "black"
    known = [
        _line(first, "high", "upper bound", black, "--"),
        _line(first, "two_point", "two points, closest pair", figures.BLUE, ":"),
        _line(first, "low", "lower bound", black, ":"),
    ]
    measured = _line(first, "empirical_largest", "measured", figures.RED)
    networks = []
    for row, color in zip(rows, COLORS * len(rows), strict=False):
        networks.append(_line(row, "network_largest", _decay(row), color))
        networks.append(_line(row, "network_bound", "upper bound", color, "--"))
    return [
        _panel("between random pairs", _all_scores(rows, "segments")),
        _panel("empirical score", [measured, *known]),
        _panel("networks", networks),
    ]


def _all_scores(rows, probe, x="sigma", style="o-", labelled=True):
    """Lines of all scores; colours are the same in all panels, so one has labels."""
    lines = [
        _line(rows[0], f"empirical_{probe}", "empirical", figures.RED, style, x),
        _line(rows[0], f"truth_{probe}", "truth", "black", style, x),
    ]
    for row, color in zip(rows, COLORS * len(rows), strict=False):
        lines.append(_line(row, f"network_{probe}", _decay(row), color, style, x))
    return lines if labelled else [line._replace(label=None) for line in lines]


def _decay(row):
    return f"decay {row['weight_decay']:g}" if "weight_decay" in row else "network"


def _line(row, name, label, color, style="o-", x="sigma"):
    return figures.line(row[x]["mean"], row[name], label, style, color)


def _panel(title, lines):
    return figures.Panel(title, lines, "sigma", "spectral norm")


def _slope(sigma, norm):
    """d log norm / d log sigma, by least squares where sigma is small."""
    small = (sigma <= SMALL) & (norm > 0)
    if small.sum() < 2:
        return np.nan
    return np.polyfit(np.log(sigma[small]), np.log(norm[small]), 1)[0]


STUDY = Study(measure, draw, check, alike=grid.shape, what="networks")
