"""Activations that the model writes over."""

import pytest
import torch
import torch.nn.functional as F
from nets import images, seeded
from rule_cases import ALL, RULES, Spelling, replayed

from attrbox.engine.tape import record


def _write_over_input(z):
    y = torch.relu(z)  # keeps its result only, so autograd allows writing over its input
    z.zero_()
    return y + z


def _write_over_output(z):
    y = F.gelu(z)  # keeps its input only, so autograd allows writing over its output
    y += z
    return y


def _write_into_a_view(z):
    z[:, :1].relu_()
    return z


def _write_through_a_flat_view(z):
    z.view(-1).clamp_(-0.5, 1.0)
    return z


def _chain_in_place(z):
    return F.mish(F.hardswish(F.silu(z, inplace=True), inplace=True), inplace=True)


def _write_over_factor(z):
    gate = z.mean((2, 3), keepdim=True).sigmoid()
    y = z.relu_()
    y = y * gate
    return F.relu(y.add_(1), inplace=True)


def _shift_between(z):
    return torch.relu_(F.hardswish(z, inplace=True).sub_(0.5))


WRITERS = [
    _write_over_input,
    _write_over_output,
    _write_into_a_view,
    _write_through_a_flat_view,
    _chain_in_place,
    _write_over_factor,
    _shift_between,
]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: writer.__name__.strip("_"))
def test_activations_that_the_model_writes_over(writer, rule):
    model = seeded(lambda: Spelling(writer, drop=False)).requires_grad_(False)
    x, x0, seed = images(3, 5, seed=31), images(3, 5, seed=32), images(3, 3, seed=33)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((model(leaf) * seed).sum(), leaf)
    tape = record(model, x, ALL)
    assert torch.equal(tape.output, model(x))
    got = replayed(model, x, seed, RULES[rule], x0, recorded_with=ALL)
    if rule == "gradient":
        assert torch.equal(got, gradient)
    if rule == "deeplift":
        expected = ((model(x) - model(x0)) * seed).sum(1)
        torch.testing.assert_close(((x - x0) * got).sum(1), expected, rtol=1e-9, atol=1e-10)
    if rule != "gradient":  # the same net with nothing in place
        pure = seeded(lambda: Spelling(PURE[writer], drop=False)).requires_grad_(False)
        torch.testing.assert_close(pure(x), model(x), rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(got, replayed(pure, x, seed, RULES[rule], x0), rtol=1e-11, atol=1e-12)


def _pure_factor(z):
    return F.relu(torch.relu(z) * torch.sigmoid(z.mean((2, 3), keepdim=True)) + 1)


PURE = {
    _write_over_input: torch.relu,
    _write_over_output: lambda z: F.gelu(z) + z,
    _write_into_a_view: lambda z: torch.cat([torch.relu(z[:, :1]), z[:, 1:]], 1),
    _write_through_a_flat_view: lambda z: z.clamp(-0.5, 1.0),
    _chain_in_place: lambda z: F.mish(F.hardswish(F.silu(z))),
    _write_over_factor: _pure_factor,
    _shift_between: lambda z: torch.relu(F.hardswish(z) - 0.5),
}
