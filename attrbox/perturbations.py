"""What a perturbed pixel shows instead: the fills that the perturbation methods and the metrics share."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


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
