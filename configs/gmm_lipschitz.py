"""Lipschitz constants of truth, empirical score and networks (Ye 2025, section 5).

python -m memsep_jax.main --config=configs/gmm_lipschitz.py:small

Between two training points the empirical score explodes like sigma^-4, at a noised one
its norm is 1 / sigma^2, and the truth stays bounded. A network that memorizes follows
1 / sigma^2 and stays far below sigma^-4; the stronger its weight decay, the nearer it
is to the truth. Variants: `full`, `small` (4 minutes on 2 cores), `smoke`.
"""

import numpy as np

from memsep_jax import defaults


def get_config(variant="full"):
    config = defaults.mixtures()
    config.experiment = "lipschitz"
    config.data.update(num_examples=1_000, num_held_out=16)
    config.model.update(width=512, depth=4)
    config.optimizer.update(lr=2e-3)
    config.train.update(steps=50_000, batch_size=256, ema_decay=0.998)
    config.sweep.update(weight_decay=(0.0, 0.1, 1.0, 3.0))
    config.measure.update(draws=64, times=log_times(1e-3, 3, 20))
    return defaults.variant_of(config, variant, small=small, smoke=smoke)


def log_times(first, last, count):
    return tuple(float(f"{t:.3g}") for t in np.geomspace(first, last, count))


def small(config):
    """2 cores."""
    config.data.update(num_examples=100, k=4, d=4)
    config.model.update(width=128, depth=3)
    config.train.update(steps=6_000, batch_size=128)
    config.sampler.update(steps=50)
    config.measure.update(times=log_times(1e-3, 3, 12))
    return config


def smoke(config):
    """Two decays, few steps."""
    defaults.smoke(config)
    config.data.update(d=2)
    config.sweep.update(weight_decay=(0.0, 1.0))
    config.measure.update(times=(1e-3, 1e-2, 1.0), iters=20)
    return config
