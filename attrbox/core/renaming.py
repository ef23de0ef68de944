"""Old names of options and arguments, which go on working for one release."""

import dataclasses
import difflib
import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

from attrbox.errors import InputError, OptionError, RenamedWarning, shown

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


def grouped_arguments(
    groups: Mapping[str, type], names: Mapping[str, str]
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator: what became fields of groups of settings may still come as keyword arguments of their own.

    Args:
        groups: argument -> a dataclass, whose fields were arguments.
        names: old name -> new name, of fields that were called otherwise.
    """
    homes = {field.name: (group, cls) for group, cls in groups.items() for field in dataclasses.fields(cls)}
    loose = {name: name for name in homes.keys() - names.values()} | dict(names)  # as arguments -> as fields

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        own, title = inspect.signature(function).parameters, f"attrbox.{function.__qualname__}"
        written = {name: name for name in own} | {
            field: f"{group}=attrbox.{cls.__name__}({field}=...)" for field, (group, cls) in homes.items()
        }

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            given: dict[str, dict[str, Any]] = {}
            for name in sorted(kwargs.keys() - own.keys()):
                if name not in loose:
                    near = difflib.get_close_matches(name, written, n=1)
                    hint = f"Did you mean {written[near[0]]}? " if near else ""
                    raise OptionError(f"{title} has no argument {name!r}. {hint}Known: {', '.join(sorted(written))}.")
                given.setdefault(homes[loose[name]][0], {})[loose[name]] = kwargs.pop(name)
            for group, fields in given.items():
                form = f"{group}=attrbox.{groups[group].__name__}({', '.join(f'{name}=...' for name in fields)})"
                if group in kwargs:
                    raise InputError(f"{title} got {', '.join(fields)} beside {group}. Write {form}, all in one.")
                message = f"{title} takes {', '.join(fields)} as {form} now. The old form works for one release only."
                warnings.warn(message, RenamedWarning, stacklevel=_outside())
                kwargs[group] = groups[group](**fields)
            for group, cls in groups.items():
                if not isinstance(value := kwargs.get(group, cls()), cls):
                    raise OptionError(f"Expected {group} to be an attrbox.{cls.__name__}, got {shown(value)}.")
            return function(*args, **kwargs)

        return call

    return decorate


def _outside() -> int:
    """The stack level, as the caller of this counts it, of the code that called attrbox."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).split(".")[0] == "attrbox":
        level, frame = level + 1, frame.f_back
    return level
