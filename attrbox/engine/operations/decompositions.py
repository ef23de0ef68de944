"""Torch functions that are made of several operations, so that each of these can be a site.

Most are torch's own Python code, run with its checks for overrides off (`_opened`), so that the operations inside come
to the recorder one by one. Those whose code is not Python are written out here.
"""

import math
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attrbox.engine.operations.calls import Function, Parts, argument, is_activation
from attrbox.engine.operations.dependent import DEPENDENT
from attrbox.engine.operations.elementwise import root, spellings
from attrbox.engine.operations.recurrent import gru_cell, lstm_cell, recurrent, rnn_cell


def _opened(function: Any) -> Function:
    """A function of torch without its checks for overrides, which would hand it to the recorder as a whole."""
    blind = dict.fromkeys(
        ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"), lambda *tensors: False
    )
    code, known = function.__code__, {**function.__globals__, **blind}
    opened = types.FunctionType(code, known, function.__name__, function.__defaults__, function.__closure__)
    opened.__kwdefaults__ = function.__kwdefaults__
    return opened


# ------------------------------------------------------------------------------------------------------ attention


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(scale Q K^T + mask) V; weights of 0 where all is masked."""
    if enable_gqa:
        key, value = (t.repeat_interleave(query.size(-3) // t.size(-3), -3) for t in (key, value))
    scores = (query * (1 / math.sqrt(query.size(-1)) if scale is None else scale)) @ key.transpose(-2, -1)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    if attn_mask is None or is_activation(attn_mask):
        weights = scores.softmax(-1)
    else:
        open_keys = attn_mask if attn_mask.dtype == torch.bool else attn_mask != -math.inf
        shut = ~open_keys.any(-1, keepdim=True)
        weights = scores.masked_fill(shut, 0).softmax(-1).masked_fill(shut, 0)
    return (F.dropout(weights, dropout_p) if dropout_p else weights) @ value


# --------------------------------------------------------------------------------------------------- along axes


def _power_pool(dims: int) -> Function:
    """The p-th root of the sum of p-th powers in each window; for infinite p the largest or smallest magnitude."""
    average: Function = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[dims - 1]
    largest: Function = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[dims - 1]

    def pool(input: Tensor, norm_type: float, kernel_size: Any, stride: Any = None, ceil_mode: bool = False) -> Tensor:
        if math.isinf(norm_type):
            sign = math.copysign(1, norm_type)
            extreme: Tensor = sign * largest(sign * input.abs(), kernel_size, stride, 0, 1, ceil_mode)
            return extreme
        count = kernel_size**dims if isinstance(kernel_size, int) else math.prod(kernel_size)
        means = average(input.pow(norm_type), kernel_size, stride, 0, ceil_mode)
        return root(means * count, 1 / norm_type)

    return pool


def _glu(input: Tensor, dim: int = -1) -> Tensor:
    """a sigmoid(b) of the halves a and b."""
    first, second = input.chunk(2, dim)
    return first * second.sigmoid()


def _largest(input: Tensor, dim: Any = (), keepdim: bool = False) -> Tensor:
    """amax: the axes are laid together as the last one, which is what the table of operations knows."""
    axes = [axis % input.dim() for axis in ((dim,) if isinstance(dim, int) else dim or range(input.dim()))]
    moved = input.movedim(axes, list(range(-len(axes), 0))).flatten(-len(axes))
    shape = [1 if axis in axes else size for axis, size in enumerate(input.shape) if keepdim or axis not in axes]
    return torch.amax(moved, dim=-1, keepdim=True).reshape(shape)


def _smallest(input: Tensor, dim: Any = (), keepdim: bool = False) -> Tensor:
    return -torch.amax(-input, dim, keepdim)


def _along(sign: int) -> Function:
    """max and min along one axis, which return the winners' positions as well."""

    def run(input: Tensor, dim: int, keepdim: bool = False) -> Any:
        moved = (sign * input).movedim(dim, -1)
        shape = (*moved.shape[:-1], 1)
        line = moved.reshape(len(moved) if moved.dim() > 1 else 1, -1, moved.shape[-1])
        values, places = F.adaptive_max_pool1d_with_indices(line, [1])
        both = (t.reshape(shape).movedim(-1, dim) for t in (sign * values, places))
        kind: Any = torch.return_types.max if sign > 0 else torch.return_types.min
        return kind(both if keepdim else (t.squeeze(dim) for t in both))

    return run


