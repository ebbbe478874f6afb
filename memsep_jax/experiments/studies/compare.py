"""Samples beside the images of training, and beside held-out ones: every metric.

Two spaces are looked at: pixels, and the features of some network. Each search is kept
on disk chunk by chunk, so an interrupted one goes on. Copying is measured first; what
has no value for these images is left out, with its reason.
"""

import hashlib
import json
import math
from typing import NamedTuple

import numpy as np

from memsep_jax import data, fidelity, memorization, neighbours
from memsep_jax.experiments.config import build
from memsep_jax.experiments.reporting import verdict
from memsep_jax.experiments.runtime import record
from memsep_jax.experiments.studies.results import mean_interval
from memsep_jax.fidelity import UndefinedError

PAIRS = 12  # samples in each group of a report's pairs
THREE = 3  # neighbours of a training image: itself, and two others
FEW = 50  # images, below which no laws are compared
PER_CELL = 60  # samples in a cell of k-means, on average
MODELLED = 5_000  # points of each set, at most, that the FLD is fitted to
FOLDS = 5  # of the samples, for an interval of a difference
LAWS = 4_096  # dimensions, beyond which laws are not compared
TILED = 256, 26  # images compared by tiles together; bytes that a number of one takes
# Points of each set of a law beside a verdict, at most: seconds; and their bytes.
BESIDE, ROOM = 1_000, 2**28


class Sets(NamedTuple):
    """What is compared; images are uint8 [*, h, w, c]."""

    samples: np.ndarray
    train: np.ndarray
    held_out: np.ndarray | None = None
    pool: np.ndarray | None = None  # all that the training set was chosen from

    def map(self, work):
        """(name, array) -> array, of those that there are."""
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
    train: neighbours.Neighbours  # of each: itself, or the first equal one; two others
    flipped: np.ndarray  # [m] bool: samples that are nearer in the mirror


class Measured(NamedTuple):
    """All numbers of a comparison, as files hold them."""

    metrics: dict  # metrics.json
    columns: dict  # per_sample.csv, a row a sample
    repeats: dict  # duplicates.csv, a row a training image that repeats another
    pairs: dict  # pairs.npz


def measure(
    config, sets, space, session, fingerprint, memory: float = math.inf
) -> Measured:
    """Compares samples with training images by every metric.

    Args:
      sets: `Sets` of images.   space: a `features.Extractor`, Sets of features that
        were made elsewhere, or None: then only pixels are compared.
      fingerprint: of the sets, which names what is kept on disk.
      memory: bytes that may be taken for a moment, beside the sets and their features.
    """
    group, known = config.memorization, build.to_json(config)
    of = [fingerprint, *(known[k] for k in ("seed", "memorization", "features"))]
    if isinstance(space, Sets):
        of.append(data.fingerprint(*space))
    elif space is not None:  # other weights at the same path see another image
        of.append(data.fingerprint(space.apply(sets.train[:1])))
    tag = hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:12]

    def chunked(name, work, x):
        return record.in_chunks(
            session.workdir / "compared" / tag / name,
            lambda start, stop: work(x[start:stop]),
            len(x),
            config.run.chunk,
            session,
            name.replace("-", " "),
        )

    with session.phase("neighbours"):
        seen = _search(chunked, "pixels", sets, group.near, memory, group.flips)
        columns, found = _copies(seen, group.threshold)
        images = _mirrored(sets.samples, seen.flipped)
        columns |= _of_pixels(chunked, sets, images, seen, group, memory)
    repeats = _repeats(seen, group.threshold)
    near = seen.samples.indices[:, 0]
    copied = columns["memorized"] == 1
    distinct = len(sets.train) - repeats["kind"].count("exact")
    out = memorization.emitted(near, copied, distinct)
    sizes = [2 * len(images)] if out.distinct else []
    more = memorization.rarefaction(out.counts, len(images), sizes, distinct)
    found |= {
        "samples": len(images),
        "flips": group.flips,
        "exact_copies": int(columns["exact_copy"].sum()),
        # Of one colour they may be equal by chance.
        "exact_varied": sum(
            int(images[i].min() < images[i].max())
            for i in np.flatnonzero(columns["exact_copy"])
        ),
        "emitted": {
            "distinct": out.distinct,
            "coverage": out.coverage,
            "more": list(zip(sizes, more.tolist(), strict=True)),
        },
    }
    metrics = {
        "memorization": found,
        "data": {
            "n": len(sets.train),
            "shape": sets.train.shape[1:],
            "samples": len(images),
            "held_out": 0 if sets.held_out is None else len(sets.held_out),
            "duplicates": len(sets.train) - distinct,
            "near_duplicates": repeats["kind"].count("near"),
            "duplicates_emitted": len(
                set(near[copied].tolist()) & {*repeats["repeats"], *repeats["train"]}
            ),
            "fingerprint": fingerprint,
        },
        "features": None,
        "quality": [],
        "left_out": [],
    }
    with session.phase("quality"):
        metrics["frechet"] = [law(equal(sets, config.seed), "FD (pixels)")]
    shown = _worst("pixels", images, sets.train, seen.samples)
    if space is not None:
        more, felt = _in_features(config, sets, space, session, chunked, memory)
        metrics["frechet"].append(more.pop("law"))
        metrics |= more
        if felt is not None:
            columns |= {f"feature_{k}": column for k, column in felt.columns.items()}
            shown |= _worst("features", sets.samples, sets.train, felt.near)
    return Measured(metrics, columns, repeats, shown)


