"""What a forward pass is made of, by its autograd graph, node by node as operations are intercepted.

Three things are read off the graph:

- Constants. A tensor that requires a gradient, but does not come from the images (a parameter of a module that the
  model does not own, say), is no activation. Leaves are frozen until the pass ends; others are handed on detached.
- What went past the function mode. An activation that no intercepted call made comes from custom autograd functions,
  scripted functions, `torch.vmap`, or another thread. The nodes in between are named.
- Depth. An activation is deep if a layer (a convolution or linear layer that a rule treats) lies between it and the
  images.
"""

import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction

from attrbox.engine.operations.calls import flat


class Passage:
    """The autograd graph of one pass, as far as it has come."""

    def __init__(self) -> None:
        self._deep: dict[Any, bool] = {}  # known node -> whether it is deep
        self._constant: set[Any] = set()
        self._own: dict[int, Tensor] = {}  # leaves that the model made in this pass
        self._frozen: list[Tensor] = []

    def begin(self, images: Tensor) -> None:
        """Start from the images that the model gets, which are no leaf."""
        self._deep[images.grad_fn] = False

    def end(self) -> None:
        """Let the leaves that were frozen require gradients again, and forget the graph."""
        for tensor in self._frozen:
            tensor.requires_grad_()
        self.__init__()  # type: ignore[misc]

    def arriving(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, dict[str, bool]]:
        """Look at the arguments of a call.

        Returns:
            The arguments, without gradients where they are constants, and the names of what made them unseen; of each
            name, whether it is an autograd function of the model's own.
        """
        unseen: dict[str, bool] = {}
        constants = False
        for value in flat((*args, *kwargs.values())):
            if isinstance(value, Tensor) and value.requires_grad:
                node = value.grad_fn
                if node is None:
                    self._freeze(value)
                elif node in self._constant:
                    constants = True
                elif node not in self._deep:
                    found, reached, deep = self._explore(node)
                    if reached:
                        self._deep.update(dict.fromkeys(found, deep))
                        unseen |= _named(found)
                    else:
                        self._constant.update(found)
                        constants = True
        if constants:
            args, kwargs = self._detached(args), {name: self._detached(value) for name, value in kwargs.items()}
        return args, kwargs, unseen

    def made(self, result: Any, args: tuple[Any, ...], layer: bool = False) -> None:
        """Note what a call returned; with `layer`, a layer did."""
        for value in flat((result, *args[:1])):  # a call may write into its first argument
            if not isinstance(value, Tensor) or not value.requires_grad:
                continue
            node = value.grad_fn
            if node is None:
                self._own[id(value)] = value
            elif node not in self._deep and node not in self._constant:
                found, _, deep = self._explore(node)
                self._deep.update(dict.fromkeys(found, deep or layer))

    def is_deep(self, activation: Tensor) -> bool:
        """Whether a layer lies between the images and an activation."""
        return self._deep.get(activation.grad_fn, False)

    def _freeze(self, leaf: Tensor) -> None:
        if id(leaf) not in self._own:
            self._frozen.append(leaf.requires_grad_(False))

    def _explore(self, node: Any) -> tuple[list[Any], bool, bool]:
        """New nodes that a node comes from, whether it comes from known ones, and whether one of these is deep."""
        found: dict[Any, None] = {}
        todo, reached, deep = [node], False, False
        while todo:
            one = todo.pop()
            if one in self._deep:
                reached, deep = True, deep or self._deep[one]
            elif one is not None and one not in found:
                found[one] = None
                todo.extend(following for following, _ in one.next_functions)
        return list(found), reached, deep

    def _detached(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach() if value.requires_grad and value.grad_fn in self._constant else value
        if type(value) in (tuple, list):
            return type(value)(map(self._detached, value))
        return value


# Of the names of nodes that move values or add them up.
_HARMLESS = re.compile(
    r"""(torch::autograd::)?(AccumulateGrad|Copy|Clone|Alias|ToCopy|View|UnsafeView|ReshapeAlias|Permute|Transpose|T|Squeeze
    |Unsqueeze|Slice|Select|Expand|AsStrided|Add|Sub|Rsub|Neg|Sum|Mean|Cat|Stack|Split|SplitWithSizes|Unbind|Index|Repeat
    |Flip|Roll|ConstantPadNd|Diagonal|Detach)(Slices|s)?(Backward)?\d*$""",
    re.VERBOSE,
)


def _named(nodes: Iterable[Any]) -> dict[str, bool]:
    """What made activations unseen, without what is linear whatever its inputs; of each, whether it is a function of
    the model's own."""
    makers = [node for node in nodes if not _HARMLESS.match(type(node).__name__)]
    return {_name(node): isinstance(node, BackwardCFunction) for node in makers}


def _name(node: Any) -> str:
    if isinstance(node, BackwardCFunction):
        return type(node).__name__.removesuffix("Backward")  # as the model's author calls it
    name = re.sub(r"Backward\d*$", "", type(node).__name__)
    return "scripted function" if name == "DifferentiableGraph" else re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
