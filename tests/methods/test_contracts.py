"""What every registered method promises, tried on all of them, in normal and in failing mode."""

import math

import pytest
import torch
from contracts import CAM, COMPOSITES, DRAWN, LEARNED, METHODS, ONE_CHANNEL, OPTIMISED, explain
from nets import FAST, SMALL, five_ways, images, relu_net, squeeze_excitation_net
from snapshots import nothing_changes, snapshot
from torch import Tensor, nn

import attrbox
from attrbox.core.random_streams import streams
from attrbox.errors import AttrboxError, ForwardError, TargetError


@pytest.fixture
def model() -> nn.Module:
    return squeeze_excitation_net()


X = images(5, 3, 8, 8)


@pytest.mark.parametrize("method", METHODS)
class TestEveryMethod:
    def test_shape_dtype_and_meaning(self, model, method):
        maps = explain(model, X, method, target=[0, 1, 2, 3, 0])
        channels = 1 if method in ONE_CHANNEL else 3
        assert maps.values.shape == (5, channels, 8, 8)
        assert maps.values.dtype == X.dtype
        assert maps.values.isfinite().all()
        assert not maps.values.requires_grad
        assert maps.target.tolist() == [0, 1, 2, 3, 0]
        torch.testing.assert_close(maps.score, model(X).detach().gather(1, maps.target[:, None])[:, 0])
        assert maps.heatmap().shape == (5, 8, 8)
        assert maps.method == method
        assert set(maps.options) == {info.name for info in attrbox.method_registry[method].options}

    def test_the_progress_bar_runs_to_its_end(self, model, method, monkeypatch):
        bars = []

        class Bar:
            def __init__(self, total, **settings):
                self.total, self.n, self.moves = total, 0, 0
                bars.append(self)

            def __enter__(self):
                return self

            def __exit__(self, *error):
                pass

            def update(self, passes):
                self.n += passes
                self.moves += passes > 0

        monkeypatch.setattr("attrbox.core.progress.tqdm", Bar)
        explain(model, X, method, batch_size=2)
        (bar,) = bars
        assert bar.n == bar.total
        # Three chunks (`random` asks the model for nothing); what takes many passes tells of each as it goes.
        assert bar.moves >= (0 if bar.total == 0 else 3 if bar.total < 50 else 12)

    def test_argmax_is_the_default_target(self, model, method):
        maps = explain(model, X, method)
        assert maps.target.tolist() == model(X).argmax(1).tolist()
        torch.testing.assert_close(maps.values, explain(model, X, method, target=maps.target).values)

    def test_several_targets_at_once(self, model, method):
        maps = explain(model, X, method, target=attrbox.classes([3, 1]))
        assert maps.values.shape[:2] == (5, 2)
        for k, target in enumerate((3, 1)):
            torch.testing.assert_close(maps.values[:, k], explain(model, X, method, target=target).values)
            torch.testing.assert_close(maps.score[:, k], model(X).detach()[:, target])

    def test_a_target_function(self, model, method):
        maps = explain(model, X, method, target=lambda out: 2 * out[:, 1])
        assert maps.target is None
        if method in LEARNED | OPTIMISED:  # the size of the masks weighs less against twice the score
            maps = explain(model, X, method, target=lambda out: out[:, 1])
            torch.testing.assert_close(maps.values, explain(model, X, method, target=1).values)
            return
        if method in ("grad_cam_plus_plus", "excitation_backprop"):  # the one in between, the other not at all
            assert maps.values.isfinite().all()
            return
        scale = 4 if method in ("squared_smoothgrad", "vargrad", "guided_grad_cam") else 1 if method == "random" else 2
        torch.testing.assert_close(maps.values, scale * explain(model, X, method, target=1).values)

    def test_same_alone_in_a_batch_and_in_any_chunk(self, model, method):
        seeds = [3, 1, 4, 1, 5]
        whole = explain(model, X, method, seed=seeds).values
        for size in (1, 2, 3, 64):
            torch.testing.assert_close(explain(model, X, method, seed=seeds, batch_size=size).values, whole)
        for index, seed in enumerate(seeds):
            alone = explain(model, X[index : index + 1], method, seed=[seed]).values
            torch.testing.assert_close(alone, whole[index : index + 1])
        torch.testing.assert_close(explain(model, X.flip(0), method, seed=seeds[::-1]).values, whole.flip(0))

    def test_second_call_is_the_same_and_seeds_matter_where_they_should(self, model, method):
        first = explain(model, X, method).values
        assert torch.equal(explain(model, X, method).values, first)
        assert torch.equal(explain(model, X, method, seed=1).values, first) == (method not in DRAWN)
        others = [own if place % 2 == 0 else 7 for place, own in enumerate(streams(0, 5))]
        torch.testing.assert_close(explain(model, X, method, seed=others).values[::2], first[::2])

    def test_one_function_written_five_ways(self, method):
        x = images(3, 3, 12, 12)
        maps = {name: explain(model, x, method, target=1).values for name, model in five_ways().items()}
        for name, values in maps.items():
            torch.testing.assert_close(values, maps["modules"], msg=lambda text, name=name: f"{name}: {text}")

    @pytest.mark.filterwarnings("ignore::attrbox.errors.PartialMapWarning")  # attention to queries and keys
    @pytest.mark.parametrize("name", SMALL)
    def test_runs_on_every_net_that_it_is_defined_on(self, method, name):
        build, shape = SMALL[name]
        refusals = {
            "no spatial feature map": method in CAM and name == "vectors",
            r"needs images \[N, C, H, W\]": (
                method in OPTIMISED | {"learned_clean"} and name in ("vectors", "sequences", "volumes")
            )
            or (method == "learned_rank" and name in ("vectors", "sequences", "volumes")),
        }
        if reason := next((reason for reason, holds in refusals.items() if holds), None):
            with pytest.raises(AttrboxError, match=reason):
                explain(build(), images(2, *shape), method)
            return
        values = explain(build(), images(2, *shape), method).values
        assert values.isfinite().all()
        assert values.shape in ((2, *shape), (2, 1, *shape[1:])), name

    @pytest.mark.parametrize("training", [False, True])
    def test_leaves_everything_as_it_was(self, model, method, training):
        model.register_buffer("calls", torch.zeros(()))
        model.register_forward_hook(lambda module, args, output: module.calls.add_(1) and None)
        model.conv.bias.requires_grad_(False)
        model.head.weight.grad = torch.ones_like(model.head.weight)
        model.gate.train(training)
        x = X.clone().requires_grad_()
        with nothing_changes(model, x):
            if training:
                with pytest.warns(attrbox.errors.TrainingModeWarning):
                    explain(model, x, method)
            else:
                explain(model, x, method)

    @pytest.mark.parametrize("fault", ["target", "layer raises", "target function raises"])
    def test_leaves_everything_as_it_was_after_an_error(self, model, method, fault):
        x, target, expected = X.clone(), 0, AttrboxError
        if fault == "target":
            target, expected = 17, TargetError
        elif fault == "layer raises":
            model.head.forward = lambda x: 1 / 0  # past the first half of the model
            expected = ForwardError
        else:
            target, expected = (lambda out: 1 / 0), TargetError  # the user's own error is its cause
        with nothing_changes(model, x), pytest.raises(expected):
            explain(model, x, method, target=target)

    def test_float32_agrees_with_float64(self, model, method):
        exact = explain(model, X, method, seed=3, target=1)
        rough = explain(squeeze_excitation_net(dtype=torch.float32), X.float(), method, seed=3, target=1)
        assert rough.values.dtype == torch.float32
        if method in DRAWN:
            return  # the two precisions draw other numbers
        torch.testing.assert_close(rough.values.double(), exact.values, rtol=1e-3, atol=1e-4)

    def test_meta_device(self, method):
        """Shapes and devices without any number: a tensor made on the wrong device raises here."""
        with torch.device("meta"):
            model = relu_net(pool=True)
        maps = explain(model.to("meta"), torch.empty(3, 3, 8, 8, dtype=torch.float64, device="meta"), method)
        assert maps.values.device.type == "meta"
        assert maps.values.shape[0] == 3

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    def test_gpu_agrees_with_cpu(self, model, method):
        if method in DRAWN - LEARNED:
            pytest.skip("generators of the two devices draw other numbers")
        here = explain(model, X, method, target=1).values
        there = explain(model.cuda(), X.cuda(), method, target=1).values
        assert there.is_cuda
        torch.testing.assert_close(there.cpu(), here)

    def test_works_under_no_grad_and_inference_mode(self, model, method):
        wanted = explain(model, X, method).values
        with torch.no_grad():
            torch.testing.assert_close(explain(model, X, method).values, wanted)
        with torch.inference_mode():
            made_here = X.clone()
            maps = explain(model, made_here, method)
        assert made_here.is_inference()
        torch.testing.assert_close(maps.values, wanted)
        assert not maps.values.is_inference()

    def test_images_may_be_the_result_of_other_work(self, model, method):
        parameter = torch.ones((), dtype=torch.float64, requires_grad=True)
        x = X * parameter
        torch.testing.assert_close(explain(model, x, method).values, explain(model, X, method).values)
        assert parameter.grad is None

    def test_a_model_that_writes_into_its_images(self, model, method):
        class Writes(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = model

            def forward(self, x: Tensor) -> Tensor:
                return self.inner(x.clamp_(-1, 1).mul_(2))

        class Plain(Writes):
            def forward(self, x: Tensor) -> Tensor:
                return self.inner(2 * x.clamp(-1, 1))

        x = X.clone()
        values = explain(Writes().eval(), x, method).values
        assert torch.equal(x, X)
        torch.testing.assert_close(values, explain(Plain().eval(), X, method).values)

    def test_channels_last_images(self, model, method):
        x = X.contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(explain(model, x, method).values, explain(model, X, method).values)


def test_summary_reference_and_units_of_every_method():
    for name in METHODS:
        spec = attrbox.method_registry[name]
        assert spec.name == name
        assert len(spec.summary) > 10
        assert spec.reference
        assert spec.units
        assert all(info.help for info in spec.options), name
        method = spec.create({})
        assert spec.settings(method) == {info.name: info.default for info in spec.options}


def test_the_snapshot_notices_what_it_should(model):
    """The helper of the tests above, itself tested: each kind of leak must be seen."""
    x = X.clone()
    before = snapshot(model, x)
    assert snapshot(model, x) == before
    leaks = [
        (lambda: model.gate.train(True), lambda: model.gate.train(False)),
        (lambda: model.head.weight.requires_grad_(False), lambda: model.head.weight.requires_grad_(True)),
        (
            lambda: setattr(model.head.bias, "grad", model.head.bias.detach()),
            lambda: setattr(model.head.bias, "grad", None),
        ),
        (lambda: setattr(model.conv, "leftover", 1), lambda: delattr(model.conv, "leftover")),
        (lambda: x.add_(1), lambda: x.sub_(1)),
    ]
    for leak, mend in leaks:
        leak()
        assert snapshot(model, x) != before
        mend()
    handle = model.conv.register_forward_hook(lambda *args: None)
    assert snapshot(model, x) != before
    handle.remove()
    torch.rand(1)
    assert snapshot(model, x) != before


def test_gap_and_coverage_are_where_they_should_be(model):
    entries = [(name, FAST.get(name, {})) for name in METHODS]
    result = attrbox.compare(model, X, entries, target=1, progress=False)
    for name in METHODS:
        promised = name in {"deeplift", "integrated_gradients", "lrp_epsilon", "excitation_backprop"} | COMPOSITES
        assert (result[name].gap is not None) == promised
    assert result["deeplift"].relative_gap.max() < 1e-12
    assert result["deeplift"].coverage.complete
    treated = [(o.operation, o.module) for o in result["deeplift"].coverage.rule]
    assert treated == [("relu", ""), ("relu", ""), ("sigmoid", "gate"), ("product", ""), ("tanh", "")]
    guided = result["guided_backprop"].coverage
    assert [o.operation for o in guided.rule] == ["relu", "relu"]
    assert [o.operation for o in guided.derivative] == ["sigmoid", "product", "tanh"]
    assert str(result["rise"].coverage) == "black box, no gradient"
    assert math.isfinite(sum(result.timings.values()))
