"""Images as people keep them, in folders and zips of folders: uint8 [n, h, w, 3].

All image files are read here, so training and audits read, convert, refuse, count and
report the same.
"""

import collections
import io
import json
import math
import mmap
import os
import re
import stat
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image

from memsep_jax.data.arrays import DataError, Rows, Source, listed

# Formats that are recognized by their first bytes. EPS and WMF are left out, as Pillow
# starts other programs for them; a TARGA has no signature, so its suffix decides.
FORMATS = (
    "AVIF", "BMP", "DDS", "GIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "PSD",
    "QOI", "SGI", "TIFF", "WEBP",
)  # fmt: skip
TARGA = (".tga", ".icb", ".vda", ".vst")
# Decoders or checksums of these formats notice lost bytes. Of the other formats, a
# compressed file ends in 32 zeros only where its end was never written ...
CHECKED = ("GIF", "JPEG", "JPEG2000", "MPO", "PNG")
COMPRESSED = ("AVIF", "QOI", "WEBP")
ZEROS = 32  # bytes
# ... but a file of plain pixels may: zeros in its last eighth are only suspicious.
TAIL = 8
_T = Image.Transpose
# EXIF orientation: the operation that turns an image upright, and its inverse.
TURNS = {
    2: (_T.FLIP_LEFT_RIGHT, _T.FLIP_LEFT_RIGHT),
    3: (_T.ROTATE_180, _T.ROTATE_180),
    4: (_T.FLIP_TOP_BOTTOM, _T.FLIP_TOP_BOTTOM),
    5: (_T.TRANSPOSE, _T.TRANSPOSE),
    6: (_T.ROTATE_270, _T.ROTATE_90),
    7: (_T.TRANSVERSE, _T.TRANSVERSE),
    8: (_T.ROTATE_90, _T.ROTATE_270),
}
# Bytes of one member of an archive, unpacked: a small zip may hold a file of any size.
LARGEST = 2**29
# Folders that programs leave among images; names that begin with a dot are such too.
FOREIGN = ("@eaDir", "__MACOSX", "#recycle", "$RECYCLE.BIN", "lost+found")
SPLITS = re.compile(  # names of splits: train, val2017, test_images, ...
    r"(train|training|val|valid|validation|test|testing)"
    r"([_-]?(set|split|data|images|\d+))?"
)
TOLD = "dataset.json"  # holds the labels, as StyleGAN and EDM write them
CROPS, ALPHAS = ("squeeze", "center"), ("white", "drop")
# 16-bit pixels that are all below this hold 14 bits or fewer; read as 16 bits, where
# white is 65,535, they would be dark.
FULL = 2**14


class Preparation(NamedTuple):
    """How a file becomes an image; best as in the training of the generator."""

    resolution: int | None = None  # side of the square to which all are resized
    crop: str = "squeeze"  # or center: the largest square in the middle is cut out
    exif: bool = True  # whether images are turned as the camera was held
    alpha: str = "white"  # laid below transparent pixels; drop: taken as opaque


def check_preparation(how: Preparation):
    """Refuses a preparation that does not exist.   Raises: ValueError."""
    if how.resolution is not None and how.resolution not in range(1, 4097):
        raise ValueError(f"resolution={how.resolution} must be in 1 .. 4096 pixels")
    for name, known in (("crop", CROPS), ("alpha", ALPHAS)):
        if how._asdict()[name] not in known:
            raise ValueError(
                f"{name}={how._asdict()[name]!r} must be one of {', '.join(known)}"
            )


# Folders and archives.


class _Tree(NamedTuple):
    """The files below a folder or in a zip."""

    names: list[str]
    folders: list[str]  # of the first level, with or without files
    skipped: list[str]
    unreadable: list[str]
    open: Callable[[str], Any]  # name -> a seekable file


AS_IT_IS = Preparation()


