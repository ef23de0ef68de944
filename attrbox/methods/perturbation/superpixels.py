"""Superpixels: regions of an image that are hidden or shown as a whole."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attrbox.errors import InputError, OptionError


def quickshift(images: Tensor, seeds: Sequence[int]) -> Tensor:
    """Superpixels of images [n, C, H, W] by quickshift, with the settings of LIME's image explainer, [n, H, W].

    Images are scaled to [0, 1] for it, each by its smallest and largest value, as their normalisation is not known
    here. Runs on the CPU, and leaves its result there.

    Raises:
        OptionError: scikit-image is not there.
        InputError: the images have no height and width.
    """
    if images.dim() != 4:
        raise InputError(
            f"Superpixels are made of images [N, C, H, W], got {list(images.shape)}. Give segments=..., labels of the "
            "same height and width, or the number of cells of a grid along each axis."
        )
    if images.is_meta:  # no pixels, so one region
        return torch.zeros(len(images), *images.shape[2:], dtype=torch.int64, device="meta")
    try:
        from skimage import segmentation
    except ImportError as error:
        raise OptionError(
            "Superpixels need scikit-image: pip install 'attrbox[superpixels]'. Or give segments=..., your own labels "
            "or the number of cells of a grid along each axis."
        ) from error
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    unit = ((images - low) / (high - low).clamp_min(torch.finfo(images.dtype).tiny)).cpu().double()
    settings = {"kernel_size": 4, "max_dist": 200, "ratio": 0.2, "convert2lab": images.shape[1] == 3}
    run: Any = segmentation.quickshift
    found = [
        run(image.permute(1, 2, 0).numpy(), rng=seed % 2**31, **settings)
        for image, seed in zip(unit, seeds, strict=True)
    ]
    return torch.from_numpy(np.stack(found)).to(torch.int64)


def cells(sides: Sequence[int], grid: int) -> Tensor:
    """A regular grid of regions, `grid` along each axis, [*sides].

    Raises:
        InputError: there are more cells than pixels.
    """
    if grid > min(sides):
        raise InputError(
            f"A grid of {grid} superpixels along each axis is larger than the images, {' x '.join(map(str, sides))} "
            "pixels. Use fewer."
        )
    labels = torch.zeros((), dtype=torch.int64, device="cpu")
    for side in sides:
        labels = labels[..., None] * grid + torch.arange(side, device="cpu") * grid // side
    return labels


def given(segments: Any, count: int, rows: slice, sides: Sequence[int]) -> Tensor:
    """A user's labels as [1 or n, *sides], on the CPU.

    Args:
        segments: whole numbers, [*sides] or [N, *sides].
        count: N, images of the call.
        rows: those of the chunk.
        sides: of the images.

    Raises:
        InputError: the labels have another shape, or are no whole numbers.
    """
    labels = torch.as_tensor(segments, device=None if isinstance(segments, torch.Tensor) else "cpu")
    whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype is torch.bool)
    fits = labels.numel() > 0 and tuple(labels.shape) in (tuple(sides), (count, *sides))
    if not whole or not fits:
        raise InputError(
            f"Expected superpixels as whole numbers of shape {list(sides)} or {[count, *sides]}, a label for each "
            f"pixel, got {labels.dtype} {list(labels.shape)}."
        )
    labels = labels[None] if labels.dim() == len(sides) else labels[rows]
    return labels.to("cpu", torch.int64)


def numbered(segments: Tensor) -> tuple[Tensor, list[int]]:
    """The labels of each image renamed to 0, 1, ..., and how many there are: [n, ...] and n numbers."""
    if segments.is_meta:
        return segments, [1] * len(segments)
    renamed = [labels.unique(return_inverse=True) for labels in segments]
    return torch.stack([inverse for _, inverse in renamed]), [len(names) for names, _ in renamed]


def means(images: Tensor, segments: Tensor, count: int) -> Tensor:
    """Each superpixel in its mean colour, of the images' shape.

    Args:
        images: [n, C, ...], or [n, D].
        segments: labels below `count`, [n, ...].
        count: the most labels of any image.
    """
    flat = images.reshape(len(images), -1, segments[0].numel())
    index = segments.flatten(1)[:, None].expand(flat.shape)
    sums = flat.new_zeros(*flat.shape[:2], count).scatter_add_(2, index, flat)
    sizes = torch.zeros_like(sums).scatter_add_(2, index, torch.ones_like(flat))
    return (sums / sizes.clamp_min(1)).gather(2, index).view(images.shape)
