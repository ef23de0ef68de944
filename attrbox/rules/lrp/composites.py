"""Composites: which rule of `attrbox.rules.lrp.layers` holds at which layer.

    epsilon_plus           z+ at convolutions, epsilon at linear layers
    epsilon_alpha2_beta1   alpha-beta (2, 1) at convolutions, epsilon at linear layers
    epsilon_gamma_box      z-box at the first layer, gamma at other convolutions, epsilon at linear layers
    deep_taylor            z-box (or w-square) at the first layer, z+ without bias at all others; of the positive part
                           of the score (Montavon et al., Pattern Recognition 2017)
    attn_lrp               gamma (0.25) at convolutions, gamma (0.05) at linear layers (Achtibat et al., ICML 2024)
    excitation_backprop    z+ without bias at all layers (Zhang et al., ECCV 2016)

Between layers relevance passes as in `attrbox.rules.lrp.activations`: through activations unchanged (f(x) / x), by
winners in max-pools, by halves in products of two activations, all to the numerator and through the norm. Residual
sums, averages and whatever else is linear share it in proportion to what each part contributes. Batch-norms belong to
their layers; one that follows no layer, as in DenseNet, is a layer of one product and one bias for each output, of
kind "batch_norm".
"""

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from attrbox.core.validation import check_number
from attrbox.engine.site import LAYERS, Gradients, LayerInfo, Rule, Site
from attrbox.errors import OptionError, shown
from attrbox.rules.lrp.activations import LRPEpsilon
from attrbox.rules.lrp.layers import Epsilon, LayerRule, Losses, nonzero

# What can be said of a layer besides the name of its module.
FIRST, LAST, ANY = "first", "last", "any"


@dataclass(frozen=True)
class Composite(Rule):
    """Rules by place: pairs (where, rule), of which the first that fits a layer holds.

    where: "first" or "last" (of the layers that run), "convolution", "linear", "batch_norm", "any", or the name of a
    module, in which * stands for any letters ("layer4.*"). Layers that no pair fits get `Epsilon()`.
    """

    places: tuple[tuple[str, LayerRule], ...] = ()
    stabiliser: float = 1e-6

    kinds = LRPEpsilon.kinds | LAYERS
    needs = frozenset({"input", "output"})

    def __post_init__(self) -> None:
        pairs = tuple(self.places.items()) if isinstance(self.places, Mapping) else self.places
        fits = isinstance(pairs, tuple) and all(
            isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], LayerRule)
            for pair in pairs
        )
        if not fits:
            raise OptionError(
                f"Expected a tuple of pairs (where, rule of attrbox.rules.lrp.layers), got {shown(self.places)}."
            )
        check_number("stabiliser", self.stabiliser, above=0)
        object.__setattr__(self, "places", pairs)

    def needs_at(self, kind: str) -> frozenset[str]:
        return frozenset({"input"}) if kind in LAYERS else _BETWEEN.needs_at(kind)

    def rule_at(self, site: Site) -> LayerRule:
        """The rule of a layer."""
        layer = site.about(LayerInfo)
        places = {ANY, site.kind} | ({FIRST} if layer.first else set()) | ({LAST} if layer.last else set())
        for where, rule in self.places:
            if where in places or fnmatch.fnmatchcase(site.module, where):
                return rule
        return Epsilon()

    def propagate(self, site: Site, grad_output: Tensor) -> Gradients:
        if site.kind in LAYERS:
            return self.rule_at(site).propagate(site, grad_output, self.stabiliser)
        if site.kind == "relu":  # without a stabiliser, as layers have their own
            return grad_output * (site.output > 0)
        return _BETWEEN.propagate(site, grad_output)

    def losses(self, site: Site, grad_output: Tensor) -> Losses:
        """What a layer keeps of the relevance that reaches it."""
        return self.rule_at(site).losses(site, grad_output, self.stabiliser)

    @property
    def divides(self) -> bool:
        """Whether relevance at the first layers is no product with their input, and gradients are divided by that."""
        return any(rule.divides for _, rule in self.places)

    def relevance(self, gradient: Tensor, images: Tensor) -> Tensor:
        return gradient * nonzero(images) if self.divides else gradient * images


_BETWEEN = LRPEpsilon(torch.finfo(torch.float32).eps)
