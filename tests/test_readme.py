"""The python of README and docs runs, and their commands parse."""

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from absl import flags
from faults import harness

from configs import digits, onset_digits
from memsep_jax import defaults, experiments, main
from memsep_jax.experiments import record
from memsep_jax.experiments.config import build

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)
BLOCKS = [
    (path.name, language, block)
    for path in PAGES
    for language, block in FENCE.findall(path.read_text())
]
COMMANDS = [
    line.partition("-m memsep_jax.main")[2]
    for _, language, block in BLOCKS
    if language == "bash"
    for line in block.splitlines()
    if "-m memsep_jax.main" in line
]
USERS = sorted((ROOT / "docs" / "extending").glob("*.py"))


def shown(*pages):
    """What the python of some pages prints, block by block, one after the other."""
    names, printed = {}, []
    for page in pages:
        for code in [b for name, kind, b in BLOCKS if (name, kind) == (page, "python")]:
            assert len([line for line in code.splitlines() if line.strip()]) <= 12
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(code, page, "exec"), names)
            printed.append(out.getvalue())
    return printed


def test_the_example_of_the_readme_shows_what_it_says():
    (printed,) = shown("README.md")
    truth, copies = [
        [float(word) for word in re.findall(r"\d\.\d+(?:e-\d+)?", line)]
        for line in printed.splitlines()
    ]
    assert truth[0] <= truth[2] + 0.02 and copies[0] > 0.99


@pytest.mark.slow
def test_the_prompt_examples_show_what_they_say(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # one of them writes a file
    _, *printed = shown("README.md", "prompt.md")
    *_, smooth, steep, memorizes = printed[0].splitlines()
    assert float(steep) > 5 * float(smooth)
    assert memorizes == "[ True  True  True]"
    aucs = [[float(a) for a in line.split()] for line in printed[1].splitlines()[:4]]
    assert all(of_early > 0.9 for of_early, *_ in aucs)
    told = {name: list(map(float, aucs)) for name, *aucs in
            map(str.split, printed[2].splitlines())}  # fmt: skip
    assert list(told) == ["sharpness", "flattest", "trace", "flipd"]
    assert told["flattest"][1] > 0.8 and told["flipd"][1] > 0.8
    ladder = {name: (float(a), float(b)) for name, a, b in
              map(str.split, printed[3].splitlines())}  # fmt: skip
    own, others = ladder.pop("copy")
    assert own < 1 and all(own < a < b < others for a, b in ladder.values())
    assert printed[4].count("False") == 3 and printed[4].count("True") == 5
    assert printed[4].endswith("(8, 8, 1)\n")
    copied, authentic, *quality = map(float, printed[5].split())
    assert copied == 0.5 and authentic < 0.5 and min(quality) > 0
    assert round(float(printed[6].split()[0]), 1) == 82.8


def test_the_audits_of_the_prompt_show_what_they_say(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # one of them writes a page
    with harness.undrawn():
        first, second = shown("audit.md")
    assert first.startswith("25.0 % [16.8, 35.5] of the 80 samples are copies")
    assert "copies [40 41 42]" in first and second == "copies\n"
    assert "25.0 %" in (tmp_path / "audit.html").read_text()


TOUR = """
import sys, nbclient, nbformat
notebook = nbformat.read(sys.argv[1], as_version=4)
nbclient.NotebookClient(notebook, timeout=900).execute()
nbformat.write(notebook, sys.argv[2])
"""


@pytest.mark.dev
def test_the_tour_runs_from_top_to_bottom(tmp_path):
    pytest.importorskip("nbclient")
    tour, out = ROOT / "docs" / "tour.ipynb", tmp_path / "tour.ipynb"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, "-c", TOUR, tour, out], check=True, env=env, cwd=tmp_path
    )
    *_, training, _, audit = [
        json.dumps([one.get("data", one.get("text")) for one in cell["outputs"]])
        for cell in json.loads(out.read_text())["cells"]
        if cell["cell_type"] == "code"
    ]
    assert "<progress" in training and "memorized samples" in training
    assert "of the 200 samples are copies of a training image" in audit
    assert "data:image/png" in audit


