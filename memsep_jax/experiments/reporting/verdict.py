"""What the numbers of a run or an audit mean: one verdict, in words.

Pure functions of what metrics.json holds. In this order a set of samples *copies*, is
*unknown* where nothing was held out, is *undertrained*, or shows *no sign of copying*.
Undertrained samples are far from all data, which a low share of copies does not show:
noise copies nothing.
"""

import numpy as np

from memsep_jax import memorization

ONE_SIDED = 0.025  # of Fisher's test, as the 95 % intervals beside it have two sides
BEYOND = 0.99  # share of the held-out points that are nearer than what is called far
# Of samples of the data's law, more than half lie beyond all of l held-out points with
# probability 2^-l: from ten points on, in one of 1,024 sets at most.
ENOUGH = 10
# Of the way from training points, at 0, to one page that shows the mean, at 1, by the
# Frechet distance to held-out points: docs/results/audit.md has what lies on each side.
HALF = 0.5


def far(d1, held_out) -> dict:
    """How many samples are farther from the training set than nearly all held-out ones.

    Args: d1 [m], held_out [l]: distances to the nearest training point.
    Returns: the share, its 95 % interval, and the distance beyond which it counts.
    """
    limit = np.quantile(held_out, BEYOND, method="higher")
    count = int((d1 > limit).sum())
    return {
        "ratio": count / len(d1),
        "interval": memorization.wilson(count, len(d1)),
        "limit": float(limit),
        "held_out": len(held_out),
    }


def verdict(metrics) -> dict:
    """What the numbers mean: {"name", "alarm", "text", "small"}.

    The alarm is None where it is neither known that samples copy nor that a model which
    makes such samples does not.
    """
    found, felt = metrics["memorization"], metrics.get("features")
    text = (
        f"{share(found)} of the {found['samples']:,} samples are copies of a "
        f"{point(metrics)}"
    )
    exact = found["exact_copies"]
    exactly = f"{exact:,} equal one to the last bit. " if exact else ""
    way, hidden = other_way(metrics), ""
    if way is not None:
        part = ""
        if way["set"] == "train":
            part = f" of {way['files']:,} of the {way['of']:,} images that it changes"
        hidden = (
            f"As the images are, copies do not show, but with {way['way']} "
            f"{share(way)} of {way['samples']:,} samples are copies{part}."
        )
    if found["null"] is None:
        small = "What honest samples would score is not known: nothing was held out. "
        small += hidden.replace("copies do not show", "fewer copies show")
        return _said("unknown", None, f"{text}.", exactly + small.rstrip())
    text += f"; honest samples would give {share(found, 'null_')}."
    above, unseen = above_chance(found, found["samples"])
    if above:
        small = f"The generator copies: {between(above)} % more than chance."
        return _said("copies", True, text, exactly + small)
    if hidden:
        return _said("copies", True, text, exactly + hidden)
    if felt is not None and above_chance(felt, found["samples"])[0]:
        small = (
            f"In pixels there is no sign of copying, but in {felt['name']} features "
            f"{share(felt)} of the samples are copies where honest ones give "
            f"{share(felt, 'null_')}: look for images that were moved or recoloured."
        )
        return _said("copies", True, text, exactly + small)
    if same := _exact(metrics):
        small = (
            f"The generator copies: {same:,} of its samples equal a training image to "
            "the last bit, and no held-out image does."
        )
        return _said("copies", True, text, small)
    if reasons := _undertrained(metrics):
        small = (
            f"Undertrained: {'; '.join(reasons)}. What is far from all data copies "
            "none of it, so this says nothing of what a finished model would copy: "
            "look at the samples, and train longer."
        )
        return _said("undertrained", None, text, exactly + small)
    if metrics.get("unlike"):
        small = (
            "No copies were found, but the samples or the held-out images have other "
            "pixel values than the training images, so copies may not show: see the "
            "notes."
        )
        return _said("unknown", None, text, exactly + small)
    small = (
        "No sign of copying: the share is not above that of held-out "
        f"{point(metrics, of_training=False)}s by more than chance. A share of copies "
        f"above {percent(unseen)} % would have shown."
    )
    return _said("no sign of copying", False, text, exactly + small)


def _exact(metrics) -> int:
    """How many samples equal a training image where chance makes none do.

    It may: images of one colour are equal to each other, and where held-out images
    equal training ones too.
    """
    found, about = metrics["memorization"], metrics["data"]
    return 0 if about.get("excluded") else found.get("exact_varied", 0)


def other_way(metrics) -> dict | None:
    """The way to prepare images that shows most copies, where these show none."""
    ways = [way for way in metrics.get("other_ways", ()) if way["finds"]]
    return max(ways, key=lambda way: way["ratio"], default=None)


