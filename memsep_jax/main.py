"""The command: --config=FILE[:variant] [--workdir=DIR] [--config.a.b=value].

Exit codes: 0 done; 2 config, usage or state conflict; 3 data or integrity; 4 a value
that is not finite; 5 storage; 130 Ctrl-C and 143 SIGTERM, after a save; 1 a bug.
"""

import contextlib
import difflib
import os
import re
import runpy
import sys
import traceback
from pathlib import Path

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from memsep_jax import defaults

_SAVED = Path(__file__).parent / "experiments" / "saved.py"


class UsageError(Exception):
    """A command that cannot be understood; not a ValueError, which absl rewraps."""


class _ConfigFile(flags.ArgumentParser):
    """FILE.py[:variant] -> a locked ConfigDict.

    ml_collections' own parser puts tracebacks into messages, and hides a file that is
    missing until its first field is read.
    """

    def parse(self, argument):
        config = _load(argument)
        # Where ml_collections itself looks for the fields that a person gives.
        _check_fields(config, sys.argv[1:])
        return config.lock()

    def flag_type(self):
        return "config file"


_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "File of the run, FILE.py[:variant] or a run's config.json."
)
flags.FLAGS["config"].parser = _ConfigFile()
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
            _check_writable(Path(workdir))
    except OSError as error:  # before jax is imported: seconds count
        reason = error.strerror or error
        return _fail(
            f"--workdir={workdir} cannot be written ({reason}): give a directory that "
            "can be made and written",
            2,
        )
    from memsep_jax import experiments
    from memsep_jax.experiments.dry_run import dry_run

    try:
        if _DRY_RUN.value:
            console = experiments.session.Terminal(highlight=False)
            console.print(dry_run(config, console.print))
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
    names = [name.rpartition(".")[2] for name, _ in _fields(defaults.train())]
    for argument in _joined(argv):
        name, _, value = argument.lstrip("-").partition("=")
        if name == "config":
            file, _, variant = value.partition(":")
            path = Path(file)
            json = path.suffix == ".json"
            stem = path.resolve().parent.name if json else path.stem
            words = [stem, *([variant] if variant else []), *words]
        elif name.startswith("config.") and not (
            name.startswith("config.run.") or argument.endswith("experiment=report")
        ):
            name = name.removeprefix("config.")
            last = name.rpartition(".")[2]
            # train.steps and sampler.steps must not share a directory.
            words.append(f"{last if names.count(last) == 1 else name}={value}")
    return str(Path("runs") / re.sub(r"[^\w.=,+-]", "_", "-".join(words))[:120])


def parse_flags(argv: list[str]) -> list[str]:
    """absl's flags, with numbers as people write them and errors in one message."""
    argv = [_readable(argument) for argument in _joined(argv)]
    emptied = [a.partition("=")[0] for a in argv if _is_emptied(a)]
    try:
        rest = flags.FLAGS([a for a in argv if not _is_emptied(a)])
    except SystemExit:
        if any(a.lstrip("-").startswith("help") for a in argv):
            sys.exit(0)  # absl calls it a failure to be asked for help
        raise
    except (UsageError, flags.Error) as error:
        sys.exit(_fail(str(error), 2))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        sys.exit(_fail(error.args[0] if error.args else error, 2))
    for name in emptied:
        group, _, field = name.removeprefix("--config.").rpartition(".")
        _CONFIG.value[group][field] = None
    return rest


def run() -> None:
    """The entry point."""
    try:
        app.run(main, flags_parser=parse_flags)
    except KeyboardInterrupt:  # before or after a run, where nothing is to be saved
        sys.exit(_fail("interrupted", 130))
    except BrokenPipeError:  # nobody reads the help any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _joined(argv):
    """--config FILE and --config.a.b VALUE, in two words, as one with "="."""
    joined: list[str] = []
    for argument in argv:
        if (
            joined
            and re.fullmatch(r"--?config(\.[\w.]+)?", joined[-1])
            and not argument.startswith("-")
        ):
            joined[-1] += f"={argument}"
        else:
            joined.append(re.sub(r"^-(?=config[.=]|config$)", "--", argument))
    return joined


