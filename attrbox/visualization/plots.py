"""Figures: maps of several methods side by side, and one map beside and over its photograph.

Every panel has the same colours: red supports the target, blue speaks against it, white is zero. A map is scaled by the
99.5th percentile of its own absolute values, so a panel depends on nothing but its map, and a few extreme pixels do not
wash out the rest; what lies beyond gets the last colour. Photographs stand beside the maps, not under them, where their
outlines would pass for attribution.
"""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor

from attrbox.core.atomic_files import as_path, whole_file
from attrbox.core.results import Attribution
from attrbox.core.validation import check_count
from attrbox.errors import FileError, InputError, OptionError, shown
from attrbox.visualization.colors import (
    FRAME,
    GREY,
    INK,
    OVERLAY,
    PERCENTILE,
    SIGNED,
    SMALL,
    TYPE,
    Array,
    draw_map,
    draw_photograph,
    finite_or_not,
    photograph_pixels,
    picture,
    plane,
)

# Sizes in inches, type in points.
_PANEL, _GAP, _MARGIN = 1.1, 0.05, 0.12
_STRIP = 0.3  # height of vectors and sequences, as a share of their width
_LINE, _LETTER = 0.135, 0.075
_FOOT = 0.56
_BAR_WIDTH, _BAR_HEIGHT = 2.0, 0.08
_LEAST_WIDTH = 3.2
_LARGEST = 2**16 - 1  # pixels in width or height that the renderer can do


def plot_comparison(
    images: Tensor,
    attributions: Mapping[str, Attribution],
    path: str | Path | None = None,
    *,
    titles: Sequence[str] | None = None,
    photographs: Tensor | Sequence[Any] | None = None,
    max_images: int = 16,
    dpi: float = 130,
) -> Figure:
    """Draw one row per image (and target) and one column per method, beginning with the photograph.

    Vectors and sequences are drawn as strips, volumes by their middle slice. A map that is zero, or not finite, leaves
    its panel blank, with a note.

    Args:
        images: what was explained, [N, C, H, W]; also [N, D], [N, C, L], [N, C, D, H, W].
        attributions: label -> maps of these images.
        path: where to save the figure; the suffix (.png, .pdf, .svg, ...) says how. Missing folders are made, and a
            file that is there is replaced.
        titles: of each image, or of each row if there are several targets, as in "tabby cat 92 %". Default: the class.
        photographs: the images for the eye, before normalisation: [N, C, H, W] in 0 .. 1 or 8 bits, or N arrays
            [H, W, 3] or PIL images. Default: the images, each stretched to its own range.
        max_images: rows at most; a note says how many there would be.
        dpi: dots per inch; lowered for figures too large to render.

    Returns:
        The figure; pyplot does not know it, so nothing need be closed.

    Raises:
        InputError: images, maps, titles and photographs do not fit each other.
        OptionError: max_images or dpi is not a positive number.
        FileError: the file cannot be written.
    """
    table = _table(images, attributions, titles, photographs, max_images)
    headers = ["", *(_wrapped(label.replace("_", " ").replace("(", " (", 1), 16, 4) for label in attributions)]
    across, down = _PANEL + _GAP, _PANEL * table.aspect + _GAP
    titles = [_wrapped(title, 15, 5) for title in table.titles]
    left = _MARGIN + _LETTER * max(len(line) for title in titles for line in f"{title}\n".split("\n"))
    top = _MARGIN + _LINE * max(header.count("\n") + 1 for header in headers)
    panels = len(headers) * across - _GAP
    foot = top + len(table.titles) * down
    height = foot + _FOOT + (_LINE if table.note else 0)
    sheet = _Sheet(max(left + panels + _MARGIN, _LEAST_WIDTH), height, dpi)
    for column, header in enumerate(headers):
        sheet.text(left + column * across + _PANEL / 2, top - 0.04, header, ha="center", va="bottom")
    for row, (photograph, title) in enumerate(zip(table.photographs, titles, strict=True)):
        y = top + row * down
        sheet.text(left - 0.08, y + (down - _GAP) / 2, title, ha="right", va="center")
        draw_photograph(sheet.axes(left, y, _PANEL, down - _GAP), photograph)
        for column, maps in enumerate(table.maps, 1):
            draw_map(sheet.axes(left + column * across, y, _PANEL, down - _GAP), maps[row])
    sheet.colour_bar(min(left + panels / 2, sheet.width - _LEAST_WIDTH / 2), foot)
    sheet.text(_MARGIN, sheet.height - 0.05, table.note, ha="left", va="bottom", color=GREY, size=SMALL)
    return sheet.saved(path)


