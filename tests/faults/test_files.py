"""What people's files do: they are read as they were meant, or refused in words."""

import csv
import functools
import io
import json
import os
import zipfile

import numpy as np
import pytest
from PIL import Image

from configs import audit as audit_configs
from faults import harness
from memsep_jax import data, defaults, experiments
from memsep_jax.data import DataError, arrays, sources
from memsep_jax.experiments import record
from memsep_jax.experiments.config import build
from memsep_jax.experiments.studies import audit

SIDE = 12


def photos(n, seed=0, size=(SIDE, SIDE)):
    """Smooth coloured images, all different.   -> uint8 [n, h, w, 3]."""
    rng = np.random.default_rng(seed)
    w, h = size
    coarse = rng.integers(0, 256, (n, 4, 4, 3)).astype(np.uint8)
    images = [Image.fromarray(one).resize((w, h), Image.BICUBIC) for one in coarse]
    return np.stack([np.asarray(image) for image in images])


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, **options)


def tree(root, names, seed=0):
    """Saves a different photo under each name.   -> {name: [h, w, 3]}."""
    images = dict(zip(names, photos(len(names), seed), strict=True))
    for name, image in images.items():
        save(root / name, image)
    return images


def of_folder(path, *arguments):
    """A config of a training on a folder."""
    return harness.config(
        "--config=configs/mlp_mixture.py:smoke", "--config.data.name=folder",
        f"--config.data.path={path}", "--config.data.num_examples=4",
        "--config.data.num_held_out=2", "--config.data.k=None", "--config.data.d=None",
        "--config.data.scale=None", *arguments,
    )  # fmt: skip


def audited(workdir, **fields):
    """The metrics of an audit in pixels, and the rows of per_sample.csv.

    Args: fields of the config; "a__b" for a.b; an array is saved, and its path given.
    """
    config = audit_configs.get_config("smoke")
    config.features.name = "pixels"
    config.held_out = None
    for name, value in fields.items():
        *groups, field = name.split("__")
        group = functools.reduce(lambda at, name: at[name], groups, config)
        if isinstance(value, np.ndarray):
            value = in_file(workdir.parent, value, f"{workdir.name}-{name}.npy")
        group[field] = str(value) if isinstance(value, os.PathLike) else value
    experiments.run(config, workdir)
    with open(workdir / "per_sample.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return record.read_json(workdir / "metrics.json"), rows


def in_file(folder, x, name="x.npy"):
    path = folder / name
    np.savez(path, train_images=x) if name.endswith("z") else np.save(path, x)
    return str(path)


# Directories and files that are not data.


def test_h69_folders_of_other_programs_are_no_class(tmp_path):
    kept = tree(tmp_path, ["cat/1.png", "dog/1.png"])
    foreign = [".ipynb_checkpoints", ".thumbnails", ".git", "@eaDir", "__MACOSX"]
    tree(tmp_path, [f"{name}/1.png" for name in foreign] + ["dog/@eaDir/1.png"], 1)
    tree(tmp_path, ["dog/._1.png"], 2)
    read = sources.folder(tmp_path)
    assert read.files.tolist() == list(kept)
    assert read.labels.tolist() == [0, 1] and read.classes == ("cat", "dog")
    (skipped,) = [note for note in read.notes if "skipped" in note]
    assert all(name in skipped for name in (*foreign, "dog/@eaDir", "dog/._1.png"))


def test_h69_images_are_known_by_content_and_the_rest_is_counted(tmp_path):
    """Pillow would hand PostScript to ghostscript: no other program is started."""
    image = photos(1)[0]
    kinds = {
        "a.png": "PNG", "b.jpg": "JPEG", "c.jfif": "JPEG", "d.jpe": "JPEG",
        "e.avif": "AVIF", "f.jp2": "JPEG2000", "g.tga": "TGA", "h": "PNG",
        "i.bin": "BMP", "j.PNG": "PNG",
        "k.webp": "WEBP", "l.gif": "GIF", "m.qoi": "QOI",
    }  # fmt: skip
    for name, kind in kinds.items():
        save(tmp_path / name, image, format=kind)
    (tmp_path / "readme").write_text("no image")
    (tmp_path / "labels.txt").write_text("no image")
    (tmp_path / "more.txt").write_text("")
    Image.new("RGB", (9, 9)).save(tmp_path / "script.eps")
    np.save(tmp_path / "x.npy", image)
    read = sources.folder(tmp_path)
    assert read.files.tolist() == sorted(kinds)
    (note,) = [note for note in read.notes if "other files" in note]
    assert "found 13 images and 5 other files: .txt 2, " in note
    assert "no suffix 1" in note and ".eps 1" in note
    for name, got in zip(read.files, read.images, strict=True):
        if kinds[name] in ("PNG", "TGA", "BMP", "QOI"):
            np.testing.assert_array_equal(got, image)


def test_h69_linked_classes_are_followed_and_circles_are_named(tmp_path):
    images = tree(
        tmp_path, ["root/cat/1.png", "elsewhere/dog/2.png", "elsewhere/3.png"]
    )
    (tmp_path / "root" / "dog").symlink_to(tmp_path / "elsewhere" / "dog")
    (tmp_path / "elsewhere" / "dog" / "up").symlink_to(tmp_path / "root")
    read = sources.folder(tmp_path / "root")
    assert read.files.tolist() == ["cat/1.png", "dog/2.png"]
    assert read.labels.tolist() == [0, 1]
    np.testing.assert_array_equal(read.images[1], images["elsewhere/dog/2.png"])
    assert any("skipped dog/up" in note for note in read.notes)


def test_h69_a_name_that_is_no_text_is_a_name(tmp_path):
    """Names are bytes to the system; a table shows those that are no text."""
    folder = tmp_path / "samples"
    folder.mkdir()
    for image, name in zip(
        photos(3), [b"a.png", b"\xff.png", "ü.png".encode()], strict=True
    ):
        Image.fromarray(image).save(os.path.join(os.fsencode(folder), name), "PNG")
    _, rows = audited(tmp_path / "run", samples=folder, train=photos(9, 1))
    assert sorted(row["file"] for row in rows) == ["\\udcff.png", "a.png", "ü.png"]
    config = audit_configs.get_config("smoke")
    config.experiment = "report"
    experiments.run(config, tmp_path / "run")  # the table is read again


# Labels.


def stylegan(root, labels):
    """As StyleGAN and EDM store a set: shards, and dataset.json beside them."""
    names = [f"{i // 2:05d}/img{i:08d}.png" for i in range(6)]
    images = tree(root, names)
    told = labels and [[name, label] for name, label in zip(names, labels, strict=True)]
    (root / "dataset.json").write_text(json.dumps({"labels": told}))
    return images


def zipped(folder, path):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder))
    return path


