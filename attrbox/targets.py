"""What is explained: one score per sample, or K of them.

    None                     the class with the largest output (argmax), per sample
    3                        class 3 of every sample
    [3, 5, 3]                one class per sample
    classes([3, 5])          K classes of every sample; classes([[3, 5], [1, 2]]) K classes per sample
    top(3)                   the K classes with the largest outputs, per sample
    function                 outputs -> [N] (or [N, K]) scores; gets what the model returned, unwrapped

Scores are what the model returns (logits, usually; put no softmax behind the model), so attributions are in
units of the logit. Methods that perturb images may score the classes otherwise (UNITS), where they were published so.
`unwrap` finds the tensor in `.logits`, a dictionary or a tuple.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from attrbox.errors import ModelError, OptionError, TargetError

# What a class scores: the model's output, its lead over the best other class, its softmax, the logarithm of that.
UNITS = ("logit", "contrast", "prob", "log_prob")


@dataclass(frozen=True)
class classes:  # noqa: N801 - reads as a word in target=classes([1, 2])
    """K classes at once: `indices` is [K] (the same for every sample) or [N, K]."""

    indices: Any


@dataclass(frozen=True)
class top:  # noqa: N801 - reads as a word in target=top(3)
    """The `count` classes with the largest outputs of each sample, largest first."""

    count: int


TargetLike: TypeAlias = "int | Sequence[int] | Tensor | classes | top | Callable[[Tensor], Tensor] | None"


def unwrap(output: Any) -> Tensor:
    """The tensor of class scores in what a model returned: itself, `.logits`, "logits" or "out", or the first item.

    Raises:
        ModelError: no floating-point tensor is found.
    """
    found = output
    if not isinstance(found, Tensor):
        if isinstance(getattr(output, "logits", None), Tensor):
            found = output.logits
        elif isinstance(output, Mapping):
            tensors = [value for value in output.values() if isinstance(value, Tensor)]
            found = next((output[key] for key in ("logits", "out") if key in output), None)
            if found is None and len(tensors) == 1:
                found = tensors[0]
        elif isinstance(output, Sequence) and output:
            found = output[0]
    if not isinstance(found, Tensor) or not found.is_floating_point():
        what = f"a tensor of {found.dtype}" if isinstance(found, Tensor) else f"{type(output).__name__}"
        raise ModelError(
            f"Expected the model to return a floating-point tensor of scores (or an object with .logits, a dictionary "
            f"with 'logits', or a tuple that begins with it), got {what}. Wrap the model so that it does."
        )
    return found


class Target:
    """A target, checked against the number of samples and ready to be cut into chunks.

    `resolve(outputs, rows)` turns it into class indices for the samples `rows`; `score(outputs, indices)` picks
    them. Both work for repeated samples too (paths and noise), as the indices travel with the sample.
    """

    def __init__(self, target: "TargetLike | Target", samples: int) -> None:
        self.samples = samples
        self.many = False
        self.count: int | None = None
        self.function: Callable[[Tensor], Tensor] | None = None
        self.indices: Tensor | None = None  # [1 or N, K]
        if isinstance(target, Target):
            self.__dict__.update(target.__dict__)
        elif isinstance(target, top):
            if not isinstance(target.count, int) or isinstance(target.count, bool) or target.count < 1:
                raise TargetError(f"Expected top(K) with a whole number K >= 1, got {target.count!r}.")
            self.many, self.count = True, target.count
        elif isinstance(target, classes):
            self.many = True
            indices = _whole_numbers(target.indices)
            if indices.dim() not in (1, 2) or indices.numel() == 0:
                raise TargetError(f"Expected classes of shape [K] or [N, K], got {list(indices.shape)}.")
            self.indices = indices if indices.dim() == 2 else indices[None]
        elif target is None:
            self.count = 1
        elif callable(target):
            self.function = target
        else:
            indices = _whole_numbers(target)
            if indices.dim() > 1:
                raise TargetError(
                    f"Expected one class index or one per sample, got indices of shape {list(indices.shape)}. "
                    "For several classes at once use attrbox.classes(...)."
                )
            self.indices = indices.reshape(-1, 1)
            if indices.dim() == 1 and len(indices) != samples:
                raise TargetError(f"Expected one target per sample, {samples} in all, got {len(indices)}.")
        if self.indices is not None and len(self.indices) not in (1, samples):
            raise TargetError(f"Expected classes for {samples} samples, got {len(self.indices)} rows.")

    def resolve(self, outputs: Tensor, rows: slice) -> Tensor | None:
        """Class indices [n, K] of the samples `rows`, whose model outputs are `outputs` [n, ...]; None for a function.

        Raises:
            TargetError: an index is outside of the outputs, or the outputs are not [n, classes].
        """
        if self.function is not None:
            return None
        table = _table(outputs)
        available = table.shape[1]
        if self.indices is None:
            assert self.count is not None
            if self.count > available:
                raise TargetError(f"Expected top(K) with K <= {available}, the model's outputs, got {self.count}.")
            return table.detach().topk(self.count, dim=1).indices if self.many else table.detach().argmax(1, True)
        bad = self.indices[(self.indices < 0) | (self.indices >= available)]
        if bad.numel():
            raise TargetError(
                f"Expected class indices from 0 to {available - 1} (the model returns {available} scores), "
                f"got {bad.flatten().tolist()[:5]}."
            )
        chosen = self.indices if len(self.indices) == 1 else self.indices[rows]
        return chosen.to(outputs.device).expand(len(outputs), -1)

    def unit(self, asked: str | None, published: str) -> str:
        """The unit that was asked for; if none was, the published one for classes, and "logit" for a function."""
        return asked or (published if self.function is None else "logit")

    def score(self, outputs: Tensor, indices: Tensor | None, unit: str = "logit") -> Tensor:
        """The explained scores, [n, K], in one of UNITS.

        Raises:
            TargetError: a target function returned something else than [n] or [n, K] scores, or the outputs are of
                one class where the unit compares classes.
            OptionError: another unit than "logit" for a target function.
        """
        if self.function is None:
            assert indices is not None
            return _in_unit(_table(outputs), indices, unit)
        if unit != "logit":
            raise OptionError(
                f"score={unit!r} needs class indices as the target, got a function. Use score='logit', which takes "
                "what the function returns."
            )
        scores = self.function(outputs)
        if not isinstance(scores, Tensor) or scores.dim() not in (1, 2) or len(scores) != len(outputs):
            came = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise TargetError(
                f"Expected the target function to return {len(outputs)} scores, [N] or [N, K], got {came}."
            )
        return scores if scores.dim() == 2 else scores[:, None]


def _in_unit(table: Tensor, indices: Tensor, unit: str) -> Tensor:
    """The scores of the classes `indices`, [n, K], of outputs [n, classes]."""
    if unit == "logit":
        return table.gather(1, indices)
    if table.shape[1] == 1:
        raise TargetError(
            f"score={unit!r} compares classes, but the model returns one score per sample. Use score='logit'."
        )
    if unit == "contrast":
        best = table.topk(2, dim=1)
        others = torch.where(indices == best.indices[:, :1], best.values[:, 1:], best.values[:, :1])
        return table.gather(1, indices) - others
    log_prob = table.log_softmax(1).gather(1, indices)
    return log_prob.exp() if unit == "prob" else log_prob


def _table(outputs: Tensor) -> Tensor:
    """Outputs as [n, classes]; a model with one score per sample may return [n]."""
    if outputs.dim() == 1:
        return outputs[:, None]
    if outputs.dim() != 2 or outputs.shape[1] == 0:
        raise TargetError(
            f"Expected the model to return [N, classes], got {list(outputs.shape)}. Give a function as the target that "
            "turns it into one score per sample, for instance target=lambda out: out[:, 3].mean((1, 2))."
        )
    return outputs


def _whole_numbers(target: Any) -> Tensor:
    if isinstance(target, Tensor):
        if target.is_floating_point() or target.is_complex() or target.dtype is torch.bool:
            raise TargetError(f"Expected class indices as whole numbers, got a tensor of {target.dtype}.")
        numbers = target.detach().to("cpu", torch.int64)
        return numbers.clone() if numbers.is_inference() else numbers
    try:
        if isinstance(target, bool | str | float):
            raise TypeError
        if isinstance(target, Sequence) or getattr(target, "ndim", 0) > 0:  # a list, or an array of numpy
            rows = [_whole_numbers(item) for item in target]
            return torch.stack(rows) if rows else torch.zeros(0, dtype=torch.int64, device="cpu")
        return torch.tensor(operator.index(target), device="cpu")
    except (TypeError, RuntimeError):
        raise TargetError(
            "Expected a class index, one per sample, attrbox.classes(...), attrbox.top(K), a function or None, "
            f"got {target!r}."
        ) from None
