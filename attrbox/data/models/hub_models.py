"""Classifiers of timm and Hugging Face (extras `timm` and `transformers`), with their own preprocessing and names."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from attrbox.data.labels import imagenet_categories
from attrbox.data.models.loaded_model import LoadedModel
from attrbox.data.models.weights import first_line, load_state, not_here, read_state, seeded
from attrbox.errors import ModelError, UnknownNameError, nearest


def timm_model(name: str, weights: str | Path | None, seed: int) -> LoadedModel:
    """Load a model of timm; see `load_model`.

    Raises:
        UnknownNameError: timm has no such model.
        ModelError: timm is not installed, or the weights cannot be had or do not fit.
    """
    timm = _library("timm", "timm")
    known = timm.list_models() + timm.list_pretrained()
    if name not in known:
        raise UnknownNameError(
            f"timm has no model called {name!r}. {nearest(name, known)}timm.list_models() lists them."
        )
    wanted = "" if weights is None else str(weights)
    if wanted.lower() in ("", "default"):
        if not wanted and not _timm_weights_are_here(timm.models.get_pretrained_cfg(name)):
            raise not_here(f"timm:{name}")
        model = _fetched(name, lambda: timm.create_model(name, pretrained=True))
        source = f"timm {model.pretrained_cfg.get('tag') or 'pretrained'}"
    else:
        with seeded(seed):
            model = timm.create_model(name)
        source = f"random, seed {seed}"
        if wanted.lower() != "none":
            load_state(model, read_state(wanted), wanted)
            source = wanted
    settings = timm.data.resolve_data_config({}, model=model)
    preprocess = timm.data.create_transform(**settings)
    categories = None if wanted.lower() == "none" else _timm_categories(timm.data, model)
    return LoadedModel(model, name, preprocess, categories=categories, weights=source)


def _timm_weights_are_here(settings: Any) -> bool:
    if settings is None or not (settings.hf_hub_id or settings.url):
        return False
    if settings.hf_hub_id:
        hub = importlib.import_module("huggingface_hub")
        files = ("model.safetensors", "pytorch_model.bin")
        return any(isinstance(hub.try_to_load_from_cache(settings.hf_hub_id, file), str) for file in files)
    return (Path(torch.hub.get_dir()) / "checkpoints" / Path(settings.url).name).is_file()


def _timm_categories(data: Any, model: Any) -> tuple[str, ...] | None:
    """The class names where timm knows which part of ImageNet the classes are."""
    subset = data.infer_imagenet_subset(model)
    if not subset:
        return None
    if subset == "imagenet-1k":
        return imagenet_categories()
    info = data.ImageNetInfo(subset)
    return tuple(info.index_to_description(index) for index in range(info.num_classes()))


def hugging_face_model(name: str, weights: str | Path | None, seed: int) -> LoadedModel:
    """Load an image classifier of Hugging Face, by name or from a folder; see `load_model`.

    Raises:
        ModelError: transformers is not installed, or the model is not here, cannot be had or is no image classifier.
    """
    transformers = _library("transformers", "transformers")
    wanted = "" if weights is None else str(weights)
    local = {"local_files_only": wanted.lower() != "default"}
    classifier = transformers.AutoModelForImageClassification

    def load() -> tuple[Any, Any]:
        processor = transformers.AutoImageProcessor.from_pretrained(name, **local)
        if wanted.lower() in ("", "default"):
            return classifier.from_pretrained(name, **local), processor
        with seeded(seed):
            return classifier.from_config(transformers.AutoConfig.from_pretrained(name, **local)), processor

    try:
        model, processor = load()
    except (OSError, ValueError) as error:  # not in the cache, no network, no such model, no classifier
        if local["local_files_only"] and not Path(name).is_dir():
            raise not_here(f"hf:{name}", "Its configuration is needed in any case") from error
        raise ModelError(
            f"Cannot load hf:{name} ({first_line(error)}). Expected the name or the folder of an image classifier with "
            "its preprocessor_config.json."
        ) from error
    if wanted.lower() not in ("", "default", "none"):
        load_state(model, read_state(wanted), wanted)
    trained = wanted.lower() != "none"
    source = f"hf:{name}" if wanted.lower() in ("", "default") else wanted if trained else f"random, seed {seed}"
    names = {int(index): str(text) for index, text in model.config.id2label.items()}
    known = trained and sorted(names) == list(range(len(names)))
    return LoadedModel(
        model,
        Path(name).name if Path(name).is_dir() else name,
        Processor(processor),
        categories=tuple(names[index] for index in sorted(names)) if known else None,
        weights=source,
    )


class Processor:
    """An image processor of Hugging Face as a function from a PIL image to a tensor [C, H, W]."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, image: Image.Image) -> Tensor:
        pixels = self.processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"]
        return torch.as_tensor(pixels)[0]


def _library(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ModelError(
            f"{name} is not installed ({error}). Install the extra: pip install 'attrbox[{extra}]'"
        ) from error


def _fetched(name: str, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except (OSError, RuntimeError) as error:  # no network, no space, no weights of that name
        raise ModelError(
            f"Cannot get the weights of {name} ({first_line(error)}). Fetch the file by other means and give its path "
            "as the weights, or give none for random parameters."
        ) from error
