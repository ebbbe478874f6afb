"""Which digits are copied first: those far from all others, or the typical ones?

python -m memsep_jax.main --config=configs/which_digits.py:small

Merger & Goldt 2026 (arXiv 2606.14390) say that sparse points are memorized, and arXiv
2605.30642 that prototypical ones are. For networks of several n, emission counts of the
training points are ranked against their sparsity, and their distance to the mean of
their class in pixels and in features.

`small`, 12 minutes on 2 busy CPU cores: at n = 200, sparse digits are emitted more
often (rank correlation 0.55 [0.42, 0.67] over 3 seeds) and so are those far from the
mean of their class (0.51 [0.36, 0.65]). Most of that is the 1/3 rule, which favours
isolated points: by one radius for all points, 0.17 [0.04, 0.30] and 0.21 [0.12, 0.30].
Prototypical digits are not copied first.

Variants: `full` (5 seeds, 5 sizes), `small` (3 seeds, 3 sizes: minutes on 2 CPU cores),
`smoke`.
"""

from memsep_jax import defaults


def get_config(variant="full"):
    config = defaults.copying()
    config.experiment = "which"
    config.train.steps = 10_000
    # Counts of single points need many samples of each: 20 a point at n = 200.
    config.sampler.num_samples = 4_000
    config.sweep.update(seeds=5, num_examples=(50, 100, 200, 400, 800))
    config.run.snapshots = 0
    return defaults.variant_of(config, variant, small=small, smoke=smoke)


def small(config):
    """Fewer seeds and sizes."""
    config.train.steps = 5_000
    config.sampler.num_samples = 2_000
    config.sweep.update(seeds=3, num_examples=(50, 100, 200))
    return config


def smoke(config):
    """One network."""
    defaults.smoke(config)
    config.sweep.update(seeds=1, num_examples=(16,))
    return config
