"""Rules of layer-wise relevance propagation at convolutions and linear layers.

A layer y = A(x; w, b) passes the relevance R = y * G that reaches its output on to its input through one or more flows.
A flow is a layer of the same form with other inputs u and weights v, several of which may add up:

    z = sum_t A(u_t; v_t, b_t),     S = share * R / (z + epsilon sign(z)),     R_x = sum_t u_t * A^T(v_t) S

    epsilon      u = x, v = w                                              Bach et al., PLoS ONE 2015, equation 58
    alpha-beta   positive products x+ w+ + x- w-, share alpha;             ibid., equation 60
                 negative ones x+ w- + x- w+, share -beta
    z+           alpha 1, beta 0                                           Montavon et al., Pattern Recognition 2017
    gamma        where y > 0, x+ (w + gamma w+) + x- (w + gamma w-);       Montavon et al. 2019, section 10.2.1;
                 where y < 0, x+ (w + gamma w-) + x- (w + gamma w+)        for inputs of both signs Andeol et al. 2021
    z-box        x w - low w+ - high w-, for pixels between low and high   Montavon et al. 2017, section 4.3
    w-square     u = 1, v = w^2                                            ibid., section 4.1
    flat         u = 1, v = 1                                              Lapuschkin et al. 2019

x+ and w+ are the positive, x- and w- the negative parts. The bias counts as one more input of 1; it keeps its share.

Relevance travels as gradient, G_x = R_x / x. The last three rules give relevance to inputs of 0 as well: there the
quotient is taken by `nonzero(x)`, and whoever multiplies by the input does so by the same.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attrbox.core.validation import check_number
from attrbox.engine.site import LayerInfo, Site
from attrbox.errors import OptionError


def nonzero(x: Tensor) -> Tensor:
    """x, and where it is 0, a number so small that it is lost in any sum."""
    return torch.where(x == 0, torch.finfo(x.dtype).tiny ** 0.5, x)


@dataclass(frozen=True, eq=False)
class Term:
    """One u with its A(u; v, b), and what u is in units of x (None: apart from x)."""

    input: Tensor
    output: Tensor
    ratio: Tensor | float | None
    bias: Tensor | None


@dataclass(frozen=True, eq=False)
class Flow:
    """Terms that share relevance; `share` of it is theirs."""

    terms: tuple[Term, ...]
    share: Tensor | float = 1.0

    @property
    def total(self) -> Tensor:
        """z."""
        return sum((term.output for term in self.terms[1:]), self.terms[0].output)


@dataclass(frozen=True, eq=False)
class Losses:
    """Relevance that a layer keeps: its bias's share, the stabiliser's, and that of outputs without products to pass
    it on to (all of them clamped away)."""

    bias: Tensor
    stabiliser: Tensor
    clamp: Tensor


class Layer:
    """A site of a layer, taken apart for rules."""

    def __init__(self, site: Site) -> None:
        self.x = site.input
        info = site.about(LayerInfo)
        self.weight = info.weight.to(self.x.dtype)
        self.bias = None if info.bias is None else info.bias.to(self.x.dtype)
        self.nonnegative, self.axis, self._apply = info.nonnegative, info.axis, info.apply
        self.plain = self.term(self.x, self.weight, self.bias, 1.0)

    def term(self, u: Tensor, weight: Tensor, bias: Tensor | None, ratio: Tensor | float | None) -> Term:
        u = u if u.requires_grad and torch.is_grad_enabled() else u.detach().requires_grad_()
        with torch.enable_grad():
            return Term(u, self._apply(u, weight, bias), ratio, bias)

    def by_channel(self, values: Tensor) -> Tensor:
        """Values [C] as they meet inputs and outputs."""
        return values.view(-1, *(1,) * (-1 - self.axis))

    def signed(self, up: Tensor, down: Tensor, bias: Tensor | None) -> tuple[Term, ...]:
        """x+ `up` + x- `down`; the second term only where x may be negative."""
        if self.nonnegative:
            return (self.term(self.x, up, bias, 1.0),)
        positive = self.x > 0
        return (
            self.term(self.x.clamp(min=0), up, bias, positive.to(self.x.dtype)),
            self.term(self.x.clamp(max=0), down, None, (~positive).to(self.x.dtype)),
        )


class LayerRule(ABC):
    """How a layer passes relevance on: frozen dataclasses with their options."""

    divides: ClassVar[bool] = False  # whether it gives relevance to inputs of 0

    @abstractmethod
    def flows(self, layer: Layer) -> tuple[Flow, ...]:
        """The flows of a layer."""

    def propagate(self, site: Site, grad_output: Tensor, stabiliser: float) -> Tensor:
        """G_x of G_y."""
        layer = Layer(site)
        gradient = torch.zeros_like(layer.x)
        for flow, passed in self._passed(layer, grad_output, stabiliser):
            inputs = [term.input for term in flow.terms]
            found = torch.autograd.grad(
                [term.output for term in flow.terms],
                inputs,
                [passed] * len(inputs),
                create_graph=torch.is_grad_enabled(),
                retain_graph=True,
            )
            for term, pulled in zip(flow.terms, found, strict=True):
                ratio = term.input / nonzero(layer.x) if term.ratio is None else term.ratio
                gradient = gradient + (pulled if isinstance(ratio, float) else ratio * pulled)
        return gradient

    def _passed(self, layer: Layer, grad_output: Tensor, stabiliser: float) -> Iterator[tuple[Flow, Tensor]]:
        """The flows, and S of each."""
        relevance = grad_output * layer.plain.output
        for flow in self.flows(layer):
            yield flow, flow.share * relevance / stabilised(flow.total, self.stabiliser(stabiliser))

    def losses(self, site: Site, grad_output: Tensor, stabiliser: float) -> Losses:
        """What the layer keeps, of the shape of its output."""
        layer = Layer(site)
        relevance = grad_output * layer.plain.output
        bias, small, clamp = (torch.zeros_like(grad_output) for _ in range(3))
        unclaimed = relevance
        for flow, passed in self._passed(layer, grad_output, stabiliser):
            kept = flow.share * relevance - passed * flow.total
            clamp = clamp + torch.where(flow.total == 0, kept, 0.0)
            small = small + torch.where(flow.total == 0, 0.0, kept)
            unclaimed = unclaimed - flow.share * relevance
            for term in flow.terms:
                if term.bias is not None:
                    bias = bias + passed * layer.by_channel(term.bias)
        return Losses(bias, small, clamp + unclaimed)

    def stabiliser(self, default: float) -> float:
        """The epsilon of the denominators."""
        return default


def stabilised(z: Tensor, epsilon: float) -> Tensor:
    """z + epsilon sign(z), sign(0) = 1, sign(-0) = -1."""
    return z + torch.copysign(z.new_tensor(epsilon), z)


def _positive(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.clamp(min=0)


def _negative(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.clamp(max=0)


@dataclass(frozen=True)
class Epsilon(LayerRule):
    """R_x = x A^T(w) R / (y + epsilon sign(y)); epsilon in units of the layer's output."""

    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        check_number("epsilon", self.epsilon, above=0)

    def flows(self, layer: Layer) -> tuple[Flow, ...]:
        return (Flow((layer.plain,)),)

    def stabiliser(self, default: float) -> float:
        return self.epsilon


