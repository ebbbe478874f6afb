"""Samples compared with training images and with held-out ones, by every metric.

They are compared in two spaces: pixels, and the features of some network. Each search
is kept on disk chunk by chunk, so an interrupted one goes on. Copying is measured
first; a metric that has no value for these images is left out, with its reason.
"""

import hashlib
import json
import math
from typing import NamedTuple

import numpy as np

from memsep_jax import data, fidelity, memorization, neighbours
from memsep_jax.experiments import record
from memsep_jax.experiments.config import build
from memsep_jax.experiments.reporting import verdict
from memsep_jax.experiments.runtime import cache
from memsep_jax.experiments.studies.results import mean_interval
from memsep_jax.fidelity import UndefinedError

PAIRS = 12  # samples in each group of a report's pairs
THREE = 3  # neighbours of a training image: itself, and two others
FEW = 50  # images: with fewer, no distributions are compared
PER_CELL = 60  # samples in a cell of k-means, on average
MODELLED = 5_000  # points of each set, at most, that the FLD is fitted to
FOLDS = 5  # parts of samples and of training points, for the interval of an excess
PERMUTATIONS = 999  # of training and held-out points: p is a multiple of 1 / 1,000
# Dimensions: with more, no distributions are compared. A covariance then takes 128 MiB
# in float64, and the time of its eigenvalues grows like their cube.
LAWS = 4_096
COPIES = 10  # copies, and distinct training points, with which emission is ranked
EMITTED = 10  # training points that are shown as emitted most, and as many as least
TILED = 256, 26  # images compared by tiles at a time; bytes that each number takes
# Points and bytes of each set, at most, whose distribution a verdict compares: so that
# it takes seconds.
BESIDE, ROOM = 1_000, 2**28


class Sets(NamedTuple):
    """The sets that are compared; images are uint8 [*, h, w, c]."""

    samples: np.ndarray
    train: np.ndarray
    held_out: np.ndarray | None = None
    pool: np.ndarray | None = None  # the images that the training set was chosen from

    def map(self, work):
        """Applies work, (name, array) -> array, to the sets that are given."""
        return Sets(
            *(
                None if x is None else work(name, x)
                for name, x in zip(self._fields, self, strict=True)
            )
        )


class Searched(NamedTuple):
    """Nearest training points of three sets, in one space."""

    samples: neighbours.Neighbours
    held_out: neighbours.Neighbours | None
    train: neighbours.Neighbours  # of each: itself (or its first equal), two others
    flipped: np.ndarray  # [m] bool: samples whose mirror image is nearer


class Measured(NamedTuple):
    """All numbers of a comparison, as files hold them."""

    metrics: dict  # metrics.json
    columns: dict  # per_sample.csv: one row per sample
    held_out: dict  # held_out.csv: one row per held-out image; none without any
    repeats: dict  # duplicates.csv: one row per training image that repeats another
    pairs: dict  # pairs.npz


