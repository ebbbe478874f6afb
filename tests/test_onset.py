"""Times along training: closed forms of crossings, of their fit, and of noise."""

import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import onset_digits
from memsep_jax import checkpoint, experiments
from memsep_jax.experiments import record
from memsep_jax.experiments.config import build, grid
from memsep_jax.experiments.runtime.session import Session
from memsep_jax.experiments.studies import monitor, networks, onset, training_run

STEPS = 2.0 ** np.arange(11)  # 1 .. 1024


def smoke(**changes):
    config = onset_digits.get_config("smoke")
    config.update_from_flattened_dict(changes)
    return config


# Times.


@pytest.mark.parametrize("level", [0.05, 0.1, 0.55, 1.0])
def test_what_is_linear_in_log_step_crosses_where_it_says(level):
    """R = log(step) / log(1024) has a level at 1024^level."""
    found = onset.crossing(STEPS, np.log(STEPS) / np.log(1_024), level)
    assert found == pytest.approx(1_024**level)


def test_a_level_that_is_there_at_first_or_never():
    assert onset.crossing([3, 9], [0.5, 0.7], 0.5) == 3
    assert np.isnan(onset.crossing([3, 9], [0.5, 0.7], 0.8))
    assert onset.crossing([1, 2, 4, 8], [0.0, 1.0, 0.0, 1.0], 0.5) == pytest.approx(
        np.sqrt(2)
    )  # the first time


values = st.lists(st.floats(-5, 5), min_size=2, max_size=11)


@given(values, st.floats(-5, 5), st.floats(0.1, 10))
def test_a_crossing_moves_with_the_clock_and_comes_later_for_more(rise, level, scale):
    steps = STEPS[: len(rise)]
    found = onset.crossing(steps, rise, level)
    np.testing.assert_allclose(
        onset.crossing(scale * steps, rise, level), scale * found
    )
    later = onset.crossing(steps, rise, level + 0.5)
    assert np.isnan(later) or found <= later * (1 + 1e-12)
    assert np.isnan(found) == (max(rise) < level)


@given(values)
def test_the_running_median_leaves_what_is_monotone(rise):
    rise = np.sort(rise)
    np.testing.assert_array_equal(onset.smoothed(rise), rise)
    np.testing.assert_array_equal(onset.smoothed(rise[::-1]), rise[::-1])


def along(**curves):
    """Curves along training in which nothing happens, but for those given."""
    still = {name: np.zeros(len(STEPS)) for name in onset.USED}
    losses = {"train_loss": np.ones(len(STEPS)), "held_out_loss": np.ones(len(STEPS))}
    return still | losses | curves


def test_times_in_closed_form():
    """Distance 11 - log2(step), from 11 to 1: a tenth of the way is left at 512.

    R = (log2(step) / 10)^2 passes .1 between 8 and 16: .09 and .16 there. The held-out
    loss is least at 32, and 1 - 1 / L = .1 where L = 1 / .9.
    """
    x = np.log2(STEPS)
    rise, loss = (x / 10) ** 2, 1 + np.abs(x - 5) / 8
    curves = along(
        ratio=rise, nearer=rise, member=x / 10, frechet=11 - x, held_out_loss=loss
    )
    found = onset.times(STEPS, curves, level=0.1, tolerance=0.1)
    assert list(found) == list(onset.TIMES)
    assert found["tau_gen"] == pytest.approx(512)
    assert found["tau_mem"] == pytest.approx(8 * 2 ** (1 / 7)) == found["tau_near"]
    assert found["tau_member"] == pytest.approx(2)
    # The running median cuts the tip of the V: 1 + 1/8 at 16, 32 and 64, a tie.
    assert found["tau_held_out"] == 32
    assert found["tau_stop"] == pytest.approx(1)  # it is there from the start
    assert onset.at(STEPS, x, 3.0) == pytest.approx(np.log2(3))
    assert np.isnan(onset.at(STEPS, x, np.nan))


def test_a_sign_counts_from_where_it_stays():
    """Samples of an untrained network may all be nearest to one training point."""
    x = np.log2(STEPS)
    nearer = np.where(x < 3, 0.9, x / 10 - 0.4)  # the last time at .1 is 32
    found = onset.times(STEPS, along(nearer=nearer, ratio=nearer), 0.1, 0.1)
    assert found["tau_near"] == pytest.approx(32) and found["tau_mem"] == 1
    fell = onset.times(STEPS, along(nearer=nearer[::-1]), 0.1, 0.1)
    assert fell["tau_near"] == pytest.approx(128 * 2 ** (1 / 9))  # 0, then .9
    never = onset.times(STEPS, along(), 0.1, 0.1)
    assert all(np.isnan(never[t]) for t in ("tau_near", "tau_member", "tau_stop"))
    falling = onset.times(STEPS, along(held_out_loss=2.0 - x / 10), 0.1, 0.1)
    assert np.isnan(falling["tau_held_out"])  # the least is the last: it may fall on
    unknown = onset.times(STEPS, along(nearer=np.nan * x, member=np.nan * x), 0.1, 0.1)
    assert np.isnan(unknown["tau_near"]) and np.isnan(unknown["tau_member"])


