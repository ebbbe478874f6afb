"""Table 1 of Ye 2025: DiT-S/2 on 5,000 CIFAR-10 images, pruned by 20 % of its heads.

python -m memsep_jax.main --config=configs/prune_cifar.py

The network and the training of configs/dit_cifar.py, then pruning by small-t gradients,
at random and by the baselines that the paper lacks, each with fine-tuning. Needs a GPU.
From a file, in short stretches on different machines (the same command goes on from the
packed state):

python -m memsep_jax.main --config=configs/prune_cifar.py \
    --config.data.name=npz --config.data.path=cifar10.npz --config.run.pack=state.npz

With a network that is trained already:

python -m memsep_jax.main --config=configs/prune_cifar.py \
    --config.prune.source=runs/dit_cifar

Variants: `full`, `small` (the 50 images of dit_cifar:small, where 2 or 4 of 8 heads go:
2 CPU cores, not run yet), `smoke`.
"""

from memsep_jax import defaults, prune


def get_config(variant="full"):
    config = defaults.cifar()
    config.experiment = "prune"
    config.prune.update(steps=5_000, draws=10_000)
    config.sweep.update(seeds=5, points=defaults.prunings(prune.CRITERIA, (0.2,)))
    return defaults.variant_of(config, variant, small=small, smoke=smoke)


def small(config):
    """50 images at 32 x 32, 8 heads, 3 seeds."""
    chosen = defaults.small_cifar()
    chosen.experiment = "prune"
    chosen.prune.update(steps=1_000, looks=3)
    chosen.sampler.num_samples = 300
    criteria = ("small_t", "random", "uniform_t", "highest_first")
    points = defaults.prunings(criteria, (0.25, 0.5))
    chosen.sweep.update(seeds=3, points=points, together=len(points))
    chosen.run.snapshots = 0
    return chosen


def smoke(config):
    """Tiny, and on the embedded digits: no download."""
    defaults.smoke(config)
    defaults.switch(config, data="digits")
    config.model.update(width=16, depth=2, num_heads=2, dtype="float32")
    points = defaults.prunings(("small_t", "random"), (0.3,))
    config.sweep.update(seeds=1, points=points)
    return config
