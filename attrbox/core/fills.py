"""What a perturbed pixel shows instead: the fills that the perturbation methods and the metrics share.

fill_of(images, "blur", ...)    one image that shows wherever the mask is 0
Pyramid.of(images, ...)         levels of more and more perturbed images, between which the mask chooses
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from attrbox.errors import InputError

Border: TypeAlias = Literal["replicate", "zero"]


def gaussian_kernel(sigma: float, like: Tensor) -> Tensor:
    """Weights of a normalised one-dimensional Gaussian, cut off at four standard deviations, [2 r + 1]."""
    radius = max(1, math.ceil(4 * sigma))
    positions = torch.arange(-radius, radius + 1, device=like.device, dtype=like.dtype)
    weights = torch.exp(-0.5 * (positions / sigma) ** 2)
    return weights / weights.sum()


def gaussian_blur(images: Tensor, sigma: float, border: Border = "replicate") -> Tensor:
    """Images [..., H, W] convolved with a Gaussian of standard deviation `sigma` pixels; beyond the border, the border
    pixels are repeated, or zeros.

    Differentiable; `sigma` 0 returns the images as they are. Two one-dimensional convolutions.
    """
    if sigma <= 0:
        return images
    kernel = gaussian_kernel(sigma, images)
    radius = len(kernel) // 2
    mode = "replicate" if border == "replicate" else "constant"
    flat = images.reshape(-1, 1, *images.shape[-2:])
    flat = F.conv2d(F.pad(flat, (0, 0, radius, radius), mode=mode), kernel.view(1, 1, -1, 1))
    flat = F.conv2d(F.pad(flat, (radius, radius, 0, 0), mode=mode), kernel.view(1, 1, 1, -1))
    return flat.view(images.shape)


def median_blur(images: Tensor, window: int) -> Tensor:
    """Images [n, C, H, W] with each pixel replaced by the median of `window` x `window` pixels round it, `window` odd;
    border pixels are repeated."""
    radius = window // 2
    blurred = []
    for image in images:  # one at a time: each needs window^2 times its memory
        padded = F.pad(image[None], (radius,) * 4, mode="replicate")[0]
        blurred.append(padded.unfold(1, window, 1).unfold(2, window, 1).flatten(3).median(3).values)
    return torch.stack(blurred)


def need_images(images: Tensor, what: str) -> None:
    """Raise unless the images are [N, C, H, W].

    Raises:
        InputError: they are not.
    """
    if images.dim() != 4:
        raise InputError(f"{what} needs images [N, C, H, W], got {list(images.shape)}.")


FILLS = ("zero", "mean", "blur", "median", "noise")


def fill_images(images: Tensor, fill: float | str, normal: Callable[[], Tensor], sigma: float | None = None) -> Tensor:
    """What removed pixels show, in the shape of the images [N, C, H, W] (or one that broadcasts to it).

    Args:
        images: what pixels are removed from.
        fill: "zero"; "mean", of each channel of each image; "blur", the image itself through a Gaussian; "median", of
            11 x 11 pixels; "noise", normal with the mean and deviation of each channel of each image; or a number.
        normal: draws standard normal numbers that broadcast to the images; called for "noise" only.
        sigma: standard deviation of "blur", in pixels; default: 5 % of the longer side.

    Raises:
        InputError: vectors and sequences cannot be blurred.
    """
    if fill == "zero":
        return torch.zeros_like(images[:1])
    if isinstance(fill, int | float):
        return torch.full_like(images[:1], fill)
    if fill in ("blur", "median"):
        need_images(images, f"The fill {fill!r}")
        if fill == "median":
            return median_blur(images, 11)
        return gaussian_blur(images, 0.05 * max(images.shape[-2:]) if sigma is None else sigma)
    axes = tuple(range(min(2, images.dim() - 1), images.dim()))
    mean = images.mean(axes, keepdim=True)
    if fill == "mean":
        return mean
    return mean + images.std(axes, keepdim=True, unbiased=False) * normal()


@dataclass(frozen=True)
class Pyramid:
    """Images perturbed more and more, from level 0 (most) to the last level (not at all); a mask chooses for each
    pixel the level m (L - 1), interpolated linearly (Fong et al. 2019, section 3).

        blur    level l is the image convolved with a Gaussian of standard deviation sigma (1 - l / (L - 1))
        fade    level l is the image times l / (L - 1)

    Attributes:
        levels: [n, L, C, H, W].
    """

    levels: Tensor

    @classmethod
    def of(cls, images: Tensor, kind: str, levels: int, sigma: float) -> "Pyramid":
        """The pyramid of images [n, C, H, W]; beyond their border are zeros, as published."""
        shares = [level / (levels - 1) for level in range(levels)]
        if kind == "fade":
            return cls(torch.stack([images * share for share in shares], 1))
        return cls(torch.stack([gaussian_blur(images, sigma * (1 - share), "zero") for share in shares], 1))

    def at(self, masks: Tensor) -> tuple[Tensor, Tensor]:
        """What the masks show, and its derivative with respect to each pixel of the mask.

        Args:
            masks: R masks of each image, [n, R, H, W], in [0, 1].

        Returns:
            Two tensors [n, R, C, H, W], without gradient.
        """
        last = self.levels.shape[1] - 1
        n, count = masks.shape[:2]
        with torch.no_grad():
            place = masks * last
            below = place.floor().clamp_(0, last - 1)
            share = (place - below).unsqueeze(2)
            channels, height, width = self.levels.shape[2:]
            index = below.long().view(n, count, 1, 1, height, width).expand(-1, -1, -1, channels, -1, -1)
            levels = self.levels.unsqueeze(1).expand(-1, count, -1, -1, -1, -1)
            low = levels.gather(2, index).squeeze(2)
            step = levels.gather(2, index + 1).squeeze(2) - low
            return torch.addcmul(low, share, step), step * last
