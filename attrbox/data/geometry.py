"""Find out what a preprocessing does to a photograph: which part of it the model sees, and in what units.

Ramps of gray go through the preprocessing, and what comes out tells, for transforms of any library. With b, w and r the
outputs for a black image, a white one and a ramp from 0 (first pixel) to 1 (last pixel) along an axis of n pixels:

    std = 1 / (w - b),    mean = -b std,    position of an output pixel = (n - 1) (r - b) / (w - b)
"""

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

Profile = NDArray[np.float64]

_TOLERANCE = 0.01  # of the photograph's side: rounding of 8-bit pixels and of resizing
_EDGE = 0.1  # share of the positions next to the border, which resizing may bend


@dataclass(frozen=True)
class View:
    """The part of a photograph that a model sees, and the normalization of its pixels.

    Attributes:
        left, top, width, height: the box that the model's input covers, in pixels of the photograph. It may reach
            beyond the photograph, where the preprocessing pads.
        mean, std: per channel, of pixels from 0 to 1: input = (pixel - mean) / std.
    """

    left: float
    top: float
    width: float
    height: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def denormalized(self, image: Tensor) -> Tensor:
        """Undo the normalization of an input [..., C, H, W]: pixels from 0 to 1."""
        mean, std = (torch.tensor(values).to(image)[:, None, None] for values in (self.mean, self.std))
        return (image * std + mean).clamp(0, 1)


def view_of(preprocess: Callable[[Image.Image], Any], width: int, height: int) -> View | None:
    """Find the view that a preprocessing takes of photographs of one size.

    Args:
        preprocess: a PIL image -> a tensor [C, H, W].
        width, height: of the photographs, in pixels.

    Returns:
        The view, or None if the preprocessing is not a resize and crop (or padding) with a linear normalization: if it
        draws random numbers, rotates, mirrors, warps, or is no function of one RGB image.

    Example:
        >>> from attrbox.data.models.loaded_model import Preprocess
        >>> view = view_of(Preprocess(resize=256, crop=224), width=512, height=256)
        >>> round(view.left), round(view.top), round(view.width), round(view.height)
        (144, 16, 224, 224)
    """
    across = np.linspace(0, 255, width).round().astype(np.uint8)
    down = np.linspace(0, 255, height).round().astype(np.uint8)
    shape = (height, width)
    try:
        with _same_random_state():
            black, white, *ramps, again = (
                _answer(preprocess, np.broadcast_to(pixels, shape))
                for pixels in (np.uint8(0), np.uint8(255), across, down[:, None], across)
            )
    except Exception:  # foreign code that takes no such image
        return None
    if not all(answer.shape == black.shape for answer in (white, *ramps)) or not np.array_equal(ramps[0], again):
        return None
    steps = white - black
    seen = np.asarray(np.all((steps > 0) & (steps > 0.999 * steps.max((1, 2), keepdims=True)), axis=0))  # not padding
    rows, columns = (np.flatnonzero(np.any(seen, axis=axis)) for axis in (1, 0))
    if not seen[np.ix_(rows, columns)].all() or not len(rows) or not len(columns):
        return None
    std = 1 / np.median(steps[:, seen], axis=1)
    mean = -np.median(black[:, seen], axis=1) * std
    if not np.allclose(steps[:, seen], 1 / std[:, None], rtol=1e-3):
        return None
    positions = [((ramp - black) / steps.clip(1e-12)).mean(0)[np.ix_(rows, columns)] for ramp in ramps]
    horizontal = _line(positions[0], columns, width, black.shape[2])
    vertical = _line(positions[1].T, rows, height, black.shape[1])
    if horizontal is None or vertical is None:
        return None
    (left, box_width), (top, box_height) = horizontal, vertical
    return View(left, top, box_width, box_height, tuple((mean + 0.0).tolist()), tuple(std.tolist()))


@contextlib.contextmanager
def _same_random_state() -> Iterator[None]:
    """Leave the global random states of Python, numpy and torch as they were."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002


def _answer(preprocess: Callable[[Image.Image], Any], gray: NDArray[np.uint8]) -> Profile:
    """What the preprocessing makes of a gray image, [C, H, W]."""
    made = preprocess(Image.fromarray(np.stack([gray] * 3, axis=-1)))
    array = torch.as_tensor(made).double().numpy()
    return array[None] if array.ndim == 2 else array.reshape(array.shape[-3:])


def _line(positions: Profile, columns: NDArray[np.intp], size: int, count: int) -> tuple[float, float] | None:
    """Fit a straight line to the positions of an output's columns in a photograph.

    Args:
        positions: of the output's pixels along the photograph's, from 0 to 1, [H, columns].
        columns: the output's columns that are not padding.
        size: of the photograph along this axis, in pixels.
        count: of all the output's columns.

    Returns:
        The start and the length of the output in pixels of the photograph; None if the positions lie on no straight
        line, or depend on the row.
    """
    profile = positions.mean(0)
    if len(columns) < 2 or np.abs(positions - profile).max() > _TOLERANCE:
        return None
    cut = int(len(columns) * _EDGE)
    inside = slice(cut, len(columns) - cut)
    slope, start = np.polyfit(columns[inside], profile[inside], 1).tolist()
    if slope <= 0 or np.abs(start + slope * columns[inside] - profile[inside]).max() > _TOLERANCE:
        return None
    pixel = slope * (size - 1)  # of the output, in pixels of the photograph
    return start * (size - 1) + 0.5 - pixel / 2, pixel * count
