"""Laws that follow from the definitions: moves, orders, masks, and gradients.

A move is x -> s Q x + c, Q a rotation: what is measured of moved data is known from
what was measured before. With the variance exploding process, time moves as s t.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memsep_jax import (
    empirical,
    fidelity,
    gap,
    lipschitz,
    memorization,
    mixture,
    neighbours,
    process,
    prune,
    sampling,
    train,
)
from memsep_jax.models import MLP, DiT, UNet

FEW = settings(
    deadline=None,
    derandomize=True,
    max_examples=5,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # x64 has no state
)
SEEDS = st.integers(0, 999)
SCALES = st.sampled_from([0.05, 1.0, 30.0])
OU = process.ornstein_uhlenbeck()
VE = process.variance_exploding()
D = 3


def drawn(seed, *shape):
    return np.random.default_rng([seed, *shape]).normal(size=shape)


def turned(seed):
    """A rotation or reflection [D, D]."""
    return np.linalg.qr(drawn(seed, D, D))[0]


def close(found, truth, rtol=1e-9):
    """To rounding in units of the largest entry, leaf by leaf."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a, b, rtol, rtol * np.max(np.abs(b), initial=0)
        ),
        found,
        truth,
    )


# Moves of the data, the truth and the flows between them. Compiled once each.


@jax.jit
def empirical_law(data, x, t):
    return (
        empirical.posterior(data, VE)(x, t),
        empirical.score(data, VE)(x, t),
        empirical.log_prob(data, VE)(x, t),
        empirical.jacobian(data, VE, x, t),
    )


@FEW
@given(SEEDS, SCALES)
def test_the_empirical_law_moves_with_its_data(x64, seed, s):
    # More points than contenders: some are known by the product only.
    data, x, t, q, c = drawn(seed, 24, D), drawn(seed, D), 0.7, turned(seed), 2.0
    law, slope, log_p, jacobian = empirical_law(data, x, t)
    moved = empirical_law(s * data @ q.T + c, s * q @ x + c, s * t)
    law = law._replace(mean=s * q @ law.mean + c)
    truth = law, q @ slope / s, log_p - D * np.log(s), q @ jacobian @ q.T / s**2
    close(moved, truth)


@jax.jit
def true_law(law, x, t):
    noised = mixture.log_prob(mixture.diffuse(law, VE, t), x)
    return mixture.log_prob(law, x), noised, mixture.score(law, VE)(x, t)


def known(name, seed):
    """A law of two components in NumPy."""
    places, widths = drawn(seed, 2, D), drawn(seed, 2, D, 1)[:, :, 0] ** 2
    log_weights = np.log([0.4, 0.6])
    if name == "boxes":
        return mixture.Boxes(log_weights, places, places + widths + 0.1, 0.3)
    factors = drawn(seed, 2, D, 2) if name == "planes" else None
    return mixture.Mixture(log_weights, places, widths + 0.1, factors)


def moved_law(law, s, c):
    law = law.moved(s, 0.0)
    places = set(law._fields) & {"means", "low", "high"}
    return law._replace(**{place: getattr(law, place) + c for place in places})


@pytest.mark.parametrize("name", ["normals", "planes", "boxes"])
@FEW
@given(SEEDS, SCALES)
def test_a_known_law_moves_with_its_parameters(x64, name, seed, s):
    """Scaled by `moved` and shifted; before any noise, too."""
    law, x, c = known(name, seed), drawn(seed, D), 2.0
    log_p, noised, slope = true_law(law, x, 0.5)
    found = true_law(moved_law(law, s, c), s * x + c, 0.5 * s)
    volume = D * np.log(s)
    np.testing.assert_allclose(found[:2], (log_p - volume, noised - volume), 1e-9)
    close(found[2], slope / s)


@jax.jit
def measured(law, data, t, key):
    """What has the unit 1 / length^2, and what has none."""
    asked = law, data, VE, t, key, 40
    (less, divergence, rest), kl = gap.sides(*asked), gap.kl(*asked)
    lam, offset = law.variances[0], data[0] - law.means[0]
    squares = less, divergence, rest, gap.one_point(lam, offset, VE, t)
    grid = jnp.array([1.0, 1.5, 4.0]) * t
    rates = gap.Estimate(1 / grid**2, 0.1 / grid**2)
    pure = (
        kl,
        gap.kl_integral(grid, rates, VE),
        gap.saturated_integral(lam, VE, t, 2 * t),
        gap.information_bound(lam, VE, t, 5),
    )
    return (*squares, gap.saturated(lam, VE, t)), pure


