"""Rules against a slow oracle, true gradients against autograd, completeness, and double backward.

The oracle multiplies explicit Jacobians of the linear parts with multipliers written anew as scalar formulas
(`oracles`), for a random gradient at the output.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable

import oracles
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from nets import SMALL, attention_net, images, relu_net, seeded, smooth_net
from torch import Tensor, nn

import attrbox
from attrbox.core.model_state import untouched
from attrbox.engine.site import KINDS, Rule
from attrbox.engine.tape import record
from attrbox.errors import UnsupportedModelError
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


# ------------------------------------------------------------------------------------------- operations and oracles


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


def test_every_kind_of_site_has_a_case():
    assert {case.kind for case in CASES.values()} == KINDS
    assert set(oracles.RECTIFIERS) == attrbox.engine.site.RECTIFIERS
    assert set(oracles.SQUASHERS) == attrbox.engine.site.SQUASHERS
    assert set(oracles.FUNCTIONS) == attrbox.engine.site.FUNCTIONS


# -------------------------------------------------------------------------------------------------- the Jacobian oracle

BATCH = 3


def by_oracle(model: Sandwich, case: Case, rule: str, x: Tensor, x0: Tensor, seed: Tensor) -> Tensor:
    """Jacobian of what is behind, the rule's multiplier, Jacobian of what is before; sample by sample."""
    jacobian = torch.autograd.functional.jacobian
    expected = []
    for sample, reference, upstream in zip(x, x0.expand_as(x), seed, strict=True):
        z, z0 = (model.before(t[None])[0] for t in (sample, reference))
        y = case.operation(z[None].clone())[0]
        at_y = torch.tensordot(upstream, jacobian(lambda t: model.after(t[None])[0], y), 1)
        at_z = case.oracle(rule, z, z0, at_y)
        to_z = jacobian(lambda t: model.before(t[None])[0], sample)
        expected.append(torch.tensordot(at_z, to_z, at_z.dim()))
    return torch.stack(expected)


def check(rule_name: str, case: Case, rule: Rule | None, per_sample: bool = False, create_graph: bool = False) -> None:
    """Assert that `rule` does at this operation what the oracle for `rule_name` says."""
    model = sandwich(case.operation, case.shape, case.conv)
    x, seed = 2 * images(BATCH, 5, seed=11), images(BATCH, 3, seed=12)
    x0 = 2 * images(BATCH if per_sample else 1, 5, seed=13)
    got = replayed(model, x, seed, rule, x0, create_graph)
    torch.testing.assert_close(got, by_oracle(model, case, rule_name, x, x0, seed), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", CASES)
def test_a_rule_does_what_its_formula_says(rule, name):
    check(rule, CASES[name], RULES[rule])


@pytest.mark.parametrize("name", CASES)
def test_deeplift_does_what_its_formula_says_with_a_reference_per_sample(name):
    check("deeplift", CASES[name], DeepLift(), per_sample=True)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["relu", "relu, in place", "gelu", "max_pool2d", "product", "softmax", "sigmoid"])
def test_a_differentiable_replay_gives_the_same_values(rule, name):
    check(rule, CASES[name], RULES[rule], create_graph=True)


class Distorted(Rule):
    """Another rule, with its result distorted a little at one kind of site."""

    def __init__(self, rule: Rule, kind: str):
        self.rule, self.kind = rule, kind
        self.kinds, self.needs = rule.kinds, rule.needs

    def needs_at(self, kind):
        return self.rule.needs_at(kind)

    def propagate(self, site, grad_output):
        result = self.rule.propagate(site, grad_output)
        if site.kind != self.kind:
            return result
        return tuple(r * (1 + 1e-6) for r in result) if isinstance(result, tuple) else result * (1 + 1e-6)


COVERED = [
    (rule, name)
    for name, case in CASES.items()
    for rule, instance in RULES.items()
    if instance is not None and case.kind in instance.kinds
]


@pytest.mark.parametrize(("rule", "name"), COVERED)
def test_the_oracle_notices_a_distorted_rule(rule, name):
    with pytest.raises(AssertionError, match="not close"):
        check(rule, CASES[name], Distorted(RULES[rule], CASES[name].kind))


@pytest.mark.parametrize(
    ("rule", "name", "impostor"),
    [
        ("gradient", "relu", GuidedBackprop()),
        ("guided_backprop", "relu", Deconvnet()),
        ("guided_backprop", "relu", None),
        ("deconvnet", "relu", GuidedBackprop()),
        ("lrp_epsilon", "relu", LRPEpsilon(EPSILON * 1.001)),
        ("lrp_epsilon", "tanh", LRPEpsilon(EPSILON * 1.001)),
        ("lrp_epsilon", "product", None),
        ("deeplift", "relu", None),
        ("deeplift", "max_pool2d, overlapping", None),
        ("deeplift", "softmax", None),
        ("deeplift", "product", None),
    ],
)
def test_the_oracle_notices_a_rule_of_another_name(rule, name, impostor):
    with pytest.raises(AssertionError, match="not close"):
        check(rule, CASES[name], impostor)


@pytest.mark.parametrize(
    "reach",
    [
        lambda gate: gate.view(-1, 2, 1, 1),
        lambda gate: gate[:, :, None, None].expand(-1, -1, 3, 3),
        lambda gate: gate.unsqueeze(2).unsqueeze(3),
        lambda gate: 1 - (1 - gate).view(-1, 2, 1, 1),
        lambda gate: torch.ones_like(gate).sub(torch.rsub(gate, torch.ones_like(gate)))[:, :, None, None],
    ],
    ids=["view", "expand", "unsqueeze", "complement", "tensor complement"],
)
def test_a_gate_is_known_behind_a_change_of_shape_and_as_a_complement(reach):
    # The usual way to write squeeze-and-excitation with linear layers: all relevance goes to the signal.
    class Gated(nn.Module):
        def forward(self, x):
            gate = x[:, :2].sigmoid()
            return (x[:, 2:].reshape(-1, 2, 3, 3) * reach(gate)).flatten(1)

    x = images(2, 20)
    relevance = attrbox.explain(Gated().eval(), x, "lrp_epsilon", target=lambda out: out.sum(1)).values
    signal = x[:, 2:].reshape(-1, 2, 9) * x[:, :2].sigmoid()[:, :, None]
    torch.testing.assert_close(relevance[:, :2], torch.zeros(2, 2, dtype=x.dtype))
    torch.testing.assert_close(relevance[:, 2:], signal.flatten(1))


