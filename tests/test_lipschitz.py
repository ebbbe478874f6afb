"""Spectral norms against closed forms: two points, one Gaussian, the paper's bounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from oracles import (
    FEW,
    OU,
    OU_FORMULA,
    RTOL,
    SCALES,
    SEEDS,
    SLOW_32,
    VE,
    D,
    T,
    alike,
    close,
    drawn,
    turned,
)
from scipy.spatial import Delaunay

from memsep_jax import empirical, lipschitz, mixture, process, sampling, score
from memsep_jax.models import MLP, Attention
from memsep_jax.models.exact import empirical_params
from memsep_jax.models.mlp import SILU_SLOPE, lipschitz_bound

POINTS = jnp.array([[0.0, 0.0, 0.0], [1.0, 2.0, 2.0]])  # 3 apart


def dense(data):
    """The empirical score without streaming, which takes longer to compile."""
    model, params = Attention(OU, len(data)), empirical_params(data)
    return lambda x, t: model.apply({"params": params}, x, t)


def test_midway_between_two_points_the_norm_is_two_point(x64, key):
    points = jnp.asarray(POINTS, jnp.float64)
    score_fn, middle = empirical.score(points, OU), lipschitz.midpoints(points, 5)[0]

    @jax.jit
    @jax.vmap
    def three(t):
        at = score_fn, OU.alpha(t) * middle, t
        power = lipschitz.jacobian_norm(*at, key)
        return lipschitz.exact_norm(*at), power, lipschitz.two_point(3.0, OU, t)

    exact, power, truth = three(jnp.array([0.02, 0.3, 2.0]))
    np.testing.assert_allclose(exact, truth, rtol=1e-10)
    np.testing.assert_allclose(power, truth, rtol=1e-6)


def test_the_bounds_of_the_paper_hold_where_the_score_is_probed(x64, key):
    """With the condition for 1/16 D_min^2 (at .005) and without it (at .5)."""
    data = 3 * jax.random.normal(key, (12, 2))
    score_fn, middles = dense(data), lipschitz.midpoints(data, 66)
    grid = jnp.linspace(-6.0, 6.0, 25)
    grid = jnp.stack(jnp.meshgrid(grid, grid), axis=-1).reshape(-1, 2)

    @jax.jit
    def probed(t):
        probes = jnp.concatenate([grid, OU.alpha(t) * middles])
        norms = jax.vmap(lambda x: lipschitz.exact_norm(score_fn, x, t))(probes)
        low, high = lipschitz.empirical_bounds(data, OU, t)
        return low, norms.max(), high, 1 / OU.sigma(t) ** 2

    result = np.array([probed(t) for t in (0.0005, 0.05, 0.5)])
    low, largest, high, always = result.T
    assert np.all(low <= largest * (1 + 1e-9)) and np.all(largest <= high * (1 + 1e-9))
    assert np.all(largest >= always * (1 - 1e-9))
    assert low[0] > 1.01 * always[0]  # the paper's, not 1/v
    np.testing.assert_allclose(low[2], always[2])


def test_the_explosion_is_between_the_points_and_not_at_them(x64, key):
    """sigma^-4 at midpoints; 1/v in the median at noised training points."""
    data = 3 * jax.random.normal(key, (20, 4))
    score_fn = dense(data)
    between = jax.jit(lambda xs, t: lipschitz.local(score_fn, xs, t, key))
    at = jax.jit(jax.vmap(lambda x, t: lipschitz.exact_norm(score_fn, x, t), (0, None)))
    scaled = []
    for t in (1e-2, 1e-3):
        v = OU.sigma(t) ** 2
        probe = OU.alpha(t) * lipschitz.midpoints(data, 1)
        scaled.append(v**2 * between(probe, t))
        eps = jax.random.normal(key, data.shape)
        norms = at(process.perturb(OU, data, t, eps), t)
        np.testing.assert_allclose(jnp.median(norms) * v, 1, rtol=1e-6)
    np.testing.assert_allclose(scaled[1], scaled[0], rtol=0.05)


# Eigenvalues.


@pytest.mark.parametrize("iters", [3, 6, 9])
def test_eigenvalues_are_exact_once_there_are_d_of_them(iters, x64, key):
    """Of the symmetric part; before that they lie between its ends."""
    matrix = jax.random.normal(key, (6, 6))
    truth = np.linalg.eigvalsh((matrix + matrix.T) / 2)
    at = jnp.ones((2, 3)), 0.3, jax.random.key(1)

    def field(x, t):
        return (matrix @ x.reshape(-1)).reshape(2, 3)

    found = np.asarray(jax.jit(lambda: lipschitz.eigenvalues(field, *at, iters))())
    assert len(found) == min(iters, 6) and np.all(np.diff(found) > 0)
    if iters < 6:
        assert truth[0] < found[0] and found[-1] < truth[-1]
    else:
        np.testing.assert_allclose(found, truth, rtol=1e-10)


@SLOW_32
def test_few_iterations_find_both_ends_of_a_large_spectrum(bits, key):
    """100 values with two that stand out, as a copy's neighbours make them."""
    values = jnp.concatenate(
        [jnp.array([-40.0]), jnp.linspace(-9, -8, 98), jnp.ones(1)]
    )
    turn = jnp.linalg.qr(jax.random.normal(key, (100, 100)))[0]

    def field(x, t):
        turned = jnp.matmul(turn, x, precision="highest") * values
        return jnp.matmul(turned, turn, precision="highest")

    x = jnp.zeros(100)
    found = jax.jit(lambda: lipschitz.eigenvalues(field, x, 0.1, key, 12))()
    np.testing.assert_allclose(found[jnp.array([0, -1])], [-40, 1], rtol=1e-5)


