"""Mask generators of the learned propagation rule: from a map to the pixels that are taken away.

A generator turns a map A, [n, ...pixels], into two masks of the same shape, with values in [0, 1]:

    M+    high on the pixels that support the class        M-    high on those that speak against it

Both are differentiable in A. Subclass `MaskGenerator` and register it to add another.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from attrbox.errors import InputError
from attrbox.perturbations import gaussian_blur
from attrbox.registry import Part, Registry


@dataclass(frozen=True, kw_only=True)
class MaskGenerator(ABC):
    """Makes both masks of a map.

    Attributes:
        sharpness: s, slope of the sigmoid.
        center_positive, center_negative: c+ and c-, where the masks are one half, on the scaled map (0.5 is zero).
        sigma: standard deviation of the Gaussian over the map, as a share of its longer side.
        fraction: largest share of the pixels that a mask takes away.
        temperature: width of the sigmoid round a rank threshold, in gaps between the values at half and twice the rank.

    Each generator reads what it needs. `sized`: whether the mean of the masks belongs to the loss, lest they grow.
    """

    sharpness: float = 10.0
    center_positive: float = 0.75
    center_negative: float = 0.25
    sigma: float = 0.0
    fraction: float = 0.05
    temperature: float = 0.3

    sized: ClassVar[bool] = True

    @abstractmethod
    def masks(self, map: Tensor, draw: Tensor) -> tuple[Tensor, Tensor]:
        """M+ and M- of the maps [n, ...]; `draw` [n] are numbers in [0, 1), drawn anew in each iteration."""

    def smoothed(self, map: Tensor) -> Tensor:
        """The map convolved with the Gaussian; itself if `sigma` is 0.

        Raises:
            InputError: the map has no height and width.
        """
        if self.sigma == 0:
            return map
        if map.dim() < 3:
            raise InputError(
                f"Smoothing a map (sigma > 0) needs images [N, C, H, W], got maps of shape {list(map.shape)}. "
                "Set sigma=0, or use another preset."
            )
        return gaussian_blur(map, self.sigma * max(map.shape[-2:]))


masks: Registry[Part[MaskGenerator]] = Registry("mask generator", "attrbox.masks")

M = TypeVar("M", bound=type[MaskGenerator])


def register_mask(name: str) -> Callable[[M], M]:
    """Class decorator: enter a `MaskGenerator` under the name that the option `mask` takes.

    Raises:
        DuplicateNameError: the name is taken.
    """

    def enter(cls: M) -> M:
        masks.add(Part(name, cls))
        return cls

    return enter


masks.adopt = lambda name, loaded: register_mask(name)(loaded)


def scaled(map: Tensor) -> Tensor:
    """a = 0.5 + A / (2 max|A|), per sample: zero stays at 0.5; 0.5 everywhere for a map of zeros."""
    largest = map.abs().flatten(1).amax(1).clamp_min(torch.finfo(map.dtype).tiny)
    return 0.5 + map / (2 * largest.view(-1, *(1,) * (map.dim() - 1)))


@register_mask("sigmoid")
@dataclass(frozen=True, kw_only=True)
class SigmoidMask(MaskGenerator):
    """M+ = sigmoid(s (a - c+)),  M- = sigmoid(s (c- - a))     (Yang et al. 2020, equations 4 and 5)."""

    def masks(self, map: Tensor, draw: Tensor) -> tuple[Tensor, Tensor]:
        del draw
        a = scaled(map)
        s = self.sharpness
        return torch.sigmoid(s * (a - self.center_positive)), torch.sigmoid(s * (self.center_negative - a))


@register_mask("gaussian")
@dataclass(frozen=True, kw_only=True)
class GaussianMask(SigmoidMask):
    """The sigmoid masks of the smoothed map g * A     (Yang et al. 2020, equation 6, before 4 and 5)."""

    sigma: float = 2 / 224


@register_mask("rank")
@dataclass(frozen=True, kw_only=True)
class RankMask(MaskGenerator):
    """The k largest and the k smallest pixels, k drawn from 1 to `fraction` of all. With A_(k) the k-th largest value,

        M+ = sigmoid((A - A_(k)) / w),     w = T (A_(k/2) - A_(2k)),     and M- the same of -A

    A_(k) and w carry no gradient. This trains the very curves that MoRF and LeRF measure, needs no centres, and no term
    for the size. The width w follows the map's own spacing round its threshold: learned maps have long tails, with
    which a width in units of their standard deviation would grow until the mask is no mask.
    """

    sized: ClassVar[bool] = False

    def masks(self, map: Tensor, draw: Tensor) -> tuple[Tensor, Tensor]:
        pixels = map[0].numel()
        most = max(1, round(self.fraction * pixels))
        rank = 1 + (draw * most).long().clamp_max(most - 1)[:, None]
        shape = (-1, *(1,) * (map.dim() - 1))

        def largest(map: Tensor) -> Tensor:
            top = map.detach().flatten(1).topk(min(2 * most, pixels), 1).values
            ranks = (rank, (rank // 2).clamp_min(1), (2 * rank).clamp_max(top.shape[1]))
            at, above, below = (top.gather(1, r - 1).view(shape) for r in ranks)
            width = self.temperature * (above - below)
            return torch.sigmoid((map - at) / width.clamp_min(torch.finfo(map.dtype).tiny))

        return largest(map), largest(-map)
