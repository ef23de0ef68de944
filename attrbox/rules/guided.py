"""Guided backpropagation and the deconvnet: only positive signals travel back through a rectifier.

    gradient    grad_input = f'(x) * grad_output
    deconvnet   grad_input =         max(grad_output, 0)     Zeiler & Fergus, ECCV 2014, section 2.1
    guided      grad_input = f'(x) * max(grad_output, 0)     Springenberg et al., ICLR 2015 workshop, figure 1

With a ReLU, f'(x) = 1[x > 0], and 0 at 0. Other rectifiers (ReLU6, GELU, SiLU, ...) are treated alike; at gates
(sigmoid, tanh, softmax, products) and max-pools the true derivative holds.
"""

import torch
from torch import Tensor

from attrbox.engine.site import RECTIFIERS, Rule, Site


class GuidedBackprop(Rule):
    """f'(x) * max(grad_output, 0) at every rectifier."""

    kinds = RECTIFIERS

    def propagate(self, site: Site, grad_output: Tensor) -> Tensor:
        if site.kind == "relu" and not torch.is_grad_enabled():
            # The same product in two passes over memory instead of three; the first result is ours to write on.
            gated = site.true_gradient(grad_output)
            assert isinstance(gated, Tensor)
            return gated.relu_()
        gradient = site.true_gradient(grad_output.relu())
        assert isinstance(gradient, Tensor)
        return gradient


class Deconvnet(Rule):
    """max(grad_output, 0) at every rectifier, whatever the forward signal was."""

    kinds = RECTIFIERS
    needs = frozenset()

    def propagate(self, site: Site, grad_output: Tensor) -> Tensor:
        del site
        return grad_output.relu()
