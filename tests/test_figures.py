"""Figures say what the numbers say, and never end a run."""

import errno

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

from memsep_jax.checkpoint import StorageError
from memsep_jax.experiments.reporting import figures


def test_a_full_disk_is_one_warning_in_each_run_of_a_process():
    def full(path):
        raise StorageError(errno.ENOSPC, f"No space left for {path}")

    for _ in range(2):  # such as two points of a sweep
        said = []
        attempt = figures.quietly(said.append)
        for path in ("a.png", "b.png"):
            attempt(full, path)
        assert len(said) == 1 and "No space left for a.png" in said[0]


def test_a_bug_in_a_figure_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        figures.quietly(print)(lambda: 1 / 0)


@pytest.mark.parametrize("shape", [(5, 8, 8, 1), (3, 6, 4, 3), (1, 100, 70, 3)])
def test_a_grid_holds_every_pixel_enlarged_and_unchanged(shape, tmp_path):
    m, h, w, _ = shape
    samples = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    figures.save_samples(tmp_path / "made" / "grid.png", samples)
    with Image.open(tmp_path / "made" / "grid.png") as image:
        pixels = np.asarray(image)
    factor, gap = -(-figures.CELL // max(h, w)), 4
    columns = int(np.ceil(np.sqrt(m)))
    for i, sample in enumerate(samples):
        top = gap + i // columns * (factor * h + gap)
        left = gap + i % columns * (factor * w + gap)
        shown = pixels[top : top + factor * h, left : left + factor * w]
        for y in range(factor):  # every copy of a pixel is that pixel
            np.testing.assert_array_equal(
                shown[y::factor, ::factor], np.broadcast_to(sample, (h, w, 3))
            )
    assert list((tmp_path / "made").iterdir()) == [tmp_path / "made" / "grid.png"]


@pytest.mark.parametrize("d", [1, 2, 32])
def test_vectors_are_points_in_a_plane(d, tmp_path):
    figures.save_samples(tmp_path / "points.png", np.ones((7, d), np.float32))
    with Image.open(tmp_path / "points.png") as image:
        assert image.format == "PNG" and min(image.size) > 300


def test_the_histogram_has_an_edge_at_any_threshold():
    """No bar mixes memorized samples and others; each sample is in one bar."""
    for threshold in (0.02, 0.2, 1 / 3, 0.5, 0.99):
        share = np.random.default_rng(0).uniform(size=200)
        figure = figures.distance_ratios(share, share < threshold, threshold)
        bars = [b for b in figure.axes[0].patches if b.get_height()]
        assert sum(b.get_height() for b in bars) == 200
        for bar in bars:
            left, right = bar.get_x(), bar.get_x() + bar.get_width()
            assert right <= threshold + 1e-9 or left >= threshold - 1e-9


@pytest.mark.parametrize("shape", [(2, 7, 3), (9, 2, 1), (3, 3, 4)])
def test_pairs_show_images_of_any_shape_with_distances_and_numbers(shape):
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (2, 3, *shape), np.uint8)
    figure = figures.pairs(
        np.array([5, 8]), images[:, 0], images[:, 1:], np.array([[0.25, 3.5], [1, 2]]),
        np.array([[41, 42], [43, 44]]), np.array([True, False]),
    )  # fmt: skip
    assert figures.encode(figure, "png").startswith(b"\x89PNG")
    axes = figure.axes[0]
    texts = [text.get_text() for text in axes.texts]
    assert sum("TRAINING" in text for text in texts) == 2
    for said in ("sample 5\ncopied", "sample 8", "train 41\n$d_1$ 0.25"):
        assert said in texts
    assert "train 44\n$d_2$ 2" in texts
    (x0, x1), (y0, y1) = axes.get_xlim(), axes.get_ylim()
    width, height = figure.get_size_inches()
    assert (x1 - x0) / width == pytest.approx((y1 - y0) / height)  # square pixels


def test_null_in_the_numbers_is_a_gap_in_the_line():
    """NaN is null in JSON: it is not drawn, and nothing fails."""
    rows = [{"step": 1, "loss": None}, {"step": 2, "loss": 0.5}, {"step": 3}]
    figure = figures.losses([*rows, {"step": 4, "train_losses": [None, 1.0]}])
    assert figures.encode(figure, "png").startswith(b"\x89PNG")
    figure = figures.noise_levels([0.1, None, 10.0], [1.0, 2.0, None], [])
    assert figures.encode(figure, "pdf").startswith(b"%PDF")


def test_the_null_level_is_a_band_where_it_is_known():
    final = {
        "step": 40, "ratio": 1.0, "interval": [0.9, 1.0], "samples": 30,
        "null": None, "null_interval": None,
    }  # fmt: skip
    rows = [{"step": 10, "ratio": 0.5, "ratio_interval": [0.3, 0.7]}]

    def labels(final):
        return figures.ratio_along(rows, final).axes[0].get_legend_handles_labels()[1]

    assert not [text for text in labels(final) if "null level" in text]
    known = final | {"null": 0.0, "null_interval": [0.0, 0.1]}
    assert [text for text in labels(known) if "null level" in text]


