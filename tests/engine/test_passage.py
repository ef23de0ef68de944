"""What comes from the images, what only looks so, and what goes past the recorder."""

import threading
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from nets import images, seeded
from torch import Tensor, nn

import attrbox
from attrbox.errors import UnsupportedModelError

X = images(3, 3, 8, 8)
Function = Callable[[Tensor], Tensor]


class Calling(nn.Module):
    """A model whose forward pass is a function, with modules of its own."""

    def __init__(self, function: Function, *modules: nn.Module) -> None:
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(modules)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def net() -> nn.Sequential:
    return seeded(
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 5),
        )
    ).requires_grad_()


def values(model: nn.Module, method: str, **options: object) -> Tensor:
    options = {"iterations": 2} | options if method.startswith("learned") else options
    return attrbox.explain(model.eval(), X, method, target=1, progress=False, **options).values


# ------------------------------------------------------------------------------------------------------------ constants


def closure() -> nn.Module:
    inner = net()
    return Calling(lambda x: inner(x))


def listed() -> nn.Module:
    model = Calling(lambda x: model.hidden[0](x))
    model.hidden = [net()]
    return model


def functional() -> nn.Module:
    inner = net()
    parameters = dict(inner.named_parameters())
    return Calling(lambda x: torch.func.functional_call(inner, parameters, x))


def computed_before() -> nn.Module:
    inner = net()
    weights = {name: 2 * parameter / 2 for name, parameter in inner.named_parameters()}  # with a graph of their own
    return Calling(lambda x: torch.func.functional_call(inner, weights, x))


CONSTANTS = {one.__name__: one for one in (closure, listed, functional, computed_before)}
METHODS = ["lrp_epsilon", "epsilon_plus", "deep_taylor", "excitation_backprop", "deeplift", "grad_cam", "learned"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CONSTANTS)
def test_what_does_not_come_from_the_images_is_constant(name: str, method: str) -> None:
    model = CONSTANTS[name]()
    torch.testing.assert_close(values(model, method), values(net(), method))


@pytest.mark.parametrize("fails", [False, True])
def test_constants_require_gradients_again_afterwards(fails: bool) -> None:
    inner = net()

    def run(x: Tensor) -> Tensor:
        y = inner(x)
        if fails and x.requires_grad:
            raise ValueError
        return y

    if fails:
        with pytest.raises(attrbox.errors.ForwardError):
            values(Calling(run), "lrp_epsilon")
    else:
        values(Calling(run), "lrp_epsilon")
    assert all(parameter.requires_grad and parameter.grad is None for parameter in inner.parameters())


def test_a_model_that_differentiates_inside() -> None:
    inner = net()

    def energy(x: Tensor) -> Tensor:
        with torch.enable_grad():
            z = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(inner(z).sum(), z)
        return inner(x) + slope.mean((1, 2, 3))[:, None]

    maps = attrbox.explain(Calling(energy).eval(), X, "lrp_epsilon", target=1, progress=False)
    assert {operated.operation for operated in maps.coverage.unknown} >= {"detach"}


# --------------------------------------------------------------------------------------------------------------- unseen


def scripted(x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(_swish)(x)


def _swish(x: Tensor) -> Tensor:
    return torch.sigmoid(x) * x


class Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, grad):
        return grad


def in_a_thread(x: Tensor) -> Tensor:
    found = []
    thread = threading.Thread(target=lambda: found.append(F.relu(x)))
    thread.start()
    thread.join()
    return found[0]


UNSEEN: dict[str, tuple[Function, str]] = {
    "scripted": (scripted, ""),
    "vmap": (torch.vmap(F.gelu), "gelu"),
    "custom": (Own.apply, "Own"),
    "thread": (in_a_thread, "relu"),
}


