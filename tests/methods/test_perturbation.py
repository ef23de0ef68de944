"""Occlusion, RISE, LIME, KernelSHAP: closed forms, slow formulas, black boxes of all kinds, what they refuse."""

import itertools
import math
import sys

import numpy as np
import pytest
import torch
from nets import images, relu_net, residual_net
from snapshots import nothing_changes
from torch import Tensor, nn

import attrbox
from attrbox.core.fills import FILLS, fill_images, gaussian_blur, median_blur
from attrbox.errors import InputError, ModelError, OptionError, TargetError
from attrbox.methods.perturbation.superpixels import cells, means, quickshift

BLACK_BOX = {
    "occlusion": {"window": 3, "stride": 2},
    "rise": {"n_samples": 7, "grid": 3},
    "lime": {"n_samples": 9, "segments": 2},
    "kernel_shap": {"n_samples": 10, "segments": 3},
}
W = torch.tensor([4.0, 3.0, 2.0, -1.0], dtype=torch.float64)
ROWS = torch.tensor([[1.0, 1.0, 1.0, 1.0], [2.0, -1.0, 0.5, 3.0]], dtype=torch.float64)
START = torch.tensor([0.5, 1.0, -2.0, 0.0], dtype=torch.float64)
EACH = torch.arange(4)  # every feature a superpixel of its own


def linear(x: Tensor) -> Tensor:
    return x @ W + 0.5


def explain(model: object, x: Tensor, method: str, **options: object) -> attrbox.Attribution:
    return attrbox.explain(model, x, method, **({"progress": False} | BLACK_BOX.get(method, {}) | options))


