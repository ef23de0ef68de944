"""Mask generators: from a map, or from a coarse grid of numbers, to the pixels that are taken away.

For the learned propagation rule, a generator turns a map A, [n, ...pixels], into two masks of the same shape, with
values in [0, 1]:

    M+    high on the pixels that support the class        M-    high on those that speak against it

Both are differentiable in A. Subclass `MaskGenerator` and register it to add another.

For the methods that perturb images, masks are made of a coarse grid: `stretched` by matrices (one for each axis, which
upsample and smooth at once), or as the smooth maximum of bumps (`SmoothMax`). `area_loss` and `total_variation` say how
well a mask has the size and the smoothness that are asked for.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from attrbox.core.fills import gaussian_blur
from attrbox.core.options import option
from attrbox.core.registry import Parts
from attrbox.errors import InputError


@dataclass(frozen=True, kw_only=True)
class MaskGenerator(ABC):
    """Makes both masks of a map.

    Attributes:
        sharpness: s, slope of the sigmoid.
        center_positive, center_negative: c+ and c-, where the masks are one half, on the scaled map (0.5 is zero).
        sigma_fraction: standard deviation of the Gaussian over the map, as a share of its longer side.
        fraction: largest share of the pixels that a mask takes away.
        temperature: width of the sigmoid round a rank threshold, in gaps between the values at half and twice the rank.

    Each generator reads what it needs. `sized`: whether the mean of the masks belongs to the loss, lest they grow.
    """

    sharpness: float = 10.0
    center_positive: float = 0.75
    center_negative: float = 0.25
    sigma_fraction: float = option(0.0, "standard deviation, as a share of the longer side", formerly="sigma")
    fraction: float = 0.05
    temperature: float = 0.3

    sized: ClassVar[bool] = True

    @abstractmethod
    def masks(self, map: Tensor, draw: Tensor) -> tuple[Tensor, Tensor]:
        """M+ and M- of the maps [n, ...]; `draw` [n] are numbers in [0, 1), drawn anew in each iteration."""

    def smoothed(self, map: Tensor) -> Tensor:
        """The map convolved with the Gaussian; itself if `sigma_fraction` is 0.

        Raises:
            InputError: the map has no height and width.
        """
        if self.sigma_fraction == 0:
            return map
        if map.dim() < 3:
            raise InputError(
                f"Smoothing a map (sigma_fraction > 0) needs images [N, C, H, W], got maps of shape {list(map.shape)}. "
                "Set sigma_fraction=0, or use another preset."
            )
        return gaussian_blur(map, self.sigma_fraction * max(map.shape[-2:]))


masks: Parts[MaskGenerator] = Parts("mask generator", "attrbox.masks", MaskGenerator)  # type: ignore[type-abstract]
register_mask = masks.register


def scaled(map: Tensor) -> Tensor:
    """a = 0.5 + A / (2 max|A|), per sample: zero stays at 0.5; 0.5 everywhere for a map of zeros."""
    largest = map.abs().flatten(1).amax(1).clamp_min(torch.finfo(map.dtype).tiny)
    return 0.5 + map / (2 * largest.view(-1, *(1,) * (map.dim() - 1)))


@register_mask("sigmoid")
@dataclass(frozen=True, kw_only=True)
class SigmoidMask(MaskGenerator):
    """M+ = sigmoid(s (a - c+)),  M- = sigmoid(s (c- - a))     (Yang et al. 2020, equations 4 and 5)."""

    def masks(self, map: Tensor, draw: Tensor) -> tuple[Tensor, Tensor]:
        del draw
        a = scaled(map)
        s = self.sharpness
        return torch.sigmoid(s * (a - self.center_positive)), torch.sigmoid(s * (self.center_negative - a))


@register_mask("gaussian")
@dataclass(frozen=True, kw_only=True)
class GaussianMask(SigmoidMask):
    """The sigmoid masks of the smoothed map g * A     (Yang et al. 2020, equation 6, before 4 and 5)."""

    sigma_fraction: float = 2 / 224


@register_mask("rank")
@dataclass(frozen=True, kw_only=True)
class RankMask(MaskGenerator):
    """The k largest and the k smallest pixels, k drawn from 1 to `fraction` of all. With A_(k) the k-th largest value,

        M+ = sigmoid((A - A_(k)) / w),     w = T (A_(k/2) - A_(2k)),     and M- the same of -A

    A_(k) and w carry no gradient. This trains the very curves that MoRF and LeRF measure, needs no centres, and no term
    for the size. The width w follows the map's own spacing round its threshold: learned maps have long tails, with
    which a width in units of their standard deviation would grow until the mask is no mask.
    """

    sized: ClassVar[bool] = False

    def masks(self, map: Tensor, draw: Tensor) -> tuple[Tensor, Tensor]:
        pixels = map[0].numel()
        most = max(1, round(self.fraction * pixels))
        rank = 1 + (draw * most).long().clamp_max(most - 1)[:, None]
        shape = (-1, *(1,) * (map.dim() - 1))

        def largest(map: Tensor) -> Tensor:
            top = map.detach().flatten(1).topk(min(2 * most, pixels), 1).values
            ranks = (rank, (rank // 2).clamp_min(1), (2 * rank).clamp_max(top.shape[1]))
            at, above, below = (top.gather(1, r - 1).view(shape) for r in ranks)
            width = self.temperature * (above - below)
            return torch.sigmoid((map - at) / width.clamp_min(torch.finfo(map.dtype).tiny))

        return largest(map), largest(-map)


# ------------------------------------------------------------------------------ masks made of a coarse grid of numbers


def upsampling(cells: int, pixels: int, mode: str, like: Tensor) -> Tensor:
    """The matrix that stretches `cells` numbers over `pixels` pixels, [pixels, cells].

    Args:
        cells, pixels: sizes.
        mode: "nearest", "linear" (cells have extent) or "corners" (linear, the first and last cell on the border).
        like: device and dtype.
    """
    eye = torch.eye(cells, device=like.device, dtype=like.dtype)[None]
    if mode == "nearest":
        return F.interpolate(eye, pixels, mode="nearest")[0].T
    return F.interpolate(eye, pixels, mode="linear", align_corners=mode == "corners")[0].T


def smoothing(pixels: int, sigma: float, like: Tensor) -> Tensor:
    """The matrix that convolves `pixels` pixels with a Gaussian and repeats the border, [pixels, pixels]."""
    eye = torch.eye(pixels, device=like.device, dtype=like.dtype)
    return gaussian_blur(eye.unsqueeze(-1), sigma)[..., 0].T if sigma > 0 else eye


def stretched(grids: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Grids [..., h, w, ...] with each of the last axes multiplied by its matrix, [H, h] or [..., H, h]."""
    for axis, matrix in enumerate(reversed(matrices), 1):
        moved = grids.movedim(-axis, -1)
        if matrix.dim() == 2:
            moved = moved @ matrix.T
        else:
            batch = matrix.dim() - 2
            flat = moved.flatten(batch, -2) if moved.dim() > batch + 1 else moved.unsqueeze(-2)
            product = flat @ matrix.mT
            moved = product.reshape(*moved.shape[:-1], matrix.shape[-2])
        grids = moved.movedim(-1, -axis)
    return grids


