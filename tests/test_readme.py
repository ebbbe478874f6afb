"""The README's python runs, and its commands parse."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest
from absl import flags

from memsep_jax import experiments, main

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


def test_the_prompt_examples_show_what_they_say(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # one of them writes a file
    names, printed = {}, []
    for code in [block for language, block in BLOCKS if language == "python"]:
        assert len([line for line in code.splitlines() if line.strip()]) <= 12
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(code, "README.md", "exec"), names)
        printed.append(out.getvalue())
    truth, copies = [
        [float(word) for word in re.findall(r"\d\.\d+(?:e-\d+)?", line)]
        for line in printed[0].splitlines()
    ]
    assert truth[0] <= truth[2] + 0.02 and copies[0] > 0.99
    *_, smooth, steep, memorizes = printed[1].splitlines()
    assert float(steep) > 5 * float(smooth)
    assert memorizes == "[ True  True  True]"
    assert printed[2].count("False") == 3 and printed[2].count("True") == 5
    assert printed[2].endswith("(8, 8, 1)\n")
    copied, authentic, *quality = map(float, printed[3].split())
    assert copied == 0.5 and authentic < 0.5 and min(quality) > 0


@pytest.mark.parametrize("command", COMMANDS)
def test_its_commands_parse(command, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    saved = [w for w in words if w.endswith("config.json")]
    if saved:  # made by the command above it
        from memsep_jax import defaults
        from memsep_jax.experiments.config.build import to_json
        from memsep_jax.experiments.record import write_json

        write_json(tmp_path / "config.json", to_json(defaults.train()))
        words[words.index(saved[0])] = f"--config={tmp_path / 'config.json'}"
    monkeypatch.setattr("sys.argv", ["main", *words])
    flags.FLAGS.unparse_flags()
    for field in [name for name in flags.FLAGS if name.startswith("config.")]:
        delattr(flags.FLAGS, field)  # of the command before
    assert main.parse_flags(["main", *words]) == ["main"]
    assert flags.FLAGS.config.experiment in experiments.EXPERIMENTS


def test_every_config_is_in_the_readme():
    for path in (ROOT / "configs").glob("*.py"):
        assert f"configs/{path.name}" in README
