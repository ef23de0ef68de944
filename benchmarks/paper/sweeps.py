"""Table 2, the sensitivity to the settings, and Figure 9, the ablations, on the CIFAR-10 network."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from attrbox.metrics.results import Evaluation
from attrbox.visualization.plots import save_figure
from paper.cases import cifar
from paper.curves import maps_of, scores_of
from paper.methods import Chosen
from paper.pages import figure, section, table

# Values and MoRF areas of the paper: VGG-16, ImageNet. The rows' names are restored, as our text of it lost them.
_ROWS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "s": ((1, 7.5, 14, 21, 27, 34, 40, 47, 53.5, 60), (0.40, 0.27, 0.16, 0.13, 0.14, 0.15, 0.17, 0.18, 0.20, 0.22)),
    "iterations": (
        (1, 8, 14, 21, 27, 34, 40, 47, 54, 60),
        (0.86, 0.29, 0.27, 0.27, 0.26, 0.24, 0.23, 0.23, 0.22, 0.23),
    ),
    "lambda": ((0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1), (0.23, *(0.22,) * 5, 0.21, 0.22, 0.21, 0.22)),
    "lr": (
        (0.01, 0.06, 0.12, 0.17, 0.23, 0.28, 0.34, 0.39, 0.45, 0.5),
        (0.40, 0.33, 0.29, 0.26, 0.25, 0.25, 0.21, 0.21, 0.20, 0.21),
    ),
    "c+": (
        (0.55, 0.59, 0.64, 0.68, 0.73, 0.77, 0.82, 0.86, 0.90, 0.95),
        (0.47, 0.37, 0.30, 0.26, 0.23, 0.21, 0.19, 0.18, 0.18, 0.21),
    ),
}
PAPER = {row: dict(zip(*both, strict=True)) for row, both in _ROWS.items()}

ABLATIONS: dict[str, dict[str, Any]] = {
    "as published": {},
    "reference off": {"reference": False},
    "sign-aware loss off": {"sign_aware": False},
    "shared per channel": {"plugin": "shared"},
    "standard convolution": {"plugin": "convolution"},
    "score log_prob": {"score": "log_prob"},
    "score prob": {"score": "prob"},
    "game preserve": {"game": "preserve"},
    "features before the non-linearity": {"feature": "input"},
    "start at ones": {"initial": "ones"},
}


def _settings(row: str, value: float) -> dict[str, Any]:
    """The options of one cell; c- = 1 - c+."""
    names = {"s": "sharpness", "iterations": "iterations", "lambda": "weight", "lr": "lr"}
    return {names[row]: value} if row in names else {"center_positive": value, "center_negative": round(1 - value, 4)}


def _measured(options: argparse.Namespace, settings: Mapping[str, dict[str, Any]]) -> Evaluation:
    """The curves of the learned rule with each of the settings."""
    case = cifar(options).some(slice(options.sweep_images))
    chosen: Chosen = {label: ("learned", {"keep_rules": False, **own}) for label, own in settings.items()}
    return scores_of(case, options.kept, maps_of(case, options.kept, chosen))


def _row(scores: Evaluation, label: str) -> dict[str, str]:
    """Mean and interval of both areas."""
    return {
        title: f"{score.mean:.3f} [{score.interval[0]:.2f}, {score.interval[1]:.2f}]"
        for title, score in (("MoRF", scores[label]["morf"]), ("LeRF", scores[label]["lerf"]))
    }


def table2(options: argparse.Namespace) -> str:
    settings = {f"{row}={value:g}": _settings(row, value) for row, values in PAPER.items() for value in values}
    scores = _measured(options, settings)
    rows = [
        {"setting": f"{row} = {value:g}", "MoRF, paper": f"{paper:.2f}", **_row(scores, f"{row}={value:g}")}
        for row, values in PAPER.items()
        for value, paper in values.items()
    ]
    text = table(rows, options.out / "table2.csv")
    figure(options.out / "table2.png", lambda path: _plot(scores, path))
    return section(f"Table 2: sensitivity, cifar_cnn, {options.sweep_images} images", f"{text}\n\n![](table2.png)\n")


def _plot(scores: Evaluation, path: Path) -> None:
    """A panel per row: this network beside the paper's."""
    drawn = Figure((11, 2.4), dpi=90, facecolor="white", layout="constrained")
    FigureCanvasAgg(drawn)
    panels = drawn.subplots(1, len(PAPER), sharey=True)
    for panel, (row, values) in zip(panels, PAPER.items(), strict=True):
        found = [scores[f"{row}={value:g}"]["morf"] for value in values]
        panel.plot(list(values), [score.mean for score in found], "o-", markersize=3, label="cifar_cnn")
        panel.fill_between(list(values), *zip(*(score.interval for score in found), strict=True), alpha=0.15)
        panel.plot(list(values), list(values.values()), "s--", markersize=3, color="#777777", label="paper, VGG-16")
        panel.set_title(row, size=9)
        panel.tick_params(labelsize=7)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("MoRF area (lower is better)", size=8)
    panels[0].legend(fontsize=7, frameon=False)
    save_figure(drawn, path)


def fig9(options: argparse.Namespace) -> str:
    scores = _measured(options, ABLATIONS)
    rows = [{"variant": label, **_row(scores, label)} for label in scores]
    text = table(rows, options.out / "fig9.csv")
    figure(options.out / "fig9.png", lambda path: scores.plot(path, dpi=90))
    return section(f"Figure 9: ablations, cifar_cnn, {options.sweep_images} images", f"{text}\n\n![](fig9.png)\n")
