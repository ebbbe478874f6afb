"""The numbers in a workdir as figures/ and one self-contained report.html."""

import base64
import contextlib
import csv
import re
from pathlib import Path, PurePath

import jinja2
import numpy as np

from memsep_jax import memorization
from memsep_jax.checkpoint import ConflictError
from memsep_jax.experiments.reporting import figures, verdict
from memsep_jax.experiments.reporting.verdict import between, percent
from memsep_jax.experiments.runtime import record
from memsep_jax.experiments.runtime.session import Terminal

PHASES = (
    "data", "compile", "train", "prune", "sample", "neighbours", "quality",
)  # fmt: skip
GROUPS = ("first", "most", "least")
ALWAYS = ("metrics.json", "config.json", "run.json", "per_sample.csv", "pairs.npz")
OF_RUN = ("config.json", "run.json")
SAMPLED = (*ALWAYS, "samples.npz")
AUDITED = (*ALWAYS, "duplicates.csv")
GRIDS = 3  # of samples along training, of a run that has not ended
REPEATS = 20  # duplicates of a training set that are listed
# The directories of an absolute path, and of one in the home of somebody.
PATH = r"""(?<![\w.:/])(?:/\S|~\w*/)(?:[^'"\n:;,=]*/)?(?<=/)"""


def write(workdir, say, place=None, config=None):
    """Draws figures/ and report.html from the numbers in a workdir, and only these.

    Args: place, where those of an evaluation lie; by default in the workdir. config,
      of the drawing, as `run` has one.
    Raises: ConflictError where numbers are missing. A disk that takes no more is one
      warning: the numbers are what a run is for.
    """
    attempt = figures.quietly(say)
    _write(Path(workdir), attempt, config, place)


def run(config, workdir, draw_sweep=None):
    """Draws again, without training; a full disk is an error.

    Args: draw_sweep, of the study that left the numbers: see `write_sweep`.
    """
    workdir = Path(workdir)
    metrics = record.read_json(workdir / "metrics.json") or {}
    if draw_sweep is not None:
        _write_sweep(workdir, draw_sweep, lambda draw, *args: draw(*args))
    elif metrics.get("experiment") == "audit":
        _write_audit(workdir, lambda draw, *args: draw(*args), config)
    else:
        _write(workdir, lambda draw, *args: draw(*args), config)
    console = Terminal(highlight=False, soft_wrap=True)
    with contextlib.suppress(OSError):  # a full disk, where that is where it goes
        console.print(f"report: {workdir / 'report.html'}", markup=False)


def _write(workdir, attempt, config=None, place=None):
    numbers = _read(workdir, SAMPLED, place)
    numbers["rows"] = record.read_metrics(workdir / "metrics.jsonl")
    images, shown = {}, _may_show(numbers, config)
    for name, figure in _figures(numbers, shown):
        images[name] = figures.encode(figure, "png")
        folder = workdir / "figures"
        attempt(_save, folder / f"{name}.png", images[name])
        attempt(_save, folder / f"{name}.pdf", figures.encode(figure, "pdf"))
    page = _page(workdir, numbers, images, shown)
    attempt(_save, workdir / "report.html", page.encode("utf-8", "replace"))


def write_sweep(workdir, draw, say):
    """As `write`, for the numbers of a sweep.

    Args: draw, (metrics, points) -> (name, caption, figure) for each figure; points
      is what `record.read_points` gives.
    """
    attempt = figures.quietly(say)
    _write_sweep(Path(workdir), draw, attempt)


def _write_sweep(workdir, draw, attempt):
    names = ("metrics.json", "config.json", "run.json")
    metrics, config, run = (record.read_json(workdir / name) for name in names)
    if metrics is None or config is None or run is None:
        raise ConflictError(
            f"{workdir} has no readable {', '.join(names)}: a report is drawn from the "
            "numbers of a finished run"
        )
    images = []
    drawn = metrics | {"table": _without_gaps(metrics["table"])}
    for name, caption, figure in draw(drawn, record.read_points(workdir, metrics)):
        png = figures.encode(figure, "png")
        attempt(_save, workdir / "figures" / f"{name}.png", png)
        pdf = figures.encode(figure, "pdf")
        attempt(_save, workdir / "figures" / f"{name}.pdf", pdf)
        images.append((name, caption, base64.b64encode(png).decode()))
    columns, rows = table(metrics)
    groups = metrics.get("groups", {"": range(len(rows))})
    page = _render(
        "sweep.html",
        title=workdir.resolve().name,
        metrics=metrics,
        # The class of the error alone: what it says may name paths.
        failed={
            name: (why or "").partition(":")[0]
            for name, why in metrics.get("failed", {}).items()
        },
        columns=columns,
        tables={name: [rows[i] for i in its] for name, its in groups.items()},
        run=run,
        config=_settings(config),
        images=images,
    )
    attempt(_save, workdir / "report.html", page.encode("utf-8", "replace"))


