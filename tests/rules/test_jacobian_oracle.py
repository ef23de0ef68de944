"""Rules against a slow oracle.

The oracle multiplies explicit Jacobians of the linear parts with multipliers written anew as scalar formulas
(`oracles`), for a random gradient at the output."""

import oracles
import pytest
import torch
import torch.nn.functional as F
from nets import images
from rule_cases import CASES, EPSILON, RULES, Case, Sandwich, replayed, sandwich
from torch import Tensor, nn

import attrbox
from attrbox.engine.site import KINDS, Rule
from attrbox.rules.deeplift import DeepLift
from attrbox.rules.guided import Deconvnet, GuidedBackprop
from attrbox.rules.lrp.activations import LRPEpsilon


def test_every_kind_of_site_has_a_case():
    assert {case.kind for case in CASES.values()} == KINDS
    assert set(oracles.RECTIFIERS) == attrbox.engine.site.RECTIFIERS
    assert set(oracles.SQUASHERS) == attrbox.engine.site.SQUASHERS
    assert set(oracles.FUNCTIONS) == attrbox.engine.site.FUNCTIONS


BATCH = 3


def by_oracle(model: Sandwich, case: Case, rule: str, x: Tensor, x0: Tensor, seed: Tensor) -> Tensor:
    """Jacobian of what is behind, the rule's multiplier, Jacobian of what is before; sample by sample."""
    jacobian = torch.autograd.functional.jacobian
    expected = []
    for sample, reference, upstream in zip(x, x0.expand_as(x), seed, strict=True):
        z, z0 = (model.before(t[None])[0] for t in (sample, reference))
        y = case.operation(z[None].clone())[0]
        at_y = torch.tensordot(upstream, jacobian(lambda t: model.after(t[None])[0], y), 1)
        at_z = case.oracle(rule, z, z0, at_y)
        to_z = jacobian(lambda t: model.before(t[None])[0], sample)
        expected.append(torch.tensordot(at_z, to_z, at_z.dim()))
    return torch.stack(expected)


def check(rule_name: str, case: Case, rule: Rule | None, per_sample: bool = False, create_graph: bool = False) -> None:
    """Assert that `rule` does at this operation what the oracle for `rule_name` says."""
    model = sandwich(case.operation, case.shape, case.conv)
    x, seed = 2 * images(BATCH, 5, seed=11), images(BATCH, 3, seed=12)
    x0 = 2 * images(BATCH if per_sample else 1, 5, seed=13)
    got = replayed(model, x, seed, rule, x0, create_graph)
    torch.testing.assert_close(got, by_oracle(model, case, rule_name, x, x0, seed), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", CASES)
def test_a_rule_does_what_its_formula_says(rule, name):
    check(rule, CASES[name], RULES[rule])


@pytest.mark.parametrize("name", CASES)
def test_deeplift_does_what_its_formula_says_with_a_reference_per_sample(name):
    check("deeplift", CASES[name], DeepLift(), per_sample=True)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["relu", "relu, in place", "gelu", "max_pool2d", "product", "softmax", "sigmoid"])
def test_a_differentiable_replay_gives_the_same_values(rule, name):
    check(rule, CASES[name], RULES[rule], create_graph=True)


class Distorted(Rule):
    """Another rule, with its result distorted a little at one kind of site."""

    def __init__(self, rule: Rule, kind: str):
        self.rule, self.kind = rule, kind
        self.kinds, self.needs = rule.kinds, rule.needs

    def needs_at(self, kind):
        return self.rule.needs_at(kind)

    def propagate(self, site, grad_output):
        result = self.rule.propagate(site, grad_output)
        if site.kind != self.kind:
            return result
        return tuple(r * (1 + 1e-6) for r in result) if isinstance(result, tuple) else result * (1 + 1e-6)


COVERED = [
    (rule, name)
    for name, case in CASES.items()
    for rule, instance in RULES.items()
    if instance is not None and case.kind in instance.kinds
]


