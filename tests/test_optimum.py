"""The two extremes: every sample is a training image, or as far off as fresh ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import optimum as configs
from memsep_jax import data, empirical, experiments, process, sampling
from memsep_jax.experiments import record
from memsep_jax.experiments.config import build

VE = process.variance_exploding()


def smooth(n, side):
    """uint8 images [n, side, side, 3] that are 4 x 4 random pixels, blown up."""
    coarse = np.random.default_rng(0).uniform(0, 255, (n, 4, 4, 3)).astype(np.float32)
    fine = jax.image.resize(coarse, (n, side, side, 3), "cubic")
    return np.asarray(jnp.clip(jnp.round(fine), 0, 255).astype(jnp.uint8))


def digits(n):
    return data.to_uint8(np.asarray(data.load("digits", n).x))


def copied(images, label, grids=(18,), method="heun", labels=None, **kw):
    """Samples of the optimum, EDM's steps from s = 80 to .002: which images they are.

    Args:
      images: uint8 [n, *e].   label: [m], of each sample; labels: [n], or None.
      grids: numbers of steps, each for m samples.
    Returns: [grids * m] indices; it fails where a sample is no image, to the last bit.
    """

    @jax.jit
    def draw(images, times, key):
        def one(key, label):
            wanted = None if labels is None else empirical.labelled(labels, label)
            score_fn = empirical.score(images, VE, log_weights=wanted)
            shape = images.shape[1:]
            return sampling.sampler(score_fn, VE, times, shape, method, **kw)(key)

        return jax.vmap(one)(jax.random.split(key, len(label)), label)

    place = {image.tobytes(): i for i, image in enumerate(images)}
    found = []
    for steps in grids:
        times = sampling.edm_times(0.002, 80.0, steps - 1)
        # Steps of length 0 change nothing: one program for all.
        times = jnp.pad(times, (0, max(grids) - steps), mode="edge")
        drawn = data.to_uint8(np.asarray(draw(images, times, jax.random.key(0))))
        found += [place[sample.tobytes()] for sample in drawn]
    return np.array(found)


@pytest.mark.parametrize(
    "grids, method, options",
    [
        ((4, 6, 10, 18, 40), "heun", {}),
        ((18,), "euler", {}),
        ((18,), "edm", {"churn": 40.0}),
    ],
)
def test_the_optimum_copies_a_hundred_images_bit_for_bit(grids, method, options):
    """Whatever the sampler and its number of steps (Gu 2023, section 2)."""
    found = copied(smooth(100, 16), jnp.zeros(4), grids, method, **options)
    assert len(found) == 4 * len(grids) and len(set(found)) > 1


def test_the_optimum_copies_a_thousand_digits_bit_for_bit():
    """The ratio is 1, since no two of the images are equal."""
    images = digits(1_000)
    assert len(np.unique(images, axis=0)) == 1_000
    assert len(set(copied(images, jnp.zeros(12)))) > 6


def test_the_conditional_optimum_copies_an_image_of_its_label():
    images, labels, asked = digits(100), np.arange(100) % 4, jnp.arange(12) % 4
    found = copied(images, asked, labels=labels)
    np.testing.assert_array_equal(labels[found], asked)
    assert len(set(found)) > 6


def test_with_unique_labels_the_denoiser_is_the_image_itself():
    """The constant y_c, to the last bit, at every x and noise (Gu 2023, section 2)."""
    images = data.from_uint8(digits(40))

    @jax.jit
    @jax.vmap
    def denoise(x, s, label):
        only = empirical.labelled(jnp.arange(40), label)
        return empirical.denoiser(images, VE, chunk=16, log_weights=only)(x, s)

    s, label = jnp.geomspace(0.002, 80, 9), jnp.arange(0, 36, 4)
    x = 80 * jax.random.normal(jax.random.key(0), (9, 8, 8, 1))
    np.testing.assert_array_equal(denoise(x, s, label), images[label])


@pytest.mark.slow
def test_the_optimum_copies_five_thousand_images_bit_for_bit():
    assert len(set(copied(smooth(5_000, 32), jnp.zeros(16)))) > 8


@pytest.mark.slow
def test_the_optimum_copies_fifty_thousand_images_bit_for_bit():
    """Streaming: batch x chunk numbers at a time, never batch x n."""
    assert len(set(copied(smooth(50_000, 8), jnp.zeros(16)))) > 8


@pytest.mark.slow
def test_the_conditional_optimum_of_fifty_thousand_copies_its_label():
    labels = np.random.default_rng(1).integers(0, 10_000, 50_000)
    asked = jnp.asarray(labels[:16])
    found = copied(smooth(50_000, 8), asked, labels=labels)
    np.testing.assert_array_equal(labels[found], asked)


def test_samples_are_of_labels_that_occur_and_are_drawn_uniformly(tmp_path, undrawn):
    """30 images with some of 30 labels, by the churned sampler: all are copies."""
    config = configs.get_config("labels")
    config.data.update(num_examples=30, num_labels=30)
    config.sampler.update(name="edm", churn=40.0, num_samples=40)
    config.run.chunk = 20
    experiments.run(config, tmp_path)
    found = record.read_json(tmp_path / "metrics.json")
    assert found["memorization"]["exact_copies"] == 40
    assert found["model"]["name"] == "empirical score of a label"

    train = data.load("digits", 30, labels="random", num_labels=30)
    images, labels = data.to_uint8(np.asarray(train.x)), np.asarray(train.label)
    present = np.unique(labels)
    assert len(present) < 1 + labels.max()  # or the test could not fail
    place = {image.tobytes(): i for i, image in enumerate(images)}
    samples = record.read_npz(tmp_path / "samples.npz")["samples"]
    copies = labels[[place[sample.tobytes()] for sample in samples]]
    key = build.keys(config.seed).sample
    for i, label in enumerate(copies[:12]):
        label_key = jax.random.split(jax.random.fold_in(key, i))[1]
        assert label == present[jax.random.randint(label_key, (), 0, len(present))]


def test_the_empirical_score_gives_bit_exact_copies(tmp_path, undrawn):
    config = configs.get_config("full")
    config.data.num_examples = 100
    config.sampler.num_samples = 40
    config.run.chunk = 20
    experiments.run(config, tmp_path)
    found = record.read_json(tmp_path / "metrics.json")["memorization"]
    assert found["ratio"] == 1.0 and found["exact_copies"] == 40
    samples = record.read_npz(tmp_path / "samples.npz")["samples"]
    train = data.to_uint8(np.asarray(data.load("digits", 100).x))
    known = {image.tobytes() for image in train}
    assert all(image.tobytes() in known for image in samples)


def test_the_truth_gives_the_null_level(tmp_path, undrawn):
    """In d = 2 the null level is about 3^-2, far from 0: a test that can fail."""
    config = configs.get_config("truth")
    config.data.update(d=2, num_examples=500)
    config.sampler.update(steps=60, num_samples=1_000)
    config.run.chunk = 500
    experiments.run(config, tmp_path)
    found = record.read_json(tmp_path / "metrics.json")["memorization"]
    error = np.sqrt(found["null"] * (1 - found["null"]) / 1_000)
    assert 0.05 < found["null"] < 0.2
    assert abs(found["ratio"] - found["null"]) < 4 * error


def test_guidance_needs_a_score_without_labels(tmp_path, undrawn):
    """The empirical score has one, and its guided samples are still copies."""
    config = configs.get_config("full")
    config.data.num_examples = 100
    config.sampler.update(num_samples=20, guidance=2.0)
    with pytest.raises(build.ConfigError, match="guidance=2.0 needs the scores with"):
        experiments.run(config, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    config.data.labels = "true"
    experiments.run(config, tmp_path / "guided")
    found = record.read_json(tmp_path / "guided" / "metrics.json")["memorization"]
    assert found["exact_copies"] == 20


def test_the_truth_of_images_is_not_known(tmp_path):
    config = configs.get_config("full")
    config.optimum.score = "truth"
    with pytest.raises(build.ConfigError, match="data.name=mixture has one"):
        experiments.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
