"""How a command line becomes a config: files, fields, names of workdirs.

ml_collections checks the types of the fields; what is here makes every mistake one
message, and reads numbers as people write them.
"""

import difflib
import json
import re
import runpy
import sys
import traceback
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from memsep_jax import defaults

SHARED = ("run.", "sweep.")  # groups whose fields leave a run where it is


class UsageError(Exception):
    """A command that cannot be understood; not a ValueError, which absl rewraps."""


class ConfigFile(flags.ArgumentParser):
    """FILE.py[:variant] -> a locked ConfigDict.

    ml_collections' own parser puts tracebacks into messages, and hides a file that is
    missing until its first field is read.
    """

    def parse(self, argument):
        """Reads the file; refuses fields on the command line that it lacks."""
        config = load(argument)
        # Where ml_collections itself looks for the fields that a person gives.
        _check_fields(config, sys.argv[1:])
        return config.lock()

    def flag_type(self):
        """What --help calls it."""
        return "config file"


def default_workdir(argv: list[str]) -> str:
    """runs/<config>[-variant][-field=value ...]: other numbers, another directory."""
    words: list[str] = []
    fields = [name for name, _ in _fields(defaults.train())]
    names = [f.rpartition(".")[2] for f in fields if not f.startswith(SHARED)]
    for argument in joined(argv):
        name, _, value = argument.lstrip("-").partition("=")
        if name == "config":
            file, _, variant = value.partition(":")
            path = Path(file)
            saved = path.suffix == ".json"
            stem = path.resolve().parent.name if saved else path.stem
            words = [stem, *([variant] if variant else []), *words]
        elif name.startswith("config."):
            name = name.removeprefix("config.")
            if name.startswith(SHARED) or argument.endswith("experiment=report"):
                continue
            last = name.rpartition(".")[2]
            # train.steps and sampler.steps must not share a directory.
            words.append(f"{last if names.count(last) == 1 else name}={value}")
    return str(Path("runs") / re.sub(r"[^\w.=,+-]", "_", "-".join(words))[:120])


def joined(argv):
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


def readable(argument):
    """1e3, given for an integer, is 1000."""
    name, equals, value = argument.partition("=")
    if _default(name)[0] is int and re.fullmatch(r"\d+(\.\d*)?[eE]\+?\d+", value):
        number = float(value)
        if number < 1e15 and number % 1 == 0:
            value = repr(int(number))
    return f"{name}{equals}{value}"


def is_emptied(argument):
    """Whether it sets a field to None that is None unless given."""
    name, _, value = argument.partition("=")
    kind, default = _default(name)
    return value in ("None", "none") and kind is not None and default is None


def _default(name):
    """The type and the default of --config.a.b, or (None, None)."""
    *groups, field = name.removeprefix("--config.").split(".")
    for known in defaults.train(), defaults.audit():
        for group in groups:
            known = known.get(group) if isinstance(known, ConfigDict) else None
        if isinstance(known, ConfigDict) and field in known:
            return known.get_type(field), known[field]
    return None, None


def load(argument: str) -> ConfigDict:
    """The ConfigDict of FILE.py[:variant] or RUN/config.json.   Raises: UsageError."""
    file, colon, variant = argument.partition(":")
    if not Path(file).is_file():
        raise UsageError(f"--config={argument}: no such file")
    try:
        if file.endswith(".json"):
            # Data: no code of the run is run.
            return defaults.restored(json.loads(Path(file).read_text()))
        names = runpy.run_path(file)
        if "get_config" not in names:
            raise UsageError(f"--config={argument}: {file} defines no get_config()")
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
        where = f" ({file}:{lines[-1]})" if lines else ""
        raise UsageError(f"--config={argument}: {kind}{error}{where}") from error
    if not isinstance(config, ConfigDict) or "experiment" not in config:
        raise UsageError(
            f"--config={argument}: get_config() of {file} returned "
            f"{type(config).__name__}; it must return a ConfigDict with an experiment, "
            "as memsep_jax.defaults.train() makes it"
        )
    return config


def _check_fields(config, argv):
    """Raises UsageError with every --config.field that the config does not have."""
    wrong = []
    known = dict(_fields(config))
    for argument in joined(argv):
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
