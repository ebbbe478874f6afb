"""The ladder in closed form: its ends, its oracles, and no trace of chunks."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import OU, OU_FORMULA, SLOW_32, VE, T, alike, close, drawn, posterior

from memsep_jax import analytic, data, empirical, mixture, score

N, SHAPE = 9, (6, 5, 2)
WHOLE = 11  # 2 side - 1
IMAGES, X = drawn(0, N, *SHAPE), drawn(1, *SHAPE)
SHARES = np.where(np.arange(N) % 3 == 1, 0, 1.0 + np.arange(N) % 4)
SHARES /= SHARES.sum()
LOG_WEIGHTS = np.log(SHARES, out=np.full(N, -np.inf), where=SHARES > 0)
PIXELS = np.random.default_rng(2).integers(0, 256, (N, *SHAPE), np.uint8)

MAKERS = {
    "gaussian": analytic.gaussian,
    "local": lambda *args, **options: analytic.local(*args, 3, **options),
    "equivariant_local": lambda *args, **options: analytic.equivariant_local(
        *args, 3, **options
    ),
    "covariance_local": lambda *args, **options: analytic.covariance_local(
        *args, 0.3, **options
    ),
}
EVERY = pytest.mark.parametrize("name", MAKERS)


def window(image, i, j, side):
    """The patch around a pixel; 0 beyond the border."""
    r = side // 2
    return np.pad(image, ((r, r), (r, r), (0, 0)))[i : i + side, j : j + side]


def overhang(i, j, side):
    """How far a patch sticks out on the four sides."""
    (h, w, _), r = SHAPE, side // 2
    return [max(0, o) for o in (r - i, i + r + 1 - h, r - j, j + r + 1 - w)]


def places(i, j, side, anywhere):
    every = itertools.product(range(SHAPE[0]), range(SHAPE[1]))
    if not anywhere:
        return [(i, j)]
    return [at for at in every if overhang(*at, side) == overhang(i, j, side)]


def by_patches(images, shares, side, anywhere, x, t):
    """The score of `local` or `equivariant_local`, pixel by pixel in NumPy."""
    a, v, found = OU_FORMULA.alpha(t), OU_FORMULA.sigma(t) ** 2, np.empty(SHAPE)
    for i, j in itertools.product(range(SHAPE[0]), range(SHAPE[1])):
        kin = [
            (image, at, share)
            for image, share in zip(images, shares, strict=True)
            for at in places(i, j, side, anywhere)
        ]
        patches = np.stack([window(image, *at, side).ravel() for image, at, _ in kin])
        query = window(x, i, j, side).ravel()
        weights = posterior(patches, np.array([s for *_, s in kin]), a, v, query)[0]
        mean = sum(w * y[at] for w, (y, at, _) in zip(weights, kin, strict=True))
        found[i, j] = (a * mean - x[i, j]) / v
    return found


def moments(points, shares):
    """Mean and covariance, as their sums say."""
    mean = sum(w * p for w, p in zip(shares, points, strict=True))
    gaps = points - mean
    return mean, sum(w * np.outer(g, g) for w, g in zip(shares, gaps, strict=True))


def linear(points, shares, x, t):
    a, v = OU_FORMULA.alpha(t), OU_FORMULA.sigma(t) ** 2
    mean, covariance = moments(points, shares)
    noisy = a**2 * covariance + v * np.eye(len(x))
    return -np.linalg.solve(noisy, x - a * mean)


def by_covariance(points, shares, threshold, x, t):
    """The score of `covariance_local`, and the masks, number by number."""
    a, v = OU_FORMULA.alpha(t), OU_FORMULA.sigma(t) ** 2
    covariance = moments(points, shares)[1]
    noisy = a**2 * covariance + v * np.eye(len(x))
    wiener = np.abs(a**2 * covariance @ np.linalg.inv(noisy))
    masks = wiener >= threshold * wiener.max(1, keepdims=True)
    means = [
        posterior(points[:, seen], shares, a, v, x[seen])[0] @ points[:, i]
        for i, seen in enumerate(masks)
    ]
    return (a * np.array(means) - x) / v, masks


def truth(name, images, shares, x, t):
    flat, at = images.reshape(len(images), -1), x.ravel()
    if name == "gaussian":
        return linear(flat, shares, at, t).reshape(SHAPE)
    if name == "covariance_local":
        return by_covariance(flat, shares, 0.3, at, t)[0].reshape(SHAPE)
    return by_patches(images, shares, 3, name == "equivariant_local", x, t)


@EVERY
@SLOW_32
def test_a_score_is_a_loop_over_pixels_and_images(name, bits, real):
    """Two of three classes, points that count differently."""
    images = real(N, *SHAPE)
    form = jax.jit(MAKERS[name](np.asarray(images, f"f{bits // 8}"), OU,
                                log_weights=LOG_WEIGHTS))  # fmt: skip
    for t in (0.03125, T):
        a, sigma = OU_FORMULA.alpha(t), OU_FORMULA.sigma(t)
        x = np.float64(np.float32(a * images[3] + sigma * real(*SHAPE)))
        close(form(jnp.asarray(x), t), truth(name, images, SHARES, x, t), bits)


@pytest.mark.parametrize("side", [1, 3, 5, 7, WHOLE])
def test_patches_of_every_size_end_where_the_image_ends(side, x64):
    """Wider than the image, too; with sides 6 and 5, one of two ways at 5."""
    even = np.full(N, 1 / N)
    for make, anywhere in ((analytic.local, False), (analytic.equivariant_local, True)):
        form = jax.jit(make(IMAGES, OU, side))
        alike(form(X, T), by_patches(IMAGES, even, side, anywhere, X, T))


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "gaussian"])
@pytest.mark.parametrize("chunk", [1, 4, 30])
def test_the_chunk_size_leaves_no_trace(name, chunk, x64):
    forms = [MAKERS[name](IMAGES, OU, chunk=size) for size in (chunk, None)]
    alike(*(jax.jit(form)(X, 0.1) for form in forms))


def test_the_whole_image_is_the_empirical_score(x64):
    """Patches of 2 side - 1, and masks without a threshold."""
    forms = [
        analytic.local(IMAGES, OU, WHOLE),
        analytic.equivariant_local(IMAGES, OU, WHOLE),
        analytic.covariance_local(IMAGES, OU, 0.0),
    ]
    for t in (1e-3, T, 3.0):
        x = OU_FORMULA.alpha(t) * IMAGES[2] + OU_FORMULA.sigma(t) * X
        same = jax.jit(empirical.score(IMAGES, OU))(x, t)
        for form in forms:
            alike(jax.jit(form)(x, t), same)


def test_patches_of_one_pixel_are_empirical_scores_of_pixels(x64):
    """Of the pixels at the same place, and of all pixels."""
    at_place = jax.vmap(lambda y, x: empirical.score(y, OU)(x, T), (1, 0))
    flat, at = IMAGES.reshape(N, -1, SHAPE[2]), X.reshape(-1, SHAPE[2])
    own = jax.jit(at_place)(flat, at)
    alike(jax.jit(analytic.local(IMAGES, OU, 1))(X, T), own.reshape(SHAPE))
    every = jax.vmap(empirical.score(flat.reshape(-1, SHAPE[2]), OU), (0, None))
    form = jax.jit(analytic.equivariant_local(IMAGES, OU, 1))
    alike(form(X, T), jax.jit(every)(at, T).reshape(SHAPE))


def test_the_wiener_filter_of_independent_numbers_masks_all_others(x64):
    """The posterior is that of each number by itself."""
    signs = np.array(list(itertools.product([-1.0, 1.0], repeat=4)))
    points = signs * np.array([0.5, 1.0, 2.0, 3.0]) + 0.1
    alone = jax.vmap(lambda y, x: empirical.score(y, OU)(x, T), (1, 0))
    x = drawn(3, 4)
    form = jax.jit(analytic.covariance_local(points, OU, 0.01))
    alike(form(x, T), jax.jit(alone)(points[..., None], x[:, None])[:, 0])


def test_masks_that_leave_whole_blocks_out_are_the_masks(x64):
    """More numbers than a block has, in two parts that do not know of each other."""
    one, other = drawn(4, 60, 2), drawn(5, 60, 2)
    part = analytic.BLOCK + 4
    points = np.concatenate(
        [one @ drawn(6, 2, part), other @ drawn(7, 2, part)], axis=1
    )
    x = drawn(8, 2 * part)
    score_fn, masks = by_covariance(points, np.full(60, 1 / 60), 0.5, x, T)
    assert 0 < masks.mean() < 0.9
    alike(jax.jit(analytic.covariance_local(points, OU, 0.5))(x, T), score_fn, 1e-7)


def test_of_gaussian_data_it_is_the_true_score(x64):
    """Points mean +- sqrt(d) l_i have the mean and the covariance L L^T exactly."""
    d = 5
    factor, mean = drawn(9, d, d), drawn(10, d)
    spread = np.sqrt(d) * factor.T
    points = mean + np.concatenate([spread, -spread])
    law = mixture.Mixture(np.zeros(1), mean[None], np.zeros((1, d)), factor[None])
    for t in (1e-3, T, 3.0):
        x = OU_FORMULA.alpha(t) * (mean + factor @ drawn(11, d))
        ours = jax.jit(analytic.gaussian(points, OU))(x, t)
        alike(ours, jax.jit(mixture.score(law, OU))(x, t), 1e-8)


@pytest.mark.parametrize("n, d, chunk", [(30, 4, 7), (4, 30, 3), (1, 3, 1_024)])
def test_moments_are_mean_and_covariance_of_the_points(n, d, chunk):
    """In float64, of float32 points, from both sides of n = d."""
    points, shares = np.float32(drawn(12, n, d)), 1.0 + np.arange(n) % 3
    shares /= shares.sum()
    found = analytic.moments(points, np.log(shares), chunk)
    mean, covariance = moments(np.float64(points), shares)
    rank = min(n - 1, d)
    assert found.variances.shape == (rank,) and found.directions.shape == (d, rank)
    alike(found.mean, mean, 1e-12)
    np.testing.assert_allclose(found.directions.T @ found.directions, np.eye(rank),
                               atol=1e-10)  # fmt: skip
    again = (found.directions * found.variances) @ found.directions.T
    np.testing.assert_allclose(again, covariance, atol=1e-12)


def test_shifted_data_make_local_and_equivariant_local_agree(x64):
    """All cyclic shifts: the patches at one place are those at all places."""
    h, w, _ = SHAPE
    shifts = itertools.product(range(h), range(w))
    images = np.concatenate([np.roll(IMAGES[:3], s, (1, 2)) for s in shifts])
    forms = analytic.local, analytic.equivariant_local
    alike(*(jax.jit(form(images, OU, 3))(X, T) for form in forms))


@pytest.mark.parametrize("name", ["gaussian", "local", "covariance_local"])
def test_of_one_image_every_score_leads_to_it(name, x64):
    """n = 1: (alpha x_1 - x) / sigma^2."""
    closed = (OU_FORMULA.alpha(T) * IMAGES[0] - X) / OU_FORMULA.sigma(T) ** 2
    alike(jax.jit(MAKERS[name](IMAGES[:1], OU))(X, T), closed)


def test_of_one_image_the_equivariant_score_knows_all_its_places(x64):
    form = jax.jit(analytic.equivariant_local(IMAGES[:1], OU, 3))
    alike(form(X, T), by_patches(IMAGES[:1], np.ones(1), 3, True, X, T))


@pytest.mark.parametrize("make", [analytic.local, analytic.equivariant_local])
def test_a_patch_may_depend_on_time(make, x64):
    """A side holds up to its time, the last one for ever."""
    sides = {side: jax.jit(make(IMAGES, OU, side)) for side in (1, 5)}
    form = jax.jit(make(IMAGES, OU, ((0.1, 1), (1.0, 5))))
    for t, side in ((0.05, 1), (0.1, 1), (0.3, 5), (2.0, 5)):
        alike(form(X, t), sides[side](X, t))


@EVERY
def test_pixels_are_read_as_the_data_room_reads_them(name, x64):
    x, floats = np.float32(X), data.from_uint8(PIXELS)
    stored, read = (jax.jit(MAKERS[name](some, OU))(x, T) for some in (PIXELS, floats))
    np.testing.assert_allclose(stored, read, rtol=1e-4, atol=1e-4)


@EVERY
def test_the_points_of_a_class_alone_make_its_score(name, x64):
    labels = np.arange(N) % 3
    options = {"log_weights": empirical.labelled(labels, 2)}
    form = jax.jit(MAKERS[name](IMAGES, OU, **options))
    alike(form(X, T), jax.jit(MAKERS[name](IMAGES[labels == 2], OU))(X, T))


@pytest.mark.parametrize("name", ["local", "equivariant_local"])
def test_a_traced_label_without_points_is_no_wrong_number(name, x64):
    labels = np.arange(N) % 3

    @jax.jit
    def conditional(label):
        chosen = empirical.labelled(labels, label)
        return MAKERS[name](IMAGES, OU, log_weights=chosen)(X, T)

    assert np.isfinite(conditional(1)).all() and np.isnan(conditional(7)).all()


@EVERY
def test_a_batch_is_its_points(name, x64):
    """Also where each has its own time; and the denoiser follows from the score."""
    form, xs, times = MAKERS[name](IMAGES, OU), drawn(13, 3, *SHAPE), [0.1, 0.5, 2.0]
    both = jax.jit(jax.vmap(form))(xs, np.array(times))
    for x, t, one in zip(xs, times, both, strict=True):
        alike(jax.jit(form)(x, t), one)
    mean = jax.jit(jax.vmap(score.to_denoiser(form, OU)))(xs, np.array(times))
    a, v = (
        np.array([f(t) for t in times]) for f in (OU_FORMULA.alpha, OU_FORMULA.sigma)
    )
    a, v = (b.reshape(3, 1, 1, 1) for b in (a, v**2))
    alike((a * mean - xs) / v, both)


@pytest.mark.parametrize("make", [analytic.local, analytic.equivariant_local])
def test_float32_keeps_its_digits_where_the_noise_is_small(make):
    """Two images 2e-4 apart per pixel: |x|^2 - 2 x.y + |y|^2 would not see it."""
    rng = np.random.default_rng(14)
    first = rng.uniform(-1, 1, (16, 16, 3)).astype(np.float32)
    images = np.stack([first, first + np.float32(2e-4)])
    x, t, side = first + np.float32(8e-5), np.float32(1e-3), 9
    slope = jax.jit(score.to_denoiser(make(images, VE, side), VE))(x, t)
    rise = np.float64(slope) - first  # how much of the second image
    gaps = [
        np.sum(
            (window(np.float64(x), 8, 8, side) - window(np.float64(y), 8, 8, side)) ** 2
        )
        for y in images
    ]
    share = 1 / (1 + np.exp((gaps[1] - gaps[0]) / (2 * np.float64(t) ** 2)))
    assert 0.05 < share < 0.45  # the case is not degenerate
    np.testing.assert_allclose(rise[8, 8].mean() / 2e-4, share, atol=2e-3)


@EVERY
def test_memory_does_not_grow_with_batch_times_n(name):
    """Temporaries of the compiled program, from XLA's own accounting."""
    n, batch, shape = 512, 64, (8, 8, 1)
    images = np.float32(drawn(15, n, *shape))
    queries = jax.ShapeDtypeStruct((batch, *shape), jnp.float32)

    def temporaries(n, options):
        form = MAKERS[name](images[:n], OU, **options)
        run = jax.jit(lambda x: jax.vmap(form, (0, None))(x, 0.1))
        return run.lower(queries).compile().memory_analysis().temp_size_in_bytes

    options = {} if name == "gaussian" else {"chunk": 8}
    few, many = (temporaries(size, options) for size in (n // 4, n))
    assert few <= many <= 1.1 * few + 4 * n * 64
    assert many < n * batch * 64 * 4 / 4
    if options:  # what it would be at once
        assert temporaries(n, {"chunk": n}) > n * batch * 64 * 4 / 4


FEW = np.zeros((3, 4, 4, 1), np.float32)


@pytest.mark.parametrize(
    "make, message",
    [
        *(
            (lambda make=make, patch=patch: make(FEW, OU, patch), message)
            for make in (analytic.local, analytic.equivariant_local)
            for patch, message in (
                (2, "patch=2 must be odd"),
                (9, "patch=9 must be odd, .* from 1 to 7, which"),
                (0, "patch=0 must be"),
                (((0.1, 3), (0.2, 4)), "patch=4 must be odd"),
                (((0.2, 3), (0.1, 5)), "rising times"),
                ((), "pairs"),
            )
        ),
        (lambda: analytic.local(FEW[:, 0, 0], OU, 1), r"\(3, 1\) .* \[n, h, w, c\]"),
        (lambda: analytic.local(FEW, OU, 1, chunk=0), "chunks of 0"),
        (lambda: analytic.local(FEW, OU, 1)(FEW, 0.1), "jax.vmap"),
        (lambda: analytic.equivariant_local(FEW, OU, 1)(FEW, 0.1), "jax.vmap"),
        (lambda: analytic.equivariant_local(FEW[:0], OU, 1), "n=0"),
        (lambda: analytic.covariance_local(FEW, OU, 1.5), r"threshold=1.5 .* \[0, 1\]"),
        (lambda: analytic.gaussian(FEW / 0, OU), "NaN or infinity"),
        (lambda: analytic.gaussian(FEW, OU)(FEW[0], 0.0), "t=0.0 must be positive"),
        (
            lambda: analytic.moments(FEW, np.full(3, -np.inf)),
            "log_weights leave out every point",
        ),
        (
            lambda: analytic.local(FEW, OU, 1, log_weights=empirical.labelled(None, 3)),
            "label=3 was asked of data without labels",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:(divide|invalid)")
@pytest.mark.unchecked
def test_what_has_no_meaning_is_refused_before_it_is_compiled(make, message):
    with pytest.raises(ValueError, match=message):
        make()
