"""The table of operations: which torch functions are sites, and how to call them.

Every spelling of an operation is one entry: functional, method, in place; modules end up in one of these.
`interpret` turns an intercepted call into an `Operation`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attrbox.engine.linearity import argument, is_activation
from attrbox.engine.site import GATES, Gradients, Site

Function = Callable[..., Any]
aten: Any = torch.ops.aten


@dataclass(frozen=True)
class Operation:
    """One intercepted call: `run` does what the caller asked for, `pure` the same without side effects."""

    kind: str
    inputs: tuple[Tensor, ...]
    run: Function
    pure: Callable[..., Tensor]
    in_place: bool = False
    pull: Callable[[Site, Tensor], Gradients] | None = None  # true gradient without running `pure` again
    pulls_from: str = "output"  # what `pull` reads
    options: dict[str, Any] = field(default_factory=dict)


def interpret(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operation | None:
    """The operation behind an intercepted call, or None if it is not in the table or touches no activation."""
    reader = _TABLE.get(function)
    return None if reader is None else reader(function, args, kwargs)


# ---------------------------------------------------------------------------------------------------- one input


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """(input, other positional arguments, other keyword arguments)."""
    if args:
        return args[0], args[1:], kwargs
    rest = dict(kwargs)
    first = next((rest.pop(key) for key in ("input", "self") if key in rest), None)
    return first, (), rest


def _in_place(function: Function, rest: tuple[Any, ...], kwargs: dict[str, Any], position: int | None) -> bool:
    name = function.__name__
    if (name.endswith("_") and not name.endswith("__")) or name.startswith("__i"):
        return True
    return position is not None and bool(argument(rest, kwargs, position, "inplace", False))


@dataclass(frozen=True)
class _Unary:
    """Reads calls of an element-wise operation. `inplace` is the position of that argument after the input."""

    kind: str
    inplace: int | None = None
    pull: Callable[[Site, Tensor], Gradients] | None = None
    pulls_from: str = "output"

    def __call__(self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operation | None:
        input, rest, kwargs = _split(args, kwargs)
        if not is_activation(input) or any(is_activation(value) for value in (*rest, *kwargs.values())):
            return None

        def run(x: Tensor) -> Any:
            return function(x, *rest, **kwargs)

        reading = self.read(rest, kwargs)
        writes = _in_place(function, rest, kwargs, self.inplace)
        pure = (reading.fresh or (lambda x: run(x.clone()))) if writes else run
        return Operation(reading.kind, (input,), run, pure, writes, reading.pull, self.pulls_from, reading.options)

    def read(self, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> "_Reading":
        return _Reading(self.kind, self.pull)


@dataclass(frozen=True)
class _Reading:
    """What the arguments of a call tell. `fresh` spares an in-place call's pure form the copy of its input."""

    kind: str
    pull: Callable[[Site, Tensor], Gradients] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    fresh: Callable[[Tensor], Tensor] | None = None


