"""What is explained: one score per sample, or K of them.

    None                     the class with the largest output (argmax), per sample
    3                        class 3 of every sample
    [3, 5, 3]                one class per sample
    classes([3, 5])          K classes of every sample; classes([[3, 5], [1, 2]]) K classes per sample
    top(3)                   the K classes with the largest outputs, per sample
    function                 output -> [N] (or [N, K]) scores; gets what the model returned, all of it

Scores are what the model returns (logits, usually; put no softmax behind the model), so attributions are in
units of the logit. Methods that perturb images may score the classes otherwise (UNITS), where they were published so.
Classes are counted in the tensor that `attrbox.core.outputs.unwrap` finds in `.logits`, a dictionary or a tuple. A
function takes what it wants by itself: `lambda out: out[:, 3]` of a tensor, `lambda out: out.logits[:, 3]`,
`lambda out: out["age"]`, `lambda out: out[1]` of a tuple.
"""

import contextlib
import operator
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from attrbox.core.memory import is_out_of_memory
from attrbox.core.outputs import Outputs, described, mapped, tensors
from attrbox.core.validation import dense
from attrbox.errors import AttrboxError, ModelError, OptionError, TargetError, shown

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


TargetLike: TypeAlias = "int | Sequence[int] | Tensor | classes | top | Callable[[Any], Tensor] | None"