@SLOW_32
def test_a_multiple_of_the_identity_has_one_eigenvalue(bits, key):
    """Its Krylov spaces have one dimension."""
    at = jnp.ones(5), 0.1, key
    found = jax.jit(lambda: lipschitz.eigenvalues(lambda x, t: -x / t**2, *at, 5))()
    np.testing.assert_allclose(found, [-100] * 5, rtol=1e-5)


# The error estimate.


def linear(matrix):
    return lambda x, t: matrix @ x


@pytest.mark.parametrize("iters", [1, 3, 10, 200])
@pytest.mark.parametrize("field", [linear, lambda m: linear(m + m.T)])
def test_the_error_is_that_of_the_singular_value_found(field, iters, x64, key):
    """|s^2 - rho| <= r for some s, at any number of products; in the end, the top."""
    matrices = jax.random.normal(key, (20, 6, 6))

    @jax.jit
    @jax.vmap
    def result(matrix, key):
        norm = lipschitz.spectral_norm(field(matrix), jnp.zeros(6), 1.0, key, iters)
        jacobian = jax.jacfwd(lambda x: field(matrix)(x, 1.0))(jnp.zeros(6))
        return norm, jnp.linalg.svd(jacobian, compute_uv=False)

    norm, singular = jax.tree.map(
        np.asarray, result(matrices, jax.random.split(key, 20))
    )
    rho, high = norm.value**2, (norm.value + norm.error) ** 2
    nearest = np.min(abs(singular**2 - rho[:, None]), axis=1)
    assert np.all(nearest <= (high - rho) + 1e-12 * rho)
    assert np.all(norm.value <= singular[:, 0] * (1 + 1e-12))
    np.testing.assert_array_equal(norm.converged, norm.error <= 1e-3 * norm.value)
    if iters == 200:
        np.testing.assert_allclose(norm.value, singular[:, 0], rtol=1e-3)
        assert np.mean(norm.converged) > 0.9


