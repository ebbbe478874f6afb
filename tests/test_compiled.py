import os
import time
from pathlib import Path

import jax
import pytest
from faults import harness

from memsep_jax.experiments.runtime import compiled

DEFAULTS = {  # jax's
    "jax_compilation_cache_dir": None,
    "jax_persistent_cache_min_compile_time_secs": 1.0,
    "jax_persistent_cache_min_entry_size_bytes": 0,
}


@pytest.fixture
def of_user(tmp_path, monkeypatch):
    """The cache directory of a user, of whom jax knows no wish before or afterwards."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = {name: getattr(jax.config, name) for name in DEFAULTS}
    for name, value in DEFAULTS.items():
        jax.config.update(name, value)
    yield tmp_path / "cache"
    for name, value in before.items():
        jax.config.update(name, value)


def place():
    return jax.config.jax_compilation_cache_dir


def test_each_processor_has_a_folder_of_its_own(of_user, tmp_path, monkeypatch):
    places = []
    for processor in ("this one", "another"):
        monkeypatch.setattr(compiled, "_CPUINFO", tmp_path / "cpuinfo")
        compiled._CPUINFO.write_text(f"model name: {processor}\nflags: avx\n")
        for folder in (None, tmp_path / "of a sweep"):
            jax.config.update("jax_compilation_cache_dir", None)
            compiled.keep(folder)
            places.append(Path(place()))
    assert len(set(places)) == 4
    above = [path.parent for path in places]
    assert above == 2 * [of_user / "memsep_jax", tmp_path / "of a sweep"]


def test_what_a_person_chose_stays(of_user):
    jax.config.update("jax_compilation_cache_dir", "")  # none
    compiled.keep()
    assert place() == "" and not of_user.exists()
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 7.0)
    compiled.keep()
    assert place()
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 7.0
    assert jax.config.jax_persistent_cache_min_entry_size_bytes == -1


def test_where_nothing_can_be_written_nothing_is_kept(of_user):
    of_user.write_text("a file, not a directory")
    compiled.keep()
    assert place() is None


def test_programs_of_long_ago_are_removed(of_user):
    compiled.keep()
    old, new = (os.path.join(place(), name) for name in ("old", "new"))
    for path, days in ((old, 31), (new, 29)):
        with open(path, "w"):
            pass
        then = time.time() - days * 24 * 3_600
        os.utime(path, (then, then))
    jax.config.update("jax_compilation_cache_dir", None)
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
