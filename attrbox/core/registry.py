"""Frozen records by name, with aliases, near-miss hints and entry points.

A registry maps a name to a record that has at least `name` and `aliases`. Third-party packages add
records by naming an object in an entry-point group; it is loaded at the first look-up, so that
importing attrbox stays cheap.
"""

import dataclasses
import importlib.metadata
import inspect
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from attrbox.errors import DuplicateNameError, OptionError, PluginWarning, UnknownNameError, near_miss, shown


class Named(Protocol):
    """What a registry asks of its records."""

    @property
    def name(self) -> str: ...

    @property
    def aliases(self) -> tuple[str, ...]: ...


T = TypeVar("T", bound=Named)
C = TypeVar("C")
P = TypeVar("P")


@dataclass(frozen=True)
class Part(Generic[C]):
    """A record of a class whose instances are parts of a method; `make(**options)` builds one."""

    name: str
    make: type[C]
    aliases: tuple[str, ...] = ()


class Registry(Mapping[str, T], Generic[T]):
    """Records of one kind by name; look-up also knows aliases and ignores case.

    `adopt(name, object)` turns what an entry point of `group` names into a record, unless loading the
    module has registered it already.
    """

    def __init__(self, kind: str, group: str) -> None:
        self.kind = kind
        self.group = group
        self.adopt: Callable[[str, Any], object] | None = None
        self.also_load: list[Registry[Any]] = []  # registries whose plug-ins enter records here too
        self._records: dict[str, T] = {}
        self._keys: dict[str, str] = {}  # casefolded name or alias -> name
        self._plugins_loaded = False

    def add(self, record: T) -> None:
        """File a record.

        Raises:
            OptionError: its name or one of its aliases is no text, or a blank one.
            DuplicateNameError: its name or one of its aliases is taken.
        """
        keys = self.check_names(record.name, record.aliases)
        self._records[record.name] = record
        self._keys.update(dict.fromkeys(keys, record.name))

    def check_names(self, name: object, aliases: object = ()) -> set[str]:
        """The keys of a record that may be filed under these names.

        Raises:
            OptionError, DuplicateNameError: as for `add`.
        """
        if not isinstance(aliases, tuple | list):
            raise OptionError(f"Expected the aliases of the {self.kind} {name!r} as a tuple, got {shown(aliases)}.")
        for text in (name, *aliases):
            if not isinstance(text, str) or not text or text != text.strip() or not text.isprintable():
                raise OptionError(
                    f"Expected the name of a {self.kind} as a text that is not blank, without spaces around it, got "
                    f"{shown(text)}."
                )
        keys = {key.casefold() for key in (name, *aliases)}
        for key in sorted(keys & self._keys.keys()):
            raise DuplicateNameError(
                f"The {self.kind} name {key!r} is already taken by {self._records[self._keys[key]]!r}. "
                "Choose another name."
            )
        return keys

    def remove(self, name: str) -> None:
        """Take a record out again (for interactive work and tests)."""
        record = self[name]
        del self._records[record.name]
        self._keys = {key: owner for key, owner in self._keys.items() if owner != record.name}

    def __getitem__(self, name: str) -> T:
        key = self._find(name)
        if key is None:
            raise UnknownNameError(f"No {self.kind} called {name!r}. {near_miss(name, self)}")
        return self._records[key]

    def __contains__(self, name: object) -> bool:
        return self._find(name) is not None

    def __iter__(self) -> Iterator[str]:
        self.load_plugins()
        return iter(sorted(self._records))

    def __len__(self) -> int:
        self.load_plugins()
        return len(self._records)

    def __repr__(self) -> str:
        return f"<{self.kind} registry: {', '.join(self)}>"

    def _find(self, name: object) -> str | None:
        if not isinstance(name, str):
            return None
        key = self._keys.get(name.casefold())
        if key is None and not self._plugins_loaded:
            self.load_plugins()
            key = self._keys.get(name.casefold())
        return key

    def load_plugins(self) -> None:
        """Load the entry points of this registry's group, once; a broken one warns and is left out."""
        if self._plugins_loaded:
            return
        self._plugins_loaded = True
        for other in self.also_load:
            other.load_plugins()
        for entry_point in importlib.metadata.entry_points(group=self.group):
            try:
                loaded = entry_point.load()
                if entry_point.name.casefold() not in self._keys and self.adopt is not None:
                    self.adopt(entry_point.name, loaded)
            except Exception as error:  # a plug-in is foreign code: whatever it raises must not take attrbox down
                warnings.warn(
                    f"The plug-in {entry_point.name!r} = {entry_point.value!r} ({self.group}) was left out: "
                    f"{type(error).__name__}: {error}",
                    PluginWarning,
                    stacklevel=2,
                )


