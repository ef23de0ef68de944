"""All methods in one figure: a panel per metric, curves where there are curves, dots with intervals elsewhere."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from attrbox.errors import OptionError, shown
from attrbox.metrics.scores import Score
from attrbox.visualization.plots import save_figure

_TYPE, _SMALL = 9, 7.5
_GREY = "#777777"
# Beyond ten methods the colours repeat, with another line.
_LINES = ("-", "--", ":")
_PANEL = (3.9, 3.0)


def plot_scores(
    scores: Mapping[str, Mapping[str, Score]],
    controls: Sequence[str] = (),
    path: str | Path | None = None,
    *,
    columns: int = 2,
    dpi: float = 130,
) -> Figure:
    """Draw every metric of an evaluation.

    Curves are means over the samples, bands their 95 % bootstrap intervals; dots are means with the same. Controls are
    grey.

    Args:
        scores: method -> metric -> score.
        controls: which of the methods are controls.
        path: where to save the figure; the suffix (.png, .pdf, .svg, ...) says how.
        columns: panels side by side.
        dpi: dots per inch.

    Returns:
        The figure; pyplot does not know it, so nothing need be closed.

    Raises:
        OptionError: columns or dpi is not a positive number.
        FileError: the file cannot be written.
    """
    if not isinstance(columns, int) or columns < 1 or not 0 < dpi < float("inf"):
        raise OptionError(f"Expected columns >= 1 and a positive dpi, got {shown(columns)} and {dpi!r}.")
    metrics = {metric: {label: row[metric] for label, row in scores.items()} for metric in next(iter(scores.values()))}
    columns = min(columns, len(metrics))
    rows = -(-len(metrics) // columns)
    style = styles(tuple(scores), controls)
    legend = any(score.curves is not None for row in scores.values() for score in row.values())
    foot = 0.2 * -(-len(scores) // (2 * columns)) + 0.1 if legend else 0
    heights = max(_PANEL[1], 0.24 * len(scores) + 0.8)
    figure = Figure((_PANEL[0] * columns, heights * rows + foot), dpi=dpi, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False)
    for panel in panels.flat[len(metrics) :]:
        panel.set_visible(False)
    for panel, (metric, by_method) in zip(panels.flat, metrics.items(), strict=False):
        first = next(iter(by_method.values()))
        panel.set_title(f"{metric} ({first.better} is better)", size=_TYPE)
        panel.tick_params(labelsize=_SMALL)
        panel.spines[["top", "right"]].set_visible(False)
        if first.curves is None:
            _draw_dots(panel, by_method, style)
        else:
            _draw_curves(panel, by_method, style)
    if legend:
        lines = [matplotlib.lines.Line2D([], [], label=label, **look) for label, look in style.items()]
        figure.legend(
            handles=lines,
            loc="outside lower center",
            ncols=2 * columns,
            fontsize=_SMALL,
            frameon=False,
            handlelength=2.4,
        )
    if path is not None:
        save_figure(figure, path)
    return figure


def styles(labels: Sequence[str], controls: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour and line of each method; grey for the controls."""
    colours = matplotlib.color_sequences["tab10"]
    colours = [colour for index, colour in enumerate(colours) if index != 7]  # grey is for the controls
    looks: dict[str, dict[str, Any]] = {}
    methods = [label for label in labels if label not in controls]
    for index, label in enumerate(methods):
        line = _LINES[index // len(colours) % len(_LINES)]
        looks[label] = {"color": colours[index % len(colours)], "linestyle": line, "linewidth": 1.4}
    for index, label in enumerate(controls):
        looks[label] = {"color": _GREY, "linestyle": _LINES[index % len(_LINES)], "linewidth": 1.4}
    return {label: looks[label] for label in labels}


def _draw_curves(panel: Axes, scores: dict[str, Score], styles: dict[str, dict[str, Any]]) -> None:
    for label, score in scores.items():
        curve, band = score.mean_curve, score.curve_interval()
        if curve is None or score.fractions is None or band is None or len(score) == int(score.left_out.sum()):
            continue
        places = score.fractions.cpu().numpy()
        panel.plot(places, curve.cpu().numpy(), **styles[label])
        panel.fill_between(places, band[:, 0], band[:, 1], color=styles[label]["color"], alpha=0.12, linewidth=0)
    first = next(iter(scores.values()))
    panel.set_xlabel(first.axis, size=_SMALL)
    panel.set_ylabel("mean over samples", size=_SMALL)
    panel.margins(x=0.01)


def _draw_dots(panel: Axes, scores: dict[str, Score], styles: dict[str, dict[str, Any]]) -> None:
    places = np.arange(len(scores))[::-1]  # the first method on top
    for place, (label, score) in zip(places, scores.items(), strict=True):
        low, high = score.interval
        colour = styles[label]["color"]
        panel.plot([low, high], [place, place], color=colour, linewidth=2, solid_capstyle="round")
        panel.plot([score.mean], [place], "o", color=colour, markersize=5)
    panel.set_yticks(places, list(scores), size=_SMALL)
    panel.set_ylim(-0.7, len(scores) - 0.3)
    panel.grid(axis="x", color="#e5e5e5", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.set_xlabel("mean and 95 % interval", size=_SMALL)
