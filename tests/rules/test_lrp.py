"""LRP at layers: each rule against Jacobian-made matrices with a free relevance, composites, conservation."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from lrp_formulas import STABILISER, by_alpha_beta, by_gamma, matrix, neg, pos, relevance_of, shared
from nets import SMALL, TRANSFORMERS, calibrate, images, relu_net, residual_net, seeded
from torch import Tensor, nn

import attrbox
from attrbox.engine.tape import record
from attrbox.errors import OptionError
from attrbox.rules.lrp.activations import LRPEpsilon
from attrbox.rules.lrp.composites import Composite
from attrbox.rules.lrp.layers import (
    AlphaBeta,
    Epsilon,
    ExcitationBackprop,
    Flat,
    Gamma,
    LayerRule,
    WSquare,
    ZBox,
    ZPlus,
    nonzero,
)

# ------------------------------------------------------------------------------------------------ layers and oracles


class Normed(nn.Module):
    """Layer and batch-norm, with statistics."""

    def __init__(self, layer: nn.Module, norm: nn.Module):
        super().__init__()
        self.layer, self.norm = layer, norm
        ranges = ((norm.running_mean, -1, 1), (norm.running_var, 0.5, 2), (norm.weight, -1, 2), (norm.bias, -1, 1))
        for tensor, low, high in ranges:
            if tensor is not None:
                nn.init.uniform_(tensor, low, high)

    def forward(self, x):
        return self.norm(self.layer(x))


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 4), (6,)),
    "linear, no bias": (lambda: nn.Linear(6, 4, bias=False), (6,)),
    "linear, tokens": (lambda: nn.Linear(5, 4), (3, 5)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 3, padding=1), (2, 5)),
    "conv2d": (lambda: nn.Conv2d(2, 4, 3, 2, 1, groups=2), (2, 4, 4)),
    "conv2d, dilated": (lambda: nn.Conv2d(2, 3, 2, dilation=2, bias=False), (2, 4, 4)),
    "conv3d": (lambda: nn.Conv3d(1, 2, 2), (1, 3, 3, 3)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(2, 3, 2, 2), (2, 2, 2)),
    "conv2d, batch-norm": (lambda: Normed(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)), (2, 4, 4)),
    "conv_transpose1d, batch-norm": (
        lambda: Normed(nn.ConvTranspose1d(4, 6, 3, 2, 1, 1, groups=2), nn.BatchNorm1d(6)),
        (4, 3),
    ),
    "conv_transpose2d, batch-norm": (
        lambda: Normed(nn.ConvTranspose2d(2, 3, 2, dilation=2, bias=False), nn.BatchNorm2d(3)),
        (2, 2, 2),
    ),
    "conv_transpose3d, batch-norm": (
        lambda: Normed(nn.ConvTranspose3d(2, 4, (1, 2, 2), groups=2), nn.BatchNorm3d(4, affine=False)),
        (2, 1, 2, 2),
    ),
    "linear, batch-norm": (lambda: Normed(nn.Linear(6, 4, bias=False), nn.BatchNorm1d(4)), (6,)),
    "batch-norm alone": (lambda: Normed(nn.Identity(), nn.BatchNorm2d(2)), (2, 3, 3)),
    "batch-norm alone, vectors": (lambda: Normed(nn.Identity(), nn.BatchNorm1d(6)), (6,)),
    "batch-norm alone, volumes": (lambda: Normed(nn.Identity(), nn.BatchNorm3d(2, affine=False)), (2, 1, 2, 3)),
}


def by_epsilon(m, b, x, r):
    return shared(m * x, b, r, 0.2)


def by_excitation(m, b, x, r):
    return shared(pos(m * x), 0 * b, r, STABILISER)


def by_z_box(m, b, x, r):
    return shared(m * x - pos(m) * -3.0 - neg(m) * 2.5, 0 * b, r, STABILISER)


def by_w_square(weights):
    """The bias of a merged batch-norm counts squared, too."""

    def oracle(m, b, x, r):
        return shared(weights(m), b**2, r, STABILISER)

    return oracle


RULES: dict[str, tuple[LayerRule, Callable[..., Tensor]]] = {
    "epsilon": (Epsilon(0.2), by_epsilon),
    "alpha 2, beta 1": (AlphaBeta(2.0, 1.0), by_alpha_beta(2.0, 1.0)),
    "alpha 1.5, beta 0.5": (AlphaBeta(1.5, 0.5), by_alpha_beta(1.5, 0.5)),
    "z+": (ZPlus(), by_alpha_beta(1.0, 0.0)),
    "excitation": (ExcitationBackprop(), by_excitation),
    "gamma": (Gamma(0.4), by_gamma),
    "z-box": (ZBox(-3.0, 2.5), by_z_box),
    "w-square": (WSquare(), by_w_square(lambda m: m**2)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("nonnegative", [False, True])
def test_a_rule_does_what_its_formula_says(rule, name, nonnegative):
    build, shape = LAYERS[name]
    layer = seeded(build, seed=2)
    x = images(2, *shape, seed=1)
    x[0].flatten()[0] = 0.0  # relevance must not be lost there
    before = nn.ReLU() if nonnegative else None
    m, b = matrix(layer, shape)
    relevance = images(2, len(m), seed=4)
    ours, oracle = RULES[rule]
    got = relevance_of(ours, layer, x, relevance, before)
    if nonnegative:
        if ours.divides:
            return  # a rule for pixels: behind a ReLU, its dead inputs would get relevance that the ReLU stops
        x = x.relu()
    expected = torch.stack([oracle(m, b, *row) for row in zip(x.flatten(1), relevance, strict=True)])
    torch.testing.assert_close(got.flatten(1), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["linear", "conv2d", "conv2d, dilated", "conv1d"])
def test_flat_shares_by_receptive_fields(name):
    build, shape = LAYERS[name]
    layer = seeded(build, seed=2)
    m, b = matrix(layer, shape)
    x, relevance = images(2, *shape, seed=1), images(2, len(m), seed=4)
    expected = [shared((m != 0).double(), 0 * b, row, STABILISER) for row in relevance]
    got = relevance_of(Flat(), layer, x, relevance)
    torch.testing.assert_close(got.flatten(1), torch.stack(expected), rtol=1e-9, atol=1e-11)


def test_published_numbers_of_one_neuron():
    # w = (2, -1), x = (1, 1), R = 1.
    layer = nn.Linear(2, 1, bias=False).double()
    layer.weight.data[:] = torch.tensor([[2.0, -1.0]])
    one, half = torch.ones(1, 2, dtype=torch.float64), torch.full((1, 2), 0.5, dtype=torch.float64)
    for rule, x, expected in (
        (Epsilon(1e-12), one, (2.0, -1.0)),
        (Epsilon(0.25), one, (1.6, -0.8)),
        (ZPlus(), one, (1.0, 0.0)),
        (AlphaBeta(2.0, 1.0), one, (2.0, -1.0)),
        (Gamma(0.25), one, (5 / 3, -2 / 3)),
        (WSquare(), one, (0.8, 0.2)),
        (Flat(), one, (0.5, 0.5)),
        (ZBox(0.0, 1.0), half, (2 / 3, 1 / 3)),
    ):
        composite = Composite((("any", rule),), 1e-12)
        tape = record(layer.requires_grad_(False), x, [composite])
        score = tape.output[:, 0] / tape.output[:, 0].detach()
        (gradient,) = tape.replay(score, [tape.images], composite)
        assert composite.relevance(gradient, x)[0].tolist() == pytest.approx(expected), rule


@pytest.mark.parametrize("rule", [Epsilon(0.2), AlphaBeta(2.0, 1.0), Gamma(0.4), ZBox(-3.0, 2.5), ExcitationBackprop()])
def test_propagated_gradients_can_be_differentiated(rule):
    model, x = relu_net().requires_grad_(False), images(2, 3, 8, 8)
    composite = Composite((("first", rule), ("any", rule)), STABILISER)

    def value(images: Tensor, create_graph: bool) -> tuple[Tensor, Tensor]:
        tape = record(model, images, [composite])
        (gradient,) = tape.replay(tape.output[:, 1], [tape.images], composite, create_graph=create_graph)
        return (gradient * gradient.detach().sign()).sum(), tape.images

    total, leaf = value(x, True)
    (derivative,) = torch.autograd.grad(total, leaf)
    step = 1e-6 * images(*x.shape, seed=9)
    change = value(x + step, False)[0] - value(x - step, False)[0]
    torch.testing.assert_close((derivative * step).sum() * 2, change, rtol=1e-4, atol=1e-9)


# --------------------------------------------------------------------------------------------------------- composites

METHODS = [
    "lrp",
    "epsilon_plus",
    "epsilon_alpha2_beta1",
    "epsilon_gamma_box",
    "deep_taylor",
    "excitation_backprop",
    "attn_lrp",
]
NETS = {name: (build, shape) for name, (build, shape) in SMALL.items()}
NETS |= {name: (build, (3, 16, 16)) for name, build in TRANSFORMERS.items()}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NETS)
def test_relevance_is_conserved_up_to_what_the_audit_says(name, method):
    build, shape = NETS[name]
    model, x = build(), images(2, *shape)
    maps = attrbox.explain(model, x, method, target=attrbox.classes([1, 2]), audit=True)
    audit = maps.coverage.conservation
    assert maps.values.isfinite().all()
    scale = maps.score.abs().max() + audit.arriving.abs().amax()
    layers = torch.tensor([site.operation in ("convolution", "linear", "batch_norm") for site in audit.sites])
    kept = audit.bias + audit.stabiliser + audit.clamp
    assert ((audit.absorbed - kept)[..., layers].abs() < 1e-9 * scale).all()
    assert (kept[..., ~layers] == 0).all()
    assert (method == "attn_lrp") or layers.any()
    plain = attrbox.explain(model, x, method, target=attrbox.classes([1, 2]))
    torch.testing.assert_close(plain.values, maps.values)
    assert str(audit.table()).count("\n") == len(audit.sites) + 2


@pytest.mark.parametrize("name", ["relu", "relu, pool", "residual", "overlapping pools", "sequences"])
def test_deep_taylor_is_positive_and_sums_to_the_positive_score(name):
    build, shape = SMALL[name]
    model, x = build(), images(6, *shape)
    for first in ("z_box", "w_square"):
        maps = attrbox.explain(model, x, "deep_taylor", first=first)
        bias = first == "w_square"  # it has a share by its square there
        total = maps.values.flatten(1).sum(1)
        assert (maps.values >= -1e-12).all()
        if not bias:
            torch.testing.assert_close(total, maps.score.relu(), rtol=1e-3, atol=1e-6)
        assert (total <= maps.score.relu() + 1e-6).all()


def test_contrastive_excitation_by_hand():
    """Zhang et al. 2016, section 3.3: of one neuron (1, 0) - (0, 1); of two layers, neuron by neuron."""
    model = nn.Linear(2, 1, bias=False).double().eval()
    model.weight.data[:] = torch.tensor([[2.0, -1.0]])
    one = torch.ones(1, 2, dtype=torch.float64)
    options = {"contrastive": True, "stabiliser": 1e-12}
    maps = attrbox.explain(model, one, "excitation_backprop", target=0, **options)
    assert maps.values[0].tolist() == pytest.approx([1.0, -1.0])
    assert maps.gap is None

    model = seeded(lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)))
    x = images(4, 6).abs()
    hidden = model[1](model[0](x)).detach()

    def down(products: Tensor, shares: Tensor) -> Tensor:
        """Each neuron's share [n, outputs] by its positive products [n, outputs, inputs]."""
        positive = pos(products)
        return (positive / (positive.sum(2, keepdim=True) + 1e-12) * shares[..., None]).sum(1)

    products = x[:, None] * model[0].weight.detach()
    for target in range(3):
        row = model[2].weight[target].detach() * hidden
        sides = [down(products, down(side[:, None], torch.ones(4, 1).double())) for side in (row, -row)]
        maps = attrbox.explain(model, x, "excitation_backprop", target=target, **options)
        torch.testing.assert_close(maps.values, sides[0] - sides[1], rtol=1e-6, atol=1e-8)
        plain = attrbox.explain(model, x, "excitation_backprop", target=target, stabiliser=1e-12).values
        torch.testing.assert_close(plain, sides[0], rtol=1e-6, atol=1e-8)
    several = attrbox.explain(model, x, "EBP", target=attrbox.classes([2, 0]), batch_size=3, **options).values
    torch.testing.assert_close(several[:, 0], maps.values)
    with pytest.raises(OptionError, match="difference of two"):
        attrbox.explain(model, x, "EBP", contrastive=True, audit=True)
    with pytest.raises(OptionError, match="contrastive"):
        attrbox.explain(model, x, "EBP", contrastive=1)


