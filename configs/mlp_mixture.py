"""A residual MLP on a mixture of Gaussians in the papers' OU process (Ye 2025, Fig. 3).

python -m memsep_jax.main --config=configs/mlp_mixture.py

1.4 minutes on 2 CPU cores. 92.4 % [90.6, 93.9] of 1,000 samples are copies of the 100
points, null level 0.03 % [0.01, 0.1]; with --config.data.num_examples=2000, 1.6
minutes, 0.1 % [0.02, 0.6]. Variants: `full`, `smoke`.
"""

from memsep_jax import defaults


def get_config(variant="full"):
    config = defaults.mixtures()
    config.data.update(num_examples=100, d=8)
    config.model.update(width=256, depth=4)
    config.train.update(steps=10_000, batch_size=128, ema_decay=0.998)
    return defaults.variant_of(config, variant, smoke=smoke)


def smoke(config):
    """Tiny, in few dimensions."""
    defaults.smoke(config)
    config.data.update(d=4)
    return config
