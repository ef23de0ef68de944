"""Random networks keep every promise: 200 here, thousands by benchmarks/nightly_networks.py."""

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from network_blocks import BLOCKS, ONE_BRANCH, STEPS
from network_promises import AUDITED, BASELINES, BrokenError, Case, cases, check, check_and_shrink, shrunk
from random_networks import SPELLINGS, Network
from torch import Tensor

import attrbox.engine.operations.products as products
import attrbox.engine.operations.table as table
from attrbox.engine.site import Gradients, Site
from attrbox.errors import UnsupportedModelError
from attrbox.rules.deeplift import DeepLift
from attrbox.rules.guided import GuidedBackprop

PARTS, EACH = 4, 50
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")  # of torch


@pytest.mark.parametrize("part", range(PARTS))
def test_random_networks_keep_every_promise(part: int) -> None:
    @seed(part)
    @settings(
        max_examples=EACH,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(cases())
    def kept(case: Case) -> None:
        check_and_shrink(case)

    kept()


def fitting(name: str) -> Network:
    """A small network with this step."""
    two = () if name in ONE_BRANCH else (("conv 1x1",),)
    step = name if name in STEPS else (name, ("conv 1x1", "relu"), *two)
    for shape in ((4, 7), (4, 6, 4), (6,)):
        for before in (("conv", "relu"), ("tokens",), ("conv 1x1", "relu", "dropout")):
            network = Network(shape, (*before, step, "tanh"), len(name))
            if name in network.used:
                return network
    raise AssertionError(f"{name} fits nowhere")


@pytest.mark.parametrize("name", [*STEPS, *BLOCKS])
def test_every_step_keeps_the_promises(name: str) -> None:
    place = [*STEPS, *BLOCKS].index(name)
    network, baseline, audited = fitting(name), list(BASELINES)[place % 5], AUDITED[place % len(AUDITED)]
    for spelling in SPELLINGS[1:]:
        check(Case(network, spelling, baseline, audited))


def test_failures_shrink_to_the_steps_that_they_need() -> None:
    inner = ("concatenated", ("abs", ("residual", ("sin", "softmax"))), ("max_pool", "tanh"))
    case = Case(Network((3, 6, 5), ("conv", "relu", ("product", ("gelu", inner), ("abs",)), "tokens")))
    small = shrunk(case, lambda case: "softmax" in case.network.used[1:])
    assert len(small.network.steps) == 2
    assert small.network.steps[1] == "softmax"


def wrong_slope(patch: pytest.MonkeyPatch) -> None:
    original = DeepLift.propagate

    def propagate(self: DeepLift, site: Site, grad_output: Tensor) -> Gradients:
        found = original(self, site, grad_output)
        return found * 1.001 if site.kind == "relu" and isinstance(found, Tensor) else found

    patch.setattr(DeepLift, "propagate", propagate)


def other_rule_in_modules(patch: pytest.MonkeyPatch) -> None:
    original = GuidedBackprop.propagate

    def propagate(self: GuidedBackprop, site: Site, grad_output: Tensor) -> Gradients:
        return original(self, site, grad_output if site.module else 2 * grad_output)

    patch.setattr(GuidedBackprop, "propagate", propagate)


def wrong_transposition(patch: pytest.MonkeyPatch) -> None:
    def pull(site: Site, grad_output: Tensor) -> Gradients:
        first, second = site.inputs
        return grad_output @ second.mT, (grad_output.mT @ first).reshape(second.shape)

    patch.setattr(products, "_matmul_pull", pull)


def forgotten_operation(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(table, "_LINEAR", table._LINEAR - {"flatten"})


@pytest.mark.parametrize(
    ("fault", "claim"),
    [
        (wrong_slope, "deeplift misses"),
        (other_rule_in_modules, "guided_backprop is another map written functional"),
        (wrong_transposition, "saliency is not autograd's gradient"),
        (forgotten_operation, "refused: "),
    ],
)
def test_a_fault_is_caught_and_told_as_a_program(fault, claim, monkeypatch, capsys) -> None:
    fault(monkeypatch)
    with pytest.raises(BrokenError) as caught:
        check(Case(Network((3, 6, 5), ("conv", "relu", "tokens", "attention"), 1)))
    program = str(caught.value)
    assert claim in program.splitlines()[0]
    assert len(program.splitlines()) < 80
    if fault is forgotten_operation:
        with pytest.raises(UnsupportedModelError, match="flatten"):
            exec(program, {})
    else:
        exec(program, {})
        assert "tensor(" in capsys.readouterr().out
