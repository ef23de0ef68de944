"""Weights: files of them, random ones, and those that are not on this machine."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from attrbox.errors import FileError, ModelError


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The state dictionary in a file, also from under "state_dict" or "model" and without the prefix "module.".

    Raises:
        FileError: the file is missing, no state dictionary, or would need code to be run.
    """
    try:
        if Path(path).suffix == ".safetensors":
            state: object = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileError(f"There is no file of weights at {str(path)!r}. Give a path, DEFAULT or none.") from None
    except Exception as error:  # broken files make the unpickler raise all sorts of things
        raise FileError(
            f"Cannot read weights from {str(path)!r} ({first_line(error)}). Expected a state dictionary, as "
            "torch.save(model.state_dict(), path) writes it; whole pickled models are not loaded, as they can run code."
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise FileError(f"Expected a state dictionary (names to tensors) in {str(path)!r}, got {type(state).__name__}.")
    return {str(key).removeprefix("module."): value for key, value in state.items()}


def load_state(model: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> None:
    """Put parameters into a model.

    Raises:
        ModelError: they are not those of the model.
    """
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ModelError(
            f"The weights in {str(path)!r} are not those of this model: {' '.join(str(error).split())[:300]}. "
            "Name the model that they were saved from."
        ) from error


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw random parameters by a seed; the global random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def not_here(name: str, reason: str = "") -> ModelError:
    """The error of weights that would have to be downloaded, which nobody asked for."""
    return ModelError(
        f"The weights of {name} are not on this machine. {reason + '. ' if reason else ''}Give weights='DEFAULT' "
        "(--weights DEFAULT) to download them, the file of a state dictionary, or 'none' for random parameters."
    )


def first_line(error: Exception) -> str:
    """Return the type of an exception and the first line of its message."""
    return (
        f"{type(error).__name__}: {str(error).strip().splitlines()[0]}" if str(error).strip() else type(error).__name__
    )
