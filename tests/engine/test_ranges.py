"""What the engine says about the range of a function, against the function itself on many numbers."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from lrp_formulas import by_alpha_beta, by_gamma, matrix, relevance_of
from nets import images, seeded
from torch import Tensor, nn

from attrbox.core.model_state import untouched
from attrbox.engine.operations import elementwise, reductions
from attrbox.engine.site import ELEMENTWISE, GATES, RECTIFIERS, SQUASHERS, FunctionInfo, LayerInfo, Site
from attrbox.engine.tape import record
from attrbox.rules.deeplift import DeepLift
from attrbox.rules.lrp.composites import Composite
from attrbox.rules.lrp.layers import AlphaBeta, Gamma, ZPlus

THIRD = torch.tensor(1 / 3, dtype=torch.float64)
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu_": lambda x: (1 * x).relu_(),
    "clamp from 0": lambda x: x.clamp(min=0),
    "clamp from 1": lambda x: torch.clip(x, 1.0),
    "clamp from -1": lambda x: x.clamp_min(-1.0),
    "clamp to 0": lambda x: x.clamp_max(0.0),
    "clamp from 0 to 2": lambda x: x.clamp(0, 2),
    "clamp from 2 to 1": lambda x: x.clamp(2, 1),
    "clamp from 2 to -1": lambda x: x.clamp(2, -1),
    "clamp from a tensor": lambda x: x.clamp(min=THIRD),
    "hardtanh": F.hardtanh,
    "hardtanh from 0": lambda x: F.hardtanh(x, 0.0, 3.0),
    "hardtanh from 1/2": lambda x: F.hardtanh(x, 0.5, 3.0),
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "leaky_relu, 0": lambda x: F.leaky_relu(x, 0.0),
    "leaky_relu, negative": lambda x: F.leaky_relu(x, -0.2),
    "rrelu": lambda x: F.rrelu(x, 0.1, 0.3),
    "prelu": lambda x: F.prelu(x, THIRD.view(1)),
    "elu": F.elu,
    "elu, steep": lambda x: F.elu(x, 3.0),
    "selu": F.selu,
    "celu": lambda x: F.celu(x, 2.0),
    "softplus": F.softplus,
    "softplus, beta": lambda x: F.softplus(x, 3.0, 5.0),
    "softplus, negative": lambda x: F.softplus(x, -1.0),
    "softplus, straight below 0": lambda x: F.softplus(x, 1.0, -2.0),
    "gelu": F.gelu,
    "gelu, tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "hardswish": F.hardswish,
    "mish": F.mish,
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "expit": torch.special.expit,
    "tanh": torch.tanh,
    "abs": abs,
    "absolute": torch.absolute,
    "exp": torch.exp,
    "exp2": torch.special.exp2,
    "expm1": torch.expm1,
    "0.5 ** x": lambda x: 0.5**x,
    "tensor ** x": lambda x: torch.pow(THIRD, x),
    "log": torch.log,
    "log2": torch.log2,
    "log10": torch.log10,
    "log1p": torch.log1p,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "root": lambda x: elementwise.root(x, 1 / 3),
    "square": torch.square,
    "reciprocal": torch.reciprocal,
    "1 / x": lambda x: 1 / x,
    "-1 / x": lambda x: -1 / x,
    "x ** 2": lambda x: x**2,
    "x ** 3": lambda x: x**3,
    "x ** -1": lambda x: x**-1,
    "x ** -4": lambda x: x**-4.0,
    "x ** 1.5": lambda x: x.pow(1.5),
    "x ** tensor": lambda x: x ** torch.tensor(3.0),
    "float_power": lambda x: torch.float_power(x, 2),
    "erf": torch.erf,
    "sin": torch.sin,
    "cos": torch.cos,
    "logsigmoid": F.logsigmoid,
    "softshrink": F.softshrink,
    "hardshrink": F.hardshrink,
    "threshold, a ReLU": lambda x: F.threshold(x, 0.0, 0.0),
    "threshold, above": lambda x: F.threshold(x, 0.5, 0.5),
    "threshold, a jump": lambda x: F.threshold(x, 1.0, 0.25),
    "threshold, a value below": lambda x: F.threshold(x, 1.0, -0.25),
    "threshold, below": lambda x: F.threshold(x, -1.0, 2.0),
}
REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: x.log_softmax(-1),
    "logsumexp": lambda x: x.logsumexp(-1),
    "vector_norm": lambda x: torch.linalg.vector_norm(x, dim=-1),
}


def numbers() -> Tensor:
    """Both signs, from tiny to huge, and close together where functions have their kinks and dips; in rows of 4."""
    dense = torch.linspace(-8, 8, 6401, dtype=torch.float64)
    sizes = torch.logspace(-12, 3, 61, dtype=torch.float64)
    return torch.cat([dense, sizes, -sizes, torch.zeros(1, dtype=torch.float64)]).view(-1, 4)


class Formula(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def site_of(name: str) -> Site:
    with untouched(Formula((FUNCTIONS | REDUCTIONS)[name]).eval()) as model:
        (site,) = record(model, numbers(), [DeepLift()]).sites
    return site


@pytest.mark.parametrize("name", [*FUNCTIONS, *REDUCTIONS])
def test_no_output_is_below_the_floor_and_a_sign_that_is_there_is_known(name):
    outputs = (FUNCTIONS | REDUCTIONS)[name](numbers())
    least = outputs[~outputs.isnan()].min().item()  # not defined there
    floor = site_of(name).floor
    assert floor <= least
    if name not in ("clamp from a tensor", "tensor ** x"):  # nobody looks at the values of tensors
        assert (floor >= 0) == (least >= 0)


def test_every_function_is_tried():
    readers = [*elementwise.READERS.values(), *(v for r, v in reductions.READERS.items() if hasattr(r, "floor"))]
    wanted = {function.__name__.strip("_") for functions in readers for function in functions}
    called = set()

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            called.add(function.__name__.strip("_"))
            return function(*args, **(kwargs or {}))

    with Watch():
        for function in (FUNCTIONS | REDUCTIONS).values():
            function(numbers())
    alike = {"special_expit": "sigmoid", "expit": "sigmoid", "special_exp2": "exp2", "special_expm1": "expm1"}
    alike |= {"special_log1p": "log1p", "special_erf": "erf", "ipow": "pow", "log_sigmoid": "logsigmoid"}
    alike |= {"special_softmax": "softmax", "special_log_softmax": "log_softmax", "special_logsumexp": "logsumexp"}
    called = {alike.get(name, name) for name in called}
    assert {alike.get(name, name) for name in wanted} <= called
    assert {site_of(name).kind for name in FUNCTIONS} == ELEMENTWISE


@pytest.mark.parametrize("name", FUNCTIONS)
def test_bounds_are_where_the_function_cuts_off(name):
    site, x = site_of(name), numbers()
    bounds = site.about(FunctionInfo).bounds
    if bounds is not None:
        torch.testing.assert_close(FUNCTIONS[name](x), x.clamp(*bounds))
    clips = site.kind in ("relu", "relu6", "hardtanh") and name not in (
        "clamp from a tensor",
        "clamp from 2 to 1",
        "clamp from 2 to -1",
    )
    assert (bounds is not None) == clips
    if site.kind == "relu":
        assert bounds == (0, math.inf)
    if site.kind == "relu6":
        assert bounds[0] == 0
        assert 0 < bounds[1] < math.inf


@pytest.mark.parametrize("name", FUNCTIONS)
def test_kinds_are_what_their_sets_say(name):
    kind, function = site_of(name).kind, FUNCTIONS[name]
    far = torch.tensor([-4.0, 4.0], dtype=torch.float64)
    low, high = function(far).tolist()
    if kind in RECTIFIERS and not name.startswith(("softplus, ", "clamp", "hardtanh", "elu, ")):
        assert high > 3.9  # one half of the axis passes
        assert abs(low) < 0.5 * high
    if kind in GATES:
        outputs = function(numbers())
        assert 0 <= outputs.min() <= 1e-9
        assert 1 - 1e-9 <= outputs.max() <= 1
    if kind in SQUASHERS - {"hardtanh"}:
        assert function(numbers()).abs().max() <= 1


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("rule", ["z+", "alpha 2, beta 1", "gamma"])
def test_relevance_behind_a_function_is_what_the_formula_says(name, rule):
    """A layer that takes its input for nonnegative where it is not loses half of the products."""
    rules = {
        "z+": (ZPlus(), by_alpha_beta(1.0, 0.0)),
        "alpha 2, beta 1": (AlphaBeta(2.0, 1.0), by_alpha_beta(2.0, 1.0)),
        "gamma": (Gamma(0.4), by_gamma),
    }
    ours, oracle = rules[rule]
    layer = seeded(lambda: nn.Linear(6, 4), seed=2)
    x, relevance = images(3, 6, seed=1), images(3, 4, seed=4)
    x = x.abs() if FUNCTIONS[name](x).isnan().any() else x
    after = FUNCTIONS[name](x)
    got = relevance_of(ours, layer, x, relevance, Formula(FUNCTIONS[name]))
    m, b = matrix(layer, (6,))
    expected = torch.stack([oracle(m, b, *row) for row in zip(after, relevance, strict=True)])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_layer_knows_the_sign_of_its_input(name):
    """Behind pools and changes of shape, too: a term for negative inputs costs a layer twice the time."""

    def build() -> nn.Module:
        pooled = nn.Sequential(nn.Unflatten(1, (1, 2, 4)), nn.MaxPool2d(1), nn.AvgPool2d((2, 1)), nn.Flatten())
        return nn.Sequential(Formula(FUNCTIONS[name]), pooled, nn.Linear(4, 3), nn.Linear(3, 2))

    with untouched(seeded(build)) as model:
        layers = [site for site in record(model, images(2, 8).abs(), [Composite()]).sites if site.kind == "linear"]
    known = site_of(name).floor >= 0
    assert [layer.about(LayerInfo).nonnegative for layer in layers] == [known, False]


def test_a_constant_beside_a_nonnegative_activation_may_be_negative():
    """A class token, or a border, laid beside what a ReLU made."""
    layer, token = seeded(lambda: nn.Linear(6, 4), seed=2), images(1, 2, seed=5)
    x, relevance = images(3, 4, seed=1), images(3, 4, seed=4)

    def joined(x: Tensor) -> Tensor:
        return torch.cat([x.relu(), token.expand(len(x), 2)], 1)

    m, b = matrix(layer, (6,))
    got = relevance_of(ZPlus(), layer, x, relevance, Formula(joined))
    oracle = by_alpha_beta(1.0, 0.0)
    expected = torch.stack([oracle(m, b, *row) for row in zip(joined(x), relevance, strict=True)])
    torch.testing.assert_close(got, expected[:, :4])
