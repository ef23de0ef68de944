"""What rules for layer, group, instance and RMS norms share: y = c / s w + b, of rows [groups, size]."""

import torch
from torch import Tensor

from attrbox.engine.site import Site


def normed(site: Site, x: Tensor) -> tuple[Tensor, Tensor]:
    """c = x - mean(x), or x where the norm is not centred, [groups, size]; s = sqrt(mean(c^2) + eps), [groups, 1]."""
    rows = x.reshape(-1, site.options["size"])
    if site.options["centred"]:
        rows = rows - rows.mean(1, keepdim=True)
    return rows, torch.sqrt(rows.square().mean(1, keepdim=True) + site.options["eps"])


def weighted(site: Site, grad_output: Tensor) -> Tensor:
    """The gradient with respect to c / s, [groups, size]."""
    weight = site.options["weight"]
    return (grad_output if weight is None else grad_output * weight).reshape(-1, site.options["size"])
