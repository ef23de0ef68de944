"""A random map: the control that every other method has to beat."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from attrbox.methods.base import Method, register_method
from attrbox.methods.context.run import Run


@register_method(
    "random",
    summary="Standard normal numbers: the control",
    reference="none; a control",
    units="none",
)
@dataclass(frozen=True, kw_only=True)
class Random(Method):
    """Independent standard normal numbers, from the image's seed alone."""

    needs_gradients: ClassVar[bool] = False

    @property
    def passes(self) -> int:
        return 0

    def attribute(self, run: Run) -> Tensor:
        shape = (len(run.images), run.scores.shape[1], *run.images.shape[1:])
        return run.samples.normal(0).unsqueeze(1).expand(shape).clone()
