"""Metrics know how maps were made, baselines, seeds and precision; by a call, a file or the command."""

import importlib
import json
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
from command_line import TINY, run
from exports import export
from linear_models import W, linear_model, measure
from nets import images, relu_net, squeeze_excitation_net
from PIL import Image
from torch import nn

import attrbox
from attrbox.errors import InputError, OptionError
from attrbox.pipeline.stored_scores import read_scores, write_scores

X = images(3, 3, 8, 8)  # as many images as channels: the shapes of shared and of single baselines are alike
BASELINES = {
    "number": 0.5,
    "shared": images(3, 8, 8, seed=5),
    "with an axis": images(1, 3, 8, 8, seed=5),
    "one each": images(3, 3, 8, 8, seed=6),
}
TINY_CHANGE = ("sensitivity_max", {"radius": 1e-9, "n_samples": 1})


@pytest.fixture(params=["comparison", "mapping", "file", "raw file", "merged", "an image at a time"])
def as_source(request, tmp_path, monkeypatch):
    """Turns a comparison into what metrics can be given."""

    def turned(comparison):
        if request.param == "mapping":
            return dict(comparison)
        if request.param in ("comparison", "an image at a time"):
            if request.param != "comparison":
                monkeypatch.setattr(importlib.import_module("attrbox.metrics.evaluation"), "_RANKINGS", 1)
            return comparison
        path = comparison.to_hdf5(tmp_path / "maps.h5", dtype="float64")
        if request.param == "merged":
            path = attrbox.merge([path], tmp_path / "merged.h5", virtual=True)
        file = h5py.File(path) if request.param == "raw file" else attrbox.open_maps(path)
        request.addfinalizer(file.close)
        return file

    return turned


def compared(model, methods, x=X, target=1, **options):
    return attrbox.compare(model, x, methods, target=target, progress=False, **options)


# --------------------------------------------------------------------------------------------------------- completeness


@pytest.mark.parametrize("name", BASELINES)
def test_completeness_is_that_of_the_maps_own_baseline(as_source, name):
    model, baseline = squeeze_excitation_net(), BASELINES[name]
    methods = [("deeplift", {"baseline": baseline}), ("integrated_gradients", {"steps": 4, "baseline": baseline})]
    result = compared(model, [*methods, "deeplift", "lrp_epsilon", "epsilon_plus"])
    scores = measure(model, X, as_source(result), "completeness")
    start = torch.zeros_like(X) + baseline
    with torch.no_grad():  # in plain torch
        difference = (model(X) - model(start))[:, 1]
        score = model(X)[:, 1]
    promised = {"deeplift": difference, "integrated_gradients": difference} | dict.fromkeys(
        ("lrp_epsilon", "epsilon_plus"), score
    )
    for label, wanted in promised.items():
        gaps = (result[label].values.flatten(1).sum(1) - wanted).abs() / wanted.abs()
        torch.testing.assert_close(scores[label]["completeness"].values, gaps, rtol=1e-9, atol=1e-12)
    labels = [label for label in scores if label.startswith("deeplift")]
    assert len(labels) == 2
    for label in labels:
        assert scores[label]["completeness"].values.max() < 1e-10


def test_a_baseline_that_is_given_holds_for_all_maps():
    model = relu_net()
    result = compared(model, ["saliency", ("deeplift", {"baseline": 0.5})])
    for baseline in (0.5, torch.full((3, 8, 8), 0.5, dtype=torch.float64), torch.full_like(X, 0.5)):
        scores = measure(model, X, result, ("completeness", {"baseline": baseline}))
        assert scores["deeplift"]["completeness"].values.max() < 1e-12
        assert scores["saliency"]["completeness"].values.min() > 0.01
        plain = measure(model, X, {"m": result["deeplift"].values}, ("completeness", {"baseline": baseline}), target=1)
        torch.testing.assert_close(plain["m"]["completeness"].values, scores["deeplift"]["completeness"].values)
    assert (
        measure(model, X, result, ("completeness", {"baseline": 0.0}))["deeplift"]["completeness"].values.min() > 0.01
    )
    for bad in (float("nan"), "mean", True):
        with pytest.raises(OptionError, match="baseline"):
            measure(model, X, result, ("completeness", {"baseline": bad}))
    with pytest.raises(InputError, match="baseline of shape"):
        measure(model, X, result, ("completeness", {"baseline": torch.zeros(2, 2)}))


