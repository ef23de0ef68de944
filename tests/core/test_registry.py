"""Registries, user-made rules and methods, and plug-ins."""

import importlib.metadata
from dataclasses import dataclass

import pytest
import torch
from nets import images, relu_net
from torch import nn

import attrbox
from attrbox.core.registry import Registry
from attrbox.errors import DuplicateNameError, OptionError, PluginWarning, RuleError, UnknownNameError
from attrbox.methods.base import MethodSpec

X = images(2, 3, 8, 8)


@pytest.fixture
def clean():
    """Takes out again what a test registers."""
    before = set(attrbox.method_registry), set(attrbox.rule_registry)
    yield
    for name in set(attrbox.method_registry) - before[0]:
        attrbox.method_registry.remove(name)
    for name in set(attrbox.rule_registry) - before[1]:
        attrbox.rule_registry.remove(name)


def test_the_names_of_the_design():
    expected = (
        "saliency gradient_x_input guided_backprop deconvnet deeplift lrp_epsilon integrated_gradients smoothgrad "
        "squared_smoothgrad vargrad grad_cam guided_grad_cam random"
    )
    assert set(expected.split()) <= set(attrbox.list_methods())


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        *[("GradXIn", "gradient_x_input"), ("e-LRP", "lrp_epsilon"), ("IG", "integrated_gradients")],
        *[("SG", "smoothgrad"), ("SQ_SG", "squared_smoothgrad"), ("GCAM", "grad_cam"), ("Saliency", "saliency")],
    ],
)
def test_aliases(alias, name):
    assert attrbox.method_registry[alias].name == name
    assert alias in attrbox.method_registry


@pytest.mark.parametrize(
    ("wrong", "near"), [("gradcam_", "grad_cam"), ("DeepLIFTT", "deeplift"), ("salency", "saliency")]
)
def test_near_misses(wrong, near):
    with pytest.raises(UnknownNameError, match=f"Did you mean .*'{near}'"):
        attrbox.explain(relu_net(), X, wrong)
    with pytest.raises(LookupError):
        attrbox.method_registry[wrong]
    assert wrong not in attrbox.method_registry
    assert 3 not in attrbox.method_registry


def test_a_rule_is_at_once_a_method(clean):
    @attrbox.register_rule("absolute", summary="Absolute gradients all the way", reference="none")
    class Absolute(attrbox.Rule):
        def propagate(self, site, grad_output):
            return grad_output.abs() * site.derivative()

    model = relu_net()
    values = attrbox.explain(model, X, "absolute", target=1, progress=False).values
    bare = attrbox.explain(model, X, "absolute", target=1, times_input=False, progress=False).values
    torch.testing.assert_close(values, bare * X)
    # By hand: the same backward pass, with absolute values at the two ReLUs of the head and the two before.
    conv1, _, conv2, _, _, flatten, fc1, _, fc2 = model
    z1 = conv1(X)
    z2 = conv2(z1.relu())
    z3 = fc1(flatten(z2.relu()))
    grad = (fc2.weight[1].abs() * (z3 > 0)) @ fc1.weight
    grad = grad.view_as(z2).abs() * (z2 > 0)
    grad = torch.nn.grad.conv2d_input(z1.shape, conv2.weight, grad, stride=2, padding=1).abs() * (z1 > 0)
    torch.testing.assert_close(bare, torch.nn.grad.conv2d_input(X.shape, conv1.weight, grad, padding=1))
    assert "absolute" in attrbox.list_methods()


def test_a_rule_with_options_and_a_reference(clean):
    @attrbox.register_rule("shift", summary="The change of the output", reference="none", help={"factor": "a factor"})
    @dataclass(frozen=True)
    class Shift(attrbox.Rule):
        factor: float = 2.0
        needs = frozenset({"input", "reference"})

        def propagate(self, site, grad_output):
            return self.factor * grad_output * (site.output - site.reference_output)

    one, two = (attrbox.explain(relu_net(), X, "shift", factor=f, progress=False).values for f in (1.0, 2.0))
    torch.testing.assert_close(two, one * 2**3)  # three ReLUs
    far = attrbox.explain(relu_net(), X, "shift", baseline=1.0, progress=False)
    assert not torch.equal(far.values, two)
    assert far.options == {"factor": 2.0, "baseline": 1.0, "times_input": True, "absolute": False}


