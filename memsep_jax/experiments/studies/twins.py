"""Do two networks that saw no common point draw the same samples?

Experiment `twins`: for every n, two networks of the same initial weights and the same
keys are trained on disjoint halves of 2 n points, and sampled from the same noises.
While they memorize, each draws its own points; where they generalize, both draw the
same ones (Kadkhodaie 2024, arXiv 2310.02557, section 2). So do networks that have
learned nothing yet: agreement means something only where the samples are good, by
their Frechet distance.
"""

import functools
import time

import numpy as np

from memsep_jax import data, fidelity, memorization
from memsep_jax.experiments import training
from memsep_jax.experiments.config import build, grid
from memsep_jax.experiments.reporting import figures
from memsep_jax.experiments.studies import networks, pruning, results, training_run
from memsep_jax.experiments.studies.results import AXES
from memsep_jax.experiments.studies.study import Study

COLUMNS = (
    *AXES, "share", "share_null", "cosine", "cosine_null", "ratio", "null", "own",
    "frechet", "ratio_first", "ratio_second", "seeds",
)  # fmt: skip


def halves(config) -> tuple:
    """The configs of both twins: the first n points of the seed's order, and the next.

    Raises: ValueError: data.num_examples is not given.
    """
    second = config.copy_and_resolve_references()
    second.data.skip = config.data.num_examples
    return config, second


def check(config, also=lambda config, parts: None) -> build.Parts:
    """Builds both halves of every size, before anything is compiled or written.

    Args: also, as in `grid.check`, of the first halves.
    Returns: the parts of the first point.   Raises: build.ConfigError.
    """
    if not config.sweep.num_examples:
        raise build.ConfigError(
            "sweep.num_examples=() has no value: give the sizes of a half, such as "
            "--config.sweep.num_examples='(100,)'"
        )
    if config.data.skip:
        raise build.ConfigError(
            f"data.skip={config.data.skip}: {config.experiment} skips the points of "
            "the other half itself; leave it at 0"
        )

    def both(config, parts):
        also(config, parts)
        build.build(halves(config)[1])  # which needs 2 n points

    return grid.check(config, both)


def measure(points, session):
    """Trains, samples and compares the twins of some points.

    Yields: for each point its numbers. The samples of the first twin are compared with
      all samples of the second.
    """
    for point in points:
        started = time.monotonic()
        twins = halves(point.config)
        with session.phase("data"):
            built = [build.build(config) for config in twins]
        # One program for both; its noises depend on the seed alone, so they are equal.
        generate = training_run.network_samples(twins[0], built[0], session)
        samples = []
        for config, parts in zip(twins, built, strict=True):
            state = networks.trained(config, parts, session, generate)
            weights = training.sampled_weights(state, config)
            with session.phase("sample"):
                drawn = generate(weights, 0, config.sampler.num_samples)
            samples.append(data.like(parts.splits.train.x, drawn))
        with session.phase("neighbours"):
            row = compare(
                *samples, *built, point.config.memorization.threshold,
                pruning.spaces(point.config, samples[0].shape[1:]),
            )  # fmt: skip
        yield row | {"seconds": time.monotonic() - started}


def compare(a, b, first: build.Parts, second: build.Parts, threshold, spaces) -> dict:
    """Compares samples [m, *e] of the same noises with each other and with their data.

    Args: spaces, as `pruning.spaces` gives them.
    Returns: share, cosine and their null levels as in `memorization.reproducibility`;
      ratio, the share of memorized samples of both; own, the mean cosine between a
      sample and the nearest point of its own training set, about the same centre; null
      and frechet against the held-out points, which both twins share: the share that a
      search takes for copies, and the distance of all samples from them.
    """
    pairs = memorization.reproducibility(a, b, threshold)
    centre = (a.mean(axis=0) + b.mean(axis=0)) / 2
    fresh = first.splits.held_out
    held_out = None if fresh is None else np.asarray(fresh.x)
    row = {
        "share": pairs.share,
        "share_low": pairs.interval[0],
        "share_high": pairs.interval[1],
        "share_of": len(a),
        "share_null": pairs.null,
        "share_null_of": len(a),
        "cosine": pairs.cosine.mean(),
        "cosine_null": pairs.cosine_null.mean(),
        "null": np.nan,
        "null_of": 0 if held_out is None else len(held_out),
        **{f"{name}frechet": np.nan for name in spaces},
    }
    for name, x, parts in (("first", a, first), ("second", b, second)):
        own = np.asarray(parts.splits.train.x)
        result = memorization.ratio(x, own, held_out, threshold)
        near = own[result.neighbours.indices[:, 0]]
        row |= {
            f"ratio_{name}": result.value,
            f"ratio_{name}_low": result.interval[0],
            f"ratio_{name}_high": result.interval[1],
            f"ratio_{name}_of": len(x),
            f"own_{name}": memorization.cosine(x, near, centre).mean(),
        }
        if result.null is not None:
            row["null"] = result.null  # of the second twin
    if held_out is not None and len(held_out) > 3:
        for name, see in spaces.items():
            both, real = see(np.concatenate([a, b])), see(held_out)
            row[f"{name}frechet"] = fidelity.frechet(both, real, warn=False)
    return (
        row
        | {
            what: (row[f"{what}_first"] + row[f"{what}_second"]) / 2
            for what in ("ratio", "own")
        }
        | {"ratio_of": len(a) + len(b)}
    )


def draw(metrics, points):
    """(name, caption, figure) of each picture: see `study.Study`."""
    shares, cosines = [], []
    for title, rows in results.grouped(metrics["table"], results.setting).items():
        line = functools.partial(results.line, rows)
        panel = functools.partial(
            figures.Panel,
            title or "",
            xlabel="training points n of each twin",
            yscale="linear",
        )
        lines = [
            line("share", "twins draw the same sample"),
            line("ratio", "a sample is memorized"),
            line("share_null", "mismatched twins", "--", figures.GREY),
            line("null", "held-out points are memorized", ":", "black"),
        ]
        shares.append(panel(lines, ylabel="share of samples", percent=True))
        lines = [
            line("cosine", "twin samples"),
            line("own", "a sample and its nearest training point"),
            line("cosine_null", "mismatched twins", "--", figures.GREY),
        ]
        cosines.append(panel(lines, ylabel="cosine similarity"))
    yield (
        "share",
        "Reproducibility and memorization of twins, two networks trained on disjoint "
        "sets of n points from the same weights, sampled from the same noises. Two "
        "samples are the same where a sample is nearer to its twin than a third of the "
        "distance to the nearest other sample of the twin. That means something where "
        "samples are good: see their Frechet distance in the table. Bands: 95 % "
        "intervals over the seeds.",
        figures.curves(shares),
    )
    yield (
        "cosine",
        "Cosine similarity about the mean sample, averaged over samples: of twins, and "
        "of a sample with the nearest point that its network was trained on.",
        figures.curves(cosines),
    )


STUDY = Study(measure, draw, check, columns=COLUMNS, what="pairs of twins")
