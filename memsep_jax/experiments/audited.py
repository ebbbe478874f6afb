"""An audit at a prompt: of arrays, of files, or of a generator that is called."""

import contextlib
import operator
import os
import re
import shutil
import tempfile
import weakref
from pathlib import Path

from memsep_jax import data, defaults
from memsep_jax.checkpoint import ConflictError, StorageError
from memsep_jax.data import DataError, readers, sources
from memsep_jax.experiments import record
from memsep_jax.experiments.config import fields, schema
from memsep_jax.experiments.config.construct import ConfigError
from memsep_jax.experiments.reporting import report
from memsep_jax.experiments.runtime import session
from memsep_jax.experiments.studies import audit as study
from memsep_jax.weights import WeightsError

MOST = 10**9  # samples of a function: their bytes must fit an integer of numpy
OWN = ("experiment", *study.ROLES)  # fields that are arguments, or no choice here


class Audit:
    """What an audit found; made by `audit`. As text: verdict, notes, what to do.

    verdict: "copies", "undertrained", "no sign of copying" or "unknown".
    numbers: all of metrics.json; numbers["verdict"] says it in words.
    samples, duplicates: the columns of per_sample.csv and duplicates.csv, as arrays.
    pairs: the arrays of pairs.npz, the samples that are most like a training image.
    workdir: where all this lies; a temporary one is removed with this object.
    """

    def __init__(self, workdir):
        self.workdir = Path(workdir)
        self.numbers = record.read_json(self.workdir / "metrics.json")
        self.samples = record.read_csv(self.workdir / "per_sample.csv")
        self.duplicates = record.read_csv(self.workdir / "duplicates.csv")
        self.pairs = record.read_npz(self.workdir / "pairs.npz")
        read = (self.numbers, self.samples, self.duplicates, self.pairs)
        if any(one is None for one in read):
            raise ConflictError(
                f"{self.workdir} holds a damaged audit: remove it, and audit again"
            )

    @property
    def verdict(self) -> str:
        """The name of the verdict."""
        return self.numbers["verdict"]["name"]

    def __str__(self):
        known = self.numbers["verdict"]
        lines = [known["text"], known["small"]]
        if notes := self.numbers["notes"]:
            lines += ["Notes:", *(f"- {note}" for note in notes)]
        lines.append("What to do:")
        lines += [f"- {line['text']}" for line in self.numbers["advice"]]
        return "\n".join(map(_said, lines))

    __repr__ = __str__

    def _repr_html_(self):
        return report.of_notebook(self.workdir, _said)

    def report(self, path=None) -> Path:
        """Writes the page with all numbers and pictures.

        Args: path, of the .html; None is report.html in the workdir.
        Returns: its path.   Raises: StorageError.
        """
        report.run(None, self.workdir, say=lambda text: None)
        own = self.workdir / "report.html"
        if path is None:
            return own
        path = Path(path).expanduser()
        if path.is_dir():
            raise StorageError(
                f"could not write {path}: it is a folder; give the path of a file, "
                f"such as {path / 'report.html'}"
            )
        record.write_bytes(path, own.read_bytes())
        return path

    def save(self, folder) -> Path:
        """Writes the page and all numbers, as the command does, into a new folder.

        Returns: the folder.
        Raises: ConflictError: it has something in it.   StorageError: no room for it.
        """
        folder = Path(folder).expanduser()
        if not _is_free(folder):
            raise ConflictError(f"{folder} is not empty: give another folder")
        self.report()
        aside = shutil.ignore_patterns("compared", ".*")
        try:
            shutil.copytree(self.workdir, folder, ignore=aside, dirs_exist_ok=True)
        except OSError as error:
            # copytree goes on after an error, and lists (from, to, why) of all.
            several = isinstance(error, shutil.Error)
            why = error.args[0][0][2] if several else error.strerror
            raise StorageError(f"could not write {folder}: {why}") from error
        return folder


