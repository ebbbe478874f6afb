"""Are these samples copies of that training set, and what should be done?

Samples of any generator, as images; nothing is trained. Numbers go to the workdir:
compared/ (chunks), per_sample.csv, duplicates.csv, pairs.npz, metrics.json. The report
is drawn from those.
"""

import functools
import hashlib
import inspect
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.table import Table

from memsep_jax import (
    data,
    defaults,
    features,
    memorization,
    neighbours,
    readers,
    sources,
    weights,
)
from memsep_jax.experiments.config import build
from memsep_jax.experiments.reporting import report, verdict
from memsep_jax.experiments.runtime import record
from memsep_jax.experiments.studies.compare import FEW, Sets, measure, share
from memsep_jax.fidelity import SMALL
from memsep_jax.readers import DataError
from memsep_jax.sources import Source

WORKING = 2e8  # bytes of temporaries at least: of a compiler, a search, a network
ROOM = 2**30  # bytes of them beyond which nothing is faster
ROLES = {
    "samples": "samples",
    "train": "train",
    "held_out": "held_out",
    "pool": "train",
}
# Of two distribution functions of pixels: two classes of CIFAR-10 differ by at most
# .27, and its images from themselves by .39 (gamma 2.2) to .56 ([0, 1] as [-1, 1]).
APART = 0.3
FALSE = 0.01  # of honest samples that a set without held-out images may flag
TRIED = 1_000  # samples, and held-out images, that are looked at with other ways, ...
FEWER = 250  # samples that are looked at with their axes exchanged
FILES = 10_000  # ... and training files that are prepared so, at most


def run(config, session):
    """Audits config.samples against config.train."""
    with session.phase("data"):
        check(config)
        sets, origins, kept = read(config)
        compared, note = _compared(config, sets, origins["train"].labels, kept)
        memory, room = check_memory(config, sets, compared)
    fingerprint = data.fingerprint(*sets)
    session.status["memory"] = memory
    session.begin(fingerprint, origins["train"]._replace(notes=()))
    notes = [note for origin in origins.values() for note in origin.notes]
    if any(_altered(origin) for origin in origins.values()):
        notes.append(
            "copies show only where images are prepared as the generator's training "
            "prepared them: --config.train_as.crop, .exif and .alpha give the other "
            "ways, and so do samples_as and held_out_as"
        )
    notes += (strange := unlike(sets)) + ([note] if note else [])
    if (distinct := len(set(data.digests(sets.samples)))) < len(sets.samples):
        notes.append(f"only {distinct:,} of the {len(sets.samples):,} samples differ")
    if sets.held_out is None:
        notes.append(
            "no --config.held_out, so nobody knows what honest samples would score: "
            "give images of the same kind that were not trained on"
        )
    excluded = 0 if kept is None else int((~kept).sum())
    if excluded:
        notes.append(
            f"{excluded:,} held-out images are in the training set, and left out"
        )
    for note in notes:
        session.say(f"note: {note}")
    found = measure(config, sets, compared, session, fingerprint, room)
    metrics = found.metrics | {"experiment": "audit", "unlike": strange}
    metrics["notes"] = notes + verdict.notes(metrics)
    metrics["data"]["excluded"] = excluded
    pixels = metrics["memorization"]
    if pixels["null"] is None or not verdict.above_chance(pixels, len(sets.samples))[0]:
        with session.phase("neighbours"):
            metrics["other_ways"] = other_ways(
                config, sets, origins, pixels, session, room
            )
    metrics["verdict"] = verdict.verdict(metrics)
    metrics["advice"] = advice(metrics)
    metrics["nearer"] = nearer(metrics["features"])
    metrics["comparable"] = comparable(metrics["quality"])
    columns = found.columns | _named(origins, found.columns["nearest"])
    record.write_csv(session.workdir / "per_sample.csv", columns)
    record.write_csv(session.workdir / "duplicates.csv", found.repeats)
    record.write_npz(session.workdir / "pairs.npz", **found.pairs)
    record.write_json(session.workdir / "metrics.json", metrics)
    session.write_status()  # the report shows the seconds so far
    with session.phase("report"):
        report.write_audit(session.workdir, session.say)
    session.write_status()
    session.say(summary(metrics))
    for line in verdict.lines(metrics):
        session.say(line)
    session.say(f"report: {session.workdir / 'report.html'}")


# What is read.


