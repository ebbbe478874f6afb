"""When does a U-Net begin to copy clothes, and how does that grow with their number?

python -m memsep_jax.main --config=configs/onset_fashion.py:small

The question of configs/onset_digits.py with a U-Net, and n over a factor of 16:
Bonnaire 2025 (arXiv 2505.17638) find that tau_mem grows like n. The length is in
epochs, so that the steps grow with n, and the batch is the same for every n. The images
are found as in configs/fashion.py.

Variants: `full` (n up to 6,400, a GPU; not run yet), `small` (14 x 14, n = 5 to 80, 3
seeds: 2 CPU cores, not run yet either), `smoke` (digits).
"""

from memsep_jax import defaults


def get_config(variant="full"):
    config = defaults.unet_of_clothes()
    config.experiment = "onset"
    sizes = (100, 200, 400, 800, 1_600, 3_200, 6_400)
    config.sweep.update(seeds=3, num_examples=sizes)
    config.run.update(snapshots=20, snapshot_epochs=0)
    return defaults.variant_of(config, variant, small=small, smoke=smoke)


def small(config):
    """14 x 14 pixels, a narrow network, a short EMA that does not delay the copies."""
    defaults.small_unet_of_clothes(config)
    config.data.balanced = False  # 5 images of 10 classes
    config.train.ema_decay = 0.99
    config.sweep.num_examples = (5, 10, 20, 40, 80)
    config.run.snapshots = 12
    return config


def smoke(config):
    """One pair of twins, two snapshots."""
    defaults.smoke_unet(config)
    config.sweep.update(seeds=1, num_examples=(16,))
    return config
