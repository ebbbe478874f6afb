"""What a metric has no value for is left out with its reason; the audit is written."""

import inspect
import re
import subprocess
import sys
from math import inf, pi
from pathlib import Path

import numpy as np
import pytest

from configs import audit as configs
from configs import calibrate_cifar
from faults import harness, rows
from memsep_jax import experiments, features, fidelity, memorization, neighbours
from memsep_jax.data import sources
from memsep_jax.experiments import record
from memsep_jax.experiments.config import build
from memsep_jax.experiments.studies import compare
from memsep_jax.fidelity import UndefinedError
from memsep_jax.neighbours import Neighbours

DIGITS = sources.digits().images
RNG = np.random.default_rng(0)


# 75: the least and the oddest input of every metric.

G = RNG.normal(size=(9, 3))  # points as they should be
ONE, TWO = np.array([[3.0, 4.0, 0.0]]), np.array([[0.0, 0.0, 0.0], [3.0, 4.0, 0.0]])
SAME, ZEROS = np.tile(ONE, (9, 1)), np.zeros((9, 3))  # all one point
CONST = np.concatenate([G, np.full((9, 1), 7.0)], axis=1)  # and a constant feature
ZERO_ROW = np.concatenate([G, np.zeros((1, 3))])
WIDE = np.eye(4, 9)  # fewer points than dimensions, at right angles
TWICE = np.repeat(np.eye(3), 2, axis=0)  # each of three points two times
LINE = np.arange(1.0, 10.0)[:, None]  # one dimension


def frechet(a, b):
    return fidelity.frechet(a, b, warn=False)


def kid(a, b):
    return fidelity.kid(a, b, subsets=2).value


def found(*distances):
    """Neighbours at these distances, the first training points."""
    distances = np.array(distances, np.float64)
    rows = np.tile(np.arange(distances.shape[1]), (len(distances), 1))
    return Neighbours(distances, rows)


def ratio(samples, data, held_out=None):
    at = memorization.ratio(np.float32(samples), np.float32(data), held_out)
    return at.value, at.duplicates, at.null


def twins(a, b):
    at = memorization.reproducibility(a, b)
    return at.share, at.null, at.cosine.tolist()


def c_t(generated, held_out, cells=(0, 0), least=1):
    at = memorization.copying_test(
        generated,
        np.full(len(generated), cells[0]),
        held_out,
        np.full(len(held_out), cells[1]),
        least,
    )
    return at.value


def fld(train, held_out, generated):
    at = memorization.feature_likelihood(train, held_out, generated)
    return at.fld, at.gap


def tiled(a, b, tiles):
    return memorization.tiled_l2(*(np.reshape(x, (-1, 2, 2, 1)) for x in (a, b)), tiles)


def emm(sizes, ratios):
    return memorization.effective_memorization(sizes, ratios)


def traits(x, labels=None):
    x = np.array(x)
    near = neighbours.nearest(x, x, min(2, len(neighbours.distinct(x))))
    return memorization.traits(x, near, labels)


def emission(emitted, n):
    """The rank correlation of points on a line with their place."""
    x = np.arange(float(n))[:, None]
    own = neighbours.nearest(x, x, 2)
    return memorization.which(emitted, own, {"place": x[:, 0]})["place"].value


def constant(a, b):
    return np.isnan(memorization.rank_correlation(a, b).value)


def cube(x, y):
    return (x @ y / len(x) + 1) ** 3


END = 1.959964**2 / (1 + 1.959964**2)  # of Wilson's interval of 0 of 1
FLOORED = (np.log(2 * pi) + memorization.FLOOR) / 2  # nats of the narrowest Gaussian
SQUARE = [[0.0, 0.0, 3.0, 4.0]]  # an image of 2 x 2

BOTH = (
    *fidelity.precision_recall(G[:8], G[1:]),
    *fidelity.density_coverage(G[:8], G[1:]),
)

