"""DeepLIFT's RevealCancel: the paper's example, a slow oracle, completeness, and where it is not defined."""

import math

import oracles
import pytest
import torch
import torch.nn.functional as F
from nets import SMALL, calibrate, images, relu_net, residual_net, seeded, vector_net
from torch import Tensor, nn

import attrbox
from attrbox.engine.tape import record
from attrbox.errors import OptionError
from attrbox.rules import deeplift
from attrbox.rules.deeplift import DeepLift


class Minimum(nn.Module):
    """min(a, b) = a - relu(a - b), and the same by a convolution."""

    def __init__(self, convolution: bool) -> None:
        super().__init__()
        self.layer = nn.Conv1d(1, 1, 2, bias=False) if convolution else nn.Linear(2, 1, bias=False)
        self.layer.weight.data = torch.tensor([[[1.0, -1.0]]] if convolution else [[1.0, -1.0]])

    def forward(self, x: Tensor) -> Tensor:
        return x[..., :1].flatten(1) - F.relu(self.layer(x)).flatten(1)


@pytest.mark.parametrize("convolution", [False, True])
def test_the_minimum_of_two_inputs(convolution):
    """Shrikumar et al. 2017, section 3.5.3: Rescale gives all to one input, RevealCancel half to each."""
    model = Minimum(convolution).double().eval()
    x = torch.tensor([[3.0, 1.0], [1.0, 3.0], [2.0, 2.0], [-1.0, 3.0]], dtype=torch.float64)
    x = x[:, None] if convolution else x

    def values(option: str) -> list[list[float]]:
        return attrbox.explain(model, x, "deeplift", target=0, reveal_cancel=option).values.view(-1, 2).tolist()

    assert values("none")[:3] == [[0.0, 1.0], [1.0, 0.0], [2.0, 0.0]]
    # The last: both lower a - b, so it is the Rescale slope of 0.
    expected = [[0.5, 0.5], [0.5, 0.5], [1.0, 1.0], [-1.0, 0.0]]
    assert values("all") == [pytest.approx(row) for row in expected]
    if not convolution:
        assert values("linear") == values("all")


# ----------------------------------------------------------------------------------------------------- a slow oracle


def neuron(name: str, weights: list[float], bias: float, x: list[float], x0: list[float]) -> list[float]:
    """Multipliers of one neuron f(w x + b), input by input, as section 3.5.3 prints them; derivatives for 0 / 0."""
    f, derivative = oracles.SCALARS[name]
    products = [w * (v - v0) for w, v, v0 in zip(weights, x, x0, strict=True)]
    z0 = sum(w * v0 for w, v0 in zip(weights, x0, strict=True)) + bias
    p, n = math.fsum(c for c in products if c > 0), math.fsum(c for c in products if c < 0)
    rise = (f(z0 + p) - f(z0)) / 2 + (f(z0 + n + p) - f(z0 + n)) / 2
    fall = (f(z0 + n) - f(z0)) / 2 + (f(z0 + p + n) - f(z0 + p)) / 2
    m_plus = rise / p if p else (derivative(z0) + derivative(z0 + n)) / 2
    m_minus = fall / n if n else (derivative(z0) + derivative(z0 + p)) / 2
    found = []
    for w, c in zip(weights, products, strict=True):
        found.append(w * (m_plus if c > 0 else m_minus if c < 0 else (m_plus + m_minus) / 2))
    return found


FUNCTIONS = {"relu": F.relu, "relu6": F.relu6, "tanh": torch.tanh, "silu": F.silu}


class TwoLayers(nn.Module):
    """Two layers, each with an activation, and a sum of the outputs by weights."""

    def __init__(self, activation, convolution: bool) -> None:
        super().__init__()
        self.activation = activation
        self.first = nn.Conv1d(2, 3, 2) if convolution else nn.Linear(6, 6)
        self.second, self.last = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.activation(self.first(x)).flatten(1)
        return self.last(self.activation(self.second(hidden)))


