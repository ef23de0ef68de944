"""What there is to choose from, and what is said of it."""

import doctest
import io

import pytest
from rich.console import Console

import attrbox
from attrbox.errors import UnknownNameError
from attrbox.methods import describing


def test_examples():
    assert doctest.testmod(describing).failed == 0


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("grad_cam", ["grad_cam"]),
        ("GRAD_CAM*", ["grad_cam", "grad_cam_plus_plus"]),
        ("IG", ["integrated_gradients"]),
        ("*no such*", []),
    ],
)
def test_patterns(pattern, names):
    assert attrbox.list_methods(pattern) == names
    assert attrbox.list_methods() == list(attrbox.method_registry)


@pytest.mark.parametrize("name", attrbox.list_methods())
def test_every_method_is_described(name):
    described, spec = attrbox.describe(name), attrbox.method_registry[name]
    text = str(described)
    console = Console(width=600, file=io.StringIO())
    console.print(described)
    for shown in (text, console.file.getvalue()):
        assert spec.summary in shown
        assert spec.reference in shown
        assert all(info.name in shown and info.help in shown for info in spec.options)
    assert ("(required)" in text) == bool(spec.required)
    assert (described.passes is None) == bool(spec.required)


def test_unknown_names():
    with pytest.raises(UnknownNameError, match="deeplift"):
        attrbox.describe("deeplfit")
