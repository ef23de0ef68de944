"""A picture of all that a call must leave alone: the model, its inputs, the process."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_globals
from torch.overrides import _get_current_function_mode_stack

_HOOKS = [name for name in vars(nn.Module()) if name.endswith("_hooks")]


def snapshot(model: nn.Module, *tensors: Tensor) -> dict[str, object]:
    """Flags, values, hooks and attributes of every module, of `tensors` and of the process, to compare with ==."""
    seen: dict[str, object] = {
        "rng": torch.get_rng_state().tolist(),
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "global hooks": {
            name: len(value) for name, value in vars(module_globals).items() if name.startswith("_global_") and value
        },
        "function modes": len(_get_current_function_mode_stack()),
    }
    for name, module in model.named_modules():
        seen[f"module {name}"] = (module.training, sorted(vars(module)), [len(vars(module)[hook]) for hook in _HOOKS])
        for key, buffer in module._buffers.items():
            seen[f"buffer {name}.{key}"] = None if buffer is None else (id(buffer), buffer.tolist())
    for name, parameter in model.named_parameters():
        grad = None if parameter.grad is None else parameter.grad.tolist()
        seen[f"parameter {name}"] = (id(parameter), parameter.requires_grad, grad, parameter.detach().tolist())
    for index, tensor in enumerate(tensors):
        hooks = len(tensor._backward_hooks or {})
        grad = None if tensor.grad is None else tensor.grad.tolist()
        seen[f"tensor {index}"] = (tensor.requires_grad, hooks, grad, tensor.detach().clone().tolist())
    return seen


@contextlib.contextmanager
def nothing_changes(model: nn.Module, *tensors: Tensor) -> Iterator[None]:
    """Assert that the block leaves everything as it was, also when it raises."""
    before = snapshot(model, *tensors)
    try:
        yield
    finally:
        after = snapshot(model, *tensors)
        changed = [key for key in before | after if before.get(key) != after.get(key)]
        assert not changed, changed