def test_the_tour_holds_pictures_and_no_path_of_a_machine():
    text = (ROOT / "docs" / "tour.ipynb").read_text()
    assert text.count('"image/png"') == 3 and "/home/" not in text
    assert "/root/" not in text and "Traceback" not in text and len(text) < 600_000


@pytest.mark.parametrize("command", dict.fromkeys(COMMANDS))
def test_a_command_of_the_docs_parses(command, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command, comments=True)
    saved = [w for w in words if w.endswith("config.json")]
    if saved:  # made by another command
        record.write_json(tmp_path / "config.json", build.to_json(defaults.train()))
        words[words.index(saved[0])] = f"--config={tmp_path / 'config.json'}"
    monkeypatch.setattr("sys.argv", ["main", *words])
    flags.FLAGS.unparse_flags()
    for field in [name for name in flags.FLAGS if name.startswith("config.")]:
        delattr(flags.FLAGS, field)  # of the command before
    assert main.parse_flags(["main", *words]) == ["main"]
    name = flags.FLAGS.config.experiment
    assert name in experiments.EXPERIMENTS or ":" in name


def test_every_config_is_on_its_page():
    page = (ROOT / "docs" / "configs.md").read_text()
    for path in (ROOT / "configs").glob("*.py"):
        assert path.name in page


def test_every_link_of_the_docs_leads_somewhere():
    for page in [*PAGES, *(ROOT / "docs" / "results").glob("*.md")]:
        for link in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_a_users_file_is_short_and_is_shown_whole():
    page = (ROOT / "docs" / "extending.md").read_text()
    assert len(USERS) == 6
    for path in USERS:
        assert f"```python\n{path.read_text()}```" in page
        assert len(path.read_text().splitlines()) <= 40


@pytest.fixture
def users_files(monkeypatch):
    """The folder of a user's files, as where a command is started."""
    monkeypatch.syspath_prepend(ROOT / "docs" / "extending")


def test_a_users_process_network_and_data_make_a_run(users_files, tmp_path):
    config = digits.get_config("smoke")
    model, cosine, rings = "my_network:ConvNet", "my_process:cosine", "my_data:rings"
    defaults.switch(config, model=model)
    config.model.update(width=8, depth=1)
    config.process.name, config.prediction.name = cosine, "noise"
    config.times.update(name="uniform", t_min=0.01, t_max=0.99)
    config.sampler.update(t_min=0.01, t_max=0.99)
    config.data.name = rings
    # Elsewhere ranks may be promoted.
    with jax.numpy_rank_promotion("allow"), harness.undrawn():
        experiments.run(config, tmp_path)
    metrics = record.read_json(tmp_path / "metrics.json")
    assert (metrics["model"]["name"], metrics["data"]["name"]) == (model, rings)
    assert metrics["memorization"]["samples"] == config.sampler.num_samples


@pytest.mark.parametrize(
    "name", ["my_least_network:Linen", "my_least_network:Nnx", "my_functions:network"]
)
def test_the_least_networks_are_trained(name, users_files, tmp_path):
    config = digits.get_config("smoke")
    defaults.switch(config, model=name)
    with harness.undrawn():
        experiments.run(config, tmp_path)
    rows = record.read_metrics(tmp_path / "metrics.jsonl")
    assert rows[-1]["step"] == config.train.steps
    assert record.read_json(tmp_path / "config.json")["model"]["name"] == name


def test_a_users_study_makes_a_sweep(users_files, tmp_path):
    config = onset_digits.get_config("smoke")
    config.experiment = "my_study:study"
    config.sweep.update(seeds=2, num_examples=(16, 64))
    experiments.run(config, tmp_path)
    few, many = record.read_json(tmp_path / "metrics.json")["table"]
    assert few["distance"]["mean"] > many["distance"]["mean"] > 0
    assert (tmp_path / "figures" / "distance.png").exists()
