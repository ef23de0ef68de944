"""Arguments that usually are constants and here depend on the images: the same maps as with everything spelled out."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from nets import images, seeded
from torch import Tensor, nn

import attrbox
from attrbox.core.model_state import untouched
from attrbox.engine.operations.dependent import DEPENDENT
from attrbox.engine.tape import record
from attrbox.rules.deeplift import DeepLift
from attrbox.rules.lrp.activations import LRPEpsilon

X = images(2, 3, 5)
W = images(5, 5, seed=11)
KERNEL = images(3, 3, 3, seed=12)
CUBE = images(5, 5, 5, seed=13)


def dropped(write: Callable[..., object]) -> Callable[..., Tensor]:
    """An operation in place, whose result nobody takes."""

    def run(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        y = a * 1
        write(y, a, b)
        return y

    return run


# name -> (one call, the same spelled out), of a square of activations x [N, 5, 5] and two lines a, b [N, 5]
CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "addmm": (lambda x, a, b: torch.addmm(a, b, W), lambda x, a, b: a + b @ W),
    "addmm, constant vector": (
        lambda x, a, b: torch.addmm(W[0], b, W, beta=0.5),
        lambda x, a, b: F.linear(b, W.T, W[0] / 2),
    ),
    "addmm, constant matrix": (
        lambda x, a, b: torch.addmm(W[:1].expand_as(a), b, W),
        lambda x, a, b: b @ W + W[0],
    ),
    "addmm, two factors": (lambda x, a, b: torch.addmm(a, b, x.mean(0)), lambda x, a, b: a + b @ x.mean(0)),
    "addmm, scaled": (
        lambda x, a, b: torch.addmm(input=a, mat1=b, mat2=x.mean(0), beta=0.5, alpha=-2),
        lambda x, a, b: 0.5 * a + -2 * (b @ x.mean(0)),
    ),
    "addmm, beta 0": (lambda x, a, b: a.addmm(b, x[0], beta=0), lambda x, a, b: b @ x[0]),
    "addmm, constant vector, scaled": (
        lambda x, a, b: torch.addmm(W[0], b, W, alpha=0.5),
        lambda x, a, b: F.linear(b, W.T / 2, W[0]),
    ),
    "addmm_": (
        dropped(lambda y, a, b: y.addmm_(b, W, alpha=0.3)),
        lambda x, a, b: a + 0.3 * (b @ W),
    ),
    "addmm_ of a constant": (
        lambda x, a, b: torch.ones_like(a).addmm_(b, x[0], beta=2),
        lambda x, a, b: 2 * torch.ones_like(a) + b @ x[0],
    ),
    "baddbmm": (lambda x, a, b: torch.baddbmm(x, x, x.mT, alpha=0.2), lambda x, a, b: x + 0.2 * torch.bmm(x, x.mT)),
    "baddbmm_": (lambda x, a, b: x.mul(1).baddbmm_(x, x.mT), lambda x, a, b: x + torch.bmm(x, x.mT)),
    "baddbmm, constant addend": (lambda x, a, b: torch.baddbmm(W, x, x.mT), lambda x, a, b: torch.bmm(x, x.mT) + W),
    "addbmm": (lambda x, a, b: torch.addbmm(x[0], x, x.mT) + x * 0, lambda x, a, b: x[0] + (x @ x.mT).sum(0) + x * 0),
    "addmv": (lambda x, a, b: torch.addmv(a[0], x[0], b[0]) + a * 0, lambda x, a, b: a[0] + x[0].mv(b[0]) + a * 0),
    "addr": (
        lambda x, a, b: torch.addr(x[0], a[0], b[0], beta=3) + x * 0,
        lambda x, a, b: 3 * x[0] + torch.outer(a[0], b[0]) + x * 0,
    ),
    "addcmul": (lambda x, a, b: torch.addcmul(a, a, b, value=0.7), lambda x, a, b: a + 0.7 * a * b),
    "addcmul, gated": (lambda x, a, b: torch.addcmul(a, a.sigmoid(), b), lambda x, a, b: a + a.sigmoid() * b),
    "addcmul_": (dropped(lambda y, a, b: y.addcmul_(a, b)), lambda x, a, b: a + a * b),
    "addcdiv": (
        lambda x, a, b: torch.addcdiv(a, b, a.exp(), value=-2),
        lambda x, a, b: a + -2 * b / a.exp(),
    ),
    "addcdiv, constant numerator": (
        lambda x, a, b: torch.addcdiv(a, W[0], b.exp()),
        lambda x, a, b: a + W[0] / b.exp(),
    ),
    "lerp": (lambda x, a, b: torch.lerp(a, b, a.sigmoid()), lambda x, a, b: a + a.sigmoid() * (b - a)),
    "lerp_": (lambda x, a, b: (1 * a).lerp_(W[0], b), lambda x, a, b: a + b * (W[0] - a)),
    "lerp, number": (lambda x, a, b: torch.lerp(a, b, 0.3), lambda x, a, b: 0.7 * a + 0.3 * b),
    "linear, bias": (lambda x, a, b: F.linear(b, W, a), lambda x, a, b: b @ W.T + a),
    "linear, constant matrix": (lambda x, a, b: F.linear(x, W, W + 1), lambda x, a, b: x @ W.T + (W + 1)),
    "linear, bias alone": (
        lambda x, a, b: F.linear(W[:2], W, a[0]) + a * 0,
        lambda x, a, b: W[:2] @ W.T + a[0] + a * 0,
    ),
    "linear, weight": (lambda x, a, b: F.linear(b, x[0], W[0]), lambda x, a, b: b @ x[0].T + W[0]),
    "linear, weight and bias": (lambda x, a, b: F.linear(b, x[0], a[0]), lambda x, a, b: b @ x[0].T + a[0]),
    "conv1d, kernel": (
        lambda x, a, b: F.conv1d(x, x[:1, :, :3], W[0, :1]),
        lambda x, a, b: F.conv1d(x, x[:1, :, :3]) + W[0, :1, None],
    ),
    "conv1d, bias": (
        lambda x, a, b: F.conv1d(x[:, :3], KERNEL, a[0, :3], padding=1),
        lambda x, a, b: F.conv1d(x[:, :3], KERNEL, padding=1) + a[0, :3, None],
    ),
    "conv2d, kernel and bias": (
        lambda x, a, b: F.conv2d(x[None], x[:, None, :2, :2], a[0, :1], padding=1),
        lambda x, a, b: F.conv2d(x[None], x[:, None, :2, :2], padding=1) + a[0, :1, None, None],
    ),
    "conv_transpose1d, kernel and bias": (
        lambda x, a, b: F.conv_transpose1d(x, x[0, :, :4].unflatten(1, (2, 2)), stride=2, bias=a[0, :2]),
        lambda x, a, b: F.conv_transpose1d(x, x[0, :, :4].unflatten(1, (2, 2)), stride=2) + a[0, :2, None],
    ),
    "conv_transpose2d, bias": (
        lambda x, a, b: F.conv_transpose2d(x[:, None], KERNEL[None], a[0, :3]).flatten(1),
        lambda x, a, b: (F.conv_transpose2d(x[:, None], KERNEL[None]) + a[0, :3, None, None]).flatten(1),
    ),
    "bilinear, bias": (
        lambda x, a, b: F.bilinear(a, b, CUBE, a[0]),
        lambda x, a, b: torch.einsum("ni,oij,nj->no", a, CUBE, b) + a[0],
    ),
    "bilinear of three": (
        lambda x, a, b: torch.bilinear(a, b, CUBE * x[0], None),
        lambda x, a, b: (torch.einsum("ni,oij->noj", a, CUBE * x[0]) @ b[..., None])[..., 0],
    ),
    "layer_norm": (
        lambda x, a, b: F.layer_norm(x, (5,), a[0], b[0], 0.1),
        lambda x, a, b: F.layer_norm(x, (5,), eps=0.1) * a[0] + b[0],
    ),
    "layer_norm, two axes": (
        lambda x, a, b: torch.layer_norm(x, (5, 5), x[0]),
        lambda x, a, b: F.layer_norm(x, (5, 5)) * x[0],
    ),
    "group_norm": (
        lambda x, a, b: F.group_norm(x[:, :4], 2, a[0, :4], b[0, :4]),
        lambda x, a, b: F.group_norm(x[:, :4], 2) * a[0, :4, None] + b[0, :4, None],
    ),
    "rms_norm": (lambda x, a, b: F.rms_norm(x, (5,), a[0]), lambda x, a, b: F.rms_norm(x, (5,)) * a[0]),
    "instance_norm": (
        lambda x, a, b: F.instance_norm(x, weight=a[0], bias=b[0]),
        lambda x, a, b: F.instance_norm(x) * a[0, :, None] + b[0, :, None],
    ),
    "batch_norm": (
        lambda x, a, b: F.batch_norm(F.conv1d(x, W[..., None]), W[0], W[1].exp(), a[0], b[0]),
        lambda x, a, b: F.batch_norm(F.conv1d(x, W[..., None]), W[0], W[1].exp()) * a[0, :, None] + b[0, :, None],
    ),
    "batch_norm, bias alone": (
        lambda x, a, b: torch.batch_norm(a, W[2], b[0], W[0], W[1].exp(), False, 0.1, 0.2, False),
        lambda x, a, b: F.batch_norm(a, W[0], W[1].exp(), W[2], eps=0.2) + b[0],
    ),
    "native_batch_norm": (
        lambda x, a, b: torch.native_batch_norm(x, a[0], None, W[0], W[1].exp(), False, 0.1, 1e-5)[0],
        lambda x, a, b: F.batch_norm(x, W[0], W[1].exp()) * a[0, :, None],
    ),
    "prelu": (lambda x, a, b: F.prelu(x, a[0]), lambda x, a, b: x.relu() - a[0, :, None] * (-x).relu()),
    "prelu, one slope": (lambda x, a, b: F.prelu(a, b[0, :1]), lambda x, a, b: a.relu() - b[0, :1] * (-a).relu()),
    "clamp": (
        lambda x, a, b: torch.clamp(a, b - 1, b + 0.5),
        lambda x, a, b: torch.minimum(torch.maximum(a, b - 1), b + 0.5),
    ),
    "clamp, one bound": (lambda x, a, b: a.clamp(max=b), lambda x, a, b: torch.minimum(a, b)),
    "clamp_min_": (dropped(lambda y, a, b: y.clamp_min_(b)), lambda x, a, b: torch.maximum(a, b)),
    "clamp_max": (lambda x, a, b: torch.clamp_max(a, b), lambda x, a, b: torch.minimum(a, b)),
    "einsum of three": (
        lambda x, a, b: torch.einsum("nij, n...i, n...j -> n...", x, a, b),
        lambda x, a, b: (torch.einsum("nij,ni->nj", x, a) * b).sum(1),
    ),
    "einsum of three, implicit": (
        lambda x, a, b: torch.einsum(x, [0, 1, 2], a, [0, 1], b, [0, 3]) + a * 0,
        lambda x, a, b: torch.einsum("nij,ni->nj", x, a).T @ b + a * 0,
    ),
    "multi_dot": (
        lambda x, a, b: torch.linalg.multi_dot([a, x[0], W, x[0].T]),
        lambda x, a, b: a @ x[0] @ W @ x[0].T,
    ),
    "kron": (lambda x, a, b: torch.kron(a, b[:1]), lambda x, a, b: (a[:, :, None] * b[0]).flatten(1)),
    "cross": (
        lambda x, a, b: torch.linalg.cross(a[:, :3], b[:, :3]),
        lambda x, a, b: torch.linalg.cross(a[:, :3], b[:, :3]) * 1,
    ),
}
# The others take one image's activations for all images.
ROW_BY_ROW = (
    """
    addmm|addmm, constant vector|addmm, constant vector, scaled
    |addmm, constant matrix|addmm_|baddbmm|baddbmm_|baddbmm, constant addend|addcmul
    |addcmul, gated|addcmul_|addcdiv|addcdiv, constant numerator|lerp|lerp_|lerp, number|linear, bias
    |linear, constant matrix|clamp|clamp, one bound|clamp_min_|clamp_max|einsum of three|cross