def test_some_singular_value_is_within_the_error(x64, key):
    """From a start in an invariant plane, where the iteration cannot leave."""
    matrix = jnp.diag(jnp.array([1.0, 2.0, 5.0]))

    def field(x, t):  # blind to the steepest direction
        return matrix @ (x * jnp.array([1.0, 1.0, 0.0]))

    result = jax.jit(lambda: lipschitz.spectral_norm(field, jnp.ones(3), 1.0, key))()
    assert bool(result.converged) and result.error < 1e-10
    np.testing.assert_allclose(result.value, 2.0, rtol=1e-12)


def test_forward_mode_alone_gives_the_norm_of_a_score(x64, key):
    """J = J', whose largest singular value may be a negative eigenvalue."""
    data = 3 * jax.random.normal(key, (6, 3))
    score_fn = empirical.score(data, OU)
    xs = jnp.stack([data[0], *OU.alpha(0.2) * lipschitz.midpoints(data, 2)])

    @jax.jit
    @jax.vmap
    def three(x):
        at = score_fn, x, 0.2
        power = lipschitz.spectral_norm(*at, key, 200, symmetric=True)
        return power, lipschitz.jacobian_norm(*at, key, 200), lipschitz.exact_norm(*at)

    power, plain, exact = three(xs)
    np.testing.assert_allclose(power.value, plain, rtol=1e-9)
    np.testing.assert_allclose(power.value, exact, rtol=1e-6)
    assert np.all(power.converged)


@pytest.mark.parametrize("t", [1e-5, 1e-4])
def test_float32_measures_norms_of_1e10(t, key):
    """Powers of sigma^-4 overflow; unit vectors do not."""
    points = 3 * POINTS  # 9 apart
    truth = lipschitz.two_point(9.0, OU, t)
    at = OU.alpha(t) * lipschitz.midpoints(points, 1)[0]
    field = linear(empirical.jacobian(points, OU, at, t))
    result = jax.jit(lambda: lipschitz.spectral_norm(field, at, t, key))()
    assert bool(result.converged)
    np.testing.assert_allclose(result.value, truth, rtol=1e-3)


def test_a_flat_field_has_norm_zero(key):
    result = lipschitz.spectral_norm(lambda x, t: 0 * x, jnp.ones(3), 1.0, key)
    assert result == (0, 0, True)


def test_what_does_not_converge_says_so(x64, key):
    """Two products cannot turn a random vector, and NaN never converges."""
    matrix = jnp.diag(jnp.linspace(1.0, 2.0, 50))

    @jax.jit
    def norm(matrix):
        return lipschitz.spectral_norm(linear(matrix), jnp.ones(50), 1.0, key, 2)

    few, nan = norm(matrix), norm(matrix * jnp.nan)
    assert not few.converged and few.value + few.error < 2
    assert not nan.converged


@pytest.mark.parametrize("probes", [2, 400])
def test_the_frobenius_norm_of_random_signs_is_within_its_error(probes, x64, key):
    matrix = jax.random.normal(key, (6, 6))
    at = jnp.ones((2, 3)), 1.0

    def field(x, t):
        return (matrix @ x.reshape(-1)).reshape(x.shape)

    keys = jax.random.split(jax.random.key(1), 50)
    one = jax.jit(jax.vmap(lambda k: lipschitz.frobenius(field, *at, k, probes)))
    values, errors = map(np.asarray, one(keys))
    truth = jnp.linalg.norm(matrix)
    mean = np.sqrt(np.mean(values**2))  # the squares are unbiased
    assert abs(mean - truth) < 4 * np.std(values) / np.sqrt(50)
    if probes == 400:  # the error is that of a value
        assert np.std(values) == pytest.approx(np.mean(errors), rel=0.4)


def test_the_frobenius_norm_of_a_diagonal_is_exact(x64, key):
    """The signs square away."""
    variances = jnp.array([[0.2, 0.9, 4.0]])
    truth = mixture.score(
        mixture.Mixture(jnp.zeros(1), jnp.ones((1, 3)), variances), OU
    )
    one = jax.jit(lambda x: lipschitz.frobenius(truth, x, 0.3, key, 4))
    value, error = one(jnp.zeros(3))
    slopes = 1 / (OU.sigma(0.3) ** 2 + OU.alpha(0.3) ** 2 * variances)
    np.testing.assert_allclose(value, jnp.linalg.norm(slopes), rtol=1e-12)
    assert error < 1e-12


