"""Which samples are copies, told from the score alone, without the training set.

Where a network has memorized a point, its density at small times is a peak: in all
directions the Hessian of log p_t is close to -1/sigma^2, and the point has no dimension
around it. Each detector is a number of a clean point x0, read off a score at
alpha(t) x0, without noise. How well it tells copies from other samples is its AUC.

Of Jeon 2025 (arXiv 2412.04140) and Wen 2024 (ICLR) only the abstracts were at hand, and
of the first also the authors' program. Both follow the noisy trajectory of a sample,
where here the sample itself is looked at, which needs nothing but the image.
"""

import inspect
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memsep_jax import lipschitz, sampling
from memsep_jax.checks import check_on_host, is_known
from memsep_jax.memorization import membership
from memsep_jax.process import Process, check_time
from memsep_jax.roots import length
from memsep_jax.score import ScoreFn
from memsep_jax.shapes import Arr, Float, Keys, Point, Scalar

BATCH = 64  # points at a time
# 1 where the papers say that copies have the larger values, -1 where the smaller.
SIGNS = {
    "sharpness": 1, "flattest": 1, "trace": 1, "flipd": -1, "gap": 1, "gap_product": 1,
}  # fmt: skip


class Evidence(NamedTuple):
    """What each detector says of one point at one time, or arrays of many."""

    sharpness: jax.Array
    flattest: jax.Array
    trace: jax.Array
    flipd: jax.Array
    gap: jax.Array | None  # None where there is no score without a label
    gap_product: jax.Array | None


# Detectors of one point, or of its place x = alpha x0.


def sharpness(
    score_fn: ScoreFn, x: Point, t: Scalar, key: Keys, iters: int = 50
) -> Scalar:
    """The largest eigenvalue of minus the Hessian of log p_t, from below.

    Large, says the paper, where the point is memorized. At small t it is about
    1/sigma^2 on any thin set, memorized or not, and so tells points apart only where
    t is large enough to see how thin the set is.

    Args: iters, as `lipschitz.eigenvalues`.
    Source: Jeon 2025 (arXiv 2412.04140), the sharpness.
    """
    return -lipschitz.eigenvalues(score_fn, x, t, key, iters)[0]


def flattest(
    score_fn: ScoreFn, x: Point, t: Scalar, key: Keys, iters: int = 50
) -> Scalar:
    """The smallest eigenvalue of minus the Hessian of log p_t, from above.

    Minus the largest eigenvalue of the Hessian: how sharp the density is in the
    direction in which it is least so. That is 1/sigma^2 at a point that stands alone,
    about 0 along a set of some dimension, and below 0 between two points, where Ye 2025
    (section 5) finds the norm of the Jacobian to explode.

    Args: iters, as `lipschitz.eigenvalues`.
    Source: Jeon 2025 (arXiv 2412.04140): memorized points have the fewest directions in
      which the density is not sharp.
    """
    return -lipschitz.eigenvalues(score_fn, x, t, key, iters)[-1]


def trace(
    score_fn: ScoreFn, x: Point, t: Scalar, key: Keys | None = None, probes: int = 0
) -> Scalar:
    """The trace of minus the Hessian of log p_t: the sum of all its sharpnesses.

    d / sigma^2 where nothing but one point is near. Its mean over p_t is that of
    |score|^2.

    Args: probes, random signs (Hutchinson), which need the key; 0 for the exact trace.
    Source: Jeon 2025 (arXiv 2412.04140).
    """
    along = sampling.directions(x, probes, key)
    return -sampling.divergence(lambda x: score_fn(x, t), x, along)[1]