def check(config):
    """Refuses what no image would make right.   Raises: build.ConfigError."""
    build.check_kinds(config, defaults.audit())
    wrong = [
        f"--config.{name}=... is required: a folder of images or a zip of one, an .npz "
        "or .npy, the workdir of a run, or the name of a data set"
        for name in ("samples", "train")
        if not config[name]
    ]
    hows = {"": readers.Preparation(config.resolution)}
    for name in ROLES:
        hows[f"{name}_as."] = _preparation(config, name)._replace(resolution=None)
    for where, how in hows.items():
        try:
            readers.check_preparation(how)
        except ValueError as error:
            wrong.append(f"{where}{error}")
    group = config.memorization
    rules = {
        "memorization.threshold": (0 < group.threshold < 1, "in (0, 1); usually 1/3"),
        "memorization.near": (group.near >= 2, "at least 2 neighbours"),
        "memorization.tiles": (group.tiles >= 1, "at least 1 tile a side"),
        "memorization.cells": (group.cells >= 1, "at least 1 cell"),
        "quality.points": (config.quality.points >= FEW, f"at least {FEW} images"),
        "run.chunk": (config.run.chunk >= 1, "at least 1 sample"),
        "run.memory": (
            config.run.memory is None or config.run.memory > 0,
            "positive: GiB, or None: what the machine has",
        ),
    }
    for name, (holds, rule) in rules.items():
        if not holds:
            first, field = name.split(".")
            wrong.append(f"{name}={config[first][field]} must be {rule}")
    if wrong:
        raise build.ConfigError("\n".join(wrong))


def read(config):
    """All images, of one size.

    Returns: `compare.Sets`; the `Source` of each; which of the held-out images were
      kept: those that no training one equals.
    Raises: build.ConfigError where they do not fit each other; DataError.
    """
    found = {name: origin_of(config, name) for name in ROLES if config[name]}
    check_places(config)
    found = coloured(found)
    sets = Sets(**{name: origin.images for name, origin in found.items()})
    check_sizes(sets)
    drawn, known = data.digests(sets.samples), data.digests(sets.train)
    if len(set(known)) < 2:
        raise build.ConfigError(
            f"--config.train={config.train} has fewer than 2 different images: the "
            "nearest and the second nearest are compared"
        )
    if sorted(drawn) == sorted(known):
        raise build.ConfigError(
            f"--config.samples={config.samples} and --config.train={config.train} are "
            f"the same {len(known):,} images: give what was generated as samples"
        )
    if sets.held_out is None:
        return sets, found, None
    held = data.digests(sets.held_out)
    if sorted(held) == sorted(drawn):
        raise build.ConfigError(
            f"--config.held_out={config.held_out} and --config.samples="
            f"{config.samples} are the same {len(held):,} images: give images that "
            "were neither generated nor trained on"
        )
    seen = set(known)
    kept = np.array([one not in seen for one in held])
    if not kept.any():
        raise build.ConfigError(
            f"all {len(kept):,} images of --config.held_out={config.held_out} are in "
            f"the training set, --config.train={config.train}: give images that were "
            "not trained on, or none"
        )
    sets = sets._replace(held_out=sets.held_out[kept])
    return sets, found, kept


def check_places(config):
    """Refuses a folder inside of another one, which would be read twice.

    Raises: build.ConfigError.
    """
    places = {
        name: Path(config[name]).expanduser().resolve()
        for name in ROLES
        if config[name] and Path(config[name]).expanduser().is_dir()
    }
    for one, other in itertools.permutations(places, 2):
        if places[one] in places[other].parents:
            raise build.ConfigError(
                f"--config.{other}={config[other]} is inside of --config.{one}="
                f"{config[one]}, so its images are in both: move one of them"
            )


def coloured(origins):
    """Grey images in three colours, where those of other sets have three."""
    if {origin.images.shape[-1] for origin in origins.values()} != {1, 3}:
        return origins
    found = dict(origins)
    for name, origin in origins.items():
        if origin.images.shape[-1] == 1:
            note = f"the grey images of --config.{name} are compared in three colours"
            x = np.repeat(origin.images, 3, axis=3)
            found[name] = origin._replace(images=x, notes=(*origin.notes, note))
    return found


def check_sizes(sets):
    """Refuses images of different sizes.   Raises: build.ConfigError."""
    for name, x in sets._asdict().items():
        if x is not None and x.shape[1:] != sets.train.shape[1:]:
            raise build.ConfigError(
                f"--config.{name} has images of {_size(x)}, --config.train of "
                f"{_size(sets.train)}: give all in the size and colours that were "
                "trained on; --config.resolution=N resizes folders, and blurs what is "
                "compared"
            )


