"""The loss gap against time: where the empirical score loses less than the truth.

Experiment `loss_gap` (Ye 2025, Figure 1). There is no network: each point of
config.sweep is a truth and n draws of it, and all numbers are exact but for the draws
of X_t.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from memsep_jax import empirical, gap, mixture
from memsep_jax.experiments import record
from memsep_jax.experiments.config import build, grid
from memsep_jax.experiments.reporting import figures
from memsep_jax.experiments.studies import results
from memsep_jax.experiments.studies.study import Study

MARKS = ("o-", "s--", "^:", "D-.", "v-")  # one for each n, where the colour shows d


def check(config) -> build.Parts:
    """The parts of the first point.   Raises: ConfigError."""
    parts = grid.check(config)
    build.truth(config)
    if config.data.law not in (None, "separated"):
        raise build.ConfigError(
            f"data.law={config.data.law}: the saturated loss gap and the collapse "
            "time are known for components of unit variance: data.law=separated"
        )
    return parts


def share(config, parts, session) -> dict:
    """The compiled `curves`, one program for all points of a size."""
    of_all = {"process": parts.process, "m": config.measure.draws}
    return {"compiled": jax.jit(functools.partial(curves, **of_all))}


def measure(points, session, compiled):
    """Yields, for each point, its curves and numbers."""
    for point in points:
        config = point.config
        times = jnp.asarray(config.measure.times)
        with session.phase("data"):
            parts, truth = build.build(config), build.truth(config)
        with session.phase("measure"):
            data, key = jnp.asarray(parts.splits.train.x), build.keys(config.seed)
            row = jax.block_until_ready(compiled(truth, data, times, key.evaluate))
            n, (k, d) = parts.splits.num_distinct, truth.means.shape
            # One point of each component never overlaps another.
            collapse = gap.collapse_time(n, k, d, parts.process) if n > k else np.inf
            bound = gap.information_bound(jnp.ones(d), parts.process, times[0], n)
        about = {"times": config.measure.times, "collapse_time": collapse}
        yield row | about | {"bound": bound}


def conclude(config, rows, parts, session) -> dict:
    """Writes and shows the ratio of the gap to its saturated value."""
    table = results.over_seeds(rows)
    record.write_csv(session.workdir / "ratio.csv", _columns(table))
    session.say(_ratios(table))
    return {}


def curves(truth, data, times, key, process, m):
    """The loss gap of one data set and what explains it (Ye 2025, section 4).

    Args: truth of unit variances, data [n, d], times [k] increasing, m draws per time.
    Returns:
      dict of [k]: gap (the Fisher form), loss_side (of Proposition 4.1), difference
      (draw by draw), each with its standard error; saturated, ratio (gap over it);
      floor_truth and floor_empirical, the least eps-losses per dimension; entropy and
      largest, of the posterior over the training points. And of []: integral, of
      g^2 gap over the times by the trapezoid; twice_kl, what it must be; remaining,
      the same from the last time on.
    """
    true = mixture.score(truth, process)
    posterior = empirical.posterior(data, process)

    def at(t, key):
        key, fresh_key = jax.random.split(key)
        # Both sides of Proposition 4.1 from the same draws: draw by draw they differ by
        # a term of mean 0.
        both = gap.sides(truth, data, process, t, key, m)
        x, _ = gap.noised(key, data, process, t, m)  # the draws of both sides
        fresh = mixture.sample(fresh_key, mixture.diffuse(truth, process, t), m)
        seen = jax.lax.map(lambda x: posterior(x, t), x, batch_size=gap.BATCH)
        # The pass over the data that gave the posterior gives the scores too.
        # Tweedie's formula: s = (alpha E[X_0 | X_t = x] - x) / sigma^2.
        fitted = (process.alpha(t) * seen.mean - x) / process.sigma(t) ** 2
        least = gap.floor_of(fitted, process, t)
        saturated = gap.saturated(jnp.ones(data.shape[1]), process, t)
        return {
            **_estimate("gap", both.fisher),
            **_estimate("loss_side", both.losses),
            **_estimate("difference", both.difference),
            **_estimate("floor_truth", gap.floor(true, process, fresh, t)),
            **_estimate("floor_empirical", least),
            "saturated": saturated,
            "ratio": both.fisher.value / saturated,
            "entropy": jnp.mean(seen.entropy),
            "largest": jnp.mean(seen.largest),
        }

    def kl(t, key):
        return gap.kl(truth, data, process, t, key, m).value

    curve_key, kl_key = jax.random.split(key)
    along = gap.curve(at, times, curve_key)
    first, last = gap.curve(kl, times[jnp.array([0, -1])], kl_key)
    # int g^2 Loss-Gap dt = 2 [KL(first) - KL(last)], exactly, for each data set: the
    # two sides, estimated in different ways, are each other's test.
    measured = gap.Estimate(along["gap"], along["gap_error"])
    return {
        **along,
        "integral": gap.kl_integral(times, measured, process).value,
        "twice_kl": 2 * (first - last),
        "remaining": 2 * last,
    }


def draw(metrics, points):
    """(name, caption, figure) of each picture: see `study.Study`."""
    groups = results.grouped(metrics["table"], lambda row: row.get("d"))
    gaps, floors, ratios, weights = [], [], [], []
    for number, (d, rows) in enumerate(groups.items()):
        title = "" if d is None else f"d = {d}"
        lines, floor_lines = [], []
        for i, row in enumerate(rows):
            label, color = grid.label(row, ["num_examples"]), _of(figures.COLORS, i)
            mark = _mark(row, color, None if i else "collapse time, expected")
            lines += [_line(row, "gap", label, color), mark]
            floor_lines.append(_line(row, "floor_empirical", label, color))
            collapse = figures.Interval.read(row["collapse_time"]).mean  # nan: never
            if len(groups) > 1:  # a colour for each d, a marker for each n
                label = title if i == 0 else None
                color = _of(figures.COLORS, number)
            for chosen, name in ((ratios, "ratio"), (weights, "largest")):
                line = _line(row, name, label, color, _of(MARKS, i))
                chosen.append(line._replace(x=line.x / collapse))
        known = _line(rows[0], "saturated", "saturated", "black", ":")
        least = _line(rows[0], "floor_truth", "true score", "black", ":")
        gaps.append(figures.Panel(title, [*lines, known], "time t", "loss gap"))
        floors.append(
            figures.Panel(
                title, [*floor_lines, least], "time t", "least eps-loss per dimension",
                yscale="linear",
            )
        )  # fmt: skip
    yield (
        "loss_gap",
        "How much less the empirical score loses than the true one. Dotted: the "
        "value as long as the noised training points keep apart; the short vertical "
        "lines are the times until which they should.",
        figures.curves(gaps),
    )
    scaled = "t / collapse time"
    panels = [
        figures.Panel("loss gap", ratios, scaled, "share of its saturated value"),
        figures.Panel("posterior", weights, scaled, "mean largest weight"),
    ]
    yield (
        "collapse",
        "Time in units of the collapse time, (n / K)^(2/d) - 1 = alpha² / sigma²; "
        "every n has its own marker. Left, the loss gap over its saturated value; "
        "right, the weight of the training point that a noised one most likely came "
        "from.",
        figures.curves([panel._replace(yscale="linear") for panel in panels]),
    )
    yield (
        "floors",
        "The least eps-loss: of the empirical score on the training set, and of the "
        "true one on new data (dotted). A network whose training loss is below the "
        "dotted line is memorizing at that time.",
        figures.curves(floors),
    )


def _of(choices, i):
    return choices[i % len(choices)]


def _estimate(name, estimate):
    return {name: estimate.value, f"{name}_error": estimate.error}


def _line(row, name, label, color, style="o-"):
    times = np.asarray(row["times"]["mean"])
    return figures.line(times, row[name], label, style, color)


def _mark(row, color, label):
    """A short vertical line through the saturated value at the collapse time."""
    t = figures.Interval.read(row["collapse_time"]).mean
    known = np.interp(
        np.log(t), *np.log([row[k]["mean"] for k in ("times", "saturated")])
    )
    ends = np.exp(known) * np.array([0.5, 2])
    return figures.Line([t, t], ends, label, style="-", color=color)


def _columns(table):
    """The curves of all points, a row for each time, for ratio.csv."""
    columns: dict[str, list] = {}
    for row in table:
        for axis in grid.AXES:
            if axis in row:
                values = [row[axis]] * len(row["times"]["mean"])
                columns.setdefault(axis, []).extend(values)
        for name in ("times", "gap", "saturated", "ratio"):
            columns.setdefault(name, []).extend(row[name]["mean"])
        for end in ("low", "high"):
            columns.setdefault(f"ratio_{end}", []).extend(row["ratio"][end])
    return columns


def _ratios(table):
    """The ratios for the terminal: times down, points across."""
    shown = Table(title="loss gap / saturated value")
    shown.add_column("time", justify="right")
    cells = []
    for row in table:
        shown.add_column(grid.label(row, ["d", "num_examples"]), justify="right")
        mean, _, low, high = figures.Interval.read(row["ratio"])
        triples = zip(mean, low, high, strict=True)
        cells.append([f"{m:.2f} [{a:.2f}, {b:.2f}]" for m, a, b in triples])
    for t, *row in zip(table[0]["times"]["mean"], *cells, strict=True):
        shown.add_row(f"{t:g}", *row)
    return shown


STUDY = Study(measure, draw, check, share, conclude)
