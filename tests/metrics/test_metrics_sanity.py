"""Sanity checks, robustness, axioms, complexity: closed forms and oracles."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from linear_models import W, linear_model, measure
from nets import images, overlapping_pool_net, relu_net, residual_net, seeded, squeeze_excitation_net
from scipy import stats
from snapshots import nothing_changes
from torch import Tensor, nn

import attrbox
from attrbox.errors import InputError, ModelError, OptionError
from attrbox.metrics.robustness.sanity import execution_order, randomize, randomized
from attrbox.metrics.robustness.similarity import pearson, spearman, ssim

X = images(3, 3, 8, 8)


# ---------------------------------------------------------------------------------------------------------- similarity


def test_spearman_agrees_with_scipy_ties_included():
    a, b = images(4, 5, 6).round(), images(4, 5, 6, seed=1).round()
    assert len(a.unique()) < 12
    wanted = [stats.spearmanr(one.flatten(), other.flatten()).statistic for one, other in zip(a, b, strict=True)]
    np.testing.assert_allclose(spearman(a, b).numpy(), wanted, rtol=1e-12)


def test_similarity_closed_forms():
    a, flat = images(2, 9, 9), torch.full((2, 9, 9), 0.1)
    assert spearman(a, a).tolist() == [1, 1]
    assert spearman(a, -a).tolist() == pytest.approx([-1, -1])
    assert spearman(a.abs(), (-a).abs()).tolist() == [1, 1]
    assert spearman(flat, flat).tolist() == [1, 1]
    assert spearman(flat.double(), a).tolist() == [0, 0]
    assert ssim(a, a).tolist() == pytest.approx([1, 1])
    assert ssim(a, 3 * a + 2).tolist() == pytest.approx([1, 1])  # stretched to 0 .. 1
    assert (ssim(a, -a) < 0).all()
    noise = flat[0] * (1 + torch.rand(9, 9, generator=torch.Generator().manual_seed(0)) * 1e-7)
    assert pearson(noise.flatten(), a[0].float().flatten()).isnan()  # rounding is no signal


def test_ssim_agrees_with_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    a, b = (images(2, 20, 17, seed=s) for s in (0, 1))
    b = a + 0.4 * b
    for one, other, value in zip(a, b, ssim(a, b), strict=True):
        scaled = [((m - m.min()) / (m.max() - m.min())).numpy() for m in (one, other)]
        wanted = metrics.structural_similarity(
            *scaled, data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert value.item() == pytest.approx(wanted, rel=2e-3)  # its window is truncated elsewhere


# ------------------------------------------------------------------------------------------------------- randomisation


def test_maps_that_ignore_the_weights_score_one():
    still = {"blind": lambda model, x, target, seeds: x.sum(1)}
    metrics = [
        (name, {"similarity": similarity})
        for name in ("cascading_randomization", "independent_randomization")
        for similarity in ("spearman", "spearman_abs", "ssim")
    ]
    metrics.append(("label_randomization", {"other": relu_net(seed=5)}))
    evaluation = measure(relu_net(), X, {"blind": X.sum(1)}, *metrics, explainers=still, target=1)
    assert set(evaluation) == {"blind", "random", "sobel"}
    for scores in evaluation.values():
        for score in scores.values():
            torch.testing.assert_close(score.values, torch.ones(3, dtype=torch.float64))


def test_maps_that_follow_the_weights_do_not():
    result = attrbox.compare(relu_net(), X, ["saliency", "gradient_x_input"], target=1, progress=False)
    scores = measure(
        relu_net(), X, result, "cascading_randomization", ("label_randomization", {"other": relu_net(seed=5)})
    )
    for method in ("saliency", "gradient_x_input"):
        for score in scores[method].values():
            assert score.mean < 0.7
    curve = scores["saliency"]["cascading_randomization"]
    assert torch.equal(curve.curves[:, 0], torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(curve.values, curve.curves[:, 1:].mean(1))
    assert curve.fractions.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert set(curve.details) == {"spearman", "spearman_abs", "ssim"}
    torch.testing.assert_close(curve.details["spearman"], curve.curves)
    assert not torch.equal(curve.details["ssim"], curve.curves)


def test_independent_stages_begin_with_the_model_as_it_is():
    """Of a map that shows whether the last layer is as it was, the cascade destroys all, the other one stage."""
    model = relu_net()
    *_, last = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    name = next(name for name, module in model.named_modules() if module is last)

    def kept(other, x, target, seeds):
        same = torch.equal(other.get_submodule(name).weight, last.weight)
        return x.sum(1) if same else -x.sum(1)

    metrics = [(f"{kind}_randomization", {"steps": 4}) for kind in ("cascading", "independent")]
    both = measure(model, X, {"m": X.sum(1)}, *metrics, explainers={"m": kept}, target=1)["m"].values()
    cascading, independent = (score.curves[0].round(decimals=9).tolist() for score in both)
    assert cascading == [1, -1, -1, -1, -1]
    assert independent == [1, -1, 1, 1, 1]


def test_negated_maps_are_alike_in_absolute_value_only():
    negated = {"m": lambda model, x, target, seeds: -x.sum(1)}
    metrics = [("independent_randomization", {"similarity": s}) for s in ("spearman", "spearman_abs")]
    signed, absolute = measure(relu_net(), X, {"m": X.sum(1)}, *metrics, explainers=negated, target=1)["m"].values()
    assert signed.values.tolist() == pytest.approx([-1] * 3)
    assert absolute.values.tolist() == pytest.approx([1] * 3)


def test_saliency_of_a_randomised_linear_layer_is_its_new_weights():
    model = linear_model(W)
    x = images(1, 1, 5, 5)
    (share, other), *rest = randomized(model, x, seed=3)
    assert share == 1
    assert not rest
    assert not torch.equal(other[1].weight, model[1].weight)
    maps = attrbox.explain(other, x, "saliency", target=0, progress=False).values
    torch.testing.assert_close(maps.flatten(), other[1].weight.abs().flatten().detach())


class _Backwards(nn.Module):
    """Layers run in another order than they are registered in; one is only a store of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 4)
        self.inner = nn.Sequential(nn.Linear(6, 4), nn.ReLU())
        self.scale = nn.Parameter(torch.ones(4))
        self.first = nn.Conv2d(3, 6, 3)
        self.store = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(self.first(x).mean((2, 3)))
        return self.scale * F.linear(self.last(x), self.store.weight)


