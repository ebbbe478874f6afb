"""The package as others install it: a wheel, outside of the checkout."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
from faults.harness import ROOT

ABOUT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_all_folders_with_code_are_packages_of_the_wheel():
    named = ABOUT["tool"]["setuptools"]["packages"]
    inside = {p.parent for p in (ROOT / "memsep_jax").rglob("*.py")}
    folders = {".".join(p.relative_to(ROOT).parts) for p in inside}
    assert sorted(named) == sorted(
        {*folders, "memsep_jax.configs", "memsep_jax.launch"}
    )


@pytest.mark.slow
def test_a_wheel_works_from_an_empty_folder(tmp_path):
    """Installed with its dependencies: train, sample, audit and report."""
    source, wheels, empty = (tmp_path / n for n in ("source", "wheels", "empty"))
    skipped = shutil.ignore_patterns(".*", "runs", "docs", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=skipped)  # setuptools builds in the folder
    pip = [sys.executable, "-m", "pip", "-q"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", wheels, source], check=True)
    (wheel,) = wheels.iterdir()
    with zipfile.ZipFile(wheel) as archive:
        names = {*archive.namelist()}
    for path in (*ROOT.glob("configs/*.py"), *ROOT.glob("launch/*.*")):
        assert f"memsep_jax/{path.relative_to(ROOT)}" in names
    assert "memsep_jax/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    constraints = ["-c", ROOT / "constraints.txt"]
    subprocess.run(
        [python, "-m", "pip", "-q", "install", *constraints, wheel], check=True
    )
    empty.mkdir()
    hidden = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
    env = {k: v for k, v in os.environ.items() if k not in hidden}

    def told(*words):
        command = [python.parent / "memsep_jax", *words]
        done = subprocess.run(
            command, cwd=empty, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "digits" in told("configs")
    assert "--config.train.steps" in told("--help")
    run = "--run=runs/digits-smoke"
    assert "verdict: " in told("train", "--config=digits:smoke")
    told("sample", run, "--num_samples=20", "--outdir=drawn")
    assert "verdict: " in told(
        "audit", "--samples=drawn/images", "--train=runs/digits-smoke", "--workdir=a"
    )
    (empty / "runs/digits-smoke/report.html").unlink()
    told("report", run)
    assert (empty / "runs/digits-smoke/report.html").stat().st_size
    assert json.loads((empty / "a/metrics.json").read_text())["verdict"]
    assert "usage: " in told("sweep", "--help")
