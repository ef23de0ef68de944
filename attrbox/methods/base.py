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

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from torch import Tensor

from attrbox.core.options import Spec, option_infos
from attrbox.core.registry import Registry, as_dataclass
from attrbox.core.results import ChannelReduction, Coverage
from attrbox.core.validation import check_choice
from attrbox.engine.site import Rule

if TYPE_CHECKING:
    from attrbox.methods.context.run import Run


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
    presets: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    preset: str | None = None,
    switches: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
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
        presets: name -> options that it sets, for a method with an option `preset`; those that are given win.
        preset: the one that holds by default, and whose options are the method's defaults; None: the first.
        switches: option -> other options that it sets where it is True; presets, and what is given, win.

    Raises:
        OptionError: a name is blank, or the class is none that can be registered
            (`attrbox.core.registry.as_dataclass`).
        DuplicateNameError: the name or an alias is taken.
    """

    def enter(cls: M) -> M:
        method_registry.check_names(name, aliases)
        as_dataclass(cls, Method)
        usual = preset or next(iter(presets), None)

        def build(**given: Any) -> Method:
            options: dict[str, Any] = {}
            for switch in switches:
                options |= switches[switch] if given.get(switch) is True else {}
            if presets:
                chosen: Any = given.get("preset", usual)
                check_choice("preset", chosen, tuple(presets))
                options |= {**presets[chosen], "preset": chosen}
            return cls(**(options | given))

        infos = option_infos(cls, {**presets[usual], "preset": usual} if usual else {})
        method_registry.add(MethodSpec(name, build, summary, reference, infos, aliases, reduction, units, only_for))
        return cls

    return enter


def _adopt(name: str, loaded: Any) -> None:
    """Enter what an entry point of `attrbox.methods` names, if importing it did not do so."""
    summary = (loaded.__doc__ or name).strip().splitlines()[0]
    register_method(name, summary=summary, reference=f"plug-in {loaded.__module__}")(loaded)


method_registry.adopt = _adopt
