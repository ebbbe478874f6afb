"""An audit finds the copies that are there, says so in words, and refuses bad input."""

import csv
import itertools
import json
import signal

import numpy as np
import pytest
from PIL import Image

from configs import audit as configs
from memsep_jax import data, defaults, experiments, fidelity, weights
from memsep_jax.data import DataError, sources
from memsep_jax.experiments import loaded, record
from memsep_jax.experiments.config import build
from memsep_jax.experiments.studies import audit, compare

DIGITS = sources.digits().images


def settings(**fields):
    config = configs.get_config("smoke")
    config.update(fields)
    return config


@pytest.fixture(scope="module")
def copying(tmp_path_factory):
    """The workdir of the smoke variant: 20 of 80 samples are training images."""
    workdir = tmp_path_factory.mktemp("copying")
    experiments.run(configs.get_config("smoke"), workdir)
    return workdir


def test_copies_are_found_and_the_alarm_is_raised(copying):
    metrics = record.read_json(copying / "metrics.json")
    found = metrics["memorization"]
    assert (found["count"], found["samples"], found["exact_copies"]) == (20, 80, 20)
    assert found["null"] == 0 and found["excess_interval"][0] > 0.1
    assert found["emitted"]["distinct"] == 20
    assert metrics["verdict"]["alarm"] is True
    assert metrics["verdict"]["text"].startswith(
        "25.0 % [16.8, 35.5] of the 80 samples"
    )
    assert "honest samples would give 0.0 %" in metrics["verdict"]["text"]
    evidence = {line["evidence"] for line in metrics["advice"]}
    assert {"docs/results/pruning.md", "docs/results/emm.md"} <= evidence
    with open(copying / "per_sample.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["memorized"]) for row in rows] == [1] * 20 + [0] * 60
    assert [int(row["nearest"]) for row in rows[:20]] == list(range(40, 60))
    d1 = np.array([float(row["d1"]) for row in rows])
    x = data.from_uint8(DIGITS[:300]).astype(np.float64).reshape(300, -1)
    gaps = np.linalg.norm(x[40:120, None] - x[None, :60], axis=2)
    np.testing.assert_allclose(d1, gaps.min(axis=1), rtol=1e-5, atol=1e-6)


def test_every_quality_metric_says_of_what_it_is(copying):
    rows = record.read_json(copying / "metrics.json")["quality"]
    assert {row["reference"] for row in rows} == {"samples", "train", "held_out"}
    for row in rows:
        assert row["features"] == "FD (random_conv)"
        assert np.isfinite(row["value"])
        # As many as the smaller set has: of 80 samples, 60 training, 100 held-out ones.
        sizes = {"samples": 80, "train": 60, "held_out": 80}
        if row["metric"] == "Vendi score":
            sizes["held_out"] = 100
        assert row["images"] == sizes[row["reference"]]
    names = {row["metric"] for row in rows}
    assert {"KID", "precision", "recall", "density", "coverage"} < names
    assert "FID" not in names


def test_the_report_is_whole_and_drawn_again_from_its_numbers(copying):
    page = (copying / "report.html").read_text()
    assert "http://" not in page and "https://" not in page
    assert page.count("data:image/png;base64,") == 5
    assert "25.0 % [16.8, 35.5]" in page and "Stop earlier" in page
    before = (copying / "pairs.png").read_bytes()
    (copying / "pairs.png").unlink()
    experiments.run(settings(experiment="report"), copying)
    assert (copying / "pairs.png").read_bytes() == before


def test_fresh_samples_raise_no_alarm(tmp_path, undrawn):
    config = settings(samples="digits[300:400]", features={"name": "pixels"})
    experiments.run(config, tmp_path)
    metrics = record.read_json(tmp_path / "metrics.json")
    assert metrics["verdict"]["alarm"] is False
    assert metrics["memorization"]["exact_copies"] == 0
    assert "No sign of copying" in metrics["verdict"]["small"]
    assert "Nothing here asks for a change" in metrics["advice"][0]["text"]


def test_without_held_out_images_nobody_knows(tmp_path, capsys, undrawn):
    experiments.run(settings(held_out=None), tmp_path)
    metrics = record.read_json(tmp_path / "metrics.json")
    assert metrics["verdict"]["alarm"] is None
    assert metrics["memorization"]["null"] is None
    assert "--config.held_out" in metrics["advice"][0]["text"]
    said = capsys.readouterr().out
    assert "no --config.held_out" in said
    assert f"verdict: {metrics['verdict']['text']}" in said
    assert "not known" in (tmp_path / "report.html").read_text()


def test_mirrored_copies_are_found_where_they_are_asked_for(tmp_path, undrawn):
    np.save(tmp_path / "mirrored.npy", DIGITS[:40, :, ::-1])
    fields = dict(samples=str(tmp_path / "mirrored.npy"), features={"name": "pixels"})
    for flips in (False, True):
        config = settings(**fields)
        config.memorization.flips = flips
        experiments.run(config, tmp_path / str(flips))
        found = record.read_json(tmp_path / str(flips) / "metrics.json")
        # Some digits are their own mirror images, nearly.
        copies = found["memorization"]["count"]
        assert copies == 40 if flips else copies < 10


def test_repeated_training_images_are_told(tmp_path, undrawn):
    train = np.concatenate([DIGITS[:30], DIGITS[:3]])
    train[32, 0, 0] ^= 1  # the last one nearly
    np.savez(tmp_path / "train.npz", train_images=train)
    config = settings(train=str(tmp_path / "train.npz"), samples="digits[0:20]")
    config.features.name = "pixels"
    experiments.run(config, tmp_path / "run")
    metrics = record.read_json(tmp_path / "run" / "metrics.json")
    about = metrics["data"]
    assert (about["duplicates"], about["near_duplicates"]) == (2, 2)
    with open(tmp_path / "run" / "duplicates.csv", newline="") as file:
        rows = [tuple(row.values()) for row in csv.DictReader(file)]
    assert rows == [
        ("30", "0", "exact"), ("31", "1", "exact"), ("2", "32", "near"),
        ("32", "2", "near"),
    ]  # fmt: skip
    assert "Deduplicate" in metrics["advice"][0]["text"]
    assert about["duplicates_emitted"] == 3


def test_tables_and_pairs_have_the_names_of_files(tmp_path, undrawn):
    """Also where a name is a number, as some programs write them."""
    sets = {"samples": DIGITS[10:70], "train": DIGITS[[*range(30), 4]]}
    for role, x in sets.items():
        (tmp_path / role).mkdir()
        for i, image in enumerate(x):
            Image.fromarray(image[..., 0]).save(tmp_path / role / f"{i:03d}", "PNG")
    places = {role: str(tmp_path / role) for role in sets}
    experiments.run(settings(held_out=None, **places), tmp_path / "run")
    table = record.read_csv(tmp_path / "run" / "per_sample.csv")
    np.testing.assert_array_equal(table["index"], np.arange(60))
    for column in ("index", "nearest", "second", "feature_nearest", "feature_second"):
        files = table[f"{column}_file".removeprefix("index_")]
        assert files.tolist() == [f"{i:03d}" for i in table[column]]
    repeats = record.read_csv(tmp_path / "run" / "duplicates.csv")
    assert (repeats["train_file"][0], repeats["repeats_file"][0]) == ("030", "004")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<td>30 030</td><td>4 004</td>" in page
    first = record.read_npz(tmp_path / "run" / "pairs.npz")["pixels_index"][0]
    assert f"<td>{first} {first:03d}</td>" in page


def test_all_origins_of_images_are_one(tmp_path):
    """Folders, arrays of other programs and of ours hold the same images."""
    x = DIGITS[:6]
    (tmp_path / "folder").mkdir()
    for i, image in enumerate(x):
        Image.fromarray(image[..., 0]).save(tmp_path / "folder" / f"{i}.png")
    np.save(tmp_path / "floats.npy", data.from_uint8(x[..., 0]))
    np.savez(tmp_path / "one.npz", anything=x)
    np.savez(tmp_path / "ours.npz", train_images=DIGITS[6:9], test_images=x)
    for name, role in {"floats": "train", "one": "train", "ours": "held_out"}.items():
        (path,) = tmp_path.glob(f"{name}.*")
        read = sources.origin(str(path), role)
        np.testing.assert_array_equal(read.images, x)
    np.savez(tmp_path / "two.npz", a=x, b=x)
    with pytest.raises(DataError, match="its 2 arrays a, b"):
        sources.origin(str(tmp_path / "two.npz"))
    read = sources.origin(str(tmp_path / "folder[:5]"))
    np.testing.assert_array_equal(read.images, x[:5].repeat(3, axis=3))
    assert read.files.tolist() == [f"{i}.png" for i in range(5)]
    read = sources.origin("digits[2:5]", "samples")
    np.testing.assert_array_equal(read.images, DIGITS[2:5])
    assert len(read.labels) == 3


def test_a_run_is_audited_by_its_workdir(tmp_path):
    """Samples, training images and held-out ones of a run are those it had."""
    run = tmp_path / "run"
    run.mkdir()
    config = defaults.smoke(defaults.digits())
    record.write_json(run / "config.json", build.to_json(config))
    record.write_npz(run / "samples.npz", samples=DIGITS[:9])
    splits = build.build(config).splits
    read = {
        role: audit.images_of(str(run), role, None)[0]
        for role in ("samples", "train", "held_out")
    }
    np.testing.assert_array_equal(read["samples"], DIGITS[:9])
    np.testing.assert_array_equal(data.from_uint8(read["train"]), splits.train.x)
    np.testing.assert_array_equal(data.from_uint8(read["held_out"]), splits.held_out.x)


def test_a_folder_of_drawn_samples_is_read_as_its_images(tmp_path):
    """As `memsep_jax sample` writes it: with a picture of many samples beside them."""
    loaded.write(tmp_path / "drawn", DIGITS[:9])
    assert (tmp_path / "drawn" / "grid.png").exists()
    read = audit.images_of(str(tmp_path / "drawn"), "samples")
    np.testing.assert_array_equal(read.images, DIGITS[:9].repeat(3, axis=3))
    assert read.files[0] == "000000.png" and not read.notes
    again = sources.again(str(tmp_path / "drawn"), read.files[4:6])
    np.testing.assert_array_equal(again, read.images[4:6])
    # A person's own pictures of such names are images like others.
    (tmp_path / "drawn" / "samples.npz").unlink()
    with pytest.raises(build.ConfigError, match="grid.png"):
        audit.images_of(str(tmp_path / "drawn"), "samples")


def test_features_of_another_program_are_taken(tmp_path, capsys, undrawn):
    rng = np.random.default_rng(0)
    fields = {"name": "given"}
    for role, n in (("samples", 80), ("train", 60), ("held_out", 100)):
        path = tmp_path / f"{role}.npy"
        np.save(path, rng.normal(size=(n, 4)).astype(np.float32))
        fields[role] = str(path)
    # Ten held-out images are training ones: left out, and of the features too.
    experiments.run(settings(features=fields, held_out="digits[50:150]"), tmp_path)
    metrics = record.read_json(tmp_path / "metrics.json")
    assert metrics["features"]["dim"] == 4
    assert metrics["quality"][1]["features"] == "FD (given features)"
    about = metrics["data"]
    assert (about["excluded"], about["held_out"]) == (10, 90)
    assert "10 held-out images are in the training set" in capsys.readouterr().out


def test_absent_weights_skip_what_needs_them(tmp_path, capsys, undrawn):
    config = settings(features={"name": "inception"})
    experiments.run(config, tmp_path)
    metrics = record.read_json(tmp_path / "metrics.json")
    assert metrics["features"] is None and metrics["quality"] == []
    assert metrics["memorization"]["count"] == 20
    assert capsys.readouterr().out.count("nothing is measured on inception") == 1
    config.features.required = True
    with pytest.raises(weights.WeightsError, match="convert_inception"):
        experiments.run(config, tmp_path / "required")
    assert not (tmp_path / "required").exists()


def test_an_interrupted_audit_goes_on_from_its_chunks(
    copying, tmp_path, monkeypatch, undrawn
):
    config = settings()
    config.run.chunk = 16
    config.features.name = "pixels"
    whole = record.in_chunks
    names = []

    def cut(directory, work, total, chunk, session, what):
        names.append(what)
        if what == "features pixels train":
            signal.raise_signal(signal.SIGTERM)
        return whole(directory, work, total, chunk, session, what)

    monkeypatch.setattr(record, "in_chunks", cut)
    with pytest.raises(BaseException, match="SIGTERM"):
        experiments.run(config, tmp_path)
    monkeypatch.setattr(record, "in_chunks", whole)
    assert not (tmp_path / "metrics.json").exists()
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "compared").rglob("*.npz")}
    assert kept
    experiments.run(config, tmp_path)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    one, other = (
        record.read_json(place / "metrics.json") for place in (copying, tmp_path)
    )
    assert json.dumps(one["memorization"]) == json.dumps(other["memorization"])


