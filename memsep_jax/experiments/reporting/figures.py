"""Numbers to pictures: every function takes arrays and returns a figure.

Nothing here computes a result: the numbers were read from the disk.
"""

import io
import textwrap
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import (
    FixedLocator,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
    PercentFormatter,
    StrMethodFormatter,
)
from PIL import Image

from memsep_jax.experiments import record

# Colours that colour-blind readers tell apart (Okabe and Ito; red and more are Tol's).
BLUE, ORANGE, RED, GREY = "#0072B2", "#E69F00", "#CC3311", "#8c8c8c"
COLORS = (
    BLUE, ORANGE, "#009E73", "#CC79A7", RED, "#56B4E9", "#882255", "#999933", "#44AA99",
    "black",
)  # fmt: skip
# One font, which comes with matplotlib, and no LaTeX: a picture is the same everywhere.
# Fonts of type 42 in a PDF, as journals refuse those of type 3, matplotlib's default.
STYLE: Any = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "figure.dpi": 150,
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "image.interpolation": "nearest",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "pdf.fonttype": 42,
    "savefig.dpi": 150,
    "text.usetex": False,
}
styled = matplotlib.rc_context(STYLE)
CELL = 64  # pixels of an image in a grid of samples, at least


def quietly(say):
    """(draw, *args) -> None, which calls draw(*args) and survives a full disk.

    The first picture that cannot be written is one warning, not the end of the run.
    """
    warned = False

    def attempt(draw, *args):
        nonlocal warned
        try:
            draw(*args)
        except OSError as error:
            if not warned:
                say(f"warning: no picture, and no more warnings of this kind: {error}")
            warned = True

    return attempt


def save_samples(path, samples):
    """A grid of samples as PNG: uint8 images [m, h, w, c], or vectors [m, d]."""
    if samples.ndim == 2:
        record.write_bytes(path, encode(scatter(samples), "png"))
    else:
        save_image(path, grid(samples))


def save_image(path, image):
    """One image as PNG, pixel by pixel: uint8 [h, w, 1 or 3]."""
    buffer = io.BytesIO()
    grey = image.shape[-1] == 1
    Image.fromarray(image[..., 0] if grey else image).save(buffer, format="PNG")
    record.write_bytes(path, buffer.getvalue())


