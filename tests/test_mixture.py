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
    OU_FORMULA,
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

from memsep_jax import mixture, score


def uneven():
    """Two components of different weight, mean and variances, in the plane."""
    return mixture.Mixture(
        jnp.array(np.log([0.3, 0.7])),
        jnp.array([[1.0, -2.0], [0.5, 3.0]]),
        jnp.array([[0.5, 2.0], [1.5, 0.2]]),
    )


sample = jax.jit(mixture.sample, static_argnums=2)
diffuse = jax.jit(lambda law, t: mixture.diffuse(law, OU, t))
log_probs = jax.jit(jax.vmap(mixture.log_prob, (None, 0)))


def test_log_prob_is_finite_far_from_every_component():
    log_prob = jax.jit(lambda x: mixture.log_prob(uneven(), x))
    assert np.isfinite(log_prob(np.float32([1e4, -1e4])))


def test_samples_have_the_mean_and_covariance_of_the_mixture(key):
    truth, n = uneven(), 20_000
    x = np.float64(sample(key, truth, n))
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
    truth = jax.jit(lambda key: mixture.separated(key, 1_000, 32))(key)
    truth = jax.tree.map(np.asarray, truth)
    assert abs(np.mean(truth.means**2) - 4) < 4 * 4 * np.sqrt(2 / 32_000)
    np.testing.assert_allclose(np.sum(np.exp(truth.log_weights)), 1, rtol=1e-5)
    assert np.all(truth.variances == 1)


def test_the_score_of_samples_has_mean_zero(key):
    """E grad log p = 0 (Stein)."""
    truth, t = uneven(), np.float32(0.2)
    x = sample(key, diffuse(truth, t), 10_000)
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
    u = np.arange(-14, 14, 1e-3)
    p = np.exp(log_probs(law, np.sinh(u)[:, None]))
    return np.sinh(u), p * np.cosh(u) * 1e-3


def slack(law):
    """What the trapezoid rule loses at the jumps of a box; elsewhere it is exact."""
    return 3e-3 if law == "boxes" else 1e-9


@every_law
def test_every_law_has_mass_one(law, key, x64):
    truth = EXAMPLES[law](key, 1)
    assert abs(np.sum(densities_1d(truth)[1]) - 1) < slack(law)
    assert abs(np.sum(densities_1d(diffuse(truth, 0.05))[1]) - 1) < 1e-9


@every_law
def test_the_diffused_law_is_that_of_alpha_x0_plus_sigma_eps(law, key, x64):
    """p_t(x) = int p(x0) N(x; alpha x0, sigma^2) dx0, by quadrature in 1-D."""
    truth, t = EXAMPLES[law](key, 1), 0.4
    (x0, mass), x = densities_1d(truth), np.array([-3.0, -0.6, 0.4, 1.7, 4.0])
    kernel = norm(OU_FORMULA.alpha(t) * x0, OU_FORMULA.sigma(t)).pdf(x[:, None])
    got = np.exp(log_probs(diffuse(truth, t), x[:, None]))
    np.testing.assert_allclose(got, kernel @ mass, atol=slack(law))


@every_law
def test_every_law_diffuses_in_two_steps_as_in_one(law, key, x64):
    truth = EXAMPLES[law](key, 1)
    twice, once = diffuse(diffuse(truth, 0.2), 0.5), diffuse(truth, 0.7)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), twice, once)


@every_law
def test_the_score_is_the_gradient_of_the_log_density(law, key, x64):
    """By central differences in d = 3, near and 30 away."""
    truth, t, step = EXAMPLES[law](key, 3), 0.1, 1e-5
    made, score_fn = diffuse(truth, t), jax.jit(mixture.score(truth, OU))
    for x in (np.array([0.3, -1.2, 2.0]), np.array([30.0, -30.0, 10.0])):
        moved = x[None] + step * np.concatenate([np.eye(3), -np.eye(3)])
        values = np.asarray(log_probs(made, moved))
        slopes = (values[:3] - values[3:]) / (2 * step)
        np.testing.assert_allclose(score_fn(x, t), slopes, rtol=1e-6, atol=1e-6)


