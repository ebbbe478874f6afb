"""The questions of research, a file for each, and the table of them."""

import jax

from memsep_jax.experiments import record
from memsep_jax.experiments.config import build
from memsep_jax.experiments.reporting import report
from memsep_jax.experiments.runtime import points
from memsep_jax.experiments.runtime.session import Session
from memsep_jax.experiments.studies import (
    audit,
    band_swap,
    calibrate,
    capacity,
    detect,
    emm,
    ensemble,
    explain,
    factors,
    loss_gap,
    membership,
    mitigate,
    onset,
    optimum,
    steepness,
    study,
    training_run,
    twins,
    unfinished,
    which,
)
from memsep_jax.experiments.studies.study import Study


def _report(config, session):
    """Draws the numbers of a workdir again, without computing any of a finished run."""
    status = points.status(session.workdir)
    if status is not None:
        session.say(status)
    # A run that is not finished is evaluated, which writes: it needs the lock.
    if (own := unfinished.config_of(session.workdir, config)) is not None:
        _check_alone(config)
        with Session(session.workdir, own) as held:
            unfinished.run(own, held)
        return
    path = session.workdir / "metrics.json"
    if status is not None and not path.exists():
        session.say("figures are drawn at the end of the sweep: give its command")
        return
    name = (record.read_json(path) or {}).get("experiment")
    if name and name not in EXPERIMENTS:
        # A name that was read is no reason to run the code of a file.
        raise build.ConfigError(
            f"{session.workdir} holds experiment={name}, which this package does not "
            "have: remove run.json there and give the command of the run again, which "
            "draws the figures; finished points are not measured again"
        )
    report.run(config, session.workdir, DRAWINGS.get(name), session.say)


EXPERIMENTS = {
    "audit": Study(run=audit.run),
    "band_swap": band_swap.STUDY,
    "calibrate": calibrate.STUDY,
    "capacity": capacity.STUDY,
    "detect": detect.STUDY,
    "emm": emm.STUDY,
    "ensemble": ensemble.STUDY,
    "explain": explain.STUDY,
    "factors": factors.STUDY,
    "lipschitz": steepness.STUDY,
    "loss_gap": loss_gap.STUDY,
    "membership": membership.STUDY,
    "mitigate": mitigate.STUDY,
    "onset": onset.STUDY,
    "optimum": Study(run=optimum.run),
    "prune": mitigate.STUDY,  # the same question, over criteria and ratios
    "report": Study(run=_report),
    "train": Study(run=training_run.run),
    "twins": twins.STUDY,
    "which": which.STUDY,
}
# What `report` draws again, by the name of the experiment.
DRAWINGS = {name: one.draw for name, one in EXPERIMENTS.items() if one.draw}


def run(config, workdir, resume_step=None, allow_config_change=False) -> None:
    """As `experiments.run`, which imports this room once a config is to be run."""
    named = build.look_up(EXPERIMENTS, config.experiment, "experiment")
    experiment = study.of(named)
    session = Session(
        workdir, config, allow_config_change, resume_step, experiment.shared
    )
    if config.experiment == "report":  # reads a workdir that another run may hold
        experiment(config, session)
    elif session.is_complete() and resume_step is None:
        session.say(f"already complete: {workdir}")
        if config.experiment == "audit":
            session.say(
                "it audited the files as they were: to audit others that have "
                "their names, give another --workdir"
            )
        session.part()  # the other processes wait for it
    else:
        with session:
            _check_alone(config)
            if experiment.measure or experiment.draw:  # points are made of its values
                build.check(config)
            experiment(config, session)


def _check_alone(config):
    if jax.process_count() > 1 and config.experiment != "train":
        raise build.ConfigError(
            f"experiment={config.experiment} runs in one process: leave out "
            "--distributed; several train one network (experiment=train)"
        )
