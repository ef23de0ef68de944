"""Models that draw random numbers are named so by every method, and what hides nothing is told."""

import random
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from contracts import METHODS, explain
from nets import images, relu_net, seeded
from torch import nn

import attrbox
from attrbox.core.results import Operated
from attrbox.errors import NothingHiddenWarning

X = images(2, 3, 8, 8)


class Dropping(nn.Module):
    """Dropout that training mode does not switch off."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)
        self.drop, self.how = nn.Module(), how
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x):
        x = self.conv(x).relu()
        if self.how == "dropout":
            x = F.dropout(x, 0.5, training=True)
        elif self.how == "rand_like":
            x = x * (torch.rand_like(x) > 0.5)
        elif self.how == "bernoulli_":
            x = x * torch.empty_like(x).bernoulli_(0.5)
        elif self.how == "off":
            x = F.dropout(x, 0.5, training=False)
        elif self.how == "numpy":
            x = x * torch.as_tensor(np.random.rand(4, 1, 1)).to(x)  # noqa: NPY002
        elif self.how == "python":
            x = x * random.random()
        elif self.how == "held generator":
            x = x * torch.rand(4, 1, 1, generator=self.generator, dtype=x.dtype)
        elif self.how == "own generator":
            x = x * torch.rand(4, 1, 1, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("method", METHODS)
def test_random_models_are_named_in_the_coverage(method):
    coverage = explain(seeded(lambda: Dropping("dropout")), X, method).coverage
    assert coverage.random == (Operated("dropout", "", 0),)
    assert "RANDOM: 1 dropout" in str(coverage)
    assert explain(seeded(lambda: Dropping("off")), X, method).coverage.random == ()


@pytest.mark.parametrize(("how", "name"), [("rand_like", "rand_like"), ("bernoulli_", "bernoulli_")])
def test_other_draws(how, name):
    maps = attrbox.compare(seeded(lambda: Dropping(how)), X, ["integrated_gradients", "rise"], progress=False)
    assert [operated.operation.strip("_") for operated in maps["rise"].coverage.random] == [name.strip("_")]
    assert maps["integrated_gradients"].coverage.random == maps["rise"].coverage.random


@pytest.mark.parametrize("method", ["saliency", "deeplift", "integrated_gradients", "occlusion", "rise"])
@pytest.mark.parametrize(
    ("how", "name"), [("numpy", "random numbers"), ("python", "random numbers"), ("held generator", "rand")]
)
def test_numbers_of_other_sources(method, how, name):
    model = seeded(lambda: Dropping(how))
    states = random.getstate(), np.random.get_state()[1].tolist(), model.generator.get_state()  # noqa: NPY002
    coverage = explain(model, X, method).coverage
    assert [operated.operation for operated in coverage.random] == [name]
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]  # noqa: NPY002
    assert torch.equal(model.generator.get_state(), states[2])


def test_draws_of_a_seeded_generator_are_not_random():
    assert explain(seeded(lambda: Dropping("own generator")), X, "saliency").coverage.random == ()


def test_the_user_goes_on_with_the_same_random_numbers():
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    explain(seeded(lambda: Dropping("dropout")), X, "integrated_gradients")
    assert torch.equal(torch.rand(2), wanted)


def test_doctor_calls_them_approximate():
    finding = attrbox.doctor(seeded(lambda: Dropping("dropout")), X, ["saliency"])["saliency"]
    assert finding.verdict == "approximate"


BLANK = torch.cat([X[:1], torch.full_like(X[:1], 0.3), torch.zeros_like(X[:1])])
QUARTERS = torch.arange(4).view(2, 2).repeat_interleave(4, 0).repeat_interleave(4, 1)


@pytest.mark.parametrize(
    ("method", "options", "blank"),
    [
        ("lime", {"segments": QUARTERS}, [1, 2]),
        ("kernel_shap", {"segments": QUARTERS, "fill": "segment"}, [1, 2]),
        ("occlusion", {"fill": 0.3}, [1]),
        ("occlusion", {"fill": 0.0}, [2]),
        ("rise", {"fill": 0.0}, [2]),
    ],
)
def test_a_fill_that_hides_nothing_is_told(method, options, blank):
    with pytest.warns(NothingHiddenWarning, match=re.escape(f"changes nothing in the images {blank}:")):
        maps = explain(relu_net(), BLANK, method, target=1, **options)
    if method in ("lime", "occlusion"):
        torch.testing.assert_close(maps.values[blank], torch.zeros_like(maps.values[blank]))