def attempt(left_out, names, reference, work):
    """work(), or None where it has no value: then left_out says why, for each name."""
    try:
        return work()
    except UndefinedError as error:
        left_out += [
            {"metric": name, "reference": reference, "why": str(error)}
            for name in names
        ]
        return None


def check_distinct(train) -> int:
    """How many training points differ.   Raises: UndefinedError: one alone."""
    distinct = len(neighbours.distinct(train))
    if distinct < 2:
        raise UndefinedError(
            f"all {len(train):,} training images are one point there: the nearest and "
            "the second nearest are compared"
        )
    return distinct


def _search(chunked, name, sets, near, memory, flips=False) -> Searched:
    distinct = check_distinct(sets.train)
    # One for all, as it holds the training set.
    search = neighbours.searcher(
        sets.train, min(max(near, THREE), distinct), memory=memory
    )
    looked = memorization.with_flips(search) if flips else search

    def found(where, x, search, most):
        def work(x):
            found = search(x)._asdict()
            return {k: v[:, :most] if v.ndim == 2 else v for k, v in found.items()}

        kept = chunked(f"{name}-{where}", work, x)
        return neighbours.Neighbours(kept["distances"], kept["indices"]), kept

    drawn, kept = found("samples", sets.samples, looked, near)
    held = None
    if sets.held_out is not None:
        held, _ = found("held-out", sets.held_out, looked, 2)
    own, _ = found("train", sets.train, search, THREE)
    flipped = kept.get("flipped", np.zeros(len(sets.samples), bool))
    return Searched(drawn, held, own, flipped)


def _copies(seen, threshold):
    """Columns of the samples, and shares of copies beside their null levels."""
    near = seen.samples
    own = seen.train.distances[:, 1]  # to the nearest other one

    def rules(near):
        return memorization.copied(near, threshold), memorization.authentic(near, own)

    copied, authentic = rules(near)
    held = (None, None) if seen.held_out is None else rules(seen.held_out)
    columns = {
        "d1": near.distances[:, 0],
        "d2": near.distances[:, 1],
        "nearest": near.indices[:, 0],
        "second": near.indices[:, 1],
        "memorized": copied.astype(int),
        "authentic": authentic.astype(int),
    }
    found = {
        "threshold": threshold,
        **share(copied, held[0]),
        "authentic": share(authentic, held[1]),
    } | distances(near, seen.held_out)
    return columns, found


