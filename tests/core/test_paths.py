"""What is no path gets an error of attrbox that says so, wherever a path is taken."""

import os

import pytest
import torch
from exports import export, net, pictures

import attrbox
from attrbox.data.images import find_images, open_image
from attrbox.data.labels import read_labels
from attrbox.data.models.weights import read_state
from attrbox.errors import AttrboxError, FileError
from attrbox.pipeline.config import load
from attrbox.pipeline.report.page import write_report


class Odd(os.PathLike):
    def __fspath__(self):
        return 3


BAD = {"None": None, "number": 3, "bytes": b"maps.h5", "empty": "", "blank": " ", "nul": "a\0b", "object": Odd()}


@pytest.fixture(scope="module")
def comparison():
    return attrbox.compare(net(), pictures(2), ["saliency"], progress=False)


@pytest.fixture(scope="module")
def scores(comparison):
    return attrbox.evaluate(None, pictures(2), comparison, ["sparseness"], progress=False)


@pytest.fixture(scope="module")
def patterns():
    return attrbox.fit_patterns(net(), [pictures(2)])


@pytest.fixture(scope="module")
def maps_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("maps") / "maps.h5"
    export(path, methods=["saliency"])
    return path


TAKES_A_PATH = {
    "export": lambda bad, _: export(bad, methods=["saliency"]),
    "open_maps": lambda bad, _: attrbox.open_maps(bad),
    "verify": lambda bad, _: attrbox.verify(bad),
    "merge from": lambda bad, _: attrbox.merge([bad], "maps.h5"),
    "merge to": lambda bad, get: attrbox.merge([get("maps_path")], bad),
    "split": lambda bad, _: attrbox.split(bad, 2),
    "to_hdf5": lambda bad, get: get("comparison").to_hdf5(bad),
    "to_csv": lambda bad, get: get("scores").to_csv(bad),
    "patterns": lambda bad, get: get("patterns").save(bad),
    "patterns from": lambda bad, get: type(get("patterns")).load(bad),
    "report from": lambda bad, _: write_report(bad, "page.html"),
    "report to": lambda bad, get: write_report(get("maps_path"), bad),
    "config": lambda bad, _: load([bad]),
    "labels": lambda bad, _: read_labels(bad),
    "image": lambda bad, _: open_image(bad),
    "found": lambda bad, _: find_images([bad]),
    "weights": lambda bad, _: read_state(bad),
    "roar": lambda bad, _: attrbox.roar(net, None, None, {}, folder=bad),
    "figure": lambda bad, get: get("comparison").plot(bad),
}
MEANS_NO_FILE = {("figure", "None"), ("roar", "None")}


@pytest.mark.parametrize(
    ("what", "bad"), [(what, bad) for what in TAKES_A_PATH for bad in BAD if (what, bad) not in MEANS_NO_FILE]
)
def test_what_is_no_path(what, bad, request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileError) as caught:
        TAKES_A_PATH[what](BAD[bad], request.getfixturevalue)
    assert any(text in str(caught.value) for text in ("Expected", "Cannot read", "Give a path"))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("paths", [None, 3, "maps.h5", b"maps.h5"])
def test_what_is_no_list_of_paths(paths, tmp_path):
    with pytest.raises(AttrboxError, match="Expected a list of files to merge"):
        attrbox.merge(paths, tmp_path / "all.h5")


@pytest.mark.parametrize("paths", [None, 3, torch.ones(2)])
def test_what_is_no_list_of_images(paths):
    with pytest.raises(AttrboxError, match="Expected"):
        find_images(paths)


def test_names_that_are_too_long(tmp_path):
    for call in (attrbox.open_maps, lambda path: export(path, methods=["saliency"]), open_image, attrbox.verify):
        with pytest.raises(FileError):
            call(tmp_path / ("x" * 300))
    with pytest.raises(FileError):
        find_images([tmp_path / ("x" * 300)])


def test_an_open_file_is_no_path(maps_path):
    with attrbox.open_maps(maps_path) as maps, pytest.raises(FileError, match="Expected the name of a file of maps"):
        attrbox.open_maps(maps.file)


def test_paths_of_all_kinds(tmp_path):
    class Own(os.PathLike):
        def __fspath__(self):
            return str(tmp_path / "maps.h5")

    export(Own(), methods=["saliency"])
    for path in (tmp_path / "maps.h5", str(tmp_path / "maps.h5"), Own()):
        with attrbox.open_maps(path) as maps:
            assert list(maps) == ["saliency"]
