"""Slow, independent propagation: scalar formulas and loops instead of tensor code, Jacobians instead of autograd.

Nothing here comes from `attrbox.rules`: the formulas are written anew, so that a mistake there shows.
Rules by name: "gradient", "guided_backprop", "deconvnet", "lrp_epsilon", "deeplift".
"""

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

RECTIFIERS = (
    "relu",
    "relu6",
    "leaky_relu",
    "prelu",
    "elu",
    "selu",
    "celu",
    "softplus",
    "gelu",
    "silu",
    "hardswish",
    "mish",
)
SQUASHERS = ("sigmoid", "tanh", "hardsigmoid", "hardtanh")

_SIXTH = torch.tensor(1 / 6, dtype=torch.float32).item()  # torch's derivative of hardsigmoid, also in float64
_SELU_ALPHA, _SELU_SCALE = 1.6732632423543772, 1.0507009873554805


def _sigmoid(v: float) -> float:
    return 1 / (1 + math.exp(-v)) if v >= 0 else math.exp(v) / (1 + math.exp(v))


def _softplus(v: float) -> float:
    return max(v, 0.0) + math.log1p(math.exp(-abs(v)))


def _normal(v: float) -> float:
    """Distribution function of the standard normal."""
    return math.erfc(-v / math.sqrt(2)) / 2


def _clipped(low: float, high: float) -> tuple[Callable[[float], float], Callable[[float], float]]:
    return lambda v: min(max(v, low), high), lambda v: 1.0 if low < v < high else 0.0


def _leaky(slope: float) -> tuple[Callable[[float], float], Callable[[float], float]]:
    return lambda v: v if v > 0 else slope * v, lambda v: 1.0 if v > 0 else slope


def _exponential(alpha: float, width: float, scale: float = 1.0):
    """scale * (v if v > 0 else alpha (exp(v / width) - 1)): ELU, CELU, SELU."""
    return (
        lambda v: scale * (v if v > 0 else alpha * math.expm1(v / width)),
        lambda v: scale * (1.0 if v > 0 else alpha / width * math.exp(v / width)),
    )


def _tanh_gelu(v: float) -> float:
    return v / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))


def _tanh_gelu_slope(v: float) -> float:
    inner = math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))
    return (1 + inner) / 2 + v / 2 * (1 - inner**2) * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * v**2)


# name -> (function, derivative) of one number. A name may be a kind of site or a variant of one, "kind, variant".
SCALARS: dict[str, tuple[Callable[[float], float], Callable[[float], float]]] = {
    "relu": (lambda v: max(v, 0.0), lambda v: 1.0 if v > 0 else 0.0),
    "relu6": _clipped(0.0, 6.0),
    "hardtanh": _clipped(-1.0, 1.0),
    "hardtanh, asymmetric": _clipped(-0.5, 2.0),
    "leaky_relu": _leaky(0.01),
    "leaky_relu, negative": _leaky(-0.3),
    "prelu": _leaky(0.25),
    "elu": _exponential(1.0, 1.0),
    "elu, alpha": _exponential(1.7, 1.0),
    "celu": _exponential(2.0, 2.0),
    "selu": _exponential(_SELU_ALPHA, 1.0, _SELU_SCALE),
    "softplus": (_softplus, _sigmoid),
    "softplus, beta": (lambda v: _softplus(3 * v) / 3, lambda v: _sigmoid(3 * v)),
    "gelu": (lambda v: v * _normal(v), lambda v: _normal(v) + v * math.exp(-(v**2) / 2) / math.sqrt(2 * math.pi)),
    "gelu, tanh": (_tanh_gelu, _tanh_gelu_slope),
    "silu": (lambda v: v * _sigmoid(v), lambda v: _sigmoid(v) * (1 + v * (1 - _sigmoid(v)))),
    "mish": (
        lambda v: v * math.tanh(_softplus(v)),
        lambda v: math.tanh(_softplus(v)) + v * (1 - math.tanh(_softplus(v)) ** 2) * _sigmoid(v),
    ),
    "hardswish": (
        lambda v: v * min(max(v + 3, 0.0), 6.0) / 6,
        lambda v: 0.0 if v < -3 else 1.0 if v > 3 else (2 * v + 3) / 6,
    ),
    "hardsigmoid": (lambda v: min(max(v + 3, 0.0), 6.0) / 6, lambda v: _SIXTH if -3 < v < 3 else 0.0),
    "sigmoid": (_sigmoid, lambda v: _sigmoid(v) * (1 - _sigmoid(v))),
    "tanh": (math.tanh, lambda v: 1 - math.tanh(v) ** 2),
}


def multiplier(rule: str, name: str, v: float, v0: float, upstream: float, epsilon: float) -> float:
    """What an activation's upstream gradient, a number, is multiplied by."""
    function, derivative = SCALARS[name]
    rectifier = name.split(",")[0] in RECTIFIERS
    if rule == "guided_backprop" and rectifier:
        return derivative(v) if upstream > 0 else 0.0
    if rule == "deconvnet" and rectifier:
        return 1.0 if upstream > 0 else 0.0
    if rule == "lrp_epsilon":
        return function(v) / (v + (epsilon if v >= 0 else -epsilon))
    if rule == "deeplift":
        return (function(v) - function(v0)) / (v - v0)
    return derivative(v)


