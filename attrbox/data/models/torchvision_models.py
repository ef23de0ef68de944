"""Classifiers of torchvision, with the preprocessing and class names of their weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torchvision
from torch import Tensor, nn

from attrbox.data.labels import imagenet_categories
from attrbox.data.models.loaded_model import LoadedModel, Preprocess
from attrbox.data.models.weights import first_line, load_state, not_here, read_state, seeded
from attrbox.errors import FileError, ModelError, UnknownNameError, nearest, shown


def torchvision_names() -> list[str]:
    """The classifiers of torchvision."""
    return list(torchvision.models.list_models(module=torchvision.models))


def torchvision_model(name: str, weights: str | Path | None, seed: int) -> LoadedModel:
    """Load a classifier of torchvision; see `load_model`.

    Raises:
        UnknownNameError: torchvision has no such classifier.
        ModelError: the weights are not here, or cannot be had, or do not fit.
        FileError: the file of weights cannot be read.
    """
    if name not in torchvision_names():
        raise UnknownNameError(
            f"torchvision has no classifier called {name!r}. {nearest(name, torchvision_names())}"
            "torchvision.models.list_models(module=torchvision.models) lists them."
        )
    known = torchvision.models.get_model_weights(name)
    if weights is None and not _is_here(known.DEFAULT):
        raise not_here(f"torchvision:{name}")
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
    model = _built(name, seed, _classes(name, state), state)
    load_state(model, state, wanted)
    return _described(model, name, known.DEFAULT, wanted, named=_classes(name, state) == len(imagenet_categories()))


def _classes(name: str, state: Mapping[str, Tensor]) -> int:
    """How many classes a state has: as many as its classifier, which is the last part of the model, has biases."""
    with torch.device("meta"):
        *_, classifier = _built(name, 0, state=state).state_dict()
    return state[classifier].shape[:1].numel() if classifier in state else 1000


def _is_here(weights: Any) -> bool:
    """Whether a set of weights was downloaded before."""
    return (Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name).is_file()


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
    with seeded(seed):
        return cast(nn.Module, torchvision.models.get_model(name, weights=None, **options))


def _downloaded(name: str, weights: Any) -> nn.Module:
    try:
        return cast(nn.Module, torchvision.models.get_model(name, weights=weights))
    except (OSError, RuntimeError) as error:  # no network, no space, a broken download
        raise ModelError(
            f"Cannot download {weights.url} ({first_line(error)}). Fetch the file by other means and give its path as "
            "the weights, or give none for random parameters."
        ) from error