def _size(x):
    return " x ".join(map(str, x.shape[1:]))


def origin_of(config, name) -> Source:
    """The images of a field of the config: "samples", "train", "held_out" or "pool"."""
    how = _preparation(config, name)._asdict()
    return images_of(config[name], name, skip_bad=bool(config.skip_bad), **how)


def _preparation(config, name):
    return readers.Preparation(config.resolution, **config[f"{name}_as"].to_dict())


def images_of(where, role, resolution=None, skip_bad=False, **preparation) -> Source:
    """As `sources.origin`, for a field of the config; a run's workdir too."""
    workdir = Path(where).expanduser()
    if not readers.is_workdir(workdir):
        try:
            return sources.origin(
                where, ROLES[role], resolution, skip_bad, **preparation
            )
        except DataError as error:
            raise DataError(f"--config.{role}: {error}") from error
        except ValueError as error:  # sizes that differ in a folder
            raise build.ConfigError(f"--config.{role}: {error}") from error
    known, found = record.read_json(workdir / "config.json"), None
    if role == "samples":
        x = (record.read_npz(workdir / "samples.npz") or {}).get("samples")
        found = None if x is None else Source(x)
    elif "model" in known:
        splits = build.build(defaults.restored(known)).splits
        part = splits.held_out if role == "held_out" else splits.train
        if part is not None and splits.pixels:
            x = data.to_uint8(np.asarray(data.read(part).x))
            files = None if part is splits.held_out else splits.files
            label = None if part.label is None else np.asarray(part.label)
            found = Source(x, label, files=files, classes=splits.classes)
    if found is None or found.images.ndim != 4 or found.images.dtype != np.uint8:
        raise DataError(
            f"--config.{role}={where} is a run without images for it: give one that "
            "has finished on images, or a folder"
        )
    return found


def unlike(sets) -> list[str]:
    """What tells samples or held-out images grossly from training ones, a note each."""
    known, notes = readers.histogram(sets.train), []
    for name in ("samples", "held_out"):
        x = sets._asdict()[name]
        if x is None:
            continue
        gap = readers.apart(readers.histogram(x), known)
        if gap > APART:
            low, high = int(x.min()), int(x.max())
            notes.append(
                f"the pixels of --config.{name} are unlike those of --config.train: "
                f"{low} .. {high} beside {sets.train.min()} .. {sets.train.max()}, and "
                f"their distribution functions differ by {gap:.2f}; if the two were "
                "scaled or coloured in different ways, copies do not show"
            )
    return notes


class Way(NamedTuple):
    """Another way in which the images of a set may have been meant."""

    text: str
    name: str  # of the set
    files: int  # images that are tried, ...
    of: int  # ... of those that it changes
    make: Callable[[], np.ndarray]  # them, uint8; ValueError: they do not fit together


