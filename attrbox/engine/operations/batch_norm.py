"""Calls of batch-norm, however they are spelled: the one place that knows the order of their arguments.

With running statistics a batch-norm is a fixed scale and shift of each channel, and so is an instance norm with them:

    y = s x + t,     s = weight / sqrt(variance + eps),     t = bias - mean s
"""

from dataclasses import dataclass
from functools import cached_property
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

    @cached_property
    def affine(self) -> tuple[Tensor, Tensor] | None:
        """Scale and shift, [C]; None with statistics of the batch."""
        if self.trains or self.mean is None or self.variance is None:
            return None
        scale = torch.rsqrt(self.variance + self.eps)
        scale = scale if self.weight is None else scale * self.weight
        shift = -self.mean * scale
        return scale, shift if self.bias is None else shift + self.bias

    def joined(self, weight: Tensor, bias: Tensor | None, groups: int = 0) -> tuple[Tensor, Tensor]:
        """Weight and bias of a layer together with the batch-norm behind it, w s and b s + t.

        Args:
            weight, bias: of the layer.
            groups: of a transposed convolution, whose weight is [inputs, C / groups, ...]; 0 for others, [C, ...].
        """
        assert self.affine is not None
        scale, shift = self.affine
        return scaled(weight, scale, groups), shift if bias is None else bias * scale + shift

    @property
    def linear(self) -> bool:
        """Whether it is linear in what depends on the images (torch differentiates no running statistics)."""
        return not self.trains and not (is_activation(self.input) and is_activation(self.weight))

    @property
    def constant(self) -> bool:
        """Whether scale and shift do not depend on the images."""
        return not (is_activation(self.weight) or is_activation(self.bias))


def scaled(weight: Tensor, scale: Tensor, groups: int = 0) -> Tensor:
    """Weights with each output scaled by s [C]; of the groups of a transposed convolution, if there are any."""
    if not groups:
        return weight * scale.view(-1, *(1,) * (weight.dim() - 1))
    by_group = weight.view(groups, -1, *weight.shape[1:]) * scale.view(groups, 1, -1, *(1,) * (weight.dim() - 2))
    return by_group.flatten(0, 1)


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
