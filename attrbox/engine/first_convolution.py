"""The stem of a recorded pass: the first convolution, where the images reach the rest of the network through it alone.

Many-pass methods average gradients. The gradient g at the images is the transpose of the stem's linear map A applied
to the gradient h behind it, so a weighted sum over passes needs that transpose only once:

    sum_k w_k g_k = A^T sum_k w_k h_k

The transpose of a first convolution, from many channels down to three at full size, is among the slowest operations of
a backward pass. The stem is read off the autograd graph, so that no use of the images, however it is written, can be
missed.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge

from attrbox.engine.autograd_graph import behind
from attrbox.engine.linear_maps import transposed


@dataclass(frozen=True)
class Stem:
    """An edge of the autograd graph, to be given to `Tape.replay` in place of the images, and the way from there back.

    Attributes:
        edge: where the convolution's output leaves it.
        convolution: its node of the graph.
        paddings: what each padding before it added, the last one first, as `F.pad` takes it.
        shape: of one image, [C, ...].
    """

    edge: GradientEdge
    convolution: Any
    paddings: tuple[list[int], ...]
    shape: torch.Size

    def pull(self, gradient: Tensor) -> Tensor:
        """A^T: from gradients behind the stem, [m, ...], to those at the images, [m, C, ...]."""
        node = self.convolution
        padded = list(self.shape)
        for padding in self.paddings:
            for axis, (low, high) in enumerate(zip(padding[::2], padding[1::2], strict=True), 1):
                padded[-axis] += low + high
        shape, weight = (len(gradient), *padded), node._saved_weight.detach()
        how = (node._saved_stride, node._saved_padding, node._saved_dilation, node._saved_groups)
        pulled = transposed(gradient, weight, shape, *how)
        for padding in self.paddings:
            pulled = F.pad(pulled, [-width for width in padding])
        return pulled


def stem_of(output: Tensor, images: Tensor) -> Stem | None:
    """The stem of a pass that ended in `output`; None if the images reach it by other ways than one convolution.

    Args:
        output: a result of the pass, with its graph.
        images: the leaf that went in, [n, C, ...].
    """
    users, leaf = _users(output, images)
    paddings: list[list[int]] = []
    node = leaf
    while node is not None:
        if len(users.get(node, ())) != 1:
            return None
        (node,) = users[node]
        match type(node).__name__:
            case "CloneBackward0":
                continue
            case "ConstantPadNdBackward0":
                paddings.insert(0, [_signed(width) for width in cast(Any, node)._saved_pad])
            case "ConvolutionBackward0" if not cast(Any, node)._saved_transposed:
                return Stem(GradientEdge(node, 0), node, tuple(paddings), images.shape[1:])
            case _:
                return None
    return None


def _signed(width: int) -> int:
    """A width of padding, which autograd tells without its sign: a negative one crops."""
    return width - 2**64 if width >= 2**63 else width


def _users(output: Tensor, images: Tensor) -> tuple[dict[Any, list[Any]], Any]:
    """Who takes gradients to each node of the graph behind `output`, once for each time; and the node of the images."""
    users: dict[Any, list[Any]] = {}
    leaf = None
    for node in behind(output.grad_fn):
        if getattr(node, "variable", None) is images:
            leaf = node
        for following, _ in node.next_functions:
            users.setdefault(following, []).append(node)
    return users, leaf