@pytest.mark.slow
@FEW
@given(SEEDS, SCALES)
def test_gaps_have_the_unit_of_a_squared_score(x64, seed, s):
    """Under the same key: each draw has moved, so the law is exact."""
    law, data, t, c = known("normals", seed), drawn(seed, 6, D), 0.6, 2.0
    key = jax.random.key(seed)
    squares, pure = measured(law, data, t, key)
    law = moved_law(law, s, c)
    moved = measured(law, s * data + c, s * t, key)
    close(moved, (jax.tree.map(lambda a: a / s**2, squares), pure), 1e-8)


@jax.jit
def flows(mean, variance, x, times, key):
    law = mixture.Mixture(jnp.zeros(1), mean[None], variance[None])
    score_fn = mixture.score(law, VE)
    return (
        sampling.path(score_fn, VE, times)(x),
        sampling.ode(score_fn, VE, times, "ddim")(x),
        sampling.sde(score_fn, VE, times)(x, key),
        sampling.edm(score_fn, VE, times, churn=1.0)(x, key),
    ), sampling.log_likelihood(score_fn, VE, times)(x)


@FEW
@given(SEEDS, SCALES)
def test_flows_move_with_their_start(x64, seed, s):
    """The noise that is added on the way scales with the times; the prior is at 0."""
    mean, variance, key = drawn(seed, D), drawn(seed, D) ** 2, jax.random.key(seed)
    times, x = np.array([3.0, 1.0, 0.5, 0.25]), 3 * drawn(seed + 1, D)
    ends, log_p = flows(mean, variance, x, times, key)
    for c in (0.0, 2.0):
        moved, there = flows(s * mean + c, s**2 * variance, s * x + c, s * times, key)
        close(moved, jax.tree.map(lambda end, c=c: s * end + c, ends), 1e-8)
        if not c:
            close(there, log_p - D * np.log(s), 1e-8)


@jax.jit
def steepness(data, x, t, key):
    score_fn = empirical.score(data, VE)
    forced = {"iters": 5, "symmetric": True}  # not converged: the law holds anyway
    return (
        lipschitz.empirical_bounds(data, VE, t),
        lipschitz.two_point(jnp.linalg.norm(data[0] - data[1]), VE, t),
        lipschitz.spectral_norm(score_fn, x, t, key, **forced)[:2],
    ), (lipschitz.midpoints(data, 4), lipschitz.segments(key, data, 4))


@FEW
@given(SEEDS, SCALES)
def test_steepness_has_the_unit_of_a_slope_of_the_score(x64, seed, s):
    """1 / length^2, and probes move with the data."""
    data, x, key = drawn(seed, 6, D), drawn(seed, D), jax.random.key(seed)
    slopes, probes = steepness(data, x, 0.5, key)
    moved = steepness(s * data + 2, s * x + 2, 0.5 * s, key)
    truth = [jax.tree.map(lambda a: a / s**2, slopes), s * np.stack(probes) + 2]
    close((moved[0], np.stack(moved[1])), (truth[0], truth[1]), 1e-8)


@FEW
@given(SEEDS)
def test_the_order_of_the_data_changes_no_bound_and_no_density(x64, seed):
    """And a rotation none in bounds."""
    data, x, q = drawn(seed, 6, D), drawn(seed, D), turned(seed)
    here = steepness(data, x, 0.5, jax.random.key(0))
    order = np.random.default_rng(seed).permutation(6)
    other = steepness(data[order] @ q.T, q @ x, 0.5, jax.random.key(0))
    close((other[0][0], other[1][0]), (here[0][0], here[1][0] @ q.T))
    many = drawn(seed, 24, D)
    order = np.random.default_rng(seed).permutation(24)
    close(empirical_law(many[order], x, 0.3), empirical_law(many, x, 0.3))


