"""PatternNet and PatternAttribution: closed forms, patterns and maps by a slow oracle, and what patterns refuse."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from nets import TRANSFORMERS, calibrate, five_ways, images, relu_net, residual_net, seeded
from safetensors.torch import save_file
from snapshots import nothing_changes
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import attrbox
from attrbox.errors import FileError, InputError, ModelError, OptionError, UnsupportedModelError
from attrbox.methods.propagation import pattern_fitting

METHODS = ("pattern_net", "pattern_attribution")
ESTIMATORS = ("two_component", "linear")


def fitted(model: nn.Module, x: Tensor, **options) -> attrbox.Patterns:
    return attrbox.fit_patterns(model, x, progress=False, **options)


# --------------------------------------------------------------------------------------------------------- closed form


def toy(offset: float = 0.0) -> tuple[nn.Module, Tensor, Tensor]:
    """x = s (1, 0) + e (1, 1), signal and distractor uncorrelated in both halves of y = s."""
    model = nn.Linear(2, 1, bias=False).double().eval()
    model.weight.data = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    pairs = itertools.product((-2.0, -1.0, 1.0, 2.0), (-3.0, 0.5, 2.5))
    s, e = torch.tensor(list(pairs), dtype=torch.float64).T
    return model, torch.stack([s + e + offset, e + offset], 1), s


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_signal_and_distractor(estimator):
    """Kindermans et al., section 2: the gradient is (1, -1), the signal's direction (1, 0)."""
    model, x, s = toy(1e4 if estimator == "linear" else 0.0)  # of covariances, an offset changes nothing
    patterns = fitted(model, x, estimator=estimator)
    (pattern,) = patterns.values.values()
    torch.testing.assert_close(pattern, torch.tensor([[1.0, 0.0]]).double(), rtol=1e-9, atol=1e-9)
    signal = torch.stack([s, 0 * s], 1)

    def values(method: str, **options) -> Tensor:
        return attrbox.explain(model, x, method, patterns=patterns, target=0, **options).values

    torch.testing.assert_close(values("pattern_net"), torch.tensor([[1.0, 0.0]]).double().expand(len(s), 2))
    torch.testing.assert_close(values("pattern_net", times_score=True), signal, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(values("pattern_attribution"), signal, rtol=1e-8, atol=1e-8)
    shares = values("pattern_attribution", times_score=False)
    torch.testing.assert_close(shares, model.weight * pattern.expand(len(s), 2))


def test_the_relevance_of_a_deep_linear_net_sums_to_the_score():
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 5), nn.Linear(5, 3)))
    x = images(200, 3, 6, 6)
    for estimator in ESTIMATORS:
        maps = attrbox.explain(
            model, x[:4], "pattern_attribution", patterns=fitted(model, x, estimator=estimator), target=1
        )
        torch.testing.assert_close(maps.values.flatten(1).sum(1), maps.score)


# ----------------------------------------------------------------------------------------------------- a slow oracle


