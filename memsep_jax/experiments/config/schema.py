"""Every field of a config, declared once; all that is known of fields comes from here.

The ConfigDicts, their checks, what a change of a field means for a workdir and the page
docs/configs.md are derived. Dataclasses of this kind need less code here than pydantic:
the file format is a ConfigDict, and most rules compare a value with a bound.
"""

import difflib
import functools
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import create, placeholder

from memsep_jax.experiments.config.fields import (
    AFTER,
    GROWS,
    KINDS,
    NEWER,
    NEWEST,
    POINTS,
    RESULT,
    RUN,
    STOPS,
    TRAINING,
    WATCHED,
    Field,
    Group,
    Rule,
    at_least,
    choice,
    each,
    field,
    group,
    inside,
    integers,
    listed,
    named,
    one_of,
    positive,
    read_table,
    share,
    unset,
    within,
)  # fmt: skip

MOST_STEPS = 2**31 - 1  # of training: a step is an int32
MOST_TIMES = 2**20  # of a sampler: float32 hardly tells more times apart
ORDERS = {"reshuffled": True, "fixed": False}  # whether every epoch is shuffled anew

SOURCES = "memsep_jax.data.sources:SOURCES"
TIMES = "memsep_jax.process:TIMES"
PROCESSES = "memsep_jax.process:PROCESSES"
SEED = Rule("in [0, 2**32): others repeat these", lambda value: 0 <= value < 2**32)
COUNTS = integers("integers, at least 1")
LENGTH = Rule("at least 1, and below 2**31", lambda value: 1 <= value <= MOST_STEPS)
INCREASING = Rule(
    "positive and increasing",
    lambda value: all(t > 0 for t in value) and list(value) == sorted(set(value)),
)
# Empty, or a process.
CLOCK = Rule(
    "empty, or one of ",
    lambda value: not value or value in read_table(PROCESSES),
    PROCESSES,
)

# The constructors that take a field. Their signatures say the same; the names stand
# here too, as a command line is read before jax is imported. A test compares them.
FOLDER, MIXTURE = ("folder",), ("mixture",)
VARIANCE_PRESERVING = ("variance_preserving",)
LOG_NORMAL, BETA = ("log_normal",), ("beta",)
# Features of few enough dimensions for a covariance that need no labels.
QUALITY = ("random_conv", "alexnet", "inception")
DIT, UNET, NETWORKS = ("dit",), ("unet",), ("dit", "mlp", "unet")
OPTIMIZERS = ("adamw", "adam", "sgd")

# The threshold is that of Gu 2023 and Ye 2025; 50 neighbours are those of Carlini 2023,
# whose calibrated distance divides by their mean distance.
THRESHOLD = field(
    1 / 3,
    "A copy is nearer to one training point than this times the next one.",
    inside("; the papers use 1/3"),
    mark=WATCHED,
)
NEAR = field(
    50,
    "Neighbours that the density around a copy is measured with.",
    at_least(2, "neighbours"),
)

