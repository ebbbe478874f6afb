"""The verdict on copies, on garbage and on honest samples."""

import jax
import numpy as np
import pytest

from memsep_jax import data, features, memorization, mixture, neighbours
from memsep_jax.experiments.reporting import tables, verdict
from memsep_jax.experiments.studies import compare


def numbers(samples, train, held_out, spaces=()):
    """The numbers of metrics.json that a verdict reads, for these sets."""
    search = neighbours.searcher(train)
    near, null = search(samples), search(held_out)
    result = memorization.ratio_of(near, null, 0)
    some = compare.equal(compare.Sets(samples, train, held_out), 0)
    return {
        "memorization": {
            "ratio": result.value,
            "interval": result.interval,
            "samples": len(samples),
            "null": result.null,
            "null_interval": result.null_interval,
            "held_out": len(held_out),
            "exact_copies": 0,
            **compare.distances(near, null),
        },
        "data": {"shape": train.shape[1:]},
        "frechet": [
            compare.law(some, "as they are"),
            *(compare.law(some, s.title, lambda _, x, s=s: s.apply(x)) for s in spaces),
        ],
    }


def verdict_of(*args, **kwargs):
    return verdict.verdict(numbers(*args, **kwargs))


@pytest.fixture(scope="module")
def digits():
    """Training and held-out digits, fresh ones, and where they are compared."""
    x = data.to_uint8(np.asarray(data.load("digits", 1_400).x))
    shape = x.shape[1:]
    spaces = [features.random_conv(shape)]
    return x[:600], x[600:900], x[900:1_000], spaces


def pages(kind, train, count=100):
    """Images that look like no digit."""
    rng = np.random.default_rng(0)
    few = rng.integers(0, 2, (count, *train.shape[1:]), np.uint8)  # all are different
    if kind == "noise":
        return rng.integers(0, 256, few.shape, np.uint8)
    if kind == "blocks":
        coarse = rng.integers(0, 256, (count, 2, 2, 1), np.uint8)
        return coarse.repeat(4, 1).repeat(4, 2)
    blank = {"black": 0, "white": 254, "mean": train.mean(axis=0).astype(np.uint8)}
    return few + np.asarray(blank[kind], np.uint8)


@pytest.mark.parametrize("kind", ["noise", "blocks", "black", "white", "mean"])
def test_pages_that_look_like_no_digit_are_undertrained(kind, digits):
    train, held_out, _, spaces = digits
    result = verdict_of(pages(kind, train), train, held_out, spaces)
    assert (result["name"], result["alarm"]) == ("undertrained", None)
    assert "No sign of copying" not in result["small"]


def test_mean_pages_are_near_to_all_data_and_only_their_law_tells(digits):
    train, held_out, _, spaces = digits
    metrics = numbers(pages("mean", train), train, held_out, spaces)
    assert metrics["memorization"]["far"]["ratio"] < 0.01
    assert verdict.verdict(metrics)["name"] == "undertrained"
    del metrics["frechet"]
    assert verdict.verdict(metrics)["name"] == "no sign of copying"


def test_fresh_digits_are_not_undertrained(digits):
    train, held_out, fresh, spaces = digits
    result = verdict_of(fresh, train, held_out, spaces)
    assert (result["name"], result["alarm"]) == ("no sign of copying", False)


@pytest.mark.parametrize("n", [50, 600])
def test_copies_are_copies_whatever_their_quality(n, digits):
    """Of one image alone, too, which no law would take for the data's."""
    train, held_out, _, spaces = digits
    for copied in train[:50], train[np.zeros(50, int)]:
        result = verdict_of(copied, train[:n], held_out, spaces)
        assert (result["name"], result["alarm"]) == ("copies", True)
        assert "The generator copies: [" in result["small"]


