"""What a metric is: a frozen dataclass whose fields are its options, and `measure(study, outputs)`.

    @register_metric("positive_share", summary="...", reference="...", better="higher")
    @dataclass(frozen=True, kw_only=True)
    class PositiveShare(Metric):
        def measure(self, study, outputs):
            heatmaps = {label: maps.heatmap.flatten(1) for label, maps in study.maps.items()}
            return {
                label: Measurement(heatmap.clamp_min(0).sum(1) / heatmap.abs().sum(1))
                for label, heatmap in heatmaps.items()
            }

A metric sees a chunk of images with the maps of all methods (`attrbox.metrics.context.Study`). What it wants to show
the model it names beforehand, in `views`: so the metrics of a call share its batches. A metric that explains changed
images or changed models calls `study.explain`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias, TypeVar

from torch import Tensor

from attrbox.core.options import Spec, option_infos
from attrbox.core.registry import Registry, as_dataclass
from attrbox.core.renaming import renamed_arguments

if TYPE_CHECKING:
    from attrbox.metrics.context import Study
    from attrbox.metrics.records import Views
    from attrbox.metrics.sources import Source

Direction: TypeAlias = Literal["higher", "lower"]
Need: TypeAlias = Literal["model", "masks", "methods"]


@dataclass(frozen=True)
class Measurement:
    """What a metric says of the maps of one method.

    Attributes:
        values: one number per sample, [n]; NaN where the metric is not defined, which is left out and counted.
        curves: a curve per sample, [n, points], if the metric has one.
        fractions: where its points are, [points].
        groups: if the mean over samples is to be the mean over the means of groups (classes), the group of each, [n].
        details: more per sample, [n, ...].
        note: what is to be said of the values, such as why there are none.
    """

    values: Tensor
    curves: Tensor | None = None
    fractions: Tensor | None = None
    groups: Tensor | None = None
    details: Mapping[str, Tensor] | None = None
    note: str = ""


Measurement.__init__ = renamed_arguments(positions="fractions")(Measurement.__init__)  # type: ignore[method-assign]


@dataclass(frozen=True, kw_only=True)
class Metric(ABC):
    """A metric with its options set. Checks of options go into `__post_init__` and raise `OptionError`.

    Attributes:
        needs: "model" for a metric that shows it images, "masks" for object masks, "methods" for one that explains
            again; nothing, if the maps are enough.
        axis: what the curve runs along, in words.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()
    axis: ClassVar[str] = ""

    def check(self, sources: "Mapping[str, Source]") -> None:
        """Refuse maps of which too little is known.

        Raises:
            InputError: with what is missing.
        """
        del sources

    def views(self, study: "Study") -> "Sequence[Views]":
        """The images whose scores `measure` needs."""
        del study
        return ()

    @abstractmethod
    def measure(self, study: "Study", outputs: Sequence[Tensor]) -> Mapping[str, Measurement]:
        """Measure the maps of each label.

        Args:
            study: a chunk of images, with their maps.
            outputs: the scores of each of the `views`, [count].
        """


@dataclass(frozen=True)
class MetricSpec(Spec[Metric]):
    """The record of a metric. `attrbox.metric_registry["morf"].options` lists what can be set."""

    kind: ClassVar[str] = "metric"

    better: Direction = "higher"
    needs: frozenset[Need] = frozenset()


metric_registry: Registry[MetricSpec] = Registry("metric", "attrbox.metrics")

M = TypeVar("M", bound=type[Metric])


def register_metric(
    name: str, *, summary: str, reference: str, better: Direction = "higher", aliases: tuple[str, ...] = ()
) -> Callable[[M], M]:
    """Class decorator: enter a `Metric` into the registry under `name`.

    Args:
        name: what users type.
        summary: one line for tables.
        reference: where the metric was published.
        better: whether "higher" or "lower" values speak for a method.
        aliases: other names.

    Raises:
        OptionError: a name is blank, or the class is none that can be registered
            (`attrbox.core.registry.as_dataclass`).
        DuplicateNameError: the name or an alias is taken.
    """

    def enter(cls: M) -> M:
        metric_registry.check_names(name, aliases)
        as_dataclass(cls, Metric)
        metric_registry.add(MetricSpec(name, cls, summary, reference, option_infos(cls), aliases, better, cls.needs))
        return cls

    return enter


def list_metrics() -> list[str]:
    """Names of all metrics, plug-ins included; `attrbox.metric_registry[name]` tells more about each."""
    return list(metric_registry)


def _adopt(name: str, loaded: Any) -> None:
    """Enter what an entry point of `attrbox.metrics` names, if importing it did not do so."""
    summary = (loaded.__doc__ or name).strip().splitlines()[0]
    better: Direction = getattr(loaded, "better", "higher")
    register_metric(name, summary=summary, reference=f"plug-in {loaded.__module__}", better=better)(loaded)


metric_registry.adopt = _adopt
