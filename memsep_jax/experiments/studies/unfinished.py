"""The report of a run that has stopped before its end, by its newest weights.

Nothing is trained, and nothing that the run goes on from is changed: the numbers lie
under evaluation/, in the folder of these weights, and run.json stays as it is.
"""

from functools import partial

import jax

from memsep_jax import checkpoint, defaults
from memsep_jax.experiments import record, training
from memsep_jax.experiments.config import build
from memsep_jax.experiments.reporting import report
from memsep_jax.experiments.studies import evaluate, monitor, training_run

KEPT = ("checkpoints", "snapshots")  # of weights along training


def config_of(workdir, config):
    """The config of a run that is not finished; None where there is none to report on.

    A longer run may have gone on from finished numbers, which are then not the newest.

    Args: config, of the command: whether the report may show training data.
    """
    names = ("config.json", "run.json", "metrics.json")
    known, status, metrics = (record.read_json(workdir / name) for name in names)
    if known is None or status is None or known.get("experiment") != "train":
        return None
    steps = [step for name in KEPT for step in checkpoint.steps(workdir / name)]
    if status.get("status") == "complete" or not steps:
        return None
    if metrics is not None and metrics["model"].get("steps") == max(steps):
        return None
    own = defaults.restored(known)
    own.run.images = own.run.images and config.get("run", {}).get("images", True)
    return own


def run(config, session):
    """Evaluates the newest weights as the run itself would, and draws its report.

    Raises: ConflictError, CorruptError, as a run that goes on does.
    """
    with session.phase("data"):
        parts = build.build(config)
    session.expect(parts.splits.fingerprint)
    weights, step = newest(config, parts, session.workdir)
    session.say(
        f"not finished: the weights of step {step:,} of {parts.steps:,} are evaluated, "
        "and nothing is trained"
    )
    about = {
        "model": training_run.model(config, parts, weights, step),
        "unfinished": {"step": step, "steps": parts.steps},
    }
    rows = record.read_metrics(session.workdir / "metrics.jsonl")
    # A run may be stopped before its first evaluation.
    if any("train_losses" in row for row in rows):
        about["levels"] = monitor.last_losses(config, parts, session.workdir)
    numbers = evaluate.place(config, parts, session, weights)
    generate = training_run.network_samples(config, parts, session)
    evaluate.evaluate(config, parts, session, generate, weights, about, numbers)
    report.write(session.workdir, session.say, numbers, build.to_json(config))
    evaluate.tell(session, numbers)


def newest(config, parts, workdir, aside: bool = True):
    """The newest valid weights of a run, EMA or raw as the sampler asks, and the step.

    Args: aside, as of `checkpoint.restore_newest`.
    Raises: CorruptError where none are valid; ConflictError.
    """
    state = jax.eval_shape(partial(training_run.initial_state, config, parts))
    both = {"params": state.params, "ema": state.ema}  # what a snapshot holds
    # A snapshot may be newer than the last checkpoint, and either may be damaged.
    found, damaged = [], None
    for name, like in zip(KEPT, (state, both), strict=True):
        try:
            found.append(checkpoint.restore_newest(workdir / name, like, None, aside))
        except checkpoint.CorruptError as error:
            damaged = error
    if damaged and not any(found):
        raise damaged
    tree, step = max(filter(None, found), key=lambda pair: pair[1])
    state = state.replace(**tree) if isinstance(tree, dict) else tree
    return training.sampled_weights(state, config), step
