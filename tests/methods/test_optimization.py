"""The methods that optimize against a second implementation (`optimization_oracles`), in every memory layout."""

from collections.abc import Callable

import optimization_oracles as oracle
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.vgg import VGG, make_layers

import attrbox
from attrbox.rules.learned import LearnedRule, Plugin, plugins, register_plugin

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every second": lambda x: x.repeat_interleave(2, 3)[..., ::2],
}


class Mixed(nn.Module):
    """Pools, concatenations, a depth-wise and a transposed convolution, in-place and functional ReLUs, a residual sum.

    Behind the view between two convolutions gradients are contiguous, while the features are channels_last.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.branch, self.up = nn.Conv2d(6, 4, 1), nn.ConvTranspose2d(10, 6, 2, stride=2)
        self.last, self.head = nn.Conv2d(6, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.stem(x), 2)
        x = torch.cat([F.relu(self.depthwise(x)) + x, torch.relu(self.branch(x))], 1)
        x = F.avg_pool2d(F.relu(self.up(x)), 2)
        x = F.relu(x.reshape(len(x), 6, -1) - 0.1).view(x.shape)
        return self.head(F.relu(self.last(x)).mean((2, 3)))


class Tokens(nn.Module):
    """A transformer: one convolution for the patches, fused attention, and ReLUs in the blocks alone."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.attention = nn.ModuleList([nn.Linear(8, 24) for _ in range(2)])
        self.inner = nn.ModuleList([nn.Linear(8, 12) for _ in range(2)])
        self.outer = nn.ModuleList([nn.Linear(12, 8) for _ in range(2)])
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        for attention, inner, outer in zip(self.attention, self.inner, self.outer, strict=True):
            query, key, value = attention(F.layer_norm(x, (8,))).view(len(x), -1, 3, 2, 4).permute(2, 0, 3, 1, 4)
            x = x + F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
            x = x + outer(F.relu(inner(x)))
        return self.head(x.mean(1))


def mixed() -> nn.Module:
    model = Mixed()
    nn.init.uniform_(model.stem[1].running_var, 0.5, 2)
    nn.init.normal_(model.stem[1].running_mean)
    return model


def vgg() -> nn.Module:
    """A VGG of fewer channels, as those of VGG-11 take seconds a pass."""
    model = VGG(make_layers([16, "M", 32, "M", 64, 64, "M"]), num_classes=4)
    model.avgpool = nn.AdaptiveAvgPool2d(1)
    model.classifier = nn.Sequential(nn.Linear(64, 16), nn.ReLU(inplace=True), nn.Linear(16, 4))
    return model


def squeezenet() -> nn.Module:
    """SqueezeNet with scores above the ReLU behind them."""
    model = torchvision.models.squeezenet1_1(num_classes=4)
    nn.init.constant_(model.classifier[1].bias, 2.0)
    return model


NETS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "mixed": (mixed, 12),
    "tokens": (Tokens, 12),
    "vgg": (vgg, 32),
    "resnet": (lambda: torchvision.models.resnet18(num_classes=4), 32),
    "squeezenet": (squeezenet, 32),
}


def built(name: str, count: int = 2) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    build, side = NETS[name]
    model = build().double().eval().requires_grad_(False)
    return model, torch.randn(count, 3, side, side, dtype=torch.float64)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NETS)
def test_the_learned_rule_is_that_of_the_second_implementation(name: str, layout: str) -> None:
    model, images = built(name)
    targets = [1, 2]
    wanted = [oracle.learned(model, x[None], target, 3) for x, target in zip(images, targets, strict=True)]
    for flag in (True, False):
        found = attrbox.explain(
            model, LAYOUTS[layout](images), "learned", target=targets, iterations=3, initial="ones",
            channels_last=flag, progress=False,
        )  # fmt: skip
        error = (found.values - torch.cat(wanted)).flatten(1).norm(dim=1) / torch.cat(wanted).flatten(1).norm(dim=1)
        assert error.max() < 1e-8


