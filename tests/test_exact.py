"""Attention over n keys is the empirical score, over K the truth: counts and values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memsep_jax import empirical, mixture, process, score
from memsep_jax.models import Attention
from memsep_jax.models.exact import empirical_params, mixture_params

OU = process.ornstein_uhlenbeck()
VE = process.variance_exploding()
TIMES = [1e-3, 0.1, 3.0]


def bind(model, params):
    return jax.jit(lambda x, t: model.apply({"params": params}, x, t))


def size(params):
    return sum(p.size for p in jax.tree.leaves(params))


def isotropic(key, log_weights):
    """Of variance 0.7, 3 means in 4 dimensions."""
    means = 2 * jax.random.normal(key, (3, 4))
    return mixture.Mixture(log_weights, means, jnp.full((3, 4), 0.7))


@pytest.mark.parametrize("made", [OU, VE])
def test_over_the_training_points_it_is_the_empirical_score(made, x64, key):
    data = jax.random.normal(key, (7, 2, 3, 1))
    params = empirical_params(data)
    assert size(params) == 7 * 6
    far = 5 * jnp.ones(data[0].shape)

    @jax.jit
    @jax.vmap
    def both(t):
        a = made.alpha(t)
        xs = jnp.stack([a * data[2], a * (data[0] + data[1]) / 2, far])
        exact = jax.vmap(lambda x: Attention(made, 7).apply({"params": params}, x, t))(
            xs
        )
        v = made.sigma(t)
        return v * exact, v * jax.vmap(empirical.score(data, made), (0, None))(xs, t)

    ours, truth = both(jnp.array(TIMES))
    np.testing.assert_allclose(ours, truth, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("made", [OU, VE])
def test_over_the_means_it_is_the_score_of_the_mixture(made, x64, key):
    """A = v + a^2 variance, though no mean is a posterior mean."""
    equal = isotropic(key, jnp.full(3, -jnp.log(3.0)))
    unequal = isotropic(key, jnp.log(jnp.array([0.2, 0.5, 0.3])))
    assert size(mixture_params(equal)) == 3 * 4 + 1
    assert size(mixture_params(unequal)) == 3 * 4 + 1 + 3
    xs = 2 * jax.random.normal(jax.random.key(1), (5, 4))
    for law in (equal, unequal):
        params, score_fn = {"params": mixture_params(law)}, mixture.score(law, made)
        exact = lambda x, t, p=params: Attention(made, 3).apply(p, x, t)  # noqa: E731
        ours, truth = (
            jax.jit(jax.vmap(jax.vmap(f, (None, 0)), (0, None)))(xs, jnp.array(TIMES))
            for f in (exact, score_fn)
        )
        np.testing.assert_allclose(ours, truth, rtol=1e-10, atol=1e-12)


def test_it_is_softmax_attention_with_these_logits(x64, key):
    """Queries x, keys a k_i / A, a bias per key, values k_i: as the formula says."""
    law = isotropic(key, jnp.log(jnp.array([0.2, 0.5, 0.3])))
    x, t = jnp.array([0.3, -1.0, 0.5, 2.0]), 0.4
    a, keys = OU.alpha(t), law.means
    total = OU.sigma(t) ** 2 + a**2 * 0.7
    bias = law.log_weights - a**2 * jnp.sum(keys**2, axis=1) / (2 * total)
    attended = jax.nn.softmax(keys @ x * a / total + bias) @ keys
    result = bind(Attention(OU, 3), mixture_params(law))(x, t)
    np.testing.assert_allclose(result, (a * attended - x) / total, rtol=1e-12)


@pytest.mark.parametrize("t", [1e-4, 1e-3])
def test_float32_is_as_good_as_its_inputs_at_small_t(t, key):
    """Of float64 at the same float32 numbers: noised points of 3,072 pixels."""
    data = jax.random.uniform(key, (16, 3072), minval=-1.0)
    data = data.at[1].set(data[0] + 1e-2 * data[2])  # two contenders
    eps = jax.random.normal(jax.random.key(1), data.shape)
    xs = jax.vmap(lambda x, e: process.perturb(OU, x, t, e))(data, eps)
    model = Attention(OU, 16)
    result = jax.vmap(bind(model, empirical_params(data)), (0, None))(xs, t)
    assert result.dtype == jnp.float32
    result = np.asarray(result, np.float64)
    with jax.enable_x64(True):
        wide = jnp.asarray(np.asarray(data, np.float64))
        many = jax.vmap(bind(model, empirical_params(wide)), (0, None))
        truth = np.asarray(many(jnp.asarray(np.asarray(xs, np.float64)), t))
    assert np.linalg.norm(result - truth) < 1e-4 * np.linalg.norm(truth)


def test_a_new_one_has_what_it_is_asked_to_learn(key):
    x, t = jnp.ones(4), 0.3

    def counts(**fields):
        model = Attention(OU, 5, **fields)
        params = jax.jit(model.init)(key, x, t)["params"]
        assert jnp.all(jnp.isfinite(bind(model, params)(x, t)))
        return {name: p.size for name, p in params.items()}

    assert counts() == {"points": 20}
    assert counts(spread=True) == {"points": 20, "variance": 1}
    assert counts(weighted=True) == {"points": 20, "log_weights": 5}


def test_a_learned_weight_is_no_constant(x64, key):
    """Gradients reach every number, the variance and the weights too."""
    law = isotropic(key, jnp.log(jnp.array([0.2, 0.5, 0.3])))
    model, x = Attention(OU, 3), jnp.array([0.3, -1.0, 0.5, 2.0])

    def loss(params):
        return jnp.sum(model.apply({"params": params}, x, 1.0) ** 2)

    grads = jax.jit(jax.grad(loss))(mixture_params(law))
    assert all(jnp.all(g != 0) for g in jax.tree.leaves(grads))


def test_what_is_no_such_score_is_refused(key):
    law = isotropic(key, jnp.full(3, -jnp.log(3.0)))
    with pytest.raises(ValueError, match="variances from 0.69.* to 2.0"):
        mixture_params(law._replace(variances=law.variances.at[1, 2].set(2.0)))
    with pytest.raises(ValueError, match="low-rank factors"):
        mixture_params(law._replace(factors=jnp.ones((3, 4, 1))))
    params, x = mixture_params(law), jnp.ones(4)
    for extra in ({"label": 1}, {"gates": jnp.ones((1, 1))}):
        with pytest.raises(ValueError, match="no label and no gates"):
            Attention(OU, 3).apply({"params": params}, x, 0.1, **extra)


def test_tweedie_reads_it_as_any_score(x64):
    """One key: its denoiser is the key, everywhere and at each time."""
    point = jnp.array([[0.5, -2.0]])
    result = score.to_denoiser(bind(Attention(OU, 1), empirical_params(point)), OU)
    np.testing.assert_allclose(result(jnp.array([3.0, 1.0]), 0.2), point[0], rtol=1e-12)
