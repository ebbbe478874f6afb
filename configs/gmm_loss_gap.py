"""The loss gap against time for several n and d (Ye 2025, Fig. 1).

python -m memsep_jax.main --config=configs/gmm_loss_gap.py:small

At small times the gap is that of points that do not overlap, d / (e^t - 1); it falls to
0 around the collapse time -log(1 - (n / 8)^(-2/d)), later for larger d, earlier for
larger n. Variants: `full`, `small` (4 minutes on 2 cores), `smoke`.
"""

from memsep_jax import defaults


def get_config(variant="full"):
    config = defaults.mixtures()
    config.experiment = "loss_gap"
    config.data.update(num_held_out=16)
    config.sweep.update(
        d=(8, 16, 32, 64), num_examples=(1_000, 3_200, 10_000, 32_000, 100_000)
    )
    config.sweep.seeds = 10
    config.measure.times = TIMES
    return defaults.variant_of(config, variant, small=small, smoke=smoke)


TIMES = (
    0.001, 0.003, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4,
    0.5, 0.65, 0.8, 1.0, 1.2, 1.6, 2.0, 2.5, 3.0, 4.0,
)  # fmt: skip


def small(config):
    """2 cores."""
    config.sweep.update(d=(8, 32, 64), num_examples=(1_000, 10_000))
    config.measure.times = tuple(t for t in TIMES if 0.01 <= t <= 3)
    return config


def smoke(config):
    """Two dimensions, few draws."""
    defaults.smoke(config)
    config.sweep.update(d=(2, 4), num_examples=(16,))
    config.measure.times = (0.01, 0.1, 1.0)
    return config
