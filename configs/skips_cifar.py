"""Which skip connections of a U-Net does it copy its training images through?

python -m memsep_jax.main --config=configs/skips_cifar.py

One of the nine skips kept, all three of a resolution kept, all, none; the others are
zeros (Gu 2023, section 5, n = 1,000 at 32 x 32: one at 32 x 32 keeps 92 to 93 %, one at
16 x 16 61 to 81 %, one at 8 x 8 0 to 13 %; 86.7, 53.4 and 5.7 % with three of a kind).
The paper's length is 40,000 epochs, 78,125 steps; `tenth` has a tenth of it.

Variants: `full`, `tenth`, `small` (8 x 8, six skips, 2 CPU cores), `smoke`.
"""

from memsep_jax import defaults


def get_config(variant="full"):
    config = defaults.unet()
    config.experiment = "factors"
    config.sweep.update(seeds=1, points=({}, *defaults.skips(3, 2)))
    config.run.snapshot_epochs = 0
    return defaults.variant_of(config, variant, tenth=tenth, small=small, smoke=smoke)


def tenth(config):
    """A tenth of the length."""
    config.train.update(epochs=4_000.0, warmup_epochs=20.0)
    return config


def small(config):
    """8 x 8 pixels, a narrow network of two resolutions."""
    defaults.small_unet(config)
    config.sweep.points = ({}, *defaults.skips(2, 1))
    return config


def smoke(config):
    """A few steps of a tiny network."""
    defaults.smoke_unet(config)
    config.sweep.points = ({}, *defaults.skips(2, 1)[:1])
    return config
