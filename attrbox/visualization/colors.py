"""Maps and images as colors."""

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_rgba
from numpy.typing import NDArray
from torch import Tensor

from attrbox.errors import InputError

Array: TypeAlias = NDArray[np.floating[Any]]


PERCENTILE = 99.5


_TONES = {-1: "#0a3d91", -0.6: "#3f7fd0", -0.25: "#a9cbf0", 0: "#ffffff", 0.25: "#f9b8a6", 0.6: "#dd4b3e", 1: "#a00014"}


def signed_colormap(opacity: Callable[[float], float]) -> LinearSegmentedColormap:
    """The tones, each as opaque as `opacity` of its value; few enough steps for small files, enough for the eye."""
    stops = [((value + 1) / 2, to_rgba(tone, opacity(abs(value)))) for value, tone in _TONES.items()]
    return LinearSegmentedColormap.from_list("attrbox", stops, N=91)


SIGNED = signed_colormap(lambda size: 1)


OVERLAY = signed_colormap(lambda size: min(max(1.6 * (size - 0.2), 0), 0.95))


def plane(array: Array) -> Array:
    """[H, W]: a vector as one row, of a volume the middle slice."""
    array = np.atleast_2d(array)
    while array.ndim > 2:
        array = array[len(array) // 2]
    return array


def picture(image: Tensor, stretch: bool = False) -> Array:
    """[H, W] or [H, W, 3] in 0 .. 1 of an image whose channels come first."""
    channels = image.nan_to_num(0, 0, 0).numpy()
    if channels.ndim < 3:  # a vector is one row, a sequence has its channels as rows
        pixels = np.atleast_2d(channels)
    else:
        planes = np.stack([plane(channel) for channel in channels], axis=-1)
        pixels = planes if planes.shape[-1] == 3 else planes.mean(-1)
    low, high = pixels.min(), pixels.max()
    if stretch or low < 0 or high > 1:
        pixels = (pixels - low) / (high - low) if high > low else np.full_like(pixels, 0.5)
    return pixels


def photograph_pixels(photograph: Any) -> Array:
    """The same of a tensor [C, H, W], an array [H, W], [H, W, 3] or a PIL image, of numbers in 0 .. 1 or of 8 bits."""
    if not isinstance(photograph, Tensor):
        array = np.asarray(photograph.convert("RGB") if hasattr(photograph, "convert") else photograph)
        if array.dtype.kind not in "biuf" or array.ndim not in (2, 3):
            raise InputError(
                f"Expected a photograph as a tensor [C, H, W], an array [H, W, 3] or a PIL image, got "
                f"{type(photograph).__name__} of shape {list(array.shape)}."
            )
        if array.ndim == 2:
            array = array[..., None]
        photograph = torch.from_numpy(np.array(array[..., :3])).movedim(-1, 0)  # without transparency
    share = 255 if photograph.dtype == torch.uint8 else 1
    return picture(finite_or_not(photograph, "a photograph") / share)


def draw_photograph(axes: Axes, photograph: Array) -> None:
    """Show a photograph, [H, W] or [H, W, 3]."""
    axes.imshow(photograph, cmap="gray", vmin=0, vmax=1, aspect="auto", interpolation="auto", origin="upper")


def draw_map(axes: Axes, heatmap: Array, colours: LinearSegmentedColormap = SIGNED) -> None:
    """Show a map, [H, W], in the colors of its own scale; blank, with a note, if there is nothing to show."""
    note = blank(heatmap)
    if note:
        axes.text(0.5, 0.5, note, ha="center", va="center", color=GREY, size=SMALL, transform=axes.transAxes)
        return
    axes.imshow(
        scaled(heatmap),
        cmap=colours,
        norm=Normalize(-1, 1),
        aspect="auto",
        interpolation="auto",
        interpolation_stage="data",
        origin="upper",
    )


def blank(heatmap: Array) -> str:
    """Why a map cannot be drawn, or nothing."""
    if np.isnan(heatmap).any():
        return "contains NaN"
    if np.isinf(heatmap).any():
        return "contains infinity"
    return "" if heatmap.any() else "all zero"


def scaled(heatmap: Array) -> Array:
    """The map in -1 .. 1, where 1 is the percentile; or the largest value, if fewer pixels than that are not zero."""
    sizes = np.abs(heatmap)
    scale = np.percentile(sizes, PERCENTILE) or sizes.max()
    return np.asarray(np.clip(heatmap, -scale, scale) / scale)


TYPE, SMALL = 8.0, 6.5


INK, GREY, FRAME = "#222222", "#777777", "#cccccc"


def finite_or_not(values: object, what: str) -> Tensor:
    """The tensor in double precision, where matplotlib can read it."""
    if not isinstance(values, Tensor) or values.is_meta or values.is_complex():
        got = values.device if isinstance(values, Tensor) and values.is_meta else getattr(values, "dtype", type(values))
        raise InputError(f"Expected {what} as a torch.Tensor of real numbers with data, got {got}.")
    return values.detach().cpu().double()
