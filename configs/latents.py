"""DiT-XL/2 on what an autoencoder made of images: 32 x 32 x 4 for those of 256 pixels.

python -m memsep_jax.main --config=configs/latents.py --config.data.path=latents.npz

The .npz has the latents as train_images, float32 [n, h, w, c], and held-out ones as
test_images, written by np.savez; it stays on disk, and so may be larger than memory.
Scale them to a spread of 1, or give prediction.sigma_data. Samples are latents too:
decode samples.npz with your autoencoder.

For several GPUs: the state is split over them (run.shard); not run yet. Variants:
`full`, `smoke`.
"""

from memsep_jax import defaults


def get_config(variant="full"):
    config = defaults.cifar()
    config.data.update(name="latents", path="latents.npz", num_examples=None)
    config.data.stream = True
    config.prediction.sigma_data = 1.0
    config.model.update(width=1_152, depth=28, num_heads=16)
    config.optimizer.lr = 1e-4
    config.train.update(steps=400_000, batch_size=256)
    config.run.shard = True
    return defaults.variant_of(config, variant, smoke=smoke)


def smoke(config):
    """Tiny, and on the embedded digits: no file."""
    defaults.smoke(config)
    defaults.switch(config, data="digits")
    config.model.update(num_heads=2, dtype="float32")
    return config
