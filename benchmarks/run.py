"""All benchmarks in one table: against the peers, and against the machine's limits.

python benchmarks/run.py [--only NAME ...] [--quick] [--json=FILE.json]
    [--markdown=FILE.md] [--beside FILE.json ...]

Needs the extra `dev` (torch, faiss-cpu). First limits.py measures the limits of the
machine. Then the benchmarks run in separate processes, one after another, with sizes
for a CPU or a GPU (`--quick`: small sizes, which take little time and say little). A
benchmark that fails becomes a row with the reason, and the exit code is 1. With several
GPUs, make only one visible. The page has a column for this machine and one for each
file that --beside names, of an earlier run on another.

A ratio is the peer's fastest time over ours: above 1 ours is faster. The limit reached
is the shortest possible time on this machine over ours: the time of the FLOPs at the
rate of a large matrix product, or of the bytes that must be read and written at the
rate of memory, whichever is longer.
"""

import argparse
import datetime
import importlib.metadata
import json
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

HERE = Path(__file__).resolve().parent
RUNS = {  # script: (flags, more of them of a quick run)
    "empirical_score": ("--parts speed", "--n=500 --batch=32 --rounds=3"),
    "analytic": ("", "--n=100 --batch=2 --size=8 --patch=3 --rounds=1"),
    "neighbours": ("--rounds=1", "--n=1000 --m=256 --size=8 --rounds=1"),
    "lipschitz": ("", "--n=500 --d=192 --probes=4 --iters=5 --size=8 --dit_width=32 "
                  "--dit_depth=1 --dit_heads=2 --rounds=1"),
    "train_step": ("", "--size=8 --batch=4 --unet_width=8 --unet_depth=1 "
                   "--dit_width=32 --dit_depth=1 --dit_heads=2 --samples=4 --rounds=1"),
    "pruned": ("--ratios 0.5 --rounds=1", "--width=16 --depth=2 --num_heads=4 "
               "--size=8 --batch=2 --rounds=1"),
}  # fmt: skip
QUICK_LIMITS = "--side=256 --megabytes=16 --seconds=0.1"
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "torch", "faiss-cpu")
LIMITS = {
    "float32": "products of float32, at highest precision",
    "default": "the same at default precision, TF32 on a GPU",
    "bfloat16": "products of bfloat16",
    "memory": "memory, read and written",
}


def start(script, flags):
    """The JSON of a benchmark, or {"failed": why}."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        command = [sys.executable, str(HERE / f"{script}.py"), *flags, f"--json={path}"]
        began = time.perf_counter()
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if done.returncode == 0:
            seconds = round(time.perf_counter() - began, 1)
            return json.loads(path.read_text()) | {"seconds": seconds}
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        sys.stderr.write(done.stderr)
        return {"failed": said[-1]}


def row(case, limits):
    """A case of a benchmark, with its ratio and its share of the limit that binds.

    Args: case with "ours_s", "peer_s" or None, "flops", "bytes" and "product"; limits,
      {"float32" and other products: FLOP/s, "memory": bytes/s}, or none of them.
    """
    made = case | {"ratio": None, "limit": None, "share": None}
    if case["peer_s"] is not None:
        made["ratio"] = case["peer_s"] / case["ours_s"]
    if limits:
        seconds = {
            case["product"]: case["flops"] / limits[case["product"]],
            "memory": case["bytes"] / limits["memory"],
        }
        made["limit"] = max(seconds, key=seconds.get)
        made["share"] = seconds[made["limit"]] / case["ours_s"]
    return made


def rows(found, limits):
    """The rows of all benchmarks.   Args: {benchmark: what it wrote, or failed}."""
    return [
        {"benchmark": name, **made}
        for name, written in found.items()
        for made in (
            [{"failed": written["failed"]}]
            if "failed" in written
            else [row(case, limits) for case in written["cases"]]
        )
    ]


TITLES = ("benchmark", "case", "ours, ms", "per second", "peer", "peer, ms", "ratio",
          "limit reached")  # fmt: skip


def cells(row):
    """A row of the table as texts."""
    if "failed" in row:
        return row["benchmark"], f"failed: {row['failed']}", *[""] * 6
    rate = row["items"] / row["ours_s"]
    return (
        row["benchmark"],
        row["case"],
        _digits(1e3 * row["ours_s"]),
        f"{_digits(rate)} {row['unit']}",
        row["peer"] or "",
        _digits(1e3 * row["peer_s"]) if row["peer"] else "",
        f"{row['ratio']:.2f}" if row["peer"] else "",
        f"{_digits(100 * row['share'])} % {row['limit']}" if row["limit"] else "",
    )


def _digits(value):
    """A number with three digits, or with all digits before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def rates(limits):
    """[(name, rate, what it is)] of the limits as texts."""
    units = {"memory": "GB/s"}
    return [
        (name, f"{rate / 1e9:,.0f} {units.get(name, 'GFLOP/s')}", LIMITS[name])
        for name, rate in limits.items()
    ]


