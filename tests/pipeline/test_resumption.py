"""An export does not go on with another function, model or object of the same name, and does with an equal one."""

import multiprocessing
from functools import partial

import h5py
import pytest
import torch
from exports import Pairs, assert_same, export, net, pictures
from torch import nn
from torch.nn import functional as F

import attrbox
from attrbox.errors import FileError, InputError

chosen = 0


def score(output, number):
    return output[:, number]


def score_of_the_global(output):
    return output[:, chosen]


def closure(number):
    return lambda output: output[:, number]


class Picks:
    """A target function that is an object, which prints itself with its address."""

    def __init__(self, number):
        self.number = number

    def __call__(self, output):
        return output[:, self.number]

    def method(self, output):
        return output[:, self.number]


def linear(number):
    torch.manual_seed(number)
    layer = nn.Linear(5, 2)
    return lambda output: F.linear(output, layer.weight.detach(), layer.bias.detach())


def head(number):
    layer = nn.Linear(5, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(5)[number : number + 1])
    return layer.requires_grad_(False)


class Box:
    """A black box that is an object."""

    def __init__(self, number):
        self.weights = torch.randn(5, 768, generator=torch.Generator().manual_seed(number))

    def __call__(self, images):
        return images.flatten(1) @ self.weights.T


def boxed(images, box):
    return box(images)


class Scaled(nn.Module):
    """A model with a number that is neither a weight nor printed."""

    def __init__(self, number):
        super().__init__()
        self.net, self.temperature = net(), 1 + number

    def forward(self, x):
        return self.net(x) / self.temperature


def swapped_forward(number):
    model = net()
    last = model[-1].forward
    model[-1].forward = lambda x: last(x).roll(number, 1)
    return model


def rules(number):
    learned = attrbox.explain(net(), pictures(1), "learned", seed=number, iterations=2, target=0, progress=False)
    return [("learned_transfer", {"learned": learned.details["rules"]})]


BLACK = {"methods": [("occlusion", {"window": 8, "stride": 8})]}
# name -> what to export with, by a number of which another means another thing
TARGETS = {
    "lambda": lambda number: [lambda out: out[:, 0], lambda out: out[:, 1]][number],
    "closure": closure,
    "partial": lambda number: partial(score, number=number),
    "object": Picks,
    "method": lambda number: Picks(number).method,
    "module": head,
    "several scores": linear,
}
KINDS = {
    **{name: lambda number, make=make: {"target": make(number)} for name, make in TARGETS.items()},
    "black box, function": lambda number: BLACK | {"model": Box(number).__call__},
    "black box, object": lambda number: BLACK | {"model": Box(number)},
    "black box, partial": lambda number: BLACK | {"model": partial(boxed, box=Box(number))},
    "black box, class": lambda number: BLACK | {"model": Box(number), "target": 2},
    "number of a module": lambda number: {"model": Scaled(number).eval(), "target": 1},
    "forward of a module": lambda number: {"model": swapped_forward(number), "target": 1},
    "object as an option": lambda number: {"methods": rules(number), "target": 0},
}


class Stops(Pairs):
    def __getitem__(self, row):
        if row == 6:
            raise KeyboardInterrupt
        return super().__getitem__(row)


def begun(path, options):
    with pytest.raises(KeyboardInterrupt):
        export(path, Stops(pictures()), **({"methods": ["saliency"]} | options))


def run(path, options):
    return export(path, Pairs(pictures()), **({"methods": ["saliency"]} | options))


def begin_all(folder):
    for name, make in KINDS.items():
        begun(folder / f"{name}.h5", make(0))


@pytest.fixture(scope="module")
def of_another_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("begun")
    process = multiprocessing.get_context("forkserver").Process(target=begin_all, args=(folder,))
    process.start()
    process.join()
    assert process.exitcode == 0
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_another_one_of_its_name_is_refused(tmp_path, kind):
    path = tmp_path / "maps.h5"
    begun(path, KINDS[kind](0))
    before = path.read_bytes()
    with pytest.raises(FileError, match=r"changed since .*Choose another path, or give"):
        run(path, KINDS[kind](1))
    assert path.read_bytes() == before


@pytest.mark.parametrize("kind", KINDS)
def test_an_equal_one_goes_on_in_another_process(of_another_process, tmp_path, kind):
    path = of_another_process / f"{kind}.h5"
    assert run(path, KINDS[kind](0)).images == 6
    run(tmp_path / "whole.h5", KINDS[kind](0))
    assert_same(path, tmp_path / "whole.h5")


def test_a_global_that_a_function_reads(tmp_path, monkeypatch):
    path, options = tmp_path / "maps.h5", {"target": score_of_the_global}
    begun(path, options)
    monkeypatch.setattr("test_resumption.chosen", 1)
    with pytest.raises(FileError, match=r"target function.*the score of '0' was .* now"):
        run(path, options)


@pytest.mark.parametrize("batch_size", [1, 3, 10])
def test_each_end_of_what_is_finished_is_looked_at(tmp_path, batch_size):
    path = tmp_path / "maps.h5"
    run(path, {"batch_size": batch_size, "target": lambda out: out[:, 0]})
    last = net()(pictures()).detach()[-1, 0]
    with pytest.raises(FileError, match="the score of '9'"):
        run(path, {"batch_size": batch_size, "target": lambda out: out[:, 0] + torch.isclose(out[:, 0], last)})


def test_scores_of_another_shape(tmp_path):
    run(tmp_path / "maps.h5", {"target": lambda out: out[:, 0]})
    with pytest.raises(FileError, match="changed since"):
        run(tmp_path / "maps.h5", {"target": lambda out: out[:, :2]})


def test_a_model_that_fails_now(tmp_path):
    def fails(images):
        raise ValueError("the server is down")

    fails.__qualname__, fails.__name__ = Box.__qualname__, "Box"
    run(tmp_path / "maps.h5", BLACK | {"model": Box(0)})
    with pytest.raises(FileError, match=r"cannot be scored any more.*the server is down"):
        run(tmp_path / "maps.h5", BLACK | {"model": fails})


class Drops(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x):
        return F.dropout(self.net(x), 0.5, True)


def test_models_that_draw_random_numbers_go_on(tmp_path):
    for number in range(2):
        torch.manual_seed(number)
        methods = ["saliency", "gradient_x_input"][: 1 + number]
        summary = run(tmp_path / "maps.h5", {"model": Drops().eval(), "target": 1, "methods": methods})
    assert summary.maps == 10


def test_what_an_older_version_named_by_its_address(tmp_path):
    path = tmp_path / "maps.h5"
    begun(path, {"target": Picks(0)})
    with h5py.File(path, "r+") as file:
        text = file.attrs["export"]
        file.attrs["export"] = text.replace("test_resumption.Picks", "<test_resumption.Picks object at 0x7f00>")
        assert file.attrs["export"] != text
    assert run(path, {"target": Picks(0)}).images == 6


def test_maps_are_not_made_again_with_another_function(tmp_path):
    path = tmp_path / "maps.h5"
    run(path, {"target": closure(0)})
    with attrbox.open_maps(path) as maps:
        again = attrbox.recompute(maps, 3, net(), Pairs(pictures()), target=closure(0))
        assert torch.equal(again["saliency"], torch.as_tensor(maps["saliency"][3]))
        with pytest.raises(InputError, match="target function or the model has changed"):
            attrbox.recompute(maps, 3, net(), Pairs(pictures()), target=closure(1))
