"""Effective model memorization: how many training images a network copies.

EMM_eps = max {n : E R(n) >= 1 - eps} (Gu 2023, section 2), for the setting of the
config, or for every setting of the sweep: bracketing and bisection on log n, several
seeds for each n. Finished networks are not trained again, also where eps or the bracket
is another one now.
"""

import functools
import itertools

import numpy as np

from memsep_jax import data, memorization
from memsep_jax.experiments.config import build, grid
from memsep_jax.experiments.reporting import figures
from memsep_jax.experiments.runtime import points
from memsep_jax.experiments.studies import networks, results

# Which ratio of a network counts: that of the weights that are sampled, and others.
KINDS = {
    "ratio": "sampled weights",
    "raw": "raw weights",
    "ema": "EMA weights",
    "highest": "highest along training",
}
OTHER = tuple(axis for axis in grid.AXES if axis != "num_examples")
COLUMNS = (
    "setting", "num_examples", "d", "width", "depth", "weight_decay", "ratio", "null",
    "raw", "ema", "highest", "emitted", "frechet", "precision", "recall", "steps",
    "parameters", "seeds",
)  # fmt: skip


def run(config, session, resume_step=None):
    """Searches the EMM of every setting; returns when the figures are drawn."""
    with session.phase("data"):
        limits, splits = check(config)
    session.begin(splits.fingerprint, splits)
    rows, every, searches = [], [], []
    for choice in choices(config):
        found, done = search(choice, limits, session)
        searches.append(found)
        for some, its in done:
            every += grid.points(some)
            rows += its
        session.say(sentence(found))
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
    """Everything that can be wrong, before a network is trained.

    Returns: the smallest and largest sizes that all settings have data for, and of what
      they must be multiples; the data at emm.high.
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
    if config.data.name != "mixture":  # that has as many as are asked for
        largest = min(_pool(choice) for choice in choices(config))
    for choice in choices(config):
        (first, *_) = grid.points(choice)
        if first.config.data.balanced:
            multiple = max(multiple, _classes(first.config))
        smallest = max(smallest, multiple, first.config.data.num_labels or 0)
    largest = largest // multiple * multiple
    if high > largest:
        raise build.ConfigError(
            f"emm.high={high}, but there are {largest} training points: lower it, or "
            "take less of data.num_held_out"
        )
    for choice in choices(config):  # the ends, with all that depends on n
        built = [build.build(grid.points(at(choice, n))[0].config) for n in (low, high)]
    return (smallest, largest, multiple), built[-1].splits


def _pool(choice) -> int:
    """How many training points there are."""
    config = grid.points(choice)[0].config
    config.data.update(num_examples=None, duplicates=0.0)
    return len(build.build(config).splits.train.x)


def _classes(config) -> int:
    """Of the source, whatever the labels of the run are."""
    labelled = config.copy_and_resolve_references()
    labelled.data.update(labels="true", num_labels=None, num_examples=None)
    return build.build(labelled).num_classes


def search(choice, limits, session):
    """The EMM of one setting.

    Args: choice, of `choices`; limits, of `check`.
    Returns: the result, and [(config, rows)] for every size that was looked at.
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
        networks_then = (len(done) + 1) * seeds
        if group.budget is not None and networks_then > group.budget:
            ended = f"emm.budget={group.budget} networks"
            break
        some = at(choice, n)
        done[n] = some, _rows(some, session, what=f"n = {n:,}")
        if failed := seeds - len(done[n][1]):  # the mean of the others is another one
            ended = f"{failed} failed networks of n = {n:,}"
            break
        ratio = mean(done[n][1], "ratio")
        session.say(f"n = {n:,}: {100 * ratio:.1f} % memorized")
    ordered = {n: done[n] for n in sorted(done)}
    rows = {n: rows for n, (_, rows) in ordered.items() if len(rows) == seeds}
    return result(choice, rows, ended), list(ordered.values())


def _rows(some, session, what):
    """Of the networks that did not fail."""
    work = functools.partial(networks.measure, session=session)
    try:
        return points.run(some, session, work, what=what)
    except points.FailedError:  # said at the end, where other sizes are known
        return []


def mean(rows, kind) -> float:
    """E_D R(n), over the seeds."""
    return float(np.mean([row[kind] for row in rows]))


