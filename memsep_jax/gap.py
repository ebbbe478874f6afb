"""Denoising loss, Fisher divergence and the gap between them (Ye 2025, section 4).

The empirical score loses less on the training set than the truth does. The estimators
say how much less, at which times, and whether a given score does so too, with standard
errors; beside them are the closed forms that they must meet.
"""

import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import entr

from memsep_jax import empirical, mixture
from memsep_jax.checks import is_known
from memsep_jax.mixture import Law
from memsep_jax.process import Process, check_time, diffusion2, perturb, time_of
from memsep_jax.roots import length, root
from memsep_jax.score import ScoreFn
from memsep_jax.shapes import Arr, Float, Keys, Num, Point, Points, Scalar

# Draws at a time, so that memory does not grow with their number. It divides the
# default of 2,000, so that lax.map compiles no second program for a remainder.
BATCH = 250
# Standard errors from which a gap counts. At many times and configs, 2 or 3 would flag
# differences that are accidents.
DEVIATIONS = 4


class Estimate(NamedTuple):
    """A mean over independent draws, and the standard error of that mean."""

    value: jax.Array  # []
    error: jax.Array  # []


class Sides(NamedTuple):
    """Both sides of Proposition 4.1 of Ye 2025, from the same draws."""

    losses: Estimate  # loss of the truth - loss of the empirical score
    fisher: Estimate  # E || empirical score - true score ||^2
    difference: Estimate  # losses - fisher, draw by draw: 0 in the mean


class Spectrum(NamedTuple):
    """The eps-loss of one score at each noise level, and where it memorizes."""

    times: jax.Array  # [k]
    train: Estimate  # [k] at training points
    held_out: Estimate  # [k] at held-out points
    floor: Estimate | None  # [k] of the truth, if known, at training points
    gap: Estimate  # [k] floor - train, or held_out - train
    memorizes: jax.Array  # bool [k]: gap above 4 standard errors


# Losses.


def estimate(samples: Num[Arr, " m"]) -> Estimate:
    """The mean of independent draws and its standard error (NaN for one draw)."""
    if len(samples) < 1:
        raise ValueError("estimate: no samples: at least 1")
    # ddof=1: with few draws the biased deviation would make errors too small.
    error = root(jnp.var(samples, ddof=1)) / math.sqrt(len(samples))
    return Estimate(jnp.mean(samples), error)


def noised(
    key: Keys,
    data: Points,
    process: Process,
    t: Scalar,
    m: int,
    *,
    log_weights: Num[Arr, " n"] | None = None,
) -> tuple[Num[Arr, " {m} *e"], Num[Arr, " {m} *e"]]:
    """m draws of X_t from the empirical law Phat_t, and their noise.

    Args: t > 0; log_weights of the points, unnormalised.
    """
    if m < 1 or len(data) < 1:
        raise ValueError(f"noised: m={m} draws from n={len(data)} points: both >= 1")
    _check_times(t)
    choice_key, eps_key = jax.random.split(key)
    if log_weights is None:
        index = jax.random.randint(choice_key, (m,), 0, len(data))
    else:
        index = jax.random.categorical(choice_key, log_weights, shape=(m,))
    x0 = data[index]
    eps = jax.random.normal(eps_key, x0.shape, x0.dtype)
    return perturb(process, x0, t, eps), eps


def eps_loss(
    score_fn: ScoreFn, process: Process, x0: Point, t: Scalar, eps: Point
) -> Scalar:
    """|| sigma s(X_t, t) + eps ||^2 / d of one example, the eps-loss of any score."""
    x = perturb(process, x0, t, eps)
    return jnp.mean((process.sigma(t) * score_fn(x, t) + eps) ** 2)


def denoising_loss(
    score_fn: ScoreFn,
    x: Num[Arr, " m *e"],
    eps: Num[Arr, " m *e"],
    process: Process,
    t: Scalar,
) -> Scalar:
    """E || -eps/sigma - s(X_t, t) ||^2, the DSM loss at t in units of the score.

    Args: x and eps as `noised` returns them.
    Source: Ye 2025, section 3 (sigma^2 times this is the eps-loss).
    """
    chex.assert_equal_shape([x, eps])

    def error(x, eps):
        return jnp.sum((-eps / process.sigma(t) - score_fn(x, t)) ** 2)

    return jnp.mean(jax.vmap(error)(x, eps))


def fisher(
    score_a: ScoreFn, score_b: ScoreFn, x: Num[Arr, " m *e"], t: Scalar
) -> Scalar:
    """E || score_a - score_b ||^2, a Fisher divergence under the law that x follows."""
    return jnp.mean(
        jax.vmap(lambda x: jnp.sum((score_a(x, t) - score_b(x, t)) ** 2))(x)
    )


