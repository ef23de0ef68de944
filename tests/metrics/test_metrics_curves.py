"""Removal curves: closed forms, a slow oracle, and what must hold for any map and model."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from nets import images, relu_net, seeded, squeeze_excitation_net, vector_net
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import attrbox
from attrbox.core.fills import gaussian_blur
from attrbox.errors import InputError, OptionError
from attrbox.metrics.faithfulness.road import impute

WHOLE = {"fraction": 1.0, "steps": 4}


class Sum(nn.Module):
    """f = sum x, as the only class."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).sum(1, keepdim=True)


def squares(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).view(1, 1, 2, -1)


def measure(model, x, maps, *metrics, **options):
    return attrbox.evaluate(model, x, maps, metrics, **({"progress": False} | options))


def test_closed_forms_of_the_sum():
    x = squares(4, 3, 2, 1)
    options = WHOLE | {"relative": True, "score": "logit"}
    scores = measure(
        Sum().eval(), x, {"x": x}, ("morf", WHOLE), ("lerf", WHOLE), ("deletion", options),
        ("insertion", options | {"fill": "zero"}), target=0,
    )["x"]  # fmt: skip
    exact = {
        "morf": ([1, 0.6, 0.3, 0.1, 0], 0.375),
        "lerf": ([1, 0.9, 0.7, 0.4, 0], 0.625),
        "deletion": ([1, 0.6, 0.3, 0.1, 0], 0.375),
        "insertion": ([0, 0.4, 0.7, 0.9, 1], 0.625),
    }
    for name, (curve, area) in exact.items():
        torch.testing.assert_close(scores[name].curves[0], torch.tensor(curve, dtype=torch.float64))
        torch.testing.assert_close(scores[name].fractions, torch.linspace(0, 1, 5, dtype=torch.float64))
        assert scores[name].auc.item() == pytest.approx(area)
        assert scores[name].mean == pytest.approx(area)


def test_lerf_rises_above_one_where_something_speaks_against_the_class():
    x = torch.tensor([4.0, -1.0]).view(1, 1, 1, 2)
    curve = measure(Sum().eval(), x, {"x": x}, ("lerf", {"fraction": 0.5, "steps": 1}), target=0)["x"]["lerf"].curves
    torch.testing.assert_close(curve, torch.tensor([[1.0, 4 / 3]]))


def test_the_area_is_normalised_by_the_range():
    x = torch.ones(1, 1, 10, 10)
    scores = measure(Sum().eval(), x, {"x": x}, ("morf", {"fraction": 0.2, "steps": 5}), target=0)
    assert scores["x"]["morf"].auc.item() == pytest.approx(0.9)
    assert scores["random"]["morf"].auc.item() == pytest.approx(0.9)


def slow_curve(model, image, heatmap, target, counts, fill, largest, seed_order):
    """One pixel after the other, in plain Python."""
    flat = [float(value) for value in heatmap.flatten()]
    order = sorted(seed_order, key=lambda pixel: -flat[pixel])  # stable: ties stay in the order given
    if not largest:
        order.reverse()
    curve = []
    for count in counts:
        shown = image.clone()
        for pixel in order[:count]:
            row, column = divmod(pixel, image.shape[2])
            shown[:, row, column] = fill[:, row, column]
        curve.append(model(shown[None])[0, target].item())
    return curve


@pytest.mark.parametrize("metric", ["morf", "lerf"])
@pytest.mark.parametrize("fill", ["zero", "mean", "blur", 0.7])
def test_against_a_slow_oracle(metric, fill):
    model, x = squeeze_excitation_net(), images(3, 3, 8, 8)
    heatmap = images(3, 8, 8, seed=1).round(decimals=6)
    fills = {
        "zero": torch.zeros_like(x),
        "mean": x.mean((2, 3), keepdim=True).expand_as(x),
        "blur": gaussian_blur(x, 1.3),
        0.7: torch.full_like(x, 0.7),
    }
    options = {"fraction": 0.5, "steps": 4, "fill": fill, "sigma": 1.3, "relative": False}
    score = measure(model, x, {"m": heatmap}, (metric, options), target=[0, 1, 2])["m"][metric]
    for index in range(3):
        wanted = slow_curve(
            model, x[index], heatmap[index], index, [0, 8, 16, 24, 32], fills[fill][index], metric == "morf", range(64)
        )
        np.testing.assert_allclose(score.curves[index].numpy(), wanted, rtol=1e-9)
    area = np.trapezoid(score.curves.numpy(), [0, 0.125, 0.25, 0.375, 0.5], axis=1) / 0.5
    np.testing.assert_allclose(score.auc.numpy(), area)


