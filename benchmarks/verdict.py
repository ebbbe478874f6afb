"""The verdict on images of known kinds: fresh, distorted, and garbage.

python benchmarks/verdict.py cifar10.npz

The .npz has train_images and test_images, uint8 [n, h, w, c]. The last 1,000 training
images are the fresh ones, the others are the training set, and the test images are held
out. Prints a markdown table with one row per kind.
"""

import io
import sys

import numpy as np
from PIL import Image, ImageFilter

from memsep_jax import features, memorization, neighbours
from memsep_jax.experiments.reporting import verdict
from memsep_jax.experiments.studies import compare

FRESH = 1_000


def main(path):
    """Prints the table."""
    with np.load(path, allow_pickle=False) as arrays:
        train, held_out = arrays["train_images"], arrays["test_images"]
    train, fresh = train[:-FRESH], train[-FRESH:]
    search = neighbours.searcher(train)
    null = search(held_out)
    space = features.random_conv(train.shape[1:])
    known: dict = {}  # features of training and held-out images: looked at once
    print("| samples | d1, median | beyond 99 % | FD, pixels | FD, random_conv | |")
    print("|---|---|---|---|---|---|")
    for name, samples in kinds(fresh, train).items():
        near = search(samples)
        found = memorization.ratio_of(near, null, 0)
        some = compare.equal(compare.Sets(samples, train, held_out), 0)

        def see(which, x):
            if which == "samples":
                return space.apply(x)
            if which not in known:
                known[which] = space.apply(x)
            return known[which]

        metrics = {
            "memorization": {
                "ratio": found.value,
                "interval": found.interval,
                "samples": len(samples),
                "null": found.null,
                "null_interval": found.null_interval,
                "held_out": len(held_out),
                "exact_copies": 0,
                **compare.distances(near, null),
            },
            "data": {"shape": train.shape[1:]},
            "frechet": [
                compare.law(some, "FD (pixels)"),
                compare.law(some, space.title, see),
            ],
        }
        said, distances = verdict.verdict(metrics), metrics["memorization"]
        beyond = verdict.percent(distances["far"]["ratio"])
        cells = [name, f"{distances['median_d1']:.3g}", beyond]
        cells += [
            f"{law['excess']:.2f} (>= {law['interval'][0]:.2f})"
            for law in metrics["frechet"]
        ]
        print("|", " | ".join([*cells, said["name"]]), "|", flush=True)


def kinds(fresh, train):
    """{name: uint8 images [m, h, w, c]}."""
    rng = np.random.default_rng(0)
    n, h, w, c = fresh.shape
    few = rng.integers(0, 2, fresh.shape, np.uint8)  # so that all are different

    def noisy(std):
        return np.clip(fresh + rng.normal(0, std, fresh.shape), 0, 255).astype(np.uint8)

    def blocks(side, of):
        coarse = of.reshape(n, h // side, side, w // side, side, c).mean((2, 4))
        return np.round(coarse).astype(np.uint8).repeat(side, 1).repeat(side, 2)

    noise = rng.integers(0, 256, fresh.shape, np.uint8)
    uniform = rng.integers(0, 256, (n, h // 4, w // 4, c), np.uint8)
    mean = train.mean(axis=0).astype(np.uint8)
    return {
        "fresh images": fresh,
        "JPEG 5": np.stack([jpeg(x, 5) for x in fresh]),
        "blurred, 2": np.stack([blurred(x, 2) for x in fresh]),
        "blurred, 4": np.stack([blurred(x, 4) for x in fresh]),
        "with noise, 40": noisy(40),
        "upside down": fresh[:, ::-1],
        "means of 8 x 8": blocks(8, fresh),
        "100 images, often": fresh[np.arange(n) % 100],
        "half of them noise": np.concatenate([fresh[: n // 2], noise[n // 2 :]]),
        "noise": noise,
        "random blocks": uniform.repeat(4, 1).repeat(4, 2),
        "the mean image": mean // 2 * 2 + few,
        "black": few,
        "grey of one level": np.broadcast_to(noise[:, :1, :1, :1], fresh.shape).copy(),
    }


def jpeg(x, quality):
    """An image after JPEG compression."""
    file = io.BytesIO()
    Image.fromarray(x).save(file, "jpeg", quality=quality)
    return np.asarray(Image.open(file))


def blurred(x, radius):
    """Images blurred by a Gaussian of this width in pixels."""
    return np.asarray(Image.fromarray(x).filter(ImageFilter.GaussianBlur(radius)))


if __name__ == "__main__":
    main(sys.argv[1])
