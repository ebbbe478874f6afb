"""The direction of imports and the owners of packages, read from the source."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "memsep_jax"
ROOMS = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
ALONE = {"process", "neighbours", "fidelity", "parallel", "checkpoint"}
FLOORS = [  # a room imports from its own row and those above it here
    {"process", "neighbours", "fidelity"},
    {"score", "mixture", "memorization"},
    {"empirical", "gap", "lipschitz", "sampling"},
    {"models"},
    {"readers"},
    {"data", "sources", "train", "prune", "parallel", "checkpoint"},
    {"weights", "features"},
    {"experiments", "defaults"},
    {"main"},
]
EVERYWHERE = {"jax", "numpy", "chex", *sys.stdlib_module_names}
OWNERS = {  # package: rooms that may import it
    "flax.linen": {"models"},
    "flax.struct": {"train"},
    "optax": {"train"},
    "orbax": {"checkpoint"},
    "tensorflow_datasets": {"data", "sources"},
    "safetensors": {"weights"},
    "sklearn": {"data", "sources", "experiments.studies.compare"},
    "scipy": {"experiments.studies.results"},
    "PIL": {"data", "readers", "sources", "experiments"},
    "ml_collections": {"main", "experiments.config", "defaults"},
    "matplotlib": {"experiments.reporting.figures"},
    "jinja2": {"experiments.reporting.report"},
    "absl": {"main", "experiments.config.command"},
    # Warnings of what is wrong with the data or the disk, and nothing else.
    "absl.logging": {
        "data",
        "sources",
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


def violations(room, tree):
    top = room.split(".")[0]
    for name, line, inside in imports(tree):
        package = name.split(".")[0]
        where = f"{room}:{line} imports {name}"
        if within(name, "memsep_jax"):
            other = (name.split(".") + [""])[1]
            if top == "__init__" or other == "__version__":
                continue
            if floor(other) > floor(room) or (top in ALONE and other != top):
                yield f"{where}: upward"
            continue
        if any(within(name, gone) for gone in GONE):
            yield f"{where}: not here"
        if package in EVERYWHERE:
            continue
        owners = set().union(*(OWNERS[p] for p in OWNERS if within(name, p)))
        if not any(within(room, owner) for owner in owners):
            yield f"{where}: owned by {sorted(owners) or 'nobody'}"
        if package in LAZY and top in ("data", "sources") and not inside:
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
            "experiments.studies.train",
            "import matplotlib.pyplot as plt\nimport torch",
            2,
        ),
    ],
)
def test_the_rule_itself_sees_what_it_must(room, source, count):
    assert len(list(violations(room, ast.parse(source)))) == count


# What a data file or a config must never be able to do.


def dangers(tree):
    """Lines that unpickle, evaluate, unpack anywhere, or hand text to a shell."""
    modules = {
        "pickle",
        "cPickle",
        "cloudpickle",
        "dill",
        "joblib",
        "marshal",
        "shelve",
    }
    calls = {"eval", "exec", "compile", "__import__"}
    attributes = {
        "extractall",
        "os.system",
        "os.popen",
        "yaml.load",
        "yaml.unsafe_load",
    }
    for name, line, _ in imports(tree):
        if name.split(".")[0] in modules:
            yield line, name
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in calls or called in attributes or called.endswith(".extractall"):
            yield node.lineno, called
        for keyword in node.keywords:
            if keyword.arg in ("allow_pickle", "shell"):
                value = keyword.value
                if not (isinstance(value, ast.Constant) and value.value is False):
                    yield node.lineno, f"{keyword.arg}={ast.unparse(value)}"


@pytest.mark.parametrize("room", ROOMS)
def test_nothing_read_can_run(room):
    assert not list(dangers(ast.parse(ROOMS[room].read_text())))


@pytest.mark.parametrize(
    "source, count",
    [
        ("import pickle", 1),
        ("from joblib import load", 1),
        ("np.load(f, allow_pickle=True)", 1),
        ("np.load(f, allow_pickle=False)", 0),
        ("np.load(f, allow_pickle=flag)", 1),
        ("tarfile.open(f).extractall(d)", 1),
        ("eval(text); exec(text)", 2),
        ("os.system(text); yaml.load(text)", 2),
        ("subprocess.run(text, shell=True)", 1),
        ("re.compile(text); jax.eval_shape(f); lowered.compile()", 0),
    ],
)
def test_the_search_itself_sees_what_it_must(source, count):
    assert len(list(dangers(ast.parse(source)))) == count


def test_np_load_always_says_that_it_reads_no_pickles():
    """False is the default today; saying so survives any default."""
    for room, path in ROOMS.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "np.load":
                said = {keyword.arg for keyword in node.keywords}
                assert "allow_pickle" in said, f"{room}:{node.lineno}"
