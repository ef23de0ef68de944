"""Mask: meaningful perturbations (Fong and Vedaldi, ICCV 2017).

The smallest smooth mask m, 1 where the image is shown and 0 where a fill Y is, that makes the score collapse:

    min_m  l1 sum(1 - m) + tv sum((dx m)^2 + (dy m)^2)^(beta/2) + f(m X + (1 - m) Y)          (delete, shown as 1 - m)
    min_m  l1 sum(m)     + tv sum((dx m)^2 + (dy m)^2)^(beta/2) - f(m X + (1 - m) Y)          (preserve, shown as m)

Both sums are over a coarse grid of parameters, which is upsampled and smoothed to the size of the image; f is the
softmax probability. Adam on the grid, clamped to [0, 1] after every step; the image moves by up to `jitter` pixels
under the mask from step to step.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attrbox.core.options import option
from attrbox.core.validation import check_choice, check_count, check_fill, check_flag, check_number
from attrbox.methods.base import register_method
from attrbox.methods.context.run import Run
from attrbox.methods.masking.generators import circles, smoothing, stretched, total_variation, upsampling
from attrbox.methods.masking.optimization import Optimised, Problem, everyone

RADII = range(0, 175, 5)  # pixels, of the discs that a mask may begin with
_JITTER, _START, _NOISE = 0, 1, 2  # draws of a sample's stream of random numbers

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "authors": {},  # the code that the authors published
    "port": {  # the PyTorch port that most comparisons quote: means for sums, so far weaker penalties
        "iterations": 500,
        "l1": 0.01,
        "tv": 0.2,
        "mean": True,
        "isotropic": False,
        "upsample": "corners",
        "smooth": 0.0,
        "fill": "median",
        "jitter": 0,
        "noise": 0.2,
        "initial": "ones",
    },
}


@register_method(
    "mask",
    summary="Smallest smooth mask that makes the score collapse (meaningful perturbation)",
    reference="Fong & Vedaldi, ICCV 2017",
    aliases=("meaningful_perturbation",),
    units="share of the pixel that is taken away (0 to 1)",
    presets=PRESETS,
)
@dataclass(frozen=True, kw_only=True)
class Mask(Optimised):
    """The mask of each image and target; see the module.

    Details: `loss` and `reward` (minus the score, for delete) [n, K, iterations], `iterations` and `failed` [n, K],
    `history` [n, K, S, h, w]: the parameters along the way, 1 where the image is shown.
    """

    preset: str = option("authors", "where the defaults come from: authors (their code) or port (its popular port)")
    iterations: int = option(300, "steps of Adam")
    game: str = option("delete", "delete (the smallest part without which the score collapses) or preserve")
    lr: float = option(0.1, "learning rate of Adam")
    l1: float = option(1e-4, "weight of the mask's size")
    tv: float = option(1e-2, "weight of its total variation")
    beta: float = option(3.0, "power of the total variation")
    mean: bool = option(False, "both penalties are means over the parameters, not sums")
    isotropic: bool = option(True, "total variation of the slope's length, not of dx and dy apart")
    upsample: str = option("nearest", "how parameters become pixels: nearest, linear or corners (linear, aligned)")
    smooth: float = option(5.0, "standard deviation of a Gaussian over the upsampled mask, in pixels")
    fill: Any = option(
        "blur", "what is shown where the mask is 0: blur, median, mean, zero, noise, a number or a tensor"
    )
    blur: float = option(10.0, "standard deviation of the blurred fill, in pixels")
    jitter: int = option(4, "the image moves under the mask by 0 to so many pixels less one, drawn in each step")
    noise: float = option(0.0, "standard deviation of noise on the masked image, drawn in each step")
    initial: str = option("circle", "start: circle (smallest blurred disc that removes 99 % of f), random or ones")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("game", self.game, ("delete", "preserve"))
        check_choice("upsample", self.upsample, ("nearest", "linear", "corners"))
        check_choice("initial", self.initial, ("circle", "random", "ones"))
        check_fill(self.fill)
        for name in ("lr", "beta", "blur"):
            check_number(name, getattr(self, name), above=0)
        for name in ("l1", "tv", "smooth", "noise"):
            check_number(name, getattr(self, name), least=0)
        for name in ("mean", "isotropic"):
            check_flag(name, getattr(self, name))
        check_count("jitter", self.jitter, least=0)

    @property
    def passes(self) -> int:
        return self.iterations + (len(RADII) if self.initial == "circle" else 0)

    def attribute(self, run: Run) -> Tensor:
        height, width = self.sides(run)
        problem = _Meaningful(self, run)
        optimum = self.optimise(run, problem)
        shape = (len(run.images), run.scores.shape[1])
        run.tell(**optimum.details(shape))
        masks = problem.masks(optimum.parameters)
        return (1 - masks if self.game == "delete" else masks).reshape(*shape, 1, height, width)


class _Meaningful(Problem):
    """The masks of all images and targets of a chunk."""

    def __init__(self, method: Mask, run: Run) -> None:
        images = run.images
        self.method, self.run = method, run
        self.rows, self.columns = everyone(len(images), run.scores.shape[1], 1, images)
        self.unit = run.settings.target.unit(method.score, "prob")
        sides = images.shape[-2:]
        self.grid = tuple(max(1, side // method.step) for side in sides)
        self.matrices = [
            smoothing(side, method.smooth, images) @ upsampling(cells, side, method.upsample, images)
            for cells, side in zip(self.grid, sides, strict=True)
        ]
        self.noisy = isinstance(method.fill, str) and method.fill == "noise"
        self.fill = run.samples.fill("mean" if self.noisy else method.fill, method.blur).expand(images.shape)
        self.deviation = images.std((2, 3), keepdim=True, unbiased=False)
        shifts = run.samples.numbers(_JITTER, (method.iterations, 2), uniform=True).expand(len(images), -1, -1)
        self.shifts = (shifts * max(1, method.jitter)).long()

    def start(self) -> Tensor:
        n, targets = self.run.scores.shape
        if self.method.initial == "ones":
            return self.fill.new_ones(len(self.rows), *self.grid)
        if self.method.initial == "random":
            return self.run.samples.numbers(_START, self.grid, uniform=True).expand(n, *self.grid)[self.rows]
        return self._circle().reshape(n * targets, *self.grid)

    def _circle(self) -> Tensor:
        """The smallest disc that takes 99 % of the way from the image's score to that of the largest, [n, K, h, w]."""
        run = self.run
        discs = 1 - circles(RADII, 10.0, run.images.shape[-2:], run.images)
        groups = run.versions.masked(len(RADII), lambda part: discs[part, None, None], self.fill, self.unit)
        scores = torch.cat([scores for _, _, scores in groups])  # [radii, n, K]; the radius 0 is one pixel
        gone = scores - scores[-1] < 0.01 * (scores[:1] - scores[-1])
        first = torch.where(gone.any(0), gone.long().argmax(0), len(RADII) - 1)
        rows, columns = (
            torch.arange(cells, device=discs.device) * side // cells
            for cells, side in zip(self.grid, discs.shape[1:], strict=True)
        )
        start = discs[first][..., rows[:, None], columns]
        return 1 - start if self.method.game == "preserve" else start

    def optimiser(self, leaf: Tensor) -> torch.optim.Optimizer:
        return torch.optim.Adam([leaf], self.method.lr)

    def masks(self, parameters: Tensor) -> Tensor:
        return stretched(parameters, self.matrices)

    def penalty(self, parameters: Tensor, masks: Tensor, step: int) -> Tensor:
        del masks, step
        method = self.method
        size = (1 - parameters if method.game == "delete" else parameters).flatten(1)
        size = size.mean(1) if method.mean else size.sum(1)
        return method.l1 * size + method.tv * total_variation(parameters, method.beta, method.isotropic, method.mean)

    def play(self, masks: Tensor, step: int) -> tuple[Tensor, Tensor]:
        images, fill = self._moved(step)
        change = (images - fill)[self.rows]
        versions = torch.addcmul(fill[self.rows], masks.unsqueeze(1), change)
        if self.method.noise:
            draws = self.run.samples.normal(_NOISE + 2 * step).expand(images.shape)
            versions = versions + self.method.noise * draws[self.rows]
        scores, slopes = self.run.versions.scored(versions, self.rows, self.columns, self.unit)
        assert slopes is not None
        sign = -1 if self.method.game == "delete" else 1
        return sign * scores, sign * (slopes * change).sum(1)

    def _moved(self, step: int) -> tuple[Tensor, Tensor]:
        """The images and their fill in this step, both [n, C, H, W]."""
        images, fill, jitter = self.run.images, self.fill, self.method.jitter
        if self.noisy:
            fill = fill + self.deviation * self.run.samples.normal(_NOISE + 2 * step + 1)
        if jitter < 2:
            return images, fill
        return tuple(_shifted(tensor, self.shifts[:, step], jitter) for tensor in (images, fill))  # type: ignore[return-value]


def _shifted(images: Tensor, shifts: Tensor, most: int) -> Tensor:
    """Each image cut at its own place, `shifts` [n, 2] from 0 to `most` - 1, out of a frame of repeated pixels."""
    before = most // 2
    framed = F.pad(images, (before, most - 1 - before) * 2, mode="replicate")
    y, x = (
        torch.arange(size, device=images.device) + shifts[:, axis, None] for axis, size in enumerate(images.shape[-2:])
    )
    rows = torch.arange(len(images), device=images.device)[:, None, None]
    return framed.permute(0, 2, 3, 1)[rows, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2)
