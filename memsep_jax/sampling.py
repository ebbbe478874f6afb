"""Time grids, probability-flow ODE, reverse SDE, EDM, log-likelihood, noise search.

A flow is a whole trajectory for one point; jit(vmap(flow)) compiles it for a batch.
`stages` are the same trajectory cut into its steps.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from memsep_jax.process import Process, diffusion2, drift, noise_to_signal, time_of
from memsep_jax.roots import root
from memsep_jax.score import ScoreFn, to_denoiser
from memsep_jax.shapes import Arr, Float, Keys, Point, Scalar


def log_times(t_min: float, t_max: float, steps: int) -> Float[Arr, " {steps}+1"]:
    """Times equally spaced in log t, like the VE steps of Karras 2022, table 1.

    Returns: the times from t_max down to t_min.
    """
    _check_grid(t_min, t_max, steps)
    return jnp.geomspace(t_max, t_min, steps + 1)


def edm_times(
    t_min: float, t_max: float, steps: int, rho: float = 7.0
) -> Float[Arr, " {steps}+1"]:
    """Times equally spaced in t^(1/rho) (Karras 2022, eq. 5).

    Returns: the times from t_max down to t_min. The final Tweedie step is EDM's last
    step to 0, so EDM's 18 steps (35 calls with Heun) are steps=17 here.
    """
    _check_grid(t_min, t_max, steps)
    ramp = jnp.linspace(t_max ** (1 / rho), t_min ** (1 / rho), steps + 1)
    # Exact ends, since the Tweedie step takes its sigma at the last time.
    return (ramp**rho).at[0].set(t_max).at[-1].set(t_min)


TIME_GRIDS = {"log": log_times, "edm": edm_times}


def prior(key: Keys, process: Process, t: Scalar, shape) -> Point:
    """X_T ~ N(0, sigma(T)^2 I) of this shape, where sampling starts."""
    return process.sigma(t) * jax.random.normal(key, shape)


class _Stages(NamedTuple):
    """A trajectory of a sampler: begin, a step for each i in range(steps), end."""

    begin: Callable  # (x [*e] at times[0]) -> [*e]
    step: Callable  # (x [*e], key, i []) -> [*e]
    end: Callable  # (x [*e], key) -> [*e], the sample
    steps: int


def _whole(stages):
    """The flow of some stages: (x [*e] at times[0], key) -> [*e]."""

    def flow(x, key):
        def body(x, i):
            return stages.step(x, key, i), None

        x, _ = jax.lax.scan(body, stages.begin(x), jnp.arange(stages.steps))
        return stages.end(x, key)

    return flow


def ode(
    score_fn: ScoreFn,
    process: Process,
    times: Float[Arr, " k"],
    method="heun",
    denoise=True,
):
    """The probability-flow ODE dx/dt = f x - g^2 score / 2 along `times`.

    Args:
      times: decreasing.
      method: "euler", "heun" (second order), or "ddim" (Euler in x/alpha against
        sigma/alpha, exact if the denoiser does not move; Song 2021).
      denoise: end with the Tweedie step, since raw samples at t_min still carry
        noise of size sigma(t_min).
    Returns:
      flow: x [*e] at times[0] -> [*e].
    """
    flow = _whole(_ode(score_fn, process, times, method, denoise))
    return lambda x: flow(x, None)


def _ode(score_fn, process, times, method="heun", denoise=True):
    step = _step(score_fn, process, method)

    def stage(x, key, i):
        # A scan must return the type that it got, and times may be wider than x.
        return step(x, times[i], times[i + 1]).astype(x.dtype)

    end = _end(score_fn, process, times, denoise)
    return _Stages(lambda x: x, stage, end, len(times) - 1)


def _end(score_fn, process, times, denoise):
    """The end of a trajectory, (x [*e], key) -> [*e]: Tweedie's step, or x itself."""

    def end(x, key):
        return to_denoiser(score_fn, process)(x, times[-1]) if denoise else x

    return end


def path(score_fn: ScoreFn, process: Process, times: Float[Arr, " k"], method="heun"):
    """The whole trajectory of `ode`, including its start and its raw end.

    Args: as `ode`.   Returns: x [*e] at times[0] -> [k, *e], a point for each time.
    """
    step = _step(score_fn, process, method)

    def walk(x):
        def body(x, pair):
            x = step(x, *pair).astype(x.dtype)
            return x, x

        _, later = jax.lax.scan(body, x, (times[:-1], times[1:]))
        return jnp.concatenate([x[None], later])

    return walk