def write_audit(workdir, say):
    """As `write`, for the numbers of an audit; and pairs.png beside them."""
    _write_audit(Path(workdir), figures.quietly(say))


def _write_audit(workdir, attempt, config=None):
    numbers = _read(workdir, AUDITED)
    metrics, run = numbers["metrics.json"], numbers["run.json"]
    images = {}
    for name, figure in _audit_figures(numbers, _may_show(numbers, config)):
        images[name] = figures.encode(figure, "png")
        attempt(_save, workdir / "figures" / f"{name}.png", images[name])
        pdf = figures.encode(figure, "pdf")
        attempt(_save, workdir / "figures" / f"{name}.pdf", pdf)
    if "pairs_pixels" in images:
        attempt(_save, workdir / "pairs.png", images["pairs_pixels"])
    rows = zip(*numbers["duplicates.csv"].values(), strict=True)
    page = _render(
        "audit.html",
        title=workdir.resolve().name,
        metrics=metrics,
        verdict=metrics["verdict"],
        notes=metrics["notes"],
        beside=verdict.quality(metrics),
        quality=_quality(metrics["quality"]),
        duplicates=list(rows)[:REPEATS],
        run=run,
        config=_settings(numbers["config.json"]),
        images={k: base64.b64encode(v).decode() for k, v in images.items()},
    )
    attempt(_save, workdir / "report.html", page.encode("utf-8", "replace"))


def _may_show(numbers, config):
    """Whether training data may be seen: not where the run, or the redrawing, says no.

    Args: config, of the redrawing; None where there is none.
    """
    settings = (numbers["config.json"], config or {})
    return all(known.get("run", {}).get("images", True) for known in settings)


def _audit_figures(numbers, pairs_too):
    """(name, figure) for all figures of an audit."""
    table, threshold = (
        numbers["per_sample.csv"],
        numbers["metrics.json"]["memorization"]["threshold"],
    )
    for space, prefix in ("pixels", ""), ("features", "feature_"):
        if f"{prefix}d1" not in table:
            continue
        d1, d2 = table[f"{prefix}d1"], table[f"{prefix}d2"]
        share = memorization.quotient(d1, d2)
        copied = table[f"{prefix}memorized"] == 1
        yield f"distances_{space}", figures.distance_ratios(share, copied, threshold)
        if not pairs_too:
            continue
        pairs = numbers["pairs.npz"]
        index = pairs[f"{space}_index"]
        fields = ("sample", "neighbours", "distances", "nearest")
        arrays = (pairs[f"{space}_{field}"] for field in fields)
        yield f"pairs_{space}", figures.pairs(index, *arrays, copied[index])


def _quality(rows):
    """Rows of metrics.json's quality as a table: a row a metric, a column a set."""
    references = list(dict.fromkeys(row["reference"] for row in rows))
    cells: dict[str, dict] = {}
    for row in rows:
        text = f"{row['value']:.4g}"
        text += f" (std {row['std']:.2g})" if row["std"] is not None else ""
        text += f", n = {row['images']:,}"
        cells.setdefault(row["metric"], {})[row["reference"]] = text
    return references, cells


def table(metrics, intervals=True):
    """The scalars of metrics.json's table as text.   (columns, rows).

    Those of metrics["columns"], where an experiment measures more than a page is wide.
    Where all seeds of a point failed, its numbers are n/a.
    """
    first = _without_gaps(metrics["table"])[0]
    columns = list(metrics.get("columns", []))
    if not columns:
        for row in metrics["table"]:
            scalar = [k for k, v in row.items() if not isinstance(_mean(v), list)]
            columns += [k for k in scalar if k not in columns]
        # The axes, then the ratio where there is one.
        columns.sort(key=lambda k: (isinstance(first.get(k), dict), k != "ratio"))
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


