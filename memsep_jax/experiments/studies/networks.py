"""One network of a sweep: trained, or read from where it was kept, and measured.

models/ of a workdir has a folder for every network, named by its seed and by all else
that a trained network depends on: all points and all starts that need it share it.
"""

import time
from pathlib import Path

import numpy as np

from memsep_jax import checkpoint, data
from memsep_jax.experiments import record, training
from memsep_jax.experiments.config import build, fields, schema
from memsep_jax.experiments.runtime import locks
from memsep_jax.experiments.studies import monitor, pruning, training_run

POLL = 1.0  # seconds between two tries to read what another run has yet to write
# The groups of a config that a trained network depends on, apart from the seed.
TRAINING = schema.groups(fields.TRAINING)


def tag(config, groups) -> str:
    """A short name of the values of some groups of a config, and of its seed."""
    return tags(config, groups)[0]


def tags(config, groups) -> list[str]:
    """The `tag`, and the one that an earlier version gave."""
    known = build.to_json(config)
    if "sampler" in groups:
        # Dropout is off when a network is sampled: its value changes no sample.
        known["model"].pop("dropout", None)
    some = {name: known[name] for name in ("seed", *groups)}
    if "train" in groups:
        some |= build.watched(config)
    return schema.tags(some)


def name(config) -> str:
    """The name of the folder of a trained network."""
    return names(config)[0]


def names(config) -> list[str]:
    """The `name`, and the one that an earlier version gave."""
    return [f"seed={config.seed}-{one}" for one in tags(config, TRAINING)]


def folder(config, workdir) -> Path:
    """The folder of a trained network, in the workdir of its sweep."""
    folders = [Path(workdir) / "models" / one for one in names(config)]
    return next((one for one in folders if one.exists()), folders[0])


def trained(config, parts, session, generate=None):
    """The train.TrainState of a network, trained here unless it already was."""
    where = folder(config, session.workdir)
    # A point of another process may need the same network: who comes second waits, and
    # finds it trained.
    with locks.held(where.with_name(f".{where.name}.lock"), session.say):
        return training_run.learn(config, parts, session, None, generate, where)


def awaited(read, where, seconds: float, say):
    """read() once it finds a whole checkpoint, of a run that may still be on its way.

    Raises: data.DataError where none came to `where` within the seconds; with 0 of
      them, what read() raises.
    """
    end, said = time.monotonic() + seconds, False
    while True:
        left = end - time.monotonic()
        try:
            return read()
        except (build.ConfigError, checkpoint.CorruptError) as error:
            if not seconds:
                raise
            if left <= 0:
                raise data.DataError(
                    f"watched {where} for run.wait={seconds:g} s, and no whole "
                    f"checkpoint came: {error}"
                ) from error
        if not said:
            say(f"waiting {seconds:g} s for a checkpoint in {where}")
            said = True
        time.sleep(min(POLL, left))


def measure(points, session):
    """Yields the numbers of `measured` for each point of a sweep."""
    for point in points:
        yield measured(point.config, session)


def measured(config, session, members: bool = False) -> dict:
    """Trains a network, and measures what it copies and how good its samples are.

    Args: members, whether to ask who was in the training set.
    Returns: the numbers of `pruning.watcher` for the weights of sampler.weights; `raw`,
      `ema`: the ratio of either; `highest`: the largest along training, of either, as
      Gu 2023 keeps it (the more snapshots, the higher); with members, `membership`,
      by `monitor.given_away`.
    """
    with session.phase("data"):
        parts = build.build(config)
    generate = training_run.network_samples(config, parts, session)
    state = trained(config, parts, session, generate)
    with session.phase("sample"):
        watch = pruning.watcher(config, parts, generate)
        both = {"raw": watch(state.params), "ema": watch(state.ema)}
    row = both[config.sampler.weights]
    if members:
        told = monitor.make_membership(config, parts, session.say)
        weights = training.sampled_weights(state, config)
        with session.phase("membership"):
            row["membership"] = monitor.given_away(told(weights))
    ratios = {which: numbers["ratio"] for which, numbers in both.items()}
    counts = {f"{which}_of": numbers["ratio_of"] for which, numbers in both.items()}
    where = folder(config, session.workdir)
    rows = record.read_metrics(where / "metrics.jsonl")
    along = [row[which] for row in rows for which in monitor.RATIOS if which in row]
    return (
        row
        | ratios
        | counts
        | {
            "highest": np.max([*ratios.values(), *along]),
            "steps": int(state.step),
            "parameters": training.count(state.params),
        }
    )