def test_a_log_axis_names_the_values_that_a_person_chose():
    def names(*lines):
        panel = figures.Panel("", list(lines), "t", "gap", xscale="log", yscale="log")
        (axes,) = figures.curves([panel]).axes
        return [f"{x:g}" for x in axes.get_xticks()]

    chosen = figures.Line([0.01, np.float32(0.1), 12_800.0], [1.0, 1.0, 1.0])
    collapse = figures.Line([0.693147] * 2, [1.0, 2.0])
    assert names(chosen, collapse) == ["0.01", "0.1", "12800"]
    # None of these: powers of ten are left.
    assert "0.01" in names(figures.Line([0.0081436, 1.4427], [1.0, 1.0]))


def around(mean, half=0.1):
    return {"mean": mean, "low": mean - half, "high": mean + half}


def test_the_frontier_has_every_point_with_both_of_its_intervals():
    alone = {"mean": 3.0, "low": None, "high": None}  # of one seed
    tracks = {
        "small": [("0.2", around(1.0), around(0.5)), ("0.4", around(2.0), around(0.4))],
        "none": [("", alone, alone | {"mean": 0.9})],
    }
    figure = figures.frontier(tracks, "quality", "copies", 0.01)
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == ["0.2", "0.4", ""]
    assert "null level" in axes.get_legend_handles_labels()[1]
    lines = [line for line in axes.lines if len(line.get_xdata()) and line.get_label()]
    drawn = [tuple(line.get_xdata()) for line in lines]
    assert (1.0, 2.0) in drawn and (3.0,) in drawn
    (whiskers,) = (c for c in axes.containers if c.get_label() == "small")
    segments = whiskers[2][0].get_segments()  # along x
    np.testing.assert_allclose(segments[0][:, 0], [0.9, 1.1])
    assert figures.encode(figure, "png").startswith(b"\x89PNG")


def test_every_label_has_a_bar_of_every_series():
    series = {
        name: [around(0.5), {"mean": None, "low": None, "high": None}]
        for name in ("first", "second", "third")
    }
    figure = figures.bars(["a", "b"], series, "share", [0.1, None], "searched")
    (axes,) = figure.axes
    assert len(axes.patches) == 6 and len(axes.lines) >= 1
    assert axes.get_legend_handles_labels()[1].count("searched") == 1
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    assert figures.encode(figure, "pdf").startswith(b"%PDF")


def full():
    """Name -> a figure of a page, with all the lines that it can have."""
    steps = [1, 1_000, 2_000, 4_000, 8_000]
    row = {
        "ratio": 0.5, "raw_ratio": 0.4, "ratio_interval": [0.3, 0.7],
        "raw_ratio_interval": [0.3, 0.5], "loss": 0.5, "train_losses": [0.1, 2.0],
        "held_out_losses": [1.0, 3.0],
    }  # fmt: skip
    rows = [{"step": step} | row for step in steps]
    final = {
        "step": 8_000, "ratio": 0.9, "interval": [0.8, 1.0], "samples": 10_000,
        "null": 0.01, "null_interval": [0.0, 0.1],
    }  # fmt: skip
    share = np.linspace(0, 1, 1_000)
    images = np.zeros((12, 3, 8, 8, 1), np.uint8)
    index = np.arange(49_988, 50_000)
    near = [(str(x), around(1 + x / 500), around(0.5 + x / 900)) for x in range(6)]
    return {
        "losses": figures.losses(rows),
        "noise levels": figures.noise_levels([0.01, 1, 99], [1, 2, 3], [2, 3, 4]),
        "ratio": figures.ratio_along(rows, final),
        "distances": figures.distance_ratios(
            share, share < 0.3, 1 / 3, share, "random_conv features"
        ),
        "pairs": figures.pairs(
            index, images[:, 0], images[:, 1:], np.full((12, 2), 0.0123),
            np.stack([index, index], axis=1), index > 0, "random_conv features",
        ),
        "frontier": figures.frontier({"small": near}, "quality", "copies", 0.01),
        "bars": figures.bars(
            ["a", "b"], {"first": [around(0.5)] * 2}, "share", [0.1, 0.2], "searched"
        ),
    }  # fmt: skip


def boxes(figure):
    """(words, extent) of all text that is drawn."""
    figure.draw_without_rendering()
    for text in figure.findobj(Text):
        ticks = [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]
        beyond = any(
            text in (tick.label1, tick.label2)
            and not min(axis.get_view_interval()) - 1e-9
            <= tick.get_loc()
            <= max(axis.get_view_interval()) + 1e-9
            for axis in ticks
            for tick in axis.get_major_ticks() + axis.get_minor_ticks()
        )
        if text.get_visible() and text.get_text().strip() and not beyond:
            yield text.get_text(), text.get_window_extent()


def test_no_text_lies_on_another_or_leaves_the_picture():
    for name, figure in full().items():
        every = list(boxes(figure))
        assert len(every) > 5, name
        for i, (words, box) in enumerate(every):
            assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, (name, words)
            assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1, (name, words)
            for others, other in every[:i]:
                inner = box.shrunk(0.99, 0.9)  # lines of text may touch
                assert not inner.overlaps(other), (name, words, others)


def test_equal_numbers_are_equal_files():
    for kind in ("png", "pdf"):
        made = [
            figures.encode(figures.scatter(np.eye(4), np.arange(4) > 2), kind)
            for _ in range(2)
        ]
        assert made[0] == made[1]
