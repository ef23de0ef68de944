"""Scores and maps that are NaN or infinite are refused or named, by every method; broken rules name their place."""

import warnings
from dataclasses import dataclass

import pytest
import torch
from nets import FAST, images, relu_net
from torch import Tensor, nn

import attrbox
from attrbox.engine.site import Rule
from attrbox.errors import AttrboxError, ModelError, NonFiniteError, NonFiniteWarning, RuleError

METHODS = [name for name in attrbox.list_methods() if attrbox.method_registry[name].for_all]
X = images(4, 3, 8, 8)


class Root(nn.Module):
    """The root of a mean, whose slope is infinite where the mean is 0; here for the images 1 and 3."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return torch.sqrt(self.conv(x).abs().mean((2, 3)))


def half_black() -> Tensor:
    x = X.clone()
    x[1::2] = 0
    return x


@pytest.mark.parametrize("method", METHODS)
class TestScores:
    def test_broken_weights_are_refused(self, method: str) -> None:
        model = relu_net()
        with torch.no_grad():
            model[0].weight[0, 0, 0, 0] = torch.nan
        for size in (None, 1):
            with pytest.raises(NonFiniteError, match=r"NaN or infinity for the images \[0.*1 of its parameters"):
                attrbox.explain(model, X, method, target=1, batch_size=size, progress=False, **FAST.get(method, {}))

    def test_the_images_are_named(self, method: str) -> None:
        """A target function whose score is infinite for one of the images."""
        with pytest.raises(NonFiniteError, match=r"for the images \[2\]\. Leave these images out"):
            attrbox.explain(
                relu_net(), X, method, target=lambda out: out[:, 0] / (out[:, 0] - out[:, 0].detach() + bad(out)),
                batch_size=4, progress=False, **FAST.get(method, {}),
            )  # fmt: skip

    @pytest.mark.parametrize("target", [1, lambda out: out[:, 1]], ids=["class", "function"])
    @pytest.mark.parametrize("size", [1, 4])
    def test_the_row_of_one_image(self, method: str, target: object, size: int) -> None:
        x = X.clone()
        x[2, 0, 0, 0] = 100
        with pytest.raises(NonFiniteError, match=r"NaN or infinity for the images \[2\]"):
            attrbox.explain(Blind(), x, method, target=target, batch_size=size, progress=False, **FAST.get(method, {}))

    def test_another_class_changes_no_map(self, method: str) -> None:
        options = {"target": 1, "progress": False} | FAST.get(method, {})
        found, wanted = (attrbox.explain(model, X, method, **options).values for model in (LostClass(), relu_net()))
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("method", ["occlusion", "rise", "lime", "kernel_shap"])
@pytest.mark.parametrize("score", ["contrast", "prob", "log_prob"])
def test_scores_that_compare_classes_need_them_all(method: str, score: str) -> None:
    with pytest.raises(ModelError, match=r"images \[0, 1, 2, 3\].*score='logit' the explained alone"):
        attrbox.explain(LostClass(), X, method, target=1, progress=False, **FAST.get(method, {}) | {"score": score})


class Blind(nn.Module):
    """NaN for images with a bright corner."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = relu_net()
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x[:, :1, 0, 0] > 50, torch.nan, self.inner(x))


class LostClass(Blind):
    """NaN for the class 0."""

    def forward(self, x: Tensor) -> Tensor:
        scores = self.inner(x)
        return torch.cat([torch.full_like(scores[:, :1], torch.nan), scores[:, 1:]], 1)


def bad(out: Tensor) -> Tensor:
    """1 for all rows but the third of the four images themselves."""
    numbers = torch.ones(len(out), dtype=out.dtype)
    if len(out) == 4:
        numbers[2] = 0
    return numbers


class TestMaps:
    def test_the_images_and_the_first_site_are_named(self) -> None:
        torch.manual_seed(0)
        model = Root().double()
        for method in ("saliency", "gradient_x_input", "guided_backprop"):
            for size in (None, 1):
                with pytest.warns(NonFiniteWarning, match=rf"maps of '{method}'.*images \[1, 3\].*at site .*power"):
                    maps = attrbox.explain(model, half_black(), method, target=0, batch_size=size, progress=False)
                assert maps.values[::2].isfinite().all()

    def test_strict_refuses_them(self) -> None:
        torch.manual_seed(0)
        with pytest.raises(NonFiniteError, match="maps of 'saliency'"):
            attrbox.explain(Root().double(), half_black(), "saliency", target=0, strict=True, progress=False)

    def test_only_the_method_that_has_them_is_named(self) -> None:
        torch.manual_seed(0)
        with pytest.warns(NonFiniteWarning) as caught:
            result = attrbox.compare(
                Root().double(), half_black(), ["saliency", "deeplift", "random"], target=0, progress=False
            )
        assert [str(one.message).split("'")[1] for one in caught] == ["saliency"]
        assert result["deeplift"].values.isfinite().all()

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_rule_that_makes_them(self, value: float) -> None:
        class Broken(Rule):
            def propagate(self, site, grad_output):
                return torch.full_like(grad_output, value) if site.index == 1 else site.true_gradient(grad_output)

        @attrbox.register_method("broken", summary="-", reference="-")
        @dataclass(frozen=True, kw_only=True)
        class Method(attrbox.Method):
            @property
            def rules(self):
                return (Broken(),)

            def attribute(self, run):
                return run.gradient(self.rules[0])

        try:
            with pytest.warns(NonFiniteWarning, match="first at site 1, relu in module '3'"):
                attrbox.explain(relu_net(), X, "broken", target=0, progress=False)
        finally:
            attrbox.method_registry.remove("broken")

    def test_nothing_is_said_of_finite_maps(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            attrbox.compare(relu_net(), X, ["saliency", "deeplift"], target=0, progress=False)


def test_what_a_rule_raises_says_where() -> None:
    class Raises(Rule):
        def propagate(self, site, grad_output):
            raise KeyError("no such thing")

    attrbox.register_rule("raises", summary="-", reference="-")(Raises)
    try:
        with pytest.raises(RuleError, match=r"'Raises' raised KeyError at site \d+, relu.*no such thing") as caught:
            attrbox.explain(relu_net(), X, "raises", target=0, batch_size=2, progress=False)
    finally:
        attrbox.rule_registry.remove("raises")
        attrbox.method_registry.remove("raises")
    assert isinstance(caught.value.__cause__, KeyError)
    assert str(caught.value).endswith("This was raised while images 0 to 1 were explained by 'raises'.")
    assert isinstance(caught.value, AttrboxError)
