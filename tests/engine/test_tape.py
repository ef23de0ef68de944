"""The tape: what is seen, what is kept, what is left as the model meant it."""

import gc
import threading
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from nets import (
    five_ways,
    images,
    relu_net,
    residual_net,
    seeded,
    sequence_net,
    smooth_net,
    squeeze_excitation_net,
    vector_net,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import attrbox
from attrbox.core.model_state import untouched
from attrbox.engine import site_function
from attrbox.engine.site import ACTIVATIONS, KINDS, Rule
from attrbox.engine.tape import record
from attrbox.errors import ForwardError, ModelError, OptionError, RuleError, UnsupportedModelError
from attrbox.rules.deeplift import DeepLift
from attrbox.rules.guided import GuidedBackprop
from attrbox.rules.lrp.activations import LRPEpsilon

ALL_RULES = (GuidedBackprop(), LRPEpsilon(), DeepLift())
X = images(3, 3, 8, 8)


class Net(nn.Module):
    """A convolution, then whatever a test wants, then a linear layer."""

    def __init__(self, middle) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.conv(x)).mean((2, 3)))


def net(middle) -> nn.Module:
    return seeded(lambda: Net(middle))


def native(model: nn.Module, x: Tensor, target: int = 0) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(model(leaf)[:, target].sum(), leaf)[0]


def replayed(
    model: nn.Module, x: Tensor, rule: Rule | None, reference: Tensor | None = None, rules=ALL_RULES
) -> Tensor:
    with untouched(model):
        tape = record(model, x, rules)
        there = None if reference is None else tape.record_reference(reference)
        return tape.replay(tape.output[:, 0], [tape.images], rule, reference=there)[0]


# ------------------------------------------------------------------------------------- operations that write in place


def overwritten_input(x):
    """The input of an out-of-place ReLU, written over behind it; autograd's own formula reads the output only."""
    y = F.relu(x)
    x += 1
    return y + x


def overwritten_output(x):
    """The output of a GELU, written over behind it; autograd's own formula reads the input only."""
    y = F.gelu(x)
    y += x
    return y * 2


def overwritten_in_place(x):
    """An in-place hardtanh whose result is written over."""
    y = F.hardtanh(x * 1.0, inplace=True)
    y *= 3
    return y


def on_a_view(x):
    """An in-place ReLU on half of the channels: the whole must change."""
    x = x * 1.0
    x[:, :2].relu_()
    return x


def result_dropped(x):
    F.relu(x, inplace=True)
    return x


def in_place_product(x):
    gate = torch.sigmoid(x)
    x = x * 1.0
    x *= gate
    return x


def product_overwritten(x):
    """A factor of a product that is written over behind it, so that natively only the other one is differentiable."""
    y = torch.tanh(x)
    z = y * x.detach()
    y = y + z
    y.add_(1)
    return y


MIDDLES = [
    *(overwritten_input, overwritten_output, overwritten_in_place, on_a_view, result_dropped, in_place_product),
    product_overwritten,
]


@pytest.mark.parametrize("middle", MIDDLES)
def test_in_place_operations_keep_their_meaning(middle):
    model = net(middle)
    with untouched(model):
        tape = record(model, X, ALL_RULES)
        assert torch.equal(tape.output, model(X))
        for _ in range(2):  # a replay consumes nothing
            torch.testing.assert_close(tape.replay(tape.output[:, 0], [tape.images])[0], native(model, X))
    assert replayed(model, X, GuidedBackprop()).isfinite().all()


@pytest.mark.parametrize("middle", [m for m in MIDDLES if m is not product_overwritten])
@pytest.mark.parametrize("reference", ["shared", "per sample"])
def test_deeplift_is_complete_whatever_is_written_over(middle, reference):
    model = net(middle)
    start = images(1, 3, 8, 8, seed=5) if reference == "shared" else images(3, 3, 8, 8, seed=5)
    values = replayed(model, X, DeepLift(), start) * (X - start)
    with torch.no_grad():
        expected = (model(X.clone()) - model(start.clone()))[:, 0]
    torch.testing.assert_close(values.sum((1, 2, 3)), expected.expand(3), rtol=1e-9, atol=1e-12)


def test_the_first_operation_may_write_into_the_input():
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(192, 2)).double().eval()
    x = X.clone()
    values = attrbox.explain(model, x, "gradient_x_input", target=0, progress=False).values
    assert torch.equal(x, X)
    gradient = model[2].weight[0].view(1, 3, 8, 8) * (X > 0)
    torch.testing.assert_close(values, X * gradient)  # x is the image, not what the model made of it


# ------------------------------------------------------------------------------------------------------ what is seen


