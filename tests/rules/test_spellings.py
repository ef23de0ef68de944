"""True gradients are those of autograd, however an operation is spelled."""

import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from nets import attention_net, images, relu_net, seeded, smooth_net
from rule_cases import ALL, RULES, Spelling, replayed
from torch import Tensor, nn

import attrbox
from attrbox.engine.site import KINDS
from attrbox.engine.tape import record
from attrbox.rules.deeplift import DeepLift
from attrbox.rules.guided import GuidedBackprop


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


@pytest.mark.filterwarnings("ignore::attrbox.errors.PartialMapWarning")  # attention to queries and keys
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
