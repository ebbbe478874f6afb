import platform
import subprocess
import sys

import pytest

from memsep_jax import memory

FAULTS = """
from memsep_jax import memory
{first}
import resource
import jax
import jax.numpy as jnp


@jax.jit
def call(x):  # 64 MB, which are freed when the next call is made
    return x[:, None] * x


x = jnp.ones(4_096)
call(x).block_until_ready()  # compiles
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(80):
    call(x).block_until_ready()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 80)
"""
GLIBC = platform.libc_ver()[0] == "glibc"


@pytest.mark.skipif(not GLIBC, reason="the numbers are glibc's")
def test_a_call_finds_the_memory_of_the_call_before_it():
    pages = []
    for first in ("", "memory.keep()"):
        text = FAULTS.format(first=first)
        done = subprocess.run(
            [sys.executable, "-c", text], capture_output=True, text=True, check=True
        )
        pages.append(float(done.stdout))
    # Of 80 calls, 10 to 13 are the first to use a piece: the heap has to grow.
    assert 0 <= pages[1] < pages[0] / 2, pages


def test_the_command_keeps_it_before_numpy_is_loaded():
    text = """
import sys
from memsep_jax import main, memory
memory.keep = lambda: sys.exit("early" if "numpy" not in sys.modules else "late")
main.run()
"""
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
    assert done.stderr.strip() == "early"


def test_another_c_library_changes_nothing(monkeypatch):
    def none(name):
        raise TypeError(name)

    monkeypatch.setattr(memory.ctypes, "CDLL", none)
    memory._trim.cache_clear()
    memory.keep()
    memory.give_back()
    memory._trim.cache_clear()
