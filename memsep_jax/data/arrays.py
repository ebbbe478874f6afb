"""Points as arrays, in memory or on disk: their units, names, and what they may hold.

Images are uint8, or float32 in [-1, 1]. Rooms that read files call these checks, so
that training and audits refuse, convert and report the same.
"""

import hashlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 1_024  # rows that are read at a time: 3 MB of images of 32 x 32 x 3 as uint8
LISTED, LONG = 10, 60  # names in a message or a note, and letters of each, at most
# Images in [0, 1] with a little noise have next to no values below NOISE, where images
# in [-1, 1] have their shadows.
NOISE, RARE, HALF = -0.1, 1e-3, 0.5
FILLED = 0.75  # images whose values all lie within it were scaled to less than 1
ROUNDED = 1e-3  # so far beyond [-1, 1] is rounding: far less than a level of 255
DARK = 64  # of 255: if all pixels are below, another range may have been meant


class DataError(ValueError):
    """Data that are missing, damaged or unreadable. Wrong arguments are ValueErrors."""

    exit_code = 3


def listed(names, most: int = LISTED) -> str:
    """The first ten names of many, and how many more there are."""
    names = [_short(str(name)) for name in names]
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _short(name):
    return name if len(name) <= LONG else f"{name[: LONG // 2]}...{name[-LONG // 2 :]}"


# What is read, and what stays on disk.


class Rows:
    """Rows, in an order, of an array that stays on disk until they are used.

    rows[i], with a slice or integers [k], are Rows too; np.asarray(rows) reads them.
    """

    def __init__(self, array, rows=None):
        self.array, self.dtype, self.ndim = array, array.dtype, array.ndim
        self.rows = np.arange(len(array)) if rows is None else rows
        self.shape = len(self.rows), *array.shape[1:]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return Rows(self.array, self.rows[index])

    def __iter__(self):
        return (self.array[row] for row in self.rows)

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.array[self.rows], dtype)


class Source(NamedTuple):
    """The pools of a source as read, before any choice."""

    images: np.ndarray | Rows  # uint8 or float32 [n, h, w, c], or float32 [n, d]
    labels: np.ndarray | None = None  # [n] integer
    test_images: np.ndarray | Rows | None = None
    test_labels: np.ndarray | None = None
    pixels: bool = True  # [n, h, w, c] are images; else latents, of any values
    files: np.ndarray | None = None  # [n] paths, of a folder or an archive
    classes: tuple[str, ...] | None = None  # the folder of each label
    notes: tuple[str, ...] = ()  # what a person should know, a sentence each
    # By field of readers.Preparation: files that another choice would change.
    altered: dict[str, np.ndarray] | None = None


def check_source(source, where) -> tuple[str, ...]:
    """Refuses pools on which training would fail later; `where` names the file.

    Returns: notes on what is allowed but perhaps unintended.   Raises: DataError.
    """
    notes = _check_points(source.images, f"{where}: train_images", source.pixels)
    check_labels(source.labels, len(source.images), f"{where}: train_labels")
    test = source.test_images
    if test is None:
        if source.test_labels is not None:
            raise DataError(f"{where}: test_labels without test_images")
        return notes
    notes += _check_points(test, f"{where}: test_images", source.pixels)
    check_labels(source.test_labels, len(test), f"{where}: test_labels")
    if (test.shape[1:], test.dtype) != (source.images.shape[1:], source.images.dtype):
        raise DataError(
            f"{where}: test_images {test.dtype}{test.shape} do not fit train_images "
            f"{source.images.dtype}{source.images.shape}"
        )
    return notes


def _check_points(x, where, pixels):
    if (x.dtype.name, x.ndim) not in {("uint8", 4), ("float32", 4), ("float32", 2)}:
        raise DataError(
            f"{where} is {x.dtype}{x.shape}; it must be uint8 or float32 [n, h, w, c], "
            "or float32 [n, d]"
        )
    if 0 in x.shape:
        raise DataError(f"{where} is empty: {x.shape}")
    if x.ndim == 4:
        check_layout(x, where)
    low, high, below = limits(x)
    refuse(np.isnan(low), where, "NaN or Inf")
    # Vectors and latents have units of their own; only images have a range.
    if x.ndim != 4 or not pixels:
        return ()
    return tuple(check_range(x, where, low, high, below))


def check_labels(labels, n, where):
    """Refuses labels that are neither None nor integers [n] in 0 .. 2**31 - 1."""
    if labels is None:
        return
    if labels.dtype.kind not in "iu" or labels.shape != (n,):
        raise DataError(
            f"{where} is {labels.dtype}{labels.shape}; it must be integers [{n}]"
        )
    refuse((labels < 0) | (labels >= 2**31), where, "a label outside 0 .. 2**31 - 1")


# Units and names of points.


def from_uint8(u):
    """Pixels 0..255 to [-1, 1]: u / 127.5 - 1.   u [...] -> [...] float32."""
    return u.astype(np.float32) / 127.5 - 1