@pytest.mark.parametrize("packed", [False, True])
def test_h70_labels_are_those_of_dataset_json(packed, tmp_path):
    labels = [6, 9, 9, 4, 1, 1]
    images = stylegan(tmp_path / "set", labels)
    where = tmp_path / "set"
    if packed:
        where = zipped(where, tmp_path / "set.zip")
    read = sources.folder(where)
    assert read.labels.tolist() == labels and read.classes is None
    np.testing.assert_array_equal(read.images, list(images.values()))
    stylegan(tmp_path / "none", None)
    assert sources.folder(tmp_path / "none").labels is None


def test_h70_a_dataset_json_that_does_not_fit_is_refused(tmp_path):
    stylegan(tmp_path / "set", [0, 1, 2, 3, 4, 5])
    path = zipped(tmp_path / "set", tmp_path / "set.zip")
    damaged = path.read_bytes().replace(b'{"labels"', b'{"lobels"', 1)
    path.write_bytes(damaged)  # of another checksum
    with pytest.raises(DataError, match="dataset.json, which has the labels, cannot"):
        sources.folder(path)
    tree(tmp_path / "set", [f"00009/{i:05d}.png" for i in range(40)], 1)
    with pytest.raises(DataError, match="no label of 40 of 46 images") as caught:
        sources.folder(tmp_path / "set")
    assert "and 30 more" in str(caught.value) and len(str(caught.value)) < 600
    stylegan(tmp_path / "vectors", [[0.1, 0.9]] * 6)
    with pytest.raises(DataError, match="no integers from 0 on"):
        sources.folder(tmp_path / "vectors")
    tree(tmp_path / "other", ["cat/1.png", "dog/1.png"])
    (tmp_path / "other" / "dataset.json").write_text('{"name": "of another program"}')
    read = sources.folder(tmp_path / "other")
    assert read.labels.tolist() == [0, 1]
    assert any("its dataset.json has no labels" in note for note in read.notes)


def test_h70_a_zip_is_read_in_place_for_training_and_for_audits(tmp_path):
    names = [f"cat/{i}.png" for i in (1, 2)] + [f"dog/{i}.png" for i in (1, 2, 3, 4)]
    images = tree(tmp_path / "set", names)
    tree(tmp_path / "set", ["__MACOSX/cat/._1.png"], 1)
    path = zipped(tmp_path / "set", tmp_path / "set.zip")
    splits = build.build(of_folder(path, "--config.data.labels=true")).splits
    assert splits.classes == ("cat", "dog")
    # The order of the seed; each image with its file and its label.
    for x, file, label in zip(
        splits.train.x, splits.files, splits.train.label, strict=True
    ):
        np.testing.assert_array_equal(data.to_uint8(np.asarray(x)), images[file])
        assert splits.classes[int(label)] == file.partition("/")[0]
    train = np.concatenate([photos(9, 5), images["dog/3.png"][None]])
    metrics, rows = audited(tmp_path / "run", samples=path, train=train)
    assert metrics["memorization"]["exact_copies"] == 1
    assert [row["file"] for row in rows] == names
    assert [row["memorized"] for row in rows] == ["0", "0", "0", "0", "1", "0"]
    # A folder that was packed whole is the root; not a zip is one message.
    with zipfile.ZipFile(tmp_path / "whole.zip", "w") as archive:
        for name in names:
            archive.write(tmp_path / "set" / name, f"set/{name}")
    assert sources.folder(tmp_path / "whole.zip").classes == ("cat", "dog")
    (tmp_path / "no.zip").write_text("<html>")
    with pytest.raises(DataError, match="not a readable zip"):
        sources.origin(str(tmp_path / "no.zip"))


