"""An audit at a prompt is that of the command, of arrays, files and functions."""

import base64
import gc
import io
import re
import shutil

import numpy as np
import pytest
from faults import harness
from PIL import Image
from test_audit import BAD, DIGITS, settings

import memsep_jax
from memsep_jax import checkpoint, data, defaults, experiments
from memsep_jax.data import DataError
from memsep_jax.experiments import audited, record
from memsep_jax.experiments.config import build
from memsep_jax.experiments.config.construct import ConfigError
from memsep_jax.experiments.reporting import report

SETS = {"samples": DIGITS[40:120], "train": DIGITS[:60], "held_out": DIGITS[200:300]}
SMOKE = {"memorization": {"near": 8}}
LEAST = SMOKE | {"features": {"name": "none"}, "quality": {"points": 0}}


@pytest.fixture(scope="module")
def result():
    return memsep_jax.audit(**SETS, **SMOKE)


@pytest.fixture(scope="module")
def commanded(tmp_path_factory):
    """The workdir of the same audit by the command."""
    workdir = tmp_path_factory.mktemp("commanded")
    with harness.undrawn():
        experiments.run(settings(), workdir)
    return workdir


def test_arrays_give_the_numbers_of_the_command(result, commanded):
    expected = record.read_json(commanded / "metrics.json")
    assert result.numbers == expected
    table = record.read_csv(commanded / "per_sample.csv")
    assert list(result.samples) == list(table)
    for name, column in table.items():
        np.testing.assert_array_equal(result.samples[name], column)
    np.testing.assert_array_equal(result.samples["index"], np.arange(80))
    assert result.samples["nearest"].dtype.kind == "i"
    np.testing.assert_array_equal(result.pairs["pixels_index"], np.arange(12))


def test_its_text_is_the_verdict_and_names_no_flag(result):
    assert result.verdict == "copies"
    text = str(result)
    assert text.startswith("25.0 % [16.8, 35.5] of the 80 samples are copies")
    assert "honest samples would give 0.0 %" in text and "- Stop earlier" in text
    assert "not looked for: memorization.flips=True" in text and "--" not in text
    assert repr(result) == text


def test_its_text_has_the_notes_before_what_to_do(undrawn):
    few = SETS | {"held_out": DIGITS[200:203]}
    network = {"name": "inception"}  # whose weights are not there
    result = memsep_jax.audit(**few, **LEAST | {"features": network})
    text = str(result)
    notes, _ = text.split("\nWhat to do:\n")
    assert "\nNotes:\n- nothing is measured on inception features: " in notes
    assert len(result.numbers["notes"]) == notes.count("\n- ") > 1
    assert "held-out" in notes.split("\nNotes:\n")[1] and "--" not in text


def test_advice_names_fields_of_ours_for_runs_of_ours(result, tmp_path):
    foreign = [line["text"] for line in result.numbers["advice"]]
    assert not [text for text in foreign if "train.stop_gap" in text]
    from memsep_jax.experiments.studies import audit

    own = [line["text"] for line in audit.advice(result.numbers, own=True)]
    assert "(train.stop_gap)." in own[0] and "(model.width)." in "".join(own)


def test_a_notebook_shows_the_verdict_and_the_worst_pairs(result):
    page = result._repr_html_()
    assert "25.0 % [16.8, 35.5] of the 80 samples" in page and "--config" not in page
    shown = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(shown) == 2  # in pixels and in features
    for png in shown:
        Image.open(io.BytesIO(base64.b64decode(png))).verify()
    assert "http" not in page and "<script" not in page


def test_a_notebook_shows_no_training_image_where_none_may_be(undrawn):
    page = memsep_jax.audit(**SETS, **LEAST, run={"images": False})._repr_html_()
    assert "25.0 % [16.8, 35.5]" in page and "<img" not in page


def test_the_page_is_written_on_request(undrawn, tmp_path, capsys):
    result = memsep_jax.audit(**SETS, **LEAST)
    workdir = result.workdir
    assert not (workdir / "report.html").exists()
    page = result.report(tmp_path / "page.html")
    assert "25.0 % [16.8, 35.5]" in page.read_text()
    saved = result.save(tmp_path / "saved")
    assert {"report.html", "metrics.json", "per_sample.csv", "figures"} < {
        path.name for path in saved.iterdir()
    }
    report.run(None, saved)
    with pytest.raises(checkpoint.ConflictError, match="is not empty"):
        result.save(saved)
    capsys.readouterr()
    del result
    gc.collect()
    assert not workdir.parent.exists()


