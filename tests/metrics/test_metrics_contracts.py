"""What every registered metric promises, tried on all of them, in normal and in failing mode; what `evaluate` takes
and refuses; metrics of one's own."""

import importlib.metadata
from dataclasses import dataclass, replace

import h5py
import pytest
import torch
from metric_contracts import MASKS, METRICS, QUICK
from nets import images, relu_net, squeeze_excitation_net
from snapshots import nothing_changes
from torch import nn

import attrbox
from attrbox.core.random_streams import streams
from attrbox.errors import (
    DuplicateNameError,
    ForwardError,
    InputError,
    ModelError,
    OptionError,
    PluginWarning,
    TargetError,
    UnknownNameError,
)
from attrbox.metrics.base import Metric, metric_registry as registry

X = images(4, 3, 8, 8)


@pytest.fixture
def model() -> nn.Module:
    return squeeze_excitation_net()


@pytest.fixture
def maps(model):
    return attrbox.compare(
        model, X, ["saliency", ("smoothgrad", {"n_samples": 2})], target=[0, 1, 2, 1], progress=False
    )


def evaluate(model, x, maps, *metrics, **options):
    chosen = [(name, QUICK.get(name, {})) if isinstance(name, str) else name for name in metrics]
    return attrbox.evaluate(model, x, maps, chosen, **({"progress": False, "masks": MASKS[: len(x)]} | options))


def values(evaluation, metric):
    return torch.stack([scores[metric].values for scores in evaluation.values()])


@pytest.mark.parametrize("metric", METRICS)
class TestEveryMetric:
    def test_shape_dtype_and_meaning(self, model, maps, metric):
        evaluation = evaluate(model, X, maps, metric)
        spec = registry[metric]
        assert list(evaluation) == ["saliency", "smoothgrad", "random", "sobel"]
        assert evaluation.controls == ("random", "sobel")
        for scores in evaluation.values():
            score = scores[metric]
            assert score.values.shape == (4,)
            assert score.values.dtype == X.dtype
            assert score.metric == metric
            assert score.better == spec.better
            assert set(score.options) == {info.name for info in spec.options}
            assert score.left_out.sum() < 4
            assert score.interval[0] <= score.mean <= score.interval[1]
            if score.curves is not None:
                assert score.curves.shape == (4, len(score.fractions))
                assert (score.fractions.diff() > 0).all()
                assert score.axis
        assert metric in evaluation.table()

    def test_same_alone_in_a_batch_and_in_any_chunk(self, model, maps, metric, monkeypatch):
        seeds = [5, 6, 7, 8]
        whole = values(evaluate(model, X, maps, metric, seed=seeds), metric)
        for size in (1, 3, 64):
            other = evaluate(model, X, maps, metric, seed=seeds, batch_size=size)
            torch.testing.assert_close(values(other, metric), whole, equal_nan=True)
        monkeypatch.setattr(importlib.import_module("attrbox.metrics.evaluation"), "_RANKINGS", 1)  # an image at a time
        torch.testing.assert_close(values(evaluate(model, X, maps, metric, seed=seeds), metric), whole, equal_nan=True)
        rows = slice(2, 3)
        one = {}
        for label, full in maps.items():
            provenance = replace(full.provenance, seed=streams(full.provenance.seed, len(X))[rows])
            cut = {"values": full.values[rows], "target": full.target[rows], "score": full.score[rows]}
            one[label] = replace(full, **cut, provenance=provenance)
        alone = evaluate(model, X[rows], one, metric, seed=[7], masks=MASKS[rows])
        torch.testing.assert_close(values(alone, metric), whole[:, 2:3], equal_nan=True)

    def test_second_call_is_the_same(self, model, maps, metric):
        first, again = (values(evaluate(model, X, maps, metric), metric) for _ in range(2))
        assert torch.equal(first.nan_to_num(), again.nan_to_num())

    def test_a_file_measures_as_the_comparison_it_was_made_of(self, model, maps, metric, tmp_path):
        with h5py.File(maps.to_hdf5(tmp_path / "maps.h5", dtype="float64")) as file:
            read = values(evaluate(model, X, file, metric), metric)
        torch.testing.assert_close(read, values(evaluate(model, X, maps, metric), metric), equal_nan=True)

    @pytest.mark.parametrize("training", [False, True])
    def test_leaves_everything_as_it_was(self, model, maps, metric, training):
        model.register_buffer("calls", torch.zeros(()))
        model.register_forward_hook(lambda module, args, output: model.calls.add_(1) and None)
        model.conv.bias.requires_grad_(False)
        model.head.weight.grad = torch.ones_like(model.head.weight)
        model.gate.train(training)
        x, own = X.clone().requires_grad_(), maps["saliency"].values
        with nothing_changes(model, x, own):
            if training:
                with pytest.warns(attrbox.errors.TrainingModeWarning):
                    evaluate(model, x, maps, metric)
            else:
                evaluate(model, x, maps, metric)

    @pytest.mark.parametrize("fault", ["target", "layer raises"])
    def test_leaves_everything_as_it_was_after_an_error(self, model, maps, metric, fault):
        tensors = {label: maps[label].values for label in maps}
        target, expected = 17, TargetError
        if fault == "layer raises":
            model.head.forward = lambda x: 1 / 0  # past the first half of the model
            target, expected = 1, ForwardError
        explainers = {"saliency": "saliency", "smoothgrad": "smoothgrad"}
        with nothing_changes(model, X, tensors["saliency"]), pytest.raises(expected):
            evaluate(model, X, tensors, metric, target=target, explainers=explainers)

    def test_works_under_no_grad_and_inference_mode(self, model, maps, metric):
        wanted = values(evaluate(model, X, maps, metric), metric)
        with torch.no_grad():
            torch.testing.assert_close(values(evaluate(model, X, maps, metric), metric), wanted, equal_nan=True)
        with torch.inference_mode():
            x = X.clone()
            found = evaluate(model, x, maps, metric)
        torch.testing.assert_close(values(found, metric), wanted, equal_nan=True)
        assert not found["saliency"][metric].values.is_inference()

    def test_is_described(self, metric):
        spec = registry[metric]
        assert spec.name == metric
        assert len(spec.summary) > 10
        assert spec.reference
        assert spec.better in ("higher", "lower")
        assert all(info.help for info in spec.options)


