"""Models of torchvision and EfficientNet-Lite0, unedited: every method runs and keeps its promises.

Weights are random with calibrated batch-norms (`nets.calibrate`), images small. What is slow here is the number of
layers, not of pixels.
"""

import warnings
from functools import cache

import pytest
import torch
import torchvision
from nets import calibrate, images
from torch import Tensor, nn

import attrbox
from attrbox.core.model_state import untouched
from attrbox.engine.tape import record
from attrbox.rules.deeplift import DeepLift
from attrbox.rules.guided import Deconvnet, GuidedBackprop
from attrbox.rules.lrp.activations import LRPEpsilon

# name -> side of the images, what the last feature map is called, whether all non-linearities are ReLUs and max-pools
ZOO = {
    "resnet18": (64, "layer4", True),
    "vgg16": (32, "features.29", True),
    "inception_v3": (128, "Mixed_7c", True),
    "densenet121": (64, None, True),
    "mobilenet_v3_large": (64, "features.16", False),
    "efficientnet_b0": (64, "features.8", False),
    "shufflenet_v2_x1_0": (64, "conv5", True),
    "efficientnet_lite0": (64, None, False),
}
MANY_PASSES = {"integrated_gradients": {"steps": 3}}
MANY_PASSES |= {name: {"n_samples": 2} for name in ("smoothgrad", "squared_smoothgrad", "vargrad")}
MANY_PASSES |= {name: {"iterations": 2} for name in ("learned", "learned_rank", "learned_clean", "smask")}
MANY_PASSES |= {"mask": {"iterations": 2, "initial": "ones"}, "occlusion": {"window": 32, "stride": 32}}
MANY_PASSES |= {
    "rise": {"n_samples": 3},
    "lime": {"n_samples": 3, "segments": 2},
    "kernel_shap": {"n_samples": 4, "segments": 2},
}


# One more of each family, among them the transformers: name -> side of the images, options.
FAMILIES = {
    "alexnet": (64, {}),
    "convnext_tiny": (32, {}),
    "googlenet": (64, {"init_weights": False}),
    "mobilenet_v2": (32, {}),
    "regnet_y_400mf": (32, {}),
    "squeezenet1_1": (32, {}),
    "swin_t": (64, {}),
    "swin_v2_t": (64, {}),
    "vit_b_32": (64, {"image_size": 64}),
}


@cache
def load(name: str, dtype: torch.dtype) -> nn.Module:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # inception's note on its initialisation
        torch.manual_seed(0)
        if name == "efficientnet_lite0":
            from efficientnet_lite_pytorch import EfficientNet

            model = EfficientNet.from_name("efficientnet-lite0")
        else:
            options = {"init_weights": False} if name == "inception_v3" else {}
            model = torchvision.models.get_model(name, weights=None, **options)
        if name == "vgg16":  # the same operations with a smaller head: its 120 million weights only take time
            model.classifier[0], model.classifier[3], model.classifier[6] = (
                nn.Linear(512 * 49, 64),
                nn.Linear(64, 64),
                nn.Linear(64, 1000),
            )
    return calibrate(model, ZOO[name][0], dtype, samples=4)


def photographs(name: str, dtype: torch.dtype) -> Tensor:
    side = ZOO[name][0]
    return images(2, 3, side, side, seed=1, dtype=dtype)


def native(model: nn.Module, x: Tensor, target: int) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    output = model(leaf.clone())
    return output, torch.autograd.grad(output[:, target].sum(), leaf)[0]


pytestmark = pytest.mark.filterwarnings("error")


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
class TestZoo:
    def test_recorded_pass_is_the_native_one(self, name, dtype):
        model, x = load(name, dtype), photographs(name, dtype)
        output, gradient = native(model, x, 3)
        with untouched(model):
            tape = record(model, x, [GuidedBackprop(), Deconvnet(), LRPEpsilon(), DeepLift()], [None])
            assert torch.equal(tape.output, output)
            assert torch.equal(tape.replay(tape.output[:, 3], [tape.images])[0], gradient)
        assert tape.unknown == ()
        saliency = attrbox.explain(model, x, "saliency", absolute=False, target=3, progress=False).values
        assert torch.equal(saliency, gradient)

    def test_deeplift_is_complete(self, name, dtype):
        model, x = load(name, dtype), photographs(name, dtype)
        other = images(*x.shape, seed=2, dtype=dtype)
        most = 1e-9 if dtype == torch.float64 else 1e-3
        for baseline in (0.0, other[0], other):
            maps = attrbox.explain(model, x, "deeplift", baseline=baseline, target=[3, 5], progress=False)
            assert maps.coverage.complete
            assert maps.relative_gap.max() < most


