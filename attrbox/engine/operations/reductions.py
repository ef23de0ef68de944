"""Readers of operations along axes: softmaxes, largest values, and norms."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attrbox.engine.operations.calls import Function, Operation, Reader, alone, argument, is_activation, split
from attrbox.engine.operations.elementwise import Reading, Unary, spellings
from attrbox.engine.site import AxesInfo, NormInfo, PoolInfo


class _Softmax(Unary):
    def read(self, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Reading:
        return Reading(self.kind, info=AxesInfo(argument(rest, kwargs, 0, "dim", None)))

    def __call__(self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operation | None:
        operation = super().__call__(function, args, kwargs)
        # Without `dim`, F.softmax guesses it and warns: left to the true derivative, and named in the coverage.
        info = operation.info if operation else None
        return operation if isinstance(info, AxesInfo) and info.dim is not None else None


class _Reduction(_Softmax):
    """Of the axes `dim`, kept (`keepdim`) or not."""

    position = 0

    def read(self, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Reading:
        dim = argument(rest, kwargs, self.position, "dim", None)
        keepdim = argument(rest, kwargs, self.position + 1, "keepdim", False)
        return Reading(self.kind, info=AxesInfo(dim, keepdim))


class _VectorNorm(_Reduction):
    """The square root of a sum of squares; other norms are not understood."""

    position = 1

    def __call__(self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operation | None:
        order = argument(args, kwargs, 1, "ord", 2)
        return super().__call__(function, args, kwargs) if order == 2 else None


@dataclass(frozen=True)
class _MaxPool:
    """Reads calls of a max-pool. `indices` is the spelling that returns the winners' positions too."""

    dims: int
    indices: Function
    returns: int  # position of `return_indices` after the input, in the functional spelling
    by_row = False

    def __call__(self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operation | None:
        input, rest, kwargs = split(args, kwargs)
        if not is_activation(input) or input.dim() not in (self.dims + 1, self.dims + 2):  # without a batch axis, too
            return None
        plain = {key: value for key, value in kwargs.items() if key != "return_indices"}
        positional = rest[: self.returns]

        def run(x: Tensor) -> Any:
            return function(x, *rest, **kwargs)

        def pool(x: Tensor) -> Any:
            return self.indices(x, *positional, **plain, return_indices=True)

        return Operation("max_pool", (input,), run, lambda x: pool(x)[0], info=PoolInfo(pool, self.dims, self.by_row))


class _FractionalMaxPool(_MaxPool):
    """Windows drawn beforehand, [N, C, dims] numbers, so that a reference needs as many rows as the images."""

    by_row = True

    def __call__(self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operation | None:
        drawn_anew = kwargs.get("_random_samples") is None  # in each pass: the recorder refuses it
        return None if drawn_anew else super().__call__(function, args, kwargs)


def _amax(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operation | None:
    """The largest value along the last axis, which is kept: a max-pool of one window (other axes are moved there)."""
    taken = alone(function, args, kwargs)
    if taken is None or taken[1:] != ((), {"dim": -1, "keepdim": True}):
        return None

    def run(x: Tensor) -> Tensor:
        return torch.amax(x, dim=-1, keepdim=True)

    def pool(x: Tensor) -> Any:
        return x.max(-1, keepdim=True)

    return Operation("max_pool", (taken[0],), run, run, info=PoolInfo(pool, 1))


# ---------------------------------------------------------------------------------------------------------- norms


def _norm(sizes: Callable[[Tensor, Any], int], eps: int, centered: bool = True, channels: bool = True) -> Reader:
    """Reads calls of a norm over groups of neighbouring elements.

    Args:
        sizes: input, argument behind it -> elements in each group.
        eps: position of that argument after the input; the weight is two places before a bias, three else.
        centered: whether the mean is subtracted.
        channels: whether weights belong to the channels, or to the last axes.
    """

    def read(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operation | None:
        taken = alone(function, args, kwargs)
        if taken is None:
            return None
        input, rest, kwargs = taken
        if function is F.instance_norm and not argument(rest, kwargs, 4, "use_input_stats", True):
            return None
        place = 2 if function is F.instance_norm else 1
        weight = argument(rest, kwargs, place, "weight", None)
        if weight is not None and channels:
            weight = weight.view(-1, *(1,) * (input.dim() - 2))
        groups = rest[0] if rest else kwargs.get("num_groups", kwargs.get("normalized_shape"))
        tiny = argument(rest, kwargs, eps, "eps", 1e-5 if centered else None)

        def run(x: Tensor) -> Any:
            return function(x, *rest, **kwargs)

        tiny = torch.finfo(input.dtype).eps if tiny is None else tiny
        return Operation("norm", (input,), run, run, info=NormInfo(sizes(input, groups), weight, centered, tiny))

    return read


def _last_axes(x: Tensor, shape: Any) -> int:
    return torch.Size(shape).numel()


def _channel_groups(x: Tensor, groups: Any) -> int:
    return x[0].numel() // int(groups)


def _planes(x: Tensor, groups: Any) -> int:
    return x[0, 0].numel()


READERS: dict[Reader, tuple[Function, ...]] = {
    _Softmax("softmax", floor=0.0): spellings("softmax"),
    _Softmax("log_softmax"): spellings("log_softmax"),
    _Reduction("logsumexp"): spellings("logsumexp"),
    _VectorNorm("vector_norm", floor=0.0): (torch.linalg.vector_norm,),
    _amax: spellings("amax"),
    _MaxPool(1, F.max_pool1d_with_indices, 5): (F.max_pool1d, F.max_pool1d_with_indices, torch.max_pool1d),
    _MaxPool(2, F.max_pool2d_with_indices, 5): (F.max_pool2d, F.max_pool2d_with_indices, torch.max_pool2d),
    _MaxPool(3, F.max_pool3d_with_indices, 5): (F.max_pool3d, F.max_pool3d_with_indices, torch.max_pool3d),
    _MaxPool(1, F.adaptive_max_pool1d_with_indices, 1): (
        F.adaptive_max_pool1d,
        F.adaptive_max_pool1d_with_indices,
    ),
    _MaxPool(2, F.adaptive_max_pool2d_with_indices, 1): (
        F.adaptive_max_pool2d,
        F.adaptive_max_pool2d_with_indices,
    ),
    _MaxPool(3, F.adaptive_max_pool3d_with_indices, 1): (
        F.adaptive_max_pool3d,
        F.adaptive_max_pool3d_with_indices,
    ),
    _FractionalMaxPool(2, F.fractional_max_pool2d_with_indices, 3): (
        F.fractional_max_pool2d,
        F.fractional_max_pool2d_with_indices,
    ),
    _FractionalMaxPool(3, F.fractional_max_pool3d_with_indices, 3): (
        F.fractional_max_pool3d,
        F.fractional_max_pool3d_with_indices,
    ),
    _norm(_last_axes, 3, channels=False): (F.layer_norm, torch.layer_norm),
    _norm(_channel_groups, 3): (F.group_norm, torch.group_norm),
    _norm(_planes, 6): (F.instance_norm,),
    _norm(_last_axes, 2, centered=False, channels=False): (F.rms_norm, torch.rms_norm),
}