ODD = {
    "by_chance": [
        (memorization.by_chance, (0, 1, 0, 1), 1),
        (memorization.by_chance, (1, 1, 1, 1), 1),
        (memorization.by_chance, (1, 1, 0, 1), 1 / 2),
        (memorization.by_chance, (3, 3, 0, 3), 1 / 20),  # of the 6 choose 3 threes
    ],
    "frechet": [
        (frechet, (ONE, G), UndefinedError("needs two")),
        (frechet, (SAME, ZEROS), 25),
        (frechet, (ZEROS, G), np.sum(G.mean(0) ** 2) + np.trace(np.cov(G.T))),
        (frechet, (CONST, CONST - [0, 0, 0, 2]), 4),
        (frechet, (WIDE, WIDE), 0),
        (frechet, (WIDE, WIDE + 1), 9),
        (frechet, (TWO, TWO), 0),
        (frechet, (TWICE, TWICE[::-1]), 0),
        (frechet, (LINE, 2 * LINE), 25 + 7.5),  # of means 5, 10; variances 7.5, 30
        (frechet, (ZERO_ROW, ZERO_ROW), 0),
    ],
    "influence": [
        (fidelity.influence, (ONE, G), UndefinedError("needs two")),
        (fidelity.influence, (G, SAME), np.zeros(len(SAME))),
        (fidelity.influence, (LINE, LINE), np.zeros(len(LINE))),
        (fidelity.influence, (TWICE, TWICE[::-1]), np.zeros(len(TWICE))),
    ],
    "precision_recall": [
        (fidelity.precision_recall, (G[:3], G), UndefinedError("k=3 other points")),
        (fidelity.precision_recall, (SAME, SAME), (1, 1)),
        (fidelity.precision_recall, (SAME, SAME + 1), (0, 0)),
        (fidelity.precision_recall, (WIDE, WIDE), (1, 1)),
        (fidelity.precision_recall, (LINE, LINE + 100), (0, 0)),
        (fidelity.precision_recall, (ZEROS, ZERO_ROW), (1, 0.1)),
        (fidelity.precision_recall, (CONST, CONST), (1, 1)),
        (fidelity.precision_recall, (np.tile(TWICE, (2, 1)),) * 2, (1, 1)),
    ],
    "density_coverage": [
        (fidelity.density_coverage, (G, G[:5]), UndefinedError("k=5 other points")),
        (fidelity.density_coverage, (SAME, SAME), (9 / 5, 1)),
        (fidelity.density_coverage, (SAME, SAME + 1), (0, 0)),
        (fidelity.density_coverage, (LINE, LINE + 100), (0, 0)),
        (fidelity.density_coverage, (TWICE, TWICE), (6 / 5, 1)),  # all in all balls
    ],
    "balls": [
        (fidelity.balls, (G, G[:5]), UndefinedError("other points need")),
        (fidelity.balls, (SAME, SAME), (1, 1, 9 / 5, 1)),
        (fidelity.balls, (TWICE, TWICE), (1, 1, 6 / 5, 1)),
        (fidelity.balls, (LINE, LINE + 100), (0, 0, 0, 0)),
        (fidelity.balls, (G[:8], G[1:]), BOTH),
    ],
    "kid": [
        (kid, (ONE, G), UndefinedError("needs two")),
        (kid, (SAME, ZEROS), cube(ONE[0], ONE[0]) + 1 - 2),
        (kid, (SAME, SAME), 0),
        (kid, (TWO, TWO), 1 - 0.5 * (cube(ONE[0], ONE[0]) + 1)),
        (kid, (WIDE, WIDE), 2 - 2 * ((1 + 1 / 9) ** 3 + 3) / 4),
        (kid, (LINE[:2], LINE[:2]), 27 - (8 + 125) / 2),
    ],
    "vendi": [
        (fidelity.vendi, (ZERO_ROW,), UndefinedError("no direction")),
        (fidelity.vendi, (G[:0],), UndefinedError("needs one")),
        (fidelity.vendi, (ONE,), 1),
        (fidelity.vendi, (SAME,), 1),
        (fidelity.vendi, (LINE,), 1),
        (fidelity.vendi, (WIDE,), 4),
        (fidelity.vendi, (TWICE,), 3),
    ],
    "nearest_two": [
        (memorization.nearest_two, (ONE[0], ONE), (0, inf)),
        (memorization.nearest_two, (ONE[0], ZEROS), (5, inf)),
        (memorization.nearest_two, (ONE[0], TWICE[:4]), (20**0.5, 18**0.5)[::-1]),
    ],
    "memorized": [
        (memorization.memorized, (ONE[0], ZEROS), True),
        (memorization.memorized, (ONE[0], TWO), True),
        (memorization.memorized, (np.zeros(3), np.eye(3)), False),
    ],
    "ratio": [
        (ratio, (G[:0], G), UndefinedError("at least one")),
        (ratio, (G, SAME), UndefinedError("two distinct training points and got 1")),
        (ratio, (SAME, TWO), (1, 0, None)),
        (ratio, (SAME, np.tile(TWO, (3, 1))), (1, 4, None)),
        (ratio, (ONE / 2, TWO, np.float32(ONE)), (0, 0, 1)),
        (ratio, (LINE, LINE), (1, 0, None)),
        (ratio, (WIDE, WIDE, np.zeros((0, 9), np.float32)), (1, 0, None)),
    ],
    "wilson": [
        (memorization.wilson, (0, 0), ValueError("not a share")),
        (memorization.wilson, (0, 1), (0, END)),
        (memorization.wilson, (1, 1), (1 - END, 1)),
    ],
    "excess": [
        (memorization.excess, (1, 1, 0, 0), ValueError("not a share")),
        (lambda *of: memorization.excess(*of)[0], (1, 1, 1, 1), 0),
        (lambda *of: memorization.excess(*of)[1], (0, 1, 0, 1), (-END, END)),
    ],
    "copied": [
        (memorization.copied, (found([0, 0], [1, 4], [2, inf], [1, 3]),), (0, 1, 1, 0)),
        (memorization.copied, (found([1, 2])._replace(distances=np.ones((0, 2))),), ()),
    ],
    "quotient": [
        (memorization.quotient, ([0.0, 0.0, 1.0], [0.0, 1.0, inf]), (1, 0, 0)),
        (memorization.quotient, ([], []), ()),
    ],
    "calibrated_l2": [
        (memorization.calibrated_l2, ([[3.0, 3.0]],), (2,)),
        (memorization.calibrated_l2, ([[3.0], [0.0]],), (2, 0)),
        (memorization.calibrated_l2, (np.ones((0, 5)),), ()),
    ],
    "tiled_l2": [
        (tiled, (SQUARE, SQUARE, 2), (0,)),
        (tiled, (SQUARE, np.zeros((1, 4)), 1), (5,)),
        (tiled, (SQUARE, np.zeros((1, 4)), 2), (4,)),
        (tiled, (np.ones((0, 4)), np.ones((0, 4)), 1), ()),
        (tiled, (SQUARE, SQUARE, 3), ValueError("must divide both sides")),
    ],
    "nearest_tiled": [
        (
            lambda *of: memorization.nearest_tiled(*of, 1).indices,
            (np.ones((1, 2, 2, 1)), np.ones((3, 2, 2, 1)), np.array([[2, 1, 2]])),
            (2,),
        ),
    ],
    "authentic": [
        (memorization.authentic, (found([0.0], [2.0], [1.0]), [1.0, 1.0]), (0, 1, 0)),
    ],
    "copying_test": [
        (c_t, ([], [1.0]), UndefinedError("none of 1 cells holds")),
        (c_t, ([1.0], []), UndefinedError("none of 1 cells holds")),
        (c_t, ([0.0] * 9, [1.0] * 9, (0, 1)), UndefinedError("none of 2 cells holds")),
        (c_t, ([1.0] * 5, [1.0] * 7), 0),
        # U = 0 of one pair: its mean is 1 / 2, its variance 1 / 4.
        (c_t, ([0.0], [1.0]), -1),
    ],
    "feature_likelihood": [
        (fld, (G, G[:1], G), UndefinedError("FLD of 9 and 1 and 9")),
        (fld, (G, G, ONE), UndefinedError("FLD of 9 and 9 and 1")),
        (fld, (SAME, SAME, SAME), (0, 0)),
        (fld, (ZEROS, ZEROS, ZEROS), (0, 0)),
        (lambda *of: memorization.feature_likelihood(*of).offset, (SAME,) * 3, FLOORED),
        (lambda *of: fld(*of)[1], (TWO, TWO, TWO), 0),
        (lambda *of: fld(*of)[1], (LINE, LINE, LINE), 0),
        (lambda *of: fld(*of)[1], (CONST, CONST, CONST), 0),
        (lambda *of: fld(*of)[1], (WIDE, WIDE, WIDE), 0),
        (lambda *of: fld(*of)[1], (TWICE, TWICE, SAME[:, :3]), 0),
    ],
    "emitted": [
        (lambda *of: memorization.emitted(*of)[2:], ([], [], 1), (0, 0)),
        (lambda *of: memorization.emitted(*of)[2:], ([3] * 9, [1] * 9, 2), (1, 0.5)),
        (memorization.emitted, ([3, 4], [1, 1], 1), ValueError("emitted of n=1")),
    ],
    "traits": [
        (traits, ([[0.0], [4.0]],), ([4, 4], [2, 2], [0, 0])),
        (traits, ([[0.0], [4.0]], [0, 1]), ([4, 4], [0, 0], [0, 0])),
        (traits, ([[0.0], [0.0], [3.0]],), ([3, 3, 3], [1, 1, 2], [1, 1, 0])),
        (traits, ([[0.0]],), ValueError("two columns at least")),
    ],
    "rank_correlation": [
        (memorization.rank_correlation, ([1, 2, 3, 4], [1, 4, 9, 16]), (1, 1, 1)),
        (constant, ([1, 2, 3, 4], [5] * 4), True),
        (memorization.rank_correlation, ([1, 2], [1, 2]), ValueError("at least 4")),
    ],
    "which": [
        (emission, ([3, 3, 2], 4), 0.9486833),  # counts 0, 0, 1, 2: with a tie
        (lambda *of: np.isnan(emission(*of)), ([], 4), True),
        (lambda *of: np.isnan(emission(*of)), ([0, 1, 2, 3], 4), True),
        (emission, ([0], 3), ValueError("at least 4")),
    ],
    "rarefaction": [
        (memorization.rarefaction, ([], 1, [0, 1, 9], 1), (0, 0, 0)),
        (memorization.rarefaction, ([5], 5, [0, 1, 5, 10], 9), (0, 1, 1, 1)),
        (memorization.rarefaction, ([1, 1], 2, [2, 1e9], 2), (2, 2)),
        (memorization.rarefaction, ([], 1, [], 1), ()),
    ],
    "effective_memorization": [
        (emm, ([10, 20], [1.0, 1.0]), UndefinedError("at all sizes")),
        (emm, ([10, 20], [0.5, 0.5]), UndefinedError("at all sizes")),
        (emm, ([10], [1.0]), ValueError("at least two sizes")),
        (emm, ([10, 1000], [1.0, 0.8]), 100),  # in the middle of log n
        (emm, ([10, 1000], [0.9, 0.0]), 10),
    ],
    "effective_interval": [
        (memorization.effective_interval, ([1, 9], [[1], [1]], 1), (9, 9)),
        (memorization.effective_interval, ([1, 9], [[0], [0]], 1), (1, 1)),
    ],
    "decreasing": [
        (memorization.decreasing, (np.array([2.0]), np.ones(1)), (2,)),
        (memorization.decreasing, (np.array([1.0, 2, 3]), np.ones(3)), (2, 2, 2)),
    ],
    "next_size": [
        (memorization.next_size, ({}, 0.9, 4, 8, 1, 64), 4),
        (memorization.next_size, ({4: 0.0, 8: 0.0}, 0.9, 4, 8, 1, 64), 2),
        (memorization.next_size, ({4: 1.0, 8: 1.0}, 0.9, 4, 8, 1, 64), 16),
    ],
    "plateaued": [
        (memorization.plateaued, ([], np.zeros((0, 2)), 1), False),
        (memorization.plateaued, ([0.0] * 9, np.zeros((9, 2)), 2), False),
        (memorization.plateaued, ([0.5] * 9, [(0.4, 0.6)] * 9, 2), True),
    ],
    "reproducibility": [
        (twins, (ONE, ONE), UndefinedError("at least two different")),
        (twins, (SAME, SAME), UndefinedError("at least two different")),
        (twins, (TWO, TWO), (1, 0, [1, 1])),
        (twins, (np.zeros((4, 3)), np.tile(TWO, (2, 1))), (0.5, 0.5, ...)),
        (twins, (LINE[:3], LINE[:3]), (1, 0, [1, 0, 1])),  # 2 is the mean
    ],
    "cosine": [
        (memorization.cosine, (LINE, -LINE, np.zeros(1)), (-1,) * 9),
        (memorization.cosine, (TWO, TWO, np.zeros(3)), (0, 1)),
        (memorization.cosine, (G[:0], G[:0], np.zeros(3)), ()),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "case"),
    [(name, i) for name, cases in ODD.items() for i in range(len(cases))],
)
def test_h75_a_metric_gives_what_it_says_for_odd_input(name, case):
    work, arguments, expected = ODD[name][case]
    if isinstance(expected, ValueError):
        with pytest.raises(ValueError, match=str(expected)) as raised:
            work(*arguments)
        assert raised.type is type(expected)
        return
    values = work(*arguments)
    if not isinstance(expected, tuple):
        values, expected = [values], [expected]
    for value, truth in zip(values, expected, strict=True):
        if truth is None:
            assert value is None
        elif truth is not ...:
            assert value == pytest.approx(truth, rel=1e-6, abs=1e-9)


