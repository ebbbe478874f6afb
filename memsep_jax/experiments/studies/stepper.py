"""Steps of training, compiled, and taken as many at once as the device makes fast."""

import time

import jax
import numpy as np

from memsep_jax import checkpoint, data, parallel, train
from memsep_jax.experiments import record, training
from memsep_jax.experiments.config import build
from memsep_jax.experiments.studies.monitor import Calendar

CALL = 0.1  # seconds of steps that one call takes, ...
MOST = 256  # and the most steps in it


class Stepper:
    """Takes the steps between two events of a training, and logs them."""

    def __init__(self, config, parts, session, log, take, most: int):
        """Args: take, most as `compiled` gives them."""
        self.config, self.parts, self.session, self.log = config, parts, session, log
        self.take, self.most, self.calendar = take, most, Calendar.of(config, parts)
        self._rate, self._since = 0.0, (0.0, 0)
        self._learning_rate = training.learning_rate(config, len(parts.splits.train.x))

    def advance(self, state, step: int, update):
        """Takes steps up to the next at which a state is needed, or to a signal.

        Args: update, (step, text) -> None, of `Session.progress`.
        Returns: the state, its step, and the row to log of it, {} where there is none.
        Raises: NonFiniteError.
        """
        # Steps per second count steps, and no evaluation in between.
        self._since, late = (time.monotonic(), step), None
        while True:
            left = self.calendar.next(step) - step
            count = max(1, min(int(self._rate * CALL), self.most, left))
            state, fetched = self.take(state, step, count)
            step += count
            self.session.poll()
            # One call late, so that the device always has the next one waiting.
            if late is not None and (row := self._row(state, *late)):
                self.log.write(row)
                update(row["step"], status(row))
            late = step, fetched
            needed = self.calendar.measures(step) or self.calendar.saves(step)
            if needed or self.session.stop is not None:
                return state, step, self._row(state, step, fetched)

    def _row(self, state, step, fetched):
        """Waits for a step; the row to log, or {} where it is not logged."""
        if (stands := int(fetched["step"])) != step:
            self._refused(state, stands, fetched)
        if not self.calendar.logs(step):
            return {}
        now = time.monotonic()
        self._rate = (step - self._since[1]) / max(now - self._since[0], 1e-9)
        self._since = (now, step)
        names = ("loss", "grad_norm", "update_norm")
        row = {"step": step, **{name: float(fetched[name]) for name in names}}
        if "skipped" in fetched:
            row["skipped"] = int(fetched["skipped"])
        if self._learning_rate is not None:  # a step that is skipped does not count
            taken = step - row.get("skipped", 0)
            row["learning_rate"] = float(self._learning_rate(max(taken - 1, 0)))
        return row | {"steps_per_second": round(self._rate, 3)}

    def _refused(self, state, step, fetched):
        """Raises NonFiniteError for the step after `step`, and writes why."""
        state = parallel.local(state)
        self.session.part()
        path = self.log.workdir / f"nonfinite_step_{step + 1}.json"
        norms = {k: float(fetched[k]) for k in ("loss", "grad_norm", "update_norm")}
        details = {
            "step": step + 1,
            **{name: str(value) for name, value in norms.items()},
            **diagnosis(self.config, self.parts, state, step),
        }
        if parallel.is_first():
            record.write_json(path, details)
        loss, grad_norm, update_norm = (f"{value:.4g}" for value in norms.values())
        raise train.NonFiniteError(
            f"step {step + 1} gave loss {loss}, gradient norm {grad_norm}, update norm "
            f"{update_norm}: not applied, nothing of it saved. Details: {path}. Lower "
            "optimizer.lr, set optimizer.clip, or look at the data"
        )


def status(row: dict) -> str:
    """A row of the log in words; nothing of an empty one."""
    if not row:
        return ""
    return f"loss {row['loss']:.4f}  {row['steps_per_second']:.1f} steps/s"


def diagnosis(config, parts, state, step: int) -> dict:
    """Where the gradients of the step after `step` are not finite, and on what data."""
    keys = build.keys(config.seed)
    points, size = parts.splits.train, config.train.batch_size
    rows = training.order(config, len(points.x))(step)
    batch = data.read(jax.tree.map(lambda a: a[rows], points))
    batch = data.augment(batch, keys.data, step, config.train.flip)
    example_keys = train.example_keys(keys.train, step, size)
    loss = training.loss(parts, config)
    grads = jax.jit(jax.vmap(jax.grad(loss), (None, 0, 0)))(
        state.params, batch, example_keys
    )
    t = jax.vmap(lambda key: training.noise_of(parts, batch.x[0], key)[0])(example_keys)
    sigma = jax.vmap(parts.process.sigma)(t)
    counts = {
        name: int((~np.isfinite(leaf)).sum())
        for name, leaf in checkpoint.leaves(grads).items()
    }
    return {
        "nonfinite_gradients": {name: n for name, n in counts.items() if n},
        "sigma": [float(sigma.min()), float(sigma.max())],
        "indices": rows,
    }


def compiled(config, parts, mesh, state, start=0):
    """The train step, compiled, and the state of step `start` on its devices.

    Returns: the state; take, (state, step, count) -> (state, metrics of the last step);
      the most steps that one call may take.
    """
    everywhere = parallel.replicated(mesh)
    places = parallel.sharded(state, mesh) if config.run.shard else everywhere
    state = parallel.place(state, places)
    most, feed = _feeder(config, parts, mesh, state)
    steps = jax.jit(
        training.make_steps(config, parts, mesh),
        donate_argnums=0,
        out_shardings=(places, everywhere),
    )
    if not jax.config.jax_disable_jit:  # a person sets it to see inside each step
        steps = steps.lower(state, *feed(start, 1), start, 1).compile()

    def take(state, step, count):
        return steps(state, *feed(step, count), step, count)

    return state, take, most


def _feeder(config, parts, mesh, state):
    """The most steps of one call, and (step, count) -> its dataset and rows."""
    points = parts.splits.train
    rows_of = training.order(config, len(points.x))
    if isinstance(points.x, data.Rows):
        batch = data.stream(points, rows_of, parallel.by_batch(mesh))
        return 1, lambda step, count: (batch(step), None)
    points = parallel.place(points, parallel.replicated(mesh))
    # Several processes must take equally many, whatever time each of them sees.
    most = MOST if jax.process_count() == 1 and train.may_loop(state.params) else 1

    def feed(step, count):
        rows = np.zeros((most, config.train.batch_size), np.int32)
        rows[:count] = [rows_of(step + i) for i in range(count)]
        return points, rows

    return most, feed