# Probes.


@pytest.mark.parametrize("m", [1, 7, 1_000])
def test_streamed_midpoints_are_those_of_all_sorted_pairs(m, x64, key):
    data = jax.random.normal(key, (20, 2, 2))
    pairs = np.array(np.triu_indices(20, k=1))
    squares = np.sum((np.asarray(data)[pairs[0]] - data[pairs[1]]) ** 2, axis=(1, 2))
    first, second = pairs[:, np.argsort(squares)[:m]]
    result = jax.jit(lipschitz.midpoints, static_argnums=1)(data, m)
    np.testing.assert_array_equal(result, (data[first] + data[second]) / 2)


def test_nothing_lies_between_copies():
    data = jnp.array([[0.0], [4.0], [0.0], [5.0]])
    result = lipschitz.midpoints(data, 6)[:, 0]
    np.testing.assert_array_equal(result, [4.5, 2.0, 2.0, 2.5, 2.5, 0.0])


def test_memory_grows_with_n_and_not_with_its_square():
    n, d = 10_000, 32
    data = jax.ShapeDtypeStruct((n, d), jnp.float32)
    for function in (
        lambda data: lipschitz.midpoints(data, 100),
        lambda data: lipschitz.empirical_bounds(data, OU, 0.1),
    ):
        compiled = jax.jit(function).lower(data).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 8 * 4 * n * d


def test_the_norm_of_a_streaming_score_does_not_keep_batch_times_n(key):
    """Temporaries of the compiled program, from XLA's own accounting."""
    points = jax.ShapeDtypeStruct((4_096, 8), jnp.float32)
    queries = jax.ShapeDtypeStruct((512, 8), jnp.float32)

    def norms(data, xs):
        score_fn = empirical.score(data, OU, chunk=64)
        return jax.vmap(
            lambda x: lipschitz.jacobian_norm(score_fn, x, 0.1, key, 2, symmetric=True)
        )(xs)

    compiled = jax.jit(norms).lower(points, queries).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4_096 * 512 * 4 / 2


def test_segments_join_different_points(key):
    """Of 0, 1, 3: each of the three midpoints a third of the time."""
    data = jnp.array([[0.0], [1.0], [3.0]])
    result = np.asarray(lipschitz.segments(key, data, 3_000))[:, 0]
    for middle in (0.5, 1.5, 2.0):
        share = np.mean(result == middle)
        assert abs(share - 1 / 3) < 4 * np.sqrt(2 / 9 / 3_000)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_sharp_limit_is_the_longest_delaunay_edge(seed, x64):
    """v^2 Lip / a^2 -> (longest Delaunay edge)^2 / 4, along every bisector."""
    data = jax.random.normal(jax.random.key(seed), (8, 2))
    edges = np.concatenate(
        [np.asarray(data)[Delaunay(data).simplices[:, c]] for c in ([0, 1], [1, 2])]
        + [np.asarray(data)[Delaunay(data).simplices[:, [0, 2]]]]
    )
    longest = np.max(np.sum((edges[:, 0] - edges[:, 1]) ** 2, axis=1))
    farthest = np.max(np.sum((data[:, None] - data[None]) ** 2, axis=2))
    assert farthest > 1.01 * longest  # the plain bound is not sharp

    t = 1e-4
    a, v = OU.alpha(t), OU.sigma(t) ** 2
    first, second = np.triu_indices(8, k=1)
    normal = (data[first] - data[second]) @ jnp.array([[0.0, 1.0], [-1.0, 0.0]])
    steps = jnp.geomspace(0.01, 300.0, 80)
    steps = jnp.concatenate([-steps, steps])[:, None, None]
    probes = a * (
        (data[first] + data[second])[None] / 2 + steps * normal[None]
    ).reshape(-1, 2)
    norm = jax.vmap(
        lambda x: jnp.linalg.norm(empirical.jacobian(data, OU, x, t), ord=2)
    )
    scaled = v**2 / a**2 * jnp.max(jax.jit(norm)(probes))
    np.testing.assert_allclose(scaled, longest / 4 - v / a**2, rtol=1e-6)