class Recorder:
    """A black box that keeps the images it saw; it looks at the way it is called, too."""

    def __init__(self, function=linear) -> None:
        self.function = function
        self.seen: list[Tensor] = []

    def __call__(self, x: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        assert not x.requires_grad
        assert x.is_contiguous()
        self.seen.append(x.clone())
        return self.function(x)


# ------------------------------------------------------------------------------------------------- 1. linear models


@pytest.mark.parametrize(
    ("method", "options", "start"),
    [
        ("occlusion", {"window": 1, "stride": 1}, 0.0),
        ("occlusion", {"window": 1, "stride": 1, "fill": START}, START),
        ("occlusion", {"window": 1, "stride": 1, "fill": 2.0}, 2.0),
        ("kernel_shap", {"segments": EACH, "n_samples": None}, 0.0),
        ("kernel_shap", {"segments": EACH, "n_samples": None, "fill": START}, START),
        ("lime", {"segments": EACH, "ridge": 0.0, "n_samples": 40, "fill": 0.0}, 0.0),
        ("lime", {"segments": EACH, "ridge": 0, "n_samples": 40, "fill": START}, START),
    ],
)
def test_contributions_of_a_linear_model(method, options, start):
    values = explain(linear, ROWS, method, target=0, score="logit", **options).values
    torch.testing.assert_close(values, W * (ROWS - start), rtol=1e-9, atol=1e-9)


def test_rise_on_a_linear_model_in_expectation():
    """E S_i = b + c_i + p sum of the other c_j: closed form 13 of the literature's example."""
    options = {"target": 0, "score": "logit", "grid": 4, "n_samples": 20_000, "batch_size": 1000}
    maps = explain(linear, ROWS[:1], "rise", **options)
    expected = torch.tensor([[6.5, 6.0, 5.5, 4.0]], dtype=torch.float64)
    assert (maps.values - expected).abs().max() < 0.25  # five standard errors
    assert maps.values.argsort().tolist() == expected.argsort().tolist()
    signed = explain(linear, ROWS, "rise", p=0.25, center=True, **options)
    assert (signed.values - 0.75 * W * ROWS).abs().max() < 0.2
    rare = explain(linear, ROWS[:1], "rise", p=0.25, **options)
    assert (rare.values - torch.tensor([[5.5, 4.75, 4.0, 1.75]])).abs().max() < 0.4  # b + c_i + p (8 - c_i)


# -------------------------------------------------------------------------------------- slow formulas, independent code


def picture(*sides: int) -> Tensor:
    return images(2, 3, *sides, seed=5)


def total(x: Tensor) -> Tensor:
    """A black box with an interaction."""
    flat = x.flatten(1)
    return torch.stack([flat.sum(1) + flat[:, 0] * flat[:, -1], flat.prod(1)], 1)


def test_occlusion_window_by_window():
    x = picture(7, 6)
    values = explain(total, x, "occlusion", target=0, window=(3, 2), stride=(2, 3)).values
    sums = explain(total, x, "occlusion", target=0, window=(3, 2), stride=(2, 3), overlap="sum").values
    expected, count = torch.zeros(2, 1, 7, 6, dtype=torch.float64), torch.zeros(7, 6)
    for top, left in itertools.product((0, 2, 4), (0, 3, 4)):  # the last window of a row ends at the border
        hidden = x.clone()
        hidden[:, :, top : top + 3, left : left + 2] = 0
        expected[:, 0, top : top + 3, left : left + 2] += (total(x) - total(hidden))[:, :1, None]
        count[top : top + 3, left : left + 2] += 1
    torch.testing.assert_close(sums, expected)
    assert (count == 0).any()  # column 2 is never hidden
    torch.testing.assert_close(values, expected / count.clamp_min(1))


def test_occlusion_needs_one_pass_per_window_and_one():
    box = Recorder(total)
    explain(box, picture(9, 9), "occlusion", target=0, window=3, stride=3, batch_size=4)
    assert sum(map(len, box.seen)) == 2 * (9 + 1)
    assert max(map(len, box.seen)) <= 4


@pytest.mark.parametrize(("sides", "grid"), [((9, 7), 3), ((8, 8), 8), ((10,), 3), ((4, 5, 6), 2)])
def test_rise_is_the_mean_of_masks_weighted_by_scores(sides, grid):
    box = Recorder(total)
    x = torch.ones(1, 1, *sides, dtype=torch.float64)  # so that the black box sees the masks
    maps = explain(box, x, "rise", target=0, score="logit", n_samples=40, grid=grid, p=0.3, batch_size=7)
    masks = torch.cat(box.seen[1:])
    assert len(masks) == 40
    expected = (total(masks)[:, :1] * masks.flatten(1)).mean(0) / 0.3
    torch.testing.assert_close(maps.values.flatten(), expected)
    options = {"score": "logit", "n_samples": 40, "grid": grid, "p": 0.3, "center": True}
    signed = explain(total, x, "rise", target=0, **options).values
    scores = total(masks)[:, :1]
    torch.testing.assert_close(signed.flatten(), ((scores - scores.mean()) * masks.flatten(1)).mean(0) / 0.3)
    assert masks.min() >= 0
    assert masks.max() <= 1
    assert abs(masks.mean() - 0.3) < 0.1
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) > 10
    if grid == sides[0]:
        assert set(masks.unique().tolist()) == {0.0, 1.0}
    else:
        assert ((masks > 0) & (masks < 1)).any()


def test_rise_masks_are_smooth_grids_and_shifted():
    box = Recorder(total)
    explain(box, torch.ones(1, 1, 40, 40, dtype=torch.float64), "rise", target=0, score="logit", n_samples=60, grid=4)
    masks = torch.cat(box.seen[1:])[:, 0]
    assert masks.diff(dim=1).abs().max() <= 1 / 10 + 1e-9  # a cell of 10 pixels, stretched to 12.5
    # Where the masks rise from 0 to 1 depends on their shift.
    rises = {int(row.diff().abs().argmax()) for row in masks[:, 20]}
    assert len(rises) > 8


