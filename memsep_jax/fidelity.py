"""Quality of samples, from feature arrays."""

import numpy as np
from absl import logging

SMALL = 10_000  # below so many samples a Frechet distance is biased visibly


def frechet(a, b) -> float:
    """|m_a - m_b|^2 + Tr(S_a + S_b - 2 (S_a S_b)^(1/2)), in float64.

    An FID only on Inception features; name it after its features, reference and
    sample sizes.

    Args: a [n, k], b [m, k] features.
    Raises: ValueError: fewer than two samples, other shapes, values not finite.
    Source: Heusel 2017.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(
            f"frechet takes features [n, k] and [m, k], not {a.shape} and {b.shape}"
        )
    if min(len(a), len(b)) < 2:
        raise ValueError(
            f"frechet of {len(a)} against {len(b)} samples: a covariance needs two"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("frechet: features hold NaN or infinite values")
    if min(len(a), len(b)) < SMALL:
        logging.warning(
            "frechet distance of %d against %d samples: below %d it is biased upwards",
            len(a),
            len(b),
            SMALL,
        )
    gap = a.mean(axis=0) - b.mean(axis=0)
    # Tr (S_a S_b)^(1/2) is the nuclear norm of X Y', X'X = S_a and Y'Y = S_b: no
    # square root of a matrix that rounding made complex, and never more than the rest.
    x, y = _factor(a), _factor(b)
    cross = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    return float(max(0.0, gap @ gap + np.sum(x**2) + np.sum(y**2) - 2 * cross))


def _factor(a):
    """[r, k] with factor' factor = the covariance of a; r at most k."""
    centred = (a - a.mean(axis=0)) / np.sqrt(len(a) - 1)
    if len(a) <= a.shape[1]:
        return centred
    values, vectors = np.linalg.eigh(centred.T @ centred)
    return np.sqrt(np.maximum(values, 0))[:, None] * vectors.T
