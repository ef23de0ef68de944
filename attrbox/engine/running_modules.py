"""Which module of a model is running, and the numbers by which operations in it are told apart."""

import threading
from collections import Counter

from torch import nn

from attrbox.core.results import Operated


class RunningModules:
    """The modules that a forward pass is in, innermost last.

    Attributes:
        names: identity of a module -> its qualified name.
    """

    def __init__(self, model: nn.Module) -> None:
        self.names = {id(module): name for name, module in model.named_modules()}
        self._stack: list[tuple[str, int]] = [("", 0)]  # with the number of the call
        self._calls: Counter[str] = Counter()
        self._operations: Counter[tuple[str, str, int]] = Counter()  # how many ran so far: what, module, call
        self._thread = threading.get_ident()

    def enter(self, module: nn.Module) -> None:
        """Follow the pass into a module."""
        name = self._name(module)
        if name is not None:
            self._stack.append((name, self._calls[name]))
            self._calls[name] += 1

    def leave(self, module: nn.Module) -> str | None:
        """Follow the pass out of a module, and return its name; None if it is not the model's, or runs elsewhere."""
        name = self._name(module)
        if name is not None:
            self._stack.pop()
        return name

    def here(self, operation: str) -> Operated:
        """An operation that runs now, numbered within the running module's call."""
        key = (operation, *self._stack[-1])
        self._operations[key] += 1
        return Operated(*key, self._operations[key] - 1)

    @property
    def current(self) -> str:
        """The module that is running, or that raised."""
        return self._stack[-1][0]

    def _name(self, module: nn.Module) -> str | None:
        return self.names.get(id(module)) if threading.get_ident() == self._thread else None