TRAIN: dict[str, Field | Group] = {
    "experiment": field("train", "The study to run, or your own MODULE:STUDY."),
    "seed": field(0, "Seed of weights, batches, samples and measurements.", SEED),
    "data": named(
        "The training points: a source, and which of its points are taken.",
        TRAINING,
        name=choice("digits", SOURCES, "Source of the points."),
        num_examples=unset(int, "Number of training points; all of them if not set."),
        seed=field(0, "Seed of the choice of points."),
        num_held_out=unset(int, "Number of points held out for comparison."),
        classes=unset(
            tuple, "Keeps these classes only.",
            integers("numbers of classes, from 0 on", 0),
        ),
        balanced=field(False, "Takes equally many points of each class."),
        resolution=unset(int, "Resizes images to this many pixels a side."),
        labels=field("none", "Labels: none, true, random (num_labels) or unique."),
        num_labels=unset(int, "Number of random labels."),
        duplicates=field(0.0, "Share of the points that occurs `copies` more times."),
        copies=field(1, "Additional copies of a duplicated point.", within(1, 10_000)),
        skip=field(0, "Skips this many points first, for a disjoint twin of skip=0."),
        mix=field(0.0, "Share of the points that comes from a second source."),
        mix_from=unset(str, "The second source: a name without arguments, or an .npz."),
        deduplicate=unset(bool, "Keeps each distinct point once."),
        path=unset(
            str, "File or folder to read.",
            of=("npz", "latents", "folder", "idx", "fashion_mnist"),
        ),
        stream=unset(
            bool, "Leaves the images on disk.",
            of=("npz", "latents", "folder", "cifar10", "tfds"),
        ),
        skip_bad=unset(bool, "Leaves out images that cannot be read.", of=FOLDER),
        crop=unset(
            str, "How images become square: squeeze or center.", mark=NEWER, of=FOLDER,
        ),
        exif=unset(
            bool, "Turns images as their EXIF tag says.", mark=NEWER, of=FOLDER,
        ),
        alpha=unset(
            str, "What transparent pixels become: white, drop.", mark=NEWER, of=FOLDER,
        ),
        dataset=unset(str, "Data set of TensorFlow Datasets.", of=("tfds",)),
        data_dir=unset(
            str, "Where TensorFlow Datasets keeps its data.",
            of=("fashion_mnist", "cifar10", "tfds"),
        ),
        k=unset(int, "Number of components.", of=MIXTURE),
        d=unset(int, "Dimension.", of=MIXTURE),
        scale=unset(float, "Spread of the components' centres.", of=MIXTURE),
        truth_seed=unset(int, "Seed of the law itself.", of=MIXTURE),
        law=unset(str, "Law: separated, low_rank, student_t or boxes.", of=MIXTURE),
        rank=unset(int, "Rank of a low_rank law.", of=MIXTURE),
        noise=unset(float, "Noise around a low_rank law.", of=MIXTURE),
        dof=unset(float, "Degrees of freedom of a student_t law.", of=MIXTURE),
        width=unset(float, "Width of the boxes.", of=MIXTURE),
    ),
    "process": named(
        "The noising process.",
        TRAINING,
        name=choice("variance_exploding", PROCESSES, "The process."),
        beta_min=unset(float, "Rate of noise at t = 0.", of=VARIANCE_PRESERVING),
        beta_max=unset(float, "Rate of noise at t = 1.", of=VARIANCE_PRESERVING),
    ),
    "times": named(
        "The law of the times that training draws.",
        TRAINING,
        name=choice("log_normal", TIMES, "The law."),
        mean=unset(float, "Mean of log t.", of=LOG_NORMAL),
        std=unset(float, "Standard deviation of log t.", of=LOG_NORMAL),
        t_min=unset(float, "Smallest time.", of=("uniform", "log_uniform")),
        t_max=unset(float, "Largest time.", of=("uniform", "log_uniform", "beta")),
        a=unset(float, "First parameter of the beta law.", of=BETA),
        b=unset(float, "Second parameter of the beta law.", of=BETA),
        clock=unset(
            str, "The process whose time is drawn; the run's own if not set.",
            Rule("one of ", table=PROCESSES),
        ),
    ),
    "prediction": named(
        "What the network predicts.",
        TRAINING,
        name=choice("edm", "memsep_jax.score:PREDICTIONS", "The prediction."),
        sigma_data=unset(float, "Standard deviation of the data.", of=("edm",)),
    ),
    "model": named(
        "The network.",
        TRAINING,
        name=choice("dit", "memsep_jax.models:MODELS", "The network."),
        patch=unset(int, "Pixels on each side of a patch.", of=DIT),
        width=field(128, "Channels.", within(1, 2**16), of=NETWORKS),
        depth=field(
            4, "Blocks; of a U-Net, at each resolution.", within(1, 1_000), of=NETWORKS,
        ),
        num_heads=unset(int, "Attention heads.", of=DIT),
        mlp_ratio=unset(
            float, "Width of the MLPs, relative to `width`.",
            Rule("in (0, 64]; usually 4", lambda value: 0 < value <= 64), of=DIT,
        ),
        dropout=field(0.0, "Dropout rate.", share(), of=NETWORKS),
        dtype=unset(
            str, "Type that the network computes in.",
            one_of("float32", "bfloat16", "float16", "float64"),
            of=NETWORKS,
        ),
        multipliers=unset(
            tuple, "Multiples of `width`, one for each resolution.", COUNTS, of=UNET,
        ),
        attention=unset(
            tuple, "Sides of the feature maps with attention.",
            integers("integers: sides of feature maps"), of=UNET,
        ),
        variant=unset(str, "Variant: ddpm or ncsn.", of=UNET),
        time_embedding=unset(
            str, "Features of the time: positional or fourier.", of=UNET,
        ),
        time_scale=unset(float, "Factor of the time.", of=UNET),
        skips=unset(
            tuple, "Which skip connections stay, in the order of the encoder.",
            each("of 0 and 1", lambda kept: kept in (0, 1)), of=UNET,
        ),
    ),
    "optimizer": named(
        "The optimizer.",
        TRAINING,
        name=choice("adamw", "memsep_jax.train:OPTIMIZERS", "The optimizer."),
        lr=field(1e-3, "Learning rate.", of=OPTIMIZERS),
        weight_decay=field(
            0.0,
            "Weight decay; of adam and sgd, L2 beside the loss summed over the values "
            "of an example, as in Gu 2023.",
            of=OPTIMIZERS,
        ),
        b1=unset(float, "Decay of the mean gradient.", of=("adamw", "adam")),
        b2=unset(float, "Decay of the mean squared gradient.", of=("adamw", "adam")),
        momentum=unset(float, "Momentum.", of=("sgd",)),
        clip=unset(float, "Largest norm of a gradient.", of=OPTIMIZERS),
        schedule=field(
            "constant", "Learning rate after the warm-up: constant or cosine.",
            of=OPTIMIZERS,
        ),
        warmup=field(0, "Steps of linear warm-up.", of=OPTIMIZERS),
        skip_spikes=unset(
            float, "Skips steps whose gradient exceeds this many median norms.",
            of=OPTIMIZERS,
        ),
    ),
    "train": group(
        "The length of training, its batches and averages, and its measures against "
        "memorization.",
        TRAINING,
        steps=field(1_000, "Number of steps.", LENGTH, role=GROWS),
        epochs=unset(
            float, "Passes over the training points, in place of `steps`.",
            positive("passes over the training points"), role=GROWS,
        ),
        warmup_epochs=unset(
            float, "Warm-up in epochs, in place of optimizer.warmup.", at_least(0),
        ),
        batch_size=field(64, "Examples in a batch.", at_least(1)),
        order=field(
            "reshuffled", "Order of the points: a new one every epoch, or a fixed one.",
            one_of(*ORDERS),
        ),
        accumulate=field(1, "Parts of a batch, one after another.", at_least(1)),
        ema_decay=field(0.999, "Share of the average that a step keeps.", share()),
        ema_half_life=unset(
            float, "Half-life of the average in examples, in place of `ema_decay`.",
            positive("a number of examples"),
        ),
        ema_ramp=unset(
            float, "Limits the half-life to this share of the examples seen.",
            positive("a share of the examples seen"),
        ),
        flip=field(False, "Mirrors every other image."),
        label_drop=field(0.0, "Share of the labels that is dropped.", share()),
        temperature=unset(
            float, "Smooths the target of the network (train.smoothed).",
            positive("above 1 it smooths"),
        ),
        ambient=unset(
            float, "Trains on data noised to this time (train.ambient).",
            positive("a time of the process"),
        ),
        stop_gap=unset(
            float,
            "Ends training at the first evaluation whose held-out loss exceeds the "
            "training loss by this share of itself.",
            share("a share of the held-out loss"), mark=STOPS,
        ),
        plateau=unset(
            int, "Ends training once the ratio has not risen for this many snapshots.",
            at_least(1, "snapshot"), mark=STOPS,
        ),
    ),
    # EDM's 18 steps by default: 17 on the grid, and the last one from t_min to 0.
    "sampler": group(
        "How samples are drawn.",
        AFTER,
        name=field("heun", "The sampler: an ODE method, sde or edm.", mark=WATCHED),
        grid=field("edm", "Spacing of its times: edm or log.", mark=WATCHED),
        t_min=field(0.002, "Last time.", mark=WATCHED),
        t_max=field(80.0, "First time.", mark=WATCHED),
        steps=field(17, "Number of steps.", within(1, MOST_TIMES), mark=WATCHED),
        num_samples=field(1_000, "Number of samples.", at_least(1)),
        weights=field(
            "ema", "Weights that are sampled: their average, or the raw ones.",
            Rule("'ema' or 'raw'", lambda value: value in ("ema", "raw")),
        ),
        guidance=unset(
            float, "Weight g of the score s(x) + g (s(x, label) - s(x)); 1 is none.",
            Rule("at least 0", lambda value: 0 <= value < math.inf), mark=WATCHED,
        ),
        churn=unset(float, "S_churn of EDM.", mark=WATCHED, of=("edm",)),
        churn_min=unset(float, "S_tmin of EDM.", mark=WATCHED, of=("edm",)),
        churn_max=unset(float, "S_tmax of EDM.", mark=WATCHED, of=("edm",)),
        churn_noise=unset(float, "S_noise of EDM.", mark=WATCHED, of=("edm",)),
    ),
    "memorization": group(
        "What counts as a copy.",
        AFTER,
        threshold=THRESHOLD,
        near=NEAR,
    ),
    "prune": group(
        "Pruning after training.",
        AFTER,
        ratio=field(
            0.0, "Share of the units that is removed; 0 prunes nothing.",
            share("the share of units to remove"),
        ),
        criterion=field(
            "small_t", "Measure that ranks the units.",
            listed("memsep_jax.prune:CRITERIA"),
        ),
        group=field("heads", "Kind of unit.", listed("memsep_jax.prune:GROUPS")),
        draws=field(4_096, "Draws of a training point, a time and noise.", at_least(1)),
        clock=field(
            "variance_preserving",
            "The process whose time prune_times draws; empty for the run's own.", CLOCK,
        ),
        steps=field(400, "Steps of fine-tuning.", at_least(0)),
        lr=field(1e-4, "Learning rate of fine-tuning.", positive()),
        looks=field(4, "Evaluations along it.", at_least(1)),
        source=field(
            "", "Workdir, or packed checkpoint, of a run whose network is pruned.",
        ),
    ),
    "prune_times": named(
        "The law of the times of the small_t criterion (Algorithm 1 of Ye 2025).",
        AFTER,
        name=choice("beta", TIMES, "The law."),
        mean=unset(float, "Mean of log t.", of=LOG_NORMAL),
        std=unset(float, "Standard deviation of log t.", of=LOG_NORMAL),
        t_min=unset(float, "Smallest time.", of=("uniform", "log_uniform")),
        t_max=field(
            1.0, "Largest time.", positive(), of=("uniform", "log_uniform", "beta"),
        ),
        a=field(0.8, "First parameter of the beta law.", of=BETA),
        b=field(2.0, "Second parameter of the beta law.", of=BETA),
    ),
    "optimum": group(
        "The study that samples with a known score.",
        RESULT,
        score=field("empirical", "Whose score: empirical or truth."),
    ),
    "sweep": group(
        "The values of each axis of a sweep; () is the config's own value.",
        POINTS,
        seeds=field(3, "Seeds of every point.", within(1, 10_000)),
        num_examples=field((), "Values of data.num_examples.", COUNTS),
        d=field((), "Values of data.d.", COUNTS),
        width=field((), "Values of model.width.", COUNTS),
        depth=field((), "Values of model.depth.", COUNTS),
        weight_decay=field(
            (), "Values of optimizer.weight_decay.",
            each("at least 0", lambda decay: decay >= 0),
        ),
        points=field(
            (), "Values of any fields: ({}, {'train.flip': True}); {} changes none.",
            each(
                'of the form ({}, {"group.field": value}, ...)',
                lambda one: type(one) is dict and all(type(k) is str for k in one),
            ),
        ),
        setting=field(
            (), 'Older form of points: "train.flip=True; prune.ratio=0.2", or "".',
            each(
                'of the form ("group.field=value; group.field=value", ...)',
                lambda text: isinstance(text, str),
            ),
        ),
        together=field(
            16, "Networks, or points, in one compiled program.", at_least(1, "point"),
        ),
    ),
    "measure": group(
        "The measurements of sweeps.",
        AFTER,
        times=field((1e-3, 1e-2, 0.1, 1.0), "Times of the process.", INCREASING),
        draws=field(2_000, "Draws of X_t.", at_least(1)),
        features=unset(
            str,
            "What the quality of samples is measured on, in sweeps and along pruning: "
            "random_conv, alexnet or inception; unset: pixels.",
            Rule("one of " + ", ".join(QUALITY), lambda name: name in QUALITY),
            mark=NEWEST,
        ),
        weights=unset(
            str, "File of the weights of alexnet or inception.", mark=NEWEST,
        ),
        iters=field(
            50, "Iterations for a spectral norm or an eigenvalue.", at_least(1),
        ),
        probes=field(0, "Random directions of a trace; 0 is exact.", at_least(0)),
        likelihood=field(0, "Held-out points of the log-likelihood.", at_least(0)),
        eps=field(0.2, "eps of Theorem 5.1 of Ye 2025.", positive()),
        bands=field(10, "Bands of the noise axis.", at_least(1, "band")),
        swap=field("empirical", "The score that copies: empirical or trained."),
        patches=field(
            (3, 5, 7), "Sides of the patches that are tried, odd.",
            each(
                "odd integers, at least 1",
                lambda side: type(side) is int and side > 0 and side % 2 == 1,
            ),
        ),
        targets=field(0, "Training points that are searched for.", at_least(0)),
        search=field(100, "Steps of the search for each.", at_least(1)),
        detect_at=field(
            0.1, "Of `times`, the one of the table of the study `detect`.", positive(),
        ),
        onset_level=field(
            0.1, "Share of copies, or other sign, that marks its time.",
            inside(": a share of samples"),
        ),
        onset_tolerance=field(
            0.05, "Share of the way to the best distance that is left at tau_gen.",
            inside(": a share of the way"),
        ),
    ),
    "emm": group(
        "The search for effective model memorization.",
        POINTS,
        eps=field(
            0.1, "EMM is the largest n of which 1 - eps is memorized.",
            inside("; the paper uses 0.1"),
        ),
        low=field(64, "Lower end of the first bracket.", at_least(2, "points")),
        high=field(512, "Upper end of the first bracket."),
        tolerance=field(
            0.1, "The search ends once the bracket is this narrow.",
            positive("0.1 ends within 10 %"),
        ),
        budget=unset(int, "Networks of one setting, at most.", at_least(1, "network")),
    ),
    "run": group(
        "Logs, checkpoints and memory.",
        RUN,
        log_every=field(50, "Steps between lines of the log.", at_least(1, "step")),
        save_every=field(1_000, "Steps between checkpoints.", at_least(1, "step")),
        keep=field(2, "Checkpoints that are kept.", at_least(1, "checkpoint")),
        evaluate_every=field(
            1_000, "Steps between evaluations.", at_least(1, "step"), mark=WATCHED,
        ),
        evaluate_points=field(
            256, "Points of an evaluation.", at_least(1), mark=WATCHED,
        ),
        snapshots=field(
            6, "Snapshots of the samples, on a log grid of steps.", at_least(0),
            mark=WATCHED,
        ),
        snapshot_epochs=field(
            0, "Epochs between snapshots; 0 for the log grid alone.", at_least(0),
            mark=WATCHED,
        ),
        snapshot_samples=field(
            250, "Samples of a snapshot.", at_least(1), mark=WATCHED,
        ),
        chunk=field(250, "Samples that are computed together.", at_least(1, "sample")),
        images=field(True, "Shows training images in the report."),
        tracker=field(
            "none", "Where metrics go as well as to metrics.jsonl.",
            listed("memsep_jax.experiments.runtime.trackers:TRACKERS"),
        ),
        shard=field(False, "Splits the state over the devices, as FSDP does."),
        pack=unset(
            str, "File that holds the whole state, to continue elsewhere.",
            Rule("the name of a file, or None", lambda value: bool(Path(value).name)),
        ),
        wait=field(
            0.0, "Seconds to wait for a checkpoint at prune.source.",
            at_least(0, "seconds"),
        ),
    ),
}  # fmt: skip