def audit(
    samples,
    train,
    held_out=None,
    *,
    pool=None,
    num_samples: int | None = None,
    workdir=None,
    **settings,
) -> Audit:
    """Are these samples copies of that training set? Of any generator.

    Each set is an array, uint8 or floats in [-1, 1], [n, h, w, c] or [n, h, w], or what
    the command takes: the path of a folder of images, of a zip of one, of an .npz or
    .npy or of a run, or the name of a data set.

    Args:
      samples: what was generated; or a function n -> n images, which is called with at
        most run.chunk at a time, once all else is known to be right.
      train: what the generator was trained on.
      held_out: images of the same kind that it never saw: without them nobody knows
        what honest samples would score.
      pool: the images that `train` was chosen from.
      num_samples: of a function, how many images it is asked for.
      workdir: a directory, as of the command: an audit that was interrupted goes on
        there. None is a temporary one, which lives as long as the result.
      settings: further fields of the config of an audit (docs/configs.md), a group as a
        dict: seed=1, quality={"points": 0}, features={"name": "none"}.
    Raises:
      ConfigError: settings or sets that do not fit.   DataError: images that cannot be
        read, or a function that returns others than it was asked for.
      ConflictError: the workdir holds another audit, another run, or other files.
    """
    with _at_prompt():
        config = _config(settings)
        given: dict[str, data.Source | study.Generator] = {}
        sets = dict(samples=samples, train=train, held_out=held_out, pool=pool)
        if callable(samples):
            given["samples"] = generator = _generator(samples, num_samples)
            sets["samples"] = f"{generator.total} images of a function"
        elif num_samples is not None:
            raise ConfigError(
                f"num_samples={num_samples} is for samples that are a function, and "
                "these are there: leave it out, or give a part of them"
            )
        for name, one in sets.items():
            if one is None or isinstance(one, str | os.PathLike):
                config[name] = one and os.fspath(one)
                continue
            given[name] = source = sources.of_array(one, name)
            # The name tells arrays apart: a workdir refuses another one.
            mark = data.fingerprint(source.images)[:12]
            shape = " x ".join(map(str, source.images.shape))
            config[name] = f"array {mark} of {shape}"
        if workdir is not None:
            return _audit(config, Path(workdir).expanduser(), given)
        with contextlib.ExitStack() as stack:
            temporary = tempfile.TemporaryDirectory(prefix="memsep_jax-")
            stack.callback(temporary.cleanup)
            result = _audit(config, Path(temporary.name) / "audit", given, page=False)
            weakref.finalize(result, stack.pop_all().close)
            return result


def _audit(config, workdir, given, page=True) -> Audit:
    _check_workdir(workdir)
    held = session.Session(workdir, config, quiet=True)
    # A function may make other samples than before, which `begin` refuses.
    generates = isinstance(given.get("samples"), study.Generator)
    if generates or not held.is_complete():
        with held:
            study.run(config, held, given, page)
    return Audit(workdir)


def _check_workdir(workdir):
    """Refuses a folder that is neither free nor an audit's.   Raises: ConflictError."""
    if readers.is_workdir(workdir):
        name = record.read_json(workdir / "config.json")["experiment"]
        if name == "audit":
            return
        what = f"experiment={name}"
        if name == "train":
            what = f"a training ({what})"
        raise ConflictError(
            f"{workdir} holds {what}, not an audit: give another workdir"
        )
    # A run that was killed as it began has left run.json alone.
    if not _is_free(workdir, {"run.json"}):
        raise ConflictError(
            f"{workdir} is not empty, and holds no audit: give a new folder as workdir"
        )


def _is_free(folder, but=frozenset()) -> bool:
    """Whether a folder is not there, or has nothing in it but these and hidden files.

    Raises: StorageError: it cannot be read.
    """
    try:
        if not os.path.isdir(folder):
            return not os.path.lexists(folder)
        names = os.listdir(folder)
    except OSError as error:
        raise StorageError(f"could not read {folder}: {error.strerror}") from error
    return all(name.startswith(".") or name in but for name in names)


def _config(settings):
    """The config of an audit with these fields.   Raises: ConfigError."""
    config = defaults.audit()
    known = {
        name: field for name, field, _ in schema.leaves(schema.AUDIT) if name not in OWN
    }
    given = dict(schema.values(settings))
    wrong = [
        f"{name} is not a field of an audit{schema.did_you_mean(name, known)}"
        for name in given
        if name not in known
    ]
    wrong += [
        f"{name}={value!r} must be {fields.KINDS[known[name].kind][1]}"
        for name, value in given.items()
        if name in known and not known[name].is_kind(value)
    ]
    if wrong:
        raise ConfigError("\n".join(wrong))
    for name, value in given.items():
        group, _, field = name.rpartition(".")
        place = config[group] if group else config
        # As its own type: numpy has integers that a config does not take.
        place[field] = None if value is None else known[name].kind(value)
    return config


def _generator(generate, num_samples):
    """The `Generator` of a function.   Raises: ConfigError."""
    try:
        total = 0 if isinstance(num_samples, bool) else operator.index(num_samples)
    except TypeError:
        total = 0
    if not 1 <= total <= MOST:
        raise ConfigError(
            f"num_samples={num_samples}: samples are a function, so give the number of "
            "images that it is asked for, an integer from 1 to 10**9"
        )
    return study.Generator(generate, total)


@contextlib.contextmanager
def _at_prompt():
    """Errors name what a person gave, and not the flags of the command."""
    try:
        yield
    except (ConfigError, DataError, WeightsError, ConflictError) as error:
        text = str(error).replace(session.WAY_OUT, "Give another --workdir")
        if _said(text) == str(error):
            raise
        raise type(error)(_said(text)) from error


def _said(text: str) -> str:
    """What is said of the command's flags, for a prompt: --config.a.b=1 is a.b=1."""
    return re.sub(r"--(config\.)?(?=[a-z])", "", text)
