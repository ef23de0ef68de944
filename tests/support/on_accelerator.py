"""Everything on a device: the values of the CPU, no operation that mixes the two, and few reads by the host.

`test_accelerator.py` runs this file in a process of its own, as it registers a device with torch.
"""

import copy
import functools

import h5py
import numpy as np
import pytest
import torch
from accelerator import DEVICE, Accelerator, Remote, counted
from exports import grouped
from metric_contracts import MASKS, METRICS, QUICK
from nets import FAST, TRANSFORMERS, images, relu_net, residual_net, seeded
from torch import Tensor, nn

import attrbox


@pytest.fixture(autouse=True)
def _accelerator():
    with Accelerator():
        yield


@functools.cache
def moved_model(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).to(DEVICE)


def moved(value: object) -> object:
    """A model or a tensor on the device; anything else as it is."""
    if isinstance(value, nn.Module):
        return moved_model(value)
    return value.to(DEVICE) if isinstance(value, Tensor) else value


def assert_same(ours: object, cpu: object, **tolerance: float) -> None:
    """The values of the CPU, and on the device."""
    assert isinstance(ours, Remote)
    torch.testing.assert_close(ours.cpu(), cpu, equal_nan=True, **tolerance)


# -------------------------------------------------------------------------------------------------- the device itself


class TestTheDevice:
    def test_tensors_of_two_devices_do_not_mix(self):
        here, there = images(3, 4), images(3, 4).to(DEVICE)
        for mixing in (
            lambda: here + there,
            lambda: there @ here.T,
            lambda: torch.where(here > 0, there, there),
            lambda: torch.cat([here, there]),
            lambda: here[torch.arange(2, device=DEVICE)],
            lambda: there.clone().add_(here),
            lambda: there.index_select(0, torch.arange(2)),
            lambda: nn.functional.linear(there, here),
        ):
            with pytest.raises(RuntimeError, match="the same device"):
                mixing()
        assert_same(there + torch.tensor(2.0).double(), here + 2)
        assert_same(there[torch.arange(2)], here[:2])
        assert_same(there.new_tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]).double())

    def test_reads_by_the_host_are_counted(self):
        x = images(3, 4).to(DEVICE)
        reading = (
            lambda: x[0, 0].item(),
            lambda: bool((x > 0).any()),
            lambda: x.cpu(),
            lambda: x.tolist(),
            lambda: x[x > 0],
            lambda: x.nonzero(),
            lambda: torch.equal(x, x),
            lambda: x.unique(),
            lambda: torch.empty(3, 4).double().copy_(x),
        )
        for read in reading:
            with counted() as reads:
                read()
            assert reads.total() == 1, reads
        with counted() as reads:
            y = x.clone().requires_grad_()
            torch.where(y > 0, y, y * 2).sort(1)[0].sum().backward()
            torch.tensor([1.0, 2.0], device=DEVICE).to(torch.float16)
            x[torch.arange(2, device=DEVICE)] = 1
        assert reads.total() == 0, reads

    def test_values_gradients_views_and_writes_in_place(self):
        x = images(2, 3, 6, 6)
        net = residual_net()
        there = x.to(DEVICE).requires_grad_()
        here = x.clone().requires_grad_()
        moved(net)(there).square().sum().backward()
        net(here).square().sum().backward()
        assert_same(there.grad, here.grad)
        ours, cpu = x.to(DEVICE), x.clone()
        for tensor in (ours, cpu):
            tensor[0, 1].mul_(3).t().add_(1)
            tensor.relu_()
        assert_same(ours, cpu)
        assert ours.contiguous(memory_format=torch.channels_last).stride() == (108, 1, 18, 3)


# --------------------------------------------------------------------------------------------------------- the methods

SMALL = relu_net(pool=True)
X = images(3, 3, 8, 8)
CHUNKS = 2  # of one or two of the three images
ITERATED = ("mask", "smask")


@functools.cache
def transformer() -> nn.Module:
    return TRANSFORMERS["vit"]()


@functools.cache
def required(name: str, on_device: bool) -> dict[str, object]:
    """The options without which a method cannot run, made by the CPU or by the device."""
    model, x = (moved(SMALL), moved(X)) if on_device else (SMALL, X)
    if name == "learned_transfer":
        return {"learned": attrbox.explain(model, x, "learned", target=1, **FAST["learned"]).details["rules"]}
    if name.startswith("pattern"):
        return {
            "patterns": attrbox.fit_patterns(model, moved(images(40, 3, 8, 8)) if on_device else images(40, 3, 8, 8))
        }
    return {}


def explained(name: str, on_device: bool, **options: object) -> attrbox.Attribution:
    spec = attrbox.method_registry[name]
    model, x = (transformer(), images(3, 3, 16, 16)) if spec.only_for else (SMALL, X)
    if on_device:
        model, x = moved(model), moved(x)
    options = FAST.get(name, {}) | required(name, on_device) | {"progress": False, "batch_size": 2} | options
    return attrbox.explain(model, x, name, **options)


