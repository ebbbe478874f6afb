"""The loss gap against time: where the empirical score loses less than the truth.

Experiment `loss_gap` (Ye 2025, Figure 1). No network: each point of config.sweep is a
truth and n draws of it, and all numbers are exact but for the draws of X_t.
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
from memsep_jax.experiments.runtime import points
from memsep_jax.experiments.studies import results

MARKS = ("o-", "s--", "^:", "D-.", "v-")  # of each n, where the colour is that of d


def run(config, session, resume_step=None):
    """Measures every point; returns when the figures are drawn."""
    with session.phase("data"):
        parts = grid.check(config)
        build.truth(config)
        if config.data.law not in (None, "separated"):
            raise build.ConfigError(
                f"data.law={config.data.law}: the saturated loss gap and the collapse "
                "time are known for components of unit variance: data.law=separated"
            )
    session.begin(parts.splits.fingerprint, parts.splits)
    look = jax.jit(
        functools.partial(curves, process=parts.process, m=config.measure.draws)
    )
    times = jnp.asarray(config.measure.times)

    def work(points):
        for point in points:
            with session.phase("data"):
                own, truth = build.build(point.config), build.truth(point.config)
            with session.phase("measure"):
                data = jnp.asarray(own.splits.train.x)
                key = build.keys(point.config.seed).evaluate
                found = jax.block_until_ready(look(truth, data, times, key))
                n, (k, d) = own.splits.num_distinct, truth.means.shape
                # One point of each component never overlaps another.
                collapse = gap.collapse_time(n, k, d, own.process) if n > k else np.inf
                bound = gap.information_bound(jnp.ones(d), own.process, times[0], n)
            about = {"times": config.measure.times, "collapse_time": collapse}
            yield found | about | {"bound": bound}

    rows = points.run(config, session, work)
    table = results.over_seeds(rows)
    session.lead()
    record.write_csv(session.workdir / "ratio.csv", _columns(table))
    session.say(_ratios(table))
    results.finish(config, session, rows, draw)


def curves(truth, data, times, key, process, m):
    """Everything about the loss gap of one data set (Ye 2025, section 4).

    Args: truth of unit variances, data [n, d], times [k] increasing, m draws a time.
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
        both = gap.sides(truth, data, process, t, key, m)
        x, _ = gap.noised(key, data, process, t, m)  # the draws of both sides
        fresh = mixture.sample(fresh_key, mixture.diffuse(truth, process, t), m)
        seen = jax.lax.map(lambda x: posterior(x, t), x, batch_size=gap.BATCH)
        # One pass over the data gives the scores too: `floor` takes them as they are.
        fitted = (process.alpha(t) * seen.mean - x) / process.sigma(t) ** 2
        least = gap.floor(lambda score, t: score, process, fitted, t)
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
    found = gap.curve(at, times, curve_key)
    first, last = gap.curve(kl, times[jnp.array([0, -1])], kl_key)
    measured = gap.Estimate(found["gap"], found["gap_error"])
    return {
        **found,
        "integral": gap.kl_integral(times, measured, process).value,
        "twice_kl": 2 * (first - last),
        "remaining": 2 * last,
    }


def draw(metrics, points):
    """(name, caption, figure) of the sweep: see `report.write_sweep`."""
    groups: dict[int, list[dict]] = {}
    for row in metrics["table"]:
        groups.setdefault(row.get("d"), []).append(row)
    gaps, floors, ratios, weights = [], [], [], []
    for number, (d, rows) in enumerate(groups.items()):
        title = "" if d is None else f"d = {d}"
        lines, floor_lines = [], []
        for i, row in enumerate(rows):
            label, color = grid.label(row, ["num_examples"]), _of(figures.COLORS, i)
            lines += [_line(row, "gap", label, color), _mark(row, color)]
            floor_lines.append(_line(row, "floor_empirical", label, color))
            collapse, _, _ = _values(row, "collapse_time")  # nan: it never does
            if len(groups) > 1:  # one colour a d, one marker an n
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


def _values(row, name):
    """Mean, low and high of a row as arrays: null on disk is nan again."""
    return (np.asarray(row[name][k], float) for k in ("mean", "low", "high"))


def _line(row, name, label, color=None, style="o-"):
    mean, low, high = _values(row, name)
    return figures.Line(
        np.asarray(row["times"]["mean"]), mean, label, low, high, style, color
    )


def _mark(row, color):
    """A short vertical line through the saturated value at the collapse time."""
    t, _, _ = _values(row, "collapse_time")
    known = np.interp(
        np.log(t), *np.log([row[k]["mean"] for k in ("times", "saturated")])
    )
    ends = np.exp(known) * np.array([0.5, 2])
    return figures.Line([t, t], ends, style="-", color=color)


def _columns(table):
    """The curves of all points, one row a time, for ratio.csv."""
    columns: dict[str, list] = {}
    for row in table:
        for axis in grid.AXES:
            if axis in row:
                columns.setdefault(axis, []).extend(
                    [row[axis]] * len(row["times"]["mean"])
                )
        for name in ("times", "gap", "saturated", "ratio"):
            columns.setdefault(name, []).extend(row[name]["mean"])
        for end in ("low", "high"):
            columns.setdefault(f"ratio_{end}", []).extend(row["ratio"][end])
    return columns


def _ratios(table):
    """The ratios for the terminal: a row a time, a column a point."""
    shown = Table(title="loss gap / saturated value")
    shown.add_column("time", justify="right")
    cells = []
    for row in table:
        shown.add_column(grid.label(row, ["d", "num_examples"]), justify="right")
        cells.append(
            [
                f"{m:.2f} [{a:.2f}, {b:.2f}]"
                for m, a, b in zip(*_values(row, "ratio"), strict=True)
            ]
        )
    for t, *row in zip(table[0]["times"]["mean"], *cells, strict=True):
        shown.add_row(f"{t:g}", *row)
    return shown