def test_what_metrics_need_is_what_they_are_given(model, maps):
    needs = {name: set(registry[name].needs) for name in METRICS}
    assert {name for name in METRICS if not needs[name]} == {"sparseness", "complexity"}
    assert {name for name in METRICS if needs[name] == {"masks"}} == {
        "pointing_game", "relevance_mass", "relevance_rank", "grid_pointing_game",
    }  # fmt: skip
    with pytest.raises(InputError, match="'morf' needs the model"):
        evaluate(None, X, maps, "morf")
    with pytest.raises(InputError, match="'relevance_mass' needs the objects"):
        evaluate(None, X, maps, "relevance_mass", masks=None)
    assert evaluate(None, X, maps, "sparseness", masks=None)["saliency"]["sparseness"].mean > 0


# ---------------------------------------------------------------------------------------------------- maps and targets


def test_the_target_is_that_of_the_maps(model, maps):
    score = evaluate(model, X, maps, "morf")["saliency"]["morf"]
    torch.testing.assert_close(score.curves[:, 0], model(X).detach()[torch.arange(4), [0, 1, 2, 1]])
    plain = evaluate(model, X, {"saliency": maps["saliency"].values}, "morf")["saliency"]["morf"]
    torch.testing.assert_close(plain.curves[:, 0], model(X).detach().amax(1))
    assert torch.equal(evaluate(model, X, maps, "morf", target=[0, 1, 2, 1])["saliency"]["morf"].curves, score.curves)
    with pytest.raises(InputError, match="other targets than those given"):
        evaluate(model, X, maps, "morf", target=0)


def test_another_model_is_measured_on_the_same_maps(maps):
    other = relu_net()
    score = evaluate(other, X, maps, "morf")["saliency"]["morf"]
    torch.testing.assert_close(score.curves[:, 0], other(X).detach()[torch.arange(4), [0, 1, 2, 1]])