def test_the_rule_of_a_layer_is_the_first_that_fits():
    model, x = residual_net(), images(2, 3, 8, 8)
    plus = attrbox.explain(model, x, "epsilon_plus", target=1).values
    same = attrbox.explain(model, x, "lrp", target=1, places=(("convolution", ZPlus()), ("any", Flat()))).values
    assert not torch.allclose(same, plus)
    named = (("head", Epsilon()), ("stem", ZPlus()), ("conv*", ZPlus()), ("any", Flat()))
    torch.testing.assert_close(attrbox.explain(model, x, "lrp", target=1, places=named).values, plus)
    flat = attrbox.explain(model, x, "lrp", target=1, places=(("first", Flat()), ("convolution", ZPlus()))).values
    assert not torch.allclose(flat, plus)
    coverage = attrbox.explain(model, x, "lrp", target=1).coverage
    assert sum(operated.operation == "convolution" for operated in coverage.rule) == 5  # each with its batch-norm


class NormFirst(nn.Module):
    """Norms before convolutions, as in DenseNet and ResNets with pre-activation: one at the input, one behind a sum;
    one behind a transposed convolution, and one behind a layer whose output goes elsewhere, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.stem = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)
        self.norm1, self.conv1 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)
        self.up, self.norm3, self.head = nn.ConvTranspose2d(8, 4, 2, 2), nn.BatchNorm2d(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(self.first(x))
        y = x + self.conv1(F.relu(self.norm1(x)))
        y = y + self.conv2(F.relu(self.norm2(y)))
        y = self.norm3(self.up(torch.cat([x, y], 1)))
        return self.head(F.relu(y, inplace=True).mean((2, 3)))


@pytest.mark.parametrize("method", ["epsilon_plus", "epsilon_gamma_box", "attn_lrp"])
def test_what_added_constants_keep(method):
    """The relevance of the position embedding and the class token of a ViT, by the gradient that reaches them."""
    model = TRANSFORMERS["vit"]()
    nn.init.normal_(model.class_token, std=0.5)
    nn.init.normal_(model.encoder.pos_embedding, std=0.5)
    model.requires_grad_(False)
    x = images(2, 3, 16, 16)
    audit = attrbox.explain(model, x, method, target=1, audit=True).coverage.conservation
    constants = [model.encoder.pos_embedding, model.class_token]
    # What the model itself asks for a gradient of is followed; what only requires one is a constant.
    hook = model.register_forward_pre_hook(lambda *_: [constant.requires_grad_() for constant in constants] and None)
    rule = attrbox.method_registry[method].create({}).rule()
    tape = record(model, x, [rule])
    hook.remove()
    for row in range(2):
        gradients = tape.replay(tape.output[row, 1], constants, rule)
        wanted = sum(((c * g).sum() for c, g in zip(constants, gradients, strict=True)), torch.zeros(()).double())
        torch.testing.assert_close(audit.constants[row, 0], wanted.detach(), rtol=1e-9, atol=1e-9)
        assert wanted.abs() > 1e-3
    kinds = {site.operation for site in audit.sites}
    assert {"softmax", "linear", "convolution", "norm"} <= kinds


@pytest.mark.parametrize("method", METHODS)
def test_norm_first_nets_are_conserved_up_to_the_audited_share(method):
    model, x = calibrate(seeded(NormFirst), 6), images(3, 3, 6, 6)
    for norm in (model.first, model.norm1, model.norm2, model.norm3):
        norm.bias.data = torch.linspace(-1, 1, len(norm.bias)).double()
    options = {"gamma_convolution": 0.25} if method == "attn_lrp" else {}
    maps = attrbox.explain(model, x, method, target=1, audit=True, batch_size=2, **options)
    audit = maps.coverage.conservation
    assert [site.module for site in audit.sites if site.operation == "batch_norm"] == ["first", "norm2"]
    factor = maps.score.detach()[:, None] if method == "excitation_backprop" else 1.0  # its maps are of a score of 1
    if method != "deep_taylor" or (maps.score > 0).all():
        total = maps.values.flatten(1).sum(1, keepdim=True) * factor
        torch.testing.assert_close(total + audit.absorbed.sum(2), maps.score[:, None], rtol=1e-9, atol=1e-9)
    kept = audit.bias + audit.stabiliser + audit.clamp
    torch.testing.assert_close(kept, audit.absorbed, rtol=1e-9, atol=1e-9)
    norms = torch.tensor([site.operation == "batch_norm" for site in audit.sites])
    assert (audit.bias[..., norms].abs().sum() > 0.01) == (method not in ("deep_taylor", "excitation_backprop"))


def test_a_norm_first_net_passes_relevance_as_its_folded_twin():
    """Without an activation in between, a norm and the linear layer behind it are one layer."""

    def build() -> nn.Module:
        return nn.Sequential(nn.BatchNorm1d(7), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3))

    model, x = seeded(build), images(4, 7)
    for tensor in (model[0].running_mean, model[0].weight, model[0].bias):
        tensor.data = torch.linspace(0.5, 1.5, 7).double()
    twin = seeded(build)
    twin.load_state_dict(model.state_dict())
    scale = model[0].weight / (model[0].running_var + model[0].eps).sqrt()
    shift = model[0].bias - model[0].running_mean * scale
    with torch.no_grad():
        twin[1].bias += twin[1].weight @ shift
        twin[1].weight *= scale
    places = (("any", Epsilon(1e-12)),)
    one = attrbox.explain(model, x, "lrp", places=places, target=1, audit=True)
    two = attrbox.explain(nn.Sequential(*twin[1:]), x, "lrp", places=places, target=1, audit=True)
    torch.testing.assert_close(one.values, two.values)
    first, other = one.coverage.conservation.bias, two.coverage.conservation.bias
    torch.testing.assert_close(first[..., :2].sum(-1), other[..., 0])  # the norm's share and the layer's


class Spelled(nn.Module):
    """[N, 4, ...] -> convolution, a batch-norm spelled in some way, ReLU in place, linear layer."""

    def __init__(self, convolution: nn.Module, dims: int, spelling: Callable[..., Tensor]) -> None:
        super().__init__()
        self.convolution, self.head, self.spelling = convolution, nn.Linear(6, 3), spelling
        self.norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1](6, eps=0.1)
        ranges = ((self.norm.running_mean, -1, 1), (self.norm.running_var, 0.5, 2), (self.norm.weight, -1, 2))
        for tensor, low, high in (*ranges, (self.norm.bias, -1, 1)):
            nn.init.uniform_(tensor, low, high)

    def forward(self, x):
        y = self.spelling(self.convolution(x), self.norm)
        return self.head(F.relu(y, inplace=True).flatten(2).mean(2))


def folded_by_hand(model: Spelled) -> Spelled:
    """The same function without the batch-norm, output channel by output channel."""
    twin = copy.deepcopy(model)
    convolution, norm = twin.convolution, twin.norm
    twin.spelling = lambda y, norm: y
    bias = torch.zeros(6).double() if convolution.bias is None else convolution.bias.detach().clone()
    convolution.bias = nn.Parameter(bias)
    inputs, outputs = 4 // convolution.groups, 6 // convolution.groups
    with torch.no_grad():
        for channel in range(6):
            scale = norm.weight[channel] / math.sqrt(norm.running_var[channel] + norm.eps)
            group, place = divmod(channel, outputs)
            own = (slice(group * inputs, (group + 1) * inputs), place) if convolution.transposed else channel
            convolution.weight[own] *= scale
            convolution.bias[channel] = (bias[channel] - norm.running_mean[channel]) * scale + norm.bias[channel]
    return twin


def _arguments(norm: nn.Module) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return norm.weight, norm.bias, norm.running_mean, norm.running_var


SPELLINGS: dict[str, Callable[..., Tensor]] = {
    "module": lambda y, norm: norm(y),
    "F.batch_norm": lambda y, norm: F.batch_norm(
        input=y,
        eps=0.1,
        bias=norm.bias,
        weight=norm.weight,
        running_var=norm.running_var,
        running_mean=norm.running_mean,
    ),
    "torch.batch_norm": lambda y, norm: torch.batch_norm(y, *_arguments(norm), False, 0.1, 0.1, False),
    "native_batch_norm": lambda y, norm: torch.native_batch_norm(y, *_arguments(norm), False, 0.1, 0.1)[0],
    "aten": lambda y, norm: torch.ops.aten.native_batch_norm(y, *_arguments(norm), False, 0.1, 0.1)[0],
    "no training": lambda y, norm: torch._native_batch_norm_legit_no_training(y, *_arguments(norm), 0.1, 0.1)[0],
    "instance norm": lambda y, norm: F.instance_norm(
        y, norm.running_mean, norm.running_var, norm.weight, norm.bias, use_input_stats=False, eps=0.1
    ),
    "torch.instance_norm": lambda y, norm: torch.instance_norm(y, *_arguments(norm), False, 0.1, 0.1, False),
}
CONVOLUTIONS: dict[str, Callable[[int], nn.Module]] = {
    "convolution": lambda dims: (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](4, 6, 2, bias=False),
    "grouped": lambda dims: (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](4, 6, 2, groups=2),
    "transposed": lambda dims: _transposed(dims)(4, 6, 3, 2, 1, 1, bias=False),
    "transposed, grouped": lambda dims: _transposed(dims)(4, 6, 2, groups=2, dilation=2),
}


def _transposed(dims: int) -> type[nn.Module]:
    return (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("convolution", CONVOLUTIONS)
def test_a_batch_norm_passes_relevance_as_if_folded_by_hand(convolution, spelling):
    methods = [("epsilon_plus", {}), ("epsilon_alpha2_beta1", {}), ("deep_taylor", {}), ("EBP", {})]
    methods += [("epsilon_gamma_box", {}), ("attn_lrp", {"gamma_convolution": 0.25})]
    methods += [("deeplift", {"reveal_cancel": "all"})]
    for dims in (1, 2, 3):
        build = CONVOLUTIONS[convolution]
        model = seeded(lambda dims=dims, build=build: Spelled(build(dims), dims, SPELLINGS[spelling]), seed=dims)
        twin, x = folded_by_hand(model), images(2, 4, *(3,) * dims)
        torch.testing.assert_close(model(x), twin(x))
        maps, expected = (attrbox.compare(one, x, methods, target=1) for one in (model, twin))
        for label in maps:
            torch.testing.assert_close(maps[label].values, expected[label].values, rtol=1e-9, atol=1e-11)
            assert maps[label].coverage == expected[label].coverage  # one layer, not two


def test_two_batch_norms_in_a_row_belong_to_the_layer():
    model = seeded(lambda: Spelled(nn.ConvTranspose2d(4, 6, 2), 2, lambda y, norm: norm(norm(y))))
    single = seeded(lambda: Spelled(nn.ConvTranspose2d(4, 6, 2), 2, SPELLINGS["module"]))
    single.load_state_dict(model.state_dict())
    single.convolution = folded_by_hand(single).convolution  # once by hand, the second time as it is
    x = images(2, 4, 3, 3)
    torch.testing.assert_close(model(x), single(x))
    for method in ("epsilon_plus", "epsilon_alpha2_beta1"):
        got, expected = (attrbox.explain(one, x, method, target=1).values for one in (model, single))
        torch.testing.assert_close(got, expected)


def test_a_batch_norm_along_another_axis_than_the_outputs_is_a_layer_of_its_own():
    """BatchNorm1d takes axis 1 of [N, L, C] for channels, a linear layer the last one."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm, self.head = nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(16, 3)
            nn.init.uniform_(self.norm.running_mean, -1, 1)
            nn.init.uniform_(self.norm.weight, -1, 2)

        def forward(self, x):
            return self.head(self.norm(self.layer(x)).relu().flatten(1))

    model, x = seeded(Tokens), images(2, 4, 5)
    maps = attrbox.explain(model, x, "epsilon_plus", target=1, audit=True)
    kinds = [site.operation for site in maps.coverage.conservation.sites]
    assert kinds == ["linear", "batch_norm", "relu", "linear"]
    total = maps.values.flatten(1).sum(1) + maps.coverage.conservation.absorbed[:, 0].sum(1)
    torch.testing.assert_close(total, maps.score)
    positive = AlphaBeta(2.0, 1.0)
    y = model.layer(x).detach()
    got = relevance_of(positive, model.norm, y, images(2, 16, seed=4))
    m, b = matrix(model.norm, (4, 4))
    expected = [by_alpha_beta(2.0, 1.0)(m, b, *row) for row in zip(y.flatten(1), images(2, 16, seed=4), strict=True)]
    torch.testing.assert_close(got.flatten(1), torch.stack(expected), rtol=1e-9, atol=1e-11)