def distances(near, held_out) -> dict:
    """How far samples are from the training set, beside held-out points.

    Args: near, held_out: their neighbours; those of held-out points, or None.
    """
    d1 = near.distances[:, 0]
    other = None if held_out is None else held_out.distances[:, 0]
    return {
        "median_d1": float(np.median(d1)),
        "held_out_median_d1": None if other is None else float(np.median(other)),
        "far": None if other is None else verdict.far(d1, other),
    }


def share(flags, null=None) -> dict:
    """The share of flags [m], of held-out ones, and its excess, with 95 % intervals."""
    count, total = int(flags.sum()), len(flags)
    found: dict = {"ratio": count / total, "count": count}
    found["interval"] = memorization.wilson(count, total)
    if null is None:
        return found | {"null": None, "excess": None}
    of_null = int(null.sum()), len(null)
    found |= {"null": of_null[0] / of_null[1], "held_out": of_null[1]}
    found["null_interval"] = memorization.wilson(*of_null)
    found["excess"], found["excess_interval"] = memorization.excess(
        count, total, *of_null
    )
    return found


def _mirrored(images, flipped):
    """Images as they were nearest to training ones."""
    if not flipped.any():  # no copy of them all
        return images
    return np.where(flipped[:, None, None, None], images[:, :, ::-1], images)


def _of_pixels(chunked, sets, images, seen, group, memory):
    """Columns that only images have."""
    near = seen.samples
    pairs = zip(images, near.indices[:, 0], strict=True)
    columns = {
        "flipped": seen.flipped.astype(int),
        # One by one: all nearest images at once are as large as the samples.
        "exact_copy": np.array([int((x == sets.train[i]).all()) for x, i in pairs]),
        "calibrated_l2": memorization.calibrated_l2(near.distances),
    }
    tiles = tiles_of(images.shape[1:], group.tiles)
    if tiles > 1:
        most = tiled_together(images.shape[1:], memory)

        def work(rows):
            some = slice(rows[0], rows[-1] + 1)  # a view: rows would be a copy
            return memorization.nearest_tiled(
                images[some], sets.train, near.indices[some], tiles, most
            )._asdict()

        kept = chunked(f"tiles-{tiles}", work, np.arange(len(images)))
        columns["tiled_l2"] = kept["distances"]
        columns["tiled_nearest"] = kept["indices"]
    return columns


def tiles_of(shape, most) -> int:
    """Tiles a side that divide both sides of images [h, w, c]: the most that do."""
    return next(t for t in range(most, 0, -1) if not (shape[0] % t or shape[1] % t))


def tiled_together(shape, memory) -> int:
    """How many images `nearest_tiled` may look at together."""
    most, each = TILED
    return max(1, int(min(most, memory / (each * math.prod(shape)))))


def _repeats(seen, threshold):
    """Training images that repeat another one, exactly or nearly.

    Nearly: the nearest other one is closer than `threshold` times the second nearest
    other, which is the rule by which a sample is a copy.
    """
    first, own = seen.train.indices[:, 0], seen.train.distances
    exact = first != np.arange(len(first))
    near = np.zeros(len(first), bool)
    if own.shape[1] > 2:
        near = ~exact & (own[:, 1] < threshold * own[:, 2])
    rows = [*np.flatnonzero(exact).tolist(), *np.flatnonzero(near).tolist()]
    of = [*first[exact].tolist(), *seen.train.indices[near, 1].tolist()]
    kinds = ["exact"] * int(exact.sum()) + ["near"] * int(near.sum())
    return {"train": rows, "repeats": of, "kind": kinds}


def _worst(name, samples, train, near):
    """The samples that are most like a training image, worst first."""
    order = np.argsort(memorization.quotient(*near.distances[:, :2].T), kind="stable")
    return pairs(name, order[:PAIRS], samples, train, near)


