"""The questions of research, a file for each, and the table of them."""

import jax

from memsep_jax.experiments.config import build
from memsep_jax.experiments.reporting import report
from memsep_jax.experiments.runtime import points
from memsep_jax.experiments.runtime.session import Session
from memsep_jax.experiments.studies import (
    audit,
    band_swap,
    calibrate,
    capacity,
    emm,
    ensemble,
    factors,
    loss_gap,
    mitigate,
    onset,
    optimum,
    steepness,
    train,
    twins,
    unfinished,
)

# name -> run(config, session, resume_step)
EXPERIMENTS = {
    "audit": audit.run,
    "band_swap": band_swap.run,
    "calibrate": calibrate.run,
    "capacity": capacity.run,
    "emm": emm.run,
    "ensemble": ensemble.run,
    "factors": factors.run,
    "lipschitz": steepness.run,
    "loss_gap": loss_gap.run,
    "mitigate": mitigate.run,
    "prune": mitigate.run,  # the same, over criteria and ratios
    "onset": onset.run,
    "optimum": optimum.run,
    "report": report.run,
    "train": train.run,
    "twins": twins.run,
}
DRAWINGS = {  # of the sweeps: what `report` draws again
    "band_swap": band_swap.draw,
    "calibrate": calibrate.draw,
    "capacity": capacity.draw,
    "emm": emm.draw,
    "ensemble": ensemble.draw,
    "factors": factors.draw,
    "lipschitz": steepness.draw,
    "loss_gap": loss_gap.draw,
    "mitigate": mitigate.draw,
    "onset": onset.draw,
    "prune": mitigate.draw,
    "twins": twins.draw,
}


def run(config, workdir, resume_step=None, allow_config_change=False) -> None:
    """Runs config.experiment in a workdir, or goes on with it where it stopped.

    Args:
      config: a ConfigDict, as the files in configs/ make it.
      workdir: a directory; everything is written there and nowhere else.
      resume_step: go back to this checkpoint; newer ones are moved aside.
      allow_config_change: go on although the config changed what is computed.
    Raises:
      ConfigError, ConflictError, DataError, NonFiniteError, StorageError, CorruptError,
      FailedError and Interrupted, each with the `exit_code` of the command line.
    """
    experiment = build.look_up(EXPERIMENTS, config.experiment, "experiment")
    session = Session(workdir, config, allow_config_change)
    if config.experiment == "report":
        status = points.status(workdir)
        if status is not None:
            session.say(status)
        if (own := unfinished.config_of(session.workdir, config)) is not None:
            _check_alone(config)
            with Session(workdir, own) as session:
                unfinished.run(own, session)
        elif status is None or (session.workdir / "metrics.json").exists():
            experiment(config, workdir, DRAWINGS)
        else:
            session.say("figures are drawn at the end of the sweep: give its command")
    elif session.is_complete() and resume_step is None:
        session.say(f"already complete: {workdir}")
        if config.experiment == "audit":
            session.say(
                "it audited the files as they were: to audit others that have "
                "their names, give another --workdir"
            )
        session.part()
    else:
        with session:
            _check_alone(config)
            if config.experiment in DRAWINGS:  # whose points are made of these values
                build.check(config)
            experiment(config, session, resume_step)


def _check_alone(config):
    if jax.process_count() > 1 and config.experiment != "train":
        raise build.ConfigError(
            f"experiment={config.experiment} runs in one process: leave out "
            "--distributed; several train one network (experiment=train)"
        )
