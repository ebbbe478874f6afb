"""Does a diffusion transformer copy photographs? Clothes of Fashion-MNIST, 28 x 28.

python -m memsep_jax.main --config=configs/fashion.py:small

The images are those of Debian's package dataset-fashion-mnist, of a folder,
--config.data.path=FOLDER, or of the network. `small` trains on 100 of them on 2 CPU
cores. Its number of steps is not calibrated, and the 8,000 it has are too few: of 20
images, 41.5 % [34.9, 48.4] of 200 samples are copies after 3,000 steps; of 100 images,
none of 100 samples after 5,000 of 10,000. With --config.times.mean=0.5, which has more
of the noise at which samples settle on an image, 3.0 % [1.4, 6.4] of 200 samples are
copies of 100 images after 6,000 steps.
Variants: `full` (DiT-S/2 on 5,000 images, for a GPU; not run yet), `small`, `smoke`
(digits).
"""

from memsep_jax import defaults


def get_config(variant="full"):
    config = defaults.cifar()
    config.data.name = "fashion_mnist"
    return defaults.variant_of(config, variant, small=small, smoke=smoke)


def small(config):
    """100 images, and the transformer that copies digits."""
    chosen = defaults.digits()
    chosen.data.update(name="fashion_mnist", num_examples=100)
    chosen.model.patch, chosen.optimizer.lr, chosen.train.batch_size = 7, 2e-3, 32
    return chosen


def smoke(config):
    """Tiny, and on the embedded digits: no download."""
    defaults.smoke(config)
    defaults.switch(config, data="digits")
    config.model.update(num_heads=2, dtype="float32")
    return config
