"""One network of a sweep: trained, or taken from where it was kept, and looked at.

models/ of a workdir has a folder for every network, named by its seed and by all else
that a trained network depends on: all points and all starts that need it share it.
"""

import hashlib
import json
import time

import numpy as np

from memsep_jax import checkpoint, sources
from memsep_jax.experiments import training
from memsep_jax.experiments.config import build, fields, schema
from memsep_jax.experiments.runtime import record
from memsep_jax.experiments.studies import prune, train

POLL = 1.0  # seconds between two looks at what another run has yet to write
# The groups of a config that a trained network depends on, besides the seed.
TRAINING = schema.groups(fields.TRAINING)


def tag(config, groups) -> str:
    """A short name of the values of some groups of a config, and of its seed."""
    known = build.to_json(config)
    if "sampler" in groups:
        known["model"].pop("dropout", None)  # is off
    some = {name: known[name] for name in ("seed", *groups)}
    if "train" in groups:
        some |= build.looks(config)
    return hashlib.sha256(json.dumps(some, sort_keys=True).encode()).hexdigest()[:12]


def name(config) -> str:
    """Of the folder of a trained network."""
    return f"seed={config.seed}-{tag(config, TRAINING)}"


def trained(config, parts, session, generate=None):
    """The train.TrainState of a network, trained here unless it already was."""
    where = session.workdir / "models" / name(config)
    return train.learn(config, parts, session, None, generate, where)


def awaited(look, where, seconds: float, say):
    """look() once it finds a whole checkpoint, of a run that may still be on its way.

    Raises: sources.DataError where none came to `where` within the seconds; with 0 of
      them, what look() raises.
    """
    end, said = time.monotonic() + seconds, False
    while True:
        left = end - time.monotonic()
        try:
            return look()
        except (build.ConfigError, checkpoint.CorruptError) as error:
            if not seconds:
                raise
            if left <= 0:
                raise sources.DataError(
                    f"watched {where} for run.wait={seconds:g} s, and no whole "
                    f"checkpoint came: {error}"
                ) from error
        if not said:
            say(f"waiting {seconds:g} s for a checkpoint in {where}")
            said = True
        time.sleep(min(POLL, left))


def measure(points, session):
    """Yields, for each point of a sweep, what `measured` says of its network."""
    for point in points:
        yield measured(point.config, session)


def measured(config, session) -> dict:
    """Trains a network, and measures what it copies and how good its samples are.

    Returns: the numbers of `prune.watcher` for the weights of sampler.weights; `raw`,
      `ema`: the ratio of either; `highest`: the largest along training, of either, as
      Gu 2023 keeps it (the more it was looked at, the higher).
    """
    with session.phase("data"):
        parts = build.build(config)
    generate = train.network_samples(config, parts, session)
    state = trained(config, parts, session, generate)
    with session.phase("sample"):
        watch = prune.watcher(config, parts, generate)
        found = {"raw": watch(state.params), "ema": watch(state.ema)}
    ratios = {which: numbers["ratio"] for which, numbers in found.items()}
    where = session.workdir / "models" / name(config)
    rows = record.read_metrics(where / "metrics.jsonl")
    along = [row[which] for row in rows for which in train.RATIOS if which in row]
    return (
        found[config.sampler.weights]
        | ratios
        | {
            "highest": np.max([*ratios.values(), *along]),
            "steps": int(state.step),
            "parameters": training.count(state.params),
        }
    )