@every_law
def test_draws_have_the_characteristic_function_of_the_density(law, key):
    """E cos(w X), E sin(w X) of X_0 and of X_t, in 1-D."""
    truth, n = EXAMPLES[law](key, 1), 20_000
    for made in (truth, diffuse(truth, 0.5)):
        drawn = np.float64(sample(jax.random.key(3), made, n))[:, 0]
        with jax.enable_x64(True):
            x, mass = densities_1d(jax.tree.map(np.float64, made))
        for wave in (np.cos, np.sin):
            for w in (0.3, 1.0, 2.5):
                error = np.mean(wave(w * drawn)) - mass @ wave(w * x)
                spread = np.std(wave(w * drawn)) / np.sqrt(n)
                assert abs(error) < 4 * spread + slack(law)


# Low rank.


def planes(k=3, d=5, r=2):
    """Uneven in everything: weights, variances, factors."""
    rng = np.random.default_rng(0)
    parts = (
        np.log(rng.dirichlet(np.ones(k))),
        2 * rng.normal(size=(k, d)),
        rng.uniform(0.1, 1.5, (k, d)),
        rng.normal(size=(k, d, r)),
    )
    return mixture.Mixture(*map(jnp.asarray, parts))


def dense(law):
    """The [k, d, d] covariances."""
    low = np.einsum("kir,kjr->kij", law.factors, law.factors)
    return low + np.stack([np.diag(v) for v in np.asarray(law.variances)])


def test_the_jacobian_of_one_plane_is_minus_its_precision(x64):
    """score(x) = -A^-1 (x - alpha mu), A = alpha^2 Sigma + sigma^2 I, at every x."""
    law, t, x = planes(1), 0.3, np.arange(5.0)
    a, v = OU_FORMULA.alpha(t), OU_FORMULA.sigma(t) ** 2
    inverse = np.linalg.inv(a**2 * dense(law)[0] + v * np.eye(5))
    score_fn = mixture.score(law, OU)
    both = jax.jit(lambda x: (score_fn(x, t), jax.jacfwd(score_fn)(x, t)))
    slope, jacobian = both(x)
    expected = -inverse @ (x - a * np.asarray(law.means[0]))
    np.testing.assert_allclose(slope, expected, rtol=1e-11)
    np.testing.assert_allclose(jacobian, -inverse, rtol=1e-10, atol=1e-10)


def test_draws_of_planes_have_their_covariance(key):
    law, n = planes(1), 20_000
    x = np.float64(sample(key, law, n)) - np.asarray(law.means[0])
    products = np.einsum("ni,nj->nij", x, x)
    error = products.std(axis=0) / np.sqrt(n)
    assert np.all(abs(products.mean(axis=0) - dense(law)[0]) < 4 * error)
    assert np.all(abs(x.mean(axis=0)) < 4 * x.std(axis=0) / np.sqrt(n))


def test_a_plane_in_image_space_is_right_in_float32(key):
    """d = 3072 with nothing off the planes: squares of 1e7 must leave 3e3 behind."""
    law = jax.jit(lambda key: mixture.low_rank(key, 2, 3072, rank=4, noise=0.0))(key)
    t, x0 = np.float32(1e-4), np.asarray(sample(jax.random.key(1), law, 2))
    x = OU_FORMULA.alpha(t) * x0 + OU_FORMULA.sigma(t) * drawn(2, *x0.shape)

    def of(x, law, t):
        noised = mixture.diffuse(law, OU, t)
        return mixture.score(law, OU)(x, t), mixture.log_prob(noised, x)

    of = jax.jit(jax.vmap(of, (0, None, None)))
    got, log_p = of(np.float32(x), law, t)
    assert np.isfinite(log_p).all()
    with jax.enable_x64(True):
        law = jax.tree.map(np.float64, law)
        exact, _ = of(np.float64(np.float32(x)), law, np.float64(t))
    exact = np.asarray(exact)
    assert np.linalg.norm(got - exact) < 1e-4 * np.linalg.norm(exact)


def test_planes_add_variance_one_on_average(key):
    make = jax.jit(lambda key: mixture.low_rank(key, 50, 32, rank=3, noise=0.2))
    law = jax.tree.map(np.asarray, make(key))
    spread = np.sum(law.factors**2, axis=2)  # chi^2_3 / 3
    assert abs(np.mean(spread) - 1) < 4 * np.sqrt(2 / 3 / 1_600)
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
    expected = multivariate_t(mean, np.eye(d), df=dof).logpdf(mean + along)
    np.testing.assert_allclose(log_probs(law, mean + along), expected, atol=1e-6)


