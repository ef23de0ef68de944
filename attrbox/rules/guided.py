"""Guided backpropagation and the deconvnet: only positive signals travel back through a rectifier.

    gradient    grad_input = f'(x) * grad_output
    deconvnet   grad_input =         max(grad_output, 0)     Zeiler & Fergus, ECCV 2014, section 2.1
    guided      grad_input = f'(x) * max(grad_output, 0)     Springenberg et al., ICLR 2015 workshop, figure 1

With a ReLU, f'(x) = 1[x > 0], and 0 at 0. Other rectifiers (ReLU6, GELU, SiLU, ...) are treated alike; at gates
(sigmoid, tanh, softmax, products) and max-pools the true derivative holds.
"""

from dataclasses import dataclass

from torch import Tensor

from attrbox.engine.site import RECTIFIERS, FunctionInfo, Gradients, Rule, Site


@dataclass(frozen=True)
class GuidedBackprop(Rule):
    """f'(x) * max(grad_output, 0) at every rectifier."""

    kinds = RECTIFIERS

    def propagate(self, site: Site, grad_output: Tensor) -> Tensor:
        if site.about(FunctionInfo).bounds:  # f' is 0 or 1: the order does not matter, and the product is ours to write
            return _one(site.true_gradient(grad_output)).relu_()
        return _one(site.true_gradient(grad_output.relu()))


def _one(gradients: Gradients) -> Tensor:
    assert isinstance(gradients, Tensor)
    return gradients


@dataclass(frozen=True)
class Deconvnet(Rule):
    """max(grad_output, 0) at every rectifier, whatever the forward signal was."""

    kinds = RECTIFIERS
    needs = frozenset()

    def propagate(self, site: Site, grad_output: Tensor) -> Tensor:
        del site
        return grad_output.relu()
