"""Rules and operations for the tests of rules: a net around one operation, and cases of every kind of site."""

import dataclasses
import functools
import operator
from collections.abc import Callable

import oracles
import torch
import torch.nn.functional as F
from nets import seeded
from torch import Tensor, nn

from attrbox.engine.site import Rule
from attrbox.engine.tape import record
from attrbox.rules.deeplift import DeepLift
from attrbox.rules.guided import Deconvnet, GuidedBackprop
from attrbox.rules.lrp.activations import LRPEpsilon

EPSILON = 0.1  # large, so that a wrong stabiliser shows
RULES: dict[str, Rule | None] = {
    "gradient": None,
    "guided_backprop": GuidedBackprop(),
    "deconvnet": Deconvnet(),
    "lrp_epsilon": LRPEpsilon(EPSILON),
    "deeplift": DeepLift(),
}


class Sandwich(nn.Module):
    """[N, 5] -> linear -> `shape` -> operation -> linear -> [N, 3]."""

    def __init__(self, operation: Callable[[Tensor], Tensor], shape: tuple[int, ...], conv: bool = False):
        super().__init__()
        self.operation = operation
        size = torch.Size(shape).numel()
        layers: list[nn.Module] = [nn.Linear(5, size), nn.Unflatten(1, shape)]
        if conv:
            layers = [nn.Linear(5, size), nn.Unflatten(1, shape), nn.Conv2d(shape[0], shape[0], 3, padding=1)]
        self.before = nn.Sequential(*layers).double()
        with torch.no_grad():
            result = operation(torch.zeros(1, *shape, dtype=torch.float64))
        behind = [nn.Conv2d(result.shape[1], 2, 1), nn.Flatten()] if conv else [nn.Flatten()]
        after = nn.Sequential(*behind, nn.Linear(result.numel() * 2 // result.shape[1] if conv else result.numel(), 3))
        self.after = after.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.operation(self.before(x)))


def sandwich(operation: Callable[[Tensor], Tensor], shape: tuple[int, ...], conv: bool = False) -> nn.Module:
    model = seeded(lambda: Sandwich(operation, shape, conv), seed=3)
    return model.requires_grad_(False)


def replayed(
    model: nn.Module,
    x: Tensor,
    seed: Tensor,
    rule: Rule | None,
    reference: Tensor | None = None,
    create_graph: bool = False,
    recorded_with: tuple[Rule, ...] | None = None,
) -> Tensor:
    """The gradient at the images that `rule` makes of the gradient `seed` at the outputs."""
    tape = record(model, x, recorded_with or (rule or DeepLift(),))
    compared = tape.record_reference(reference) if rule is not None and rule.uses_reference else None
    score = (tape.output * seed).sum(1)
    return tape.replay(score, [tape.images], rule, reference=compared, create_graph=create_graph)[0]


@dataclasses.dataclass(frozen=True)
class Case:
    """An operation on [N, *shape], and the oracle for the gradient that passes it, for one sample."""

    kind: str
    operation: Callable[[Tensor], Tensor]
    shape: tuple[int, ...]
    oracle: Callable[[str, Tensor, Tensor, Tensor], Tensor]  # rule, z, z0, gradient at the output
    conv: bool = False
    everywhere: bool = True  # whether it is defined, and finite, for large inputs of both signs


def _activation(
    name: str, operation: Callable[[Tensor], Tensor], conv: bool = False, shift: float | None = None
) -> Case:
    """With `shift`, of inputs moved to where the function is defined."""

    def oracle(rule: str, z: Tensor, z0: Tensor, upstream: Tensor) -> Tensor:
        if shift:
            z, z0 = z + shift, z0 + shift
        return oracles.activation(rule, name, z, z0, upstream, EPSILON)

    moved = operation if shift is None else (lambda z: operation(z + shift))
    everywhere = shift is None and not name.startswith("exp")
    return Case(name.split(",")[0], moved, (2, 3, 3) if conv else (14,), oracle, conv, everywhere)


def _softmax(dim: int, shape: tuple[int, ...]) -> Case:
    """`dim` counts the batch as dimension 0, unless it counts from the end."""

    def oracle(rule: str, z: Tensor, z0: Tensor, upstream: Tensor) -> Tensor:
        return oracles.softmax(rule, dim - 1 if dim > 0 else dim, z, z0, upstream)

    return Case("softmax", lambda z: z.softmax(dim), shape, oracle)


def _pool(dims: int, size: int, stride: int, padding: int = 0, dilation: int = 1, ceil_mode: bool = False) -> Case:
    length = {1: 11, 2: 6, 3: 4}[dims]
    pool = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[dims]

    def oracle(rule: str, z: Tensor, z0: Tensor, upstream: Tensor) -> Tensor:
        axes = [oracles.windows(length, size, stride, padding, dilation, ceil_mode)] * dims
        return oracles.max_pool(rule, axes, z, z0, upstream)

    operation = functools.partial(
        pool, kernel_size=size, stride=stride, padding=padding, dilation=dilation, ceil_mode=ceil_mode
    )
    return Case("max_pool", operation, (2, *(length,) * dims), oracle)


def _fractional_pool(lengths: tuple[int, ...], counts: tuple[int, ...], draws: tuple[float, ...]) -> Case:
    """Windows of 2 that begin where Graham's sequences say, by numbers drawn once."""
    pool = {2: F.fractional_max_pool2d, 3: F.fractional_max_pool3d}[len(lengths)]

    def axis(length: int, count: int, draw: float) -> list[list[int]]:
        step = (length - 2) / (count - 1)
        starts = [int((i + draw) * step) - int(draw * step) for i in range(count - 1)] + [length - 2]
        return [[start, start + 1] for start in starts]

    axes = [axis(*numbers) for numbers in zip(lengths, counts, draws, strict=True)]
    order = draws if len(draws) == 3 else draws[::-1]  # as torch's kernels read them

    def operation(z: Tensor) -> Tensor:
        return pool(z, 2, output_size=counts, _random_samples=z.new_tensor(order).expand(*z.shape[:2], -1))

    def oracle(rule: str, z: Tensor, z0: Tensor, upstream: Tensor) -> Tensor:
        return oracles.max_pool(rule, axes, z, z0, upstream)

    return Case("max_pool", operation, (2, *lengths), oracle)


def _adaptive_pool(lengths: tuple[int, ...], counts: tuple[int, ...]) -> Case:
    pool = {1: F.adaptive_max_pool1d, 2: F.adaptive_max_pool2d, 3: F.adaptive_max_pool3d}[len(lengths)]

    def oracle(rule: str, z: Tensor, z0: Tensor, upstream: Tensor) -> Tensor:
        axes = [oracles.adaptive_windows(length, count) for length, count in zip(lengths, counts, strict=True)]
        return oracles.max_pool(rule, axes, z, z0, upstream)

    return Case("max_pool", lambda z: pool(z, counts), (2, *lengths), oracle)


def _factors(z: Tensor, first: tuple[int, ...], second: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Two factors of these shapes (per sample), cut out of [N, numbers]."""
    sizes = (torch.Size(first).numel(), torch.Size(second).numel())
    a, b = z.split(sizes, 1)
    return a.reshape(-1, *first), b.reshape(-1, *second)


def _product(
    multiply: Callable[[Tensor, Tensor], Tensor],
    first: tuple[int, ...] = (4,),
    second: tuple[int, ...] = (4,),
    gates: tuple[str, str] = ("", ""),
) -> Case:
    """a * b, where a factor may be made by a gate, "sigmoid" or "hardsigmoid"."""
    functions = {"": lambda t: t, "sigmoid": torch.sigmoid, "hardsigmoid": F.hardsigmoid}

    def made(z: Tensor) -> tuple[Tensor, ...]:
        return tuple(functions[gate](f) for gate, f in zip(gates, _factors(z, first, second), strict=True))

    def operation(z: Tensor) -> Tensor:
        return multiply(*made(z))

    def oracle(rule: str, z: Tensor, z0: Tensor, upstream: Tensor) -> Tensor:
        factors, factors0 = ([f[0] for f in made(t[None])] for t in (z, z0))
        parts = oracles.product(rule, tuple(bool(gate) for gate in gates), *factors, *factors0, upstream)
        before, before0 = ([f[0] for f in _factors(t[None], first, second)] for t in (z, z0))
        parts = [
            oracles.activation(rule, gate, u, u0, g, EPSILON) if gate else g
            for gate, u, u0, g in zip(gates, before, before0, parts, strict=True)
        ]
        return torch.cat([part.flatten() for part in parts])

    return Case("product", operation, (torch.Size(first).numel() + torch.Size(second).numel(),), oracle)


def _pair(
    kind: str,
    operation: Callable[[Tensor, Tensor], Tensor],
    oracle: Callable[..., tuple[Tensor, Tensor]],
    first: tuple[int, ...] = (4,),
    second: tuple[int, ...] = (4,),
    shift: float = 0.0,
) -> Case:
    """An operation on two activations, the second one shifted."""

    def parts(z: Tensor) -> tuple[Tensor, Tensor]:
        a, b = _factors(z, first, second)
        return a, b + shift

    def by_oracle(rule: str, z: Tensor, z0: Tensor, upstream: Tensor) -> Tensor:
        (a, b), (a0, b0) = ([part[0] for part in parts(t[None])] for t in (z, z0))
        return torch.cat([part.flatten() for part in oracle(rule, a, b, a0, b0, upstream)])

    size = torch.Size(first).numel() + torch.Size(second).numel()
    return Case(kind, lambda z: operation(*parts(z)), (size,), by_oracle)


def _norm(
    operation: Callable[[Tensor], Tensor],
    shape: tuple[int, ...],
    size: int,
    centred: bool = True,
    weight: Tensor | None = None,
    eps: float = 1e-5,
) -> Case:
    """A norm over groups of `size` neighbours, of [N, *shape]; `weight` of that shape."""

    def oracle(rule: str, z: Tensor, z0: Tensor, upstream: Tensor) -> Tensor:
        g = upstream if weight is None else upstream * weight
        rows = zip(*(t.reshape(-1, size) for t in (z, z0, g)), strict=True)
        return torch.cat([oracles.norm(rule, centred, eps, *row) for row in rows]).view(z.shape)

    return Case("norm", operation, shape, oracle)


def _line(
    kind: str, operation: Callable[[Tensor], Tensor], multipliers: Callable[[str, Tensor, Tensor], Tensor]
) -> Case:
    """A reduction of [N, 5] to [N, 1]."""

    def oracle(rule: str, z: Tensor, z0: Tensor, upstream: Tensor) -> Tensor:
        return upstream * multipliers(rule, z, z0)

    return Case(kind, operation, (5,), oracle)


def _amax() -> Case:
    def oracle(rule: str, z: Tensor, z0: Tensor, upstream: Tensor) -> Tensor:
        return oracles.max_pool(rule, [[list(range(4))]], z, z0, upstream[:, None])

    return Case("max_pool", lambda z: z.amax(2), (3, 4), oracle)


def _square(multiply: Callable[[Tensor, Tensor], Tensor]) -> Case:
    def oracle(rule: str, z: Tensor, z0: Tensor, upstream: Tensor) -> Tensor:
        first, second = oracles.product(rule, (False, False), z, z, z0, z0, upstream)
        return first + second

    return Case("product", lambda z: multiply(z, z), (6,), oracle)


def _imul(a: Tensor, b: Tensor) -> Tensor:
    a = a.clone()
    a *= b
    return a


def _extremum(sign: int, rule: str, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    return oracles.maximum(rule, sign, *tensors)


WEIGHT = torch.tensor([0.7, -1.3, 2.0, 0.4, 0.1, -0.2, 0.3, 0.5], dtype=torch.float64)

CASES: dict[str, Case] = {
    "relu": _activation("relu", F.relu),
    "relu, in place": _activation("relu", lambda z: F.relu(z, inplace=True)),
    "relu, conv": _activation("relu", F.relu, conv=True),
    "relu6": _activation("relu6", F.relu6),
    "relu6, clamp": _activation("relu6", lambda z: z.clamp(0, 6)),
    "hardtanh": _activation("hardtanh", F.hardtanh),
    "hardtanh, asymmetric": _activation("hardtanh, asymmetric", lambda z: F.hardtanh(z, -0.5, 2.0)),
    "leaky_relu": _activation("leaky_relu", F.leaky_relu),
    "leaky_relu, negative": _activation("leaky_relu, negative", lambda z: F.leaky_relu(z, -0.3)),
    "leaky_relu, in place": _activation("leaky_relu", lambda z: F.leaky_relu(z, inplace=True)),
    "prelu": _activation("prelu", lambda z: F.prelu(z, z.new_tensor([0.25]))),
    "elu": _activation("elu", F.elu),
    "elu, alpha": _activation("elu, alpha", lambda z: F.elu(z, 1.7)),
    "elu, in place": _activation("elu", lambda z: F.elu(z, inplace=True)),
    "celu": _activation("celu", lambda z: F.celu(z, 2.0)),
    "selu": _activation("selu", F.selu),
    "softplus": _activation("softplus", F.softplus),
    "softplus, beta": _activation("softplus, beta", lambda z: F.softplus(z, 3, 30)),
    "gelu": _activation("gelu", F.gelu),
    "gelu, conv": _activation("gelu", F.gelu, conv=True),
    "gelu, tanh": _activation("gelu, tanh", lambda z: F.gelu(z, approximate="tanh")),
    "silu": _activation("silu", F.silu),
    "silu, in place": _activation("silu", lambda z: F.silu(z, inplace=True)),
    "mish": _activation("mish", F.mish),
    "hardswish": _activation("hardswish", F.hardswish),
    "hardsigmoid": _activation("hardsigmoid", F.hardsigmoid),
    "sigmoid": _activation("sigmoid", torch.sigmoid),
    "sigmoid, in place": _activation("sigmoid", torch.sigmoid_),
    "tanh": _activation("tanh", torch.tanh),
    "tanh, conv": _activation("tanh", torch.tanh, conv=True),
    "softmax": _softmax(-1, (5,)),
    "softmax, dim 1": _softmax(1, (3, 4)),
    "softmax, dim 2": _softmax(2, (3, 4, 2)),
    "softmax, dim -3": _softmax(-3, (3, 4, 2)),
    "max_pool1d": _pool(1, 3, 3),
    "max_pool1d, overlapping": _pool(1, 3, 1),
    "max_pool1d, padded, dilated, ceil": _pool(1, 3, 2, padding=1, dilation=2, ceil_mode=True),
    "max_pool2d": _pool(2, 2, 2),
    "max_pool2d, overlapping": _pool(2, 3, 2, padding=1),
    "max_pool2d, dilated": _pool(2, 2, 1, dilation=3),
    "max_pool2d, ceil": _pool(2, 3, 2, ceil_mode=True),
    "max_pool2d, holes": _pool(2, 1, 2),
    "max_pool3d": _pool(3, 2, 2),
    "max_pool3d, overlapping": _pool(3, 3, 2, padding=1),
    "max_pool3d, ceil": _pool(3, 3, 2, ceil_mode=True),
    "adaptive_max_pool1d": _adaptive_pool((11,), (4,)),
    "adaptive_max_pool2d": _adaptive_pool((7, 5), (3, 2)),
    "adaptive_max_pool2d, larger": _adaptive_pool((2, 3), (4, 3)),
    "adaptive_max_pool3d": _adaptive_pool((4, 5, 3), (3, 2, 2)),
    "product": _product(operator.mul),
    "product, in place": _product(lambda a, b: a.clone().mul_(b)),
    "product, *=": _product(_imul),
    "product, second broadcast": _product(torch.mul, (2, 3, 2), (2, 1, 1)),
    "product, first broadcast": _product(torch.multiply, (2, 1, 1), (2, 3, 2)),
    "product, both broadcast": _product(operator.mul, (4, 1), (1, 3)),
    "product, broadcast in place": _product(_imul, (2, 3, 2), (2, 1, 1)),
    "product with itself": _square(operator.mul),
    "product with itself, in place": _square(lambda a, b: a.clone().mul_(b)),
    "product, gate first": _product(operator.mul, gates=("sigmoid", "")),
    "product, gate second": _product(Tensor.mul, (2, 3, 2), (2, 1, 1), gates=("", "hardsigmoid")),
    "product, gate in place": _product(_imul, (2, 3, 2), (2, 1, 1), gates=("", "sigmoid")),
    "product, two gates": _product(torch.mul, gates=("sigmoid", "hardsigmoid")),
    "abs": _activation("abs", torch.abs),
    "exp": _activation("exp", torch.exp),
    "exp, base 2": _activation("exp, base 2", lambda z: 2**z),
    "log": _activation("log", torch.log, shift=40.0),
    "power, square": _activation("power, square", lambda z: z**2),
    "power, cube": _activation("power, cube", lambda z: z.pow(3)),
    "power, root": _activation("power, root", torch.sqrt, shift=40.0),
    "power, root in place": _activation("power, root", lambda z: z.clone().sqrt_(), shift=40.0),
    "power, inverse root": _activation("power, inverse root", torch.rsqrt, shift=40.0),
    "power, reciprocal": _activation("power, reciprocal", lambda z: 1 / z, shift=40.0),
    "erf": _activation("erf", torch.erf),
    "sin": _activation("sin", torch.sin),
    "cos": _activation("cos", torch.cos),
    "logsigmoid": _activation("logsigmoid", F.logsigmoid),
    "softshrink": _activation("softshrink", F.softshrink),
    "hardshrink": _activation("hardshrink", F.hardshrink),
    "threshold": _activation("threshold", lambda z: F.threshold(z, 0.5, -1.0)),
    "quotient": _pair("quotient", torch.div, oracles.quotient, shift=40.0),
    "quotient, signs": _pair("quotient", operator.truediv, oracles.quotient),
    "quotient, in place": _pair("quotient", lambda a, b: a.clone().div_(b), oracles.quotient, shift=-40.0),
    "matmul": _pair("matmul", operator.matmul, oracles.matmul, (2, 3), (3, 4)),
    "matmul, einsum": _pair("matmul", lambda a, b: torch.einsum("nik,nkj->nij", a, b), oracles.matmul, (2, 3), (3, 2)),
    "matmul, bmm": _pair("matmul", torch.bmm, oracles.matmul, (3, 2), (2, 2)),
    "maximum": _pair("maximum", torch.maximum, functools.partial(_extremum, 1)),
    "minimum": _pair("maximum", torch.min, functools.partial(_extremum, -1)),
    "log_softmax": Case("log_softmax", lambda z: z.log_softmax(1), (5,), oracles.log_softmax),
    "logsumexp": _line("logsumexp", lambda z: z.logsumexp(1, keepdim=True), oracles.logsumexp),
    "vector_norm": _line(
        "vector_norm", lambda z: torch.linalg.vector_norm(z, dim=1, keepdim=True), oracles.vector_norm
    ),
    "fractional_max_pool2d": _fractional_pool((7, 6), (4, 3), (0.3, 0.8)),
    "fractional_max_pool3d": _fractional_pool((5, 4, 6), (3, 2, 4), (0.3, 0.8, 0.5)),
    "max_pool, amax": _amax(),
    "norm, layer": _norm(
        lambda z: F.layer_norm(z, (4,), WEIGHT[:4].to(z), WEIGHT[4:8].to(z)), (2, 4), 4, weight=WEIGHT[:4]
    ),
    "norm, layer of two axes": _norm(lambda z: F.layer_norm(z, (2, 3), eps=0.1), (2, 2, 3), 6, eps=0.1),
    "norm, group": _norm(
        lambda z: F.group_norm(z, 2, WEIGHT[:4].to(z)), (4, 2), 4, weight=WEIGHT[:4, None].expand(4, 2)
    ),
    "norm, instance": _norm(lambda z: F.instance_norm(z, weight=WEIGHT[:2].to(z)), (2, 4), 4, weight=WEIGHT[:2, None]),
    "norm, RMS": _norm(lambda z: F.rms_norm(z, (4,), eps=0.1), (2, 4), 4, centred=False, eps=0.1),
}
SCALAR_KINDS = oracles.RECTIFIERS + oracles.SQUASHERS + oracles.FUNCTIONS
ELEMENTWISE = [name for name, case in CASES.items() if case.kind in SCALAR_KINDS]


class Spelling(nn.Module):
    """linear -> one spelling of an operation -> linear, on [N, 5]."""

    def __init__(self, spelling: Callable[[Tensor], Tensor] | nn.Module, drop: bool):
        super().__init__()
        self.spelling = spelling
        self.drop = drop
        self.before = nn.Linear(5, 2 * 4 * 4)
        with torch.no_grad():
            outputs = self.spelt(torch.zeros(1, 2, 4, 4, dtype=torch.float64)).numel()
        self.after = nn.Linear(outputs, 3)

    def spelt(self, z: Tensor) -> Tensor:
        result = self.spelling(z)
        return z + 0 if self.drop else result

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.spelt(2 * self.before(x).view(-1, 2, 4, 4)).flatten(1))


ALL = tuple(rule for rule in RULES.values() if rule is not None)
