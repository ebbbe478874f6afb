"""What makes a U-Net copy clothes: which skip, and what else of network and training?

python -m memsep_jax.main --config=configs/skips_fashion.py:small

One factor at a time (Gu 2023, sections 4 and 5): the skip connections as in
configs/skips_cifar.py, width, depth, time embedding, decay, EMA and batch size. The
images are found as in configs/fashion.py.

Variants: `full` (1,000 images, a GPU; not run yet), `small` (14 x 14, 20 images, 3
seeds: 2 CPU cores, not run yet either), `smoke` (digits).
"""

from memsep_jax import defaults


def values(field, *some):
    return tuple({field: value} for value in some)


def batches(base, rate, *sizes):
    """At a fixed ratio of rate and batch, as in the paper."""
    return tuple(
        {"train.batch_size": size, "optimizer.lr": rate * size / base} for size in sizes
    )


# Beside the loss summed over the values of an image, as in the paper's code.
DECAYS = (1e-3, 1e-2, 1e-1)


def get_config(variant="full"):
    config = defaults.unet_of_clothes()
    config.experiment = "factors"
    config.sweep.update(
        seeds=1,
        points=(
            {},
            *defaults.skips(3, 2),
            *values("model.width", 192, 256),
            *values("model.depth", 4, 6),
            *values("model.time_embedding", "fourier"),
            *values("optimizer.weight_decay", *DECAYS),
            *values("train.ema_decay", 0.99, 0.9),
            *batches(512, 2e-4, 128, 256),
        ),
    )
    config.run.snapshot_epochs = 0
    return defaults.variant_of(config, variant, small=small, smoke=smoke)


def small(config):
    """20 images and a narrow network of two resolutions."""
    defaults.small_unet_of_clothes(config)
    config.sweep.points = (
        {},
        *defaults.skips(2, 1),
        *values("model.width", 8, 32),
        *values("model.depth", 2),
        *values("model.time_embedding", "fourier"),
        *values("optimizer.weight_decay", *DECAYS),
        *values("train.ema_decay", 0.9, 0.9995),
        *batches(20, 1e-3, 5, 10),
    )
    return config


def smoke(config):
    """A few steps of a tiny network."""
    defaults.smoke_unet(config)
    config.sweep.points = ({}, *defaults.skips(2, 1)[:1], {"train.ema_decay": 0.5})
    return config
