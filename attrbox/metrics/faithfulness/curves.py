"""Removal and insertion curves: how the score falls, or rises, as pixels go or come in the order of a map.

    y_k = f(image without the first k pixels) / f(image)
    area = integral of y over the share of pixels removed, divided by the range

MoRF removes the pixels with the largest values first, LeRF those with the smallest (Samek et al. 2016): maps are signed
here, and positive supports the target. A good map has a low MoRF and a high LeRF area. One sort serves both orders: one
is the reverse of the other, ties included, which are broken by the image's seed. An image whose own score is not
positive has no ratio and is left out.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attrbox.core.fills import FILLS
from attrbox.core.options import option
from attrbox.core.validation import check, check_choice, check_count, check_flag
from attrbox.errors import OptionError
from attrbox.metrics.base import Measurement, Metric, register_metric
from attrbox.metrics.context import Study
from attrbox.metrics.records import SCORINGS, Scoring, Views


@dataclass(frozen=True, kw_only=True)
class RankCurve(Metric):
    """The score as pixels change in the order of a map; subclasses say which share of them, and how.

    Attributes:
        largest_first: the order: from the largest value down, or from the smallest up.
        inserting: whether pixels come back into the fill, instead of giving way to it.
        imputes: whether `removed` does something else than to fill in.
    """

    score: Scoring = option("logit", "logit, prob, log_prob or accuracy")
    relative: bool = option(True, "divide by the score of the image itself")
    region: int = option(1, "rank and remove squares of so many pixels a side, by their sums; 1 ranks pixels")

    needs = frozenset({"model"})
    axis = "share of pixels removed"
    largest_first: ClassVar[bool] = True
    inserting: ClassVar[bool] = False
    imputes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_choice("score", self.score, SCORINGS)
        check_flag("relative", self.relative)
        check_count("region", self.region)
        if self.relative and self.score == "log_prob":
            raise OptionError("A logarithm of a probability has no ratio. Set relative=False with score='log_prob'.")

    @abstractmethod
    def axis_fractions(self) -> list[float]:
        """The fractions of pixels at which the curve is measured, from 0 up."""

    @abstractmethod
    def filling(self, study: Study) -> Tensor:
        """What removed pixels show, [1 or n, C, H, W]."""

    def removed(self, study: Study, images: Tensor, taken: Tensor, fill: Tensor, rows: Tensor) -> Tensor:
        """Images [m, C, H, W] without the pixels that are `taken` [m, 1, H, W]; `rows` are theirs in the study."""
        del study, rows
        return torch.where(taken, fill, images)

    def counts(self, cells: int) -> list[int]:
        """The same as numbers of cells, each once: small images have fewer than `axis_fractions`.

        Raises:
            OptionError: the range is less than one cell.
        """
        counts = sorted({round(share * cells) for share in self.axis_fractions()})
        if counts[-1] == 0:
            raise OptionError(
                f"A share of {self.axis_fractions()[-1]:g} is less than one of {cells} pixels or regions. Raise it."
            )
        return counts

    def _shown(self, cells: int) -> list[int]:
        """The numbers that need the model: neither twice the same, nor what leaves the image as it is."""
        same = cells if self.inserting else 0
        return [count for count in self.counts(cells) if count != same]

    def views(self, study: Study) -> Sequence[Views]:
        counts, cells = self._shown(study.cells(self.region)), study.cells(self.region)
        first, last = study.order(self.region, counts[-1])
        order = first if self.largest_first else last
        labels, n, _ = order.shape
        fill = self.filling(study)
        points, device = len(counts), order.device
        # View v is point v % points of image v // points % n of method v // points // n.
        rows = torch.arange(n, device=device).repeat_interleave(points).repeat(labels)

        def chosen(part: slice) -> list[Tensor]:
            """The cells that change in each view."""
            return [
                order[v // points // n, v // points % n, : counts[v % points]] for v in range(part.start, part.stop)
            ]

        def make(part: slice) -> Tensor:
            row = rows[part]
            shown = fill if len(fill) == 1 else fill[row]
            taken = torch.zeros(len(row), cells, dtype=torch.bool, device=device)
            for mask, some in zip(taken, chosen(part), strict=True):
                mask[some] = True
            taken = study.spread(taken, self.region)
            if self.inserting:
                return torch.where(taken, study.images[row], shown)
            return self.removed(study, study.images[row], taken, shown, row)

        def make_in_place(part: slice) -> Tensor:
            """The same where single pixels give way to a fill: few of them are written, in the format of the batch."""
            row = rows[part]
            pictures = study.by_pixel[row]
            places = [v // points % n for v in range(part.start, part.stop)]  # known here: no look at the device
            for picture, place, some in zip(pictures, places, chosen(part), strict=True):
                picture[some] = flat[place][some] if len(flat) > 1 else flat[0][some]
            return pictures.view(len(row), *study.shape, -1).movedim(-1, 1)

        if self.region > 1 or self.inserting or self.imputes or study.images.dim() != 4:
            return (Views(rows, make, self.score),)
        flat = fill.expand(len(fill), *study.images.shape[1:]).flatten(2).transpose(1, 2)
        return (Views(rows, make_in_place, self.score),)

    def measure(self, study: Study, outputs: Sequence[Tensor]) -> Mapping[str, Measurement]:
        cells = study.cells(self.region)
        counts, shown = self.counts(cells), self._shown(cells)
        original = study.original(self.score)
        scores = outputs[0].view(len(study.maps), len(study), len(shown))
        columns = [
            original.expand(len(scores), -1) if count not in shown else scores[..., shown.index(count)]
            for count in counts
        ]
        curves = torch.stack(columns, -1)
        if self.relative:
            curves = curves / torch.where(original > 0, original, torch.nan)[:, None]
        fractions = torch.tensor(counts, dtype=curves.dtype, device=curves.device) / cells
        area = torch.trapezoid(curves, fractions, dim=-1) / (fractions[-1] - fractions[0])
        return {label: Measurement(area[index], curves[index], fractions) for index, label in enumerate(study.maps)}


@dataclass(frozen=True, kw_only=True)
class Curve(RankCurve):
    """A curve at evenly spaced shares, with a fill."""

    fraction: float = option(0.05, "the curve ends at this share of the pixels")
    steps: int = option(10, "points of the curve besides the first, evenly spaced")
    fill: float | str = option("zero", "what removed pixels show: zero, mean, blur, noise, or a number")
    sigma: float | None = option(None, "deviation of the blur in pixels; None is 5 % of the longer side")

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 < self.fraction <= 1, "fraction", "a number above 0 and at most 1", self.fraction)
        check_count("steps", self.steps)
        check_fill(self.fill)
        valid = self.sigma is None or 0 < self.sigma < float("inf")
        check(valid, "sigma", "a positive number of pixels, or None", self.sigma)

    def axis_fractions(self) -> list[float]:
        return [self.fraction * step / self.steps for step in range(self.steps + 1)]

    def filling(self, study: Study) -> Tensor:
        return study.fill(self.fill, self.sigma)


def check_fill(fill: object) -> None:
    """A fill's name, or a number."""
    number = isinstance(fill, int | float) and not isinstance(fill, bool) and abs(fill) < float("inf")
    check(number or fill in FILLS, "fill", f"a number or one of {', '.join(map(repr, FILLS))}", fill)


