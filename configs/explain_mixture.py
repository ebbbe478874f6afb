"""Is a network that copies wrong where it was trained, or only where it samples?

python -m memsep_jax.main --config=configs/explain_mixture.py:small

The study of configs/explain_digits.py where the truth is known: the errors of a network
to the true and to the empirical denoiser, in the shells of noise around its training
points and along its own sampling. Vectors have no patches, so the rungs that need
images are left out.

`small`, 13 minutes on 2 CPU cores: at n = 100 (92 % copies) the empirical score
explains r² = 0.99 of the denoiser on the network's path, the truth 0.97; at n = 2,000
(0.2 % copies) 0.96 [0.95, 0.97], and the truth 1.00.

Variants: `full` (5 seeds, 5 sizes), `small` (3 seeds, 2 sizes: minutes on 2 CPU cores),
`smoke`.
"""

from memsep_jax import defaults


def get_config(variant="full"):
    config = defaults.mixtures()
    config.experiment = "explain"
    config.data.update(d=8, num_held_out=1_000)
    config.model.update(width=256, depth=4)
    config.train.update(steps=10_000, batch_size=128, ema_decay=0.998)
    config.sweep.update(seeds=5, num_examples=(100, 200, 500, 1_000, 2_000))
    config.measure.update(times=(0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 2.0, 4.0), draws=500)
    config.run.update(snapshots=0, save_every=100_000, evaluate_every=100_000)
    return defaults.variant_of(config, variant, small=small, smoke=smoke)


def small(config):
    """Fewer seeds and sizes."""
    config.sweep.update(seeds=3, num_examples=(100, 2_000))
    return config


def smoke(config):
    """One network, in few dimensions."""
    defaults.smoke(config)
    config.data.update(d=4)
    config.sweep.update(seeds=1, num_examples=(16,))
    return config
