"""What a model returned: its scores, and every tensor in it.

`unwrap` finds the tensor of class scores in `.logits`, a dictionary or a tuple. A function as the target gets the
whole of it.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from attrbox.errors import ForwardError, ModelError


def unwrap(output: Any) -> Tensor:
    """The tensor of class scores in what a model returned: itself, `.logits`, "logits" or "out", or the first item.

    Raises:
        ModelError: no floating-point tensor is found.
    """
    found = output
    if not isinstance(found, Tensor):
        if isinstance(getattr(output, "logits", None), Tensor):
            found = output.logits
        elif isinstance(output, Mapping):
            tensors = [value for value in output.values() if isinstance(value, Tensor)]
            found = next((output[key] for key in ("logits", "out") if key in output), None)
            if found is None and len(tensors) == 1:
                found = tensors[0]
        elif isinstance(output, Sequence) and output:
            found = output[0]
    if not isinstance(found, Tensor) or not found.is_floating_point():
        raise ModelError(
            f"Expected the model to return a floating-point tensor of scores (or an object with .logits, a dictionary "
            f"with 'logits', or a tuple that begins with it), got {described(output)}. Wrap the model so that it does, "
            "or give a function as the target that takes the scores out of it."
        )
    return found


@dataclass(frozen=True, eq=False)
class Outputs:
    """What a model returned for some images.

    Attributes:
        returned: just that.
        count: how many images it saw.
        doubled: what it returns for two copies of its one image; tells whether it drops the batch axis of one.
    """

    returned: Any
    count: int
    doubled: Callable[[], Any] | None = None

    @cached_property
    def scores(self) -> Tensor:
        """The class scores, [count, ...].

        Raises:
            ModelError: there are none, or not one row per image.
        """
        found = unwrap(self.returned)
        if found.dim() and len(found) == self.count:
            return found
        if self.count == 1 and self.doubled is not None and unwrap(self.doubled()).shape == (2, *found.shape):
            return found[None]  # it squeezes a batch of one
        single = "" if self.count == 1 else " A single image needs a batch axis: images[None]."
        raise ModelError(
            f"Expected one row of outputs per image, {self.count} in all, got {list(found.shape)}. Let the first axis "
            f"of the model's output be the batch.{single}"
        )

    @cached_property
    def batched(self) -> Any:
        """What the model returned, with the batch axis of one image put back where the model drops it."""
        found = list(tensors(self.returned))
        if self.count != 1 or self.doubled is None or all(leaf.dim() and len(leaf) == 1 for leaf in found):
            return self.returned
        try:
            pair = list(tensors(self.doubled()))
        except ForwardError:  # a model that takes no two images
            return self.returned
        if len(pair) != len(found):
            return self.returned
        shapes = iter([leaf.shape for leaf in pair])
        return mapped(self.returned, lambda leaf: leaf[None] if next(shapes) == (2, *leaf.shape) else leaf)

    @property
    def predicted(self) -> Tensor | None:
        """The class with the largest score of each image, [count]; None if the model returns no [count, classes]."""
        try:
            scores = self.scores
        except ModelError:
            return None
        return scores.detach().argmax(1) if scores.dim() == 2 and scores.shape[1] else None


def described(output: Any) -> str:
    """What a model returned, in a few words for a message."""
    if isinstance(output, Tensor):
        return f"a tensor of {output.dtype}, {list(output.shape)}"
    if isinstance(output, Mapping):
        return f"{type(output).__name__} with the keys {list(output)[:10]}"
    if isinstance(output, tuple | list):
        kinds = [f"tensor {list(item.shape)}" if isinstance(item, Tensor) else type(item).__name__ for item in output]
        return f"{type(output).__name__} of {kinds[:10]}"
    return type(output).__name__


def mapped(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same structure with every tensor in it changed: in dictionaries, sequences and objects with attributes."""
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, Mapping):
        return _with_items(output, {key: mapped(value, change) for key, value in output.items()})
    if isinstance(output, tuple | list):
        items = [mapped(item, change) for item in output]
        if type(output) in (tuple, list):
            return type(output)(items)
        return output._make(items) if hasattr(output, "_make") else type(output)(items)
    if isinstance(output, type) or callable(output):
        return output
    attributes = {name: getattr(output, name) for name in _attributes(output)}
    changed = {name: mapped(value, change) for name, value in attributes.items()}
    if all(changed[name] is value for name, value in attributes.items()):
        return output
    made = copy.copy(output)
    for name, value in changed.items():
        object.__setattr__(made, name, value)  # also of a frozen dataclass
    return made


def _with_items(output: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    """A mapping of the same type with other values."""
    if not hasattr(output, "__setitem__"):  # a read-only view
        return type(output)(items)  # type: ignore[call-arg]
    made = copy.copy(output)
    for key, value in items.items():
        made[key] = value
    return made


def _attributes(output: Any) -> list[str]:
    """The names of what an object holds, in a dictionary or in slots."""
    slots = [getattr(part, "__slots__", ()) for part in type(output).__mro__]
    names = [name for part in slots for name in ((part,) if isinstance(part, str) else part)]
    names = [name for name in names if not name.startswith("__") and hasattr(output, name)]
    return [*names, *getattr(output, "__dict__", ())]


def tensors(output: Any) -> Iterator[Tensor]:
    """Every tensor in what a model returned."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    mapped(output, note)
    return iter(found)
