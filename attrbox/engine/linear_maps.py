"""Convolutions, linear layers and batch-norms of a recorded pass, with gradients of their own.

With frozen weights these operations are linear maps, and so are their gradients:

    y = A x + b        g_x = A^T g_y        and differentiated once more        g_g = A g_x

Autograd's own formulas would do two things more. Differentiating the gradient of a convolution once more, it also
computes the gradient for the weight, as large a convolution again, though no weight asks for it. And a batch-norm
behind a convolution costs passes over memory of its own, where scaled weights do both at once.

The forward pass computes what the model asked for, bit for bit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from attrbox.engine.operations.batch_norm import batch_norm_of, scaled
from attrbox.engine.operations.calls import argument, is_activation, with_input
from attrbox.engine.site_function import own

aten: Any = torch.ops.aten

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class LinearMap:
    """`push` is A, `pull` its transpose; `scaled(s)`, of convolutions, is A with channels scaled by s [C]."""

    push: Map
    pull: Map
    scaled: "Callable[[Tensor], LinearMap] | None" = None


class LinearMapFunction(torch.autograd.Function):
    """y = run(x), of which `linear` is the linear part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Map, linear: LinearMap) -> Tensor:
        ctx.linear = linear
        return own(run(x), x)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        return _Transpose.apply(grad_output, ctx.linear), None, None


class _Transpose(torch.autograd.Function):
    """g_x = A^T g_y."""

    @staticmethod
    def forward(ctx: Any, grad_output: Tensor, linear: LinearMap) -> Tensor:
        ctx.linear = linear
        return linear.pull(grad_output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return LinearMapFunction.apply(grad, ctx.linear.push, ctx.linear), None


class LinearCalls:
    """Runs the calls of one recorded forward pass that are linear maps with fixed weights."""

    def __init__(self) -> None:
        # Of the last convolution: output, input, map, and the output's version.
        self._last: tuple[Tensor, Tensor, LinearMap, int] | None = None

    def run(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """The result of a call, recorded as a linear map; None if it is none, or one that is left to autograd."""
        reader = _READERS.get(function)
        if reader is None:
            return None
        x = argument(args, kwargs, 0, "input", None)
        if not is_activation(x) or sum(is_activation(value) for value in (*args, *kwargs.values())) != 1:
            return None
        last, self._last = self._last, None
        run = with_input(function, args, kwargs)
        if reader is _batch_norm:
            norm = batch_norm_of(function, args, kwargs)
            affine = norm.affine if norm else None
            if affine is None:
                return None
            unwritten = last is not None and last[0] is x and x._version == last[3]
            if last is not None and unwritten and last[2].scaled:  # from the convolution's input to here in one step
                y, x = last[:2]
                return _applied(x, lambda _: run(y.detach()), last[2].scaled(affine[0]))
        found = reader(x, args, kwargs)
        if found is None:
            return None
        result = _applied(x, run, found)
        if found.scaled:
            self._last = (result, x, found, result._version)
        return result


def transposed(
    g: Tensor, weight: Tensor, shape: Sequence[int], stride: Any, padding: Any, dilation: Any, groups: int
) -> Tensor:
    """The transpose of a convolution: gradients g at its outputs as gradients at its inputs, of a shape."""
    # Only the shape and the memory format of the input matter; nothing is read from it.
    last = g.dim() == 4 and g.is_contiguous(memory_format=torch.channels_last)
    form = torch.channels_last if last else torch.contiguous_format
    input = torch.empty(shape, dtype=g.dtype, device=g.device, memory_format=form)
    own, nothing = weight.to(g.dtype), [0] * (g.dim() - 2)
    gradients = aten.convolution_backward(
        g, input, own, None, stride, padding, dilation, False, nothing, groups, [True, False, False]
    )
    return cast(Tensor, gradients[0])


def _applied(x: Tensor, run: Map, linear: LinearMap) -> Tensor:
    return cast(Tensor, LinearMapFunction.apply(x, run, linear))


def _convolution(dims: int) -> Callable[[Tensor, tuple[Any, ...], dict[str, Any]], LinearMap | None]:
    def read(x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LinearMap | None:
        def tupled(position: int, name: str, default: int) -> list[int]:
            value = argument(args, kwargs, position, name, default)
            return [value] * dims if isinstance(value, int) else list(value) * (dims if len(value) == 1 else 1)

        if x.dim() != dims + 2 or isinstance(argument(args, kwargs, 4, "padding", 0), str):
            return None  # without a batch, or padded on one side: left to autograd
        weight = argument(args, kwargs, 1, "weight", None)
        stride, padding = tupled(3, "stride", 1), tupled(4, "padding", 0)
        dilation, groups = tupled(5, "dilation", 1), argument(args, kwargs, 6, "groups", 1)
        shape, dtype = x.shape, x.dtype
        channels_last = dims == 2 and x.is_contiguous(memory_format=torch.channels_last)

        def linear(weight: Tensor) -> LinearMap:
            def push(t: Tensor) -> Tensor:
                t = t.to(weight.dtype)
                nothing = [0] * dims
                return cast(
                    Tensor, aten.convolution(t, weight, None, stride, padding, dilation, False, nothing, groups)
                )

            def pull(g: Tensor) -> Tensor:
                return transposed(g, weight, shape, stride, padding, dilation, groups).to(dtype)

            def with_scale(scale: Tensor) -> LinearMap:
                both = scaled(weight, scale.to(weight.dtype))
                if channels_last:
                    both = both.contiguous(memory_format=torch.channels_last)
                return linear(both)

            return LinearMap(push, pull, with_scale)

        return linear(weight)

    return read


def _linear(x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LinearMap:
    weight, dtype = argument(args, kwargs, 1, "weight", None), x.dtype
    return LinearMap(lambda t: F.linear(t.to(weight.dtype), weight), lambda g: (g @ weight.to(g.dtype)).to(dtype))


def _batch_norm(x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LinearMap:
    norm = batch_norm_of(F.batch_norm, args, kwargs)
    assert norm is not None
    assert norm.affine is not None
    scale = norm.affine[0].view(1, -1, *(1,) * (x.dim() - 2))

    def both(t: Tensor) -> Tensor:
        return t * scale.to(t.dtype)

    return LinearMap(both, both)


_READERS: dict[Any, Callable[[Tensor, tuple[Any, ...], dict[str, Any]], LinearMap | None]] = {
    torch.conv1d: _convolution(1),
    torch.conv2d: _convolution(2),
    torch.conv3d: _convolution(3),
    F.linear: _linear,
    F.batch_norm: _batch_norm,
}