def test_maps_of_unknown_making_are_refused_and_of_no_promise_left_out_with_the_reason(tmp_path):
    model = relu_net()
    result = compared(model, ["saliency", "deeplift"])
    with pytest.raises(InputError, match=r"nobody knows how the maps of m were made.*baseline"):
        measure(model, X, {"m": result["deeplift"].values}, "completeness", target=1)
    told = measure(
        model,
        X,
        {"m": result["deeplift"].values},
        "completeness",
        target=1,
        explainers={"m": "deeplift"},
        controls=False,
    )
    assert told["m"]["completeness"].values.max() < 1e-12
    scores = measure(model, X, result, "completeness", "sparseness")
    for label in ("saliency", "random", "sobel"):
        assert scores[label]["completeness"].left_out.all()
        assert "promises no sum" in scores[label]["completeness"].note
    assert scores["deeplift"]["completeness"].note == ""
    line = "completeness of saliency, random, sobel: its method promises no sum; give baseline= to compare with one."
    assert scores.table().splitlines()[-1] == line
    path = result.to_hdf5(tmp_path / "maps.h5")
    write_scores(path, scores, range(3), 3)
    with attrbox.open_maps(path) as maps:
        assert line in read_scores(maps).table()


def test_completeness_of_another_model_is_measured_on_that_model():
    model, other = relu_net(), relu_net(seed=3)
    result = compared(model, [("deeplift", {"baseline": 0.5}), "lrp_epsilon"])
    scores = measure(other, X, result, "completeness")
    with torch.no_grad():
        wanted = (other(X) - other(torch.full_like(X, 0.5)))[:, 1]
    gaps = (result["deeplift"].values.flatten(1).sum(1) - wanted).abs() / wanted.abs()
    torch.testing.assert_close(scores["deeplift"]["completeness"].values, gaps)
    assert gaps.min() > 0.01


def test_what_a_file_says_of_sums_is_enough_for_the_model_that_was_explained(tmp_path):
    """As of methods that are not installed here."""
    model = relu_net()
    result = compared(model, [("deeplift", {"baseline": BASELINES["shared"]})])
    path = result.to_hdf5(tmp_path / "maps.h5", dtype="float64")
    with h5py.File(path, "r+") as file:
        file["maps/deeplift"].attrs["method"] = "foreign"
        np.testing.assert_allclose(file["samples/expected/deeplift"][:], result["deeplift"].expected)
    with attrbox.open_maps(path) as maps:
        assert measure(model, X, maps, "completeness")["deeplift"]["completeness"].values.max() < 1e-10
        assert measure(relu_net(seed=3), X, maps, "completeness")["deeplift"]["completeness"].left_out.all()
        with pytest.raises(InputError, match="nobody knows how"):
            measure(model, X, maps, "sensitivity_max")


# ------------------------------------------------------------------------------------------- what removed pixels show


@pytest.mark.parametrize("name", BASELINES)
def test_pixels_are_removed_to_the_maps_own_baseline(as_source, name):
    """Contributions to a linear model predict it exactly, if pixels become what they were compared with."""
    x = images(3, 1, 5, 5)
    shapes = {"shared": (1, 5, 5), "with an axis": (1, 1, 5, 5), "one each": (3, 1, 5, 5)}
    baseline = 0.5 if name == "number" else images(*shapes[name], seed=5)
    methods = [("integrated_gradients", {"steps": 1, "baseline": baseline}), ("deeplift", {"baseline": baseline})]
    if name != "one each":
        methods.append(("occlusion", {"window": 1, "stride": 1, "fill": baseline}))
    model = linear_model(W)
    result = compared(model, [*methods, "gradient_x_input"], x, 0)
    metrics = [("infidelity", {"scale": False}), ("sensitivity_n", {"n_samples": 20, "fractions": (0.2, 0.6)})]
    scores = measure(model, x, as_source(result), *metrics)
    for label in result:  # input x gradient has no baseline: zero
        assert scores[label]["infidelity"].values.max() < 1e-20, label
        torch.testing.assert_close(scores[label]["sensitivity_n"].values, torch.ones(3, dtype=torch.float64))
        assert scores[label]["infidelity"].note == ""
    given = measure(model, x, result, *[(one, {**options, "baseline": 0.0}) for one, options in metrics])
    assert given["integrated_gradients"]["infidelity"].values.min() > 1e-3
    assert given["integrated_gradients"]["sensitivity_n"].values.max() < 1 - 1e-6


