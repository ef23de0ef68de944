"""Layer-wise relevance propagation by composites: methods that multiply the propagated gradient by the input.

    values = x * G,     which sum to the score, less what biases, stabilisers and clamps absorb

`audit=True` says where: `coverage.conservation` (`attrbox.core.results.Conservation`) has, for each site in order of
execution, the relevance that came to its output and that went on to its inputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attrbox.core.options import option
from attrbox.core.results import Conservation, Coverage, Operated
from attrbox.core.validation import check_choice, check_flag, check_number
from attrbox.engine.site import KINDS, LAYERS, Gradients, Rule, Site
from attrbox.errors import OptionError
from attrbox.methods.base import Method, register_method
from attrbox.methods.context.run import Run
from attrbox.rules.lrp.activations import LRPEpsilon
from attrbox.rules.lrp.composites import Composite
from attrbox.rules.lrp.layers import (
    AlphaBeta,
    Epsilon,
    ExcitationBackprop,
    Gamma,
    LayerRule,
    WSquare,
    ZBox,
    ZPlus,
    nonzero,
)

Places = tuple[tuple[str, LayerRule], ...]
_AUDIT = "tell how much relevance each layer absorbs"
_EPSILON = "stabiliser at linear layers, in units of their output"
_LOW = "lowest pixel value as the model takes it: a number, one per channel, or None: that of each image"
_HIGH = "highest pixel value; as low"


class _Audited(Rule):
    """A composite that notes the relevance of one score of one image at each site, its own or not.

    One score, as not all sites have the batch first: attention lays it behind the tokens, or together with the heads.
    """

    kinds = KINDS | LAYERS

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.found: dict[int, tuple[Operated, Tensor]] = {}  # by site: the amounts, [5]

    def needs_at(self, kind: str) -> frozenset[str]:
        own = self.rule.needs_at(kind) if kind in self.rule.kinds else frozenset[str]()
        return own | {"input"}

    def propagate(self, site: Site, grad_output: Tensor) -> Gradients:
        treated = self.rule.treats(site)
        result = self.rule.propagate(site, grad_output) if treated else site.true_gradient(grad_output)
        parts = result if isinstance(result, tuple) else (result,)
        with torch.no_grad():
            arriving = (site.output * grad_output).sum()
            went = [self.rule.relevance(g, x).sum() for x, g in zip(site.inputs, parts, strict=True)]
            leaving = torch.stack(went).sum()
            bias = stabiliser = clamp = torch.zeros_like(arriving)
            if treated and isinstance(self.rule, Composite) and site.kind in LAYERS:
                losses = self.rule.losses(site, grad_output)
                bias, stabiliser, clamp = (part.sum() for part in (losses.bias, losses.stabiliser, losses.clamp))
            elif site.kind in LAYERS:  # the plain epsilon rule, without a stabiliser
                bias = arriving - leaving
            amounts = torch.stack([arriving, leaving, bias, stabiliser, clamp])
            # A layer whose output is used past its batch-norm is visited twice.
            _, before = self.found.get(site.index, (None, torch.zeros_like(amounts)))
            self.found[site.index] = Operated.listed([site])[0], before + amounts
        return result


def _conservation(audits: Sequence[Sequence[_Audited]], scores: Tensor, values: Tensor) -> Conservation:
    """What was noted for the scores [n, K], whose relevance at the images are the values [n, K, ...]; sites that no
    score depends on are left out."""
    places = {index: place for row in audits for one in row for index, (place, _) in one.found.items()}
    nothing = scores.new_zeros(5)
    by_score = [
        torch.stack([torch.stack([one.found.get(index, (None, nothing))[1] for one in row]) for row in audits])
        for index in sorted(places)
    ]
    arriving, leaving, bias, stabiliser, clamp = torch.stack(by_score, 2).to(scores.dtype).unbind(3)
    constants = scores - values.flatten(2).sum(2) - (arriving - leaving).sum(2)
    sites = tuple(places[index] for index in sorted(places))
    return Conservation(sites, arriving, leaving, bias, stabiliser, clamp, constants)


@dataclass(frozen=True, kw_only=True)
class _Relevance(Method):
    audit: bool = option(False, _AUDIT)
    stabiliser: float = option(1e-6, "what keeps the denominators of all rules but epsilon from 0")

    def __post_init__(self) -> None:
        check_flag("audit", self.audit)
        self.rule()

    def rule(self) -> Rule:
        """The composite with the options set."""
        raise NotImplementedError

    @property
    def rules(self) -> tuple[Rule | None, ...]:
        return (_Audited(self.rule()),) if self.audit else (self.rule(),)

    def attribute(self, run: Run) -> Tensor:
        rule = self.rule()
        gradient = self._audited(run)[0] if self.audit else run.gradient(rule)
        return self._at_pixels(run, rule, gradient)

    def _at_pixels(self, run: Run, rule: Rule, gradient: Tensor) -> Tensor:
        """The relevance of pixels; a model's own normalization does not change what the first layers' rule gives."""
        entrance = run.tape.entrance if getattr(rule, "divides", False) else None
        if entrance is None:
            return rule.relevance(gradient, run.images.unsqueeze(1))
        pixels, slope = (tensor.to(gradient).unsqueeze(1) for tensor in entrance)
        return rule.relevance(torch.where(slope == 0, 0, gradient / slope), pixels)

    def coverage(self, run: Run) -> Coverage:
        found = run.tape.coverage(self.rule())  # not that of the audit, which looks at every site
        return replace(found, conservation=self._audited(run)[1]) if self.audit else found

    def _audited(self, run: Run) -> tuple[Tensor, Conservation]:
        rule = self.rule()

        def compute() -> tuple[Tensor, Conservation]:
            count, targets = run.scores.shape
            audits = [[_Audited(rule) for _ in range(targets)] for _ in range(count)]
            gradient = torch.stack(
                [torch.stack([run.gradient_of_one(n, k, audits[n][k]) for k in range(targets)]) for n in range(count)]
            )
            return gradient, _conservation(audits, run.scores, self._at_pixels(run, rule, gradient))

        return run.once(("audited", rule), compute)

    def expected(self, run: Run) -> Tensor | None:
        return run.scores


@register_method(
    "lrp",
    summary="Layer-wise relevance propagation with rules of your choice, layer by layer",
    reference="Bach et al., PLoS ONE 2015; Montavon et al. 2019",
)
@dataclass(frozen=True, kw_only=True)
class LRP(_Relevance):
    """Pairs (where, rule): see `attrbox.rules.lrp.composites.Composite` and the rules of `attrbox.rules.lrp.layers`."""

    places: Places = option(
        (), "pairs (first, last, convolution, linear, batch_norm, any or module name; rule); else epsilon"
    )

    def rule(self) -> Composite:
        return Composite(self.places, self.stabiliser)


@dataclass(frozen=True, kw_only=True)
class _EpsilonAtLinear(_Relevance):
    epsilon: float = option(1e-6, _EPSILON)

    def convolutions(self) -> Places:
        """The rules at convolutions."""
        raise NotImplementedError

    def rule(self) -> Composite:
        return Composite((*self.convolutions(), ("linear", Epsilon(self.epsilon))), self.stabiliser)


@register_method(
    "epsilon_plus",
    summary="LRP: positive products (z+) at convolutions, epsilon at linear layers",
    reference="Montavon et al. 2019; Kohlbrenner et al., IJCNN 2020",
    aliases=("lrp_epsilon_plus",),
)
@dataclass(frozen=True, kw_only=True)
class EpsilonPlus(_EpsilonAtLinear):
    """z+ at convolutions, epsilon at linear layers."""

    def convolutions(self) -> Places:
        return (("convolution", ZPlus()),)


@register_method(
    "epsilon_alpha2_beta1",
    summary="LRP: twice the positive less the negative products at convolutions, epsilon at linear layers",
    reference="Bach et al., PLoS ONE 2015, equation 60; Kohlbrenner et al., IJCNN 2020",
    aliases=("lrp_epsilon_alpha2_beta1",),
)
@dataclass(frozen=True, kw_only=True)
class EpsilonAlpha2Beta1(_EpsilonAtLinear):
    """alpha-beta (2, 1) at convolutions, epsilon at linear layers."""

    def convolutions(self) -> Places:
        return (("convolution", AlphaBeta(2.0, 1.0)),)


@register_method(
    "epsilon_gamma_box",
    summary="LRP: z-box at the first layer, gamma at other convolutions, epsilon at linear layers",
    reference="Montavon et al. 2019, section 10.3",
    aliases=("lrp_epsilon_gamma_box",),
)
@dataclass(frozen=True, kw_only=True)
class EpsilonGammaBox(_EpsilonAtLinear):
    """z-box, gamma, epsilon."""

    gamma: float = option(0.25, "how much positive products weigh more")
    low: float | tuple[float, ...] | None = option(None, _LOW)
    high: float | tuple[float, ...] | None = option(None, _HIGH)

    def convolutions(self) -> Places:
        return (("first", ZBox(self.low, self.high)), ("convolution", Gamma(self.gamma)))


@register_method(
    "deep_taylor",
    summary="LRP: positive products without biases; the first layer by the box or the squares of weights",
    reference="Montavon et al., Pattern Recognition 2017",
)
@dataclass(frozen=True, kw_only=True)
class DeepTaylor(_Relevance):
    """Of the positive part of the score."""

    first: str = option("z_box", "rule of the first layer: z_box for bounded pixels, w_square for unbounded input")
    low: float | tuple[float, ...] | None = option(None, _LOW)
    high: float | tuple[float, ...] | None = option(None, _HIGH)

    def __post_init__(self) -> None:
        check_choice("first", self.first, ("z_box", "w_square"))
        super().__post_init__()

    def rule(self) -> Composite:
        first = ZBox(self.low, self.high) if self.first == "z_box" else WSquare()
        return Composite((("first", first), ("any", ExcitationBackprop())), self.stabiliser)

    def attribute(self, run: Run) -> Tensor:
        values = super().attribute(run)
        positive = run.scores > 0
        return values * positive.view(*positive.shape, *(1,) * (values.dim() - 2))

    def expected(self, run: Run) -> Tensor | None:
        return run.scores.clamp(min=0)


@register_method(
    "excitation_backprop",
    summary="Excitation backpropagation: winning probability, by positive products without biases",
    reference="Zhang et al., ECCV 2016, equation 5; contrastive: section 3.3",
    aliases=("EBP",),
    units="probability",
)
@dataclass(frozen=True, kw_only=True)
class Excitation(_Relevance):
    """The relevance of a score of 1; contrastive: less that of the same score with the last layer's weights negated."""

    contrastive: bool = option(False, "subtract the map of what speaks against the class")

    def __post_init__(self) -> None:
        check_flag("contrastive", self.contrastive)
        if self.contrastive and self.audit:
            raise OptionError("Expected audit=False with contrastive=True: it is the difference of two propagations.")
        super().__post_init__()

    def rule(self) -> Composite:
        return Composite((("any", ExcitationBackprop()),), self.stabiliser)

    @property
    def against(self) -> Composite:
        """The composite of the map that is subtracted."""
        return Composite((("last", ExcitationBackprop(negated=True)), *self.rule().places), self.stabiliser)

    @property
    def rules(self) -> tuple[Rule | None, ...]:
        return (*super().rules, self.against) if self.contrastive else super().rules

    def attribute(self, run: Run) -> Tensor:
        values = super().attribute(run)
        if self.contrastive:
            values = values - self._at_pixels(run, self.against, run.gradient(self.against))
        return values / nonzero(run.scores).view(*run.scores.shape, *(1,) * (values.dim() - 2))

    def expected(self, run: Run) -> Tensor | None:
        return None if self.contrastive else torch.ones_like(run.scores)


@register_method(
    "attn_lrp",
    summary="LRP for transformers: through attention, norms and gates; epsilon or gamma at layers",
    reference="Achtibat et al., ICML 2024",
    aliases=("AttnLRP",),
)
@dataclass(frozen=True, kw_only=True)
class AttnLRP(_Relevance):
    """Epsilon at all layers as published for language; with gammas as published for vision transformers."""

    epsilon: float = option(1e-6, "stabiliser, in units of the activation")
    gamma_convolution: float = option(0.0, "gamma at convolutions (0.25 suits vision transformers); 0: epsilon")
    gamma_linear: float = option(0.0, "gamma at linear layers (0.05 suits vision transformers); 0: epsilon")

    def rule(self) -> Rule:
        check_number("gamma_convolution", self.gamma_convolution, least=0)
        check_number("gamma_linear", self.gamma_linear, least=0)
        if not (self.gamma_convolution or self.gamma_linear):
            return LRPEpsilon(self.epsilon)  # the same where layers are followed by activations, and faster
        gammas = (("convolution", self.gamma_convolution), ("linear", self.gamma_linear))
        places = tuple((kind, Gamma(gamma) if gamma else Epsilon(self.epsilon)) for kind, gamma in gammas)
        return Composite(places, self.stabiliser)
