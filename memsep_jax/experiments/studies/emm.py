"""Effective model memorization: how many training images a network copies.

EMM_eps = max {n : E R(n) >= 1 - eps} (Gu 2023, section 2), for the setting of the
config, or for every setting of the sweep: bracketing and bisection on log n, several
seeds for each n. Finished networks are not trained again, even after a change of eps or
of the bracket.
"""

import functools
import itertools

import numpy as np

from memsep_jax import data, memorization
from memsep_jax.experiments.config import build, grid
from memsep_jax.experiments.reporting import figures
from memsep_jax.experiments.runtime import points
from memsep_jax.experiments.studies import networks, results
from memsep_jax.experiments.studies.results import AXES, OTHER
from memsep_jax.experiments.studies.study import Study

# The ratios of a network that an EMM is computed from; the first one is the result.
RATIO_OF = {
    "ratio": "sampled weights",
    "raw": "raw weights",
    "ema": "EMA weights",
    "highest": "highest along training",
}
COLUMNS = (
    *AXES, "ratio", "null", "raw", "ema", "highest", "emitted", "frechet", "precision",
    "recall", "steps", "parameters", "seeds",
)  # fmt: skip


def run(config, session):
    """Searches the EMM of every setting; returns when the figures are drawn."""
    with session.phase("data"):
        limits, splits = check(config)
    session.begin(splits.fingerprint, splits)
    rows, every, searches = [], [], []
    for choice in choices(config):
        outcome, done = search(choice, limits, session)
        searches.append(outcome)
        for some, its in done:
            every += grid.points(some)
            rows += its
        session.say(sentence(outcome))
    session.lead()  # one process alone writes the files of all sizes
    results.finish(
        config, session, rows, draw, every=every, emm=searches, level=_level(config),
        columns=COLUMNS,
    )  # fmt: skip


def choices(config) -> list:
    """A config for every setting of the sweep, without the sizes."""
    axes = grid.axes(config)
    axes.pop("num_examples", None)
    return [
        grid.narrowed(config, dict(zip(axes, values, strict=True)))
        for values in itertools.product(*axes.values())
    ]


def at(choice, n: int):
    """The config of a choice at a size: its points are the seeds."""
    one = choice.copy_and_resolve_references()
    one.sweep.num_examples = (n,)
    return one


def check(config) -> tuple[tuple[int, int, int], data.Splits]:
    """Checks everything that can be wrong, before a network is trained.

    Returns: the smallest and largest sizes that all settings have data for, and the
      number that sizes must be multiples of; the data at emm.high.
    Raises: build.ConfigError.
    """
    low, high = config.emm.low, config.emm.high
    wrong = []
    if not low < high:
        wrong.append(
            f"emm.low={low}, emm.high={high}: a bracket needs low < high; the search "
            "widens it where the level lies outside"
        )
    if config.sweep.num_examples:
        wrong.append(
            f"sweep.num_examples={tuple(config.sweep.num_examples)}: experiment=emm "
            "chooses the sizes itself, from emm.low and emm.high on; take "
            "experiment=factors for given ones"
        )
    if wrong:
        raise build.ConfigError("\n".join(wrong))
    smallest, largest, multiple = 2, high, 1
    if config.data.name != "mixture":  # a mixture has any number of points
        largest = min(_pool(choice) for choice in choices(config))
    for choice in choices(config):
        (first, *_) = grid.points(choice)
        # Balanced classes divide n, and every random label needs a point.
        if first.config.data.balanced:
            multiple = max(multiple, _classes(first.config))
        smallest = max(smallest, multiple, first.config.data.num_labels or 0)
    largest = largest // multiple * multiple
    if high > largest:
        raise build.ConfigError(
            f"emm.high={high}, but there are {largest} training points: lower it, or "
            "lower data.num_held_out"
        )
    for choice in choices(config):  # the ends, with all that depends on n
        built = [build.build(grid.points(at(choice, n))[0].config) for n in (low, high)]
    return (smallest, largest, multiple), built[-1].splits


def _pool(choice) -> int:
    """The number of training points of a setting."""
    # Without duplicates, which would count as further points.
    config = grid.points(choice)[0].config
    config.data.update(num_examples=None, duplicates=0.0)
    return len(build.build(config).splits.train.x)


def _classes(config) -> int:
    """The number of classes of the source, whatever the labels of the run are."""
    labelled = config.copy_and_resolve_references()
    labelled.data.update(labels="true", num_labels=None, num_examples=None)
    return build.build(labelled).num_classes


def search(choice, limits, session):
    """The EMM of one setting.

    Args: choice, of `choices`; limits, of `check`.
    Returns: the result, and [(config, rows)] for every size that was measured.
    """
    group, level, seeds = choice.emm, _level(choice), choice.sweep.seeds
    smallest, largest, multiple = limits
    done: dict[int, tuple] = {}
    ended = None
    while True:
        means = {n: mean(rows, "ratio") for n, (_, rows) in done.items()}
        n = memorization.next_size(
            means, level, group.low, group.high, smallest, largest, group.tolerance,
            multiple,
        )  # fmt: skip
        if n is None:
            break
        needed = (len(done) + 1) * seeds
        if group.budget is not None and needed > group.budget:
            ended = f"emm.budget={group.budget} networks"
            break
        some = at(choice, n)
        done[n] = some, _rows(some, session, what=f"n = {n:,}")
        if failed := seeds - len(done[n][1]):  # the mean of the others may be biased
            ended = f"{failed} failed networks of n = {n:,}"
            break
        ratio = mean(done[n][1], "ratio")
        session.say(f"n = {n:,}: {100 * ratio:.1f} % memorized")
    ordered = {n: done[n] for n in sorted(done)}
    rows = {n: rows for n, (_, rows) in ordered.items() if len(rows) == seeds}
    return result(choice, rows, ended), list(ordered.values())


