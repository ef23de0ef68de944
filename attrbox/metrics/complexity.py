"""How few pixels a map puts its weight on; the model is not asked."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attrbox.metrics.base import Measurement, Metric, register_metric
from attrbox.metrics.context import Study


@dataclass(frozen=True, kw_only=True)
class Concentration(Metric):
    """One number from the shares of the pixels in the absolute map. Not defined for a map of zeros."""

    @abstractmethod
    def score(self, shares: Tensor) -> Tensor:
        """The number of each sample, [n], from shares [n, pixels] that sum to 1."""

    def measure(self, study: Study, outputs: Sequence[Tensor]) -> Mapping[str, Measurement]:
        measured = {}
        for label, maps in study.maps.items():
            sizes = maps.heatmap.flatten(1).abs()
            total = sizes.sum(1, keepdim=True)
            measured[label] = Measurement(self.score(sizes / torch.where(total > 0, total, torch.nan)))
        return measured


@register_metric(
    "sparseness",
    summary="Gini index of the absolute map: 0 if uniform, near 1 if one pixel has all",
    reference="Chalasani et al. 2020",
)
@dataclass(frozen=True, kw_only=True)
class Sparseness(Concentration):
    """sum over i of (2 i - n - 1) a_i / n,     a the shares in rising order, i from 1"""

    def score(self, shares: Tensor) -> Tensor:
        count = shares.shape[1]
        weights = 2 * torch.arange(1, count + 1, device=shares.device, dtype=shares.dtype) - count - 1
        return (shares.sort(1).values * weights).sum(1) / count


@register_metric(
    "complexity",
    summary="Entropy of the absolute map in nats: 0 if one pixel has all, ln n if uniform over n",
    reference="Bhatt et al. 2020",
    better="lower",
)
@dataclass(frozen=True, kw_only=True)
class Complexity(Concentration):
    """- sum of a ln a,     a the shares, 0 ln 0 = 0"""

    def score(self, shares: Tensor) -> Tensor:
        return -torch.xlogy(shares, shares).sum(1)