def pairs(name, index, samples, train_x, near) -> dict:
    """What `figures.pairs` shows of the samples index [k], under a name in pairs.npz.

    Args: near, their neighbours among train_x, which are shown as samples are.
    """
    nearest = near.indices[index, :2]
    return {
        f"{name}_index": index,
        f"{name}_sample": samples[index],
        f"{name}_neighbours": data.like(samples, np.asarray(train_x[nearest])),
        f"{name}_distances": near.distances[index, :2],
        f"{name}_nearest": nearest,
    }


class Felt(NamedTuple):
    """What is searched in features."""

    columns: dict
    near: neighbours.Neighbours  # of the samples


def _in_features(config, sets, space, session, chunked, memory):
    """(parts of metrics.json, Felt); None for the latter where there are no copies."""
    name, about = "given", {"name": "given", "title": "FD (given features)"}
    left_out: list[dict] = []
    with session.phase("features"):
        if isinstance(space, Sets):
            felt = space
        else:
            name, about = space.name, {"name": space.name, "title": space.title}
            felt = sets.map(
                lambda which, x: chunked(
                    f"features-{name}-{which}",
                    lambda x: {"x": space.apply(x, memory)},
                    x,
                )["x"]
            )
        seen = attempt(
            left_out,
            [f"copies in {name} features"],
            "train",
            lambda: _search(chunked, f"in-{name}", felt, 2, memory),
        )
    found, searched = None, None
    if seen is not None:
        columns, found = _copies(seen, config.memorization.threshold)
        found |= about | {"dim": felt.samples.shape[1]}
        searched = Felt(columns, seen.samples)
    with session.phase("quality"):
        if found is not None:
            found |= _tests(config, felt, seen, left_out)
            found["nearer"] = _nearer(config, felt, about["title"], left_out)
        rows = _quality(config, felt, about["title"], left_out)
        own = law(equal(felt, config.seed), about["title"])
    parts = {"features": found, "quality": rows, "left_out": left_out, "law": own}
    return parts, searched


def _tests(config, felt, seen, left_out):
    """Tests of overfitting, against held-out images."""
    if felt.held_out is None:
        return {"c_t": None, "likelihood": None}

    def likelihood():
        check_dim(felt.train)
        points = min(config.quality.points, MODELLED)
        some = felt.map(lambda name, x: _some(x, points, config.seed))
        found = memorization.feature_likelihood(
            some.train, some.held_out, some.samples, config.seed
        )
        return {k: getattr(found, k) for k in ("fld", "fld_train", "gap")}

    def c_t():
        return copying(config, felt, seen.samples, seen.held_out)

    return {
        "c_t": attempt(left_out, ["C_T"], "held_out", c_t),
        "likelihood": attempt(left_out, ["FLD"], "held_out", likelihood),
    }