def by_hand(
    model: TwoLayers, name: str, x: list[float], x0: list[float], target: int, convolution: bool
) -> list[float]:
    """Multipliers of the score, neuron by neuron; the convolution of [2, 3] as a matrix [6, 6]."""
    weights, biases = model.first.weight.tolist(), model.first.bias.tolist()
    if convolution:
        matrix = []
        for row in weights:
            for place in range(2):
                line = [0.0] * 6
                for channel in range(2):
                    for tap in range(2):
                        line[channel * 3 + place + tap] = row[channel][tap]
                matrix.append(line)
        weights, biases = matrix, [bias for bias in biases for _ in range(2)]

    def outputs(weights: list[list[float]], biases: list[float], x: list[float]) -> list[float]:
        return [
            oracles.SCALARS[name][0](sum(map(float.__mul__, row, x)) + bias)
            for row, bias in zip(weights, biases, strict=True)
        ]

    h, h0 = outputs(weights, biases, x), outputs(weights, biases, x0)
    upper, upper_biases = model.second.weight.tolist(), model.second.bias.tolist()
    to_hidden, to_input = [0.0] * 6, [0.0] * 6
    for g, row, bias in zip(model.last.weight.tolist()[target], upper, upper_biases, strict=True):
        to_hidden = [t + g * m for t, m in zip(to_hidden, neuron(name, row, bias, h, h0), strict=True)]
    for g, row, bias in zip(to_hidden, weights, biases, strict=True):
        to_input = [t + g * m for t, m in zip(to_input, neuron(name, row, bias, x, x0), strict=True)]
    return to_input


def compared_by_hand(name: str, convolution: bool) -> None:
    model = seeded(lambda: TwoLayers(FUNCTIONS[name], convolution), seed=3)
    shape = (2, 3) if convolution else (6,)
    x, x0 = 2 * images(4, *shape, seed=1), images(4, *shape, seed=2)
    x[1].view(-1)[2:4] = x0[1].view(-1)[2:4]  # no change: half of both multipliers
    for baseline in (x0, x0[0]):
        starts = x0 if baseline is x0 else x0[:1].expand_as(x0)
        pairs = list(zip(x.flatten(1).tolist(), starts.flatten(1).tolist(), strict=True))
        multipliers = x.new_tensor([by_hand(model, name, *pair, 1, convolution) for pair in pairs]).view(x.shape)
        options = {"reveal_cancel": "all", "baseline": baseline, "target": 1}
        bare = attrbox.explain(model, x, "deeplift", times_input=False, **options).values
        torch.testing.assert_close(bare, multipliers, rtol=1e-8, atol=1e-10)
        maps = attrbox.explain(model, x, "deeplift", **options)
        torch.testing.assert_close(maps.values, multipliers * (x - starts), rtol=1e-8, atol=1e-10)
        assert maps.gap.abs().max() < 1e-12


