"""What several entries of one name are called: each label says how its entry differs, or which it is."""

import pytest
import torch
from exports import content, export, pictures
from nets import images, relu_net

import attrbox
from attrbox.core.options import choose

X = images(2, 3, 8, 8)
ZERO, ONE = torch.zeros(3, 8, 8), torch.ones(3, 8, 8)


def labels(registry, entries):
    return list(choose(registry, entries))


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        (["IG"] * 3, ["", " #2", " #3"]),
        (["IG", "integrated_gradients", ("ig", {})], ["", " #2", " #3"]),
        (["IG", ("IG", {"steps": 50})], ["", " #2"]),  # the default
        (["IG", ("IG", {"steps": 7})], ["", "(steps=7)"]),
        ([("IG", {"steps": 7}), "IG"], ["", "(steps=50)"]),
        ([("IG", {"steps": 7})] * 2, ["", " #2"]),
        ([("IG", {"steps": 7}), "IG", "IG", ("IG", {"steps": 7})], ["", "(steps=50)", "(steps=50) #2", " #2"]),
        (["IG", ("IG", {"steps": 7, "baseline": 0.5})], ["", "(steps=7, baseline=0.5)"]),
        (["IG", ("IG", {"baseline": ZERO}), ("IG", {"baseline": ONE})], ["", *["(baseline=tensor[3, 8, 8])"] * 2]),
        ([("IG", {"baseline": ZERO}), ("IG", {"baseline": ZERO.clone()})], ["", " #2"]),
        ([("IG", {"baseline": ZERO}), ("IG", {"baseline": ONE})], ["", "(baseline=tensor[3, 8, 8])"]),
        ([("IG", {"baseline": ZERO}), ("IG", {"baseline": ZERO.double()})], ["", "(baseline=tensor[3, 8, 8])"]),
        ([("IG", {"baseline": ONE}), "IG"], ["", "(baseline=0.0)"]),
    ],
)
def test_labels(entries, expected):
    expected = [f"integrated_gradients{text}" for text in expected]
    if expected[-1] in expected[:-1]:
        expected[-1] += " #2"
    assert labels(attrbox.method_registry, entries) == expected


@pytest.mark.parametrize("registry", [attrbox.method_registry, attrbox.metric_registry], ids=["methods", "metrics"])
def test_two_equal_entries_of_every_name(registry):
    for name, spec in registry.items():
        if not spec.required:
            assert labels(registry, [name, "random" if registry is attrbox.method_registry else "morf", name])[-1] in (
                f"{name} #2",
                f"{name} #3",
            )
            assert labels(registry, [name, name]) == [name, f"{name} #2"]


def test_equal_entries_are_computed_and_stored(tmp_path):
    result = attrbox.compare(relu_net(), X, ["saliency", "random", "saliency"], progress=False)
    assert list(result) == ["saliency", "random", "saliency #2"]
    assert torch.equal(result["saliency"].values, result["saliency #2"].values)
    scores = attrbox.evaluate(None, X, result, ["sparseness", "sparseness"], progress=False)
    assert torch.equal(scores["saliency"]["sparseness"].values, scores["saliency #2"]["sparseness #2"].values)
    for _ in range(2):  # it goes on with what is there
        export(tmp_path / "maps.h5", pictures(4), ["saliency", "saliency"])
    assert {name for name in content(tmp_path / "maps.h5") if name.startswith("maps/")} == {
        "maps/saliency",
        "maps/saliency #2",
    }