def flipd(score_fn: ScoreFn, process: Process, probes: int = 0):
    """FLIPD: how many dimensions the data have around a point.

    d + sigma^2 (tr J + |s|^2) of s at alpha x0, the derivative of log p of X_t / alpha
    at x0 by log(sigma / alpha), plus d: noise washes a point of a k-dimensional set out
    like sigma^(k - d). A copy has dimension 0 (Ross 2025).

    Args: probes, as in `trace`.
    Returns: (x0 [*e], t [], key) -> []; only probes need the key.
    Source: Kamkari 2024 (arXiv 2406.03537), as the authors' program has it for a VP
      process; Ross 2025 (arXiv 2411.00113), of which only the abstract was at hand.
    """

    def of(x0, t, key=None):
        x = process.alpha(t) * x0
        along = sampling.directions(x, probes, key)
        both = sampling.divergence(lambda x: score_fn(x, t), x, along)
        return _dimension(process, t, *both)

    return of


def _dimension(process, t, value, slope):
    """FLIPD, from the score and the trace of its Jacobian."""
    return value.size + process.sigma(t) ** 2 * (slope + jnp.sum(value**2))


def guidance_gap(conditional: ScoreFn, unconditional: ScoreFn):
    """|s(x, t | c) - s(x, t)|: how strongly the label pulls.   (x [*e], t []) -> [].

    Large where the label alone names a training point.

    Source: Wen 2024 (ICLR), a mean over the steps of the sampler; here at one t.
    """
    return lambda x, t: length(conditional(x, t) - unconditional(x, t))


def guidance_product(conditional: ScoreFn, unconditional: ScoreFn):
    """|(J_c - J) (s_c - s)|, the gap as the sharpness sees it.   (x, t) -> [].

    The difference of the scores with and without a label, c, multiplied by that of
    their Jacobians: a gap in sharp directions counts for more.

    Source: Jeon 2025 (arXiv 2412.04140), as the authors' program has it.
    """

    def of(x, t):
        def difference(x):
            return conditional(x, t) - unconditional(x, t)

        value, push = jax.linearize(difference, x)
        return length(push(value))

    return of


def evidence(
    score_fn: ScoreFn,
    process: Process,
    x0: Point,
    t: Scalar,
    key: Keys,
    iters: int = 50,
    probes: int = 0,
    *,
    unconditional: ScoreFn | None = None,
) -> Evidence:
    """All detectors of one clean point, at alpha(t) x0.

    Args: iters, of `lipschitz.eigenvalues`; probes, of `trace`; unconditional, the
      score without the label that score_fn is of, for the gaps.
    """
    x = process.alpha(t) * x0
    eigen_key, probe_key = jax.random.split(key)
    along = sampling.directions(x, probes, probe_key)
    value, slope = sampling.divergence(lambda x: score_fn(x, t), x, along)
    eigenvalues = lipschitz.eigenvalues(score_fn, x, t, eigen_key, iters)
    gaps = None, None
    if unconditional is not None:
        made = guidance_gap, guidance_product
        gaps = tuple(make(score_fn, unconditional)(x, t) for make in made)
    return Evidence(
        -eigenvalues[0],
        -eigenvalues[-1],
        -slope,
        _dimension(process, t, value, slope),
        *gaps,
    )


# Of copies and other samples.


def curve(
    score_fn,
    process: Process,
    samples,
    copied,
    times,
    key: Keys,
    iters: int = 50,
    probes: int = 0,
    *,
    labels=None,
    unconditional: ScoreFn | None = None,
) -> dict[str, membership.Separation]:
    """How well each detector tells copies from other samples, at each noise level.

    Args:
      score_fn: (x, t) -> [*e], or (x, t, label) -> [*e] where labels are given.
      samples: [m, *e].   copied: bool [m], such as `memorization.copied`.
      times: [k] > 0.   iters, probes: as `evidence`.
      labels: [m] of the samples, for the gaps.   unconditional: the score without one.
    Returns: as `curve_of`.
    Raises: ValueError: as `check_copies`; times that are not positive; labels or the
      unconditional score alone, labels of a score that takes none, or of one class.
    """
    check_on_host("detectors.curve", samples, copied, times)
    copied = check_copies(copied, len(samples))
    _check_labels(score_fn, unconditional, labels, len(samples))
    for t in np.ravel(times):
        check_time(t)
    samples, times = jnp.asarray(samples), jnp.asarray(times)

    def one(a):
        x0, label, key = a
        own = score_fn if labels is None else lambda x, t: score_fn(x, t, label)
        return jax.vmap(
            lambda t, key: evidence(
                own, process, x0, t, key, iters, probes, unconditional=unconditional
            )
        )(times, jax.random.split(key, len(times)))

    @jax.jit
    def every(*of):
        return jax.lax.map(one, of, batch_size=BATCH)

    known = jnp.zeros(len(samples), int) if labels is None else jnp.asarray(labels)
    values = every(samples, known, jax.random.split(key, len(samples)))
    return curve_of(values, copied)


