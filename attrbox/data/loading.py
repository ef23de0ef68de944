"""`load_images`: photographs as the batch that a model takes, with the photographs themselves beside it."""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from attrbox.data.geometry import View, view_of
from attrbox.data.images import as_rgb, distinct_names, find_images, open_image
from attrbox.data.models.loaded_model import LoadedModel
from attrbox.errors import InputError, shown

Photograph: TypeAlias = Path | Image.Image
PhotographsLike: TypeAlias = "str | Path | Image.Image | NDArray[Any] | Tensor | Iterable[Any]"


@dataclass(frozen=True, eq=False)
class Images:
    """Photographs, and the batch that was made of them.

    Attributes:
        values: [N, C, H, W], preprocessed.
        names: one per image, all different: the file's name without its suffix, with as many of its folders as it
            takes to tell it apart from the others, or "image 0", "image 1", ... where there are no files.
        sources: the files; None where there are none.
        views: the part of its photograph that each image shows; None where the preprocessing does not tell.
        originals: the photographs that came without a file.
    """

    values: Tensor
    names: list[str]
    sources: list[Path | None]
    views: list[View | None]
    originals: list[Image.Image | None]

    def __len__(self) -> int:
        return len(self.values)

    def photograph(self, row: int) -> Image.Image:
        """Return one photograph as RGB, at its original size. Files are opened again."""
        original, source = self.originals[row], self.sources[row]
        if original is not None:
            return original
        assert source is not None  # one of the two is there
        return open_image(source)

    def __getitem__(self, rows: int | slice) -> "Images":
        rows = slice(rows, rows + 1 or None) if isinstance(rows, int) else rows
        return Images(*(getattr(self, name)[rows] for name in ("values", "names", "sources", "views", "originals")))

    def __iter__(self) -> "Iterator[Images]":
        return (self[row] for row in range(len(self)))

    def to(self, device: torch.device | str) -> "Images":
        """Return the same with the batch on a device."""
        return replace(self, values=self.values.to(device))

    def __repr__(self) -> str:
        few = ", ".join(self.names[:3]) + (", ..." if len(self) > 3 else "")
        return f"<Images {list(self.values.shape)}: {few}>"


def load_images(images: PhotographsLike, preprocess: LoadedModel | Callable[[Image.Image], Tensor]) -> Images:
    """Read photographs into one batch, and keep the photographs.

    Args:
        images: files, and folders that are searched with all their subfolders; PIL images; arrays [H, W], [H, W, 1],
            [H, W, 3] or [H, W, 4], or [N, H, W, C], of 8 bits or of numbers from 0 to 1; tensors of 8 bits [C, H, W] or
            [N, C, H, W]; or a list of any of these. Gray becomes RGB, and what is transparent is laid over white.
        preprocess: a model of `attrbox.load_model`, or a function from an RGB image to a tensor of the same shape for
            every image.

    Returns:
        The batch, in the order given and by path within a folder; a file that is named twice comes once.

    Raises:
        FileError: a path does not exist, a folder holds no image, or a file cannot be read as one.
        InputError: there are no images, one is of another kind, or `preprocess` made tensors of different shapes.

    Example:
        >>> import numpy as np
        >>> import attrbox
        >>> model = attrbox.load_model("torchvision:squeezenet1_1", weights="none")
        >>> attrbox.load_images(np.zeros((300, 400, 3), np.uint8), model)
        <Images [1, 3, 224, 224]: image 0>
    """
    function = preprocess.preprocess if isinstance(preprocess, LoadedModel) else preprocess
    if not callable(function):
        raise InputError(
            f"Expected preprocess to be a model of attrbox.load_model or a function from a PIL image to a tensor, got "
            f"{shown(preprocess)}."
        )
    given = list(_photographs(images))
    files = [one for one in given if isinstance(one, Path)]
    file_names = iter(distinct_names(files) if files else [])
    tensors, views, seen = [], [], dict[tuple[int, int], View | None]()
    for one in given:
        photograph = open_image(one) if isinstance(one, Path) else one
        tensors.append(_preprocessed(function, photograph, one))
        if photograph.size not in seen:
            seen[photograph.size] = view_of(function, *photograph.size)
        views.append(seen[photograph.size])
    shapes = {tuple(tensor.shape) for tensor in tensors}
    if len(shapes) > 1:
        raise InputError(
            f"Expected the preprocessing to make tensors of one shape, got {sorted(shapes)}. Let it resize and crop to "
            "a fixed size."
        )
    return Images(
        torch.stack(tensors),
        [next(file_names) if isinstance(one, Path) else f"image {row}" for row, one in enumerate(given)],
        [one if isinstance(one, Path) else None for one in given],
        views,
        [None if isinstance(one, Path) else one for one in given],
    )