# -------------------------------------------------------------------------------------------- true gradient, spellings


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


def _double(module: nn.Module) -> nn.Module:
    return module.double()


SLOPE = torch.tensor([0.3, -0.2], dtype=torch.float64)
# kind -> spellings that return a new tensor, and those that write in place.
SPELLINGS: dict[str, tuple[dict[str, Callable[[Tensor], Tensor]], dict[str, Callable[[Tensor], Tensor]]]] = {
    "relu": (
        {
            "F.relu": F.relu,
            "F.relu(input=)": lambda z: F.relu(input=z),
            "torch.relu": torch.relu,
            "Tensor.relu": lambda z: z.relu(),
            "nn.ReLU": nn.ReLU(),
            "clamp(min=0)": lambda z: z.clamp(min=0),
            "torch.clamp": lambda z: torch.clamp(z, 0),
            "clip": lambda z: z.clip(0.0),
            "clamp_min": lambda z: z.clamp_min(0),
        },
        {
            "F.relu(inplace)": lambda z: F.relu(z, inplace=True),
            "F.relu(z, True)": lambda z: F.relu(z, True),
            "F.relu_": F.relu_,
            "torch.relu_": torch.relu_,
            "Tensor.relu_": lambda z: z.relu_(),
            "nn.ReLU(inplace)": nn.ReLU(inplace=True),
            "clamp_(min=0)": lambda z: z.clamp_(min=0),
            "clamp_min_": lambda z: z.clamp_min_(0),
            "torch.clamp_min_": lambda z: torch.clamp_min_(z, 0),
        },
    ),
    "relu6": (
        {
            "F.relu6": F.relu6,
            "nn.ReLU6": nn.ReLU6(),
            "hardtanh(0, 6)": lambda z: F.hardtanh(z, 0.0, 6.0),
            "clamp(0, 6)": lambda z: z.clamp(0, 6),
            "torch.clip": lambda z: torch.clip(z, min=0, max=6),
        },
        {
            "F.relu6(inplace)": lambda z: F.relu6(z, inplace=True),
            "nn.ReLU6(inplace)": nn.ReLU6(inplace=True),
            "clamp_(0, 6)": lambda z: z.clamp_(0, 6),
            "hardtanh_(0, 6)": lambda z: F.hardtanh_(z, 0.0, 6.0),
        },
    ),
    "hardtanh": (
        {
            "F.hardtanh": F.hardtanh,
            "nn.Hardtanh": nn.Hardtanh(-0.5, 1.5),
            "clamp(-1, 1)": lambda z: z.clamp(-1, 1),
            "clamp(max=1)": lambda z: z.clamp(max=1),
        },
        {
            "F.hardtanh_": F.hardtanh_,
            "F.hardtanh(inplace)": lambda z: F.hardtanh(z, inplace=True),
            "nn.Hardtanh(inplace)": nn.Hardtanh(inplace=True),
            "clip_": lambda z: z.clip_(-1, 1),
        },
    ),
    "leaky_relu": (
        {
            "F.leaky_relu": F.leaky_relu,
            "nn.LeakyReLU": nn.LeakyReLU(0.3),
            "slope 0": lambda z: F.leaky_relu(z, negative_slope=0.0),
            "slope < 0": lambda z: F.leaky_relu(z, -0.5),
        },
        {
            "F.leaky_relu_": lambda z: F.leaky_relu_(z, 0.1),
            "F.leaky_relu(inplace)": lambda z: F.leaky_relu(z, 0.2, inplace=True),
            "nn.LeakyReLU(inplace)": nn.LeakyReLU(0.3, inplace=True),
        },
    ),
    "prelu": (
        {
            "F.prelu": lambda z: F.prelu(z, SLOPE),
            "torch.prelu": lambda z: torch.prelu(z, weight=SLOPE),
            "Tensor.prelu": lambda z: z.prelu(SLOPE),
            "nn.PReLU": _double(nn.PReLU(2)),
        },
        {},
    ),
    "elu": (
        {"F.elu": F.elu, "nn.ELU": nn.ELU(1.7)},
        {
            "F.elu_": F.elu_,
            "F.elu(inplace)": lambda z: F.elu(z, 0.5, inplace=True),
            "nn.ELU(inplace)": nn.ELU(inplace=True),
        },
    ),
    "selu": (
        {"F.selu": F.selu, "torch.selu": torch.selu, "nn.SELU": nn.SELU()},
        {
            "torch.selu_": torch.selu_,
            "F.selu(inplace)": lambda z: F.selu(z, True),
            "nn.SELU(inplace)": nn.SELU(inplace=True),
        },
    ),
    "celu": (
        {"F.celu": lambda z: F.celu(z, 1.3), "torch.celu": torch.celu, "nn.CELU": nn.CELU(0.7)},
        {
            "torch.celu_": torch.celu_,
            "F.celu(inplace)": lambda z: F.celu(z, inplace=True),
            "nn.CELU(inplace)": nn.CELU(inplace=True),
        },
    ),
    "softplus": ({"F.softplus": F.softplus, "nn.Softplus": nn.Softplus(beta=2, threshold=5)}, {}),
    "gelu": (
        {
            "F.gelu": F.gelu,
            "F.gelu(tanh)": lambda z: F.gelu(z, approximate="tanh"),
            "nn.GELU": nn.GELU(),
            "nn.GELU(tanh)": nn.GELU("tanh"),
        },
        {},
    ),
    "silu": (
        {"F.silu": F.silu, "nn.SiLU": nn.SiLU()},
        {"F.silu(inplace)": lambda z: F.silu(z, inplace=True), "nn.SiLU(inplace)": nn.SiLU(inplace=True)},
    ),
    "hardswish": (
        {"F.hardswish": F.hardswish, "nn.Hardswish": nn.Hardswish()},
        {
            "F.hardswish(inplace)": lambda z: F.hardswish(z, inplace=True),
            "nn.Hardswish(inplace)": nn.Hardswish(inplace=True),
        },
    ),
    "mish": (
        {"F.mish": F.mish, "nn.Mish": nn.Mish()},
        {"F.mish(inplace)": lambda z: F.mish(z, inplace=True), "nn.Mish(inplace)": nn.Mish(inplace=True)},
    ),
    "hardsigmoid": (
        {"F.hardsigmoid": F.hardsigmoid, "nn.Hardsigmoid": nn.Hardsigmoid()},
        {
            "F.hardsigmoid(inplace)": lambda z: F.hardsigmoid(z, inplace=True),
            "nn.Hardsigmoid(inplace)": nn.Hardsigmoid(inplace=True),
        },
    ),
    "sigmoid": (
        {
            "torch.sigmoid": torch.sigmoid,
            "F.sigmoid": F.sigmoid,
            "Tensor.sigmoid": lambda z: z.sigmoid(),
            "nn.Sigmoid": nn.Sigmoid(),
            "torch.special.expit": torch.special.expit,
        },
        {"torch.sigmoid_": torch.sigmoid_, "Tensor.sigmoid_": lambda z: z.sigmoid_()},
    ),
    "tanh": (
        {"torch.tanh": torch.tanh, "F.tanh": F.tanh, "Tensor.tanh": lambda z: z.tanh(), "nn.Tanh": nn.Tanh()},
        {"torch.tanh_": torch.tanh_, "Tensor.tanh_": lambda z: z.tanh_()},
    ),
    "softmax": (
        {
            "F.softmax": lambda z: F.softmax(z, dim=1),
            "F.softmax(dtype)": lambda z: F.softmax(z, -1, dtype=torch.float64),
            "torch.softmax": lambda z: torch.softmax(z, 2),
            "Tensor.softmax": lambda z: z.softmax(-1),
            "nn.Softmax": nn.Softmax(dim=1),
            "nn.Softmax2d": nn.Softmax2d(),
            "torch.special.softmax": lambda z: torch.special.softmax(z, 1),
        },
        {},
    ),
    "max_pool": (
        {
            "F.max_pool2d": lambda z: F.max_pool2d(z, 3, 1),
            "F.max_pool2d(kernel_size=)": lambda z: F.max_pool2d(z, kernel_size=2, padding=1),
            "F.max_pool2d(return_indices)": lambda z: F.max_pool2d(z, 2, return_indices=True)[0],
            "torch.max_pool2d": lambda z: torch.max_pool2d(z, 2, 1, 0, 1, True),
            "nn.MaxPool2d": nn.MaxPool2d(3, 2, 1),
            "nn.MaxPool2d(return_indices)": lambda z: nn.MaxPool2d(2, return_indices=True)(z)[0],
            "F.max_pool1d": lambda z: F.max_pool1d(z.flatten(2), 3, 2, ceil_mode=True),
            "torch.max_pool1d": lambda z: torch.max_pool1d(z.flatten(2), [2]),
            "nn.MaxPool1d": lambda z: nn.MaxPool1d(3, 1, dilation=2)(z.flatten(2)),
            "F.max_pool3d": lambda z: F.max_pool3d(z.view(-1, 2, 4, 2, 2), 2, 1),
            "nn.MaxPool3d": lambda z: nn.MaxPool3d((3, 2, 2), 1)(z.view(-1, 2, 4, 2, 2)),
            "F.adaptive_max_pool1d": lambda z: F.adaptive_max_pool1d(z.flatten(2), 5),
            "F.adaptive_max_pool2d": lambda z: F.adaptive_max_pool2d(z, (3, 1)),
            "F.adaptive_max_pool2d(None)": lambda z: F.adaptive_max_pool2d(z, (None, 3)),
            "nn.AdaptiveMaxPool2d": nn.AdaptiveMaxPool2d(3),
            "amax": lambda z: z.amax((2, 3)),
            "amax, keepdim": lambda z: torch.amax(z, 1, keepdim=True),
            "amin": lambda z: z.amin(-1),
            "torch.max(dim)": lambda z: torch.max(z, 2).values,
            "Tensor.min(dim)": lambda z: z.min(-1, keepdim=True)[0],
            "nn.AdaptiveMaxPool3d": lambda z: nn.AdaptiveMaxPool3d((3, 1, 2))(z.view(-1, 2, 4, 2, 2)),
        },
        {},
    ),
    "product": (
        {
            "*": lambda z: z[:, :1] * z[:, 1:],
            "itself": lambda z: z * z,
            "torch.mul": lambda z: torch.mul(z[:, :1], z),
            "torch.mul(input=, other=)": lambda z: torch.mul(input=z, other=z[:, 1:]),
            "torch.multiply": lambda z: torch.multiply(z, z.mean((2, 3), keepdim=True)),
            "Tensor.mul": lambda z: z.mul(z.flip(1)),
            "Tensor.mul(other=)": lambda z: z.mul(other=z.flip(1)),
            "Tensor.multiply": lambda z: z.multiply(z.flip(2)),
            "operator.mul": lambda z: operator.mul(z[:, :, :1], z),
        },
        {
            "Tensor.mul_": lambda z: z.mul_(z.flip(1)),
            "Tensor.multiply_": lambda z: z.multiply_(z.mean((1, 2, 3), keepdim=True)),
            "*=": lambda z: operator.imul(z, z.flip(3)),
        },
    ),
    "abs": ({"torch.abs": torch.abs, "abs()": abs, "Tensor.absolute": lambda z: z.absolute()}, {"abs_": torch.abs_}),
    "exp": (
        {"torch.exp": torch.exp, "expm1": lambda z: z.expm1(), "exp2": torch.exp2, "2 **": lambda z: 2**z},
        {"exp_": torch.exp_, "Tensor.expm1_": lambda z: z.expm1_()},
    ),
    "log": (
        {
            "torch.log": lambda z: torch.log(z + 20),
            "log1p": lambda z: (z + 20).log1p(),
            "log2": lambda z: (z + 20).log2(),
        },
        {"log_": lambda z: z.add_(20).log_()},
    ),
    "power": (
        {
            "**": lambda z: z**3,
            "torch.pow": lambda z: torch.pow(z, 2),
            "a tensor as exponent": lambda z: z.pow(torch.tensor(2.0, dtype=z.dtype)),
            "square": torch.square,
            "sqrt": lambda z: (z + 20).sqrt(),
            "rsqrt": lambda z: torch.rsqrt(z + 20),
            "reciprocal": lambda z: (z + 20).reciprocal(),
            "1 /": lambda z: 1 / (z + 20),
        },
        {"pow_": lambda z: z.pow_(2), "**=": lambda z: operator.ipow(z, 3), "square_": torch.square_},
    ),
    "erf": ({"torch.erf": torch.erf, "Tensor.erf": lambda z: z.erf(), "special": torch.special.erf}, {}),
    "sin": ({"torch.sin": torch.sin}, {"sin_": torch.sin_}),
    "cos": ({"torch.cos": torch.cos}, {"Tensor.cos_": lambda z: z.cos_()}),
    "logsigmoid": ({"F.logsigmoid": F.logsigmoid, "nn.LogSigmoid": nn.LogSigmoid()}, {}),
    "softshrink": ({"F.softshrink": F.softshrink, "nn.Softshrink": nn.Softshrink(0.1)}, {}),
    "hardshrink": ({"F.hardshrink": F.hardshrink, "Tensor.hardshrink": lambda z: z.hardshrink(0.2)}, {}),
    "threshold": (
        {"F.threshold": lambda z: F.threshold(z, 0.1, 3.0), "nn.Threshold": nn.Threshold(0.2, -1.0)},
        {"F.threshold_": lambda z: F.threshold_(z, 0.1, 3.0), "inplace": lambda z: F.threshold(z, 0.1, 3.0, True)},
    ),
    "log_softmax": (
        {"F.log_softmax": lambda z: F.log_softmax(z, 1), "nn.LogSoftmax": nn.LogSoftmax(-1)},
        {},
    ),
    "logsumexp": (
        {
            "torch.logsumexp": lambda z: torch.logsumexp(z, 1),
            "two axes": lambda z: z.logsumexp((1, 3)),
            "keepdim": lambda z: z.logsumexp(-1, keepdim=True),
        },
        {},
    ),
    "vector_norm": (
        {
            "vector_norm": lambda z: torch.linalg.vector_norm(z, dim=(1, 2)),
            "Tensor.norm": lambda z: z.norm(dim=1),
            "torch.norm": lambda z: torch.norm(z, 2, -1, True),
        },
        {},
    ),
    "norm": (
        {
            "F.layer_norm": lambda z: F.layer_norm(z, (4,)),
            "nn.LayerNorm": _double(nn.LayerNorm([2, 4, 4])),
            "channels last": lambda z: F.layer_norm(z.permute(0, 2, 3, 1), (2,), weight=SLOPE),
            "batch second": lambda z: F.layer_norm(z.flatten(2).permute(2, 0, 1), (2,), SLOPE).permute(1, 0, 2),
            "nn.GroupNorm": _double(nn.GroupNorm(2, 2)),
            "nn.InstanceNorm2d": _double(nn.InstanceNorm2d(2, affine=True)),
            "nn.RMSNorm": _double(nn.RMSNorm(4)),
        },
        {},
    ),
    "quotient": (
        {
            "/": lambda z: z[:, :1] / (z[:, 1:] + 20),
            "torch.div": lambda z: torch.div(z, z.flip(1) + 20),
            "true_divide": lambda z: z.true_divide((z + 20).mean(1, keepdim=True)),
            "a constant above": lambda z: torch.ones_like(z) / (z + 20),
        },
        {"/=": lambda z: operator.itruediv(z, z.flip(1) + 20), "div_": lambda z: z.div_(z.flip(2) + 20)},
    ),
    "matmul": (
        {
            "@": lambda z: z @ z.mT,
            "with itself": lambda z: z @ z,
            "torch.bmm": lambda z: torch.bmm(z[:, 0], z[:, 1]),
            "broadcast": lambda z: z[:, :1] @ z.transpose(2, 3),
            "einsum": lambda z: torch.einsum("nchw,ndhw->ncd", z, z),
            "einsum of a list": lambda z: torch.einsum("nchw,nchv->nwv", [z, z]),
            "baddbmm": lambda z: torch.baddbmm(torch.zeros(1, dtype=z.dtype), z[:, 0], z[:, 1]),
        },
        {},
    ),
    "maximum": (
        {
            "torch.maximum": lambda z: torch.maximum(z, z.flip(1)),
            "torch.max": lambda z: torch.max(z, z.flip(2)),
            "minimum": lambda z: z.minimum(z.flip(1)),
            "a constant": lambda z: torch.maximum(z, torch.full_like(z, 0.1)),
            "broadcast": lambda z: torch.fmin(z, z.mean(1, keepdim=True)),
        },
        {},
    ),
}