def _has_axis(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return type(argument(args, kwargs, 1, "dim", None)) is int


def _is_complex(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return bool(argument(args, kwargs, 0, "input", None).is_complex())


def _magnitude(input: Tensor) -> Tensor:
    magnitude: Tensor = torch.linalg.vector_norm(torch.view_as_real(input), dim=-1)
    return magnitude


def _variance(
    input: Tensor, dim: Any = None, unbiased: bool = True, keepdim: bool = False, *, correction: float | None = None
) -> Tensor:
    """The mean square of what deviates from the mean."""
    if isinstance(dim, bool):
        dim, unbiased = None, dim
    axes = tuple(range(input.dim())) if dim is None else (dim,) if isinstance(dim, int) else tuple(dim)
    count = math.prod(input.shape[axis] for axis in axes)
    centred = input - input.mean(axes, keepdim=True)
    return centred.square().sum(axes, keepdim=keepdim) / (count - (int(unbiased) if correction is None else correction))


def _deviation(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return root(torch.var(input, *args, **kwargs), 0.5)


def _running_products(input: Tensor, dim: int) -> list[Tensor]:
    products = list(input.unbind(dim))
    for place in range(1, len(products)):
        products[place] = products[place - 1] * products[place]
    return products


def _cumulative_product(input: Tensor, dim: int) -> Tensor:
    return torch.stack(_running_products(input, dim), dim)


def _product(input: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    input, dim = (input.flatten(), 0) if dim is None else (input, dim)
    last = _running_products(input, dim)[-1]
    return last.unsqueeze(dim) if keepdim else last


def _cosine(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    return (F.normalize(x1, dim=dim, eps=eps) * F.normalize(x2, dim=dim, eps=eps)).sum(dim)


# ---------------------------------------------------------------------------------------------------------- table


def _table() -> dict[Function, Parts]:
    table = dict(DEPENDENT)

    def enter(kinds: str, run: Function, *spelt: Function, accepts: Any = None) -> None:
        table.update(dict.fromkeys(spelt, Parts.of(kinds, run, spelt[0], accepts)))

    def open_up(kinds: str, *functions: Any) -> None:
        for function in functions:
            enter(kinds, _opened(function), function)

    open_up("linear softmax matmul", F.multi_head_attention_forward)
    open_up("vector_norm quotient hardtanh", F.normalize)
    open_up("vector_norm", torch.norm, Tensor.norm)
    open_up("power quotient product", F.local_response_norm)
    open_up("softmax", F.softmin)
    open_up("abs quotient", F.softsign)
    open_up("tanh", F.tanhshrink)
    enter("softmax matmul", _attention, F.scaled_dot_product_attention)
    enter("sigmoid product", _glu, *spellings("glu"))
    for dims, pool in enumerate((F.lp_pool1d, F.lp_pool2d, F.lp_pool3d), 1):
        enter("power abs max_pool", _power_pool(dims), pool)
    enter("max_pool", _largest, *spellings("amax"))
    enter("max_pool", _smallest, *spellings("amin"))
    enter("max_pool", _along(1), *spellings("max"), accepts=_has_axis)
    enter("max_pool", _along(-1), *spellings("min"), accepts=_has_axis)
    enter("vector_norm", _magnitude, *spellings("abs", "absolute"), accepts=_is_complex)
    enter("power", _variance, *spellings("var"))
    enter("power", _deviation, *spellings("std"))
    enter("product", _cumulative_product, *spellings("cumprod"))
    enter("product", _product, *spellings("prod"))
    enter("vector_norm quotient hardtanh product", _cosine, F.cosine_similarity)
    gated = "linear sigmoid tanh product"
    for kinds, cell, alone, layer in (
        (gated, lstm_cell, torch.lstm_cell, torch.lstm),
        (gated, gru_cell, torch.gru_cell, torch.gru),
        ("linear tanh", rnn_cell(torch.tanh), torch.rnn_tanh_cell, torch.rnn_tanh),
        ("linear relu", rnn_cell(torch.relu), torch.rnn_relu_cell, torch.rnn_relu),
    ):
        enter(kinds, cell, alone)
        enter(kinds, recurrent(cell), layer, accepts=lambda args, kwargs: not kwargs)
    return table


PARTS = _table()
