"""Are these samples copies of that training set, and what should be done?

The samples are images of any generator; nothing is trained. Numbers go to the workdir:
compared/ (chunks), per_sample.csv, held_out.csv, duplicates.csv, pairs.npz,
metrics.json. The report is drawn from them.
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

from memsep_jax import data, defaults, features, memorization, neighbours, weights
from memsep_jax.data import DataError, Source, arrays, readers, sources
from memsep_jax.experiments import record
from memsep_jax.experiments.config import build, schema
from memsep_jax.experiments.reporting import report, tables, verdict
from memsep_jax.experiments.studies.compare import Sets, measure, share
from memsep_jax.fidelity import SMALL

WORKING = 2e8  # bytes that a compiler, a search or a network needs at least
ROOM = 2**30  # bytes of temporary memory beyond which nothing gets faster
ROLES = {
    "samples": "samples",
    "train": "train",
    "held_out": "held_out",
    "pool": "train",
}
# The largest allowed distance between two distribution functions of pixels. Two classes
# of CIFAR-10 differ by at most .27; its images differ from themselves by .39 (at gamma
# 2.2) to .56 ([0, 1] stored as [-1, 1]).
APART = 0.3
CHANCE = 0.05  # p from which a difference may be chance
FALSE = 0.01  # share of honest samples that a set without held-out images may flag
# Other ways to prepare images are tried on parts of the sets, for time and memory.
TRIED = 1_000  # samples, and held-out images, that are tried in other ways, at most
FEWER = 250  # samples that are tried with exchanged axes or colours, at most
NEAREST = "nearest", "second"  # columns of per_sample.csv
FILES = 10_000  # training files that are prepared in another way, at most


class Generator(NamedTuple):
    """A function that makes the samples of an audit, n -> n images, and how many."""

    generate: Callable
    total: int


def run(config, session, given=None, page=True):
    """Audits config.samples against config.train.

    Args: given, what is in memory already, by the name of its set: a `Source`, or a
      `Generator` of the samples, which is called once all else is known to be right.
      page, whether the report is written too.
    """
    with session.phase("data"):
        check(config)
        sets, origins, kept = read(config, given)
        compared, *note = _compared(config, sets, origins["train"].labels, kept)
        memory, room = check_memory(config, sets, compared)
    if given and isinstance(generator := given.get("samples"), Generator):
        with session.phase("sample"):
            origins["samples"] = generated(config, session, generator, sets.train)
            sets = sets._replace(samples=origins["samples"].images)
        check_new(config, sets)
    fingerprint = data.fingerprint(*sets)
    session.status["memory"] = memory
    session.begin(fingerprint, origins["train"]._replace(notes=()))
    strange = unlike(sets)
    excluded = 0 if kept is None else int((~kept).sum())
    notes = _notes(sets, origins, [*strange, *note], excluded)
    for note in notes:
        session.say(f"note: {note}")
    result = measure(config, sets, compared, session, fingerprint, room)
    metrics = result.metrics | {"experiment": "audit", "unlike": strange}
    metrics["notes"] = notes + verdict.notes(metrics)
    metrics["data"]["excluded"] = excluded
    pixels = metrics["memorization"]
    # Where the images as they are show copies, the verdict is known.
    if pixels["null"] is None or not verdict.above_chance(pixels, len(sets.samples))[0]:
        with session.phase("neighbours"):
            metrics["other_ways"] = other_ways(
                config, sets, origins, pixels, session, room
            )
    metrics["verdict"] = verdict.verdict(metrics)
    own = readers.is_workdir(Path(config.samples).expanduser())
    metrics["advice"] = advice(metrics, own)
    metrics["nearer"] = nearer(metrics["features"])
    metrics["comparable"] = comparable(metrics["quality"])
    _write(session, result, metrics, origins, page)


def _notes(sets, origins, more, excluded) -> list[str]:
    """All that a person should know about the images before the numbers."""
    notes = [note for origin in origins.values() for note in origin.notes]
    if any(_altered(origin) for origin in origins.values()):
        notes.append(
            "copies show only where images are prepared as the generator's training "
            "prepared them: --config.train_as.crop, .exif and .alpha give the other "
            "ways, and so do samples_as and held_out_as"
        )
    notes += more
    if (distinct := len(set(data.digests(sets.samples)))) < len(sets.samples):
        notes.append(f"only {distinct:,} of the {len(sets.samples):,} samples differ")
    if sets.held_out is None:
        notes.append(
            "no --config.held_out, so nobody knows what honest samples would score: "
            "give images of the same kind that were not trained on"
        )
    if excluded:
        notes.append(
            f"{excluded:,} held-out images are in the training set, and left out"
        )
    return notes


def _write(session, result, metrics, origins, page):
    """Writes the numbers, then the report, and says what they mean."""
    columns = {"index": np.arange(len(result.columns["nearest"]))} | result.columns
    files = {name: origin.files for name, origin in origins.items()}
    columns |= _named(files, samples={"": columns["index"]}, train=_found(columns))
    record.write_csv(session.workdir / "per_sample.csv", columns)
    if result.held_out:
        record.write_csv(session.workdir / "held_out.csv", result.held_out)
    repeats = {name: result.repeats[name] for name in ("train", "repeats")}
    repeats = result.repeats | _named(files, train=repeats)
    record.write_csv(session.workdir / "duplicates.csv", repeats)
    record.write_npz(session.workdir / "pairs.npz", **result.pairs)
    record.write_json(session.workdir / "metrics.json", metrics)
    if page:
        with session.reporting():
            report.write_audit(session.workdir, session.say)
    session.say(summary(metrics))
    for line in verdict.lines(metrics):
        session.say(line)
    if page:
        session.say(f"report: {session.workdir / 'report.html'}")


# What is read.


def check(config):
    """Refuses fields that are wrong for any images.   Raises: build.ConfigError."""
    build.check_kinds(config)
    wrong = [
        f"--config.{name}=... is required: a folder of images or a zip of one, an "
        ".npz, .npy or idx file, the workdir of a run, or the name of a data set"
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
    wrong += schema.broken_rules(config)
    if wrong:
        raise build.ConfigError("\n".join(wrong))


def read(config, given=None):
    """All images, of one size.

    Args: given, as for `run`; blank images stand for those of a `Generator`.
    Returns: `compare.Sets`; the `Source` of each; [held-out] bool: those that equal no
      training image, which are kept.
    Raises: build.ConfigError where they do not fit each other; DataError.
    """
    given = given or {}
    origins = {
        name: given[name] if name in given else origin_of(config, name)
        for name in ROLES
        if config[name]
    }
    check_places(config)
    check_prepared(config, given)
    drawn = isinstance(generator := origins["samples"], Generator)
    if drawn:  # not coloured, as this would make so many images in memory
        del origins["samples"]
    origins = coloured(origins)
    if drawn:
        shape = generator.total, *origins["train"].images.shape[1:]
        blank = Source(np.broadcast_to(np.uint8(0), shape))
        origins = {"samples": blank, **origins}
    sets = Sets(**{name: origin.images for name, origin in origins.items()})
    check_sizes(sets)
    train = data.digests(sets.train)
    if len(set(train)) < 2:
        raise build.ConfigError(
            f"--config.train={config.train} has fewer than 2 different images: the "
            "nearest and the second nearest are compared"
        )
    if not drawn:
        check_new(config, sets)
    if sets.held_out is None:
        return sets, origins, None
    seen = set(train)
    # A held-out image that was trained on would raise the null level, and hide copies.
    kept = np.array([one not in seen for one in data.digests(sets.held_out)])
    if not kept.any():
        raise build.ConfigError(
            f"all {len(kept):,} images of --config.held_out={config.held_out} are in "
            f"the training set, --config.train={config.train}: give images that were "
            "not trained on, or none"
        )
    return sets._replace(held_out=sets.held_out[kept]), origins, kept


def check_new(config, sets):
    """Refuses samples that are one of the other sets.   Raises: build.ConfigError."""
    samples = sorted(data.digests(sets.samples))
    for name, way_out in (
        ("train", "give what was generated as samples"),
        ("held_out", "give images that were neither generated nor trained on"),
    ):
        x = sets._asdict()[name]
        if x is not None and sorted(data.digests(x)) == samples:
            raise build.ConfigError(
                f"--config.samples={config.samples} and --config.{name}={config[name]} "
                f"are the same {len(samples):,} images: {way_out}"
            )


def generated(config, session, generator, train) -> Source:
    """The images of a `Generator`, which is called for run.chunk at a time, at most.

    Args: train, the images that they must be as large as.
    Raises: DataError: other images, or another number of them, than were asked for.
    """
    h, w, c = train.shape[1:]
    pieces: list[np.ndarray] = []
    done, kinds = 0, set()
    with session.progress("samples", generator.total) as update:
        while done < generator.total:
            n = min(config.run.chunk, generator.total - done)
            what = f"samples({n})"
            x = arrays.of_numpy(generator.generate(n), what)
            if x.ndim == 3 and len(x) == n:  # else 3 grey images may pass for one
                x = x[..., None]
            x = arrays.form(x, what)
            kinds.add((x.shape[1:], x.dtype))
            fits = x.shape[:3] == (n, h, w) and x.shape[3] in (1, c)
            if not fits or len(kinds) > 1:
                raise DataError(
                    f"{what} returned {x.dtype}{x.shape}; it must return {n} images of "
                    f"{h} x {w} x {c}, as the training images are, each time of one "
                    "dtype"
                )
            pieces.append(x.copy())  # it may be written over by the next call
            done += n
            update(done)
    origin = sources.of_array(np.concatenate(pieces), "samples")
    return coloured({"train": Source(train), "samples": origin})["samples"]


def check_places(config):
    """Refuses a folder inside another one, whose images would be read twice.

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


