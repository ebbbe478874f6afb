"""The command: --config=FILE[:variant] [--workdir=DIR] [--config.a.b=value].

Exit codes: 0 done; 2 config, usage or state conflict; 3 data or integrity; 4 a value
that is not finite; 5 storage; 130 Ctrl-C and 143 SIGTERM, after a save; 1 a bug.
"""

import contextlib
import os
import re
import sys
import traceback
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags
from rich.console import Console

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "File of the run, FILE.py[:variant] or a run's config.json."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where all is written; by default runs/<name of the config>."
)
_DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Print parameters, memory and FLOPs; compile and write nothing."
)
_RESUME_STEP = flags.DEFINE_integer(
    "resume_step", None, "Go back to this checkpoint; newer ones are moved aside."
)
_ALLOW_CONFIG_CHANGE = flags.DEFINE_bool(
    "allow_config_change", False, "Go on in a workdir that another config started."
)
_DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of every error.")


def main(argv) -> int:
    """Flags -> experiments.run(config, workdir)."""
    logging.set_verbosity(logging.WARNING)
    if len(argv) > 1:
        return _fail(f"unexpected argument {argv[1]!r}: flags start with --", 2)
    if _CONFIG.value is None:
        return _fail("--config=FILE is required, for example configs/digits.py", 2)
    config, workdir = _CONFIG.value, _WORKDIR.value or default_workdir(sys.argv[1:])
    try:
        if not _DRY_RUN.value:
            Path(workdir).mkdir(parents=True, exist_ok=True)
            probe = Path(workdir) / f".writable-{os.getpid()}"
            probe.touch()
            probe.unlink()
    except OSError as error:  # before jax is imported: seconds count
        reason = error.strerror or error
        return _fail(
            f"--workdir={workdir} cannot be written ({reason}): give a directory that "
            "can be made and written",
            2,
        )
    from memsep_jax import experiments

    try:
        if _DRY_RUN.value:
            console = Console(highlight=False)
            console.print(experiments.train.dry_run(config, console.print))
        else:
            experiments.run(
                config, workdir, _RESUME_STEP.value, _ALLOW_CONFIG_CHANGE.value
            )
        return 0
    except BaseException as error:
        code = getattr(error, "exit_code", None)
        if code is None or isinstance(error, SystemExit):  # a bug shows itself whole
            raise
        if _DEBUG.value:
            traceback.print_exc()
        return _fail(str(error), code)


def default_workdir(argv: list[str]) -> str:
    """runs/<config>[-variant][-field=value ...]: other numbers, another directory."""
    words: list[str] = []
    for argument in argv:
        name, _, value = argument.lstrip("-").partition("=")
        if name == "config":
            file, _, variant = value.partition(":")
            path = Path(file)
            stem = path.parent.name if path.suffix == ".json" else path.stem
            words = [stem, *([variant] if variant else []), *words]
        elif name.startswith("config.") and not name.startswith(
            ("config.run.", "config.experiment")
        ):
            words.append(f"{name.rpartition('.')[2]}={value}")
    return str(Path("runs") / re.sub(r"[^\w.=,+-]", "_", "-".join(words))[:120])


def parse_flags(argv: list[str]) -> list[str]:
    """absl's flags, with numbers as people write them and errors in one message."""
    argv = [_readable(argument) for argument in argv]
    try:
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        message = error.args[0] if error.args else str(error)
        sys.exit(_fail(f"{message}{_origin(error, argv)}", 2))
    except Exception as error:  # whatever a config file raises
        sys.exit(_fail(f"{type(error).__name__}: {error}{_origin(error, argv)}", 2))


def run() -> None:
    """The entry point."""
    app.run(main, flags_parser=parse_flags)


def _readable(argument):
    """1e3 for an integer is 1000; a run's config.json is a config like any other."""
    name, equals, value = argument.partition("=")
    if name.startswith("--config."):
        with contextlib.suppress(ValueError, OverflowError):
            if (
                re.fullmatch(r"[+-]?\d+(\.\d*)?[eE]\+?\d+", value)
                and float(value) < 1e15
            ):
                value = repr(int(float(value))) if float(value) % 1 == 0 else value
    elif name == "--config" and value.endswith(".json"):
        value = f"{Path(__file__).parent / 'experiments' / 'saved.py'}:{value}"
    return f"{name}{equals}{value}"


def _origin(error, argv):
    """Where in the config file an error came from, as file:line."""
    files = [
        a.split("=", 1)[1].split(":")[0] for a in argv if a.startswith("--config=")
    ]
    names = {os.path.abspath(f) for f in files}
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if os.path.abspath(frame.filename) in names:
            return f" ({frame.filename}:{frame.lineno})"
    return ""


def _fail(message, code):
    with contextlib.suppress(OSError):
        sys.stderr.write(f"error: {message}\n")
    return code


if __name__ == "__main__":
    run()
