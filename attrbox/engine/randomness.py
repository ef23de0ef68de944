"""Models that draw random numbers in each pass, such as dropout called with training=True."""

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attrbox.core.model_state import generators
from attrbox.core.results import Operated
from attrbox.engine.calling import forward
from attrbox.engine.operations.calls import name_of
from attrbox.engine.recorder import Recorder


class Drawn:
    """Whether random numbers were drawn."""

    any = False


@contextlib.contextmanager
def drawing(model: nn.Module, device: torch.device) -> Iterator[Drawn]:
    """Tell whether random numbers are drawn inside: of torch (on the CPU or a device), numpy, Python, or a generator
    that is an attribute of a module. Generators elsewhere are not seen."""
    drawn, before = Drawn(), _states(model, device)
    yield drawn
    drawn.any = before != _states(model, device)


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
        self._last = _states(model, device)
        self.found: list[Operated] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._compare("random numbers")  # drawn since the last function of torch
        result = function(*args, **(kwargs or {}))
        self._compare(name_of(function))
        return result

    def _compare(self, name: str) -> None:
        states = _states(*self._drawn_from)
        if states != self._last:
            self.found.append(self._here(name))
            self._last = states


def _states(model: nn.Module, device: torch.device) -> list[Any]:
    """The states of all random numbers that a model is known to draw, comparable."""
    states = [torch.random.get_rng_state(), *(generator.get_state() for generator in generators(model))]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))  # kept by the host: nothing waits for the device
    _, words, *place = np.random.get_state()  # noqa: NPY002
    return [*(state.numpy().tobytes() for state in states), np.asarray(words).tobytes(), place, random.getstate()]
