"""Options: what a method or a metric can be set to, the records that list them, and how entries are chosen by name."""

import dataclasses
import difflib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from attrbox.core.registry import Registry
from attrbox.core.renaming import renamed
from attrbox.core.validation import dense
from attrbox.errors import OptionError, shown


class _Required:
    """Stands where a default would be."""

    def __repr__(self) -> str:
        return "required"


REQUIRED = _Required()


def option(default: Any, help: str, formerly: str = "") -> Any:
    """A field of a method or a metric.

    Args:
        default: `REQUIRED` if there is none.
        help: one line.
        formerly: the name that it had in the last release, which still works and is warned of.
    """
    return field(default=default, metadata={"help": help, "formerly": formerly})


@dataclass(frozen=True)
class OptionInfo:
    """One option of a method: name, default and a line of help."""

    name: str
    default: Any
    help: str
    formerly: str = ""

    def __str__(self) -> str:
        return f"{self.name}={self.default!r}: {self.help}"


def option_infos(cls: type, defaults: Mapping[str, Any] = MappingProxyType({})) -> tuple[OptionInfo, ...]:
    """The options of a dataclass: its fields, with other defaults where some are given."""
    return tuple(
        OptionInfo(field.name, defaults.get(field.name, _default(field)), *_told(field))
        for field in (dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ())
        if field.init
    )


def _told(field: dataclasses.Field[Any]) -> tuple[str, str]:
    return str(field.metadata.get("help", "")), str(field.metadata.get("formerly", ""))


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return REQUIRED if field.default is dataclasses.MISSING else field.default


B = TypeVar("B")


@dataclass(frozen=True)
class Spec(Generic[B]):
    """A registry record of something with options: a method, a metric. `build(**options)` makes one."""

    kind: ClassVar[str]

    name: str
    build: Callable[..., B] = field(repr=False)
    summary: str
    reference: str
    options: tuple[OptionInfo, ...] = ()
    aliases: tuple[str, ...] = ()

    @property
    def required(self) -> tuple[str, ...]:
        """The options without which it cannot be built."""
        return tuple(info.name for info in self.options if info.default is REQUIRED)

    def settings(self, built: B) -> dict[str, Any]:
        """The value of each option of what `create` made."""
        return {info.name: getattr(built, info.name) for info in self.options}

    def current(self, options: Mapping[str, Any], warn: bool = True) -> dict[str, Any]:
        """The options by their names of today; those by old names are warned of.

        Raises:
            InputError: an option is given by both of its names.
        """
        names = {info.formerly: info.name for info in self.options if info.formerly}
        return renamed(options, names, f"{self.kind} {self.name!r}", warn)

    def create(self, options: Mapping[str, Any]) -> B:
        """The method, or whatever it is, with these options.

        Raises:
            OptionError: an option is unknown, missing or out of range.
            InputError: an option is a nested tensor, or given by its old name and its new one.
        """
        options = self.current(options)
        known = {info.name for info in self.options}
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"Did you mean {near[0]!r}? " if near else ""
                raise OptionError(
                    f"The {self.kind} {self.name!r} has no option {name!r}. {hint}"
                    f"Options: {', '.join(sorted(known)) or 'none'}."
                )
        for info in self.options:
            if info.default is REQUIRED and info.name not in options:
                raise OptionError(f"The {self.kind} {self.name!r} needs the option {info.name!r}: {info.help}.")
        options = {
            name: dense(value, f"the option {name!r}") if isinstance(value, Tensor) else value
            for name, value in options.items()
        }
        try:
            return self.build(**options)
        except TypeError as error:  # wrong types that a method's own checks compare
            raise OptionError(
                f"The options {dict(options)!r} do not fit the {self.kind} {self.name!r}: {error}."
            ) from error


S = TypeVar("S", bound=Spec[Any])


def choose(registry: Registry[S], entries: Sequence["str | tuple[str, Mapping[str, Any]]"]) -> dict[str, tuple[S, Any]]:
    """What is asked for by name, or by name and options: label -> the record and what it builds.

    A name that comes twice is told apart by its options, as in "integrated_gradients(steps=100)", and where these are
    the same, too, by a number, as in "saliency #2".

    Raises:
        OptionError: nothing is asked for, or with options that do not fit.
        UnknownNameError: there is nothing of that name.
    """
    if isinstance(entries, str) or not entries:
        raise OptionError(
            f"Expected a list of {registry.kind}s by name, or (name, {{'option': value}}), got {shown(entries)}."
        )
    chosen: dict[str, tuple[S, Any]] = {}
    for entry in entries:
        name, options = (entry, {}) if isinstance(entry, str) else _pair(registry.kind, entry)
        spec = registry[name]
        options = spec.current(options)
        made = spec.create(options)
        settings = spec.settings(made)
        others = {label: spec.settings(built) for label, (known, built) in chosen.items() if known is spec}
        label = next((other for other, there in others.items() if not _differing(settings, there)), spec.name)
        if others and label == spec.name and (other := _differing(settings, others[label])):
            told = {key: settings.get(key, value) for key, value in (options or other).items()}
            label = f"{label}({', '.join(f'{key}={_short(value)}' for key, value in told.items())})"
        if label in chosen:
            label = next(numbered for n in itertools.count(2) if (numbered := f"{label} #{n}") not in chosen)
        chosen[label] = (spec, made)
    return chosen


def _differing(settings: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are not the same in both."""
    return {name: value for name, value in settings.items() if not _same(value, others[name])}


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.device == other.device and one.dtype == other.dtype and torch.equal(one, other)
    try:
        return type(one) is type(other) and bool(one == other)
    except Exception:  # objects of all sorts, such as arrays
        return False


def _pair(kind: str, entry: object) -> tuple[str, Mapping[str, Any]]:
    if isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str) and isinstance(entry[1], Mapping):
        return entry[0], entry[1]
    raise OptionError(f"Expected a {kind}'s name or a pair (name, {{option: value}}), got {shown(entry)}.")


def _short(value: object) -> str:
    """An option in a label: a tensor by its shape, a model by its class."""
    if isinstance(value, torch.nn.Module):
        return type(value).__name__
    return f"tensor{list(value.shape)}" if isinstance(value, Tensor) else str(value)


def identity(value: object) -> object:
    """A hashable stand-in: equal for equal options, and for the same tensor."""
    return ("tensor", id(value)) if isinstance(value, torch.Tensor) else value
