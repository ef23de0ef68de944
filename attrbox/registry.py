"""Frozen records by name, with aliases, near-miss hints and entry points.

A registry maps a name to a record that has at least `name` and `aliases`. Third-party packages add
records by naming an object in an entry-point group; it is loaded at the first look-up, so that
importing attrbox stays cheap.
"""

import importlib.metadata
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from attrbox.errors import DuplicateNameError, PluginWarning, UnknownNameError, near_miss


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
            DuplicateNameError: its name or one of its aliases is taken.
        """
        keys = {key.casefold() for key in (record.name, *record.aliases)}
        for key in sorted(keys & self._keys.keys()):
            raise DuplicateNameError(
                f"The {self.kind} name {key!r} is already taken by {self._records[self._keys[key]]!r}. "
                "Choose another name."
            )
        self._records[record.name] = record
        self._keys.update(dict.fromkeys(keys, record.name))

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
    """Classes whose instances are parts of a method."""

    def __init__(self, kind: str, group: str) -> None:
        super().__init__(kind, group)
        self.adopt = lambda name, loaded: self.register(name)(loaded)

    def register(self, name: str) -> Callable[[type[P]], type[P]]:
        """Class decorator: enter a class under the name that the method's option takes.

        Raises:
            DuplicateNameError: the name is taken.
        """

        def enter(cls: type[P]) -> type[P]:
            self.add(Part(name, cls))  # type: ignore[arg-type]
            return cls

        return enter