def check_prepared(config, given):
    """Refuses to prepare image files of sets that are read from none.

    Raises: build.ConfigError.
    """
    files = {
        name
        for name in ROLES
        if config[name] and name not in given and sources.is_files(config[name])
        and not readers.is_workdir(Path(config[name]).expanduser())
    }  # fmt: skip
    kind, wrong = "a folder of images or a zip of one", []
    if config.resolution is not None and not files:
        wrong.append(
            f"--config.resolution={config.resolution} resizes {kind}, and no set is "
            "one: give all sets in one size, without it"
        )
    for name in ROLES.keys() - files:
        for field, value in config[f"{name}_as"].items():
            if value != readers.AS_IT_IS._asdict()[field]:
                wrong.append(
                    f"--config.{name}_as.{field}={value} prepares {kind}, and "
                    f"--config.{name}={config[name]} is none: leave it out"
                )
    if wrong:
        raise build.ConfigError("\n".join(sorted(wrong)))


def coloured(origins):
    """Grey images become images of three colours where other sets have three."""
    if {origin.images.shape[-1] for origin in origins.values()} != {1, 3}:
        return origins
    result = dict(origins)
    for name, origin in origins.items():
        if origin.images.shape[-1] == 1:
            note = f"the grey images of --config.{name} are compared in three colours"
            x = np.repeat(origin.images, 3, axis=3)
            result[name] = origin._replace(images=x, notes=(*origin.notes, note))
    return result


