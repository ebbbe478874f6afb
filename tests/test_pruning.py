"""One trained network, pruned by every criterion, fine-tuned, and looked at."""

from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memsep_jax import (
    checkpoint,
    data,
    defaults,
    experiments,
    features,
    fidelity,
    parallel,
    process,
    prune,
    train,
)
from memsep_jax.experiments import record, training
from memsep_jax.experiments.config import build
from memsep_jax.experiments.studies import pruning
from memsep_jax.experiments.studies.evaluate import make_generate
from memsep_jax.experiments.studies.training_run import initial_state

MEASURED = ("small_t", "uniform_t", "large_t", "magnitude", "activation")


def small(**changes):
    config = defaults.smoke(defaults.train())
    config.model.update(patch=4, width=16, depth=2, num_heads=4)
    config.prune.update(ratio=0.4, draws=24, steps=2, looks=2, lr=1e-2)
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def parts():
    return build.build(small())


@pytest.fixture(scope="module")
def params(parts, off_zero):
    return off_zero(training.init_params(parts, jax.random.key(0)))


@pytest.fixture(scope="module")
def measured(parts, params):
    """What every criterion that is a measurement says."""
    return {name: pruning.importance(small(), parts, params, name) for name in MEASURED}


def keeps(parts, params, measured, **changes):
    return {
        name: pruning.keep(
            small(**{"prune.criterion": name, **changes}), parts, params, dict(measured)
        )
        for name in prune.CRITERIA
    }


@pytest.mark.parametrize("criterion, tail", [("small_t", True), ("large_t", False)])
def test_times_are_those_of_beta_on_the_papers_clock(parts, criterion, tail):
    """P(u < 1/2) = 1.8 2^-.8 - .8 2^-1.8 for small t, and of u > 1/2 for large t."""
    law = pruning.times(small(), parts, criterion)
    keys = jax.random.split(jax.random.key(1), 20_000)
    t = jax.jit(jax.vmap(law))(keys)
    clock = process.variance_preserving()
    middle = process.noise_to_signal(clock, 0.5)  # the run's process has t = sigma
    share, truth = np.mean((t < middle) == tail), 1.8 * 0.5**0.8 - 0.8 * 0.5**1.8
    assert abs(share - truth) < 4 * np.sqrt(truth * (1 - truth) / len(t))
    low, high = small().sampler.t_min, small().sampler.t_max
    assert np.all((t >= np.float32(low)) & (t <= high))


def test_uniform_times_are_uniform_on_the_clock(parts):
    law = pruning.times(small(), parts, "uniform_t")
    t = jax.jit(jax.vmap(law))(jax.random.split(jax.random.key(1), 20_000))
    middle = process.noise_to_signal(process.variance_preserving(), 0.25)
    assert abs(np.mean(t < middle) - 0.25) < 4 * np.sqrt(0.25 * 0.75 / len(t))


def test_a_run_may_have_its_own_clock(parts):
    config = small(**{"prune.clock": ""})
    config.prune_times.update(name="uniform", t_min=0.5, t_max=0.7)
    law = pruning.times(config, parts, "small_t")
    t = jax.jit(jax.vmap(law))(jax.random.split(jax.random.key(1), 100))
    assert np.all((t >= 0.5) & (t <= 0.7))


def test_criteria_agree_in_shape_and_norm_and_in_nothing_else(measured):
    for found in measured.values():
        assert found.shape == (2, 4)
        np.testing.assert_allclose((found**2).sum(axis=1), 1, rtol=1e-5)
    distinct = {found.tobytes() for found in measured.values()}
    assert len(distinct) == len(MEASURED)


def test_importance_is_that_of_algorithm_1(parts, params, measured):
    """From the same draws, by `prune.head_importance`."""
    config, n = small(), len(parts.splits.train.x)
    key, law = build.keys(config.seed).prune, pruning.times(config, parts, "small_t")
    draws = np.arange(config.prune.draws)
    x0 = parts.splits.train.x[draws % n]

    @jax.jit
    @jax.vmap
    def drawn(i):
        t_key, eps_key = jax.random.split(jax.random.fold_in(key, i))
        return law(t_key), jax.random.normal(eps_key, x0.shape[1:])

    t, eps = drawn(draws)

    def loss(gates, x0, t, eps):
        network = training.network(parts, params, gates=gates)
        return train.prediction_loss(
            network, parts.prediction, parts.process, x0, t, eps
        )

    found = jax.jit(lambda *a: prune.head_importance(loss, *a, (2, 4)))(x0, t, eps)
    np.testing.assert_allclose(measured["small_t"], found, rtol=1e-4)


def test_importance_is_the_same_for_every_chunk(parts, params, measured):
    again = pruning.importance(small(**{"run.chunk": 5}), parts, params, "activation")
    np.testing.assert_allclose(again, measured["activation"], rtol=1e-4)