""".replace("\n    ", "")
    .strip()
    .split("|")
)


class Net(nn.Module):
    """[N, 3, 5] -> activations x, a, b -> a case -> scores."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function
        self.first, self.second, self.third = nn.Linear(5, 5), nn.Linear(15, 5), nn.Linear(15, 5)

    def forward(self, images: Tensor) -> Tensor:
        lines = images.flatten(1)
        x = torch.cat([self.first(images), images[:, :2]], 1).tanh()
        result = self.function(x, self.second(lines), self.third(lines).tanh())
        result = result if len(result) == len(images) else result[None].expand(len(images), *result.shape)
        scores = result.reshape(len(images), -1)
        return F.linear(scores.relu() - 0.3 * scores, torch.linspace(-1, 2, 2 * scores.shape[1]).double().view(2, -1))


METHODS = [
    "lrp_epsilon",
    "lrp",
    "epsilon_plus",
    "epsilon_alpha2_beta1",
    "epsilon_gamma_box",
    "deep_taylor",
    "excitation_backprop",
    "attn_lrp",
    ("attn_lrp", {"gamma_linear": 0.2, "gamma_convolution": 0.3}),
    "deeplift",
    ("deeplift", {"reveal_cancel": "all"}),
    "guided_backprop",
]


@pytest.mark.parametrize("name", CASES)
def test_maps_are_those_of_the_same_net_spelled_out(name):
    fused, apart = (seeded(lambda function=function: Net(function)) for function in CASES[name])
    x = X if name in ROW_BY_ROW else X[:1]
    torch.testing.assert_close(fused(x), apart(x))
    got, expected = (attrbox.compare(model, x, METHODS, target=1) for model in (fused, apart))
    for label in expected:
        torch.testing.assert_close(got[label].values, expected[label].values, rtol=1e-8, atol=1e-9, msg=label)
        assert not got[label].coverage.unknown
        assert not expected[label].coverage.unknown
    assert got["deeplift"].relative_gap.max() < 1e-9
    audits = [attrbox.explain(model, x, "epsilon_plus", target=1, audit=True) for model in (fused, apart)]
    torch.testing.assert_close(*(maps.coverage.conservation.constants for maps in audits))
    torch.testing.assert_close(*(maps.coverage.conservation.absorbed.sum(2) for maps in audits))


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_stay(name):
    model, x = seeded(lambda: Net(CASES[name][0])), X if name in ROW_BY_ROW else X[:1]
    leaf = x.clone().requires_grad_()
    output = model(leaf)
    (gradient,) = torch.autograd.grad(output[:, 1].sum(), leaf)
    for rules in ([LRPEpsilon()], [DeepLift("all")], []):
        with untouched(model):
            tape = record(model, x, rules)
            torch.testing.assert_close(tape.output, output)
            torch.testing.assert_close(tape.replay(tape.output[:, 1], [tape.images])[0], gradient)


