"""A linear model, on which metrics have closed forms."""

import torch
from nets import images
from torch import Tensor, nn

import attrbox


def measure(model, x, maps, *metrics, **options):
    return attrbox.evaluate(model, x, maps, metrics, **({"progress": False} | options))


def linear_model(weights: Tensor) -> nn.Module:
    """f = w x, as the only class, of images [1, H, W]."""
    linear = nn.Linear(weights.numel(), 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(weights.view(1, -1))
    return nn.Sequential(nn.Flatten(), linear).eval()


W = images(1, 5, 5, seed=9)