def test_h70_zips_of_other_programs_are_read(tmp_path):
    """With back slashes, with "./" before each name, packed whole more than once."""
    tree(tmp_path / "set", ["cat/1.png", "dog/1.png"])
    for i, name in enumerate(["cat\\{}", "./cat/{}", "home/me/set/cat/{}"]):
        path = tmp_path / f"{i}.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for kind in ("cat", "dog"):
                info = zipfile.ZipInfo("x")
                info.filename = name.format("1.png").replace("cat", kind)
                content = (tmp_path / "set" / kind / "1.png").read_bytes()
                archive.writestr(info, content)
        read = sources.folder(path)
        assert read.classes == ("cat", "dog"), path
        assert read.files.tolist() == ["cat/1.png", "dog/1.png"]


def test_h70_what_loses_labels_is_told(tmp_path):
    tree(tmp_path, ["cover.png", "cat/1.png", "dog/1.png"])
    read = sources.folder(tmp_path)
    assert read.labels is None
    assert any("no labels, as some are in no folder" in note for note in read.notes)
    (tmp_path / "cover.png").unlink()
    (tmp_path / "bird").symlink_to("nowhere")
    assert any("skipped bird" in note for note in sources.folder(tmp_path).notes)


def test_h70_a_message_lists_ten_names_at_most(tmp_path):
    many = {f"picture_{i:05d}": np.zeros((2, 2), np.uint8) for i in range(3_000)}
    np.savez(tmp_path / "many.npz", **many)
    for read in (sources.npz, sources.origin):
        with pytest.raises(DataError, match="and 2,990 more") as caught:
            read(str(tmp_path / "many.npz"))
        assert len(str(caught.value)) < 600


def test_h70_numbers_sort_as_numbers_and_empty_classes_keep_theirs(tmp_path):
    tree(tmp_path, [f"{i}/x.png" for i in (0, 1, 2, 10, 11)])
    (tmp_path / "7").mkdir()
    (tmp_path / "9").mkdir()
    (tmp_path / "9" / "bad.png").write_bytes(b"no image")
    read = sources.folder(tmp_path, skip_bad=True)
    assert read.classes == ("0", "1", "2", "7", "9", "10", "11")
    # Files are in the order of ImageFolder, labels in that of the numbers.
    assert read.files.tolist() == [f"{i}/x.png" for i in (0, 1, 10, 11, 2)]
    assert read.labels.tolist() == [0, 1, 5, 6, 2]


SPLIT = [("train", "val"), ("Train", "TEST"), ("train",), ("train2017", "val2017")]


@pytest.mark.parametrize("names", SPLIT)
def test_h70_splits_are_no_classes(names, tmp_path):
    tree(tmp_path, [f"{name}/cat/1.png" for name in names])
    with pytest.raises(DataError, match="splits and no classes: give") as caught:
        sources.folder(tmp_path)
    assert str(tmp_path / names[-1]) in str(caught.value) or len(names) > 1
    assert sources.folder(tmp_path / names[0]).classes == ("cat",)


def image_folder(root):
    """The order of torchvision's ImageFolder, as its `make_dataset` walks."""
    found = []
    for name in sorted(os.listdir(root)):
        for place, _, files in sorted(os.walk(root / name, followlinks=True)):
            found += [
                os.path.relpath(os.path.join(place, f), root) for f in sorted(files)
            ]
    return found


def test_h70_the_order_of_files_is_that_of_image_folder(tmp_path):
    tree(
        tmp_path,
        [
            "a/z.png", "a/b/1.png", "a-b/1.png", "a/b-c/1.png", "a.b/1.png", "a/B.png",
            "a b/1.png", "B/1.png", "a/10.png", "a/9.png", "a/b/c/1.png",
        ],
    )  # fmt: skip
    assert sources.folder(tmp_path).files.tolist() == image_folder(tmp_path)