@dataclass(frozen=True)
class AlphaBeta(LayerRule):
    """alpha of the positive products, -beta of the negative ones; alpha - beta = 1."""

    alpha: float = 2.0
    beta: float = 1.0

    def __post_init__(self) -> None:
        check_number("alpha", self.alpha, above=0)
        check_number("beta", self.beta, least=0)
        if not math.isclose(self.alpha - self.beta, 1.0):
            raise OptionError(f"Expected alpha - beta = 1, so that relevance is conserved, got {self}.")

    def flows(self, layer: Layer) -> tuple[Flow, ...]:
        up, down = layer.weight.clamp(min=0), layer.weight.clamp(max=0)
        positive = Flow(layer.signed(up, down, _positive(layer.bias)), self.alpha)
        if not self.beta:
            return (positive,)
        return positive, Flow(layer.signed(down, up, _negative(layer.bias)), -self.beta)


@dataclass(frozen=True)
class ZPlus(AlphaBeta):
    """The positive products alone: alpha 1, beta 0."""

    alpha: float = 1.0
    beta: float = 0.0


@dataclass(frozen=True)
class ExcitationBackprop(LayerRule):
    """z+ without the bias (Zhang et al., ECCV 2016, equation 5): all relevance stays with the inputs.

    `negated`: of the weights with their signs turned, what speaks against an output (ibid., section 3.3).
    """

    negated: bool = False

    def flows(self, layer: Layer) -> tuple[Flow, ...]:
        weight = -layer.weight if self.negated else layer.weight
        return (Flow(layer.signed(weight.clamp(min=0), weight.clamp(max=0), None)),)