# The loss gap, measured.


def sides(
    truth: Law,
    data: Points,
    process: Process,
    t: Scalar,
    key: Keys,
    m: int = 2_000,
    *,
    log_weights: Num[Arr, " n"] | None = None,
) -> Sides:
    """Both sides of Proposition 4.1 (Ye 2025): Loss-Gap_t = Fisher(Phat_t, P_t).

    With u = -eps/sigma, s the true and s_hat the empirical score, draw by draw

        |u - s|^2 - |u - s_hat|^2 = |s_hat - s|^2 + 2 (u - s_hat).(s_hat - s),

    and the last term has mean 0, because s_hat is E[u | X_t] under Phat_t.

    Args: t > 0; m draws of X_t; log_weights as `noised`.
    """
    x, eps = noised(key, data, process, t, m, log_weights=log_weights)
    true = mixture.score(truth, process)
    fitted = empirical.score(data, process, log_weights=log_weights)

    def at(x, eps):
        s, s_hat = true(x, t), fitted(x, t)
        # Not the difference of the two losses: each is about d/v, and they cancel.
        rest = 2 * jnp.sum((-eps / process.sigma(t) - s_hat) * (s_hat - s))
        return jnp.sum((s_hat - s) ** 2), rest

    divergence, rest = _each(at, x, eps)
    # From the same draws, so that the error of `difference` is that of the last term.
    return Sides(estimate(divergence + rest), estimate(divergence), estimate(rest))


def loss_gap(
    truth: Law,
    data: Points,
    process: Process,
    t: Scalar,
    key: Keys,
    m: int = 2_000,
    *,
    log_weights: Num[Arr, " n"] | None = None,
) -> Scalar:
    """Loss-Gap_t: how much less the empirical score loses than the true score.

    By Proposition 4.1 of Ye 2025 it is Fisher(Phat_t, P_t) for every data set. This is
    the Fisher form: never negative, and at large t with far less variance than the
    difference of two losses. `sides` returns both, with their standard errors.

    Args: data, draws of the truth; t > 0; m draws of X_t.
    """
    return sides(truth, data, process, t, key, m, log_weights=log_weights).fisher.value


def kl(
    truth: Law,
    data: Points,
    process: Process,
    t: Scalar,
    key: Keys,
    m: int = 2_000,
    *,
    log_weights: Num[Arr, " n"] | None = None,
) -> Estimate:
    """KL(Phat_t || P_t) = E_{Phat_t} [log phat_t - log p_t], from m draws of X_t."""
    x, _ = noised(key, data, process, t, m, log_weights=log_weights)
    fitted = empirical.log_prob(data, process, log_weights=log_weights)
    true = mixture.diffuse(truth, process, t)
    return estimate(_each(lambda x: fitted(x, t) - mixture.log_prob(true, x), x))


def curve(at, times, key: Keys):
    """Evaluates a function of a time and a key along a grid, one time after another.

    The memory is that of one time. Each time has its own noise, so the errors are
    independent.

    Args: at, a function (t [], key) -> tree of arrays; times [k] > 0.
    Returns: the tree, its arrays [k, ...].
    """
    _check_times(times)
    times = jnp.asarray(times)
    steps = jnp.arange(len(times))
    # lax.map, not vmap: one compiled body, and the memory of one time.
    return jax.lax.map(
        lambda a: at(a[0], jax.random.fold_in(key, a[1])), (times, steps)
    )


def integral(times, values: Num[Arr, " k"]) -> Scalar:
    """int values dt from the least to the largest time: the trapezoid in log t.

    In log t, because the loss gap is about d/t near 0: t Loss-Gap_t is smooth there.

    Args: times [k] > 0, monotone either way.
    """
    _check_times(times)
    return jnp.sum(_trapezoid(times) * values)


def kl_integral(times, gaps: Estimate, process: Process) -> Estimate:
    """int g^2(t) Loss-Gap_t dt = 2 [KL(Phat_t || P_t) at the first - at the last time].

    For every process dX = f X dt + g dB and every data set, since d KL/dt is
    -g^2/2 Fisher; g = 1 for Ornstein-Uhlenbeck, where it is the plain time integral.

    Args: times [k] > 0; gaps, an Estimate of [k] with independent errors (`curve`).
    Returns: an Estimate that leaves out the error of the trapezoid.
    """
    rate = jax.vmap(lambda t: diffusion2(process, t))(jnp.asarray(times))
    # Independent errors: their squares add up.
    error = length(_trapezoid(times) * rate * gaps.error)
    return Estimate(integral(times, rate * gaps.value), error)


