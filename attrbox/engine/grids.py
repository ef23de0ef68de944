"""Where the pixels of an activation are: its spatial grid, found while a model runs.

Convolutional networks keep [n, C, h, w]. Transformers lay a grid out as tokens [n, prefix + h w, C], the prefix being
class and register tokens, or keep channels last, [n, h, w, C]. `Follower` starts from the last convolution (of a
transformer: the patch embedding) and knows the grid again in what comes after it by its sizes.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """The layout of an activation.

    Attributes:
        size: (h, w), or as many axes as there are.
        prefix: tokens before those of the grid; None if the activation has no tokens.
        last: whether the channels are the last axis of an activation without tokens.
    """

    size: tuple[int, ...]
    prefix: int | None = None
    last: bool = False

    def spatial(self, activation: Tensor) -> Tensor:
        """An activation of this layout as [n, C, h, w]."""
        if self.prefix is not None:
            tokens = activation[:, self.prefix :].transpose(1, 2)
            return tokens.reshape(*tokens.shape[:2], *self.size)
        return activation.movedim(-1, 1) if self.last else activation


CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d"})
# What makes the stream of tokens that blocks read from and add to; projections inside of blocks look alike.
_STREAM = frozenset({"add", "iadd", "layer_norm", "rms_norm", "cat", "concat"})
_ATTENTION = frozenset({"softmax", "scaled_dot_product_attention", "multi_head_attention_forward"})
_MOST_PREFIXES = 16


class Follower:
    """Follows the last spatial feature map through a forward pass of `count` images.

    Of tokens with a prefix, which is what such models classify by, the map is the one before the last attention: behind
    it nothing of the others reaches the class token any more.

    Attributes:
        nodes: of the autograd graph, one for each feature map that was the last one for a while.
    """

    def __init__(self, count: int, most: int | None = None) -> None:
        """Follow `count` images; stop at the first `most` feature maps, if given."""
        self.count = count
        self.most = most
        self.nodes: list[Any] = []
        self.found: tuple[Tensor, Grid] | None = None
        self._before_attention: tuple[Tensor, Grid] | None = None

    def see(self, name: str, result: Tensor) -> None:
        """An operation of this name made an activation."""
        if len(self.nodes) == self.most:
            return
        if name in CONVOLUTIONS:
            if result.dim() >= 3 and max(result.shape[2:]) > 1:
                self._take(result, Grid(tuple(result.shape[2:])))
                self._before_attention = None
            return
        if self.found is None:
            return
        if name in _ATTENTION:
            self._before_attention = self.found
        grid = self.grid_of(result)
        if grid is None and name == "linear" and self.found[1].last and result.dim() == self.found[0].dim():
            grid = Grid(tuple(result.shape[1:-1]), last=True)  # neighbours merged
        if grid is None or "pool" in name or (grid.prefix is not None and name not in _STREAM):
            return
        self._take(result, grid)

    def _take(self, result: Tensor, grid: Grid) -> None:
        self.found = (result, grid)
        self.nodes.append(result.grad_fn)

    def grid_of(self, activation: Tensor) -> Grid | None:
        """How an activation is laid out, by its sizes; None if the grid is not to be found in it."""
        if self.found is None or activation.dim() < 3 or len(activation) != self.count:
            return None
        size = self.found[1].size
        if tuple(activation.shape[2:]) == size:
            return Grid(size)
        if tuple(activation.shape[1:-1]) == size:
            return Grid(size, last=True)
        prefix = activation.shape[1] - math.prod(size)
        if activation.dim() == 3 and 0 <= prefix <= _MOST_PREFIXES:
            return Grid(size, prefix)
        return None

    @property
    def last(self) -> tuple[Tensor, Grid] | None:
        """The last feature map that the scores depend on everywhere."""
        if self.found is not None and self.found[1].prefix and self._before_attention is not None:
            return self._before_attention
        return self.found


def last_on_the_way(nodes: list[Any], scores: Iterable[Tensor]) -> int:
    """How many of the nodes there are up to the last one from which every score comes; all of them if there is none."""
    reached = [_behind(score.grad_fn) for score in scores]
    places = [place for place, node in enumerate(nodes, 1) if all(node in behind for behind in reached)]
    return places[-1] if places else len(nodes)


def _behind(node: Any) -> set[Any]:
    """All nodes of the autograd graph that a node comes from, and itself."""
    found: set[Any] = set()
    todo = [node]
    while todo:
        one = todo.pop()
        if one is not None and one not in found:
            found.add(one)
            todo.extend(following for following, _ in one.next_functions)
    return found