class Net(nn.Module):
    """[N, 4, 5, 5]: a convolution in groups with a batch-norm, one without, a linear layer; a norm first of all."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm2d(4)
        self.conv1, self.norm = nn.Conv2d(4, 6, 3, 2, 1, groups=2, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.head = nn.Conv2d(6, 4, 2), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv1(self.first(x))))
        return self.head(F.relu(self.conv2(x)).flatten(1))


def net() -> Net:
    model = seeded(Net, seed=1)
    for norm in (model.first, model.norm):
        for tensor, low in ((norm.running_mean, -0.5), (norm.running_var, 0.5), (norm.weight, 0.7), (norm.bias, -0.2)):
            tensor.data = torch.linspace(low, low + 1, len(tensor)).double()
    return model


def scale_and_shift(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    scale = norm.weight.detach() / (norm.running_var + norm.eps).sqrt()
    return scale, norm.bias.detach() - norm.running_mean * scale


def pattern_by_hand(rows: Tensor, w: list[float], b: float, estimator: str) -> list[float]:
    """Of one neuron over the rows [samples, inputs] that it sees."""
    x = rows.tolist()
    y = [sum(map(float.__mul__, row, w)) for row in x]
    fires = [estimator == "linear" or v + b > 0 for v in y]
    count = sum(fires)
    if not count:
        return [0.0] * len(w)
    mean_y = sum(y) / len(y)
    pairs = [(row, v) for row, v, fire in zip(x, y, fires, strict=True) if fire]
    d = []
    for i in range(len(w)):
        both = sum(row[i] * v for row, v in pairs) / count
        d.append(both - sum(row[i] for row, _ in pairs) / count * mean_y)
    along = sum(map(float.__mul__, w, d))
    return [v / along for v in d]


def layers_by_hand(model: Net, x: Tensor, estimator: str) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Weight, pattern and where the outputs are positive, layer by layer."""
    (s0, t0), (s1, t1) = scale_and_shift(model.first), scale_and_shift(model.norm)
    found = {}

    def fit(name: str, weight: Tensor, bias: Tensor, rows_of, output: Tensor) -> Tensor:
        kind = estimator if name in ("conv1", "conv2") else "linear"  # there is no ReLU behind the others
        rows = [pattern_by_hand(rows_of(j), w.flatten().tolist(), float(bias[j]), kind) for j, w in enumerate(weight)]
        found[name] = weight, weight.new_tensor(rows).view(weight.shape), output > 0
        return output.relu()

    def patches(z: Tensor, size: int, stride: int, padding: int) -> Tensor:
        unfolded = F.unfold(z, size, stride=stride, padding=padding)
        return unfolded.transpose(1, 2).flatten(0, 1)

    channels = x.transpose(0, 1).flatten(1)
    fit("first", s0, t0, lambda j: channels[j][:, None], x)
    z = x * s0.view(-1, 1, 1) + t0.view(-1, 1, 1)
    w1 = model.conv1.weight.detach() * s1.view(-1, 1, 1, 1)
    seen = patches(z, 3, 2, 1).view(-1, 2, 18)
    out = F.conv2d(z, w1, t1, 2, 1, groups=2)
    z = fit("conv1", w1, t1, lambda j: seen[:, j // 3], out)
    w2, b2 = model.conv2.weight.detach(), model.conv2.bias.detach()
    over = patches(z, 2, 1, 0)
    z = fit("conv2", w2, b2, lambda j: over, F.conv2d(z, w2, b2)).flatten(1)
    w3, b3 = model.head.weight.detach(), model.head.bias.detach()
    fit("head", w3, b3, lambda j: z, z @ w3.T + b3)
    return found


def compared_by_hand(estimator: str) -> None:
    model, x = net(), images(40, 4, 5, 5, seed=3) + 0.5
    patterns = fitted(model, x, estimator=estimator, batch_size=7)
    names = {"first": "first:0:batch_norm", "conv1": "conv1:0:convolution+norm"}
    names |= {"conv2": "conv2:0:convolution", "head": "head:0:linear"}
    assert set(patterns.values) == set(names.values())
    layers = layers_by_hand(model, x, estimator)
    for name, (_, pattern, _) in layers.items():
        torch.testing.assert_close(patterns.values[names[name]], pattern, rtol=1e-8, atol=1e-9)
    for method in METHODS:
        maps = attrbox.explain(model, x[:3], method, patterns=patterns, target=1, times_score=False)
        v = {name: pattern * weight if "attr" in method else pattern for name, (weight, pattern, _) in layers.items()}
        g = v["head"][1].view(1, 4, 2, 2) * layers["conv2"][2][:3]
        g = F.conv_transpose2d(g, v["conv2"]) * layers["conv1"][2][:3]
        g = F.conv_transpose2d(g, v["conv1"], stride=2, padding=1, groups=2)
        torch.testing.assert_close(maps.values, g * v["first"].view(-1, 1, 1), rtol=1e-8, atol=1e-10)
        treated = [site.operation for site in maps.coverage.rule]
        assert treated == ["batch_norm", "convolution", "convolution", "linear"]
        assert maps.coverage.complete


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_patterns_and_maps_are_what_the_formulas_say_neuron_by_neuron(estimator):
    compared_by_hand(estimator)


def test_the_oracle_notices_the_wrong_mean(monkeypatch):
    """The sum of all y by the number of those that fire."""
    original = pattern_fitting._Sums.pattern

    def wrong(sums):
        sums.count = int(sums.fired.max())
        return original(sums)

    monkeypatch.setattr(pattern_fitting._Sums, "pattern", wrong)
    with pytest.raises(AssertionError):
        compared_by_hand("two_component")


# ------------------------------------------------------------------------------------------------- data, any model


def test_batches_loaders_and_datasets_give_the_same_patterns():
    model, x = net(), images(20, 4, 5, 5)
    whole = fitted(model, x, batch_size=20)
    labelled = TensorDataset(x, torch.zeros(20))
    for data, size in (
        (x, 1),
        (x, 7),
        (labelled, 6),
        (DataLoader(labelled, 8), 1),
        ([x[:3], x[3:]], 1),
        (iter([(x[:11], "labels"), (x[11:], "labels")]), 1),
    ):
        patterns = fitted(model, data, batch_size=size)
        assert patterns.settings["images"] == 20
        for name, values in whole.values.items():
            torch.testing.assert_close(patterns.values[name], values)
    again = fitted(model, x, batch_size=20)
    assert again.settings == whole.settings  # to the last bit


def test_patterns_account_for_all_of_y_but_at_silent_neurons():
    model, x = relu_net(), images(60, 3, 8, 8)
    model[2].bias.data[:1] = -1e3  # never fires
    for estimator in ESTIMATORS:
        patterns = fitted(model, x, estimator=estimator)
        silent = 1 if estimator == "two_component" else 0
        assert patterns.silent == ({"2:0:convolution": 1} if silent else {})
        weights = {"0:0:convolution": model[0], "2:0:convolution": model[2], "6:0:linear": model[6]}
        for name, layer in weights.items():
            along = (layer.weight * patterns.values[name]).flatten(1).sum(1)
            expected = torch.ones_like(along)
            expected[: silent * (name == "2:0:convolution")] = 0
            torch.testing.assert_close(along, expected)
        maps = attrbox.explain(model, x[:2], "pattern_net", patterns=patterns)
        assert maps.values.isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_one_function_written_five_ways(method):
    x = images(24, 3, 12, 12)
    maps = {
        name: attrbox.explain(model, x[:3], method, patterns=fitted(model, x), target=1).values
        for name, model in five_ways().items()
    }
    for values in maps.values():
        torch.testing.assert_close(values, maps["modules"])


class Twice(nn.Module):
    """A functional layer that runs twice in one call of its module, and a convolution used past its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.norm, self.layer = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inside(x)
        z = (F.relu(self.norm(y)) + F.relu(y)).mean((2, 3))
        for _ in range(2):
            z = F.relu(F.linear(z, self.layer.weight)) - z
        return z


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["twice", "residual", *TRANSFORMERS])
def test_contracts(name, method):
    build = {"twice": lambda: calibrate(seeded(Twice), 16), "residual": residual_net}.get(name) or TRANSFORMERS[name]
    model, x = build(), images(4, 3, 16, 16)
    with nothing_changes(model, x):
        patterns = fitted(model, x, batch_size=3)
        options = {"patterns": patterns, "target": attrbox.classes([1, 2])}
        maps = attrbox.explain(model, x, method, **options)
    if name == "twice":
        keys = {"inside:0:convolution", "inside:0:convolution+norm", ":0:linear", ":0:linear#2"}
        assert set(patterns.values) == keys
    assert maps.values.shape == (4, 2, 3, 16, 16)
    assert maps.values.isfinite().all()
    assert maps.values.abs().amax() > 0
    torch.testing.assert_close(attrbox.explain(model, x, method, **options, batch_size=3).values, maps.values)
    alone = attrbox.explain(model, x[2:3], method, patterns=patterns, target=2).values
    torch.testing.assert_close(alone[0], maps.values[2, 1])
    entries = [(method, {"patterns": patterns}), "saliency", "epsilon_plus", "guided_backprop"]
    together = attrbox.compare(model, x, entries, target=2)
    torch.testing.assert_close(together[method].values, maps.values[:, 1])
    single = {entry if isinstance(entry, str) else method for entry in entries}
    for other in single - {method}:
        torch.testing.assert_close(together[other].values, attrbox.explain(model, x, other, target=2).values)


# -------------------------------------------------------------------------------------------- kept, and what is refused


def test_saved_and_loaded(tmp_path):
    model, x = relu_net(), images(30, 3, 8, 8)
    patterns = fitted(model, x)
    path = patterns.save(tmp_path / "inside" / "patterns.safetensors")
    loaded = attrbox.Patterns.load(path)
    assert loaded.settings == patterns.settings
    assert all(torch.equal(loaded.values[name], values) for name, values in patterns.values.items())
    wanted = attrbox.explain(model, x[:2], "pattern_net", patterns=patterns).values
    assert torch.equal(attrbox.explain(model, x[:2], "pattern_net", patterns=str(path)).values, wanted)
    (tmp_path / "broken").write_bytes(b"nothing")
    for wrong in ("broken", "missing"):
        with pytest.raises(FileError, match="Cannot read patterns"):
            attrbox.Patterns.load(tmp_path / wrong)
    save_file({"a": torch.ones(2)}, tmp_path / "other")
    with pytest.raises(FileError, match="a file of patterns that attrbox wrote"):
        attrbox.Patterns.load(tmp_path / "other")


def test_another_model_is_refused_also_once_its_weights_change():
    model, x = relu_net(), images(30, 3, 8, 8)
    patterns = fitted(model, x)
    attrbox.explain(model, x[:2], "pattern_net", patterns=patterns)
    for other in (relu_net(seed=1), relu_net(pool=True), residual_net()):
        with pytest.raises(ModelError, match=r"fitted to a model of other (weights|architecture)"):
            attrbox.explain(other, x[:2], "pattern_attribution", patterns=patterns)
    attrbox.explain(relu_net(), x[:2], "pattern_net", patterns=patterns)  # a copy is no other model
    with torch.no_grad():
        model[0].weight.mul_(2)
    with pytest.raises(ModelError, match="fit_patterns"):
        attrbox.explain(model, x[:2], "pattern_net", patterns=patterns)
    with torch.no_grad():
        model[0].weight.div_(2)
    attrbox.explain(model, x[:2], "pattern_net", patterns=patterns)


def test_what_is_refused():
    model, x = relu_net(), images(4, 3, 8, 8)
    with pytest.raises(OptionError, match="needs the option 'patterns'"):
        attrbox.explain(model, x, "pattern_net")
    with pytest.raises(OptionError, match=r"Expected patterns to be Patterns \(attrbox"):
        attrbox.explain(model, x, "pattern_net", patterns=3)
    with pytest.raises(OptionError, match="times_score"):
        attrbox.explain(model, x, "pattern_net", patterns=fitted(model, x), times_score=1)
    with pytest.raises(OptionError, match="estimator"):
        fitted(model, x, estimator="best")
    with pytest.raises(OptionError, match="batch_size"):
        fitted(model, x, batch_size=0)
    with pytest.raises(InputError, match="got none"):
        fitted(model, [])
    with pytest.raises(InputError, match="iterable of batches"):
        fitted(model, 3)
    with pytest.raises(InputError, match="floating-point"):
        fitted(model, [x.to(torch.uint8)])
    with pytest.raises(InputError, match="finite"):
        fitted(model, torch.full_like(x, float("nan")))
    turned = seeded(lambda: nn.Sequential(nn.ConvTranspose2d(3, 2, 2), nn.Flatten(), nn.Linear(162, 3)))
    with nothing_changes(turned, x), pytest.raises(UnsupportedModelError, match="transposed convolutions"):
        fitted(turned, x)


def test_a_layer_that_does_not_run_any_more():
    class Fickle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.one(x)
            return self.two(y) if x.detach().sum() > 0 else y

    model, x = seeded(Fickle), images(6, 4).abs()
    with pytest.raises(ModelError, match=r"did not run the layers two:0:linear"):
        attrbox.explain(model, -x, "pattern_net", patterns=fitted(model, x), batch_size=6)
    with pytest.raises(ModelError, match="no pattern for linear in two"):
        attrbox.explain(model, x, "pattern_net", patterns=fitted(model, -x), batch_size=6)
