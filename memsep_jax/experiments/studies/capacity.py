"""How wide must a network be for the empirical score, and how wide for the true one?

What is a theorem: Theorem 5.1 of Ye 2025 says that networks *exist* which reach
E || s_net - s ||^2 <= eps / sigma^4 for the empirical score with a width of order n,
and <= eps / sigma^2 for the true score with a width that does not depend on n, both
under Phat_t. The attention networks of models/exact.py do so without error, with n d
and K d + 1 numbers. All four are upper bounds by construction: that fewer neurons do
not suffice is not a theorem.

What is measured here: the smallest width at which a *trained* MLP met that error, for
these data, this budget of training and these widths. Experiment `capacity`: networks of
growing width are fitted to either score by regression at one fixed t, on fresh draws
from Phat_t at each step. The theorem's network sees t; here each network has its own t,
and its time input is a constant.
"""

import itertools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from memsep_jax import empirical, gap, mixture, process
from memsep_jax.experiments import training
from memsep_jax.experiments.config import build, checks, grid
from memsep_jax.experiments.reporting import figures
from memsep_jax.experiments.studies import ensemble, results
from memsep_jax.experiments.studies.study import Study
from memsep_jax.models import exact

TARGETS = {"empirical": 4, "true": 2}  # -> power of sigma in the error of Theorem 5.1
SWEPT = ("num_examples", "width")  # the axes that the theorem compares


class Tasks(NamedTuple):
    """The differences between the networks of one width, stacked: [m, ...]."""

    x: jax.Array  # [m, n_max, d] training points, padded
    n: jax.Array  # [m] the number of real ones
    t: jax.Array  # [m] the one time of the network
    target: Any  # params of exact.Attention, padded: the score to fit
    keys: Any  # build.Keys of [m] keys


def check(config) -> build.Parts:
    """The parts of the first point.   Raises: ConfigError."""
    _check_axes(config)
    parts = grid.check(config)
    times = {f"measure.times[{i}]": t for i, t in enumerate(config.measure.times)}
    checks.inside(parts.process, config.process.name, times)
    _true_params(config)
    return parts


def conclude(config, rows, parts, session) -> dict:
    """The exact networks, and the smallest trained ones that meet the error."""
    times = np.asarray(config.measure.times)
    about = {"times": times, "sigma": jax.vmap(parts.process.sigma)(times)}
    about |= {"eps": config.measure.eps, "widths": sorted(config.sweep.width)}
    with session.phase("exact"):
        about["exact"] = exact_networks(config)
    # Where a width failed, the smallest of the others need not be the smallest.
    of_all = results.whole(config, rows, lambda values: int(values["num_examples"]))
    about["smallest"] = smallest(of_all, config.measure.eps, about["sigma"], times)
    sizes = sorted(config.sweep.num_examples)
    session.say(_widths(about["smallest"], sizes))
    return about


def exact_networks(config) -> list[dict]:
    """The numbers and the errors of the attention networks, for each n.

    Errors are those of float32 against the closed forms, relative: the root of
    E || s_net - s ||^2 / E || s ||^2 under Phat_t, the largest of the times.
    """
    rows: list[dict] = []
    for point in grid.points(config):
        n = point.values["num_examples"]
        if point.values["seed"] or n in [row["num_examples"] for row in rows]:
            continue
        parts, truth = build.build(point.config), build.truth(point.config)
        x, made = jnp.asarray(parts.splits.train.x), parts.process
        rows.append({"num_examples": n})
        for name, params, score_fn in (
            ("empirical", exact.empirical_params(x), empirical.score(x, made)),
            ("true", _true_params(point.config), mixture.score(truth, made)),
        ):
            rows[-1] |= {
                f"{name}_numbers": training.count(params),
                f"{name}_error": _exact_error(point.config, params, score_fn, x, made),
            }
    return rows


def _exact_error(config, params, score_fn, x, made) -> float:
    network = exact.Attention(made, len(params["points"]))
    key = build.keys(config.seed).evaluate

    def error(t):
        draws, _ = gap.noised(key, x, made, t, config.measure.draws)

        def built(x, t):
            return network.apply({"params": params}, x, t)

        size = gap.fisher(score_fn, lambda x, t: jnp.zeros_like(x), draws, t)
        return jnp.sqrt(gap.fisher(built, score_fn, draws, t) / size)

    times = jnp.asarray(config.measure.times)
    return float(jax.jit(lambda: jax.lax.map(error, times))().max())


