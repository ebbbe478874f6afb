"""score_fn(x, t), the one interface, and how a network's answer becomes a score.

Noise, denoiser, velocity and score say the same thing in different units. Each of
them, and the preconditionings of EDM, VP and VE, is linear in the network's answer F:

    D(x, t) = skip(t) x + out(t) F(scale(t) x, level(t))

so a `Prediction` is those four functions, and everything else follows.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memsep_jax.process import Process, noise_to_signal
from memsep_jax.shapes import Point, Scalar

ScoreFn = Callable[[jax.Array, jax.Array], jax.Array]  # (x [*e], t []) -> [*e]


class Prediction(NamedTuple):
    """What F predicts: D = skip x + out F(scale x, level) (Karras 2022, eq. 7).

    All map t [] -> []. `weight` multiplies the squared error of F in the loss.
    """

    skip: Callable
    out: Callable
    scale: Callable
    level: Callable
    weight: Callable


def noise(process: Process) -> Prediction:
    """F = E[eps | x]; the loss is the eps-loss."""
    return _prediction(
        process,
        skip=lambda t: 1 / process.alpha(t),
        out=lambda t: -noise_to_signal(process, t),
    )


def denoiser(process: Process) -> Prediction:
    """F = E[X_0 | x]."""
    return _prediction(process, skip=jnp.zeros_like, out=jnp.ones_like)


def velocity(process: Process) -> Prediction:
    """F = E[alpha' X_0 + sigma' eps | x], the slope of the flow (Liu 2023)."""

    # X_t = alpha X_0 + sigma eps and F = alpha' X_0 + sigma' eps are two equations in
    # X_0 and eps; by Cramer's rule X_0 = (sigma' X_t - sigma F) / determinant.
    def determinant(t):
        rate_a, rate_s = jax.grad(process.alpha)(t), jax.grad(process.sigma)(t)
        return process.alpha(t) * rate_s - rate_a * process.sigma(t)

    return _prediction(
        process,
        skip=lambda t: jax.grad(process.sigma)(t) / determinant(t),
        out=lambda t: -process.sigma(t) / determinant(t),
    )


def score(process: Process) -> Prediction:
    """F = grad log p_t, its error weighted by sigma^2 (the eps-loss again)."""
    return _prediction(
        process,
        skip=lambda t: 1 / process.alpha(t),
        out=lambda t: process.sigma(t) ** 2 / process.alpha(t),
        weight=lambda t: process.sigma(t) ** 2,
    )


def edm(process: Process, sigma_data: float = 0.5) -> Prediction:
    """EDM's preconditioning: F has inputs and targets of unit variance.

    Source: Karras 2022, table 1, with x / alpha and s = sigma / alpha for x, sigma.
    """
    if sigma_data <= 0:
        raise ValueError(f"sigma_data={sigma_data} must be positive")

    def variance(t):
        """Of x / alpha: that of the data and that of the noise."""
        return noise_to_signal(process, t) ** 2 + sigma_data**2

    # EDM weighs the error of D by 1 / out^2 (Karras 2022, section 5), which is the
    # weight 1 of the error of F that `_prediction` gives.
    return _prediction(
        process,
        skip=lambda t: sigma_data**2 / variance(t) / process.alpha(t),
        out=lambda t: noise_to_signal(process, t) * sigma_data / jnp.sqrt(variance(t)),
        scale=lambda t: 1 / (process.alpha(t) * jnp.sqrt(variance(t))),
    )


def vp(process: Process) -> Prediction:
    """DDPM++'s preconditioning: F = E[eps | x], at the time of the VP process.

    The squared error of D has weight 1 / s^2, that of F weight 1. `level` is the time
    itself, in (0, 1] for beta from 0.1 to 20; the papers' c_noise is 999 times it, and
    the network applies this factor.

    Source: Karras 2022, table 1, with x / alpha and s = sigma / alpha for x, sigma.
    """

    def level(t):
        # s^2 = exp(19.9 t^2 / 2 + 0.1 t) - 1, solved for t without cancellation:
        # -b + sqrt(b^2 + c) loses all digits for small c, and c / (b + sqrt) none.
        integral = jnp.log1p(noise_to_signal(process, t) ** 2)
        return 2 * integral / (0.1 + jnp.sqrt(0.01 + 39.8 * integral))

    # c_in = 1 / sqrt(s^2 + 1), of x / alpha. The weight stays 1: out^2 is s^2.
    return noise(process)._replace(
        scale=lambda t: 1 / jnp.hypot(process.alpha(t), process.sigma(t)), level=level
    )


def ddpm(process: Process) -> Prediction:
    """DDPM's network: E[eps | x], at the number of its step divided by 1,000.

    The variance of the noise is 1 - alpha_bar, with betas from 1e-4 to .02. Between two
    steps the number is interpolated linearly in log(sigma / alpha). This is the
    prediction of the DiTs of the PyTorch release.

    Source: Ho 2020, section 4; Peebles & Xie 2023.
    """
    # In float64, because 1 / kept - 1 cancels at the first steps.
    kept = np.cumprod(1 - np.linspace(1e-4, 0.02, 1_000))
    known = np.log(1 / kept - 1) / 2  # log(sigma / alpha), as alpha^2 is `kept`

    def level(t):
        at = jnp.log(noise_to_signal(process, t))
        return jnp.interp(at, known.astype(at.dtype), jnp.arange(1_000.0)) / 1_000

    return vp(process)._replace(level=level)


def ve(process: Process) -> Prediction:
    """NCSN++'s preconditioning: F = -E[eps | x], of an input in the units of the data.

    The squared error of D has weight 1 / s^2, that of F weight 1.

    Source: Karras 2022, table 1, with x / alpha and s = sigma / alpha for x, sigma.
    """
    return Prediction(
        skip=lambda t: 1 / process.alpha(t),
        out=lambda t: noise_to_signal(process, t),
        scale=lambda t: 1 / process.alpha(t),
        level=lambda t: jnp.log(noise_to_signal(process, t) / 2),
        weight=jnp.ones_like,
    )


PREDICTIONS = {
    "noise": noise,
    "denoiser": denoiser,
    "velocity": velocity,
    "score": score,
    "edm": edm,
    "vp": vp,
    "ddpm": ddpm,
    "ve": ve,
}


def target(
    prediction: Prediction, process: Process, x0: Point, t: Scalar, eps: Point
) -> Point:
    """The answer that F should give at X_t: (x0 - skip X_t) / out."""
    skip, out = prediction.skip(t), prediction.out(t)
    # Expanded, so that x0 cancels exactly if F is the noise, at every sigma.
    kept = 1 - skip * process.alpha(t)
    return (kept * x0 - skip * process.sigma(t) * eps) / out


def from_network(network, prediction: Prediction, process: Process) -> ScoreFn:
    """The score of a network F(x, level) with this prediction."""

    def score_fn(x, t):
        alpha, sigma = process.alpha(t), process.sigma(t)
        answer = network(prediction.scale(t) * x, prediction.level(t))
        # (alpha D - x) / sigma^2 with D expanded: no cancellation for small sigma.
        kept = alpha * prediction.skip(t) - 1
        return (kept * x + alpha * prediction.out(t) * answer) / sigma**2

    return score_fn


def from_noise(noise_fn, process: Process) -> ScoreFn:
    """-eps(x, t) / sigma(t)."""
    return lambda x, t: -noise_fn(x, t) / process.sigma(t)


def from_denoiser(denoise, process: Process) -> ScoreFn:
    """(alpha D(x, t) - x) / sigma^2 (Tweedie)."""
    return lambda x, t: (process.alpha(t) * denoise(x, t) - x) / process.sigma(t) ** 2


def from_velocity(velocity_fn, process: Process) -> ScoreFn:
    """The score whose flow has the slope v(x, t) = E[alpha' x0 + sigma' eps | x]."""
    prediction = velocity(process)._replace(scale=jnp.ones_like, level=lambda t: t)
    return from_network(velocity_fn, prediction, process)


def banded(inside: ScoreFn, outside: ScoreFn, low: Scalar, high: Scalar) -> ScoreFn:
    """`inside` while low <= t < high, `outside` at all other times.

    With low > high the band wraps around: all times but high <= t < low. Both may be
    traced, so that one program serves every band.
    """

    def score_fn(x, t):
        # Half-open, so that neighbouring bands share no time and leave none out.
        within = (low <= t) & (t < high)
        wrapped = (low <= t) | (t < high)
        # cond, not where: a batch of points shares its time, which vmap leaves alone,
        # and only one of the two scores is computed.
        return jax.lax.cond(
            jnp.where(low <= high, within, wrapped), inside, outside, x, t
        )

    return score_fn


def guided(conditional: ScoreFn, unconditional: ScoreFn, weight: Scalar) -> ScoreFn:
    """s(x) + weight (s(x | label) - s(x)), classifier-free guidance.

    Weight 0 is the score without a label, 1 that of the label, and more than 1 moves
    samples towards what tells the label from the others.

    Source: Ho & Salimans 2022 (arXiv 2207.12598), eq. 6, where w is weight - 1.
    """

    def score_fn(x, t):
        free = unconditional(x, t)
        return free + weight * (conditional(x, t) - free)

    return score_fn


def to_denoiser(score_fn: ScoreFn, process: Process):
    """E[X_0 | X_t = x] = (x + sigma^2 score) / alpha (Tweedie).   (x, t) -> [*e]."""
    return lambda x, t: (x + process.sigma(t) ** 2 * score_fn(x, t)) / process.alpha(t)


def _prediction(process, skip, out, scale=jnp.ones_like, weight=jnp.ones_like):
    # ln(s) / 4, EDM's c_noise, unless a paper says otherwise: a network sees the noise
    # level instead of t, so one network serves every process.
    def level(t):
        return jnp.log(noise_to_signal(process, t)) / 4

    return Prediction(skip, out, scale, level, weight)
