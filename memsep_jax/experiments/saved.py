"""The config of a run, read back from its config.json: no code of it is imported."""

import json

from memsep_jax import defaults


def get_config(path):
    """The defaults, with the values that a run wrote."""
    config = defaults.train()
    with open(path) as file:
        values = json.load(file)
    if values.get("data", {}).get("classes") is not None:
        values["data"]["classes"] = tuple(values["data"]["classes"])
    config.update(values)
    return config
