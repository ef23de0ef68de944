"""DeepLIFT, Rescale rule, completed for max-pools, softmax and products.

Shrikumar et al., ICML 2017, equation 11: the multiplier of a non-linearity is the slope between the reference and
the input,

    m = (f(x) - f(x0)) / (x - x0),     f'(x) where x = x0

Then the attributions (image - baseline) * multiplier sum to score(image) - score(baseline), if every operation on the
way passes differences on exactly. So three operations that do not act element by element get exact multipliers too:

    product    d(ab)   = da (b + b0) / 2 + db (a + a0) / 2                                        (midpoint)
    max-pool   y >= y0: all of y - y0 to the winner of the input, else to the winner of the reference
    softmax    p_i = exp(x_i - L(x)), L = log sum exp:   d(p_i) = m_i (dx_i - dL),   dL = sum_j w_j dx_j
               with m_i, w_j the slopes of exp and of log(sum exp)                                (rescale, twice)

The max-pool is the split of DeepSHAP by winners, |y - y0| <= |x - x0| there, so the multiplier is in [0, 1]; windows
may overlap.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from attrbox.engine.site import KINDS, Gradients, Rule, Site


@dataclass(frozen=True)
class DeepLift(Rule):
    """The slope between reference and input at every known non-linearity."""

    kinds = KINDS
    needs = frozenset({"input", "reference"})
    by_rows = True

    def needs_at(self, kind: str) -> frozenset[str]:
        return self.needs | {"derivative"} if kind not in ("product", "max_pool", "softmax") else self.needs

    def propagate(self, site: Site, grad_output: Tensor) -> Gradients:
        if site.kind == "product":
            (a, b), (a0, b0) = site.inputs, site.reference_inputs
            return grad_output * ((b + b0) / 2), grad_output * ((a + a0) / 2)
        if site.kind == "max_pool":
            return _max_pool(site, grad_output)
        if site.kind == "softmax":
            return _softmax(site, grad_output)
        return _slope(site).mul_(grad_output)


def _slope(site: Site) -> Tensor:
    x, x0 = site.input, site.reference_input
    bounds = site.options.get("bounds")
    if bounds and not torch.is_grad_enabled():
        low, high = bounds
        return _share_between(low, high, x, x0)
    change = x - x0
    # Rounding makes the quotient of a smooth function useless where x is close to x0; the derivative errs by
    # f'' * (x - x0) there, which is less. The quotient of straight lines is exact.
    flat = change.abs() <= (0.0 if bounds else torch.finfo(x.dtype).eps ** 0.5)
    return torch.where(flat, site.derivative(), (site.output - site.reference_output) / change.masked_fill(flat, 1.0))


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
    dims, pool = site.options["dims"], site.options["pool"]
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
    dim = site.options["dim"]
    x, x0 = site.input, site.reference_input
    level, level0 = x.logsumexp(dim, keepdim=True), x0.logsumexp(dim, keepdim=True)
    slope = _exp_slope(x - level, x0 - level0)  # of p_i in x_i - L
    # The sum under the logarithm, scaled by its larger value so that nothing overflows.
    top = torch.maximum(level, level0)
    log_slope = 1 / _exp_slope(level - top, level0 - top)  # of L in sum_j exp(x_j - top)
    weight = log_slope * _exp_slope(x - top, x0 - top)
    through = grad_output * slope
    return through - weight * through.sum(dim, keepdim=True)


def _exp_slope(a: Tensor, b: Tensor) -> Tensor:
    """(exp(a) - exp(b)) / (a - b), exp(a) where they meet; by expm1, so exact for close values, and never too large."""
    distance = (a - b).abs()
    flat = distance == 0
    return torch.exp(torch.maximum(a, b)) * torch.where(
        flat, 1.0, -torch.expm1(-distance) / distance.masked_fill(flat, 1.0)
    )
