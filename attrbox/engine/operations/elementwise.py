"""Readers of operations that act element by element: activations, and other functions of one number."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attrbox.engine.operations.calls import (
    Function,
    Operation,
    Reader,
    alone,
    argument,
    is_activation,
    split,
    writes_in_place,
)
from attrbox.engine.site import FunctionInfo, Gradients, Site, SiteInfo

aten: Any = torch.ops.aten


@dataclass(frozen=True)
class Unary:
    """Reads calls with one activation.

    Attributes:
        kind: of the site.
        inplace: position of that argument after the input.
        pull: the true gradient, and what it reads.
        floor: a number that no output is below, whatever the arguments.
    """

    kind: str
    inplace: int | None = None
    pull: Callable[[Site, Tensor], Gradients] | None = None
    pulls_from: str = "output"
    floor: float = -torch.inf

    def __call__(self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operation | None:
        taken = alone(function, args, kwargs)
        if taken is None:
            return None
        input, rest, kwargs = taken

        def run(x: Tensor) -> Any:
            return function(x, *rest, **kwargs)

        reading = self.read(rest, kwargs)
        writes = writes_in_place(function, rest, kwargs, self.inplace)
        pure = (reading.fresh or (lambda x: run(x.clone()))) if writes else run
        floor = max(self.floor, reading.floor)
        return Operation(reading.kind, (input,), run, pure, writes, reading.pull, self.pulls_from, reading.info, floor)

    def read(self, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> "Reading":
        return Reading(self.kind, self.pull)


@dataclass(frozen=True)
class Reading:
    """What the arguments of a call tell. `fresh` spares an in-place call's pure form the copy of its input."""

    kind: str
    pull: Callable[[Site, Tensor], Gradients] | None = None
    info: SiteInfo = FunctionInfo()
    fresh: Callable[[Tensor], Tensor] | None = None
    floor: float = -torch.inf


