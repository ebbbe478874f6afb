"""The report says what is on disk: no more, no less, and to anyone."""

import base64
import errno
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from ml_collections import config_dict

from memsep_jax.checkpoint import ConflictError, StorageError
from memsep_jax.experiments import record
from memsep_jax.experiments.reporting import report

HOSTILE = "<script>alert(1)</script> $x_ & \"quoted\" 'name' é"
ALWAYS = {"loss", "noise_levels", "ratio", "distances"}
IMAGES = {"pairs_first", "pairs_most", "pairs_least"}


def finished(workdir, shape=(4, 4, 1), held_out=True, m=8, name="digits"):
    """The numbers of a run that ended, without the run: 6 of 8 samples are copies."""
    generator = np.random.default_rng(0)
    train_x = generator.integers(0, 256, (5, *shape), np.uint8)
    samples = np.concatenate([train_x, train_x])[:m]
    if len(shape) == 1:
        train_x, samples = train_x.astype(np.float32), samples.astype(np.float32)
    memorized = np.arange(m) < m - 2
    d1, d2 = np.where(memorized, 0.1, 0.9), np.full(m, 1.0)
    nearest = np.stack([np.arange(m) % 5, (np.arange(m) + 1) % 5], axis=1)
    columns = {"index": range(m), "d1": d1, "d2": d2, "memorized": memorized * 1}
    record.write_csv(workdir / "per_sample.csv", columns)
    record.write_npz(workdir / "samples.npz", samples=samples)
    if held_out:
        record.write_csv(workdir / "held_out.csv", {"d1": [0.8, 0.9], "d2": [1, 1]})
    pairs = {}
    order = np.argsort(d1, kind="stable")
    groups = {"first": np.arange(m), "most": order, "least": order[::-1]}
    for group, index in groups.items():
        index = index[:3]
        pairs |= {
            f"{group}_index": index,
            f"{group}_sample": samples[index],
            f"{group}_neighbours": train_x[nearest[index]],
            f"{group}_distances": np.stack([d1, d2], axis=1)[index],
            f"{group}_nearest": nearest[index],
        }
    record.write_npz(workdir / "pairs.npz", **pairs)
    record.write_json(
        workdir / "metrics.json",
        {
            "memorization": {
                "ratio": 0.988, "interval": [0.974, 0.994], "memorized": 988,
                "samples": 1_000, "null": 0.0 if held_out else None,
                "null_interval": [0.0, 0.0128] if held_out else None,
                "held_out": 297 if held_out else 0, "threshold": 1 / 3,
                "distinct_emitted": 4, "exact_copies": 3, "median_d1": 0.123,
                "median_calibrated_l2": 0.0456,
            },
            "data": {
                "name": name, "n": 5, "shape": shape, "duplicates": 1,
                "fingerprint": "f00d" * 16,
            },
            "model": {
                "name": "dit", "parameters": 1_234_567, "steps": 8_000,
                "weights": "ema",
            },
            "levels": {
                "t": [0.01, 0.1, 1.0], "noise": [0.01, 0.1, 1.0],
                "train": [0.9, 0.01, 0.1],
                "held_out": [9.0, 1.0, 0.1] if held_out else [],
            },
        },
    )  # fmt: skip
    losses = {"train_losses": [0.9, 0.1]}
    losses |= {"held_out_losses": [2, 1]} if held_out else {}
    rows = [{"step": step, "loss": 1 / step} for step in range(1, 50)]
    rows[9] |= losses | {"ratio": 0.0, "ratio_interval": [0.0, 0.1]}
    rows[48] |= losses | {"ratio": 0.9, "ratio_interval": [0.8, 0.95]}
    metrics = record.Metrics(workdir / "metrics.jsonl", 0)
    for row in rows:
        metrics.write(**row)
    config = {
        "experiment": "train",
        "model": {"name": "dit"},
        "data": {"num_examples": 5, "name": name, "path": "/home/someone/secret/set"},
    }
    record.write_json(workdir / "config.json", config)
    record.write_json(
        workdir / "run.json",
        {
            "command": f"python -m memsep_jax.main --config=c.py --config.a={name}",
            "device": "1 x cpu (cpu)", "python": "3.11.7", "seed": 17,
            "seconds": {"data": 1.5, "train": 120.25, "report": 3.0},
            "started": "2026-01-02T03:04:05+00:00", "status": "complete",
            "versions": {"jax": "0.10.2"},
        },
    )  # fmt: skip
    return workdir


class Page(HTMLParser):
    """The words of a page, its tags, and all that it would fetch."""

    def __init__(self, html):
        super().__init__()
        self.words, self.tags, self.names, self.fetched = [], set(), set(), []
        self.anchors, self.ids = set(), []
        self.feed(html)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.names |= {name for name, _ in attributes}
        links = [v for k, v in attributes if k in ("src", "href", "srcset")]
        self.fetched += [link for link in links if link[:1] != "#"]  # not of the page
        self.anchors |= {link[1:] for link in links if link[:1] == "#"}
        self.ids += [value for name, value in attributes if name == "id"]

    def handle_data(self, data):
        self.words.append(data)


