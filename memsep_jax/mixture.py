"""The known truths: mixtures of Gaussians or boxes, their diffused law, density, score.

A law is a NamedTuple of arrays with the three methods that differ: the log-densities
of its components, itself after a scaling and more noise, and draws of given
components. The functions below are written once over them.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import cho_factor, cho_solve
from jax.scipy.special import erfc, logsumexp

from memsep_jax.process import Process
from memsep_jax.roots import root
from memsep_jax.score import ScoreFn
from memsep_jax.shapes import Arr, Float, Keys, Scalar

# student_t keeps scales likelier than exp(-16), about 1e-7, of the likeliest: float32
# does not see the rest beside 1.
LEFT_OUT = 16.0
LEVELS = 12  # of the continued fraction of the normal tail: 3e-11 accurate from 5 on
# The positive half of Gauss's rule with 8 nodes; the integrand is even.
NODES, WEIGHTS = (a[4:].tolist() for a in np.polynomial.legendre.leggauss(8))


class Mixture(NamedTuple):
    """sum_k w_k N(means[k], diag(variances[k]) + factors[k] factors[k]^T)."""

    log_weights: jax.Array  # [k], logsumexp = 0
    means: jax.Array  # [k, d]
    variances: jax.Array  # [k, d]
    factors: jax.Array | None = None  # [k, d, r]; None: diagonal covariances

    def log_components(self, x):
        """log N(x; component).   x [d] -> [k]."""
        _check_point(x, self.means)
        return jax.vmap(_log_normal, (None, 0, 0, 0))(x, *self[1:])

    def moved(self, alpha, sigma) -> "Mixture":
        """The law of alpha X + sigma eps."""
        return self._replace(
            means=alpha * self.means,
            variances=alpha**2 * self.variances + sigma**2,
            factors=None if self.factors is None else alpha * self.factors,
        )

    def draws(self, key, k):
        """One draw from each requested component.   k [n] int -> [n, d]."""
        factors, shape = self.factors, (len(k), self.means.shape[1])
        if factors is None:
            eps = jax.random.normal(key, shape)
            return self.means[k] + root(self.variances[k]) * eps
        key, factor_key = jax.random.split(key)
        z = jax.random.normal(factor_key, (len(k), factors.shape[2]))
        # One product with all factors: factors[k] would be [n, d, r].
        chosen = jax.nn.one_hot(k, len(factors))[:, :, None] * z[:, None, :]
        low_rank = jnp.einsum("nkr,kdr->nd", chosen, factors, precision="highest")
        return self._replace(factors=None).draws(key, k) + low_rank


class Boxes(NamedTuple):
    """sum_k w_k U([low[k], high[k]]), a non-smooth law, plus noise N(0, sigma^2 I)."""

    log_weights: jax.Array  # [k], logsumexp = 0
    low: jax.Array  # [k, d]
    high: jax.Array  # [k, d]
    sigma: jax.Array | float = 0.0  # []

    def log_components(self, x):
        """log of the density of each box, by error functions.   x [d] -> [k]."""
        _check_point(x, self.low)
        noisy = jnp.asarray(self.sigma) > 0
        # Never 0 in the branch that is not taken: the derivative would be NaN there,
        # and `where` multiplies it by 0, which is NaN again.
        sigma = jnp.where(noisy, self.sigma, 1.0)

        # One box at a time, and computed again in reverse mode: a derivative needs 80
        # arrays of the size of x.
        @jax.checkpoint
        def log_component(edges):
            low, high = edges
            inside = (low <= x) & (x <= high)
            sharp = jnp.where(inside, -jnp.log(high - low), -jnp.inf)
            smooth = _log_blurred(x, low, high, sigma)
            return jnp.sum(jnp.where(noisy, smooth, sharp))

        return jax.lax.map(log_component, (self.low, self.high))

    def moved(self, alpha, sigma) -> "Boxes":
        """The law of alpha X + sigma eps; boxes keep their shape, the noise adds up."""
        noise = root((alpha * self.sigma) ** 2 + sigma**2)
        return self._replace(low=alpha * self.low, high=alpha * self.high, sigma=noise)

    def draws(self, key, k):
        """One draw from each requested component.   k [n] int -> [n, d]."""
        place_key, noise_key = jax.random.split(key)
        shape = (len(k), self.low.shape[1])
        place = jax.random.uniform(place_key, shape)
        eps = jax.random.normal(noise_key, shape)
        low, high = self.low[k], self.high[k]
        # Rounding must not carry a point out of its box, where the density is 0.
        inside = jnp.minimum(low + (high - low) * place, high)
        return inside + self.sigma * eps


Law = Mixture | Boxes


def separated(key: Keys, k: int, d: int, scale: float = 2.0) -> Mixture:
    """Equal weights, means ~ N(0, scale^2 I), unit variances (Ye 2025, section 6)."""
    means = _means(key, k, d, scale)
    return Mixture(_equal(k), means, jnp.ones((k, d)))


def low_rank(
    key: Keys, k: int, d: int, scale: float = 2.0, rank: int = 2, noise: float = 0.1
) -> Mixture:
    """Data near planes: covariances F_k F_k^T + noise^2 I, F_k [d, rank] Gaussian.

    The planes add variance 1 to a coordinate on average, as `separated` has. With
    noise=0 the law itself has no density; the diffused one has.
    """
    if not (1 <= rank <= d and noise >= 0):
        raise ValueError(
            f"mixture: rank={rank} must be in 1 .. d={d}, noise={noise} at least 0"
        )
    means_key, factors_key = jax.random.split(key)
    means = _means(means_key, k, d, scale)
    factors = jax.random.normal(factors_key, (k, d, rank)) / math.sqrt(rank)
    return Mixture(_equal(k), means, jnp.full((k, d), noise**2), factors)


def student_t(
    key: Keys,
    k: int,
    d: int,
    scale: float = 2.0,
    dof: float = 3.0,
    nodes: int | None = None,
) -> Mixture:
    """Heavy tails: Student-t components t_dof(mean, I), as k x nodes Gaussians.

    A t is a Gaussian whose variance is random, dof / chi^2_dof. The trapezoid rule in
    the logarithm of that variance converges exponentially, so the law is a finite
    mixture with the same diffused law, score and samples as any other. With the default
    nodes its density agrees with the t to 1e-6: at dof=3 out to 30 scales (1 % at 300),
    at dof=10 to 10 (1 % at 30), at dof=1 beyond 10^5. Further out, where 1e-7 of the
    mass lies, its tails are Gaussian.

    Args:
      dof: tails |x|^-(dof + d); at least 0.5, or the scales leave float32.
      nodes: of the rule; None takes as many as d needs: 38 at d=1, 81 at d=32, 711 at
        d=3072 (dof=3). Fewer give a coarser law, which is known just as exactly.
    """
    if not 0.5 <= dof < math.inf or (nodes is not None and nodes < 2):
        raise ValueError(
            f"mixture: dof={dof} must be finite and at least 0.5, nodes={nodes} at "
            "least 2, or None for as many as d needs"
        )
    means = _means(key, k, d, scale)
    # With y = log variance the weight is exp(-dof/2 (e^-y + y - 1)), up to a constant;
    # its exponent falls below -LEFT_OUT within these bounds.
    c = 2 * LEFT_OUT / dof
    r = c + math.sqrt(2 * c)
    if nodes is None:  # given x, the law of y is as narrow as sqrt(2 / (dof + d))
        step = 1 / math.sqrt(2 + (dof + d) / 2)
        nodes = 1 + math.ceil((r + math.log1p(r)) / step)
    # In float64 by NumPy: the weights are made once, and float32 takes the result.
    y = np.linspace(-math.log1p(r), r, nodes)
    log_weights = -dof / 2 * (np.exp(-y) + y - 1)
    log_weights -= np.log(np.sum(np.exp(log_weights)) * k)
    variances = np.broadcast_to(np.tile(np.exp(y), k)[:, None], (k * nodes, d))
    return Mixture(
        jnp.tile(jnp.asarray(log_weights), k),
        jnp.repeat(means, nodes, axis=0),
        jnp.asarray(variances, means.dtype),
    )


def boxes(
    key: Keys, k: int, d: int, scale: float = 2.0, width: float = math.sqrt(12)
) -> Boxes:
    """Uniforms on cubes, centres ~ N(0, scale^2 I); sqrt(12) gives unit variances."""
    if not 0 < width < math.inf:
        raise ValueError(f"mixture: width={width} of a box must be positive and finite")
    centres = _means(key, k, d, scale)
    return Boxes(_equal(k), centres - width / 2, centres + width / 2, jnp.zeros(()))


LAWS: dict[str, Callable[..., Law]] = {
    "separated": separated,
    "low_rank": low_rank,
    "student_t": student_t,
    "boxes": boxes,
}


def diffuse(law, process: Process, t: Scalar):
    """The law P_t of X_t when X_0 follows the law; it is of the same kind."""
    return law.moved(process.alpha(t), process.sigma(t))


def log_prob(law: Law, x: Float[Arr, " d"]) -> Scalar:
    """log p(x).   Raises: ValueError: x is not a vector of the law's length."""
    return logsumexp(law.log_weights + law.log_components(x))


