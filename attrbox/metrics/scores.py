"""What one metric says of one method: numbers, curves, their mean and its interval."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attrbox.metrics.base import Direction, Measurement
from attrbox.metrics.statistics import bootstrap_interval, grouped_mean


@dataclass(frozen=True, eq=False)
class Score:
    """What one metric says of one method.

    Attributes:
        metric: the registry's name.
        values: one number per sample, [N]; NaN for those that are left out, as the metric is not defined on them.
        better: whether "higher" or "lower" values speak for the method.
        options: the metric's options as they were used.
        curves: a curve per sample, [N, points]; None for metrics without. `values` are then what the metric makes of
            them, for the removal curves the areas, normalised by the range.
        fractions: where the points of the curves are, [points].
        axis: what these are, in words.
        groups: the group of each sample, [N], if the mean is taken over groups.
        details: what else the metric has to tell, per sample.
        seed: of the bootstrap.
        note: what is to be said of the values, such as why there are none.
    """

    metric: str
    values: Tensor
    better: Direction
    options: Mapping[str, Any]
    curves: Tensor | None = None
    fractions: Tensor | None = None
    axis: str = ""
    groups: Tensor | None = None
    details: Mapping[str, Tensor] = field(default_factory=dict)
    seed: int = 0
    note: str = ""

    @property
    def auc(self) -> Tensor:
        """The area under each sample's curve, normalised by the range, [N].

        Raises:
            AttributeError: the metric has no curve.
        """
        if self.curves is None:
            raise AttributeError(f"The metric {self.metric!r} has no curve, so no area. Use .values.")
        return self.values

    @property
    def left_out(self) -> Tensor:
        """The samples on which the metric is not defined, as bool [N]."""
        return self.values.isnan()

    @cached_property
    def mean(self) -> float:
        """Mean over the samples that are not left out; over groups of their means, if there are groups."""
        return grouped_mean(as_array(self.values), _groups(self.groups))

    @cached_property
    def interval(self) -> tuple[float, float]:
        """The 95 % bootstrap interval of the mean."""
        return bootstrap_interval(as_array(self.values), _groups(self.groups), seed=self.seed)

    @property
    def mean_curve(self) -> Tensor | None:
        """The mean curve of the samples that are not left out, [points]."""
        return None if self.curves is None else self.curves[~self.left_out].nanmean(0)

    def curve_interval(self) -> NDArray[Any] | None:
        """The 95 % bootstrap interval of each point of the mean curve, [points, 2]."""
        if self.curves is None:
            return None
        defined = as_array(self.curves[~self.left_out])
        return np.array([bootstrap_interval(column, seed=self.seed) for column in defined.T])

    def __len__(self) -> int:
        return len(self.values)

    def __repr__(self) -> str:
        low, high = self.interval
        return f"<Score {self.metric} {self.mean:.4g} [{low:.4g}, {high:.4g}], {_count(self)}>"

    @classmethod
    def joined(cls, parts: Sequence[Measurement], **known: Any) -> "Score":
        """The measurements of the chunks of a call, in order; `known` are the other attributes."""
        first = parts[0]
        details = {name: torch.cat([(part.details or {})[name] for part in parts]) for name in first.details or {}}
        return cls(
            values=torch.cat([part.values for part in parts]),
            curves=None if first.curves is None else torch.cat([p.curves for p in parts if p.curves is not None]),
            fractions=first.fractions,
            groups=None if first.groups is None else torch.cat([p.groups for p in parts if p.groups is not None]),
            details=details,
            note=first.note,
            **known,
        )


def _count(score: Score) -> str:
    left = int(score.left_out.sum())
    return f"{len(score) - left} samples" + (f", {left} left out" if left else "")


def as_array(values: Tensor) -> NDArray[Any]:
    """The numbers in double precision."""
    return values.detach().double().cpu().numpy()


def _groups(groups: Tensor | None) -> NDArray[Any] | None:
    return None if groups is None else groups.cpu().numpy()
