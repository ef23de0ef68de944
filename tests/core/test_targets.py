"""Targets: every spelling, and every way to get one wrong."""

from collections import OrderedDict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nets import images, vector_net
from torch import nn

import attrbox
from attrbox.core.outputs import Outputs, unwrap
from attrbox.core.targets import Target
from attrbox.errors import ModelError, TargetError

X = images(3, 7)
OUT = torch.tensor([[0.0, 3.0, 1.0], [5.0, 2.0, 1.0], [1.0, 1.0, 4.0]])
ALL = slice(None)


@pytest.mark.parametrize(
    ("target", "indices"),
    [
        (None, [[1], [0], [2]]),
        (2, [[2], [2], [2]]),
        (np.int64(2), [[2], [2], [2]]),
        (torch.tensor(2), [[2], [2], [2]]),
        ([0, 1, 2], [[0], [1], [2]]),
        ((0, 1, 2), [[0], [1], [2]]),
        (np.array([0, 1, 2]), [[0], [1], [2]]),
        (torch.tensor([0, 1, 2], dtype=torch.int32), [[0], [1], [2]]),
        (attrbox.classes([2, 0]), [[2, 0]] * 3),
        (attrbox.classes([[2, 0], [1, 1], [0, 2]]), [[2, 0], [1, 1], [0, 2]]),
        (attrbox.classes(np.array([2, 0])), [[2, 0]] * 3),
        (attrbox.top(2), [[1, 2], [0, 1], [2, 0]]),
    ],
)
def test_spellings(target, indices):
    resolved = Target(target, 3).resolve(Outputs(OUT, 3), ALL)
    if isinstance(target, attrbox.top):
        resolved, indices = resolved[:2], indices[:2]  # the third sample has a tie
    assert resolved.tolist() == indices
    if not isinstance(target, attrbox.top):
        assert (
            Target(target, 3).score(Outputs(OUT, 3), resolved).tolist() == OUT.gather(1, torch.tensor(indices)).tolist()
        )


def test_rows_of_a_chunk():
    assert Target([0, 1, 2], 3).resolve(Outputs(OUT[1:], 2), slice(1, 3)).tolist() == [[1], [2]]
    assert Target(attrbox.classes([[2, 0], [1, 1], [0, 2]]), 3).resolve(Outputs(OUT[2:], 1), slice(2, 3)).tolist() == [
        [0, 2]
    ]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (3, "from 0 to 2"),
        (-1, "from 0 to 2"),
        ([0, 1, 3], "from 0 to 2"),
        (attrbox.classes([0, 7]), "from 0 to 2"),
        (attrbox.top(4), "K <= 3"),
        (attrbox.top(0), "K >= 1"),
        (attrbox.top(1.5), "K >= 1"),
        ([0, 1], "3 in all, got 2"),
        ([], "3 in all, got 0"),
        ([[0, 1], [1, 2], [0, 0]], "attrbox.classes"),
        (attrbox.classes([[0], [1]]), "3 samples, got 2"),
        (attrbox.classes([]), "shape"),
        (attrbox.classes(3), "shape"),
        (torch.tensor([0.0, 1.0, 2.0]), "whole numbers"),
        (torch.tensor([True, False, True]), "whole numbers"),
        (1.5, "class index"),
        (True, "class index"),
        ("cat", "class index"),
        ([0, "cat", 1], "class index"),
        ([0, [1], 2], "class index"),
        ({0: 1}, "class index"),
    ],
)
def test_wrong_targets(target, message):
    with pytest.raises(TargetError, match=message):
        Target(target, 3).resolve(Outputs(OUT, 3), ALL)


@pytest.mark.parametrize(
    "result", [lambda out: out.sum(), lambda out: 3.0, lambda out: out[:2, 0], lambda out: out[None]]
)
def test_wrong_target_functions(result):
    with pytest.raises(TargetError, match="return 3 scores"):
        attrbox.explain(vector_net(), X, "saliency", target=result, progress=False)


def test_a_target_function_with_several_scores():
    maps = attrbox.explain(vector_net(), X, "saliency", target=lambda out: out[:, :2], progress=False)
    wanted = attrbox.explain(vector_net(), X, "saliency", target=attrbox.classes([0, 1]), progress=False)
    assert torch.equal(maps.values, wanted.values)
    assert maps.target is None


@pytest.mark.parametrize(
    "wrap",
    [
        lambda out: out,
        lambda out: SimpleNamespace(logits=out, loss=None),
        lambda out: {"logits": out, "hidden": out * 2},
        lambda out: OrderedDict(out=out, aux=out * 2),
        lambda out: {"scores": out},
        lambda out: (out, out * 2),
        lambda out: [out],
    ],
)
def test_unwrapping(wrap):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = vector_net()

        def forward(self, x):
            return wrap(self.inner(x))

    for method in ("saliency", "deeplift", "integrated_gradients"):
        values = attrbox.explain(Wrapped(), X, method, progress=False).values
        torch.testing.assert_close(values, attrbox.explain(vector_net(), X, method, progress=False).values)


@pytest.mark.parametrize(
    "output", [None, 3.0, "cat", {}, (), {"a": OUT, "b": OUT}, (None, OUT), OUT.long(), {"logits": 1}]
)
def test_no_tensor_in_the_output(output):
    with pytest.raises(ModelError, match="floating-point tensor of scores"):
        unwrap(output)


def test_one_score_per_sample_needs_no_class():
    class Regression(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = vector_net()

        def forward(self, x):
            return self.inner(x)[:, 1]

    values = attrbox.explain(Regression(), X, "saliency", progress=False).values
    assert torch.equal(values, attrbox.explain(vector_net(), X, "saliency", target=1, progress=False).values)


def test_dense_outputs_need_a_function():
    class Segmentation(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x):
            return {"out": self.conv(x)}

    model, x = Segmentation().eval(), torch.randn(2, 3, 6, 6)
    with pytest.raises(TargetError, match="function as the target"):
        attrbox.explain(model, x, "saliency", target=1, progress=False)
    maps = attrbox.explain(model, x, "saliency", target=lambda out: out["out"][:, 1].mean((1, 2)), progress=False)
    with pytest.warns(FutureWarning, match="out\\['out'\\]"):  # what version 0.1 took
        older = attrbox.explain(model, x, "saliency", target=lambda out: out[:, 1].mean((1, 2)), progress=False)
    assert torch.equal(maps.values, older.values)