def measure(
    config, sets, space, session, fingerprint, memory: float = math.inf
) -> Measured:
    """Compares samples with training images by every metric.

    Args:
      sets: `Sets` of images.   space: a `features.Extractor`, Sets of features that
        were made elsewhere, or None: then only pixels are compared.
      fingerprint: of the sets; it names what is kept on disk.
      memory: bytes for temporary use, beside the sets and their features.
    """
    group = config.memorization
    place = session.workdir / "compared" / _tag(config, sets, space, fingerprint)

    def chunked(name, work, x, shared=""):
        def chunks():
            return record.in_chunks(
                place / name,
                lambda start, stop: work(x[start:stop]),
                len(x),
                config.run.chunk,
                session,
                name.replace("-", " "),
            )

        # What is computed of one set alone, `shared` in words, other audits may share.
        if not (shared and config.run.cache):
            return chunks()
        # With the size of a chunk, which decides the last bits of features.
        of = {"what": shared, "of": data.fingerprint(x), "chunk": config.run.chunk}
        return cache.kept(of, chunks, len(x))

    with session.phase("neighbours"):
        near = _search(chunked, "pixels", sets, group.near, memory, group.flips)
        columns, copies = _copies(near, group.threshold)
        images = _mirrored(sets.samples, near.flipped)
        columns |= _of_pixels(chunked, sets, images, near, group, memory)
        held_out = nearest_two(near.held_out)
    repeats = _repeats(near, group.threshold)
    emitted, about = _of_training(sets, columns, repeats)
    copied = columns["memorized"] == 1
    ranked = which(near.samples, copied, near.train, sets.train)
    metrics = {
        "memorization": {
            **copies,
            "samples": len(images),
            "flips": group.flips,
            "exact_copies": int(columns["exact_copy"].sum()),
            # Images of one colour may be equal by chance.
            "exact_varied": sum(
                int(images[i].min() < images[i].max())
                for i in np.flatnonzero(columns["exact_copy"])
            ),
            "emitted": emitted,
            "which": ranked,
        },
        "data": about | {"fingerprint": fingerprint},
        "features": None,
        "quality": [],
        "left_out": [],
    }
    with session.phase("quality"):
        metrics["frechet"] = [law(equal(sets, config.seed), "FD (pixels)")]
    shown = _worst("pixels", images, sets.train, near.samples)
    if ranked is not None:
        shown |= emission(near.samples, copied, near.train, sets.train)
    if space is not None:
        more, own, nearest = _in_features(config, sets, space, session, chunked, memory)
        metrics["frechet"].append(more.pop("law"))
        metrics |= more
        if nearest is not None:
            columns |= {f"feature_{k}": column for k, column in own.items()}
            held_out |= nearest_two(nearest.held_out, "feature_")
            shown |= _worst("features", sets.samples, sets.train, nearest.samples)
    return Measured(metrics, columns, held_out, repeats, shown)


def _tag(config, sets, space, fingerprint) -> str:
    """Names a comparison by everything that its chunks depend on."""
    known = build.to_json(config)
    of = [fingerprint, *(known[k] for k in ("seed", "memorization", "features"))]
    if isinstance(space, Sets):  # a file of features may change under its name
        of.append(data.fingerprint(*space))
    elif space is not None:  # other weights at the same path give other features
        of.append(_probe(space, sets))
    return hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:12]


def _probe(space, sets) -> str:
    """The fingerprint of the features of one image."""
    return data.fingerprint(space.apply(sets.train[:1]))


def _of_training(sets, columns, repeats):
    """The training images that the samples emit, and facts about the sets."""
    samples, n = len(sets.samples), len(sets.train)
    near, copied = columns["nearest"], columns["memorized"] == 1
    distinct = n - repeats["kind"].count("exact")
    emitted = memorization.emitted(near, copied, distinct)
    sizes = [2 * samples] if emitted.distinct else []
    more = memorization.rarefaction(emitted.counts, samples, sizes, distinct)
    repeated = {*repeats["repeats"], *repeats["train"]}
    return {
        "distinct": emitted.distinct,
        "coverage": emitted.coverage,
        "more": list(zip(sizes, more.tolist(), strict=True)),
    }, {
        "n": n,
        "shape": sets.train.shape[1:],
        "samples": samples,
        "held_out": 0 if sets.held_out is None else len(sets.held_out),
        "duplicates": n - distinct,
        "near_duplicates": repeats["kind"].count("near"),
        "duplicates_emitted": len(set(near[copied].tolist()) & repeated),
    }


def which(near, copied, own, x, labels=None) -> dict | None:
    """What points that are emitted often are like: see `memorization.which`.

    Args: near, the neighbours of samples; copied [m]; own, those of the training points
      x in themselves.
    Returns: trait -> its rank correlation with emission; None without enough copies.
    """
    if copied.sum() < COPIES or len(np.unique(own.indices[:, 0])) < COPIES:
        return None
    columns = memorization.traits(x, own, labels)._asdict()
    ranked = memorization.which(near.indices[copied, 0], own, columns)
    return {
        name: found._asdict()
        for name, found in ranked.items()
        if np.isfinite(found.value)
    }


