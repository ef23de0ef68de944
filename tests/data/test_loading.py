"""Photographs of all kinds become the same batch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import attrbox
from attrbox.data.models.loaded_model import LoadedModel, Preprocess
from attrbox.errors import AttrboxError, InputError

PIXELS = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
SMALL = Preprocess(resize=32, crop=28)

KINDS: dict[str, Callable[[Path], Any]] = {
    "file": lambda folder: folder / "a.png",
    "text": lambda folder: str(folder / "a.png"),
    "folder": lambda folder: folder,
    "PIL": lambda folder: Image.fromarray(PIXELS),
    "array": lambda folder: PIXELS,
    "array of numbers": lambda folder: PIXELS / 255,
    "array of float32": lambda folder: (PIXELS / 255).astype(np.float32),
    "array in Fortran's order": lambda folder: np.asfortranarray(PIXELS),
    "batch of arrays": lambda folder: PIXELS[None],
    "tensor": lambda folder: torch.from_numpy(PIXELS).movedim(-1, 0),
    "batch of tensors": lambda folder: torch.from_numpy(PIXELS).movedim(-1, 0)[None],
    "opaque": lambda folder: np.dstack([PIXELS, np.full((60, 80, 1), 255, np.uint8)]),
    "list": lambda folder: [Image.fromarray(PIXELS)],
    "generator": lambda folder: (one for one in [PIXELS]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_batch(kind: str, tmp_path: Path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    images = attrbox.load_images(KINDS[kind](tmp_path), SMALL)
    assert torch.equal(images.values, SMALL(Image.fromarray(PIXELS))[None])
    assert np.array_equal(np.asarray(images.photograph(0)), PIXELS)  # whole, not as the model sees it
    assert images.names == (["a"] if "file" in kind or kind in ("text", "folder") else ["image 0"])
    view = images.views[0]
    assert view is not None
    assert (view.left, view.width) == pytest.approx((13.75, 52.5), abs=1)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "I;16", "CMYK"])
def test_all_modes_are_seen_as_rgb(mode: str) -> None:
    image = Image.fromarray(PIXELS)
    if mode == "I;16":
        image = Image.fromarray(PIXELS[:, :, 0].astype(np.uint16) * 257)
    images = attrbox.load_images(image.convert(mode) if mode != "I;16" else image, SMALL)
    assert images.values.shape == (1, 3, 28, 28)
    assert images.photograph(0).mode == "RGB"


def test_mixed_lists_keep_their_order(tmp_path: Path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    images = attrbox.load_images(
        [PIXELS, tmp_path / "a.png", Image.new("L", (50, 70))], LoadedModel(torch.nn.Identity(), "i", SMALL)
    )
    assert images.names == ["image 0", "a", "image 2"]
    assert images.sources == [None, tmp_path / "a.png", None]
    assert [image.names[0] for image in images] == images.names
    assert images[-1].photograph(0).size == (50, 70)
    assert len(images[:2]) == 2


BAD: dict[str, tuple[Any, str]] = {
    "address": ("https://example.org/cat.jpg", "Download the image first"),
    "number": (3, "got int"),
    "none": (None, "got NoneType"),
    "mapping": ({"a": PIXELS}, "got dict"),
    "nothing": ([], "at least one image"),
    "channels first": (PIXELS.transpose(2, 0, 1), "Move the channels to the end"),
    "two channels": (PIXELS[:, :, :2], "Expected an array"),
    "out of range": (PIXELS.astype(np.float32), "from 0 to 1, got float32 from 0 to 255"),
    "NaN": (np.full((4, 4), np.nan), "from nan to nan"),
    "integers": (PIXELS.astype(np.int64), "got int64"),
    "preprocessed": (torch.zeros(1, 3, 28, 28), "give it to explain as it is"),
    "empty": (np.zeros((0, 4, 3), np.uint8), "Expected an array"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_photograph(name: str) -> None:
    images, message = BAD[name]
    with pytest.raises(InputError, match=message):
        attrbox.load_images(images, SMALL)


@pytest.mark.parametrize("preprocess", [None, "resize", lambda image: image, lambda image: 1 / 0])
def test_what_is_no_preprocessing(preprocess: Any) -> None:
    with pytest.raises(AttrboxError, match="preprocess"):
        attrbox.load_images(PIXELS, preprocess)