@dataclass(frozen=True)
class Gamma(LayerRule):
    """Positive products weighted by 1 + gamma where the output is positive, negative ones where it is negative."""

    gamma: float = 0.25

    def __post_init__(self) -> None:
        check_number("gamma", self.gamma, least=0)

    def flows(self, layer: Layer) -> tuple[Flow, ...]:
        w, b, y = layer.weight, layer.bias, layer.plain.output
        up, down = w + self.gamma * w.clamp(min=0), w + self.gamma * w.clamp(max=0)
        biases = (None, None) if b is None else (b + self.gamma * b.clamp(min=0), b + self.gamma * b.clamp(max=0))
        return (
            Flow(layer.signed(up, down, biases[0]), (y > 0).to(y.dtype)),
            Flow(layer.signed(down, up, biases[1]), (y < 0).to(y.dtype)),
        )


@dataclass(frozen=True)
class ZBox(LayerRule):
    """For pixels between `low` and `high`: numbers, or one per channel; None: of each image, per channel (of vectors:
    over their features)."""

    low: float | Sequence[float] | None = None
    high: float | Sequence[float] | None = None
    divides = True

    def flows(self, layer: Layer) -> tuple[Flow, ...]:
        x, w, b = layer.x, layer.weight, layer.bias
        axes = tuple(range(layer.axis + 1, 0)) or (-1,)  # without positions, over the features
        low = x.amin(axes, keepdim=True) if self.low is None else _bound(self.low, layer)
        high = x.amax(axes, keepdim=True) if self.high is None else _bound(self.high, layer)
        box = (
            layer.term(-low.detach().expand_as(x), w.clamp(min=0), None if b is None else -_some(_positive(b)), None),
            layer.term(-high.detach().expand_as(x), w.clamp(max=0), None if b is None else -_some(_negative(b)), None),
        )
        return (Flow((layer.plain, *box)),)


@dataclass(frozen=True)
class WSquare(LayerRule):
    """By the squares of the weights, whatever the input."""

    divides = True

    def flows(self, layer: Layer) -> tuple[Flow, ...]:
        bias = None if layer.bias is None else layer.bias**2
        return (Flow((layer.term(torch.ones_like(layer.x), layer.weight**2, bias, None),)),)


@dataclass(frozen=True)
class Flat(LayerRule):
    """To all inputs of an output alike."""

    divides = True

    def flows(self, layer: Layer) -> tuple[Flow, ...]:
        return (Flow((layer.term(torch.ones_like(layer.x), torch.ones_like(layer.weight), None, None),)),)


def _bound(bound: float | Sequence[float], layer: Layer) -> Tensor:
    return layer.by_channel(torch.as_tensor(bound, dtype=layer.x.dtype, device=layer.x.device))


def _some(values: Tensor | None) -> Tensor:
    assert values is not None
    return values
