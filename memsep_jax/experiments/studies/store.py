"""The states of a training on disk: restored, rolled back, saved, packed."""

import time
from pathlib import Path

import numpy as np

from memsep_jax import checkpoint, parallel


class Store:
    """checkpoints/ of a training, and the file of run.pack.

    Where several processes train, all call every method, and the first one writes.
    """

    def __init__(self, config, parts, session, workdir, own: bool):
        """Args: own, whether the workdir is the session's, and not one of networks."""
        self.parts, self.session, self.workdir = parts, session, workdir
        self._keep, self._checkpoints = config.run.keep, workdir / "checkpoints"
        self._packed = None if config.run.pack is None else Path(config.run.pack)
        if self._packed and not own:
            self._packed = self._packed.with_name(f"{workdir.name}-{self._packed.name}")

    def restore(self, like, resume_step: int | None):
        """The newest valid state, or the packed one, and its step; (like, 0) without.

        Args: like, the state of step 0.   resume_step, the newest step to go on from.
        Raises: ConflictError, CorruptError.
        """
        restored, first = None, parallel.is_first()
        if first:
            checkpoint.clean(self._checkpoints)
            self._check(resume_step)
            restored = checkpoint.restore_newest(
                self._checkpoints, like, at_most=resume_step
            )
            if restored is None and self._packed and self._packed.is_file():
                restored = unpack(self._packed, like, self.parts)
        # The others restore what the first one did, which may have passed over damage.
        # 0 stands for nothing restored, as `share` takes no negative number.
        step = self.session.share(restored[1] + 1 if restored else 0) - 1
        if step >= 0 and not first:
            if step in checkpoint.steps(self._checkpoints):
                restored = checkpoint.restore(self._checkpoints, step, like), step
            else:
                restored = unpack(self._packed, like, self.parts)
        return restored or (like, 0)

    def _check(self, resume_step):
        steps = checkpoint.steps(self._checkpoints)
        if resume_step is not None and resume_step not in steps:
            raise checkpoint.ConflictError(
                f"--resume_step={resume_step} is not among the checkpoints in "
                f"{self._checkpoints}: {steps}"
            )

    def roll_back(self, step: int | None):
        """Moves all that is newer than a step aside."""
        if step is None or not parallel.is_first():
            return
        aside = f"abandoned-{time.strftime('%Y%m%dT%H%M%S')}"
        # best/ keeps one step: a newer one would outlive every one saved after it.
        for directory in (self._checkpoints, self.workdir / "best"):
            for newer in [s for s in checkpoint.steps(directory) if s > step]:
                moved = checkpoint.set_aside(directory, newer, aside)
                self.session.say(f"step {newer} is newer than {step}: moved to {moved}")

    def save(self, step: int, state):
        """Saves a state.   Raises: StorageError."""
        whole = parallel.local(state)  # by all processes: a split state is gathered
        if parallel.is_first():
            checkpoint.save(self._checkpoints, step, whole, self._keep)
            if self._packed:
                pack(self._packed, step, whole, self.parts)


def pack(path, step, state, parts):
    """Writes a state, and the mark of its data, as one file that can be moved."""
    checkpoint.pack(path, step, {"state": state, "data": _mark(parts)})


def unpack(path, like, parts):
    """The (state, step) of `pack`.   Raises: ConflictError: trained on other data."""
    tree, step = checkpoint.unpack(path, {"state": like, "data": _mark(parts)})
    if not np.array_equal(tree["data"], _mark(parts)):
        raise checkpoint.ConflictError(
            f"{path} was trained on other data (fingerprint "
            f"{bytes(tree['data']).hex()[:12]}, here "
            f"{parts.splits.fingerprint[:12]}): give the same --config.data as there"
        )
    return tree["state"], step


def _mark(parts):
    return np.frombuffer(bytes.fromhex(parts.splits.fingerprint), np.uint8)
