"""What is kept in the user's cache directory is what would be computed, or is gone."""

import os
import time

import numpy as np
import pytest

from memsep_jax.experiments import record
from memsep_jax.experiments.runtime import cache

ARRAYS = {
    "x": np.arange(6, dtype=np.float32).reshape(3, 2),
    "i": np.array([2, 0, 1]),
}
OF = {"what": "features", "of": "3f2a"}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """The folder of the entries, of a user without any."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "memsep_jax" / "sets"


def kept(of=OF, arrays=ARRAYS):
    """The arrays of an entry, and how often they were computed."""
    calls = []

    def work():
        calls.append(1)
        return dict(arrays)

    return cache.kept(of, work, 3), len(calls)


def assert_true(result, arrays=ARRAYS):
    assert result.keys() == arrays.keys()
    for name, x in arrays.items():
        assert result[name].dtype == x.dtype
        np.testing.assert_array_equal(result[name], x)


def test_the_same_is_computed_once_and_anything_else_anew(place):
    for of, count in ((OF, 1), (OF, 0), (OF | {"chunk": 7}, 1), (OF, 0)):
        result, calls = kept(of)
        assert calls == count
        assert_true(result)
    assert len(list(place.iterdir())) == 2


def test_other_versions_and_devices_compute_anew(monkeypatch):
    kept()
    current = cache.circumstances.current
    for name in ("device", "versions", "rounding", "streams"):
        now = current() | {name: "another"}
        with monkeypatch.context() as patch:
            patch.setattr(cache.circumstances, "current", lambda now=now: now)
            assert kept()[1] == 1
    monkeypatch.setattr(cache, "__version__", "another")
    assert kept()[1] == 1


def test_a_damaged_entry_is_computed_again(place):
    """Whichever byte is another one, and wherever the file ends."""
    kept()
    (path,) = place.iterdir()
    whole, redone = path.read_bytes(), 0
    for i in range(len(whole)):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 0xFF]) + whole[i + 1 :])
        result, calls = kept()
        assert_true(result)
        redone += calls
    assert redone > len(whole) / 2  # a few bytes, such as those of a date, say nothing
    for end in range(0, len(whole), 97):
        path.write_bytes(whole[:end])
        assert kept()[1] == 1


def test_an_entry_of_something_else_is_not_taken(place):
    kept()
    (path,) = place.iterdir()
    other = {name: x + 1 for name, x in ARRAYS.items()}
    kept({"what": "other"}, other)
    (theirs,) = set(place.iterdir()) - {path}
    path.write_bytes(theirs.read_bytes())
    result, calls = kept()
    assert calls == 1
    assert_true(result)
    entry = record.read_npz(path)
    record.write_npz(path, **{k: v[:2] if v.ndim else v for k, v in entry.items()})
    assert kept()[1] == 1  # of fewer rows


def test_old_entries_and_too_many_bytes_are_removed(place, monkeypatch):
    for i in range(3):
        kept({"what": i})
    paths = sorted(place.iterdir())
    size = paths[0].stat().st_size
    for path, days in zip(paths, (31, 20, 10), strict=True):
        then = time.time() - days * 24 * 3_600
        os.utime(path, (then, then))
    kept({"what": "new"})
    assert paths[0] not in place.iterdir() and len(list(place.iterdir())) == 3
    monkeypatch.setattr(cache, "MOST", 2.5 * size)
    kept({"what": "newer"})
    left = list(place.iterdir())
    assert len(left) == 2 and not {*paths} & {*left}


def test_an_entry_in_use_is_no_old_one(place):
    kept()
    (path,) = place.iterdir()
    os.utime(path, (1.0, 1.0))
    assert kept()[1] == 0
    assert path.stat().st_mtime > time.time() - 60


def test_large_entries_are_not_kept(place, monkeypatch):
    monkeypatch.setattr(cache, "LARGEST", 8)
    assert [kept()[1] for _ in range(2)] == [1, 1] and not place.exists()


def test_where_nothing_can_be_written_all_is_computed(place, monkeypatch):
    place.parent.parent.write_text("a file, not a directory")
    assert [kept()[1] for _ in range(2)] == [1, 1]

    def home():
        raise RuntimeError("no home")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(cache.Path, "home", home)
    result, calls = kept()
    assert calls == 1
    assert_true(result)
