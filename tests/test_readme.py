"""The README's python runs, and its commands parse."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest
from absl import flags

from memsep_jax import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line.partition("-m memsep_jax.main")[2]
    for language, block in BLOCKS
    if language == "bash"
    for line in block.splitlines()
    if "-m memsep_jax.main" in line
]


def test_the_prompt_example_shows_the_two_extremes():
    (code,) = [block for language, block in BLOCKS if language == "python"]
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    truth, copies = [
        [float(word) for word in re.findall(r"\d\.\d+(?:e-\d+)?", line)]
        for line in printed.getvalue().splitlines()
    ]
    assert truth[0] <= truth[2] + 0.02 and copies[0] > 0.99


@pytest.mark.parametrize("command", COMMANDS)
def test_its_commands_parse(command, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    saved = [w for w in words if w.endswith("config.json")]
    if saved:  # made by the command above it
        from memsep_jax import defaults
        from memsep_jax.experiments.record import write_json
        from memsep_jax.experiments.setup import to_json

        write_json(tmp_path / "config.json", to_json(defaults.train()))
        words[words.index(saved[0])] = f"--config={tmp_path / 'config.json'}"
    monkeypatch.setattr("sys.argv", ["main", *words])
    flags.FLAGS.unparse_flags()
    assert main.parse_flags(["main", *words]) == ["main"]
    assert flags.FLAGS.config.experiment in ("train", "optimum", "report")


def test_every_config_is_in_the_readme():
    for path in (ROOT / "configs").glob("*.py"):
        assert f"configs/{path.name}" in README
