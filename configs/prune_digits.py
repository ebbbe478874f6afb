"""Does pruning heads by small-t gradients help? Eight criteria, three ratios, digits.

python -m memsep_jax.main --config=configs/prune_digits.py

42 minutes on 2 busy CPU cores, of which 9 are training. With 5 seeds (79 minutes): no
criterion that ranks heads by what they do copies less than random pruning at equal
quality (small_t: -0.4 percentage points [-6.7, 6.0]); removing the heads that matter
*most* at small t may (7.6 [2.1, 13.1], one of seven comparisons). Fine-tuning brings
the copies back: at a ratio of .4 from 25 % to 65 %, control 87 %.

Variants: `full`, `small` (5 points in place of 25), `smoke`.
"""

from memsep_jax import defaults, prune

RATIOS = (0.2, 0.4, 0.6)


def get_config(variant="full"):
    config = defaults.digits()
    config.experiment = "prune"
    config.data.update(num_examples=100, num_held_out=1_000)
    config.prune.update(steps=800)
    points = defaults.prunings(prune.CRITERIA, RATIOS)
    config.sweep.update(points=points, together=len(points))
    config.run.update(snapshots=0)
    return defaults.variant_of(config, variant, small=small, smoke=smoke)


def small(config):
    """The paper's criterion, both random ones and the negative control, one ratio."""
    few = ("small_t", "random", "random_per_layer", "highest_first")
    config.sweep.points = defaults.prunings(few, RATIOS[1:2])
    return config


def smoke(config):
    """Two ways of pruning, beside the control."""
    defaults.smoke(config)
    config.model.update(width=16, depth=2, num_heads=2)
    points = defaults.prunings(("small_t", "random"), (0.3,))
    config.sweep.update(seeds=1, points=points)
    return config
