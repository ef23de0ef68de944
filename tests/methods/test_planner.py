"""compare: what methods share, how chunks are cut, what happens when memory runs out."""

import pytest
import torch
from nets import FAST, images, relu_net, squeeze_excitation_net, vector_net
from torch import nn

import attrbox
from attrbox import compare as compare_function
from attrbox.core.memory import SavedBytes, backing_off, images_per_pass
from attrbox.errors import OutOfMemoryError


class Counting(nn.Module):
    """Counts forward passes and the images in them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.batches: list[int] = []

    def forward(self, x):
        self.batches.append(len(x))
        return self.model(x)


X = images(4, 3, 8, 8)
RULED = ["saliency", "gradient_x_input", "guided_backprop", "deconvnet", "lrp_epsilon", "grad_cam", "guided_grad_cam"]


def compare(model, methods, **options):
    return compare_function(model, X, methods, progress=False, **({"batch_size": 8} | options))


def test_one_forward_serves_all_rules():
    model = Counting(relu_net())
    compare(model, RULED)
    assert model.batches == [4]


@pytest.mark.parametrize("other", ["saliency", "grad_cam", "guided_backprop", "deeplift", "lrp_epsilon"])
@pytest.mark.parametrize("rule", ["deconvnet", "deeplift", "lrp_epsilon"])
def test_every_pair_shares_a_recording_that_keeps_enough(rule, other):
    if rule != other:
        result = compare(squeeze_excitation_net(), [rule, other])
        for name in (rule, other):
            alone = attrbox.explain(squeeze_excitation_net(), X, name, progress=False)
            torch.testing.assert_close(result[name].values, alone.values)


def test_equal_rules_are_replayed_once(monkeypatch):
    replays = []
    original = attrbox.engine.tape.Tape.replay
    monkeypatch.setattr(
        "attrbox.engine.tape.Tape.replay",
        lambda self, *args, **kw: replays.append(args[2:]) or original(self, *args, **kw),
    )
    compare(relu_net(), ["guided_backprop", "guided_grad_cam", "grad_cam", "saliency", "gradient_x_input"])
    assert len(replays) == 3  # guided, the feature map, the gradient


def test_the_reference_costs_one_image():
    model = Counting(relu_net())
    compare(model, [*RULED, "deeplift"])
    assert model.batches == [4, 1]


def test_two_baselines_are_two_references():
    model = Counting(relu_net())
    result = compare(model, ["deeplift", ("deeplift", {"baseline": 0.5}), ("deeplift", {"baseline": X.flip(0)})])
    assert model.batches == [4, 1, 1, 4]
    assert list(result) == ["deeplift", "deeplift(baseline=0.5)", "deeplift(baseline=tensor[4, 3, 8, 8])"]
    assert result["deeplift"].options["baseline"] == 0.0
    for maps in result.values():
        assert maps.relative_gap.max() < 1e-9


def test_the_smoothgrad_family_shares_its_samples():
    model = Counting(relu_net())
    family = [(name, {"n_samples": 6}) for name in ("smoothgrad", "squared_smoothgrad", "vargrad")]
    result = compare(model, family)
    assert sum(model.batches) == 4 + 6 * 4  # the targets, then the noise once
    mean, square, variance = (result[name].values for name, _ in family)
    torch.testing.assert_close(square - mean**2, variance)


def test_integrated_gradients_needs_its_steps_and_two_scores():
    model = Counting(relu_net())
    compare(model, [("integrated_gradients", {"steps": 10})])
    assert sum(model.batches) == 4 + 10 * 4 + 1
    assert max(model.batches) == 8


def test_compare_equals_explain():
    model = squeeze_excitation_net()
    names = [name for name in attrbox.list_methods() if attrbox.method_registry[name].for_all]
    together = compare(model, [(name, FAST.get(name, {})) for name in names], target=attrbox.top(2))
    for name in names:
        alone = attrbox.explain(model, X, name, target=attrbox.top(2), progress=False, **FAST.get(name, {}))
        torch.testing.assert_close(together[name].values, alone.values)
        assert together[name].coverage == alone.coverage


def test_aliases_labels_and_table():
    result = compare(relu_net(), ["IG", "e-LRP", ("IG", {"steps": 5})])
    assert list(result) == ["integrated_gradients", "lrp_epsilon", "integrated_gradients(steps=5)"]
    assert result["IG"] is result["integrated_gradients"]
    assert result["integrated_gradients(steps=5)"].options["steps"] == 5
    table = result.table()
    assert all(label in table for label in result)
    assert result.predictions.tolist() == relu_net()(X).argmax(1).tolist()


def test_repr_tells_shape_gap_and_coverage():
    text = repr(compare(relu_net(), ["deeplift"]))
    assert "[4, 3, 8, 8]" in text
    assert "3 relu" in text
    assert "largest relative gap" in text


# --------------------------------------------------------------------------------------------------- running out


class Limited(Counting):
    """A model on a device with room for `most` images."""

    def __init__(self, model: nn.Module, most: int) -> None:
        super().__init__(model)
        self.most = most

    def forward(self, x):
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory (not really)")
        return super().forward(x)


@pytest.mark.parametrize("most", [1, 2, 3])
@pytest.mark.parametrize("method", ["deeplift", "integrated_gradients", "smoothgrad", "random"])
def test_out_of_memory_backs_off_to_the_same_maps(method, most):
    limited = Limited(relu_net(), most)
    maps = attrbox.explain(limited, X, method, batch_size=8, progress=False)
    assert max(limited.batches) <= most
    torch.testing.assert_close(maps.values, attrbox.explain(relu_net(), X, method, progress=False).values)


@pytest.mark.parametrize("method", ["integrated_gradients", "smoothgrad", "vargrad", "rise", "occlusion", "lime"])
def test_passes_smaller_than_the_chunk(method):
    """Memory that runs out after the chunk's own forward pass: a pass takes fewer images than the chunk has."""
    model = relu_net()

    class Filling(Limited):
        def forward(self, x):
            if len(self.batches) > 1:
                self.most = 1
            return super().forward(x)

    options = FAST.get(method, {}) | {"progress": False, "batch_size": 4, "target": 1}
    filling = Filling(model, 4)
    maps = attrbox.explain(filling, X, method, **options)
    assert filling.batches[-1] == 1
    torch.testing.assert_close(maps.values, attrbox.explain(model, X, method, **options).values)