def test_a_method_of_ones_own(clean):
    @attrbox.register_method("grad_power", summary="A power of the gradient", reference="none", aliases=("GP",))
    @dataclass(frozen=True, kw_only=True)
    class GradPower(attrbox.Method):
        power: int = attrbox.option(3, "exponent")
        rules = (None,)

        def attribute(self, run):
            return run.gradient() ** self.power

    gradient = attrbox.explain(relu_net(), X, "saliency", absolute=False, progress=False).values
    torch.testing.assert_close(attrbox.explain(relu_net(), X, "GP", progress=False).values, gradient**3)
    torch.testing.assert_close(attrbox.explain(relu_net(), X, "GP", power=2, progress=False).values, gradient**2)


def test_names_are_taken_once(clean):
    for name, aliases in (("saliency", ()), ("new", ("IG",)), ("GCAM", ())):
        with pytest.raises(DuplicateNameError, match="already taken"):
            attrbox.register_method(name, summary="s", reference="r", aliases=aliases)(type("M", (attrbox.Method,), {}))
    rule = type("R", (attrbox.Rule,), {"propagate": lambda self, site, grad: grad})
    with pytest.raises(DuplicateNameError):
        attrbox.register_rule("saliency", summary="s", reference="r")(rule)
    assert "saliency" not in attrbox.rule_registry  # nothing half-registered
    assert "new" not in attrbox.method_registry


@pytest.mark.parametrize(
    ("attributes", "message"),
    [({"kinds": frozenset({"rleu"})}, "kinds .*rleu"), ({"needs": frozenset({"inputs"})}, "needs .*inputs")],
)
def test_misdeclared_rules(attributes, message, clean):
    rule = type("R", (attrbox.Rule,), {"propagate": lambda self, site, grad: grad} | attributes)
    with pytest.raises(OptionError, match=message):
        attrbox.register_rule("wrong", summary="s", reference="r")(rule)
    with pytest.raises(OptionError, match="subclass"):
        attrbox.register_rule("wrong", summary="s", reference="r")(nn.ReLU)


@pytest.mark.parametrize(
    ("propagate", "message"),
    [
        (lambda self, site, grad: grad * site.input, "needs = frozenset"),
        (lambda self, site, grad: grad * site.reference_input, "reads the reference"),
        (lambda self, site, grad: grad.sum(), "input's shape"),
        (lambda self, site, grad: grad[:1], "input's shape"),
        (lambda self, site, grad: None, "1 gradient tensor"),
        (lambda self, site, grad: (grad, grad), "1 gradient tensor"),
    ],
)
def test_rules_that_break_their_contract(propagate, message, clean):
    rule = type("Broken", (attrbox.Rule,), {"propagate": propagate})
    attrbox.register_rule("broken", summary="s", reference="r")(rule)
    with pytest.raises(RuleError, match=message) as caught:
        attrbox.explain(relu_net(), X, "broken", progress=False)
    assert "Broken" in str(caught.value)  # names the rule,
    assert "relu in module" in str(caught.value)  # and the site


def test_derivatives_that_do_not_exist(clean):
    rule = type(
        "Pool",
        (attrbox.Rule,),
        {"kinds": frozenset({"max_pool"}), "propagate": lambda self, site, grad: site.derivative()},
    )
    attrbox.register_rule("pool", summary="s", reference="r")(rule)
    with pytest.raises(RuleError, match="true_gradient"):
        attrbox.explain(relu_net(pool=True), X, "pool", progress=False)