def test_h75_every_metric_says_what_it_takes_and_is_in_the_table():
    metrics = {}
    for module in (fidelity, memorization):
        for name, of in vars(module).items():
            ours = inspect.isfunction(of) and of.__module__.startswith(module.__name__)
            if ours and not name.startswith("_"):
                metrics[name] = of
    helpers = {"squared_distances", "moments", "ratio_of", "with_flips"}
    assert metrics.keys() - helpers == ODD.keys()
    for name in ODD:
        text = inspect.getdoc(metrics[name])
        assert re.search(r"^Least[:,]", text, re.M), name
        assert re.search(r"(^|   |, )Odd[:,]", text, re.M), name


# An audit is written whatever has no value.


def saved(tmp_path, name, x):
    """A field of a config: the path of an array, or itself."""
    if not isinstance(x, np.ndarray):
        return x
    np.save(tmp_path / f"{name}.npy", x)
    return str(tmp_path / f"{name}.npy")


SIZES = {"samples": 80, "train": 60, "held_out": 100}  # of the smoke variant
LAWS = ("KID", "precision", "recall", "density", "coverage", "Vendi score")


def laws(title):
    """All that takes laws, but for the FLD."""
    return {*LAWS, title, f"{title} to train less that to held-out"}


def points(d=6, change=lambda name, x: x, **sizes):
    """Features of all sets, which `change` makes odd."""
    rng = np.random.default_rng(1)
    sizes = SIZES | sizes
    return {name: change(name, rng.normal(size=(n, d))) for name, n in sizes.items()}


