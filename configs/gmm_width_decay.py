"""Memorization and likelihood against width and weight decay (Ye 2025, Fig. 3b).

python -m memsep_jax.main --config=configs/gmm_width_decay.py:small

With n = 10,000 wider is better, up to the truth's likelihood, and only decay 10 hurts;
with n = 64 the widest network makes 84 % copies, and 100 steps do not resolve the flow
of 99.7 % of held-out points, so that they have no likelihood; decay 1 prevents both.
Variants: `full` (width) and `full_decay` (weight decay), for a GPU; `small` and
`small_decay` (5.5 and 15 minutes on 2 busy CPU cores); `smoke`.
"""

from memsep_jax import defaults


def get_config(variant="full"):
    config = defaults.mixtures()
    config.experiment = "ensemble"
    config.data.update(num_held_out=1_000)
    config.model.update(width=1_024, depth=4)
    config.optimizer.update(warmup=1_000)
    config.train.update(steps=200_000, batch_size=1_024, ema_decay=0.9999)
    config.measure.update(likelihood=500, probes=8)
    config.sweep.num_examples = (3_200, 10_000)
    config.sweep.width = (32, 64, 128, 256, 512, 1_024)
    return defaults.variant_of(
        config,
        variant,
        full_decay=decay,
        small=small,
        small_decay=small_decay,
        smoke=smoke,
    )


def decay(config):
    """Weight decay at the largest width."""
    config.sweep.width = ()
    config.sweep.weight_decay = (0.0, 0.01, 0.1, 1.0, 10.0)
    return config


def small(config):
    """2 cores: fewer points, fewer dimensions."""
    config.data.d = 8
    config.model.update(width=128, depth=3)
    config.optimizer.update(lr=2e-3, warmup=200)
    config.train.update(steps=6_000, batch_size=128, ema_decay=0.998)
    config.measure.update(likelihood=200, probes=0)
    config.sweep.update(num_examples=(64, 10_000), width=(4, 16, 48, 144))
    return config


def small_decay(config):
    """2 cores: weight decay at the largest width."""
    return decay(small(config))


def smoke(config):
    """Two widths, few steps."""
    defaults.smoke(config)
    config.data.d = 4
    config.measure.probes = 2
    config.sweep.update(num_examples=(8, 16), width=(4, 8))
    return config