# Moves of samples and features. On a lattice of eighths, powers of 2 move exactly, so
# that not even a tie may be decided otherwise.


def lattice(seed, n, d=D):
    """n different points, many of them equally far from others."""
    cells = np.random.default_rng(seed).permutation(6**d)[:n]
    return np.stack(np.unravel_index(cells, [6] * d), axis=1) / 8


def moved_exactly(points, seed):
    """Scaled, shifted, coordinates exchanged and mirrored; and the scale."""
    rng = np.random.default_rng(seed)
    s, c = 2.0 ** rng.integers(-3, 4), rng.integers(-4, 5, D)
    order, signs = rng.permutation(D), rng.choice([-1, 1], D)
    return [s * (a[:, order] * signs + c) for a in points], s


@FEW
@given(SEEDS)
def test_memorization_sees_no_move_and_no_order(seed):
    """Distances scale; the ratio, AuthPct and twins stay what they are."""
    rng, data = np.random.default_rng(seed), lattice(seed, 16)
    near = data[:8] + rng.integers(-1, 2, (8, D)) / 8
    samples, held_out = np.concatenate([near, data[8:]]), lattice(seed + 1, 16)
    (far, at, new), s = moved_exactly((data, samples, held_out), seed)

    one = memorization.ratio(samples, data, held_out)
    other = memorization.ratio(at, far, new)
    np.testing.assert_array_equal(
        other.neighbours.distances, np.float32(s) * one.neighbours.distances
    )
    np.testing.assert_array_equal(other.neighbours.indices, one.neighbours.indices)
    np.testing.assert_array_equal(other.memorized, one.memorized)
    assert other[:4] == one[:4] and one.memorized.sum() >= 8

    own, far_own = (neighbours.nearest(a, a).distances[:, 1] for a in (data, far))
    authentic = memorization.authentic(one.neighbours, own)
    found = memorization.authentic(other.neighbours, far_own)
    np.testing.assert_array_equal(found, authentic)
    for alike in (memorization.calibrated_l2, lambda d: memorization.quotient(*d.T)):
        close(alike(other.neighbours.distances), alike(one.neighbours.distances))

    rows, points = rng.permutation(16), rng.permutation(16)
    mixed = memorization.ratio(samples[rows], data[points], held_out[::-1])
    np.testing.assert_array_equal(mixed.memorized, one.memorized[rows])
    assert mixed[:4] == one[:4]

    twins = memorization.reproducibility(samples, data)
    again = memorization.reproducibility(at, far)
    np.testing.assert_array_equal(again.close, twins.close)
    np.testing.assert_allclose(again.cosine, twins.cosine, atol=1e-5)


@FEW
@given(SEEDS)
def test_balls_see_no_move(seed):
    a, b = lattice(seed, 14), lattice(seed + 1, 11)
    (c, d), _ = moved_exactly((a, b), seed)
    for of in (fidelity.precision_recall, fidelity.density_coverage):
        assert of(c, d, 3) == of(a, b, 3)


@FEW
@given(SEEDS, SCALES)
def test_distances_of_features_scale_and_see_no_rotation(seed, s):
    """Frechet by s^2; the kernel distance and Vendi see angles about 0, so no shift."""
    a, b, q = drawn(seed, 9, D), 0.5 + drawn(seed, 12, D), turned(seed)
    c, d = (s * x @ q.T + 40 * s for x in (a, b))

    def frechet(a, b):
        return fidelity.frechet(a, b, warn=False)

    close(frechet(c, d), s**2 * frechet(a, b))
    close(frechet(b[::-1], a), frechet(a, b))
    squares = fidelity.squared_distances(a, b)
    close(fidelity.squared_distances(c, d), s**2 * squares)
    close(fidelity.kid(a @ q.T, b @ q.T), fidelity.kid(a, b))
    assert fidelity.vendi(s * a @ q.T) == pytest.approx(fidelity.vendi(a))
    twice = np.concatenate([a, 3 * a[::-1]])  # as diverse as once
    assert fidelity.vendi(twice) == pytest.approx(fidelity.vendi(a))


