"""The table of operations: which torch functions are sites, which are linear, and how to call them.

Every spelling of an operation is one entry: functional, method, in place; modules end up in one of these.
`interpret` turns an intercepted call into an `Operation`; `is_linear` says whether an operation that is not in the
table passes differences on unchanged, so that no rule needs to know it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

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


def is_activation(value: object) -> bool:
    """Whether a value depends on the images: with frozen parameters, whether it requires a gradient."""
    return isinstance(value, Tensor) and value.requires_grad


# ---------------------------------------------------------------------------------------------------- one input


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """(input, other positional arguments, other keyword arguments)."""
    if args:
        return args[0], args[1:], kwargs
    rest = dict(kwargs)
    first = next((rest.pop(key) for key in ("input", "self") if key in rest), None)
    return first, (), rest


def _argument(rest: tuple[Any, ...], kwargs: dict[str, Any], position: int, name: str, default: Any) -> Any:
    return kwargs[name] if name in kwargs else rest[position] if len(rest) > position else default


def _in_place(function: Function, rest: tuple[Any, ...], kwargs: dict[str, Any], position: int | None) -> bool:
    name = function.__name__
    if (name.endswith("_") and not name.endswith("__")) or name.startswith("__i"):
        return True
    return position is not None and bool(_argument(rest, kwargs, position, "inplace", False))


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
        low = _argument(rest, kwargs, 0, "min_val", -1.0)
        high = _argument(rest, kwargs, 1, "max_val", 1.0)
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
        low = _argument(rest, kwargs, 0, "min", None)
        high = _argument(rest, kwargs, 1, "max", None)
        if isinstance(low, Tensor) or isinstance(high, Tensor):
            return _Reading("hardtanh")
        low, high = -torch.inf if low is None else low, torch.inf if high is None else high
        kind = "hardtanh" if low != 0 else "relu" if high == torch.inf else "relu6"
        return _Reading(kind, options={"bounds": (low, high)})


class _LeakyRelu(_Unary):
    def read(self, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> _Reading:
        slope = _argument(rest, kwargs, 0, "negative_slope", 0.01)
        if slope <= 0:
            return _Reading(self.kind)
        return _Reading(self.kind, lambda site, grad: aten.leaky_relu_backward(grad, site.output, slope, True))


class _Relu(_Unary):
    def read(self, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> _Reading:
        return _Reading("relu", _relu_pull, {"bounds": (0.0, torch.inf)}, torch.relu)


class _Softmax(_Unary):
    def read(self, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> _Reading:
        return _Reading("softmax", options={"dim": _argument(rest, kwargs, 0, "dim", None)})

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
    second = _argument(rest, kwargs, 0, "other", None)
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

# Operations through which a difference passes unchanged in form (linear in their one activation, batch statistics
# frozen), and those that only move values. Named as torch names them, without the underscores of in-place and operator
# spellings. What is in neither table is a non-linear operation that no rule knows; the coverage names it.
_LINEAR = frozenset(
    [
        "add",
        "iadd",
        "radd",
        "sub",
        "isub",
        "rsub",
        "subtract",
        "neg",
        "negative",
        "sum",
        "mean",
        "nansum",
        "cumsum",
        "trace",
        "conv1d",
        "conv2d",
        "conv3d",
        "conv_transpose1d",
        "conv_transpose2d",
        "conv_transpose3d",
        "linear",
        "avg_pool1d",
        "avg_pool2d",
        "avg_pool3d",
        "adaptive_avg_pool1d",
        "adaptive_avg_pool2d",
        "adaptive_avg_pool3d",
        "interpolate",
        "upsample",
        "upsample_nearest",
        "upsample_bilinear",
        "pixel_shuffle",
        "pixel_unshuffle",
        "channel_shuffle",
        "pad",
        "constant_pad_nd",
        "zero_pad2d",
        "fold",
        "unfold",
        "cat",
        "concat",
        "concatenate",
        "stack",
        "hstack",
        "vstack",
        "dstack",
        "column_stack",
        "split",
        "chunk",
        "tensor_split",
        "split_with_sizes",
        "unbind",
        "view",
        "reshape",
        "view_as",
        "reshape_as",
        "flatten",
        "unflatten",
        "ravel",
        "squeeze",
        "unsqueeze",
        "transpose",
        "permute",
        "movedim",
        "moveaxis",
        "swapaxes",
        "swapdims",
        "t",
        "T",
        "mT",
        "H",
        "contiguous",
        "expand",
        "expand_as",
        "broadcast_to",
        "repeat",
        "repeat_interleave",
        "tile",
        "flip",
        "fliplr",
        "flipud",
        "roll",
        "rot90",
        "narrow",
        "select",
        "index_select",
        "getitem",
        "setitem",
        "gather",
        "take_along_dim",
        "masked_select",
        "diagonal",
        "diag",
        "tril",
        "triu",
        "clone",
        "to",
        "float",
        "double",
        "half",
        "bfloat16",
        "type",
        "type_as",
        "cpu",
        "cuda",
        "alias",
        "requires_grad",
        "copy",
        "real",
        "imag",
        "fill",
        "zero",
        "masked_fill",
        "index_add",
        "index_copy",
        "scatter",
        "scatter_add",
        "where",
        "as_strided",
        "unsafe_chunk",
        "unsafe_split",
    ]
)
# Linear in one activation if the other arguments are constants: products, quotients, and norms with frozen statistics.
_LINEAR_IN_ONE = frozenset(
    [
        "mul",
        "imul",
        "rmul",
        "multiply",
        "matmul",
        "rmatmul",
        "imatmul",
        "mm",
        "bmm",
        "mv",
        "dot",
        "einsum",
        "tensordot",
        "addmm",
        "addcmul",
        "baddbmm",
        "outer",
        "inner",
        "div",
        "idiv",
        "truediv",
        "itruediv",
        "divide",
        "true_divide",
        "bilinear",
        "lerp",
        "kron",
        "chain_matmul",
    ]
)
# Their results carry no gradient, yet the output depends on them: x * (x > 0) is a ReLU that no engine can see.
_DECISIONS = frozenset(
    [
        "gt",
        "lt",
        "ge",
        "le",
        "eq",
        "ne",
        "greater",
        "less",
        "greater_equal",
        "less_equal",
        "sign",
        "sgn",
        "floor",
        "ceil",
        "round",
        "trunc",
        "argmax",
        "argmin",
        "argsort",
        "detach",
        "item",
        "tolist",
        "heaviside",
        "bucketize",
    ]
)
_DROPOUT = frozenset(
    ["dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "feature_dropout"]
)


def name_of(function: Function) -> str:
    """The name of an operation without the marks of its spelling: `__iadd__` and `add_` are "iadd" and "add"."""
    name = getattr(function, "__name__", type(function).__name__)
    if name == "__get__":  # a property such as Tensor.T
        name = getattr(getattr(function, "__self__", None), "__name__", name)
    return name.strip("_")


def is_linear(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operation outside the table is linear (or affine) in the activations that it was called with."""
    name = name_of(function)
    if name in _LINEAR:
        return True
    activations = [value for value in _flat((*args, *kwargs.values())) if is_activation(value)]
    if name in _LINEAR_IN_ONE:
        divisor = _argument(args, kwargs, 1, "other", None)
        return len(activations) == 1 and not ("div" in name and is_activation(divisor))
    if name in _DROPOUT:
        return not _argument(args, kwargs, 2, "training", True)
    if name == "batch_norm":
        return len(activations) == 1 and not _argument(args, kwargs, 5, "training", False)
    return False


def is_decision(function: Function) -> bool:
    """Whether an operation cuts the gradient although the output may depend on its result."""
    return name_of(function) in _DECISIONS


def _flat(values: Any) -> Any:
    for value in values:
        if isinstance(value, tuple | list):
            yield from _flat(value)
        else:
            yield value
