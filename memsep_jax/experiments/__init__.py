"""Resumable functions of (config, workdir): numbers first, then pictures."""

from pathlib import Path


def run(config, workdir, resume_step=None, allow_config_change=False):
    """Runs config.experiment in a workdir, or continues it where it stopped.

    Returns: of experiment=train the `loaded.Run`; of an audit the `audited.Audit`; of a
      study its numbers, as metrics.json has them.

    Args:
      config: a ConfigDict, as the files in configs/ make it.
      workdir: a directory; everything is written there and nowhere else.
      resume_step: return to this checkpoint; newer ones are moved aside.
      allow_config_change: continue although the config changed what is computed.
    Raises:
      ConfigError, ConflictError, DataError, NonFiniteError, StorageError, CorruptError,
      FailedError and Interrupted, each with the `exit_code` of the command line.
    """
    # A command line is read without the studies, and so without jax.
    from memsep_jax.experiments import audited, loaded, record, studies

    studies.run(config, workdir, resume_step, allow_config_change)
    workdir = Path(workdir)
    # A report is of what was run here, whatever that was.
    ran = (record.read_json(workdir / "config.json") or {}).get("experiment")
    if ran == "audit":
        return audited.Audit(workdir)
    if ran == "train":
        return loaded.load(workdir)
    return record.read_json(workdir / "metrics.json")


def __getattr__(name):
    # Not imported above: these names bring jax, and a command line is read without it.
    if name in ("EXPERIMENTS", "DRAWINGS", "Session"):
        from memsep_jax.experiments import studies

        return getattr(studies, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