def _readable(argument):
    """1e3 for an integer is 1000; a run's config.json is a config like any other."""
    name, equals, value = argument.partition("=")
    if _default(name)[0] is int and re.fullmatch(r"\d+(\.\d*)?[eE]\+?\d+", value):
        number = float(value)
        if number < 1e15 and number % 1 == 0:
            value = repr(int(number))
    elif name == "--config" and value.endswith(".json"):
        value = f"{_SAVED}:{value}"
    return f"{name}{equals}{value}"


def _is_emptied(argument):
    """Whether it sets a field to None that is None unless given."""
    name, _, value = argument.partition("=")
    kind, default = _default(name)
    return value in ("None", "none") and kind is not None and default is None


def _default(name):
    """The type and the default of --config.a.b, or (None, None)."""
    known = defaults.train()
    *groups, field = name.removeprefix("--config.").split(".")
    for group in groups:
        known = known.get(group)
        if not isinstance(known, ConfigDict):
            return None, None
    if not name.startswith("--config.") or field not in known:
        return None, None
    return known.get_type(field), known[field]


def _load(argument):
    """The ConfigDict of FILE.py[:variant].   Raises: UsageError with file:line."""
    file, colon, variant = argument.partition(":")
    shown = variant if file == str(_SAVED) else argument
    if not Path(variant if file == str(_SAVED) else file).is_file():
        raise UsageError(f"--config={shown}: no such file")
    try:
        names = runpy.run_path(file)
        if "get_config" not in names:
            raise UsageError(f"--config={shown}: {file} defines no get_config()")
        config = names["get_config"](*[variant] if colon else [])
    except UsageError:
        raise
    except Exception as error:  # whatever a config file raises
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename == file
        ]
        if isinstance(error, SyntaxError) and error.filename == file:
            error, lines = SyntaxError(error.msg), [error.lineno]
        where = f" ({file}:{lines[-1]})" if lines and file != str(_SAVED) else ""
        raise UsageError(f"--config={shown}: {kind}{error}{where}") from error
    if not isinstance(config, ConfigDict) or "experiment" not in config:
        raise UsageError(
            f"--config={shown}: get_config() of {file} returned "
            f"{type(config).__name__}; it must return a ConfigDict with an experiment, "
            "as memsep_jax.defaults.train() makes it"
        )
    return config


def _check_fields(config, argv):
    """Raises UsageError with every --config.field that the config does not have."""
    wrong = []
    known = dict(_fields(config))
    for argument in _joined(argv):
        match = re.match(r"--(?:no)?config\.([^=]*)", argument)
        if match is None or match[1] in known or match[1] in config:
            continue
        close = difflib.get_close_matches(match[1], known, 1)
        if "." not in match[1] or not close:  # the group is missing or wrong
            last = {name.rpartition(".")[2] for name in known}
            word = difflib.get_close_matches(match[1].rpartition(".")[2], last, 1)
            close = [n for n in known if n.rpartition(".")[2] in word] or close
        options = " or ".join(f"--config.{name}" for name in close)
        wrong.append(
            f"--config.{match[1]} is not a field of the config"
            + (f", did you mean {options}?" if options else "")
        )
    if wrong:
        raise UsageError("\n".join(wrong))


def _fields(config, prefix=""):
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _fields(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _check_writable(workdir):
    """Raises OSError where a file in workdir could not be made; leaves no trace."""
    for place in (workdir, *workdir.absolute().parents):
        if place.exists():
            probe = place / f".writable-{os.getpid()}"
            probe.touch()
            probe.unlink()
            return


def _fail(message, code):
    with contextlib.suppress(OSError):
        sys.stderr.write(f"error: {message}\n")
    return code


if __name__ == "__main__":
    run()
