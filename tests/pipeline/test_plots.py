"""Figures: the scale, the panels, odd maps and shapes, files."""

import os
from pathlib import Path

import matplotlib._pylab_helpers
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from PIL import Image

from attrbox.core.results import Attribution, Coverage
from attrbox.errors import FileError, InputError, OptionError
from attrbox.visualization import plots
from attrbox.visualization.plots import plot_comparison, plot_map


def maps(values, targets=None, target=True, reduction="sum"):
    """Maps with these values, for `targets` targets each if that is a number."""
    score = torch.zeros(values.shape[: 1 if targets is None else 2])
    indices = torch.arange(score.numel()).reshape(score.shape) if target else None
    return Attribution("made_up", values, indices, score, {}, Coverage(), reduction=reduction)


@pytest.fixture
def images():
    return torch.rand(2, 3, 20, 30, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def noise():
    return torch.randn(2, 3, 20, 30, generator=torch.Generator().manual_seed(1))


def drawn(figure: Figure, row: int, column: int, columns: int) -> AxesImage | None:
    """What a panel shows, if anything."""
    axes = figure.axes[row * columns + column]
    return axes.images[0] if axes.images else None


def words(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.texts] + [text.get_text() for axes in figure.axes for text in axes.texts]


def test_a_panel_is_its_map_over_its_own_percentile(images, noise):
    figure = plot_comparison(images, {"small": maps(noise), "large": maps(1024 * noise)})
    for row in range(2):
        heatmap = noise[row].double().sum(0).numpy()
        scale = np.percentile(np.abs(heatmap), 99.5)
        wanted = np.clip(heatmap / scale, -1, 1)
        for column in (1, 2):
            np.testing.assert_allclose(drawn(figure, row, column, 3).get_array(), wanted, rtol=1e-6)
        assert (np.abs(wanted) == 1).sum() == 3  # the 0.5 % of 600 pixels beyond the scale get the last colour


def test_all_panels_and_the_bar_share_one_scale_around_white(images, noise):
    figure = plot_comparison(images, {"signed": maps(noise), "positive": maps(noise.abs())})
    panels = [drawn(figure, row, column, 3) for row in range(2) for column in (1, 2)]
    for panel in panels:
        assert (panel.norm.vmin, panel.norm.vmax) == (-1, 1)
        assert panel.cmap(panel.norm(0.0)) == (1, 1, 1, 1)
        red, _, blue, _ = panel.cmap(panel.norm(1.0))
        assert red > 2 * blue
        red, _, blue, _ = panel.cmap(panel.norm(-1.0))
        assert blue > 2 * red
    bar = figure.axes[-1]
    assert bar.get_xlim() == (-1, 1)
    assert "99.5th percentile" in bar.get_xlabel()
    assert len(figure.axes) == 2 * 3 + 1  # no second bar


def test_a_panel_does_not_depend_on_the_other_methods(images, noise):
    alone = plot_comparison(images, {"one": maps(noise)})
    beside = plot_comparison(images, {"other": maps(100 * noise.flip(0)), "one": maps(noise)})
    for row in range(2):
        np.testing.assert_array_equal(drawn(alone, row, 1, 2).get_array(), drawn(beside, row, 2, 3).get_array())


def test_channels_are_reduced_as_the_method_says(images, noise):
    figure = plot_comparison(images, {"one": maps(noise, reduction="max")})
    heatmap = noise[1].amax(0).double().numpy()
    np.testing.assert_allclose(
        drawn(figure, 1, 1, 2).get_array(), np.clip(heatmap / np.percentile(np.abs(heatmap), 99.5), -1, 1), rtol=1e-6
    )


def test_half_precision_neither_overflows_nor_underflows(images, noise):
    heatmaps = {
        "large": maps((1e4 * noise).half()),
        "tiny": maps((1e-6 * noise).half()),
        "other": maps(noise.bfloat16()),
    }
    figure = plot_comparison(images, heatmaps)
    for column in (1, 2, 3):
        assert np.abs(drawn(figure, 0, column, 4).get_array()).max() == 1


@pytest.mark.parametrize(
    ("value", "note"),
    [(0.0, "all zero"), (float("nan"), "contains NaN"), (float("inf"), "contains infinity")],
)
def test_maps_that_cannot_be_drawn_leave_a_note(images, noise, value, note, tmp_path):
    bad = noise.clone()
    bad[1] = value
    figure = plot_comparison(images, {"one": maps(bad)}, tmp_path / "figure.png")
    assert drawn(figure, 0, 1, 2) is not None
    assert drawn(figure, 1, 1, 2) is None
    assert words(figure).count(note) == 1


def test_a_map_with_few_pixels_is_scaled_by_its_largest(images):
    sparse = torch.zeros(2, 1, 20, 30)
    sparse[:, 0, 3, 4] = -7
    panel = drawn(plot_comparison(images, {"one": maps(sparse)}), 0, 1, 2).get_array()
    assert panel[3, 4] == -1
    assert panel.sum() == -1


def test_denormal_and_huge_maps_do_not_overflow(images, noise):
    extremes = {"tiny": maps(noise.double() * 1e-320), "huge": maps(noise.double() * 1e300)}
    figure = plot_comparison(images, extremes)
    assert all(np.isfinite(drawn(figure, 0, column, 3).get_array()).all() for column in (1, 2))


def test_one_row_per_image_and_target(images):
    values = torch.randn(2, 3, 1, 20, 30)
    figure = plot_comparison(images, {"one": maps(values, targets=3)})
    assert len(figure.axes) == 6 * 2 + 1
    for row in range(6):
        heatmap = values[row // 3, row % 3, 0].double().numpy()
        panel = drawn(figure, row, 1, 2).get_array()
        np.testing.assert_allclose(panel, np.clip(heatmap / np.percentile(np.abs(heatmap), 99.5), -1, 1), rtol=1e-6)
        np.testing.assert_array_equal(
            drawn(figure, row, 0, 2).get_array(), drawn(figure, row - row % 3, 0, 2).get_array()
        )
    assert [word for word in words(figure) if word.startswith("class")] == [f"class {index}" for index in range(6)]


def test_titles_of_images_rows_and_none(images):
    many = {"one": maps(torch.randn(2, 2, 3, 20, 30), targets=2)}
    assert "cat\nclass 1" in words(plot_comparison(images, many, titles=["cat", "dog"]))
    assert "c" in words(plot_comparison(images, many, titles=["a", "b", "c", "d"]))
    function = {"one": maps(torch.randn(2, 2, 3, 20, 30), targets=2, target=False)}
    assert "target 1" in words(plot_comparison(images, function))
    with pytest.raises(InputError, match="title"):
        plot_comparison(images, many, titles=["a", "b", "c"])


def test_methods_with_targets_of_their_own_get_no_common_title(images, noise):
    one = maps(noise)
    other = Attribution("made_up", noise, torch.tensor([7, 8]), one.score, {}, Coverage())
    assert not any(word.startswith("class") for word in words(plot_comparison(images, {"one": one, "other": other})))


def test_more_rows_than_wanted_are_counted():
    images, values = torch.rand(5, 1, 8, 8), torch.randn(5, 3, 1, 8, 8)
    figure = plot_comparison(images, {"one": maps(values, targets=3)}, max_images=4)
    assert len(figure.axes) == 4 * 2 + 1
    assert "the first 4 of 15 rows" in words(figure)
    with pytest.raises(OptionError, match="max_images"):
        plot_comparison(images, {"one": maps(values, targets=3)}, max_images=0)


@pytest.mark.parametrize("shape", [(2, 12), (2, 3, 50), (2, 1, 5, 8, 8), (2, 1, 2, 3, 8, 8)])
def test_vectors_sequences_and_volumes(shape, tmp_path):
    values = torch.randn(shape)
    figure = plot_comparison(torch.randn(shape), {"one": maps(values)}, tmp_path / "figure.png")
    middle = values[0] if len(shape) == 2 else values[0].sum(0)
    while middle.dim() > 2:
        middle = middle[len(middle) // 2]
    wanted = np.atleast_2d(np.sign(middle.numpy()))
    np.testing.assert_array_equal(np.sign(drawn(figure, 0, 1, 2).get_array()), wanted)
    assert ("the middle slice of each volume" in words(figure)) == (len(shape) > 4)


def test_texts_are_no_formulas_and_have_no_control_characters(images, noise, tmp_path):
    figure = plot_comparison(
        images,
        {"$x_{$(steps=100)": maps(noise), "a_very_long_name" * 9: maps(noise)},
        tmp_path / "figure.png",
        titles=["$5 \\frac {", "nul\0 \x1b[31m \udcff"],
    )
    assert "nul? ?[31m ?" in words(figure)
    assert "$5 \\frac {" in words(figure)
    assert "$x {$\n(steps=100)" in words(figure)
    assert max(word.count("\n") for word in words(figure)) <= 4


def test_photographs_of_every_kind_show_the_same(images, noise):
    eight = (images * 255).round().to(torch.uint8)
    array = eight.movedim(1, -1).numpy()
    wanted = array[1] / 255
    kinds = [eight, eight.double() / 255, list(array), array / 255, [Image.fromarray(one) for one in array]]
    for photographs in kinds:
        figure = plot_comparison(3 * images - 1, {"one": maps(noise)}, photographs=photographs)
        np.testing.assert_allclose(drawn(figure, 1, 0, 2).get_array(), wanted, atol=1e-6)


def test_images_are_stretched_to_their_own_range(noise):
    figure = plot_comparison(noise * torch.tensor([1.0, 5]).view(2, 1, 1, 1), {"one": maps(noise)})
    for row in range(2):
        shown = drawn(figure, row, 0, 2).get_array()
        assert (shown.min(), shown.max()) == (0, 1)
    constant = plot_comparison(torch.ones(2, 3, 20, 30), {"one": maps(noise)})
    assert (drawn(constant, 0, 0, 2).get_array() == 0.5).all()


def test_what_does_not_fit_is_refused(images, noise):
    with pytest.raises(InputError, match="at least one method"):
        plot_comparison(images, {})
    with pytest.raises(InputError, match="maps of the 1 images"):
        plot_comparison(images[:1], {"one": maps(noise)})
    with pytest.raises(InputError, match="as many targets"):
        plot_comparison(images, {"one": maps(noise), "two": maps(noise[:, None], targets=1)})
    with pytest.raises(InputError, match="Tensor"):
        plot_comparison(images.numpy(), {"one": maps(noise)})
    with pytest.raises(InputError, match="at least one"):
        plot_comparison(images[:0], {"one": maps(noise[:0])})
    with pytest.raises(InputError, match="one photograph"):
        plot_comparison(images, {"one": maps(noise)}, photographs=images[:1])
    with pytest.raises(InputError, match="Crop it"):
        plot_comparison(images, {"one": maps(noise)}, photographs=torch.rand(2, 3, 30, 30))
    with pytest.raises(InputError, match="PIL image"):
        plot_comparison(images, {"one": maps(noise)}, photographs=["cat.png", "dog.png"])
    with pytest.raises(InputError, match="meta"):
        plot_comparison(images, {"one": maps(noise.to("meta"))})
    with pytest.raises(OptionError, match="dpi"):
        plot_comparison(images, {"one": maps(noise)}, dpi=0)


def test_nothing_outside_changes(images, noise):
    state, values, before = torch.get_rng_state(), noise.clone().requires_grad_(), np.random.get_state()[1].copy()  # noqa: NPY002
    plot_comparison(images, {"one": maps(values)})
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002
    assert torch.equal(values, noise)
    assert not matplotlib._pylab_helpers.Gcf.figs  # pyplot knows of no figure


# --------------------------------------------------------------------------------------------------------------- files


def test_png_in_a_new_folder_as_it_was_drawn(images, noise, tmp_path):
    path = tmp_path / "new" / "folder" / "figure.png"
    figure = plot_comparison(images, {"one": maps(noise)}, path, dpi=100)
    with Image.open(path) as image:
        assert image.info["dpi"] == pytest.approx((100, 100), abs=0.1)
        assert np.array_equal(np.asarray(image), np.asarray(figure.canvas.buffer_rgba()))


@pytest.mark.parametrize("suffix", ["pdf", "svg", "JPG"])
def test_other_formats(images, noise, tmp_path, suffix):
    plot_comparison(images, {"one": maps(noise)}, str(tmp_path / f"figure.{suffix}"))
    start = {"pdf": b"%PDF", "svg": b"<?xml", "JPG": b"\xff\xd8"}[suffix]
    assert (tmp_path / f"figure.{suffix}").read_bytes().startswith(start)
    assert len(os.listdir(tmp_path)) == 1


def test_a_failed_save_leaves_the_old_file(images, noise, tmp_path, monkeypatch):
    path = tmp_path / "figure.pdf"
    path.write_text("old")

    def fail(self, file, **options):
        Path(file).write_bytes(b"half a fig")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(plots.Figure, "savefig", fail)
    with pytest.raises(FileError, match=r"figure\.pdf.*No space left"):
        plot_comparison(images, {"one": maps(noise)}, path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["figure.pdf"]


def test_an_old_figure_is_replaced(images, noise, tmp_path):
    path = tmp_path / "figure.png"
    path.write_text("old")
    plot_comparison(images, {"one": maps(noise)}, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert os.listdir(tmp_path) == ["figure.png"]


def test_paths_that_cannot_be_written(images, noise, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "folder.png").mkdir()
    for name in ("file/figure.png", "folder.png", "nul\0.png", "n" * 300 + "/figure.png"):
        with pytest.raises(FileError):
            plot_comparison(images, {"one": maps(noise)}, tmp_path / name)
    for name in ("figure", "figure.docx"):
        with pytest.raises(FileError, match="end in one of"):
            plot_comparison(images, {"one": maps(noise)}, tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.png"]


def test_figures_too_large_to_render_get_fewer_dots():
    images = torch.rand(60, 1, 4, 4)
    figure = plot_comparison(images, {"one": maps(images - 0.5)}, max_images=60, dpi=5000)
    assert max(figure.get_size_inches() * figure.dpi) < 2**16


# ------------------------------------------------------------------------------------------------------------- one map


def test_one_map_beside_and_over_its_photograph(images, noise, tmp_path):
    heatmap = noise[0].double().sum(0).numpy()
    figure = plot_map(images[0], noise[0].sum(0), tmp_path / "map.png", title="made_up · cat 92 %")
    photograph, alone, over, _ = figure.axes
    assert "made_up · cat 92 %" in words(figure)
    assert photograph.images[0].get_array().shape == (20, 30, 3)
    scaled = np.clip(heatmap / np.percentile(np.abs(heatmap), 99.5), -1, 1)
    for panel in (alone.images[0], over.images[1]):
        np.testing.assert_allclose(panel.get_array(), scaled, rtol=1e-5)
        assert (panel.norm.vmin, panel.norm.vmax) == (-1, 1)
    assert over.images[1].cmap(0.5)[3] == 0  # nothing hides the photograph where the map is zero
    assert over.images[0].get_array().ndim == 2  # and that is grey
    assert (tmp_path / "map.png").stat().st_size > 0


def test_one_map_of_odd_kinds(images):
    assert "all zero" in words(plot_map(images[0], torch.zeros(20, 30)))
    assert "contains NaN" in words(plot_map(images[0], torch.full((20, 30), float("nan"))))
    assert len(plot_map(torch.randn(3, 40), torch.randn(40)).axes) == 3  # a strip has nothing to lie over
    with pytest.raises(InputError, match="Crop it"):
        plot_map(images[0], torch.randn(30, 30))
    with pytest.raises(InputError, match="heatmap"):
        plot_map(images[0], torch.zeros(0))
    with pytest.raises(InputError, match="heatmap"):
        plot_map(images[0], np.zeros((20, 30)))
