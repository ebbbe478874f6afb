"""64 transformers on digits: copies against n and width, 4 seeds each.

python launch/sweep.py run launch/digits_64.py
"""

CONFIG = "configs/digits.py"
FIELDS = {
    "model.depth": 2,
    "train.steps": 3_000,
    "sampler.num_samples": 500,
    "run.images": False,
}


def points():
    yield {
        "data.num_examples": [25, 50, 100, 200],
        "model.width": [16, 32, 64, 128],
        "seeds": 4,
    }
