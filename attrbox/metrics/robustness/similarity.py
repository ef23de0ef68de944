"""How alike two maps are: rank correlation and structural similarity, batched and on the device."""

import torch
import torch.nn.functional as F
from torch import Tensor

from attrbox.core.fills import gaussian_kernel


def average_ranks(values: Tensor) -> Tensor:
    """Ranks from 1 within each row [n, m]; equal values share the mean of their ranks."""
    ordered, order = values.sort(dim=1)
    starts = torch.ones_like(ordered, dtype=torch.bool)
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    run = starts.long().cumsum(1) - 1  # which run of equal values
    counts = torch.zeros_like(run).scatter_add_(1, run, torch.ones_like(run))
    middle = counts.cumsum(1) - (counts - 1) / 2
    return torch.empty_like(middle).scatter_(1, order, middle.gather(1, run))


def pearson(a: Tensor, b: Tensor) -> Tensor:
    """Correlation of the last axis; NaN where one of both is constant up to the rounding of its dtype."""
    (a, size_a), (b, size_b) = _centred(a), _centred(b)
    return ((a * b).sum(-1) / (size_a * size_b)).clamp(-1, 1)


def _centred(values: Tensor) -> tuple[Tensor, Tensor]:
    """Deviations from the mean in double precision, and their norm; NaN if that is rounding alone."""
    rounding = 8 * torch.finfo(values.dtype).eps * torch.linalg.vector_norm(values.double(), dim=-1)
    values = values.double() - values.double().mean(-1, keepdim=True)
    size = torch.linalg.vector_norm(values, dim=-1)
    return values, torch.where(size > rounding, size, torch.nan)


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Rank correlation of maps [n, ...], [n]. A map is like itself, also where it is constant (1); a constant map is
    like no other (0)."""
    a, b = a.flatten(1), b.flatten(1)
    correlation = pearson(average_ranks(a), average_ranks(b)).nan_to_num(0.0).to(a.dtype)
    return torch.where((a == b).all(1), 1.0, correlation)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) of maps [n, H, W], each stretched to 0 .. 1 first, [n].

    Gaussian windows of deviation 1.5, cut off at 5 pixels (smaller for maps that are), K1 = .01, K2 = .03, over the
    windows that lie inside. A constant map becomes zero.
    """
    a, b = _stretched(a)[:, None], _stretched(b)[:, None]
    whole = gaussian_kernel(1.5, a)
    radius = min(5, (min(a.shape[-2:]) - 1) // 2)
    middle = len(whole) // 2
    kernel = whole[middle - radius : middle + radius + 1]
    window = torch.outer(kernel, kernel)[None, None] / kernel.sum() ** 2

    def mean(values: Tensor) -> Tensor:
        return F.conv2d(values, window)

    mean_a, mean_b = mean(a), mean(b)
    variances = mean(a * a) - mean_a**2 + mean(b * b) - mean_b**2
    covariance = mean(a * b) - mean_a * mean_b
    similar = (2 * mean_a * mean_b + 1e-4) * (2 * covariance + 9e-4)
    return (similar / ((mean_a**2 + mean_b**2 + 1e-4) * (variances + 9e-4))).flatten(1).mean(1)


def _stretched(maps: Tensor) -> Tensor:
    low = maps.amin((1, 2), keepdim=True)
    span = maps.amax((1, 2), keepdim=True) - low
    return (maps - low) / torch.where(span > 0, span, 1.0)
