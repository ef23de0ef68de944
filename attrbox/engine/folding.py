"""Folding of batch-norm into convolutions, operation by operation, for passes that nobody watches.

In evaluation mode a batch-norm behind a convolution is a fixed scale and shift of its channels:

    bn(conv(x; w, b)) = conv(x; w s, (b - mean) s + shift),     s = weight / sqrt(variance + eps)

`Folding.of` watches one forward pass and finds the convolutions whose output goes into a batch-norm and nowhere else;
`running()` then runs the model with both in one step, which spares two passes over memory forwards and two backwards.
The model itself is not touched, and is not retraced: should it take another way with other images, so that a folded
output is used elsewhere, `Unfolded` is raised, and `Unwatched` runs the pass natively.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attrbox.engine.operations.batch_norm import BatchNorm, batch_norm_of
from attrbox.engine.operations.calls import argument, flat

T = TypeVar("T")

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# A model that asks for these may hook onto a gradient.
_OF_GRADIENTS = frozenset({vars(torch._C.TensorBase)[name].__get__ for name in ("requires_grad", "grad_fn")})
_CONVOLUTIONS = frozenset({torch.conv1d, torch.conv2d, torch.conv3d})


class Unfolded(Exception):  # noqa: N818 - a signal between two parts of the engine, not an error
    """The model used the output of a folded convolution in another way than before."""


@dataclass(frozen=True)
class Folding:
    """Folded weights by the identity of the convolution's own: (own weight, folded weight, folded bias)."""

    weights: dict[int, tuple[Tensor, Tensor, Tensor]]

    @classmethod
    def of(cls, model: nn.Module, images: Tensor) -> "Folding | None":
        """What can be folded in `model` as it runs on `images`; None if nothing can."""
        modules = list(model.modules())
        if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in modules):
            return None
        if any(getattr(module, hooks) for module in modules for hooks in _HOOKS):
            return None  # a hook may look at a convolution's output, or at its gradient
        watching = _Watching(frozenset(id(tensor) for tensor in (*model.parameters(), *model.buffers())))
        with torch.no_grad(), watching:
            model(images.clone())
        weights = {}
        for key, (weight, bias, norm) in watching.pairs.items():
            if key not in watching.spoilt:
                folded, shift = norm.joined(weight, bias)
                if weight.dim() == 4 and images.is_contiguous(memory_format=torch.channels_last):
                    folded = folded.contiguous(memory_format=torch.channels_last)  # else each pass converts them
                weights[key] = (weight, folded, shift)
        return cls(weights) if weights else None

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Within, a forward pass of the model runs folded.

        Raises:
            Unfolded: the output of a folded convolution was used elsewhere than in its batch-norm.
        """
        mode = _Running(self.weights)
        with mode:
            yield
        if mode.due:
            raise Unfolded


class Unwatched:
    """Passes of a model that nobody watches, in the fastest way: batch-norm folded for as long as that works.

    The weights must not change meanwhile.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._folding: Folding | None = None
        self._tried = False

    def run(self, images: Tensor, function: Callable[[Tensor], T]) -> T:
        """`function(images)`, which runs the model; run again natively if the model could not be run folded."""
        if not self._tried:
            self._tried = True
            with contextlib.suppress(Exception):  # a model that fails does so again below, where it is said why
                self._folding = Folding.of(self._model, images[:1])
        if self._folding is not None:
            try:
                with self._folding.running():
                    return function(images)
            except Unfolded:  # these images take another way through the model; the next ones may do so too
                self._folding = None
        return function(images)


class _Watching(TorchFunctionMode):
    """Finds pairs of a convolution and the batch-norm that alone uses its output.

    Both must be made of the model's own parameters and buffers (`constants`, by identity): what the model computes in
    its forward pass may depend on the images, and is another tensor in each pass.
    """

    def __init__(self, constants: frozenset[int]) -> None:
        super().__init__()
        self._constants = constants
        self.pairs: dict[int, tuple[Tensor, Tensor | None, BatchNorm]] = {}
        self.spoilt: set[int] = set()
        self._outputs: dict[int, tuple[Tensor, Tensor, Tensor | None]] = {}  # by identity; kept alive, so unique

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        used = [t for t in flat((*args, *kwargs.values())) if id(t) in self._outputs]
        norm = batch_norm_of(function, args, kwargs) if function is F.batch_norm and used else None
        if norm is not None:
            _, weight, bias = self._outputs[id(used[0])]
            key = id(weight)
            fixed = self._fixed(weight, bias, norm.mean, norm.variance, norm.weight, norm.bias)
            if (
                norm.affine is None or not fixed or key in self.pairs
            ):  # batch statistics, or a second batch-norm or call
                self.spoilt.add(key)
            else:
                self.pairs[key] = (weight, bias, norm)
        elif used and any(isinstance(value, Tensor) for value in flat((result,))):
            self.spoilt.update(id(self._outputs[id(t)][1]) for t in used)
        if function in _CONVOLUTIONS:
            weight = argument(args, kwargs, 1, "weight", None)
            self._outputs[id(result)] = (result, weight, argument(args, kwargs, 2, "bias", None))
        return result

    def _fixed(self, *tensors: Tensor | None) -> bool:
        return all(tensor is None or id(tensor) in self._constants for tensor in tensors)


class _Running(TorchFunctionMode):
    """Runs folded convolutions, and lets their batch-norms pass.

    The model gets a stand-in for a folded output, so that any use of it but the batch-norm can be told, before it and
    after it. It is not kept alive.
    """

    def __init__(self, weights: dict[int, tuple[Tensor, Tensor, Tensor]]) -> None:
        super().__init__()
        self.due: dict[int, Tensor] = {}  # folded outputs that wait for their batch-norm, by their stand-in's identity
        self._weights = weights
        self._stand_ins: dict[int, weakref.ref[Tensor]] = {}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        used = [t for t in flat((*args, *kwargs.values())) if id(t) in self._stand_ins]
        used = [t for t in used if self._stand_ins[id(t)]() is t]
        if used and function is F.batch_norm and id(used[0]) in self.due:
            return self.due.pop(id(used[0]))
        folded = self._weights.get(id(argument(args, kwargs, 1, "weight", None))) if function in _CONVOLUTIONS else None
        if folded is not None:
            kwargs = {key: value for key, value in kwargs.items() if key not in ("weight", "bias")}
            result = function(*args[:1], *folded[1:], *args[3:], **kwargs)
            stand_in = result.detach()
            self.due[id(stand_in)], self._stand_ins[id(stand_in)] = result, weakref.ref(stand_in)
            result = stand_in
        else:
            result = function(*args, **kwargs)
        if used and (function in _OF_GRADIENTS or any(isinstance(value, Tensor) for value in flat((result,)))):
            raise Unfolded
        return result
