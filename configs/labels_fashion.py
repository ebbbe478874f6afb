"""Do labels without any meaning make a U-Net copy clothes?

python -m memsep_jax.main --config=configs/labels_fashion.py:small

The question of configs/labels_digits.py with the network of Gu 2023, section 6: C
random labels for C = 1 up to one per image, and beside them the true labels, unique
ones and none. The images are found as in configs/fashion.py.

Variants: `full` (5,000 images, a GPU; not run yet), `small` (14 x 14, 20 images, 3
seeds: 2 CPU cores, not run yet either), `smoke` (digits).
"""

from memsep_jax import defaults


def get_config(variant="full"):
    config = defaults.unet_of_clothes()
    config.experiment = "factors"
    config.data.num_examples = 5_000
    counts = (1, 2, 5, 10, 20, 50, 100, 500, 1_000, 5_000)
    config.sweep.update(seeds=1, points=defaults.labellings(*counts))
    config.run.snapshot_epochs = 0
    return defaults.variant_of(config, variant, small=small, smoke=smoke)


def small(config):
    """20 images, a narrow network; half the length, or all would be copied."""
    defaults.small_unet_of_clothes(config)
    config.train.epochs = 2_500.0
    config.sweep.points = defaults.labellings(1, 2, 5, 10, 20)
    return config


def smoke(config):
    """Few labels on digits."""
    defaults.smoke_unet(config)
    few = defaults.labellings(2)
    config.sweep.points = (few[0], few[-1])
    return config