def _step(score_fn, process, method):
    """One step of the probability flow: (x [*e], t [], t_next []) -> [*e]."""
    if method not in ODE_METHODS:
        raise ValueError(f"method={method!r} is not one of {sorted(ODE_METHODS)}")
    slope = _slope(score_fn, process)

    def euler(x, t, t_next):
        return x + (t_next - t) * slope(x, t)

    def heun(x, t, t_next):
        first = slope(x, t)
        second = slope(x + (t_next - t) * first, t_next)
        return x + (t_next - t) * (first + second) / 2

    def ddim(x, t, t_next):
        s, s_next = noise_to_signal(process, t), noise_to_signal(process, t_next)
        # d(x/alpha)/ds = eps = -sigma score: one Euler step in s.
        moved = x / process.alpha(t) - (s_next - s) * process.sigma(t) * score_fn(x, t)
        return process.alpha(t_next) * moved

    return {"euler": euler, "heun": heun, "ddim": ddim}[method]


def _slope(score_fn, process):
    """dx/dt of the probability flow: (x [*e], t []) -> [*e] (Song 2021)."""
    return lambda x, t: (
        drift(process, t) * x - diffusion2(process, t) * score_fn(x, t) / 2
    )


ODE_METHODS = ("euler", "heun", "ddim")


def sde(score_fn: ScoreFn, process: Process, times: Float[Arr, " k"], denoise=True):
    """The reverse SDE dX = (f X - g^2 score) dt + g dB, by Euler-Maruyama.

    Args: times, decreasing; denoise as in `ode`.
    Returns: flow: (x [*e] at times[0], key) -> [*e].
    """
    return _whole(_sde(score_fn, process, times, denoise))


def _sde(score_fn, process, times, denoise=True):
    def stage(x, key, i):
        t, t_next = times[i], times[i + 1]
        g2 = diffusion2(process, t)
        slope = drift(process, t) * x - g2 * score_fn(x, t)
        # A key of its own for each step, so that a trajectory cut anywhere goes on
        # with the same noise.
        z = jax.random.normal(jax.random.fold_in(key, i), x.shape, x.dtype)
        x_next = x + (t_next - t) * slope + root(g2 * (t - t_next)) * z
        return x_next.astype(x.dtype)

    end = _end(score_fn, process, times, denoise)
    return _Stages(lambda x: x, stage, end, len(times) - 1)


def edm(
    score_fn: ScoreFn,
    process: Process,
    times: Float[Arr, " k"],
    churn: float = 0.0,
    churn_min: float = 0.0,
    churn_max: float = float("inf"),
    churn_noise: float = 1.0,
):
    """EDM's stochastic sampler: up to a higher noise, then Heun down (Karras 2022, 2).

    Algorithm 2 of the paper, in x/alpha against s = sigma/alpha, on any process. Its k
    steps are those between `times` and the last one to 0, which is Tweedie's.

    Args:
      times: decreasing.
      churn: S_churn, the stochasticity; 0 for the deterministic sampler. In each step
        s rises by the factor 1 + min(churn / k, sqrt(2) - 1).
      churn_min, churn_max: S_tmin and S_tmax, the range of s with churn.
      churn_noise: S_noise, the standard deviation of the added noise.
    Returns:
      flow: (x [*e] at times[0], key) -> [*e].
    Raises: ValueError: a number that breaks its rule.
    """
    return _whole(
        _edm(score_fn, process, times, churn, churn_min, churn_max, churn_noise)
    )


def _edm(
    score_fn,
    process,
    times,
    churn=0.0,
    churn_min=0.0,
    churn_max=float("inf"),
    churn_noise=1.0,
):
    if not churn >= 0:
        raise ValueError(f"churn={churn} must be at least 0")
    if not 0 <= churn_min <= churn_max:
        raise ValueError(
            f"churn_min={churn_min}, churn_max={churn_max} must satisfy "
            "0 <= churn_min <= churn_max"
        )
    if not churn_noise > 0:
        raise ValueError(f"churn_noise={churn_noise} must be positive")
    levels = jax.vmap(lambda t: noise_to_signal(process, t))(times)
    within = (churn_min <= levels) & (levels <= churn_max)
    gamma = jnp.where(within, min(churn / len(times), 2**0.5 - 1), 0)
    raised = levels * (1 + gamma)
    # The variance that is missing: raised^2 - levels^2 = levels^2 gamma (2 + gamma).
    added = churn_noise * levels * root(gamma * (2 + gamma))
    # Without added noise t stays as it is, since `time_of` is exact to rounding only.
    later = jax.vmap(lambda s: time_of(process, s))(raised)
    starts = jnp.where(gamma > 0, later, times)

    def stir(z, i, key):
        if not churn:
            return z
        noise = jax.random.normal(jax.random.fold_in(key, i), z.shape, z.dtype)
        return z + added[i] * noise

    def slope(z, t):  # dz/ds = (z - D)/s = eps = -sigma score
        return -process.sigma(t) * score_fn(process.alpha(t) * z, t)

    def begin(x):
        return (x / process.alpha(times[0])).astype(x.dtype)

    def stage(z, key, i):
        x, step = stir(z, i, key), levels[i + 1] - raised[i]
        first = slope(x, starts[i])
        second = slope(x + step * first, times[i + 1])
        return (x + step * (first + second) / 2).astype(z.dtype)

    def end(z, key):
        # The step to 0 is churned like all others; Heun's corrector would need the
        # score at 0, so it is an Euler step, which is Tweedie's formula.
        z, t = stir(z, len(times) - 1, key), starts[-1]
        return to_denoiser(score_fn, process)(process.alpha(t) * z, t)

    return _Stages(begin, stage, end, len(times) - 1)


