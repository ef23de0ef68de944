"""The stem: gradients summed behind the first convolution are those summed at the images, wherever there is one."""

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from nets import images
from torch import Tensor, nn

import attrbox
from attrbox.engine.first_convolution import stem_of
from attrbox.engine.tape import record


class Net(nn.Module):
    """A first convolution, met by `start` in some way; an in-place ReLU behind it writes over its output."""

    def __init__(self, start: Callable[["Net", Tensor], Tensor], dims: int = 2, **options: object) -> None:
        super().__init__()
        convolution = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
        self.start = start
        self.first = convolution(4, 6, 3, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scripting is deprecated, and still in use
            self.scripted = torch.jit.script(nn.Conv2d(4, 6, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.start(self, x), inplace=True)
        return torch.stack([x.flatten(1).square().mean(1), x.flatten(1).mean(1).tanh()], 1)


class OwnFunction(torch.autograd.Function):
    """Doubles its input where no function mode sees it."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


WITH = {
    "a convolution": (lambda net, x: net.first(x), {}),
    "a padded one": (lambda net, x: net.first(F.pad(x, (1, 2, 0, 1))), {}),
    "two paddings": (lambda net, x: net.first(F.pad(F.pad(x, (1, 2), value=3.0), (0, 0, 2, 1))), {}),
    "stride, dilation and groups": (
        lambda net, x: net.first(x),
        {"stride": 2, "dilation": 2, "groups": 2, "padding": 1},
    ),
    "a sequence": (lambda net, x: net.first(x), {"dims": 1, "padding": 1}),
    "a volume": (lambda net, x: net.first(x), {"dims": 3}),
}
WITHOUT = {
    "two convolutions": lambda net, x: net.first(x) + net.first(x),
    "a residual sum": lambda net, x: net.first(x) + x[:, :1, 1:-1, 1:-1],
    "a scripted second reader": lambda net, x: net.first(x) + net.scripted(x),
    "a function of its own": lambda net, x: net.first(x) + OwnFunction.apply(x)[:, :1, 1:-1, 1:-1],
    "something non-linear": lambda net, x: net.first(x.tanh()),
    "no convolution": lambda net, x: x.sin(),
    "a padding that repeats": lambda net, x: net.first(F.pad(x, (1, 1, 1, 1), mode="reflect")),
}


def build(start: Callable[[Net, Tensor], Tensor], options: dict[str, object]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = Net(start, **options).double().eval().requires_grad_(False)
    return model, images(3, 4, *(9,) * options.get("dims", 2))


@pytest.mark.parametrize("name", WITH)
@pytest.mark.parametrize("channels_last", [False, True])
def test_pulled_gradients_are_those_of_autograd(name, channels_last):
    start, options = WITH[name]
    model, x = build(start, options)
    if channels_last and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    tape = record(model, x)
    stem = stem_of(tape.output, tape.images)
    assert stem is not None
    score = tape.output[:, 0]
    (behind,) = tape.replay(score, [stem.edge])
    (wanted,) = tape.replay(score, [tape.images])
    torch.testing.assert_close(stem.pull(behind), wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", WITHOUT)
def test_no_use_of_the_images_is_missed(name):
    model, x = build(WITHOUT[name], {})
    tape = record(model, x)
    assert stem_of(tape.output, tape.images) is None


@pytest.mark.parametrize("name", [*WITH, *WITHOUT])
@pytest.mark.parametrize("method", ["integrated_gradients", "smoothgrad"])
@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_many_passes_sum_to_what_single_gradients_sum_to(name, method, batch_size):
    start, options = WITH[name] if name in WITH else (WITHOUT[name], {})
    model, x = build(start, options)
    targets = attrbox.classes([1, 0])
    few = (
        {"steps": 5, "quadrature": "midpoint"}
        if method == "integrated_gradients"
        else {"n_samples": 5, "noise_fraction": 0.0}
    )
    found = attrbox.explain(model, x, method, target=targets, batch_size=batch_size, progress=False, **few).values
    total = 0
    for k in range(5):
        at = (k + 0.5) / 5 * x if method == "integrated_gradients" else x
        total = total + attrbox.explain(model, at, "saliency", absolute=False, target=targets, progress=False).values
    wanted = total / 5 * (x.unsqueeze(1) if method == "integrated_gradients" else 1)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


def test_smoothgrad_shares_the_passes_of_methods_that_need_squares():
    model, x = build(*WITH["a convolution"])
    calls = []
    model.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    alone = attrbox.explain(model, x, "smoothgrad", n_samples=4, progress=False).values
    passes = sum(calls)
    calls.clear()
    both = attrbox.compare(model, x, [("smoothgrad", {"n_samples": 4}), ("vargrad", {"n_samples": 4})], progress=False)
    assert sum(calls) == passes
    torch.testing.assert_close(both["smoothgrad"].values, alone)
