"""The command: --config=NAME[:variant] [--workdir=DIR] [--config.a.b=value].

Exit codes: 0 done; 2 config, usage or state conflict; 3 data or integrity; 4 a value
that is not finite; 5 storage; 6 another process of the run is missing; 130 Ctrl-C and
143 SIGTERM, after a save; 1 a bug. Where points of a sweep failed, their code if they
share one, else 1.
"""

import contextlib
import os
import sys
import traceback
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from memsep_jax import commands, memory
from memsep_jax.experiments.config import command, schema

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "A name that `memsep_jax configs` lists or FILE.py, each with [:variant], or the "
    "config.json of a run.",
)
flags.FLAGS["config"].parser = _FILE = command.ConfigFile()
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Directory of all output; by default runs/<config and what was changed>, and for a "
    "run's config.json, with nothing changed, that run's own directory.",
)
_DRY_RUN = flags.DEFINE_bool(
    "dry_run",
    False,
    "Print parameters, memory, FLOPs and hours; fetch and write nothing.",
)
_RESUME_STEP = flags.DEFINE_integer(
    "resume_step", None, "Go back to this checkpoint; newer ones are moved aside."
)
_ALLOW_CONFIG_CHANGE = flags.DEFINE_bool(
    "allow_config_change", False, "Go on in a workdir that another config started."
)
_DISTRIBUTED = flags.DEFINE_string(
    "distributed",
    None,
    "One of several processes that train together: auto (as SLURM, TPU, Kubernetes or "
    "Open MPI say) or HOST:PORT,PROCESSES,INDEX.",
)
_DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of every error.")


def main(argv) -> int:
    """Flags -> studies.run(config, workdir)."""
    logging.set_verbosity(logging.WARNING)
    if len(argv) > 1:
        return _fail(f"unexpected argument {argv[1]!r}: flags start with --", 2)
    if _CONFIG.value is None:
        return _fail(
            "--config=NAME is required, for example --config=digits; --help lists all "
            "commands",
            2,
        )
    config, workdir = _CONFIG.value, _workdir()
    try:
        if not _DRY_RUN.value:
            _check_writable(Path(workdir))
    except OSError as error:  # before jax is imported, which takes seconds
        reason = error.strerror or error
        return _fail(
            f"--workdir={workdir} cannot be written ({reason}): give a directory that "
            "can be made and written",
            2,
        )
    code = _run(config, workdir)
    # At exit, jax would wait for processes that are gone. After a signal (128 plus its
    # number), threads of XLA that still compile would crash.
    if _DISTRIBUTED.value or code > 128:
        from memsep_jax.experiments.runtime import signals

        signals.leave(code)
    return code


def _workdir() -> str:
    if _WORKDIR.value:  # a shell leaves --workdir=~/x as it is
        return os.path.expanduser(_WORKDIR.value)
    return command.default_workdir(
        sys.argv[1:], _FILE.argument, _FILE.given, _CONFIG.value
    )


def _run(config, workdir) -> int:
    """Runs the config.   Returns: the exit code."""
    # Here, and not above: a mistake in the command is told before jax is imported.
    from memsep_jax import parallel
    from memsep_jax.experiments import studies
    from memsep_jax.experiments.runtime import compiled
    from memsep_jax.experiments.runtime.session import Terminal
    from memsep_jax.experiments.studies.dry_run import dry_run

    def work():
        if where := _DISTRIBUTED.value:
            try:
                parallel.join(where)
            except ValueError as error:
                raise command.UsageError(str(error)) from error
        if _DRY_RUN.value:
            console = Terminal(highlight=False, emoji=False)
            console.print(dry_run(config, console.print))
        else:
            if not _DISTRIBUTED.value:
                compiled.keep()
            studies.run(config, workdir, _RESUME_STEP.value, _ALLOW_CONFIG_CHANGE.value)

    return _told(work)


def _told(work) -> int:
    """Calls work.   Returns: the exit code; a bug of one process is raised."""
    try:
        work()
        return 0
    except BaseException as error:
        # Errors of ours carry their exit code, so that no list of them is kept here.
        code = getattr(error, "exit_code", None)
        known = code is not None and not isinstance(error, SystemExit)
        # Where several train, a raised error would meet the teardown of jax at exit,
        # which waits for the others: `main` leaves without it.
        if not known and not _DISTRIBUTED.value:
            raise
        if _DEBUG.value or not known:
            traceback.print_exc()
        return _fail(str(error), code if known else 1)


def parse_flags(argv: list[str]) -> list[str]:
    """absl's flags, with numbers as people write them and errors in one message."""
    argv = [command.readable(argument) for argument in command.joined(argv)]
    # ml_collections has no None for a field with a type: it is set after the parsing.
    emptied = [a.partition("=")[0] for a in argv if command.is_emptied(a)]
    if {"--help", "-help", "-h", "--helpshort", "--helpfull"} & {*argv}:
        sys.stdout.write(_help())
        sys.exit(0)
    try:
        rest = flags.FLAGS([a for a in argv if not command.is_emptied(a)])
    except (command.UsageError, flags.Error) as error:
        sys.exit(_fail(str(error), 2))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        sys.exit(_fail(error.args[0] if error.args else error, 2))
    for name in emptied:
        group, _, field = name.removeprefix("--config.").rpartition(".")
        (_CONFIG.value[group] if group else _CONFIG.value)[field] = None
    if _CONFIG.value is not None:
        schema.leave_over(_CONFIG.value, command.given_fields(argv))
    return rest


def _help() -> str:
    from memsep_jax.experiments.config import page

    own = flags.FLAGS.find_module_defining_flag("workdir")
    about = [__doc__.strip(), commands.usage(), flags.FLAGS.module_help(own)]
    return "\n\n".join([*about, page.plain()])


def run() -> None:
    """The entry point: of `python -m memsep_jax.main`, and of `memsep_jax COMMAND`."""
    memory.keep()
    try:
        if sys.argv[1:] and (program := commands.PROGRAMS.get(sys.argv[1])):
            flags.FLAGS.mark_as_parsed()  # it takes none of them
            sys.exit(_told(lambda: program(sys.argv[2:])))
        try:
            # ml_collections, too, looks for the fields in sys.argv.
            sys.argv[1:] = commands.spelled(sys.argv[1:])
        except command.UsageError as error:
            sys.exit(_fail(str(error), 2))
        app.run(main, flags_parser=parse_flags)
    except KeyboardInterrupt:  # before or after a run, where nothing is to be saved
        sys.exit(_fail("interrupted", 130))
    except BrokenPipeError:  # nobody reads the help any more
        # The interpreter flushes stdout when it exits, and would fail once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _check_writable(workdir):
    """Raises OSError where a file in workdir could not be made; leaves no trace."""
    for place in (workdir, *workdir.absolute().parents):
        if place.exists():
            probe = place / f".writable-{os.getpid()}"
            probe.touch()
            probe.unlink()
            return


def _fail(message, code):
    with contextlib.suppress(OSError):  # a closed stderr must not change the code
        sys.stderr.write(f"error: {message}\n")
    return code


if __name__ == "__main__":
    run()