def changed(workdir, **changes):
    """The words of the page of a run after some groups of metrics.json have changed."""
    metrics = record.read_json(finished(workdir) / "metrics.json")
    for group, fields in changes.items():
        metrics[group] |= fields
    record.write_json(workdir / "metrics.json", metrics)
    report.write(workdir, print)
    return read(workdir).text


def read(workdir):
    return Page((workdir / "report.html").read_text())


def drawn(workdir, kind):
    return {path.stem for path in (workdir / "figures").glob(f"*.{kind}")}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    workdir = finished(tmp_path_factory.mktemp("run"))
    said = []
    report.write(workdir, said.append)
    assert said == []
    return workdir


FACTS = (
    "98.8 % [97.4, 99.4] of the 1,000 samples are copies of a training image; honest "
    "samples would give 0.0 % [0.0, 1.3].",
    "The generator copies: [", "3 equal a training image to the last bit",
    "--config=c.py", "1 x cpu (cpu)", "17", "f00d" * 16, "1,234,567", "8,000",
    "jax 0.10.2", "num_examples 5", "4 of 4", "0.123", "0.0456", "d1 < 0.333 d2",
    "train 120.2 s", "total 121.8 s", "images in blue frames are training data",
)  # fmt: skip


def test_the_page_says_every_number_and_no_path(images):
    html, text = (images / "report.html").read_text(), read(images).text
    assert [fact for fact in FACTS if fact not in text] == []
    assert "someone" not in html and ".../set" in html
    assert str(images) not in re.sub(r"base64,[\w+/=]*", "", html)


def test_the_page_is_in_the_order_in_which_it_is_read(images):
    page = read(images)
    text = page.text
    order = (
        "98.8 % [97.4, 99.4]", "Samples and the training images", "Along the training",
        "Loss at each noise level", "Memorization in numbers", "What was run",
        "Settings", "Time",
    )  # fmt: skip
    places = [text.index(heading) for heading in order]
    assert places == sorted(places)
    assert page.anchors == set(page.ids) and len(page.ids) == len(set(page.ids)) >= 6
    html = (images / "report.html").read_text()
    assert html.count("<figcaption>") == html.count("<img ")


def test_settings_at_their_defaults_are_folded(images):
    html = (images / "report.html").read_text()
    start, end = html.index("<details>"), html.index("</details>")
    folded, rest = Page(html[start:end]).text, Page(html[:start] + html[end:]).text
    assert "lr" not in folded  # nothing that the config does not have
    known = "experiment train"
    assert known in folded and known not in rest
    assert "num_examples 5" in rest and "num_examples 5" not in folded


def test_held_out_points_are_in_the_histogram_where_they_are_known(tmp_path, undrawn):
    def curves(held_out):
        workdir = finished(tmp_path / str(held_out), held_out=held_out)
        numbers = report._read(workdir, report.SAMPLED) | {"rows": []}
        figure = dict(report._figures(numbers, True))["distances"]
        texts = figure.axes[0].get_legend_handles_labels()[1]
        return [text for text in texts if "held-out" in text]

    assert curves(False) == []  # as in a run of an earlier version
    assert curves(True) == ["held-out points (2), scaled to the samples"]


def test_every_figure_is_there_as_png_and_as_pdf(images):
    assert drawn(images, "png") == drawn(images, "pdf") == ALWAYS | IMAGES
    for path in (images / "figures").iterdir():
        start = {".png": b"\x89PNG\r\n", ".pdf": b"%PDF-"}[path.suffix]
        assert path.read_bytes().startswith(start), path
    assert not list(images.rglob("*.part"))


def test_the_page_holds_all_its_pictures_and_fetches_nothing(images):
    page = read(images)
    start = "data:image/png;base64,"
    assert all(source.startswith(start) for source in page.fetched)
    embedded = {base64.b64decode(source.removeprefix(start)) for source in page.fetched}
    files = {path.read_bytes() for path in (images / "figures").glob("*.png")}
    assert embedded == files
    html = (images / "report.html").read_text()
    assert not page.tags & {"script", "link", "iframe", "object"}
    assert "http" not in html and "url(" not in html and "@import" not in html


def test_redrawing_gives_the_same_files_without_training(images, capsys):
    paths = [images / "report.html", *(images / "figures").iterdir()]
    before = {path: path.read_bytes() for path in paths}
    for path in paths:
        path.unlink()
    report.run(config_dict.ConfigDict({"experiment": "report"}), images)
    assert {path: path.read_bytes() for path in paths} == before
    assert capsys.readouterr().out == f"report: {images / 'report.html'}\n"