def test_lime_is_the_weighted_ridge_regression():
    box = Recorder(lambda x: torch.stack([x @ W + x[:, 0] * x[:, 1], x[:, 2]], 1))
    x = torch.ones(1, 4, dtype=torch.float64)
    options = {"segments": EACH, "fill": 0.0, "score": "logit", "n_samples": 30, "width": 0.5, "ridge": 0.7}
    maps = explain(box, x, "lime", target=attrbox.classes([0, 1]), **options)
    z = torch.cat(box.seen[1:])
    assert z[0].tolist() == [1, 1, 1, 1]
    distance = 1 - z.sum(1).sqrt() / 2
    weight = torch.exp(-(distance**2) / 0.5**2).sqrt()
    design = torch.cat([z, torch.ones(30, 1, dtype=torch.float64)], 1)
    penalty = 0.7 * torch.diag(torch.tensor([1.0, 1, 1, 1, 0], dtype=torch.float64))
    left = design.T @ (weight[:, None] * design) + penalty
    scores = box.function(z)
    solution = torch.linalg.solve(left, design.T @ (weight[:, None] * scores))
    torch.testing.assert_close(maps.values[0], solution[:4].T)
    torch.testing.assert_close(maps.details["intercept"][0], solution[4])
    left_over = weight[:, None] * (scores - design @ solution) ** 2
    mean = (weight[:, None] * scores).sum(0) / weight.sum()
    r2 = 1 - left_over.sum(0) / (weight[:, None] * (scores - mean) ** 2).sum(0)
    torch.testing.assert_close(maps.details["fit"][0], r2)


@pytest.mark.parametrize(
    ("function", "x", "expected"),
    [
        (lambda x: x[:, 0] * x[:, 1], (2.0, 3.0), (3.0, 3.0)),
        (lambda x: x.amax(1), (3.0, 1.0), (2.5, 0.5)),
        (lambda x: x[:, 0] * x[:, 1] * x[:, 2], (2.0, 3.0, 1.0), (2.0, 2.0, 2.0)),
        (lambda x: x[:, 0] ** 2, (3.0,), (9.0,)),
    ],
)
def test_shapley_values_by_hand(function, x, expected):
    row = torch.tensor([x], dtype=torch.float64)
    maps = explain(function, row, "kernel_shap", target=0, n_samples=None, segments=torch.arange(len(x)))
    torch.testing.assert_close(maps.values, torch.tensor([expected], dtype=torch.float64))
    assert maps.details["exact"].tolist() == [True]


def game(d: int) -> tuple[Recorder, Tensor]:
    """A game with contributions, pairs and a triple, and its Shapley values."""
    single, pair = images(d, seed=1), images(d, d, seed=2)
    pair = (pair + pair.T) / 8
    pair.fill_diagonal_(0)

    def play(x: Tensor) -> Tensor:
        return x @ single + 0.5 * ((x @ pair) * x).sum(1) + 3 * x[:, 0] * x[:, 1] * x[:, 2]

    shapley = single + pair.sum(1) / 2
    shapley[:3] += 1
    return Recorder(play), shapley


def test_kernel_shap_by_sampling():
    box, shapley = game(14)
    x = torch.ones(1, 14, dtype=torch.float64)
    errors = {}
    for samples in (200, 2000):
        box.seen.clear()
        maps = explain(box, x, "kernel_shap", target=0, segments=torch.arange(14), n_samples=samples)
        assert maps.details["exact"].tolist() == [False]
        torch.testing.assert_close(maps.values.sum(), box.function(x)[0] - box.function(0 * x)[0])
        assert maps.details["base"].item() == 0
        shown = torch.cat(box.seen)[2:]  # after the image and nothing of it
        assert samples - 2 <= len(shown) <= samples
        rows = {tuple(row.tolist()) for row in shown}
        assert all(tuple(1 - value for value in row) in rows for row in rows)  # with their complements
        alone = [row for row in rows if sum(row) == 1]
        assert len(alone) == 14  # the dearest size is there in full
        errors[samples] = (maps.values[0] - shapley).abs().max().item()
    assert errors[2000] < 0.08
    assert errors[200] < 0.5
    few = torch.ones(1, 4, dtype=torch.float64)
    for samples in range(2, 20):  # of the 14 coalitions that are neither none nor all of four
        maps = explain(linear, few, "kernel_shap", target=0, segments=torch.arange(4), n_samples=samples)
        assert maps.details["exact"].item() == (samples >= 14)
    complete = explain(box, x, "kernel_shap", target=0, segments=torch.arange(14), n_samples=2**14)
    torch.testing.assert_close(complete.values[0], shapley)


