"""DiT-B/4 on ImageNet at 64 x 64 pixels, whole or a part, read from disk.

python -m memsep_jax.main --config=configs/imagenet.py
python -m memsep_jax.main --config=configs/imagenet.py:ten

The set is imagenet_resized/64x64 of TensorFlow Datasets, prepared as array_record where
an account of image-net.org is at hand; it is decoded once, and then stays on disk as
uint8: 16 GB, of which a run reads a batch at a time. No labels are used.

For a GPU; not run yet. Variants: `full` (1,281,167 images), `hundred` (the classes of
ImageNet-100 of Tian 2020, arXiv 1906.05849), `ten` (those of Imagenette), `smoke`.
"""

from memsep_jax import defaults

# Labels of imagenet_resized, which follow the development kit of ILSVRC2012.
TEN = (4, 279, 347, 381, 448, 566, 689, 791, 928, 941)
HUNDRED = (
    16, 17, 34, 42, 45, 57, 61, 63, 65, 77, 88, 89, 96, 104, 111, 115, 128, 129, 138,
    140, 150, 169, 172, 173, 184, 201, 202, 206, 227, 244, 264, 276, 280, 295, 305, 307,
    309, 321, 334, 349, 390, 410, 419, 426, 430, 469, 478, 481, 488, 502, 542, 548, 562,
    569, 572, 585, 596, 598, 605, 613, 614, 616, 625, 632, 636, 658, 661, 662, 665, 688,
    694, 698, 717, 729, 731, 735, 737, 747, 760, 763, 764, 775, 778, 779, 783, 804, 813,
    828, 853, 874, 892, 902, 911, 937, 938, 952, 955, 956, 970, 998,
)  # fmt: skip


def get_config(variant="full"):
    config = defaults.cifar()
    config.data.update(
        name="tfds", dataset="imagenet_resized/64x64", num_examples=None, stream=True
    )
    config.model.update(patch=4, width=768, num_heads=12)
    config.train.update(steps=400_000, batch_size=256, flip=True)
    return defaults.variant_of(config, variant, hundred=hundred, ten=ten, smoke=smoke)


def hundred(config):
    config.data.classes = HUNDRED
    return config


def ten(config):
    config.data.classes = TEN
    return config


def smoke(config):
    """Tiny, and on the embedded digits: no download."""
    defaults.smoke(config)
    defaults.switch(config, data="digits")
    config.model.update(num_heads=2, dtype="float32")
    return config