@pytest.mark.parametrize("method", ["guided_backprop", "deeplift", "lrp_epsilon", "epsilon_plus"])
@pytest.mark.parametrize("place", ["inside", "at the end"])
@pytest.mark.parametrize("name", UNSEEN)
def test_what_goes_past_the_recorder_is_named(name: str, place: str, method: str) -> None:
    function, operation = UNSEEN[name]
    inner = net()
    inner.insert(6 if place == "at the end" else 3, Calling(function))
    if place == "at the end":
        inner.append(inner[6])
    unknown = attrbox.explain(inner.eval(), X, method, target=1, progress=False).coverage.unknown
    assert unknown
    assert not operation or {operated.operation for operated in unknown} == {operation}
    with pytest.raises(UnsupportedModelError, match="does not understand"):
        values(inner, method, strict=True)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.view(len(x), -1).view_as(x),
        lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
        lambda x: x.clone().add_(1).sub_(1),
        lambda x: _written(x),
        lambda x: torch.stack(list(x)),
        lambda x: F.pad(x, (1, 1))[..., 1:-1],
        lambda x: x.float().double(),
        lambda x: x.unbind(1)[0].unsqueeze(1) + x,
    ],
)
def test_nothing_seen_is_called_unseen(function: Function) -> None:
    inner = net()
    inner.insert(2, Calling(function))
    assert not attrbox.explain(inner.eval(), X, "lrp_epsilon", target=1, progress=False).coverage.unknown


def _written(x: Tensor) -> Tensor:
    y = x.clone()
    flat = y.view(len(y), -1)
    y[:, 0] = 2 * x[:, 0]
    flat[:, 0].mul_(3)
    return y.add_(flat.view_as(y))


# ---------------------------------------------------------------------------------------- dependence without a gradient


CUTS: dict[str, Function] = {
    "detach": lambda x: x * x.detach(),
    "data": lambda x: x * x.data,
    "no_grad": lambda x: x * _without_gradient(x),
    "inference copy": lambda x: x * torch.no_grad()(torch.sigmoid)(x),
    "float": lambda x: x * float(x.sum()),
    "item": lambda x: x * x.sum().item(),
    "tolist": lambda x: x * torch.tensor(x[:, :, 0, 0].tolist(), dtype=x.dtype)[:, :, None, None],
    "int": lambda x: x * (10 * x).int(),
    "long": lambda x: x * (10 * x).long(),
    "to": lambda x: x * (10 * x).to(torch.int32),
    "bool": lambda x: x * x.bool(),
    "signbit": lambda x: x * x.signbit(),
    "logical_not": lambda x: x * x.logical_not(),
    "count_nonzero": lambda x: x * x.count_nonzero(),
    "isclose": lambda x: x * torch.isclose(x, torch.zeros_like(x)),
    "searchsorted": lambda x: x * torch.searchsorted(torch.linspace(0, 1, 5, dtype=x.dtype), x),
    "argmax": lambda x: x * x.argmax(1, keepdim=True),
    "gt": lambda x: x * (x > 0.1),
}


def _without_gradient(x: Tensor) -> Tensor:
    with torch.no_grad():
        return 1 + x.abs()


@pytest.mark.parametrize("method", ["deeplift", "lrp_epsilon", "guided_backprop"])
@pytest.mark.filterwarnings("ignore:Converting a tensor")
@pytest.mark.parametrize("name", CUTS)
def test_what_cuts_the_gradient_is_named(name: str, method: str) -> None:
    inner = net()
    inner.insert(2, Calling(CUTS[name]))
    found = attrbox.explain(inner.eval(), X, method, target=1, progress=False, **_reference(method))
    assert found.coverage.unknown
    with pytest.raises(UnsupportedModelError):
        values(inner, method, strict=True, **_reference(method))


def _reference(method: str) -> dict[str, object]:
    return {"baseline": 0.5} if method == "deeplift" else {}


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x + torch.zeros_like(x),
        lambda x: x if not x.isnan().any() else -x,
        lambda x: x.new_ones(x.shape) + x,
        lambda x: x + len(x) + x.shape[1] + x.size(2),
        lambda x: x + torch.ones(1, dtype=x.dtype).expand_as(x),
        lambda x: x + torch.ones(x.numel(), dtype=torch.float32).view_as(x).type_as(x).to(x),
    ],
)
def test_what_cuts_nothing_is_not_named(function: Function) -> None:
    inner = net()
    inner.insert(2, Calling(function))
    assert not attrbox.explain(inner.eval(), X, "lrp_epsilon", target=1, progress=False).coverage.unknown


# ------------------------------------------------------------------------------------------------ first and last layers


@pytest.mark.parametrize("method", ["deep_taylor", "epsilon_gamma_box", "excitation_backprop"])
@pytest.mark.parametrize("contrastive", [False, True])
def test_rows_in_a_loop_have_the_same_first_and_last_layers(method: str, contrastive: bool) -> None:
    if contrastive and method != "excitation_backprop":
        pytest.skip("an option of excitation backprop")
    options = {"contrastive": True} if contrastive else {}
    inner = net()
    looped = Calling(lambda x: torch.cat([inner(row[None]) for row in x]), inner)
    torch.testing.assert_close(values(looped, method, **options), values(inner, method, **options))


