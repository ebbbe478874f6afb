"""What is read can never run, and what is written tells no secret.

The first half reads the source: a rule is a search of a syntax tree, shown to find what
it must before it is believed. The second half looks at what a process leaves behind.
"""

import ast
import builtins
import contextlib
import functools
import os
import re
import runpy
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from test_report import ALWAYS, Page, drawn, finished
from test_report import read as read_page

from faults import harness
from faults.test_config import Payload
from memsep_jax import checkpoint, experiments
from memsep_jax.data import archives, sources
from memsep_jax.experiments import record
from memsep_jax.experiments.config import build, command
from memsep_jax.experiments.reporting import figures, report

PACKAGE = sorted((harness.ROOT / "memsep_jax").rglob("*.py"))
CONFIGS = sorted((harness.ROOT / "configs").glob("*.py"))
TOOLS = sorted((harness.ROOT / "tools").glob("*.py"))
LAUNCH = sorted(
    p for p in (harness.ROOT / "launch").iterdir() if p.suffix in (".sh", ".sbatch")
)
TEMPLATES = sorted((harness.ROOT / "memsep_jax").rglob("*.html"))


# Names as they are after all aliases: `from os import system as s` is os.system.


@functools.cache
def tree_of(path):
    return ast.parse(path.read_text())


@functools.cache
def names(tree):
    """[(node, full name)] of all that is imported or looked up."""
    return list(_names(tree))


def _names(tree):
    known = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.split(".")[0]
                known[alias.asname or first] = alias.name if alias.asname else first
                yield node, alias.name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                known[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield node, f"{node.module}.{alias.name}"
    inner = {id(node.value) for node in ast.walk(tree) if hasattr(node, "attr")}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Name, ast.Attribute)) and id(node) not in inner:
            yield node, _full(node, known)


def _full(node, known):
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    first = "?"  # of a variable, or any value, only the attributes are known
    if isinstance(node, ast.Name):
        own = f"builtins.{node.id}" if hasattr(builtins, node.id) else "?"
        first = known.get(node.id, own)
    return ".".join([first, *reversed(parts)])