def test_regions_are_removed_whole_in_the_order_of_their_sums():
    heatmap = torch.zeros(1, 5, 5, dtype=torch.float64)
    heatmap[0, 0, 0], heatmap[0, 3, 3], heatmap[0, 4, 4] = 2.0, 1.0, 5.0  # the last in a region of one pixel
    x = torch.ones(1, 1, 5, 5, dtype=torch.float64)
    options = {"region": 2, "fraction": 1.0, "steps": 9, "relative": False}
    curve = measure(Sum().eval(), x, {"m": heatmap}, ("morf", options), target=0)["m"]["morf"].curves[0]
    assert curve[:4].tolist() == [25, 24, 20, 16]
    assert curve[-1] == 0


def test_scores_are_read_from_the_output_as_asked():
    model, x = squeeze_excitation_net(), images(2, 3, 8, 8)
    wanted = {
        "logit": model(x)[:, 1],
        "prob": model(x).softmax(1)[:, 1],
        "log_prob": model(x).log_softmax(1)[:, 1],
        "accuracy": (model(x).argmax(1) == 1).double(),
    }
    metrics = [("morf", {"score": name, "relative": False}) for name in wanted]
    scores = measure(model, x, {"m": images(2, 8, 8)}, *metrics, target=1)["m"]
    for (label, score), (name, first) in zip(scores.items(), wanted.items(), strict=True):
        assert name in label or label == "morf"
        torch.testing.assert_close(score.curves[:, 0], first.detach())


def test_a_target_function_has_a_score_but_no_probability():
    model, x = squeeze_excitation_net(), images(2, 3, 8, 8)
    maps = {"m": images(2, 8, 8)}
    target = lambda outputs: outputs[:, 1] - outputs[:, 2]  # noqa: E731
    score = measure(model, x, maps, ("morf", {"relative": False}), target=target)["m"]["morf"]
    torch.testing.assert_close(score.curves[:, 0], target(model(x)).detach())
    with pytest.raises(OptionError, match="needs class indices"):
        measure(model, x, maps, ("morf", {"relative": False, "score": "prob"}), target=target)


