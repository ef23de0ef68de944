"""What a forward pass is made of, by its autograd graph, node by node as operations are intercepted.

Four things are read off the graph:

- Constants. A tensor that requires a gradient, but does not come from the images (a parameter of a module that the
  model does not own, say), is no activation. Leaves are frozen until the pass ends; others are handed on detached.
- What went past the function mode. An activation that no intercepted call made comes from custom autograd functions,
  scripted functions, `torch.vmap`, or another thread. The nodes in between are named.
- Where the images lie, for layers and sites whose rows are taken for images (`attrbox.engine.batch_axis`).
- Depth. An activation is deep if a layer (a convolution or linear layer that a rule treats) lies between it and the
  images.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction

from attrbox.engine.batch_axis import ROWS, Place, place_after
from attrbox.engine.operations.calls import Function, flat, is_activation


class Passage:
    """The autograd graph of one pass, as far as it has come."""

    def __init__(self) -> None:
        self._deep: dict[Any, bool] = {}  # known node -> whether it is deep
        self._places: dict[Any, Place | None] = {}  # known node -> where the images lie
        self._count = 1  # images
        self._constant: set[Any] = set()
        self._own: dict[int, Tensor] = {}  # leaves that the model made in this pass
        self._frozen: list[Tensor] = []

    def begin(self, images: Tensor) -> None:
        """Start from the images that the model gets, which are no leaf."""
        self._deep[images.grad_fn] = False
        self._places[images.grad_fn], self._count = ROWS, len(images)

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
                        self._places[node] = self._place_before(node)
                        unseen |= _named(found)
                    else:
                        self._constant.update(found)
                        constants = True
        if constants:
            args, kwargs = self._detached(args), {name: self._detached(value) for name, value in kwargs.items()}
        return args, kwargs, unseen

    def made(self, result: Any, function: Function, args: Any, kwargs: dict[str, Any], layer: bool = False) -> None:
        """Note what a call returned; with `layer`, a layer did."""
        before: list[Place | None] | None = None
        for value in flat((result, *args[:1])):  # a call may write into its first argument
            if not isinstance(value, Tensor) or not value.requires_grad:
                continue
            node = value.grad_fn
            if node is None:
                self._own[id(value)] = value
            elif node not in self._deep and node not in self._constant:
                found, _, deep = self._explore(node)
                self._deep.update(dict.fromkeys(found, deep or layer))
                if before is None:
                    given = (t for t in flat((*args, *kwargs.values())) if is_activation(t) and t.grad_fn is not node)
                    before = [self._places.get(t.grad_fn) for t in given]
                known = place_after(function, args, kwargs, value, before, self._count) if before else None
                self._places[node] = known if before else self._place_before(node)

    def has_rows(self, activation: Tensor) -> bool:
        """Whether row i of an activation is known to be of image i."""
        shape = activation.shape
        return self._places.get(activation.grad_fn) == ROWS and len(shape) > 0 and shape[0] == self._count

    def _place_before(self, node: Any) -> Place | None:
        """Where the images lie in what a node was made of, if that is the same for all."""
        places = {self._places[one] for one in _nearest(node, self._places)}
        return places.pop() if len(places) == 1 else None

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


def _nearest(node: Any, known: Mapping[Any, Any]) -> set[Any]:
    """The nearest known nodes that a node comes from."""
    found, seen, todo = set(), set(), [following for following, _ in node.next_functions]
    while todo:
        one = todo.pop()
        if one in known:
            found.add(one)
        elif one is not None and one not in seen:
            seen.add(one)
            todo.extend(following for following, _ in one.next_functions)
    return found


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
