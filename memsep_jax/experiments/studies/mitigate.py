"""What helps against memorization, on one frontier, and whether it comes back.

Experiments `prune` and `mitigate`: every one of sweep.points is a network that is
trained with some switches of the config (or taken from models/, or from prune.source),
pruned where prune.ratio asks for it, fine-tuned, and looked at on the way. The point
{} is the control: neither switches nor pruning, and the same extra steps.

The re-test, where measure.targets asks for it: what the final network emits in more
samples, what a gradient search for an initial noise finds, and what it emits after
fine-tuning without the switches.
"""

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memsep_jax import checkpoint, memorization, neighbours, sampling
from memsep_jax.experiments import record, training
from memsep_jax.experiments.config import build, grid
from memsep_jax.experiments.reporting import figures
from memsep_jax.experiments.runtime import points
from memsep_jax.experiments.studies import networks, results, store, training_run
from memsep_jax.experiments.studies.pruning import (
    Pruned,
    cost,
    cut,
    keep,
    tuner,
    watcher,
)
from memsep_jax.train import NonFiniteError

# What `Tools` depend on, besides the seed.
SAMPLING = (
    "data", "process", "prediction", "model", "sampler", "memorization", "measure",
)  # fmt: skip
MORE = 4  # times as many samples in the re-test
COLUMNS = (
    "setting", "ratio", "null", "emitted", "frechet_rise", "precision", "recall",
    "frechet",
    "untuned_ratio", "tuned_ratio", "removed", "parameters", "flops",
    "emitted_more", "found", "found_null", "again_ratio", "again_emitted", "seeds",
)  # fmt: skip
BANDS = ("small_t", "random")  # lines that are drawn with their intervals
RETEST = {
    "emitted": "emitted",
    "emitted_more": f"emitted in {MORE} times more samples",
    "found": "found by search for a noise",
    "again_emitted": "emitted after fine-tuning without it",
}


class Tools(NamedTuple):
    """What networks of one seed and shape share, however they are trained."""

    generate: Callable  # (weights, start, stop) -> samples
    watch: Callable  # `pruning.watcher`
    tune: Callable  # `pruning.tuner` of the config without the setting
    find: Callable  # `finder`


def run(config, session, resume_step=None):
    """Trains, prunes and measures every point; returns when the figures are drawn."""
    with session.phase("data"):
        parts = grid.check(config)
        source = _source(config, parts, session.say)
    session.begin(parts.splits.fingerprint, parts.splits)
    shared: dict[str, Tools] = {}  # compiled once, not for every way of training

    def work(points):
        key = networks.tag(points[0].config, SAMPLING)
        if key not in shared:
            shared[key] = _tools(config, points[0], session)
        return measure(points, shared[key], session, source)

    rows = points.run(config, session, work, alike=_alike, what="networks")
    _compare(rows)
    # A frontier without some of its points would be another one.
    of_all = results.whole(
        config, rows, lambda values: family(str(values.get("setting", "")))[0]
    )
    results.finish(
        config, session, rows, draw, columns=COLUMNS, matched=matched(of_all)
    )


def measure(some, tools, session, source=None):
    """Everything about some points that differ in no more than what is pruned.

    Args: source, the state to start from; None: it is trained.
    Yields: for each, the numbers of a row, or the error that it alone failed with.
    """
    config = some[0].config
    with session.phase("data"):
        parts = build.build(config)
    try:
        params = _trained(config, parts, session, tools.generate, source)
    except NonFiniteError as error:  # they share the network
        yield from [error] * len(some)
        return
    tune, measured, done = tuner(config, parts), {}, {}

    def look(point):
        with session.phase("prune"):
            stays = keep(point.config, parts, params, measured)
            which = stays.tobytes()
            if which not in done:  # two criteria may agree
                # What is trained otherwise, and not pruned, is as it was trained.
                more = (
                    tune if not (stays.all() and point.values.get("setting")) else None
                )
                done[which] = cut(config, params, stays, tools.watch, more)
            found = done[which]
        row = _row(point.config, found)
        row |= cost(parts, params, stays, config.prune.group)
        if config.measure.targets:
            with session.phase("re-test"):
                row |= retest(config, parts, found, tools)
        return row

    for point in some:
        yield points.attempt(look, point)


