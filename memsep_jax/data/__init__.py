"""A data set is an array: read a source, choose a subset, label it, draw batches."""

# ruff: noqa: F401 - names for a prompt and for other rooms
from memsep_jax.data import archives, arrays, readers, sources
from memsep_jax.data.arrays import (
    BLOCK,
    DataError,
    Rows,
    Source,
    check_source,
    digests,
    fingerprint,
    from_uint8,
    like,
    listed,
    to_uint8,
)
from memsep_jax.data.batches import (
    AHEAD,
    Dataset,
    augment,
    draw,
    indices,
    order,
    stream,
)
from memsep_jax.data.readers import Preparation, check_preparation
from memsep_jax.data.sources import MAX_HELD_OUT, SOURCES, second, source
from memsep_jax.data.subsets import (
    CHOICE,
    HELD_OUT_SHARE,
    LABELS,
    Splits,
    deduplicate,
    load,
    random_labels,
    read,
    select,
    splits,
)
