"""Threads, nested calls, inference mode and default devices: the maps are the same and the model is left as it was."""

import threading

import pytest
import torch
from nets import FAST, images, relu_net
from snapshots import nothing_changes
from torch import Tensor, nn

import attrbox

METHODS = [name for name in attrbox.list_methods() if attrbox.method_registry[name].for_all]
X = images(2, 3, 8, 8)


def maps(model: nn.Module, method: str, **options: object) -> Tensor:
    options = {"target": [1, 2], "progress": False} | FAST.get(method, {}) | options
    return attrbox.explain(model, X, method, **options).values


class Counting(nn.Module):
    """Writes into a buffer, puts another tensor in the place of a second one, and counts with a third."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = relu_net()
        for name in ("written", "replaced", "counted"):
            self.register_buffer(name, torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        self.written.fill_(float(len(x)))
        self.replaced = self.replaced + 1
        self.counted += 1
        return self.inner(x)


def test_four_threads_that_explain_one_model() -> None:
    model = Counting().double().eval()
    model.inner[0].bias.requires_grad_(False)
    methods = ["deeplift", "saliency", "smoothgrad", "learned"] * 2
    wanted = {method: maps(model, method) for method in methods}
    found: list[tuple[str, Tensor]] = []

    def work(first: int) -> None:
        for method in methods[first:] + methods[:first]:
            found.append((method, maps(model, method)))

    with nothing_changes(model, X):
        threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 4 * len(methods)
    assert all(torch.equal(values, wanted[method]) for method, values in found)


def test_threads_whose_models_share_their_parameters() -> None:
    inner = relu_net()
    models = [nn.Sequential(inner).eval(), nn.Sequential(inner, nn.Identity()).eval()]
    threads = [threading.Thread(target=lambda m=m: [maps(m, "deeplift") for _ in range(10)]) for m in models * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(parameter.requires_grad for parameter in inner.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_a_call_within_each_call_of_the_target(method: str) -> None:
    model = relu_net()
    inside: list[Tensor] = []

    def target(output: Tensor) -> Tensor:
        inner = method if not inside else "guided_backprop"
        inside.append(maps(model, inner))
        return output[:, 1]

    wanted = maps(model, method, target=lambda output: output[:, 1])
    with nothing_changes(model, X):
        assert torch.equal(maps(model, method, target=target), wanted)
    assert torch.equal(inside[0], maps(model, method))
    assert all(torch.equal(one, maps(model, "guided_backprop")) for one in (inside[1], inside[-1]))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("target", [None, 1, [1, 2], attrbox.classes([1, 2]), attrbox.top(2)], ids=str)
def test_inside_of_inference_mode(method: str, target: object) -> None:
    model = relu_net()
    wanted = maps(model, method, target=target)
    with torch.inference_mode(), nothing_changes(model, X):
        assert torch.equal(maps(model, method, target=target), wanted)


@pytest.mark.parametrize("method", METHODS)
def test_tensors_of_inference_mode(method: str) -> None:
    with torch.inference_mode():
        target, baseline = torch.tensor([1, 2]), X[:1].clone() / 2
    takes = "baseline" in {info.name for info in attrbox.method_registry[method].options}
    options = {"baseline": baseline} if takes else {}
    plain = {"baseline": X[:1] / 2} if takes else {}
    found = maps(relu_net(), method, target=target, **options)
    assert torch.equal(found, maps(relu_net(), method, **plain))


@pytest.mark.parametrize("method", METHODS)
def test_another_default_device(method: str) -> None:
    model = relu_net()
    wanted = maps(model, method)
    with torch.device("meta"):
        assert torch.equal(maps(model, method), wanted)
    torch.set_default_device("meta")
    try:
        found = maps(model, method)
    finally:
        torch.set_default_device(None)
    assert torch.equal(found, wanted)