# ------------------------------------------------------------------------------------------------------- superpixels


def test_quickshift_has_the_settings_of_lime():
    from skimage.segmentation import quickshift as reference

    x = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = gaussian_blur(x, 2.0)
    low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    labels = quickshift(5 * x - 2, [3, 4])
    for row, image in enumerate((x - low) / (high - low)):
        wanted = reference(image.permute(1, 2, 0).numpy(), kernel_size=4, max_dist=200, ratio=0.2, rng=3 + row)
        assert (labels[row].numpy() == wanted).all()
    assert quickshift(x[:, :1], [0, 0]).shape == (2, 24, 24)  # grey images have no colours to convert


def test_superpixels_by_default_given_and_as_a_grid():
    x = gaussian_blur(images(1, 3, 60, 60), 3.0)

    def box(x: Tensor) -> Tensor:  # looks at the upper left corner
        return x[:, :, :20, :20].sum((1, 2, 3))

    maps = explain(box, x, "lime", segments=None, target=0, score="logit", fill=0.0, n_samples=90, ridge=0.0)
    labels = maps.details["segments"][0]
    seen = labels[:20, :20].unique()
    assert len(seen) < len(labels.unique()) < 60
    for label in labels.unique():
        part = x[0, :, :20, :20].sum(0)[labels[:20, :20] == label].sum()
        found = maps.values[0, 0][labels == label]
        torch.testing.assert_close(found, part.expand(found.shape))
    odd = torch.tensor([7, -1, 40, 7])  # any whole numbers; the features 0 and 3 go together
    values = explain(linear, ROWS, "kernel_shap", target=0, segments=odd, n_samples=None).values
    contributions = W * ROWS
    contributions[:, [0, 3]] = contributions[:, [0, 3]].sum(1, keepdim=True)
    torch.testing.assert_close(values, contributions)
    own = torch.stack([odd, torch.arange(4)])  # superpixels of their own for each image
    values = explain(linear, ROWS, "kernel_shap", target=0, segments=own, n_samples=None, batch_size=1).values
    torch.testing.assert_close(values, torch.stack([contributions[0], (W * ROWS)[1]]))
    assert cells((4, 6), 2).tolist() == [[0, 0, 0, 1, 1, 1]] * 2 + [[2, 2, 2, 3, 3, 3]] * 2


def test_a_hidden_superpixel_shows_its_mean_colour():
    x = images(2, 3, 4, 4)
    labels = torch.tensor([[0, 0, 1, 1]] * 4).expand(2, 4, 4)
    shown = means(x, labels, 2)
    torch.testing.assert_close(shown[..., :2], x[..., :2].mean((2, 3), keepdim=True).expand(2, 3, 4, 2))
    torch.testing.assert_close(shown[..., 2:], x[..., 2:].mean((2, 3), keepdim=True).expand(2, 3, 4, 2))
    box = Recorder(total)
    explain(box, x, "kernel_shap", target=0, segments=labels, fill="segment", n_samples=None)
    hidden = next(seen[0] for seen in box.seen if (seen[0] == shown[0]).all())
    assert hidden.shape == (3, 4, 4)


