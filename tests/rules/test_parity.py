"""The same numbers as captum and zennit where these are right; tested differences where they are not.

Versions: captum 0.8 and 0.9, zennit 0.5. What a difference test asserts about a peer is a defect seen there, so that it
fails, and can go, when the peer mends it.
"""

import contextlib
import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
import torchvision
from nets import calibrate, images, relu_net, seeded
from torch import nn

import attrbox
from attrbox.engine.site import KINDS
from attrbox.engine.tape import record
from attrbox.rules.deeplift import DeepLift

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    captum = pytest.importorskip("captum.attr")
    attribution = pytest.importorskip("zennit.attribution")
    composites = pytest.importorskip("zennit.composites")
    rules = pytest.importorskip("zennit.rules")
    types = pytest.importorskip("zennit.types")

pytestmark = pytest.mark.peers
TARGET = 2


@contextlib.contextmanager
def quiet():
    """captum warns of its hooks and of inputs without gradients in every call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Apart(nn.Module):
    """Does nothing, but makes a new tensor: captum mistakes adjacent non-linear modules (see the last section)."""

    def forward(self, x):
        return x.view_as(x)


def apart(model):
    """The same net with the max-pools apart from the ReLUs before them."""
    layers = [(Apart(), layer) if isinstance(layer, nn.MaxPool2d) else (layer,) for layer in model]
    return nn.Sequential(*(layer for pair in layers for layer in pair)).eval()


def vgg16():
    """VGG-16's convolutions, with a classifier that is small enough for a test; 64 x 64 images."""
    layers = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])
    for i, layer in enumerate(layers):
        if isinstance(layer, nn.ReLU):
            layers[i] = nn.ReLU()  # not in place: captum's DeepLIFT needs the input
    classifier = [nn.Flatten(), nn.Linear(512 * 4, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 10)]
    return nn.Sequential(*layers, *classifier)


MODELS = {
    "relu": (relu_net, (3, 8, 8), "2"),
    "relu, pool": (lambda: relu_net(pool=True), (3, 8, 8), "2"),
    "VGG-16": (lambda: seeded(vgg16), (3, 64, 64), "29"),
}


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    """A model, images, and the name of a convolutional layer (for VGG-16 the last ReLU)."""
    build, shape, layer = MODELS[request.param]
    return build(), images(1 if request.param == "VGG-16" else 3, *shape), layer


def ours(model, x, method, **options):
    return attrbox.explain(model, x, method, target=TARGET, **options).values


def by_captum(peer, x, **options):
    with quiet():
        return peer.attribute(x.clone(), target=TARGET, **options).detach()


def by_zennit(attributor, x):
    """zennit's maps of the target's logit, for a seed of 1 at the target."""
    with quiet(), attributor:
        _, maps = attributor(x.clone(), one_hot)
    return maps.detach()


def one_hot(output):
    return F.one_hot(torch.full((len(output),), TARGET), output.shape[1]).to(output)


def same(actual, expected, tolerance=1e-5):
    """Equal up to `tolerance` of the largest value, and not trivially so."""
    assert expected.abs().max() > 0
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def differs(actual, expected, by=0.05):
    assert (actual - expected).abs().max() > by * expected.abs().max()


# ------------------------------------------------------------------------------------------------------------- captum


