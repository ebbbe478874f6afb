"""When do samples of digits become good, and when do they become copies?

python -m memsep_jax.main --config=configs/onset_digits.py:small

Snapshots on a log grid of steps, raw and EMA weights: tau_gen, at which the Frechet
distance has come down almost to its best, and tau_mem, at which a tenth of the samples
are copies, against n with the fitted powers (Bonnaire 2025, arXiv 2505.17638: tau_gen
does not depend on n, tau_mem grows like n). Between them lie earlier signs: samples
nearer to their own training set than to that of a twin, members told by their loss, the
least held-out loss, and where `train.stop_gap=0.1` would have stopped. Twins are pairs
of networks on disjoint sets, so n goes to 700.

`small`, 35 minutes on 2 cores beside a test suite: samples of the raw weights lean
towards their own training set from step 31, 37 and 52 on (n = 20, 40, 80), the held-out
loss is least at 169, 211 and 211, and copies begin at 474, 884 and 1,700.

Variants: `full` (5 seeds, 6 sizes), `small` (3 seeds, 3 sizes: minutes on 2 CPU cores),
`smoke`.
"""

from memsep_jax import defaults


def get_config(variant="full"):
    config = defaults.digits()
    config.experiment = "onset"
    defaults.switch(config, model="mlp")
    config.model.update(width=512, depth=3)
    # A constant rate: a schedule would be a clock of its own.
    config.optimizer.update(schedule="constant")
    config.train.update(steps=60_000, ema_decay=0.995)
    config.sweep.update(seeds=5, num_examples=(25, 50, 100, 200, 400, 700))
    config.run.update(snapshots=20, save_every=5_000, evaluate_every=100_000)
    return defaults.variant_of(config, variant, small=small, smoke=smoke)


def small(config):
    """Fewer seeds and sizes, a narrower network."""
    config.model.width = 256
    config.train.steps = 6_000
    config.sampler.num_samples = 500
    config.sweep.update(seeds=3, num_examples=(20, 40, 80))
    config.run.snapshots = 14
    return config


def smoke(config):
    """One pair of twins, two snapshots."""
    defaults.smoke(config)
    config.sweep.update(seeds=1, num_examples=(16,))
    return config
