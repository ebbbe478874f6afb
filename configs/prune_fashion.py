"""Does pruning heads by small-t gradients help on photographs? Clothes, 28 x 28.

python -m memsep_jax.main --config=configs/prune_fashion.py:small

The images are found as in configs/fashion.py. Algorithm 1 of Ye 2025 beside random
pruning, uniform times, the negative control and the unpruned network with the same
fine-tuning. With --config.measure.features=alexnet --config.measure.weights=FILE.npz
quality is measured on features of AlexNet in place of pixels.

Variants: `full` (DiT-S/2 on 5,000 images, for a GPU; not run yet), `small` (50 images,
32 heads of which 6 or 13 go: for 2 CPU cores, not run yet either), `smoke` (digits).
"""

from memsep_jax import defaults

CRITERIA = ("small_t", "random", "uniform_t", "highest_first")


def get_config(variant="full"):
    config = defaults.cifar()
    config.experiment = "prune"
    config.data.name = "fashion_mnist"
    config.prune.update(steps=5_000, draws=10_000)
    points = defaults.prunings(CRITERIA, (0.2,))
    config.sweep.update(seeds=5, points=points, together=len(points))
    config.run.snapshots = 0
    return defaults.variant_of(config, variant, small=small, smoke=smoke)


def small(config):
    """50 images, a narrow transformer, and quality against 2,000 held-out images."""
    chosen = defaults.small_images()
    chosen.experiment = "prune"
    chosen.data.update(name="fashion_mnist", num_examples=50, num_held_out=2_000)
    chosen.model.update(patch=7, num_heads=8)
    chosen.train.steps = 20_000
    chosen.prune.update(steps=1_000)
    chosen.sampler.num_samples = 500
    points = defaults.prunings(CRITERIA, (0.2, 0.4))
    chosen.sweep.update(seeds=5, points=points, together=len(points))
    chosen.run.snapshots = 0
    return chosen


def smoke(config):
    """Two ways of pruning digits, beside the control."""
    defaults.smoke(config)
    defaults.switch(config, data="digits")
    config.model.update(width=16, depth=2, num_heads=2, dtype="float32")
    points = defaults.prunings(("small_t", "random"), (0.3,))
    config.sweep.update(seeds=1, points=points, together=len(points))
    return config
