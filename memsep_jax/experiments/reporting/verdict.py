"""The verdict of a run or an audit, in words.

Pure functions of the numbers in metrics.json. The verdict is the first that holds of
*unknown* (nothing was held out), *copies*, *undertrained* and *no sign of copying*.
Undertrained samples are far from all data; a low share of copies does not show this,
for noise copies nothing.
"""

import numpy as np

from memsep_jax import memorization

ONE_SIDED = 0.025  # of Fisher's test, as the 95 % intervals beside it have two sides
# Share of the held-out points that are nearer than a "far" sample. About 1 % of honest
# samples are far, and the verdict needs more than HALF.
BEYOND = 0.99
# More than half of the samples of the data's law lie beyond all of l held-out points
# with probability 2^-l: with ten points, in one of 1,024 sets.
ENOUGH = 10
# A share of samples, and a place on the scale of Frechet distances on which training
# points are at 0 and pages that all show the mean at 1. docs/results/audit.md lists
# what lies on each side.
HALF = 0.5


def far(d1, held_out) -> dict:
    """The share of samples farther from the training set than 99 % of held-out points.

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
    """The meaning of the numbers: {"name", "alarm", "text", "small"}.

    The alarm is None where it is known neither that samples copy, nor that a model
    with such samples does not.
    """
    pixels = metrics["memorization"]
    text = (
        f"{share(pixels)} of the {pixels['samples']:,} samples are copies of a "
        f"{point(metrics)}"
    )
    exact = pixels["exact_copies"]
    exactly = f"{exact:,} equal a {point(metrics)} to the last bit. " if exact else ""
    hidden = _hidden(metrics)
    if pixels["null"] is None:
        small = "What honest samples would score is not known: nothing was held out. "
        small += hidden.replace("copies do not show", "fewer copies show")
        return _result("unknown", None, f"{text}.", exactly + small.rstrip())
    text += f"; honest samples would give {share(pixels, 'null_')}."
    above, unseen = above_chance(pixels, pixels["samples"])
    if above:
        small = f"The generator copies: {between(above)} % more than chance."
    else:
        small = hidden or _in_features(metrics)
    if small:
        return _result("copies", True, text, exactly + small)
    if same := _exact(metrics):
        small = (
            f"The generator copies: {same:,} of its samples equal a training image to "
            "the last bit, and no held-out image does."
        )
        return _result("copies", True, text, small)
    return _without_copies(metrics, text, exactly, unseen)


def _without_copies(metrics, text, exactly, unseen) -> dict:
    """The verdict where no copies were found.

    Args: text, exactly: its words so far; unseen, the largest share of copies that
      chance would hide.
    """
    if reasons := _undertrained(metrics):
        small = (
            f"Undertrained: {'; '.join(reasons)}. What is far from all data copies "
            "none of it, so this says nothing about what a finished model would copy: "
            "look at the samples, and train longer."
        )
        return _result("undertrained", None, text, exactly + small)
    if metrics.get("unlike"):
        small = (
            "No copies were found, but the samples or the held-out images have other "
            "pixel values than the training images, so copies may not show: see the "
            "notes."
        )
        return _result("unknown", None, text, exactly + small)
    small = (
        "No sign of copying: the share is not above that of held-out "
        f"{point(metrics, of_training=False)}s by more than chance. A share of copies "
        f"above {percent(unseen)} % would have shown."
    )
    return _result("no sign of copying", False, text, exactly + small)


def _hidden(metrics) -> str:
    """The sentence about copies that show after another preparation, or ""."""
    way, part = other_way(metrics), ""
    if way is None:
        return ""
    if way["set"] == "train":
        part = f" of {way['files']:,} of the {way['of']:,} images that it changes"
    return (
        f"As the images are, copies do not show, but with {way['way']} "
        f"{share(way)} of {way['samples']:,} samples are copies{part}."
    )


def _in_features(metrics) -> str:
    """The sentence about copies that show in features and not in pixels, or ""."""
    features = metrics.get("features")
    samples = metrics["memorization"]["samples"]
    if features is None or not above_chance(features, samples)[0]:
        return ""
    return (
        f"In pixels there is no sign of copying, but in {features['name']} features "
        f"{share(features)} of the samples are copies where honest ones give "
        f"{share(features, 'null_')}: look for images that were moved or recoloured."
    )


def _exact(metrics) -> int:
    """How many samples equal a training image where chance does not explain it.

    It may explain it for images of one colour, which equal each other, and where
    held-out images equal training images too.
    """
    pixels, data = metrics["memorization"], metrics["data"]
    return 0 if data.get("excluded") else pixels.get("exact_varied", 0)


def other_way(metrics) -> dict | None:
    """The preparation that shows most copies, where that of this audit hides them."""
    ways = [way for way in metrics.get("other_ways", ()) if way["finds"]]
    return max(ways, key=lambda way: way["ratio"], default=None)


def notes(metrics) -> list[str]:
    """A warning where too few points were held out for a firm null level.

    They are too few where, even if none of them looks like a copy, honest samples may
    score more than the share from which a run is said to copy (`memorization.BEGUN`).
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
    """The word for one example of the data: "training image", "point", ..."""
    name = "image" if len(metrics["data"]["shape"]) == 3 else "point"
    return f"training {name}" if of_training else name


