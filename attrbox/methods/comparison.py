"""`explain` and `compare`: check, plan, run chunk by chunk, collect.

The plan is short, because a `Run` keeps what it has computed: the forward pass is recorded once for the rules of all
methods, those that replay it come first, and then it is forgotten before the passes over paths and noise begin.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from attrbox.core.results import Attribution
from attrbox.data.maps.schema import write_maps
from attrbox.methods.base import method_registry as registry
from attrbox.visualization.plots import plot_comparison

MethodLike: TypeAlias = "str | tuple[str, Mapping[str, Any]]"


@dataclass(frozen=True, eq=False)
class Comparison(Mapping[str, Attribution]):
    """The maps of several methods, by label, in the order asked for.

    Attributes:
        attributions: label -> maps.
        images: what was explained, [N, ...].
        predictions: the class of the largest output of each image, [N]; None if the outputs are not [N, classes].
        seed: the seed of the call.
        timings: seconds by label; "forward pass" is the recorded one that the methods shared, and what methods share
            beyond it counts for the first that asks.
    """

    attributions: dict[str, Attribution]
    images: Tensor
    predictions: Tensor | None
    timings: dict[str, float] = field(default_factory=dict)
    seed: int | Sequence[int] = 0

    def __getitem__(self, label: str) -> Attribution:
        if label in self.attributions:
            return self.attributions[label]
        return self.attributions[registry[label].name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.attributions)

    def __len__(self) -> int:
        return len(self.attributions)

    def table(self) -> str:
        """Methods, seconds, largest relative gap and coverage, as a Markdown table."""
        lines = ["| method | seconds | relative gap | non-linear operations |", "|---|---:|---:|---|"]
        for label, maps in self.attributions.items():
            gap = (
                ""
                if maps.relative_gap is None
                else f"{maps.relative_gap.nan_to_num(nan=float('inf')).max().item():.1e}"
            )
            lines.append(f"| {label} | {self.timings[label]:.2f} | {gap} | {maps.coverage} |")
        if "forward pass" in self.timings:
            lines.append(f"| (recorded forward pass, shared) | {self.timings['forward pass']:.2f} | | |")
        return "\n".join(lines)

    def plot(self, path: str | Path | None = None, **options: Any) -> Any:
        """A figure with one row per image and one column per method; see
        `attrbox.visualization.plots.plot_comparison`."""
        return plot_comparison(self.images, self.attributions, path, **options)

    def to_hdf5(self, path: str | Path, **options: Any) -> Path:
        """Write the maps to an HDF5 file; options as for `attrbox.data.maps.schema.write_maps`."""
        specs = {label: registry[maps.method] for label, maps in self.attributions.items()}
        described = {label: {"summary": spec.summary, "reference": spec.reference} for label, spec in specs.items()}
        known = {"predictions": self.predictions, "descriptions": described, "seed": self.seed}
        return write_maps(path, self.attributions, **(known | options))

    def __repr__(self) -> str:
        return "<Comparison\n" + "\n".join(f"  {maps!r}" for maps in self.attributions.values()) + ">"


# ------------------------------------------------------------------------------------------------------ the planner
