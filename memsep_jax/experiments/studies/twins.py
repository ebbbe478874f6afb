"""Do two networks that saw no common point draw the same samples?

Experiment `twins`: for every n, two networks of the same initial weights and the same
keys are trained on disjoint halves of 2 n points, and sampled from the same noises.
While they memorize, each draws its own points; where they generalize, both draw the
same ones (Kadkhodaie 2024, arXiv 2310.02557, section 2). So do networks that have
learned nothing yet: agreement counts where the samples are good, by their Frechet
distance.
"""

import functools
import time

import numpy as np

from memsep_jax import data, fidelity, memorization
from memsep_jax.experiments import training
from memsep_jax.experiments.config import build, grid
from memsep_jax.experiments.reporting import figures
from memsep_jax.experiments.runtime import points
from memsep_jax.experiments.studies import emm, networks, results, training_run

COLUMNS = (
    "setting", "num_examples", "d", "width", "depth", "weight_decay", "share",
    "share_null", "cosine", "cosine_null", "ratio", "null", "own", "frechet",
    "ratio_first", "ratio_second", "seeds",
)  # fmt: skip


def run(config, session, resume_step=None):
    """Trains and compares the twins of every point; draws the curves."""
    with session.phase("data"):
        parts = check(config)
    session.begin(parts.splits.fingerprint, parts.splits)
    work = functools.partial(measure, session=session)
    rows = points.run(config, session, work, what="pairs of twins")
    results.finish(config, session, rows, draw, columns=COLUMNS)


def halves(config) -> tuple:
    """The configs of both twins: the first n points of the seed's order, and the next.

    Raises: ValueError: data.num_examples is not given.
    """
    second = config.copy_and_resolve_references()
    second.data.skip = config.data.num_examples
    return config, second


def check(config) -> build.Parts:
    """Builds both halves of every size, before anything is compiled or written.

    Returns: the parts of the first point.   Raises: build.ConfigError.
    """
    if not config.sweep.num_examples:
        raise build.ConfigError(
            "sweep.num_examples=() has no value: give the sizes of a half, such as "
            "--config.sweep.num_examples='(100,)'"
        )
    if config.data.skip:
        raise build.ConfigError(
            f"data.skip={config.data.skip}: twins skips the points of the other half "
            "itself; leave it at 0"
        )
    parts = grid.check(config)
    for point in grid.points(config):
        if point.values["seed"] == 0:
            build.build(halves(point.config)[1])
    return parts


def measure(points, session):
    """Trains, samples and compares the twins of some points.

    Yields: for each, the numbers of a row. The first twin is the one whose samples are
      compared with all samples of the second.
    """
    for point in points:
        started = time.monotonic()
        twins = halves(point.config)
        with session.phase("data"):
            built = [build.build(config) for config in twins]
        # One program, which folds in the seed alone: equal noises for both.
        generate = training_run.network_samples(twins[0], built[0], session)
        samples = []
        for config, parts in zip(twins, built, strict=True):
            state = networks.trained(config, parts, session, generate)
            weights = training.sampled_weights(state, config)
            with session.phase("sample"):
                drawn = generate(weights, 0, config.sampler.num_samples)
            samples.append(data.like(parts.splits.train.x, drawn))
        with session.phase("neighbours"):
            row = compare(*samples, *built, point.config.memorization.threshold)
        yield row | {"seconds": time.monotonic() - started}


def compare(a, b, first: build.Parts, second: build.Parts, threshold) -> dict:
    """What samples [m, *e] of the same noises have in common, and with their own data.

    Returns: share, cosine and their null levels as `memorization.reproducibility` has
      them; ratio, the share of memorized samples of both; own, the mean cosine between
      a sample and the nearest point of its own training set, about the same centre;
      frechet, the distance of all samples from held-out points, on pixels.
    """
    pairs = memorization.reproducibility(a, b, threshold)
    centre = (a.mean(axis=0) + b.mean(axis=0)) / 2
    row = {
        "share": pairs.share,
        "share_low": pairs.interval[0],
        "share_high": pairs.interval[1],
        "share_null": pairs.null,
        "cosine": pairs.cosine.mean(),
        "cosine_null": pairs.cosine_null.mean(),
        "null": np.nan,
        "frechet": np.nan,
    }
    for name, x, splits in (
        ("first", a, first.splits),
        ("second", b, second.splits),
    ):
        own = np.asarray(splits.train.x)
        held_out = None if splits.held_out is None else np.asarray(splits.held_out.x)
        found = memorization.ratio(x, own, held_out, threshold)
        near = own[found.neighbours.indices[:, 0]]
        row |= {
            f"ratio_{name}": found.value,
            f"ratio_{name}_low": found.interval[0],
            f"ratio_{name}_high": found.interval[1],
            f"own_{name}": memorization.cosine(x, near, centre).mean(),
        }
        if found.null is not None:
            row["null"] = found.null
    if held_out is not None and len(held_out) > 3:
        both, real = (c.reshape(len(c), -1) for c in (np.concatenate([a, b]), held_out))
        row["frechet"] = fidelity.frechet(both, real, warn=False)
    return row | {
        what: (row[f"{what}_first"] + row[f"{what}_second"]) / 2
        for what in ("ratio", "own")
    }


def draw(metrics, points):
    """(name, caption, figure) of the sweep: see `report.write_sweep`."""
    groups: dict = {}
    for row in metrics["table"]:
        groups.setdefault(grid.label(row, emm.OTHER), []).append(row)
    shares, cosines = [], []
    for title, rows in groups.items():
        line = functools.partial(emm.line, rows)
        shares.append(
            figures.Panel(
                title or "", [
                    line("share", "twins draw the same sample"),
                    line("ratio", "a sample is memorized"),
                    line("share_null", "mismatched twins", figures.GREY, "--"),
                    line("null", "held-out points are memorized", "black", ":"),
                ],
                "training points n of each twin", "share of samples",
                yscale="linear", percent=True,
            )
        )  # fmt: skip
        cosines.append(
            figures.Panel(
                title or "", [
                    line("cosine", "twin samples"),
                    line("own", "a sample and its nearest training point"),
                    line("cosine_null", "mismatched twins", figures.GREY, "--"),
                ],
                "training points n of each twin", "cosine similarity", yscale="linear",
            )
        )  # fmt: skip
    yield (
        "share",
        "Reproducibility and memorization of twins, two networks trained on disjoint "
        "sets of n points from the same weights, sampled from the same noises. The "
        "same sample: nearer to its twin than a third of the distance to the nearest "
        "other sample of the twin. It says something where samples are good: see their "
        "Frechet distance in the table. Bands: 95 % intervals over the seeds.",
        figures.curves(shares),
    )
    yield (
        "cosine",
        "Cosine similarity about the mean sample, averaged over samples: of twins, and "
        "of a sample with the nearest point that its network was trained on.",
        figures.curves(cosines),
    )