def to_uint8(x):
    """The pixels nearest to x, clipped; inverts `from_uint8`.   x [...] -> [...]."""
    # In the library of x: samples on a device are rounded there, files on the host.
    xp = jnp if isinstance(x, jax.Array) else np
    return xp.clip(xp.round((x + 1) * 127.5), 0, 255).astype(np.uint8)


def like(points, x):
    """x converted to the units of `points`: floats, or pixels."""
    if x.dtype == points.dtype:
        return x
    return from_uint8(x) if x.dtype == np.uint8 else to_uint8(x)


def digests(x) -> list[str]:
    """A digest of each point; equal points have equal ones.   x [n, *e] -> [n]."""
    return [hashlib.blake2b(row.tobytes(), digest_size=16).hexdigest() for row in x]


def fingerprint(*arrays) -> str:
    """The SHA-256 of these arrays, some of which may be None."""
    digest = hashlib.sha256()
    for array in arrays:
        if array is None:  # or (x, None) and (None, x) would be the same
            digest.update(b"none;")
            continue
        if array.ndim == 1:  # labels: int64 on disk, int32 once they are trained on
            array = np.asarray(array, np.int32)
        # With type and shape, since the same bytes may be another array.
        digest.update(f"{array.dtype.str}{array.shape};".encode())
        for start in range(0, len(array), BLOCK):
            block = np.asarray(array[start : start + BLOCK])
            digest.update(np.ascontiguousarray(block).data)
    return digest.hexdigest()


# What an array of images may hold.


def joined(arrays: dict, where):
    """Images, and labels or None, that np.savez(path, *arrays) wrote.

    Args: arrays, {"arr_0": ..., "arr_1": ...}: batches of images, images, or images and
      their labels.
    Raises: DataError where they are none of these.
    """
    # By number: sorted as text, arr_10 comes before arr_2.
    values = [arrays[f"arr_{i}"] for i in sorted(int(name[4:]) for name in arrays)]
    first = values[0]
    if len(values) == 1:
        return first, None
    labels = values[1]
    if (
        len(values) == 2
        and labels.dtype.kind in "iu"
        and labels.shape == first.shape[:1]
    ):
        return first, labels
    alike = {(x.ndim, x.dtype) for x in values} == {(first.ndim, first.dtype)}
    if alike and len({x.shape for x in values}) == 1 and _is_image(first):
        return np.stack(values), None
    if alike and first.ndim >= 3 and len({x.shape[1:] for x in values}) == 1:
        return np.concatenate(values), None
    shapes = (f"arr_{i} {x.dtype}{list(x.shape)}" for i, x in enumerate(values))
    raise DataError(
        f"{where} holds {listed(shapes)}, which are neither batches of images nor "
        "images of one size; write it again by np.savez(path, images=...)"
    )


def _is_image(x):
    """Whether an array is one image and not several."""
    if x.ndim == 2:  # of floats it may be features
        return x.dtype == np.uint8
    # [n, 4, 4] are grey images of 4 x 4; [h, w, 4] with more columns is one in colours.
    return x.ndim == 3 and x.shape[2] in (1, 3, 4) and x.shape[1] > 4


def of_numpy(x, where):
    """An array, or what another library calls one, as numpy's.   Raises: DataError."""
    try:
        result = np.asarray(x)
    except Exception as error:  # of numpy, or of the library that x belongs to
        raise DataError(
            f"{where} is {type(x).__name__}, which numpy makes no array of ({error}); "
            "give numbers [n, h, w, c] in the memory of the host"
        ) from error
    if result is not x and result.dtype.kind not in "biufc":
        kind = "None" if x is None else type(x).__name__
        raise DataError(f"{where} is {kind}, and no numbers; give [n, h, w, c]")
    return result


def native(x):
    """An array in the byte order of this machine."""
    return x.astype(x.dtype.newbyteorder("="), copy=False)


def check_layout(x, where):
    """Refuses [n, c, h, w] where [n, h, w, c] is meant.   Raises: DataError."""
    _, h, w, c = x.shape
    # Read as [n, c, h, w] these are square images with fewer channels than rows, or
    # images of at most 4 channels, which is far likelier than what they claim to be.
    if h < w == c or h <= 4 < min(w, c):
        raise DataError(
            f"{where} is {x.shape}, channels first; give x.transpose(0, 2, 3, 1)"
        )


