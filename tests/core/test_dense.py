"""Tensors in any layout: what is sparse counts as what it stands for, what is nested is refused with a remedy."""

import pytest
import torch
from exports import Pairs, assert_same, export, net, pictures
from nets import images, seeded
from torch import nn

import attrbox
from attrbox.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
X = images(4, 6, seed=1) * (images(4, 6, seed=2) > 0)
B = images(4, 6, seed=3) * (images(4, 6, seed=4) > 0)


def model():
    return seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))


def scattered(tensor):
    """The same, with pixels in several parts that add up, in no order."""
    half = (tensor / 2).to_sparse()
    indices, values = half.indices().flip(1), half.values().flip(0)
    return torch.sparse_coo_tensor(torch.cat([indices, indices], 1), torch.cat([values, values]), tensor.shape)


LAYOUTS = {
    "coo": torch.Tensor.to_sparse,
    "hybrid": lambda tensor: tensor.to_sparse(1),
    "uncoalesced": scattered,
    "csr": torch.Tensor.to_sparse_csr,
    "csc": torch.Tensor.to_sparse_csc,
    "bsr": lambda tensor: tensor.to_sparse_bsr((2, 2)),
    "bsc": lambda tensor: tensor.to_sparse_bsc((2, 2)),
}
NESTED = {
    "strided": lambda tensor: torch.nested.nested_tensor(list(tensor)),
    "of several sizes": lambda tensor: torch.nested.nested_tensor([tensor[0], tensor[1, :3]]),
    "jagged": lambda tensor: torch.nested.nested_tensor(list(tensor), layout=torch.jagged),
}
METHODS = ["saliency", "deeplift", "epsilon_plus", "integrated_gradients", "smoothgrad", "random"]


def uses(method, x, baseline=B, target=(0, 2, 1, 1)):
    options = {"baseline": baseline} if method in ("deeplift", "integrated_gradients") else {}
    return attrbox.explain(model(), x, method, target=target, progress=False, **options).values


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", METHODS)
def test_images_baselines_and_targets(layout, method):
    make = LAYOUTS[layout]
    expected = uses(method, X)
    torch.testing.assert_close(uses(method, make(X)), expected)
    torch.testing.assert_close(uses(method, X, make(B)), expected)
    torch.testing.assert_close(uses(method, X, target=torch.tensor([0, 2, 1, 1]).to_sparse()), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_maps_images_and_the_doctor(layout):
    make = LAYOUTS[layout]
    maps = attrbox.explain(model(), X, "gradient_x_input", progress=False).values
    metrics = ["sparseness", ("completeness", {"baseline": B})]
    expected = attrbox.evaluate(model(), X, {"a": maps}, metrics, progress=False)
    metrics = ["sparseness", ("completeness", {"baseline": make(B)})]
    found = attrbox.evaluate(model(), make(X), {"a": make(maps)}, metrics, progress=False)
    for name in ("sparseness", "completeness"):
        torch.testing.assert_close(found["a"][name].values, expected["a"][name].values, equal_nan=True)
    assert attrbox.doctor(model(), make(X), ["deeplift"]).exact


def test_quantized_and_onednn_tensors():
    quantized = torch.quantize_per_tensor(X.float(), 0.01, 0, torch.qint8)
    explain = attrbox.explain
    expected = explain(model().float(), quantized.dequantize(), "deeplift", progress=False).values
    assert torch.equal(explain(model().float(), quantized, "deeplift", progress=False).values, expected)
    assert attrbox.doctor(model().float(), quantized, ["deeplift"]).exact
    if torch.backends.mkldnn.is_available():
        expected = explain(model().float(), X.float(), "deeplift", progress=False).values
        assert torch.equal(explain(model().float(), X.float().to_mkldnn(), "deeplift", progress=False).values, expected)


@pytest.mark.parametrize("make", [torch.Tensor.to_sparse, lambda masks: [mask.to_sparse() for mask in masks]])
def test_object_masks(make):
    masks = torch.zeros(2, 16, 16)
    masks[:, 4:9, 3:8] = 1
    found = [
        attrbox.evaluate(net(), pictures(2), {"a": pictures(2)}, ["relevance_mass"], masks=given, progress=False)
        for given in (masks, make(masks))
    ]
    assert torch.equal(*(scores["a"]["relevance_mass"].values for scores in found))


@pytest.mark.parametrize("items", ["whole", "one by one"])
@pytest.mark.parametrize("layout", ["coo", "uncoalesced"])
def test_exports(tmp_path, layout, items):
    sparse = pictures().relu()
    make = LAYOUTS[layout]
    export(tmp_path / "dense.h5", sparse, ["saliency", "deeplift"])
    data = make(sparse) if items == "whole" else Pairs([make(image) for image in sparse], label=lambda row: None)
    summary = export(tmp_path / "sparse.h5", data, ["saliency", "deeplift"])
    assert summary.complete
    assert_same(tmp_path / "dense.h5", tmp_path / "sparse.h5")


@pytest.mark.parametrize("kind", NESTED)
@pytest.mark.parametrize("method", METHODS)
def test_nested_tensors(kind, method):
    nested = NESTED[kind](X)
    with pytest.raises(InputError, match=r"images as one tensor .* pad"):
        uses(method, nested)
    if method in ("deeplift", "integrated_gradients"):
        with pytest.raises(InputError, match=r"'baseline' as one tensor .* pad"):
            uses(method, X, nested)


@pytest.mark.parametrize("kind", NESTED)
def test_nested_tensors_elsewhere(tmp_path, kind):
    nested = NESTED[kind](X)
    for call in (
        lambda: attrbox.doctor(model(), nested),
        lambda: attrbox.evaluate(model(), nested, {"a": X}, ["morf"]),
        lambda: attrbox.evaluate(model(), X, {"a": nested}, ["morf"]),
        lambda: attrbox.evaluate(model(), X, {"a": X}, ["pointing_game"], masks=nested),
        lambda: export(tmp_path / "maps.h5", nested, model=model()),
        lambda: attrbox.fit_patterns(model(), [nested]),
    ):
        with pytest.raises(InputError, match="as one tensor"):
            call()
    summary = export(tmp_path / "maps.h5", Pairs([*pictures(3), NESTED[kind](X)]), ["saliency"], model=net())
    assert "nested" in summary.failed["3"]