def test_sites_know_kind_module_and_call():
    ways = five_ways()
    with untouched(ways["reused"]) as model:
        tape = record(model, images(2, 3, 12, 12), ALL_RULES)
    seen = [(site.kind, site.module, site.call) for site in tape.sites]
    relus = [("relu", "the_relu", call) for call in range(4)]
    assert seen == [*relus[:2], ("max_pool", "", 0), *relus[2:]]
    assert [site.index for site in tape.sites] == list(range(5))


def test_modules_called_again_inside_each_other():
    model = residual_net()
    with untouched(model):
        tape = record(model, X, ALL_RULES)
    assert [(site.module, site.call) for site in tape.sites] == [("relu", call) for call in range(5)]


def test_another_model_in_another_thread_is_not_mixed_in():
    model, other = relu_net(), squeeze_excitation_net()
    ready, done = threading.Event(), threading.Event()

    class Waiting(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            ready.set()
            assert done.wait(20)
            return self.inner(x)

    def elsewhere():
        assert ready.wait(20)
        model(X)  # even the same modules
        other(X)
        done.set()

    thread = threading.Thread(target=elsewhere)
    thread.start()
    waiting = Waiting().eval()
    with untouched(waiting):
        tape = record(waiting, X, ALL_RULES)
    thread.join()
    assert [(site.module, site.call) for site in tape.sites] == [("inner.1", 0), ("inner.3", 0), ("inner.7", 0)]


def deprecated(x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.addcmul(x, 0.5, x, x)  # a number where the first factor is now


@pytest.mark.parametrize(
    ("middle", "unknown"),
    [
        (deprecated, ["addcmul"]),
        (lambda x: x.atan().sinh(), ["atan", "sinh"]),
        (lambda x: x.sort(2)[0], ["sort"]),
        (lambda x: (x * x + 1) ** x, ["pow"]),
        (lambda x: torch.matrix_power(x, 2), ["matrix_power"]),
        (
            lambda x: F.grid_sample(x.detach() * 0 + 1, x[:, :2].permute(0, 2, 3, 1), align_corners=False),
            ["detach", "grid_sample"],
        ),
        (lambda x: torch.linalg.vector_norm(x, 3, 1, True) * torch.ones_like(x), ["linalg_vector_norm"]),
        (lambda x: x * (x > 0), ["gt"]),
        (lambda x: torch.where(x > 0, x, 0.1 * x), ["gt"]),
        (lambda x: F.dropout(x, 0.5, training=True), ["dropout"]),
        (lambda x: x * x.max(), ["max"]),
        # linear, whatever they look like
        (lambda x: (2 * x + 1 - x / 3).flip(2).roll(1, 3)[:, :, 1:].contiguous(), []),
        (lambda x: torch.cat([x, -x], 1).chunk(2, 1)[0] @ torch.ones(8, 8, dtype=x.dtype), []),
        (lambda x: F.interpolate(F.avg_pool2d(F.pad(x, (1, 1, 1, 1)), 2), scale_factor=2.0).transpose(2, 3), []),
        (lambda x: F.dropout(x, 0.5, training=False), []),
        (lambda x: F.grid_sample(x, torch.zeros(3, 8, 8, 2, dtype=x.dtype), align_corners=False), []),
        (lambda x: torch.lerp(x, -x, 0.3).addcmul(x, torch.ones_like(x), value=2).addcdiv(x, torch.ones_like(x)), []),
        (lambda x: x.view(3, 4, -1).permute(0, 2, 1).reshape(3, 8, 8, 4).permute(0, 3, 1, 2), []),
    ],
)
def test_what_is_not_understood_is_named(middle, unknown):
    model = net(middle)
    with untouched(model):
        tape = record(model, X, ALL_RULES)
    assert [operated.operation for operated in tape.unknown] == unknown
    coverage = tape.coverage(DeepLift())
    assert coverage.complete == (not unknown)
    assert ("UNKNOWN" in str(coverage)) == bool(unknown)


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d(4, track_running_stats=False), lambda x: F.batch_norm(x, None, None, training=True)]
)
def test_statistics_of_the_batch_are_refused_under_rules(norm):
    model = net(norm).double().eval()
    with pytest.raises(UnsupportedModelError, match="statistics from the batch"):
        attrbox.explain(model, X, "deeplift", target=1)
    assert attrbox.explain(model, X, "saliency", target=1).values.isfinite().all()
    assert attrbox.explain(model, X, "grad_cam", target=1).values.isfinite().all()


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


def test_autograd_functions_of_the_models_own_are_named():
    model = net(lambda x: Square.apply(F.relu(x)))
    with untouched(model):
        tape = record(model, X, ALL_RULES)
        assert [operated.operation for operated in tape.unknown] == ["Square"]
        torch.testing.assert_close(tape.replay(tape.output[:, 0], [tape.images])[0], native(model, X))


