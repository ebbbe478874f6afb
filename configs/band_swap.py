"""Where on the noise axis copying happens: the true score in some bands only.

python -m memsep_jax.main --config=configs/band_swap.py:small

The score that copies, empirical or a network's, rules some noise levels and the truth
the others. In `small` (75 seconds on 2 busy CPU cores) the empirical score copies
everything when it rules the last band alone, t < 0.0025, and no other band is needed:
any one of them can be the truth's. When the truth rules below an edge instead, half of
the copies are left for an edge at t = 0.08 (n = 200) and 0.05 (n = 1,000), near where
noise is a third as long as the points are apart (0.07 and 0.05). Which point is copied
was decided before, around the collapse time (0.59 and 0.36).

Variants: `full` (GPU), `small`, `trained` (a network in place of the empirical score,
2 cores), `smoke`.
"""

from memsep_jax import defaults


def get_config(variant="full"):
    config = defaults.mixtures()
    config.experiment = "band_swap"
    config.data.update(num_examples=1_000)
    config.model.update(width=512, depth=3)
    config.train.update(steps=50_000, batch_size=256, ema_decay=0.998)
    config.sampler.update(steps=200, num_samples=2_000)
    config.sweep.update(num_examples=(1_000, 3_162, 10_000), together=3)
    config.measure.update(bands=20)
    return defaults.variant_of(
        config, variant, small=small, trained=trained, smoke=smoke
    )


def small(config):
    """2 cores, 8 dimensions."""
    config.data.update(d=8)
    config.sampler.update(steps=100, num_samples=500)
    config.sweep.update(num_examples=(200, 1_000))
    config.measure.update(bands=10)
    return config


def trained(config):
    """A network of each seed, on 2 cores."""
    small(config)
    config.model.update(width=256)
    config.train.update(steps=6_000, batch_size=128)
    config.sweep.update(num_examples=(200,))
    config.measure.update(swap="trained")
    return config


def smoke(config):
    """Two sizes, two bands, few steps."""
    defaults.smoke(config)
    config.data.update(d=2)
    config.sampler.update(steps=4)
    config.sweep.update(num_examples=(16, 32))
    config.measure.update(bands=2)
    return config
