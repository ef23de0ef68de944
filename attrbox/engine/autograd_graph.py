"""What lies before and behind what in the autograd graph of a pass."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge

from attrbox.engine.site import Site


def site_of(node: Any) -> Site | None:
    """The site that a node of the graph is of; None if it is another operation's."""
    records: list[Site] | None = getattr(getattr(node, "replaying", None), "records", None)
    return None if records is None else records[node.record]


def node_of(output: Tensor) -> Any:
    """The node of the graph that made an activation; of a view, that of what it views, which stays when it is written
    over."""
    return output._base.grad_fn if output._is_view() and output._base is not None else output.grad_fn


def custom_functions(ends: Iterable[Tensor]) -> list[str]:
    """Autograd functions of the model's own (checkpoints too): their insides are out of a function mode's sight."""
    names = [
        type(node).__name__ for node in _sorted(end.grad_fn for end in ends) if isinstance(node, BackwardCFunction)
    ]
    return [name.removesuffix("Backward") for name in names if name not in _OWN_FUNCTIONS]


_OWN_FUNCTIONS = frozenset({"SiteFunctionBackward", "LinearMapFunctionBackward"})


def on_the_way(edges: Sequence[GradientEdge], score: Tensor) -> list[int]:
    """Which of the edges a score comes from, as numbers from 1."""
    behind = _behind(score.grad_fn)
    return [place for place, edge in enumerate(edges, 1) if edge.node in behind]


def last_on_the_way(edges: Sequence[GradientEdge], scores: Iterable[Tensor], ends: Collection[Any] = ()) -> int:
    """How many of the edges there are up to the last one from which every score comes; all of them if there is none.

    Edges whose nodes are among the ends count only if there are no others.
    """
    common = set.intersection(*(set(on_the_way(edges, score)) for score in scores))
    inner = {place for place in common if edges[place - 1].node not in ends}
    return max(inner or common, default=len(edges))


def made_into(outputs: Iterable[Tensor]) -> set[Any]:
    """The nodes that made outputs, seen through changes of size, layout and units: of the logits of a dense output,
    upsampled and behind a softmax, the convolution that made them."""
    found: set[Any] = set()
    todo = [output.grad_fn for output in outputs]
    while todo:
        node = todo.pop()
        if node is not None and node not in found:
            found.add(node)
            if node.name().startswith(_CHANGES_OF_FORM):
                todo.extend(following for following, _ in node.next_functions)
    return found


# Of the names of nodes that resize, lay out anew, or bring numbers into other units, position by position.
_CHANGES_OF_FORM = (
    *("Upsample", "View", "UnsafeView", "ReshapeAlias", "Permute", "Transpose", "T0", "Squeeze", "Unsqueeze"),
    *("Slice", "Clone", "Alias", "ToCopy", "Expand", "Softmax", "LogSoftmax", "Sigmoid", "LogSigmoid", "Tanh"),
)


def ways_around(edges: Sequence[GradientEdge], score: Tensor) -> bool:
    """Whether a score comes from one of the edges by another way than through the last."""
    behind = _behind(score.grad_fn, without=edges[-1].node)
    return any(edge.node in behind for edge in edges[:-1] if edge.node is not edges[-1].node)


def _behind(node: Any, without: Any = None) -> set[Any]:
    """All nodes of the autograd graph that a node comes from, and itself; not those behind `without` alone."""
    found: set[Any] = {without}
    todo = [node]
    while todo:
        one = todo.pop()
        if one is not None and one not in found:
            found.add(one)
            todo.extend(following for following, _ in one.next_functions)
    return found


def between(ends: Iterable[Tensor], places: Mapping[int, Any], layers: Collection[Any]) -> set[int]:
    """Which places lie between two layers: one comes before them on a way through the graph, another behind.

    Args:
        ends: what a pass returned.
        places: number -> node of the graph.
        layers: nodes of the graph.
    """
    order = _sorted(tensor.grad_fn for tensor in ends)
    marked = set(layers)
    behind: set[Any] = set()  # nodes from which a layer follows
    for node in order:
        if node in behind or node in marked:
            behind.update(following for following, _ in node.next_functions if following is not None)
    before: set[Any] = set()  # nodes that come from a layer
    for node in reversed(order):
        if any(following in before or following in marked for following, _ in node.next_functions):
            before.add(node)
    return {number for number, node in places.items() if node in before and node in behind}


def _sorted(roots: Iterable[Any]) -> list[Any]:
    """All nodes that the roots come from, each before those it comes from."""
    order: list[Any] = []
    seen: set[Any] = set()
    todo = [(root, False) for root in roots if root is not None]
    while todo:
        node, done = todo.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            todo.append((node, True))
            todo.extend((following, False) for following, _ in node.next_functions if following is not None)
    return order[::-1]