def test_maps_may_have_channels_or_not(model):
    full = images(4, 3, 8, 8, seed=1)
    forms = {"full": full, "summed": full.sum(1), "one": full.sum(1, keepdim=True), "array": full.numpy()}
    evaluation = evaluate(model, X, forms, "morf", "completeness", target=1)
    for metric in ("morf", "completeness"):
        rows = values(evaluation, metric)
        for row in rows[1:4]:
            torch.testing.assert_close(row, rows[0])


def test_a_method_is_ranked_by_its_own_reduction(model):
    result = attrbox.compare(model, X, ["saliency"], target=1, progress=False)
    assert result["saliency"].reduction == "max"
    wanted = evaluate(model, X, {"m": result["saliency"].heatmap()}, "morf", target=1)["m"]["morf"]
    torch.testing.assert_close(evaluate(model, X, result, "morf")["saliency"]["morf"].curves, wanted.curves)


def test_controls_can_be_left_out_or_replaced(model, maps):
    assert list(evaluate(model, X, maps, "morf", controls=False)) == ["saliency", "smoothgrad"]
    own = {"random": images(4, 8, 8, seed=9), "m": images(4, 8, 8)}
    evaluation = evaluate(model, X, own, "morf", target=1)
    assert list(evaluation) == ["random", "m", "sobel"]
    assert evaluation.controls == ("random", "sobel")
    plain = evaluate(model, X, {"own": own["random"]}, "morf", target=1)
    assert torch.equal(plain["own"]["morf"].values, evaluation["random"]["morf"].values)


def test_the_controls_are_what_they_are_called():
    from attrbox.metrics.sources import random_control, sobel_control

    numbers = random_control(None, X, None, (1, 2, 1, 3))
    assert torch.equal(numbers[0], numbers[2])
    assert not torch.equal(numbers[0], numbers[1])
    assert abs(numbers.mean()) < 0.2
    assert numbers.std().item() == pytest.approx(1, abs=0.15)
    step = torch.zeros(1, 2, 6, 6)
    step[..., 3:] = 2.0
    edges = sobel_control(None, step, None, (0,))[0, 0]
    assert edges[:, 2:4].tolist() == [[8.0, 8.0]] * 6  # (1 + 2 + 1) times the height of the step
    assert edges[:, [0, 1, 4, 5]].abs().max() == 0
    assert torch.allclose(sobel_control(None, step.mT, None, (0,))[0, 0], edges.T)


def broken(maps, value):
    """The maps with one number of sample 2 replaced."""
    maps = maps.clone()
    maps[2, 1, 3] = value
    return maps


