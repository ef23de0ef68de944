"""Occlusion: hide one window of the image after the other (Zeiler and Fergus, ECCV 2014).

    A = f(X) - f(X with the window filled), laid over the window's pixels; where windows overlap, their mean (or sum)

Windows lie at 0, stride, 2 stride, ... along each axis, and one more at the end if they leave a rest.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attrbox.core.options import option
from attrbox.core.validation import check, check_choice
from attrbox.errors import InputError
from attrbox.methods.base import register_method
from attrbox.methods.context.run import Run
from attrbox.methods.perturbation.perturbing import Perturbing, spatial


@register_method(
    "occlusion",
    summary="Drop of the score when a window of the image is hidden",
    reference="Zeiler & Fergus, ECCV 2014; window and stride of Rao et al., CVPR 2022",
    units="score per window",
)
@dataclass(frozen=True, kw_only=True)
class Occlusion(Perturbing):
    """Works on any callable and on images with any number of axes; see the module. The map has one channel."""

    window: int | tuple[int, ...] = option(16, "side of the window in pixels, or one per axis (height, width)")
    stride: int | tuple[int, ...] = option(8, "pixels from window to window, or one per axis")
    overlap: str = option("mean", "a pixel in several windows gets their mean or their sum")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("window", "stride"):
            sizes = _several(getattr(self, name))
            whole = [isinstance(size, int) and not isinstance(size, bool) and size >= 1 for size in sizes]
            check(bool(whole) and all(whole), name, "a whole number >= 1, or one per axis", getattr(self, name))
        check_choice("overlap", self.overlap, ("mean", "sum"))

    def passes_on(self, images: Tensor) -> int:
        return len(self.windows(spatial(images)))

    def attribute(self, run: Run) -> Tensor:
        sides = spatial(run.images)
        windows = self.windows(sides)
        fill = run.samples.fill(self.fill, self.blur)
        channel = (1,) * (run.images.dim() - 1 - len(sides))

        def masks(part: slice) -> Tensor:
            shown = run.images.new_ones(len(windows[part]), 1, *channel, *sides)
            for mask, place in zip(shown, windows[part], strict=True):
                mask[place] = 0
            return shown

        unit = self.unit(run)
        groups = run.versions.masked(len(windows), masks, fill, unit)
        scores = torch.cat([scores for _, _, scores in groups])  # [windows, n, K]
        drops = run.scores_in(unit) - scores
        total, count = drops.new_zeros(*drops.shape[1:], *channel, *sides), drops.new_zeros(sides)
        for drop, place in zip(drops, windows, strict=True):
            total[place] += drop.view(*drop.shape, *(1,) * (len(channel) + len(sides)))
            count[place] += 1
        # A stride wider than the window leaves pixels that no window covers: nothing is known about them.
        return total / count.clamp_min(1) if self.overlap == "mean" else total

    def windows(self, sides: Sequence[int]) -> list[tuple[Any, ...]]:
        """The place of each window in images with these sides, an index of their last axes.

        Raises:
            InputError: the window is larger than the images, or there are more sizes than axes.
        """
        window, stride = (_per_axis(name, getattr(self, name), sides) for name in ("window", "stride"))
        if any(size > side for size, side in zip(window, sides, strict=True)):
            raise InputError(
                f"A window of {' x '.join(map(str, window))} pixels is larger than the images, "
                f"{' x '.join(map(str, sides))} pixels. Use a smaller window."
            )
        starts = [
            sorted({*range(0, side - size + 1, jump), side - size})
            for side, size, jump in zip(sides, window, stride, strict=True)
        ]
        return [
            (..., *(slice(start, start + size) for start, size in zip(corner, window, strict=True)))
            for corner in itertools.product(*starts)
        ]


def _several(value: int | tuple[int, ...]) -> Sequence[int]:
    return value if isinstance(value, tuple | list) else (value,)


def _per_axis(name: str, value: int | tuple[int, ...], sides: Sequence[int]) -> Sequence[int]:
    sizes = _several(value)
    if len(sizes) not in (1, len(sides)):
        raise InputError(f"Expected one {name} or {len(sides)}, one for each axis of the images, got {len(sizes)}.")
    return tuple(sizes) * len(sides) if len(sizes) == 1 else sizes