def emission(near, copied, own, x) -> dict:
    """The arrays from which a report shows what is emitted most and least, by name."""
    counts = np.bincount(near.indices[copied, 0], minlength=len(x))
    sparsity = own.distances[:, 1:].mean(axis=1)
    rows = most_and_least(counts, own, sparsity)
    return {f"emitted_{name}": np.asarray(x[some]) for name, some in rows.items()}


def most_and_least(counts, own, sparsity) -> dict:
    """The training points that are emitted most and least often.   name -> [k].

    Of points that are emitted equally seldom, the sparsest: where copies would be
    expected, if sparse points were copied first.
    """
    order = np.lexsort((-sparsity, counts))
    order = order[own.indices[order, 0] == order]  # each distinct point once
    return {"least": order[:EMITTED], "most": order[::-1][:EMITTED]}


def attempt(left_out, names, reference, work):
    """work(), or None where it has no value; left_out then says why, for each name."""
    try:
        return work()
    except UndefinedError as error:
        left_out += [
            {"metric": name, "reference": reference, "why": str(error)}
            for name in names
        ]
        return None


def check_distinct(train) -> int:
    """The number of different training points.   Raises: UndefinedError: one alone."""
    distinct = len(neighbours.distinct(train))
    if distinct < 2:
        raise UndefinedError(
            f"all {len(train):,} training images are one point there: the nearest and "
            "the second nearest are compared"
        )
    return distinct


def _search(chunked, name, sets, near, memory, flips=False) -> Searched:
    distinct = check_distinct(sets.train)
    # One searcher for all sets, as each holds a copy of the training set.
    search = neighbours.searcher(
        sets.train, min(max(near, THREE), distinct), memory=memory
    )
    flipping = memorization.with_flips(search) if flips else search

    def nearest(where, x, search, most, shared=""):
        def work(x):
            some = search(x)._asdict()
            return {k: v[:, :most] if v.ndim == 2 else v for k, v in some.items()}

        return chunked(f"{name}-{where}", work, x, shared)

    def of(kept):
        return neighbours.Neighbours(kept["distances"], kept["indices"])

    samples, held_out = nearest("samples", sets.samples, flipping, near), None
    if sets.held_out is not None:
        held_out = of(nearest("held-out", sets.held_out, flipping, 2))
    train = of(nearest("train", sets.train, search, THREE, "neighbours in itself"))
    flipped = samples.get("flipped", np.zeros(len(sets.samples), bool))
    return Searched(of(samples), held_out, train, flipped)


def _copies(near, threshold):
    """Columns of the samples, and shares of copies beside their null levels."""
    samples = near.samples
    own = near.train.distances[:, 1]  # of a training image to the nearest other one

    def rules(some):
        return memorization.copied(some, threshold), memorization.authentic(some, own)

    copied, authentic = rules(samples)
    null = (None, None) if near.held_out is None else rules(near.held_out)
    columns = {
        "d1": samples.distances[:, 0],
        "d2": samples.distances[:, 1],
        "nearest": samples.indices[:, 0],
        "second": samples.indices[:, 1],
        "memorized": copied.astype(int),
        "authentic": authentic.astype(int),
    }
    return columns, {
        "threshold": threshold,
        **share(copied, null[0]),
        "authentic": share(authentic, null[1]),
        **distances(samples, near.held_out),
    }


def distances(near, held_out) -> dict:
    """The distances of samples from the training set, beside those of held-out points.

    Args: near, the neighbours of samples; held_out, those of held-out points, or None.
    """
    d1 = near.distances[:, 0]
    other = None if held_out is None else held_out.distances[:, 0]
    return {
        "median_d1": float(np.median(d1)),
        "held_out_median_d1": None if other is None else float(np.median(other)),
        "far": None if other is None else verdict.far(d1, other),
    }


