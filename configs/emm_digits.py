"""How many digits does a small network memorize, and does resolution matter?

python -m memsep_jax.main --config=configs/emm_digits.py:small

Effective model memorization (Gu 2023, section 2): the largest n of which 90 % of the
samples are copies, by bracketing and bisection on log n, at 8 x 8 and at 4 x 4 pixels.

Variants: `full` (5 seeds, to 5 %), `small` (3 seeds, to 25 %: minutes on 2 CPU cores),
`smoke`.
"""

from memsep_jax import defaults


def get_config(variant="full"):
    config = defaults.copying()
    config.experiment = "emm"
    config.emm.update(low=32, high=128, tolerance=0.05)
    points = tuple({"data.resolution": side} for side in (8, 4))
    config.sweep.update(seeds=5, points=points)
    return defaults.variant_of(config, variant, small=small, smoke=smoke)


def small(config):
    """Fewer seeds and sizes."""
    config.emm.tolerance = 0.25
    config.sweep.seeds = 3
    return config


def smoke(config):
    """Two sizes, one network."""
    defaults.smoke(config)
    config.sweep.update(seeds=2, points=())
    return config
