"""Every module of these tests compiles each program once."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def once(compiled_once):
    pass