# As readers.Preparation has it.
PREPARATION = group(
    "How these files become images, as the generator's training prepared them.",
    RESULT,
    crop=field("squeeze", "How images become square: squeeze, or center (cut out)."),
    exif=field(True, "Turns images as their EXIF tag says."),
    alpha=field("white", "What transparent pixels become: white; drop ignores it."),
)

AUDIT: dict[str, Field | Group] = {
    "experiment": field("audit", "The study to run: audit or calibrate."),
    "seed": field(0, "Seed of subsets, of k-means and of random features.", SEED),
    "samples": unset(str, "The samples: a folder, a file, a run or a data set."),
    "train": unset(str, "The images that the generator was trained on."),
    "held_out": unset(str, "Images of the same kind that it never saw."),
    "pool": unset(str, "All images that `train` was chosen from."),
    "resolution": unset(int, "Pixels that images of all folders are resized to."),
    "skip_bad": unset(bool, "Leaves out images of folders that cannot be read."),
    "samples_as": PREPARATION,
    "train_as": PREPARATION,
    "held_out_as": PREPARATION,
    "pool_as": PREPARATION,
    "features": group(
        "The features that images are compared by.",
        RESULT,
        name=field(
            "random_conv", "The features; given: of files; none: pixels alone.",
            Rule("given, none, or one of ", table="memsep_jax.features:FEATURES"),
        ),
        path=unset(str, "File of the weights of inception, alexnet or lpips."),
        required=field(False, "Ends an audit that cannot have them."),
        samples=unset(str, "File of the samples' own features: an .npy [n, d]."),
        train=unset(str, "The same of `train`."),
        held_out=unset(str, "The same of `held_out`."),
        pool=unset(str, "The same of `pool`."),
    ),
    "memorization": group(
        "What counts as a copy.",
        AFTER,
        threshold=THRESHOLD,
        near=NEAR,
        flips=field(False, "Compares with mirrored training images too."),
        tiles=field(
            4, "Tiles on each side, of the tiled l2 distance.",
            at_least(1, "tile per side"),
        ),
        cells=field(10, "Cells of k-means, for C_T.", at_least(1, "cell")),
    ),
    "calibration": group(
        "The study of metrics on copies that are known.",
        RESULT,
        share=field(0.2, "Share of the samples that are copies."),
        features=field(("random_conv",), "Features that are studied."),
    ),
    "quality": group(
        "How good the samples are.",
        RESULT,
        points=field(
            10_000, "Points of each set, at most; 0: quality is not measured.",
            Rule("at least 50 images, or 0", lambda n: not n or n >= 50),
        ),
    ),
    "run": group(
        "Memory, and what the report shows.",
        RUN,
        chunk=field(1_000, "Samples computed together.", at_least(1, "sample")),
        memory=unset(
            float, "GiB that an audit may hold; what is free if not set.",
            positive("GiB, or None: what the machine has"),
        ),
        images=field(True, "Shows training images in the report."),
        cache=field(True, "Keeps features of sets and their moments for other audits."),
    ),
}  # fmt: skip

