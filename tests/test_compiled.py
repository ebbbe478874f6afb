import os
import time

import jax
import pytest
from faults import harness

from memsep_jax.experiments.runtime import compiled

OPTIONS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


@pytest.fixture
def of_user(tmp_path, monkeypatch):
    """The cache directory of a user; jax's options are as before afterwards."""
    for name in OPTIONS:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = {name: getattr(jax.config, name) for name in OPTIONS}
    yield tmp_path / "cache"
    for name, value in before.items():
        jax.config.update(name, value)


def place():
    return jax.config.jax_compilation_cache_dir


def test_each_processor_has_a_folder_of_its_own(of_user, tmp_path, monkeypatch):
    compiled.keep()
    assert os.path.dirname(place()) == str(of_user / "memsep_jax")
    first = place()
    monkeypatch.setattr(compiled, "_CPUINFO", tmp_path / "cpuinfo")
    compiled._CPUINFO.write_text("processor: 0\nmodel name: another\nflags: avx\n")
    compiled.keep()
    assert place() != first
    compiled.keep(tmp_path / "of a sweep")
    assert os.path.dirname(place()) == str(tmp_path / "of a sweep")


def test_what_a_person_chose_stays(of_user, monkeypatch):
    before = place()
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")  # none
    compiled.keep()
    assert place() == before and not of_user.exists()
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "7")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 7.0)
    compiled.keep()
    assert place() != before
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 7.0


def test_where_nothing_can_be_written_nothing_is_kept(of_user):
    before = place()
    of_user.write_text("a file, not a directory")
    compiled.keep()
    assert place() == before


def test_programs_of_long_ago_are_removed(of_user):
    compiled.keep()
    old, new = (os.path.join(place(), name) for name in ("old", "new"))
    for path, days in ((old, 31), (new, 29)):
        with open(path, "w"):
            pass
        then = time.time() - days * 24 * 3_600
        os.utime(path, (then, then))
    compiled.keep()
    assert os.listdir(place()) == ["new"]


def test_the_second_run_compiles_nothing_anew(tmp_path, monkeypatch):
    """And a dry run, which writes nothing, keeps nothing."""
    monkeypatch.setattr(harness, "CACHE", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    dry = harness.run(*harness.TINY, "--dry_run", workdir=tmp_path / "dry")
    assert dry.code == 0 and not (tmp_path / "cache" / "memsep_jax").exists()
    seen = []
    for name in ("first", "second"):
        done = harness.run(
            *harness.TINY, workdir=tmp_path / name, patch=harness.UNDRAWN
        )
        assert done.code == 0, done.stderr
        seen.append({path.name for path in (tmp_path / "cache").rglob("*-cache")})
    assert seen[0] and seen[0] == seen[1]