def test_on_a_line_the_longest_gap_is_the_steepest(x64):
    data, t = jnp.array([[0.0], [1.0], [2.5], [6.0], [6.5]]), 1e-2
    score_fn = dense(data)
    a, v = OU.alpha(t), OU.sigma(t) ** 2
    line = a * jnp.linspace(-1.0, 8.0, 90 * 20 + 1)[:, None]
    norms = jax.jit(jax.vmap(lambda x: lipschitz.exact_norm(score_fn, x, t)))(line)
    np.testing.assert_allclose(v**2 / a**2 * norms.max(), 3.5**2 / 4 - v / a**2)
    np.testing.assert_allclose(line[norms.argmax()], a * 4.25)


def test_along_a_flow_of_one_gaussian_each_time_has_its_own_norm(x64, key):
    """1 / (v + a^2 lam_min) at each time, on every trajectory."""
    variances = jnp.array([[0.2, 1.0, 4.0]])
    truth = mixture.Mixture(jnp.zeros(1), jnp.ones((1, 3)), variances)
    score_fn, times = mixture.score(truth, OU), sampling.log_times(0.01, 1.0, 4)
    xs = jax.random.normal(key, (2, 3))
    result = jax.jit(
        lambda xs: lipschitz.along(score_fn, OU, times, xs, key, symmetric=True)
    )(xs)
    closed = 1 / (OU.sigma(times) ** 2 + OU.alpha(times) ** 2 * 0.2)
    assert result.value.shape == result.error.shape == (2, 5)
    np.testing.assert_allclose(result.value, jnp.stack([closed, closed]), rtol=1e-6)
    assert np.all(result.converged)


def test_along_looks_at_the_points_of_the_path(x64, key):
    """A field that is as steep as x is large, and trajectories that go nowhere."""

    def field(x, t):
        return x**2 / 2

    still = process.Process(jnp.ones_like, lambda t: jnp.ones_like(t))  # f = g = 0
    xs = jnp.array([[1.0, -2.0], [3.0, 0.5]])
    times = jnp.array([1.0, 0.5])
    result = jax.jit(lambda xs: lipschitz.along(field, still, times, xs, key))(xs).value
    np.testing.assert_allclose(result, [[2.0, 2.0], [3.0, 3.0]], rtol=1e-6)


# Bounds of networks.


def random_params(model, x, scale=0.5):
    params = jax.jit(model.init)(jax.random.key(0), x, 0.1)["params"]
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    new = [
        scale * jax.random.normal(k, p.shape) for k, p in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, new)


@pytest.mark.parametrize("depth", [0, 3])
def test_no_mlp_is_steeper_than_the_product_of_its_layers(depth, x64, key):
    model = MLP(width=6, depth=depth)
    params = random_params(model, jnp.zeros(4))
    bound = jax.jit(lipschitz_bound)(params)

    def network(x, t):
        return model.apply({"params": params}, x, t)

    xs = 3 * jax.random.normal(key, (40, 4))
    ts = jnp.linspace(0.01, 3.0, 40)
    exact = lambda x, t: lipschitz.exact_norm(network, x, t)  # noqa: E731
    norms = jax.jit(jax.vmap(exact))(xs, ts)
    assert norms.max() <= bound
    assert norms.max() > 0.05 / 3**depth * bound  # and it is not vacuous