# The field of a config that lists the values that another choice of name left behind.
# Nothing reads those values. The list is not saved: `settled` passes over such values
# when a config is compared with a saved one.
LEFT_OVER = "left_over"


# The groups that have a constructor.
CONSTRUCTED = {
    name for name, one in TRAIN.items() if isinstance(one, Group) and one.named
}


def of(config) -> dict[str, Field | Group]:
    """TRAIN or AUDIT: the schema that a config, or its plain values, belongs to."""
    return TRAIN if "model" in config else AUDIT


def defaults(schema: dict[str, Field | Group]) -> ConfigDict:
    """All defaults; a field without one is a placeholder with its type."""

    def value(one):
        if isinstance(one, Group):
            return {name: value(part) for name, part in one.fields.items()}
        return placeholder(one.kind) if one.default is None else one.default

    return create(**{name: value(one) for name, one in schema.items()})


def leaves(schema: dict[str, Field | Group]) -> Iterator[tuple[str, Field, str]]:
    """("group.field", the field, its role) of every field."""
    for name, one in schema.items():
        if isinstance(one, Field):
            yield name, one, one.role or RESULT
            continue
        for part, known in one.fields.items():
            yield f"{name}.{part}", known, known.role or one.role


def group_fields(group: str) -> dict[str, Field]:
    """The fields of a group of a training."""
    one = TRAIN[group]
    assert isinstance(one, Group)  # and not a field of no group, such as "seed"
    return one.fields