def read(
    path, how=AS_IT_IS, skip_bad: bool = False, only=None, stream: bool = False
) -> Source:
    """All images below a folder, or in a zip of one, in the order of ImageFolder.

    A file is read if Pillow knows its content, whatever its name, and becomes RGB: of
    16-bit grey, the value divided by 257; of an animation, the first frame. Names that
    begin with a dot and folders of other programs are skipped, other files are counted;
    the notes name both. Links to folders are followed, but not in a circle.

    Labels are those of dataset.json (StyleGAN, EDM) where there is one. Else, if every
    image is in a subfolder, an image's label is the place of its first-level subfolder
    among all of them, empty ones too: sorted by name, or by number where all are.

    Args:
      how: see `Preparation`.   skip_bad: leave out what cannot be read, with a note.
      only: names of the files to read; None: all.
      stream: the images, once prepared, lie in a file below TMPDIR that is gone when
        the process ends; memory holds those in use.
    Raises:
      DataError: no image, damaged ones, splits in place of classes.   ValueError: sizes
        differ, or a preparation that does not exist.
    """
    check_preparation(how)
    packed = str(path).lower().endswith(".zip") and not os.path.isdir(path)
    tree = _zip(path) if packed else _folder(path)
    # Sorted, because the order of a disk's directory differs from machine to machine,
    # and with it every subset.
    names = sorted((n for n in tree.names if n != TOLD), key=_place)
    if only is not None:
        wanted = set(only)
        names = [name for name in names if name in wanted]
    reader = _Reader(path, how, tree.open, len(names), stream)
    with warnings.catch_warnings():
        # Pillow warns of some damage; `_Reader` refuses what it would misread.
        warnings.simplefilter("ignore")
        # Pillow only warns of images between its limit and twice that.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for name in names:
            reader.add(name)
    if only is None:
        images, files, notes = reader.finish(tree.unreadable, skip_bad)
    else:  # checks of a whole set were made when it was read
        reader.suspect.clear()
        reader.deep = (0, "")
        images, files, notes = reader.finish([], skip_bad)
    if tree.skipped:
        notes.insert(0, f"skipped {listed(sorted(tree.skipped))}")
    labels, classes, more = _labels(path, files, tree)
    return Source(
        images,
        labels,
        files=np.array(files),
        classes=classes,
        notes=tuple(f"{path}: {note}" for note in notes + more),
        altered={field: np.array(names) for field, names in reader.altered.items()},
    )


def _place(name):
    """Sorts as torchvision's ImageFolder: by class, then by folder, then by name."""
    folder, _, last = name.rpartition("/")
    return name.partition("/")[0], folder, last


def _ignored(part):
    return part.startswith(".") or part in FOREIGN


def _folder(path) -> _Tree:
    root = Path(path)
    # os.path.isdir, since Path.is_dir raises where a text is too long to be a path.
    if not os.path.isdir(root):
        raise DataError(f"{root}: no such folder; give the path of a folder of images")
    if is_workdir(root):
        raise DataError(
            f"{root} is the workdir of a run, and its pictures are no data: give the "
            "folder of images, or in an audit a run that has samples.npz"
        )
    if is_sampled(root):
        root = root / "images"
    names: list[str] = []
    skipped: list[str] = []
    unreadable: list[str] = []

    def relative(place, name=""):
        return (Path(place) / name).relative_to(root).as_posix()

    def denied(error):
        unreadable.append(f"{relative(error.filename)}/")

    # The real paths from the root down to each folder: a link to one of them would go
    # round for ever. A link to any other folder is followed, even twice.
    above = {os.path.realpath(root): {os.path.realpath(root)}}
    for place, folders, files in os.walk(root, onerror=denied, followlinks=True):
        circle = above[os.path.realpath(place)]
        for name in [*folders]:
            real = os.path.realpath(os.path.join(place, name))
            if _ignored(name) or real in circle:
                folders.remove(name)
                skipped.append(relative(place, name))
            else:
                above[real] = circle | {real}
        names += [relative(place, name) for name in files if not _ignored(name)]
        skipped += [relative(place, name) for name in files if _ignored(name)]
    broken = [
        n for n in names
        if not os.path.exists(root / n) and not os.path.splitext(n)[1]
    ]  # fmt: skip
    # Broken links: one without a suffix led to a folder, and is left out; one with a
    # suffix led to a file, which is counted as damaged if its name is that of an image.
    skipped += broken
    names = [name for name in names if name not in set(broken)]
    # Empty folders too: a class without images still has its number.
    try:
        firsts = [
            each.name for each in os.scandir(root)
            if os.path.isdir(each) and not _ignored(each.name)
            and os.path.realpath(each) != os.path.realpath(root)
        ]  # fmt: skip
    except OSError as error:
        raise DataError(f"{root}: {error.strerror}; give a folder to read") from error

    def opened(name):
        file = root / name
        # Opening a pipe waits for its other end, which may never come.
        if not stat.S_ISREG(os.stat(file).st_mode):
            raise OSError("no file")
        return open(file, "rb")

    return _Tree(names, firsts, skipped, unreadable, opened)