def test_nothing_is_said_and_nothing_left_where_it_is_called(
    undrawn, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    memsep_jax.audit(SETS["samples"], SETS["train"], **LEAST)
    assert capsys.readouterr() == ("", "") and not [*tmp_path.iterdir()]


def test_a_workdir_keeps_an_audit_and_refuses_another(undrawn, tmp_path, monkeypatch):
    first = memsep_jax.audit(**SETS, workdir=tmp_path / "run", **LEAST)
    assert (tmp_path / "run" / "report.html").exists()
    with monkeypatch.context() as patch:
        patch.setattr(audited.study, "run", lambda *_: pytest.fail("run again"))
        again = memsep_jax.audit(**SETS, workdir=tmp_path / "run", **LEAST)
    assert again.numbers == first.numbers
    other = SETS | {"samples": DIGITS[41:121]}
    with pytest.raises(
        checkpoint.ConflictError, match="(?s)samples: array .*workdir"
    ) as e:
        memsep_jax.audit(**other, workdir=tmp_path / "run", **LEAST)
    assert "--" not in str(e.value)


@pytest.mark.parametrize(
    "experiment, words",
    [
        ("train", r"run holds a training \(experiment=train\), not an audit: give an"),
        ("emm", "run holds experiment=emm, not an audit"),
        (None, "run is not empty, and holds no audit: give a new folder"),
    ],
)
def test_a_folder_of_other_things_is_no_workdir(experiment, words, tmp_path):
    place = tmp_path / "run"
    if experiment:
        config = defaults.smoke(defaults.digits())
        config.experiment = experiment
        record.write_json(place / "config.json", build.to_json(config))
    else:
        record.write_bytes(place / "thesis.tex", b"mine")
    before = {path: path.read_bytes() for path in place.iterdir()}
    with pytest.raises(checkpoint.ConflictError, match=words) as raised:
        memsep_jax.audit(**SETS, **LEAST, workdir=place)
    assert "\n" not in str(raised.value)
    assert {path: path.read_bytes() for path in place.iterdir()} == before


def test_a_place_that_takes_no_file_is_named(undrawn, result, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(checkpoint.ConflictError, match="file is not empty"):
        result.save(tmp_path / "file")
    for write in (result.save, result.report):
        with pytest.raises(checkpoint.StorageError, match="could not write .*file/x"):
            write(tmp_path / "file" / "x")
    monkeypatch.chdir(tmp_path)
    for folder in (".", tmp_path):
        with pytest.raises(checkpoint.StorageError, match="it is a folder; give the"):
            result.report(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]

    def full(*_, **__):  # copytree lists all that it could not copy
        why = "[Errno 28] No space left on device"
        raise shutil.Error([("a", "b", why), ("c", "d", why)])

    monkeypatch.setattr(audited.shutil, "copytree", full)
    words = "could not write .*new: .*No space left on device$"
    with pytest.raises(checkpoint.StorageError, match=words):
        result.save(tmp_path / "new")


# Samples of a function.


def maker(calls, form=lambda x: x):
    """A function that makes the samples of SETS, and notes what it was called with."""

    def generate(n):
        start = sum(calls)
        calls.append(n)
        return form(SETS["samples"][start : start + n])

    return generate


@pytest.mark.parametrize(
    "form", [lambda x: x, lambda x: data.from_uint8(x[..., 0])], ids=["uint8", "floats"]
)
def test_a_function_is_called_until_there_are_enough(form, result, undrawn):
    calls: list[int] = []
    rest = {name: SETS[name] for name in ("train", "held_out")}
    own = memsep_jax.audit(
        maker(calls, form), **rest, num_samples=80, run={"chunk": 32}, **LEAST
    )
    assert calls == [32, 32, 16]
    assert own.numbers["memorization"] == result.numbers["memorization"]


def test_a_function_may_write_over_what_it_returned(result, undrawn):
    buffer = np.empty((32, 8, 8, 1), np.uint8)

    def form(x):
        buffer[: len(x)] = x
        return buffer[: len(x)]

    rest = {name: SETS[name] for name in ("train", "held_out")}
    own = memsep_jax.audit(
        maker([], form), **rest, num_samples=80, run={"chunk": 32}, **LEAST
    )
    assert own.numbers["memorization"] == result.numbers["memorization"]


def test_three_grey_images_of_a_function_are_three(undrawn):
    grey = maker([], lambda x: x[..., 0])
    rest = LEAST | {"num_samples": 63, "run": {"chunk": 20}}  # the last batch has 3
    assert memsep_jax.audit(grey, DIGITS[:60], **rest).samples["index"][-1] == 62


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"train": "no/such"}, "no such folder of images"),
        ({"held_out": DIGITS[:60]}, "all 60 images of held_out"),
        ({"held_out": np.zeros((5, 9, 8), np.uint8)}, "9 x 8 x 1"),
        ({"num_samples": None}, "num_samples=None: samples are a function"),
        ({"num_samples": 0}, "num_samples=0"),
        ({"num_samples": 2.5}, "num_samples=2.5: .* an integer from 1"),
        ({"num_samples": True}, "num_samples=True"),
        ({"num_samples": 10**30}, "num_samples=10{30}: .* an integer from 1"),
        ({"num_samples": 10**12}, "num_samples=10{12}: .* an integer from 1"),
        ({"num_samples": 10**9}, "run.memory=.*, but 1,000,000,060 images"),
        (
            {"num_samples": 10**9, "held_out": DIGITS[200:300].repeat(3, axis=3)},
            "run.memory=.*, but 1,000,000,160 images",
        ),
        ({"run": {"memory": 0.1}}, "run.memory=0.1 GiB, but 140 images"),
        ({"features": {"name": "vgg"}}, "vgg.*random_conv"),
        ({"quality": {"points": 3}}, "points=3 must be at least 50 images, or 0"),
    ],
)
def test_a_function_is_called_once_all_else_is_right(arguments, words, tmp_path):
    calls: list[int] = []
    given = {"train": DIGITS[:60], "num_samples": 80, "workdir": tmp_path / "run"}
    with pytest.raises((ConfigError, DataError), match=words):
        memsep_jax.audit(maker(calls), **given | arguments)
    assert not calls and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "made, words",
    [
        (lambda n: DIGITS[: n - 1], r"samples\(80\) returned uint8\(79, 8, 8, 1\); it"),
        (lambda n: np.zeros((n, 9, 8, 1), np.uint8), "80 images of 8 x 8 x 1"),
        (lambda n: np.zeros((n, 64), np.uint8), "not images"),
        (lambda n: None, r"samples\(80\) is None, and no numbers"),
        (lambda n: "a.png", r"samples\(80\) is str, and no numbers"),
        (lambda n: [None] * n, r"samples\(80\) is list, and no numbers"),
        (lambda n: data.from_uint8(DIGITS[:n]) / 2 + 0.5, r"samples has floats in \[0"),
        (lambda n: np.full((n, 8, 8), np.nan), r"samples\[0\] has NaN"),
        (lambda n: DIGITS[:60].repeat(2, axis=0)[:n], None),
    ],
)
def test_what_a_function_makes_passes_the_same_door(made, words, tmp_path):
    if words is None:
        made, words = (lambda n: DIGITS[:60]), r"samples\(80\) returned uint8\(60"
    with pytest.raises(DataError, match=words):
        memsep_jax.audit(made, DIGITS[:60], num_samples=80, workdir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_function_that_makes_other_samples_needs_another_workdir(undrawn, tmp_path):
    def audit(first):
        return memsep_jax.audit(
            lambda n: DIGITS[first : first + n], DIGITS[:60], num_samples=80,
            workdir=tmp_path, **LEAST,
        )  # fmt: skip

    assert audit(40).numbers == audit(40).numbers
    with pytest.raises(checkpoint.ConflictError, match="fingerprint"):
        audit(41)


# Refusals.


class Elsewhere:
    """An array of another library, on a device that numpy cannot read."""

    def __array__(self, dtype=None, copy=None):
        raise TypeError("on a device")


ARRAYS = {name: case for name, case in BAD.items() if isinstance(case[2], np.ndarray)}


@pytest.mark.parametrize("case", ARRAYS)
def test_an_array_passes_the_door_of_its_file(case, tmp_path):
    """The message differs in the name of the array alone."""
    code, field, value, words = BAD[case]
    np.save(tmp_path / "x.npy", value)
    texts = []
    for one in (value, tmp_path / "x.npy"):
        with pytest.raises({2: ConfigError, 3: DataError}[code]) as raised:
            memsep_jax.audit(**SETS | {field: one}, workdir=tmp_path / "run")
        texts.append(re.sub(r"array \w{12} of \d[\d x]*\d", "SET", str(raised.value)))
    texts[1] = texts[1].replace(f"{field}: {tmp_path / 'x.npy'}: array", field)
    texts[1] = texts[1].replace(str(tmp_path / "x.npy"), "SET")
    if case != "object":  # a file of objects cannot even be read
        assert texts[0] == texts[1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"samples": [DIGITS[0], DIGITS[0][:4]]}, "samples is list, which numpy makes"),
        ({"samples": {"a": 1}}, "samples is dict, and no numbers"),
        ({"samples": np.array([{}])}, "samples is object; give images as uint8"),
        (
            {"train": Elsewhere()},
            r"train is Elsewhere, .*\(on a device\).* of the host",
        ),
        ({"samples": np.zeros((3, 8, 8))}, "one image, channels first, or 3 grey ones"),
        ({"samples": np.zeros((9, 3, 8, 8))}, "channels first"),
        ({"train": DIGITS / 255.0}, r"train has floats in \[0, 1\]"),
        ({"train": None}, "^train=... is required"),
        ({"samples": DIGITS[:60]}, "^samples=array .* and train=array .* the same 60"),
        ({"num_samples": 5}, "num_samples=5 is for samples that are a function"),
        ({"qualty": {"points": 0}}, "qualty.points is not .* 'quality.points'?"),
        ({"quality": {"pints": 0}}, "quality.pints is not .* 'quality.points'?"),
        ({"resolution": 8}, "^resolution=8 resizes a folder .*, and no set is one"),
        (
            {"train_as": {"crop": "center"}},
            "^train_as.crop=center .* train=array .* no",
        ),
        ({"pool_as": {"exif": False}}, "^pool_as.exif=False .* and pool=None is none"),
        ({"seed": -1}, r"^seed=-1 must be in \[0, 2\*\*32\)"),
        ({"seed": 2**32}, "^seed=4294967296 must be in"),
        ({"experiment": "calibrate"}, "experiment is not a field of an audit"),
        ({"quality": {"points": "many"}}, "quality.points='many' must be an integer"),
        ({"quality": {"points": 0.5}}, "quality.points=0.5 must be an integer"),
    ],
)
def test_wrong_arguments_get_one_message(arguments, words, tmp_path):
    with pytest.raises((ConfigError, DataError), match=words) as raised:
        memsep_jax.audit(**SETS | arguments, workdir=tmp_path / "run")
    assert "--config" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_a_number_of_samples_may_be_one_of_numpy(undrawn):
    rest = LEAST | {"num_samples": np.int64(80)}
    assert len(memsep_jax.audit(maker([]), DIGITS[:60], **rest).samples["index"]) == 80


