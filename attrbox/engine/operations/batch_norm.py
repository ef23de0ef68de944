"""Calls of batch-norm, however they are spelled: the one place that knows the order of their arguments.

With running statistics a batch-norm is a fixed scale and shift of each channel, and so is an instance norm with them:

    y = s x + t,     s = weight / sqrt(variance + eps),     t = bias - mean s
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attrbox.engine.operations.calls import Function, argument, is_activation

aten: Any = torch.ops.aten

# The names of the arguments behind the input.
_SPELLINGS: dict[Function, str] = {
    F.batch_norm: "running_mean running_var weight bias training momentum eps",
    F.instance_norm: "running_mean running_var weight bias use_input_stats momentum eps",
    torch.batch_norm: "weight bias running_mean running_var training momentum eps",
    torch.instance_norm: "weight bias running_mean running_var use_input_stats momentum eps",
    torch.native_batch_norm: "weight bias running_mean running_var training momentum eps",
    torch.cudnn_batch_norm: "weight bias running_mean running_var training exponential_average_factor epsilon",
    aten.batch_norm: "weight bias running_mean running_var training momentum eps",
    aten.native_batch_norm: "weight bias running_mean running_var training momentum eps",
    torch._native_batch_norm_legit_no_training: "weight bias running_mean running_var momentum eps",
    aten._native_batch_norm_legit_no_training: "weight bias running_mean running_var momentum eps",
}
SPELLINGS = frozenset(_SPELLINGS)


@dataclass(frozen=True, eq=False)
class BatchNorm:
    """The arguments of one call. `trains` says whether the statistics are those of the batch (or of each image)."""

    input: Tensor
    mean: Tensor | None
    variance: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    trains: bool

    @property
    def affine(self) -> tuple[Tensor, Tensor] | None:
        """Scale and shift, [C]; None with statistics of the batch."""
        if self.trains or self.mean is None or self.variance is None:
            return None
        scale = torch.rsqrt(self.variance + self.eps)
        scale = scale if self.weight is None else scale * self.weight
        shift = -self.mean * scale
        return scale, shift if self.bias is None else shift + self.bias

    @property
    def linear(self) -> bool:
        """Whether it is linear in what depends on the images (torch differentiates no running statistics)."""
        return not self.trains and not (is_activation(self.input) and is_activation(self.weight))

    @property
    def constant(self) -> bool:
        """Whether scale and shift do not depend on the images."""
        return not (is_activation(self.weight) or is_activation(self.bias))


def batch_norm_of(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> BatchNorm | None:
    """The arguments of a call of batch-norm, or of an instance norm with running statistics; None for other calls."""
    names = _SPELLINGS.get(function)
    if names is None:
        return None
    given = {name: argument(args, kwargs, place, name, None) for place, name in enumerate(["input", *names.split()])}
    if "use_input_stats" in given:
        trains = given["use_input_stats"] is None or bool(given["use_input_stats"])
        if trains:
            return None
    else:
        trains = bool(given.get("training"))
    eps = given.get("eps", given.get("epsilon"))
    return BatchNorm(
        input=given["input"],
        mean=given["running_mean"],
        variance=given["running_var"],
        weight=given["weight"],
        bias=given["bias"],
        eps=1e-5 if eps is None else eps,
        trains=trains,
    )
