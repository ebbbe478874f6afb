"""A run that was trained, as an object: its score, its denoiser, new samples."""

import copy
import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memsep_jax import checkpoint, defaults, parallel, score, weights
from memsep_jax.experiments import audited, record, studies, training
from memsep_jax.experiments.config import build
from memsep_jax.experiments.reporting import figures
from memsep_jax.experiments.studies import evaluate, store, training_run, unfinished

IN_GRID = 64  # samples in the grid of `write`, at most


class Run(NamedTuple):
    """The network of a run and what its config describes; made by `load`."""

    workdir: Path
    config: Any  # a ConfigDict
    parts: build.Parts  # process, prediction, data (`splits`), sampling times, ...
    params: Any  # the weights that are sampled: by sampler.weights, EMA or raw
    step: int  # of the weights

    def score_fn(self, x, t, label=None):
        """The learned score.   x [*e], t [], label [] or None -> [*e]."""
        return training.score_fn(self.parts, self.params, label)(x, t)

    def denoiser(self, x, t, label=None):
        """E[X_0 | X_t = x] as learned (Tweedie).   x [*e], t [] -> [*e]."""
        score_fn = training.score_fn(self.parts, self.params, label)
        return score.to_denoiser(score_fn, self.parts.process)(x, t)

    def sample(self, key=None, n: int = 16, label=None, guidance=None, steps=None):
        """Samples as the run draws its own, by the sampler of its config.

        Sample i depends on the key and on i, and on n by rounding only: fewer samples
        than run.chunk are drawn by a smaller program.

        Args:
          key: None is that of the run: the first n of its own samples come again.
          label: of all samples; None draws labels as they are in the training set.
          guidance: the weight of `score.guided`; 1 is no guidance, None that of
            sampler.guidance. Needs train.label_drop.
          steps: of the sampler; None is sampler.steps.
        Returns:
          numpy [n, *e]: uint8 pixels, or vectors as they are.
        Raises:
          build.ConfigError, a ValueError: n below 1, steps that the sampler cannot
            take, a label or guidance that the network does not know.
        """
        config, parts = self.config, self.parts
        if n < 1:
            raise build.ConfigError(f"n={n} samples: give at least 1")
        labels = None if label is None else self._only(label)
        given = {"guidance": guidance, "steps": steps}
        if given := {k: v for k, v in given.items() if v is not None}:
            config = copy.deepcopy(config)
            config.sampler.update(given)
            parts = build.build(config)  # checks them, too
        draw = evaluate.make_generate(
            config,
            parts,
            parallel.make_mesh(jax.local_devices()),
            functools.partial(training.sampled_score, config, parts),
            key=key,
            labels=labels,
        )
        chunk = config.run.chunk
        starts = range(0, n, chunk)
        return np.concatenate([draw(self.params, i, min(i + chunk, n)) for i in starts])

    def audit(self, held_out=None, workdir=None, **settings) -> audited.Audit:
        """Audits the run's own samples, as `memsep_jax.audit` does.

        Args: held_out, images; None takes the run's own, where it has some.   workdir,
          by default audit/ in that of the run.   settings, as there.
        """
        if held_out is None and self.parts.splits.held_out is not None:
            held_out = self.workdir
        workdir = workdir or self.workdir / "audit"
        own = self.workdir
        return audited.audit(own, own, held_out, workdir=workdir, **settings)

    def report(self) -> Path:
        """Draws report.html again.   Returns: its path."""
        config = copy.deepcopy(self.config)
        config.experiment = "report"
        studies.run(config, self.workdir)
        return self.workdir / "report.html"

    def export(self, path) -> None:
        """Writes weights and config as one safetensors file, which `load` reads.

        Raises: checkpoint.StorageError; an existing file stays as it was.
        """
        about = {
            "config": json.dumps(build.to_json(self.config)),
            "step": str(self.step),
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
    path = Path(path).expanduser()
    is_file, inside, tensors = path.is_file(), None, None
    step, folder = 0, path.parent if is_file else path
    if is_file and path.suffix == ".safetensors":
        tensors, about = weights.read(path)
        inside, known = about.get("config"), about.get("step", "")
        step = int(known) if known.isdecimal() else 0
    if config is None or isinstance(config, str | Path):
        config = _config(path, config, is_file, inside)
    parts = build.build(config)
    if is_file:
        like = jax.eval_shape(lambda: training_run.initial_state(config, parts))
        if tensors is not None:
            params = weights.to_params(tensors, like.params)
        else:
            state, step = store.unpack(path, like, parts)
            params = training.sampled_weights(state, config)
    else:
        if not any(checkpoint.steps(path / name) for name in unfinished.KEPT):
            raise checkpoint.ConflictError(
                f"{path} has no weights yet: give the command of its run first"
            )
        params, step = unfinished.newest(config, parts, path)
    return Run(folder, config, parts, params, step)


def sample_key(seed: int):
    """The key of the samples of a run of this seed: sample i depends on both."""
    return build.keys(seed).sample


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
                f"{path} holds weights without their config: give it beside them, "
                "load(path, config='.../config.json')"
            )
        try:
            known = json.loads(inside)
        except ValueError as error:
            raise checkpoint.ConflictError(
                f"{path}: the config in its metadata is no JSON ({error})"
            ) from error
    else:
        known = record.read_json(file)
    if known is None or known.get("experiment") != "train":
        what = (
            "no such file"
            if known is None
            else (f"experiment={known.get('experiment')}")
        )
        raise checkpoint.ConflictError(
            f"{path} is no run of one network ({file}: {what}): give the workdir of "
            "a run of experiment=train"
        )
    try:
        return defaults.restored(known)
    except (KeyError, TypeError, AttributeError) as error:
        raise checkpoint.ConflictError(
            f"{file} is of another version of memsep_jax: {error}"
        ) from error