class _Hardtanh(_Unary):
    """hardtanh(0, 6) is relu6, a rectifier; from -1 to 1 it squashes."""

    def read(self, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> _Reading:
        low = argument(rest, kwargs, 0, "min_val", -1.0)
        high = argument(rest, kwargs, 1, "max_val", 1.0)
        return _straight(low, high)


class _Relu6(_Unary):
    def read(self, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> _Reading:
        return _straight(0.0, 6.0)


def _straight(low: float, high: float) -> _Reading:
    # Strictly between the bounds the output is the input, so the output alone decides the gradient.
    def pull(site: Site, grad_output: Tensor) -> Any:
        return aten.hardtanh_backward(grad_output, site.output, low, high)

    return _Reading(
        "relu6" if low == 0 else "hardtanh", pull, {"bounds": (low, high)}, lambda x: F.hardtanh(x, low, high)
    )


class _Clamp(_Unary):
    """clamp(min=0) is one more way to write a ReLU; other bounds make a hardtanh."""

    def read(self, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> _Reading:
        low = argument(rest, kwargs, 0, "min", None)
        high = argument(rest, kwargs, 1, "max", None)
        if isinstance(low, Tensor) or isinstance(high, Tensor):
            return _Reading("hardtanh")
        low, high = -torch.inf if low is None else low, torch.inf if high is None else high
        kind = "hardtanh" if low != 0 else "relu" if high == torch.inf else "relu6"
        return _Reading(kind, options={"bounds": (low, high)})


class _LeakyRelu(_Unary):
    def read(self, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> _Reading:
        slope = argument(rest, kwargs, 0, "negative_slope", 0.01)
        if slope <= 0:
            return _Reading(self.kind)
        return _Reading(self.kind, lambda site, grad: aten.leaky_relu_backward(grad, site.output, slope, True))


class _Relu(_Unary):
    def read(self, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> _Reading:
        return _Reading("relu", _relu_pull, {"bounds": (0.0, torch.inf)}, torch.relu)


class _Softmax(_Unary):
    def read(self, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> _Reading:
        return _Reading("softmax", options={"dim": argument(rest, kwargs, 0, "dim", None)})

    def __call__(self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operation | None:
        operation = super().__call__(function, args, kwargs)
        # Without `dim`, F.softmax guesses it and warns: left to the true derivative, and named in the coverage.
        return operation if operation and operation.options["dim"] is not None else None


# The output alone decides these gradients, so an in-place call keeps no copy of its input.
def _relu_pull(site: Site, grad_output: Tensor) -> Any:
    return aten.threshold_backward(grad_output, site.output, 0)


def _sigmoid_pull(site: Site, grad_output: Tensor) -> Any:
    return aten.sigmoid_backward(grad_output, site.output)


def _hardsigmoid_pull(site: Site, grad_output: Tensor) -> Any:
    # torch cannot differentiate hardsigmoid_backward. Its slope is constant by pieces, so only the gradient matters.
    return grad_output * aten.hardsigmoid_backward(torch.ones_like(grad_output), site.input.detach())


def _tanh_pull(site: Site, grad_output: Tensor) -> Any:
    return aten.tanh_backward(grad_output, site.output)


# ---------------------------------------------------------------------------------------------- pools, products


@dataclass(frozen=True)
class _MaxPool:
    """Reads calls of a max-pool. `indices` is the spelling that returns the winners' positions too."""

    dims: int
    indices: Function
    returns: int  # position of `return_indices` after the input, in the functional spelling

    def __call__(self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operation | None:
        input, rest, kwargs = _split(args, kwargs)
        if not is_activation(input) or input.dim() != self.dims + 2:
            return None
        plain = {key: value for key, value in kwargs.items() if key != "return_indices"}
        positional = rest[: self.returns]

        def run(x: Tensor) -> Any:
            return function(x, *rest, **kwargs)

        def pool(x: Tensor) -> Any:
            return self.indices(x, *positional, **plain, return_indices=True)

        return Operation("max_pool", (input,), run, lambda x: pool(x)[0], options={"pool": pool, "dims": self.dims})


def _product(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operation | None:
    first, rest, kwargs = _split(args, kwargs)
    second = argument(rest, kwargs, 0, "other", None)
    if not (is_activation(first) and is_activation(second)) or kwargs.get("out") is not None:
        return None
    gates = (_is_gate(first), _is_gate(second))
    writes = _in_place(function, rest, kwargs, None)
    return Operation("product", (first, second), function, torch.mul, writes, options={"gates": gates})


def _is_gate(factor: Tensor) -> bool:
    """Whether a sigmoid made the factor, recorded or native, up to changes of its shape."""
    node = factor.grad_fn
    while node is not None and type(node).__name__.rstrip("0123456789") in _RESHAPING:
        node = node.next_functions[0][0]
    site = getattr(node, "site", None)
    if isinstance(site, Site):
        return site.kind in GATES
    return type(node).__name__ in ("SigmoidBackward0", "HardsigmoidBackward0")


# Autograd's names of operations that change no value.
_RESHAPING = frozenset(
    f"{name}Backward"
    for name in "View UnsafeView ReshapeAlias Expand Unsqueeze Squeeze Permute Transpose T Clone Alias".split()
)


# ------------------------------------------------------------------------------------------------------- tables


def _table() -> dict[Function, Callable[..., Operation | None]]:
    table: dict[Function, Callable[..., Operation | None]] = {}

    def enter(reader: Callable[..., Operation | None], *spellings: Function) -> None:
        table.update(dict.fromkeys(spellings, reader))

    nn_ = torch._C._nn
    enter(_Relu("relu", 0), F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)
    enter(
        _Clamp("hardtanh"),
        torch.clamp,
        torch.clamp_,
        Tensor.clamp,
        Tensor.clamp_,
        torch.clip,
        torch.clip_,
        Tensor.clip,
        Tensor.clip_,
    )
    enter(_Clamp("hardtanh"), torch.clamp_min, torch.clamp_min_, Tensor.clamp_min, Tensor.clamp_min_)
    enter(_Hardtanh("hardtanh", 2), F.hardtanh, F.hardtanh_, nn_.hardtanh, nn_.hardtanh_)
    enter(_Relu6("relu6", 0), F.relu6)
    enter(_LeakyRelu("leaky_relu", 1), F.leaky_relu, F.leaky_relu_, nn_.leaky_relu, nn_.leaky_relu_)
    enter(_Unary("prelu"), torch.prelu, F.prelu, Tensor.prelu)
    enter(_Unary("elu", 1), F.elu, F.elu_, nn_.elu, nn_.elu_)
    enter(_Unary("selu", 0), F.selu, torch.selu, torch.selu_)
    enter(_Unary("celu", 1), F.celu, torch.celu, torch.celu_)
    enter(_Unary("softplus"), F.softplus, nn_.softplus)
    enter(_Unary("gelu"), F.gelu, nn_.gelu)
    enter(_Unary("silu", 0), F.silu, nn_.silu, nn_.silu_)
    enter(_Unary("hardswish", 0), F.hardswish, nn_.hardswish, nn_.hardswish_)
    enter(_Unary("mish", 0), F.mish, nn_.mish, nn_.mish_)
    enter(_Unary("hardsigmoid", 0, _hardsigmoid_pull, "input"), F.hardsigmoid, nn_.hardsigmoid, nn_.hardsigmoid_)
    enter(
        _Unary("sigmoid", pull=_sigmoid_pull),
        *(torch.sigmoid, torch.sigmoid_, Tensor.sigmoid, Tensor.sigmoid_, F.sigmoid),
        *(torch.special.expit,),
    )
    enter(_Unary("tanh", pull=_tanh_pull), torch.tanh, torch.tanh_, Tensor.tanh, Tensor.tanh_, F.tanh)
    enter(_Softmax("softmax"), F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax)
    enter(_MaxPool(1, F.max_pool1d_with_indices, 5), F.max_pool1d, F.max_pool1d_with_indices, torch.max_pool1d)
    enter(_MaxPool(2, F.max_pool2d_with_indices, 5), F.max_pool2d, F.max_pool2d_with_indices, torch.max_pool2d)
    enter(_MaxPool(3, F.max_pool3d_with_indices, 5), F.max_pool3d, F.max_pool3d_with_indices, torch.max_pool3d)
    for dims, plain, indices in (
        (1, F.adaptive_max_pool1d, F.adaptive_max_pool1d_with_indices),
        (2, F.adaptive_max_pool2d, F.adaptive_max_pool2d_with_indices),
        (3, F.adaptive_max_pool3d, F.adaptive_max_pool3d_with_indices),
    ):
        enter(_MaxPool(dims, indices, 1), plain, indices)
    enter(_product, torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__)
    enter(_product, Tensor.mul_, Tensor.multiply_, Tensor.__imul__)
    return table


_TABLE = _table()
