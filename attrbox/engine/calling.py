"""How a model is called, and a fault of torch around single images, kept away from gradients.

On CPUs torch (seen in 2.14) returns a wrong gradient from a batch-norm or instance norm of one image, if the gradient
that comes to it lies in memory as tokens do: [1, C, H, W] with the strides (C, 1, C W, C), as behind
`norm(x).flatten(2).transpose(1, 2)`. The sizes of batches of two tell the kernel which axis is which; the stride of an
axis of one does not. So gradients of one image come to these norms in the plain layout.
"""

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attrbox.core.memory import is_out_of_memory
from attrbox.engine.folding import Unfolded
from attrbox.engine.operations.batch_norm import SPELLINGS
from attrbox.engine.refusals import written_over
from attrbox.errors import ForwardError, ModelError, OptionError


def forward(model: nn.Module, images: Tensor, watching: AbstractContextManager[None] | None = None) -> Any:
    """Call the model; whatever it raises becomes a `ForwardError` (out of memory stays what it is)."""
    try:
        with plain_gradients(model), watching or contextlib.nullcontext():
            return model(images)
    except (ModelError, OptionError, Unfolded):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        if "is a view and is being modified inplace" in str(error):
            raise written_over(error) from error
        raise ForwardError(
            f"The model raised {type(error).__name__} on images of shape {list(images.shape)}, {images.dtype}, on "
            f"{images.device}: {error}. Check that model(images) runs on its own (size, channels, dtype, device)."
        ) from error


def has_own_hooks(tensor: Tensor) -> bool:
    """Whether the model hooks onto the gradient of a tensor."""
    return any(hook is not plain for hook in (tensor._backward_hooks or {}).values())


def is_checkpointing() -> bool:
    """Whether autograd forgets what is saved now, and will run the model's code again when it needs it."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"


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
    hidden = any(map(hidden_by, model.modules()))
    return contextlib.nullcontext() if not torch.is_grad_enabled() or hidden else _Plain()


def hidden_by(module: nn.Module) -> str:
    """What keeps a function mode from seeing the operations of a module: it is "scripted or traced", or "compiled"; ""
    if nothing does."""
    if isinstance(module, torch.jit.ScriptModule):
        return "scripted or traced"
    compiled = hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
    return "compiled" if compiled else ""
