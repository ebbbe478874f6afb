"""Which metric sees which kind of copy, on CIFAR-10: a study with known truth.

python -m memsep_jax.main --config=configs/calibrate_cifar.py
    --config.train=cifar10.npz[:3000] --config.pool=cifar10.npz[3000:]
    --config.features.path=alexnet.npz

A fifth of the samples are training images that were changed in one of 12 ways, the
others are fresh. Variants: `full` (pixels, random convolutions, AlexNet and LPIPS),
`small` (without AlexNet's weights), `smoke` (digits).
"""

from memsep_jax import defaults


def get_config(variant="full"):
    config = defaults.audit()
    config.experiment = "calibrate"
    config.calibration.features = ("random_conv", "alexnet", "lpips")
    return defaults.variant_of(config, variant, small=small, smoke=smoke)


def small(config):
    """Features without anybody's weights."""
    config.calibration.features = ("random_conv",)
    return config


def smoke(config):
    """A hundred digits."""
    small(config)
    config.train, config.pool = "digits[:100]", "digits[200:300]"
    config.memorization.near = 8
    return config
