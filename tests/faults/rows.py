"""The faults that are promised to be survived, row by row, and their table.

    python -m pytest tests/faults -m "slow or not slow" --junitxml=faults.xml
    PYTHONPATH=tests python -m faults.rows faults.xml > docs/reliability.md

A test belongs to a row by its name: test_a1_..., test_b18_..., test_security_...
"""

import ast
import collections
import json
import platform
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

# ruff: noqa: E501 - a row is a line

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PATTERN = re.compile(r"test_([a-h]\d+|security|fuzz)_")
TITLES = {
    "a": "Interruption and resume",
    "b": "Storage and what checkpoints hold",
    "c": "Numerics",
    "d": "Configs and inputs",
    "e": "Memory and speed",
    "f": "Several processes",
    "g": "Sweeps and output",
    "h": "What people's files and habits do",
    "s": "Security",
}
REFUSALS = {"c34", "c39", "d", "security", "fuzz"}  # bad input; all else are faults


class Row(NamedTuple):
    """What happens, and what is promised then."""

    scenario: str
    promise: str


ROWS = {
    "a1": Row("SIGKILL at any moment of a save", "only whole steps are listed; the same command goes on from the last one and ends bitwise as the undisturbed run"),
    "a2": Row("SIGKILL between saves", "at most `run.save_every` steps are done again; each step is in metrics.jsonl once"),
    "a3": Row("SIGTERM while training", "the step is finished and saved, exit 143; the same command goes on there, bitwise"),
    "a4": Row("SIGTERM in any other phase", "noticed within a chunk; finished chunks are kept, nothing of the partial pass is reported"),
    "a5": Row("a second signal; Ctrl-C", "the first Ctrl-C is as SIGTERM (130); the second signal ends at once, the last step is whole"),
    "a6": Row("SIGTERM before the first step", "exit 143; the same command starts cleanly"),
    "a7": Row("plain resume, in mid-epoch or between two", "bitwise the uninterrupted run, for every network and option; the test fails where a step is left out"),
    "a8": Row("`train.steps` raised", "the run goes on, and warns where the schedule depends on it"),
    "a9": Row("resume with another config or other data", "exit 2 with the difference; nothing is written"),
    "a10": Row("resume with a harmless change", "accepted, and said"),
    "a11": Row("a finished run, started again", "exit 0 in seconds, no file changes"),
    "a12": Row("another number of devices", "restored with a warning; equal to rounding"),
    "a13": Row("two processes on one workdir", "the second exits 2 and names the first; SIGKILL frees the lock"),
    "a14": Row("a torn last line of metrics, rows of lost steps", "dropped; no step occurs twice"),
    "a15": Row("a workdir that was moved or copied", "goes on; no absolute path is kept"),
    "a16": Row("a killed evaluation", "only missing chunks are done; the number is bitwise the same"),
    "a17": Row("waiting for a checkpoint that never comes", "a time-out, exit 3, says what was watched"),
    "b18": Row("a flipped bit in the newest step", "named by leaf and set aside; the step before is used; the run ends bitwise equal"),
    "b19": Row("a file of a step cut, emptied, zeroed or gone", "as b18, or harmless: no wrong weight is ever loaded"),
    "b20": Row("every step damaged", "exit 3 and what was tried; never a silent fresh start"),
    "b21": Row("empty step directories, strange files, leftovers", "left alone, and never deleted where they are not ours"),
    "b22": Row("a full disk in a save", "exit 5 with bytes needed and free; the last good step verifies; the same command goes on when there is space"),
    "b23": Row("a full disk for pictures only", "one warning, the run goes on"),
    "b24": Row("a save that fails behind our back", "the run ends at once, exit 5; no such step counts as saved"),
    "b25": Row("a workdir that cannot be written, or has an odd name", "told before anything is compiled, exit 2; odd names work"),
    "b26": Row("a metric that gets worse and worse", "the newest steps and the best one stay"),
    "b27": Row("`--resume_step` below the newest", "newer steps are moved aside, and saves go on"),
    "b28": Row("a checkpoint of another model", "exit 2 with up to ten leaves; nothing is cast or half loaded"),
    "b29": Row("a checkpoint of another version", "read bitwise, or exit 2 with both schemas"),
    "b30": Row("clocks that go backwards", "steps are chosen by number"),
    "c31": Row("a loss or gradient that is not finite", "not applied, never saved, explained in nonfinite_step_k.json, exit 4"),
    "c32": Row("the same on a step that is not logged", "caught before the next save"),
    "c33": Row("a spike, where `optimizer.skip_spikes` is on", "skipped and counted; the window is part of the state"),
    "c34": Row("bad pixels in the data", "exit 3 with file and index; constant images are a warning"),
    "c35": Row("the empirical score at extreme noise", "finite, and that of float64"),
    "c36": Row("any chunk, any order of the data", "the same score and neighbours; padding never wins"),
    "c37": Row("a query that is a copy, or nearly", "distance 0 and the right index; right to float64 nearby"),
    "c38": Row("duplicates among the training data", "collapsed for the second neighbour, and counted"),
    "c39": Row("one, two or few training points", "a stated rule, or a refusal with the reason"),
    "c40": Row("Frechet distance of degenerate sets", "0 for equal sets, never negative; warned of small ones"),
    "c41": Row("masks: none, all, ties, wrong ones", "dense to the bit; the residual path; by index; refused"),
    "c42": Row("samples in any chunks, on any devices", "the same images by index"),
    "c43": Row("one core or all", "bitwise equal"),
    "c44": Row("an EMA that is longer than the run", "both weights are evaluated, and the run warns"),
    "d45": Row("an unknown field", "exit 2 and what may be meant"),
    "d46": Row("numbers as people write them", "taken"),
    "d47": Row("fields out of range or at odds", "all of them in one list, before data and compilation"),
    "d48": Row("a config file that is missing or fails", "one message with file and line"),
    "d49": Row("every shipped config", "parses, and a dry run writes nothing"),
    "d50": Row("an archive that is damaged or absent", "exit 3, what is wrong and how to get it; no network is asked"),
    "d51": Row("a hostile archive", "refused; nothing outside, bounded memory"),
    "d52": Row("arrays of objects", "refused unread"),
    "d53": Row("pickles in place of data or weights", "never unpickled; the converter takes tensors alone"),
    "d54": Row("safetensors that lie", "refused before they take memory; leaves are listed"),
    "d55": Row("image folders with all that folders have", "conversions are defined, unreadable files named or, if so told, skipped and counted"),
    "d56": Row("labels that are missing or out of range", "exit 3"),
    "d57": Row("Inception weights absent, partial, wrong", "FID is left out with one line, or exit 3 where it is required"),
    "e58": Row("10,000 against 50,000 images", "memory within the stated budget; no n x m x d array"),
    "e59": Row("memory that ends", "the chunk is halved, and the result is the same; below the least, one message"),
    "e60": Row("recompilation", "one compilation of the train step, resume included"),
    "e61": Row("leaks", "memory and threads stay as they are over 2,000 steps"),
    "f62": Row("two processes", "they train what one does; only the first writes; each example once an epoch"),
    "f63": Row("one of them killed, or never there", "the other exits 6 and names it; started again they go on bitwise"),
    "f64": Row("SIGTERM to one only", "both stop at the same saved step, exit 143"),
    "f65": Row("another config, data or directory on one of them", "all exit 2 at the start"),
    "g66": Row("a point of a sweep that fails; a killed sweep", "the others finish; only what is missing is done again; gaps are shown as gaps"),
    "g67": Row("trackers, displays or networks that are not there", "metrics.jsonl always; one warning; no prompt, no hang"),
    "g68": Row("closed pipes, narrow terminals, hostile names", "no traceback, no control codes in files, HTML escaped"),
    "h69": Row("folders and files of other programs between the images; endings that are not read; linked classes ([pytorch/vision#2831](https://github.com/pytorch/vision/issues/2831), [open-mmlab/mmpretrain#507](https://github.com/open-mmlab/mmpretrain/issues/507))", "skipped by name and told; images are known by their content, other files are counted by their endings; links are followed, circles named"),
    "h70": Row("labels: dataset.json of StyleGAN and EDM, zips, folders named by numbers, empty classes, `train/` beside `val/`, the order of files ([NVlabs/stylegan2-ada-pytorch#18](https://github.com/NVlabs/stylegan2-ada-pytorch/issues/18), [pytorch/vision#714](https://github.com/pytorch/vision/issues/714), [pytorch/vision#4925](https://github.com/pytorch/vision/issues/4925), [modestyachts/ImageNetV2#10](https://github.com/modestyachts/ImageNetV2/issues/10))", "its labels are read, in place; numbers sort as numbers, an empty class keeps its own; splits are refused; the mapping is said and kept; files are in ImageFolder's order; a list stops at ten names"),
    "h71": Row("arrays: channels first, `np.savez(f, *batches)`, `np.savez(f, *images)`, images with labels, one image alone ([openai/guided-diffusion#117](https://github.com/openai/guided-diffusion/issues/117), [openai/improved-diffusion#150](https://github.com/openai/improved-diffusion/issues/150))", "channels first are refused everywhere by one check; numbered arrays are joined where they fit, else refused; one image is one"),
    "h72": Row("ranges: floats in [0, 1], masks of 0 and 1, float and 32-bit files, 12 bits in 16, other byte orders, sets that were scaled apart ([Lightning-AI/torchmetrics#1244](https://github.com/Lightning-AI/torchmetrics/issues/1244), [python-pillow/Pillow#2574](https://github.com/python-pillow/Pillow/issues/2574), [python-pillow/Pillow#5991](https://github.com/python-pillow/Pillow/issues/5991))", "what does not fill the range of its dtype is refused with the line that mends it, dark sets and unlike sets are told, byte orders converted"),
    "h73": Row("prepared unlike the trainer did it: crops, EXIF, transparency ([kohya-ss/sd-scripts#1316](https://github.com/kohya-ss/sd-scripts/issues/1316), [kohya-ss/sd-scripts#1269](https://github.com/kohya-ss/sd-scripts/issues/1269), [python-pillow/Pillow#4703](https://github.com/python-pillow/Pillow/issues/4703))", "how many images it concerns is told, with the switch for the other way; where nothing is found, an audit tries the other ways itself"),
    "h74": Row("files whose end was never written; broken EXIF ([pytorch/vision#138](https://github.com/pytorch/vision/issues/138))", "found by checksums, or by zeros at the end; a broken EXIF leaves the image as it is; black images are no damage"),
    "h75": Row("audits of a blank page, of one sample, of one held-out image, of features that are all 0", "what cannot be computed is left out with its reason; the copies are counted and the report is written"),
    "h76": Row("features of large images, a budget of memory", "all chunks follow `run.memory`, which is what the machine has by default"),
    "h77": Row("a `config.json` of another program, `~`, a run without samples", "a folder of images; a home; one message, and never the run's own figures"),
    "h78": Row("half precision, negative numbers in two words, JAX's debugging switches, another random generator on resuming", "read, named rightly, they work, and the run is not gone on with under other random numbers"),
    "h79": Row("two commands whose default workdirs would be cut to one name", "never one directory: such a name ends in a hash of the config"),
    "h80": Row("signals while one compiled call takes minutes", "saved before it looks, pieces of seconds, and a second signal ends the process whatever XLA does"),
    "h81": Row("`--dry_run` without data or network", "writes and fetches nothing, says what is missing, and how many hours a run takes"),
    "h82": Row("a network that has learned nothing yet, or was stopped early", "called undertrained, with the distances that say so; a run that was stopped has its report"),
    "h83": Row("the same samples beside held-out images and without", "the same distance, with the number of images that it is of"),
    "security": Row("pickles, archives, secrets, links, hostile files", "refused by construction: tests read the source, and bait it"),
    "fuzz": Row("random values for random fields of every config", "it builds, or one clean message names the field"),
}  # fmt: skip


