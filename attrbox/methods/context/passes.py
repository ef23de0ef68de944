"""What methods and metrics share: images with what belongs to them, and the ways in which a model is run."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from attrbox.core.fills import fill_images
from attrbox.core.model_state import BlackBox
from attrbox.core.outputs import Outputs
from attrbox.core.random_streams import numbers, permutations
from attrbox.core.targets import Target
from attrbox.engine.calling import forward
from attrbox.engine.folding import Unwatched
from attrbox.engine.site import Rule
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


@dataclass(frozen=True, eq=False)
class Samples:
    """Some images of a call, their random numbers, and what they are compared with.

    Attributes:
        images: [n, ...].
        rows: which of the call's they are.
        seeds: their streams of random numbers, one each.
        total: how many images the call has.
    """

    images: Tensor
    rows: slice
    seeds: Sequence[int]
    total: int

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
        if tensor.shape[1:] == wanted and len(tensor) == self.total:
            return tensor[self.rows]
        raise InputError(
            f"Expected a baseline of shape {list(wanted)}, {[1, *wanted]} or "
            f"{[self.total, *wanted]}, got {list(tensor.shape)}."
        )

    def fill(self, fill: str | float | Tensor, sigma: float | None = None, draw: int = 0) -> Tensor:
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
        """Standard normal numbers of the images' shape: draw `draw` of each image's own stream, [n, C, H, W]."""
        return self.numbers(draw, self.images.shape[1:])

    def numbers(self, draw: int, shape: Sequence[int], uniform: bool = False) -> Tensor:
        """Standard normal numbers, or uniform ones in [0, 1): draw `draw` of each image's stream, [n, *shape]."""
        return numbers(self.seeds, draw, shape, self.images, uniform)

    def numbers_of(self, row: int, draw: int, shape: Sequence[int]) -> Tensor:
        """Uniform numbers in [0, 1) of one image alone, of a shape of its own: draw `draw` of its stream."""
        return numbers([self.seeds[row]], draw, shape, self.images, uniform=True)[0]

    def permutations(self, draw: int, size: int) -> Tensor:
        """A random order of `size` things from each image's own stream, [n, size]."""
        return permutations(self.seeds, draw, size, self.images.device)


class Once:
    """What was computed, kept under its arguments: `once(key, compute)`."""

    def __init__(self) -> None:
        self._kept: dict[tuple[object, ...], object] = {}

    def __call__(self, key: tuple[object, ...], compute: Callable[[], T]) -> T:
        """`compute()`, or what it returned for the same key before."""
        if key not in self._kept:
            self._kept[key] = compute()
        return cast(T, self._kept[key])


@dataclass(eq=False)
class Passes:
    """The ways in which a model is run.

        recorded   the images themselves: for rules to be replayed, in their own memory format
        unrecorded the same pass, but nothing is recorded
        plain      any images, for their true gradient, in the fastest way
        outputs    any images, without a gradient, in the fastest way

    Attributes:
        model: in evaluation mode.
        image: one of the images, [1, ...].
        precision: dtype of automatic mixed precision, or None.
        channels_last: run the fastest passes in this memory format.
    """

    model: nn.Module
    image: Tensor
    precision: torch.dtype | None = None
    channels_last: bool = True

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """Automatic mixed precision, if the call asks for it."""
        return self._autocast(self.precision)

    def autocast_recorded(self) -> contextlib.AbstractContextManager[None]:
        """The same for the pass at the images themselves, which rules are replayed on; but float32 in place of float16,
        whose range does not hold relevance."""
        return self._autocast(None if self.precision == torch.float16 else self.precision)

    def _autocast(self, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[None]:
        return torch.autocast(self.image.device.type, dtype) if dtype else contextlib.nullcontext()

    def recorded(
        self,
        images: Tensor,
        rules: Sequence[Rule | None],
        layers: Sequence[str | None] = (),
        maps: int | None = None,
        twice: bool = False,
    ) -> Tape:
        """A recorded pass; see `attrbox.engine.tape.record`."""
        with self.autocast_recorded():
            return record(self.model, images, rules, layers, twice, maps)

    def unrecorded(self, images: Tensor) -> Outputs:
        """The outputs with nothing recorded."""
        with self.autocast_recorded():
            return self.returned(forward(self.model, images.clone()), len(images))

    def plain(self, images: Tensor) -> Tape:
        """A forward pass for the plain gradient: nothing is recorded, batch-norm is folded into convolutions."""
        return self._fastest(images, lambda images: record(self.model, images))

    def outputs(self, images: Tensor) -> Outputs:
        """The outputs, without an autograd graph."""
        with torch.no_grad():  # a copy for the model, which may write into it
            output = self._fastest(images, lambda images: forward(self.model, images.clone()))
        return self.returned(output, len(images))

    def returned(self, output: Any, count: int) -> Outputs:
        """What the model returned for `count` images."""
        return Outputs(output, count, lambda: self._doubled)

    @cached_property
    def _doubled(self) -> Any:
        """What the model returns for two copies of an image."""
        with torch.no_grad():
            return forward(self.model, torch.cat([self.image, self.image]))

    @cached_property
    def _unwatched(self) -> Unwatched:
        return Unwatched(self.model)

    def _fastest(self, images: Tensor, function: Callable[[Tensor], T]) -> T:
        if isinstance(self.model, BlackBox):  # what it does with memory formats is not known
            images = images.contiguous()
        elif self.channels_last:
            images = in_channels_last(images)
        with self.autocast():
            return self._unwatched.run(images, function)


def in_channels_last(images: Tensor) -> Tensor:
    """Images [n, C, H, W] in the memory format channels_last; others as they are."""
    return images.contiguous(memory_format=torch.channels_last) if images.dim() == 4 else images
