"""Growing networks in the plane: underfit, generalize, memorize (Ye 2025, Fig. 2).

python -m memsep_jax.main --config=configs/gmm_teaser.py:small

At width 2, 8, 32 and 128, 10, 12, 29 and 73 % of the samples are copies of the 64
points; the null level is 11 %. Variants: `full` (GPU), `small` (2.8 minutes on 2 busy
CPU cores), `smoke`.
"""

from memsep_jax import defaults


def get_config(variant="full"):
    config = defaults.train()
    config.experiment = "ensemble"
    config.data.update(name="mixture", num_examples=64, num_held_out=1_000)
    config.data.update(k=4, d=2, scale=2.0)
    config.process.update(name="ornstein_uhlenbeck")
    config.times.update(name="log_uniform", t_min=1e-3, t_max=8.0)
    config.prediction.update(name="edm", sigma_data=2.2)
    config.model.update(name="mlp", width=256, depth=3)
    config.optimizer.update(lr=2e-3, clip=1.0, schedule="cosine", warmup=200)
    config.train.update(steps=50_000, batch_size=256, ema_decay=0.998)
    config.sampler.update(grid="log", t_min=1e-3, t_max=8.0, steps=100)
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