def test_rules_apply_to_their_kinds_only_and_share_one_recording():
    model = squeeze_excitation_net()
    alone = replayed(model, X, GuidedBackprop(), rules=[GuidedBackprop()])
    torch.testing.assert_close(replayed(model, X, GuidedBackprop()), alone)
    torch.testing.assert_close(replayed(model, X, None), native(model, X))
    with untouched(model):
        tape = record(model, X, [GuidedBackprop()])
        assert {site.kind for site in tape.sites} == {"relu"}
        assert [operated.operation for operated in tape.passed] == ["sigmoid", "product", "tanh"]


def test_kinds():
    assert ACTIVATIONS < KINDS
    assert {"softmax", "max_pool", "product", "matmul", "norm", "quotient", "power"} <= KINDS


# -------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize(
    ("build", "state"),
    [
        (lambda: torch.jit.trace(relu_net(), X), "scripted"),
        (lambda: torch.compile(relu_net()), "compiled"),
        (lambda: nn.DataParallel(relu_net()), "DataParallel"),
        (lambda: nn.Sequential(torch.compile(relu_net())).eval(), "module '0' is compiled"),
    ],
)
def test_models_that_hide_their_operations(build, state):
    for method in ("guided_backprop", "deeplift", "grad_cam"):
        with pytest.raises(UnsupportedModelError, match=f"(?i){state}"):
            attrbox.explain(build(), X, method, progress=False)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_plain_gradients_of_a_traced_model():
    model = torch.jit.trace(relu_net(), X)
    for method in ("saliency", "integrated_gradients", "smoothgrad"):
        values = attrbox.explain(model, X, method, batch_size=3, progress=False).values
        torch.testing.assert_close(values, attrbox.explain(relu_net(), X, method, progress=False).values)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", ["guided_backprop", "deeplift", "lrp_epsilon", "saliency"])
def test_checkpointing_is_refused_or_right(method, reentrant):
    """Rules would get what the second run saves, without a rule: as many tensors, but other ones."""
    model = net(lambda x: checkpoint(lambda y: F.relu(y) * 2, x, use_reentrant=reentrant))
    if method == "saliency" and not reentrant:
        plain = net(lambda x: F.relu(x) * 2)
        values = [attrbox.explain(m, X, method, target=0, progress=False).values for m in (model, plain)]
        torch.testing.assert_close(*values)
        return
    with pytest.raises(UnsupportedModelError, match="checkpointing"):
        attrbox.explain(model, X, method, target=0, progress=False)


def test_control_flow_that_depends_on_the_input():
    model = net(lambda x: F.relu(x) if x.abs().mean() > 50 else F.relu(F.relu(x)))
    with pytest.raises(ModelError, match="control flow"):
        attrbox.explain(model, X, "deeplift", baseline=1000.0, progress=False)


@pytest.mark.parametrize(
    "middle", [lambda x: x.detach(), lambda x: torch.ones_like(x), lambda x: torch.tensor(x.detach().numpy())]
)
@pytest.mark.parametrize("method", [n for n in attrbox.list_methods() if attrbox.method_registry[n].for_all])
def test_output_that_does_not_depend_on_the_images(middle, method):
    if not attrbox.method_registry[method].create({}).needs_gradients:
        pytest.skip("asks the model for no gradient")
    with pytest.raises((ModelError, OptionError), match=r"depend|gradient path|no spatial|between two layers"):
        attrbox.explain(net(middle), X, method, progress=False)


def test_errors_of_the_model_say_where_and_keep_their_cause():
    model = net(lambda x: x.view(7, 7))
    with pytest.raises(ForwardError, match=r"RuntimeError on images of shape \[3, 3, 8, 8\], torch.float64") as caught:
        attrbox.explain(model, X, "deeplift", progress=False)
    assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(ForwardError, match="float32"):  # another dtype than the model's
        attrbox.explain(relu_net(), X.float(), "saliency", progress=False)


def test_a_reference_rule_needs_a_reference():
    model = relu_net()
    with untouched(model):
        tape = record(model, X, [DeepLift()])
        with pytest.raises(RuleError, match="reference"):
            tape.replay(tape.output[:, 0], [tape.images], DeepLift())


# ----------------------------------------------------------------------------------------------------- feature maps


