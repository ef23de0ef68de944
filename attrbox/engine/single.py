"""A fault of torch around single images, kept away from gradients.

On CPUs torch (seen in 2.14) returns a wrong gradient from a batch-norm or instance norm of one image, if the gradient
that comes to it lies in memory as tokens do: [1, C, H, W] with the strides (C, 1, C W, C), as behind
`norm(x).flatten(2).transpose(1, 2)`. The sizes of batches of two tell the kernel which axis is which; the stride of an
axis of one does not. So gradients of one image come to these norms in the plain layout.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attrbox.engine.operations.batch_norm import SPELLINGS


class _Plain(TorchFunctionMode):
    """Asks for plain gradients at the outputs of batch-norms and instance norms."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in SPELLINGS:
            first = result[0] if isinstance(result, tuple) else result
            if isinstance(first, Tensor) and first.requires_grad and len(first) == 1:
                first.register_hook(plain)  # type: ignore[no-untyped-call]
        return result


def plain(gradient: Tensor) -> Tensor:
    """The gradient, of one image in the plain layout."""
    return gradient.contiguous() if gradient.dim() > 2 and len(gradient) == 1 else gradient


def plain_gradients(model: nn.Module) -> contextlib.AbstractContextManager[object]:
    """Within, norms of one image get their gradients in the plain layout.

    Compiled and scripted models do not let their operations be seen, and run as they are.
    """
    hidden = (
        isinstance(module, torch.jit.ScriptModule)
        or hasattr(module, "_orig_mod")
        or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )
    return contextlib.nullcontext() if not torch.is_grad_enabled() or any(hidden) else _Plain()
