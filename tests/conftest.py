"""Strict settings for every test; 4 CPU devices, so sharding is tested everywhere."""

import os

import jax
import jaxtyping
import numpy as np
import pytest
from shapes import FLOOR_0

# A test compiles for longer than it computes, and each worker has one core. jax below
# 0.11 still has emitters that compile in half the time; later ones refuse the flag.
_FLAGS = ["--xla_cpu_parallel_codegen_split_count=1"]
if jax.__version_info__ < (0, 11):
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([*_FLAGS, os.environ.get("XLA_FLAGS", "")])

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_num_cpu_devices", 4)

# Floor 0 is imported with its shapes checked. Only its own tests turn the checks on:
# other tests, like users, pay nothing for them.
jaxtyping.install_import_hook(
    [f"memsep_jax.{room}" for room in (*FLOOR_0, "memorization")], "shapes.checked"
)


@pytest.fixture(autouse=True)
def shapes(request):
    """Checks the annotated shapes, unless a test is marked `unchecked`."""
    checked = request.module.__name__.removeprefix("test_") in FLOOR_0
    checked &= not request.node.get_closest_marker("unchecked")
    jaxtyping.config.update("jaxtyping_disable", not checked)
    yield
    jaxtyping.config.update("jaxtyping_disable", True)


@pytest.fixture(scope="session", autouse=True)
def children(tmp_path_factory):
    """Children of tests compile as fast as the tests do, and each program once."""
    from faults import harness  # not above: it imports the package

    base = tmp_path_factory.getbasetemp()
    # The workers of xdist have a directory each, side by side.
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    harness.CACHE = shared / "jax-cache"
    harness.XLA_FLAGS = tuple(_FLAGS)
    harness.OPTIMIZED = False  # the first run of TINY takes 10 s instead of 24
    os.environ["XDG_CACHE_HOME"] = str(shared / "user-cache")  # nobody's own is used


# These import what they need inside, as above: it imports the package.


@pytest.fixture(scope="module")
def compiled_once(children):
    """What a module compiles again and again is compiled once, in this process too."""
    from faults import harness

    with harness.compiled_once():
        yield


def _undrawn():
    """Figures are made but not rendered, which takes the time, where words count."""
    from faults import harness

    with harness.undrawn():
        yield


undrawn = pytest.fixture(_undrawn)
all_undrawn = pytest.fixture(_undrawn, scope="module")  # for a run of many tests


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(params=[64, 32])
def bits(request):
    """Both widths of floats: users run float32."""
    with jax.enable_x64(request.param == 64):
        yield request.param


@pytest.fixture
def real():
    """Normal numbers that float32 represents too: both widths get the same question."""
    rng = np.random.default_rng(7)
    return lambda *shape: np.float64(np.float32(rng.normal(size=shape)))


@pytest.fixture(scope="session")
def off_zero():
    """params -> params moved at random: adaLN-zero hides the heads of a fresh DiT."""

    def move(params):
        leaves, treedef = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.key(1), len(leaves))
        moved = [
            p + 0.2 * jax.random.normal(k, p.shape)
            for p, k in zip(leaves, keys, strict=True)
        ]
        return jax.tree.unflatten(treedef, moved)

    return move
