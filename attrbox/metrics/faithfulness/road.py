"""ROAD: removal curves whose missing pixels are imputed, so that the shape of what is missing tells the model less.

Every missing pixel is the weighted mean of its eight neighbours, 1/6 for those that share an edge and 1/12 for those at
a corner, known or missing alike; weights are renormalised at the border. That is one sparse linear system for each
image (symmetric and positive definite, once each row is multiplied by the sum of its weights), plus a little noise.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.linalg import splu
from torch import Tensor

from attrbox.core.options import option
from attrbox.core.validation import check
from attrbox.errors import InputError
from attrbox.metrics.base import register_metric
from attrbox.metrics.context import Study
from attrbox.metrics.faithfulness.curves import RankCurve
from attrbox.metrics.records import Scoring

# (row, column) of half of the neighbours; the other half is opposite, and the weights are symmetric.
_NEIGHBOURS = {(0, 1): 1 / 6, (1, 0): 1 / 6, (1, 1): 1 / 12, (1, -1): 1 / 12}
# The draw of a sample's random numbers that is the noise, the same at each point of the curve.
_NOISE = 2**41


def impute(image: Tensor, missing: Tensor) -> Tensor:
    """The image [C, H, W] with its missing pixels, [H, W], imputed; the system is solved in double precision.

    Raises:
        InputError: all pixels are missing, or the image is none.
    """
    if image.dim() != 3 or missing.shape != image.shape[1:]:
        raise InputError(f"Expected an image [C, H, W], missing pixels [H, W], got {image.shape} and {missing.shape}.")
    unknown = missing.cpu().numpy().astype(bool)
    count = int(unknown.sum())
    if count == 0:
        return image.clone()
    if count == unknown.size:
        raise InputError("Expected some pixels to be left, got an image with none, from which nothing can be imputed.")
    known = image.detach().cpu().double().numpy()
    matrix, right = _system(known, unknown)
    # A natural order would fill in; minimum degree on the symmetric pattern keeps the factors sparse.
    solver = splu(matrix, permc_spec="MMD_AT_PLUS_A", options={"SymmetricMode": True})
    filled = known.copy()
    filled[:, unknown] = solver.solve(right).T
    return torch.from_numpy(filled).to(image)


def _system(known: NDArray[Any], unknown: NDArray[Any]) -> tuple[Any, NDArray[Any]]:
    """Matrix and right-hand sides [unknowns, C] of

    (sum of weights) x_i - sum over missing j of w_ij x_j = sum over known j of w_ij x_j
    """
    height, width = unknown.shape
    count = int(unknown.sum())
    number = np.full(unknown.shape, -1)
    number[unknown] = np.arange(count)
    diagonal = np.zeros(count)
    right = np.zeros((count, len(known)))
    rows, columns, weights = [], [], []
    for (down, across), weight in _NEIGHBOURS.items():
        left = max(0, -across)
        here = (slice(0, height - down), slice(left, width - max(0, across)))
        there = (slice(down, height), slice(left + across, width - max(0, across) + across))
        for this, other in ((here, there), (there, here)):
            mine, theirs = number[this], number[other]
            wanted = mine >= 0
            np.add.at(diagonal, mine[wanted], weight)
            both, border = wanted & (theirs >= 0), wanted & (theirs < 0)
            rows.append(mine[both])
            columns.append(theirs[both])
            weights.append(np.full(int(both.sum()), -weight))
            np.add.at(right, mine[border], weight * known[(slice(None), *other)][:, border].T)
    rows.append(np.arange(count))
    columns.append(np.arange(count))
    weights.append(diagonal)
    entries = (np.concatenate(weights), (np.concatenate(rows), np.concatenate(columns)))
    return sparse.csc_matrix(entries, shape=(count, count)), right


@register_metric(
    "road",
    summary="Accuracy as the largest values are removed and imputed by a noisy linear model",
    reference="Rong et al. 2022",
    better="lower",
)
@dataclass(frozen=True, kw_only=True)
class Road(RankCurve):
    """The curve is that of each image: 1 as long as the target is the model's first choice."""

    fractions: tuple[float, ...] = option((0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9), "shares of the pixels removed")
    imputes = True

    noise: float = option(0.01, "standard deviation of the noise on imputed pixels")
    score: Scoring = option("accuracy", "logit, prob, log_prob or accuracy")
    relative: bool = option(False, "divide by the score of the image itself")

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "fractions", tuple(self.fractions))
        rising = all(a < b for a, b in zip((0.0, *self.fractions), (*self.fractions, 1.0), strict=True))
        check(bool(self.fractions) and rising, "fractions", "rising numbers between 0 and 1", self.fractions)
        check(0 <= self.noise < float("inf"), "noise", "a number >= 0", self.noise)

    def axis_fractions(self) -> list[float]:
        return [0.0, *self.fractions]

    def filling(self, study: Study) -> Tensor:
        if study.images.dim() != 4:
            raise InputError(f"road imputes images [N, C, H, W], got {list(study.images.shape)}.")
        return study.images[:1]  # every image is imputed on its own; nothing is filled in

    def removed(self, study: Study, images: Tensor, taken: Tensor, fill: Tensor, rows: Tensor) -> Tensor:
        pairs = zip(images.cpu(), taken.cpu(), strict=True)  # where the systems are solved: two transfers, not one each
        imputed = torch.stack([impute(image, missing[0]) for image, missing in pairs]).to(images)
        if self.noise:
            noise = study.once(("noise of road",), lambda: study.samples.numbers(_NOISE, images.shape[1:]))
            imputed = imputed + self.noise * noise[rows] * taken
        return imputed


@register_metric(
    "road_lerf",
    summary="Accuracy as the smallest values are removed and imputed by a noisy linear model",
    reference="Rong et al. 2022",
)
@dataclass(frozen=True, kw_only=True)
class RoadLeRF(Road):
    """The same, least relevant first."""

    largest_first = False
