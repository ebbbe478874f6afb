"""The names of `data.readers` and `data.arrays`, for scripts that look here."""

from memsep_jax.data.arrays import *  # noqa: F403
from memsep_jax.data.readers import *  # noqa: F403
