"""What there is to choose from: names of methods by pattern, and all that is known of one."""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from attrbox.core.options import REQUIRED, OptionInfo
from attrbox.methods.base import method_registry

if TYPE_CHECKING:
    from rich.console import Group


def list_methods(pattern: str = "*") -> list[str]:
    """Names of the methods that match a pattern, plug-ins included; `attrbox.describe(name)` tells more about each.

    Args:
        pattern: with `*` and `?` as in file names; upper and lower case are alike, and aliases match too.

    Example:
        >>> import attrbox
        >>> attrbox.list_methods("*grad_cam*")
        ['grad_cam', 'grad_cam_plus_plus', 'guided_grad_cam']
    """
    wanted = pattern.casefold()
    return [
        name
        for name, spec in method_registry.items()
        if any(fnmatchcase(known.casefold(), wanted) for known in (name, *spec.aliases))
    ]


@dataclass(frozen=True)
class Description:
    """All that is known of a method; prints as text, and as a table in a terminal with rich.

    Attributes:
        name: in the registry.
        summary: in one line.
        reference: where it was published.
        aliases: other names.
        units: of one unit of the map.
        only_for: which models it is defined on, in words; empty for all.
        passes: forward and backward passes per image with the default options; None if an option is required.
        options: names, defaults and help.
    """

    name: str
    summary: str
    reference: str
    aliases: tuple[str, ...]
    units: str
    only_for: str
    passes: int | None
    options: tuple[OptionInfo, ...]

    @property
    def facts(self) -> dict[str, str]:
        """What is not an option, by name."""
        cost = "depends on its options" if self.passes is None else f"{self.passes} per image"
        facts = {
            "Reference": self.reference,
            "Aliases": ", ".join(self.aliases) or "-",
            "Units": self.units,
            "Passes": cost,
        }
        return facts | ({"Only for": self.only_for} if self.only_for else {})

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.summary}", *(f"  {name}: {text}" for name, text in self.facts.items())]
        return "\n".join([*lines, "  Options:", *(f"    {_shown(info)}" for info in self.options or ())])

    def __rich__(self) -> "Group":
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table("Option", "Default", "Meaning")
        for info in self.options:
            table.add_row(info.name, "" if info.default is REQUIRED else repr(info.default), info.help)
        facts = "\n".join(f"{name}: {text}" for name, text in self.facts.items())
        return Group(Text(f"{self.name}: {self.summary}", style="bold"), Text(facts), table)


def describe(name: str) -> Description:
    """All that is known of a method: options with defaults and help, units, cost, reference.

    Args:
        name: of `list_methods()`, or an alias.

    Raises:
        UnknownNameError: there is no such method.

    Example:
        >>> import attrbox
        >>> attrbox.describe("IG").passes
        50
    """
    spec = method_registry[name]
    passes = None if spec.required else spec.create({}).passes
    return Description(
        spec.name, spec.summary, spec.reference, spec.aliases, spec.units, spec.only_for, passes, spec.options
    )


def _shown(info: OptionInfo) -> str:
    return f"{info.name} (required): {info.help}" if info.default is REQUIRED else str(info)
