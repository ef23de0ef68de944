"""Classes that are registered: what is certain is made to work, the rest is refused with the reason, and nothing is
half registered."""

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from nets import images, relu_net
from torch import nn

import attrbox
from attrbox.errors import DuplicateNameError, OptionError
from attrbox.methods.masking.generators import MaskGenerator, masks
from attrbox.metrics.base import Measurement
from attrbox.rules.learned import Plugin, plugins

X = images(2, 3, 8, 8)
ABOUT = {"summary": "s", "reference": "r"}


class Kind:
    """A kind of classes that can be registered."""

    def __init__(self, registry, base, register, body):
        self.registry, self.base, self.register, self.body = registry, base, register, body

    def cls(self, name="Own", bases=None, **body):
        return type(name, bases or (self.base,), self.body | {"__module__": __name__} | body)


KINDS = {
    "method": Kind(
        attrbox.method_registry,
        attrbox.Method,
        lambda name, **options: attrbox.register_method(name, **ABOUT, **options),
        {"attribute": lambda self, run: run.gradient() * self.factor},
    ),
    "rule": Kind(
        attrbox.rule_registry,
        attrbox.Rule,
        lambda name, **options: attrbox.register_rule(name, **ABOUT, **options),
        {"propagate": lambda self, site, grad: site.true_gradient(grad) * self.factor},
    ),
    "metric": Kind(
        attrbox.metric_registry,
        attrbox.Metric,
        lambda name, **options: attrbox.register_metric(name, **ABOUT, **options),
        {
            "measure": lambda self, study, outputs: {
                label: Measurement(maps.values.flatten(1).sum(1) * self.factor) for label, maps in study.maps.items()
            }
        },
    ),
    "mask": Kind(
        masks, MaskGenerator, lambda name: masks.register(name), {"masks": lambda self, map, draw: (map, map)}
    ),
    "plugin": Kind(
        plugins,
        Plugin,
        lambda name: plugins.register(name),
        {"shape": lambda self, difference: (1,), "multiplier": lambda self, parameters, difference: parameters},
    ),
}
WITH_OPTIONS = ["method", "rule", "metric"]


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.fixture(autouse=True)
def clean():
    """Takes out again what a test registers; looks whether anything is registered by half."""
    registries = [kind.registry for kind in KINDS.values()]
    before = [set(registry) for registry in registries]
    yield
    for registry, names in zip(registries, before, strict=True):
        for name in set(registry) - names:
            registry.remove(name)


def refused(kind, cls, message, name="own", error=OptionError, **options):
    before = [set(one.registry) for one in KINDS.values()]
    with pytest.raises(error, match=message):
        kind.register(name, **options)(cls)
    assert [set(one.registry) for one in KINDS.values()] == before


def used(name, **options):
    """Sums of what a method, rule or metric of this name makes."""
    if name in attrbox.method_registry:
        return attrbox.explain(relu_net(), X, name, target=1, progress=False, **options).values.flatten(1).sum(1)
    scores = attrbox.evaluate(None, X, {"a": X}, [(name, options)], controls=False, progress=False)
    return scores["a"][name].values


# ------------------------------------------------------------------------------------------------------- what works


@pytest.mark.parametrize("name", WITH_OPTIONS)
@pytest.mark.parametrize("how", ["bare", "dataclass", "in words"])
def test_a_class_with_options_that_is_no_dataclass_becomes_one(name, how):
    kind = KINDS[name]
    annotation = "float" if how == "in words" else float
    cls = kind.cls(factor=attrbox.option(3.0, "a factor"), __annotations__={"factor": annotation})
    if how == "dataclass":
        cls = dataclass(frozen=True, kw_only=True)(cls)
    assert kind.register("own")(cls) is cls
    spec = (attrbox.metric_registry if name == "metric" else attrbox.method_registry)["own"]
    assert (spec.options[0].name, spec.options[0].default, spec.options[0].help) == ("factor", 3.0, "a factor")
    number = 3 if name == "rule" else 1  # relus on the way
    torch.testing.assert_close(used("own"), used("own", factor=1.0) * 3.0**number)
    torch.testing.assert_close(used("own", factor=2.0), used("own", factor=1.0) * 2.0**number)
    with pytest.raises(OptionError, match="Did you mean 'factor'"):
        used("own", facto=2.0)
    made = cls(factor=2.0)
    assert made == cls(factor=2.0) != cls()
    assert hash(made) == hash(cls(factor=2.0))


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, (1.0, 5, "weak")),
        ({"preset": "strong"}, (9.0, 5, "strong")),
        ({"preset": "strong", "factor": 2.0}, (2.0, 5, "strong")),
        ({"fast": True}, (1.0, 2, "weak")),
        ({"fast": True, "preset": "slow"}, (3.0, 8, "slow")),
        ({"fast": True, "steps": 4}, (1.0, 4, "weak")),
    ],
)
def test_options_that_others_set(given, wanted):
    """What is given wins over presets, these over switches, and all over the defaults of the class."""
    fields = {"factor": 3.0, "steps": 5, "fast": False, "preset": "strong"}
    types = {name: type(value) for name, value in fields.items()}
    cls = KINDS["method"].cls(**{k: attrbox.option(v, k) for k, v in fields.items()}, __annotations__=types)
    presets = {"strong": {"factor": 9.0}, "weak": {"factor": 1.0}, "slow": {"steps": 8}}
    KINDS["method"].register("own", presets=presets, preset="weak", switches={"fast": {"steps": 2}})(cls)
    made = attrbox.method_registry["own"].create(given)
    assert (made.factor, made.steps, made.preset) == wanted
    assert {info.name: info.default for info in attrbox.method_registry["own"].options}["factor"] == 1.0
    with pytest.raises(OptionError, match="'strong' or 'weak' or 'slow'"):
        attrbox.method_registry["own"].create({"preset": "other"})


