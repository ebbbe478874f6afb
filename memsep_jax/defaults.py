"""Every field of a config with its default; a file in configs/ says what differs.

Fields that are None by default are placeholders with a type. A group is the `name` of
a constructor and its arguments: data.SOURCES and data.select, process.PROCESSES and
TIMES, score.PREDICTIONS, models.MODELS, train.OPTIMIZERS, sampling.TIME_GRIDS.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import create, placeholder


def train() -> ConfigDict:
    """The config of experiments/studies/training_run.py: EDM's setting, small."""
    return create(
        experiment="train",
        seed=0,
        data=dict(
            name="digits",
            num_examples=placeholder(int),  # None: all
            seed=0,
            num_held_out=placeholder(int),
            classes=placeholder(tuple),
            balanced=False,
            resolution=placeholder(int),
            labels="none",  # none, true, random (num_labels of them), unique
            num_labels=placeholder(int),
            duplicates=0.0,  # share of the points that occurs `copies` more times
            copies=1,
            skip=0,  # so many points of the seed's order: a disjoint twin of skip=0
            mix=0.0,  # share of the points that is from another source:
            mix_from=placeholder(str),  # the name of one without arguments; an .npz
            deduplicate=placeholder(bool),  # each distinct point once
            path=placeholder(str),  # npz, latents, folder
            stream=placeholder(bool),  # npz, latents, tfds: the images stay on disk
            skip_bad=placeholder(bool),  # folder: without what cannot be read
            crop=placeholder(str),  # folder: squeeze, center: readers.Preparation
            exif=placeholder(bool),
            alpha=placeholder(str),  # white, drop
            dataset=placeholder(str),  # tfds
            data_dir=placeholder(str),  # cifar10, tfds
            k=placeholder(int),  # mixture
            d=placeholder(int),
            scale=placeholder(float),
            truth_seed=placeholder(int),
            law=placeholder(str),  # separated, low_rank, student_t, boxes
            rank=placeholder(int),  # low_rank
            noise=placeholder(float),
            dof=placeholder(float),  # student_t
            width=placeholder(float),  # boxes
        ),
        process=dict(
            name="variance_exploding",
            beta_min=placeholder(float),
            beta_max=placeholder(float),
        ),
        times=dict(
            name="log_normal",
            mean=placeholder(float),
            std=placeholder(float),
            t_min=placeholder(float),
            t_max=placeholder(float),
            a=placeholder(float),
            b=placeholder(float),
            clock=placeholder(str),  # the process whose time it is; None: the run's
        ),
        prediction=dict(name="edm", sigma_data=placeholder(float)),
        model=dict(
            name="dit",
            patch=placeholder(int),
            width=128,
            depth=4,
            num_heads=placeholder(int),
            mlp_ratio=placeholder(float),
            dropout=0.0,
            dtype=placeholder(str),  # of the computation: float32, bfloat16
            multipliers=placeholder(tuple),  # unet: of the width, one a resolution
            attention=placeholder(tuple),  # sides of the feature maps that have it
            variant=placeholder(str),  # ddpm, ncsn
            time_embedding=placeholder(str),  # positional, fourier
            time_scale=placeholder(float),
            skips=placeholder(tuple),  # flags of skip connections, in encoder order
        ),
        optimizer=dict(
            name="adamw",
            lr=1e-3,
            weight_decay=0.0,
            b1=placeholder(float),
            b2=placeholder(float),
            momentum=placeholder(float),
            clip=placeholder(float),
            schedule="constant",
            warmup=0,
            skip_spikes=placeholder(float),  # beyond so many median norms: no step
        ),
        train=dict(
            steps=1_000,
            epochs=placeholder(float),  # instead of steps: passes over the n points
            warmup_epochs=placeholder(float),  # instead of optimizer.warmup
            batch_size=64,
            order="reshuffled",  # every epoch anew; fixed: that of the first epoch
            accumulate=1,
            ema_decay=0.999,  # a step
            ema_half_life=placeholder(float),  # instead: in training examples
            ema_ramp=placeholder(float),  # at most this share of the examples seen
            flip=False,
            label_drop=0.0,
            # Against memorization; None: off.
            temperature=placeholder(float),  # of targets: train.smoothed
            ambient=placeholder(float),  # the time from which on: train.ambient
            # Training ends at the first evaluation (run.evaluate_every, _points)
            # whose held-out loss is above the training loss by this share of itself.
            stop_gap=placeholder(float),
            # Training ends once the ratio has not risen for so many snapshots:
            # experiments/studies/training_run.py.
            plateau=placeholder(int),
        ),
        sampler=dict(
            name="heun",
            grid="edm",
            t_min=0.002,
            t_max=80.0,
            steps=17,
            num_samples=1_000,
            weights="ema",
            churn=placeholder(float),  # edm: S_churn, S_tmin, S_tmax, S_noise
            churn_min=placeholder(float),
            churn_max=placeholder(float),
            churn_noise=placeholder(float),
        ),
        memorization=dict(threshold=1 / 3, near=50),
        prune=dict(  # experiments/studies/pruning.py
            ratio=0.0,  # share of the units that falls; 0: none
            criterion="small_t",  # prune.CRITERIA
            group="heads",  # neurons, blocks
            draws=4_096,  # of a training point, its time and its noise
            clock="variance_preserving",  # whose time prune_times draws; "": the run's
            steps=400,  # of fine-tuning
            lr=1e-4,
            looks=4,  # along it
            source="",  # workdir, or packed checkpoint, of the run whose network it is
        ),
        prune_times=dict(  # the law of t of Algorithm 1 of Ye 2025
            name="beta",
            mean=placeholder(float),
            std=placeholder(float),
            t_min=placeholder(float),
            t_max=1.0,
            a=0.8,
            b=2.0,
        ),
        optimum=dict(score="empirical"),  # or truth: experiments/optimum.py
        sweep=dict(  # values of each axis; () is the config's own: experiments/sweep.py
            seeds=3,
            num_examples=(),
            d=(),
            width=(),
            depth=(),
            weight_decay=(),
            # Dicts of any fields: ({}, {"model.dropout": 0.2}); {}: no change.
            points=(),
            setting=(),  # the same as strings, "a.b=1; c.d=2": for one more version
            together=16,  # networks, or points, in one compiled program
        ),
        measure=dict(  # what the sweeps measure
            times=(1e-3, 1e-2, 0.1, 1.0),
            draws=2_000,  # of X_t
            iters=50,  # of the power iteration for a spectral norm
            probes=0,  # random directions of a trace; 0: exact
            likelihood=0,  # held-out points of the log-likelihood
            eps=0.2,  # of Theorem 5.1 of Ye 2025: experiments/capacity.py
            bands=10,  # of the noise axis: experiments/band_swap.py
            swap="empirical",  # or trained: the score that copies, in some of the bands
            targets=0,  # training points that are searched for: experiments/mitigate.py
            search=100,  # steps of the search for each
            onset_level=0.1,  # share of copies that is tau_mem: experiments/onset.py
            onset_tolerance=0.05,  # of the way to the best distance, left at tau_gen
        ),
        emm=dict(  # effective model memorization: experiments/emm.py
            eps=0.1,  # EMM is the largest n of which 1 - eps is memorized
            low=64,  # the bracket that the search begins with
            high=512,
            tolerance=0.1,  # ends it: where the bracket's ends differ by so little
            budget=placeholder(int),  # of networks, for one setting
        ),
        # Changes no result, and may differ when a run goes on; but where train.stop_gap
        # or plateau is set, when and how it is looked at does: build.LOOKS.
        run=dict(
            log_every=50,
            save_every=1_000,
            keep=2,
            evaluate_every=1_000,
            evaluate_points=256,
            snapshots=6,  # on a log grid of steps
            snapshot_epochs=0,  # one every so many epochs
            snapshot_samples=250,
            chunk=250,  # samples looked at together
            images=True,  # in the report, of training data
            tracker="none",  # tensorboard, wandb: besides metrics.jsonl
            shard=False,  # the state over the devices, as FSDP does, or on each of them
            pack=placeholder(str),  # a file with the whole state, to go on elsewhere
            wait=0.0,  # seconds for a checkpoint to come where prune.source looks
        ),
    )