@pytest.mark.parametrize("depth", [0, 2])
def test_the_bound_is_attained_where_every_silu_is_steepest(depth, x64):
    """Width 1, positive weights, biases that put each silu at its steepest point."""
    model, steepest = MLP(width=1, depth=depth), 2.399357280515468
    top = jax.nn.silu(steepest)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(1), 0.1)["params"]
    params = jax.tree.map(lambda p: jnp.zeros(p.shape), shapes)

    def dense(kernel, bias):
        return {"kernel": jnp.full((1, 1), kernel), "bias": jnp.full(1, bias)}

    params |= {"input": dense(0.7, steepest), "output": dense(1.3, 0.0)}
    for i in range(depth):
        params[f"block_{i}_in"] = dense(2.0, steepest - 2.0 * top)
        params[f"block_{i}_out"] = dense(0.8, -0.8 * top)
    slope = jax.jit(
        lambda x: lipschitz.exact_norm(
            lambda x, t: model.apply({"params": params}, x, t), x, 0.1
        )
    )(jnp.zeros(1))
    np.testing.assert_allclose(lipschitz_bound(params), slope, rtol=1e-9)
    grid = jnp.linspace(2.3, 2.5, 20_001)
    assert 0 <= SILU_SLOPE - jax.vmap(jax.grad(jax.nn.silu))(grid).max() < 1e-9


@pytest.mark.parametrize("name", score.PREDICTIONS)
def test_the_bound_of_a_score_is_attained_by_a_linear_network(name, x64):
    """F(x) = c x, c of the sign that adds to what is kept of x; else it is a bound."""
    prediction = score.PREDICTIONS[name](OU)

    @jax.jit
    @jax.vmap
    def both(t):
        norms = [
            lipschitz.exact_norm(
                score.from_network(lambda x, _, c=c: c * x, prediction, OU),
                jnp.ones(2),
                t,
            )
            for c in (1.7, -1.7)
        ]
        return jnp.stack(norms), lipschitz.network_bound(1.7, prediction, OU, t)

    norms, bound = both(jnp.array([0.01, 0.3, 2.0]))
    np.testing.assert_allclose(norms.max(axis=1), bound, rtol=1e-12)


def test_what_has_no_meaning_is_refused(key):
    with pytest.raises(ValueError, match="iters=0"):
        lipschitz.jacobian_norm(lambda x, t: x, jnp.ones(2), 0.1, key, iters=0)
    with pytest.raises(ValueError, match="n >= 2"):
        lipschitz.midpoints(jnp.ones((1, 2)), 1)
    with pytest.raises(ValueError, match="n=1 points"):
        lipschitz.empirical_bounds(jnp.ones((1, 2)), OU, 0.1)
    with pytest.raises(ValueError, match="tolerance=0 must be positive"):
        lipschitz.spectral_norm(lambda x, t: x, jnp.ones(2), 0.1, key, tolerance=0)
    with pytest.raises(ValueError, match="probes=1 must be at least 2"):
        lipschitz.frobenius(lambda x, t: x, jnp.ones(2), 0.1, key, probes=1)
    with pytest.raises(ValueError, match="iters=0 must be at least 1"):
        lipschitz.eigenvalues(lambda x, t: x, jnp.ones(2), 0.1, key, iters=0)
    with pytest.raises(ValueError, match="m=0 of n=3"):
        lipschitz.segments(key, jnp.ones((3, 2)), 0)
    pixels = jnp.ones((3, 2), jnp.uint8)
    for refuses in (
        lambda: lipschitz.midpoints(pixels, 2),
        lambda: lipschitz.segments(key, pixels, 2),
        lambda: lipschitz.empirical_bounds(pixels, OU, 0.1),
    ):
        with pytest.raises(ValueError, match="dtype uint8 have no distances"):
            refuses()
    with pytest.raises(ValueError, match="t=0 must be positive"):
        lipschitz.two_point(1.0, OU, 0)


