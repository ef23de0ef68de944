"""Calls in the one spelling that the tables know: torch takes several names for a function and for an argument."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attrbox.engine.operations.calls import Function

# numpy's names of arguments, which torch's compiled functions take too.
_ARGUMENTS = {"axis": "dim", "keepdims": "keepdim", "x": "input", "x1": "input", "x2": "other"}
_DISTANCES = ("cosine_similarity", "pairwise_distance", "cdist")  # their own names are x1 and x2
_COMPILED = (type(torch.relu), type(Tensor.relu), type(Tensor.__add__))


def respelled(function: Function, kwargs: dict[str, Any]) -> tuple[Function, dict[str, Any]]:
    """The same call by the names of torch: `torch.ops.aten.relu` is `torch.relu`, and `axis=1` is `dim=1`."""
    if isinstance(function, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        function = _ATEN.get(_schema_name(function), function)
    elif kwargs and isinstance(function, _COMPILED) and function.__name__ not in _DISTANCES:
        kwargs = {_ARGUMENTS.get(name, name): value for name, value in kwargs.items()}
    return function, kwargs


def _schema_name(function: Any) -> str:
    packet = function.overloadpacket if isinstance(function, torch._ops.OpOverload) else function
    return str(packet._qualified_op_name)


class _Functions(dict[str, Any]):
    """Operators of aten by name -> torch's functions of the same name and arguments."""

    def __missing__(self, name: str) -> Any:
        space, _, short = name.partition("::")
        homes = (torch, torch._C._nn, F, Tensor) if space == "aten" else ()
        found = next((getattr(home, short) for home in homes if callable(getattr(home, short, None))), None)
        self[name] = found
        return found

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] or default


_ATEN = _Functions()
