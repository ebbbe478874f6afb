"""A diffusion transformer copies real digits: the main job.

python -m memsep_jax.main --config=configs/digits.py

2.3 minutes on 2 CPU cores. 98.9 % [98.0, 99.4] of 1,000 samples are copies of the 50
digits, null level 0.0 % [0.0, 1.3]; with --config.data.num_examples=1400, 2.6 minutes,
0.0 % [0.0, 0.4]. Variants: `full`, `smoke`.
"""

from memsep_jax import defaults


def get_config(variant="full"):
    config = defaults.train()
    config.data.update(name="digits", num_examples=50)
    config.model.update(name="dit", patch=4, width=128, depth=4, num_heads=4)
    config.optimizer.update(lr=1e-3, clip=1.0, schedule="cosine", warmup=200)
    config.train.update(steps=8_000, batch_size=64, ema_decay=0.998)
    return defaults.variant_of(config, variant)