def test_not_even_one_image():
    with pytest.raises(OutOfMemoryError, match="Not even one image"):
        attrbox.explain(Limited(relu_net(), 0), X, "saliency", progress=False)


def test_backing_off_halves_and_passes_other_errors_on():
    tried = []

    def work(size):
        tried.append(size)
        if size > 3:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return "done"

    assert backing_off(20, work) == ("done", 2)
    assert tried == [20, 10, 5, 2]
    with pytest.raises(ZeroDivisionError):
        backing_off(20, lambda size: size / 0)


def test_chunks_follow_the_memory(monkeypatch):
    model = vector_net()
    x = images(64, 7)
    with SavedBytes() as saved:
        model(x[:1].clone().requires_grad_())
    assert saved.total > 0
    monkeypatch.setattr("attrbox.core.memory.free_bytes", lambda device: 10 * saved.total)
    assert images_per_pass(x, lambda few: model(few), 64) == 4  # 40 % of room for ten
    monkeypatch.setattr("attrbox.core.memory.free_bytes", lambda device: 10**12)
    assert images_per_pass(x, lambda few: model(few), 64) == 10
    assert images_per_pass(x, lambda few: model(few), 5) == 5
    monkeypatch.setattr("attrbox.core.memory.free_bytes", lambda device: 0)
    assert images_per_pass(x, lambda few: model(few), 64) == 1


def test_saved_bytes_counts_each_storage_once():
    x = torch.ones(100, requires_grad=True)
    with SavedBytes() as saved:
        y = x * 2
        (y * y).sum()  # y is saved twice
    assert saved.total == 400


def test_bf16_is_close_to_float32():
    model = relu_net(dtype=torch.float32)
    x = X.float()
    for method in ("saliency", "deeplift", "lrp_epsilon", "grad_cam", "integrated_gradients"):
        full = attrbox.explain(model, x, method, target=1, progress=False).values
        half = attrbox.explain(model, x, method, target=1, precision=torch.bfloat16, progress=False).values
        assert half.dtype == torch.float32
        assert (half - full).norm() < 0.05 * full.norm()
