"""Which operations need no rule: those that are linear in what depends on the images.

`is_linear` says whether an operation outside the table (`attrbox.engine.operations`) passes differences on unchanged in
form; `is_decision` whether it hides a dependence from autograd altogether. The coverage names what is neither known
nor linear.
"""

from collections.abc import Callable
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
    add iadd radd sub isub rsub subtract neg negative sum mean nansum cumsum trace conv1d conv2d conv3d
    conv_transpose1d conv_transpose2d conv_transpose3d linear avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d
    adaptive_avg_pool2d adaptive_avg_pool3d interpolate upsample upsample_nearest upsample_bilinear pixel_shuffle
    pixel_unshuffle channel_shuffle pad constant_pad_nd zero_pad2d fold unfold cat concat concatenate stack hstack
    vstack dstack column_stack split chunk tensor_split split_with_sizes unbind view reshape view_as reshape_as
    flatten unflatten ravel squeeze unsqueeze transpose permute movedim moveaxis swapaxes swapdims t T mT H
    contiguous expand expand_as broadcast_to repeat repeat_interleave tile flip fliplr flipud roll rot90 narrow
    select index_select getitem setitem gather take_along_dim masked_select diagonal diag tril triu clone to float
    double half bfloat16 type type_as cpu cuda alias requires_grad copy real imag fill zero masked_fill index_add
    index_copy scatter scatter_add where as_strided unsafe_chunk unsafe_split
    """.split()
)
# Linear in one activation if the other arguments are constants: products, quotients, and norms with frozen statistics.
_LINEAR_IN_ONE = frozenset(
    """
    mul imul rmul multiply matmul rmatmul imatmul mm bmm mv dot einsum tensordot addmm addcmul baddbmm outer
    div idiv truediv itruediv divide true_divide bilinear lerp kron chain_matmul inner grid_sample grid_sampler
    """.split()
)
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


def is_linear(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operation outside the table is linear (or affine) in the activations that it was called with."""
    name = name_of(function)
    if name in _LINEAR:
        return True
    activations = [value for value in flat((*args, *kwargs.values())) if is_activation(value)]
    if name in _LINEAR_IN_ONE:
        divisor = argument(args, kwargs, 1, "other", None)
        return len(activations) == 1 and not ("div" in name and is_activation(divisor))
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
