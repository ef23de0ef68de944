"""A sample meets the same batch mates in every run of an export, whatever was done before, fails, or stands beside."""

import itertools

import numpy as np
import pytest
from exports import Pairs, assert_same, content, export, net, pictures
from torch import nn

import attrbox
from attrbox.errors import FileError, InputError
from attrbox.methods.base import Method
from attrbox.pipeline.shards import Shard

COUNT, SIZE = 11, 3
METHODS = ["saliency", "deeplift", ("integrated_gradients", {"steps": 3}), "smoothgrad"]
LABELS = [entry if isinstance(entry, str) else entry[0] for entry in METHODS]


class Sociable(nn.Module):
    """All scores depend on the images beside, so each map tells whom it met."""

    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x):
        return self.net(x + 0.3 * x.mean(0, keepdim=True) * x.square().mean(0, keepdim=True))


def run(path, data=None, methods=METHODS, **options):
    options = {"batch_size": SIZE, "model": Sociable().eval()} | options
    return export(path, Pairs(pictures(COUNT)) if data is None else data, methods, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "maps.h5"
    run(path)
    return path


def differences(path, whole, rows=range(COUNT)):
    """How far these samples' maps are from those of the whole, relative to the largest value, [samples, methods]."""
    there, here = content(whole), content(path)
    pairs = [(here[f"maps/{label}"][list(rows)], there[f"maps/{label}"][list(rows)]) for label in LABELS]
    return np.stack([np.abs(one - other).max((1, 2, 3)) / np.abs(other).max((1, 2, 3)) for one, other in pairs], 1)


def assert_maps(path, whole, rows=range(COUNT)):
    """The file has the whole's maps of these samples, to the rounding in which methods alone and together differ."""
    assert differences(path, whole, rows).max() < 1e-4


def test_the_maps_tell_whom_a_sample_met(whole, tmp_path):
    run(tmp_path / "alone.h5", batch_size=1)
    assert differences(tmp_path / "alone.h5", whole).min() > 0.02


class Stops(Pairs):
    def __init__(self, images, last, **options):
        super().__init__(images, **options)
        self.last = last

    def __getitem__(self, row):
        if row == self.last:
            raise KeyboardInterrupt
        return super().__getitem__(row)


@pytest.mark.parametrize("last", range(COUNT))
def test_stopped_anywhere_and_resumed(whole, tmp_path, last):
    path = tmp_path / "maps.h5"
    with pytest.raises(KeyboardInterrupt):
        run(path, Stops(pictures(COUNT), last))
    run(path)
    assert_same(path, whole)


@pytest.mark.parametrize("broken", [[1], [4], [3, 4, 5], [2, 7], [0, 10]])
@pytest.mark.parametrize("last", [None, 8])
def test_samples_that_are_retried(whole, tmp_path, broken, last):
    path = tmp_path / "maps.h5"
    try:
        run(path, Stops(pictures(COUNT), last, broken=broken))
    except KeyboardInterrupt:
        assert last is not None
    run(path, retry=True)
    lonely = {row // SIZE for row in broken} - {row // SIZE for row in range(last or COUNT, COUNT)}
    mates = [row for row in range(COUNT) if row // SIZE in lonely and row not in broken]
    assert_maps(path, whole, [row for row in range(COUNT) if row not in mates])  # these were explained without them


@pytest.mark.parametrize("order", list(itertools.permutations(range(4)))[::5])
def test_methods_in_any_order_at_once_or_one_by_one(whole, tmp_path, order):
    methods = [METHODS[place] for place in order]
    run(tmp_path / "at once.h5", methods=methods)
    assert_maps(tmp_path / "at once.h5", whole)
    path = tmp_path / "maps.h5"
    with pytest.raises(KeyboardInterrupt):
        run(path, Stops(pictures(COUNT), 4), methods[:1])
    for number in range(1, 5):
        run(path, methods=methods[:number])
    assert_maps(path, whole)


@pytest.mark.parametrize("shares", [2, 3, 4])
def test_shards_in_any_order(whole, tmp_path, shares):
    for index in reversed(range(shares)):
        run(tmp_path / "maps.h5", shard=Shard(index, shares))
    assert_maps(tmp_path / "maps.h5", whole)


def test_one_sample_once_more(whole):
    with attrbox.open_maps(whole) as maps:
        for row in range(COUNT):
            again = attrbox.recompute(maps, row, Sociable().eval(), Pairs(pictures(COUNT)))
            for label in LABELS:
                np.testing.assert_array_equal(again[label], maps[label].numpy(row))


@pytest.fixture
def fussy():
    """A method that fails on one of the samples, or on a whole batch."""

    @attrbox.register_method("fussy", summary="Raises an error on dark images", reference="made up")
    class Fussy(Method):
        def attribute(self, run):
            if run.images[:, 0, 0, 0].min() < -50:
                raise InputError("too dark")
            return run.gradient()

    yield
    attrbox.method_registry.remove("fussy")


@pytest.mark.parametrize("dark", [[4], [3, 4, 5], [10], [4, 10]])
@pytest.mark.parametrize("methods", [["fussy", *METHODS], [*METHODS, "fussy"]])
def test_a_method_that_fails_leaves_the_others_their_batch(fussy, tmp_path, dark, methods):
    images = pictures(COUNT)
    images[dark, 0, 0, 0] = -60
    run(tmp_path / "whole.h5", Pairs(images))
    summary = run(tmp_path / "maps.h5", Pairs(images), methods)
    assert_maps(tmp_path / "maps.h5", tmp_path / "whole.h5")
    assert set(summary.failed) == {str(row) for row in dark}
    assert all("too dark" in reason for reason in summary.failed.values())
    assert summary.done["fussy"] == COUNT - len(dark)
    assert summary.done["saliency"] == COUNT
    there, here = (content(tmp_path / name) for name in ("whole.h5", "maps.h5"))
    for name in ("score", "target", "prediction", "label", "pixels_sha256"):
        np.testing.assert_array_equal(there[f"samples/{name}"], here[f"samples/{name}"])


def test_a_method_that_cannot_begin_is_told_at_once(fussy, tmp_path):
    images = pictures(COUNT)
    images[:, 0, 0, 0] = -60
    with pytest.raises(InputError, match="too dark"):
        run(tmp_path / "maps.h5", Pairs(images), [*METHODS, "fussy"])
    assert not (tmp_path / "maps.h5").exists()
    run(tmp_path / "maps.h5", Pairs(images))
    with pytest.raises(InputError, match="too dark"):  # nor is a file spoilt
        run(tmp_path / "maps.h5", Pairs(images), [*METHODS, "fussy"])
    assert run(tmp_path / "maps.h5", Pairs(images)).complete


def test_another_batch_size_is_refused(whole):
    with pytest.raises(FileError, match="batch_size 3 there and 4 here"):
        run(whole, batch_size=4)