SPELT = [
    pytest.param(kind, spelling, drop, id=f"{name}, dropped" if drop else name)
    for kind, (fresh, in_place) in SPELLINGS.items()
    for drop, table in ((False, fresh), (False, in_place), (True, in_place))
    for name, spelling in table.items()
]
ALL = tuple(rule for rule in RULES.values() if rule is not None)


def test_every_kind_is_spelt():
    assert set(SPELLINGS) == KINDS


@pytest.mark.parametrize("recorded_with", [ALL, (GuidedBackprop(),)], ids=["all", "guided"])
@pytest.mark.parametrize(("kind", "spelling", "drop"), SPELT)
def test_recording_changes_neither_outputs_nor_gradients(kind, spelling, drop, recorded_with):
    model = seeded(lambda: Spelling(spelling, drop)).requires_grad_(False)
    x = images(3, 5, seed=21)
    leaf = x.clone().requires_grad_()
    output = model(leaf)
    (gradient,) = torch.autograd.grad(output[:, 1].sum(), leaf)
    tape = record(model, x, recorded_with)
    assert torch.equal(tape.output, output), "a dropped result of an in-place operation must be in its input"
    (replay,) = tape.replay(tape.output[:, 1], [tape.images])
    assert torch.equal(replay, gradient)
    (again,) = tape.replay(tape.output[:, 1], [tape.images], create_graph=True)
    (native,) = torch.autograd.grad(model(leaf)[:, 1].sum(), leaf, create_graph=True)  # SiLU: another formula
    assert torch.equal(again.detach(), native.detach())
    # It is seen, once, as what it is (guided backpropagation leaves gates, pools and products to autograd).
    coverage = tape.coverage(DeepLift())
    assert [operated.operation for operated in coverage.rule + coverage.derivative] == [kind]
    assert not coverage.unknown