@pytest.mark.parametrize("preset", ["rank", "clean"])
@pytest.mark.parametrize("name", ["mixed", "tokens", "squeezenet"])
def test_the_presets_are_those_of_the_second_implementation(name: str, preset: str) -> None:
    model, images = built(name, 1)
    deeplift = attrbox.explain(model, images, "deeplift", target=1, progress=False).values
    wanted = oracle.learned(model, images, 1, 4, preset, deeplift if preset == "clean" else None)
    for layout in ("contiguous", "channels_last"):
        found = attrbox.explain(
            model,
            LAYOUTS[layout](images),
            f"learned_{preset}",
            target=1,
            seed=[0],
            iterations=4,
            initial="ones",
            progress=False,
        ).values
        assert (found - wanted).norm() < 1e-7 * wanted.norm()


def test_an_option_for_speed_does_not_change_learned_maps_in_float32() -> None:
    """Iterations amplify the rounding in which memory formats differ, so they all run in one."""
    model, images = (one.float() for one in built("vgg"))
    for method in ("learned", "learned_rank", "learned_clean"):
        maps = [
            attrbox.explain(
                model, LAYOUTS[layout](images), method, target=[1, 2], iterations=3, channels_last=flag, progress=False
            ).values
            for layout, flag in zip(LAYOUTS, (True, False, True, False), strict=True)
        ]
        assert all(torch.equal(maps[0], other) for other in maps[1:])


def test_parameters_of_a_plugin_may_have_any_layout() -> None:
    """Fused optimizers walk parameter and gradient as they lie in memory; a plug-in's gradient may lie otherwise."""

    class Turned(Plugin):
        def shape(self, difference: Tensor) -> tuple[int, ...]:
            return tuple(reversed(difference.shape[1:]))

        def multiplier(self, parameters: Tensor, difference: Tensor) -> Tensor:
            return torch.tanh(parameters.permute(0, 3, 2, 1) * difference)

    model, images = built("squeezenet")
    register_plugin("turned")(Turned)
    try:
        options = {"target": [1, 2], "iterations": 3, "initial": "ones", "progress": False}
        found = attrbox.explain(model, images, "learned", plugin="turned", **options).values
        wanted = attrbox.explain(model, images, "learned", **options).values
    finally:
        plugins.remove("turned")
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["mixed", "squeezenet"])
def test_masks_are_those_of_the_second_implementation(name: str, layout: str) -> None:
    model, images = built(name)
    wanted = torch.cat([oracle.mask(model, x[None], t, 5, 4) for x, t in zip(images, (1, 2), strict=True)])
    found = attrbox.explain(
        model, LAYOUTS[layout](images), "mask", target=[1, 2], iterations=5, step=4, initial="ones", jitter=0,
        progress=False,
    ).values  # fmt: skip
    torch.testing.assert_close(found[:, 0], wanted, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_smooth_masks_are_those_of_the_second_implementation(layout: str) -> None:
    model, images = built("mixed")
    wanted = [oracle.smask(model, x[None], t, 4, 4, 6.0, 0.25) for x, t in zip(images, (1, 2), strict=True)]
    found = attrbox.explain(
        model, LAYOUTS[layout](images), "smask", target=[1, 2], iterations=4, step=4, sigma=6.0, area_fractions=(0.25,),
        progress=False,
    ).values  # fmt: skip
    torch.testing.assert_close(found[:, 0], torch.cat(wanted), rtol=1e-6, atol=1e-9)


def test_the_sites_of_the_second_implementation_are_those_of_the_first() -> None:
    for name in NETS:
        model, images = built(name)
        _, before = oracle.features(model, images)
        rules = attrbox.explain(model, images, "learned", iterations=1, progress=False).details["rules"]
        assert len(rules.parameters) == before[-1] - before[0]
        assert {key.split(":")[2].split("#")[0] for key in rules.parameters} <= LearnedRule.kinds
