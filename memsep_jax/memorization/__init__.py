"""How much of a set of samples is copied from the training data.

A sample is memorized when its nearest training point is closer than a third of the
distance to the second nearest *distinct* one. The rate of held-out points is the null
level: what honest samples would score.

`membership` asks of a score, rather than of samples, which points it was fitted to, and
`detectors` which samples are copies, without the training set.

Every metric states the least input that it takes, and its value for odd input.
"""

from memsep_jax.memorization import detectors, membership
from memsep_jax.memorization.copying import (
    CEILING,
    FLOOR,
    NEARER,
    PAIRS,
    Copying,
    FeatureLikelihood,
    Mirrored,
    Tiled,
    authentic,
    calibrated_l2,
    copying_test,
    feature_likelihood,
    nearest_tiled,
    tiled_l2,
    with_flips,
)
from memsep_jax.memorization.effective import (
    ROUNDING,
    decreasing,
    effective_interval,
    effective_memorization,
    next_size,
    plateaued,
)
from memsep_jax.memorization.emission import (
    Correlation,
    Emission,
    Traits,
    emitted,
    rank_correlation,
    rarefaction,
    traits,
    which,
)
from memsep_jax.memorization.ratio import (
    BEGUN,
    RATIO,
    Ratio,
    by_chance,
    copied,
    excess,
    memorized,
    nearest_two,
    quotient,
    ratio,
    ratio_of,
    wilson,
)
from memsep_jax.memorization.reproducibility import (
    Reproducibility,
    cosine,
    reproducibility,
)
