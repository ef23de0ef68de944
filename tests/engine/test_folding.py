"""Batch-norm folded into convolutions: the same numbers, only where it is allowed, and nothing left behind."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attrbox
from attrbox.engine.folding import Folding, Unfolded


class Pair(nn.Module):
    """Convolution, batch-norm, ReLU, with a switch for what else uses the convolution's output."""

    def __init__(self, use: str = "once", dims: int = 2, affine: bool = True, bias: bool = True) -> None:
        super().__init__()
        convolution = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
        norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims]
        self.use = use
        self.first, self.norm = convolution(3, 6, 3, padding=1, bias=bias, groups=3), norm(6, affine=affine)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        features = self.first(x)
        if self.use == "batch statistics":
            return self.head(F.batch_norm(features, None, None, training=True).relu().flatten(2).mean(2))
        if self.use.startswith("conditional"):  # of the image's mean color: other weights in each pass
            what, color = self.use.split()[1], x.mean((0, 2, 3)).repeat(2)
            norm, first = self.norm, self.first
            own = {"mean": norm.running_mean, "variance": norm.running_var, "scale": norm.weight, "shift": norm.bias}
            own |= {"kernel": first.weight, "bias": first.bias}
            own[what] = own[what] + (color.view(-1, 1, 1, 1) if what == "kernel" else color) ** 2
            features = F.conv2d(x, own["kernel"], own["bias"], padding=1, groups=3)
            normed = F.batch_norm(features, own["mean"], own["variance"], own["scale"], own["shift"])
            return self.head(normed.relu().flatten(2).mean(2))
        normed = self.norm(features)
        if self.use == "keywords":
            norm = self.norm
            normed = F.batch_norm(
                features, running_mean=norm.running_mean, running_var=norm.running_var, weight=norm.weight, eps=0.5
            )
        if self.use == "added" or (self.use == "added if dark" and bool(x.mean() < 0)):
            normed = normed + features
        if self.use == "twice":
            normed = normed.relu() + self.norm(self.first(x.flip(-1)))
        return self.head(normed.relu().flatten(2).mean(2))


def pair(*args: object, **options: object) -> nn.Module:
    torch.manual_seed(0)
    model = Pair(*args, **options).double()
    torch.nn.init.normal_(model.norm.running_mean)
    torch.nn.init.uniform_(model.norm.running_var, 0.5, 2.0)
    for parameter in model.norm.parameters():
        torch.nn.init.normal_(parameter)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("options", "folded"),
    [
        ({}, 1),
        ({"dims": 1}, 1),
        ({"dims": 3}, 1),
        ({"affine": False}, 1),
        ({"bias": False}, 1),
        ({"use": "added"}, 0),
        ({"use": "twice"}, 0),
        ({"use": "batch statistics"}, 0),
    ],
)
def test_folded_pass_equals_native(options, folded):
    model = pair(**options)
    images = torch.randn(4, 3, *(6,) * options.get("dims", 2), dtype=torch.float64, requires_grad=True)
    folding = Folding.of(model, images)
    assert (0 if folding is None else len(folding.weights)) == folded
    native = model(images)
    if folding is not None:
        with folding.running():
            output = model(images)
        assert not torch.equal(output, native)  # it did take another way
        torch.testing.assert_close(output, native, rtol=1e-12, atol=1e-12)
        wanted, got = (torch.autograd.grad(o[:, 1].sum(), images)[0] for o in (native, output))
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-13)
    assert torch.equal(model(images), native)


def test_two_norms_of_one_output_are_left_alone():
    model = pair("keywords")  # the module's norm, and a second one with another epsilon
    assert Folding.of(model, torch.randn(1, 3, 6, 6, dtype=torch.float64)) is None


@pytest.mark.parametrize("what", ["mean", "variance", "scale", "shift", "kernel", "bias"])
def test_weights_that_depend_on_the_image_are_not_folded(what):
    model = pair(f"conditional {what}")
    image = torch.randn(1, 3, 6, 6, dtype=torch.float64)
    assert Folding.of(model, image) is None
    if what in ("mean", "variance"):  # torch differentiates no statistics, so only passes without gradients take them
        return
    nodes = (torch.arange(5, dtype=torch.float64) + 0.5) / 5
    path = [(node * image).requires_grad_() for node in nodes]
    oracle = sum(torch.autograd.grad(model(point)[0, 1], point)[0] for point in path) / 5 * image
    options = {"target": 1, "steps": 5, "quadrature": "midpoint", "batch_size": 1}  # one image: color is a batch mean
    maps = attrbox.explain(model, image, "integrated_gradients", **options)
    torch.testing.assert_close(maps.values, oracle)


def test_hooks_keep_what_they_see():
    model = pair()
    handle = model.first.register_forward_hook(lambda *_: None)
    assert Folding.of(model, torch.randn(1, 3, 6, 6, dtype=torch.float64)) is None
    handle.remove()


def test_another_way_through_the_model_is_noticed_and_run_natively():
    model = pair("added if dark")
    bright = torch.rand(2, 3, 6, 6, dtype=torch.float64)
    folding = Folding.of(model, bright)
    assert folding is not None
    with pytest.raises(Unfolded), folding.running():
        model(bright - 2)
    options = {"steps": 7, "quadrature": "midpoint"}
    maps = attrbox.explain(model, torch.cat([bright[:1], bright[1:] - 2]), "integrated_gradients", target=0, **options)
    alone = attrbox.explain(model, bright[1:] - 2, "integrated_gradients", target=0, **options)
    torch.testing.assert_close(maps.values[1:], alone.values)
    nodes = (torch.arange(7, dtype=torch.float64) + 0.5) / 7
    dark = bright[1:] - 2
    path = (nodes.view(-1, 1, 1, 1) * dark).requires_grad_()
    scores = torch.cat([model(point[None])[:, 0] for point in path])
    oracle = torch.autograd.grad(scores.sum(), path)[0]
    torch.testing.assert_close(alone.values[0], dark[0] * oracle.mean(0), rtol=1e-10, atol=1e-14)


def test_a_convolution_output_that_is_returned_is_noticed():
    class Returns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = pair()
            self.escape = False

        def forward(self, x: Tensor) -> object:
            features = self.pair.first(x)
            return features if self.escape else self.pair.norm(features)

    model = Returns()
    images = torch.randn(1, 3, 6, 6, dtype=torch.float64)
    folding = Folding.of(model, images)
    assert folding is not None
    model.escape = True
    with pytest.raises(Unfolded), folding.running():
        model(images)