def log_likelihood(
    score_fn: ScoreFn, process: Process, times: Float[Arr, " k"], probes: int = 0
):
    """log p_{t_min}(x) of a score's own law, by its probability-flow ODE (Song 2021).

    The change of variables along the flow from t_min to t_max, by Heun's method; at
    t_max the law is taken to be the prior N(0, sigma(t_max)^2 I).

    Args:
      times: decreasing, as for `ode`.
      probes: 0 for the exact trace, with d derivatives per step; else the number of
        random signs in Hutchinson's estimate, the same along the whole trajectory.
    Returns:
      log_prob: (x [*e], key) -> [] in nats; only probes need the key.
    """
    if probes < 0:
        raise ValueError(f"probes={probes} must be 0 (exact trace) or more")
    slope = _slope(score_fn, process)

    def log_prob(x, key=None):
        along = directions(x, probes, key)

        def both(x, t):
            return divergence(lambda x: slope(x, t), x, along)

        def body(carry, pair):
            x, gained = carry
            t, t_next = pair
            first, trace = both(x, t)
            second, trace_next = both(x + (t_next - t) * first, t_next)
            x_next = x + (t_next - t) * (first + second) / 2
            gained = gained + (t_next - t) * (trace + trace_next) / 2
            return (x_next.astype(x.dtype), gained.astype(x.dtype)), None

        start = (x, jnp.zeros((), x.dtype))
        (end, gained), _ = jax.lax.scan(
            body, start, (times[::-1][:-1], times[::-1][1:])
        )
        v = process.sigma(times[0]) ** 2
        return gained - (jnp.sum(end**2) / v + x.size * jnp.log(2 * jnp.pi * v)) / 2

    return log_prob


def directions(x: Point, probes: int = 0, key: Keys | None = None):
    """Along which `divergence` looks: d unit vectors, or scaled random signs.  [k, *e].

    Args: probes, the number of random signs (Hutchinson); 0 for the unit vectors, which
      need no key.
    Raises: ValueError: probes without a key.
    """
    if not probes:
        # Along unit vectors, v'Jv are the diagonal of J: their sum is its trace.
        return jnp.eye(x.size, dtype=x.dtype).reshape(-1, *x.shape)
    if key is None:
        raise ValueError(f"probes={probes} directions are drawn: give a key")
    # So long that the sum over them is the mean over random signs.
    return jax.random.rademacher(key, (probes, *x.shape), x.dtype) / math.sqrt(probes)


def divergence(field, x: Point, along) -> tuple[Point, Scalar]:
    """field(x), and the trace of its Jacobian: exact, or Hutchinson's estimate.

    Args: field, x [*e] -> [*e]; along, the `directions`.
    """
    # Linearised once: the directions share all that does not depend on them.
    value, push = jax.linearize(field, x)
    return value, jnp.sum(jax.vmap(lambda v: jnp.sum(v * push(v)))(along))


def sampler(
    score_fn: ScoreFn, process: Process, times, shape, method="heun", **options
):
    """A sample from a key: the prior, then the flow of the method.

    Args: method, "sde", "edm" or one of `ode`; options, of the function behind it.
    Returns: (key) -> [*shape]. Give sample i the key fold_in(key, i): it then depends
    on (seed, i) only, whatever its batch is.
    """
    flow = _whole(_cut(score_fn, process, times, shape, method, **options))
    # The start is drawn from the key by `begin`, so the flow takes it in place of x.
    return lambda key: flow(key, key)


def stages(score_fn: ScoreFn, process: Process, times, shape, method="heun", **options):
    """`sampler` cut into its steps, for callers with something to do in between.

    Args: as `sampler`.
    Returns:
      begin (key) -> x [*shape]; step (x, key, i []) -> x, for each i in range(count);
      count. The last step leaves the sample.
    """
    cut = _cut(score_fn, process, times, shape, method, **options)

    # One function for all steps, the last one too, because i may be traced: a caller
    # then takes any number of them in one compiled loop.
    def step(x, key, i):
        return jax.lax.cond(
            i < cut.steps,
            lambda x: cut.step(x, key, i),
            lambda x: cut.end(x, key).astype(x.dtype),
            x,
        )

    return cut.begin, step, cut.steps + 1


