"""The rows of metrics.jsonl in TensorBoard or Weights & Biases too, on request.

A row for a tracker may hold words, such as the verdict, and the path of a picture.
"""

import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image


def none(workdir, config):
    """metrics.jsonl only."""
    return lambda row: None


def tensorboard(workdir, config):
    """Event files in workdir/tensorboard, by tensorboardX (extra `tb`)."""
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(str(workdir / "tensorboard"))

    def track(row):
        step = row["step"]
        for name, value in _flat(row):
            writer.add_scalar(name, value, step)
        for name, words in _of_type(row, str):
            writer.add_text(name, words, step)
        for name, path in _of_type(row, Path):
            with Image.open(path) as picture:
                pixels = np.asarray(picture.convert("RGB"))
            writer.add_image(name, pixels, step, dataformats="HWC")
        writer.flush()

    return track


def wandb(workdir, config):
    """A run in Weights & Biases (extra `wandb`); offline where nobody is logged in.

    The project is that of the environment, WANDB_PROJECT, as wandb reads it.
    """
    import wandb

    mode = os.environ.get("WANDB_MODE")
    if not mode:
        # Without a key wandb would ask for one, and a job would wait for ever.
        try:
            known = wandb.login(prompt=False, verify=False)
        except TypeError:  # of an older version
            known = wandb.api.api_key
        mode = "online" if known else "offline"
    run = wandb.init(
        dir=str(workdir),
        name=workdir.name,
        config=config.to_dict(),
        mode=mode,
        resume="allow",
        settings={
            "init_timeout": 30.0,  # seconds, for a server that does not answer
            "silent": not sys.stdout.isatty(),  # wandb would colour log files too
            "console": "off",  # the output of a run is not sent to the server
        },
    )

    def track(row):
        pictures = {k: wandb.Image(str(path)) for k, path in _of_type(row, Path)}
        run.log(dict(_flat(row)) | pictures, step=row["step"])
        run.summary.update(dict(_of_type(row, str)))

    return track


TRACKERS = {"none": none, "tensorboard": tensorboard, "wandb": wandb}


def tracker(name, workdir, config, say):
    """(row) -> None. A tracker that fails gets one warning, and no more rows."""
    track = None

    def fail(error):
        cure = ""
        if isinstance(error, ImportError):
            extra = {"tensorboard": "tb"}.get(name, name)
            cure = f"; it needs pip install 'memsep_jax[{extra}]'"
        why = " ".join(str(error).split())  # in one line
        say(f"warning: {name} is not written ({why}), metrics.jsonl is{cure}")

    try:
        track = TRACKERS[name](workdir, config)
    except Exception as error:  # a tracker never ends a run
        fail(error)

    def safely(row):
        nonlocal track
        if track is None:
            return
        try:
            track(row)
        except Exception as error:
            track = None
            fail(error)

    return safely


def _flat(row):
    """Scalars by name, with the mean of a list of losses."""
    for name, value in row.items():
        if isinstance(value, (int, float)) and name != "step":
            yield name, value
        elif name.endswith("_losses"):
            yield name.removesuffix("es") + "_mean", float(np.mean(value))


def _of_type(row, kind):
    return [(name, value) for name, value in row.items() if isinstance(value, kind)]