def zero_row(name, x):
    return np.where(np.arange(len(x))[:, None] == 7, 0, x) if name == "samples" else x


def collapsed(name, x):
    """Samples in one place, where some training points are and no held-out one is."""
    x[: {"samples": len(x), "train": 9, "held_out": 0}[name]] = 1_000
    return x


PIXELS = {"features": {"name": "pixels"}}
BLANK = np.full((80, 8, 8, 1), 255, np.uint8)
AUDITS = {  # question: (fields, given features, share of copies, what is left out)
    "blank pages": ({"samples": BLANK}, None, 0, set()),
    "blank pages, in features": (
        {"samples": "digits[40:170]"}, points(change=collapsed, samples=130), 20 / 130,
        {"C_T"},
    ),
    "one sample": (
        PIXELS | {"samples": "digits[40:41]"}, None, 1,
        {*laws("FD (pixels)"), "C_T", "FLD"},
    ),
    "one held-out image": (
        PIXELS | {"held_out": "digits[200:201]"}, None, 0.25,
        {*laws("FD (pixels)"), "FLD"},
    ),
    "two training images": (
        PIXELS | {"train": "digits[40:42]"}, None, 2 / 80, laws("FD (pixels)"),
    ),
    "all exact copies": (PIXELS | {"samples": "digits[:59]"}, None, 1, {"C_T"}),
    "a row of zeros": ({}, points(change=zero_row), 0.25, {"Vendi score"}),
    "constant features": (
        {}, points(change=lambda name, x: 0 * x + 1), 0.25,
        {"copies in given features"},
    ),
    "one dimension": ({}, points(1), 0.25, set()),
    "more dimensions than images": ({}, points(300), 0.25, set()),
    "more dimensions than laws have": (
        {}, points(compare.LAWS + 1), 0.25, {*laws("FD (given features)"), "FLD"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("question", harness.some(AUDITS, 3))
def test_h75_an_audit_is_written_and_says_what_it_left_out(question, tmp_path, capsys):
    fields, given, share, names = AUDITS[question]
    config = configs.get_config("smoke")
    config.run.images = False
    config.update({k: saved(tmp_path, k, x) for k, x in fields.items()})
    if given is not None:
        rows = {k: saved(tmp_path, f"f-{k}", np.float32(x)) for k, x in given.items()}
        config.features.update(name="given", **rows)
    experiments.run(config, tmp_path / "run")
    metrics = record.read_json(tmp_path / "run" / "metrics.json")
    assert metrics["memorization"]["ratio"] == pytest.approx(share)
    assert {row["metric"] for row in metrics["left_out"]} == names
    page = (tmp_path / "run" / "report.html").read_text()
    said = re.sub(r"[\s│]", "", capsys.readouterr().out)  # as wide as a terminal
    for row in metrics["left_out"]:
        assert row["why"] in page and row["why"].replace(" ", "") in said
    for row in metrics["quality"]:
        assert np.isfinite(row["value"])


def test_h75_a_bug_is_no_refusal_of_a_metric(monkeypatch, tmp_path):
    def broken(*_, **__):
        raise ValueError("a bug of ours")

    monkeypatch.setattr(fidelity, "balls", broken)
    with pytest.raises(ValueError, match="a bug of ours"):
        experiments.run(configs.get_config("smoke"), tmp_path / "run")


def test_h75_a_calibration_goes_on_too(tmp_path):
    """Fewer training images than are looked for, and too few for C_T."""
    config = calibrate_cifar.get_config("smoke")
    config.train, config.pool = "digits[:6]", "digits[200:240]"
    experiments.run(config, tmp_path)
    metrics = record.read_json(tmp_path / "metrics.json")
    exact = {row["kind"]: row for row in metrics["table"]}["exact"]
    assert exact["sees 1/3"]["mean"] == 1 and "C_T random_conv" not in exact
    assert "C_T random_conv: 25 samples: a cell" in metrics["about"]
    assert np.isfinite(exact["FLD gap random_conv"])


# 76: memory is followed.


def test_h76_images_are_looked_at_as_many_as_the_memory_holds(monkeypatch):
    """The same features of any number; few images are not padded to a chunk."""
    shape, seen = (16, 16, 3), []
    floats = features._floats
    monkeypatch.setattr(
        features, "_floats", lambda x, *of: seen.append(len(x)) or floats(x, *of)
    )
    made = features.random_conv(shape)
    images = RNG.integers(0, 256, (36, *shape), np.uint8)
    truth, each = made.apply(images), made.least()
    assert seen == [36]
    for memory, chunk in [(0, 1), (3.9 * each, 2), (8 * each, 8), (1e9, 36)]:
        seen.clear()
        found = made.apply(images, memory)
        assert max(seen) == chunk and sum(seen) == 36
        np.testing.assert_allclose(found, truth, rtol=1e-5, atol=1e-6)
    made = features.pixels(shape)
    for memory in (0, 2 * made.least(), inf):
        found = made.apply(images, memory)
        truth = images.reshape(len(images), -1) / np.float32(127.5) - 1
        np.testing.assert_array_equal(found, truth)


def test_h76_the_patches_of_a_convolution_are_counted():
    """Of three maps of 8 x 8, as float32, the second layer unrolls the most."""
    made = features.random_conv((8, 8, 3))
    first, second, third = features.RANDOM_WIDTHS
    least = 4 * 8 * 8 * 9 * second  # what the last layer looks at, unrolled
    assert third > first and least < made.least() < 3 * least


@pytest.mark.slow
def test_h76_the_classifier_is_trained_in_parts_where_memory_is_small(monkeypatch):
    """The gradient is that of the whole batch, so its features are the same."""
    monkeypatch.setattr(features, "CLASSIFIER_STEPS", 2)
    images, labels = DIGITS[:40], np.arange(40) % 2
    whole, split = (
        features.classifier((8, 8, 1), images, labels, memory=memory).apply(images)
        for memory in (inf, 0)
    )
    assert np.ptp(whole) > 0.1
    np.testing.assert_allclose(split, whole, rtol=1e-3, atol=1e-4)


def test_h76_a_search_takes_the_memory_it_is_given_and_finds_the_same():
    data = RNG.integers(0, 256, (90, 8, 8, 1), np.uint8)
    samples = np.concatenate([data[5:9], RNG.integers(0, 256, (20, 8, 8, 1), np.uint8)])
    truth = neighbours.searcher(data, 9)(samples)
    for memory in (0, 3e4, 3e5):
        found = neighbours.searcher(data, 9, memory=memory)(samples)
        np.testing.assert_array_equal(found.indices, truth.indices)
        np.testing.assert_allclose(found.distances, truth.distances, rtol=1e-6)
    # With 180 MB of room for images of CIFAR-10, as many at a time as ever.
    most = 1_024, 2_048, neighbours.TOGETHER
    assert tuple(neighbours._sizes(180e6, 3_072, 50, most)) == most
    d, memory = 256 * 256 * 3, 400e6
    chunk, block, together = neighbours._sizes(memory, d, 50, most)
    used = 12 * d * chunk + 8 * d * block + 5 * d * 66 * together
    assert 0.7 * memory < used <= memory
    assert tuple(neighbours._sizes(0, d, 50, most)) == (1, 1, 1)


def test_h76_memory_is_what_the_machine_or_the_container_has(tmp_path):
    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    assert "machine" in record.available(tmp_path)[1]  # nothing to be read there
    write("proc/meminfo", "MemTotal: 9000 kB\nMemAvailable: 5000 kB\n")
    assert record.available(tmp_path) == (5000 * 1024, " (free on this machine)")
    # Of version 2: no limit of its own, and one above it.
    write("proc/self/cgroup", "0::/job/task\n")
    group = "sys/fs/cgroup/job"
    write(f"{group}/task/memory.max", "max\n")
    write(f"{group}/memory.max", "4000000\n")
    write(f"{group}/memory.current", "3000000\n")
    write(f"{group}/memory.stat", "anon 7\ninactive_file 500000\n")
    assert record.available(tmp_path)[0] == 1_500_000
    # Of version 1: in a container the limit is where the mount begins.
    write("proc/self/cgroup", "4:cpu,cpuacct:/x\n3:memory:/docker/abc\n")
    group = "sys/fs/cgroup/memory"
    write(f"{group}/memory.limit_in_bytes", "2000000")
    write(f"{group}/memory.usage_in_bytes", "1200000")
    write(f"{group}/memory.stat", "total_inactive_file 0\n")
    assert record.available(tmp_path)[0] == 800_000


def test_h76_what_does_not_fit_is_refused_by_who_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(record, "available", lambda: (1e8, " (free on this machine)"))
    config = configs.get_config("smoke")
    words = r"memory=0.0931 GiB \(free on this machine\), but 240 images"
    with pytest.raises(build.ConfigError, match=words):
        experiments.run(config, tmp_path / "run")
    config.run.memory = 1.0
    experiments.run(config, tmp_path / "run")
    assert record.read_json(tmp_path / "run" / "run.json")["memory"] == ("1 GiB")


LARGE = """
import numpy as np
from configs import audit
from memsep_jax import experiments
rng, t = np.random.default_rng(0), np.linspace(0, 1, 256)
def smooth(n):
    x = np.empty((n, 256, 256, 3), np.uint8)
    for i in range(n):
        u, v = (np.sin(9 * rng.normal(size=3) * t[:, None] + i) for _ in range(2))
        x[i] = 127.5 + 63 * (u[:, None] + v[None])
    return x
for name, n in (("train", 1_000), ("samples", 1_000)):
    np.save(f"{name}.npy", smooth(n))
def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name))
experiments.EXPERIMENTS  # the studies are imported with the first use: not measured
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak from here on
before = status("VmRSS")
config = audit.get_config()
config.samples, config.train, config.run.memory = "samples.npy", "train.npy", 1.0
config.memorization.near = 8  # of 50, tiles take minutes
experiments.run(config, "run")
print("grew", status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc/self/status")
def test_h76_an_audit_of_1000_images_of_256_by_256_takes_what_it_may(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", LARGE],
        cwd=tmp_path,
        env=harness._environment(1)
        | harness.AS_A_USER
        | {"PYTHONPATH": str(rows.ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    grown = re.search(r"^grew (\d+)$", done.stdout, re.M)
    assert 0 < 1_024 * int(grown[1]) < 2**30


# 83: a number is of two sets, whatever else is given.


def test_h83_what_is_given_beside_changes_no_number(tmp_path, capsys):
    config = configs.get_config("smoke")
    config.features.name, config.run.images = "pixels", False
    config.train = "digits[:70]"  # and 80 samples
    sets = {
        "alone": {"held_out": None},
        "few": {"held_out": "digits[200:255]"},
        "more": {"held_out": "digits[200:300]", "pool": "digits[:500]"},
    }
    found, nearer = {}, {}
    for name, fields in sets.items():
        config.update(fields)
        experiments.run(config, tmp_path / name)
        metrics = record.read_json(tmp_path / name / "metrics.json")
        nearer[name] = metrics["features"]["nearer"]
        found[name] = {
            (row["metric"], row["reference"]): (row["value"], row["std"], row["images"])
            for row in metrics["quality"]
        }
        said = " ".join(capsys.readouterr().out.split())
        page = (tmp_path / name / "report.html").read_text()
        for text in (said, page):
            assert "n = 70" in text and "Frechet distance of fewer than 10,000" in text
            assert ("do not compare these columns" in text) == (name != "alone")
    alone = found["alone"]
    assert len(alone) == 8 and {n for *_, n in alone.values()} == {70, 80}
    for name in ("few", "more"):
        assert alone.items() <= found[name].items()
    images = {n: found[n]["FD (pixels)", "held_out"][2] for n in ("few", "more")}
    assert images == {"few": 55, "more": 80}
    # Train and held-out are compared with each other at equal numbers.
    assert [nearer[n]["images"] for n in ("few", "more")] == [55, 70]