class Parts(Registry[Part[C]], Generic[C]):
    """Classes whose instances are parts of a method; subclasses of `base`."""

    def __init__(self, kind: str, group: str, base: type[C]) -> None:
        super().__init__(kind, group)
        self.base = base
        self.adopt = lambda name, loaded: self.register(name)(loaded)

    def register(self, name: str) -> Callable[[type[P]], type[P]]:
        """Class decorator: enter a class under the name that the method's option takes.

        Raises:
            OptionError: the name is blank, or the class cannot be registered (`as_dataclass`).
            DuplicateNameError: the name is taken.
        """

        def enter(cls: type[P]) -> type[P]:
            self.check_names(name)
            as_dataclass(cls, self.base)
            self.add(Part(name, cls))  # type: ignore[arg-type]
            return cls

        return enter


# ------------------------------------------------------------------------------------------ classes to be registered


def as_dataclass(cls: Any, base: type) -> None:
    """See that the options of a class to be registered are the fields of a frozen dataclass; make it one if it is none.

    Raises:
        OptionError: it is no subclass of `base`, or abstract, or cannot be built from its fields.
    """
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise OptionError(f"Expected a subclass of attrbox.{base.__name__} to register, got {shown(cls)}.")
    if missing := sorted(getattr(cls, "__abstractmethods__", ())):
        raise OptionError(
            f"The class {cls.__name__} is abstract: it lacks {', '.join(missing)}. Define this, or register a subclass "
            "that does."
        )
    for parent in cls.__mro__[1:]:
        if parent is not base and issubclass(parent, base) and (lost := _bare_options(parent, base)):
            raise OptionError(
                f"The class {cls.__name__} inherits {', '.join(lost)} from {parent.__name__}, which is no dataclass. "
                f"Write @dataclass(frozen=True, kw_only=True) above {parent.__name__}."
            )
    if _bare_options(cls, base):
        shared = {name: ClassVar[Any] for name in inspect.get_annotations(cls) if _is_of_the_base(name, base)}
        cls.__annotations__ = inspect.get_annotations(cls) | shared
        try:
            dataclass(frozen=True, kw_only=True)(cls)
        except (TypeError, ValueError) as error:
            raise OptionError(
                f"The options of {cls.__name__} cannot be told: {error}. Write them as fields of a dataclass, with "
                "@dataclass(frozen=True, kw_only=True) above the class."
            ) from error
    if not getattr(cls, "__dataclass_params__", _FROZEN).frozen:
        raise OptionError(f"The dataclass {cls.__name__} can change. Make it @dataclass(frozen=True, kw_only=True).")
    known = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
    fields = {field.name for field in known}
    for field in known:
        if (old := field.metadata.get("formerly")) in fields:
            raise OptionError(f"The option {old!r} is called {field.name!r} now. Rename it in {cls.__name__}.")
    strays = [
        parameter.name
        for parameter in inspect.signature(cls).parameters.values()
        if parameter.name not in fields and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if strays:
        raise OptionError(
            f"{cls.__name__}.__init__ takes {', '.join(strays)}, which are no fields. Options are the fields of a "
            "dataclass: write @dataclass(frozen=True, kw_only=True) above the class, one annotated field for each "
            "option, and checks into __post_init__."
        )


_FROZEN = dataclasses.make_dataclass("_Frozen", (), frozen=True).__dataclass_params__  # type: ignore[attr-defined]


def _bare_options(cls: type, base: type) -> list[str]:
    """What is written like an option in a class that is no dataclass."""
    if "__dataclass_params__" in vars(cls):
        return []
    annotated = [name for name, kind in inspect.get_annotations(cls).items() if not _is_shared(kind)]
    fields = [name for name, value in vars(cls).items() if isinstance(value, dataclasses.Field)]
    return [name for name in dict.fromkeys([*annotated, *fields]) if not _is_of_the_base(name, base)]


def _is_of_the_base(name: str, base: type) -> bool:
    """Whether the base class has an attribute of this name, which is no option."""
    return hasattr(base, name) and name not in getattr(base, "__dataclass_fields__", {})


def _is_shared(annotation: Any) -> bool:
    """Whether it says ClassVar."""
    if isinstance(annotation, str):
        return "ClassVar" in annotation
    return annotation is ClassVar or typing.get_origin(annotation) is ClassVar
