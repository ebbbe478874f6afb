"""The known truth has the density, score, diffused law and samples of its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from numpy.polynomial.legendre import leggauss
from oracles import (
    FEW,
    FORMULAS,
    OU,
    PROCESSES,
    SCALES,
    SEEDS,
    SLOW_32,
    VE,
    D,
    T,
    alike,
    check_slopes,
    close,
    drawn,
    known,
    moved_law,
    normals,
)
from scipy.stats import multivariate_t, norm, uniform
from scipy.stats import t as student

from memsep_jax import mixture, process, score


def uneven():
    """Two components of different weight, mean and variances, in the plane."""
    return mixture.Mixture(
        jnp.log(jnp.array([0.3, 0.7])),
        jnp.array([[1.0, -2.0], [0.5, 3.0]]),
        jnp.array([[0.5, 2.0], [1.5, 0.2]]),
    )


def test_log_prob_is_finite_far_from_every_component():
    far = jnp.array([1e4, -1e4])
    assert jnp.isfinite(mixture.log_prob(uneven(), far))


def test_samples_have_the_mean_and_covariance_of_the_mixture(key):
    truth, n = uneven(), 20_000
    x = np.asarray(mixture.sample(key, truth, n), np.float64)
    weights, means, variances = (np.asarray(a, np.float64) for a in truth[:3])
    weights = np.exp(weights)
    mean = weights @ means
    gaps = means - mean
    covariance = np.einsum("k,ki,kj->ij", weights, gaps, gaps) + np.diag(
        weights @ variances
    )
    assert np.all(abs(x.mean(0) - mean) < 4 * np.sqrt(np.diag(covariance) / n))
    products = np.einsum("ni,nj->nij", x - mean, x - mean)
    error = products.std(axis=0) / np.sqrt(n)
    assert np.all(abs(products.mean(axis=0) - covariance) < 4 * error)


def test_separated_means_have_the_papers_scale(key):
    truth = mixture.separated(key, 1_000, 32)
    assert abs(jnp.mean(truth.means**2) - 4) < 4 * 4 * np.sqrt(2 / 32_000)
    np.testing.assert_allclose(jnp.sum(jnp.exp(truth.log_weights)), 1, rtol=1e-5)
    assert jnp.all(truth.variances == 1)


def test_the_score_of_samples_has_mean_zero(key):
    """E grad log p = 0 (Stein)."""
    truth, t = uneven(), jnp.float32(0.2)
    x = mixture.sample(key, mixture.diffuse(truth, OU, t), 10_000)
    scores = np.asarray(jax.jit(jax.vmap(mixture.score(truth, OU), (0, None)))(x, t))
    assert np.all(abs(scores.mean(0)) < 4 * scores.std(0) / 100)


# Every law: the density, score, diffused law and samples are of one measure.

EXAMPLES = {
    "separated": lambda key, d: mixture.separated(key, 3, d),
    "low_rank": lambda key, d: mixture.low_rank(key, 3, d, rank=1, noise=0.4),
    "student_t": lambda key, d: mixture.student_t(key, 2, d, 1.0, 3.0, nodes=12),
    "boxes": lambda key, d: mixture.boxes(key, 3, d, width=2.5),
}
every_law = pytest.mark.parametrize("law", EXAMPLES)


def densities_1d(law):
    """x [g], p(x) dx [g]: the trapezoid rule in arsinh x, out to the heaviest tails."""
    u = jnp.arange(-14, 14, 1e-3)
    p = jax.jit(jax.vmap(lambda x: jnp.exp(mixture.log_prob(law, x[None]))))
    return jnp.sinh(u), p(jnp.sinh(u)) * jnp.cosh(u) * 1e-3


def slack(law):
    """What the trapezoid rule loses at the jumps of a box; elsewhere it is exact."""
    return 3e-3 if law == "boxes" else 1e-9


@every_law
def test_every_law_has_mass_one(law, key, x64):
    truth = EXAMPLES[law](key, 1)
    assert abs(jnp.sum(densities_1d(truth)[1]) - 1) < slack(law)
    noisy = mixture.diffuse(truth, OU, jnp.asarray(0.05))
    assert abs(jnp.sum(densities_1d(noisy)[1]) - 1) < 1e-9


@every_law
def test_the_diffused_law_is_that_of_alpha_x0_plus_sigma_eps(law, key, x64):
    """p_t(x) = int p(x0) N(x; alpha x0, sigma^2) dx0, by quadrature in 1-D."""
    truth, t = EXAMPLES[law](key, 1), jnp.asarray(0.4)
    (x0, mass), x = densities_1d(truth), np.array([-3.0, -0.6, 0.4, 1.7, 4.0])
    kernel = norm(OU.alpha(t) * x0, OU.sigma(t)).pdf(x[:, None])
    log_prob = jax.vmap(lambda x: mixture.log_prob(mixture.diffuse(truth, OU, t), x))
    got = np.exp(jax.jit(log_prob)(jnp.asarray(x)[:, None]))
    np.testing.assert_allclose(got, kernel @ mass, atol=slack(law))


@every_law
def test_every_law_diffuses_in_two_steps_as_in_one(law, key, x64):
    truth, s, t = EXAMPLES[law](key, 2), jnp.asarray(0.2), jnp.asarray(0.5)
    twice = mixture.diffuse(mixture.diffuse(truth, OU, s), OU, t)
    once = mixture.diffuse(truth, OU, s + t)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), twice, once)


@every_law
def test_the_score_is_the_gradient_of_the_log_density(law, key, x64):
    """By central differences in d = 3, near and 30 away."""
    truth, t, step = EXAMPLES[law](key, 3), jnp.asarray(0.1), 1e-5
    made = mixture.diffuse(truth, OU, t)
    log_prob = jax.jit(jax.vmap(lambda x: mixture.log_prob(made, x)))
    score_fn = jax.jit(mixture.score(truth, OU))
    for x in (jnp.array([0.3, -1.2, 2.0]), jnp.array([30.0, -30.0, 10.0])):
        moved = x[None] + step * jnp.concatenate([jnp.eye(3), -jnp.eye(3)])
        values = log_prob(moved)
        slopes = (values[:3] - values[3:]) / (2 * step)
        np.testing.assert_allclose(score_fn(x, t), slopes, rtol=1e-6, atol=1e-6)


@every_law
def test_draws_have_the_characteristic_function_of_the_density(law, key):
    """E cos(w X), E sin(w X) of X_0 and of X_t, in 1-D."""
    truth, n = EXAMPLES[law](key, 1), 20_000
    for made in (truth, mixture.diffuse(truth, OU, jnp.float32(0.5))):
        drawn = np.float64(mixture.sample(jax.random.key(3), made, n))[:, 0]
        with jax.enable_x64(True):
            made = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), made)
            x, mass = map(np.asarray, densities_1d(made))
        for wave in (np.cos, np.sin):
            for w in (0.3, 1.0, 2.5):
                error = np.mean(wave(w * drawn)) - mass @ wave(w * x)
                spread = np.std(wave(w * drawn)) / np.sqrt(n)
                assert abs(error) < 4 * spread + slack(law)


# Low rank.


def planes(key, k=3, d=5, r=2):
    """Uneven in everything: weights, variances, factors."""
    keys = jax.random.split(key, 4)
    return mixture.Mixture(
        jax.nn.log_softmax(jax.random.normal(keys[0], (k,))),
        2 * jax.random.normal(keys[1], (k, d)),
        jax.random.uniform(keys[2], (k, d), minval=0.1, maxval=1.5),
        jax.random.normal(keys[3], (k, d, r)),
    )


def dense(law):
    """The [k, d, d] covariances."""
    low = np.einsum("kir,kjr->kij", law.factors, law.factors)
    return low + np.stack([np.diag(v) for v in np.asarray(law.variances)])


def test_the_jacobian_of_one_plane_is_minus_its_precision(key, x64):
    """score(x) = -A^-1 (x - alpha mu), A = alpha^2 Sigma + sigma^2 I, at every x."""
    law, t = planes(key, 1), jnp.asarray(0.3)
    inverse = np.linalg.inv(
        OU.alpha(t) ** 2 * dense(law)[0] + OU.sigma(t) ** 2 * np.eye(5)
    )
    score_fn, x = mixture.score(law, OU), jnp.arange(5.0)
    expected = -inverse @ (x - OU.alpha(t) * law.means[0])
    np.testing.assert_allclose(jax.jit(score_fn)(x, t), expected, rtol=1e-11)
    jacobian = jax.jit(jax.jacfwd(score_fn))(x, t)
    np.testing.assert_allclose(jacobian, -inverse, rtol=1e-10, atol=1e-10)


def test_draws_of_planes_have_their_covariance(key):
    law, n = planes(key, 1), 20_000
    x = np.asarray(mixture.sample(key, law, n), np.float64) - np.asarray(law.means[0])
    products = np.einsum("ni,nj->nij", x, x)
    error = products.std(axis=0) / np.sqrt(n)
    assert np.all(abs(products.mean(axis=0) - dense(law)[0]) < 4 * error)
    assert np.all(abs(x.mean(axis=0)) < 4 * x.std(axis=0) / np.sqrt(n))


def test_a_plane_in_image_space_is_right_in_float32(key):
    """d = 3072 with nothing off the planes: squares of 1e7 must leave 3e3 behind."""
    law, t = mixture.low_rank(key, 2, 3072, rank=4, noise=0.0), 1e-4
    x0 = mixture.sample(jax.random.key(1), law, 2)
    x = process.perturb(OU, x0, t, jax.random.normal(jax.random.key(2), x0.shape))
    score_fn = jax.jit(jax.vmap(mixture.score(law, OU), (0, None)))
    got = np.asarray(score_fn(x, jnp.float32(t)))
    assert jnp.isfinite(mixture.log_prob(mixture.diffuse(law, OU, t), x[0]))
    with jax.enable_x64(True):
        law, x = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (law, x))
        exact = jax.jit(jax.vmap(mixture.score(law, OU), (0, None)))
        exact = np.asarray(exact(x, jnp.asarray(np.float32(t), jnp.float64)))
    assert np.linalg.norm(got - exact) < 1e-4 * np.linalg.norm(exact)


def test_planes_add_variance_one_on_average(key):
    law = mixture.low_rank(key, 50, 32, rank=3, noise=0.2)
    spread = jnp.sum(law.factors**2, axis=2)  # chi^2_3 / 3
    assert abs(jnp.mean(spread) - 1) < 4 * np.sqrt(2 / 3 / 1_600)
    np.testing.assert_allclose(law.variances, 0.04, rtol=1e-6)


# Heavy tails.


@pytest.mark.parametrize(
    "dof, d, out",
    [(1.0, 2, 1e5), (3.0, 1, 30), (3.0, 32, 100), (10, 3, 8)],
)
def test_the_gaussians_of_student_t_are_a_student_t(dof, d, out, key, x64):
    law = mixture.student_t(key, 1, d, dof=dof)
    along = np.ones(d) * np.concatenate([[0.5], np.geomspace(0.7, out, 8)])[:, None]
    mean = np.asarray(law.means[0])
    log_prob = jax.jit(jax.vmap(lambda x: mixture.log_prob(law, x)))
    expected = multivariate_t(mean, np.eye(d), df=dof).logpdf(mean + along)
    np.testing.assert_allclose(log_prob(jnp.asarray(mean + along)), expected, atol=1e-6)


def test_draws_of_student_t_have_its_quantiles(key):
    n = 40_000
    law = mixture.student_t(key, 2, 1, scale=0.0, dof=2.0)
    x = np.asarray(mixture.sample(jax.random.key(1), law, n))[:, 0]
    for share in (0.01, 0.1, 0.25, 0.5, 0.9, 0.999):
        result = np.mean(x < student.ppf(share, 2.0))
        assert abs(result - share) < 4 * np.sqrt(share * (1 - share) / n)


def test_the_default_nodes_are_as_many_as_documented(key):
    for d, nodes in ((1, 38), (32, 81), (3072, 711)):
        shapes = jax.eval_shape(lambda d=d: mixture.student_t(key, 2, d))
        assert shapes.means.shape == (2 * nodes, d)


def test_the_heaviest_tails_are_finite_in_float32(key):
    law = mixture.student_t(key, 2, 3, dof=0.5)
    np.testing.assert_allclose(jnp.sum(jnp.exp(law.log_weights)), 1, rtol=1e-5)
    x = mixture.sample(key, law, 1_000)
    scores = jax.jit(jax.vmap(mixture.score(law, OU), (0, None)))(x, jnp.float32(0.01))
    assert jnp.all(jnp.isfinite(x)) and jnp.all(jnp.isfinite(scores))


# Boxes.


def one_box(low=-1.0, high=2.0):
    return mixture.Boxes(jnp.zeros(1), jnp.array([[low]]), jnp.array([[high]]))


GAUSS = leggauss(200)


def blurred(x, low, high, s):
    """log p and d log p / dx of U(low, high) + N(0, s^2) in float64.

    Gauss's rule over the part of the box whose kernel is above exp(-80) of its most.
    """
    nearest, (nodes, weights) = min(max(x, low), high), GAUSS
    reach = 80 * s / max(abs(x - nearest) / s, 1) if x != nearest else 40 * s
    y_low, y_high = max(low, nearest - reach), min(high, nearest + reach)
    y = (y_high + y_low) / 2 + (y_high - y_low) / 2 * nodes
    most = (x - nearest) ** 2 / (2 * s**2)
    kernel = weights * np.exp(most - (x - y) ** 2 / (2 * s**2)) * (y_high - y_low) / 2
    total = kernel.sum()
    log_p = np.log(total) - most - np.log((high - low) * s * np.sqrt(2 * np.pi))
    return log_p, -(kernel @ (x - y)) / total / s**2


SIGMAS = (1e-5, 1e-3, 0.1, 1.0, 30.0, 1e4)


@pytest.mark.parametrize("bits", [32, 64])
def test_a_box_is_right_however_far_or_flat(bits):
    """Inside, at the edges, 50 sigma and 100 widths outside; sigma >> width too."""
    places = [
        (x, s)
        for s in SIGMAS
        for x in (-101, -2, -1 - 50 * s, -1 - 3 * s, -1, 0.5, 2 - 0.3 * s, 2 + s)
    ]
    places = np.float64(np.float32(places))
    exact, slopes = np.transpose([blurred(x, -1.0, 2.0, s) for x, s in places])
    tolerance = 1e-9 if bits == 64 else 2e-6
    with jax.enable_x64(bits == 64):
        result = jax.vmap(jax.value_and_grad(at))
        got, grads = jax.tree.map(np.float64, jax.jit(result)(*jnp.asarray(places.T)))
    assert np.all(abs(got - exact) < tolerance * (1 + abs(exact)))
    assert np.all(abs(grads - slopes) < tolerance * (1 / places[:, 1] + abs(slopes)))


def at(x, s):
    """log p of the box [-1, 2] blurred by s."""
    return mixture.log_prob(one_box()._replace(sigma=s), x[None])


def test_the_jacobian_of_a_box_is_the_slope_of_its_score(x64):
    """At the centre too, where |x - centre| has a kink; times sigma^2."""
    slope = jax.jit(jax.vmap(jax.grad(at)))
    s = jnp.repeat(jnp.array([1e-3, 0.5, 1e3]), 3)
    x = jnp.tile(jnp.array([0.5, -1.0, 2.0]), 3) + jnp.tile(jnp.array([0, 0, 2]), 3) * s
    step = 1e-4 * s
    expected = (slope(x + step, s) - slope(x - step, s)) / (2 * step)
    got = jax.jit(jax.vmap(jax.hessian(at)))(x, s)
    np.testing.assert_allclose(s**2 * got, s**2 * expected, atol=1e-6)


def test_a_box_without_noise_is_the_uniform_density(x64):
    law = mixture.Boxes(
        jnp.log(jnp.array([0.25, 0.75])),
        jnp.array([[0.0, 0.0], [1.0, -1.0]]),
        jnp.array([[2.0, 1.0], [2.0, 1.0]]),
    )
    log_prob = jax.jit(jax.vmap(lambda x: mixture.log_prob(law, x)))
    x = jnp.array([[0.5, 0.5], [1.5, 0.5], [1.5, -0.5], [3.0, 0.0], [0.5, -1e9]])
    np.testing.assert_allclose(
        jnp.exp(log_prob(x)), [0.125, 0.5, 0.375, 0.0, 0.0], rtol=1e-14
    )


def test_draws_of_boxes_lie_in_their_boxes(key):
    law = mixture.boxes(key, 4, 2, width=0.7)
    x = np.asarray(mixture.sample(key, law, 5_000))[:, None]
    inside = np.all((x >= np.asarray(law.low)) & (x <= np.asarray(law.high)), axis=2)
    assert np.all(inside.any(axis=1))


def test_the_denoiser_of_a_box_stays_in_the_box(key):
    """E[X0 | x] is a mean over the box, however far x is; to float32 rounding of x."""
    law = mixture.boxes(key, 1, 3, width=1.0)
    denoise = score.to_denoiser(mixture.score(law, OU), OU)
    denoise = jax.jit(jax.vmap(denoise, (0, None)))
    x = 10 * jax.random.normal(key, (200, 3))
    for t in jnp.array([1e-4, 0.1, 3.0]):
        x0, rounding = denoise(x, t), 2e-6 * (1 + jnp.abs(x)) / OU.alpha(t)
        assert jnp.all((x0 >= law.low - rounding) & (x0 <= law.high + rounding))


def test_a_wide_box_is_locally_no_force_and_a_narrow_one_a_point(x64):
    """score = 0 deep inside; (alpha c - x)/sigma^2 where the box is below the noise."""
    score_at = jax.jit(lambda law, x, t: mixture.score(law, OU)(x, t))
    x, t = jnp.array([1.4]), jnp.asarray(0.1)
    assert abs(score_at(one_box(-50.0, 50.0), x, t)[0]) < 1e-12
    point = score_at(one_box(0.3 - 1e-9, 0.3 + 1e-9), x, t)
    expected = (OU.alpha(t) * 0.3 - x) / OU.sigma(t) ** 2
    np.testing.assert_allclose(point, expected, rtol=1e-12)


# What must stay, and what is refused.


def test_draws_of_a_diagonal_mixture_never_change(key):
    """Data sets of runs that exist are these very bits."""
    truth, n = uneven(), 100
    choice_key, noise_key = jax.random.split(key)
    k = jax.random.categorical(choice_key, truth.log_weights, shape=(n,))
    eps = jax.random.normal(noise_key, (n, 2))
    expected = truth.means[k] + jnp.sqrt(truth.variances[k]) * eps
    np.testing.assert_array_equal(mixture.sample(key, truth, n), expected)


@pytest.mark.parametrize("law", EXAMPLES)
def test_a_mixture_of_nothing_is_refused(law, key):
    with pytest.raises(ValueError, match="k=0"):
        mixture.LAWS[law](key, 0, 2)


@pytest.mark.parametrize(
    "law, wrong",
    [
        ("low_rank", {"rank": 0}),
        ("low_rank", {"rank": 4}),
        ("low_rank", {"noise": -0.1}),
        ("student_t", {"dof": 0.0}),
        ("student_t", {"dof": float("nan")}),
        ("student_t", {"nodes": 1}),
        ("boxes", {"width": 0.0}),
    ],
)
def test_a_shape_that_no_law_has_is_refused(law, wrong, key):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        mixture.LAWS[law](key, 2, 3, **wrong)


@pytest.mark.unchecked
@pytest.mark.parametrize("law", ["separated", "boxes"])
def test_a_point_of_another_shape_is_refused(law, key):
    truth = EXAMPLES[law](key, 2)
    for x in (jnp.zeros(3), jnp.zeros((4, 2)), jnp.zeros(())):
        with pytest.raises(ValueError, match="one vector"):
            mixture.log_prob(truth, x)


def test_boxes_are_cubes_about_the_means_of_separated(key):
    @jax.jit
    def ours(key):
        laws = mixture.boxes(key, 5, 3, 1.5, 0.75), mixture.boxes(key, 5, 3)
        return laws, mixture.separated(key, 5, 3, 1.5).means

    (law, default), centres = jax.tree.map(np.asarray, ours(key))
    np.testing.assert_allclose((law.low + law.high) / 2, centres, atol=1e-6)
    np.testing.assert_allclose(law.high - law.low, 0.75, rtol=1e-5)
    np.testing.assert_allclose(np.exp(law.log_weights), np.full(5, 0.2), rtol=1e-6)
    assert law.sigma == default.sigma == 0
    width = (default.high - default.low)[0, 0]
    assert uniform(0, width).var() == pytest.approx(1, rel=1e-5)


@SLOW_32
def test_a_diffused_mixture_is_a_sum_of_dense_normals(bits, real):
    """With planes, and without."""
    weights, means, factors = np.array([0.5, 0.25, 0.25]), real(3, 4), real(3, 4, 2)
    variances, x = np.array([0.25, 0.5, 1.0, 4.0]) * np.ones((3, 4)), real(4)
    made, formula = PROCESSES["variance_preserving"], FORMULAS["variance_preserving"]

    @jax.jit
    def ours(means, variances, factors, x, t):
        law = mixture.Mixture(jnp.log(weights), means, variances, factors)
        return [
            (
                mixture.log_prob(mixture.diffuse(law, made, t), x),
                mixture.score(law, made)(x, t),
            )
            for law in (law, law._replace(factors=None))
        ]

    planes, plain = ours(means, variances, factors, x, T)
    a, v = formula.alpha(T), formula.sigma(T) ** 2
    for result, low in ((planes, factors), (plain, 0 * factors)):
        covariances = [
            a**2 * (np.diag(s) + f @ f.T) + v * np.eye(4)
            for s, f in zip(variances, low, strict=True)
        ]
        log_p, slope = normals(weights, a * means, covariances, x)
        close(result[0], log_p, bits)
        close(result[1], slope, bits)


@jax.jit
def true_law(law, x, t):
    noised = mixture.log_prob(mixture.diffuse(law, VE, t), x)
    return mixture.log_prob(law, x), noised, mixture.score(law, VE)(x, t)


@pytest.mark.parametrize("name", ["normals", "planes", "boxes"])
@FEW
@given(SEEDS, SCALES)
def test_a_known_law_moves_with_its_parameters(x64, name, seed, s):
    """Scaled by `moved` and shifted; before any noise, too."""
    law, x, c = known(name, seed), drawn(seed, D), 2.0
    log_p, noised, slope = true_law(law, x, 0.5)
    result = true_law(moved_law(law, s, c), s * x + c, 0.5 * s)
    volume = D * np.log(s)
    np.testing.assert_allclose(result[:2], (log_p - volume, noised - volume), 1e-9)
    alike(result[2], slope / s)


def test_a_known_density_has_the_slopes_of_its_differences(x64):
    """In every parameter of the law, too."""
    law = mixture.low_rank(jax.random.key(0), 2, D, noise=0.5)
    check_slopes(mixture.log_prob, law, drawn(1, D))
