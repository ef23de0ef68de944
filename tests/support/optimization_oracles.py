"""The methods that optimize, written out a second time: plain torch in float64, one image, autograd through everything.

Nothing of attrbox is used but its streams of random numbers, which decide where an optimization starts.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from attrbox.core.random_streams import numbers

RELUS = (F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)
CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)


class Gate(torch.autograd.Function):
    """A ReLU whose backward pass multiplies by a gate instead of its derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(gate)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * ctx.saved_tensors[0], None


class Relus(TorchFunctionMode):
    """Notes what comes out of each ReLU, and puts a gate into those that have one."""

    def __init__(self, gates: dict[int, Tensor] | None = None) -> None:
        super().__init__()
        self.gates = gates or {}
        self.features: list[Tensor] = []
        self.before: list[int] = []  # how many ReLUs ran before each convolution, and each linear layer on tokens

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in RELUS:
            gate = self.gates.get(len(self.features))
            result = args[0].clamp(min=0) if gate is None else Gate.apply(args[0], gate)
            self.features.append(result.detach())
            return result
        if function in CONVOLUTIONS or (function is F.linear and args[0].dim() > 2):
            self.before.append(len(self.features))
        return function(*args, **(kwargs or {}))


def features(model: nn.Module, x: Tensor) -> tuple[list[Tensor], list[int]]:
    with torch.no_grad(), Relus() as relus:
        model(x)
    return relus.features, relus.before


def sigmoid_masks(map: Tensor) -> tuple[Tensor, Tensor]:
    a = 0.5 + map / (2 * map.abs().max())
    return torch.sigmoid(10 * (a - 0.75)), torch.sigmoid(10 * (0.25 - a))


def rank_masks(map: Tensor, fraction: float, draw: float) -> tuple[Tensor, Tensor]:
    most = max(1, round(fraction * map.numel()))
    k = min(1 + int(draw * most), most)

    def of(map: Tensor) -> Tensor:
        ordered = map.detach().flatten().sort(descending=True).values[: 2 * most]
        at, above, below = (ordered[rank - 1] for rank in (k, max(k // 2, 1), min(2 * k, len(ordered))))
        return torch.sigmoid((map - at) / (0.3 * (above - below)))

    return of(map), of(-map)


def blurred(maps: Tensor, sigma: float) -> Tensor:
    """Each of the maps [..., H, W] through a Gaussian cut off at four deviations; border pixels are repeated."""
    radius = max(1, math.ceil(4 * sigma))
    weights = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=maps.dtype) / sigma) ** 2)
    weights = weights / weights.sum()
    height, width = maps.shape[-2:]
    for axis, size in ((-2, height), (-1, width)):
        places = [(torch.arange(size) + shift).clamp(0, size - 1) for shift in range(-radius, radius + 1)]
        maps = sum(w * maps.index_select(axis, place) for w, place in zip(weights, places, strict=True))
    return maps


def learned(
    model: nn.Module, x: Tensor, target: int, iterations: int, preset: str = "paper", region: Tensor | None = None
) -> Tensor:
    """The map [1, C, H, W] of the learned rule after some steps of Adam; all parameters start at 1.

    Args:
        model: with ReLUs as its only activations, in evaluation mode.
        x: one image.
        region: DeepLIFT's map, for the preset "clean".
    """
    reference = preset == "paper"
    found, before = features(model, x)
    zero, _ = features(model, torch.zeros_like(x))
    chosen = range(before[0], before[-1])
    differences = {i: found[i] - zero[i] if reference else found[i] for i in chosen}
    weights = {i: torch.ones_like(differences[i], requires_grad=True) for i in chosen}
    moments = {i: (torch.zeros_like(w), torch.zeros_like(w)) for i, w in weights.items()}
    sigma = 1 / 224 * max(x.shape[-2:]) if preset == "clean" else 0
    if region is not None:
        region = blurred(region.sum(1), 12 / 224 * max(x.shape[-2:]))
        region = region / region.abs().max()
    base = model(x)[0, target].item()
    draws = numbers([0], 900_000, (iterations, 2), x, uniform=True)[0].tolist()

    def map() -> Tensor:
        leaf = x.clone().requires_grad_()
        gates = {i: torch.tanh(w * differences[i]) for i, w in weights.items()}
        with Relus(gates), sdpa_kernel(SDPBackend.MATH):  # which can be differentiated twice
            score = model(leaf)[0, target]
        (gradient,) = torch.autograd.grad(score, leaf, create_graph=True)
        return x * gradient

    def weighed(values: Tensor) -> Tensor:
        """The sum over channels, where the region agrees; smoothed."""
        total = values.sum(1)
        if region is not None:
            total = torch.where(total * region > 0, total * region**2, 0)
        return blurred(total, sigma) if sigma else total

    def fill(step: int) -> Tensor:
        kind = 0 if preset == "paper" else int(draws[step][1] * 3)
        if kind == 0:
            return torch.zeros_like(x)
        if kind == 1:
            return blurred(x, 0.05 * max(x.shape[-2:]))
        mean, std = x.mean((2, 3), keepdim=True), x.std((2, 3), keepdim=True, unbiased=False)
        return mean + std * numbers([0], step, x.shape[1:], x)

    for step in range(iterations):
        a = weighed(map())
        if preset == "paper":
            positive, negative = sigmoid_masks(a)
            size = 0.1 * (positive.mean() + negative.mean())
        else:
            positive, negative = rank_masks(a, {"rank": 0.05, "clean": 0.2}[preset], draws[step][0])
            size = 0
        shown = fill(step)
        without_support = model(x + positive * (shown - x))[0, target]
        without_opposition = model(x + negative * (shown - x))[0, target]
        loss = (without_support - base) + (base - without_opposition) + size
        gradients = torch.autograd.grad(loss, list(weights.values()))
        with torch.no_grad():
            for (i, w), g in zip(weights.items(), gradients, strict=True):
                mean, square = moments[i]
                mean.mul_(0.9).add_(0.1 * g)
                square.mul_(0.999).add_(0.001 * g * g)
                unbiased = mean / (1 - 0.9 ** (step + 1)), square / (1 - 0.999 ** (step + 1))
                w -= 0.2 * unbiased[0] / (unbiased[1].sqrt() + 1e-8)
    values = map().detach()
    if region is not None:
        values = values * torch.where(values.sum(1) * region > 0, region**2, 0)
    return blurred(values, sigma) if sigma else values


