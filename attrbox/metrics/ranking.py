"""Pixels, or regions of them, in the order of a map's values."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from attrbox.errors import InputError


def both_ends(
    values: Tensor, shuffled: Tensor, places: Callable[[], Tensor], most: int | None
) -> tuple[Tensor, Tensor]:
    """The cells from the largest value down and from the smallest up; one order is the reverse of the other.

    Args:
        values: [n, cells].
        shuffled: the cells in an order that decides between equal values, [n, cells].
        places: makes the inverse of that, [n, cells].
        most: how many of each order are wanted; None for all.
    """
    cells = values.shape[1]
    if most is None or most > cells // 4 or values.dtype != torch.float32 or cells >= 2**31:
        order = torch.sort(values.gather(1, shuffled), dim=1, descending=True, stable=True).indices
        order = shuffled.gather(1, order)
        return order, order.flip(1)
    # The ends of the order alone are a fraction of the work. Each pixel gets a key of its own, so that these are
    # the ends of one order: the bits of its value, which sort like integers, then its place in the shuffled order.
    bits = (values + 0.0).view(torch.int32)  # adding zero makes -0 an ordinary zero
    keys = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long() << 31
    keys -= places()
    first, last = (keys.topk(most, dim=1, largest=largest).indices for largest in (True, False))
    return first, last


def inverse(shuffled: Tensor) -> Tensor:
    """The place of each cell in an order of cells, [n, cells]."""
    places = torch.arange(shuffled.shape[1], device=shuffled.device).expand_as(shuffled)
    return torch.empty_like(shuffled).scatter_(1, shuffled, places)


def region_sums(heatmap: Tensor, region: int) -> Tensor:
    """Sums over regions of `region` x `region` pixels, those at the right and lower border cut, [n, h, w].

    Raises:
        InputError: the images have no height and width.
    """
    if region == 1:
        return heatmap
    if heatmap.dim() != 3:
        raise InputError(f"Regions need images [N, C, H, W], got maps of shape {list(heatmap.shape)}. Set region=1.")
    height, width = heatmap.shape[1:]
    padded = nn.functional.pad(heatmap, (0, -width % region, 0, -height % region))
    down, across = padded.shape[1] // region, padded.shape[2] // region
    return padded.view(len(padded), down, region, across, region).sum((2, 4))