class _Hardtanh(Unary):
    """hardtanh(0, 6) is relu6, a rectifier; from -1 to 1 it squashes."""

    def read(self, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Reading:
        low = argument(rest, kwargs, 0, "min_val", -1.0)
        high = argument(rest, kwargs, 1, "max_val", 1.0)
        return _straight(low, high)


class _Relu6(Unary):
    def read(self, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Reading:
        return _straight(0.0, 6.0)


def _straight(low: float, high: float) -> Reading:
    # Strictly between the bounds the output is the input, so the output alone decides the gradient.
    def pull(site: Site, grad_output: Tensor) -> Any:
        return aten.hardtanh_backward(grad_output, site.output, low, high)

    kind = "relu6" if low == 0 else "hardtanh"
    return Reading(kind, pull, FunctionInfo((low, high)), lambda x: F.hardtanh(x, low, high), low)


class _Clamp(Unary):
    """clamp(min=0) is one more way to write a ReLU; other bounds make a hardtanh."""

    def read(self, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Reading:
        low = argument(rest, kwargs, 0, "min", None)
        high = argument(rest, kwargs, 1, "max", None)
        if isinstance(low, Tensor) or isinstance(high, Tensor):
            return Reading("hardtanh")
        return _clipped(-torch.inf if low is None else low, torch.inf if high is None else high)


def _clipped(low: float, high: float) -> Reading:
    if low > high:  # all outputs are `high`
        return Reading("hardtanh", floor=high)
    kind = "hardtanh" if low != 0 else "relu" if high == torch.inf else "relu6"
    return Reading(kind, info=FunctionInfo((low, high)), floor=low)


class _ClampMax(Unary):
    def read(self, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Reading:
        high = argument(rest, kwargs, 0, "max", None)
        return Reading("hardtanh") if isinstance(high, Tensor) else _clipped(-torch.inf, high)


class _Threshold(Unary):
    """x above a threshold, a value elsewhere; if the two are one number, a clamp."""

    def read(self, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Reading:
        least = argument(rest, kwargs, 0, "threshold", None)
        value = argument(rest, kwargs, 1, "value", None)
        return _clipped(least, torch.inf) if least == value else Reading(self.kind, floor=min(least, value))


class _LeakyRelu(Unary):
    def read(self, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Reading:
        slope = argument(rest, kwargs, 0, "negative_slope", 0.01)
        if slope <= 0:
            return Reading(self.kind, floor=0.0)
        return Reading(self.kind, lambda site, grad: aten.leaky_relu_backward(grad, site.output, slope, True))


class _RandomLeakyRelu(Unary):
    """In evaluation a leaky ReLU of the mean slope; in training its slopes are drawn, and it is left to autograd."""

    def __call__(self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operation | None:
        return None if argument(args, kwargs, 3, "training", False) else super().__call__(function, args, kwargs)


class _Relu(Unary):
    def read(self, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Reading:
        return Reading("relu", _relu_pull, FunctionInfo((0.0, torch.inf)), torch.relu, 0.0)


class _Softplus(Unary):
    """log(1 + exp(beta x)) / beta, or x where beta x is above a threshold."""

    def read(self, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Reading:
        usual = argument(rest, kwargs, 0, "beta", 1) > 0 and argument(rest, kwargs, 1, "threshold", 20) >= 0
        return Reading(self.kind, floor=0.0 if usual else -torch.inf)


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


def _power(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operation | None:
    """x ** p of a constant p is a power, p ** x an exponential; both are activations: not understood."""
    base, rest, others = split(args, kwargs)
    exponent = argument(rest, others, 0, "exponent", argument(rest, others, 0, "other", None))
    if function in (Tensor.__rpow__,):
        base, exponent = exponent, base
    if is_activation(base) == is_activation(exponent):
        return None
    x, constant = (base, exponent) if is_activation(base) else (exponent, base)
    if isinstance(constant, Tensor) and constant.numel() > 1 and constant.shape != x.shape:
        return None
    number = None if isinstance(constant, Tensor) else constant
    if x is exponent:
        above = number is not None and number >= 0

        def raised(x: Tensor) -> Tensor:
            return torch.pow(constant, x)

        return Operation("exp", (x,), raised, raised, info=FunctionInfo(), floor=0.0 if above else -torch.inf)
    # An even power is never negative; one that is no whole number is not defined below 0.
    above = number is not None and (number % 2 == 0 or not float(number).is_integer())
    return Operation(
        "power",
        (x,),
        lambda x: function(x, *rest, **others),
        lambda x: torch.pow(x, constant),
        writes_in_place(function, rest, others),
        info=FunctionInfo(),
        floor=0.0 if above else -torch.inf,
    )


def spellings(*names: str) -> tuple[Function, ...]:
    """The functions of these names in torch, torch.nn.functional and among the methods of a tensor, in place too."""
    places = (torch, F, Tensor, torch.special, torch._C._nn)
    found = (getattr(place, name + mark, None) for name in names for place in places for mark in ("", "_"))
    return tuple(function for function in found if callable(function))


def _input(input: Tensor, exponent: float) -> tuple[Tensor]:
    return (input,)


@torch.overrides.wrap_torch_function(_input)
def root(input: Tensor, exponent: float) -> Tensor:
    """A power between 0 and 1 whose slope at 0 is 0 instead of infinite.

    So torch defines its deviation and its power pools. To the recorder this is an operation like torch's own.
    """
    return (input.sign() * input.abs().relu()).pow(exponent)


READERS: dict[Reader, tuple[Function, ...]] = {
    _Relu("relu", 0): spellings("relu"),
    _Clamp("hardtanh"): spellings("clamp", "clip", "clamp_min"),
    _ClampMax("hardtanh"): spellings("clamp_max"),
    _Hardtanh("hardtanh", 2): spellings("hardtanh"),
    _Relu6("relu6", 0): spellings("relu6"),
    _LeakyRelu("leaky_relu", 1): spellings("leaky_relu"),
    _RandomLeakyRelu("leaky_relu", 3): spellings("rrelu"),
    Unary("prelu"): spellings("prelu"),
    Unary("elu", 1): spellings("elu"),
    Unary("selu", 0): spellings("selu"),
    Unary("celu", 1): spellings("celu"),
    _Softplus("softplus"): spellings("softplus"),
    Unary("gelu"): spellings("gelu"),
    Unary("silu", 0): spellings("silu"),
    Unary("hardswish", 0): spellings("hardswish"),
    Unary("mish", 0): spellings("mish"),
    Unary("hardsigmoid", 0, _hardsigmoid_pull, "input", 0.0): spellings("hardsigmoid"),
    Unary("sigmoid", pull=_sigmoid_pull, floor=0.0): spellings("sigmoid", "expit"),
    Unary("tanh", pull=_tanh_pull): spellings("tanh"),
    Unary("abs", floor=0.0): (*spellings("abs", "absolute"), Tensor.__abs__),
    Unary("exp", floor=0.0): spellings("exp", "exp2"),
    Unary("exp", floor=-1.0): spellings("expm1"),
    Unary("log"): spellings("log", "log2", "log10", "log1p"),
    Unary("power", floor=0.0): (*spellings("sqrt", "rsqrt", "square"), root),
    Unary("power"): spellings("reciprocal"),
    Unary("erf"): spellings("erf"),
    Unary("sin"): spellings("sin"),
    Unary("cos"): spellings("cos"),
    Unary("logsigmoid"): spellings("logsigmoid", "log_sigmoid"),
    Unary("softshrink"): spellings("softshrink"),
    Unary("hardshrink"): spellings("hardshrink"),
    _Threshold("threshold", 2): spellings("threshold"),
    _power: (*spellings("pow", "float_power"), Tensor.__pow__, Tensor.__ipow__, Tensor.__rpow__),
}
