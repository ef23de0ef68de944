"""What the black-box methods have in common: they hide parts of the image, and look at the score alone.

They take any callable for a model, record nothing, and run without gradients.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from attrbox.core.options import option
from attrbox.core.targets import UNITS
from attrbox.core.validation import check_choice, check_count, check_fill, check_number
from attrbox.methods.base import Method
from attrbox.methods.context.run import Run
from attrbox.methods.perturbation.superpixels import cells, given, means, numbered, quickshift


@dataclass(frozen=True, kw_only=True)
class Perturbing(Method):
    """Options of all black-box methods."""

    needs_gradients: ClassVar[bool] = False
    published_unit: ClassVar[str] = "logit"  # what a class scores in the paper
    fills: ClassVar[tuple[str, ...]] = ()  # further words that the option `fill` takes

    fill: Any = option(0.0, "what a hidden pixel shows: a number, a tensor, zero, mean, blur, median or noise")
    blur: float = option(10.0, "standard deviation of the blurred fill, in pixels")
    score: str | None = option(None, "what a class scores: logit, contrast, prob or log_prob; None: as published")

    def __post_init__(self) -> None:
        check_fill(self.fill, self.fills)
        check_number("blur", self.blur, above=0)
        if self.score is not None:
            check_choice("score", self.score, UNITS)

    def unit(self, run: Run) -> str:
        """What a class scores."""
        return run.settings.target.unit(self.score, self.published_unit)


def spatial(images: Tensor) -> Sequence[int]:
    """The sides of the images: all axes but the channels; of vectors [n, D], their only one."""
    return images.shape[2:] or images.shape[1:]


@dataclass(frozen=True, kw_only=True)
class Segmented(Perturbing):
    """Options of the methods that hide superpixels; `details["segments"]` are these, [n, K, ...]."""

    fills: ClassVar[tuple[str, ...]] = ("segment",)

    segments: Any = option(
        None, "superpixels: labels [H, W] or [N, H, W], or the cells of a grid along each axis; None: quickshift"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.segments, int):
            check_count("segments", self.segments)

    def superpixels(self, run: Run) -> tuple[Tensor, list[int]]:
        """A label for each pixel, [n, ...], and how many each image has."""
        sides, n = spatial(run.images), len(run.images)
        if self.segments is None:
            labels = quickshift(run.images, run.samples.seeds)
        elif isinstance(self.segments, int):
            labels = cells(sides, self.segments)[None]
        else:
            labels = given(self.segments, run.settings.target.samples, run.rows, sides)
        segments, counts = numbered(labels)
        return segments.to(run.images.device).expand(n, *sides), counts * (n // len(counts))

    def played(self, run: Run, coalitions: Sequence[Tensor], segments: Tensor, counts: Sequence[int]) -> Tensor:
        """The scores with some superpixels hidden, [rows, n, K].

        Args:
            run: the chunk.
            coalitions: which superpixels are shown, [rows of the image, superpixels of the image] for each image.
            segments, counts: the superpixels.

        Images with fewer rows than others are shown whole in those that they lack.
        """
        images, most = run.images, max(counts)
        sides = spatial(images)
        rows = max(len(shown) for shown in coalitions)
        table = images.new_ones(len(images), rows, most)
        for row, shown in enumerate(coalitions):
            table[row, : len(shown), : shown.shape[1]] = shown
        channel = (1,) * (images.dim() - 1 - len(sides))

        def masks(part: slice) -> Tensor:
            index = segments.flatten(1)[:, None].expand(-1, len(table[0, part]), -1)
            return table[:, part].gather(2, index).transpose(0, 1).reshape(-1, len(images), *channel, *sides)

        if isinstance(self.fill, str) and self.fill == "segment":
            fill = means(images, segments, most)
        else:
            fill = run.samples.fill(self.fill, self.blur)
        return torch.cat([scores for _, _, scores in run.versions.masked(rows, masks, fill, self.unit(run))])

    def spread(self, run: Run, coefficients: Sequence[Tensor], segments: Tensor) -> Tensor:
        """Each pixel gets the coefficient of its superpixel, [n, K, ...]; they are [K, superpixels] for each image."""
        maps = [values.to(run.images)[:, labels] for values, labels in zip(coefficients, segments, strict=True)]
        values = torch.stack(maps)
        run.tell(segments=segments[:, None].expand(values.shape))
        return values.unsqueeze(2) if run.images.dim() > 2 else values


def exact(*tensors: Tensor) -> list[Tensor]:
    """Copies for small systems of equations: float64, on the CPU (not every device has both), in one transfer."""
    flat = torch.cat([tensor.flatten().to(tensors[0].dtype) for tensor in tensors])
    sizes = [tensor.numel() for tensor in tensors]
    parts: Sequence[Tensor] = torch.split((flat if flat.is_meta else flat.cpu()).double(), sizes)
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def least_squares(design: Tensor, values: Tensor, weights: Tensor, ridge: float = 0.0) -> Tensor:
    """b that minimises sum w (y - X b)^2 + ridge |b|^2, the shortest if there are many, [features, K].

    Args:
        design: X, [rows, features].
        values: y, [rows, K].
        weights: w, [rows].
        ridge: weight of the penalty.
    """
    root = weights.sqrt()[:, None]
    penalty = ridge**0.5 * torch.eye(design.shape[1], dtype=design.dtype, device=design.device)
    left = torch.cat([root * design, penalty])
    right = torch.cat([root * values, values.new_zeros(design.shape[1], values.shape[1])])
    solution: Tensor = torch.linalg.lstsq(left, right, driver="gelsd").solution
    return solution
