"""Maps can be differentiated once more."""

from collections.abc import Callable

import pytest
import torch
from nets import SMALL, images
from rule_cases import ALL, CASES, RULES, replayed, sandwich
from torch import Tensor, nn

from attrbox.engine.site import Rule
from attrbox.engine.tape import record
from attrbox.rules.deeplift import DeepLift


def assert_differentiable(
    model: nn.Module,
    x: Tensor,
    x0: Tensor,
    rule: Rule | None,
    score: Callable[[Tensor], Tensor],
    tolerance: float = 1e-6,
) -> None:
    """Assert that the derivative of images -> propagated gradient is that of finite differences of new recordings."""
    weights, direction = images(*x.shape, seed=81), images(*x.shape, seed=82)

    def value(images: Tensor, create_graph: bool) -> tuple[Tensor, Tensor]:
        tape = record(model, images, (rule or DeepLift(),))
        reference = tape.record_reference(x0) if rule is not None and rule.uses_reference else None
        (gradient,) = tape.replay(
            score(tape.output), [tape.images], rule, reference=reference, create_graph=create_graph
        )
        return (gradient * weights).sum(), tape.images

    total, leaf = value(x, create_graph=True)
    if total.requires_grad:
        (derivative,) = torch.autograd.grad(total, leaf, allow_unused=True)
    else:
        derivative = None  # constant
    derivative = torch.zeros_like(x) if derivative is None else derivative
    step = 1e-5
    (above, _), (below, _) = (value(x + sign * step * direction, create_graph=False) for sign in (1, -1))
    expected = (above - below) / (2 * step)
    scale = max(1.0, float(total.detach().abs()))
    torch.testing.assert_close((derivative * direction).sum(), expected, rtol=tolerance, atol=tolerance * scale)


NOT_TWICE = "torch has no second derivative of hardsigmoid, and this rule leaves it to torch"


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", CASES)
def test_the_propagated_gradient_can_be_differentiated(rule, name):
    case = CASES[name]
    if rule in ("guided_backprop", "deconvnet") and name in (
        "hardsigmoid",
        "product, gate second",
        "product, two gates",
    ):
        pytest.skip(NOT_TWICE)
    model = sandwich(case.operation, case.shape, case.conv)
    seed = images(3, 3, seed=91)
    x, x0 = images(3, 5, seed=92), images(1, 5, seed=93)
    assert_differentiable(model, x, x0, RULES[rule], lambda out: (out * seed).sum(1))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["relu", "relu, in place", "gelu", "softmax", "max_pool2d, overlapping", "product"])
def test_the_propagated_gradient_of_a_non_linear_score_can_be_differentiated(rule, name):
    # Log-probabilities: the gradient at the output depends on the images as well, through the true forward pass.
    case = CASES[name]
    model = sandwich(case.operation, case.shape, case.conv)
    x, x0 = images(3, 5, seed=92), images(1, 5, seed=93)
    assert_differentiable(model, x, x0, RULES[rule], lambda out: out.log_softmax(1)[:, 0])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", SMALL)
def test_the_maps_of_small_nets_can_be_differentiated(rule, name):
    if rule in ("guided_backprop", "deconvnet") and name == "hardsigmoid gate":
        pytest.skip(NOT_TWICE)
    build, shape = SMALL[name]
    model = build().requires_grad_(False)
    assert_differentiable(model, images(1, *shape), images(1, *shape, seed=1), RULES[rule], lambda out: out[:, 1], 1e-5)


@pytest.mark.parametrize("name", ["relu", "relu, in place", "gelu", "tanh", "sigmoid, in place", "product"])
def test_gradcheck_of_every_rule_at_once(name):
    """The full Jacobian of images -> propagated gradients, by torch's own checker."""
    case = CASES[name]
    model = sandwich(case.operation, case.shape, case.conv)
    seed, x0 = images(2, 3, seed=91), images(1, 5, seed=93)

    class Map(torch.autograd.Function):
        """A fresh recording for each value, its double backward as the derivative."""

        @staticmethod
        def forward(ctx, x, rule):
            with torch.enable_grad():
                tape = record(model, x, (rule,))
                reference = tape.record_reference(x0) if rule.uses_reference else None
                score = (tape.output * seed).sum(1)
                (gradient,) = tape.replay(score, [tape.images], rule, reference=reference, create_graph=True)
            ctx.gradient, ctx.leaf = gradient, tape.images
            return gradient.detach()

        @staticmethod
        def backward(ctx, upstream):
            if not ctx.gradient.requires_grad:
                return torch.zeros_like(upstream), None
            (result,) = torch.autograd.grad(ctx.gradient, ctx.leaf, upstream, retain_graph=True, allow_unused=True)
            return (torch.zeros_like(upstream) if result is None else result), None

    for rule in ALL:
        x = images(2, 5, seed=94).requires_grad_()
        assert torch.autograd.gradcheck(lambda x, rule=rule: Map.apply(x, rule), (x,), eps=1e-6, atol=1e-6, rtol=1e-5)


def test_the_propagated_gradient_can_be_differentiated_by_parameters_of_the_rule():
    class Learned(Rule):
        kinds = frozenset({"relu"})
        needs = frozenset({"output"})

        def __init__(self, weight):
            self.weight = weight

        def propagate(self, site, grad_output):
            return grad_output * torch.tanh(self.weight * site.output)

    case = CASES["relu, in place"]
    model = sandwich(case.operation, case.shape)
    x, seed = images(2, 5, seed=92), images(2, 3, seed=91)

    def propagated(weight):
        return replayed(model, x, seed, Learned(weight), create_graph=True)

    weight = images(2, *case.shape, seed=95).requires_grad_()
    assert torch.autograd.gradcheck(propagated, (weight,))
