"""What the quality benchmarks share: the methods in their tables, maps that are kept, removal curves.

Maps and scores are kept in the output folder, and what is there is not computed again: an interrupted run goes on where
it stopped. Delete a file, or the folder, to measure anew.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import attrbox
from attrbox.core.atomic_files import whole_file
from attrbox.core.fills import gaussian_blur
from attrbox.metrics.statistics import bootstrap_interval

MethodOptions = tuple[str, dict[str, Any]]
CONTROLS: dict[str, MethodOptions] = {"random": ("random", {})}
HAND_CRAFTED: dict[str, MethodOptions] = {
    "saliency": ("saliency", {}),
    "gradient_x_input": ("gradient_x_input", {}),
    "guided_backprop x input": ("guided_backprop", {"times_input": True}),
    "integrated_gradients": ("integrated_gradients", {}),
    "smoothgrad x input": ("smoothgrad", {"times_input": True}),
    "lrp_epsilon": ("lrp_epsilon", {}),
    "deeplift": ("deeplift", {}),
    "grad_cam": ("grad_cam", {}),
}
SMOOTHED = "deeplift, smoothed"  # what learned_clean takes its region from
LEARNED: dict[str, MethodOptions] = {
    name: (name, {"keep_rules": False}) for name in ("learned", "learned_rank", "learned_clean")
}
FAST: dict[str, MethodOptions] = {
    f"{name}, fast": (name, {"keep_rules": False, "fast": True}) for name in ("learned_rank", "learned_clean")
}
METHODS = {**CONTROLS, **HAND_CRAFTED, SMOOTHED: ("deeplift", {}), **LEARNED, **FAST}

CURVES: dict[str, tuple[str, dict[str, Any]]] = {
    f"{title} {fill}": (metric, {"fill": fill, "steps": 5})
    for fill in ("zero", "blur", "noise")
    for title, metric in (("MoRF", "morf"), ("LeRF", "lerf"))
}
ELSEWHERE = "MoRF zero, other model"


@dataclass(frozen=True, eq=False)
class Subject:
    """A model with the images that its maps are measured on.

    Attributes:
        model: what is explained.
        other: another model, from whose images the same pixels are taken.
        images, targets: [N, C, H, W], [N].
        out: the folder of maps and scores.
        kind: how their files begin.
    """

    model: nn.Module
    other: nn.Module
    images: Tensor
    targets: Tensor
    out: Path
    kind: str

    def maps(self, label: str, method: MethodOptions | None = None) -> Tensor:
        """Heatmaps of one method, [N, H, W]."""
        name, options = method or METHODS[label]
        if label == SMOOTHED:
            sigma = attrbox.method_registry["learned_clean"].create({}).region_fraction * max(self.images.shape[-2:])
            return gaussian_blur(self.maps("deeplift"), sigma)

        def computed() -> Tensor:
            start = time.perf_counter()
            maps = attrbox.explain(self.model, self.images, name, target=self.targets, **options).heatmap()
            tqdm.write(f"{self.kind}, {label}: {(time.perf_counter() - start) / len(maps):.1f} s per image")
            return maps

        return kept(self.out / f"{self.kind}-{label}.pt", computed)

    def curves(self, label: str, method: MethodOptions | None = None) -> dict[str, Tensor]:
        """Area under each image's removal curves, column -> [N]."""

        def computed() -> dict[str, Tensor]:
            maps = {label: self.maps(label, method)}
            common = {"target": self.targets, "controls": False, "progress": False}
            own = attrbox.evaluate(self.model, self.images, maps, list(CURVES.values()), **common)[label]
            found = {name: score.auc for name, score in zip(CURVES, own.values(), strict=True)}
            there = attrbox.evaluate(self.other, self.images, maps, [CURVES["MoRF zero"]], **common)[label]
            return found | {ELSEWHERE: next(iter(there.values())).auc}

        return kept(self.out / f"{self.kind}-curves-{label}.pt", computed)

    def table(self, labels: Sequence[str], extra: Mapping[str, MethodOptions] | None = None) -> str:
        """The removal curves of several methods, as a Markdown table; `extra` are rows beyond METHODS."""
        methods = {label: METHODS[label] for label in labels} | dict(extra or {})
        rows = []
        for label, method in tqdm(methods.items(), desc=f"{self.kind}: curves"):
            found = self.curves(label, method)
            rows.append([label, *(mean(found[name]) for name in (*CURVES, ELSEWHERE))])
        return table(["method", *CURVES, ELSEWHERE], rows)


def kept(path: Path, computed: Callable[[], Any]) -> Any:
    """What a file holds; computed and written if there is none."""
    if not path.exists():
        found = computed()
        with whole_file(path) as temporary:
            torch.save(found, temporary)
    return torch.load(path, weights_only=True)


def mean(values: Tensor, digits: int = 2) -> str:
    """Mean and half the width of its 95 % bootstrap interval over the samples."""
    low, high = bootstrap_interval(values.double().numpy())
    return f"{values.nanmean().item():.{digits}f} ± {(high - low) / 2:.{digits}f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


@torch.no_grad()
def scores(model: nn.Module, images: Tensor, size: int = 16) -> Tensor:
    """Logits in batches."""
    return torch.cat([model(part.contiguous(memory_format=torch.channels_last)) for part in images.split(size)])
