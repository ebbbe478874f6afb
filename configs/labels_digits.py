"""Do labels without any meaning make a network copy its training images?

python -m memsep_jax.main --config=configs/labels_digits.py:small

Every training image gets one of C labels at random, and sampling draws them at random
(Gu 2023, section 6): the more labels, the fewer images share one, until each has its
own ("unique"). Beside them the true labels, and none.

Variants: `full` (5 seeds, two sizes), `small` (3 seeds: minutes on 2 CPU cores),
`smoke`.
"""

from memsep_jax import defaults

COUNTS = (1, 2, 5, 10, 20, 50, 100)


def get_config(variant="full"):
    config = defaults.copying()
    config.train.steps = 4_000  # shorter: without labels less than half is copied
    config.experiment = "factors"
    config.sweep.update(
        seeds=5,
        num_examples=(100, 200),
        points=defaults.labellings(*COUNTS),
    )
    config.run.snapshots = 0
    return defaults.variant_of(config, variant, small=small, smoke=smoke)


def small(config):
    """One size, fewer seeds."""
    config.sweep.update(seeds=3, num_examples=(100,))
    return config


def smoke(config):
    """Few labels."""
    defaults.smoke(config)
    few = defaults.labellings(2)
    config.sweep.update(seeds=2, num_examples=(), points=(few[0], few[-1]))
    return config
