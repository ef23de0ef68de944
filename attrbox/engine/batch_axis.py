"""Where the images lie in an activation, call by call.

In most models row i is image i. Tokens may come first, rows may be routed or sorted, and layers may run on one image at
a time: then rows of an activation are not those of the batch, even where there are as many. Several rows of one image
may lie behind one another (windows, heads), or several images behind one token.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attrbox.engine.operations.calls import Function, argument, flat, is_activation, name_of


class Place(NamedTuple):
    """An axis of length outer * images * inner.

    Attributes:
        axis: along which the images lie.
        outer: how many times all images are gone through along it.
    """

    axis: int
    outer: int = 1


ROWS = Place(0)

# Functions of one activation that lay its axes out anew, cut or reduce them; tried on a tensor without data.
_TRIED = frozenset(
    """
    permute transpose t T H mT mH adjoint movedim moveaxis swapaxes swapdims squeeze unsqueeze mean sum amax amin var
    std prod logsumexp unbind select chunk split
    """.split()
)
_RESHAPED = frozenset("view reshape view_as reshape_as flatten unflatten ravel".split())
_JOINED = frozenset("cat concat concatenate hstack".split())
# Functions that pick or reorder what lies along axes: the position and the name of the argument that says which.
_PICKING = {
    **dict.fromkeys("index_select gather take_along_dim sort topk index_add index_copy scatter".split(), (1, "dim")),
    "flip": (1, "dims"),
    "roll": (2, "dims"),
    "rot90": (2, "dims"),
    **dict.fromkeys("fliplr flipud masked_select repeat tile repeat_interleave".split(), (9, "")),
}
_SIZES = (101, 103, 107, 109, 113, 127, 131, 137)  # lengths of axes that are told apart


def place_after(
    function: Function, args: Any, kwargs: dict[str, Any], result: Tensor, before: list[Place | None], count: int
) -> Place | None:
    """Where the images lie in what a call returned; None if they do not lie along an axis, or if it cannot be told.

    Args:
        function, args, kwargs: the call.
        result: a tensor that it returned.
        before: where they lie in the activations that it got.
        count: how many images there are.
    """
    place = before[0] if before else None
    if place is None or any(other != place for other in before):
        return None
    x = next(value for value in flat((*args, *kwargs.values())) if is_activation(value))
    name, axis = name_of(function), place.axis
    if axis >= x.dim() or not result.dim():
        return None
    indices = _indices(args) if name == "getitem" else ()
    if name in _TRIED or (indices and not any(isinstance(index, Tensor | list) for index in indices)):
        return _tried(function, x, args, kwargs, place)
    if name in _RESHAPED:
        return _reshaped(x, result, place, count)
    if name in _PICKING:
        position, word = _PICKING[name]
        dims = argument(args, kwargs, position, word, None)
        if dims is None or axis in {dim % x.dim() for dim in ((dims,) if isinstance(dims, int) else dims)}:
            return None
    elif name == "stack":
        axis += argument(args, kwargs, 1, "dim", 0) % result.dim() <= axis
    lost = (
        (name in _JOINED and argument(args, kwargs, 1, "dim", 0) % x.dim() == axis)
        or not all(index is Ellipsis or _is_all(index) for index in indices[: axis + 1])
        or (name == "einsum" and not (axis == 0 and _leads(args[0])))
    )
    fits = not lost and result.dim() > axis and result.shape[axis] == x.shape[place.axis]
    return Place(axis, place.outer) if fits else None


def _tried(function: Function, x: Tensor, args: Any, kwargs: dict[str, Any], place: Place) -> Place | None:
    sizes = [1 if size == 1 and axis != place.axis else _SIZES[axis] for axis, size in enumerate(x.shape)]
    trial: Tensor = torch.empty(sizes, device="meta")
    given = [trial if value is x else value for value in args]
    named = {name: trial if value is x else value for name, value in kwargs.items()}
    try:
        found: Any = function(*given, **named)
    except Exception:  # it needs the sizes of x
        return None
    found = found[0] if isinstance(found, tuple | list) and found else found
    shape = list(found.shape) if isinstance(found, Tensor) else []
    return Place(shape.index(sizes[place.axis]), place.outer) if sizes[place.axis] in shape else None


def _reshaped(x: Tensor, result: Tensor, place: Place, count: int) -> Place | None:
    """Values keep their order: what is gone through before the first image of each round stays as much."""
    before, left = math.prod(x.shape[: place.axis]) * place.outer, 1
    for axis, size in enumerate(result.shape):
        if before % left:
            return None
        if size % (before // left * count) == 0:
            return Place(axis, before // left)
        left *= size
    return None


def _indices(args: Any) -> tuple[Any, ...]:
    return args[1] if isinstance(args[1], tuple) else (args[1],)


def _is_all(index: Any) -> bool:
    return isinstance(index, slice) and index == slice(None)


def _leads(equation: Any) -> bool:
    """Whether the first letter of an equation's terms is also that of the result."""
    if not isinstance(equation, str) or "->" not in equation:
        return False
    terms, result = equation.replace(" ", "").split("->")
    return any(term[:1] == result[:1] for term in terms.split(","))