# -------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("integrated_gradients", {"step": 3}, "no option 'step'. Did you mean 'steps'"),
        ("saliency", {"sigma": 3}, "no option 'sigma'"),
        ("integrated_gradients", {"steps": 0}, "steps"),
        ("integrated_gradients", {"steps": 2.5}, "steps"),
        ("integrated_gradients", {"steps": True}, "steps"),
        ("integrated_gradients", {"quadrature": "simpson"}, "'midpoint'"),
        ("integrated_gradients", {"baseline": "black"}, "baseline"),
        ("integrated_gradients", {"baseline": float("nan")}, "baseline"),
        ("smoothgrad", {"n_samples": -1}, "n_samples"),
        ("smoothgrad", {"noise_fraction": -0.1}, "noise_fraction"),
        ("smoothgrad", {"noise_fraction": float("inf")}, "noise_fraction"),
        ("smoothgrad", {"absolute": 1}, "True or False"),
        ("lrp_epsilon", {"epsilon": 0}, "epsilon to be a number > 0"),
        ("lrp_epsilon", {"epsilon": "tiny"}, "epsilon to be a number > 0"),
        ("deeplift", {"times_input": "yes"}, "True or False"),
        ("grad_cam", {"layer": 3}, "layer"),
        ("grad_cam", {"interpolation": "cubic"}, "'nearest'"),
        ("grad_cam", {"relu": None}, "True or False"),
    ],
)
def test_wrong_options(method, options, message):
    with pytest.raises(OptionError, match=message):
        attrbox.explain(relu_net(), X, method, progress=False, **options)
    with pytest.raises(OptionError, match=message):
        attrbox.compare(relu_net(), X, [(method, options)], progress=False)


# ------------------------------------------------------------------------------------------------------- plug-ins


class FakeEntryPoint:
    value = "somewhere:Something"

    def __init__(self, name, loaded):
        self.name, self.loaded = name, loaded

    def load(self):
        if isinstance(self.loaded, Exception):
            raise self.loaded
        return self.loaded


@pytest.fixture
def plug(monkeypatch, clean):
    """Pretends that a package is installed which names these objects."""

    def plug(group, name, loaded):
        points = {group: [FakeEntryPoint(name, loaded)]}
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points.get(group, []))
        for registry in (attrbox.method_registry, attrbox.rule_registry):
            monkeypatch.setattr(registry, "_plugins_loaded", False)

    return plug


def test_a_rule_from_another_package(plug):
    class Half(attrbox.Rule):
        """Half of the gradient at every activation."""

        def propagate(self, site, grad_output):
            return site.true_gradient(grad_output) / 2

    plug("attrbox.rules", "half", Half)
    assert attrbox.method_registry["half"].summary == "Half of the gradient at every activation."
    half = attrbox.explain(relu_net(), X, "half", progress=False).values
    torch.testing.assert_close(half, attrbox.explain(relu_net(), X, "gradient_x_input", progress=False).values / 8)


def test_a_method_from_another_package(plug):
    @dataclass(frozen=True, kw_only=True)
    class Twice(attrbox.Method):
        """Twice the image."""

        def attribute(self, run):
            return 2 * run.images.unsqueeze(1)

    plug("attrbox.methods", "twice", Twice)
    assert "twice" in attrbox.list_methods()
    torch.testing.assert_close(attrbox.explain(relu_net(), X, "twice", progress=False).values, 2 * X)


@pytest.mark.parametrize("loaded", [ImportError("no such module"), nn.ReLU, "not a class"])
def test_a_broken_package_is_left_out_aloud(plug, loaded):
    plug("attrbox.rules", "broken_plugin", loaded)
    with pytest.warns(PluginWarning, match="broken_plugin"):
        names = attrbox.list_methods()
    assert "saliency" in names
    assert "broken_plugin" not in names


def test_registries_are_mappings():
    registry: Registry[MethodSpec] = Registry("thing", "attrbox.nothing")
    assert len(registry) == 0
    with pytest.raises(UnknownNameError, match="Known: none"):
        registry["x"]
    assert len(attrbox.method_registry) == len(attrbox.list_methods())
    assert "saliency" in repr(attrbox.method_registry)