BAD_MAPS = {
    "other samples": (lambda m: {"m": m[:3]}, "Pass the images that the maps are of"),
    "another size": (lambda m: {"m": m[:, :7]}, "Resize the maps"),
    "other channels": (lambda m: {"m": m[:, None].expand(-1, 2, -1, -1)}, "Expected maps of the 4 images"),
    "several targets": (lambda m: {"m": m[:, None, None].expand(-1, 2, 3, -1, -1)}, r"maps\[:, k\]"),
    "NaN": (lambda m: {"m": m, "bad": broken(m, float("nan"))}, r"'bad', samples \[2\]"),
    "infinity": (lambda m: {"bad": broken(m, float("inf"))}, r"'bad', samples \[2\]"),
    "a tensor": (lambda m: m, "For one method"),
    "a number": (lambda m: {"m": 3}, "'m' as a tensor"),
    "nothing": (lambda m: {}, "at least one method"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_MAPS)
def test_maps_that_do_not_fit(model, case):
    make, message = BAD_MAPS[case]
    with nothing_changes(model, X), pytest.raises(InputError, match=message):
        evaluate(model, X, make(images(4, 8, 8, seed=1)), "morf", target=1)


def test_several_targets_at_once_are_refused_with_a_remedy(model, tmp_path):
    result = attrbox.compare(model, X, ["saliency"], target=attrbox.top(2), progress=False)
    with pytest.raises(InputError, match=r"2 targets.*maps.values\[:, k\]"):
        evaluate(model, X, result, "morf")
    with h5py.File(result.to_hdf5(tmp_path / "maps.h5")) as file, pytest.raises(InputError, match="2 targets"):
        evaluate(model, X, file, "morf")
    one = result["saliency"]
    scores = evaluate(model, X, {"saliency": one.values[:, 1]}, "morf", target=one.target[:, 1])
    assert scores["saliency"]["morf"].values.isfinite().all()
    for target in (attrbox.top(2), attrbox.classes([1, 2])):
        with pytest.raises(InputError, match="one target for each image"):
            evaluate(model, X, {"m": one.values[:, 1]}, "morf", target=target)


def test_a_target_function_must_be_given_again(model):
    target = lambda outputs: outputs[:, 0] - outputs[:, 1]  # noqa: E731
    result = attrbox.compare(model, X, ["saliency"], target=target, progress=False)
    with pytest.raises(InputError, match="target=function"):
        evaluate(model, X, result, "morf")
    scores = evaluate(model, X, result, "morf", ("sensitivity_max", {"n_samples": 1, "radius": 1e-9}), target=target)
    torch.testing.assert_close(scores["saliency"]["morf"].curves[:, 0], target(model(X)).detach())
    assert scores["saliency"]["sensitivity_max"].values.max() < 1e-5


def test_maps_of_different_targets_are_refused(model):
    a, b = (attrbox.explain(model, X, "saliency", target=k, progress=False) for k in (0, 1))
    with pytest.raises(InputError, match="different targets"):
        evaluate(model, X, {"a": a, "b": b}, "morf")


def test_files_that_do_not_fit(model, maps, tmp_path):
    path = maps.to_hdf5(tmp_path / "maps.h5")
    with h5py.File(path, "r+") as file:
        file["samples/done/smoothgrad"][2] = False
        with pytest.raises(InputError, match="Only 3 of 4 maps of 'smoothgrad'"):
            evaluate(model, X, file, "morf")
        file["samples/done/smoothgrad"][2] = True
        with pytest.raises(InputError, match="3 images"):
            evaluate(model, X[:3], file, "morf")
        del file["samples"]
        with pytest.raises(InputError, match="that attrbox wrote"):
            evaluate(model, X, file, "morf")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"images": X[0, 0, 0]}, InputError, "batch"),
        ({"images": X * float("nan")}, InputError, "finite pixels"),
        ({"model": "resnet"}, ModelError, "nn.Module"),
        ({"metrics": []}, OptionError, "list of metrics"),
        ({"metrics": "morf"}, OptionError, "list of metrics"),
        ({"metrics": ["mrof"]}, UnknownNameError, "Did you mean 'morf'"),
        ({"metrics": [("morf", 3)]}, OptionError, "pair"),
        ({"batch_size": 0}, OptionError, "batch_size"),
        ({"seed": 0.5}, OptionError, "seed"),
        ({"seed": [1, 2]}, OptionError, "seed"),
        ({"target": [1, 2]}, TargetError, "one target per sample"),
    ],
)
def test_bad_input(model, changes, error, message):
    given = {"model": model, "images": X, "maps": {"m": images(4, 8, 8)}, "metrics": ["morf"], "progress": False}
    with nothing_changes(model, X), pytest.raises(error, match=message):
        attrbox.evaluate(**(given | changes))


def test_memory_that_runs_out_halves_the_batches(model, maps):
    sizes = []

    def hook(module, args):
        sizes.append(len(args[0]))
        if len(args[0]) > 3:
            raise torch.OutOfMemoryError("out of memory")

    wanted = evaluate(model, X, maps, "morf")
    model.register_forward_pre_hook(hook)
    found = evaluate(model, X, maps, "morf", batch_size=16)
    torch.testing.assert_close(values(found, "morf"), values(wanted, "morf"))
    assert max(sizes) == 4  # the images themselves; the views then begin with what had worked


# ------------------------------------------------------------------------------------------------- metrics of one's own


