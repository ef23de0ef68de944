"""Float32 against float64, over levels and scales: no rule may lose digits that the model's own arithmetic keeps."""

import pytest
import torch
import torch.nn.functional as F
from nets import images
from torch import Tensor, nn

import attrbox

WEIGHT = images(6, 6, seed=5)

# x [n, 6] -> [n, ...]; each is one kind of site, or one decomposition.
FUNCTIONS = {
    "relu": torch.relu,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.1),
    "elu": F.elu,
    "selu": F.selu,
    "gelu": F.gelu,
    "silu": F.silu,
    "mish": F.mish,
    "softplus": F.softplus,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "logsigmoid": F.logsigmoid,
    "abs": torch.abs,
    "exp": lambda x: torch.exp(-x.abs()),
    "log": lambda x: torch.log1p(x.abs()),
    "sqrt": lambda x: torch.sqrt(x.abs()),
    "rsqrt": lambda x: torch.rsqrt(x.abs() + 1),
    "square": torch.square,
    "erf": torch.erf,
    "sin": torch.sin,
    "softmax": lambda x: x.softmax(1),
    "log_softmax": lambda x: x.log_softmax(1),
    "logsumexp": lambda x: x.logsumexp(1, keepdim=True),
    "layer_norm": lambda x: F.layer_norm(x, (6,)),
    "group_norm": lambda x: F.group_norm(x.view(-1, 2, 3), 2).flatten(1),
    "rms_norm": lambda x: F.rms_norm(x, (6,), eps=1e-6),
    "vector_norm": lambda x: torch.linalg.vector_norm(x, dim=1, keepdim=True),
    "normalize": lambda x: F.normalize(x, dim=1),
    "std": lambda x: x.std(1, keepdim=True),
    "max": lambda x: x.amax(1, keepdim=True),
    "product": lambda x: x * x.flip(1),
    "quotient": lambda x: x / (1 + x.flip(1).abs()),
    "matmul": lambda x: (x[:, :, None] @ x[:, None]).flatten(1),
    "maximum": lambda x: torch.maximum(x, x.flip(1)),
}


class Net(nn.Module):
    """f(s x + level), read out by fixed weights."""

    def __init__(self, name: str, scale: float = 1.0, level: float = 0.0) -> None:
        super().__init__()
        self.name, self.scale, self.level = name, scale, level
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        y = FUNCTIONS[self.name](x * self.scale + self.level)
        return (y * WEIGHT.to(y).flatten()[: y.shape[1]]).sum(1, keepdim=True)


def mapped(net: nn.Module, x: Tensor, baseline: Tensor) -> tuple[Tensor, Tensor]:
    maps = attrbox.explain(net, x, "deeplift", target=0, baseline=baseline, progress=False)
    with torch.no_grad():
        return maps.values, (net(x) - net(baseline))[:, 0]


def points(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return images(4, 6, seed=1).float().to(dtype), images(4, 6, seed=2).float().to(dtype)


@pytest.mark.parametrize("scale", [1e-8, 1e-4, 1e-2, 1.0, 1e2, 1e4, 1e8])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_threshold_is_absolute(name: str, scale: float) -> None:
    """Complete to rounding in float64, whatever the scale of the signals; baselines near and far."""
    x, far = points(torch.float64)
    for baseline in (far, x + 1e-3 * far, x + 1e-6 * far, x + 1e-9 * far):
        values, wanted = mapped(Net(name, scale), x, baseline)
        with torch.no_grad():
            size = Net(name, scale)(x).abs().max()
        rounding = 1e-13 * size + 1e-15 * scale + 1e-10 * values.abs().sum(1)
        assert values.isfinite().all()
        assert ((values.sum(1) - wanted).abs() <= rounding).all()


@pytest.mark.parametrize("level", [0.0, 1.0, 1e2, 1e3, 1e4])
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 1e3, 1e6])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_float32_keeps_the_digits_of_float64(name: str, scale: float, level: float) -> None:
    """The sum differs by the rounding of the values and of the model's own output, no more."""
    (x, baseline), (x64, baseline64) = points(torch.float32), points(torch.float64)
    net = Net(name, scale, level)
    values, native = mapped(net, x, baseline)
    exact, wanted = mapped(net, x64, baseline64)
    assert values.isfinite().all()
    own = (native.double() - wanted).abs().max()
    with torch.no_grad():
        size = sum(FUNCTIONS[name](z * scale + level).abs().amax() for z in (x64, baseline64))
    rounding = 20 * torch.finfo(torch.float32).eps * (exact.abs().sum(1) + size)
    assert ((values.double().sum(1) - wanted).abs() <= 4 * own + rounding).all()


@pytest.mark.parametrize("level", [1e2, 1e3, 1e4])
@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("deeplift", "softmax"),
        ("deeplift", "log_softmax"),
        ("deeplift", "logsumexp"),
        ("attn_lrp", "softmax"),
        ("attn_lrp", "log_softmax"),  # of logsumexp it takes torch's derivative, which loses these digits itself
    ],
)
def test_a_level_that_all_logits_share(method: str, name: str, level: float) -> None:
    (x, _), (x64, _) = points(torch.float32), points(torch.float64)
    x, x64 = x + level, (x + level).double()
    values = attrbox.explain(Net(name), x, method, target=0, progress=False).values.double()
    exact = attrbox.explain(Net(name), x64, method, target=0, progress=False).values
    assert (values - exact).norm() <= 2e-4 * exact.norm()
    assert ((values - exact).sum(1).abs() <= 1e-5 * exact.abs().sum(1)).all()


ROOTS = {
    "sqrt": lambda x: torch.sqrt(torch.relu(x)),
    "power": lambda x: torch.relu(x) ** 0.3,
    "norm": lambda x: torch.linalg.vector_norm(torch.relu(x), dim=1, keepdim=True),
    "l_p pool": lambda x: F.lp_pool1d(torch.relu(x)[:, None], 2, 3).flatten(1),
    "std": lambda x: torch.relu(x).view(-1, 2, 3).std(2),
}


@pytest.mark.parametrize("name", ROOTS)
def test_nothing_is_attributed_where_nothing_changed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where input and baseline meet at a point of infinite slope; the values are complete, and 0 where x = x0."""
    monkeypatch.setitem(FUNCTIONS, name, ROOTS[name])
    x = torch.tensor([[4.0, -1.0, -2.0, -1.0, -3.0, -0.5], [1.0, 2.0, -3.0, 0.5, 0.1, 3.0]], dtype=torch.float64)
    values, wanted = mapped(Net(name), x, torch.zeros_like(x[:1]))
    torch.testing.assert_close(values.sum(1), wanted)
    assert (values[x < 0] == 0).all()


@pytest.mark.parametrize("function", [torch.sqrt, torch.log, lambda x: x.pow(1.7)])
@pytest.mark.parametrize("level", [1e3, 1e6, 1e8])
def test_slopes_of_powers_and_logarithms_between_close_values_at_large_levels(function, level):
    """Close is measured on the scale of x: a quotient of differences would lose the digits that both have in common."""

    class Powers(nn.Module):
        def forward(self, x):
            return function(x).sum(1, keepdim=True)

    x = level * (2 + images(2, 6).abs())
    x0 = x * (1 + 1e-4 * images(2, 6, seed=1).abs())
    exact = attrbox.explain(
        Powers().eval(), x.float().double(), "deeplift", baseline=x0.float().double(), progress=False
    ).values
    rough = attrbox.explain(Powers().eval(), x.float(), "deeplift", baseline=x0.float(), progress=False).values
    torch.testing.assert_close(rough.double(), exact, rtol=1e-5, atol=0)
