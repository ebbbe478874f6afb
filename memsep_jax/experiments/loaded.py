"""A run that was trained, as an object: its score, its denoiser, new samples."""

import copy
import functools
import itertools
import json
import operator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memsep_jax import checkpoint, data, defaults, parallel, score, train, weights
from memsep_jax.experiments import audited, record, studies, training
from memsep_jax.experiments.config import build
from memsep_jax.experiments.reporting import figures
from memsep_jax.experiments.studies import evaluate, store, training_run, unfinished

EXPORTED = ".safetensors"
IN_GRID = 64  # samples in the grid of `write`, at most


class Run(NamedTuple):
    """The network of a run and what its config describes; made by `load`."""

    workdir: Path | None  # None where it was loaded from a file
    config: Any  # a ConfigDict
    parts: build.Parts  # process, prediction, data (`splits`), sampling times, ...
    params: Any  # the weights that are sampled: by sampler.weights, EMA or raw
    step: int  # of the weights
    programs: dict  # compiled samplers, by what they depend on

    def __repr__(self):
        model, n = self.config.model.name, len(self.parts.splits.train.x)
        return (
            f"Run({str(self.workdir or 'of a file')!r}: {model} of "
            f"{training.count(self.params):,} parameters at step {self.step:,}, "
            f"{self.config.data.name}, n = {n:,})"
        )

    def score_fn(self, x, t, label=None):
        """The learned score.   x [*e], t [], label [] or None -> [*e]."""
        return training.score_fn(self.parts, self.params, label)(x, t)

    def denoiser(self, x, t, label=None):
        """E[X_0 | X_t = x] as learned (Tweedie).   x [*e], t [] -> [*e]."""
        score_fn = training.score_fn(self.parts, self.params, label)
        return score.to_denoiser(score_fn, self.parts.process)(x, t)

    def sample(
        self, key=None, n: int = 16, label=None, guidance=None, steps=None, first=0
    ):
        """Samples as the run draws its own, by the sampler of its config.

        Sample i depends on the key and on i, and on n by rounding only: fewer samples
        than run.chunk are drawn by a smaller program.

        Args:
          key: a key or a seed; None is that of the run, whose own samples come again.
          label: of all samples; None draws labels as they are in the training set.
          guidance: the weight of `score.guided`; 1 is no guidance, None that of
            sampler.guidance. Needs train.label_drop.
          steps: of the sampler; None is sampler.steps.
          first: the number i of the first of the n samples.
        Returns:
          numpy [n, *e]: uint8 pixels, or vectors as they are.
        Raises:
          build.ConfigError, a ValueError: n below 1, steps that the sampler cannot
            take, a label or guidance that the network does not know.
        """
        config, parts = self.config, self.parts
        n, first = _integer("n", n, 1), _integer("first", first, 0)
        labels = None if label is None else self._only(_integer("label", label, 0))
        given: dict[str, Any] = {}
        if steps is not None:
            given["steps"] = _integer("steps", steps, 1)
        if guidance is not None:
            given["guidance"] = _number("guidance", guidance)
        if given:
            config = copy.deepcopy(config)
            config.sampler.update(given)
            parts = build.build(config)  # checks them, too
        mesh = parallel.make_mesh(jax.local_devices())
        score_of = functools.partial(training.sampled_score, config, parts)
        made = json.dumps(build.to_json(config), sort_keys=True)
        if made not in self.programs:
            self.programs[made] = evaluate.programs(config, parts, mesh, score_of)
        draw = evaluate.make_generate(
            config, parts, mesh, score_of, key=_key(key), labels=labels,
            made=self.programs[made],
        )  # fmt: skip
        chunk, stop = config.run.chunk, first + n
        starts = range(first, stop, chunk)
        return np.concatenate(
            [draw(self.params, i, min(i + chunk, stop)) for i in starts]
        )

    def audit(self, held_out=None, workdir=None, **settings) -> audited.Audit:
        """Audits the samples of the run, as `memsep_jax.audit` does.

        They are those in its workdir or, of a run from a file, drawn again.

        Args: held_out, images; None takes the run's own, where it has some.   workdir,
          settings, as there.
        """
        own, splits = self.workdir and self.workdir.resolve(), self.parts.splits
        if own is None:
            settings.setdefault("num_samples", self.config.sampler.num_samples)
            drawn = itertools.count()

            def samples(n):  # each call goes on where the last one ended
                some = [next(drawn) for _ in range(n)]
                return self.sample(n=n, first=some[0])

            if held_out is None and splits.held_out is not None:
                held_out = data.to_uint8(np.asarray(splits.held_out.x))
            train = data.to_uint8(np.asarray(splits.train.x))
            return audited.audit(samples, train, held_out, workdir=workdir, **settings)
        if held_out is None and splits.held_out is not None:
            held_out = own
        return audited.audit(own, own, held_out, workdir=workdir, **settings)

    def report(self) -> Path:
        """Draws report.html again.   Returns: its path.

        Raises: checkpoint.ConflictError: the run was loaded from a file.
        """
        if self.workdir is None:
            raise checkpoint.ConflictError(
                "this run was loaded from a file, which has no numbers to draw: load "
                "its workdir, or give run.audit().report()"
            )
        config = copy.deepcopy(self.config)
        config.experiment = "report"
        studies.run(config, self.workdir)
        return self.workdir / "report.html"

    def export(self, path) -> None:
        """Writes weights and config as one safetensors file, which `load` reads.

        Raises: build.ConfigError: another suffix than .safetensors, by which `load`
          tells such files.   checkpoint.StorageError; an older file stays as it was.
        """
        path = Path(path).expanduser()
        if path.suffix != EXPORTED:
            raise build.ConfigError(f"{path}: give a name that ends in {EXPORTED}")
        about = {
            "config": json.dumps(build.to_json(self.config)),
            "step": str(self.step),
            "data": self.parts.splits.fingerprint,
            "weights": checkpoint.digest(self.params),
        }
        weights.write(path, weights.from_params(self.params), about)

    def _only(self, label):
        """[label], where the network knows it."""
        known = self.parts.splits.train.label
        if known is None:
            raise build.ConfigError(
                f"label={label}: this run was trained without labels; leave it out"
            )
        known = np.unique(known)
        if label not in known:
            raise build.ConfigError(
                f"label={label} is not among those of the training set: "
                f"{known[:10].tolist()}{', ...' if len(known) > 10 else ''}"
            )
        return jnp.array([label])


