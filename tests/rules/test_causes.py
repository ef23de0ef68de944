"""What a user's rule, target function, method or metric raises arrives with itself as the cause, and with the images,
the method and the site that were at work."""

import traceback
from dataclasses import dataclass

import pytest
import torch
from exports import export
from nets import images, relu_net, seeded
from torch import nn
from typer.testing import CliRunner

import attrbox
from attrbox.errors import AttrboxError, InputError, RuleError, TargetError
from attrbox.pipeline.cli import app

X = images(5, 3, 8, 8)


class BrokenError(Exception):
    """Of the user's own."""


class Gated(nn.Module):
    """A product of two activations of different shapes."""

    def __init__(self):
        super().__init__()
        self.inside, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 4)

    def forward(self, x):
        x = self.inside(x)
        return self.head((x.relu() * x.mean((2, 3), keepdim=True).sigmoid()).mean((2, 3)))


def raises(error):
    def function(*args, **options):
        raise error

    return function


@dataclass(frozen=True)
class Plain(attrbox.Rule):
    def propagate(self, site, grad_output):
        return site.true_gradient(grad_output)


@pytest.fixture
def rule(request):
    """Makes and registers a rule with some of its methods replaced."""

    def make(**methods):
        cls = type("Mine", (Plain,), methods)
        attrbox.register_rule("mine", summary="s", reference="r")(cls)
        request.addfinalizer(lambda: (attrbox.rule_registry.remove("mine"), attrbox.method_registry.remove("mine")))
        return cls

    return make


def explain(method="mine", model=None, **options):
    options = {"target": 1, "batch_size": 2, "progress": False} | options
    return attrbox.explain(model or relu_net(), X, method, **options)


@pytest.mark.parametrize("kind", [BrokenError, KeyError, RuntimeError, AssertionError, StopIteration])
@pytest.mark.parametrize(
    ("hook", "where"),
    [
        ("propagate", r"at site 2, relu in module '7', call 0"),
        ("treats", r"asked whether it treats site 2, relu in module '7'"),
        ("check", "asked whether it is defined on the model"),
        ("needs_at", "asked what it needs at"),
        ("relevance", "making a map of the gradient at the images"),
    ],
)
def test_rules(rule, hook, where, kind):
    error = kind("no")
    rule(**{hook: raises(error)})
    for call in (explain, lambda: attrbox.compare(relu_net(), X, ["saliency", "mine"], batch_size=2, progress=False)):
        with pytest.raises(RuleError, match=rf"'Mine' raised {type(error).__name__} {where}") as caught:
            call()
        assert caught.value.__cause__ is error
        told = "".join(traceback.format_exception(caught.value))
        assert "images 0 to 1 were" in told
        assert hook == "needs_at" or "explained by 'mine'" in str(caught.value)


def test_the_images_and_the_site_are_those_at_work(rule):
    def propagate(self, site, grad_output):
        if site.index == 0 and bool((site.output > 20).any()):
            raise BrokenError("too bright")
        return site.true_gradient(grad_output)

    rule(propagate=propagate, needs=frozenset({"output", "derivative"}))
    x = X.clone()
    x[3] *= 100
    for size, told in ((1, "image 3 was"), (2, "images 2 to 3 were"), (3, "images 3 to 4 were")):
        with pytest.raises(RuleError, match=rf"{told} explained by 'mine'") as caught:
            attrbox.explain(relu_net(), x, "mine", batch_size=size, progress=False)
        assert isinstance(caught.value.__cause__, BrokenError)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("hook", ["propagate", "treats", "check", "needs_at", "relevance"])
def test_what_is_no_mistake_stays(rule, hook, stop):
    error = stop()
    rule(**{hook: raises(error)})
    with pytest.raises(stop) as caught:
        explain()
    assert caught.value is error
    assert not hasattr(error, "__notes__")
    with pytest.raises(stop):
        explain("saliency", target=raises(error))