def test_layers_are_taken_in_the_order_in_which_they_run():
    model = seeded(_Backwards)
    assert execution_order(model, X) == ["first", "inner.0", "last", "", "store"]
    names = [name for name, _ in model.named_parameters()]

    def changed(other: nn.Module) -> set[str]:
        pairs = zip(names, model.parameters(), other.parameters(), strict=True)
        return {name.rpartition(".")[0] for name, one, two in pairs if not torch.equal(one, two)}

    cascade = [changed(other) for _, other in randomized(model, X, steps=5)]
    assert cascade == [
        {"store"}, {"store", ""}, {"store", "", "last"}, {"store", "", "last", "inner.0"},
        {"store", "", "last", "inner.0", "first"},
    ]  # fmt: skip
    alone = [changed(other) for _, other in randomized(model, X, steps=5, cascading=False)]
    assert alone == [{"store"}, {""}, {"last"}, {"inner.0"}, {"first"}]
    assert [share for share, _ in randomized(model, X, steps=2)] == [pytest.approx(0.4), 1]  # round(2.5) is 2


def test_every_layer_draws_its_own_numbers():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))).eval()
    *_, (_, other) = randomized(model, torch.zeros(1, 4), seed=1)
    weights = [layer.weight for layer in other]
    assert not torch.equal(weights[0], weights[1])
    again = list(randomized(model, torch.zeros(1, 4), seed=1))[-1][1]
    assert torch.equal(again[0].weight, weights[0])
    assert not torch.equal(list(randomized(model, torch.zeros(1, 4), seed=2))[-1][1][0].weight, weights[0])


def test_parameters_without_an_initialisation_keep_their_spread():
    module = nn.Module()
    module.weight = nn.Parameter(5 * images(400))
    before = module.weight.detach().clone()
    randomize(module, 0)
    assert not torch.equal(module.weight, before)
    assert module.weight.std().item() == pytest.approx(5, rel=0.2)
    for start in (torch.tensor([7.0]), torch.zeros(1), torch.ones(400)):  # which have none: their size, or 1
        module.weight = nn.Parameter(start.clone())
        randomize(module, 0)
        assert module.weight.isfinite().all()
        assert not torch.equal(module.weight, start)
        if len(start) > 1:
            assert module.weight.std().item() == pytest.approx(1, rel=0.2)