@SLOW_32
def test_norms_of_a_jacobian_are_its_singular_values(bits, real):
    """Of x -> A x + t sin x, not symmetric, at three points."""
    matrix, xs = real(4, 4), real(3, 2, 2)

    @jax.jit
    def ours(matrix, xs, t, key):
        def field(x, t):
            return (matrix @ x.ravel()).reshape(2, 2) + t * jnp.sin(x)

        return (
            lipschitz.local(field, xs, t, key, 150),
            jax.vmap(lambda x: lipschitz.exact_norm(field, x, t))(xs),
            jax.vmap(lambda x: lipschitz.spectral_norm(field, x, t, key, 150))(xs),
        )

    largest, exact, norm = ours(matrix, xs, T, jax.random.key(1))
    truth = []
    for x in xs:
        singular = np.linalg.svd(matrix + T * np.diag(np.cos(x.ravel())))[1]
        assert singular[1] < 0.9 * singular[0]  # .81^150 is 2e-14
        truth.append(singular[0])
    for got in (exact, norm.value):
        close(got, np.array(truth), bits)
    close(largest, np.max(truth), bits)
    assert norm.converged.all()
    # Of first order in an angle to which rounding keeps the direction.
    assert np.all(norm.error < np.sqrt(RTOL[bits]) * np.array(truth))


def test_bounds_are_loops_over_pairs(bits, real):
    data = real(5, 2, 2)
    copies = np.concatenate([data, data[:1]])
    times = np.array([0.03125, 0.25, 0.9375])

    @jax.jit
    @jax.vmap
    def ours(t):
        bounds = [lipschitz.empirical_bounds(jnp.asarray(d), OU, t) for d in sets]
        return *bounds[0], *bounds[1], lipschitz.two_point(1.25, OU, t)

    sets = [data, copies]
    result = ours(times)
    for i, t in enumerate(times):
        a2, v = OU_FORMULA.alpha(t) ** 2, OU_FORMULA.sigma(t) ** 2
        truth = []
        for points in sets:
            n = len(points)
            squares = [
                np.sum((points[i] - points[j]) ** 2) for i in range(n) for j in range(i)
            ]
            apart = (n - 2) * np.exp(-a2 * min(squares) / (4 * v)) <= 2
            low = a2 * min(squares) / (16 * v**2) - 1 / v if apart else 1 / v
            truth.append(max(low, 1 / v))
            truth.append(max(a2 * max(squares) / (4 * v**2) - 1 / v, 1 / v))
        gap_of_two = np.array([1.25, 0.0])
        slope = a2 * np.outer(gap_of_two, gap_of_two) / (4 * v**2) - np.eye(2) / v
        truth.append(np.linalg.norm(slope, ord=2))
        for got, want in zip(result, truth, strict=True):
            close(got[i], np.float64(want), bits)


def test_the_papers_bound_waits_until_two_points_decide(x64):
    """Points on a line, 1 apart: (n - 2) exp(-E) <= 2, E = (alpha / 2)^2 / v."""
    n = 10_000
    data = jnp.arange(float(n))[:, None]
    times = [OU_FORMULA.time(1 / np.sqrt(4 * energy)) for energy in (8.4, 8.6)]
    bounds = jax.jit(lambda data, t: lipschitz.empirical_bounds(data, OU, t))
    for t, energy, holds in zip(times, (8.4, 8.6), (False, True), strict=True):
        v = OU_FORMULA.sigma(t) ** 2
        assert ((n - 2) * np.exp(-energy) <= 2) == holds
        low, high = bounds(data, t)
        close(low, np.float64((energy / 4 - 1 if holds else 1) / v), 64)
        close(high, np.float64((energy * (n - 1) ** 2 - 1) / v), 64)


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
    alike((moved[0], np.stack(moved[1])), (truth[0], truth[1]), 1e-8)


@FEW
@given(SEEDS)
def test_bounds_see_no_order_and_no_rotation_of_the_data(x64, seed):
    data, x, q = drawn(seed, 6, D), drawn(seed, D), turned(seed)
    here = steepness(data, x, 0.5, jax.random.key(0))
    moved = np.random.default_rng(seed).permutation(data) @ q.T
    other = steepness(moved, q @ x, 0.5, jax.random.key(0))
    alike((other[0][0], other[1][0]), (here[0][0], here[1][0] @ q.T))


def test_the_slope_of_a_norm_is_its_singular_vectors(x64):
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
