"""Half precision: what comes in float16 or bfloat16 is explained in float32, of the same values.

Relevance and multipliers are quotients: in half precision their stabilizers vanish and they leave its range. Gradients,
means over many passes and steps of optimizers lose most of their digits there. So images are widened where they come
in, and the model while it is explained; scores and maps are float32.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attrbox.errors import ForwardError

HALF = frozenset({torch.float16, torch.bfloat16})


def wide(tensor: Tensor) -> Tensor:
    """The tensor, in float32 if it came in half precision or in 8 bits."""
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() < 4 else tensor


def autocasting(device: torch.device) -> torch.dtype | None:
    """The dtype of automatic mixed precision on a device, where it is on."""
    on = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if on else None


@contextlib.contextmanager
def widened(model: nn.Module) -> Iterator[None]:
    """Run `model` in float32, wherever it is in half precision.

    Its modules hold float32 copies of such parameters and buffers meanwhile; the tensors themselves are not touched.
    Half precision that its code asks for is float32 as well.
    """
    stores: list[dict[str, Any]] = [s for module in model.modules() for s in (module._parameters, module._buffers)]
    held = [(store, name, tensor) for store in stores for name, tensor in store.items() if _is_half(tensor)]
    copies = {id(tensor): _copy(tensor) for _, _, tensor in held}  # one for all modules that share a tensor
    try:
        for store, name, tensor in held:
            store[name] = copies[id(tensor)]
        with _Widening():
            yield
    except ForwardError as error:
        error.add_note("It was run in float32, as all models in half precision are explained. Give it in float32.")
        raise
    finally:
        for store, name, tensor in held:
            store[name] = tensor


def _copy(tensor: Tensor) -> Tensor:
    copy = tensor.detach().float()
    return nn.Parameter(copy, requires_grad=False) if isinstance(tensor, nn.Parameter) else copy


def _is_half(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in HALF


class _Widening(TorchFunctionMode):
    """Turns half precision in the arguments of torch functions into float32: the dtypes that are asked for, and tensors
    that are no parameters or buffers, unless they are written to."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (Tensor.half, Tensor.bfloat16):
            function = Tensor.float
        written = 1 if _writes(function.__name__) else 0
        return function(*args[:written], *_wide(tuple(args[written:])), **_wide(kwargs or {}))


def _writes(name: str) -> bool:
    """Whether a function of that name writes into its first argument."""
    return name in ("__setitem__", "__set__") or name[:3] == "__i" or name[-1] == "_" != name[-2:-1]


def _wide(value: Any) -> Any:
    if _is_half(value):
        # Under autocast, activations are in half precision on purpose, and torch brings both together itself.
        return value if autocasting(value.device) else value.float()
    if isinstance(value, torch.dtype):
        return torch.float32 if value in HALF else value
    if type(value) in (tuple, list):
        return type(value)(map(_wide, value))
    return {name: _wide(part) for name, part in value.items()} if type(value) is dict else value
