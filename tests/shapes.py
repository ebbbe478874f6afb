"""The check behind the annotated shapes of floor 0."""

import beartype

FLOOR_0 = (
    "process",
    "mixture",
    "empirical",
    "analytic",
    "score",
    "gap",
    "lipschitz",
    "sampling",
    "neighbours",
    "fidelity",
    "ratio",
    "copying",
    "emission",
    "effective",
    "membership",
    "detectors",
    "reproducibility",
)

# An int may stand for a float, as everywhere in Python.
checked = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
