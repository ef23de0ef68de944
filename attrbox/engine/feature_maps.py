"""Where the pixels of an activation are: its spatial grid, found while a model runs.

Convolutional networks keep [n, C, h, w]. Transformers lay a grid out as tokens [n, prefix + h w, C], the prefix being
class and register tokens, or keep channels last, [n, h, w, C]. `Follower` starts from the last convolution (of a
transformer: the patch embedding, which may be a linear layer on patches) and knows the grid again in what comes after
it by its sizes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge


@dataclass(frozen=True)
class Grid:
    """The layout of an activation.

    Attributes:
        size: (h, w), or as many axes as there are.
        prefix: tokens before those of the grid; None if the activation has no tokens.
        last: whether the channels are the last axis.
        suffix: tokens behind those of the grid.
    """

    size: tuple[int, ...]
    prefix: int | None = None
    last: bool = False
    suffix: int = 0

    @property
    def others(self) -> int:
        """How many tokens there are beside those of the grid."""
        return (self.prefix or 0) + self.suffix

    def spatial(self, activation: Tensor) -> Tensor:
        """An activation of this layout as [n, C, h, w]."""
        first = activation.movedim(-1, 1) if self.last else activation
        if self.prefix is None:
            return first
        tokens = first[..., self.prefix : self.prefix + math.prod(self.size)]
        return tokens.reshape(*first.shape[:2], *self.size)


CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d"})
# What makes the stream of tokens that blocks read from and add to; projections inside of blocks look alike.
_STREAM = frozenset({"add", "iadd", "layer_norm", "rms_norm", "cat", "concat"})
_ATTENTION = frozenset({"softmax", "scaled_dot_product_attention", "multi_head_attention_forward"})
_MOST_PREFIXES = 16
_JOINING = frozenset({"cat", "concat", "concatenate"})
_FLATTENING = frozenset({"flatten", "view", "reshape"})
_TURNING = frozenset({"permute", "transpose", "mT", "movedim", "swapaxes"})
_LAST, _FIRST = (0, 2, 3, 1), (0, 3, 1, 2)  # orders of axes


class Follower:
    """Follows the last spatial feature map through a forward pass of some images.

    Of tokens with a prefix, which is what such models classify by, the map is the one before the last attention: behind
    it nothing of the others reaches the class token any more.

    Attributes:
        edges: of the autograd graph, one for each feature map that was the last one for a while.
        grids: how each of these is laid out.
        convolutions: how many ran, with a feature map or without.
    """

    def __init__(self, shape: Sequence[int], most: int | None = None) -> None:
        """Follow images of this shape, [n, C, H, W]; stop at the first `most` feature maps, if given."""
        self.count, self.size = shape[0], tuple(shape[2:])
        self.most = most
        self.edges: list[GradientEdge] = []
        self.grids: list[Grid] = []
        self.convolutions = 0
        self.found: tuple[Tensor, Grid] | None = None
        self._before_attention: tuple[Tensor, Grid] | None = None
        self._layouts: dict[
            tuple[int, ...], Grid | None
        ] = {}  # by the shape of an image's part; None: no grid any more

    def see(self, name: str, result: Tensor, args: Sequence[Any] = ()) -> None:
        """An operation of this name made an activation of these arguments."""
        self.convolutions += name in CONVOLUTIONS
        if len(self.edges) == self.most:
            return
        if name in CONVOLUTIONS and result.dim() == 2 + len(self.size):
            if max(result.shape[2:]) > 1:
                self._take(result, Grid(tuple(result.shape[2:])))
                self._before_attention = None
            return
        if self.found is None:
            patches = self._patches(result) if name == "linear" else None
            if patches is not None:
                self._take(result, patches)
            return
        if name in _ATTENTION:
            self._before_attention = self.found
        self._learn_layout(name, result, args)
        grid = self.grid_of(result)
        if grid is None and name == "linear" and self._whole and result.dim() == self.found[0].dim():
            grid = Grid(tuple(result.shape[1:-1]), last=True)  # neighbours merged
        if grid is None or "pool" in name or (grid.prefix is not None and name not in _STREAM | CONVOLUTIONS):
            return
        self._take(result, grid)

    def _learn_layout(self, name: str, result: Tensor, args: Sequence[Any]) -> None:
        """Note how activations of a shape are laid out, where sizes alone do not tell it."""
        assert self.found is not None
        size, shape = self.found[1].size, tuple(result.shape[1:])
        before = args[0] if args else None
        if name in _JOINING and result.dim() == 3 and isinstance(before, list | tuple):
            self._join(result, before, args[1] if len(args) > 1 else 0)
        elif not isinstance(before, Tensor) or before.dim() < 3 or len(before) != self.count:
            return
        elif name in _FLATTENING and tuple(before.shape[2:]) == size and shape == (before.shape[1], math.prod(size)):
            if self.grid_of(before) == Grid(size):
                self._layouts[shape] = Grid(size, 0)
        elif name in _TURNING and (grid := self.grid_of(before)) is not None:
            turned = shape == tuple(before.shape[1:][::-1]) if before.dim() == 3 else name == "permute"
            if before.dim() == 3 and turned:
                self._layouts[shape] = replace(grid, last=not grid.last)
            elif turned and tuple(args[1:]) in (_LAST, (_LAST,)):
                self._layouts[shape] = replace(grid, last=True)
            elif turned and tuple(args[1:]) in (_FIRST, (_FIRST,)):
                self._layouts[shape] = replace(grid, last=False)

    def _join(self, result: Tensor, parts: Sequence[Tensor], dim: int) -> None:
        """Note where the grid lies among tokens that are joined."""
        grids = [self.grid_of(part) if part.dim() == 3 and len(part) == self.count else None for part in parts]
        known = [(place, grid) for place, grid in enumerate(grids) if grid is not None and 2 - grid.last == dim % 3]
        if len(known) == 1:
            (place, grid), sizes = known[0], [part.shape[dim] for part in parts]
            prefix, suffix = sum(sizes[:place]) + (grid.prefix or 0), sum(sizes[place + 1 :]) + grid.suffix
            self._layouts[tuple(result.shape[1:])] = replace(grid, prefix=prefix, suffix=suffix)
        elif not known and dim % 3 > 0 and any(part.requires_grad for part in parts):
            self._layouts.setdefault(tuple(result.shape[1:]), None)  # the grid was cut: it is followed no further

    def _take(self, result: Tensor, grid: Grid) -> None:
        self.found = (result, grid)
        self.edges.append(get_gradient_edge(result))
        self.grids.append(grid)

    @property
    def _whole(self) -> bool:
        """Whether the last map has its channels behind axes of its own."""
        return self.found is not None and self.found[1].last and self.found[1].prefix is None

    def _patches(self, result: Tensor) -> Grid | None:
        """The grid of a linear patch embedding, of square patches without overlap; None if it is none."""
        if len(result) != self.count or not self.size or result.dim() < 3:
            return None
        if result.dim() == 2 + len(self.size):
            edges = {size / patches for size, patches in zip(self.size, result.shape[1:-1], strict=True)}
            fits = len(edges) == 1 and edges.pop().is_integer()
            return Grid(tuple(result.shape[1:-1]), last=True) if fits and max(result.shape[1:-1]) > 1 else None
        tokens = result.shape[1]
        edge = round((math.prod(self.size) / tokens) ** (1 / len(self.size)))
        grid = tuple(size // edge for size in self.size) if edge and not any(size % edge for size in self.size) else ()
        fits = result.dim() == 3 and math.prod(grid) == tokens > 1 and bool(grid)
        return Grid(grid, 0, last=True) if fits else None

    def grid_of(self, activation: Tensor) -> Grid | None:
        """How an activation is laid out, by its sizes; None if the grid is not to be found in it."""
        if self.found is None or activation.dim() < 3 or len(activation) != self.count:
            return None
        size, shape = self.found[1].size, tuple(activation.shape[1:])
        if shape in self._layouts:
            grid = self._layouts[shape]
            if grid is None or grid.size == size:
                return grid
        if tuple(activation.shape[2:]) == size:
            return Grid(size)
        if tuple(activation.shape[1:-1]) == size:
            return Grid(size, last=True)
        if activation.dim() == 3:
            for axis, last in ((1, True), (2, False)):
                prefix = activation.shape[axis] - math.prod(size)
                if 0 <= prefix <= _MOST_PREFIXES:
                    return Grid(size, prefix, last)
        return None

    @property
    def last(self) -> tuple[Tensor, Grid] | None:
        """The last feature map that the scores depend on everywhere."""
        if self.found is not None and self.found[1].others and self._before_attention is not None:
            return self._before_attention
        return self.found