def test_refusals():
    with pytest.raises(ModelError, match="without"):
        list(randomized(nn.Flatten(), X))
    model = relu_net()
    model.lock = __import__("threading").Lock()  # cannot be copied
    with pytest.raises(ModelError, match="deepcopy"):
        list(randomized(model, X))
    maps = {"m": X.sum(1)}
    with pytest.raises(InputError, match="nobody knows how the maps of m"):
        measure(relu_net(), X, maps, "cascading_randomization")
    with pytest.raises(InputError, match="needs the model"):
        measure(None, X, maps, "cascading_randomization", explainers={"m": "saliency"})
    with pytest.raises(InputError, match="some of other"):
        measure(relu_net(), X, maps, "morf", explainers={"other": "saliency"})
    with pytest.raises(InputError, match="Expected an explainer"):
        measure(relu_net(), X, maps, "morf", explainers={"m": 3})
    for name, options in (
        ("cascading_randomization", {"steps": 0}),
        ("cascading_randomization", {"similarity": "cosine"}),
        ("label_randomization", {"other": 3}),
        ("label_randomization", {}),
        ("sensitivity_max", {"radius": 0}),
        ("sensitivity_max", {"n_samples": 0}),
        ("infidelity", {"perturbation": "holes"}),
        ("infidelity", {"std": 0}),
        ("infidelity", {"max_side": 0}),
        ("infidelity", {"n_samples": 0}),
        ("infidelity", {"scale": 1}),
        ("sensitivity_n", {"fractions": (0.5, 1.0)}),
        ("sensitivity_n", {"n_samples": 1}),
        ("completeness", {"baseline": float("nan")}),
    ):
        with pytest.raises(OptionError, match=next(iter(options), "other")):
            measure(relu_net(), X, maps, (name, options), explainers={"m": "saliency"})


@pytest.mark.parametrize("build", [residual_net, overlapping_pool_net])
def test_the_model_is_restored_exactly_also_after_an_exception(build):
    model = build()
    x = images(2, 3, *((8, 8) if build is residual_net else (13, 13)))
    calls = []

    def fails(model, images, target, seeds):
        calls.append(model)
        if len(calls) == 2:
            raise ZeroDivisionError
        return images.sum(1)

    for metric in ("cascading_randomization", "independent_randomization"):
        calls.clear()
        with nothing_changes(model, x), pytest.raises(ZeroDivisionError):
            measure(model, x, {"m": x.sum(1)}, metric, explainers={"m": fails}, target=1)
        assert all(other is not model for other in calls)  # a copy is randomised


# ------------------------------------------------------------------------------------------------------ sensitivity_max


def test_the_gradient_of_a_linear_model_is_not_sensitive():
    x = images(2, 1, 5, 5)
    model = linear_model(W)
    result = attrbox.compare(model, x, ["saliency", "gradient_x_input"], target=0, progress=False)
    scores = measure(model, x, result, ("sensitivity_max", {"radius": 0.1, "n_samples": 4}))
    assert scores["saliency"]["sensitivity_max"].values.tolist() == [0, 0]
    values = scores["gradient_x_input"]["sensitivity_max"].values
    # A change of at most .1 everywhere, in all draws; and no less than a random one would give.
    bound = 0.1 * W.norm() / (W * x[:, 0]).flatten(1).norm(dim=1)
    assert (values <= bound).all()
    assert (values > 0.3 * bound).all()
    wider = measure(model, x, result, ("sensitivity_max", {"radius": 0.2, "n_samples": 4}))
    torch.testing.assert_close(wider["gradient_x_input"]["sensitivity_max"].values, 2 * values)
    more = measure(model, x, result, ("sensitivity_max", {"radius": 0.1, "n_samples": 12}))
    assert (more["gradient_x_input"]["sensitivity_max"].values > values).any()
    nothing = measure(model, x, {"m": torch.zeros(2, 5, 5)}, "sensitivity_max", explainers={"m": "saliency"}, target=0)
    assert nothing["m"]["sensitivity_max"].left_out.all()


def test_the_noise_is_uniform_on_both_sides():
    seen = []

    def looks(model, x, target, seeds):
        seen.append(x - X)
        return x.sum(1)

    metric = ("sensitivity_max", {"radius": 0.1, "n_samples": 20})
    measure(relu_net(), X, {"m": X.sum(1)}, metric, explainers={"m": looks}, target=1, controls=False)
    noise = torch.stack(seen)
    assert noise.abs().max() <= 0.1
    assert noise.mean().abs() < 0.005
    assert noise.std() == pytest.approx(0.1 / math.sqrt(3), rel=0.03)