def grid(samples):
    """Images side by side, enlarged without smoothing.   [m, h, w, c] -> [H, W, c]."""
    m, h, w = samples.shape[:3]
    factor = -(-CELL // max(h, w))
    big = np.stack([_pixels(x) for x in samples])
    big = big.repeat(factor, axis=1).repeat(factor, axis=2)
    columns = int(np.ceil(np.sqrt(m)))
    rows = -(-m // columns)
    gap = 4  # white pixels around each image
    height, width = factor * h + gap, factor * w + gap
    canvas = np.full((rows * height + gap, columns * width + gap, 3), 255, np.uint8)
    for i, image in enumerate(big):
        top, left = gap + i // columns * height, gap + i % columns * width
        canvas[top : top + height - gap, left : left + width - gap] = image
    return canvas


@styled
def encode(figure, kind: str) -> bytes:
    """A figure as the bytes of a "png" or "pdf", the same for the same numbers."""
    buffer = io.BytesIO()
    # No date and no version inside: a file changes only when its numbers do.
    dateless = {"png": {"Software": None}, "pdf": {"CreationDate": None}}
    figure.savefig(buffer, format=kind, metadata=dateless[kind])
    return buffer.getvalue()


@styled
def losses(rows):
    """The training loss (left), and the eps-loss of seen and unseen points (right).

    Args: rows, those of metrics.jsonl.
    """
    figure = Figure(figsize=(9.5, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    step, loss = _column(rows, "loss")
    # Pale, as the loss of single batches hides the trend of its mean.
    left.plot(step, loss, color=BLUE, alpha=0.3, linewidth=0.8, label="logged")
    left.plot(step, _smoothed(loss), color=BLUE, label="running mean")
    left.set(title="training objective", ylabel="loss of a batch")
    names = {"train_losses": "training points", "held_out_losses": "held-out points"}
    for (name, label), style in zip(names.items(), _pair_of_lines(), strict=True):
        step, values = _column(rows, name)
        if len(step):
            right.plot(step, values.mean(axis=1), label=label, **style)
    right.set(title="seen against unseen", ylabel="eps-loss, mean over noise levels")
    for axes in (left, right):
        axes.set(xlabel="training step")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        _plain_log(axes, "y", "{x:g}")
        if axes.lines:
            _legend_above(axes)
    return figure


@styled
def noise_levels(noise, train, held_out):
    """The eps-loss at each noise level.   All [l]; held_out may be empty."""
    figure = Figure(figsize=(6, 3.9), layout="constrained")
    axes = figure.subplots()
    noise = np.asarray(noise, float)
    train, held_out = np.asarray(train, float), np.asarray(held_out, float)
    seen, unseen = _pair_of_lines()
    if len(held_out):
        axes.fill_between(noise, train, held_out, color=ORANGE, alpha=0.12, lw=0)
        axes.plot(noise, held_out, label="held-out points", **unseen)
    if len(train):
        axes.plot(noise, train, label="training points", **seen)
    # E |eps|^2 = d: a network that predicts 0 loses 1 per dimension.
    axes.axhline(
        1, color=GREY, linewidth=1, linestyle=":", zorder=1,
        label="a network that always predicts 0",
    )  # fmt: skip
    axes.set(
        xscale="log", yscale="log", xlabel="noise level, sigma / alpha",
        ylabel="eps-loss per dimension",
    )  # fmt: skip
    _legend_above(axes)
    return figure


@styled
def ratio_along(rows, final):
    """The memorization ratio at the snapshots and at the end.

    Args: rows of metrics.jsonl; final, metrics.json's "memorization" and its "step".
    """
    figure = Figure(figsize=(6, 3.7), layout="constrained")
    axes = figure.subplots()
    if final["null"] is not None:
        axes.axhspan(*final["null_interval"], color=ORANGE, alpha=0.3, lw=0)
        axes.axhline(
            final["null"], color=ORANGE, linestyle="--",
            label="null level: held-out points",
        )  # fmt: skip
    for name, color, weights in (("raw_ratio", GREY, "raw"), ("ratio", BLUE, "EMA")):
        step, ratio = _column(rows, name)
        intervals = _column(rows, f"{name}_interval")[1]
        if len(step):
            text = f"snapshots, {weights} weights"
            _with_interval(axes, step, ratio, intervals, "o-", color, text)
    last = [final["ratio"]], [final["interval"]]
    text = f"the {final['samples']:,} samples at the end"
    _with_interval(axes, [final["step"]], *map(np.asarray, last), "D", RED, text)
    axes.set(xlabel="training step", ylabel="memorized samples", ylim=(-0.03, 1.03))
    _plain_log(axes, "x", "{x:,.0f}")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    _legend_above(axes)
    return figure


@styled
def distance_ratios(share, memorized, threshold: float, held_out=None, space=""):
    """Histogram of d1 / d2, the nearest over the second distance.

    Args: share [m] of the samples; memorized bool [m]; held_out [l], the same of
      held-out points, or None; space, the name of what is compared.
    """
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    # 30 bins, of which the threshold is an edge: no bar mixes copies and others.
    below = min(max(1, round(30 * threshold)), 29)
    edges = np.concatenate(
        [
            np.linspace(0, threshold, below + 1),
            np.linspace(threshold, 1, 31 - below)[1:],
        ]
    )
    counts = [share[memorized], share[~memorized]]
    labels = [f"memorized ({len(counts[0]):,})", f"not memorized ({len(counts[1]):,})"]
    axes.hist(counts, edges.tolist(), stacked=True, color=[RED, BLUE], label=labels)
    if held_out is not None and len(held_out):
        # As many as the samples, so that the two may be compared by eye.
        scaled = np.histogram(held_out, edges)[0] * (len(share) / len(held_out))
        axes.stairs(
            scaled, edges, color="black", linewidth=1.4,
            label=f"held-out points ({len(held_out):,}), scaled to the samples",
        )  # fmt: skip
    axes.axvline(
        threshold, color="black", linestyle="--", linewidth=1.2,
        label=f"threshold {threshold:.3g}",
    )  # fmt: skip
    of = f" in {space}" if space else ""
    axes.set(xlabel=f"d1 / d2{of}", ylabel="samples", xlim=(0, 1))
    _legend_above(axes)
    return figure


@styled
def pairs(index, samples, neighbours, distances, nearest, memorized, space=""):
    """In each column a sample above its two nearest training images.

    Args:
      space: the name of what the distances are measured in.
      index [k] of the samples; samples [k, h, w, c]; neighbours [k, 2, h, w, c],
      distances [k, 2] and nearest [k, 2] of training images; memorized [k].
    """
    tall = samples.shape[1] / samples.shape[2]  # every image is 1 wide
    pitch, margin = tall + 0.46, 1.75  # a row with its caption; room for the labels
    top = tall + (0.35 if space else 0.05)
    width, height = margin + 1.12 * len(index), 3 * pitch + top - tall
    figure = Figure(figsize=(0.95 * width, 0.95 * height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    rows = (
        "generated\nsample",
        "nearest\nTRAINING\nimage",
        "second nearest\nTRAINING\nimage",
    )
    for row, text in enumerate(rows):
        axes.text(
            -0.15, tall / 2 - row * pitch, text, ha="right", va="center", fontsize=11,
            fontweight="bold", color=BLUE if row else "black",
        )  # fmt: skip
    for i, copied in enumerate(memorized):
        (d1, d2), (first, second) = distances[i], nearest[i]
        column = (
            (samples[i], RED if copied else GREY, f"sample {index[i]}"),
            (neighbours[i, 0], BLUE, f"train {first}\n$d_1$ {d1:.3g}"),
            (neighbours[i, 1], BLUE, f"train {second}\n$d_2$ {d2:.3g}"),
        )
        for row, (image, edge, text) in enumerate(column):
            left, bottom = 1.12 * i, -row * pitch
            axes.imshow(_pixels(image), extent=(left, left + 1, bottom, bottom + tall))
            frame = Rectangle((left, bottom), 1, tall, fill=False, ec=edge, lw=2)
            axes.add_patch(frame)
            color = RED if copied and row == 0 else "black"
            text += "\ncopied" if copied and row == 0 else ""
            axes.text(
                left + 0.5, bottom - 0.04, text, ha="center", va="top", fontsize=10,
                color=color,
            )  # fmt: skip
    if space:
        axes.text(0, tall + 0.1, f"nearest in {space}", fontsize=11, fontweight="bold")
    # Last, as each imshow sets the limits and the aspect for its own image.
    axes.set(xlim=(-margin, width - margin), ylim=(top - height, top))
    return figure


@styled
def image_rows(rows):
    """Rows of images, each with its name.   rows: name -> [k, h, w, c]."""
    most = max(map(len, rows.values()))
    height, width = next(iter(rows.values())).shape[1:3]
    tall = height / width  # every image is 1 wide
    figure = Figure(figsize=(0.8 * most + 1.4, 0.85 * tall * len(rows)))
    figure.set_layout_engine("constrained")
    grid = figure.subplots(len(rows), most, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for (name, images), line in zip(rows.items(), grid, strict=True):
        line[0].text(
            -0.15, 0.5, name, ha="right", va="center", transform=line[0].transAxes
        )
        for image, axes in zip(images, line, strict=False):
            axes.imshow(_pixels(image))
    return figure


@styled
def scatter(samples, memorized=None, lines=None):
    """The first two coordinates of samples, and of training points near some of them.

    Args: samples [m, d]; memorized bool [m]; lines, (samples [k, d], training [k, d]).
    """
    figure = Figure(figsize=(6.4, 5.2), layout="constrained")
    axes = figure.subplots()
    if memorized is None:
        memorized = np.zeros(len(samples), bool)
    groups = [(~memorized, GREY, "samples"), (memorized, RED, "memorized samples")]
    for chosen, color, label in groups:
        if chosen.any():
            x, y = _plane(samples[chosen])
            label = f"{label} ({chosen.sum():,})"
            axes.scatter(x, y, 9, color=to_rgba(color, 0.7), lw=0, label=label)
    if lines is not None:
        (x0, y0), (x1, y1) = map(_plane, lines)
        axes.plot([x0, x1], [y0, y1], color=BLUE, linewidth=0.7, alpha=0.6)
        label = f"nearest TRAINING points of {len(x1)} samples"
        axes.scatter(x1, y1, 30, color=BLUE, marker="x", lw=1.2, label=label)
    axes.set(xlabel="first coordinate", ylabel="second coordinate")
    _legend_above(axes)
    return figure


class Interval(NamedTuple):
    """Means with their confidence intervals, each a number or an array."""

    mean: Any
    std: Any
    low: Any
    high: Any

    @classmethod
    def read(cls, value) -> "Interval":
        """From the form in metrics.json, or a list of those: null is nan again."""
        if isinstance(value, dict):
            return cls(*(np.array(value.get(name), float) for name in cls._fields))
        fields = ([one.get(name) for one in value] for name in cls._fields)
        return cls(*(np.array(field, float) for field in fields))


class Line(NamedTuple):
    """The points of one line, with their intervals where these are known."""

    x: Any  # [k]
    mean: Any  # [k]
    label: str | None = None
    low: Any = None  # [k]
    high: Any = None  # [k]
    style: str = "o-"
    color: str | None = None  # None: the next of COLORS


def line(x, value, label=None, style="o-", color=None, log=False) -> Line:
    """A line with its band.

    Args: value, as `Interval.read` takes it; log, for a log axis: it has no 0, so no
      band reaches below a tenth of its mean.
    """
    mean, _, low, high = Interval.read(value)
    if log:
        low = np.maximum(low, mean / 10)
    return Line(x, mean, label, low, high, style, color)


class Panel(NamedTuple):
    """One pair of axes of `curves`."""

    title: str
    lines: list[Line]
    xlabel: str
    ylabel: str
    xscale: str = "log"
    yscale: str = "log"
    percent: bool = False  # y is a share
    unit: bool = False  # y is from 0 to 1, whatever its bands are
    ticks: list[str] | None = None  # names of x = 0, 1, ..., where it is no number


@styled
def curves(panels):
    """Lines with their intervals as bands, panels side by side, three to a row."""
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    size = (7 if columns == 1 else 4.1 * columns, 3.6 * rows)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    # One legend below where a panel has the lines of all others, some of which may
    # lack a line that has no value there.
    labels = [{line.label for line in panel.lines if line.label} for panel in panels]
    shared = len(panels) > 1 and max(labels, key=len) == set().union(*labels) != set()
    for axes, panel in zip(grid.flat, panels, strict=False):
        _draw_lines(axes, panel)
        axes.set(title=_wrapped(panel.title, 66 if columns == 1 else 38))
        axes.set(xlabel=panel.xlabel, ylabel=panel.ylabel)
        axes.set(xscale=panel.xscale, yscale=panel.yscale)
        _set_x(axes, panel)
        _set_y(axes, panel)
        if not shared and (entries := _entries(axes)):
            axes.legend(entries.values(), entries.keys(), fontsize=8)
    for axes in grid.flat[len(panels) :]:
        axes.axis("off")
    if shared:
        # Those of the richest panel first, in its order.
        order = sorted(range(len(panels)), key=lambda i: -len(labels[i]))
        entries = _entries(*(grid.flat[i] for i in order))
        # An inch holds about 14 letters of this size; a handle takes as much as six.
        fit = int(14 * size[0] / (6 + max(map(len, entries))))
        figure.legend(
            entries.values(), entries.keys(), loc="outside lower center",
            ncols=min(max(fit, 1), 4), fontsize=8,
        )  # fmt: skip
    return figure


def _entries(*many):
    """The entries of a legend, {label: its first line}, of all these axes."""
    entries: dict = {}
    for axes in many:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    return entries


def _wrapped(title, width):
    """A title whose lines fit above a panel: a setting may name many fields."""
    return "\n".join(textwrap.fill(line, width) for line in title.split("\n"))


def _draw_lines(axes, panel):
    for i, line in enumerate(panel.lines):
        color = line.color or COLORS[i % len(COLORS)]
        axes.plot(line.x, line.mean, line.style, color=color, label=line.label)
        if line.low is not None and panel.ticks:  # a band would lie between names
            ends = np.stack([line.mean - line.low, line.high - line.mean])
            # matplotlib refuses negative lengths, such as rounding may leave.
            ends = np.nan_to_num(np.maximum(ends, 0))
            axes.errorbar(line.x, line.mean, ends, fmt="none", color=color, capsize=4)
        elif line.low is not None:
            axes.fill_between(
                line.x, line.low, line.high, color=color, alpha=0.18, lw=0
            )


def _set_x(axes, panel):
    """Ticks at the values themselves where these are few; else plain numbers."""
    places = sorted({float(x) for line in panel.lines for x in line.x})
    if panel.xscale == "symlog":  # linear up to the smallest value above 0
        least = min((x for x in places if x > 0), default=1.0)
        axes.set_xscale("symlog", linthresh=least)
        axes.set_xlim(-least / 4, 1.3 * max(places))
    # Values that people choose have few digits. The labels of others, such as computed
    # times of a collapse, would run into those; and so would more than about eight.
    named = [x for x in places if np.isclose(x, [float(f"{x:.3g}"), np.rint(x)]).any()]
    few = 1 < len(named) <= 8 and 2 * len(named) >= len(places)
    if few and panel.xscale != "linear":
        axes.xaxis.set_major_locator(FixedLocator(named))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
    elif panel.xscale == "log" and max(places) < 100 * min(places):
        _plain_log(axes, "x", "{x:g}")
    if panel.ticks:
        slanted = sum(map(len, panel.ticks)) > 40
        axes.set_xticks(range(len(panel.ticks)), panel.ticks)
        axes.tick_params("x", rotation=30 if slanted else 0)
        axes.set_xlim(-0.5, len(panel.ticks) - 0.5)


def _set_y(axes, panel):
    low, high = axes.get_ylim()
    if panel.yscale == "log" and high > 10 * low:
        axes.yaxis.set_minor_formatter(NullFormatter())  # powers of ten say enough
    elif panel.yscale == "log":
        _plain_log(axes, "y", "{x:g}")
    if panel.percent or panel.unit:
        axes.set_ylim(-0.03, 1.03)
    if panel.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1))


@styled
def frontier(tracks, xlabel, ylabel, level=None):
    """Shares against quality, both with intervals; the points of a track are joined.

    Args:
      tracks: name -> [(text, x, y)], x and y as `Interval.read` takes them.
      level: a share to draw as a line.
    """
    figure = Figure(figsize=(9.5, 5.4), layout="constrained")
    axes = figure.subplots()
    markers = "osD^vP*Xh<>p"
    for i, (name, points) in enumerate(tracks.items()):
        x, y = (_bars([point[k] for point in points]) for k in (1, 2))
        axes.errorbar(
            x[0], y[0], y[1:], x[1:], fmt=f"{markers[i % len(markers)]}-", label=name,
            color=COLORS[i % len(COLORS)], elinewidth=0.5, linewidth=1, alpha=0.85,
        )  # fmt: skip
        for text, a, b in zip([p[0] for p in points], x[0], y[0], strict=True):
            axes.annotate(
                text, (a, b), textcoords="offset points", xytext=(5, 4), fontsize=7
            )
    if level is not None:
        axes.axhline(level, color=GREY, linestyle="--", linewidth=1, label="null level")
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    figure.legend(loc="outside right upper", fontsize=8)
    _part(figure, axes.texts)
    return figure


@styled
def bars(labels, series, xlabel, levels, level_name):
    """Shares side by side: for each label one bar of every series.

    Args:
      series: name -> one interval for each label, as `Interval.read` takes them.
      levels: a share for each label, drawn as a dotted line; level_name, what it is.
    """
    count = len(series)
    figure = Figure(figsize=(8.5, 1.4 + 0.15 * (count + 1) * len(labels)))
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    places = np.arange(len(labels)) * (count + 1.0)
    for i, (name, values) in enumerate(series.items()):
        mean, low, high = _bars(values)
        around = np.stack([np.minimum(low, mean), np.minimum(high, 1 - mean)])
        axes.barh(
            places + i, mean, 0.85, xerr=np.maximum(around, 0), label=name,
            color=COLORS[i % len(COLORS)], error_kw={"elinewidth": 0.8},
        )  # fmt: skip
    name = level_name
    for place, level in zip(places, levels, strict=True):
        if level is not None:
            ends = [place - 0.5, place + count - 0.5]
            axes.plot([level] * 2, ends, ":", color="black", linewidth=1, label=name)
            name = None  # once in the legend
    axes.set_yticks(places + (count - 1) / 2, labels)
    axes.set(xlabel=xlabel, xlim=(0, 1.02), ylim=(places[-1] + count, -1))
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return figure


@styled
def heatmap(shares, rows, columns, row_label, column_label, title):
    """A table of shares [r, c] as colours, each with its percentage written in."""
    shares = np.asarray(shares, float)
    figure = Figure(
        figsize=(2.2 + 0.9 * len(columns), 1.5 + 0.55 * len(rows)), layout="constrained"
    )
    axes = figure.subplots()
    axes.imshow(shares, cmap="Reds", vmin=0, vmax=1, aspect="auto", origin="lower")
    for (i, j), share in np.ndenumerate(shares):
        text = "?" if np.isnan(share) else f"{100 * share:.0f} %"
        color = "white" if share > 0.6 else "black"  # legible on dark red
        axes.text(j, i, text, ha="center", va="center", color=color)
    axes.set(xlabel=column_label, ylabel=row_label, title=title)
    slanted = {"rotation": 40, "ha": "right"} if isinstance(columns[0], str) else {}
    axes.set_xticks(range(len(columns)), list(map(_word, columns)), **slanted)
    axes.set_yticks(range(len(rows)), list(map(_word, rows)))
    axes.grid(False)
    return figure


@styled
def clouds(panels):
    """Samples in the plane, memorized ones red, training points as crosses.

    Args: panels of (title, samples [m, d], memorized bool [m], training [n, d]).
    """
    figure = Figure(figsize=(2.9 * len(panels), 4.0), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False, sharex=True, sharey=True)
    # All panels show one square around the training points.
    every = np.concatenate([train for *_, train in panels])
    middle = (every.min(axis=0) + every.max(axis=0)) / 2
    half = 0.65 * max(np.ptp(every, axis=0))  # stray samples may lie outside
    for axes, (title, samples, memorized, train) in zip(grid.flat, panels, strict=True):
        x, y = _plane(samples[~memorized])
        axes.scatter(x, y, 5, color=to_rgba(GREY, 0.6), lw=0, label="samples")
        x, y = _plane(train)
        axes.scatter(x, y, 26, color=BLUE, marker="x", lw=0.8, label="training points")
        x, y = _plane(samples[memorized])
        axes.scatter(
            x, y, 11, color=to_rgba(RED, 0.8), lw=0, zorder=3, label="memorized samples"
        )
        axes.set(
            title=title, aspect="equal", xlim=(middle[0] - half, middle[0] + half),
            ylim=(middle[1] - half, middle[1] + half),
        )  # fmt: skip
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9)
    return figure


def _bars(values):
    """[3, k]: means, and how far their intervals reach below and above."""
    mean, _, low, high = Interval.read(values)
    return np.stack([mean, *np.nan_to_num([mean - low, high - mean])])


def _part(figure, texts):
    """Moves the texts at points away from each other; one without room is left out."""
    figure.draw_without_rendering()  # places all that the texts must not cover
    taken: list = []
    for text in texts:
        for across, up in ((5, 4), (5, -10), (-5, 4), (-5, -10), (0, 11), (0, -17)):
            text.set_position((across, up))
            text.set_horizontalalignment(
                "left" if across > 0 else "right" if across < 0 else "center"
            )
            box = text.get_window_extent()
            if not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
        else:
            text.set_visible(False)


def _plain_log(axes, which, text):
    """A log axis with ticks such as 200 and 5,000 instead of 2 x 10^2."""
    axes.set(**{f"{which}scale": "log"})
    axis = getattr(axes, f"{which}axis")
    low, high = axis.get_view_interval()
    # Over more than two decades the labels of 2 and 5 would run into others.
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axis.set_major_formatter(StrMethodFormatter(text))
    axis.set_minor_formatter(NullFormatter())


def _word(value):
    return value if isinstance(value, str) else f"{value:,}"


def _legend_above(axes, ncols=2):
    """A legend that hides no line: above the axes, below their title."""
    rows = -(-len(axes.get_legend_handles_labels()[1]) // ncols)
    axes.legend(
        loc="lower center", bbox_to_anchor=(0.5, 1), ncols=ncols, fontsize=9,
        borderaxespad=0.3,
    )  # fmt: skip
    if axes.get_title():
        axes.set_title(axes.get_title(), pad=12 + 13 * rows)  # points: 13 for a row


def _pair_of_lines():
    return (
        {"color": BLUE, "marker": "o"},
        {"color": ORANGE, "marker": "s", "linestyle": "--"},
    )


def _with_interval(axes, step, ratio, intervals, kind, color, label):
    around = np.stack([ratio - intervals[:, 0], intervals[:, 1] - ratio])
    axes.errorbar(
        step, ratio, np.maximum(around, 0), fmt=kind, color=color, capsize=3,
        elinewidth=1.2, label=label,
    )  # fmt: skip


def _column(rows, name):
    """(steps, values) of the rows that have a value; null, once NaN, is NaN again."""
    known = [row for row in rows if row.get(name) is not None]
    steps = np.array([row["step"] for row in known], int)
    return steps, np.array([row[name] for row in known], float)


def _smoothed(values):
    """Running mean over a twentieth of the run, shorter at both ends."""
    half = max(1, len(values) // 40)
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return np.array([np.mean(window) for window in windows])


def _pixels(image):
    """[h, w, c] -> uint8 [h, w, 3]: an image that is not RGB by its first channel.

    Latents, which are not uint8, are shown from their lowest value to their highest.
    """
    if image.dtype != np.uint8:
        low, high = image.min(), image.max()
        image = (255 * (image - low) / max(high - low, 1e-9)).astype(np.uint8)
    return image if image.shape[-1] == 3 else image[..., :1].repeat(3, axis=-1)


def _plane(points):
    return points[:, 0], points[:, 1] if points.shape[1] > 1 else 0 * points[:, 0]
