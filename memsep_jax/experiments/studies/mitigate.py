"""What helps against memorization, on one frontier, and whether it comes back.

Experiments `prune` and `mitigate`: every one of sweep.points is a network that is
trained with some switches of the config (or taken from models/, or from prune.source),
pruned where prune.ratio asks for it, fine-tuned, and measured on the way. The point
{} is the control: neither switches nor pruning, and the same extra steps.

Where measure.targets asks for it, a re-test follows: what the final network emits in
more samples, what a gradient search for an initial noise finds, and what the network
emits after fine-tuning without the switches.
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
from memsep_jax.experiments.studies import (
    monitor,
    networks,
    results,
    store,
    training_run,
)
from memsep_jax.experiments.studies.pruning import (
    Pruned,
    cost,
    cut,
    keep,
    tuner,
    watcher,
)
from memsep_jax.experiments.studies.study import Study
from memsep_jax.train import NonFiniteError

# The groups of a config that `Programs` depend on, beside the seed.
SAMPLING = (
    "data", "process", "prediction", "model", "sampler", "memorization", "measure",
)  # fmt: skip
MORE = 4  # the re-test draws this many times the samples
COLUMNS = (
    "setting", "ratio", "null", "emitted", "frechet_rise", "precision", "recall",
    "frechet", "pixel_frechet", "membership",
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


class Programs(NamedTuple):
    """The compiled programs of one seed and shape, however a network is trained."""

    generate: Callable  # (weights, start, stop) -> samples
    watch: Callable  # `pruning.watcher`
    tune: Callable  # `pruning.tuner` of the config without the setting
    find: Callable  # `finder`
    members: Callable  # `monitor.make_membership`


def share(config, parts, session) -> dict:
    """The state of prune.source, and programs that are compiled once for all points."""
    source = _source(config, parts, session.say)
    known: dict[str, Programs] = {}

    def programs_of(point):
        key = networks.tag(point.config, SAMPLING)
        if key not in known:
            known[key] = _programs(config, point, session)
        return known[key]

    return {"programs_of": programs_of, "source": source}


def measure(some, session, programs_of, source):
    """Trains, prunes and measures points that differ in nothing but what is pruned.

    Args: source, the state to start from, or None to train one.
    Yields: for each point its numbers, or the error that it alone failed with.
    """
    config, programs = some[0].config, programs_of(some[0])
    with session.phase("data"):
        parts = build.build(config)
    state = source
    try:
        if state is None:
            state = networks.trained(config, parts, session, programs.generate)
    except NonFiniteError as error:  # they share the network
        yield from [error] * len(some)
        return
    params = training.sampled_weights(state, config)
    tune, measured, done = tuner(config, parts), {}, {}

    def one(point):
        with session.phase("prune"):
            stays = keep(point.config, parts, params, measured)
            which = stays.tobytes()
            if which not in done:  # two criteria may agree
                # An unpruned network of a setting stays as it was trained.
                tuned = not (stays.all() and point.values.get("setting"))
                done[which] = cut(
                    config, params, stays, programs.watch, tune if tuned else None
                )
            pruned = done[which]
        row = _row(point.config, pruned)
        row |= cost(parts, params, stays, config.prune.group)
        row["membership"] = monitor.given_away(programs.members(pruned.weights))
        if config.measure.targets:
            with session.phase("re-test"):
                row |= retest(config, parts, pruned, programs)
        return row

    for point in some:
        yield points.attempt(one, point)


def conclude(config, rows, parts, session) -> dict:
    """Every way of pruning against random pruning.   Adds frechet_rise to the rows."""
    _compare(rows)
    # A frontier that lacks some of its points is not the frontier.
    complete = results.whole(
        config, rows, lambda values: family(str(values.get("setting", "")))[0]
    )
    return {
        "matched": matched(complete),
        "quality": config.measure.features or "pixels",
    }


def _programs(config, point, session) -> Programs:
    """Args: config, of the sweep: without the setting of the point."""
    one, plain = point.config, grid.seeded(config, point.values["seed"])
    dropout = plain.model.dropout
    plain.model = one.model.copy_and_resolve_references()
    plain.model.dropout = dropout
    parts = build.build(one)
    generate = training_run.network_samples(one, parts, session)
    return Programs(
        generate,
        watcher(one, parts, generate),
        tuner(plain, build.build(plain)),
        finder(one, parts),
        monitor.make_membership(one, parts, session.say),
    )


def _row(config, pruned: Pruned):
    """The numbers of the final network, and those on the way."""
    last = -1 if config.prune.ratio else 0  # an unpruned network is as it was trained
    row = {name: values[last] for name, values in pruned.numbers.items()}
    for name in ("ratio", "emitted", "frechet", "precision", "recall"):
        row[f"untuned_{name}"] = pruned.numbers[name][0]
        row[f"tuned_{name}"] = pruned.numbers[name][-1]
        row[f"along_{name}"] = pruned.numbers[name]
    row |= {f"{at}_ratio_of": row["ratio_of"] for at in ("untuned", "tuned", "along")}
    removed = int((~pruned.keep).sum())
    return row | {"steps": pruned.steps, "removed": removed, "keep": pruned.keep}


def _compare(rows):
    """Adds frechet_rise, above the control of the same seed as it was trained."""
    controls = {
        int(row["seed"]): row["frechet"] for row in rows if not row.get("setting")
    }
    for row in rows:
        control = controls.get(int(row["seed"]), np.nan)
        row["frechet_rise"] = row["frechet"] - control
        row["tuned_frechet_rise"] = row["tuned_frechet"] - control


# Where the networks come from.


def _alike(point):
    """A key that is equal for points that differ only in which units are removed."""
    known = build.to_json(point.config)
    del known["prune"]["criterion"], known["prune"]["ratio"]
    return json.dumps(known, sort_keys=True)


def _source(config, parts, say=lambda text: None):
    """The state of another run, of prune.source: its workdir or a packed checkpoint.

    It may come within run.wait seconds.
    """
    if not config.prune.source:
        return None
    path = Path(config.prune.source)
    like = training_run.initial_state(config, parts)
    newest = functools.partial(_newest, path, like, parts)
    return networks.awaited(newest, path, config.run.wait, say)


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


def retest(config, parts, pruned: Pruned, programs: Programs) -> dict:
    """More samples, a search for initial noise, and fine-tuning without the switches.

    Returns: shares of the training points: emitted by other samples, found by the
      search (and of held-out points), emitted after fine-tuning.
    """
    m, weights = config.sampler.num_samples, pruned.weights
    row = {"emitted_more": programs.watch(weights, m, MORE * m)["emitted"]}
    row |= search(config, parts, weights, programs.find)
    # As many steps as pruned networks get; removed units stay removed.
    again = cut(config, weights, pruned.keep, programs.watch, programs.tune)
    return row | {
        f"again_{name}": again.numbers[name][-1]
        for name in ("ratio", "ratio_of", "emitted")
    }


def finder(config, parts):
    """(weights, targets [k, *e], keys [k]) -> samples [k, *e] of the nearest noises."""
    start, shape = parts.times[0], parts.splits.train.x.shape[1:]
    radius = float(parts.process.sigma(start)) * math.sqrt(math.prod(shape))
    name = config.sampler.name
    method = name if name in sampling.ODE_METHODS else "heun"

    def flow_of(weights):
        # checkpoint: the backward pass keeps the trajectory, not all activations.
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
    def advance(states, weights, targets, first, last):
        def body(i, states):
            return jax.vmap(lambda state, target: stages(weights, target)[1](state, i))(
                states, targets
            )

        return jax.lax.fori_loop(first, last, body, states)

    @jax.jit
    def end(states, weights):
        return jax.vmap(flow_of(weights))(sampling.best_noise(states))

    paced = record.paced(advance)

    def find(weights, targets, keys):
        states = begin(weights, targets, keys)
        rounds = stages(weights, targets[0])[2]
        return end(paced(states, rounds, weights, targets), weights)

    return find


def search(config, parts, weights, find) -> dict:
    """The share of some training points for which an initial noise can be found.

    The flow is invertible, so every point has a noise; the search is for one of the
    length that sampling draws. The same search for held-out points is the null level.

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
    # A target is found where it is the nearest of all points, by a wide margin.
    near = neighbours.nearest(drawn, np.concatenate([points, held_out]))
    own = np.concatenate([first, len(points) + np.arange(len(held_out))])
    close = memorization.copied(near, config.memorization.threshold)
    hits = close & (near.indices[:, 0] == own)
    null = hits[len(first) :]
    return {
        "found": hits[: len(first)].mean(),
        "found_of": len(first),
        "found_null": null.mean() if len(null) else np.nan,
        "found_null_of": len(null),
    }