def curve_of(values: Evidence, copied) -> dict[str, membership.Separation]:
    """detector -> its `Separation` at each time, UNKNOWN where a value is not finite.

    An AUC is the share of pairs in which the copy has more of what the paper says of
    copies (SIGNS): below 1/2, the detector points the other way.

    Args: values, arrays [m, k]; copied, bool [m].
    Returns: Separations of arrays [k] or [k, 2]; without detectors that are None.
    Raises: ValueError: as `check_copies`.
    """
    check_on_host("detectors.curve_of", *values, copied)
    copied = check_copies(copied, len(values.trace))
    return {
        name: membership.separations(-SIGNS[name] * np.asarray(of), copied)
        for name, of in values._asdict().items()
        if of is not None
    }


def roc(values, copied, fpr: Float[Arr, " f"]) -> Float[Arr, " f"]:
    """The ROC curve: the largest TPR at a false positive rate of at most each of fpr.

    Args: values [m], large where a sample is a copy; copied, bool [m]; fpr, in [0, 1].
    Raises: ValueError: as `check_copies`.
    """
    check_on_host("detectors.roc", values, copied)
    from sklearn import metrics  # takes over a second, and few runs need it

    copied = check_copies(copied, len(values))
    found, tpr, _ = metrics.roc_curve(copied, values, drop_intermediate=False)
    return tpr[np.searchsorted(found, fpr, side="right") - 1]


# Bad input.


def check_copies(copied, m: int) -> np.ndarray:
    """copied as bool [m].

    Raises: ValueError: another length; fewer than two copies, or than two others.
    """
    check_on_host("detectors.check_copies", copied)
    copied = np.asarray(copied)
    if copied.shape != (m,) or copied.dtype != bool:
        raise ValueError(
            f"copied is {copied.dtype} of shape {copied.shape}: give bool, one for "
            f"each of {m} samples"
        )
    if min(copied.sum(), m - copied.sum()) < 2:
        raise ValueError(
            f"{copied.sum()} of {m} samples are copies: an AUC needs at least 2 copies "
            "and 2 others; take a network that copies some of what it draws"
        )
    return copied


def _check_labels(score_fn, unconditional, labels, m: int):
    """Refuses gaps between scores that are not given.

    Raises: ValueError: labels without a score that takes them, or without the score
      that has none, and the reverse; another number of labels than m, or one class.
    """
    if labels is None and unconditional is None:
        return
    if labels is None or unconditional is None:
        given = "labels" if unconditional is None else "unconditional"
        other = "unconditional" if unconditional is None else "labels"
        raise ValueError(
            f"{given} without {other}: the gap is between the scores with and without "
            "a label; give both, or neither"
        )
    try:
        inspect.signature(score_fn).bind(None, None, None)
    except TypeError as error:
        raise ValueError(
            "labels of a score that takes none: give score_fn(x, t, label), or leave "
            "out labels and unconditional"
        ) from error
    if np.shape(labels) != (m,):
        raise ValueError(
            f"labels of shape {np.shape(labels)}: one for each of {m} samples"
        )
    if is_known(labels) and len(classes := np.unique(labels)) < 2:
        raise ValueError(
            f"all labels are {classes[0]}: with one class the scores with and without "
            "a label are one; give samples of two classes at least, or leave out "
            "labels and unconditional"
        )
