"""Numbers as the cells of tables, for pages and for terminals."""

import numpy as np

from memsep_jax.experiments.reporting.verdict import between, percent, point

STAGES = {  # row of the table -> (which network, which step of it)
    "as trained": ("control", 0),
    "pruned": ("pruned", 0),
    "pruned, fine-tuned": ("pruned", -1),
    "control: fine-tuned": ("control", -1),
}


def table(metrics, intervals=True):
    """The scalars in the table of metrics.json as text.   (columns, rows).

    The columns are metrics["columns"] where a study has more numbers than a page is
    wide. A point of which all seeds failed has n/a for its numbers.
    """
    columns = list(metrics.get("columns", [])) or _scalars(metrics["table"])
    rows = [
        [
            "n/a"
            if row.get("seeds") == 0 and name not in row
            else _cell(row.get(name), intervals)
            for name in columns
        ]
        for row in metrics["table"]
    ]
    return columns, rows


def without_gaps(rows):
    """The rows of which some seed did not fail."""
    return [row for row in rows if row.get("seeds") != 0]


def quality(metrics) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """The quality of the samples of a run or audit: (columns, (name, cells) of rows).

    Numbers of an older version have no rows.
    """
    pixels, of, rows = metrics["memorization"], point(metrics, of_training=False), []
    for row in metrics.get("frechet", []):
        if "left_out" in row:
            missing = f"not measured: {row['left_out']}"
            rows.append((row["title"], [missing, "", "", ""]))
            continue
        samples, train, page = (f"{row[k]:.3g}" for k in ("samples", "train", "page"))
        name = f"{row['title']} to held-out, n = {row['n']:,}"
        rows.append((name, [samples, train, "", page]))
    if pixels.get("held_out_median_d1") is not None:
        keys = ("median_d1", "held_out_median_d1")
        samples, held_out = (f"{pixels[key]:.3g}" for key in keys)
        rows.append(("median d1", [samples, "", held_out, ""]))
    columns = ["samples", f"training {of}s", f"held-out {of}s", f"the mean {of} alone"]
    return columns, rows


def quality_lines(metrics) -> list[tuple[str, str]]:
    """`quality` for a terminal: (name, text)."""
    columns, rows = quality(metrics)
    lines = []
    for name, (samples, *others) in rows:
        named = zip(columns[1:], others, strict=True)
        beside = ", ".join(f"{what} {value}" for what, value in named if value)
        lines.append((name, f"{samples} ({beside})" if beside else samples))
    return lines


def by_reference(rows) -> tuple[list[str], dict[str, dict[str, str]]]:
    """The quality metrics of an audit: (reference sets, metric -> set -> text)."""
    references = list(dict.fromkeys(row["reference"] for row in rows))
    cells: dict[str, dict] = {}
    for row in rows:
        text = f"{row['value']:.4g}"
        text += f" (std {row['std']:.2g})" if row["std"] is not None else ""
        text += f", n = {row['images']:,}"
        cells.setdefault(row["metric"], {})[row["reference"]] = text
    return references, cells


def pruning(metrics) -> dict:
    """The table of a run that was pruned; without rows where it was not."""
    if "pruning" not in metrics:
        return {"rows": []}
    known = metrics["pruning"]
    kept = np.array(known["pruned"]["keep"])
    columns = ["memorized", "points emitted", "precision", "recall"]
    columns += ["Frechet distance", "parameters", "FLOPs per call"]
    return {
        "settings": known["settings"],
        "removed": int((~kept).sum()),
        "units": kept.size,
        "columns": columns,
        "rows": [(text, _pruned(known[name], i)) for text, (name, i) in STAGES.items()],
    }


def _pruned(network, i) -> list[str]:
    interval = network["ratio_low"][i], network["ratio_high"][i]
    cells = [f"{percent(network['ratio'][i])} % {between(interval)}"]
    for name in ("emitted", "precision", "recall"):
        value = network[name][i]
        cells.append("" if value is None else f"{percent(value)} %")
    frechet = network["frechet"][i]
    cells.append("" if frechet is None else f"{frechet:.3g}")
    return [*cells, f"{network['parameters']:,}", f"{network['flops'] or 0:.3g}"]


def _scalars(rows) -> list[str]:
    """The names of all scalars: the axes first, then the ratio where there is one."""
    columns: list[str] = []
    for row in rows:
        scalar = [k for k, v in row.items() if not isinstance(_mean(v), list)]
        columns += [k for k in scalar if k not in columns]
    first = without_gaps(rows)[0]
    return sorted(columns, key=lambda k: (isinstance(first.get(k), dict), k != "ratio"))


def _mean(value):
    return value["mean"] if isinstance(value, dict) else value


def _cell(value, interval):
    if not isinstance(value, dict):
        return "" if value is None else f"{value:,}" if _whole(value) else f"{value}"
    mean, low, high = value["mean"], value["low"], value["high"]
    if mean is None:
        return ""
    # A mean of counts is shown as one, unless it is too large to be read in full.
    whole = mean == round(mean) and abs(mean) < 1e9
    text = f"{mean:,.0f}" if whole else f"{mean:.3g}"
    known = interval and low is not None and low != high
    return f"{text} [{low:.3g}, {high:.3g}]" if known else text


def _whole(value):
    # True and False are integers for Python.
    return isinstance(value, int) and not isinstance(value, bool)
