"""The smallest network for the empirical and for the true score (Ye 2025, Thm. 5.1).

python -m memsep_jax.main --config=configs/gmm_capacity.py:small

Networks of growing width are fitted to both scores at given t; the smallest that meets
the theorem's error is drawn against n. The theorem, and the exact attention networks
beside it, are upper bounds; the smallest width is a measurement. Errors are means over
the noised training set, so that where n is not far above the number of components the
true score, too, is easier with fewer points. Variants: `full` (GPU), `small` (2 cores),
`smoke`.
"""

from memsep_jax import defaults


def get_config(variant="full"):
    config = defaults.mixtures()
    config.experiment = "capacity"
    config.data.update(num_examples=64, k=4, d=8)
    config.model.update(width=64, depth=1)
    config.optimizer.update(name="adam", lr=3e-3, warmup=100)
    config.train.update(steps=30_000, batch_size=512, ema_decay=0.99)
    config.sweep.update(num_examples=(4, 16, 64, 256, 1_024), together=64)
    config.sweep.update(width=(4, 8, 16, 32, 64, 128, 256, 512, 1_024))
    config.measure.update(times=(0.1, 0.3, 0.5), draws=4_000)
    config.run.update(log_every=500)
    return defaults.variant_of(config, variant, small=small, smoke=smoke)


def small(config):
    """2 cores; two components, so that few points show both."""
    config.data.update(k=2)
    config.train.update(steps=2_000, batch_size=128)
    config.sweep.update(num_examples=(8, 16, 32, 64), width=(4, 8, 16, 32, 64, 128))
    config.measure.update(times=(0.1, 0.3), draws=2_000)
    return config


def smoke(config):
    """Two sizes, two widths, one step or two."""
    defaults.smoke(config)
    config.data.update(d=2)
    config.sweep.update(num_examples=(4, 8), width=(4, 8))
    config.measure.update(times=(0.1, 0.3))
    return config