def load(path, config=None) -> Run:
    """A run of experiment=train, finished or not, by its newest weights.

    The data are read again, as the config names them, and code that the config names is
    run: load only what you trust as you trust a program.

    Args:
      path: a workdir, a file that run.pack wrote, or one of `Run.export`.
      config: of a file, where it is not in it: a ConfigDict or a config.json.
    Raises:
      checkpoint.ConflictError: no run, or one without weights.
      build.ConfigError, data.DataError, checkpoint.CorruptError, weights.WeightsError.
    """
    if not str(path):
        raise checkpoint.ConflictError("an empty path: give the workdir of a run")
    path = Path(path).expanduser()
    if path.name == "config.json":
        path = path.parent
    is_file = path.is_file()
    exported = is_file and path.suffix == EXPORTED
    tensors, about = weights.read(path) if exported else ({}, {})
    if config is None or isinstance(config, str | Path):
        config = _config(path, config, is_file, about.get("config"))
    parts = build.build(config)
    if is_file:
        like = jax.eval_shape(lambda: training_run.initial_state(config, parts))
    if exported:
        params = weights.to_params(tensors, like.params)
        known = about.get("step", "")[:18]  # more digits are no step
        step, trained_on = int(known) if known.isdecimal() else 0, about.get("data")
        if checkpoint.digest(params) != about.get("weights", checkpoint.digest(params)):
            raise checkpoint.CorruptError(f"{path}: damaged; export it again")
    elif is_file:  # which has its own marks
        state, step = store.unpack(path, like, parts)
        params, trained_on = training.sampled_weights(state, config), None
    else:
        if not any(checkpoint.steps(path / name) for name in unfinished.KEPT):
            raise checkpoint.ConflictError(
                f"{path} has no weights yet: give the command of its run first"
            )
        # Nothing is moved aside: the run may be at work.
        params, step = unfinished.newest(config, parts, path, aside=False)
        trained_on = (record.read_json(path / "run.json") or {}).get("fingerprint")
    if trained_on and trained_on != parts.splits.fingerprint:
        raise checkpoint.ConflictError(
            f"{path} was trained on data of fingerprint {trained_on[:12]}, and its "
            f"config now gives others ({parts.splits.fingerprint[:12]}): bring the "
            "former back"
        )
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params)):
        raise train.NonFiniteError(f"{path}: some weights are not finite")
    return Run(None if is_file else path, config, parts, params, step, {})


def _key(key):
    """The key of samples.   Raises: build.ConfigError: no key, and no seed."""
    if key is None or (
        isinstance(key, jax.Array)
        and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        and key.shape == ()
    ):
        return key
    seed = _integer("key, as a seed,", key, 0)
    if seed >= 2**32:
        raise build.ConfigError(f"seed={seed} must be below 2**32: others repeat these")
    return build.keys(seed).sample  # as a run of this seed draws its own


def _integer(name, value, least):
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least or isinstance(value, bool):
        raise build.ConfigError(
            f"{name}={value!r} must be one integer, at least {least}"
        )
    return number


def _number(name, value):
    try:
        return float(value)
    except (TypeError, ValueError):
        raise build.ConfigError(f"{name}={value!r} must be a number") from None


def write(folder: Path, samples) -> None:
    """Writes samples.npz, grid.png of the first and, of images, images/*.png."""
    record.write_npz(folder / "samples.npz", samples=samples)
    figures.save_samples(folder / "grid.png", samples[:IN_GRID])
    if samples.dtype == np.uint8 and samples.shape[-1] in (1, 3):
        for i, image in enumerate(samples):
            figures.save_image(folder / "images" / f"{i:06}.png", image)


def _config(path, config, is_file, inside):
    """The config of a run.   Args: inside, as an exported file has it, or None."""
    file = Path(config).expanduser() if config else path / "config.json"
    if is_file and not config:
        file = path
        if inside is None:
            raise checkpoint.ConflictError(
                f"{path} holds weights without their config: give the config.json of "
                "its run as config=..., or --config=..."
            )
        known, there = _object(inside), True
    else:
        there = file.is_file()
        known = _object(file.read_text(errors="replace")) if there else None
    what = f"experiment={known.get('experiment')}" if known else "no such file"
    if there and known is None:
        what = "damaged, no JSON of a config: restore it"
    if known is None or known.get("experiment") != "train":
        raise checkpoint.ConflictError(
            f"{path} is no run of one network ({file}: {what}): give the workdir of "
            "a run of experiment=train"
        )
    try:
        return defaults.restored(known)
    except (KeyError, TypeError, AttributeError) as error:
        raise checkpoint.ConflictError(
            f"{file} does not fit this version of memsep_jax ({error}): give one as a "
            "run of this version writes it"
        ) from error


def _object(text):
    """The object of a JSON text, or None where it is none."""
    try:
        known = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return known if isinstance(known, dict) else None