def check_range(x, where, lowest, highest, below: float):
    """Refuses images that do not fill the range of their dtype.

    Args: x, for its dtype; lowest and highest values of each image, [n]; below, the
      share of floats that are under NOISE.
    Returns: notes on what is allowed but perhaps unintended.   Raises: DataError.
    """
    low, high = lowest.min(), highest.max()
    notes = []
    if len(constant := np.flatnonzero(lowest == highest)):
        notes.append(
            f"{where}: {len(constant)} constant images, the first at {constant[0]}"
        )
    if x.dtype == np.uint8:
        if (low, high) == (0, 1):
            raise DataError(
                f"{where} has pixels of 0 and 1 only, which are black in uint8; give "
                "255 * x"
            )
        if 0 < high < DARK:
            notes.append(
                f"{where}: the brightest pixel is {high:.0f} of 255: is white there?"
            )
        return notes
    refuse(
        (lowest < -1 - ROUNDED) | (highest > 1 + ROUNDED),
        where,
        f"values outside [-1, 1], in [{low:.9g}, {high:.9g}]",
        "give uint8 pixels 0 .. 255, or x.clip(-1, 1) where they go over a little",
    )
    unit, centred = low > -HALF and below < RARE, low > -FILLED and high < FILLED
    if low < high and (unit or centred):
        kind, way = "[0, 1]", "255 * x"
        if not unit:
            kind, way = "[-0.5, 0.5]", "255 * (x + 0.5)"
        raise DataError(
            f"{where} has floats in [{low:.3g}, {high:.3g}], as images in {kind} have; "
            "floats must fill [-1, 1], so give uint8 pixels 0 .. 255: "
            f"({way}).round().clip(0, 255).astype('uint8')"
        )
    return notes


def pixels(x, where):
    """(uint8 [n, h, w, c], notes) of an array of images in any usual form.

    Args: x, uint8 or floats in [-1, 1]: [n, h, w, c], [n, h, w] or one [h, w, 3].
    Raises: DataError.
    """
    x = form(x, where)
    low, high, below = limits(x)
    if x.dtype != np.uint8:
        refuse(~np.isfinite(low), where, "NaN or Inf")
    notes = tuple(check_range(x, where, low, high, below))
    return x if x.dtype == np.uint8 else to_uint8(x), notes


def form(x, where):
    """Images [n, h, w, c] of one of the forms of `pixels`, whatever their values.

    Raises: DataError.
    """
    x = native(x)
    if x.dtype.kind not in "uf" or (x.dtype.kind == "u" and x.dtype != np.uint8):
        raise DataError(f"{where} is {x.dtype}; give images as uint8, or as floats")
    if x.ndim == 3 and x.shape[0] in (3, 4) and min(x.shape[1:]) > 4:
        raise DataError(
            f"{where} is {x.shape}: one image, channels first, or {len(x)} grey ones? "
            "give x.transpose(1, 2, 0) or x[..., None]"
        )
    if x.ndim == 3:
        x = x[None] if _is_image(x) else x[..., None]
    if x.ndim != 4 or not x.size:
        raise DataError(f"{where} is {x.dtype}{x.shape}, not images [n, h, w, c]")
    check_layout(x, where)
    if x.shape[3] not in (1, 3, 4):
        raise DataError(
            f"{where} is {x.shape}, of {x.shape[3]} channels: images have 1, 3 or 4; "
            "decode latents first"
        )
    return x


def limits(x):
    """(lowest [n], highest [n], share of all values below NOISE).

    Lowest and highest of each row are NaN where a value is not finite.

    Args: x [n, ...], in memory or on disk.
    """
    low, high = np.empty(len(x), np.float64), np.empty(len(x), np.float64)
    below = 0
    for start in range(0, len(x), BLOCK):  # rows on disk may be larger than memory
        rows = np.asarray(x[start : start + BLOCK])
        rows = rows.reshape(len(rows), -1)
        part = slice(start, start + len(rows))
        low[part], high[part] = rows.min(axis=1), rows.max(axis=1)
        if rows.dtype.kind == "f":
            below += int((rows < NOISE).sum())
    # min and max pass NaN on, so one look at them tells of all values of the row.
    infinite = ~(np.isfinite(low) & np.isfinite(high))
    low[infinite] = high[infinite] = np.nan
    return low, high, below / max(1, int(np.prod(x.shape)))


def refuse(bad, where, what, way_out="repair it"):
    """Raises a DataError that names the first of the bad rows, if any.   bad [n]."""
    if bad.any():
        first = np.flatnonzero(bad)[0]
        raise DataError(f"{where}[{first}] has {what} ({bad.sum()} in all); {way_out}")


def histogram(x):
    """The number of pixels at each level, of at most 1,000 images.   -> [256]."""
    # Evenly spaced: the first 1,000 may all be of one class.
    some = x[:: max(1, len(x) // 1_000)]
    counts = np.zeros(256, np.int64)
    for one in some:  # one by one: bincount takes 8 bytes per pixel
        counts += np.bincount(one.reshape(-1), minlength=256)
    return counts


def apart(one, other) -> float:
    """The largest distance of the distribution functions of two histograms.

    It is the statistic of Kolmogorov and Smirnov: 0 for equal histograms, at most 1.
    """
    gaps = np.cumsum(one) / one.sum() - np.cumsum(other) / other.sum()
    return float(np.abs(gaps).max())