def _cut(score_fn, process, times, shape, method, **options):
    """The stages of a sampler, from the key of a sample."""
    make = CUT.get(method, _ode)
    options |= {"method": method} if make is _ode else {}
    made = make(score_fn, process, times, **options)

    # The first key is for the start in every method, so that the samples of two
    # methods, or of two networks, begin with the same noise.
    def begin(key):
        return made.begin(prior(jax.random.split(key)[0], process, times[0], shape))

    def step(x, key, i):
        return made.step(x, jax.random.split(key)[1], i)

    def end(x, key):
        return made.end(x, jax.random.split(key)[1])

    return _Stages(begin, step, end, made.steps)


CUT = {"sde": _sde, "edm": _edm}  # the others are methods of `ode`


def search_noise(flow, x: Point, radius: float, steps: int = 100, lr: float = 0.1):
    """The initial noise on a sphere whose flow comes closest to a target x.

    The probability flow is invertible: *every* point, even a held-out one, has some
    noise that leads to it. Only noise that sampling could draw, with the typical length
    sqrt(d) sigma(T), shows that the model emits x; so z stays on that sphere.

    Gradient descent on |flow(z) - x|^2 through the ODE, in steps whose length is lr x
    radius, whatever that of the gradient is, and falls to 0 as a cosine. A gradient
    holds every step of the flow in memory; if that is too much, give `ode`
    jax.checkpoint(score_fn).

    Args:
      flow: z [*e] -> [*e], as from `ode`.   radius: the length of z, a number.
    Returns:
      search: (key) -> z [*e], the best point on the way from the key's random start.
    Raises: ValueError: radius, steps or lr not positive.
    """
    begin, step, count = search_stages(flow, x, radius, steps, lr)

    def search(key):
        state = jax.lax.fori_loop(0, count, lambda i, c: step(c, i), begin(key))
        return best_noise(state)

    return search


def search_stages(flow, x: Point, radius: float, steps: int = 100, lr: float = 0.1):
    """`search_noise` cut into its steps, for callers with something to do in between.

    Args: as `search_noise`.
    Returns:
      begin (key) -> state; step (state, i []) -> state, for each i in range(count);
      count. `best_noise` of the state is the result.
    Raises: ValueError, as `search_noise`.
    """
    if not (radius > 0 and steps >= 1 and lr > 0):
        raise ValueError(
            f"search_noise: radius={radius}, steps={steps}, lr={lr} must be positive"
        )

    def unit(z):
        """z / |z|, and whether z has a direction; some unit vector if it has none."""
        largest = jnp.max(jnp.abs(z))
        directed = (largest > 0) & (largest < jnp.inf)  # neither where it is NaN
        # Before the divisions, or the derivative of the search would be NaN.
        z = jnp.where(directed, z, 1.0)
        z = z / jnp.max(jnp.abs(z))  # else squares could overflow float32
        return z / jnp.sqrt(jnp.sum(z**2)), directed

    def loss(z):
        return jnp.sum((flow(z) - x) ** 2).astype(x.dtype)

    def begin(key):
        start = radius * unit(jax.random.normal(key, x.shape, x.dtype))[0]
        start = start.astype(x.dtype)
        return start, start, jnp.full((), jnp.inf, x.dtype)

    def step(state, i):
        z, best, least = state
        value, grad = jax.value_and_grad(loss)(z)
        better = value < least  # never where it is NaN
        best, least = jnp.where(better, z, best), jnp.where(better, value, least)
        length = lr * (1 + jnp.cos(jnp.pi * i / steps)) / 2
        here, (slope, sloped) = z / radius, unit(grad)
        # Along the sphere: if x is out of reach, the rest points away from it.
        along, sideways = unit(slope - jnp.sum(slope * here) * here)
        moved, kept = unit(here - length * along)
        # Where the gradient has no direction (0, NaN or infinite), a shorter step
        # starts from the best point again.
        z = jnp.where(sloped & sideways & kept, radius * moved, best)
        return z.astype(x.dtype), best, least

    # The last round has length 0: it only evaluates the end of the one before it.
    return begin, step, steps + 1


def best_noise(state):
    """z [*e], the best point of `search_stages` so far."""
    return state[1]


def _check_grid(t_min, t_max, steps):
    if not 0 < t_min < t_max:
        raise ValueError(f"t_min={t_min}, t_max={t_max} must satisfy 0 < t_min < t_max")
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1")
