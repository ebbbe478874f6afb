"""Are these samples copies of that training set? Of any generator, in one command.

python -m memsep_jax.main --config=configs/audit.py --config.samples=DIR_OR_NPZ
    --config.train=DIR_OR_NPZ --config.held_out=DIR_OR_NPZ

Each is a folder of images or a zip of one, an .npz, .npy or idx file of them, the
workdir of a run, or the name of a data set. Held-out images are of the same kind, and
were not trained on: without them nobody knows what honest samples would score. The
verdict, the worst pairs and what to do are in report.html. Give images as the training
saw them:
--config.train_as.crop=center, .exif=False, .alpha=drop (and samples_as, held_out_as).
Variants: `full`, and `smoke` (digits, a quarter of which are training images, in
seconds).
"""

from memsep_jax import defaults


def get_config(variant="full"):
    return defaults.variant_of(defaults.audit(), variant, smoke=smoke)


def smoke(config):
    """Digits of which the first 20 were trained on."""
    config.samples, config.train = "digits[40:120]", "digits[:60]"
    config.held_out = "digits[200:300]"
    config.memorization.near = 8
    return config