def test_methods_that_draw_are_asked_with_the_seed_of_the_maps():
    model = relu_net()
    result = attrbox.compare(model, X, [("smoothgrad", {"n_samples": 2})], target=1, seed=[4, 5, 6], progress=False)
    tiny = ("sensitivity_max", {"radius": 1e-9, "n_samples": 1})
    assert (measure(model, X, result, tiny)["smoothgrad"]["sensitivity_max"].values < 1e-4).all()
    explainers = {"smoothgrad": ("smoothgrad", {"n_samples": 2})}  # of seed 0
    other = measure(model, X, {"smoothgrad": result["smoothgrad"].values}, tiny, explainers=explainers, target=1)
    assert (other["smoothgrad"]["sensitivity_max"].values > 1e-2).all()


# --------------------------------------------------------------------------------------------------------------- axioms


def test_infidelity_closed_forms():
    x, model = images(2, 1, 5, 5), linear_model(W)
    maps = {"w": W.expand(2, -1, -1), "zero": torch.zeros(2, 5, 5), "twice": -2 * W.expand(2, -1, -1)}
    gaussian = {"perturbation": "gaussian", "std": 0.3, "n_samples": 3000}
    scaled, plain = (
        measure(model, x, maps, ("infidelity", gaussian | {"scale": scale}), target=0) for scale in (True, False)
    )
    wanted = 0.3**2 * W.square().sum().item()
    for scores in (scaled, plain):
        assert scores["w"]["infidelity"].values.max() < 1e-20
        np.testing.assert_allclose(scores["zero"]["infidelity"].values, wanted, rtol=0.15)
    assert scaled["twice"]["infidelity"].values.max() < 1e-20
    np.testing.assert_allclose(plain["twice"]["infidelity"].values, 9 * wanted, rtol=0.15)


def test_contributions_have_no_infidelity_to_squares():
    x, model = images(2, 1, 5, 5), linear_model(W)
    contributions = W * x[:, 0]
    metrics = [("infidelity", {"scale": False}), ("infidelity", {"scale": False, "baseline": 0.5})]
    zero, other = measure(model, x, {"m": contributions}, *metrics, target=0)["m"].values()
    assert zero.values.max() < 1e-20
    assert other.values.min() > 1e-3
    shifted = W * (x[:, 0] - 0.5)
    assert measure(model, x, {"m": shifted}, metrics[1], target=0)["m"]["infidelity"].values.max() < 1e-20


def test_squares_have_every_size_and_place():
    from attrbox.core.targets import Target
    from attrbox.metrics.context import Study
    from attrbox.metrics.faithfulness.axioms import Infidelity

    study = Study(images=torch.zeros(1, 1, 6, 4), maps={}, rows=slice(0, 1), seeds=(3,), target=Target(0, 1))
    seen = set()
    for draw in range(800):
        rows, columns = Infidelity(max_side=3).weights(study, draw)[0].nonzero().T
        side = int(rows.max() - rows.min()) + 1
        assert len(rows) == side**2 == (int(columns.max() - columns.min()) + 1) ** 2
        seen.add((side, int(rows.min()), int(columns.min())))
    assert seen == {(s, r, c) for s in (1, 2, 3) for r in range(7 - s) for c in range(5 - s)}


def test_sensitivity_n_of_the_contributions_to_a_linear_model_is_one():
    x, model = images(2, 1, 5, 5), linear_model(W)
    exact = W * x[:, 0]
    maps = {"exact": exact, "negated": -exact, "flat": torch.ones(2, 5, 5), "noise": images(2, 5, 5, seed=3)}
    metric = ("sensitivity_n", {"fractions": (0.04, 0.4, 0.8), "n_samples": 40})
    scores = measure(model, x, maps, metric, target=0)
    torch.testing.assert_close(scores["exact"]["sensitivity_n"].curves, torch.ones(2, 3, dtype=torch.float64))
    torch.testing.assert_close(scores["negated"]["sensitivity_n"].values, -torch.ones(2, dtype=torch.float64))
    assert scores["flat"]["sensitivity_n"].left_out.all()  # the sum of n equal values does not vary
    noise = scores["noise"]["sensitivity_n"]
    assert noise.values.abs().max() < 0.7
    torch.testing.assert_close(noise.values, noise.curves.mean(1))


