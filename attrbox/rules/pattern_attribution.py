"""PatternNet and PatternAttribution: the gradient with other weights in its backward pass.

A neuron y = w x + b sees a signal that its y is about, and distractors that w is there to cancel. The pattern a is the
direction of the signal (Kindermans et al., ICLR 2018). Both methods are the chain rule in which, at convolutions and
linear layers,

    G_x = A^T(v) G_y,     v = a for PatternNet (section 5),     v = w a, element by element, for PatternAttribution

Non-linearities keep their derivative, that is, the gates of ReLUs and the winners of max-pools.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from attrbox.core.results import Operated
from attrbox.engine.site import LAYERS, LayerInfo, Rule, Site
from attrbox.errors import ModelError

Place = tuple[int, bool]  # index of the site, and whether a batch-norm is joined to it


class PatternRule(Rule):
    """Patterns in place of weights, or of ones beside them.

    Args:
        patterns: of the weights' shapes, by place.
        weighted: whether they are multiplied by the weights.
    """

    kinds = LAYERS
    needs = frozenset({"input"})

    def __init__(self, patterns: Mapping[Place, Tensor], weighted: bool) -> None:
        self.patterns = patterns
        self.weighted = weighted

    def propagate(self, site: Site, grad_output: Tensor) -> Tensor:
        layer = site.about(LayerInfo)
        pattern = self.patterns.get((site.index, layer.joined))
        if pattern is None:
            raise ModelError(f"There is no pattern for {Operated.listed([site])[0]}. Fit them on images that reach it.")
        pattern = pattern.to(site.input)
        if self.weighted:
            pattern = pattern * layer.weight.to(pattern)
        differentiable = torch.is_grad_enabled()
        with torch.enable_grad():
            anywhere = torch.zeros_like(site.input, requires_grad=True)  # the layer is linear
            output = layer.apply(anywhere, pattern, None)
        return torch.autograd.grad(output, anywhere, grad_output, create_graph=differentiable)[0]
