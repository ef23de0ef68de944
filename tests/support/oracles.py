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
FUNCTIONS = (
    "abs",
    "exp",
    "log",
    "power",
    "erf",
    "sin",
    "cos",
    "logsigmoid",
    "softshrink",
    "hardshrink",
    "threshold",
)

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
    "abs": (abs, lambda v: math.copysign(1.0, v)),
    "exp": (math.exp, math.exp),
    "exp, base 2": (lambda v: 2.0**v, lambda v: 2.0**v * math.log(2)),
    "log": (math.log, lambda v: 1 / v),
    "power, square": (lambda v: v * v, lambda v: 2 * v),
    "power, cube": (lambda v: v**3, lambda v: 3 * v * v),
    "power, root": (math.sqrt, lambda v: 0.5 / math.sqrt(v)),
    "power, inverse root": (lambda v: 1 / math.sqrt(v), lambda v: -0.5 * v**-1.5),
    "power, reciprocal": (lambda v: 1 / v, lambda v: -1 / (v * v)),
    "erf": (math.erf, lambda v: 2 / math.sqrt(math.pi) * math.exp(-v * v)),
    "sin": (math.sin, math.cos),
    "cos": (math.cos, lambda v: -math.sin(v)),
    "logsigmoid": (lambda v: -_softplus(-v), lambda v: _sigmoid(-v)),
    "softshrink": (lambda v: math.copysign(max(abs(v) - 0.5, 0.0), v), lambda v: 1.0 if abs(v) > 0.5 else 0.0),
    "hardshrink": (lambda v: v if abs(v) > 0.5 else 0.0, lambda v: 1.0 if abs(v) > 0.5 else 0.0),
    "threshold": (lambda v: v if v > 0.5 else -1.0, lambda v: 1.0 if v > 0.5 else 0.0),
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


def _places(shape: tuple[int, ...]):
    return itertools.product(*(range(size) for size in shape))


def quotient(rule: str, a, b, a0, b0, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients that pass to numerator and denominator, of one shape, entry by entry."""
    to_a, to_b = torch.zeros_like(a), torch.zeros_like(b)
    for place in _places(upstream.shape):
        x, y, x0, y0, g = (float(t[place]) for t in (a, b, a0, b0, upstream))
        first, second = 1 / y, -x / y**2
        if rule == "deeplift" and y * y0 > 0:  # x = q y, so dx = dq (y + y0) / 2 + dy (q + q0) / 2
            first = 1 / ((y + y0) / 2)
            second = -first * (x / y + x0 / y0) / 2
        elif rule == "deeplift":  # the product with the reciprocal
            first = (1 / y + 1 / y0) / 2
            second = (x + x0) / 2 * (1 / y - 1 / y0) / (y - y0)
        if rule == "lrp_epsilon":
            second = 0.0
        to_a[place], to_b[place] = g * first, g * second
    return to_a, to_b


def matmul(rule: str, a, b, a0, b0, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients that pass to the factors of a matrix product [m, k] [k, n], entry by entry."""
    to_a, to_b = torch.zeros_like(a), torch.zeros_like(b)
    for i, j, k in itertools.product(range(len(a)), range(b.shape[1]), range(len(b))):
        first, second = float(b[k, j]), float(a[i, k])
        if rule == "deeplift":
            first, second = (first + float(b0[k, j])) / 2, (second + float(a0[i, k])) / 2
        share = 0.5 if rule == "lrp_epsilon" else 1.0
        to_a[i, k] += share * float(upstream[i, j]) * first
        to_b[k, j] += share * float(upstream[i, j]) * second
    return to_a, to_b


def maximum(rule: str, sign: int, a, b, a0, b0, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients that pass to both, for max (sign 1) or min (-1), of one shape, entry by entry."""
    to_a, to_b = torch.zeros_like(a), torch.zeros_like(b)
    for place in _places(upstream.shape):
        x, y, x0, y0, g = (float(t[place]) for t in (a, b, a0, b0, upstream))
        lead, lead0 = sign * (x - y), sign * (x0 - y0)
        share = 1.0 if lead > 0 else 0.0
        if rule == "deeplift":
            share = (max(lead, 0.0) - max(lead0, 0.0)) / (lead - lead0)
        to_a[place], to_b[place] = g * share, g * (1 - share)
    return to_a, to_b


# ----------------------------------------------------------------------------------------------- along an axis, norms


def log_softmax(rule: str, z: Tensor, z0: Tensor, upstream: Tensor) -> Tensor:
    """The gradient that passes a log-softmax of one line of numbers: that of each x_i, less that of the level."""
    g = upstream.tolist()
    return upstream - sum(g) * logsumexp(rule, z, z0)


def logsumexp(rule: str, z: Tensor, z0: Tensor) -> Tensor:
    """The multipliers of log sum exp of one line of numbers."""
    x, x0 = z.tolist(), z0.tolist()
    total, total0 = (math.fsum(math.exp(v) for v in line) for line in (x, x0))
    if rule != "deeplift":
        return z.new_tensor([math.exp(v) / total for v in x])
    slope = (math.log(total) - math.log(total0)) / (total - total0)
    return z.new_tensor([slope * (math.exp(v) - math.exp(w)) / (v - w) for v, w in zip(x, x0, strict=True)])


def vector_norm(rule: str, z: Tensor, z0: Tensor) -> Tensor:
    """The multipliers of the length of one line of numbers."""
    x, x0 = z.tolist(), z0.tolist()
    length, length0 = math.hypot(*x), math.hypot(*x0)
    if rule != "deeplift":
        return z.new_tensor([v / length for v in x])
    return z.new_tensor([(v + w) / (length + length0) for v, w in zip(x, x0, strict=True)])


def norm(rule: str, centred: bool, eps: float, z: Tensor, z0: Tensor, upstream: Tensor) -> Tensor:
    """The gradient that passes a norm of one line of numbers, without its weight and bias: a full matrix."""
    n = len(z)
    lines = [z.tolist(), z0.tolist()]
    centres = [[v - (sum(line) / n if centred else 0.0) for v in line] for line in lines]
    deviations = [math.sqrt(sum(v * v for v in line) / n + eps) for line in centres]
    (c, c0), (s, s0) = centres, deviations
    if rule != "deeplift":
        c0, s0 = c, s
    matrix = torch.zeros(n, n, dtype=z.dtype)  # of dy_i in dc_j
    for i, j in itertools.product(range(n), range(n)):
        ratio = (c[i] / s + c0[i] / s0) / 2
        deviation = (c[j] + c0[j]) / n / (s + s0)  # of ds in dc_j
        matrix[i, j] = ((i == j) - (0.0 if rule == "lrp_epsilon" else ratio * deviation)) / ((s + s0) / 2)
    passed = upstream @ matrix
    return passed - passed.mean() if centred else passed


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