def _tools(config, point, session) -> Tools:
    """Args: config, of the sweep: without the setting of the point."""
    one, plain = point.config, grid.seeded(config, point.values["seed"])
    dropout = plain.model.dropout
    plain.model = one.model.copy_and_resolve_references()
    plain.model.dropout = dropout
    parts = build.build(one)
    generate = training_run.network_samples(one, parts, session)
    return Tools(
        generate,
        watcher(one, parts, generate),
        tuner(plain, build.build(plain)),
        finder(one, parts),
    )


def _row(config, found: Pruned):
    """What is final, and what it was on the way."""
    last = -1 if config.prune.ratio else 0  # what lost nothing is as it was trained
    row = {name: values[last] for name, values in found.numbers.items()}
    for name in ("ratio", "emitted", "frechet", "precision", "recall"):
        row[f"untuned_{name}"] = found.numbers[name][0]
        row[f"tuned_{name}"] = found.numbers[name][-1]
        row[f"along_{name}"] = found.numbers[name]
    removed = int((~found.keep).sum())
    return row | {"steps": found.steps, "removed": removed, "keep": found.keep}


def _compare(rows):
    """Adds frechet_rise: over the control of the same seed, as it was trained."""
    controls = {
        int(row["seed"]): row["frechet"] for row in rows if not row.get("setting")
    }
    for row in rows:
        control = controls.get(int(row["seed"]), np.nan)
        row["frechet_rise"] = row["frechet"] - control
        row["tuned_frechet_rise"] = row["tuned_frechet"] - control


# Where the networks come from.


def _alike(point):
    """Equal for points that differ in nothing but which units fall."""
    known = build.to_json(point.config)
    del known["prune"]["criterion"], known["prune"]["ratio"]
    return json.dumps(known, sort_keys=True)


def _trained(config, parts, session, generate, source):
    """The weights that are sampled, trained here unless they come from `source`."""
    if source is None:
        state = networks.trained(config, parts, session, generate)
    else:
        state = source
    return training.sampled_weights(state, config)


def _source(config, parts, say=lambda text: None):
    """The state of another run, of prune.source: its workdir or a packed checkpoint.

    It may come within run.wait seconds.
    """
    if not config.prune.source:
        return None
    path = Path(config.prune.source)
    like = training_run.initial_state(config, parts)
    look = functools.partial(_newest, path, like, parts)
    return networks.awaited(look, path, config.run.wait, say)


def _newest(path, like, parts):
    if path.is_file():
        return store.unpack(path, like, parts)[0]
    steps = checkpoint.steps(path / "checkpoints")
    if not steps:
        raise build.ConfigError(
            f"prune.source={path} holds no checkpoints: give the workdir of a run, the "
            "file that run.pack wrote, or nothing to train here"
        )
    known = (record.read_json(path / "run.json") or {}).get("fingerprint")
    if known != parts.splits.fingerprint:
        raise checkpoint.ConflictError(
            f"prune.source={path} was trained on other data (fingerprint "
            f"{str(known)[:12]}, here {parts.splits.fingerprint[:12]}): give the same "
            "--config.data as there"
        )
    return checkpoint.restore(path / "checkpoints", steps[-1], like)


# Does it come back?


def retest(config, parts, found: Pruned, tools: Tools) -> dict:
    """More samples, a search for initial noise, and fine-tuning without the switches.

    Returns: shares of the training points: emitted by other samples, found by search
      (and held-out ones alike), emitted after fine-tuning.
    """
    m = config.sampler.num_samples
    row = {"emitted_more": tools.watch(found.weights, m, MORE * m)["emitted"]}
    row |= search(config, parts, found.weights, tools.find)
    # As many steps as pruned networks have; what was pruned stays so.
    again = cut(config, found.weights, found.keep, tools.watch, tools.tune)
    return row | {
        f"again_{name}": again.numbers[name][-1] for name in ("ratio", "emitted")
    }


def finder(config, parts):
    """(weights, targets [k, *e], keys [k]) -> what the nearest noises give, [k, *e]."""
    start, shape = parts.times[0], parts.splits.train.x.shape[1:]
    radius = float(parts.process.sigma(start)) * math.sqrt(math.prod(shape))
    name = config.sampler.name
    method = name if name in sampling.ODE_METHODS else "heun"

    def flow_of(weights):
        # checkpoint: the trajectory is kept, and not what the network did on the way.
        score_fn = jax.checkpoint(training.score_fn(parts, weights))
        return sampling.ode(score_fn, parts.process, parts.times, method)

    def stages(weights, target):
        steps = config.measure.search
        return sampling.search_stages(flow_of(weights), target, radius, steps)

    @jax.jit
    def begin(weights, targets, keys):
        return jax.vmap(lambda target, key: stages(weights, target)[0](key))(
            targets, keys
        )

    @functools.partial(jax.jit, donate_argnums=0)
    def advance(found, weights, targets, first, last):
        def body(i, found):
            return jax.vmap(lambda state, target: stages(weights, target)[1](state, i))(
                found, targets
            )

        return jax.lax.fori_loop(first, last, body, found)

    @jax.jit
    def end(found, weights):
        return jax.vmap(flow_of(weights))(sampling.best_noise(found))

    paced = record.paced(advance)

    def find(weights, targets, keys):
        found = begin(weights, targets, keys)
        rounds = stages(weights, targets[0])[2]
        return end(paced(found, rounds, weights, targets), weights)

    return find


