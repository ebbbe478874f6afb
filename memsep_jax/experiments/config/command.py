"""How a command line becomes a config: files, fields and names of workdirs.

ml_collections checks the types of the fields. This module turns every mistake into one
message, and reads numbers as people write them.
"""

import contextlib
import difflib
import hashlib
import json
import re
import runpy
import sys
import traceback
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from memsep_jax import defaults
from memsep_jax.experiments.config import schema

SHARED = ("run.", "sweep.")  # fields that do not change the directory of a run
LONG = 120  # characters of a workdir's name: a file system takes 255 bytes
UNSAFE = r"[^\w.=,+-]"  # characters that mean more to a shell or a file system


class UsageError(Exception):
    """A command that cannot be understood; not a ValueError, which absl rewraps."""

    exit_code = 2


class ConfigFile(flags.ArgumentParser):
    """FILE.py[:variant] -> a locked ConfigDict.

    ml_collections' own parser puts tracebacks into messages, and hides a file that is
    missing until its first field is read.
    """

    argument: str
    given: ConfigDict  # as the file gives it, before the command sets any field

    def parse(self, argument):
        """Reads the file, and refuses fields on the command line that it lacks."""
        config = load(argument)
        self.argument, self.given = argument, config.copy_and_resolve_references()
        # sys.argv, where ml_collections itself looks for the fields of a command.
        _check_fields(config, sys.argv[1:])
        return config.lock()

    def flag_type(self):
        """The name of the type in --help."""
        return "config file"


def default_workdir(argv: list[str], argument: str, given, config) -> str:
    """runs/<config>[-variant][-field=value ...]: other values have another directory.

    The name depends on what the config holds, not on how the command spells it: 1e3 and
    1000 are one run. A name that is cut, or that cannot show a value as it is, ends in
    a hash of the whole config. An unchanged config.json means the workdir of its run.

    Args: argv and argument, the words of the command and of its --config; given, the
      config as the file gives it; config, as the command changed it.
    """
    file, _, variant = argument.partition(":")
    path, before, now = Path(file), _values(given), _values(config)
    changed = {name: now[name] for name in now if now[name] != before.get(name)}
    saved = path.name == "config.json"
    if saved and not changed:
        return str(path.parent)
    stem = path.resolve().parent.name if saved else path.stem
    texts = {_short(name): _written(value) for name, value in changed.items()}
    words = [stem, *([variant] if variant else [])]
    whole = "-".join([*words, *(f"{name}={text}" for name, text in texts.items())])
    name = re.sub(UNSAFE, "_", whole)
    # With "=" in a value, one field could read as two, and so two configs could share a
    # name: their runs would write over each other.
    if name != whole or len(name) > LONG or "=" in "".join([variant, *texts.values()]):
        name = f"{name[: LONG - 9]}-{_digest(before | now)}"
    # Earlier versions made names of the words: a run with such a name continues there.
    former = Path("runs", _former_name(argv))
    with contextlib.suppress(UsageError):
        if _values(load(f"{former}/config.json")) == before | now:
            return str(former)
    return str(Path("runs", name))


def _values(config) -> dict:
    """The fields that tell a run from others; a report belongs to what it draws."""
    return {
        name: value
        for name, value in schema.values(config)
        if not name.startswith(SHARED) and (name, value) != ("experiment", "report")
    }


def _short(name):
    """The last part of a field's name, where no other field of a training has it."""
    last = name.rpartition(".")[2]
    # train.steps and sampler.steps must not share a directory, nor train_as.crop and
    # samples_as.crop of an audit.
    known = [n for n in schema.train_fields() if n.rpartition(".")[2] == last]
    return last if [n for n in known if not n.startswith(SHARED)] == [name] else name


def _written(value) -> str:
    """A value as people write it: 0.5, 2, 1e-5, True, and 3,4 for a tuple."""
    if isinstance(value, tuple):
        parts = [_written(part) for part in value]
        if all(re.fullmatch(r"[\w.+-]+", part) for part in parts):
            return ",".join(parts)
    if isinstance(value, float):
        return re.sub(r"\.0$|(?<=e[+-])0", "", repr(value))
    return str(value)