@pytest.fixture
def clean():
    """Takes out again what a test registers."""
    before = set(registry)
    yield
    for name in set(registry) - before:
        registry.remove(name)


def positive_share():
    @attrbox.register_metric("positive_share", summary="Share of positive values", reference="none", aliases=("PS",))
    @dataclass(frozen=True, kw_only=True)
    class PositiveShare(attrbox.Metric):
        power: float = attrbox.option(1.0, "exponent")

        def measure(self, study, outputs):
            return {
                label: attrbox.Measurement((maps.heatmap > 0).flatten(1).double().mean(1) ** self.power)
                for label, maps in study.maps.items()
            }

    return PositiveShare


def test_a_metric_of_ones_own(clean, model):
    positive_share()
    assert "positive_share" in attrbox.list_metrics()
    heatmap = images(4, 8, 8, seed=1)
    scores = evaluate(model, X, {"m": heatmap}, "PS", ("positive_share", {"power": 2.0}))
    wanted = (heatmap > 0).flatten(1).double().mean(1)
    plain, squared = scores["m"].values()
    torch.testing.assert_close(plain.values, wanted)
    torch.testing.assert_close(squared.values, wanted**2)
    assert list(scores["m"]) == ["positive_share", "positive_share(power=2.0)"]


def test_a_metric_of_ones_own_that_asks_the_model(clean, model):
    @attrbox.register_metric("flip", summary="The score of the mirror image", reference="none", better="lower")
    @dataclass(frozen=True, kw_only=True)
    class Flip(attrbox.Metric):
        needs = frozenset({"model"})

        def views(self, study):
            rows = torch.arange(len(study.images))
            return [attrbox.Views(rows, lambda part: study.images[rows[part]].flip(-1))]

        def measure(self, study, outputs):
            return {label: attrbox.Measurement(outputs[0]) for label in study.maps}

    scores = evaluate(model, X, {"m": images(4, 8, 8)}, "morf", "flip", "lerf", target=1)
    torch.testing.assert_close(scores["m"]["flip"].values, model(X.flip(-1))[:, 1].detach())


@pytest.mark.parametrize(
    ("measured", "message"),
    [
        (lambda study: {}, "must measure"),
        (
            lambda study: {label: attrbox.Measurement(torch.zeros(3)) for label in study.maps},
            r"one value per image, \[4\]",
        ),
    ],
)
def test_metrics_that_break_their_contract(clean, model, measured, message):
    metric = type("Broken", (Metric,), {"measure": lambda self, study, outputs: measured(study)})
    attrbox.register_metric("broken", summary="s", reference="r")(dataclass(frozen=True, kw_only=True)(metric))
    with nothing_changes(model, X), pytest.raises(OptionError, match=message):
        evaluate(model, X, {"m": images(4, 8, 8)}, "broken")


def test_names_are_taken_once(clean):
    positive_share()
    for name, aliases in (("morf", ()), ("new", ("PS",))):
        with pytest.raises(DuplicateNameError, match="already taken"):
            attrbox.register_metric(name, summary="s", reference="r", aliases=aliases)(Metric)


def test_plug_ins_enter_by_entry_point(clean, monkeypatch, model):
    class Found:
        """What importlib.metadata returns for an installed package."""

        def __init__(self, name, load):
            self.name, self.value, self.load = name, f"package:{name}", load

    class Plain(Metric):
        """Zero for all."""

        better = "lower"

        def measure(self, study, outputs):
            return {label: attrbox.Measurement(study.images.new_zeros(len(study))) for label in study.maps}

    def broken():
        raise ImportError("no such module")

    found = [Found("plain", lambda: dataclass(frozen=True, kw_only=True)(Plain)), Found("broken", broken)]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: found if group == "attrbox.metrics" else [])
    monkeypatch.setattr(registry, "_plugins_loaded", False)
    with pytest.warns(PluginWarning, match="'broken'"):
        assert "plain" in attrbox.list_metrics()
    assert registry["plain"].summary == "Zero for all."
    assert registry["plain"].better == "lower"
    assert evaluate(model, X, {"m": images(4, 8, 8)}, "plain")["m"]["plain"].mean == 0