def other_ways(config, sets, origins, pixels, session, room) -> list[dict]:
    """Whether copies would show if images had been prepared, or stored, otherwise.

    Files are cropped and not, turned by EXIF and not, laid over white and not; samples
    have their colours or axes exchanged. Each way is tried on a part of the images that
    it changes. The null level is that of held-out images as they are; without them,
    what the images as they are give.

    Args: pixels, the shares of copies as the images are; room, as for `measure`.
    Returns: what was found in each way: {"way", "set", "files", "of", "samples",
      "ratio", ..., "finds"}, or {"way", "why", "finds"} where it could not be tried.
    """
    # Prepared and searched in what is left: as many bytes again for the search.
    most = max(TRIED, min(FILES, int(room / 2 / sets.train[0].nbytes)))
    ways = [*_preparations(config, origins, most), *_exchanges(sets)]
    held_out = None if sets.held_out is None else _few(sets.held_out, TRIED)
    known, found = data.fingerprint(*sets), []
    threshold = config.memorization.threshold

    @functools.cache  # where it is asked for
    def of_train():
        return neighbours.searcher(sets.train, 2, memory=room / 2)

    def tried(way):
        """Which samples, and which held-out images, are copies."""
        x = np.ascontiguousarray(way.make())
        if x.shape[1:] != sets.train.shape[1:]:
            raise ValueError(f"images of {_size(x)} beside {_size(sets.train)}")
        if way.name == "samples":
            copies, null = of_train()(x), np.zeros(0, bool)
            if held_out is not None:  # searched as they are
                count = round(pixels["null"] * pixels["held_out"])
                null = np.arange(pixels["held_out"]) < count
            return {"copies": memorization.copied(copies, threshold), "null": null}
        search = neighbours.searcher(x, 2, memory=room / 2)
        copies, *null = (
            memorization.copied(search(some), threshold)
            for some in (_few(sets.samples, TRIED), held_out)
            if some is not None
        )
        return {"copies": copies, "null": null[0] if null else np.zeros(0, bool)}

    with session.progress("other ways to prepare images", len(ways)) as update:
        for i, way in enumerate(ways):
            place = hashlib.sha256(f"{known} {way[:4]} {threshold}".encode())
            path = session.workdir / "compared" / f"ways-{place.hexdigest()[:12]}.npz"
            row: dict = {"way": way.text, "set": way.name}
            try:
                flags = record.kept(path, functools.partial(tried, way))
            except ValueError as error:  # images of several sizes when prepared so, ...
                found.append(row | {"why": str(error), "finds": False})
                continue
            null = None if held_out is None else flags["null"]
            row |= {"files": way.files, "of": way.of, "samples": len(flags["copies"])}
            row |= share(flags["copies"], null)
            row["finds"] = bool(
                row["interval"][0] > max(FALSE, pixels["interval"][1])
                if null is None
                else verdict.above_chance(row, row["samples"])[0]
            )
            found.append(row)
            update(i + 1)
    return found


def _preparations(config, origins, most):
    """A Way for every other choice of `readers.Preparation` that changes a file."""
    for name in ("train", "samples"):
        origin, own = origins[name], _preparation(config, name)
        others = {
            "crop": "squeeze" if own.crop == "center" else "center",
            "exif": not own.exif,
            "alpha": "white" if own.alpha == "drop" else "drop",
        }
        for size in range(1, 4):
            for changed in itertools.combinations(_altered(origin), size):
                way = {field: others[field] for field in changed}
                text = " ".join(f"--config.{name}_as.{f}={v}" for f, v in way.items())
                files = np.unique(np.concatenate([origin.altered[f] for f in changed]))
                files = files[np.isin(files, origin.files)]
                some = _few(files, most if name == "train" else TRIED)
                how = own._replace(**way)._asdict()
                make = functools.partial(sources.again, config[name], some, **how)
                yield Way(text, name, len(some), len(files), make)


def _exchanges(sets):
    """A Way for each mistake in storing samples that their shape allows."""
    x = _few(sets.samples, FEWER)
    _, h, w, c = x.shape
    changes = {"turned upside down, x[:, ::-1]": lambda: x[:, ::-1]}
    if c > 1:
        changes["in exchanged colours, x[..., [2, 1, 0]]"] = lambda: x[..., [2, 1, 0]]
    if h == w:
        changes["as columns of rows, x.swapaxes(1, 2)"] = lambda: x.swapaxes(1, 2)
    for text, change in changes.items():
        # One at a time: of large images these copies are large.
        yield Way(f"the samples {text},", "samples", len(x), len(sets.samples), change)


def _altered(origin):
    """The fields that would change some of the images that are there."""
    altered = origin.altered or {}
    return [f for f, files in altered.items() if np.isin(files, origin.files).any()]


