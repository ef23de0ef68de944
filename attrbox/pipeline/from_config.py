"""What a config names, loaded: the model, the samples, the target."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch

from attrbox.data.images import demo_photographs
from attrbox.data.models.loaded_model import LoadedModel, Preprocess
from attrbox.data.models.loading import load_model
from attrbox.data.samples import Picture, Samples, samples_of
from attrbox.errors import OptionError
from attrbox.pipeline.arguments import parse_device
from attrbox.pipeline.config import Config
from attrbox.pipeline.job import ExportTarget


def model_of(config: Config) -> LoadedModel:
    """The model on its device, with the preprocessing that the config asks for."""
    loaded = load_model(config.model.name, weights=config.model.weights, seed=config.run.seed)
    loaded = loaded.to(parse_device(_own_device(config.run.device)))
    wanted: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name in ("resize", "crop", "mean", "std")
        if (value := getattr(config.data, name)) is not None
    }
    if not wanted:
        return loaded
    if not isinstance(loaded.preprocess, Preprocess):
        raise OptionError(
            f"The model {loaded.name!r} brings a preprocessing of its own, so {', '.join(wanted)} of [data] cannot "
            "change it. Leave them out."
        )
    preprocess = dataclasses.replace(loaded.preprocess, **wanted)
    return dataclasses.replace(loaded, preprocess=preprocess, mean=preprocess.mean, std=preprocess.std)


def _own_device(device: str) -> str:
    """Under torchrun "cuda" is the process's own GPU."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


def samples_for(config: Config, loaded: LoadedModel) -> Samples:
    """The samples, preprocessed for the model."""
    given = config.data.path
    data = demo_photographs() if given == "demo:photographs" else given
    paths = [Path(path) for path in ([data] if isinstance(data, str) else data)]
    picture = Picture(loaded.mean, loaded.std) if config.output.thumbnails else None
    return samples_of(paths, preprocess=loaded.preprocess, picture=picture)


def target_of(config: Config, loaded: LoadedModel) -> ExportTarget:
    """What is explained."""
    target = config.run.target
    if isinstance(target, int):
        return target
    if target == "label":
        return "label"
    return None if target == "argmax" else loaded.class_index(target)


def precision_of(config: Config) -> torch.dtype | None:
    """The dtype of automatic mixed precision, if it is wanted."""
    precision: torch.dtype = getattr(torch, config.run.precision)
    return None if precision is torch.float32 else precision