def score(law: Law, process: Process) -> ScoreFn:
    """grad log p_t, the score of the truth, as score_fn(x [d], t []) -> [d]."""
    # By autodiff, so that a law need state only the log-densities of its components.
    return lambda x, t: jax.grad(log_prob, argnums=1)(diffuse(law, process, t), x)


def sample(key: Keys, law: Law, n: int) -> Float[Arr, " {n} d"]:
    """n independent draws."""
    choice_key, noise_key = jax.random.split(key)
    k = jax.random.categorical(choice_key, law.log_weights, shape=(n,))
    return law.draws(noise_key, k)


def _log_normal(x, mean, variance, factor):
    """log N(x; mean, diag(variance) + F F^T), never a [d, d] matrix (Woodbury)."""
    gap = x - mean
    more = jnp.zeros(())
    if factor is not None:
        # The default product of a GPU (TF32) or TPU (bfloat16) keeps 3 digits.
        with jax.default_matmul_precision("highest"):
            scaled = factor / variance[:, None]
            inner = jnp.eye(factor.shape[1]) + factor.T @ scaled
            chol = cho_factor(inner, lower=True)
            z = cho_solve(chol, scaled.T @ gap)  # E[z | x], where X = mean + F z + ...
            gap = gap - factor @ z
        # |gap|^2 minus the part in the plane would cancel; the rest and |z|^2 only add.
        # The determinant is that of the variances times that of `inner` (matrix
        # determinant lemma), read off the diagonal of the Cholesky factor.
        more = jnp.sum(z**2) + 2 * jnp.sum(jnp.log(jnp.diagonal(chol[0])))
    exponents = gap**2 / variance + jnp.log(2 * jnp.pi * variance)
    return -(jnp.sum(exponents) + more) / 2