def tests() -> dict[str, list[str]]:
    """The tests of each row, "file::name", as the source has them."""
    found: dict[str, list[str]] = {row: [] for row in ROWS}
    for path in sorted(HERE.glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and (m := PATTERN.match(node.name)):
                found.setdefault(m[1], []).append(f"{path.stem}::{node.name}")
    return found


def results(*paths) -> dict[str, collections.Counter]:
    """Outcomes of all cases of each test, "file::name"; of several runs, the last."""
    found: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for path in paths:
        here = collections.defaultdict(collections.Counter)
        for case in ElementTree.parse(path).iter("testcase"):
            file = case.get("classname", "").rpartition(".")[2]
            kinds = ("failure", "error", "skipped")
            outcome = next((k for k in kinds if case.find(k) is not None), "passed")
            here[f"{file}::{case.get('name', '').partition('[')[0]}"][outcome] += 1
        found.update(here)
    return found


def written(known, outcomes, days) -> str:
    """docs/reliability.md.   Args: days, on which the tests ran."""
    total: collections.Counter = collections.Counter()
    lines, section = [], None
    for row, (scenario, promise) in ROWS.items():
        letter = "s" if row in ("security", "fuzz") else row[0]
        if letter != section:
            section = letter
            lines += [
                f"\n## {TITLES[letter]}\n",
                "| | scenario | promised | tests | last result |",
                "|---|---|---|---|---|",
            ]
        cases = sum((outcomes[t] for t in known[row]), collections.Counter())
        kind = "refused" if {row, row[0]} & REFUSALS else "survived"
        total[kind] += cases["passed"]
        total["failed"] += cases["failure"] + cases["error"]
        total["skipped"] += cases["skipped"]
        shown = ", ".join(f"{n} {outcome}" for outcome, n in sorted(cases.items()))
        names = "<br>".join(f"`{t.partition('::')[2]}`" for t in known[row])
        lines.append(f"| {row} | {scenario} | {promise} | {names} | {shown} |")
    versions = ", ".join(
        f"{name} {metadata.version(name)}" for name in ("jax", "orbax-checkpoint")
    )
    soak = json.loads((ROOT / "docs/results/soak.json").read_text())
    counts = collections.Counter(soak["counts"])
    stops = sum(n for name, n in counts.items() if name.startswith("stopped by"))
    return "\n".join(
        [
            "# Reliability: what is promised, and the test that holds it",
            "",
            "*Same config, same jax version, same platform and device count: bitwise "
            "equal, through any\nnumber of kills; else equal to rounding.* Exit codes: "
            "0 done; 2 usage, config or state\nconflict; 3 data or integrity; 4 not "
            "finite; 5 storage; 6 another process is missing;\n130 Ctrl-C and 143 "
            "SIGTERM, after a save; 1 a bug.",
            "",
            "All tests are in `tests/faults/`. The table is made by the two commands in "
            "`tests/faults/rows.py`;\nwhat it shows ran on "
            f"{' to '.join(sorted({min(days), max(days)}))}, Python "
            f"{platform.python_version()}, {versions}.",
            "",
            f"- Faults injected and survived: {total['survived']:,} cases, and in the "
            f"[soak](results/soak.md) {stops:,} stops and\n  "
            f"{counts['bits flipped']:,} flipped bits in {counts['rounds']:,} runs, "
            f"{len(soak['rounds unequal'])} of which differed in any bit.",
            f"- Bad inputs tried and refused: {total['refused']:,} cases (one of them "
            "may hold many: the fuzz of configs\n  says how many).",
            f"- Failed: {total['failed']:,}. Skipped for want of something on the "
            f"machine: {total['skipped']:,}.",
            *lines,
            "",
        ]
    )


if __name__ == "__main__":
    paths = sys.argv[1:]
    days = [
        ElementTree.parse(p).find(".//testsuite").get("timestamp")[:10] for p in paths
    ]
    sys.stdout.write(written(tests(), results(*paths), days))