def _without_gaps(table):
    return [row for row in table if row.get("seeds") != 0]


def _mean(value):
    return value["mean"] if isinstance(value, dict) else value


def _cell(value, interval):
    if not isinstance(value, dict):
        return "" if value is None else f"{value:,}" if _whole(value) else f"{value}"
    mean, low, high = value["mean"], value["low"], value["high"]
    if mean is None:
        return ""
    whole = mean == round(mean) and abs(mean) < 1e9
    text = f"{mean:,.0f}" if whole else f"{mean:.3g}"
    known = interval and low is not None and low != high
    return f"{text} [{low:.3g}, {high:.3g}]" if known else text


def _whole(value):
    return isinstance(value, int) and not isinstance(value, bool)


def _read(workdir, names, place=None):
    """All numbers of a finished run.   Raises: ConflictError, naming what lacks.

    Args: place, where those of an evaluation lie, where it is not the workdir.
    """
    read = {".json": record.read_json, ".npz": record.read_npz, ".csv": _read_csv}
    places = dict.fromkeys(names, place or workdir) | dict.fromkeys(OF_RUN, workdir)
    numbers = {name: read[Path(name).suffix](places[name] / name) for name in names}
    missing = [name for name, value in numbers.items() if value is None]
    if missing:
        command = (numbers["run.json"] or {}).get("command")
        raise ConflictError(
            f"{workdir} has no readable {', '.join(missing)}: a report is drawn from "
            "the numbers of a finished run. Make them with "
            + (command or "the same command without --config.experiment=report")
        )
    return numbers


def _read_csv(path):
    """Columns by name: floats, or words."""
    try:
        with open(path, newline="") as file:
            names, *rows = csv.reader(file)
        columns = zip(*rows, strict=True) if rows else [()] * len(names)
        return {k: _column(c) for k, c in zip(names, columns, strict=True)}
    except (OSError, ValueError):
        return None


def _column(words):
    try:
        return np.array(words, float)
    except ValueError:
        return np.array(words)


def _figures(numbers, pairs_too):
    """(name, figure) for all figures of a run."""
    metrics, rows, table = (
        numbers[k] for k in ("metrics.json", "rows", "per_sample.csv")
    )
    found, levels = metrics["memorization"], metrics.get("levels", {})
    if any(row.get("loss") is not None for row in rows):
        yield "loss", figures.losses(rows)
    if levels.get("train"):
        lines = (levels[k] for k in ("noise", "train", "held_out"))
        yield "noise_levels", figures.noise_levels(*lines)
    if steps := metrics["model"].get("steps"):  # a closed-form score has none
        yield "ratio", figures.ratio_along(rows, found | {"step": steps})
    if "pruning" in metrics:
        yield "pruning", figures.curves([_along(metrics["pruning"])])
    d1, d2 = table["d1"], table["d2"]
    share = memorization.quotient(d1, d2)
    memorized = table["memorized"] == 1
    yield "distances", figures.distance_ratios(share, memorized, found["threshold"])
    if not pairs_too:
        return
    pairs = numbers["pairs.npz"]
    if _of_images(metrics):
        for name in GROUPS:
            index = pairs[f"{name}_index"]
            fields = ("sample", "neighbours", "distances", "nearest")
            arrays = (pairs[f"{name}_{field}"] for field in fields)
            yield f"pairs_{name}", figures.pairs(index, *arrays, memorized[index])
    else:
        lines = [
            np.concatenate([pairs[f"{name}_{what}"] for name in GROUPS])
            for what in ("sample", "neighbours")
        ]
        lines[1] = lines[1][:, 0]
        samples = numbers["samples.npz"]["samples"]
        yield "scatter", figures.scatter(samples, memorized, lines)


def _along(pruning):
    """The panel of memorization along fine-tuning."""
    labels = {"pruned": "pruned", "control": "not pruned: the control"}
    lines = [
        figures.Line(
            found["steps"], found["ratio"], label, found["ratio_low"],
            found["ratio_high"],
        )
        for found, label in ((pruning[name], labels[name]) for name in labels)
    ]  # fmt: skip
    return figures.Panel(
        "memorization along fine-tuning", lines, "step of fine-tuning",
        "memorized samples", xscale="linear", yscale="linear", percent=True,
    )  # fmt: skip


