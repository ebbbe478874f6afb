"""Memorization against network size, n and d (Ye 2025, Fig. 3a).

python -m memsep_jax.main --config=configs/gmm_size.py:small

In d = 8, n = 32, 128 and 512 give 95, 60 and 4 % copies at width 144, and 2, 0 and 0 %
at width 16; from d = 8 to d = 32 copies become fewer. Variants: `full` (n against width
at d = 32) and `full_dims` (n against d with a network of 14 million parameters), for a
GPU; `small` and `small_dims` (8.2 and 11.8 minutes on 2 busy CPU cores); `smoke`.
"""

from memsep_jax import defaults


def get_config(variant="full"):
    config = defaults.mixtures()
    config.experiment = "ensemble"
    config.data.update(num_held_out=1_000)
    config.model.update(width=1_024, depth=4)
    config.optimizer.update(warmup=1_000)
    config.train.update(steps=200_000, batch_size=1_024, ema_decay=0.9999)
    config.sweep.num_examples = (1_000, 3_200, 10_000, 32_000, 100_000)
    config.sweep.width = (32, 128, 512, 2_048)
    return defaults.variant_of(
        config, variant, full_dims=dims, small=small, small_dims=small_dims, smoke=smoke
    )


def dims(config):
    """n against d, at one width."""
    config.model.update(width=1_024)
    config.sweep.update(width=(), d=(8, 16, 32, 64))
    return config


def small(config):
    """2 cores: fewer points, fewer dimensions."""
    config.data.d = 8
    config.model.update(width=128, depth=3)
    config.optimizer.update(lr=2e-3, warmup=200)
    config.train.update(steps=6_000, batch_size=128, ema_decay=0.998)
    config.sweep.update(num_examples=(32, 128, 512), width=(16, 48, 144))
    return config


def small_dims(config):
    """2 cores: n against d."""
    small(config)
    config.sweep.update(width=(), d=(2, 8, 32))
    return config


def smoke(config):
    """Two sizes, few steps."""
    defaults.smoke(config)
    config.data.d = 4
    config.sweep.update(num_examples=(8, 16), width=(4, 8))
    return config