def result(choice, rows: dict[int, list], ended=None) -> dict:
    """What the networks at the sizes that were looked at say of the EMM.

    Returns: for every kind of ratio, {"value", "low", "high"}; a value is None where
      the level lies outside, and "beyond" then says on which side of which size.
    """
    level, samples = _level(choice), choice.sampler.num_samples
    sizes = list(rows)
    found = {
        "setting": grid.label(grid.points(choice)[0].values, OTHER),
        "sizes": sizes,
        "seeds": choice.sweep.seeds,
        "ended": ended,
    }  # fmt: skip
    for kind in KINDS:
        one: dict = {"value": None, "low": None, "high": None, "beyond": None}
        found[kind] = one
        if not sizes:
            one["beyond"] = "not known"
            continue
        ratios = np.array([[row[kind] for row in rows[n]] for n in sizes], float)
        means = ratios.mean(axis=1)
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
    return found


def sentence(found: dict) -> str:
    """The result of one setting for a person."""
    name = f" ({found['setting']})" if found["setting"] else ""
    text = f"EMM{name}: {shown(found['ratio'])}"
    others = [
        f"{KINDS[kind]} {shown(found[kind])}" for kind in ("raw", "ema", "highest")
    ]
    text += f"; {'; '.join(others)}"
    if found["ratio"]["value"] is None and found["sizes"]:
        text += (
            ". The level lies outside: give other emm.low and emm.high, more data, or "
            "another emm.eps"
        )
    return text + (f" [ended by {found['ended']}]" if found["ended"] else "")


def shown(one: dict) -> str:
    """ "132 [110, 150]", or on which side of the sizes the level lies."""
    if one["value"] is None:
        return one["beyond"]
    return f"{one['value']:,.0f} [{one['low']:,.0f}, {one['high']:,.0f}]"


def _level(config) -> float:
    return 1 - config.emm.eps


# Pictures.


def draw(metrics, points):
    """(name, caption, figure) of the search: see `report.write_sweep`."""
    level = metrics["level"]
    text = " ".join(f"{sentence(found)}." for found in metrics["emm"])
    groups: dict = {}
    for row in metrics["table"]:
        groups.setdefault(_setting(row), []).append(row)
    drawn = [found for found in metrics["emm"] if found["setting"] in groups]
    curves, null = [], None
    for i, found in enumerate(drawn):
        rows = groups[found["setting"]]
        label = found["setting"] or "memorized samples"
        curves.append(line(rows, "ratio", label, figures.COLORS[i]))
        value = found["ratio"]
        if value["value"] is not None:
            ends = [value["low"], value["value"], value["high"]]
            curves.append(
                figures.Line(ends, [level] * 3, style="|-", color=figures.COLORS[i])
            )
        null = null or line(rows, "null", "null level", figures.GREY, "--")
    yield (
        "emm",
        "Memorized samples against the number of training points; the EMM is where the "
        f"curve crosses {100 * level:.0f} %, with its 95 % interval as a bar "
        f"(bootstrap over seeds and samples). Bands: 95 % intervals over seeds. {text}",
        figures.curves([_panel("", [*curves, null])]),
    )
    yield (
        "weights",
        "The same by raw and by EMA weights at the end, and the highest ratio of all "
        "snapshots of either, which the paper keeps.",
        figures.curves(
            [
                _panel(found["setting"] or "", [
                    line(groups[found["setting"]], kind, text)
                    for kind, text in list(KINDS.items())[1:]
                ])
                for found in drawn
            ]
        ),
    )  # fmt: skip


def line(rows, kind, label, color=None, style="o-"):
    """A ratio against n, from rows of metrics.json's table."""
    rows = sorted(rows, key=lambda row: row["num_examples"])
    mean, low, high = (
        np.array([row[kind][k] for row in rows], float) for k in ("mean", "low", "high")
    )
    n = [row["num_examples"] for row in rows]
    return figures.Line(n, mean, label, low, high, style, color)


def _panel(title, lines):
    return figures.Panel(
        title, lines, "training points n", "memorized samples", yscale="linear",
        percent=True,
    )  # fmt: skip


def _setting(row):
    return grid.label(row, OTHER)