def _log_blurred(x, low, high, sigma):
    """log p of U(low, high) + N(0, sigma^2), elementwise; finite however far x is."""
    below, above = (low - x) / sigma, (x - high) / sigma
    # The nearer of the two edges comes first, negative if x is inside.
    near = jnp.where(below > above, below, above)
    far = -jnp.where(below > above, above, below)
    return _log_mean_normal(near, far) - jnp.log(sigma)


def _log_mean_normal(a, b):
    """log (Q(a) - Q(b)) / (b - a), Q the normal tail; |a| <= b, elementwise."""
    # Over a short interval both tails are equal up to rounding, so Gauss's rule takes
    # the mean there, with a relative error of 1e-13.
    half, centre = (b - a) / 2, (a + b) / 2
    short = (half <= 0.5) & (half * centre <= 2)
    # `where` before and after: the other branch must have finite derivatives too.
    h, m = jnp.where(short, half, 0.0), jnp.where(short, centre, 0.0)
    mean = sum(
        weight * jnp.exp(-((h * node) ** 2) / 2) * jnp.cosh(m * h * node)
        for node, weight in zip(NODES, WEIGHTS, strict=True)
    )
    by_nodes = jnp.log(mean / math.sqrt(2 * math.pi)) - m**2 / 2

    a, b = jnp.where(short, -1.0, a), jnp.where(short, 1.0, b)
    tail = _log_tail(a)
    # Q(b) / Q(a) <= exp((a^2 - b^2) / 2), which rounding breaks where both are huge.
    share = jnp.minimum(_log_tail(b) - tail, (a - b) * (a + b) / 2)
    by_tails = tail + jnp.log1p(-jnp.exp(share)) - jnp.log(b - a)
    return jnp.where(short, by_nodes, by_tails)


def _log_tail(z):
    """log P(N(0, 1) > z), elementwise, with accurate derivatives at every z.

    The derivatives of jax.scipy.special.log_ndtr are exp(a difference of two squares),
    which far out is rounding noise.
    """
    # erfc underflows in float32 near z = 13; the continued fraction takes over at 5.
    # `where` before and after keeps each branch finite where it is not used.
    body = jnp.log(erfc(jnp.where(z < 5, z, 0.0) / math.sqrt(2)) / 2)
    out = jnp.where(z < 5, 5.0, z)
    fraction = out  # z + 1/(z + 2/(z + 3/(z + ...)))
    for level in range(LEVELS, 0, -1):
        fraction = out + level / fraction
    tail = -(out**2) / 2 - jnp.log(math.sqrt(2 * math.pi) * fraction)
    return jnp.where(z < 5, body, tail)


def _equal(k):
    return jnp.full((k,), -jnp.log(k))


def _means(key, k, d, scale):
    if k < 1 or d < 1:
        raise ValueError(f"mixture: k={k} components in d={d} dimensions: both >= 1")
    return scale * jax.random.normal(key, (k, d))


def _check_point(x, places):
    if x.shape != places.shape[1:]:
        raise ValueError(
            f"mixture: x {x.shape} must be one vector {places.shape[1:]}; jax.vmap "
            "takes a batch, jnp.ravel makes a vector of an image"
        )