def notes(metrics) -> list[str]:
    """What makes the null level say less than its interval seems to.

    Held-out points are few where, even if none of them looks like a copy, honest
    samples may copy more than a run must to copy at all (`memorization.BEGUN`).
    """
    count = metrics["memorization"].get("held_out") or 0
    if not count or (most := memorization.wilson(0, count)[1]) <= memorization.BEGUN:
        return []
    needed = count
    while memorization.wilson(0, needed)[1] > memorization.BEGUN:
        needed += 1
    audit = metrics.get("experiment") == "audit"
    way = "more images in --config.held_out" if audit else "--config.data.num_held_out"
    return [
        f"only {count:,} held-out points: even if none looks like a copy, honest "
        f"samples may give up to {percent(most)} %, and fewer copies than that cannot "
        f"be told from chance: hold out {needed:,} or more ({way})"
    ]


def point(metrics, of_training=True) -> str:
    """What the data of a run are made of, in words."""
    name = "image" if len(metrics["data"]["shape"]) == 3 else "point"
    return f"training {name}" if of_training else name


def steps(metrics) -> str:
    """How far the training of a network went, in words."""
    model = metrics["model"]
    text, planned = f"{model['steps']:,}", model.get("planned", model["steps"])
    if "unfinished" in metrics:
        return f"{text} of {planned:,}: not finished"
    return text if model["steps"] == planned else f"{text} of {planned:,}: ended early"


def lines(metrics) -> list[str]:
    """The verdict and the notes, a line each, for a terminal."""
    found = metrics["verdict"]
    said = [f"note: {note}" for note in notes(metrics)]
    return [f"verdict: {found['text']} {found['small']}", *said]


def quality(metrics) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """How good the samples are, as text: (columns, rows of a name and its cells).

    No rows for the numbers of an older version, which lack it.
    """
    found, of, rows = metrics["memorization"], point(metrics, of_training=False), []
    for row in metrics.get("frechet", []):
        if "left_out" in row:
            missing = f"not measured: {row['left_out']}"
            rows.append((row["title"], [missing, "", "", ""]))
            continue
        drawn, train, page = (f"{row[k]:.3g}" for k in ("samples", "train", "page"))
        name = f"{row['title']} to held-out, n = {row['n']:,}"
        rows.append((name, [drawn, train, "", page]))
    if found.get("held_out_median_d1") is not None:
        drawn, held = (f"{found[k]:.3g}" for k in ("median_d1", "held_out_median_d1"))
        rows.append(("median d1", [drawn, "", held, ""]))
    columns = ["samples", f"training {of}s", f"held-out {of}s", f"the mean {of} alone"]
    return columns, rows


def quality_lines(metrics) -> list[tuple[str, str]]:
    """`quality` for a terminal: (name, text)."""
    columns, rows = quality(metrics)
    found = []
    for name, (drawn, *others) in rows:
        named = zip(columns[1:], others, strict=True)
        beside = ", ".join(f"{what} {value}" for what, value in named if value)
        found.append((name, f"{drawn} ({beside})" if beside else drawn))
    return found


def share(found, which="") -> str:
    """A share and its interval; which="null_" for that of held-out points."""
    value = found["null" if which else "ratio"]
    return f"{percent(value)} % {between(found[f'{which}interval'])}"


def percent(value) -> str:
    """0.989 -> "98.9"; what is neither 0 nor 100 % is not rounded to it."""
    rounded = value in (0, 1) or 0.0005 <= value < 0.9995
    return f"{100 * value:.{1 if rounded else 2}f}"


def between(interval) -> str:
    """(0.98, 0.994) -> "[98.0, 99.4]"."""
    return f"[{percent(interval[0])}, {percent(interval[1])}]"


def _said(name, alarm, text, small):
    return {"name": name, "alarm": alarm, "text": text, "small": small}


def above_chance(found, samples):
    """The interval of copies above chance where they are above it; how many may be.

    Returns: (low, high) or None, and the largest share that would not have been told.
    """
    counts = [
        (round(share * total), total)
        for share, total in (
            (found["ratio"], samples),
            (found["null"], found["held_out"]),
        )
    ]
    _, (low, high) = memorization.excess(*counts[0], *counts[1])
    above = low > 0 and memorization.by_chance(*counts[0], *counts[1]) < ONE_SIDED
    return (low, high) if above else None, max(high, 0)


def _undertrained(metrics) -> list[str]:
    """By which numbers the samples are far from all data; none where they are not.

    Most of them are farther from the training set than nearly all held-out points (in
    95 % of such sets); or they are so as a whole, by more than the fifths of the
    samples differ: then all may be one page, which is near to everything.
    """
    beyond, reasons = metrics["memorization"].get("far"), []
    of = point(metrics, of_training=False)
    if beyond and beyond["held_out"] >= ENOUGH and beyond["interval"][0] > HALF:
        reasons.append(
            f"{share(beyond)} of the samples are farther from every training {of} than "
            f"{100 * BEYOND:.0f} % of the held-out {of}s are"
        )
    rows = [
        row
        for row in metrics.get("frechet", [])
        if row.get("excess", 0) > HALF and row["interval"][0] > 0
    ]
    if rows:
        row = max(rows, key=lambda row: row["excess"])
        reasons.append(
            f"the {row['title']} from the samples to held-out {of}s is "
            f"{row['samples']:.3g}, where as many training {of}s give "
            f"{row['train']:.3g} and the mean {of} alone {row['page']:.3g}"
        )
    return reasons
