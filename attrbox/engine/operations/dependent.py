"""Functions taken apart where an argument that usually is a constant depends on the images.

A bias, an addend, the weight of a norm or the bound of a clamp is an activation then, like any other. It is added,
multiplied or compared by an operation of its own, so that every rule treats it as if the model had spelled it out:

    addmm(b, x, y)     b + x @ y                  linear(x, w, b)        linear(x, w) + b
    lerp(x, y, w)      x + w * (y - x)            layer_norm(x, w, b)    layer_norm(x) * w + b
    prelu(x, w)        relu(x) - w * relu(-x)     clamp(x, a, b)         minimum(maximum(x, a), b)
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attrbox.engine.operations.batch_norm import SPELLINGS, batch_norm_of
from attrbox.engine.operations.calls import Function, Parts, argument, in_place, is_activation
from attrbox.engine.operations.elementwise import spellings
from attrbox.engine.operations.products import PRODUCTS

Accepts = Callable[[tuple[Any, ...], dict[str, Any]], bool]


def _active(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """How many factors of a product depend on the images; 0 if the call is not understood."""
    return PRODUCTS[name].active(args, kwargs) or 0


def _depends(*names: str) -> Accepts:
    """Whether one of these arguments depends on the images; by position and name: "2 weight"."""
    places = [(int(place), name) for place, name in (each.split() for each in names)]
    return lambda args, kwargs: any(is_activation(argument(args, kwargs, *place, None)) for place in places)


# ------------------------------------------------------------------------------------------------- products and addends


def _sum(name: str, multiply: Function) -> Function:
    """beta * input + alpha * product."""
    names = PRODUCTS[name].names

    def run(*args: Any, **kwargs: Any) -> Any:
        input, first, second = (argument(args, kwargs, place, each, None) for place, each in enumerate(names))
        beta, alpha = kwargs.get("beta", 1), kwargs.get("alpha", 1)
        product = multiply(first, second)
        product = product if alpha == 1 else alpha * product
        return product if beta == 0 else product + (input if beta == 1 else beta * input)

    return run


def _addcmul(input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1) -> Tensor:
    return input + (tensor1 if value == 1 else value * tensor1) * tensor2


def _addcdiv(input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1) -> Tensor:
    return input + (tensor1 if value == 1 else value * tensor1) / tensor2


def _lerp(input: Tensor, end: Tensor, weight: Tensor) -> Tensor:
    return input + weight * (end - input)


def _einsum(equation: str, *operands: Any) -> Any:
    """Two operands at a time, from the left: an index stays as long as the output or an operand to come has it."""
    operands = tuple(operands[0]) if isinstance(operands[0], tuple | list) else operands
    left, arrow, output = equation.replace(" ", "").replace("...", "@").partition("->")
    if not arrow:
        letters = left.replace(",", "")
        output = "".join(sorted(letter for letter in {*letters} if letter == "@" or letters.count(letter) == 1))
    term, *terms = left.split(",")
    result, *rest = operands
    for place, (other, operand) in enumerate(zip(terms, rest, strict=True), 1):
        later = output + "".join(terms[place:])
        kept = "".join(dict.fromkeys(letter for letter in term + other if letter in later))
        kept = output if place == len(terms) else kept
        result = torch.einsum(f"{term},{other}->{kept}".replace("@", "..."), result, operand)
        term = kept
    return result


def _chain(*matrices: Any) -> Tensor:
    several = matrices[0] if isinstance(matrices[0], tuple | list) else matrices
    product: Tensor = functools.reduce(torch.matmul, several)
    return product


def _bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if all(map(is_activation, (input1, input2, weight))):
        result = (torch.einsum("...i,oij->...oj", input1, weight) @ input2.unsqueeze(-1)).squeeze(-1)
    else:
        result = torch.bilinear(input1, input2, weight)
    return result if bias is None else result + bias


# ----------------------------------------------------------------------------------------------------- layers and norms


def _linear(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(input, weight) + bias


def _convolution(function: Function, dims: int) -> Function:
    def run(input: Tensor, weight: Tensor, bias: Tensor, *args: Any, **kwargs: Any) -> Any:
        return function(input, weight, None, *args, **kwargs) + bias.view(-1, *(1,) * dims)

    return run


def _affine(
    norm: Callable[[Tensor | None, Tensor | None], Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    shape: tuple[int, ...],
) -> Tensor:
    """A norm of (weight, bias), which keeps what is constant; the rest follows it."""
    inside = not is_activation(weight)
    result = norm(weight if inside else None, bias if inside and not is_activation(bias) else None)
    if not inside and weight is not None:
        result = result * weight.view(shape)
    return result if bias is None or (inside and not is_activation(bias)) else result + bias.view(shape)


def _channels(x: Tensor) -> tuple[int, ...]:
    return (-1, *(1,) * (x.dim() - 2))


def _layer_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *rest: Any,
    **others: Any,
) -> Tensor:
    def norm(weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.layer_norm(input, normalized_shape, weight, bias, eps)

    return _affine(norm, weight, bias, tuple(normalized_shape))


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *rest: Any,
    **others: Any,
) -> Tensor:
    def norm(weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.group_norm(input, num_groups, weight, bias, eps)

    return _affine(norm, weight, bias, _channels(input))


def _rms_norm(input: Tensor, normalized_shape: Any, weight: Tensor, eps: float | None = None) -> Tensor:
    return F.rms_norm(input, normalized_shape, eps=eps) * weight.view(tuple(normalized_shape))


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    def norm(weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)

    return _affine(norm, weight, bias, _channels(input))


def _batch_norm(function: Function) -> Function:
    def run(*args: Any, **kwargs: Any) -> Any:
        known = batch_norm_of(function, args, kwargs)
        if known is None:
            return _instance_norm(*args, **kwargs)

        def norm(weight: Tensor | None, bias: Tensor | None) -> Tensor:
            return F.batch_norm(known.input, known.mean, known.variance, weight, bias, eps=known.eps)

        result = _affine(norm, known.weight, known.bias, _channels(known.input))
        empty = result.new_empty(0)
        return (result, empty, empty) if "native" in function.__name__ else result

    return run


def _varies(function: Function) -> Accepts:
    """Whether scale or shift of a batch-norm depend on the images."""

    def accepts(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        norm = batch_norm_of(function, args, kwargs)
        if norm is None:
            return function is F.instance_norm and _depends("3 weight", "4 bias")(args, kwargs)
        return norm.affine is not None and not norm.constant

    return accepts


# ---------------------------------------------------------------------------------------------------------- elementwise


def _prelu(input: Tensor, weight: Tensor) -> Tensor:
    channels = (-1, *(1,) * (input.dim() - 2)) if weight.numel() > 1 else (1,)
    return input.relu() - weight.view(channels) * (-input).relu()


def _clamp(input: Tensor, min: Tensor | None = None, max: Tensor | None = None) -> Tensor:
    raised = input if min is None else torch.maximum(input, min)
    return raised if max is None else torch.minimum(raised, max)


# ---------------------------------------------------------------------------------------------------------------- table


def _table() -> dict[Function, Parts]:
    table: dict[Function, Parts] = {}

    def enter(kinds: str, run: Function, spelt: tuple[Function, ...], accepts: Accepts) -> None:
        for function in spelt:
            written = in_place(run) if function.__name__.endswith("_") else run
            table[function] = Parts.of(kinds, written, spelt[0], accepts)

    def product(name: str, at_least: int = 2) -> Accepts:
        return lambda *call: _active(name, *call) >= at_least

    summed = lambda *factors: torch.bmm(*factors).sum(0)  # noqa: E731
    for name, multiply in (("addbmm", summed), ("baddbmm", torch.bmm), ("addmv", torch.mv)):
        enter("linear matmul", _sum(name, multiply), spellings(name), product(name, at_least=1))
    enter("matmul", _sum("addr", torch.outer), spellings("addr"), product("addr"))

    def addmm(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        active, addend = _active("addmm", args, kwargs), argument(args, kwargs, 0, "input", None)
        if active != 1:
            return active == 2
        return is_activation(addend) or (addend.dim() > 1 and len(addend) > 1)  # a matrix is no bias of a layer

    enter("linear matmul", _sum("addmm", torch.mm), spellings("addmm"), addmm)
    enter("product", _addcmul, spellings("addcmul"), product("addcmul"))
    enter("product", _lerp, spellings("lerp"), product("lerp"))
    enter("quotient", _addcdiv, spellings("addcdiv"), _depends("2 tensor2"))
    enter("matmul", _einsum, (torch.einsum,), product("einsum", at_least=3))
    enter("linear matmul", _chain, (torch.linalg.multi_dot, torch.chain_matmul), product("multi_dot"))

    def biased(name: str) -> Accepts:
        def accepts(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
            bias = argument(args, kwargs, 3 if name == "bilinear" else 2, "bias", None)
            if not isinstance(bias, Tensor):
                return False
            matrix = bias.dim() > 1  # which F.linear adds too
            return matrix or is_activation(bias) or _active(name, args, kwargs) > 1

        return accepts

    of_three, with_bias = product("bilinear", at_least=3), biased("bilinear")
    enter("matmul", _bilinear, (torch.bilinear,), lambda *call: of_three(*call) or with_bias(*call))
    enter("linear matmul", _linear, (F.linear,), biased("linear"))
    for dims in (1, 2, 3):
        for name in (f"conv{dims}d", f"conv_transpose{dims}d"):
            function = getattr(torch, name)
            enter("convolution matmul", _convolution(function, dims), (function,), biased(name))
    affine = _depends("2 weight", "3 bias")
    enter("norm product", _layer_norm, (F.layer_norm, torch.layer_norm), affine)
    enter("norm product", _group_norm, (F.group_norm, torch.group_norm), affine)
    enter("norm product", _rms_norm, (F.rms_norm, torch.rms_norm), _depends("2 weight"))
    for function in SPELLINGS:
        enter("norm batch_norm convolution linear product", _batch_norm(function), (function,), _varies(function))
    enter("relu product", _prelu, spellings("prelu"), _depends("1 weight"))
    enter("maximum", _clamp, spellings("clamp", "clip"), _depends("1 min", "2 max"))
    enter("maximum", _clamp, spellings("clamp_min"), _depends("1 min"))
    enter("maximum", lambda input, max: _clamp(input, None, max), spellings("clamp_max"), _depends("1 max"))
    return table


DEPENDENT = _table()
