"""The commands by name, and what the flags are that they stand for."""

import sys

import numpy as np
import pytest
from faults import harness
from PIL import Image

from memsep_jax import commands, experiments, main
from memsep_jax.experiments import loaded, record
from memsep_jax.experiments.config import command, schema


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, compiled_once, all_undrawn):
    """Of a small run that has finished."""
    folder = tmp_path_factory.mktemp("commands") / "run"
    experiments.run(harness.config(*harness.TINY_DIT), folder)
    return folder


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        (["--config=digits", "--dry_run"], ["--config=digits", "--dry_run"]),
        (["train", "--config=digits"], ["--config=digits"]),
        (
            ["audit", "--samples=a", "--train", "b", "--config.seed=1"],
            [
                "--config=audit",
                "--config.samples=a",
                "--config.train=b",
                "--config.seed=1",
            ],
        ),
        (["audit", "--config=audit:smoke"], ["--config=audit:smoke"]),
        ([], []),
    ],
)
def test_a_command_stands_for_flags(words, flags):
    assert commands.spelled(words) == flags


def test_a_report_is_of_a_run(workdir, tmp_path):
    assert commands.spelled(["report", f"--run={workdir}", "--debug"]) == [
        f"--config={workdir}/config.json",
        f"--workdir={workdir}",
        "--config.experiment=report",
        "--debug",
    ]
    for place in ("", tmp_path):
        with pytest.raises(command.UsageError, match="holds no run: give the workdir"):
            commands.spelled(["report", f"--run={place}"])


def test_a_command_that_is_not_known_is_told(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["memsep_jax", "trian", "--config=digits"])
    with pytest.raises(SystemExit, match="2"):
        main.run()
    assert "'trian' is no command, did you mean train?" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["memsep_jax", "report"])
    with pytest.raises(SystemExit, match="2"):
        main.run()
    assert "required: --run" in capsys.readouterr().err


def test_a_config_is_found_by_its_name_from_any_folder(tmp_path, monkeypatch):
    path = "configs/digits.py:smoke"
    from_here = command.load(path)
    monkeypatch.chdir(tmp_path)
    for name in ("digits:smoke", "digits.py:smoke"):
        assert command.load(name).to_dict() == from_here.to_dict()
    for name in (path, "digit"):
        with pytest.raises(command.UsageError, match="did you mean --config=digits"):
            command.load(name)
    with pytest.raises(command.UsageError, match="`memsep_jax configs` lists"):
        command.load("zzz")
    # A file of one's own comes first.
    (tmp_path / "digits.py").write_text("def get_config():\n    return 1\n")
    with pytest.raises(command.UsageError, match="returned int"):
        command.load("digits.py")


def test_configs_are_listed_with_their_docstrings(capsys):
    commands.configs([])
    listed = capsys.readouterr().out.splitlines()
    files = sorted((harness.ROOT / "configs").glob("*.py"))
    assert [line.split()[0] for line in listed[: len(files)]] == [p.stem for p in files]
    assert all(len(line.split()) > 3 for line in listed[: len(files)])
    commands.configs(["digits"])
    told = capsys.readouterr().out
    assert "memsep_jax train --config=digits\n" in told and "Variants: `full`" in told
    with pytest.raises(command.UsageError, match="no such file, did you mean"):
        commands.configs(["digit"])


def test_every_field_is_listed_with_its_help(capsys):
    commands.configs(["--fields"])
    text = capsys.readouterr().out
    flat = " ".join(text.split())
    for known in (schema.TRAIN, schema.AUDIT):
        for name, field, _ in schema.leaves(known):
            assert f"--config.{name}: {field.kind.__name__}" in text
            assert field.help in flat
    assert "one of digits, mixture" in text  # the names of a table
    assert max(map(len, text.splitlines())) < 200


def test_samples_are_written_as_the_run_draws_them(workdir, tmp_path, capsys):
    run = f"--run={workdir}"
    commands.sample([run, f"--outdir={tmp_path}/own", "--num_samples=3"])
    assert "3 samples of step 30" in capsys.readouterr().out
    own = record.read_npz(tmp_path / "own" / "samples.npz")["samples"]
    of_run = record.read_npz(workdir / "samples.npz")["samples"][:3]
    np.testing.assert_allclose(np.float32(own), np.float32(of_run), atol=1)
    for i, image in enumerate(own):
        with Image.open(tmp_path / "own" / "images" / f"{i:06}.png") as file:
            np.testing.assert_array_equal(np.asarray(file), image[..., 0])
    assert (tmp_path / "own" / "grid.png").stat().st_size
    seed = loaded.load(workdir).config.seed
    for name, given in {"same": seed, "other": seed + 1}.items():
        place = f"--outdir={tmp_path / name}"
        commands.sample([run, place, "--num_samples=3", f"--seed={given}"])
        drawn = record.read_npz(tmp_path / name / "samples.npz")["samples"]
        assert np.array_equal(drawn, own) == (name == "same")


def test_samples_are_written_over_nothing(workdir, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    for place, words in (
        (tmp_path, "is not empty: give a new folder"),
        (tmp_path / "mine.txt", "is a file: give a new folder"),
        (tmp_path / "mine.txt" / "x", "cannot be written"),
    ):
        with pytest.raises(command.UsageError, match=words):
            commands.sample([f"--run={workdir}", f"--outdir={place}"])
    with commands._claimed(tmp_path / "two"):  # as another command that is at work
        with pytest.raises(command.UsageError, match="is not empty"):
            commands.sample([f"--run={workdir}", f"--outdir={tmp_path}/two"])
        (tmp_path / "two" / "x").touch()
    assert [p.name for p in (tmp_path / "two").iterdir()] == ["x"]


def test_what_cannot_be_sampled_is_one_message(workdir, tmp_path, monkeypatch, capsys):
    for words, message in (
        ([f"--run={tmp_path}"], "is no run of one network"),
        ([f"--run={workdir}", "--label=3"], "trained without labels"),
        ([f"--run={workdir}", "--num_samples=0"], "n=0 must be one integer"),
        ([f"--run={workdir}", "--guidance=2"], "train with data.labels"),
        (
            [f"--run={workdir}", "--guidance=nan"],
            "guidance=nan must be a finite number",
        ),
        ([f"--run={workdir}", "--seed=-1"], "key, as a seed,=-1 must be one integer"),
        ([f"--run={workdir}", "--steps=0"], "steps=0 must be one integer, at least 1"),
        (["--run="], "--run= is empty"),
    ):
        outdir = tmp_path / "none"
        argv = ["memsep_jax", "sample", *words, f"--outdir={outdir}"]
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit, match="2"):
            main.run()
        told = capsys.readouterr().err
        assert message in told and len(told.splitlines()) <= 3
        assert not outdir.exists()
