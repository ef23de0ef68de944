"""Convolutions, linear layers and batch-norms as sites, for rules that treat their weights.

They become sites only if a rule of the recording asks for their kinds. An evaluation-mode batch-norm behind one belongs
to it:

    bn(conv(x; w, b)) = conv(x; w s, b s + t)

so that such rules need no canonizer: where the batch-norm's input is the layer's output, the two are one site, from the
layer's input to the batch-norm's output. A batch-norm behind anything else is a layer of its own, y = s x + t channel
by channel. The forward pass computes what the model asked for, bit for bit.

Rules that treat a layer and the activation behind it as one ask for pairs: where a layer's output goes into one
activation and nowhere else, each site names the other (`Pairs`).
"""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attrbox.engine.folding import batch_norm_scale
from attrbox.engine.linearity import argument, is_activation
from attrbox.engine.operation import Function, Operation
from attrbox.engine.site import Site

_KINDS: dict[Function, str] = {
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), "convolution"),
    **dict.fromkeys((torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d), "convolution"),
    F.linear: "linear",
}


def layer_of(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operation | None:
    """The layer behind an intercepted call: an activation, a constant weight, a constant bias or none."""
    if function is F.batch_norm:
        return _batch_norm(args, kwargs)
    kind = _KINDS.get(function)
    if kind is None:
        return None
    names = ("input", "weight", "bias")
    x, weight, bias = (argument(args, kwargs, place, name, None) for place, name in enumerate(names))
    batched = x.dim() == weight.dim() if kind == "convolution" else x.dim() > 1
    if not is_activation(x) or is_activation(weight) or is_activation(bias) or not batched:
        return None
    rest, others = args[3:], {name: value for name, value in kwargs.items() if name not in names}

    def apply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        return function(x, weight, bias, *rest, **others)

    turned = kind == "convolution" and "transpose" in function.__name__
    return _layer(kind, x, lambda x: apply(x, weight, bias), apply, weight, bias, turned)


def _batch_norm(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operation | None:
    x, affine = argument(args, kwargs, 0, "input", None), batch_norm_scale(args, kwargs)
    if affine is None or not is_activation(x) or any(map(is_activation, affine)):
        return None
    rest = {name: value for name, value in kwargs.items() if name != "input"}
    channels = (1, -1, *(1,) * (x.dim() - 2))

    def apply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        scaled = x * weight.view(channels)
        return scaled if bias is None else scaled + bias.view(channels)

    return _layer("batch_norm", x, lambda x: F.batch_norm(x, *args[1:], **rest), apply, *affine, False)


def _layer(
    kind: str,
    x: Tensor,
    run: Function,
    apply: Function,
    weight: Tensor,
    bias: Tensor | None,
    turned: bool,
    joined: bool = False,
) -> Operation:
    options = {"apply": apply, "weight": weight, "bias": bias, "nonnegative": _is_nonnegative(x)}
    options |= {"turned": turned, "joined": joined}
    return Operation(kind, (x,), run, lambda x: apply(x, weight, bias), options=options)


def with_batch_norm(
    layer: Operation, output: Tensor, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Operation | None:
    """A layer and the batch-norm that takes its output, as one; None if the call is no such batch-norm."""
    if function is not F.batch_norm or argument(args, kwargs, 0, "input", None) is not output:
        return None
    affine = batch_norm_scale(args, kwargs)
    if affine is None or layer.options["turned"]:
        return None
    (scale, shift), weight, bias = affine, layer.options["weight"], layer.options["bias"]
    rest = {name: value for name, value in kwargs.items() if name != "input"}
    return _layer(
        layer.kind,
        layer.inputs[0],
        lambda x: function(output.detach(), *args[1:], **rest),
        layer.options["apply"],
        weight * scale.view(-1, *(1,) * (weight.dim() - 1)),
        shift if bias is None else bias * scale + shift,
        False,
        joined=True,
    )


class Pairs:
    """Finds the layers whose output goes into one activation and nowhere else, call by call."""

    def __init__(self) -> None:
        self._unused: dict[int, tuple[weakref.ref[Tensor], int, Site]] = {}  # by the output's identity: version, layer
        self._paired: dict[int, tuple[weakref.ref[Tensor], Site, Site]] = {}  # likewise: layer, activation

    def made(self, output: Tensor, layer: Site) -> None:
        """A layer has run."""
        self._unused[id(output)] = weakref.ref(output), output._version, layer

    def layer_of(self, x: Tensor) -> Site | None:
        """The layer whose output, not used yet, an activation is about to take."""
        found, version, layer = self._unused.get(id(x), (None, 0, None))
        return layer if found is not None and found() is x and x._version == version else None

    def pair(self, layer: Site, activation: Site, x: Tensor, result: Tensor) -> None:
        """It has taken it."""
        layer.options["activation"], activation.options["layer"] = activation, layer.kind
        found, *_ = self._unused.pop(id(x))
        if result is not x:  # in place, nobody else can take it any more
            self._paired[id(x)] = found, layer, activation

    def used(self, tensors: Iterable[Any]) -> None:
        """Something else has taken these."""
        for tensor in tensors:
            self._unused.pop(id(tensor), None)
            found, layer, activation = self._paired.get(id(tensor), (None, None, None))
            if found is not None and found() is tensor and layer is not None and activation is not None:
                del self._paired[id(tensor)], layer.options["activation"], activation.options["layer"]


_NONNEGATIVE = frozenset(
    {"relu", "relu6", "sigmoid", "hardsigmoid", "softmax", "softplus", "abs", "exp", "vector_norm"}
)
_KEEPING = frozenset(
    f"{name}Backward"
    for name in """
    View UnsafeView ReshapeAlias Expand Unsqueeze Squeeze Permute Transpose T Clone Alias Mean AvgPool2D
    AdaptiveAvgPool2D MkldnnAdaptiveAvgPool2D Cat
    """.split()
)


def _is_nonnegative(x: Tensor) -> bool:
    """Whether what made an activation leaves nothing below 0, as far as can be told without looking at values."""
    todo = [x.grad_fn]
    while todo:
        node = todo.pop()
        site = getattr(node, "site", None)
        if isinstance(site, Site) and site.kind in _NONNEGATIVE:
            continue
        keeping = type(node).__name__.rstrip("0123456789") in _KEEPING
        if node is None or not (keeping or (isinstance(site, Site) and site.kind == "max_pool")):
            return False
        todo.extend(following for following, _ in node.next_functions if following is not None)
    return True