def nearest_two(held_out, prefix="") -> dict:
    """Columns of held_out.csv: the distances of held-out points to training points.

    Args: held_out, their neighbours; without any there are no columns.
    """
    if held_out is None:
        return {}
    d1, d2 = held_out.distances[:, 0], held_out.distances[:, 1]
    return {f"{prefix}d1": d1.tolist(), f"{prefix}d2": d2.tolist()}


def share(flags, null=None) -> dict:
    """The share of flags [m], that of held-out ones, the excess; 95 % intervals."""
    count, total = int(flags.sum()), len(flags)
    shares: dict = {"ratio": count / total, "count": count}
    shares["interval"] = memorization.wilson(count, total)
    if null is None:
        return shares | {"null": None, "excess": None}
    of_null = int(null.sum()), len(null)
    excess, interval = memorization.excess(count, total, *of_null)
    return shares | {
        "null": of_null[0] / of_null[1],
        "held_out": of_null[1],
        "null_interval": memorization.wilson(*of_null),
        "excess": excess,
        "excess_interval": interval,
    }


def _mirrored(images, flipped):
    """The images, mirrored where that is nearer to a training image."""
    if not flipped.any():  # no copy of all images is needed
        return images
    return np.where(flipped[:, None, None, None], images[:, :, ::-1], images)


def _of_pixels(chunked, sets, images, searched, group, memory):
    """Columns that only images have."""
    near = searched.samples
    pairs = zip(images, near.indices[:, 0], strict=True)
    columns = {
        "flipped": searched.flipped.astype(int),
        # One by one: all nearest images at once are as large as the samples.
        "exact_copy": np.array([int((x == sets.train[i]).all()) for x, i in pairs]),
        "calibrated_l2": memorization.calibrated_l2(near.distances),
    }
    tiles = tiles_of(images.shape[1:], group.tiles)
    if tiles > 1:
        most = tiled_together(images.shape[1:], memory)

        def work(rows):
            some = slice(rows[0], rows[-1] + 1)  # a view, where rows would be a copy
            return memorization.nearest_tiled(
                images[some], sets.train, near.indices[some], tiles, most
            )._asdict()

        kept = chunked(f"tiles-{tiles}", work, np.arange(len(images)))
        columns["tiled_l2"] = kept["distances"]
        columns["tiled_nearest"] = kept["indices"]
    return columns


def tiles_of(shape, most) -> int:
    """The largest number of tiles per side, at most `most`, that divides both sides."""
    return next(t for t in range(most, 0, -1) if not (shape[0] % t or shape[1] % t))


def tiled_together(shape, memory) -> int:
    """The number of images that `nearest_tiled` may compare at a time."""
    most, each = TILED
    return max(1, int(min(most, memory / (each * math.prod(shape)))))


def _repeats(near, threshold):
    """Training images that repeat another one, exactly or nearly.

    Nearly: the nearest other one is closer than `threshold` times the second nearest
    other, which is the rule by which a sample is a copy.
    """
    own, (first, other) = near.train.distances, near.train.indices[:, :2].T
    exact = first != np.arange(len(first))
    nearly = np.zeros(len(first), bool)
    if own.shape[1] > 2:  # there are two other distinct images
        nearly = ~exact & (own[:, 1] < threshold * own[:, 2])
    rows = [*np.flatnonzero(exact).tolist(), *np.flatnonzero(nearly).tolist()]
    of = [*first[exact].tolist(), *other[nearly].tolist()]
    kinds = ["exact"] * int(exact.sum()) + ["near"] * int(nearly.sum())
    return {"train": rows, "repeats": of, "kind": kinds}


def _worst(name, samples, train, near):
    """The samples that are most like a training image, worst first."""
    order = np.argsort(memorization.quotient(*near.distances[:, :2].T), kind="stable")
    return pairs(name, order[:PAIRS], samples, train, near)


