"""Readers of operations on two activations: products, quotients, matrix products, the larger of two."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attrbox.engine.autograd_graph import is_gate
from attrbox.engine.operations.calls import (
    Function,
    Operation,
    Reader,
    argument,
    flat,
    is_activation,
    name_of,
    split,
    writes_in_place,
)
from attrbox.engine.operations.elementwise import spellings
from attrbox.engine.site import FunctionInfo, Gradients, PairInfo, Site


@dataclass(frozen=True)
class Product:
    """A function that is linear in each of some `factors`, to which other arguments may be added.

    Attributes:
        names: of the arguments, in order; none where all are factors.
        factors: each made of one argument or of several, by name.
        constants: arguments that must not depend on the images, such as a divisor.
    """

    names: tuple[str, ...] = ()
    factors: tuple[tuple[str, ...], ...] = ()
    constants: tuple[str, ...] = ()

    def active(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
        """How many factors depend on the images; None if a call is not of this form."""
        if not self.factors:
            return sum(map(is_activation, flat((*args, *kwargs.values()))))
        given = {name: argument(args, kwargs, place, name, None) for place, name in enumerate(self.names)}
        tensors = [name for factor in self.factors for name in factor if name != "weight"]
        if any(isinstance(given[name], int | float) for name in tensors):
            return None  # the deprecated order, with numbers in between
        if any(is_activation(given[name]) for name in self.constants):
            return None
        return sum(any(is_activation(given[name]) for name in factor) for factor in self.factors)

    def adds(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call adds something to the product: a bias, a constant one too."""
        apart = [(place, name) for place, name in enumerate(self.names) if (name,) not in self.factors]
        return any(isinstance(argument(args, kwargs, *place, None), Tensor) for place in apart)


def _form(names: str, *factors: str, constants: str = "") -> Product:
    parts = tuple(tuple(factor.split()) for factor in factors)
    return Product(tuple(names.split()), parts, tuple(constants.split()))


# By name of the function. A product of two activations is a site; a bias, or another addend, is none of its factors.
PRODUCTS: dict[str, Product] = {
    **dict.fromkeys(
        """
        mul imul rmul multiply matmul rmatmul imatmul mm bmm mv dot vdot vecdot inner outer ger kron cross tensordot
        einsum chain_matmul multi_dot
        """.split(),
        Product(),
    ),
    **dict.fromkeys(
        "div idiv truediv itruediv divide true_divide".split(), _form("input other", "input", constants="other")
    ),
    "addmm": _form("input mat1 mat2", "mat1", "mat2"),
    "addbmm": _form("input batch1 batch2", "batch1", "batch2"),
    "baddbmm": _form("input batch1 batch2", "batch1", "batch2"),
    "addmv": _form("input mat vec", "mat", "vec"),
    "addr": _form("input vec1 vec2", "vec1", "vec2"),
    "addcmul": _form("input tensor1 tensor2", "tensor1", "tensor2"),
    "addcdiv": _form("input tensor1 tensor2", "tensor1", constants="tensor2"),
    "lerp": _form("input end weight", "input end", "weight"),
    "linear": _form("input weight bias", "input", "weight"),
    "bilinear": _form("input1 input2 weight bias", "input1", "input2", "weight"),
    **dict.fromkeys(
        [f"conv{turned}{dims}d" for turned in ("", "_transpose") for dims in (1, 2, 3)],
        _form("input weight bias", "input", "weight"),
    ),
    **dict.fromkeys(("grid_sample", "grid_sampler"), _form("input grid", "input", constants="grid")),
}


def product_of(function: Function) -> Product | None:
    """What a function multiplies, if that is all it does."""
    return PRODUCTS.get(name_of(function).removeprefix("linalg_"))


