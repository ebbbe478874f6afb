"""Every field is declared once, and all that is known of fields agrees with it."""

import inspect
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memsep_jax import data, defaults
from memsep_jax.experiments.config import build, fields, page, schema

ROOT = Path(__file__).parent.parent
# (schema, "group.field", the field)
EVERY = [
    (known, name, field)
    for known in (schema.TRAIN, schema.AUDIT)
    for name, field, _ in schema.leaves(known)
]
# Names are looked up in their tables, and refused there.
RULED = [one for one in EVERY if one[2].rule and not one[2].rule.accepts(object())]
INTEGERS, NUMBERS = st.integers(-(2**40), 2**40), st.floats(allow_nan=False)
VALUES = {
    int: INTEGERS,
    float: NUMBERS | st.integers(-3, 3),
    str: st.text(min_size=1, max_size=5),
    tuple: st.lists(INTEGERS | NUMBERS, min_size=1, max_size=3).map(tuple),
}


def test_the_page_of_fields_is_the_one_that_the_schema_makes():
    """Make it again: python -m memsep_jax.experiments.config.page > docs/configs.md."""
    assert (ROOT / "docs/configs.md").read_text() == page.page(ROOT / "configs")


@pytest.mark.parametrize(
    "make, known", [(defaults.train, schema.TRAIN), (defaults.audit, schema.AUDIT)]
)
def test_a_config_holds_every_field_with_its_type_and_default(make, known):
    config = make()
    values = dict(schema.values(config))
    for name, field, _ in schema.leaves(known):
        assert values.pop(name) == field.default
        group, _, last = name.rpartition(".")
        assert (config[group] if group else config).get_type(last) is field.kind
    assert not values
    assert schema.wrong_kinds(config) == schema.broken_rules(config) == []


def test_a_field_has_a_line_of_help_and_accepts_its_default():
    for _, name, field in EVERY:
        assert field.help[-1] == "." and "\n" not in field.help, name
        assert field.is_kind(field.default), name
        if field.rule and field.default is not None:
            assert field.rule.accepts(field.default), name


# The first draw imports the tables, jax among them.
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_a_value_that_breaks_a_rule_is_named_with_the_rule(draws):
    known, name, field = draws.draw(st.sampled_from(RULED))
    wrong = VALUES[field.kind].filter(lambda value: not field.rule.accepts(value))
    value = draws.draw(wrong)
    config = schema.defaults(known)
    group, _, last = name.rpartition(".")
    (config[group] if group else config)[last] = value
    (line,) = schema.broken_rules(config)
    assert line in (
        f"{name}={config[group][last] if group else value} must be {field.rule.text()}",
        f"{name}={value} must be a finite number",
    )


def test_a_value_of_another_type_is_named_with_its_type():
    config = defaults.train()
    with config.ignore_type():
        config.train.steps, config.train.flip, config.data.seed = "a", "b", None
    assert set(schema.wrong_kinds(config)) == {
        "train.steps='a' must be an integer",
        "train.flip='b' must be True or False",
        "data.seed=None must be an integer",
    }


TABLES = {
    "data": "memsep_jax.sources:SOURCES",
    "process": "memsep_jax.process:PROCESSES",
    "times": "memsep_jax.process:TIMES",
    "prune_times": "memsep_jax.process:TIMES",
    "prediction": "memsep_jax.score:PREDICTIONS",
    "model": "memsep_jax.models:MODELS",
    "optimizer": "memsep_jax.train:OPTIMIZERS",
}


@pytest.mark.parametrize("group", TABLES)
def test_the_names_that_take_a_field_are_those_whose_signature_has_it(group):
    everywhere = {"name", "clock"}
    if group == "data":
        everywhere |= set(inspect.signature(data.select).parameters)
    for name, constructor in fields.read_table(TABLES[group]).items():
        taken = set(inspect.signature(constructor).parameters)
        for field in schema.group_fields(group).keys() - everywhere:
            assert schema.takes(group, field, name) == (field in taken), (name, field)


@pytest.mark.parametrize(
    "name, role",
    [
        ("seed", fields.RESULT),
        ("train.steps", fields.GROWS),
        ("train.batch_size", fields.TRAINING),
        ("model.of_a_users_own", fields.TRAINING),
        ("sampler.steps", fields.AFTER),
        ("sweep.seeds", fields.POINTS),
        ("run.chunk", fields.RUN),
        ("run.of_an_older_release", fields.RUN),
        ("features.name", fields.RESULT),
        ("train_as.crop", fields.RESULT),
    ],
)
def test_a_role_says_what_a_change_means(name, role):
    assert schema.role(name) == role and role in fields.ROLES


def test_a_value_that_nothing_reads_makes_no_other_config():
    known = build.to_json(defaults.smoke(defaults.digits()))
    known["model"]["name"] = "mlp"
    other = {**known, "model": known["model"] | {"patch": 2, "num_heads": None}}
    assert known != other and schema.settled(known) == schema.settled(other)
    other["model"]["width"] = 17
    assert schema.settled(known) != schema.settled(other)


def test_an_older_config_json_with_values_left_over_is_read():
    known = build.to_json(defaults.smoke(defaults.digits()))
    known["model"] |= {"name": "mlp", "patch": 4}
    known["data"]["classes"], known["sweep"]["d"] = [0, 1], [4]
    config = defaults.restored(known)
    assert build.to_json(config) == known
    assert config.data.classes == (0, 1) and config.sweep.d == (4,)
    assert build.build(config).model.width == 16
