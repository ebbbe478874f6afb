"""Samples beside the images of training, and beside held-out ones: every metric.

Two spaces are looked at: pixels, and the features of some network. Each search is kept
on disk chunk by chunk, so an interrupted one goes on.
"""

import hashlib
import json
from typing import NamedTuple

import numpy as np

from memsep_jax import data, fidelity, memorization, neighbours
from memsep_jax.experiments import record, setup
from memsep_jax.experiments.evaluate import PAIRS, pairs
from memsep_jax.experiments.sweep import mean_interval

THREE = 3  # neighbours of a training image: itself, and two others
FEW = 50  # images, below which no laws are compared
PER_CELL = 60  # samples in a cell of k-means, on average
MODELLED = 5_000  # points of each set, at most, that the FLD is fitted to
FOLDS = 5  # of the samples, for an interval of a difference
LAWS = 4_096  # dimensions, beyond which laws are not compared


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


def measure(config, sets, space, session, fingerprint) -> Measured:
    """Compares samples with training images by every metric.

    Args:
      sets: `Sets` of images.   space: a `features.Extractor`, Sets of features that
        were made elsewhere, or None: then only pixels are compared.
      fingerprint: of the sets, which names what is kept on disk.
    """
    group, known = config.memorization, setup.to_json(config)
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
        seen = _search(chunked, "pixels", sets, group.near, group.flips)
        columns, found = _copies(seen, group.threshold)
        images = _mirrored(sets.samples, seen.flipped)
        columns |= _of_pixels(chunked, sets, images, seen, group)
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
    }
    shown = _worst("pixels", images, sets.train, seen.samples)
    if space is not None:
        more, metrics["features"], metrics["quality"], felt = _in_features(
            config, sets, space, session, chunked
        )
        columns |= {f"feature_{name}": column for name, column in more.items()}
        shown |= _worst("features", sets.samples, sets.train, felt.samples)
    return Measured(metrics, columns, repeats, shown)


def _search(chunked, name, sets, near, flips=False) -> Searched:
    distinct = len(neighbours.distinct(sets.train))
    # One for all, as it holds the training set.
    search = neighbours.searcher(sets.train, min(max(near, THREE), distinct))
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
    }
    return columns, found


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


def _of_pixels(chunked, sets, images, seen, group):
    """Columns that only images have."""
    near = seen.samples
    pairs = zip(images, near.indices[:, 0], strict=True)
    columns = {
        "flipped": seen.flipped.astype(int),
        # One by one: all nearest images at once are as large as the samples.
        "exact_copy": np.array([int((x == sets.train[i]).all()) for x, i in pairs]),
        "calibrated_l2": memorization.calibrated_l2(near.distances),
    }
    h, w = images.shape[1:3]
    tiles = next(t for t in range(group.tiles, 0, -1) if not (h % t or w % t))
    if tiles > 1:

        def work(rows):
            return memorization.nearest_tiled(
                images[rows], sets.train, near.indices[rows], tiles
            )._asdict()

        kept = chunked(f"tiles-{tiles}", work, np.arange(len(images)))
        columns["tiled_l2"] = kept["distances"]
        columns["tiled_nearest"] = kept["indices"]
    return columns


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


def _in_features(config, sets, space, session, chunked):
    """(columns, shares and tests, rows of quality, what was searched)."""
    name, about = "given", {"name": "given", "title": "FD (given features)"}
    with session.phase("features"):
        if isinstance(space, Sets):
            felt = space
        else:
            name, about = space.name, {"name": space.name, "title": space.title}
            felt = sets.map(
                lambda which, x: chunked(
                    f"features-{name}-{which}", lambda x: {"x": space.apply(x)}, x
                )["x"]
            )
        seen = _search(chunked, f"in-{name}", felt, 2)
        columns, found = _copies(seen, config.memorization.threshold)
    found |= about | {"dim": felt.samples.shape[1]}
    with session.phase("quality"):
        found |= _tests(config, felt, seen) | {"nearer": _nearer(config, felt)}
        rows = _quality(config, felt, about["title"])
    return columns, found, rows, seen


def _tests(config, felt, seen):
    """Tests of overfitting, against held-out images."""
    if felt.held_out is None:
        return {"c_t": None, "likelihood": None}
    likelihood = None
    if felt.train.shape[1] <= LAWS:
        points = min(config.quality.points, MODELLED)
        some = felt.map(lambda name, x: _some(x, points, config.seed))
        found = memorization.feature_likelihood(
            some.train, some.held_out, some.samples, config.seed
        )
        likelihood = {k: getattr(found, k) for k in ("fld", "fld_train", "gap")}
    return {
        "c_t": copying(config, felt, seen.samples, seen.held_out),
        "likelihood": likelihood,
    }


def copying(config, felt, near, held_out):
    """C_T, where the samples are enough for cells of k-means; else None.

    Args: felt, Sets of features; near, held_out, what is near to two of them.
    """
    count = min(config.memorization.cells, len(felt.samples) // PER_CELL)
    if not count:
        return None
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
    return KMeans(min(count, len(x)), n_init=1, random_state=seed).fit(x).predict


def _some(x, count, seed):
    """`count` rows at most, without replacement, in their order."""
    if len(x) <= count:
        return x
    rows = np.random.default_rng(seed).choice(len(x), count, replace=False)
    return x[np.sort(rows)]


def _equal(config, felt):
    """Sets of equal numbers, as many as there are: laws' metrics depend on them.

    None where they are too few to be laws, or of too many dimensions.
    """
    count = min(config.quality.points, *(len(x) for x in felt if x is not None))
    if count < FEW or felt.train.shape[1] > LAWS:
        return None
    return felt.map(lambda name, x: _some(x, count, config.seed))


def _nearer(config, felt):
    """The Frechet distance to training images less that to held-out ones.

    Its mean over fifths of the samples, and a 95 % interval of Student's.
    """
    some = None if felt.held_out is None else _equal(config, felt)
    if some is None:
        return None
    differences = [
        fidelity.frechet(part, some.train, warn=False)
        - fidelity.frechet(part, some.held_out, warn=False)
        for part in (some.samples[i::FOLDS] for i in range(FOLDS))
    ]
    return mean_interval(differences)


def _quality(config, felt, title):
    """A row for every metric and reference set, with the sizes that it was taken of."""
    some, seed, rows = _equal(config, felt), config.seed, []
    if some is None:
        return rows
    count = len(some.samples)
    for reference, x in zip(Sets._fields, some, strict=True):
        if x is None:
            continue
        found = {"Vendi score": fidelity.vendi(x)}
        if reference != "samples":
            found[title] = fidelity.frechet(some.samples, x, warn=False)
            size = min(1_000, count // 2)  # fewer than all, or no draw differs
            found["KID"], std = fidelity.kid(some.samples, x, size=size, seed=seed)
            pair = fidelity.precision_recall(some.samples, x)
            found["precision"], found["recall"] = pair
            pair = fidelity.density_coverage(some.samples, x)
            found["density"], found["coverage"] = pair
        rows += [
            {
                "metric": metric,
                "value": value,
                "std": std if metric == "KID" else None,
                "reference": reference,
                "features": title,
                "images": count,
            }
            for metric, value in found.items()
        ]
    return rows