def test_layers_without_a_batch_axis_are_layers():
    """A model that takes its rows one by one."""

    class Rows(nn.Module):
        def __init__(self, loops: bool) -> None:
            super().__init__()
            self.conv, self.up = nn.Conv2d(3, 4, 3, groups=1), nn.ConvTranspose2d(4, 4, 2, groups=2)
            self.fc, self.head, self.loops = nn.Linear(64, 5), nn.Linear(5, 3), loops

        def row(self, x):
            y = self.up(self.conv(x).relu())[..., 1:, 1:].relu()
            return self.head(self.fc(y.flatten(-3)).relu())

        def forward(self, x):
            return torch.stack([self.row(image) for image in x]) if self.loops else self.row(x)

    whole, loops = (seeded(lambda each=each: Rows(each)) for each in (False, True))
    x = images(2, 3, 6, 6)
    for method in sorted({*METHODS} - {"epsilon_gamma_box", "deep_taylor"}):  # where only one layer is the first
        one, two = (attrbox.explain(model, x, method, target=1, audit=True) for model in (whole, loops))
        torch.testing.assert_close(one.values, two.values, msg=method)
        audits = [maps.coverage.conservation for maps in (one, two)]
        for name in ("bias", "stabiliser", "clamp", "constants"):
            sums = [
                getattr(audit, name).flatten(2).sum(-1) if name != "constants" else audit.constants for audit in audits
            ]
            torch.testing.assert_close(*sums, msg=f"{method}: {name}")