class Stems(nn.Module):
    def __init__(self, swapped: bool) -> None:
        super().__init__()
        self.near, self.far, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 5, padding=2), nn.Linear(8, 5)
        self.swapped = swapped

    def forward(self, x: Tensor) -> Tensor:
        if self.swapped:
            far, near = self.far(x), self.near(x)
        else:
            near, far = self.near(x), self.far(x)
        return self.head(torch.cat([near, far], 1).relu().mean((2, 3)))


@pytest.mark.parametrize("method", ["deep_taylor", "epsilon_gamma_box"])
def test_stems_are_first_layers_in_any_order(method: str) -> None:
    one, other = seeded(lambda: Stems(False)), seeded(lambda: Stems(True))
    torch.testing.assert_close(values(one, method), values(other, method))


@pytest.mark.parametrize("aux_last", [False, True])
def test_the_last_layer_is_that_of_the_explained_head(aux_last: bool) -> None:
    inner = net()
    head, aux = inner[6], nn.Linear(4, 7).double()

    def both(x: Tensor) -> object:
        features = inner[:6](x)
        if aux_last:
            return head(features), aux(features)
        second = aux(features)
        return head(features), second

    wanted = values(inner, "excitation_backprop", contrastive=True)
    found = values(Calling(both, inner, aux), "excitation_backprop", contrastive=True)  # type: ignore[arg-type]
    torch.testing.assert_close(found, wanted)
    assert wanted.abs().sum() > 0


# ------------------------------------------------------------------------------------------------------------ spellings

aten = torch.ops.aten


class Aten(nn.Module):
    """The net by the operators of aten."""

    def __init__(self, overloads: bool) -> None:
        super().__init__()
        self.net, self.overloads = net(), overloads

    def forward(self, x: Tensor) -> Tensor:
        pick = lambda op: op.default if self.overloads else op  # noqa: E731
        for layer in (self.net[0], self.net[2]):
            x = pick(aten.relu)(pick(aten.conv2d)(x, layer.weight, layer.bias))
        return pick(aten.linear)(x.mean((2, 3)), self.net[6].weight, self.net[6].bias)


@pytest.mark.parametrize("overloads", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_operators_of_aten(method: str, overloads: bool) -> None:
    torch.testing.assert_close(values(Aten(overloads), method), values(net(), method))


NUMPY: dict[str, tuple[Function, Function]] = {
    "amax": (lambda x: torch.amax(x, axis=1, keepdims=True), lambda x: torch.amax(x, dim=1, keepdim=True)),
    "amin": (lambda x: x.amin(axis=1, keepdims=True), lambda x: x.amin(dim=1, keepdim=True)),
    "var": (lambda x: torch.var(x, axis=1, keepdims=True), lambda x: torch.var(x, dim=1, keepdim=True)),
    "std": (lambda x: x.std(axis=1, keepdims=True), lambda x: x.std(dim=1, keepdim=True)),
    "prod": (lambda x: torch.prod(x, axis=1, keepdims=True), lambda x: torch.prod(x, dim=1, keepdim=True)),
    "cumprod": (lambda x: torch.cumprod(x, axis=1), lambda x: torch.cumprod(x, dim=1)),
    "softmax": (lambda x: torch.softmax(x, axis=1), lambda x: torch.softmax(x, dim=1)),
    "logsumexp": (
        lambda x: torch.logsumexp(x, axis=1, keepdims=True),
        lambda x: torch.logsumexp(x, dim=1, keepdim=True),
    ),
    "div": (lambda x: torch.div(x, x2=1 + x.abs()), lambda x: torch.div(x, 1 + x.abs())),
    "mul": (lambda x: torch.mul(x, x2=x), lambda x: x * x),
}


@pytest.mark.parametrize("method", ["deeplift", "attn_lrp", "lrp_epsilon"])
@pytest.mark.parametrize("name", NUMPY)
def test_arguments_by_the_names_of_numpy(name: str, method: str) -> None:
    found = []
    for function in NUMPY[name]:
        inner = net()
        inner.insert(2, Calling(function))
        inner.insert(3, Calling(lambda x: x.expand(-1, 4, -1, -1)))
        found.append(values(inner, method))
    torch.testing.assert_close(*found)