# readers.Preparation: crop=center cuts out the middle, exif=False turns no image,
# alpha=drop takes the colours below what is transparent.
_PREPARATION = dict(crop="squeeze", exif=True, alpha="white")


def audit() -> ConfigDict:
    """The config of experiments/audit.py: samples of any generator, nothing is trained.

    samples, train, held_out and pool are each a folder of images or a zip of one, an
    .npz or .npy file, the workdir of a run, or the name of a data set: see
    `sources.origin`.
    """
    return create(
        experiment="audit",
        seed=0,  # of subsets, of k-means and of random features
        samples=placeholder(str),
        train=placeholder(str),  # what the generator was trained on
        held_out=placeholder(str),  # images of the same kind that it never saw
        pool=placeholder(str),  # all that `train` was chosen from
        resolution=placeholder(int),  # that all folders are resized to; None: as it is
        skip_bad=placeholder(bool),  # of folders, what cannot be read is left out
        # How files become images, as the generator's training prepared them.
        samples_as=dict(_PREPARATION),
        train_as=dict(_PREPARATION),
        held_out_as=dict(_PREPARATION),
        pool_as=dict(_PREPARATION),
        features=dict(  # features.FEATURES
            name="random_conv",
            path=placeholder(str),  # of the weights: inception, alexnet
            required=False,  # or an audit without them goes on in pixels alone
            samples=placeholder(str),  # file: an .npy [n, d] for each set
            train=placeholder(str),
            held_out=placeholder(str),
            pool=placeholder(str),
        ),
        memorization=dict(
            threshold=1 / 3,
            near=50,
            flips=False,  # samples are looked for in the mirror too
            tiles=4,  # a side, of the tiled l2 distance
            cells=10,  # of k-means, for C_T
        ),
        calibration=dict(  # experiments/calibrate.py
            share=0.2,  # of the samples that are copies
            features=("random_conv",),
        ),
        quality=dict(points=10_000),  # of each set, at most, for distances of laws
        run=dict(
            chunk=1_000,
            # GiB, of what an audit holds at once; None: what the machine has free.
            memory=placeholder(float),
            images=True,  # in the report, of training data
        ),
    )


