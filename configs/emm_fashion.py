"""How many clothes do a U-Net and a transformer of its size memorize, at three sides?

python -m memsep_jax.main --config=configs/emm_fashion.py:small

EMM (Gu 2023, section 2) of a narrow DDPM++ and of a DiT with as many parameters, each
the same network at every resolution: the attention of one and the patches of the other
move with the side. Seven pixels a side cannot be halved, so the U-Net has eight. The
images are found as in configs/fashion.py.

Variants: `full` (35 million parameters, for a GPU; not run yet), `small` (180,000
parameters, 3 seeds: 2 CPU cores, not run yet either), `smoke` (digits).
"""

from memsep_jax import defaults


def unets(*sides):
    return tuple(
        {"data.resolution": side, "model.attention": (side // 2,)} for side in sides
    )


def transformers(*sides, **sizes):
    """49 patches at every side."""
    sizes = {f"model.{name}": value for name, value in sizes.items()}
    return tuple(
        {
            "model.name": "dit",
            "data.resolution": side,
            "model.patch": side // 7,
            **sizes,
        }
        for side in sides
    )


def get_config(variant="full"):
    config = defaults.unet_of_clothes()
    config.experiment = "emm"
    config.train.plateau = 4
    config.emm.update(low=1_000, high=8_000, tolerance=0.15, budget=6)
    dits = transformers(28, 14, 7, width=384, depth=13, num_heads=6)
    config.sweep.update(seeds=1, points=unets(28, 14, 8) + dits)
    return defaults.variant_of(config, variant, small=small, smoke=smoke)


def small(config):
    """Narrow networks, tens of images."""
    defaults.small_unet_of_clothes(config)
    config.train.plateau = None
    config.emm.update(low=10, high=40, tolerance=0.3, budget=4)
    dits = transformers(28, 14, 7, width=64, depth=2, num_heads=4)
    config.sweep.points = unets(28, 14, 8) + dits
    return config


def smoke(config):
    """A few steps of a tiny network of one resolution."""
    defaults.smoke_unet(config)
    config.model.update(multipliers=(1,), attention=(8,))
    config.sweep.points = ({"model.attention": (8,)},)
    config.emm.budget = 2
    return config
