"""Two networks, no common photograph: do they draw the same clothes?

python -m memsep_jax.main --config=configs/twins_fashion.py:small

The question of configs/twins_digits.py with more data: Fashion-MNIST has 60,000 images
to train on, so n goes to 30,000. They are found as in configs/fashion.py.

`small` takes 31 minutes on one CPU core. From 10, 100, 1,000, 10,000 and 30,000 images
each, twins agree on 0, 0, 37, 68 and 73 % of their samples; 3 % are copies at n = 10,
and none from 100 on.

Variants: `full` (28 x 28, a transformer, 9 sizes, for a GPU; not run yet), `small`
(14 x 14, an MLP, 3 seeds, 5 sizes: 2 CPU cores), `smoke` (digits).
"""

from memsep_jax import defaults


def get_config(variant="full"):
    config = defaults.small_images()
    config.experiment = "twins"
    config.data.update(name="fashion_mnist")
    config.model.patch = 7
    sizes = (10, 30, 100, 300, 1_000, 3_000, 10_000, 20_000, 30_000)
    config.sweep.update(seeds=5, num_examples=sizes)
    config.run.update(snapshots=0, save_every=100_000, evaluate_every=100_000)
    return defaults.variant_of(config, variant, small=small, smoke=smoke)


def small(config):
    """14 x 14 pixels, fewer seeds and sizes, an MLP."""
    config.data.resolution = 14
    defaults.switch(config, model="mlp")
    config.model.update(width=256, depth=3)
    config.optimizer.lr = 1e-3
    config.train.update(steps=5_000, batch_size=64)
    config.sweep.update(seeds=3, num_examples=(10, 100, 1_000, 10_000, 30_000))
    return config


def smoke(config):
    """One pair, on the embedded digits: no download."""
    defaults.smoke(config)
    defaults.switch(config, data="digits")
    config.model.update(patch=4, num_heads=2)
    config.sweep.update(seeds=1, num_examples=(16,))
    return config