@pytest.mark.parametrize(
    "name", ["addmm", "addmm, constant matrix", "linear, bias", "lerp, number", "batch_norm, bias alone"]
)
def test_sums_are_no_operations_that_a_rule_misses(name):
    maps = attrbox.explain(seeded(lambda: Net(CASES[name][0])), X[:1], "guided_backprop", target=1)
    assert {operated.operation for operated in maps.coverage.derivative} == {"tanh"}


@pytest.mark.parametrize("name", ["addmm", "addmm, constant matrix", "baddbmm", "lerp", "linear, bias", "clamp"])
def test_patterns_are_those_of_the_same_net_spelled_out(name):
    data = images(16, 3, 5, seed=3)
    found = []
    for function in CASES[name]:
        model = seeded(lambda function=function: Net(function))
        patterns = attrbox.fit_patterns(model, data, progress=False)
        found.append(attrbox.explain(model, X, "pattern_attribution", target=1, patterns=patterns).values)
    torch.testing.assert_close(*found)


def test_every_function_that_is_taken_apart_has_a_case():
    called = set()

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            called.add(function)
            return function(*args, **(kwargs or {}))

    with Watch():
        for name, (fused, _) in CASES.items():
            seeded(lambda fused=fused: Net(fused))(X if name in ROW_BY_ROW else X[:1])
    names = {function.__name__.strip("_") for function in DEPENDENT}
    alike = {"clip": "clamp", "cudnn_batch_norm": "batch_norm", "native_batch_norm_legit_no_training": "batch_norm"}
    alike |= {"linalg_multi_dot": "multi_dot", "chain_matmul": "multi_dot", "conv2d": "conv1d", "conv3d": "conv1d"}
    alike |= {"conv_transpose3d": "conv_transpose2d"}
    seen = {function.__name__.strip("_") for function in called} | {"multi_dot"}
    assert {alike.get(name, name) for name in names} <= seen
