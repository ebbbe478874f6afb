"""What makes a small network copy digits? Every factor of Gu 2023 that an MLP has.

python -m memsep_jax.main --config=configs/factors_digits.py:small

One factor at a time around a base that copies about half of what it draws: the data
(resolution, classes, diversity, duplicates), the network (width, depth, dropout), the
training (length, batch at a fixed ratio of rate and batch, rate, decay, optimizer, EMA)
and the labels. U-Nets: configs/factors_cifar.py; transformers: configs/factors_dit.py.

`decay`, 17 minutes on 2 busy CPU cores: with coupled decay of 0, 0.001, 0.01 and 0.064,
beside the summed loss as in the paper, 53, 49, 23 and 0 % of samples are copies.

`guidance`, 4 minutes on 2 CPU cores: 41 % [35, 47] copies without a label, 65 % [57,
73] of a label, and no more that 3 seeds could tell with twice or four times its weight.

Variants: `full` (5 seeds), `small` (2 seeds, two values of each factor: 2 CPU cores),
`decay` (Adam's coupled decay, 3 seeds), `guidance` (one conditional network per seed,
sampled with four weights of guidance), `smoke`.
"""

from memsep_jax import defaults


def values(field, *some, **others):
    others = {name.replace("_", ".", 1): value for name, value in others.items()}
    return tuple({field: value, **others} for value in some)


# Coupled, beside the loss summed over the 64 pixels: the units of the paper, whose
# decays go from 1e-5 to 0.1.
DECAYS = (1e-4, 1e-3, 1e-2, 0.064, 0.1)
POINTS = (
    {},
    *values("data.resolution", 4, 6),
    *values("data.classes", (0,), (0, 1), (0, 1, 2, 3, 4)),
    *values("data.duplicates", 0.1, 0.3, data_copies=4),
    *values("model.width", 64, 128, 512, 1_024),
    *values("model.depth", 1, 2, 6),
    *values("model.dropout", 0.1, 0.3),
    *values("train.steps", 1_250, 2_500, 10_000),
    *({"train.batch_size": 16 * k, "optimizer.lr": 2.5e-4 * k} for k in (1, 2, 8)),
    *values("optimizer.lr", 2.5e-4, 5e-4, 2e-3),
    *values("optimizer.weight_decay", *DECAYS, optimizer_name="adam"),
    {"optimizer.name": "sgd", "optimizer.lr": 0.1},
    {"optimizer.name": "adam"},
    *values("train.ema_decay", 0.0, 0.9, 0.99, 0.9995),
    *values("data.labels", "true", "unique"),
    {"data.labels": "random", "data.num_labels": 10},
)
FEW = (
    {},
    {"data.resolution": 4},
    {"data.classes": (0,)},
    *values("model.width", 128, 512),
    {"model.dropout": 0.1},
    {"train.steps": 2_500},
    {"optimizer.weight_decay": 0.064, "optimizer.name": "adam"},
    *values("data.labels", "true", "unique"),
)


def get_config(variant="full"):
    config = defaults.copying()
    config.experiment = "factors"
    config.data.num_examples = 100
    config.train.steps = 5_000
    config.sweep.update(seeds=5, points=POINTS)
    config.run.snapshots = 0
    return defaults.variant_of(
        config, variant, small=small, decay=decay, guidance=guidance, smoke=smoke
    )


def small(config):
    """The factors that move the ratio most, fewer seeds."""
    config.sweep.update(seeds=2, points=FEW)
    return config


def decay(config):
    """Coupled decay alone, up to the largest of the paper."""
    config.optimizer.name = "adam"
    points = {}, *values("optimizer.weight_decay", *DECAYS)
    config.sweep.update(seeds=3, points=points)
    return config


def guidance(config):
    """Without a label (weight 0), of a label (1), and guided towards it."""
    config.data.labels, config.train.label_drop = "true", 0.1
    points = values("sampler.guidance", 0.0, 1.0, 2.0, 4.0)
    config.sweep.update(seeds=3, points=points)
    return config


def smoke(config):
    """Two factors."""
    defaults.smoke(config)
    points = {}, {"model.width": 8}, {"optimizer.name": "sgd", "optimizer.lr": 0.1}
    config.sweep.update(seeds=1, points=points)
    return config
