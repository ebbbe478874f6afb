"""At which noise levels does a network betray its training set?

python -m memsep_jax.main --config=configs/membership_digits.py:small

Training points against held-out ones by the loss, PIA, SecMI, and the loss calibrated
by complexity and by a second network that was trained on other digits: the AUC at each
noise level, for several n, with the ordinary training times and with U-shaped ones.

Variants: `full` (5 seeds, 5 sizes), `small` (3 seeds, 3 sizes: minutes on 2 CPU cores),
`smoke`.
"""

from memsep_jax import defaults


def get_config(variant="full"):
    config = defaults.copying()
    config.experiment = "membership"
    config.train.steps = 10_000
    config.sweep.update(seeds=5, num_examples=(50, 100, 200, 350, 700))
    config.sweep.points = ({}, defaults.U_SHAPED)
    config.run.update(snapshots=0, evaluate_points=500)
    return defaults.variant_of(config, variant, small=small, smoke=smoke)


def small(config):
    """Fewer seeds, sizes and steps."""
    config.train.steps = 2_500
    config.sampler.num_samples = 500
    config.sweep.update(seeds=3, num_examples=(50, 200, 700))
    return config


def smoke(config):
    """One pair of twins."""
    defaults.smoke(config)
    config.sweep.update(seeds=1, num_examples=(16,), points=())
    return config
