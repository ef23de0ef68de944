"""Models that draw random numbers in each pass, such as dropout called with training=True."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from attrbox.core.results import Operated
from attrbox.engine.calling import forward
from attrbox.engine.operations.linearity import name_of
from attrbox.engine.recorder import Recorder


class Drawn:
    """Whether random numbers were drawn."""

    any = False


@contextlib.contextmanager
def drawing(device: torch.device) -> Iterator[Drawn]:
    """Tell whether torch's random numbers of the CPU, or of a device, are drawn inside."""
    drawn, before = Drawn(), _states(device)
    yield drawn
    drawn.any = _differ(before, _states(device))


def random_operations(model: nn.Module, images: Tensor) -> tuple[Operated, ...]:
    """What draws random numbers in a pass of `model`, by the functions that it calls."""
    recorder = _Finder(model, images.device)
    with torch.no_grad():
        forward(model, images.clone(), recorder.watching())  # an extra pass, of random models alone
    return tuple(recorder.found) or (Operated("random numbers", "", 0),)


class _Finder(Recorder):
    """Notes the functions that draw, and records nothing."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__(model, {}, (), frozenset())
        self.device = device
        self.found: list[Operated] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = _states(self.device)
        result = function(*args, **(kwargs or {}))
        if _differ(before, _states(self.device)):
            self.found.append(self._here(name_of(function)))
        return result


def _states(device: torch.device) -> list[Tensor]:
    states = [torch.random.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))  # kept by the host: nothing waits for the device
    return states


def _differ(before: list[Tensor], after: list[Tensor]) -> bool:
    return not all(map(torch.equal, before, after))