def test_maps_of_unknown_making_are_measured_against_zero_and_this_is_said():
    model, x = linear_model(W), images(3, 1, 5, 5)
    maps = {"m": W * x[:, 0]}
    for metric in ("infidelity", "sensitivity_n"):
        score = measure(model, x, maps, metric, target=0)["m"][metric]
        assert "nobody knows against which baseline" in score.note
        for options in ({"baseline": 0.0}, {"perturbation": "gaussian"} if metric == "infidelity" else {"baseline": 0}):
            assert measure(model, x, maps, (metric, options), target=0)["m"][metric].note == ""


def test_methods_of_one_baseline_share_their_passes():
    shown = []

    class Counts(nn.Module):
        def forward(self, x):
            shown.append(len(x))
            return x.flatten(1).sum(1, keepdim=True)

    x = images(3, 1, 5, 5)
    result = compared(Counts().eval(), ["saliency", "gradient_x_input", ("deeplift", {"baseline": 0.5})], x, 0)
    shown.clear()
    measure(Counts().eval(), x, result, ("infidelity", {"n_samples": 7}), batch_size=64)
    assert sum(shown) == 3 + 2 * 7 * 3  # the images, and two baselines for the three methods and two controls


# ----------------------------------------------------------------------------------------- metrics that explain again


@pytest.mark.parametrize("seed", [5, [4, 5, 6]])
def test_seeds_are_those_of_the_maps(as_source, seed):
    model = relu_net()
    result = compared(model, [("smoothgrad", {"n_samples": 2}), ("rise", {"n_samples": 4, "grid": 3})], seed=seed)
    scores = measure(model, X, as_source(result), TINY_CHANGE)
    for label in result:
        assert scores[label]["sensitivity_max"].values.max() < 1e-5, label