@pytest.mark.parametrize("shape", [(7,), (3, 7)])
def test_the_box_of_vectors_is_their_own(shape):
    x, wide = images(3, *shape), 5 * math.prod(shape) // 7
    model = seeded(lambda: nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Flatten(), nn.Linear(wide, 3)))
    whole = attrbox.explain(model, x, "epsilon_gamma_box", target=1).values
    alone = torch.cat([attrbox.explain(model, row[None], "epsilon_gamma_box", target=1).values for row in x])
    torch.testing.assert_close(whole, alone)
    low, high = x[0].amin(-1, keepdim=True).expand(shape), x[0].amax(-1, keepdim=True).expand(shape)
    m, b = matrix(model[0], shape)
    relevance = images(1, len(m), seed=4)
    products = m * x[0].flatten() - pos(m) * low.flatten() - neg(m) * high.flatten()
    got = relevance_of(ZBox(), model[0], x[:1], relevance)
    torch.testing.assert_close(got.flatten(), shared(products, 0 * b, relevance[0], STABILISER))


@pytest.mark.parametrize("turned", [False, True])
def test_a_transposed_convolution_used_past_its_batch_norm(turned):
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.ConvTranspose2d(3, 4, 3) if turned else nn.Conv2d(3, 4, 3)
            self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(4, 3)
            nn.init.uniform_(self.norm.running_mean, -1, 1)

        def forward(self, x):
            y = self.conv(x)
            return self.head((F.relu(self.norm(y)) + F.relu(y)).mean((2, 3)))

    class Twice(Both):
        def forward(self, x):
            return self.head((F.relu(self.norm(self.conv(x))) + F.relu(self.conv(x))).mean((2, 3)))

    x = images(2, 3, 6, 6)
    one, two = (seeded(build) for build in (Both, Twice))
    torch.testing.assert_close(one(x), two(x))
    for method in ("lrp", "epsilon_plus", "epsilon_alpha2_beta1", "excitation_backprop", "attn_lrp"):
        got, expected = (attrbox.explain(model, x, method, target=1).values for model in (one, two))
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("in_place", [True, False])
def test_an_activation_between_a_convolution_and_its_batch_norm_is_not_skipped(in_place):
    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)

        def forward(self, x):
            y = self.conv(x)
            y = F.relu(y, inplace=True) if in_place else F.relu(y)
            return self.head(self.norm(y).mean((2, 3)))

    model, x = seeded(Between), images(2, 3, 6, 6)
    values = attrbox.explain(model, x, "epsilon_plus", target=1, audit=True)
    kinds = [site.operation for site in values.coverage.conservation.sites]
    assert kinds == ["convolution", "relu", "batch_norm", "linear"]
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf)[:, 1].sum(), leaf)
    tape = record(model.requires_grad_(False), x, [Composite()])
    torch.testing.assert_close(tape.replay(tape.output[:, 1], [tape.images])[0], gradient)
    tape = record(model, x, [LRPEpsilon()], twice=True)  # convolutions and batch-norms in one step
    torch.testing.assert_close(tape.replay(tape.output[:, 1], [tape.images])[0], gradient)


