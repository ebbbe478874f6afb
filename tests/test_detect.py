"""Detectors of copies as a study: labels, rows, bad configs, one whole run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import detect_digits
from memsep_jax import experiments, parallel
from memsep_jax.experiments import training
from memsep_jax.experiments.config import build
from memsep_jax.experiments.studies import detect, evaluate, training_run
from memsep_jax.memorization import detectors, membership

LABELLED = {"data.labels": "true", "train.label_drop": 0.1}


def smoke(**changes):
    config = detect_digits.get_config("smoke")
    config.update_from_flattened_dict({"sweep.points": ({},)} | changes)
    return config


def test_the_labels_are_those_that_the_samples_were_drawn_with():
    """Samples of a score that leads each label to an image of its own."""
    config = smoke(**LABELLED, **{"sampler.num_samples": 12, "sampler.steps": 8})
    parts = build.build(config)

    def score_of(weights, label):
        grey = label / 10
        return lambda x, t: (grey - x) / parts.process.sigma(t) ** 2

    generate = evaluate.make_generate(config, parts, parallel.make_mesh(), score_of)
    drawn, labels = generate({}, 0, 12), evaluate.drawn_labels(config, parts, 12)
    truth = np.round(255 * (labels / 10 + 1) / 2)
    assert len(np.unique(labels)) > 2
    np.testing.assert_allclose(drawn.mean(axis=(1, 2, 3)), truth, atol=1)
    assert evaluate.drawn_labels(smoke(), build.build(smoke()), 12) is None


def test_every_detector_is_asked_of_each_point_at_each_time(off_zero):
    config = smoke(**LABELLED)
    parts = build.build(config)
    weights = training_run.initial_state(config, parts).params
    # Away from the first weights, with which the last layer answers 0 to all labels.
    weights = off_zero(weights)
    x, labels = parts.splits.train.x[:3], parts.splits.train.label[:3]
    found = detect.asked(config, parts, weights, x, labels)
    assert list(found) == list(detectors.SIGNS) and found["gap"].min() > 0
    key = build.keys(config.seed).evaluate

    @jax.jit
    def one(i, x0, label, t):
        score_of = functools.partial(training.score_fn, parts, weights)
        return detectors.evidence(
            score_of(label), parts.process, x0, t, jax.random.fold_in(key, i), 4,
            unconditional=score_of(jnp.int32(parts.num_classes)),
        )  # fmt: skip

    for row in range(3):
        for at, t in enumerate(config.measure.times):
            truth = one(2 * row + at, jnp.asarray(x[row]), labels[row], t)
            for name, values in found.items():
                np.testing.assert_allclose(
                    values[row, at], getattr(truth, name), rtol=2e-4, err_msg=name
                )


def test_a_row_has_the_auc_of_its_time_and_copies_are_near():
    config = smoke(**{"measure.times": (0.1, 0.5), "measure.detect_at": 0.5})
    rng, copied = np.random.default_rng(0), np.arange(40) < 15
    values = rng.normal(size=(40, 2)) + copied[:, None]
    row = detect._told(config, "trace", values, copied)
    sought = [membership.separation(-v[copied], -v[~copied]) for v in values.T]
    np.testing.assert_allclose(row["along_trace"], [one.auc for one in sought])
    assert row["trace"] == sought[1].auc > 0.6
    assert (row["trace_low"], row["trace_high"]) == sought[1].interval
    np.testing.assert_array_equal(
        row["roc_trace"], detectors.roc(values[:, 1], copied, detect.FPR)
    )
    # What is small in copies has the other sign, against held-out points too.
    for name in ("flipd", "distance", "fresh_flipd", "fresh_distance"):
        found = detect._told(config, name, values, copied)[name]
        assert found == pytest.approx(1 - row["trace"])
    unknown = detect._told(config, "gap", None, copied)
    assert all(np.isnan(value).all() for value in unknown.values())
    assert unknown.keys() == {name.replace("trace", "gap") for name in row}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"measure.detect_at": 0.3}, "measure.detect_at=0.3 is not one of measure"),
        ({"sweep.points": ({"measure.detect_at": 9.0},)}, "detect_at=9.0 is not one"),
        ({"train.label_drop": 0.1}, "labels, but data.labels=none: give data.labels="),
        (LABELLED | {"data.classes": (3,)}, "data.labels=true are of one class"),
        ({"sweep.points": ({"train.label_drop": 0.1},)}, "label_drop=0.1 trains"),
        (
            {"process.name": "rectified_flow", "sampler.t_max": 0.9,
             "times.clock": "variance_exploding", "measure.times": (0.1, 1.5)},
            r"measure.times\[1\]=1.5 is outside of process rectified_flow",
        ),
    ],
)  # fmt: skip
def test_what_tells_nothing_of_copies_is_refused(changes, words, tmp_path):
    with pytest.raises(build.ConfigError, match=words):
        experiments.run(smoke(**changes), tmp_path)
    assert not list(tmp_path.glob("models*"))


def test_a_network_without_copies_has_no_auc(tmp_path):
    numbers = experiments.run(smoke(**{"memorization.threshold": 1 / 3}), tmp_path)
    (row,) = numbers["table"]
    assert row["ratio"]["mean"] == 0 and row["trace"]["mean"] is None
    assert not list((tmp_path / "figures").glob("*.png"))


def test_a_study_of_networks_with_and_without_labels(tmp_path, undrawn):
    numbers = experiments.run(detect_digits.get_config("smoke"), tmp_path)
    plain, labelled = numbers["table"]
    for row in (plain, labelled):
        assert 0 < row["ratio"]["mean"] < 1
        for name in (*detect.DETECTORS, "fresh_trace"):
            if name.startswith("gap") and row is plain:
                assert row[name]["mean"] is None
                continue
            low, auc, high = (
                row[f"{name}{end}"]["mean"] for end in ("_low", "", "_high")
            )
            assert 0 <= low <= auc <= high <= 1
        assert len(row["along_trace"]["mean"]) == len(row["copies_trace"]["mean"]) == 2
        assert row["roc_trace"]["mean"][-1] == 1
    drawn = {p.name for p in tmp_path.rglob("*.png")}
    assert drawn >= {
        "roc.png", "noise.png", "fresh_roc.png", "fresh_noise.png", "spectrum.png",
    }  # fmt: skip
