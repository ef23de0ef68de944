"""What rules for layer, group, instance and RMS norms share: y = c / s w + b, of rows [groups, size]."""

import torch
from torch import Tensor

from attrbox.engine.site import NormInfo, Site


def normed(site: Site, x: Tensor) -> tuple[Tensor, Tensor]:
    """c = x - mean(x), or x where the norm is not centered, [groups, size]; s = sqrt(mean(c^2) + eps), [groups, 1]."""
    norm = site.about(NormInfo)
    rows = x.reshape(-1, norm.size)
    if norm.centered:
        rows = rows - rows.mean(1, keepdim=True)
    return rows, torch.sqrt(rows.square().mean(1, keepdim=True) + norm.eps)


def weighted(site: Site, grad_output: Tensor) -> Tensor:
    """The gradient with respect to c / s, [groups, size]."""
    norm = site.about(NormInfo)
    return (grad_output if norm.weight is None else grad_output * norm.weight).reshape(-1, norm.size)