def measure(points, session):
    """Fits the networks of some points of one width: one for each target and time.

    Yields: for each point its numbers, or the error that it failed with; "..._error" is
      E || s_net - s ||^2 under Phat_t, [times], on draws that no network was trained
      on.
    """
    configs = [point.config for point in points]
    with session.phase("data"):
        built = [build.build(config) for config in configs]
        tasks = _tasks(configs, built)
    config, parts = configs[0], built[0]
    started = time.monotonic()
    with session.phase("train"):
        state, losses = _fit(config, parts, tasks)
    seconds = (time.monotonic() - started) / len(points)
    with session.phase("evaluate"):

        def error(params, task):
            x = _noised(task.keys.evaluate, task, parts.process, config.measure.draws)
            student = training.score_fn(parts, params)
            teacher = _teacher(parts.process, task)

            def of_one(x):
                return gap.fisher(student, teacher, x[None], task.t)

            # A few draws at a time: the teacher compares [draws, n] pairs.
            return jnp.mean(jax.lax.map(of_one, x, batch_size=gap.BATCH))

        errors = np.asarray(jax.jit(jax.vmap(error))(state.params, tasks))
    shape = (len(points), len(TARGETS), len(config.measure.times))  # as in `_tasks`
    errors, losses = errors.reshape(shape), losses.reshape(shape)
    parameters = training.count(state.params) // len(tasks.t)
    # A point has one network for each target and time, and fails with any of them.
    applied = np.asarray(state.step).reshape(len(points), -1).min(axis=1)
    failed = ensemble.failures(applied, parts.steps)
    for why, error, loss in zip(failed, errors, losses, strict=True):
        if why is not None:
            yield why
            continue
        row = {"parameters": parameters, "seconds": seconds}
        for i, name in enumerate(TARGETS):
            row |= {f"{name}_error": error[i], f"{name}_loss": loss[i]}
        yield row


def smallest(rows, eps, sigma, times) -> list[dict]:
    """The smallest width that meets the error of Theorem 5.1, None where none does.

    By the mean error over the seeds ("width"), and by each seed alone ("by_seed").

    Args: rows, those of `points.run`.   sigma, times: [times].
    """
    widths = []
    sizes = sorted({row["num_examples"].item() for row in rows})
    for name, i, n in itertools.product(TARGETS, range(len(times)), sizes):
        errors: dict[int, dict[int, float]] = {}  # seed -> width -> error
        for row in rows:
            if row["num_examples"] == n:
                of_seed = errors.setdefault(row["seed"].item(), {})
                of_seed[row["width"].item()] = row[f"{name}_error"][i]
        mean = {
            width: np.mean([of_seed[width] for of_seed in errors.values()])
            for width in next(iter(errors.values()))
        }
        limit = eps / sigma[i] ** TARGETS[name]
        by_seed = [_first(of_seed, limit) for of_seed in errors.values()]
        chosen = {"width": _first(mean, limit), "by_seed": by_seed}
        about = {"target": name, "t": float(times[i]), "num_examples": n}
        widths.append(about | chosen)
    return widths


def _widths(rows, sizes) -> Table:
    """The smallest widths as a table: n down, target and time across."""
    shown = Table(title="smallest width that meets the error of Theorem 5.1")
    shown.add_column("n", justify="right")
    columns = sorted({(row["target"], row["t"]) for row in rows})
    for target, t in columns:
        shown.add_column(f"{target}, t = {t:.3g}", justify="right")
    width = {(r["target"], r["t"], r["num_examples"]): r["width"] for r in rows}
    for n in sizes:
        cells = (width.get((*column, n), "n/a") or "none" for column in columns)
        shown.add_row(f"{n:,}", *map(str, cells))
    return shown


def draw(metrics, points):
    """(name, caption, figure) of each picture: see `study.Study`."""
    widths = metrics["widths"]
    sizes = sorted({row["num_examples"] for row in metrics["table"]})
    times = metrics["times"]
    for i, t in enumerate(times):
        panels = [_error_panel(metrics, name, i, sizes) for name in TARGETS]
        caption = (
            f"Measured: error of trained networks at t = {t:g} against their width, "
            "under the noised training set. Dashed: the error of Theorem 5.1 of Ye "
            "2025, eps / sigma^4 for the empirical and eps / sigma^2 for the true "
            "score."
        )
        yield f"error_{i}", caption, figures.curves(panels)
    yield (
        "smallest_width",
        f"Left, measured: the smallest of the widths {', '.join(map(str, widths))} "
        "whose mean error over the seeds meets Theorem 5.1; no mark where none does. "
        "Right, by construction: how many numbers suffice for no error at all. Both "
        "the theorem and the construction are upper bounds; that smaller networks "
        "cannot do it is not a theorem.",
        _smallest_figure(metrics, sizes, times),
    )


def _error_panel(metrics, name, i, sizes):
    """The errors of one target at the i-th time, and that of Theorem 5.1."""
    widths, eps, power = metrics["widths"], metrics["eps"], TARGETS[name]
    scale, lines = metrics["sigma"][i] ** power, []
    for n in sizes:
        rows = {r["width"]: r for r in metrics["table"] if r["num_examples"] == n}
        own = [w for w in widths if w in rows]  # others failed
        errors = (rows[w][f"{name}_error"] for w in own)
        at_time = [{end: curve[i] for end, curve in e.items()} for e in errors]
        line = figures.line(own, at_time, f"n = {n:,}", log=True)
        scaled = {
            "mean": scale * line.mean,
            "low": scale * line.low,
            "high": scale * line.high,
        }
        lines.append(line._replace(**scaled))
    limit = figures.Line(
        [widths[0], widths[-1]], [eps, eps], f"eps = {eps:g}", style="--", color="black"
    )
    ylabel = f"error x sigma$^{power}$"
    return figures.Panel(f"{name} score", [*lines, limit], "width", ylabel)