def test_the_seed_of_one_method_is_known_too():
    model = relu_net()
    maps = attrbox.explain(model, X, "smoothgrad", target=1, n_samples=2, seed=7, progress=False)
    assert measure(model, X, {"m": maps}, TINY_CHANGE)["m"]["sensitivity_max"].values.max() < 1e-5


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_the_precision_is_that_of_the_maps(as_source, precision):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4)).eval()
    x = X.float()
    result = compared(model, ["gradient_x_input", "deeplift"], x, precision=precision)
    scores = measure(
        model, x, as_source(result), ("sensitivity_max", {"radius": 1e-12, "n_samples": 1}), "completeness"
    )
    for label in result:
        assert scores[label]["sensitivity_max"].values.max() < 1e-6, label
    gap = result["deeplift"].relative_gap
    torch.testing.assert_close(scores["deeplift"]["completeness"].values, gap, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("name", BASELINES)
def test_options_that_are_tensors(as_source, name):
    model = relu_net()
    segments = torch.arange(3 * 64).view(3, 8, 8) // torch.tensor([7, 9, 16]).view(3, 1, 1)
    methods = [("deeplift", {"baseline": BASELINES[name]}), ("lime", {"n_samples": 20, "segments": segments})]
    result = compared(model, [*methods, ("lime", {"n_samples": 20, "segments": segments[0]})])
    scores = measure(model, X, as_source(result), TINY_CHANGE)
    for label in result:
        assert scores[label]["sensitivity_max"].values.max() < 1e-5, label


def test_maps_of_another_model_are_not_compared_with_those_of_this_one():
    result = compared(relu_net(), ["saliency"])
    for metric in (TINY_CHANGE, ("cascading_randomization", {"steps": 2})):
        with pytest.raises(InputError, match="'saliency' explain another model"):
            measure(relu_net(seed=3), X, result, metric)
    double = measure(
        relu_net(), X, {"m": replace(result["saliency"], score=result["saliency"].score * (1 + 1e-6))}, TINY_CHANGE
    )
    assert double["m"]["sensitivity_max"].values.max() < 1e-6  # rounding is no other model


# ------------------------------------------------------------------------------------------------ exports, the command


@pytest.mark.parametrize("channels", ["all", "one"])
def test_files_of_export(tmp_path, channels):
    model, x = relu_net().float(), X.float()
    methods = ["saliency", ("deeplift", {"baseline": BASELINES["shared"].float()}), ("smoothgrad", {"n_samples": 2})]
    options = {"channels": channels, "seed": 5, "batch_size": 2, "target": 1}
    export(tmp_path / "maps.h5", x, methods, model, **options)
    paths = [tmp_path / "maps.h5", *attrbox.split(tmp_path / "maps.h5", 2)]
    paths.append(attrbox.merge(paths[1:], tmp_path / "again.h5"))
    for path, rows in zip(paths, (slice(0, 3), slice(0, 2), slice(2, 3), slice(0, 3)), strict=True):
        with attrbox.open_maps(path) as maps:
            metrics = ["completeness", ("sensitivity_max", {"radius": 1e-12, "n_samples": 1}), "infidelity"]
            metrics.append(("cascading_randomization", {"steps": 2}))
            scores = measure(model, x[rows], maps, *metrics)
        assert scores["deeplift"]["completeness"].values.max() < 1e-4
        for label in ("saliency", "deeplift", "smoothgrad"):
            assert scores[label]["sensitivity_max"].values.max() < 1e-5
            lost = channels == "one" and label == "saliency"  # the largest of its channels
            assert scores[label]["infidelity"].left_out.all() == lost
            assert ("do not add up" in scores[label]["infidelity"].note) == lost
            assert not scores[label]["cascading_randomization"].left_out.any()
    if channels == "all":
        with attrbox.open_maps(paths[0]) as maps:
            again = attrbox.recompute(maps, 1, model, x)
            torch.testing.assert_close(again["deeplift"], maps["deeplift"][1], rtol=0, atol=0)


def test_the_command_knows_seeds_and_baselines(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for row in range(3):
        noise = np.random.default_rng(row).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{row}.png")
    path = tmp_path / "maps.h5"
    methods = "deeplift:baseline=0.5,smoothgrad:n_samples=3,saliency"
    done = run("export", folder, "--model", TINY, "-m", methods, "--seed", "7", "--out", path)
    assert done.exit_code == 0, done.output
    metrics = "completeness,sensitivity_max:radius=1e-12,n_samples=1"
    done = run("evaluate", path, "--trust", "--metrics", metrics, "--json")
    assert done.exit_code == 0, done.output
    means = {(row["method"], row["metric"]): row["mean"] for row in json.loads(done.output)["scores"]}
    assert means["deeplift", "completeness"] < 1e-5
    assert means["saliency", "completeness"] is None
    for label in ("deeplift", "smoothgrad", "saliency"):
        assert means[label, "sensitivity_max"] < 1e-5
    told = run("evaluate", path, "--trust", "--metrics", "completeness")
    assert "promises no sum" in told.output


@pytest.mark.parametrize("fill", [0.3, "zero", "mean", "blur", "median"])
def test_words_for_fills_are_baselines(fill, as_source):
    """Of a linear model, drops of the score are sums of the map of single hidden pixels."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 5)).double().eval()
    maps = compared(model, [("occlusion", {"window": 1, "stride": 1, "fill": fill})])
    scores = attrbox.evaluate(model, X, as_source(maps), ["sensitivity_n", "infidelity"], progress=False)["occlusion"]
    torch.testing.assert_close(scores["sensitivity_n"].values, torch.ones(3).double())
    assert scores["infidelity"].values.abs().max() < 1e-20
    assert not scores["infidelity"].note


def test_fills_that_are_not_known_again_are_said():
    model = relu_net()
    maps = compared(model, [("occlusion", {"window": 4, "stride": 4, "fill": "noise"})])
    scores = attrbox.evaluate(model, X, maps, ["infidelity"], progress=False)["occlusion"]
    assert "fill 'noise'" in scores["infidelity"].note