def called(tree):
    """(node, full name) of all calls."""
    known = {id(node): name for node, name in names(tree)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield node, known.get(id(node.func), "?")


def constant(node, *values):
    return isinstance(node, ast.Constant) and node.value in values


def argument(call, name):
    """The keyword argument of a call, or None."""
    return next((k.value for k in call.keywords if k.arg == name), None)


# Searches: tree -> nodes that break a rule.


def never(*forbidden):
    """None of these modules, their members, or (after a dot) attributes."""

    def search(tree):
        for node, name in names(tree):
            for bad in forbidden:
                if bad.startswith("."):
                    found = isinstance(node, ast.Attribute) and name.endswith(bad)
                else:
                    found = name == bad or name.startswith(f"{bad}.")
                if found:
                    yield node

    return search


def pickled_arrays(tree):
    for node, name in called(tree):
        said = argument(node, "allow_pickle")
        reads = re.fullmatch(r"numpy\.(load|lib\.format\.(read|write)_array)", name)
        if (said is not None or reads) and not constant(said, False):
            yield node
    yield from never("numpy.memmap", "numpy.fromregex", "numpy.lib.npyio")(tree)


def shells(tree):
    yield from never("os.system", "os.popen", "pty", "subprocess")(tree)
    for node, name in names(tree):
        if re.fullmatch(r"os\.(exec|spawn|posix_spawn)\w*", name):
            yield node
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            said = argument(node, "shell")
            if said is not None and not constant(said, False):
                yield node


def network(tree):
    modules = (
        "urllib", "urllib3", "requests", "http", "httpx", "aiohttp", "ftplib", "wget",
        "smtplib", "xmlrpc", "ssl", "gdown", "huggingface_hub", "webbrowser", "boto3",
        "fsspec", "gcsfs", "torch.hub", "sklearn.datasets.fetch_openml",
    )  # fmt: skip
    yield from never(*modules)(tree)
    for node, name in names(tree):
        # The name of a machine, of all that sockets are for.
        if name.split(".")[0] == "socket" and name not in ("socket", GETHOSTNAME):
            yield node
        if name.endswith((".download", ".download_and_extract", ".urlopen")) or (
            name.endswith(".download_and_prepare")
        ):
            yield node


GETHOSTNAME = "socket.gethostname"


def by_name(tree):
    """What a text may choose: modules, and attributes that are no constants."""
    looked_up = (
        "builtins.__import__", "builtins.globals", "builtins.locals", "builtins.vars",
        "runpy", "pkgutil", "pydoc", "operator.attrgetter", "operator.methodcaller",
    )  # fmt: skip
    yield from never(*looked_up)(tree)
    for node, name in names(tree):
        if name.startswith("importlib") and not name.startswith("importlib.metadata"):
            yield node
    for node, name in called(tree):
        looks = re.fullmatch(r"builtins\.(get|set|del|has)attr", name)
        if looks and not isinstance(node.args[1], ast.Constant):
            yield node


VARIABLES = ("TFDS_DATA_DIR", "WANDB_MODE", "XDG_CACHE_HOME", "XLA_FLAGS")


def environment(tree):
    """Variables, but for those that may be read, one by one."""
    allowed = {
        id(node.func)
        for node, name in called(tree)
        if name == "os.environ.get" and constant(node.args[0], *VARIABLES)
    }
    for node in never("os.environ", "os.getenv", "os.environb", "os.putenv")(tree):
        if id(node) not in allowed:
            yield node


def permissions(tree):
    attributes = (".chmod", ".lchmod", ".chown", ".umask", ".fchmod")
    yield from never(*attributes)(tree)
    for node, name in called(tree):
        if name in ("os.open", "os.mkdir", "os.makedirs"):
            for mode in node.args[1:]:
                # Never more than what a person's umask takes away from 0o666.
                if isinstance(mode, ast.Constant) and mode.value & ~0o666:
                    yield node


def deletes(tree):
    yield from never(".rmtree", "os.removedirs", "os.rmdir", "os.remove")(tree)


def temporary(tree):
    yield from never("tempfile.mktemp", "os.tempnam", "os.tmpnam")(tree)
    for node in ast.walk(tree):
        text = node.value if isinstance(node, ast.Constant) else ""
        if isinstance(text, str) and re.match(r"/(var/)?tmp\b", text):
            yield node


def pages(tree):
    """Of Jinja2: every environment escapes, and nothing is called safe."""
    yield from never("markupsafe", "jinja2.Markup", "jinja2.Template")(tree)
    for node, name in called(tree):
        makes = name.startswith("jinja2.") and name.endswith("Environment")
        if makes and not constant(argument(node, "autoescape"), True):
            yield node


def unpickling(tree):
    """Of the tools, which do unpickle: only what names no function of its own."""
    bases = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            looks = [f for f in node.body if getattr(f, "name", "") == "find_class"]
            bases |= {id(base) for base in node.bases if looks}
    for node, name in names(tree):
        if name.startswith("pickle.") and id(node) not in bases:
            yield node
    for node, name in called(tree):
        if name == "torch.load" and not constant(argument(node, "weights_only"), True):
            yield node


class Rule(NamedTuple):
    """What is searched for, where; a line that it must find, and one it must not."""

    search: Callable
    bad: tuple[str, ...]
    good: str
    files: tuple[Path, ...] = (*PACKAGE, *CONFIGS)
    allowed: dict[str, int] = {}  # file: how many there are, each for its reason


EVERYWHERE = (*PACKAGE, *CONFIGS, *TOOLS)
RULES = {
    "pickle": Rule(
        never(
            "pickle", "_pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve",
            "joblib", "jsonpickle", "pandas.read_pickle",
        ),
        (
            "import pickle", "from pickle import loads", "import joblib as j",
            "def f():\n import cPickle", "import marshal", "import shelve",
            "import dill", "import pandas as pd\npd.read_pickle(f)",
        ),
        "from memsep_jax import weights\nweights.read(pickle_free)",
    ),
    "arrays of objects": Rule(
        pickled_arrays,
        (
            "import numpy as np\nnp.load(f)",
            "import numpy as np\nnp.load(f, allow_pickle=True)",
            "import numpy as np\nnp.load(f, allow_pickle=flag)",
            "from numpy import load as l\nl(f)",
            "import numpy as np\nnp.lib.format.read_array(f)",
            "read(f, allow_pickle=1)",
        ),
        "import numpy as np\nnp.load(f, allow_pickle=False)\njson.load(f)",
        EVERYWHERE,
    ),
    "evaluation": Rule(
        never("builtins.eval", "builtins.exec", "builtins.compile", "code", "codeop"),
        ("eval(x)", "exec(x)", "map(eval, xs)", "import builtins as b\nb.eval(x)",
         "compile(x, '', '')", "import code"),
        "import re, jax, ast\nre.compile(x); jax.eval_shape(f); step.compile()\n"
        "ast.literal_eval(x)",
        EVERYWHERE,
    ),
    "yaml": Rule(
        never("yaml", "ruamel"),
        ("import yaml", "from yaml import load", "import ruamel.yaml"),
        "import json\njson.loads(text)",
        EVERYWHERE,
    ),
    "extraction": Rule(
        never(".extractall", ".extract", "shutil.unpack_archive"),
        (
            "tarfile.open(f).extractall(d)", "archive.extract(member, d)",
            "import shutil as s\ns.unpack_archive(f, d)",
        ),
        "archive.extractfile(member).read()",
        EVERYWHERE,
    ),
    "shell": Rule(
        shells,
        (
            "import os\nos.system(x)", "from os import popen\npopen(x)",
            "import subprocess", "run(x, shell=True)", "run(x, shell=flag)",
            "import os\nos.execvp(x, y)",
        ),
        "import os\nos.path.exists(x); run([x], shell=False)",
        EVERYWHERE,
    ),
    "torch": Rule(
        never("torch", "torchvision", "tensorflow", "keras", "transformers"),
        ("import torch", "def f():\n from torch.nn import Linear", "import tensorflow"),
        "import tensorflow_datasets\nfrom memsep_jax import train",
    ),
    "network": Rule(
        network,
        (
            "import requests", "from urllib.request import urlopen",
            "import socket\nsocket.create_connection(x)", "import http.client",
            "manager.download(url)", "builder.download_and_prepare()",
        ),
        "import socket\nsocket.gethostname()\ntensorflow_datasets.download.Config()",
        EVERYWHERE,
        # Both are held to a digest: test_security_nothing_is_fetched_without_a_digest.
        allowed={"archives.py": 2},
    ),
    "tools": Rule(
        never("tools", "convert_checkpoint", "convert_inception", "sys.path"),
        ("import tools", "from tools import convert_checkpoint",
         "import convert_inception", "import sys\nsys.path.append(x)"),
        "import sys\nsys.argv",
        # The folder in which a command is started, for a user's own function.
        allowed={"construct.py": 3},
    ),
    "temporary names": Rule(
        temporary,
        ("import tempfile\ntempfile.mktemp()", "from tempfile import mktemp",
         "open('/tmp/x')", "x = '/var/tmp'"),
        "import tempfile\ntempfile.mkdtemp(dir=workdir)",
        EVERYWHERE,
    ),
    "names": Rule(
        by_name,
        (
            "import importlib\nimportlib.import_module(x)", "__import__(x)",
            "from importlib import import_module", "globals()[x]", "getattr(m, x)",
            "import runpy\nrunpy.run_path(x)", "setattr(a, f'{x}', 1)",
            "import operator\noperator.attrgetter(x)",
        ),
        "from importlib import metadata\nmetadata.version(x); getattr(a, 'b', None)",
        # A config and a file of points are programs, each run in one place; a user's
        # own function is imported in another, and never from an installed package;
        # `memsep_jax sweep` runs the package's own file. The others choose between
        # names that are written beside them.
        allowed={
            "command.py": 2, "commands.py": 2, "sweep_file.py": 2, "construct.py": 6,
            "fields.py": 3, "__init__.py": 3, "figures.py": 1,
        },
    ),
    "environment": Rule(
        environment,
        (
            "import os\ndict(os.environ)", "from os import environ\nenviron['HOME']",
            "import os\nos.environ.get('WANDB_API_KEY')", "from os import getenv",
            "import os\nos.environ.get(name)", "import os\nos.environ['TFDS_DATA_DIR']",
        ),
        "import os\nos.environ.get('TFDS_DATA_DIR') or config.get('HOME')",
        EVERYWHERE,
    ),
    "permissions": Rule(
        permissions,
        (
            "import os\nos.umask(0)", "path.chmod(0o777)", "import os\nos.chmod(p, 0)",
            "import os\nos.open(p, flags, 0o777)", "import os\nos.makedirs(p, 0o777)",
        ),
        "import os\nos.open(p, flags, 0o644)",
        EVERYWHERE,
    ),
    "deletion": Rule(
        deletes,
        ("import shutil\nshutil.rmtree(p)", "from shutil import rmtree\nx.rmtree(p)",
         "import os\nos.remove(p)"),
        "part.unlink()",
        EVERYWHERE,
        # test_security_nothing_is_deleted_through_a_link.
        allowed={"checkpoint.py": 2},
    ),
    "pages": Rule(
        pages,
        (
            "import jinja2\njinja2.Environment()", "from markupsafe import Markup",
            "import jinja2\njinja2.Environment(autoescape=False)",
            "from jinja2 import Template\nTemplate(x)",
        ),
        "import jinja2\njinja2.Environment(autoescape=True)",
        EVERYWHERE,
    ),
    "unpickling": Rule(
        unpickling,
        (
            "import pickle\npickle.load(f)", "from pickle import loads\nloads(x)",
            "import pickle\nclass U(pickle.Unpickler):\n  pass",
            "import torch\ntorch.load(f)",
            "import torch\ntorch.load(f, weights_only=x)",
        ),
        "import pickle, torch\ntorch.load(f, weights_only=True)\n"
        "class U(pickle.Unpickler):\n  def find_class(self, module, name): ...",
        tuple(TOOLS),
    ),
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_security_the_source_never_breaks_the_rule(rule):
    found, allowed = {}, RULES[rule].allowed
    for path in RULES[rule].files:
        for node in RULES[rule].search(tree_of(path)):  # several files have one name
            found.setdefault(path.name, []).append(
                f"{path}:{node.lineno}: {ast.unparse(node)}"
            )
    assert {name: len(lines) for name, lines in found.items()} == allowed, found


@pytest.mark.parametrize("rule", RULES)
def test_security_the_rule_sees_what_it_must(rule):
    search, bad, good, *_ = RULES[rule]
    for source in bad:
        assert list(search(ast.parse(source))), f"not seen: {source}"
    assert not list(search(ast.parse(good)))
    assert RULES[rule].files


def expansions(script):
    """$x and $(x) of a shell script that are not within double quotes, and eval."""
    lines = [line for line in script.splitlines() if not line.lstrip().startswith("#")]
    for line in lines:
        bare = re.sub(r'"[^"]*"', '""', line)
        if re.search(r"\$(?!\?)|`|\beval\b|\bsource\b|curl|wget", bare):
            yield line


def unsafe(template):
    """What would let a value be more than text, or fetch something."""
    yield from re.findall(
        r"\|\s*safe|autoescape|<script|<link|<iframe|https?:|\son\w+=|=\{\{|@import|url\(",
        template,
    )


@pytest.mark.parametrize("path", (*LAUNCH, *TEMPLATES), ids=lambda p: p.name)
def test_security_launchers_and_templates_take_words_as_they_are(path):
    search = unsafe if path in TEMPLATES else expansions
    assert not list(search(path.read_text()))


@pytest.mark.parametrize("search, bad, good", [
    (expansions, ("rm $x", "srun $@", "eval x", "x=$(ls)", "`ls`", "curl x | bash"),
     '# $x\nsrun "$@"\ncode=$?\nif [ "$x" = 1 ]; then'),
    (unsafe, ("{{ x | safe }}", "{% autoescape false %}", "<img src={{ x }}>",
              "<a onx=1>", "<script>", '<link href="x">', '<a href="https://x">',
              "url(x)"), '<img alt="{{ x }}" src="data:image/png;base64,{{ y }}">'),
])  # fmt: skip
def test_security_the_searches_of_text_see_what_they_must(search, bad, good):
    assert all(list(search(line)) for line in bad)
    assert not list(search(good))


# What runs, and what does not.


def test_security_a_run_goes_on_without_running_its_config_file(
    tmp_path, undrawn, monkeypatch
):
    """The .py of the run may be gone, or another program by then."""

    def run_path(*args):
        raise AssertionError("a file of python was run")

    workdir = finished(tmp_path)
    config = harness.config("--config=configs/digits.py:smoke")
    record.write_json(workdir / "config.json", ConfigDict(config).to_dict())
    monkeypatch.setattr(runpy, "run_path", run_path)
    monkeypatch.setattr("sys.argv", ["main"])
    known = command.ConfigFile().parse(str(workdir / "config.json"))
    assert build.to_json(known) == build.to_json(config)
    (workdir / "report.html").unlink(missing_ok=True)
    known.unlock().experiment = "report"
    report.run(known, workdir)
    assert (workdir / "report.html").stat().st_size
    with pytest.raises(command.UsageError, match="was run"):
        command.ConfigFile().parse("configs/digits.py")


@pytest.mark.parametrize("name", ["samples.npz", "pairs.npz"])
def test_security_a_pickle_among_the_numbers_of_a_run_is_not_run(name, tmp_path):
    struck, workdir = tmp_path / "struck", finished(tmp_path / "run")
    objects = np.empty(2, object)
    objects[:] = [Payload(struck), Payload(struck)]
    np.savez(workdir / name, first_index=objects, samples=objects)
    with pytest.raises(checkpoint.ConflictError, match=f"no readable {name}"):
        report.run(None, workdir)
    assert not struck.exists()


def test_security_nothing_is_fetched_without_a_digest(tmp_path, monkeypatch):
    """A set without a digest of a file is refused before a byte is asked for."""
    import requests
    import tensorflow_datasets
    from tensorflow_datasets.image_classification import cifar

    def send(*args, **kwargs):
        raise AssertionError("asked for")

    monkeypatch.setattr(requests.Session, "send", send)
    features = tensorflow_datasets.features
    with tensorflow_datasets.core.registered.skip_registration():

        class Remote(tensorflow_datasets.core.GeneratorBasedBuilder):
            VERSION = tensorflow_datasets.core.Version("1.0.0")

            def _info(self):
                return tensorflow_datasets.core.DatasetInfo(
                    builder=self,
                    features=features.FeaturesDict({"image": features.Image()}),
                )

            def _split_generators(self, manager):
                manager.download("https://example.invalid/images.tar")

            def _generate_examples(self):
                raise AssertionError("generated")

    builder = Remote(data_dir=tmp_path, file_format="array_record")
    with pytest.raises(sources.DataError, match="Missing checksums .*example.invalid"):
        archives._prepared(builder, "")
    (known,) = cifar.Cifar10.url_infos.values()
    assert known.checksum == archives.CIFAR_SHA256
    assert known.size == archives.CIFAR_BYTES


# Pages: what is shown of a run is text, and no more than may be shown.


@pytest.fixture(scope="module")
def plain(tmp_path_factory, all_undrawn):
    """The page of a run with nothing hostile in it."""
    workdir = finished(tmp_path_factory.mktemp("plain"))
    report.write(workdir, print)
    return read_page(workdir)


PAYLOADS = (
    "<script>alert(1)<b>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "{{ 7 * 191 }} {% include 'x' %}",
    "&lt;script&gt; &#60;b&#62;",
    "$\\frac{x}$ [red]x[/]",
    "\u202egnp.exe \u2066\u00e9\u0301\u200b",
    "\udcff\udc80 bytes",
    "]]> --> </title></style>",
)


def hostile(text, value):
    """A value with every word in it replaced; of names of fields, none."""
    if isinstance(value, dict):
        return {key: hostile(text, v) for key, v in value.items()}
    if isinstance(value, list):
        return [hostile(text, v) for v in value]
    return text if isinstance(value, str) else value


@pytest.mark.parametrize("text", PAYLOADS)
def test_security_whatever_a_run_calls_itself_is_only_text(
    text, plain, tmp_path, undrawn
):
    """Every word of config.json, run.json and metrics.json, and the workdir."""
    workdir = finished(tmp_path / text.replace("/", "%"))
    for name in ("config.json", "run.json", "metrics.json"):
        known = record.read_json(workdir / name)
        record.write_json(workdir / name, hostile(text, known))
    report.write(workdir, print)
    html = (workdir / "report.html").read_text()
    page = Page(html)
    # No value of it is a default, so nothing is folded.
    assert page.tags == plain.tags - {"details", "summary"}
    assert page.names == plain.names
    assert page.fetched == plain.fetched
    shown = " ".join(text.encode("utf-8", "replace").decode().split())
    assert page.text.count(shown) >= 8
    assert "1337" not in html  # no template in a template


@pytest.mark.parametrize("shown", [True, False])
def test_security_an_audit_of_hostile_files_is_only_text(shown, tmp_path, undrawn):
    """Folders, classes, files and the workdir are named so; pairs are left out too."""
    names = [text.replace("/", "%") for text in PAYLOADS if "\udcff" not in text]
    rng = np.random.default_rng(0)
    config = harness.config("--config=configs/audit.py:smoke").unlock()
    for role in ("samples", "train", "held_out"):
        config[role] = str(tmp_path / f"{role} {names[0]}")
        for name in names:
            (tmp_path / config[role] / name).mkdir(parents=True)
            image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
            image.save(tmp_path / config[role] / name / f"{name}.png")
    config.features.update(name="inception", path=str(tmp_path / names[1]))
    config.run.images = shown
    workdir = tmp_path / names[1]
    experiments.run(config, workdir)
    html = (workdir / "report.html").read_text()
    page = Page(html)
    assert not page.tags & {"script", "iframe", "object", "link"}
    assert not page.names & {"onerror", "onmouseover"}
    assert page.anchors <= set(page.ids)  # all links that are not among `fetched`
    assert names[1] in page.text and str(tmp_path) not in html
    sources = {source.partition(",")[0] for source in page.fetched}
    assert sources == {"data:image/png;base64"}
    assert (workdir / "pairs.png").exists() == shown
    pairs = {"pairs_pixels"} if shown else set()
    assert drawn(workdir, "pdf") == {"distances_pixels"} | pairs
    assert ("left out of this page" in page.text) != shown
    assert ("blue frames are training" in page.text) == shown


def test_security_a_sweep_and_its_captions_are_only_text(tmp_path, undrawn):
    text = PAYLOADS[1]
    row = {"setting": text, text: 3, "seeds": 1}
    metrics = {"experiment": text, "points": [], "table": [row], "about": text}
    record.write_json(tmp_path / "metrics.json", metrics)
    record.write_json(tmp_path / "config.json", {"sweep": {"setting": [text]}})
    record.write_json(tmp_path / "run.json", {"command": text, "device": text})
    figure = figures.losses([{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}])
    report.write_sweep(tmp_path, lambda *_: [("a", text, figure)], print)
    page = read_page(tmp_path)
    assert page.text.count(text) >= 7 and not page.names & {"onerror", "onmouseover"}
    assert page.fetched == ["data:image/png;base64,cG5n"]


def test_security_of_a_path_a_page_tells_the_last_part(tmp_path, undrawn):
    workdir = finished(tmp_path)
    command = (
        "python -m memsep_jax.main --config=/home/alice/c.py "
        "'--workdir=/home/alice/my runs/x' --config.a=~alice/set"
    )
    known = record.read_json(workdir / "run.json")
    record.write_json(workdir / "run.json", known | {"command": command})
    settings = {"sweep": {"setting": ["prune.source=/home/alice/run", "a/b"]}}
    record.write_json(workdir / "config.json", settings)
    report.write(workdir, print)
    page = read_page(workdir)
    assert "alice" not in (workdir / "report.html").read_text()
    for kept in (".../c.py", "--workdir=.../x", "--config.a=.../set", "a/b"):
        assert kept in page.text, kept
    # What the command was is kept where the run is.
    assert record.read_json(workdir / "run.json")["command"] == command


@pytest.mark.parametrize("shape", [(4, 4, 1), (6,)])
@pytest.mark.parametrize("by", ["run", "redrawing"])
def test_security_training_data_are_marked_or_left_out(by, shape, tmp_path, undrawn):
    """By the run itself, or when it is drawn again to be shown to others."""
    marks = "The images in blue frames are training data"
    report.write(finished(tmp_path / "shown", shape), print)
    text = read_page(tmp_path / "shown").text
    assert (marks in text) == (len(shape) == 3) and "left out of this page" not in text
    workdir = finished(tmp_path / "hidden", shape)
    hide = {"run": {"images": False}}
    if by == "run":
        known = record.read_json(workdir / "config.json")
        record.write_json(workdir / "config.json", known | hide)
        report.write(workdir, print)
    else:
        report.run(ConfigDict(hide), workdir)
    page = read_page(workdir)
    assert drawn(workdir, "png") == ALWAYS and len(page.fetched) == len(ALWAYS)
    assert "beside training data were left out of this page" in page.text
    assert "blue frames" not in page.text and "crosses are training" not in page.text
    # And a redrawing with other defaults does not bring them back.
    if by == "run":
        report.run(ConfigDict({"run": {"images": True}}), workdir)
        assert read_page(workdir).fetched == page.fetched


# What is deleted, and who may read what is written.


@pytest.fixture
def elsewhere(tmp_path):
    """A directory outside of any workdir, with a file that must stay."""
    place = tmp_path / "elsewhere"
    place.mkdir()
    (place / "precious").write_text("stays")
    return place


def test_security_nothing_is_deleted_through_a_link(tmp_path, elsewhere):
    """Leftovers, a step that goes, what hangs below it, and a step that is a link."""
    directory = tmp_path / "checkpoints"
    directory.mkdir()
    tree = {"x": np.zeros(3, np.float32)}
    (directory / f"7{checkpoint.TMP}-1").symlink_to(elsewhere)
    left = directory / f"8{checkpoint.TMP}-2"
    left.mkdir()
    (left / "link").symlink_to(elsewhere)
    checkpoint.save(directory, 1, tree)
    (directory / "1" / "link").symlink_to(elsewhere)
    (directory / "1" / "precious").symlink_to(elsewhere / "precious")
    checkpoint.clean(directory)
    assert not left.exists()
    checkpoint.save(directory, 2, tree, keep=1)
    assert checkpoint.steps(directory) == [2]
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "1").symlink_to(elsewhere)
    for step in (2, 3):
        with contextlib.suppress(OSError):
            checkpoint.save(linked, step, tree, keep=1)
    assert (elsewhere / "precious").read_text() == "stays"


def test_security_a_refused_workdir_is_taken_away_and_no_link(tmp_path, elsewhere):
    from memsep_jax.experiments.runtime.session import Session

    (tmp_path / "link").symlink_to(elsewhere)
    config = harness.config("--config=configs/digits.py:smoke")
    with pytest.raises(ZeroDivisionError), Session(tmp_path / "link" / "new", config):
        raise ZeroDivisionError
    assert [p.name for p in elsewhere.iterdir()] == ["precious"]
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("mask", [0o077, 0o027, 0o022])
def test_security_the_umask_is_kept(mask, tmp_path):
    """Of all that is written: numbers, rows, pictures, checkpoints, packed states."""
    before = os.umask(mask)
    try:
        workdir = finished(tmp_path / "run")
        tree = {"x": np.zeros(3, np.float32)}
        checkpoint.save(workdir / "checkpoints", 1, tree)
        checkpoint.pack(workdir / "packed.npz", 1, tree)
        record.write_bytes(workdir / "figures" / "a.png", b"")
    finally:
        os.umask(before)
    written = list(workdir.rglob("*"))
    assert len(written) > 12
    for path in written:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode & mask == 0, f"{path}: {mode:o}"
        wanted = (0o777 if path.is_dir() else 0o666) & ~mask
        assert mode & 0o444 == wanted & 0o444, f"{path}: {mode:o}"
    shutil.rmtree(workdir)
