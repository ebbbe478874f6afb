"""Does a diffusion model copy your own images? From a folder, or a zip of one.

python -m memsep_jax.main --config=configs/folder.py --config.data.path=IMAGES

Images of any format and size are cut to their central square and resized to 64 pixels
a side; --config.data.resolution takes any multiple of 4, such as 28 or 32. A part of
them is held out. --config.data.labels=true trains with the names of the subfolders as
labels, and --config.data.stream=True leaves the prepared images on disk, for sets that
are larger than memory. Then --config=configs/audit.py compares what the run drew with
other images.

`small`, an MLP, copies 16 photographs of 32 pixels in 52 seconds on 2 CPU cores: of 300
images of CIFAR-10, saved as PNG, it drew 16, and 99.0 % [97.7, 99.6] of its 500 samples
are copies of them; null level 0.0 % [0.0, 7.1].
Variants: `full` (DiT-S/4, for a GPU; not run yet), `small`, `smoke` (digits).
"""

from memsep_jax import defaults

OWN = {"name": "folder", "path": "images", "crop": "center"}


def get_config(variant="full"):
    config = defaults.cifar()
    config.data.update(OWN, num_examples=None, resolution=64)
    config.model.patch = 4  # 256 of them at 64 pixels
    return defaults.variant_of(config, variant, small=small, smoke=smoke)


def small(config):
    """16 images, and an MLP that predicts them, at noise levels where they differ."""
    # An MLP passes no full-rank noise through 256 units, so it cannot predict noise,
    # and the last times are not small: the sample is its last prediction.
    chosen = defaults.copying()
    chosen.data.update(OWN, num_examples=16, resolution=32)
    defaults.switch(
        chosen, process="ornstein_uhlenbeck", times="log_uniform", prediction="denoiser"
    )
    chosen.times.update(t_min=0.05, t_max=8.0)
    chosen.train.update(steps=2_000)
    chosen.sampler.update(grid="log", t_min=0.05, t_max=8.0, steps=20, num_samples=500)
    return chosen


def smoke(config):
    """Tiny, and on the embedded digits: no folder."""
    defaults.smoke(config)
    defaults.switch(config, data="digits")
    config.data.resolution = None
    config.model.update(num_heads=2, dtype="float32")
    return config
