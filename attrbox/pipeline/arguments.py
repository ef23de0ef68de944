"""Words of the command line turned into what the library takes."""

import ast
import re
from typing import Any

import torch

from attrbox.data.models.loaded_model import LoadedModel
from attrbox.errors import OptionError, shown
from attrbox.methods.base import method_registry as registry

_BETWEEN_OPTIONS = r",(?![^\[(]*[\])])"  # a comma that is not in brackets
_BETWEEN_METHODS = _BETWEEN_OPTIONS + r"(?!\s*\w+\s*=)"  # and that no option follows


def parse_methods(texts: list[str]) -> list[tuple[str, dict[str, Any]]]:
    """Methods with their options.

        "saliency,integrated_gradients:steps=100,baseline=0.5"
        -> [("saliency", {}), ("integrated_gradients", {"steps": 100, "baseline": 0.5})]

    Args:
        texts: NAME or NAME:OPTION=VALUE,OPTION=VALUE, any number of them separated by commas. Values are Python
            literals, or else words. "all" stands for every method that needs no option.

    Raises:
        OptionError: the text has another form.
    """
    parsed: list[tuple[str, dict[str, Any]]] = []
    for entry in (entry.strip() for text in texts for entry in re.split(_BETWEEN_METHODS, text)):
        name, colon, settings = entry.partition(":")
        pairs = [setting.partition("=") for setting in re.split(_BETWEEN_OPTIONS, settings)] if colon else []
        if not name or "=" in name or not all(key.strip() and value.strip() for key, _, value in pairs):
            raise OptionError(
                f"Expected methods as NAME,NAME:OPTION=VALUE,OPTION=VALUE, got {shown(entry)} in {texts}."
            )
        if entry == "all":
            parsed.extend((known, {}) for known in registry if registry[known].for_all)
        else:
            parsed.append((name, {key.strip(): _literal(value.strip()) for key, _, value in pairs}))
    return parsed


def parse_target(text: str, loaded: LoadedModel) -> int | list[int] | None:
    """The explained classes: "argmax" -> None, "281" or "tabby" -> 281, "281,espresso" -> [281, 967].

    Raises:
        UnknownNameError: there is no class of that name.
    """
    if text == "argmax":
        return None
    indices = [loaded.class_index(part.strip()) for part in text.split(",")]
    return indices if "," in text else indices[0]


def parse_device(text: str) -> torch.device:
    """A device that this machine has.

    Raises:
        OptionError: it has no such device.
    """
    try:
        number = torch.zeros(1, device=text)
        number.cpu()  # refuses the device "meta"
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]
        raise OptionError(
            f"Cannot use the device {text!r} ({reason}). Choose cpu, or one of this machine's."
        ) from error
    return number.device


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