def _smallest_figure(metrics, sizes, times):
    colors = {"empirical": figures.RED, "true": figures.BLUE}
    lines = []
    for name in TARGETS:
        for i, t in enumerate(times):
            style = ("o-", "s--", "^:", "D-.")[i % 4]
            chosen = {
                row["num_examples"]: row["width"]
                for row in metrics["smallest"]
                if row["target"] == name and row["t"] == t
            }
            widths = np.array([chosen.get(n) for n in sizes], float)
            lines.append(
                figures.Line(
                    sizes, widths, f"{name} score, t = {t:g}", style=style,
                    color=colors[name],
                )
            )  # fmt: skip
    # The widest, which also gives the axis its scale where no width sufficed.
    widest = [max(metrics["widths"])] * len(sizes)
    lines.append(
        figures.Line(sizes, widest, "widest tried", style="--", color=figures.GREY)
    )
    exact_sizes = [row["num_examples"] for row in metrics["exact"]]
    numbers = [
        figures.Line(
            exact_sizes, [row[f"{name}_numbers"] for row in metrics["exact"]], label,
            color=colors[name],
        )
        for name, label in (
            ("empirical", "empirical score: n d"),
            ("true", "true score: K d + 1"),
        )
    ]  # fmt: skip
    return figures.curves(
        [
            figures.Panel("trained networks", lines, "n", "smallest width"),
            figures.Panel("exact attention networks", numbers, "n", "numbers"),
        ]
    )


def _tasks(configs, built):
    """One task for each point, target and time, in this order."""
    points = [exact.empirical_params(parts.splits.train.x) for parts in built]
    truths = [_true_params(config) for config in configs]
    n_max = max(len(own["points"]) for own in points)
    keys = max(n_max, *(len(own["points"]) for own in truths))
    tasks = [
        Tasks(
            _padded(own, n_max)["points"],
            jnp.asarray(len(own["points"])),
            jnp.float32(t),
            _padded(target, keys),
            build.keys(config.seed),
        )
        for config, own, true in zip(configs, points, truths, strict=True)
        for target in (own, true)
        for t in config.measure.times
    ]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *tasks)


def _padded(params, keys):
    """The same exact network with more keys, which have no weight."""
    points, short = params["points"], keys - len(params["points"])
    log_weights = params.get("log_weights", jnp.zeros(len(points)))
    return {
        "points": jnp.pad(points, [(0, short), (0, 0)]),
        # Not -inf: exp of this is 0 too, and JAX_DEBUG_INFS=1 stops at infinities.
        "log_weights": jnp.pad(log_weights, (0, short), constant_values=-1e30),
        "variance": params.get("variance", jnp.zeros(())),
    }


def _teacher(made, task):
    """The score to fit: both are exact attention, so one program computes both."""
    network = exact.Attention(made, len(task.target["points"]))
    return lambda x, t: network.apply({"params": task.target}, x, t)


def _noised(key, task, made, m):
    """m draws from Phat_t at the time of a task.   Returns: [m, d]."""
    rows_key, eps_key = jax.random.split(key)
    x0 = task.x[jax.random.randint(rows_key, (m,), 0, task.n)]
    return process.perturb(made, x0, task.t, jax.random.normal(eps_key, x0.shape))


def _fit(config, parts, tasks):
    """All networks at once.   Returns: train.TrainState [m, ...], last losses [m]."""

    def loss(task):
        teacher, sigma = _teacher(parts.process, task), parts.process.sigma(task.t)

        def of_example(params, x, key):
            error = training.score_fn(parts, params)(x, task.t) - teacher(x, task.t)
            # In units of the noise, where both scores are of order 1 at every t.
            return jnp.mean((sigma * error) ** 2)

        return of_example

    def batch(task, key):
        return _noised(key, task, parts.process, config.train.batch_size)

    return ensemble.fit(config, parts, tasks, loss, lambda task: parts.tx, batch)


def _true_params(config):
    """The params of the exact network of the truth.   Raises: ConfigError."""
    truth = build.truth(config)
    if not isinstance(truth, mixture.Mixture):
        raise build.ConfigError(
            f"data.law={config.data.law}: capacity needs isotropic Gaussian components "
            "of one variance, such as those of data.law=separated"
        )
    try:
        return exact.mixture_params(truth)
    except ValueError as error:
        raise build.ConfigError(f"data.law={config.data.law}: {error}") from error


def _check_axes(config):
    for axis in grid.AXES:
        if bool(config.sweep[axis]) != (axis in SWEPT):
            raise build.ConfigError(
                f"sweep.{axis}={config.sweep[axis]}: capacity sweeps num_examples and "
                "width, at least one value of each, and no other axis"
            )


def _first(errors, limit):
    """The smallest width with an error within the limit, or None.   errors: {width}."""
    return min((w for w, error in errors.items() if error <= limit), default=None)


STUDY = Study(
    measure, draw, check, conclude=conclude, alike=lambda point: point.values["width"]
)
