"""A map depends neither on what its method declares beforehand nor on the methods beside it."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from nets import images, squeeze_excitation_net

import attrbox
from attrbox.methods.gradient.smoothgrad import noise_key
from attrbox.rules.deeplift import DeepLift
from attrbox.rules.guided import GuidedBackprop
from attrbox.rules.lrp.activations import LRPEpsilon

X = images(3, 3, 8, 8)
ASKS = {
    "gradient": (lambda run: run.gradient(), {"rules": (None,)}),
    "guided": (lambda run: run.gradient(GuidedBackprop()), {"rules": (GuidedBackprop(),)}),
    "deeplift": (lambda run: run.gradient(DeepLift(), 0.5), {"rules": (DeepLift(),)}),
    "lrp": (lambda run: run.gradient(LRPEpsilon()), {"rules": (LRPEpsilon(),)}),
    "gradient, then guided": (
        lambda run: run.gradient() + run.gradient(GuidedBackprop()), {"rules": (None, GuidedBackprop())}
    ),
    "guided, then deeplift": (
        lambda run: run.gradient(GuidedBackprop()) * run.gradient(DeepLift(), 0.5),
        {"rules": (GuidedBackprop(), DeepLift())},
    ),
    "one at a time": (
        lambda run: torch.stack([run.gradient_of_one(row, 0, LRPEpsilon()) for row in range(len(run.images))])[:, None],
        {"rules": (LRPEpsilon(),)},
    ),
    "feature map": (lambda run: run.feature_map("conv")[1], {"layers": ("conv",)}),
    "last feature map": (lambda run: run.feature_map(None)[1], {"layers": (None,)}),
    "feature map, then lrp": (
        lambda run: run.feature_map("conv")[1].mean((2, 3, 4))[..., None, None, None] * run.gradient(LRPEpsilon()),
        {"layers": ("conv",), "rules": (LRPEpsilon(),)},
    ),
    "noise": (lambda run: run.versions.noise_moments(3, 0.1).variance, {"asks": (noise_key(3, 0.1),)}),
}  # fmt: skip
NEIGHBORS = [
    [],
    ["deeplift"],
    ["guided_backprop", "grad_cam"],
    ["saliency"],
    ["lrp_epsilon", "occlusion"],
    ["smoothgrad"],
]


@pytest.fixture(params=ASKS)
def asked(request: pytest.FixtureRequest) -> Iterator[str]:
    compute, declared = ASKS[request.param]

    def method(name: str, properties: dict) -> None:
        body = {key: property(lambda self, value=value: value) for key, value in properties.items()}
        cls = type(name, (attrbox.Method,), body | {"attribute": lambda self, run: compute(run)})
        attrbox.register_method(name, summary="-", reference="-")(dataclass(frozen=True, kw_only=True)(cls))

    method("declared", declared)
    method("undeclared", {})
    yield request.param
    attrbox.method_registry.remove("declared")
    attrbox.method_registry.remove("undeclared")


@pytest.mark.parametrize("size", [None, 2])
def test_declared_or_not_alone_or_beside_others(asked: str, size: int | None) -> None:
    model = squeeze_excitation_net()
    options = {"target": [0, 1, 2], "batch_size": size, "progress": False}
    brief = {"occlusion": {"window": 4, "stride": 4}, "vargrad": {"n_samples": 3}}
    wanted = attrbox.explain(model, X, "declared", **options)
    assert wanted.values.abs().sum() > 0
    for others in NEIGHBORS:
        beside = [(name, brief.get(name, {})) for name in others]
        for methods in (
            ["undeclared", *beside],
            [*beside, "undeclared"],
            ["declared", *beside],
            ["undeclared", "declared"],
        ):
            result = attrbox.compare(model, X, methods, **options)
            for label in ("declared", "undeclared"):
                if label in list(result):
                    torch.testing.assert_close(result[label].values, wanted.values)
            for name in set(others) & set(result):
                alone = attrbox.explain(model, X, name, **options, **brief.get(name, {}))
                torch.testing.assert_close(result[name].values, alone.values)
                assert str(result[name].coverage) == str(alone.coverage)
    assert str(attrbox.explain(model, X, "undeclared", **options).coverage) == str(wanted.coverage)