@pytest.mark.parametrize("name", attrbox.list_methods())
class TestEveryMethod:
    def test_the_values_of_the_cpu(self, name):
        ours, cpu = (explained(name, on_device, target=[2, 1, 0]) for on_device in (True, False))
        assert_same(ours.values, cpu.values, rtol=1e-9, atol=1e-12)
        assert_same(ours.score, cpu.score)
        assert_same(ours.target, cpu.target)
        assert str(ours.coverage) == str(cpu.coverage)
        assert (ours.gap is None) == (cpu.gap is None)
        for key, detail in cpu.details.items():
            if isinstance(detail, Tensor):
                assert_same(ours.details[key], detail, rtol=1e-9, atol=1e-12)

    def test_targets_of_other_kinds(self, name):
        for target in (None, attrbox.classes([2, 0])):
            ours, cpu = (explained(name, on_device, target=target) for on_device in (True, False))
            assert_same(ours.values, cpu.values, rtol=1e-9, atol=1e-12)
            assert_same(ours.target, cpu.target)

    def test_few_reads_by_the_host(self, name):
        """One for the pixels, one for the values of the maps, one for each chunk, and one for ten iterations of what
        iterates."""
        many = {"iterations": 10} if name in ITERATED else {}
        required(name, True)
        with counted() as reads:
            explained(name, True, target=1, **many)
        allowed = 2 + CHUNKS * (1 + sum(many.values()) // 10)
        if name.startswith("learned"):  # which looks whether a sample has stopped, in each iteration
            allowed += CHUNKS * FAST.get(name, {}).get("iterations", 0)
        if name in ("lime", "kernel_shap"):  # whose equations are solved by the host
            allowed += CHUNKS
        assert reads.total() <= allowed, reads


def test_the_seconds_of_a_method_are_not_those_of_another(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    attrbox.compare(moved(SMALL), moved(X), ["saliency", "deeplift"], progress=False)
    assert waited == [DEVICE] * 4  # at the start, after the forward pass, after each method


def test_all_methods_in_one_call():
    names = [(name, FAST.get(name, {})) for name in attrbox.list_methods() if attrbox.method_registry[name].for_all]
    ours, cpu = (
        attrbox.compare(model, x, names, target=1, progress=False)
        for model, x in ((moved(SMALL), moved(X)), (SMALL, X))
    )
    for label, maps in cpu.items():
        assert_same(ours[label].values, maps.values, rtol=1e-9, atol=1e-12)
    assert_same(ours.predictions, cpu.predictions)
    shared = ["saliency", "deeplift", "lrp_epsilon", "guided_backprop", "grad_cam", "smoothgrad"]
    with counted() as reads:
        attrbox.compare(moved(SMALL), moved(X), shared, target=1, batch_size=1, progress=False)
    assert reads.total() == 2, reads  # the pixels, the values of the maps
    assert ours.table().count("\n") == cpu.table().count("\n")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("deeplift", {"baseline": images(3, 8, 8, seed=1)}),
        ("integrated_gradients", {"baseline": images(3, 3, 8, 8, seed=1)}),
        ("occlusion", {"fill": images(3, 8, 8, seed=1)}),
        ("lime", {"segments": torch.arange(64).view(8, 8) // 8}),
        ("kernel_shap", {"segments": torch.arange(64).view(8, 8) // 16}),
        ("epsilon_gamma_box", {"low": -3.0, "high": 3.0}),
    ],
)
def test_options_that_are_tensors_may_be_on_either_device(name, options):
    cpu = explained(name, False, target=1, **options)
    for given in (options, {key: moved(value) for key, value in options.items()}):
        assert_same(explained(name, True, target=1, **given).values, cpu.values, rtol=1e-9, atol=1e-12)


def test_superpixels_of_the_image():
    x = images(2, 3, 16, 16)
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    for name in ("lime", "kernel_shap"):
        with counted() as reads:
            ours = attrbox.explain(moved(model), moved(x), name, n_samples=12, progress=False)
        assert reads.total() <= 5  # one more, for scikit-image
        cpu = attrbox.explain(model, x, name, n_samples=12, progress=False)
        assert_same(ours.values, cpu.values, rtol=1e-9, atol=1e-12)
        assert_same(ours.details["segments"], cpu.details["segments"])


def test_channels_last_images():
    there = moved(X).contiguous(memory_format=torch.channels_last)
    for name in ("saliency", "deeplift", "learned", "grad_cam"):
        ours = attrbox.explain(moved(SMALL), there, name, target=1, progress=False, **FAST.get(name, {}))
        assert_same(ours.values, explained(name, False, target=1, batch_size=3).values, rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------------------------------- metrics, files, the doctor


@functools.cache
def compared(on_device: bool) -> tuple[nn.Module, Tensor, attrbox.Comparison]:
    model, x = relu_net(), images(4, 3, 8, 8)
    if on_device:
        model, x = moved(model), moved(x)
    names = ["saliency", ("smoothgrad", {"n_samples": 2})]
    return model, x, attrbox.compare(model, x, names, target=[0, 1, 2, 1], progress=False)


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric(metric):
    found = []
    for on_device in (True, False):
        model, x, maps = compared(on_device)
        options = dict(QUICK.get(metric, {}))
        if on_device:
            options = {key: moved(value) for key, value in options.items()}
        with counted() as reads:
            found.append(attrbox.evaluate(model, x, maps, [(metric, options)], masks=MASKS, progress=False))
        # The pixels, the targets and the maps are looked at once, localization looks at maps, masks and numbers, and
        # where maps are made anew (twice here) the pixels, targets, values and sums of each call.
        needs = attrbox.metric_registry[metric].needs
        allowed = 3 + (3 if "masks" in needs else 0) + (8 if "methods" in needs else 0)
        if metric.startswith("road"):  # which imputes on the host, batch by batch
            allowed += 2
        assert reads.total() <= allowed, reads
    for label, cpu in found[1].items():
        ours = found[0][label][metric]
        torch.testing.assert_close(ours.values.cpu(), cpu[metric].values, rtol=1e-8, atol=1e-10, equal_nan=True)
        assert ours.mean == pytest.approx(cpu[metric].mean, nan_ok=True)
    assert found[0].table() == found[1].table()


def test_maps_in_files_and_pictures(tmp_path):
    contents = []
    for on_device in (True, False):
        maps = compared(on_device)[2]
        with h5py.File(maps.to_hdf5(tmp_path / f"{on_device}.h5", dtype="float64")) as file:
            names: list[str] = []
            file.visit(names.append)
            contents.append({name: file[name][()] for name in names if isinstance(file[name], h5py.Dataset)})
        maps.plot(tmp_path / f"{on_device}.png")
    assert contents[0].keys() == contents[1].keys()
    for name, values in contents[0].items():
        if values.dtype.kind == "f":
            np.testing.assert_allclose(values, contents[1][name], rtol=1e-9, atol=1e-12)
        else:
            assert np.array_equal(values, contents[1][name]), name


def test_an_export(tmp_path):
    found = []
    methods = ["saliency", "deeplift", ("rise", FAST["rise"]), ("learned", FAST["learned"]), "random"]
    for on_device in (True, False):
        model = moved(SMALL) if on_device else SMALL
        path = tmp_path / f"{on_device}.h5"
        options = grouped(target=1, batch_size=2, dtype="float64", progress=False)
        with counted() as reads:
            summary = attrbox.export(model, images(5, 3, 8, 8), path, methods, **options)
        assert summary.complete
        weights = len(SMALL.state_dict())  # are hashed by the host
        assert reads.total() <= weights + 3 * (7 + 2 * len(methods)), reads
        with attrbox.open_maps(path) as maps:
            found.append({label: np.stack([one.numpy(row) for row in range(5)]) for label, one in maps.items()})
            again = attrbox.recompute(maps, 3, model, images(5, 3, 8, 8))
        np.testing.assert_array_equal(again["deeplift"].cpu(), found[-1]["deeplift"][3])
        assert attrbox.verify(path) == []
    for label, values in found[0].items():
        np.testing.assert_allclose(values, found[1][label], rtol=1e-9, atol=1e-12)


def test_the_doctor():
    for model, x in ((SMALL, X), (transformer(), images(2, 3, 16, 16))):
        with counted() as reads:
            ours = attrbox.doctor(moved(model), moved(x), target=1)
        cpu = attrbox.doctor(model, x, target=1)
        assert [(one.method, one.verdict) for one in ours.findings] == [
            (one.method, one.verdict) for one in cpu.findings
        ]
        assert ours.operations == cpu.operations
        assert reads.total() <= 6 * len(ours.findings), reads


def test_patterns_fitted_on_the_device():
    ours, cpu = (required("pattern_net", on_device)["patterns"] for on_device in (True, False))
    assert ours.values.keys() == cpu.values.keys()
    for name, values in cpu.values.items():
        torch.testing.assert_close(ours.values[name].cpu(), values)


def test_roar():
    def factory() -> nn.Module:
        return seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(48, 2)), dtype=torch.float32)

    x, labels = images(12, 3, 4, 4, dtype=torch.float32), torch.arange(12) % 2
    maps = {"m": (images(12, 4, 4, seed=2), images(12, 4, 4, seed=3))}
    found = []
    for place in (DEVICE, torch.device("cpu")):
        data = (x.to(place), labels.to(place))
        given = {name: tuple(part.to(place) for part in parts) for name, parts in maps.items()}
        options = {"fractions": (0.5,), "seeds": (0,), "progress": False}
        found.append(attrbox.roar(factory, data, data, given, **options))
    assert [cell.accuracy for cell in found[0].cells] == [cell.accuracy for cell in found[1].cells]
