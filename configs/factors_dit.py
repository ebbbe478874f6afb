"""What makes a transformer copy? Patch, heads, depth, width, process; and a U-Net.

python -m memsep_jax.main --config=configs/factors_dit.py

Beyond the papers: the factors that a DiT has and a U-Net has not, each process with the
law of time and the prediction that its users take, and a U-Net beside a DiT of as many
parameters (35.1 M both), on 2,000 images of CIFAR-10.

Variants: `full` (a GPU), `small` (digits, 2 CPU cores), `smoke`.
"""

from memsep_jax import defaults

PROCESSES = (
    {
        "process.name": "ornstein_uhlenbeck",
        "prediction.name": "noise",
        "times.name": "log_uniform",
        "times.t_min": 1e-5,
        "times.t_max": 8.5,
        "sampler.grid": "log",
        "sampler.t_min": 1e-5,
        "sampler.t_max": 8.5,
    },
    {
        "process.name": "variance_preserving",
        "prediction.name": "vp",
        "times.name": "uniform",
        "times.t_min": 1e-5,
        "times.t_max": 1.0,
        "sampler.t_min": 1e-4,
        "sampler.t_max": 1.0,
    },
    {
        "process.name": "rectified_flow",
        "prediction.name": "velocity",
        "times.name": "uniform",
        "times.t_min": 0.002,
        "times.t_max": 0.99,
        "sampler.t_min": 0.002,
        "sampler.t_max": 0.99,
    },
)
DUPLICATES = tuple(  # as many steps as without
    {
        "data.duplicates": share,
        "data.copies": 4,
        "train.epochs": 4_000 / (1 + 4 * share),
    }
    for share in (0.1, 0.3)
)


def get_config(variant="full"):
    config = defaults.cifar()
    config.experiment = "factors"
    config.data.update(num_examples=2_000, balanced=True)
    config.model.update(depth=13)  # 35.1 M
    config.optimizer.update(warmup=0)
    config.train.update(epochs=4_000.0, warmup_epochs=20.0, ema_decay=0.9995)
    networks = (
        *({"model.patch": patch} for patch in (4, 8)),
        *({"model.num_heads": heads} for heads in (1, 3, 12)),
        *({"model.depth": depth} for depth in (3, 6, 26)),
        *({"model.width": width} for width in (192, 768)),
        {"model.name": "unet", "model.width": 128, "model.depth": 2},
    )
    config.sweep.update(seeds=1, points=({}, *networks, *PROCESSES, *DUPLICATES))
    config.run.snapshots = 0
    return defaults.variant_of(config, variant, small=small, smoke=smoke)


def small(config):
    """Digits and a network of two blocks."""
    config.data.update(name="digits", num_examples=20, balanced=False)
    config.model.update(patch=2, width=64, depth=2, num_heads=2, dtype="float32")
    config.optimizer.lr = 1e-3
    config.train.update(batch_size=20, epochs=5_000.0, ema_decay=0.998)
    networks = (
        {"model.patch": 4},
        {"model.num_heads": 4},
        {"model.depth": 1},
        {"model.width": 32},
    )
    config.sweep.update(seeds=2, points=({}, *networks, *PROCESSES))
    config.sampler.num_samples = 500
    return config


def smoke(config):
    """A process and a patch."""
    defaults.smoke(config)
    config.data.update(name="digits", balanced=False)
    config.model.update(patch=4, num_heads=2)
    config.train.update(epochs=1.0, warmup_epochs=0.5)
    config.sweep.update(seeds=1, points=({}, {"model.patch": 2}, PROCESSES[2]))
    return config