def plot_map(
    image: Any,
    heatmap: Tensor,
    path: str | Path | None = None,
    *,
    title: str | None = None,
    dpi: float = 130,
) -> Figure:
    """Draw a photograph, one map of it, and the map over the photograph, in the colours of `plot_comparison`.

    Args:
        image: the photograph: a tensor [C, H, W] in 0 .. 1 or 8 bits, an array [H, W, 3] or a PIL image. Numbers beyond
            (a normalised image) are stretched to their range.
        heatmap: its map, [H, W], for instance a row of `Attribution.heatmap()`.
        path, dpi: as for `plot_comparison`.
        title: above the panels.

    Returns:
        The figure; pyplot does not know it, so nothing need be closed.

    Raises:
        InputError: the image or the map cannot be drawn.
        OptionError: dpi is not a positive number.
        FileError: the file cannot be written.
    """
    scores = plane(finite_or_not(heatmap, "a heatmap").numpy())
    if not scores.size:
        raise InputError(f"Expected a heatmap [H, W], got the shape {list(scores.shape)}.")
    photograph = photograph_pixels(image)
    strip = len(scores) == 1
    side = 2 * _PANEL
    height = side * (_STRIP if strip else _aspect(*scores.shape))
    if not strip:
        _check_crop(photograph, *scores.shape)
    top = _MARGIN + (2 * _LINE if title else 0)
    panels = 2 if strip else 3
    sheet = _Sheet(2 * _MARGIN + panels * (side + _GAP) - _GAP, top + height + _GAP + _FOOT, dpi)
    sheet.text(sheet.width / 2, top - 0.09, _wrapped(title or "", 90, 1), ha="center", va="bottom", size=TYPE + 1)
    axes = [sheet.axes(_MARGIN + column * (side + _GAP), top, side, height) for column in range(panels)]
    draw_photograph(axes[0], photograph)
    draw_map(axes[1], scores)
    if not strip:
        draw_photograph(axes[2], photograph if photograph.ndim == 2 else photograph.mean(2))
        draw_map(axes[2], scores, OVERLAY)
    sheet.colour_bar(sheet.width / 2, sheet.height - _FOOT)
    return sheet.saved(path)


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure to a file, whole or not at all; the suffix says how.

    Raises:
        FileError: the suffix is of no format, or the file cannot be written.
    """
    kinds = figure.canvas.get_supported_filetypes()
    kind = as_path(path, "the name of a figure").suffix.removeprefix(".").lower()
    if kind not in kinds:
        raise FileError(
            f"Expected the name of a figure to end in one of {', '.join(sorted(kinds))}, got {str(path)!r}."
        )
    with whole_file(path) as part:
        figure.savefig(part, format=kind, dpi=figure.dpi, facecolor="white")


# -------------------------------------------------------------------------------------------------------- what is drawn


@dataclass(frozen=True)
class _Table:
    """What `plot_comparison` draws: maps by method and row, photographs and titles by row, height over width."""

    maps: list[list[Array]]
    photographs: list[Array]
    titles: list[str]
    aspect: float
    note: str


def _table(
    images: Tensor,
    attributions: Mapping[str, Attribution],
    titles: Sequence[str] | None,
    photographs: Tensor | Sequence[Any] | None,
    max_images: int,
) -> _Table:
    _check(images, attributions, photographs, max_images)
    score = next(iter(attributions.values())).score
    targets = score.shape[1] if score.dim() == 2 else 1
    total = len(images) * targets
    rows = min(total, max_images)
    shown = range(-(-rows // targets))  # images, the last perhaps not with all its targets
    if photographs is None:
        seen = [picture(finite_or_not(images[index], "images"), stretch=True) for index in shown]
    else:
        seen = [photograph_pixels(photographs[index]) for index in shown]
    if images.dim() == 4:
        for photograph in seen:
            _check_crop(photograph, images.shape[-2], images.shape[-1])
    notes = [f"the first {rows} of {total} rows"] if total > rows else []
    notes += ["the middle slice of each volume"] if images.dim() > 4 else []
    return _Table(
        maps=[_heatmaps(label, attribution, len(shown))[:rows] for label, attribution in attributions.items()],
        photographs=[seen[row // targets] for row in range(rows)],
        titles=_titles(titles, attributions, len(images), targets)[:rows],
        aspect=_STRIP if images.dim() < 4 else _aspect(images.shape[-2], images.shape[-1]),
        note="; ".join(notes),
    )


def _check(
    images: object, attributions: Mapping[str, Attribution], photographs: Sequence[Any] | Tensor | None, max_images: int
) -> None:
    if not isinstance(images, Tensor) or images.dim() < 2 or images.numel() == 0:
        got = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise InputError(f"Expected images as a torch.Tensor [N, C, H, W], at least one, got {got}.")
    if not attributions:
        raise InputError("Expected the maps of at least one method, got none.")
    check_count("max_images", max_images)
    first = next(iter(attributions.values()))
    for label, maps in attributions.items():
        if len(maps) != len(images) or maps.score.shape != first.score.shape:
            raise InputError(
                f"Expected maps of the {len(images)} images, all for as many targets, but the scores of {label!r} have "
                f"the shape {list(maps.score.shape)}. Draw what belongs together."
            )
    if photographs is not None and len(photographs) != len(images):
        raise InputError(f"Expected one photograph for each of the {len(images)} images, got {len(photographs)}.")


def _check_crop(photograph: Array, height: int, width: int) -> None:
    """A photograph has the proportions of the map beside it."""
    got = photograph.shape[0] / photograph.shape[1]
    if not 0.97 < got * width / height < 1.03:
        raise InputError(
            f"Expected a photograph of what the model saw, {height} x {width} or in proportion, got "
            f"{photograph.shape[0]} x {photograph.shape[1]}. Crop it as the model's input was."
        )


def _aspect(height: int, width: int) -> float:
    """Height over width of a panel, within reason."""
    return min(max(height / width, 0.2), 4)


def _titles(
    titles: Sequence[str] | None, attributions: Mapping[str, Attribution], count: int, targets: int
) -> list[str]:
    """One per row."""
    if titles is not None and len(titles) not in (count, count * targets):
        raise InputError(
            f"Expected a title for each of the {count} images (or {count * targets} rows), got {len(titles)}."
        )
    if titles is not None and len(titles) == count * targets:
        return [str(title) for title in titles]
    given = [""] * count if titles is None else [f"{title}\n" for title in titles]
    classes = [maps.target.flatten().tolist() for maps in attributions.values() if maps.target is not None]
    if len(classes) == len(attributions) and all(classes[0] == other for other in classes):
        names = [f"class {index}" for index in classes[0]]
    else:  # functions as targets, or each method its own
        names = ["" if targets == 1 else f"target {row % targets}" for row in range(count * targets)]
    return [given[row // targets] + name for row, name in enumerate(names)]


def _heatmaps(label: str, attribution: Attribution, images: int) -> list[Array]:
    """The maps of the first images, for all their targets, [h, w] each."""
    values = finite_or_not(attribution.values[:images], f"the maps of {label!r}")
    heatmaps = replace(attribution, values=values).heatmap().flatten(0, attribution.score.dim() - 1)
    return [plane(heatmap.numpy()) for heatmap in heatmaps]


# ------------------------------------------------------------------------------------------------------ how it is drawn


def _wrapped(text: str, width: int, lines: int) -> str:
    """The text in lines of at most `width`, cut after so many, without what cannot be printed."""
    parts = [
        part
        for line in text.splitlines()
        for part in textwrap.wrap("".join(sign if sign.isprintable() else "?" for sign in line), width)
    ]
    if len(parts) > lines:
        parts = [*parts[: lines - 1], f"{parts[lines - 1][: width - 1].rstrip()}…"]
    return "\n".join(parts)


class _Sheet:
    """A figure measured in inches from its upper left corner."""

    def __init__(self, width: float, height: float, dpi: float) -> None:
        if not 0 < dpi < float("inf"):
            raise OptionError(f"Expected dpi to be a positive number, got {shown(dpi)}.")
        self.width, self.height = width, height
        dpi = min(dpi, _LARGEST / max(width, height))
        self.figure = Figure((width, height), dpi=dpi, facecolor="white")
        FigureCanvasAgg(self.figure)

    def axes(self, x: float, y: float, width: float, height: float) -> Axes:
        """Axes without ticks, in a thin frame."""
        place = (x / self.width, 1 - (y + height) / self.height, width / self.width, height / self.height)
        axes = self.figure.add_axes(place, facecolor="white", xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(color=FRAME, linewidth=0.5, visible=True)
        return axes

    def text(self, x: float, y: float, text: str, *, color: str = INK, size: float = TYPE, **align: Any) -> None:
        """A text, unless it is empty; dollar signs are dollar signs."""
        if text:
            place = (x / self.width, 1 - y / self.height)
            self.figure.text(*place, text, color=color, size=size, parse_math=False, usetex=False, **align)

    def colour_bar(self, centre: float, foot: float) -> None:
        """The one scale of all panels, below these."""
        top = foot + 0.1
        middle = top + _BAR_HEIGHT / 2
        axes = self.axes(centre - _BAR_WIDTH / 2, top, _BAR_WIDTH, _BAR_HEIGHT)
        mappable = ScalarMappable(Normalize(-1, 1), SIGNED)
        bar = self.figure.colorbar(mappable, cax=axes, orientation="horizontal", ticks=[-1, 0, 1])
        bar.outline.set(edgecolor=FRAME, linewidth=0.5)
        axes.tick_params(labelsize=SMALL, labelcolor=INK, color=GREY, length=2, width=0.5, pad=1.5)
        axes.set_xlabel(f"1 = {PERCENTILE}th percentile of |map|, in each panel", size=SMALL, color=GREY, labelpad=1)
        self.text(centre - _BAR_WIDTH / 2 - 0.08, middle, "against", ha="right", va="center", size=SMALL)
        self.text(centre + _BAR_WIDTH / 2 + 0.08, middle, "supports", ha="left", va="center", size=SMALL)

    def saved(self, path: str | Path | None) -> Figure:
        """The figure, after it was written to `path`, if there is one."""
        if path is not None:
            save_figure(self.figure, path)
        return self.figure