def show(found):
    """The tables for a terminal."""
    table = Table(title=f"{found['device']}; ratio: the peer's time / ours")
    for title in TITLES:
        table.add_column(title)
    for row in found["rows"]:
        table.add_row(*map(escape, cells(row)))
    yield table
    table = Table()
    for title in ("limit", "rate", "of"):
        table.add_column(title)
    for texts in rates(found["limits"]):
        table.add_row(*texts)
    yield table


PAGE = """# Speed: ours, the peers, and what the machines can do

Seeds are fixed in the scripts. The machines:

{machines}

A cell has the ratio, our milliseconds, and the share of the machine's limit that we
reach. The ratio is the peer's time over ours, each the fastest of calls that take
turns: above 1 ours is faster. The worst ratio of a row is bold. The limit is the time
of the FLOPs at the rate of a large product, or of the bytes that must move at the rate
of memory, whichever is longer. It was measured in the same run (`benchmarks/limits.py`)
and varies by some percent from minute to minute on a shared machine, so a share may be
just above 100 %.

{rows}
"""


def markdown(runs):
    """The runs of several machines as a page.   Args: {name of a JSON: its content}.

    Without a name, nothing is linked.
    """
    machines, answers = [], {}
    for number, (name, found) in enumerate(runs.items(), start=1):
        said = {what: rate for what, rate, _ in rates(found["limits"])}
        versions = ", ".join(f"{k} {v}" for k, v in found["versions"].items())
        machines.append(
            [str(number), found["device"], *(said.get(k, "") for k in LIMITS)]
            + [f"`{found['command']}`, {found['date']}, {versions}"]
            + [f"[{name}]({name})" if name else ""]
        )
        for row in found["rows"]:
            key = tuple(row.get(k) or "" for k in ("benchmark", "case", "peer"))
            answers.setdefault(key, {})[number] = row
    rows = []
    for key, of in answers.items():
        ratios = [row["ratio"] for row in of.values() if row.get("ratio")]
        cell = [_cell(of.get(i + 1), min(ratios, default=0)) for i in range(len(runs))]
        rows.append([text.replace("|", "\\|") for text in [*key, *cell]])
    columns = ("benchmark", "case", "peer", *(f"machine {row[0]}" for row in machines))
    about = ("machine", "processor", *LIMITS, "run", "numbers")
    return PAGE.format(machines=_grid(about, machines), rows=_grid(columns, rows))


def _cell(row, worst):
    """Ratio, milliseconds and share of a row on one machine."""
    if row is None:
        return ""
    if "failed" in row:
        return f"failed: {row['failed']}"
    texts = [f"{_digits(1e3 * row['ours_s'])} ms"]
    if row["ratio"]:
        ratio = f"{row['ratio']:.2f}"
        texts.insert(0, f"**{ratio}**" if row["ratio"] == worst else ratio)
    if row["limit"]:
        texts.append(f"{_digits(100 * row['share'])} % {row['limit']}")
    return ", ".join(texts)


def _grid(titles, rows):
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def versions():
    """{package: version} of the installed packages."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--quick", action="store_true", help="small, to see it work")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    parser.add_argument("--markdown", type=Path, help="write the tables here")
    parser.add_argument(
        "--beside",
        nargs="+",
        type=Path,
        default=[],
        metavar="JSON",
        help="what --json wrote on other machines, for the tables",
    )
    args = parser.parse_args()
    # Read before anything is measured, which takes minutes.
    runs = {path.name: json.loads(path.read_text()) for path in args.beside}
    machine = start("limits", QUICK_LIMITS.split() if args.quick else [])
    about, limits = machine.get("about", {}), machine.get("limits", {})
    written = {"limits": machine | {"cases": []}}
    for name in args.only:
        whole, small = RUNS[name]
        flags = [*whole.split(), *(small.split() if args.quick else [])]
        written[name] = start(name, flags)
        # Nobody trains in bfloat16 on a CPU.
        if name == "train_step" and about.get("backend", "cpu") != "cpu":
            written[f"{name}, bfloat16"] = start(name, [*flags, "--dtype=bfloat16"])
    found = {
        "command": shlex.join(["python", "benchmarks/run.py", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": about.get("device", "unknown"),
        "versions": versions(),
        "limits": limits,
        "about": {
            name: one["about"] for name, one in written.items() if "about" in one
        },
        "seconds": {
            name: one["seconds"] for name, one in written.items() if "seconds" in one
        },
        "rows": rows(written, limits),
    }
    console = Console()
    if not console.is_terminal:  # of a file, whose lines have no end
        console.width = 160
    console.print(*show(found), sep="\n")
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")
    if args.markdown:
        own = args.json.name if args.json else ""
        args.markdown.write_text(markdown(runs | {own: found}))
    failed = [row["benchmark"] for row in found["rows"] if "failed" in row]
    raise SystemExit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
