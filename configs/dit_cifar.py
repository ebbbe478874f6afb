"""DiT-S/2 on 5,000 CIFAR-10 images, the network and the data of Ye 2025, Table 1.

python -m memsep_jax.main --config=configs/dit_cifar.py

CIFAR-10 is fetched and prepared by TensorFlow Datasets, without TensorFlow. From a
file:

python -m memsep_jax.main --config=configs/dit_cifar.py \
    --config.data.name=npz --config.data.path=cifar10.npz

`full` is for a GPU: --dry_run counts 4.7e17 FLOPs. The ratio to expect is not measured
yet; the paper has 73.8 % for its own DiT. `small` learns 50 images at 32 x 32 in 48
minutes on one CPU core: 97.5 % [96.3, 98.3] of its samples are copies, where held-out
images would give 0.0 %.

Variants: `full`, `small`, `smoke`.
"""

from memsep_jax import defaults


def get_config(variant="full"):
    return defaults.variant_of(defaults.cifar(), variant, small=small, smoke=smoke)


def small(config):
    """50 images, 24,000 steps."""
    return defaults.small_cifar()


def smoke(config):
    """Tiny, and on the embedded digits: no download."""
    defaults.smoke(config)
    defaults.switch(config, data="digits")
    config.model.update(num_heads=2, dtype="float32")
    return config
