"""Which metric sees which kind of copy: known mixtures of copies and fresh images.

A share of the samples are training images, all changed in one way; the others are
images that nobody trained on. So it is known which samples are copies, and what a
metric should say.
"""

import functools
import io
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

from memsep_jax import data, features, fidelity, memorization, neighbours
from memsep_jax.experiments import record
from memsep_jax.experiments.config import build
from memsep_jax.experiments.reporting import figures
from memsep_jax.experiments.studies import audit, results
from memsep_jax.experiments.studies.compare import (
    Sets,
    attempt,
    check_dim,
    check_distinct,
    copying,
    tiled_together,
    tiles_of,
)
from memsep_jax.experiments.studies.study import Study

ABOUT = (
    '"says" is the share of copies that a metric reports by its own rule, less that of '
    'held-out images; "sees" the share of the copies that it finds while it takes 1 % '
    "of held-out images for copies. Brackets are 95 % intervals. C_T and the FLD gap "
    "are far below 0, and the samples nearer to training images than to held-out ones, "
    "where a set copies."
)
FIRST = ("kind", "true share", "says ")  # the columns that fit into a terminal
FALSE = 0.01  # of honest samples that are taken for copies, for metrics without a rule


def run(config, session):
    """Measures every kind of copy, and samples that are all fresh."""
    with session.phase("data"):
        sets, fresh, notes = read(config)
        spaces = {
            name: audit.space(config, name, sets, None)
            for name in config.calibration.features
        }
        # The copies take about as much memory as the fresh images.
        held = sets._replace(samples=fresh, pool=fresh)
        session.status["memory"], room = audit.check_memory(
            config, held, *spaces.values()
        )
    session.begin(data.fingerprint(*sets, fresh))
    for note in notes:
        session.say(f"note: {note}")
    with session.phase("features"):
        left_out: list[dict] = []
        known = {
            name: attempt(
                left_out,
                [f"{name} features"],
                "train",
                lambda space=space: known_of(space, sets, room),
            )
            for name, space in spaces.items()
        }
        spaces = {name: of for name, of in known.items() if of is not None}
    paths, points = [], []
    with session.phase("kinds"), session.progress("kinds", len(CHANGES)) as update:
        for i, (kind, change) in enumerate(CHANGES.items()):
            paths.append(session.workdir / "points" / f"{i:02d}-{kind}.npz")
            work = functools.partial(score, config, sets, fresh, change, spaces, room)
            points.append(record.kept(paths[-1], work))
            update(i + 1, kind)
    rows = [row(kind, at) for kind, at in zip(CHANGES, points, strict=True)]
    columns = sorted(rows[-1], key=lambda name: not name.startswith(FIRST))
    why = [f"{row['metric']}: {row['why']}" for row in left_out]
    why += [text for at in points for text in at.get("left out", np.array([])).tolist()]
    about = ABOUT
    if why:
        about += f" Left out: {'; '.join(dict.fromkeys(why))}."
    results.publish(
        config,
        session,
        draw,
        about=about,
        columns=[name for name in columns if name != "seeds"],
        points=[str(path.relative_to(session.workdir)) for path in paths],
        table=rows,
    )


def read(config):
    """The sets without samples, fresh images, and notes.   Raises: ConfigError."""
    if not config.train or not config.pool:
        raise build.ConfigError(
            "--config.train=IMAGES and --config.pool=OTHERS are required: training "
            "images, and images of the same kind, half of which are held out and half "
            "are the fresh ones among the samples"
        )
    origin, other = (audit.origin_of(config, name) for name in ("train", "pool"))
    train, pool = origin.images, other.images
    seen = set(data.digests(train))
    fresh = pool[[digest not in seen for digest in data.digests(pool)]]
    if len(fresh) < 4:
        raise build.ConfigError(
            f"--config.pool={config.pool} has {len(fresh)} images that are not among "
            "the training images: half are held out, half are fresh; give more"
        )
    # Every other one, as a pool may be ordered by class.
    sets, fresh = Sets(fresh[:0], train, fresh[::2]), fresh[1::2]
    audit.check_sizes(sets)
    least = max(2, _copies(config, fresh))
    if (distinct := len(neighbours.distinct(train))) < least:
        raise build.ConfigError(
            f"--config.train={config.train} has {distinct} different images, and "
            f"calibration.share={config.calibration.share:g} beside {len(fresh)} fresh "
            f"ones takes {least}: give more, or fewer of --config.pool"
        )
    return sets, fresh, origin.notes + other.notes


# Changes of an image: uint8 [h, w, c] -> [h, w, c].


