"""Which samples are copies: what the score alone says, beside the training set.

Experiment `detect`: networks that copy some of what they draw. The 1/3 rule labels
their samples; each of `memorization.detectors` sees a sample and the network, but no
training point, and its AUC says how well it tells copies. The oracle is the distance to
the nearest training point.

Samples that are no copies may be bad images, which any look at the score would tell
from copies. So copies are set against held-out images too, which are as good.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from memsep_jax import data, memorization, neighbours
from memsep_jax.experiments import record, training
from memsep_jax.experiments.config import build, checks, grid
from memsep_jax.experiments.reporting import figures
from memsep_jax.experiments.studies import (
    evaluate,
    monitor,
    networks,
    results,
    training_run,
)
from memsep_jax.experiments.studies.study import Study
from memsep_jax.experiments.training import sampled_weights
from memsep_jax.memorization import detectors, membership

DETECTORS = {
    "sharpness": "sharpest direction",
    "flattest": "flattest direction",
    "trace": "trace of the Hessian",
    "flipd": "dimension (FLIPD)",
    "gap": "guidance gap",
    "gap_product": "guidance gap, sharpened",
    "distance": "nearest training point",  # the oracle
}
SPECTRUM = {"sharpness": "o-", "flattest": "s--"}  # the style of either end
COPIES = {"copies": figures.RED, "others": figures.BLUE}
# What copies are told from: the other samples, and held-out points.
AGAINST = {"": "other samples", "fresh_": "held-out points"}
FPR = np.linspace(0, 1, 101)  # of the ROC curves
COLUMNS = (
    "num_examples", "setting", "ratio",
    *(f"{against}{name}" for against in AGAINST for name in DETECTORS), "seeds",
)  # fmt: skip


def check(config) -> build.Parts:
    """Checks what can be wrong, before anything is compiled or written.

    Returns: the parts of the first point.   Raises: build.ConfigError.
    """
    return grid.check(config, _check)


def _check(config, parts):
    group, wrong = config.measure, []
    if group.detect_at not in group.times:
        wrong.append(
            f"measure.detect_at={group.detect_at} is not one of measure.times="
            f"{tuple(group.times)[:10]}: give one of them, or add it"
        )
    if config.train.label_drop:
        wrong += _without_classes(config, parts.splits.train.label)
    if wrong:
        raise build.ConfigError("\n".join(wrong))
    times = {f"measure.times[{i}]": jnp.float32(t) for i, t in enumerate(group.times)}
    checks.inside(parts.process, config.process.name, times)


def _without_classes(config, label):
    """A line where the gap of scores with and without a label has no meaning."""
    known, given = config.data, f"train.label_drop={config.train.label_drop}"
    if label is None:
        yield (
            f"{given} trains a score with and without labels, but data.labels="
            f"{known.labels}: give data.labels=true, or leave out train.label_drop"
        )
    elif len(np.unique(label)) < 2:
        yield (
            f"{given}, but the training points of data.labels={known.labels} are of "
            "one class: the scores with and without a label are the same; give two "
            "classes at least, or leave out train.label_drop"
        )


def measure(points, session):
    """Yields the numbers of `measured` for each point of a sweep."""
    for point in points:
        yield measured(point.config, session)


def measured(config, session) -> dict:
    """Trains a network, and asks every detector which of its samples are copies.

    Returns: `ratio`, the share of copies; sigma [k] of measure.times; for each detector
      NAME its AUC at measure.detect_at, with the interval NAME_low, NAME_high, and
      along_NAME [k] at all times; roc_NAME, its curve; the same of fresh_NAME, against
      held-out points; copies_NAME and others_NAME [k], its medians. All nan where there
      are too few copies or others, and of gaps where the network has no score without
      a label.
    """
    with session.phase("data"):
        parts = build.build(config)
    generate = training_run.network_samples(config, parts, session)
    state = networks.trained(config, parts, session, generate)
    weights, splits = sampled_weights(state, config), parts.splits
    with session.phase("sample"):
        x = np.asarray(splits.train.x)
        drawn = data.like(x, generate(weights, 0, config.sampler.num_samples))
        labels = evaluate.drawn_labels(config, parts, len(drawn))
    with session.phase("neighbours"):
        search = neighbours.searcher(x, 2)
        near = search(drawn)
        copied = memorization.copied(near, config.memorization.threshold)
    values: dict = {}
    fresh: dict = {}
    try:
        detectors.check_copies(copied, len(drawn))
    except ValueError as error:
        session.say(f"no detector is asked: {error}")
    else:
        with session.phase("measure"):
            says = functools.partial(asked, config, parts, weights)
            values = says(drawn, labels) | {"distance": _repeated(config, near)}
            if (held_out := _held_out(parts, len(drawn))) is not None:
                nearest = _repeated(config, search(held_out.x))
                fresh = says(*held_out) | {"distance": nearest}
    row = {
        "ratio": copied.mean(),
        "ratio_of": len(copied),
        "sigma": _sigma(config, parts),
    }
    for name in DETECTORS:
        found, both, first = values.get(name), None, copied
        if found is not None and name in fresh:
            both = np.concatenate([found[copied], fresh[name]])
            first = np.arange(len(both)) < copied.sum()
        row |= _told(config, name, found, copied)
        row |= _told(config, f"fresh_{name}", both, first)
        row |= _medians(config, name, found, copied)
    return row


def _held_out(parts, most: int):
    """At most so many held-out points, or None where there are too few.

    None too where the network takes labels, and these points have none.
    """
    held_out = parts.splits.held_out
    if held_out is None or len(held_out.x) < 2:
        return None
    if parts.num_classes and held_out.label is None:
        return None
    held_out = monitor.first_points(held_out, most)
    if parts.num_classes:
        # A label without a training point is one that the network knows nothing of.
        kept = np.isin(held_out.label, np.asarray(parts.splits.train.label))
        held_out = jax.tree.map(lambda a: a[kept], held_out)
    return jax.tree.map(np.asarray, held_out)


def _sigma(config, parts):
    times = jnp.asarray(config.measure.times)
    return np.asarray(jax.vmap(parts.process.sigma)(times))


def asked(config, parts, weights, points, labels) -> dict[str, np.ndarray]:
    """detector -> what it says of points [m, *e], at measure.times, [m, k].

    Args: labels, [m] or None. The detectors of one score take that of the label.
    """
    group, k = config.measure, len(config.measure.times)
    times, key = jnp.asarray(group.times), build.keys(config.seed).evaluate

    def one(i, weights, points, labels):
        row, at = i // k, i % k
        score_of = functools.partial(training.score_fn, parts, weights)
        free = None
        if labels is not None and config.train.label_drop:
            free = score_of(jnp.int32(parts.num_classes))
        return detectors.evidence(
            score_of(None if labels is None else labels[row]),
            parts.process,
            points[row],
            times[at],
            jax.random.fold_in(key, i),
            group.iters,
            group.probes,
            unconditional=free,
        )

    each = record.mapped(one, config.run.chunk)
    found = each(len(points) * k, weights, points, labels)
    return {
        name: value.reshape(-1, k)
        for name, value in found._asdict().items()
        if value is not None
    }


def _repeated(config, near):
    """The distance to the nearest training point, which knows no time, [m, k]."""
    return np.repeat(near.distances[:, :1], len(config.measure.times), axis=1)


def _told(config, name, values, copied) -> dict:
    """The AUC of a detector, along the times too, and its ROC curve.

    Args: values [m, k], or None, which gives nan; copied, bool [m].
    """
    times = tuple(config.measure.times)
    at = times.index(config.measure.detect_at)
    auc, roc = np.full((3, len(times)), np.nan), np.full(len(FPR), np.nan)
    if values is not None:
        # Copies are near: the distance has the sign of a detector that they make small.
        signed = detectors.SIGNS.get(name.removeprefix("fresh_"), -1) * values
        found = membership.separations(-signed, copied)
        auc = np.stack([found.auc, *np.asarray(found.interval).T])
        if np.isfinite(signed[:, at]).all():
            roc = detectors.roc(signed[:, at], copied, FPR)
    ends = zip(("", "_low", "_high"), auc, strict=True)
    row = {f"{name}{end}": of[at] for end, of in ends}
    return row | {f"along_{name}": auc[0], f"roc_{name}": roc}


def _medians(config, name, values, copied) -> dict:
    """What a detector says of copies and of others, in the median, [k] each."""
    if values is None:
        values = np.full((len(copied), len(config.measure.times)), np.nan)
    groups = {"copies": values[copied], "others": values[~copied]}
    return {
        f"{which}_{name}": np.median(of, axis=0)
        if len(of)
        else np.full(of.shape[1], np.nan)
        for which, of in groups.items()
    }


# Pictures.


def draw(metrics, points):
    """(name, caption, figure) of each picture: see `study.Study`."""
    # Without copies, or with nothing else, no detector has been asked.
    rows = [row for row in metrics["table"] if _known(row, "trace")]
    for against, words in AGAINST.items():
        known = [row for row in rows if _known(row, f"{against}trace")]
        if not known:
            continue
        yield (
            f"{against}roc",
            f"ROC curves of detectors of copies that see no training point, against "
            f"{words}. The oracle is the distance to the nearest training point. "
            "Bands: 95 % intervals over the seeds.",
            figures.curves([_roc(row, against, words) for row in known]),
        )
        yield (
            f"{against}noise",
            f"AUC against {words}, by the noise level at which the score is asked: the "
            "share of pairs in which the copy has more of what the papers say of "
            "copies; below 1/2 it has less. Bands: 95 % intervals over the seeds.",
            figures.curves([_noise(row, against) for row in known]),
        )
    if rows:
        yield (
            "spectrum",
            "Eigenvalues of minus the Hessian of log p_t at copies and at other "
            "samples, in units of 1 / sigma²: the largest (sharpest direction) and the "
            "smallest (flattest). At a point that stands alone all are 1. Medians over "
            "the samples. Bands: 95 % intervals over the seeds.",
            figures.curves(list(map(_spectrum, rows))),
        )


def _roc(row, against, words):
    chance = figures.Line(FPR, FPR, "chance", style=":", color=figures.GREY)
    return figures.Panel(
        _title(row), [*_lines(row, f"roc_{against}", FPR, "-"), chance],
        f"{words} called copies", "copies found", xscale="linear", yscale="linear",
        percent=True,
    )  # fmt: skip


def _noise(row, against):
    lines = _lines(row, f"along_{against}", row["sigma"]["mean"], "o-")
    return figures.Panel(_title(row), lines, "sigma", "AUC", yscale="linear", unit=True)


def _spectrum(row):
    sigma, lines = np.asarray(row["sigma"]["mean"]), []
    for name, style in SPECTRUM.items():
        for which, color in COPIES.items():
            value = figures.Interval.read(row[f"{which}_{name}"])
            scaled = figures.Interval(*(a * sigma**2 for a in value))._asdict()
            words = f"{which}: {DETECTORS[name]}"
            lines.append(figures.line(sigma, scaled, words, style, color))
    return figures.Panel(
        _title(row), lines, "sigma", "eigenvalue x sigma²", yscale="linear"
    )


def _title(row):
    n = grid.label(row, ("num_examples",))
    first = ", ".join(filter(None, (n, f"{row['ratio']['mean']:.0%} copies")))
    return "\n".join(filter(None, (first, results.setting(row))))


def _known(row, name):
    return row.get(name, {}).get("mean") is not None


def _lines(row, start, x, style):
    """A line for each detector that was measured; colours are those of its name."""
    return [
        figures.line(x, row[f"{start}{name}"], words, style, color)
        for (name, words), color in zip(
            DETECTORS.items(), [*figures.COLORS[:6], "black"], strict=True
        )
        if np.isfinite(figures.Interval.read(row[f"{start}{name}"]).mean).any()
    ]


STUDY = Study(measure, draw, check, columns=COLUMNS, what="networks")
