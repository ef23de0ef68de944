"""`load_model`: a classifier by name, or of the user's own."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from attrbox.data.models.factories import from_factory
from attrbox.data.models.hub_models import hugging_face_model, timm_model
from attrbox.data.models.loaded_model import LoadedModel
from attrbox.data.models.torchvision_models import torchvision_model, torchvision_names
from attrbox.data.models.weights import load_state, read_state
from attrbox.errors import InputError, ModelError, UnknownNameError, nearest, shown

SHORTHANDS = {"efficientnet_lite0": "attrbox.data.models.factories:efficientnet_lite0"}
# As files of version 0.1 name it.
_OLD_NAMES = {f"attrbox.{old}models:efficientnet_lite0": SHORTHANDS["efficientnet_lite0"] for old in ("", "data.")}
_LIBRARIES = {"torchvision": torchvision_model, "timm": timm_model, "hf": hugging_face_model}


def load_model(
    model: str | nn.Module | LoadedModel,
    *,
    weights: str | Path | None = None,
    preprocess: Callable[[Image.Image], Tensor] | None = None,
    categories: Sequence[str] | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
) -> LoadedModel:
    """Load a classifier with its preprocessing and class names.

    Nothing is downloaded unless `weights` asks for it.

    Args:
        model: one of

            - `"torchvision:NAME"`, a classifier of torchvision;
            - `"timm:NAME"` or `"timm:NAME.TAG"`, a model of timm (extra `timm`);
            - `"hf:NAME"` or `"hf:FOLDER"`, an image classifier of Hugging Face (extra `transformers`);
            - `"package.module:factory"`, a function without arguments that returns a module or a `LoadedModel`;
            - a shorthand: `"efficientnet_lite0"` (extra `demo`);
            - an `nn.Module` of your own.
        weights: "DEFAULT" downloads those that the library recommends, or takes them where they are on this machine;
            torchvision's other sets by name ("IMAGENET1K_V1"); "none" for random parameters; or a file with a state
            dictionary (`torch.save` or safetensors), which is read without running code that it may contain. Default:
            those that are on this machine; a module or a factory brings its own.
        preprocess: a PIL image -> a tensor [C, H, W], in place of the model's own; for an `nn.Module` the default is
            that of most ImageNet classifiers (short side 256, center 224, ImageNet's mean and standard deviation).
        categories: names of the classes, in place of the model's own.
        device: where to move the model. Default: where it is.
        seed: of random parameters.

    Returns:
        The model with its preprocessing and class names; in evaluation mode, but for a module of your own, which is
        left in its mode.

    Raises:
        UnknownNameError: there is no such model.
        ModelError: it cannot be made, or its weights are not here, cannot be had or do not fit.
        FileError: the file of weights cannot be read.

    Example:
        >>> loaded = load_model("torchvision:squeezenet1_1", weights="none")
        >>> loaded.preprocess.crop, loaded.weights
        (224, 'random, seed 0')
    """
    if isinstance(model, str):
        loaded = _by_name(model, weights, seed)
        loaded.model.eval()
    elif isinstance(model, nn.Module | LoadedModel):
        loaded = _with_weights(_as_loaded(model), weights, "an nn.Module")
    else:
        raise InputError(f"Expected a model as a name or an nn.Module, got {shown(model)}.")
    if preprocess is not None:
        loaded = dataclasses.replace(loaded, preprocess=preprocess, mean=None, std=None)
    if categories is not None:
        loaded = dataclasses.replace(loaded, categories=tuple(map(str, categories)))
    return loaded if device is None else loaded.to(device)


def _as_loaded(model: nn.Module | LoadedModel) -> LoadedModel:
    return model if isinstance(model, LoadedModel) else LoadedModel(model, type(model).__name__, weights="its own")


def _by_name(name: str, weights: str | Path | None, seed: int) -> LoadedModel:
    prefix, _, rest = _OLD_NAMES.get(name, SHORTHANDS.get(name, name)).partition(":")
    if not (prefix and rest):
        raise UnknownNameError(
            f"Expected a model as torchvision:NAME, timm:NAME, hf:NAME, package.module:factory or "
            f"{' or '.join(SHORTHANDS)}, got {shown(name)}. "
            f"{nearest(name, SHORTHANDS) or nearest(name, torchvision_names(), 'torchvision:')}".rstrip()
        )
    if prefix in _LIBRARIES:
        return _LIBRARIES[prefix](rest, weights, seed)
    return _with_weights(from_factory(prefix, rest, name), weights, repr(name))


def _with_weights(loaded: LoadedModel, weights: str | Path | None, name: str) -> LoadedModel:
    """The same with parameters from a file, if one is given."""
    if weights is None:
        return loaded
    if str(weights).upper() in ("DEFAULT", "NONE"):
        raise ModelError(f"{name} brings its own parameters, so weights={str(weights)!r} has no meaning. Leave it out.")
    load_state(loaded.model, read_state(weights), weights)
    return dataclasses.replace(loaded, weights=str(weights))