def pruning(metrics) -> dict:
    """What is said of the pruning of a run, as text; no rows where there was none."""
    if "pruning" not in metrics:
        return {"rows": []}
    known = metrics["pruning"]
    places = {
        "as trained": ("control", 0),
        "pruned": ("pruned", 0),
        "pruned, fine-tuned": ("pruned", -1),
        "control: fine-tuned": ("control", -1),
    }
    rows = []
    for text, (name, i) in places.items():
        found = known[name]
        low, high = found["ratio_low"][i], found["ratio_high"][i]
        cells = [f"{percent(found['ratio'][i])} % {between((low, high))}"]
        for key in ("emitted", "precision", "recall"):
            value = found[key][i]
            cells.append("" if value is None else f"{percent(value)} %")
        value = found["frechet"][i]
        cells.append("" if value is None else f"{value:.3g}")
        cells += [f"{found['parameters']:,}", f"{found['flops'] or 0:.3g}"]
        rows.append((text, cells))
    kept = np.array(known["pruned"]["keep"])
    columns = ["memorized", "points emitted", "precision", "recall"]
    columns += ["Frechet distance", "parameters", "FLOPs a call"]
    return {
        "settings": known["settings"],
        "removed": int((~kept).sum()),
        "units": kept.size,
        "columns": columns,
        "rows": rows,
    }


def _save(path, content):
    with record.replacing(path) as part:
        part.write_bytes(content)


def _grids(workdir, unfinished):
    """(step, image) of the last grids of samples along training, up to where it is."""
    found = {
        int(path.stem.removeprefix("step_")): path
        for path in sorted((workdir / "samples").glob("step_*.png"))
    }
    steps = [step for step in found if step <= unfinished["step"]][-GRIDS:]
    return [(s, base64.b64encode(found[s].read_bytes()).decode()) for s in steps]


def _page(workdir, numbers, images, shown):
    metrics, run = numbers["metrics.json"], numbers["run.json"]
    found, seconds = metrics["memorization"], run.get("seconds", {})
    unfinished = metrics.get("unfinished")
    # The report itself is left out: its time is known only after it is written.
    phases = [(name, seconds[name]) for name in PHASES if name in seconds]
    return _render(
        "report.html",
        title=workdir.resolve().name,
        point=verdict.point(metrics),
        found=found,
        # Numbers of an older version have no verdict of their own.
        verdict=metrics.get("verdict") or verdict.verdict(metrics),
        notes=metrics.get("notes", []),
        beside=verdict.quality(metrics),
        unfinished=unfinished,
        grids=_grids(workdir, unfinished) if unfinished and shown else [],
        steps=verdict.steps(metrics) if "steps" in metrics["model"] else "",
        data=metrics["data"],
        model=metrics["model"],
        levels=metrics.get("levels", {}),
        pruning=pruning(metrics),
        run=run,
        config=_settings(numbers["config.json"]),
        phases=phases,
        total=sum(value for _, value in phases),
        images={k: base64.b64encode(v).decode() for k, v in images.items()},
    )


def _render(template, **values):
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(
        percent=percent, between=between, zip=zip, pathless=pathless
    )
    return environment.get_template(template).render(**values)


def _settings(config):
    """(group, its fields and values) of all that is set; of a path, its last part."""
    plain = {k: v for k, v in config.items() if not isinstance(v, dict)}
    groups = {"": plain, **{k: v for k, v in config.items() if isinstance(v, dict)}}
    shown = {
        group: [(k, _shown(v)) for k, v in fields.items() if v is not None]
        for group, fields in groups.items()
    }
    first = {group: sorted(fields, key=_name_first) for group, fields in shown.items()}
    return list(first.items())


def _name_first(field):
    return field[0] != "name", field[0]


def _shown(value):
    if isinstance(value, str) and (PurePath(value).is_absolute() or value[:1] == "~"):
        return f".../{PurePath(value).name}"
    return f"{value:g}" if isinstance(value, float) else pathless(str(value))


def pathless(text: str) -> str:
    """A text without the directories of its absolute paths: a page is for others."""
    return re.sub(PATH, ".../", text)


def _of_images(metrics):
    return len(metrics["data"]["shape"]) == 3