# The frontier.


def family(setting: str) -> tuple[str, str]:
    """The kind of a setting, which a line joins, and its amount, the label."""
    fields = grid.parse(setting)
    if not fields:
        return "control", ""
    if all(name.startswith("times.") for name in fields):
        return "times", ", ".join(fields.values())  # a law and its numbers: one switch
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
    """The copies that `ours` saves at matched quality: the mean over the qualities.

    Their frontiers are compared at every quality of a point that both reach.

    Args: (quality [k], copies [k]) of all points of either, in one seed.
    """
    start = max(np.min(ours[0]), np.min(theirs[0]))
    levels = np.unique(np.concatenate([ours[0], theirs[0]]))
    levels = levels[levels >= start]
    return float(np.mean(frontier(*theirs)(levels) - frontier(*ours)(levels)))


def matched(rows) -> list[dict]:
    """Every way of pruning against random pruning, at matched quality and memorization.

    Returns: for each, the mean over seeds and its interval of the memorization that it
      saves at equal Frechet distance, and of the Frechet distance that it saves at
      equal memorization. Positive is better than random.
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
    compared = []
    for name, seeds in clouds.items():
        if name == base or seeds.keys() != clouds[base].keys():
            continue
        pairs = [
            (np.concatenate(points, axis=1), np.concatenate(clouds[base][seed], axis=1))
            for seed, points in seeds.items()
        ]
        copies = [advantage(a, b) for a, b in pairs]
        quality = [advantage(a[::-1], b[::-1]) for a, b in pairs]
        compared.append(
            {
                "name": name,
                "ratio": results.mean_interval(copies)._asdict(),
                "frechet": results.mean_interval(quality)._asdict(),
            }
        )
    return compared


# Pictures.


def draw(metrics, points):
    """(name, caption, figure) of each picture: see `study.Study`."""
    table, space = metrics["table"], metrics.get("quality", "pixels")
    space += "" if space == "pixels" else " features"
    tracks = _tracks(table)
    null = table[0]["null"]["mean"]
    yield (
        "frontier",
        "Memorized samples against the Frechet distance of the samples from held-out "
        f"points (on {space}), above that of the control of the same seed: means over "
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
                "held-out points found by the search",
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
    pruned = [(*family(row.get("setting", "")), row) for row in table]
    pruned = [one for one in pruned if one[0].startswith("pruned")]

    def line(row, label, **style):
        steps = row["steps"]["mean"]
        return figures.line(steps, row["along_ratio"], label, **style)

    panels = []
    for ratio, some in results.grouped(pruned, lambda one: one[1]).items():
        lines = []
        for name, _, row in some:
            name = name.removeprefix("pruned: ")
            lines.append(line(row, name))
            if name not in BANDS:  # all bands would hide each other
                lines[-1] = lines[-1]._replace(low=None)
        lines += [line(row, "control", style="o--", color="black") for row in control]
        panels.append(
            figures.Panel(
                f"ratio = {ratio}", lines, "step of fine-tuning", "memorized samples",
                xscale="linear", yscale="linear", percent=True,
            )
        )  # fmt: skip
    return panels


def _words(compared):
    """The comparison with random pruning as sentences."""

    def listed(what, scale, digits):
        for row in compared:
            mean, _, low, high = figures.Interval.read(row[what])
            text = f"{scale * mean:+.{digits}f}"
            if not np.isnan(low):
                text += f" [{scale * low:+.{digits}f}, {scale * high:+.{digits}f}]"
            yield f"{row['name'].removeprefix('pruned: ')} {text}"

    if not compared:
        return ""
    return (
        " Against random pruning, over all points of fine-tuning, positive is better: "
        "percentage points fewer copies at equal Frechet distance: "
        f"{'; '.join(listed('ratio', 100, 1))}. Frechet distance nearer at equally "
        f"many copies: {'; '.join(listed('frechet', 1, 2))}."
    )


STUDY = Study(measure, draw, grid.check, share, conclude, COLUMNS, _alike, "networks")
