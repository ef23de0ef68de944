"""A chunk of images under one model: what it is compared with, its random numbers, and how the model is run on it."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from attrbox.core.fills import fill_images
from attrbox.core.model_state import BlackBox
from attrbox.core.outputs import Outputs
from attrbox.core.random_streams import numbers
from attrbox.core.targets import Target
from attrbox.engine.calling import forward
from attrbox.engine.folding import Unwatched
from attrbox.engine.tape import Tape, record
from attrbox.errors import InputError

T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """What holds for every chunk of a call.

    Attributes:
        target: what is explained.
        seeds: the streams of the call's images, one each.
        precision: dtype of automatic mixed precision, or None.
        channels_last: run passes over many images in the channels_last memory format.
        progress: called with the number of passes (an image forward and backward) that have been done.
    """

    target: Target
    seeds: Sequence[int]
    precision: torch.dtype | None = None
    channels_last: bool = True
    progress: Callable[[int], None] = lambda passes: None


class Chunk:
    """Some images of a call.

    Attributes:
        images: [n, ...].
        rows: which of the call's they are.
        per_pass: how many images a forward pass may take.
    """

    def __init__(self, model: nn.Module, images: Tensor, settings: Settings, rows: slice, per_pass: int) -> None:
        self.model = model
        self.images = images
        self.settings = settings
        self.rows = rows
        self.per_pass = per_pass
        self._cache: dict[tuple[object, ...], object] = {}
        self._unwatched = Unwatched(model)
        self._doubled = cache(partial(_doubled, model, images[:1]))
        self._details: dict[str, Any] = {}

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """Automatic mixed precision, if the call asks for it."""
        with self._autocast(self.settings.precision):
            yield

    @contextlib.contextmanager
    def autocast_recorded(self) -> Iterator[None]:
        """The same for the pass at the images themselves, which rules are replayed on; but float32 in place of float16,
        whose range does not hold relevance."""
        with self._autocast(None if self.settings.precision == torch.float16 else self.settings.precision):
            yield

    def _autocast(self, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[None]:
        return torch.autocast(self.images.device.type, dtype) if dtype else contextlib.nullcontext()

    def once(self, key: tuple[object, ...], compute: Callable[[], T]) -> T:
        """`compute()`, or what it returned for the same key before, also to another method."""
        if key not in self._cache:
            self._cache[key] = compute()
        return cast(T, self._cache[key])

    def tell(self, **details: Any) -> None:
        """What a method has to tell besides its maps; it becomes the `details` of the `Attribution`.

        Tensors are [n, K, ...] and are joined over the chunks; so are objects with a class method `joined(parts)`.
        Of anything else there is a list, one entry per chunk.
        """
        self._details.update(details)

    def told(self) -> dict[str, Any]:
        """What has been told since the last call."""
        details, self._details = self._details, {}
        return details

    # -------------------------------------------------------------------------------------------- baselines, numbers

    def baseline(self, baseline: float | Tensor) -> Tensor:
        """A baseline as a tensor: [1, C, H, W] if all images share it, else [n, C, H, W].

        Raises:
            InputError: its shape does not fit the images, or it is not finite.
        """
        if not isinstance(baseline, Tensor):
            return torch.full_like(self.images[:1], float(baseline))
        wanted = self.images.shape[1:]
        tensor = baseline.detach().to(self.images)
        tensor = tensor.clone() if tensor.is_inference() else tensor
        if not tensor.is_meta and not bool(tensor.isfinite().all()):
            raise InputError("Expected a finite baseline, got NaN or infinity in it.")
        if tensor.shape == wanted:
            return tensor[None]
        if tensor.shape[1:] == wanted and len(tensor) == 1:
            return tensor
        if tensor.shape[1:] == wanted and len(tensor) == self.settings.target.samples:
            return tensor[self.rows]
        raise InputError(
            f"Expected a baseline of shape {list(wanted)}, {[1, *wanted]} or "
            f"{[self.settings.target.samples, *wanted]}, got {list(tensor.shape)}."
        )

    def fill(self, fill: "str | float | Tensor", sigma: float, draw: int = 0) -> Tensor:
        """What hidden pixels show, [1 or n, C, ...]: a baseline, or one of the words of `attrbox.core.fills.FILLS`.

        Args:
            fill: a number, a tensor or a word.
            sigma: standard deviation of the fill "blur", in pixels.
            draw: which numbers of each image's stream the fill "noise" takes.
        """
        if not isinstance(fill, str):
            return self.baseline(fill)
        return fill_images(self.images, fill, lambda: self.normal(draw), sigma)

    def normal(self, draw: int) -> Tensor:
        """Standard normal numbers of the images' shape; draw `draw` of each image's own stream, [n, C, H, W]."""
        return self.numbers(draw, self.images.shape[1:])

    def numbers(self, draw: int, shape: Sequence[int], uniform: bool = False) -> Tensor:
        """Standard normal numbers, or uniform ones in [0, 1): draw `draw` of each image's stream, [n, *shape]."""
        return numbers(self.seeds, draw, shape, self.images, uniform)

    def numbers_of(self, row: int, draw: int, shape: Sequence[int]) -> Tensor:
        """Uniform numbers in [0, 1) of one image alone, of a shape of its own: draw `draw` of its stream."""
        return numbers([self.seeds[row]], draw, shape, self.images, uniform=True)[0]

    @property
    def seeds(self) -> Sequence[int]:
        """The streams of the chunk's images, one each."""
        return self.settings.seeds[self.rows]

    # --------------------------------------------------------------------------------------------- passes of any images

    def plain(self, images: Tensor) -> Tape:
        """A forward pass of any images for their plain gradient, in the fastest way: nothing is recorded, memory
        format channels_last, batch-norm folded into convolutions."""
        return self._fastest(images, lambda images: record(self.model, images))

    def bare(self, images: Tensor) -> Outputs:
        """The outputs on any images, as fast and without an autograd graph."""
        with torch.no_grad():  # a copy for the model, which may write into it
            output = self._fastest(images, lambda images: forward(self.model, images.clone()))
        return self.returned(output, len(images))

    def returned(self, output: Any, count: int | None = None) -> Outputs:
        """What the model returned for `count` images; for all of the chunk by default."""
        return Outputs(output, len(self.images) if count is None else count, self._doubled)

    def _fastest(self, images: Tensor, function: Callable[[Tensor], T]) -> T:
        if isinstance(self.model, BlackBox):  # what it does with memory formats is not known
            images = images.contiguous()
        elif self.settings.channels_last:
            images = in_channels_last(images)
        with self.autocast():
            return self._unwatched.run(images, function)


@torch.no_grad()
def _doubled(model: nn.Module, image: Tensor) -> Any:
    """What the model returns for two copies of an image."""
    return forward(model, torch.cat([image, image]))


def in_channels_last(images: Tensor) -> Tensor:
    """Images [n, C, H, W] in the memory format channels_last; others as they are."""
    return images.contiguous(memory_format=torch.channels_last) if images.dim() == 4 else images
