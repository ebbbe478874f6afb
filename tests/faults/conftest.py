"""What the tests of faults share: compiled programs, and a run to compare with."""

import pytest

from faults import harness
from memsep_jax import experiments


@pytest.fixture(scope="module", autouse=True)
def once(compiled_once):
    """Every module of these tests compiles each program once."""


@pytest.fixture(scope="session")
def whole(children, tmp_path_factory):
    """The workdir of a run of TINY that nothing interrupted, made in this process."""
    name = "ein Lauf, größer als α=½ 'und' \"mehr\" 日本"
    workdir = tmp_path_factory.mktemp("whole") / "not there" / name
    with harness.compiled_once(), harness.undrawn():
        experiments.run(harness.config(*harness.TINY), workdir)
    return workdir