def check_sizes(sets):
    """Refuses images of different sizes.   Raises: build.ConfigError."""
    for name, x in sets._asdict().items():
        if x is not None and x.shape[1:] != sets.train.shape[1:]:
            raise build.ConfigError(
                f"--config.{name} has images of {_size(x)}, --config.train of "
                f"{_size(sets.train)}: give all in the size and colours that were "
                "trained on; --config.resolution=N resizes folders, and blurs "
                "their images"
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
    """The images of `sources.origin`, or those of a run by its workdir."""
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
    known, images = record.read_json(workdir / "config.json"), None
    if role == "samples":
        x = (record.read_npz(workdir / "samples.npz") or {}).get("samples")
        images = None if x is None else Source(x)
    elif "model" in known:
        # An audit may be of a stranger's workdir: it must run none of its code. Only
        # that of the data would be run, as the network makes no training images.
        if build.is_own(name := known["data"]["name"]):
            raise DataError(
                f"--config.{role}={where} is a run with code of its own for the data "
                f"({name}), which an audit does not run: give its images"
            )
        splits = build.splits(defaults.restored(known))
        part = splits.held_out if role == "held_out" else splits.train
        if part is not None and splits.pixels:
            x = data.to_uint8(np.asarray(data.read(part).x))
            files = None if part is splits.held_out else splits.files
            label = None if part.label is None else np.asarray(part.label)
            images = Source(x, label, files=files, classes=splits.classes)
    if images is None or images.images.ndim != 4 or images.images.dtype != np.uint8:
        raise DataError(
            f"--config.{role}={where} is a run without images for it: give one that "
            "has finished on images, or a folder"
        )
    return images


def unlike(sets) -> list[str]:
    """Notes on sets whose pixels are grossly unlike those of the training images."""
    train, notes = arrays.histogram(sets.train), []
    for name in ("samples", "held_out"):
        x = sets._asdict()[name]
        if x is None:
            continue
        gap = arrays.apart(arrays.histogram(x), train)
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
    files: int  # the number of images that are tried
    of: int  # the number of images that the way changes
    make: Callable[[], np.ndarray]  # the images, uint8; ValueError: sizes differ


def other_ways(config, sets, origins, pixels, session, room) -> list[dict]:
    """Tries whether copies would show if images had been prepared or stored otherwise.

    Files are cropped or not, turned by EXIF or not, laid over white or not; samples
    have their colours or axes exchanged. Each way is tried on a part of the images that
    it changes. The null level is that of held-out images as they are; without them, it
    is the share of copies among the samples as they are.

    Args: pixels, the shares of copies as the images are; room, as for `measure`.
    Returns: a row per way: {"way", "set", "files", "of", "samples", "ratio", ...,
      "finds"}, or {"way", "set", "why", "finds"} where it could not be tried.
    """
    # Half of the room is for images that are prepared again, half for their search.
    room /= 2
    most = max(TRIED, min(FILES, int(room / sets.train[0].nbytes)))
    ways = [*_preparations(config, origins, most), *_exchanges(sets)]
    known, rows = data.fingerprint(*sets), []
    threshold = config.memorization.threshold

    @functools.cache  # one for all ways that change samples
    def search_train():
        return neighbours.searcher(sets.train, 2, memory=room)

    with session.progress("other ways to prepare images", len(ways)) as update:
        for i, way in enumerate(ways):
            # Named by all that the flags depend on.
            place = hashlib.sha256(f"{known} {way[:4]} {threshold}".encode())
            path = session.workdir / "compared" / f"ways-{place.hexdigest()[:12]}.npz"
            work = functools.partial(
                _try_way, way, sets, pixels, search_train, room, threshold
            )
            row: dict = {"way": way.text, "set": way.name}
            try:
                flags = record.kept(path, work)
            except ValueError as error:  # images of several sizes when prepared so, ...
                rows.append(row | {"why": str(error), "finds": False})
                continue
            row |= {"files": way.files, "of": way.of, "samples": len(flags["copies"])}
            rows.append(row | _shares(flags, pixels, sets.held_out is not None))
            update(i + 1)
    return rows


def _try_way(way, sets, pixels, search_train, memory, threshold):
    """{"copies": samples that are copies in this way, "null": held-out images too}."""
    x = np.ascontiguousarray(way.make())
    if x.shape[1:] != sets.train.shape[1:]:
        raise ValueError(f"images of {_size(x)} beside {_size(sets.train)}")
    null = np.zeros(0, bool)
    if way.name == "samples":
        copies = memorization.copied(search_train()(x), threshold)
        if sets.held_out is not None:  # they were searched as they are
            count = round(pixels["null"] * pixels["held_out"])
            null = np.arange(pixels["held_out"]) < count
        return {"copies": copies, "null": null}
    search = neighbours.searcher(x, 2, memory=memory)
    copies = memorization.copied(search(_few(sets.samples, TRIED)), threshold)
    if sets.held_out is not None:
        null = memorization.copied(search(_few(sets.held_out, TRIED)), threshold)
    return {"copies": copies, "null": null}


def _shares(flags, pixels, held_out) -> dict:
    """The share of copies in one way, and whether it shows copies ("finds")."""
    row = share(flags["copies"], flags["null"] if held_out else None)
    if held_out:
        finds = verdict.above_chance(row, len(flags["copies"]))[0]
    else:
        finds = row["interval"][0] > max(FALSE, pixels["interval"][1])
    return row | {"finds": bool(finds)}


def _preparations(config, origins, most):
    """A Way for each other choice of `readers.Preparation` that changes a file."""
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
    """The fields of a preparation that would change some of these images."""
    altered = origin.altered or {}
    return [f for f, files in altered.items() if np.isin(files, origin.files).any()]


def _few(x, most):
    """At most this many of x, evenly spaced: sets may be ordered by class."""
    return x[:: max(1, -(-len(x) // most))]


def _found(columns) -> dict:
    """The columns that hold places in the training set."""
    known = (f"{space}{which}" for space in ("", "feature_") for which in NEAREST)
    return {name: columns[name] for name in known if name in columns}


def _named(files, **places) -> dict:
    """Columns of the files at some places of a set, for sets that came from files.

    Args: files, by set, or None; places, by set: {the column of numbers: numbers}.
    """
    return {
        f"{name}_file".removeprefix("_"): files[which][numbers]
        for which, columns in places.items()
        if files[which] is not None
        for name, numbers in columns.items()
    }


def space(config, name, sets, label):
    """The `features.Extractor` of that name, for the images of these sets.

    Raises: weights.WeightsError; build.ConfigError.
    """
    maker = build.look_up(features.FEATURES, name, "features.name")
    given = dict(config.features.items()) | {"images": sets.train, "labels": label}
    room = max(WORKING, min(allowed(config, sets)[0] - _held(sets), ROOM))
    given |= {"seed": config.seed, "memory": room}
    taken = inspect.signature(maker).parameters
    chosen = {field: value for field, value in given.items() if field in taken}
    try:
        made = maker(sets.train.shape[1:], **chosen)
    except weights.WeightsError:
        raise
    except (ValueError, TypeError) as error:
        if isinstance(error, TypeError) and not build.is_own(name):
            raise  # our own extractors have no such errors of a person's making
        raise build.ConfigError(f"--config.features.name={name}: {error}") from error
    if not isinstance(made, features.Extractor):
        kind = "None" if made is None else type(made).__name__
        raise build.ConfigError(
            f"--config.features.name={name} makes {kind}: it must return a "
            "features.Extractor"
        )
    return made


def _compared(config, sets, label, kept):
    """The space beside pixels in which samples are compared, or None; and notes."""
    group = config.features
    if group.name == "none":
        return [None]
    try:
        if group.name == "given":
            return [_given(group, sets, kept)]
        extractor = space(config, group.name, sets, label)
        notes = [f"{extractor.name}: {extractor.note}"] if extractor.note else []
        return [extractor, *notes]
    except weights.WeightsError as error:
        if group.required:
            raise
        return [None, f"nothing is measured on {group.name} features: {error}"]


def _given(group, sets, kept):
    """Sets of features that another program made, of the held-out images kept."""

    def of_set(name, x):
        if not group[name]:
            raise build.ConfigError(
                f"--config.features.name=given needs --config.features.{name}=FILE.npy "
                "of [n, d] features, as there are images for it"
            )
        # The file has rows for the held-out images that were left out, too.
        mask = kept if name == "held_out" else np.ones(len(x), bool)
        return features.from_file(os.path.expanduser(group[name]), len(mask))[mask]

    given = sets.map(of_set)
    widths = {k: x.shape[1] for k, x in given._asdict().items() if x is not None}
    if len(set(widths.values())) > 1:
        raise build.ConfigError(
            f"given features of {widths} dimensions: all sets need those of one network"
        )
    return given


def check_memory(config, sets, *spaces) -> tuple[str, float]:
    """The memory that may be taken, in words, and the bytes left for temporary use.

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
    # The sets, the training set again where it is searched, and mirror images.
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
    # between two allocations: measured with 1,000 images of 256 x 256.
    room = max((memory - held - WORKING) / 2, least - 0.75 * WORKING)
    return f"{memory / record.GIB:.3g} GiB{whose}", min(room, ROOM)


def allowed(config, sets) -> tuple[float, str]:
    """The bytes that an audit may hold, and who says so where the config does not."""
    if config.run.memory is not None:
        return config.run.memory * record.GIB, ""
    free, whose = record.available()
    return free + _held(sets), whose  # the sets are in memory already


def _held(sets):
    """The bytes of the sets in memory: blank images repeat one byte, strides of 0."""
    return sum(x.nbytes for x in sets if x is not None and any(x.strides))


# What is said.


def nearer(in_features) -> str:
    """Says to which images the samples are nearer as a whole."""
    if in_features is None or in_features["nearer"] is None:
        return ""
    found = in_features["nearer"]
    side = "not told to be nearer to the training images, or to held-out ones"
    if found["p"] < CHANCE:
        side = "nearer to the training images than to held-out ones"
        if found["value"] > 0:
            side = "nearer to held-out images than to training ones"
    return (
        f"As a whole the samples are {side}: {in_features['title']} to training images "
        f"less that to held-out ones is {found['value']:.3g} to first order "
        f"(p = {found['p']:.3g} by {found['permutations']:,} permutations of these "
        "images)."
    )


PRUNING = "docs/results/pruning.md"
# What removed copies in our runs, most effective first; the field of a config of ours
# that does it, if there is one; and the page.
EVIDENCE = (
    (
        "Stop earlier: training that ends once the held-out loss is 10 % above the "
        "training loss took copies from 87 to 0 %, with better samples",
        "train.stop_gap",
        PRUNING,
    ),
    (
        "Stronger weight decay: 10 instead of 0 took copies from 87 to 0.6 %",
        "optimizer.weight_decay",
        PRUNING,
    ),
    (
        "More training images: the same network and steps copied 98.9 % of the time "
        "with 50 digits, and never with 1,400",
        "data.num_examples",
        "docs/results/main_job.md",
    ),
    (
        "A narrower network: of 100 digits, width 512 copied 83 %, and width 128 4 %",
        "model.width",
        "docs/results/emm.md",
    ),
    (
        "Pruning attention heads by small-t gradients helps least: 87 to 64 %, and "
        "fine-tuning brings copies back",
        "prune.ratio",
        PRUNING,
    ),
    (
        "None of these makes a network forget: a search over the noise still found "
        "its training images. What must not come out must not be trained on",
        "",
        PRUNING,
    ),
)


def advice(metrics, own: bool) -> list[dict]:
    """Advice that follows from the numbers, most useful first: {"text", "evidence"}.

    Args: own, whether the samples are those of a run of ours, whose config has fields
      for what is advised.
    """
    pixels, about = metrics["memorization"], metrics["data"]
    meaning = metrics["verdict"]["name"]
    lines = []
    if (way := verdict.other_way(metrics)) is not None:
        text = f"Audit again with {way['way']}, which shows copies: see the verdict."
        lines.append((text, ""))
    if meaning == "unknown":
        text = "Give --config.held_out: images of the same kind, not trained on."
        lines.append((text, ""))
    if meaning == "undertrained":
        lines.append(("Look at the samples, train longer, and audit again.", ""))
    if about["duplicates"] or about["near_duplicates"]:
        lines.append((_deduplicate(pixels, about), "duplicates.csv"))
    often = pixels["interval"][0] > memorization.BEGUN
    if meaning == "copies" or (meaning == "unknown" and often):
        for text, field, page in EVIDENCE:
            where = f" ({field})" if own and field else ""
            lines.append((f"{text}{where}.", page))
    if meaning == "no sign of copying":
        high = verdict.percent(max(pixels["excess_interval"][1], 0))
        text = (
            "Nothing here asks for a change. More samples would show rarer copies: "
            f"with {pixels['samples']:,}, up to {high} % may go unseen."
        )
        lines.append((text, ""))
    if not pixels["flips"]:
        text = "Mirrored copies were not looked for: --config.memorization.flips=True."
        lines.append((text, ""))
    return [{"text": text, "evidence": evidence} for text, evidence in lines]


def _deduplicate(pixels, about):
    text = (
        f"Deduplicate the training set: {about['duplicates']:,} images repeat another "
        f"one and {about['near_duplicates']:,} nearly do"
    )
    if emitted := about["duplicates_emitted"]:
        total = pixels["emitted"]["distinct"]
        text += f"; {emitted:,} of the {total:,} emitted images are such repeats"
    return f"{text}."


def comparable(rows) -> str:
    """Says which metrics of quality the numbers of images allow to compare."""
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
    pixels, about = metrics["memorization"], metrics["data"]
    n, samples = about["n"], about["samples"]
    table = Table(
        title=f"{samples:,} samples against {n:,} training images", show_header=False
    )
    spaces = {"pixels": pixels}
    if metrics["features"]:
        spaces[f"{metrics['features']['name']} features"] = metrics["features"]
    for name, values in spaces.items():
        table.add_row(f"copies, {name}", verdict.share(values))
        if values["null"] is not None:
            table.add_row("  honest samples would give", verdict.share(values, "null_"))
    table.add_row("exact copies, to the last bit", f"{pixels['exact_copies']:,}")
    table.add_row("training images emitted", f"{pixels['emitted']['distinct']:,}")
    table.add_row("duplicates in the training set", f"{about['duplicates']:,}")
    for name, text in tables.quality_lines(metrics):
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