def pairs(name, index, samples, train_x, near) -> dict:
    """The arrays from which `figures.pairs` draws the samples index [k], by name.

    Args: near, the neighbours of the samples among train_x.
    """
    nearest = near.indices[index, :2]
    return {
        f"{name}_index": index,
        f"{name}_sample": samples[index],
        f"{name}_neighbours": data.like(samples, np.asarray(train_x[nearest])),
        f"{name}_distances": near.distances[index, :2],
        f"{name}_nearest": nearest,
    }


def _in_features(config, sets, space, session, chunked, memory):
    """(parts of metrics.json, columns, `Searched`).

    The last two are None where the search has no value.
    """
    name, title = "given", "FD (given features)"
    left_out: list[dict] = []
    with session.phase("features"):
        points = space
        if not isinstance(space, Sets):
            name, title = space.name, space.title
            shared = ""
            if config.run.cache and space.digest is not None:
                shared = f"{name} features {space.digest()} {_probe(space, sets)}"
            points = sets.map(
                lambda which, x: chunked(
                    f"features-{name}-{which}",
                    lambda x: {"x": space.apply(x, memory)},
                    x,
                    "" if which == "samples" else shared,
                )["x"]
            )
        near = attempt(
            left_out,
            [f"copies in {name} features"],
            "train",
            lambda: _search(chunked, f"in-{name}", points, 2, memory),
        )
    columns = copies = None
    if near is not None:
        columns, copies = _copies(near, config.memorization.threshold)
        copies |= {"name": name, "title": title, "dim": points.samples.shape[1]}
    with session.phase("quality"):
        if copies is not None:
            copies |= _tests(config, points, near, left_out)
            copies["nearer"] = _nearer(config, points, title, left_out)
        parts = {
            "features": copies,
            "quality": _quality(config, points, title, left_out),
            "left_out": left_out,
            "law": law(equal(points, config.seed), title),
        }
    return parts, columns, near


def _tests(config, points, near, left_out):
    """Tests of overfitting, against held-out images; points are Sets of features."""
    if points.held_out is None:
        return {"c_t": None, "likelihood": None}

    def likelihood():
        if not config.quality.points:
            return None
        check_dim(points.train)
        most = min(config.quality.points, MODELLED)
        some = points.map(lambda name, x: _some(x, most, config.seed))
        test = memorization.feature_likelihood(
            some.train, some.held_out, some.samples, config.seed
        )
        return {"fld": test.fld, "fld_train": test.fld_train, "gap": test.gap}

    def c_t():
        return copying(config, points, near.samples, near.held_out)

    return {
        "c_t": attempt(left_out, ["C_T"], "held_out", c_t),
        "likelihood": attempt(left_out, ["FLD"], "held_out", likelihood),
    }


