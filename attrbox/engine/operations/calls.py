"""Calls of torch functions: how they are taken apart, and what an intercepted one is to the engine: an `Operation`, or
`Parts`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attrbox.engine.site import LAYERS, Gradients, Site, SiteInfo

Function = Callable[..., Any]


def is_activation(value: object) -> bool:
    """Whether a value depends on the images: with frozen parameters, whether it requires a gradient."""
    return isinstance(value, Tensor) and value.requires_grad


def argument(rest: tuple[Any, ...], kwargs: dict[str, Any], position: int, name: str, default: Any) -> Any:
    """An argument of a call, by position or name."""
    return kwargs[name] if name in kwargs else rest[position] if len(rest) > position else default


def with_input(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Function:
    """A call as a function of its input."""
    rest = {name: value for name, value in kwargs.items() if name != "input"}
    return lambda x: function(x, *args[1:], **rest)


def name_of(function: Function) -> str:
    """The name of an operation without the marks of its spelling: `__iadd__` and `add_` are "iadd" and "add"."""
    name = getattr(function, "__name__", type(function).__name__)
    if name == "__get__":  # a property such as Tensor.T
        name = getattr(getattr(function, "__self__", None), "__name__", name)
    return name.strip("_")


def flat(values: Any) -> Any:
    """What is in nested tuples and lists, one after the other."""
    for value in values:
        if isinstance(value, tuple | list):
            yield from flat(value)
        else:
            yield value


@dataclass(frozen=True)
class Operation:
    """One intercepted call: `run` does what the caller asked for, `pure` the same without side effects."""

    kind: str
    inputs: tuple[Tensor, ...]
    run: Function
    pure: Callable[..., Tensor]
    in_place: bool = False
    pull: Callable[[Site, Tensor], Gradients] | None = None  # true gradient without running `pure` again
    pulls_from: str = "output"  # what `pull` reads
    info: SiteInfo = SiteInfo()
    floor: float = -torch.inf  # no output is below it


@dataclass(frozen=True)
class Parts:
    """What a function is made of: `kinds` of sites in it, `run` to run them; `kind` names the function as a whole.

    `accepts` says for which positional and keyword arguments that is so.
    """

    kind: str
    kinds: frozenset[str]
    run: Function
    accepts: Callable[[tuple[Any, ...], dict[str, Any]], bool] = lambda args, kwargs: True

    @classmethod
    def of(cls, kinds: str, run: Function, function: Function, accepts: Any = None) -> "Parts":
        """Those of a function; as a whole it is named after the only kind in it, besides layers, or after itself."""
        inside = frozenset(kinds.split())
        named = inside - LAYERS
        whole = next(iter(named)) if len(named) == 1 else function.__name__
        return cls(whole, inside, run, accepts or cls.accepts)


def in_place(run: Function) -> Function:
    """A function that writes its result into its first argument."""
    return lambda input, *args, **kwargs: input.copy_(run(input, *args, **kwargs))


Reader = Callable[[Function, tuple[Any, ...], dict[str, Any]], Operation | None]


def split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """(input, other positional arguments, other keyword arguments)."""
    if args:
        return args[0], args[1:], kwargs
    rest = dict(kwargs)
    first = next((rest.pop(key) for key in ("input", "self") if key in rest), None)
    return first, (), rest


def writes_in_place(
    function: Function, rest: tuple[Any, ...], kwargs: dict[str, Any], position: int | None = None
) -> bool:
    """Whether a call writes into its input, by its name or by the argument `inplace` at `position`."""
    name = function.__name__
    if (name.endswith("_") and not name.endswith("__")) or name.startswith("__i"):
        return True
    return position is not None and bool(argument(rest, kwargs, position, "inplace", False))


def alone(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, Any] | None:
    """`split`, if the input is the only activation of the call."""
    input, rest, kwargs = split(args, kwargs)
    if (
        not is_activation(input)
        or input.is_complex()
        or any(is_activation(value) for value in (*rest, *kwargs.values()))
    ):
        return None
    return input, rest, kwargs