@pytest.mark.parametrize(("kind", "spelling", "drop"), SPELT)
def test_gradients_on_kinks_and_ties_are_those_of_torch(kind, spelling, drop):
    class Bare(nn.Module):
        def forward(self, z):
            result = spelling(z := z + 0)
            return z + 0 if drop else result

    if isinstance(spelling, nn.Module):  # as in a call: what requires a gradient is taken for an activation
        spelling.requires_grad_(False)
    z = (torch.arange(64, dtype=torch.float64) % 27 - 13).view(2, 2, 4, 4) / 2  # from -6.5 to 6.5, signed zeros too
    z[1, 0, 0, :2] = torch.tensor([0.0, -0.0])
    leaf = z.clone().requires_grad_()
    output = Bare()(leaf)
    upstream = images(*output.shape, seed=24)
    (gradient,) = torch.autograd.grad(output, leaf, upstream)
    tape = record(Bare(), z, ALL)
    assert torch.equal(tape.output, output)
    (replay,) = tape.replay((tape.output * upstream).flatten(1).sum(1), [tape.images])
    assert torch.equal(replay, gradient)


@pytest.mark.parametrize("rule", ALL, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize(("kind", "spelling", "drop"), SPELT)
def test_a_rule_sees_through_the_spelling(kind, spelling, drop, rule):
    """Alone or with others on one tape, in place or not, a rule gives the same."""
    model = seeded(lambda: Spelling(spelling, drop)).requires_grad_(False)
    x, x0, seed = images(3, 5, seed=21), images(1, 5, seed=22), images(3, 3, seed=23)
    alone = replayed(model, x, seed, rule, x0)
    assert torch.equal(record(model, x, (rule,)).output, model(x))
    assert torch.equal(replayed(model, x, seed, rule, x0, recorded_with=ALL), alone)
    differentiable = replayed(model, x, seed, rule, x0, create_graph=True).detach()
    torch.testing.assert_close(differentiable, alone, rtol=1e-12, atol=1e-13)
    if isinstance(rule, DeepLift):
        change = ((x - x0) * alone).sum(1)
        torch.testing.assert_close(change, ((model(x) - model(x0)) * seed).sum(1), rtol=1e-9, atol=1e-10)


class Clamped(nn.Sequential):
    def forward(self, x):
        return super().forward(x).clamp(min=0).mean((2, 3))


@pytest.mark.parametrize("method", [name for name in RULES if name != "gradient"])
@pytest.mark.parametrize(
    "model",
    [relu_net(pool=True), seeded(lambda: Clamped(nn.Conv2d(3, 4, 3))), smooth_net("Hardtanh"), attention_net()],
    ids=["relu", "clamp", "hardtanh", "attention"],
)
def test_a_tape_replays_the_true_gradient_next_to_any_rule(method, model):
    # One recording serves several methods; the plain gradient must be among them.
    x = images(2, 3, 8, 8)
    for other in ("saliency", "grad_cam"):
        both = attrbox.compare(model, x, [method, other], target=1)
        for label in (method, other):
            assert torch.equal(both[label].values, attrbox.explain(model, x, label, target=1).values)


# ----------------------------------------------------------------------------------- activations that are written over


def _write_over_input(z):
    y = torch.relu(z)  # keeps its result only, so autograd allows writing over its input
    z.zero_()
    return y + z


def _write_over_output(z):
    y = F.gelu(z)  # keeps its input only, so autograd allows writing over its output
    y += z
    return y


def _write_into_a_view(z):
    z[:, :1].relu_()
    return z


def _write_through_a_flat_view(z):
    z.view(-1).clamp_(-0.5, 1.0)
    return z


def _chain_in_place(z):
    return F.mish(F.hardswish(F.silu(z, inplace=True), inplace=True), inplace=True)


def _write_over_factor(z):
    gate = z.mean((2, 3), keepdim=True).sigmoid()
    y = z.relu_()
    y = y * gate
    return F.relu(y.add_(1), inplace=True)


def _shift_between(z):
    return torch.relu_(F.hardswish(z, inplace=True).sub_(0.5))


WRITERS = [
    _write_over_input,
    _write_over_output,
    _write_into_a_view,
    _write_through_a_flat_view,
    _chain_in_place,
    _write_over_factor,
    _shift_between,
]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: writer.__name__.strip("_"))
def test_activations_that_the_model_writes_over(writer, rule):
    model = seeded(lambda: Spelling(writer, drop=False)).requires_grad_(False)
    x, x0, seed = images(3, 5, seed=31), images(3, 5, seed=32), images(3, 3, seed=33)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((model(leaf) * seed).sum(), leaf)
    tape = record(model, x, ALL)
    assert torch.equal(tape.output, model(x))
    got = replayed(model, x, seed, RULES[rule], x0, recorded_with=ALL)
    if rule == "gradient":
        assert torch.equal(got, gradient)
    if rule == "deeplift":
        expected = ((model(x) - model(x0)) * seed).sum(1)
        torch.testing.assert_close(((x - x0) * got).sum(1), expected, rtol=1e-9, atol=1e-10)
    if rule != "gradient":  # the same net with nothing in place
        pure = seeded(lambda: Spelling(PURE[writer], drop=False)).requires_grad_(False)
        torch.testing.assert_close(pure(x), model(x), rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(got, replayed(pure, x, seed, RULES[rule], x0), rtol=1e-11, atol=1e-12)


def _pure_factor(z):
    return F.relu(torch.relu(z) * torch.sigmoid(z.mean((2, 3), keepdim=True)) + 1)


PURE = {
    _write_over_input: torch.relu,
    _write_over_output: lambda z: F.gelu(z) + z,
    _write_into_a_view: lambda z: torch.cat([torch.relu(z[:, :1]), z[:, 1:]], 1),
    _write_through_a_flat_view: lambda z: z.clamp(-0.5, 1.0),
    _chain_in_place: lambda z: F.mish(F.hardswish(F.silu(z))),
    _write_over_factor: _pure_factor,
    _shift_between: lambda z: torch.relu(F.hardswish(z) - 0.5),
}


# ------------------------------------------------------------------------------------------------------- completeness


def assert_complete(model: nn.Module, x: Tensor, x0: Tensor, tolerance: float = 1e-9) -> Tensor:
    """Assert that DeepLIFT sums to the differences of all outputs, up to rounding of what is summed; return it."""
    with untouched(model):
        seed = images(len(x), model(x).shape[1], seed=7, dtype=x.dtype)
        attributions = (x - x0) * replayed(model, x, seed, DeepLift(), x0)
        assert attributions.isfinite().all()
        got = attributions.flatten(1).sum(1)
        terms = torch.cat([model(x) * seed, model(x0) * seed, attributions.flatten(1)], 1)
        expected = (model(x) * seed).sum(1) - (model(x0) * seed).sum(1)
        gap = (got - expected).abs() / terms.abs().sum(1)
    assert gap.max() < tolerance
    return attributions


@pytest.mark.parametrize("per_sample", [False, True], ids=["one reference", "per sample"])
@pytest.mark.parametrize("name", CASES)
def test_deeplift_is_complete_at_every_operation(name, per_sample):
    case = CASES[name]
    model = sandwich(case.operation, case.shape, case.conv)
    assert_complete(model, 2 * images(4, 5, seed=41), 2 * images(4 if per_sample else 1, 5, seed=42), 1e-13)


@pytest.mark.parametrize("baseline", ["zeros", "shared", "per sample"])
@pytest.mark.parametrize("name", SMALL)
def test_deeplift_is_complete_on_small_nets_and_says_so(name, baseline):
    build, shape = SMALL[name]
    x0 = {"zeros": 0.0, "shared": images(*shape, seed=1), "per sample": images(3, *shape, seed=2)}[baseline]
    model, x = build(), images(3, *shape)
    maps = attrbox.explain(model, x, "deeplift", target=1, baseline=x0)
    start = model(torch.as_tensor(x0, dtype=x.dtype).expand_as(x))
    expected = (model(x) - start)[:, 1].detach()
    torch.testing.assert_close(maps.gap, maps.values.flatten(1).sum(1) - expected, rtol=0, atol=1e-12)
    assert maps.gap.abs().max() < 1e-12 * maps.values.abs().flatten(1).sum(1).max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("change", [1e-12, 1e-7, 200.0, 1000.0])
@pytest.mark.parametrize("name", CASES)
def test_deeplift_is_finite_and_complete_for_tiny_and_huge_changes(name, change, dtype):
    case = CASES[name]
    if change > 1 and not case.everywhere:
        pytest.skip("not defined there")

    class Bare(nn.Module):
        def forward(self, z):
            return case.operation(z.view(-1, *case.shape) + 0).flatten(1)

    size = torch.Size(case.shape).numel()
    centre = images(2, size, seed=51, dtype=dtype)
    step = change / 2 * images(2, size, seed=52).sign().to(dtype)
    tolerance = 1e-9 if dtype is torch.float64 else 1e-3
    assert_complete(Bare().eval(), centre + step, centre - step, tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("dim", [1, -1])
@pytest.mark.parametrize("size", [50.0, 200.0, 5000.0])
def test_deeplift_at_a_softmax_with_extreme_logits(size, dim, dtype):
    class Softmax(nn.Module):
        def forward(self, x):
            return x.softmax(dim).flatten(1)

    x = size * torch.tensor([[[1, -1, 0.5, 0], [-1, 1, 1, -0.5]], [[0, 0, 0, 0], [1, 1, -1, -1]]], dtype=dtype)
    x0 = size * torch.tensor([[[-1, 1, 0.5, 0], [1, -1, -1, 1]], [[1, -1, 0, 0], [0, 0, 0, 0]]], dtype=dtype)
    for one, other in ((x, x0), (x0, x), (x, 0 * x), (0 * x, x), (x, x)):
        assert_complete(Softmax().eval(), one, other, 10 * size * torch.finfo(dtype).eps)  # rounding of the logits


@pytest.mark.parametrize("change", [0.0, 1e-15, 1e-10, 1e-8, 1e-7])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_deeplift_is_the_derivative_where_next_to_nothing_changed(name, change):
    # A quotient of rounded differences would be off by up to 1e-16 / change: noise for the smaller ones.
    case = CASES[name]
    model = sandwich(case.operation, case.shape, case.conv)
    x, seed = images(3, 5, seed=61), images(3, 3, seed=62)
    got = replayed(model, x, seed, DeepLift(), x - change)
    torch.testing.assert_close(got, replayed(model, x, seed, None), rtol=1e-6, atol=1e-6)


def test_deeplift_of_pools_where_nothing_changed_is_finite():
    for name, case in CASES.items():
        if case.kind == "max_pool":
            model, x = sandwich(case.operation, case.shape), images(3, 5, seed=61)
            got = replayed(model, x, images(3, 3, seed=62), DeepLift(), x)
            assert got.isfinite().all(), name


class Fractional(nn.Module):
    """Pools with windows drawn at each pass, or drawn once: one row for all images, or rows that differ."""

    def __init__(self, draws: str) -> None:
        super().__init__()
        self.inside, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4 * 25, 3)
        rows = 1 if draws == "shared" else 3
        samples = torch.rand(rows, 4, 2, generator=torch.Generator().manual_seed(0))
        self.register_buffer("samples", None if draws == "anew" else samples)

    def forward(self, x: Tensor) -> Tensor:
        rows = None if self.samples is None else self.samples.expand(max(len(x), len(self.samples)), -1, -1)[: len(x)]
        pooled = F.fractional_max_pool2d(self.inside(x), 2, output_size=5, _random_samples=rows)
        return self.head(pooled.relu().flatten(1))


@pytest.mark.parametrize("draws", ["shared", "differ"])
def test_fractional_max_pools_have_the_windows_of_the_images_in_the_reference(draws):
    model, x = seeded(lambda: Fractional(draws)), images(3, 3, 8, 8)
    for baseline in (0.0, images(3, 8, 8, seed=4), images(3, 3, 8, 8, seed=5)):
        maps = attrbox.explain(model, x, "deeplift", target=1, baseline=baseline, batch_size=3)
        assert maps.relative_gap.max() < 1e-9
        start = torch.as_tensor(baseline, dtype=x.dtype).expand_as(x)
        each = attrbox.explain(model, x, "deeplift", target=1, baseline=start.clone(), batch_size=3)
        torch.testing.assert_close(maps.values, each.values)
        torch.testing.assert_close(maps.values.flatten(1).sum(1), (model(x) - model(start))[:, 1].detach())
    assert [site.operation for site in maps.coverage.rule] == ["max_pool", "relu"]
    assert maps.coverage.complete
    expected = attrbox.explain(model, x, "gradient_x_input", target=1, batch_size=3).values
    lrp = attrbox.explain(model, x, "lrp_epsilon", epsilon=1e-12, target=1, batch_size=3).values
    torch.testing.assert_close(lrp, expected)


def test_fractional_max_pools_that_draw_their_windows_anew_are_refused():
    model, x = seeded(lambda: Fractional("anew")), images(2, 3, 8, 8)
    for method in ("deeplift", "lrp_epsilon", "guided_backprop"):
        with pytest.raises(UnsupportedModelError, match="draws its windows anew"):
            attrbox.explain(model, x, method)
    assert attrbox.explain(model, x, "saliency").values.isfinite().all()


@pytest.mark.parametrize("pool", [name for name, case in CASES.items() if case.kind == "max_pool"])
def test_deeplift_at_max_pools_with_ties(pool):
    # Constant references and integer inputs tie all the time.
    case = CASES[pool]

    class Bare(nn.Module):
        def forward(self, z):
            return case.operation(z).flatten(1)

    x = images(4, *case.shape, seed=71).mul(1.5).round()
    for x0 in (torch.zeros_like(x[:1]), torch.ones_like(x[:1]), x.flip(0), x + 1):
        assert_complete(Bare().eval(), x, x0, 1e-13)


_LAYERS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu_": torch.relu_,
    "gelu": F.gelu,
    "silu in place": lambda z: F.silu(z, inplace=True),
    "hardswish": F.hardswish,
    "elu": F.elu,
    "softplus": F.softplus,
    "tanh_": torch.tanh_,
    "hardtanh": F.hardtanh,
    "sigmoid": torch.sigmoid,
    "softmax": lambda z: z.softmax(1) * 3,
    "pool": lambda z: F.max_pool1d(z[:, None], 3, 1, 1)[:, 0],
    "adaptive pool": lambda z: F.adaptive_max_pool1d(z[:, None], 8)[:, 0],
    "square": lambda z: z * z / 3,
    "gate": lambda z: z * torch.sigmoid(z.flip(1)),
    "gate in place": lambda z: (z + 0).mul_(z.mean(1, keepdim=True).sigmoid()),
    "residual": lambda z: F.relu(z - 0.3) + z,
    "residual in place": lambda z: F.leaky_relu(z, 0.1).add_(z),
    "concatenation": lambda z: torch.cat([z[:, :4].relu(), z[:, 4:].tanh()], 1),
}


