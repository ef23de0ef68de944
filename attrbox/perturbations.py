"""What a perturbed pixel shows instead: the fills that the perturbation methods and the metrics share."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from attrbox.errors import InputError


def gaussian_kernel(sigma: float, like: Tensor) -> Tensor:
    """Weights of a normalised one-dimensional Gaussian, cut off at four standard deviations, [2 r + 1]."""
    radius = max(1, math.ceil(4 * sigma))
    positions = torch.arange(-radius, radius + 1, device=like.device, dtype=like.dtype)
    weights = torch.exp(-0.5 * (positions / sigma) ** 2)
    return weights / weights.sum()


def gaussian_blur(images: Tensor, sigma: float) -> Tensor:
    """Images [..., H, W] convolved with a Gaussian of standard deviation `sigma` pixels; border pixels are repeated.

    Differentiable; `sigma` 0 returns the images as they are. Two one-dimensional convolutions.
    """
    if sigma <= 0:
        return images
    kernel = gaussian_kernel(sigma, images)
    radius = len(kernel) // 2
    flat = images.reshape(-1, 1, *images.shape[-2:])
    flat = F.conv2d(F.pad(flat, (0, 0, radius, radius), mode="replicate"), kernel.view(1, 1, -1, 1))
    flat = F.conv2d(F.pad(flat, (radius, radius, 0, 0), mode="replicate"), kernel.view(1, 1, 1, -1))
    return flat.view(images.shape)


FILLS = ("zero", "mean", "blur", "noise")


def fill_images(images: Tensor, fill: float | str, normal: Callable[[], Tensor], sigma: float | None = None) -> Tensor:
    """What removed pixels show, in the shape of the images [N, C, H, W] (or one that broadcasts to it).

    Args:
        images: what pixels are removed from.
        fill: "zero"; "mean", of each channel of each image; "blur", the image itself through a Gaussian; "noise",
            normal with the mean and deviation of each channel of each image; or a number.
        normal: draws standard normal numbers that broadcast to the images; called for "noise" only.
        sigma: standard deviation of "blur", in pixels; default: 5 % of the longer side.

    Raises:
        InputError: vectors and sequences cannot be blurred.
    """
    if fill == "zero":
        return torch.zeros_like(images[:1])
    if isinstance(fill, int | float):
        return torch.full_like(images[:1], fill)
    if fill == "blur":
        if images.dim() != 4:
            raise InputError(
                f"The fill 'blur' blurs images [N, C, H, W], got {list(images.shape)}. Use 'zero', 'mean' or 'noise'."
            )
        return gaussian_blur(images, 0.05 * max(images.shape[-2:]) if sigma is None else sigma)
    axes = tuple(range(min(2, images.dim() - 1), images.dim()))
    mean = images.mean(axes, keepdim=True)
    if fill == "mean":
        return mean
    return mean + images.std(axes, keepdim=True, unbiased=False) * normal()
