"""Files are whole or absent, rows come once, and finished chunks are not redone."""

import contextlib
import csv
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memsep_jax.checkpoint import StorageError
from memsep_jax.experiments import record


class Session:
    """What in_chunks needs of a session."""

    def __init__(self):
        self.seen = []

    def say(self, text):
        raise AssertionError(text)  # there is memory for all of it

    @contextlib.contextmanager
    def progress(self, what, total, done=0):
        yield lambda done, text="": self.seen.append(done)


def test_json_comes_back_with_numpy_and_jax_values_plain(tmp_path):
    path = tmp_path / "deep" / "a.json"
    record.write_json(
        path, {"a": np.float32(0.5), "b": np.arange(3), 3: (True, None), "c": "µ"}
    )
    assert record.read_json(path) == {
        "a": 0.5,
        "b": [0, 1, 2],
        "3": [True, None],
        "c": "µ",
    }


def test_what_json_lacks_becomes_null(tmp_path):
    path = tmp_path / "a.json"
    record.write_json(path, {"a": float("nan"), "b": np.array([1, np.inf])})
    text = path.read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert json.loads(text) == {"a": None, "b": [1.0, None]}


@pytest.mark.parametrize("text", ["", '{"a": 1', "\x00\x00"])
def test_a_file_that_is_not_whole_reads_as_none(tmp_path, text):
    (tmp_path / "a").write_text(text)
    assert record.read_json(tmp_path / "a") is None
    assert record.read_npz(tmp_path / "a") is None
    assert record.read_json(tmp_path / "b") is None
    assert record.read_npz(tmp_path / "b") is None


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    record.write_json(path, 1)
    with pytest.raises(RuntimeError), record.replacing(path) as part:
        part.write_text("half of")
        raise RuntimeError
    assert record.read_json(path) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_the_name_is_taken_only_when_the_file_is_whole(tmp_path):
    path = tmp_path / "a.json"
    with record.replacing(path) as part:
        part.write_text("1")
        assert not path.exists()
    assert path.read_text() == "1"


def test_a_write_that_the_disk_refuses_names_the_file(tmp_path):
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "a.json"  # a file is no folder
    with pytest.raises(StorageError, match="a.json") as caught:
        record.write_json(path, 1)
    assert caught.value.exit_code == 5


def test_arrays_come_back_bit_for_bit(tmp_path):
    arrays = {"x": np.float32([1 / 3, -0.0]), "u": np.arange(4, dtype=np.uint8)}
    record.write_npz(tmp_path / "a.npz", **arrays)
    found = record.read_npz(tmp_path / "a.npz")
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        assert found[name].tobytes() == array.tobytes()


def test_pickled_arrays_are_not_read(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.array([{}], dtype=object))
    assert record.read_npz(tmp_path / "a.npz") is None


def test_a_truncated_npz_reads_as_none(tmp_path):
    path = tmp_path / "a.npz"
    record.write_npz(path, x=np.arange(1_000))
    path.write_bytes(path.read_bytes()[:2_000])
    assert record.read_npz(path) is None


