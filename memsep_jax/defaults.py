"""The presets that a file in configs/ starts from; it says what differs.

Every field, with its default, is declared in experiments/config/schema.py and listed in
docs/configs.md.
"""

from ml_collections import ConfigDict

from memsep_jax.experiments.config import schema

# Times early and late in a rectified flow, and few in the middle. It ends at .98, where
# sigma / alpha is 49: at 1 it is infinite.
U_SHAPED = {
    "times.name": "beta", "times.a": 0.5, "times.b": 0.5, "times.t_max": 0.98,
    "times.clock": "rectified_flow",
}  # fmt: skip


def train() -> ConfigDict:
    """The config of a training, and of studies that train: EDM's setting, small."""
    return schema.defaults(schema.TRAIN)


def audit() -> ConfigDict:
    """The config of an audit: samples of any generator, nothing is trained.

    samples, train, held_out and pool are each a folder of images or a zip of one, an
    .npz, .npy or idx file, the workdir of a run, or the name of a data set: see
    `sources.origin`.
    """
    return schema.defaults(schema.AUDIT)


def switch(config: ConfigDict, **names: str) -> ConfigDict:
    """Takes another constructor for some groups: switch(config, model="mlp").

    Fields that the new one does not take are cleared. MODULE:FUNCTION takes a user's
    own; its arguments are set as fields of the group afterwards.
    """
    for group, name in names.items():
        for field in schema.unread(config[group], group, name):
            if schema.group_fields(group)[field].default is None:
                config[group][field] = None
            else:
                del config[group][field]
        config[group].name = name
    return config


def mixtures() -> ConfigDict:
    """`train` for an MLP on mixtures in the papers' OU process (Ye 2025, section 6)."""
    config = train()
    config.data.update(name="mixture", k=8, d=32, scale=2.0)
    config.process.update(name="ornstein_uhlenbeck")
    config.times.update(name="log_uniform", t_min=1e-3, t_max=8.0)
    # The deviation of the data: means of variance 2^2 and components of variance 1.
    config.prediction.update(name="edm", sigma_data=2.2)
    config.model.update(name="mlp")
    config.optimizer.update(lr=1e-3, clip=1.0, schedule="cosine", warmup=200)
    config.sampler.update(grid="log", t_min=1e-3, t_max=8.0, steps=100)
    return config


def digits() -> ConfigDict:
    """`train` for a small transformer on 8 x 8 digits: minutes on a CPU."""
    # Sizes as calibrated on 2 cores with 100 digits: 90 % of samples are copies after
    # 8,000 steps, 136 s. Patches of 2 pixels take four times as long.
    config = train()
    config.data.update(name="digits")
    config.model.update(name="dit", patch=4, width=128, depth=4, num_heads=4)
    config.optimizer.update(lr=1e-3, clip=1.0, schedule="cosine", warmup=200)
    config.train.update(steps=8_000, batch_size=64, ema_decay=0.998)
    return config


def small_images() -> ConfigDict:
    """`train` for a transformer on images of 28 or 32 pixels: for 2 CPU cores."""
    # The network of `digits`, with patches of a quarter of the side: 16 tokens. More of
    # the noise at which samples settle on an image than the mean of EDM, -1.2, gives.
    config = digits()
    config.optimizer.lr = 2e-3
    config.times.mean = 0.5
    config.train.update(steps=60_000, batch_size=32)
    return config


def cifar() -> ConfigDict:
    """`train` for DiT-S/2 on 5,000 images of CIFAR-10 (Ye 2025, Table 1): for a GPU."""
    # The paper states neither the variant of DiT nor its training; these are our
    # choice. 12 layers of 6 heads are 72, of which the paper's 20 % are 14.
    config = train()
    config.data.update(name="cifar10", num_examples=5_000)
    config.model.update(
        name="dit", patch=2, width=384, depth=12, num_heads=6, dtype="bfloat16"
    )
    config.optimizer.update(lr=2e-4, clip=1.0, warmup=1_000)
    config.train.update(steps=100_000, batch_size=128, ema_decay=0.9999)
    config.sampler.update(num_samples=10_000)
    config.run.update(save_every=5_000, evaluate_every=5_000, snapshots=10, chunk=500)
    return config


def small_cifar() -> ConfigDict:
    """`small_images` for 50 images of CIFAR-10 at 32 x 32: two wide blocks."""
    # Wider than a patch has values, 192: a narrower one cannot tell the noise in all of
    # them, and leaves it in the samples.
    config = small_images()
    config.data.update(name="cifar10", num_examples=50)
    config.model.update(patch=8, width=256, depth=2)
    config.train.steps = 24_000
    return config


def unet() -> ConfigDict:
    """`train` for the base of Gu 2023: a DDPM++ U-Net on n images of CIFAR-10."""
    # Numbers of its code: 35 million parameters, 40,000 epochs for every n, no
    # augmentation, subsets with equally many images of each class. Its commands go
    # through the images in one order, that of a seed: train.order="fixed". Ours draw a
    # new order every epoch.
    config = train()
    config.data.update(name="cifar10", num_examples=1_000, balanced=True)
    config.times.update(
        name="uniform", t_min=1e-5, t_max=1.0, clock="variance_preserving"
    )
    config.prediction.name = "vp"
    config.model.update(
        name="unet", width=128, depth=2, multipliers=(2, 2, 2), attention=(16,),
        time_scale=999.0, dropout=0.13,
    )  # fmt: skip
    config.optimizer.update(name="adam", lr=2e-4)
    config.train.update(
        epochs=40_000.0, warmup_epochs=200.0, batch_size=512, ema_decay=0.99929
    )
    config.sampler.update(num_samples=10_000)
    config.run.update(
        save_every=2_000, evaluate_every=5_000, snapshots=0, snapshot_epochs=2_000,
        snapshot_samples=1_000, chunk=500,
    )  # fmt: skip
    return config