class Chain(nn.Module):
    """[N, 8] -> any of `_LAYERS` with linear layers between them -> [N, 3]."""

    def __init__(self, names):
        super().__init__()
        self.names = names
        self.linear = nn.ModuleList(nn.Linear(8, 8) for _ in names)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        for name, linear in zip(self.names, self.linear, strict=True):
            x = _LAYERS[name](linear(x))
        return self.head(x)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    names=st.lists(st.sampled_from(sorted(_LAYERS)), min_size=1, max_size=6),
    seed=st.integers(0, 2**31),
    per_sample=st.booleans(),
    scale=st.sampled_from([0.01, 1.0, 10.0]),
)
def test_deeplift_is_complete_on_random_nets(names, seed, per_sample, scale):
    model = seeded(lambda: Chain(names), seed)
    x = scale * images(3, 8, seed=seed)
    assert_complete(model, x, scale * images(3 if per_sample else 1, 8, seed=seed + 1), 1e-9)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(names=st.lists(st.sampled_from(sorted(_LAYERS)), min_size=1, max_size=6), seed=st.integers(0, 2**31))
def test_random_nets_keep_outputs_and_gradients(names, seed):
    model = seeded(lambda: Chain(names), seed).requires_grad_(False)
    x = images(3, 8, seed=seed)
    leaf = x.clone().requires_grad_()
    output = model(leaf)
    (gradient,) = torch.autograd.grad(output[:, 0].sum(), leaf)
    tape = record(model, x, ALL)
    assert torch.equal(tape.output, output)
    assert torch.equal(tape.replay(tape.output[:, 0], [tape.images])[0], gradient)


