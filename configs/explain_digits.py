"""What explains a network's denoiser: local patches, the covariance, or its copies?

python -m memsep_jax.main --config=configs/explain_digits.py:small

For networks of a small and a large n, each rung of `analytic` is compared with the
network at each noise level, at held-out points and along the network's own sampling
(Wang & Vastola 2024, arXiv 2412.09726; Kamb & Ganguli 2024, 2412.20292; Lukoianov 2025,
2509.09672), and sampled from the same initial noise. With the truth known:
configs/explain_mixture.py.

`small`, 4 minutes on 2 CPU cores: at n = 50, where 84 % of the samples are copies, the
empirical score explains r² = 0.95 [0.93, 0.97] of the denoiser on the network's path,
and at n = 400, with 0.5 % copies, 0.75 [0.70, 0.80]. There the score that is local by
the covariance explains most of it at held-out points (0.89 [0.88, 0.90]), and
its samples are nearest to the network's (cosine 0.82 [0.81, 0.83]) without a copy.

Variants: `full` (5 seeds, 4 sizes), `small` (3 seeds, 2 sizes: minutes on 2 CPU cores),
`fashion` (a U-Net on 28 x 28 pixels, for a GPU; not run yet), `smoke`.
"""

from memsep_jax import defaults

# From where digits settle to where nothing of them is left.
TIMES = (0.03, 0.08, 0.2, 0.4, 0.8, 1.6, 4.0, 10.0)


def get_config(variant="full"):
    config = defaults.copying()
    config.experiment = "explain"
    config.sweep.update(seeds=5, num_examples=(50, 100, 400, 1_000))
    config.measure.update(times=TIMES, draws=250, patches=(1, 3, 5, 7, 15))
    config.run.snapshots = 0
    return defaults.variant_of(
        config, variant, small=small, fashion=fashion, smoke=smoke
    )


def small(config):
    """Fewer seeds and sizes."""
    config.train.steps = 5_000
    config.sampler.num_samples = 500
    config.sweep.update(seeds=3, num_examples=(50, 400))
    # Comparing patches of 3 at all places with 400 digits takes 10 ms.
    config.measure.update(draws=32, patches=(3, 5, 7, 15))
    return config


def fashion(config):
    """A convolutional network, which the local rungs are about."""
    config.data.name = "fashion_mnist"
    defaults.switch(config, model="unet")
    config.model.update(width=64, depth=2, multipliers=(1, 2, 2), attention=(7,))
    config.optimizer.update(lr=2e-4, warmup=500)
    config.train.update(steps=50_000, batch_size=128, ema_decay=0.9995)
    config.sweep.update(seeds=3, num_examples=(100, 1_000))
    config.measure.patches = (3, 7, 11, 15, 23, 55)
    return config


def smoke(config):
    """One network."""
    defaults.smoke(config)
    config.sweep.update(seeds=1, num_examples=(16,))
    config.measure.update(times=(0.1, 1.0), patches=(3, 15))
    return config