def test_draws_of_student_t_have_its_quantiles(key):
    n = 40_000
    law = jax.jit(lambda key: mixture.student_t(key, 2, 1, scale=0.0, dof=2.0))(key)
    x = np.asarray(sample(jax.random.key(1), law, n))[:, 0]
    for share in (0.01, 0.1, 0.25, 0.5, 0.9, 0.999):
        result = np.mean(x < student.ppf(share, 2.0))
        assert abs(result - share) < 4 * np.sqrt(share * (1 - share) / n)


def test_the_default_nodes_are_as_many_as_documented(key):
    for d, nodes in ((1, 38), (32, 81), (3072, 711)):
        shapes = jax.eval_shape(lambda d=d: mixture.student_t(key, 2, d))
        assert shapes.means.shape == (2 * nodes, d)


def test_the_heaviest_tails_are_finite_in_float32(key):
    law = jax.jit(lambda key: mixture.student_t(key, 2, 3, dof=0.5))(key)
    np.testing.assert_allclose(np.sum(np.exp(law.log_weights)), 1, rtol=1e-5)
    x = sample(key, law, 1_000)
    scores = jax.jit(jax.vmap(mixture.score(law, OU), (0, None)))(x, np.float32(0.01))
    assert np.all(np.isfinite(x)) and np.all(np.isfinite(scores))


# Boxes.


def one_box(low=-1.0, high=2.0):
    return mixture.Boxes(np.zeros(1), np.array([[low]]), np.array([[high]]))


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
    s = np.repeat([1e-3, 0.5, 1e3], 3)
    x = np.tile([0.5, -1.0, 2.0], 3) + np.tile([0, 0, 2], 3) * s
    step = 1e-4 * s
    above, below = (np.asarray(slope(x + h, s)) for h in (step, -step))
    expected = (above - below) / (2 * step)
    got = np.asarray(jax.jit(jax.vmap(jax.hessian(at)))(x, s))
    np.testing.assert_allclose(s**2 * got, s**2 * expected, atol=1e-6)


def test_a_box_without_noise_is_the_uniform_density(x64):
    law = mixture.Boxes(
        np.log([0.25, 0.75]),
        np.array([[0.0, 0.0], [1.0, -1.0]]),
        np.array([[2.0, 1.0], [2.0, 1.0]]),
    )
    x = np.array([[0.5, 0.5], [1.5, 0.5], [1.5, -0.5], [3.0, 0.0], [0.5, -1e9]])
    np.testing.assert_allclose(
        np.exp(log_probs(law, x)), [0.125, 0.5, 0.375, 0.0, 0.0], rtol=1e-14
    )


def test_draws_of_boxes_lie_in_their_boxes(key):
    law = jax.jit(lambda key: mixture.boxes(key, 4, 2, width=0.7))(key)
    x = np.asarray(sample(key, law, 5_000))[:, None]
    inside = np.all((x >= np.asarray(law.low)) & (x <= np.asarray(law.high)), axis=2)
    assert np.all(inside.any(axis=1))


def test_the_denoiser_of_a_box_stays_in_the_box():
    """E[X0 | x] is a mean over the box, however far x is; to float32 rounding of x."""
    centre = drawn(0, 1, 3)
    law = mixture.Boxes(np.zeros(1), centre - 0.5, centre + 0.5)
    denoise = score.to_denoiser(mixture.score(law, OU), OU)
    denoise = jax.jit(jax.vmap(denoise, (0, None)))
    x = 10 * drawn(1, 200, 3)
    for t in (1e-4, 0.1, 3.0):
        x0, rounding = np.asarray(denoise(x, t)), 2e-6 * (1 + abs(x))
        rounding /= OU_FORMULA.alpha(t)
        assert np.all((x0 >= law.low - rounding) & (x0 <= law.high + rounding))


def test_a_wide_box_is_locally_no_force_and_a_narrow_one_a_point(x64):
    """score = 0 deep inside; (alpha c - x)/sigma^2 where the box is below the noise."""
    score_at = jax.jit(lambda law, x, t: mixture.score(law, OU)(x, t))
    x, t = np.array([1.4]), 0.1
    assert abs(score_at(one_box(-50.0, 50.0), x, t)[0]) < 1e-12
    point = score_at(one_box(0.3 - 1e-9, 0.3 + 1e-9), x, t)
    expected = (OU_FORMULA.alpha(t) * 0.3 - x) / OU_FORMULA.sigma(t) ** 2
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
