"""The direction of imports and the owners of packages, read from the source.

What the source must never call is in faults/test_security.py.
"""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "memsep_jax"
ROOMS = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
ALONE = {
    "checks", "keys", "process", "neighbours", "fidelity", "parallel", "checkpoint",
}  # fmt: skip
# What stands alone may import them.
FREE = {"__version__", "memory", "shapes", "checks", "keys"}
FLOORS = [  # a room imports from its own row and those above it here
    {"memory", "shapes", "checks", "keys", "roots"},
    {"process", "neighbours", "fidelity"},
    {"score", "mixture", "streaming"},
    {"empirical", "analytic", "gap", "lipschitz", "sampling"},
    {"memorization"},
    {"models"},
    {"data", "train", "prune", "parallel", "checkpoint"},
    {"sources", "readers"},  # older names of two rooms of data
    {"weights", "features"},
    {"experiments", "defaults"},
    {"commands"},
    {"main"},
]
# Inside experiments, rooms and modules beside them: what each may import of the others.
# record is atomic files, which runtime writes and reporting reads.
BASE = {"config", "record"}
INSIDE: dict[str, set] = {
    "__init__": {"record", "studies", "loaded", "audited"},  # run(config, workdir)
    "config": set(),
    "record": set(),
    "training": BASE,
    "audited": BASE | {"runtime", "reporting", "studies"},
    "loaded": BASE | {"training", "studies", "reporting", "audited"},
    "runtime": BASE,
    "reporting": BASE,
    "studies": BASE | {"training", "runtime", "reporting"},
}
EVERYWHERE = {"jax", "numpy", "chex", *sys.stdlib_module_names}
OWNERS = {  # package: rooms that may import it
    "jaxtyping": {"shapes"},
    "flax.linen": {"models"},
    "flax.struct": {"train"},
    "optax": {"train"},
    "orbax": {"checkpoint"},
    "tensorflow_datasets": {"data"},
    "safetensors": {"weights"},
    "sklearn": {"data", "memorization", "experiments.studies.compare"},
    "scipy": {"memorization", "experiments.studies.results"},
    "PIL": {"data", "experiments"},
    "ml_collections": {"main", "experiments.config", "defaults"},
    "matplotlib": {"experiments.reporting.figures"},
    "jinja2": {"experiments.reporting.report"},
    "absl": {"main", "experiments.config.command"},
    "IPython": {"experiments.runtime.terminal"},
    # Warnings of what is wrong with the data or the disk, and nothing else.
    "absl.logging": {
        "data",
        "checkpoint",
        "fidelity",
        "main",
        "experiments",
    },
    "rich": {"main", "experiments"},
    "tensorboardX": {"experiments"},
    "wandb": {"experiments"},
}
LAZY = {
    "scipy",
    "tensorflow_datasets",
    "sklearn",
    "jinja2",
    "matplotlib",
    "tensorboardX",
    "wandb",
}
GONE = ("jax._src", "jax.experimental", "flax.training", "flax.jax_utils", "clu")


def imports(tree):
    """(full name, line, inside a function) of everything that is imported."""
    inner = {
        node
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.Lambda))
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            yield name, node.lineno, node in inner


def within(name, package):
    return name == package or name.startswith(f"{package}.")


def floor(room):
    (found,) = [i for i, rooms in enumerate(FLOORS) if room.split(".")[0] in rooms]
    return found


def wing(name):
    """The room inside experiments that a module's full name stands for."""
    return (name.split(".") + ["", ""])[2]


def violations(room, tree):
    top = room.split(".")[0]
    for name, line, inside in imports(tree):
        package = name.split(".")[0]
        where = f"{room}:{line} imports {name}"
        if within(name, "memsep_jax"):
            other = (name.split(".") + [""])[1]
            if top == "__init__" or other in FREE:
                continue
            if floor(other) > floor(room) or (top in ALONE and other != top):
                yield f"{where}: upward"
            if top == other == "experiments":
                mine, its = wing(f"memsep_jax.{room}"), wing(name)
                if its in INSIDE and its != mine and its not in INSIDE[mine]:
                    yield f"{where}: not from here"
            continue
        if any(within(name, gone) for gone in GONE):
            yield f"{where}: not here"
        if package in EVERYWHERE:
            continue
        owners = set().union(*(OWNERS[p] for p in OWNERS if within(name, p)))
        if not any(within(room, owner) for owner in owners):
            yield f"{where}: owned by {sorted(owners) or 'nobody'}"
        if package in LAZY and (top == "data" or package == "scipy") and not inside:
            yield f"{where}: inside the function that needs it"


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_down_and_packages_have_owners(room):
    found = list(violations(room, ast.parse(ROOMS[room].read_text())))
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "room, source, count",
    [
        ("process", "from memsep_jax import score", 1),
        ("score", "from memsep_jax.process import Process", 0),
        ("score", "from memsep_jax import empirical, models", 2),
        ("train", "def f():\n  from memsep_jax.experiments import record", 1),
        ("neighbours", "from memsep_jax.score import ScoreFn", 1),
        ("gap", "import optax\nimport flax.linen as nn\nfrom jax._src import x", 3),
        ("models.dit", "import flax.linen as nn\nfrom flax import struct", 1),
        ("data", "from sklearn.datasets import load_digits", 1),
        ("data", "def f():\n  from sklearn.datasets import load_digits", 0),
        ("checkpoint", "from absl import logging\nfrom absl import flags", 1),
        ("experiments.reporting.figures", "import matplotlib.pyplot as plt", 0),
        (
            "experiments.studies.training_run",
            "import matplotlib.pyplot as plt\nimport torch",
            2,
        ),
        (
            "experiments.runtime.points",
            "from memsep_jax.experiments.reporting import report\n"
            "from memsep_jax.experiments import studies, training, record",
            3,
        ),
        ("experiments.config.grid", "from memsep_jax.experiments import runtime", 1),
    ],
)
def test_the_rule_itself_sees_what_it_must(room, source, count):
    assert len(list(violations(room, ast.parse(source)))) == count


MATHEMATICS = sorted(
    {room for room in ROOMS if room.split(".")[0] in set().union(*FLOORS[1:5])}
    - {"memorization.__init__"}
)


@pytest.mark.parametrize("room", MATHEMATICS)
def test_every_public_function_of_floor_0_is_in_its_tests(room):
    """By its name in the tests of its room: a new function needs a test of its own."""
    tests = Path(__file__).parent / f"test_{room.split('.')[-1]}.py"
    used = {
        getattr(node, "attr", getattr(node, "value", None))  # by a table's name, too
        for path in (tests, tests.with_name("oracles.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        or (isinstance(node, ast.Constant) and isinstance(node.value, str))
    }
    public = {
        node.name
        for node in ast.parse(ROOMS[room].read_text()).body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    }
    assert not public - used