def test_columns_become_rows(tmp_path):
    record.write_csv(tmp_path / "a.csv", {"i": range(2), "d": [0.1, 1 / 3]})
    with open(tmp_path / "a.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["i"]) for row in rows] == [0, 1]
    assert [float(row["d"]) for row in rows] == [0.1, 1 / 3]
    with pytest.raises(ValueError):
        record.write_csv(tmp_path / "b.csv", {"i": range(2), "d": [0.1]})
    assert not (tmp_path / "b.csv").exists()


# metrics.jsonl.


def test_a_restart_repeats_no_row_and_loses_none(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = record.Metrics(path, 0)
    for step in (1, 2, 3, 4):
        metrics.write(step=step, loss=np.float32(step / 2))
    metrics = record.Metrics(path, 2)  # the checkpoint is of step 2
    for step in (3, 4, 5):
        metrics.write(step=step, loss=float("nan") if step == 5 else step / 2)
    rows = record.read_metrics(path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["loss"] for row in rows] == [0.5, 1, 1.5, 2, None]


def test_a_torn_line_costs_itself_only(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert record.read_metrics(path) == [{"step": 1}]
    metrics = record.Metrics(path, 10)
    metrics.write(step=2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_lines_that_are_no_rows_are_passed_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('[1]\n\n3\n{"loss": 1}\n{"step": "1"}\n{"step": 4}\n')
    assert record.read_metrics(path) == [{"step": 4}]
    assert record.read_metrics(tmp_path / "none") == []


# Work that is kept.


def test_what_is_kept_is_read_and_not_done_again(tmp_path):
    called = []

    def work():
        called.append(1)
        return {"x": jnp.arange(3), "y": 0.5, "names": ["a", "b"]}

    path = tmp_path / "deep" / "a.npz"
    for _ in range(2):
        found = record.kept(path, work)
        assert found["x"].tolist() == [0, 1, 2] and found["y"] == 0.5
        assert found["names"].tolist() == ["a", "b"]
        assert all(isinstance(value, np.ndarray) for value in found.values())
    assert called == [1]
    path.write_bytes(path.read_bytes()[:50])
    record.kept(path, work)
    assert called == [1, 1]


def test_work_that_fails_keeps_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError):
        record.kept(tmp_path / "a.npz", lambda: {"x": 1 / 0})
    assert not any(tmp_path.iterdir())


# Chunks.


def squares(called):
    def work(start, stop):
        called.append((start, stop))
        i = np.arange(start, stop)
        return {"i": i, "square": i**2}

    return work


@pytest.mark.parametrize("chunk", [1, 3, 10, 99])
def test_chunks_make_the_whole(tmp_path, chunk):
    called, session = [], Session()
    found = record.in_chunks(tmp_path, squares(called), 10, chunk, session, "squares")
    np.testing.assert_array_equal(found["i"], np.arange(10))
    np.testing.assert_array_equal(found["square"], np.arange(10) ** 2)
    assert len(called) == -(-10 // chunk) and session.seen[-1] == 10


def test_chunks_that_are_there_are_not_done_again(tmp_path):
    called = []

    def stopped(start, stop):
        if start == 8:
            raise KeyboardInterrupt
        return squares(called)(start, stop)

    with pytest.raises(KeyboardInterrupt):
        record.in_chunks(tmp_path, stopped, 10, 4, Session(), "squares")
    assert called == [(0, 4), (4, 8)]
    found = record.in_chunks(tmp_path, squares(called), 10, 4, Session(), "squares")
    assert called == [(0, 4), (4, 8), (8, 10)]
    np.testing.assert_array_equal(found["square"], np.arange(10) ** 2)


def test_a_torn_chunk_is_done_again(tmp_path):
    record.in_chunks(tmp_path, squares([]), 10, 4, Session(), "squares")
    torn = sorted(tmp_path.glob("*.npz"))[1]
    torn.write_bytes(torn.read_bytes()[:50])
    called = []
    found = record.in_chunks(tmp_path, squares(called), 10, 4, Session(), "squares")
    assert called == [(4, 8)]
    np.testing.assert_array_equal(found["square"], np.arange(10) ** 2)


# Long work in pieces.


@pytest.mark.parametrize("call", [0.0, 1e-3, 1e9])
def test_what_is_mapped_is_the_same_bits_at_every_speed(call, monkeypatch):
    monkeypatch.setattr(record, "CALL", call)
    x = jnp.linspace(-3, 3, 11)
    calls: list[int] = []

    def one(i, x):
        return {"x": x[i] ** 2, "i": i}

    squares = record.mapped(one, 4, lambda: calls.append(0))
    for _ in range(2):
        found = squares(11, x)
    np.testing.assert_array_equal(found["i"], np.arange(11))
    np.testing.assert_allclose(found["x"], np.linspace(-3, 3, 11) ** 2, rtol=1e-6)
    # Three pieces of 4, twice: one a call, or all the rest once the rate is known.
    assert len(calls) == {0.0: 6, 1e9: 3}.get(call, len(calls))
    one = jax.jit(jax.vmap(lambda x: x**2))(x)
    np.testing.assert_array_equal(found["x"], one)


def test_a_call_takes_as_long_as_the_rate_of_the_one_before_says(monkeypatch):
    """A clock of 3 s for the first call, and then of half a second a thing."""
    now, calls = [0.0], []
    monkeypatch.setattr(record.time, "monotonic", lambda: now[0])

    def advance(total, first, last):
        now[0] += 0.5 * (last - first) if calls else 3.0
        calls.append((first, last))
        return total + sum(range(first, last))

    run = record.paced(advance)
    assert run(0, 12) == sum(range(12))
    assert calls == [(0, 1), (1, 2), (2, 6), (6, 10), (10, 12)]  # CALL is 2 s
    calls.clear()
    calls.append(None)
    run(0, 5)  # it remembers
    assert calls[1:] == [(0, 4), (4, 5)]


def test_a_batch_is_a_half_until_a_slow_device_does_it_in_ten_seconds(monkeypatch):
    monkeypatch.setitem(record.LEAST, "cpu", 1e11)
    assert record.at_once(1e8, 250) == 250
    assert record.at_once(1e9, 250) == 63  # 125 are 1.25e11
    assert record.at_once(1e13, 250) == 1
    assert record.at_once(float("nan"), 250) == 250
