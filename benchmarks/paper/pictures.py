"""Figures 6, 7 and 8: the gallery, misclassified photographs, composites of two."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from learned_quality import side_by_side
from torch import Tensor

from attrbox.core.results import Attribution, Coverage
from attrbox.data.models.loaded_model import LoadedModel
from attrbox.visualization.plots import plot_comparison
from paper.cases import Case, Photographs, photographs
from paper.curves import maps_of
from paper.methods import GRADIENTS, LEARNED, Chosen, masks
from paper.pages import figure, section, table

FEW: Chosen = {
    name: (LEARNED | GRADIENTS)[name]
    for name in ("learned_clean", "learned", "deeplift", "integrated_gradients", "grad_cam")
}


def fig6(options: argparse.Namespace) -> str:
    found = photographs(options)
    case = found.first(options.photographs_count)
    maps = maps_of(case, options.kept, LEARNED | GRADIENTS | masks(options))
    titles = [found.loaded.class_name(index) for index in case.targets.tolist()]
    _draw(options.out / "fig6.png", found.loaded, case, maps, case.targets, titles)
    return section("Figure 6: maps of the predicted class", "![](fig6.png)\n")


def fig7(options: argparse.Namespace) -> str:
    """Photographs that the network gets wrong: the maps of what it says and of what is right."""
    found = photographs(options)
    wrong = (_predictions(options, found) != found.labels).nonzero().flatten()[: options.misclassified]
    case = found.case(wrong)
    return section(
        "Figure 7: misclassified photographs",
        _two_targets(options, "fig7", found, case, torch.stack([case.targets, found.labels[wrong]], 1))
        + "\n\n*Above, the predicted class; below, the right one.*",
    )


def fig8(options: argparse.Namespace) -> str:
    """Two photographs in one: the maps of either's class, and how much of them lies on the right half."""
    found = photographs(options)
    right = (_predictions(options, found) == found.labels).nonzero().flatten()[: 2 * options.composites]
    composites = side_by_side(found.images[right])
    case = Case(f"{found.loaded.name} composites", found.loaded.model, composites)
    targets = found.labels[right].view(-1, 2)
    text = _two_targets(options, "fig8", found, case, targets)
    maps = _of_targets(options, case, targets)
    cells = torch.zeros(2, *composites.shape[2:])
    middle = composites.shape[3] // 2
    cells[0, :, :middle], cells[1, :, middle:] = 1, 1
    rows = []
    for label, values in maps.items():
        positive = values.clamp_min(0).view(len(composites), 2, *values.shape[1:])
        share = (positive * cells).sum((2, 3)) / positive.sum((2, 3)).clamp_min(1e-30)
        rows.append({"method": label, "share of the positive values on the right half": share.mean().item()})
    own = table(rows, options.out / "fig8.csv")
    return section(f"Figure 8: composites of two photographs, {len(composites)} of them", f"{text}\n\n{own}\n")


def _predictions(options: argparse.Namespace, found: Photographs) -> Tensor:
    """The classes of all photographs, [N]."""
    whole = found.case(slice(None))
    return options.kept(f"classes {whole.name}", (whole.model, whole.images), lambda: whole.targets)


def _of_targets(options: argparse.Namespace, case: Case, targets: Tensor) -> dict[str, Tensor]:
    """The maps of both targets of each image, [2 N, H, W]."""
    twice = Case(case.name, case.model, case.images.repeat_interleave(2, 0))
    return {
        label: twice.heatmaps(options.kept, label, method, settings, targets.flatten())
        for label, (method, settings) in FEW.items()
    }


def _two_targets(options: argparse.Namespace, name: str, found: Photographs, case: Case, targets: Tensor) -> str:
    maps = _of_targets(options, case, targets)
    twice = Case(case.name, case.model, case.images.repeat_interleave(2, 0))
    titles = [found.loaded.class_name(index) for index in targets.flatten().tolist()]
    _draw(options.out / f"{name}.png", found.loaded, twice, maps, targets.flatten(), titles)
    return f"![]({name}.png)"


def _draw(
    path: Path, loaded: LoadedModel, case: Case, maps: Mapping[str, Tensor], targets: Tensor, titles: Sequence[str]
) -> None:
    shown = {
        label: Attribution(label, values[:, None], targets, torch.zeros(len(values)), {}, Coverage())
        for label, values in maps.items()
    }
    pictures = loaded.photographs(case.images)
    dpi = 70 if len(shown) > len(FEW) else 100
    figure(
        path,
        lambda path: plot_comparison(case.images, shown, path, titles=titles, photographs=pictures, dpi=dpi),
    )