def copying(config, points, near, held_out):
    """C_T, in cells of k-means.

    Args: points, Sets of features; near and held_out, the neighbours of two of them.
    Raises: UndefinedError: too few samples, or none in a cell with a held-out point.
    """
    # Fewer cells for few samples: each cell has a test of its own (Meehan 2020).
    count = min(config.memorization.cells, len(points.samples) // PER_CELL)
    if not count:
        raise UndefinedError(
            f"{len(points.samples)} samples: a cell of k-means takes {PER_CELL} of them"
        )
    cell = _cells(points.train, count, config.seed)
    test = memorization.copying_test(
        near.distances[:, 0],
        cell(points.samples),
        held_out.distances[:, 0],
        cell(points.held_out),
    )
    return {"value": test.value, "error": test.error, "left_out": len(test.left_out)}


def _cells(train, count, seed):
    """k-means of the training points: x [m, d] -> the cell of each, [m]."""
    from sklearn.cluster import KMeans

    x = _some(train, 10_000, seed)
    count = min(count, len(neighbours.distinct(x)))
    return KMeans(count, n_init=1, random_state=seed).fit(x).predict


def _some(x, count, seed):
    """`count` rows at most, without replacement, in their order."""
    if len(x) <= count:
        return x
    rows = np.random.default_rng(seed).choice(len(x), count, replace=False)
    return x[np.sort(rows)]


def check_dim(x):
    """Refuses dimensions in which laws are not compared.   Raises: UndefinedError."""
    if x.shape[1] > LAWS:
        raise UndefinedError(
            f"{x.shape[1]:,} dimensions: laws are compared in {LAWS:,} at most"
        )


def equal(sets, seed) -> Sets:
    """An equal number of points of each set, at most BESIDE; no pool.

    Only these are read where points stay on disk.
    """
    sets = sets._replace(pool=None)
    largest = max(math.prod(x.shape[1:]) * x.dtype.itemsize for x in sets[:2])
    most = min(BESIDE, max(FEW, ROOM // max(largest, 1)))
    count = min(most, *(len(x) for x in sets if x is not None))
    return sets.map(lambda _, x: np.asarray(_some(x, count, seed)))


def law(sets, title, see=None) -> dict:
    """The Frechet distances of samples and of training points to held-out points.

    Both are of equal numbers, on which such distances depend. "page" is the distance of
    one point repeated, the mean of the held-out ones: the trace of their covariance.
    "excess" is the distance of samples less that of training points, as a share of
    "page"; "interval" is Student's, 95 %, of the same over fifths of both. "left_out"
    says why there is none.

    Args: sets, of equal numbers.   see, (name, points) -> features [n, d]; by default
      the points as they are.
    """
    about = {"title": title, "n": len(sets.samples)}
    if sets.held_out is None:
        return about | {"left_out": "nothing was held out"}
    if about["n"] < FEW:
        few = f"{about['n']} points of each set are fewer than {FEW}"
        return about | {"left_out": few}
    if see is None and (d := sets.samples[0].size) > LAWS:
        return about | {"left_out": f"{d:,} dimensions are more than {LAWS:,}"}
    if not np.isfinite(sets.samples).all():
        return about | {"left_out": "some samples are not finite"}
    samples, train, held_out, _ = sets.map(see or _as_they_are)
    of_held_out = fidelity.moments(held_out)

    def to_held_out(x):
        return fidelity.frechet(x, of_held_out, warn=False)

    # |m1 - m2|^2 = 0 and S1 = 0 leave tr S2 of the Frechet distance.
    page = float(held_out.var(axis=0, ddof=1, dtype=np.float64).sum())
    if not page:
        return about | {"left_out": "all held-out points are the same"}
    far = {"samples": to_held_out(samples), "train": to_held_out(train)}
    # Every fifth of them, as an order by class would make parts of one class. They
    # share held-out points alone, and are independent of each other, given these.
    fifths = [
        to_held_out(samples[i::FOLDS]) - to_held_out(train[i::FOLDS])
        for i in range(FOLDS)
    ]
    spread = mean_interval(np.array(fifths) / page)
    return {
        **about,
        **far,
        "page": page,
        "excess": (far["samples"] - far["train"]) / page,
        "interval": (float(spread.low), float(spread.high)),
    }


def _as_they_are(_, x):
    x = data.from_uint8(x) if x.dtype == np.uint8 else x
    return x.reshape(len(x), -1)


def _equal(config, *sets):
    """The sets at the number of points of the smallest, on which their metrics depend.

    Other sets that an audit is given change no number.

    Raises: UndefinedError: too few to be laws, or too many dimensions.
    """
    count = min(config.quality.points, *(len(x) for x in sets))
    if count < FEW:
        raise UndefinedError(f"{count} images: {FEW} of each set are the fewest")
    check_dim(sets[0])
    return [_some(x, count, config.seed) for x in sets]


def _moments(config, x) -> fidelity.Moments:
    """The moments of features of a reference, which other audits may share."""
    # Those of fewer points than dimensions are the points, and take no time.
    if not config.run.cache or len(x) <= x.shape[1]:
        return fidelity.moments(x)

    def work():
        found = fidelity.moments(x)
        return {"mean": found.mean, "factor": found.factor}

    of = {"what": "moments", "of": data.fingerprint(x)}
    return fidelity.Moments(**cache.kept(of, work, x.shape[1]), n=len(x))


def _nearer(config, points, title, left_out):
    """The `nearness` of quality.points samples to training and held-out images.

    Of the last two as many each.
    """
    if points.held_out is None or not config.quality.points:
        return None

    def nearness_of():
        (samples,) = _equal(config, points.samples)
        others = _equal(config, points.train, points.held_out)
        counts = {"samples": len(samples), "images": len(others[0])}
        return nearness(samples, *others, config.seed) | counts

    name = f"{title} to train less that to held-out"
    return attempt(left_out, [name], "held_out", nearness_of)


def nearness(samples, train, held_out, seed) -> dict:
    """The Frechet distance to training points less that to held-out ones; its p-value.

    The difference is taken to first order in how these two sets differ
    (`fidelity.influence`). It is then a sum over their points, so a permutation costs
    no distance: of 5,000 points in 2,048 dimensions, 999 permutations of the distances
    themselves would take hours.

    If the two sets were drawn alike, and the samples do not depend on which of them was
    trained on, their points may be exchanged, given the samples. p is the share of the
    permutations, with the one observed, whose difference is at least as large, of
    either sign. So p is below 0.05 with a probability of 5 % at most, whatever the law
    of the points.

    Args: samples [m, d], train [n, d], held_out [n, d] features.
    Returns: {"value", "p", "permutations"}; negative if the samples are nearer to the
      training points.
    Source: Fisher 1935, section 21; Phipson and Smyth 2010 (the observed one counts).
    """
    n = len(train)
    values = fidelity.influence(samples, np.concatenate([train, held_out]))
    # Their mean is 0, so the mean of one half less that of the other is twice its own.
    found = 2 * values[:n].mean()
    # In an order that does not know the sets: if they are swapped, p is the same.
    rng, values = np.random.default_rng(seed), np.sort(values)
    halves = (rng.permutation(values)[:n] for _ in range(PERMUTATIONS))
    chance = np.array([2 * half.mean() for half in halves])
    count = int((np.abs(chance) >= abs(found)).sum())
    p = (1 + count) / (1 + PERMUTATIONS)
    return {"value": float(found), "p": p, "permutations": PERMUTATIONS}


def _quality(config, points, title, left_out):
    """A row for each metric and reference set, with the number of images of each."""

    def kid(a, b):
        size = min(1_000, len(a) // 2)  # fewer than all, or all draws are the same
        return [fidelity.kid(a, b, size=size, seed=config.seed)]

    alone = {("Vendi score",): lambda a: [fidelity.vendi(a)]}
    of_two = {
        (title,): lambda a, b: [fidelity.frechet(a, _moments(config, b), warn=False)],
        ("KID",): kid,
        ("precision", "recall", "density", "coverage"): fidelity.balls,
    }
    rows: list[dict] = []
    for reference, x in points._asdict().items():
        if x is None or not config.quality.points:
            continue
        works = [(names, work, [x]) for names, work in alone.items()]
        if reference != "samples":
            pair = [points.samples, x]
            works += [(names, work, pair) for names, work in of_two.items()]
        for names, work, sets in works:
            count = min(config.quality.points, *(len(x) for x in sets))
            values = attempt(
                left_out,
                names,
                reference,
                lambda work=work, sets=sets: work(*_equal(config, *sets)),
            )
            about = {"reference": reference, "features": title, "images": count}
            for name, value in zip(names, values or (), strict=False):
                value, std = value if isinstance(value, fidelity.Kid) else (value, None)
                rows.append({"metric": name, "value": value, "std": std} | about)
    return rows
