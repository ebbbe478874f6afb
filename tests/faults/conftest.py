"""What these tests compile again and again is compiled once, in this process too."""

import jax
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from faults import harness


@pytest.fixture(scope="module", autouse=True)
def compiled_once(children):
    options = {
        "jax_compilation_cache_dir": str(harness.CACHE / "here"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    reset_cache()  # jax looks at these options at the first compilation only
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    reset_cache()