# The loss gap, in closed form.


def saturated(eigenvalues: Num[Arr, " d"], process: Process, t: Scalar) -> Scalar:
    """E Loss-Gap_t while the noised training points do not overlap.

    sum_j alpha^2 lam_j / (v (v + alpha^2 lam_j)), v = sigma^2: the sharp form of
    Theorem 4.3 of Ye 2025.

    Args: eigenvalues of the components' common covariance.
    """
    signal, v = process.alpha(t) ** 2 * eigenvalues, process.sigma(t) ** 2
    return jnp.sum(signal / (v * (v + signal)))


def saturated_integral(
    eigenvalues: Num[Arr, " d"], process: Process, t0: Scalar, t1: Scalar
) -> Scalar:
    """int_{t0}^{t1} g^2(t) saturated(t) dt, in closed form for every process.

    sum_j log(u / (u + lam_j)) between u(t0) and u(t1), u = v / alpha^2 (Ornstein-
    Uhlenbeck: e^t - 1), because g^2 dt = alpha^2 du.

    Args: eigenvalues >= 0; t0 > 0.
    """
    _check_times(t0)
    return _log_volume(eigenvalues, process, t0) - _log_volume(eigenvalues, process, t1)


def one_point(
    eigenvalues: Num[Arr, " d"], offsets: Num[Arr, " d"], process: Process, t: Scalar
) -> Scalar:
    """Loss-Gap_t of a single training point x_1 under N(mu, Sigma), exactly.

    tr[(I/sqrt(v) - sqrt(v) A^-1)^2] + alpha^2 (x_1 - mu)' A^-2 (x_1 - mu) with
    A = alpha^2 Sigma + v I. For N(0, I) and Ornstein-Uhlenbeck it is
    d alpha^4/v + alpha^2 |x_1|^2.

    Args: eigenvalues of Sigma; offsets = x_1 - mu in its eigenbasis; t > 0.
    """
    _check_times(t)
    alpha2, v = process.alpha(t) ** 2, process.sigma(t) ** 2
    spread = alpha2 * eigenvalues + v
    # 1/v - 2/A + v/A^2 = (A - v)^2 / (v A^2), without the cancellation as t -> 0.
    return jnp.sum(((alpha2 * eigenvalues) ** 2 / v + alpha2 * offsets**2) / spread**2)


def standard_normal(
    information: Scalar, data: Points, process: Process, t: Scalar
) -> Scalar:
    """Loss-Gap_t of any data set under N(0, I), from I(Phat_t) = E || s_hat ||^2.

    I(Phat_t) - 2 d/c + (d v + alpha^2 mean |x_i|^2) / c^2, c = alpha^2 + v (1 for
    Ornstein-Uhlenbeck): P_t = N(0, c I), and E s_hat.X = -d under Phat_t. t > 0.
    """
    _check_times(t)
    alpha2, v = process.alpha(t) ** 2, process.sigma(t) ** 2
    d, c = data[0].size, alpha2 + v
    squares = jnp.sum(data**2) / len(data)
    return information - 2 * d / c + (d * v + alpha2 * squares) / c**2


def information_bound(
    eigenvalues: Num[Arr, " d"], process: Process, t0: Scalar, n: Scalar
) -> Scalar:
    """The least that int_{t0}^inf g^2 E Loss-Gap_t dt can be with n training points.

    sum_j log(1 + lam_j / u(t0)) - 2 log n, u = v / alpha^2: the entropy of Phat_t0 is
    at most that of one noised point plus log n. The truth is N(mu, Sigma), or a mixture
    of such Gaussians, whose entropy is larger still.

    Args: eigenvalues of Sigma; t0 > 0; n >= 1.
    """
    _check_times(t0)
    if is_known(n) and np.min(n) < 1:
        raise ValueError(f"information_bound: n={n} points: at least 1")
    return _log_volume(eigenvalues, process, t0) - 2 * jnp.log(n)