def steps(metrics) -> str:
    """The number of training steps, and whether they were all of them."""
    model = metrics["model"]
    text, planned = f"{model['steps']:,}", model.get("planned", model["steps"])
    if "unfinished" in metrics:
        return f"{text} of {planned:,}: not finished"
    return text if model["steps"] == planned else f"{text} of {planned:,}: ended early"


def lines(metrics) -> list[str]:
    """The verdict and the notes for a terminal, one line each."""
    known = metrics["verdict"]
    first = f"verdict: {known['text']} {known['small']}"
    return [first, *(f"note: {note}" for note in notes(metrics))]


def share(numbers, which="") -> str:
    """A share and its interval; which="null_" for that of held-out points."""
    value = numbers["null" if which else "ratio"]
    return f"{percent(value)} % {between(numbers[f'{which}interval'])}"


def percent(value) -> str:
    """0.989 -> "98.9"; only 0 and 1 become "0.0" and "100.0"."""
    # One more digit near the ends: 0.02 % must not read as 0, nor 99.97 % as all.
    rounded = value in (0, 1) or 0.0005 <= value < 0.9995
    return f"{100 * value:.{1 if rounded else 2}f}"


def between(interval) -> str:
    """(0.98, 0.994) -> "[98.0, 99.4]"."""
    return f"[{percent(interval[0])}, {percent(interval[1])}]"


def _result(name, alarm, text, small):
    return {"name": name, "alarm": alarm, "text": text, "small": small}


def above_chance(numbers, samples):
    """Whether there are more copies than chance explains, by two rules together.

    The interval of the excess over held-out points lies above 0, and Fisher's exact
    test is below ONE_SIDED.

    Returns: the interval (low, high) of the excess, or None; and the largest share of
      copies that would not have been noticed.
    """
    # Both, as the interval is not exact: for 1 copy in 1,000 against 0 in 10,000 it
    # lies above 0, though one pair of sets in eleven from one law gives such counts.
    copies, null = (
        (round(share * total), total)
        for share, total in (
            (numbers["ratio"], samples),
            (numbers["null"], numbers["held_out"]),
        )
    )
    _, (low, high) = memorization.excess(*copies, *null)
    above = low > 0 and memorization.by_chance(*copies, *null) < ONE_SIDED
    return (low, high) if above else None, max(high, 0)


def _undertrained(metrics) -> list[str]:
    """The reasons to call the samples far from all data; empty where there are none.

    Either most of them are farther from the training set than nearly all held-out
    points are (by a 95 % interval), or the whole set is far by its Frechet distance, by
    more than fifths of the samples and training points differ. The second sees pages
    that all look like the mean, which is near to everything.
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
