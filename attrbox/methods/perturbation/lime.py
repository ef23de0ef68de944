"""LIME for images: a linear model of the score, fitted to images with superpixels hidden (Ribeiro et al., KDD 2016).

    min over b, b0 of  sum_z w(z) (f(X_z) - b0 - b z)^2 + ridge |b|^2,      w(z) = sqrt(exp(-d(z)^2 / width^2))

z says which superpixels are shown, each with probability 1/2, and d is its cosine distance from the whole image. A
pixel gets the coefficient b of its superpixel.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from attrbox.core.options import option
from attrbox.core.validation import check_count, check_number
from attrbox.methods.base import register_method
from attrbox.methods.context.run import Run
from attrbox.methods.perturbation.perturbing import Segmented, exact, least_squares


@register_method(
    "lime",
    summary="Linear model of the score, fitted to images with superpixels hidden",
    reference="Ribeiro et al., KDD 2016",
    units="score per superpixel",
)
@dataclass(frozen=True, kw_only=True)
class Lime(Segmented):
    """Works on any callable; see the module. Defaults are those of the authors' image explainer: a class scores its
    probability. The map has one channel.

    Details: `intercept` b0 and `fit` (R^2) of the linear model, [n, K]; `segments`.
    """

    published_unit: ClassVar[str] = "prob"

    n_samples: int = option(1000, "images with superpixels hidden; the first is the whole image", formerly="samples")
    width: float = option(0.25, "width of the kernel over the cosine distance")
    ridge: float = option(1.0, "weight of the penalty on the coefficients")
    fill: Any = option("segment", "what a hidden pixel shows: segment (its mean colour), blur, median, mean, a number")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("n_samples", self.n_samples)
        check_number("width", self.width, above=0)
        check_number("ridge", self.ridge, least=0)

    @property
    def passes(self) -> int:
        return self.n_samples

    def attribute(self, run: Run) -> Tensor:
        segments, counts = self.superpixels(run)
        shown = []
        for row, count in enumerate(counts):
            drawn = run.samples.numbers_of(row, 0, (self.n_samples, count)) < 0.5
            drawn[0] = True
            shown.append(drawn)
        scores, *shown = exact(self.played(run, shown, segments, counts), *shown)
        if scores.is_meta:
            return run.images.new_empty(*scores.shape[1:], *run.images[:, :1].shape[1:])
        fits = [self._fitted(z, scores[:, row]) for row, z in enumerate(shown)]
        run.tell(
            intercept=torch.stack([intercept for _, intercept, _ in fits]).to(run.images),
            fit=torch.stack([share for _, _, share in fits]).to(run.images),
        )
        return self.spread(run, [coefficients.T for coefficients, _, _ in fits], segments)

    def _fitted(self, shown: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Coefficients [superpixels, K], intercept [K] and R^2 [K] of one image's rows."""
        distance = 1 - (shown.sum(1) / shown.shape[1]).sqrt()
        weights = torch.exp(-0.5 * (distance / self.width) ** 2)
        share = (weights / weights.sum())[:, None]
        center, mean = (share * shown).sum(0), (share * scores).sum(0)
        coefficients = least_squares(shown - center, scores - mean, weights, self.ridge)
        left = (share * (scores - mean - (shown - center) @ coefficients) ** 2).sum(0)
        variance = (share * (scores - mean) ** 2).sum(0)
        explained = torch.where(variance > 0, 1 - left / variance, torch.ones_like(left))
        return coefficients, mean - center @ coefficients, explained
