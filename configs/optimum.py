"""The theoretical optimum of Gu 2023: sampling with the exact empirical score.

python -m memsep_jax.main --config=configs/optimum.py

Every sample is a training image, to the last bit: 1,000 of 1,000 in 8 seconds on 2 CPU
cores. Variants: `full` (1,000 digits), `cifar` (5,000 images of an npz,
--config.data.path: 100 of 100, 19 seconds), `labels` (the score of the points with one
of 10 random labels: 1,000 of 1,000 are copies), `truth` (the other extreme: the true
score of a mixture gives the null level, 0.01 % where held-out points give 0.01 %),
`smoke`.
"""

from memsep_jax import defaults


def get_config(variant="full"):
    config = defaults.train()
    config.experiment = "optimum"
    config.optimum.score = "empirical"
    config.data.update(name="digits", num_examples=1_000)
    config.model.update(patch=4, num_heads=4)
    config.sampler.update(num_samples=1_000)
    return defaults.variant_of(config, variant, cifar=cifar, labels=labels, truth=truth)


def cifar(config):
    """5,000 images of 32 x 32 x 3."""
    config.data.update(name="npz", num_examples=5_000)
    config.sampler.update(num_samples=100)
    config.run.update(chunk=50)
    return config


def labels(config):
    """The same digits, each with one of 10 random labels."""
    config.data.update(labels="random", num_labels=10)
    return config


def truth(config):
    """The true score of a mixture in 8 dimensions, in the papers' OU process."""
    config.optimum.score = "truth"
    config.data.update(name="mixture", num_examples=1_000, k=8, d=8, scale=2.0)
    config.process.name = "ornstein_uhlenbeck"
    defaults.switch(config, model="mlp")
    config.sampler.update(grid="log", t_min=1e-3, t_max=8.0, steps=200)
    config.sampler.num_samples = 10_000
    config.run.chunk = 1_000
    return config
