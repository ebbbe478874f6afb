"""Which training points are copied: the sparse, the untypical, or the repeated ones?

For each network, how often each training point is emitted is ranked against what may
decide it (`memorization.traits`). The 1/3 rule of a copy favours points that lie far
from all others, so copies are also counted by a radius that is the same for all points.
"""

import numpy as np

from memsep_jax import data, features, memorization, neighbours
from memsep_jax.experiments.config import build
from memsep_jax.experiments.reporting import figures
from memsep_jax.experiments.studies import compare, networks, results, training_run
from memsep_jax.experiments.studies.study import Study
from memsep_jax.experiments.training import sampled_weights

NEAR = 10  # nearest other points whose mean distance is the sparsity of a point
RULES = {
    "ratio": "a copy is nearer than 1/3 of the second distance",
    "radius": "a copy is nearer than one radius for all",
}
TRAITS = {
    "sparsity": "sparse: far from the nearest others",
    "atypicality": "untypical: far from the mean of its class",
    "atypicality_features": "untypical in features",
    "repeats": "repeated in the training set",
}
COLUMNS = (
    "num_examples", "setting", "ratio", "emitted",
    *(f"{rule}_{trait}" for rule in RULES for trait in TRAITS), "seeds",
)  # fmt: skip


def measure(points, session):
    """Yields the numbers of `measured` for each point of a sweep."""
    for point in points:
        yield measured(point.config, session)


def measured(config, session) -> dict:
    """Trains a network, and ranks its training points by how often it emits them.

    Returns: `ratio` and `emitted`, the shares of copies, and of points with one;
      RULE_TRAIT, rank correlations, nan where all points are emitted equally often;
      `counts` [2, n] by both rules; `most` and `least`, the points emitted most and
      least, of images only.
    """
    with session.phase("data"):
        parts = build.build(config)
    generate = training_run.network_samples(config, parts, session)
    state = networks.trained(config, parts, session, generate)
    with session.phase("sample"):
        weights = sampled_weights(state, config)
        drawn = generate(weights, 0, config.sampler.num_samples)
    with session.phase("neighbours"):
        train = parts.splits.train
        x, labels = np.asarray(train.x), _classes(config, train)
        search = neighbours.searcher(x, min(NEAR + 1, parts.splits.num_distinct))
        near, own = search(data.like(x, drawn)), search(x)
        columns = _traits(config, x, own, labels)
        copies = _copies(near, own, config.memorization.threshold)
    row: dict = {}
    counts = []
    for rule, copied in copies.items():
        ranked = memorization.which(near.indices[copied, 0], own, columns)
        row |= {f"{rule}_{name}": found.value for name, found in ranked.items()}
        counts.append(np.bincount(near.indices[copied, 0], minlength=len(x)))
    row |= {
        "ratio": copies["ratio"].mean(),
        "ratio_of": len(drawn),
        "emitted": (counts[0] > 0).sum() / parts.splits.num_distinct,
        "counts": np.stack(counts),
    }
    if x.ndim == 4 and config.run.images:
        shown = compare.most_and_least(counts[1], own, columns["sparsity"])
        row |= {name: data.to_uint8(x[rows]) for name, rows in shown.items()}
    return row


def _copies(near, own, threshold):
    """rule -> bool [m], the samples that are copies by it."""
    # As large as the ratio's at a point of middling sparsity.
    radius = threshold * np.median(own.distances[:, 1])
    return {
        "ratio": memorization.copied(near, threshold),
        "radius": near.distances[:, 0] < radius,
    }


def _classes(config, train):
    """The classes of the training points, whatever the labels of the run are, [n].

    None where the source has no classes.
    """
    labelled = config.copy_and_resolve_references()
    labelled.data.update(labels="true", num_labels=None)
    try:
        known = build.splits(labelled).train
    except (build.ConfigError, data.DataError):
        return None
    # Where labels decide which points are taken, the classes are of other points.
    same = len(known.x) == len(train.x) and np.array_equal(known.x, train.x)
    return np.asarray(known.label) if same else None


def _traits(config, x, own, labels):
    """name -> [n] of the training points, as TRAITS has them."""
    columns = memorization.traits(x, own, labels)._asdict()
    if x.ndim == 4:
        see = features.random_conv(x.shape[1:], config.seed).apply
        seen = memorization.traits(see(x), own, labels)
        columns["atypicality_features"] = seen.atypicality
    if not columns["repeats"].any():
        del columns["repeats"]
    return columns


def draw(metrics, points):
    """(name, caption, figure) of each picture: see `study.Study`."""
    groups = results.grouped(metrics["table"], results.setting)
    panels = []
    for title, rows in groups.items():
        for rule, words in RULES.items():
            lines = [
                results.line(rows, f"{rule}_{trait}", label)
                for trait, label in TRAITS.items()
                if _known(rows, f"{rule}_{trait}")
            ]
            if not lines:  # where nothing is copied, nothing is ranked
                continue
            panels.append(
                figures.Panel(
                    f"{title}\n{words}" if title else words, lines,
                    "training points n", "rank correlation with emission",
                    yscale="linear",
                )
            )  # fmt: skip
    if panels:
        yield _correlations(panels)
    seen = set()
    for point in points:
        n = int(point["num_examples"]) if "num_examples" in point else 0
        if "most" not in point or n in seen:
            continue
        seen.add(n)
        rows = {f"emitted {name}": point[name] for name in ("most", "least")}
        yield (
            f"points_{n}" if n else "points",
            "Training points that one network emits most and least often (by the "
            "radius; of those it emits equally seldom, the sparsest)"
            + (f", of n = {n:,}." if n else "."),
            figures.image_rows(rows),
        )


def _known(rows, name):
    """Whether all rows have a number, and some of them a value."""
    found = [row.get(name) for row in rows]
    return all(found) and any(one["mean"] is not None for one in found)


def _correlations(panels):
    return (
        "which",
        "Spearman's rank correlation between what a training point is like and how "
        "often it is emitted. Above 0, such points are copied more than others. Bands: "
        "95 % intervals over the seeds. The 1/3 rule calls a sample a copy more easily "
        "where the second nearest point is far, so a sparse point is favoured by the "
        "rule itself: the panels with one radius for all points are free of that.",
        figures.curves(panels),
    )


STUDY = Study(measure, draw, columns=COLUMNS, what="networks")