def _noise(std):
    def change(x, rng):
        return x + rng.normal(0, std, x.shape)

    return change


def _shift(pixels):
    def change(x, rng):
        wide = np.pad(x, [(pixels, pixels)] * 2 + [(0, 0)], mode="reflect")
        return wide[: len(x), 2 * pixels :]

    return change


def _crop(share):
    def change(x, rng):
        h, w = x.shape[:2]
        top, left = (round((1 - share) / 2 * side) for side in (h, w))
        image = _image(x).crop((left, top, w - left, h - top))
        return _array(image.resize((w, h), Image.Resampling.LANCZOS), x)

    return change


def _brighter(levels):
    def change(x, rng):
        return x.astype(float) + levels

    return change


def _jpeg(quality):
    def change(x, rng):
        file = io.BytesIO()
        _image(x).save(file, "JPEG", quality=quality)
        return _array(Image.open(file), x)

    return change


def _image(x):
    return Image.fromarray(x if x.shape[2] == 3 else x[..., 0])


def _array(image, like):
    return np.asarray(image).reshape(like.shape)


CHANGES = {  # kind of copy -> (image, rng) -> the copy; None: no copies
    "fresh": None,
    "exact": lambda x, rng: x,
    "noise 8": _noise(8),
    "noise 32": _noise(32),
    "shift 1": _shift(1),
    "shift 4": _shift(4),
    "flip": lambda x, rng: x[:, ::-1],
    "crop .9": _crop(0.9),
    "crop .7": _crop(0.7),
    "brighter 16": _brighter(16),
    "brighter 64": _brighter(64),
    "jpeg 75": _jpeg(75),
    "jpeg 20": _jpeg(20),
}


class Known(NamedTuple):
    """All that is independent of the samples, in one space of features."""

    space: features.Extractor
    features: Sets
    search: Callable
    held_out: neighbours.Neighbours
    own: np.ndarray  # [n] distances to the nearest other training point


def known_of(space, sets, memory) -> Known:
    """Features and neighbours of training and held-out images.

    Raises: UndefinedError: all training images are one point.
    """
    seen = sets.map(lambda _, x: space.apply(x, memory))
    check_distinct(seen.train)
    search = neighbours.searcher(seen.train, 2, memory=memory)
    held_out, own = search(seen.held_out), search(seen.train).distances[:, 1]
    return Known(space, seen, search, held_out, own)


def score(config, sets, fresh, change, spaces, memory) -> dict:
    """All scores of one mixture: arrays, per sample and of the whole set.

    Args: spaces, {name: Known}; memory, as in `compare.measure`.
    Returns: the scores that have a value, and the reasons for the others as "left out".
    """
    # The same seed for every kind: the same training images are copied in each.
    rng = np.random.default_rng(config.seed)
    count = 0 if change is None else _copies(config, fresh)
    chosen = sets.train[rng.choice(len(sets.train), count, replace=False)]
    changed = [np.clip(np.round(change(x, rng)), 0, 255) for x in chosen]
    copies = np.array(changed, np.uint8).reshape(-1, *fresh.shape[1:])
    sets = sets._replace(samples=np.concatenate([copies, fresh]))
    group = config.memorization
    left_out: list[dict] = []
    scores = {"is_copy": np.arange(len(sets.samples)) < count}
    for name, pair in _pixel_scores(sets, group, memory).items():
        scores[f"score/{name}"], scores[f"null/{name}"] = pair
    for name, known in spaces.items():
        seen = known.features._replace(samples=known.space.apply(sets.samples, memory))
        near, held, own = known.search(seen.samples), known.held_out, known.own
        scores[f"score/1/3 {name}"] = _thirds(near)
        scores[f"null/1/3 {name}"] = _thirds(held)
        scores[f"score/authentic {name}"] = _outside(near, own)
        scores[f"null/authentic {name}"] = _outside(held, own)
        scores |= _of_sets(config, seen, near, held, name, left_out)
    why = [f"{row['metric']} {row['reference']}: {row['why']}" for row in left_out]
    scores["left out"] = np.array(why, np.str_)
    return scores


def _copies(config, fresh):
    """The number of copies among the samples, beside the fresh images."""
    # copies / (copies + fresh) = share.
    share = config.calibration.share
    return round(len(fresh) * share / (1 - share))


def _of_sets(config, seen, near, held, space, left_out):
    """The metrics of the samples as a whole, in one space."""
    works = {
        "C_T": lambda: copying(config, seen, near, held)["value"],
        "FLD gap": lambda: _likelihood(config, seen),
        "FD train - held-out": lambda: _distances(seen),
    }
    values = {k: attempt(left_out, [k], space, work) for k, work in works.items()}
    return {
        f"set/{metric} {space}": np.array(value)
        for metric, value in values.items()
        if value is not None
    }