def _preprocessed(function: Callable[[Image.Image], Any], photograph: Image.Image, given: Photograph) -> Tensor:
    name = f"{str(given)!r}" if isinstance(given, Path) else f"an image of {photograph.size}"
    try:
        made = function(photograph)
    except Exception as error:  # foreign code
        raise InputError(
            f"The preprocessing raised {type(error).__name__} on {name}: {error}. It is called with one RGB PIL image."
        ) from error
    if not isinstance(made, Tensor) or not made.is_floating_point() or made.dim() == 0:
        got = f"{made.dtype} {list(made.shape)}" if isinstance(made, Tensor) else type(made).__name__
        raise InputError(f"Expected the preprocessing to make a floating-point tensor [C, H, W] of {name}, got {got}.")
    return made


def is_photographs(images: object) -> bool:
    """Whether images are photographs that need a preprocessing, and not the batch that a model takes."""
    if isinstance(images, list | tuple):
        return bool(images) and is_photographs(images[0])
    return isinstance(images, str | os.PathLike | Image.Image | np.ndarray) or (
        isinstance(images, Tensor) and images.dtype == torch.uint8
    )


def _photographs(images: object) -> Iterator[Photograph]:
    if isinstance(images, str | os.PathLike):
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", str(images)):
            raise InputError(f"Expected a file or a folder, got the address {str(images)!r}. Download the image first.")
        yield from find_images(Path(images))
    elif isinstance(images, Image.Image):
        yield as_rgb(images)
    elif isinstance(images, np.ndarray):
        yield from map(_from_array, images if images.ndim == 4 else [images])
    elif isinstance(images, Tensor):
        yield from _from_tensor(images)
    elif isinstance(images, Sequence | Iterator) or (isinstance(images, Iterable) and not isinstance(images, dict)):
        whole = list(images)
        if not whole:
            raise InputError("Expected at least one image, got none.")
        yield from _without_doubles(one for part in whole for one in _photographs(part))
    else:
        raise InputError(f"Expected image files, folders, PIL images or arrays [H, W, 3], got {type(images).__name__}.")


def _without_doubles(photographs: Iterable[Photograph]) -> Iterator[Photograph]:
    """Files that are named twice come once."""
    files = set()
    for photograph in photographs:
        if isinstance(photograph, Path):
            if photograph in files:
                continue
            files.add(photograph)
        yield photograph


def _from_tensor(images: Tensor) -> Iterator[Image.Image]:
    if images.dtype != torch.uint8 or images.dim() not in (3, 4):
        raise InputError(
            f"Expected photographs as a tensor of 8 bits [C, H, W] or [N, C, H, W], got {images.dtype} "
            f"{list(images.shape)}. A batch that is preprocessed needs no loading: give it to explain as it is."
        )
    for image in images if images.dim() == 4 else [images]:
        yield _from_array(image.cpu().movedim(0, -1).numpy())


def _from_array(array: NDArray[Any]) -> Image.Image:
    """A PIL image of an array [H, W] or [H, W, 1, 3 or 4], of 8 bits or of numbers from 0 to 1."""
    shape = list(array.shape)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if not array.size or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        hint = " Move the channels to the end." if len(shape) == 3 and shape[0] in (1, 3, 4) else ""
        raise InputError(f"Expected an array [H, W], [H, W, 3] or [H, W, 4], got {shape}.{hint}")
    if array.dtype.kind == "f":
        low, high = float(array.min()), float(array.max())
        if not (0 <= low <= high <= 1):
            raise InputError(
                f"Expected an array of 8 bits, or of numbers from 0 to 1, got {array.dtype} from {low:.4g} to "
                f"{high:.4g}. A batch that is preprocessed is given to explain as a tensor."
            )
        array = (array * 255).round().astype(np.uint8)
    elif array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    if array.dtype != np.uint8:
        raise InputError(f"Expected an array of 8 bits, or of numbers from 0 to 1, got {array.dtype}.")
    return as_rgb(Image.fromarray(array))