def mixtures() -> ConfigDict:
    """`train` for an MLP on mixtures in the papers' OU process (Ye 2025, section 6)."""
    config = train()
    config.data.update(name="mixture", k=8, d=32, scale=2.0)
    config.process.update(name="ornstein_uhlenbeck")
    config.times.update(name="log_uniform", t_min=1e-3, t_max=8.0)
    config.prediction.update(name="edm", sigma_data=2.2)  # sqrt(2^2 + 1), the data's
    config.model.update(name="mlp")
    config.optimizer.update(lr=1e-3, clip=1.0, schedule="cosine", warmup=200)
    config.sampler.update(grid="log", t_min=1e-3, t_max=8.0, steps=100)
    return config


def digits() -> ConfigDict:
    """`train` for a small transformer on 8 x 8 digits: minutes on a CPU."""
    config = train()
    config.data.update(name="digits")
    config.model.update(name="dit", patch=4, width=128, depth=4, num_heads=4)
    config.optimizer.update(lr=1e-3, clip=1.0, schedule="cosine", warmup=200)
    config.train.update(steps=8_000, batch_size=64, ema_decay=0.998)
    return config


def cifar() -> ConfigDict:
    """`train` for DiT-S/2 on 5,000 images of CIFAR-10 (Ye 2025, Table 1): for a GPU."""
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


def unet() -> ConfigDict:
    """`train` for the base of Gu 2023: a DDPM++ U-Net on n images of CIFAR-10."""
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
    return {}, *(
        {"prune.criterion": criterion, "prune.ratio": ratio}
        for criterion in criteria
        for ratio in ratios
    )


def smoke(config: ConfigDict) -> ConfigDict:
    """The same run in seconds: small net, few steps, few samples."""
    config.data.update(num_examples=16, num_held_out=16)
    config.model.update(width=16, depth=1)
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
    """The config of a run from the values in its config.json."""
    if "model" not in values:
        config = audit()
    else:
        config = train()
        if values["data"].get("classes") is not None:  # JSON knows no tuples
            values["data"]["classes"] = tuple(values["data"]["classes"])
    config.update(values)
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
