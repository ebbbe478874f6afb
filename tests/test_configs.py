"""Every config runs its smoke variant to the end, and leaves what it promises."""

import ast
import csv
import importlib.util
from pathlib import Path

import numpy as np
import pytest

from memsep_jax import data, defaults, experiments
from memsep_jax.experiments import record
from memsep_jax.experiments.config import build, grid

pytestmark = pytest.mark.usefixtures("compiled_once")

ROOT = Path(__file__).parent.parent
CONFIGS = {path.stem: path for path in sorted((ROOT / "configs").glob("*.py"))}

NUMBERS = ("mean", "low", "high")


def load(name):
    spec = importlib.util.spec_from_file_location(f"config_{name}", CONFIGS[name])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


KINDS = {name: load(name).get_config().experiment for name in CONFIGS}
# Those that train nothing run in test_audit and test_calibrate.
TRAINED = [name for name in CONFIGS if KINDS[name] not in ("audit", "calibrate")]
SWEEPS = [name for name in TRAINED if KINDS[name] in experiments.DRAWINGS]
SAMPLED = [name for name in TRAINED if name not in SWEEPS]
# The others are slow: their experiments run in small in the tests of their own.
QUICK = ("digits",)


def marked(names):
    return [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in names
    ]


@pytest.mark.parametrize("name", marked(SWEEPS))
def test_the_smoke_variant_of_a_sweep_leaves_its_points(name, tmp_path):
    config = load(name).get_config("smoke")
    experiments.run(config, tmp_path)

    assert record.read_json(tmp_path / "run.json")["status"] == "complete"
    metrics = record.read_json(tmp_path / "metrics.json")
    points = grid.points(config)
    if config.experiment == "emm":  # that chooses its sizes
        sizes = sum(len(found["sizes"]) for found in metrics["emm"])
        points = [None] * (sizes * config.sweep.seeds)
    else:
        stems = [Path(path).stem for path in metrics["points"]]
        assert stems == [point.name for point in points]
    assert len(metrics["table"]) * config.sweep.seeds == len(points)
    with open(tmp_path / "points.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == len(points)
    for row in metrics["table"]:
        for value in row.values():
            if isinstance(value, dict) and value["low"] is not None:
                mean, low, high = (np.array(value[k], float) for k in NUMBERS)
                unknown = np.isnan(mean) | np.isnan(low)  # of one seed: no interval
                assert np.all((low <= mean) & (mean <= high) | unknown)
    report = (tmp_path / "report.html").read_text()
    assert "http://" not in report and "https://" not in report  # self-contained
    figures = sorted((tmp_path / "figures").glob("*.png"))
    assert figures and report.count("data:image/png;base64,") == len(figures)

    if name != "gmm_width_decay":  # one for all: drawing takes a second or two
        return
    # The report is drawn from the numbers alone, to the same pictures.
    before = [path.read_bytes() for path in figures]
    for path in figures:
        path.unlink()
    config.experiment = "report"
    experiments.run(config, tmp_path)
    assert [path.read_bytes() for path in figures] == before


@pytest.mark.parametrize("name", marked(SAMPLED))
def test_the_smoke_variant_runs_and_leaves_its_files(name, tmp_path):
    config = load(name).get_config("smoke")
    experiments.run(config, tmp_path)

    status = record.read_json(tmp_path / "run.json")
    assert status["status"] == "complete"
    numbers = record.read_json(tmp_path / "metrics.json")
    found, total = numbers["memorization"], config.sampler.num_samples
    assert found["samples"] == total
    low, high = found["interval"]
    assert 0 <= low <= found["ratio"] <= high <= 1
    assert found["null"] is not None

    samples = record.read_npz(tmp_path / "samples.npz")["samples"]
    assert len(samples) == total
    if samples.dtype != np.uint8:
        assert np.isfinite(samples).all()
    with open(tmp_path / "per_sample.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["index"]) for row in rows] == list(range(total))
    # The table, the share and the definition are one thing.
    d1, d2 = (np.array([float(row[name]) for row in rows]) for name in ("d1", "d2"))
    flags = np.array([int(row["memorized"]) for row in rows])
    np.testing.assert_array_equal(flags, d1 < d2 / 3)
    assert found["ratio"] == pytest.approx(flags.mean())
    # And the distances are those of the samples on disk.
    train = np.asarray(build.build(config).splits.train.x, np.float64)
    if samples.dtype == np.uint8:
        samples = data.from_uint8(samples)
    gaps = np.asarray(samples, np.float64)[:, None] - train[None]
    distances = np.sort(np.sqrt((gaps**2).sum(tuple(range(2, gaps.ndim)))), axis=1)
    np.testing.assert_allclose(d1, distances[:, 0], rtol=1e-4, atol=1e-5)

    if config.experiment == "train":  # unconditional, with held-out points
        levels = numbers["levels"]
        assert len(levels["memorizes"]) == len(levels["noise"])
        found, few = levels["membership"], len(levels["noise"])
        for name in ("loss", "pia", "secmi", "by_complexity"):
            assert len(found[name]["auc"]) == len(found[name]["interval"]) == few
            assert all(0 <= auc <= 1 for auc in found[name]["auc"])
        truth = config.data.name == "mixture"
        assert levels["against"] == ("the true score" if truth else "held-out points")

    report = (tmp_path / "report.html").read_text()
    assert "http://" not in report and "https://" not in report  # self-contained
    assert list((tmp_path / "figures").glob("*.png"))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_says_how_it_is_run(name):
    text = ast.get_docstring(ast.parse(CONFIGS[name].read_text()))
    assert f"python -m memsep_jax.main --config=configs/{name}.py" in text


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_the_defaults_with_other_values(name):
    """No field of its own, and the smoke variant is the same run."""
    schema = defaults.train if name in TRAINED else defaults.audit
    known = set(_fields(schema()))
    module = load(name)
    full, smoke = module.get_config(), module.get_config("smoke")
    assert set(_fields(full)) <= known and set(_fields(smoke)) <= known
    assert full.experiment == smoke.experiment
    assert full.get("model", {}).get("name") == smoke.get("model", {}).get("name")
    assert build.differences(build.to_json(full), build.to_json(smoke))


@pytest.mark.parametrize("name", CONFIGS)
def test_an_unknown_variant_names_the_known_ones(name):
    with pytest.raises(ValueError, match="'smoek' is not known; choose .*full.*smoke"):
        load(name).get_config("smoek")


def _fields(config, prefix=""):
    for key, value in config.items():
        if hasattr(value, "items"):
            yield from _fields(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


TEN = """
n01440764 n02102040 n02979186 n03000684 n03028079 n03394916 n03417042 n03425413
n03445777 n03888257
"""
HUNDRED = """
n02869837 n01749939 n02488291 n02107142 n13037406 n02091831 n04517823 n04589890
n03062245 n01773797 n01735189 n07831146 n07753275 n03085013 n04485082 n02105505
n01983481 n02788148 n03530642 n04435653 n02086910 n02859443 n13040303 n03594734
n02085620 n02099849 n01558993 n04493381 n02109047 n04111531 n02877765 n04429376
n02009229 n01978455 n02106550 n01820546 n01692333 n07714571 n02974003 n02114855
n03785016 n03764736 n03775546 n02087046 n07836838 n04099969 n04592741 n03891251
n02701002 n03379051 n02259212 n07715103 n03947888 n04026417 n02326432 n03637318
n01980166 n02113799 n02086240 n03903868 n02483362 n04127249 n02089973 n03017168
n02093428 n02804414 n02396427 n04418357 n02172182 n01729322 n02113978 n03787032
n02089867 n02119022 n03777754 n04238763 n02231487 n03032252 n02138441 n02104029
n03837869 n03494278 n04136333 n03794056 n03492542 n02018207 n04067472 n03930630
n03584829 n02123045 n04229816 n02100583 n03642806 n04336792 n03259280 n02116738
n02108089 n03424325 n01855672 n02090622
"""


@pytest.mark.parametrize("variant, names", [("ten", TEN), ("hundred", HUNDRED)])
def test_the_classes_of_imagenet_are_those_with_these_names(variant, names):
    """Imagenette's, and the list of ImageNet-100 of Tian 2020 (its release, CMC)."""
    import tensorflow_datasets

    builder = tensorflow_datasets.builder_cls("imagenet_resized")
    known = builder(config="64x64").info.features["label"].names
    classes = load("imagenet").get_config(variant).data.classes
    assert [known[i] for i in classes] == sorted(names.split(), key=known.index)
