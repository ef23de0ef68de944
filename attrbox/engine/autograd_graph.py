"""The autograd graph of a pass: what lies before and behind what in it, and what made the values of an activation."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge

from attrbox.engine.site import GATES, Site


def site_of(node: Any) -> Site | None:
    """The site that a node of the graph is of; None if it is another operation's."""
    records: list[Site] | None = getattr(getattr(node, "replaying", None), "records", None)
    return None if records is None else records[node.record]


def node_of(output: Tensor) -> Any:
    """The node of the graph that made an activation; of a view, that of what it views, which stays when it is written
    over."""
    return output._base.grad_fn if output._is_view() and output._base is not None else output.grad_fn


def on_the_way(edges: Sequence[GradientEdge], score: Tensor) -> list[int]:
    """Which of the edges a score comes from, as numbers from 1."""
    found = behind(score.grad_fn)
    return [place for place, edge in enumerate(edges, 1) if edge.node in found]


def last_on_the_way(edges: Sequence[GradientEdge], scores: Iterable[Tensor], ends: Collection[Any] = ()) -> int:
    """How many of the edges there are up to the last one from which every score comes; all of them if there is none.

    Edges whose nodes are among the ends count only if there are no others.
    """
    common = set.intersection(*(set(on_the_way(edges, score)) for score in scores))
    inner = {place for place in common if edges[place - 1].node not in ends}
    return max(inner or common, default=len(edges))


def last_of(nodes: Mapping[int, Any]) -> list[int]:
    """The numbers of those nodes from which no other of them follows."""
    before = behind(*(following for node in nodes.values() for following, _ in node.next_functions))
    return [number for number, node in nodes.items() if node not in before]


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


def pixel_by_pixel(node: Any) -> bool | None:
    """Whether a node comes from one leaf by changing each of its values on its own, linearly, or moving it; None if
    nothing but copies lies between."""
    changed = False
    while node is not None and (name := type(node).__name__) != "AccumulateGrad":
        before = [following for following, _ in node.next_functions if following is not None]
        if len(before) != 1 or not name.startswith(_PIXELWISE):
            return False
        changed = changed or not name.startswith(("Clone", "Alias", "ToCopy"))
        node = before[0]
    return True if changed else None


_PIXELWISE = (
    "Clone",
    "Alias",
    "ToCopy",
    "Add",
    "Sub",
    "Rsub",
    "Neg",
    "Mul",
    "Div",
    "Flip",
    "IndexSelect",
    "IndexBackward",
)


def ways_around(edges: Sequence[GradientEdge], score: Tensor) -> bool:
    """Whether a score comes from one of the edges by another way than through the last."""
    found = behind(score.grad_fn, without=edges[-1].node)
    return any(edge.node in found for edge in edges[:-1] if edge.node is not edges[-1].node)


def behind(*nodes: Any, without: Any = None) -> dict[Any, None]:
    """All nodes of the autograd graph that these come from, and themselves; not those behind `without` alone."""
    found: dict[Any, None] = {}
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node is not None and node is not without and node not in found:
            found[node] = None
            todo.extend(following for following, _ in node.next_functions)
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


# ---------------------------------------------------------------------------------------- what values are made by


def is_gate(factor: Tensor) -> bool:
    """Whether a sigmoid made the factor, or its complement 1 - gate; recorded or native, wherever its values moved."""

    def makers(node: Any, name: str, site: Site | None) -> Sequence[Any] | None:
        before = [following for following, _ in node.next_functions]
        if _GATE in _notes(node) or (site is not None and site.kind in GATES):
            return ()
        if name in ("Sigmoid", "Hardsigmoid"):
            return ()
        if name in _MOVING or (name == "Rsub" and before[1:] in ([], [None])):
            return before[:1]
        if name == "Sub" and before[0] is None:
            return before[1:2]
        return before if name in ("Cat", "Stack") else None

    return _made(factor, makers)


def is_nonnegative(x: Tensor) -> bool:
    """Whether what made an activation leaves nothing below 0, as far as can be told without looking at values."""

    def makers(node: Any, name: str, site: Site | None) -> Sequence[Any] | None:
        if site is not None and site.floor >= 0:
            return ()
        keeps = name in _KEEPING or (site is not None and site.kind == "max_pool")
        return [following for following, _ in node.next_functions] if keeps else None

    return _made(x, makers)


def _made(x: Tensor, makers: Callable[[Any, str, Site | None], Sequence[Any] | None]) -> bool:
    """Whether an activation is made as asked for.

    Args:
        x: the activation.
        makers: of a node, its name, and its site, the nodes of which the same is asked; None if it is not so.
    """
    todo = [x.grad_fn]
    while todo:
        node = todo.pop()
        name = type(node).__name__.rstrip("0123456789").removesuffix("Backward")
        found = None if node is None else makers(node, name, site_of(node))
        if found is None:
            return False
        todo.extend(found)
    return True


def mark_gate(result: Tensor) -> None:
    """Note what a sigmoid wrote into a view, whose node in autograd's graph does not tell it."""
    if not result._is_view() or result.grad_fn is None:
        return
    _notes(result.grad_fn)[_GATE] = True
    base = result._base
    if base is not None and base.grad_fn is not None and base.numel() == result.numel():
        _notes(base.grad_fn)[_GATE] = True


def _notes(node: Any) -> dict[str, Any]:
    """What autograd keeps with a node for whoever asks."""
    notes: dict[str, Any] = node.metadata
    return notes


_GATE = "attrbox: gate"
# Autograd's names of operations whose values are those of their input, and of those whose outputs have its signs.
_MOVING = frozenset(
    """
    View UnsafeView ReshapeAlias Expand Unsqueeze Squeeze Permute Transpose T Clone Alias AsStrided Split SplitWithSizes
    UnsafeSplit Unbind Select Slice Index IndexSelect Gather Repeat Flip Roll PixelShuffle PixelUnshuffle
    UpsampleNearest1D UpsampleNearest2D UpsampleNearest3D ToCopy
    """.split()
)
_KEEPING = frozenset(
    """
    View UnsafeView ReshapeAlias Expand Unsqueeze Squeeze Permute Transpose T Clone Alias Mean AvgPool2D AvgPool3D
    AdaptiveAvgPool2D AdaptiveAvgPool3D MkldnnAdaptiveAvgPool2D MaxPool2DWithIndices MaxPool3DWithIndices
    AdaptiveMaxPool2D AdaptiveMaxPool3D Cat
    """.split()
)
