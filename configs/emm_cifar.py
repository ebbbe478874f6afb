"""How many images of CIFAR-10 does the base U-Net of Gu 2023 memorize?

python -m memsep_jax.main --config=configs/emm_cifar.py

EMM at 8 x 8, 16 x 16 and 32 x 32 pixels, attention moved so that the network is the
same (Gu 2023, figure 2, one run each: 7.69k, 4.57k, 1.07k). The paper has 40,000
epochs, 78,125 steps at n = 1,000; `tenth` has a tenth of it, at 8 x 8 and 16 x 16.

Variants: `full`, `tenth`, `small` (8 x 8, a narrow network, 2 CPU cores), `smoke`.
"""

from memsep_jax import defaults

POINTS = tuple(
    {"data.resolution": side, "model.attention": (side // 2,)} for side in (8, 16, 32)
)


def get_config(variant="full"):
    config = defaults.unet()
    config.experiment = "emm"
    config.train.plateau = 4
    config.emm.update(low=1_000, high=8_000, tolerance=0.15, budget=6)
    config.sweep.update(seeds=1, points=POINTS)
    return defaults.variant_of(config, variant, tenth=tenth, small=small, smoke=smoke)


def tenth(config):
    """A tenth of the length, two resolutions."""
    config.train.update(epochs=4_000.0, warmup_epochs=20.0)
    config.sweep.points = POINTS[:2]
    config.run.snapshot_epochs = 500
    return config


def small(config):
    """8 x 8 pixels and a narrow network."""
    defaults.small_unet(config)
    config.emm.update(low=20, high=80, tolerance=0.3)
    config.sweep.points = POINTS[:1]
    config.run.update(snapshot_epochs=500, snapshot_samples=200)
    return config


def smoke(config):
    """A few steps of a tiny network of one resolution."""
    defaults.smoke_unet(config)
    config.model.update(multipliers=(1,), attention=(8,))
    config.sweep.points = ({"model.attention": (8,)},)
    config.emm.budget = 2
    config.run.snapshot_epochs = 0
    return config
