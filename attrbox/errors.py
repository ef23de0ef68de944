"""What can go wrong, as exceptions.

    AttrboxError
    ├── InputError            images or baselines that cannot be explained
    ├── TargetError           a target that the model's output does not have
    ├── OptionError           an unknown option, or a value out of range
    ├── UnknownNameError      no method, rule or model of that name
    ├── DuplicateNameError    a name registered twice
    ├── ModelError            a model that cannot be run or explained
    │   ├── ForwardError      the model itself raised; the original exception is the cause
    │   ├── UnsupportedModelError  scripted, compiled or replicated: operations cannot be seen
    │   ├── NonFiniteError    scores, or with strict=True maps, that are NaN or infinite
    │   └── NoGradientError   the output does not depend on the images
    ├── RuleError             a propagation rule broke its contract
    ├── TrainingError         a model could not be trained; the original exception is the cause
    ├── OutOfMemoryError      not even one image fits
    └── FileError             a file that cannot be read or written
        └── BusyError         a file that another process is writing

Every message says what was expected, what came, and what to do. Each class also derives from the
built-in exception that callers would expect (`ValueError`, `RuntimeError`, ...).
"""

import contextlib
import difflib
from collections.abc import Iterable, Iterator
from typing import Any


class AttrboxError(Exception):
    """Base class of all errors that attrbox raises on purpose."""


class InputError(AttrboxError, ValueError):
    """Images or baselines have the wrong type, shape or values."""


class TargetError(AttrboxError, ValueError):
    """The target does not fit the model's output or the number of images."""


class OptionError(AttrboxError, ValueError):
    """An option is unknown or its value is out of range."""


class UnknownNameError(AttrboxError, LookupError):
    """No such method, rule or model."""


class DuplicateNameError(AttrboxError, ValueError):
    """A name is already taken in a registry."""


class ModelError(AttrboxError, RuntimeError):
    """The model cannot be run or explained."""


class ForwardError(ModelError):
    """The model's forward pass raised; see `__cause__`."""


class UnsupportedModelError(ModelError):
    """The model hides its operations (scripted, compiled, replicated)."""


class NonFiniteError(ModelError):
    """The explained scores, or with strict=True the maps, are NaN or infinite."""


class NoGradientError(ModelError):
    """The explained score does not depend on the images."""


class RuleError(AttrboxError, RuntimeError):
    """A propagation rule reads what it did not declare, or returns something ill-shaped."""


class TrainingError(AttrboxError, RuntimeError):
    """A factory or trainer raised; see `__cause__`. What was finished before is kept."""


class OutOfMemoryError(AttrboxError, MemoryError):
    """A single image does not fit into memory."""


class FileError(AttrboxError, OSError):
    """A file cannot be read or written."""


class BusyError(FileError):
    """Another process is writing the file."""


@contextlib.contextmanager
def at_work(rows: slice, what: str) -> Iterator[None]:
    """Tell an exception which images were at work: one that a user's function or rule caused in its message, others in
    a note."""
    try:
        yield
    except Exception as error:
        first, last = rows.start, rows.stop - 1
        images = f"image {first} was" if first == last else f"images {first} to {last} were"
        told = f"This was raised while {images} {what}."
        if isinstance(error, RuleError | TargetError) and error.__cause__ is not None:
            error.args = (f"{error} {told}",)
        else:
            error.add_note(told)
        raise


class PluginWarning(UserWarning):
    """A third-party plug-in could not be loaded; the rest works."""


class PassedOverWarning(UserWarning):
    """Entries of a folder that could have been images are passed over; the message names them."""


class NonFiniteWarning(UserWarning):
    """Maps have values that are NaN or infinite; the message names the images and where these arose."""


class NothingHiddenWarning(UserWarning):
    """What hides pixels equals what they show, so a method that hides them has nothing to tell."""


class PartialMapWarning(UserWarning):
    """The scores come from earlier feature maps by ways around the one that is explained, which is a part of them."""


class OptimisationWarning(UserWarning):
    """A map that is found by optimisation was stopped early, because its loss was not finite."""


class RenamedWarning(DeprecationWarning):
    """An option is given by its old name, which works for one release only; the message has the new one."""


class TrainingModeWarning(UserWarning):
    """The model was in training mode and is explained in evaluation mode."""


def shown(value: Any, depth: int = 0) -> str:
    """A value in a message, however large it is: tensors and arrays by shape, modules by class, the rest cut short."""
    if hasattr(value, "shape") and hasattr(value, "dtype") and value.shape:
        return f"{type(value).__name__} of shape {list(value.shape)} and {value.dtype}"
    if hasattr(value, "named_modules") and not isinstance(value, type):
        return type(value).__name__
    if type(value) in (list, tuple) and depth < 3:
        items = [shown(item, depth + 1) for item in value[:8]]
        items += [f"... {len(value)} in all"] if len(value) > len(items) else []
        return f"[{', '.join(items)}]" if isinstance(value, list) else f"({', '.join(items)})"
    if type(value) is dict and depth < 3:
        return "{" + ", ".join(f"{key!r}: {shown(item, depth + 1)}" for key, item in list(value.items())[:8]) + "}"
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:100]} ... ({type(value).__name__} of {len(text)} characters)"


def near_miss(name: str, known: Iterable[str]) -> str:
    """A sentence that helps after a misspelt name: the nearest ones, then all."""
    names = sorted(known)
    return f"{nearest(str(name), names)}Known: {', '.join(names) or 'none'}."


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """A sentence with the names that are nearest to a misspelt one, or nothing."""
    by_folded = {known_name.casefold(): prefix + known_name for known_name in known}
    near = [by_folded[match] for match in difflib.get_close_matches(name.casefold(), by_folded, n=3)]
    return f"Did you mean {' or '.join(repr(match) for match in near)}? " if near else ""