def _rows(some, session, what):
    """The rows of the networks that did not fail."""
    work = functools.partial(networks.measure, session=session)
    try:
        return points.run(some, session, work, what=what)
    except points.FailedError:  # reported at the end, if other sizes succeeded
        return []


def mean(rows, kind) -> float:
    """E_D R(n), over the seeds."""
    return float(np.mean([row[kind] for row in rows]))


def result(choice, rows: dict[int, list], ended=None) -> dict:
    """The EMM by the networks at the sizes that were measured.

    Returns: for every ratio, {"value", "low", "high"}; a value is None where the level
      lies outside, and "beyond" then says on which side of which size.
    """
    level, samples = _level(choice), choice.sampler.num_samples
    sizes = list(rows)  # increasing
    outcome = {
        "setting": grid.label(grid.points(choice)[0].values, OTHER),
        "sizes": sizes,
        "seeds": choice.sweep.seeds,
        "ended": ended,
    }
    for kind in RATIO_OF:
        one: dict = {"value": None, "low": None, "high": None, "beyond": None}
        outcome[kind] = one
        if not sizes:
            one["beyond"] = "not known"
            continue
        ratios = np.array([[row[kind] for row in rows[n]] for n in sizes], float)
        means = ratios.mean(axis=1)
        # A decreasing fit: with few seeds the means need not fall with n.
        fit = memorization.decreasing(means, np.ones(len(sizes)))
        if fit[-1] >= level:
            one["beyond"] = f"at least {sizes[-1]:,}"
        elif fit[0] < level:
            one["beyond"] = f"below {sizes[0]:,}"
        else:
            counts = np.round(ratios * samples).astype(int)
            low, high = memorization.effective_interval(sizes, counts, samples, level)
            value = memorization.effective_memorization(sizes, means, level)
            one |= {"value": value, "low": low, "high": high}
    return outcome


def sentence(outcome: dict) -> str:
    """The result of one setting for a person."""
    name = f" ({outcome['setting']})" if outcome["setting"] else ""
    _, *others = RATIO_OF
    text = "; ".join(
        [
            f"EMM{name}: {shown(outcome['ratio'])}",
            *(f"{RATIO_OF[kind]} {shown(outcome[kind])}" for kind in others),
        ]
    )
    if outcome["ratio"]["value"] is None and outcome["sizes"]:
        text += (
            ". The level lies outside: give other emm.low and emm.high, more data, or "
            "another emm.eps"
        )
    return text + (f" [ended by {outcome['ended']}]" if outcome["ended"] else "")


def shown(one: dict) -> str:
    """ "132 [110, 150]", or on which side of the sizes the level lies."""
    if one["value"] is None:
        return one["beyond"]
    return f"{one['value']:,.0f} [{one['low']:,.0f}, {one['high']:,.0f}]"


def _level(config) -> float:
    return 1 - config.emm.eps


# Pictures.


def draw(metrics, points):
    """(name, caption, figure) of each picture: see `study.Study`."""
    level, searches = metrics["level"], metrics["emm"]
    sentences = " ".join(f"{sentence(outcome)}." for outcome in searches)
    groups = results.grouped(metrics["table"], results.setting)
    drawn = [outcome for outcome in searches if outcome["setting"] in groups]
    curves, null = [], None
    for i, outcome in enumerate(drawn):
        rows, color = groups[outcome["setting"]], figures.COLORS[i]
        label = outcome["setting"] or "memorized samples"
        curves.append(results.line(rows, "ratio", label, color=color))
        value = outcome["ratio"]
        if value["value"] is not None:
            ends = [value["low"], value["value"], value["high"]]
            name = "EMM, 95 % interval" if len(curves) == 1 else None
            curves.append(
                figures.Line(ends, [level] * 3, name, style="|-", color=color)
            )
        null = null or results.line(rows, "null", "null level", "--", figures.GREY)
    yield (
        "emm",
        "Memorized samples against the number of training points; the EMM is where the "
        f"curve crosses {100 * level:.0f} %, with its 95 % interval as a bar "
        "(bootstrap over seeds and samples). Bands: 95 % intervals over seeds. "
        + sentences,
        figures.curves([_panel("", [*curves, null])]),
    )
    _, *others = RATIO_OF
    panels = []
    for outcome in drawn:
        rows = groups[outcome["setting"]]
        lines = [results.line(rows, kind, RATIO_OF[kind]) for kind in others]
        panels.append(_panel(outcome["setting"] or "", lines))
    yield (
        "weights",
        "The same by raw and by EMA weights at the end, and the highest ratio of all "
        "snapshots of either, which the paper reports.",
        figures.curves(panels),
    )


def _panel(title, lines):
    return figures.Panel(
        title, lines, "training points n", "memorized samples", yscale="linear",
        percent=True,
    )  # fmt: skip


STUDY = Study(run=run, draw=draw, joint=True)
