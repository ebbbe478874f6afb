"""A study: how far is a new image from the training set, as the set grows?"""

import numpy as np

from memsep_jax import neighbours
from memsep_jax.experiments.config import build
from memsep_jax.experiments.reporting import figures
from memsep_jax.experiments.studies.study import Study


def measure(points, session):
    """Yields, for each point of config.sweep, its numbers."""
    for point in points:
        splits = build.build(point.config).splits
        nearest = neighbours.searcher(splits.train.x)(splits.held_out.x)
        yield {"distance": np.median(nearest.distances[:, 0])}


def draw(metrics, points):
    """Yields (name, caption, figure); the table has means over the seeds."""
    rows = metrics["table"]
    mean, low, high = (
        np.array([row["distance"][key] for row in rows], float)
        for key in ("mean", "low", "high")
    )
    line = figures.Line([row["num_examples"] for row in rows], mean, None, low, high)
    panel = figures.Panel("", [line], "n", "distance to the nearest training image")
    yield "distance", "Median over the held-out images.", figures.curves([panel])


study = Study(measure=measure, draw=draw, columns=("num_examples", "distance", "seeds"))
