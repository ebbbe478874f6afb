"""Draws figures/ and one self-contained report.html from the numbers in a workdir.

There are three kinds of pages: of a run, of a sweep and of an audit.
"""

import base64
import contextlib
import re
from pathlib import Path, PurePath

import jinja2
import numpy as np

from memsep_jax import memorization
from memsep_jax.checkpoint import ConflictError
from memsep_jax.experiments import record
from memsep_jax.experiments.config import schema
from memsep_jax.experiments.reporting import figures, tables, verdict
from memsep_jax.experiments.reporting.verdict import between, percent

PHASES = (
    "data", "compile", "train", "prune", "sample", "neighbours", "quality",
)  # fmt: skip
GROUPS = ("first", "most", "least")
ALWAYS = ("metrics.json", "config.json", "run.json", "per_sample.csv", "pairs.npz")
OF_RUN = ("config.json", "run.json")
SAMPLED = (*ALWAYS, "samples.npz")
AUDITED = (*ALWAYS, "duplicates.csv")
HELD_OUT = "held_out.csv"  # not of earlier versions, nor without held-out points
GRIDS = 3  # grids of samples along training that an unfinished run shows
STATISTICS = {  # of membership, as a legend names them
    "loss": "loss",
    "pia": "PIA",
    "secmi": "SecMI",
    "by_complexity": "loss, calibrated by complexity",
    "by_model": "loss, calibrated by a second network",
}
SPACES = {"pixels": "", "features": "feature_"}  # of an audit: prefixes of columns
REPEATS = 20  # duplicates of a training set that the page lists; the csv has all
# The directories of an absolute path, and of one in somebody's home.
PATH = r"""(?<![\w.:/])(?:/\S|~\w*/)(?:[^'"\n:;,=]*/)?(?<=/)"""


def write(workdir, say, place=None, config=None):
    """Draws figures/ and report.html from the numbers in a workdir, and only these.

    A full disk is one warning and no error: the numbers are what a run is for.

    Args: place, the directory of the numbers; by default the workdir. config, that of
      the command, which may hide training images.
    Raises: ConflictError where numbers are missing.
    """
    _write(Path(workdir), figures.quietly(say), config, place)


def write_sweep(workdir, draw, say):
    """As `write`, for the numbers of a sweep.

    Args: draw, (metrics, points) -> (name, caption, figure) of each picture; points
      are those of `record.read_points`.
    """
    _write_sweep(Path(workdir), draw, figures.quietly(say))


def write_audit(workdir, say):
    """As `write`, for the numbers of an audit; and pairs.png beside them."""
    _write_audit(Path(workdir), figures.quietly(say))


def run(config, workdir, draw_sweep=None, say=print):
    """Draws again, without training; a full disk is an error.

    Args: draw_sweep, of the study that left the numbers: see `write_sweep`; say, a line
      to the person.
    """
    workdir = Path(workdir)
    metrics = record.read_json(workdir / "metrics.json") or {}

    def attempt(draw, *args):  # as `figures.quietly`, but an error is raised
        draw(*args)

    if draw_sweep is not None:
        _write_sweep(workdir, draw_sweep, attempt)
    elif metrics.get("experiment") == "audit":
        _write_audit(workdir, attempt, config)
    else:
        _write(workdir, attempt, config)
    with contextlib.suppress(OSError):  # the output may go to the full disk itself
        say(f"report: {workdir / 'report.html'}")


def _write(workdir, attempt, config=None, place=None):
    numbers = _read(workdir, SAMPLED, place)
    numbers["rows"] = record.read_metrics(workdir / "metrics.jsonl")
    shown = _may_show(numbers, config)
    images = {
        name: _save_figure(workdir, name, figure, attempt)
        for name, figure in _figures(numbers, shown)
    }
    page = _page(workdir, numbers, images, shown)
    attempt(record.write_bytes, workdir / "report.html", page)


