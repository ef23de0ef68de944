"""An accelerator for machines that have none: a device whose tensors keep a twin on the CPU, which does the work.

Values are those of the CPU, and yet its tensors are as strict as those of a GPU: an operation that mixes them with CPU
tensors raises (0-dim ones may take part), and what makes the host wait for the device is counted. Importing this
registers the device with torch for the rest of the process, so it belongs in a process of its own.
"""

import contextlib
import traceback
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "remote"


class _Generator(torch.Generator):
    """Draws on the CPU for the device too, whose own generators cannot be written in Python."""

    def __new__(cls, device: Any = "cpu") -> "_Generator":
        return super().__new__(cls, "cpu" if torch.device(device).type == NAME else device)


# What the device would need C++ for.
torch.Generator = _Generator  # type: ignore[misc]
torch.accelerator.synchronize = lambda device=None: None


backend_registration._setup_privateuseone_for_python_backend(NAME)
DEVICE = torch.device(NAME, 0)


class Remote(Tensor):
    """A tensor of the device. `twin` is where its values are."""

    twin: Tensor

    @staticmethod
    def __new__(cls, twin: Tensor) -> "Remote":
        layout = {"strides": twin.stride(), "storage_offset": twin.storage_offset(), "dtype": twin.dtype}
        made = Tensor._make_wrapper_subclass(cls, twin.size(), **layout, device=DEVICE)
        made.twin = twin.detach()
        return made

    def __repr__(self) -> str:
        return f"Remote({self.twin!r})"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Remote":
        copy = Remote(self.twin.clone()).requires_grad_(self.requires_grad)
        memo[id(self)] = copy
        return copy

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


# ------------------------------------------------------------------------------------------------------ host reads

reads: Counter[str] = Counter()  # by the line that made the host wait

# Their results, or the shapes of these, are known to the device alone.
_READING = frozenset(
    "_local_scalar_dense equal is_nonzero item nonzero masked_select _unique unique_dim unique_consecutive _unique2 "
    "bincount".split()
)


def _note(name: str) -> None:
    frames = [frame for frame in traceback.extract_stack() if "/attrbox/" in frame.filename]
    place = f"{frames[-1].filename.rpartition('/attrbox/')[2]}:{frames[-1].lineno} {frames[-1].line}" if frames else ""
    reads[f"{name} {place}".strip()] += 1


@contextlib.contextmanager
def counted() -> Iterator[Counter[str]]:
    """Count the host's reads within the block."""
    before = Counter(reads)
    within: Counter[str] = Counter()
    yield within
    within.update(reads - before)


# ------------------------------------------------------------------------------------------------------- operations


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation on tensors of either kind, done by the twins."""
    name = function.__name__.partition(".")[0]
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    remote = [leaf for leaf in leaves if isinstance(leaf, Remote)]
    local = [leaf for leaf in leaves if not isinstance(leaf, Remote) and leaf.dim() > 0]
    device = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    moving = name in ("_to_copy", "copy_")
    if remote and local and not moving and not _indexes(name, args, local):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {function} got one of shape {list(local[0].shape)} on "
            f"the CPU beside one on {DEVICE}."
        )
    to_host = moving and remote and (device is not None and device.type == "cpu" if name == "_to_copy" else local)
    if remote and (name in _READING or to_host or _by_mask(name, args)):
        _note(name)
    if device is not None:
        kwargs = kwargs | {"device": torch.device("cpu") if device.type == NAME else device}
    inner = tree_map(lambda leaf: leaf.twin if isinstance(leaf, Remote) else leaf, (args, kwargs))
    result = function(*inner[0], **inner[1])
    for argument, given in zip(function._schema.arguments, args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write and isinstance(given, Remote):
            if given.twin.shape != given.shape:
                raise NotImplementedError(f"{function} changes the shape of a tensor.")
            if len(function._schema.returns) == 1:
                return given
    on_device = device.type == NAME if device is not None else bool(remote) and not to_host
    if to_host and name == "copy_":
        return args[0]
    return tree_map(lambda leaf: Remote(leaf) if isinstance(leaf, Tensor) else leaf, result) if on_device else result


def _indexes(name: str, args: Any, local: list[Tensor]) -> bool:
    """Whether CPU tensors are only indices into a tensor of the device, which a GPU takes too."""
    return name in ("index", "index_put", "index_put_", "_index_put_impl_") and all(
        any(tensor is index for index in args[1]) for tensor in local
    )


def _by_mask(name: str, args: Any) -> bool:
    """Whether a boolean mask indexes, which has to be counted first."""
    return name == "index" and any(isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1])


class Accelerator(TorchDispatchMode):
    """The device is there while this is entered."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


# What autograd makes in C++, without a mode to see it.
_library = torch.library.Library("aten", "IMPL")


def _empty(size: Any, dtype: Any = None, memory_format: Any = None, **options: Any) -> Remote:
    return Remote(torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format))


def _empty_strided(size: Any, stride: Any, dtype: Any = None, **options: Any) -> Remote:
    return Remote(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    if not isinstance(target, Remote):
        _note("copy_")
    one, other = (tensor.twin if isinstance(tensor, Remote) else tensor for tensor in (source, target))
    other.copy_(one)
    return target


_library.impl("_copy_from", _copy_from, "PrivateUse1")
_library.impl("empty.memory_format", _empty, "PrivateUse1")
_library.impl("empty_strided", _empty_strided, "PrivateUse1")
