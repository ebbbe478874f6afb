"""Whether two models turn one noise into one sample."""

from typing import NamedTuple

import numpy as np

from memsep_jax.fidelity import UndefinedError
from memsep_jax.memorization.ratio import RATIO, copied, wilson
from memsep_jax.neighbours import distinct, searcher
from memsep_jax.shapes import Arr, Float


class Reproducibility(NamedTuple):
    """Whether samples that two models make from the same noises are the same."""

    cosine: np.ndarray  # [m] similarity within each pair
    cosine_null: np.ndarray  # [m] within mismatched pairs
    close: np.ndarray  # [m] bool
    share: float  # of close pairs
    interval: tuple[float, float]  # Wilson, 95 %
    null: float  # the share among mismatched pairs
    null_interval: tuple[float, float]


def reproducibility(a, b, threshold: float = RATIO) -> Reproducibility:
    """How alike twin samples are: by angle, and by the criterion of memorization.

    A pair is close when b_i is the nearest of all b to a_i, at less than a third of the
    distance to the nearest other *distinct* one: a_i is a copy of b_i. Cosines are
    about the mean of both sets. The null level is that of mismatched pairs, where b is
    moved on by one.

    Args: a, b [m, *e], where a_i and b_i come from the same noise.
    Least: two distinct b, d = 1.
    Odd: a = b is close everywhere, with a cosine of 1, or 0 for a point at the mean;
      repeats of b match each other's pairs; if all a are equal, they are far.
    Raises: UndefinedError: fewer than two distinct b. ValueError: shapes that differ.
    Source: Kadkhodaie 2024 (arXiv 2310.02557), section 2, for the cosine.
    """
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    if a.shape != b.shape or len(distinct(b)) < 2:
        kind = ValueError if a.shape != b.shape else UndefinedError
        raise kind(
            f"twin samples of shapes {a.shape} and {b.shape}, {len(distinct(b))} of "
            "the latter distinct: give equally many pairs, at least two different"
        )
    # Once for both: whether a_i is a copy of something does not depend on the pairing.
    neighbours = searcher(b)(a)
    near = copied(neighbours, threshold)
    centre, moved = (a.mean(axis=0) + b.mean(axis=0)) / 2, np.roll(b, 1, axis=0)
    nearest, axes = b[neighbours.indices[:, 0]], tuple(range(1, b.ndim))
    # Compared by value, not by index: b may hold a point twice.
    close, null = (near & np.all(nearest == c, axis=axes) for c in (b, moved))
    return Reproducibility(
        cosine(a, b, centre),
        cosine(a, moved, centre),
        close,
        float(close.mean()),
        wilson(int(close.sum()), len(close)),
        float(null.mean()),
        wilson(int(null.sum()), len(null)),
    )


def cosine(a, b, centre) -> Float[Arr, " m"]:
    """The cosine of the angle between a_i and b_i about a centre; 0 at the centre.

    Args: a, b [m, *e], centre [*e].
    Least: m = 0, d = 1.   Odd: at the centre itself, 0; in one dimension, 1 or -1.
    """
    a, b = (
        (np.asarray(c, np.float64) - centre[None]).reshape(len(c), np.size(centre))
        for c in (a, b)
    )
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    products = np.sum(a * b, axis=1)
    return np.divide(products, norms, out=np.zeros_like(norms), where=norms > 0)