def _zip(path) -> _Tree:
    try:
        archive = zipfile.ZipFile(path)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; give the path of a zip") from None
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path}: not a readable zip ({error}); pack it again"
        ) from error
    # Some programs write back slashes, and some "./" before each name.
    packed = {_plain(member): member for member in archive.namelist()}
    members = [m for m in packed if m and not m.endswith("/")]
    kept = [m for m in members if not any(map(_ignored, m.split("/")))]
    skipped = {
        "/".join(parts[: 1 + next(i for i, p in enumerate(parts) if _ignored(p))])
        for parts in (m.split("/") for m in members)
        if any(map(_ignored, parts))
    }
    top = ""  # A folder that was packed whole is the root itself.
    while kept:
        firsts = {m.removeprefix(top).partition("/")[:2] for m in kept}
        if len(firsts) > 1 or not all(slash for _, slash in firsts):
            break
        top += "".join(firsts.pop())

    def opened(name):
        # By reading, not by the size that the zip declares, which may be a lie.
        with archive.open(packed[top + name]) as member:
            content = member.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise OSError(f"more than {LARGEST:,} bytes")
        return io.BytesIO(content)

    names = [m.removeprefix(top) for m in kept]
    folders = {
        m.removeprefix(top).partition("/")[0]
        for m in packed
        if m.startswith(top) and "/" in m.removeprefix(top)
    }
    own = [name for name in folders if not _ignored(name)]
    return _Tree(names, own, sorted(skipped), [], opened)


def _plain(name):
    """The name with "/" between its parts, without "." and ".."."""
    parts = name.replace("\\", "/").split("/")
    return "/".join(p for i, p in enumerate(parts) if p not in (".", "..") and (p or i))


def is_workdir(path) -> bool:
    """Whether a folder is the workdir of a run of this program.

    Other programs, too, leave a config.json beside their images.
    """
    try:
        known = json.loads((Path(path) / "config.json").read_text())
    except (OSError, ValueError):
        return False
    ours = {"experiment", "seed", "run", "memorization"}
    return isinstance(known, dict) and ours <= known.keys()


def is_sampled(path) -> bool:
    """Whether samples of images were written to a folder, as `memsep_jax sample` does.

    Its samples are in images/; grid.png beside them is a picture of many.
    """
    files = ("samples.npz", "grid.png", "images")
    return all(os.path.exists(os.path.join(path, name)) for name in files)


