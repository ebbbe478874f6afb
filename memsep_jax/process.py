"""The forward process X_t = alpha(t) X_0 + sigma(t) eps, and the laws of t.

A process is two functions; drift, diffusion and velocity follow from them by
autodiff.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from memsep_jax.checks import is_known
from memsep_jax.shapes import Arr, Num, Point, Scalar


class Process(NamedTuple):
    """X_t = alpha(t) X_0 + sigma(t) eps; both map t [] -> []."""

    alpha: Callable[[jax.Array], jax.Array]
    sigma: Callable[[jax.Array], jax.Array]


def ornstein_uhlenbeck() -> Process:
    """The papers' process dX = -X/2 dt + dB (Ye 2025, section 3)."""
    # expm1, because 1 - exp(-t) loses its digits as t -> 0, where networks memorize.
    return Process(lambda t: jnp.exp(-t / 2), lambda t: jnp.sqrt(-jnp.expm1(-t)))


def variance_preserving(beta_min: float = 0.1, beta_max: float = 20.0) -> Process:
    """dX = -beta X/2 dt + sqrt(beta) dB, beta linear in t in [0, 1] (Song 2021)."""
    if not 0 <= beta_min < beta_max:
        raise ValueError(
            f"beta_min={beta_min}, beta_max={beta_max} must satisfy "
            "0 <= beta_min < beta_max"
        )

    def integral(t):
        """The integral of beta from 0 to t."""
        return beta_min * t + (beta_max - beta_min) * t**2 / 2

    return Process(
        lambda t: jnp.exp(-integral(t) / 2),
        lambda t: jnp.sqrt(-jnp.expm1(-integral(t))),
    )


def variance_exploding() -> Process:
    """X_t = X_0 + t eps: t is the noise level sigma (Karras 2022)."""
    return Process(jnp.ones_like, lambda t: t)


def rectified_flow() -> Process:
    """X_t = (1 - t) X_0 + t eps, t in [0, 1) (Liu 2023).

    At t = 1 nothing of X_0 is left, and Tweedie's formula would divide by alpha = 0.
    """
    return Process(lambda t: 1 - t, lambda t: t)


PROCESSES = {
    "ornstein_uhlenbeck": ornstein_uhlenbeck,
    "variance_preserving": variance_preserving,
    "variance_exploding": variance_exploding,
    "rectified_flow": rectified_flow,
}


def check_time(t):
    """Refuses a time at which no process has a score; a traced one passes unchecked.

    Raises: ValueError.
    """
    # float: under jit, even the comparison of a known array would be traced.
    if is_known(t) and not 0 < float(t) < float("inf"):
        # At t = 0 sigma is 0, and every score divides by it.
        raise ValueError(
            f"t={t} must be positive and finite: at t = 0 the law has no density"
        )


def perturb(process: Process, x0: Point, t: Scalar, eps: Point) -> Point:
    """X_t from a clean point and its noise."""
    return process.alpha(t) * x0 + process.sigma(t) * eps


def drift(process: Process, t: Scalar) -> Scalar:
    """f(t) of dX = f X dt + g dB: d log alpha / dt."""
    return jax.grad(process.alpha)(t) / process.alpha(t)


def diffusion2(process: Process, t: Scalar) -> Scalar:
    """g(t)^2 of dX = f X dt + g dB: d sigma^2/dt - 2 f sigma^2."""
    # d sigma^2/dt = 2 sigma sigma'; the drift alone would change it by 2 f sigma^2.
    sigma, rate = jax.value_and_grad(process.sigma)(t)
    return 2 * sigma * rate - 2 * drift(process, t) * sigma**2


def noise_to_signal(process: Process, t: Num[Arr, "*k"]) -> Num[Arr, "*k"]:
    """s(t) = sigma / alpha, the noise level in EDM's frame."""
    return process.sigma(t) / process.alpha(t)


def time_of(process: Process, noise: Scalar) -> Scalar:
    """The time at which sigma / alpha is `noise`, or 1e-8 or 1e8 if it never is.

    It bisects log t down to rounding; its derivative is that of the inverse function.
    """
    noise = jnp.asarray(noise, float)

    def late(log_t):
        t = jnp.exp(log_t)
        # Signed, not a ratio: alpha < 0 past the end of a rectified flow.
        return process.sigma(t) - noise * process.alpha(t)

    # In log t, because times span many orders of magnitude; by bisection, because it
    # needs neither a start nor a bound on the slope of s(t).
    def bisect(late, start):
        def halve(_, ends):
            middle = (ends[0] + ends[1]) / 2
            early = late(middle) < 0
            return jnp.where(early, middle, ends[0]), jnp.where(early, ends[1], middle)

        widest = jnp.full_like(start, jnp.log(1e8))
        # 64 halvings of 37 are below the rounding of float64.
        return jax.lax.fori_loop(0, 64, halve, (-widest, widest))[0]

    def divide(slope, y):
        slope = slope(jnp.ones_like(y))
        # A noise that is never reached has a time that does not move.
        return jnp.where(slope == 0, 0.0, y / jnp.where(slope == 0, 1.0, slope))

    # custom_root differentiates the equation: comparisons have the derivative 0, and
    # so would what bisection returns.
    return jnp.exp(jax.lax.custom_root(late, jnp.zeros_like(noise), bisect, divide))


# Laws of t: (key) -> t [].


def uniform(t_min: float, t_max: float):
    """t ~ U(t_min, t_max)."""
    _check_range(t_min, t_max, strict=False)
    return lambda key: jax.random.uniform(key, minval=t_min, maxval=t_max)


def log_uniform(t_min: float, t_max: float):
    """log t ~ U(log t_min, log t_max)."""
    _check_range(t_min, t_max)
    low, high = jnp.log(t_min), jnp.log(t_max)
    return lambda key: jnp.exp(jax.random.uniform(key, minval=low, maxval=high))


def beta(a: float, b: float, t_max: float = 1.0):
    """t / t_max ~ Beta(a, b); Beta(0.8, 2) is Algorithm 1 of Ye 2025."""
    if not (a > 0 and b > 0 and t_max > 0):
        raise ValueError(f"a={a}, b={b} and t_max={t_max} must be positive")
    return lambda key: t_max * jax.random.beta(key, a, b)


def log_normal(mean: float = -1.2, std: float = 1.2):
    """log t ~ N(mean, std^2), EDM's law of sigma (Karras 2022, table 1)."""
    if std <= 0:
        raise ValueError(f"std={std} must be positive")
    return lambda key: jnp.exp(mean + std * jax.random.normal(key))


def on_clock(law, clock: Process, process: Process):
    """The time at which `process` is as noisy as `clock` is at u, for u ~ law.

    A law that a paper states in the time of its own process thus keeps its meaning.
    """
    return lambda key: time_of(process, noise_to_signal(clock, law(key)))


TIMES = {
    "uniform": uniform,
    "log_uniform": log_uniform,
    "beta": beta,
    "log_normal": log_normal,
}


def _check_range(t_min, t_max, strict=True):
    if not (t_min < t_max and (t_min > 0 if strict else t_min >= 0)):
        raise ValueError(
            f"t_min={t_min}, t_max={t_max} must satisfy "
            f"0 {'<' if strict else '<='} t_min < t_max"
        )
