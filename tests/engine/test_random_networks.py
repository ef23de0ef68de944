"""Random networks keep every promise: 200 here, thousands by benchmarks/nightly_networks.py."""

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from network_promises import BrokenError, cases, check

from attrbox.rules.deeplift import DeepLift

PARTS, EACH = 4, 50


def promises(part: int, examples: int) -> None:
    """Check that many random networks; a failure shrinks to a few lines."""

    @seed(part)
    @settings(
        max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=False
    )
    @given(cases())
    def kept(case):
        check(case)

    kept()


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")  # of torch, once a process
@pytest.mark.parametrize("part", range(PARTS))
def test_random_networks_keep_every_promise(part):
    promises(part, EACH)


def test_a_wrong_slope_is_caught_and_told_as_a_program(monkeypatch):
    original = DeepLift.propagate

    def wrong(self, site, grad_output):
        found = original(self, site, grad_output)
        return found * 1.001 if site.kind == "relu" and isinstance(found, torch.Tensor) else found

    monkeypatch.setattr(DeepLift, "propagate", wrong)
    with pytest.raises(BrokenError, match="deeplift misses") as caught:
        promises(0, 30)
    assert "class Net(nn.Module)" in str(caught.value)
    assert len(str(caught.value).splitlines()) < 70