@pytest.mark.parametrize("d, n", [(2, 300), (8, 60), (32, 500)])
def test_samples_of_the_truth_are_not_undertrained(d, n):
    truth = mixture.separated(jax.random.key(0), 4, d, 2.0)
    train, held_out, drawn = (
        np.asarray(mixture.sample(jax.random.key(i), truth, count))
        for i, count in ((1, n), (2, 500), (3, 500))
    )
    assert verdict_of(drawn, train, held_out)["name"] == "no sign of copying"
    # One Gaussian with the moments of the data: no Frechet distance tells it apart.
    rng = np.random.default_rng(0)
    blurred = rng.multivariate_normal(held_out.mean(0), np.cov(held_out.T), 500)
    metrics = numbers(blurred.astype(np.float32), train, held_out)
    assert metrics["frechet"][0]["excess"] < 0.1
    assert (verdict.verdict(metrics)["name"] == "undertrained") == (d == 32)
    wide = 10 * rng.normal(size=(500, d)).astype(np.float32)
    assert verdict_of(wide, train, held_out)["name"] == "undertrained"


def test_far_counts_what_lies_beyond_the_quantile():
    result = verdict.far(np.array([1.0, 99.0, 99.5, 100.0]), np.arange(1.0, 101.0))
    assert result["limit"] == 100.0 and result["ratio"] == 0.0  # the 100th of 1 .. 100
    result = verdict.far(np.array([1.0, 2.5, 3.5, 9.0]), np.array([1.0, 3.0]))
    assert (result["limit"], result["ratio"], result["held_out"]) == (3.0, 0.5, 2)
    assert result["interval"] == memorization.wilson(2, 4)


@pytest.mark.parametrize("held_out, far", [(9, False), (10, True)])
def test_fewer_than_ten_held_out_points_call_nothing_far(held_out, far):
    """More than half beyond all of l of one law: 2^-l, and 2^-10 < .001 < 2^-9."""
    metrics = plain(held_out=held_out)
    metrics["memorization"]["far"] = verdict.far(np.full(50, 2.0), np.ones(held_out))
    assert (verdict.verdict(metrics)["name"] == "undertrained") == far


def plain(**fields):
    """Numbers of 1,000 samples none of which is a copy."""
    result = {
        "ratio": 0.0, "interval": memorization.wilson(0, 1_000), "samples": 1_000,
        "null": 0.0, "null_interval": [0.0, 0.0128], "held_out": 297,
        "exact_copies": 0,
    } | fields  # fmt: skip
    return {"memorization": result, "data": {"shape": [8, 8, 1]}}


def test_the_law_of_one_page_is_the_trace_of_the_covariance():
    """And its excess 1 less that of training points; exactly, in one dimension."""
    held_out = np.tile([-1.0, 1.0], 50)[:, None]  # mean 0, variance 100 / 99
    train, page = 2 * held_out, np.zeros((100, 1))
    result = compare.law(compare.Sets(page, train, held_out), "FD")
    std = np.sqrt(100 / 99)
    np.testing.assert_allclose(result["page"], std**2, rtol=1e-12)
    np.testing.assert_allclose(result["samples"], std**2, rtol=1e-12)
    np.testing.assert_allclose(result["train"], (2 * std - std) ** 2, rtol=1e-12)
    np.testing.assert_allclose(result["excess"], 0.0, atol=1e-12)
    result = compare.law(compare.Sets(page, held_out, held_out), "FD")
    np.testing.assert_allclose(result["excess"], 1.0, rtol=1e-12)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"held_out": None}, "nothing was held out"),
        ({"samples": np.full((60, 3), np.nan)}, "not finite"),
        ({"held_out": np.ones((60, 3))}, "held-out points are the same"),
        (dict.fromkeys(("samples", "train", "held_out"), np.zeros((49, 3))), "than 50"),
        (
            dict.fromkeys(("samples", "train", "held_out"), np.zeros((60, 4_097))),
            "4,097 dimensions are more than 4,096",
        ),
    ],
)
def test_a_law_that_cannot_be_measured_says_why(change, words):
    x = np.random.default_rng(0).normal(size=(60, 3))
    row = compare.law(compare.Sets(x, x, x)._replace(**change), "FD")
    assert words in row["left_out"] and "samples" not in row
    metrics = plain() | {"frechet": [row]}
    assert verdict.verdict(metrics)["name"] == "no sign of copying"
    ((name, cells),) = tables.quality(metrics)[1]
    assert name == "FD" and cells[0] == f"not measured: {row['left_out']}"