def copying(config, felt, near, held_out):
    """C_T, in cells of k-means.

    Args: felt, Sets of features; near, held_out, what is near to two of them.
    Raises: UndefinedError: too few samples, or none in a cell with a held-out point.
    """
    count = min(config.memorization.cells, len(felt.samples) // PER_CELL)
    if not count:
        raise UndefinedError(
            f"{len(felt.samples)} samples: a cell of k-means takes {PER_CELL} of them"
        )
    cell = _cells(felt.train, count, config.seed)
    test = memorization.copying_test(
        near.distances[:, 0],
        cell(felt.samples),
        held_out.distances[:, 0],
        cell(felt.held_out),
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
    """As many of each set, BESIDE at most, and nothing of the pool.

    Of what stays on disk only these are read.
    """
    sets = sets._replace(pool=None)
    largest = max(math.prod(x.shape[1:]) * x.dtype.itemsize for x in sets[:2])
    most = min(BESIDE, max(FEW, ROOM // max(largest, 1)))
    count = min(most, *(len(x) for x in sets if x is not None))
    return sets.map(lambda _, x: np.asarray(_some(x, count, seed)))


def law(sets, title, see=None) -> dict:
    """How far the samples are as a whole from held-out points; training points beside.

    By Frechet distances at equal numbers, on which they depend. "page" is that of one
    and the same point, the mean of the held-out ones: the trace of their covariance.
    "excess" is what samples have more than training points, as a share of it; whether
    it is above 0 is told by "interval", Student's, 95 %, of the same over fifths of
    both. "left_out" says why there is none.

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

    def to_held_out(x):
        return fidelity.frechet(x, held_out, warn=False)

    page = float(held_out.var(axis=0, ddof=1, dtype=np.float64).sum())
    if not page:
        return about | {"left_out": "all held-out points are the same"}
    found = {"samples": to_held_out(samples), "train": to_held_out(train)}
    fifths = [
        to_held_out(samples[i::FOLDS]) - to_held_out(train[i::FOLDS])
        for i in range(FOLDS)
    ]
    spread = mean_interval(np.array(fifths) / page)
    return {
        **about,
        **found,
        "page": page,
        "excess": (found["samples"] - found["train"]) / page,
        "interval": (float(spread.low), float(spread.high)),
    }


def _as_they_are(_, x):
    x = data.from_uint8(x) if x.dtype == np.uint8 else x
    return x.reshape(len(x), -1)


def _equal(config, *sets):
    """Sets of equal numbers, as many as the smallest has: laws' metrics depend on them.

    Of these sets alone: what else is given to an audit changes no number.

    Raises: UndefinedError: too few to be laws, or too many dimensions.
    """
    count = min(config.quality.points, *(len(x) for x in sets))
    if count < FEW:
        raise UndefinedError(f"{count} images: {FEW} of each set are the fewest")
    check_dim(sets[0])
    return [_some(x, count, config.seed) for x in sets]


def _nearer(config, felt, title, left_out):
    """The Frechet distance to training images less that to held-out ones.

    Its mean over fifths of the samples, and a 95 % interval of Student's. Both are of
    equal numbers, and so may be of fewer training images than the distance to them.
    """
    if felt.held_out is None:
        return None

    def differences():
        samples, *others = _equal(config, felt.samples, felt.train, felt.held_out)
        to_train, to_held_out = (
            [fidelity.frechet(samples[i::FOLDS], x, warn=False) for i in range(FOLDS)]
            for x in others
        )
        found = np.subtract(to_train, to_held_out)
        return mean_interval(found.tolist()) | {"images": len(samples)}

    name = f"{title} to train less that to held-out"
    return attempt(left_out, [name], "held_out", differences)


def _quality(config, felt, title, left_out):
    """A row for every metric and reference set, with the sizes that it was taken of."""

    def kid(a, b):
        size = min(1_000, len(a) // 2)  # fewer than all, or no draw differs
        return [fidelity.kid(a, b, size=size, seed=config.seed)]

    def plain(values):
        return [(value, None) for value in values]

    alone = {("Vendi score",): lambda a: plain([fidelity.vendi(a)])}
    of_two = {
        (title,): lambda a, b: plain([fidelity.frechet(a, b, warn=False)]),
        ("KID",): kid,
        ("precision", "recall", "density", "coverage"): lambda a, b: plain(
            fidelity.balls(a, b)
        ),
    }
    rows = []
    for reference, x in zip(Sets._fields, felt, strict=True):
        if x is None:
            continue
        works = [(names, work, [x]) for names, work in alone.items()]
        if reference != "samples":
            pair = [felt.samples, x]
            works += [(names, work, pair) for names, work in of_two.items()]
        for names, work, sets in works:
            count = min(config.quality.points, *(len(x) for x in sets))
            values = attempt(
                left_out,
                names,
                reference,
                lambda work=work, sets=sets: work(*_equal(config, *sets)),
            )
            rows += [
                {
                    "metric": name,
                    "value": value,
                    "std": std,
                    "reference": reference,
                    "features": title,
                    "images": count,
                }
                for name, (value, std) in zip(names, values or (), strict=False)
            ]
    return rows