class Target:
    """A target, checked against the number of samples and ready to be cut into chunks.

    `resolve(outputs, rows)` turns it into class indices for the samples `rows`; `score(outputs, indices)` picks
    them. Both work for repeated samples too (paths and noise), as the indices travel with the sample.
    """

    def __init__(self, target: "TargetLike | Target", samples: int) -> None:
        self.samples = samples
        self.many = False
        self.count: int | None = None
        self.function: Callable[[Any], Tensor] | None = None
        self.indices: Tensor | None = None  # [1 or N, K]
        self._checked = False  # whether the function was seen to keep images apart
        self._takes_scores = False  # whether the function wants the scores alone
        if isinstance(target, Target):
            self.__dict__.update(target.__dict__)
        elif isinstance(target, top):
            if not isinstance(target.count, int) or isinstance(target.count, bool) or target.count < 1:
                raise TargetError(f"Expected top(K) with a whole number K >= 1, got {shown(target.count)}.")
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

    def resolve(self, outputs: Outputs, rows: slice) -> Tensor | None:
        """Class indices [n, K] of the samples `rows`, whose model outputs are `outputs`; None for a function.

        Raises:
            ModelError: the model returned no scores, or not one row of them per image.
            TargetError: an index is outside of the outputs, the outputs are not [n, classes], or a function mixes
                images.
        """
        if self.function is not None:
            if not self._checked:
                self._check_images_apart(self._of_two(outputs) or outputs)
                self._checked = True
            return None
        table = _table(outputs.scores)
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
        return chosen.to(table.device).expand(len(table), -1)

    def check_rows(self, outputs: Outputs) -> None:
        """Raise unless there is one row of outputs, or one score of a function, for each image.

        Raises:
            ModelError, TargetError: there is not.
        """
        if self.function is None:
            outputs.scores  # noqa: B018 - it checks
        else:
            self.score(outputs, None)

    def unit(self, asked: str | None, published: str) -> str:
        """The unit that was asked for; if none was, the published one for classes, and "logit" for a function."""
        return asked or (published if self.function is None else "logit")

    def score(self, outputs: Outputs, indices: Tensor | None, unit: str = "logit") -> Tensor:
        """The explained scores, [n, K], in one of UNITS.

        Raises:
            ModelError: the model returned no scores, or not one row of them per image.
            TargetError: a target function raised, or returned something else than [n] or [n, K] scores, or the
                outputs are of one class where the unit compares classes.
            OptionError: another unit than "logit" for a target function.
        """
        if self.function is None:
            assert indices is not None
            return _in_unit(_table(outputs.scores), indices, unit)
        if unit != "logit":
            raise OptionError(
                f"score={unit!r} needs class indices as the target, got a function. Use score='logit', which takes "
                "what the function returns."
            )
        scores = self._called(self.function, outputs)
        real = isinstance(scores, Tensor) and scores.is_floating_point()
        if not isinstance(scores, Tensor) or not (real and scores.dim() in (1, 2) and len(scores) == outputs.count):
            came = f"{scores.dtype} {list(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
            raise TargetError(
                f"Expected the target function to return {outputs.count} scores, [N] or [N, K], as floating-point "
                f"numbers, got {came}. It got {described(outputs.batched)}."
            )
        return scores if scores.dim() == 2 else scores[:, None]

    def _called(self, function: Callable[[Any], Any], outputs: Outputs) -> Any:
        """What a target function returns for what the model returned.

        One that fails on a structure gets the scores in it, as functions did until version 0.1, with a warning.
        """
        if self._takes_scores:
            return function(outputs.scores.clone())
        given = mapped(outputs.batched, torch.clone)  # a copy, as the function may write into it
        try:
            return function(given)
        except AttrboxError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            found = None
            if isinstance(error, _OF_A_STRUCTURE) and not isinstance(given, Tensor):
                with contextlib.suppress(Exception):
                    found = function(outputs.scores.clone())
            if found is None:
                raise TargetError(
                    f"The target function raised {type(error).__name__}: {error}. It gets what the model returned: "
                    f"{described(given)}. Let it take one score per image out of that."
                ) from error
            warnings.warn(
                f"The target function raised {type(error).__name__} on what the model returned "
                f"({described(given)}), so it gets the scores in it alone, as before attrbox 0.2. Let the "
                "function take them out itself, for instance out.logits[:, 3] or out['out'][:, 3].",
                FutureWarning,
                stacklevel=2,
            )
            self._takes_scores = True
            return found

    def _of_two(self, outputs: Outputs) -> Outputs | None:
        """What the model returns for two copies of the one image, as one cannot be mixed with another.

        None for more images, and where the model or the function takes no two.
        """
        if outputs.count != 1 or outputs.doubled is None:
            return None
        try:
            pair = Outputs(outputs.doubled(), 2)
            with torch.no_grad():
                self.score(pair, None)
        except (ModelError, TargetError):
            return None
        return pair

    def _check_images_apart(self, outputs: Outputs) -> None:
        """Refuse a function whose score of one image depends on the outputs of another, or not on its own.

        The outputs of half of the images are spoilt at a time, so that every two images are told apart; scores that
        change should be those of these images.
        """
        if any(tensor.is_meta for tensor in tensors(outputs.batched)):
            return
        with torch.no_grad():
            scores = self.score(outputs, None)
            if not _same(scores, self.score(outputs, None)).all():
                raise TargetError("The target function returned other scores the second time for the same outputs.")
            count = outputs.count
            number = torch.arange(count, device=scores.device)
            halves = [number >> bit & 1 == half for bit in range((count - 1).bit_length()) for half in (0, 1)]
            own = ~scores.isfinite().all(1)  # nothing can be told of these; who asks for the scores refuses them
            for spoil in (lambda rows: rows * torch.nan, lambda rows: 2 * rows + 1e3, lambda rows: -2 * rows - 1e3):
                for half in halves or [number == 0]:
                    try:
                        changed = ~_same(scores, self._spoilt(outputs, half, spoil))
                    except TargetError:  # it refuses such numbers, so nothing can be told
                        own |= half
                        continue
                    if (changed & ~half).any():
                        self._refuse_mixing(outputs, int((changed & ~half).nonzero()[0]))
                    own |= changed
                if own.all():
                    return
        raise TargetError(
            f"The target function's score of image {int((~own).nonzero()[0])} of a batch of {count} does not depend on "
            f"what the model returned for it. It gets {described(outputs.batched)}; let it return one score per image."
        )

    def _spoilt(self, outputs: Outputs, chosen: Tensor, spoil: Callable[[Tensor], Tensor]) -> Tensor:
        """The scores where the outputs of some images are spoilt."""

        def change(tensor: Tensor) -> Tensor:
            if tensor.dim() == 0 or len(tensor) != outputs.count or not tensor.is_floating_point():
                return tensor
            rows = chosen.to(tensor.device).view(-1, *(1,) * (tensor.dim() - 1))
            return torch.where(rows, spoil(tensor), tensor)

        return self.score(Outputs(mapped(outputs.batched, change), outputs.count), None)

    def _refuse_mixing(self, outputs: Outputs, row: int) -> None:
        raise TargetError(
            f"The target function's score of image {row} of a batch of {outputs.count} depends on what the model "
            f"returned for other images, so there is no map of each. It gets {described(outputs.batched)}, the images "
            "along the first axis of each tensor; let it keep that axis, as in out[:, 3]."
        )


# What functions of a tensor raise on a tuple, a dictionary or an object.
_OF_A_STRUCTURE = (TypeError, KeyError, AttributeError)


def _same(first: Tensor, second: Tensor) -> Tensor:
    """Which images have equal scores, [n], within rounding; NaN equals NaN."""
    if first.shape != second.shape:
        return torch.zeros(len(first), dtype=torch.bool, device=first.device)
    return first.isclose(second, rtol=1e-3, atol=1e-6, equal_nan=True).all(1)


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
        numbers = dense(target, "class indices").detach().to("cpu", torch.int64)
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
            f"got {shown(target)}."
        ) from None
