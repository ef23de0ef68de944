"""Whether a map changes when the image hardly does."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attrbox.core.options import option
from attrbox.core.validation import check, check_count
from attrbox.metrics.base import Measurement, Metric, register_metric
from attrbox.metrics.context import Study

_DRAWS = 2**43


@register_metric(
    "sensitivity_max",
    summary="Largest relative change of the map under small noise on the image",
    reference="Yeh et al. 2019",
    better="lower",
)
@dataclass(frozen=True, kw_only=True)
class SensitivityMax(Metric):
    """max over draws d of |A(X + d) - A(X)| / |A(X)|,     d uniform in [-radius, radius] for each number of the image

    Norms are Euclidean. The target, and the seeds of methods that draw, stay the same. Not defined for a map of zeros.
    """

    radius: float = option(0.02, "largest change of each number of the image")
    n_samples: int = option(10, "noisy images", formerly="draws")

    needs = frozenset({"model", "methods"})

    def __post_init__(self) -> None:
        check(0 < self.radius < float("inf"), "radius", "a positive number", self.radius)
        check_count("n_samples", self.n_samples)

    def measure(self, study: Study, outputs: Sequence[Tensor]) -> Mapping[str, Measurement]:
        assert study.model is not None
        largest = {label: study.images.new_zeros(len(study)) for label in study.maps}
        for draw in range(self.n_samples):
            noise = self.radius * (2 * study.samples.numbers(_DRAWS + draw, study.images.shape[1:], uniform=True) - 1)
            for label, maps in study.explain(study.model, study.images + noise).items():
                change = _norm(maps.values - study.maps[label].values)
                largest[label] = torch.maximum(largest[label], change)
        sizes = {label: _norm(maps.values) for label, maps in study.maps.items()}
        return {
            label: Measurement(largest[label] / torch.where(size > 0, size, torch.nan)) for label, size in sizes.items()
        }


def _norm(values: Tensor) -> Tensor:
    return values.flatten(1).square().sum(1).sqrt()