def circles(radii: Sequence[float], sigma: float, shape: Sequence[int], like: Tensor) -> Tensor:
    """Discs in the middle of the image, smoothed by a Gaussian of `sigma` pixels, [radii, H, W]."""
    height, width = shape
    y = torch.arange(height, device=like.device, dtype=like.dtype) - height // 2
    x = torch.arange(width, device=like.device, dtype=like.dtype) - width // 2
    squares = y[:, None] ** 2 + x**2
    return gaussian_blur(torch.stack([(squares <= radius**2).to(like.dtype) for radius in radii]), sigma)


def total_variation(masks: Tensor, beta: float, isotropic: bool, mean: bool) -> Tensor:
    """Sum (or mean) over the pixels of the masks' slope to the power of `beta`; masks [m, h, w] -> [m].

    Isotropic: (dx^2 + dy^2)^(beta/2); else |dx|^beta + |dy|^beta. Differences beyond the border are 0.
    """
    down, right = masks.diff(dim=1), masks.diff(dim=2)
    reduce = torch.mean if mean else torch.sum
    if not isotropic:
        parts = [reduce(d.abs() ** beta, (1, 2)) for d in (down, right) if d[0].numel()]
        return sum(parts, masks.new_zeros(len(masks)))
    squares = F.pad(down, (0, 0, 0, 1)) ** 2 + F.pad(right, (0, 1)) ** 2
    # The root has no derivative at 0, where that of the whole is 0 for beta > 1.
    return reduce(squares.clamp_min(torch.finfo(masks.dtype).tiny) ** (beta / 2) * (squares > 0), (1, 2))