def test_the_sets_of_sensitivity_n_have_n_pixels():
    sizes = []

    class Counts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            sizes.extend((x == 0).flatten(1).sum(1).tolist())
            return x.flatten(1).sum(1, keepdim=True)

    metric = ("sensitivity_n", {"fractions": (0.04, 0.4, 0.8), "n_samples": 3})
    measure(Counts().eval(), torch.ones(1, 1, 5, 5), {"m": images(1, 5, 5)}, metric, target=0)
    assert sorted(filter(None, sizes)) == [*[1] * 3, *[10] * 3, *[20] * 3]


def test_completeness_closed_forms():
    model, x = relu_net(), X
    methods = ["deeplift", ("integrated_gradients", {"steps": 200}), "saliency"]
    result = attrbox.compare(model, x, methods, target=1, progress=False)
    scores = measure(model, x, result, ("completeness", {"baseline": 0.0}))
    assert scores["deeplift"]["completeness"].values.max() < 1e-12
    assert scores["integrated_gradients"]["completeness"].values.max() < 0.02
    gap = (result["saliency"].values.flatten(1).sum(1) - (model(x) - model(torch.zeros_like(x)))[:, 1]).abs()
    wanted = gap / (model(x) - model(torch.zeros_like(x)))[:, 1].abs()
    torch.testing.assert_close(scores["saliency"]["completeness"].values, wanted.detach())
    exact = attrbox.explain(model, x, "deeplift", target=1, baseline=0.5, progress=False).values
    shifted = measure(model, x, {"m": exact}, ("completeness", {"baseline": 0.5}), target=1)
    assert shifted["m"]["completeness"].values.max() < 1e-12
    same = measure(model, torch.zeros_like(x), {"m": exact}, ("completeness", {"baseline": 0.0}), target=1)
    assert same["m"]["completeness"].left_out.all()


def test_perturbations_of_an_image_are_its_own():
    model = squeeze_excitation_net()
    maps = {"m": images(3, 8, 8, seed=1)}
    for metric in (
        "infidelity",
        ("infidelity", {"perturbation": "gaussian"}),
        ("sensitivity_n", {"n_samples": 5, "fractions": (0.5,)}),
    ):
        whole = measure(model, X, maps, metric, target=1, seed=[7, 8, 9])["m"]
        alone = measure(model, X[1:2], {"m": maps["m"][1:2]}, metric, target=1, seed=[8])["m"]
        for name in whole:
            torch.testing.assert_close(whole[name].values[1:2], alone[name].values)
        other = measure(model, X, maps, metric, target=1, seed=[7, 1, 9])["m"]
        for name in whole:
            assert torch.equal(other[name].values != whole[name].values, torch.tensor([False, True, False]))


# ----------------------------------------------------------------------------------------------------------- complexity


def test_sparseness_and_complexity_closed_forms():
    one_hot, uniform = torch.zeros(1, 2, 2), torch.ones(1, 2, 2)
    one_hot[0, 0, 1] = -3
    steps = torch.tensor([[[4.0, -3.0], [2.0, 1.0]]])
    maps = torch.cat([one_hot, uniform, steps, torch.zeros(1, 2, 2)])
    scores = attrbox.evaluate(None, torch.zeros(4, 1, 2, 2), {"m": maps}, ["sparseness", "complexity"])["m"]
    assert scores["sparseness"].values[:3].tolist() == pytest.approx([0.75, 0, 0.25])
    shares = [0.4, 0.3, 0.2, 0.1]
    entropy = -sum(a * math.log(a) for a in shares)
    assert scores["complexity"].values[:3].tolist() == pytest.approx([0, math.log(4), entropy])
    for score in scores.values():
        assert score.left_out.tolist() == [False, False, False, True]


@pytest.mark.parametrize("metric", ["cascading_randomization", "independent_randomization"])
@pytest.mark.parametrize("seed", [0, 7, [5, 6, 7]])
def test_all_images_are_compared_with_the_same_random_models(metric, seed):
    model = relu_net()
    whole = attrbox.compare(model, X, ["saliency"], target=1, progress=False)
    wanted = attrbox.evaluate(model, X, whole, [metric], seed=seed, progress=False)["saliency"][metric].values
    small = attrbox.evaluate(model, X, whole, [metric], seed=seed, batch_size=1, progress=False)["saliency"][metric]
    torch.testing.assert_close(small.values, wanted)
    for row in range(3):
        alone = attrbox.compare(model, X[row : row + 1], ["saliency"], target=1, progress=False)
        own = seed if isinstance(seed, int) else seed[row : row + 1]
        found = attrbox.evaluate(model, X[row : row + 1], alone, [metric], seed=own, progress=False)
        torch.testing.assert_close(found["saliency"][metric].values, wanted[row : row + 1])
