"""RISE: the mean of random masks, weighted by the score of what they show (Petsiuk, Das and Saenko, BMVC 2018).

    S = 1 / (N p) sum_k f(M_k X) M_k

Each mask is a grid of zeros and ones (one with probability p), drawn anew, stretched by linear interpolation and
shifted by a random part of a cell. On a linear model with contributions c_i and bias b, and masks whose
pixels are independent,

    E S_i = b + c_i + p sum of the other c_j

so the pixels are ranked by their contributions. A grid as fine as the image gives such masks. The constant part hides
the sign of a contribution and brings most of the noise; with `center`, the mean of the scores is subtracted from each,

    S = 1 / (N p) sum_k (f(M_k X) - mean f) M_k,     E S_i = (1 - p) c_i
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attrbox.core.options import option
from attrbox.core.validation import check_count, check_flag, check_number
from attrbox.errors import InputError
from attrbox.methods.base import register_method
from attrbox.methods.context.run import Run
from attrbox.methods.masking.generators import stretched, upsampling
from attrbox.methods.perturbation.perturbing import Perturbing, spatial

_GRIDS, _SHIFTS = 0, 1  # draws of a sample's stream of random numbers


@register_method(
    "rise",
    summary="Mean of random masks, weighted by the score of what they show",
    reference="Petsiuk et al., BMVC 2018",
    units="score",
)
@dataclass(frozen=True, kw_only=True)
class Rise(Perturbing):
    """Works on any callable; see the module. The map has one channel; a class scores its probability, as published."""

    published_unit: ClassVar[str] = "prob"

    n_samples: int = option(4000, "random masks for each image", formerly="masks")
    grid: int = option(7, "cells of a mask along each axis")
    p: float = option(0.5, "probability of a cell to be shown")
    center: bool = option(False, "subtract the mean of the scores: a signed map with less noise; not as published")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("n_samples", self.n_samples)
        check_count("grid", self.grid)
        check_number("p", self.p, above=0, most=1)
        check_flag("center", self.center)

    @property
    def passes(self) -> int:
        return self.n_samples

    def attribute(self, run: Run) -> Tensor:
        sides = spatial(run.images)
        if self.grid > min(sides):
            raise InputError(
                f"A mask of {self.grid} cells along each axis is larger than the images, "
                f"{' x '.join(map(str, sides))} pixels. Use a smaller grid."
            )
        axes = len(sides)
        # All of a sample's numbers at once, so that they do not depend on how the masks are grouped.
        grids = run.samples.numbers(_GRIDS, (self.n_samples, *(self.grid,) * axes), uniform=True) < self.p
        shifts = run.samples.numbers(_SHIFTS, (self.n_samples, axes), uniform=True)
        stretch = [_windows(self.grid, side, run.images) for side in sides]
        channels = (1,) * (run.images.dim() - 1 - axes)

        def masks(part: slice) -> Tensor:
            cells = grids[:, part].transpose(0, 1).to(run.images.dtype)  # [draws, 1 or n, grid, ...]
            moved = shifts[:, part].transpose(0, 1)
            matrices = [windows[(moved[..., axis] * len(windows)).long()] for axis, windows in enumerate(stretch)]
            shown = stretched(cells, matrices)
            return shown.view(*shown.shape[:2], *channels, *sides)

        total = run.images.new_zeros(*run.scores.shape, *channels, *sides)
        coverage, score = torch.zeros_like(total[:, 0]), torch.zeros_like(run.scores)
        fill = run.samples.fill(self.fill, self.blur)
        for _, shown, scores in run.versions.masked(self.n_samples, masks, fill, self.unit(run)):
            shown = shown.expand(-1, len(run.images), *shown.shape[2:])
            total += torch.einsum("dnk,dn...->nk...", scores, shown)
            coverage += shown.sum(0)
            score += scores.sum(0)
        if self.center:
            total -= torch.einsum("nk,n...->nk...", score / self.n_samples, coverage)
        return total / (self.n_samples * self.p)


def _windows(grid: int, side: int, like: Tensor) -> Tensor:
    """The matrices that stretch `grid` cells over `side` pixels, one for each shift in pixels, [cell, side, grid]."""
    cell = -(-side // grid)
    if cell == 1:  # nothing to stretch
        return torch.eye(side, grid, device=like.device, dtype=like.dtype)[None]
    whole = upsampling(grid, (grid + 1) * cell, "linear", like)
    return torch.stack([whole[shift : shift + side] for shift in range(cell)])
