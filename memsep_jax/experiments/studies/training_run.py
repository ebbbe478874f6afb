"""The main job: train, sample, measure memorization, report.

In a workdir: config.json, run.json, metrics.jsonl (along training), checkpoints/,
best/ (lowest held-out loss), snapshots/ (raw and EMA weights), samples/ (grids along
training), evaluation/ (chunks), samples.npz, per_sample.csv, held_out.csv, pairs.npz,
metrics.json, figures/ and report.html. Given again, the same command goes on where it
stopped.
"""

import functools

import jax

from memsep_jax import parallel, train
from memsep_jax.experiments import training
from memsep_jax.experiments.config import build
from memsep_jax.experiments.runtime.session import Interrupted
from memsep_jax.experiments.studies import pruning
from memsep_jax.experiments.studies.evaluate import evaluate, finish, make_generate
from memsep_jax.experiments.studies.monitor import (
    Calendar,
    Log,
    Monitor,
    detector,
    last_losses,
    members_found,
)
from memsep_jax.experiments.studies.stepper import Stepper, compiled, status
from memsep_jax.experiments.studies.store import Store


def run(config, session):
    """Trains and evaluates; returns when report.html is written."""
    with session.phase("data"):
        parts = build.build(config)
    session.expect(parts.splits.fingerprint)  # before anything is compiled
    for note in parts.notes:
        session.say(f"note: {note}")
    session.say(_describe(parts, config))
    # Made here, so that all of the run shares one compiled program.
    generate = network_samples(config, parts, session)
    state = parallel.local(learn(config, parts, session, session.resume_step, generate))
    # From here on the first process works alone, and needs no other one to live.
    session.part()
    if not parallel.is_first():
        return
    weights = training.sampled_weights(state, config)
    about = {
        "model": model(config, parts, weights, int(state.step)),
        "levels": last_losses(config, parts, session.workdir),
    }
    with session.phase("train"):
        about["levels"] |= detector(config, parts, weights)
        about["levels"] |= members_found(config, parts, weights, session.say)
    if config.prune.ratio:
        about["pruning"] = pruning.of_run(config, parts, session, weights, generate)
    evaluate(config, parts, session, generate, weights, about)
    finish(session)


def model(config, parts, weights, step) -> dict:
    """The section of metrics.json about a network after a step."""
    return {
        "name": config.model.name,
        "parameters": training.count(weights),
        "steps": step,
        "planned": parts.steps,
        "weights": config.sampler.weights,
    }


def initial_state(config, parts):
    """The state of step 0: a function of the config alone."""
    params = training.init_params(parts, build.keys(config.seed).init)
    # Compiled: else each leaf of each part of the state is a program of its own.
    return jax.jit(train.init, static_argnums=1)(params, parts.tx)


def network_samples(config, parts, session=None):
    """(params, start, stop) -> samples of the network, as `make_generate`."""
    score_of = functools.partial(training.sampled_score, config, parts)
    mesh = parallel.make_mesh(jax.local_devices())
    return make_generate(config, parts, mesh, score_of, session)


def learn(config, parts, session, resume_step=None, generate=None, workdir=None):
    """Trains to the last step, from the newest valid checkpoint where there is one.

    The last step is that of train.steps or train.epochs, or that of `early_stop`. Of
    several processes all take the steps, and the first one does everything else.

    Args: workdir, of one of several networks; by default that of the session.
    """
    own, workdir = workdir is None, workdir or session.workdir
    store = Store(config, parts, session, workdir, own)
    state, start = store.restore(initial_state(config, parts), resume_step)
    # Not before: a checkpoint that does not fit must leave config.json as it was.
    if own:
        session.begin(parts.splits.fingerprint, parts.splits)
    # Not before the restore: where that fails, nothing has been moved.
    store.roll_back(resume_step)
    if start:
        session.say(f"resumed from step {start}")
    log = Log(config, session, workdir, start, parts.steps)
    if (start >= parts.steps and log.has_start) or log.ends(start):
        return state
    with session.phase("compile"):
        session.say("compiling the train step")
        state, *program = compiled(config, parts, parallel.make_mesh(), state, start)
        stepper = Stepper(config, parts, session, log, *program)
        generate = generate or network_samples(config, parts, session)
        monitor = Monitor(config, parts, session, log, generate)
    calendar, step, ends = Calendar.of(config, parts), start, False
    with (
        session.phase("train"),
        session.deferred(),
        session.progress("training", parts.steps, start) as update,
    ):
        if start and not log.has_start:  # stopped after the save and before the row
            ends = monitor.visit(state, start, log.unfinished)
            _leave_if_stopped(session, session.stop, start)
        while step < parts.steps and not ends:
            state, step, row = stepper.advance(state, step, update)
            due = calendar.measures(step)
            if not due:
                log.write(row)
            # Before the visit: it takes long, and a kill there must lose no step. The
            # row before the state: on resumption a row without its state is dropped,
            # but a state without its row would have lost its loss.
            if saved := calendar.saves(step) or session.stop is not None:
                log.write_unfinished(row)
                store.save(step, state)
            if due and session.stop is None:
                ends = monitor.visit(state, step, row)
            # Read once: on a signal between the save and the last line of this loop,
            # the run would end without its last step.
            stop = session.stop
            if not saved and (ends or stop is not None):
                log.write_unfinished(row)
                store.save(step, state)
            update(step, status(row))
            _leave_if_stopped(session, stop, step)
    if (spikes := train.skipped(state)) is not None:
        session.say(
            f"{int(spikes)} of {int(state.step)} steps were skipped, by "
            f"optimizer.skip_spikes={config.optimizer.skip_spikes:g}"
        )
    return state


def _leave_if_stopped(session, stop, step):
    """Raises Interrupted where a signal came; the step is saved."""
    if stop is not None:
        session.say(f"preempted at step {step}: saved")
        session.part()
        raise Interrupted(stop)


def _describe(parts, config):
    n, *shape = parts.splits.train.x.shape
    held_out = parts.splits.held_out
    return (
        f"{config.model.name} on {config.data.name}: n = {n:,} of {tuple(shape)}, "
        f"{0 if held_out is None else len(held_out.x):,} held out, "
        f"{parts.steps:,} steps on {jax.device_count()} x "
        f"{jax.devices()[0].device_kind}"
    )