@functools.cache
def train_fields() -> dict[str, Field]:
    """ "group.field" -> the field, of a training."""
    return {name: known for name, known, _ in leaves(TRAIN)}


def groups(*roles: str) -> tuple[str, ...]:
    """The groups of a training that have one of these roles."""
    return tuple(
        name
        for name, one in TRAIN.items()
        if isinstance(one, Group) and one.role in roles
    )


@functools.cache
def role(name: str) -> str:
    """The role of "group.field"; a field that is not known has that of its group."""
    for schema in TRAIN, AUDIT:
        for known, _, its_role in leaves(schema):
            if known == name:
                return its_role
    # The constructor of a user may take fields that no schema has.
    one = TRAIN.get(name.partition(".")[0])
    return one.role if isinstance(one, Group) else RESULT


def marked(mark: str) -> tuple[str, ...]:
    """The fields of a training that have a mark."""
    return tuple(name for name, known in train_fields().items() if known.mark == mark)


def takes(group: str, field: str, name: str) -> bool:
    """Whether the constructor `name` of a group takes a field, as far as is known."""
    known = train_fields().get(f"{group}.{field}")
    return known is None or not known.of or name in known.of


def unread(fields, group: str, name: str) -> list[str]:
    """The fields with a value that the constructor `name` does not take."""
    return [
        field
        for field, value in fields.items()
        if field != "name" and value is not None and not takes(group, field, name)
    ]