TIED = 1e-4  # values of a mask so near to each other are equal but for rounding


def area_loss(masks: Tensor, areas: Sequence[float]) -> Tensor:
    """How far masks are from covering a share of the pixels: mean((sort(m) - r)^2), [m].

    Fong et al. 2019, equation 4: r is 0 for the smallest (1 - a) N values and 1 for the others. So it is 0 just where
    the mask is 1 on a share a of the pixels and 0 on the others.

    Nothing is sorted: r is 0 below the (1 - a) N-th value and 1 above it. Pixels that equal it share what is left of r,
    so none is preferred for its place (a mask begins as one plateau); that is the mean over all orders of the sort.

    Args:
        masks: [m, ...], in [0, 1].
        areas: A of them, in (0, 1); the masks j, j + A, j + 2 A, ... are to have the j-th.
    """
    flat = masks.flatten(1)
    wanted = torch.empty_like(flat)
    pixels = flat.shape[1]
    with torch.no_grad():
        for index, area in enumerate(areas):
            part = flat[index :: len(areas)]
            zeros = round(pixels * (1 - area))
            above = part - part.kthvalue(max(zeros, 1), 1, keepdim=True).values
            tied = above.abs() <= TIED
            above = above > TIED
            left = pixels - zeros - above.sum(1, keepdim=True)
            wanted[index :: len(areas)] = above + tied * (left / tied.sum(1, keepdim=True))
    # The mean of (m - r)^2 over an r of 0 and 1 with mean w.
    return ((flat - wanted) ** 2 + wanted * (1 - wanted)).mean(1)


class SmoothMax:
    """Masks as smooth maxima of bumps on a coarse grid (Fong et al. 2019, section 3, "smooth masks").

    With p_k the parameter in [0, 1] at grid point k, d_k the distance of a pixel from it, and the sums over the grid
    points near the pixel,

        u_k = kernel(d_k / sigma) p_k,    kernel(z) = exp(-2 max(z - 1/2, 0)^2),    m = sum_k u_k softmax_k(c u)

    All parameters 0 give 0, a single 1 a bump of height 1 in the middle, all 1 nearly (not exactly) 1.

    Attributes:
        grid: shape of the parameters, (h, w).
        margin: pixels that the whole mask has beyond the image at the top and at the left, and more at the other sides:
            so grid points outside of the image count in its area.
    """

    def __init__(self, shape: Sequence[int], step: int, sigma: float, like: Tensor, coldness: float = 20.0) -> None:
        self.shape, self.step, self.coldness = tuple(shape), step, coldness
        self.margin = round(sigma)
        around = math.ceil(sigma / step)  # grid points in the margin, and on each side of a pixel
        self.radius = 1 + around
        self.padding = self.radius + around
        self.grid = tuple(math.ceil(size / step) for size in shape)
        self.cells = tuple(size + 2 * (self.padding - self.radius) for size in self.grid)
        side = 2 * self.radius + 1
        offsets = torch.arange(side, device=like.device, dtype=like.dtype)[:, None]
        phases = torch.arange(step, device=like.device, dtype=like.dtype)
        # Pixel step q + phase sees the grid points q - padding + offset: their distance does not depend on q.
        distance = phases - sigma + step * (self.padding - offsets)
        squares = distance[:, None, :, None] ** 2 + distance[None, :, None, :] ** 2
        z = (squares.sqrt() / sigma - 0.5).clamp_min(0)
        self.kernel = torch.exp(-2 * z**2).reshape(side**2, step**2)

    def whole(self, parameters: Tensor) -> Tensor:
        """The masks with their margins, [m, H', W'], of parameters [m, h, w]."""
        padded = F.pad(parameters[:, None], (self.padding,) * 4)
        near = F.unfold(padded, 2 * self.radius + 1)  # [m, neighbours, cells]
        pooled = cast(Tensor, _SmoothMax.apply(near, self.kernel, self.coldness))  # [m, phases, cells]
        rows, columns = self.cells
        tiles = pooled.view(-1, self.step, self.step, rows, columns).permute(0, 3, 1, 4, 2)
        whole = tiles.reshape(len(parameters), rows * self.step, columns * self.step)
        return whole[:, : whole.shape[1] - self.step + 1, : whole.shape[2] - self.step + 1].clamp(0, 1)

    def cropped(self, whole: Tensor) -> Tensor:
        """The part of whole masks that covers the image, [m, H, W]."""
        top = self.margin
        return whole[..., top : top + self.shape[0], top : top + self.shape[1]]


