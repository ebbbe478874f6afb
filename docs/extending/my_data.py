"""A data set: rings of random centre and radius."""

import numpy as np

from memsep_jax.sources import Source


def rings(size: int = 2_000, side: int = 8) -> Source:
    """`size` grey images of side x side pixels; the label says whether a ring is large.

    The package chooses the subset, the held-out images and the labels of a run from
    these: always return the same images in the same order.
    """
    generator = np.random.default_rng(0)
    centre = generator.uniform(0.3 * side, 0.7 * side, (size, 2, 1, 1))
    radius = generator.uniform(0.15 * side, 0.45 * side, (size, 1, 1))
    rows, columns = np.mgrid[:side, :side]
    distance = np.hypot(rows - centre[:, 0], columns - centre[:, 1])
    bright = np.exp(-((distance - radius) ** 2))
    images = np.round(255 * bright[..., None]).astype(np.uint8)  # [size, side, side, 1]
    return Source(images, labels=(radius[:, 0, 0] > 0.3 * side).astype(np.int32))