def leave_over(config, given) -> None:
    """Excuses values that the file gave for another name than the one in force.

    Args: given, the fields that were set on top of the file, "model.name" among them:
      only these must be taken by the new constructor.
    """
    left = set()
    if "model" in config:
        left = {
            f"{group}.{field}"
            for group in CONSTRUCTED
            if f"{group}.name" in given
            for field, value in config[group].items()
            if value is not None and field != "name"
        }
    excuse(config, left, given)


def excuse(config, names, given=()) -> None:
    """Lets a config hold fields that nothing reads, except those that were given."""
    left = {*config.get(LEFT_OVER, ()), *names} - {*given}
    with config.unlocked():
        if left:
            config[LEFT_OVER] = tuple(sorted(left))
        elif LEFT_OVER in config:
            del config[LEFT_OVER]


def did_you_mean(word: str, known) -> str:
    """ ", did you mean X?" where a known word is close."""
    close = difflib.get_close_matches(word, [str(k) for k in known], 1)
    return f", did you mean {close[0]!r}?" if close else ""


def values(config) -> Iterator[tuple[str, Any]]:
    """("group.field", value) of every field that a config holds."""
    for name, value in config.items():
        if hasattr(value, "items"):
            yield from ((f"{name}.{field}", one) for field, one in value.items())
        elif name != LEFT_OVER:
            yield name, value