def small_unet(config: ConfigDict) -> ConfigDict:
    """`unet` at 8 x 8 pixels, narrow, with few images: for 2 CPU cores."""
    config.data.update(resolution=8, num_examples=20)
    config.model.update(width=32, depth=1, multipliers=(1, 2), attention=(4,))
    config.model.dropout = 0.0
    config.optimizer.lr = 1e-3
    config.train.update(epochs=1_500.0, warmup_epochs=20.0)
    config.train.update(batch_size=20, ema_decay=0.998)
    config.sweep.seeds = 2
    config.sampler.num_samples = 500
    return config


def unet_of_clothes() -> ConfigDict:
    """`unet` for Fashion-MNIST: 28 x 28, attention at 14 x 14."""
    config = unet()
    config.data.name = "fashion_mnist"
    config.model.attention = (14,)
    return config


def small_unet_of_clothes(config: ConfigDict) -> ConfigDict:
    """`small_unet` at 14 x 14: 189,000 parameters and 20 images, for 2 CPU cores."""
    small_unet(config)
    config.data.update(resolution=14, num_held_out=1_000)
    config.model.update(width=16, attention=(7,))
    config.train.update(epochs=4_000.0, warmup_epochs=50.0)
    config.sweep.seeds = 3
    config.sampler.num_samples = 200
    return config


def smoke_unet(config: ConfigDict) -> ConfigDict:
    """`smoke` of `unet`: a tiny network on digits."""
    smoke(config)
    config.data.update(name="digits", balanced=False)
    config.model.update(width=4, depth=1, multipliers=(1, 2), attention=(4,))
    config.train.epochs = 1.0
    config.sweep.seeds = 1
    return config


def copying() -> ConfigDict:
    """`train` for an MLP that copies few digits in half a minute on a CPU."""
    config = train()
    config.data.update(name="digits", num_examples=64)
    config.model.update(name="mlp", width=256, depth=3)
    config.optimizer.update(lr=1e-3, clip=1.0)
    config.train.update(steps=10_000, batch_size=64, ema_decay=0.998)
    config.run.update(save_every=100_000, evaluate_every=100_000, snapshots=4)
    return config


def prunings(criteria, ratios) -> tuple:
    """The points of a sweep with the control and every way of pruning."""
    # {}: the control, which is fine-tuned as long as the others and not pruned.
    return {}, *(
        {"prune.criterion": criterion, "prune.ratio": ratio}
        for criterion in criteria
        for ratio in ratios
    )


def labellings(*counts) -> tuple:
    """The points of a sweep: as many random labels, then none, true and unique ones."""
    return (
        *({"data.num_labels": count, "data.labels": "random"} for count in counts),
        *({"data.labels": name} for name in ("none", "true", "unique")),
    )


def skips(levels, depth) -> tuple:
    """The points of a sweep: one skip kept, all of one resolution, none."""
    each = depth + 1
    one = ({i} for i in range(levels * each))
    some = (set(range(k * each, (k + 1) * each)) for k in range(levels))
    return tuple(
        {"model.skips": tuple(int(i in kept) for i in range(levels * each))}
        for kept in (*one, *some, set())
    )


def smoke(config: ConfigDict) -> ConfigDict:
    """The same run in seconds: small net, few steps, few samples."""
    config.data.update(num_examples=16, num_held_out=16)
    if ":" not in config.model.name:  # a user's own network has its own sizes
        config.model.update(width=16, depth=1)
    if "warmup" in config.optimizer:
        config.optimizer.update(warmup=min(config.optimizer.warmup, 1))
    config.train.update(steps=4, batch_size=8)
    for field, most in (("epochs", 2.0), ("warmup_epochs", 0.5)):  # of 2 steps each
        if config.train[field] is not None:
            config.train[field] = min(config.train[field], most)
    config.sampler.update(steps=2, num_samples=8)
    config.memorization.update(near=4)
    config.sweep.update(seeds=2)
    config.measure.update(draws=8, likelihood=min(config.measure.likelihood, 4))
    config.measure.update(targets=min(config.measure.targets, 2), search=2)
    config.prune.update(draws=8, steps=2, looks=2)
    config.emm.update(low=8, high=16, budget=4)
    config.run.update(
        log_every=1,
        save_every=2,
        evaluate_every=2,
        evaluate_points=8,
        snapshots=2,
        snapshot_samples=8,
        chunk=8,
    )
    return config


def restored(values: dict) -> ConfigDict:
    """The config of a run from the values in its config.json.

    Older runs kept values that another choice of name had left over: they stay, and
    nothing reads them.
    """
    known = schema.of(values)
    config = schema.defaults(known)
    for group in schema.CONSTRUCTED & values.keys():
        own = config[group]
        if ":" in str(values[group].get("name")):  # its fields are its own
            for field in own.keys() - values[group].keys():
                del own[field]
    config.update(values)
    for name, field, _ in schema.leaves(known):  # JSON knows no tuples
        group, _, last = name.rpartition(".")
        place = config[group] if group else config
        if field.kind is tuple and isinstance(place.get(last), list):
            place[last] = tuple(place[last])
    schema.leave_over(config, [f"{group}.name" for group in schema.CONSTRUCTED])
    return config


def variant_of(config: ConfigDict, variant: str, **variants) -> ConfigDict:
    """The named variant of a config; "full" is the config itself.

    Raises: ValueError with the known variants.
    """
    variants = {"full": lambda config: config, "smoke": smoke, **variants}
    if variant not in variants:
        raise ValueError(
            f"variant {variant!r} is not known; choose {', '.join(sorted(variants))}"
        )
    return variants[variant](config)