@FEW
@given(SEEDS, SCALES)
def test_the_worst_tile_moves_with_its_images(seed, s):
    a, b = drawn(seed, 2, 6, 4, 8, 3)
    truth = memorization.tiled_l2(a, b)
    close(memorization.tiled_l2(s * a + 2, s * b + 2), s * truth)
    for turn in (
        lambda x: x.swapaxes(1, 2),
        lambda x: x[:, ::-1],
        lambda x: x[:, :, ::-1],
    ):
        np.testing.assert_allclose(memorization.tiled_l2(turn(a), turn(b)), truth)
    # A larger tile is no nearer than the worst of the small ones in it.
    assert np.all(memorization.tiled_l2(a, b, 2) >= truth)


@FEW
@given(SEEDS)
def test_c_t_sees_ranks_alone(seed):
    """Of any increasing function of the distances; two samples exchanged: its sign."""
    x, y = np.abs(drawn(seed, 30)).round(1), np.abs(drawn(seed, 25)).round(1)
    cells = np.arange(30) % 2, np.arange(25) % 2
    value = memorization.copying_test(x, cells[0], y, cells[1], least=5)
    for rise in (np.log1p, lambda d: 7 * d**3 + 1):
        again = memorization.copying_test(rise(x), cells[0], rise(y), cells[1], least=5)
        np.testing.assert_array_equal(again.scores, value.scores)
    rows = np.random.default_rng(seed).permutation(30)
    again = memorization.copying_test(x[rows], cells[0][rows], y, cells[1], least=5)
    assert again.value == pytest.approx(value.value)
    one = memorization.copying_test(x, 0 * cells[0], y, 0 * cells[1])
    other = memorization.copying_test(y, 0 * cells[1], x, 0 * cells[0])
    assert other.value == pytest.approx(-one.value)


@FEW
@given(SEEDS)
def test_fld_sees_no_order(seed):
    """Of generated and held-out points; that of the training set cuts its halves."""
    sets = drawn(seed, 12, 2), drawn(seed, 9, 2), drawn(seed, 5, 2)
    rng = np.random.default_rng(seed)
    rows = rng.permutation(5)
    one = memorization.feature_likelihood(*sets)
    other = memorization.feature_likelihood(
        sets[0], rng.permutation(sets[1]), sets[2][rows]
    )
    np.testing.assert_allclose(other[:4], one[:4], rtol=1e-6)
    np.testing.assert_allclose(other.log_variances, one.log_variances[rows], atol=1e-5)


@FEW
@given(SEEDS, st.sampled_from([0.5, 3.0, 1_000.0]))
def test_how_many_points_are_memorized_has_the_unit_of_a_size(seed, s):
    sizes, rng = np.array([100.0, 200.0, 400.0, 800.0]), np.random.default_rng(seed)
    ratios = np.sort(rng.random(4))[::-1] * [1, 1, 1, 0] + [1, 0, 0, 0]
    found = memorization.effective_memorization(sizes, np.minimum(ratios, 1))
    again = memorization.effective_memorization(s * sizes, np.minimum(ratios, 1))
    assert again == pytest.approx(s * found)
    counts = rng.binomial(50, [[1.0] * 2, [0.95] * 2, [0.6] * 2, [0.1] * 2])
    ends = memorization.effective_interval(sizes, counts, 50, draws=50)
    again = memorization.effective_interval(s * sizes, counts, 50, draws=50)
    assert again == pytest.approx(tuple(s * end for end in ends))

    values, weights = rng.normal(size=6), rng.random(6) + 0.1
    once = memorization.decreasing(values, weights)
    np.testing.assert_allclose(memorization.decreasing(once, weights), once)
    np.testing.assert_allclose(once @ weights, values @ weights)
    moved = memorization.decreasing(s * values + 1, 7 * weights)
    np.testing.assert_allclose(moved, s * once + 1)


# Masks.


def network(seed):
    """The parameters of a DiT, as far as they differ: some of heads, some of none."""

    def weights(*shape):
        return np.float32(drawn(seed, *shape))

    block = {
        "attention": {
            "query": {"kernel": weights(5, 4, 3)},
            "out": {"kernel": weights(4, 3, 5), "bias": weights(5)},
        }
    }
    return {"patches": {"bias": weights(5)}, "block_0": block, "block_1": block}


def equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


@FEW
@given(SEEDS)
def test_masks_compose(seed):
    """Two after another, in any order, are their product, and the mask of both."""
    rng, params = np.random.default_rng(seed), network(seed)
    keeps = rng.random((2, 2, 4)) < 0.6
    one, other = (prune.head_mask(params, keep) for keep in keeps)
    both = prune.head_mask(params, keeps[0] & keeps[1])
    equal(both, prune.apply_mask(one, other))
    twice = prune.apply_mask(prune.apply_mask(params, one), other)
    equal(twice, prune.apply_mask(params, both))
    equal(twice, prune.apply_mask(prune.apply_mask(params, other), one))
    equal(twice, prune.apply_mask(twice, both))  # once is enough
    equal(twice, prune.apply_mask(twice, prune.full_mask(params)))
    # The out bias and the patches belong to no head.
    for layer, keep in enumerate(keeps[0] & keeps[1]):
        left = twice[f"block_{layer}"]["attention"]
        np.testing.assert_array_equal(np.any(left["query"]["kernel"], (0, 2)), keep)
        np.testing.assert_array_equal(np.any(left["out"]["kernel"], (1, 2)), keep)
        assert np.all(left["out"]["bias"]) and np.all(twice["patches"]["bias"])


@FEW
@given(
    st.lists(st.integers(0, 5), min_size=12, max_size=12),
    st.lists(st.floats(0, 0.99), min_size=2, max_size=2).map(sorted),
    st.integers(1, 3),
)
def test_more_pruning_takes_more_of_the_same_heads(importance, ratios, least):
    """Nested in the ratio, and by ranks alone; ties too."""
    importance = np.reshape(importance, (3, 4))
    few, many = (prune.keep_top(importance, ratio, least) for ratio in ratios)
    assert not np.any(many & ~few)
    assert few.sum(axis=1).min() >= least
    ranks = prune.keep_top(np.exp(3.0 * importance) - 2, ratios[1], least)
    np.testing.assert_array_equal(ranks, many)


# Gradients, in float64.


def check_slopes(f, *args, step=1e-5, rtol=1e-6):
    """Reverse mode against a central difference, along one direction in all of args.

    Of one combination of all outputs; a single number is as it is.
    Returns: the gradient.
    """
    rng, args = np.random.default_rng(0), jax.tree.map(np.asarray, args)

    @jax.jit
    @jax.value_and_grad
    def both(args):
        leaves = jax.tree.leaves(f(*args))
        return sum(jnp.sum(jnp.cos(jnp.arange(a.size)) * a.ravel()) for a in leaves)

    def moved(h):
        return both(jax.tree.map(lambda a, u: a + h * u, args, along))[0]

    along = jax.tree.map(lambda a: rng.normal(size=a.shape), args)
    slopes = both(args)[1]
    parts = jax.tree.map(lambda g, u: np.sum(np.asarray(g) * u), slopes, along)
    difference = float(moved(step) - moved(-step)) / (2 * step)
    np.testing.assert_allclose(sum(jax.tree.leaves(parts)), difference, rtol)
    return slopes


@pytest.mark.slow
def test_densities_obey_the_fokker_planck_equation(x64):
    """d log p / dt = -d f - f x.s + g^2 / 2 (tr ds/dx + |s|^2), of both laws."""
    made, step = process.variance_preserving(), 1e-6
    law, data = mixture.separated(jax.random.key(0), 2, D), jnp.asarray(drawn(0, 9, D))

    def densities(x, t):
        known = mixture.log_prob(mixture.diffuse(law, made, t), x)
        return jnp.stack([known, empirical.log_prob(data, made)(x, t)])

    @jax.jit
    @jax.vmap
    def both(x, t):
        f, g2 = process.drift(made, t), process.diffusion2(made, t)
        true = mixture.score(law, made)
        slopes = true(x, t), empirical.score(data, made)(x, t)
        known = jax.jacfwd(true)(x, t), empirical.jacobian(data, made, x, t)
        truth = [
            -D * f - f * x @ s + g2 / 2 * (jnp.trace(jacobian) + s @ s)
            for s, jacobian in zip(slopes, known, strict=True)
        ]
        rises = jax.vmap(densities, (None, 0))(x, t + step * jnp.array([-1.0, 1.0]))
        return (rises[1] - rises[0]) / (2 * step), jnp.stack(truth)

    close(*both(drawn(1, 4, D), np.array([0.05, 0.2, 0.5, 0.9])), 1e-8)


