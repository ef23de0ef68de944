"""Results that stay: each in a file whose name says what it is, with a digest of what it depends on."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from quality import kept
from torch import Tensor, nn

T = TypeVar("T")


def digest(*things: Any) -> str:
    """Ten letters that depend on tensors, models' weights, mappings, and whatever else has a `repr`."""
    total = hashlib.sha256()

    def add(thing: Any) -> None:
        if isinstance(thing, Tensor):
            add((tuple(thing.shape), str(thing.dtype)))
            total.update(thing.detach().cpu().contiguous().numpy().tobytes())
        elif isinstance(thing, nn.Module):
            add(repr(thing))
            add(thing.state_dict())
        elif isinstance(thing, Mapping):
            for key in thing:
                add(key)
                add(thing[key])
        else:
            total.update(repr(thing).encode())

    for thing in things:
        add(thing)
    return total.hexdigest()[:10]


@dataclass(frozen=True)
class Kept:
    """A folder of results."""

    folder: Path

    def path(self, name: str, *depends: Any) -> Path:
        """Where a result is, whether or not it is there."""
        return self.folder / f"{name.replace('/', '-').replace(':', '-')} {digest(*depends)}.pt"

    def __call__(self, name: str, depends: tuple[Any, ...], compute: Callable[[], T]) -> T:
        """What `compute` returns, or returned in an earlier run: tensors, numbers, texts, lists and dictionaries."""
        found: T = kept(self.path(name, *depends), compute)
        return found