def test_composites_share_a_recording_with_other_methods():
    model, x = residual_net(), images(2, 3, 8, 8)
    entries = ["saliency", "epsilon_plus", "deeplift", "guided_backprop", "deep_taylor", "grad_cam"]
    together = attrbox.compare(model, x, entries, target=1)
    for name in entries:
        torch.testing.assert_close(together[name].values, attrbox.explain(model, x, name, target=1).values)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("lrp", {"places": (("first", "epsilon"),)}, "pairs"),
        ("lrp", {"places": (ZPlus(),)}, "pairs"),
        ("epsilon_plus", {"epsilon": 0}, "epsilon"),
        ("epsilon_gamma_box", {"gamma": -1}, "gamma"),
        ("deep_taylor", {"first": "flat"}, "z_box"),
        ("attn_lrp", {"gamma_linear": -0.1}, "gamma_linear"),
        ("epsilon_plus", {"audit": 1}, "audit"),
    ],
)
def test_options_that_do_not_fit(method, options, message):
    with pytest.raises(OptionError, match=message):
        attrbox.explain(relu_net(), images(1, 3, 8, 8), method, **options)
    with pytest.raises(OptionError, match="alpha - beta"):
        AlphaBeta(2.0, 0.5)
    with pytest.raises(OptionError, match="alpha"):
        AlphaBeta(float("nan"), 1.0)


def test_nonzero_keeps_all_but_zeros():
    x = torch.tensor([0.0, -1.0, 2.0])
    assert nonzero(x)[1:].tolist() == [-1.0, 2.0]
    assert 0 < nonzero(x)[0] < 1e-15


def test_places_of_a_composite_may_be_a_mapping():
    first, other = {"first": ZPlus(), "any": Epsilon()}, (("first", ZPlus()), ("any", Epsilon()))
    assert Composite(first) == Composite(other)
    assert Composite(first).places == other