def test_h70_classes_are_said_and_kept_and_samples_have_names(tmp_path, capsys):
    names = [f"{kind}/{i}.png" for kind in ("cat", "dog") for i in range(6)]
    images = tree(tmp_path / "set", names)
    config = of_folder(tmp_path / "set", "--config.data.labels=true")
    experiments.run(config, tmp_path / "run")
    assert "classes: 0 = cat (6), 1 = dog (6)" in capsys.readouterr().out
    run = record.read_json(tmp_path / "run" / "run.json")
    assert run["classes"] == {"0": "cat", "1": "dog"}
    with open(tmp_path / "run" / "per_sample.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    splits = build.build(config).splits
    assert [r["nearest_file"] for r in rows] == [
        splits.files[int(r["nearest"])] for r in rows
    ]
    # In an audit: both names, and the classes of the training set.
    tree(tmp_path / "samples", ["b/1.png", "a/2.png"], seed=3)
    save(tmp_path / "samples" / "a" / "1.png", images["dog/4.png"])
    _, rows = audited(
        tmp_path / "audit", samples=tmp_path / "samples", train=tmp_path / "set"
    )
    assert [r["file"] for r in rows] == ["a/1.png", "a/2.png", "b/1.png"]
    assert rows[0]["nearest_file"] == "dog/4.png"
    assert (
        record.read_json(tmp_path / "audit" / "run.json")["classes"] == run["classes"]
    )


# Layout of arrays.

FIRST = {
    "colour": np.zeros((5, 3, 32, 32), np.uint8),
    "grey": np.zeros((5, 1, 28, 28), np.float32),
    "oblong": np.zeros((5, 3, 20, 30), np.uint8),
    "latents": np.zeros((5, 4, 32, 32), np.float32),
    "deep latents": np.zeros((5, 16, 32, 32), np.float32),
}


def test_h71_channels_first_are_refused_for_training_and_audits(tmp_path):
    for name, x in FIRST.items():
        path = in_file(tmp_path, x, "x.npz")
        read = sources.latents if "latents" in name else sources.npz
        for door in (read, lambda p, read=read: read(p, stream=True), sources.origin):
            with pytest.raises(
                DataError, match=r"channels first; give x.transpose\(0, 2"
            ):
                door(path)
    # Small and odd images are none.
    for shape in [(8, 8, 1), (4, 4, 8), (2, 2, 16), (8, 9, 1), (3, 3, 3)]:
        arrays.check_layout(np.zeros((5, *shape)), "x")


def test_h71_numbered_arrays_are_joined_or_refused(tmp_path):
    """np.savez(path, *batches), (path, *images), (path, images, labels)."""
    x, path = photos(10), str(tmp_path / "x.npz")
    singles = tuple(x[i : i + 1] for i in range(10))
    for batches in ((x[:4], x[4:8], x[8:]), tuple(x), singles):
        np.savez(path, *batches)
        np.testing.assert_array_equal(sources.origin(path).images, x)
    np.savez(path, *x[..., 0])
    np.testing.assert_array_equal(sources.origin(path).images, x[..., :1])
    np.savez(path, x, np.arange(10))
    read = sources.origin(path, "samples")
    np.testing.assert_array_equal(read.images, x)
    assert read.labels.tolist() == [*range(10)]
    for odd in [(x, x[:, :6]), (x, x.astype(np.float32)), (x, np.arange(4)), (x[0], x)]:
        np.savez(path, *odd)
        with pytest.raises(DataError, match="neither batches of images nor"):
            sources.origin(path)
    # One image is one, and three axes are otherwise grey images.
    one, grey = (sources.origin(in_file(tmp_path, y)) for y in (x[0], x[..., 0]))
    np.testing.assert_array_equal(one.images, x[:1])
    np.testing.assert_array_equal(grey.images, x[..., :1])


def test_h71_what_is_no_image_is_refused(tmp_path):
    for x, words in [
        (np.zeros((3, 28, 28), np.uint8), "one image, channels first, or 3 grey ones"),
        (np.zeros((9, 8, 8, 16), np.float32), "of 16 channels"),
    ]:
        with pytest.raises(DataError, match=words):
            sources.origin(in_file(tmp_path, x))
    np.savez(tmp_path / "labels.npz", labels=np.arange(3))
    np.savez(tmp_path / "features.npz", *np.zeros((2, 8, 50), np.float32))
    (tmp_path / "x.tar").write_bytes(b"")
    for name in ("labels.npz", "features.npz", "x.tar"):
        with pytest.raises(DataError, match="samples|neither|a kind that is not read"):
            sources.origin(str(tmp_path / name), "samples")


def test_h71_several_images_in_a_file_are_told(tmp_path):
    frames = [Image.fromarray(image) for image in photos(3)]
    for kind in ("gif", "webp", "tiff", "png"):
        path = tmp_path / f"x.{kind}"
        frames[0].save(path, save_all=True, append_images=frames[1:])
    (note,) = [n for n in sources.folder(tmp_path).notes if "several images" in n]
    assert "4 files hold several images, and the first of each" in note


# Range.


def test_h72_floats_that_do_not_fill_their_range_are_refused(tmp_path):
    x = data.from_uint8(photos(20))
    noise = np.random.default_rng(0).normal(0, 0.02, x.shape)
    unit = photos(20) / np.float32(255)
    noisy = (unit + noise).astype(np.float32).clip(-1, 1)
    assert noisy.min() < 0
    for wrong, words in [
        (unit, r"as images in \[0, 1\].*255 \* x"),
        (noisy, r"as images in \[0, 1\].*255 \* x"),
        (x / 2, r"as images in \[-0.5, 0.5\]"),
        (x / 9, "must fill"),
    ]:
        for name, door in (("x.npy", sources.origin), ("x.npz", sources.npz)):
            with pytest.raises(DataError, match=words):
                door(in_file(tmp_path, wrong, name))
    # In [-1, 1] they are what they were: flat ones, white pages with little ink, and
    # what was rounded, too.
    rounded = np.where(x > 0.99, np.float32(1.0000002), x)
    for right in (x, rounded):
        read = sources.origin(in_file(tmp_path, right)).images
        np.testing.assert_array_equal(read, np.where(right > 1, 255, photos(20)))
    page = np.ones((3, 40, 40, 1), np.float32)
    page[:, 3, 4:6] = -1
    assert sources.origin(in_file(tmp_path, page)).images.max() == 255
    for flat in (np.ones_like(x), np.zeros_like(x), -np.ones_like(x)):
        sources.npz(in_file(tmp_path, flat, "flat.npz"))


def test_h72_masks_are_refused_and_dark_sets_are_told(tmp_path):
    x = (photos(20)[..., :1] > 128).astype(np.uint8)
    save(tmp_path / "masks" / "a.png", x[0, ..., 0])
    save(tmp_path / "masks" / "b.png", x[1, ..., 0])
    for where, door in [
        (in_file(tmp_path, x), sources.origin), (tmp_path / "masks", sources.folder),
        (in_file(tmp_path, x, "x.npz"), sources.npz),
    ]:  # fmt: skip
        with pytest.raises(DataError, match="0 and 1 only.*255"):
            door(where)
    for read in (
        sources.origin(in_file(tmp_path, photos(20) // 16)),
        sources.npz(in_file(tmp_path, photos(20) // 16, "x.npz")),
    ):
        assert any("the brightest pixel is 15 of 255" in note for note in read.notes)
    (note,) = sources.origin(in_file(tmp_path, np.zeros((3, 8, 8, 1), np.uint8))).notes
    assert "3 constant images" in note


def grey(tmp_path, x, name):
    (tmp_path / "deep").mkdir(exist_ok=True)
    for i, one in enumerate(x):
        Image.fromarray(one).save(tmp_path / "deep" / f"{i}.{name}")
    return tmp_path / "deep"


def test_h72_deep_files_that_do_not_fill_their_range_are_refused(tmp_path):
    x = photos(4)[..., 0].astype(np.float64) / 255
    x[0, 0, 0], x[0, 0, 1] = 0, 1
    cases = {
        "floats": ((x.astype(np.float32), "tiff"), r"float32 in \[0, 1\]"),
        "int32": (((255 * x).astype(np.int32), "tiff"), "end at 255 .*hold 8 bits"),
        "12 bits": (((4095 * x).astype(np.uint16), "png"), "end at 4,095 .*12 bits"),
        "negative": (
            ((255 * x).astype(np.int32) - 9, "tiff"),
            "white is unknown",
        ),
    }
    for (images, name), words in cases.values():
        where = grey(tmp_path, images, name)
        with pytest.raises(DataError, match=words):
            sources.folder(where)
        for file in where.iterdir():
            file.unlink()
    where = grey(tmp_path, np.round(65535 * x).astype(np.uint16), "png")
    got = sources.folder(where).images[..., 0]
    np.testing.assert_array_equal(got, np.round(np.round(65535 * x) / 257))


@pytest.mark.parametrize("order", [">", "<"])
def test_h72_every_byte_order_is_read(order, tmp_path):
    x = data.from_uint8(photos(5))
    other = x.astype(f"{order}f4")
    read = sources.origin(in_file(tmp_path, other)).images
    np.testing.assert_array_equal(read, photos(5))
    path = in_file(tmp_path, other, "x.npz")
    read = sources.npz(path).images
    assert read.dtype.isnative
    np.testing.assert_array_equal(read, x)
    data.splits("npz", 4, path=path, num_held_out=1)
    if not other.dtype.isnative:
        with pytest.raises(DataError, match="byte order of another machine"):
            sources.npz(path, stream=True)


def test_h72_sets_of_unlike_pixels_are_told_and_never_cleared(tmp_path):
    """In samples that are half as bright, copies do not show."""
    x, samples = photos(100), photos(45, 1)
    metrics, _ = audited(tmp_path / "like", samples=samples, train=x)
    assert not metrics["unlike"]
    samples[:20] = x[:20]
    metrics, _ = audited(
        tmp_path / "dark", samples=samples // 2, train=x, held_out=photos(100, 2)
    )
    (told,) = [note for note in metrics["notes"] if "are unlike" in note]
    assert [told] == metrics["unlike"]
    assert f"0 .. {samples.max() // 2} beside 0 .. 255" in told
    assert metrics["verdict"]["name"] in ("unknown", "undertrained")
    assert metrics["verdict"]["alarm"] is None


# Preparations.


def test_h73_a_folder_tells_what_it_did_and_does_it_the_other_way(tmp_path):
    wide = photos(1, size=(2 * SIDE, SIDE))[0]
    save(tmp_path / "wide.png", wide)
    turned, half = photos(2, seed=1)
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "turned.png", turned, exif=exif)
    alpha = np.full((SIDE, SIDE, 1), 255, np.uint8)
    alpha[: SIDE // 2] = 0
    save(tmp_path / "half.png", np.concatenate([half, alpha], axis=2))
    opaque = np.concatenate([half, 255 + 0 * alpha], axis=2)
    save(tmp_path / "opaque.png", opaque)
    read = sources.folder(tmp_path, resolution=SIDE)
    told = "\n".join(read.notes)
    assert "1 of 4 images were turned as EXIF says (exif=False" in told
    assert "1 of 4 images were laid over white (alpha=drop" in told
    assert "1 of 4 images were squeezed to a square (crop=center" in told
    images = dict(zip(read.files, read.images, strict=True))
    np.testing.assert_array_equal(images["turned.png"], np.rot90(turned, -1))
    assert (images["half.png"][: SIDE // 2] == 255).all()
    np.testing.assert_array_equal(images["opaque.png"], half)
    other = sources.folder(tmp_path, SIDE, crop="center", exif=False, alpha="drop")
    told = "\n".join(other.notes)
    assert "1 of 4 images were left as they are" in told and "exif=True" in told
    assert "taken without their transparency (alpha=white" in told
    assert "cropped to their middle (crop=squeeze" in told
    images = dict(zip(other.files, other.images, strict=True))
    np.testing.assert_array_equal(images["turned.png"], turned)
    np.testing.assert_array_equal(images["half.png"], half)
    middle = wide[:, SIDE // 2 : SIDE // 2 + SIDE]
    np.testing.assert_array_equal(images["wide.png"], middle)
    # As fields of a training.
    arguments = ["crop=center", "exif=False", "alpha=drop", f"resolution={SIDE}"]
    arguments = [f"--config.data.{argument}" for argument in arguments]
    config = of_folder(tmp_path, *arguments, "--config.data.num_examples=3")
    config.data.num_held_out = 1
    splits = build.build(config).splits
    for x, file in zip(splits.train.x, splits.files, strict=True):
        np.testing.assert_array_equal(data.to_uint8(np.asarray(x)), images[file])
    assert [*splits.notes] == [*other.notes]
    wrong = of_folder(tmp_path, "--config.data.crop=middle")
    with pytest.raises(build.ConfigError, match="crop='middle' must be one of squeeze"):
        build.build(wrong)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_h73_every_orientation_is_turned_or_left(kind, orientation, tmp_path):
    """Pillow turns a TIFF itself when it loads it, and nothing else."""
    image = photos(1, size=(SIDE, 2 * SIDE))[0]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    save(tmp_path / f"x.{kind}", image, format=kind, exif=exif, **options)
    turned = {
        1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud,
        5: lambda x: x.swapaxes(0, 1), 6: lambda x: np.rot90(x, -1),
        7: lambda x: np.rot90(x, 2).swapaxes(0, 1), 8: np.rot90,
    }[orientation]  # fmt: skip
    upright = sources.folder(tmp_path)
    left = sources.folder(tmp_path, exif=False)
    assert (
        len(upright.altered["exif"]) == len(left.altered["exif"]) == (orientation > 1)
    )
    for read, meant in ((upright, turned(image)), (left, image)):
        assert read.images[0].shape == meant.shape
        error = np.abs(read.images[0].astype(int) - meant)
        assert error.mean() < (9 if kind == "JPEG" else 1e-9)


@pytest.mark.parametrize("way", harness.some(["crop", "exif", "alpha"], 0))
def test_h73_copies_that_another_preparation_hides_are_found(way, tmp_path):
    """A generator that was trained on the middle, unturned or opaque images."""
    x = photos(60, size=(3 * SIDE, 2 * SIDE) if way == "crop" else (SIDE, SIDE))
    samples = []
    for i, image in enumerate(x):
        options = {}
        seen = image
        if way == "crop":
            margin = SIDE // 2
            middle = image[:, margin : margin + 2 * SIDE]
            seen = Image.fromarray(middle).resize((SIDE, SIDE), Image.LANCZOS)
        elif way == "exif":
            options["exif"] = Image.Exif()
            options["exif"][0x0112] = 6
        else:
            alpha = np.zeros((SIDE, SIDE, 1), np.uint8)
            alpha[: SIDE // 4] = 255
            image = np.concatenate([image, alpha], axis=2)
        save(tmp_path / "train" / f"{i:02d}.png", image, **options)
        samples.append(np.asarray(seen))
    for i, image in enumerate(photos(60, seed=1)):
        save(tmp_path / "held_out" / f"{i:02d}.png", image)
        if i % 2:  # half of the samples are new
            samples[i] = photos(60, seed=2)[i]
    np.save(tmp_path / "samples.npy", np.stack(samples))
    sets = dict(samples=tmp_path / "samples.npy", train=tmp_path / "train")
    sets |= dict(held_out=tmp_path / "held_out", resolution=SIDE)
    metrics, _ = audited(tmp_path / "run", **sets)
    assert metrics["memorization"]["count"] == 0
    (found,) = [way for way in metrics["other_ways"] if way["set"] == "train"]
    assert found["finds"] and found["count"] == 30
    field = {"crop": "crop=center", "exif": "exif=False", "alpha": "alpha=drop"}[way]
    assert found["way"] == f"--config.train_as.{field}"
    assert metrics["verdict"]["alarm"] is True
    assert found["way"] in metrics["verdict"]["small"]
    assert found["way"] in metrics["advice"][0]["text"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert f"train_as.{field}" in page
    name, value = field.split("=")
    metrics, _ = audited(
        tmp_path / "other",
        **sets | {f"train_as__{name}": value if name != "exif" else False},
    )
    assert metrics["memorization"]["count"] == 30


def squeezed_copies(tmp_path):
    """40 wide training files, and 200 samples of which the first are their middles."""
    wide = photos(40, size=(2 * SIDE, SIDE))
    for i, image in enumerate(wide):
        save(tmp_path / "train" / f"{i:02d}.png", image)
    middles = wide[:, :, SIDE // 2 : SIDE // 2 + SIDE]
    samples = np.concatenate([middles, photos(160, 2)])
    return dict(samples=samples, train=tmp_path / "train", resolution=SIDE)


@pytest.mark.slow
def test_h73_a_part_of_the_files_is_told_and_still_finds_copies(tmp_path, monkeypatch):
    """A large training set is tried in part, so a part of the copies is found."""
    monkeypatch.setattr(audit, "TRIED", 10)
    monkeypatch.setattr(audit, "FILES", 10)
    monkeypatch.setattr(audit, "_few", lambda x, most: x[:: 4 if len(x) == 40 else 1])
    sets = squeezed_copies(tmp_path)
    metrics, _ = audited(tmp_path / "run", held_out=photos(300, 3), **sets)
    (found,) = [way for way in metrics["other_ways"] if way["set"] == "train"]
    assert (found["count"], found["files"], found["of"]) == (10, 10, 40)
    assert metrics["verdict"]["name"] == "copies"
    assert "10 of the 40 images that it changes" in metrics["verdict"]["small"]


@pytest.mark.slow
def test_h73_without_held_out_images_a_way_raises_no_alarm(tmp_path):
    metrics, _ = audited(tmp_path / "run", **squeezed_copies(tmp_path))
    found = metrics["verdict"]
    assert metrics["other_ways"][0]["finds"]
    assert (found["name"], found["alarm"]) == ("unknown", None)
    assert "with --config.train_as.crop=center 20.0 %" in found["small"]


@pytest.mark.slow
def test_h73_where_no_way_finds_copies_none_is_reported(tmp_path):
    for name, seed in (("train", 0), ("held_out", 1), ("samples", 2)):
        for i, image in enumerate(photos(20, seed, size=(2 * SIDE, SIDE))):
            save(tmp_path / name / f"{i:02d}.png", image)
    sets = {name: tmp_path / name for name in ("train", "held_out", "samples")}
    metrics, _ = audited(tmp_path / "run", resolution=SIDE, **sets)
    assert metrics["other_ways"] and not any(w["finds"] for w in metrics["other_ways"])
    assert metrics["verdict"]["alarm"] is False
    config = audit_configs.get_config("smoke")
    config.train_as.crop = "centre"
    with pytest.raises(build.ConfigError, match="train_as.crop='centre' must be"):
        experiments.run(config, tmp_path / "refused")


MISTAKES = {
    "bgr": lambda x: x[..., ::-1],  # as OpenCV writes colours
    "turned": lambda x: x[:, ::-1],
    "columns": lambda x: x.swapaxes(1, 2),
}


@pytest.mark.parametrize("name", harness.some(MISTAKES))
def test_h73_samples_stored_in_another_order_are_found(name, tmp_path):
    x = photos(100)
    samples = MISTAKES[name](np.concatenate([x[:20], photos(40, 1)]))
    metrics, _ = audited(
        tmp_path / "run", samples=samples, train=x, held_out=photos(100, 2)
    )
    assert metrics["memorization"]["count"] == 0
    (found,) = [way for way in metrics["other_ways"] if way["finds"]]
    assert found["count"] == 20 and metrics["verdict"]["name"] == "copies"
    assert metrics["verdict"]["small"].count(found["way"]) == 1


def test_h75_exact_copies_are_copies_however_few_were_held_out(tmp_path):
    x, samples = photos(100), photos(60, 1)
    samples[:3] = x[:3]
    metrics, _ = audited(
        tmp_path / "run", samples=samples, train=x, held_out=photos(1, 2)
    )
    assert (metrics["verdict"]["name"], metrics["verdict"]["alarm"]) == ("copies", True)
    assert "3 of its samples equal a training image" in metrics["verdict"]["small"]


def test_h77_sets_that_hold_each_other_are_refused(tmp_path):
    tree(tmp_path / "train", ["1.png", "2.png", "generated/1.png"])
    config = audit_configs.get_config("smoke")
    config.train, config.held_out = str(tmp_path / "train"), None
    config.samples = str(tmp_path / "train" / "generated")
    with pytest.raises(build.ConfigError, match="is inside of --config.train"):
        experiments.run(config, tmp_path / "run")
    np.save(tmp_path / "x.npy", photos(9, 3))
    config.samples = config.held_out = str(tmp_path / "x.npy")
    with pytest.raises(build.ConfigError, match="are the same 9 images"):
        experiments.run(config, tmp_path / "run")


def test_h71_grey_arrays_are_compared_with_grey_files(tmp_path):
    x = photos(30)[..., 0]
    for i, image in enumerate(x):
        save(tmp_path / "train" / f"{i:02d}.png", image)
    samples = np.concatenate([x[:5], photos(9, 1)[..., 0]])
    metrics, _ = audited(tmp_path / "run", samples=samples, train=tmp_path / "train")
    assert metrics["memorization"]["exact_copies"] == 5
    assert any("compared in three colours" in note for note in metrics["notes"])


# Damage.


def encoded(image, kind, **options):
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP", "AVIF", "TGA"])
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_h74_files_that_end_in_zeros_are_damaged(kind, share, tmp_path):
    """As a copy leaves them that was cut short on a disk that had reserved them."""
    x = photos(6, size=(48, 48))
    for i, image in enumerate(x):
        whole = encoded(image, kind)
        if i == 2:
            cut = int(share * len(whole))
            whole = whole[:cut] + bytes(len(whole) - cut)
        (tmp_path / f"{i}.{kind.lower()}").write_bytes(whole)
    name = f"2.{kind.lower()}"
    with pytest.raises(DataError, match=f"1 of 6 images cannot be read: {name}"):
        sources.folder(tmp_path)
    assert len(sources.folder(tmp_path, skip_bad=True).images) == 5


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP", "AVIF", "QOI"])
def test_h74_black_images_are_no_damage(kind, tmp_path):
    """Neither one of a single colour nor a set on a black ground."""
    for side in (1, 6, 48, 300):
        blank = np.zeros((side, side, 3), np.uint8)
        folder = tmp_path / f"{side}"
        folder.mkdir()
        (folder / "blank").write_bytes(encoded(blank, kind))
        assert (sources.folder(folder).images == 0).all()
    grounds = photos(6, size=(48, 48)) // 2
    grounds[:, :12] = grounds[:, -12:] = 0
    (tmp_path / "grounds").mkdir()
    for i, image in enumerate(grounds):
        (tmp_path / "grounds" / f"{i}").write_bytes(encoded(image, kind))
    read = sources.folder(tmp_path / "grounds")
    assert len(read.images) == 6
    told = any("6 images of plain pixels end in zeros" in note for note in read.notes)
    assert told == (kind in ("BMP", "TIFF", "PPM"))


def test_h74_a_broken_exif_leaves_the_image_as_it_is(tmp_path):
    image = photos(1)[0]
    whole = encoded(image, "JPEG", quality=95)
    good = np.asarray(Image.open(io.BytesIO(whole)))
    broken = [b"Exif\0\0MM\0*\0\0\0\x08\0\xff\x01\x12", b"Exif\0\0II*\0" + b"\xff" * 40]
    for i, tags in enumerate(broken):
        segment = b"\xff\xe1" + (len(tags) + 2).to_bytes(2, "big") + tags
        (tmp_path / f"{i}.jpg").write_bytes(whole[:2] + segment + whole[2:])
    read = sources.folder(tmp_path)
    np.testing.assert_array_equal(read.images, [good] * 2)


# Workdirs, and what looks like one.


def test_h77_a_config_json_of_another_program_is_no_run(tmp_path):
    images = tree(tmp_path, ["1.png", "2.png"])
    for content in (
        '{"model": {"name": "sd"}}', "[1, 2]", '"text"', "{",
        '{"data": 3, "model": null}',
    ):  # fmt: skip
        (tmp_path / "config.json").write_text(content)
        read = audit.images_of(str(tmp_path), "samples")
        np.testing.assert_array_equal(read.images, list(images.values()))


def test_h77_a_home_is_expanded_and_figures_are_no_samples(tmp_path, monkeypatch):
    run = tmp_path / "run"
    config = defaults.smoke(defaults.digits())
    record.write_json(run / "config.json", build.to_json(config))
    tree(run, ["figures/loss.png", "samples/step_1.png"])
    for role, where in (("samples", run), ("pool", tmp_path / "audit")):
        record.write_json(
            tmp_path / "audit" / "config.json", build.to_json(defaults.audit())
        )
        tree(tmp_path / "audit", ["figures/pairs.png"])
        with pytest.raises(DataError, match="is a run without images for it"):
            audit.images_of(str(where), role)
    with pytest.raises(DataError, match="is the workdir of a run"):
        sources.folder(run)
    x = sources.digits().images[:5]
    record.write_npz(run / "samples.npz", samples=x)
    monkeypatch.setenv("HOME", str(tmp_path))
    np.testing.assert_array_equal(audit.images_of("~/run", "samples").images, x)
