"""Tensors in layouts that most operations do not take: sparse ones are written out, nested ones refused."""

import torch
from torch import Tensor

from attrbox.errors import InputError


def dense(tensor: Tensor, what: str) -> Tensor:
    """The same numbers in the usual layout; no copy, where the tensor is in it.

    Args:
        tensor: of any layout: sparse (COO, CSR, CSC, BSR, BSC), of oneDNN, quantized.
        what: what it is, in words, for the message.

    Raises:
        InputError: it is nested, so that it has no shape.
    """
    if tensor.is_nested:
        raise InputError(
            f"Expected {what} as one tensor with one size for all, got a nested tensor. Resize or pad its parts to "
            "one size (torch.nested.to_padded_tensor), or pass them one by one."
        )
    if tensor.is_quantized:
        return tensor.dequantize()
    return tensor if tensor.layout == torch.strided else tensor.to_dense()
