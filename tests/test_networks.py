"""A network of a sweep is trained once, and measured by all of its weights."""

import numpy as np

from memsep_jax import defaults
from memsep_jax.experiments.runtime import record
from memsep_jax.experiments.runtime.session import Session
from memsep_jax.experiments.studies import networks


def config(**changes):
    config = defaults.smoke(defaults.copying())
    config.update_from_flattened_dict(changes)
    return config


def test_a_network_is_trained_once_for_the_ratio_of_all_snapshots(tmp_path):
    one = config()
    with Session(tmp_path, one) as session:
        session.begin("of these data")
        first = networks.measured(one, session)
        path = tmp_path / "models" / networks.name(one) / "metrics.jsonl"
        rows = record.read_metrics(path)
        looked = [row["step"] for row in rows if "raw_ratio" in row]
        assert looked == [2, 4]
        assert first["steps"] == 4 and first["ratio"] == first["ema"]
        assert first["highest"] >= max(first["raw"], first["ema"])
        # What is kept is read: a ratio that only the file can know.
        text = path.read_text().replace('"raw_ratio": ', '"raw_ratio": 7')
        path.write_text(text)
        again = networks.measured(config(**{"sampler.weights": "raw"}), session)
    assert again["highest"] > 1 and again["ratio"] == again["raw"] == first["raw"]
    assert len(list((tmp_path / "models").iterdir())) == 1
    np.testing.assert_array_equal(again["parameters"], first["parameters"])


def test_a_name_is_of_what_training_depends_on_and_of_nothing_else():
    names = {
        networks.name(config(**changes))
        for changes in (
            {},
            {"seed": 1},
            {"data.num_examples": 8},
            {"optimizer.lr": 0.5},
            {"train.steps": 2},
        )
    }
    assert len(names) == 5
    for changes in ({"sampler.steps": 9}, {"emm.eps": 0.2}, {"run.chunk": 4}):
        assert networks.name(config(**changes)) == networks.name(config())