def search(config, parts, weights, find) -> dict:
    """Which share of some training points an initial noise can be found for.

    The flow is invertible, so every point has a noise; what is searched is one of the
    length that sampling draws. Held-out points, searched alike, are the null level.

    Args: find, `finder`.
    """
    points, count = np.asarray(parts.splits.train.x), config.measure.targets
    held_out = points[:0]
    if parts.splits.held_out is not None:
        held_out = np.asarray(parts.splits.held_out.x)[:count]
    first = neighbours.distinct(points)[:count]
    targets = np.concatenate([points[first], held_out])
    keys = jax.random.split(build.keys(config.seed).evaluate, len(targets))
    drawn = np.asarray(find(weights, jnp.asarray(targets), keys))
    # Among all points that it might be: found is what is nearest by a wide margin.
    near = neighbours.nearest(drawn, np.concatenate([points, held_out]))
    own = np.concatenate([first, len(points) + np.arange(len(held_out))])
    close = memorization.copied(near, config.memorization.threshold)
    found = close & (near.indices[:, 0] == own)
    null = found[len(first) :]
    return {
        "found": found[: len(first)].mean(),
        "found_null": null.mean() if len(null) else np.nan,
    }


# The frontier.


def family(setting: str) -> tuple[str, str]:
    """What is done, and how much of it: what is joined by a line, and its label."""
    fields = grid.parse(setting)
    if not fields:
        return "control", ""
    ratio = fields.pop("prune.ratio", None)
    if ratio is None:
        name = ", ".join(fields)
        return name, ", ".join(fields.values())
    criterion = fields.pop("prune.criterion", "small_t")
    return ", ".join([f"pruned: {criterion}", *fields.values()]), ratio


def frontier(quality, copies):
    """The fewest copies at each quality or better: a step function.

    Args: quality [k], smaller is better; copies [k].
    Returns: q [] -> [], inf where no point is as good.
    """
    order = np.argsort(quality, kind="stable")
    best = np.minimum.accumulate(np.asarray(copies, float)[order])
    ranked = np.asarray(quality, float)[order]

    def least(q):
        place = np.searchsorted(ranked, q, side="right") - 1
        return np.where(place >= 0, best[np.maximum(place, 0)], np.inf)

    return least


def advantage(ours, theirs) -> float:
    """How many copies less `ours` has at matched quality: the mean over the qualities.

    Args: (quality [k], copies [k]) of all points of either, in one seed. Compared are
      their frontiers, at every quality of a point that both reach.
    """
    start = max(np.min(ours[0]), np.min(theirs[0]))
    levels = np.unique(np.concatenate([ours[0], theirs[0]]))
    levels = levels[levels >= start]
    return float(np.mean(frontier(*theirs)(levels) - frontier(*ours)(levels)))


def matched(rows) -> list[dict]:
    """Every way of pruning against random pruning, at matched quality and memorization.

    Returns: for each, the mean over seeds and its interval of: how much less it
    memorizes at equal Frechet distance, and how much nearer its samples are at equal
    memorization. Positive is better than random.
    """
    clouds: dict[str, dict[int, list]] = {}
    for row in rows:
        setting = str(row.get("setting", ""))
        name = family(setting)[0]
        if name.startswith("pruned"):
            seeds = clouds.setdefault(name, {})
            points = np.stack([row["along_frechet"], row["along_ratio"]])
            seeds.setdefault(int(row["seed"]), []).append(points)
    base = next((name for name in clouds if name == "pruned: random"), None)
    if base is None or not all(
        np.isfinite(p).all() for s in clouds.values() for v in s.values() for p in v
    ):
        return []
    found = []
    for name, seeds in clouds.items():
        if name == base or seeds.keys() != clouds[base].keys():
            continue
        pairs = [
            (np.concatenate(points, axis=1), np.concatenate(clouds[base][seed], axis=1))
            for seed, points in seeds.items()
        ]
        copies = [advantage(a, b) for a, b in pairs]
        quality = [advantage(a[::-1], b[::-1]) for a, b in pairs]
        found.append(
            {
                "name": name,
                "ratio": results.mean_interval(copies),
                "frechet": results.mean_interval(quality),
            }
        )
    return found