@pytest.mark.parametrize("hook", ["propagate", "treats", "check", "needs_at", "relevance"])
@pytest.mark.parametrize("kind", [AttrboxError, InputError, RuleError, TargetError])
def test_errors_of_attrbox_stay(rule, hook, kind):
    error = kind("as I said")
    rule(**{hook: raises(error)})
    with pytest.raises(kind) as caught:
        explain()
    assert caught.value is error
    assert str(error) == "as I said"
    assert "images 0 to 1" in error.__notes__[0]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_a_lack_of_memory_is_no_mistake_of_the_rule(rule, error):
    sizes = []

    def propagate(self, site, grad_output):
        sizes.append(len(grad_output))
        if len(grad_output) > 1:
            raise error
        return site.true_gradient(grad_output)

    rule(propagate=propagate)
    torch.testing.assert_close(explain().values, explain("gradient_x_input").values)
    assert {1, 2} <= set(sizes)


@pytest.mark.parametrize("method", ["saliency", "deeplift", "grad_cam", "integrated_gradients", "smoothgrad", "rise"])
@pytest.mark.parametrize("error", [BrokenError("no"), KeyError("no"), ZeroDivisionError("no")])
def test_target_functions(method, error):
    with pytest.raises(TargetError, match=f"raised {type(error).__name__}.*images 0 to 1 were") as caught:
        explain(method, target=raises(error))
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [BrokenError("no"), KeyError("no")])
def test_methods_and_metrics(request, error):
    method = type("Mine", (attrbox.Method,), {"attribute": raises(error)})
    attrbox.register_method("mine", summary="s", reference="r")(method)
    request.addfinalizer(lambda: attrbox.method_registry.remove("mine"))
    with pytest.raises(type(error)) as caught:
        explain()
    assert caught.value.__notes__ == ["This was raised while images 0 to 1 were explained by 'mine'."]
    metric = type("Mine", (attrbox.Metric,), {"measure": raises(error)})
    attrbox.register_metric("mine", summary="s", reference="r")(metric)
    request.addfinalizer(lambda: attrbox.metric_registry.remove("mine"))
    with pytest.raises(type(error)) as caught:
        attrbox.evaluate(None, X, {"a": X}, ["mine"], progress=False)
    assert "measured by 'mine'" in caught.value.__notes__[-1]


def test_a_metric_with_a_target_function():
    with pytest.raises(TargetError, match=r"raised KeyError.*images 0 to 4 were scored") as caught:
        attrbox.evaluate(relu_net(), X, {"a": X}, [("morf", {})], target=raises(KeyError("no")), progress=False)
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize(
    "shapes", [((2, 4, 6, 6), (2, 3, 1, 1)), ((2, 4, 5, 6), (2, 4, 1, 1)), ((4, 6, 6), (2, 4, 1, 1)), ((), ())]
)
def test_gradients_of_a_product_that_fit_no_factor(rule, shapes):
    rule(
        kinds=frozenset({"product"}),
        propagate=lambda self, site, grad: tuple(grad.new_zeros(shape) for shape in shapes),
    )
    with pytest.raises(
        RuleError, match=r"'Mine' must return gradients of the inputs' shapes \[\[2, 4, 6, 6\], \[2, 4, 1"
    ):
        explain(model=seeded(Gated))


def test_gradients_of_a_product_may_be_broadcast(rule):
    rule(
        kinds=frozenset({"product"}),
        needs=frozenset({"input"}),
        propagate=lambda self, site, grad: (grad * site.inputs[1], grad * site.inputs[0]),
    )
    model = seeded(Gated)
    torch.testing.assert_close(explain(model=model).values, explain("gradient_x_input", model).values)


def test_files_and_the_command_say_it_too(rule, tmp_path, monkeypatch):
    def propagate(self, site, grad_output):
        if len(grad_output) > 1:
            raise BrokenError("one at a time")
        return site.true_gradient(grad_output)

    rule(propagate=propagate)
    with pytest.raises(RuleError, match=r"one at a time.*explained by 'mine'"):
        explain()
    summary = export(tmp_path / "maps.h5", methods=["mine", "saliency"])
    assert summary.complete  # one at a time
    monkeypatch.setattr("attrbox.data.models.loading.load_model", raises(_noted(InputError("why"), "where")))
    result = CliRunner().invoke(app, ["doctor", "torchvision:resnet18"])
    assert result.exit_code == 2
    assert "why where" in result.output


def _noted(error, note):
    error.add_note(note)
    return error