def test_without_scikit_image(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(OptionError, match=r"attrbox\[superpixels\]"):
        explain(total, picture(8, 8), "lime", segments=None)
    assert explain(total, picture(8, 8), "lime", target=0).values.isfinite().all()


# --------------------------------------------------------------------------------------------------------- black boxes


@pytest.mark.parametrize("method", BLACK_BOX)
class TestBlackBoxes:
    def test_any_callable_gives_the_map_of_the_module(self, method):
        model, x = relu_net(), images(3, 3, 8, 8)
        wanted = explain(model, x, method).values

        class Service:
            def __call__(self, batch):
                assert not torch.is_grad_enabled()
                return model(batch.clone()).detach().numpy().astype(np.float32).astype(np.float64)

        for box in (lambda batch: model(batch), Recorder(model), model.forward):
            torch.testing.assert_close(explain(box, x, method).values, wanted)
        torch.testing.assert_close(explain(Service(), x, method).values, wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(explain(lambda b: {"logits": model(b)}, x, method, batch_size=2).values, wanted)
        many = explain(lambda batch: model(batch), x, method, target=attrbox.top(2))
        torch.testing.assert_close(many.values[:, 0], wanted)
        own = explain(lambda batch: model(batch), x, method, target=lambda out: out[:, 1])
        torch.testing.assert_close(own.values, explain(model, x, method, target=1, score="logit").values)

    def test_nothing_is_recorded_and_nothing_touched(self, method):
        model, x = residual_net(), images(2, 3, 8, 8)

        class Watching(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def forward(self, batch):
                assert not torch.is_grad_enabled()
                output = self.model(batch)
                assert output.grad_fn is None
                batch.fill_(torch.nan)  # a model may write into what it gets
                return output

        watching = Watching().eval()
        with nothing_changes(watching, x):
            values = explain(watching, x, method, target=1).values
        torch.testing.assert_close(values, explain(model, x, method, target=1).values)

    def test_memory_runs_out(self, method):
        model, x = relu_net(), images(3, 3, 8, 8)

        def small(batch: Tensor) -> Tensor:
            if len(batch) > 2:
                raise torch.OutOfMemoryError("too many")
            return model(batch)

        torch.testing.assert_close(explain(small, x, method).values, explain(model, x, method).values)

    @pytest.mark.parametrize(
        ("box", "error", "message"),
        [
            (lambda batch: torch.zeros(1, 4).double(), ModelError, r"one row of outputs per image.*got \[1, 4\]"),
            (lambda batch: torch.tensor(1.0), ModelError, "one row of outputs per image"),
            (lambda batch: torch.zeros(len(batch), 3, 4, 4), TargetError, r"\[N, classes\]"),
            (lambda batch: torch.zeros(len(batch), 4).long(), ModelError, "floating-point"),
            (lambda batch: "four", ModelError, "got str"),
            (lambda batch: None, ModelError, "got NoneType"),
            (lambda batch: 1 / 0, ModelError, "ZeroDivisionError"),
        ],
    )
    def test_a_black_box_that_returns_nonsense(self, method, box, error, message):
        with pytest.raises(error, match=message):
            explain(box, images(2, 3, 8, 8), method)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_a_black_box_that_returns_nan(self, method, value):
        x = images(3, 3, 8, 8)
        x[1] += 100  # marks the image whose changes are not borne

        def fragile(batch: Tensor) -> Tensor:
            touched = (batch.flatten(1).amax(1) > 20) & (batch != x[1]).flatten(1).any(1)
            return torch.where(touched[:, None], value, batch.mean((2, 3)))

        with pytest.raises(ModelError, match=r"NaN or infinite scores .* images \[1\]"):
            explain(fragile, x, method, fill=0.0, target=0, score="logit", batch_size=2)

    def test_one_score_has_no_probability(self, method):
        with pytest.raises(TargetError, match="one score per sample"):
            explain(linear, ROWS, method, score="prob", segments=EACH) if method in (
                "lime",
                "kernel_shap",
            ) else explain(linear, ROWS, method, score="prob")

    def test_a_probability_of_a_function(self, method):
        with pytest.raises(OptionError, match="class indices"):
            explain(relu_net(), images(2, 3, 8, 8), method, score="prob", target=lambda out: out[:, 0])


@pytest.mark.parametrize("unit", ["logit", "contrast", "prob", "log_prob"])
def test_units_of_the_score(unit):
    model, x = relu_net(), images(3, 3, 8, 8)
    of_unit = {
        "logit": lambda out: out,
        "prob": lambda out: out.softmax(1),
        "log_prob": lambda out: out.log_softmax(1),
        "contrast": lambda out: torch.stack(
            [out[:, c] - out[:, [k for k in range(4) if k != c]].amax(1) for c in range(4)], 1
        ),
    }[unit]
    found = explain(model, x, "occlusion", target=attrbox.classes([2, 0]), score=unit).values
    wanted = explain(lambda batch: of_unit(model(batch)), x, "occlusion", target=attrbox.classes([2, 0])).values
    torch.testing.assert_close(found, wanted)


def test_published_units():
    model, x = relu_net(), images(2, 3, 8, 8)
    for method, unit in {"rise": "prob", "lime": "prob", "occlusion": "logit", "kernel_shap": "logit"}.items():
        values = explain(model, x, method, target=1).values
        torch.testing.assert_close(values, explain(model, x, method, target=1, score=unit).values)
        other = {"prob": "logit", "logit": "prob"}[unit]
        assert (values - explain(model, x, method, target=1, score=other).values).abs().max() > 1e-3


@pytest.mark.parametrize("method", ["saliency", "learned", "integrated_gradients", "grad_cam", "mask", "smask"])
def test_methods_with_gradients_refuse_a_plain_callable(method):
    with pytest.raises(ModelError, match=rf"got 'total'.*{method} cannot"):
        attrbox.explain(total, picture(8, 8), method, progress=False)
    with pytest.raises(ModelError, match=rf"{method} cannot"):
        attrbox.compare(total, picture(8, 8), ["random", method], progress=False)


def test_black_boxes_side_by_side():
    result = attrbox.compare(total, picture(8, 8), [*BLACK_BOX.items(), "random"], target=0, progress=False)
    assert list(result) == [*BLACK_BOX, "random"]
    assert {str(maps.coverage) for maps in result.values()} == {"black box, no gradient"}
    for model in (nn.ReLU, None, "resnet18"):
        with pytest.raises(ModelError, match="Expected the model to be a"):
            attrbox.explain(model, picture(8, 8), "rise", progress=False)


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("occlusion", {"window": 0}),
        ("occlusion", {"window": 2.5}),
        ("occlusion", {"window": ()}),
        ("occlusion", {"stride": 0}),
        ("occlusion", {"stride": True}),
        ("occlusion", {"overlap": "max"}),
        ("occlusion", {"fill": "black"}),
        ("occlusion", {"fill": math.nan}),
        ("occlusion", {"blur": 0}),
        ("occlusion", {"score": "loss"}),
        ("rise", {"n_samples": 0}),
        ("rise", {"grid": 0}),
        ("rise", {"p": 0.0}),
        ("rise", {"p": 1.5}),
        ("rise", {"center": 1}),
        ("lime", {"n_samples": 0}),
        ("lime", {"width": 0.0}),
        ("lime", {"ridge": -1.0}),
        ("lime", {"segments": 0}),
        ("kernel_shap", {"n_samples": 1}),
        ("kernel_shap", {"segments": False}),
        ("kernel_shap", {"fill": "segments"}),
    ],
)
def test_options_out_of_range(method, options):
    with pytest.raises(OptionError, match=next(iter(options))):
        attrbox.explain(total, picture(8, 8), method, progress=False, **options)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("occlusion", {"window": 9}, "9 x 9 pixels is larger than the images, 8 x 8"),
        ("occlusion", {"window": (2, 9)}, "2 x 9 pixels is larger"),
        ("occlusion", {"window": (2, 2, 2)}, "Expected one window or 2"),
        ("rise", {"grid": 9}, "9 cells along each axis is larger than the images, 8 x 8"),
        ("lime", {"segments": 9}, "9 superpixels along each axis"),
        ("lime", {"segments": torch.zeros(8, 7).long()}, r"shape \[8, 8\] or \[2, 8, 8\].*int64 \[8, 7\]"),
        ("lime", {"segments": torch.zeros(8, 8)}, "whole numbers"),
        ("kernel_shap", {"segments": torch.zeros(0).long()}, r"got torch.int64 \[0\]"),  # no superpixel
        ("kernel_shap", {"segments": torch.zeros(3, 8, 8).long()}, r"\[3, 8, 8\]"),
        ("kernel_shap", {"fill": torch.zeros(3, 8, 7)}, "baseline of shape"),
    ],
)
def test_what_does_not_fit_the_images(method, options, message):
    model = relu_net()
    with nothing_changes(model), pytest.raises(InputError, match=message):
        attrbox.explain(model, picture(8, 8), method, progress=False, **options)


