"""Layer-wise relevance propagation, epsilon rule, in gradient form.

With relevance R = x * G, the epsilon rule of Bach et al. (PLoS ONE 2015, equation 58) passes non-linearities with

    grad_input = grad_output * f(x) / (x + epsilon * sign(x)),     sign(0) = 1, sign(-0) = -1

and linear layers with their gradient (Ancona et al., ICLR 2018, proposition 1): x includes the bias, which absorbs
its share of relevance. The stabiliser acts where a non-linearity follows, not at the output layer. For epsilon -> 0
on ReLU networks this is Gradient x Input. Max-pools pass to the winner. So that relevance is not doubled at products,
a factor that a sigmoid made (the gate of a squeeze-and-excitation) gets none and the other one all of it (Arras et
al., WASSA 2017, section 3.1); other pairs get half each, and softmax its true gradient, which is what AttnLRP derives
(Achtibat et al., ICML 2024, propositions 3.1 and 3.3). Matrix products of two activations give half to each, too. The
denominator of a quotient and the deviation of a norm are gates as well: constants, as in AttnLRP (section 3.3), so that
a norm is linear, and its bias and mean absorb their share.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attrbox.core.validation import check_number
from attrbox.engine.site import ELEMENTWISE, Gradients, NormInfo, PairInfo, Rule, Site
from attrbox.rules.lrp.norms import normed, weighted


@dataclass(frozen=True)
class LRPEpsilon(Rule):
    """f(x) / (x + epsilon sign(x)) at activations; products share their relevance, gates get none.

    epsilon is in units of the activation; 1e-4 is the default of DeepExplain (Ancona et al. 2018).
    """

    epsilon: float = 1e-4

    kinds = ELEMENTWISE | {"product", "matmul", "quotient", "norm"}
    needs = frozenset({"input", "output"})
    by_rows = True

    def __post_init__(self) -> None:
        check_number("epsilon", self.epsilon, above=0)  # which keeps f(x) / x finite

    def needs_at(self, kind: str) -> frozenset[str]:
        return _NEEDS.get(kind, self.needs)

    def propagate(self, site: Site, grad_output: Tensor) -> Gradients:
        if site.kind not in ELEMENTWISE:
            return _AMONG_PARTS[site.kind](site, grad_output)
        if site.kind == "relu":  # f(x) is x or 0: the output alone decides
            stabilised = site.output + self.epsilon
        elif site.kind == "relu6":  # likewise 0 for x < 0
            stabilised = site.input.clamp_min(0).add_(self.epsilon)
        else:
            x = site.input
            stabilised = x + torch.copysign(x.new_tensor(self.epsilon), x)
        if torch.is_grad_enabled():
            return grad_output * (site.output / stabilised)
        return torch.div(site.output, stabilised, out=stabilised).mul_(grad_output)  # the same, in no further memory


def _product(site: Site, grad_output: Tensor) -> Gradients:
    first, second = _pair(site.true_gradient(grad_output))
    match site.about(PairInfo).gates:
        case (True, False):
            return torch.zeros_like(first), second
        case (False, True):
            return first, torch.zeros_like(second)
        case _:
            return first / 2, second / 2


def _quotient(site: Site, grad_output: Tensor) -> Gradients:
    """All to the numerator; where that is constant, to the denominator, as at any function of one input."""
    above, below = site.inputs
    if site.about(PairInfo).constant:
        return torch.zeros_like(grad_output), grad_output * (above / below**2)
    return grad_output / below, torch.zeros_like(below)


def _norm(site: Site, grad_output: Tensor) -> Tensor:
    grad = weighted(site, grad_output) / normed(site, site.input)[1]
    if site.about(NormInfo).centered:
        grad = grad - grad.mean(1, keepdim=True)
    return grad.view(grad_output.shape)


def _pair(gradients: Gradients) -> tuple[Tensor, ...]:
    assert isinstance(gradients, tuple)
    return gradients


_AMONG_PARTS: dict[str, Callable[[Site, Tensor], Gradients]] = {
    "product": _product,
    "matmul": _product,
    "quotient": _quotient,
    "norm": _norm,
}

# The output of a ReLU decides alone; that of a ReLU6 is computed again rather than kept.
_NEEDS = {
    "relu": frozenset({"output"}),
    "relu6": frozenset({"input"}),
    "product": frozenset({"derivative"}),
    "matmul": frozenset({"derivative"}),
    "quotient": frozenset({"input"}),
    "norm": frozenset({"input"}),
}