def test_only_the_compared_points_are_read_from_disk():
    class Disk(np.ndarray):
        read = 0

        def __getitem__(self, rows):
            Disk.read += np.size(rows)
            return np.asarray(self)[rows]

    stored = data.Rows(np.arange(900.0).reshape(300, 3).view(Disk))
    few = np.zeros((60, 3))
    result = compare.equal(compare.Sets(few, stored, few), seed=0)
    assert Disk.read == 60 and result.train.shape == (60, 3)
    assert len(np.unique(result.train[:, 0])) == 60


def test_sets_of_large_points_are_smaller(monkeypatch):
    monkeypatch.setattr(compare, "ROOM", 70 * 3 * 8)
    x = np.zeros((90, 3))
    assert len(compare.equal(compare.Sets(x, x, x), seed=0).samples) == 70


def test_fifths_of_honest_samples_confirm_no_excess():
    """2.5 % of honest sets at most, by 4 standard errors of 400; heavy tails."""
    found = 0
    for seed in range(400):
        sets = np.random.default_rng(seed).standard_t(3, (3, 60, 8))
        found += compare.law(compare.Sets(*sets), "FD")["interval"][0] > 0
    assert 0 < found / 400 < 0.025 + 4 * np.sqrt(0.025 * 0.975 / 400)


def test_an_excess_that_the_fifths_do_not_confirm_is_no_verdict():
    row = {
        "title": "FD (pixels)", "n": 50, "samples": 8.0, "train": 1.0, "page": 10.0,
        "excess": 0.7, "interval": [-0.1, 1.5],
    }  # fmt: skip
    assert verdict_of_row(row) == "no sign of copying"
    assert verdict_of_row(row | {"interval": [0.1, 1.3]}) == "undertrained"
    assert verdict_of_row(row | {"interval": [0.1, 0.9], "excess": 0.5}) == (
        "no sign of copying"
    )


def verdict_of_row(row):
    return verdict.verdict(plain() | {"frechet": [row]})["name"]


@pytest.mark.parametrize("copies, alarm", [(1, False), (2, True)])
def test_one_copy_of_a_thousand_may_be_chance(copies, alarm):
    """Beside 0 of 10,000, by Fisher's test: 1/11, and 1/121 for two (nearly)."""
    metrics = plain(
        ratio=copies / 1_000, interval=memorization.wilson(copies, 1_000),
        held_out=10_000, null_interval=memorization.wilson(0, 10_000),
    )  # fmt: skip
    assert verdict.verdict(metrics)["alarm"] is alarm


def test_without_held_out_points_the_verdict_is_unknown():
    metrics = plain(null=None, null_interval=None, held_out=0)
    result = verdict.verdict(metrics)
    assert (result["name"], result["alarm"]) == ("unknown", None)
    assert "nothing was held out" in result["small"]


@pytest.mark.parametrize("held_out, few", [(0, False), (72, True), (73, False)])
def test_too_few_held_out_points_are_noted_with_the_way_out(held_out, few):
    """0 of l has the upper bound z^2 / (l + z^2), z = 1.96: above 5 % below l = 73."""
    notes = verdict.notes(plain(held_out=held_out))
    assert len(notes) == few
    if few:
        assert "only 72 held-out points" in notes[0] and "up to 5.1 %" in notes[0]
        assert "hold out 73 or more (--config.data.num_held_out)" in notes[0]
        audit = verdict.notes(plain(held_out=72) | {"experiment": "audit"})
        assert "more images in --config.held_out" in audit[0]


def test_numbers_of_an_older_version_get_their_verdict():
    """They have neither distances of held-out points nor laws, nor an excess."""
    assert verdict.verdict(plain())["name"] == "no sign of copying"
    copied = plain(ratio=0.5, interval=memorization.wilson(500, 1_000))
    assert verdict.verdict(copied)["alarm"] is True
    assert tables.quality(plain())[1] == []
