"""The user's model and process are left exactly as they were, also after an exception."""

import contextlib
import random
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attrbox.core.half_precision import HALF, widened
from attrbox.errors import ModelError, TrainingModeWarning


class BlackBox(nn.Module):
    """A callable that is no module, for methods without gradients.

    It gets a contiguous tensor of images, in their `dtype`, and may return an array of any library that numpy
    understands.
    """

    def __init__(self, function: Callable[[Tensor], Any], dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.function = function
        self.dtype = dtype
        self.eval()

    def forward(self, images: Tensor) -> Any:
        output = self.function(images if self.dtype is None else images.to(self.dtype))
        if not isinstance(output, Tensor) and hasattr(output, "__array__"):
            output = torch.as_tensor(output)
        if isinstance(output, Tensor) and output.is_floating_point():
            output = output.to(images)
        return output


def check_model(
    model: object, differentiating: Sequence[str] = ("explaining",), dtype: torch.dtype | None = None
) -> nn.Module:
    """Return `model` if it is an `nn.Module` that can be differentiated.

    Args:
        model: what the user gave.
        differentiating: the methods that need gradients; if there are none, any callable will do.
        dtype: of the images as the user gave them, for a callable that is no module.

    Raises:
        ModelError: it is something else, has uninitialised parameters, or was built in inference mode.
    """
    if not isinstance(model, nn.Module):
        plain = model if callable(model) and not isinstance(model, type) else None
        if plain is not None and not differentiating:
            return BlackBox(plain, dtype)
        raise ModelError(
            f"Expected the model to be a torch.nn.Module, got {getattr(model, '__name__', type(model).__name__)!r}. "
            + (
                f"Of a plain callable only methods without gradients can make a map (occlusion, rise, lime, "
                f"kernel_shap); {', '.join(differentiating)} cannot. Wrap it in a module whose forward calls it, if it "
                "is made of torch operations."
                if plain is not None
                else "Give the model itself."
            )
        )
    if any(torch.nn.parameter.is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        raise ModelError(
            "The model has lazy parameters without shapes yet. Run one batch through it first: model(images)."
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_inference():
            raise ModelError(
                f"{name!r} was created under torch.inference_mode(), so nothing can be differentiated through it. "
                "Build or load the model outside of inference mode (torch.no_grad() is fine)."
            )
    return model


_TURN = threading.RLock()  # one for all models, as two may share parameters


@contextlib.contextmanager
def untouched(model: nn.Module, half: bool = False) -> Iterator[nn.Module]:
    """Run `model` in evaluation mode with frozen parameters, and in float32 if it is in half precision, or (`half`) the
    images came so; put everything back on exit.

    Everything is: each module's `training`, each parameter's `requires_grad`, the value and identity of each
    buffer, and the random states: the global ones of torch, numpy and Python, and those of generators that are
    attributes of modules. Gradients are enabled inside,
    whatever the caller's mode. Frozen parameters save memory: a convolution then keeps no input for them.

    Threads take turns, so that each finds the model as its user left it; a call within a call of the same thread goes
    on at once. A step of training in another thread meanwhile finds the parameters frozen: train and explain by turns.
    """
    with _TURN:
        modes = [(module, module.training) for module in model.modules()]
        # A wrapper around a model in evaluation mode is born in training mode, which changes nothing: leaves count.
        if any(training and next(module.children(), None) is None for module, training in modes):
            warnings.warn(
                "The model is in training mode; it is explained in evaluation mode (dropout off, batch-norm with its "
                "running statistics) and put back afterwards. Call model.eval() first to silence this.",
                TrainingModeWarning,
                stacklevel=5,
            )
        flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        buffers = [
            (module, name, buffer, buffer.detach().clone(), buffer._version)
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        half = half or any(tensor.dtype in HALF for tensor in (*model.parameters(), *model.buffers()))
        devices = {tensor.device.index for tensor in (*model.parameters(), *model.buffers()) if tensor.is_cuda}
        random_states = torch.random.fork_rng(devices=sorted(devices)), _same_random_states(model)
        with torch.inference_mode(False), torch.enable_grad(), random_states[0], random_states[1]:
            try:
                for module, _ in modes:
                    module.training = False  # not module.eval(): a user's override of train() may have side effects
                for parameter, _ in flags:
                    parameter.requires_grad_(False)
                with widened(model) if half and not isinstance(model, BlackBox) else contextlib.nullcontext():
                    yield model
            finally:
                for module, training in modes:
                    module.training = training
                for parameter, requires_grad in flags:
                    parameter.requires_grad_(requires_grad)
                for module, name, buffer, value, version in buffers:
                    if buffer._version != version:
                        buffer.detach().copy_(value)
                    module._buffers[name] = buffer


@contextlib.contextmanager
def _same_random_states(model: nn.Module) -> Iterator[None]:
    """Leave the random states of numpy, of Python and of a model's own generators as they were."""
    own = [(generator, generator.get_state()) for generator in generators(model)]
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        for generator, state in own:
            generator.set_state(state)


def generators(model: nn.Module) -> list[torch.Generator]:
    """The random generators that are attributes of a model's modules."""
    values = (value for module in model.modules() for value in vars(module).values())
    return [value for value in values if isinstance(value, torch.Generator)]
