"""What a method is: a frozen dataclass whose fields are its options, and `attribute(run)`.

    @register_method("gradient_norm", summary="...", reference="...")
    @dataclass(frozen=True, kw_only=True)
    class GradientNorm(Method):
        power: float = option(2.0, "exponent")

        def attribute(self, run):
            return run.gradient().abs() ** self.power

`run` (`attrbox.methods.context.run.Run`) holds a chunk of images and computes each shared quantity once, so that
methods that ask for the same one share it.
"""

import dataclasses
import difflib
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from attrbox.core.dense_tensors import dense
from attrbox.core.fills import FILLS
from attrbox.core.registry import Registry, as_dataclass
from attrbox.core.results import ChannelReduction, Coverage
from attrbox.engine.site import Rule
from attrbox.errors import OptionError, shown

if TYPE_CHECKING:
    from attrbox.methods.context.run import Run


class _Required:
    """Stands where a default would be."""

    def __repr__(self) -> str:
        return "required"


REQUIRED = _Required()


def option(default: Any, help: str) -> Any:
    """A field of a method with its default (REQUIRED: there is none) and a line of help."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A method with its options set. Checks of options go into `__post_init__` and raise `OptionError`.

    Attributes:
        needs_gradients: whether the model must be an `nn.Module` that can be differentiated. Methods that do not need
            it take any callable.
    """

    needs_gradients: ClassVar[bool] = True

    @abstractmethod
    def attribute(self, run: "Run") -> Tensor:
        """The maps of a chunk, [n, K, C, H, W], signed unless documented otherwise."""

    @property
    def rules(self) -> tuple[Rule | None, ...]:
        """The rules that `attribute` will replay on the images' own forward pass, so that one recording can serve
        several methods; None is the true gradient."""
        return ()

    @property
    def layers(self) -> tuple[str | None, ...]:
        """The layers whose feature maps `attribute` will ask for; None is the last spatial one."""
        return ()

    @property
    def asks(self) -> tuple[object, ...]:
        """What else `attribute` will ask of the run, where a method that asks for less can share it."""
        return ()

    @property
    def passes(self) -> int:
        """Forward and backward passes per image, for the progress bar and the size of chunks."""
        return 1

    def passes_on(self, images: Tensor) -> int:
        """The same, where it depends on the shape of the images."""
        del images
        return self.passes

    @property
    def memory(self) -> float:
        """What `attribute` holds per image, in units of what one forward pass leaves for its backward pass."""
        return 1.0

    def expected(self, run: "Run") -> Tensor | None:
        """What the values of each map should sum to, [n, K], if the method promises a sum."""
        del run
        return None

    def coverage(self, run: "Run") -> Coverage:
        """How the model's non-linear operations were treated."""
        if not self.needs_gradients:
            return Coverage(black_box=True)
        return next((run.tape.coverage(rule) for rule in (*self.rules, *run.replayed) if rule is not None), Coverage())


@dataclass(frozen=True)
class OptionInfo:
    """One option of a method: name, default and a line of help."""

    name: str
    default: Any
    help: str

    def __str__(self) -> str:
        return f"{self.name}={self.default!r}: {self.help}"


def option_infos(cls: type) -> tuple[OptionInfo, ...]:
    """The options of a dataclass: its fields."""
    return tuple(
        OptionInfo(field.name, _default(field), str(field.metadata.get("help", "")))
        for field in (dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ())
        if field.init
    )


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

    def create(self, options: Mapping[str, Any]) -> B:
        """The method, or whatever it is, with these options.

        Raises:
            OptionError: an option is unknown, missing or out of range.
            InputError: an option is a nested tensor.
        """
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


@dataclass(frozen=True)
class MethodSpec(Spec[Method]):
    """The record of a method. `attrbox.method_registry["deeplift"].options` lists what can be set."""

    kind: ClassVar[str] = "method"

    reduction: ChannelReduction = "sum"
    units: str = "score"
    only_for: str = ""  # which models it is defined on, in words, if not on all

    @property
    def for_all(self) -> bool:
        """Whether it can be asked for without knowing the model, and without options."""
        return not (self.required or self.only_for)

    def settings(self, built: Method) -> dict[str, Any]:
        rule = getattr(built, "rule", None)  # a rule's own options are those of the method too
        return {info.name: getattr(built, info.name, getattr(rule, info.name, None)) for info in self.options}


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


