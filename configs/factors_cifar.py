"""What makes a U-Net copy CIFAR-10? The factors of Gu 2023, one at a time.

python -m memsep_jax.main --config=configs/factors_cifar.py

Around the base of the paper at n = 2,000 (61 % at 32 x 32): width, depth, time
embedding, variant, dropout, batch, decay, EMA, optimizer, classes, labels. Intra-class
diversity takes a second set of the same classes: --config.sweep.points="({},
{'data.mix': 0.2, 'data.mix_from': 'other.npz'})". The paper's length is 40,000 epochs,
156,250 steps; `tenth` has a tenth of it at 16 x 16.

Variants: `full`, `tenth`, `small` (8 x 8, a narrow network, 2 CPU cores), `smoke`.
"""

from memsep_jax import defaults

# Coupled, and in the units of the paper's code: beside the loss summed over the
# 3,072 values of an image.
DECAYS = (1e-5, 1e-4, 1e-3, 1e-2, 2e-2, 5e-2, 8e-2, 1e-1)
EMAS = (0.999, 0.99, 0.9, 0.8, 0.5, 0.2, 0.1, 0.0)
EDM = {
    "prediction.name": "edm",
    "times.name": "log_normal",
    "times.clock": "variance_exploding",
}
POINTS = (
    {},
    *({"model.width": width} for width in (192, 256, 320)),
    *({"model.depth": depth} for depth in (4, 6, 8, 12)),
    {"model.time_embedding": "fourier"},
    {"model.variant": "ncsn"},
    *({"model.dropout": rate} for rate in (0.0, 0.3)),
    *(
        {"train.batch_size": size, "optimizer.lr": 2e-4 * size / 512}
        for size in (128, 256, 896)
    ),
    *({"optimizer.weight_decay": decay} for decay in DECAYS),
    *({"train.ema_decay": decay} for decay in EMAS),
    {"optimizer.name": "sgd", "optimizer.lr": 0.1},
    *({"data.classes": tuple(range(count))} for count in (1, 2, 5)),
    {"data.labels": "true"},
    *(
        {"data.num_labels": count, "data.labels": "random"}
        for count in (1, 2, 10, 50, 100, 500)
    ),
    EDM,
)


def get_config(variant="full"):
    config = defaults.unet()
    config.experiment = "factors"
    config.data.num_examples = 2_000
    config.sweep.update(seeds=1, points=POINTS)
    config.run.snapshot_epochs = 0
    return defaults.variant_of(config, variant, tenth=tenth, small=small, smoke=smoke)


def tenth(config):
    """A tenth of the length, at 16 x 16."""
    config.data.resolution = 16
    config.model.attention = (8,)
    config.train.update(epochs=4_000.0, warmup_epochs=20.0)
    return config


def small(config):
    """8 x 8 pixels, a narrow network, what a U-Net has and an MLP has not."""
    defaults.small_unet(config)
    config.sweep.points = (
        {},
        {"model.width": 16},
        {"model.depth": 2},
        {"model.time_embedding": "fourier"},
        {"model.variant": "ncsn"},
    )
    return config


def smoke(config):
    """The variants of the network, a few steps."""
    defaults.smoke_unet(config)
    config.sweep.points = ({}, {"model.variant": "ncsn"})
    return config
