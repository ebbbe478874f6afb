"""What a study is, and the one way in which every study of a sweep runs."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

from memsep_jax.experiments.config import build, grid
from memsep_jax.experiments.runtime import points
from memsep_jax.experiments.studies import results


@dataclasses.dataclass(frozen=True)
class Study:
    """A question of research: what must hold, what to measure, and what to draw.

    A study either measures every point of config.sweep, and then needs `measure` and
    `draw`, or is one piece of work, `run`. Called with (config, session), it leaves its
    answer in the workdir of the session.
    """

    # (points, session) -> for each point a dict of numbers and arrays, or the error
    # that it alone failed with.
    measure: Callable[..., Iterable] | None = None
    # (metrics, points) -> (name, caption, figure) of each picture, drawn from what
    # metrics.json and the files of the points hold; `report` draws it again.
    draw: Callable[[dict, list[dict]], Iterable[tuple]] | None = None
    # config -> build.Parts of the first point. Raises ConfigError before anything is
    # compiled or written.
    check: Callable[[Any], build.Parts] = grid.check
    # (config, parts, session) -> further arguments of `measure`: what all points share,
    # such as a compiled program. Runs before anything is written.
    share: Callable[..., dict] = lambda config, parts, session: {}
    # (config, rows, parts, session) -> what metrics.json says about all points.
    conclude: Callable[..., dict] = lambda config, rows, parts, session: {}
    # The columns of the table that is shown; None: every number of the rows.
    columns: tuple[str, ...] | None = None
    # point -> a key: points of equal keys are measured together.
    alike: Callable[[grid.Point], Any] = lambda point: point.name
    what: str = "points"  # the word for the points in the progress line
    # (config, session) -> None, instead of all the above but `draw`.
    run: Callable[..., None] | None = None
    joint: bool = False  # whether several processes may do `run` together

    def __post_init__(self):
        if (self.measure is None) == (self.run is None):
            raise TypeError("a Study takes either `measure` or `run`")

    @property
    def shared(self) -> bool:
        """Whether several processes may take points of one workdir."""
        return self.joint or self.measure is not None

    def __call__(self, config, session) -> None:
        """Answers the question; finished points are read and not measured again."""
        if self.measure is None:
            assert self.run is not None
            self.run(config, session)
            return
        with session.phase("data"):
            parts = self.check(config)
            shared = self.share(config, parts, session)
        # Not before: what is refused above leaves nothing on disk.
        session.begin(parts.splits.fingerprint, parts.splits)
        work = functools.partial(self.measure, session=session, **shared)
        rows = points.run(config, session, work, self.alike, self.what)
        session.lead()  # one process alone writes the files of all points
        about = self.conclude(config, rows, parts, session)
        draw = self.draw or (lambda metrics, points: ())
        results.finish(config, session, rows, draw, columns=self.columns, **about)


def of(experiment) -> Study:
    """The Study of an experiment, which may also be a function of (config, session).

    Raises: ConfigError where it is neither.
    """
    if isinstance(experiment, Study):
        return experiment
    if not callable(experiment):
        raise build.ConfigError(
            f"experiment={experiment!r} must be a Study or a function of (config, "
            "session)"
        )
    return Study(run=experiment)