def test_attributes_of_the_class_are_no_options():
    cls = KINDS["rule"].cls(
        kinds=frozenset({"relu"}),
        needs=frozenset({"derivative"}),
        factor=2.0,
        level=5,
        __annotations__={"kinds": frozenset[str], "needs": "frozenset[str]", "factor": float, "level": ClassVar[int]},
    )
    KINDS["rule"].register("own")(cls)
    assert [info.name for info in attrbox.method_registry["own"].options] == ["factor", "times_input", "absolute"]
    assert cls().level == 5
    assert used("own").isfinite().all()


def test_a_class_without_options_is_left_as_it_is(kind):
    cls = kind.cls(factor=1)
    before = dict(vars(cls))
    kind.register("own")(cls)
    assert {name: value for name, value in vars(cls).items() if name in before} == before
    assert "__dataclass_params__" not in vars(cls)
    dataclass(frozen=True, kw_only=True)(cls)  # may come afterwards then


@pytest.mark.parametrize("name", ["method", "metric"])
def test_defaults_that_are_made_and_options_without_default(name):
    kind = KINDS[name]
    annotations = {"factor": float, "scales": tuple}
    cls = kind.cls(scales=field(default_factory=lambda: (1, 2)), __annotations__=annotations)
    kind.register("own")(cls)
    spec = kind.registry["own"]
    assert {info.name: info.default for info in spec.options}["scales"] == (1, 2)
    assert spec.required == ("factor",)
    with pytest.raises(OptionError, match="needs the option 'factor'"):
        used("own")
    assert used("own", factor=1.0).isfinite().all()


# ----------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("name", ["", " ", "\t", " own", "own ", "a\nb", None, 3, b"own", ("own",)])
def test_names(kind, name):
    refused(kind, kind.cls(factor=1), "Expected the name of a .* not blank", name)


@pytest.mark.parametrize("name", WITH_OPTIONS)
@pytest.mark.parametrize("aliases", ["own", ("",), (" ",), (3,), None, 3])
def test_aliases(name, aliases):
    refused(KINDS[name], KINDS[name].cls(factor=1), r"aliases .* as a tuple|not blank", aliases=aliases)


@pytest.mark.parametrize(
    "cls", [None, 3, "own", lambda run: run, nn.ReLU, int, object(), attrbox.explain, torch.ones(1000)]
)
def test_what_is_no_class_of_the_kind(kind, cls):
    refused(kind, cls, f"Expected a subclass of attrbox.{kind.base.__name__}")


def test_an_instance_and_a_class_of_another_kind(kind):
    refused(kind, kind.cls(factor=1)(), "Expected a subclass")
    for other in KINDS.values():
        if other is not kind:
            refused(kind, other.cls(factor=1), "Expected a subclass")


def test_abstract_classes(kind):
    refused(kind, kind.base, f"{kind.base.__name__} is abstract: it lacks {sorted(kind.body)[0]}")
    refused(kind, type("Half", (kind.base,), {}), f"Half is abstract: it lacks {sorted(kind.body)[0]}")
    later = abstractmethod(lambda self: None)
    refused(kind, kind.cls(later=later), "Own is abstract: it lacks later")
    kind.register("own")(kind.cls(bases=(kind.cls(later=later),), later=lambda self: None, factor=1))


@pytest.mark.parametrize("name", ["method", "rule", "metric"])
def test_options_that_cannot_be_told(name):
    kind = KINDS[name]
    cls = kind.cls

    def __init__(self, factor=2.0):  # noqa: N807
        object.__setattr__(self, "factor", factor)

    refused(kind, cls(__init__=__init__), r"__init__ takes factor, which are no fields")
    refused(kind, cls(factor=attrbox.option(2.0, "")), "cannot be told: 'factor' is a field but has no type")
    refused(kind, cls(factor=[1], __annotations__={"factor": list}), "cannot be told: mutable default")
    base = cls("Base", factor=2.0, __annotations__={"factor": float})
    refused(kind, cls(bases=(base,)), "Own inherits factor from Base, which is no dataclass")
    dataclass(frozen=True, kw_only=True)(base)
    kind.register("own")(cls(bases=(base,)))
    assert used("own", factor=3.0).isfinite().all()


def test_a_rule_that_can_change():
    cls = dataclass(KINDS["rule"].cls(factor=2.0, __annotations__={"factor": float}))
    refused(KINDS["rule"], cls, "can change. Make it @dataclass.frozen=True")


@pytest.mark.parametrize("name", ["times_input", "absolute", "baseline"])
def test_a_rule_with_an_option_that_its_method_has(name):
    cls = KINDS["rule"].cls(**{name: 1.0}, factor=1, __annotations__={name: float})
    refused(KINDS["rule"], cls, f"has {name}, an option that its method has")


def test_names_that_are_taken(kind):
    taken = next(iter(kind.registry))
    refused(kind, kind.cls(factor=1), "already taken", taken, DuplicateNameError)
    refused(kind, kind.cls(factor=1), "already taken", taken.upper(), DuplicateNameError)