@pytest.mark.parametrize("method", ["lime", "kernel_shap"])
def test_vectors_have_no_superpixels_of_themselves(method):
    with pytest.raises(InputError, match="Give segments"):
        attrbox.explain(linear, ROWS, method, progress=False)


def test_one_superpixel_alone_has_the_whole_difference():
    x = picture(8, 8)
    for method in ("kernel_shap", "lime"):
        options = {"segments": torch.zeros(8, 8).long(), "score": "logit", "fill": 0.0}
        more = {"ridge": 0.0} if method == "lime" else {}
        values = explain(total, x, method, target=0, n_samples=20, **options, **more).values
        torch.testing.assert_close(values, (total(x) - total(0 * x))[:, :1, None, None].expand(2, 1, 8, 8))


# ---------------------------------------------------------------------------------------------------------------- fills


def test_fills():
    from scipy.ndimage import median_filter

    x = picture(9, 8)
    for window in (3, 11):
        wanted = np.stack([[median_filter(c, window, mode="nearest") for c in image.numpy()] for image in x])
        torch.testing.assert_close(median_blur(x, window), torch.from_numpy(wanted))
    numbers = images(*x.shape, seed=9)

    def fill_of(fill: str | float, sigma: float | None = None) -> Tensor:
        return fill_images(x, fill, lambda: numbers, sigma).expand(x.shape)

    torch.testing.assert_close(fill_of("median"), median_blur(x, 11))
    torch.testing.assert_close(fill_of("blur", 2.0), gaussian_blur(x, 2.0))
    torch.testing.assert_close(fill_of("blur"), gaussian_blur(x, 0.05 * max(x.shape[2:])))
    mean, deviation = x.mean((2, 3), keepdim=True), x.std((2, 3), keepdim=True, unbiased=False)
    torch.testing.assert_close(fill_of("mean"), mean.expand(x.shape))
    torch.testing.assert_close(fill_of("noise"), mean + deviation * numbers)
    assert torch.equal(fill_of("zero"), torch.zeros_like(x))
    assert torch.equal(fill_of(0.25), torch.full_like(x, 0.25))
    edge = torch.zeros(1, 1, 9, 9, dtype=torch.float64)
    edge[..., 0] = 1
    assert gaussian_blur(edge, 1.0)[0, 0, 4, 0] > 1.3 * gaussian_blur(edge, 1.0, "zero")[0, 0, 4, 0]
    with pytest.raises(InputError, match="blur"):
        fill_images(x[:, 0, 0], "blur", lambda: x, 1.0)
    for fill in set(FILLS) - {"noise"}:
        box = Recorder(total)
        explain(box, x, "occlusion", target=0, window=8, stride=8, fill=fill, blur=1.5)
        torch.testing.assert_close(box.seen[-1][-1, :, 1:], fill_of(fill, 1.5)[-1, :, 1:])


@pytest.mark.parametrize("count", [40, 300])
def test_the_default_number_of_samples_of_kernel_shap(count):
    """Two for each superpixel and 2048 more, as the authors' code has it."""
    x = images(1, 1, 20, 20)
    segments = (torch.arange(400) * count // 400).view(20, 20)
    box = lambda batch: batch.flatten(1)[:, ::7].cumsum(1).tanh().sum(1, keepdim=True)  # noqa: E731
    both = ({}, {"n_samples": 2 * count + 2048})
    default, told = (
        attrbox.explain(box, x, "kernel_shap", segments=segments, progress=False, **options) for options in both
    )
    assert torch.equal(default.values, told.values)
