"""Resumable functions of (config, workdir): numbers first, then pictures."""


def run(config, workdir, resume_step=None, allow_config_change=False) -> None:
    """Runs config.experiment in a workdir, or continues it where it stopped.

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
    from memsep_jax.experiments import studies

    studies.run(config, workdir, resume_step, allow_config_change)


def __getattr__(name):
    # Not imported above: these names bring jax, and a command line is read without it.
    if name in ("EXPERIMENTS", "DRAWINGS", "Session"):
        from memsep_jax.experiments import studies

        return getattr(studies, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
