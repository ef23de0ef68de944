"""What metrics ask for and get: maps, how they were made, and views to be scored."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn

from attrbox.core.options import identity
from attrbox.core.results import ChannelReduction, Provenance
from attrbox.errors import InputError
from attrbox.methods.base import method_registry as registry

Scoring: TypeAlias = Literal["logit", "prob", "log_prob", "accuracy"]


SCORINGS = ("logit", "prob", "log_prob", "accuracy")


@dataclass(frozen=True)
class Recipe:
    """How a method of the registry made maps: its options, and the circumstances of the call."""

    method: str
    options: Mapping[str, Any]
    provenance: Provenance = Provenance()

    @property
    def baseline(self) -> float | Tensor | str | None:
        """What the image was compared with, or what hidden pixels showed: a number, a tensor or a word for a fill; None
        if nothing was."""
        spec = registry[self.method]
        method = spec.create(self.options)
        names = [info.name for info in spec.options if info.name in ("baseline", "fill")]
        values = [getattr(method, name) for name in names]
        return next((value for value in values if isinstance(value, int | float | str | Tensor)), None)

    @property
    def blur(self) -> float | None:
        """The standard deviation of a blurred fill, in pixels."""
        blur: float | None = getattr(registry[self.method].create(self.options), "blur", None)
        return blur


# Makes maps [n, ...] in another way: (model, images [n, ...], class indices [n] or None, seeds of the images).
ExplainFunction: TypeAlias = Callable[[nn.Module, Tensor, Tensor | None, Sequence[int]], Tensor]


Explainer: TypeAlias = Recipe | ExplainFunction


@dataclass(frozen=True, eq=False)
class Maps:
    """The maps of one method.

    Attributes:
        values: [n, C or 1, H, W], as the method made them; [n, D] for vectors.
        reduction: how the channels become one map: their sum, or the largest.
        explainer: makes them again, if that is possible.
        expected: what each map should sum to, [n], as its method said when it made them.
        score: what was explained, [n], in units of the model's output.
    """

    values: Tensor
    reduction: ChannelReduction = "sum"
    explainer: Explainer | None = None
    expected: Tensor | None = None
    score: Tensor | None = None

    @cached_property
    def heatmap(self) -> Tensor:
        """The channels reduced as the method wants it, [n, H, W]."""
        return self.pixels if self.reduction == "sum" else self.values.amax(1)

    @cached_property
    def pixels(self) -> Tensor:
        """The sum over the channels, whatever the method's own reduction, [n, H, W]."""
        return self.values.sum(1) if self.values.dim() > 2 else self.values


@dataclass(frozen=True, eq=False)
class Views:
    """Images that the model shall see, made when their turn comes.

    Attributes:
        rows: of which image of the chunk each is a version, [count].
        make: makes some of them, [m, ...], in the dtype of the images.
        scoring: what is read from the output: the target's score as it is ("logit"), its softmax ("prob"), the
            logarithm of that ("log_prob"), or 1 if it is the largest ("accuracy").
    """

    rows: Tensor
    make: Callable[[slice], Tensor]
    scoring: Scoring = "logit"

    def __len__(self) -> int:
        return len(self.rows)


def frozen(made: Provenance) -> tuple[object, ...]:
    """A hashable stand-in, equal for maps that were made alike."""
    seed = made.seed if isinstance(made.seed, int) else tuple(made.seed)
    return (seed, made.precision, made.channels_last)


def named(recipe: Recipe) -> str:
    """A label of its own for each recipe."""
    return f"{recipe.method} {sorted((name, str(identity(value))) for name, value in recipe.options.items())}"


def as_kept(values: Tensor, maps: Maps, label: str) -> Tensor:
    """New maps in the form of those that are kept, which may have their channels reduced."""
    kept = maps.values
    if values.dim() == kept.dim() > 2 and kept.shape[1] == 1 < values.shape[1]:
        values = values.sum(1, keepdim=True) if maps.reduction == "sum" else values.amax(1, keepdim=True)
    if values.numel() != kept.numel():
        raise InputError(
            f"Expected maps of shape {list(kept.shape)} when {label!r} explains again, got {list(values.shape)}."
        )
    return values.reshape(kept.shape)


def pieces(requests: Sequence[Views], start: int, stop: int) -> list[tuple[int, slice]]:
    """The views `start` to `stop` of all requests, laid end to end: (request, which of its views)."""
    pieces, before = [], 0
    for index, views in enumerate(requests):
        inside = slice(max(start - before, 0), min(stop - before, len(views)))
        if inside.start < inside.stop:
            pieces.append((index, inside))
        before += len(views)
    return pieces
