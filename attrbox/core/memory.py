"""Memory: how many images fit into one pass, and what to do when they did not.

One place serves all methods. `images_per_pass` bounds a pass by the activations that one image leaves on the autograd
graph; `backing_off` halves the bound when memory runs out all the same.
"""

import ctypes
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from attrbox.errors import OutOfMemoryError

T = TypeVar("T")

# Beyond this many images a CPU gets slower per image (its caches overflow) and a GPU hardly faster.
MOST_PER_PASS = {"cpu": 10, "cuda": 128}
# Share of the free memory that activations may take: the rest is for work space, gradients and other processes.
USABLE = 0.4


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on any device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


def free_bytes(device: torch.device) -> int:
    """Free memory of a device, in bytes; of the machine, for a CPU."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        pages = os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**20
        return pages * 4096 // 2


def keep_pages() -> bool:
    """Let this process keep the memory that it frees, for its next tensors; returns whether that could be arranged.

    glibc hands the pages of large tensors back to the system, and on a CPU getting fresh ones costs more than the
    arithmetic of an activation. The setting holds for the whole process, so it is for programs of one's own: the
    command line calls it, `import attrbox` does not. It does nothing without glibc.
    """
    try:
        library = ctypes.CDLL(None)
        mallopt = library.mallopt
        library.gnu_get_libc_version  # noqa: B018 - other libraries have a mallopt that means something else
    except (OSError, AttributeError, TypeError):
        return False
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    most = 2**31 - 1
    return bool(mallopt(trim_threshold, most)) and bool(mallopt(mmap_threshold, most))


class SavedBytes:
    """Counts what autograd keeps during a forward pass: `with SavedBytes() as saved: ...; saved.total`."""

    def __init__(self) -> None:
        self.total = 0
        self._seen: set[int] = set()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def __enter__(self) -> "SavedBytes":
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._hooks.__exit__(*exception)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, torch.nn.Parameter) and storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self.total += storage.nbytes()
        return tensor


def images_per_pass(images: Tensor, forward: Callable[[Tensor], object] | None, wanted: int, held: float = 1.0) -> int:
    """How many images one forward and backward pass should take, at most `wanted`.

    Up to eight images are simply run. For more, one image is forwarded to see what it leaves in memory; a method may
    hold `held` times as much. Without `forward` nothing is left behind: passes without gradients.
    """
    device = images.device
    limit = min(wanted, MOST_PER_PASS.get(device.type, 32))
    if forward is None or (limit <= 8 and held <= 1) or limit == 1 or images.is_meta:
        return max(limit, 1)
    with SavedBytes() as saved:
        forward(images[:1].clone().requires_grad_())
    per_image = held * max(saved.total, images[:1].numel() * images.element_size())
    return max(1, min(limit, int(free_bytes(device) * USABLE / per_image)))


def backing_off(size: int, work: Callable[[int], T]) -> tuple[T, int]:
    """Run `work(size)`, halving the size whenever memory runs out; returns the result and the size that worked.

    Raises:
        OutOfMemoryError: even one image does not fit.
    """
    while True:
        try:
            return work(size), size
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if size == 1:
                raise OutOfMemoryError(
                    f"Not even one image fits into memory ({error}). Use smaller images, a smaller model, "
                    "precision=torch.bfloat16, or a device with more memory."
                ) from error
        size = max(1, size // 2)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