def test_one_wild_snapshot_makes_no_time_and_no_best():
    """Good from step 64 on, copies from 512 on, but for one snapshot of each kind."""
    distances = np.where(STEPS < 64, 9.0, 1.0)
    ratios = np.where(STEPS < 512, 0.0, 0.5)
    calm = onset.times(STEPS, along(ratio=ratios, frechet=distances), 0.1, 0.1)
    assert 32 < calm["tau_gen"] < 64 and 256 < calm["tau_mem"] < 512
    distances[2], distances[8], ratios[3] = 0.5, 0.01, 0.4
    wild = onset.times(STEPS, along(ratio=ratios, frechet=distances), 0.1, 0.1)
    assert wild == pytest.approx(calm, nan_ok=True)
    still = along(ratio=0 * ratios, frechet=0 * distances + 3)
    never = onset.times(STEPS, still, 0.1, 0.1)
    assert never["tau_gen"] == 1 and np.isnan(never["tau_mem"])


# Their law in n.

# Times that a row has, but for those that a test gives.
UNKNOWN = {f"{weights}_{t}": np.nan for weights in onset.WEIGHTS for t in onset.TIMES}


def test_a_power_law_is_its_own_fit():
    sizes = [50, 100, 200, 400]
    found = onset.fit(sizes, 7 * np.array(sizes, float)[:, None] ** 1.3 * np.ones(3))
    assert found.slope == pytest.approx(1.3) and found.factor == pytest.approx(7)
    assert found.low == pytest.approx(1.3) == found.high
    assert found.sizes == sizes


def test_the_interval_of_the_slope_is_students_over_the_seeds():
    """Slopes .9, 1 and 1.1: 1 +- t_{.975, 2} .1 / sqrt(3)."""
    sizes = np.array([10.0, 30.0, 90.0])
    found = onset.fit(sizes, np.stack([sizes**s for s in (0.9, 1.0, 1.1)], axis=1))
    half = 4.302653 * 0.1 / np.sqrt(3)
    np.testing.assert_allclose(found[:3], [1, 1 - half, 1 + half], rtol=1e-6)
    alone = onset.fit(sizes, sizes[:, None])
    assert alone.slope == pytest.approx(1) and np.isnan(alone.low)


def test_a_size_that_a_seed_did_not_reach_is_left_out_for_all():
    """Only the fast seed reached n = 400: with it the slope would be bent."""
    sizes = np.array([100, 200, 400])
    taus = np.stack([sizes * 1.0, sizes * 3.0], axis=1)
    taus[2] = [150.0, np.nan]
    found = onset.fit(sizes, taus)
    assert found.slope == pytest.approx(1) and found.sizes == [100, 200]
    taus[1, 0] = np.nan
    assert np.isnan(onset.fit(sizes, taus).slope)


def test_times_are_gathered_by_setting_weights_and_size():
    rows = [
        UNKNOWN
        | {
            "setting": np.array(name), "num_examples": np.array(n),
            "seed": np.array(seed),
            "ema_tau_mem": factor * n * 2.0**seed, "raw_tau_mem": np.nan,
            "ema_tau_gen": 5.0, "raw_tau_gen": 4.0,
        }
        for name, factor in (("", 1.0), ("model.width=8", 3.0))
        for n in (20, 10)
        for seed in (0, 1)
    ]  # fmt: skip
    found = onset.onsets(rows)
    assert len(found) == 2 * 2 * len(onset.TIMES)
    wide = next(
        row for row in found
        if row["setting"] != found[0]["setting"]
        and (row["weights"], row["time"]) == ("ema", "tau_mem")
    )  # fmt: skip
    assert wide["sizes"] == [10, 20]
    np.testing.assert_allclose(wide["mean"], 3 * np.sqrt(2) * np.array([10, 20]))
    assert wide["fit"]["slope"] == pytest.approx(1)
    np.testing.assert_array_equal(wide["reached"], [2, 2])
    (never,) = (
        row for row in found
        if (row["setting"], row["weights"], row["time"])
        == (found[0]["setting"], "raw", "tau_mem")
    )  # fmt: skip
    np.testing.assert_array_equal(never["reached"], [0, 0])
    assert "not reached by all seeds of n = [10, 20]" in onset._words(never)


