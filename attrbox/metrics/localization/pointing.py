"""Localisation: whether a map lies on the object that it explains.

Object masks come with the images (`evaluate(..., masks=...)`). A mask of another size than the map, such as that of the
photograph before it was resized, is left as it is, and the map is resized to it, as published evaluations do.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attrbox.core.fills import gaussian_blur
from attrbox.core.options import option
from attrbox.core.validation import check, check_flag
from attrbox.errors import InputError
from attrbox.metrics.base import Measurement, Metric, register_metric
from attrbox.metrics.context import Study

# The draw of a sample's random numbers that chooses between equal maxima.
_CHOICE = 2**41 + 1


@dataclass(frozen=True, kw_only=True)
class Localization(Metric):
    """One number from a map and a mask of the same size."""

    needs = frozenset({"masks"})

    @abstractmethod
    def score(self, heatmap: Tensor, mask: Tensor, number: float) -> float:
        """The score of one map, [h, w]; NaN where it is not defined.

        Args:
            heatmap: the map, on the CPU.
            mask: bool, true on the object.
            number: in [0, 1), from the sample's seed.
        """

    def measure(self, study: Study, outputs: Sequence[Tensor]) -> Mapping[str, Measurement]:
        if study.images.dim() != 4 or study.masks is None:
            raise InputError(f"Localisation needs images [N, C, H, W], got {list(study.images.shape)}.")
        # Scores look at single pixels again and again: one transfer of all maps, not a look at the device for each.
        heatmaps = torch.stack([maps.heatmap for maps in study.maps.values()]).cpu()
        masks = _on_the_host(study.masks)
        numbers = study.samples.numbers(_CHOICE, (1,), uniform=True)[:, 0].tolist()
        scores = [
            [
                self.score(resized(heatmap, mask), mask, number)
                for heatmap, mask, number in zip(one, masks, numbers, strict=True)
            ]
            for one in heatmaps
        ]
        groups = self.groups(study)
        return {
            label: Measurement(study.images.new_tensor(values), groups=groups)
            for label, values in zip(study.maps, scores, strict=True)
        }

    def groups(self, study: Study) -> Tensor | None:
        """What the mean is taken over first."""
        del study
        return None


def _on_the_host(masks: Sequence[Tensor]) -> list[Tensor]:
    """Masks of any sizes on the CPU, in one transfer."""
    sizes = [mask.numel() for mask in masks]
    parts: Sequence[Tensor] = torch.split(torch.cat([mask.flatten() for mask in masks]).cpu(), sizes)
    return [part.view(mask.shape) for part, mask in zip(parts, masks, strict=True)]


def resized(heatmap: Tensor, mask: Tensor) -> Tensor:
    """A map [H, W] in the size of the mask [h, w], bilinearly."""
    if heatmap.shape == mask.shape:
        return heatmap
    return F.interpolate(heatmap[None, None], mask.shape, mode="bilinear", align_corners=False)[0, 0]


@register_metric(
    "pointing_game",
    summary="Whether the largest value is on the object, or near; mean over classes of their means",
    reference="Zhang et al. 2016",
)
@dataclass(frozen=True, kw_only=True)
class PointingGame(Localization):
    """A hit, 1, if a pixel of the object is closer than the tolerance to the map's largest value; else 0.

    Without an object nothing is hit. Of several largest values one is chosen by the sample's seed.
    """

    tolerance: float = option(15.0, "distance in pixels of the mask that is just too far")
    sigma_fraction: float = option(
        0.0, "smooth maps by a Gaussian of this share of their longer side first", formerly="sigma"
    )
    per_class: bool = option(True, "mean over the classes of their means, instead of over samples")

    def __post_init__(self) -> None:
        check(0 < self.tolerance < float("inf"), "tolerance", "a positive number of pixels", self.tolerance)
        check(
            0 <= self.sigma_fraction < 1,
            "sigma_fraction",
            "a share of the longer side, from 0 to below 1",
            self.sigma_fraction,
        )
        check_flag("per_class", self.per_class)

    def score(self, heatmap: Tensor, mask: Tensor, number: float) -> float:
        heatmap = gaussian_blur(heatmap, self.sigma_fraction * max(heatmap.shape))
        places = (heatmap == heatmap.max()).nonzero()
        place = places[int(number * len(places))]
        distances = (mask.nonzero() - place).square().sum(1)
        return float((distances < self.tolerance**2).any())

    def groups(self, study: Study) -> Tensor | None:
        return study.classes if self.per_class else None


@register_metric(
    "relevance_mass",
    summary="Share of the positive values that lies on the object",
    reference="Arras et al. 2022",
)
@dataclass(frozen=True, kw_only=True)
class RelevanceMass(Localization):
    """sum of max(A, 0) on the object / sum of max(A, 0); 0 for a map without positive values."""

    def score(self, heatmap: Tensor, mask: Tensor, number: float) -> float:
        positive = heatmap.clamp_min(0)
        total = positive.sum()
        return float(positive[mask].sum() / total) if total > 0 else 0.0


@register_metric(
    "grid_pointing_game",
    summary="Share of the positive values in the target's cell of a mosaic; uniform maps get 1 / cells",
    reference="Böhle et al. 2021",
)
@dataclass(frozen=True, kw_only=True)
class GridPointingGame(RelevanceMass):
    """The masks are the cells; `attrbox.metrics.localization.mosaics.mosaics` builds both."""


@register_metric(
    "relevance_rank",
    summary="Share of the K largest values that lies on the object of K pixels",
    reference="Arras et al. 2022",
)
@dataclass(frozen=True, kw_only=True)
class RelevanceRank(Localization):
    """Not defined without an object. Of equal values at the K-th place, as many count as their share on the object."""

    def score(self, heatmap: Tensor, mask: Tensor, number: float) -> float:
        size = int(mask.sum())
        if size == 0:
            return float("nan")
        least = heatmap.flatten().topk(size).values[-1]
        above, equal = heatmap > least, heatmap == least
        room = size - int(above.sum())
        inside = mask[above].sum() + room * mask[equal].to(torch.float64).mean()
        return float(inside / size)