def test_every_criterion_drops_as_many_and_changes_the_output(parts, params, measured):
    x, t = parts.splits.train.x[0], jnp.float32(0.5)
    apply = jax.jit(lambda p: training.network(parts, p)(x, t))
    whole = apply(params)
    for name, keep in keeps(parts, params, measured).items():
        assert (~keep).sum() == 3 and keep.any(axis=1).all(), name
        masked = prune.apply_mask(params, prune.head_mask(params, keep))
        assert np.abs(apply(masked) - whole).max() > 1e-3, name


def test_controls_mirror_what_they_control(parts, params, measured):
    found = keeps(parts, params, measured)
    importance = measured["small_t"]
    first = found["highest_first"]
    assert not first.flat[np.argmax(importance)]
    # Those that fall are the highest of their layers.
    for layer, row in enumerate(first):
        order = np.argsort(-importance[layer])
        assert set(np.flatnonzero(~row)) == set(order[: (~row).sum()])
    counts = found["random_per_layer"].sum(axis=1)
    np.testing.assert_array_equal(counts, found["small_t"].sum(axis=1))
    again = keeps(parts, params, measured)
    for name, keep in found.items():
        np.testing.assert_array_equal(keep, again[name])
    seeds = [
        keeps(parts, params, measured, seed=seed)["random"].tobytes()
        for seed in range(5)
    ]
    assert len(set(seeds)) > 1


def test_nothing_is_measured_where_nothing_falls(parts, params):
    config = small(**{"prune.ratio": 0.0})
    known = {}
    assert pruning.keep(config, parts, params, known).all() and not known


@pytest.mark.parametrize("group, units", [("neurons", (2, 64)), ("blocks", (1, 2))])
def test_neurons_and_blocks_fall_by_the_same_code(parts, params, group, units):
    changes = {"prune.group": group, "prune.ratio": 0.5}
    keep = pruning.keep(small(**changes), parts, params)
    assert keep.shape == units and (~keep).sum() == np.prod(units) // 2
    cost = pruning.cost(parts, params, keep, group)
    whole = pruning.cost(parts, params)
    assert cost["parameters"] < whole["parameters"] and cost["flops"] < whole["flops"]


def test_the_cost_is_that_of_the_removed_heads(parts, params):
    keep = np.ones((2, 4), bool)
    keep[0, :2] = keep[1, 3] = False
    width, size = 16, 4  # of a head
    head = 3 * (width * size + size) + size * width
    whole, pruned = (pruning.cost(parts, params, k) for k in (None, keep))
    assert whole["parameters"] - pruned["parameters"] == 3 * head


def test_importance_that_is_not_finite_ends_with_one_message(parts, params):
    bad = jax.tree.map(jnp.copy, params)
    kernel = bad["block_1"]["attention"]["out"]["kernel"]
    bad["block_1"]["attention"]["out"]["kernel"] = kernel.at[2].set(jnp.nan)
    with pytest.raises(
        train.NonFiniteError,
        match=r"criterion=magnitude .* layer 1, unit 2 .* block_1/attention/out/kernel",
    ) as error:
        pruning.importance(small(), parts, bad, "magnitude")
    assert error.value.exit_code == 4


@pytest.fixture(scope="module")
def cuts(parts, params):
    """Pruned and control, both fine-tuned."""
    config = small()
    score_of = lambda weights, label: training.score_fn(parts, weights, label)  # noqa: E731
    generate = make_generate(config, parts, parallel.make_mesh(), score_of)
    watch = pruning.watcher(config, parts, generate)
    tune = pruning.tuner(config, parts)
    keep = np.ones((2, 4), bool)
    keep[0, 1] = keep[1, 2:] = False
    found = {
        name: pruning.cut(config, params, its, watch, tune)
        for name, its in {"pruned": keep, "control": np.ones_like(keep)}.items()
    }
    return keep, found, watch


def test_fine_tuning_moves_what_is_kept_and_nothing_else(params, cuts):
    keep, found, _ = cuts
    mask, state = prune.head_mask(params, keep), found["pruned"].state
    weights = found["pruned"].weights
    chex.assert_trees_all_equal(state.mask, mask)
    for tree in (weights, state.params, state.ema):
        chex.assert_trees_all_equal(prune.apply_mask(tree, mask), tree)
    start = jax.tree.leaves(prune.apply_mask(params, mask))
    for tuned, before in zip(jax.tree.leaves(weights), start, strict=True):
        assert np.any(np.asarray(tuned) != np.asarray(before))


def test_fine_tuning_decays_as_training_does(parts, params):
    """A step of SGD with decay 8 beside one without: lr 8 / d of the weights less."""
    first = []
    for decay in (0.0, 8.0):
        config = small(**{"optimizer.weight_decay": decay, "prune.lr": 0.1})
        config.optimizer.update(name="sgd", momentum=0.0)
        config.prune.update(steps=1, looks=1)
        tune = pruning.tuner(config, parts)
        first += [state.params for _, state in tune(params, None)]
    share = 0.1 * 8.0 / np.prod(parts.splits.train.x.shape[1:])
    truth = jax.tree.map(lambda a, w: a - share * w, first[0], params)
    chex.assert_trees_all_close(first[1], truth, rtol=1e-5, atol=1e-6)
    assert share > 1e-3