@pytest.mark.parametrize(("rule", "name"), COVERED)
def test_the_oracle_notices_a_distorted_rule(rule, name):
    with pytest.raises(AssertionError, match="not close"):
        check(rule, CASES[name], Distorted(RULES[rule], CASES[name].kind))


@pytest.mark.parametrize(
    ("rule", "name", "impostor"),
    [
        ("gradient", "relu", GuidedBackprop()),
        ("guided_backprop", "relu", Deconvnet()),
        ("guided_backprop", "relu", None),
        ("deconvnet", "relu", GuidedBackprop()),
        ("lrp_epsilon", "relu", LRPEpsilon(EPSILON * 1.001)),
        ("lrp_epsilon", "tanh", LRPEpsilon(EPSILON * 1.001)),
        ("lrp_epsilon", "product", None),
        ("deeplift", "relu", None),
        ("deeplift", "max_pool2d, overlapping", None),
        ("deeplift", "softmax", None),
        ("deeplift", "product", None),
    ],
)
def test_the_oracle_notices_a_rule_of_another_name(rule, name, impostor):
    with pytest.raises(AssertionError, match="not close"):
        check(rule, CASES[name], impostor)


@pytest.mark.parametrize(
    "reach",
    [
        lambda gate: gate.view(-1, 2, 1, 1),
        lambda gate: gate[:, :, None, None].expand(-1, -1, 3, 3),
        lambda gate: gate.unsqueeze(2).unsqueeze(3),
        lambda gate: 1 - (1 - gate).view(-1, 2, 1, 1),
        lambda gate: torch.ones_like(gate).sub(torch.rsub(gate, torch.ones_like(gate)))[:, :, None, None],
        lambda gate: torch.stack(gate.chunk(2, 1), 1)[..., None],
        lambda gate: torch.cat([gate[:, :1], gate.select(1, 1)[:, None]], 1)[..., None, None],
        lambda gate: torch.stack(gate.unbind(1), 1).roll(2, 1).flip(0).flip(0)[..., None, None],
        lambda gate: F.interpolate(gate[..., None, None], scale_factor=3),
    ],
    ids=["view", "expand", "unsqueeze", "complement", "tensor complement", "chunk", "select", "unbind", "upsample"],
)
def test_a_gate_is_known_behind_a_change_of_shape_and_as_a_complement(reach):
    # The usual way to write squeeze-and-excitation with linear layers: all relevance goes to the signal.
    class Gated(nn.Module):
        def forward(self, x):
            gate = x[:, :2].sigmoid()
            return (x[:, 2:].reshape(-1, 2, 3, 3) * reach(gate)).flatten(1)

    x = images(2, 20)
    relevance = attrbox.explain(Gated().eval(), x, "lrp_epsilon", target=lambda out: out.sum(1)).values
    signal = x[:, 2:].reshape(-1, 2, 9) * x[:, :2].sigmoid()[:, :, None]
    torch.testing.assert_close(relevance[:, :2], torch.zeros(2, 2, dtype=x.dtype))
    torch.testing.assert_close(relevance[:, 2:], signal.flatten(1))


@pytest.mark.parametrize("through", ["the view", "its base"])
@pytest.mark.parametrize("method", ["lrp_epsilon", "epsilon_plus", "attn_lrp"])
def test_a_gate_written_into_a_view_is_a_gate(method, through):
    class Gated(nn.Module):
        def forward(self, x):
            gate = x[:, :2] + 0
            view = gate.T
            view.sigmoid_()
            return x[:, 2:] * (view.T if through == "the view" else gate)

    class Plain(nn.Module):
        def forward(self, x):
            return x[:, 2:] * x[:, :2].sigmoid()

    x = images(2, 4)
    wanted = attrbox.explain(Plain().eval(), x, method, target=0, progress=False).values
    torch.testing.assert_close(attrbox.explain(Gated().eval(), x, method, target=0, progress=False).values, wanted)
