"""Can a score alone tell which of its samples are copies, without the training set?

python -m memsep_jax.main --config=configs/detect_digits.py:small

Networks that copy some of what they draw; the 1/3 rule says which samples are copies.
From the score at a sample alone: the eigenvalues and the trace of the Hessian of
log p_t (Jeon 2025), the local dimension (Kamkari 2024, Ross 2025) and, for networks
with labels, the gap between the scores with and without one (Wen 2024). Ye 2025,
section 5, finds the empirical score far steeper than the truth: so sharpness must tell.

`small`, 9 minutes on 2 idle CPU cores, 3 seeds: 54 % copies at n = 100 and
28 % at 150 (with labels 65 and 34 %). At sigma = 0.1 the flattest direction tells
copies from other samples as well as the distance to the training set does (AUC 0.97 to
0.99, and 0.94 to 0.98); the sharpest direction does not (0.42 to 0.46), since it is
about 1/sigma^2 everywhere. FLIPD 0.61 to 0.68, guidance gap 0.54 and 0.60.

Variants: `full` (5 seeds, 3 sizes, twice the steps), `small` (3 seeds, 2 sizes, 500
samples: minutes on 2 CPU cores), `smoke`.
"""

from memsep_jax import defaults

LABELLED = {"data.labels": "true", "train.label_drop": 0.1}


def get_config(variant="full"):
    config = defaults.copying()
    config.experiment = "detect"
    config.sweep.update(seeds=5, num_examples=(150, 200, 250), points=({}, LABELLED))
    # The table has the level that was chosen before any AUC was seen: well below the
    # distance of two digits, well above the rounding of a pixel.
    config.measure.update(times=(0.02, 0.05, 0.1, 0.2, 0.5, 1.0), detect_at=0.1)
    config.measure.iters = 20
    config.run.snapshots = 0
    return defaults.variant_of(config, variant, small=small, smoke=smoke)


def small(config):
    """Fewer seeds and sizes."""
    config.train.steps = 5_000
    config.sampler.num_samples = 500
    config.sweep.update(seeds=3, num_examples=(100, 150))
    return config


def smoke(config):
    """Two networks; the threshold calls samples copies after hardly any training."""
    defaults.smoke(config)
    config.memorization.threshold = 0.98
    config.sampler.num_samples = 32
    config.sweep.update(seeds=1, num_examples=(16,))
    config.measure.update(times=(0.1, 0.5), detect_at=0.1, iters=4)
    return config
