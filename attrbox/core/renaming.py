"""Old names of options and arguments, which go on working for one release."""

import functools
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

from attrbox.errors import InputError, RenamedWarning

P = ParamSpec("P")
R = TypeVar("R")


def renamed(given: Mapping[str, Any], names: Mapping[str, str], owner: str, warn: bool = True) -> dict[str, Any]:
    """What is given, by the names of today.

    Args:
        given: name -> value.
        names: old name -> new name.
        owner: whose names they are, for messages.
        warn: tell of old names; False for what a file says, which nobody can write anew.

    Raises:
        InputError: a value is given by both of its names.
    """
    for old in sorted(given.keys() & names.keys()):
        new = names[old]
        if new in given:
            raise InputError(
                f"The {owner} got {old!r} and {new!r}, which are old and new name of one option. Drop {old!r}."
            )
        if warn:
            message = (
                f"The option {old!r} of the {owner} is called {new!r} now. The old name works for one release only."
            )
            warnings.warn(message, RenamedWarning, stacklevel=_outside())
    return {names.get(name, name): value for name, value in given.items()}


def renamed_arguments(**names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator: a function's keyword arguments may come by old names, old="new"."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            return function(*args, **renamed(kwargs, names, f"function {function.__qualname__}"))

        return call

    return decorate


def _outside() -> int:
    """The stack level, as the caller of this counts it, of the code that called attrbox."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).split(".")[0] == "attrbox":
        level, frame = level + 1, frame.f_back
    return level