def _write_sweep(workdir, draw, attempt):
    numbers = _read(workdir, ("metrics.json", *OF_RUN))
    metrics, config, run = (numbers[k] for k in ("metrics.json", *OF_RUN))
    shown = metrics | {"table": tables.without_gaps(metrics["table"])}
    images = [
        (name, caption, _save_figure(workdir, name, figure, attempt))
        for name, caption, figure in draw(shown, record.read_points(workdir, metrics))
    ]
    columns, rows = tables.table(metrics)
    groups = metrics.get("groups", {"": range(len(rows))})
    page = _render(
        "sweep.html",
        title=workdir.resolve().name,
        metrics=metrics,
        # Only the class of the error: its message may name paths.
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
    attempt(record.write_bytes, workdir / "report.html", page)


def _write_audit(workdir, attempt, config=None):
    numbers = _read(workdir, AUDITED)
    metrics, run = numbers["metrics.json"], numbers["run.json"]
    images = {
        name: _save_figure(workdir, name, figure, attempt)
        for name, figure in _audit_figures(numbers, _may_show(numbers, config))
    }
    if "pairs_pixels" in images:  # not where training images must not be shown
        png = base64.b64decode(images["pairs_pixels"])
        attempt(record.write_bytes, workdir / "pairs.png", png)
    page = _render(
        "audit.html",
        title=workdir.resolve().name,
        metrics=metrics,
        verdict=metrics["verdict"],
        notes=metrics["notes"],
        beside=tables.quality(metrics),
        quality=tables.by_reference(metrics["quality"]),
        duplicates=_rows(numbers["duplicates.csv"], slice(REPEATS)),
        files=_files_of_pairs(numbers),
        run=run,
        config=_settings(numbers["config.json"]),
        images=images,
    )
    attempt(record.write_bytes, workdir / "report.html", page)


def of_notebook(workdir, say=str) -> str:
    """The verdict of an audit and its worst pairs, as html for a notebook.

    Args: say, text -> the same in the words of a prompt.
    """
    numbers = _read(Path(workdir), AUDITED)
    metrics, shown = numbers["metrics.json"], _may_show(numbers, None)
    known = metrics["verdict"]
    page = _render(
        "notebook.html",
        verdict=known | {part: say(known[part]) for part in ("text", "small")},
        notes=[say(note) for note in metrics["notes"]],
        advice=[say(line["text"]) for line in metrics["advice"]],
        images={
            name: base64.b64encode(figures.encode(figure, "png")).decode()
            for name, figure in _audit_figures(numbers, shown, too=False)
        },
        files=_files_of_pairs(numbers),
        features=metrics["features"],
    )
    return page.decode()


def _rows(columns, some) -> list[dict]:
    """Some rows of a table, each by the names of its columns."""
    values = (column[some].tolist() for column in columns.values())
    return [dict(zip(columns, row, strict=True)) for row in zip(*values, strict=True)]


def _files_of_pairs(numbers) -> dict[str, list[dict]]:
    """The files of the pairs that figures show, a row for each, by the figure's name.

    Sets that did not come from files have none.
    """
    table, found = numbers["per_sample.csv"], {}
    for space, prefix in SPACES.items():
        names = {"sample": "index", "file": "file"}
        for which in ("nearest", "second"):
            names[which] = f"{prefix}{which}"
            names[f"{which}_file"] = f"{prefix}{which}_file"
        some = numbers["pairs.npz"].get(f"{space}_index")
        columns = {name: table[own] for name, own in names.items() if own in table}
        if some is not None and any(name.endswith("file") for name in columns):
            found[f"pairs_{space}"] = _rows(columns, some)
    return found


def _may_show(numbers, config):
    """Whether training data may be shown: not where the run or this command forbids it.

    Args: config, that of the command; None where there is none.
    """
    settings = (numbers["config.json"], config or {})
    return all(known.get("run", {}).get("images", True) for known in settings)


def _audit_figures(numbers, pairs_too, too=True):
    """(name, figure) for all figures of an audit; too, whether beside its pairs."""
    table = numbers["per_sample.csv"]
    metrics = numbers["metrics.json"]
    threshold, features = metrics["memorization"]["threshold"], metrics["features"]
    names = {"pixels": "pixels"}
    if features:
        names["features"] = f"{features['name']} features"
    for space, prefix in SPACES.items():
        if f"{prefix}d1" not in table:
            continue
        d1, d2 = table[f"{prefix}d1"], table[f"{prefix}d2"]
        share = memorization.quotient(d1, d2)
        copied = table[f"{prefix}memorized"] == 1
        if too:
            held_out = _held_out(numbers, prefix)
            yield (
                f"distances_{space}",
                figures.distance_ratios(
                    share, copied, threshold, held_out, names[space]
                ),
            )
        if pairs_too:
            pairs = _pairs(numbers["pairs.npz"], space, copied, names[space])
            yield f"pairs_{space}", pairs
    if too and pairs_too:
        yield from _emitted(numbers["pairs.npz"])


def _read(workdir, names, place=None):
    """The numbers of a finished run by file name; HELD_OUT is None where it is not.

    Args: place, the directory of the numbers where it is not the workdir.
    Raises: ConflictError, which names the files that are missing.
    """
    read = {".json": record.read_json, ".npz": record.read_npz, ".csv": record.read_csv}
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
    held_out = record.read_csv((place or workdir) / HELD_OUT)
    return numbers | {HELD_OUT: held_out}


def _held_out(numbers, prefix=""):
    """d1 / d2 of held-out points, [l], or None where it is not known.

    Args: prefix, of the columns of a space.
    """
    table = numbers[HELD_OUT] or {}
    if f"{prefix}d1" not in table:
        return None
    return memorization.quotient(table[f"{prefix}d1"], table[f"{prefix}d2"])


def _figures(numbers, pairs_too):
    """(name, figure) for all figures of a run."""
    metrics, rows, table = (
        numbers[k] for k in ("metrics.json", "rows", "per_sample.csv")
    )
    final, levels = metrics["memorization"], metrics.get("levels", {})
    if any(row.get("loss") is not None for row in rows):
        yield "loss", figures.losses(rows)
    if levels.get("train"):
        lines = (levels[k] for k in ("noise", "train", "held_out"))
        yield "noise_levels", figures.noise_levels(*lines)
    if "membership" in levels:
        yield "membership", figures.curves([_membership(levels)])
    if steps := metrics["model"].get("steps"):  # a closed-form score has none
        yield "ratio", figures.ratio_along(rows, final | {"step": steps})
    if "pruning" in metrics:
        yield "pruning", figures.curves([_along(metrics["pruning"])])
    share = memorization.quotient(table["d1"], table["d2"])
    memorized = table["memorized"] == 1
    pixels = len(metrics["data"]["shape"]) == 3 and metrics["data"]["name"] != "latents"
    yield (
        "distances",
        figures.distance_ratios(
            share, memorized, final["threshold"], _held_out(numbers),
            "pixels" if pixels else "",
        ),
    )  # fmt: skip
    if pairs_too and len(metrics["data"]["shape"]) == 3:  # images
        for name in GROUPS:
            yield f"pairs_{name}", _pairs(numbers["pairs.npz"], name, memorized)
        yield from _emitted(numbers["pairs.npz"])
    elif pairs_too:
        samples, neighbours = (
            np.concatenate([numbers["pairs.npz"][f"{name}_{what}"] for name in GROUPS])
            for what in ("sample", "neighbours")
        )
        lines = samples, neighbours[:, 0]
        every = numbers["samples.npz"]["samples"]
        yield "scatter", figures.scatter(every, memorized, lines)


def _emitted(pairs):
    """(name, figure) of the training images that are emitted most and least."""
    if "emitted_most" in pairs:
        rows = {
            f"emitted {name}": pairs[f"emitted_{name}"] for name in ("most", "least")
        }
        yield "emitted", figures.image_rows(rows)


def _pairs(pairs, name, memorized, space=""):
    """The samples of one group beside their two nearest training images.

    Args: space, the name of what the distances are measured in.
    """
    index = pairs[f"{name}_index"]
    fields = ("sample", "neighbours", "distances", "nearest")
    arrays = (pairs[f"{name}_{field}"] for field in fields)
    return figures.pairs(index, *arrays, memorized[index], space)


def _membership(levels):
    """The panel of how well training points are told from others, by each statistic."""
    noise, lines = np.array(levels["noise"], float), []
    for name, label in STATISTICS.items():
        if name not in levels["membership"]:  # only a study has a second network
            continue
        # null is where a statistic was not finite: nan again.
        auc = np.array(levels["membership"][name]["auc"], float)
        low, high = np.array(levels["membership"][name]["interval"], float).T
        band = (low, high) if name == "loss" else ()  # all bands would hide each other
        lines.append(figures.Line(noise, auc, label, *band))
    chance = np.full(len(noise), 0.5)
    lines.append(figures.Line(noise, chance, "chance", style=":", color="black"))
    return figures.Panel(
        "who was in the training set", lines, "noise level, sigma / alpha", "AUC",
        yscale="linear", unit=True,
    )  # fmt: skip


def _along(pruning):
    """The panel of memorization along fine-tuning."""
    labels = {"pruned": "pruned", "control": "not pruned: the control"}
    lines = [
        figures.Line(
            run["steps"], run["ratio"], label, run["ratio_low"], run["ratio_high"]
        )
        for run, label in ((pruning[name], label) for name, label in labels.items())
    ]
    return figures.Panel(
        "memorization along fine-tuning", lines, "step of fine-tuning",
        "memorized samples", xscale="linear", yscale="linear", percent=True,
    )  # fmt: skip


def _save_figure(workdir, name, figure, attempt) -> str:
    """Saves a figure as PNG and PDF.   Returns: the PNG in base64, for the page."""
    png = figures.encode(figure, "png")
    attempt(record.write_bytes, workdir / "figures" / f"{name}.png", png)
    pdf = figures.encode(figure, "pdf")
    attempt(record.write_bytes, workdir / "figures" / f"{name}.pdf", pdf)
    return base64.b64encode(png).decode()


def _grids(workdir, unfinished):
    """(step, image) of the last grids of samples up to the step of the weights."""
    paths = {
        int(path.stem.removeprefix("step_")): path
        for path in sorted((workdir / "samples").glob("step_*.png"))
    }
    steps = [step for step in paths if step <= unfinished["step"]][-GRIDS:]
    return [(s, base64.b64encode(paths[s].read_bytes()).decode()) for s in steps]


def _page(workdir, numbers, images, shown):
    """The page of a run."""
    metrics, run = numbers["metrics.json"], numbers["run.json"]
    seconds, unfinished = run.get("seconds", {}), metrics.get("unfinished")
    # Without the report itself: its time is known only after it is written.
    phases = [(name, seconds[name]) for name in PHASES if name in seconds]
    return _render(
        "report.html",
        title=workdir.resolve().name,
        point=verdict.point(metrics),
        memorization=metrics["memorization"],
        # Numbers of an older version have no verdict of their own.
        verdict=metrics.get("verdict") or verdict.verdict(metrics),
        notes=metrics.get("notes", []),
        beside=tables.quality(metrics),
        unfinished=unfinished,
        grids=_grids(workdir, unfinished) if unfinished and shown else [],
        steps=verdict.steps(metrics) if "steps" in metrics["model"] else "",
        data=metrics["data"],
        model=metrics["model"],
        levels=metrics.get("levels", {}),
        pruning=tables.pruning(metrics),
        run=run,
        config=_settings(numbers["config.json"]),
        phases=phases,
        total=sum(value for _, value in phases),
        images=images,
    )


def _render(template, **values) -> bytes:
    # Escaped, as names of runs and files come from outside; and a name that a template
    # misspells is an error, and not an empty place on the page.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(
        percent=percent, between=between, zip=zip, pathless=pathless
    )
    page = environment.get_template(template).render(**values)
    return page.encode("utf-8", "replace")  # a file name need not be valid text