method_registry: Registry[MethodSpec] = Registry("method", "attrbox.methods")

M = TypeVar("M", bound=type[Method])


def register_method(
    name: str,
    *,
    summary: str,
    reference: str,
    aliases: tuple[str, ...] = (),
    reduction: ChannelReduction = "sum",
    units: str = "score",
    only_for: str = "",
    presets: Mapping[str, Mapping[str, Any]] | None = None,
) -> Callable[[M], M]:
    """Class decorator: enter a `Method` into the registry under `name`.

    Args:
        name: what users type.
        summary: one line for tables.
        reference: where the method was published.
        aliases: other names, for instance the paper's abbreviation.
        reduction: how the channels become one map for the eye.
        units: what one unit of the map is, in words.
        only_for: which models it is defined on, in words, if not on all.
        presets: name -> options that it sets, for a method with an option `preset`; the first is the default, and
            options that are given win over it.

    Raises:
        OptionError: a name is blank, or the class is none that can be registered
            (`attrbox.core.registry.as_dataclass`).
        DuplicateNameError: the name or an alias is taken.
    """

    def enter(cls: M) -> M:
        method_registry.check_names(name, aliases)
        as_dataclass(cls, Method)
        known = presets or {}

        def from_preset(**given: Any) -> Method:
            preset = given.get("preset", next(iter(known)))
            check_choice("preset", preset, tuple(known))
            return cls(**(dict(known[preset]) | given))

        build: Callable[..., Method] = from_preset if known else cls
        infos = option_infos(cls)
        method_registry.add(MethodSpec(name, build, summary, reference, infos, aliases, reduction, units, only_for))
        return cls

    return enter


def _adopt(name: str, loaded: Any) -> None:
    """Enter what an entry point of `attrbox.methods` names, if importing it did not do so."""
    summary = (loaded.__doc__ or name).strip().splitlines()[0]
    register_method(name, summary=summary, reference=f"plug-in {loaded.__module__}")(loaded)


method_registry.adopt = _adopt


# ------------------------------------------------------------------------------------------------ checks of options


def check(valid: bool, name: str, wanted: str, value: object) -> None:
    """Raise `OptionError` unless `valid`."""
    if not valid:
        raise OptionError(f"Expected {name} to be {wanted}, got {shown(value)}.")


def check_count(name: str, value: object) -> None:
    """A whole number of at least 1."""
    valid = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    check(valid, name, "a whole number >= 1", value)


def check_number(
    name: str, value: object, *, above: float = -math.inf, least: float = -math.inf, most: float = math.inf
) -> None:
    """A finite number within bounds."""
    valid = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    bounds = [f"> {above:g}"] * (above > -math.inf) + [f">= {least:g}"] * (least > -math.inf)
    bounds += [f"<= {most:g}"] * (most < math.inf)
    inside = valid and above < float(value) <= most and float(value) >= least  # type: ignore[arg-type]
    check(inside, name, " and ".join(["a number", *bounds]), value)


def check_flag(name: str, value: object) -> None:
    """True or False."""
    check(isinstance(value, bool), name, "True or False", value)


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """One of a few words."""
    check(value in choices, name, " or ".join(repr(choice) for choice in choices), value)


def check_layer(value: object) -> None:
    """A module's name, or None for the last feature map."""
    check(
        value is None or isinstance(value, str), "layer", "the name of a module (model.named_modules()), or None", value
    )


def check_baseline(value: object, name: str = "baseline") -> None:
    """A number or a tensor; its shape is checked against the images later."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")
    valid = number or isinstance(value, Tensor)
    check(valid, name, "a finite number, or a tensor of shape [C, H, W], [1, C, H, W] or [N, C, H, W]", value)


def check_fill(value: object, further: tuple[str, ...] = ()) -> None:
    """One of the words for a fill, or a baseline."""
    if isinstance(value, str):
        check_choice("fill", value, (*FILLS, *further))
    else:
        check_baseline(value, "fill")


def identity(value: object) -> object:
    """A hashable stand-in: equal for equal options, and for the same tensor."""
    return ("tensor", id(value)) if isinstance(value, torch.Tensor) else value
