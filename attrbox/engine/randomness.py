"""Models that draw random numbers in each pass, such as dropout called with training=True."""

from typing import Any

import torch
from torch import Tensor, nn

from attrbox.core.model_state import random_states
from attrbox.core.results import Operated
from attrbox.engine.calling import forward
from attrbox.engine.operations.calls import name_of
from attrbox.engine.recorder import Recorder


def random_operations(model: nn.Module, images: Tensor) -> tuple[Operated, ...]:
    """What draws random numbers in a pass of `model`: functions of torch by name, numbers of others by their module."""
    recorder = _Finder(model, images.device)
    with torch.no_grad():
        forward(model, images.clone(), recorder.watching())  # an extra pass, of random models alone
    return tuple(recorder.found) or (Operated("random numbers", "", 0),)


class _Finder(Recorder):
    """Notes the functions that draw, and records nothing."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__(model, {}, (), frozenset())
        self._drawn_from = model, device
        self._last = random_states(model, device)
        self.found: list[Operated] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._compare("random numbers")  # drawn since the last function of torch
        result = function(*args, **(kwargs or {}))
        self._compare(name_of(function))
        return result

    def _compare(self, name: str) -> None:
        states = random_states(*self._drawn_from)
        if states != self._last:
            self.found.append(self._modules.here(name))
            self._last = states