# ---------------------------------------------------------------------------------------------------- double backward


def assert_differentiable(
    model: nn.Module,
    x: Tensor,
    x0: Tensor,
    rule: Rule | None,
    score: Callable[[Tensor], Tensor],
    tolerance: float = 1e-6,
) -> None:
    """Assert that the derivative of images -> propagated gradient is that of finite differences of new recordings."""
    weights, direction = images(*x.shape, seed=81), images(*x.shape, seed=82)

    def value(images: Tensor, create_graph: bool) -> tuple[Tensor, Tensor]:
        tape = record(model, images, (rule or DeepLift(),))
        reference = tape.record_reference(x0) if rule is not None and rule.uses_reference else None
        (gradient,) = tape.replay(
            score(tape.output), [tape.images], rule, reference=reference, create_graph=create_graph
        )
        return (gradient * weights).sum(), tape.images

    total, leaf = value(x, create_graph=True)
    if total.requires_grad:
        (derivative,) = torch.autograd.grad(total, leaf, allow_unused=True)
    else:
        derivative = None  # constant
    derivative = torch.zeros_like(x) if derivative is None else derivative
    step = 1e-5
    (above, _), (below, _) = (value(x + sign * step * direction, create_graph=False) for sign in (1, -1))
    expected = (above - below) / (2 * step)
    scale = max(1.0, float(total.detach().abs()))
    torch.testing.assert_close((derivative * direction).sum(), expected, rtol=tolerance, atol=tolerance * scale)


