"""The commands by name: memsep_jax train, sample, audit, report, configs, sweep.

`train`, `audit` and `report` are short for flags of the main command, and the others
are programs of their own.
"""

import argparse
import ast
import contextlib
import difflib
import functools
import re
import runpy
import sys
from pathlib import Path

from memsep_jax.experiments.config import command

HELP = {
    "train": "trains a network, or runs any study: --config=NAME[:variant]",
    "sample": "draws new samples of a run: --run=DIR --outdir=DIR",
    "audit": "tells which samples are copies: --samples=A --train=B [--held_out=C]",
    "report": "draws the report of a run again: --run=DIR",
    "configs": "lists the configs; --fields lists all fields",
    "sweep": "many runs as one: run|status|aggregate SWEEP.py",
}
AUDITED = {  # fields that `audit` has as flags
    "samples": "what was generated: a folder of images, a zip, .npz, .npy or a run",
    "train": "what the generator was trained on",
    "held_out": "images of the same kind that it never saw",
    "pool": "the images that `train` was chosen from",
}


def usage() -> str:
    """The commands and what they do."""
    rows = (f"  memsep_jax {name:9}{text}" for name, text in HELP.items())
    return "\n".join(["commands (each has --help):", *rows])


def spelled(words: list[str]) -> list[str]:
    """The flags that a command stands for; flags without a command stay as they are.

    Raises: command.UsageError: no such command, or `report` without a run.
    """
    if not words or words[0].startswith("-"):
        return words
    name, *rest = words
    if name == "audit":
        parser = _parser(name)
        for field, help in AUDITED.items():
            flag = functools.partial("--config.{}={}".format, field)
            parser.add_argument(
                f"--{field}", help=help, type=flag, dest="flags", action="append",
                default=[],
            )  # fmt: skip
        args, rest = parser.parse_known_args(rest)
        named = any(re.match(r"--?config(=|$)", word) for word in rest)
        return [*([] if named else ["--config=audit"]), *args.flags, *rest]
    if name == "report":
        parser = _parser(name)
        parser.add_argument("--run", required=True, help="the workdir of the run")
        args, rest = parser.parse_known_args(rest)
        if not args.run or not Path(args.run, "config.json").is_file():
            raise command.UsageError(
                f"--run={args.run} holds no run: give the workdir of one"
            )
        return [
            f"--config={Path(args.run, 'config.json')}",
            f"--workdir={args.run}",
            "--config.experiment=report",
            *rest,
        ]
    if name not in HELP:
        close = difflib.get_close_matches(name, HELP, 1)
        hint = f", did you mean {close[0]}?" if close else ":"
        raise command.UsageError(
            f"{name!r} is no command{hint} Commands are {', '.join(HELP)}, and flags "
            "start with --"
        )
    return rest


def _parser(name):
    more = "Every field: memsep_jax configs --fields." if name == "audit" else None
    return argparse.ArgumentParser(
        prog=f"memsep_jax {name}", description=HELP[name], epilog=more,
        allow_abbrev=False,
    )  # fmt: skip


def sample(words: list[str]) -> None:
    """New samples of a run as PNGs, a grid and an .npz.

    Raises: command.UsageError; what `load` and `Run.sample` raise.
    """
    parser = _parser("sample")
    add = parser.add_argument
    add("--run", required=True, help="a workdir, a file of run.pack, or an export")
    add("--config", help="config.json of a file of run.pack, or of an export without")
    add("--outdir", required=True, type=Path, help="a new or empty folder")
    add("--num_samples", type=int, default=16, help="default 16")
    add("--label", type=int, help="of all samples; default: as the training set has")
    add("--guidance", type=float, help="g of s(x) + g (s(x, label) - s(x))")
    add("--steps", type=int, help="of the sampler; default: those of the run")
    add("--seed", type=int, help="default: that of the run, and so its own samples")
    args = parser.parse_args(words)
    outdir = args.outdir.expanduser()
    if not args.run:
        raise command.UsageError("--run= is empty: give the workdir of a run")
    # Here, and not above: a mistake in the command is told before jax is imported.
    import numpy as np

    from memsep_jax.experiments import loaded
    from memsep_jax.experiments.runtime import compiled, terminal

    compiled.keep()
    with _claimed(outdir):
        run = loaded.load(args.run, args.config)
        console = terminal.Terminal(highlight=False, emoji=False)
        n, chunk, pieces = args.num_samples, run.config.run.chunk, []
        with terminal.progress(console, console.print, "samples", n) as update:
            for first in range(0, max(n, 1), chunk):  # sample refuses n = 0
                some = min(chunk, n - first)
                pieces.append(
                    run.sample(
                        args.seed, some, args.label, args.guidance, args.steps, first
                    )
                )
                update(first + some)
        loaded.write(outdir, np.concatenate(pieces))
    sys.stdout.write(f"{n:,} samples of step {run.step:,}: {outdir}\n")


@contextlib.contextmanager
def _claimed(outdir):
    """A new or empty folder, which no other command takes meanwhile.

    Raises: command.UsageError: it is neither, or cannot be written.
    """
    rule = "give a new folder, as nothing is written over"
    claim, made = outdir / ".writing", not outdir.exists()
    try:
        outdir.mkdir(parents=True, exist_ok=True)
        if any(outdir.iterdir()):
            raise command.UsageError(f"--outdir={outdir} is not empty: {rule}")
        claim.touch(exist_ok=False)  # fails where another one has just made it
    except FileExistsError as error:
        what = "is taken by another command" if outdir.is_dir() else "is a file"
        raise command.UsageError(f"--outdir={outdir} {what}: {rule}") from error
    except OSError as error:
        raise command.UsageError(
            f"--outdir={outdir} cannot be written ({error.strerror}): give another"
        ) from error
    try:
        yield
    finally:
        claim.unlink()
        if made and not any(outdir.iterdir()):  # nothing came
            outdir.rmdir()


def configs(words: list[str]) -> None:
    """What configs there are, the text of one, or all fields.

    Raises: command.UsageError: no such config.
    """
    parser = _parser("configs")
    parser.add_argument("name", nargs="?", help="shows the whole text of this config")
    parser.add_argument("--fields", action="store_true", help="lists every field")
    args = parser.parse_args(words)
    if args.fields:
        from memsep_jax.experiments.config import page

        text = page.plain()
    elif args.name:
        name = args.name.partition(":")[0]
        text = _docstring(Path(command.found(name))) + "\n"
        # As it works from any folder.
        text = re.sub(
            r"python -m memsep_jax\.main --config=configs/(\w+)\.py",
            r"memsep_jax train --config=\1", text,
        )  # fmt: skip
    else:
        files = sorted(command.folder("configs").glob("*.py"))
        width = max(len(path.stem) for path in files)
        lines = [f"{p.stem:{width}}  {_docstring(p).splitlines()[0]}" for p in files]
        text = "\n".join([*lines, "", "memsep_jax configs NAME tells more of one.", ""])
    sys.stdout.write(text)


def _docstring(path):
    """The docstring of a config, which is read and not run."""
    if not path.is_file():
        raise command.UsageError(f"{path}: {command.no_such_file(str(path))}")
    return ast.get_docstring(ast.parse(path.read_text())) or ""


def sweep(words: list[str]) -> None:
    """launch/sweep.py, which says what it takes."""
    path = str(command.folder("launch") / "sweep.py")
    sys.argv = [path, *words]
    runpy.run_path(path, run_name="__main__")


PROGRAMS = {"sample": sample, "configs": configs, "sweep": sweep}