@pytest.mark.parametrize("name", ZOO)
def test_every_method_runs(name):
    model, x = load(name, torch.float32), photographs(name, torch.float32)
    runnable = [name for name in attrbox.list_methods() if attrbox.method_registry[name].for_all]
    entries = [(method, MANY_PASSES.get(method, {})) for method in runnable]
    result = attrbox.compare(model, x, entries, progress=False)
    for method, maps in result.items():
        assert maps.values.isfinite().all(), method
        assert maps.values.shape in (x.shape, (2, 1, *x.shape[2:])), method
        assert maps.values.abs().max() > 0 or method in ("grad_cam", "guided_grad_cam"), method


@pytest.mark.parametrize("name", [name for name, (_, _, relu) in ZOO.items() if relu])
def test_lrp_without_stabiliser_is_gradient_x_input_on_relu_nets(name):
    model, x = load(name, torch.float64), photographs(name, torch.float64)
    lrp = attrbox.explain(model, x, "lrp_epsilon", epsilon=1e-12, target=3, progress=False).values
    wanted = attrbox.explain(model, x, "gradient_x_input", target=3, progress=False).values
    assert (lrp - wanted).norm() < 1e-6 * wanted.norm()


@pytest.mark.parametrize("name", ZOO)
def test_guided_backprop_differs_from_the_plain_gradient(name):
    model, x = load(name, torch.float64), photographs(name, torch.float64)
    guided = attrbox.explain(model, x, "guided_backprop", target=3, progress=False)
    plain = attrbox.explain(model, x, "saliency", absolute=False, target=3, progress=False).values
    assert (guided.values - plain).norm() > 0.1 * plain.norm()
    assert {o.operation for o in guided.coverage.rule} <= {"relu", "relu6", "hardswish", "silu"}


@pytest.mark.parametrize("name", [name for name, (_, layer, _) in ZOO.items() if layer])
def test_the_last_feature_map_is_the_published_layer(name):
    model, x = load(name, torch.float64), photographs(name, torch.float64)
    found = attrbox.explain(model, x, "grad_cam", target=3, relu=False, progress=False).values
    named = attrbox.explain(model, x, "grad_cam", target=3, relu=False, layer=ZOO[name][1], progress=False).values
    torch.testing.assert_close(found, named)


@pytest.mark.parametrize("name", FAMILIES)
def test_rules_keep_their_promises_on_every_family(name):
    side, options = FAMILIES[name]
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = torchvision.models.get_model(name, weights=None, **options)
        if name == "vit_b_32":  # torchvision starts its head at 0
            nn.init.normal_(model.heads.head.weight, std=0.1)
    model = calibrate(model, side, samples=2)
    x = images(2, 3, side, side, seed=1)
    revealing = ("deeplift", {"reveal_cancel": "all"})
    entries = ["deeplift", revealing, "lrp_epsilon", "guided_backprop"]
    result = attrbox.compare(model, x, entries, target=3, progress=False)
    for maps in result.values():
        assert maps.values.isfinite().all()
        assert maps.coverage.complete
    rescaled, revealed = (maps for label, maps in result.items() if label.startswith("deeplift"))
    assert rescaled.relative_gap.max() < 1e-9
    assert revealed.relative_gap.max() < 1e-9
    assert {site.operation for site in revealed.coverage.rule} & {"linear", "convolution"}
    assert not torch.equal(revealed.values, rescaled.values)
    torch.testing.assert_close(rescaled.score, model(x)[:, 3].detach())