class _SmoothMax(torch.autograd.Function):
    """sum_k u_k exp(c u_k) / sum_k exp(c u_k) with u_k = K[k, r] p[k, j], for near p [m, k, j] -> [m, r, j].

    One neighbour at a time: written out, the intermediate results of one mask of 224 x 224 pixels are 22 MB each, too
    many for any cache. The backward pass computes the exponentials anew, for the same reason.
    """

    @staticmethod
    def forward(ctx: Any, near: Tensor, kernel: Tensor, coldness: float) -> Tensor:
        exponents = coldness / math.log(2) * kernel  # powers of 2 are nearly twice as fast as those of e
        pooled = near.new_zeros(len(near), kernel.shape[1], near.shape[2])
        total = torch.zeros_like(pooled)
        for rows in _blocks(near, kernel):
            exponent, power = torch.empty_like(pooled[rows]), torch.empty_like(pooled[rows])
            for k in range(kernel.shape[0]):
                torch.mul(exponents[k][:, None], near[rows, k, None], out=exponent)
                torch.exp2(exponent, out=power)  # at most e^coldness: no overflow
                total[rows] += power
                pooled[rows].addcmul_(exponent, power)
        pooled.div_(total).mul_(math.log(2) / coldness)
        ctx.save_for_backward(near, kernel, pooled, total)
        ctx.coldness = coldness
        return pooled

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        near, kernel, pooled, total = ctx.saved_tensors
        exponents = ctx.coldness / math.log(2) * kernel
        # dm / du_k = exp(c u_k) / total (1 + c (u_k - m))
        share = grad_output / total
        constant = share * (1 - ctx.coldness * pooled)
        share *= math.log(2)
        gradient = torch.empty_like(near)
        for rows in _blocks(near, kernel):
            exponent, slope = torch.empty_like(pooled[rows]), torch.empty_like(pooled[rows])
            for k in range(kernel.shape[0]):
                torch.mul(exponents[k][:, None], near[rows, k, None], out=exponent)
                torch.addcmul(constant[rows], share[rows], exponent, out=slope)
                gradient[rows, k] = kernel[k] @ slope.mul_(exponent.exp2_())
        return gradient, None, None


def _blocks(near: Tensor, kernel: Tensor) -> list[slice]:
    """As many masks at once as a CPU's cache takes; all of them elsewhere."""
    size = max(1, 2**18 // (kernel.shape[1] * near.shape[2])) if near.device.type == "cpu" else max(1, len(near))
    return [slice(start, start + size) for start in range(0, len(near), size)]
