"""Growing networks in the plane: underfit, generalize, memorize (Ye 2025, Fig. 2).

python -m memsep_jax.main --config=configs/gmm_teaser.py:small

At width 2, 8, 32 and 128, 10, 12, 29 and 73 % of the samples are copies of the 64
points; the null level is 11 %. Variants: `full` (GPU), `small` (2.8 minutes on 2 busy
CPU cores), `smoke`.
"""

from memsep_jax import defaults


def get_config(variant="full"):
    config = defaults.mixtures()
    config.experiment = "ensemble"
    config.data.update(num_examples=64, num_held_out=1_000)
    config.data.update(k=4, d=2)
    config.model.update(width=256, depth=3)
    config.optimizer.update(lr=2e-3)
    config.train.update(steps=50_000, batch_size=256, ema_decay=0.998)
    config.sweep.update(width=(2, 8, 32, 128, 512))
    return defaults.variant_of(config, variant, small=small, smoke=smoke)


def small(config):
    """2 cores."""
    config.train.update(steps=8_000, batch_size=128)
    config.sweep.update(width=(2, 8, 32, 128))
    return config


def smoke(config):
    """Two widths, few steps."""
    defaults.smoke(config)
    config.sweep.update(width=(4, 8))
    return config
