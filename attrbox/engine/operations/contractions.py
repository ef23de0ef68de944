"""Linear layers that are written as other products with a constant matrix: W @ x, bmm with one matrix for all, einsum,
tensordot.

Each is F.linear between two changes of shape, so that rules find the weight as [outputs, inputs]:

    y = after(before(x) W^T)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attrbox.engine.operations.calls import Function, argument, is_activation
from attrbox.engine.operations.elementwise import spellings

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Contraction:
    """A product of an activation x and a constant matrix.

    Attributes:
        x: the activation.
        weight: W, [outputs, inputs].
        before: x -> [..., inputs].
        after: [..., outputs] -> the product.
        axis: of the outputs in the product, counted from its end.
    """

    x: Tensor
    weight: Tensor
    before: Change
    after: Change
    axis: int = -1


PRODUCTS = frozenset({*spellings("matmul", "mm", "bmm", "mv"), Tensor.__matmul__, torch.linalg.matmul})
REVERSED = frozenset({Tensor.__rmatmul__})


def contraction_of(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Contraction | None:
    """What a call contracts, or None if it is no product of an activation and a constant matrix."""
    if function in PRODUCTS or function in REVERSED:
        first, second = (argument(args, kwargs, place, name, None) for place, name in ((0, "input"), (1, "other")))
        second = next((kwargs[name] for name in ("mat2", "vec") if name in kwargs), second)
        return _product(*((second, first) if function in REVERSED else (first, second)))
    if function is torch.einsum:
        equation, *operands = args
        operands = list(operands[0]) if len(operands) == 1 and isinstance(operands[0], list | tuple) else operands
        return _einsum(equation, operands) if isinstance(equation, str) else None
    if function is torch.tensordot:
        return _tensordot(args, kwargs)
    return None


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.mT


def _product(first: Any, second: Any) -> Contraction | None:
    if not (isinstance(first, Tensor) and isinstance(second, Tensor)):
        return None
    if is_activation(first) and not is_activation(second):
        matrix = _matrix(second)
        return None if matrix is None else Contraction(first, matrix.mT, _same, _same)
    if is_activation(second) and not is_activation(first):
        matrix = _matrix(first)
        if matrix is None:
            return None
        if second.dim() == 1:
            return Contraction(second, matrix, _same, _same)
        return Contraction(second, matrix, _transposed, _transposed, -2)
    return None


def _matrix(tensor: Tensor) -> Tensor | None:
    """A constant as one matrix, also where it is expanded to one for each row; None if it is none."""
    while tensor.dim() > 2 and (tensor.shape[0] == 1 or tensor.stride(0) == 0):
        tensor = tensor[0]
    return tensor if tensor.dim() == 2 else None


def _tensordot(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Contraction | None:
    first, second = (argument(args, kwargs, place, name, None) for place, name in ((0, "a"), (1, "b")))
    dims = argument(args, kwargs, 2, "dims", 2)
    if not (isinstance(first, Tensor) and isinstance(second, Tensor)) or isinstance(dims, Tensor):
        return None
    if isinstance(dims, int):
        dims = (list(range(-dims, 0)), list(range(dims)))
    here, there = ([one] if isinstance(one, int) else list(one) for one in dims)
    names = [chr(97 + place) for place in range(first.dim() + second.dim())]
    one, other = names[: first.dim()], names[first.dim() :]
    for mine, theirs in zip(here, there, strict=True):
        other[theirs] = one[mine]
    kept = [name for name in one if name not in other] + [name for name in other if name not in one]
    return _einsum(f"{''.join(one)},{''.join(other)}->{''.join(kept)}", [first, second])


def _einsum(equation: str, operands: list[Any]) -> Contraction | None:
    """One index of the matrix in the product, the others summed; every other index of the activation is kept."""
    equation, arrow, result = equation.replace(" ", "").partition("->")
    terms = equation.split(",")
    active = [is_activation(operand) for operand in operands]
    if len(terms) != 2 or sum(active) != 1:
        return None
    if not arrow:
        letters = "".join(terms)
        named = "".join(sorted(letter for letter in set(letters) - {"."} if letters.count(letter) == 1))
        result = ("..." if "." in letters else "") + named
    place = active.index(True)
    x, weight, mine, its = operands[place], operands[1 - place], terms[place], terms[1 - place]
    between = "".join(chr(65 + axis) for axis in range(x.dim() - len(mine.replace("...", ""))))  # of einsum's dots
    mine, result = mine.replace("...", between), result.replace("...", between)
    summed = [letter for letter in its if letter in mine and letter not in result]
    outputs = [letter for letter in its if letter not in mine]
    kept = [letter for letter in mine if letter not in summed]
    whole = all(len(set(letters)) == len(letters) and "." not in letters for letters in (mine, its, result))
    if not (whole and summed and len(outputs) == 1 and len(its) == len(summed) + 1 and set(kept) <= set(result)):
        return None
    into = [mine.index(letter) for letter in (*kept, *summed)]
    back = [(*kept, *outputs).index(letter) for letter in result]
    matrix = weight.permute([its.index(letter) for letter in (*outputs, *summed)]).flatten(1)
    return Contraction(
        x,
        matrix,
        lambda x: x.permute(into).flatten(len(kept)),
        lambda y: y.permute(back),
        result.index(outputs[0]) - len(result),
    )