def test_a_known_density_has_the_slopes_of_its_differences(x64):
    """In every parameter of the law, too."""
    law = mixture.low_rank(jax.random.key(0), 2, D, noise=0.5)
    check_slopes(mixture.log_prob, law, drawn(1, D))


def test_the_empirical_score_is_the_slope_of_its_density(x64):
    """By reverse mode, over chunks; in every point, its weight and the time, too."""

    def density(x, data, t, log_weights):
        return empirical.log_prob(data, OU, 5, log_weights)(x, t)

    x, data, t, log_weights = drawn(1, D), drawn(0, 9, D), 0.3, drawn(2, 9)
    slopes = check_slopes(density, x, data, t, log_weights)
    score_fn = empirical.score(data, OU, log_weights=log_weights)
    close(slopes[0], jax.jit(score_fn)(x, t))


def test_losses_and_flows_have_the_gradients_of_their_differences(x64):
    """In the parameters of a score and in the start: for training through a sampler."""
    x0, eps, matrix = jnp.asarray(drawn(0, 4, D)), drawn(1, 4, D), drawn(2, D, D)
    times = jnp.array([2.0, 0.9, 0.4, 0.1])

    def of(matrix):
        return lambda x, t: -jnp.tanh(matrix @ x) - x / (1 + t)

    def losses(matrix):
        x = process.perturb(OU, x0, 0.5, eps)
        return (
            gap.denoising_loss(of(matrix), x, eps, OU, 0.5),
            gap.eps_loss(of(matrix), OU, x0[0], 0.5, eps[0]),
        )

    check_slopes(losses, matrix)

    def ends(matrix, x):
        score_fn = of(matrix)
        return (
            sampling.ode(score_fn, OU, times)(x),
            sampling.log_likelihood(score_fn, OU, times)(x),
        )

    check_slopes(ends, matrix, x0[0])


def test_the_slope_of_a_norm_is_the_product_of_its_singular_vectors(x64):
    """d |A| / dA = u v', through power iteration too: a penalty can be trained."""
    matrix, key = drawn(3, D, D), jax.random.key(0)

    def norms(matrix):
        at = (lambda x, t: matrix @ x), jnp.ones(D), 1.0
        return jnp.stack(
            [lipschitz.exact_norm(*at), lipschitz.jacobian_norm(*at, key, 60)]
        )

    slopes = jax.jit(jax.jacrev(norms))(matrix)
    u, singular, v = np.linalg.svd(matrix)
    assert singular[1] < 0.8 * singular[0]
    np.testing.assert_allclose(slopes, [np.outer(u[:, 0], v[0])] * 2, atol=1e-8)


@pytest.mark.parametrize(
    "model, step",
    [
        pytest.param(MLP(width=4, depth=1), 1e-5, id="mlp"),
        pytest.param(  # the softmax of its attention is of float32
            DiT(patch=2, width=8, depth=1, num_heads=2, dtype="float64"),
            1e-3,
            id="dit",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            UNet(width=4, depth=1, multipliers=(1,), attention=(), dtype="float64"),
            1e-5,
            id="unet",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_loss_of_a_network_has_the_gradient_of_its_differences(model, step, x64):
    x0, eps = jnp.asarray(drawn(0, 2, 4, 4, 1))
    shapes = jax.eval_shape(model.init, jax.random.key(0), x0, 0.5)["params"]
    params = jax.tree.map(lambda p: 0.3 * drawn(p.size, *p.shape), shapes)

    def loss(params):
        def apply(params, x, t):
            return model.apply({"params": params}, x, t)

        return train.noise_loss(apply, params, VE, x0, jnp.asarray(0.5), eps)

    check_slopes(loss, params, step=step, rtol=1e-6 if step < 1e-4 else 1e-3)