def _labels(path, files, tree):
    """(labels, classes, notes) of the files that were read."""
    if TOLD in tree.names:
        try:
            with tree.open(TOLD) as file:
                about = file.read(LARGEST)
        except Exception as error:  # of the disk, or of the zip in one of its ways
            raise DataError(
                f"{path}: {TOLD}, which has the labels, cannot be read ({error}); "
                "repair it, or take it away"
            ) from error
        labels, note = _told(path, files, about)
        if note is None:
            return labels, None, []
        notes = [note]
    else:
        notes = []
    loose = [name for name in files if "/" not in name]
    if loose:
        if len(loose) < len(files):
            notes.append(
                f"no labels, as some are in no folder of a class: {listed(loose)}"
            )
        return None, None, notes
    firsts = [name.partition("/")[0] for name in files]
    names = sorted(set(tree.folders) | set(firsts))
    splits = [name for name in names if SPLITS.fullmatch(name.lower())]
    if len(splits) > 1 or (splits and len(names) == 1):
        way_out = f"give the path of one of them, such as {Path(path) / splits[0]}"
        if not os.path.isdir(path):
            way_out = "pack one of them alone, or unpack it and give the path of one"
        raise DataError(
            f"{path} holds {listed(splits)}, which are splits and no classes: {way_out}"
        )
    # 18 digits fit an int64; sorted as text, class 10 would come before class 2.
    if all(re.fullmatch(r"\d{1,18}", name) for name in names):
        names.sort(key=int)
    places = {name: i for i, name in enumerate(names)}
    labels = np.array([places[first] for first in firsts], np.int32)
    counts = np.bincount(labels, minlength=len(names))
    shown = (f"{i} = {name} ({counts[i]:,})" for i, name in enumerate(names))
    notes.append(f"classes: {listed(shown)}")
    return labels, tuple(names), notes