@register_metric(
    "morf",
    summary="Score as the largest values of the map are removed",
    reference="Samek et al. 2016; up to 5 %, as a ratio, Yang et al. 2020",
    better="lower",
)
@dataclass(frozen=True, kw_only=True)
class MoRF(Curve):
    """Most relevant first."""


@register_metric(
    "lerf",
    summary="Score as the smallest values of the map are removed",
    reference="Samek et al. 2016; up to 5 %, as a ratio, Yang et al. 2020",
)
@dataclass(frozen=True, kw_only=True)
class LeRF(Curve):
    """Least relevant first."""

    largest_first = False


@register_metric(
    "deletion",
    summary="Probability as all pixels go, the largest values first",
    reference="Petsiuk et al. 2018",
    better="lower",
)
@dataclass(frozen=True, kw_only=True)
class Deletion(Curve):
    """MoRF over the whole range, with the probability as it is; at 224 x 224 a row of pixels per step, as published."""

    fraction: float = option(1.0, "the curve ends at this share of the pixels")
    steps: int = option(224, "points of the curve besides the first, evenly spaced")
    score: Scoring = option("prob", "logit, prob, log_prob or accuracy")
    relative: bool = option(False, "divide by the score of the image itself")


@register_metric(
    "insertion",
    summary="Probability as pixels come into a blurred image, the largest values first",
    reference="Petsiuk et al. 2018",
)
@dataclass(frozen=True, kw_only=True)
class Insertion(Deletion):
    """The published blur is cut off at one standard deviation (11 pixels for 5); this one at four."""

    fill: float | str = option("blur", "what absent pixels show: zero, mean, blur, noise, or a number")
    sigma: float | None = option(5.0, "deviation of the blur in pixels; None is 5 % of the longer side")

    axis = "share of pixels inserted"
    inserting = True