def _settings(config):
    """The fields that are set: those that differ from the defaults, and the others.

    Returns: two lists of (group, [(field, value)]); a path is its last part.
    """
    known = schema.of(config)
    default = {name: _plain(one.default) for name, one, _ in schema.leaves(known)}
    own: dict[str, list] = {}
    others: dict[str, list] = {}
    plain = {k: v for k, v in config.items() if not isinstance(v, dict)}
    groups = {"": plain, **{k: v for k, v in config.items() if isinstance(v, dict)}}
    for group, fields in groups.items():
        names = sorted(fields, key=lambda name: (name != "name", name))
        for name in names:
            value, full = fields[name], f"{group}.{name}" if group else name
            if value is None or value == []:
                continue
            # A field of the user's own constructor has no default that is known here.
            place = others if default.get(full) == value else own
            place.setdefault(group, []).append((name, _shown(value)))
    return list(own.items()), list(others.items())


def _plain(value):
    """A default as config.json has it."""
    return list(value) if isinstance(value, tuple) else value


def _shown(value):
    if isinstance(value, str) and (PurePath(value).is_absolute() or value[:1] == "~"):
        return f".../{PurePath(value).name}"
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    return f"{value:g}" if isinstance(value, float) else pathless(str(value))


def pathless(text: str) -> str:
    """A text without the directories of its absolute paths: others read the page."""
    return re.sub(PATH, ".../", text)
