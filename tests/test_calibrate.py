"""Metrics are held against mixtures whose copies are known."""

import numpy as np
import pytest

from configs import calibrate_cifar
from memsep_jax import experiments
from memsep_jax.experiments import record
from memsep_jax.experiments.config import build
from memsep_jax.experiments.studies import calibrate


def test_the_smoke_variant_says_what_is_known(tmp_path):
    config = calibrate_cifar.get_config("smoke")
    experiments.run(config, tmp_path)
    metrics = record.read_json(tmp_path / "metrics.json")
    rows = {row["kind"]: row for row in metrics["table"]}
    assert list(rows) == list(calibrate.CHANGES)
    assert (tmp_path / "figures" / "kinds.png").exists()
    for kind, row in rows.items():  # 50 fresh images, and a fifth of all are copies
        share = row["true share"]["mean"]
        assert share == pytest.approx(0 if kind == "fresh" else 0.2, abs=0.01)
    fresh, exact = rows["fresh"], rows["exact"]
    for metric in ("1/3", "1/3 flips", "1/3 random_conv"):
        says = exact[f"says {metric}"]
        assert says["low"] <= 0.2 <= says["high"]
        assert exact[f"sees {metric}"]["mean"] == 1
        assert fresh[f"says {metric}"]["low"] <= 0 <= fresh[f"says {metric}"]["high"]
    # In the mirror only the search that looks there sees them.
    assert rows["flip"]["sees 1/3 flips"]["mean"] == 1
    assert rows["flip"]["sees 1/3"]["mean"] < 0.5
    assert exact["FLD gap random_conv"] < fresh["FLD gap random_conv"]


@pytest.mark.parametrize("kind", list(calibrate.CHANGES)[1:])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_kind_of_copy_keeps_shape_and_stays_near_its_image(kind, channels):
    rng = np.random.default_rng(0)
    smooth = np.add.outer(np.linspace(30, 200, 16), np.linspace(0, 20, 16))
    x = np.repeat(smooth[..., None], channels, axis=2).astype(np.uint8)
    changed = np.asarray(calibrate.CHANGES[kind](x, rng), float)
    assert changed.shape == x.shape
    if kind == "exact":
        np.testing.assert_array_equal(changed, x)
    elif kind == "flip":
        np.testing.assert_array_equal(changed[:, ::-1], x)
    elif kind.startswith("brighter"):
        np.testing.assert_array_equal(changed - x, float(kind.split()[1]))
    elif kind.startswith("noise"):
        std = float(kind.split()[1])
        error = std / np.sqrt(2 * x.size)
        assert abs(np.std(changed - x) - std) < 4 * error
    elif kind.startswith("shift"):
        pixels = int(kind.split()[1])
        np.testing.assert_array_equal(changed[pixels:, :-pixels], x[:-pixels, pixels:])
    else:
        assert 0 < np.abs(changed - x).max() < 64


@pytest.mark.parametrize("field", ["train", "pool"])
def test_images_are_required(field, tmp_path):
    config = calibrate_cifar.get_config("smoke")
    config[field] = None
    with pytest.raises(build.ConfigError, match="--config.pool=OTHERS are required"):
        experiments.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_pool_of_training_images_is_refused(tmp_path):
    config = calibrate_cifar.get_config("smoke")
    config.pool = "digits[:100]"
    with pytest.raises(build.ConfigError, match="has 0 images that are not among"):
        experiments.run(config, tmp_path)