def entropy_bound(
    truth: Law,
    data: Points,
    process: Process,
    t0: Scalar,
    key: Keys,
    m: int = 2_000,
    *,
    log_weights: Num[Arr, " n"] | None = None,
) -> Estimate:
    """The least that int_{t0}^inf g^2 Loss-Gap_t dt can be for this data set.

    -d log(2 pi e v0) - 2 H(w) - 2 E_{Phat_t0} log p_t0, with the weights' entropy H(w).
    Give duplicates once, with their weight: as n rows they count as n points, and the
    bound, though still true, is lower than necessary.

    Args: t0 > 0; m draws of X_t0; log_weights as `noised`.
    """
    x, _ = noised(key, data, process, t0, m, log_weights=log_weights)
    true = mixture.diffuse(truth, process, t0)
    fit = estimate(_each(lambda x: mixture.log_prob(true, x), x))
    weights = jnp.zeros(len(data)) if log_weights is None else log_weights
    # Twice the entropy of the noise. With twice that of the weights, it is at least
    # twice the entropy of Phat_t0, which the KL divergence contains.
    noise = data[0].size * jnp.log(2 * jnp.pi * jnp.e * process.sigma(t0) ** 2)
    entropy = jnp.log(effective_size(weights))
    return Estimate(-noise - 2 * entropy - 2 * fit.value, 2 * fit.error)


def effective_size(log_weights: Num[Arr, " n"]) -> Scalar:
    """exp(H(w)): how many equally weighted points the weights are worth, 1 to n.

    Args: log_weights, unnormalised; -inf leaves a point out.
    """
    weights = jax.nn.softmax(log_weights)
    # Points without weight add 0, but the slope of entr at 0 is infinite.
    return jnp.exp(jnp.sum(entr(jnp.where(weights > 0, weights, 1.0))))


def collapse_time(n: Scalar, k: Scalar, d: Scalar, process: Process) -> Scalar:
    """The time until which the n noised training points keep apart (unit variances).

    At this time alpha^2 / v = (n / k)^(2/d) - 1: a component's n/k points fill its
    volume. For Ornstein-Uhlenbeck it is -log(1 - v_c), v_c = (n / k)^(-2/d). The
    largest posterior weight of a noised point is then about .7, and the loss gap falls
    from `saturated` to 0.

    Args: n points of k components in d dimensions.
    Raises: ValueError: unless n > k >= 1 and d >= 1.
    """
    if is_known(n, k, d) and not (np.all(np.greater(n, k)) and np.min([k, d]) >= 1):
        raise ValueError(
            f"collapse_time: n={n} points of k={k} components in d={d} dimensions must "
            "satisfy n > k >= 1 and d >= 1: one point of each component never collapses"
        )
    # expm1, because (n / k)^(2/d) is close to 1 where d is large.
    return time_of(process, 1 / jnp.sqrt(jnp.expm1(2 / d * jnp.log(n / k))))


# The detector.


def floor(score_fn: ScoreFn, process: Process, x, t) -> Estimate:
    """1 - v I / d, I = E || s ||^2: the least eps-loss that any score has on a law.

    The best guess of the noise is E[eps | X_t] = -sigma s(X_t, t), s the score of the
    noised law, which leaves E |eps|^2/d - E |sigma s|^2/d. For P_t it is the least
    loss on new data; for Phat_t, the least loss on the training set: 0 while the noised
    training points keep apart.

    Args: score_fn, the score of the law from which x [m, *e] are drawn; t [] > 0.
    Returns: Estimate of [], per dimension.
    """
    return _floor(lambda x: score_fn(x, t), x, process, t)


def floor_of(scores, process: Process, t) -> Estimate:
    """`floor`, of scores that are known already.

    Args: scores [m, *e], those of the law at m draws from it at time t; t [] > 0.
    Returns: Estimate of [], per dimension.
    """
    return _floor(lambda score: score, scores, process, t)


def _floor(score_of, draws, process, t):
    _check_times(t)
    v = process.sigma(t) ** 2
    return estimate(_each(lambda draw: 1 - v * jnp.mean(score_of(draw) ** 2), draws))


def spectrum(
    score_fn: ScoreFn,
    process: Process,
    data: Points,
    held_out,
    times,
    key: Keys,
    m: int = 2_000,
    truth_score: ScoreFn | None = None,
) -> Spectrum:
    """Where on the noise axis a score, such as a trained network, memorizes its data.

    A score whose loss on its training data lies below the truth's `floor` is fitting
    the empirical score there. The floor is the truth's own loss on the same draws, so
    that the gap is Loss-Gap_t of Ye 2025 with this score for the empirical one, times
    v/d. If the truth is unknown, the score's loss on held-out data stands for the
    floor. No sampling is needed.

    Training and held-out points form pairs with the same noise. If m exceeds the number
    of pairs, each pair gets several noises, and the standard errors are over pairs:
    they include the chance in the data sets, which more noise does not reduce.

    Args:
      score_fn: the score to judge.   data: the points that it was fitted to.
      held_out: [n2, *e] more draws of the same law.   times: [k] > 0.
      m: draws per time.   truth_score: the score of P_t.
    Raises:
      ValueError: shapes that differ, fewer than 2 pairs, times that are not positive.
    """
    if data.shape[1:] != held_out.shape[1:]:
        raise ValueError(
            f"spectrum: held-out points of shape {held_out.shape[1:]} against data of "
            f"shape {data.shape[1:]}: resize one of them"
        )
    draws = spectrum_draws(len(data), len(held_out), times, key, m)

    def at(a):
        t, row, new, keys = a

        def one(i, j, key):
            return spectrum_losses(
                score_fn, process, data[i], held_out[j], t, key, truth_score
            )

        return _each(one, row, new, keys)

    losses = jax.lax.map(at, (jnp.asarray(times), *draws[:3]))
    return spectrum_of(times, losses, draws.pairs)


