"""A classifier with the preprocessing and the class names that belong to it."""

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import functional as transforms
from torchvision.transforms.functional import InterpolationMode

from attrbox.core.model_state import untouched
from attrbox.core.outputs import unwrap
from attrbox.data.geometry import view_of
from attrbox.data.labels import ClassNames

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocess:
    """A PIL image -> a normalised tensor [3, crop, crop].

    The short side is resized to `resize` pixels, the centre is cut out, and `(pixel - mean) / std` taken of pixels
    from 0 to 1. The defaults are those of most ImageNet classifiers.
    """

    resize: int = 256
    crop: int = 224
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: InterpolationMode = InterpolationMode.BILINEAR

    def __call__(self, image: Image.Image) -> Tensor:
        resized = transforms.resize(image.convert("RGB"), [self.resize], self.interpolation)
        pixels = transforms.to_tensor(transforms.center_crop(resized, [self.crop]))
        return cast(Tensor, transforms.normalize(pixels, self.mean, self.std))


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A classifier that is ready to be explained.

    Attributes:
        model: the module.
        name: how it is called in figures and files.
        preprocess: a PIL image -> a normalized tensor [C, H, W].
        mean, std: of that normalization, so that figures can undo it. None: found by `attrbox.data.geometry.view_of`;
            it stays None where the preprocessing is no linear normalization.
        categories: the names of the classes; None where they are not known.
        weights: where the parameters come from, in words.
    """

    model: nn.Module
    name: str
    preprocess: Callable[[Image.Image], Tensor] = Preprocess()
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    categories: tuple[str, ...] | None = None
    weights: str = "as the factory made them"

    def __post_init__(self) -> None:
        if self.mean is None or self.std is None:
            view = view_of(self.preprocess, 320, 320)
            object.__setattr__(self, "mean", None if view is None else view.mean)
            object.__setattr__(self, "std", None if view is None else view.std)

    def class_name(self, index: int) -> str:
        """The name of a class, or "class 7" where names are not known."""
        known = self.categories is not None and 0 <= index < len(self.categories)
        return self.categories[index] if self.categories is not None and known else f"class {index}"

    def class_index(self, name: str) -> int:
        """The index of a class, given as its number, its name, or for those of ImageNet its WordNet id.

        Raises:
            UnknownNameError: no class has that name, or several do.
        """
        if re.fullmatch(r"-?[0-9]+", name):
            return int(name)
        return ClassNames(self.categories).index(name)

    def predict(self, images: Tensor, batch_size: int = 16) -> tuple[Tensor, Tensor]:
        """The most probable class of each image and its probability, both [N], by softmax."""
        with untouched(self.model), torch.no_grad():
            outputs = [unwrap(self.model(part)).float().softmax(1) for part in torch.split(images, batch_size)]
        probabilities, classes = torch.cat(outputs).max(1)
        return classes, probabilities

    def photographs(self, images: Tensor) -> Tensor:
        """Undo the normalization of images [N, C, H, W]: pixels from 0 to 1.

        Where it is not known, each image is stretched to its own range.
        """
        if self.mean is None or self.std is None:
            low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
            return (images - low) / (high - low).clamp_min(1e-12)
        mean, std = (torch.tensor(values).to(images).view(-1, 1, 1) for values in (self.mean, self.std))
        return (images * std + mean).clamp(0, 1)

    def to(self, device: torch.device | str) -> "LoadedModel":
        """The same with its model moved to a device (in place, as `nn.Module.to` does)."""
        return dataclasses.replace(self, model=self.model.to(device))