# Pictures.


def draw(metrics, points):
    """(name, caption, figure) of the sweep: see `report.write_sweep`."""
    table = metrics["table"]
    tracks = _tracks(table)
    null = table[0]["null"]["mean"]
    yield (
        "frontier",
        "Memorized samples against the Frechet distance of the samples from held-out "
        "points (on pixels), above that of the control of the same seed: means over "
        "seeds with 95 % intervals. Down and to the left is better. Pruned networks "
        "after fine-tuning; numbers are values of the setting. Dashed: the null level."
        + _words(metrics["matched"]),
        figures.frontier(
            tracks, "Frechet distance above the control's", "memorized samples", null
        ),
    )
    if (
        any(row["removed"]["mean"] for row in table)
        and len(table[0]["steps"]["mean"]) > 1
    ):
        yield (
            "along",
            "Memorized samples along fine-tuning; step 0 is the pruned network. "
            "Control: the unpruned network, with the same extra steps. Bands are 95 % "
            f"intervals over the seeds, for {' and '.join(BANDS)} and the control.",
            figures.curves(_along(table)),
        )
    if "found" in table[0]:
        labels = [" ".join(family(row.get("setting", ""))) for row in table]
        yield (
            "retest",
            "Does it come back? Share of the training points that the final network "
            "emits, emits in more samples, gives from a searched noise of typical "
            "length, and emits after fine-tuning without the switch (what is pruned "
            "stays pruned). Dotted: held-out points found by the same search.",
            figures.bars(
                labels,
                {text: [row[name] for row in table] for name, text in RETEST.items()},
                "share of the training points",
                [row["found_null"]["mean"] for row in table],
            ),
        )


def _tracks(table):
    """The points of every family, from the control on."""
    tracks: dict[str, list] = {}
    for row in table:
        setting = row.get("setting", "")
        if not setting:
            tracks["as trained"] = [("", row["frechet_rise"], row["ratio"])]
            tuned = ("", row["tuned_frechet_rise"], row["tuned_ratio"])
            tracks["as trained, and fine-tuned"] = [tuned]
            continue
        name, value = family(setting)
        tracks.setdefault(name, []).append((value, row["frechet_rise"], row["ratio"]))
    return tracks


def _along(table):
    """A panel for every ratio: its criteria, and the control."""
    control = [row for row in table if not row.get("setting")]
    ratios: dict[str, list] = {}
    for row in table:
        name, value = family(row.get("setting", ""))
        if name.startswith("pruned"):
            ratios.setdefault(value, []).append((name.removeprefix("pruned: "), row))

    def line(row, label, **kwargs):
        mean, low, high = (
            np.array(row["along_ratio"][k], float) for k in ("mean", "low", "high")
        )
        return figures.Line(row["steps"]["mean"], mean, label, low, high, **kwargs)

    panels = []
    for ratio, rows in ratios.items():
        # All bands would hide each other.
        lines = [
            line(row, name)._replace(**{} if name in BANDS else {"low": None})
            for name, row in rows
        ]
        lines += [line(row, "control", style="o--", color="black") for row in control]
        panels.append(
            figures.Panel(
                f"ratio = {ratio}", lines, "step of fine-tuning", "memorized samples",
                xscale="linear", yscale="linear", percent=True,
            )
        )  # fmt: skip
    return panels


def _words(found):
    """The comparison with random pruning as sentences."""

    def listed(what, scale, digits):
        for row in found:
            mean, low, high = (row[what][k] for k in ("mean", "low", "high"))
            text = f"{scale * mean:+.{digits}f}"
            if low is not None:
                text += f" [{scale * low:+.{digits}f}, {scale * high:+.{digits}f}]"
            yield f"{row['name'].removeprefix('pruned: ')} {text}"

    if not found:
        return ""
    return (
        " Against random pruning, over all points of fine-tuning, positive is better: "
        "percentage points fewer copies at equal Frechet distance: "
        f"{'; '.join(listed('ratio', 100, 1))}. Frechet distance nearer at equally "
        f"many copies: {'; '.join(listed('frechet', 1, 2))}."
    )
