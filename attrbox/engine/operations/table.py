"""The table of operations: what the engine knows of each torch function.

Every spelling of an operation is one entry: functional, method, in place; modules end up in one of these. A function in
the table is a site, or is made of sites. Of all others, `is_linear` tells whether they pass differences on unchanged in
form, and so need no rule, and `cuts` whether they hide a dependence from autograd altogether. The coverage names
what is neither known nor linear.
"""

from typing import Any

from torch import Tensor

from attrbox.engine.operations import elementwise, products, reductions
from attrbox.engine.operations.calls import Function, Operation, Parts, Reader, argument, flat, is_activation, name_of
from attrbox.engine.operations.decompositions import PARTS
from attrbox.engine.operations.products import product_of

_TABLE: dict[Function, Reader] = {
    function: reader
    for readers in (elementwise.READERS, reductions.READERS, products.READERS)
    for reader, spellings in readers.items()
    for function in spellings
}


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
    select index_select getitem view_as_real view_as_complex conj resolve_conj resolve_neg
    fft_fft fft_fft2 fft_fftn fft_ifft fft_ifft2 fft_ifftn fft_rfft fft_rfft2 fft_rfftn fft_irfft fft_irfft2 fft_irfftn
    fft_hfft fft_ihfft fft_fftshift fft_ifftshift
    setitem gather take_along_dim masked_select diagonal diag tril triu clone to float
    double half bfloat16 type type_as cpu cuda alias requires_grad copy real imag fill zero masked_fill index_add
    index_copy scatter scatter_add where as_strided unsafe_chunk unsafe_split
    """.split()
)


# Functions whose results do not change with an activation's values, or not as long as these are finite.
_INDEPENDENT = frozenset(
    """
    empty_like zeros_like ones_like full_like rand_like randn_like randint_like new_empty new_zeros new_ones new_full
    new_tensor isnan isinf isfinite is_nonzero shape size stride storage_offset grad
    """.split()
)
# Functions that take the size or dtype of their other argument.
_AS_ANOTHER = frozenset("expand_as view_as reshape_as type_as to copy_as broadcast_tensors".split())
# Conversions to numbers of Python.
_CONVERSIONS = frozenset("item tolist float int index bool complex numpy array".split())
_DROPOUT = frozenset(
    """
    dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout feature_dropout
    """.split()
)


def interpret(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operation | None:
    """The operation behind an intercepted call, or None if it is not in the table or touches no activation."""
    reader = _TABLE.get(function)
    return None if reader is None else reader(function, args, kwargs)


def parts_of(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Parts | None:
    """The parts of a call, or None if it has none or touches no activation."""
    parts = PARTS.get(function)
    if parts is None or not any(is_activation(value) for value in flat((*args, *kwargs.values()))):
        return None
    return parts if parts.accepts(args, kwargs) else None


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


def cuts(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> bool:
    """Whether a call took an activation and cuts the gradient, although the output may depend on its result.

    x * (x > 0) is a ReLU that no engine can see; so is what `detach`, `item` or `torch.no_grad` hand on.
    """
    name = name_of(function)
    if name in _INDEPENDENT if isinstance(result, Tensor) else name not in _CONVERSIONS:
        return False
    given = args[:1] if name in _AS_ANOTHER else (*args, *kwargs.values())
    return any(map(is_activation, flat(given)))
