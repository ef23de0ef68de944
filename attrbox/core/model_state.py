"""The user's model and process are left exactly as they were, also after an exception; and models in half precision.

What comes in float16 or bfloat16 is explained in float32, of the same values. Relevance and multipliers are quotients:
in half precision their stabilizers vanish and they leave its range. Gradients, means over many passes and steps of
optimizers lose most of their digits there. So images are widened where they come in, and the model while it is
explained; scores and maps are float32.
"""

import contextlib
import random
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attrbox.errors import ForwardError, ModelError, TrainingModeWarning


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
        fast = (
            torch.backends.mha.get_fastpath_enabled()
        )  # without gradients only, with other scores where tokens are masked
        random_states = torch.random.fork_rng(devices=sorted(devices)), _same_random_states(model)
        with torch.inference_mode(False), torch.enable_grad(), random_states[0], random_states[1]:
            try:
                torch.backends.mha.set_fastpath_enabled(False)
                for module, _ in modes:
                    module.training = False  # not module.eval(): a user's override of train() may have side effects
                for parameter, _ in flags:
                    parameter.requires_grad_(False)
                with widened(model) if half and not isinstance(model, BlackBox) else contextlib.nullcontext():
                    yield model
            finally:
                torch.backends.mha.set_fastpath_enabled(fast)
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


# ------------------------------------------------------------------------------------------------------- half precision

HALF = frozenset({torch.float16, torch.bfloat16})


def wide(tensor: Tensor) -> Tensor:
    """The tensor, in float32 if it came in half precision or in 8 bits."""
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() < 4 else tensor


@contextlib.contextmanager
def surroundings(images: object) -> Iterator[torch.dtype | None]:
    """Leave the caller's torch.inference_mode and torch.autocast; gives the dtype of an autocast on the images' device.

    Within, mixed precision is what attrbox chooses for each pass.
    """
    device = images.device if isinstance(images, Tensor) else torch.device("cpu")
    autocast = autocasting(device)
    off = torch.autocast(device.type, enabled=False) if autocast else contextlib.nullcontext()
    with torch.inference_mode(False), off:
        yield autocast


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


# ------------------------------------------------------------------------------------------------------- random numbers


class Drawn:
    """Whether random numbers were drawn."""

    any = False


@contextlib.contextmanager
def drawing(model: nn.Module, device: torch.device) -> Iterator[Drawn]:
    """Tell whether random numbers are drawn inside: of torch (on the CPU or a device), numpy, Python, or a generator
    that is an attribute of a module. Generators elsewhere are not seen."""
    drawn, before = Drawn(), random_states(model, device)
    yield drawn
    drawn.any = before != random_states(model, device)


def random_states(model: nn.Module, device: torch.device) -> list[Any]:
    """The states of all random numbers that a model is known to draw, comparable."""
    states = [torch.random.get_rng_state(), *(generator.get_state() for generator in generators(model))]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))  # kept by the host: nothing waits for the device
    _, words, *place = np.random.get_state()  # noqa: NPY002
    return [*(state.numpy().tobytes() for state in states), np.asarray(words).tobytes(), place, random.getstate()]
