"""Convolutions, linear layers and batch-norms as sites, for rules that treat their weights.

They become sites only if a rule of the recording asks for their kinds. A product with a constant matrix is a linear
layer, however it is written (`attrbox.engine.operations.contractions`), and so is addmm with a constant vector; an
elementwise product that is summed afterwards, (x[:, None] * W).sum(-1), stays a product and a sum. An evaluation-mode
batch-norm behind a layer belongs to it:

    bn(conv(x; w, b)) = conv(x; w s, b s + t)

so that such rules need no canonizer: where the batch-norm's input is the layer's output, the two are one site, from the
layer's input to the batch-norm's output. That holds for transposed convolutions too. A batch-norm behind anything else,
or along another axis than the layer's outputs, is a layer of its own, y = s x + t channel by channel. The forward pass
computes what the model asked for, bit for bit.

Rules that treat a layer and the activation behind it as one ask for pairs: where a layer's output goes into one
activation and nowhere else, each site knows of the other (`Pairs`).
"""

import weakref
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attrbox.engine.autograd_graph import is_nonnegative
from attrbox.engine.operations.batch_norm import SPELLINGS, batch_norm_of
from attrbox.engine.operations.calls import Function, Operation, argument, is_activation, with_input
from attrbox.engine.operations.contractions import contraction_of
from attrbox.engine.site import LayerInfo

_KINDS: dict[Function, str] = {
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), "convolution"),
    **dict.fromkeys((torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d), "convolution"),
    F.linear: "linear",
}
_ADDMM = frozenset({torch.addmm, Tensor.addmm})


def layer_of(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operation | None:
    """The layer behind an intercepted call: an activation, a constant weight, a constant bias or none."""
    if function in SPELLINGS:
        return _batch_norm(function, args, kwargs)
    if function in _ADDMM:
        return _addmm(function, args, kwargs)
    kind = _KINDS.get(function)
    if kind is None:
        return _contraction(function, args, kwargs)
    names = ("input", "weight", "bias")
    x, weight, bias = (argument(args, kwargs, place, name, None) for place, name in enumerate(names))
    if not is_activation(x) or is_activation(weight) or is_activation(bias):
        return None
    rest, others = args[3:], {name: value for name, value in kwargs.items() if name not in names}

    def apply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        return function(x, weight, bias, *rest, **others)

    groups = 0  # not turned
    if kind == "convolution" and "transpose" in function.__name__:
        groups = argument(args, kwargs, 6, "groups", 1)
    axis = -1 if kind == "linear" else 1 - weight.dim()
    return _layer(kind, x, lambda x: apply(x, weight, bias), apply, weight, bias, axis, groups)


def _batch_norm(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operation | None:
    norm = batch_norm_of(function, args, kwargs)
    affine = norm.affine if norm else None
    if norm is None or affine is None or not is_activation(norm.input) or not norm.constant:
        return None
    x = norm.input
    channels = (1, -1, *(1,) * (x.dim() - 2))

    def apply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        scaled = x * weight.view(channels)
        return scaled if bias is None else scaled + bias.view(channels)

    return _layer("batch_norm", x, with_input(function, args, kwargs), apply, *affine, 1 - x.dim())


def _addmm(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operation | None:
    """addmm(b, x, w) with a constant vector b and a constant matrix w: a linear layer."""
    names = ("input", "mat1", "mat2")
    addend, x, matrix = (argument(args, kwargs, place, name, None) for place, name in enumerate(names))
    options = {name: value for name, value in kwargs.items() if name not in names}
    fits = isinstance(matrix, Tensor) and matrix.dim() == 2 and is_activation(x) and x.dim() > 1
    if not fits or any(map(is_activation, (matrix, addend))) or not set(options) <= {"beta", "alpha"}:
        return None
    beta, alpha = options.get("beta", 1), options.get("alpha", 1)
    weight = matrix.mT if alpha == 1 else alpha * matrix.mT
    bias = beta * addend.expand(1, len(weight))[0] if beta else None
    return _layer("linear", x, lambda x: function(addend, x, matrix, **options), F.linear, weight, bias, -1)


def _contraction(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operation | None:
    """A product with a constant matrix: a linear layer without a bias."""
    found = contraction_of(function, args, kwargs)
    if found is None:
        return None
    before, after = found.before, found.after

    def apply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return after(F.linear(before(x), weight, bias))

    def run(x: Tensor) -> Any:
        given = [_replaced(value, found.x, x) for value in args]
        return function(*given, **{name: _replaced(value, found.x, x) for name, value in kwargs.items()})

    return _layer("linear", found.x, run, apply, found.weight, None, found.axis)


def _replaced(value: Any, old: Tensor, new: Tensor) -> Any:
    """A value with one tensor in the place of another."""
    if isinstance(value, list | tuple):
        return [_replaced(one, old, new) for one in value]
    return new if value is old else value


def _layer(
    kind: str,
    x: Tensor,
    run: Function,
    apply: Function,
    weight: Tensor,
    bias: Tensor | None,
    axis: int,
    groups: int = 0,
) -> Operation:
    info = LayerInfo(apply, weight, bias, axis, groups, is_nonnegative(x))
    return Operation(kind, (x,), run, lambda x: apply(x, weight, bias), info=info)


def with_batch_norm(
    layer: Operation, output: Tensor, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Operation | None:
    """A layer and the batch-norm that takes its output, as one; None if the call is no such batch-norm."""
    norm = batch_norm_of(function, args, kwargs)
    if norm is None or norm.affine is None or norm.input is not output or not norm.constant:
        return None
    info = layer.info
    assert isinstance(info, LayerInfo)
    if output.dim() + info.axis != 1:  # a batch-norm's channels are axis 1, a linear layer's outputs the last one
        return None
    weight, bias = norm.joined(info.weight, info.bias, info.turned)
    run, apply = with_input(function, args, kwargs), info.apply
    return replace(
        layer,
        run=lambda x: run(output.detach()),
        pure=lambda x: apply(x, weight, bias),
        info=replace(info, weight=weight, bias=bias, joined=True),
    )


class Pairs:
    """Finds the layers whose output goes into one activation and nowhere else, call by call.

    Attributes:
        found: the layer's record -> the activation's, by their numbers.
    """

    def __init__(self) -> None:
        self.found: dict[int, int] = {}
        self._unused: dict[int, tuple[weakref.ref[Tensor], int, int]] = {}  # by the output's identity: version, layer
        self._paired: dict[int, tuple[weakref.ref[Tensor], int]] = {}  # likewise: layer

    def made(self, output: Tensor, layer: int) -> None:
        """A layer has run."""
        self._unused[id(output)] = weakref.ref(output), output._version, layer

    def layer_of(self, x: Tensor) -> int | None:
        """The layer whose output, not used yet, an activation is about to take."""
        found, version, layer = self._unused.get(id(x), (None, 0, None))
        return layer if found is not None and found() is x and x._version == version else None

    def pair(self, layer: int, activation: int, x: Tensor, result: Tensor) -> None:
        """It has taken it."""
        self.found[layer] = activation
        output, *_ = self._unused.pop(id(x))
        if result is not x:  # in place, nobody else can take it any more
            self._paired[id(x)] = output, layer

    def used(self, tensors: Iterable[Any]) -> None:
        """Something else has taken these."""
        for tensor in tensors:
            self._unused.pop(id(tensor), None)
            output, layer = self._paired.get(id(tensor), (None, -1))
            if output is not None and output() is tensor:
                del self._paired[id(tensor)], self.found[layer]
