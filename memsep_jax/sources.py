"""The names of `data.sources` and `data.archives`, for scripts that look here."""

from memsep_jax.data.archives import *  # noqa: F403
from memsep_jax.data.sources import *  # noqa: F403