@given(st.lists(st.floats(-5, 5), min_size=9, max_size=9), st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_a_perfect_ranking_and_its_reverse_bracket_every_other(weights, seed):
    """On a linear model nothing falls faster than with the largest contributions first, nor slower than in reverse."""
    linear = nn.Linear(9, 1, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor(weights, dtype=torch.float64))
        linear.bias.fill_(50.0)
    model = nn.Sequential(nn.Flatten(), linear).eval()
    x = torch.ones(1, 1, 3, 3, dtype=torch.float64)
    exact = linear.weight.detach().view(1, 3, 3)
    maps = {"exact": exact, "reverse": -exact, "other": images(1, 3, 3, seed=seed)}
    options = {"fraction": 1.0, "steps": 9}
    scores = measure(model, x, maps, ("morf", options), ("lerf", options), target=0, seed=seed)
    for name in scores:
        for metric in ("morf", "lerf"):
            low, high = scores["exact"]["morf"].curves, scores["reverse"]["morf"].curves
            assert (scores[name][metric].curves >= low - 1e-9).all()
            assert (scores[name][metric].curves <= high + 1e-9).all()
    torch.testing.assert_close(scores["exact"]["lerf"].auc, scores["reverse"]["morf"].auc)


def test_constant_maps_are_ranked_by_the_seed():
    model, x = squeeze_excitation_net(), images(2, 3, 8, 8)
    maps = {"zero": torch.zeros(2, 8, 8), "one": torch.ones(2, 8, 8)}
    first, again = (measure(model, x, maps, "morf", "lerf", target=1) for _ in range(2))
    other = measure(model, x, maps, "morf", target=1, seed=7)
    for metric in ("morf", "lerf"):  # ties are broken alike for all methods
        assert torch.equal(first["zero"][metric].curves, again["one"][metric].curves)
    assert not torch.equal(first["zero"]["morf"].curves, other["zero"]["morf"].curves)
    assert not torch.equal(first["zero"]["morf"].curves, first["zero"]["lerf"].curves)
    both = measure(model, x[:1].repeat(2, 1, 1, 1), maps, "morf", target=1, seed=[3, 3])["zero"]["morf"].curves
    assert torch.equal(both[0], both[1])  # the order is the seed's


def test_images_whose_own_score_is_not_positive_are_left_out_and_counted():
    x = torch.tensor([[1.0, 2.0], [1.0, -3.0], [0.0, 0.0], [3.0, 1.0]]).view(4, 1, 1, 2)
    evaluation = measure(Sum().eval(), x, {"x": x}, ("morf", {"fraction": 0.5, "steps": 1}), target=0)
    score = evaluation["x"]["morf"]
    assert score.left_out.tolist() == [False, True, True, False]
    assert score.mean == pytest.approx((0.5 * (1 + 1 / 3) + 0.5 * (1 + 1 / 4)) / 2)
    torch.testing.assert_close(score.mean_curve, torch.tensor([1.0, (1 / 3 + 1 / 4) / 2]))
    assert "(2 left out)" in evaluation.table()
    assert evaluation.rows()[0]["left_out"] == 2
    absolute = measure(Sum().eval(), x, {"x": x}, ("morf", {"relative": False, "fraction": 0.5}), target=0)["x"]["morf"]
    assert not absolute.left_out.any()


def test_noise_is_of_the_images_own_stream():
    model, x = squeeze_excitation_net(), images(3, 3, 8, 8)
    maps = {"m": images(3, 8, 8, seed=1)}
    metric = ("morf", {"fill": "noise", "fraction": 0.5})
    whole = measure(model, x, maps, metric, target=1, seed=[5, 6, 7])["m"]["morf"].curves
    alone = measure(model, x[1:2], {"m": maps["m"][1:2]}, metric, target=1, seed=[6])["m"]["morf"].curves
    torch.testing.assert_close(whole[1:2], alone)
    assert not torch.equal(measure(model, x, maps, metric, target=1, seed=[5, 8, 7])["m"]["morf"].curves[1], whole[1])


def test_all_methods_orders_and_metrics_share_the_batches():
    """The calls of the model are counted: what is needed, in full batches, and nothing more."""
    model, x = squeeze_excitation_net(), images(4, 3, 8, 8)
    sizes = []
    model.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    maps = {name: images(4, 8, 8, seed=k) for k, name in enumerate("abc")}
    options = {"fraction": 0.25, "steps": 4}
    measure(model, x, maps, ("morf", options), ("lerf", options), target=1, batch_size=16, controls=False)
    assert sum(sizes) == 4 + 3 * 4 * 4 * 2  # the images themselves, then methods x images x points x orders
    assert sizes == [4, *[16] * 6]


def test_deletion_and_insertion_are_as_published_by_default():
    """The probability as it is, over the whole range, into zeros; and out of a blur of five pixels."""
    model, x = squeeze_excitation_net(), images(2, 3, 8, 8)
    scores = measure(model, x, {"m": images(2, 8, 8)}, "deletion", "insertion", target=1)["m"]
    ends = {"deletion": (x, torch.zeros_like(x)), "insertion": (gaussian_blur(x, 5.0), x)}
    for metric, shown in ends.items():
        curves, fractions = scores[metric].curves, scores[metric].fractions
        assert fractions.tolist() == pytest.approx([k / 64 for k in range(65)])  # 224 steps are each of 64 pixels
        for place, pictures in zip((0, -1), shown, strict=True):
            torch.testing.assert_close(curves[:, place], model(pictures).softmax(1)[:, 1].detach())


class Normalised(nn.Module):
    """A convolution with batch-norm; its output is used in another way too if the image is dark."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        features = self.conv(x)
        other = features if x.sum() < 0 else 0
        x.zero_()  # the model may write into what it gets
        return (self.norm(features) + other).relu().mean((2, 3))


def test_batch_norms_are_folded_and_the_scores_are_the_same():
    class Norms(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += "batch_norm" in str(function)
            return function(*args, **(kwargs or {}))

    model, maps = seeded(Normalised), {"m": images(4, 8, 8, seed=1)}
    bright = images(4, 3, 8, 8).abs()
    for fill in (1.0, -1.0):  # filled far enough with -1, an image is dark
        metric = ("morf", {"fraction": 0.5, "steps": 4, "fill": fill})
        with Norms() as norms:
            found = measure(model, bright, maps, metric, target=1, batch_size=1, controls=False)["m"]["morf"].curves
        handle = model.register_forward_hook(lambda *_: None)  # a model with hooks is run as it is
        plain = measure(model, bright, maps, metric, target=1, batch_size=1, controls=False)["m"]["morf"].curves
        handle.remove()
        torch.testing.assert_close(found, plain)
        assert (norms.count == 1) == (fill == 1.0)  # the pass that was watched, and no other


def test_vectors_are_ranked_by_feature():
    model, x = vector_net(), images(3, 7)
    scores = measure(model, x, {"m": x}, ("morf", {"fraction": 1.0, "steps": 7, "relative": False}), target=0)
    assert set(scores) == {"m", "random"}  # edges are not defined
    first = x.clone()
    first[torch.arange(3), x.argmax(1)] = 0
    torch.testing.assert_close(scores["m"]["morf"].curves[:, 1], model(first)[:, 0].detach())
    with pytest.raises(InputError, match="blur"):
        measure(model, x, {"m": x}, ("morf", {"fill": "blur", "fraction": 1.0}))
    with pytest.raises(InputError, match="region=1"):
        measure(model, x, {"m": x}, ("morf", {"region": 2, "fraction": 1.0}))


@pytest.mark.parametrize(
    ("metric", "options", "message"),
    [
        ("morf", {"fraction": 0}, "fraction"),
        ("morf", {"fraction": 1.1}, "fraction"),
        ("morf", {"fraction": 0.001}, "less than one"),
        ("morf", {"steps": 0}, "steps"),
        ("morf", {"fill": "red"}, "fill"),
        ("morf", {"fill": float("nan")}, "fill"),
        ("morf", {"sigma": 0}, "sigma"),
        ("morf", {"score": "loss"}, "score"),
        ("morf", {"score": "log_prob"}, "relative=False"),
        ("morf", {"region": 1.5}, "region"),
        ("morf", {"relative": 1}, "relative"),
        ("morf", {"fractoin": 0.1}, "Did you mean 'fraction'"),
        ("morf", {"fraction": "all"}, "do not fit the metric"),
        ("road", {"fractions": (0.5, 0.4)}, "fractions"),
        ("road", {"fractions": (0.5, 1.0)}, "fractions"),
        ("road", {"noise": -1}, "noise"),
        ("road", {"fraction": 0.5}, "no option"),
    ],
)
def test_options_out_of_range(metric, options, message):
    with pytest.raises(OptionError, match=message):
        measure(relu_net(), images(1, 3, 8, 8), {"m": images(1, 8, 8)}, (metric, options))


# ----------------------------------------------------------------------------------------------------------------- ROAD


def missing(*pixels: tuple[int, int]) -> Tensor:
    mask = torch.zeros(5, 6, dtype=torch.bool)
    for pixel in pixels:
        mask[pixel] = True
    return mask


def test_imputation_closed_forms():
    y, x = torch.meshgrid(torch.arange(5.0), torch.arange(6.0), indexing="ij")
    linear = torch.stack([2 * y - 3 * x + 1, torch.full_like(x, 7.0)]).double()
    for mask in (missing((2, 3)), missing((2, 2), (2, 3), (3, 3))):
        torch.testing.assert_close(impute(torch.where(mask, 99.0, linear), mask), linear)
    noise = images(1, 5, 6)
    corner = impute(noise, missing((0, 0)))[0, 0, 0]
    edges, diagonal = noise[0, 0, 1] + noise[0, 1, 0], noise[0, 1, 1]
    torch.testing.assert_close(corner, (2 * edges + diagonal) / 5)
    assert torch.equal(impute(noise, missing()), noise)
    with pytest.raises(InputError, match="nothing can be imputed"):
        impute(noise, torch.ones(5, 6, dtype=torch.bool))


def test_imputation_solves_for_all_missing_pixels_at_once():
    """Against fixed-point iteration: each missing pixel the weighted mean of its neighbours, until nothing moves."""
    image, mask = images(1, 5, 6), images(5, 6, seed=3) > 0
    weights = {(0, 1): 2, (1, 0): 2, (0, -1): 2, (-1, 0): 2, (1, 1): 1, (1, -1): 1, (-1, 1): 1, (-1, -1): 1}
    found = image[0].clone()
    for _ in range(400):
        for row, column in mask.nonzero().tolist():
            near = {
                (row + r, column + c): weight
                for (r, c), weight in weights.items()
                if 0 <= row + r < 5 and 0 <= column + c < 6
            }
            found[row, column] = sum(w * found[place] for place, w in near.items()) / sum(near.values())
    torch.testing.assert_close(impute(image, mask)[0], found, rtol=1e-8, atol=1e-8)


def test_road_curves_are_those_of_the_imputed_images():
    model, x = squeeze_excitation_net(), images(2, 3, 8, 8)
    heatmap = images(2, 8, 8, seed=1)
    options = {"fractions": [0.25, 0.5], "score": "prob", "noise": 0}
    scores = measure(model, x, {"m": heatmap}, ("road", options), ("road_lerf", options), target=1)["m"]
    for metric, sign in (("road", 1), ("road_lerf", -1)):
        for place, count in ((1, 16), (2, 32)):
            for index in range(2):
                taken = torch.zeros(64, dtype=torch.bool)
                taken[(sign * heatmap[index]).flatten().topk(count).indices] = True
                wanted = model(impute(x[index], taken.view(8, 8))[None]).softmax(1)[0, 1]
                torch.testing.assert_close(scores[metric].curves[index, place], wanted.detach())
    noisy = measure(model, x, {"m": heatmap}, ("road", options | {"noise": 0.5}), target=1)["m"]["road"]
    assert torch.equal(noisy.curves[:, 0], scores["road"].curves[:, 0])
    assert not torch.isclose(noisy.curves[:, 1:], scores["road"].curves[:, 1:]).any()
    accuracy = measure(model, x, {"m": heatmap}, "road", target=model(x).argmax(1))["m"]["road"]
    assert set(accuracy.curves.unique().tolist()) <= {0.0, 1.0}
    assert accuracy.fractions.tolist() == pytest.approx(
        [0, *(round(f * 64) / 64 for f in (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9))]
    )


def test_the_noise_of_road_is_on_imputed_pixels_alone():
    class Corner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, 0, 0, :2]

    x, heatmap = images(2, 1, 6, 6), torch.zeros(2, 6, 6)
    heatmap[:, 0, 0], heatmap[:, 0, 1] = -1, 1  # the first number stays to the end, the second goes at once
    options = {"fractions": [0.3, 0.6], "score": "logit", "noise": 0.5}
    for target, moved in ((0, False), (1, True)):
        curves = measure(Corner().eval(), x, {"m": heatmap}, ("road", options), target=target)["m"]["road"].curves
        calm = ("road", options | {"noise": 0})
        smooth = measure(Corner().eval(), x, {"m": heatmap}, calm, target=target)["m"]["road"].curves
        assert torch.isclose(curves, smooth)[:, 1:].logical_not().all() == moved


@pytest.mark.parametrize("region", [1, 2])
def test_the_ends_of_an_order_are_those_of_the_whole(region):
    """Also with ties, negative values and both zeros, and for both ways of finding them."""
    from attrbox.core.targets import Target
    from attrbox.metrics.context import Study
    from attrbox.metrics.records import Maps

    values = (3 * images(5, 1, 12, 12, dtype=torch.float32)).round()
    values[0, 0, :2] = torch.tensor([0.0, -0.0]).repeat(12).view(2, 12)
    values[1] = -1.0
    study = Study(
        images=values,
        maps={"a": Maps(values), "b": Maps(values / 7)},
        rows=slice(0, 5),
        seeds=(1, 2, 3, 4, 5),
        target=Target(0, 5),
    )
    whole, reverse = study.order(region)
    first, last = study.order(region, 7)
    assert first.shape == (2, 5, 7)
    assert torch.equal(first, whole[..., :7])
    assert torch.equal(last, reverse[..., :7])
    assert torch.equal(reverse, whole.flip(-1))
    assert not torch.equal(whole[0, 1], whole[0, 1].sort().values)  # constant: the seed's order