def _few(x, most):
    """At most so many, evenly."""
    return x[:: max(1, -(-len(x) // most))]


def _named(origins, nearest) -> dict:
    """Columns of file names, where there are files."""
    columns = {}
    if (files := origins["samples"].files) is not None:
        columns["file"] = files
    if (files := origins["train"].files) is not None:
        columns["nearest_file"] = files[nearest]
    return columns


def space(config, name, sets, label):
    """The `features.Extractor` of that name, for the images of these sets.

    Raises: weights.WeightsError; build.ConfigError.
    """
    maker = build.look_up(features.FEATURES, name, "features.name")
    given = {"path": config.features.path, "images": sets.train, "labels": label}
    room = max(WORKING, min(allowed(config, sets)[0] - _held(sets), ROOM))
    given |= {"seed": config.seed, "memory": room}
    taken = inspect.signature(maker).parameters
    chosen = {field: value for field, value in given.items() if field in taken}
    try:
        return maker(sets.train.shape[1:], **chosen)
    except weights.WeightsError:
        raise
    except ValueError as error:
        raise build.ConfigError(f"--config.features.name={name}: {error}") from error


def _compared(config, sets, label, kept):
    """Where samples are compared besides pixels, or None; and what is to be said."""
    group = config.features
    try:
        if group.name == "given":
            rows = {"held_out": kept}  # of the images that there were

            def given(name, x):
                mask = rows.get(name, np.ones(len(x), bool))
                return _given(group, name, len(mask))[mask]

            felt = sets.map(given)
            widths = {k: x.shape[1] for k, x in felt._asdict().items() if x is not None}
            if len(set(widths.values())) > 1:
                raise build.ConfigError(
                    f"given features of {widths} dimensions: all sets need those of "
                    "one network"
                )
            return felt, ""
        found = space(config, group.name, sets, label)
        return found, found.note and f"{found.name}: {found.note}"
    except weights.WeightsError as error:
        if group.required:
            raise
        return None, f"nothing is measured on {group.name} features: {error}"


def _given(group, name, n):
    if not group[name]:
        raise build.ConfigError(
            f"--config.features.name=given needs --config.features.{name}=FILE.npy of "
            "[n, d] features, as there are images for it"
        )
    return features.from_file(os.path.expanduser(group[name]), n)


def check_memory(config, sets, *spaces) -> tuple[str, float]:
    """What may be held, in words, and the bytes of it that are left for a moment.

    Raises: build.ConfigError: they are too few.
    """
    dims, least = [], WORKING
    for space in spaces:
        if isinstance(space, Sets):
            dims.append(space.train.shape[1])
        elif space is not None:
            dims.append(space.dim)
            least = max(least, 0.75 * WORKING + space.least())
    each = sets.train[0].nbytes + 4 * sum(dims)
    count = sum(len(x) for x in sets if x is not None)
    # The sets, the training set once more where it is searched, and mirror images.
    held = each * (count + len(sets.train))
    held += config.memorization.flips * sets.samples.nbytes
    memory, whose = allowed(config, sets)
    if held + least > memory:
        may, takes = memory / record.GIB, (held + least) / record.GIB
        raise build.ConfigError(
            f"--config.run.memory={may:.3g} GiB{whose}, but {count:,} images with "
            f"their features take {takes:.2g} GiB: raise it, give fewer images, or "
            "take features of fewer dimensions"
        )
    # Compilers and threads take their part, and half of the rest is not given back
    # between one allocation and the next: measured with 1,000 images of 256 x 256.
    room = max((memory - held - WORKING) / 2, least - 0.75 * WORKING)
    return f"{memory / record.GIB:.3g} GiB{whose}", min(room, ROOM)


def allowed(config, sets) -> tuple[float, str]:
    """Bytes that an audit may hold; and who says so, where it is not the config."""
    if config.run.memory is not None:
        return config.run.memory * record.GIB, ""
    free, whose = record.available()
    return free + _held(sets), whose  # the sets were read, and are free no more


def _held(sets):
    return sum(x.nbytes for x in sets if x is not None)


# What is said.


def nearer(felt) -> str:
    """To which images the samples are nearer as a whole, in words."""
    if felt is None or felt["nearer"] is None:
        return ""
    mean, low, high = (felt["nearer"][k] for k in ("mean", "low", "high"))
    side = "as near to the training images as to held-out ones"
    if high < 0:
        side = "nearer to the training images than to held-out ones"
    elif low > 0:
        side = "nearer to held-out images than to training ones"
    return (
        f"As a whole the samples are {side}: {felt['title']} to training images less "
        f"that to held-out ones is {mean:.3g} [{low:.3g}, {high:.3g}], by fifths of "
        "the samples."
    )


PRUNING = "docs/results/pruning.md"
EVIDENCE = (  # what took copies away where we measured it, most first; and where
    (
        "Stop earlier: training that ends once the held-out loss is 10 % above the "
        "training loss took copies from 87 to 0 %, with better samples "
        "(train.stop_gap).",
        PRUNING,
    ),
    (
        "Stronger weight decay: 10 instead of 0 took copies from 87 to 0.6 % "
        "(optimizer.weight_decay).",
        PRUNING,
    ),
    (
        "More training images: the same network and steps copied 98.9 % of the time "
        "with 50 digits, and never with 1,400.",
        "docs/results/main_job.md",
    ),
    (
        "A narrower network: of 100 digits, width 512 copied 83 %, and width 128 4 % "
        "(model.width).",
        "docs/results/emm.md",
    ),
    (
        "Pruning attention heads by small-t gradients helps least: 87 to 64 %, and "
        "fine-tuning brings copies back (prune.ratio).",
        PRUNING,
    ),
    (
        "None of these makes a network forget: a search over the noise still found "
        "its training images. What must not come out must not be trained on.",
        PRUNING,
    ),
)


def advice(metrics) -> list[dict]:
    """What follows from the numbers, most useful first: {"text", "evidence"}."""
    found, about = metrics["memorization"], metrics["data"]
    meaning = metrics["verdict"]["name"]
    lines = []
    if (way := verdict.other_way(metrics)) is not None:
        text = f"Audit again with {way['way']}, which shows copies: see the verdict."
        lines.append((text, ""))
    if meaning == "unknown":
        text = "Give --config.held_out: images of the same kind, not trained on."
        lines.append((text, ""))
    if meaning == "undertrained":
        text = "Look at the samples, train longer, and audit again."
        lines.append((text, ""))
    repeats, near = about["duplicates"], about["near_duplicates"]
    if repeats or near:
        text = (
            f"Deduplicate the training set: {repeats:,} images repeat another one and "
            f"{near:,} nearly do"
        )
        if emitted := about["duplicates_emitted"]:
            total = found["emitted"]["distinct"]
            text += f"; {emitted:,} of the {total:,} emitted images are such repeats"
        lines.append((f"{text}.", "duplicates.csv"))
    often = found["interval"][0] > memorization.BEGUN
    if meaning == "copies" or (meaning == "unknown" and often):
        lines += EVIDENCE
    if meaning == "no sign of copying":
        high = verdict.percent(max(found["excess_interval"][1], 0))
        text = (
            "Nothing here asks for a change. More samples would show rarer copies: "
            f"with {found['samples']:,}, up to {high} % may go unseen."
        )
        lines.append((text, ""))
    if not found["flips"]:
        text = "Mirrored copies were not looked for: --config.memorization.flips=True."
        lines.append((text, ""))
    return [{"text": text, "evidence": evidence} for text, evidence in lines]


def comparable(rows) -> str:
    """What is to be known of the numbers of images that quality was taken of."""
    pairs = {row["reference"]: row for row in rows if "Vendi" not in row["metric"]}
    if not pairs:
        return ""
    counts = {name.replace("_", "-"): row["images"] for name, row in pairs.items()}
    few = min(counts.values())
    text = "All depend on n, the images of each set that were taken"
    if len(set(counts.values())) > 1:
        each = ", ".join(f"{n:,} against {name}" for name, n in counts.items())
        text += (
            f", and it differs ({each}): do not compare these columns with each other"
        )
    text += "."
    if few < SMALL:
        text += (
            f" A Frechet distance of fewer than {SMALL:,} images is biased upwards: "
            "compare it at equal n alone."
        )
    return text


def summary(metrics) -> Table:
    """The end of an audit as a short table."""
    found, about = metrics["memorization"], metrics["data"]
    n, samples = about["n"], about["samples"]
    table = Table(
        title=f"{samples:,} samples against {n:,} training images", show_header=False
    )
    spaces = {"pixels": found}
    if metrics["features"]:
        spaces[f"{metrics['features']['name']} features"] = metrics["features"]
    for name, values in spaces.items():
        table.add_row(f"copies, {name}", verdict.share(values))
        if values["null"] is not None:
            table.add_row("  honest samples would give", verdict.share(values, "null_"))
    table.add_row("exact copies, to the last bit", f"{found['exact_copies']:,}")
    table.add_row("training images emitted", f"{found['emitted']['distinct']:,}")
    table.add_row("duplicates in the training set", f"{about['duplicates']:,}")
    for name, text in verdict.quality_lines(metrics):
        table.add_row(name, text)
    for row in metrics["quality"]:
        if row["reference"] in ("train", "held_out") and "Vendi" not in row["metric"]:
            where = row["reference"].replace("_", "-")
            value = f"{row['value']:.4g} (n = {row['images']:,})"
            table.add_row(f"{row['metric']}, against {where}", value)
    reasons: dict[str, dict] = {}
    for row in metrics["left_out"]:
        reasons.setdefault(row["why"], {})[row["metric"]] = None
    for why, names in reasons.items():
        table.add_row("left out", f"{', '.join(names)}: {why}")
    table.caption = metrics["comparable"] or None
    return table
