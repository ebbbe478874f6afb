"""The names of tests are facts that are read in one line of a report."""

import ast
from pathlib import Path

LONGEST = 60  # characters after "test_"


def test_no_name_of_a_test_is_longer_than_a_line():
    long = [
        f"{path.name}::{node.name}"
        for path in sorted(Path(__file__).parent.rglob("test_*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        if len(node.name.removeprefix("test_")) > LONGEST
    ]
    assert not long, f"at most {LONGEST} characters after test_"