class SpectrumDraws(NamedTuple):
    """The points that `spectrum` evaluates at each of k times, and their noise."""

    row: jax.Array  # [k, m] of the data
    new: jax.Array  # [k, m] of the held-out points
    key: jax.Array  # [k, m] of the noise of both
    pairs: int  # of points: each is drawn m // pairs times at a time


def spectrum_draws(n: int, n2: int, times, key, m: int) -> SpectrumDraws:
    """The draws of `spectrum` from n training and n2 held-out points.

    Raises: ValueError, as `spectrum`.
    """
    _check_times(times)
    pairs = min(m, n, n2)
    if pairs < 2:
        raise ValueError(
            f"spectrum: m={m} draws of n={n} training and {n2} "
            "held-out points: each at least 2, to have a standard error"
        )
    index = jnp.repeat(jnp.arange(pairs), m // pairs)

    # A permutation, not draws with replacement: each pair occurs equally often, which
    # the standard error over pairs assumes.
    def at(key):
        train_key, held_out_key, eps_key = jax.random.split(key, 3)
        seen = jax.random.permutation(train_key, n)[index]
        new = jax.random.permutation(held_out_key, n2)[index]
        return seen, new, jax.random.split(eps_key, len(index))

    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(len(times)))
    seen, new, keys = jax.vmap(at)(keys)
    return SpectrumDraws(seen, new, keys, pairs)


def spectrum_losses(
    score_fn: ScoreFn,
    process: Process,
    x0: Point,
    new: Point,
    t: Scalar,
    key: Keys,
    truth_score: ScoreFn | None = None,
) -> Float[Arr, " losses"]:
    """Eps-losses of a training and a held-out point with the same noise.

    Returns: the two losses, and with a truth_score its loss at x0 as the third.
    """
    eps = jax.random.normal(key, x0.shape, x0.dtype)
    both = jnp.stack([x0, new])
    losses = jax.vmap(lambda x: eps_loss(score_fn, process, x, t, eps))(both)
    if truth_score is None:
        return losses
    return jnp.append(losses, eps_loss(truth_score, process, x0, t, eps))


def spectrum_of(times, losses, pairs: int) -> Spectrum:
    """The spectrum from the losses of its draws.

    Args: times [k]; losses [k, m, 2 or 3] of `spectrum_losses`; pairs, of the draws.
    """
    times, losses = jnp.asarray(times), jnp.asarray(losses)
    # First over the noises of a pair: draws of one pair are not independent.
    mean = jnp.mean(losses.reshape(len(times), pairs, -1, losses.shape[-1]), axis=2)

    def at(t, losses):  # [pairs, 2 or 3]
        seen, new, *least = losses.T
        gap = estimate((least[0] if least else new) - seen)
        floor = estimate(least[0]) if least else None
        above = gap.value > DEVIATIONS * gap.error
        return Spectrum(t, estimate(seen), estimate(new), floor, gap, above)

    return jax.vmap(at)(times, mean)


def _each(function, *draws):
    """vmap over the first axis, BATCH draws at a time."""
    return jax.lax.map(lambda a: function(*a), draws, batch_size=BATCH)


def _log_volume(eigenvalues, process, t):
    """sum_j log(1 + lam_j / u), u = v / alpha^2: 2 E KL(Phat_t || P_t) of one point."""
    ratio = (process.alpha(t) / process.sigma(t)) ** 2
    return jnp.sum(jnp.log1p(eigenvalues * ratio))


def _trapezoid(times):
    """Weights [k] of the trapezoid in log t."""
    times = jnp.asarray(times)
    widths = jnp.abs(jnp.diff(jnp.log(times)))
    # dt = t d log t; each time has half of the interval on either side.
    return times * (jnp.pad(widths, (1, 0)) + jnp.pad(widths, (0, 1))) / 2


def _check_times(times):
    if is_known(times):
        for t in np.ravel(times):
            check_time(t)
