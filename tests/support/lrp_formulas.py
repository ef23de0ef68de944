"""LRP rules as their formulas say it."""

import torch
from torch import Tensor, nn

from attrbox.engine.tape import record
from attrbox.rules.lrp.composites import Composite
from attrbox.rules.lrp.layers import (
    LayerRule,
)


def matrix(layer: nn.Module, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(M [outputs, inputs], b [outputs]) with y = M x + b, by automatic differentiation."""
    zero = torch.zeros(1, *shape, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: layer(x).flatten(), zero)
    return jacobian.reshape(jacobian.shape[0], -1), layer(zero).detach().flatten()


def by_alpha_beta(alpha, beta):
    def oracle(m, b, x, r):
        products = m * x
        up = shared(pos(products), pos(b), r, STABILISER)
        return alpha * up - beta * shared(neg(products), neg(b), r, STABILISER) if beta else alpha * up

    return oracle


def by_gamma(m, b, x, r):
    products, y = m * x, m @ x + b
    up, down = products + 0.4 * pos(products), products + 0.4 * neg(products)
    risen = shared(up, b + 0.4 * pos(b), torch.where(y > 0, r, 0 * r), STABILISER)
    return risen + shared(down, b + 0.4 * neg(b), torch.where(y < 0, r, 0 * r), STABILISER)


def relevance_of(rule: LayerRule, layer: nn.Module, x: Tensor, relevance: Tensor, before=None) -> Tensor:
    """x * G_x for the relevance y * G_y."""
    composite = Composite((("any", rule),), STABILISER)
    model = nn.Sequential(before, layer) if before else layer
    tape = record(model.requires_grad_(False).eval(), x, [composite])
    output = tape.output
    seed = (relevance.view(output.shape) / output).detach()
    (gradient,) = tape.replay((output * seed).flatten(1).sum(1), [tape.images], composite)
    return composite.relevance(gradient, x)


STABILISER = 0.03  # large, so that a wrong one shows


def pos(t: Tensor) -> Tensor:
    return torch.where(t > 0, t, torch.zeros_like(t))


def neg(t: Tensor) -> Tensor:
    return t - pos(t)


def shared(products: Tensor, bias: Tensor, relevance: Tensor, epsilon: float) -> Tensor:
    """Each output's relevance by the products [outputs, inputs] that make it; the bias keeps its share."""
    return (products * (relevance / stab(products.sum(1) + bias, epsilon))[:, None]).sum(0)


def stab(z: Tensor, epsilon: float) -> Tensor:
    return torch.tensor([v + (epsilon if v >= 0 else -epsilon) for v in z.tolist()], dtype=z.dtype)
