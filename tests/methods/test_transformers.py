"""Transformers: every method runs and keeps its promises on small ones of each of torchvision's kinds."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from nets import FAST, TRANSFORMERS, images
from snapshots import nothing_changes
from torch import nn

import attrbox
from attrbox.engine.tape import record
from attrbox.errors import OptionError

METHODS = [name for name in attrbox.list_methods() if attrbox.method_registry[name].for_all]
X = images(3, 3, 16, 16)
LEARNED = {"learned", "learned_rank", "learned_clean"}


@pytest.fixture(scope="module", params=TRANSFORMERS)
def named(request):
    return request.param, TRANSFORMERS[request.param]()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_or_says_why_not(named, method):
    model = named[1]
    options = FAST.get(method, {}) | {"progress": False}
    seeds = [7, 8, 9]
    with nothing_changes(model, X):
        maps = attrbox.explain(model, X, method, seed=seeds, **options)
    assert maps.values.isfinite().all()
    assert maps.values.shape in ((3, 3, 16, 16), (3, 1, 16, 16))
    assert maps.coverage.complete
    if method not in LEARNED:  # batch mates
        alone = attrbox.explain(model, X[1:2], method, target=maps.target[1:2], seed=seeds[1:2], **options).values
        torch.testing.assert_close(alone, maps.values[1:2])


def test_learned_rules_lie_at_the_activations_of_the_blocks(named):
    name, model = named
    rules = attrbox.explain(model, X, "learned", iterations=1, progress=False).details["rules"]
    gelus = sum(isinstance(module, nn.GELU) for module in model.modules())
    assert sum(":gelu" in site for site in rules.parameters) == gelus
    if name in ("vit", "swin", "swin_v2"):
        assert len(rules.parameters) == gelus


@pytest.mark.parametrize("baseline", [0.0, images(3, 16, 16, seed=2), images(3, 3, 16, 16, seed=3)])
def test_deeplift_is_complete(named, baseline):
    maps = attrbox.explain(named[1], X, "deeplift", target=[1, 0, 3], baseline=baseline)
    assert maps.relative_gap.max() < 1e-10


def test_deeplift_on_black_and_other_constant_images(named):
    # At a constant image a norm's deviation is next to nothing: the multipliers must stay bounded.
    for value in (0.0, 1.0):
        maps = attrbox.explain(named[1], X, "deeplift", target=1, baseline=value)
        assert maps.values.abs().max() < 1e3 * maps.score.abs().max()


def test_several_targets_at_once(named):
    maps = attrbox.explain(named[1], X, "deeplift", target=attrbox.classes([3, 1]))
    torch.testing.assert_close(maps.values[:, 1], attrbox.explain(named[1], X, "deeplift", target=1).values)


# ---------------------------------------------------------------------------------------------- class activation maps

# What the last feature map is, as a named layer, and its grid.
MAPS = {
    "vit": ("encoder.layers.encoder_layer_1.ln_1", (4, 4), 1),
    "swin": ("norm", (4, 4), None),
    "swin_v2": ("norm", (4, 4), None),
    "maxvit": ("blocks.1", (2, 2), None),
    "convnext": ("features", (2, 2), None),
}


def test_the_last_feature_map_and_its_grid_are_found(named):
    name, model = named
    layer, size, prefix = MAPS[name]
    model.requires_grad_(False)
    tape = record(model, X, layers=[None])
    assert (tape.grids[None].size, tape.grids[None].prefix) == (size, prefix)
    spatial = tape.grids[None].spatial(tape.feature_maps[None])
    assert spatial.shape[2:] == size
    for method in ("grad_cam", "grad_cam_plus_plus", "layer_cam"):
        found = attrbox.explain(model, X, method, relu=False, target=1).values
        assert found.abs().amax((1, 2, 3)).min() > 0
        torch.testing.assert_close(found, attrbox.explain(model, X, method, relu=False, target=1, layer=layer).values)
        beside = attrbox.compare(model, X, ["deeplift", (method, {"relu": False})], target=1)[method].values
        torch.testing.assert_close(beside, found)  # with attention decomposed


def test_grad_cam_of_a_vit_by_hand():
    model = TRANSFORMERS["vit"]()
    kept = {}
    block = model.encoder.layers.encoder_layer_1.ln_1
    hook = block.register_forward_hook(lambda module, args, output: kept.update(features=output))
    score = model(X)[:, 1]
    hook.remove()
    (gradient,) = torch.autograd.grad(score.sum(), kept["features"])
    features, gradient = (t[:, 1:].transpose(1, 2).reshape(3, -1, 4, 4) for t in (kept["features"].detach(), gradient))
    expected = (gradient.mean((2, 3), keepdim=True) * features).sum(1, keepdim=True).relu()
    expected = F.interpolate(expected, size=(16, 16), mode="bilinear")
    torch.testing.assert_close(attrbox.explain(model, X, "grad_cam", target=1).values, expected)


def test_cam_of_published_numbers():
    # A = (x, 2 x) of x = [[1, 2], [0, 3]], score mean(A_1) + mean(A_2) or mean(A_1) - mean(A_2).
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 1, bias=False)
            self.conv.weight.data[:] = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1)

        def forward(self, x):
            first, second = self.conv(x).mean((2, 3)).unbind(1)
            return torch.stack([first + second, first - second], 1)

    model, x = Two().double().eval(), torch.tensor([[[[1.0, 2.0], [0.0, 3.0]]]], dtype=torch.float64)
    sums, differences = (
        {
            m: attrbox.explain(model, x, m, target=t).values[0, 0]
            for m in ("grad_cam", "grad_cam_plus_plus", "layer_cam")
        }
        for t in (0, 1)
    )
    torch.testing.assert_close(sums["grad_cam"], 0.75 * x[0, 0])
    torch.testing.assert_close(sums["grad_cam_plus_plus"], (1 / 3.5 + 2 * 1 / 5) * x[0, 0])
    torch.testing.assert_close(sums["layer_cam"], 0.75 * x[0, 0])
    assert (differences["grad_cam"] == 0).all()
    torch.testing.assert_close(differences["layer_cam"], 0.25 * x[0, 0])


# ------------------------------------------------------------------------------------------------------------ rollout


class Tokens(nn.Module):
    """A class token and a 2 x 2 grid; `layers` of attention with given weights [5, 5] between the values."""

    def __init__(self, layers: int, weights: torch.Tensor):
        super().__init__()
        self.embed = nn.Conv2d(1, 2, 2, 2).double()
        self.scores = weights.log()
        self.layers = layers

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([x.mean(1, keepdim=True), x], 1)
        for _ in range(self.layers):
            scores = self.scores + 0 * x.sum((1, 2), keepdim=True)
            x = x + scores.softmax(-1) @ x
        return x[:, 0]


def test_rollout_of_uniform_attention():
    # Off the diagonal (1 - 2^-L) / N.
    uniform = torch.full((5, 5), 0.2, dtype=torch.float64)
    maps = attrbox.explain(Tokens(3, uniform).eval(), images(2, 1, 4, 4), "attention_rollout", interpolation="nearest")
    torch.testing.assert_close(maps.values, torch.full((2, 1, 4, 4), (1 - 2**-3) / 5, dtype=torch.float64))


def test_rollouts_by_hand():
    weights = images(5, 5, seed=4).softmax(-1)
    model, x = Tokens(2, weights).eval(), images(2, 1, 4, 4)
    eye = torch.eye(5, dtype=torch.float64)
    row = torch.linalg.matrix_power((weights + eye) / 2, 2)[0, 1:].view(1, 1, 2, 2)
    got = attrbox.explain(model, x, "attention_rollout", interpolation="nearest").values
    torch.testing.assert_close(got, F.interpolate(row, size=(4, 4)).expand(2, 1, 4, 4))
    # The gradients by hand: y = x + A x, z = y + A y, the score is z[0, c].
    start = model.embed(x).flatten(2).transpose(1, 2)
    start = torch.cat([start.mean(1, keepdim=True), start], 1).detach()
    first, second = (weights.expand(2, 5, 5).clone().requires_grad_() for _ in range(2))
    middle = start + first @ start
    gradients = torch.autograd.grad((middle + second @ middle)[:, 0, 1].sum(), (first, second))
    steps = [(weights * gradient).relu() + eye for gradient in gradients]
    expected = (steps[1] @ steps[0])[:, 0, 1:].view(2, 1, 2, 2)
    got = attrbox.explain(model, x, "gradient_rollout", target=1, interpolation="nearest").values
    torch.testing.assert_close(got, F.interpolate(expected, size=(4, 4)))


@pytest.mark.parametrize("method", ["attention_rollout", "gradient_rollout"])
def test_rollout_is_refused_where_attention_is_not_among_all_tokens(named, method):
    name, model = named
    if name == "vit":
        several = attrbox.explain(model, X, method, target=attrbox.classes([1, 2])).values
        assert several.isfinite().all()
        assert (several >= 0).all()
        assert torch.equal(several[:, 0], several[:, 1]) == (method == "attention_rollout")
        torch.testing.assert_close(attrbox.explain(model, X[1:2], method, target=2).values, several[1:2, 1])
    else:
        with pytest.raises(OptionError, match="Attention rollout needs a model with attention"):
            attrbox.explain(model, X, method)


def test_rollout_is_refused_on_convolutional_networks():
    with torch.random.fork_rng(devices=[]):
        model = torchvision.models.squeezenet1_1(weights=None).eval()
    with pytest.raises(OptionError, match="no softmax"):
        attrbox.explain(model, images(1, 3, 32, 32, dtype=torch.float32), "attention_rollout")