def missing(config) -> list[str]:
    """A line for each field that the code reads and the config of a training lacks."""
    needed = ["seed"]
    for name, one in TRAIN.items():
        if isinstance(one, Group):
            fields = ["name"] if one.named else one.fields
            needed += [f"{name}.{field}" for field in fields]
    held = dict(values(config))
    return [f"{name} is missing" for name in needed if name not in held]


def wrong_kinds(config) -> list[str]:
    """A line for each value that has another type than its field.

    A ConfigDict refuses such a value too, but not what came to be None.
    """
    known = {name: one for name, one, _ in leaves(of(config))}
    return [
        f"{name}={value!r} must be {KINDS[known[name].kind][1]}"
        for name, value in values(config)
        if name in known and not known[name].is_kind(value)
    ]


def unknown(config) -> list[str]:
    """A line for each field that nothing reads, in groups without a constructor."""
    return [
        f"{name}.{field} is not a field of {name}{did_you_mean(field, one.fields)}"
        for name, one in of(config).items()
        if isinstance(one, Group) and not one.named
        for field in config[name]
        if field not in one.fields
    ]


def broken_rules(config, *only: str) -> list[str]:
    """A line for each value that breaks its rule or is not finite.

    Args: only, the groups that are looked at; all if there are none.
    """
    known, lines = {name: one for name, one, _ in leaves(of(config))}, []
    for name, value in values(config):
        # None is a field that is not set; where that is wrong, `wrong_kinds` says so.
        if only and name.partition(".")[0] not in only or value is None:
            continue
        rule = known[name].rule if name in known else None
        if isinstance(value, float) and not math.isfinite(value):
            lines.append(f"{name}={value} must be a finite number")
        elif rule and not rule.accepts(value):
            lines.append(f"{name}={value or repr(value)} must be {rule.text()}")
    return lines


def tags(known: dict) -> list[str]:
    """Names for a folder that belongs to the plain values of some groups.

    The first is today's. The others, where there are any, are those of versions without
    the fields marked NEWEST, and NEWER; such a folder holds the same results.
    """

    def without(*marks):
        newer = [name.partition(".") for mark in marks for name in marked(mark)]
        return {
            group: {
                field: value
                for field, value in fields.items()
                if (group, ".", field) not in newer or value is not None
            }
            if isinstance(fields, dict)
            else fields
            for group, fields in known.items()
        }

    versions = known, without(NEWEST), without(NEWEST, NEWER)
    texts = (json.dumps(some, sort_keys=True) for some in versions)
    made = [hashlib.sha256(text.encode()).hexdigest()[:12] for text in texts]
    return list(dict.fromkeys(made))


def settled(known: dict) -> dict:
    """The plain values of a config, without those that its constructors do not take.

    Two configs that differ in such a value only describe one run.
    """
    return {
        group: {
            field: value if takes(group, field, fields.get("name")) else None
            for field, value in fields.items()
        }
        if group in CONSTRUCTED and "model" in known
        else fields
        for group, fields in known.items()
    }
