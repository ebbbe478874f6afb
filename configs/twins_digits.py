"""Two networks, no common digit: do they draw the same samples from the same noise?

python -m memsep_jax.main --config=configs/twins_digits.py:small

Twins start from the same weights and are trained on disjoint sets of n digits each.
While they memorize, twin samples differ; where they generalize, they agree (Kadkhodaie
2024, arXiv 2310.02557). The pool has 1,500 digits, so n goes to 700.

Variants: `full` (5 seeds, 9 sizes), `small` (3 seeds, 4 sizes: minutes on 2 CPU cores),
`smoke`.
"""

from memsep_jax import defaults


def get_config(variant="full"):
    config = defaults.digits()
    config.experiment = "twins"
    defaults.switch(config, model="mlp")
    config.model.update(width=512, depth=3)
    config.train.update(steps=10_000)
    config.sweep.update(seeds=5, num_examples=(10, 20, 35, 60, 100, 200, 350, 500, 700))
    config.run.update(snapshots=0, save_every=100_000, evaluate_every=100_000)
    return defaults.variant_of(config, variant, small=small, smoke=smoke)


def small(config):
    """Fewer seeds and sizes, a narrower network."""
    config.model.width = 256
    config.train.steps = 2_000
    config.sweep.update(seeds=3, num_examples=(10, 50, 200, 700))
    return config


def smoke(config):
    """One pair."""
    defaults.smoke(config)
    config.sweep.update(seeds=1, num_examples=(16,))
    config.run.snapshots = 0
    return config
