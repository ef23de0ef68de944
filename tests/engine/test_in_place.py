"""Models that write over activations and over views of them get the maps of the same net written without."""

import pytest
import torch
import torch.nn.functional as F
from nets import images, seeded
from torch import nn

import attrbox
from attrbox.errors import NoGradientError, UnsupportedModelError

X = images(2, 4, 6)


def parts(*pieces):
    return torch.cat(pieces, 1)


# How an activation [n, 4, 8] is made of the input [n, 4, 6].
PRODUCERS = {
    "linear": lambda net, x: net.first(x),
    "linear without bias": lambda net, x: net.second(x),
    "matmul": lambda net, x: x @ net.first.weight.T,
    "einsum": lambda net, x: torch.einsum("nti,oi->nto", x, net.first.weight),
    "convolution": lambda net, x: F.conv1d(x.mT, net.first.weight[..., None], net.first.bias).mT,
    "relu": lambda net, x: net.first(x).relu(),
    "relu_": lambda net, x: net.first(x).relu_(),
    "gelu": lambda net, x: F.gelu(net.first(x)),
    "softmax": lambda net, x: net.first(x).softmax(-1),
    "layer norm": lambda net, x: net.layer_norm(net.first(x)),
    "batch norm": lambda net, x: net.batch_norm(net.first(x)),
    "instance norm": lambda net, x: F.instance_norm(net.first(x)),
    "max pool": lambda net, x: F.max_pool1d(net.first(x), 3, 1, 1),
    "dropout": lambda net, x: F.dropout(net.first(x), 0.5, False),
    "sum": lambda net, x: net.first(x) + 1,
    "product": lambda net, x: net.first(x) * net.second(x),
    "views": lambda net, x: net.first(x).view(-1, 2, 16).view(-1, 4, 8),
    "permuted": lambda net, x: net.first(x).permute(1, 0, 2).contiguous().permute(1, 0, 2),
    "attention": lambda net, x: F.scaled_dot_product_attention(net.first(x), net.second(x), net.first(x)),
    "concatenation": lambda net, x: parts(net.first(x)[:, :2], net.second(x)[:, 2:]),
}
# Which part of it is written over, and the same without.
VIEWS = {
    "whole": (lambda y: y, lambda y, f: f(y)),
    "rows": (lambda y: y[:, 1:3], lambda y, f: parts(y[:, :1], f(y[:, 1:3]), y[:, 3:])),
    "row": (lambda y: y[:, 1], lambda y, f: parts(y[:, :1], f(y[:, 1])[:, None], y[:, 2:])),
    "columns": (lambda y: y.narrow(2, 2, 3), lambda y, f: torch.cat([y[..., :2], f(y[..., 2:5]), y[..., 5:]], 2)),
    "transposed": (lambda y: y.mT, lambda y, f: f(y.mT).mT),
    "view": (lambda y: y.view_as(y), lambda y, f: f(y)),
    "view of a view": (
        lambda y: y[:, 1:].mT[:, :4],
        lambda y, f: parts(y[:, :1], torch.cat([f(y[:, 1:].mT[:, :4]).mT, y[:, 1:, 4:]], 2)),
    ),
}
WRITERS = {
    "add_": (lambda part: part.add_(1.5), lambda part: part + 1.5),
    "relu_": (lambda part: part.relu_(), lambda part: part.relu()),
    "copy_": (lambda part: part.copy_(F.gelu(part)), lambda part: F.gelu(part)),
    "tanh_": (lambda part: part.tanh_(), lambda part: part.tanh()),
    "clamp_": (lambda part: part.clamp_(min=-0.2), lambda part: part.clamp(min=-0.2)),
    "gated": (lambda part: part.mul_(part.sigmoid()), lambda part: part * part.sigmoid()),
    "iadd": (lambda part: part.__iadd__(part), lambda part: part + part),
}


class Writing(nn.Module):
    def __init__(self, producer: str, view: str, writer: str, in_place: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(6, 8, bias=False)
        self.layer_norm, self.batch_norm = nn.LayerNorm(8), nn.BatchNorm1d(4)
        self.head = nn.Linear(8, 3)
        self.written = (producer, view, writer, in_place)

    def forward(self, x):
        producer, view, writer, in_place = self.written
        y = PRODUCERS[producer](self, x)
        if in_place:
            WRITERS[writer][0](VIEWS[view][0](y))
        else:
            y = VIEWS[view][1](y, WRITERS[writer][1])
        return self.head(y.relu()).mean(1)


@pytest.mark.parametrize("method", ["deeplift", "guided_backprop", "epsilon_plus", "learned"])
@pytest.mark.parametrize("producer", PRODUCERS)
def test_writing_over_views(producer, method):
    options = {"iterations": 2} if method == "learned" else {}
    for place, view in enumerate(VIEWS):
        for writer in (list(WRITERS) * 2)[place : place + 2]:
            models = [seeded(lambda w=w: Writing(producer, *w)) for w in ((view, writer, True), (view, writer, False))]
            try:
                scores = models[0](X.clone().requires_grad_())
                scores.sum().backward()
            except RuntimeError:
                continue  # autograd finds no gradient either
            assert torch.equal(scores, models[1](X))
            maps = [attrbox.explain(m, X, method, target=1, progress=False, **options).values for m in models]
            torch.testing.assert_close(maps[0], maps[1], msg=lambda text, case=(view, writer): f"{case}: {text}")


def test_a_learned_rule_without_influence_is_refused():
    class Empty(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.head((self.first(x) + 1).zero_().relu()).mean(1)

    with pytest.raises(NoGradientError, match="does not depend on what the rule learns"):
        attrbox.explain(seeded(Empty), X, "learned", iterations=2, progress=False)


class Unbound(nn.Module):
    """Writes over one of several views, as torch allows without gradients."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        y = self.first(x)
        y.unbind(1)[0].add_(1)
        return self.head(y.relu()).mean(1)


class Overwritten(nn.Module):
    """Writes over what the gradient of a sigmoid is computed from."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        y = self.first(x).sigmoid()
        y.add_(1)
        return self.head(y).mean(1)


@pytest.mark.parametrize("method", ["saliency", "integrated_gradients", "learned", "deeplift"])
@pytest.mark.parametrize("build", [Unbound, Overwritten])
def test_models_that_run_without_gradients_only(build, method):
    model = seeded(build)
    with torch.no_grad():
        model(X)
    if build is Overwritten and method == "deeplift":  # reads what a sigmoid had, in a copy
        assert attrbox.explain(model, X, method, progress=False).relative_gap.max() < 1e-9
        return
    with pytest.raises(UnsupportedModelError, match="runs without gradients only"):
        attrbox.explain(model, X, method, progress=False)