@pytest.mark.parametrize(
    ("method", "options", "peer", "peer_options"),
    [
        ("saliency", {}, captum.Saliency, {}),
        ("saliency", {"absolute": False}, captum.Saliency, {"abs": False}),
        ("gradient_x_input", {}, captum.InputXGradient, {}),
        ("guided_backprop", {}, captum.GuidedBackprop, {}),
        ("deconvnet", {}, captum.Deconvolution, {}),
        ("integrated_gradients", {"steps": 3}, captum.IntegratedGradients, {"n_steps": 3}),
        (
            "integrated_gradients",
            {"steps": 3, "quadrature": "right", "baseline": -0.2},
            captum.IntegratedGradients,
            {"n_steps": 3, "method": "riemann_right", "baselines": -0.2},
        ),
        (
            "integrated_gradients",
            {"steps": 2, "quadrature": "midpoint"},
            captum.IntegratedGradients,
            {"n_steps": 2, "method": "riemann_middle"},
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_same_maps_as_captum(case, method, options, peer, peer_options):
    model, x, _ = case
    same(ours(model, x, method, **options), by_captum(peer(model), x, **peer_options))


@pytest.mark.parametrize("baseline", ["zeros", "number", "per sample"])
def test_deeplift_is_captums(case, baseline):
    model, x, _ = case
    x0 = {"zeros": 0.0, "number": 0.3, "per sample": images(*x.shape, seed=1)}[baseline]
    same(ours(model, x, "deeplift", baseline=x0), by_captum(captum.DeepLift(apart(model)), x, baselines=x0))


@pytest.mark.parametrize("activation", ["Sigmoid", "Tanh", "Softplus", "ELU", "LeakyReLU"])
def test_deeplift_at_other_activations_is_captums(activation):
    model = seeded(
        lambda: nn.Sequential(nn.Conv2d(3, 5, 3), getattr(nn, activation)(), nn.Flatten(), nn.Linear(180, 4))
    )
    x, x0 = images(3, 3, 8, 8), images(3, 3, 8, 8, seed=1)
    same(ours(model, x, "deeplift", baseline=x0), by_captum(captum.DeepLift(model), x, baselines=x0))


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize(("ours_mode", "captum_mode"), [("linear", "bilinear"), ("nearest", "nearest")])
def test_grad_cam_is_captums(case, relu, ours_mode, captum_mode):
    model, x, layer = case
    cam = by_captum(captum.LayerGradCam(model, model.get_submodule(layer)), x, relu_attributions=relu)
    cam = captum.LayerAttribution.interpolate(cam, x.shape[2:], captum_mode)
    got = ours(model, x, "grad_cam", layer=layer, relu=relu, interpolation=ours_mode)
    torch.testing.assert_close(got, cam, rtol=1e-9, atol=1e-12)
    assert (cam != 0).any()


def test_guided_grad_cam_is_captums(case):
    model, x, layer = case
    expected = by_captum(captum.GuidedGradCam(model, model.get_submodule(layer)), x)
    same(ours(model, x, "guided_grad_cam", layer=layer, interpolation="nearest"), expected)


def test_smoothgrad_without_noise_is_captums(case):
    model, x, _ = case
    # captum's default is an absolute deviation of 1, and of |gradients| unless told otherwise.
    tunnel = captum.NoiseTunnel(captum.Saliency(model))
    for nt_type, method in (("smoothgrad", "smoothgrad"), ("smoothgrad_sq", "squared_smoothgrad")):
        expected = by_captum(tunnel, x, nt_type=nt_type, nt_samples=2, stdevs=0.0, abs=False)
        same(ours(model, x, method, noise_fraction=0.0, n_samples=2), expected)


def test_the_smoothgrad_family_on_a_quadratic_is_captums():
    # f = sum x^2: 2 x, 4 (x^2 + sd^2), 4 sd^2, with sd = .2 * range 1. Both by sampling; the mean over 300 pixels of
    # each value and 200 samples has standard errors below .006, so they differ by less than .03.
    class Squares(nn.Module):
        def forward(self, x):
            return (x**2).sum(1, keepdim=True).expand(-1, 3)

    model, x = Squares().eval(), torch.tensor([[0.0, 1.0]], dtype=torch.float64).repeat(1, 300)
    tunnel = captum.NoiseTunnel(captum.Saliency(model))
    for nt_type, method in (
        ("smoothgrad", "smoothgrad"),
        ("smoothgrad_sq", "squared_smoothgrad"),
        ("vargrad", "vargrad"),
    ):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            peer = by_captum(tunnel, x, nt_type=nt_type, nt_samples=200, stdevs=0.2, abs=False)
        got = ours(model, x, method, noise_fraction=0.2, n_samples=200)
        torch.testing.assert_close(got.view(300, 2).mean(0), peer.view(300, 2).mean(0), rtol=0, atol=0.03)


# ------------------------------------------------------------------------------------------------------------- zennit


@pytest.mark.parametrize(
    ("method", "options", "composite"),
    [
        ("saliency", {"absolute": False}, None),
        ("guided_backprop", {}, composites.GuidedBackprop),
        ("deconvnet", {}, composites.DeconvNet),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_same_maps_as_zennit(case, method, options, composite):
    model, x, _ = case
    attributor = attribution.Gradient(model, composite and composite())
    same(ours(model, x, method, **options), by_zennit(attributor, x))


def test_integrated_gradients_are_zennits(case):
    model, x, _ = case
    attributor = attribution.IntegratedGradients(model, n_iter=3)  # right Riemann sum
    same(ours(model, x, "integrated_gradients", steps=3, quadrature="right"), by_zennit(attributor, x))


def test_smoothgrad_of_one_sample_is_zennits(case):
    model, x, _ = case
    attributor = attribution.SmoothGrad(model, n_iter=1)  # its last sample is free of noise
    same(ours(model, x, "smoothgrad", noise_fraction=0.0, n_samples=1), by_zennit(attributor, x))


@pytest.mark.parametrize("epsilon", [1e-4, 0.25])
def test_lrp_epsilon_is_zennits(case, epsilon):
    # zennit stabilises each linear layer, the output layer too; attrbox those with a non-linearity behind. The
    # relevance of the output layer is z / (z + epsilon sign z) of the logit there.
    model, x, _ = case
    composite = composites.LayerMapComposite(
        [
            (types.Activation, rules.Pass()),
            (types.Linear, rules.Epsilon(epsilon)),
        ]
    )
    with quiet(), attribution.Gradient(model, composite) as attributor:
        output, relevance = attributor(x.clone(), lambda output: output * one_hot(output))
    logit = output[:, TARGET].detach().view(-1, 1, 1, 1)
    same(
        ours(model, x, "lrp_epsilon", epsilon=epsilon) * (logit / (logit + epsilon * logit.sign())), relevance.detach()
    )
    differs(ours(model, x, "lrp_epsilon", epsilon=epsilon), ours(model, x, "gradient_x_input"), 1e-5)


@pytest.fixture(scope="module", params=["VGG-16", "ResNet-18"])
def canonised(request):
    """A model, zennit's canonizer of its batch-norms and residual sums, and an image."""
    canonizers = pytest.importorskip("zennit.torchvision")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if request.param == "ResNet-18":
            model, canonizer, side = torchvision.models.resnet18(weights=None), canonizers.ResNetCanonizer, 64
        else:
            model, canonizer, side = torchvision.models.vgg16_bn(weights=None), canonizers.VGGCanonizer, 32
            model.avgpool = nn.Identity()
            model.classifier = nn.Sequential(nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-12  # zennit leaves merged batch-norms in place, which still divide by sqrt(1 + eps)
    return calibrate(model, side, samples=4), canonizer, images(1, 3, side, side)


@pytest.mark.parametrize(
    ("method", "options", "composite", "peer_options"),
    [
        ("epsilon_plus", {}, composites.EpsilonPlus, {}),
        ("epsilon_alpha2_beta1", {}, composites.EpsilonAlpha2Beta1, {}),
        ("epsilon_gamma_box", {"low": -4.0, "high": 4.5}, composites.EpsilonGammaBox, {"low": -4.0, "high": 4.5}),
        ("excitation_backprop", {}, composites.ExcitationBackprop, {"zero_params": "bias"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_composites_are_zennits_with_its_canonizers(canonised, method, options, composite, peer_options):
    # zennit stabilises sums and averages too, so the stabilisers are small here. Its excitation backpropagation lets
    # biases absorb relevance unless told otherwise.
    model, canonizer, x = canonised
    given = {key: value if key == "zero_params" else torch.full_like(x, value) for key, value in peer_options.items()}
    peer = composite(stabilizer=1e-12, canonizers=[canonizer()], **given)
    whole = method == "excitation_backprop"  # of a relevance of 1, not of the score
    with quiet(), attribution.Gradient(model, peer) as attributor:
        _, relevance = attributor(x.clone(), lambda output: one_hot(output) * (1 if whole else output))
    same(ours(model, x, method, stabiliser=1e-12, **options), relevance.detach())


# ------------------------------------------------------------------------------------------- where the peers are wrong


class FunctionalNet(nn.Module):
    """`relu_net` with functional ReLUs: same weights, same outputs."""

    def __init__(self, net):
        super().__init__()
        self.linear = nn.ModuleList(m for m in net if not isinstance(m, nn.ReLU))

    def forward(self, x):
        conv1, conv2, identity, flatten, fc1, fc2 = self.linear
        return fc2(F.relu(fc1(flatten(identity(F.relu(conv2(F.relu(conv1(x)))))))))


def test_peers_do_not_see_functional_relus():
    # They hook modules, so without ReLU modules their guided backpropagation is the plain gradient, without a word.
    net, x = relu_net(), images(3, 3, 8, 8)
    model = FunctionalNet(net).eval()
    gradient, guided = ours(net, x, "saliency", absolute=False), ours(net, x, "guided_backprop")
    same(by_captum(captum.GuidedBackprop(model), x), gradient, 1e-12)
    same(by_zennit(attribution.Gradient(model, composites.GuidedBackprop()), x), gradient, 1e-12)
    same(ours(model, x, "guided_backprop"), guided, 1e-12)
    differs(guided, gradient)


def test_captums_deeplift_is_incomplete_with_functional_relus():
    # The gradient at the input takes the place of the slope.
    net, x = relu_net(), images(3, 3, 8, 8)
    model = FunctionalNet(net).eval()
    change = (model(x) - model(0 * x))[:, TARGET].detach()
    differs(by_captum(captum.DeepLift(model), x).flatten(1).sum(1), change)
    same(ours(model, x, "deeplift").flatten(1).sum(1), change, 1e-12)


@pytest.fixture(scope="module")
def inception():
    model = torchvision.models.inception_v3(weights=None, init_weights=False)
    return calibrate(model, 96, torch.float32, samples=4), images(1, 3, 96, 96, dtype=torch.float32)


def test_captums_guided_backprop_of_inception_v3_is_the_plain_gradient(inception):
    # All its ReLUs are F.relu(x, inplace=True).
    model, x = inception
    gradient = ours(model, x, "saliency", absolute=False)
    same(by_captum(captum.GuidedBackprop(model), x), gradient)
    differs(ours(model, x, "guided_backprop"), gradient)


def test_captums_deeplift_fails_on_resnet18():
    # Each block uses its one ReLU module twice.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = calibrate(torchvision.models.resnet18(weights=None))
    x = images(2, 3, 64, 64)
    with pytest.raises((AssertionError, RuntimeError), match="more than once"):
        by_captum(captum.DeepLift(copy.deepcopy(model)), x)
    maps = attrbox.explain(model, x, "deeplift", target=TARGET)
    same(maps.values.flatten(1).sum(1), (model(x) - model(0 * x))[:, TARGET].detach(), 1e-9)
    assert maps.relative_gap.max() < 1e-9


class NoPools(DeepLift):
    """DeepLIFT with the true gradient at max-pools."""

    kinds = KINDS - {"max_pool"}


def test_captums_deeplift_ignores_max_pools_behind_relus():
    # Of two adjacent non-linear modules, the earlier reads the gradient before the later has changed it (its issue
    # 1104). So it does without its own rule for max-pools there, and is incomplete.
    model, x = relu_net(pool=True).requires_grad_(False), images(3, 3, 8, 8)
    x0 = images(3, 3, 8, 8, seed=1)
    change = (model(x) - model(x0))[:, TARGET]
    peer = by_captum(captum.DeepLift(model), x, baselines=x0)
    tape = record(model, x, [NoPools()])
    reference = tape.record_reference(x0)
    (multipliers,) = tape.replay(tape.output[:, TARGET], [tape.images], NoPools(), reference=reference)
    same(multipliers * (x - x0), peer, 1e-9)
    differs(peer.flatten(1).sum(1), change)
    same(ours(model, x, "deeplift", baseline=x0).flatten(1).sum(1), change, 1e-12)


def test_captums_deeplift_loses_what_overlapping_pools_share():
    # (1, 5, 2), windows of 2 with stride 1: the 5 wins twice, but max_unpool writes it once.
    model = nn.Sequential(nn.MaxPool1d(2, 1), nn.Flatten(), nn.Linear(2, 3, bias=False)).double().eval()
    nn.init.ones_(model[2].weight)
    x = torch.tensor([[[1.0, 5.0, 2.0]]], dtype=torch.float64)
    assert by_captum(captum.DeepLift(model), x).sum().item() == pytest.approx(5)
    assert ours(model, x, "deeplift").sum().item() == pytest.approx(10)


def test_captums_trapezoid_weights_do_not_sum_to_1():
    # 49 / 50, so a linear model gets .98 of its map.
    model, x = nn.Linear(4, 3).double().eval(), images(2, 4)
    exact = ours(model, x, "gradient_x_input")
    same(by_captum(captum.IntegratedGradients(model), x, method="riemann_trapezoid"), 0.98 * exact, 1e-6)
    same(ours(model, x, "integrated_gradients", quadrature="trapezoid"), exact, 1e-12)


def test_captums_deeplift_at_a_softmax_depends_on_batch_mates():
    # It subtracts the mean of the gradients of the whole batch.
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 4), nn.Softmax(1)))
    x = images(3, 5)
    differs(by_captum(captum.DeepLift(model), x)[:1], by_captum(captum.DeepLift(model), x[:1]), 1e-3)
    together = ours(model, x, "deeplift")
    same(together[:1], ours(model, x[:1], "deeplift"), 1e-12)
    same(together.sum(1), (model(x) - model(0 * x))[:, TARGET].detach(), 1e-12)


def test_captum_leaves_a_hook_on_an_image_that_feeds_a_relu():
    # The plain gradient of the same tensor is wrong afterwards, (2, 3) instead of (2, 0).
    model = nn.Sequential(nn.ReLU(), nn.Linear(2, 1, bias=False)).double().eval()
    model[1].weight.data[:] = torch.tensor([[2.0, 3.0]])

    def gradient_after(explain):
        x = torch.tensor([[1.0, -1.0]], dtype=torch.float64).requires_grad_()
        explain(x)
        (gradient,) = torch.autograd.grad(model(x).sum(), x)
        return gradient.tolist()

    with quiet():
        assert gradient_after(lambda x: captum.Deconvolution(model).attribute(x, target=0)) == [[2.0, 3.0]]
    assert gradient_after(lambda x: attrbox.explain(model, x, "deconvnet", target=0)) == [[2.0, 0.0]]