# Refusals, before anything is written.


NAN = data.from_uint8(DIGITS[:5])
NAN[3, 0, 0] = np.nan
BAD = {  # name: (exit code, field, an array or the value, what the message says)
    "none": (2, "samples", None, "config.samples=... is required"),
    "size": (2, "samples", np.zeros((5, 8, 9, 1), np.uint8), "8 x 9 x 1, .* 8 x 8 x 1"),
    "colours": (2, "held_out", np.zeros((5, 8, 8, 4), np.uint8), "8 x 8 x 4"),
    "few": (2, "train", DIGITS[[0, 0, 0]], "fewer than 2 different"),
    "same": (2, "samples", "digits[:60]", "are the same 60 images"),
    "seen": (2, "held_out", "digits[:60]", "all 60 images of .*held_out"),
    "beyond": (2, "train", "digits[5000:]", "selects none of 1797"),
    "vectors": (3, "train", np.zeros((5, 8), np.float32), "not images"),
    "nan": (3, "train", NAN, r"\[3\] has NaN"),
    "object": (3, "train", np.array([{}, None], object), "allow_pickle is never used"),
    "absent": (3, "train", "no/such", "no such folder of images"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_images_get_one_message_and_leave_nothing(case, tmp_path):
    code, field, value, words = BAD[case]
    if isinstance(value, np.ndarray):
        np.save(tmp_path / "x.npy", value)
        value = str(tmp_path / "x.npy")
    kind = {2: build.ConfigError, 3: DataError}[code]
    with pytest.raises(kind, match=words) as raised:
        experiments.run(settings(**{field: value}), tmp_path / "run")
    assert raised.value.exit_code == code
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "group, field, value, words",
    [
        ("memorization", "threshold", 1.0, "threshold=1.0 must be in"),
        ("memorization", "near", 1, "near=1 must be at least 2"),
        ("memorization", "tiles", 0, "tiles=0"),
        ("quality", "points", 3, "points=3 must be at least"),
        ("run", "memory", 0.1, "memory=0.1 GiB, but 240 images"),
        ("features", "name", "vgg", "vgg.*random_conv"),
        ("features", "name", "classifier", None),
        ("features", "name", "given", "features.samples=FILE.npy"),
    ],
)
def test_bad_settings_get_one_message_and_leave_nothing(
    group, field, value, words, tmp_path
):
    config = settings()
    config[group][field] = value
    if words is None:  # digits have labels, an array has none
        np.save(tmp_path / "train.npy", DIGITS[:60])
        config.train, words = str(tmp_path / "train.npy"), "needs a label"
    with pytest.raises(build.ConfigError, match=words):
        experiments.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# What audits share.


@pytest.fixture
def shared(tmp_path, monkeypatch):
    """Runs an audit of `settings`: (its numbers as bytes, the pieces it computed)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    in_chunks, names, count = record.in_chunks, [], itertools.count()

    def noted(directory, work, total, chunk, session, what):
        names.append(what)
        return in_chunks(directory, work, total, chunk, session, what)

    monkeypatch.setattr(record, "in_chunks", noted)

    def audited(cache=True, **fields):
        config, workdir = settings(**fields), tmp_path / f"run {next(count)}"
        config.run.cache = cache
        names.clear()
        experiments.run(config, workdir)
        files = ("metrics.json", "per_sample.csv", "held_out.csv", "duplicates.csv")
        return [(workdir / name).read_bytes() for name in files], {*names}

    return audited


OF_SETS = {
    "pixels train", "in random_conv train",
    "features random_conv train", "features random_conv held_out",
}  # fmt: skip


def test_a_second_audit_of_a_training_set_computes_less(shared, undrawn):
    _, first = shared()
    _, second = shared(samples="digits[60:140]")
    assert first - second == OF_SETS and second < first
    _, other = shared(train="digits[:61]")  # held-out images are the same ones
    assert first - other == {"features random_conv held_out"}
    _, seed = shared(seed=1)  # other features of the same images
    assert first - seed == {"pixels train"}


def test_kept_features_change_no_byte_of_an_audit(shared, undrawn, tmp_path):
    without, _ = shared(cache=False)
    assert not (tmp_path / "cache").exists()
    made, _ = shared()
    read, pieces = shared()
    assert without == made == read
    assert "features random_conv train" not in pieces


def test_reference_statistics_are_shared(tmp_path, monkeypatch):
    """Their mean and covariance are taken once, and the distance is the same."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    of, counts = fidelity.moments, []
    monkeypatch.setattr(fidelity, "moments", lambda x: counts.append(len(x)) or of(x))
    rng, config = np.random.default_rng(0), settings()
    sets = [rng.normal(i, 1, (n, 4)) for i, n in enumerate((30, 80, 90))]
    for x in sets[1:] * 2:
        kept = compare._moments(config, x)
        assert kept.n == len(x)
        assert fidelity.frechet(sets[0], kept) == fidelity.frechet(sets[0], x)
    assert counts == [80, 90]
    config.run.cache = False
    compare._moments(config, sets[1])
    compare._moments(config, sets[0][:3])  # fewer points than dimensions
    assert counts == [80, 90, 80, 3]


# Whether the samples are nearer to the training images as a whole.


def heavy(seed, n=60, d=16):
    """Samples, training and held-out points of one law without a third moment."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(3, n, d)) / np.sqrt(rng.chisquare(3, (3, n, 1)) / 3)


def test_honest_samples_are_called_nearer_or_farther_by_chance():
    """2.5 % of them each, by 4 standard errors of 400."""
    found = [compare.nearness(*heavy(seed), seed) for seed in range(400)]
    called = np.array([np.sign(x["value"]) * (x["p"] < audit.CHANCE) for x in found])
    most = 0.025 + 4 * np.sqrt(0.025 * 0.975 / 400)
    for side in (-1, 1):
        assert 0 < (called == side).mean() < most


def test_noisy_copies_are_nearer_to_the_training_images():
    fresh, train, held_out = heavy(0)
    found = compare.nearness(train + 0.1 * fresh, train, held_out, 0)
    assert found["value"] < 0 and found["p"] == 1 / 1_000  # the least that p may be


@pytest.mark.parametrize("seed", range(3))
def test_swapped_sets_change_the_sign_and_keep_p(seed):
    samples, train, held_out = heavy(seed)
    found = compare.nearness(samples, train, held_out, 0)
    swapped = compare.nearness(samples, held_out, train, 0)
    assert swapped["value"] == pytest.approx(-found["value"])
    assert swapped["p"] == found["p"] > 1 / 1_000


def test_the_difference_is_that_of_the_distances_to_first_order():
    rng = np.random.default_rng(0)
    samples, train, held_out = rng.normal(size=(3, 2_000, 4))
    held_out = 1.3 * held_out + 0.1
    exact = fidelity.frechet(samples, train) - fidelity.frechet(samples, held_out)
    found = compare.nearness(samples, train, held_out, 0)
    assert found["value"] == pytest.approx(exact, rel=0.1) and found["p"] == 1 / 1_000


@pytest.mark.parametrize(
    "value, p, words",
    [
        (-0.25, 0.049, "nearer to the training images than to held-out ones"),
        (0.25, 0.049, "nearer to held-out images than to training ones"),
        (-0.25, 0.05, "not told to be nearer to the training images, or to held-out"),
    ],
)
def test_only_what_is_no_chance_is_called_nearer(value, p, words):
    found = {"value": value, "p": p, "permutations": 999, "images": 60}
    said = audit.nearer({"title": "FD (x)", "nearer": found})
    assert f"the samples are {words}" in said
    assert f"is {value:.3g} to first order (p = {p:.3g} by 999 permutations" in said


def test_the_report_says_to_which_images_samples_are_nearer(copying):
    metrics = record.read_json(copying / "metrics.json")
    found = metrics["features"]["nearer"]
    assert found["images"] == 60 and found["permutations"] == 999
    assert metrics["nearer"] == audit.nearer(metrics["features"])
    page = " ".join((copying / "report.html").read_text().split())
    assert metrics["nearer"] in page


def test_parts_of_an_audit_are_switched_off(tmp_path, undrawn):
    config = settings()
    config.quality.points, config.features.name = 0, "none"
    experiments.run(config, tmp_path / "both")
    metrics = record.read_json(tmp_path / "both" / "metrics.json")
    assert metrics["features"] is None and metrics["quality"] == []
    assert metrics["left_out"] == [] and metrics["memorization"]["count"] == 20
    config.features.name = "random_conv"
    experiments.run(config, tmp_path / "quality")
    metrics = record.read_json(tmp_path / "quality" / "metrics.json")
    found = metrics["features"]
    assert metrics["quality"] == [] and metrics["comparable"] == ""
    assert found["likelihood"] is None and found["nearer"] is None
    assert found["count"] == 20 and found["c_t"]
    assert "KID" not in (tmp_path / "quality" / "report.html").read_text()