def mask(model: nn.Module, x: Tensor, target: int, iterations: int, step: int) -> Tensor:
    """The map [1, H, W] of the method "mask" (delete) that starts at ones, without jitter."""
    height, width = x.shape[-2:]
    m = torch.ones(height // step, width // step, dtype=x.dtype, requires_grad=True)
    mean, square = torch.zeros_like(m), torch.zeros_like(m)
    fill = blurred(x, 10.0)

    def shown(m: Tensor) -> Tensor:
        large = F.interpolate(m[None, None], (height, width), mode="nearest")
        return blurred(large, 5.0)

    for t in range(1, iterations + 1):
        pixels = shown(m)
        probability = model(pixels * x + (1 - pixels) * fill).softmax(1)[0, target]
        down, right = F.pad(m.diff(dim=0), (0, 0, 0, 1)), F.pad(m.diff(dim=1), (0, 1))
        squares = down**2 + right**2
        variation = torch.where(squares > 0, squares.clamp_min(1e-300) ** 1.5, 0).sum()
        loss = 1e-4 * (1 - m).sum() + 1e-2 * variation + probability
        (g,) = torch.autograd.grad(loss, m)
        with torch.no_grad():
            mean.mul_(0.9).add_(0.1 * g)
            square.mul_(0.999).add_(0.001 * g * g)
            m -= 0.1 * (mean / (1 - 0.9**t)) / ((square / (1 - 0.999**t)).sqrt() + 1e-8)
            m.clamp_(0, 1)
    return 1 - shown(m).detach()[0]


def smask(model: nn.Module, x: Tensor, target: int, iterations: int, step: int, sigma: float, area: float) -> Tensor:
    """The map [1, H, W] of the method "smask" (preserve), written pixel by pixel."""
    height, width = x.shape[-2:]
    p = torch.ones(-(-height // step), -(-width // step), dtype=x.dtype, requires_grad=True)
    velocity = torch.zeros_like(p)
    margin, around = round(sigma), math.ceil(sigma / step)
    rows, columns = ((size + 2 * around) * step - step + 1 for size in p.shape)
    levels = torch.stack([padded_blur(x, 20.0 * (1 - level / 7)) for level in range(8)])

    def whole(p: Tensor) -> Tensor:
        """A smooth maximum over the grid points near each pixel; what lies outside of the grid is 0."""
        reach = 1 + around
        padded = F.pad(p, (reach + around,) * 4)
        pixels = []
        for y in range(rows):
            for v in range(columns):
                top, left = y // step, v // step
                near = padded[top : top + 2 * reach + 1, left : left + 2 * reach + 1]
                at = torch.arange(2 * reach + 1, dtype=p.dtype)
                dy = y % step - sigma + step * (reach + around - at)
                dx = v % step - sigma + step * (reach + around - at)
                z = ((dy[:, None] ** 2 + dx**2).sqrt() / sigma - 0.5).clamp_min(0)
                u = torch.exp(-2 * z**2) * near
                weights = torch.softmax(20 * u.flatten(), 0)
                pixels.append((u.flatten() * weights).sum())
        return torch.stack(pixels).view(rows, columns).clamp(0, 1)

    def shown(m: Tensor) -> Tensor:
        place = m * 7
        below = place.detach().floor().clamp(0, 6).long()
        low = levels[:, 0].gather(0, below.expand(1, *x.shape[1:]))[0]
        high = levels[:, 0].gather(0, (below + 1).expand(1, *x.shape[1:]))[0]
        return (low + (place - below) * (high - low))[None]

    for t in range(iterations):
        m = whole(p)
        view = shown(m[margin : margin + height, margin : margin + width])
        reward = model(view.flip(-1) if t % 2 == 0 else view)[0, target]
        ordered = m.flatten().sort().values
        zeros = round(len(ordered) * (1 - area))
        edge = ordered[max(zeros, 1) - 1].detach()
        above, tied = (m - edge > 1e-4).detach(), ((m - edge).abs() <= 1e-4).detach()
        share = (len(ordered) - zeros - above.sum()) / tied.sum()
        wanted = above + tied * share  # the mean over all orders of equal pixels
        loss = 300 * 1.0035**t * ((m - wanted) ** 2 + wanted * (1 - wanted)).mean() - reward
        (g,) = torch.autograd.grad(loss, p)
        with torch.no_grad():
            velocity.mul_(0.9).add_(g, alpha=1.0 if t == 0 else 0.1)  # torch's first step is not dampened
            p -= 0.01 * velocity
            p.clamp_(0, 1)
    return whole(p).detach()[None, margin : margin + height, margin : margin + width]


def padded_blur(x: Tensor, sigma: float) -> Tensor:
    """Images through a Gaussian cut off at four deviations; zeros beyond the border."""
    if sigma == 0:
        return x
    radius = max(1, math.ceil(4 * sigma))
    return blurred(F.pad(x, (radius,) * 4), sigma)[..., radius:-radius, radius:-radius]