@pytest.mark.parametrize("convolution", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_two_layers_are_what_the_formulas_say_neuron_by_neuron(name, convolution):
    compared_by_hand(name, convolution)


def test_the_oracle_notices_rescale_and_swapped_parts(monkeypatch):
    original = deeplift._reveal_cancel
    monkeypatch.setattr(deeplift, "_reveal_cancel", lambda site, grad: original(site, grad) * (1 + 1e-6))
    with pytest.raises(AssertionError):
        compared_by_hand("relu", False)
    monkeypatch.setattr(deeplift, "_reveal_cancel", lambda site, grad: site.true_gradient(grad))
    with pytest.raises(AssertionError):
        compared_by_hand("relu", False)


# -------------------------------------------------------------------------------------------- completeness, other nets

PAIRED = {name: entry for name, entry in SMALL.items() if name != "residual"}


@pytest.mark.parametrize("name", PAIRED)
def test_completeness_stays_exact(name):
    build, shape = PAIRED[name]
    model, x = build(), images(3, *shape)
    plain = attrbox.explain(model, x, "deeplift", target=1)
    for baseline in (0.0, images(*shape, seed=5), images(3, *shape, seed=6)):
        maps = attrbox.explain(model, x, "deeplift", target=1, reveal_cancel="all", baseline=baseline)
        assert maps.relative_gap.max() < 1e-9
    assert not torch.allclose(
        attrbox.explain(model, x, "deeplift", target=1, reveal_cancel="all").values, plain.values
    ), "nothing got RevealCancel"
    alone = attrbox.explain(model, x[1:2], "deeplift", target=1, reveal_cancel="all", baseline=images(*shape, seed=5))
    whole = attrbox.explain(model, x, "deeplift", target=1, reveal_cancel="all", baseline=images(*shape, seed=5))
    torch.testing.assert_close(alone.values, whole.values[1:2])


def test_batch_norms_belong_to_their_layers_also_in_the_reference():
    model, x = residual_net(), images(3, 3, 8, 8)
    maps = attrbox.explain(model, x, "deeplift", target=1, reveal_cancel="all", baseline=0.3)
    assert maps.relative_gap.max() < 1e-9
    # The stem, and conv1 with its norm, twice; conv2 with its norm goes into a sum, which keeps Rescale.
    layers = [str(site) for site in maps.coverage.rule if site.operation == "convolution"]
    assert layers == ["convolution in stem", "convolution in conv1", "convolution in conv1 (call 1)"]
    assert sum(site.operation == "relu" for site in maps.coverage.rule) == 5

    first = calibrate(
        seeded(
            lambda: nn.Sequential(
                nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
                nn.Linear(4 * 36, 3),
            )
        ),
        8,
    )  # fmt: skip
    entries = ["deeplift", "epsilon_plus", "guided_backprop", ("deeplift", {"reveal_cancel": "all"})]
    together = attrbox.compare(first, x, entries, target=1)
    for label, maps in together.items():
        assert not label.startswith("deeplift") or maps.relative_gap.max() < 1e-9
    for label in ("epsilon_plus", "guided_backprop"):
        torch.testing.assert_close(together[label].values, attrbox.explain(first, x, label, target=1).values)
    assert not torch.allclose(*(maps.values for label, maps in together.items() if label.startswith("deeplift")))


def test_rescale_where_the_output_goes_elsewhere_too():
    """What is used twice is not a neuron: there the values are those of Rescale."""

    class Net(nn.Module):
        def __init__(self, use: str) -> None:
            super().__init__()
            self.use, self.layer, self.head = use, nn.Linear(6, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            z = self.layer(x)
            before = z.mean(1, keepdim=True) if self.use == "before" else 0.0
            match self.use:
                case "silu by hand":
                    y = z * torch.sigmoid(z)
                case "in place":
                    assert z.shape[1] == 5  # looking is no use
                    y = z.relu_() + z
                case "scaled in place":
                    z *= 0.5
                    y = F.relu(z)
                case _:
                    y = F.relu(z)
            after = z.mean(1, keepdim=True) if self.use == "after" else 0.0
            return self.head(y) + before + after

    x = images(4, 6)
    for use in ("before", "after", "silu by hand", "scaled in place"):
        model = seeded(lambda use=use: Net(use))
        with pytest.raises(OptionError, match="an activation alone takes the output"):
            attrbox.explain(model, x, "deeplift", target=1, reveal_cancel="linear")
        assert attrbox.explain(model, x, "deeplift", target=1).relative_gap.max() < 1e-9
    maps = attrbox.explain(seeded(lambda: Net("in place")), x, "deeplift", target=1, reveal_cancel="linear")
    assert maps.relative_gap.max() < 1e-9
    assert [site.operation for site in maps.coverage.rule] == ["linear", "relu"]


def test_linear_layers_alone_and_a_model_without_a_place():
    model, x = relu_net(), images(2, 3, 8, 8)
    maps = attrbox.explain(model, x, "deeplift", target=1, reveal_cancel="linear")
    assert [site.module for site in maps.coverage.rule if site.operation != "relu"] == ["6"]
    assert maps.relative_gap.max() < 1e-9
    everywhere = attrbox.explain(model, x, "deeplift", target=1, reveal_cancel="all")
    assert [site.module for site in everywhere.coverage.rule if site.operation != "relu"] == ["0", "2", "6"]
    assert not torch.allclose(everywhere.values, maps.values)
    with pytest.raises(OptionError, match="Use reveal_cancel='all'"):
        attrbox.explain(residual_net(), x, "deeplift", reveal_cancel="linear")
    with pytest.raises(OptionError, match="Use reveal_cancel='none'"):
        attrbox.explain(nn.Linear(4, 3).eval(), torch.ones(1, 4), "deeplift", reveal_cancel="all")
    with pytest.raises(OptionError, match="'none', 'linear', 'all', got 'dense'"):
        attrbox.explain(model, x, "deeplift", reveal_cancel="dense")


def test_it_can_be_differentiated():
    model, x, x0 = vector_net().requires_grad_(False), images(2, 7), images(1, 7, seed=4)
    rule = DeepLift("all")

    def value(images: Tensor, create_graph: bool) -> tuple[Tensor, Tensor]:
        tape = record(model, images, [rule])
        compared = tape.record_reference(x0)
        score = tape.output[:, 1]
        (gradient,) = tape.replay(score, [tape.images], rule, reference=compared, create_graph=create_graph)
        return gradient.square().sum(), tape.images

    total, leaf = value(x, True)
    (derivative,) = torch.autograd.grad(total, leaf)
    step = 1e-6 * images(*x.shape, seed=9)
    change = value(x + step, False)[0] - value(x - step, False)[0]
    torch.testing.assert_close((derivative * step).sum() * 2, change, rtol=1e-4, atol=1e-9)