def test_a_hostile_name_is_only_text(tmp_path, undrawn):
    workdir = tmp_path / HOSTILE.replace("/", "%")
    report.write(finished(workdir, name=HOSTILE), print)
    page = read(workdir)
    assert "script" not in page.tags
    assert HOSTILE in page.text and workdir.name in page.text


def test_a_text_without_a_path_is_shown_whole():
    words = ("d1 / d2 and x / y", "https://a.b/c/d", "and/or", "configs/a.py", "1/3")
    for text in (*words, "/", "a /"):
        assert report.pathless(text) == text


def test_vectors_are_a_scatter_and_training_points(tmp_path, undrawn):
    workdir = finished(tmp_path, shape=(6,))
    report.write(workdir, print)
    assert drawn(workdir, "png") == drawn(workdir, "pdf") == ALWAYS | {"scatter"}
    text = read(workdir).text
    assert "copies of a training point" in text and "training image" not in text


def test_without_held_out_data_no_null_level_is_claimed(tmp_path, undrawn):
    workdir = finished(tmp_path, held_out=False)
    report.write(workdir, print)
    text = read(workdir).text
    assert "What honest samples would score is not known" in text
    assert "copies:" not in text and "None" not in text
    assert drawn(workdir, "png") == ALWAYS | IMAGES


def test_a_ratio_within_the_null_level_is_no_sign_of_copying(tmp_path, undrawn):
    ratio = {"ratio": 0.0001, "interval": [0.0, 0.0004]}
    text = changed(tmp_path, memorization=ratio)
    assert "0.01 % [0.0, 0.04] of the" in text  # not rounded to nothing
    assert "No sign of copying" in text


def test_the_noise_levels_that_memorize_are_named(tmp_path, undrawn):
    flags = {"memorizes": [True, True, False], "against": "held-out points"}
    text = changed(tmp_path, levels=flags)
    assert "lies below that of held-out points by more than 4 standard errors" in text
    assert "at 2 of 3 noise levels: 0.01, 0.1: there the network memorizes" in text


def test_membership_is_drawn_where_it_was_measured(tmp_path, undrawn):
    """With a level at which a statistic was not finite; an older run has none."""
    one = {"auc": [0.9, None, 0.5], "interval": [[0.8, 1.0], [None, None], [0.4, 0.6]]}
    names = "loss", "pia", "secmi", "by_complexity"
    found = dict.fromkeys(names, one) | {"counts": [40, 40], "note": "with 40 others"}
    workdir = finished(tmp_path)
    assert "membership" not in drawn_by(workdir)
    metrics = record.read_json(workdir / "metrics.json")
    metrics["levels"]["membership"] = found
    record.write_json(workdir / "metrics.json", metrics)
    assert "membership" in drawn_by(workdir)
    text = read(workdir).text
    assert "over 40 points of each kind" in text and "with 40 others" in text


def drawn_by(workdir):
    """The figures of a report that is written again."""
    report.write(workdir, print)
    return drawn(workdir, "png")


def test_a_score_that_was_not_trained_has_no_training_curves(tmp_path, undrawn):
    workdir = finished(tmp_path)
    metrics = record.read_json(workdir / "metrics.json")
    metrics["model"] = {"name": "empirical score", "parameters": 80}
    del metrics["levels"]
    record.write_json(workdir / "metrics.json", metrics)
    (workdir / "metrics.jsonl").unlink()
    report.write(workdir, print)
    assert drawn(workdir, "png") == {"distances"} | IMAGES
    assert "Loss" not in read(workdir).text


def test_missing_numbers_are_named_with_the_command_that_makes_them(tmp_path):
    with pytest.raises(ConflictError, match="no readable metrics.json") as error:
        report.run(None, tmp_path)
    assert "without --config.experiment=report" in str(error.value)
    workdir = finished(tmp_path)
    (workdir / "metrics.json").unlink()
    (workdir / "pairs.npz").write_bytes(b"PK torn")
    with pytest.raises(ConflictError, match="metrics.json, pairs.npz") as error:
        report.run(None, tmp_path)
    assert "python -m memsep_jax.main --config=c.py" in str(error.value)
    assert not (workdir / "figures").exists()


def test_a_full_disk_warns_once_after_a_run_and_fails_a_report(
    tmp_path, undrawn, monkeypatch
):
    workdir, said = finished(tmp_path), []

    def full(path, content):
        raise StorageError(errno.ENOSPC, f"could not write {path.name}")

    monkeypatch.setattr(record, "write_bytes", full)
    report.write(workdir, said.append)
    assert len(said) == 1 and "could not write loss.png" in said[0]
    with pytest.raises(StorageError):
        report.run(None, workdir)