def _told(path, files, about):
    """(labels, None) of dataset.json, or (None, a note that it has none)."""
    try:
        labels = json.loads(about)["labels"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None, "its dataset.json has no labels: those of the folders are taken"
    if labels is None:  # so StyleGAN's tool writes a set without labels
        return None, None
    try:
        known = {_plain(name): label for name, label in labels}
    except (TypeError, ValueError):
        known = {}
    missing = [name for name in files if name not in known]
    if missing:
        raise DataError(
            f"{path}: dataset.json has no label of {len(missing):,} of {len(files):,} "
            f"images: {listed(missing)}; write it as EDM does, or take it away"
        )
    labels = [known[name] for name in files]
    odd = [
        f for f, one in zip(files, labels, strict=True)
        if type(one) is not int or not 0 <= one < 2**31
    ]  # fmt: skip
    if odd:
        raise DataError(
            f"{path}: dataset.json has labels that are no integers from 0 on, of "
            f"{listed(odd)}; write classes as integers, or take it away"
        )
    return np.array(labels, np.int32), None


# One file.


def _on_disk(shape):
    """Zeros uint8 in a file without a name.   Raises: OSError: no space for it."""
    with tempfile.TemporaryFile() as file:
        # Written now: on a full disk, a write to mapped memory would end the process.
        for _ in range(shape[0]):
            file.write(bytes(math.prod(shape[1:])))
        file.flush()
        mapped = mmap.mmap(file.fileno(), 0)
    return np.frombuffer(mapped, np.uint8).reshape(shape)


class _Reader:
    """Reads files one by one into one array, and counts how each was treated."""

    def __init__(self, path, how, open_file, total, on_disk):
        self.path, self.how, self.open, self.total = path, how, open_file, total
        self.on_disk = on_disk
        self.suffixes = Image.registered_extensions()
        # A build of pillow may lack some. A camera's MPO is opened as JPEG.
        self.formats = [name for name in FORMATS if name in Image.OPEN]
        self.images: np.ndarray | None = None
        self.files: list[str] = []
        self.damaged: list[str] = []
        self.suspect: list[str] = []  # plain pixels that end in zeros
        self.plain = 0  # files of plain pixels
        self.others: collections.Counter = collections.Counter()  # by suffix
        self.broken_exif: list[str] = []
        self.animated: list[str] = []
        self.altered: dict[str, list[str]] = {"exif": [], "alpha": [], "crop": []}
        self.deep = (0, "")  # the brightest 16-bit pixel, and a file that has such

    def add(self, name):
        suffix = os.path.splitext(name)[1].lower()
        try:
            with self.open(name) as file:
                pixels = self._pixels(file, name, suffix)
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise DataError(
                f"{Path(self.path) / name}: {error}; make it smaller or take it out"
            ) from error
        except DataError:
            raise
        except Exception:  # every decoder of pillow fails in its own way
            # The suffix tells a damaged image from a file that never was one.
            if self.suffixes.get(suffix) in (*FORMATS, "MPO", "TGA"):
                self.damaged.append(name)
            else:
                self.others[suffix or "no suffix"] += 1
            return
        # Room for one until a second image has its size: sizes that differ are refused
        # before memory for all of them is taken.
        if self.images is None:
            self.images = pixels[None].copy()
        if pixels.shape != self.images.shape[1:]:
            raise ValueError(
                f"{self.path}: sizes differ ({self.files[0]} {self.images.shape[1:]}, "
                f"{name} {pixels.shape}); set resolution to resize all"
            )
        if len(self.files) == len(self.images):
            self.images = self._room()
        self.images[len(self.files)] = pixels
        self.files.append(name)

    def _room(self):
        """Room for all images, once two have one size; unused pages take no memory."""
        shape = self.total, *self.images.shape[1:]
        try:
            room = _on_disk(shape) if self.on_disk else np.empty(shape, np.uint8)
        except (MemoryError, OSError) as error:
            place = f" in {tempfile.gettempdir()} (TMPDIR)" if self.on_disk else ""
            raise DataError(
                f"{self.path}: {self.total:,} images of {shape[2]} x {shape[1]} pixels "
                f"take {np.prod(shape, dtype=float) / 2**30:.3g} GiB, more than there "
                f"is{place}; set resolution, or give fewer"
            ) from error
        room[:1] = self.images
        return room

    def _pixels(self, file, name, suffix):
        formats = [*self.formats, "TGA"] if suffix in TARGA else self.formats
        image = Image.open(file, formats=formats)
        kind = image.format
        # The decoder of PNG passes over checksums; after verify() the image must be
        # opened again.
        if kind == "PNG":
            image.verify()
            file.seek(0)
            image = Image.open(file, formats=formats)
        try:
            held = image.getexif().get(ExifTags.Base.Orientation, 1)
        except Exception:  # its EXIF is broken, and the image is as it is
            self.broken_exif.append(name)
            held = 1
        if kind != "MPO" and getattr(image, "n_frames", 1) > 1:
            self.animated.append(name)
        image.load()
        self._look_at_end(file, name, kind, image)
        image = self._turned(image, name, kind, held)
        if image.mode.startswith(("I", "F")):
            image = self._levels(image, name)
        elif image.has_transparency_data:
            image = image.convert("RGBA")
            # Many files have an alpha channel that is opaque everywhere: no change.
            if image.getextrema()[3][0] < 255:
                self.altered["alpha"].append(name)
            if self.how.alpha == "white":
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
        return self._sized(image.convert("RGB"), name)

    def _turned(self, image, name, kind, held):
        if held not in range(2, 9):  # upright, or nothing that EXIF knows
            return image
        self.altered["exif"].append(name)
        # Pillow itself turns a TIFF when it loads it.
        if self.how.exif == (kind == "TIFF"):
            return image
        return image.transpose(TURNS[held][1 if kind == "TIFF" else 0])

    def _levels(self, image, name):
        """Grey values of 16 bits as 8 bits."""
        grey = np.asarray(image)
        low, high = float(grey.min()), float(grey.max())
        if image.mode == "F" or not 0 <= low <= high < 2**16:
            raise DataError(
                f"{Path(self.path) / name}: its pixels are {grey.dtype} in "
                f"[{low:.4g}, {high:.4g}], and which value is white is unknown; save "
                "8 bits, 0 .. 255, or 16 bits, 0 .. 65535"
            )
        self.deep = max(self.deep, (int(high), name))
        # 65535 / 257 is 255: white stays white.
        levels = np.round(grey.astype(np.float64) / 257)
        return Image.fromarray(levels.astype(np.uint8))

    def _sized(self, image, name):
        (w, h), side = image.size, self.how.resolution
        if w != h and (self.how.crop == "center" or side is not None):
            self.altered["crop"].append(name)
        if w != h and self.how.crop == "center":
            least = min(w, h)
            left, top = (w - least) // 2, (h - least) // 2
            image = image.crop((left, top, left + least, top + least))
        if side is not None and image.size != (side, side):
            image = image.resize((side, side), Image.Resampling.LANCZOS)
        return np.asarray(image)

    def _look_at_end(self, file, name, kind, image):
        """Refuses, or suspects, a file whose end was never written."""
        if kind in CHECKED:
            return
        size = file.seek(0, os.SEEK_END)
        last = ZEROS if kind in COMPRESSED else max(1, size // TAIL)
        file.seek(max(0, size - last))
        zeros = not any(file.read(last))
        if kind in COMPRESSED:
            if zeros:
                raise OSError("it ends in zeros")
            return
        self.plain += 1
        bands = image.getextrema()
        bands = bands if isinstance(bands[0], tuple) else (bands,)
        if zeros and any(low < high for low, high in bands):
            self.suspect.append(name)

    def finish(self, unreadable, skip_bad):
        """(images, files, notes).   Raises: DataError."""
        notes, damaged = [], [*unreadable, *self.damaged]
        # Where most files of plain pixels end in zeros, they are black there; where few
        # do, these were cut short.
        few = 2 * len(self.suspect) <= self.plain
        if few:
            damaged += self.suspect
        elif self.suspect:
            notes.append(
                f"{len(self.suspect):,} images of plain pixels end in zeros, so they "
                "are black there, or were cut short when they were copied: "
                f"{listed(self.suspect)}"
            )
        count = self.total - sum(self.others.values())
        good = [name for name in self.files if not few or name not in self.suspect]
        if not good and not damaged:
            raise DataError(
                f"{self.path}: no image below it{self._without()}; give the folder "
                "that holds them"
            )
        if damaged:
            why = ""
            if few and self.suspect:
                why = (
                    f" (zeros at the end of {listed(self.suspect, 3)}, like that of a "
                    "file cut short in copying; if it is black there, save it as PNG)"
                )
            text = (
                f"{len(damaged):,} of {count:,} images cannot be read: "
                f"{listed(damaged)}{why}"
            )
            if not (skip_bad and good):
                more = "; skip_bad=True continues without them" if good else ""
                raise DataError(
                    f"{self.path}: {text}; repair them or take them out{more}"
                )
            notes.append(f"{text}; left out")
        if 0 < self.deep[0] < FULL:
            bits = self.deep[0].bit_length()
            raise DataError(
                f"{self.path}: its 16-bit pixels end at {self.deep[0]:,} "
                f"({self.deep[1]}), so they hold {bits} bits; save 8 bits, "
                f"x * 255 // {2**bits - 1}, so that white is white"
            )
        images = self.images[: len(self.files)]
        images = Rows(images) if self.on_disk else images
        if len(good) < len(images):
            images = images[np.flatnonzero(np.isin(self.files, good))]
        return images, good, notes + self._counted(len(good))

    def _without(self):
        if not self.others:
            return ""
        kinds = (f"{kind} {n:,}" for kind, n in self.others.most_common())
        return f" and {sum(self.others.values()):,} other files: {listed(kinds)}"

    def _counted(self, n):
        """Notes: what was done to how many images, and which argument undoes it."""
        how, notes = self.how, []
        if self.others:
            notes.append(f"found {n:,} images{self._without()}")
        counts = {field: len(names) for field, names in self.altered.items()}
        texts = {
            "exif": ("turned as EXIF says", "exif=False leaves them as they are")
            if how.exif
            else ("left as they are, not turned as EXIF says", "exif=True turns them"),
            "alpha": ("laid over white", "alpha=drop takes the colours below")
            if how.alpha == "white"
            else ("taken without their transparency", "alpha=white lays them over it"),
            "crop": ("cropped to their middle", "crop=squeeze keeps all of them")
            if how.crop == "center"
            else ("squeezed to a square", "crop=center cuts out the middle"),
        }
        for field, (done, other) in texts.items():
            if counts[field]:
                notes.append(f"{counts[field]:,} of {n:,} images were {done} ({other})")
        if self.animated:
            notes.append(
                f"{len(self.animated):,} files hold several images, and the first of "
                f"each was taken: {listed(self.animated)}"
            )
        if self.broken_exif:
            notes.append(
                f"{len(self.broken_exif):,} images have a broken EXIF and were taken "
                f"as they are: {listed(self.broken_exif)}"
            )
        return notes