def _product(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operation | None:
    first, rest, kwargs = split(args, kwargs)
    second = argument(rest, kwargs, 0, "other", None)
    if not (is_activation(first) and is_activation(second)) or kwargs.get("out") is not None:
        return None
    info = PairInfo(gates=(is_gate(first), is_gate(second)))
    writes = writes_in_place(function, rest, kwargs)
    return Operation("product", (first, second), function, torch.mul, writes, info=info)


def _quotient(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operation | None:
    """a / b with an activation b; of a number a, the reciprocal is a power of b."""
    above, rest, kwargs = split(args, kwargs)
    below = argument(rest, kwargs, 0, "other", None)
    if function in _TURNED:
        above, below = below, above
    if not is_activation(below) or kwargs.get("out") is not None or kwargs.get("rounding_mode") is not None:
        return None
    if not isinstance(above, Tensor):
        return Operation("power", (below,), lambda b: above / b, lambda b: above / b, info=FunctionInfo())
    if not above.is_floating_point():
        return None
    writes = writes_in_place(function, rest, kwargs)
    run = function if writes else torch.div
    info = PairInfo(constant=not is_activation(above))
    return Operation("quotient", (above, below), run, torch.div, writes, info=info)


_TURNED = frozenset({Tensor.__rtruediv__, Tensor.__rdiv__})


def _bilinear(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operation | None:
    """A call that is linear in each of two activations, wherever in its arguments they are, and adds nothing."""
    if function is torch.einsum and len(args) == 2 and isinstance(args[1], tuple | list):
        args = (args[0], *args[1])
    values = [*args, *kwargs.values()]
    places = [place for place, value in enumerate(values) if is_activation(value)]
    product = product_of(function)
    if product is None or product.adds(args, kwargs) or len(places) != 2 or kwargs.get("out") is not None:
        return None

    def run(*factors: Tensor) -> Any:
        filled = list(values)
        for place, factor in zip(places, factors, strict=True):
            filled[place] = factor
        return function(*filled[: len(args)], **dict(zip(kwargs, filled[len(args) :], strict=True)))

    first, second = (values[place] for place in places)
    plain = function in _MATRIX_PRODUCTS and first.dim() > 1 and second.dim() > 1
    pull = _matmul_pull if plain else None
    return Operation("matmul", (first, second), run, run, pull=pull, pulls_from="input", info=PairInfo())


def _matmul_pull(site: Site, grad_output: Tensor) -> Gradients:
    first, second = site.inputs
    return grad_output @ second.mT, first.mT @ grad_output


_MATRIX_PRODUCTS = frozenset({*spellings("matmul", "mm", "bmm"), Tensor.__matmul__})


def _extremum(sign: int) -> Reader:
    """max(a, b) and min(a, b), element by element, for sign 1 and -1; one of the two may be constant."""

    def read(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operation | None:
        first, rest, kwargs = split(args, kwargs)
        second = argument(rest, kwargs, 0, "other", None)
        both = (first, second)
        if not all(isinstance(t, Tensor) and t.is_floating_point() for t in both) or kwargs.get("out") is not None:
            return None
        if not any(is_activation(t) for t in both):
            return None
        run = torch.maximum if sign > 0 else torch.minimum
        return Operation("maximum", both, run, run, info=PairInfo(sign=sign))

    return read


READERS: dict[Reader, tuple[Function, ...]] = {
    _product: (*spellings("mul", "multiply"), Tensor.__mul__, Tensor.__rmul__, Tensor.__imul__),
    _quotient: (
        *spellings("div", "divide", "true_divide"),
        *(Tensor.__truediv__, Tensor.__rtruediv__, Tensor.__div__, Tensor.__rdiv__),
        *(Tensor.__itruediv__, Tensor.__idiv__),
    ),
    _bilinear: (
        *_MATRIX_PRODUCTS,
        *spellings("mv", "dot", "vdot", "inner", "outer", "ger", "kron", "cross", "tensordot", "einsum", "bilinear"),
        *(torch.linalg.matmul, torch.linalg.vecdot, torch.linalg.cross, F.linear, Tensor.__rmatmul__),
        *(torch.conv1d, torch.conv2d, torch.conv3d),
        *(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
    ),
    _extremum(1): spellings("maximum", "max", "fmax"),
    _extremum(-1): spellings("minimum", "min", "fmin"),
}
