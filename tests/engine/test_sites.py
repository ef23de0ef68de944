"""What a site tells a rule: typed by its kind, and written once."""

import dataclasses

import pytest
from nets import images, seeded
from rule_cases import ALL, CASES, sandwich
from torch import nn

from attrbox.core.model_state import untouched
from attrbox.engine import site as sites
from attrbox.engine.site import ELEMENTWISE, KINDS, LAYERS, PAIRS, Site
from attrbox.engine.tape import record
from attrbox.errors import RuleError
from attrbox.rules.deeplift import DeepLift
from attrbox.rules.lrp.composites import Composite

INFOS: dict[str, type[sites.SiteInfo]] = {
    **dict.fromkeys(ELEMENTWISE, sites.FunctionInfo),
    **dict.fromkeys(PAIRS, sites.PairInfo),
    **dict.fromkeys(LAYERS, sites.LayerInfo),
    **dict.fromkeys(("softmax", "log_softmax", "logsumexp", "vector_norm"), sites.AxesInfo),
    "max_pool": sites.PoolInfo,
    "norm": sites.NormInfo,
}


def recorded(model: nn.Module, *shape: int) -> tuple[Site, ...]:
    with untouched(model.eval()):
        return record(model, images(*shape, dtype=next(model.parameters()).dtype), [*ALL, Composite()]).sites


@pytest.mark.parametrize("name", CASES)
def test_it_tells_what_belongs_to_its_kind(name: str) -> None:
    for site in recorded(sandwich(CASES[name].operation, CASES[name].shape), 2, 5):
        assert type(site.about(INFOS[site.kind])) is INFOS[site.kind]
        other = sites.NormInfo if site.kind != "norm" else sites.PoolInfo
        with pytest.raises(RuleError, match=f"no {other.__name__} but a {INFOS[site.kind].__name__}"):
            site.about(other)
        for field in dataclasses.fields(site.info):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(site.info, field.name, None)


def test_every_kind_has_one() -> None:
    assert set(INFOS) == KINDS | LAYERS


@pytest.mark.parametrize("norm", [False, True])
def test_layers_know_their_place_and_activations_their_layers(norm: bool) -> None:
    joined = [nn.BatchNorm2d(4)] if norm else []
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), *joined, nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)))
    with untouched(model.eval()):
        found = record(model, images(2, 3, 6, 6), [DeepLift("all"), Composite()]).sites
    convolution, relu, linear = found
    first, last = convolution.about(sites.LayerInfo), linear.about(sites.LayerInfo)
    assert (first.first, first.last, last.first, last.last) == (True, False, False, True)
    assert (first.joined, last.joined) == (norm, False)
    assert first.activation == relu
    assert last.activation is None
    assert relu.about(sites.FunctionInfo).layer == "convolution"
