"""What is saved comes back bit for bit, and only to the model that saved it."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from memsep_jax import checkpoint, parallel


def tree(scale=1.0):
    return {
        "params": {
            "kernel": scale * jnp.linspace(-1, 1, 12).reshape(3, 4) / 3,
            "half": (jnp.arange(5) / 7).astype(jnp.bfloat16),
        },
        "step": jnp.int32(7),
        "counts": (jnp.arange(3, dtype=jnp.uint8), jnp.array([True, False])),
    }


def same(a, b):
    """Bit for bit, and of the same types."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_a_round_trip_is_bitwise(tmp_path):
    """float32, bfloat16, int, uint8, bool, scalars and tuples."""
    checkpoint.save(tmp_path, 7, tree())
    same(checkpoint.restore(tmp_path, 7, tree(0.0)), tree())
    shapes = jax.eval_shape(tree)
    same(checkpoint.restore(tmp_path, 7, shapes), tree())


def test_restored_leaves_take_the_sharding_of_their_target(tmp_path):
    mesh = parallel.make_mesh()
    checkpoint.save(tmp_path, 1, {"x": jnp.arange(8.0)})
    like = {"x": jax.device_put(jnp.zeros(8), parallel.by_batch(mesh))}
    found = checkpoint.restore(tmp_path, 1, like)
    assert found["x"].sharding == like["x"].sharding
    np.testing.assert_array_equal(found["x"], np.arange(8.0))


def test_the_newest_step_is_found_and_at_most_looks_back(tmp_path):
    assert checkpoint.restore_newest(tmp_path / "never", tree()) is None
    for step in (2, 10, 9):
        checkpoint.save(tmp_path, step, tree(step))
    assert checkpoint.steps(tmp_path) == [2, 9, 10]
    found, step = checkpoint.restore_newest(tmp_path, tree())
    assert step == 10
    same(found, tree(10))
    assert checkpoint.restore_newest(tmp_path, tree(), at_most=9)[1] == 9
    assert checkpoint.restore_newest(tmp_path, tree(), at_most=1) is None


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 20):
        checkpoint.save(tmp_path, step, {"x": jnp.ones(2)}, keep=2)
    assert checkpoint.steps(tmp_path) == [3, 20]


def test_a_step_that_is_saved_again_is_replaced(tmp_path):
    checkpoint.save(tmp_path, 1, tree())
    checkpoint.save(tmp_path, 1, tree(5))
    same(checkpoint.restore(tmp_path, 1, tree()), tree(5))


def test_what_is_no_step_is_no_step(tmp_path):
    checkpoint.save(tmp_path, 3, {"x": jnp.ones(2)})
    for name in ("best", "corrupt-9", "²", "-1", "4.orbax-checkpoint-tmp-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    (tmp_path / "12").mkdir()  # empty: orbax would take it for the latest
    (tmp_path / "13").touch()
    assert checkpoint.steps(tmp_path) == [3]
    checkpoint.clean(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"3", "best", "corrupt-9", "²", "-1", "12", "13"}


def test_a_step_that_is_set_aside_never_covers_another(tmp_path):
    names = []
    for value in range(3):
        checkpoint.save(tmp_path, 1, {"x": jnp.full(2, value)})
        names.append(checkpoint.set_aside(tmp_path, 1, "corrupt").name)
    assert names == ["corrupt-1", "corrupt-1.1", "corrupt-1.2"]
    assert checkpoint.steps(tmp_path) == []


def test_digests_are_equal_exactly_when_all_bits_are():
    whole = checkpoint.digest(tree())
    assert whole == checkpoint.digest(jax.tree.map(jnp.copy, tree()))
    kernel = np.asarray(tree()["params"]["kernel"])
    nudged = tree()
    nudged["params"]["kernel"] = np.nextafter(kernel, np.float32(9))
    zero, minus = {"x": jnp.zeros(2)}, {"x": -jnp.zeros(2)}
    shaped = {"x": jnp.zeros((2, 1))}, {"x": jnp.zeros(2, jnp.int32)}
    others = [nudged, zero, minus, *shaped, {"y": jnp.zeros(2)}]
    digests = {whole, *map(checkpoint.digest, others)}
    assert len(digests) == 7
    swapped = (
        {"a": jnp.ones(1), "b": jnp.zeros(1)},
        {"a": jnp.zeros(1), "b": jnp.ones(1)},
    )
    assert checkpoint.digest(swapped[0]) != checkpoint.digest(swapped[1])


def test_leaves_are_named_by_their_path():
    assert set(checkpoint.leaves(tree())) == {
        "params/kernel",
        "params/half",
        "step",
        "counts/0",
        "counts/1",
    }


def test_a_save_of_what_is_not_finite_is_refused(tmp_path):
    with pytest.raises(ArithmeticError, match="step 4 .* not finite"):
        checkpoint.save(tmp_path, 4, {"x": jnp.array([1.0, jnp.nan])})
    assert checkpoint.steps(tmp_path) == []


@pytest.mark.parametrize(
    "change, words",
    [
        ({"kernel": jnp.ones((3, 5))}, r"params/kernel: saved \(\(3, 4\), 'float32'\)"),
        ({"kernel": jnp.ones((3, 4), jnp.int32)}, r"expected \(\(3, 4\), 'int32'\)"),
        ({"extra": jnp.ones(1)}, r"params/extra: saved absent, expected \(\(1,\)"),
    ],
)
def test_another_model_is_told_which_leaves_differ(tmp_path, change, words):
    checkpoint.save(tmp_path, 1, tree())
    like = tree()
    like["params"] |= change
    with pytest.raises(checkpoint.ConflictError, match=words) as caught:
        checkpoint.restore(tmp_path, 1, like)
    assert "1 leaves differ; look at model.width" in str(caught.value)
    assert caught.value.exit_code == 2
    same(checkpoint.restore(tmp_path, 1, tree()), tree())  # and nothing was harmed


def test_a_missing_leaf_is_told_too(tmp_path):
    checkpoint.save(tmp_path, 1, tree())
    like = tree()
    del like["step"]
    with pytest.raises(
        checkpoint.ConflictError, match="step: saved .* expected absent"
    ):
        checkpoint.restore_newest(tmp_path, like)


def test_a_leaf_that_changed_on_disk_is_noticed(tmp_path, monkeypatch):
    """Orbax hands over whatever is there: the digest in the manifest decides."""
    checkpoint.save(tmp_path, 1, {"x": jnp.ones(2)})
    monkeypatch.setattr(checkpoint, "_sha256", lambda array: "0" * 64)
    with pytest.raises(checkpoint.CorruptError, match="digest mismatch in x"):
        checkpoint.restore(tmp_path, 1, {"x": jnp.ones(2)})


def test_a_damaged_step_is_set_aside_and_the_one_before_it_taken(tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, {"x": jnp.full(2, step)})
    manifest = tmp_path / "2" / "manifest" / "metadata"
    text = json.loads(manifest.read_text())
    text["leaves"]["x"][2] = "0" * 64
    manifest.write_text(json.dumps(text))
    found, step = checkpoint.restore_newest(tmp_path, {"x": jnp.ones(2, jnp.int32)})
    assert step == 1 and found["x"].tolist() == [1, 1]
    assert (tmp_path / "corrupt-2").is_dir()


def test_bfloat16_on_the_host_is_a_type_of_its_own():
    """NumPy would say void: what is saved keeps its name."""
    assert checkpoint.leaves(tree())["params/half"].dtype == ml_dtypes.bfloat16
