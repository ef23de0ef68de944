"""Hashes of weights and tensors, which tell whether two are the same."""

import hashlib
import re
import weakref
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdRef

from attrbox.errors import ModelError


def weights_hash(model: nn.Module) -> str:
    """SHA-256 of the state dict: names, dtypes, shapes and bytes of its tensors, in the order of their names.

    Devices, memory formats and the order of registration make no difference. Entries that are not tensors are left out.

    Raises:
        ModelError: a tensor has no data (meta device, or not initialised yet).
    """
    tensors = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    for name, value in sorted(tensors.items()):
        if value.is_meta or nn.parameter.is_lazy(value):
            raise ModelError(f"Expected weights with data, but {name!r} has none. Load or initialise the model first.")
    return tensors_hash(tensors)


def architecture_hash(model: nn.Module) -> str:
    """SHA-256 of how the model prints itself: its modules and their settings, without addresses in memory."""
    return hashlib.sha256(re.sub(r"0x[0-9a-f]+", "", repr(model)).encode()).hexdigest()


_known: "weakref.WeakKeyDictionary[nn.Module, tuple[object, str]]" = weakref.WeakKeyDictionary()


def known_weights_hash(model: nn.Module) -> str:
    """`weights_hash`, computed anew only if torch's version counters tell that a tensor was replaced or written to.

    Raises:
        ModelError: as for `weights_hash`.
    """
    tensors = (*model.named_parameters(), *model.named_buffers())
    # By identity too: where a tensor was freed, another one may lie since.
    marks = tuple((name, WeakIdRef(tensor), tensor.data_ptr(), tensor._version) for name, tensor in tensors)
    found = _known.get(model)
    if found is None or found[0] != marks:
        found = _known[model] = marks, weights_hash(model)
    return found[1]


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the names, dtypes, shapes and bytes of tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        digest.update(tensor_bytes(value))
    return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The numbers of a tensor, byte by byte, in the order of its indices."""
    tensor = tensor.detach().cpu()
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    tensor = tensor.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)  # also of one element
    return tensor.reshape(-1).view(torch.uint8).numpy().data