def test_the_line_is_drawn_through_what_it_fits_and_said_in_words(tmp_path):
    """From the numbers on disk, where what is not known is null."""
    rows = [
        UNKNOWN
        | {
            "num_examples": np.array(n), "ema_tau_mem": 2.0 * n, "raw_tau_mem": np.nan,
            "ema_tau_gen": 5.0, "raw_tau_gen": 4.0,
        }
        for n in (10, 40)
    ]  # fmt: skip
    record.write_json(tmp_path / "onset.json", onset.onsets(rows))
    known = {
        (r["weights"], r["time"]): r for r in record.read_json(tmp_path / "onset.json")
    }
    gen, mem = known["ema", "tau_gen"], known["ema", "tau_mem"]
    never = known["raw", "tau_mem"]
    marks, line = onset._against_n(mem, 1)
    np.testing.assert_allclose(marks.mean, [20, 80])
    np.testing.assert_allclose(line.mean, [20, 80])
    assert onset._words(mem) == "tau_mem ~ n^1.00"
    assert onset._words(gen).startswith("tau_gen ~ n^") and gen["reached"] == [1, 1]
    (marks,) = onset._against_n(never, 1)
    assert np.isnan(marks.mean).all()


# The experiment.


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sweep.num_examples": ()}, r"sweep.num_examples=\(\) has no value"),
        ({"run.snapshots": 1}, "run.snapshots=1 must be at least 2"),
        ({"sweep.points": ({}, {"run.snapshots": 1})}, "run.snapshots=1 must be"),
        ({"data.labels": "unique"}, "data.labels=unique: held-out points have no"),
        ({"train.plateau": 2}, "train.plateau=2: a run that ends early"),
        ({"data.num_held_out": 0}, "data.num_held_out=0: quality is a distance"),
        ({"measure.onset_level": 1.0}, "measure.onset_level=1.0 must be in"),
        ({"measure.onset_tolerance": 0.0}, "measure.onset_tolerance=0.0 must be"),
    ],
)
def test_a_time_that_cannot_be_measured_is_refused(changes, message, tmp_path):
    with pytest.raises(build.ConfigError, match=message):
        experiments.run(smoke(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_twins_that_have_learned_nothing_show_no_sign(tmp_path, monkeypatch):
    """Both have the same weights: what one prefers by chance, the other does not."""
    config = smoke()
    (point,) = grid.points(config)

    def untrained(config, parts, session, generate):
        return training_run.initial_state(config, parts)

    monkeypatch.setattr(networks, "trained", untrained)
    monkeypatch.setattr(onset, "_check_kept", lambda folder, steps: None)
    monkeypatch.setattr(checkpoint, "restore", lambda folder, step, like: like)
    with Session(tmp_path, config) as session:
        (row,) = onset.measure([point], session)
    for weights in onset.WEIGHTS:
        np.testing.assert_array_equal(row[f"{weights}_nearer"], 0)
        np.testing.assert_allclose(row[f"{weights}_member"], 0, atol=1e-12)
        assert len(np.unique(row[f"{weights}_held_out_loss"])) == 1


@pytest.mark.slow
def test_every_snapshot_is_looked_at_and_the_last_is_the_network(tmp_path):
    config = smoke(**{"sweep.num_examples": (16,)})
    experiments.run(config, tmp_path)
    (point,) = grid.points(config)
    metrics = record.read_json(tmp_path / "metrics.json")
    (row,) = record.read_points(tmp_path, metrics)
    assert row["steps"].tolist() == sorted(monitor.snapshot_steps(point.config, 16))
    assert row["ema_ratio"][-1] == row["ratio"]
    assert row["ema_frechet"][-1] == row["frechet"] > 0
    assert not np.array_equal(row["ema_frechet"], row["raw_frechet"])
    assert (row["ema_held_out_loss"] > 0).all() and (row["ema_train_loss"] > 0).all()
    # A network that was kept without them is not taken for one that has them.
    assert len(list((tmp_path / "models").iterdir())) == 2  # twins
    (folder, _) = sorted((tmp_path / "models").glob("*/snapshots"))
    shutil.rmtree(folder / str(checkpoint.steps(folder)[0]))
    config.measure.onset_level = 0.5
    with pytest.raises(checkpoint.ConflictError, match="has no snapshots of steps"):
        experiments.run(config, tmp_path, allow_config_change=True)