def _likelihood(config, seen):
    check_dim(seen.train)
    return memorization.feature_likelihood(
        seen.train, seen.held_out, seen.samples, config.seed
    ).gap


def _distances(seen):
    check_dim(seen.train)
    n = min(len(seen.held_out), len(seen.train))
    to_train, to_held_out = (
        fidelity.frechet(seen.samples, x[:n], warn=False)
        for x in (seen.train, seen.held_out)
    )
    return to_train - to_held_out


def _pixel_scores(sets, group, memory):
    """{metric: (of samples, of held-out images)}; copies have small ones."""
    k = min(group.near, len(neighbours.distinct(sets.train)))
    search = neighbours.searcher(sets.train, k, memory=memory)
    flips = memorization.with_flips(search)
    near, held = search(sets.samples), search(sets.held_out)
    own = search(sets.train).distances[:, 1]
    shape = sets.train.shape[1:]
    tiles, most = tiles_of(shape, group.tiles), tiled_together(shape, memory)
    images = ((sets.samples, near), (sets.held_out, held))

    def tiled(x, near):
        nearest = memorization.nearest_tiled(x, sets.train, near.indices, tiles, most)
        return nearest.distances

    return {
        "1/3": (_thirds(near), _thirds(held)),
        "1/3 flips": tuple(_thirds(flips(x)) for x, _ in images),
        "authentic": (_outside(near, own), _outside(held, own)),
        "calibrated l2": tuple(
            memorization.calibrated_l2(near.distances) for _, near in images
        ),
        "tiled l2": tuple(tiled(x, near) for x, near in images),
    }


def _thirds(near):
    return memorization.quotient(*near.distances[:, :2].T)


def _outside(near, own):
    """d(g, x*) over the distance from x* to its nearest other: above 1, authentic."""
    return near.distances[:, 0] / own[near.indices[:, 0]]


# A copy is below: of d1 / d2 (Gu 2023), and of the quotient of AuthPct (Alaa 2022).
# Other metrics have no rule.
RULES = {"1/3": 1 / 3, "authentic": 1.0}


def row(kind, at) -> dict:
    """A row of the table: what each metric says about one mixture.

    "says ...": the share of copies beyond the null level, by the metric's own rule.
    "sees ...": the share of the copies that it finds while it takes 1 % of held-out
    images for copies.
    """
    copy = at["is_copy"]
    cells = {"kind": kind, "true share": _interval(copy)}
    names = [name.removeprefix("score/") for name in at if name.startswith("score/")]
    for name in names:
        scores, null = at[f"score/{name}"], at[f"null/{name}"]
        rule = RULES.get(name.split(" ")[0])
        if rule is not None:
            counts = [(int((s < rule).sum()), len(s)) for s in (scores, null)]
            value, (low, high) = memorization.excess(*counts[0], *counts[1])
            cells[f"says {name}"] = {"mean": value, "low": low, "high": high}
    for name in names:
        if copy.any():
            limit = np.quantile(at[f"null/{name}"], FALSE)
            cells[f"sees {name}"] = _interval(at[f"score/{name}"][copy] < limit)
    for name in at:
        if name.startswith("set/"):
            cells[name.removeprefix("set/")] = round(float(at[name]), 3)
    return cells | {"seeds": 1}


def _interval(flags):
    low, high = memorization.wilson(int(flags.sum()), len(flags))
    return {"mean": float(flags.mean()), "low": low, "high": high}


def draw(metrics, points):
    """(name, caption, figure) of each picture: see `study.Study`."""
    rows = [row for row in metrics["table"] if row["true share"]["mean"] > 0]
    names = [name for name in rows[0] if name.startswith("sees ")]
    shares = [[row[name]["mean"] for name in names] for row in reversed(rows)]
    yield (
        "kinds",
        "The share of the copies of each kind that a metric finds where its threshold "
        "is the one that 1 % of held-out images pass. Distances are to the nearest "
        "training images, in pixels or in the features named: d1 / d2 (1/3), or d1 "
        "over the distance between training images (authentic).",
        figures.heatmap(
            shares,
            [row["kind"] for row in reversed(rows)],
            [name.removeprefix("sees ") for name in names],
            "kind of copy",
            "metric",
            "copies found at 1 % false ones",
        ),
    )


STUDY = Study(run=run, draw=draw)