@pytest.mark.parametrize(
    "code, words",
    [
        ("def f(shape): return 3", ":f makes int: it must return a features.Extractor"),
        ("def f(shape): return None", ":f makes None: it must return"),
        (
            "def f(): return 3",
            r":f: f\(\) takes 0 positional arguments but 1 was given",
        ),
    ],
)
def test_features_of_ones_own_are_an_extractor(code, words, tmp_path, monkeypatch):
    name = f"features_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=f"^features.name={name}{words}"):
        memsep_jax.audit(**SETS, features={"name": f"{name}:f"})


def test_numbers_of_numpy_are_numbers(undrawn):
    chosen = {"points": np.int64(60)}
    result = memsep_jax.audit(**SETS, **SMOKE, quality=chosen)
    assert {row["images"] for row in result.numbers["quality"]} == {60}


def test_it_says_what_the_emitted_images_are_like(result, tmp_path):
    """The last 20 of 60 training images are emitted once, and no other."""
    train = SETS["train"] / 127.5 - 1
    emitted = np.arange(60) >= 40
    away = np.linalg.norm((train - train.mean(axis=0)).reshape(60, -1), axis=1)
    ranks = away.argsort().argsort()
    expected = np.corrcoef(ranks, emitted)[0, 1]
    found = result.numbers["memorization"]["which"]
    assert found["atypicality"]["value"] == pytest.approx(expected)
    assert set(found) == {"sparsity", "atypicality"}  # none is repeated
    shown = {x.tobytes() for x in result.pairs["emitted_most"]}
    assert shown <= {x.tobytes() for x in SETS["train"][40:]}
    page = result.report(tmp_path / "page.html").read_text()
    assert "Which training images are copied" in page and "emitted most" in page