NOT_TWICE = "torch has no second derivative of hardsigmoid, and this rule leaves it to torch"


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", CASES)
def test_the_propagated_gradient_can_be_differentiated(rule, name):
    case = CASES[name]
    if rule in ("guided_backprop", "deconvnet") and name in (
        "hardsigmoid",
        "product, gate second",
        "product, two gates",
    ):
        pytest.skip(NOT_TWICE)
    model = sandwich(case.operation, case.shape, case.conv)
    seed = images(3, 3, seed=91)
    x, x0 = images(3, 5, seed=92), images(1, 5, seed=93)
    assert_differentiable(model, x, x0, RULES[rule], lambda out: (out * seed).sum(1))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["relu", "relu, in place", "gelu", "softmax", "max_pool2d, overlapping", "product"])
def test_the_propagated_gradient_of_a_non_linear_score_can_be_differentiated(rule, name):
    # Log-probabilities: the gradient at the output depends on the images as well, through the true forward pass.
    case = CASES[name]
    model = sandwich(case.operation, case.shape, case.conv)
    x, x0 = images(3, 5, seed=92), images(1, 5, seed=93)
    assert_differentiable(model, x, x0, RULES[rule], lambda out: out.log_softmax(1)[:, 0])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", SMALL)
def test_the_maps_of_small_nets_can_be_differentiated(rule, name):
    if rule in ("guided_backprop", "deconvnet") and name == "hardsigmoid gate":
        pytest.skip(NOT_TWICE)
    build, shape = SMALL[name]
    model = build().requires_grad_(False)
    assert_differentiable(model, images(1, *shape), images(1, *shape, seed=1), RULES[rule], lambda out: out[:, 1], 1e-5)


