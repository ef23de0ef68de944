"""Files that version 0.1 wrote, one of them interrupted after 8 of 10 samples, open, verify and go on."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from exports import METHODS, Pairs, content, export, net, pictures

import attrbox

FILES = Path(__file__).parents[1] / "support/files"


@pytest.fixture
def whole(tmp_path):
    return shutil.copy(FILES / "schema1.h5", tmp_path)


@pytest.fixture
def interrupted(tmp_path):
    return shutil.copy(FILES / "schema1_interrupted.h5", tmp_path)


def test_it_opens_and_verifies(whole):
    assert attrbox.verify(whole) == []
    with attrbox.open_maps(whole) as maps:
        assert list(maps) == [name if isinstance(name, str) else name[0] for name in METHODS]
        assert maps["saliency"].attribution(range(10)).values.shape == (10, 3, 16, 16)


def test_its_maps_are_made_again(whole):
    with attrbox.open_maps(whole) as maps:
        again = attrbox.explain(net(), pictures(), "deeplift", progress=False).values
        np.testing.assert_allclose(maps["deeplift"].attribution(range(10)).values, again, rtol=1e-3, atol=1e-5)


def test_an_interrupted_one_goes_on(interrupted, whole):
    assert attrbox.verify(interrupted) == []
    summary = export(interrupted, Pairs(pictures()), compression="gzip")
    assert summary.images == 2
    one, other = content(interrupted), content(whole)
    assert one.keys() == other.keys()
    for name, values in one.items():
        if name.startswith("maps"):
            np.testing.assert_allclose(values, other[name], rtol=1e-3, atol=1e-5, err_msg=name)


def test_a_method_is_added(whole):
    summary = export(whole, Pairs(pictures()), methods=[*METHODS, "gradient_x_input"], compression="gzip")
    assert summary.maps == 10
    assert attrbox.verify(whole) == []
