"""DeepLIFT, Rescale and RevealCancel, completed for what does not act element by element: pools, softmax, norms, ...

Shrikumar et al., ICML 2017, equation 11: the multiplier of a non-linearity is the slope between the reference and
the input,

    m = (f(x) - f(x0)) / (x - x0),     f'(x) where x = x0

Then the attributions (image - baseline) * multiplier sum to score(image) - score(baseline), if every operation on the
way passes differences on exactly. So operations that do not act element by element get exact multipliers too:

    product    d(ab)   = da (b + b0) / 2 + db (a + a0) / 2                                        (midpoint)
    max-pool   y >= y0: all of y - y0 to the winner of the input, else to the winner of the reference
    softmax    p_i = exp(x_i - L(x)), L = log sum exp:   d(p_i) = m_i (dx_i - dL),   dL = sum_j w_j dx_j
               with m_i, w_j the slopes of exp and of log(sum exp)                                (rescale, twice)

    quotient   y = a/b:   dy = (da - db (y + y0) / 2) / m,   m = (b + b0) / 2                (midpoint of a = y b)
    matmul     whatever is linear in each of two activations: its derivative at the midpoint of both
    maximum    max(a, b) = b + relu(a - b):   d = da m + db (1 - m),   m the slope of the ReLU
    norm       y = c/s, c = x - mean(x), s^2 = mean(c^2) + eps: a quotient, with ds = mean((c + c0) dc) / (s + s0)
    length     s = sqrt(sum x^2):   ds = sum (x + x0) dx / (s + s0)
    log-softmax and log-sum-exp as in the softmax

A quotient could also be taken as the product with 1/b; but at a reference where b is next to nothing, such as a norm of
a black image, multipliers would then be huge and cancel. That form is left to denominators of two signs.

RevealCancel (ibid., section 3.5.3) tells the contributions that raise a neuron from those that lower it, so that they
do not cancel out of sight. A layer A(x; w) and the activation f behind it are one there, of z = A(x; w, b):

    p, n = the sums of the positive and the negative w_i dx_i                                    (p + n = z - z0)
    m+ = (f(z0 + p) - f(z0) + f(z) - f(z0 + n)) / 2p,    m- = (f(z0 + n) - f(z0) + f(z) - f(z0 + p)) / 2n
    G_x_i = sum of w_i m+ G where w_i dx_i > 0, of w_i m- G where w_i dx_i < 0, of w_i (m+ + m-) G / 2 where dx_i = 0

m+ and m- are means of two slopes each. They sum to all of f(z) - f(z0), so completeness stays exact.

The max-pool is the split of DeepSHAP by winners, |y - y0| <= |x - x0| there, so the multiplier is in [0, 1]; windows
may overlap.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attrbox.engine.site import (
    ELEMENTWISE,
    KINDS,
    LAYERS,
    AxesInfo,
    FunctionInfo,
    Gradients,
    LayerInfo,
    NormInfo,
    PairInfo,
    PoolInfo,
    Rule,
    Site,
)
from attrbox.errors import OptionError, shown
from attrbox.rules.lrp.norms import normed, weighted

_JUMPING = frozenset("hardshrink threshold".split())
_KINKED = frozenset("relu relu6 leaky_relu prelu hardtanh hardsigmoid abs softshrink elu selu celu hardswish".split())
_STEEP_AT_0 = frozenset("power log".split())
_NOT_ZERO_AT_0 = frozenset("sigmoid hardsigmoid softplus logsigmoid exp cos".split())
# The layers that get RevealCancel with the activation behind them, by option.
_REVEALED = {
    "none": frozenset[str](),
    "linear": frozenset({"linear"}),
    "all": frozenset({"linear", "convolution"}),
}


@dataclass(frozen=True)
class DeepLift(Rule):
    """The slope between reference and input at every known non-linearity (Rescale), or RevealCancel at some.

    `reveal_cancel` says behind which layers: "none", "linear" (as published for genomics: Rescale behind
    convolutions), or "all", that is, linear layers and convolutions. It is defined where such a layer's output goes
    into one activation and nowhere else; all other non-linearities keep Rescale. The coverage lists the layers.

    Raises:
        OptionError: a model has no such place at all.
    """

    reveal_cancel: str = "none"

    kinds = KINDS
    needs = frozenset({"input", "reference"})
    by_rows = True

    def __post_init__(self) -> None:
        if self.reveal_cancel not in _REVEALED:
            raise OptionError(
                f"Expected reveal_cancel to be {', '.join(map(repr, _REVEALED))}, got {shown(self.reveal_cancel)}."
            )
        object.__setattr__(self, "kinds", type(self).kinds | _REVEALED[self.reveal_cancel])

    def needs_at(self, kind: str) -> frozenset[str]:
        return self.needs | {"derivative"} if kind in ELEMENTWISE else self.needs

    def treats(self, site: Site) -> bool:
        return site.kind in self.kinds and (not isinstance(site.info, LayerInfo) or site.info.activation is not None)

    def check(self, sites: Sequence[Site]) -> None:
        revealed = _REVEALED[self.reveal_cancel]
        if revealed and not any(site.kind in revealed and self.treats(site) for site in sites):
            layers = " or ".join(sorted(revealed))
            raise OptionError(
                f"RevealCancel is defined where an activation alone takes the output of a {layers} layer, which "
                f"nothing in this model does. Use reveal_cancel={'all' if layers == 'linear' else 'none'!r}."
            )

    def propagate(self, site: Site, grad_output: Tensor) -> Gradients:
        if site.kind in LAYERS:
            return _reveal_cancel(site, grad_output)
        if exact := _EXACT.get(site.kind):
            return exact(site, grad_output)
        if site.about(FunctionInfo).layer in self.kinds:  # done at the layer
            return grad_output
        return _slope(site).mul_(grad_output)


def _slope(site: Site) -> Tensor:
    x, x0 = site.input, site.reference_input
    bounds = site.about(FunctionInfo).bounds
    if bounds and not torch.is_grad_enabled():
        low, high = bounds
        return _share_between(low, high, x, x0)
    change = x - x0
    flat = change.abs() <= _near(site.kind, x, x0)
    # Where nothing changed at a point of infinite slope, such as the root of 0, nothing is attributed.
    between = site.at(torch.where(flat, (x + x0) / 2, x)).derivative()
    between = torch.where((change == 0) & ~between.isfinite(), 0, between)
    return torch.where(flat, between, (site.output - site.reference_output) / change.masked_fill(flat, 1.0))


def _near(kind: str, x: Tensor, x0: Tensor) -> Tensor:
    """How close x and x0 must be for the derivative between them to be the better slope.

    The quotient of differences loses digits to rounding, eps f / (x - x0); the derivative halfway errs by
    f''' (x - x0)^2 / 24. Both are equal about the cube root of eps, times the scale on which the function varies: that
    of x for powers and logarithms, 1 for all others. Those that are 0 at 0 are exact there, so the quotient serves them
    on a smaller scale too. Between lies no kink, or next to none of it, and no jump.
    """
    eps = torch.finfo(x.dtype).eps
    if kind in _JUMPING:
        return x.new_zeros(())
    scale = torch.maximum(x.abs(), x0.abs())
    if kind in _NOT_ZERO_AT_0:
        scale = torch.ones_like(scale)
    elif kind not in _STEEP_AT_0:
        scale = scale.clamp(max=1)
    return scale.mul(eps**0.5 if kind in _KINKED else eps ** (1 / 3))


def _reveal_cancel(site: Site, grad_output: Tensor) -> Tensor:
    layer = site.about(LayerInfo)
    apply, activation = layer.apply, layer.activation
    assert activation is not None
    x, x0 = site.input, site.reference_input
    weight, bias = layer.weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype)
    twice = torch.is_grad_enabled()
    with torch.enable_grad():
        change = x - x0 if twice and x.requires_grad else (x - x0).detach().requires_grad_()
        up, down = weight.clamp(min=0), weight.clamp(max=0)
        raising, lowering = change.clamp(min=0), change.clamp(max=0)
        p = apply(raising, up, None) + apply(lowering, down, None)
        n = apply(raising, down, None) + apply(lowering, up, None)
    z0 = apply(x0, weight, bias)

    def slope(start: Tensor, end: Tensor) -> Tensor:
        return _slope(activation.with_tensors((end,), None, (start,), site.rule))

    rise = (slope(z0, z0 + p) + slope(z0 + n, z0 + n + p)) / 2
    fall = (slope(z0, z0 + n) + slope(z0 + p, z0 + p + n)) / 2
    to_raising, to_lowering = torch.autograd.grad(
        [p, n], [raising, lowering], [rise * grad_output, fall * grad_output], create_graph=twice
    )
    return torch.where(change > 0, to_raising, torch.where(change < 0, to_lowering, (to_raising + to_lowering) / 2))


def _share_between(low: float, high: float, x: Tensor, x0: Tensor) -> Tensor:
    """The slope of ReLU and its like: which share of the way from x0 to x lies between their bounds.

    It is the share above `low` less the share above `high`, and needs no case for x = x0: there the quotients are
    +-infinity, so that 1 or 0 remains. Half the passes over memory of the general formula, as it works in place.
    """
    limits = torch.finfo(x.dtype)
    distance = (x - x0).abs_().add_(limits.tiny)
    upper = torch.maximum(x, x0)
    if high == torch.inf:
        return upper.sub_(low).div_(distance).clamp_(0, 1) if low else upper.div_(distance).clamp_(0, 1)
    below = high - max(abs(high) * limits.eps, limits.tiny)  # so that x = x0 = high counts as above, as in f'
    above = (upper - below).div_(distance).clamp_(0, 1)
    return upper.sub_(low).div_(distance).clamp_(0, 1).sub_(above)


def _max_pool(site: Site, grad_output: Tensor) -> Tensor:
    dims, pool = site.about(PoolInfo).dims, site.about(PoolInfo).pool
    x, x0 = site.input, site.reference_input
    (y, winner), (y0, winner0) = pool(x), pool(x0)
    change = (x - x0).flatten(-dims)
    rises = y >= y0
    place = torch.where(rises, winner, winner0).flatten(-dims)
    at_place = change.gather(-1, place)
    flat = at_place == 0  # then y = y0 as well
    multiplier = torch.where(flat, 1.0, (y - y0).flatten(-dims) / at_place.masked_fill(flat, 1.0))
    passed = (grad_output.flatten(-dims) * multiplier).to(change.dtype)
    return torch.zeros_like(change).scatter_add(-1, place, passed).view(x.shape)


def _softmax(site: Site, grad_output: Tensor) -> Tensor:
    dim = site.about(AxesInfo).dim
    below, below0, weight = _level(site.input, site.reference_input, dim)
    through = grad_output * _exp_slope(below, below0)  # of p_i in x_i - L
    return through - weight * through.sum(dim, keepdim=True)


def _log_softmax(site: Site, grad_output: Tensor) -> Tensor:
    dim = site.about(AxesInfo).dim
    *_, weight = _level(site.input, site.reference_input, dim)
    return grad_output - weight * grad_output.sum(dim, keepdim=True)


def _logsumexp(site: Site, grad_output: Tensor) -> Tensor:
    *_, weight = _level(site.input, site.reference_input, site.about(AxesInfo).dim)
    return weight * _kept(site, grad_output)


def _level(x: Tensor, x0: Tensor, dim: Any) -> tuple[Tensor, Tensor, Tensor]:
    """x - L(x), x0 - L(x0), and the slopes of L = log sum exp in each x_j.

    All from values without their common level, which would cost their digits.
    """
    (below, level), (below0, level0) = _below(x, dim), _below(x0, dim)
    rise = level - level0
    # The sum under the logarithm, scaled by its larger value so that nothing overflows.
    up, down = rise.clamp(min=0), rise.clamp(max=0)
    log_slope = 1 / _exp_slope(down, -up)  # of L in sum_j exp(x_j - max(L, L0))
    return below, below0, log_slope * _exp_slope(below + down, below0 - up)


def _below(x: Tensor, dim: Any) -> tuple[Tensor, Tensor]:
    """x - L(x) and L(x)."""
    axes = tuple(range(x.dim())) if dim is None else dim
    top = x.amax(axes, keepdim=True)
    top = torch.where(top.isfinite(), top, 0)  # of rows that are masked out as a whole
    centered = x - top
    rest = centered.logsumexp(axes, keepdim=True)
    return centered - rest, top + rest


def _kept(site: Site, reduced: Tensor) -> Tensor:
    """What a reduction returned, with the reduced axes as 1."""
    dim = site.about(AxesInfo).dim
    if site.about(AxesInfo).keepdim:
        return reduced
    dims = range(site.input.dim()) if dim is None else (dim,) if isinstance(dim, int) else dim
    for axis in sorted(axis % site.input.dim() for axis in dims):
        reduced = reduced.unsqueeze(axis)
    return reduced


def _exp_slope(a: Tensor, b: Tensor) -> Tensor:
    """(exp(a) - exp(b)) / (a - b), exp(a) where they meet; by expm1, so exact for close values, and never too large."""
    flat = a == b  # also where both are -infinity: masked out
    distance = (a - b).masked_fill(flat, 1.0).abs()
    return torch.exp(torch.maximum(a, b)) * torch.where(flat, 1.0, -torch.expm1(-distance) / distance)


def _product(site: Site, grad_output: Tensor) -> Gradients:
    (a, b), (a0, b0) = site.inputs, site.reference_inputs
    return grad_output * ((b + b0) / 2), grad_output * ((a + a0) / 2)


def _quotient(site: Site, grad_output: Tensor) -> Gradients:
    (a, b), (a0, b0) = site.inputs, site.reference_inputs
    same = b * b0 > 0
    middle = torch.where(same, (b + b0) / 2, 1.0)
    to_a = torch.where(same, 1 / middle, (1 / b + 1 / b0) / 2)
    to_b = torch.where(same, -(a / b + a0 / b0) / (2 * middle), -(a + a0) / (2 * b * b0))
    return grad_output * to_a, grad_output * to_b


def _matmul(site: Site, grad_output: Tensor) -> Gradients:
    pairs = zip(site.inputs, site.reference_inputs, strict=True)
    return site.at(*((here + there) / 2 for here, there in pairs)).true_gradient(grad_output)


def _maximum(site: Site, grad_output: Tensor) -> Gradients:
    (a, b), (a0, b0) = site.inputs, site.reference_inputs
    sign = site.about(PairInfo).sign
    lead, lead0 = (a - b) * sign, (a0 - b0) * sign
    flat = lead == lead0
    rise = (lead.clamp(min=0) - lead0.clamp(min=0)) / (lead - lead0).masked_fill(flat, 1.0)
    share = torch.where(flat, (lead > 0).to(rise.dtype), rise)
    return grad_output * share, grad_output * (1 - share)


def _vector_norm(site: Site, grad_output: Tensor) -> Tensor:
    x, x0 = site.input, site.reference_input
    lengths = _kept(site, site.output) + _kept(site, site.reference_output)
    return _kept(site, grad_output) * (x + x0) / lengths.masked_fill(lengths == 0, 1.0)


def _norm(site: Site, grad_output: Tensor) -> Tensor:
    x, x0 = site.input, site.reference_input
    c, s = normed(site, x)
    c0, s0 = normed(site, x0 if x0.shape[1:] == x.shape[1:] else x0.expand_as(x))
    g, scale = weighted(site, grad_output), 2 / (s + _tiled(s0, s))
    share = (g * (c / s + _tiled(c0 / s0, c))).mean(1, keepdim=True)  # twice that of ds
    g = g * scale - (c + _tiled(c0, c)) * (share * (scale / 2) ** 2)
    if site.about(NormInfo).centered:
        g = g - g.mean(1, keepdim=True)
    return g.view(grad_output.shape)


def _tiled(there: Tensor, here: Tensor) -> Tensor:
    """Rows of a shared reference, once for each image."""
    return there if len(there) == len(here) else there.repeat(len(here) // len(there), 1)


_EXACT: dict[str, Callable[[Site, Tensor], Gradients]] = {
    "product": _product,
    "quotient": _quotient,
    "matmul": _matmul,
    "maximum": _maximum,
    "max_pool": _max_pool,
    "softmax": _softmax,
    "log_softmax": _log_softmax,
    "logsumexp": _logsumexp,
    "norm": _norm,
    "vector_norm": _vector_norm,
}