def _digest(values):
    """A hash of values other than defaults, so that new fields do not change it."""
    known = schema.TRAIN if "model.name" in values else schema.AUDIT
    by_default = {name: field.default for name, field, _ in schema.leaves(known)}
    own = {k: v for k, v in values.items() if v != by_default.get(k)}
    text = json.dumps(own, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _former_name(argv):
    """The name that earlier versions made of the words of a command."""
    words: list[str] = []
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
            words.append(f"{_short(name)}={value}")
    return re.sub(UNSAFE, "_", "-".join(words))[:LONG]


def joined(argv):
    """--config FILE and --config.a.b VALUE as one word, with "="."""
    joined: list[str] = []
    for argument in argv:
        if (
            joined
            and re.fullmatch(r"--?config(\.[\w.]+)?", joined[-1])
            and re.match(r"[^-]|-\.?\d|$", argument)  # no flag begins with a digit
        ):
            joined[-1] += f"={argument}"
        else:
            joined.append(re.sub(r"^-(?=(no)?config\.|config(=|$))", "--", argument))
    return joined


def given_fields(argv) -> list[str]:
    """ "group.field" of every field that the command sets."""
    matches = (re.match(r"--(?:no)?config\.([^=]*)", word) for word in joined(argv))
    return [match[1] for match in matches if match]


def readable(argument):
    """Reads 1e3, given for an integer, as 1000."""
    name, equals, value = argument.partition("=")
    integer = {field.kind for field in _declared(name)} == {int}
    if integer and re.fullmatch(r"\d+(\.\d*)?[eE]\+?\d+", value):
        number = float(value)
        if number < 1e15 and number % 1 == 0:  # a float holds such integers exactly
            value = repr(int(number))
    return f"{name}{equals}{value}"


def is_emptied(argument):
    """Whether it sets a field to None that is None unless given."""
    # ml_collections reads None as the word "None", or refuses it for a number.
    name, _, value = argument.partition("=")
    known = _declared(name)
    return value in ("None", "none") and bool(known) and known[0].default is None


def _declared(flag):
    """The field of --config.a.b: a list of it, or an empty one."""
    name = flag.removeprefix("--config.")
    return [
        field
        for known in (schema.TRAIN, schema.AUDIT)
        for other, field, _ in schema.leaves(known)
        if other == name
    ][:1]


def folder(name: str) -> Path:
    """Where the files of "configs" or "launch" are, installed or in a checkout."""
    package = Path(__file__).parents[2]
    # A wheel has them inside of the package, a checkout beside it.
    return next(p / name for p in (package, package.parent) if (p / name).is_dir())


def found(name: str) -> str:
    """The file that --config=NAME means: a path, or a config of the package."""
    own = folder("configs") / f"{name.removesuffix('.py')}.py"
    is_name = Path(name).name == name
    return str(own) if is_name and not Path(name).is_file() and own.is_file() else name


def no_such_file(name: str) -> str:
    """What to say of a config that is not there."""
    known = sorted(path.stem for path in folder("configs").glob("*.py"))
    close = difflib.get_close_matches(Path(name).stem, known, 1)
    hint = f", did you mean --config={close[0]}?" if close else ""
    return f"no such file{hint or '; `memsep_jax configs` lists those of the package'}"


def load(argument: str) -> ConfigDict:
    """The ConfigDict of NAME or FILE.py[:variant], or of RUN/config.json.

    Raises: UsageError.
    """
    file, colon, variant = argument.partition(":")
    file = found(file)
    if not Path(file).is_file():
        raise UsageError(f"--config={argument}: {no_such_file(file)}")
    try:
        if file.endswith(".json"):
            # A config.json is data, perhaps a stranger's: no code of it is executed.
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
        # No line of the file was run: the error itself knows where it is.
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
    known = dict(schema.values(config))
    for given in given_fields(argv):
        if given in known or given in config:
            continue
        close = difflib.get_close_matches(given, known, 1)
        if "." not in given or not close:  # the group is missing or wrong
            last = {name.rpartition(".")[2] for name in known}
            word = difflib.get_close_matches(given.rpartition(".")[2], last, 1)
            close = [n for n in known if n.rpartition(".")[2] in word] or close
        options = " or ".join(f"--config.{name}" for name in close)
        wrong.append(
            f"--config.{given} is not a field of the config"
            + (f", did you mean {options}?" if options else "")
        )
    if wrong:
        raise UsageError("\n".join(wrong))