class TwoStages(nn.Module):
    """Two convolutions, the second behind a pool; its output goes through a norm, a sum and an in-place ReLU."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.relu = nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.squeeze = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.first(x)), 2)
        self.before = x
        x = self.relu(self.norm(self.second(x)) + x)
        self.last = x.detach().clone()
        x = x * self.squeeze(F.adaptive_avg_pool2d(x, 1)).sigmoid()  # 1 x 1 maps are not spatial
        self.scaled = x.detach().clone()
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def test_the_last_feature_map_is_found():
    model = seeded(TwoStages)
    with untouched(model):
        tape = record(model, X, layers=[None, "first", "second", "norm", "relu"])
    maps = tape.feature_maps
    assert torch.equal(maps[None], model.scaled)
    assert torch.equal(maps["relu"], model.last)
    assert torch.equal(maps["first"], model.first(X))
    # norm's output is written over by the in-place ReLU's sum: what is kept is what the layer returned
    assert torch.equal(maps["norm"], model.norm(model.second(model.before)))
    assert maps["second"].shape == (3, 4, 4, 4)


def test_a_named_layer_before_an_in_place_relu():
    """The map of a convolution whose output is written over: peers show the ReLU's map with the wrong gradient."""
    in_place, plain = five_ways()["in place"], five_ways()["modules"]
    x = images(2, 3, 12, 12)
    for layer in ("conv1", "conv3"):
        values = [
            attrbox.explain(model, x, "grad_cam", layer=layer, relu=False, target=1, progress=False).values
            for model in (in_place, plain)
        ]
        torch.testing.assert_close(*values)


@pytest.mark.parametrize(
    ("layer", "message"),
    [("conv9", "no layer 'conv9'. Did you mean"), ("fc1", "must return a feature map"), ("relus", "did not run")],
)
def test_wrong_layers(layer, message):
    with pytest.raises(OptionError, match=message):
        attrbox.explain(five_ways()["modules"], images(2, 3, 12, 12), "grad_cam", layer=layer, progress=False)


# ----------------------------------------------------------------------------------------------------------- memory


def test_nothing_survives_a_call():
    """No cycle keeps activations alive: they are gone with the last reference, without the garbage collector."""
    alive: list[weakref.ref] = []

    def watched(x):
        y = F.relu(x)
        alive.append(weakref.ref(y))
        return y

    model = net(watched)
    gc.collect()
    gc.disable()
    try:
        attrbox.compare(model, X, ["guided_backprop", "deeplift", "lrp_epsilon", "grad_cam"], progress=False)
        assert alive
        assert [ref for ref in alive if ref() is not None] == []
    finally:
        gc.enable()


def test_only_what_rules_need_is_kept():
    """Guided backpropagation on in-place ReLUs keeps no more than autograd itself does."""
    model = five_ways()["in place"]
    from attrbox.core.memory import SavedBytes

    x = images(4, 3, 12, 12)
    totals = {}
    for name, rules in {"native": [], "guided": [GuidedBackprop()], "deeplift": [DeepLift()]}.items():
        with untouched(model), SavedBytes() as saved:
            record(model, x, rules)
        totals[name] = saved.total
    assert totals["guided"] == totals["native"]
    assert totals["deeplift"] > totals["native"]


class Watched(LRPEpsilon):
    """Notes how many rows it is asked for at a time."""

    def propagate(self, site, grad_output):
        asked.append(len(grad_output))
        return super().propagate(site, grad_output)


asked: list[int] = []


@pytest.mark.parametrize("method", ["deeplift", "lrp_epsilon"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("build", [residual_net, squeeze_excitation_net, smooth_net, sequence_net, vector_net])
def test_large_activations_are_taken_by_rows_with_the_same_result(monkeypatch, method, shared, build):
    model = build()
    shape = {vector_net: (7,), sequence_net: (3, 16)}.get(build, (3, 8, 8))
    x = images(5, *shape)
    options = {} if method == "lrp_epsilon" else {"baseline": 0.1 if shared else images(5, *shape, seed=1)}
    whole = attrbox.explain(model, x, method, **options).values
    monkeypatch.setattr(site_function, "_BYTES_AT_ONCE", 1)
    torch.testing.assert_close(attrbox.explain(model, x, method, **options).values, whole, rtol=1e-12, atol=1e-13)
    channels_last = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
    torch.testing.assert_close(attrbox.explain(model, channels_last, method, **options).values, whole)


def test_rows_are_a_matter_of_size_and_of_the_rule(monkeypatch):
    x = images(4, 3, 8, 8)

    def rows(rule: Rule) -> set[int]:
        asked.clear()
        with untouched(model := relu_net()):
            tape = record(model, x, [rule])
            tape.replay(tape.output[:, 0], [tape.images], rule)
        return set(asked)

    assert rows(Watched()) == {4}
    monkeypatch.setattr(site_function, "_BYTES_AT_ONCE", 1)
    assert rows(Watched()) == {1}
    monkeypatch.setattr(Watched, "by_rows", False)
    assert rows(Watched()) == {4}


def test_a_broken_rule_is_told_also_by_rows(monkeypatch):
    monkeypatch.setattr(site_function, "_BYTES_AT_ONCE", 1)
    monkeypatch.setattr(Watched, "propagate", lambda self, site, grad: grad[..., :1])
    with untouched(model := relu_net()):
        tape = record(model, images(4, 3, 8, 8), [Watched()])
        with pytest.raises(RuleError, match="input's shape"):
            tape.replay(tape.output[:, 0], [tape.images], Watched())
