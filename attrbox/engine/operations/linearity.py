"""Which operations need no rule: those that are linear in what depends on the images.

`is_linear` says whether an operation outside the table (`attrbox.engine.operations.table`) passes differences on
unchanged in form; `is_decision` whether it hides a dependence from autograd altogether. The coverage names what is
neither known nor linear.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Function = Callable[..., Any]


def is_activation(value: object) -> bool:
    """Whether a value depends on the images: with frozen parameters, whether it requires a gradient."""
    return isinstance(value, Tensor) and value.requires_grad


def argument(rest: tuple[Any, ...], kwargs: dict[str, Any], position: int, name: str, default: Any) -> Any:
    """An argument of a call, by position or name."""
    return kwargs[name] if name in kwargs else rest[position] if len(rest) > position else default


# Operations through which a difference passes unchanged in form (linear in their one activation, batch statistics
# frozen), and those that only move values. Named as torch names them, without the underscores of in-place and operator
# spellings. What is in neither table is a non-linear operation that no rule knows; the coverage names it.
_LINEAR = frozenset(
    """
    add iadd radd sub isub rsub subtract neg negative sum mean nansum cumsum trace avg_pool1d avg_pool2d avg_pool3d
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d affine_grid embedding interpolate upsample
    upsample_nearest upsample_bilinear pixel_shuffle pixel_unshuffle channel_shuffle pad constant_pad_nd zero_pad2d
    fold unfold cat concat concatenate stack hstack vstack dstack column_stack split chunk tensor_split
    split_with_sizes pack_padded_sequence pad_packed_sequence pad_sequence unbind view reshape view_as reshape_as
    flatten unflatten ravel squeeze unsqueeze transpose permute movedim moveaxis swapaxes swapdims t T mT H
    contiguous expand expand_as broadcast_to repeat repeat_interleave tile flip fliplr flipud roll rot90 narrow
    select index_select getitem setitem gather take_along_dim masked_select diagonal diag tril triu clone to float
    double half bfloat16 type type_as cpu cuda alias requires_grad copy real imag fill zero masked_fill index_add
    index_copy scatter scatter_add where as_strided unsafe_chunk unsafe_split
    """.split()
)


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


def _product(names: str, *factors: str, constants: str = "") -> Product:
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
        "div idiv truediv itruediv divide true_divide".split(), _product("input other", "input", constants="other")
    ),
    "addmm": _product("input mat1 mat2", "mat1", "mat2"),
    "addbmm": _product("input batch1 batch2", "batch1", "batch2"),
    "baddbmm": _product("input batch1 batch2", "batch1", "batch2"),
    "addmv": _product("input mat vec", "mat", "vec"),
    "addr": _product("input vec1 vec2", "vec1", "vec2"),
    "addcmul": _product("input tensor1 tensor2", "tensor1", "tensor2"),
    "addcdiv": _product("input tensor1 tensor2", "tensor1", constants="tensor2"),
    "lerp": _product("input end weight", "input end", "weight"),
    "linear": _product("input weight bias", "input", "weight"),
    "bilinear": _product("input1 input2 weight bias", "input1", "input2", "weight"),
    **dict.fromkeys(
        [f"conv{turned}{dims}d" for turned in ("", "_transpose") for dims in (1, 2, 3)],
        _product("input weight bias", "input", "weight"),
    ),
    **dict.fromkeys(("grid_sample", "grid_sampler"), _product("input grid", "input", constants="grid")),
}
# Their results carry no gradient, yet the output depends on them: x * (x > 0) is a ReLU that no engine can see.
_DECISIONS = frozenset(
    """
    gt lt ge le eq ne greater less greater_equal less_equal sign sgn floor ceil round trunc argmax argmin argsort
    detach item tolist heaviside bucketize
    """.split()
)
_DROPOUT = frozenset(
    """
    dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout feature_dropout
    """.split()
)


def name_of(function: Function) -> str:
    """The name of an operation without the marks of its spelling: `__iadd__` and `add_` are "iadd" and "add"."""
    name = getattr(function, "__name__", type(function).__name__)
    if name == "__get__":  # a property such as Tensor.T
        name = getattr(getattr(function, "__self__", None), "__name__", name)
    return name.strip("_")


def product_of(function: Function) -> Product | None:
    """What a function multiplies, if that is all it does."""
    return PRODUCTS.get(name_of(function).removeprefix("linalg_"))


def is_linear(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operation outside the table is linear (or affine) in the activations that it was called with."""
    name = name_of(function)
    if name in _LINEAR:
        return True
    product = product_of(function)
    if product is not None:
        active = product.active(args, kwargs)
        return active is not None and active <= 1
    if name in _DROPOUT:
        return not argument(args, kwargs, 2, "training", True)
    return False


def is_decision(function: Function) -> bool:
    """Whether an operation cuts the gradient although the output may depend on its result."""
    return name_of(function) in _DECISIONS


def flat(values: Any) -> Any:
    """What is in nested tuples and lists, one after the other."""
    for value in values:
        if isinstance(value, tuple | list):
            yield from flat(value)
        else:
            yield value
