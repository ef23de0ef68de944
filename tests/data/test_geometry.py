"""What a preprocessing does to a photograph, found by probing it."""

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

from attrbox.data.geometry import view_of
from attrbox.data.models.loaded_model import Preprocess

to_tensor = transforms.functional.to_tensor


def after(*steps: Callable[[Image.Image], Image.Image]) -> Callable[[Image.Image], Tensor]:
    return transforms.Compose([*steps, transforms.ToTensor()])  # type: ignore[no-any-return]


# A transform, and the box that it takes of a photograph of 600 x 400.
BOXES: dict[str, tuple[Callable[[Image.Image], Tensor], tuple[float, float, float, float]]] = {
    "resize and crop": (Preprocess(resize=256, crop=224), (125, 25, 350, 350)),
    "no crop": (Preprocess(resize=224, crop=224), (100, 0, 400, 400)),
    "squeezed": (after(transforms.Resize((64, 64))), (0, 0, 600, 400)),
    "enlarged": (after(transforms.Resize(800)), (0, 0, 600, 400)),
    "padded": (
        after(transforms.Pad((0, 100)), transforms.Resize(300)),
        (0, -100, 600, 600),
    ),
    "corner": (
        after(transforms.Lambda(lambda im: im.crop((10, 20, 210, 120)))),
        (10, 20, 200, 100),
    ),
    "gray": (
        after(transforms.Grayscale(), transforms.Resize(200)),
        (0, 0, 600, 400),
    ),
}


@pytest.mark.parametrize("name", BOXES)
def test_the_box_that_the_model_sees(name: str) -> None:
    preprocess, box = BOXES[name]
    view = view_of(preprocess, 600, 400)
    assert view is not None
    assert (view.left, view.top, view.width, view.height) == pytest.approx(box, abs=4)


@pytest.mark.parametrize(
    ("mean", "std"), [((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.0,) * 3, (1 / 255,) * 3)]
)
def test_the_normalization(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    view = view_of(Preprocess(mean=mean, std=std), 300, 260)
    assert view is not None
    assert (view.mean, view.std) == (pytest.approx(mean, abs=1e-5), pytest.approx(std, rel=1e-5))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (260, 300, 3), np.uint8))
    pixels = transforms.functional.to_tensor(
        transforms.functional.center_crop(transforms.functional.resize(picture, 256), [224])
    )
    torch.testing.assert_close(view.denormalized(Preprocess(mean=mean, std=std)(picture)), pixels, atol=1e-5, rtol=0)


def raising(image: Image.Image) -> Tensor:
    raise RuntimeError


UNTOLD: dict[str, Callable[[Image.Image], Tensor]] = {
    "random crop": after(transforms.RandomCrop(200)),
    "random crop of Python": lambda im: transforms.functional.to_tensor(
        im.crop((o := random.randint(0, 300), 0, o + 200, 200))
    ),
    "mirrored": after(transforms.RandomHorizontalFlip(1.0)),
    "rotated": after(transforms.RandomRotation((20, 20))),
    "squared": lambda im: to_tensor(im) ** 2,
    "nothing of it": lambda im: torch.zeros(3, 8, 8),
    "an exception": raising,
}


@pytest.mark.parametrize("name", UNTOLD)
def test_what_no_box_can_tell(name: str) -> None:
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    assert view_of(UNTOLD[name], 600, 400) is None
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])  # noqa: NPY002
