"""Result types, and the words for shapes that the documentation uses.

n, N    images in a chunk, in a call      K      targets explained at once
C       channels of an image              H, W   its height and width (any number of axes is allowed)
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor

ChannelReduction: TypeAlias = Literal["sum", "max"]


class _HasPlace(Protocol):
    @property
    def kind(self) -> str: ...
    @property
    def module(self) -> str: ...
    @property
    def call(self) -> int: ...
    @property
    def repeat(self) -> int: ...


@dataclass(frozen=True, order=True)
class Operated:
    """One call of an operation; no two of one forward pass are equal.

    Attributes:
        operation: what ran.
        module: qualified name of the innermost module that ran it.
        call: zero-based index of this call among the module's calls in the forward pass.
        repeat: zero-based index of this operation among those of its name in that call.
    """

    operation: str
    module: str
    call: int
    repeat: int = 0

    @classmethod
    def listed(cls, sites: Iterable[_HasPlace]) -> "tuple[Operated, ...]":
        """The same for sites of a tape."""
        return tuple(cls(site.kind, site.module, site.call, site.repeat) for site in sites)

    def __str__(self) -> str:
        number = f" {self.repeat + 1}" if self.repeat else ""
        again = f" (call {self.call})" if self.call else ""
        return f"{self.operation}{number} in {self.module or 'the model'}{again}"


_AMOUNTS = ("arriving", "leaving", "bias", "stabiliser", "clamp")


@dataclass(frozen=True, eq=False)
class Conservation:
    """Relevance at each site, layer by layer: what came, what went on, and who kept the rest.

    Attributes:
        sites: in order of execution.
        arriving: at the site's output, y * G_y summed, [n, K, sites].
        leaving: at its inputs, x * G_x summed, [n, K, sites].
        bias, stabiliser, clamp: what layers keep, by reason, [n, K, sites]; 0 elsewhere.
        constants: what is kept between sites, where the model adds constants to activations or joins them, such as
            embeddings of positions and class tokens, [n, K]: score - sum of the map - sum of what sites absorb.
    """

    sites: tuple[Operated, ...]
    arriving: Tensor
    leaving: Tensor
    bias: Tensor
    stabiliser: Tensor
    clamp: Tensor
    constants: Tensor

    @property
    def absorbed(self) -> Tensor:
        """All that did not go on, [n, K, sites]."""
        return self.arriving - self.leaving

    @classmethod
    def joined(cls, parts: "Sequence[Conservation]") -> "Conservation":
        """Those of several chunks as one."""
        names = (*_AMOUNTS, "constants")
        return cls(parts[0].sites, *(torch.cat([getattr(part, name) for part in parts]) for name in names))

    def table(self) -> str:
        """Sites in order of execution, means over images and targets, as a Markdown table."""
        lines = [f"| site | {' | '.join(_AMOUNTS)} |", "|---|" + "---:|" * len(_AMOUNTS)]
        columns = (getattr(self, name).flatten(0, 1).mean(0).tolist() for name in _AMOUNTS)
        for site, *numbers in zip(self.sites, *columns, strict=True):
            lines.append(f"| {site} | " + " | ".join(f"{number:.4g}" for number in numbers) + " |")
        lines.append(f"| added constants | {self.constants.mean().item():.4g} |" + " |" * (len(_AMOUNTS) - 1))
        return "\n".join(lines)


@dataclass(frozen=True)
class Coverage:
    """How the non-linear operations of the model were treated.

    Attributes:
        rule: got the method's rule.
        derivative: known to the engine, but left to the true derivative by the method.
        unknown: non-linear, and not understood by the engine: the true derivative held.
        black_box: the method takes no gradients, so the operations do not matter to it.
        random: draw other numbers in each pass (dropout with training=True), so that maps are of a random score.
        conservation: how much relevance each of the operations kept, for the LRP composites with `audit=True`.
    """

    rule: tuple[Operated, ...] = ()
    derivative: tuple[Operated, ...] = ()
    unknown: tuple[Operated, ...] = ()
    black_box: bool = False
    random: tuple[Operated, ...] = ()
    conservation: Conservation | None = None

    @classmethod
    def joined(cls, parts: "Sequence[Coverage]") -> "Coverage":
        """That of several chunks of images."""
        audits = [part.conservation for part in parts if part.conservation is not None]
        return replace(parts[0], conservation=Conservation.joined(audits)) if audits else parts[0]

    @property
    def complete(self) -> bool:
        """Whether nothing was left to the true derivative for want of understanding."""
        return not self.unknown

    def __str__(self) -> str:
        parts = [
            f"{title} {_counts(operations)}"
            for title, operations in (
                ("rule:", self.rule),
                ("derivative:", self.derivative),
                ("UNKNOWN:", self.unknown),
            )
            if operations
        ] or ["black box, no gradient" if self.black_box else "plain gradient, no rule"]
        return "; ".join(parts + ([f"RANDOM: {_counts(self.random)}"] if self.random else []))


def _counts(operations: Iterable[Operated]) -> str:
    counts: dict[str, int] = {}
    for operated in operations:
        counts[operated.operation] = counts.get(operated.operation, 0) + 1
    return ", ".join(f"{count} {name}" for name, count in counts.items())


@dataclass(frozen=True)
class Provenance:
    """What maps depend on beside the model, the images, the target, the method and its options.

    Attributes:
        seed: of the call, or one for each image.
        precision: dtype of automatic mixed precision, or None.
        channels_last: whether passes over many images ran in this memory format.
    """

    seed: int | Sequence[int] = 0
    precision: torch.dtype | None = None
    channels_last: bool = True


@dataclass(frozen=True, eq=False)
class Attribution:
    """The maps of one method.

    Attributes:
        method: registry name.
        values: [N, C, H, W], or [N, 1, H, W] for methods without channels, or [N, K, C, H, W] for K targets at once;
            raw and (unless the method says otherwise) signed: positive supports the target.
        target: class indices [N], or [N, K]; None if the target is a function.
        score: what is explained, in units of the model's output, [N] or [N, K].
        options: the method's options as they were used.
        coverage: how the model's non-linear operations were treated.
        expected: what the values of each map should sum to, [N] or [N, K], for methods that promise a sum (the score's
            difference from the baseline, the score itself); None for the others.
        gap: `values.sum() - expected` per map.
        relative_gap: `|gap| / |expected|`.
        details: what else the method has to tell.
        reduction: how the channels of `values` become one map for the eye.
        units: units of `values` in words.
        provenance: how the call made them.
    """

    method: str
    values: Tensor
    target: Tensor | None
    score: Tensor
    options: Mapping[str, Any]
    coverage: Coverage
    gap: Tensor | None = None
    relative_gap: Tensor | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    reduction: ChannelReduction = "sum"
    units: str = ""
    expected: Tensor | None = None
    provenance: Provenance = Provenance()

    def __len__(self) -> int:
        return len(self.values)

    def heatmap(self, reduction: ChannelReduction | None = None) -> Tensor:
        """One map per image (and target): the channels summed, or their largest value, [N, H, W] or [N, K, H, W]."""
        channel = 2 if self.score.dim() == 2 else 1
        if self.values.dim() <= channel + 1:  # vectors [N, D] have features, no channels
            return self.values
        reduction = reduction or self.reduction
        return self.values.sum(channel) if reduction == "sum" else self.values.amax(channel)

    def __repr__(self) -> str:
        gap = "" if self.relative_gap is None else f", largest relative gap {_largest(self.relative_gap)}"
        return f"<Attribution {self.method} {list(self.values.shape)} {self.values.dtype}{gap}; {self.coverage}>"


def _largest(values: Tensor) -> str:
    return "unknown" if values.is_meta else f"{torch.nan_to_num(values, nan=float('inf')).max().item():.1e}"