@pytest.mark.parametrize("name", ["relu", "relu, in place", "gelu", "tanh", "sigmoid, in place", "product"])
def test_gradcheck_of_every_rule_at_once(name):
    """The full Jacobian of images -> propagated gradients, by torch's own checker."""
    case = CASES[name]
    model = sandwich(case.operation, case.shape, case.conv)
    seed, x0 = images(2, 3, seed=91), images(1, 5, seed=93)

    class Map(torch.autograd.Function):
        """A fresh recording for each value, its double backward as the derivative."""

        @staticmethod
        def forward(ctx, x, rule):
            with torch.enable_grad():
                tape = record(model, x, (rule,))
                reference = tape.record_reference(x0) if rule.uses_reference else None
                score = (tape.output * seed).sum(1)
                (gradient,) = tape.replay(score, [tape.images], rule, reference=reference, create_graph=True)
            ctx.gradient, ctx.leaf = gradient, tape.images
            return gradient.detach()

        @staticmethod
        def backward(ctx, upstream):
            if not ctx.gradient.requires_grad:
                return torch.zeros_like(upstream), None
            (result,) = torch.autograd.grad(ctx.gradient, ctx.leaf, upstream, retain_graph=True, allow_unused=True)
            return (torch.zeros_like(upstream) if result is None else result), None

    for rule in ALL:
        x = images(2, 5, seed=94).requires_grad_()
        assert torch.autograd.gradcheck(lambda x, rule=rule: Map.apply(x, rule), (x,), eps=1e-6, atol=1e-6, rtol=1e-5)


def test_the_propagated_gradient_can_be_differentiated_by_parameters_of_the_rule():
    class Learned(Rule):
        kinds = frozenset({"relu"})
        needs = frozenset({"output"})

        def __init__(self, weight):
            self.weight = weight

        def propagate(self, site, grad_output):
            return grad_output * torch.tanh(self.weight * site.output)

    case = CASES["relu, in place"]
    model = sandwich(case.operation, case.shape)
    x, seed = images(2, 5, seed=92), images(2, 3, seed=91)

    def propagated(weight):
        return replayed(model, x, seed, Learned(weight), create_graph=True)

    weight = images(2, *case.shape, seed=95).requires_grad_()
    assert torch.autograd.gradcheck(propagated, (weight,))
