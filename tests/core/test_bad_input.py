"""What comes in wrong gets an exception that helps, and nothing is changed."""

import pytest
import torch
from nets import images, relu_net
from snapshots import nothing_changes
from torch import nn

import attrbox
from attrbox.errors import AttrboxError, InputError, ModelError, OptionError, UnknownNameError

X = images(3, 3, 8, 8)


def broken(index: int, value: float) -> torch.Tensor:
    x = X.clone()
    x[index, 0, 0, 0] = value
    return x


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (X.numpy(), "torch.Tensor .* got ndarray"),
        ([X], "got list"),
        (None, "got NoneType"),
        ((X * 100).long(), "floating-point .* got torch.int64"),
        ((X > 0), "torch.bool"),
        (torch.zeros(3, dtype=torch.float64), r"begins with N, got \[3\]"),
        (torch.zeros((), dtype=torch.float64), r"got \[\]"),
        (X[:0], r"at least one image .* got \[0, 3, 8, 8\]"),
        (X[:, :, :0], "at least one image and one pixel"),
        (broken(1, float("nan")), r"NaN or infinity in images \[1\]"),
        (broken(2, float("inf")), r"images \[2\]"),
        (broken(0, -float("inf")), r"images \[0\]"),
    ],
)
@pytest.mark.parametrize("method", ["saliency", "deeplift", "integrated_gradients", "random"])
def test_images(bad, message, method):
    model = relu_net()
    with nothing_changes(model), pytest.raises(InputError, match=message):
        attrbox.explain(model, bad, method, progress=False)


def test_a_forgotten_batch_axis():
    class Whole(nn.Module):  # a model that would take [C, H, W] for a batch
        def forward(self, x):
            return x.sum((1, 2))[:2]

    with pytest.raises(ModelError, match=r"images\[None\]"):
        attrbox.explain(Whole().eval(), X[0], "saliency", progress=False)


@pytest.mark.parametrize("model", [None, "resnet18", lambda x: x, torch.ones(3), nn.ReLU])
def test_models(model):
    with pytest.raises(ModelError, match=r"Expected the model to be a torch\.nn\.Module"):
        attrbox.explain(model, X, "saliency", progress=False)


def test_a_model_made_in_inference_mode():
    with torch.inference_mode():
        model = relu_net()
    with pytest.raises(ModelError, match="inference_mode"):
        attrbox.explain(model, X, "saliency", progress=False)


@pytest.mark.parametrize(
    ("baseline", "message"),
    [
        (torch.zeros(3, 8, 7), r"baseline of shape \[3, 8, 8\], \[1, 3, 8, 8\] or \[3, 3, 8, 8\], got \[3, 8, 7\]"),
        (torch.zeros(2, 3, 8, 8), r"got \[2, 3, 8, 8\]"),
        (torch.zeros(3, 3, 8, 8).fill_(float("nan")), "finite"),
        (torch.zeros(3), r"got \[3\]"),
    ],
)
@pytest.mark.parametrize("method", ["deeplift", "integrated_gradients"])
def test_baselines(baseline, message, method):
    model = relu_net()
    with nothing_changes(model), pytest.raises(InputError, match=message):
        attrbox.explain(model, X, method, baseline=baseline, progress=False)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 3, 8, 8), (3, 3, 8, 8)])
@pytest.mark.parametrize("method", ["deeplift", "integrated_gradients"])
def test_baselines_that_fit(shape, method):
    baseline = images(*shape, seed=2)
    maps = attrbox.explain(relu_net(), X, method, baseline=baseline, target=1, batch_size=2, progress=False)
    with torch.no_grad():
        expected = relu_net()(X)[:, 1] - relu_net()(baseline.expand(3, 3, 8, 8))[:, 1]
    tolerance = 1e-10 if method == "deeplift" else 0.3
    torch.testing.assert_close(maps.values.sum((1, 2, 3)), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(maps.gap, maps.values.sum((1, 2, 3)) - expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 2.0}, "batch_size"),
        ({"batch_size": True}, "batch_size"),
        ({"precision": torch.float64}, "precision"),
        ({"precision": "bf16"}, "precision"),
        ({"strict": "yes"}, "strict to be True or False, got 'yes'"),
        ({"channels_last": 1}, "channels_last to be True or False"),
        ({"seed": 1.5}, "seed"),
        ({"seed": [1, 2]}, "3 in all, got 2"),
        ({"seed": "lucky"}, "seed"),
        ({"seed": None}, "seed"),
    ],
)
def test_arguments_of_the_call(options, message):
    with pytest.raises(OptionError, match=message):
        attrbox.explain(relu_net(), X, "saliency", progress=False, **options)


@pytest.mark.parametrize("methods", ["saliency", [], None, [("saliency",)], [3], [("saliency", 3)], [["saliency", {}]]])
def test_lists_of_methods(methods):
    with pytest.raises(OptionError, match="Expected a"):
        attrbox.compare(relu_net(), X, methods, progress=False)


@pytest.mark.parametrize("flag", ["progress", "channels_last", "controls"])
@pytest.mark.parametrize("value", ["yes", None, 1, []])
def test_flags(flag, value):
    model = relu_net()
    maps = attrbox.compare(model, X, ["saliency"], progress=False)
    with pytest.raises(OptionError, match=f"Expected {flag} to be True or False"):
        attrbox.evaluate(model, X, maps, ["morf"], **{flag: value})
    if flag != "controls":
        with pytest.raises(OptionError, match=f"Expected {flag} to be True or False"):
            attrbox.explain(model, X, "saliency", **{flag: value})


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("method", ["saliency", "deeplift", "integrated_gradients", "occlusion"])
def test_images_of_8_bits_are_explained_in_float32(method, dtype):
    model = relu_net().float()
    options = {"window": 4, "stride": 4} if method == "occlusion" else {}
    small = X.to(dtype)
    maps = attrbox.explain(model, small, method, progress=False, **options)
    assert torch.equal(maps.values, attrbox.explain(model, small.float(), method, progress=False, **options).values)


def test_one_wrong_method_among_many_stops_before_any_work():
    calls = []
    model = relu_net()
    model.register_forward_hook(lambda *args: calls.append(1))
    for methods in (["saliency", "salienzy"], ["saliency", ("deeplift", {"base": 1})]):
        with pytest.raises(AttrboxError):
            attrbox.compare(model, X, methods, progress=False)
    with pytest.raises(UnknownNameError):
        attrbox.explain(model, X, "salienzy", progress=False)
    assert calls == []


def test_every_error_has_one_root_and_a_builtin_one():
    kinds = [kind for kind in vars(attrbox.errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    ours = [kind for kind in kinds if not issubclass(kind, Warning)]
    assert len(ours) > 10
    for kind in ours:
        assert issubclass(kind, AttrboxError)
        assert kind is AttrboxError or kind.__bases__ != (AttrboxError,)