def activation(rule: str, name: str, z: Tensor, z0: Tensor, upstream: Tensor, epsilon: float) -> Tensor:
    """The gradient that passes an element-wise activation, of one sample."""
    numbers = zip(z.flatten().tolist(), z0.flatten().tolist(), upstream.flatten().tolist(), strict=True)
    passed = [g * multiplier(rule, name, v, v0, g, epsilon) for v, v0, g in numbers]
    return z.new_tensor(passed).view(z.shape)


# ------------------------------------------------------------------------------------------------ softmax, products


def softmax(rule: str, dim: int, z: Tensor, z0: Tensor, upstream: Tensor) -> Tensor:
    """The gradient that passes a softmax over `dim`, of one sample (so `dim` does not count the batch)."""
    result = torch.zeros_like(z)
    lines = [t.movedim(dim, -1).reshape(-1, t.shape[dim]) for t in (z, z0, upstream)]
    target = result.movedim(dim, -1)
    places = itertools.product(*(range(size) for size in target.shape[:-1]))
    for place, x, x0, g in zip(places, *(line.tolist() for line in lines), strict=True):
        line = _softmax_slopes(x, x0, g) if rule == "deeplift" else _softmax_gradient(x, g)
        target[place] = z.new_tensor(line)
    return result


def _softmax_gradient(x: list[float], g: list[float]) -> list[float]:
    total = math.fsum(math.exp(v) for v in x)
    p = [math.exp(v) / total for v in x]
    return [sum(g[i] * p[i] * ((i == j) - p[j]) for i in range(len(x))) for j in range(len(x))]


def _softmax_slopes(x: list[float], x0: list[float], g: list[float]) -> list[float]:
    """p_i = exp(x_i - L), L = log sum exp x: the slope of exp, of log and of exp again, one after the other."""
    total, total0 = (math.fsum(math.exp(v) for v in line) for line in (x, x0))
    level, level0 = math.log(total), math.log(total0)
    to_logits = []
    for i in range(len(x)):
        a, b = x[i] - level, x0[i] - level0
        to_logits.append(g[i] * (math.exp(a) - math.exp(b)) / (a - b))
    to_level = -sum(to_logits)
    to_total = to_level * (level - level0) / (total - total0)
    return [to_logits[j] + to_total * (math.exp(x[j]) - math.exp(x0[j])) / (x[j] - x0[j]) for j in range(len(x))]


def product(rule: str, gates: tuple[bool, bool], a, b, a0, b0, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients that pass to the factors of a broadcast product, of one sample, entry by entry."""
    to_a, to_b = torch.zeros_like(a), torch.zeros_like(b)
    dims = upstream.dim()
    for place in itertools.product(*(range(size) for size in upstream.shape)):
        in_a = tuple(0 if a.shape[d - dims] == 1 else place[d] for d in range(dims) if d - dims >= -a.dim())
        in_b = tuple(0 if b.shape[d - dims] == 1 else place[d] for d in range(dims) if d - dims >= -b.dim())
        g, first, second = float(upstream[place]), float(b[in_b]), float(a[in_a])
        if rule == "deeplift":
            first, second = (first + float(b0[in_b])) / 2, (second + float(a0[in_a])) / 2
        if rule == "lrp_epsilon":
            share = {(True, False): (0.0, 1.0), (False, True): (1.0, 0.0)}.get(gates, (0.5, 0.5))
            first, second = share[0] * first, share[1] * second
        to_a[in_a] += g * first
        to_b[in_b] += g * second
    return to_a, to_b


# ------------------------------------------------------------------------------------------------------- max-pools


def windows(length: int, size: int, stride: int, padding: int = 0, dilation: int = 1, ceil_mode: bool = False):
    """The positions in each window of a pool along one axis, those in the padding left out."""
    span = dilation * (size - 1) + 1
    steps = (length + 2 * padding - span) / stride
    count = (math.ceil(steps) if ceil_mode else math.floor(steps)) + 1
    if (count - 1) * stride >= length + padding:  # a window must begin inside the input or the padding before it
        count -= 1
    starts = [i * stride - padding for i in range(count)]
    return [[s + k * dilation for k in range(size) if 0 <= s + k * dilation < length] for s in starts]


def adaptive_windows(length: int, count: int):
    """The same for an adaptive pool: windows of as equal a size as can be, which may overlap."""
    return [list(range(i * length // count, -((i + 1) * length // -count))) for i in range(count)]


def max_pool(rule: str, axes: list[list[list[int]]], z: Tensor, z0: Tensor, upstream: Tensor) -> Tensor:
    """The gradient that passes a max-pool, of one sample [C, ...]; `axes` are the windows along each spatial axis."""
    result = torch.zeros_like(z)
    shape = tuple(len(axis) for axis in axes)
    assert upstream.shape[1:] == shape, f"expected {shape} windows, the pool made {tuple(upstream.shape[1:])}"
    for channel in range(len(z)):
        for output in itertools.product(*(range(size) for size in shape)):
            places = [
                (channel, *p) for p in itertools.product(*(axis[i] for axis, i in zip(axes, output, strict=True)))
            ]
            winner, winner0 = (max(places, key=lambda p, t=t: float(t[p])) for t in (z, z0))
            y, y0 = float(z[winner]), float(z0[winner0])
            g = float(upstream[(channel, *output)])
            if rule != "deeplift":
                result[winner] += g
            elif y >= y0:
                result[winner] += g * (y - y0) / (y - float(z0[winner]))
            else:
                result[winner0] += g * (y - y0) / (float(z[winner0]) - y0)
    return result