def test_the_control_is_looked_at_as_often(parts, params, cuts):
    _, found, watch = cuts
    for row in found.values():
        np.testing.assert_array_equal(row.steps, [0, 1, 2])
        assert all(len(values) == 3 for values in row.numbers.values())
        assert np.isfinite(row.numbers["frechet"]).all()
    start = {name: values[0] for name, values in found["control"].numbers.items()}
    assert watch(params) == pytest.approx(start)


def test_samples_of_the_compact_network_are_those_of_the_masked_one(params, cuts):
    keep, found, watch = cuts
    masked = {name: values[0] for name, values in found["pruned"].numbers.items()}
    # Images are rounded to 8 bits: a difference of rounding may move one by a level.
    assert watch(prune.compact(params, keep)) == pytest.approx(masked, rel=1e-2)


def test_copies_are_nearer_to_their_own_training_set():
    """Of two sets that have no common point, and of one point that is in the middle."""
    own, twin = (np.array(x, np.float32)[:, None] for x in ([0, 10], [1, 11]))
    splits = data.Splits(data.Dataset(own, None), None, "", 2)
    parts = SimpleNamespace(splits=splits)

    def generate(weights, start, stop):
        return np.asarray(weights)

    watch = pruning.watcher(small(), parts, generate, twin)
    middle = np.array([[0.5]], np.float32)
    assert [float(watch(x)["nearer"]) for x in (own, twin, middle)] == [1, 0, 0.5]
    assert "nearer" not in pruning.watcher(small(), parts, generate)(own)


def test_quality_is_measured_on_features_with_pixels_beside_them(parts):
    """On the features of the extractor itself; pixels give what they gave alone."""
    held_out = np.asarray(parts.splits.held_out.x)
    x = np.random.default_rng(0).permutation(held_out)[:20] * 0.5

    def numbers(**fields):
        return pruning.watcher(small(**fields), parts, lambda *_: x)({})

    plain = numbers()
    found = numbers(**{"measure.features": "random_conv"})
    see = features.random_conv(held_out.shape[1:]).apply
    drawn = data.like(parts.splits.train.x, x)
    truth = fidelity.frechet(see(drawn), see(held_out), warn=False)
    assert found["frechet"] == pytest.approx(truth, rel=1e-6)
    assert found["pixel_frechet"] == plain["frechet"] != found["frechet"]
    assert "pixel_frechet" not in plain and plain["ratio"] == found["ratio"]


def _like(config):
    """A TrainState of the main job, with the mask of a pruned one."""
    parts = build.build(config)
    state = jax.eval_shape(lambda: initial_state(config, parts))
    mask = prune.head_mask(state.params, np.ones((2, 4), bool))
    return state.replace(mask=mask)


@pytest.mark.slow
def test_the_main_job_reports_its_pruning(tmp_path):
    config = small()
    experiments.run(config, tmp_path)
    found = record.read_json(tmp_path / "metrics.json")["pruning"]
    assert found["settings"]["ratio"] == 0.4
    assert found["pruned"]["steps"] == found["control"]["steps"] == [0, 1, 2]
    assert np.sum(~np.array(found["pruned"]["keep"])) == 3
    assert found["pruned"]["parameters"] < found["control"]["parameters"]
    saved = checkpoint.restore_newest(tmp_path / "pruned", _like(config))
    state, step = saved
    assert step == 2 and state.step == 2
    mask = prune.head_mask(state.params, np.array(found["pruned"]["keep"]))
    chex.assert_trees_all_equal(state.mask, mask)
    chex.assert_trees_all_equal(prune.apply_mask(state.ema, mask), state.ema)
    page = (tmp_path / "report.html").read_text()
    assert "3 of 8 heads were removed" in page and "control: fine-tuned" in page


MLP = {"model.name": "mlp", "model.patch": None, "model.num_heads": None}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prune.ratio": 1.0}, r"prune.ratio=1.0 must be in \[0, 1\)"),
        ({"prune.ratio": 0.1}, "prune.ratio=0.1 removes none of 8 heads: .* 0.125"),
        ({"prune.criterion": "small"}, "prune.criterion=small must be one of small_t,"),
        ({"prune.group": "layers"}, "prune.group=layers must be one of heads,"),
        ({"prune.clock": "ddpm"}, "prune.clock=ddpm must be empty, or one of"),
        ({"prune.lr": 0.0}, "prune.lr=0.0 must be positive"),
        ({"prune_times.a": -1.0}, "prune_times.a=-1.0, prune_times.b=2.0"),
        (MLP, "prune.group='heads': the network has none; a dit has"),
    ],
)
def test_a_pruning_that_cannot_be_is_refused_before_anything(
    changes, message, tmp_path
):
    with pytest.raises(build.ConfigError, match=message) as error:
        experiments.run(small(**changes), tmp_path / "run")
    assert error.value.exit_code == 2 and not (tmp_path / "run").exists()
